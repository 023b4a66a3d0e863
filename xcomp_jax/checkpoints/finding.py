"""Where a checkpoint is: a directory here, or one at the hub."""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable
from typing import Literal

from xcomp_jax.checkpoints.orbax_files import is_orbax
from xcomp_jax.checkpoints.tensor_files import INDEX, CheckpointError, shards
from xcomp_jax.errors import one_line
from xcomp_jax.files import local

ABOUT = ["*.json", "*.txt", "*.jinja"]  # files that describe a model


def resolve(
  init_from: str | os.PathLike,
  what: Literal["all", "about", "code"] = "all",
  download: Callable[..., str] | None = None,
) -> pathlib.Path:
  """The local directory of `init_from`: a directory, or a hub id org/name (from the local cache if
  it is there).

  Args:
    init_from: either of the two.
    what: is fetched: all; what describes the model, but not its weights; or Python files alone.
    download: does it; None: `huggingface_hub.snapshot_download`.

  Raises:
    CheckpointError: neither.
    ValueError: it is in a bucket.
  """
  path = local(
    init_from, "a checkpoint is read from files (`export` makes one of a run's workdir there)"
  )
  if path.is_dir():
    return path
  if path.exists():
    raise CheckpointError(
      f"{init_from} is a file; give the directory that holds config.json and the weights",
      where=path,
      found="a file",
    )
  name = os.fspath(init_from)
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
    raise CheckpointError(f"there is no directory {name}", where=name, found=None)
  from huggingface_hub import constants, snapshot_download

  if constants.HF_HOME.startswith("~"):  # it would make a folder of that name
    raise CheckpointError(
      f"there is no directory {name}, and as a hub id it can't be fetched: this user has no home "
      f"directory; set HF_HOME to a folder",
      where=name,
      missing="HF_HOME",
    )
  download = download or snapshot_download
  wanted, complete = {
    "all": ([*ABOUT, "*.safetensors", "params/*"], _is_whole),
    "about": (ABOUT, _is_described),
    "code": (["*.py"], _has_code),
  }[what]
  try:
    if what != "code":  # a cache may hold only some Python files, and nothing lists them
      with contextlib.suppress(FileNotFoundError):  # not in the cache
        cached = pathlib.Path(download(name, local_files_only=True, allow_patterns=wanted))
        if complete(cached):
          return cached
    fetched = pathlib.Path(download(name, allow_patterns=wanted))
    if complete(fetched):
      return fetched
    raise FileNotFoundError(f"only a part of it is there: {fetched}")
  except Exception as error:  # the hub's client has no common base for what goes wrong on a network
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise CheckpointError(
      f"there is no directory {init_from}, and as a hub id it can't be fetched: "
      f"{type(error).__name__}: {lines[0]}",
      where=name,
      found=one_line(error),
    ) from error


def _has_code(directory: pathlib.Path) -> bool:
  return any(directory.glob("*.py"))


def _is_described(directory: pathlib.Path) -> bool:
  return (directory / "config.json").exists()


def _is_whole(directory: pathlib.Path) -> bool:
  """Whether a cached snapshot holds all of its files: a broken download leaves some out."""
  if (directory / INDEX).exists():
    return all(file.exists() for file in shards(directory))
  return _is_described(directory) and (is_orbax(directory) or any(directory.glob("*.safetensors")))
