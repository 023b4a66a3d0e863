"""Many questions about many videos: each video encoded once, each answer on disk at once, so that a
killed run continues.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xcomp_jax.config import ConfigError
from xcomp_jax.data.prompt import AnnotationError
from xcomp_jax.data.video import FrameSample, TailError, frames
from xcomp_jax.evaluation.answers import Answers, Wanted
from xcomp_jax.inference.chat import Answer
from xcomp_jax.inference.generate import batches
from xcomp_jax.inference.prepared import PreparedModel, fault
from xcomp_jax.inference.video_model import VideoModel, load_prepared
from xcomp_jax.progress import progress

Decoder = Callable[[FrameSample], Iterable[np.ndarray]]
Load = Callable[..., VideoModel]  # as `load_prepared`


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodedVideo:
  """Questions about (a part of) a video, and what was decoded for them.

  sample: which frames; None where that could not be found out. frames: or why there are none.
  seconds: that decoding took.
  """

  wanted: Sequence[Wanted]
  sample: FrameSample | None
  frames: Sequence[np.ndarray] | BaseException
  seconds: float


def answer_wanted(
  reader: PreparedModel,
  wanted: Sequence[Wanted],
  answers: Answers,
  *,
  share: tuple[int, int] = (0, 1),
  devices: int | None = 1,
  mesh: Mesh | None = None,
  ahead: int = 1,
  batch: int = 1,
  once: bool = True,
  decode: Decoder = frames,
  load: Load = load_prepared,
) -> None:
  """Answers what has no answer yet, and tries again what failed.

  Args:
    reader: the checkpoint.
    wanted: all questions, of all shares; the same ones for all of them.
    answers: where they go.
    share: every n-th video from the i-th on is for this process.
    devices: of this process, each with the whole model and with videos of its own; None: all.
    mesh: instead, over which one model is split that works on one video after the other.
    ahead: videos to decode while others are worked on; 0.6 GB each at 1,024 frames of 448 pixels.
    batch: questions about a video that are answered together; the caches of all of them are in
      memory.
    once: False encodes a video again for every question, to measure what encoding once saves.
    decode: makes the frames of a sample.
    load: reads the parameters.

  Raises:
    CheckpointError, ConfigError, OSError: what stops everything. Whatever is wrong with one video
      costs its own questions.
  """
  videos: dict[tuple, dict[str, Wanted]] = {}  # questions of each, by their keys
  for w in wanted:
    videos.setdefault(w.watched, {})[w.key] = w
  mine = [list(questions.values()) for questions in videos.values()][share[0] :: share[1]]
  total = sum(map(len, mine))
  todo = [left for group in mine if (left := [w for w in group if answers.answer(w) is None])]
  if not once:
    todo = [[w] for group in todo for w in group]
  if not todo:
    return
  reader.check_clips()
  left = sum(map(len, todo))
  with (
    progress(total=total, initial=total - left, unit="question", desc="loading") as bar,
    contextlib.closing(decode_ahead(reader, todo, ahead, decode)) as decoded,
  ):
    used = jax.local_devices()[:devices][: len(todo)]
    model = load(reader, device=used[0]) if mesh is None else load(reader, mesh=mesh)
    loop = AnsweringLoop(answers, decoded, bar, batch)
    if len(used) == 1 or mesh is not None:
      loop.run(model)
      return
    others = (model.on(device) for device in used[1:])
    with concurrent.futures.ThreadPoolExecutor(len(used)) as pool:
      try:
        running = [pool.submit(loop.run, one) for one in (model, *others)]
        for ended in concurrent.futures.as_completed(running):
          ended.result()
      finally:
        loop.stopped.set()


class AnsweringLoop:
  """Takes decoded videos in turn, asks about them, and puts the answers on disk; in several threads
  at once, each with a model on a device of its own.

  stopped: set, it ends the loop of every thread behind the answers that it is at.
  """

  def __init__(
    self,
    answers: Answers,
    decoded: Iterator[DecodedVideo],
    bar: Any,
    batch: int,
  ):
    """bar: of the progress. batch: see `answer_wanted`."""
    self.answers, self.decoded, self.bar, self.batch = answers, decoded, bar, batch
    self.lock, self.stopped = threading.Lock(), threading.Event()

  def run(self, model: VideoModel) -> None:
    """Works until no video is left."""
    while not self.stopped.is_set():
      with self.lock:
        video = next(self.decoded, None)
      if video is None:
        return
      self.bar.set_description(pathlib.Path(video.wanted[0].video).name[-30:], refresh=False)
      for lines in self.ask(model, video):
        self.keep(lines)
        if self.stopped.is_set():
          return

  def ask(self, model: VideoModel, video: DecodedVideo) -> Iterator[list[dict[str, Any]]]:
    """The lines of the questions about one video, of a batch at a time. What goes wrong costs the
    questions that it is about, and no others.
    """
    sample = video.sample
    lost = {"lost": round(sample.lost, 3)} if sample is not None and sample.lost else {}

    def about(w):
      return {"key": w.key, "video": str(w.video), "prompt": w.prompt} | lost

    def failed(questions, error):
      return [about(w) | {"error": fault(error)} for w in questions]

    try:
      if isinstance(video.frames, BaseException):
        raise video.frames
      assert sample is not None  # or there would be no frames
      film = model.encode(sample, decoded=video.frames, show_progress=False)
      spent = {**film.spent, "decoding": video.seconds}
      chat = model.chat(film, keep_rounds=len(video.wanted) > self.batch, talk=False)
    except BaseException as error:  # whatever it is
      yield failed(video.wanted, error)
      return
    fit = []
    for w in video.wanted:
      try:
        chat.check(w.prompt)
        fit.append(w)
      except BaseException as error:  # too long for the model, or nothing to ask
        yield failed([w], error)
    for part in batches(fit, self.batch):
      try:
        answers = chat.ask_apart([w.prompt for w in part])
      except BaseException as error:  # frames that can't be selected from, or too little memory
        yield failed(part, error)
        continue
      yield [
        about(w) | _answer_line(answer, spent if w is fit[0] else {})
        for w, answer in zip(part, answers, strict=True)
      ]

  def keep(self, lines: Sequence[dict[str, Any]]) -> None:
    """Puts lines about a video on disk, and says what failed."""
    with self.lock:
      for line in lines:
        self.answers.add(line)
    errors = collections.Counter(line["error"] for line in lines if "error" in line)
    for error, n in errors.items():
      self.bar.write(
        f"{lines[0]['video']}: {n} question{'s' * (n > 1)} failed: {error}", file=sys.stderr
      )
    self.bar.update(len(lines))


def _answer_line(got: Answer, spent: dict[str, float]) -> dict[str, Any]:
  """What is kept of an answer. spent: seconds before it was asked."""
  seconds = {name: spent.get(name, 0.0) + got.spent.get(name, 0.0) for name in spent | got.spent}
  return {
    "answer": got.text,
    "sampled": len(got.video.times),
    "kept": len(got.frames),
    "note": got.selection.note,
    "ranges": [[round(t, 3) for t in span] for span in got.moments],
    "seconds": {name: round(s, 4) for name, s in seconds.items()},
  }


def check_askable(reader: PreparedModel, sample: FrameSample, wanted: Sequence[Wanted]) -> None:
  """Sees to it before anything is decoded that at least one of the questions can be asked.

  Raises:
    AnnotationError, ConfigError: none can; why the first can't.
  """
  errors = []
  for w in wanted:
    try:
      return reader.check(len(sample.indices), sample.seconds, w.prompt)
    except (AnnotationError, ConfigError) as error:
      errors.append(error)
  raise errors[0]


def decode_ahead(
  reader: PreparedModel, todo: Sequence[Sequence[Wanted]], ahead: int, decode: Decoder = frames
) -> Generator[DecodedVideo]:
  """Decodes the videos of groups of questions, `ahead` of them while another one is worked on."""
  stopped = threading.Event()

  def read(sample, wanted):
    check_askable(reader, sample, wanted)
    return list(itertools.takewhile(lambda _: not stopped.is_set(), decode(sample)))

  def work(wanted):
    begun = time.perf_counter()
    first, sample = wanted[0], None
    try:
      sample = reader.sample(str(first.video), first.start, first.end)
      try:
        found = read(sample, wanted)
      except TailError as error:
        sample = reader.shortened(sample, error)
        found = read(sample, wanted)
    except BaseException as error:  # `AnsweringLoop.ask` judges it
      found = error
    return DecodedVideo(
      wanted=wanted, sample=sample, frames=found, seconds=time.perf_counter() - begun
    )

  waiting = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(max(1, ahead)) as pool:
    try:
      for wanted in todo:
        waiting.append(pool.submit(work, wanted))
        if len(waiting) > ahead:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      stopped.set()
      pool.shutdown(wait=False, cancel_futures=True)
