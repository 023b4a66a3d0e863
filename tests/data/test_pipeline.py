"""data/pipeline.py: the order is a function of seed and step, whatever reads it."""

import collections
import contextlib
import dataclasses
import itertools
import json
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from refused import refused

from xcomp_jax.config import ConfigError, DataConfig
from xcomp_jax.data import pipeline, prompt
from xcomp_jax.data.batch import IGNORE, Shape, collate, split_text
from xcomp_jax.data.blend import Blend, measure_lengths, order, run_order
from xcomp_jax.data.packing import Micro
from xcomp_jax.data.pipeline import MicroBatch, ProcessShare, TowerCall, read_example
from xcomp_jax.data.store import Features, StoredSample, open_store
from xcomp_jax.data.store_writing import write_store

SIZE, CLIP = 8, 4
CONFIG = DataConfig(
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
SHAPE = Shape(rows=2, samples=3, prefix=16, frames=24, text=160)
ALONE = ProcessShare(rows=(0, 1), groups=2, devices=2, mine=(0, 1), clips=2, trained=False)
# 13 samples: videos, images (1), text alone (0)
FRAMES = (
  8,
  1,
  16,
  0,
  8,
  12,
  1,
  4,
  16,
  8,
  0,
  1,
  8,
)


@pytest.fixture(scope="session")
def tokenizer(reference):
  return prompt.load_tokenizer(reference / "qwen_subset")


@pytest.fixture(scope="session")
def store(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "store"

  def items():
    for i, frames in enumerate(FRAMES):
      slot = "<image>\n" if frames else ""
      talk = (
        {"from": "human", "value": f"{slot}Q{i}?"},
        {"from": "gpt", "value": "A " * (1 + i % 3 * 7)},
      )
      per_clip = CLIP if frames > 1 else 1
      message = prompt.time_message(frames / 8, frames) if frames > 1 else ""
      visual = (
        np.full((frames // per_clip, per_clip, SIZE, SIZE, 3), i + 1, np.uint8) if frames else None
      )
      yield (
        StoredSample(
          id=f"s{i}",
          source="",
          annotation="a.json",
          position=i,
          conversations=talk,
          time_message=message,
        ),
        visual,
      )

  write_store(path, items(), image_size=SIZE, clip_frames=CLIP)
  return Blend([open_store(path)])


def equal(a, b) -> bool:
  return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)) and jax.tree.structure(
    a
  ) == jax.tree.structure(b)


def planned(batch_size=5, seed=3, epochs=2) -> list[list[Micro]]:
  """A plan of a run as any planner might make it: samples are dealt to the rows in turn, as long as
  they fit.
  """
  out = []
  for epoch in range(epochs):
    for step in order(range(len(FRAMES)), batch_size, seed, epoch):
      micros, rows = [], [[], []]
      for i in step:
        row = min(rows, key=len)
        if len(row) == SHAPE.samples or sum(FRAMES[k] for k in row) + FRAMES[i] > SHAPE.frames:
          micros.append(rows)
          rows = [[], []]
          row = rows[0]
        row.append(i)
      out.append([Micro(SHAPE, tuple(map(tuple, rows))) for rows in [*micros, rows]])
  return out


def run(store, tokenizer, cfg=CONFIG, plan=None, load=None, **share):
  share = dataclasses.replace(ALONE, **share)
  lengths = measure_lengths(store, tokenizer, cfg.mask)
  return pipeline.read_steps(store, tokenizer, cfg, lengths, plan or planned(), share, load)


def parts(items) -> list[list]:
  """Items of each step."""
  ends = [n for n, item in enumerate(items, 1) if isinstance(item, MicroBatch) and item.last]
  assert ends[-1] == len(items)
  return [list(items[a:b]) for a, b in zip([0, *ends], ends)]


def test_every_sample_once_per_epoch():
  seen = [
    collections.Counter(i for step in order(range(103), 10, 7, e) for i in step) for e in range(3)
  ]
  for counter in seen:
    assert len(counter) == 100 and set(counter.values()) == {1} and set(counter) <= set(range(103))
  assert order(range(103), 10, 7, 0) == order(range(103), 10, 7, 0)
  assert order(range(103), 10, 7, 0) != order(range(103), 10, 7, 1)
  assert order(range(103), 10, 7, 0) != order(range(103), 10, 8, 0)


def test_order_is_pinned():
  # A resumed run must see the same order after an upgrade of anything: these numbers may never
  # change.
  assert order(range(12), 4, 0, 0) == [[11, 3, 2, 1], [8, 6, 0, 7], [4, 10, 5, 9]]


def test_a_run_has_the_steps_of_its_epochs(store):
  assert run_order(store, 5, 3, 2) == [
    step for epoch in range(2) for step in order(range(13), 5, 3, epoch)
  ]


def test_less_than_a_batch():
  with refused(ConfigError, where="config.train.batch_size", value=4, found=3):
    order(range(3), 4, 0, 0)
  assert len(order(range(9), 4, 0, 0)) == 2


def test_measure_counts_the_tokens_around_the_visual_slot(store, tokenizer):
  for i, n in enumerate(measure_lengths(store, tokenizer, "official")):
    e = read_example(store, tokenizer, "official", i)
    assert (n.frames, n.clip_frames) == (FRAMES[i], CLIP if FRAMES[i] > 1 else 1)
    assert (n.prefix, n.text) == split_text(e) and n.prefix + n.text + (FRAMES[i] > 0) == len(
      e.tokens
    )


def test_micro_batches_hold_the_samples_of_the_plan(store, tokenizer):
  plan = planned()
  for items, step in zip(parts(list(run(store, tokenizer))), plan, strict=True):
    micros = [item for item in items if isinstance(item, MicroBatch)]
    assert [m.number for m in micros] == list(range(len(step))) and [m.last for m in micros] == [
      False
    ] * (len(step) - 1) + [True]
    assert items[-len(micros) :] == micros  # the tower comes before
    for got, micro in zip(micros, step, strict=True):
      assert equal(
        got.batch,
        collate(
          [[read_example(store, tokenizer, CONFIG.mask, i) for i in row] for row in micro.rows],
          SHAPE,
        ),
      )
      assert got.batch.visual is None and not got.clips and got.shape == SHAPE


def filled(calls, plan) -> list[np.ndarray]:
  """What the visual slots of a step's micro-batches hold after its calls, uint8 per frame: every
  pixel of a sample is alike.
  """
  held = [np.zeros((2, SHAPE.frames), np.uint8) for _ in plan]
  for call in calls:
    assert len(call.frames) and (call.frames == call.frames[:, :1, :1, :1, :1]).all()
    for fill in call.fills:
      assert fill.shape == SHAPE and len(fill.place) == len(call.frames)
      for clip, (row, slot) in zip(call.frames, fill.place):
        if row >= 0:
          held[fill.number][row, slot : slot + len(clip)] = clip[:, 0, 0, 0]
  return held


def test_calls_of_the_tower_bring_every_clip_where_it_belongs(store, tokenizer):
  plan = planned()
  for items, step in zip(parts(list(run(store, tokenizer))), plan, strict=True):
    held = filled([item for item in items if isinstance(item, TowerCall)], step)
    for got, micro in zip(held, step, strict=True):
      for row, samples in zip(got, micro.rows, strict=True):
        shown = [i + 1 for i in samples for _ in range(FRAMES[i])]
        assert row.tolist() == shown + [0] * (SHAPE.frames - len(shown))


def test_a_steps_clips_are_spread_evenly(store, tokenizer):
  def clips(step, kind):
    return sum(
      FRAMES[i] // kind for m in step for r in m.rows for i in r if (FRAMES[i] > 1) == (kind > 1)
    )

  for devices in (1, 2, 3, 8):
    reader = run(store, tokenizer, devices=devices, mine=tuple(range(devices)))
    for items, step in zip(parts(list(reader)), planned(), strict=True):
      calls = [item for item in items if isinstance(item, TowerCall)]
      for kind in (CLIP, 1):
        sizes = [len(call.frames) for call in calls if call.frames.shape[1] == kind]
        each = -(-clips(step, kind) // devices)
        assert sizes == [2 * devices] * (each // 2) + [devices] * (each % 2)


def test_what_features_are_of_a_call_needs_nothing(store, tokenizer, tmp_path):
  rng = np.random.default_rng(0)
  visual = [
    rng.normal(size=(max(1, n // CLIP), min(n, CLIP) * 3, 5)).astype(ml_dtypes.bfloat16)
    if n
    else None
    for n in FRAMES
  ]
  made = Features("it", 3, 5)
  write_store(
    tmp_path / "f",
    zip(store.samples, visual, strict=True),
    image_size=SIZE,
    clip_frames=CLIP,
    features=made,
  )
  data = Blend([open_store(tmp_path / "f")])
  items = list(run(data, tokenizer))
  assert all(isinstance(item, MicroBatch) for item in items)
  for item, micro in zip(items, itertools.chain.from_iterable(planned()), strict=True):
    for row, samples in zip(item.batch.visual, micro.rows, strict=True):
      shown = [visual[i].reshape(-1, 3, 5) for i in samples if FRAMES[i]]
      shown = np.concatenate([*shown, np.zeros((0, 3, 5), ml_dtypes.bfloat16)])
      np.testing.assert_array_equal(row[: len(shown)], shown)
      assert not row[len(shown) :].any()


def test_a_tower_that_is_trained_has_as_many_clips_in_every_micro_batch(store, tokenizer):
  items = list(run(store, tokenizer, trained=True))
  assert all(isinstance(item, MicroBatch) and item.batch.visual is None for item in items)
  for item, micro in zip(items, itertools.chain.from_iterable(planned()), strict=True):
    videos, images = item.clips
    assert videos.frames.shape == (2, 6, CLIP, SIZE, SIZE, 3) and images.frames.shape == (
      2,
      3,
      1,
      SIZE,
      SIZE,
      3,
    )
    held = np.zeros((2, SHAPE.frames), np.uint8)
    for clips in item.clips:
      for row in range(2):
        for clip, slot in zip(clips.frames[row], clips.place[row]):
          if slot >= 0:
            held[row, slot : slot + len(clip)] = clip[:, 0, 0, 0]
    for row, samples in zip(held, micro.rows, strict=True):
      shown = [i + 1 for i in samples for _ in range(FRAMES[i])]
      assert row.tolist() == shown + [0] * (SHAPE.frames - len(shown))


def whole(parts, share) -> object:
  """An item of all processes from those of each."""
  first = parts[0]
  if isinstance(first, TowerCall):
    return np.concatenate([part.frames for part in parts]), [fill.place for fill in first.fills]
  return jax.tree.map(lambda *x: np.concatenate(x), *(part.batch for part in parts))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (0, 3), (1, 1), (4, 8)])
def test_same_items_for_any_number_of_threads_and_processes(
  store, tokenizer, threads, prefetch, processes
):
  cfg = dataclasses.replace(CONFIG, threads=threads, prefetch=prefetch)
  mine = [(0, 1)] if processes == 1 else [(0,), (1,)]
  shares = [run(store, tokenizer, cfg, rows=mine[i], mine=mine[i]) for i in range(processes)]
  for item, *those in zip(run(store, tokenizer), *shares, strict=True):
    assert {type(part) for part in those} == {type(item)}
    assert equal(whole([item], ALONE), whole(those, ALONE))
    if isinstance(item, MicroBatch):
      assert all((part.last, part.number) == (item.last, item.number) for part in those)


def test_processes_whose_devices_lie_apart_read_their_own_clips(store, tokenizer):
  def reader(mine):
    return run(store, tokenizer, devices=4, mine=mine)

  for item, *those in zip(reader((0, 1, 2, 3)), reader((0, 3)), reader((1, 2)), strict=True):
    if isinstance(item, TowerCall):
      n = len(item.frames) // 4
      a, b = (part.frames.reshape(2, n, *part.frames.shape[1:]) for part in those)
      assert equal(item.frames, np.concatenate([a[0], b[0], b[1], a[1]]))


def test_a_process_reads_the_rows_that_its_devices_hold(store, tokenizer):
  shape = Shape(rows=8, samples=1, prefix=16, frames=16, text=64)
  plan = [[Micro(shape, tuple((i,) for i in range(8)))]]

  def items(*rows):
    return list(run(store, tokenizer, plan=plan, rows=rows, groups=4, devices=4, mine=(0,)))

  for rows in ((0, 1, 2, 3), (0, 2), (3,)):
    *calls, micro = items(*rows)
    assert micro.batch.index[:, 0].tolist() == [2 * group + k for group in rows for k in range(2)]
    for call, first in zip(calls, items(0, 1, 2, 3)):  # where clips go is said in the rows of all
      assert all(equal(a.place, b.place) for a, b in zip(call.fills, first.fills, strict=True))


def test_a_hosts_clips_of_a_call_are_neighbours(store, tokenizer):
  mine = tuple(range(4))
  for item in run(
    store,
    tokenizer,
    devices=8,
    mine=mine,
    plan=[
      [Micro(Shape(rows=2, samples=7, prefix=16, frames=56, text=320), ((0, 2, 4, 8), (5, 12, 7)))]
    ],
  ):
    if isinstance(item, TowerCall) and item.frames.shape[1] == CLIP:
      samples = item.frames[:, 0, 0, 0, 0].tolist()
      # none is come back to
      assert [a for a, b in zip(samples, [None, *samples]) if a != b] == list(
        dict.fromkeys(samples)
      )


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 3), (4, 4)])
def test_no_more_is_read_ahead_than_the_config_says(store, tokenizer, threads, prefetch):
  taken, read, lock = 0, 0, threading.Lock()

  def counting(*arguments):
    nonlocal read
    with lock:
      read += 1
      assert read - taken <= prefetch + 1  # the one that is waited for
    return pipeline.load_item(*arguments)

  cfg = dataclasses.replace(CONFIG, threads=threads, prefetch=prefetch)
  with contextlib.closing(run(store, tokenizer, cfg, load=counting)) as reader:
    for _ in reader:
      if prefetch:
        time.sleep(0.002)  # for threads that read more than they should
      taken += 1
  assert read == taken > 10


def test_rows_that_groups_cannot_share_are_refused(store, tokenizer):
  with refused(ConfigError, rows=2, groups=3):
    run(store, tokenizer, rows=(0,), groups=3)


def test_from_its_state_a_reader_gives_the_identical_rest(store, tokenizer):
  steps = parts(list(run(store, tokenizer)))

  def same(a, b):
    return type(a) is type(b) and equal(whole([a], ALONE), whole([b], ALONE))

  for done in range(len(steps) + 1):
    first = run(store, tokenizer)
    for _ in range(sum(map(len, steps[:done]))):
      next(first)
    state = first.get_state()
    assert state == {"step": done}
    if done < len(steps):
      next(first)
      assert first.get_state() == {"step": done}  # a step read in part does not count
    first.close()
    second = run(store, tokenizer, dataclasses.replace(CONFIG, threads=4, prefetch=5))
    next(second)
    second.set_state(json.loads(json.dumps(state)))
    for a, b in zip([item for part in steps[done:] for item in part], second, strict=True):
      assert same(a, b)
  with refused(ConfigError, where="step", value=5, allowed=4):
    second.set_state({"step": 5})


def test_the_samples_of_a_step_do_not_depend_on_devices(store, tokenizer):
  def samples(items):
    return sorted(
      i
      for item in items
      if isinstance(item, MicroBatch)
      for i in item.batch.index.ravel().tolist()
      if i >= 0
    )

  def read(devices):
    return [
      samples(part)
      for part in parts(list(run(store, tokenizer, devices=devices, mine=tuple(range(devices)))))
    ]

  assert read(2) == read(8) == [sorted(step) for step in run_order(store, 5, 3, 2)]


def test_mask_reaches_the_labels(store, tokenizer):
  count = {}
  for mask in ("official", "assistant"):
    items = run(store, tokenizer, dataclasses.replace(CONFIG, mask=mask))
    count[mask] = sum(
      (item.batch.targets != IGNORE).sum() for item in items if isinstance(item, MicroBatch)
    )
  assert 0 < count["assistant"] < count["official"]
