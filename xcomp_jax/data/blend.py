"""Stores one behind the other, and which of their samples an epoch reads."""

import bisect
import itertools
import math
from collections.abc import Sequence

import numpy as np

from xcomp_jax.config import ConfigError
from xcomp_jax.data.store import Features, Store, StoredSample


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
      raise ConfigError("no data: config.data.train names no folder")
    if len(self.weights) != len(self.stores):
      raise ConfigError(
        f"config.data.weights has {len(self.weights)} numbers for {len(self.stores)} folders in "
        f"config.data.train; give one for each"
      )
    for store, weight, count in zip(self.stores, self.weights, self._counts()):
      if not count:
        raise ConfigError(
          f"config.data.weights has {weight} for {store.path}: of its {len(store)} samples an "
          f"epoch reads none; "
          "give a larger weight, or leave the folder out"
        )
    kinds = [_kind(store) for store in self.stores]
    for store, kind in zip(self.stores, kinds):
      if kind != kinds[0]:
        raise ConfigError(
          f"{self.stores[0].path} holds {kinds[0]}, but {store.path} holds {kind}; a run reads one "
          f"kind"
        )
    self.samples: tuple[StoredSample, ...] = tuple(
      itertools.chain.from_iterable(store.samples for store in self.stores)
    )
    self._starts = [0, *itertools.accumulate(map(len, self.stores))]

  def __len__(self) -> int:
    return len(self.samples)

  @property
  def per_epoch(self) -> int:
    """Samples that an epoch reads."""
    return sum(self._counts())

  def epoch(self, seed: int, epoch: int) -> list[int]:
    """The samples of an epoch, ascending; one that is read twice is there twice.

    A store is gone through in random order again and again, and an epoch takes what comes next, so
    no sample is read
    a second time before all others were read once: with a weight of 0.25 four epochs read all of
    it.
    """
    out = []
    for number, (store, count) in enumerate(zip(self.stores, self._counts())):
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
    return self.stores[0].clip_spec(clip_frames)

  def identity(self) -> str:
    """Those of the stores, in order: another text means other data."""
    return ", ".join(store.identity() for store in self.stores)

  def made_with(self) -> list[str]:
    """For every store a line that says where it is, how it was made, and how much of it an epoch
    reads.
    """
    return [
      f"{store.path}: {store.made_with()}; an epoch reads {count} of {len(store)} samples"
      for store, count in zip(self.stores, self._counts())
    ]

  def _counts(self) -> list[int]:
    """Samples of each store in an epoch."""
    if not all(0 < weight < math.inf for weight in self.weights):
      raise ConfigError(f"config.data.weights = {self.weights}: must be numbers above 0")
    return [
      math.floor(weight * len(store) + 0.5) for weight, store in zip(self.weights, self.stores)
    ]


def _kind(store: Store) -> str:
  """What its arrays are, in words: stores of one kind go together."""
  what = f"frames of {store.image_size} pixels"
  if store.features is not None:
    f = store.features
    what = (
      f"features ({f.tokens_per_frame} tokens of {f.width} numbers a frame, by tower {f.identity}) "
      f"of " + what
    )
  return f"{what} in clips of {store.clip_frames}"
