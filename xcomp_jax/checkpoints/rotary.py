"""How a config.json says that positions are rotated and stretched, in any form that the
transformers library has had.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from xcomp_jax.checkpoints.config_json import ABOVE_0, POSITIONS, check_kinds
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.config import Yarn

SCALINGS = ("rope_scaling", "rope_parameters")  # as transformers has it up to 4, and from 5 on
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of YaRN, where nothing else is said
KNOWN = {
  "attention_factor",
  "beta_fast",
  "beta_slow",
  "factor",
  "original_max_position_embeddings",
  "rope_theta",
  "rope_type",
}
ONLY = {"partial_rotary_factor": 1, "truncate": True}  # the only values of these


def rope_theta(file: pathlib.Path, c: Mapping[str, Any]) -> Any:
  """Reads the base of rotary positions: a key of its own up to transformers 4, in `rope_parameters`
  from 5 on; None: nowhere.

  Raises:
    CheckpointError: several that differ.
  """
  said = {"rope_theta": c.get("rope_theta")} | {
    f"{key}.rope_theta": c[key].get("rope_theta")
    for key in SCALINGS
    if isinstance(c.get(key), Mapping)
  }
  said = {key: value for key, value in said.items() if value is not None}
  return _agreed(file, said, said)


def read_scaling(file: pathlib.Path, c: Mapping[str, Any]) -> Yarn | None:
  """Reads how config.json stretches positions, from whichever of `rope_scaling` and
  `rope_parameters` there is.

  Raises:
    CheckpointError: they differ; see also `read_yarn`.
  """
  said = {key: c[key] for key in SCALINGS if c.get(key) is not None}
  return _agreed(
    file, said, {key: read_yarn(f"{file}: {key}", values) for key, values in said.items()}
  )


def _agreed(file: pathlib.Path, said: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
  """Gives the one value that several keys of config.json give; None if there are none.

  Which of them counts depends on the version of transformers that reads the file, so there is no
  right one to choose.

  Args:
    file: config.json, for the message.
    said: key -> what stands there.
    values: key -> what that means.

  Raises:
    CheckpointError: they differ.
  """
  first = next(iter(values.values()), None)
  if any(value != first for value in values.values()):
    words = ", but ".join(f"{key} = {said[key]!r}" for key in values)
    raise CheckpointError(
      f"{file}: {words}; keep the one that the weights were trained with, and take the other out",
      where=file,
      differ=dict(said),
    )
  return first


def read_yarn(where: str, values: Any) -> Yarn | None:
  """What `rope_scaling` or `rope_parameters` of a config.json says, in the form of the transformers
  library.

  Raises:
    CheckpointError: another kind of scaling, keys missing or unknown, or values of the wrong kind.
  """
  if values is None:
    return None
  check_kinds(where, values, {})
  bare = values.keys() <= {"rope_theta"}  # as transformers reads it
  kind = values.get("rope_type", values.get("type", "default" if bare else None))
  if values.get("type", kind) != kind:
    raise CheckpointError(
      f"{where}: type {values['type']!r} and rope_type {kind!r} differ; take the wrong one out",
      where=where,
      differ={"type": values["type"], "rope_type": kind},
    )
  if kind not in ("default", "yarn"):
    raise CheckpointError(
      f"{where}: type {kind!r} is not supported; yarn is, and none at all (null)",
      where=where,
      value=kind,
      allowed=("default", "yarn"),
    )
  said = {key: value for key, value in values.items() if value is not None}
  if other := sorted(k for k in said.keys() - KNOWN - {"type"} if said[k] != ONLY.get(k)):
    raise CheckpointError(
      f"{where}: {', '.join(other)} of YaRN not supported; {', '.join(sorted(KNOWN))} are",
      where=where,
      unknown=other,
    )
  if kind == "default":
    return None
  optional = [key for key in ("attention_factor", *BETAS) if key in said]
  check_kinds(
    where,
    values,
    {"factor": ABOVE_0, "original_max_position_embeddings": POSITIONS}
    | dict.fromkeys(optional, ABOVE_0),
  )
  if said["factor"] < 1:
    raise CheckpointError(
      f"{where}: factor = {said['factor']}: must be at least 1",
      where=where,
      wrong={"factor": said["factor"]},
    )
  return yarn_of(
    said["factor"],
    said["original_max_position_embeddings"],
    said.get("attention_factor"),
    **{key: said[key] for key in BETAS if key in said},
  )


def yarn_of(
  factor: float, positions: float, attention: float | None = None, **betas: float
) -> Yarn:
  """YaRN as Qwen2.5 has it; attention None: the square root of what scores gain, 0.1 ln(factor) + 1
  (Peng et al. 2023, 3.4).
  """
  gain = 0.1 * math.log(factor) + 1 if attention is None else attention
  return Yarn(
    factor=float(factor),
    positions=int(positions),
    attention=float(gain),
    **{key: float(value) for key, value in (BETAS | betas).items()},
  )


def rope_scaling(yarn: Yarn | None) -> dict[str, Any] | None:
  """The inverse of `read_yarn`."""
  if yarn is None:
    return None
  values = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": yarn.factor,
    "original_max_position_embeddings": yarn.positions,
  }
  if yarn == yarn_of(yarn.factor, yarn.positions):
    return values
  return values | {
    "attention_factor": yarn.attention,
    "beta_fast": yarn.beta_fast,
    "beta_slow": yarn.beta_slow,
  }
