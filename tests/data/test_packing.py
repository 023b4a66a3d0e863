"""Packing: every sample once, within the shapes, the same everywhere."""

import dataclasses
import itertools

import numpy as np
import pytest
from lengths import mixture
from refused import refused

from xcomp_jax.config import ConfigError
from xcomp_jax.data import packing
from xcomp_jax.data.batch import Length, Shape
from xcomp_jax.data.packing import ShapeRoom

pytestmark = pytest.mark.pure


@dataclasses.dataclass(frozen=True)
class Slots:
  """Costs of slots alone: a frame as 8 text tokens, transfers as so many."""

  groups: int
  attention: np.ndarray
  transfers: int = 3000

  def price(self, shape):
    return (
      shape.rows // self.groups * (shape.samples * shape.prefix + 8 * shape.frames + shape.text),
      self.transfers,
    )


def costs(lengths, groups: int = 2) -> Slots:
  return Slots(groups, lengths[:, 0] ** 2 // 500)


SHAPES = (
  Shape(rows=2, samples=3, prefix=16, frames=1024, text=3200),
  Shape(rows=2, samples=8, prefix=16, frames=512, text=1500),
  Shape(rows=4, samples=12, prefix=16, frames=1024, text=1500),
)
ROOM = ShapeRoom(groups=2, parts=4, step=4, samples=32, prefix=16, frames=4096, text=32768)


def batches(n: int, size: int, seed: int = 0) -> list[list[int]]:
  return np.random.default_rng(seed).permutation(n)[: n // size * size].reshape(-1, size).tolist()


def check(lengths, ids, micros, shapes) -> None:
  assert sorted(i for m in micros for row in m.rows for i in row) == sorted(ids)
  for micro in micros:
    assert micro.shape in shapes and len(micro.rows) == micro.shape.rows and any(micro.rows)
    for row in micro.rows:
      held = lengths[list(row)]
      assert len(row) <= micro.shape.samples
      assert held[:, 0].sum() <= micro.shape.frames and held[:, 3].sum() <= micro.shape.text


@pytest.mark.parametrize("size", [1, 7, 32, 300])
def test_every_sample_has_one_place_within_the_shapes(size):
  lengths = mixture(600)
  steps = [*batches(600, size)[:20], []]
  packed = packing.pack_steps(lengths, steps, SHAPES, costs(lengths))
  for ids, micros in zip(steps, packed, strict=True):
    check(lengths, ids, micros, SHAPES)
  assert packed[-1] == []


def test_a_step_is_packed_the_same_alone_and_among_others():
  lengths = mixture(600)
  steps = batches(600, 32)
  together = packing.pack_steps(lengths, steps, SHAPES, costs(lengths))
  assert together == packing.pack_steps(lengths, steps, SHAPES[::-1], costs(lengths))
  as_samples = [Length(*map(int, row)) for row in lengths]
  assert together == [
    packing.pack_steps(as_samples, [ids], SHAPES, costs(lengths))[0] for ids in steps
  ]
  among_larger = packing.pack_steps(lengths, [*steps, range(600)], SHAPES, costs(lengths))
  assert together == among_larger[:-1]


def test_samples_that_fit_one_shape_only_get_it():
  lengths = np.array([[1024, 8, 14, 3200]] * 5 + [[1, 1, 14, 30]] * 5 + [[0, 1, 0, 1500]] * 2)
  for shapes in (SHAPES, SHAPES[:1]):
    check(
      lengths,
      range(12),
      packing.pack_steps(lengths, [range(12)], shapes, costs(lengths))[0],
      shapes,
    )


def test_the_load_of_row_groups_is_evened_out():
  lengths = np.array([[512, 8, 14, 30]] * 2 + [[128, 8, 14, 30]] * 4)
  (micro,) = packing.pack_steps(
    lengths,
    [range(6)],
    [Shape(rows=2, samples=6, prefix=16, frames=1024, text=500)],
    costs(lengths),
  )[0]
  assert [sorted(lengths[list(row), 0]) for row in micro.rows] == [[128, 128, 512]] * 2


def test_transfers_decide_how_many_micro_batches_there_are():
  lengths, shapes = (
    np.array([[96, 8, 14, 30]] * 6),
    (
      Shape(rows=1, samples=2, prefix=16, frames=200, text=80),
      Shape(rows=1, samples=8, prefix=16, frames=1000, text=400),
    ),
  )
  counts = []
  for transfers in (0, 10_000):
    prices = Slots(1, np.zeros(6, np.int64), transfers)
    counts.append(len(packing.pack_steps(lengths, [range(6)], shapes, prices)[0]))
  assert counts == [3, 1]


def test_chosen_shapes_hold_all_samples_and_waste_little():
  lengths = mixture(1800)
  few = dict(sampled=256, moves=packing.MOVES[1::2])  # quicker
  shapes, time = packing.choose_shapes(lengths, 32, ROOM, costs(lengths), **few)
  assert 1 <= len(shapes) <= packing.MOST and packing.fits(lengths, shapes)
  assert (shapes, time) == packing.choose_shapes(lengths, 32, ROOM, costs(lengths), **few)
  for shape in shapes:
    assert shape.rows == 2 and shape.frames % 4 == 0 and (shape.samples * 16 + shape.text) % 4 == 0
    assert shape.frames <= ROOM.frames and shape.text <= ROOM.text
  steps = batches(1800, 32)
  packed = packing.pack_steps(lengths, steps, shapes, costs(lengths))
  for ids, micros in zip(steps, packed):
    check(lengths, ids, micros, shapes)
  slots = sum(costs(lengths).price(m.shape)[0] for micros in packed for m in micros) * 2
  assert (8 * lengths[:, 0] + 14 + lengths[:, 3]).sum() * len(steps) * 32 / 1800 > 0.8 * slots


@pytest.mark.parametrize("kind", ["text", "images", "one"])
def test_data_of_one_kind_has_shapes_too(kind):
  lengths = mixture(64)
  lengths[:, :3] = {"text": (0, 1, 0), "images": (1, 1, 14), "one": (1024, 8, 14)}[kind]
  room = dataclasses.replace(ROOM, frames=1024)
  shapes, _ = packing.choose_shapes(lengths, 8, room, costs(lengths), sweeps=1)
  assert packing.fits(lengths, shapes)
  check(
    lengths,
    range(64),
    packing.pack_steps(lengths, [range(64)], shapes, costs(lengths))[0],
    shapes,
  )


def test_shapes_of_a_config():
  # larger than those that are chosen may be
  assert packing.named_shapes([(4, 8, 1024, 512), (2, 1, 8192, 64)], ROOM) == (
    Shape(rows=2, samples=1, prefix=16, frames=8192, text=64),
    Shape(rows=4, samples=8, prefix=16, frames=1024, text=512),
  )
  for sizes, problem in (
    ((3, 8, 1024, 512), "3 rows can't be split over data x fsdp = 2"),
    ((2, 8, 1022, 512), "1022 frames can't be split over context = 4; it takes a multiple of 4"),
    (
      (2, 8, 1024, 510),
      "the 638 token slots beside visual ones (8 x 16 + 510) can't be split over context = 4",
    ),
    ((0, 8, 1024, 512), "must be (rows, samples, frames, text), each at least 1"),
  ):
    with refused(ConfigError, problems=[f"{sizes}: {problem}"]):
      packing.named_shapes([sizes], ROOM)
  with refused(ConfigError) as caught:
    packing.named_shapes([(2, 2, 1024, 512)], dataclasses.replace(ROOM, samples=1))
  (problem,) = caught.value.fields["problems"]
  assert problem.endswith("so a row can hold only one")
  with refused(ConfigError, problems=["there are 5, and a run compiles at most 4"]):
    packing.named_shapes([(2, n, 1024, 512) for n in range(4, 24, 4)], ROOM)


def test_rows_of_one_sample_where_each_keeps_other_places():
  lengths = mixture(64)
  shapes, _ = packing.choose_shapes(
    lengths, 8, dataclasses.replace(ROOM, samples=1), costs(lengths), sweeps=1
  )
  assert {shape.samples for shape in shapes} == {1}
  micros = packing.pack_steps(lengths, [range(16)], shapes, costs(lengths))[0]
  assert all(len(row) <= 1 for micro in micros for row in micro.rows)


def test_samples_that_fit_nothing_are_named():
  lengths = mixture(20)
  lengths[3, 3], lengths[7, 2] = 5000, 20
  lengths[10:18, 3] = 4000
  with refused(
    ConfigError,
    where="the data does not fit config.data.prefix_length = 16; make it 20",
    problems=["sample 7 has 20 tokens before the visual slot"],
  ):
    packing.check_fit(lengths, 16)
  lengths[7, 2] = 14
  with pytest.raises(
    ConfigError,
    match=(
      r"1,024 frames with 3,200 .* the most, [\d,]+ and 5,000, or .*: sample 3 has .* 5,000 "
      r"tokens; .*; and \d more"
    ),
  ):
    packing.check_fit(lengths, 16, SHAPES)


def test_the_release_orders_samples_only_within_a_step():
  """FACTS.md 14: the sampler's megabatch is world size x accumulation samples of batch one, a
  step.
  """
  rng, size = np.random.default_rng(0), 32
  lengths = mixture(3200)
  kind, total = lengths[:, 1] > 1, lengths[:, 0] + lengths[:, 3]
  # The rule: a random order is cut into megabatches, each is sorted by length, and each worker
  # takes its share.
  shuffled = rng.permutation(3200)
  mega = [shuffled[i : i + size] for i in range(0, 3200, size)]
  release = [sorted(ids, key=lambda i: -total[i]) for ids in mega]
  ours = batches(3200, size, seed=1)
  for steps in (release, ours):
    assert sorted(itertools.chain(*steps)) == list(range(3200))
    # Steps are random: images in each are binomial, and neither length nor kind goes with the
    # step's number.
    images = np.array([size - kind[step].sum() for step in steps])
    assert (images > 0).mean() > 0.95  # so that most steps mix both kinds
    assert 0.5 < images.var() / (size * kind.mean() * (1 - kind.mean())) < 2
    means = np.array([total[step].mean() for step in steps])
    assert 0.5 < means.var() / (total.var() / size) < 2
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.35


def test_every_move_of_the_search_changes_a_shape():
  assert (1, 1, 1) not in packing.MOVES and len(set(packing.MOVES)) == len(packing.MOVES)
