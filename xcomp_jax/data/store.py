"""Pre-decoded samples on disk: a video is decoded once, training only reads arrays.

A store is a folder (docs/DATA.md has it field by field):

    store.json            what it was made with, and counts
    manifest.jsonl        of predecode only: a line per selected annotation, what became of it
    samples/              TFDS dataset (ArrayRecord, split "train"), one record per sample, in
                          order: the fields of `StoredSample`
    clips/ or features/   TFDS dataset, several shards; absent if no sample has frames. A record
                          holds whole clips of one sample, at most 64 MB of them once they are
                          arrays:
      frames                uint8[k * clip_frames, S, S, 3], or as many JPEG files
      tokens                uint16[k * clip_frames * tokens_per_frame, D]: bfloat16 by its bits, the
                            tower's merged tokens

All open with `tfds.builder_from_directory(folder).as_data_source(split="train")`, without
TensorFlow. Records keep the order in which they were written. Lengths in tokens are not here: they
depend on the tokenizer.

A store appears by one rename. Until then everything is in `<name>.incomplete` beside it.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from xcomp_jax import inputs
from xcomp_jax.data.sampling import CLIPS, SIZES
from xcomp_jax.errors import XCompError, one_line, too_many_files
from xcomp_jax.files import local

FORMAT = 2  # of the folder; raised when an older reader would misread it
# of arrays in one record: a protobuf holds at most 2 GB, and a reader holds a whole record
RECORD_BYTES = 64 << 20
RECENT = 4  # records that are kept in memory, of all stores together
# Files that are kept open, of all stores together. A process may have 1,024, on some systems 256,
# and a run has others. To open one again takes 0.3 ms, far less than to read and decode the
# megabytes of a usual record.
OPEN = 64
as_json = json.JSONEncoder(ensure_ascii=False).encode  # one for all: json.dumps makes one each time
# what a dataset's files are called, as TFDS writes it
FILES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
TOKENS = range(1, 1_000_001)  # of a frame, and numbers of a token
COUNT = range(1_000_000_001)  # of anything
# Fields of FrameSettings, and the subset, in the order that an identity has them for ever.
SAMPLING = ("image_size", "clip_frames", "fps", "min_frames", "max_frames", "subset")


class StoreError(XCompError, ValueError):
  """A folder that is not a store, or can't become one."""


@dataclasses.dataclass(frozen=True)
class Features:
  """Which tower's features a store holds."""

  identity: str  # of the tower's weights: `loading.tower_identity`
  tokens_per_frame: int
  width: int


@dataclasses.dataclass(frozen=True)
class Layout:
  """What the records hold: raw frames, JPEG frames, or features."""

  image_size: int  # pixels, square
  clip_frames: int  # of the videos
  quality: int | None  # of JPEG, 1 to 100; None: raw
  features: Features | None

  def clip_spec(self, clip_frames: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one clip of so many frames."""
    if self.features:
      return (clip_frames * self.features.tokens_per_frame, self.features.width), np.dtype(
        ml_dtypes.bfloat16
      )
    return (clip_frames, self.image_size, self.image_size, 3), np.dtype(np.uint8)

  @property
  def folder(self) -> str:
    """Name of the dataset that has the records."""
    return "features" if self.features else "clips"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredSample:
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


class Store:
  """A readable store; safe to share between threads."""

  def __init__(
    self,
    path: pathlib.Path,
    info: dict[str, Any],
    layout: Layout,
    samples: Sequence[StoredSample],
    rows: "Rows | tuple[()]",
  ):
    self.path, self.info, self.layout, self.samples, self._rows = (
      path,
      info,
      layout,
      tuple(samples),
      rows,
    )

  def __len__(self) -> int:
    return len(self.samples)

  @property
  def features(self) -> Features | None:
    """Whose features `visual` gives; None: it gives frames."""
    return self.layout.features

  def made_with(self) -> str:
    """How its frames were chosen, as far as it says: "fps 8.0, min_frames 128, max_frames 1024,
    subset 0.25".
    """
    names = [name for name in SAMPLING[2:] if name in self.info]
    return ", ".join(f"{name} {self.info[name]}" for name in names) or "sampling not recorded"

  def identity(self) -> str:
    """16 hex digits that change with the format, how it was sampled, and the samples' ids, texts,
    and frames or features.
    """
    what = (
      FORMAT,
      self.layout,
      [(name, self.info.get(name)) for name in SAMPLING],
      self.info.get("content"),
      [(s.id, s.frames, s.conversations, s.time_message) for s in self.samples],
    )
    return hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()

  def visual(self, index: int) -> np.ndarray:
    """uint8[C, F, S, S, 3] of sample `index`, or bfloat16[C, N, D] if the store holds features; C =
    0 for text alone.

    N is clip_frames * tokens_per_frame; an image is one clip of one frame.

    Raises:
      StoreError: damaged records, or a JPEG that can't be decoded.
      OSError: this process has too many open files.
    """
    sample = self.samples[index]
    return self.clips(index, 0, sample.frames // sample.clip_frames)

  def clips(self, index: int, first: int, count: int) -> np.ndarray:
    """Reads `count` clips of a sample, from one on; only the records that hold them. Results and
    errors as `visual`.
    """
    sample = self.samples[index]
    shape, dtype = self.layout.clip_spec(sample.clip_frames)
    if not count:
      return np.zeros((0, *shape), dtype)
    each = clips_per_record(self.layout, sample.clip_frames)
    last, parts = first + count, []
    for record in range(first // each, (last - 1) // each + 1):
      begin = record * each
      held = min(each, sample.frames // sample.clip_frames - begin)
      try:
        content = _record(self, sample.first_record + record)
      except Exception as error:  # damaged records make the readers raise anything
        if text := too_many_files(error):
          raise OSError(text) from error
        raise self._damaged(f"sample {index} can't be read ({one_line(error)})", index) from error
      unit = shape[0]  # frames or tokens of a clip
      if len(content) != held * unit:
        raise self._damaged(
          f"a record of sample {index} does not hold the {held} clips that it should", index
        )
      part = content[max(0, first - begin) * unit : min(held, last - begin) * unit]
      parts.append(part if self.layout.quality is None else self._decode(index, begin * unit, part))
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return whole.view(dtype).reshape(-1, *shape)

  def stored(self, index: int) -> Iterator[Any]:
    """What the records of a sample hold, one after the other: uint8 or uint16 arrays, or lists of
    JPEG files.
    """
    sample = self.samples[index]
    for key in range(sample.first_record, sample.first_record + sample.records):
      (content,) = self._rows[key].values()
      yield content

  def _decode(self, index: int, first: int, files: Sequence[Any]) -> np.ndarray:
    cv2 = opencv()
    size = self.layout.image_size
    out = np.empty((len(files), size, size, 3), np.uint8)
    for i, file in enumerate(files):
      image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
      if image is None or image.shape != out.shape[1:]:
        raise self._damaged(
          f"frame {first + i} of sample {index} is damaged", index, frame=first + i
        )
      cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out[i])
    return out

  def _damaged(self, what: str, sample: int, **fields: Any) -> StoreError:
    return StoreError(
      f"{self.path}: {what}; find all damage with --verify, and predecode again",
      where=self.path,
      sample=sample,
      **fields,
    )


class Rows:
  """Reads records of a TFDS dataset; safe to share between threads.

  TFDS's own data source keeps every file open; this keeps at most OPEN of all datasets.
  """

  def __init__(self, folder: pathlib.Path, features: Any):
    """Looks for all files, and opens none.

    `features` says what a record holds. What features.json says of that is for TFDS: it names
    Python modules to be imported. Names of files follow from their number.

    Raises:
      StoreError: some are missing, or the folder's description is damaged.
      OSError: some are pipes or devices.
    """
    about = folder / "dataset_info.json"
    described = inputs.read_json(about, StoreError, inputs.ABOUT)
    with inputs.reading(about, StoreError):
      (split,) = described["splits"]
      # text: protobuf has no other integers in JSON
      lengths = [int(length) for length in tuple(split["shardLengths"])]
      if split.get("filepathTemplate", FILES) != FILES:
        raise ValueError(f"filepathTemplate must be {FILES}")
      if not lengths or not all(length in COUNT for length in lengths):
        raise ValueError(f"shardLengths must be from 0 to {COUNT[-1]:,}")
    self._features, self._ends = features, list(itertools.accumulate(lengths))
    self.files = [os.fspath(file) for file in files_of(folder, len(lengths))]
    if missing := [file for file in self.files if not os.path.exists(file)]:
      raise StoreError(
        f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""),
        where=folder,
        missing=missing,
      )
    for file in self.files:
      inputs.regular(file)

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, key: int) -> dict[str, Any]:
    if not 0 <= key < len(self):
      raise IndexError(f"record {key} of {len(self)}")
    number = bisect.bisect_right(self._ends, key)
    (record,) = opened_file(self, number).read([key - (self._ends[number - 1] if number else 0)])
    return self._features.deserialize_example_np(record)


@functools.lru_cache(maxsize=OPEN)
def opened_file(rows: Rows, number: int):
  """Opens a file. When OPEN others have been opened since, it is dropped here, and closed once no
  thread reads from it.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  # for random access
  reader = ArrayRecordReader(
    rows.files[number], options="readahead_buffer_size:0", file_reader_buffer_size=32768
  )
  if not reader.ok():
    reader.read([0])  # raises what went wrong when it was opened
  return reader


@functools.lru_cache(maxsize=RECENT)
def _record(store: Store, key: int) -> Any:
  """What a record holds; the last ones are kept, for those who read its other clips next."""
  (content,) = store._rows[key].values()
  return content


def clips_per_record(layout: Layout, clip_frames: int) -> int:
  """How many clips of a sample a record holds; its last one may hold fewer."""
  shape, dtype = layout.clip_spec(clip_frames)
  return max(1, RECORD_BYTES // (math.prod(shape) * dtype.itemsize))


def checksum(samples: Iterable[StoredSample]) -> int:
  """CRC-32 of samples' ids, frame counts and texts, in order: another value means other data."""
  crc = 0
  for s in samples:  # ids alone may be mere positions in an annotation file
    crc = zlib.crc32(repr((s.id, s.frames, s.conversations)).encode(), crc)
  return crc


def content_crc(content: Any, crc: int = 0) -> int:
  """CRC-32 of what one record holds (see `Store.stored`), going on from `crc`."""
  for part in [content] if isinstance(content, np.ndarray) and content.dtype != object else content:
    crc = zlib.crc32(part, crc)
  return crc


def content_checksum(crcs: Iterable[int]) -> int:
  """CRC-32 of what all records hold, from those of the samples, in order."""
  return zlib.crc32(" ".join(map(str, crcs)).encode())


def open_store(path: str | os.PathLike) -> Store:
  """Opens a store and reads all of its `samples/`.

  Raises:
    StoreError: nothing there, something else there, or written by another format.
    OSError: this process has too many open files.
    ValueError: it is in a bucket.
  """
  path = local(path, "data is read as files")
  advice = "make one with `python -m xcomp_jax.predecode --mixture M.yaml --out DIR`"
  if not path.is_dir():
    raise StoreError(f"no data at {path}: not a folder; {advice}", where=path, found=None)
  about = path / "store.json"
  if not about.exists():
    raise StoreError(
      f"{path} is not a store: it has no store.json; {advice}", where=about, missing=True
    )
  try:
    info = inputs.read_json(about, StoreError, inputs.ABOUT)
    with inputs.reading(about, StoreError):
      version = info["format"]
      if type(version) is not int or version != FORMAT:
        raise StoreError(
          f"{path} has format {inputs.quoted(version, 100)}, this version reads {FORMAT}",
          where=about,
          format=version,
        )
      layout = _layout(info, about)
    table = Rows(path / "samples", sample_features())
    if len(table) != info.get("samples"):
      raise StoreError(
        f"{path} is damaged: {len(table)} samples where {info.get('samples')} were written",
        where=path / "samples",
        found=len(table),
        expected=info.get("samples"),
      )
    with inputs.reading(path / "samples", StoreError):
      samples = [_sample(table[i]) for i in range(len(table))]
    rows = (
      Rows(path / layout.folder, record_features(layout)) if any(s.records for s in samples) else ()
    )
    for i, sample in enumerate(samples):
      _check(layout, sample, len(rows), f"{path} is damaged: sample {i}")
  except (StoreError, FileNotFoundError) as error:
    fields = error.fields if isinstance(error, StoreError) else {"where": error.filename}
    raise StoreError(f"{one_line(error)}; {advice}", **fields) from error
  wanted = max((s.first_record + s.records for s in samples), default=0)
  if len(rows) != wanted:
    raise StoreError(
      f"{path} is damaged: {len(rows)} records of clips where {wanted} were written; {advice}",
      where=path / layout.folder,
      found=len(rows),
      expected=wanted,
    )
  return Store(path, info, layout, samples, rows)


def _check(layout: Layout, sample: StoredSample, records: int, what: str) -> None:
  """Raises a StoreError unless a sample's numbers go together, and its records are there."""
  numbers = (
    f"{sample.frames} frames in clips of {sample.clip_frames}, records {sample.first_record} to "
    f"{sample.first_record + sample.records}"
  )
  whole = (
    sample.clip_frames in (1, layout.clip_frames)
    and sample.frames in COUNT
    and not sample.frames % sample.clip_frames
  )
  if not whole or sample.records != -(
    -sample.frames // sample.clip_frames // clips_per_record(layout, sample.clip_frames)
  ):
    raise StoreError(f"{what} can't have {numbers}", where=sample.id, numbers=numbers)
  if sample.first_record < 0 or sample.first_record + sample.records > records:
    raise StoreError(
      f"{what} has records {sample.first_record} to {sample.first_record + sample.records}, and "
      f"there are {records}",
      where=sample.id,
      records=records,
    )


def files_of(dataset: pathlib.Path, count: int) -> list[pathlib.Path]:
  """What a dataset's files are called: FILES."""
  return [
    dataset / f"{dataset.name}-train.array_record-{i:05d}-of-{count:05d}" for i in range(count)
  ]


@functools.cache
def opencv() -> Any:
  """OpenCV, which only JPEG needs."""
  import cv2

  cv2.setNumThreads(1)  # readers run side by side
  return cv2


def _layout(info: Mapping[str, Any], where: pathlib.Path) -> Layout:
  features, wanted = info["features"], {"image_size": SIZES, "clip_frames": CLIPS}
  if info["quality"] is not None:
    wanted["quality"] = range(1, 101)
  problems = [inputs.beyond(key, info[key], bounds) for key, bounds in wanted.items()]
  if features is not None:
    features = Features(**features)
    problems += [
      *(
        inputs.beyond(f"features.{key}", getattr(features, key), TOKENS)
        for key in ("tokens_per_frame", "width")
      ),
      "" if isinstance(features.identity, str) else "features.identity must be text",
    ]
  if problems := list(filter(None, problems)):
    raise StoreError(f"{where}: {'; '.join(problems)}", where=where, problems=problems)
  return Layout(info["image_size"], info["clip_frames"], info["quality"], features)


def _sample(row: Mapping[str, Any]) -> StoredSample:
  values: dict[str, Any] = {
    field.name: int(row[field.name]) if field.type is int else row[field.name].decode("utf-8")
    for field in dataclasses.fields(StoredSample)
  }
  talk: Any = json.loads(values["conversations"])
  if not isinstance(talk, list) or not all(isinstance(turn, dict) for turn in talk):
    raise ValueError(f"conversations = {inputs.quoted(talk, 100)}: must be a list of objects")
  values["conversations"] = tuple(talk)
  return StoredSample(**values)


def record_features(layout: Layout):
  """The TFDS features of a record."""
  import tensorflow_datasets as tfds

  # encoding="bytes": without it every number becomes a 64-bit integer of a list.
  def tensor(shape, dtype):
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

  if layout.features:
    return tfds.features.FeaturesDict({"tokens": tensor((None, layout.features.width), np.uint16)})
  if layout.quality is not None:
    return tfds.features.FeaturesDict({"frames": tfds.features.Sequence(tfds.features.Text())})
  return tfds.features.FeaturesDict(
    {"frames": tensor((None, layout.image_size, layout.image_size, 3), np.uint8)}
  )


def sample_features():
  import tensorflow_datasets as tfds

  return tfds.features.FeaturesDict(
    {
      f.name: tfds.features.Scalar(np.int64) if f.type is int else tfds.features.Text()
      for f in dataclasses.fields(StoredSample)
    }
  )
