"""The UMT-L clip encoder (FACTS.md 7): frames of a clip in, one feature per patch out."""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from xcomp_jax.config import VisionConfig, VLMConfig
from xcomp_jax.model.attention import AttentionMask, attend, remat
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.parallel.mesh import constrain, gathered

PIXEL_MEAN = (0.485, 0.456, 0.406)  # FACTS.md 6
PIXEL_STD = (0.229, 0.224, 0.225)
TABLE_FRAMES, TABLE_GRID = 4, 14  # the fixed position table is made for 4 frames of 14x14 patches


@functools.lru_cache(maxsize=8)
def position_table(cfg: VisionConfig, frames: int) -> np.ndarray:
  """The fixed position table float32[F*P, D] of a clip of `frames` frames, order (frame, row,
  column).

  Sine and cosine of the flattened index, made at the pre-training geometry, then stretched: bicubic
  over rows and columns, linear over frames. A single frame has the table of a first frame (FACTS.md
  7).
  """
  size = cfg.image_size // cfg.patch_size
  grid = TABLE_GRID if cfg.table == "umt-hd" else size
  time = TABLE_FRAMES if frames > 1 else 1  # an image is not stretched over time
  channel = np.arange(cfg.width)
  angle = np.arange(time * grid * grid)[:, None] / 10000.0 ** (2 * (channel // 2) / cfg.width)
  table = np.where(channel % 2, np.cos(angle), np.sin(angle)).reshape(time, grid, grid, cfg.width)
  space, over_time = _resize(grid, size, _cubic, 2), _resize(time, frames, lambda x: 1 - x, 1)
  table = np.einsum("tT,yY,xX,TYXd->tyxd", over_time, space, space, table, optimize=True)
  return table.reshape(-1, cfg.width).astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
  """The weight at distance x of PyTorch's bicubic interpolation: jax.image.resize has A = -0.5 and
  renormalises at borders.
  """
  a = -0.75
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, far)


def _resize(n: int, m: int, weight: Callable[[np.ndarray], np.ndarray], reach: int) -> np.ndarray:
  """Matrix [m, n] of PyTorch's interpolation with align_corners=False, which clamps at borders.

  weight: by distance. reach: how many points at each side have one.
  """
  source = (np.arange(m) + 0.5) * n / m - 0.5
  first = np.floor(source).astype(int)
  matrix = np.zeros((m, n))
  for point in (first + tap for tap in range(1 - reach, 1 + reach)):
    place = np.arange(m), np.clip(point, 0, n - 1)
    np.add.at(matrix, place, weight(np.abs(source - point)))
  return matrix


def normalise(frames: UInt8[Array, "*B 3"]) -> Float[Array, "*B 3"]:
  """Pixels as the tower was trained on (FACTS.md 6), float32."""
  return (frames.astype(jnp.float32) / 255 - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)


class TowerAttention(nnx.Module):
  """Self-attention over all tokens of a clip.

  Raises:
    ShapeError: the width can't be cut into heads.
  """

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    width, heads, dtype = cfg.vision.width, cfg.vision.heads, jnp.dtype(cfg.dtype)
    if width % heads:
      raise ShapeError(
        f"tower width {width} is not a multiple of its {heads} heads",
        where="width",
        value=width,
        divisor=heads,
      )
    linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.qkv = linear(width, 3 * width, use_bias=False)
    self.proj = linear(width, width)
    self.heads = heads
    self.implementation = cfg.attention

  def project(self, x: Float[Array, "C N D"]) -> Sequence[Float[Array, "C N D"]]:
    """Queries, keys and values before they are cut into heads."""
    return jnp.split(self.qkv(x), 3, axis=-1)

  def __call__(self, x: Float[Array, "C N D"]) -> Float[Array, "C N D"]:
    heads = (y.reshape(*y.shape[:-1], self.heads, -1) for y in self.project(x))  # [C, N, H, h]
    out = attend(*heads, AttentionMask(causal=False), implementation=self.implementation)
    return self.proj(out.reshape(x.shape))


class TowerBlock(nnx.Module):
  """A pre-norm transformer block."""

  ls1 = ls2 = None  # scales of what is added, per channel

  def __init__(
    self,
    cfg: VLMConfig,
    attention: type[TowerAttention],
    norm: Callable[[], Callable[[jax.Array], jax.Array]],
    *,
    rngs: nnx.Rngs,
    param_dtype=jnp.float32,
  ):
    v, dtype = cfg.vision, jnp.dtype(cfg.dtype)
    linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    self.norm1 = norm()
    self.attn = attention(cfg, rngs=rngs, param_dtype=param_dtype)
    self.norm2 = norm()
    self.fc1 = linear(v.width, v.mlp_width)
    self.fc2 = linear(v.mlp_width, v.width)

  def __call__(self, x: Float[Array, "C N D"]) -> Float[Array, "C N D"]:
    def scaled(y, scale):
      if scale is None:
        return y
      return (y.astype(jnp.float32) * scale[...].astype(jnp.float32)).astype(y.dtype)

    block = gathered(self, x.dtype)
    x = x + scaled(block.attn(block.norm1(x)), block.ls1)
    y = block.fc2(jax.nn.gelu(block.fc1(block.norm2(x)), approximate=False))
    return x + scaled(y, block.ls2)


class PatchAttention(TowerAttention):
  """Queries and values have a bias, keys have none."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    super().__init__(cfg, rngs=rngs, param_dtype=param_dtype)
    self.q_bias = nnx.Param(jnp.zeros(cfg.vision.width, param_dtype))
    self.v_bias = nnx.Param(jnp.zeros(cfg.vision.width, param_dtype))

  def project(self, x):
    q, k, v = super().project(x)
    return q + self.q_bias[...].astype(q.dtype), k, v + self.v_bias[...].astype(v.dtype)


class PatchEmbed(nnx.Module):
  """Pixels of a patch to a feature: the official convolution written as a matmul.

  Raises:
    ShapeError: frames can't be cut into patches.
  """

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    p, width, size = cfg.vision.patch_size, cfg.vision.width, cfg.vision.image_size
    if size % p:
      raise ShapeError(
        f"image size {size} is not a multiple of the patch size {p}",
        where="image_size",
        value=size,
        divisor=p,
      )
    self.kernel = nnx.Param(
      nnx.initializers.lecun_normal()(rngs.params(), (p * p * 3, width), param_dtype)
    )
    self.bias = nnx.Param(jnp.zeros(width, param_dtype))
    self.patch_size = p
    self.dtype = jnp.dtype(cfg.dtype)

  def __call__(self, frames: UInt8[Array, "C F S S 3"]) -> Float[Array, "C N D"]:
    c, f, s, _, _ = frames.shape
    p, g = self.patch_size, s // self.patch_size
    x = (
      normalise(frames)
      .astype(self.dtype)
      .reshape(c, f, g, p, g, p, 3)
      .transpose(0, 1, 2, 4, 3, 5, 6)
      .reshape(c, f * g * g, -1)
    )
    kernel = constrain(self.kernel[...].astype(self.dtype), None, "mlp")  # as `gathered` has it
    return x @ kernel + self.bias[...].astype(self.dtype)


class Vision(nnx.Module):
  """The tower. `patch_embed`, `blocks` and `norm` may be called one by one, as parity checks do."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    self.patch_embed = PatchEmbed(cfg, rngs=rngs, param_dtype=param_dtype)
    norm = functools.partial(layer_norm, cfg, 1e-6, rngs, param_dtype)
    self.blocks = nnx.List(
      [
        TowerBlock(cfg, PatchAttention, norm, rngs=rngs, param_dtype=param_dtype)
        for _ in range(cfg.vision.layers)
      ]
    )
    self.norm = layer_norm(cfg, 1e-12, rngs, param_dtype)
    self.cfg = cfg

  def embed(self, frames: UInt8[Array, "C F S S 3"]) -> Float[Array, "C N D"]:
    """Patch features with their positions, in the compute dtype."""
    x = self.patch_embed(frames)
    return x + position_table(self.cfg.vision, frames.shape[1]).astype(x.dtype)

  def __call__(self, frames: UInt8[Array, "C F S S 3"]) -> Float[Array, "C N D"]:
    """Clips of frames to features in the compute dtype, tokens in order (frame, row, column).

    Frames of a clip see each other, clips don't. F = 1 is the single-image path.
    """
    return self.norm(run_blocks(self.blocks, self.embed(frames), self.cfg.remat))


def run_blocks(blocks: Iterable[TowerBlock], x: jax.Array, recompute: bool) -> jax.Array:
  """Runs all blocks; `recompute`: again for the gradient."""
  for block in blocks:
    x = remat(block.__call__)(x) if recompute else block(x)
  return x


def layer_norm(cfg: VLMConfig, epsilon: float, rngs: nnx.Rngs, param_dtype) -> nnx.LayerNorm:
  """The norm; not by the fast variance E[x^2] - E[x]^2, which loses digits."""
  return nnx.LayerNorm(
    cfg.vision.width,
    epsilon=epsilon,
    use_fast_variance=False,
    dtype=jnp.dtype(cfg.dtype),
    param_dtype=param_dtype,
    rngs=rngs,
  )
