"""data/blend.py: what an epoch reads of several stores, in the weights that were asked for."""

import collections
import dataclasses

import ml_dtypes
import numpy as np
import pytest
from refused import refused

from xcomp_jax.config import ConfigError
from xcomp_jax.data import blend as blends
from xcomp_jax.data import pipeline, prompt
from xcomp_jax.data.batch import Shape
from xcomp_jax.data.blend import Blend
from xcomp_jax.data.packing import Micro
from xcomp_jax.data.store import Features, StoredSample, open_store
from xcomp_jax.data.store_writing import write_store

SIZE, CLIP = 8, 4
FEATURES = Features("0123456789abcdef", 16, 32)


def write(path, count, value, size=SIZE, features=None):
  """A store of `count` videos of one clip, every number of which is `value`."""
  talk = ({"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"})
  shape, dtype = (
    ((1, CLIP, size, size, 3), np.uint8)
    if features is None
    else ((1, CLIP * 16, 32), ml_dtypes.bfloat16)
  )
  items = [
    (
      StoredSample(
        id=f"{path.name}{i}",
        source="",
        annotation="a.json",
        position=i,
        conversations=talk,
        time_message=" ",
      ),
      np.full(shape, value, dtype),
    )
    for i in range(count)
  ]
  write_store(path, items, image_size=size, clip_frames=CLIP, features=features)
  return open_store(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  root = tmp_path_factory.mktemp("blend")
  return [
    write(root / name, count, value)
    for name, count, value in (("a", 10, 1), ("b", 8, 2), ("c", 3, 3))
  ]


def test_the_samples_of_all_stores_stand_one_behind_the_other(stores):
  blend = Blend(stores)
  assert len(blend) == 21 and [s.id for s in blend.samples][8:12] == ["a8", "a9", "b0", "b1"]
  for index, (store, place, value) in {
    0: (0, 0, 1),
    9: (0, 9, 1),
    10: (1, 0, 2),
    18: (2, 0, 3),
    20: (2, 2, 3),
  }.items():
    assert blend.find(index) == (stores[store], place)
    assert (blend.visual(index) == value).all() and blend.visual(index).shape == (
      1,
      CLIP,
      SIZE,
      SIZE,
      3,
    )
  assert blend.clip_spec(CLIP) == ((CLIP, SIZE, SIZE, 3), np.uint8)


def test_without_weights_an_epoch_reads_everything_once(stores):
  blend = Blend(stores)
  assert all(blend.epoch(seed, epoch) == list(range(21)) for seed in (0, 1) for epoch in (0, 1))


def test_an_epoch_reads_each_store_as_often_as_its_weight_says(stores):
  blend = Blend(stores, (1.0, 0.25, 2.0))

  epochs = [blend.epoch(7, epoch) for epoch in range(4)]
  for ids in epochs:
    assert len(ids) == 18 and ids == sorted(ids) and ids[:10] == list(range(10))
    assert collections.Counter(ids[12:]) == {18: 2, 19: 2, 20: 2}
  quarters = [ids[10:12] for ids in epochs]
  # all of it in four epochs
  assert sorted(i for quarter in quarters for i in quarter) == list(range(10, 18))
  assert len({tuple(quarter) for quarter in quarters}) == 4
  assert Blend(stores, (1.0, 0.25, 2.0)).epoch(7, 2) == epochs[2]  # of seed and epoch alone
  assert [blend.epoch(8, epoch)[10:12] for epoch in range(4)] != quarters


def test_a_weight_between_one_and_two_goes_on_where_it_stopped(stores):
  blend = Blend(stores[2:], (1.5,))  # 4.5, so 5 of 3 samples
  seen = collections.Counter()
  for epoch in range(6):
    ids = blend.epoch(0, epoch)
    assert len(ids) == 5 and set(ids) == {0, 1, 2}
    seen.update(ids)
    assert max(seen.values()) - min(seen.values()) <= 1
  assert set(seen.values()) == {10}


def test_draws_are_pinned(stores):
  # A resumed run must draw the same after an upgrade of anything: these numbers may never change.
  blend = Blend(stores[:2], (0.5, 0.25))
  assert [blend.epoch(3, epoch) for epoch in range(2)] == [
    [1, 2, 5, 7, 9, 11, 16],
    [0, 3, 4, 6, 8, 10, 14],
  ]


def test_training_reads_the_blend(stores, reference):
  tokenizer = prompt.load_tokenizer(reference / "qwen_subset")
  blend = Blend(stores, (0.5, 1.0, 2.0))
  cfg = pipeline.DataConfig(
    train="",
    weights=None,
    heldout=None,
    shapes=None,
    prefix_length=16,
    frames_per_device=16,
    text_per_device=448,
    mask="official",
    threads=2,
    prefetch=2,
  )
  shape = Shape(rows=6, samples=1, prefix=16, frames=4, text=64)
  plan = [[Micro(shape, tuple((i,) for i in step))] for step in blends.run_order(blend, 6, 0, 2)]
  assert len(plan) == 2 * (19 // 6)
  order = []
  share = pipeline.ProcessShare(rows=(0,), groups=1, devices=1, mine=(0,), clips=4, trained=True)
  for item in pipeline.read_steps(
    blend, tokenizer, cfg, blends.measure_lengths(blend, tokenizer, cfg.mask), plan, share
  ):
    for index, frames in zip(item.batch.index[:, 0].tolist(), item.clips[0].frames):
      order.append(index)
      assert (frames == (1 if index < 10 else 2 if index < 18 else 3)).all()
  drawn = [collections.Counter(blend.epoch(0, epoch)) for epoch in range(2)]
  assert (
    not collections.Counter(order[:18]) - drawn[0]
    and not collections.Counter(order[18:]) - drawn[1]
  )
  lines = blend.made_with()
  assert [line.rsplit("; ", 1)[1] for line in lines] == [
    f"an epoch reads {n} samples" for n in ("5 of 10", "8 of 8", "6 of 3")
  ]
  with refused(ConfigError, where="config.train.batch_size", value=20, found=19):
    blends.run_order(blend, 20, 0, 1)


@pytest.mark.parametrize(
  "weights, fields",
  [
    ((1.0,), {"found": 1, "expected": 3}),
    ((1.0, 0.0, 1.0), {"value": (1.0, 0.0, 1.0)}),
    ((1.0, float("nan"), 1.0), {}),
    ((1.0, float("inf"), 1.0), {"value": (1.0, float("inf"), 1.0)}),
    ((1.0, 1.0, 0.1), {"value": 0.1}),
  ],
)
def test_weights_that_cannot_be_are_said(stores, weights, fields):
  with refused(ConfigError, where="config.data.weights", **fields) as caught:
    Blend(stores, weights)
  little = stores[2].path if weights[-1] == 0.1 else None
  assert caught.value.fields.get("store") == little


def test_stores_of_different_kinds_are_refused(stores, tmp_path):
  with refused(ConfigError, where="config.data.train", kinds=None):
    Blend([])
  large = write(tmp_path / "large", 1, 0, size=16)
  kinds = tuple(f"frames of {size} pixels in clips of 4" for size in (8, 16))
  with refused(ConfigError, stores=(stores[0].path, large.path), kinds=kinds):
    Blend([stores[0], large])
  features = write(tmp_path / "features", 1, 0, features=FEATURES)
  with refused(ConfigError, stores=(stores[0].path, features.path)) as caught:
    Blend([stores[0], features])
  assert caught.value.fields["kinds"][1] == (
    "features (16 tokens of 32 numbers a frame, by tower 0123456789abcdef) of frames of 8 pixels "
    "in clips of 4"
  )
  other = write(
    tmp_path / "other", 1, 0, features=dataclasses.replace(FEATURES, identity="fedcba9876543210")
  )
  with refused(ConfigError, where="config.data.train", stores=(features.path, other.path)):
    Blend([features, other])
  blend = Blend([features, write(tmp_path / "same", 2, 1, features=FEATURES)])
  assert blend.features == FEATURES and blend.visual(2).dtype == ml_dtypes.bfloat16
  assert blend.clip_spec(1) == ((16, 32), ml_dtypes.bfloat16)


def test_identity_names_every_store_in_order(stores):
  a, b = stores[:2]
  assert Blend([a, b]).identity() == f"{a.identity()}, {b.identity()}" != Blend([b, a]).identity()
