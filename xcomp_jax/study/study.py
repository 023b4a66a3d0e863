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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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
  StudyError,
  differences,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyCell:
  """One tuning or what needs none, with all that is measured of it.

  splits, rules: that it comes from. do: measures. epochs: how often its tuning sees all films.
  """

  name: str
  splits: Sequence[str]
  rules: Sequence[str]
  do: Callable[[], dict[str, Any]]
  epochs: int = 1


def cells(study: Study) -> Iterator[StudyCell]:
  """All cells."""
  preset = study.preset
  tuned = (*preset.rules, *preset.others)
  yield base_cell(study, "base", "heldout", list(dict.fromkeys(("none", *tuned))))
  if preset.films["wide"]:
    yield base_cell(study, "base_frames", "wide", ["none", "progressive"])
  for seed in preset.seeds:
    for name in tuned:
      # the same tuning, and then compression without tuning for it
      under = preset.rules if name == "none" else (name,)
      yield tuning_cell(study, f"tune_{name}_{seed}", name, seed, under)
    splits = ["long", "window"] if preset.films["window"] else ["long"]
    for name in ("none", "progressive"):
      if name in preset.rules:
        yield selection_cell(study, f"select_{name}_{seed}", name, seed, splits)
  for seed in preset.seeds if preset.longer else ():
    for name in LONGER:
      yield tuning_cell(study, f"longer_{name}_{seed}", name, seed, (name,), preset.longer)
  for seed in preset.seeds if preset.films["hour"] else ():
    yield selection_cell(study, f"official_{seed}", "progressive", seed, ["hour"])


def base_cell(study: Study, name: str, split: str, rules: Sequence[str]) -> StudyCell:
  """What the base answers under rules."""

  def do():
    return {split: {rule: _measures(study, study.base, split, rule) for rule in rules}}

  return StudyCell(name=name, splits=[split], rules=rules, do=do)


def tuning_cell(
  study: Study, name: str, rule: str, seed: int, under: Sequence[str], epochs: int = 1
) -> StudyCell:
  """What a model that was tuned under a rule answers, `under` others or itself."""
  wide = ["wide"] if study.preset.films["wide"] else []

  def do():
    model = study.tuned(rule, seed, epochs)
    out = {"heldout": {other: _measures(study, model, "heldout", other) for other in under}}
    if wide and rule in LONGER:
      out["wide"] = {rule: _measures(study, model, "wide", rule)}
    return out

  splits = ["tuning", "heldout", *wide]
  return StudyCell(name=name, splits=splits, rules=under, do=do, epochs=epochs)


def selection_cell(
  study: Study, name: str, rule: str, seed: int, splits: Sequence[str]
) -> StudyCell:
  """What is answered from frames that QC-Comp selects, by a model that was tuned under a rule."""

  def do():
    model, cfg = study.tuned(rule, seed), study.rule(rule)
    return {
      split: selected_answers(study, model, cfg, split, MODES[split], SELECTED[split])
      for split in splits
    }

  return StudyCell(name=name, splits=["tuning", *splits], rules=[rule], do=do)


def _measures(study: Study, model: pathlib.Path, split: str, rule: str) -> dict[str, Any]:
  """What a model answers under a rule; about wide films by frames."""
  measure = functools.partial(measured, study, model, study.rule(rule), split)
  return {str(clips * FRAMES): measure(clips) for clips in WIDE} if split == "wide" else measure()


def cell_origin(
  study: Study, cell: StudyCell, modes: Mapping[str, Sequence[str]] = MODES
) -> dict[str, Any]:
  """What a cell comes from, to be compared with what it was made from."""

  def how(mode, frames):
    return frames if mode == "uniform" else dataclasses.asdict(measured_setting(mode, frames))

  measures: dict[str, Any] = {
    split: [FEW, {mode: how(mode, SELECTED[split]) for mode in modes[split]}]
    for split in cell.splits
    if split in modes
  }
  if "wide" in cell.splits:
    measures["wide"] = WIDE
  return study.made(cell.splits, cell.rules, cell.epochs) | {"measures": measures}


def check_cells(
  study: Study,
  every: Iterable[StudyCell],
  where: pathlib.Path,
  modes: Mapping[str, Sequence[str]] = MODES,
) -> None:
  """That the cells that are there are what would be made now.

  Raises:
    StudyError: which ones are not. fields: `where`, names of the cells; `differ`, what of each.
  """
  there = {cell.name: cell for cell in every if (where / f"{cell.name}.json").exists()}
  differ = {
    name: differences(
      read_json(where / f"{name}.json", StudyError).get("made", {}), cell_origin(study, cell, modes)
    )
    for name, cell in there.items()
  }
  if old := {name: other for name, other in differ.items() if other}:
    files = (f"{where / name}.json ({', '.join(other)})" for name, other in old.items())
    raise StudyError(
      f"made otherwise: {'; '.join(files)}: remove them to do them again",
      where=list(old),
      differ=list(old.values()),
    )


def run_cells(
  study: Study,
  every: Sequence[StudyCell],
  where: pathlib.Path,
  only: str = "",
  *,
  clock: Callable[[], float] = time.perf_counter,
) -> None:
  """Does the cells whose names begin with `only` and that are not in `where` yet.

  A cell's `seconds` are those of its last start: of a tuning that was stopped only what came after,
  of one that is there none.

  Raises:
    StudyError: no cell is called so, or what is in `where` or the study's folder was made
      otherwise.
  """
  names = [cell.name for cell in every]
  todo = [cell for cell in every if cell.name.startswith(only)]
  if not todo:
    raise StudyError(
      f"--only {only}: no cell's name begins so; there are {', '.join(names)}",
      where="--only",
      value=only,
      allowed=names,
    )
  check_cells(study, every, where)  # others too: they are reported beside them
  where.mkdir(parents=True, exist_ok=True)
  for number, cell in enumerate(todo, 1):
    file = where / f"{cell.name}.json"
    if file.exists():
      continue
    print(f"cell {number} of {len(todo)}: {cell.name}", flush=True)
    for split in cell.splits:
      study.store(split)  # several cells': not part of this one's time
    begun = clock()
    write_json(
      file,
      {"made": cell_origin(study, cell), "result": cell.do(), "seconds": clock() - begun},
    )


def main(
  argv: Sequence[str] | None = None,
  *,
  cells: Callable[[Study], Iterable[StudyCell]] = cells,
  found: Callable[[str], Any] = importlib.util.find_spec,
  report: Callable[..., Any] = findings.report_findings,
) -> None:
  """The command. cells, found, report: with others, tests do less."""
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
    if full and found("matplotlib") is None:
      raise StudyError(
        "the plots need matplotlib: pip install 'xcomp_jax[plot]'", where="matplotlib"
      )
    study = Study(out, PRESETS[f.preset], f.model)
    every = list(cells(study))
    if f.report:
      check_cells(study, every, where)
    else:
      with alone(out, "study"), alone(where, "study"):
        run_cells(study, every, where, f.only)
    report(where, *((PAGE, FIGURES) if full else ()))
