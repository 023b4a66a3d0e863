"""Writes a checkpoint for others: `orbax` (parameters for `init_from`, notebooks, other JAX code) or `torch` (official layout).

  python -m xcomp_jax.export --checkpoint runs/sct --format=torch --out exports/sct

`--checkpoint` is the workdir of a run, or whatever `init_from` takes. Every tensor is written in the dtype of the
checkpoint that the run started from, so what was not trained is equal bit by bit; `--dtype=float32` keeps the
precision of trained parameters.
"""

import argparse
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from xcomp_jax import checkpoint, weights
from xcomp_jax.config import LPCompConfig, ModelConfig, VLMConfig
from xcomp_jax.optim import trained
from xcomp_jax.sharding import path_name

# What `read_config` needs beside the sizes; none of it changes a parameter.
AS_IT_IS = ModelConfig(
  clip_frames="checkpoint", dtype="float32", param_dtype="float32", clips_per_chunk=1, attention="auto", remat=False
)
NOT_TUNED = LPCompConfig(schedule="cosine", keep="none", group=16)


@dataclasses.dataclass(frozen=True)
class Source:
  """Parameters to be written, and the checkpoint that gives config.json, tokenizer files and dtypes."""

  state: nnx.State
  cfg: VLMConfig
  directory: pathlib.Path


def read(path: str, *, step: int | None = None, init_from: str | None = None) -> Source:
  """Parameters of a run's workdir or of an `init_from`.

  Args:
    path: either of the two.
    step: of a run; None: the latest checkpoint.
    init_from: of a run, if what it started from has moved.

  Raises:
    CheckpointError, FileNotFoundError: no such checkpoint, or a broken one.
  """
  if not checkpoint.folder(path).is_dir():
    if step is not None or init_from is not None:
      raise weights.CheckpointError(f"{path} is not the workdir of a run: it has no checkpoints/ to take a step of")
    directory = weights.resolve(path)
    cfg = weights.read_config(directory, AS_IT_IS, weights.read_lp_comp(directory) or NOT_TUNED)
    return Source(nnx.state(weights.load(directory, cfg)), cfg, directory)
  run, cfg, step = checkpoint.read_config(path, step)
  directory = weights.resolve(init_from or run.init_from)
  # A run may keep what it does not train in a shorter dtype, so that comes from where the run started.
  state = nnx.state(weights.load(directory, cfg))
  is_trained = lambda path: trained(run.train)(path_name(path).split("/"), None)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def like(path, leaf):
    dtype = run.model.param_dtype if is_trained(path) else run.model.dtype
    return jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype), sharding=device)

  tuned = checkpoint.read_params(path, jax.tree_util.tree_map_with_path(like, state), step)
  state = jax.tree_util.tree_map_with_path(lambda path, old, new: new if is_trained(path) else old, state, tuned)
  return Source(state, cfg, directory)


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(prog="python -m xcomp_jax.export", description=__doc__.splitlines()[0])
  parser.add_argument("--checkpoint", required=True, help="workdir of a run, or what init_from takes")
  parser.add_argument("--format", required=True, choices=("orbax", "torch"))
  parser.add_argument("--out", required=True, help="directory to be made")
  parser.add_argument("--step", type=int, help="of a run; default: its latest checkpoint")
  parser.add_argument("--init-from", help="of a run: where its starting checkpoint is, if that has moved")
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of all tensors; default: as in the starting checkpoint")
  parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
  args = parser.parse_args(argv)
  save = weights.save_torch if args.format == "torch" else weights.save_orbax
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what a reader of checkpoints always does
  try:
    weights.check_free(pathlib.Path(args.out), args.overwrite)
    source = read(args.checkpoint, step=args.step, init_from=args.init_from)
    save(pathlib.Path(args.out), source.state, source.cfg, source.directory, dtype=args.dtype, overwrite=args.overwrite)
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  leaves = jax.tree.leaves(source.state)
  print(f"{args.out}: {len(leaves)} tensors, {sum(leaf.size for leaf in leaves):,} parameters, {args.format} layout")


if __name__ == "__main__":
  main()
