"""A leading ~ is the home directory in every path: of every command's options, of a config, of a
mixture.
"""

import argparse
import json
import pathlib
import re
import typing

import pytest
from parsers import ROOT, parser

from xcomp_jax import config, config_io, files
from xcomp_jax.data import mixture

COMMANDS = [
  f.parent.name if f.stem == "__main__" else f.stem
  for pattern in ("*.py", "*/__main__.py")
  for f in (ROOT / "xcomp_jax").glob(pattern)
  if 'if __name__ == "__main__":' in f.read_text()
  and f.stem != "train"
  and f != ROOT / "xcomp_jax" / "__main__.py"  # lists the others
]
# Options and values of any text that are no paths.
TEXTS = {
  "beam",
  "question",
  "share",
  "topology",
  "devices",
  "chip",
  "only",
  "clip_frames",
  "coordinator",
  "schedule",
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))


def takes(parser, action, text):
  try:
    return isinstance(parser._get_value(action, text), (str, pathlib.Path))
  except argparse.ArgumentError:  # a number with bounds
    return False


def options(parser):
  """Those of a parser and of its commands that take text."""
  for action in parser._actions:
    if isinstance(action, argparse._SubParsersAction):
      for command in action.choices.values():
        yield from options(command)
    elif action.nargs != 0 and not action.choices and takes(parser, action, "7"):
      yield parser, action


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_options_of_commands(command, tmp_path, monkeypatch):
  for own, action in options(parser(command, monkeypatch)):
    if action.dest not in TEXTS:
      assert str(own._get_value(action, "~/a b")) == f"{tmp_path}/a b", f"{command}: {action.dest}"


def test_all_commands_are_looked_at():
  assert {
    "ask",
    "evaluate",
    "export",
    "predecode",
    "needles",
    "world",
    "plan",
    "bench",
    "study",
    "demo",
    "parity",
  } <= set(COMMANDS)


def test_values_of_a_config(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  (tmp_path / "mine.py").write_text((ROOT / "configs" / "sct.py").read_text())
  texts = [
    name
    for name in config_io.keys(config.RunConfig)
    if name.split(".")[-1] not in TEXTS and text(name)
  ]
  assert set(texts) == {
    "config.workdir",
    "config.init_from",
    "config.compilation_cache",
    "config.data.train",
    "config.data.heldout",
  }
  for first in ("--config=~/mine.py:tiny", "--config=configs/sct.py:tiny"):
    run = config_io.from_command_line(["train", first, *(f"--{name}=~/{name}" for name in texts)])
    for name in texts:
      value = run
      for part in name.split(".")[1:]:
        value = getattr(value, part)
      assert value == f"{tmp_path}/{name}"
  run = config_io.from_command_line(
    ["train", "--config", "~/mine.py:tiny", "--config.data.train=('~/a','~/b')"]
  )
  assert run.data.train == (f"{tmp_path}/a", f"{tmp_path}/b")
  with pytest.raises(
    config.ConfigError, match=r"config\.data\.train = 3: expected str or tuple\[str, \.\.\.\]$"
  ):
    config_io.from_command_line(["train", "--config=configs/sct.py:tiny", "--config.data.train=3"])


def text(name):
  """Whether any text is a value of a key."""
  kind = config.RunConfig
  for part in name.split(".")[1:]:
    kind = typing.get_type_hints(kind)[part]
  return kind is str or str in typing.get_args(kind)


def test_paths_of_a_mixture(tmp_path):
  (tmp_path / "videos").mkdir()
  (tmp_path / "videos" / "x.png").write_bytes(b"")
  talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
  (tmp_path / "a.json").write_text(json.dumps([{"image": "x.png", "conversations": talk}]))
  (tmp_path / "m.yaml").write_text('datasets: [{json_path: "~/a.json", data_root: "~/videos"}]')
  for root in ("/nowhere", "~/videos"):
    (job,), _ = mixture.read_mixture("~/m.yaml", root, 1.0)
    assert job.sample.source == f"{tmp_path}/videos/x.png" and not job.faults
  assert job.sample.annotation == "~/a.json"  # as the mixture names it


def test_paths_of_functions(tmp_path):
  assert files.local("~/a", "a test") == tmp_path / "a"
  assert str(files.path_of("~nobody-has-this-name/a")) == "~nobody-has-this-name/a"
  assert re.fullmatch(re.escape(str(tmp_path)), str(files.path_of("~")))
