"""Packs a step's samples into micro-batches of few shapes, at the least predicted time, and chooses
the shapes.

Everything here is a function of its arguments alone and computed in whole numbers, so all hosts of
a run plan the same.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from xcomp_jax.config import ConfigError
from xcomp_jax.data.batch import Length, Shape, length_table

MOST = 4  # shapes of a run; each one is a program that takes minutes to compile
TOGETHER = 7  # micro-batches that are planned together; a step that needs more is parted first
# room beyond a step's size, in 64ths, with which combinations of shapes are tried
SLACK = (
  0,
  1,
  2,
  3,
  4,
  6,
  8,
  11,
  15,
  20,
  30,
)
# what goes on meanwhile costs one 16th of itself: it never hides completely, and padding is not
# free
HIDDEN = 16
SAMPLED = 1024  # so many random samples decide on shapes
SEED = 20_251_129  # of that draw
NEVER = np.iinfo(np.int64).max // 4  # picoseconds of what can't be
Lengths = Sequence[Length] | np.ndarray  # an array has the columns of Length: int[n, 4]


class Micro(NamedTuple):
  """A micro-batch."""

  shape: Shape
  # numbers of the samples of each row, in their order; as many rows as the shape has
  rows: tuple[tuple[int, ...], ...]


@runtime_checkable
class MicroCosts(Protocol):
  """What a micro-batch takes, in whole picoseconds.

  That is the slower of two: transfers, or operations with the attention of the busiest row group. A
  part of the faster is added (HIDDEN).

  groups: of rows; each has devices of its own. attention: int64[N], what each sample's takes on its
  row's devices.
  """

  @property
  def groups(self) -> int: ...

  @property
  def attention(self) -> np.ndarray: ...

  def price(self, shape: Shape) -> tuple[int, int]:
    """Picoseconds of a shape's operations without attention, and of its transfers."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeRoom:
  """What a mesh and a config leave to choose of a shape.

  groups: of rows, which are a multiple of it. parts: a row is split into so many, evenly. step:
  frames are a multiple of it, so that their tokens are split evenly in every layer. samples: the
  most of a row. prefix: token slots of a place
  before its visual tokens. frames, text: the most of a row, if a row group has one.
  """

  groups: int
  parts: int
  step: int
  samples: int
  prefix: int
  frames: int
  text: int

  def shape(self, samples: int, frames: int, text: int) -> Shape:
    """Makes the shape with a row per row group that holds so much, in sizes that split evenly."""
    frames = min(_coarse(max(1, frames), self.step), self.frames)
    before = samples * self.prefix
    around = min(
      _coarse(before + min(text, self.text), self.parts),
      _multiple(before + self.text, self.parts),
    )
    return Shape(
      rows=self.groups, samples=samples, prefix=self.prefix, frames=frames, text=around - before
    )


def samples_of(step: Sequence[Micro]) -> list[int]:
  """Lists the samples of a step."""
  return [i for micro in step for row in micro.rows for i in row]


def pack_steps(
  lengths: Lengths, steps: Sequence[Sequence[int]], shapes: Sequence[Shape], costs: MicroCosts
) -> list[list[Micro]]:
  """Packs the samples of every step into micro-batches. A step is packed the same alone and among
  others.

  Args:
    lengths: of all samples there are; each of the steps' must fit a shape.
    steps: the numbers of the samples of each.
    shapes: of micro-batches.
    costs: what they take.
  """
  table, shapes = _needs(lengths), sorted(shapes)
  out: list[list[Micro]] = [[] for _ in steps]
  left = [
    (n, part)
    for n, ids in enumerate(steps)
    for part in _parts(table, np.array(ids, np.int64), shapes)
  ]
  while left:
    some, left = left[:256], left[256:]  # bounds the memory
    _, mixes, places = _fastest(table, [ids for _, ids in some], shapes, costs)
    for (n, ids), mix, place in zip(some, mixes, places):
      place = place[: len(ids)]
      if (place < 0).all():  # no combination takes any of them, so the largest gets a micro-batch
        mix, place = (
          (int(_cheapest(table[ids[:1]], shapes, costs)[0]),),
          np.where(np.arange(len(ids)), -1, 0),
        )
      out[n] += _micros(ids, mix, place, shapes)
      if (place < 0).any():
        left.append((n, ids[place < 0]))
  return out


def _micros(
  ids: np.ndarray, mix: Sequence[int], place: np.ndarray, shapes: Sequence[Shape]
) -> list[Micro]:
  """Builds the micro-batches of a combination of shapes that have samples; the row of each sample
  is its place.
  """
  rows: list[list[int]] = [[] for _ in range(sum(shapes[s].rows for s in mix))]
  for i, row in zip(ids.tolist(), place.tolist()):
    if row >= 0:
      rows[row].append(i)
  each = iter(map(tuple, rows))
  micros = [Micro(shapes[s], tuple(itertools.islice(each, shapes[s].rows))) for s in mix]
  return [micro for micro in micros if any(micro.rows)]


# --- the search for a packing
# -----------------------------------------------------------------------------------------


def _fastest(
  table: np.ndarray, steps: Sequence[np.ndarray], shapes: Sequence[Shape], costs: MicroCosts
) -> tuple[np.ndarray, list[tuple[int, ...]], np.ndarray]:
  """Finds the fastest of the packings that are tried of each step, whose samples come the largest
  first.

  Returns:
    time: int64[B], picoseconds, as if each sample without a place got a micro-batch of its own.
    mixes: the shapes of each step's micro-batches, as their numbers.
    places: int64[B, m], the row of each sample, counted over the step's micro-batches; -1 for none.
  """
  width = max(map(len, steps))
  ids = np.array([np.pad(step, (0, width - len(step)), constant_values=-1) for step in steps])
  there = ids >= 0
  needs = np.where(there[..., None], table[ids], 0)  # [B, m, 3]
  attention = np.where(there, costs.attention[ids], 0)
  prices = np.array([costs.price(shape) for shape in shapes], np.int64)
  alone = np.where(there, prices.max(1)[_cheapest(needs, shapes, costs)] + attention, 0)

  room, total = _room(shapes), needs.sum(1)
  most = 2 + _micro_batches(total, room)  # [B]
  mixes, counts = _mixes(len(shapes), int(most.max()))
  # 64ths of what a step takes that each combination has room for, of what is scarcest.
  spare = ((counts @ room)[None] * 64 // np.maximum(total, 1)[:, None]).min(-1) - 64
  # so that no step depends on the others
  spare = np.where(counts.sum(1)[None] <= most[:, None], spare, -1)
  # At best attention is spread evenly over the row groups.
  work = (counts @ prices[:, 0])[None] + attention.sum(1)[:, None] // costs.groups
  least = np.maximum(work, (counts @ prices.max(1))[None])  # [B, mixes]

  allowed = (np.where(spare >= slack, least, NEVER) for slack in SLACK)
  tries = np.stack([cost.argmin(1) for cost in allowed], 1)  # [B, slack]
  step, slack = np.nonzero(
    (np.diff(tries, axis=1, prepend=-1) != 0) & (np.take_along_axis(spare, tries, 1) >= SLACK)
  )
  tried = [mixes[i] for i in tries[step, slack]]
  time, places = _place(
    needs[step], attention[step], alone[step], tried, shapes, prices, costs.groups
  )
  order = np.lexsort((time, step))  # stable: of equal times the first try counts
  best = order[np.unique(step[order], return_index=True)[1]]
  return time[best], [tried[i] for i in best], places[best]


def _place(
  needs: np.ndarray,
  attention: np.ndarray,
  alone: np.ndarray,
  mixes: Sequence[tuple[int, ...]],
  shapes: Sequence[Shape],
  prices: np.ndarray,
  groups: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Gives each step's samples, one after the other, a place in the rows of its combination of
  shapes.

  Returns:
    time and places as of `_fastest`.
  """
  steps, micros = np.arange(len(mixes)), max(map(len, mixes))
  layouts = {mix: _layout(mix, tuple(shapes), groups) for mix in dict.fromkeys(mixes)}
  rows = max(len(free) for free, _ in layouts.values())
  free, group = np.zeros((3, len(mixes), rows), np.int64), np.zeros((len(mixes), rows), np.int64)
  price = np.zeros((len(mixes), micros, 2), np.int64)
  for i, mix in enumerate(mixes):
    capacity, of = layouts[mix]
    free[:, i, : len(of)], group[i, : len(of)], price[i, : len(mix)] = (
      capacity.T,
      of,
      prices[list(mix)],
    )
  load = np.zeros((len(mixes), micros * groups), np.int64)
  places = np.full(needs.shape[:2], -1)
  for j in range(needs.shape[1]):
    need = needs[:, j].T
    ok = np.all(free >= need[..., None], 0)
    # Several row groups wait for the one with most attention; a single one is best filled where
    # least is left.
    score = np.take_along_axis(load, group, 1) if groups > 1 else free[1]
    row = np.where(ok, score, NEVER).argmin(1)
    put = np.flatnonzero((need[0] > 0) & ok[steps, row])
    row = row[put]
    free[:, put, row] -= need[:, put]
    load[put, group[put, row]] += attention[put, j]
    places[put, j] = row
  work, transfers = price[..., 0] + load.reshape(len(mixes), micros, groups).max(-1), price[..., 1]
  time = np.maximum(work, transfers) + np.minimum(work, transfers) // HIDDEN
  return time.sum(1) + np.where(places < 0, alone, 0).sum(1), places


@functools.lru_cache(1024)
def _layout(
  mix: tuple[int, ...], shapes: tuple[Shape, ...], groups: int
) -> tuple[np.ndarray, np.ndarray]:
  """Lists the rows of a combination of shapes: what each holds, int[rows, 3]; its row group, over
  all micro-batches.
  """
  free = np.concatenate([np.tile(_sizes(shapes[s]), (shapes[s].rows, 1)) for s in mix])
  group = [
    k * groups + row * groups // shapes[s].rows
    for k, s in enumerate(mix)
    for row in range(shapes[s].rows)
  ]
  return free, np.array(group)


@functools.lru_cache(1024)
def _mixes(shapes: int, most: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
  """All combinations of up to so many micro-batches: the number of each one's shape, and how many
  of each shape.
  """
  mixes = [
    mix
    for n in range(1, most + 1)
    for mix in itertools.combinations_with_replacement(range(shapes), n)
  ]
  return mixes, np.array([[mix.count(s) for s in range(shapes)] for mix in mixes])


def _parts(table: np.ndarray, ids: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
  """Sorts a step's samples, the largest first, and parts them alike where they need many
  micro-batches.
  """
  if not len(ids):
    return []
  room = _room(shapes)
  size = (table[ids] * (2**40 // np.maximum(room.max(0), 1))).max(1)
  ids = ids[np.argsort(-size, kind="stable")]
  count = -(-int(_micro_batches(table[ids].sum(0)[None], room)[0]) // TOGETHER)
  return [ids[i::count] for i in range(count)]


def _micro_batches(total: np.ndarray, room: np.ndarray) -> np.ndarray:
  """Counts the micro-batches of the one best shape that have room for each of these totals [B,
  3].
  """
  return (-(-total[:, None] // np.maximum(room, 1)[None])).max(-1).min(-1)


def _cheapest(needs: np.ndarray, shapes: Sequence[Shape], costs: MicroCosts) -> np.ndarray:
  """The number of the cheapest shape that holds each of these samples [..., 3]."""
  ok = (needs[..., None, :] <= np.array([_sizes(shape) for shape in shapes])).all(-1)
  return np.where(ok, [max(costs.price(shape)) for shape in shapes], NEVER).argmin(-1)


def _needs(lengths: Lengths) -> np.ndarray:
  """What each sample takes of a row, int64[n, 3]: one place, its frames, its text."""
  table = length_table(lengths)
  return np.stack([np.ones(len(table), np.int64), table[:, 0], table[:, 3]], 1)


def _sizes(shape: Shape) -> tuple[int, int, int]:
  return shape.samples, shape.frames, shape.text


def _room(shapes: Sequence[Shape]) -> np.ndarray:
  """What all rows of each shape hold, int64[shapes, 3]."""
  return np.array([np.multiply(_sizes(shape), shape.rows) for shape in shapes], np.int64)


def _multiple(n: int, step: int) -> int:
  return -(-n // step) * step


def _coarse(n: int, step: int) -> int:
  """The next multiple of `step` and of a power of two that is a 16th to a 32nd of n."""
  return _multiple(n, math.lcm(step, 1 << max(0, n.bit_length() - 5)))


# --- the choice of shapes
# ---------------------------------------------------------------------------------------------

# What the search multiplies a shape's (samples, frames, text) by.
MOVES = (
  *((1, Fraction(f, 16), 1) for f in (12, 14, 15, 17, 18, 20)),
  *((1, 1, Fraction(*t)) for t in ((1, 2), (3, 4), (7, 8), (8, 7), (4, 3), (2, 1))),
  *((Fraction(*s), 1, 1) for s in ((2, 3), (3, 2))),
  *((Fraction(*a), Fraction(*a), Fraction(*a)) for a in ((1, 2), (3, 4), (4, 3))),
)
# Frames of the first shapes beside the largest, in 20ths of what a row group's share of a step
# takes.
STARTS = ((28, 21, 14), (28, 14, 7), (28, 24, 20), (14, 7, 4))


def average(
  lengths: Lengths,
  batch_size: int,
  shapes: Sequence[Shape],
  costs: MicroCosts,
  sampled: int = SAMPLED,
) -> int:
  """Picoseconds of the micro-batches of an average step, from steps of so many random samples."""
  table, count = _needs(lengths), max(8, sampled // batch_size)
  steps = np.resize(
    np.argsort(np.random.PCG64(SEED).random_raw(len(table)), kind="stable"), (count, batch_size)
  )
  parts = [part for ids in steps for part in _parts(table, ids, shapes)]
  time, _, _ = _fastest(table, parts, shapes, costs)
  return sum(time.tolist()) // count  # of Python's numbers, which have no largest


def choose_shapes(
  lengths: Lengths,
  batch_size: int,
  room: ShapeRoom,
  costs: MicroCosts,
  sweeps: int = 4,
  start: tuple[Shape, ...] = (),
  sampled: int = SAMPLED,
  moves: Sequence[Sequence[int | Fraction]] = MOVES,
) -> tuple[tuple[Shape, ...], int]:
  """Chooses at most MOST shapes for data of these lengths: all samples fit, and some random steps
  are packed fastest.

  Args:
    lengths: of all samples.
    batch_size: samples of a step.
    room: what shapes may be.
    costs: of these samples, on the mesh that `room` is of.
    sweeps: of a search that changes one shape at a time.
    start: shapes that it begins with, of the same room; none: some in proportion to the data.
    sampled: random samples that decide.
    moves: what the search multiplies a shape's (samples, frames, text) by.

  Returns:
    shapes, and picoseconds of the micro-batches of an average step with them.
  """
  table = _needs(lengths)
  n, total, largest = len(table), table.sum(0).tolist(), table.max(0).tolist()
  corners = _corners(table)
  # No row group needs more text than twice its share of a step; where links decide, nothing else
  # would bound it.
  share, places = total[2] * batch_size // (n * room.groups), min(batch_size, room.samples)
  room = dataclasses.replace(room, text=min(room.text, max(largest[2], 2 * share)))

  @functools.cache
  def time(shapes: tuple[Shape, ...]) -> int:
    return (
      average(lengths, batch_size, shapes, costs, sampled) if _fit(corners, shapes).all() else NEVER
    )

  def usual(frames: int) -> Shape:
    """With places and text in proportion to the frames, and something to spare."""
    # samples
    share = Fraction(frames * n, total[1]) if total[1] else Fraction(batch_size, room.groups)
    text = (share + 1) * total[2] * 3 / (2 * n)
    return room.shape(min(places, 4 + math.ceil(share * 3 / 2)), frames, math.ceil(text))

  per_group = total[1] * batch_size // (n * room.groups)
  shape = usual(largest[1])
  first = room.shape(shape.samples, largest[1], max(largest[2], shape.text))
  best = start or min(
    (_set(first, *(usual(per_group * part // 20) for part in parts)) for parts in STARTS),
    key=time,
  )

  def moved(shape: Shape) -> list[Shape]:
    return [
      room.shape(min(samples, places), frames, text)
      for samples, frames, text in (
        (max(1, int(size * by)) for size, by in zip(_sizes(shape), move)) for move in moves
      )
    ]

  def without(shape: Shape) -> tuple[Shape, ...]:
    return tuple(other for other in best if other != shape)

  for _ in range(sweeps):
    before = time(best)
    for shape in best:
      for new in moved(shape):
        if time(changed := _set(new, *without(shape))) < time(best):
          best, shape = changed, new
    # The shape that is missed least gives way to one like another.
    kept = best if len(best) < MOST else min(map(without, best), key=time)
    best = min((best, *(_set(new, *kept) for shape in kept for new in moved(shape))), key=time)
    if time(best) > before * 199 // 200:
      break
  return best, time(best)


def _set(*shapes: Shape) -> tuple[Shape, ...]:
  return tuple(sorted(set(shapes)))


def _corners(table: np.ndarray) -> np.ndarray:
  """The samples that decide whether all fit: no other has as many frames and as much text."""
  found: list[np.ndarray] = []
  for sample in np.unique(table, axis=0)[::-1]:  # frames descend
    if not found or sample[2] > found[-1][2]:
      found.append(sample)
  return np.array(found)


def named_shapes(given: Sequence[Sequence[int]], room: ShapeRoom) -> tuple[Shape, ...]:
  """Makes the shapes that a config names as (rows, samples, frames, text).

  Raises:
    ConfigError: shapes that the mesh can't split evenly.
  """
  problems = (
    [f"there are {len(given)}, and a run compiles at most {MOST}"] if len(given) > MOST else []
  )
  shapes = []
  for sizes in given:
    where = f"{tuple(sizes)}"
    if len(sizes) != 4 or min(sizes) < 1:
      problems.append(f"{where}: must be (rows, samples, frames, text), each at least 1")
      continue
    rows, samples, frames, text = sizes
    slots = samples * room.prefix + text
    checks = (
      (
        samples > room.samples == 1,
        'lp_comp.keep = "attention" keeps other places in each sample, so a row can hold only one',
      ),
      (rows % room.groups, f"{rows} rows can't be split over data x fsdp = {room.groups}"),
      (
        frames % room.step,
        f"{frames} frames can't be split over context = {room.parts}; it takes a multiple of "
        f"{room.step}",
      ),
      (
        slots % room.parts,
        f"the {slots} token slots beside visual ones ({samples} x {room.prefix} + {text}) can't "
        f"be split over context = {room.parts}",
      ),
    )
    problems += [f"{where}: {problem}" for wrong, problem in checks if wrong]
    shapes.append(Shape(rows=rows, samples=samples, prefix=room.prefix, frames=frames, text=text))
  refuse("config.data.shapes can't be", problems)
  return _set(*shapes)


def check_fit(lengths: Lengths, prefix: int, shapes: Sequence[Shape] | None = None) -> None:
  """Refuses samples that fit no shape.

  Raises:
    ConfigError: samples that fit none of `shapes` (None: that are still to be chosen, for the
      data), or that have more tokens before the visual slot than there are slots.
  """
  table = length_table(lengths)
  refuse(
    f"the data does not fit config.data.prefix_length = {prefix}; make it "
    f"{table[:, 2].max(initial=0)}",
    [
      f"sample {i} has {table[i, 2]} tokens before the visual slot"
      for i in np.flatnonzero(table[:, 2] > prefix)
    ],
  )
  if shapes is not None:
    held = " or ".join(f"{shape.frames:,} frames with {shape.text:,} tokens" for shape in shapes)
    refuse(
      f"the data does not fit rows of {held} after the visual slot; name one in "
      f"config.data.shapes that holds the most, {table[:, 0].max(initial=0):,} and "
      f"{table[:, 3].max(initial=0):,}, or None to have them chosen",
      [
        f"sample {i} has {table[i, 0]:,} frames and {table[i, 3]:,} tokens"
        for i in np.flatnonzero(~_fit(_needs(lengths), shapes))
      ],
    )


def fits(lengths: Lengths, shapes: Sequence[Shape]) -> bool:
  """Whether each sample fits a shape."""
  return bool(_fit(_needs(lengths), shapes).all())


def _fit(needs: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
  """Which of these samples [n, 3] fit a shape, bool[n]."""
  return np.any(np.all(needs[:, None] <= np.array([_sizes(shape) for shape in shapes]), -1), 1)


def refuse(what: str, problems: Sequence[str]) -> None:
  """Raises a ConfigError with the first problems, if there are any."""
  if problems:
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise ConfigError(f"{what}: " + "; ".join(problems[:5]) + more, where=what, problems=problems)
