"""From annotations to shards: decoding in processes that may hang or die, in steps that a killed
run need not do again.

In a folder:

    spool/0000012.records       annotation 12 is decoded, or bad: its records, one after the other,
                                and an entry (see `decode_job`)
    spool/0000012.pixels        the same, of frames that wait for the tower
    shards/000003.array_record  the records of a shard's annotations
    shards/000003.json          shard 3 is whole: its entries

Each file appears by a rename, and the .json of a shard after its records; so what is there is
whole, whenever the process was killed. What a machine that stopped has lost of a spool is decoded
again. The result does not depend on the number of processes, on their order, or on interruptions.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xcomp_jax.data import spools, store, video
from xcomp_jax.data.mixture import Job
from xcomp_jax.data.processes import DiedError, Here, Processes, StartError
from xcomp_jax.errors import one_line, too_many_files
from xcomp_jax.files import replacing, write_json
from xcomp_jax.inputs import read_json

# Frames of videos that a process decodes before a fresh one takes its place: decoders of videos
# leak, in the worst case seen 3 kB a frame.
LIFE = 1 << 16


@dataclasses.dataclass(frozen=True)
class FrameSettings:
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
  settings: FrameSettings
  layout: store.Layout
  jobs: Mapping[int, Job]  # by number; those of some shards are enough to `decode_shards` them
  count: int  # of all jobs
  per_shard: int  # annotations, good and bad

  @property
  def shards(self) -> range:
    """Their numbers."""
    return range(-(-self.count // self.per_shard))

  def members(self, shard: int) -> range:
    """Which jobs a shard has."""
    return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.count))

  def spool(self, job: int, suffix: str = ".records") -> str:
    """A file of an annotation."""
    return _spool(os.fspath(self.folder), job, suffix)

  def shard(self, number: int, suffix: str) -> pathlib.Path:
    """A file of a shard."""
    return self.folder / "shards" / f"{number:06d}{suffix}"


def _spool(folder: str, job: int, suffix: str = ".records") -> str:
  return os.path.join(folder, "spool", f"{job:07d}{suffix}")


# What processes do. Entries are written as JSON: {"frames", "clip_frames", "seconds", "lengths",
# "crc32"}, with the bytes of each record and the CRC-32 of what they hold, or {"reason", "stamp"}.


def decode_job(
  job: Job, settings: FrameSettings, layout: store.Layout, target: str
) -> tuple[int, bool]:
  """Decodes a job into the file `target`; what the decoder can't do becomes the reason in its
  entry.

  Memory is bounded by one record, whatever the length of the video.

  Returns:
    how many frames of a video were decoded; whether it is good.

  Raises:
    OSError: the file can't be written. MemoryError: there is not enough.
  """
  if job.reader is None:
    spool(iter(()), 1, layout, target, None)
    return 0, True
  before, decoded = file_stamp(job.sample.source), 0
  clip_frames = 1 if job.reader == "img" else settings.clip_frames
  try:
    with _blaming(job):
      chosen = _chosen(job, settings)
    decoded = _decoded(chosen)
    try:
      spool(_clips(job, chosen, clip_frames), clip_frames, layout, target, _seconds(job, chosen))
    except video.TailError as error:
      if not settings.keep_tails:
        raise
      chosen = video.without_tail(chosen, error)
      decoded += _decoded(chosen)
      spool(_clips(job, chosen, clip_frames), clip_frames, layout, target, _seconds(job, chosen))
  except video.VideoError as error:
    write_bad(target, str(error), before)
    return decoded, False
  return decoded, True


def spool(
  clips: Iterator[np.ndarray],
  clip_frames: int,
  layout: store.Layout,
  target: str,
  seconds: float | None,
) -> None:
  """Writes clips, and the entry behind them, into the file `target`."""
  count, lengths, crc = 0, [], 0
  with spools.writing_spool(target) as write:
    for record, n, content in store.records(layout, clips, clip_frames):
      write(record)
      lengths.append(len(record))
      crc = store.content_crc(content, crc)
      count += n
    write(
      {
        "frames": count * clip_frames,
        "clip_frames": clip_frames,
        "seconds": seconds,
        "lengths": lengths,
        "crc32": crc,
      }
    )


def write_bad(target: str, reason: str, at: Any) -> None:
  """Writes the file `target` of a job that can't be used; `at` is the `file_stamp` of what should
  have been decoded.
  """
  reason = reason.encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8
  with spools.writing_spool(target) as write:
    write({"reason": one_line(reason), "stamp": at})


def assemble(folder: str, shard: str, members: range) -> tuple[int, bool]:
  """Joins the spools of a shard's jobs, in a folder, into `shard`.array_record and .json, and
  removes them.

  Raises:
    spools.DamagedError: of a spool. OSError: the files can't be written.
  """
  files = [_spool(folder, job) for job in members]
  if not os.path.exists(f"{shard}.json"):  # else a process died before it had removed all spools
    entries, size, count, writer = [], 0, 0, None
    with replacing(f"{shard}.array_record") as temporary, store.writing_records(temporary):
      try:
        for file in files:
          entry, records = spools.read_spool(file)
          entries.append(entry)
          for record in records:
            writer = writer or store.array_record(temporary)
            writer.write(record)
            size, count = size + len(record), count + 1
      finally:
        if writer is not None:
          writer.close()
      if writer is None:
        temporary.unlink()
    write_json(f"{shard}.json", {"entries": entries, "records": count, "bytes": size})
  for file in files:
    pathlib.Path(file).unlink(missing_ok=True)
  return 0, True


def file_stamp(path: str | os.PathLike) -> list[int] | None:
  """Sizes and times of a file, or of those in a folder; None if there is nothing. Another stamp:
  try again.
  """
  if not path:  # of text
    return None
  try:
    path = pathlib.Path(path)
    stats = [p.stat() for p in sorted(path.iterdir())] if path.is_dir() else [path.stat()]
    return [
      len(stats),
      sum(s.st_size for s in stats),
      max((s.st_mtime_ns for s in stats), default=0),
    ]
  except (OSError, ValueError):
    return None


def _chosen(job: Job, settings: FrameSettings) -> video.FrameSample:
  assert job.reader is not None  # text has no frames
  return video.sample(
    job.sample.source,
    size=settings.image_size,
    max_frames=settings.max_frames,
    min_frames=settings.min_frames,
    fps=settings.fps,
    clip_frames=settings.clip_frames,
    style="train",
    start=job.start,
    end=job.end,
    read_type=job.reader,
    rate=settings.rate,
    folder_rate=job.frame_rate,
    tails=settings.keep_tails,
  )


def _decoded(chosen: video.FrameSample) -> int:
  """How many frames of a video are decoded for a sample of it: all from the first that is wanted
  on.
  """
  return 0 if chosen.found is None else chosen.stop - int(chosen.indices[0])


def _seconds(job: Job, chosen: video.FrameSample) -> float | None:
  """None of an image."""
  return None if job.reader == "img" else chosen.seconds


def _clips(job: Job, chosen: video.FrameSample, size: int) -> Iterator[np.ndarray]:
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
    # others may be to blame
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
      raise MemoryError(str(error)) from error
    if isinstance(error, video.VideoError):
      raise
    if isinstance(error, OSError):
      raise video.VideoError(str(error)) from error
    raise video.VideoError(
      f"{job.sample.source} can't be decoded: {type(error).__name__}: {error}"
    ) from error


def sampling(settings: FrameSettings) -> dict[str, Any]:
  """Keywords of `video.frame_indices`."""
  return {
    "max_frames": settings.max_frames,
    "min_frames": settings.min_frames,
    "target_fps": settings.fps,
    "clip_frames": settings.clip_frames,
    "style": "train",
  }


# What the main process does.


def prepare_work(work: Work, skip_bad: bool) -> int:
  """Makes the folders, and clears what a run that was stopped left half done; returns how many
  annotations are done.

  What was bad is tried again if its file has changed, and always unless `skip_bad`.
  """
  for name in ("spool", "shards"):
    (work.folder / name).mkdir(exist_ok=True)
  for file in (work.folder / "shards").glob("*.tmp"):
    file.unlink()

  def again(entry, job):
    return "reason" in entry and (
      not skip_bad or entry["stamp"] != file_stamp(work.jobs[job].sample.source)
    )

  done, whole = 0, set()
  for number in work.shards:
    file = work.shard(number, ".json")
    entries = read_json(file, store.StoreError)["entries"] if file.exists() else []
    if any(again(entry, job) for entry, job in zip(entries, work.members(number))):
      file.unlink()
    elif entries:
      done += len(entries)
      whole.add(number)
  for file in (work.folder / "spool").iterdir():
    number, _, suffix = file.name.partition(".")
    kept = suffix == "records" and int(number) // work.per_shard not in whole
    # the machine had stopped before it was on the disk
    with contextlib.suppress(spools.DamagedError):
      if kept and not again(spools.read_spool(str(file))[0], int(number)):
        done += 1
        continue
    file.unlink()
  return done


def decode_shards(
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
    work: what to do, after `prepare_work`.
    shards: numbers.
    workers: processes; 0: in this one, where no time limit holds.
    timeout: seconds after which the decoding of one annotation is given up.
    skip_bad: leave out what is bad.
    encode: makes the spool of a job from its pixels, in this process.
    report: called after each annotation.

  Raises:
    OSError, StoreError: what keeps processes from starting, or the files from being written, for
      want of space perhaps.
  """
  missing = {n: set(work.members(n)) for n in shards if not work.shard(n, ".json").exists()}
  if not missing:
    return
  there = {
    int(name.split(".")[0])
    for name in os.listdir(work.folder / "spool")
    if name.endswith(".records")
  }
  waiting = collections.deque(job for n in missing for job in work.members(n))
  # jobs whose process died, and all that has been tried again; jobs run alone then
  suspects, tried = (
    collections.deque(),
    set(),
  )
  spoiled, running = set(), set()
  layout = dataclasses.replace(work.layout, features=None)

  def target(job):
    return work.spool(job, ".pixels" if encode else ".records")

  pool = Processes(workers, LIFE, __name__) if workers else Here()

  def join(n: int) -> None:
    running.add(("shard", n))
    pool.call(
      ("shard", n), assemble, os.fspath(work.folder), str(work.shard(n, "")), work.members(n)
    )

  def start(job: int) -> None:
    running.add(("job", job))
    task = work.jobs[job]
    # what decoding doesn't need may be long
    task = dataclasses.replace(task, sample=dataclasses.replace(task.sample, conversations=()))
    pool.call(("job", job), decode_job, task, work.settings, layout, target(job), timeout=timeout)

  def settle(job: int, good: bool) -> None:
    """Goes on with a job that is decoded, and with its shard if it was the last."""
    if encode:
      _encode(work, job, encode)
    n = job // work.per_shard
    if not good:
      spoiled.add(n)
    missing[n].remove(job)
    if not missing[n] and (skip_bad or n not in spoiled):
      join(n)

  def give_up(job: int, reason: str) -> None:
    write_bad(target(job), reason, file_stamp(work.jobs[job].sample.source))
    settle(job, False)
    report()

  def lost(job: int, error: Exception) -> None:
    source = work.jobs[job].sample.source
    for file in pathlib.Path(work.folder, "spool").glob(f"{job:07d}.*.tmp"):
      file.unlink()
    if isinstance(error, DiedError) and error.late:
      give_up(job, f"{source}: decoding took more than {timeout:g} seconds (--timeout)")
    elif ("job", job) not in tried:
      tried.add(("job", job))
      suspects.append(job)
    else:
      give_up(
        job,
        f"{source}: {_how(error)}, also when tried again alone: a damaged file, or too little "
        f"memory",
      )

  try:
    while waiting or running or suspects:
      if suspects and not running:
        start(suspects.popleft())
      alone = any(kind == "job" for kind, _ in running & tried)
      while waiting and not suspects and not alone and len(running) < max(1, 2 * workers):
        job = waiting.popleft()
        if job in there:
          settle(job, "reason" not in spools.read_spool(work.spool(job))[0])
        elif work.jobs[job].faults:
          give_up(job, "; ".join(work.jobs[job].faults))
        else:
          start(job)
      for (kind, n), good, error in pool.ended():
        running.remove((kind, n))
        if error is None:
          if kind == "job":
            settle(n, good)
            report()
        elif isinstance(error, spools.DamagedError) and kind == "shard" and error.file not in tried:
          tried.add(error.file)
          os.unlink(error.file)
          job = int(os.path.basename(error.file).split(".")[0])
          missing[n].add(job)
          there.discard(job)
          waiting.appendleft(job)
        elif not isinstance(error, (DiedError, MemoryError)):
          raise error
        elif kind == "job":
          lost(n, error)
        elif (kind, n) not in tried:
          tried.add((kind, n))
          join(n)
        else:
          raise store.StoreError(
            f"writing a shard failed: {_how(error)}; run the same command again"
          )
  except StartError as error:
    raise store.StoreError(
      f"processes for decoding die as they start ({error}; what they said is above); with "
      f"workers=0 none are needed"
    ) from error
  finally:
    pool.stop()


def entries(work: Work) -> list[dict[str, Any]]:
  """What became of every annotation, after `decode_shards` of all shards: entries of `decode_job`,
  with the number of their records.
  """
  found = []
  for n in work.shards:
    file = work.shard(n, ".json")
    if file.exists():
      found += read_json(file, store.StoreError)["entries"]
    else:
      found += [spools.read_spool(work.spool(job))[0] for job in work.members(n)]
  return found


def _how(error: Exception) -> str:
  if not isinstance(error, DiedError):
    return "it takes more memory than there is"
  return f"its process died{f' ({signal.Signals(-error.code).name})' if error.code < 0 else ''}"


def _encode(work: Work, job: int, encode: Callable[[int], None]) -> None:
  pixels = work.spool(job, ".pixels")
  if not os.path.exists(work.spool(job)):
    if "reason" in spools.read_spool(pixels)[0]:
      os.replace(pixels, work.spool(job))
    else:
      encode(job)
  pathlib.Path(pixels).unlink(missing_ok=True)


def spooled_frames(work: Work, job: int) -> tuple[dict[str, Any], Iterator[np.ndarray]]:
  """The entry of decoded pixels, and their clips uint8[F, S, S, 3] one by one."""
  entry, records = spools.read_spool(work.spool(job, ".pixels"))
  coder = store.record_features(dataclasses.replace(work.layout, features=None))

  def clips():
    for record in records:
      frames = coder.deserialize_example_np(record)["frames"]
      yield from frames.reshape(-1, entry["clip_frames"], *frames.shape[1:])

  return entry, clips()


def run_one(task: tuple[Work, int, float, bool]) -> int:
  """`decode_shards` for one shard, in a worker of another machine; its own process below, so that
  time limits hold there.
  """
  work, number, timeout, skip_bad = task
  decode_shards(work, [number], workers=1, timeout=timeout, skip_bad=skip_bad)
  return number
