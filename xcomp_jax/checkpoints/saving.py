"""Writes a checkpoint for others, whole or not at all: Orbax, or the official layout."""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from xcomp_jax import files, inputs
from xcomp_jax.checkpoints import config_json, loading, tensor_files, tensor_names
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.checkpoints.tuned import write_tuned
from xcomp_jax.config import Dtype, LPCompConfig, ModelConfig, Tuned, VLMConfig
from xcomp_jax.errors import one_line

TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "vocab.json",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.jinja",
)
RELATIVE = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)  # of modules in the same folder
SHARD_BYTES = 5_000_000_000  # of one written safetensors file, as HF cuts them
CODES = {dtype: code for code, dtype in tensor_files.DTYPES.items()}

# What `read_vlm_config` needs beside the sizes; none of it changes a parameter.
AS_IT_IS = ModelConfig(
  clip_frames="checkpoint",
  yarn="checkpoint",
  dtype="float32",
  param_dtype="float32",
  clips_per_chunk=1,
  attention="auto",
  remat=False,
)
NOT_TUNED = LPCompConfig(schedule="cosine", keep="none", group=16)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor to be written: its blocks of leading rows come one after the other."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  blocks: Callable[[], Iterable[np.ndarray]]

  @property
  def bytes(self) -> int:
    """Size in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


def save_torch(
  directory: pathlib.Path,
  model: nnx.Module | nnx.State,
  cfg: VLMConfig,
  source: pathlib.Path,
  *,
  tuned: Tuned | bool = True,
  dtype: Any | None = None,
  overwrite: bool = False,
  code: pathlib.Path | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes an official-layout directory, and checks its names, shapes and dtypes against `source`
  before it appears.

  Args:
    directory: to be made; appears whole or not at all.
    model: parameters of `cfg`.
    cfg: of the model; config.json gets its clip length (quirk Q1).
    source: the checkpoint that the model was made from: gives config.json, tokenizer files and
      dtypes.
    tuned: what xcomp.json says; True: what `cfg` says; False: none is written, as in official
      checkpoints, whose LP-Comp their user chooses.
    dtype: of all tensors; None: each as in `source`, so a parameter that was not trained is equal
      bit by bit.
    overwrite: replace a checkpoint that is there.
    code: where the Python files lie that `auto_map` of config.json names; None: in `source`.
    shard_bytes: largest size of one file (a larger single tensor gets a file of its own).

  Raises:
    CheckpointError: see `check_free`; a directory that can't be written; a broken source.
  """
  arrays, dtypes = _parameters(directory, model, cfg, source, dtype)
  tensors = [
    Tensor(
      e.name, e.shape, dtypes[e.path], lambda e=e: _official(e, arrays[e.path], dtypes[e.path])
    )
    for e in sorted(tensor_names.names(cfg), key=lambda e: e.name)
  ]
  with appearing(directory, overwrite, sum(tensor.bytes for tensor in tensors)) as temporary:
    write_safetensors(temporary, tensors, shard_bytes)
    _copy_rest(temporary, source, cfg, tuned, dtype, code)
    written = loading.stored(temporary, cfg)
    if wrong := [path for path in dtypes if written[path] != dtypes[path]]:
      raise CheckpointError(
        f"{directory} would not be as {source}: "
        + "; ".join(f"{path} is {written[path]}" for path in wrong),
        where=directory,
        wrong=wrong,
      )


def save_orbax(
  directory: pathlib.Path,
  model: nnx.Module | nnx.State,
  cfg: VLMConfig,
  source: pathlib.Path,
  *,
  tuned: Tuned | bool = True,
  dtype: Any | None = None,
  overwrite: bool = False,
  code: pathlib.Path | None = None,
) -> None:
  """Writes parameters (params/, nested dicts by path), config.json, xcomp.json and tokenizer files.

  Arguments and errors as in `save_torch`. Other JAX code reads it with
  `orbax.checkpoint.StandardCheckpointer().restore(directory / "params")`.
  """
  import orbax.checkpoint as ocp

  arrays, dtypes = _parameters(directory, model, cfg, source, dtype)
  settings = {path: ocp.SaveArgs(dtype=dtypes[path]) for path in arrays}
  size = sum(a.size * dtypes[path].itemsize for path, a in arrays.items())
  with appearing(directory, overwrite, size) as temporary:
    try:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(
          (temporary / "params").absolute(),
          args=ocp.args.PyTreeSave(
            unflatten_dict(arrays, sep="/"), save_args=unflatten_dict(settings, sep="/")
          ),
        )
    except Exception as error:  # of a disk that has become full TensorStore says so by a ValueError
      raise OSError(one_line(error)[:500]) from error
    _copy_rest(temporary, source, cfg, tuned, dtype, code)


def _parameters(
  directory: pathlib.Path,
  model: nnx.Module | nnx.State,
  cfg: VLMConfig,
  source: pathlib.Path,
  dtype: Any | None,
) -> tuple[dict[str, jax.Array], dict[str, np.dtype]]:
  """Parameters by path, all that `cfg` has, and the dtype in which each is written."""
  arrays = loading.parameters(model)
  wanted = {e.path: e.ours for e in tensor_names.names(cfg)}
  tensor_files.raise_differences(
    pathlib.Path(directory), wanted, {path: a.shape for path, a in arrays.items()}
  )
  if dtype is None:
    return arrays, loading.stored(source, cfg)
  return arrays, dict.fromkeys(arrays, np.dtype(dtype))


def _official(entry: tensor_names.Entry, array: jax.Array, dtype: np.dtype) -> Iterator[np.ndarray]:
  """The official tensor of our parameter, in blocks of rows."""
  ours = np.asarray(array)
  if entry.form == "patch":
    width, rgb, _, p, _ = entry.shape
    yield np.ascontiguousarray(
      ours.reshape(p, p, rgb, width).transpose(3, 2, 0, 1).reshape(entry.shape), dtype
    )
    return
  rows = ours.T if entry.form == "transpose" else ours
  for start in range(0, len(rows), tensor_files.ROWS):
    yield np.ascontiguousarray(rows[start : start + tensor_files.ROWS], dtype)


def write_safetensors(
  directory: pathlib.Path, tensors: Sequence[Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
  """Streams tensors into model.safetensors, or into numbered files with an index if they exceed
  `shard_bytes`.
  """
  shards: list[list[Tensor]] = [[]]
  for tensor in tensors:
    if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
      shards.append([])
    shards[-1].append(tensor)
  if len(shards) == 1:
    _write_file(directory / "model.safetensors", shards[0])
    return
  named = {
    f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)
  }
  for name, shard in named.items():
    _write_file(directory / name, shard)
  files.write_json(
    directory / tensor_files.INDEX,
    {
      "metadata": {"total_size": sum(tensor.bytes for tensor in tensors)},
      "weight_map": {tensor.name: name for name, shard in named.items() for tensor in shard},
    },
    indent=2,
  )


def _write_file(file: pathlib.Path, tensors: Sequence[Tensor]) -> None:
  """Writes one safetensors file, block by block; the library would need all of it in memory."""
  offsets = itertools.accumulate((tensor.bytes for tensor in tensors), initial=0)
  header = {"__metadata__": {"format": "pt"}} | {
    tensor.name: {
      "dtype": CODES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": place,
    }
    for tensor, place in zip(tensors, itertools.pairwise(offsets))
  }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(file, "wb") as out:
    out.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
      for block in tensor.blocks():
        out.write(block.view(np.uint8).data)


def _copy_rest(
  directory: pathlib.Path,
  source: pathlib.Path,
  cfg: VLMConfig,
  tuned: Tuned | bool,
  dtype: Any | None,
  code: pathlib.Path | None,
) -> None:
  """config.json and the code that it names, xcomp.json if `tuned`, and tokenizer files."""
  source = pathlib.Path(source)
  config = _exported_config(source / "config.json", cfg, dtype)
  if config.get("auto_map"):
    folder = code or source
    if missing := missing_code(config["auto_map"], folder):
      del config["auto_map"]
      print(
        f"auto_map is left out of config.json: {folder} has no {', '.join(missing)}. --code "
        "ORG/NAME fetches such files, or takes them from a directory; without them the official "
        "code has to be imported by hand",
        file=sys.stderr,
      )
    else:
      for python in folder.glob("*.py"):
        shutil.copyfile(python, directory / python.name)
  files.write_json(directory / "config.json", config, indent=2)
  if tuned is True:
    tuned = Tuned(
      lp_comp=cfg.lp_comp,
      clip_frames=cfg.clip_frames,
      image_size=cfg.vision.image_size,
      dtype=cast(Dtype, cfg.dtype),
      context=cfg.llm.context,
    )
  if tuned:
    write_tuned(directory, tuned)
  copy_tokenizer(directory, source)


def _exported_config(file: pathlib.Path, cfg: VLMConfig, dtype: Any | None) -> dict[str, Any]:
  """The source's config.json as the official code reads it, with what differs in the model."""
  config = tensor_files.read_object(file) | {
    "mm_local_num_frames": cfg.clip_frames,
    "tie_word_embeddings": cfg.llm.tied,
  }
  if config_json.read_scaling(file, config) != cfg.llm.rope_scaling or "rope_parameters" in config:
    # The official code reads the keys of transformers 4, and transformers 5 reads these, too.
    config |= {
      "rope_theta": cfg.llm.rope_theta,
      "rope_scaling": config_json.rope_scaling(cfg.llm.rope_scaling),
    }
    config.pop("rope_parameters", None)
  stated = config.pop("dtype", None)
  if stated is not None or dtype is not None:
    config["torch_dtype"] = stated if dtype is None else np.dtype(dtype).name
  if not isinstance(config.get("auto_map", {}), (dict, type(None))):
    raise CheckpointError(
      f"{file}: auto_map = {config['auto_map']!r}: must be an object",
      where=file,
      wrong={"auto_map": config["auto_map"]},
    )
  return config


def missing_code(auto_map: dict[str, Any], folder: pathlib.Path) -> list[str]:
  """Lists the Python files that `auto_map` of a config.json and what it names ask for, and that
  `folder` lacks.
  """
  names = [
    name
    for value in auto_map.values()
    for name in ([value] if isinstance(value, str) else value or [])
    if name
  ]
  # ORG/NAME--module.Class is at the hub
  wanted = [f"{name.split('.')[0]}.py" for name in names if "--" not in name]
  missing = set()
  for name in wanted:  # grows
    if not (inputs.beside(name) and (folder / name).is_file()):
      missing.add(name)
      continue
    imported = RELATIVE.findall(inputs.read_text(folder / name, CheckpointError))
    wanted += [file for file in (f"{module}.py" for module in imported) if file not in wanted]
  return sorted(missing)


def copy_tokenizer(directory: pathlib.Path, source: pathlib.Path) -> None:
  """Copies those of TOKENIZER_FILES that lie in `source`."""
  for name in TOKENIZER_FILES:
    if (source / name).is_file():
      shutil.copyfile(source / name, directory / name)


def check_free(directory: pathlib.Path, overwrite: bool) -> None:
  """Checks that a checkpoint may be written to `directory`; worth doing before weights are read.

  Raises:
    CheckpointError: a file; or not empty, unless `overwrite` and it holds an export and nothing
      else.
  """
  directory = pathlib.Path(directory)
  files.settle(directory)
  if directory.exists() and not directory.is_dir():
    raise CheckpointError(
      f"{directory} is a file; give a directory", where=directory, found="a file"
    )
  if not directory.exists() or not any(directory.iterdir()):
    return
  if not overwrite:
    raise CheckpointError(
      f"{directory} is not empty; choose another directory, or allow its replacement (--overwrite)",
      where=directory,
      missing="overwrite",
    )
  if not (directory / tensor_files.EXPORTED).is_file():
    raise CheckpointError(
      f"{directory} is not empty and no export (it has no {tensor_files.EXPORTED}, which lists "
      "what one wrote), so it is not replaced; remove it yourself, or choose another directory",
      where=directory,
      missing=tensor_files.EXPORTED,
    )
  wrote = tensor_files.read_object(directory / tensor_files.EXPORTED)
  if other := [name for name, size in file_sizes(directory).items() if wrote.get(name) != size]:
    more = f" and {len(other) - 1} more" * (len(other) > 1)
    raise CheckpointError(
      f"{directory} also holds {other[0]}{more}, which is not what the export wrote, so it is not "
      f"replaced; choose another directory",
      where=directory,
      found=other,
    )


def file_sizes(directory: pathlib.Path) -> dict[str, int]:
  """Bytes of all files in a folder and its folders, by name, but for the list of them."""
  found = sorted(file for file in directory.rglob("*") if file.is_symlink() or not file.is_dir())
  return {
    name: file.lstat().st_size
    for file in found
    if (name := file.relative_to(directory).as_posix()) != tensor_files.EXPORTED
  }


@contextlib.contextmanager
def appearing(directory: pathlib.Path, overwrite: bool, size: int = 0) -> Generator[pathlib.Path]:
  """`files.fresh_folder` where `check_free` lets it be, and so many bytes have room; what goes
  wrong is a CheckpointError.
  """
  check_free(directory, overwrite)
  try:
    with files.fresh_folder(directory, "export", overwrite) as temporary:
      if (free := shutil.disk_usage(temporary).free) < size:
        raise OSError(f"it takes {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there")
      yield temporary
      files.write_json(temporary / tensor_files.EXPORTED, file_sizes(temporary), indent=2)
  except OSError as error:
    text = str(error)
    raise CheckpointError(
      text if " can't be written: " in text else f"{directory} can't be written: {text}",
      where=directory,
      found=text,
    ) from error
