"""predecode.py: the command as a whole, and that nothing which happens to it changes the result."""

import collections
import dataclasses
import errno
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import decoding
import numpy as np
import odd
import pytest
from decoding import (
  SAMPLING,
  SETTINGS,
  command,
  contents,
  group_lives,
  make,
  make_video,
  manifest,
  mixture,
  talk,
  wait_for,
  write,
)
from PIL import Image
from watched import load_frames

from xcomp_jax import files, predecode, progress
from xcomp_jax.config import ConfigError
from xcomp_jax.data import decode_jobs, inspection, processes, prompt, store_writing, video
from xcomp_jax.data import predecoding as predecode_lib
from xcomp_jax.data.mixture import read_mixture
from xcomp_jax.data.predecoding import Tower
from xcomp_jax.data.sampling import FrameSettings, LimitsError
from xcomp_jax.data.store import Features, Layout, StoreError, open_store


@pytest.fixture
def world(tmp_path):
  return decoding.make_world(tmp_path / "data")


def test_mixture_becomes_a_store(world):
  info = make(world)
  store = open_store(world.parent / "out")
  assert store.made_with() == "fps 8.0, min_frames 8, max_frames 16, subset 1.0"
  order = [0, 2, 1]  # of three: a shuffle by seed 12345, one by 42
  assert [s.id for s in store.samples] == [*map(str, order), "0", "i", "0", "0"]
  assert [s.annotation for s in store.samples] == ["videos.json"] * 3 + [
    "part.jsonl",
    "images.json",
    "gifs.json",
    "folders.json",
  ]
  names = [*(f"v{i}.mp4" for i in order), "v0.mp4", "still ü.png", "move.gif", "steps"]
  cuts = [{}] * 3 + [{"start": 1.0, "end": 2.5}] + [{}] * 3
  kinds = ["video"] * 4 + ["img", "gif", "frames"]
  for i, (name, cut, kind) in enumerate(zip(names, cuts, kinds, strict=True)):
    loaded = load_frames(world / "videos" / name, read_type=kind, **cut, **SAMPLING)
    got = store.visual(i)
    assert got.shape[1] == (1 if kind == "img" else 8)
    np.testing.assert_array_equal(got.reshape(loaded.frames.shape), loaded.frames)
    message = "" if kind == "img" else prompt.time_message(loaded.seconds, len(loaded.frames))
    assert store.samples[i].time_message == message
    assert store.samples[i].source == str(world / "videos" / name)
  assert [s.frames for s in store.samples] == [(16, 8, 16)[i] for i in order] + [8, 1, 8, 8]
  assert list(store.samples[4].conversations) == talk("Was?\n<image>")
  assert (
    info == store.info
    and info["skipped"] == 0
    and info["samples"] == 7
    and info["clip_frames"] == 8
  )
  counts = {"annotations": 3, "drawn": 3, "selected": 3, "written": 3, "skipped": 0}
  assert counts.items() <= info["annotation_files"][0].items()
  lines = manifest(world.parent / "out")
  assert [line["sample"] for line in lines] == list(range(7))
  assert [
    (line["annotation"], line["position"], line["source"], line["frames"]) for line in lines
  ] == [(s.annotation, s.position, s.source, s.frames) for s in store.samples]
  assert not (world.parent / "out.incomplete").exists()


def test_same_store_for_any_number_of_processes(world, capfd, monkeypatch):
  monkeypatch.setattr(progress, "SECONDS", 0.0)
  write(
    world / "images.json",
    [
      {"image": "v7.png", "conversations": talk()},
      {"id": "i", "image": "still ü.png", "conversations": talk()},
    ],
  )
  for workers in (0, 1, 4):
    make(world, f"out{workers}", workers=workers, samples_per_shard=2, skip_bad=True)
  assert capfd.readouterr().err.count("8/8") == 2 * 3  # the last of every run, and as it ends
  first = contents(world.parent / "out0")
  assert {"store.json", "manifest.jsonl"} < first.keys() and sum(
    "clips-train" in name for name in first
  ) == 4
  for workers in (1, 4):
    assert contents(world.parent / f"out{workers}") == first


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_videos_are_listed_at_the_end_and_the_rest_is_kept(world, workers):
  make(world, "whole")
  good = (world / "videos" / "v1.mp4").read_bytes()
  make_video(world / "videos" / "v1.mp4", 7)
  with pytest.raises(video.VideoError) as caught:
    make(world, workers=workers, samples_per_shard=2)
  (lost,) = caught.value.fields["lost"]
  assert re.match(r"videos\.json, annotation 1: .*v1\.mp4.*7 frames", lost)
  assert re.match(r"1 of 7 samples.*--skip-bad.*\n  videos\.json, annotation 1", str(caught.value))
  spool = world.parent / "out.incomplete" / "spool"
  kept = {p.name: p.stat().st_mtime_ns for p in spool.iterdir()}
  assert len(kept) == 2  # of the one shard that could not be assembled
  with pytest.raises(video.VideoError) as again:  # looked at again, the others not
    make(world, samples_per_shard=2)
  assert again.value.fields["lost"] == [lost]
  again = {p.name: p.stat().st_mtime_ns for p in spool.iterdir()}
  assert [name for name in kept if kept[name] != again[name]] == ["0000002.records"]
  (world / "videos" / "v1.mp4").write_bytes(good)
  make(world, samples_per_shard=2)
  assert (
    contents(world.parent / "out")["samples/samples-train.array_record-00000-of-00001"]
    == (contents(world.parent / "whole")["samples/samples-train.array_record-00000-of-00001"])
  )


class NoDecoding(processes.Here):
  """Does all calls but those that decode."""

  def call(self, key, function, *args, timeout=None):
    assert function is not decode_jobs.decode_job, "decoded"
    super().call(key, function, *args, timeout=timeout)


class Stops(processes.Here):
  """Stands for a disk that is full when all is decoded."""

  def stop(self):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_skip_bad_after_a_run_without_decodes_nothing_again(world):
  make_video(world / "videos" / "v1.mp4", 7)
  with pytest.raises(video.VideoError):
    make(world, samples_per_shard=2)
  info = make(world, samples_per_shard=2, skip_bad=True, start=lambda _: NoDecoding())
  assert info["samples"] == 6 and info["skipped"] == 1
  assert info["annotation_files"][0]["written"] == 2 and info["annotation_files"][0]["skipped"] == 1
  (line,) = [line for line in manifest(world.parent / "out") if "reason" in line]
  assert line["source"].endswith("v1.mp4") and "7 frames" in line["reason"] and "sample" not in line


def test_a_skipped_file_that_has_changed_is_tried_again(world):
  good = (world / "videos" / "v1.mp4").read_bytes()
  make_video(world / "videos" / "v1.mp4", 7)
  with pytest.raises(OSError) as caught:
    make(world, samples_per_shard=2, skip_bad=True, start=lambda _: Stops())
  assert caught.value.errno == errno.ENOSPC
  assert len(list((world.parent / "out.incomplete" / "shards").glob("*.json"))) == 4
  (world / "videos" / "v1.mp4").write_bytes(good)
  assert make(world, samples_per_shard=2, skip_bad=True)["skipped"] == 0
  assert len(open_store(world.parent / "out")) == 7


def test_nothing_left(world):
  write(world / "videos.json", [{"video": "v7.mp4", "conversations": talk()}])
  mixture(world, {"json_path": "videos.json"})
  with pytest.raises(StoreError) as caught:
    make(world, skip_bad=True)
  (lost,) = caught.value.fields["lost"]
  assert lost.endswith("v7.mp4 does not exist")


def test_nothing_selected(world):
  write(world / "videos.json", [{"conversations": talk("What?")}])
  mixture(world, {"json_path": "videos.json"})
  for subset, drawn in ((1.0, 1), (0.25, 0)):
    with pytest.raises(StoreError) as caught:
      make(world, subset=subset)
    assert caught.value.fields == {"annotations": 1, "drawn": drawn}
  assert list(world.parent.iterdir()) == [world]


def test_a_store_behind_a_link(world):
  disk = world.parent / "disk"
  for name in ("empty", "to be"):
    (world.parent / name).symlink_to(disk / name)
  (disk / "empty").mkdir(parents=True)
  for name in ("empty", "to be"):
    make(world, name)
    assert len(open_store(world.parent / name)) == 7 and (world.parent / name).is_symlink()
  assert sorted(p.name for p in disk.iterdir()) == ["empty", "to be"]


def test_a_folder_that_no_rename_can_replace_is_refused_at_once(world, monkeypatch):
  (world.parent / "out").mkdir()
  monkeypatch.setattr(os.path, "ismount", lambda path: path == world.parent / "out")
  with pytest.raises(StoreError) as caught:
    make(world)
  assert caught.value.fields == {"where": world.parent / "out", "mounted": True}
  assert sorted(p.name for p in world.parent.iterdir()) == ["data", "out"]


def test_contradicting_limits(world):
  with pytest.raises(LimitsError) as caught:
    make(world, settings=dataclasses.replace(SETTINGS, max_frames=12))
  assert caught.value.fields == {"min_frames": 8, "max_frames": 12}
  assert list(world.parent.iterdir()) == [world]


def test_jpeg(world):
  make(world, "raw")
  make(world, "jpeg", quality=95)
  raw, jpeg = (open_store(world.parent / name) for name in ("raw", "jpeg"))
  assert raw.identity() != jpeg.identity() and raw.info["checksum"] == jpeg.info["checksum"]
  for i in range(7):
    frame = raw.visual(i).reshape(-1, 16, 16, 3)[-1]
    file = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    np.testing.assert_array_equal(
      jpeg.visual(i).reshape(-1, 16, 16, 3)[-1], cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1]
    )
  inspection.verify(world.parent / "jpeg")


@pytest.mark.parametrize("workers", [0, 2])
def test_features(world, workers):
  make(world, "pixels")
  make(world, "out", tower=decoding.summing_tower(), workers=workers, samples_per_shard=3)
  pixels, store = open_store(world.parent / "pixels"), open_store(world.parent / "out")
  assert store.features == Features("sums", 2, 4)
  for i in range(7):
    wanted = np.stack(list(decoding.summing_tower().encode(pixels.visual(i))))
    np.testing.assert_array_equal(store.visual(i).view(np.uint16), wanted.view(np.uint16))
    assert store.samples[i].time_message == pixels.samples[i].time_message
  inspection.verify(world.parent / "out")


def test_features_resume(world):
  make(world, "whole", tower=decoding.summing_tower())
  tower, left = decoding.summing_tower(), [3]

  def failing(clips):
    if not left[0]:
      raise KeyboardInterrupt
    left[0] -= 1
    yield from tower.encode(clips)

  with pytest.raises(KeyboardInterrupt):
    make(world, tower=Tower(tower.features, tower.settings, failing))
  assert len(list((world.parent / "out.incomplete" / "spool").glob("*.records"))) == 3
  with pytest.raises(StoreError) as caught:
    make(world, tower=Tower(Features("others", 2, 4), tower.settings, tower.encode))
  assert caught.value.fields["changed"] == {"tower": ("sums", "others")}
  make(world, tower=tower)
  assert contents(world.parent / "out") == contents(world.parent / "whole")


def test_features_of_a_checkpoint(world):
  assets = pathlib.Path(__file__).parents[2] / "assets" / "tiny"
  settings = dataclasses.replace(SETTINGS, image_size=48)
  make(world, "pixels", settings=settings)
  tower = predecode.load_tower(str(assets), settings, 4)
  make(world, tower=tower, settings=settings)
  store, pixels = open_store(world.parent / "out"), open_store(world.parent / "pixels")
  assert (
    len(store.features.identity) == 32
    and store.features.tokens_per_frame == 16
    and store.features.width == 64
  )
  assert store.visual(0).shape == (2, 128, 64) and store.visual(4).shape == (1, 16, 64)
  direct = np.stack(list(tower.encode(iter(pixels.visual(0)))))
  assert np.ptp(direct.astype(np.float32)) > 0.1
  np.testing.assert_array_equal(store.visual(0).view(np.uint16), direct.view(np.uint16))
  with pytest.raises(ConfigError) as caught:
    predecode.load_tower(str(assets), SETTINGS, 4)
  assert caught.value.fields == {"where": str(assets), "allowed": 48, "value": 16}


def test_frames_are_of_the_size_that_is_given_or_tuned():
  assets = pathlib.Path(__file__).parents[2] / "assets"

  def settings(*line):
    return predecode.frame_settings(predecode.options().parse_args(line))

  assert settings() == settings("--features", f"--checkpoint={assets / 'tiny'}") == FrameSettings()
  tuned = "--features", f"--checkpoint={assets / 'study'}"
  assert settings(*tuned) == FrameSettings(clip_frames=2)
  given = settings(*tuned, "--clip-frames=4", "--image-size=48", "--keep-tails", "--rate=average")
  assert given == FrameSettings(clip_frames=4, image_size=48, keep_tails=True, rate="average")
  assert settings(f"--checkpoint={assets / 'study'}", "--fps=2", "--min-frames=16") == (
    FrameSettings(fps=2.0, min_frames=16)
  )


# Interrupted runs.


def test_other_work_is_not_continued(world):
  make_video(world / "videos" / "v1.mp4", 7)
  with pytest.raises(video.VideoError):
    make(world)
  before = contents(world.parent / "out.incomplete")
  with pytest.raises(StoreError, match=r"frames: raw there, jpeg 90 now.*--restart") as caught:
    make(world, quality=90)
  assert caught.value.fields["changed"] == {"frames": ("raw", "jpeg 90")}
  write(world / "part.jsonl", [{"video": "v0.mp4", "conversations": talk()}])
  with pytest.raises(StoreError) as caught:
    make(world)
  assert caught.value.fields["changed"].keys() == {"annotations 1, part.jsonl"}
  assert contents(world.parent / "out.incomplete") == before
  make_video(world / "videos" / "v1.mp4", 8)
  assert make(world, quality=90, restart=True)["quality"] == 90


@pytest.mark.parametrize(
  "plan", [None, "{}", "[]", "no JSON", '{"format": 2, "samples_per_shard": 4}']
)
def test_a_folder_of_another_program_is_left_alone(world, plan):
  folder = world.parent / "out.incomplete"
  folder.mkdir()
  (folder / "thesis.txt").write_text("all of it")
  if plan:
    (folder / "plan.json").write_text(plan)
  for restart in (False, True):
    with pytest.raises(StoreError) as caught:
      make(world, restart=restart)
    assert caught.value.fields == {"where": folder, "found": "other"}
  assert (folder / "thesis.txt").read_text() == "all of it"


def test_a_plan_that_was_half_written_is_no_other_programs(world):
  folder = world.parent / "out.incomplete"
  folder.mkdir()
  for name in ("lock", f"plan.json.{'0' * 32}.tmp"):
    (folder / name).touch()
  assert make(world)["samples"] == 7 and not folder.exists()


def test_one_run_at_a_time(world):
  folder = world.parent / "out.incomplete"
  folder.mkdir()
  with files.locked(folder / "lock", None), pytest.raises(StoreError) as caught:
    make(world)
  assert caught.value.fields == {"where": world.parent / "out", "taken": True}
  make(world)


def test_done_work_is_not_done_again(world):
  info = make(world)
  assert make(world, start=lambda _: pytest.fail("ran")) == info
  with pytest.raises(StoreError) as caught:
    make(world, subset=0.5, start=lambda _: pytest.fail("ran"))
  assert caught.value.fields == {"where": world.parent / "out", "found": info["plan"]}
  assert sorted(p.name for p in world.parent.iterdir()) == ["data", "out"]
  shutil.rmtree(world.parent / "out")
  (world.parent / "out").mkdir()
  (world.parent / "out" / "notes.txt").touch()
  with pytest.raises(StoreError) as caught:
    make(world)
  assert caught.value.fields == {"where": world.parent / "out", "found": "other"}


KILLER = """
import itertools, os, pathlib, sys
import decoding
from xcomp_jax.data import prompt  # before the forks: jax would come with threads
root, kinds = pathlib.Path(sys.argv[1]), ("rename", "replace", "unlink", "rmdir", "mkdir")
real = {kind: getattr(os, kind) for kind in kinds}

def go(out, last):
  pid = os.fork()
  if not pid:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    count = itertools.count()
    def wrap(kind):
      def step(*a, **k):
        if next(count) == last:
          os._exit(7)  # as if killed: nothing is cleaned up
        return real[kind](*a, **k)
      return step
    for kind in kinds:
      setattr(os, kind, wrap(kind))
    decoding.make(root, out, samples_per_shard=2, tower=decoding.summing_tower() if sys.argv[3] == "features" else None)
    os._exit(0)
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert go("whole", None) == 0
for n in itertools.count(0, int(sys.argv[2])):
  code = go(f"out{n}", n)
  assert code in (0, 7), code
  assert go(f"out{n}", None) == 0, n
  if code == 0:
    break
print(n)
"""  # noqa: E501


@pytest.mark.parametrize("kind", ["frames", "features"])
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_a_change_of_the_file_system(world, stride, kind):
  mixture(
    world,
    {"json_path": "images.json"},
    {"json_path": "part.jsonl"},
    {"json_path": "gifs.json", "video_read_type": "gif"},
  )
  here = str(pathlib.Path(decoding.__file__).parent)
  code = f"import sys; sys.path.insert(0, {here!r})\n{KILLER}"
  done = decoding.run([sys.executable, "-c", code, str(world), str(stride), kind])
  assert done.returncode == 0, done.stderr
  steps = int(done.stdout.split()[-1])
  assert steps > 20
  whole = contents(world.parent / "whole")
  for n in range(0, steps + 1, stride):
    assert contents(world.parent / f"out{n}") == whole, n
  assert not list(world.parent.glob("*.incomplete"))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants(world, kills):
  """SIGKILL to the command; its processes die with it, and the result is that of a run in peace."""
  make_video(world / "videos" / "long.mp4", 600)
  write(
    world / "videos.json",
    [
      {"id": i, "video": "long.mp4", "start": i, "end": i + 30, "conversations": talk()}
      for i in range(24)
    ],
  )
  make(world, "whole", workers=2, samples_per_shard=5)
  rng = random.Random(kills)
  folder, codes = world.parent / "out.incomplete", []

  def done() -> int:
    try:
      return 5 * len(list(folder.glob("shards/*.json"))) + len(list(folder.glob("spool/*.records")))
    except FileNotFoundError:  # the folder goes while it is read
      return 99

  for kill in range(kills):
    if (world.parent / "out").exists():
      shutil.rmtree(world.parent / "out")
    process = command(
      world,
      "--workers=2",
      "--samples-per-shard=5",
      start=subprocess.Popen,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )
    enough = rng.randrange(0, 30)
    wait_for(lambda process=process, enough=enough: done() >= enough or process.poll() is not None)
    # what comes before the first sample takes longest
    time.sleep(rng.uniform(0, 0.1 if enough else 3))
    process.kill()
    codes.append(process.wait())
    try:
      wait_for(lambda process=process: not group_lives(process.pid), 20)
    finally:
      # the group of its own session: what this test started, nothing else
      if group_lives(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    if kill % 2:  # every other time the next kill hits a run that continues
      assert command(world, "--workers=2", "--samples-per-shard=5").returncode == 0
      assert contents(world.parent / "out") == contents(world.parent / "whole")
      assert not folder.exists()
  last = command(world, "--workers=2", "--samples-per-shard=5")
  assert last.returncode == 0, last.stderr
  assert contents(world.parent / "out") == contents(world.parent / "whole")
  assert -signal.SIGKILL in codes


def test_interrupt(world):
  make_video(world / "videos" / "long.mp4", 3000)
  write(world / "videos.json", [{"video": "long.mp4", "conversations": talk()}] * 200)
  # in the background it is ignored, also by children
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = command(
    world,
    "--workers=1",
    start=subprocess.Popen,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  signal.signal(signal.SIGINT, before)
  spool = world.parent / "out.incomplete" / "spool"
  wait_for(lambda: spool.exists() and list(spool.glob("*.records")))
  os.killpg(process.pid, signal.SIGINT)  # to the processes as well, as a terminal does
  _, err = process.communicate(timeout=60)
  assert (
    process.returncode == 130 and "the same command continues" in err and "Traceback" not in err
  )
  wait_for(lambda: not group_lives(process.pid), 20)


# What can happen in a decoding process.


def test_decoding_processes_load_little(world, tmp_path):
  code = f"""
import sys
from xcomp_jax.data import decode_jobs, mixture, sampling, store
sample = store.StoredSample(
  id="", source="{world}/videos/still ü.png", annotation="", position=0, conversations=(),
  time_message="",
)
job = mixture.Job(
  sample=sample, reader="img", start=None, end=None, frame_rate=None, faults=()
)
settings, layout = sampling.FrameSettings(image_size=16), store.Layout(16, 8, None, None)
print(decode_jobs.decode_job(job, settings, layout, "{tmp_path}/spool"))
heavy = {{"jax", "tensorflow", "tensorflow_datasets", "cv2", "tqdm", "tokenizers"}}
print(heavy & {{name.split(".")[0] for name in sys.modules}})
"""
  assert decoding.run([sys.executable, "-c", code]).stdout == "(0, True)\nset()\n"


DEEDS = {
  "sleep": r"took more than 8 seconds",
  "kill": r"process died \(SIGKILL\), also when tried again alone",
}


@pytest.mark.parametrize(("deed", "message"), DEEDS.items())
def test_a_decoder_that_hangs_or_dies_costs_one_sample(world, deed, message):
  jobs, _ = read_mixture(world / "mixture.yaml", world, 1.0)
  trap = decoding.Trap(**vars(jobs[1].sample), deed=deed)
  jobs[1] = dataclasses.replace(jobs[1], sample=trap)
  work = decode_jobs.Work(
    folder=world.parent / "work",
    settings=SETTINGS,
    layout=Layout(16, 8, None, None),
    jobs=dict(enumerate(jobs)),
    count=len(jobs),
    per_shard=4,
  )
  work.folder.mkdir()
  assert decode_jobs.prepare_work(work, True) == 0
  decode_jobs.decode_shards(work, work.shards, workers=2, timeout=8.0, skip_bad=True)
  entries = decode_jobs.entries(work)
  assert [i for i, entry in enumerate(entries) if "reason" in entry] == [1]
  assert re.search(message, entries[1]["reason"]) and entries[1]["reason"].startswith(
    str(world / "videos")
  )
  assert not list(work.folder.rglob("*.tmp")) and not list((work.folder / "spool").iterdir())


def test_what_a_process_died_at_is_tried_again_alone(world):
  company = []

  class Pool(processes.Here):
    """Two processes, of which each that decodes the third annotation dies."""

    def __init__(self):
      super().__init__()
      self.calls = []

    def call(self, *call, timeout=None):
      self.calls.append(call)

    def ended(self):
      key, function, *args = self.calls.pop(0)
      if key == ("job", 2):
        company.append(len(self.calls) + 1)
        return [(key, None, processes.DiedError(-9))]
      super().call(key, function, *args)
      return super().ended()

  assert make(world, workers=2, skip_bad=True, start=lambda _: Pool())["samples"] == 6
  assert company == [4, 1]


def starting(line, life=decode_jobs.LIFE):
  """Starts processes for decoding by another line of Python; gives them, and what starts them."""
  pools = []

  def start(workers):
    pools.append(processes.Processes(workers, life, decode_jobs.__name__, line))
    return pools[-1]

  return pools, start


@pytest.mark.pure
@pytest.mark.parametrize("code, how", [(-9, "SIGKILL"), (-35, "signal 35"), (3, "exit code 3")])
def test_how_a_process_died_is_said_whatever_ended_it(code, how):
  assert str(processes.DiedError(code)) == f"its process died ({how})"


def test_too_little_memory_costs_one_sample(world):
  Image.new("RGB", (7000, 7000)).save(world / "videos" / "large.png", compress_level=1)
  write(
    world / "images.json",
    [
      {"image": name, "conversations": talk()}
      for name in ("still ü.png", "large.png", "still ü.png")
    ],
  )
  mixture(world, {"json_path": "images.json"})
  limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (400_000_000, 400_000_000))"
  _, start = starting(f"{limit}; {processes.CODE}")
  assert make(world, workers=2, skip_bad=True, start=start)["samples"] == 2
  (reason,) = [line["reason"] for line in manifest(world.parent / "out") if "reason" in line]
  assert "large.png: " in reason and "memory" in reason and "tried again alone" in reason


def test_processes_that_can_not_start_are_no_fault_of_the_videos(world):
  with pytest.raises(StoreError) as caught:
    make(world, workers=2, start=starting("exit(3)")[1])
  assert isinstance(caught.value.__cause__, processes.StartError)
  assert caught.value.__cause__.fields == {"code": 3}
  assert not list((world.parent / "out.incomplete" / "spool").iterdir())


def test_the_program_that_decodes_is_not_run_by_its_processes(world):
  here, script = str(pathlib.Path(decoding.__file__).parent), world.parent / "script.py"
  script.write_text(
    f"import pathlib, sys\nsys.path.insert(0, {here!r})\nimport "
    f"decoding\nprint(decoding.make(pathlib.Path({str(world)!r}), workers=2)['samples'])\n"
  )
  assert decoding.run([sys.executable, str(script)]).stdout == "7\n"


def test_processes_are_renewed_one_by_one_by_the_frames_of_videos(world):
  # 100 frames of videos; there are 27 to 67 in each file that is decoded
  pools, start = starting(processes.CODE, life=100)
  mixture(
    world,
    {"json_path": "images.json"},
    {"json_path": "gifs.json", "video_read_type": "gif"},
    {"json_path": "folders.json", "video_read_type": "img"},
  )
  make(world, "stills", workers=2, start=start)
  assert pools[0].lives == [50, 100]  # none of them was replaced
  write(
    world / "videos.json",
    [{"id": i, "video": "v0.mp4", "conversations": talk()} for i in range(8)],
  )
  mixture(world, {"json_path": "videos.json"})
  make(world, "videos", workers=1, start=start)  # eight times 38 frames
  assert pools[1].lives == [100, 100, 100]


def test_a_process_without_life_left_gets_no_more_calls():
  pool, busy = processes.Processes(1, 2, decoding.__name__), 8
  try:
    for i in range(busy):
      pool.call(i, decoding.nap)
    ended = []
    while len(ended) < busy:
      ended += pool.ended()
  finally:
    pool.stop()
  assert not [error for _, _, error in ended if error]
  # the call that has used up the rest of its life, and the one that was sent meanwhile
  assert max(collections.Counter(value for _, value, _ in ended).values()) <= 3


@pytest.mark.parametrize("harm", ["empty", "short", "flipped"])
def test_what_a_stopped_machine_has_lost_is_decoded_again(world, harm):
  make(world, "whole")
  good = (world / "videos" / "v1.mp4").read_bytes()
  make_video(world / "videos" / "v1.mp4", 7)
  with pytest.raises(video.VideoError):
    make(world)
  (world / "videos" / "v1.mp4").write_bytes(good)
  for file in (world.parent / "out.incomplete" / "spool").glob("*.records"):
    content = file.read_bytes()
    flipped = bytes([content[0] ^ 1]) + content[1:]
    file.write_bytes({"empty": b"", "short": content[:-30], "flipped": flipped}[harm])
  make(world)
  assert contents(world.parent / "out") == contents(world.parent / "whole")


def test_a_full_disk_is_no_fault_of_a_video(world, monkeypatch):
  real, left = os.fsync, [9]

  def fsync(handle):
    left[0] -= 1
    if left[0] < 0:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(handle)

  monkeypatch.setattr(os, "fsync", fsync)
  with pytest.raises(OSError) as caught:
    make(world, skip_bad=True)
  assert caught.value.errno == errno.ENOSPC
  monkeypatch.setattr(os, "fsync", real)
  assert make(world)["samples"] == 7


def test_the_store_takes_its_name_when_all_of_it_is_on_the_disk(world, monkeypatch):
  synced, named = [], []
  sync, rename = os.fsync, os.rename
  monkeypatch.setattr(
    os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), sync(handle))[1]
  )
  monkeypatch.setattr(os, "rename", lambda *a: (named.append((a[1], list(synced))), rename(*a))[1])
  make(world)
  last, before = named[-1]
  files = [p for p in (world.parent / "out").rglob("*") if p.is_file()]
  assert (
    last == world.parent / "out"
    and len(files) == 8
    and {p.stat().st_ino for p in files} <= set(before)
  )


class Full:
  """A writer of records on a full disk, which says so when it is closed."""

  def write(self, record):
    pass

  def close(self):
    raise RuntimeError("close() failed: No space left on device")


@pytest.mark.parametrize("file", ["shards", "samples"])
def test_a_disk_that_is_full_of_records(world, monkeypatch, file):
  real = store_writing.array_record
  monkeypatch.setattr(
    store_writing, "array_record", lambda path: Full() if file in str(path) else real(path)
  )
  with pytest.raises(
    OSError, match=rf"{file}/.* can't be written: close\(\) failed: No space left on device"
  ):
    make(world)
  monkeypatch.undo()
  assert make(world)["samples"] == 7


# The command.


def test_command(world):
  done = command(world, "--workers=1", "--subset=1.0")
  assert done.returncode == 0, done.stderr
  # of less than half a minute a log has no line
  assert done.stdout.endswith("out: 7 samples, 65 frames, 0 skipped\n") and not done.stderr
  assert len(open_store(world.parent / "out")) == 7
  again = command(world, "--workers=0", "--fps=4")
  assert (
    again.returncode == 1
    and again.stderr.startswith("error: ")
    and "already exists" in again.stderr
  )


def test_command_with_a_bad_annotation(world):
  write(world / "videos.json", [{"video": "v7.mp4", "conversations": talk()}])
  done = command(world, "--workers=0")
  assert done.returncode == 1 and done.stderr.startswith("error: 1 bad annotation")
  assert "Traceback" not in done.stderr and "v7.mp4 does not exist" in done.stderr
  assert list(world.parent.iterdir()) == [world]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--mixture=m.yaml"], "--out is missing"),
    (["--out=o"], "--mixture is missing"),
    ([], "--mixture is missing"),
    (["--verify=nowhere"], "no data at nowhere"),
    (["--mixture=m.yaml", "--out=o", "--dtype=float32"], "--dtype goes with --features"),
    (["--mixture=m.yaml", "--out=o", "--attention=einsum"], "--attention goes with --features"),
    (["--mixture=m.yaml", "--out=o", "--features"], "--features needs --checkpoint"),
    (
      ["--mixture=m", "--out=o", "--features", "--checkpoint=c", "--beam", "--runner=R"],
      "--features needs --checkpoint DIR, and goes neither with",
    ),
  ],
)
def test_options_that_do_not_go_together(tmp_path, monkeypatch, capsys, options, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as ended:
    predecode.main(options)
  assert ended.value.code == 1
  assert re.match(f"error: .*{re.escape(message)}", capsys.readouterr().err)
  assert not list(tmp_path.iterdir())


@pytest.mark.pure
@pytest.mark.parametrize(
  "options", [["--verify=a", "--inspect=b"], ["--out=a", "--verify=b"], ["word"], ["--imagine=3"]]
)
def test_options_that_there_are_not(capsys, options):
  with pytest.raises(SystemExit) as ended:
    predecode.main(options)
  assert ended.value.code == 2 and options[-1].split("=")[0] in capsys.readouterr().err


def test_options_may_be_spelled_with_underscores_for_a_while(world, capsys):
  line = ["--mixture", str(world / "mixture.yaml"), "--root", str(world), "--workers=0"]
  line += ["--out", str(world.parent / "out"), "--image_size=16", "--min_frames", "8", "--skip_bad"]
  predecode.main([*line, "--max-frames=16"])
  said = capsys.readouterr().err.splitlines()
  assert [line for line in said if "hyphens" in line] == [
    "options have hyphens now: write --image-size for --image_size, --min-frames for --min_frames, "
    "--skip-bad for --skip_bad"
  ]
  make(world, "same", skip_bad=True)
  assert contents(world.parent / "out") == contents(world.parent / "same")


def test_beam_needs_paths_that_all_workers_have(world):
  with pytest.raises(StoreError) as caught:
    predecode_lib.predecode(world / "mixture.yaml", world.parent / "out", SETTINGS, beam=[])
  assert caught.value.fields == {"where": "--root", "value": "."}


def test_without_beam_the_message_says_what_to_install(world, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(ValueError, match=r"pip install 'xcomp_jax\[beam\]'"):
    make(world, beam=[])


# Looking at a store.


def differences(out) -> list[str]:
  """What `verify` finds in a store."""
  with pytest.raises(StoreError) as caught:
    inspection.verify(out)
  assert str(caught.value).startswith(f"{out} differs from its manifest:\n  ")
  return caught.value.fields["differences"]


def test_verify_finds_what_has_changed(world, capsys):
  out = world.parent / "out"
  write(
    world / "images.json",
    [
      {"image": "v7.png", "conversations": talk()},
      {"id": "i", "image": "still ü.png", "conversations": talk()},
    ],
  )
  make(world, samples_per_shard=3, skip_bad=True)
  inspection.verify(out)
  assert (
    capsys.readouterr().out == f"{out}: 7 samples, 65 frames, 1 skipped; all as the manifest says\n"
  )
  lines = (out / "manifest.jsonl").read_text()
  for old, new, message in [
    (r'"crc32": \d+', '"crc32": 5', r"sample 0 .*v0\.mp4\): its clips are not those"),
    (r'"frames": 16', '"frames": 8', "sample 0: frames is 16, written was 8"),
    (r'"sample": 0', '"sample": 9', "sample 0 is not in"),
    (r'"crc32": \d+', '"crc32": 5', "store.json: its content is not that of manifest.jsonl"),
    (r'\{.*"reason".*\n', "", "store.json: the counts of images.json are not those"),
  ]:
    (out / "manifest.jsonl").write_text(re.sub(old, new, lines, count=1))
    assert any(re.match(message, one) for one in differences(out)), message
  for line in ("{}", "3", '{"annotation": "a", "position": 1, "source": ""}'):
    (out / "manifest.jsonl").write_text(lines + line)
    with pytest.raises(StoreError) as caught:
      inspection.verify(out)
    assert caught.value.fields == {"where": out / "manifest.jsonl", "line": 9}
  (out / "manifest.jsonl").write_text(lines)
  info = json.loads((out / "store.json").read_text())
  (out / "store.json").write_text(json.dumps(info | {"checksum": 1}))
  assert differences(out) == [
    "samples/: ids, frame counts or texts are not those that were written"
  ]
  (out / "store.json").write_text(json.dumps(info))
  clips = next((out / "clips").glob("*-00001-of-*"))
  damaged = bytearray(clips.read_bytes())
  middle = len(damaged) // 2
  damaged[middle : middle + 64] = bytes(64)
  clips.write_bytes(damaged)
  assert all(
    re.search(r"sample [345] .*(can't be read|its clips are not)", one) for one in differences(out)
  )
  (out / "manifest.jsonl").unlink()
  with pytest.raises(StoreError) as caught:
    inspection.verify(out)
  assert caught.value.fields == {"where": out / "manifest.jsonl", "missing": True}


def test_inspect(world, capsys):
  write(
    world / "images.json",
    [
      {"image": "v7.png", "conversations": talk()},
      {"id": "i", "image": "still ü.png", "conversations": talk()},
    ],
  )
  make(world, skip_bad=True)
  sheet = world.parent / "sheet.png"
  inspection.inspect(world.parent / "out", sheet, 1, "assistant", None)
  text = capsys.readouterr().out
  assert (
    "raw frames of 16 x 16 in clips of 8" in text
    and "7 samples (6 videos, 1 image), 65 frames" in text
  )
  assert re.search(r"\n +1 +1  #+\n +8 to 15 +4  #+\n +16 to 31 +2  #+\n", text)
  assert (
    "images.json: annotations 2, drawn 2, selected 2, written 1, skipped 1" in text
    and "v7.png does not exist" in text
  )
  assert "<|im_start|>user\n<8 frames>\nThe video lasts for 1.50 seconds, and 8 frames" in text
  assert "<|im_start|>assistant\n⟦That.<|im_end|>⟧" in text
  image = cv2.imread(str(sheet))
  assert image[:18, : inspection.THUMBNAIL].min() < 128  # the line above the frames
  assert image.shape == (7 * (inspection.THUMBNAIL + 18), 8 * inspection.THUMBNAIL, 3)
  top = image[18 + 20, 20]  # inside the first frame of the first row
  frame = inspection.video.resize(
    open_store(world.parent / "out").visual(0)[0, 1:2], inspection.THUMBNAIL - 2
  )[0]
  np.testing.assert_array_equal(top[::-1], frame[20, 19])


def test_the_bytes_tokenizer_shows_every_text(world):
  tokenizer = inspection.bytes_tokenizer()
  text = "Wie heißt 'das'? 🐕\n<|im_end|>"
  assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text
  assert tokenizer.decode(tokenizer.encode(text)) == text.removesuffix("<|im_end|>")


@pytest.mark.pure
@pytest.mark.parametrize("said", ["nan", "inf", "0", "1001", "x"])
def test_numbers_of_options_have_bounds_that_are_said(said, capsys):
  with pytest.raises(SystemExit):
    predecode.main([f"--fps={said}"])
  assert f"{said}: must be a number from 0.001 to 1,000.0" in capsys.readouterr().err


def test_a_video_that_is_cut_off_is_left_out_or_kept_as_far_as_it_goes(tmp_path):
  (tmp_path / "world" / "videos").mkdir(parents=True)
  root = tmp_path / "world"
  for name in ("whole", "cut", "zeros"):
    odd.write(root / "videos" / f"{name}.mp4", 100, g="10", container={"movflags": "faststart"})
  data = (root / "videos" / "cut.mp4").read_bytes()
  (root / "videos" / "cut.mp4").write_bytes(data[: int(len(data) * 0.7)])
  (root / "videos" / "zeros.mp4").write_bytes(
    data[: int(len(data) * 0.7)] + bytes(len(data) - int(len(data) * 0.7))
  )
  write(
    root / "videos.json",
    [{"video": f"{name}.mp4", "conversations": talk()} for name in ("whole", "cut", "zeros")],
  )
  mixture(root, {"json_path": "videos.json"})
  info = make(root, "without", skip_bad=True)
  assert (info["samples"], info["skipped"]) == (1, 2)
  reasons = sorted(line["reason"] for line in manifest(tmp_path / "without") if "reason" in line)
  assert (
    "cut.mp4 is truncated: it announces 100 frames" in reasons[0]
    and "seconds can't be decoded" in reasons[1]
  )
  info = make(root, "kept", settings=dataclasses.replace(SETTINGS, keep_tails=True))
  assert (info["samples"], info["skipped"], info["keep_tails"]) == (3, 0, True)
  seconds = {
    pathlib.Path(s.source).stem: float(re.search(r"lasts for ([\d.]+)", s.time_message)[1])
    for s in open_store(tmp_path / "kept").samples
  }
  assert seconds["whole"] == 4.0 and 1 < seconds["cut"] < 3 and 1 < seconds["zeros"] < 3


@pytest.mark.parametrize("tower", [None, decoding.summing_tower()])
def test_what_is_passed_over_is_counted_and_text_is_taken_where_it_is_wanted(world, capsys, tower):
  items = [
    {"video": "v0.mp4"},
    {"conversations": talk("Why?")},
    {"image": ["a.png", "b.png"]},
    {"video": None, "conversations": talk("How?")},
  ]
  write(world / "videos.json", [{"conversations": talk()} | item for item in items])
  write(world / "part.jsonl", [{"conversations": talk("Where?")}])
  mixture(world, {"json_path": "videos.json"}, {"json_path": "part.jsonl", "text_samples": True})
  made = make(world, tower=tower)
  first, second = made["annotation_files"]
  assert (
    first["passed_over"] == {"text alone": 2, "several images or videos": 1}
    and second["passed_over"] == {}
  )
  assert made["samples"] == 2 and made["frames"] == 16 and made["skipped"] == 0
  data = open_store(world.parent / "out")
  assert [s.conversations[0]["value"] for s in data.samples] == ["<image>\nWhat?", "Where?"]
  assert (
    data.samples[1].frames == 0 and data.visual(1).shape[0] == 0 and data.samples[1].source == ""
  )
  inspection.verify(world.parent / "out")
  manifest = world.parent / "out" / "manifest.jsonl"
  lines = [json.loads(line) for line in manifest.read_text().splitlines()]
  assert [(line["position"], line["passed_over"]) for line in lines[2:]] == [
    (1, "text alone"),
    (2, "several images or videos"),
    (3, "text alone"),
  ]
  assert (
    "videos.json: annotations 4, drawn 4, selected 1, written 1, skipped 0, 2 passed over: text "
    "alone, 1 passed over: several" in "\n".join(inspection.describe_store(data))
  )
  manifest.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
  with pytest.raises(StoreError) as caught:
    inspection.verify(world.parent / "out")
  assert caught.value.fields["differences"] == [
    "store.json: what was passed over is not as in manifest.jsonl"
  ]


def test_unfinished_work_goes_on_with_its_own_shards(world):
  (world / "videos" / "v1.mp4").rename(world / "v1")
  make_video(world / "videos" / "v1.mp4", 7)
  with pytest.raises(video.VideoError):
    make(world, samples_per_shard=2)
  (world / "v1").rename(world / "videos" / "v1.mp4")
  with pytest.raises(StoreError) as caught:
    make(world, samples_per_shard=3)
  assert caught.value.fields["changed"] == {"samples_per_shard": (2, 3)}
  info = make(world)
  assert (
    info["samples_per_shard"] == 2
    and len(list((world.parent / "out" / "clips").glob("*.array_record*"))) == 4
  )
  assert make(world) == info == make(world, samples_per_shard=2)
  with pytest.raises(StoreError) as caught:
    make(world, samples_per_shard=5)
  assert caught.value.fields["found"] == info["plan"]
  assert make(world, "new")["samples_per_shard"] == 256


def test_a_store_that_does_not_say_was_made_with_shards_of_64(world):
  info = make(world, samples_per_shard=64)
  del info["samples_per_shard"]  # as before it was written
  (world.parent / "out" / "store.json").write_text(json.dumps(info))
  assert make(world) == info


def test_bad_annotations_are_listed_in_the_order_of_their_files(world):
  files = {"images.json": 3, "videos.json": 12}
  for name, count in files.items():
    write(world / name, [{"video": f"{i}.mp4", "conversations": talk()} for i in range(count)])
  mixture(world, *({"json_path": name} for name in files))
  with pytest.raises(prompt.AnnotationError) as caught:
    make(world)
  found = [
    re.match(r"(\S+), annotation (\d+): ", one).groups() for one in caught.value.fields["bad"]
  ]
  assert found == [(name, str(i)) for name, count in files.items() for i in range(count)]


def test_too_many_open_files_are_no_fault_of_a_video(world, monkeypatch):
  full = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "v0.mp4")

  def fail(*_, **__):
    raise full

  monkeypatch.setattr(video, "sample", fail)
  with pytest.raises(OSError, match=r"^Too many open files: a process may have"):
    make(world, skip_bad=True)
  monkeypatch.undo()
  assert make(world)["skipped"] == 0


def test_verify_tells_too_many_open_files_as_such(world, monkeypatch):
  make(world)

  def read(self, index):
    raise RuntimeError("open() failed: Too many open files; opening clips")

  monkeypatch.setattr(inspection.Store, "stored", read)
  with pytest.raises(OSError, match=r"^Too many open files: a process may have"):
    inspection.verify(world.parent / "out")
