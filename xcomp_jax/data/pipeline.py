"""From stores to what a step computes: which samples, in which order, in which rows.

Which samples a step has is a function of (seed, step) and the data alone. Devices decide only how
they are packed into micro-batches (`packing`). A plan of all steps is made at start, so each part
of it can be read by itself: threads and processes change nothing, and a reader's state is one
number, the steps that it has read.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from xcomp_jax.config import ConfigError, DataConfig, Mask
from xcomp_jax.data import packing, prompt
from xcomp_jax.data.batch import Batch, Clips, Example, Length, Shape, collate, length_table
from xcomp_jax.data.blend import Blend
from xcomp_jax.data.packing import Micro
from xcomp_jax.data.store import StoredSample


class Fill(NamedTuple):
  """Where clips go in the visual tokens of one micro-batch."""

  number: int  # of the micro-batch within its step
  shape: Shape
  # int32[K, 2], row and slot of each clip's first frame; -1 where it goes elsewhere, or is padding
  place: np.ndarray


class TowerCall(NamedTuple):
  """Clips that the frozen tower takes at once."""

  frames: np.ndarray  # uint8[k, F, S, S, 3], those of this process's devices
  fills: tuple[Fill, ...]


class MicroBatch(NamedTuple):
  """What gradients are computed of at once."""

  batch: Batch  # this process's rows; without visual tokens where the tower is still to make them
  clips: tuple[Clips, ...]  # likewise; only for a tower that is trained
  shape: Shape
  number: int  # within its step
  last: bool  # of its step


Item = TowerCall | MicroBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessShare:
  """What of a run a process reads.

  rows: which of the row groups, ascending; groups: how many there are. devices: how many there are;
  mine: which of them are this process's. clips: that a device's tower takes at once. trained: the
  tower is trained, so it has the same number of clips in every micro-batch.
  """

  rows: tuple[int, ...]
  groups: int
  devices: int
  mine: tuple[int, ...]
  clips: int
  trained: bool


def read_example(data: Blend, tokenizer, mask: Mask, index: int) -> Example:
  """Reads one sample, without its visual tokens where the tower makes them; `mask`: which tokens
  are supervised (FACTS.md 3).
  """
  sample, visual = data.samples[index], None
  if data.features is not None and sample.frames:
    visual = data.visual(index).reshape(
      sample.frames, data.features.tokens_per_frame, data.features.width
    )
  built = prompt.sample_prompt(tokenizer, sample, mask)
  return Example(
    frames=sample.frames,
    visual=visual,
    tokens=built.tokens,
    labels=built.labels,
    query=built.query,
    index=index,
  )


class BatchReader:
  """An iterator of a run's items: of each step the calls of the tower, then the micro-batches.

  Its state is the number of steps that it has read. The state says nothing of devices, processes or
  threads: a reader for others goes on with the samples of the same steps. With as many devices the
  items are the same too, bit by bit, however many processes share them.
  """

  def __init__(self, ends: Sequence[int], open_from: Callable[[int], grain.IterDataset[Item]]):
    """ends: how many items the first 0, 1, 2, ... steps have. open_from: reads from an item on."""
    self._ends, self._open, self._item, self._iterator = ends, open_from, 0, None

  def __iter__(self) -> Iterator[Item]:
    return self

  def __next__(self) -> Item:
    if self._iterator is None:
      self._iterator = iter(self._open(self._item))
    item = next(self._iterator)
    self._item += 1
    return item

  def get_state(self) -> dict[str, int]:
    """{"step": steps read}; one that was read in part does not count, and is read again from the
    state.
    """
    return {"step": bisect.bisect_right(self._ends, self._item) - 1}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to where a reader of the same run had that state.

    Raises:
      ConfigError: the run has no such step.
    """
    step = state["step"]
    if not 0 <= step < len(self._ends):
      raise ConfigError(
        f"the data was read up to step {step}, but the run has {len(self._ends) - 1} steps",
        where="step",
        value=step,
        allowed=len(self._ends) - 1,
      )
    self.close()
    self._item = self._ends[step]

  def close(self) -> None:
    """Ends the reading threads; what they read ahead is dropped."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator, self._item = None, self._ends[self.get_state()["step"]]


def read_steps(
  data: Blend,
  tokenizer,
  cfg: DataConfig,
  lengths: Sequence[Length],
  steps: Sequence[Sequence[Micro]],
  share: ProcessShare,
  load: Callable[..., Item] | None = None,
) -> BatchReader:
  """Reads what some steps compute. At any time at most cfg.prefetch items are read or being read
  ahead.

  Args:
    data: what they are of.
    tokenizer: of the checkpoint.
    cfg: masks, threads.
    lengths: of all samples.
    steps: the micro-batches of each, as planned.
    share: what is read here.
    load: reads an item; None: as `load_item`.

  Raises:
    ConfigError: rows that can't be split over the row groups.
  """
  for shape in sorted({micro.shape for step in steps for micro in step}):
    if shape.rows % share.groups:
      raise ConfigError(
        f"{shape.rows} rows can't be split evenly over {share.groups} row groups",
        where=shape,
        rows=shape.rows,
        groups=share.groups,
      )
  items = _Items(data, lengths, steps, share)
  load = functools.partial(
    load or load_item,
    data,
    tokenizer,
    cfg.mask,
    {length.clip_frames for length in lengths if length.frames},
    share,
  )
  options = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=cfg.prefetch)

  def open_from(first: int) -> grain.IterDataset[Item]:
    return (
      grain.MapDataset.source(items).slice(slice(first, None)).map(load).to_iter_dataset(options)
    )

  return BatchReader(items.ends, open_from)


class Planned(NamedTuple):
  """An item before it is read: a call's clips, as (sample, clip) int32[devices, n, 2], -1 for
  padding; or a micro-batch.
  """

  clips: np.ndarray | None
  clip_frames: int
  fills: tuple[Fill, ...]
  micro: Micro | None
  number: int
  last: bool


class _Items:
  """A run's items, in order. A step's are made when one of them is wanted: a run has a million."""

  def __init__(
    self,
    data: Blend,
    lengths: Sequence[Length],
    steps: Sequence[Sequence[Micro]],
    share: ProcessShare,
  ):
    self._lengths, self._steps, self._share = lengths, steps, share
    self._encodes = data.features is None and not share.trained
    table = length_table(lengths)
    self._clips = table[:, 0] // table[:, 1]
    self._clip_frames = table[:, 1]
    self.ends = [0, *itertools.accumulate(self._count(step) + len(step) for step in steps)]
    self._step = functools.lru_cache(maxsize=8)(self._make)

  def __len__(self) -> int:
    return self.ends[-1]

  def __getitem__(self, index: int) -> Planned:
    step = bisect.bisect_right(self.ends, index) - 1
    return self._step(step)[index - self.ends[step]]

  def _kinds(self, step: Sequence[Micro]) -> list[tuple[int, list[int]]]:
    """(frames of a clip, samples with such clips): images are apart from videos."""
    samples = [i for i in packing.samples_of(step) if self._clips[i]]
    kinds = sorted({int(self._clip_frames[i]) for i in samples}, reverse=True)
    return [(kind, [i for i in samples if self._clip_frames[i] == kind]) for kind in kinds]

  def _count(self, step: Sequence[Micro]) -> int:
    """Calls of the tower."""
    if not self._encodes:
      return 0
    each = [
      -(-int(self._clips[samples].sum()) // self._share.devices) for _, samples in self._kinds(step)
    ]
    return sum(n // self._share.clips + n % self._share.clips for n in each)

  def _make(self, number: int) -> list[Planned]:
    step = self._steps[number]
    kinds = [kind for kind, _ in self._kinds(step)] if self._encodes else []
    calls = [call for kind in kinds for call in self._calls(step, kind)]
    last = len(step) - 1
    return [*calls, *(Planned(None, 0, (), micro, n, n == last) for n, micro in enumerate(step))]

  def _calls(self, step: Sequence[Micro], kind: int) -> list[Planned]:
    """The tower's calls on all clips of so many frames. Those of a call are neighbours, so that a
    host reads few records.
    """
    devices, size = self._share.devices, self._share.clips
    # of each device: sample, clip, micro-batch, row, slot
    lists: list[list[tuple[int, ...]]] = [[] for _ in range(devices)]
    turn = 0  # whose turn it is to take one more than others
    for number, micro in enumerate(step):
      found = [
        (i, clip, number, *at) for i, clip, *at in _clips_of(self._lengths, micro.rows, kind)
      ]
      clips, (each, more) = iter(found), divmod(len(found), devices)
      for n in [size] * (each // size) + [1] * (each % size):
        for mine in lists:
          mine += itertools.islice(clips, n)
      for i in range(more):
        lists[(turn + i) % devices] += itertools.islice(clips, 1)
      turn = (turn + more) % devices
    most = max(map(len, lists))
    table = np.full((devices, most, 5), -1, np.int32)
    for device, mine in enumerate(lists):
      table[device, : len(mine)] = np.array(mine, np.int32).reshape(-1, 5)
    ends = [0, *itertools.accumulate([size] * (most // size) + [1] * (most % size))]
    return [_call(step, kind, table[:, a:b]) for a, b in itertools.pairwise(ends)]


def _clips_of(
  samples: Sequence[Length | StoredSample], rows: Sequence[Sequence[int]], kind: int
) -> Iterator[tuple[int, int, int, int]]:
  """All clips of so many frames of some rows: sample, clip, row, and slot of its first frame."""
  for row, ids in enumerate(rows):
    slot = 0
    for i in ids:
      if samples[i].frames and samples[i].clip_frames == kind:
        for clip in range(samples[i].frames // kind):
          yield i, clip, row, slot + clip * kind
      slot += samples[i].frames


def _call(step: Sequence[Micro], kind: int, table: np.ndarray) -> Planned:
  flat = table.reshape(-1, 5)
  fills = tuple(
    Fill(n, step[n].shape, np.where(flat[:, 2:3] == n, flat[:, 3:], -1).astype(np.int32))
    for n in np.unique(flat[:, 2]).tolist()
    if n >= 0
  )
  return Planned(table[..., :2], kind, fills, None, -1, False)


def load_item(
  data: Blend, tokenizer, mask: Mask, kinds: set[int], share: ProcessShare, planned: Planned
) -> Item:
  """Reads an item. kinds: frames of the clips that the data has."""
  if planned.clips is not None:
    return TowerCall(
      _read_clips(data, planned.clips[list(share.mine)].reshape(-1, 2), planned.clip_frames),
      planned.fills,
    )
  micro = planned.micro
  assert micro is not None
  each = micro.shape.rows // share.groups
  rows = [micro.rows[group * each + k] for group in share.rows for k in range(each)]
  shape = dataclasses.replace(micro.shape, rows=len(rows))
  held = None
  if data.features is not None:
    held = (data.features.tokens_per_frame, data.features.width), data.clip_spec(1)[1]
  batch = collate(
    [[read_example(data, tokenizer, mask, i) for i in row] for row in rows], shape, held
  )
  clips = ()
  if share.trained:
    clips = tuple(_static(data, rows, shape, kind) for kind in sorted(kinds, reverse=True))
  return MicroBatch(batch, clips, micro.shape, planned.number, planned.last)


def _read_clips(data: Blend, wanted: np.ndarray, clip_frames: int) -> np.ndarray:
  """uint8[k, F, S, S, 3] of clips (sample, clip) int32[k, 2]; zeros for padding."""
  shape, dtype = data.clip_spec(clip_frames)
  out = np.zeros((len(wanted), *shape), dtype)
  # neighbours of one sample are read together
  apart = (np.diff(wanted, axis=0) != (0, 1)).any(1)
  for run in np.split(np.arange(len(wanted)), np.flatnonzero(apart) + 1):
    if len(run) and wanted[run[0], 0] >= 0:
      out[run] = data.clips(*wanted[run[0]].tolist(), len(run))
  return out


def _static(data: Blend, rows: Sequence[Sequence[int]], shape: Shape, clip_frames: int) -> Clips:
  """All clips of so many frames of some rows, in lists as long as they can be."""
  most = shape.frames // clip_frames if clip_frames > 1 else shape.samples
  kind, dtype = data.clip_spec(clip_frames)
  frames = np.zeros((shape.rows, most, *kind), dtype)
  place = np.full((shape.rows, most), -1, np.int32)
  found = np.array([*_clips_of(data.samples, rows, clip_frames)], np.int32).reshape(-1, 4)
  for r in range(shape.rows):
    mine = found[found[:, 2] == r]  # [k, 4]
    frames[r, : len(mine)] = _read_clips(data, mine[:, :2], clip_frames)
    place[r, : len(mine)] = mine[:, 3]
  return Clips(frames, place)
