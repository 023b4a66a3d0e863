"""What the study's cells say: tables with intervals. `xcomp_jax.study` makes the cells."""

import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from xcomp_jax.files import write_file
from xcomp_jax.study.cell_results import (
  ANY_SHOT,
  CHANCE,
  CURVES,
  LONGER,
  QUARTERS,
  SINGLE,
  Cells,
  Measure,
  bound,
  by_quarter,
  ranked_first,
  right,
  single,
)
from xcomp_jax.study.figures import PLOTS
from xcomp_jax.study.intervals import interval
from xcomp_jax.study.miniature import StudyError
from xcomp_jax.synthetic.films import KINDS

COST = ("visual tokens per layer", "GFLOP", "ms per question")
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


Rows = Iterator[Sequence[str]]  # of a table; the first one has the names of its columns


def markdown_table(rows: Rows) -> str:
  """A table in Markdown."""
  head, *body = ("| " + " | ".join(row) + " |" for row in rows)
  return "\n".join([head, "|---" * (head.count(" | ") + 1) + "|", *body])


def _share(measures: Sequence[Measure], key: str = "right") -> str:
  return str(interval([right(m, key) for m in measures])) if measures else "-"


def _less(measures: Sequence[Measure], others: Sequence[Measure], same: bool = False) -> str:
  """How much more is right than in others."""
  if not measures or not others:
    return "-"
  return str(interval([right(m) for m in measures], [right(m) for m in others], same=same))


def _reference_rules(of: Callable[[str], list[Measure]], rule: str) -> list[list[Measure]]:
  """What a rule is compared with: the measures of no compression and of the progressive rule."""
  return [of(other) if rule not in ("none", other) else [] for other in ("none", "progressive")]


def _cost(measures: Sequence[Measure]) -> list[str]:
  return [
    f"{measures[0]['tokens']:.0f}",
    f"{1000 * measures[0]['TFLOP']:.3f}",
    f"{1000 * np.median([m['seconds'] for m in measures]):.0f}",
  ]


def compression(cells: Cells, rules: Sequence[str]) -> Rows:
  """Accuracy of keep rules and schedules, before and after tuning under them (paper, Tables 2 and
  3).
  """

  def after(rule):
    return cells.seeds(f"tune_{rule}_{{seed}}", "heldout", rule)

  yield [
    "",
    "not tuned for",
    "tuned without",
    "after SCT",
    "less not tuned for",
    "less tuned without",
    "less none, tuned",
    "less progressive",
    "seeds",
    *COST,
  ]
  for rule in rules:
    free = cells.seeds("base", "heldout", rule)
    if free:
      without, tuned = cells.seeds("tune_none_{seed}", "heldout", rule), after(rule)
      others = [free, without if rule != "none" else [], *_reference_rules(after, rule)]
      yield [
        rule,
        *map(_share, (free, without, tuned)),
        *(_less(tuned, other) for other in others),
        str(len(tuned)),
        # of cells that measured all rules: machines differ, and so does one from hour to hour
        *_cost([*free, *without]),
      ]


def by_kind(cells: Cells) -> Rows:
  """Accuracy by kind of question."""
  tuned = ("progressive", "uniform", "stepwise", "heuristic", "early", "late", "average")
  choices = {
    "no compression": ("base", "heldout", "none"),
    "no compression, tuned": ("tune_none_{seed}", "heldout", "none"),
    "progressive, not tuned for": ("base", "heldout", "progressive"),
    "tuned without compression, then progressive": ("tune_none_{seed}", "heldout", "progressive"),
    **{f"{rule}, tuned": (f"tune_{rule}_{{seed}}", "heldout", rule) for rule in tuned},
    **{
      f"{rule}, tuned for 1,200 steps": (f"longer_{rule}_{{seed}}", "heldout", rule)
      for rule in LONGER
    },
  }
  yield ["", *KINDS]
  for name, of in (("chance", CHANCE), ("by any shot", ANY_SHOT)):
    yield [name, *(f"{100 * of[kind]:.0f}" for kind in KINDS)]
  for name, path in choices.items():
    if found := [right(m) for m in cells.seeds(*path)]:
      yield [
        name,
        *(str(interval([of[:, k : k + 1] for of in found])) for k in range(len(KINDS))),
      ]


def by_frames(cells: Cells) -> Rows:
  """Accuracy against frames that are sampled of a longer film (paper, Figure 1)."""
  curves = {name: cells.seeds(*path) for name, path in (CURVES | LONGER_CURVES).items()}
  first = next((found[0] for found in curves.values() if found), {})  # its measures by frames
  yield ["", *(f"{n} frames" for n in first)]
  if first:
    yield ["chance", *[f"{100 * np.mean(list(CHANCE.values())):.1f}"] * len(first)]
    yield ["shown, else chance", *(f"{100 * bound([one]):.1f}" for one in first.values())]
  for name, found in curves.items():
    if found:
      yield [name, *(_share([m[n] for m in found]) for n in found[0])]
  for name, other, factor in LESS:
    some, less = curves[name], curves[other]
    if some and less:
      parts = {n: str(int(n) // factor) for n in some[0]}
      yield [
        f"{name} less {other}, with {'half of the' if factor == 2 else 'as many'} frames",
        *(
          _less([m[n] for m in some], [m[part] for m in less if part in m])
          for n, part in parts.items()
        ),
      ]
  for name in ("no compression", "LP-Comp, not tuned for"):  # of one cell: machines differ
    if found := curves[name]:
      spent = zip(*(_cost([one]) for one in found[0].values()))
      yield from ([f"{name.split(',')[0]}: {what}", *row] for what, row in zip(COST, spent))


def longer(cells: Cells) -> Rows:
  """What a tuning three times as long changes, on films of 12 scenes and on all frames of those of
  24.
  """
  yield [
    "films of",
    "rule",
    "400 steps",
    "1,200 steps",
    "gained",
    "less none, as long",
    "less progressive, as long",
    "seeds",
  ]
  for films_of, split, *frames in (
    ("12 scenes", "heldout"),
    ("24 scenes, 48 frames", "wide", "48"),
  ):

    def of(cell, rule, split=split, frames=frames):
      return cells.seeds(f"{cell}_{rule}_{{seed}}", split, rule, *frames)

    for rule in LONGER:
      if long := of("longer", rule):
        short = of("tune", rule)
        others = [short, *_reference_rules(functools.partial(of, "longer"), rule)]
        yield [
          films_of,
          rule,
          _share(short),
          _share(long),
          *(_less(long, other) for other in others),
          f"{len(short)} and {len(long)}",
        ]


def _by_mode(cells: Cells) -> Iterator[tuple[str, str, str, dict[str, list[Measure]]]]:
  """Films and model, mode, how it is shown, and the measures of all modes."""
  for name, _, modes in cells.selections():
    for mode in modes:
      yield name, mode, mode.replace("_answer", ", the answer's row"), modes


def selection(cells: Cells) -> Rows:
  """Accuracy and cost by mode of QC-Comp (paper, Tables 4 to 6)."""
  yield [
    "",
    "frames by",
    "right",
    "less global",
    "less local",
    "selected, else chance",
    "right from two scenes",
    "seeds",
    *COST[1:],
  ]
  for name, mode, shown, modes in _by_mode(cells):
    of, rows = modes[mode], "_answer" if mode.endswith("_answer") else ""
    others = (f"{other}{rows}" for other in ("global", "local"))
    yield [
      name,
      shown,
      _share(of),
      *(_less(of, modes.get(other, []) if other != mode else [], True) for other in others),
      f"{100 * bound(of):.1f}",
      str(interval([right(m, "few")[:, SINGLE] for m in of])) if "few" in of[0] else "-",
      str(len(of)),
      *_cost(of)[1:],  # tokens are those of answering alone
    ]


def retrieval(cells: Cells) -> Rows:
  """How often QC-Comp selects all that is needed, and how often the one scene that is has the
  highest score.
  """
  kinds = ", ".join(kind for kind, one in zip(KINDS, SINGLE) if one)
  yield [
    "",
    "frames by",
    "all that is needed selected",
    "needed scene first",
    "by another question's scores",
    f"first, by kind ({kinds})",
  ]
  for name, mode, shown, modes in _by_mode(cells):
    first = ["-"] * 3
    if mode not in ("uniform", "official"):  # the official mode scores four scenes together
      own, other = ([ranked_first(m, by) for m in modes[mode]] for by in ("rank", "other"))
      first = [
        str(interval(own)),
        str(interval(other)),
        ", ".join(f"{100 * share:.0f}" for share in np.mean(own, axis=(0, 1))),  # of each kind
      ]
    yield [name, shown, _share(modes[mode], "hits"), *first]


def position_bias(cells: Cells) -> Rows:
  """Position bias: what happens to the one scene that is needed, by the quarter of the film that it
  is in.
  """
  yield [
    "",
    "frames by",
    *QUARTERS,
    "last less first",
    "selected, by quarter",
    "score, by quarter",
  ]
  places = {name: place for name, place, _ in cells.selections()}
  for name, mode, shown, modes in _by_mode(cells):
    if mode not in ("uniform", "official"):
      of, place = modes[mode], places[name]
      first = by_quarter(place, [ranked_first(m) for m in of])
      hits = by_quarter(place, [right(m, "hits")[:, SINGLE] for m in of])
      scores = by_quarter(place, [single(m["score"]) for m in of])
      yield [
        name,
        shown,
        *(str(interval(one)) for one in first),
        str(interval(first[-1], first[0], same=True)),
        ", ".join(f"{100 * np.nanmean(one):.0f}" for one in hits),
        ", ".join(f"{np.nanmean(one):.1f}" for one in scores),
      ]


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


def report_findings(
  folder: pathlib.Path, page: pathlib.Path | None = None, figures: pathlib.Path | None = None
) -> str:
  """All tables, printed; with a page also put between its marks, and the plots into a folder.

  Raises:
    StudyError: there are no cells, or a table's marks are not on the page, or twice.
  """
  cells = Cells(folder)
  if not cells.results:
    raise StudyError(
      f"{folder} has no cells to report; the same command without --report makes them",
      where=folder,
    )
  made = {name: markdown_table(table(cells)) for name, table in TABLES.items()}
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
        raise StudyError(
          f"{page} has {found} places between <!-- {name} --> and <!-- end -->; there must be one",
          where=name,
          found=found,
        )
    write_file(page, content)
  if figures is not None:
    for name, plot in PLOTS.items():
      plot(cells).savefig(figures / f"{name}.png", dpi=110, bbox_inches="tight")
  return text
