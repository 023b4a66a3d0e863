import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xcomp_jax.config import VisionConfig
from xcomp_jax.model import vlm
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.model.umt import PIXEL_MEAN, PIXEL_STD, Vision, position_table

OFFICIAL = VisionConfig(
  image_size=448, patch_size=16, width=1024, layers=23, heads=16, mlp_width=4096, table="umt-hd"
)


def clips(n, frames, size=48):
  return jnp.asarray(
    np.random.default_rng(0).integers(0, 256, (n, frames, size, size, 3)).astype(np.uint8)
  )


@pytest.fixture(scope="module")
def model(tiny):
  return Vision(tiny(), rngs=nnx.Rngs(0))


@pytest.mark.pure
@pytest.mark.parametrize(
  "name, image_size, frames",
  [
    ("hd_8f", 448, 8),
    ("hd_4f", 448, 4),
    ("hd_img", 448, 1),
    ("s224_8f", 224, 8),
    ("s224_4f", 224, 4),
    ("s224_img", 224, 1),
  ],
)
def test_position_table_is_the_official_one(reference, name, image_size, frames):
  official = np.load(reference / "pos_embed.npz")
  for prefix, width in (("", 32), ("wide_", 1024)):
    if prefix + name not in official:
      continue
    cfg = dataclasses.replace(
      OFFICIAL, width=width, image_size=image_size, table="umt-hd" if image_size == 448 else "umt"
    )
    table = position_table(cfg, frames)
    assert table.shape == (frames * cfg.patches, width)
    np.testing.assert_allclose(
      table[official[f"{prefix}{name}_rows"]], official[prefix + name], rtol=0, atol=1e-5
    )


@pytest.mark.pure
def test_position_table_at_224_needs_no_bicubic():
  small = dataclasses.replace(OFFICIAL, image_size=224, width=32)
  np.testing.assert_array_equal(
    position_table(small, 8), position_table(dataclasses.replace(small, table="umt"), 8)
  )


def test_patch_embedding_is_the_official_convolution(model):
  frames = clips(2, 3)
  # frame, row, column, colour
  kernel = np.asarray(model.patch_embed.kernel[...]).reshape(1, 8, 8, 3, 32)
  pixels = (np.asarray(frames) / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
  conv = jax.lax.conv_general_dilated(
    jnp.asarray(pixels, jnp.float32),
    jnp.asarray(kernel),
    (1, 8, 8),
    "VALID",
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
  )
  np.testing.assert_allclose(model.patch_embed(frames), conv.reshape(2, -1, 32), rtol=0, atol=1e-5)


def test_frames_of_a_clip_see_each_other_and_clips_do_not(model):
  frames = clips(2, 4)
  out = model(frames)
  assert out.shape == (2, 4 * 36, 32)
  changed = model(frames.at[1, 3].set(0))
  np.testing.assert_array_equal(out[0], changed[0])
  assert np.abs(out[1, :36] - changed[1, :36]).max() > 1e-3
  np.testing.assert_allclose(model(frames[1:]), out[1:], rtol=0, atol=1e-5)


def test_single_image_has_the_table_of_a_first_frame(model, tiny):
  frame = clips(1, 1)
  assert model(frame).shape == (1, 36, 32)
  np.testing.assert_array_equal(
    position_table(tiny().vision, 1), position_table(tiny().vision, 4)[:36]
  )


def test_keys_have_no_bias(model):
  assert {"q_bias", "v_bias"} <= set(vars(model.blocks[0].attn))
  assert model.blocks[0].attn.qkv.bias is None


def test_remat_changes_no_gradient(tiny):
  grads = []
  for remat in (False, True):
    model = Vision(tiny(remat=remat), rngs=nnx.Rngs(0))
    grads.append(nnx.grad(lambda m: jnp.square(m(clips(1, 2))).mean())(model))
  first, second = map(jax.tree.leaves, grads)
  assert len(first) == len(second) == 2 + 2 * 13 + 2
  for a, b in zip(first, second, strict=True):
    assert np.abs(a).max() > 0
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_bfloat16_follows_float32(model, tiny):
  exact = model(clips(1, 4))
  half = Vision(tiny(dtype="bfloat16"), rngs=nnx.Rngs(0))(clips(1, 4))  # masters stay float32
  assert half.dtype == jnp.bfloat16
  assert np.abs(exact - half.astype(jnp.float32)).mean() < 0.02


def test_memory_of_encoding_does_not_grow_with_the_frames(tiny):
  model = nnx.eval_shape(lambda: vlm.VLM(tiny(), rngs=nnx.Rngs(0)))  # two clips a chunk

  def frames(n):
    return jax.ShapeDtypeStruct((n, 8, 48, 48, 3), np.uint8)

  compiled = [
    jax.jit(vlm.encode_frames).lower(model, frames(n)).compile().memory_analysis() for n in (4, 16)
  ]
  assert compiled[1].output_size_in_bytes == 4 * compiled[0].output_size_in_bytes
  assert compiled[0].temp_size_in_bytes == compiled[1].temp_size_in_bytes > 0


def test_sizes_that_do_not_divide_are_named(tiny):
  for key, value, divisor, changes in (
    ("image_size", 50, 8, {"image_size": 50}),
    ("width", 32, 5, {"heads": 5}),
  ):
    with pytest.raises(ShapeError) as caught:
      Vision(tiny(vision=dataclasses.replace(tiny().vision, **changes)), rngs=nnx.Rngs(0))
    assert caught.value.fields == {"where": key, "value": value, "divisor": divisor}
