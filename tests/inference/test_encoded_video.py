"""Encoded videos."""

import dataclasses
import json
import os
import threading
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xcomp_jax.config import ConfigError, MeshConfig
from xcomp_jax.data.video import TailError
from xcomp_jax.inference import encoded_video
from xcomp_jax.inference.encoded_video import EncodedVideoError
from xcomp_jax.inputs import NoFileError
from xcomp_jax.model import vlm
from xcomp_jax.parallel.mesh import clip_sharding, make_mesh, mesh_of, param_shardings
from xcomp_jax.training.metrics import BACKEND_COMPILE


@pytest.fixture(scope="module")
def model(tiny):
  return vlm.VLM(tiny(), rngs=nnx.Rngs(0))


def frames(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 48, 48, 3)).astype(np.uint8)


def test_chunks_of_clips_give_what_one_pass_gives(model):
  video = frames(40)  # 5 clips, in chunks of 2
  done = []
  got = encoded_video.encode_video(
    model, iter(video), np.arange(40) / 8, 5.0, "it", report=done.append
  )
  expected = vlm.encode_frames(model, jnp.asarray(video.reshape(5, 8, 48, 48, 3)))
  np.testing.assert_allclose(got.features[0], expected, atol=1e-5)
  assert (
    got.thumbnails.shape == (5, 96, 96, 3) and sum(done) == got.clips == 5 and got.frames is None
  )


def test_phases_start_at_their_frame_and_wrap_around(model):
  video = frames(24)
  got = encoded_video.encode_video(model, iter(video), np.arange(24) / 8, 3.0, "it", phases=(0, 4))
  rolled = np.concatenate([video[4:], video[:4]]).reshape(3, 8, 48, 48, 3)
  np.testing.assert_allclose(
    got.features[4], vlm.encode_frames(model, jnp.asarray(rolled)), atol=1e-5
  )
  np.testing.assert_array_equal(got.frames, video)
  alone = encoded_video.encode_video(model, iter(video), np.arange(24) / 8, 3.0, "it", phases=(4,))
  np.testing.assert_array_equal(alone.features[4], got.features[4])


def test_an_image_is_one_clip_of_one_frame(model):
  got = encoded_video.encode_video(model, frames(1), np.zeros(1), 0.0, "it")
  assert np.shape(got.features[0]) == (1, 16, 32) and got.clip_frames == 1


def spread(model, **sizes):
  """The model on a mesh of all 8 devices."""
  mesh = make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1, "context": 1} | sizes))
  graph, state = nnx.split(model)
  return nnx.merge(graph, jax.device_put(state, param_shardings(state, mesh)))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_encode_what_one_does(model, sizes):
  video = frames(21 * 8).reshape(21, 8, 48, 48, 3)
  assert mesh_of(model) is None
  many = spread(model, **sizes)
  expected = list(encoded_video.encode_in_chunks(model, video))
  got = list(encoded_video.encode_in_chunks(many, video))
  np.testing.assert_allclose(got, expected, atol=1e-5)
  for one in (*got, encoded_video.stacked(got, 24)):
    assert one.sharding.is_fully_replicated and len(one.devices()) == 8


def test_each_of_eight_devices_does_an_eighth_of_the_towers_work(model):
  many, video = spread(model, data=8), frames(64).reshape(8, 8, 48, 48, 3)
  mesh = mesh_of(many)
  model = vlm.VLM(dataclasses.replace(model.cfg, clips_per_chunk=8), rngs=nnx.Rngs(0))
  alone = encoded_video.encode_chunk.lower(model, video)
  with jax.set_mesh(mesh):
    split = encoded_video.encode_chunk.lower(many, jax.device_put(video, clip_sharding(mesh)))
  one, eighth = (lowered.compile().cost_analysis()["flops"] for lowered in (alone, split))
  assert eighth == pytest.approx(one / 8, rel=0.01)


def fake(sizes):
  """Encodes nothing, and notes how many clips it was given."""

  def encode(model, clips):
    sizes.append(len(clips))
    return [jnp.zeros((16, 32))] * len(clips)

  return encode


@pytest.mark.parametrize("devices", [1, 8])
def test_few_clips_are_padding_and_two_programs_serve(model, devices):
  """Chunks are of 2 clips a device."""
  many, programs = model if devices == 1 else spread(model, data=8), set()
  for count in range(1, 40):
    clips, sizes = np.broadcast_to(np.uint8(0), (count, 1, 1, 1, 3)), []
    assert len([*encoded_video.encode_in_chunks(many, clips, fake(sizes))]) == count
    assert 0 <= sum(sizes) - count < devices
    assert len(sizes) <= count // (2 * devices) + 1
    programs |= set(sizes)
  assert programs == {devices, 2 * devices}


def test_a_rest_fills_a_chunk_of_one_device_but_a_lone_clip_has_its_own_program(model):
  model = vlm.VLM(dataclasses.replace(model.cfg, clips_per_chunk=4), rngs=nnx.Rngs(0))
  for count, expected in ((1, [1]), (2, [4]), (4, [4]), (5, [4, 1]), (7, [4, 4])):
    sizes = []
    clips = np.zeros((count, 1, 1, 1, 3), np.uint8)
    assert len([*encoded_video.encode_in_chunks(model, clips, fake(sizes))]) == count
    assert sizes == expected


def test_the_decoder_is_few_chunks_ahead(model):
  decoded, done = [], []

  def clips():
    for i in range(20):
      decoded.append(i)
      yield np.zeros((1, 1, 1, 3), np.uint8)

  for _ in encoded_video.encode_in_chunks(model, clips(), fake([])):
    time.sleep(0.01)  # the decoder is faster
    assert len(decoded) - len(done) // 2 * 2 <= 3 * 2  # one that arrives, one in work, one waits
    done.append(len(decoded))
  assert done[0] == 6 and len(done) == 20


@pytest.mark.parametrize("error", [TailError("x", lost=1), KeyboardInterrupt(), ValueError("no")])
def test_what_a_decoder_raises_arrives_as_it_is(model, error):
  def clips():
    yield from np.zeros((5, 1, 1, 1, 3), np.uint8)
    raise error

  before, got = threading.active_count(), []
  with pytest.raises(type(error)) as raised:
    for one in encoded_video.encode_in_chunks(model, clips(), fake([])):
      got.append(one)
  assert raised.value is error and threading.active_count() == before


@pytest.mark.parametrize("how", ["break", "interrupt", "bad features"])
def test_encoding_that_is_left_early_leaves_no_thread(model, how):
  closed = []

  def clips():
    try:
      while True:
        yield np.zeros((1, 1, 1, 3), np.uint8)
    finally:
      closed.append(True)

  def bad(model, clips):
    raise ConfigError("no")

  before = threading.active_count()
  try:
    encode = bad if how == "bad features" else fake([])
    for _ in encoded_video.encode_in_chunks(model, clips(), encode):
      assert threading.active_count() == before + 1
      if how == "interrupt":
        raise KeyboardInterrupt
      break
  except (KeyboardInterrupt, ConfigError):
    pass
  assert threading.active_count() == before and closed == [True]


def test_arrays_on_devices_are_stacked_there_as_those_of_the_host_are():
  whole = np.random.default_rng(0).random((21, 3, 2), np.float32)
  on_devices = [jnp.asarray(one) for one in whole]
  compiled = []

  def listen(event, seconds, **about):
    return compiled.append(about) if event == BACKEND_COMPILE else None

  for count in (21, 19, 17):
    expected = np.concatenate([whole[:count], np.zeros((24 - count, 3, 2), np.float32)])
    kinds = {
      "host": whole[:count],
      "both": [*whole[:3], *on_devices[3:count]],
      "devices": on_devices[:count],
    }
    for kind, arrays in kinds.items():
      got = encoded_video.stacked(arrays, 24)
      np.testing.assert_array_equal(got, expected)
      assert isinstance(got, jax.Array if kind == "devices" else np.ndarray)
    if count == 21:
      jax.monitoring.register_event_duration_secs_listener(listen)
  jax.monitoring.unregister_event_duration_listener(listen)
  assert not compiled  # by how many there are, only by how many it is padded to


@pytest.mark.parametrize("count", [0, 12])
def test_frames_that_make_no_clips_are_refused(model, count):
  with pytest.raises(ConfigError) as caught:
    encoded_video.encode_video(model, frames(count), np.arange(count), 1.0, "it")
  assert caught.value.fields == {"where": "times", "value": count}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_loaded(tiny, tmp_path, dtype):
  model = vlm.VLM(tiny(dtype=dtype), rngs=nnx.Rngs(0))
  video = encoded_video.encode_video(model, frames(16), np.arange(16) / 8, 2.0, "it")
  # 32 KiB a frame at 1,024 channels
  assert sum(clip.nbytes for clip in video.features[0]) == 16 * 16 * 32 * np.dtype(dtype).itemsize
  encoded_video.save_video(video, tmp_path / "v.npz")
  got = encoded_video.load_video(tmp_path / "v.npz", model)
  assert got.features[0].dtype == video.features[0][0].dtype == np.dtype(dtype)
  np.testing.assert_array_equal(got.features[0], video.features[0])
  np.testing.assert_array_equal(got.thumbnails, video.thumbnails)
  np.testing.assert_array_equal(got.times, video.times)
  assert (got.seconds, got.source, got.identity) == (2.0, "it", video.identity)


def test_identity_is_that_of_the_tower_alone(tiny, model):
  same = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  assert encoded_video.identity(same) == encoded_video.identity(model)
  same.llm.norm.scale[...] = 2.0
  same.projector.fc1.bias[...] = 2.0
  assert encoded_video.identity(same) == encoded_video.identity(model)
  same.vision.blocks[1].fc2.bias[...] = 2.0
  assert encoded_video.identity(same) != encoded_video.identity(model)
  other = vlm.VLM(dataclasses.replace(tiny(), clip_frames=4), rngs=nnx.Rngs(0))
  assert encoded_video.identity(other) != encoded_video.identity(model)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
  """An encoded video in a file: 3 clips, of which it has a second phase and the frames."""
  file = tmp_path_factory.mktemp("saved") / "v.npz"
  encoded_video.save_video(
    encoded_video.encode_video(
      model, iter(frames(24)), np.arange(24) / 8, 3.0, "it", phases=(0, 4)
    ),
    file,
  )
  return file


def claiming(name, shape, dtype="<f4"):
  """Replaces an array by a header that claims a shape, without its bytes."""

  def write(arrays, file):
    with zipfile.ZipFile(file, "w") as archive:
      for key, array in arrays.items():
        with archive.open(f"{key}.npy", "w") as out:
          if key == name:
            np.lib.format.write_array_header_1_0(
              out, {"descr": dtype, "fortran_order": False, "shape": shape}
            )
          else:
            np.lib.format.write_array(out, array)

  return write


def about(**changes):
  return lambda arrays, file: arrays.update(
    about=np.array(json.dumps(json.loads(str(arrays["about"])) | changes))
  )


def on(name, change):
  return lambda arrays, file: arrays.update({name: change(arrays[name])})


def one(value):
  return lambda array: np.where(
    np.arange(array.size).reshape(array.shape) == 5, value, array
  ).astype(array.dtype)


def flagged(arrays, file):
  """Says of every entry that it is encrypted."""
  np.savez(file, **arrays)
  file.write_bytes(
    file.read_bytes()
    .replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
    .replace(b"PK\x01\x02-\x03-\x00\x00\x00", b"PK\x01\x02-\x03-\x00\x01\x00")
  )


def twice(arrays, file):
  np.savez(file, **arrays)
  with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
    archive.writestr("times.npy", archive.read("times.npy"))


DAMAGES = {
  "10 TB": claiming("features_0", (3, 128, 6 * 10**9)),
  "more than there is": claiming("times", (10**18,), "<f8"),
  "negative": claiming("times", (-24,), "<f8"),
  "objects": claiming("times", (24,), "|O"),
  "packed": lambda arrays, file: np.savez_compressed(file, **arrays),
  "encrypted": flagged,
  "a name twice": twice,
  "an array too many": lambda arrays, file: arrays.update(more=np.zeros(3)),
  "an array too few": lambda arrays, file: arrays.pop("thumbnails"),
  "a phase of no clip": lambda arrays, file: arrays.update(features_8=arrays["features_4"]),
  "other width": on("features_0", lambda a: a[..., :16]),
  "other tokens": on("features_0", lambda a: a[:, :64]),
  "fewer clips": on("features_0", lambda a: a[:2]),
  "float64": on("features_4", lambda a: a.astype(np.float64)),
  "by columns": on("features_0", np.asfortranarray),
  "not a number": on("features_4", one(np.nan)),
  "infinite": on("features_0", one(np.inf)),
  "times that are none": on("times", one(np.nan)),
  "times backwards": on("times", lambda a: a[::-1]),
  "fewer times": on("times", lambda a: a[:16]),
  "no times": on("times", lambda a: a[:0]),
  "small thumbnails": on("thumbnails", lambda a: a[:, :48]),
  "other frames": on("frames", lambda a: a[:8]),
  "float frames": on("frames", lambda a: a.astype(np.float32)),
  "negative seconds": about(seconds=-1),
  "endless seconds": about(seconds=float("inf")),
  "text for seconds": about(seconds="x"),
  "no source": about(source=5),
  "a deep about": lambda arrays, file: arrays.update(about=np.array("[" * 100_000)),
  "bytes for about": lambda arrays, file: arrays.update(about=np.array(b"{}")),
  "a cut file": lambda arrays, file: (
    np.savez(file, **arrays),
    file.write_bytes(file.read_bytes()[:-5000]),
  ),
  "a flipped bit": lambda arrays, file: (
    np.savez(file, **arrays),
    file.write_bytes(file.read_bytes()[:9000] + b"\xaa" + file.read_bytes()[9001:]),
  ),
  "text": lambda arrays, file: file.write_text("hello"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_of_an_encoded_video_is_believed_before_it_is_checked(
  model, saved, tmp_path, damage
):
  with np.load(saved) as archive:
    arrays = dict(archive)
  file = tmp_path / "x.npz"
  DAMAGES[damage](arrays, file)
  if not file.exists():
    np.savez(file, **arrays)
  with pytest.raises(EncodedVideoError) as raised:
    encoded_video.load_video(file, model)
  assert str(raised.value).startswith(f"{file} is no ") and len(str(raised.value)) < 1000


def test_pipes_and_devices_are_no_encoded_videos(model, tmp_path):
  os.mkfifo(tmp_path / "pipe.npz")
  for file in (tmp_path / "pipe.npz", "/dev/zero"):
    with pytest.raises(NoFileError):
      encoded_video.load_video(file, model)


def test_files_of_earlier_versions_that_kept_no_frames_serve_all_but_other_phases(
  model, saved, tmp_path
):
  with np.load(saved) as archive:
    np.savez(
      tmp_path / "old.npz", **{name: array for name, array in archive.items() if name != "frames"}
    )
  got = encoded_video.load_video(tmp_path / "old.npz", model)
  assert list(got.features) == [0] and got.frames is None
