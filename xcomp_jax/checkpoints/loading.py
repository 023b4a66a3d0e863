"""Checkpoints: found, described by their config.json, and loaded.

Two directory layouts are read here, and written by export.py. Both hold config.json (official form)
  and the tokenizer's files: torch  *.safetensors, with model.safetensors.index.json when there are
  several; Orbax  params/, a tree of our parameters.
xcomp.json beside them, if there is one, says what the weights were tuned with: LP-Comp, clips,
image size, dtype, context.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from xcomp_jax import inputs
from xcomp_jax.checkpoints import config_json
from xcomp_jax.checkpoints.tensor_files import (
  DTYPES,
  INDEX,
  CheckpointError,
  adapters,
  equal,
  is_orbax,
  open_torch,
  orbax_dtypes,
  read_object,
  read_orbax,
  read_torch,
  shards,
)
from xcomp_jax.checkpoints.tensor_names import names
from xcomp_jax.config import (
  ConfigError,
  InternVideo2Config,
  LLMConfig,
  LPCompConfig,
  ModelConfig,
  TowerConfig,
  Tuned,
  VisionConfig,
  VLMConfig,
  Yarn,
)
from xcomp_jax.config_io import from_dict, to_dict
from xcomp_jax.data import prompt
from xcomp_jax.files import local, write_json
from xcomp_jax.model import vlm
from xcomp_jax.model.vlm import VLM
from xcomp_jax.parallel import chips
from xcomp_jax.parallel.mesh import path_name

EXTRA, VERSION = "xcomp.json", 1


def resolve(init_from: str | os.PathLike, whole: bool = True, code: bool = False) -> pathlib.Path:
  """The local directory of `init_from`: a directory, or a hub id org/name (from the local cache if
  it is there).

  whole: False fetches what describes the model, but not its weights. code: fetches the Python files
  alone.

  Raises:
    CheckpointError: neither.
    ValueError: it is in a bucket.
  """
  path = local(
    init_from, "a checkpoint is read from files (`export` makes one of a run's workdir there)"
  )
  if path.is_dir():
    return path
  if path.exists():
    raise CheckpointError(
      f"{init_from} is a file; give the directory that holds config.json and the weights"
    )
  name = os.fspath(init_from)
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
    raise CheckpointError(f"there is no directory {name}")
  from huggingface_hub import constants, snapshot_download

  if constants.HF_HOME.startswith("~"):  # it would make a folder of that name
    raise CheckpointError(
      f"there is no directory {name}, and as a hub id it can't be fetched: this user has no home "
      f"directory; set HF_HOME to a folder"
    )
  files, complete = (
    ["*.json", "*.txt", "*.jinja"],
    lambda directory: (directory / "config.json").exists(),
  )
  if whole:
    files, complete = [*files, "*.safetensors", "params/*"], _whole
  if code:
    files, complete = ["*.py"], lambda directory: any(directory.glob("*.py"))
  try:
    if not code:  # a cache may hold only some Python files, and nothing lists them
      with contextlib.suppress(FileNotFoundError):  # not in the cache
        cached = pathlib.Path(snapshot_download(name, local_files_only=True, allow_patterns=files))
        if complete(cached):
          return cached
    fetched = pathlib.Path(snapshot_download(name, allow_patterns=files))
    if complete(fetched):
      return fetched
    raise FileNotFoundError(f"only a part of it is there: {fetched}")
  except (
    Exception
  ) as error:  # the hub's client has no common base for what can go wrong on a network
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise CheckpointError(
      f"there is no directory {init_from}, and as a hub id it can't be fetched: "
      f"{type(error).__name__}: {reason}"
    ) from error


def _whole(directory: pathlib.Path) -> bool:
  """Whether a cached snapshot holds all of its files: a broken download leaves some out."""
  if (directory / INDEX).exists():
    return all(file.exists() for file in shards(directory))
  return (directory / "config.json").exists() and (
    is_orbax(directory) or any(directory.glob("*.safetensors"))
  )


# Bounds of a config.json's numbers: what no model has is refused at once, and not when memory or
# patience end.
LAYERS, WIDTH, FRAMES, PIXELS, POSITIONS = (
  range(1, 1_001),
  range(1, 1_000_001),
  range(1, 1_001),
  range(1, 4_097),
  range(1, 1_000_000_001),
)
PATCHES = 65_536  # of a frame, at most
ABOVE_0 = "a number above 0 and below 1e38"
KINDS = {
  ABOVE_0: lambda v: type(v) in (int, float) and 0 < v < 1e38,  # float32 has them
  "a number above 0, at most 100": lambda v: type(v) in (int, float) and 0 < v <= 100,
  "true or false": lambda v: type(v) is bool,
  "text": lambda v: type(v) is str,
}
SIZES: dict[str, str | range] = {  # what config.json must have
  "hidden_size": WIDTH,
  "intermediate_size": WIDTH,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": WIDTH,
  "num_key_value_heads": WIDTH,
  "vocab_size": range(1, 10_000_001),
  "rope_theta": ABOVE_0,
  "rms_norm_eps": ABOVE_0,
  "tie_word_embeddings": "true or false",
  "mm_vision_tower": "text",
  "mm_projector_type": "text",
  "mm_hidden_size": WIDTH,
  "mm_local_num_frames": FRAMES,
  "mm_vision_select_layer": range(-1_000, 1_001),
}
OPTIONAL: dict[str, str | range] = {
  "head_dim": WIDTH,
  "tokenizer_model_max_length": POSITIONS,
  "max_position_embeddings": POSITIONS,
}
SCALINGS = ("rope_scaling", "rope_parameters")  # as transformers has it up to 4, and from 5 on
TINY_VISION: dict[str, str | range] = {
  "image_size": PIXELS,
  "embed_dim": WIDTH,
  "depth": LAYERS,
  "heads": WIDTH,
  "patch_size": PIXELS,
  "mlp_ratio": "a number above 0, at most 100",
}
UMT = {"embed_dim": 1024, "depth": 24, "heads": 16, "patch_size": 16, "mlp_ratio": 4}
# The official config.json names a tower; its sizes are in the official code (FACTS.md 7).
TOWERS: dict[str, dict[str, Any]] = {
  "umt-hd-large": {"image_size": 448, **UMT},
  "umt-large": {"image_size": 224, **UMT},
  "internvideo2": {
    "image_size": 224,
    "embed_dim": 1408,
    "depth": 40,
    "heads": 16,
    "patch_size": 14,
    "mlp_ratio": 48 / 11,
  },
}
INTERNVIDEO2_FRAMES = 4  # that its learned positions are for
CLIP_FRAMES = 8  # that XComp was trained with
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of YaRN, where nothing else is said


def _check(where: Any, values: Any, kinds: Mapping[str, str | range]) -> None:
  """Raises a CheckpointError unless `values` is an object with all keys of `kinds`, of these kinds;
  a range is one of integers.
  """
  if not isinstance(values, dict):
    raise CheckpointError(f"{where} = {inputs.quoted(values, 100)}: must be an object")
  if missing := [key for key in kinds if key not in values]:
    raise CheckpointError(f"{where} lacks {', '.join(missing)}")
  wrong = [
    inputs.beyond(key, values[key], kind)
    if isinstance(kind, range)
    else ""
    if KINDS[kind](values[key])
    else f"{key} = {inputs.quoted(values[key], 100)}: must be {kind}"
    for key, kind in kinds.items()
  ]
  if wrong := list(filter(None, wrong)):
    raise CheckpointError(f"{where}: {'; '.join(wrong)}")


MOST_CLIPS = 8  # in the tower at once: a clip of 448 px fills a device by itself
CLIP_SHARE = 8  # of a device's memory clips in the tower may take one part in so many
UNKNOWN = 16e9  # bytes of a device whose memory is not known


def clips_at_once(cfg: VLMConfig, memory: float | None) -> int:
  """How many clips the tower takes at once on a device with so many bytes: a power of two.

  A token of a clip takes what seven vectors of the tower's width and one of its MLP's do, which is
  the most of what was compiled for GPUs (docs/LOG.md).
  """
  v = cfg.vision
  clip = v.tokens(cfg.clip_frames) * (7 * v.width + v.mlp_width) * np.dtype(cfg.dtype).itemsize
  return min(MOST_CLIPS, 1 << max(0, int((memory or UNKNOWN) / CLIP_SHARE / clip).bit_length() - 1))


def read_vlm_config(
  directory: pathlib.Path,
  model: ModelConfig,
  lp_comp: LPCompConfig,
  device: Any = None,
  option: str = "--config.model.clip_frames=checkpoint",
) -> VLMConfig:
  """Sizes from a checkpoint's config.json, choices from the run, and what is "auto" in these from
  xcomp.json.

  device: what `clips_per_chunk = "auto"` is for; None: the first one here. option: what one writes
  to the command for clips of config.json's length.

  The official file does not hold the tower's sizes, only its name; `tiny_vision` in it (no official
  key) gives other ones. Prints a line for each that is not as config.json says: the length of clips
  (quirk Q1), the context, and an output head that is kept though it should be the embedding once
  more.

  Raises:
    CheckpointError: no config.json, keys missing, values of the wrong kind, a run's config, or a
      model that this code can't build.
    ConfigError: clips of a length that the tower does not take.
  """
  directory = pathlib.Path(directory)
  file = directory / "config.json"
  if not file.exists() and (directory / "adapter_config.json").exists():
    raise adapters(directory, "adapter_config.json")
  c = read_object(file)
  if c.keys() >= {"init_from", "workdir"}:
    raise CheckpointError(
      f"{directory} is a run; export it first: "
      f"python -m xcomp_jax.export --checkpoint {directory} --format=torch --out DIR"
    )
  theta = config_json.rope_theta(file, c)
  c |= {} if theta is None else {"rope_theta": theta}
  _check(file, c, SIZES | {key: kind for key, kind in OPTIONAL.items() if c.get(key) is not None})
  config_json.check_config_json(file, c, (*SIZES, *OPTIONAL, *SCALINGS, "tiny_vision"))
  if c["tie_word_embeddings"] and not equal(
    directory, "lm_head.weight", "model.embed_tokens.weight"
  ):
    print(
      f"{file} says tie_word_embeddings, but lm_head.weight is another matrix than the embedding; "
      f"it is kept",
      file=sys.stderr,
    )
    c["tie_word_embeddings"] = False
  tuned = read_tuned(directory) or Tuned(lp_comp)
  if tuned.context is not None:
    own = c.get("tokenizer_model_max_length") or c.get("max_position_embeddings")
    if own not in (None, tuned.context):
      print(
        f"a context of {tuned.context} tokens, as tuned ({EXTRA}), not the {own} of {file}; "
        f"--context {own} takes that",
        file=sys.stderr,
      )
    c |= {"tokenizer_model_max_length": tuned.context}
  tower, auto = _tower(file, c), model.clips_per_chunk == "auto"
  if tuned.image_size not in (None, tower.image_size):
    raise CheckpointError(
      f"{directory}: {EXTRA} says tuned with {tuned.image_size} pixels, and the tower of "
      f"config.json takes {tower.image_size}"
    )
  cfg = VLMConfig(
    vision=tower,
    llm=_llm(file, c, model.yarn),
    lp_comp=lp_comp,
    clip_frames=_clip_frames(
      file, tower, model.clip_frames, c["mm_local_num_frames"], tuned.clip_frames, option
    ),
    tokens_per_frame=16,
    dtype=model.dtype,
    clips_per_chunk=1 if model.clips_per_chunk == "auto" else model.clips_per_chunk,
    attention=model.attention,
    remat=model.remat,
  )
  if not auto:
    return cfg
  memory = chips.device_memory(jax.local_devices()[0] if device is None else device)
  return dataclasses.replace(cfg, clips_per_chunk=clips_at_once(cfg, memory))


def _tower(file: pathlib.Path, c: Mapping[str, Any]) -> VisionConfig | InternVideo2Config:
  name = c["mm_vision_tower"]
  internvideo2 = "internvideo2" in name.lower()  # whatever else a path of weights says
  if "tiny_vision" in c:
    t = c["tiny_vision"]
    _check(f"{file}: tiny_vision", t, TINY_VISION)
  elif internvideo2 or name in TOWERS:
    t = TOWERS["internvideo2" if internvideo2 else name]
  else:
    known = ", ".join(f"{tower} ({sizes['image_size']} px)" for tower, sizes in TOWERS.items())
    raise CheckpointError(f"{file}: mm_vision_tower {name!r} is not known; these are: {known}")
  if c["mm_hidden_size"] != t["embed_dim"]:
    raise CheckpointError(
      f"{file}: mm_hidden_size is {c['mm_hidden_size']}, but tower {name} is {t['embed_dim']} wide"
    )
  if not -t["depth"] <= c["mm_vision_select_layer"] < 0:
    raise CheckpointError(
      f"{file}: mm_vision_select_layer = {c['mm_vision_select_layer']} must count from the end, as "
      f"-2 does"
    )
  if not 0 < (t["image_size"] // t["patch_size"]) ** 2 <= PATCHES:
    raise CheckpointError(
      f"{file}: tiny_vision: patches of {t['patch_size']} pixels make none, or more than "
      f"{PATCHES:,}, of {t['image_size']} x {t['image_size']}"
    )
  sizes = dict(
    image_size=t["image_size"],
    patch_size=t["patch_size"],
    width=t["embed_dim"],
    layers=t["depth"]
    + c["mm_vision_select_layer"]
    + 1,  # blocks behind the selected one are never built
    heads=t["heads"],
    mlp_width=int(t["embed_dim"] * t["mlp_ratio"]),
  )
  if internvideo2:
    return InternVideo2Config(**sizes, frames=INTERNVIDEO2_FRAMES)
  return VisionConfig(**sizes, table="umt" if t["image_size"] == 224 else "umt-hd")


def _clip_frames(
  file: pathlib.Path,
  tower: TowerConfig,
  wanted: int | Literal["auto", "checkpoint"],
  own: int,
  tuned: int | None,
  option: str,
) -> int:
  """The length of clips, if the tower takes it; own: of config.json."""
  takes = tower.frames if isinstance(tower, InternVideo2Config) else None
  frames = (
    own if wanted == "checkpoint" else takes or tuned or CLIP_FRAMES if wanted == "auto" else wanted
  )
  if takes not in (None, frames):
    raise ConfigError(
      f"{file}: the InternVideo2 tower has positions for clips of {takes} frames, not of {frames}: "
      f"set model.clip_frames to "
      f"{takes} or auto (--clip-frames {takes}; --clip-frames {takes} of predecode, so that the "
      f"data has such clips)"
    )
  if frames != own:
    print(
      f"clips of {frames} frames, {f'as tuned ({EXTRA}), ' if frames == tuned else ''}not the "
      f"{own} of {file}; {option.format(own=own)} takes those (quirk Q1)",
      file=sys.stderr,
    )
  return frames


def _llm(
  file: pathlib.Path, c: Mapping[str, Any], yarn: tuple[float, ...] | Literal["checkpoint"] | None
) -> LLMConfig:
  if not c.get("head_dim") and c["hidden_size"] % c["num_attention_heads"]:
    raise CheckpointError(
      f"{file}: num_attention_heads does not divide hidden_size, and there is no head_dim"
    )
  scaling = read_scaling(file, c) if yarn == "checkpoint" else yarn_of(*yarn) if yarn else None
  context = c.get("tokenizer_model_max_length") or c.get("max_position_embeddings")
  return LLMConfig(
    vocab_size=c["vocab_size"],
    width=c["hidden_size"],
    layers=c["num_hidden_layers"],
    heads=c["num_attention_heads"],
    kv_heads=c["num_key_value_heads"],
    head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
    mlp_width=c["intermediate_size"],
    rope_theta=float(c["rope_theta"]),
    rope_scaling=scaling,
    norm_eps=float(c["rms_norm_eps"]),
    tied=c["tie_word_embeddings"],
    context=max(context, int(scaling.factor * scaling.positions))
    if scaling and context
    else context,
  )


def yarn_of(
  factor: float, positions: float, attention: float | None = None, **betas: float
) -> Yarn:
  """YaRN as Qwen2.5 has it; attention None: the square root of what scores gain, 0.1 ln(factor) + 1
  (Peng et al. 2023, 3.4).
  """
  gain = 0.1 * math.log(factor) + 1 if attention is None else attention
  return Yarn(
    float(factor),
    int(positions),
    **{key: float(v) for key, v in (BETAS | betas).items()},
    attention=float(gain),
  )


def read_scaling(file: pathlib.Path, c: Mapping[str, Any]) -> Yarn | None:
  """Reads how config.json stretches positions, from whichever of `rope_scaling` and
  `rope_parameters` there is.

  Raises:
    CheckpointError: they differ; see also `read_yarn`.
  """
  said = {key: c[key] for key in SCALINGS if c.get(key) is not None}
  return config_json.agreed(
    file, said, {key: read_yarn(f"{file}: {key}", values) for key, values in said.items()}
  )


def read_yarn(where: str, values: Any) -> Yarn | None:
  """What `rope_scaling` or `rope_parameters` of a config.json says, in the form of the transformers
  library.

  Raises:
    CheckpointError: another kind of scaling, keys missing or unknown, or values of the wrong kind.
  """
  if values is None:
    return None
  _check(where, values, {})
  bare = values.keys() <= {"rope_theta"}  # as transformers reads it
  kind = values.get("rope_type", values.get("type", "default" if bare else None))
  if values.get("type", kind) != kind:
    raise CheckpointError(
      f"{where}: type {values['type']!r} and rope_type {kind!r} differ; take the wrong one out"
    )
  if kind not in ("default", "yarn"):
    raise CheckpointError(
      f"{where}: type {kind!r} is not supported; yarn is, and none at all (null)"
    )
  known = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    *BETAS,
  }
  whole = {"partial_rotary_factor": 1, "truncate": True}  # the only values of these
  if other := [
    k for k in sorted(values.keys() - known) if values[k] is not None and values[k] != whole.get(k)
  ]:
    raise CheckpointError(
      f"{where}: {', '.join(other)} of YaRN not supported; {', '.join(sorted(known - {'type'}))} "
      f"are"
    )
  if kind == "default":
    return None
  optional = [key for key in ("attention_factor", *BETAS) if values.get(key) is not None]
  _check(
    where,
    values,
    {"factor": ABOVE_0, "original_max_position_embeddings": POSITIONS}
    | dict.fromkeys(optional, ABOVE_0),
  )
  if values["factor"] < 1:
    raise CheckpointError(f"{where}: factor = {values['factor']}: must be at least 1")
  betas = {key: values[key] for key in BETAS if key in optional}
  return yarn_of(
    values["factor"],
    values["original_max_position_embeddings"],
    values.get("attention_factor"),
    **betas,
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
  values = dict(read_object(file, "lp_comp"))
  if (version := values.pop("version", VERSION)) != VERSION:
    raise CheckpointError(
      f"{file} has version {version!r}, this xcomp_jax reads {VERSION}: install a newer one"
    )
  absent = {
    field.name: field.default for field in dataclasses.fields(Tuned) if field.default is None
  }
  tuned = from_dict(Tuned, absent | values, str(file))
  numbers = {
    "clip_frames": (tuned.clip_frames, FRAMES),
    "image_size": (tuned.image_size, PIXELS),
    "context": (tuned.context, POSITIONS),
  }
  wrong = [
    inputs.beyond(name, *number) for name, number in numbers.items() if number[0] is not None
  ]
  if wrong := list(
    filter(None, [inputs.beyond("lp_comp.group", tuned.lp_comp.group, WIDTH), *wrong])
  ):
    raise CheckpointError(f"{file}: {'; '.join(wrong)}")
  return tuned


def write_tuned(directory: pathlib.Path, tuned: Tuned) -> None:
  """Writes xcomp.json."""
  write_json(pathlib.Path(directory) / EXTRA, {"version": VERSION} | to_dict(tuned), indent=2)


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
      f"table has only "
      f"{cfg.llm.vocab_size} rows (vocab_size in config.json): they are not of the same model"
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
  state = model if isinstance(model, nnx.State) else nnx.state(model)
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def load_model(
  directory: pathlib.Path,
  cfg: VLMConfig,
  *,
  shardings: nnx.State | None = None,
  dtype: Callable[[str], Any] | Any | None = None,
) -> VLM:
  """The model with a checkpoint's parameters.

  Each tensor goes from its file straight into its target sharding and dtype, one after the other, a
  device's slice
  at a time: the host never holds a second copy of the model.

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
  # refuses what is not there before a model is made, which takes a minute for a thousand layers
  stored(directory, cfg)
  graph, state = nnx.split(abstract(cfg))
  leaves, tree = jax.tree_util.tree_flatten_with_path(state)
  paths = [path_name(path) for path, _ in leaves]
  assert {e.path: e.ours for e in entries} == {
    p: leaf.shape for p, (_, leaf) in zip(paths, leaves)
  }, "table and model differ"
  place = parameters(shardings) if shardings is not None else {}
  chosen = jax.config.jax_default_device  # ty: ignore[missing-attribute]  (made at run time)
  first = SingleDeviceSharding(
    chosen if isinstance(chosen, jax.Device) else jax.local_devices(backend=chosen)[0]
  )
  wanted = dtype if callable(dtype) and not isinstance(dtype, type) else lambda path: dtype

  def target(path, own):
    return (place.get(path, first), np.dtype(own if wanted(path) is None else wanted(path)))

  read = read_orbax if is_orbax(directory) else read_torch
  arrays = read(directory, entries, target)
  return nnx.merge(graph, jax.tree_util.tree_unflatten(tree, [arrays[path] for path in paths]))


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
