"""Between data and model: one sample, rows of samples, and the few shapes of such rows.

A row holds several samples. It is laid out as [prefixes | visual tokens | texts]: every sample's
text before its visual slot (the chat header) has a place of its own, padded on its right; then come
the visual tokens of all samples one after another, then the texts after their visual slots
(question, answers) likewise. No result depends on the padding, or on the other samples of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from xcomp_jax.data.prompt import IGNORE, IMAGE_TOKEN
from xcomp_jax.errors import XCompError

Leaf = Any  # an array of numpy or jax, or whatever a tree_map puts in its place (specs, shardings)


class BatchError(XCompError, ValueError):
  """Samples that make no batch; the message names the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """One sample on the host.

  frames: of its video; 1 is an image, 0 text alone.
  visual: floating [frames, N, D], N merged tokens of the tower a frame; None where they are not
  made yet (see `Clips`).
  tokens: int32[L], with one IMAGE_TOKEN (none without frames).
  labels: int32[L], the token itself where it is supervised, else IGNORE.
  query: bool[L], True at each token whose successor is the first of an answer.
  index: place of the sample in its dataset.
  """

  frames: int
  visual: np.ndarray | None
  tokens: np.ndarray
  labels: np.ndarray
  query: np.ndarray
  index: int


class Length(NamedTuple):
  """What decides where a sample fits, and what it costs."""

  frames: int  # 0: text alone
  clip_frames: int  # 1 for images and text alone
  prefix: int  # tokens before the visual slot; 0 in text alone
  text: int  # tokens after it; all of them in text alone


def length_table(lengths: Sequence[Length] | np.ndarray) -> np.ndarray:
  """Gives lengths as int64[n, 4], with the columns of `Length`."""
  return np.asarray(lengths, np.int64).reshape(-1, len(Length._fields))


@dataclasses.dataclass(kw_only=True, frozen=True, order=True)
class Shape:
  """The arrays of a micro-batch: rows, each of which holds several samples one after the other.

  rows: over all devices. samples: places of a row. prefix: token slots of a place, before the
  visual slot. frames: of a row, all
  its samples together. text: token slots of a row after the visual slots, likewise.
  """

  rows: int
  samples: int
  prefix: int
  frames: int
  text: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """What the LLM takes: B rows of up to M samples. Arrays of numpy, jax, or ShapeDtypeStruct.

  visual: floating [B, T, N, D] merged tokens of T frames, those of a row's samples one after
  another; None where they come later.
  frames: int32[B, M], of each sample.
  prefix: int32[B, M, P]; prefix_length: int32[B, M].
  text: int32[B, L], of a row's samples one after another; text_length: int32[B, M].
  targets: int32[B, M * P + M + L], what each row of the output must predict next, else IGNORE:
    those of the prefixes, of each sample's last visual token, and of the texts.
  query: bool[B, L], text tokens whose successor is the first token of an answer.
  weight: float32[B, M], 1 for a sample, 0 for an empty place.
  index: int32[B, M], Example.index, -1 for an empty place.
  """

  visual: Leaf
  frames: Leaf
  prefix: Leaf
  prefix_length: Leaf
  text: Leaf
  text_length: Leaf
  targets: Leaf
  query: Leaf
  weight: Leaf
  index: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clips:
  """Clips of the rows of a Batch, for a tower that is trained with the LLM.

  frames: uint8[B, K, F, S, S, 3]; F = 1 is the image path. place: int32[B, K], slot of a clip's
  first frame in its row of `Batch.visual`; below 0: there is no such clip.
  """

  frames: Leaf
  place: Leaf


def split_text(example: Example) -> tuple[int, int]:
  """Gives (tokens before, tokens after) the visual slot of a sample.

  Raises:
    BatchError: not one slot in a sample that has frames, or one in text alone.
  """
  slots = np.flatnonzero(example.tokens == IMAGE_TOKEN)
  if len(slots) != (example.frames > 0):
    raise BatchError(
      f"sample {example.index}: {len(slots)} visual slots for {example.frames} frames; expected "
      f"one slot, or no frames",
      sample=example.index,
      slots=len(slots),
      frames=example.frames,
    )
  before = int(slots[0]) if len(slots) else 0
  return before, len(example.tokens) - before - len(slots)


def collate(
  rows: Sequence[Sequence[Example]],
  shape: Shape,
  visual: tuple[tuple[int, int], Any] | None = None,
) -> Batch:
  """Packs samples into the rows of a Batch; rows that are missing are empty.

  Args:
    rows: the samples of each.
    shape: of the batch.
    visual: ((N, D), dtype) of a frame's merged tokens; None: as the samples have them, if they do.

  Raises:
    BatchError: samples that do not fit the shape, or visual arrays of different kinds.
  """
  if len(rows) > shape.rows:
    raise BatchError(
      f"{len(rows)} rows for a batch of {shape.rows}", found=len(rows), allowed=shape.rows
    )
  B, M, P, L = shape.rows, shape.samples, shape.prefix, shape.text
  kinds = {
    (e.visual.shape[1:], e.visual.dtype) for row in rows for e in row if e.visual is not None
  }
  kinds |= set() if visual is None else {(visual[0], np.dtype(visual[1]))}
  if len(kinds) > 1:
    raise BatchError(
      f"visual tokens of different kinds in one batch: {sorted(map(str, kinds))}", kinds=kinds
    )
  tokens = None
  for kind, dtype in kinds:
    tokens = np.zeros((B, shape.frames, *kind), dtype)
  prefix, text = np.zeros((B, M, P), np.int32), np.zeros((B, L), np.int32)
  frames, prefix_length, text_length = np.zeros((3, B, M), np.int32)
  before, last, after = (np.full((B, n), IGNORE, np.int32) for n in (M * P, M, L))
  query, weight, index = (
    np.zeros((B, L), bool),
    np.zeros((B, M), np.float32),
    np.full((B, M), -1, np.int32),
  )
  for r, row in enumerate(rows):
    t = l = 0  # frames and text tokens that the row holds already
    for m, example in enumerate(row):
      p, n = split_text(example)
      if m >= M or p > P or t + example.frames > shape.frames or l + n > L:
        raise BatchError(
          f"sample {example.index} has {example.frames} frames, {p} tokens before and {n} after "
          f"the visual slot; behind {m} samples of {t} frames and {l} tokens in its row it does "
          f"not fit {shape}",
          sample=example.index,
          held=(example.frames, p, n),
          taken=(t, l),
          shape=shape,
        )
      first = len(example.tokens) - n  # of the tokens after the slot
      prefix[r, m, :p], text[r, l : l + n] = example.tokens[:p], example.tokens[first:]
      before[r, m * P : m * P + max(p - 1, 0)] = example.labels[1:p]
      if example.frames:
        # the last visual token predicts the first token of the text
        last[r, m] = example.labels[first]
      after[r, l : l + n - 1] = example.labels[first + 1 :]
      query[r, l : l + n] = example.query[first:]
      if tokens is not None and example.visual is not None:
        tokens[r, t : t + example.frames] = example.visual
      frames[r, m], prefix_length[r, m], text_length[r, m] = example.frames, p, n
      weight[r, m], index[r, m] = 1, example.index
      t, l = t + example.frames, l + n
  return Batch(
    visual=tokens,
    frames=frames,
    prefix=prefix,
    prefix_length=prefix_length,
    text=text,
    text_length=text_length,
    targets=np.concatenate([before, last, after], axis=1),
    query=query,
    weight=weight,
    index=index,
  )


def batch_spec(shape: Shape, visual: tuple[tuple[int, int], Any] | None) -> Batch:
  """Makes a Batch of ShapeDtypeStructs; `visual` is ((N, D), dtype) of a frame's merged tokens."""

  def array(*rest, dtype=np.int32):
    return jax.ShapeDtypeStruct((shape.rows, *rest), np.dtype(dtype))

  M, P, L = shape.samples, shape.prefix, shape.text
  return Batch(
    visual=visual and array(shape.frames, *visual[0], dtype=visual[1]),
    frames=array(M),
    prefix=array(M, P),
    prefix_length=array(M),
    text=array(L),
    text_length=array(M),
    targets=array(M * P + M + L),
    query=array(L, dtype=bool),
    weight=array(M, dtype=np.float32),
    index=array(M),
  )


def fake_batch(spec: Batch, vocab_size: int, seed: int = 0) -> Batch:
  """Makes a random but valid Batch of that spec: full rows of samples of equal size, every text
  token supervised.
  """
  rng = np.random.default_rng(seed)

  def numbers(s):
    return rng.integers(0, vocab_size, s.shape).astype(np.int32)

  (B, M, P), L, T = spec.prefix.shape, spec.text.shape[1], spec.visual.shape[1]

  def shared(total):
    return np.broadcast_to(np.diff(np.arange(M + 1) * total // M).astype(np.int32), (B, M)).copy()

  text, text_length = numbers(spec.text), shared(L)
  targets = np.full(spec.targets.shape, IGNORE, np.int32)
  targets[:, M * P + M :] = text
  query = np.zeros((B, L), bool)
  query[:, np.cumsum(text_length[0]) - 1] = True
  return Batch(
    visual=rng.normal(size=spec.visual.shape).astype(spec.visual.dtype),
    frames=shared(T),
    prefix=numbers(spec.prefix),
    prefix_length=np.full((B, M), P, np.int32),
    text=text,
    text_length=text_length,
    targets=targets,
    query=query,
    weight=np.ones((B, M), np.float32),
    index=np.arange(B * M, dtype=np.int32).reshape(B, M),
  )
