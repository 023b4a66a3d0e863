"""Layers that more than one part of the model has: the norm, and rotary positions with YaRN."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from xcomp_jax.config import LLMConfig, Yarn
from xcomp_jax.errors import XCompError


class ShapeError(XCompError, ValueError):
  """Arrays or sizes that don't fit together; `where` is the argument or key that is wrong."""


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


def rotate(
  x: Float[Array, "B L H h"], positions: Int[Array, "#B L"], llm: LLMConfig
) -> Float[Array, "B L H h"]:
  """Rotary embedding, half-split; x [B, L, H, h], positions int32[B or 1, L]; angles in float32."""
  half = x.shape[-1] // 2
  frequency = llm.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  scale = 1.0
  if llm.rope_scaling is not None:
    frequency, scale = (
      frequency * slower(llm.rope_scaling, half, llm.rope_theta),
      llm.rope_scaling.attention,
    )
  angle = positions[:, :, None, None] * frequency
  cos, sin = jnp.cos(angle) * scale, jnp.sin(angle) * scale
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def slower(yarn: Yarn, half: int, theta: float) -> np.ndarray:
  """What YaRN multiplies each of the `half` frequencies by, float32[h / 2] (Peng et al. 2023,
  section 3.2).

  A frequency that turns at least `beta_fast` times within the trained positions stays: it tells
  neighbours apart. One that turns at most `beta_slow` times is divided by the factor, so that it
  meets no angle it has not been trained on. Between those two, counted in whole frequencies, a
  ramp. Queries and keys are also multiplied by `attention` each.
  """

  def turning(times: float) -> float:  # the index of the frequency that turns so often
    return half * math.log(yarn.positions / (times * 2 * math.pi)) / math.log(theta)

  low = max(math.floor(turning(yarn.beta_fast)), 0)
  high = min(math.ceil(turning(yarn.beta_slow)), 2 * half - 1)
  ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
  return (1 - ramp + ramp / yarn.factor).astype(np.float32)
