"""The paper in miniature: its comparisons on films whose answers are known.

Every comparison has several seeds and intervals.

  # all cells; hours on 2 cores, goes on where it stopped
  python -m xcomp_jax.study --out study
  # those whose names begin so
  python -m xcomp_jax.study --out study --only tune
  # one tuning and its measures, minutes
  python -m xcomp_jax.study --preset quick --out DIR
  # tables of docs/STUDY.md and plots, from the cells that are there
  python -m xcomp_jax.study --report
  # trains another base, and all cells with it
  python -m xcomp_jax.study --base --out study/base
  python -m xcomp_jax.study --model study/base/watch/model --out DIR

A cell is one tuning or what needs none, with all that is measured of it, in docs/study/NAME.json
(quick, or another base: OUT/cells/NAME.json). What is there is not done again, and refused if it
was made with another base, other films, another tuning or other measures. Run it where configs/,
assets/ and docs/ are.
"""

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from xcomp_jax.cli import command
from xcomp_jax.files import alone, path_of, write_json
from xcomp_jax.inputs import read_json
from xcomp_jax.study import findings
from xcomp_jax.study.cell_results import LONGER
from xcomp_jax.study.measures import FEW, SELECTED, measured, measured_setting, selected_answers
from xcomp_jax.study.miniature import (
  BASE,
  PRESETS,
  Study,
  differences,
  study_rule,
  train_study_base,
)
from xcomp_jax.synthetic.films import FRAMES

CELLS, PAGE, FIGURES = "docs/study", pathlib.Path("docs/STUDY.md"), pathlib.Path("docs/figures")
WIDE = (3, 6, 12, 18, 24)  # clips that are taken of a film of 24
# Modes of QC-Comp that are compared, by the question's rows or the answer's.
MODES = {
  "window": ("global", "global_answer"),
  "long": ("uniform", "global", "local", "aligned", "global_answer", "local_answer"),
  "hour": ("uniform", "local", "official"),
}


class StudyCell(NamedTuple):
  """name, splits and rules that it comes from, what does it, and how often its tuning sees all
  films.
  """

  name: str
  splits: Sequence[str]
  rules: Sequence[str]
  do: Callable[[], dict[str, Any]]
  epochs: int = 1


def cells(study: Study) -> Iterator[StudyCell]:
  """All cells."""
  preset = study.preset
  rules = list(dict.fromkeys(("none", *preset.rules, *preset.others)))
  wide, window = (["wide"] if preset.wide else []), (["window"] if preset.window else [])
  yield StudyCell(
    "base",
    ["heldout"],
    rules,
    lambda: {
      "heldout": {name: measured(study, study.base, study_rule(name), "heldout") for name in rules}
    },
  )
  if wide:
    both = ["none", "progressive"]
    yield StudyCell(
      "base_frames",
      wide,
      both,
      lambda: {"wide": {name: _by_frames(study, study.base, name) for name in both}},
    )
  for seed in preset.seeds:
    for name in (*preset.rules, *preset.others):
      # the same tuning, and then compression without tuning for it
      under = preset.rules if name == "none" else (name,)
      yield StudyCell(
        f"tune_{name}_{seed}",
        ["tuning", "heldout", *wide],
        under,
        functools.partial(_tuning, study, name, seed, under),
      )
    for name in (name for name in ("none", "progressive") if name in preset.rules):
      splits = ["long", *window]
      yield StudyCell(
        f"select_{name}_{seed}",
        ["tuning", *splits],
        [name],
        functools.partial(_selections, study, name, seed, splits),
      )
  for seed in preset.seeds if preset.longer else ():
    for name in LONGER:
      do = functools.partial(_tuning, study, name, seed, (name,), preset.longer)
      yield StudyCell(
        f"longer_{name}_{seed}", ["tuning", "heldout", *wide], (name,), do, preset.longer
      )
  for seed in preset.seeds if preset.hour else ():
    yield StudyCell(
      f"official_{seed}",
      ["tuning", "hour"],
      ["progressive"],
      functools.partial(_selections, study, "progressive", seed, ["hour"]),
    )


def _tuning(
  study: Study, name: str, seed: int, under: Sequence[str], epochs: int = 1
) -> dict[str, Any]:
  model = study.tuned(name, seed, epochs)
  out: dict[str, Any] = {
    "heldout": {other: measured(study, model, study_rule(other), "heldout") for other in under}
  }
  if study.preset.wide and name in LONGER:
    out["wide"] = {name: _by_frames(study, model, name)}
  return out


def _selections(study: Study, name: str, seed: int, splits: Sequence[str]) -> dict[str, Any]:
  model = study.tuned(name, seed)
  return {
    split: selected_answers(study, model, study_rule(name), split, MODES[split], SELECTED[split])
    for split in splits
  }


def _by_frames(study: Study, model: str | pathlib.Path, name: str) -> dict[str, dict[str, Any]]:
  return {
    str(clips * FRAMES): measured(study, model, study_rule(name), "wide", clips) for clips in WIDE
  }


def cell_origin(study: Study, cell: StudyCell) -> dict[str, Any]:
  """What a cell comes from, to be compared with what it was made from."""

  def how(mode, frames):
    return frames if mode == "uniform" else dataclasses.asdict(measured_setting(mode, frames))

  measures: dict[str, Any] = {
    split: [FEW, {mode: how(mode, SELECTED[split]) for mode in MODES[split]}]
    for split in cell.splits
    if split in MODES
  }
  measures |= {"wide": WIDE} if "wide" in cell.splits else {}
  return study.made(cell.splits, cell.rules, cell.epochs) | {"measures": measures}


def check_cells(study: Study, where: pathlib.Path) -> None:
  """That the cells that are there are what would be made now.

  Raises:
    ValueError: which ones are not.
  """
  old = []
  for cell in cells(study):
    file = where / f"{cell.name}.json"
    if file.exists() and (
      other := differences(read_json(file, ValueError).get("made", {}), cell_origin(study, cell))
    ):
      old.append(f"{file} ({', '.join(other)})")
  if old:
    raise ValueError(f"made otherwise: {'; '.join(old)}: remove them to do them again")


def run_cells(study: Study, where: pathlib.Path, only: str) -> None:
  """Does the cells whose names begin with `only` and that are not in `where` yet.

  A cell's `seconds` are those of its last start: of a tuning that was stopped only what came after,
  of one that is there none.

  Raises:
    ValueError: no cell is called so, or what is in `where` or the study's folder was made
      otherwise.
  """
  every = list(cells(study))
  todo = [cell for cell in every if cell.name.startswith(only)]
  if not todo:
    raise ValueError(
      f"--only {only}: no cell's name begins so; there are {', '.join(cell.name for cell in every)}"
    )
  check_cells(study, where)  # others too: they are reported beside them
  where.mkdir(parents=True, exist_ok=True)
  for number, cell in enumerate(todo, 1):
    file = where / f"{cell.name}.json"
    if file.exists():
      continue
    print(f"cell {number} of {len(todo)}: {cell.name}", flush=True)
    for split in cell.splits:
      study.store(split)  # several cells': not part of this one's time
    begun = time.perf_counter()
    write_json(
      file,
      {
        "made": cell_origin(study, cell),
        "result": cell.do(),
        "seconds": time.perf_counter() - begun,
      },
    )


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.study",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--out",
    type=path_of,
    help="folder of films, features and models; `study`, if it is the full study of assets/study",
  )
  parser.add_argument("--preset", choices=list(PRESETS), default="full")
  parser.add_argument(
    "--model",
    type=path_of,
    default=pathlib.Path(BASE),
    help="the base; a folder with a checkpoint",
  )
  parser.add_argument("--only", default="", metavar="NAME", help="cells whose names begin so")
  instead = parser.add_mutually_exclusive_group()
  instead.add_argument(
    "--report", action="store_true", help="only tables and plots, from the cells that are there"
  )
  instead.add_argument("--base", action="store_true", help="train a base instead")
  f = parser.parse_args(argv)
  # the one that the page is about
  full = f.preset == "full" and f.model == pathlib.Path(BASE) and not f.base
  if f.out is None and not full:
    parser.error("--preset quick, --model and --base need a folder of their own: --out DIR")
  out = f.out or pathlib.Path("study")
  with command(interrupted="interrupted; what was finished stays, and the same command goes on"):
    if f.base:
      with alone(out, "study"):
        return train_study_base(out)
    where = pathlib.Path(CELLS) if full else out / "cells"
    if full and importlib.util.find_spec("matplotlib") is None:
      raise ValueError("the plots need matplotlib: pip install 'xcomp_jax[plot]'")
    study = Study(out, PRESETS[f.preset], f.model)
    if f.report:
      check_cells(study, where)
    else:
      with alone(out, "study"), alone(where, "study"):
        run_cells(study, where, f.only)
    findings.report_findings(where, *((PAGE, FIGURES) if full else ()))
