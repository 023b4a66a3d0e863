"""From a checkpoint's config.json, what was tuned and the choices of a run to a VLMConfig."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from xcomp_jax.checkpoints.config_json import (
  ABOVE_0,
  FRAMES,
  LAYERS,
  PIXELS,
  POSITIONS,
  SCALINGS,
  UP_TO_100,
  WIDTH,
  Kind,
  check_config_json,
  check_kinds,
  read_scaling,
  rope_theta,
  yarn_of,
)
from xcomp_jax.checkpoints.tensor_files import CheckpointError, adapters, equal, read_object
from xcomp_jax.checkpoints.tuned import EXTRA, read_tuned
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
)
from xcomp_jax.parallel import chips

LOG = logging.getLogger(__name__)

SIZES: dict[str, Kind] = {  # what config.json must have
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
OPTIONAL: dict[str, Kind] = {
  "head_dim": WIDTH,
  "tokenizer_model_max_length": POSITIONS,
  "max_position_embeddings": POSITIONS,
}
TINY_VISION: dict[str, Kind] = {
  "image_size": PIXELS,
  "embed_dim": WIDTH,
  "depth": LAYERS,
  "heads": WIDTH,
  "patch_size": PIXELS,
  "mlp_ratio": UP_TO_100,
}
PATCHES = 65_536  # of a frame, at most
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
MOST_CLIPS = 8  # in the tower at once: a clip of 448 px fills a device by itself
CLIP_SHARE = 8  # of a device's memory clips in the tower may take one part in so many
UNKNOWN = 16e9  # bytes of a device whose memory is not known


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
  c = _read_config_json(directory, file)
  tuned = read_tuned(directory) or Tuned(lp_comp=lp_comp)
  tower = _tower(file, c)
  if tuned.image_size not in (None, tower.image_size):
    raise CheckpointError(
      f"{directory}: {EXTRA} says tuned with {tuned.image_size} pixels, and the tower of "
      f"config.json takes {tower.image_size}",
      where=directory / EXTRA,
      value=tuned.image_size,
      expected=tower.image_size,
    )
  cfg = VLMConfig(
    vision=tower,
    llm=_llm(file, c, model.yarn, _context(file, c, tuned.context)),
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
  if model.clips_per_chunk != "auto":
    return cfg
  memory = chips.device_memory(jax.local_devices()[0] if device is None else device)
  return dataclasses.replace(cfg, clips_per_chunk=clips_at_once(cfg, memory))


def clips_at_once(cfg: VLMConfig, memory: float | None) -> int:
  """How many clips the tower takes at once on a device with so many bytes: a power of two.

  A token of a clip takes what seven vectors of the tower's width and one of its MLP's do, which is
  the most of what was compiled for GPUs (docs/LOG.md).
  """
  v = cfg.vision
  clip = v.tokens(cfg.clip_frames) * (7 * v.width + v.mlp_width) * np.dtype(cfg.dtype).itemsize
  return min(MOST_CLIPS, 1 << max(0, int((memory or UNKNOWN) / CLIP_SHARE / clip).bit_length() - 1))


def _read_config_json(directory: pathlib.Path, file: pathlib.Path) -> dict[str, Any]:
  """What config.json says, checked, with `rope_theta` and `tie_word_embeddings` as they count."""
  if not file.exists() and (directory / "adapter_config.json").exists():
    raise adapters(directory, "adapter_config.json")
  c = read_object(file)
  if c.keys() >= {"init_from", "workdir"}:
    raise CheckpointError(
      f"{directory} is a run; export it first: python -m xcomp_jax.export --checkpoint "
      f"{directory} --format=torch --out DIR",
      where=directory,
      found="a run",
    )
  theta = rope_theta(file, c)
  if theta is not None:
    c["rope_theta"] = theta
  check_kinds(file, c, SIZES | {key: OPTIONAL[key] for key in OPTIONAL if c.get(key) is not None})
  check_config_json(file, c, (*SIZES, *OPTIONAL, *SCALINGS, "tiny_vision"))
  if c["tie_word_embeddings"] and not equal(
    directory, "lm_head.weight", "model.embed_tokens.weight"
  ):
    LOG.warning(
      f"{file} says tie_word_embeddings, but lm_head.weight is another matrix than the embedding; "
      f"it is kept"
    )
    c["tie_word_embeddings"] = False
  return c


def _context(file: pathlib.Path, c: Mapping[str, Any], tuned: int | None) -> int | None:
  """Tokens of a prompt: as tuned, else as config.json says."""
  own = c.get("tokenizer_model_max_length") or c.get("max_position_embeddings")
  if tuned is None:
    return own
  if own not in (None, tuned):
    LOG.warning(
      f"a context of {tuned} tokens, as tuned ({EXTRA}), not the {own} of {file}; "
      f"--context {own} takes that"
    )
  return tuned


def _tower(file: pathlib.Path, c: Mapping[str, Any]) -> VisionConfig | InternVideo2Config:
  name = c["mm_vision_tower"]
  internvideo2 = "internvideo2" in name.lower()  # whatever else a path of weights says
  if "tiny_vision" in c:
    t = c["tiny_vision"]
    check_kinds(f"{file}: tiny_vision", t, TINY_VISION)
  elif internvideo2 or name in TOWERS:
    t = TOWERS["internvideo2" if internvideo2 else name]
  else:
    known = ", ".join(f"{tower} ({sizes['image_size']} px)" for tower, sizes in TOWERS.items())
    raise CheckpointError(
      f"{file}: mm_vision_tower {name!r} is not known; these are: {known}",
      where=file,
      wrong={"mm_vision_tower": name},
      allowed=tuple(TOWERS),
    )
  if c["mm_hidden_size"] != t["embed_dim"]:
    raise CheckpointError(
      f"{file}: mm_hidden_size is {c['mm_hidden_size']}, but tower {name} is {t['embed_dim']} wide",
      where=file,
      wrong={"mm_hidden_size": c["mm_hidden_size"]},
      expected=t["embed_dim"],
    )
  selected = c["mm_vision_select_layer"]
  if not -t["depth"] <= selected < 0:
    raise CheckpointError(
      f"{file}: mm_vision_select_layer = {selected} must count from the end, as -2 does",
      where=file,
      wrong={"mm_vision_select_layer": selected},
    )
  if not 0 < (t["image_size"] // t["patch_size"]) ** 2 <= PATCHES:
    raise CheckpointError(
      f"{file}: tiny_vision: patches of {t['patch_size']} pixels make none, or more than "
      f"{PATCHES:,}, of {t['image_size']} x {t['image_size']}",
      where=f"{file}: tiny_vision",
      wrong={key: t[key] for key in ("image_size", "patch_size")},
    )
  sizes = dict(
    image_size=t["image_size"],
    patch_size=t["patch_size"],
    width=t["embed_dim"],
    layers=t["depth"] + selected + 1,  # blocks behind the selected one are never built
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
  said = {"checkpoint": own, "auto": takes or tuned or CLIP_FRAMES}
  frames = wanted if isinstance(wanted, int) else said[wanted]
  if takes not in (None, frames):
    raise ConfigError(
      f"{file}: the InternVideo2 tower has positions for clips of {takes} frames, not of "
      f"{frames}: set model.clip_frames to {takes} or auto (--clip-frames {takes}; --clip-frames "
      f"{takes} of predecode, so that the data has such clips)",
      where=file,
      value=frames,
      allowed=takes,
    )
  if frames != own:
    LOG.warning(
      f"clips of {frames} frames, {f'as tuned ({EXTRA}), ' if frames == tuned else ''}not the "
      f"{own} of {file}; {option.format(own=own)} takes those (quirk Q1)"
    )
  return frames


def _llm(
  file: pathlib.Path,
  c: Mapping[str, Any],
  yarn: tuple[float, ...] | Literal["checkpoint"] | None,
  context: int | None,
) -> LLMConfig:
  if not c.get("head_dim") and c["hidden_size"] % c["num_attention_heads"]:
    raise CheckpointError(
      f"{file}: num_attention_heads does not divide hidden_size, and there is no head_dim",
      where=file,
      wrong={key: c[key] for key in ("hidden_size", "num_attention_heads")},
    )
  scaling = read_scaling(file, c) if yarn == "checkpoint" else yarn_of(*yarn) if yarn else None
  if scaling and context:
    context = max(context, int(scaling.factor * scaling.positions))
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
    context=context,
  )
