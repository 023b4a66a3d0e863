"""Stores one behind the other: which of their samples each step reads, and how long they are."""

import bisect
import itertools
import math
from collections.abc import Sequence

import numpy as np

from xcomp_jax.config import ConfigError, Mask
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import Length
from xcomp_jax.data.store import Features, Store, StoredSample
from xcomp_jax.progress import progress


def permutation(n: int, *key: int) -> list[int]:
  """0..n-1 in an order that the key decides, of which trailing zeros don't count."""
  # Raw bits of a bit generator stay the same over numpy's versions; its permutation() need not.
  return np.argsort(np.random.PCG64(key).random_raw(n), kind="stable").tolist()


class Blend:
  """Several stores as one sequence of samples; safe to share between threads.

  stores: first comes all of the first.
  weights: how often an epoch reads a sample of each store, on average.
  samples: of all stores.
  """

  def __init__(self, stores: Sequence[Store], weights: Sequence[float] | None = None):
    """Checks that the stores go together; `weights` None: an epoch reads every sample once.

    Raises:
      ConfigError: no stores, weights that are not one positive number for each, a weight that reads
        nothing, or stores
        of different kinds: frames and features, other sizes, another tower.
    """
    self.stores = tuple(stores)
    self.weights = (1.0,) * len(self.stores) if weights is None else tuple(weights)
    if not self.stores:
      raise ConfigError("no data: config.data.train names no folder", where="config.data.train")
    if len(self.weights) != len(self.stores):
      raise ConfigError(
        f"config.data.weights has {len(self.weights)} numbers for {len(self.stores)} folders in "
        f"config.data.train; give one for each",
        where="config.data.weights",
        found=len(self.weights),
        expected=len(self.stores),
      )
    if not all(0 < weight < math.inf for weight in self.weights):
      raise ConfigError(
        f"config.data.weights = {self.weights}: must be numbers above 0",
        where="config.data.weights",
        value=self.weights,
      )
    # samples of each store in an epoch
    self._counts = [
      math.floor(weight * len(store) + 0.5) for weight, store in zip(self.weights, self.stores)
    ]
    for store, weight, count in zip(self.stores, self.weights, self._counts):
      if not count:
        raise ConfigError(
          f"config.data.weights has {weight} for {store.path}: of its {len(store)} samples an "
          "epoch reads none; give a larger weight, or leave the folder out",
          where="config.data.weights",
          value=weight,
          store=store.path,
        )
    first = self.stores[0]
    for store in self.stores:
      if _kind(store) != _kind(first):
        raise ConfigError(
          f"{first.path} holds {_kind(first)}, but {store.path} holds {_kind(store)}; a run reads "
          f"one kind",
          where="config.data.train",
          stores=(first.path, store.path),
          kinds=(_kind(first), _kind(store)),
        )
    self.samples: tuple[StoredSample, ...] = tuple(
      itertools.chain.from_iterable(store.samples for store in self.stores)
    )
    self._starts = [0, *itertools.accumulate(map(len, self.stores))]

  def __len__(self) -> int:
    return len(self.samples)

  def epoch(self, seed: int, epoch: int) -> list[int]:
    """The samples of an epoch, ascending; one that is read twice is there twice.

    A store is gone through in random order again and again, and an epoch takes what comes next, so
    no sample is read a second time before all others were read once: with a weight of 0.25 four
    epochs read all of it.
    """
    out = []
    for number, (store, count) in enumerate(zip(self.stores, self._counts)):
      n, first = len(store), epoch * count
      for turn in range(first // n, (first + count - 1) // n + 1):
        drawn = permutation(n, seed, turn, 2, number)[
          max(0, first - turn * n) : first + count - turn * n
        ]
        out += [self._starts[number] + i for i in drawn]
    return sorted(out)

  def find(self, index: int) -> tuple[Store, int]:
    """The store of a sample, and the sample's place in it."""
    number = bisect.bisect_right(self._starts, index) - 1
    return self.stores[number], index - self._starts[number]

  def visual(self, index: int) -> np.ndarray:
    """Frames or features of a sample, as `Store.visual`."""
    store, i = self.find(index)
    return store.visual(i)

  def clips(self, index: int, first: int, count: int) -> np.ndarray:
    """Some clips of a sample, as `Store.clips`."""
    store, i = self.find(index)
    return store.clips(i, first, count)

  @property
  def features(self) -> Features | None:
    """Whose features `visual` gives; None: it gives frames."""
    return self.stores[0].features

  def clip_spec(self, clip_frames: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a clip of so many frames, in any of the stores."""
    return self.stores[0].layout.clip_spec(clip_frames)

  def identity(self) -> str:
    """Those of the stores, in order: another text means other data."""
    return ", ".join(store.identity() for store in self.stores)

  def made_with(self) -> list[str]:
    """For every store a line that says where it is, how it was made, and how much of it an epoch
    reads.
    """
    return [
      f"{store.path}: {store.made_with()}; an epoch reads {count} of {len(store)} samples"
      for store, count in zip(self.stores, self._counts)
    ]


def _kind(store: Store) -> str:
  """What its arrays are, in words: stores of one kind go together."""
  what = f"frames of {store.layout.image_size} pixels"
  if store.features is not None:
    f = store.features
    what = (
      f"features ({f.tokens_per_frame} tokens of {f.width} numbers a frame, by tower {f.identity}) "
      f"of " + what
    )
  return f"{what} in clips of {store.layout.clip_frames}"


def order(samples: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
  """The samples of each step of an epoch: random ones, images and videos mixed, as in the release
  (FACTS.md 14). Those that do not fill a last batch wait for another epoch's order.

  Raises:
    ConfigError: not even one batch.
  """
  if len(samples) < batch_size:
    raise ConfigError(
      f"train.batch_size = {batch_size}, but an epoch reads only {len(samples)} samples; make "
      f"it smaller",
      where="config.train.batch_size",
      value=batch_size,
      found=len(samples),
    )
  shuffled = [samples[i] for i in permutation(len(samples), seed, epoch, 0)]
  return [
    shuffled[i : i + batch_size] for i in range(0, len(shuffled) - batch_size + 1, batch_size)
  ]


def run_order(data: Blend, batch_size: int, seed: int, epochs: int) -> list[list[int]]:
  """The samples of each step of a run.

  Raises:
    ConfigError: not even one batch.
  """
  return [
    step
    for epoch in range(epochs)
    for step in order(data.epoch(seed, epoch), batch_size, seed, epoch)
  ]


def measure_lengths(data: Blend, tokenizer, mask: Mask) -> list[Length]:
  """Lengths of every sample under this tokenizer; a minute's work for the paper's 71,927, so there
  is a bar.

  Tokens are not kept: they would take hundreds of megabytes of every process, while making them
  again takes less than reading the sample's clips.
  """
  lengths = []
  for sample in progress(data.samples, unit="sample", desc="tokens", delay=5.0, leave=False):
    tokens = prompt.sample_prompt(tokenizer, sample, mask).tokens
    slots = np.flatnonzero(tokens == prompt.IMAGE_TOKEN)
    before = int(slots[0]) + 1 if len(slots) else 0
    lengths.append(
      Length(sample.frames, sample.clip_frames, max(before - 1, 0), len(tokens) - before)
    )
  return lengths
