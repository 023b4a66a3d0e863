"""From a mixture to a store: plans, decodes in processes, writes, continues what was stopped."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import av
import PIL

from xcomp_jax.data import decode_jobs, prompt, store, store_writing, video
from xcomp_jax.data.decode_jobs import Work
from xcomp_jax.data.mixture import File, Job, read_mixture
from xcomp_jax.data.processes import Here, Processes
from xcomp_jax.data.sampling import FrameSettings, check_limits
from xcomp_jax.errors import listed
from xcomp_jax.files import become, local, locked, sweep, write_json
from xcomp_jax.inputs import read_json
from xcomp_jax.progress import progress

# Annotations in a file of clips. The paper's 71,927 make 281 files: other readers (TFDS's own) keep
# all of them open, and a process may often have 1,024. Larger files would need more room for the
# one that is being written: see docs/DATA.md.
PER_SHARD = 256
PER_SHARD_BEFORE = 64  # of stores that don't say
Entry = dict[str, Any]  # what became of an annotation: see `decode_jobs.decode_job`


@dataclasses.dataclass(frozen=True)
class Tower:
  """What turns frames into features."""

  features: store.Features
  settings: dict[str, Any]  # what else decides their last bits
  encode: decode_jobs.Encode  # to bfloat16[N, D] each
  about: str = ""  # what it computes with, in a line


def predecode(
  mixture: str | os.PathLike,
  out: str | os.PathLike,
  settings: FrameSettings,
  *,
  root: str | os.PathLike = ".",
  subset: float = 1.0,
  workers: int = 0,
  samples_per_shard: int | None = None,
  skip_bad: bool = False,
  quality: int | None = None,
  tower: Tower | None = None,
  timeout: float = 600.0,
  restart: bool = False,
  beam: Sequence[str] | None = None,
  start: Callable[[int], Processes | Here] = decode_jobs.start_pool,
) -> dict[str, Any]:
  """Writes the store `out` and returns what its store.json says.

  The result is the same for every number of workers, and however often the work was interrupted.
  Until it is whole everything is in `<out>.incomplete`, where the next call with the same arguments
  goes on; if `out` is already there and was made by the same arguments nothing is done.

  Args:
    mixture: YAML file.
    out: folder to be.
    settings: frames and pixels.
    root: where relative paths of the mixture start.
    subset: share of each annotation file's selection (0.25 in the release).
    workers: decoding processes; 0 decodes in this one, without time limit.
    samples_per_shard: annotations in one file of clips; None: as in what is there, else 256.
    skip_bad: leave out annotations and videos that can't be used, and say so in the manifest,
      instead of stopping.
    quality: of JPEG, 1 to 100; None: raw frames.
    tower: store what it makes of the frames.
    timeout: seconds for decoding one annotation.
    restart: begin anew if another work, or the same, has been left half done.
    beam: options of an Apache Beam pipeline that decodes instead of processes here.
    start: see `decode_jobs.decode_shards`.

  Raises:
    AnnotationError: problems with the mixture or its annotations, all listed, before anything is
      decoded.
    VideoError: videos that can't be used, all listed, after everything else was decoded and kept
      for the next call.
    ValueError: frame limits that contradict each other, or a relative root for Beam.
    StoreError: `out` is there and is something else, another run is at work or left other work, or
      no sample is left.
  """
  check_limits(settings.max_frames, settings.min_frames, settings.clip_frames)
  if tower and (quality is not None or beam is not None):
    raise ValueError("features are neither stored as JPEG nor computed through Beam")
  if beam is not None and not pathlib.Path(root).is_absolute():
    raise store.StoreError(
      f"--beam needs a --root that is the same for all workers: an absolute path, not {root}",
      where="--root",
      value=root,
    )
  # a rename can't take the place of what a link points to
  out = pathlib.Path(os.path.realpath(local(out, "a store appears by a rename", written=True)))
  made = _made(out)
  with _claimed(out) as folder:  # first, so that a target that can't be written costs no time
    jobs, files = read_mixture(mixture, root, subset)
    layout = store.Layout(
      image_size=settings.image_size,
      clip_frames=settings.clip_frames,
      quality=quality,
      features=tower.features if tower else None,
    )
    per_shard = samples_per_shard or _per_shard(folder, made, restart)
    plan = _plan(mixture, root, subset, per_shard, settings, layout, files, tower)
    if made is not None:
      if made["plan"] != _digest(plan):
        raise store.StoreError(
          f"{out} already exists, made from other data or with other settings; remove it or choose "
          f"another folder",
          where=out,
          found=made["plan"],
        )
      shutil.rmtree(folder)
      return made
    _check_jobs(jobs, files, skip_bad)
    _agree(folder, plan, restart)
    work = Work(
      folder=folder,
      settings=settings,
      layout=layout,
      jobs=dict(enumerate(jobs)),
      count=len(jobs),
      per_shard=per_shard,
    )
    undo_finish(work)
    done = decode_jobs.prepare_work(work, skip_bad)
    if beam is not None:
      _run_beam(work, beam, timeout, skip_bad)
    else:
      with progress(total=len(jobs), initial=done, unit="sample", desc="predecode") as bar:
        decode_jobs.decode_shards(
          work,
          work.shards,
          workers=workers,
          timeout=timeout,
          skip_bad=skip_bad,
          encode=tower.encode if tower else None,
          report=bar.update,
          start=start,
        )
    entries = decode_jobs.entries(work)
    _check_entries(work, entries, skip_bad)
    info = {
      **dataclasses.asdict(settings),
      "subset": subset,
      "samples_per_shard": per_shard,
      "plan": _digest(plan),
      **({"tower": tower.settings} if tower else {}),
    }
    return finish_work(work, out, entries, files, info)


def _check_jobs(jobs: Sequence[Job], files: Sequence[File], skip_bad: bool) -> None:
  """Refuses annotations that can't be used, all of them listed, before anything is decoded.

  Raises:
    AnnotationError: there are such. StoreError: nothing is selected.
  """
  ordered = [jobs[i] for i in _in_files(dict(enumerate(jobs)))]
  bad = [f"{job.where()}: {fault}" for job in ordered for fault in job.faults]
  if bad and not skip_bad:
    what = f"{len(bad)} bad annotation{'s' * (len(bad) > 1)} (--skip-bad leaves them out)"
    raise prompt.AnnotationError(listed(what, bad), bad=bad)
  if not jobs:
    annotations, drawn = sum(f.annotations for f in files), sum(f.drawn for f in files)
    reasons = collections.Counter(reason for file in files for _, reason in file.passed)
    raise store.StoreError(
      f"no samples to write: of {annotations} annotations {drawn} are drawn by sampling_strategy "
      f"and --subset, and none of these has exactly one image or video, or none where text_samples "
      f"is true{passed_over(reasons)}",
      annotations=annotations,
      drawn=drawn,
    )


def _check_entries(work: Work, entries: Sequence[dict[str, Any]], skip_bad: bool) -> None:
  """Refuses samples that could not be decoded, all of them listed, once everything else is done.

  Raises:
    VideoError: there are such. StoreError: there are no others.
  """
  lost = [
    f"{work.jobs[i].where()}: {entries[i]['reason']}"
    for i in _in_files(work.jobs)
    if "reason" in entries[i]
  ]
  if lost and not skip_bad:
    raise video.VideoError(
      listed(
        f"{len(lost)} of {len(entries)} samples can't be used; everything else is kept in "
        f"{work.folder}: the same command tries these again, with --skip-bad it leaves them out",
        lost,
      ),
      where=work.folder,
      lost=lost,
    )
  if len(lost) == len(entries):
    raise store.StoreError(listed("no samples to write, all are bad", lost), lost=lost)


def _made(out: pathlib.Path) -> dict[str, Any] | None:
  """store.json of a store that this command has made at `out`; None if nothing is there."""
  if not out.exists() or (out.is_dir() and not any(out.iterdir())):
    if os.path.ismount(out):  # a rename can't replace it, which would be found at the very end
      raise store.StoreError(
        f"{out} is where a file system is mounted; choose a folder inside it",
        where=out,
        mounted=True,
      )
    return None
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # of something else
    info = read_json(out / "store.json", ValueError)
    if isinstance(info["plan"], str):
      return info
  raise store.StoreError(
    f"{out} already exists; remove it or choose another folder", where=out, found="other"
  )


@contextlib.contextmanager
def _claimed(out: pathlib.Path) -> Generator[pathlib.Path]:
  """The folder `<out>.incomplete`, for this process alone; it goes again if nothing but the lock
  was put into it.
  """
  folder = out.with_name(out.name + ".incomplete")
  with contextlib.ExitStack() as stack:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      taken = store.StoreError(
        f"another process is writing {out}; wait for it, or choose another folder",
        where=out,
        taken=True,
      )
      stack.enter_context(locked(folder / "lock", taken, needed=True))
      sweep(folder)
    except OSError as error:
      raise store.StoreError(
        f"{out} can't be written: {error.strerror or error}", where=out
      ) from error
    try:
      yield folder
    finally:
      if folder.exists() and [p.name for p in folder.iterdir()] == ["lock"]:
        shutil.rmtree(folder)


def _per_shard(folder: pathlib.Path, made: dict[str, Any] | None, restart: bool) -> int:
  """How many annotations a shard has, where nobody says: as many as in the store, or in the
  unfinished work, that is there.
  """
  if made is not None:
    return made.get("samples_per_shard", PER_SHARD_BEFORE)
  plan = None if restart else _planned(folder)
  return plan["samples_per_shard"] if plan else PER_SHARD


def _planned(folder: pathlib.Path) -> dict[str, Any] | None:
  """The plan of the unfinished work in a folder; None: nothing is in it.

  Raises:
    StoreError: something else is.
  """
  if {path.name for path in folder.iterdir()} <= {"lock"}:
    return None
  with contextlib.suppress(store.StoreError, OSError):  # of another program, or none
    plan = read_json(folder / "plan.json", store.StoreError)
    if (
      isinstance(plan, dict)
      and plan.keys() >= {"format", "mixture", "root"}
      and isinstance(plan.get("samples_per_shard"), int)
    ):
      return plan
  raise store.StoreError(
    f"{folder} holds something else than work of this command; move it away, or choose another "
    f"--out",
    where=folder,
    found="other",
  )


def _plan(
  mixture,
  root,
  subset: float,
  per_shard: int,
  settings: FrameSettings,
  layout: store.Layout,
  files,
  tower,
) -> dict[str, Any]:
  """What two runs must have in common for the second to continue the first; names are for
  people.
  """
  frames: dict[str, Any] = {"frames": "raw" if layout.quality is None else f"jpeg {layout.quality}"}
  if tower:
    frames = {"frames": "features", "tower": tower.features.identity} | tower.settings
  return {
    "format": store.FORMAT,
    "mixture": hashlib.blake2b(pathlib.Path(mixture).read_bytes(), digest_size=8).hexdigest(),
    "root": str(root),
    "subset": float(subset),
    "samples_per_shard": per_shard,
    **dataclasses.asdict(settings),
    "fps": float(settings.fps),
    **frames,
    # they make the pixels
    "av": av.__version__,
    "pillow": PIL.__version__,
    **{f"annotations {n}, {file.annotation}": file.digest for n, file in enumerate(files)},
  }


def _digest(plan: dict[str, Any]) -> str:
  return hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=8).hexdigest()


def _agree(folder: pathlib.Path, plan: dict[str, Any], restart: bool) -> None:
  """Writes the plan, or sees that it is the one of the work in `folder`."""
  file = folder / "plan.json"
  if _planned(folder):
    for name in ("shards", "store", "spool"):  # in this order what is left at any instant is whole
      if restart and (folder / name).exists():
        (folder / name).rename(folder / f"{name}.tmp")
      if (folder / f"{name}.tmp").exists():
        shutil.rmtree(folder / f"{name}.tmp")
    if restart:
      file.unlink()
  there = _planned(folder)
  if there is None:
    write_json(file, plan)
  elif there != plan:
    keys = [key for key in dict.fromkeys([*there, *plan]) if there.get(key) != plan.get(key)]
    shown = [
      f"{key}: {there.get(key, 'nothing')} there, {plan.get(key, 'nothing')} now"
      for key in keys[:5]
    ]
    raise store.StoreError(
      f"{folder} has unfinished work of another kind ({'; '.join(shown)}); remove it, or add "
      f"--restart to begin anew",
      where=folder,
      changed={key: (there.get(key), plan.get(key)) for key in keys},
    )


def _run_beam(work: Work, options: Sequence[str], timeout: float, skip_bad: bool) -> None:
  """The same shards, decoded by the workers of a Beam pipeline; `work.folder` and all paths must be
  theirs too.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ValueError("--beam needs Apache Beam: pip install 'xcomp_jax[beam]'") from error

  parts = [n for n in work.shards if not work.shard(n, ".json").exists()]
  print(f"{len(parts)} of {len(work.shards)} shards to decode through Beam", file=sys.stderr)

  needed = [{i: work.jobs[i] for i in work.members(n)} for n in parts]
  calls = [
    (dataclasses.replace(work, jobs=jobs), n, timeout, skip_bad) for n, jobs in zip(parts, needed)
  ]
  with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
    tasks = pipeline | beam.Create(calls)
    _ = tasks | beam.Reshuffle() | beam.Map(decode_jobs.run_one)


def passed_over(reasons: collections.Counter[str]) -> str:
  """Says how many annotations were passed over, by reason; "" if none were."""
  counts = [f"{count} with {reason}" for reason, count in reasons.most_common()]
  return f"; passed over, as the release does: {', '.join(counts)}" if counts else ""


def _in_files(jobs: Mapping[int, Job]) -> list[int]:
  """The numbers of the jobs, which are shuffled, as their annotations stand in the files."""
  files = {
    name: n for n, name in enumerate(dict.fromkeys(j.sample.annotation for j in jobs.values()))
  }
  return sorted(jobs, key=lambda i: (files[jobs[i].sample.annotation], jobs[i].sample.position))


# The end: samples with their time messages, a line about every annotation, and counts.


def finish_work(
  work: Work, out: pathlib.Path, entries: Sequence[Entry], files: Sequence[File], info: dict
) -> dict[str, Any]:
  """Makes the store from whole shards, and gives it its name; may be killed and done again at any
  point.
  """
  folder = work.folder / "store"
  folder.mkdir(exist_ok=True)
  text = "".join(store.as_json(line) + "\n" for line in manifest_lines(work, entries, files))
  (folder / "manifest.jsonl").write_text(text, encoding="utf-8")
  counts = list(file_counts(entries, files))
  info = info | {"annotation_files": counts, "skipped": sum(c["skipped"] for c in counts)}
  shards = [stored_shard(work, number, entries) for number in work.shards]
  info = store_writing.finish_store(folder, shards, work.layout, info)
  become(work.folder, "store", out)
  return info


def stored_shard(work: Work, number: int, entries: Sequence[Entry]) -> store_writing.Shard:
  """Describes a whole shard by the samples that are in it."""
  about, samples, first = work.about(number), [], 0
  good = [(i, entries[i]) for i in work.members(number) if "reason" not in entries[i]]
  for i, entry in good:
    frames, seconds = entry["frames"], entry["seconds"]
    samples.append(
      dataclasses.replace(
        work.jobs[i].sample,
        time_message="" if seconds is None else prompt.time_message(seconds, frames),
        frames=frames,
        clip_frames=entry["clip_frames"],
        first_record=first,
        records=len(entry["lengths"]),
      )
    )
    first += len(entry["lengths"])
  return store_writing.Shard(
    path=str(work.shard(number, ".array_record")),
    samples=tuple(samples),
    records=about["records"],
    bytes=about["bytes"],
    crcs=tuple(entry["crc32"] for _, entry in good),
  )


def manifest_lines(
  work: Work, entries: Sequence[Entry], files: Sequence[File]
) -> Iterator[dict[str, Any]]:
  """Says of every selected annotation what became of it, and then of others why they were passed
  over.
  """
  numbers = itertools.count()
  for i, entry in enumerate(entries):
    sample = work.jobs[i].sample
    yield {
      "annotation": sample.annotation,
      "position": sample.position,
      "source": sample.source,
      **(
        {"reason": entry["reason"]}
        if "reason" in entry
        else {"sample": next(numbers), "frames": entry["frames"], "crc32": entry["crc32"]}
      ),
    }
  for file in files:
    for i, reason in file.passed:
      yield {"annotation": file.annotation, "position": i, "passed_over": reason}


def file_counts(entries: Sequence[Entry], files: Sequence[File]) -> Iterator[dict[str, Any]]:
  """Counts for each annotation file what was written of it, and what was not."""
  position = 0
  for file in files:
    mine = entries[position : position + file.selected]
    position += file.selected
    skipped = sum("reason" in entry for entry in mine)
    about = dataclasses.asdict(file)
    about["passed_over"] = dict(collections.Counter(reason for _, reason in about.pop("passed")))
    yield about | {"written": len(mine) - skipped, "skipped": skipped}


def undo_finish(work: Work) -> None:
  """Puts back what a killed `finish_work` had moved: a shard that is there may have to be made
  again.
  """
  folder = work.folder / "store"
  if not folder.exists():
    return
  whole = [n for n in work.shards if work.about(n).get("records")]
  for n, file in zip(whole, store.files_of(folder / work.layout.folder, len(whole)), strict=True):
    if file.exists():
      os.rename(file, work.shard(n, ".array_record"))
  shutil.rmtree(folder)
