"""The whole model: encode(frames) -> place(visual, text) -> decoder -> logits; and the loss.

Training, asking and evaluation call these same functions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from xcomp_jax.config import InternVideo2Config, VLMConfig
from xcomp_jax.data.batch import IGNORE, Batch
from xcomp_jax.model import decoder
from xcomp_jax.model.decoder import Decoder, Lengths
from xcomp_jax.model.internvideo2 import InternVideo2
from xcomp_jax.model.merge import Projector, merge
from xcomp_jax.model.vision import Vision
from xcomp_jax.sharding import constrain, divides, parts

VOCABULARY = "vocabulary"  # name in compiled programs of what is there once, whatever the layers
LOGIT_ROWS = 1024  # rows per device whose float32 logits exist at once: 0.6 GB at 152k words
GATHERED_ROWS = 16 * LOGIT_ROWS  # and at most in all, since every device that has some of the words has all rows


class VLM(nnx.Module):
  """Parameters of tower, projector and LLM; everything it does is a function below."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    self.cfg = cfg
    tower = InternVideo2 if isinstance(cfg.vision, InternVideo2Config) else Vision
    self.vision = tower(cfg, rngs=rngs, param_dtype=param_dtype)
    self.projector = Projector(cfg, rngs=rngs, param_dtype=param_dtype)
    self.llm = Decoder(cfg, rngs=rngs, param_dtype=param_dtype)


def encode(model: VLM, frames: UInt8[Array | np.ndarray, "B C F S S 3"]) -> Float[Array, "B C N D"]:
  """Tower and token merging, in chunks of clips so that peak memory does not grow with the number of frames.

  Args:
    model: the parameters.
    frames: uint8[B, C, F, S, S, 3]; F = 1 is the single-image path.

  Returns:
    [B, C, F * 16, D], merged features before the projector.
  """
  cfg = model.cfg
  B, C, F = frames.shape[:3]
  target = F * cfg.tokens_per_frame
  if C == 0:
    return jnp.zeros((B, 0, target, cfg.vision.width), cfg.dtype)

  def chunk(frames):  # uint8[B, X, c, F, S, S, 3]
    flat = constrain(frames.reshape(-1, *frames.shape[3:]), "clips")
    merged = merge(model.vision(flat), target, cfg.vision.heads)
    return merged.reshape(*frames.shape[:3], *merged.shape[1:])

  X = parts("sequence") if C % parts("sequence") == 0 else 1  # every part of a split sequence has clips in each chunk
  frames = frames.reshape(B, X, C // X, *frames.shape[2:])
  size = min(cfg.clips_per_chunk, C // X)
  whole = C // X // size * size
  split = frames[:, :, :whole].reshape(B, X, -1, size, *frames.shape[3:])
  out = jax.lax.map(chunk, jnp.moveaxis(split, 2, 0))
  out = jnp.moveaxis(out, 0, 2).reshape(B, X, whole, *out.shape[4:])
  if whole < C // X:
    out = jnp.concatenate([out, chunk(frames[:, :, whole:])], axis=2)
  return constrain(out.reshape(B, C, *out.shape[3:]), "batch", "sequence")


def place(
  model: VLM, features: Float[Array, "B C N D"], prefix: Int[Array, "B P"], text: Int[Array, "B L"]
) -> Float[Array, "B S E"]:
  """Projects features and puts them between the two parts of the text.

  Args:
    model: the parameters.
    features: [B, C, N, D] merged tower features.
    prefix: int32[B, P].
    text: int32[B, L].

  Returns:
    [B, P + C * N + L, D] in the compute dtype.
  """
  visual = model.projector(features)
  visual = visual.reshape(len(visual), -1, visual.shape[-1])

  @jax.named_scope(VOCABULARY)
  def embed(tokens):
    # Text is little: it stays in one piece until it is part of a sequence, and every device looks up the words it has.
    samples, _ = _beside_words(model)
    return constrain(constrain(model.llm.embed(constrain(tokens, samples)), samples), "batch")

  return constrain(jnp.concatenate([embed(prefix), visual, embed(text)], axis=1), "batch", "sequence", None)


def _beside_words(model: VLM) -> tuple[str, str | None]:
  """Logical axes of samples and rows beside the vocabulary, which is split as its parameters are, if it can be."""
  return ("replica", None) if divides("vocab", model.cfg.llm.vocab_size) else ("batch", "sequence")


def lengths(model: VLM, batch: Batch) -> Lengths:
  """Valid lengths of a batch's samples."""
  tokens = features_shape(model.cfg, batch.visual)[2]
  group = model.cfg.lp_comp.group
  if tokens % group:
    raise ValueError(f"a clip of {tokens} visual tokens can't be cut into groups of {group}")
  return Lengths(batch.prefix_length, batch.clips * (tokens // group), batch.text_length)


def features_shape(cfg: VLMConfig, visual) -> tuple[int, int, int]:
  """(B, C, N) of the merged features that frames or features `visual` give."""
  B, C, F = visual.shape[:3]
  return (B, C, F * cfg.tokens_per_frame) if visual.ndim == 6 else (B, C, F)


def forward(
  model: VLM, batch: Batch, *, projector_max_frames: int | None = None, caches: bool = False, entering: bool = False
):
  """Decoded states of a batch, up to the last layer; training and asking begin with this.

  Args:
    model: the parameters.
    batch: frames or features, and text.
    projector_max_frames: samples of at least this many frames give the projector no gradient (quirk Q17).
    caches: return every layer's keys and values.
    entering: return the states entering every layer.
  """
  cfg = model.cfg
  features = encode(model, batch.visual) if batch.visual.ndim == 6 else batch.visual.astype(cfg.dtype)
  P, L = batch.prefix.shape[1], batch.text.shape[1]
  x = place(model, features, batch.prefix, batch.text)
  if projector_max_frames is not None:
    frames = batch.clips * (features.shape[2] // cfg.tokens_per_frame)
    visual = x[:, P : x.shape[1] - L]
    visual = jnp.where((frames >= projector_max_frames)[:, None, None], jax.lax.stop_gradient(visual), visual)
    x = jnp.concatenate([x[:, :P], visual, x[:, x.shape[1] - L :]], axis=1)
  return decoder.run(
    model.llm, x, lengths(model, batch), prefix=P, text=L, query=batch.query, caches=caches, entering=entering
  )


def supervised_rows(model: VLM, x: Float[Array, "B S D"], batch: Batch) -> Float[Array, "B R D"]:
  """The rows of x [B, S', D] that can have a target: prefix, last visual token, text -> [B, P + 1 + L, D].

  Never a row per visual token: at 1,024 frames those are nearly all rows (FACTS.md 3).
  """
  P, L = batch.prefix.shape[1], batch.text.shape[1]
  end = x.shape[1] - L
  slots = features_shape(model.cfg, batch.visual)
  # In one piece: it is one token per group by now, and XLA (of jax 0.10) gets the gradient of slices of split rows wrong
  # on a mesh of tensor and context (tests/test_context.py).
  x = constrain(x, "batch", None, None)
  visual = end - P
  if visual:
    last = P + batch.clips * (visual // slots[1]) - 1
    last = jnp.take_along_axis(x, jnp.maximum(last, 0)[:, None, None], axis=1)
  else:
    last = jnp.zeros_like(x[:, :1])
  return jnp.concatenate([x[:, :P], last, x[:, end:]], axis=1)


def predictions(
  model: VLM, rows: Float[Array, "B R D"], targets: Int[Array, "B R"]
) -> tuple[Float[Array, "B R"], Bool[Array, "B R"]]:
  """Next-token losses float32[B, R], 0 where not supervised, and whether the most probable token is the target.

  Logits exist for LOGIT_ROWS rows per device at once, and are made again for the gradient: all of 8,192 rows of 152k
  words would take 5 GB. A device has its share of the words, and all rows; if the words can't be split, its own rows.

  Args:
    model: the parameters.
    rows: [B, R, D], of `supervised_rows`.
    targets: int32[B, R], IGNORE where not supervised.
  """

  @jax.named_scope(VOCABULARY)
  def one(part):
    rows, targets = part
    rows, targets = (constrain(x, samples, slots) for x in (rows, targets))
    logits, supervised = model.llm.logits(rows), targets != IGNORE
    picked = jnp.take_along_axis(logits, jnp.where(supervised, targets, 0)[..., None], axis=-1)[..., 0]
    loss = jnp.where(supervised, jax.nn.logsumexp(logits, axis=-1) - picked, 0)
    return loss, (jnp.argmax(logits, -1) == targets) & supervised

  B, R, D = rows.shape
  samples, slots = _beside_words(model)
  size = max(1, LOGIT_ROWS // -(-B // parts("batch"))) * parts("sequence")
  if slots is None:
    size = max(1, min(size, GATHERED_ROWS // -(-B // parts(samples))))
  if R <= size:
    return one((rows, targets))
  pad = -R % size
  rows = jnp.pad(rows, ((0, 0), (0, pad), (0, 0))).reshape(B, -1, size, D)
  targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE).reshape(B, -1, size)
  out = jax.lax.map(jax.checkpoint(one), (jnp.moveaxis(rows, 1, 0), jnp.moveaxis(targets, 1, 0)))
  return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :R], out)


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
  """float32[B]: mean of values [B, R] over a sample's rows `where`; 0 where there is none."""
  return jnp.where(where, values, 0).sum(1) / jnp.maximum(where.sum(1), 1)


def loss(model: VLM, batch: Batch, *, projector_max_frames: int | None = None) -> Float[Array, " B"]:
  """float32[B]: next-token loss of each sample, its mean over supervised rows, as trained officially (FACTS.md 3).

  Not weighted by batch.weight; 0 where nothing is supervised.
  """
  x = forward(model, batch, projector_max_frames=projector_max_frames).x
  losses, _ = predictions(model, supervised_rows(model, x, batch), batch.targets)
  return _mean(losses, batch.targets != IGNORE)


def evaluate(model: VLM, batch: Batch) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
  """Held-out measures of each sample: loss float32[B], and correct float32[B].

  `correct` is the share of answers whose first token is the most probable one: for an answer of a single letter,
  greedy decoding's accuracy.
  """
  losses, hit = predictions(model, supervised_rows(model, forward(model, batch).x, batch), batch.targets)
  supervised = batch.targets != IGNORE
  rows = jnp.concatenate([jnp.zeros((len(batch.query), batch.prefix.shape[1] + 1), bool), batch.query], axis=1)
  return _mean(losses, supervised), _mean(hit, rows & supervised)
