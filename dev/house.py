"""Counts what makes code easy or hard to find one's way in: python dev/house.py [FOLDER]

Files and statements per package, the longest files and functions, assigned lambdas, lines over
100 columns, and public names that several modules define. FOLDER is a checkout; None: this one.
"""

import argparse
import ast
import collections
import pathlib

COLUMNS = 100
SHOWN = 10  # of the longest files and functions
CODE = ("xcomp_jax", "tests", "configs", "docs", "launch", "notebooks", "dev")


def statements(tree: ast.AST) -> int:
  """Counts the statements of a syntax tree, docstrings left out."""
  return sum(
    isinstance(node, ast.stmt)
    and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    for node in ast.walk(tree)
  )


def assigned_lambdas(tree: ast.AST) -> int:
  """Counts statements that give a lambda a name."""
  return sum(
    isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Lambda)
    for node in ast.walk(tree)
  )


def public_names(tree: ast.Module) -> set[str]:
  """Returns the functions and classes that a module defines for others."""
  kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
  return {n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}


def functions(tree: ast.Module) -> list[tuple[int, str]]:
  """Returns (statements, name) of every function."""
  kinds = ast.FunctionDef | ast.AsyncFunctionDef
  return [(statements(n) - 1, n.name) for n in ast.walk(tree) if isinstance(n, kinds)]


def main() -> None:
  """Prints the counts."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "folder", nargs="?", type=pathlib.Path, default=pathlib.Path(__file__).parents[1]
  )
  root = parser.parse_args().folder
  files = sorted(f for top in CODE for f in (root / top).rglob("*.py"))
  texts = {f.relative_to(root): f.read_text() for f in files}
  trees = {f: ast.parse(text) for f, text in texts.items()}

  packages = collections.defaultdict(lambda: [0, 0, 0])
  for f, tree in trees.items():
    for package in {f.parts[0] + " (all)", str(f.parent)}:
      counts = packages[package]
      counts[0] += 1
      counts[1] += statements(tree)
      counts[2] += len(texts[f].splitlines())
  print(f"{'package':32}{'files':>7}{'statements':>12}{'lines':>8}")
  for package, counts in sorted(packages.items()):
    print(f"{package:32}{counts[0]:7}{counts[1]:12}{counts[2]:8}")

  ours = {f: tree for f, tree in trees.items() if f.parts[0] == "xcomp_jax"}
  print("\nlongest files (lines)")
  for f in sorted(texts, key=lambda f: -len(texts[f].splitlines()))[:SHOWN]:
    print(f"  {len(texts[f].splitlines()):5} {f}")
  print("longest functions of the package (statements)")
  longest = sorted(
    ((n, name, f) for f, tree in ours.items() for n, name in functions(tree)), key=lambda x: -x[0]
  )
  for n, name, f in longest[:SHOWN]:
    print(f"  {n:5} {name} ({f})")

  lines = [line for text in texts.values() for line in text.splitlines()]
  print(f"\nassigned lambdas: {sum(map(assigned_lambdas, trees.values()))}")
  print(
    f"lines over {COLUMNS} columns: {sum(len(line) > COLUMNS for line in lines)} of {len(lines)}"
  )
  where = collections.defaultdict(list)
  for f, tree in ours.items():
    for name in public_names(tree):
      where[name].append(str(f.relative_to("xcomp_jax")))
  twice = {name: sorted(fs) for name, fs in where.items() if len(fs) > 1}
  print(f"public names defined in several modules: {len(twice)}")
  for name, fs in sorted(twice.items(), key=lambda x: (-len(x[1]), x[0])):
    print(f"  {name}: {', '.join(fs)}")


if __name__ == "__main__":
  main()
