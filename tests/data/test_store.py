"""data/store.py: what was written comes back, in order, whole, or not at all."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys

import cv2
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds
from refused import refused

from xcomp_jax import inputs
from xcomp_jax.data import store as store_lib
from xcomp_jax.data.store import Features, Layout, StoredSample, StoreError, open_store
from xcomp_jax.data.store_writing import (
  array_record,
  encode_record,
  finish_store,
  write_shard,
  write_store,
)
from xcomp_jax.files import WriteError, fresh_folder

SIZE = 16
RAW = Layout(SIZE, 4, None, None)
TOWER = Features("tower", tokens_per_frame=2, width=6)
TALK = ({"from": "human", "value": "<image>\nWas läuft?"}, {"from": "gpt", "value": "Ein Hund 🐕."})


def sample(name: str, time_message: str = "") -> StoredSample:
  return StoredSample(
    id=f"id-{name}",
    source=f"{name}.mp4",
    annotation="a.json",
    position=int(name),
    conversations=TALK,
    time_message=time_message,
  )


def frames(seed: int, clips: int, per_clip: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (clips, per_clip, SIZE, SIZE, 3), np.uint8)


ITEMS = [(0, 5, 4), (1, 1, 1), (2, None, None), (3, 2, 4), (4, 1, 1)]


def items():
  return [
    (sample(str(i), "\nmsg " if f == 4 else ""), frames(i, c, f) if c else None)
    for i, c, f in ITEMS
  ]


def test_round_trip_with_videos_images_and_text(tmp_path, monkeypatch):
  monkeypatch.setattr(store_lib, "RECORD_BYTES", 2 * 4 * SIZE * SIZE * 3)  # two clips a record
  write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  store = open_store(tmp_path / "s")
  assert len(store) == 5 and store.layout.image_size == SIZE and store.layout.clip_frames == 4
  assert store.made_with() == "sampling not recorded"
  for i, (meta, visual) in enumerate(items()):
    got = store.samples[i]
    assert (got.id, got.source, got.annotation, got.position) == (
      meta.id,
      meta.source,
      meta.annotation,
      meta.position,
    )
    assert got.conversations == meta.conversations and got.time_message == meta.time_message
    out = store.visual(i)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(
      out, np.zeros((0, 1, SIZE, SIZE, 3)) if visual is None else visual
    )
  assert [s.records for s in store.samples] == [3, 1, 0, 1, 1]
  assert [s.first_record for s in store.samples] == [0, 3, 4, 4, 5]
  assert [s.frames for s in store.samples] == [20, 1, 0, 8, 1]


@pytest.mark.parametrize("quality", [None, 95])
def test_some_clips_are_read_from_the_records_that_hold_them(tmp_path, monkeypatch, quality):
  monkeypatch.setattr(store_lib, "RECORD_BYTES", 2 * 4 * SIZE * SIZE * 3)  # two clips a record
  write_store(
    tmp_path / "s",
    [(sample("0"), smooth(7, 4)), (sample("1"), smooth(1, 1))],
    image_size=SIZE,
    clip_frames=4,
    quality=quality,
  )
  store = open_store(tmp_path / "s")
  whole, read = store.visual(0), []

  class Rows(store_lib.Rows):
    def __getitem__(self, key):
      read.append(key)
      return super().__getitem__(key)

  rows = Rows(tmp_path / "s" / "clips", store_lib.record_features(store.layout))

  for first, count, records in (
    (0, 1, [0]),
    (1, 2, [0, 1]),
    (2, 2, [1]),
    (3, 4, [1, 2, 3]),
    (6, 1, [3]),
    (0, 0, []),
  ):
    other = store_lib.Store(store.path, store.info, store.layout, store.samples, rows)
    read.clear()
    np.testing.assert_array_equal(other.clips(0, first, count), whole[first : first + count])
    assert read == records
    np.testing.assert_array_equal(other.clips(0, first, count), whole[first : first + count])
    assert read == records  # the last few are kept
  np.testing.assert_array_equal(store.clips(1, 0, 1), store.visual(1))


def test_is_a_pair_of_tfds_datasets(tmp_path):
  write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  rows = tfds.builder_from_directory(tmp_path / "s" / "samples").as_data_source(split="train")
  # written order, not shuffled
  assert [r["id"].decode() for r in rows] == [f"id-{i}" for i in range(5)]
  assert json.loads(rows[0]["conversations"])[1]["value"] == "Ein Hund 🐕."
  clips = tfds.builder_from_directory(tmp_path / "s" / "clips").as_data_source(split="train")
  np.testing.assert_array_equal(clips[0]["frames"].reshape(5, 4, SIZE, SIZE, 3), items()[0][1])
  feature = clips.dataset_info.features["frames"]
  # else every pixel is a 64-bit integer
  assert feature.np_dtype == np.uint8 and feature._encoded_to_bytes


def test_many_shards_keep_their_order_and_empty_ones_vanish(tmp_path):
  with fresh_folder(tmp_path / "s", "store") as folder:
    shards = []
    for s in range(12):  # more than ten: the order of names is not that of strings without zeros
      empty = s in (0, 7)
      part = [
        (sample(str(s * 10 + i)), None if empty else frames(s * 10 + i, 1, 4)) for i in range(3)
      ]
      shards.append(write_shard(folder / f"shard-{s}", part, RAW))
      assert (folder / f"shard-{s}").exists() != empty
    finish_store(folder, shards, RAW, {})
  store = open_store(tmp_path / "s")
  assert len(list((tmp_path / "s" / "clips").glob("*.array_record-*-of-00010"))) == 10
  assert len(store) == 36
  for i, meta in enumerate(store.samples):
    assert meta.position == i // 3 * 10 + i % 3
    if meta.frames:
      np.testing.assert_array_equal(store.visual(i), frames(meta.position, 1, 4))
  assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["clips", "samples", "store.json"]


def smooth(clips: int, per_clip: int) -> np.ndarray:
  x = np.arange(SIZE, dtype=np.uint8) * 8
  channels = np.stack([x[:, None] + 0 * x, x + 0 * x[:, None], (x[:, None] + x) // 2], -1)
  return np.stack([channels + np.uint8(i) for i in range(clips * per_clip)]).reshape(
    clips, per_clip, SIZE, SIZE, 3
  )


def test_frames_as_jpeg(tmp_path, monkeypatch):
  monkeypatch.setattr(store_lib, "RECORD_BYTES", 2 * 4 * SIZE * SIZE * 3)
  items = [(sample("0"), smooth(5, 4)), (sample("1"), smooth(1, 1)), (sample("2"), None)]
  write_store(tmp_path / "s", items, image_size=SIZE, clip_frames=4, quality=95)
  store = open_store(tmp_path / "s")
  assert store.features is None and store.layout.clip_spec(4) == ((4, SIZE, SIZE, 3), np.uint8)
  assert [s.records for s in store.samples] == [3, 1, 0]
  for i, (_, visual) in enumerate(items[:2]):
    got = store.visual(i)
    assert got.dtype == np.uint8 and got.shape == visual.shape
    # a swap of red and blue, or of rows and columns, is an error of up to 120
    assert 0 < np.abs(got.astype(int) - visual).max() < 12
  assert store.visual(2).shape == (0, 1, SIZE, SIZE, 3)
  row = tfds.builder_from_directory(tmp_path / "s" / "clips").as_data_source(split="train")[0]
  assert len(row["frames"]) == 8 and all(file.startswith(b"\xff\xd8") for file in row["frames"])
  monkeypatch.setattr(cv2, "imdecode", lambda *a: None)
  with refused(StoreError, where=tmp_path / "s", sample=1, frame=0):
    store.visual(1)


def test_features(tmp_path, monkeypatch):
  monkeypatch.setattr(store_lib, "RECORD_BYTES", 2 * 8 * 6 * 2)

  def tokens(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(ml_dtypes.bfloat16)

  items = [
    (sample("0"), tokens(0, 5, 8, 6)),
    (sample("1"), tokens(1, 1, 2, 6)),
    (sample("2"), None),
  ]
  write_store(tmp_path / "s", items, image_size=SIZE, clip_frames=4, features=TOWER)
  store = open_store(tmp_path / "s")
  assert store.features == TOWER and store.layout.clip_spec(4) == ((8, 6), ml_dtypes.bfloat16)
  assert [(s.frames, s.clip_frames, s.records) for s in store.samples] == [
    (20, 4, 3),
    (1, 1, 1),
    (0, 1, 0),
  ]
  for i, (_, visual) in enumerate(items[:2]):
    got = store.visual(i)
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.view(np.uint16), visual.view(np.uint16))
  assert store.visual(2).shape == (0, 2, 6) and store.visual(2).dtype == ml_dtypes.bfloat16
  rows = tfds.builder_from_directory(tmp_path / "s" / "features").as_data_source(split="train")
  np.testing.assert_array_equal(rows[0]["tokens"], items[0][1][:2].reshape(-1, 6).view(np.uint16))
  expected = (np.dtype(ml_dtypes.bfloat16), (8, 6))
  found = (np.dtype(np.float32), (1, 8, 6))
  with refused(StoreError, where="0.mp4", expected=expected, found=found):
    write_store(
      tmp_path / "t",
      [(sample("0"), np.zeros((1, 8, 6), np.float32))],
      image_size=SIZE,
      clip_frames=4,
      features=TOWER,
    )


def test_a_damaged_record_is_named(tmp_path):
  write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  (file,) = (tmp_path / "s" / "clips").glob("*array_record*")
  data = bytearray(file.read_bytes())
  middle = len(data) // 2
  data[middle : middle + 64] = bytes(64)
  file.write_bytes(data)
  store, said = open_store(tmp_path / "s"), []
  for i in range(5):
    try:
      store.visual(i)
    except StoreError as error:
      said.append(str(error))
  assert said and all(re.search(r"s: sample \d can't be read \(.*--verify", text) for text in said)


def test_identity_tells_stores_apart(tmp_path):
  def made(name, *, talk=TALK, visual=None, message="", **kind):
    item = (
      store_lib.dataclasses.replace(sample("0", message), conversations=talk),
      smooth(1, 4) if visual is None else visual,
    )
    write_store(tmp_path / name, [item], image_size=SIZE, clip_frames=4, **kind)
    return open_store(tmp_path / name).identity()

  features = np.zeros((1, 8, 6), ml_dtypes.bfloat16)
  other = Features("another", 2, 6)
  found = [
    made("a"),
    made("b", talk=TALK[::-1]),
    made("c", message="m"),
    made("d", visual=smooth(2, 4)),
    made("e", quality=95),
    made("f", quality=90),
    made("g", visual=features, features=TOWER),
    made("h", visual=features, features=other),
    made("i", visual=smooth(1, 4) + np.uint8(1)),
    made("j", visual=features + 1, features=TOWER),
  ]
  assert len(set(found)) == len(found) and all(len(i) == 16 and int(i, 16) for i in found)
  assert made("same") == found[0]


def test_store_of_text_alone(tmp_path):
  write_store(tmp_path / "s", [(sample("7"), None)], image_size=SIZE, clip_frames=4)
  store = open_store(tmp_path / "s")
  assert store.visual(0).shape == (0, 1, SIZE, SIZE, 3) and not (tmp_path / "s" / "clips").exists()


def test_a_failed_write_leaves_nothing(tmp_path):
  def broken():
    yield items()[0]
    raise RuntimeError("decoder")

  with pytest.raises(RuntimeError, match="decoder"):
    write_store(tmp_path / "s", broken(), image_size=SIZE, clip_frames=4)
  assert list(tmp_path.iterdir()) == []


def test_a_killed_write_is_swept_up_by_the_next(tmp_path):
  code = (
    "import sys, time; sys.path[:0] = sys.argv[2:]; import test_store as t\n"
    "def slow():\n  yield t.items()[0]\n  print('half', flush=True); time.sleep(60)\n"
    "t.write_store(sys.argv[1], slow(), image_size=t.SIZE, clip_frames=4)"
  )
  here = pathlib.Path(__file__).parent
  paths = [str(here), str(here.parent / "helpers"), str(here.parents[1])]
  process = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path / "s"), *paths],
    stdout=subprocess.PIPE,
  )
  assert process.stdout.readline() == b"half\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  assert [p.name for p in tmp_path.iterdir()] == ["s.store.incomplete"]
  with refused(StoreError, where=tmp_path / "s", found=None):
    open_store(tmp_path / "s")
  write_store(tmp_path / "s", items()[:2], image_size=SIZE, clip_frames=4)
  assert [p.name for p in tmp_path.iterdir()] == ["s"] and len(open_store(tmp_path / "s")) == 2


def test_nothing_is_overwritten(tmp_path):
  write_store(tmp_path / "s", items()[:2], image_size=SIZE, clip_frames=4)
  with pytest.raises(FileExistsError):
    write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  assert len(open_store(tmp_path / "s")) == 2


def test_clear_errors_for_folders_that_are_no_store(tmp_path):
  with pytest.raises(StoreError, match=r"no data at .*nowhere.*predecode --mixture"):
    open_store(tmp_path / "nowhere")
  (tmp_path / "foreign").mkdir()
  with refused(StoreError, where=tmp_path / "foreign" / "store.json", missing=True):
    open_store(tmp_path / "foreign")
  write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  info = json.loads((tmp_path / "s" / "store.json").read_text())
  (tmp_path / "s" / "store.json").write_text(json.dumps(info | {"format": 99}))
  with refused(StoreError, where=tmp_path / "s" / "store.json", format=99):
    open_store(tmp_path / "s")
  (tmp_path / "s" / "store.json").write_text(json.dumps(info | {"samples": 6}))
  with refused(StoreError, where=tmp_path / "s" / "samples", found=5, expected=6):
    open_store(tmp_path / "s")
  (tmp_path / "s" / "store.json").write_text(json.dumps(info))
  gone = next((tmp_path / "s" / "samples").glob("*array_record*"))
  os.remove(gone)
  with refused(StoreError, where=tmp_path / "s" / "samples", missing=[str(gone)]):
    open_store(tmp_path / "s")


def test_writer_refuses_other_arrays_and_empty_stores(tmp_path):
  for bad in (
    frames(0, 1, 4).astype(np.float32),
    frames(0, 1, 4)[0],
    frames(0, 1, 4)[:, :, :8],
    frames(0, 1, 4)[:0],
  ):
    with refused(StoreError, where="0.mp4", found=(bad.dtype, bad.shape)):
      write_store(tmp_path / "s", [(sample("0"), bad)], image_size=SIZE, clip_frames=4)
  with refused(StoreError, samples=0):
    write_store(tmp_path / "s", [], image_size=SIZE, clip_frames=4)
  (tmp_path / "file").write_text("")
  with refused(WriteError, where=tmp_path / "file" / "s"):
    write_store(tmp_path / "file" / "s", items(), image_size=SIZE, clip_frames=4)
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def many(tmp_path):
  """A folder with 90 files of clips, a sample in each."""
  with fresh_folder(tmp_path / "many", "store") as folder:
    finish_store(
      folder,
      [write_shard(folder / f"{i}", [(sample(str(i)), frames(i, 1, 4))], RAW) for i in range(90)],
      RAW,
      {},
    )
  return tmp_path / "many"


def test_files_of_many_shards_are_not_all_open(many):
  def held():
    count = 0
    for file in pathlib.Path("/proc/self/fd").iterdir():
      with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        count += str(many / "clips") in os.readlink(file)
    return count

  store = open_store(many)
  assert held() == 0
  order, most = np.random.default_rng(0).permutation(90).tolist() * 2, 0
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for i, got in zip(order, pool.map(store.visual, order)):
      np.testing.assert_array_equal(got, frames(i, 1, 4))
      most = max(most, held())
  assert store_lib.OPEN // 2 < most <= store_lib.OPEN + 4 and held() <= store_lib.OPEN


def test_too_many_open_files_are_told_as_such(many):
  store, limits = open_store(many), resource.getrlimit(resource.RLIMIT_NOFILE)
  store_lib.opened_file.cache_clear()  # files of other tests
  used = len(os.listdir("/proc/self/fd"))
  resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, limits[1]))
  try:
    with pytest.raises(
      OSError,
      match=(
        rf"^Too many open files: a process may have {used + 10} here; `ulimit -n \d+` allows "
        rf"more"
      ),
    ) as error:
      for i in range(90):
        store.visual(i)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  assert "damage" not in str(error.value)
  store.visual(50)  # a reader that could not be opened is not kept


def test_a_missing_file_is_named_when_a_store_is_opened(many):
  missing = [many / "clips" / f"clips-train.array_record-{i:05d}-of-00090" for i in (3, 7)]
  for file in missing:
    file.unlink()
  with refused(StoreError, where=many / "clips", missing=[str(file) for file in missing]):
    open_store(many)


def by_tfds(coder, row) -> bytes:
  """TFDS's own record, with its fields in order."""
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example.FromString(coder.serialize_example(row)).SerializeToString(
    deterministic=True
  )


@pytest.mark.parametrize("shape", [(1,), (8,), (300,)])
def test_records_are_those_of_tfds(shape):
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (*shape, SIZE, SIZE, 3), np.uint8)
  tokens = rng.integers(0, 1 << 16, (*shape, TOWER.width), np.uint16)
  files = [rng.bytes(n) for n in shape * 3]
  for layout, row in (
    (RAW, {"frames": frames}),
    (RAW, {"frames": frames[:, ::-1]}),
    (Layout(SIZE, 4, 90, None), {"frames": files}),
    (Layout(SIZE, 4, None, TOWER), {"tokens": tokens}),
  ):
    assert encode_record(row) == by_tfds(store_lib.record_features(layout), row)
  one = dataclasses.replace(
    sample("7", "ü" * shape[0]), position=shape[0], first_record=1 << 40, records=127
  )
  row = vars(one) | {"conversations": store_lib.as_json(one.conversations)}
  assert encode_record(row) == by_tfds(store_lib.sample_features(), row)


def described(**changes):
  return lambda folder: edit(folder / "store.json", lambda info: info | changes)


def edit(file, change):
  file.write_text(json.dumps(change(json.loads(file.read_text()))))


def split(**changes):
  return lambda folder: edit(
    folder / "clips" / "dataset_info.json",
    lambda info: info | {"splits": [info["splits"][0] | changes]},
  )


DAMAGES = {
  "no description": lambda folder: (folder / "store.json").unlink(),
  "deep": lambda folder: (folder / "store.json").write_text("[" * 100_000),
  "no UTF-8": lambda folder: (folder / "store.json").write_bytes(b"\xff"),
  "a list": lambda folder: (folder / "store.json").write_text("[]"),
  "no pixels": described(image_size=0),
  "too many pixels": described(image_size=10**9),
  "text for a number": described(image_size="16"),
  "true for a number": described(clip_frames=True),
  "endless clips": described(clip_frames=10**12),
  "other clips": described(clip_frames=8),
  "other pixels": described(image_size=3000),
  "no such quality": described(quality=1000),
  "features that are none": described(features=[]),
  "features of no size": described(features={"identity": "x", "tokens_per_frame": 0, "width": -1}),
  "another number of samples": described(samples=10**9),
  "a deep dataset": (
    lambda folder: (folder / "clips" / "dataset_info.json").write_text('{"a":' * 100_000)
  ),
  "no dataset": lambda folder: (folder / "samples" / "dataset_info.json").unlink(),
  "files outside": split(filepathTemplate="../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"),
  "lengths of text": split(shardLengths=["x"]),
  "negative lengths": split(shardLengths=["-5"]),
  "no lengths": split(shardLengths=[]),
  "endless lengths": split(shardLengths=["5000000000000"]),
  "short lengths": split(shardLengths=["1"]),
  "noise": (
    lambda folder: next((folder / "samples").glob("*array_record*")).write_bytes(
      np.random.default_rng(0).bytes(1 << 17)
    )
  ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_one_error_with_its_name(tmp_path, damage):
  write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  DAMAGES[damage](tmp_path / "s")
  with pytest.raises(StoreError) as raised:
    open_store(tmp_path / "s")
  assert str(raised.value).startswith(
    (f"{tmp_path}/s", "[Errno 2] No such file or directory: ")
  ) and f"{tmp_path}/s" in str(raised.value)


@pytest.mark.parametrize(
  "name",
  ["store.json", "samples/dataset_info.json", "clips/clips-train.array_record-00000-of-00001"],
)
def test_pipes_and_devices_in_a_store_are_never_opened(tmp_path, name):
  write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  for make in (os.mkfifo, lambda file: file.symlink_to("/dev/zero")):
    (tmp_path / "s" / name).unlink()
    make(tmp_path / "s" / name)
    with pytest.raises(inputs.NoFileError) as caught:
      open_store(tmp_path / "s")
    assert name in str(caught.value)


def test_no_module_that_a_store_names_is_imported_and_links_are_followed(tmp_path):
  write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  for folder in ("samples", "clips"):
    edit(
      tmp_path / "s" / folder / "features.json",
      lambda about: about | {"pythonClassName": "this.module_does_harm.X"},
    )
  for i, file in enumerate(sorted((tmp_path / "s").glob("*/*"))):
    file.symlink_to(file.rename(tmp_path / str(i)))
  store = open_store(tmp_path / "s")
  np.testing.assert_array_equal(store.visual(0), frames(0, 5, 4))


@pytest.mark.parametrize(
  "changes",
  [
    {"frames": 8 * 10**9},
    {"frames": -4},
    {"frames": 19},
    {"clip_frames": 0},
    {"clip_frames": 5},
    {"first_record": -1},
    {"records": 2},
    {"records": 0},
    {"conversations": {"from": 1}},
    {"conversations": ["a"]},
  ],
)
def test_samples_whose_numbers_do_not_go_together_are_refused(tmp_path, changes):
  write_store(tmp_path / "s", items(), image_size=SIZE, clip_frames=4)
  coder, folder = store_lib.sample_features(), tmp_path / "s" / "samples"
  table = store_lib.Rows(folder, coder)
  rows = [{name: own(value) for name, value in table[i].items()} for i in range(len(table))]
  talk = {"conversations": json.dumps(changes.get("conversations", TALK))}
  rows[0] |= changes | talk
  (file,) = folder.glob("*array_record*")
  writer = array_record(file)
  for row in rows:
    writer.write(by_tfds(coder, row))
  writer.close()
  where = {"where": folder} if "conversations" in changes else {"where": "id-0"}
  with refused(StoreError, **where) as caught:
    open_store(tmp_path / "s")
  assert " is damaged: " in str(caught.value)


def own(value):
  """A value of a record as TFDS takes it."""
  return value.decode() if isinstance(value, bytes) else int(value)
