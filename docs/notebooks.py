"""Notebooks: writes NAME.ipynb from NAME.py, runs it, and keeps its pictures: PYTHONPATH=.
.venv/bin/python docs/notebooks.py [NAME ...]

The .py files (percent format) are what is edited and reviewed. `--pair` only writes the .ipynb
files.
"""

import argparse
import ast
import base64
import io
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = ("tune", "ask", "inside", "convert")  # in this order: what `tune` makes, `inside` looks at
LARGEST = 150_000  # bytes of a picture that is kept


def read(name: str) -> nbformat.NotebookNode:
  """A notebook from its text."""
  notebook = jupytext.read(ROOT / "notebooks" / f"{name}.py", fmt="py:percent")
  for key in set(notebook.metadata) - {"accelerator", "colab", "kernelspec"}:
    del notebook.metadata[key]
  for number, cell in enumerate(notebook.cells):
    cell.id = f"{name}-{number}"  # else one by chance, other each time
  return notebook


def pair(name: str) -> str:
  """The contents of NAME.ipynb: without outputs."""
  return nbformat.writes(read(name)) + "\n"


def tagged(notebook: nbformat.NotebookNode, tag: str) -> int:
  """The place of the one cell with a tag."""
  (place,) = (i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", ()))
  return place


def execute(
  name: str, values: Mapping[str, Any], then: str = "", env: Mapping[str, str] | None = None
) -> nbformat.NotebookNode:
  """Runs a notebook in a process of its own.

  Args:
    name: of it.
    values: instead of those in its cell of parameters.
    then: code to be run at its end.
    env: of the process; None: as here.

  Raises:
    KeyError: a value that is no parameter.
    CellExecutionError: what a cell raised.
  """
  notebook = read(name)
  place = tagged(notebook, "parameters")
  known = {
    target.id for node in ast.parse(notebook.cells[place].source).body for target in node.targets
  }
  if unknown := values.keys() - known:
    raise KeyError(
      f"{', '.join(sorted(unknown))}: no parameter of {name}, which has {', '.join(sorted(known))}"
    )
  given = "\n".join(f"{key} = {value!r}" for key, value in values.items())
  notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(given))
  notebook.cells.append(nbformat.v4.new_code_cell(then))
  client = NotebookClient(
    notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
  )
  return client.execute(**({} if env is None else {"env": dict(env)}))


def pictures(notebook: nbformat.NotebookNode) -> dict[str, Image.Image]:
  """The picture of each cell with a tag picture-NAME."""
  found = {}
  for cell in notebook.cells:
    for tag in cell.metadata.get("tags", ()):
      if tag.startswith("picture-"):
        (png,) = (
          out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", ())
        )
        found[tag.removeprefix("picture-")] = Image.open(io.BytesIO(base64.b64decode(png)))
  return found


def keep(name: str, label: str, picture: Image.Image) -> None:
  """Writes a picture to the documentation's figures, small."""
  file = ROOT / "docs" / "figures" / f"notebook_{name}_{label}.png"
  for colours in (128, 64, 32, 16):
    flat = picture.convert("RGB").quantize(
      colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    flat.save(file, optimize=True)
    if file.stat().st_size <= LARGEST:
      return


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(NAMES)}")
  parser.add_argument("--pair", action="store_true", help="write the .ipynb files, run nothing")
  args = parser.parse_args(argv)
  for name in args.names or NAMES:
    (ROOT / "notebooks" / f"{name}.ipynb").write_text(pair(name))
    if args.pair:
      continue
    begun = time.perf_counter()
    for label, picture in pictures(execute(name, {})).items():
      keep(name, label, picture)
    print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
  main()
