"""The InternVideo2 clip encoder (FACTS.md 7): learned positions, a class token, and norms that are
RMS.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from xcomp_jax.config import InternVideo2Config, VLMConfig
from xcomp_jax.model.layers import RMSNorm, ShapeError
from xcomp_jax.model.umt import PatchEmbed, TowerAttention, TowerBlock, run_blocks

LAYER_SCALE = 1e-5  # that a tower begins with


def position_start(width: int, frames: int, grid: int) -> np.ndarray:
  """What learned positions begin with: float32[1, 1 + F*P, D], order (class token, frame, row,
  column).

  A quarter of the channels tells the frame, the rest column and row; each sines, then cosines. The
  class token has zeros.
  """

  def wave(index, channels):
    angle = index.reshape(-1, 1) / 10000.0 ** (np.arange(channels // 2) / (channels // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

  time, row, column = np.indices((frames, grid, grid))
  space = width // 4 * 3 // 2
  table = np.concatenate([wave(time, width // 4), wave(column, space), wave(row, space)], axis=1)
  return np.concatenate([np.zeros((1, width)), table])[None].astype(np.float32)


class ClipAttention(TowerAttention):
  """Queries and keys are normalised before they are cut into heads."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    super().__init__(cfg, rngs=rngs, param_dtype=param_dtype)
    self.q_norm, self.k_norm = (_norm(cfg, param_dtype) for _ in range(2))

  def project(self, x):
    q, k, v = super().project(x)
    return self.q_norm(q), self.k_norm(k), v


class ClipBlock(TowerBlock):
  """A block whose additions are scaled per channel."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    norm = functools.partial(_norm, cfg, param_dtype)
    super().__init__(cfg, ClipAttention, norm, rngs=rngs, param_dtype=param_dtype)
    start = jnp.full(cfg.vision.width, LAYER_SCALE, param_dtype)
    self.ls1, self.ls2 = nnx.Param(start), nnx.Param(start)


def _norm(cfg: VLMConfig, param_dtype) -> RMSNorm:
  return RMSNorm(cfg.vision.width, 1e-6, jnp.dtype(cfg.dtype), param_dtype)


class InternVideo2(nnx.Module):
  """The tower, for clips of `cfg.vision.frames` frames and for single images."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    v = cfg.vision
    assert isinstance(v, InternVideo2Config)  # by which `vlm` chooses this tower
    self.patch_embed = PatchEmbed(cfg, rngs=rngs, param_dtype=param_dtype)
    start = functools.partial(position_start, v.width, grid=v.image_size // v.patch_size)
    self.cls_token = nnx.Param(jnp.zeros((1, 1, v.width), param_dtype))
    self.pos_embed = nnx.Param(jnp.asarray(start(v.frames), param_dtype))
    self.img_pos_embed = nnx.Param(jnp.asarray(start(1), param_dtype))
    self.blocks = nnx.List(
      [ClipBlock(cfg, rngs=rngs, param_dtype=param_dtype) for _ in range(v.layers)]
    )
    self.cfg, self.frames = cfg, v.frames

  def embed(self, frames: UInt8[Array, "C F S S 3"]) -> Float[Array, "C M D"]:
    """The class token and patch features, with their positions, in the compute dtype; M = 1 + F*P.

    Raises:
      ShapeError: clips of another length than the positions are for.
    """
    length = frames.shape[1]
    if length not in (1, self.frames):
      raise ShapeError(
        f"the InternVideo2 tower takes clips of {self.frames} frames, or single images, not clips "
        f"of {length}",
        where="frames",
        value=length,
        allowed=(1, self.frames),
      )
    x = self.patch_embed(frames)
    first = jnp.broadcast_to(self.cls_token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
    positions = self.img_pos_embed if length == 1 else self.pos_embed
    return jnp.concatenate([first, x], axis=1) + positions[...].astype(x.dtype)

  def with_class_token(self, frames: UInt8[Array, "C F S S 3"]) -> Float[Array, "C M D"]:
    """What the last block gives, M = 1 + F*P; there is no norm behind it."""
    return run_blocks(self.blocks, self.embed(frames), self.cfg.remat)

  def __call__(self, frames: UInt8[Array, "C F S S 3"]) -> Float[Array, "C N D"]:
    """Clips of frames to features of their patches in the compute dtype, tokens in order (frame,
    row, column).

    Frames of a clip see each other, clips don't. F = 1 is the single-image path.
    """
    return self.with_class_token(frames)[:, 1:]
