"""Reads and writes configs: nested dicts, files and command lines."""

import contextlib
import dataclasses
import difflib
import os
import runpy
import traceback
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from xcomp_jax.config import ConfigError, Path, RunConfig
from xcomp_jax.files import expanduser


def from_dict(cls: type, values: Any, where: str = "config"):
  """Builds dataclass `cls` from nested mappings.

  Raises:
    ConfigError: unknown or missing keys (all of them, with the nearest known name) or a value of
      another type.
  """
  if not isinstance(values, Mapping):
    raise ConfigError(f"{where} must be a group of keys, not {values!r}", where=where, value=values)
  hints = get_type_hints(cls, include_extras=True)
  problems = [f"{where}.{key} is missing" for key in hints.keys() - values.keys()]
  nearest = {}
  for key in values.keys() - hints.keys():
    names = [f"{where}.{name}" for name in hints]
    names += keys(RunConfig) if where.startswith("config") else []
    close = difflib.get_close_matches(key, hints, 1)
    known = [*(f"{where}.{name}" for name in close), *_same(key, names)]
    nearest[f"{where}.{key}"] = known[0] if known else None
    hint = f"did you mean {known[0]}?" if known else f"known: {', '.join(hints)}"
    problems.append(f"{where}.{key} is unknown; {hint}")
  if problems:
    raise ConfigError(
      "; ".join(sorted(problems)),
      where=where,
      missing=sorted(hints.keys() - values.keys()),
      nearest=nearest,
    )
  return cls(**{key: _convert(hint, values[key], f"{where}.{key}") for key, hint in hints.items()})


def keys(cls: type, where: str = "config") -> list[str]:
  """Full names of a dataclass's values, those of its groups included."""
  return [
    name
    for key, hint in get_type_hints(cls).items()
    for name in (
      keys(hint, f"{where}.{key}") if dataclasses.is_dataclass(hint) else [f"{where}.{key}"]
    )
  ]


def _same(key: str, names: list[str]) -> list[str]:
  """The full names that end in a key, or in words with it as initials, as `lr` for
  `config.optim.learning_rate`.
  """
  ends = {name: name.rpartition(".")[2] for name in names}
  return [
    name for name, end in ends.items() if key in (end, "".join(word[0] for word in end.split("_")))
  ]


def to_dict(config) -> dict[str, Any]:
  """The nested plain dict (tuples as lists) that `from_dict` reads back."""
  return dataclasses.asdict(
    config,
    dict_factory=lambda pairs: {
      name: list(value) if isinstance(value, tuple) else value for name, value in pairs
    },
  )


def from_command_line(argv: list[str]) -> RunConfig:
  """The RunConfig of `--config=FILE[:VARIANT]` and overrides such as
  `--config.optim.learning_rate=1e-4`.

  The last `--config` counts, and the last override of each key, wherever they stand: a launcher's
  come first, its user's after them.

  Raises:
    ConfigError: flags or keys that do not exist, values of the wrong type, a file that is not there
      or no config.
  """
  from absl import flags
  from ml_collections import config_flags

  # argparse would take -c, or -con, for it, and drop a --
  chosen, overrides = "", argv[:1]
  arguments = iter(argv[1:])
  for argument in arguments:
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config"):
      chosen = value if equals else next(arguments, "")
    else:
      overrides.append(argument)
  if not chosen:
    raise ConfigError("no config; add --config=configs/sct.py")
  made = _load(chosen)
  values = flags.FlagValues()
  try:
    # New keys are let through here, so that `from_dict` can name the nearest known one.
    config_flags.DEFINE_config_dict(
      "config",
      made,
      lock_config=False,
      accept_new_attributes=True,
      flag_values=values,
      sys_argv=overrides,
    )
    rest = values(overrides)
  except KeyError as error:  # an override in a group that is unknown
    raise _unknown_group(overrides, str(error.args[0])) from error
  except (flags.Error, AttributeError) as error:
    text = str(error.args[0] if error.args else error)
    raise ConfigError(" ".join(text.split()), where=" ".join(overrides[1:])) from error
  if len(rest) > 1:
    raise ConfigError(
      f"don't know what to do with {' '.join(rest[1:])}; options look like --config.train.steps=10",
      where=rest[1],
    )
  return from_dict(RunConfig, made.to_dict())


def _unknown_group(overrides: list[str], text: str) -> ConfigError:
  """Names the override in a group that no config has, with the nearest key there is."""
  known = keys(RunConfig)
  given = [argument.lstrip("-").partition("=")[0] for argument in overrides]
  wrong = next((name for name in given if name.startswith("config.") and name not in known), text)
  near = [
    *_same(wrong.rpartition(".")[2], known),
    *difflib.get_close_matches(wrong, known, 1, cutoff=0.8),
  ]
  hint = f"; did you mean {near[0]}?" if near else ""
  return ConfigError(
    f"{wrong} is unknown{hint}", where=wrong, nearest={wrong: near[0] if near else None}
  )


def _load(chosen: str):
  """The ConfigDict that `get_config` of FILE[:VARIANT] makes."""
  from ml_collections import ConfigDict

  file, colon, variant = expanduser(chosen).partition(":")
  if not os.path.isfile(file):
    where = "" if os.path.isabs(file) else f" in {os.getcwd()}"
    hint = (
      "; configs/ is in the repository, not in the package: run there, or copy the file"
      if file.startswith("configs/")
      else ""
    )
    raise ConfigError(f"no config file {file}{where}{hint}", where=file)
  try:
    found = runpy.run_path(file)
    if "get_config" not in found:
      raise ConfigError("it has no function get_config, as configs/sct.py has")
    made = found["get_config"](*([variant] if colon else []))
  except Exception as error:  # whatever the file's own code does
    lines = [
      frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file
    ]
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    raise ConfigError(
      f"{file}{f', line {lines[-1]}' if lines else ''}: {kind}{' '.join(str(error).split())}",
      where=file,
      line=lines[-1] if lines else None,
    ) from error
  if not isinstance(made, ConfigDict):
    raise ConfigError(
      f"{file}: get_config has to return an ml_collections.ConfigDict, not {type(made).__name__}",
      where=file,
      found=type(made).__name__,
    )
  return made


def _convert(hint, value, where: str):
  if dataclasses.is_dataclass(hint):
    return from_dict(hint, value, where)
  options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
  for option in options:
    origin = get_origin(option)
    if (
      dataclasses.is_dataclass(option)
      and isinstance(value, Mapping)
      and value.keys() == get_type_hints(option).keys()
    ):
      return from_dict(option, value, where)
    if type(value) is option or (origin is Literal and value in get_args(option)):
      return value
    if origin is tuple and isinstance(value, (list, tuple)):
      item = get_args(option)[0]
      with contextlib.suppress(ConfigError):
        return tuple(_convert(item, v, where) for v in value)
    if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
      return float(value)
    if option == Path and isinstance(value, str):
      return expanduser(value)
  wanted = " or ".join(map(_named, options))
  example = ", such as ((8, 4, 1024, 2048),)" if "tuple[tuple" in wanted else ""
  raise ConfigError(
    f"{where} = {value!r}: expected {wanted}{example}", where=where, value=value, expected=wanted
  )


def _named(option) -> str:
  """A type in words."""
  if get_origin(option) is Literal:
    return " or ".join(map(repr, get_args(option)))
  if option is type(None):
    return "None"
  name = str(option) if get_origin(option) else option.__name__
  return name.replace(str(Path), "str")
