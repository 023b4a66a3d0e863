"""A run's own folder: it can be written, is one for all processes, and one run's at a time."""

import contextlib
import json
import secrets
import time
from collections.abc import Generator

import jax
from etils import epath
from jax.experimental import multihost_utils

from xcomp_jax.config import ConfigError
from xcomp_jax.errors import one_line
from xcomp_jax.files import locked
from xcomp_jax.parallel import hosts

LAGS = 5  # seconds that a shared file system may take to show one host what another wrote


def claim(workdir: str) -> None:
  """Makes the work directory, and checks that it can be written and is the same for all processes,
  before anything expensive happens. All of them must call this.

  Raises:
    ConfigError: it can't, or is not.
  """
  path = epath.Path(workdir)
  _check_own(path)
  try:
    for part in (path, path / "checkpoints", path / "tensorboard"):
      part.mkdir(parents=True, exist_ok=True)
    probe = path / f".write-test-{jax.process_index()}"
    probe.write_text("")
    probe.unlink()
  except Exception as error:  # those of a bucket's clients have no common base
    raise ConfigError(
      f"workdir {workdir} can't be written ({one_line(error)}); set config.workdir to a folder "
      f"that can",
      where="config.workdir",
      value=workdir,
    ) from error
  if jax.process_count() == 1:
    return
  mark = path / f".shared-{hosts.gather(secrets.randbits(31))[0]}"
  if jax.process_index() == 0:
    mark.write_text("")
  multihost_utils.sync_global_devices("the workdir is marked")
  waited = 0
  while not (seen := mark.exists()) and waited < LAGS:
    time.sleep(1)
    waited += 1
  blind = [i for i, sees in enumerate(hosts.gather(seen)) if not sees]
  if jax.process_index() == 0:
    mark.unlink()
  if blind:
    raise ConfigError(
      f"config.workdir = {workdir} is not one folder for all processes: process "
      f"{', '.join(map(str, blind))} can't see what process 0 writes there; set it to a shared "
      "file system or a bucket (gs://)",
      where="config.workdir",
      blind=blind,
    )


def _check_own(path: epath.Path) -> None:
  """Refuses a folder whose config.json is not a run's, for a run would write its own there."""
  try:
    there = json.loads((path / "config.json").read_text())
  except (
    Exception
  ):  # nothing there, or cut off by a kill; those of a bucket's clients have no common base
    return
  if not isinstance(there, dict) or not there.keys() >= {"init_from", "workdir"}:
    raise ConfigError(
      f"workdir {path} holds a config.json that is not a run's, such as a checkpoint's, which "
      f"would be overwritten; set config.workdir to another folder",
      where=str(path / "config.json"),
    )


@contextlib.contextmanager
def holding(workdir: str) -> Generator[None]:
  """Keeps other runs out of a workdir, as far as its file system has locks; a bucket has none.

  Raises:
    ConfigError: another run is at work in it.
  """
  if jax.process_index() or "://" in workdir:
    yield
    return
  with locked(
    epath.Path(workdir) / ".lock",
    ConfigError(
      f"another run is at work in {workdir}; set config.workdir to another folder, or if these are "
      "the processes of one run, see to it that they find each other (config.distributed)",
      where="config.workdir",
      value=workdir,
    ),
  ):
    yield
