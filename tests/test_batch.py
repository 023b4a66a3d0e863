"""data/batch.py: padding into a bucket moves nothing and adds nothing."""

import jax
import numpy as np
import pytest

from xcomp_jax.data.batch import (
  IGNORE,
  IMAGE_TOKEN,
  Bucket,
  Example,
  batch_spec,
  collate,
  fake_batch,
)

BUCKET = Bucket(clips=3, clip_frames=2, prefix=4, text=6)
CLIP = (2, 4, 4, 3)


def example(clips=2, prefix=3, text=5, index=7, dtype=np.uint8) -> Example:
  rng = np.random.default_rng(index)
  tokens = np.arange(100, 100 + prefix + (clips > 0) + text, dtype=np.int32) + index
  if clips:
    tokens[prefix] = IMAGE_TOKEN
  labels = np.where((np.arange(len(tokens)) % 2 == 0) & (tokens != IMAGE_TOKEN), tokens, IGNORE).astype(np.int32)
  query = np.arange(len(tokens)) == len(tokens) - 2
  return Example(rng.integers(1, 255, (clips, *CLIP)).astype(dtype), tokens, labels, query, index)


def test_layout_of_a_padded_row():
  e = example()
  batch = collate([e], BUCKET, 2)
  np.testing.assert_array_equal(batch.visual[0, :2], e.visual)
  assert not batch.visual[0, 2].any() and batch.visual.dtype == np.uint8
  assert (batch.clips[0], batch.prefix_length[0], batch.text_length[0]) == (2, 3, 5)
  assert batch.prefix[0].tolist() == [107, 108, 109, 0]
  assert batch.text[0].tolist() == [111, 112, 113, 114, 115, 0]
  assert IMAGE_TOKEN not in batch.prefix and IMAGE_TOKEN not in batch.text


def test_targets_are_the_next_labels_and_the_last_visual_row_predicts_the_first_text_token():
  batch = collate([example()], BUCKET)  # labels: 107 _ 109 | image | 111 _ 113 _ 115 at even places: 0 2 4 6 8
  prefix, visual, text = np.split(batch.targets[0], [4, 5])
  assert prefix.tolist() == [IGNORE, 109, IGNORE, IGNORE]  # the token before the slot has no token to predict
  assert visual.tolist() == [111]
  assert text.tolist() == [IGNORE, 113, IGNORE, 115, IGNORE, IGNORE]
  assert np.flatnonzero(batch.query[0]).tolist() == [3]


def test_every_supervised_token_but_the_first_is_a_target_exactly_once():
  for e in (example(), example(clips=0, prefix=0, text=6), example(clips=3, prefix=4, text=1)):
    got = collate([e], BUCKET).targets
    assert sorted(got[got != IGNORE].tolist()) == sorted(e.labels[1:][e.labels[1:] != IGNORE].tolist())


def test_text_alone_lies_after_the_empty_slot():
  e = example(clips=0, prefix=0, text=5)
  batch = collate([e], Bucket(0, 1, 4, 6))
  assert batch.visual.shape == (1, 0, *CLIP) and batch.clips[0] == 0 and batch.prefix_length[0] == 0
  assert batch.text[0].tolist() == [*e.tokens.tolist(), 0]
  assert batch.targets[0].tolist() == [IGNORE] * 5 + [*e.labels[1:].tolist(), IGNORE, IGNORE]


def test_missing_rows_have_no_weight():
  batch = collate([example(index=7), example(index=9)], BUCKET, 4)
  assert batch.weight.tolist() == [1, 1, 0, 0] and batch.index.tolist() == [7, 9, -1, -1]
  assert (batch.targets[2:] == IGNORE).all() and not batch.query[2:].any() and not batch.clips[2:].any()


def test_features_in_place_of_frames():
  features = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float16)
  e = Example(features, *(getattr(example(), k) for k in ("tokens", "labels", "query")), index=1)
  batch = collate([e], BUCKET)
  assert batch.visual.shape == (1, 3, 5, 8) and batch.visual.dtype == np.float16
  np.testing.assert_array_equal(batch.visual[0, :2], features)


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (example(clips=4), "does not fit"),
    (example(prefix=5), "5 tokens before"),
    (example(text=7), "7 after"),
    (Example(np.zeros((0, *CLIP), np.uint8), *(getattr(example(), k) for k in ("tokens", "labels", "query")), 7), "slots"),
    (Example(example().visual, *(getattr(example(clips=0), k) for k in ("tokens", "labels", "query")), 7), "slots"),
    (example(dtype=np.float32), "beside uint8"),
  ],
)
def test_what_does_not_fit_is_named(bad, message):
  with pytest.raises(ValueError, match=message):
    collate([example(index=1), bad], BUCKET)


@pytest.mark.parametrize(("count", "size"), [(0, None), (0, 2), (3, 2)])
def test_too_few_or_too_many_rows(count, size):
  with pytest.raises(ValueError, match="examples for a batch"):
    collate([example()] * count, BUCKET, size)


@pytest.mark.parametrize("bucket", [BUCKET, Bucket(1, 1, 4, 6), Bucket(0, 1, 4, 6)])
def test_spec_and_fake_batch_have_the_shapes_of_collate(bucket):
  shape = (bucket.clip_frames, *CLIP[1:])
  e = example(clips=bucket.clips, prefix=0 if not bucket.clips else 3)
  e = Example(np.zeros((bucket.clips, *shape), np.uint8), e.tokens, e.labels, e.query, 0)
  spec = batch_spec(bucket, 3, (shape, np.dtype(np.uint8)))
  kind = lambda x: (tuple(x.shape), np.dtype(x.dtype))
  assert jax.tree.map(kind, collate([e], bucket, 3)) == jax.tree.map(kind, spec)
  fake = fake_batch(spec, 50)
  assert jax.tree.map(kind, fake) == jax.tree.map(kind, spec)
  assert fake.text.max() < 50 and fake.weight.tolist() == [1, 1, 1]


def test_frames_of_a_bucket():
  assert BUCKET.frames == 6 and Bucket(0, 1, 4, 6).frames == 0 and Bucket(1, 1, 4, 6).frames == 1
