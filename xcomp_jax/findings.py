"""What the study's cells say: tables with intervals, and plots. `xcomp_jax.study` makes the cells."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from xcomp_jax.films import KINDS

RESAMPLES = 4000
CHANCE = {"needle": 1 / 6, "attribute": 1 / 4, "motion": 1 / 4, "order": 1 / 6, "count": 1 / 3, "whole": 1 / 4}  # of what is asked


@dataclasses.dataclass(frozen=True)
class Share:
  """A share of right answers and its 95% interval."""

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{100 * self.mean:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def interval(
  seeds: Sequence[Bool[np.ndarray, "films kinds"]], against: Sequence[Bool[np.ndarray, "films kinds"]] = (), *, same: bool = False
) -> Share:
  """The mean over seeds, films and kinds, or its difference to another one over the same films.

  The interval is that of a bootstrap over films, whose questions go together, and over seeds, where there are several.

  same: a seed is the same model on both sides; else seeds are drawn apart, as trainings are.
  """
  rng = np.random.default_rng(0)
  each = lambda rows: np.stack([np.asarray(r, float).mean(1) for r in rows])  # [seeds, films]
  draw = lambda rows: rng.integers(len(rows), size=(RESAMPLES, len(rows)))
  ours = each(seeds)
  films, drawn = rng.integers(ours.shape[1], size=(RESAMPLES, ours.shape[1])), draw(ours)

  def means(rows, drawn):  # [RESAMPLES]
    return np.stack([rows[:, chosen].mean(1)[seed].mean() for seed, chosen in zip(drawn, films, strict=True)])

  values, mean = means(ours, drawn), ours.mean()
  if against:
    theirs = each(against)
    values, mean = values - means(theirs, drawn if same else draw(theirs)), mean - theirs.mean()
  return Share(float(mean), *map(float, np.percentile(values, (2.5, 97.5))))


def right(measure: Mapping[str, Any], key: str = "right") -> Bool[np.ndarray, "films kinds"]:
  """The bits of a measure, a row for each film and a column for each of KINDS."""
  return (np.frombuffer(measure[key].encode(), np.uint8) == ord("1")).reshape(-1, len(KINDS))


class Cells:
  """The results of the cells in a folder, by name."""

  def __init__(self, folder: pathlib.Path):
    self.results = {file.stem: json.loads(file.read_text())["result"] for file in sorted(folder.glob("*.json"))}

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


def rows(names: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
  """A table in Markdown."""
  return "\n".join(["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *("| " + " | ".join(row) + " |" for row in columns)])


def _share(measures: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]] = (), key: str = "right", same: bool = False) -> str:
  if not measures:
    return "-"
  return str(interval([right(m, key) for m in measures], [right(m, key) for m in against], same=same))


def _bound(measure: Mapping[str, Any]) -> str:
  """What is right if all questions are answered for which enough was shown, and the others by chance."""
  hits = right(measure, "hits")
  return f"{100 * np.where(hits, 1, list(CHANCE.values())).mean():.1f}"


def compression(cells: Cells, rules: Sequence[str]) -> str:
  """Accuracy of keep rules and schedules, before and after tuning under them (paper, Tables 2 and 3)."""
  after = lambda rule: cells.seeds(f"tune_{rule}_{{seed}}", "heldout", rule)
  out = []
  for rule in rules:
    free, tuned = cells.seeds("base", "heldout", rule), after(rule)
    if free:
      without = cells.seeds("tune_none_{seed}", "heldout", rule)
      others = (after(other) if other != rule else [] for other in ("none", "progressive"))
      against = [_share(tuned, other) if tuned and other else "-" for other in (free, *others)]
      out.append([rule, _share(free), _share(without), _share(tuned), *against, str(len(tuned)), *_cost([*free, *tuned])])
  names = ["", "not tuned for", "tuned without", "after SCT", "gained", "against none", "against progressive", "seeds"]
  return rows([*names, *COST], out)


COST = ("visual tokens per layer", "GFLOP", "ms per question")


def _cost(measures: Sequence[Mapping[str, Any]]) -> list[str]:
  seconds = np.median([m["seconds"] for m in measures])
  return [f"{measures[0]['tokens']:.0f}", f"{1000 * measures[0]['TFLOP']:.3f}", f"{1000 * seconds:.0f}"]


def by_kind(cells: Cells) -> str:
  """Accuracy by kind of question."""
  choices = {"no compression": ("base", "heldout", "none"), "no compression, tuned": ("tune_none_{seed}", "heldout", "none")}
  choices |= {"progressive, not tuned for": ("base", "heldout", "progressive")}
  choices |= {"tuned without compression, then progressive": ("tune_none_{seed}", "heldout", "progressive")}
  choices |= {f"{rule}, tuned": (f"tune_{rule}_{{seed}}", "heldout", rule) for rule in ("progressive", "uniform", "stepwise", "heuristic", "early")}
  out = [["chance", *(f"{100 * CHANCE[kind]:.0f}" for kind in KINDS)]]
  for name, path in choices.items():
    if found := cells.seeds(*path):
      out.append([name, *(str(interval([right(m)[:, k : k + 1] for m in found])) for k in range(len(KINDS)))])
  return rows(["", *KINDS], out)


def by_frames(cells: Cells) -> str:
  """Accuracy against frames that are sampled of a longer film (paper, Figure 1)."""
  out = []
  for name, path in FRAMES.items():
    if found := cells.seeds(*path):
      if not out:
        out.append(["chance", *[f"{100 * np.mean(list(CHANCE.values())):.1f}"] * len(found[0])])
        out.append(["all that was shown answered", *(_bound(one) for one in found[0].values())])
      out.append([name, *(_share([m[frames] for m in found]) for frames in found[0])])
  for name, rule in (("no compression", "none"), ("LP-Comp", "progressive")):  # tuned or not
    found = cells.seeds("base_frames", "wide", rule) + cells.seeds(f"tune_{rule}_{{seed}}", "wide", rule)
    if found:
      spent = zip(*(_cost([m[frames] for m in found]) for frames in found[0]))
      out += [[f"{name}: {what}", *values] for what, values in zip(COST, spent, strict=True)]
  shown = next((found[0] for path in FRAMES.values() if (found := cells.seeds(*path))), ())
  return rows(["", *(f"{n} frames" for n in shown)], out)


FRAMES = {
  "no compression": ("base_frames", "wide", "none"), "no compression, tuned": ("tune_none_{seed}", "wide", "none"),
  "LP-Comp, not tuned for": ("base_frames", "wide", "progressive"), "LP-Comp after SCT": ("tune_progressive_{seed}", "wide", "progressive"),
  "the early schedule after SCT": ("tune_early_{seed}", "wide", "early"),
}  # fmt: skip


LONG = {"128 scenes, no compression": ("base_select", "long"), "128 scenes, LP-Comp after SCT": ("select_{seed}", "long")}
HOUR = {"512 scenes, LP-Comp after SCT": ("official_{seed}", "hour")}


def selection(cells: Cells) -> str:
  """Accuracy, and how often all that is needed was selected, by mode of QC-Comp (paper, Tables 4 to 6)."""
  out = []
  for name, path in (LONG | HOUR).items():
    found = cells.seeds(*path)
    of = lambda mode, found=found: [m[mode] for m in found]
    for mode in found[0] if found else ():
      if mode != "place" and all(mode in one for one in found):
        against = _share(of(mode), of("local"), same=True) if mode != "local" else "-"
        # The official mode scores four scenes together.
        best = str(interval([first(m) for m in of(mode)])) if mode not in ("uniform", "official") else "-"
        hits, bound = _share(of(mode), key="hits"), _bound(of(mode)[0])
        shown = mode.replace("_answer", ", the answer's row")
        out.append([name, shown, _share(of(mode)), against, bound, hits, best, str(len(found)), *_cost(of(mode))])
  names = ["", "frames by", "right", "against local", "all that was selected answered", "all that is needed selected", "needed scene first"]
  return rows([*names, "seeds", *COST], out)


def first(measure: Mapping[str, Any]) -> Bool[np.ndarray, "films kinds"]:
  """Where the one scene that is needed has the highest score; of the kinds that need one."""
  ranks = np.array(measure["rank"], float).reshape(-1, len(KINDS))
  return ranks[:, [kind in ("needle", "attribute", "motion") for kind in KINDS]] == 0


TABLES = {
  "compression": lambda cells: compression(cells, ("none", "heuristic", "stepwise", "progressive", "uniform")),
  "others": lambda cells: compression(cells, ("progressive", "early", "late", "average")),
  "kinds": by_kind,
  "frames": by_frames,
  "selection": selection,
}


# --- plots ------------------------------------------------------------------------------------------------------------


def plot_frames(cells: Cells) -> Any:
  """Figure 1 in miniature: accuracy against visual tokens that a layer works on."""
  import matplotlib.pyplot as plt

  figure, (left, right_ax) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
  for i, (name, path) in enumerate(FRAMES.items()):
    if not (found := cells.seeds(*path)):
      continue
    frames = list(found[0])
    shares = [interval([right(m[n]) for m in found]) for n in frames]
    y = np.array([s.mean for s in shares])
    error = np.array([[s.mean - s.low, s.high - s.mean] for s in shares]).T
    for ax, x in ((left, [int(n) for n in frames]), (right_ax, [found[0][n]["tokens"] for n in frames])):
      ax.errorbar(x, y, error, marker="o", ms=4, capsize=2, label=name, color=f"C{i}")
  left.set(xlabel="sampled frames", ylabel="right answers")
  right_ax.set(xlabel="visual tokens per layer, mean", xscale="log")
  right_ax.set_xticks([50, 100, 200, 400, 800], labels=["50", "100", "200", "400", "800"])
  right_ax.minorticks_off()
  if left.lines:
    left.legend(frameon=False, fontsize=8)
  return figure


def plot_bias(cells: Cells) -> Any:
  """The position bias by place in the film, without compression and after SCT.

  Relevance of scenes with nothing to see and of shots, and how often what is needed is first.
  """
  import matplotlib.pyplot as plt

  sources = {name.split(", ")[1]: cells.seeds(*path) for name, path in LONG.items()}
  sources = {name: found for name, found in sources.items() if found}
  figure, grid = plt.subplots(len(sources) or 1, 3, figsize=(11, 3 * (len(sources) or 1)), sharex=True, sharey="col", squeeze=False)
  for axes, (name, found) in zip(grid, sources.items()):
    for mode in (mode for mode in ("global", "local", "aligned", "global_answer", "local_answer") if mode in found[0]):
      name_of, _, answer = mode.partition("_")
      style: dict[str, Any] = {"color": f"C{('global', 'local', 'aligned').index(name_of)}", "marker": "o", "ms": 3, "label": mode}
      if answer:
        style |= {"ls": "--", "label": f"{name_of}, the answer's row"}
      else:
        profile = np.mean([m[mode]["relevance"] for m in found], axis=0)
        x = (np.arange(profile.shape[1]) + 0.5) / profile.shape[1]
        axes[0].plot(x, profile[0], **style)
        axes[1].plot(x, profile[1], **style)
      place, rank = (np.array(values, float) for values in (found[0]["place"], [m[mode]["rank"] for m in found]))
      quarters = [rank[:, np.floor(place * 4) == quarter] == 0 for quarter in range(4)]  # where one scene is needed
      axes[2].plot((np.arange(4) + 0.5) / 4, [one.mean() if one.size else np.nan for one in quarters], **style)
    axes[2].axhline(np.mean([1 / shots for shots in (3, 4, 5)]), color="grey", lw=1, ls=":")  # one of a film's shots
    axes[0].set_ylabel(f"{name}\nof the film's mean")
  for ax, title in zip(grid[0], ("relevance: nothing to see", "relevance: shots", "needed scene ranked first"), strict=True):
    ax.set(title=title, ylim=(0, None))
  if sources:
    grid[-1][2].legend(frameon=False, fontsize=7)
  for ax in grid[-1]:
    ax.set_xlabel("place in the film")
  return figure


PLOTS = {"study_frames": plot_frames, "study_bias": plot_bias}


def report(folder: pathlib.Path, page: pathlib.Path | None = None, figures: pathlib.Path | None = None) -> str:
  """All tables, printed; with a page also put between its marks, and the plots into a folder.

  Raises:
    ValueError: a table's marks are not on the page, or twice.
  """
  cells = Cells(folder)
  made = {name: table(cells) for name, table in TABLES.items()}
  text = "\n\n".join(f"{name}\n{table}" for name, table in made.items())
  print(text)
  if page is not None and page.exists():
    content = page.read_text()
    for name, table in made.items():
      place = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
      content, found = re.subn(place, lambda m, t=table: f"{m[1]}\n{t}\n\n{m[2]}", content, flags=re.DOTALL)
      if found != 1:
        raise ValueError(f"{page} has {found} places between <!-- {name} --> and <!-- end -->; there must be one")
    page.write_text(content)
  if figures is not None:
    for name, plot in PLOTS.items():
      figure = plot(cells)
      figure.savefig(figures / f"{name}.png", dpi=110, bbox_inches="tight")
  return text
