"""Writes stores: records, shards of them, and what makes a folder of shards a store."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xcomp_jax.data import store
from xcomp_jax.errors import one_line
from xcomp_jax.files import fresh_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
  """A written file of clips and its samples, whose `first_record` counts from the beginning of that
  file.
  """

  path: str  # "" if no sample had frames
  samples: tuple[store.StoredSample, ...]
  records: int
  bytes: int
  crcs: tuple[int, ...]  # of each sample: `store.content_crc` of its records, one after the other


def write_store(
  target: str | os.PathLike,
  items: Iterable[tuple[store.StoredSample, np.ndarray | None]],
  *,
  image_size: int,
  clip_frames: int,
  features: store.Features | None = None,
  quality: int | None = None,
) -> None:
  """Writes a whole store from samples in memory, in one shard (see `write_shard`); `quality` makes
  it JPEG.
  """
  layout = store.Layout(image_size, clip_frames, quality, features)
  with fresh_folder(target, "store") as folder:
    finish_store(folder, [write_shard(folder / "shard", items, layout)], layout, {})


def write_shard(
  path: str | os.PathLike,
  items: Iterable[tuple[store.StoredSample, np.ndarray | None]],
  layout: store.Layout,
) -> Shard:
  """Writes the visual part of some samples into one ArrayRecord file at `path`.

  Args:
    path: file to be; none is left if no item has frames. It is no whole one if this raises.
    items: samples and their uint8[C, F, S, S, 3] or bfloat16[C, N, D], None for text alone. The
      sample's frames and records are set here.
    layout: what the records hold.

  Raises:
    ValueError: visual of another shape or dtype.
  """
  samples, crcs, lengths = [], [], []
  with contextlib.closing(array_record(path)) as writer:
    for sample, visual in items:
      first, crc, frames, clip_frames = len(lengths), 0, 0, 1
      if visual is not None:
        clip_frames = _clip_frames(sample, visual, layout)
        frames = len(visual) * clip_frames
        for record, _, content in records(layout, visual, clip_frames):
          writer.write(record)
          lengths.append(len(record))
          crc = store.content_crc(content, crc)
      crcs.append(crc)
      samples.append(
        dataclasses.replace(
          sample,
          frames=frames,
          clip_frames=clip_frames,
          first_record=first,
          records=len(lengths) - first,
        )
      )
  if not lengths:
    os.unlink(path)
  return Shard(
    path=os.fspath(path) if lengths else "",
    samples=tuple(samples),
    records=len(lengths),
    bytes=sum(lengths),
    crcs=tuple(crcs),
  )


def _clip_frames(sample: store.StoredSample, visual: np.ndarray, layout: store.Layout) -> int:
  """Frames of each clip of a sample; a StoreError if its array is not what the records hold."""
  per_frame = layout.features.tokens_per_frame if layout.features else 1
  found = visual.shape[1] // per_frame if visual.ndim > 1 else 0
  shape, dtype = layout.clip_spec(found)
  if visual.dtype != dtype or visual.shape[1:] != shape or not visual.size:
    raise store.StoreError(
      f"{sample.source}: expected {dtype} [clips, {', '.join(map(str, shape))}], got "
      f"{visual.dtype}{visual.shape}",
      where=sample.source,
      expected=(dtype, shape),
      found=(visual.dtype, visual.shape),
    )
  return found


def records(
  layout: store.Layout, clips: Iterable[np.ndarray], clip_frames: int
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
  step = store.clips_per_record(layout, clip_frames)
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


def finish_store(
  folder: pathlib.Path, shards: Sequence[Shard], layout: store.Layout, info: Mapping[str, Any]
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
    store.StoreError: no samples at all. OSError: it can't be written.
  """
  samples = [sample for shard in shards for sample in shard.samples]
  if not samples:
    raise store.StoreError("no samples to write", samples=0)
  files = [shard for shard in shards if shard.records]
  if files:
    (folder / layout.folder).mkdir(exist_ok=True)
    for shard, target in zip(
      files, store.files_of(folder / layout.folder, len(files)), strict=True
    ):
      if not target.exists():
        os.rename(shard.path, target)
    _metadata(
      folder / layout.folder,
      store.record_features(layout),
      [s.records for s in files],
      sum(s.bytes for s in files),
    )
  (folder / "samples").mkdir(exist_ok=True)
  size, base, file = 0, 0, folder / "samples" / "samples-train.array_record-00000-of-00001"
  with writing_records(file) as writer:
    for shard in shards:
      for s in shard.samples:
        record = encode_record(
          vars(s)
          | {"first_record": s.first_record + base, "conversations": store.as_json(s.conversations)}
        )
        writer.write(record)
        size += len(record)
      base += shard.records
  _metadata(folder / "samples", store.sample_features(), [len(samples)], size)
  text = {
    "format": store.FORMAT,
    "image_size": layout.image_size,
    "clip_frames": layout.clip_frames,
    "quality": layout.quality,
    "features": layout.features and dataclasses.asdict(layout.features),
    **info,
    "samples": len(samples),
    "frames": sum(s.frames for s in samples),
    "records": base,
    "checksum": store.checksum(samples),
    "content": store.content_checksum(crc for shard in shards for crc in shard.crcs),
  }
  (folder / "store.json").write_text(
    json.dumps(text, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
  )
  return text


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
    feature = _field(kind, [part for one in values for part in _field(1, [one])])
    parts += _field(1, [*_field(1, [key]), *_field(2, feature)])
  return b"".join(_field(1, parts))


def _field(number: int, parts: Sequence[Any]) -> list[Any]:
  """A field of a protobuf that consists of these bytes."""
  return [_head(number, sum(map(len, parts))), *parts]


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
def writing_records(path: str | os.PathLike) -> Generator[Any]:
  """An `array_record` that is closed in the end; what goes wrong with it, a full disk perhaps, is
  an OSError: ArrayRecord raises a RuntimeError.
  """
  try:
    with contextlib.closing(array_record(path)) as writer:
      yield writer
  except RuntimeError as error:
    raise OSError(f"{os.fspath(path)} can't be written: {one_line(error)}") from error


def _jpeg(frame: np.ndarray, quality: int) -> bytes:
  cv2 = store.opencv()
  return cv2.imencode(
    ".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
  )[1].tobytes()


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
