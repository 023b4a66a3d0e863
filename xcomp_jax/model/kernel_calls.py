"""How a kernel is called: on each device's own part of the arrays, over whole blocks."""

import concurrent.futures
import dataclasses
import functools
import logging
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xcomp_jax.model import kernels
from xcomp_jax.model.layout import (
  by_blocks,
  device_parts,
  even_size,
  from_blocks,
  in_blocks,
  moved,
  padded,
  sample_order,
)

LOG = logging.getLogger(__name__)


class Ranges(NamedTuple):
  """The keys that rows see: of each those from `start` on, up to the one before `end`. At least
  one.

  int32[B, L] each. Rows that see neighbouring ranges should be neighbours: what no row of a block
  sees is left out.
  """

  start: jax.Array
  end: jax.Array


Seen = jax.Array | Ranges | None  # bool[B or 1, L or 1, S], where every row sees a key; None: all


def mask_kind(seen: Seen) -> Literal["keys", "rows", "ranges"] | None:
  """Gives the `mask` of a Call."""
  if seen is None or isinstance(seen, Ranges):
    return None if seen is None else "ranges"
  return "keys" if seen.shape[1] == 1 else "rows"


@functools.cache
def prepare_tokamax() -> None:
  """Marks absl's flags as parsed: tokamax reads them, and would parse a command line that is not
  absl's.

  Drops a warning of tokamax at every traced call, too: it has no measured settings for this shape,
  and takes a rule's.
  """
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  logging.getLogger("absl").addFilter(
    lambda record: not str(record.msg).startswith("Autotuning cache miss")
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Library:
  """Where kernels come from, tokamax but for cuDNN's, and how many rows they are given at once.

  strip: rows whose ranges are made a mask at once.
  rows: of queries of a split sequence that see their keys through one mask.
  """

  strip: int = 2048
  rows: int = 2048

  @property
  def version(self) -> str | None:
    """The installed one; None: there is none."""
    return kernels.library()

  def cudnn(self, q, k, v):
    """The kernel of cuDNN, where all see all."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

  def masked(self, kernel: kernels.Kernel, q, k, v, mask, causal: bool):
    """A kernel with a mask bool[B or 1, 1, L or 1, S], or None.

    Raises:
      NotImplementedError: tokamax has no such kernel for this device or dtype.
    """
    import tokamax

    prepare_tokamax()
    return tokamax.dot_product_attention(
      q, k, v, mask=mask, is_causal=causal, implementation=kernel
    )

  def ranged(self, kernel: kernels.Kernel, q, k, v, seen: Ranges, causal: bool):
    """A kernel with ranges, which `tokamax.dot_product_attention` has no argument for."""
    from tokamax._src.ops.attention import api, base

    prepare_tokamax()
    start, end = (x[:, None] for x in seen)
    # Only the causal flag has Mosaic's gradient leave blocks out.
    mask = (
      base.Mask(None, k_start=start, is_causal=True)
      if causal
      else base.Mask(None, k_start=start, k_end=end)
    )
    run = api.IMPLEMENTATIONS["mosaic_gpu" if kernel == "mosaic" else kernel]
    return run(q, k, v, mask=mask, precision=None)


LIBRARY = Library()


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

  def one(block, first):  # [B, size, H, h]
    slots = first + jnp.arange(block.shape[1])
    before = (jnp.arange(k.shape[1]) <= slots[:, None])[None]  # [1, size, S]
    return run(block, k, v, before if seen is None else seen & before, False)

  return by_blocks(one, q, rows, first)


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
  return jax.vjp(
    lambda q, k, v: _chosen(q, k, v, seen, causal, kernel, library, gradient=True), q, k, v
  )


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
    kernel = kernels.choose_kernel(
      card, version, call, attempt=functools.partial(compiles, library=library)
    )
  size = kernels.block(card, version, kernel, call.dtype)
  return run_kernel(kernel, size, q, k, v, seen, causal, library)


def run_kernel(
  kernel: kernels.Kernel,
  block_size: int,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: Seen,
  causal: bool,
  library: Library = LIBRARY,
) -> jax.Array:
  """Has a library compute attention over whole blocks.

  All padding is masked. A kernel that attended to zeros would give wrong numbers without an error.

  Args:
    kernel: which one; "cudnn" where all see all.
    block_size: rows and keys are padded to multiples of it.
    q: [B, L, H, h].
    k: [B, S, K, h] in q's dtype; S = L where it is causal.
    v: [B, S, K, h], likewise.
    seen: which keys a row sees.
    causal: a row sees keys up to its own, where the ends of ranges are, too.
    library: the kernels.

  Returns:
    [B, L, H, h] in q's dtype.

  Raises:
    NotImplementedError: tokamax has no such kernel for this device or dtype.
  """
  if kernel == "cudnn":
    return library.cudnn(q, k, v)
  L, S = q.shape[1], k.shape[1]
  more_rows, more_keys = -L % block_size, -S % block_size
  q, k, v = padded(q, more_rows), padded(k, more_keys), padded(v, more_keys)
  if isinstance(seen, Ranges):
    ranges = Ranges(*(jnp.pad(x, ((0, 0), (0, more_rows)), mode="edge") for x in seen))
    if kernel == "mosaic":
      out = library.ranged(kernel, q, k, v, ranges, causal)
    else:
      out = _in_strips(kernel, block_size, q, k, v, ranges, library)
    return out[:, :L].astype(q.dtype)
  if more_keys and seen is None:
    seen = jnp.ones((1, 1, S), bool)
  if seen is not None:
    seen = padded(seen, more_keys, axis=2)
    # rows that see nothing have NaN as gradient
    seen = padded(seen, more_rows if seen.shape[1] > 1 else 0, value=True)
    seen = seen[:, None]
  return library.masked(kernel, q, k, v, seen, causal)[:, :L].astype(q.dtype)


def _in_strips(kernel, block_size: int, q, k, v, seen: Ranges, library: Library) -> jax.Array:
  """Runs a kernel on some rows at once, and on those keys among which theirs are: a quarter, a
  half, or all.

  These kernels make a mask of ranges: "xla_chunked" always, and "triton" for the gradient, where it
  skips nothing, either.
  """
  L, S = q.shape[1], k.shape[1]
  rows = -(-even_size(L, library.strip) // block_size) * block_size
  sizes = sorted({min(S, -(-S // (parts * 128)) * 128) for parts in (4, 2, 1)})

  def window(size, first, q, k, v, seen):
    first = jnp.minimum(first, S - size)
    k, v = (jax.lax.dynamic_slice_in_dim(x, first, size, 1) for x in (k, v))
    return library.ranged(kernel, q, k, v, Ranges(seen.start - first, seen.end - first), False)

  @jax.checkpoint  # masks are not kept for the gradient
  def strip(part):
    q, seen = part
    first = seen.start.min()
    fits = sum((seen.end.max() - first > size).astype(jnp.int32) for size in sizes[:-1])
    windows = [functools.partial(window, size) for size in sizes]
    return jax.lax.switch(fits, windows, first, q, k, v, seen)

  strips = in_blocks(q, rows), Ranges(*(in_blocks(x, rows, "edge") for x in seen))
  return from_blocks(jax.lax.map(strip, strips), L)


def compiles(kernel: kernels.Kernel, call: kernels.Call, library: Library = LIBRARY) -> bool:
  """Says whether this process's device compiles a kernel for exactly this call.

  It is tried once in a process. A refusal is a line on stderr.
  """
  device = jax.extend.backend.get_default_device()
  precision = jax.config.jax_default_matmul_precision  # ty: ignore[missing-attribute]
  return _compiles(kernel, call, library, device, precision)


@functools.cache
def _compiles(
  kernel: kernels.Kernel, call: kernels.Call, library: Library, device: Any, precision: str | None
):
  mesh = Mesh(np.array([device]), "x")

  def attempt():
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
      _program(kernel, call, library, mesh).compile()

  try:  # in a thread of its own, which knows nothing of what is being traced here
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pool.submit(attempt).result()
  except Exception as error:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    LOG.warning(f"attention: {kernel} does not compile for {call}: {why}")
    return False
  return True


def _program(
  kernel: kernels.Kernel, call: kernels.Call, library: Library, mesh: Mesh
) -> jax.stages.Lowered:
  """Lowers a call for the only device of a mesh, with its gradient if one is wanted."""

  def array(*shape, dtype=call.dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

  B, L, S = call.batch, call.queries, call.keys
  q, k = array(B, L, call.heads, call.size), array(B, S, call.kv_heads, call.size)
  seen = {
    None: None,
    "keys": array(B, 1, S, dtype=np.bool_),
    "rows": array(B, L, S, dtype=np.bool_),
    "ranges": Ranges(*(array(B, L, dtype=np.int32) for _ in Ranges._fields)),
  }[call.mask]
  size = kernels.block(
    kernels.card_of(mesh.devices.item()), library.version or "", kernel, call.dtype
  )

  def forward(q, k, v, seen):
    return run_kernel(kernel, size, q, k, v, seen, call.causal, library)

  def total(*args):
    return forward(*args).astype(jnp.float32).sum()

  return jax.jit(jax.grad(total, (0, 1, 2)) if call.gradient else forward).lower(q, k, k, seen)
