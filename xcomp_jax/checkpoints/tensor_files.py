"""Tensors of a checkpoint in the torch layout, under official names: strictly, straight from
safetensors files into shardings.

Files are read here and not by the library, which takes memory maps: those are slower by two fifths,
and a file that is cut short meanwhile would kill the process. (Its reading without maps takes a
whole tensor for every block of rows.)
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Sharding

from xcomp_jax import inputs
from xcomp_jax.checkpoints.tensor_names import Entry
from xcomp_jax.errors import XCompError
from xcomp_jax.inputs import reading, regular
from xcomp_jax.parallel.mesh import path_name

EXPORTED = ".export.json"  # what an export wrote: names and bytes
INDEX = "model.safetensors.index.json"
ROWS = 256  # of a tensor read or written at a time; also what makes a transposed copy stay in cache
# What training frameworks put around the names of a model's tensors: DataParallel and DeepSpeed,
# torch.compile, FSDP, PEFT, a wrapper.
FRAMEWORKS = re.compile(
  r"^((module|_orig_mod|_fsdp_wrapped_module|base_model\.model)\.)*(model\.(?=model\.|lm_head\.))*"
  r"|(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
LORA = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)\.")
SHOWN = 100  # tensors of a kind in a message
DTYPES = {
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "F32": np.dtype(np.float32),
}


class CheckpointError(XCompError, ValueError):
  """A checkpoint that can't be found, read or written; the message says which file, key or
  tensor.
  """


def shards(directory: pathlib.Path) -> list[pathlib.Path]:
  """The files that the index names, all of them in its folder; what lies there may be a link, as in
  the hub's cache.
  """
  index = directory / INDEX
  places = read_object(index, "weight_map")["weight_map"]
  if not isinstance(places, dict):
    raise CheckpointError(
      f"{index}: weight_map must be an object of tensor names and file names",
      where=index,
      value=places,
    )
  if wrong := [shard for shard in places.values() if not inputs.beside(shard)]:
    raise CheckpointError(
      f"{index}: weight_map must name files of its own folder, not {inputs.quoted(wrong[0], 100)}",
      where=index,
      value=wrong[0],
    )
  return sorted({directory / shard for shard in places.values()})


def read_object(file: pathlib.Path, *required: str) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    CheckpointError: no such file, not a JSON object, or keys missing.
  """
  if not file.exists():
    raise CheckpointError(f"{file.parent} has no {file.name}", where=file.parent, missing=file.name)
  values = inputs.read_json(file, CheckpointError, inputs.ABOUT)
  if not isinstance(values, dict):
    raise CheckpointError(f"{file} does not hold a JSON object", where=file, value=values)
  if missing := [key for key in required if key not in values]:
    raise CheckpointError(f"{file} lacks {', '.join(missing)}", where=file, missing=missing)
  return values


# (path, stored dtype) -> where to, and as what
Target = Callable[[str, np.dtype], tuple[Sharding, np.dtype]]


def raise_differences(
  directory: pathlib.Path,
  wanted: Mapping[str, tuple[int, ...]],
  found: Mapping[str, tuple[int, ...]],
  unreadable: Sequence[str] = (),
  by: str = "config.json",
) -> None:
  """Raises one CheckpointError about all differences between the shapes that are there and those
  that should be; by: the file that says so.
  """
  missing = [name for name in wanted if name not in found]
  unexpected = sorted(found.keys() - wanted.keys())
  misshapen = [
    f"{name} is {list(found[name])}, must be {list(shape)}"
    for name, shape in wanted.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ]
  groups = {
    "missing": missing,
    "unexpected": unexpected,
    "of another shape": misshapen,
    "unreadable": unreadable,
  }
  sep = ";\n    "  # a line may not grow with their number
  lines = [
    f"\n  {len(group)} {what}: {sep.join(group[:SHOWN])}"
    + (f"; and {len(group) - SHOWN} more" if len(group) > SHOWN else "")
    for what, group in groups.items()
    if group
  ]
  if lines:
    raise CheckpointError(
      f"{directory} does not hold the model that its {by} describes:{''.join(lines)}",
      where=directory,
      missing=missing,
      unexpected=unexpected,
      misshapen=misshapen,
      unreadable=list(unreadable),
    )


def by_path(tree: Any) -> dict[str, Any]:
  """Leaves of a tree by path, as in `Entry.path`."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor in a safetensors file: dtype as a safetensors code, and its first byte."""

  file: pathlib.Path
  offset: int
  dtype: str
  shape: tuple[int, ...]


def shapes(directory: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Official name -> shape of what lies in a torch directory, whatever it is.

  Raises:
    CheckpointError: nothing there, or files that can't be read.
  """
  return {name: it.shape for name, it in _headers(directory)[0].items()}


def _headers(directory: pathlib.Path) -> tuple[dict[str, _Stored], list[str]]:
  """Official name -> tensor of a torch directory, and which are there twice."""
  from safetensors import safe_open

  index = directory / INDEX
  files = shards(directory) if index.exists() else sorted(directory.glob("*.safetensors"))
  absent = [file.name for file in files if not file.exists()]
  if absent:
    raise CheckpointError(
      f"{index} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there",
      where=index,
      missing=absent,
    )
  if not files:
    raise CheckpointError(
      f"{directory} has neither *.safetensors nor params/ (an Orbax export)",
      where=directory,
      missing=["*.safetensors", "params/"],
    )
  tensors, problems = {}, []
  for file in files:
    regular(file)
    with reading(file, CheckpointError, "safetensors file, or cut short"):
      with safe_open(file, "numpy"):  # checks the header against itself and against the file's size
        pass
      with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    problems += [f"{name} is in more than one file" for name in header if name in tensors]
    tensors |= {
      name: _Stored(file, 8 + length + it["data_offsets"][0], it["dtype"], tuple(it["shape"]))
      for name, it in header.items()
    }
  return tensors, problems


def adapters(directory: pathlib.Path, example: str) -> CheckpointError:
  """Makes the error about a directory with LoRA adapters; example: a file or tensor that shows
  it.
  """
  return CheckpointError(
    f"{directory} holds LoRA adapters ({example}), which are no whole model: merge them first, "
    "where they were trained, with model.merge_and_unload().save_pretrained(DIR), and give DIR",
    where=directory,
    adapters=example,
  )


def check_names(directory: pathlib.Path, wanted: Collection[str], found: Collection[str]) -> None:
  """Checks that it isn't only a training framework's prefixes that keep names from being the
  official ones.

  Raises:
    CheckpointError: it is; or LoRA adapters.
  """
  if adapter := next(filter(LORA.search, found), None):
    raise adapters(directory, adapter)
  plain = {name: FRAMEWORKS.sub("", name) for name in found}
  named = {
    name: official for name, official in plain.items() if name != official and official in wanted
  }
  if not named:
    return
  name, official = next(iter(named.items()))
  added = sorted({"".join(match.group() for match in FRAMEWORKS.finditer(name)) for name in named})
  raise CheckpointError(
    f"{directory}: a training framework has added {' and '.join(added)} to the names of "
    f"{len(named)} of {len(found)} tensors "
    f"({name} instead of {official}). This Python takes it off, in the files themselves:\n"
    "import json, pathlib, re, safetensors.numpy as st\n"
    f"for file in pathlib.Path({str(directory)!r}).glob('*.safetensors'):\n"
    f"  tensors = {{re.sub(r'{FRAMEWORKS.pattern}', '', name): t for name, t in "
    f"st.load_file(file).items()}}\n"
    "  st.save_file(tensors, file, {'format': 'pt'})\n"
    f"for file in pathlib.Path({str(directory)!r}).glob('*.index.json'):\n"
    "  index = json.loads(file.read_text())\n"
    f"  index['weight_map'] = {{re.sub(r'{FRAMEWORKS.pattern}', '', name): shard for name, shard "
    f"in index['weight_map'].items()}}\n"
    "  file.write_text(json.dumps(index))",
    where=directory,
    added=added,
    renamed=list(named),
  )


def equal(directory: pathlib.Path, one: str, other: str) -> bool:
  """Tells whether two tensors of a torch directory hold the same values; True as well where one of
  them can't be read.

  Nothing is raised: whoever loads the directory says what is wrong with it.
  """
  try:
    tensors, _ = _headers(directory)
    a, b = tensors[one], tensors[other]
    if a.shape != b.shape or not {a.dtype, b.dtype} <= DTYPES.keys():
      return False
    with open(a.file, "rb", buffering=0) as first, open(b.file, "rb", buffering=0) as second:
      for start in range(0, a.shape[0], 16 * ROWS):
        stop = min(start + 16 * ROWS, a.shape[0])
        x, y = _read_rows(first, a, start, stop), _read_rows(second, b, start, stop)
        if not np.array_equal(x.astype(np.float32), y.astype(np.float32), equal_nan=True):
          return False
  except (CheckpointError, OSError, KeyError):
    return True
  return True


def open_torch(
  directory: pathlib.Path, entries: Sequence[Entry], by: str = "config.json"
) -> dict[str, _Stored]:
  """Official name -> tensor of a torch directory, checked against the table; reads headers only.
  by: the file that says sizes.
  """
  tensors, problems = _headers(directory)
  # Rotary tables are buffers that some writers keep; a tied head is the embedding once more
  # (FACTS.md 11).
  expected = {e.name for e in entries}
  extra = {"lm_head.weight"} - expected
  tensors = {
    name: it
    for name, it in tensors.items()
    if not name.endswith("rotary_emb.inv_freq") and name not in extra
  }
  check_names(directory, expected, tensors)
  problems += [
    f"{name} is {it.dtype}, not one of {', '.join(DTYPES)}"
    for name, it in tensors.items()
    if it.dtype not in DTYPES
  ]
  raise_differences(
    directory,
    {e.name: e.shape for e in entries},
    {name: it.shape for name, it in tensors.items()},
    problems,
    by,
  )
  return tensors


def read_torch(
  directory: pathlib.Path, entries: Sequence[Entry], target: Target, by: str = "config.json"
) -> dict[str, jax.Array]:
  """Our parameters by path; arguments of `open_torch`, and where each goes."""
  tensors = open_torch(directory, entries, by)
  # In the order of the file and by read(), not through a memory map: what lies on a disk or a
  # network comes at its full rate only in sequence.
  entries = sorted(entries, key=lambda e: (tensors[e.name].file, tensors[e.name].offset))
  arrays = {}
  with contextlib.ExitStack() as stack:
    pool = stack.enter_context(ThreadPoolExecutor(min(8, os.cpu_count() or 1)))
    opened = {
      file: stack.enter_context(open(file, "rb", buffering=0))
      for file in {it.file for it in tensors.values()}
    }
    for e in entries:
      it = tensors[e.name]
      sharding, dtype = target(e.path, DTYPES[it.dtype])
      rows = functools.partial(_read_rows, opened[it.file], it)
      part = functools.partial(_read_slice, rows, e, dtype, pool)
      # The types of JAX allow an index of None, with which it never calls.
      arrays[e.path] = jax.make_array_from_callback(e.ours, sharding, part, dtype=dtype)  # ty: ignore[invalid-argument-type]
      arrays[e.path].block_until_ready()  # else transfers queue up, and host memory with them
  return arrays


def _read_rows(opened: io.FileIO, it: _Stored, start: int, stop: int) -> np.ndarray:
  """it[start:stop]."""
  row = math.prod(it.shape[1:]) * DTYPES[it.dtype].itemsize
  data = os.pread(opened.fileno(), (stop - start) * row, it.offset + start * row)
  if len(data) != (stop - start) * row:
    raise CheckpointError(f"{it.file} ended while it was read", where=it.file)
  return np.frombuffer(data, DTYPES[it.dtype]).reshape(stop - start, *it.shape[1:])


def _read_slice(
  rows: Callable[[int, int], np.ndarray],
  entry: Entry,
  dtype: np.dtype,
  pool: ThreadPoolExecutor,
  index: tuple[slice, ...],
) -> np.ndarray:
  """Our parameter's [index] from its file, read in blocks of rows so that only the result is in
  memory.
  """
  if entry.form == "patch":
    kernel = rows(0, entry.shape[0])[:, :, 0].transpose(2, 3, 1, 0).reshape(entry.ours)
    return np.ascontiguousarray(kernel[index], dtype)
  bounds = [s.indices(n)[:2] for s, n in zip(index, entry.ours)]
  result = _aligned([stop - start for start, stop in bounds], dtype)
  turned = entry.form == "transpose"
  (first, last), *columns = bounds[::-1] if turned else bounds
  columns = tuple(slice(*c) for c in columns)
  into = result.T if turned else result

  def copy(start):
    stop = min(start + ROWS, last)
    block = rows(start, stop)[:, *columns]
    if block.dtype == dtype:  # plain integers copy faster than ml_dtypes
      plain = f"u{dtype.itemsize}"
      into.view(plain)[start - first : stop - first] = block.view(plain)
    else:
      into[start - first : stop - first] = block.astype(dtype)

  list(pool.map(copy, range(first, last, ROWS)))
  return result


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An empty array on a 64-byte boundary, which the CPU backend takes over without a copy."""
  size = math.prod(shape) * dtype.itemsize
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(dtype).reshape(shape)
