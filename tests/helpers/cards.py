"""Devices that are not here, and kernels replaced by what shows what they are handed."""

import dataclasses

import jax
import jax.numpy as jnp

from xcomp_jax.model import kernels
from xcomp_jax.model.kernel_calls import Library
from xcomp_jax.parallel import chips


@dataclasses.dataclass(frozen=True)
class Device:
  """What kernels are chosen by, of a device of JAX."""

  platform: str
  device_kind: str
  compute_capability: str | None = None
  shared_memory_per_block_optin: int | None = None


V5E = Device("tpu", "TPU v5 lite")

# calls of a prefill of 1,024 frames, and of the tower for four clips
LLM = kernels.Call(
  batch=1,
  queries=16462,
  keys=16462,
  heads=12,
  kv_heads=2,
  size=128,
  dtype="bfloat16",
  causal=True,
  mask="keys",
  gradient=False,
)
CLIP = kernels.Call(
  batch=4,
  queries=6272,
  keys=6272,
  heads=16,
  kv_heads=16,
  size=64,
  dtype="bfloat16",
  causal=False,
  mask=None,
  gradient=False,
)


def gpu(kind: str, **changes) -> Device:
  """A GPU of chips.CHIPS."""
  chip = chips.named(kind)
  card = dataclasses.replace(chip, **changes)
  return Device("gpu", chip.gpu.model, ".".join(map(str, card.capability)), chip.gpu.shared_block)


def fake_kernel(handed: list, computes: bool = True):
  """A tokamax.dot_product_attention that notes what it is handed, and computes exactly that: zeros
  that are seen count, and a row that sees nothing is NaN, as in kernels that mask with minus
  infinity.
  """

  def dot_product_attention(q, k, v, *, mask, is_causal, implementation):
    handed.append(
      (implementation, q.shape, k.shape, None if mask is None else mask.shape, is_causal)
    )
    if not computes:
      return jnp.zeros_like(q)
    (B, L, H, h), (S, K) = q.shape, k.shape[1:3]
    seen = jnp.ones((1, 1, 1, S), bool) if mask is None else mask
    if is_causal:
      seen = seen & (jnp.arange(S) <= jnp.arange(L)[:, None])
    scores = (
      jnp.einsum(
        "blkgh,bskh->bkgls",
        q.reshape(B, L, K, H // K, h),
        k,
        preferred_element_type=jnp.float32,
      )
      * h**-0.5
    )
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgls,bskh->blkgh", weights.astype(v.dtype), v).reshape(q.shape)

  return dot_product_attention


@dataclasses.dataclass(frozen=True, eq=False)
class FakeKernels(Library):
  """Kernels that note what they are handed, and compute exactly that, as `fake_kernel` does.

  installed: their version. handed: what they were, but for those of ranges. computes: or give 0.
  """

  installed: str | None = "0.0.12"
  handed: list = dataclasses.field(default_factory=list)
  computes: bool = True

  @property
  def version(self):
    return self.installed

  def cudnn(self, q, k, v):
    self.handed.append(("cudnn", q.shape, k.shape, None, False))
    return q

  def masked(self, kernel, q, k, v, mask, causal):
    run = fake_kernel(self.handed, self.computes)
    return run(q, k, v, mask=mask, is_causal=causal, implementation=kernel)

  def ranged(self, kernel, q, k, v, seen, causal):
    assert kernel == "mosaic" and q.shape[1] % 128 == k.shape[1] % 128 == 0
    slots, (start, end) = jnp.arange(k.shape[1]), seen
    shown = (slots >= start[..., None]) & (
      slots <= jnp.arange(q.shape[1])[:, None] if causal else slots < end[..., None]
    )
    run = fake_kernel([])
    return run(q, k, v, mask=shown[:, None], is_causal=False, implementation=kernel)
