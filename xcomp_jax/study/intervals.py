"""Shares of right answers and their intervals."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.stats import binomtest

RESAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class RightShare:
  """A share of right answers and its 95% interval."""

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    # no -0.0
    mean, low, high = (round(100 * value, 1) + 0.0 for value in (self.mean, self.low, self.high))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def interval(
  seeds: Sequence[Shaped[np.ndarray, "films kinds"]],
  against: Sequence[Shaped[np.ndarray, "films kinds"]] = (),
  *,
  same: bool = False,
) -> RightShare:
  """The mean over seeds and questions, or its difference to another one over the same films.

  The interval is that of a bootstrap over films, whose questions go together, and over seeds, where
  there are several: three of them, drawn again, differ less than new ones would. Of a share of 0 or
  1, which no resample changes, it is the exact one (Clopper and Pearson) of as many independent
  questions as there are films.

  seeds, against: bool, or float with nan for questions that don't count.
  same: a seed is the same model on both sides; else seeds are drawn apart, as trainings are.
  """
  rng = np.random.default_rng(0)

  def draw(rows):
    return rng.integers(len(rows), size=(RESAMPLES, len(rows)))

  films, drawn = draw(seeds[0]), draw(seeds)
  mean, resampled = _shares(seeds, films, drawn)
  if against:
    other, others = _shares(against, films, drawn if same else draw(against))
    mean, resampled = mean - other, resampled - others
  if np.isnan(mean):
    return RightShare(mean, mean, mean)
  if not against and mean in (0, 1):
    counted = int(np.any(~np.isnan(np.asarray(seeds, float)), axis=(0, 2)).sum())
    exact = binomtest(int(mean) * counted, counted).proportion_ci(method="exact")
    return RightShare(mean, float(exact.low), float(exact.high))
  low, high = np.nanpercentile(resampled, (2.5, 97.5))
  return RightShare(mean, float(low), float(high))


def _shares(
  seeds: Sequence[Shaped[np.ndarray, "films kinds"]],
  films: Int[np.ndarray, "resamples films"],
  drawn: Int[np.ndarray, "resamples seeds"],
) -> tuple[float, Float[np.ndarray, " resamples"]]:
  """The share of right answers as it is, and of each resample of films and seeds."""
  values = np.array(seeds, float)  # [seeds, films, kinds]
  sums = np.nansum(values, 2)  # [seeds, films]
  counts = (~np.isnan(values)).sum(2)  # [seeds, films]

  def resample(of):
    by_seed = of[:, films].sum(2)  # [seeds, resamples]
    return np.take_along_axis(by_seed.T, drawn, 1).sum(1)  # [resamples]

  with np.errstate(invalid="ignore"):  # where no question counts
    return float(sums.sum() / counts.sum()), resample(sums) / resample(counts)
