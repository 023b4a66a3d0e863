"""progress.py: a bar for people, lines for logs."""

import contextlib
import io
import pathlib
import sys

import pytest

import xcomp_jax
from xcomp_jax import progress

pytestmark = pytest.mark.pure


def work(**how) -> None:
  with progress.progress(total=3, desc="work", unit="sample", **how) as bar:
    for name in "abc":
      bar.set_description(name, refresh=False)
      bar.update()
    bar.write("a line of something else", file=sys.stderr)


@pytest.mark.parametrize("how", [{}, {"leave": False}])
def test_a_log_gets_lines_and_a_last_one(capsys, how):
  work(seconds=0.0, **how)  # a line whenever there would be one every half minute
  lines = capsys.readouterr().err.split("\n")
  assert lines.pop() == "" and "\r" not in "".join(lines)
  assert [line.split("[")[0].strip() for line in lines] == [
    "work:   0%|          | 0/3",
    "a:  33%|###3      | 1/3",
    "b:  67%|######6   | 2/3",
    "c: 100%|##########| 3/3",
    "a line of something else",
    *(["c: 100%|##########| 3/3"] if how.get("leave", True) else []),
  ]


def test_short_work_leaves_no_line_in_a_log(capsys):
  work()
  assert capsys.readouterr().err == "a line of something else\n"


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def test_a_terminal_gets_a_bar_at_once():
  with contextlib.redirect_stderr(Terminal()) as terminal:
    work()
  assert terminal.getvalue().startswith("\rwork:   0%") and "3/3" in terminal.getvalue()


def test_nothing_else_shows_bars():
  files = pathlib.Path(xcomp_jax.__file__).parent.rglob("*.py")
  assert {f.name for f in files if "import tqdm" in f.read_text()} == {"progress.py", "cli.py"}
