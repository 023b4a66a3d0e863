"""Pre-decoded samples on disk: pixels are decoded once, training only reads arrays.

A store is a folder:

    store.json            what it was made with; written last of all inside a temporary folder, so its presence means whole
    samples/              TFDS dataset (ArrayRecord, split "train"), one record per sample, in order
      id, source            bytes: the annotation's own id; the decoded file, "" for text alone
      annotation, position  bytes, int64: annotation file, place in it (0-based, as in the file)
      conversations         bytes: JSON, a list of {"from": "human" | "gpt", "value": text}
      time_message          bytes: the sentence after the visual slot (FACTS.md 4), "" for images and text alone
      frames, clip_frames   int64: all frames, and how many of them the tower sees together; an image is 1, 1; text alone 0, 1
      first_record, records int64: its records in clips/
    clips/                TFDS dataset, several shards; absent if no sample has frames
      frames                uint8[k * clip_frames, S, S, 3]: whole clips of one sample, a record of at most 64 MB

Both open with `tfds.builder_from_directory(folder).as_data_source(split="train")`, without TensorFlow. Records keep
the order in which they were written. Lengths in tokens are not here: they depend on the tokenizer.

A store appears by one rename. Until then everything is in `<name>.incomplete` beside it, which a later run removes.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

FORMAT = 1  # of the folder; raised when an older reader would misread it
RECORD_BYTES = 64 << 20  # of pixels in one record: a protobuf holds at most 2 GB, and a reader holds a whole record


class StoreError(ValueError):
  """A folder that is not a store, or can't become one."""


@dataclasses.dataclass(frozen=True)
class Sample:
  """One sample without its pixels; the fields are those of `samples/`."""

  id: str
  source: str
  annotation: str
  position: int
  conversations: tuple[Mapping[str, str], ...]
  time_message: str
  frames: int = 0
  clip_frames: int = 1
  first_record: int = 0
  records: int = 0


@dataclasses.dataclass(frozen=True)
class Shard:
  """A written file of clips and its samples, whose `first_record` counts from the beginning of that file."""

  path: str  # "" if no sample had frames
  samples: tuple[Sample, ...]
  records: int
  bytes: int


class Store:
  """A readable store; safe to share between threads."""

  def __init__(self, path: pathlib.Path, info: dict[str, Any], samples: Sequence[Sample], clips):
    self.path, self.info, self.samples, self._clips = path, info, tuple(samples), clips

  def __len__(self) -> int:
    return len(self.samples)

  @property
  def image_size(self) -> int:
    """Pixels, square."""
    return self.info["image_size"]

  @property
  def clip_frames(self) -> int:
    """Frames per clip of the videos."""
    return self.info["clip_frames"]

  def made_with(self) -> str:
    """How its frames were chosen, as far as it says: "fps 8.0, min_frames 128, max_frames 1024, subset 0.25"."""
    names = ("fps", "min_frames", "max_frames", "subset")
    return ", ".join(f"{name} {self.info[name]}" for name in names if name in self.info) or "sampling not recorded"

  def checksum(self) -> int:
    """CRC-32 of the samples' ids, frame counts and texts, in order: another value means other data."""
    crc = 0
    for s in self.samples:  # ids alone may be mere positions in an annotation file
      crc = zlib.crc32(repr((s.id, s.frames, s.conversations)).encode(), crc)
    return crc

  def visual(self, index: int) -> np.ndarray:
    """uint8[C, F, S, S, 3] of sample `index`; C = 0 for text alone."""
    sample, size = self.samples[index], self.image_size
    shape = (-1, sample.clip_frames, size, size, 3)
    if not sample.records:
      return np.zeros((0, *shape[1:]), np.uint8)
    keys = range(sample.first_record, sample.first_record + sample.records)
    parts = [self._clips[key]["frames"] for key in keys]
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(shape)


def open_store(path: str | os.PathLike) -> Store:
  """Opens a store and reads all of its `samples/`.

  Raises:
    StoreError: nothing there, something else there, or written by another format.
  """
  path = pathlib.Path(path)
  advice = "make one with `python -m xcomp_jax.predecode --mixture M.yaml --out DIR`"
  if not path.is_dir():
    raise StoreError(f"no data at {path}: not a folder; {advice}")
  try:
    info = json.loads((path / "store.json").read_text(encoding="utf-8"))
    version = info["format"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise StoreError(f"{path} is not a store: its store.json is missing or unreadable; {advice}") from error
  if version != FORMAT:
    raise StoreError(f"{path} has format {version}, this version reads {FORMAT}; {advice}")
  try:
    rows = _source(path / "samples")
    samples = [_sample(rows[i]) for i in range(len(rows))]
    clips = _source(path / "clips") if any(s.records for s in samples) else ()
  except (OSError, ValueError, KeyError, RuntimeError) as error:
    raise StoreError(f"{path} can't be read: {' '.join(str(error).split())}; {advice}") from error
  wanted = max((s.first_record + s.records for s in samples), default=0)
  if len(samples) != info["samples"] or len(clips) != wanted:
    raise StoreError(
      f"{path} is damaged: {len(samples)} samples and {len(clips)} clip records where "
      f"{info['samples']} and {wanted} were written; {advice}"
    )
  return Store(path, info, samples, clips)


@contextlib.contextmanager
def fresh_folder(target: str | os.PathLike, replace: bool = False) -> Iterator[pathlib.Path]:
  """An empty folder to write into, which becomes `target` by one rename when the block ends well.

  When the block fails the folder is removed; what a killed process left is removed by the next one.

  Args:
    target: folder to be, whole or not at all.
    replace: a folder that is there goes when the new one is whole.

  Raises:
    StoreError: target is already there, or can't be made.
  """
  target = pathlib.Path(target).absolute()
  if not replace and target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise StoreError(f"{target} already exists; remove it or choose another folder")
  temporary = target.with_name(target.name + ".incomplete")
  try:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
  except OSError as error:
    raise StoreError(f"{target} can't be written: {error.strerror or error}") from error
  try:
    yield temporary
    if replace and target.exists():
      shutil.rmtree(target)
    os.rename(temporary, target)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


def write_shard(path: str | os.PathLike, items: Iterable[tuple[Sample, np.ndarray | None]]) -> Shard:
  """Writes the pixels of some samples into one ArrayRecord file at `path`.

  Args:
    path: file to be; none is left if no item has frames.
    items: samples and their uint8[C, F, S, S, 3], None for text alone. The sample's frames and records are set here.

  Raises:
    ValueError: visual of another shape or dtype.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  writer, features, samples, first, written = None, None, [], 0, 0
  try:
    for sample, visual in items:
      if visual is None:
        samples.append(dataclasses.replace(sample, frames=0, clip_frames=1, first_record=first, records=0))
        continue
      if visual.dtype != np.uint8 or visual.ndim != 5 or not visual.size or visual.shape[2] != visual.shape[3]:
        raise ValueError(f"{sample.source}: expected uint8 [clips, frames, size, size, 3], got {visual.dtype}{visual.shape}")
      if writer is None:
        features = _clip_features(visual.shape[2])
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")  # readers want random access to every record
      clips, per_clip = visual.shape[:2]
      step = max(1, RECORD_BYTES // visual[0].nbytes)
      for start in range(0, clips, step):
        part = visual[start : start + step]
        record = features.serialize_example({"frames": part.reshape(-1, *part.shape[2:])})
        writer.write(record)
        written += len(record)
      records = -(-clips // step)
      samples.append(
        dataclasses.replace(sample, frames=clips * per_clip, clip_frames=per_clip, first_record=first, records=records)
      )
      first += records
  finally:
    if writer is not None:
      writer.close()
  return Shard(os.fspath(path) if first else "", tuple(samples), first, written)


def finish(folder: pathlib.Path, shards: Sequence[Shard], info: Mapping[str, Any]) -> None:
  """Turns a folder with written shards, in this order, into a store.

  Args:
    folder: of `fresh_folder`; the shards' files lie inside.
    shards: their samples become the store's, in order.
    info: of store.json; needs image_size and clip_frames, the rest is for people.

  Raises:
    StoreError: no samples at all.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  samples, base = [], 0
  for shard in shards:
    samples += [dataclasses.replace(s, first_record=s.first_record + base) for s in shard.samples]
    base += shard.records
  if not samples:
    raise StoreError("no samples to write")
  files = [shard for shard in shards if shard.records]
  if files:
    (folder / "clips").mkdir()
    for i, shard in enumerate(files):
      os.rename(shard.path, folder / "clips" / f"clips-train.array_record-{i:05d}-of-{len(files):05d}")
    features = _clip_features(info["image_size"])
    _metadata(folder / "clips", features, [s.records for s in files], sum(s.bytes for s in files))
  (folder / "samples").mkdir()
  features, size = _sample_features(), 0
  writer = ArrayRecordWriter(os.fspath(folder / "samples" / "samples-train.array_record-00000-of-00001"), "group_size:1")
  for sample in samples:
    row = dataclasses.asdict(sample) | {"conversations": json.dumps(list(sample.conversations), ensure_ascii=False)}
    record = features.serialize_example(row)
    writer.write(record)
    size += len(record)
  writer.close()
  _metadata(folder / "samples", features, [len(samples)], size)
  text = {"format": FORMAT, **info, "samples": len(samples), "frames": sum(s.frames for s in samples), "clip_records": base}
  (folder / "store.json").write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_store(
  target: str | os.PathLike, items: Iterable[tuple[Sample, np.ndarray | None]], *, image_size: int, clip_frames: int
) -> None:
  """Writes a whole store from samples in memory, in one shard (see `write_shard`)."""
  with fresh_folder(target) as folder:
    finish(folder, [write_shard(folder / "shard", items)], {"image_size": image_size, "clip_frames": clip_frames})


def _source(folder: pathlib.Path):
  import tensorflow_datasets as tfds

  return tfds.builder_from_directory(folder).as_data_source(split="train")


def _sample(row: Mapping[str, Any]) -> Sample:
  text = lambda key: row[key].decode("utf-8")
  number = lambda key: int(row[key])
  return Sample(
    id=text("id"), source=text("source"), annotation=text("annotation"), position=number("position"),
    conversations=tuple(json.loads(text("conversations"))), time_message=text("time_message"),
    frames=number("frames"), clip_frames=number("clip_frames"),
    first_record=number("first_record"), records=number("records"),
  )


def _clip_features(size: int):
  import tensorflow_datasets as tfds

  # encoding="bytes": without it every pixel becomes a 64-bit integer of a list.
  frames = tfds.features.Tensor(shape=(None, size, size, 3), dtype=np.uint8, encoding="bytes")
  return tfds.features.FeaturesDict({"frames": frames})


def _sample_features():
  import tensorflow_datasets as tfds

  kinds = {str: tfds.features.Text, int: lambda: tfds.features.Scalar(np.int64)}
  return tfds.features.FeaturesDict({f.name: kinds.get(f.type, tfds.features.Text)() for f in dataclasses.fields(Sample)})


def _metadata(folder: pathlib.Path, features, lengths: Sequence[int], size: int) -> None:
  import tensorflow_datasets as tfds

  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=folder.name, split="train", filetype_suffix="array_record"
  )
  split = tfds.core.SplitInfo(name="train", shard_lengths=list(lengths), num_bytes=size, filename_template=template)
  # The default check reads through TensorFlow.
  tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], check_data=False)
