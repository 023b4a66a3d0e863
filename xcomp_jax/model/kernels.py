"""Which implementation computes attention, on which device.

A kernel that a device can't run raises when the program around it is lowered or compiled, where
nothing can catch the error and go on. So every call is decided before it is traced, from what is
known about the device and the installed library (tokamax). What no rule knows is compiled once, on
its own.
"""

import dataclasses
import functools
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np

from xcomp_jax.config import ConfigError, Dtype, VLMConfig

Kernel = Literal["mosaic", "triton", "cudnn", "xla_chunked"]
KERNELS: tuple[Kernel, ...] = ("mosaic", "triton", "xla_chunked")  # of tokamax
# versions of tokamax that the rules are made from; docs/LOG.md has what compiles where
TRIED = ("0.0.12", "0.0.17")
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))  # likewise
SIZES = (64, 88, 128)  # of heads, likewise
# compute capability: first and last major version
MAJORS = {"mosaic": (9, 10), "triton": (8, None), "cudnn": (8, None)}
# Triton in float32, where a block of threads has 100 KB of shared memory: (size of heads, with a
# gradient) that compile.
SMALL_FLOAT32 = {(64, False), (64, True), (128, False)}
FEW = 384  # queries, of which einsum computes attention: a tile of `attention`
LONG = 16384  # slots of the LLM for 1,024 frames without text
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
  def major(self) -> int:
    """First number of the compute capability; 0 of all that have none."""
    return self.capability[0] if self.capability else 0

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
  if card.bfloat16:
    return "bfloat16"
  return "float16" if card.float16 and not gradient else "float32"


def check_finite(x: jax.Array | np.ndarray, what: str, dtype: str) -> None:
  """Refuses numbers that have left float16's range, which would give an answer all the same; wider
  types are not looked at.

  Raises:
    ConfigError: some have; what to do.
  """
  if dtype == "float16" and not bool(jnp.isfinite(x).all()):
    raise ConfigError(
      f"{what} left the range of float16, whose largest number is 65,504: take --dtype float32, or "
      f"bfloat16 if the device has it",
      where=what,
      value=dtype,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
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
  return 256 if kernel == "mosaic" and version == "0.0.12" and card.major == 10 else 128


def kernel_rule(card: Card, version: str, call: Call) -> Kernel | None:
  """Gives the kernel of a call where it is known which ones compile; None where it is not.

  version: of tokamax.
  """
  if card.platform != "gpu" or card.capability is None or card.capability < (8, 0):
    return "xla_chunked"  # the others are for NVIDIA GPUs from Ampere on
  if version not in TRIED or call.size not in SIZES or card.capability not in CAPABILITIES:
    return None
  # Mosaic has none, and Triton's blocks take twice as much shared memory
  if call.dtype == "float32":
    return (
      "triton"
      if card.shared_memory >= 160 * 1024 or (call.size, call.gradient) in SMALL_FLOAT32
      else "xla_chunked"
    )
  if card.major == 8:
    return "triton"  # Mosaic has only a forward pass there, and that since 0.0.17
  if card.major == 9:
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
  return (
    card.major == 10
    and not call.causal
    and call.mask != "ranges"
    and call.batch * call.heads * -(-call.queries // 128) < SPLITS
  )


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


def unusable(implementation: str, card: Card, version: str | None, dtype: str) -> str | None:
  """Says why a device can't have an implementation in a dtype; None: it can."""
  first, last = MAJORS.get(implementation, (0, None))
  reasons = (
    (
      card.major < first or (last is not None and card.major > last),
      f"{implementation} kernels are for NVIDIA GPUs of compute capability {first}.0 "
      f"{f'to {last}.x' if last else 'and more'}",
    ),
    (
      implementation in ("mosaic", "cudnn") and dtype == "float32",
      f"{implementation} kernels have no float32",
    ),
    (
      implementation in ("flash", "xla_chunked") and card.platform == "cpu" and dtype == "float16",
      f"{implementation} has no float16 on CPUs",
    ),
    (implementation == "splash" and card.platform != "tpu", "splash is for TPUs"),
    (
      implementation in ("flash", *KERNELS) and version is None,
      f"{implementation} needs tokamax: pip install tokamax",
    ),
  )
  return next((why for bad, why in reasons if bad), None)


def implementation_of(
  asked: str,
  L: int,
  S: int,
  *,
  causal: bool,
  masked: bool,
  card: Card,
  version: str | None,
) -> str:
  """Gives the implementation of L queries and S keys where one is `asked` for.

  Any stands for itself but "auto", and "cudnn" where keys are masked: those are what is best on a
  device.

  version: of tokamax; None: there is none.
  """
  how = asked
  if asked == "auto" or (asked == "cudnn" and (causal or masked)):
    how = _best(L, S, causal, card, version)
  if L != S and (causal or how == "splash") and how not in ("einsum", "tiled"):
    return "einsum"  # a few rows; the kernels disagree on which slots these are
  return how


def _best(L: int, S: int, causal: bool, card: Card, version: str | None) -> str:
  """What "auto" is on a device."""
  # A small score matrix is the fastest to compile and to run, but half of a causal one is for
  # nothing.
  if L <= FEW or (L * S <= 1024 * 1024 and not (causal and card.platform == "cpu")):
    return "einsum"
  if card.platform == "gpu" and version is None:
    warnings.warn(
      "no tokamax, so attention runs without kernels, slowly; `pip install tokamax`", stacklevel=3
    )
    return "tiled"
  return {"tpu": "splash", "gpu": "flash"}.get(card.platform, "tiled")


def check_implementation(
  implementation: str, dtype: str, installed: Callable[[], str | None] = library
) -> None:
  """Refuses float16 where this process's device has no products of it, and an implementation that
  can't run there in `dtype`.

  bfloat16 is let through on any device; `describe_kernels` says where it is emulated.

  installed: gives the version of tokamax.

  Raises:
    ConfigError: it can't.
  """
  card = here()
  lacking = {  # what to say, and to take
    # products round to 8 bits, and splash attention does not compile
    "tpu": (
      "TPUs have no float16 products, and round its numbers to bfloat16's digits",
      "bfloat16",
    ),
    "gpu": ("it has no float16 products with sums in float32", "float32"),
  }
  if dtype == "float16" and card.platform in lacking and not card.float16:
    why, instead = lacking[card.platform]
    raise ConfigError(
      f"float16 on {card.kind}: {why}; take {instead}",
      where="model.dtype",
      value=dtype,
      device=card.kind,
      allowed=instead,
    )
  if why := unusable(implementation, card, installed(), dtype):
    raise ConfigError(
      f"attention {implementation!r} on {card.kind}: {why}; leave it to auto",
      where="model.attention",
      value=implementation,
      device=card.kind,
    )


def kernels_taken(
  cfg: VLMConfig, gradient: bool = False, installed: Callable[[], str | None] = library
) -> dict[str, str]:
  """Says what the attention of the "tower" and long attention of the "LLM" run as on this process's
  device.

  gradient: of the LLM's, in training. installed: gives the version of tokamax.
  """
  card, version, v, llm = here(), installed(), cfg.vision, cfg.llm
  clip = v.tokens(cfg.clip_frames)
  calls = {
    "tower": Call(
      batch=cfg.clips_per_chunk,
      queries=clip,
      keys=clip,
      heads=v.heads,
      kv_heads=v.heads,
      size=v.width // v.heads,
      dtype=cfg.dtype,
      causal=False,
      mask=None,
      gradient=False,
    ),
    "LLM": Call(
      batch=1,
      queries=LONG,
      keys=LONG,
      heads=llm.heads,
      kv_heads=llm.kv_heads,
      size=llm.head_dim,
      dtype=cfg.dtype,
      causal=True,
      mask="keys",
      gradient=gradient,
    ),
  }

  def name(call: Call) -> str:
    how = implementation_of(
      cfg.attention,
      call.queries,
      call.keys,
      causal=call.causal,
      masked=call.mask is not None,
      card=card,
      version=version,
    )
    if how == "flash" and version is not None:
      how = kernel_rule(card, version, call) or "the first kernel that compiles"
    return f"{how} of tokamax {version}" if how in KERNELS else how

  return {part: name(call) for part, call in calls.items()}


def describe_kernels(
  cfg: VLMConfig, gradient: bool = False, installed: Callable[[], str | None] = library
) -> str:
  """Says `kernels_taken` in a line, and what it is computed in."""
  card, how = here(), kernels_taken(cfg, gradient, installed)
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
