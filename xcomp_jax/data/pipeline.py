"""From a store to batches: which samples, in which order, in which shapes.

The order is a function of (seed, epoch) and the store alone. A plan of every micro-batch is made at start, so each one
can be read by itself: threads and processes change nothing, and an iterator's state is one number.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from xcomp_jax.config import ConfigError, DataConfig
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import IGNORE, IMAGE_TOKEN, Batch, Bucket, Example, batch_spec, collate
from xcomp_jax.data.store import Store

POOL = 50  # global batches that are sorted together by text length: similar lengths, and still a random order


class Length(NamedTuple):
  """What decides a sample's bucket."""

  frames: int  # 0: text alone
  clip_frames: int  # 1 for images and text alone
  prefix: int  # tokens before the visual slot
  text: int  # tokens after it; all of them in text alone


class Entry(NamedTuple):
  """A planned micro-batch."""

  bucket: Bucket
  rows: int  # over all processes; the same for every micro-batch of a bucket
  samples: tuple[int, ...]  # at most rows
  last: bool  # of its optimizer step; for evaluation, of all


class MicroBatch(NamedTuple):
  """What the training loop is given."""

  batch: Batch  # this process's rows
  last: bool  # as in Entry


def steps_per_epoch(samples: int, batch_size: int) -> int:
  """Optimizer steps of an epoch; samples that do not fill a last batch wait for another epoch's order.

  Raises:
    ConfigError: not even one batch.
  """
  if samples < batch_size:
    raise ConfigError(f"train.batch_size = {batch_size}, but the data has only {samples} samples; make it smaller")
  return samples // batch_size


def order(
  lengths: Sequence[Length], batch_size: int, seed: int, epoch: int, group_by_text_length: bool
) -> list[list[int]]:
  """Global batches of one epoch: every sample at most once, each batch full.

  With `group_by_text_length` a batch has samples of similar text length, either videos or images and text alone (except
  in the batches of leftovers); which batch comes when stays random. The release does so by its length-grouped sampler.
  """
  shuffled = _permutation(len(lengths), seed, epoch, 0)
  cut = lambda ids: [ids[i : i + batch_size] for i in range(0, len(ids) - batch_size + 1, batch_size)]
  if not group_by_text_length:
    return cut(shuffled)
  batches, rest = [], []
  for video in (True, False):
    kind = [i for i in shuffled if (lengths[i].clip_frames > 1) == video]
    whole = len(kind) // batch_size * batch_size
    for start in range(0, whole, POOL * batch_size):
      pool = kind[start : min(start + POOL * batch_size, whole)]
      batches += cut(sorted(pool, key=lambda i: lengths[i].text))
    rest += kind[whole:]
  batches += cut(rest)
  return [batches[i] for i in _permutation(len(batches), seed, epoch, 1)]


def plan(
  lengths: Sequence[Length],
  cfg: DataConfig,
  batch_size: int,
  samples_per_micro_batch: Callable[[Bucket], int],
  seed: int,
  epoch: int,
) -> list[Entry]:
  """The micro-batches of one epoch, in order.

  A global batch is parted by bucket, and each part cut into micro-batches of as many rows as the bucket has.

  Raises:
    ConfigError: samples that fit no bucket (all are listed), or fewer samples than a batch.
  """
  steps_per_epoch(len(lengths), batch_size)  # refuses too few samples
  buckets = _buckets(lengths, cfg)
  whole = order(lengths, batch_size, seed, epoch, cfg.group_by_text_length)
  return [entry for batch in whole for entry in _parts(batch, buckets, samples_per_micro_batch)]


def example(store: Store, tokenizer, mask: str, index: int) -> Example:
  """Reads one sample; `mask` says which tokens are supervised (FACTS.md 3)."""
  return Example(store.visual(index), *_tokens(store, tokenizer, mask, index), index=index)


def measure(store: Store, tokenizer, mask: str) -> list[Length]:
  """Lengths of every sample under this tokenizer."""
  lengths = []
  for i, sample in enumerate(store.samples):
    tokens, _, _ = _tokens(store, tokenizer, mask, i)
    slots = np.flatnonzero(tokens == IMAGE_TOKEN)
    before = int(slots[0]) + 1 if len(slots) else 0
    lengths.append(Length(sample.frames, sample.clip_frames, max(before - 1, 0), len(tokens) - before))
  return lengths


def batches(
  store: Store,
  tokenizer,
  cfg: DataConfig,
  *,
  batch_size: int,
  rows: int,
  seed: int,
  epochs: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator[MicroBatch]:
  """The whole run's micro-batches, as an iterator that Orbax can save and restore exactly.

  Args:
    store: what to train on.
    tokenizer: of the checkpoint.
    cfg: buckets, masks, reader.
    batch_size: samples per optimizer step, over all processes.
    rows: what a micro-batch's rows must be a multiple of: the shards of its row axis, over all processes.
    seed: of the order, with the epoch.
    epochs: how often every sample is read.
    process_index: which slice of each micro-batch's rows is read here.
    process_count: into how many.

  Raises:
    ConfigError: a sample fits no bucket, or numbers that do not go together.
  """
  lengths, size = measure(store, tokenizer, cfg.mask), _rows(cfg, rows, batch_size)
  entries = [e for epoch in range(epochs) for e in plan(lengths, cfg, batch_size, size, seed, epoch)]
  return iter(_dataset(store, tokenizer, cfg, entries, rows, process_index, process_count))


def evaluation(
  store: Store, tokenizer, cfg: DataConfig, *, rows: int, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset[MicroBatch]:
  """Every sample once, bucket by bucket, in order; begin again with each `iter()`. Arguments and errors as `batches`."""
  lengths, size = measure(store, tokenizer, cfg.mask), _rows(cfg, rows, len(store))
  entries = _parts(range(len(store)), _buckets(lengths, cfg), size)
  return _dataset(store, tokenizer, cfg, entries, rows, process_index, process_count)


def _permutation(n: int, *key: int) -> list[int]:
  # Raw bits of a bit generator stay the same over numpy's versions; its permutation() need not.
  return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable").tolist()


def _tokens(store: Store, tokenizer, mask: str, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  sample = store.samples[index]
  built = prompt.train(tokenizer, sample.conversations, sample.time_message if sample.frames else None, mask=mask)
  return built.tokens, built.labels, built.query


def _rows(cfg: DataConfig, rows: int, samples: int) -> Callable[[Bucket], int]:
  most = math.ceil(samples / rows)  # more could only be padding
  budget = lambda bucket: min(most, cfg.frames_per_device // max(1, bucket.frames), cfg.text_per_device // bucket.text)
  return lambda bucket: rows * max(1, budget(bucket))


def _parts(batch: Sequence[int], buckets: Sequence[Bucket], size: Callable[[Bucket], int]) -> list[Entry]:
  groups: dict[Bucket, list[int]] = {}
  for i in batch:
    groups.setdefault(buckets[i], []).append(i)
  entries = []
  for bucket in sorted(groups):
    ids, n = groups[bucket], size(bucket)
    entries += [Entry(bucket, n, tuple(ids[k : k + n]), False) for k in range(0, len(ids), n)]
  return [*entries[:-1], entries[-1]._replace(last=True)]


def _buckets(lengths: Sequence[Length], cfg: DataConfig) -> list[Bucket]:
  """The smallest bucket of each sample."""
  out, problems = [], []
  texts, frames = sorted(cfg.text_buckets), sorted(f for f in cfg.frame_buckets if f > 1)
  for i, length in enumerate(lengths):
    if length.clip_frames > 1:
      f = next((f for f in frames if f >= length.frames), None)
      largest = f"the largest of data.frame_buckets is {max(frames, default=0)}"
      if f is not None and f % length.clip_frames:
        problems.append(f"data.frame_buckets has {f}, which is not a multiple of the data's clips of {length.clip_frames} frames")
        continue
    else:
      f = length.frames if length.frames in cfg.frame_buckets else None
      largest = f"data.frame_buckets has no {length.frames} ({'image' if length.frames else 'text alone'})"
    t = next((t for t in texts if t >= length.text), None)
    faults = []
    if f is None:
      faults.append(f"has {length.frames} frames, and {largest}")
    if t is None:
      largest = max(texts, default=0)
      faults.append(f"has {length.text} tokens after the visual slot, and the largest of data.text_buckets is {largest}")
    if length.prefix > cfg.prefix_length:
      faults.append(f"has {length.prefix} tokens before the visual slot, and data.prefix_length is {cfg.prefix_length}")
    problems += [f"sample {i} {fault}" for fault in faults]
    if not faults:
      out.append(Bucket(f // length.clip_frames, length.clip_frames, cfg.prefix_length, t))
  if problems:
    problems = list(dict.fromkeys(problems))
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise ConfigError("the data does not fit the buckets: " + "; ".join(problems[:5]) + more)
  return out


def _dataset(
  store: Store, tokenizer, cfg: DataConfig, entries: Sequence[Entry], rows: int, process_index: int, process_count: int
) -> grain.IterDataset[MicroBatch]:
  if rows % process_count:
    raise ConfigError(f"{rows} rows can't be split evenly over {process_count} processes")

  def load(entry: Entry) -> MicroBatch:
    n = entry.rows // process_count
    mine = entry.samples[process_index * n : (process_index + 1) * n]
    if mine:
      batch = collate([example(store, tokenizer, cfg.mask, i) for i in mine], entry.bucket, n)
    else:
      batch = _padding(entry.bucket, n, store.image_size)
    return MicroBatch(batch, entry.last)

  options = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=cfg.prefetch)
  return grain.MapDataset.source(entries).map(load).to_iter_dataset(options)


def _padding(bucket: Bucket, rows: int, size: int) -> Batch:
  """A batch without samples: another process has the micro-batch's few."""
  spec = batch_spec(bucket, rows, ((bucket.clip_frames, size, size, 3), np.dtype(np.uint8)))
  zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), spec)
  return dataclasses.replace(
    zeros, targets=np.full_like(zeros.targets, IGNORE), index=np.full_like(zeros.index, -1)
  )
