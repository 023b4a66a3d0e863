"""One table between the official PyTorch names and our parameter paths, used both ways; and checkpoints read with it.

Two directory layouts are read here, and written by export.py. Both hold config.json (official form) and the tokenizer's files:
  torch  *.safetensors, with model.safetensors.index.json when there are several;
  Orbax  params/, a tree of our parameters.
xcomp.json beside them, if there is one, says which LP-Comp the weights were tuned with.
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
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from xcomp_jax.config import LLMConfig, LPCompConfig, ModelConfig, VisionConfig, VLMConfig, from_dict
from xcomp_jax.data import prompt
from xcomp_jax.model.vlm import VLM
from xcomp_jax.sharding import path_name

INDEX = "model.safetensors.index.json"
EXTRA = "xcomp.json"
ROWS = 256  # of a tensor read or written at a time; also what makes a transposed copy stay in cache
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


class CheckpointError(ValueError):
  """A checkpoint that can't be found, read or written; the message says which file, key or tensor."""


# --- the table -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter under both names.

  name: the official one. shape: the official one; ours is `ours`.
  path: ours, as `sharding.path_name` writes it ('llm/layers/0/q/kernel').
  form: how official becomes ours: 'copy'; 'transpose' [out, in] -> [in, out]; 'patch' [D, 3, 1, p, p] -> [p*p*3, D].
  """

  name: str
  path: str
  form: Literal["copy", "transpose", "patch"]
  shape: tuple[int, ...]

  @property
  def ours(self) -> tuple[int, ...]:
    """Shape of our parameter."""
    if self.form == "patch":
      return math.prod(self.shape[1:]), self.shape[0]
    return self.shape[::-1] if self.form == "transpose" else self.shape


def names(cfg: VLMConfig) -> tuple[Entry, ...]:
  """Every parameter of the model, once (FACTS.md 11)."""
  v, m = cfg.vision, cfg.llm
  d, q, kv = m.width, m.heads * m.head_dim, m.kv_heads * m.head_dim
  rows: list[Entry] = []

  def add(name, path, *shape, form="copy"):
    rows.append(Entry(name, path, form, shape))

  def linear(name, path, inputs, outputs, bias=True):
    add(f"{name}.weight", f"{path}/kernel", outputs, inputs, form="transpose")
    if bias:
      add(f"{name}.bias", f"{path}/bias", outputs)

  def layer_norm(name, path):
    add(f"{name}.weight", f"{path}/scale", v.width)
    add(f"{name}.bias", f"{path}/bias", v.width)

  encoder = "model.vision_tower.vision_tower.encoder"
  patch = (v.width, 3, 1, v.patch_size, v.patch_size)
  add(f"{encoder}.patch_embed.proj.weight", "vision/patch_embed/kernel", *patch, form="patch")
  add(f"{encoder}.patch_embed.proj.bias", "vision/patch_embed/bias", v.width)
  for i in range(v.layers):
    name, path = f"{encoder}.blocks.{i}", f"vision/blocks/{i}"
    layer_norm(f"{name}.norm1", f"{path}/norm1")
    layer_norm(f"{name}.norm2", f"{path}/norm2")
    linear(f"{name}.attn.qkv", f"{path}/attn/qkv", v.width, 3 * v.width, bias=False)
    add(f"{name}.attn.q_bias", f"{path}/attn/q_bias", v.width)
    add(f"{name}.attn.v_bias", f"{path}/attn/v_bias", v.width)
    linear(f"{name}.attn.proj", f"{path}/attn/proj", v.width, v.width)
    linear(f"{name}.mlp.fc1", f"{path}/fc1", v.width, v.mlp_width)
    linear(f"{name}.mlp.fc2", f"{path}/fc2", v.mlp_width, v.width)
  layer_norm(f"{encoder}.vision_layernorm", "vision/norm")
  linear("model.mm_projector.mlp.0", "projector/fc1", v.width, d)
  linear("model.mm_projector.mlp.2", "projector/fc2", d, d)
  add("model.embed_tokens.weight", "llm/embed/embedding", m.vocab_size, d)
  for i in range(m.layers):
    name, path = f"model.layers.{i}", f"llm/layers/{i}"
    add(f"{name}.input_layernorm.weight", f"{path}/input_norm/scale", d)
    add(f"{name}.post_attention_layernorm.weight", f"{path}/post_norm/scale", d)
    linear(f"{name}.self_attn.q_proj", f"{path}/q", d, q)
    linear(f"{name}.self_attn.k_proj", f"{path}/k", d, kv)
    linear(f"{name}.self_attn.v_proj", f"{path}/v", d, kv)
    linear(f"{name}.self_attn.o_proj", f"{path}/o", q, d, bias=False)
    linear(f"{name}.mlp.gate_proj", f"{path}/gate", d, m.mlp_width, bias=False)
    linear(f"{name}.mlp.up_proj", f"{path}/up", d, m.mlp_width, bias=False)
    linear(f"{name}.mlp.down_proj", f"{path}/down", m.mlp_width, d, bias=False)
  add("model.norm.weight", "llm/norm/scale", d)
  if not m.tied:
    linear("lm_head", "llm/lm_head", d, m.vocab_size, bias=False)
  return tuple(rows)


def parameters(model: nnx.Module | nnx.State) -> dict[str, Any]:
  """Leaves of a model or its state by path, as in `Entry.path`."""
  state = model if isinstance(model, nnx.State) else nnx.state(model)
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


# --- finding and describing a checkpoint -----------------------------------------------------------------------


def resolve(init_from: str) -> pathlib.Path:
  """The local directory of `init_from`: a directory, or a hub id org/name (from the local cache if it is whole there).

  Raises:
    CheckpointError: neither.
  """
  path = pathlib.Path(init_from).expanduser()
  if path.is_dir():
    return path
  if path.exists():
    raise CheckpointError(f"{init_from} is a file; give the directory that holds config.json and the weights")
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", init_from) or init_from.startswith("."):
    raise CheckpointError(f"there is no directory {init_from}")
  from huggingface_hub import snapshot_download

  files = ["*.json", "*.safetensors", "*.txt", "*.jinja", "params/*"]
  try:
    with contextlib.suppress(FileNotFoundError):  # not in the cache
      cached = pathlib.Path(snapshot_download(init_from, local_files_only=True, allow_patterns=files))
      if _whole(cached):
        return cached
    fetched = pathlib.Path(snapshot_download(init_from, allow_patterns=files))
    if _whole(fetched):
      return fetched
    raise FileNotFoundError(f"only a part of it is there: {fetched}")
  except Exception as error:  # the hub's client has no common base for what can go wrong on a network
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise CheckpointError(
      f"there is no directory {init_from}, and as a hub id it can't be fetched: {type(error).__name__}: {reason}"
    ) from error


def _whole(directory: pathlib.Path) -> bool:
  """Whether a cached snapshot holds all of its files: a broken download leaves some out."""
  if (directory / INDEX).exists():
    return all(file.exists() for file in _shards(directory))
  return (directory / "config.json").exists() and (_is_orbax(directory) or any(directory.glob("*.safetensors")))


def _shards(directory: pathlib.Path) -> list[pathlib.Path]:
  """The files that the index names."""
  places = read_json(directory / INDEX, "weight_map")["weight_map"]
  if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
    raise CheckpointError(f"{directory / INDEX}: weight_map must be an object of tensor names and file names")
  return sorted({directory / shard for shard in places.values()})


def read_json(file: pathlib.Path, *required: str) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    CheckpointError: no such file, not a JSON object, or keys missing.
  """
  if not file.is_file():
    raise CheckpointError(f"{file.parent} has no {file.name}")
  try:
    values = json.loads(file.read_text())
  except ValueError as error:
    raise CheckpointError(f"{file} is not valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise CheckpointError(f"{file} does not hold a JSON object")
  missing = [key for key in required if key not in values]
  if missing:
    raise CheckpointError(f"{file} lacks {', '.join(missing)}")
  return values


COUNT = "an integer above 0"
KINDS = {
  COUNT: lambda v: type(v) is int and v > 0,
  "an integer": lambda v: type(v) is int,
  "a number above 0": lambda v: type(v) in (int, float) and 0 < v < math.inf,
  "true or false": lambda v: type(v) is bool,
  "text": lambda v: type(v) is str,
}
SIZES = {  # what config.json must have
  "hidden_size": COUNT, "intermediate_size": COUNT, "num_hidden_layers": COUNT, "num_attention_heads": COUNT,
  "num_key_value_heads": COUNT, "vocab_size": COUNT, "rope_theta": "a number above 0", "rms_norm_eps": "a number above 0",
  "tie_word_embeddings": "true or false", "mm_vision_tower": "text", "mm_projector_type": "text", "mm_hidden_size": COUNT,
  "mm_local_num_frames": COUNT, "mm_vision_select_layer": "an integer",
}
OPTIONAL = ("head_dim", "tokenizer_model_max_length", "max_position_embeddings")
TINY_VISION = dict.fromkeys(("image_size", "embed_dim", "depth", "heads", "patch_size"), COUNT) | {"mlp_ratio": "a number above 0"}


def _check(where: Any, values: Any, kinds: Mapping[str, str]) -> None:
  """Raises a CheckpointError unless `values` is an object with all keys of `kinds`, of these kinds."""
  if not isinstance(values, dict):
    raise CheckpointError(f"{where} = {values!r}: must be an object")
  if missing := [key for key in kinds if key not in values]:
    raise CheckpointError(f"{where} lacks {', '.join(missing)}")
  wrong = [f"{key} = {values[key]!r}: must be {kind}" for key, kind in kinds.items() if not KINDS[kind](values[key])]
  if wrong:
    raise CheckpointError(f"{where}: {'; '.join(wrong)}")


def read_config(directory: pathlib.Path, model: ModelConfig, lp_comp: LPCompConfig) -> VLMConfig:
  """Sizes from a checkpoint's config.json, choices from the run.

  The official file does not hold the tower's sizes, only its name; `tiny_vision` in it (no official key) gives
  other ones. Prints one line if clips get another length than config.json says (quirk Q1).

  Raises:
    CheckpointError: no config.json, keys missing, values of the wrong kind, a run's config, or a model that this
      code can't build.
  """
  file = pathlib.Path(directory) / "config.json"
  c = read_json(file)
  if c.keys() >= {"init_from", "workdir"}:
    raise CheckpointError(
      f"{directory} is a run; export it first: "
      f"python -m xcomp_jax.export --checkpoint {directory} --format=torch --out DIR"
    )
  _check(file, c, SIZES | {key: COUNT for key in OPTIONAL if c.get(key) is not None})
  tower = c["mm_vision_tower"]
  if "internvideo2" in tower.lower():
    raise CheckpointError(f"{file}: mm_vision_tower {tower}: the InternVideo2 tower is not supported yet")
  for key, wanted in (("rope_scaling", None), ("use_sliding_window", False), ("hidden_act", "silu")):
    if c.get(key, wanted) != wanted:
      raise CheckpointError(f"{file}: {key} = {c[key]!r} is not supported; only {wanted!r} is")
  if c["mm_projector_type"] != "tome16_mlp_hd64":
    raise CheckpointError(f"{file}: mm_projector_type {c['mm_projector_type']!r} is not supported; tome16_mlp_hd64 is")
  if "tiny_vision" in c:
    t = c["tiny_vision"]
    _check(f"{file}: tiny_vision", t, TINY_VISION)
  elif tower in ("umt-hd-large", "umt-large"):
    t = {"image_size": 448 if "hd" in tower else 224, "embed_dim": 1024, "depth": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4}
  else:
    raise CheckpointError(f"{file}: mm_vision_tower {tower!r} is not known; umt-hd-large (448 px) and umt-large (224 px) are")
  if c["mm_hidden_size"] != t["embed_dim"]:
    raise CheckpointError(f"{file}: mm_hidden_size is {c['mm_hidden_size']}, but tower {tower} is {t['embed_dim']} wide")
  if not -t["depth"] <= c["mm_vision_select_layer"] < 0:
    raise CheckpointError(f"{file}: mm_vision_select_layer = {c['mm_vision_select_layer']} must count from the end, as -2 does")
  if not c.get("head_dim") and c["hidden_size"] % c["num_attention_heads"]:
    raise CheckpointError(f"{file}: num_attention_heads does not divide hidden_size, and there is no head_dim")
  own = c["mm_local_num_frames"]
  clip_frames = own if model.clip_frames == "checkpoint" else model.clip_frames
  if clip_frames != own:
    print(
      f"clips of {clip_frames} frames, not the {own} of {file}; model.clip_frames=checkpoint takes those (quirk Q1)",
      file=sys.stderr,
    )
  return VLMConfig(
    vision=VisionConfig(
      image_size=t["image_size"],
      patch_size=t["patch_size"],
      width=t["embed_dim"],
      layers=t["depth"] + c["mm_vision_select_layer"] + 1,  # blocks behind the selected one are never built
      heads=t["heads"],
      mlp_width=int(t["embed_dim"] * t["mlp_ratio"]),
      table="umt" if t["image_size"] == 224 else "umt-hd",
    ),
    llm=LLMConfig(
      vocab_size=c["vocab_size"],
      width=c["hidden_size"],
      layers=c["num_hidden_layers"],
      heads=c["num_attention_heads"],
      kv_heads=c["num_key_value_heads"],
      head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
      mlp_width=c["intermediate_size"],
      rope_theta=float(c["rope_theta"]),
      norm_eps=float(c["rms_norm_eps"]),
      tied=c["tie_word_embeddings"],
      context=c.get("tokenizer_model_max_length") or c.get("max_position_embeddings"),
    ),
    lp_comp=lp_comp,
    clip_frames=clip_frames,
    tokens_per_frame=16,
    dtype=model.dtype,
    clips_per_chunk=model.clips_per_chunk,
    attention=model.attention,
    remat=model.remat,
  )


def read_lp_comp(directory: pathlib.Path) -> LPCompConfig | None:
  """The LP-Comp that an exported checkpoint was tuned with; None if it does not say.

  Raises:
    CheckpointError: a broken xcomp.json.
    ConfigError: keys in it that are unknown or missing.
  """
  file = pathlib.Path(directory) / EXTRA
  return from_dict(LPCompConfig, read_json(file, "lp_comp")["lp_comp"], f"{file}: lp_comp") if file.exists() else None


def read_tokenizer(directory: pathlib.Path, cfg: VLMConfig) -> prompt.Tokenizer:
  """The tokenizer that lies with a checkpoint.

  Raises:
    FileNotFoundError, ValueError: see `prompt.load_tokenizer`.
    CheckpointError: it has ids beyond the model's embedding table, of which there is no embedding.
  """
  tokenizer = prompt.load_tokenizer(directory)
  if tokenizer.vocab_size > cfg.llm.vocab_size:
    raise CheckpointError(
      f"{directory}: the tokenizer's ids go up to {tokenizer.vocab_size - 1}, but the embedding table has only "
      f"{cfg.llm.vocab_size} rows (vocab_size in config.json): they are not of the same model"
    )
  return tokenizer


def abstract(cfg: VLMConfig) -> VLM:
  """The model with ShapeDtypeStructs for parameters: no memory, no random numbers."""
  return nnx.eval_shape(lambda: VLM(cfg, rngs=_OneKey()))


class _OneKey(nnx.Rngs):
  """The same key for every parameter: a counter of keys, traced, makes each layer slower to build than the one before."""

  def __init__(self):
    pass

  def params(self) -> jax.Array:
    """The key."""
    return jax.random.key(0)


def stored(directory: pathlib.Path, cfg: VLMConfig) -> dict[str, np.dtype]:
  """The dtype of every parameter, by path, as the checkpoint holds it.

  Raises:
    CheckpointError: a checkpoint that is not this model's (see `load`).
  """
  directory = pathlib.Path(directory)
  if _is_orbax(directory):
    return _orbax_dtypes(directory, names(cfg))
  tensors = _open(directory, names(cfg))
  return {e.path: DTYPES[tensors[e.name].dtype] for e in names(cfg)}


# --- reading ---------------------------------------------------------------------------------------------------


def load(
  directory: pathlib.Path,
  cfg: VLMConfig,
  *,
  shardings: nnx.State | None = None,
  dtype: Callable[[str], Any] | Any | None = None,
) -> VLM:
  """The model with a checkpoint's parameters.

  Each tensor goes from its file straight into its target sharding and dtype, one after the other, a device's slice
  at a time: the host never holds a second copy of the model.

  Args:
    directory: of the torch or the Orbax layout.
    cfg: from `read_config`.
    shardings: a Sharding per parameter (`sharding.param_shardings`); None: the first device holds all.
    dtype: of the parameters, or path -> dtype; None: as stored.

  Raises:
    CheckpointError: a file that is missing or broken; or tensors missing, unexpected or mis-shaped, all of them in
      one message, before anything is allocated.
  """
  directory = pathlib.Path(directory)
  entries = names(cfg)
  graph, state = nnx.split(abstract(cfg))
  leaves, tree = jax.tree_util.tree_flatten_with_path(state)
  paths = [path_name(path) for path, _ in leaves]
  assert {e.path: e.ours for e in entries} == {p: leaf.shape for p, (_, leaf) in zip(paths, leaves)}, "table and model differ"
  place = parameters(shardings) if shardings is not None else {}
  first = SingleDeviceSharding(jax.local_devices()[0])
  wanted = dtype if callable(dtype) and not isinstance(dtype, type) else lambda path: dtype
  target = lambda path, own: (place.get(path, first), np.dtype(own if wanted(path) is None else wanted(path)))
  read = _read_orbax if _is_orbax(directory) else _read_torch
  arrays = read(directory, entries, target)
  return nnx.merge(graph, jax.tree_util.tree_unflatten(tree, [arrays[path] for path in paths]))


Target = Callable[[str, np.dtype], tuple[Sharding, np.dtype]]  # (path, stored dtype) -> where to, and as what


def report(directory: pathlib.Path, entries: Iterable[Entry], found: Mapping[str, tuple[int, ...]], orbax: bool, problems=()):
  """Raises one CheckpointError about all differences between what is there and what should be."""
  wanted = {e.path: e.ours for e in entries} if orbax else {e.name: e.shape for e in entries}
  missing = [name for name in wanted if name not in found]
  extra = sorted(found.keys() - wanted.keys())
  shaped = [
    f"{name} is {list(found[name])}, must be {list(shape)}"
    for name, shape in wanted.items()
    if name in found and tuple(found[name]) != tuple(shape)
  ]
  groups = (("missing", missing), ("unexpected", extra), ("of another shape", shaped), ("unreadable", list(problems)))
  text = "".join(f"\n  {len(group)} {what}: {'; '.join(group)}" for what, group in groups if group)
  if text:
    raise CheckpointError(f"{directory} does not hold the model that its config.json describes:{text}")


@dataclasses.dataclass(frozen=True)
class _Stored:
  """A tensor in a safetensors file: dtype as a safetensors code, and its first byte."""

  file: pathlib.Path
  offset: int
  dtype: str
  shape: tuple[int, ...]


def _open(directory: pathlib.Path, entries: Sequence[Entry]) -> dict[str, _Stored]:
  """Official name -> tensor of a torch directory, checked against the table; reads headers only."""
  from safetensors import SafetensorError, safe_open

  index = directory / INDEX
  files = _shards(directory) if index.exists() else sorted(directory.glob("*.safetensors"))
  absent = [file.name for file in files if not file.is_file()]
  if absent:
    raise CheckpointError(f"{index} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there")
  if not files:
    raise CheckpointError(f"{directory} has neither *.safetensors nor params/ (an Orbax export)")
  tensors, problems = {}, []
  for file in files:
    try:
      with safe_open(file, "numpy"):  # checks the header against itself and against the file's size
        pass
      with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    except (SafetensorError, OSError) as error:
      raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    problems += [f"{name} is in more than one file" for name in header if name in tensors]
    for name, it in header.items():
      tensors[name] = _Stored(file, 8 + length + it["data_offsets"][0], it["dtype"], tuple(it["shape"]))
  # Rotary tables are buffers that some writers keep; a tied head is the embedding once more (FACTS.md 11).
  expected = {e.name for e in entries}
  for name in list(tensors):
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in expected):
      del tensors[name]
  problems += [f"{name} is {it.dtype}, not one of {', '.join(DTYPES)}" for name, it in tensors.items() if it.dtype not in DTYPES]
  report(directory, entries, {name: it.shape for name, it in tensors.items()}, False, problems)
  return tensors


def _read_torch(directory: pathlib.Path, entries: Sequence[Entry], target: Target) -> dict[str, jax.Array]:
  tensors = _open(directory, entries)
  # In the order of the file and by read(), not through a memory map: what lies on a disk or a network comes at its
  # full rate only in sequence.
  entries = sorted(entries, key=lambda e: (tensors[e.name].file, tensors[e.name].offset))
  arrays = {}
  with contextlib.ExitStack() as stack:
    pool = stack.enter_context(ThreadPoolExecutor(min(8, os.cpu_count() or 1)))
    opened = {file: stack.enter_context(open(file, "rb", buffering=0)) for file in {it.file for it in tensors.values()}}
    for e in entries:
      it = tensors[e.name]
      sharding, dtype = target(e.path, DTYPES[it.dtype])
      rows = functools.partial(_read_rows, opened[it.file], it)
      part = functools.partial(_read_slice, rows, e, dtype, pool)
      arrays[e.path] = jax.make_array_from_callback(e.ours, sharding, part, dtype=dtype)
      arrays[e.path].block_until_ready()  # else transfers queue up, and host memory with them
  return arrays


def _read_rows(opened: io.FileIO, it: _Stored, start: int, stop: int) -> np.ndarray:
  """it[start:stop]."""
  row = math.prod(it.shape[1:]) * DTYPES[it.dtype].itemsize
  data = os.pread(opened.fileno(), (stop - start) * row, it.offset + start * row)
  if len(data) != (stop - start) * row:
    raise CheckpointError(f"{it.file} ended while it was read")
  return np.frombuffer(data, DTYPES[it.dtype]).reshape(stop - start, *it.shape[1:])


def _read_slice(
  rows: Callable[[int, int], np.ndarray], entry: Entry, dtype: np.dtype, pool: ThreadPoolExecutor, index: tuple[slice, ...]
) -> np.ndarray:
  """Our parameter's [index] from its file, read in blocks of rows so that only the result is in memory."""
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


def _is_orbax(directory: pathlib.Path) -> bool:
  return (directory / "params").is_dir()


def _orbax_dtypes(directory: pathlib.Path, entries: Sequence[Entry]) -> dict[str, np.dtype]:
  """Path -> stored dtype, checked against the table."""
  import orbax.checkpoint as ocp

  folder = directory / "params"
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.metadata(folder.absolute()).item_metadata.tree
  except (ValueError, OSError, KeyError, AttributeError) as error:  # what Orbax raises depends on which file is gone
    raise CheckpointError(f"{folder} is not an Orbax checkpoint, or a broken one: {error}") from error
  found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  report(folder, entries, {path: tuple(leaf.shape) for path, leaf in found.items()}, True)
  return {path: np.dtype(leaf.dtype) for path, leaf in found.items()}


def _read_orbax(directory: pathlib.Path, entries: Sequence[Entry], target: Target) -> dict[str, jax.Array]:
  import orbax.checkpoint as ocp

  own = _orbax_dtypes(directory, entries)
  item = {}
  for e in entries:
    sharding, dtype = target(e.path, own[e.path])
    item[e.path] = jax.ShapeDtypeStruct(e.ours, dtype, sharding=sharding)
  largest = max(math.prod(e.ours) * max(own[e.path].itemsize, item[e.path].dtype.itemsize) for e in entries)
  # Orbax reads as many arrays at once as it is allowed to; this keeps host memory near the largest of them.
  handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 10**9)
  tree = nest(item)
  arguments = ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
  try:
    with ocp.Checkpointer(handler) as reader:
      tree = reader.restore((directory / "params").absolute(), args=arguments)
  except (ValueError, OSError, KeyError) as error:
    raise CheckpointError(f"{directory / 'params'} is a broken Orbax checkpoint: {error}") from error
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{'a/0/b': x} -> {'a': {'0': {'b': x}}}."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree
