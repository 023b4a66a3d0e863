"""Which kernel computes attention, on which device.

A kernel that a device can't run raises when the program around it is lowered or compiled, where nothing can catch the error and
go on. So every call is decided before it is traced, from what is known about the device and the installed library (tokamax).
What no rule knows is compiled once, on its own.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Kernel = Literal["mosaic", "triton", "xla_chunked"]
KERNELS: tuple[Kernel, ...] = ("mosaic", "triton", "xla_chunked")
TRIED = ("0.0.12", "0.0.17")  # versions of tokamax that the rules are made from; docs/LOG.md has what compiles where
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))  # likewise
SIZES = (64, 88, 128)  # of heads, likewise
SPLITS = 80  # tiles of 128 rows below which Mosaic may split the keys on 10.x: half as many as there are multiprocessors


@dataclasses.dataclass(frozen=True)
class Card:
  """A device, as far as kernels are chosen by it.

  platform: "cpu", "gpu" or "tpu". capability: compute capability of an NVIDIA GPU, (9, 0) of an H100; None of all others.
  shared_memory: bytes that a block of its threads can have.
  """

  platform: str
  kind: str
  capability: tuple[int, int] | None = None
  shared_memory: int = 0

  @property
  def bfloat16(self) -> bool:
    """Whether it multiplies in bfloat16; NVIDIA GPUs do from Ampere on."""
    return self.platform != "cpu" and (self.capability is None or self.capability >= (8, 0))


def here() -> Card:
  """The device that this process computes on."""
  return card_of(jax.extend.backend.get_default_device())


def card_of(device: Any) -> Card:
  """What a device of JAX says about itself."""
  platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
  major, dot, minor = str(getattr(device, "compute_capability", "")).partition(".")
  capability = (int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else None
  return Card(platform, device.device_kind, capability, getattr(device, "shared_memory_per_block_optin", 0) or 0)


def compute_dtype(card: Card) -> Literal["bfloat16", "float32"]:
  """What to compute in where nobody says: bfloat16 if the device has it."""
  return "bfloat16" if card.bfloat16 else "float32"


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of a kernel on one device, before padding.

  batch, queries, keys, heads, kv_heads, size: of q [B, L, H, h] and k [B, S, K, h]. dtype: of both. mask: whether keys are masked
  for all rows alike ("keys"), for each row ("rows"), or not (None). gradient: whether there will be one.
  """

  batch: int
  queries: int
  keys: int
  heads: int
  kv_heads: int
  size: int
  dtype: str
  causal: bool
  mask: Literal["keys", "rows"] | None
  gradient: bool


@functools.cache
def library() -> str | None:
  """The installed version of tokamax; None: there is none."""
  try:
    return importlib.metadata.version("tokamax")
  except importlib.metadata.PackageNotFoundError:
    return None


def block(card: Card, version: str, kernel: Kernel) -> int:
  """What rows and keys are padded to whole multiples of: no kernel sees a sequence end inside of one of its blocks."""
  if kernel == "xla_chunked":
    return 1  # plain XLA, which masks what it pads
  # The older Mosaic forward pass for 10.x works on 256 rows at once, later ones on 128 as all others.
  return 256 if kernel == "mosaic" and version == "0.0.12" and card.capability and card.capability[0] == 10 else 128


def rule(card: Card, version: str, call: Call) -> Kernel | None:
  """The kernel of a call, if it is known which compile and are right; None: it is not.

  version: of tokamax.
  """
  if card.platform != "gpu" or card.capability is None or card.capability < (8, 0):
    return "xla_chunked"  # the others are for NVIDIA GPUs from Ampere on
  major = card.capability[0]
  if version not in TRIED or call.size not in SIZES or card.capability not in CAPABILITIES:
    return None
  if call.dtype == "float32":  # Mosaic has none, and Triton's blocks take twice as much shared memory
    fits = card.shared_memory >= 160 * 1024 or call.size <= 64 or (call.size == 128 and not call.gradient)
    return "triton" if fits else "xla_chunked"
  if major == 8:
    return "triton"  # Mosaic has only a forward pass there, and that since 0.0.17
  if major == 9:
    return "mosaic"
  if version == "0.0.12" and call.gradient:
    return "triton"  # Mosaic's gradient wants more shared memory than there is, or a minute of the compiler for every shape
  if not call.causal and call.batch * call.heads * -(-call.queries // 128) < SPLITS:
    return "triton"  # Mosaic splits the keys into parts, whose lengths it may get wrong
  return "mosaic"


def choose(card: Card, version: str, call: Call, compiles: Callable[[Kernel, Call], bool]) -> Kernel:
  """The kernel of a call: by rule, else the first one that compiles.

  compiles: says whether a kernel compiles for a call, with its gradient if one is wanted (see `compiles`).
  """
  if known := rule(card, version, call):
    return known
  wanted = ("mosaic", "triton") if card.capability and card.capability >= (9, 0) and call.dtype != "float32" else ("triton",)
  return next((kernel for kernel in wanted if compiles(kernel, call)), "xla_chunked")


def compiles(kernel: Kernel, call: Call) -> bool:
  """Whether the device compiles a kernel for exactly this call; it is tried once in a process."""
  device, precision = jax.extend.backend.get_default_device(), jax.config.jax_default_matmul_precision  # ty: ignore[missing-attribute]
  return _compiles(kernel, call, device, precision)


@functools.cache
def _compiles(kernel: Kernel, call: Call, device: Any, precision: str | None) -> bool:
  c = call
  mesh = Mesh(np.array([device]), "x")
  place = NamedSharding(mesh, PartitionSpec())
  array = lambda *shape: jax.ShapeDtypeStruct(shape, c.dtype, sharding=place)
  q, k = array(c.batch, c.queries, c.heads, c.size), array(c.batch, c.keys, c.kv_heads, c.size)
  shape = None if c.mask is None else (c.batch, 1 if c.mask == "keys" else c.queries, c.keys)
  mask = shape and jax.ShapeDtypeStruct(shape, np.bool_, sharding=place)
  whole = block(card_of(device), library() or "", kernel)
  forward = lambda q, k, v, mask: run(kernel, whole, q, k, v, mask, c.causal)
  total = lambda *args: forward(*args).astype(jnp.float32).sum()

  def attempt():
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
      jax.jit(jax.grad(total, (0, 1, 2)) if c.gradient else forward).lower(q, k, k, mask).compile()

  try:  # in a thread of its own, which knows nothing of what is being traced here
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      pool.submit(attempt).result()
  except Exception as error:
    print(f"attention: {kernel} does not compile for {call}: {str(error).strip().splitlines()[0][:200]}", file=sys.stderr)
    return False
  return True


def run(
  kernel: Kernel, whole: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, causal: bool
) -> jax.Array:
  """Has tokamax compute attention over whole blocks.

  What is padded is masked, whether the kernel would have known or not: zeros that are attended are a wrong number that nobody
  sees.

  Args:
    kernel: which one.
    whole: size of its blocks.
    q: [B, L, H, h].
    k: [B, S, K, h]; S = L where it is causal.
    v: [B, S, K, h].
    mask: bool[B or 1, L or 1, S], what is seen; every row sees something. None: all.
    causal: a row sees keys up to its own.

  Returns:
    [B, L, H, h] in q's dtype.
  """
  import tokamax
  from absl import flags

  if not flags.FLAGS.is_parsed():  # tokamax reads them, and would parse a command line that is not absl's
    flags.FLAGS.mark_as_parsed()
  _quiet()
  L, S = q.shape[1], k.shape[1]
  rows, keys = -L % whole, -S % whole
  if keys and mask is None:
    mask = jnp.ones((1, 1, S), bool)
  if mask is not None:
    mask = _padded(_padded(mask, 2, keys), 1, rows if mask.shape[1] > 1 else 0, True)  # rows that see nothing have NaN as gradient
    mask = mask[:, None]
  q, k, v = _padded(q, 1, rows), _padded(k, 1, keys), _padded(v, 1, keys)
  out = tokamax.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=kernel)
  return out[:, :L].astype(q.dtype)


def _padded(x: jax.Array, axis: int, count: int, value: bool | float = 0) -> jax.Array:
  """With so much more at the end of an axis."""
  return jax.lax.pad(x, np.array(value, x.dtype), [(0, count * (i == axis), 0) for i in range(x.ndim)]) if count else x


@functools.cache
def _quiet() -> None:
  """Leaves out what tokamax says at every traced call: that it has no measured settings for this shape, so takes a rule's."""
  logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith("Autotuning cache miss"))


def unusable(implementation: str, card: Card, version: str | None) -> str | None:
  """Why a device can't have an implementation, or None."""
  nvidia = card.capability is not None and card.capability >= (9 if implementation == "mosaic" else 8, 0)
  if implementation in ("mosaic", "triton") and not nvidia:
    return f"{implementation} kernels are for NVIDIA GPUs of compute capability {9 if implementation == 'mosaic' else 8}.0 and more"
  if implementation == "splash" and card.platform != "tpu":
    return "splash is for TPUs"
  if implementation in ("flash", *KERNELS) and version is None:
    return f"{implementation} needs tokamax: pip install tokamax"
  return None
