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
import itertools
import os
import pathlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from xcomp_jax.data import spools, store, store_writing, video
from xcomp_jax.data.mixture import Job
from xcomp_jax.data.processes import DiedError, Here, Processes, StartError
from xcomp_jax.data.sampling import FrameSettings
from xcomp_jax.errors import one_line, too_many_files
from xcomp_jax.files import replacing, write_json
from xcomp_jax.inputs import read_json

# Frames of videos that a process decodes before a fresh one takes its place: decoders of videos
# leak, in the worst case seen 3 kB a frame.
LIFE = 1 << 16
# makes of the clips of a sample, one by one, what is stored instead of them
Encode = Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    return os.path.join(self.folder, "spool", f"{job:07d}{suffix}")

  def shard(self, number: int, suffix: str) -> pathlib.Path:
    """A file of a shard."""
    return self.folder / "shards" / f"{number:06d}{suffix}"

  def about(self, number: int) -> dict[str, Any]:
    """What the .json of a shard says; {} if the shard is not whole."""
    file = self.shard(number, ".json")
    return read_json(file, store.StoreError) if file.exists() else {}


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
      chosen: video.FrameSample | None = _chosen(job, settings)
    while chosen is not None:  # twice where its end can't be decoded
      decoded += 0 if chosen.found is None else chosen.stop - int(chosen.indices[0])
      try:
        spool(
          _clips(job, chosen, clip_frames),
          clip_frames,
          layout,
          target,
          None if job.reader == "img" else chosen.seconds,
        )
        chosen = None
      except video.TailError as error:
        if not settings.keep_tails:
          raise
        chosen = video.without_tail(chosen, error)
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
    for record, n, content in store_writing.records(layout, clips, clip_frames):
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


def assemble(shard: str, files: Sequence[str]) -> tuple[int, bool]:
  """Joins the spools of a shard's jobs into `shard`.array_record and .json, and removes them.

  Raises:
    spools.DamagedError: of a spool. OSError: the files can't be written.
  """
  if not os.path.exists(f"{shard}.json"):  # else a process died before it had removed all spools
    entries = []
    with replacing(f"{shard}.array_record") as temporary:
      with store_writing.writing_records(temporary) as writer:
        for file in files:
          entry, records = spools.read_spool(file)
          entries.append(entry)
          for record in records:
            writer.write(record)
      lengths = [n for entry in entries for n in entry.get("lengths", ())]
      if not lengths:
        temporary.unlink()
    write_json(
      f"{shard}.json", {"entries": entries, "records": len(lengths), "bytes": sum(lengths)}
    )
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


def _clips(job: Job, chosen: video.FrameSample, size: int) -> Iterator[np.ndarray]:
  """Clips uint8[F, S, S, 3] one by one; whatever goes wrong is a VideoError."""
  with _blaming(job):
    images = video.frames(chosen)
    while clip := list(itertools.islice(images, size)):
      yield np.stack(clip)


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
    text = f"{job.sample.source} can't be decoded: {type(error).__name__}: {error}"
    raise video.VideoError(str(error) if isinstance(error, OSError) else text) from error


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
    about = work.about(number)
    entries = about["entries"] if about else ()
    if any(again(entry, job) for entry, job in zip(entries, work.members(number))):
      work.shard(number, ".json").unlink()
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


class DecodeCall(NamedTuple):
  """What a process is asked for: a job to decode, or a shard to assemble."""

  what: Literal["job", "shard"]
  number: int


def start_pool(workers: int) -> Processes | Here:
  """Starts processes for decoding; 0: calls are done in this one."""
  return Processes(workers, LIFE, __name__) if workers else Here()


def decode_shards(
  work: Work,
  shards: Sequence[int],
  *,
  workers: int,
  timeout: float | None,
  skip_bad: bool,
  encode: Encode | None = None,
  report: Callable[[], object] = lambda: None,
  start: Callable[[int], Processes | Here] = start_pool,
) -> None:
  """Decodes and assembles those of `shards` that are not there.

  Shards with bad annotations are only assembled if `skip_bad`; otherwise their spools stay.

  Args:
    work: what to do, after `prepare_work`.
    shards: numbers.
    workers: processes; 0: in this one, where no time limit holds.
    timeout: seconds after which the decoding of one annotation is given up.
    skip_bad: leave out what is bad.
    encode: what is stored of the clips of a job instead of these, by this process.
    report: called after each annotation.
    start: makes what does the calls, from the number of workers.

  Raises:
    OSError, StoreError: what keeps processes from starting, or the files from being written, for
      want of space perhaps.
  """
  missing = {n: set(work.members(n)) for n in shards if not work.shard(n, ".json").exists()}
  if not missing:
    return
  pool = start(workers)
  schedule = _Schedule(
    work=work,
    pool=pool,
    busy=max(1, 2 * workers),
    timeout=timeout,
    skip_bad=skip_bad,
    encode=encode,
    report=report,
    missing=missing,
    waiting=collections.deque(job for jobs in missing.values() for job in sorted(jobs)),
  )
  try:
    schedule.run()
  except StartError as error:
    raise store.StoreError(
      f"processes for decoding die as they start ({error}; what they said is above); with "
      f"workers=0 none are needed"
    ) from error
  finally:
    pool.stop()


@dataclasses.dataclass(kw_only=True)
class _Schedule:
  """Which jobs are decoded when, and what follows from how they end.

  A job whose process dies is suspect, and is tried again once, alone: whatever it does then, no
  other job pays for it.
  """

  work: Work
  pool: Processes | Here
  busy: int  # calls that keep all processes busy
  timeout: float | None
  skip_bad: bool
  encode: Encode | None
  report: Callable[[], object]
  missing: dict[int, set[int]]  # of each shard: jobs that are not done
  waiting: collections.deque[int]  # jobs that were not begun
  running: set[DecodeCall] = dataclasses.field(default_factory=set)
  suspects: collections.deque[int] = dataclasses.field(default_factory=collections.deque)
  tried: set[DecodeCall] = dataclasses.field(default_factory=set)  # what has failed once
  damaged: set[int] = dataclasses.field(default_factory=set)  # jobs that are decoded once more
  spoiled: set[int] = dataclasses.field(default_factory=set)  # shards with bad annotations

  def run(self) -> None:
    """Goes on until nothing is left to do."""
    while self.waiting or self.running or self.suspects:
      self.begin()
      for call, good, error in self.pool.ended():
        self.running.remove(call)
        if error is not None:
          self.failed(call, error)
        elif call.what == "job":
          self.settle(call.number, good)
          self.report()

  def begin(self) -> None:
    """Begins a suspect alone, or as many jobs as keep the processes busy."""
    if self.suspects and not self.running:
      self.decode(self.suspects.popleft())
    alone = any(call.what == "job" for call in self.running & self.tried)
    while self.waiting and not self.suspects and not alone and len(self.running) < self.busy:
      job = self.waiting.popleft()
      if os.path.exists(self.work.spool(job)):  # of a run that was stopped
        self.settle(job, "reason" not in spools.read_spool(self.work.spool(job))[0])
      elif self.work.jobs[job].faults:
        self.give_up(job, "; ".join(self.work.jobs[job].faults))
      else:
        self.decode(job)

  def decode(self, number: int) -> None:
    """Calls for a job's decoding."""
    job, call = self.work.jobs[number], DecodeCall("job", number)
    # what decoding doesn't need may be long
    job = dataclasses.replace(job, sample=dataclasses.replace(job.sample, conversations=()))
    layout = dataclasses.replace(self.work.layout, features=None)
    self.running.add(call)
    self.pool.call(
      call, decode_job, job, self.work.settings, layout, self.target(number), timeout=self.timeout
    )

  def assemble(self, number: int) -> None:
    """Calls for a shard, all of whose jobs are done."""
    call = DecodeCall("shard", number)
    files = [self.work.spool(i) for i in self.work.members(number)]
    self.running.add(call)
    self.pool.call(call, assemble, str(self.work.shard(number, "")), files, timeout=None)

  def target(self, job: int) -> str:
    """Where the pixels of a job go."""
    return self.work.spool(job, ".pixels" if self.encode else ".records")

  def settle(self, job: int, good: bool) -> None:
    """Goes on with a job that is decoded, and with its shard if it was the last."""
    if self.encode:
      _encode(self.work, job, self.encode)
    shard = job // self.work.per_shard
    if not good:
      self.spoiled.add(shard)
    self.missing[shard].remove(job)
    if not self.missing[shard] and (self.skip_bad or shard not in self.spoiled):
      self.assemble(shard)

  def give_up(self, job: int, reason: str) -> None:
    """Writes down that a job can't be done."""
    write_bad(self.target(job), reason, file_stamp(self.work.jobs[job].sample.source))
    self.settle(job, False)
    self.report()

  def failed(self, call: DecodeCall, error: Exception) -> None:
    """Tries again, once, what is no fault of the program's.

    Raises:
      StoreError: a shard can't be written. Others: what it is not.
    """
    first = call not in self.tried
    if isinstance(error, (DiedError, MemoryError)):
      self.tried.add(call)
      if call.what == "job":
        self.lost(call.number, error, first)
      elif first:
        self.assemble(call.number)
      else:
        raise store.StoreError(
          f"writing a shard failed: {_how(error)}; run the same command again"
        ) from error
      return
    if call.what == "job" or not isinstance(error, spools.DamagedError):
      raise error
    spool = error.fields["where"]
    job = int(os.path.basename(spool).split(".")[0])
    if job in self.damaged:
      raise error
    self.damaged.add(job)
    os.unlink(spool)
    self.missing[call.number].add(job)
    self.waiting.appendleft(job)

  def lost(self, job: int, error: Exception, first: bool) -> None:
    """Goes on after a job's process has died, or had too little memory."""
    source = self.work.jobs[job].sample.source
    for file in pathlib.Path(self.work.folder, "spool").glob(f"{job:07d}.*.tmp"):
      file.unlink()
    if isinstance(error, DiedError) and error.late:
      self.give_up(job, f"{source}: decoding took more than {self.timeout:g} seconds (--timeout)")
    elif first:
      self.suspects.append(job)
    else:
      self.give_up(
        job,
        f"{source}: {_how(error)}, also when tried again alone: a damaged file, or too little "
        f"memory",
      )


def entries(work: Work) -> list[dict[str, Any]]:
  """What became of every annotation, after `decode_shards` of all shards: entries of `decode_job`,
  with the number of their records.
  """
  found = []
  for n in work.shards:
    about = work.about(n)
    found += (
      about["entries"]
      if about
      else [spools.read_spool(work.spool(job))[0] for job in work.members(n)]
    )
  return found


def _how(error: Exception) -> str:
  return str(error) if isinstance(error, DiedError) else "it takes more memory than there is"


def _encode(work: Work, job: int, encode: Encode) -> None:
  """Makes the spool of a job from that of its pixels, which goes."""
  pixels, target = work.spool(job, ".pixels"), work.spool(job)
  if not os.path.exists(target):
    entry, records = spools.read_spool(pixels)
    if "reason" in entry:
      os.replace(pixels, target)
    else:
      coder = store.record_features(dataclasses.replace(work.layout, features=None))
      held = (coder.deserialize_example_np(record)["frames"] for record in records)
      size = entry["clip_frames"]
      clips = (clip for frames in held for clip in frames.reshape(-1, size, *frames.shape[1:]))
      spool(encode(clips), size, work.layout, target, entry["seconds"])
  pathlib.Path(pixels).unlink(missing_ok=True)


def run_one(task: tuple[Work, int, float, bool]) -> int:
  """`decode_shards` for one shard, in a worker of another machine; its own process below, so that
  time limits hold there.
  """
  work, number, timeout, skip_bad = task
  decode_shards(work, [number], workers=1, timeout=timeout, skip_bad=skip_bad)
  return number
