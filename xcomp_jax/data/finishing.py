"""From decoded shards to a store: samples with their time messages, a line about every annotation,
and counts.
"""

import collections
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from xcomp_jax.data import prompt, store, store_writing
from xcomp_jax.data.decode_jobs import Work
from xcomp_jax.data.mixture import File
from xcomp_jax.files import become
from xcomp_jax.inputs import read_json

Entry = dict[str, Any]  # what became of an annotation: see `decode_jobs.decode_job`


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
  about, samples, first = read_json(work.shard(number, ".json"), store.StoreError), [], 0
  good = [i for i in work.members(number) if "reason" not in entries[i]]
  for i in good:
    frames, seconds, records = (entries[i][key] for key in ("frames", "seconds", "lengths"))
    samples.append(
      dataclasses.replace(
        work.jobs[i].sample,
        time_message="" if seconds is None else prompt.time_message(seconds, frames),
        frames=frames,
        clip_frames=entries[i]["clip_frames"],
        first_record=first,
        records=len(records),
      )
    )
    first += len(records)
  return store_writing.Shard(
    path=str(work.shard(number, ".array_record")),
    samples=tuple(samples),
    records=about["records"],
    bytes=about["bytes"],
    crcs=tuple(entries[i]["crc32"] for i in good),
  )


def manifest_lines(
  work: Work, entries: Sequence[Entry], files: Sequence[File]
) -> Iterator[dict[str, Any]]:
  """Says of every selected annotation what became of it, and then of others why they were passed
  over.
  """
  written = 0
  for i, entry in enumerate(entries):
    sample = work.jobs[i].sample
    line = {
      "annotation": sample.annotation,
      "position": sample.position,
      "source": sample.source,
    }
    if "reason" in entry:
      yield line | {"reason": entry["reason"]}
      continue
    yield line | {"sample": written, "frames": entry["frames"], "crc32": entry["crc32"]}
    written += 1
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
  whole = [
    n
    for n in work.shards
    if work.shard(n, ".json").exists()
    and read_json(work.shard(n, ".json"), store.StoreError)["records"]
  ]
  for n, file in zip(whole, store.files_of(folder / work.layout.folder, len(whole)), strict=True):
    if file.exists():
      os.rename(file, work.shard(n, ".array_record"))
  shutil.rmtree(folder)
