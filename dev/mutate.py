"""Are the tests able to fail? Draws mutations of the code, and runs its package's tests on each.

  # 60 mutations of the code in FOLDER, the same for the same seed
  python dev/mutate.py draw FOLDER --seed 34 --count 60 --out dev/mutations.json
  # where the same lines stand in another version; what is not found is to be placed by hand
  python dev/mutate.py place dev/mutations.json FOLDER --as after
  # which are caught; goes on where it stopped
  python dev/mutate.py run dev/mutations.json FOLDER --as after --out after.json

A mutation changes one operator, bound, default or order in one line. It is caught if a fast test of
its package fails, or takes more processor time than TIME. `struck` in the list is the reason why a
mutation changes nothing that anybody could see; such ones are not run. FOLDER is a clean checkout
with an environment in .venv; it is changed while this runs, and put back.
"""

import argparse
import ast
import json
import pathlib
import random
import re
import resource
import subprocess

TIME = 1200  # seconds of processor time of one run of tests
NO_TESTS = 5  # exit code of pytest where a mark selects none
PACKAGES = ("model", "data", "checkpoints", "training", "inference")
# Files of the packages while all files were flat, and their tests.
FLAT = {
  "model": ("model/*.py", "qc_comp.py"),
  "data": ("data/*.py", "predecode.py"),
  "checkpoints": ("official.py", "layouts.py", "config_json.py", "weights.py", "export.py"),
  "training": (
    *("optim.py", "steps.py", "checkpoint.py", "metrics.py", "workdir.py", "forecast.py"),
    "train.py",
  ),
  "inference": ("encode.py", "reader.py", "chat.py", "generate.py", "rounds.py"),
}
FLAT_TESTS = {
  "model": "attention context half internvideo2 kernels lp_comp merge qc_comp rope rows vision vlm",
  "data": "batch container video prompt store mixture blend packing pipeline predecode corpus",
  "checkpoints": "weights config_json export",
  "training": "resume steps train forecast compiled damage pods",
  "inference": "chat encode generate ask",
}
SWAPPED = {
  "<": "<=",
  "<=": "<",
  ">": ">=",
  ">=": ">",
  "==": "!=",
  "!=": "==",
  "+": "-",
  "-": "+",
  "*": "//",
  "//": "*",
  "/": "*",
  "%": "//",
  "and": "or",
  "or": "and",
  "is not": "is",
  "is": "is not",
  "in": "not in",
  "not in": "in",
  "|": "&",
  "&": "|",
}
CALLED = {
  "sorted": "list",
  "reversed": "list",
  "min": "max",
  "max": "min",
  "any": "all",
  "all": "any",
}


# Which mutations there are -------------------------------------------------------------------


def _sayings(tree: ast.AST) -> set[ast.AST]:
  """Nodes that are prose or types: what is raised, printed, interpolated, annotated, decorated."""
  found: set[ast.AST] = set()
  for node in ast.walk(tree):
    parts = []
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
      parts = [node]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
      parts = [node]
    elif isinstance(node, ast.FunctionDef):
      arguments = [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]
      parts = [*node.decorator_list, node.returns, *(a.annotation for a in arguments)]
    elif isinstance(node, ast.AnnAssign):
      parts = [node.annotation]
    found.update(inner for part in parts if part for inner in ast.walk(part))
  return found


def _between(lines: list[str], left: ast.expr, right: ast.expr, word: str) -> tuple | None:
  """Where an operator stands between two operands; None unless all is on one line."""
  if left.end_lineno != right.lineno or left.end_col_offset is None:
    return None
  line = lines[left.end_lineno - 1].encode()
  between = line[left.end_col_offset : right.col_offset].decode()
  found = re.search(rf"(?<![\w<>=!*/]){re.escape(word)}(?![\w<>=*/])", between)
  if found is None:
    return None
  start = left.end_col_offset + found.start()
  return left.end_lineno, start, start + len(word)


SYMBOLS: dict[type, str] = {
  ast.Lt: "<",
  ast.LtE: "<=",
  ast.Gt: ">",
  ast.GtE: ">=",
  ast.Eq: "==",
  ast.NotEq: "!=",
  ast.Add: "+",
  ast.Sub: "-",
  ast.Mult: "*",
  ast.FloorDiv: "//",
  ast.Div: "/",
  ast.Mod: "%",
  ast.And: "and",
  ast.Or: "or",
  ast.IsNot: "is not",
  ast.Is: "is",
  ast.In: "in",
  ast.NotIn: "not in",
  ast.BitOr: "|",
  ast.BitAnd: "&",
}


def mutations(text: str) -> list[tuple[str, int, int, int, str]]:
  """Returns (kind, line, first byte, last byte, new text) of all that could be changed."""
  tree, lines = ast.parse(text), text.splitlines()
  left_out, found = _sayings(tree), []
  defaults = {
    default
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef)
    for default in (*node.args.defaults, *node.args.kw_defaults)
    if default
  }

  def put(kind, place, new):
    if place:
      found.append((kind, *place, new))

  for node in ast.walk(tree):
    if node in left_out:
      continue
    if isinstance(node, ast.Compare):
      operands = [node.left, *node.comparators]
      for i, operator in enumerate(node.ops):
        word = SYMBOLS[type(operator)]
        put("operator", _between(lines, operands[i], operands[i + 1], word), SWAPPED[word])
    elif isinstance(node, ast.BoolOp):
      word = SYMBOLS[type(node.op)]
      put("operator", _between(lines, node.values[0], node.values[1], word), SWAPPED[word])
    elif isinstance(node, ast.BinOp) and type(node.op) in SYMBOLS:
      word = SYMBOLS[type(node.op)]
      put("operator", _between(lines, node.left, node.right, word), SWAPPED[word])
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
      place = (node.lineno, node.col_offset, node.end_col_offset)
      kind = "default" if node in defaults else "bound"
      if isinstance(node.value, bool):
        put(kind, place, str(not node.value))
      else:
        put(kind, place, repr(node.value + 1))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLED:
      if (len(node.args) == 1 and not node.keywords) or node.func.id in ("min", "max"):
        place = (node.lineno, node.func.col_offset, node.func.end_col_offset)
        put("order", place, CALLED[node.func.id])
  return found


def sources(folder: pathlib.Path, package: str) -> list[pathlib.Path]:
  """Returns the files of a package, whether the checkout has packages or is flat."""
  root = folder / "xcomp_jax"
  patterns = (f"{package}/*.py",) if (root / "training").is_dir() else FLAT[package]
  return [f for p in patterns for f in sorted(root.glob(p)) if f.name != "__init__.py"]


def tests(folder: pathlib.Path, package: str, file: str) -> list[str]:
  """Returns the tests of a package, those of the mutated file first."""
  if (folder / "tests" / package).is_dir():
    found = sorted((folder / "tests" / package).glob("test_*.py"))
  else:
    found = [folder / "tests" / f"test_{name}.py" for name in FLAT_TESTS[package].split()]
  stem = pathlib.Path(file).stem
  return [str(f.relative_to(folder)) for f in sorted(found, key=lambda f: stem not in f.stem)]


# The commands --------------------------------------------------------------------------------


def draw(folder: pathlib.Path, seed: int, count: int) -> list[dict]:
  """Draws as many mutations of each package, each kind as likely as it is frequent."""
  chosen = random.Random(seed)
  drawn = []
  for package in PACKAGES:
    every = []
    for file in sources(folder, package):
      text = file.read_text()
      for kind, line, start, end, new in mutations(text):
        old = text.splitlines()[line - 1].encode()
        changed = (old[:start] + new.encode() + old[end:]).decode()
        every.append((kind, str(file.relative_to(folder)), line, old.decode(), changed))
    for kind, file, line, old, new in sorted(chosen.sample(every, count // len(PACKAGES))):
      before = {"file": file, "line": line, "old": old, "new": new}
      drawn.append({"id": len(drawn), "package": package, "kind": kind, "before": before})
  return drawn


def place(listed: list[dict], folder: pathlib.Path, side: str) -> None:
  """Finds the same line in another version: once in its package, or once in the whole."""
  for mutation in listed:
    if side in mutation:
      continue
    old = mutation["before"]["old"].strip()
    for files in (sources(folder, mutation["package"]), (folder / "xcomp_jax").rglob("*.py")):
      hits = [
        (file, number, line)
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if line.strip() == old
      ]
      if len(hits) == 1:
        file, number, line = hits[0]
        new = line.replace(old, mutation["before"]["new"].strip())
        where = {"file": str(file.relative_to(folder)), "line": number, "old": line, "new": new}
        mutation[side] = where
        break
    if side not in mutation:
      print(f"{mutation['id']}: not found: {mutation['before']['file']}: {old}")


def run(listed: list[dict], folder: pathlib.Path, side: str, out: pathlib.Path) -> None:
  """Runs the tests on every mutation that is not struck and has no result yet."""
  results = json.loads(out.read_text()) if out.exists() else {}
  for mutation in listed:
    if mutation.get("struck") or str(mutation["id"]) in results:
      continue
    where = mutation[side]
    file = folder / where["file"]
    text = file.read_text()
    lines = text.split("\n")
    at = min(
      (i for i, line in enumerate(lines) if line == where["old"]),
      key=lambda i: abs(i + 1 - where["line"]),
    )
    lines[at] = where["new"]
    command = [".venv/bin/python", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += tests(folder, mutation["package"], where["file"])
    try:
      file.write_text("\n".join(lines))
      for marks in ("pure and not slow", "not pure and not slow"):  # what takes no time first
        done = subprocess.run(
          [*command, "-m", marks],
          cwd=folder,
          capture_output=True,
          text=True,
          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (TIME, TIME)),
        )
        caught = done.returncode not in (0, NO_TESTS)
        if caught:
          break
    finally:
      file.write_text(text)
    by = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    results[str(mutation["id"])] = {"caught": caught, "by": by[0] if by else ""}
    out.write_text(json.dumps(results, indent=1) + "\n")
    word = "caught" if caught else "SURVIVED"
    print(f"{mutation['id']:3} {mutation['package']:12} {word:9}{where['new'].strip()}", flush=True)


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(dest="command", required=True)
  one = commands.add_parser("draw")
  one.add_argument("folder", type=pathlib.Path)
  one.add_argument("--seed", type=int, required=True)
  one.add_argument("--count", type=int, default=60)
  one.add_argument("--out", type=pathlib.Path, required=True)
  for name in ("place", "run"):
    one = commands.add_parser(name)
    one.add_argument("listed", type=pathlib.Path)
    one.add_argument("folder", type=pathlib.Path)
    one.add_argument("--as", dest="side", choices=("before", "after"), required=True)
    if name == "run":
      one.add_argument("--out", type=pathlib.Path, required=True)
  args = parser.parse_args()
  if args.command == "draw":
    args.out.write_text(json.dumps(draw(args.folder, args.seed, args.count), indent=1) + "\n")
    return
  listed = json.loads(args.listed.read_text())
  if args.command == "place":
    place(listed, args.folder, args.side)
    args.listed.write_text(json.dumps(listed, indent=1) + "\n")
  else:
    run(listed, args.folder.resolve(), args.side, args.out)


if __name__ == "__main__":
  main()
