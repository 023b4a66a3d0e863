"""Many questions about many videos: each video encoded once, each answer on disk at once, so that a
killed run continues.

A folder of answers holds `settings.json`, what they were made with, and `answers-*.jsonl`, one file
per share of the
videos: a line per answer, and per question whose video could not be read.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from flax import nnx

from xcomp_jax.checkpoints import tensor_files
from xcomp_jax.config import ConfigError
from xcomp_jax.data.prompt import AnnotationError
from xcomp_jax.data.video import FrameSample, TailError, frames
from xcomp_jax.errors import XCompError
from xcomp_jax.files import absolute, local, sweep, write_json
from xcomp_jax.inference import encoded_video
from xcomp_jax.inference.chat import Answer
from xcomp_jax.inference.video_model import VideoModel, fault
from xcomp_jax.inputs import quoted, read_json
from xcomp_jax.progress import progress
from xcomp_jax.viz import html_report

# Settings that may differ when a run goes on; the checkpoint's identity may not, nor the clips that
# "auto" stands for.
FREE = ("checkpoint", "clips_per_chunk", "clip_frames", "attention")
# settings that older folders do not have, and what they were made with
ADDED = {"rows": "question"}
PACKAGES = (
  "xcomp_jax",
  "jax",
  "jaxlib",
  "flax",
  "numpy",
  "opencv-python-headless",
  "pillow",
  "tokenizers",
)
# by who asks, beside the answers
WRITTEN = (
  "results.json",
  "samples.jsonl",
  "heatmap.png",
  "run.json",
)


class AnswersError(XCompError, ValueError):
  """A folder of answers that can't be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Wanted:
  """A question about (a part of) a video. prompt: what is said after the frames and the time
  message.
  """

  video: pathlib.Path
  prompt: str
  start: float | None = None
  end: float | None = None

  @property
  def watched(self) -> tuple[str, float | None, float | None]:
    """What is encoded together."""
    return absolute(self.video), self.start, self.end

  @functools.cached_property
  def key(self) -> str:
    """Names the question among answers."""
    return hashlib.blake2b(
      json.dumps([*self.watched, self.prompt]).encode(), digest_size=16
    ).hexdigest()


def checkpoint_identity(directory: pathlib.Path) -> str:
  """A hash of all that a checkpoint's folder holds, by content, but for an export's list of it."""
  digest = hashlib.blake2b(digest_size=16)
  for file in sorted(
    f for f in directory.rglob("*") if f.is_file() and f.name != tensor_files.EXPORTED
  ):
    with open(file, "rb") as opened:
      content = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))
    digest.update(os.fsencode(file.relative_to(directory)) + b"\0" + content.digest())
  return digest.hexdigest()


def session() -> dict[str, Any]:
  """Versions and device of this process, and when it began."""
  versions = {}
  for package in PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  device = jax.local_devices()[0]
  return {
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "python": platform.python_version(),
    "device": device.device_kind,
    "platform": device.platform,
    "processes": jax.process_count(),
    "versions": versions,
  }


class Answers:
  """The answers in a folder; a context that holds the share's file for this process.

  lines: {key: the last line about it}. settings: what `settings.json` holds.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    reader: VideoModel,
    share: tuple[int, int],
    *,
    about: Mapping[str, Any] | None = None,
    how: Mapping[str, Any] | None = None,
  ):
    """Makes the folder, or goes on in it.

    about: what else the answers depend on. how: what they don't, for the record of this process.

    Raises:
      AnswersError: it holds answers under other settings or of another checkpoint.
      OSError: it can't be written.
      ValueError: it is in a bucket.
    """
    self.folder = local(folder, "answers are written line by line", written=True)
    self.folder.mkdir(parents=True, exist_ok=True)
    sweep(self.folder)
    selects = reader.select and dataclasses.asdict(reader.select)
    self.settings: dict[str, Any] = {
      "checkpoint": reader.settings.checkpoint,
      "identity": checkpoint_identity(reader.directory),
      "settings": dataclasses.asdict(reader.settings) | dict(about or {}),
      "dtype": reader.dtype,
      "clip_frames": reader.cfg.clip_frames,
      "lp_comp": dataclasses.asdict(reader.cfg.lp_comp),
      "qc_comp": selects,
    }
    self.settings = json.loads(json.dumps(self.settings))
    self._agree(self.folder / "settings.json")
    self._session = session() | dict(how or {})
    self._file = self.folder / f"answers-{share[0]}-of-{share[1]}.jsonl"
    self._opened: TextIO  # from `__enter__` on
    self.lines: dict[str, dict[str, Any]] = {}
    self.read()

  def _agree(self, file: pathlib.Path) -> None:
    if not file.exists():
      if there := [name for name in WRITTEN if (self.folder / name).exists()]:
        raise AnswersError(
          f"{self.folder} holds a {there[0]} of something else, which would be overwritten; choose "
          f"another folder"
        )
      write_json(file, self.settings, indent=2)
      return
    before = read_json(file, AnswersError)
    try:
      pairs = [("checkpoint", before["identity"], self.settings["identity"])]
      chosen = {key: value for key, value in self.settings["settings"].items() if key not in FREE}
      before["settings"] = ADDED | before["settings"]
      before["qc_comp"] = before["qc_comp"] and ADDED | before["qc_comp"]
      pairs += [(key, before["settings"].get(key), value) for key, value in chosen.items()]
      resolved = [
        (key, before[key], self.settings[key])
        for key in ("dtype", "clip_frames", "lp_comp", "qc_comp")
      ]
    except Exception as error:  # it may hold anything
      raise AnswersError(
        f"{file} is not what an evaluation writes: {quoted(before)}; choose another folder"
      ) from error

    def differ(pairs):
      return [f"{key} was {old}, now {new}" for key, old, new in pairs if old != new]

    if other := differ(pairs) or differ(resolved):
      what = "; ".join(other)
      raise AnswersError(
        f"{self.folder} holds answers made otherwise ({what}): choose another folder, or remove it"
      )

  def read(self) -> None:
    """Takes in what is on disk, other shares' answers too; half a line, left by a kill, is no
    answer.
    """
    for line in self._all():
      if isinstance(line.get("key"), str) and ("answer" in line or line["key"] not in self.lines):
        self.lines[line["key"]] = line

  def _all(self) -> Iterator[dict[str, Any]]:
    for file in sorted(self.folder.glob("answers-*.jsonl")):
      # splitlines would split at U+2028 too
      for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
          line = json.loads(text)
          if isinstance(line, dict):
            yield line

  def __enter__(self) -> "Answers":
    """Takes the share's file.

    Raises:
      AnswersError: another process has it.
    """
    # Names of files may be no UTF-8; what takes the place of such a byte is how JSON writes it.
    self._opened = open(self._file, "a+", encoding="utf-8", errors="backslashreplace")
    try:
      fcntl.flock(self._opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._opened.close()
      raise AnswersError(
        f"another process writes {self._file}; give every process its own --share"
      ) from error
    if self._opened.tell():
      self._opened.seek(self._opened.tell() - 1)
      if self._opened.read(1) != "\n":
        self._opened.write("\n")  # ends the half line of a killed process
    self._write({"session": self._session})
    return self

  def __exit__(self, *_) -> None:
    """Gives the file back."""
    with contextlib.suppress(OSError):  # of a disk that is full, which `add` has told
      self._opened.close()

  def _write(self, line: dict[str, Any]) -> None:
    try:
      self._opened.write(json.dumps(line, ensure_ascii=False) + "\n")
      self._opened.flush()
      os.fsync(self._opened.fileno())
    except OSError as error:
      why = error.strerror or error
      raise OSError(
        f"{self._file} can't be written: {why}; what is in it stays, and the same command continues"
      ) from error

  def add(self, line: dict[str, Any]) -> None:
    """Puts a line on disk."""
    self._write(line)
    self.lines[line["key"]] = line

  def answer(self, wanted: Wanted) -> str | None:
    """The answer; None if its video could not be read (or nobody has asked yet: see `missing`)."""
    return self.lines.get(wanted.key, {}).get("answer")

  def missing(self, wanted: Iterable[Wanted]) -> int:
    """How many questions have neither an answer nor an error."""
    return sum(w.key not in self.lines for w in wanted)

  def failed(self, wanted: Iterable[Wanted]) -> list[dict[str, Any]]:
    """Videos that could not be read, or asked: {"video", "error", "questions"}."""
    lines = [self.lines[w.key] for w in wanted if "error" in self.lines.get(w.key, {})]
    counts = collections.Counter((line["video"], line["error"]) for line in lines)
    return [
      {"video": video, "error": error, "questions": n} for (video, error), n in counts.items()
    ]

  def shortened(self, wanted: Iterable[Wanted]) -> dict[str, float]:
    """Videos whose end could not be read, and how many seconds of it."""
    lines = [self.lines[w.key] for w in wanted if "lost" in self.lines.get(w.key, {})]
    return {line["video"]: line["lost"] for line in lines}

  def sessions(self) -> list[dict[str, Any]]:
    """Versions and devices of all processes that have answered here."""
    return [line["session"] for line in self._all() if "session" in line]


def parse_share(text: str | None) -> tuple[int, int]:
  """(i, n) of "i/n", i from 0; None: this process's place among JAX's.

  Raises:
    AnswersError: no such share.
  """
  if text is None:
    return jax.process_index(), jax.process_count()
  try:
    i, n = map(int, text.split("/"))
  except ValueError:
    i, n = 0, 0
  if not 0 <= i < n:
    raise AnswersError(f"--share {text}: write 0/4, 1/4, 2/4 and 3/4 for four processes")
  return i, n


def answer_wanted(
  reader: VideoModel,
  wanted: Sequence[Wanted],
  answers: Answers,
  *,
  share: tuple[int, int] = (0, 1),
  devices: int | None = 1,
  ahead: int = 1,
  batch: int = 1,
  once: bool = True,
) -> None:
  """Answers what has no answer yet, and tries again what failed.

  Args:
    reader: the checkpoint.
    wanted: all questions, of all shares; the same ones for all of them.
    answers: where they go.
    share: every n-th video from the i-th on is for this process.
    devices: of this process, each with the whole model and with videos of its own; None: all.
    ahead: videos to decode while others are worked on; 0.6 GB each at 1,024 frames of 448 pixels.
    batch: questions about a video that are answered together; the caches of all of them are in
      memory.
    once: False encodes a video again for every question, to measure what encoding once saves.

  Raises:
    CheckpointError, ConfigError, OSError: what stops everything. Whatever is wrong with one video
      costs its own questions.
  """
  groups: dict[tuple, dict[str, Wanted]] = {}
  for w in wanted:
    groups.setdefault(w.watched, {})[w.key] = w
  mine = [list(group.values()) for group in list(groups.values())[share[0] :: share[1]]]
  total = sum(map(len, mine))
  todo = [left for group in mine if (left := [w for w in group if answers.answer(w) is None])]
  if not once:
    todo = [[w] for group in todo for w in group]
  if not todo:
    return
  reader.check_clips()
  with progress(
    total=total, initial=total - sum(map(len, todo)), unit="question", desc="loading"
  ) as bar:
    first = reader.load()
    identity = encoded_video.identity(first)
    graph, state = nnx.split(first)
    used = jax.local_devices()[:devices][: len(todo)]
    decoded, lock, stopped = _decoded(reader, todo, ahead), threading.Lock(), threading.Event()

    def work(device):
      model = (
        first
        if device == jax.local_devices()[0]
        else nnx.merge(graph, jax.device_put(state, device))
      )
      with reader.precision():  # of this thread
        while not stopped.is_set():
          with lock:
            group, sample, found, seconds = next(decoded, (None, None, None, 0.0))
          if group is None:
            return
          bar.set_description(pathlib.Path(group[0].video).name[-30:], refresh=False)
          for lines in _group(reader, model, identity, group, sample, found, seconds, batch):
            for line in lines:
              with lock:
                answers.add(line)
            errors = collections.Counter(line["error"] for line in lines if "error" in line)
            for error, n in errors.items():
              bar.write(
                f"{lines[0]['video']}: {n} question{'s' * (n > 1)} failed: {error}",
                file=sys.stderr,
              )
            bar.update(len(lines))
            if stopped.is_set():
              return

    with contextlib.closing(decoded):
      if len(used) == 1:
        work(used[0])
      else:
        with concurrent.futures.ThreadPoolExecutor(len(used)) as pool:
          try:
            for done in concurrent.futures.as_completed(
              [pool.submit(work, device) for device in used]
            ):
              done.result()
          finally:
            stopped.set()


def _group(
  reader, model, identity, group, sample, decoded, seconds, batch
) -> Iterator[list[dict[str, Any]]]:
  """The lines of the questions about one video, of a batch at a time."""
  first = group[0]
  lost = {"lost": round(sample.lost, 3)} if sample is not None and sample.lost else {}

  def line(w):
    return {"key": w.key, "video": str(w.video), "prompt": w.prompt} | lost

  def failed(w, error):
    return line(w) | {"error": fault(error)}

  several = len(group) > batch
  try:
    if isinstance(decoded, BaseException):
      raise decoded
    source = reader.source(str(first.video), first.start, first.end)
    film, spent = reader.encode(model, sample, source, decoded=decoded, identity=identity)
    spent["decoding"] = seconds
    chat = reader.chat(model, film, keep_rounds=several)
  except (
    BaseException
  ) as error:  # whatever it is costs the questions about this video, not those about others
    yield [failed(w, error) for w in group]
    return
  fit = []
  for w in group:
    try:
      chat.check(w.prompt)
      fit.append(w)
    except BaseException as error:  # too long for the model, or nothing to ask
      yield [failed(w, error)]
  for part in batches(fit, batch):
    try:
      answers = chat.ask_apart([w.prompt for w in part])
    except BaseException as error:  # frames that can't be selected from, or too little memory
      yield [failed(w, error) for w in part]
      continue
    yield [
      line(w) | _answered(answer, film, spent if w is fit[0] else {})
      for w, answer in zip(part, answers, strict=True)
    ]


def batches(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
  """Runs of `size`, and of powers of two of what is left: a few sizes to compile, and no row for
  nothing.
  """
  while things:
    n = size if len(things) >= size else 1 << len(things).bit_length() - 1
    yield things[:n]
    things = things[n:]


def _answered(
  got: Answer, film: encoded_video.EncodedVideo, spent: dict[str, float]
) -> dict[str, Any]:
  kept = got.selection
  return {
    "answer": got.text,
    "sampled": len(film.times),
    "kept": len(kept.frames),
    "note": kept.note,
    "ranges": [
      [round(t, 3) for t in span]
      for span in html_report.ranges(kept.frames, film.times, film.seconds)
    ],
    "seconds": {
      name: round(spent.get(name, 0.0) + got.spent.get(name, 0.0), 4) for name in spent | got.spent
    },
  }


def _askable(reader: VideoModel, sample: FrameSample, group: Sequence[Wanted]) -> None:
  """Sees to it before anything is decoded that at least one of the questions can be asked.

  Raises:
    AnnotationError, ConfigError: none can; why the first can't.
  """
  first: Exception | None = None
  for w in group:
    try:
      return reader.check(len(sample.indices), sample.seconds, w.prompt)
    except (AnnotationError, ConfigError) as error:
      first = first or error
  if first:
    raise first


def _decoded(
  reader: VideoModel, todo: Sequence[list[Wanted]], ahead: int
) -> Generator[tuple[list[Wanted], FrameSample | None, list[np.ndarray] | BaseException, float]]:
  """Each group with its sample, the frames (or why there are none), and the seconds that decoding
  took.
  """
  stopped = threading.Event()

  def decode(group):
    begun, sample = time.perf_counter(), None
    try:
      sample = reader.sample(str(group[0].video), group[0].start, group[0].end)
      _askable(reader, sample, group)
      try:
        found = list(itertools.takewhile(lambda _: not stopped.is_set(), frames(sample)))
      except TailError as error:
        sample = reader.shortened(sample, error)
        _askable(reader, sample, group)
        found = list(itertools.takewhile(lambda _: not stopped.is_set(), frames(sample)))
    except BaseException as error:  # `_group` judges it
      found = error
    return group, sample, found, time.perf_counter() - begun

  if ahead < 1:
    yield from map(decode, todo)
    return
  with concurrent.futures.ThreadPoolExecutor(ahead) as pool:
    left, waiting = iter(todo), collections.deque()
    try:
      for group in left:
        waiting.append(pool.submit(decode, group))
        if len(waiting) > ahead:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      stopped.set()
      for future in waiting:
        future.cancel()
