"""Lists the commands: `python -m xcomp_jax`."""

import argparse
import ast
import pathlib
from collections.abc import Sequence

FIRST = ("ask", "train", "predecode", "evaluate", "export")  # what most people are here for


def commands() -> dict[str, str]:
  """{name: its first line of documentation}, of every module that is a command."""
  found = {}
  here = pathlib.Path(__file__).parent
  for file in sorted([*here.glob("*.py"), *here.glob("*/__main__.py")]):
    text = file.read_text(encoding="utf-8")
    if file != here / "__main__.py" and 'if __name__ == "__main__":' in text:
      name = file.stem if file.parent == here else file.parent.name
      found[name] = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
  first = {name: found.pop(name) for name in FIRST}
  return first | found


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the list."""
  argparse.ArgumentParser(prog="python -m xcomp_jax", description=__doc__).parse_args(argv)
  print("XComp: long videos for language models. `python -m xcomp_jax.NAME --help` says more.\n")
  for name, line in commands().items():
    print(f"  {name:14}  {line.partition(': the command')[0].partition(' (docs/')[0].rstrip('.')}")
  print("\nFrom Python: model = xcomp_jax.load(CHECKPOINT); video = model.encode(FILE);")
  print("model.ask(video, QUESTION)")


if __name__ == "__main__":
  main()
