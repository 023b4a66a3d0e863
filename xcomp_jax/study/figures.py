"""The study's plots, with matplotlib (`xcomp_jax[plot]`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xcomp_jax.study.cell_results import (
  CURVES,
  LONGEST,
  Cells,
  Measure,
  bound,
  by_quarter,
  ranked_first,
  right,
)
from xcomp_jax.study.intervals import RightShare, interval


def plot_frames(cells: Cells) -> Any:
  """Figure 1 in miniature: accuracy against frames, and against visual tokens that a layer works
  on.
  """
  import matplotlib.pyplot as plt

  figure, (left, right_ax) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
  for i, (name, path) in enumerate(CURVES.items()):
    if not (found := cells.seeds(*path)):
      continue
    first = found[0]  # its measures by frames
    frames = [int(n) for n in first]
    if not left.lines:
      left.plot(
        frames,
        [bound([one]) for one in first.values()],
        color="grey",
        ls=":",
        label="shown, else chance",
      )
    shares = [interval([right(m[n]) for m in found]) for n in first]
    style = {"marker": "o", "ms": 4, "label": name, "color": f"C{i}"}
    _draw_shares(left, frames, shares, **style)
    _draw_shares(right_ax, [one["tokens"] for one in first.values()], shares, **style)
  left.set(xlabel="sampled frames", ylabel="right answers")
  right_ax.set(xlabel="visual tokens per layer, mean")
  if left.lines:
    left.legend(frameon=False, fontsize=7)
  return figure


def _draw_shares(axes: Any, x: ArrayLike, shares: Sequence[RightShare], **style: Any) -> None:
  """Shares with their intervals, joined by a line."""
  error = np.array([[s.mean - s.low, s.high - s.mean] for s in shares]).T
  axes.errorbar(x, [s.mean for s in shares], error, capsize=2, **style)


def plot_bias(cells: Cells) -> Any:
  """The position bias by place in films of 128 and 32 scenes, without compression and after SCT.

  Relevance of scenes with nothing to see and of shots, and how often the scene that is needed is
  first.
  """
  import matplotlib.pyplot as plt

  rows = [(name, place, modes) for name, place, modes in cells.selections() if name != LONGEST]
  figure, grid = plt.subplots(
    len(rows) or 1,
    3,
    figsize=(11, 2.8 * (len(rows) or 1)),
    sharex=True,
    sharey="col",
    squeeze=False,
    layout="constrained",
  )
  for axes, (name, place, modes) in zip(grid, rows):
    scored = {mode: of for mode, of in modes.items() if mode != "uniform"}
    for k, (mode, of) in enumerate(scored.items()):
      # beside each other, so that intervals don't hide each other
      _draw_mode(axes, mode, of, place, 0.012 * (k - len(scored) / 2))
    axes[2].axhline(
      np.mean([1 / shots for shots in (3, 4, 5)]), color="grey", lw=1, ls=":", label="any shot"
    )
    films_of, model = name.split(", ", 1)
    axes[0].set_ylabel(f"{films_of}\n{model}\nscore / the film's mean")
    axes[2].set_ylabel("share of questions")
  titles = ("scenes with nothing to see", "shots", "needed scene ranked first")
  for column, title in zip(grid.T, titles, strict=True):
    column[0].set(title=title, ylim=(0, None))
    column[-1].set_xlabel("place in the film")
  if rows:
    legend = grid[0][2].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=6, frameon=False)
  return figure


def _draw_mode(
  axes: Any,
  mode: str,
  measures: Sequence[Measure],
  place: Sequence[float | None],
  beside: float,
) -> None:
  """A mode of QC-Comp in the three plots of some films. beside: moves the last one's marks."""
  scorer, _, answer = mode.partition("_")
  style: dict[str, Any] = {
    "color": f"C{('global', 'local', 'aligned').index(scorer)}",
    "marker": "o",
    "ms": 3,
    "ls": "--" if answer else "-",
    "label": f"{scorer}, the answer's row" if answer else mode,
  }
  profile = np.mean([m["relevance"] for m in measures], axis=0)  # [2, places]
  x = (np.arange(profile.shape[1]) + 0.5) / profile.shape[1]
  for ax, relevance in zip(axes[:2], profile, strict=True):
    ax.plot(x, relevance, **style)
  quarters = by_quarter(place, [ranked_first(m) for m in measures])
  x = (np.arange(len(quarters)) + 0.5) / len(quarters) + beside
  _draw_shares(axes[2], x, [interval(one) for one in quarters], lw=1, **style)


PLOTS = {"study_frames": plot_frames, "study_bias": plot_bias}
