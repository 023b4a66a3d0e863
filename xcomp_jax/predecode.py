"""Decodes the videos and images of a mixture once, into a store that training reads (data/store.py).

    python -m xcomp_jax.predecode --mixture M.yaml --out DIR

A mixture is VideoChat-Flash's YAML: `datasets`, a list of json_path (json or jsonl), sampling_strategy, data_root and
video_read_type. Relative paths start from --root. All annotations are checked before the first frame is decoded.
"""

import concurrent.futures
import dataclasses
import difflib
import functools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import app, flags

from xcomp_jax.data import prompt, store, video
from xcomp_jax.data.prompt import AnnotationError

READERS = {"decord": "video", "gif": "gif", "img": "frames"}  # video_read_type, and what `video.load` calls it


@dataclasses.dataclass(frozen=True)
class Settings:
  """How frames are chosen and stored (FACTS.md 5 and 6)."""

  image_size: int  # pixels, square
  max_frames: int
  min_frames: int
  fps: float  # frames per second, at most
  clip_frames: int  # frames of a clip


@dataclasses.dataclass(frozen=True)
class Job:
  """A checked annotation that waits for its pixels."""

  sample: store.Sample
  reader: video.ReadType
  start: float | None  # seconds
  end: float | None


def select(items: Sequence[Mapping[str, Any]], strategy: str = "all", subset: float = 1.0) -> list[int]:
  """Which annotations of a file are read, as indices in the order of reading (FACTS.md 14).

  Args:
    items: all annotations of the file.
    strategy: "all", or first, first2, ..., end, a colon, and a count or a percentage: "first2:2.5%".
    subset: share that is kept after that; 0.25 in the release.

  Raises:
    AnnotationError: a strategy that does not exist.
  """
  match = re.fullmatch(r"all|(first|end)(\d*):(\d+|\d+(?:\.\d+)?%)", strategy.strip())
  if not match or (match[1] == "end" and match[2]) or match[2] == "0":
    raise AnnotationError(
      f"sampling_strategy {strategy!r} is unknown; write all, first:100, first:2.5%, first2:10% (the second tenth) or end:100"
    )
  chosen = list(range(len(items)))
  random.Random(12345).shuffle(chosen)
  if match[1]:
    n = math.ceil(float(match[3][:-1]) * len(items) / 100) if match[3].endswith("%") else int(match[3])
    k = int(match[2] or 1)
    chosen = chosen[(k - 1) * n : k * n] if match[1] == "first" else chosen[max(len(chosen) - n, 0) :]
  random.Random(42).shuffle(chosen)
  return [i for i in chosen[: int(len(chosen) * subset)] if _has_one_visual(items[i])]


def read_mixture(path: str | os.PathLike, root: str | os.PathLike, subset: float) -> tuple[list[Job], list[dict], list[dict]]:
  """Reads a mixture and checks all its selected annotations.

  Returns:
    jobs in the order of reading; problems, each {"annotation", "position", "source", "reason"};
    and per annotation file {"annotation", "annotations", "selected"}.

  Raises:
    AnnotationError: the mixture or an annotation file as a whole can't be read.
  """
  import yaml

  path, root = pathlib.Path(path), pathlib.Path(root)
  try:
    mixture = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
    raise AnnotationError(f"mixture {path} can't be read: {_line(error)}") from error
  datasets = mixture.get("datasets") if isinstance(mixture, dict) else None
  if not isinstance(datasets, list) or not all(isinstance(d, dict) for d in datasets) or not datasets:
    raise AnnotationError(f"mixture {path}: expected a list under `datasets`, each with json_path and data_root")
  known = ("json_path", "sampling_strategy", "data_root", "video_read_type")
  jobs, problems, files = [], [], []
  for n, entry in enumerate(datasets):
    where = f"mixture {path}, dataset {n}"
    for key in entry.keys() - set(known):
      near = difflib.get_close_matches(str(key), known, 1)
      raise AnnotationError(f"{where}: {key} is unknown; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"))
    if not isinstance(entry.get("json_path"), str):
      raise AnnotationError(f"{where}: json_path is missing")
    reader = entry.get("video_read_type") or "decord"
    if reader not in READERS:
      raise AnnotationError(f"{where}: video_read_type {reader!r} is unknown; known: {', '.join(READERS)}")
    items = read_annotations(root / entry["json_path"])
    try:
      chosen = select(items, str(entry.get("sampling_strategy", "all")), subset)
    except AnnotationError as error:
      raise AnnotationError(f"{where}: {error}") from error
    files.append({"annotation": entry["json_path"], "annotations": len(items), "selected": len(chosen)})
    for position in chosen:
      job, faults = _job(items[position], position, entry["json_path"], root / (entry.get("data_root") or ""), READERS[reader])
      source = job.sample.source
      problems += [_problem(entry["json_path"], position, source, fault) for fault in faults]
      jobs += [] if faults else [job]
  return jobs, problems, files


def read_annotations(path: str | os.PathLike) -> list[dict]:
  """The annotations of a json (a list) or jsonl file.

  Raises:
    AnnotationError: no such file, not UTF-8, not JSON (with the line), or not a list of objects.
  """
  path = pathlib.Path(path)
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise AnnotationError(f"annotations {path} can't be read: {_line(error)}") from error
  # In jsonl every line is a document; split at "\n" only, as text may hold other separators that splitlines() knows.
  documents = [(n, t) for n, t in enumerate(text.split("\n"), 1) if t.strip()] if path.suffix == ".jsonl" else [(1, text)]
  items = []
  for n, document in documents:
    try:
      items.append(json.loads(document))
    except json.JSONDecodeError as error:
      raise AnnotationError(f"annotations {path}, line {n + error.lineno - 1}: not JSON: {error.msg}") from error
  if path.suffix != ".jsonl":
    items = items[0]
  if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
    raise AnnotationError(f"annotations {path}: expected a list of objects")
  return items


def predecode(
  mixture: str | os.PathLike,
  out: str | os.PathLike,
  settings: Settings,
  *,
  root: str | os.PathLike = ".",
  subset: float = 1.0,
  workers: int = 0,
  samples_per_shard: int = 64,
  skip_bad: bool = False,
) -> dict[str, Any]:
  """Writes the store `out` and returns what its store.json says.

  The result is the same for every number of workers. If anything fails, nothing is left behind.

  Args:
    mixture: YAML file.
    out: folder to be; must not exist.
    settings: frames and pixels.
    root: where relative paths of the mixture start.
    subset: share of each annotation file's selection (0.25 in the release).
    workers: decoding processes; 0 decodes in this one.
    samples_per_shard: annotations that one process takes at once, and one file of clips holds.
    skip_bad: leave out annotations and videos that can't be used, and say so in store.json, instead of stopping.

  Raises:
    AnnotationError: problems with the mixture or its annotations, all listed, before anything is decoded.
    VideoError: a video can't be used; names the annotation.
    ValueError: frame limits that contradict each other.
    StoreError: `out` exists or can't be written, or no sample is left.
  """
  video.frame_indices(0, 1.0, **_sampling(settings))  # refuses limits that contradict each other
  with store.fresh_folder(out) as folder:  # first, so that a target that can't be written costs no time
    jobs, skipped, files = read_mixture(mixture, root, subset)
    if skipped and not skip_bad:
      shown = [f"{p['annotation']}, annotation {p['position']}: {p['reason']}" for p in skipped]
      more = [f"... and {len(shown) - 50} more"] if len(shown) > 50 else []
      raise AnnotationError(f"{len(shown)} bad annotations (--skip_bad leaves them out):\n  " + "\n  ".join(shown[:50] + more))
    parts = [jobs[i : i + samples_per_shard] for i in range(0, len(jobs), samples_per_shard)]
    tasks = [(str(folder / f"shard-{n:06d}"), part) for n, part in enumerate(parts)]
    results = _run(functools.partial(_shard, settings, skip_bad), tasks, workers, len(jobs))
    shards = [shard for shard, _ in results]
    skipped += [problem for _, problems in results for problem in problems]
    info = dataclasses.asdict(settings) | {"subset": subset, "annotation_files": files, "skipped": skipped}
    store.finish(folder, shards, _layout(settings), info)
    text = (folder / "store.json").read_text(encoding="utf-8")
  return json.loads(text)


def _has_one_visual(item: Mapping[str, Any]) -> bool:
  visuals = [item[key] for key in ("image", "video") if key in item]
  return len(visuals) == 1 and not isinstance(visuals[0], list)


def _job(item: Mapping[str, Any], position: int, annotation: str, folder: pathlib.Path, reader: str) -> tuple[Job, list[str]]:
  """The job of an annotation that `select` has let through, and what is wrong with it."""
  faults = []
  key = "image" if "image" in item else "video"
  reader = "img" if key == "image" else reader
  name = item[key]
  path = folder / name if isinstance(name, str) else folder
  if not isinstance(name, str) or not name:
    faults.append(f"{key} must be a path, not {name!r}")
  elif not path.exists():
    faults.append(f"{path} does not exist")
  elif path.is_dir() != (reader == "frames"):
    faults.append(f"{path} is {'a folder' if path.is_dir() else 'a file'}; video_read_type img means folders of frames, all others files")
  talk = item.get("conversations")
  try:
    prompt.check(talk, visual=True)
  except AnnotationError as error:
    faults.append(str(error))
  times = [item.get("start"), item.get("end")]
  if not all(t is None or (isinstance(t, (int, float)) and not isinstance(t, bool) and math.isfinite(t)) for t in times):
    faults.append(f"start {times[0]!r} and end {times[1]!r} must be seconds")
    times = [None, None]
  start, end = (t if t is None else float(t) for t in times)
  if (start or 0) < 0 or (end is not None and end <= (start or 0)):
    faults.append(f"start {times[0]} and end {times[1]}: expected 0 <= start < end")
  turns = () if faults else tuple({"from": t["from"], "value": t["value"]} for t in talk)
  sample = store.Sample(str(item.get("id", position)), str(path), annotation, position, turns, "")
  return Job(sample, reader, start, end), faults


def _problem(annotation: str, position: int, source: str, reason: str) -> dict[str, Any]:
  return {"annotation": annotation, "position": position, "source": source, "reason": reason}


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())


def _sampling(settings: Settings) -> dict[str, Any]:
  return {
    "max_frames": settings.max_frames, "min_frames": settings.min_frames, "target_fps": settings.fps,
    "clip_frames": settings.clip_frames, "style": "train",
  }


def _layout(settings: Settings) -> store.Layout:
  return store.Layout(settings.image_size, settings.clip_frames, None, None)


def _decode(job: Job, settings: Settings) -> tuple[store.Sample, np.ndarray]:
  size, clip_frames = settings.image_size, 1 if job.reader == "img" else settings.clip_frames
  loaded = video.load(
    job.sample.source, size=size, max_frames=settings.max_frames, min_frames=settings.min_frames, fps=settings.fps,
    clip_frames=settings.clip_frames, style="train", start=job.start, end=job.end, read_type=job.reader,
  )
  message = "" if job.reader == "img" else prompt.time_message(loaded.seconds, len(loaded.frames))
  return dataclasses.replace(job.sample, time_message=message), loaded.frames.reshape(-1, clip_frames, size, size, 3)


def _shard(
  settings: Settings, skip_bad: bool, path: str, jobs: Sequence[Job], tick: Callable[[], None] | None = None
) -> tuple[store.Shard, list[dict]]:
  """Decodes jobs into one file of clips; returns what was written, and the problems that were skipped."""
  tick, problems = tick or _tick, []

  def items():
    for job in jobs:
      sample = job.sample
      try:
        item = _decode(job, settings)
      except (video.VideoError, OSError) as error:
        if not skip_bad:
          text = f"{sample.annotation}, annotation {sample.position}: {_line(error)} (--skip_bad leaves such out)"
          raise video.VideoError(text) from error
        problems.append(_problem(sample.annotation, sample.position, sample.source, _line(error)))
      else:
        yield item
      tick()

  return store.write_shard(path, items(), _layout(settings)), problems


_worker: list = []  # in a decoding process: the counter of finished samples, and the sign to stop


def _start(done, stop) -> None:
  _worker[:] = done, stop
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
  parent = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no orphans of a killed run


def _tick() -> None:
  done, stop = _worker
  with done.get_lock():
    done.value += 1
  if stop.is_set():
    raise InterruptedError("another process has failed")


def _run(work: Callable, tasks: Sequence[tuple], workers: int, total: int) -> list:
  """work(*task) of every task, in order, with a progress bar over all samples."""
  with tqdm.tqdm(total=total, unit="sample", desc="predecode") as bar:
    if not workers:
      return [work(*task, bar.update) for task in tasks]
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whoever calls
    done, stop = spawn.Value("q", 0), spawn.Event()
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start, (done, stop)) as pool:
      futures = [pool.submit(work, *task) for task in tasks]
      waiting = set(futures)
      try:
        while waiting:
          finished, waiting = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_EXCEPTION)
          bar.update(done.value - bar.n)
          for future in finished:
            future.result()
      except concurrent.futures.process.BrokenProcessPool as error:
        raise store.StoreError("a decoding process died, perhaps for want of memory; use fewer --workers") from error
      finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _define_flags() -> None:
  flags.DEFINE_string("mixture", None, "YAML with the datasets to read", required=True)
  flags.DEFINE_string("out", None, "folder to write; must not exist", required=True)
  flags.DEFINE_string("root", ".", "where relative paths of the mixture start")
  flags.DEFINE_float("subset", 1.0, "share of each annotation file's selection; 0.25 in the release", 0.0, 1.0)
  flags.DEFINE_integer("image_size", 448, "pixels, square: of the checkpoint's tower", 1)
  flags.DEFINE_integer("max_frames", 1024, "frames of a video, at most", 1)
  flags.DEFINE_integer("min_frames", 128, "frames of a video, if it has as many", 1)
  flags.DEFINE_float("fps", 8.0, "frames per second, at most", 0.001)
  flags.DEFINE_integer("clip_frames", 8, "frames that the tower sees together", 1)
  flags.DEFINE_integer("workers", os.cpu_count(), "decoding processes; 0: none beside this one", 0)
  flags.DEFINE_integer("samples_per_shard", 64, "samples that a process takes at once", 1)
  flags.DEFINE_bool("skip_bad", False, "leave out what can't be used, and list it in store.json")


def main(argv: Sequence[str]) -> None:
  """The command; an error is one line on stderr, exit code 1, and nothing written."""
  f = flags.FLAGS
  if argv[1:]:
    sys.exit(f"error: unexpected argument {argv[1]!r}; everything is given by flags, see --help")
  settings = Settings(f.image_size, f.max_frames, f.min_frames, f.fps, f.clip_frames)
  try:
    info = predecode(
      f.mixture, f.out, settings, root=f.root, subset=f.subset, workers=f.workers,
      samples_per_shard=f.samples_per_shard, skip_bad=f.skip_bad,
    )
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(f"{f.out}: {info['samples']} samples, {info['frames']} frames, {len(info['skipped'])} skipped")


if __name__ == "__main__":
  _define_flags()  # not on import: a decoding process imports this file again
  app.run(main)
