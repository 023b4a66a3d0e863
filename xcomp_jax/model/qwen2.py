"""Qwen2 with LP-Comp between its layers: every layer sees its own, shorter sequence.

A row is [prefixes | visual | texts] of its samples (see `data.batch`), each part right-padded.
Slots keep that order at every layer, so causality is the order of slots. A slot sees its own sample
alone. Positions count a sample's valid tokens and are renumbered after every reduction, per layer
(FACTS.md 2).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from xcomp_jax.config import LPCompConfig, VLMConfig
from xcomp_jax.data.batch import Leaf
from xcomp_jax.model import lp_comp
from xcomp_jax.model.attention import AttentionMask, attend, remat
from xcomp_jax.model.layers import RMSNorm, ShapeError, rotate
from xcomp_jax.model.mlp import gated_mlp, mlp_in_parts
from xcomp_jax.model.softmax import attend_first, attention_weights
from xcomp_jax.parallel.mesh import constrain, gathered

SHORT = 512  # tokens that follow a cached sequence and run in one piece, padding too
PART = 256  # longer texts run in pieces of this many tokens, as many as there are
# Logical axes of few rows [B, L, D], such as those of texts, which are less than the parameters: so
# these stay where they are, and rows go to all of them.
FEW = ("replica", None, "embed")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lengths:
  """Valid tokens of the samples of each row: int32[B, M] each; `groups` counts groups of visual
  tokens.
  """

  prefix: Leaf
  groups: Leaf
  text: Leaf

  def places(self, prefix: int, groups: int, text: int, count: int) -> "Places":
    """Says what lies where in a layer that holds `count` tokens per group.

    prefix, groups, text: slots of each part of a row; those of the prefixes are shared evenly by
      the M samples.
    """
    M = self.prefix.shape[1]
    owner, at = np.divmod(np.arange(prefix), max(1, prefix // M))
    parts = [
      (
        jnp.where(at < self.prefix[:, owner], owner, -1),
        jnp.broadcast_to(at, (len(self.prefix), prefix)),
      ),
      _one_behind_another(self.groups * count, groups * count, self.prefix),
      _one_behind_another(self.text, text, self.prefix + self.groups * count),
    ]
    return Places(
      *(jnp.concatenate(some, axis=1, dtype=jnp.int32) for some in zip(*parts)), several=M > 1
    )


def _one_behind_another(
  lengths: jax.Array, slots: int, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Which sample each of so many slots belongs to, -1 for padding, and the position of its token:
  int32[B, slots] each.

  lengths, before: int32[B, M], tokens of each sample in these slots, and in the parts before.
  """
  ends, slot = jnp.cumsum(lengths, axis=1), jnp.arange(slots)
  owner = (slot[:, None] >= ends[:, None]).sum(-1)  # the samples that end before a slot
  first = jnp.take_along_axis(
    before - (ends - lengths), jnp.minimum(owner, lengths.shape[1] - 1), axis=1
  )
  return jnp.where(owner < lengths.shape[1], owner, -1), first + slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
  """What lies in the slots of a layer.

  sample: int32[B, S], which of a row's samples a slot belongs to; -1 is padding. position: int32[B,
  S], of the token within its sample; anything for padding. several: a row may hold more than one;
  static.
  """

  sample: Leaf
  position: Leaf
  several: bool = dataclasses.field(metadata={"static": True})

  @property
  def valid(self) -> jax.Array:
    """bool[B, S], False for padding."""
    return self.sample >= 0

  @property
  def mask(self) -> AttentionMask:
    """Who sees what."""
    return (
      AttentionMask(causal=True, sample=self.sample)
      if self.several
      else AttentionMask(causal=True, valid=self.valid)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
  """Keys (rotated at this layer's own positions, unless said otherwise) and values [B, S, K, h];
  valid bool[B, S].
  """

  key: Leaf
  value: Leaf
  valid: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
  """What a pass over whole sequences gives.

  x: [B, S', D] after the last layer, before the final norm; S' = P + groups * last count + L.
  caches: one LayerCache per layer, if asked for.
  entering: the states [B, S_l, D] that enter each layer, if asked for.
  """

  x: Leaf
  caches: tuple[LayerCache, ...]
  entering: tuple[jax.Array, ...]


class Layer(nnx.Module):
  """One Qwen2 layer."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype):
    llm, dtype = cfg.llm, jnp.dtype(cfg.dtype)
    self.cfg = cfg
    norm = functools.partial(RMSNorm, llm.width, llm.norm_eps, dtype, param_dtype)
    linear = functools.partial(
      nnx.Linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
    self.input_norm = norm()
    self.q = linear(llm.width, llm.heads * llm.head_dim, use_bias=True)
    self.k = linear(llm.width, llm.kv_heads * llm.head_dim, use_bias=True)
    self.v = linear(llm.width, llm.kv_heads * llm.head_dim, use_bias=True)
    self.o = linear(llm.heads * llm.head_dim, llm.width)
    self.post_norm = norm()
    self.gate = linear(llm.width, llm.mlp_width)
    self.up = linear(llm.width, llm.mlp_width)
    self.down = linear(llm.mlp_width, llm.width)

  def project(self, x):
    """Queries, keys and values of x [B, L, D]: q [B, L, H, h] and k, v [B, L, K, h], not rotated
    yet.
    """
    y = self.input_norm(x)
    return self._heads(self.q(y)), self._heads(self.k(y)), self._heads(self.v(y))

  def keys(self, x):
    """The k of `project` alone."""
    return self._heads(self.k(self.input_norm(x)))

  def cached(self, k, v, places: Places, rotated: bool) -> LayerCache:
    """The cache of whole sequences; `rotated`: with keys at their positions."""
    return LayerCache(self.rotate(k, places.position) if rotated else k, v, places.valid)

  def _heads(self, z):
    return constrain(
      z.reshape(*z.shape[:2], -1, self.cfg.llm.head_dim), "batch", "sequence", "heads", None
    )

  def rotate(self, x, positions):
    """Rotary embedding of x [B, L, H, h] at positions int32[B, L]."""
    return rotate(x, positions, self.cfg.llm)

  def finish(self, x, attended):
    """Output projection, residuals and MLP; x [B, L, D], attended [B, L, H, h]."""
    x = x + self.o(attended.reshape(*attended.shape[:2], -1))
    modules = self.post_norm, self.gate, self.up, self.down
    y = mlp_in_parts(modules, x) if self.cfg.remat else gated_mlp(modules, x)
    return constrain(x + y, "batch", "sequence", None)

  def finish_few(self, x, attended):
    """`finish` of FEW rows."""
    attended = constrain(attended, "replica", None, "heads", None).reshape(*attended.shape[:2], -1)
    x = constrain(x + self.o(attended), *FEW)
    y = gated_mlp((self.post_norm, self.gate, self.up, self.down), x, FEW[:2])
    return constrain(x + y, *FEW)

  def __call__(self, x, places: Places, pick=lambda x: x):
    """Runs whole sequences; returns x of the slots that `pick` takes out, and the keys (not
    rotated) and values of all.
    """
    layer = gathered(self, x.dtype)
    q, k, v = layer.project(x)
    q, rotated = self.rotate(q, places.position), self.rotate(k, places.position)
    attended = attend(q, rotated, v, places.mask, implementation=self.cfg.attention)
    return layer.finish(pick(x), pick(attended)), k, v

  def extend(self, x, valid, cache: LayerCache, projected, count):
    """Rows x [B, L, D] after a cached sequence with keys not rotated yet.

    projected: q, k, v of x. count: of the pieces that run, see `in_pieces`. Returns x, and the
      cache with the rows, rotated.
    """
    q, k, v = projected
    valid, before = jnp.concatenate([cache.valid, valid], axis=1), cache.key.shape[1]
    positions = jnp.cumsum(valid, axis=1) - 1
    keys = self.rotate(jnp.concatenate([cache.key, k], axis=1), positions)
    values = jnp.concatenate([cache.value, v], axis=1)

    def piece(first, x, q, positions):
      q, rows = self.rotate(q, positions), before + first + jnp.arange(x.shape[1])
      if x.shape[1] + before == keys.shape[1]:
        mask = AttentionMask(causal=True, valid=valid)
        return self.finish_few(x, attend(q, keys, values, mask, implementation=self.cfg.attention))

      def seen(slots):
        return valid[:, None, slots] & (slots <= rows[:, None])

      attended, _ = attend_first(q, keys, values, seen, before + first + x.shape[1])
      return self.finish_few(x, attended.astype(x.dtype))

    x = in_pieces(piece, count, x, q, positions[:, before:])
    return x, LayerCache(keys, values, valid)

  def step(self, x, positions, cache: LayerCache, slot):
    """One new token: x [B, 1, D], positions int32[B, 1], cache slot `slot`; returns x and the cache
    with it.
    """
    q, k, v = self.project(x)
    q, k = self.rotate(q, positions), self.rotate(k, positions)

    def put(buffer, new):
      return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), slot, axis=1)

    cache = LayerCache(
      put(cache.key, k), put(cache.value, v), put(cache.valid, jnp.ones((len(x), 1), bool))
    )
    attended = attend(
      q,
      cache.key,
      cache.value,
      AttentionMask(causal=False, valid=cache.valid),
      implementation="einsum",
    )
    return self.finish_few(x, attended), cache


class Decoder(nnx.Module):
  """The LLM's parameters: embedding, layers/0.., norm and, if untied, the head."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    llm, dtype = cfg.llm, jnp.dtype(cfg.dtype)
    self.cfg = cfg
    self.embed = nnx.Embed(
      llm.vocab_size, llm.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
    self.layers = nnx.List(
      [Layer(cfg, rngs=rngs, param_dtype=param_dtype) for _ in range(llm.layers)]
    )
    self.norm = RMSNorm(llm.width, llm.norm_eps, dtype, param_dtype)
    if not llm.tied:
      self.lm_head = nnx.Linear(
        llm.width, llm.vocab_size, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
      )

  def logits(self, x):
    """Final norm and output head: [..., D] -> float32[..., V]."""
    tied = self.cfg.llm.tied
    x, head = (
      self.norm(x),
      (self.embed.embedding if tied else self.lm_head.kernel)[...].astype(x.dtype),
    )
    # its gradient comes before that of the layers: or the compiler keeps the logits for when it has
    # time
    if self.cfg.remat:
      x, head = jax.lax.optimization_barrier((x, head))
    return jnp.matmul(x, head.T if tied else head, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
  """How rows [prefix | visual | text] are laid out, and how their visual part is reduced."""

  lp: LPCompConfig
  lengths: Lengths
  prefix: int
  groups: int
  text: int

  def places(self, tokens: Sequence[int]) -> Places:
    """What lies where in a layer that sees these tokens of every group."""
    return self.lengths.places(self.prefix, self.groups, self.text, len(tokens))

  def thin(self, x, before: Sequence[int], after: Sequence[int], score=None):
    """Reduces groups of x [B, S, ...] from the tokens `before` to those `after`.

    score: float32[B, S], attention paid to each slot, for keep="attention".
    """
    if len(before) == len(after):
      return x
    end = x.shape[1] - self.text
    visual = x[:, self.prefix : end]  # [B, G * before, ...]
    if score is None:
      visual = lp_comp.reduce(visual, self.lp, before, after)  # [B, G * after, ...]
    else:
      groups = self.lengths.groups[:, 0]  # of the only sample
      valid = jnp.arange(visual.shape[1]) < (groups * len(before))[:, None]
      visual = lp_comp.keep_attended(
        visual,
        score[:, self.prefix : end],
        valid,
        groups * len(after),
        self.groups * len(after),
      )
    return jnp.concatenate([x[:, : self.prefix], visual, x[:, end:]], axis=1)


def _lay_out(
  cfg: VLMConfig, slots: int, lengths: Lengths, prefix: int, text: int, query: Any
) -> _Rows:
  """Raises a ShapeError where rows of so many slots can't be reduced as the config says."""
  lp = cfg.lp_comp
  groups, rest = divmod(slots - prefix - text, lp.group)
  if rest:
    raise ShapeError(
      f"{slots - prefix - text} visual slots are no multiple of the group of {lp.group} tokens",
      where="lp_comp.group",
      value=lp.group,
      slots=slots - prefix - text,
    )
  if lp.keep == "attention" and query is None:
    raise ShapeError(
      'lp_comp.keep = "attention" needs the query rows whose attention ranks the visual tokens',
      where="query",
    )
  if lp.keep == "attention" and lengths.prefix.shape[1] > 1:
    raise ShapeError(
      'lp_comp.keep = "attention" keeps other places in every sample, so a row can hold only one',
      where="lp_comp.keep",
      value=lp.keep,
      samples=lengths.prefix.shape[1],
    )
  return _Rows(lp=lp, lengths=lengths, prefix=prefix, groups=groups, text=text)


def run_layers(
  decoder: Decoder,
  x: Float[Array, "B S D"],
  lengths: Lengths,
  *,
  prefix: int,
  text: int,
  query: Bool[Array, "B L"] | None = None,
  caches: bool = False,
  rotated: bool = True,
  entering: bool = False,
  stop: int | None = None,
) -> Decoded:
  """All layers over whole sequences, with LP-Comp between them.

  Args:
    decoder: the parameters.
    x: [B, P + G * group + L, D] embedded rows.
    lengths: valid tokens of each sample.
    prefix: P, slots before the visual tokens, of all samples of a row; static, as is
    text: L, slots after them.
    query: bool[B, L], text tokens whose attention decides what stays; only for keep="attention",
      which takes one sample a row.
    caches: return every layer's keys and values.
    rotated: return keys rotated at this layer's positions, ready for `step`; False: as projected,
      for `extend`.
    entering: return the states entering every layer.
    stop: a layer that is not run any more; the last cache then has its keys, and None for values.
  """
  cfg = decoder.cfg
  rows = _lay_out(cfg, x.shape[1], lengths, prefix, text, query)
  layers = list(decoder.layers)
  all_caches, all_entering = [], []
  seen_before = tuple(range(cfg.lp_comp.group))
  places = rows.places(seen_before)
  for index, tokens in enumerate(lp_comp.layer_tokens(cfg.lp_comp, len(layers))):
    if cfg.remat and index + 1 < len(layers):
      x, layers[index + 1] = _not_before(x, layers[index + 1])
    layer = layers[index]
    score = None
    if cfg.lp_comp.keep == "attention" and len(tokens.seen) != len(tokens.arriving):
      score = _attention_paid(layer, x, places, query, text)
    x = rows.thin(x, tokens.arriving, tokens.seen, score)
    if len(tokens.seen) != len(seen_before):
      places, seen_before = rows.places(tokens.seen), tokens.seen
    if entering:
      all_entering.append(x)
    if index == stop:
      keys = gathered(layer, x.dtype).keys(x)
      all_caches.append(layer.cached(keys, None, places, rotated))
      break
    call = functools.partial(
      layer.__call__,
      pick=functools.partial(rows.thin, before=tokens.seen, after=tokens.leaving),
    )
    x, k, v = (remat(call) if cfg.remat else call)(x, places)
    if caches:
      # Or the compiler for GPUs takes them out of the layer's projections at the end, and keeps
      # these, four times as large, until then.
      x, cache = jax.lax.optimization_barrier((x, layer.cached(k, v, places, rotated)))
      all_caches.append(cache)
  return Decoded(x, tuple(all_caches), tuple(all_entering))


def _not_before(x: jax.Array, layer: Layer) -> tuple[jax.Array, Layer]:
  """The same; but the layer's weights are not gathered before x is there.

  Given free memory the compiler gathers most of a sharded model ahead of the first layer. One layer
  ahead hides as much.
  """
  graph, weights = nnx.split(layer)
  x, weights = jax.lax.optimization_barrier((x, weights))
  return x, nnx.merge(graph, weights)


def _attention_paid(layer: Layer, x, places: Places, query, text: int):
  """float32[B, S]: mean over heads and query rows of the attention this layer would pay (FACTS.md
  13).
  """
  q, k, _ = gathered(layer, x.dtype).project(x)
  q, k = layer.rotate(q, places.position), layer.rotate(k, places.position)
  start = x.shape[1] - text
  weights = attention_weights(q[:, start:], k, causal=True, key_valid=places.valid, offset=start)
  share = query / jnp.maximum(query.sum(1, keepdims=True), 1)
  return jnp.einsum("bkgls,bl->bs", weights, share) / (q.shape[2])


def in_pieces(run: Callable, count: Any, *rows: jax.Array) -> Any:
  """Runs rows [B, L, ...], up to SHORT in one piece, of more the first `count` pieces of PART:
  others cost no time, and become 0.

  run: from the place of a piece's first row, and these rows of each array, to arrays [B, rows,
  ...].
  count: int32[], see `pieces`; may be traced.
  """
  L = rows[0].shape[1]
  if L <= SHORT:
    return run(0, *rows)

  def part(first):
    return [jax.lax.dynamic_slice_in_dim(a, first, PART, 1) for a in rows]

  def one(i, out):
    # the last piece begins earlier, and makes some rows once more
    first = jnp.minimum(i * PART, L - PART)
    return jax.tree.map(
      lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, first, 1),
      out,
      run(first, *part(first)),
    )

  shapes = jax.eval_shape(lambda *rows: run(0, *rows), *part(0))
  return jax.lax.fori_loop(
    0, count, one, jax.tree.map(lambda a: jnp.zeros((len(a), L, *a.shape[2:]), a.dtype), shapes)
  )


def pieces(valid: Bool[Array, "*B L"]) -> Int[Array, ""]:
  """How many pieces of `in_pieces` hold all valid rows, which come first."""
  return -(-valid.sum(-1).max() // PART)


def extend(
  decoder: Decoder,
  x: Float[Array, "B L D"],
  valid: Bool[Array, "B L"],
  caches: tuple[LayerCache, ...],
  count: Any = None,
) -> tuple[jax.Array, tuple[LayerCache, ...], list[tuple[jax.Array, jax.Array]]]:
  """Runs rows that follow cached sequences.

  Args:
    decoder: the parameters.
    x: [B, L, D] embedded rows, valid ones first.
    valid: bool[B, L].
    caches: of the first layers, as `run_layers` gives them with rotated=False. A layer whose cache
      has no values projects the rows, but is not run.
    count: int32[], the pieces that run; None: as many as there are.

  Returns:
    x after the last cached layer, the caches with the rows, rotated, and q [B, L, H, h] and k [B,
    L, K, h] of the rows in every cached layer, not rotated.
  """
  count = pieces(valid) if count is None else count
  x = constrain(x, *FEW)
  longer, projected = [], []
  for layer, cache in zip(decoder.layers, caches, strict=False):
    q, k, v = in_pieces(lambda _, x, layer=layer: layer.project(x), count, x)
    projected.append((q, k))
    if cache.value is not None:
      x, cache = layer.extend(x, valid, cache, (q, k, v), count)
      longer.append(cache)
  return x, tuple(longer), projected


def step(
  decoder: Decoder,
  x: Float[Array, "B 1 D"],
  caches: tuple[LayerCache, ...],
  room: Int[Array, ""] | int,
) -> tuple[Float[Array, "B 1 D"], tuple[LayerCache, ...]]:
  """One new token through all layers.

  Args:
    decoder: the parameters.
    x: [B, 1, D] embedded token.
    caches: one per layer, with free slots at their end.
    room: free slots left; the token takes the first of them.

  Returns:
    x [B, 1, D] before the final norm, and the caches with the token. Its position in a layer is the
    number of valid entries of that layer's own cache (FACTS.md 2).
  """
  out = []
  x = constrain(x, *FEW)
  for layer, cache in zip(decoder.layers, caches, strict=True):
    positions = jnp.sum(cache.valid, axis=1, keepdims=True, dtype=jnp.int32)
    x, cache = layer.step(x, positions, cache, cache.key.shape[1] - room)
    out.append(cache)
  return x, tuple(out)
