"""Writes a checkpoint for others.

Formats are `orbax` (parameters for `init_from`, notebooks, other JAX code) and `torch` (the
official layout).

  python -m xcomp_jax.export --checkpoint runs/sct --format=torch --out exports/sct

`--checkpoint` is the workdir of a run, or whatever `init_from` takes. Every tensor is written in
the dtype of the checkpoint that the run started from, so what was not trained is equal bit by bit;
`--dtype=float32` keeps the precision of trained parameters.
"""

import argparse
import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from xcomp_jax import cli, files
from xcomp_jax.checkpoints import finding, loading, saving, sizes, tuned
from xcomp_jax.checkpoints.tensor_files import CheckpointError, read_object
from xcomp_jax.config import LPCompConfig, Tuned, VLMConfig, Yarn
from xcomp_jax.config_io import from_dict
from xcomp_jax.inputs import reading
from xcomp_jax.parallel.mesh import path_name
from xcomp_jax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Source:
  """Parameters to be written, and the checkpoint that gives config.json, tokenizer files and
  dtypes.
  """

  state: nnx.State
  cfg: VLMConfig
  directory: pathlib.Path
  # what the parameters were tuned with; True: as `cfg` says; False: it is not known
  tuned: Tuned | bool


def read_source(path: str, *, step: int | None = None, init_from: str | None = None) -> Source:
  """Parameters of a run's workdir or of an `init_from`.

  Args:
    path: either of the two.
    step: of a run; None: the latest checkpoint.
    init_from: of a run, if what it started from has moved.

  Raises:
    CheckpointError, FileNotFoundError: no such checkpoint, a broken one, or not what the run
      started from.
  """
  if checkpoint.there(path):
    return _read_run(path, step, init_from)
  if step is not None or init_from is not None:
    raise CheckpointError(
      f"{path} is not the workdir of a run: it has no checkpoints/ to take a step of",
      where=path,
      missing="checkpoints",
    )
  if "://" in path:
    raise CheckpointError(
      f"{path} has no checkpoints/, and of what is in a bucket only a run's workdir can be read; "
      f"copy it here",
      where=path,
      found="a bucket",
    )
  directory = finding.resolve(path)
  found = tuned.read_tuned(directory)
  cfg = sizes.read_vlm_config(
    directory, saving.AS_IT_IS, found.lp_comp if found else saving.NOT_TUNED
  )
  return Source(nnx.state(loading.load_model(directory, cfg)), cfg, directory, found or False)


def _read_run(path: str, step: int | None, init_from: str | None) -> Source:
  saved, step = checkpoint.read_description(path, step)
  where = f"{path}, step {step}"
  with reading(where, CheckpointError):
    run, vlm = saved["run"], saved["vlm"]
    trained = run["train"]
    lp_comp = from_dict(LPCompConfig, run["lp_comp"], "lp_comp")
    clip_frames = int(vlm["clip_frames"])
    stretched = vlm["llm"].get("rope_scaling")
    yarn = stretched and from_dict(Yarn, stretched, "rope_scaling")
    dtypes = {
      True: np.dtype(run["model"]["param_dtype"]),  # of what is trained
      False: np.dtype(run["model"]["dtype"]),
    }
  directory = _resolve_start(where, run, init_from)
  cfg = sizes.read_vlm_config(directory, saving.AS_IT_IS, lp_comp)
  cfg = dataclasses.replace(
    cfg,
    llm=dataclasses.replace(cfg.llm, rope_scaling=yarn, tied=vlm["llm"].get("tied", cfg.llm.tied)),
    clip_frames=clip_frames,
  )
  # A run may keep what it does not train in a shorter dtype, so that comes from where the run
  # started.
  started = nnx.state(loading.load_model(directory, cfg))
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def is_trained(key):
    return trained[path_name(key).split("/")[0]]

  def as_saved(key, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, dtypes[is_trained(key)], sharding=device)

  def choose(key, started, saved):
    if is_trained(key):
      return saved
    if np.asarray(started).astype(saved.dtype).tobytes() != np.asarray(saved).tobytes():
      raise CheckpointError(
        f"{directory} is not what {path} started from: {path_name(key)}, which was not trained, "
        "differs; give the checkpoint that it did start from (--init-from)",
        where=directory,
        differs=path_name(key),
      )
    return started

  params = checkpoint.read_params(path, jax.tree_util.tree_map_with_path(as_saved, started), step)
  return Source(
    jax.tree_util.tree_map_with_path(choose, started, params),
    dataclasses.replace(cfg, dtype=run["model"]["dtype"]),
    directory,
    tuned=True,
  )


def _resolve_start(where: str, run: dict[str, Any], init_from: str | None) -> pathlib.Path:
  """The checkpoint that a run started from."""
  if init_from:
    return finding.resolve(init_from)
  try:
    return finding.resolve(run["init_from"])
  except CheckpointError as error:
    raise CheckpointError(
      f"{where} started from another place: {error}; --init-from DIR says where that is now",
      where=where,
      missing=run["init_from"],
    ) from error


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.export", description=__doc__.splitlines()[0]
  )
  parser.add_argument(
    "--checkpoint",
    type=files.expanduser,
    required=True,
    help="workdir of a run, or what init_from takes",
  )
  parser.add_argument("--format", required=True, choices=("orbax", "torch"))
  parser.add_argument("--out", type=files.expanduser, required=True, help="directory to be made")
  parser.add_argument("--step", type=int, help="of a run; default: its latest checkpoint")
  parser.add_argument(
    "--init-from",
    type=files.expanduser,
    help="of a run: where its starting checkpoint is, if that has moved",
  )
  parser.add_argument(
    "--dtype",
    choices=("bfloat16", "float32"),
    help="of all tensors; default: as in the starting checkpoint",
  )
  parser.add_argument(
    "--code",
    type=files.expanduser,
    metavar="ORG/NAME",
    help="hub id or directory with the Python files that config.json's auto_map names; "
    "default: beside the starting checkpoint, or else auto_map is left out",
  )
  parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
  args = parser.parse_args(argv)
  save = saving.save_torch if args.format == "torch" else saving.save_orbax
  # Orbax warns of what a reader of checkpoints always does
  logging.getLogger("absl").setLevel(logging.ERROR)
  with cli.command():
    out = files.local(args.out, "an export appears by a rename", written=True)
    files.apart(
      {"--out": out},
      {"--checkpoint": args.checkpoint, "--init-from": args.init_from, "--code": args.code},
      nested=True,
    )
    saving.check_free(out, args.overwrite)
    code = finding.resolve(args.code, "code") if args.code else None
    source = read_source(args.checkpoint, step=args.step, init_from=args.init_from)
    files.apart({"--out": out}, {"where the run started,": source.directory}, nested=True)
    if code:
      named_in = source.directory / "config.json"
      auto_map = read_object(named_in).get("auto_map")
      if not auto_map:
        raise CheckpointError(
          f"{named_in} has no auto_map, which would name the files of --code; leave --code out",
          where=named_in,
          missing="auto_map",
        )
      if missing := saving.missing_code(auto_map, code):
        raise CheckpointError(
          f"{code} has no {', '.join(missing)}, which auto_map of {named_in} asks for",
          where=code,
          missing=missing,
        )
    save(
      out,
      source.state,
      source.cfg,
      source.directory,
      tuned=source.tuned,
      dtype=args.dtype,
      overwrite=args.overwrite,
      code=code,
    )
  leaves = jax.tree.leaves(source.state)
  print(
    f"{args.out}: {len(leaves)} tensors, {sum(leaf.size for leaf in leaves):,} parameters, "
    f"{args.format} layout"
  )


if __name__ == "__main__":
  main()
