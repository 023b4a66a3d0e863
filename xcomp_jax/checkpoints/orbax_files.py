"""Tensors of a checkpoint in the Orbax layout, under our names: strictly, into shardings."""

import contextlib
import math
import os
import pathlib
from collections.abc import Generator, Sequence

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from xcomp_jax.checkpoints.tensor_files import (
  DTYPES,
  CheckpointError,
  Target,
  by_path,
  raise_differences,
  read_object,
)
from xcomp_jax.checkpoints.tensor_names import Entry
from xcomp_jax.inputs import reading, regular

PACKED = 1000  # bytes of arrays in a byte of an Orbax directory's files, at most


def is_orbax(directory: pathlib.Path) -> bool:
  """Whether a checkpoint has the Orbax layout."""
  return (directory / "params").is_dir()


def only_files(folder: str | os.PathLike) -> None:
  """Raises an OSError if a folder of this machine holds anything but files and folders: pipes and
  devices are never opened.
  """
  for where, _, files in os.walk(folder):
    for file in files:
      regular(os.path.join(where, file))


@contextlib.contextmanager
def reading_orbax(folder: str | os.PathLike) -> Generator[None]:
  """Around what Orbax reads of a folder.

  Raises:
    CheckpointError: whatever Orbax, TensorStore or JSON raise of files that are missing, damaged or
      of another kind.
  """
  with reading(folder, CheckpointError):
    only_files(folder)
    yield


def orbax_dtypes(
  directory: pathlib.Path, entries: Sequence[Entry], packed: float = PACKED
) -> dict[str, np.dtype]:
  """Path -> stored dtype, checked against the table, and the sizes against those of the files.

  packed: bytes of arrays in a byte of files, at most.
  """
  import orbax.checkpoint as ocp

  folder = directory / "params"
  wanted = {e.path: e.ours for e in entries}
  with reading_orbax(folder):
    # Names first: they may be names of files, and those of another model's parameters are never
    # opened.
    described = read_object(folder / "_METADATA", "tree_metadata")["tree_metadata"].values()
    here = {"/".join(str(part["key"]) for part in tree["key_metadata"]) for tree in described}
    if here - wanted.keys():
      raise_differences(folder, wanted, {path: wanted.get(path, ()) for path in here})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      metadata = reader.metadata(folder.absolute()).item_metadata
    if metadata is None:
      raise CheckpointError(
        f"{folder} is damaged: a file that describes its arrays is missing or broken",
        where=folder,
      )
    found = by_path(metadata.tree)
    known = [str(dtype) for dtype in DTYPES.values()]
    raise_differences(
      folder,
      wanted,
      {path: tuple(leaf.shape) for path, leaf in found.items()},
      [
        f"{path} is {leaf.dtype}, not one of {', '.join(known)}"
        for path, leaf in found.items()
        if str(leaf.dtype) not in known
      ],
    )
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in found.items()}
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    asked = sum(math.prod(shape) * dtypes[path].itemsize for path, shape in wanted.items())
    if asked > packed * there:
      raise CheckpointError(
        f"{folder} is damaged: {asked / 1e9:,.1f} GB of arrays can't be in {there / 1e6:,.1f} MB "
        f"of files",
        where=folder,
        value=asked,
        allowed=packed * there,
      )
  return dtypes


def read_orbax(
  directory: pathlib.Path, entries: Sequence[Entry], target: Target
) -> dict[str, jax.Array]:
  """Our parameters by path, each where `target` says it goes.

  Raises:
    CheckpointError: arrays that are missing, unexpected, of another shape or damaged.
  """
  import orbax.checkpoint as ocp

  folder, own = directory / "params", orbax_dtypes(directory, entries)
  item = {}
  for e in entries:
    sharding, dtype = target(e.path, own[e.path])
    item[e.path] = jax.ShapeDtypeStruct(e.ours, dtype, sharding=sharding)
  largest = max(
    math.prod(e.ours) * max(own[e.path].itemsize, item[e.path].dtype.itemsize) for e in entries
  )
  # Orbax reads as many arrays at once as it is allowed to; this keeps host memory near the largest
  # of them.
  handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9)
  tree = unflatten_dict(item, sep="/")
  arguments = ocp.args.PyTreeRestore(
    item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
  )
  with reading_orbax(folder), ocp.Checkpointer(handler) as reader:
    return by_path(reader.restore(folder.absolute(), args=arguments))
