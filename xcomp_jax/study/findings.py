"""What the study's cells say: tables with intervals, and plots. `xcomp_jax.study` makes the
cells.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from xcomp_jax.files import write_file
from xcomp_jax.inputs import read_json
from xcomp_jax.synthetic.films import KINDS

RESAMPLES = 4000
# Shares that are right without looking a thing up: of the best constant answer, and of an answer
# about any shot instead of the one that is asked about, of order one with a colour that the
# question doesn't have. Who sees the shots can count them.
CHANCE = {
  "needle": 1 / 6,
  "attribute": 1 / 4,
  "motion": 1 / 4,
  "order": 1 / 6,
  "count": 1 / 3,
  "whole": 1 / 4,
}
ANY_SHOT = {
  "needle": 0.26,
  "attribute": 0.49,
  "motion": 0.45,
  "order": 0.32,
  "count": 1,
  "whole": 0.60,
}
# rules that are also tuned for 1,200 steps, and measured with ever more clips
LONGER = (
  "none",
  "progressive",
  "early",
)
SINGLE = np.isin(KINDS, ("needle", "attribute", "motion"))  # kinds that need one scene


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
  films = rng.integers(len(seeds[0]), size=(RESAMPLES, len(seeds[0])))

  def draw(rows):
    return rng.integers(len(rows), size=(RESAMPLES, len(rows)))

  def share(rows, drawn):  # of all resamples, and as it is
    rows = np.stack([np.asarray(r, float) for r in rows])
    sums, counts = np.nansum(rows, 2), (~np.isnan(rows)).sum(2)

    def again(of):
      return np.take_along_axis(of[:, films].sum(2).T, drawn, 1).sum(1)  # [RESAMPLES]

    return np.append(again(sums), sums.sum()) / np.append(again(counts), counts.sum())

  drawn = draw(seeds)
  with np.errstate(invalid="ignore"):  # where no question counts
    values = share(seeds, drawn)
    if against:
      values -= share(against, drawn if same else draw(against))
  *again, mean = values
  if np.isnan(mean):
    return RightShare(mean, mean, mean)
  if not against and mean in (0, 1):
    far = 0.025 ** (1 / np.any(~np.isnan(np.asarray(seeds, float)), axis=(0, 2)).sum())
    return RightShare(mean, far, 1.0) if mean else RightShare(mean, 0.0, 1 - far)
  return RightShare(float(mean), *map(float, np.nanpercentile(again, (2.5, 97.5))))


def right(measure: Mapping[str, Any], key: str = "right") -> Bool[np.ndarray, "films kinds"]:
  """The bits of a measure, a row for each film and a column for each of KINDS."""
  return (np.frombuffer(measure[key].encode(), np.uint8) == ord("1")).reshape(-1, len(KINDS))


class Cells:
  """The results of the cells in a folder, by name."""

  def __init__(self, folder: pathlib.Path):
    self.results = {
      file.stem: read_json(file, ValueError)["result"] for file in sorted(folder.glob("*.json"))
    }

  def seeds(self, *path: str) -> list[Mapping[str, Any]]:
    """The measures at a path, whose first name may have {seed}; of every seed that is there."""
    pattern = re.compile(re.escape(path[0]).replace(r"\{seed\}", r"\d+") + "$")
    found = []
    for name in sorted(self.results):
      if pattern.match(name):
        value = self.results[name]
        for key in path[1:]:
          value = value.get(key) if value else None
        if value:
          found.append(value)
    return found


def markdown_table(names: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
  """A table in Markdown."""
  return "\n".join(
    [
      "| " + " | ".join(names) + " |",
      "|---" * len(names) + "|",
      *("| " + " | ".join(row) + " |" for row in columns),
    ]
  )


def _share(
  measures: Sequence[Mapping[str, Any]],
  against: Sequence[Mapping[str, Any]] = (),
  key: str = "right",
  same: bool = False,
) -> str:
  if not measures:
    return "-"
  return str(
    interval([right(m, key) for m in measures], [right(m, key) for m in against], same=same)
  )


def bound(measures: Sequence[Mapping[str, Any]]) -> float:
  """What is right if all questions are answered for which enough was shown, and the others by the
  best constant answer.
  """
  return float(
    np.mean([np.where(right(m, "hits"), 1, [CHANCE[kind] for kind in KINDS]) for m in measures])
  )


def compression(cells: Cells, rules: Sequence[str]) -> str:
  """Accuracy of keep rules and schedules, before and after tuning under them (paper, Tables 2 and
  3).
  """

  def after(rule):
    return cells.seeds(f"tune_{rule}_{{seed}}", "heldout", rule)

  out = []
  for rule in rules:
    free, tuned = cells.seeds("base", "heldout", rule), after(rule)
    if free:
      without = cells.seeds("tune_none_{seed}", "heldout", rule)
      others = (
        after(other) if rule not in ("none", other) else [] for other in ("none", "progressive")
      )
      less = [
        _share(tuned, other) if tuned and other else "-"
        for other in (free, without if rule != "none" else [], *others)
      ]
      # Costs of cells that measured all rules: machines differ, and so does one from hour to hour.
      out.append(
        [
          rule,
          _share(free),
          _share(without),
          _share(tuned),
          *less,
          str(len(tuned)),
          *_cost([*free, *without]),
        ]
      )
  names = [
    "",
    "not tuned for",
    "tuned without",
    "after SCT",
    "less not tuned for",
    "less tuned without",
    "less none, tuned",
    "less progressive",
  ]
  return markdown_table([*names, "seeds", *COST], out)


COST = ("visual tokens per layer", "GFLOP", "ms per question")


def _cost(measures: Sequence[Mapping[str, Any]]) -> list[str]:
  seconds = np.median([m["seconds"] for m in measures])
  return [
    f"{measures[0]['tokens']:.0f}",
    f"{1000 * measures[0]['TFLOP']:.3f}",
    f"{1000 * seconds:.0f}",
  ]


def by_kind(cells: Cells) -> str:
  """Accuracy by kind of question."""
  choices = {
    "no compression": ("base", "heldout", "none"),
    "no compression, tuned": ("tune_none_{seed}", "heldout", "none"),
  }
  choices |= {"progressive, not tuned for": ("base", "heldout", "progressive")}
  choices |= {
    "tuned without compression, then progressive": ("tune_none_{seed}", "heldout", "progressive")
  }
  tuned = ("progressive", "uniform", "stepwise", "heuristic", "early", "late", "average")
  choices |= {f"{rule}, tuned": (f"tune_{rule}_{{seed}}", "heldout", rule) for rule in tuned}
  choices |= {
    f"{rule}, tuned for 1,200 steps": (f"longer_{rule}_{{seed}}", "heldout", rule)
    for rule in LONGER
  }
  out = [
    ["chance", *(f"{100 * CHANCE[kind]:.0f}" for kind in KINDS)],
    ["by any shot", *(f"{100 * ANY_SHOT[kind]:.0f}" for kind in KINDS)],
  ]
  for name, path in choices.items():
    if found := cells.seeds(*path):
      out.append(
        [
          name,
          *(str(interval([right(m)[:, k : k + 1] for m in found])) for k in range(len(KINDS))),
        ]
      )
  return markdown_table(["", *KINDS], out)


def by_frames(cells: Cells) -> str:
  """Accuracy against frames that are sampled of a longer film (paper, Figure 1)."""
  out = []
  curves = CURVES | LONGER_CURVES
  for name, path in curves.items():
    if found := cells.seeds(*path):
      if not out:
        out.append(["chance", *[f"{100 * np.mean(list(CHANCE.values())):.1f}"] * len(found[0])])
        out.append(
          ["shown, else chance", *(f"{100 * bound([one]):.1f}" for one in found[0].values())]
        )
      out.append([name, *(_share([m[frames] for m in found]) for frames in found[0])])
  for name, other, factor in LESS:
    some, less = cells.seeds(*curves[name]), cells.seeds(*curves[other])
    if some and less:
      pairs = ((n, str(int(n) // factor)) for n in some[0])
      compared = [
        _share([m[n] for m in some], [m[half] for m in less]) if half in less[0] else "-"
        for n, half in pairs
      ]
      out.append(
        [
          f"{name} less {other}, with {'half of the' if factor == 2 else 'as many'} frames",
          *compared,
        ]
      )
  for name in ("no compression", "LP-Comp, not tuned for"):  # of one cell: machines differ
    if found := cells.seeds(*CURVES[name]):
      spent = zip(*(_cost([found[0][frames]]) for frames in found[0]))
      out += [
        [f"{name.split(',')[0]}: {what}", *values] for what, values in zip(COST, spent, strict=True)
      ]
  shown = next((found[0] for path in CURVES.values() if (found := cells.seeds(*path))), ())
  return markdown_table(["", *(f"{n} frames" for n in shown)], out)


CURVES = {
  "no compression": ("base_frames", "wide", "none"),
  "no compression, tuned": ("tune_none_{seed}", "wide", "none"),
  "LP-Comp, not tuned for": ("base_frames", "wide", "progressive"),
  "LP-Comp after SCT": ("tune_progressive_{seed}", "wide", "progressive"),
  "the early schedule after SCT": ("tune_early_{seed}", "wide", "early"),
}
LONGER_CURVES = {  # in the table alone: the plot would be too full
  f"{name}, 1,200 steps": (f"longer_{rule}_{{seed}}", "wide", rule)
  for name, rule in zip(("no compression", "LP-Comp", "the early schedule"), LONGER, strict=True)
}
# curves that are compared, the second one with a part of the frames; half of them, without
# compression, are about as many tokens
LESS = (
  ("LP-Comp after SCT", "no compression, tuned", 1),
  ("LP-Comp after SCT", "no compression, tuned", 2),
  ("the early schedule after SCT", "LP-Comp after SCT", 1),
  ("LP-Comp, 1,200 steps", "no compression, 1,200 steps", 1),
  ("LP-Comp, 1,200 steps", "no compression, 1,200 steps", 2),
)


def longer(cells: Cells) -> str:
  """What a tuning three times as long changes, on films of 12 scenes and on all frames of those of
  24.
  """
  out = []
  for films_of, split, *frames in (
    ("12 scenes", "heldout"),
    ("24 scenes, 48 frames", "wide", "48"),
  ):

    def of(cell, rule, split=split, frames=frames):
      return cells.seeds(f"{cell}_{rule}_{{seed}}", split, rule, *frames)

    for rule in LONGER:
      if long := of("longer", rule):
        others = [
          of("tune", rule),
          *(
            of("longer", other) if rule not in ("none", other) else []
            for other in ("none", "progressive")
          ),
        ]
        less = [_share(long, other) if other else "-" for other in others]
        out.append(
          [
            films_of,
            rule,
            _share(others[0]),
            _share(long),
            *less,
            f"{len(others[0])} and {len(long)}",
          ]
        )
  return markdown_table(
    [
      "films of",
      "rule",
      "400 steps",
      "1,200 steps",
      "gained",
      "less none, as long",
      "less progressive, as long",
      "seeds",
    ],
    out,
  )


MODELS = {
  "no compression, tuned": "select_none_{seed}",
  "LP-Comp after SCT": "select_progressive_{seed}",
}
SELECTIONS = {f"128 scenes, {name}": (cell, "long") for name, cell in MODELS.items()}
SELECTIONS |= {f"32 scenes, {name}": (cell, "window") for name, cell in MODELS.items()}
SELECTIONS |= {"512 scenes, LP-Comp after SCT": ("official_{seed}", "hour")}


def selection(cells: Cells) -> str:
  """Accuracy and cost by mode of QC-Comp (paper, Tables 4 to 6)."""
  out = []
  for name, mode, shown, of in _selections(cells):
    less = []
    for other in ("global", "local"):
      other += "_answer" if mode.endswith("_answer") else ""
      less.append(_share(of(mode), of(other), same=True) if mode != other and of(other) else "-")
    few = (
      str(interval([right(m, "few")[:, SINGLE] for m in of(mode)])) if mode != "official" else "-"
    )
    _, *spent = _cost(of(mode))  # tokens are those of answering alone
    out.append(
      [
        name,
        shown,
        _share(of(mode)),
        *less,
        f"{100 * bound(of(mode)):.1f}",
        few,
        str(len(of(mode))),
        *spent,
      ]
    )
  names = [
    "",
    "frames by",
    "right",
    "less global",
    "less local",
    "selected, else chance",
    "right from two scenes",
    "seeds",
  ]
  return markdown_table([*names, *COST[1:]], out)


def retrieval(cells: Cells) -> str:
  """How often QC-Comp selects all that is needed, and how often the one scene that is has the
  highest score.
  """
  out = []
  for name, mode, shown, of in _selections(cells):
    # The official mode scores four scenes together.
    kinds = (
      [[ranked_first(m)[:, k : k + 1] for m in of(mode)] for k in range(SINGLE.sum())]
      if mode not in ("uniform", "official")
      else []
    )
    first = [
      str(interval([ranked_first(m, by) for m in of(mode)])) if kinds else "-"
      for by in ("rank", "other")
    ]
    out.append(
      [
        name,
        shown,
        _share(of(mode), key="hits"),
        *first,
        ", ".join(f"{100 * np.mean(one):.0f}" for one in kinds) or "-",
      ]
    )
  single = ", ".join(kind for kind, one in zip(KINDS, SINGLE) if one)
  return markdown_table(
    [
      "",
      "frames by",
      "all that is needed selected",
      "needed scene first",
      "by another question's scores",
      f"first, by kind ({single})",
    ],
    out,
  )


def _selections(
  cells: Cells,
) -> Iterator[tuple[str, str, str, Callable[[str], list[Mapping[str, Any]]]]]:
  """Rows of selection: films and model, mode, how it is shown, and the measures of a mode by every
  seed.
  """
  for name, path in SELECTIONS.items():
    seeds = cells.seeds(*path)
    modes = _modes(seeds)

    def of(mode, seeds=seeds, modes=modes):
      return [m[mode] for m in seeds] if mode in modes else []

    for mode in modes:
      yield name, mode, mode.replace("_answer", ", the answer's row"), of


def _modes(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """Those that all seeds have."""
  return [
    mode
    for mode in (found[0] if found else ())
    if mode != "place" and all(mode in one for one in found)
  ]


def ranked_first(measure: Mapping[str, Any], key: str = "rank") -> Bool[np.ndarray, "films kinds"]:
  """Where the one scene that is needed has the highest score; of the kinds that need one. key: by
  whose scores.
  """
  return _single(measure[key]) == 0


def _single(values: Sequence[float | None]) -> Float[np.ndarray, "films kinds"]:
  return np.array(values, float).reshape(-1, len(KINDS))[:, SINGLE]


QUARTERS = ("first", "second", "third", "last")


def position_bias(cells: Cells) -> str:
  """Position bias: what happens to the one scene that is needed, by the quarter of the film that it
  is in.
  """
  out = []
  for name, path in SELECTIONS.items():
    found = cells.seeds(*path)
    for mode in (mode for mode in _modes(found) if mode not in ("uniform", "official")):
      measures = [m[mode] for m in found]
      quarters = by_quarter(found, [ranked_first(m) for m in measures])
      of = [str(interval(one)) for one in quarters]
      of.append(str(interval(quarters[-1], quarters[0], same=True)))
      hits = by_quarter(found, [right(m, "hits")[:, SINGLE] for m in measures])
      of.append(", ".join(f"{100 * np.nanmean(one):.0f}" for one in hits))
      scores = by_quarter(found, [_single(m["score"]) for m in measures])
      of.append(", ".join(f"{np.nanmean(one):.1f}" for one in scores))
      out.append([name, mode.replace("_answer", ", the answer's row"), *of])
  return markdown_table(
    ["", "frames by", *QUARTERS, "last less first", "selected, by quarter", "score, by quarter"],
    out,
  )


def by_quarter(
  found: Sequence[Mapping[str, Any]], values: Sequence[np.ndarray]
) -> list[list[Float[np.ndarray, "films kinds"]]]:
  """Values [films, 3] of every seed, for each quarter of the film: nan where the needed scene is
  elsewhere.
  """
  quarter = np.floor(_single(found[0]["place"]) * len(QUARTERS))
  return [[np.where(quarter == k, value, np.nan) for value in values] for k in range(len(QUARTERS))]


TABLES = {
  "compression": lambda cells: compression(
    cells, ("none", "heuristic", "stepwise", "progressive", "uniform")
  ),
  "others": lambda cells: compression(cells, ("progressive", "early", "late", "average")),
  "kinds": by_kind,
  "longer": longer,
  "frames": by_frames,
  "selection": selection,
  "retrieval": retrieval,
  "places": position_bias,
}


# --- plots
# ----------------------------------------------------------------------------------------


def plot_frames(cells: Cells) -> Any:
  """Figure 1 in miniature: accuracy against frames, and against visual tokens that a layer works
  on.
  """
  import matplotlib.pyplot as plt

  figure, (left, right_ax) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
  for i, (name, path) in enumerate(CURVES.items()):
    if not (found := cells.seeds(*path)):
      continue
    frames = list(found[0])
    if not left.lines:
      left.plot(
        [int(n) for n in frames],
        [bound([found[0][n]]) for n in frames],
        color="grey",
        ls=":",
        label="shown, else chance",
      )
    shares = [interval([right(m[n]) for m in found]) for n in frames]
    for ax, x in (
      (left, [int(n) for n in frames]),
      (right_ax, [found[0][n]["tokens"] for n in frames]),
    ):
      ax.errorbar(
        x,
        [s.mean for s in shares],
        _error(shares),
        marker="o",
        ms=4,
        capsize=2,
        label=name,
        color=f"C{i}",
      )
  left.set(xlabel="sampled frames", ylabel="right answers")
  right_ax.set(xlabel="visual tokens per layer, mean")
  if left.lines:
    left.legend(frameon=False, fontsize=7)
  return figure


def _error(shares: Sequence[RightShare]) -> np.ndarray:
  return np.array([[s.mean - s.low, s.high - s.mean] for s in shares]).T


def plot_bias(cells: Cells) -> Any:
  """The position bias by place in films of 128 and 32 scenes, without compression and after SCT.

  Relevance of scenes with nothing to see and of shots, and how often the scene that is needed is
  first.
  """
  import matplotlib.pyplot as plt

  sources = {
    name: seeds
    for name, path in SELECTIONS.items()
    if path[1] != "hour" and (seeds := cells.seeds(*path))
  }
  figure, grid = plt.subplots(
    len(sources) or 1,
    3,
    figsize=(11, 2.8 * (len(sources) or 1)),
    sharex=True,
    sharey="col",
    squeeze=False,
    layout="constrained",
  )
  for axes, (name, seeds) in zip(grid, sources.items()):
    modes = [mode for mode in _modes(seeds) if mode != "uniform"]
    for k, mode in enumerate(modes):
      name_of, _, answer = mode.partition("_")
      style: dict[str, Any] = {
        "color": f"C{('global', 'local', 'aligned').index(name_of)}",
        "marker": "o",
        "ms": 3,
        "label": mode,
      }
      if answer:
        style |= {"ls": "--", "label": f"{name_of}, the answer's row"}
      profile = np.mean([m[mode]["relevance"] for m in seeds], axis=0)
      x = (np.arange(profile.shape[1]) + 0.5) / profile.shape[1]
      axes[0].plot(x, profile[0], **style)
      axes[1].plot(x, profile[1], **style)
      shares = [interval(one) for one in by_quarter(seeds, [ranked_first(m[mode]) for m in seeds])]
      x = (np.arange(4) + 0.5) / 4 + 0.012 * (k - len(modes) / 2)  # beside each other
      axes[2].errorbar(x, [s.mean for s in shares], _error(shares), capsize=2, lw=1, **style)
    axes[2].axhline(
      np.mean([1 / shots for shots in (3, 4, 5)]), color="grey", lw=1, ls=":", label="any shot"
    )
    films_of, model = name.split(", ", 1)
    axes[0].set_ylabel(f"{films_of}\n{model}\nscore / the film's mean")
    axes[2].set_ylabel("share of questions")
  for ax, title in zip(
    grid[0], ("scenes with nothing to see", "shots", "needed scene ranked first"), strict=True
  ):
    ax.set(title=title, ylim=(0, None))
  if sources:
    figure.legend(
      *grid[0][2].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
  for ax in grid[-1]:
    ax.set_xlabel("place in the film")
  return figure


PLOTS = {"study_frames": plot_frames, "study_bias": plot_bias}


def report_findings(
  folder: pathlib.Path, page: pathlib.Path | None = None, figures: pathlib.Path | None = None
) -> str:
  """All tables, printed; with a page also put between its marks, and the plots into a folder.

  Raises:
    ValueError: there are no cells, or a table's marks are not on the page, or twice.
  """
  cells = Cells(folder)
  if not cells.results:
    raise ValueError(
      f"{folder} has no cells to report; the same command without --report makes them"
    )
  made = {name: table(cells) for name, table in TABLES.items()}
  text = "\n\n".join(f"{name}\n{table}" for name, table in made.items())
  print(text)
  if page is not None and page.exists():
    content = page.read_text()
    for name, table in made.items():
      place = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
      content, found = re.subn(
        place, lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", content, flags=re.DOTALL
      )
      if found != 1:
        raise ValueError(
          f"{page} has {found} places between <!-- {name} --> and <!-- end -->; there must be one"
        )
    write_file(page, content)
  if figures is not None:
    for name, plot in PLOTS.items():
      figure = plot(cells)
      figure.savefig(figures / f"{name}.png", dpi=110, bbox_inches="tight")
  return text
