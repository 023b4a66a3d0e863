"""Attention: one function for everything that attends, whatever computes it on which device."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from xcomp_jax.config import Attention
from xcomp_jax.data.batch import Leaf
from xcomp_jax.model import kernels, tiles
from xcomp_jax.model.kernel_calls import LIBRARY, Library, attend_flash
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.model.softmax import attend_einsum
from xcomp_jax.model.splash import ATTENDED, attend_splash
from xcomp_jax.parallel.mesh import constrain, split_axes

IMPLEMENTATIONS = get_args(Attention)


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
  library: Library = LIBRARY,
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
    library: the kernels of "flash" and its like.

  Returns:
    [B, L, H, h] in q's dtype.

  Raises:
    ShapeError: causal attention of more queries than keys, several samples in a row with another
      mask than theirs, or an implementation that is unknown or not installed.
  """
  _check(q, k, mask, implementation)
  causal, valid, sample = mask.causal, mask.valid, mask.sample
  how = kernels.implementation_of(
    implementation,
    q.shape[1],
    k.shape[1],
    causal=causal,
    masked=valid is not None,
    card=kernels.here(),
    version=library.version,
  )
  # it masks by -1e30, and has weights beyond 65,504
  if how == "tiled" and q.dtype == jnp.float16:
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    return attend(*wide, mask, implementation=how).astype(q.dtype)
  if how == "tiled" and causal and split_axes((None, "sequence"), q.shape)[1]:
    how = "xla_chunked"  # tiles are laid out for a whole sequence
  if how == "einsum":
    if causal:
      k, v = (constrain(x, "batch", None, "heads", None) for x in (k, v))
    first = k.shape[1] - q.shape[1]
    return attend_einsum(q, k, v, causal=causal, valid=valid, sample=sample, offset=first).astype(
      q.dtype
    )
  if how == "tiled" and sample is not None:
    return checkpoint_name(tiles.attend_samples(q, k, v, sample), ATTENDED)
  if how == "tiled":
    valid = jnp.ones(k.shape[:2], bool) if valid is None else valid
    return checkpoint_name(tiles.attend_tiled(q, k, v, valid, causal), ATTENDED)
  if how == "splash":
    return attend_splash(q, k, v, causal=causal, valid=valid, sample=sample)
  if how != "cudnn" and library.version is None:
    raise ShapeError(
      f"attention implementation {how!r} needs tokamax: pip install tokamax",
      where="implementation",
      value=how,
      missing="tokamax",
    )
  return attend_flash(
    q, k, v, causal=causal, valid=valid, sample=sample, kernel=how, library=library
  )


def _check(q, k, mask: AttentionMask, implementation: str) -> None:
  """Raises what `attend` says."""
  L, S = q.shape[1], k.shape[1]
  if mask.causal and L > S:
    raise ShapeError(
      f"causal attention of {L} queries over {S} keys: there can't be more queries",
      where="mask.causal",
      queries=L,
      keys=S,
    )
  # padding lies inside of rows
  if mask.sample is not None and (not mask.causal or mask.valid is not None or L != S):
    raise ShapeError(
      f"several samples in a row: {L} queries of {S} keys must be all, causal, and without `valid`",
      where="mask.sample",
    )
  if implementation not in IMPLEMENTATIONS:
    raise ShapeError(
      f"attention implementation {implementation!r}: known are {', '.join(IMPLEMENTATIONS)}",
      where="implementation",
      value=implementation,
      allowed=IMPLEMENTATIONS,
    )


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
