"""predecode.py: which annotations are read, what is refused, and the command as a whole."""

import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from xcomp_jax import predecode as predecode_lib
from xcomp_jax.data import prompt, video
from xcomp_jax.data.prompt import AnnotationError
from xcomp_jax.data.store import StoreError, open_store
from xcomp_jax.predecode import Settings, predecode, read_annotations, read_mixture, select

SETTINGS = Settings(image_size=16, max_frames=16, min_frames=8, fps=8.0, clip_frames=8)
SAMPLING = {"max_frames": 16, "min_frames": 8, "fps": 8.0, "clip_frames": 8, "style": "train", "size": 16}


def talk(question: str = "<image>\nWhat?") -> list[dict]:
  return [{"from": "human", "value": question}, {"from": "gpt", "value": "That."}]


def make_video(path: pathlib.Path, frames: int, seed: int = 0) -> pathlib.Path:
  rng = np.random.default_rng(seed)
  writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8, (48, 32))
  for _ in range(frames):
    writer.write(np.kron(rng.integers(0, 256, (4, 6, 3), np.uint8), np.ones((8, 8, 1), np.uint8)))
  writer.release()
  return path


@pytest.fixture
def world(tmp_path):
  """A folder with videos, an image, a gif, a folder of frames, and a mixture of all of them."""
  root = tmp_path / "data"
  (root / "videos" / "steps").mkdir(parents=True)
  for i, frames in enumerate((40, 8, 19)):
    make_video(root / "videos" / f"v{i}.mp4", frames, i)
  colours = np.random.default_rng(9).integers(0, 256, (11, 20, 30, 3), np.uint8)
  images = [Image.fromarray(c) for c in colours]
  images[0].save(root / "videos" / "still ü.png")
  images[0].save(root / "videos" / "move.gif", save_all=True, append_images=images[1:])
  for i, image in enumerate(images):
    image.save(root / "videos" / "steps" / f"{i}.png")

  write(root / "videos.json", [{"id": i, "video": f"v{i}.mp4", "conversations": talk()} for i in range(3)])
  write(root / "part.jsonl", [{"video": "v0.mp4", "start": 1, "end": 2.5, "conversations": talk()}])
  write(root / "images.json", [{"id": "i", "image": "still ü.png", "conversations": talk("Was?\n<image>")}])
  write(root / "gifs.json", [{"video": "move.gif", "conversations": talk()}])
  write(root / "folders.json", [{"video": "steps", "conversations": talk()}])
  mixture(
    root, {"json_path": "videos.json", "sampling_strategy": "all"}, {"json_path": "part.jsonl"}, {"json_path": "images.json"},
    {"json_path": "gifs.json", "video_read_type": "gif"}, {"json_path": "folders.json", "video_read_type": "img"},
  )
  return root


def write(path: pathlib.Path, items: list) -> None:
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
  else:
    path.write_text(json.dumps(items))


def mixture(root: pathlib.Path, *datasets: dict) -> None:
  (root / "mixture.yaml").write_text(yaml.safe_dump({"datasets": [{"data_root": "videos"} | d for d in datasets]}))


def make(root, out="out", **changes):
  return predecode(root / "mixture.yaml", root.parent / out, SETTINGS, root=root, **changes)


def by_the_book(items, strategy, subset):
  """FACTS.md 14, sentence by sentence."""
  items = list(items)
  random.seed(12345)
  random.shuffle(items)
  if strategy != "all":
    kind, amount = strategy.split(":")
    n = math.ceil(float(amount.rstrip("%")) * len(items) / 100) if "%" in amount else int(amount)
    if kind == "first":
      items = items[0:n]
    elif kind == "end":
      items = items[-n:]
    else:
      k = int(kind.removeprefix("first"))
      items = items[(k - 1) * n : k * n]
  random.seed(42)
  random.shuffle(items)
  items = items[int(len(items) * 0) : int(len(items) * subset)]
  return [i for i in items if ("image" in i) != ("video" in i) and not isinstance(i.get("image", i.get("video")), list)]


@pytest.mark.parametrize("subset", [0.25, 1.0])
@pytest.mark.parametrize(
  "strategy", ["all", "first:25%", "first:7", "first2:10%", "first2:2.5%", "first2:1%", "first3:4", "first6:10%", "end:9", "end:30%"]
)
def test_selection_of_sct(strategy, subset):
  for n in (0, 1, 9, 173):
    items = [{"n": i, "video": f"{i}.mp4"} for i in range(n)]
    for i in range(0, n, 11):
      items[i] = ({"n": i, "image": ["a", "b"]}, {"n": i, "image": "a", "video": "b"}, {"n": i}, {"n": i, "image": "a"})[i // 11 % 4]
    assert [items[i] for i in select(items, strategy, subset)] == by_the_book(items, strategy, subset)


def test_selection_leaves_the_random_state_alone(monkeypatch):
  # not by comparing states: the checker of types draws from the same generator
  for name in ("seed", "shuffle"):
    monkeypatch.setattr(random, name, lambda *a: pytest.fail("the process's own generator was used"))
  assert len(select([{"video": "a"}] * 9, "first:3")) == 3


@pytest.mark.parametrize("strategy", ["some", "first", "first:", "first:a", "first0:10%", "end2:10%", "first:-3", "last:3", "first:1.5"])
def test_unknown_strategy(strategy):
  with pytest.raises(AnnotationError, match="write all, first:100"):
    select([{"video": "a"}] * 9, strategy)


def test_mixture_becomes_a_store(world):
  info = make(world)
  store = open_store(world.parent / "out")
  assert store.made_with() == "fps 8.0, min_frames 8, max_frames 16, subset 1.0"
  # one shuffle by seed 12345, one by 42; three items
  order = [i["id"] for i in by_the_book(json.loads((world / "videos.json").read_text()), "all", 1.0)]
  assert [s.id for s in store.samples] == [*map(str, order), "0", "i", "0", "0"]
  assert [s.annotation for s in store.samples] == ["videos.json"] * 3 + ["part.jsonl", "images.json", "gifs.json", "folders.json"]
  names = [*(f"v{i}.mp4" for i in order), "v0.mp4", "still ü.png", "move.gif", "steps"]
  cuts = [{}] * 3 + [{"start": 1.0, "end": 2.5}] + [{}] * 3
  kinds = ["video"] * 4 + ["img", "gif", "frames"]
  for i, (name, cut, kind) in enumerate(zip(names, cuts, kinds, strict=True)):
    loaded = video.load(world / "videos" / name, read_type=kind, **cut, **SAMPLING)
    got = store.visual(i)
    assert got.shape[1] == (1 if kind == "img" else 8)
    np.testing.assert_array_equal(got.reshape(loaded.frames.shape), loaded.frames)
    message = "" if kind == "img" else prompt.time_message(loaded.seconds, len(loaded.frames))
    assert store.samples[i].time_message == message
    assert store.samples[i].source == str(world / "videos" / name)
  assert [s.frames for s in store.samples] == [{40: 16, 8: 8, 19: 16}[(40, 8, 19)[i]] for i in order] + [8, 1, 8, 8]
  assert list(store.samples[4].conversations) == talk("Was?\n<image>")
  assert info == store.info and info["skipped"] == [] and info["samples"] == 7 and info["clip_frames"] == 8
  assert info["annotation_files"][0] == {"annotation": "videos.json", "annotations": 3, "selected": 3}


def test_same_store_for_any_number_of_processes(world, capfd):
  for workers in (0, 2):
    make(world, f"out{workers}", workers=workers, samples_per_shard=2)
  assert "7/7" in capfd.readouterr().err  # the bar reaches its end
  files = [sorted(p for p in (world.parent / f"out{w}").rglob("*") if p.is_file()) for w in (0, 2)]
  assert len(files[0]) > 8
  for a, b in zip(*files, strict=True):
    assert a.relative_to(world.parent / "out0") == b.relative_to(world.parent / "out2")
    if "array_record" in a.name or a.name == "store.json":
      assert a.read_bytes() == b.read_bytes()


BAD = {
  "no conversations": ({"video": "v0.mp4"}, "needs conversations"),
  "empty conversations": ({"video": "v0.mp4", "conversations": []}, "needs conversations"),
  "a text": ({"video": "v0.mp4", "conversations": "talk"}, "needs conversations"),
  "two slots": ({"video": "v0.mp4", "conversations": talk("<image><image>What?")}, "2 <image>"),
  "slot in the answer": ({"video": "v0.mp4", "conversations": [talk("What?")[0], {"from": "gpt", "value": "<image>"}]}, "in a question"),
  "no slot": ({"video": "v0.mp4", "conversations": talk("What?")}, "0 <image>"),
  "no answer": ({"video": "v0.mp4", "conversations": talk()[:1]}, "ends without an answer"),
  "unknown role": ({"video": "v0.mp4", "conversations": [{"from": "bot", "value": "<image>"}]}, "known: human, gpt"),
  "no such video": ({"video": "v7.mp4", "conversations": talk()}, r"v7\.mp4 does not exist"),
  "no such image": ({"image": "v7.png", "conversations": talk()}, r"v7\.png does not exist"),
  "folder": ({"video": "steps", "conversations": talk()}, "steps is a folder"),
  "no path": ({"video": "", "conversations": talk()}, "video must be a path, not ''"),
  "path of another kind": ({"image": None, "conversations": talk()}, "image must be a path, not None"),
  "negative start": ({"video": "v0.mp4", "start": -1, "conversations": talk()}, "start -1 and end None"),
  "inverted": ({"video": "v0.mp4", "start": 2, "end": 1, "conversations": talk()}, "0 <= start < end"),
  "words": ({"video": "v0.mp4", "start": "1:00", "conversations": talk()}, "must be seconds"),
}


def test_bad_annotations_are_all_listed_before_anything_is_decoded(world, monkeypatch):
  monkeypatch.setattr(predecode_lib.video, "load", lambda *a, **k: pytest.fail("decoded"))
  write(world / "bad.json", [item for item, _ in BAD.values()])
  mixture(world, {"json_path": "bad.json"}, {"json_path": "videos.json"})
  with pytest.raises(AnnotationError, match=f"{len(BAD)} bad annotations") as error:
    make(world)
  lines = str(error.value).splitlines()[1:]
  assert len(lines) == len(BAD) and list(world.parent.iterdir()) == [world]
  for i, (_, message) in enumerate(BAD.values()):
    (line,) = [line for line in lines if line.startswith(f"  bad.json, annotation {i}: ")]
    assert re.search(message, line)


def test_skip_bad_lists_what_is_left_out(world):
  (world / "videos" / "empty.mp4").touch()
  make_video(world / "videos" / "short.mp4", 7)
  whole = (world / "videos" / "v0.mp4").read_bytes()
  (world / "videos" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
  broken = [{"video": f"{name}.mp4", "conversations": talk()} for name in ("empty", "short", "cut")]
  write(world / "bad.json", [item for item, _ in BAD.values()] + broken)
  mixture(world, {"json_path": "bad.json"}, {"json_path": "videos.json"})
  info = make(world, skip_bad=True)
  assert info["samples"] == 3 and len(info["skipped"]) == len(BAD) + 3
  skipped = {p["position"]: p for p in info["skipped"]}
  assert sorted(skipped) == list(range(len(BAD) + 3)) and {p["annotation"] for p in info["skipped"]} == {"bad.json"}
  assert "empty" in skipped[len(BAD)]["reason"] and "clip of 8" in skipped[len(BAD) + 1]["reason"]
  assert skipped[len(BAD) + 2]["source"] == str(world / "videos" / "cut.mp4")
  assert len(open_store(world.parent / "out")) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_video_stops_the_run_and_leaves_nothing(world, workers):
  make_video(world / "videos" / "v1.mp4", 7)
  with pytest.raises(video.VideoError, match=r"videos\.json, annotation 1: .*v1\.mp4.*7 frames.*--skip_bad"):
    make(world, workers=workers, samples_per_shard=1)
  assert list(world.parent.iterdir()) == [world]


def test_nothing_left(world):
  write(world / "videos.json", [{"video": "v7.mp4", "conversations": talk()}])
  mixture(world, {"json_path": "videos.json"})
  with pytest.raises(StoreError, match="no samples"):
    make(world, skip_bad=True)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"json_path": "none.json"}, r"none\.json can't be read"),
    ({"json-path": "videos.json"}, "json-path is unknown; did you mean json_path"),
    ({"sampling_strategy": "all"}, "dataset 0: json_path is missing"),
    ({"json_path": "videos.json", "video_read_type": "webm"}, "'webm' is unknown; known: decord, gif, img"),
    ({"json_path": "videos.json", "sampling_strategy": "first:x"}, "dataset 0: sampling_strategy 'first:x'"),
  ],
)
def test_mixture_errors(world, entry, message):
  mixture(world, entry)
  with pytest.raises(AnnotationError, match=message):
    make(world)
  assert list(world.parent.iterdir()) == [world]


@pytest.mark.parametrize("text", ["", "- a", "datasets:", "datasets: [3]", "a: [", "datasets: {}"])
def test_not_a_mixture(world, text):
  (world / "mixture.yaml").write_text(text)
  with pytest.raises(AnnotationError, match=r"mixture .*mixture\.yaml"):
    make(world)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.json", b'[{"a": 1},\n{"b" 2}]', r"a\.json, line 2: not JSON"),
    ("a.jsonl", b'{"a": 1}\n\n{"b" 2}\n', r"a\.jsonl, line 3: not JSON"),
    ("a.json", b'{"a": 1}', "expected a list of objects"),
    ("a.jsonl", b"3\n", "expected a list of objects"),
    ("a.json", b'["\xff"]', "can't be read: .*utf-8"),
    ("a.json", b"", "line 1: not JSON"),
  ],
)
def test_annotation_files_that_are_not(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(AnnotationError, match=message):
    read_annotations(tmp_path / name)


def test_lines_of_jsonl_end_with_newlines_only(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\r\n{"a": "z"}', encoding="utf-8")
  assert read_annotations(tmp_path / "a.jsonl") == [{"a": "x\u2028y"}, {"a": "z"}]


def test_contradicting_limits(world):
  with pytest.raises(ValueError, match="multiples of clip_frames=8"):
    predecode(world / "mixture.yaml", world.parent / "out", Settings(16, 12, 8, 8.0, 8), root=world)
  assert list(world.parent.iterdir()) == [world]


def test_relative_paths_start_from_root(world, monkeypatch):
  monkeypatch.chdir(world)
  jobs, problems, _ = read_mixture("mixture.yaml", ".", 1.0)
  assert len(jobs) == 7 and not problems


def command(world, *more, start=subprocess.run, **how):
  line = [
    sys.executable, "-m", "xcomp_jax.predecode", "--mixture", str(world / "mixture.yaml"), "--root", str(world), "--image_size=16",
    "--min_frames=8", "--max_frames=16", "--out", str(world.parent / "out"), *more,
  ]
  where = pathlib.Path(predecode_lib.__file__).parents[1]
  return start(line, env=os.environ | {"PYTHONPATH": str(where)}, **(how or {"capture_output": True, "text": True}))


def test_command(world):
  done = command(world, "--workers=1", "--subset=1.0")
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("out: 7 samples, 65 frames, 0 skipped\n") and "sample/s" in done.stderr
  assert len(open_store(world.parent / "out")) == 7
  again = command(world, "--workers=0")
  assert again.returncode == 1 and again.stderr.startswith("error: ") and "already exists" in again.stderr


def test_command_with_a_bad_annotation(world):
  write(world / "videos.json", [{"video": "v7.mp4", "conversations": talk()}])
  done = command(world, "--workers=0")
  assert done.returncode == 1 and done.stderr.startswith("error: 1 bad annotation")
  assert "Traceback" not in done.stderr and "v7.mp4 does not exist" in done.stderr
  assert list(world.parent.iterdir()) == [world]


def test_a_killed_run_leaves_no_processes_and_the_next_one_finishes(world):
  make_video(world / "videos" / "long.mp4", 3000)
  write(world / "videos.json", [{"video": "long.mp4", "conversations": talk()}] * 200)
  process = command(
    world, "--workers=2", "--samples_per_shard=2", start=subprocess.Popen,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
  )
  incomplete = world.parent / "out.incomplete"
  wait_for(lambda: incomplete.exists() and list(incomplete.glob("shard-*")))
  assert process.poll() is None
  process.kill()
  process.wait()
  try:
    wait_for(lambda: not group_lives(process.pid), 20)
  finally:
    if group_lives(process.pid):  # the group of its own session: what this test started, nothing else
      os.killpg(process.pid, signal.SIGKILL)
  assert sorted(p.name for p in world.parent.iterdir()) == ["data", "out.incomplete"]
  mixture(world, {"json_path": "gifs.json", "video_read_type": "gif"})
  assert make(world)["samples"] == 1
  assert sorted(p.name for p in world.parent.iterdir()) == ["data", "out"]


def wait_for(condition, seconds=60.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.05)


def group_lives(group: int) -> bool:
  try:
    os.killpg(group, 0)
  except ProcessLookupError:
    return False
  return True
