"""The parsers of commands, without running these."""

import argparse
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


class Met(Exception):
  """Instead of parsing."""


def command(program):
  """The module that a program is: of a package its __main__."""
  package = (ROOT / "xcomp_jax" / program).is_dir()
  return importlib.import_module(f"xcomp_jax.{program}" + ".__main__" * package)


def parser(program, monkeypatch):
  """The one that a program makes."""

  def meet(self, *_):
    raise Met(self)

  with monkeypatch.context() as patch:
    patch.setattr(argparse.ArgumentParser, "parse_known_args", meet)
    with pytest.raises(Met) as met:
      command(program).main([])
  return met.value.args[0]
