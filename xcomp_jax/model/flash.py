"""Attention by kernels of GPUs and XLA, on every device's own part of the arrays."""

import functools

import jax
import jax.numpy as jnp

from xcomp_jax.model import kernels
from xcomp_jax.model.kernel_calls import (
  LIBRARY,
  Library,
  Ranges,
  compiles,
  mask_kind,
  run_kernel,
)
from xcomp_jax.model.layout import (
  device_parts,
  even_size,
  in_blocks,
  joined,
  moved,
  sample_order,
)


def attend_flash(
  q, k, v, *, causal: bool, valid=None, sample=None, kernel: str, library: Library = LIBRARY
):
  """Runs kernels; arguments as of `attention.attend`.

  kernel: a `kernels.Kernel`; or "flash": the best of the device.
  """
  parts = device_parts(q, k, causal)
  run = functools.partial(_run_chosen, kernel=kernel, library=library)
  if sample is not None:
    return parts.run(functools.partial(_with_samples, axes=parts.rows, run=run), q, k, v, sample)
  one = functools.partial(_with_valid, causal=causal, axes=parts.rows, run=run, rows=library.rows)
  return parts.run(one, q, k, v, *(() if valid is None else (valid,)))


def _with_valid(q, k, v, valid=None, *, causal, axes, run, rows):
  """Attention of one sample a row on what a device has.

  axes: of the mesh that split the queries. run: `_run_chosen` of q, k, v, seen and causal.
  """
  seen = None
  if valid is not None:
    k, v, valid = _valid_key_first(k, v, valid)
    seen = valid[:, None]
  if axes is None:
    return run(q, k, v, seen, causal)
  return _rows_from(jax.lax.axis_index(axes) * q.shape[1], q, k, v, seen, run, rows)


def _valid_key_first(k, v, valid):
  """Moves the first valid key of every sample to slot 0, so that every row sees a key.

  Kernels that mask with minus infinity give a NaN gradient for a row without one, and it spreads to
  all parameters. Two kinds of rows see none otherwise: those before the first valid slot, and those
  of a sample that is all padding, whose slot 0 counts now.
  """
  first = jnp.argmax(valid, 1)

  def take(x):
    return x.at[:, 0].set(jnp.take_along_axis(x, first[:, None, None, None], 1)[:, 0])

  slots = jnp.arange(valid.shape[1])
  return take(k), take(v), (valid & (slots != first[:, None])) | (slots == 0)


def _rows_from(first, q, k, v, seen, run, rows):
  """Causal attention of rows from slot `first` on. The kernels know no such rows: a mask says what
  some of them see.
  """
  blocks = in_blocks(q, even_size(q.shape[1], rows))  # [n, B, size, H, h]
  size = blocks.shape[2]

  @jax.checkpoint  # masks are not kept for the gradient
  def one(part):
    block, first = part
    before = (jnp.arange(k.shape[1]) <= first + jnp.arange(size)[:, None])[None]  # [1, size, S]
    return run(block, k, v, before if seen is None else seen & before, False)

  out = jax.lax.map(one, (blocks, first + jnp.arange(len(blocks)) * size))
  return joined(out, q.shape[1])


def _with_samples(q, k, v, sample, *, axes, run):
  """Attention of several samples in a row on what a device has.

  In sample order every query sees one range of keys, and kernels leave out what no query of a block
  sees. A device that has some of the queries brings these into that order, too.
  """
  L, S = q.shape[1], k.shape[1]
  order, place, start = sample_order(sample)  # [B, S] each
  k, v = moved(k, order, place), moved(v, order, place)
  # key of each query in order: its own
  last = jnp.broadcast_to(jnp.arange(S), place.shape)
  if L != S:
    mine = jax.lax.dynamic_slice_in_dim(place, jax.lax.axis_index(axes) * L, L, 1)  # [B, L]
    order = jnp.argsort(mine, axis=1)
    place, last = jnp.argsort(order, axis=1), jnp.take_along_axis(mine, order, 1)
    start = jnp.take_along_axis(start, last, 1)
  out = run(moved(q, order, place), k, v, Ranges(start, last + 1), L == S)
  return moved(out, place, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _run_chosen(q, k, v, seen, causal, kernel, library):
  """Runs a kernel on what one device has; the choice depends on whether there is a gradient."""
  return _chosen(q, k, v, seen, causal, kernel, library, gradient=False)


def _run_chosen_forward(q, k, v, seen, causal, kernel, library):
  def run(q, k, v):
    return _chosen(q, k, v, seen, causal, kernel, library, gradient=True)

  return jax.vjp(run, q, k, v)


_run_chosen.defvjp(
  _run_chosen_forward, lambda causal, kernel, library, vjp, gradient: (*vjp(gradient), None)
)


def _chosen(q, k, v, seen, causal, kernel, library, gradient):
  card, version = kernels.here(), library.version or ""
  (B, L, H, h), (S, K) = q.shape, k.shape[1:3]
  call = kernels.Call(
    batch=B,
    queries=L,
    keys=S,
    heads=H,
    kv_heads=K,
    size=h,
    dtype=str(q.dtype),
    causal=causal,
    mask=mask_kind(seen),
    gradient=gradient,
  )
  if kernel == "cudnn" and gradient and L % 2:  # its gradient takes even lengths only
    kernel = "flash"
  if kernel == "flash":
    attempt = functools.partial(compiles, library=library)
    kernel = kernels.choose_kernel(card, version, call, attempt)
  size = kernels.block(card, version, kernel, call.dtype)
  return run_kernel(kernel, size, q, k, v, seen, causal, library)
