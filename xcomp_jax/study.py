"""The paper in miniature: its comparisons on films whose answers are known, with several seeds and intervals.

  python -m xcomp_jax.study --out study                 all cells; hours on 2 cores, goes on where it stopped
  python -m xcomp_jax.study --out study --only tune     those whose names begin so
  python -m xcomp_jax.study --preset quick --out DIR    one tuning and its measures, minutes
  python -m xcomp_jax.study --report                    tables of docs/STUDY.md and plots, from the cells that are there
  python -m xcomp_jax.study --base --out study/base     trains another base
  python -m xcomp_jax.study --model study/base/watch/model --out DIR      all cells with it

A cell is one tuning or what needs none, with all that is measured of it, in docs/study/NAME.json (quick, or another base: in --out).
A cell that is there is not done again; one that was made with another base, other films or another tuning is refused, and so is such
a folder. Run it where configs/, assets/ and docs/ are.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from xcomp_jax import findings
from xcomp_jax.files import command, locked, write_json
from xcomp_jax.films import FRAMES
from xcomp_jax.measures import measured, selected
from xcomp_jax.miniature import BASE, PRESETS, Study, agree, rule, stamp, train_base

CELLS, PAGE, FIGURES = "docs/study", pathlib.Path("docs/STUDY.md"), pathlib.Path("docs/figures")
WIDE = (3, 6, 12, 18, 24)  # clips that are taken of a film of 24
# Modes of QC-Comp that are compared, by the question's rows or the answer's.
MODES = {
  "window": ("global", "global_answer"),
  "long": ("uniform", "global", "local", "aligned", "global_answer", "local_answer"),
  "hour": ("uniform", "local", "official"),
}


class Cell(NamedTuple):
  """name, splits and rules that it comes from, and what does it."""

  name: str
  splits: Sequence[str]
  rules: Sequence[str]
  do: Callable[[], dict[str, Any]]


def cells(study: Study) -> Iterator[Cell]:
  """All cells."""
  preset = study.preset
  rules = list(dict.fromkeys(("none", *preset.rules, *preset.free)))
  wide, window = (["wide"] if preset.wide else []), (["window"] if preset.window else [])
  yield Cell("base", ["heldout"], rules, lambda: {"heldout": {name: measured(study, study.base, rule(name), "heldout") for name in rules}})
  if wide:
    both = ["none", "progressive"]
    yield Cell("base_frames", wide, both, lambda: {"wide": {name: _by_frames(study, study.base, name) for name in both}})
  yield Cell("base_select", ["long", *window], ["none"], lambda: _selections(study, study.base, "none", ["long", *window]))
  for seed in preset.seeds:
    for name in preset.rules:
      under = preset.rules if name == "none" else (name,)  # the same tuning, and then compression without tuning for it
      yield Cell(f"tune_{name}_{seed}", ["tuning", "heldout", *wide], under, functools.partial(_tuning, study, name, seed, under))
    selections = {"select": ["long", *window]}
    if preset.hour and seed == preset.seeds[0]:  # a quarter of an hour: one seed says enough
      selections["official"] = ["hour"]
    for kind, splits in selections.items():
      yield Cell(f"{kind}_{seed}", ["tuning", *splits], ["progressive"], functools.partial(_tuned_selections, study, seed, splits))


def _tuning(study: Study, name: str, seed: int, under: Sequence[str]) -> dict[str, Any]:
  model = study.tuned(name, seed)
  out: dict[str, Any] = {"heldout": {other: measured(study, model, rule(other), "heldout") for other in under}}
  if study.preset.wide and name in ("none", "progressive", "early"):
    out["wide"] = {name: _by_frames(study, model, name)}
  return out


def _tuned_selections(study: Study, seed: int, splits: Sequence[str]) -> dict[str, Any]:
  return _selections(study, study.tuned("progressive", seed), "progressive", splits)


def _selections(study: Study, model: str | pathlib.Path, name: str, splits: Sequence[str]) -> dict[str, Any]:
  return {split: selected(study, model, rule(name), split, MODES[split]) for split in splits}


def _by_frames(study: Study, model: str | pathlib.Path, name: str) -> dict[str, dict[str, Any]]:
  return {str(clips * FRAMES): measured(study, model, rule(name), "wide", clips) for clips in WIDE}


def run(study: Study, where: pathlib.Path, only: str) -> None:
  """Does the cells whose names begin with `only` and that are not in `where` yet.

  Raises:
    ValueError: no cell is called so, or what is in the study's folder or `where` was made otherwise.
  """
  every = list(cells(study))
  todo = [cell for cell in every if cell.name.startswith(only)]
  if not todo:
    raise ValueError(f"--only {only}: no cell's name begins so; there are {', '.join(cell.name for cell in every)}")
  stamp(study.out, study.made(list(study.splits)))
  where.mkdir(parents=True, exist_ok=True)
  for number, cell in enumerate(todo, 1):
    file, made = where / f"{cell.name}.json", study.made(cell.splits, cell.rules)
    if file.exists():
      agree(file, json.loads(file.read_text()).get("made", {}), made, "remove it to do it again")
      continue
    print(f"cell {number} of {len(todo)}: {cell.name}", flush=True)
    for split in cell.splits:
      study.store(split)  # several cells': not part of this one's time
    begun = time.perf_counter()
    write_json(file, {"made": made, "result": cell.do(), "seconds": time.perf_counter() - begun})


def _alone(out: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  out.mkdir(parents=True, exist_ok=True)
  return locked(out / ".lock", ValueError(f"another command is at work in {out}; wait for it, or give --out another folder"))


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("study"), help="folder of films, features and models")
  parser.add_argument("--preset", choices=list(PRESETS), default="full")
  parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path(BASE), help="the base; a folder with a checkpoint")
  parser.add_argument("--only", default="", metavar="NAME", help="cells whose names begin so")
  parser.add_argument("--report", action="store_true", help="only tables and plots, from the cells that are there")
  parser.add_argument("--base", action="store_true", help="train a base instead")
  f = parser.parse_args(argv)
  with command(interrupted="interrupted; what was finished stays, and the same command goes on"):
    full = f.preset == "full" and f.model == pathlib.Path(BASE)  # the one that the page is about
    where = pathlib.Path(CELLS) if full else f.out / "cells"
    if f.base or not f.report:
      with _alone(f.out):
        train_base(f.out) if f.base else run(Study(f.out, PRESETS[f.preset], f.model), where, f.only)
    if not f.base:
      findings.report(where, *((PAGE, FIGURES) if full else ()))


if __name__ == "__main__":
  main()
