"""Encoded videos."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xcomp_jax import encode
from xcomp_jax.config import ConfigError
from xcomp_jax.model import vlm


@pytest.fixture(scope="module")
def model(tiny):
  return vlm.VLM(tiny(), rngs=nnx.Rngs(0))


def frames(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 48, 48, 3)).astype(np.uint8)


def test_chunks_of_clips_give_what_one_pass_gives(model):
  video = frames(40)  # 5 clips, in chunks of 2
  done = []
  got = encode.encode(model, iter(video), np.arange(40) / 8, 5.0, "it", report=done.append)
  expected = vlm.encode(model, jnp.asarray(video.reshape(5, 8, 48, 48, 3)))
  np.testing.assert_allclose(got.features[0], expected, atol=1e-5)
  assert got.thumbnails.shape == (5, 96, 96, 3) and sum(done) == got.clips == 5 and got.frames is None


def test_phases_start_at_their_frame_and_wrap_around(model):
  video = frames(24)
  got = encode.encode(model, iter(video), np.arange(24) / 8, 3.0, "it", phases=(0, 4))
  rolled = np.concatenate([video[4:], video[:4]]).reshape(3, 8, 48, 48, 3)
  np.testing.assert_allclose(got.features[4], vlm.encode(model, jnp.asarray(rolled)), atol=1e-5)
  np.testing.assert_array_equal(got.frames, video)
  alone = encode.encode(model, iter(video), np.arange(24) / 8, 3.0, "it", phases=(4,))
  np.testing.assert_array_equal(alone.features[4], got.features[4])


def test_an_image_is_one_clip_of_one_frame(model):
  got = encode.encode(model, frames(1), np.zeros(1), 0.0, "it")
  assert got.features[0].shape == (1, 16, 32) and got.clip_frames == 1


@pytest.mark.parametrize("count", [0, 12])
def test_frames_that_make_no_clips_are_refused(model, count):
  with pytest.raises(ConfigError, match=f"{count} frames"):
    encode.encode(model, frames(count), np.arange(count), 1.0, "it")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded(tiny, tmp_path, dtype):
  model = vlm.VLM(tiny(dtype=dtype), rngs=nnx.Rngs(0))
  video = encode.encode(model, frames(16), np.arange(16) / 8, 2.0, "it")
  assert video.features[0].nbytes == 16 * 16 * 32 * (2 if dtype == "bfloat16" else 4)  # 32 KiB a frame at 1,024 channels
  encode.save(video, tmp_path / "v.npz")
  got = encode.load(tmp_path / "v.npz", model)
  assert got.features[0].dtype == video.features[0].dtype
  np.testing.assert_array_equal(got.features[0], video.features[0])
  np.testing.assert_array_equal(got.thumbnails, video.thumbnails)
  np.testing.assert_array_equal(got.times, video.times)
  assert (got.seconds, got.source, got.identity) == (2.0, "it", video.identity)


def test_identity_is_that_of_the_tower_alone(tiny, model):
  same = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  assert encode.identity(same) == encode.identity(model)
  same.llm.norm.scale[...] = 2.0
  same.projector.fc1.bias[...] = 2.0
  assert encode.identity(same) == encode.identity(model)
  same.vision.blocks[1].fc2.bias[...] = 2.0
  assert encode.identity(same) != encode.identity(model)
  other = vlm.VLM(dataclasses.replace(tiny(), clip_frames=4), rngs=nnx.Rngs(0))
  assert encode.identity(other) != encode.identity(model)
