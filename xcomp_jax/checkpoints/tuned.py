"""What the weights of a checkpoint were tuned with: xcomp.json."""

import dataclasses
import operator
import os
import pathlib

from xcomp_jax.checkpoints.config_json import FRAMES, PIXELS, POSITIONS, WIDTH, check_kinds
from xcomp_jax.checkpoints.tensor_files import CheckpointError, read_object
from xcomp_jax.config import Tuned
from xcomp_jax.config_io import from_dict, to_dict
from xcomp_jax.files import write_json

EXTRA, VERSION = "xcomp.json", 1
BOUNDS = {
  "lp_comp.group": WIDTH,
  "clip_frames": FRAMES,
  "image_size": PIXELS,
  "context": POSITIONS,
}


def read_tuned(directory: pathlib.Path) -> Tuned | None:
  """What an exported checkpoint was tuned with; None if there is no xcomp.json.

  Raises:
    CheckpointError: a broken xcomp.json, one of a newer version, or numbers that can't be.
    ConfigError: keys in it that are unknown or missing.
  """
  file = pathlib.Path(directory) / EXTRA
  # a link that leads nowhere is an error: without it LP-Comp would be another one
  if not os.path.lexists(file):
    return None
  values = read_object(file, "lp_comp")
  if (version := values.pop("version", VERSION)) != VERSION:
    raise CheckpointError(
      f"{file} has version {version!r}, this xcomp_jax reads {VERSION}: install a newer one",
      where=file,
      value=version,
      allowed=VERSION,
    )
  absent = {field.name: None for field in dataclasses.fields(Tuned) if field.default is None}
  tuned = from_dict(Tuned, absent | values, str(file))
  numbers = {key: operator.attrgetter(key)(tuned) for key in BOUNDS}
  check_kinds(file, numbers, {key: BOUNDS[key] for key in numbers if numbers[key] is not None})
  return tuned


def write_tuned(directory: pathlib.Path, tuned: Tuned) -> None:
  """Writes xcomp.json."""
  write_json(pathlib.Path(directory) / EXTRA, {"version": VERSION} | to_dict(tuned), indent=2)
