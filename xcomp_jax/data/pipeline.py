"""From stores to batches: which samples, in which order, in which shapes.

Which samples a step has is a function of (seed, step) and the data alone. Devices decide only into how many
micro-batches a step is cut. A plan of all of them is made at start, so each one can be read by itself: threads and
processes change nothing, and a reader's state is one number, the steps that it has read.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tqdm

from xcomp_jax.config import ConfigError, DataConfig, Mask
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import IGNORE, IMAGE_TOKEN, Batch, Bucket, Example, batch_spec, collate
from xcomp_jax.data.blend import Blend, permutation

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
    raise ConfigError(f"train.batch_size = {batch_size}, but an epoch reads only {samples} samples; make it smaller")
  return samples // batch_size


def order(
  lengths: Sequence[Length], samples: Sequence[int], batch_size: int, seed: int, epoch: int, group_by_text_length: bool
) -> list[list[int]]:
  """Global batches of one epoch: every one of `samples` at most once, each batch full.

  With `group_by_text_length` a batch has samples of similar text length, either videos or images and text alone (except
  in the batches of leftovers); which batch comes when stays random. The release does so by its length-grouped sampler.
  """
  shuffled = [samples[i] for i in permutation(len(samples), seed, epoch, 0)]
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
  return [batches[i] for i in permutation(len(batches), seed, epoch, 1)]


def plan(
  lengths: Sequence[Length],
  samples: Sequence[int],
  cfg: DataConfig,
  batch_size: int,
  samples_per_micro_batch: Callable[[Bucket], int],
  seed: int,
  epoch: int,
) -> list[Entry]:
  """The micro-batches of one epoch of `samples`, in order; `lengths` are those of all samples there are.

  A global batch is parted by bucket, and each part cut into micro-batches of as many rows as the bucket has.

  Raises:
    ConfigError: samples that fit no bucket (all are listed), or fewer samples than a batch.
  """
  steps_per_epoch(len(samples), batch_size)  # refuses too few
  buckets = _buckets(lengths, cfg)
  whole = order(lengths, samples, batch_size, seed, epoch, cfg.group_by_text_length)
  return [entry for batch in whole for entry in _parts(batch, buckets, samples_per_micro_batch)]


def example(data: Blend, tokenizer, mask: Mask, index: int) -> Example:
  """Reads one sample; `mask` says which tokens are supervised (FACTS.md 3)."""
  return Example(data.visual(index), *_tokens(data, tokenizer, mask, index), index=index)


def measure(data: Blend, tokenizer, mask: Mask) -> list[Length]:
  """Lengths of every sample under this tokenizer; a minute's work for the paper's 71,927, so there is a bar."""
  lengths = []
  for i, sample in enumerate(tqdm.tqdm(data.samples, unit="sample", desc="tokens", delay=5.0, leave=False)):
    tokens, _, _ = _tokens(data, tokenizer, mask, i)
    slots = np.flatnonzero(tokens == IMAGE_TOKEN)
    before = int(slots[0]) + 1 if len(slots) else 0
    lengths.append(Length(sample.frames, sample.clip_frames, max(before - 1, 0), len(tokens) - before))
  return lengths


class Reader:
  """An iterator of a run's micro-batches. Its state is the number of steps that it has read.

  The state says nothing of devices, processes or threads: a reader for others goes on with the samples of the same
  steps. With as many devices the micro-batches are the same too, bit by bit, however many processes share them.
  """

  def __init__(self, entries: Sequence[Entry], open_from: Callable[[int], grain.IterDataset[MicroBatch]]):
    """entries: of the whole run. open_from: reads them from one on."""
    self._ends = [0, *(i for i, entry in enumerate(entries, 1) if entry.last)]  # micro-batches in so many steps
    self._open, self._micro, self._iterator = open_from, 0, None

  def __iter__(self) -> Iterator[MicroBatch]:
    return self

  def __next__(self) -> MicroBatch:
    if self._iterator is None:
      self._iterator = iter(self._open(self._micro))
    batch = next(self._iterator)
    self._micro += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """{"step": steps read}; one that was read in part does not count, and is read again from the state."""
    return {"step": bisect.bisect_right(self._ends, self._micro) - 1}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to where a reader of the same run had that state.

    Raises:
      ConfigError: the run has no such step.
    """
    step = state["step"]
    if not 0 <= step < len(self._ends):
      raise ConfigError(f"the data was read up to step {step}, but the run has {len(self._ends) - 1} steps")
    self.close()
    self._micro = self._ends[step]

  def close(self) -> None:
    """Ends the reading threads; what they read ahead is dropped."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator, self._micro = None, self._ends[self.get_state()["step"]]


def batches(
  data: Blend,
  tokenizer,
  cfg: DataConfig,
  *,
  batch_size: int,
  rows: int,
  seed: int,
  epochs: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Reader:
  """The whole run's micro-batches.

  At any time at most cfg.prefetch of them are read or being read ahead.

  Args:
    data: what to train on.
    tokenizer: of the checkpoint.
    cfg: buckets, masks, threads.
    batch_size: samples per optimizer step, over all processes.
    rows: what a micro-batch's rows must be a multiple of: the shards of its row axis, over all processes.
    seed: of the order, with the epoch.
    epochs: how many.
    process_index: which slice of each micro-batch's rows is read here.
    process_count: into how many.

  Raises:
    ConfigError: a sample fits no bucket, or numbers that do not go together.
  """
  lengths, size = measure(data, tokenizer, cfg.mask), rows_of(cfg, rows, batch_size)
  entries = [e for n in range(epochs) for e in plan(lengths, data.epoch(seed, n), cfg, batch_size, size, seed, n)]
  share = _share(rows, process_index, process_count)
  return Reader(entries, lambda first: _dataset(data, tokenizer, cfg, entries[first:], share))


def evaluation(
  data: Blend, tokenizer, cfg: DataConfig, *, rows: int, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset[MicroBatch]:
  """Every sample once, bucket by bucket, in order; begin again with each `iter()`. Arguments and errors as `batches`."""
  lengths, size = measure(data, tokenizer, cfg.mask), rows_of(cfg, rows, len(data))
  entries = _parts(range(len(data)), _buckets(lengths, cfg), size)
  return _dataset(data, tokenizer, cfg, entries, _share(rows, process_index, process_count))


def _tokens(data: Blend, tokenizer, mask: Mask, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  sample = data.samples[index]
  built = prompt.train(tokenizer, sample.conversations, sample.time_message if sample.frames else None, mask=mask)
  return built.tokens, built.labels, built.query


def rows_of(cfg: DataConfig, rows: int, samples: int) -> Callable[[Bucket], int]:
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
    if f is not None and t is not None and not faults:
      out.append(Bucket(f // length.clip_frames, length.clip_frames, cfg.prefix_length, t))
  if problems:
    problems = list(dict.fromkeys(problems))
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise ConfigError("the data does not fit the buckets: " + "; ".join(problems[:5]) + more)
  return out


def _share(rows: int, process_index: int, process_count: int) -> Callable[[int], slice]:
  """Which of a micro-batch's rows this process reads."""
  if rows % process_count:
    raise ConfigError(f"{rows} rows can't be split evenly over {process_count} processes")
  return lambda n: slice(process_index * n // process_count, (process_index + 1) * n // process_count)


def _dataset(
  data: Blend, tokenizer, cfg: DataConfig, entries: Sequence[Entry], share: Callable[[int], slice]
) -> grain.IterDataset[MicroBatch]:

  def load(entry: Entry) -> MicroBatch:
    here = share(entry.rows)
    n, mine = here.stop - here.start, entry.samples[here]
    if mine:
      batch = collate([example(data, tokenizer, cfg.mask, i) for i in mine], entry.bucket, n)
    else:
      batch = _padding(entry.bucket, n, data.clip_spec(entry.bucket.clip_frames))
    return MicroBatch(batch, entry.last)

  options = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=cfg.prefetch)
  return grain.MapDataset.source(entries).map(load).to_iter_dataset(options)


def _padding(bucket: Bucket, rows: int, visual: tuple[tuple[int, ...], np.dtype]) -> Batch:
  """A batch without samples: another process has the micro-batch's few. visual: shape of a clip, dtype."""
  zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), batch_spec(bucket, rows, visual))
  return dataclasses.replace(
    zeros, targets=np.full_like(zeros.targets, IGNORE), index=np.full_like(zeros.index, -1)
  )
