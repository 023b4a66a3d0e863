"""data/batch.py: packing into rows moves nothing and adds nothing."""

import dataclasses

import jax
import numpy as np
import pytest
from refused import refused

from xcomp_jax.data.batch import (
  IGNORE,
  IMAGE_TOKEN,
  BatchError,
  Example,
  Shape,
  batch_spec,
  collate,
  fake_batch,
)

pytestmark = pytest.mark.pure

SHAPE = Shape(rows=2, samples=2, prefix=4, frames=6, text=9)


def example(frames=4, prefix=3, text=5, index=7, dtype=np.float32) -> Example:
  rng = np.random.default_rng(index)
  tokens = np.arange(100, 100 + prefix + (frames > 0) + text, dtype=np.int32) + index
  if frames:
    tokens[prefix] = IMAGE_TOKEN
  labels = np.where(
    (np.arange(len(tokens)) % 2 == 0) & (tokens != IMAGE_TOKEN), tokens, IGNORE
  ).astype(np.int32)
  query = np.arange(len(tokens)) == len(tokens) - 2
  return Example(
    frames=frames,
    visual=rng.normal(size=(frames, 2, 3)).astype(dtype),
    tokens=tokens,
    labels=labels,
    query=query,
    index=index,
  )


def test_layout_of_a_row_of_two_samples():
  one, two = example(), example(frames=1, prefix=2, text=3, index=1)
  batch = collate([[one, two]], SHAPE)
  np.testing.assert_array_equal(batch.visual[0, :5], np.concatenate([one.visual, two.visual]))
  assert not batch.visual[0, 5:].any() and not batch.visual[1].any()
  assert batch.frames.tolist() == [[4, 1], [0, 0]]
  assert batch.prefix[0].tolist() == [[107, 108, 109, 0], [101, 102, 0, 0]] and batch.prefix_length[
    0
  ].tolist() == [3, 2]
  assert batch.text[0].tolist() == [
    111,
    112,
    113,
    114,
    115,
    104,
    105,
    106,
    0,
  ] and batch.text_length[0].tolist() == [5, 3]
  assert IMAGE_TOKEN not in batch.prefix and IMAGE_TOKEN not in batch.text
  assert batch.weight.tolist() == [[1, 1], [0, 0]] and batch.index.tolist() == [[7, 1], [-1, -1]]
  assert np.flatnonzero(batch.query[0]).tolist() == [3, 6]


def test_targets_are_the_next_labels_and_the_last_visual_token_predicts_the_first_of_the_text():
  batch = collate([[example(), example(frames=1, prefix=2, text=3, index=1)]], SHAPE)
  # Labels are the tokens at even places: 107 _ 109 | image | 111 _ 113 _ 115, and 101 _ | image | _
  # 105 _
  prefix, visual, text = np.split(batch.targets[0], [8, 10])
  # the token before the slot has none to predict
  assert prefix.tolist() == [IGNORE, 109, IGNORE, IGNORE] + [IGNORE] * 4
  assert visual.tolist() == [111, IGNORE]
  assert text.tolist() == [IGNORE, 113, IGNORE, 115, IGNORE, 105, IGNORE, IGNORE, IGNORE]


def test_every_supervised_token_but_the_first_is_a_target_exactly_once():
  for e in (example(), example(frames=0, prefix=0, text=6), example(frames=6, prefix=4, text=1)):
    got = collate([[e]], SHAPE).targets
    assert sorted(got[got != IGNORE].tolist()) == sorted(
      e.labels[1:][e.labels[1:] != IGNORE].tolist()
    )


def test_text_alone_lies_after_the_empty_slot():
  e = example(frames=0, prefix=0, text=5)
  batch = collate([[e]], Shape(rows=1, samples=1, prefix=4, frames=0, text=6))
  assert (
    batch.visual.shape == (1, 0, 2, 3)
    and batch.frames[0, 0] == 0
    and batch.prefix_length[0, 0] == 0
  )
  assert batch.text[0].tolist() == [*e.tokens.tolist(), 0]
  assert batch.targets[0].tolist() == [IGNORE] * 5 + [*e.labels[1:].tolist(), IGNORE, IGNORE]


def test_visual_tokens_may_come_later():
  e = dataclasses.replace(example(), visual=None)
  batch = collate([[e]], SHAPE)
  assert batch.visual is None and batch.frames[0, 0] == 4
  given = collate([[e]], SHAPE, ((2, 3), np.float16)).visual
  assert given.shape == (2, 6, 2, 3) and given.dtype == np.float16 and not given.any()


@pytest.mark.parametrize(
  ("bad", "fields"),
  [
    (example(frames=5), {"held": (5, 3, 5), "taken": (2, 2)}),
    (example(prefix=5), {"held": (4, 5, 5), "taken": (2, 2)}),
    (example(text=8), {"held": (4, 3, 8), "taken": (2, 2)}),
    (dataclasses.replace(example(), frames=0, visual=None), {"slots": 1, "frames": 0}),
    (dataclasses.replace(example(frames=0), frames=4, visual=None), {"slots": 0, "frames": 4}),
    (
      example(dtype=np.float16),
      {"kinds": {((2, 3), np.dtype(np.float16)), ((2, 3), np.dtype(np.float32))}},
    ),
  ],
)
def test_what_does_not_fit_is_named(bad, fields):
  first = example(frames=2, text=2, index=1)
  sample = {} if "kinds" in fields else {"sample": bad.index}
  with refused(BatchError, **fields, **sample):
    collate([[first, bad]], SHAPE)
  with refused(BatchError, sample=1, held=(2, 3, 2), taken=(4, 4), shape=SHAPE):
    collate([[first, first, first]], SHAPE)
  with refused(BatchError, found=3, allowed=2):
    collate([[first]] * 3, SHAPE)


@pytest.mark.parametrize(
  "shape",
  [
    SHAPE,
    Shape(rows=3, samples=1, prefix=4, frames=0, text=6),
    Shape(rows=1, samples=3, prefix=4, frames=8, text=16),
  ],
)
def test_spec_and_fake_batch_have_the_shapes_of_collate(shape):
  e = example(frames=min(shape.frames, 4), prefix=3 if shape.frames else 0)
  spec = batch_spec(shape, ((2, 3), np.float32))

  def kind(x):
    return (tuple(x.shape), np.dtype(x.dtype))

  assert jax.tree.map(kind, collate([[e]], shape)) == jax.tree.map(kind, spec)
  fake = fake_batch(spec, 50)
  assert jax.tree.map(kind, fake) == jax.tree.map(kind, spec)
  assert fake.text.max() < 50 and (fake.weight == 1).all()
  assert (fake.frames.sum(1) == shape.frames).all() and (
    fake.text_length.sum(1) == shape.text
  ).all()
