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

from xcomp_jax import files, inputs
from xcomp_jax.checkpoints import loading, tensor_files, tensor_names
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.config import Dtype, LPCompConfig, ModelConfig, Tuned, VLMConfig

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

# What `read_config` needs beside the sizes; none of it changes a parameter.
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
  entries, arrays = tensor_names.names(cfg), loading.parameters(model)
  own = loading.stored(source, cfg) if dtype is None else dict.fromkeys(arrays, np.dtype(dtype))
  tensors = [
    Tensor(e.name, e.shape, own[e.path], lambda e=e: _official(e, arrays[e.path], own[e.path]))
    for e in sorted(entries, key=lambda e: e.name)
  ]
  with appearing(directory, overwrite, sum(tensor.bytes for tensor in tensors)) as temporary:
    write_safetensors(temporary, tensors, shard_bytes)
    _copy_rest(temporary, source, cfg, tuned, dtype, code)
    written = loading.stored(temporary, cfg)
    wrong = [f"{e.name} is {written[e.path]}" for e in entries if written[e.path] != own[e.path]]
    if wrong:
      raise CheckpointError(f"{directory} would not be as {source}: {'; '.join(wrong)}")


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

  arrays = loading.parameters(model)
  own = loading.stored(source, cfg) if dtype is None else dict.fromkeys(arrays, np.dtype(dtype))
  tensor_files.raise_differences(
    pathlib.Path(directory),
    tensor_names.names(cfg),
    {path: a.shape for path, a in arrays.items()},
    True,
  )
  with appearing(
    directory, overwrite, sum(a.size * own[path].itemsize for path, a in arrays.items())
  ) as temporary:
    settings = tensor_files.nest_paths({path: ocp.SaveArgs(dtype=own[path]) for path in arrays})
    try:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(
          (temporary / "params").absolute(),
          args=ocp.args.PyTreeSave(tensor_files.nest_paths(arrays), save_args=settings),
        )
    except Exception as error:  # of a disk that has become full TensorStore says so by a ValueError
      raise OSError(files.one_line(error)[:500]) from error
    _copy_rest(temporary, source, cfg, tuned, dtype, code)


def _official(entry: tensor_names.Entry, array: jax.Array, dtype: np.dtype) -> Iterator[np.ndarray]:
  """The official tensor of our parameter, in blocks of rows."""
  if array.shape != entry.ours:
    raise CheckpointError(f"{entry.path} is {list(array.shape)}, must be {list(entry.ours)}")
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
  size = 0
  for tensor in tensors:
    if shards[-1] and size + tensor.bytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.bytes
  count = len(shards)
  names = (
    [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count > 1
    else ["model.safetensors"]
  )
  for file, shard in zip(names, shards):
    stops = list(itertools.accumulate(tensor.bytes for tensor in shard))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor, stop in zip(shard, stops):
      offsets = [stop - tensor.bytes, stop]
      header[tensor.name] = {
        "dtype": CODES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": offsets,
      }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / file, "wb") as out:
      out.write(len(text).to_bytes(8, "little") + text)
      for tensor in shard:
        for block in tensor.blocks():
          out.write(block.view(np.uint8).data)
  if count > 1:
    total = sum(tensor.bytes for tensor in tensors)
    places = {tensor.name: file for file, shard in zip(names, shards) for tensor in shard}
    files.write_json(
      directory / tensor_files.INDEX,
      {"metadata": {"total_size": total}, "weight_map": places},
      indent=2,
    )


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
  file = source / "config.json"
  config: dict[str, Any] = tensor_files.read_object(file) | {
    "mm_local_num_frames": cfg.clip_frames,
    "tie_word_embeddings": cfg.llm.tied,
  }
  if loading.read_scaling(file, config) != cfg.llm.rope_scaling or "rope_parameters" in config:
    # The official code reads the keys of transformers 4, and transformers 5 reads these, too.
    config |= {
      "rope_theta": cfg.llm.rope_theta,
      "rope_scaling": loading.rope_scaling(cfg.llm.rope_scaling),
    }
    config.pop("rope_parameters", None)
  stated = config.pop("dtype", None)
  if stated is not None or dtype is not None:
    config["torch_dtype"] = stated if dtype is None else np.dtype(dtype).name
  if not isinstance(config.get("auto_map", {}), (dict, type(None))):
    raise CheckpointError(f"{file}: auto_map = {config['auto_map']!r}: must be an object")
  if config.get("auto_map"):
    folder = code or source
    if missing := missing_code(config["auto_map"], folder):
      del config["auto_map"]
      print(
        f"auto_map is left out of config.json: {folder} has no {', '.join(missing)}. --code "
        f"ORG/NAME fetches such files, or takes "
        "them from a directory; without them the official code has to be imported by hand",
        file=sys.stderr,
      )
    for python in [] if missing else folder.glob("*.py"):
      shutil.copyfile(python, directory / python.name)
  files.write_json(directory / "config.json", config, indent=2)
  if tuned:
    own = Tuned(
      lp_comp=cfg.lp_comp,
      clip_frames=cfg.clip_frames,
      image_size=cfg.vision.image_size,
      dtype=cast(Dtype, cfg.dtype),
      context=cfg.llm.context,
    )
    loading.write_tuned(directory, own if tuned is True else tuned)
  copy_tokenizer(directory, source)


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
  for name in wanted:  # grows
    if inputs.beside(name) and (folder / name).is_file():
      imported = RELATIVE.findall(inputs.read_text(folder / name, CheckpointError))
      wanted += [file for file in (f"{module}.py" for module in imported) if file not in wanted]
  return sorted(
    {name for name in wanted if not (inputs.beside(name) and (folder / name).is_file())}
  )


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
    raise CheckpointError(f"{directory} is a file; give a directory")
  if not directory.exists() or not any(directory.iterdir()):
    return
  if not overwrite:
    raise CheckpointError(
      f"{directory} is not empty; choose another directory, or allow its replacement (--overwrite)"
    )
  if not (directory / tensor_files.EXPORTED).is_file():
    raise CheckpointError(
      f"{directory} is not empty and no export (it has no {tensor_files.EXPORTED}, which lists "
      f"what one "
      f"wrote), so it is not replaced; remove it yourself, or choose another directory"
    )
  wrote = tensor_files.read_object(directory / tensor_files.EXPORTED)
  if other := [name for name, size in file_sizes(directory).items() if wrote.get(name) != size]:
    more = f" and {len(other) - 1} more" * (len(other) > 1)
    raise CheckpointError(
      f"{directory} also holds {other[0]}{more}, which is not what the export wrote, so it is not "
      f"replaced; choose another directory"
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
      text if " can't be written: " in text else f"{directory} can't be written: {text}"
    ) from error
