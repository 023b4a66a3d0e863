"""Attention: one function, a reference in plain einsum, and memory-linear implementations of the
same numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from xcomp_jax.config import Attention
from xcomp_jax.data.batch import Leaf
from xcomp_jax.model import kernels
from xcomp_jax.parallel.mesh import constrain, split_axes

IMPLEMENTATIONS = get_args(Attention)
MASKED = -1e30  # finite, so that a row that may see nothing gives finite garbage instead of NaN
# queries and keys at once, causal; larger ones are hardly faster on a CPU, and compute more for
# nothing
TILE = 384
SMALL = 1e-30  # sum of weights that none has but a row that sees nothing
LARGE = 1e30  # sum of weights that float32 holds with room to spare
BLOCK = 128  # queries whose scores with all keys exist at once, in gradients on a CPU
ROWS = 2048  # of queries of a split sequence that see their keys through one mask
TALL, WIDE = 8192, 256  # and where all see all; docs/LOG.md has the measurements
ATTENDED = "attended"  # name of what attention gives, for `remat`
NUMBERS = 256  # of samples that tables of blocks tell apart
KEYS = 512  # at once, of those that are there by now; with 2,048 a CPU takes four times as long


def remat(layer: Callable[..., Any]) -> Callable[..., Any]:
  """The layer, computed again in the backward pass from its input and from what attention gave.

  What attention gives is as large as the input, and attention is a third of a long sequence's work,
  so it is kept. "flash" is
  computed again all the same: its kernels do not name the sums that their gradient needs.
  """
  return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(ATTENDED))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
  """Says who sees what, of L queries and S keys.

  causal: rows are the last L of the S slots, and see those up to their own; static. valid: bool[B,
  S], may be traced, False for padding keys; None: all count. sample: int32[B, S], of a row that
  holds several samples which one a slot belongs to, below 0 for padding: slots see their own sample
  alone (causal, L = S, no `valid`); None: one sample a row. A row that may see no key returns
  finite garbage.
  """

  causal: bool = dataclasses.field(metadata={"static": True})
  valid: Leaf = None
  sample: Leaf = None


def attend(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B S K h"],
  v: Float[Array, "B S K h"],
  mask: AttentionMask,
  *,
  implementation: str = "auto",
) -> Float[Array, "B L H h"]:
  """Softmax attention with grouped key/value heads; scores and softmax in float32, scale h**-0.5.

  Causal attention is over samples, whose queries stay split over the mesh where their sequence is,
  while the fewer keys and values are gathered; other attention is over the clips of a tower, each
  of them whole.

  Args:
    q: [B, L, H, h].
    k: [B, S, K, h], H a multiple of K.
    v: [B, S, K, h].
    mask: who sees what.
    implementation: "einsum" (the oracle, memory L*S); of memory linear in L: "flash" (GPUs:
      `kernels.choose_kernel` says which kernel), "mosaic", "triton" (that one), "cudnn" (where all
      see all, as in a tower; else as "auto"), "splash" (TPUs), "xla_chunked" (any backend), "tiled"
      (any backend, and a causal half is left out, which makes it the fastest on CPUs); or "auto":
      einsum for few queries, else by the device.

  Returns:
    [B, L, H, h] in q's dtype.

  Raises:
    ValueError: causal attention of more queries than keys, several samples in a row with another
      mask than theirs, or an implementation that is unknown or not installed.
  """
  L, S = q.shape[1], k.shape[1]
  causal, valid, sample = mask.causal, mask.valid, mask.sample
  if causal and L > S:
    raise ValueError(f"causal attention of {L} queries over {S} keys: there can't be more queries")
  if sample is not None and (not causal or valid is not None or L != S):
    raise ValueError(
      f"several samples in a row: {L} queries of {S} keys must be all, causal, and without `valid`"
    )
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention implementation {implementation!r}: known are {', '.join(IMPLEMENTATIONS)}"
    )
  # padding lies inside of rows
  if implementation == "auto" or (implementation == "cudnn" and (causal or valid is not None)):
    implementation = kernels.automatic(L, S, causal, kernels.here())
  if (
    L != S and (causal or implementation == "splash") and implementation not in ("einsum", "tiled")
  ):
    implementation = "einsum"  # a few rows; the kernels disagree on which slots these are
  if implementation == "einsum":
    if causal:
      k, v = (constrain(x, "batch", None, "heads", None) for x in (k, v))
    return _einsum(q, k, v, causal, valid, sample)
  # it masks by -1e30, and has weights beyond 65,504
  if implementation == "tiled" and q.dtype == jnp.float16:
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    return attend(*wide, mask, implementation=implementation).astype(q.dtype)
  if implementation == "tiled" and causal and split_axes((None, "sequence"), q.shape)[1]:
    implementation = "xla_chunked"  # tiles are laid out for a whole sequence
  if implementation == "tiled" and sample is not None:
    return checkpoint_name(_packed(q, k, v, sample), ATTENDED)
  if implementation == "tiled":
    valid = jnp.ones(k.shape[:2], bool) if valid is None else valid
    return checkpoint_name(_tiled(q, k, v, valid, causal), ATTENDED)
  if implementation == "splash":
    return _splash(q, k, v, valid, causal, sample)
  if implementation != "cudnn" and kernels.library() is None:
    raise ValueError(
      f"attention implementation {implementation!r} needs tokamax: pip install tokamax"
    )
  if sample is not None:
    return _flash_packed(q, k, v, sample, implementation)
  return _flash(q, k, v, valid, causal, implementation)


def packed_pairs(lengths: np.ndarray, block: int, edges: float = 3.0) -> np.ndarray:
  """Estimates how many pairs of a query and a key are computed for samples that share a full row.

  Kernels compute whole blocks: those below the diagonal of a sample, and those at its edges, which
  grow with its length. The estimate is for sums over a row: small samples share blocks. No row
  costs more than one sample as long as the row.

  Args:
    lengths: [...], tokens of each sample in a layer.
    block: queries, and keys, of a block.
    edges: blocks at the edges of a sample per block of its own. 3.0 for "splash", where prefix,
      visual tokens and text of a sample lie apart; 1.5 where slots are brought into sample order.

  Returns:
    float64[...].
  """
  n = np.asarray(lengths, np.float64)
  return n * (n + 1) / 2 + edges * n * block


def _sample_order(sample: Int[Array, "B S"]) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Orders the slots of a row so that those of a sample are next to each other, and padding is
  last.

  Returns:
    int32[B, S] each: the slot at every place of that order; the place of every slot; and the place
    where the keys of every place begin, which end with its own. Padding sees itself, because rows
    without a key have NaN as gradient in some kernels.
  """
  order = jnp.argsort(jnp.where(sample < 0, np.iinfo(np.int32).max, sample), axis=1)
  ordered = jnp.take_along_axis(sample, order, 1)
  first = (ordered < 0) | (ordered != jnp.roll(ordered, 1, 1)) | (jnp.arange(sample.shape[1]) == 0)
  start = jax.lax.cummax(jnp.where(first, jnp.arange(sample.shape[1]), 0), axis=1)
  return order, jnp.argsort(order, axis=1), start


@jax.custom_vjp
def _moved(x, order, back):
  """Gives x[:, order]; its gradient is moved back, which is faster than the sum that a gather has
  as gradient.
  """
  return jnp.take_along_axis(x, order[:, :, None, None], 1)


def _moved_forward(x, order, back):
  return _moved(x, order, back), (back, order)


def _moved_backward(ways, gradient):
  return _moved(gradient, *ways), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def _parts(q, k, causal):
  """How kernels, which the compiler can't split, are run on every device's own samples (or clips),
  heads and queries.

  Returns:
    the mesh of `jax.set_mesh`, and the PartitionSpecs of queries [B, L, H, h] and of keys [B, S, K,
    h]; (None, None, None) where arrays are not split, or already are.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None, None, None
  # the fewer heads decide
  keys = split_axes(("batch" if causal else "clips", None, "heads", None), k.shape)
  rows = split_axes((None, "sequence"), q.shape)[1] if causal else None
  return mesh, PartitionSpec(keys[0], rows, *keys[2:]), keys


def _splash(q, k, v, key_valid, causal, sample=None, interpret=False):
  """JAX's own TPU kernel, in float32 or bfloat16. Padding keys are another segment than all else.

  Rows of padding, too, so they see each other; what they return is garbage like that of the others.
  Samples that share a row are segments, and blocks without two slots of one sample are left out.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mesh, queries, keys = _parts(q, k, causal)
  S, scale = k.shape[1], q.shape[-1] ** -0.5
  # of a device
  L, H = q.shape[1:3] if mesh is None else NamedSharding(mesh, queries).shard_shape(q.shape)[1:3]
  (q_block, q_length), (k_block, k_length) = _blocks(L), _blocks(S)
  parts = q.shape[1] // L  # of the queries; each is padded
  mask = masks.FullMask((parts * q_length, k_length))
  if causal:
    mask = masks.CausalMask((parts * q_length, k_length))
    # their slots
    mask.q_sequence = (
      (np.arange(parts)[:, None] * L + np.arange(q_length)).reshape(-1).astype(np.int32)
    )
  blocks = splash.BlockSizes(
    block_q=q_block,
    block_kv=k_block,
    block_kv_compute=k_block,
    block_q_dkv=q_block,
    block_kv_dkv=k_block,
    block_kv_dkv_compute=k_block,
    block_q_dq=q_block,
    block_kv_dq=k_block,
  )
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * H),
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=parts,
    interpret=interpret,
    residual_checkpoint_name=ATTENDED,
  )

  def one(kernel, q, k, v, q_segment, k_segment):
    def pad(x, length):
      return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    def heads(x, length):
      return jnp.swapaxes(pad(x, length), 1, 2)

    ids = splash.SegmentIds(pad(q_segment, q_length), pad(k_segment, k_length))

    def row(q, k, v, ids):
      mine = kernel if sample is None else _with_blocks_of_samples(kernel, ids, q_block, k_block)
      return mine(q, k, v, segment_ids=ids)

    out = jax.vmap(row)(heads(q * scale, q_length), heads(k, k_length), heads(v, k_length), ids)
    return jnp.swapaxes(out, 1, 2)[:, :L].astype(q.dtype)

  segment = jnp.ones(k.shape[:2], jnp.int32)  # and 0 is padding
  if key_valid is not None:
    segment = key_valid.astype(jnp.int32)
  if sample is not None:
    segment = jnp.maximum(sample + 1, 0)
  if mesh is None:
    return one(kernel, q, k, v, segment, segment)
  spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, queries[1])))
  specs = spec, queries, keys, keys, PartitionSpec(*queries[:2]), PartitionSpec(*keys[:1])
  return jax.shard_map(one, in_specs=specs, out_specs=queries, check_vma=False)(
    kernel, q, k, v, segment, segment
  )


def _with_blocks_of_samples(kernel, ids, q_block, k_block):
  """Switches off the blocks of a splash kernel that hold no pair of slots of one sample.

  Blocks on the diagonal stay, so that every row sees a key: padding sees padding there. Samples
  whose numbers differ by a multiple of NUMBERS are taken for one here, which leaves more blocks on;
  the kernel's own mask tells them apart.

  Args:
    kernel: a causal one.
    ids: its segments; 0 is padding.
    q_block: queries of a block.
    k_block: keys of a block.
  """

  def present(ids, block):  # [blocks, NUMBERS]
    ids = ids.reshape(-1, block, 1)
    return ((ids % NUMBERS == jnp.arange(NUMBERS)) & (ids > 0)).any(1)

  keys = present(ids.kv, k_block)
  slots = kernel.fwd_mask_info.q_sequence.reshape(-1, q_block, 1)
  diagonal = (slots // k_block == jnp.arange(len(keys))).any(1)
  on = (present(ids.q, q_block)[:, None] & keys).any(-1) | diagonal

  def tables(info, by_keys=False):
    blocks = jnp.where(on, info.block_mask[0], 0)
    # While a block is left out the kernel fetches the next one that is not, in the order in which
    # it visits them.
    visited = blocks.T if by_keys else blocks
    places = jnp.where(
      visited > 0, jnp.arange(visited.size).reshape(visited.shape), visited.size
    ).reshape(-1)
    following = (jax.lax.cummin(places, reverse=True) % visited.size % visited.shape[1]).reshape(
      visited.shape
    )
    following = (following.T if by_keys else following).astype(info.data_next.dtype)
    return info._replace(block_mask=blocks[None], data_next=following[None])

  infos = (
    tables(kernel.fwd_mask_info),
    tables(kernel.dq_mask_info),
    tables(kernel.dkv_mask_info, by_keys=True),
  )
  return type(kernel)(*infos, **kernel.kwargs)


def _blocks(length: int) -> tuple[int, int]:
  """(size of a block, length in whole ones): a multiple of 128, of the largest ones that which
  needs least padding.
  """
  sizes = range(1024, 384, -128) if length > 512 else (-(-length // 128) * 128,)
  block = min(sizes, key=lambda size: -(-length // size) * size)
  return block, -(-length // block) * block


def _flash(q, k, v, valid, causal, implementation):
  """Runs kernels on every device's own part of the arrays."""
  mesh, queries, keys = _parts(q, k, causal)
  some = () if valid is None else (valid,)

  def one(q, k, v, *some):
    seen = None
    if some:
      k, v, valid = _valid_key_first(k, v, *some)
      seen = valid[:, None]
    if queries is not None and queries[1] is not None:
      return _rows(q, k, v, seen, jax.lax.axis_index(queries[1]) * q.shape[1], implementation)
    return _kernel(q, k, v, seen, causal, implementation)

  if mesh is None:
    return one(q, k, v, *some)
  specs = queries, keys, keys, *(PartitionSpec(*keys[:1]) for _ in some)
  return jax.shard_map(one, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, *some)


def _flash_packed(q, k, v, sample, implementation):
  """Runs kernels of tokamax on several samples in a row.

  In sample order every query sees one range of keys, and kernels leave out what no query of a block
  sees. A device that has some of the queries brings these into that order, too.
  """
  mesh, queries, keys = _parts(q, k, True)

  def one(q, k, v, sample):
    order, place, start = _sample_order(sample)
    k, v = _moved(k, order, place), _moved(v, order, place)
    whole = q.shape[1] == k.shape[1]
    # key of each query in order: its own
    last = jnp.broadcast_to(jnp.arange(k.shape[1]), place.shape)
    if not whole:
      mine = jax.lax.dynamic_slice_in_dim(
        place, jax.lax.axis_index(queries[1]) * q.shape[1], q.shape[1], 1
      )
      order = jnp.argsort(mine, axis=1)
      place, last = jnp.argsort(order, axis=1), jnp.take_along_axis(mine, order, 1)
      start = jnp.take_along_axis(start, last, 1)
    out = _kernel(
      _moved(q, order, place), k, v, kernels.Ranges(start, last + 1), whole, implementation
    )
    return _moved(out, place, order)

  if mesh is None:
    return one(q, k, v, sample)
  specs = queries, keys, keys, PartitionSpec(*keys[:1])
  return jax.shard_map(one, in_specs=specs, out_specs=queries, check_vma=False)(q, k, v, sample)


def _valid_key_first(k, v, valid):
  """Moves the first valid key of every sample to slot 0, so that every row sees a key.

  Kernels that mask with minus infinity give a NaN gradient for a row without one, and it spreads to
  all parameters. Two kinds of
  rows see none otherwise: those before the first valid slot, and those of a sample that is all
  padding, whose slot 0 counts now.
  """
  first = jnp.argmax(valid, 1)

  def take(x):
    return x.at[:, 0].set(jnp.take_along_axis(x, first[:, None, None, None], 1)[:, 0])

  slots = jnp.arange(valid.shape[1])
  return take(k), take(v), (valid & (slots != first[:, None])) | (slots == 0)


def _rows(q, k, v, seen, first, implementation):
  """Causal attention of rows from slot `first` on. The kernels know no such rows: a mask says what
  some of them see.
  """
  B, L = q.shape[:2]
  count = -(-L // ROWS)
  size = -(-L // count)

  @jax.checkpoint  # masks are not kept for the gradient
  def one(part):
    q, first = part
    before = (jnp.arange(k.shape[1]) <= first + jnp.arange(size)[:, None])[None]
    return _kernel(q, k, v, before if seen is None else seen & before, False, implementation)

  q = jnp.pad(q, ((0, 0), (0, count * size - L), (0, 0), (0, 0))).reshape(
    B, count, size, *q.shape[2:]
  )
  out = jax.lax.map(one, (jnp.moveaxis(q, 1, 0), first + jnp.arange(count) * size))
  return jnp.moveaxis(out, 0, 1).reshape(B, count * size, *out.shape[3:])[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _kernel(q, k, v, seen, causal, implementation):
  """Runs a kernel on what one device has; seen: as of `kernels.run_kernel`.

  The choice depends on whether there is a gradient.
  """
  return _chosen(q, k, v, seen, causal, implementation, gradient=False)


def _kernel_forward(q, k, v, seen, causal, implementation):
  return jax.vjp(
    lambda q, k, v: _chosen(q, k, v, seen, causal, implementation, gradient=True), q, k, v
  )


def _kernel_backward(causal, implementation, vjp, gradient):
  return *vjp(gradient), None


_kernel.defvjp(_kernel_forward, _kernel_backward)


def _chosen(q, k, v, seen, causal, implementation, gradient):
  card, version, (B, L, H, h) = kernels.here(), kernels.library() or "", q.shape
  call = kernels.Call(
    B, L, k.shape[1], H, k.shape[2], h, str(q.dtype), causal, kernels.mask_kind(seen), gradient
  )
  if implementation == "cudnn" and gradient and L % 2:  # its gradient takes even lengths only
    implementation = "flash"
  kernel = (
    kernels.choose_kernel(card, version, call, kernels.compiles)
    if implementation == "flash"
    else implementation
  )
  return kernels.run_kernel(
    kernel, kernels.block(card, version, kernel, call.dtype), q, k, v, seen, causal
  )


def tile_sizes(L: int, S: int, causal: bool) -> tuple[int, int]:
  """Queries and keys of a tile: as few tiles as the largest size allows, then as small as they may
  be: less padding.
  """

  def even(n, most):
    return -(-n // -(-n // most) // 2) * 2

  return even(L, TILE if causal else TALL), even(S, TILE if causal else WIDE)


def tiled_scores(L: int, S: int, causal: bool) -> int:
  """How many scores of a head the tiled `attend` computes: what lies in tiles of which something is
  seen.
  """
  rows, keys = tile_sizes(L, S, causal)
  ends = [min((i + 1) * rows + S - L, S) if causal else S for i in range(-(-L // rows))]
  return sum(rows * keys * -(-end // keys) for end in ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(q, k, v, key_valid, causal):
  return (causal_attention if causal else full_attention)(q, k, v, key_valid)


@jax.jit
def causal_attention(q, k, v, key_valid, start=None):
  """The tiled `attend`; jitted for a name in programs and profiles, by which `cost.count_flops`
  knows it.

  start: int32[B, S], the first key that each row sees; None: key 0.
  """
  return _over_tiles(q, k, v, key_valid, True, start)


@jax.jit
def full_attention(q, k, v, key_valid):
  """Likewise where rows see all keys: all queries of a head against a few keys, whose scores a
  CPU's cache holds.
  """
  K = k.shape[2]

  def heads(x):
    return jnp.moveaxis(x.reshape(*x.shape[:2], K, -1, x.shape[-1]), 2, 0)  # [K, B, L, H / K, h]

  def one(qkv):
    return _over_tiles(*qkv, key_valid, False)

  return jnp.moveaxis(jax.lax.map(one, (heads(q), heads(k), heads(v))), 0, 2).reshape(q.shape)


def _over_tiles(q, k, v, key_valid, causal, start=None):
  """Softmax from tile to tile (Milakov and Gimelshein, "Online normalizer calculation for
  softmax").

  For each tile of queries a loop over the tiles of keys on the edge of what is seen, and one over
  those that all of them see. On a CPU going along rows costs as much as an eighth of a matrix
  product: one more column of the keys adds what masks padding, one more of the values, all ones,
  adds up the weights, and the maximum is that of the edge: any number near it would do. Where
  weights grow too large for float32 the tile of queries is done again with all maxima.

  Rows with a `start` see keys from there on: the tiles around these starts are an edge, too, and
  those before are left out.
  """
  B, L, H, h = q.shape
  S, K = k.shape[1:3]
  G, offset = H // K, S - L
  rows, keys = tile_sizes(L, S, causal)

  def tiles(x, size):  # [B, n, ...] -> [n / size, B, size, ...]
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

  def wider(x, column):
    return jnp.concatenate([x, jnp.broadcast_to(column, (*x.shape[:3], 1)).astype(x.dtype)], -1)

  masked = jnp.where(key_valid, 0, MASKED)[:, :, None, None]
  q, k, v = wider(q * h**-0.5, 1), wider(k, masked), wider(v, 1)
  # a key that counts
  reference = jnp.take_along_axis(k, jnp.argmax(key_valid, 1)[:, None, None, None], axis=1)[:, 0]
  # A key/value head's queries are rows of one matrix: [n, B, K, G * rows, h] against [n, B, K,
  # keys, h].
  q = (
    tiles(q.reshape(B, L, K, G, h + 1), rows)
    .transpose(0, 1, 3, 4, 2, 5)
    .reshape(-1, B, K, G * rows, h + 1)
  )
  # of the last tile
  padding = jnp.where(jnp.arange(-(-S // keys) * keys) < S, 0, MASKED).reshape(-1, keys)
  k, v = jnp.swapaxes(tiles(k, keys), 2, 3), jnp.swapaxes(tiles(v, keys), 2, 3)
  row = jnp.tile(jnp.arange(rows), G)[:, None] + offset
  # What is padded starts as the last row does: a later start would make an edge of all that its
  # tile sees.
  some = (
    () if start is None else (tiles(jnp.pad(start, ((0, 0), (0, -S % rows)), mode="edge"), rows),)
  )

  def one(tile):
    i, q, *starts = tile
    # rows see up to their own key
    first, last = (i * rows + offset, (i + 1) * rows + offset) if causal else (S, S)
    whole, seen = jnp.minimum(first + 1, S - 1) // keys, -(-jnp.minimum(last, S) // keys)

    def scores(j):
      return jnp.einsum("bkrh,bkth->bkrt", q, k[j], preferred_element_type=jnp.float32)

    def weigh(weights, j):
      return jnp.einsum(
        "bkrt,bkth->bkrh", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32
      )

    def edge(j, carry):
      shown = scores(j) + padding[j]
      seen = j * keys + jnp.arange(keys) <= i * rows + row
      if starts:
        seen &= j * keys + jnp.arange(keys) >= jnp.tile(*starts, G)[:, None, :, None]
      return exact(jnp.where(seen, shown, MASKED) if causal else shown, j, carry)

    def exact(scores, j, carry):
      largest, out = carry
      new = jnp.maximum(largest, scores.max(-1))
      shrink = jnp.exp(largest - new)
      return new, out * shrink[..., None] + weigh(jnp.exp(scores - new[..., None]), j)

    begun = (
      jnp.einsum("bkrh,bkh->bkr", q, reference, preferred_element_type=jnp.float32),
      jnp.zeros(q.shape),
    )
    inner = 0
    if starts:
      begun = jnp.full_like(begun[0], MASKED), begun[1]  # the reference may be of another sample
    largest, out = begun = jax.lax.fori_loop(whole, seen, edge, begun)
    if starts:
      inner = jnp.minimum(-(-starts[0].max() // keys), whole)
      largest, out = begun = jax.lax.fori_loop(starts[0].min() // keys, inner, edge, begun)
    out = jax.lax.fori_loop(
      inner, whole, lambda j, out: out + weigh(jnp.exp(scores(j) - largest[..., None]), j), out
    )

    def again():
      return jax.lax.fori_loop(inner, whole, lambda j, carry: exact(scores(j), j, carry), begun)[1]

    out = jax.lax.cond(out[..., h].max() < LARGE, lambda: out, again)
    return out[..., :h] / jnp.maximum(out[..., h:], SMALL)

  out = jax.lax.map(one, (jnp.arange(len(q)), q, *some))
  out = out.reshape(-1, B, K, G, rows, h).transpose(1, 0, 4, 2, 3, 5)
  return out.reshape(B, -1, H, h)[:, :L].astype(v.dtype)


def _tiled_forward(q, k, v, key_valid, causal):
  return _tiled(q, k, v, key_valid, causal), (q, k, v, key_valid)


def _tiled_backward(causal, saved, gradient):
  *qkv, key_valid = saved
  return *jax.vjp(lambda q, k, v: _blocked(q, k, v, key_valid, causal), *qkv)[1](gradient), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _blocked(q, k, v, key_valid, causal):
  """The same block of queries after block, each with all keys; for gradients, which compute it
  again.
  """
  (B, L), S = q.shape[:2], k.shape[1]
  count = -(-L // BLOCK)
  size = -(-L // count)

  @jax.checkpoint
  def one(part):
    q, offset = part
    weights = attention_weights(q, k, causal=causal, key_valid=key_valid, offset=offset)
    return jnp.einsum("bkgls,bskh->blkgh", weights.astype(v.dtype), v).reshape(q.shape)

  q = jnp.pad(q, ((0, 0), (0, count * size - L), (0, 0), (0, 0))).reshape(
    B, count, size, *q.shape[2:]
  )
  out = jax.lax.map(one, (jnp.moveaxis(q, 1, 0), jnp.arange(count) * size + S - L))
  return jnp.moveaxis(out, 0, 1).reshape(B, count * size, *out.shape[3:])[:, :L].astype(v.dtype)


def _packed(q, k, v, sample):
  """Attention of several samples in a row, in tiles."""
  order, place, start = _sample_order(sample)
  q, k, v = (_moved(x, order, place) for x in (q, k, v))
  return _moved(_packed_tiled(q, k, v, start), place, order)


@jax.custom_vjp
def _packed_tiled(q, k, v, start):
  return causal_attention(q, k, v, jnp.ones(k.shape[:2], bool), start)


def _packed_forward(q, k, v, start):
  return _packed_tiled(q, k, v, start), (q, k, v, start)


def _packed_backward(saved, gradient):
  """Goes over tiles of queries, and for each over the tiles of keys that one of them sees, twice.

  The weights of a row, and the mean by them of its weights' gradients, are known only when all of
  its keys have been seen.
  """
  q, k, v, start = saved
  (B, S, H, h), K = q.shape, k.shape[2]
  G, (rows, _) = H // K, tile_sizes(S, S, True)
  scale, count = h**-0.5, -(-S // rows)

  def tiles(x):  # [B, S, K, G, h] -> [n, B, K, G * rows, h]
    x = jnp.pad(x, [(0, 0), (0, count * rows - S)] + [(0, 0)] * 3).reshape(B, count, rows, K, -1, h)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(count, B, K, -1, h)

  def slots(x):  # back
    x = x.reshape(count, B, K, -1, rows, h).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, count * rows, -1, h)[:, :S]

  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  q, gradient, k, v = (tiles(x.reshape(B, S, K, -1, h)) for x in (q * scale, gradient, k, v))
  start = (
    jnp.pad(start, ((0, 0), (0, count * rows - S)), mode="edge")
    .reshape(B, count, rows)
    .swapaxes(0, 1)
  )
  row = jnp.tile(jnp.arange(rows), G)[:, None]

  def one(sums, tile):
    i, q, start, gradient = tile
    first = jnp.tile(start, G)[:, None, :, None]

    def scores(j):
      key = j * rows + jnp.arange(rows)
      seen = (key <= i * rows + row) & (key >= first) & (key < S)
      return jnp.where(seen, product("bkrh,bkth->bkrt", q, k[j]), MASKED), product(
        "bkrh,bkth->bkrt", gradient, v[j]
      )

    def sum_up(j, carry):
      largest, total, mean = carry
      shown, slope = scores(j)
      new = jnp.maximum(largest, shown.max(-1))
      shrink, weights = jnp.exp(largest - new), jnp.exp(shown - new[..., None])
      return new, total * shrink + weights.sum(-1), mean * shrink + (weights * slope).sum(-1)

    def add(j, carry):
      dq, dk, dv = carry
      shown, slope = scores(j)
      weights = jnp.exp(shown - largest[..., None]) / total[..., None]
      slope = weights * (slope - (mean / total)[..., None])
      dv = dv.at[j].add(product("bkrt,bkrh->bkth", weights.astype(v.dtype), gradient))
      dk = dk.at[j].add(product("bkrt,bkrh->bkth", slope.astype(k.dtype), q))
      return dq + product("bkrt,bkth->bkrh", slope.astype(k.dtype), k[j]), dk, dv

    begun = jnp.full(q.shape[:-1], MASKED), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape[:-1])
    largest, total, mean = jax.lax.fori_loop(start.min() // rows, i + 1, sum_up, begun)
    dq, *sums = jax.lax.fori_loop(
      start.min() // rows, i + 1, add, (jnp.zeros(q.shape, jnp.float32), *sums)
    )
    return tuple(sums), dq * scale

  begun = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(one, begun, (jnp.arange(count), q, start, gradient))
  return slots(dq).astype(q.dtype), slots(dk).astype(k.dtype), slots(dv).astype(v.dtype), None


_packed_tiled.defvjp(_packed_forward, _packed_backward)


def _einsum(q, k, v, causal, key_valid, sample=None):
  weights = attention_weights(
    q, k, causal=causal, key_valid=key_valid, sample=sample, offset=k.shape[1] - q.shape[1]
  )
  out = jnp.einsum("bkgls,bskh->blkgh", weights.astype(v.dtype), v)
  return out.reshape(q.shape).astype(q.dtype)


def attention_weights(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B S K h"],
  *,
  causal: bool,
  key_valid: Bool[Array, "B S"] | None = None,
  sample: Int[Array, "B S"] | None = None,
  offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B K G L S"]:
  """The softmax weights themselves, float32[B, K, H // K, L, S]; row i is slot i + offset of the
  sequence.
  """
  B, L, H, h = q.shape
  S, K = k.shape[1:3]
  q = q.reshape(B, L, K, H // K, h)
  scores = jnp.einsum("blkgh,bskh->bkgls", q, k, preferred_element_type=jnp.float32) * h**-0.5
  allowed = (
    jnp.ones((1, 1, 1, 1, S), bool) if key_valid is None else key_valid[:, None, None, None, :]
  )
  if causal:
    allowed = allowed & (jnp.arange(S) <= jnp.arange(L)[:, None] + offset)
  if sample is not None:
    allowed = allowed & (sample[:, :, None] == sample[:, None, :])[:, None, None]
  return jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)


def attend_first(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B S K h"],
  v: Float[Array, "B S K n"],
  seen: Callable[[jax.Array], jax.Array],
  count: int | Int[Array, ""],
) -> tuple[Float[Array, "B L H n"], Float[Array, "B L H"]]:
  """Attention to the first `count` of S keys, KEYS at a time: a longer S costs memory, and no time.

  Args:
    q: [B, L, H, h].
    k: [B, S, K, h], H a multiple of K.
    v: [B, S, K, n].
    seen: from slots int32[s] to which of them a row sees, bool[B or 1, L, s]; each sees at least
      one.
    count: may be traced.

  Returns:
    what is attended, in float32, and the logarithm of the sum of a row's exp(scores).
  """
  B, L, H, h = q.shape
  S, K = k.shape[1:3]
  size, q = min(S, KEYS), q.reshape(B, L, K, H // K, h)

  def block(j, carry):
    largest, total, out = carry
    # the last block begins earlier, and leaves out what the one before had
    first = jnp.minimum(j * size, S - size)

    def part(x):
      return jax.lax.dynamic_slice_in_dim(x, first, size, 1)

    slots = first + jnp.arange(size)
    scores = (
      jnp.einsum("blkgh,bskh->bkgls", q, part(k), preferred_element_type=jnp.float32) * h**-0.5
    )
    scores = jnp.where((seen(slots) & (slots >= j * size))[:, None, None], scores, MASKED)
    new = jnp.maximum(largest, scores.max(-1))
    shrink, weights = jnp.exp(largest - new), jnp.exp(scores - new[..., None])
    more = jnp.einsum(
      "bkgls,bskn->bkgln", weights.astype(v.dtype), part(v), preferred_element_type=jnp.float32
    )
    return new, total * shrink + weights.sum(-1), out * shrink[..., None] + more

  begun = (
    jnp.full((B, K, H // K, L), MASKED),
    jnp.zeros((B, K, H // K, L)),
    jnp.zeros((B, K, H // K, L, v.shape[-1])),
  )
  largest, total, out = (
    block(0, begun) if size == S else jax.lax.fori_loop(0, -(-count // size), block, begun)
  )

  def heads(x):
    return jnp.moveaxis(x, 3, 1).reshape(B, L, H, *x.shape[4:])

  return heads(out / total[..., None]), heads(largest + jnp.log(total))


def question_scores(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B W S K h"],
  share: Float[Array, "#B L"],
  others: Float[Array, "B L H"],
) -> Float[Array, "B W S"]:
  """The attention that question rows pay to each key of windows (paper 3.3): softmax weights, mean
  over heads, sum over rows.

  Args:
    q: [B, L, H, h].
    k: [B, W, S, K, h], H a multiple of K, of W windows.
    share: float32[B or 1, L], what a row counts; 0: it does not ask.
    others: float32[B, L, H], logarithm of the sum of exp(scores) of the other keys that a row sees,
      the same in all windows.
  """
  B, L, H, h = q.shape
  K = k.shape[3]
  scores = (
    jnp.einsum(
      "blkgh,bwskh->bwkgls",
      q.reshape(B, L, K, H // K, h),
      k,
      preferred_element_type=jnp.float32,
    )
    * h**-0.5
  )
  others = jnp.moveaxis(others.reshape(B, L, K, H // K), 1, 3)[:, None]
  total = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1), others)
  weights = jnp.exp(scores - total[..., None])
  share = jnp.broadcast_to(share / H, (B, L))
  # weights of bfloat16 would tie clips
  return jnp.einsum("bwkgls,bl->bws", weights, share, precision="highest")
