import json

import jax.numpy as jnp
import numpy as np
import pytest

from xcomp_jax.config import ConfigError, LPCompConfig
from xcomp_jax.model import lp_comp

pytestmark = pytest.mark.pure


def rule(keep="suffix", schedule="cosine", group=16):
  return LPCompConfig(schedule, keep, group)


def test_cosine_is_the_released_table():  # FACTS.md 1
  runs = [
    (16, 3),
    (15, 2),
    (14, 2),
    (13, 1),
    (12, 2),
    (11, 1),
    (10, 1),
    (9, 2),
    (8, 1),
    (7, 1),
    (6, 1),
    (5, 2),
    (4, 1),
    (3, 2),
    (2, 2),
    (1, 4),
  ]
  assert lp_comp.counts(rule(), 28) == tuple(n for n, times in runs for _ in range(times))


def test_paper_ceil_is_never_below_the_released_rounding():
  ceil, released = lp_comp.counts(rule(schedule="cosine_ceil"), 28), lp_comp.counts(rule(), 28)
  assert (
    all(a - b in (0, 1) for a, b in zip(ceil, released, strict=True))
    and ceil != released
    and ceil[-1] == 1
  )


@pytest.mark.parametrize("layers,group", [(1, 16), (8, 16), (28, 4), (80, 32)])
def test_schedules_end_at_one_for_any_size(layers, group):
  counts = lp_comp.counts(rule(group=group), layers)
  assert (
    len(counts) == layers
    and counts[-1] == 1
    and counts[0] <= group
    and sorted(counts, reverse=True) == list(counts)
  )


def test_uniform_is_the_released_greedy_lists(reference):
  lists = json.loads((reference / "cosine_schedule.json").read_text())["idx_lists"]
  kept = lp_comp.survivors(rule("uniform"), 28)
  assert [[t + 1 for t in layer] for layer in kept] == lists[1:]


def test_suffix_keeps_the_last_tokens():
  assert lp_comp.survivors(rule(), 28)[20] == (13, 14, 15)


def test_stride_keeps_the_last_of_each_window():
  steps = (16,) * 2 + (4,) * 2 + (1,)
  assert lp_comp.survivors(rule("stride", steps), 5)[2:] == ((3, 7, 11, 15),) * 2 + ((15,),)


@pytest.mark.parametrize("keep", ["suffix", "uniform", "stride"])
def test_reduce_selects_places_without_arithmetic(keep):
  cfg = rule(keep)
  kept = lp_comp.survivors(cfg, 28)
  x = jnp.arange(2 * 3 * 16, dtype=jnp.float32).reshape(2, 48, 1)
  y, before = x, tuple(range(16))
  for after in kept:
    y, before = lp_comp.reduce(y, cfg, before, after), after
  one = lp_comp.reduce(x, cfg, tuple(range(16)), kept[20])
  np.testing.assert_array_equal(one, x.reshape(2, 3, 16, 1)[:, :, list(kept[20])].reshape(2, -1, 1))
  np.testing.assert_array_equal(y, x.reshape(2, 3, 16, 1)[:, :, list(kept[-1])].reshape(2, -1, 1))


@pytest.mark.parametrize(
  "n,windows",
  [
    (16, [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]),
    (5, [(0, 1), (1, 2, 3), (3, 4)]),  # 3 does not divide 5: neighbours share tokens
    (7, [(0, 1), (1, 2, 3), (3, 4, 5), (5, 6)]),
    (4, [(0, 1), (1, 2), (2, 3)]),
  ],
)
def test_avgpool_averages_windows_that_cover_the_group(n, windows):
  x = jnp.eye(n)[None]  # the mean of a window's rows names its tokens
  got = lp_comp.reduce(x, rule("avgpool"), range(n), range(len(windows)))[0]
  wanted = [[(token in window) / len(window) for token in range(n)] for window in windows]
  np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_keep_attended_keeps_order_and_breaks_ties_by_place():
  x = jnp.arange(8.0).reshape(1, 8, 1)
  score = jnp.array([[5, 1, 5, 9, 5, 0, 99, 99]], jnp.float32)
  valid = jnp.arange(8)[None] < 6
  for shift in (0, 100):  # whatever the scores are, padding comes behind
    got = lp_comp.keep_attended(x, score - shift, valid, jnp.array([3]), 4)
    # of the three fives the first two, and no padding
    np.testing.assert_array_equal(got[0, :3, 0], [0, 2, 3])
  many = jnp.arange(256.0).reshape(1, 256, 1)  # as many as a sort may reorder
  got = lp_comp.keep_attended(many, 0 * many[..., 0], many[..., 0] >= 0, jnp.array([64]), 64)
  np.testing.assert_array_equal(got[0, :, 0], np.arange(64))


def test_layers_hand_on_what_the_next_one_sees_if_a_rule_only_selects():
  first, second, last = lp_comp.layer_tokens(rule(schedule=(12, 12, 1)), 3)
  assert first.arriving == tuple(range(16)) and first.seen == first.leaving == tuple(range(4, 16))
  assert second.arriving == second.seen == tuple(range(4, 16)) and second.leaving == (15,)
  assert last.arriving == last.seen == last.leaving == (15,)


@pytest.mark.parametrize("keep", ["avgpool", "attention"])
def test_layers_finish_all_that_they_see_where_later_layers_need_it(keep):
  first, last = lp_comp.layer_tokens(rule(keep, (16, 1)), 2)
  assert first.seen == first.leaving == last.arriving == tuple(range(16))
  assert len(last.seen) == len(last.leaving) == 1


@pytest.mark.parametrize(
  "schedule, wanted",
  [
    *((wrong, {"counts": 4, "most": 16}) for wrong in ((16, 8), (16, 8, 9, 1), (17, 8, 4, 1))),
    ((16, 8, 4, 0), {"counts": 4, "most": 16}),
    ("cosin", {"allowed": ("cosine", "cosine_ceil")}),
  ],
)
def test_bad_schedules_are_refused(schedule, wanted):
  with pytest.raises(ConfigError) as caught:
    lp_comp.counts(rule(schedule=schedule), 4)
  assert caught.value.fields == {"where": "lp_comp.schedule", "value": schedule, **wanted}


def test_a_rule_that_is_not_there_is_refused():
  unknown = rule()
  object.__setattr__(unknown, "keep", "prefix")  # past what checks types in tests
  with pytest.raises(ConfigError) as caught:
    lp_comp.survivors(unknown, 28)
  assert caught.value.fields == {"where": "lp_comp.keep", "value": "prefix"}
