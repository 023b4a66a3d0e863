"""The whole model as functions of its parameters and a batch. Training, asking and evaluation call
these same functions.

  encode_frames  pixels of clips -> merged features of the tower, 16 a frame
  fill, seen     merged features -> their places in the rows of a batch
  place_tokens   features and text -> embedded rows [prefix | visual | text]
  forward        rows through the LLM's layers, with LP-Comp between them
  loss           rows that have a target -> logits -> next-token loss of each sample
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from xcomp_jax.config import InternVideo2Config, VLMConfig
from xcomp_jax.data.batch import IGNORE, Batch, Clips
from xcomp_jax.model import qwen2
from xcomp_jax.model.internvideo2 import InternVideo2
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.model.layout import from_blocks, in_blocks, padded
from xcomp_jax.model.token_merging import Projector, merge
from xcomp_jax.model.umt import Vision
from xcomp_jax.parallel.mesh import AXES, constrain, parts

LOGIT_ROWS = 1024  # rows per device whose float32 logits exist at once: 0.6 GB at 152k words
# and at most in all, since every device that has some of the words has all rows
GATHERED_ROWS = 16 * LOGIT_ROWS
NOWHERE = 2**30  # an index that no array has


class VLM(nnx.Module):
  """Parameters of tower, projector and LLM; everything it does is a function below."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    self.cfg = cfg
    tower = InternVideo2 if isinstance(cfg.vision, InternVideo2Config) else Vision
    self.vision = tower(cfg, rngs=rngs, param_dtype=param_dtype)
    self.projector = Projector(cfg, rngs=rngs, param_dtype=param_dtype)
    self.llm = qwen2.Decoder(cfg, rngs=rngs, param_dtype=param_dtype)


def encode_frames(
  model: VLM, frames: UInt8[Array | np.ndarray, "C F S S 3"]
) -> Float[Array, "C N D"]:
  """Tower and token merging of clips, a chunk at a time so that peak memory does not grow with
  their number.

  Args:
    model: the parameters.
    frames: uint8[C, F, S, S, 3]; F = 1 is the image path.

  Returns:
    [C, F * 16, D], merged features before the projector.
  """
  return tower_features(model.vision, model.cfg, frames)


def encode_apart(
  model: VLM, frames: UInt8[Array | np.ndarray, "C F S S 3"]
) -> Float[Array, "C N D"]:
  """`encode_frames` with the clips split evenly over all devices of `jax.set_mesh`, whose number
  divides C, and the tower whole on each, for as long as this takes; so none waits for another.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return encode_frames(model, frames)
  return tower_apart(*nnx.split(model.vision), model.cfg, frames, mesh)


def tower_apart(
  graph: nnx.GraphDef,
  tower: nnx.State,
  cfg: VLMConfig,
  frames: UInt8[Array | np.ndarray, "C F S S 3"],
  mesh: Mesh | AbstractMesh,
) -> Float[Array, "C N D"]:
  """Does what `encode_apart` does with the tower alone."""
  every = PartitionSpec(AXES)
  return jax.shard_map(
    lambda tower, frames: tower_features(nnx.merge(graph, tower), cfg, frames),
    mesh=mesh,
    in_specs=(PartitionSpec(), every),
    out_specs=every,
    check_vma=False,
  )(tower, frames)


def tower_features(
  tower: Vision | InternVideo2, cfg: VLMConfig, frames: UInt8[Array | np.ndarray, "C F S S 3"]
) -> Float[Array, "C N D"]:
  """Does what `encode_frames` does with the tower alone."""
  C, F, *pixels = frames.shape
  target = F * cfg.tokens_per_frame
  if C == 0:
    return jnp.zeros((0, target, cfg.vision.width), cfg.dtype)

  def chunk(frames):  # [n, F, S, S, 3] -> [n, F * 16, D]
    return merge(tower(constrain(frames, "clips")), target, cfg.vision.heads)

  X = parts("clips") if C % parts("clips") == 0 else 1  # every device has clips in each chunk
  each = frames.reshape(X, C // X, F, *pixels)
  size = min(cfg.clips_per_chunk, C // X)
  whole = C // X // size * size  # clips of a device in chunks of this size; the rest is one more
  chunks = jnp.moveaxis(each[:, :whole].reshape(X, -1, size, F, *pixels), 1, 0)
  out = jax.lax.map(chunk, chunks.reshape(-1, X * size, F, *pixels))  # [chunks, X * size, N, D]
  N, D = out.shape[2:]
  out = jnp.moveaxis(out.reshape(-1, X, size, N, D), 0, 1).reshape(X, whole, N, D)
  if whole < C // X:
    rest = chunk(each[:, whole:].reshape(-1, F, *pixels)).reshape(X, -1, N, D)
    out = jnp.concatenate([out, rest], axis=1)
  return constrain(out.reshape(C, N, D), "clips")


def fill(
  visual: Float[Array, "B T n D"], features: Float[Array, "C N D"], place: Int[Array, "C 2"]
) -> Float[Array, "B T n D"]:
  """Puts merged clips where they belong in the rows of a batch.

  Args:
    visual: [B, T, n, D], n merged tokens of every frame.
    features: [C, F * n, D] of `encode_frames`.
    place: int32[C, 2], row and slot of each clip's first frame. Frames whose row or slot is not
      there are dropped.
  """
  n, D = visual.shape[2:]
  frames = features.reshape(len(features), -1, n, D)
  rows, slots = place[:, :1], place[:, 1:] + jnp.arange(frames.shape[1])
  # below 0 would count from the end
  rows, slots = (jnp.where(index < 0, NOWHERE, index) for index in (rows, slots))
  return visual.at[rows, slots].set(frames.astype(visual.dtype), mode="drop")


def seen(model: VLM, batch: Batch, clips: tuple[Clips, ...]) -> Batch:
  """Fills in the visual tokens of a batch from its clips; those of several frames and images are
  apart.
  """
  visual = batch.visual
  for some in clips:
    rows = jnp.where(some.place < 0, NOWHERE, jnp.arange(len(visual))[:, None])
    features = encode_frames(model, some.frames.reshape(-1, *some.frames.shape[2:]))
    visual = fill(visual, features, jnp.stack([rows, some.place], axis=-1).reshape(-1, 2))
  return dataclasses.replace(batch, visual=constrain(visual, "batch", "sequence"))


def place_tokens(
  model: VLM,
  features: Float[Array, "B T N D"],
  prefix: Int[Array, "B P"],
  text: Int[Array, "B L"],
) -> Float[Array, "B S E"]:
  """Projects features and puts them between the two parts of the text.

  Args:
    model: the parameters.
    features: [B, T, N, D] merged tower features, N tokens of each of T frames (or of each clip).
    prefix: int32[B, P], of all samples of a row.
    text: int32[B, L], likewise.

  Returns:
    [B, P + T * N + L, D] in the compute dtype.
  """
  visual = model.projector(features)
  visual = visual.reshape(len(visual), -1, visual.shape[-1])

  def embed(tokens):
    # Text is little: it stays in one piece until it is part of a sequence, and every device looks
    # up the words it has.
    samples, _ = _beside_words(model)
    return constrain(constrain(model.llm.embed(constrain(tokens, samples)), samples), "batch")

  return constrain(
    jnp.concatenate([embed(prefix), visual, embed(text)], axis=1), "batch", "sequence", None
  )


def _beside_words(model: VLM) -> tuple[str, str | None]:
  """Logical axes of samples and rows beside the vocabulary, which is split as its parameters are,
  if it can be.
  """
  whole = model.cfg.llm.vocab_size % parts("vocab") == 0
  return ("replica", None) if whole else ("batch", "sequence")


def lengths(model: VLM, batch: Batch) -> qwen2.Lengths:
  """Valid lengths of a batch's samples."""
  group, tokens = model.cfg.lp_comp.group, batch.visual.shape[2]
  if (clip := model.cfg.clip_frames * tokens) % group:
    raise ShapeError(
      f"a clip of {clip} visual tokens can't be cut into groups of {group}",
      where="lp_comp.group",
      value=group,
      clip=clip,
    )
  return qwen2.Lengths(batch.prefix_length, batch.frames * tokens // group, batch.text_length)


def forward(
  model: VLM,
  batch: Batch,
  *,
  projector_max_frames: int | None = None,
  caches: bool = False,
  entering: bool = False,
):
  """Decoded states of a batch, up to the last layer; training and asking begin with this.

  Args:
    model: the parameters.
    batch: features and text.
    projector_max_frames: samples of at least this many frames give the projector no gradient (quirk
      Q17).
    caches: return every layer's keys and values.
    entering: return the states entering every layer.
  """
  x = _embedded(model, batch, batch.text)  # [B, M * P + T * n + L, E]
  (_, M, P), L = batch.prefix.shape, batch.text.shape[1]
  if projector_max_frames is not None:
    x = _without_gradient(model, batch, x, projector_max_frames)
  return qwen2.run_layers(
    model.llm,
    x,
    lengths(model, batch),
    prefix=M * P,
    text=L,
    query=batch.query,
    caches=caches,
    entering=entering,
  )


def _embedded(model: VLM, batch: Batch, text: jax.Array) -> jax.Array:
  """The embedded rows of a batch, with this text."""
  prefix = batch.prefix.reshape(len(batch.prefix), -1)
  return place_tokens(model, batch.visual.astype(model.cfg.dtype), prefix, text)


def _without_gradient(model: VLM, batch: Batch, x: jax.Array, frames: int) -> jax.Array:
  """Embedded rows x [B, S, E]; no gradient flows to visual tokens of samples of so many frames."""
  (_, M, P), group = batch.prefix.shape, model.cfg.lp_comp.group
  before, visual = M * P, batch.visual.shape[1] * batch.visual.shape[2]  # slots
  places = lengths(model, batch).places(before, visual // group, batch.text.shape[1], group)
  length = jnp.take_along_axis(batch.frames, jnp.maximum(places.sample, 0), axis=1)  # [B, S]
  slot = jnp.arange(x.shape[1])
  long = (length >= frames) & (slot >= before) & (slot < before + visual)
  return jnp.where(long[..., None], jax.lax.stop_gradient(x), x)


def forward_in_pieces(model: VLM, batch: Batch) -> qwen2.Decoded:
  """`forward` with caches for a prompt a row, whose text follows the frames in pieces: what it is
  padded to costs memory alone.

  Of the states it returns those of the text, [B, L, D]. For rules of keeping that don't ask the
  text.
  """
  before = batch.prefix.shape[1] * batch.prefix.shape[2]
  x = _embedded(model, batch, batch.text[:, :0])  # [B, before + T * n, E]
  of = lengths(model, batch)
  of = dataclasses.replace(of, text=jnp.zeros_like(of.text))
  seen = qwen2.run_layers(model.llm, x, of, prefix=before, text=0, caches=True, rotated=False)
  valid = jnp.arange(batch.text.shape[1]) < batch.text_length  # [B, L]
  x, caches, _ = qwen2.extend(model.llm, model.llm.embed(batch.text), valid, seen.caches)
  return qwen2.Decoded(x, caches, ())


def supervised_rows(model: VLM, x: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B R D"]:
  """The rows of x [B, S', D] that can have a target: prefixes, each sample's last visual token,
  texts -> [B, M * P + M + L, D].

  Never a row per visual token: at 1,024 frames those are nearly all rows (FACTS.md 3).
  """
  P, L = math.prod(batch.prefix.shape[1:]), batch.text.shape[1]
  end = x.shape[1] - L
  # In one piece: it is one token per group by now, and XLA (of jax 0.10) gets the gradient of
  # slices of split rows wrong on a mesh of tensor and context (tests/model/test_context.py).
  x = constrain(x, "batch", None, None)
  if visual := end - P:
    # tokens of a group
    kept = visual // (math.prod(batch.visual.shape[1:3]) // model.cfg.lp_comp.group)
    last = P + jnp.cumsum(lengths(model, batch).groups, axis=1) * kept - 1
    last = jnp.take_along_axis(x, jnp.maximum(last, 0)[..., None], axis=1)
  else:
    last = jnp.zeros((*batch.frames.shape, x.shape[2]), x.dtype)
  return jnp.concatenate([x[:, :P], last, x[:, end:]], axis=1)


def predictions(
  model: VLM,
  rows: Float[Array, "B R D"],
  targets: Int[Array, "B R"],
  logit_rows: int = LOGIT_ROWS,
) -> tuple[Float[Array, "B R"], Bool[Array, "B R"]]:
  """Next-token losses float32[B, R], 0 where not supervised, and whether the most probable token is
  the target.

  Logits exist for `logit_rows` rows per device at once, and are made again for the gradient: all of
  8,192 rows of 152k words would take 5 GB. A device has its share of the words, and all rows; if
  the words can't be split, its own rows.

  Args:
    model: the parameters.
    rows: [B, R, D], of `supervised_rows`.
    targets: int32[B, R], IGNORE where not supervised.
    logit_rows: see above.
  """
  samples, slots = _beside_words(model)

  def one(part):
    rows, targets = (constrain(x, samples, slots) for x in part)
    logits, supervised = model.llm.logits(rows), targets != IGNORE  # [B, r, V], [B, r]
    picked = jnp.take_along_axis(logits, jnp.where(supervised, targets, 0)[..., None], axis=-1)
    surprise = jax.nn.logsumexp(logits, axis=-1) - picked[..., 0]
    hit = (jnp.argmax(logits, -1) == targets) & supervised
    return jnp.where(supervised, surprise, 0), hit

  B, R = targets.shape
  size = max(1, logit_rows // -(-B // parts("batch"))) * parts("sequence")
  if slots is None:
    size = max(1, min(size, GATHERED_ROWS // -(-B // parts(samples))))
  if R <= size:
    return one((rows, targets))
  targets = padded(targets, -R % size, value=IGNORE)
  blocks = in_blocks(rows, size), in_blocks(targets, size)  # [n, B, size, D], [n, B, size]
  losses, hits = jax.lax.map(jax.checkpoint(one), blocks)
  return from_blocks(losses, R), from_blocks(hits, R)


def _means(values: jax.Array, where: jax.Array, batch: Batch) -> jax.Array:
  """float32[B, M]: means over each sample's own rows `where` of values [B, R]; 0 where there is
  none. Rows are those of `supervised_rows`.
  """
  (B, M, P), sample = batch.prefix.shape, jnp.arange(batch.prefix.shape[1])
  before = jnp.concatenate([jnp.arange(M * P) // max(1, P), sample])  # [M * P + M], whose row it is
  ends = jnp.cumsum(batch.text_length, axis=1)  # [B, M]
  text = (jnp.arange(batch.text.shape[1])[:, None] >= ends[:, None]).sum(-1)  # [B, L], likewise
  owner = jnp.concatenate([jnp.broadcast_to(before, (B, M * P + M)), text], axis=1)  # [B, R]
  own = (owner[..., None] == sample) & where[..., None]  # [B, R, M]
  return jnp.where(own, values[..., None], 0).sum(1) / jnp.maximum(own.sum(1), 1)


def loss(
  model: VLM, batch: Batch, *, projector_max_frames: int | None = None
) -> Float[Array, "B M"]:
  """float32[B, M]: next-token loss of each sample, its mean over supervised rows, as trained
  officially (FACTS.md 3).

  Not weighted by batch.weight; 0 where nothing is supervised.
  """
  x = forward(model, batch, projector_max_frames=projector_max_frames).x
  losses, _ = predictions(model, supervised_rows(model, x, batch), batch.targets)
  return _means(losses, batch.targets != IGNORE, batch)


def heldout_measures(model: VLM, batch: Batch) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
  """Held-out measures of each sample: loss float32[B, M], and correct float32[B, M].

  `correct` is the share of answers whose first token is the most probable one: for an answer of a
  single letter, greedy decoding's accuracy.
  """
  losses, hit = predictions(
    model, supervised_rows(model, forward(model, batch).x, batch), batch.targets
  )
  supervised = batch.targets != IGNORE
  asked = jnp.pad(batch.query, ((0, 0), (supervised.shape[1] - batch.query.shape[1], 0)))
  return _means(losses, supervised, batch), _means(hit, asked & supervised, batch)
