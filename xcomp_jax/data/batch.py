"""Between data and model: one sample, one batch, and the finite set of shapes.

A sequence is laid out as [prefix | visual tokens | text]; each part is padded on its right to the bucket's
length, and no result depends on the padding. `prefix` is the text before the visual slot (chat header),
`text` what follows it (question, answers).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

IMAGE_TOKEN = -200  # stands in `Example.tokens` where the visual tokens go (FACTS.md 3)
IGNORE = -100  # a label or target that is not supervised
Leaf = Any  # an array of numpy or jax, or whatever a tree_map puts in its place (specs, shardings)


@dataclasses.dataclass(frozen=True)
class Example:
  """One sample on the host.

  visual: uint8[C, F, S, S, 3] frames, or floating [C, N, D] merged tower features; C = 0 for text alone.
  tokens: int32[L], with one IMAGE_TOKEN (none if C = 0).
  labels: int32[L], the token itself where it is supervised, else IGNORE.
  query: bool[L], True at each token whose successor is the first of an answer.
  index: place of the sample in its dataset.
  """

  visual: np.ndarray
  tokens: np.ndarray
  labels: np.ndarray
  query: np.ndarray
  index: int


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
  """A batch shape: clips of clip_frames frames, tokens before and after the visual slot."""

  clips: int
  clip_frames: int
  prefix: int
  text: int

  @property
  def frames(self) -> int:
    """Frames of a sample that fills the bucket."""
    return self.clips * self.clip_frames


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """What the model takes; arrays of numpy, jax, or ShapeDtypeStruct.

  visual: uint8[B, C, F, S, S, 3] frames or floating [B, C, N, D] merged features, right-padded in C.
  clips: int32[B], valid clips.
  prefix: int32[B, P]; prefix_length: int32[B].
  text: int32[B, L]; text_length: int32[B].
  targets: int32[B, P + 1 + L], what each row must predict next, else IGNORE; rows are the prefix, the last
    visual token, and the text.
  query: bool[B, L], text rows whose successor is the first token of an answer.
  weight: float32[B], 1 for a sample, 0 for a padding row of the batch.
  index: int32[B], Example.index, -1 for padding.
  """

  visual: Leaf
  clips: Leaf
  prefix: Leaf
  prefix_length: Leaf
  text: Leaf
  text_length: Leaf
  targets: Leaf
  query: Leaf
  weight: Leaf
  index: Leaf


def collate(examples: Sequence[Example], bucket: Bucket, size: int | None = None) -> Batch:
  """Pads examples into one Batch of `size` rows (default: as many as there are); missing rows get weight 0.

  Raises:
    ValueError: an example that does not fit the bucket, or visual arrays of different kinds.
  """
  size = size or len(examples)
  if not 0 < len(examples) <= size:
    raise ValueError(f"{len(examples)} examples for a batch of {size} rows")
  first = examples[0].visual
  visual = np.zeros((size, bucket.clips, *first.shape[1:]), first.dtype)
  prefix = np.zeros((size, bucket.prefix), np.int32)
  text = np.zeros((size, bucket.text), np.int32)
  targets = np.full((size, bucket.prefix + 1 + bucket.text), IGNORE, np.int32)
  query = np.zeros((size, bucket.text), bool)
  clips, prefix_length, text_length = np.zeros((3, size), np.int32)
  weight = np.zeros(size, np.float32)
  index = np.full(size, -1, np.int32)
  for row, example in enumerate(examples):
    n = len(example.visual)
    slots = np.flatnonzero(example.tokens == IMAGE_TOKEN)
    if len(slots) != (n > 0):
      raise ValueError(f"sample {example.index}: {len(slots)} visual slots for {n} clips; expected one slot, or no clips")
    slot = int(slots[0]) if n else 0
    rest = slot + 1 if n else 0
    p, t = slot, len(example.tokens) - rest
    if n > bucket.clips or p > bucket.prefix or t > bucket.text:
      raise ValueError(f"sample {example.index} has {n} clips, {p} tokens before and {t} after the visual slot; it does not fit {bucket}")
    if example.visual.shape[1:] != first.shape[1:] or example.visual.dtype != first.dtype:
      raise ValueError(f"sample {example.index}: visual {example.visual.dtype}{example.visual.shape} beside {first.dtype}{first.shape}")
    visual[row, :n] = example.visual
    prefix[row, :p], text[row, :t] = example.tokens[:slot], example.tokens[rest:]
    prefix_length[row], text_length[row], clips[row] = p, t, n
    query[row, :t] = example.query[rest:]
    targets[row, : max(p - 1, 0)] = example.labels[1:slot]
    after = example.labels[rest:]
    if n:
      targets[row, bucket.prefix] = after[0]  # the last visual token predicts the first token of the text
    targets[row, bucket.prefix + 1 :][: t - 1] = after[1:]
    weight[row], index[row] = 1, example.index
  return Batch(visual, clips, prefix, prefix_length, text, text_length, targets, query, weight, index)


def batch_spec(bucket: Bucket, size: int, visual: tuple[tuple[int, ...], np.dtype]) -> Batch:
  """A Batch of ShapeDtypeStructs; `visual` is (shape of one clip, dtype)."""
  i32 = lambda *shape: jax.ShapeDtypeStruct((size, *shape), np.int32)
  shape, dtype = visual
  return Batch(
    visual=jax.ShapeDtypeStruct((size, bucket.clips, *shape), dtype),
    clips=i32(), prefix=i32(bucket.prefix), prefix_length=i32(), text=i32(bucket.text), text_length=i32(),
    targets=i32(bucket.prefix + 1 + bucket.text),
    query=jax.ShapeDtypeStruct((size, bucket.text), bool),
    weight=jax.ShapeDtypeStruct((size,), np.float32), index=i32(),
  )


def fake_batch(spec: Batch, vocab_size: int, seed: int = 0) -> Batch:
  """A random but valid Batch of that spec: full lengths, every text row supervised."""
  rng = np.random.default_rng(seed)
  ids = lambda s: rng.integers(0, vocab_size, s.shape).astype(np.int32)
  size, p = spec.prefix.shape
  full = lambda n: np.full(size, n, np.int32)
  visual = rng.integers(0, 256, spec.visual.shape) if spec.visual.dtype == np.uint8 else rng.normal(size=spec.visual.shape)
  text = ids(spec.text)
  targets = np.full(spec.targets.shape, IGNORE, np.int32)
  targets[:, p : p + text.shape[1]] = text
  query = np.zeros(spec.query.shape, bool)
  query[:, -1] = True
  return Batch(
    visual=visual.astype(spec.visual.dtype), clips=full(spec.visual.shape[1]), prefix=ids(spec.prefix),
    prefix_length=full(p), text=text, text_length=full(text.shape[1]), targets=targets, query=query,
    weight=np.ones(size, np.float32), index=np.arange(size, dtype=np.int32),
  )
