"""Benchmarks from files: the same answers as `ask`, videos encoded once, runs that go on after
being stopped.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import ClassVar

import cv2
import jax
import numpy as np
import pytest

from xcomp_jax import ask, evaluate
from xcomp_jax.config import ConfigError
from xcomp_jax.data import video
from xcomp_jax.evaluation import benchmarks
from xcomp_jax.evaluation.answers import Answers
from xcomp_jax.evaluation.benchmarks import TASKS
from xcomp_jax.evaluation.protocol import any_letter
from xcomp_jax.inference.chat import Chat
from xcomp_jax.inference.prepared import prepare_model
from xcomp_jax.inference.settings import settings_of
from xcomp_jax.inference.video_model import VideoModel, load_prepared

OPTIONS = [
  "--clip-frames=4",
  "--min-frames=8",
  "--max-frames=16",
  "--select=8",
  "--max-new-tokens=3",
]
SIX = ["Which one?", "Who\u2028is it?", "Where?"]  # of each of two videos


@pytest.fixture(scope="module")
def checkpoint(tiny_run, tmp_path_factory):
  return pathlib.Path(tiny_run(tmp_path_factory.mktemp("evaluate")).init_from)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  """A folder with annotations and two videos, six questions."""
  root = tmp_path_factory.mktemp("bench")
  (root / "videos").mkdir()
  rng = np.random.default_rng(0)
  for name in ("one", "two"):
    writer = cv2.VideoWriter(
      str(root / "videos" / f"{name}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 64)
    )
    for _ in range(16):
      writer.write(cv2.resize(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), (64, 64)))
    writer.release()
  items = [
    {
      "video": name,
      "type": name,
      "question": text,
      "candidates": ["(A) x", "(B) y"],
      "answer": "(B) y",
      "question_type": ["a", "b"],
    }
    for text in SIX
    for name in ("one", "two")
  ]
  (root / "q.json").write_text(json.dumps(items))
  return root


@pytest.fixture
def go(checkpoint, bench):
  """A function (out, *more, annotations, videos, **parts) that evaluates."""

  def run(out, *more, annotations=bench / "q.json", videos=bench / "videos", **parts):
    evaluate.main(
      [
        "--task=lvbench",
        "--annotations",
        str(annotations),
        "--videos",
        str(videos),
        "--checkpoint",
        str(checkpoint),
        "--preset=none",
        "--devices=1",
        *OPTIONS,
        "--out",
        str(out),
        *more,
      ],
      **parts,
    )

  return run


class Watching(VideoModel):
  """A model that goes wrong where a test says so, and notes what it encoded."""

  encoded: ClassVar[list[str]]
  errors: ClassVar[dict[str, BaseException]]

  def encode(self, sample, **how):
    self.encoded.append(sample.path.stem)
    if error := self.errors.get(sample.path.stem):
      raise error
    return super().encode(sample, **how)


def watching(**errors):
  """A class of models; errors: by the name of the video at which they are raised."""
  return type("Watching", (Watching,), {"encoded": [], "errors": errors})


def loading(kind):
  """What reads a model of a kind."""
  return lambda prepared, **where: kind(**vars(load_prepared(prepared, **where)))


@dataclasses.dataclass
class Asking:
  """A chat that is told before it asks (`before`, with the questions) and checks (`checked`)."""

  chat: Chat
  before: Callable
  checked: Callable

  def ask_apart(self, questions):
    self.before(questions)
    return self.chat.ask_apart(questions)

  def check(self, question):
    self.checked(question)
    self.chat.check(question)


def asking(before=lambda questions: None, checked=lambda question: None):
  """What makes a model whose chats are told."""

  class Talking(VideoModel):
    def chat(self, *args, **how):
      return Asking(super().chat(*args, **how), before, checked)

  return loading(Talking)


def results(out):
  return json.loads((out / "results.json").read_text())


def lines(out):
  return [json.loads(line) for line in (out / "samples.jsonl").read_text().split("\n") if line]


def test_answers_are_those_of_ask_and_every_video_is_encoded_once(
  go, checkpoint, bench, tmp_path, capsys
):
  kind = watching()
  go(tmp_path / "out", load=loading(kind))
  assert kind.encoded == ["one", "two"]
  assert "micro" in capsys.readouterr().out
  questions = benchmarks.read_questions(TASKS["lvbench"], bench / "q.json")
  for name in ("one", "two"):
    texts = [q.prompt for q in questions if q.videos == (name,)]
    ask.main(
      [
        "--checkpoint",
        str(checkpoint),
        "--video",
        str(bench / "videos" / f"{name}.mp4"),
        *OPTIONS,
        "--json",
        *(f"--question={text}" for text in texts),
      ]
    )
    asked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    mine = [line for line in lines(tmp_path / "out") if pathlib.Path(line["video"]).stem == name]
    assert [a["answer"] for a in asked] == [line["answer"] for line in mine]
    assert [len(a["frames"]) for a in asked] == [8] * 3 == [line["kept"] for line in mine]
    for a, line in zip(asked, mine, strict=True):
      np.testing.assert_allclose(a["ranges"], line["ranges"], atol=1e-3)
  found = results(tmp_path / "out")
  assert found["made_with"]["settings"]["select"] == 8 and len(found["made_with"]["identity"]) == 32
  assert found["sessions"][0]["versions"]["jax"] and found["sessions"][0]["device"]
  assert found["score"]["counts"]["questions"] == 6 and set(found["score"]["groups"]) == {
    "type",
    "question type",
  }
  right = sum(any_letter(line["answer"]) == "B" for line in lines(tmp_path / "out"))
  assert found["score"]["counts"]["right"] == right


def test_a_stopped_run_goes_on_without_asking_again(go, tmp_path, capsys):
  go(tmp_path / "whole")
  asked = []

  def stop(questions):
    if len(asked) == 2:
      raise KeyboardInterrupt
    asked.extend(questions)

  with pytest.raises(SystemExit) as stopped:
    go(tmp_path / "out", load=asking(before=stop))
  assert stopped.value.code == 130 and "the same command continues" in capsys.readouterr().err
  file = tmp_path / "out" / "answers-0-of-1.jsonl"
  file.write_text(file.read_text() + '{"key": "half a li')  # as a kill leaves it
  assert not (tmp_path / "out" / "results.json").exists()
  go(tmp_path / "out", load=asking(before=asked.extend))
  assert len(asked) == 6

  def key(out):
    return [(line["id"], line["answer"], line["ranges"]) for line in lines(out)]

  assert (
    key(tmp_path / "out") == key(tmp_path / "whole")
    and len(results(tmp_path / "out")["sessions"]) == 2
  )

  go(tmp_path / "out", load=lambda prepared, **where: pytest.fail("nothing was left to do"))


def test_two_shares_make_the_whole(go, tmp_path, capsys):
  go(tmp_path / "whole")
  go(tmp_path / "out", "--share=1/2")
  assert (
    not (tmp_path / "out" / "results.json").exists()
    and "3 of 6 questions are left" in capsys.readouterr().err
  )
  go(tmp_path / "out", "--share=0/2")
  assert results(tmp_path / "out")["score"] == results(tmp_path / "whole")["score"]


def test_two_devices_give_the_same(go, tmp_path):
  go(tmp_path / "one")
  go(tmp_path / "two", "--devices=2")
  assert [line["answer"] for line in lines(tmp_path / "two")] == [
    line["answer"] for line in lines(tmp_path / "one")
  ]
  assert results(tmp_path / "two")["score"] == results(tmp_path / "one")["score"]


def test_every_question_alone_gives_the_same(go, tmp_path):
  go(tmp_path / "once")
  kind = watching()
  go(tmp_path / "alone", "--each-alone", "--ahead=0", load=loading(kind))
  assert len(kind.encoded) == 6
  assert [line["answer"] for line in lines(tmp_path / "alone")] == [
    line["answer"] for line in lines(tmp_path / "once")
  ]


def test_a_video_that_cannot_be_decoded_costs_its_questions(go, bench, tmp_path, capsys):
  videos = tmp_path / "videos"
  videos.mkdir()
  (videos / "one.mp4").write_bytes((bench / "videos" / "one.mp4").read_bytes())
  (videos / "two.mp4").write_bytes((bench / "videos" / "two.mp4").read_bytes()[:700])
  with pytest.raises(SystemExit) as stop:
    go(tmp_path / "out", videos=videos)
  found = results(tmp_path / "out")
  assert (
    stop.value.code == 1
    and found["score"]["counts"]["failed"] == 3
    and found["score"]["counts"]["counted"] == 6
  )
  (failed,) = found["failed"]
  assert failed["video"].endswith("two.mp4") and failed["questions"] == 3 and failed["error"]
  said = capsys.readouterr()
  assert (
    "two.mp4 (3 questions)" in said.out
    and "3 of 6 questions could not be asked, and count as wrong" in said.err
  )
  # mended: the same command tries again
  (videos / "two.mp4").write_bytes((bench / "videos" / "two.mp4").read_bytes())
  go(tmp_path / "out", videos=videos)
  assert (
    results(tmp_path / "out")["score"]["counts"]["failed"] == 0
    and not results(tmp_path / "out")["failed"]
  )


class Panic(BaseException):
  """What libraries in Rust raise."""


def test_one_bad_video_costs_its_own_questions_whatever_it_raises(go, bench, tmp_path, capsys):
  folder = tmp_path / "videos"
  folder.mkdir()
  errors = {
    "memory": MemoryError(),
    "deep": RecursionError("deep"),
    "panic": Panic("panicked"),
    "mistake": KeyError("a mistake"),
    "device": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."),
    "disk": OSError(5, "Input/output error"),
  }
  good = [os.fsdecode(b"caf\xff"), "good"]
  for name in (*errors, *good):
    shutil.copy(bench / "videos" / "one.mp4", folder / f"{name}.mp4")
  os.mkfifo(folder / "pipe.png")

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  (folder / "bomb.png").write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    + chunk(b"IEND", b"")
  )
  names = ["pipe.png", "bomb.png", *(f"{name}.mp4" for name in (*errors, *good))]
  items = [
    {
      "video": name,
      "question": f"Which? {n}",
      "candidates": ["(A) x", "(B) y"],
      "answer": "(B) y",
    }
    for name in names
    for n in range(2)
  ]
  items.append(items[-1] | {"question": "Half a character \ud83d?"})
  (tmp_path / "q.json").write_text(json.dumps(items))
  encoding = {name: errors.pop(name) for name in ("device", "panic")}

  def decode(sample):
    if error := errors.get(sample.path.stem):
      raise error
    return video.frames(sample)

  with pytest.raises(SystemExit) as stop:
    go(
      tmp_path / "out",
      annotations=tmp_path / "q.json",
      videos=folder,
      decode=decode,
      load=loading(watching(**encoding)),
    )
  printed, found = capsys.readouterr(), results(tmp_path / "out")
  assert (
    stop.value.code == 1
    and "17 of 21 questions could not be asked, and count as wrong" in printed.err
  )
  failed = {pathlib.Path(f["video"]).name: f for f in found["failed"]}
  assert found["score"]["counts"]["failed"] == 17 and {
    name: failed.pop(name)["questions"] for name in names[:-2]
  } == dict.fromkeys(names[:-2], 2)
  assert failed.pop("good.mp4")["error"].endswith("holds bytes that are no UTF-8") and not failed
  assert all(f"failed: {folder}/{name} (2 questions): " in printed.out for name in names[:-2])
  said = {pathlib.Path(f["video"]).name: f["error"] for f in found["failed"]}
  assert (
    "is a pipe" in said["pipe.png"]
    and "decompression bomb" in said["bomb.png"]
    and "Input/output error" in said["disk.mp4"]
  )
  assert all(
    said[name].startswith("it needs more memory than there is: take fewer frames")
    for name in ("memory.mp4", "device.mp4")
  )
  assert said["mistake.mp4"].startswith("unexpected KeyError in test_evaluate.py, line ") and said[
    "panic.mp4"
  ].startswith("unexpected Panic in ")
  answered = [line for line in lines(tmp_path / "out") if "answer" in line]
  assert {pathlib.Path(line["video"]).name for line in answered} == {
    f"{name}.mp4" for name in good
  } and len(answered) == 4
  kind = watching()
  with pytest.raises(SystemExit):
    go(
      tmp_path / "out",
      annotations=tmp_path / "q.json",
      videos=folder,
      load=loading(kind),
    )
  assert sorted(kind.encoded) == sorted([*errors, *encoding])
  assert results(tmp_path / "out")["score"]["counts"]["failed"] == 5


def refused(capsys, words, run):
  with pytest.raises(SystemExit) as stop:
    run()
  err = capsys.readouterr().err
  assert stop.value.code == 1 and err.splitlines()[-1].startswith("error: ") and words in err


def test_a_folder_of_other_results_is_refused(go, tmp_path, capsys):
  (tmp_path / "results.json").write_text("mine")
  refused(capsys, "holds a results.json of something else", lambda: go(tmp_path))
  assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_folder_of_other_answers_is_refused(go, tmp_path, capsys):
  go(tmp_path / "out", "--limit=1")
  refused(capsys, "select was 8, now 4", lambda: go(tmp_path / "out", "--select=4"))
  assert results(tmp_path / "out")["score"]["counts"]["questions"] == 1
  (tmp_path / "out" / "settings.json").write_text("{}")
  refused(capsys, "is not what an evaluation writes", lambda: go(tmp_path / "out"))


def test_a_folder_from_before_rows_could_be_chosen_goes_on(go, tmp_path, capsys):
  go(tmp_path / "out", "--limit=1")
  file = tmp_path / "out" / "settings.json"
  settings = json.loads(file.read_text())
  del settings["settings"]["rows"], settings["qc_comp"]["rows"]
  file.write_text(json.dumps(settings))
  go(tmp_path / "out")
  assert results(tmp_path / "out")["score"]["counts"]["questions"] == 6
  refused(capsys, "rows was question, now answer", lambda: go(tmp_path / "out", "--rows=answer"))


class FullDisk(Answers):
  """Answers on a disk that has room for two."""

  def add(self, line):
    if len(self.lines) == 2:
      self.opened.close()
      self.opened = open("/dev/full", "a")
    super().add(line)


def test_a_full_disk_is_named_and_loses_nothing(go, tmp_path, capsys):
  out = tmp_path / "out"
  refused(capsys, "No space left on device; what is in it stays", lambda: go(out, folder=FullDisk))
  assert (out / "answers-0-of-1.jsonl").read_text().count('"answer"') == 2 and not (
    out / "results.json"
  ).exists()
  go(out)
  assert (
    results(out)["score"]["counts"]["questions"] == 6
    and (out / "answers-0-of-1.jsonl").read_text().count('"answer"') == 6
  )


@pytest.mark.slow
def test_batches_give_the_same_and_are_on_record(go, tmp_path):
  go(tmp_path / "one")
  sizes = []
  go(tmp_path / "two", "--batch=2", load=asking(before=lambda q: sizes.append(len(q))))
  assert sizes == [2, 1, 2, 1]
  assert [line["answer"] for line in lines(tmp_path / "two")] == [
    line["answer"] for line in lines(tmp_path / "one")
  ]
  assert results(tmp_path / "two")["score"] == results(tmp_path / "one")["score"]
  assert results(tmp_path / "two")["sessions"][0]["batch"] == 2
  go(tmp_path / "two", "--batch=3")  # a batch is no setting that answers depend on


def test_a_question_that_is_too_long_costs_itself_alone(go, tmp_path, capsys):
  seen = []

  def checked(question):
    seen.append(question)
    if len(seen) == 2:
      raise ConfigError("too long for the model")

  with pytest.raises(SystemExit):
    go(tmp_path / "out", "--batch=2", load=asking(checked=checked))
  assert (
    results(tmp_path / "out")["score"]["counts"]["failed"] == 1
    and "1 question failed" in capsys.readouterr().err
  )


def test_bad_arguments_end_in_one_line(go, bench, tmp_path, capsys):
  refused(capsys, "is --videos", lambda: go(bench / "videos"))
  refused(capsys, "contains --annotations", lambda: go(bench))
  refused(capsys, "--share 2/2", lambda: go(tmp_path / "a", "--share=2/2"))
  refused(capsys, "is no folder", lambda: go(tmp_path / "a", videos=tmp_path / "nowhere"))
  refused(capsys, "has none of the 2 videos", lambda: go(tmp_path / "a", videos=tmp_path))
  refused(capsys, "nowhere.json", lambda: go(tmp_path / "a", annotations=tmp_path / "nowhere.json"))
  refused(capsys, "a divisor", lambda: go(tmp_path / "b", "--clip-frames=3"))
  refused(capsys, "no log of lvbench", lambda: go(tmp_path / "a", "--preset=released-logs"))


@pytest.mark.parametrize(
  "option",
  [
    "limit=0",
    "batch=0",
    "devices=x",
    "ahead=-1",
    "fps=nan",
    "min-frames=8000000000",
    "temperature=inf",
    "top-p=2",
  ],
)
def test_numbers_have_bounds_that_are_said(go, tmp_path, capsys, option):
  with pytest.raises(SystemExit) as stop:
    go(tmp_path / "a", f"--{option}")
  name, value = option.split("=")
  assert stop.value.code == 2 and re.search(
    rf"argument --{name}: {value}: must be an? (integer|number) from \S+ to ",
    capsys.readouterr().err,
  )
  assert not (tmp_path / "a").exists()


def test_a_second_process_on_the_same_share_is_refused(go, checkpoint, tmp_path, capsys):
  go(tmp_path / "out", "--limit=1")
  arguments = [
    "--task=lvbench",
    "--annotations=x",
    "--videos=x",
    f"--out={tmp_path / 'out'}",
    f"--checkpoint={checkpoint}",
    "--preset=none",
  ]
  reader = prepare_model(settings_of(evaluate.parse([*arguments, *OPTIONS])))
  with Answers(tmp_path / "out", reader, (0, 1)):
    refused(capsys, "another process writes", lambda: go(tmp_path / "out"))


@pytest.mark.pure
@pytest.mark.parametrize(
  "name,task,wanted",
  [
    (
      "paper",
      "lvbench",
      {
        "select": 2048,
        "repeat": 2,
        "max_frames": 4096,
        "clip_frames": "auto",
        "mode": "official",
      },
    ),
    ("paper", "mlvu", {"select": 1024, "max_frames": 2048, "repetition_penalty": 1.0}),
    ("paper", "videomme_long", {"select": 512, "max_frames": 1024}),
    ("paper", "longvideobench", {"select": 256, "max_frames": 1024, "max_new_tokens": 16}),
    (
      "released-logs",
      "mlvu",
      {
        "select": 256,
        "repeat": 2,
        "max_frames": 1024,
        "clip_frames": "checkpoint",
        "repetition_penalty": 1.1,
      },
    ),
    ("released-logs", "videomme_long", {"select": 512, "repeat": 8}),
  ],
)
def test_presets_and_what_overrides_them(name, task, wanted):
  arguments = [
    f"--task={task}",
    "--annotations=x",
    "--videos=x",
    "--out=x",
    "--checkpoint=x",
    f"--preset={name}",
  ]
  args = vars(evaluate.parse(arguments))
  assert {key: args[key] for key in wanted} == wanted
  assert evaluate.parse([*arguments, "--select=64"]).select == 64


@pytest.mark.slow
def test_a_killed_run_goes_on(go, checkpoint, bench, tmp_path):
  go(tmp_path / "whole")
  command = [
    sys.executable,
    "-m",
    "xcomp_jax.evaluate",
    "--task=lvbench",
    "--annotations",
    str(bench / "q.json"),
    "--videos",
    str(bench / "videos"),
    "--checkpoint",
    str(checkpoint),
    "--preset=none",
    *OPTIONS,
    "--out",
    str(tmp_path / "out"),
  ]
  file = tmp_path / "out" / "answers-0-of-1.jsonl"
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
  while process.poll() is None and not (file.exists() and file.read_text().count('"answer"') >= 2):
    pass
  process.send_signal(signal.SIGKILL)
  process.wait(timeout=60)
  before = file.read_text().count('"answer"')
  assert 2 <= before < 6
  subprocess.run(
    command, check=True, timeout=300, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  assert file.read_text().count('"answer"') == 6
  assert results(tmp_path / "out")["score"] == results(tmp_path / "whole")["score"]
