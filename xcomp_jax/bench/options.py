"""The options of the benchmarks' commands, and how these print what they found."""

import argparse
from collections.abc import Mapping
from typing import Any

Options = Mapping[str, Mapping[str, Any]]  # by name, what `add_argument` is given beside it


def command_parser(
  program: str,
  doc: str | None,
  options: Options,
  commands: Mapping[str, tuple[str, Options]] | None = None,
) -> argparse.ArgumentParser:
  """The parser of `python -m xcomp_jax.PROGRAM`.

  Args:
    program: its name.
    doc: of its module; the first line is shown.
    options: that it has, or that each of its commands has, too.
    commands: its commands, where it has several: what each does, and its own options. The name of
      the one that is given is `command`.
  """
  parser = argparse.ArgumentParser(
    prog=f"python -m xcomp_jax.{program}", description=(doc or "").partition("\n")[0]
  )
  parts = [(parser, options)]
  if commands:
    places = parser.add_subparsers(dest="command", required=True)
    parts = [
      (places.add_parser(name, help=does), {**own, **options})
      for name, (does, own) in commands.items()
    ]
  for part, its in parts:
    for name, how in its.items():
      part.add_argument(name, **how)
  return parser


def figures(found: Mapping[str, float]) -> str:
  """Numbers by name, a line for each."""
  return "\n".join(f"{name:>26} {value:10.3f}" for name, value in found.items())
