"""What the documentation says can be done: its commands are taken by their programs, and what it
names is there.
"""

import ast
import re
import shlex
import tomllib

import pytest
import yaml
from parsers import ROOT, parser

from xcomp_jax.config_io import from_command_line

PAGES = [
  *(
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "launch/README.md", "docker/README.md")
  ),
  # the log says what was run when it was
  *(page for page in sorted(ROOT.glob("docs/**/*.md")) if page.name != "LOG.md"),
]


def commands(text):
  """(program, arguments) of the commands in blocks of shell lines, and in a sentence."""
  for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S):
    lines = shlex.shlex(
      re.sub(r"(^|\s)#.*", r"\1", block.replace("\\\n", " ")),
      posix=True,
      punctuation_chars="\n;&|",
    )
    lines.whitespace, lines.whitespace_split, lines.commenters = " \t", True, ""
    line = []
    for token in [*lines, "\n"]:
      if set(token) <= set("\n;&|"):
        if "-m" in line and (name := line[line.index("-m") + 1]).startswith("xcomp_jax."):
          yield name.removeprefix("xcomp_jax."), line[line.index("-m") + 2 :]
        line = []
      else:
        line.append(token)
  for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
    if (
      found := re.match(r"python -m xcomp_jax\.(\w+) (.+)", " ".join(code.split()))
    ) and "..." not in code:
      yield found[1], shlex.split(found[2])


def take(program, arguments, monkeypatch):
  """Has a program's own parser read the arguments, which ends the process (argparse) or raises
  where it can't.
  """
  if program == "train":
    from_command_line(["train", *arguments])
  else:
    _, more = parser(program, monkeypatch).parse_known_args(arguments)
    if program == "plan":
      from_command_line(["plan", *more])
    elif program != "bench_evaluate":  # whose other options are those of `evaluate`
      assert not more


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_take_the_commands(page, monkeypatch):
  monkeypatch.chdir(ROOT)
  for program, arguments in commands(page.read_text()):
    if arguments != ["--help"]:
      take(program, arguments, monkeypatch)


def test_a_command_that_its_program_does_not_take_is_found(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  text = (
    "```sh\npython -m xcomp_jax.world --out a \\\n  --trian 4  # a comment\n```\nand `python "
    "-m xcomp_jax.train --config=configs/sct.py:tiny\n--config.optim.rate=1`"
  )
  world, train = commands(text)
  assert world == ("world", ["--out", "a", "--trian", "4"])
  with pytest.raises(AssertionError):
    take(*world, monkeypatch)
  with pytest.raises(ValueError, match=r"config\.optim\.rate is unknown"):
    take(*train, monkeypatch)


def test_what_pages_name_is_there():
  make, extras = (
    (ROOT / "Makefile").read_text(),
    tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"],
  )
  for page in PAGES:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)", text):
      assert "://" in link or (page.parent / link).exists(), f"{page}: no {link}"
    for target in re.findall(r"(?:`|^)make ([\w-]+)", text, re.M):
      assert re.search(f"^{target}:", make, re.M), f"{page}: no make {target}"
    for names in re.findall(r"pip install [^\n`]*\[([\w,]+)\]", text):
      assert set(names.split(",")) <= extras.keys(), f"{page}: no extra {names}"
    for file, test in re.findall(r"pytest (tests/\w+\.py)(?: -m slow)?(?: -k (\w+))?", text):
      assert re.search(rf"def test_\w*{test}", (ROOT / file).read_text()), (
        f"{page}: {file} has no test {test}"
      )


def test_every_promise_has_its_test():
  rows = [
    line
    for line in (ROOT / "docs/promises.md").read_text().splitlines()
    if line.startswith("| ") and not set(line) <= set("|- ")
  ]
  for row in rows:
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(test_\w+))?`", row)
    assert named or "the same" in row or "Held by" in row, row
    for file, test in named:
      assert (
        f"\ndef {test}(" in (ROOT / "tests" / file).read_text()
        if test
        else (ROOT / "tests" / file).exists()
      ), f"no test {file}::{test}"


OTHERS = (
  "ensurepip is not available",
  "externally-managed",
  "No module named",
  "Unknown command line flag",
  "unrecognized arguments",
  "No space left on device",
)


def test_troubleshooting_has_the_messages_as_they_are():
  def words(text):
    return set(re.findall("[a-z_]{3,}", text.lower()))

  def texts(node):
    return " ".join(
      n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )

  trees = [ast.parse(file.read_text()) for file in ROOT.glob("xcomp_jax/**/*.py")]
  said = [
    words(texts(node))
    for tree in trees
    for node in ast.walk(tree)
    if isinstance(node, (ast.Constant, ast.JoinedStr, ast.Raise))
  ]
  said.append(words((ROOT / "Makefile").read_text()))
  rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
  for quote in (quote for row in rows for quote in re.findall("`([^`]+)`", row)):
    if len(words(quote)) > 2 and not quote.startswith(OTHERS):
      # Numbers, names and what else is filled in are other words there than here.
      assert max(len(words(quote) & other) for other in said) >= 0.6 * len(words(quote)), (
        f"no message like: {quote}"
      )


def test_the_citation_has_the_version_of_the_package():
  stated = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
  assert stated == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
