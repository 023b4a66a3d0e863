"""Which implementation computes attention, on which device.

A kernel that a device can't run raises when the program around it is lowered or compiled, where
nothing can catch the error and go on. So every call is decided before it is traced, from what is
known about the device and the installed library (tokamax). What no rule knows is compiled once, on
its own.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xcomp_jax.config import ConfigError, Dtype, VLMConfig

Kernel = Literal["mosaic", "triton", "cudnn", "xla_chunked"]
# of tokamax; cuDNN's is called by jax.nn
KERNELS: tuple[Kernel, ...] = (
  "mosaic",
  "triton",
  "xla_chunked",
)
# versions of tokamax that the rules are made from; docs/LOG.md has what compiles where
TRIED = (
  "0.0.12",
  "0.0.17",
)
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))  # likewise
SIZES = (64, 88, 128)  # of heads, likewise
# compute capability: first and last major version
MAJORS = {
  "mosaic": (9, 10),
  "triton": (8, None),
  "cudnn": (8, None),
}
# Triton in float32, where a block of threads has 100 KB of shared memory: (size of heads, with a
# gradient) that compile.
SMALL_FLOAT32 = {(64, False), (64, True), (128, False)}
FEW = 384  # queries, of which einsum computes attention: a tile of `attention`
LONG = 16384  # slots of the LLM for 1,024 frames without text
STRIP = 2048  # rows whose ranges are made a mask at once
SPLITS = 80  # tiles of 128 rows, a little more than half of a B200's 148 multiprocessors


@dataclasses.dataclass(frozen=True)
class Card:
  """A device, as far as kernels are chosen by it.

  platform: "cpu", "gpu" or "tpu". kind: its name. capability: compute capability of an NVIDIA GPU,
  (9, 0) of an H100; None of all
  others. shared_memory: bytes that a block of its threads can have; 0 where that is not known.
  """

  platform: str
  kind: str
  capability: tuple[int, int] | None = None
  shared_memory: int = 0

  @property
  def bfloat16(self) -> bool:
    """Whether it multiplies in bfloat16; NVIDIA GPUs do from Ampere on."""
    return self.platform != "cpu" and (self.capability is None or self.capability >= (8, 0))

  @property
  def float16(self) -> bool:
    """Whether it multiplies in float16 with sums in float32; NVIDIA GPUs do from Volta on, TPUs
    don't.
    """
    return self.platform == "gpu" and (self.capability is None or self.capability >= (7, 0))


def here() -> Card:
  """The device that this process computes on."""
  return card_of(jax.extend.backend.get_default_device())


def card_of(device: Any) -> Card:
  """Reads what a jax.Device says about itself."""
  platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
  major, dot, minor = str(getattr(device, "compute_capability", "")).partition(".")
  capability = (int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else None
  return Card(
    platform,
    device.device_kind,
    capability,
    getattr(device, "shared_memory_per_block_optin", 0) or 0,
  )


def compute_dtype(card: Card, tuned: Dtype | None = None, gradient: bool = False) -> Dtype:
  """Gives the dtype to compute in where nobody says.

  That is float32 if the weights were tuned in it, else bfloat16 if the device has it, else float16
  if it has that, which has no gradients.
  """
  if tuned == "float32":
    return tuned
  return "bfloat16" if card.bfloat16 else "float16" if card.float16 and not gradient else "float32"


def check_finite(x: jax.Array | np.ndarray, what: str, dtype: str) -> None:
  """Refuses numbers that have left float16's range, which would give an answer all the same; wider
  types are not looked at.

  Raises:
    ConfigError: some have; what to do.
  """
  if dtype == "float16" and not bool(jnp.isfinite(x).all()):
    raise ConfigError(
      f"{what} left the range of float16, whose largest number is 65,504: take --dtype float32, or "
      f"bfloat16 if the device has it"
    )


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of a kernel on one device, before padding.

  batch, queries, keys, heads, kv_heads, size: B, L, S, H, K and h of q [B, L, H, h] and k [B, S, K,
  h]. dtype: of both, as NumPy
  names it. causal: rows see keys up to their own. mask: keys are masked for all rows alike
  ("keys"), for each row ("rows"), or not (None), or rows see a range of keys each ("ranges").
  gradient: there will be one.
  """

  batch: int
  queries: int
  keys: int
  heads: int
  kv_heads: int
  size: int
  dtype: str
  causal: bool
  mask: Literal["keys", "rows", "ranges"] | None
  gradient: bool


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
def library() -> str | None:
  """Gives the installed version of tokamax; None: there is none."""
  try:
    return importlib.metadata.version("tokamax")
  except importlib.metadata.PackageNotFoundError:
    return None


def block(card: Card, version: str, kernel: Kernel, dtype: str) -> int:
  """Gives the size of blocks: rows and keys are padded to multiples of it, so that no sequence ends
  inside of one.
  """
  if kernel == "xla_chunked" and dtype == "float16":
    # it works on 128 at once; one that is left over is a product that the compiler for GPUs has not
    # in float16
    return 2
  if kernel in ("cudnn", "xla_chunked"):
    return 1  # a library that takes any length, and plain XLA, which masks what it pads
  # The older Mosaic forward pass for 10.x works on 256 rows at once, later ones on 128 as all
  # others.
  return (
    256
    if kernel == "mosaic" and version == "0.0.12" and card.capability and card.capability[0] == 10
    else 128
  )


def kernel_rule(card: Card, version: str, call: Call) -> Kernel | None:
  """Gives the kernel of a call where it is known which ones compile; None where it is not.

  version: of tokamax.
  """
  if card.platform != "gpu" or card.capability is None or card.capability < (8, 0):
    return "xla_chunked"  # the others are for NVIDIA GPUs from Ampere on
  major = card.capability[0]
  if version not in TRIED or call.size not in SIZES or card.capability not in CAPABILITIES:
    return None
  # Mosaic has none, and Triton's blocks take twice as much shared memory
  if call.dtype == "float32":
    return (
      "triton"
      if card.shared_memory >= 160 * 1024 or (call.size, call.gradient) in SMALL_FLOAT32
      else "xla_chunked"
    )
  if major == 8:
    return "triton"  # Mosaic has only a forward pass there, and that since 0.0.17
  if major == 9:
    return "mosaic"
  if version == "0.0.12" and call.gradient:
    # Mosaic's gradient wants more shared memory than there is, or a minute of the compiler for
    # every shape
    return "triton"
  return "triton" if _splits(card, call) else "mosaic"


def _splits(card: Card, call: Call) -> bool:
  """Says whether Mosaic may split the keys into parts. It does with few tiles on 10.x, and may get
  the lengths of parts wrong.
  """
  blackwell = card.capability is not None and card.capability[0] == 10
  if not blackwell or call.causal or call.mask == "ranges":
    return False
  return call.batch * call.heads * -(-call.queries // 128) < SPLITS


def choose_kernel(
  card: Card, version: str, call: Call, attempt: Callable[[Kernel, Call], bool]
) -> Kernel:
  """Gives the kernel of a call: by rule, else the first one that compiles.

  attempt: says whether a kernel compiles for a call, with its gradient if one is wanted; `compiles`
  outside of tests.
  """
  if known := kernel_rule(card, version, call):
    return known
  # what is wrong compiles, too
  wanted: tuple[Kernel, ...] = ("triton",) if _splits(card, call) else ("mosaic", "triton")
  could = (kernel for kernel in wanted if unusable(kernel, card, version, call.dtype) is None)
  return next((kernel for kernel in could if attempt(kernel, call)), "xla_chunked")


def compiles(kernel: Kernel, call: Call) -> bool:
  """Says whether this process's device compiles a kernel for exactly this call.

  It is tried once in a process. A refusal is a line on stderr.
  """
  device = jax.extend.backend.get_default_device()
  precision = jax.config.jax_default_matmul_precision  # ty: ignore[missing-attribute]
  return _compiles(kernel, call, device, precision)


@functools.cache
def _compiles(kernel: Kernel, call: Call, device: Any, precision: str | None) -> bool:
  c = call
  mesh = Mesh(np.array([device]), "x")
  place = NamedSharding(mesh, PartitionSpec())

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, c.dtype, sharding=place)

  q, k = array(c.batch, c.queries, c.heads, c.size), array(c.batch, c.keys, c.kv_heads, c.size)
  shape = None if c.mask is None else (c.batch, 1 if c.mask == "keys" else c.queries, c.keys)
  seen = shape and jax.ShapeDtypeStruct(shape, np.bool_, sharding=place)
  if c.mask == "ranges":
    bound: Any = jax.ShapeDtypeStruct((c.batch, c.queries), np.int32, sharding=place)
    seen = Ranges(bound, bound)
  size = block(card_of(device), library() or "", kernel, c.dtype)

  def forward(q, k, v, seen):
    return run_kernel(kernel, size, q, k, v, seen, c.causal)

  def total(*args):
    return forward(*args).astype(jnp.float32).sum()

  def attempt():
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
      jax.jit(jax.grad(total, (0, 1, 2)) if c.gradient else forward).lower(q, k, k, seen).compile()

  try:  # in a thread of its own, which knows nothing of what is being traced here
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pool.submit(attempt).result()
  except Exception as error:
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    print(f"attention: {kernel} does not compile for {call}: {why}", file=sys.stderr)
    return False
  return True


def run_kernel(
  kernel: Kernel,
  block_size: int,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  seen: Seen,
  causal: bool,
) -> jax.Array:
  """Has a library, tokamax but for cuDNN's kernel, compute attention over whole blocks.

  All padding is masked. A kernel that attended to zeros would give wrong numbers without an error.

  Args:
    kernel: which one; "cudnn" where all see all.
    block_size: rows and keys are padded to multiples of it.
    q: [B, L, H, h].
    k: [B, S, K, h] in q's dtype; S = L where it is causal.
    v: [B, S, K, h], likewise.
    seen: which keys a row sees.
    causal: a row sees keys up to its own, where the ends of ranges are, too.

  Returns:
    [B, L, H, h] in q's dtype.

  Raises:
    NotImplementedError: tokamax has no such kernel for this device or dtype.
  """
  if kernel == "cudnn":
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
  import tokamax
  from absl import flags

  # tokamax reads them, and would parse a command line that is not absl's
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  _quiet()
  L, S = q.shape[1], k.shape[1]
  more_rows, more_keys = -L % block_size, -S % block_size
  if isinstance(seen, Ranges):
    q, k, v = _padded(q, 1, more_rows, 0), _padded(k, 1, more_keys, 0), _padded(v, 1, more_keys, 0)
    seen = Ranges(*(jnp.pad(x, ((0, 0), (0, more_rows)), mode="edge") for x in seen))
    if kernel == "mosaic":
      out = _ranged(kernel, q, k, v, seen, causal)
    else:
      out = _in_strips(kernel, block_size, q, k, v, seen)
    return out[:, :L].astype(q.dtype)
  if more_keys and seen is None:
    seen = jnp.ones((1, 1, S), bool)
  if seen is not None:
    seen = _padded(seen, 2, more_keys, False)
    # rows that see nothing have NaN as gradient
    seen = _padded(seen, 1, more_rows if seen.shape[1] > 1 else 0, True)
    seen = seen[:, None]
  q, k, v = _padded(q, 1, more_rows, 0), _padded(k, 1, more_keys, 0), _padded(v, 1, more_keys, 0)
  out = tokamax.dot_product_attention(q, k, v, mask=seen, is_causal=causal, implementation=kernel)
  return out[:, :L].astype(q.dtype)


def _ranged(
  kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, seen: Ranges, causal: bool
) -> jax.Array:
  """Runs a kernel with ranges, which `tokamax.dot_product_attention` has no argument for."""
  from tokamax._src.ops.attention import api, base

  start, end = (x[:, None] for x in seen)
  # Only the causal flag has Mosaic's gradient leave blocks out.
  mask = (
    base.Mask(None, k_start=start, is_causal=True)
    if causal
    else base.Mask(None, k_start=start, k_end=end)
  )
  return api.IMPLEMENTATIONS["mosaic_gpu" if kernel == "mosaic" else kernel](
    q, k, v, mask=mask, precision=None
  )


def _in_strips(
  kernel: Kernel, block_size: int, q: jax.Array, k: jax.Array, v: jax.Array, seen: Ranges
) -> jax.Array:
  """Runs a kernel on STRIP rows at once, and on those keys among which theirs are: a quarter, a
  half, or all.

  These kernels make a mask of ranges: "xla_chunked" always, and "triton" for the gradient, where it
  skips nothing, either.
  """
  (B, L), S = q.shape[:2], k.shape[1]
  count = -(-L // STRIP)
  rows = -(-L // (count * block_size)) * block_size
  sizes = sorted({min(S, -(-S // (parts * 128)) * 128) for parts in (4, 2, 1)})

  def window(size, first, q, k, v, seen):
    first = jnp.minimum(first, S - size)
    k, v = (jax.lax.dynamic_slice_in_dim(x, first, size, 1) for x in (k, v))
    return _ranged(kernel, q, k, v, Ranges(seen.start - first, seen.end - first), False)

  @jax.checkpoint  # masks are not kept for the gradient
  def strip(part):
    q, seen = part
    first = seen.start.min()
    fits = sum((seen.end.max() - first > size).astype(jnp.int32) for size in sizes[:-1])
    return jax.lax.switch(
      fits, [functools.partial(window, size) for size in sizes], first, q, k, v, seen
    )

  def strips(x, mode):
    x = jnp.pad(x, ((0, 0), (0, count * rows - L)) + ((0, 0),) * (x.ndim - 2), mode=mode)
    return jnp.moveaxis(x.reshape(B, count, rows, *x.shape[2:]), 1, 0)

  out = jax.lax.map(strip, (strips(q, "constant"), Ranges(*(strips(x, "edge") for x in seen))))
  return jnp.moveaxis(out, 0, 1).reshape(B, count * rows, *out.shape[3:])[:, :L]


def _padded(x: jax.Array, axis: int, count: int, value: bool | int) -> jax.Array:
  """Pads the end of an axis with `count` values."""
  return (
    jax.lax.pad(x, np.array(value, x.dtype), [(0, count * (i == axis), 0) for i in range(x.ndim)])
    if count
    else x
  )


@functools.cache
def _quiet() -> None:
  """Drops a warning of tokamax at every traced call: it has no measured settings for this shape,
  and takes a rule's.
  """
  logging.getLogger("absl").addFilter(
    lambda record: not str(record.msg).startswith("Autotuning cache miss")
  )


def unusable(implementation: str, card: Card, version: str | None, dtype: str) -> str | None:
  """Says why a device can't have an implementation in a dtype; None: it can."""
  if implementation in MAJORS:
    (first, last), major = MAJORS[implementation], card.capability[0] if card.capability else 0
    if major < first or (last is not None and major > last):
      return (
        f"{implementation} kernels are for NVIDIA GPUs of compute capability {first}.0 "
        f"{f'to {last}.x' if last else 'and more'}"
      )
  if implementation in ("mosaic", "cudnn") and dtype == "float32":
    return f"{implementation} kernels have no float32"
  if implementation in ("flash", "xla_chunked") and card.platform == "cpu" and dtype == "float16":
    return f"{implementation} has no float16 on CPUs"
  if implementation == "splash" and card.platform != "tpu":
    return "splash is for TPUs"
  if implementation in ("flash", *KERNELS) and version is None:
    return f"{implementation} needs tokamax: pip install tokamax"
  return None


def automatic(L: int, S: int, causal: bool, card: Card) -> str:
  """Gives the implementation that "auto" takes for L queries and S keys on a device."""
  # A small score matrix is the fastest to compile and to run, but half of a causal one is for
  # nothing.
  if L <= FEW or (L * S <= 1024 * 1024 and not (causal and card.platform == "cpu")):
    return "einsum"
  if card.platform == "gpu" and library() is None:
    warnings.warn(
      "no tokamax, so attention runs without kernels, slowly; `pip install tokamax`", stacklevel=2
    )
    return "tiled"
  return {"tpu": "splash", "gpu": "flash"}.get(card.platform, "tiled")


def check_implementation(implementation: str, dtype: str) -> None:
  """Refuses float16 where this process's device has no products of it, and an implementation that
  can't run there in `dtype`.

  bfloat16 is let through on any device; `describe_kernels` says where it is emulated.

  Raises:
    ConfigError: it can't.
  """
  card = here()
  # products round to 8 bits, and splash attention does not compile
  if dtype == "float16" and card.platform == "tpu":
    raise ConfigError(
      f"float16 on {card.kind}: TPUs have no float16 products, and round its numbers to bfloat16's "
      f"digits; take bfloat16"
    )
  if dtype == "float16" and card.platform == "gpu" and not card.float16:
    raise ConfigError(
      f"float16 on {card.kind}: it has no float16 products with sums in float32; take float32"
    )
  if why := unusable(implementation, card, library(), dtype):
    raise ConfigError(f"attention {implementation!r} on {card.kind}: {why}; leave it to auto")


def kernels_taken(cfg: VLMConfig, gradient: bool = False) -> dict[str, str]:
  """Says what the attention of the "tower" and long attention of the "LLM" run as on this process's
  device.

  gradient: of the LLM's, in training.
  """
  card, version, v, llm = here(), library(), cfg.vision, cfg.llm
  clip = v.tokens(cfg.clip_frames)
  calls = {
    "tower": Call(
      cfg.clips_per_chunk,
      clip,
      clip,
      v.heads,
      v.heads,
      v.width // v.heads,
      cfg.dtype,
      False,
      None,
      False,
    ),
    "LLM": Call(
      1, LONG, LONG, llm.heads, llm.kv_heads, llm.head_dim, cfg.dtype, True, "keys", gradient
    ),
  }

  def name(call: Call) -> str:
    how = cfg.attention
    if how == "auto" or (how == "cudnn" and (call.causal or call.mask)):
      how = automatic(call.queries, call.keys, call.causal, card)
    if how == "flash" and version is not None:
      how = kernel_rule(card, version, call) or "the first kernel that compiles"
    return f"{how} of tokamax {version}" if how in KERNELS else how

  return {part: name(call) for part, call in calls.items()}


def describe_kernels(cfg: VLMConfig, gradient: bool = False) -> str:
  """Says `kernels_taken` in a line, and what it is computed in."""
  card, how = here(), kernels_taken(cfg, gradient)
  line = (
    how["tower"]
    if how["tower"] == how["LLM"]
    else f"{how['tower']} in the tower, {how['LLM']} in the LLM"
  )
  if cfg.attention == "auto":
    line += "; einsum where there are few queries"
  if cfg.dtype == "bfloat16" and card.platform == "gpu" and not card.bfloat16:
    line += f"; {card.kind} has no bfloat16: use {compute_dtype(card, gradient=gradient)}"
  return f"attention on {card.kind}, {cfg.dtype}: {line}"
