"""From annotations to shards: decoding in processes that may hang or die, in steps that a killed run need not do again.

In a folder:

    spool/0000012.json          annotation 12 is decoded, or bad: an entry (see `decode`)
    spool/0000012.bin           its records, one after the other
    spool/0000012.pixels.*      the same, of frames that wait for the tower
    shards/000003.array_record  the records of a shard's annotations
    shards/000003.json          shard 3 is whole: its entries

Each file appears by a rename, and the .json last; so what is there is whole, whenever the process was killed. The result
does not depend on the number of processes, on their order, or on interruptions.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pebble

from xcomp_jax.data import store, video
from xcomp_jax.data.mixture import Job
from xcomp_jax.files import one_line, replacing, too_many_files, write_json

TASKS_PER_PROCESS = 256  # then a fresh one takes its place: decoders leak


@dataclasses.dataclass(frozen=True)
class Settings:
  """How frames are chosen (FACTS.md 5 and 6)."""

  image_size: int  # pixels, square
  max_frames: int
  min_frames: int
  fps: float  # frames per second, at most
  clip_frames: int  # frames of a clip
  rate: video.Rate = "own"  # when frames of a video are shown
  keep_tails: bool = False  # take what can be read of a video that ends before it should


@dataclasses.dataclass(frozen=True)
class Work:
  """Everything that decides what is in the shards."""

  folder: pathlib.Path
  settings: Settings
  layout: store.Layout
  jobs: Mapping[int, Job]  # by number; those of some shards are enough to `run` them
  count: int  # of all jobs
  per_shard: int  # annotations, good and bad

  @property
  def shards(self) -> range:
    """Their numbers."""
    return range(-(-self.count // self.per_shard))

  def members(self, shard: int) -> range:
    """Which jobs a shard has."""
    return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

  def spool(self, job: int, suffix: str) -> pathlib.Path:
    """A file of an annotation."""
    return self.folder / "spool" / f"{job:07d}{suffix}"

  def shard(self, number: int, suffix: str) -> pathlib.Path:
    """A file of a shard."""
    return self.folder / "shards" / f"{number:06d}{suffix}"


# What processes do. Entries are written as JSON: {"frames", "clip_frames", "seconds", "lengths", "crc32"}, with the bytes
# of each record and the CRC-32 of what they hold, or {"reason", "stamp"}.


def decode(job: Job, settings: Settings, layout: store.Layout, target: str) -> None:
  """Decodes a job into `target`.bin and .json; what the decoder can't do becomes the reason in the latter.

  Memory is bounded by one record, whatever the length of the video.

  Raises:
    OSError: the files can't be written.
  """
  if job.reader is None:
    spool(iter(()), 1, layout, target, None)
    return
  before = stamp(job.sample.source)
  clip_frames = 1 if job.reader == "img" else settings.clip_frames
  try:
    with _blaming(job):
      chosen = _chosen(job, settings)
    try:
      spool(_clips(job, chosen, clip_frames), clip_frames, layout, target, _seconds(job, chosen))
    except video.TailError as error:
      if not settings.keep_tails:
        raise
      chosen = video.without_tail(chosen, error)
      spool(_clips(job, chosen, clip_frames), clip_frames, layout, target, _seconds(job, chosen))
  except video.VideoError as error:
    write_bad(target, str(error), before)


def spool(clips: Iterator[np.ndarray], clip_frames: int, layout: store.Layout, target: str, seconds: float | None) -> None:
  """Writes clips into `target`.bin, and the entry into .json."""
  count, lengths, crc = 0, [], 0
  with replacing(f"{target}.bin") as temporary, open(temporary, "wb") as file:
    for record, n, content in store.records(layout, clips, clip_frames):
      file.write(record)
      lengths.append(len(record))
      crc = store.content_crc(content, crc)
      count += n
  entry = {"frames": count * clip_frames, "clip_frames": clip_frames, "seconds": seconds, "lengths": lengths, "crc32": crc}
  write_json(f"{target}.json", entry)


def write_bad(target: str, reason: str, at: Any) -> None:
  """Writes the entry of a job that can't be used; `at` is the `stamp` of its file."""
  reason = reason.encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8
  write_json(f"{target}.json", {"reason": one_line(reason), "stamp": at})
  pathlib.Path(f"{target}.bin").unlink(missing_ok=True)


def assemble(work_shard: str, targets: Sequence[str]) -> None:
  """Joins the spools of a shard's jobs into `work_shard`.array_record and .json, and removes them.

  Raises:
    StoreError: a spool that is shorter than its entry says. OSError: the files can't be written.
  """
  if os.path.exists(f"{work_shard}.json"):  # by a process that died before it had removed all spools
    for target in targets:
      remove(target)
    return
  entries = [json.loads(pathlib.Path(f"{target}.json").read_text()) for target in targets]
  size, count, writer = 0, 0, None
  with replacing(f"{work_shard}.array_record") as temporary, store.writing(temporary):
    try:
      for target, entry in zip(targets, entries, strict=True):
        if "reason" in entry:
          continue
        with open(f"{target}.bin", "rb") as file:
          for length in entry["lengths"]:
            record = file.read(length)
            if len(record) != length:
              raise store.StoreError(f"{target}.bin is damaged; start from the beginning with --restart")
            writer = writer or store.array_record(temporary)
            writer.write(record)
            size, count = size + length, count + 1
    finally:
      if writer is not None:
        writer.close()
  write_json(f"{work_shard}.json", {"entries": entries, "records": count, "bytes": size})
  for target in targets:
    remove(target)


def remove(target: str) -> None:
  """Removes a spool; the entry first, for it says that the records are there."""
  for suffix in (".json", ".bin"):
    pathlib.Path(target + suffix).unlink(missing_ok=True)


def stamp(path: str | os.PathLike) -> list[int] | None:
  """Sizes and times of a file, or of those in a folder; None if there is nothing. Another stamp: try again."""
  if not path:  # of text
    return None
  try:
    path = pathlib.Path(path)
    stats = [p.stat() for p in sorted(path.iterdir())] if path.is_dir() else [path.stat()]
    return [len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]
  except (OSError, ValueError):
    return None


def _chosen(job: Job, settings: Settings) -> video.Sample:
  assert job.reader is not None  # text has no frames
  return video.sample(
    job.sample.source, size=settings.image_size, max_frames=settings.max_frames, min_frames=settings.min_frames,
    fps=settings.fps, clip_frames=settings.clip_frames, style="train", start=job.start, end=job.end, read_type=job.reader,
    rate=settings.rate, folder_rate=job.frame_rate, tails=settings.keep_tails,
  )  # fmt: skip


def _seconds(job: Job, chosen: video.Sample) -> float | None:
  """None of an image."""
  return None if job.reader == "img" else chosen.seconds


def _clips(job: Job, chosen: video.Sample, size: int) -> Iterator[np.ndarray]:
  """Clips uint8[F, S, S, 3] one by one; whatever goes wrong is a VideoError."""
  with _blaming(job):
    images = []
    for image in video.frames(chosen):
      images.append(image)
      if len(images) == size:
        yield np.stack(images)
        images = []


@contextlib.contextmanager
def _blaming(job: Job) -> Generator[None]:
  """Damaged files make libraries raise anything."""
  try:
    yield
  except Exception as error:
    if text := too_many_files(error):  # not the file's fault
      raise OSError(text) from error
    if isinstance(error, video.VideoError):
      raise
    if isinstance(error, OSError):
      raise video.VideoError(str(error)) from error
    raise video.VideoError(f"{job.sample.source} can't be decoded: {type(error).__name__}: {error}") from error


def sampling(settings: Settings) -> dict[str, Any]:
  """Keywords of `video.frame_indices`."""
  return {
    "max_frames": settings.max_frames, "min_frames": settings.min_frames, "target_fps": settings.fps,
    "clip_frames": settings.clip_frames, "style": "train",
  }  # fmt: skip


# What the main process does.


def prepare(work: Work, skip_bad: bool) -> int:
  """Makes the folders, and clears what a run that was stopped left half done; returns how many annotations are done.

  What was bad is tried again if its file has changed, and always unless `skip_bad`.
  """
  for name in ("spool", "shards"):
    (work.folder / name).mkdir(exist_ok=True)
    for file in (work.folder / name).glob("*.tmp"):
      file.unlink()
  again = lambda entry, job: "reason" in entry and (not skip_bad or entry["stamp"] != stamp(work.jobs[job].sample.source))
  done = 0
  for number in work.shards:
    file = work.shard(number, ".json")
    entries = json.loads(file.read_text())["entries"] if file.exists() else []
    if any(again(entry, job) for entry, job in zip(entries, work.members(number))):
      file.unlink()
    elif entries:
      done += len(entries)
      for job in work.members(number):
        remove(str(work.spool(job, "")))
        remove(str(work.spool(job, ".pixels")))
  for file in (work.folder / "spool").glob("*.json"):
    if again(json.loads(file.read_text()), int(file.name.split(".")[0])):
      file.unlink()
    elif not file.name.endswith(".pixels.json"):
      done += 1
  return done


def run(
  work: Work,
  shards: Sequence[int],
  *,
  workers: int,
  timeout: float | None,
  skip_bad: bool,
  encode: Callable[[int], None] | None = None,
  report: Callable[[], object] = lambda: None,
) -> None:
  """Decodes and assembles those of `shards` that are not there.

  Shards with bad annotations are only assembled if `skip_bad`; otherwise their spools stay.

  Args:
    work: what to do, after `prepare`.
    shards: numbers.
    workers: processes; 0: in this one, where no time limit holds.
    timeout: seconds after which the decoding of one annotation is given up.
    skip_bad: leave out what is bad.
    encode: makes the spool of a job from its pixels, in this process.
    report: called after each annotation.

  Raises:
    OSError, StoreError: what keeps processes from starting, or the files from being written, for want of space perhaps.
  """
  missing = {n: set(work.members(n)) for n in shards if not work.shard(n, ".json").exists()}
  if not missing:
    return
  waiting = collections.deque(job for n in missing for job in work.members(n))
  suspects, died = collections.deque(), set()  # jobs in whose company a process died; they run once more, alone
  spoiled, running = set(), {}
  pool = _pool(workers) if workers else _Here()
  target = lambda job: str(work.spool(job, ".pixels" if encode else ""))

  def start(job: int) -> None:
    args = (work.jobs[job], work.settings, dataclasses.replace(work.layout, features=None), target(job))
    running[pool.schedule(decode, args=args, timeout=timeout)] = "job", job

  def join(n: int) -> None:
    targets = [str(work.spool(member, "")) for member in work.members(n)]
    running[pool.schedule(assemble, args=(str(work.shard(n, "")), targets))] = "shard", n

  def settle(job: int) -> None:
    """Goes on with a job that is decoded, and with its shard if it was the last."""
    if encode:
      _encode(work, job, encode)
    n = job // work.per_shard
    if "reason" in json.loads(work.spool(job, ".json").read_text()):
      spoiled.add(n)
    missing[n].remove(job)
    if not missing[n] and (skip_bad or n not in spoiled):
      join(n)

  def give_up(job: int, reason: str) -> None:
    for file in work.spool(job, "").parent.glob(f"{job:07d}.*.tmp"):
      file.unlink()
    source = work.jobs[job].sample.source
    write_bad(target(job), f"{source}: {reason}", stamp(source))
    settle(job)
    report()

  try:
    while waiting or running or suspects:
      if suspects and not running:
        start(suspects.popleft())
      while waiting and not suspects and not died & {n for kind, n in running.values() if kind == "job"} and len(running) < max(1, 2 * workers):
        job = waiting.popleft()
        if work.spool(job, ".json").exists():
          settle(job)
        elif work.jobs[job].faults:
          write_bad(target(job), "; ".join(work.jobs[job].faults), stamp(work.jobs[job].sample.source))
          settle(job)
          report()
        elif encode and work.spool(job, ".pixels.json").exists():
          settle(job)
          report()
        else:
          start(job)
      finished, _ = concurrent.futures.wait(running, 0.5, concurrent.futures.FIRST_COMPLETED)
      broken = ""
      for future in finished:
        kind, n = running[future]
        try:
          future.result()
        except concurrent.futures.BrokenExecutor as error:
          broken = str(error)  # this future and all others: below
          continue
        except pebble.ProcessExpired as error:  # an OSError, too
          lost, again = _how(error.exitcode), n not in died
        except TimeoutError:
          lost, again = f"decoding took more than {timeout:g} seconds (--timeout)", False
        else:
          lost, again = "", False
        del running[future]
        if kind == "shard":
          if lost:
            raise store.StoreError(f"writing a shard failed: {lost}; run the same command again")
        elif again:
          died.add(n)
          suspects.append(n)
        elif lost:
          give_up(n, lost)
        else:
          settle(n)
          report()
      if broken:
        pool.stop()
        pool.join()
        pool = _pool(workers)
        tasks = list(running.values())
        if all(kind == "shard" for kind, _ in tasks):
          raise store.StoreError(f"writing shards failed: {broken}; run the same command again")
        running.clear()
        for kind, n in tasks:
          if kind == "shard":
            join(n)
          elif n in died:
            give_up(n, _how(None))
          else:
            died.add(n)
            suspects.append(n)
  finally:
    pool.stop()
    pool.join()


def entries(work: Work) -> list[dict[str, Any]]:
  """What became of every annotation, after `run` of all shards: entries of `decode`, with the number of their records."""
  found = []
  for n in work.shards:
    file = work.shard(n, ".json")
    if file.exists():
      found += json.loads(file.read_text())["entries"]
    else:
      found += [json.loads(work.spool(job, ".json").read_text()) for job in work.members(n)]
  return found


def _how(exit_code: int | None) -> str:
  by = f" ({signal.Signals(-exit_code).name})" if exit_code and exit_code < 0 else ""
  return f"its process died{by}, also when tried again alone: a damaged file, or too little memory"


def _encode(work: Work, job: int, encode: Callable[[int], None]) -> None:
  if not work.spool(job, ".json").exists():
    pixels = json.loads(work.spool(job, ".pixels.json").read_text())
    if "reason" in pixels:
      write_json(work.spool(job, ".json"), pixels)
    else:
      encode(job)
  remove(str(work.spool(job, ".pixels")))


def spooled_frames(work: Work, job: int) -> tuple[dict[str, Any], Iterator[np.ndarray]]:
  """The entry of decoded pixels, and their clips uint8[F, S, S, 3] one by one."""
  entry = json.loads(work.spool(job, ".pixels.json").read_text())
  coder = store.record_features(dataclasses.replace(work.layout, features=None))

  def clips():
    with open(work.spool(job, ".pixels.bin"), "rb") as file:
      for length in entry["lengths"]:
        frames = coder.deserialize_example_np(file.read(length))["frames"]
        yield from frames.reshape(-1, entry["clip_frames"], *frames.shape[1:])

  return entry, clips()


class _Here:
  """A pool that is this process."""

  def schedule(self, function: Callable, args: Sequence, timeout: float | None = None) -> concurrent.futures.Future:
    future = concurrent.futures.Future()
    try:
      future.set_result(function(*args))
    except Exception as error:
      future.set_exception(error)
    return future

  def stop(self) -> None:
    pass

  def join(self) -> None:
    pass


def _pool(workers: int) -> pebble.ProcessPool:
  """Processes of which one has begun to work.

  Raises:
    StoreError: they die before they take any work, which must not be blamed on that.
  """
  spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whoever calls
  pool = pebble.ProcessPool(workers, max_tasks=TASKS_PER_PROCESS, initializer=_begin, context=spawn)
  try:
    pool.schedule(int).result()
  except (concurrent.futures.BrokenExecutor, pebble.ProcessExpired) as error:
    pool.stop()
    pool.join()
    advice = 'a script that calls this has to do so under `if __name__ == "__main__":`; with workers=0 none are needed'
    raise store.StoreError(f"processes for decoding die as they start ({one_line(error)}; what they said is above): {advice}") from error
  return pool


def _begin() -> None:
  """In a decoding process: imports before any clock runs, and no life beyond its parent's."""
  import tensorflow_datasets  # noqa: F401

  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg complains at length; the reason comes back as an exception
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a decoder that hangs runs no Python handler
  parent = multiprocessing.parent_process()
  assert parent is not None  # this one was started by it
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_one(task: tuple[Work, int, float, bool]) -> int:
  """`run` for one shard, in a worker of another machine; its own process below, so that time limits hold there."""
  work, number, timeout, skip_bad = task
  run(work, [number], workers=1, timeout=timeout, skip_bad=skip_bad)
  return number
