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
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from xcomp_jax import inputs
from xcomp_jax.errors import XCompError, one_line, too_many_files
from xcomp_jax.files import fresh_folder, local
from xcomp_jax.inputs import reading, regular

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
# Bounds of a store's numbers.
PIXELS, FRAMES, TOKENS, COUNT = (
  range(1, 4_097),
  range(1, 1_001),
  range(1, 1_000_001),
  range(1_000_000_001),
)
# how frames and samples were chosen
SAMPLING = (
  "image_size",
  "clip_frames",
  "fps",
  "min_frames",
  "max_frames",
  "subset",
)


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


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Shard:
  """A written file of clips and its samples, whose `first_record` counts from the beginning of that
  file.
  """

  path: str  # "" if no sample had frames
  samples: tuple[StoredSample, ...]
  records: int
  bytes: int
  crcs: tuple[int, ...]  # of each sample: `content_crc` of its records, one after the other


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
  def image_size(self) -> int:
    """Pixels, square."""
    return self.layout.image_size

  @property
  def clip_frames(self) -> int:
    """Frames per clip of the videos."""
    return self.layout.clip_frames

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

  def checksum(self) -> int:
    """CRC-32 of the samples' ids, frame counts and texts, in order: another value means other
    data.
    """
    return checksum(self.samples)

  def identity(self) -> str:
    """16 hex digits that change with the format, how it was sampled, and the samples' ids, texts,
    and frames or features.
    """
    sampling = [(name, self.info.get(name)) for name in SAMPLING]
    what = (
      FORMAT,
      self.layout,
      sampling,
      self.info.get("content"),
      [(s.id, s.frames, s.conversations, s.time_message) for s in self.samples],
    )
    return hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()

  def clip_spec(self, clip_frames: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of one clip of so many frames: what `visual` gives, without its first
    axis.
    """
    return self.layout.clip_spec(clip_frames)

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
    shape, dtype = self.clip_spec(sample.clip_frames)
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
        raise self._damaged(f"sample {index} can't be read ({one_line(error)})") from error
      unit = shape[0]  # frames or tokens of a clip
      if len(content) != held * unit:
        raise self._damaged(
          f"a record of sample {index} does not hold the {held} clips that it should"
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
    cv2 = _cv2()
    out = np.empty((len(files), self.image_size, self.image_size, 3), np.uint8)
    for i, file in enumerate(files):
      image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
      if image is None or image.shape != out.shape[1:]:
        raise self._damaged(f"frame {first + i} of sample {index} is damaged")
      cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out[i])
    return out

  def _damaged(self, what: str) -> StoreError:
    return StoreError(f"{self.path}: {what}; find all damage with --verify, and predecode again")


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
    with reading(about, StoreError):
      (split,) = described["splits"]
      # text: protobuf has no other integers in JSON
      lengths = [int(length) for length in tuple(split["shardLengths"])]
      if split.get("filepathTemplate", FILES) != FILES:
        raise ValueError(f"filepathTemplate must be {FILES}")
      if not lengths or not all(length in COUNT for length in lengths):
        raise ValueError(f"shardLengths must be from 0 to {COUNT[-1]:,}")
    self._features, self._ends = features, list(itertools.accumulate(lengths))
    self._files = [os.fspath(file) for file in files_of(folder, len(lengths))]
    if missing := [file for file in self._files if not os.path.exists(file)]:
      raise StoreError(
        f"{missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else "")
      )
    for file in self._files:
      regular(file)

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, key: int) -> dict[str, Any]:
    if not 0 <= key < len(self):
      raise IndexError(f"record {key} of {len(self)}")
    number = bisect.bisect_right(self._ends, key)
    (record,) = _reader(self, number).read([key - (self._ends[number - 1] if number else 0)])
    return self._features.deserialize_example_np(record)

  def file(self, number: int) -> str:
    """The name of one of its files."""
    return self._files[number]


@functools.lru_cache(maxsize=OPEN)
def _reader(rows: Rows, number: int):
  """Opens a file. When OPEN others have been opened since, it is dropped here, and closed once no
  thread reads from it.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  # for random access
  reader = ArrayRecordReader(
    rows.file(number), options="readahead_buffer_size:0", file_reader_buffer_size=32768
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
  """See `Store.checksum`."""
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
    raise StoreError(f"no data at {path}: not a folder; {advice}")
  about = path / "store.json"
  if not about.exists():
    raise StoreError(f"{path} is not a store: it has no store.json; {advice}")
  try:
    info = inputs.read_json(about, StoreError, inputs.ABOUT)
    with reading(about, StoreError):
      version = info["format"]
      if type(version) is not int or version != FORMAT:
        raise StoreError(
          f"{path} has format {inputs.quoted(version, 100)}, this version reads {FORMAT}"
        )
      layout = _layout(info, about)
    table = Rows(path / "samples", _sample_features())
    if len(table) != info.get("samples"):
      raise StoreError(
        f"{path} is damaged: {len(table)} samples where {info.get('samples')} were written"
      )
    with reading(path / "samples", StoreError):
      samples = [_sample(table[i]) for i in range(len(table))]
    rows = (
      Rows(path / layout.folder, record_features(layout)) if any(s.records for s in samples) else ()
    )
    for i, sample in enumerate(samples):
      _check(layout, sample, len(rows), f"{path} is damaged: sample {i}")
  except (StoreError, FileNotFoundError) as error:
    raise StoreError(f"{one_line(error)}; {advice}") from error
  wanted = max((s.first_record + s.records for s in samples), default=0)
  if len(rows) != wanted:
    raise StoreError(
      f"{path} is damaged: {len(rows)} records of clips where {wanted} were written; {advice}"
    )
  return Store(path, info, layout, samples, rows)


def _check(layout: Layout, sample: StoredSample, records: int, what: str) -> None:
  """Raises a StoreError unless a sample's numbers go together, and its records are there."""
  numbers = (
    f"{sample.frames} frames in clips of {sample.clip_frames}, records "
    f"{sample.first_record} to {sample.first_record + sample.records}"
  )
  whole = (
    sample.clip_frames in (1, layout.clip_frames)
    and sample.frames in COUNT
    and not sample.frames % sample.clip_frames
  )
  if not whole or sample.records != -(
    -sample.frames // sample.clip_frames // clips_per_record(layout, sample.clip_frames)
  ):
    raise StoreError(f"{what} can't have {numbers}")
  if sample.first_record < 0 or sample.first_record + sample.records > records:
    raise StoreError(
      f"{what} has records {sample.first_record} to {sample.first_record + sample.records}, and "
      f"there are {records}"
    )


def records(
  layout: Layout, clips: Iterable[np.ndarray], clip_frames: int
) -> Iterator[tuple[bytes, int, Any]]:
  """Packs the clips of one sample, which may come one by one; memory is bounded by one record.

  Args:
    layout: what the records hold.
    clips: each as `layout.clip_spec` says.
    clip_frames: frames of each.

  Yields:
    a record; the number of its clips; and what it holds, as `Store.stored` will give it.

  Raises:
    ValueError: a clip of another shape or dtype.
  """
  shape, dtype = layout.clip_spec(clip_frames)
  step = clips_per_record(layout, clip_frames)
  clips = iter(clips)
  while part := list(itertools.islice(clips, step)):
    for clip in part:
      if clip.shape != shape or clip.dtype != dtype:
        raise ValueError(f"expected clips of {dtype}{shape}, got {clip.dtype}{clip.shape}")
    count, content = len(part), np.concatenate(part)
    part.clear()  # memory
    if layout.features:
      content = content.view(np.uint16)
    elif layout.quality is not None:
      content = [_jpeg(frame, layout.quality) for frame in content]
    yield encode_record({"tokens" if layout.features else "frames": content}), count, content


def write_shard(
  path: str | os.PathLike, items: Iterable[tuple[StoredSample, np.ndarray | None]], layout: Layout
) -> Shard:
  """Writes the visual part of some samples into one ArrayRecord file at `path`.

  Args:
    path: file to be; none is left if no item has frames.
    items: samples and their uint8[C, F, S, S, 3] or bfloat16[C, N, D], None for text alone. The
      sample's frames and records are set here.
    layout: what the records hold.

  Raises:
    ValueError: visual of another shape or dtype.
  """
  writer, samples, crcs, first, written = None, [], [], 0, 0
  try:
    for sample, visual in items:
      if visual is None:
        samples.append(
          dataclasses.replace(sample, frames=0, clip_frames=1, first_record=first, records=0)
        )
        crcs.append(0)
        continue
      per_clip = layout.features.tokens_per_frame if layout.features else 1
      per_clip = visual.shape[1] // per_clip if visual.ndim > 1 else 0
      shape, dtype = layout.clip_spec(per_clip)
      if visual.dtype != dtype or visual.shape[1:] != shape or not visual.size:
        raise ValueError(
          f"{sample.source}: expected {dtype} [clips, {', '.join(map(str, shape))}], got "
          f"{visual.dtype}{visual.shape}"
        )
      writer = writer or array_record(path)
      before, crc = first, 0
      for record, _, content in records(layout, visual, per_clip):
        writer.write(record)
        crc = content_crc(content, crc)
        written += len(record)
        first += 1
      crcs.append(crc)
      samples.append(
        dataclasses.replace(
          sample,
          frames=len(visual) * per_clip,
          clip_frames=per_clip,
          first_record=before,
          records=first - before,
        )
      )
  finally:
    if writer is not None:
      writer.close()
  return Shard(os.fspath(path) if first else "", tuple(samples), first, written, tuple(crcs))


def finish_store(
  folder: pathlib.Path, shards: Sequence[Shard], layout: Layout, info: Mapping[str, Any]
) -> dict[str, Any]:
  """Turns a folder with written shards, in this order, into a store; returns what its store.json
  says.

  Every name follows from the shards alone, so that what a killed process left half done is simply
  done again.

  Args:
    folder: to be; on the file system of the shards' files, which move into it.
    shards: their samples become the store's, in order.
    layout: what the records hold.
    info: more for store.json.

  Raises:
    StoreError: no samples at all. OSError: it can't be written.
  """
  samples = [sample for shard in shards for sample in shard.samples]
  if not samples:
    raise StoreError("no samples to write")
  files = [shard for shard in shards if shard.records]
  if files:
    (folder / layout.folder).mkdir(exist_ok=True)
    for shard, target in zip(files, shard_files(folder, layout, len(files)), strict=True):
      if not target.exists():
        os.rename(shard.path, target)
    _metadata(
      folder / layout.folder,
      record_features(layout),
      [s.records for s in files],
      sum(s.bytes for s in files),
    )
  (folder / "samples").mkdir(exist_ok=True)
  size, base, file = 0, 0, folder / "samples" / "samples-train.array_record-00000-of-00001"
  with writing_records(file):
    writer = array_record(file)
    for shard in shards:
      for s in shard.samples:
        record = encode_record(
          vars(s)
          | {"first_record": s.first_record + base, "conversations": as_json(s.conversations)}
        )
        writer.write(record)
        size += len(record)
      base += shard.records
    writer.close()
  _metadata(folder / "samples", _sample_features(), [len(samples)], size)
  counts = {"samples": len(samples), "frames": sum(s.frames for s in samples), "records": base}
  counts |= {
    "checksum": checksum(samples),
    "content": content_checksum(crc for shard in shards for crc in shard.crcs),
  }
  kept = {
    "quality": layout.quality,
    "features": layout.features and dataclasses.asdict(layout.features),
  }
  text = {
    "format": FORMAT,
    "image_size": layout.image_size,
    "clip_frames": layout.clip_frames,
    **kept,
    **info,
    **counts,
  }
  (folder / "store.json").write_text(
    json.dumps(text, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
  )
  return text


def shard_files(folder: pathlib.Path, layout: Layout, count: int) -> list[pathlib.Path]:
  """What `finish_store` calls the shards that have records."""
  return files_of(folder / layout.folder, count)


def files_of(dataset: pathlib.Path, count: int) -> list[pathlib.Path]:
  """What a dataset's files are called: FILES."""
  return [
    dataset / f"{dataset.name}-train.array_record-{i:05d}-of-{count:05d}" for i in range(count)
  ]


def write_store(
  target: str | os.PathLike,
  items: Iterable[tuple[StoredSample, np.ndarray | None]],
  *,
  image_size: int,
  clip_frames: int,
  features: Features | None = None,
  quality: int | None = None,
) -> None:
  """Writes a whole store from samples in memory, in one shard (see `write_shard`); `quality` makes
  it JPEG.
  """
  layout = Layout(image_size, clip_frames, quality, features)
  with fresh_folder(target, "store") as folder:
    finish_store(folder, [write_shard(folder / "shard", items, layout)], layout, {})


def encode_record(fields: Mapping[str, str | int | np.ndarray | Sequence[bytes]]) -> bytes:
  """A record of TFDS, a tf.train.Example, with its fields in the order of their names.

  TFDS's own writing takes ten times as long, processes for decoding would have to import it, and
  its order of fields differs between processes.

  Args:
    fields: a text, a whole number from 0 on, an array (by its bytes), or several values.
  """
  parts = []  # large values are not copied before all are joined
  for name in sorted(fields):
    value, key = fields[name], name.encode()
    if isinstance(value, int):
      kind, values = 3, [_varint(value)]  # Int64List
    else:
      # BytesList
      kind, values = (
        1,
        [value.encode()]
        if isinstance(value, str)
        else [np.ascontiguousarray(value).data.cast("B")]
        if isinstance(value, np.ndarray)
        else value,
      )
    inner = [part for one in values for part in (_head(1, len(one)), one)]
    size = sum(map(len, inner))
    feature = _head(kind, size)
    size += len(feature)
    entry = _head(1, len(key)) + key + _head(2, size)
    parts += [_head(1, len(entry) + size), entry, feature, *inner]
  return b"".join([_head(1, sum(map(len, parts))), *parts])


@functools.lru_cache(maxsize=1 << 12)
def _head(number: int, size: int) -> bytes:
  """What stands before a field of a protobuf that has so many bytes."""
  return bytes([number << 3 | 2]) + _varint(size)


def _varint(number: int) -> bytes:
  found = bytearray()
  while number > 127:
    found.append(number & 127 | 128)
    number >>= 7
  return bytes([*found, number])


def array_record(path: str | os.PathLike):
  """A writer of one record per group: readers want random access to every record."""
  from array_record.python.array_record_module import ArrayRecordWriter

  return ArrayRecordWriter(os.fspath(path), "group_size:1")


@contextlib.contextmanager
def writing_records(path: str | os.PathLike) -> Generator[None]:
  """What goes wrong with the writer at `path`, a full disk perhaps, is an OSError: ArrayRecord
  raises a RuntimeError.
  """
  try:
    yield
  except RuntimeError as error:
    raise OSError(f"{os.fspath(path)} can't be written: {one_line(error)}") from error


@functools.cache
def _cv2() -> Any:
  """OpenCV, which only JPEG needs."""
  import cv2

  cv2.setNumThreads(1)  # readers run side by side
  return cv2


def _jpeg(frame: np.ndarray, quality: int) -> bytes:
  cv2 = _cv2()
  return cv2.imencode(
    ".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
  )[1].tobytes()


def _layout(info: Mapping[str, Any], where: pathlib.Path) -> Layout:
  features, wanted = info["features"], {"image_size": PIXELS, "clip_frames": FRAMES}
  if info["quality"] is not None:
    wanted["quality"] = range(1, 101)
  problems = [inputs.beyond(key, info[key], bounds) for key, bounds in wanted.items()]
  if features is not None:
    features = Features(**features)
    problems += [
      inputs.beyond(f"features.{key}", getattr(features, key), TOKENS)
      for key in ("tokens_per_frame", "width")
    ]
    problems += [] if isinstance(features.identity, str) else ["features.identity must be text"]
  if problems := list(filter(None, problems)):
    raise StoreError(f"{where}: {'; '.join(problems)}")
  return Layout(info["image_size"], info["clip_frames"], info["quality"], features)


def _sample(row: Mapping[str, Any]) -> StoredSample:
  def text(key):
    return row[key].decode("utf-8")

  def number(key):
    return int(row[key])

  talk = json.loads(text("conversations"))
  if not isinstance(talk, list) or not all(isinstance(turn, dict) for turn in talk):
    raise ValueError(f"conversations = {inputs.quoted(talk, 100)}: must be a list of objects")
  return StoredSample(
    id=text("id"),
    source=text("source"),
    annotation=text("annotation"),
    position=number("position"),
    conversations=tuple(talk),
    time_message=text("time_message"),
    frames=number("frames"),
    clip_frames=number("clip_frames"),
    first_record=number("first_record"),
    records=number("records"),
  )


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


def _sample_features():
  import tensorflow_datasets as tfds

  kinds = {str: tfds.features.Text, int: lambda: tfds.features.Scalar(np.int64)}
  return tfds.features.FeaturesDict(
    {f.name: kinds.get(f.type, tfds.features.Text)() for f in dataclasses.fields(StoredSample)}
  )


def _metadata(folder: pathlib.Path, features, lengths: Sequence[int], size: int) -> None:
  import tensorflow_datasets as tfds

  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=folder.name, split="train", filetype_suffix="array_record"
  )
  split = tfds.core.SplitInfo(
    name="train", shard_lengths=list(lengths), num_bytes=size, filename_template=template
  )
  # The default check reads through TensorFlow.
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=[split], check_data=False
  )
