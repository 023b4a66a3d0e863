"""From a checkpoint's directory to a model.

Two directory layouts are read here, and written by export.py. Both hold config.json (official form)
  and the tokenizer's files: torch  *.safetensors, with model.safetensors.index.json when there are
  several; Orbax  params/, a tree of our parameters.
xcomp.json beside them, if there is one, says what the weights were tuned with: LP-Comp, clips,
image size, dtype, context.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from xcomp_jax.checkpoints.orbax_files import is_orbax, orbax_dtypes, read_orbax
from xcomp_jax.checkpoints.tensor_files import (
  DTYPES,
  CheckpointError,
  by_path,
  open_torch,
  read_torch,
)
from xcomp_jax.checkpoints.tensor_names import names
from xcomp_jax.config import LPCompConfig, VLMConfig
from xcomp_jax.data import prompt
from xcomp_jax.model import vlm
from xcomp_jax.model.vlm import VLM


def read_tokenizer(directory: pathlib.Path, cfg: VLMConfig) -> prompt.Tokenizer:
  """The tokenizer that lies with a checkpoint.

  Raises:
    FileNotFoundError, ValueError: see `prompt.load_tokenizer`.
    CheckpointError: it has ids beyond the model's embedding table, of which there is no embedding.
  """
  tokenizer = prompt.load_tokenizer(directory)
  if tokenizer.vocab_size > cfg.llm.vocab_size:
    raise CheckpointError(
      f"{directory}: the tokenizer's ids go up to {tokenizer.vocab_size - 1}, but the embedding "
      f"table has only {cfg.llm.vocab_size} rows (vocab_size in config.json): they are not of the "
      "same model",
      where=directory,
      value=tokenizer.vocab_size,
      allowed=cfg.llm.vocab_size,
    )
  return tokenizer


def abstract(cfg: VLMConfig) -> VLM:
  """The model with ShapeDtypeStructs for parameters: no memory, no random numbers."""
  return nnx.eval_shape(lambda: VLM(cfg, rngs=_OneKey()))


class _OneKey(nnx.Rngs):
  """The same key for every parameter: a counter of keys, traced, makes each layer slower to build
  than the one before.
  """

  def __init__(self):
    pass

  def params(self) -> jax.Array:
    """The key."""
    return jax.random.key(0)


def with_lp_comp(model: VLM, lp_comp: LPCompConfig) -> VLM:
  """A model of the same parameters (shared, not copied) under another LP-Comp."""
  cfg = dataclasses.replace(model.cfg, lp_comp=lp_comp)
  return nnx.merge(nnx.graphdef(abstract(cfg)), nnx.state(model))


def stored(directory: pathlib.Path, cfg: VLMConfig) -> dict[str, np.dtype]:
  """The dtype of every parameter, by path, as the checkpoint holds it.

  Raises:
    CheckpointError: a checkpoint that is not this model's (see `load_model`).
  """
  directory = pathlib.Path(directory)
  if is_orbax(directory):
    return orbax_dtypes(directory, names(cfg))
  tensors = open_torch(directory, names(cfg))
  return {e.path: DTYPES[tensors[e.name].dtype] for e in names(cfg)}


def parameters(model: nnx.Module | nnx.State) -> dict[str, Any]:
  """Leaves of a model or its state by path, as in `Entry.path`."""
  return by_path(model if isinstance(model, nnx.State) else nnx.state(model))


def load_model(
  directory: pathlib.Path,
  cfg: VLMConfig,
  *,
  shardings: nnx.State | None = None,
  dtype: Callable[[str], Any] | Any | None = None,
) -> VLM:
  """The model with a checkpoint's parameters.

  Each tensor goes from its file straight into its target sharding and dtype, one after the other, a
  device's slice at a time: the host never holds a second copy of the model.

  Args:
    directory: of the torch or the Orbax layout.
    cfg: from `read_vlm_config`.
    shardings: a Sharding per parameter (`mesh.param_shardings`); None: `jax.default_device`
      holds all, else the first device.
    dtype: of the parameters, or path -> dtype; None: as stored.

  Raises:
    CheckpointError: a file that is missing or broken; or tensors missing, unexpected or mis-shaped,
      all of them in one message, before anything is allocated.
  """
  directory = pathlib.Path(directory)
  entries = names(cfg)
  # Refuses what is not there before a model is made, which takes a minute for a thousand layers.
  stored(directory, cfg)
  graph, state = nnx.split(abstract(cfg))
  shapes = {path: leaf.shape for path, leaf in by_path(state).items()}
  assert {e.path: e.ours for e in entries} == shapes, "table and model differ"
  place = {} if shardings is None else by_path(shardings)
  chosen = jax.config.jax_default_device  # ty: ignore[missing-attribute]  (made at run time)
  first = SingleDeviceSharding(
    chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]
  )

  def target(path, own):
    wanted = dtype(path) if callable(dtype) and not isinstance(dtype, type) else dtype
    return place.get(path, first), np.dtype(own if wanted is None else wanted)

  arrays = (read_orbax if is_orbax(directory) else read_torch)(directory, entries, target)
  return nnx.merge(
    graph, jax.tree.unflatten(jax.tree.structure(state), [arrays[path] for path in shapes])
  )


def tower_identity(model: vlm.VLM) -> str:
  """A hash of the tower's sizes, settings and weights (as bfloat16), whatever it computes in; the
  projector comes later.

  Where several processes share the parameters, all of them must call this; each holds one whole
  array at a time.
  """
  cfg = model.cfg
  digest = hashlib.blake2b(
    repr((cfg.vision, cfg.clip_frames, cfg.tokens_per_frame)).encode(), digest_size=16
  )
  for path, leaf in sorted(
    jax.tree_util.tree_leaves_with_path(nnx.state(model.vision)), key=lambda item: str(item[0])
  ):
    digest.update(str(path).encode())
    whole = (
      leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
    )
    digest.update(np.ascontiguousarray(whole).astype(ml_dtypes.bfloat16).view(np.uint8).data)
  return digest.hexdigest()
