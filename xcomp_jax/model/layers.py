"""The norm of the LLM and of the InternVideo2 tower."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
  """Root-mean-square norm in float32, cast back before the weight is applied (FACTS.md 2, 7)."""

  def __init__(self, width: int, eps: float, dtype, param_dtype):
    self.scale = nnx.Param(jnp.ones(width, param_dtype))
    self.eps, self.dtype = eps, dtype

  def __call__(self, x):
    """[..., D] -> [..., D]."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
    return y.astype(self.dtype) * self.scale[...].astype(self.dtype)
