"""Attention by JAX's own TPU kernel, in float32 or bfloat16."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from xcomp_jax.model.layout import device_parts, padded

ATTENDED = "attended"  # name of what attention gives, for `attention.remat`
NUMBERS = 256  # of samples that tables of blocks tell apart


def block_sizes(length: int) -> tuple[int, int]:
  """(size of a block, length in whole ones): a multiple of 128, of the largest ones that which
  needs least padding.
  """
  sizes = range(1024, 384, -128) if length > 512 else (-(-length // 128) * 128,)
  block = min(sizes, key=lambda size: -(-length // size) * size)
  return block, -(-length // block) * block


def attend_splash(
  q,
  k,
  v,
  *,
  causal: bool,
  valid=None,
  sample=None,
  sizes: Callable[[int], tuple[int, int]] = block_sizes,
  interpret: bool = False,
):
  """Runs the kernel. Padding keys are another segment than all else.

  Rows of padding, too, so they see each other; what they return is garbage like that of the others.
  Samples that share a row are segments, and blocks without two slots of one sample are left out.

  Args:
    q: [B, L, H, h].
    k: [B, S, K, h].
    v: [B, S, K, h].
    causal: rows see keys up to their own.
    valid: bool[B, S], keys that count; None: all.
    sample: int32[B, S], of a row with several; as of AttentionMask.
    sizes: as `block_sizes`.
    interpret: without a TPU, slowly.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

  parts = device_parts(q, k, causal)
  # 0 is padding
  segment = jnp.ones(k.shape[:2], jnp.int32) if valid is None else valid.astype(jnp.int32)
  if sample is not None:
    segment = jnp.maximum(sample + 1, 0)
  _, L, H, h = (
    q.shape if parts.mesh is None else NamedSharding(parts.mesh, parts.queries).shard_shape(q.shape)
  )
  (q_block, q_length), (k_block, k_length) = sizes(L), sizes(k.shape[1])
  kernel = splash.make_splash_mha(
    _mask(L, q.shape[1] // L, H, q_length, k_length, causal),
    block_sizes=splash.BlockSizes(
      block_q=q_block,
      block_kv=k_block,
      block_kv_compute=k_block,
      block_q_dkv=q_block,
      block_kv_dkv=k_block,
      block_kv_dkv_compute=k_block,
      block_q_dq=q_block,
      block_kv_dq=k_block,
    ),
    head_shards=1,
    q_seq_shards=q.shape[1] // L,
    interpret=interpret,
    residual_checkpoint_name=ATTENDED,
  )

  def heads(x, length):  # [B, n, H, h] -> [B, H, length, h]
    return jnp.swapaxes(padded(x, length - x.shape[1]), 1, 2)

  def one(kernel, q, k, v, q_segment, k_segment):
    ids = splash.SegmentIds(
      padded(q_segment, q_length - L), padded(k_segment, k_length - k_segment.shape[1])
    )

    def row(q, k, v, ids):
      mine = kernel if sample is None else only_shared_blocks(kernel, ids, q_block, k_block)
      return mine(q, k, v, segment_ids=ids)

    scaled = heads(q * h**-0.5, q_length)
    out = jax.vmap(row)(scaled, heads(k, k_length), heads(v, k_length), ids)
    return jnp.swapaxes(out, 1, 2)[:, :L].astype(q.dtype)

  if parts.mesh is None:
    return one(kernel, q, k, v, segment, segment)
  spec = kernel.manual_sharding_spec(NamedSharding(parts.mesh, PartitionSpec(None, parts.rows)))
  segments = PartitionSpec(*parts.queries[:2]), PartitionSpec(*parts.keys[:1])
  specs = spec, parts.queries, parts.keys, parts.keys, *segments
  return jax.shard_map(one, in_specs=specs, out_specs=parts.queries, check_vma=False)(
    kernel, q, k, v, segment, segment
  )


def _mask(L: int, parts: int, heads: int, q_length: int, k_length: int, causal: bool):
  """The mask of all heads, for `parts` parts of L queries, each padded to `q_length`."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  mask = masks.FullMask((parts * q_length, k_length))
  if causal:
    mask = masks.CausalMask((parts * q_length, k_length))
    slots = np.arange(parts)[:, None] * L + np.arange(q_length)  # [parts, q_length]
    mask.q_sequence = slots.reshape(-1).astype(np.int32)
  return masks.MultiHeadMask([mask] * heads)


def only_shared_blocks(kernel, ids, q_block: int, k_block: int):
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
  on = (present(ids.q, q_block)[:, None] & keys).any(-1) | diagonal  # [q blocks, k blocks]

  def tables(info, by_keys=False):
    blocks = jnp.where(on, info.block_mask[0], 0)
    # While a block is left out the kernel fetches the next one that is not, in the order in which
    # it visits them.
    visited = blocks.T if by_keys else blocks
    places = jnp.where(visited > 0, jnp.arange(visited.size).reshape(visited.shape), visited.size)
    following = jax.lax.cummin(places.reshape(-1), reverse=True) % visited.size % visited.shape[1]
    following = following.reshape(visited.shape)
    following = (following.T if by_keys else following).astype(info.data_next.dtype)
    return info._replace(block_mask=blocks[None], data_next=following[None])

  return type(kernel)(
    tables(kernel.fwd_mask_info),
    tables(kernel.dq_mask_info),
    tables(kernel.dkv_mask_info, by_keys=True),
    **kernel.kwargs,
  )
