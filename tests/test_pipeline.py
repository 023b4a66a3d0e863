"""data/pipeline.py: the order is a function of seed and step, whatever reads it."""

import collections
import contextlib
import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest

from xcomp_jax.config import ConfigError, DataConfig
from xcomp_jax.data import pipeline, prompt
from xcomp_jax.data.batch import IGNORE, Bucket, collate
from xcomp_jax.data.blend import Blend
from xcomp_jax.data.pipeline import (
  Length,
  batches,
  evaluation,
  example,
  measure,
  order,
  plan,
  steps_per_epoch,
)
from xcomp_jax.data.store import Sample, open_store, write_store

SIZE, CLIP = 8, 4
CONFIG = DataConfig(
  train="", weights=None, heldout=None, frame_buckets=(0, 1, 8, 16), text_buckets=(32, 64), prefix_length=16, frames_per_device=16,
  text_per_device=448, mask="official", group_by_text_length=False, threads=2, prefetch=2,
)
FRAMES = (8, 1, 16, 0, 8, 12, 1, 4, 16, 8, 0, 1, 8)  # 13 samples: videos, images (1), text alone (0)


@pytest.fixture(scope="session")
def tokenizer(reference):
  return prompt.load_tokenizer(reference / "qwen_subset")


@pytest.fixture(scope="session")
def store(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "store"

  def items():
    for i, frames in enumerate(FRAMES):
      slot = "<image>\n" if frames else ""
      talk = ({"from": "human", "value": f"{slot}Q{i}?"}, {"from": "gpt", "value": "A " * (1 + i % 3 * 7)})
      per_clip = CLIP if frames > 1 else 1
      message = prompt.time_message(frames / 8, frames) if frames > 1 else ""
      visual = np.full((frames // per_clip, per_clip, SIZE, SIZE, 3), i + 1, np.uint8) if frames else None
      yield Sample(f"s{i}", "", "a.json", i, talk, message), visual

  write_store(path, items(), image_size=SIZE, clip_frames=CLIP)
  return Blend([open_store(path)])


def lengths(n: int) -> list[Length]:
  rng = np.random.default_rng(0)
  kinds = [(0, 1), (1, 1), (4, 4), (8, 4), (12, 4), (16, 4)]
  return [Length(*kinds[rng.integers(6)], 14, int(rng.integers(1, 65))) for _ in range(n)]


def equal(a, b) -> bool:
  return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)) and jax.tree.structure(a) == jax.tree.structure(b)


def steps(micro) -> list[list]:
  """Entries or micro-batches, those of a step together."""
  ends = [n for n, m in enumerate(micro, 1) if m.last]
  assert ends[-1] == len(micro)
  return [list(micro[a:b]) for a, b in zip([0, *ends], ends)]


def run(store, tokenizer, cfg=CONFIG, **changes):
  arguments = {"batch_size": 5, "rows": 2, "seed": 3, "epochs": 2} | changes
  return batches(store, tokenizer, cfg, **arguments)


@pytest.mark.parametrize("group", [False, True])
def test_every_sample_once_per_epoch(group):
  seen = [collections.Counter(i for b in order(lengths(103), range(103), 10, 7, e, group) for i in b) for e in range(3)]
  for counter in seen:
    assert len(counter) == 100 and set(counter.values()) == {1} and set(counter) <= set(range(103))
  assert order(lengths(103), range(103), 10, 7, 0, group) == order(lengths(103), range(103), 10, 7, 0, group)
  assert order(lengths(103), range(103), 10, 7, 0, group) != order(lengths(103), range(103), 10, 7, 1, group)
  assert order(lengths(103), range(103), 10, 7, 0, group) != order(lengths(103), range(103), 10, 8, 0, group)


def test_order_is_pinned():
  # A resumed run must see the same order after an upgrade of anything: these numbers may never change.
  assert order(lengths(12), range(12), 4, 0, 0, False) == [[11, 3, 2, 1], [8, 6, 0, 7], [4, 10, 5, 9]]
  assert order(lengths(12), range(12), 4, 0, 0, True) == [[0, 7, 5, 9], [11, 1, 8, 6], [3, 2, 4, 10]]


def test_grouping_by_text_length():
  several = lengths(4000)
  spread = lambda batch: np.ptp([several[i].text for i in batch])
  grouped = order(several, range(4000), 8, 1, 0, True)
  plain = order(several, range(4000), 8, 1, 0, False)
  assert np.mean([spread(b) for b in grouped]) < 0.15 * np.mean([spread(b) for b in plain])
  mixed = [b for b in grouped if len({several[i].clip_frames > 1 for i in b}) == 2]
  assert len(mixed) <= 1  # only of what is left over
  means = [np.mean([several[i].text for i in b]) for b in grouped]
  assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # which batch comes when is random


def test_plan_parts_global_batches_by_bucket():
  several, size = lengths(64), lambda bucket: 2 if bucket.frames > 8 else 3
  entries = plan(several, range(64), CONFIG, 10, size, seed=5, epoch=2)
  for part, wanted in zip(steps(entries), order(several, range(64), 10, 5, 2, False), strict=True):
    assert sorted(i for e in part for i in e.samples) == sorted(wanted)
    for bucket in {e.bucket for e in part}:  # all but a bucket's last micro-batch are full
      assert all(len(e.samples) == e.rows for e in [e for e in part if e.bucket == bucket][:-1])
  for e in entries:
    assert e.rows == size(e.bucket) and 0 < len(e.samples) <= e.rows
    for i in e.samples:
      n = several[i]
      frames = n.frames if n.frames < 2 else 8 if n.frames <= 8 else 16
      assert e.bucket == Bucket(frames // n.clip_frames, n.clip_frames, 16, 32 if n.text <= 32 else 64)


@pytest.mark.parametrize(
  ("length", "changes", "message"),
  [
    (Length(20, 4, 14, 9), {}, r"sample 2 has 20 frames, and the largest of data\.frame_buckets is 16"),
    (Length(8, 4, 14, 99), {}, r"sample 2 has 99 tokens after .* largest of data\.text_buckets is 64"),
    (Length(8, 4, 17, 9), {}, r"sample 2 has 17 tokens before .* data\.prefix_length is 16"),
    (Length(1, 1, 14, 9), {"frame_buckets": (0, 8)}, r"sample 2 has 1 frames, and data\.frame_buckets has no 1 \(image\)"),
    (Length(0, 1, 0, 9), {"frame_buckets": (1, 8)}, r"no 0 \(text alone\)"),
    (Length(8, 4, 14, 9), {"frame_buckets": (10,)}, r"frame_buckets has 10, which is not a multiple of .* 4 frames"),
    (Length(20, 4, 14, 99), {}, r"20 frames.*99 tokens"),
  ],
)
def test_a_sample_that_fits_no_bucket_is_named(length, changes, message):
  fine = Length(8, 4, 14, 9)
  cfg = dataclasses.replace(CONFIG, **changes)
  with pytest.raises(ConfigError, match=message):
    plan([fine, fine, length], range(3), cfg, 2, lambda b: 1, 0, 0)


def test_less_than_a_batch():
  with pytest.raises(ConfigError, match=r"train\.batch_size = 4, but an epoch reads only 3 samples"):
    steps_per_epoch(3, 4)
  assert steps_per_epoch(9, 4) == 2


def test_measure_counts_the_tokens_around_the_visual_slot(store, tokenizer):
  measured = measure(store, tokenizer, "official")
  for i, n in enumerate(measured):
    e = example(store, tokenizer, "official", i)
    assert (n.frames, n.clip_frames) == (FRAMES[i], CLIP if FRAMES[i] > 1 else 1)
    assert n.prefix + n.text + (FRAMES[i] > 0) == len(e.tokens)
    batch = collate([e], Bucket(len(e.visual), n.clip_frames, 16, 64))
    assert (batch.prefix_length[0], batch.text_length[0]) == (n.prefix, n.text)


def test_batches_hold_the_samples_of_the_plan(store, tokenizer):
  micro = list(run(store, tokenizer))
  size = lambda bucket: 2 * max(1, min(3, 16 // max(1, bucket.frames)))
  n = measure(store, tokenizer, CONFIG.mask)
  entries = [e for epoch in range(2) for e in plan(n, range(13), CONFIG, 5, size, 3, epoch)]
  assert len(micro) == len(entries)
  for m, e in zip(micro, entries, strict=True):
    assert m.last == e.last
    assert m.batch.index.tolist() == list(e.samples) + [-1] * (e.rows - len(e.samples))
    assert m.batch.weight.sum() == len(e.samples)
    assert equal(m.batch, collate([example(store, tokenizer, CONFIG.mask, i) for i in e.samples], e.bucket, e.rows))
  assert [sum(m.batch.weight.sum() for m in part) for part in steps(micro)] == [5] * 4  # two steps an epoch


def test_shapes_are_finite_and_rows_fill_the_device(store, tokenizer):
  shapes = {}
  for m in run(store, tokenizer, epochs=20, batch_size=13):
    b = m.batch
    assert shapes.setdefault((b.visual.shape[1:3], b.text.shape[1]), b.visual.shape) == b.visual.shape
  assert len(shapes) <= 4 * 2  # frame buckets x text buckets
  rows = {clips * frames: shape[0] for ((clips, frames), _), shape in shapes.items()}
  assert rows == {0: 14, 1: 14, 8: 4, 16: 2}  # 16 frames a device, 2 devices; never more rows than a batch has samples


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (0, 3), (1, 1), (4, 8)])
def test_same_batches_for_any_number_of_threads_and_processes(store, tokenizer, threads, prefetch, processes):
  cfg = dataclasses.replace(CONFIG, threads=threads, prefetch=prefetch)
  shares = [run(store, tokenizer, cfg, process_index=i, process_count=processes) for i in range(processes)]
  for whole, *parts in zip(run(store, tokenizer), *shares, strict=True):
    assert all(part.last == whole.last for part in parts)
    assert equal(whole.batch, jax.tree.map(lambda *x: np.concatenate(x), *(part.batch for part in parts)))


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 3), (4, 4)])
def test_no_more_is_read_ahead_than_the_config_says(store, tokenizer, monkeypatch, threads, prefetch):
  taken, read, lock = 0, 0, threading.Lock()
  original = pipeline.collate

  def counting(*arguments):
    nonlocal read
    with lock:
      read += 1
      assert read - taken <= prefetch + 1  # the one that is waited for
    return original(*arguments)

  monkeypatch.setattr(pipeline, "collate", counting)
  with contextlib.closing(run(store, tokenizer, dataclasses.replace(CONFIG, threads=threads, prefetch=prefetch))) as reader:
    for _ in reader:
      if prefetch:
        time.sleep(0.002)  # for threads that read more than they should
      taken += 1
  assert read == taken > 10


def test_long_texts_bound_the_rows(store, tokenizer):
  rows = {}
  for cap in (64, 100, 448):  # tokens a device; its longest bucket has 64
    cfg = dataclasses.replace(CONFIG, text_per_device=cap)
    for m in run(store, tokenizer, cfg, batch_size=13):
      rows[cap, m.batch.text.shape[1]] = max(rows.get((cap, m.batch.text.shape[1]), 0), m.batch.text.shape[0])
  assert rows == {(64, 32): 4, (64, 64): 2, (100, 32): 6, (100, 64): 2, (448, 32): 14, (448, 64): 14}


def test_two_processes_read_the_two_halves_of_every_micro_batch(store, tokenizer):
  whole = list(run(store, tokenizer))
  halves = [list(run(store, tokenizer, process_index=p, process_count=2)) for p in (0, 1)]
  padding = 0
  for one, left, right in zip(whole, *halves, strict=True):
    assert one.last == left.last == right.last
    joined = jax.tree.map(lambda x, y: np.concatenate([x, y]), left.batch, right.batch)
    assert equal(one.batch, joined)
    if not right.batch.weight.any():
      padding += 1
      assert (right.batch.targets == IGNORE).all() and (right.batch.index == -1).all()
  assert padding  # the case of a process without a sample occurs
  with pytest.raises(ConfigError, match="2 rows can't be split evenly over 3"):
    run(store, tokenizer, process_count=3)


def test_from_its_state_a_reader_gives_the_identical_rest(store, tokenizer):
  whole = steps(list(run(store, tokenizer)))
  for done in range(len(whole) + 1):
    first = run(store, tokenizer)
    for _ in range(sum(map(len, whole[:done]))):
      next(first)
    state = first.get_state()
    assert state == {"step": done}
    if done < len(whole):
      next(first)
      assert first.get_state() == {"step": done + (len(whole[done]) == 1)}  # a step read in part does not count
    first.close()
    second = run(store, tokenizer, dataclasses.replace(CONFIG, threads=4, prefetch=5))
    next(second)
    second.set_state(json.loads(json.dumps(state)))
    for a, b in zip([micro for part in whole[done:] for micro in part], second, strict=True):
      assert a.last == b.last and equal(a.batch, b.batch)
  with pytest.raises(ConfigError, match="up to step 5, but the run has 4 steps"):
    second.set_state({"step": 5})


def samples(micro) -> list[list[int]]:
  """Of each step, in order."""
  return [sorted(i for m in part for i in m.batch.index.tolist() if i >= 0) for part in steps(micro)]


def test_the_samples_of_a_step_are_the_same_for_any_number_of_devices_and_processes(store, tokenizer):
  cfg = dataclasses.replace(CONFIG, frames_per_device=8)
  read = lambda rows, **changes: run(store, tokenizer, cfg, batch_size=13, epochs=3, rows=rows, **changes)
  four, eight = (list(read(rows)) for rows in (4, 8))
  assert len(four) != len(eight)  # cut otherwise
  assert samples(four) == samples(eight)
  reader = read(4)
  while reader.get_state() != {"step": 1}:
    next(reader)
  rest = []
  for process in range(2):
    other = read(8, process_index=process, process_count=2)
    other.set_state(reader.get_state())
    rest.append(list(other))
  assert [sorted(a + b) for a, b in zip(*map(samples, rest), strict=True)] == samples(four)[1:]


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_everything_once_in_order(store, tokenizer, processes):
  parts = [
    evaluation(store, tokenizer, CONFIG, rows=4, process_index=p, process_count=processes) for p in range(processes)
  ]
  for _ in range(2):  # it can be gone through again
    seen = [list(part) for part in parts]
    index = np.concatenate([p.batch.index for group in zip(*seen, strict=True) for p in group])
    assert sorted(index[index >= 0].tolist()) == list(range(13))
    assert [m.last for m in seen[0]] == [False] * (len(seen[0]) - 1) + [True]
    for a, b in zip(seen[0], seen[0][1:]):
      if a.batch.visual.shape == b.batch.visual.shape and a.batch.text.shape == b.batch.text.shape and processes == 1:
        assert a.batch.index.max() < b.batch.index.max()


def test_mask_reaches_the_labels(store, tokenizer):
  count = {}
  for mask in ("official", "assistant"):
    cfg = dataclasses.replace(CONFIG, mask=mask)
    count[mask] = sum((m.batch.targets != IGNORE).sum() for m in evaluation(store, tokenizer, cfg, rows=1))
  assert 0 < count["assistant"] < count["official"]
