"""What a checkpoint's config.json may say: values that this code computes with, keys that don't
change the model, and how positions are rotated and stretched.

A config.json has no schema: transformers, the official code and training frameworks all write keys
of their own. A key that is passed over may be one that makes another model of the same weights, so
every key has to be known here by its name.
"""

import math
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.config import Yarn
from xcomp_jax.inputs import beyond, quoted

# Bounds of numbers: what no model has is refused at once, and not when memory or patience end.
LAYERS, FRAMES, PIXELS = range(1, 1_001), range(1, 1_001), range(1, 4_097)
WIDTH, POSITIONS = range(1, 1_000_001), range(1, 1_000_000_001)
ABOVE_0 = "a number above 0 and below 1e38"  # float32 has them
UP_TO_100 = "a number above 0, at most 100"
Kind = str | range  # a range is one of integers
KINDS: dict[str, Callable[[Any], bool]] = {
  ABOVE_0: lambda v: type(v) in (int, float) and 0 < v < 1e38,
  UP_TO_100: lambda v: type(v) in (int, float) and 0 < v <= 100,
  "true or false": lambda v: type(v) is bool,
  "text": lambda v: type(v) is str,
}

# Keys that do change the model, and the values that this code computes with: those of the released
# variants, and Qwen2's.
ONLY: dict[str, tuple[Any, ...]] = {
  "model_type": ("videochat_flash_qwen", "llava_qwen", "qwen2"),
  "hidden_act": ("silu",),
  "use_sliding_window": (False,),
  "attention_bias": (True,),  # of queries, keys and values
  "mlp_bias": (False,),
  "attention_dropout": (0.0,),
  "partial_rotary_factor": (1.0,),
  "is_decoder": (False,),  # is said of decoders with cross-attention
  "is_encoder_decoder": (False,),
  "add_cross_attention": (False,),
  "tie_encoder_decoder": (False,),
  "pruned_heads": ({},),
  "use_mm_proj": (True,),
  "mm_projector_type": ("tome16_mlp_hd64",),
  "mm_num_attention_heads": (16,),  # of all towers
  "mm_projector_num_tome_tokens": (64,),  # of a clip of 4 frames, 16 each
  "mm_resampler_type": (None,),
  "mm_vision_select_feature": ("patch",),
  "mm_patch_merge_type": ("spatial_nopad", "flat"),
  "mm_use_im_start_end": (False,),
  "mm_use_im_patch_token": (False,),
  "mm_llm_compress": (False,),  # LP-Comp is chosen by the run, not by config.json
  "vision_encode_type": ("video_image",),
  "frame_aspect_ratio": ("square",),
}
IGNORED = frozenset(
  # Names, tokens and outputs.
  "_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash _note "
  "architectures auto_map attn_implementation transformers_version unsloth_version unsloth_fixed "
  "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class "
  "tokenizer_padding_side id2label label2id num_labels problem_type finetuning_task "
  "task_specific_params prefix output_attentions output_hidden_states output_scores return_dict "
  "return_dict_in_generate use_return_dict use_cache torchscript "
  # What the weights' files say themselves, and what only matters to memory or to new weights.
  "dtype torch_dtype use_bfloat16 chunk_size_feed_forward gradient_checkpointing initializer_range "
  # Generation (generation_config.json and the command's options say it).
  "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping "
  "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id "
  "forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups "
  "num_beams num_return_sequences remove_invalid_values repetition_penalty suppress_tokens "
  "temperature tf_legacy_loss top_k top_p typical_p cross_attention_hidden_size "
  # Sizes of a sliding window, which is off, and of compression inside the LLM, which is off.
  "sliding_window max_window_layers llm_compress_layer_list llm_compress_type "
  "llm_image_token_ratio_list "
  # Single images, and frames cut into parts.
  "image_aspect_ratio image_crop_resolution image_grid_pinpoints image_split_resolution "
  "frame_grid_pinpoints max_num_pixels "
  # Training, other towers and other projectors.
  "delay_load freeze_mm_mlp_adapter freeze_mm_vision_resampler max_sequence_length "
  "min_slow_num_frames mm_close_init mm_num_compress_latents mm_num_compress_query_type "
  "mm_pos_num_frames mm_projector_lr mm_spatial_pool_mode mm_spatial_pool_out_channels "
  "mm_spatial_pool_stride mm_tunable_parts mm_vision_tower_lr pos_skipping_range "
  "tune_mm_mlp_adapter tune_mm_vision_resampler unfreeze_mm_vision_tower use_pos_skipping "
  "vision_tower_pretrained".split()
)
SCALINGS = ("rope_scaling", "rope_parameters")  # as transformers has it up to 4, and from 5 on
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of YaRN, where nothing else is said
YARN_KEYS = {
  "attention_factor",
  "beta_fast",
  "beta_slow",
  "factor",
  "original_max_position_embeddings",
  "rope_theta",
  "rope_type",
}
YARN_ONLY = {"partial_rotary_factor": 1, "truncate": True}  # the only values of these keys


def check_kinds(where: Any, values: Any, kinds: Mapping[str, Kind]) -> None:
  """Raises a CheckpointError unless `values` is an object with all keys of `kinds`, of these kinds.

  where: the file, and the key of it that has the values.
  """
  if not isinstance(values, dict):
    raise CheckpointError(
      f"{where} = {quoted(values, 100)}: must be an object", where=where, value=values
    )
  if missing := [key for key in kinds if key not in values]:
    raise CheckpointError(f"{where} lacks {', '.join(missing)}", where=where, missing=missing)
  wrong = {key: said for key, kind in kinds.items() if (said := _unlike(key, values[key], kind))}
  if wrong:
    raise CheckpointError(
      f"{where}: {'; '.join(wrong.values())}",
      where=where,
      wrong={key: values[key] for key in wrong},
      allowed={key: kinds[key] for key in wrong},
    )


def _unlike(key: str, value: Any, kind: Kind) -> str:
  """Says that a value is not of its kind; "" if it is."""
  if isinstance(kind, range):
    return beyond(key, value, kind)
  return "" if KINDS[kind](value) else f"{key} = {quoted(value, 100)}: must be {kind}"


def check_config_json(file: pathlib.Path, c: Mapping[str, Any], read: Collection[str]) -> None:
  """Checks that nothing in config.json asks for another model than the one that is built.

  Args:
    file: config.json, for the message.
    c: what it says; null is as good as absent, as transformers has it.
    read: keys that the caller computes with.

  Raises:
    CheckpointError: keys that are not known, and values that this code can't compute with, all of
      them.
  """
  c = {key: value for key, value in c.items() if value is not None}
  wrong = {
    key: f"{key} = {c[key]!r} is not supported; only {' or '.join(map(repr, values))} is"
    for key, values in ONLY.items()
    if key in c and c[key] not in values
  }
  merge, newline = c.get("mm_patch_merge_type", "flat"), c.get("mm_newline_position", "nothing")
  if newline != "nothing" and merge != "flat":
    wrong["mm_newline_position"] = (
      f"mm_newline_position = {newline!r} with mm_patch_merge_type = {merge!r} is not supported; "
      f"only 'nothing' is"
    )
  types, layers = c.get("layer_types"), c.get("num_hidden_layers")
  if types is not None and types != ["full_attention"] * (layers or 0):
    kinds = sorted(set(map(str, types))) if isinstance(types, list) else types
    wrong["layer_types"] = (
      f"layer_types = {kinds} is not supported; only 'full_attention' of all {layers} layers is"
    )
  known = {*ONLY, *IGNORED, *read, "mm_newline_position", "layer_types"}
  unknown = sorted(c.keys() - known)
  if wrong or unknown:
    others = (
      f"{', '.join(unknown)}: not known here, so it may ask for another model; what changes "
      f"nothing can be taken out of the file"
    )
    raise CheckpointError(
      f"{file}: {'; '.join([*wrong.values(), *[others] * bool(unknown)])}",
      where=file,
      wrong={key: c[key] for key in wrong},
      unknown=unknown,
    )


def rope_theta(file: pathlib.Path, c: Mapping[str, Any]) -> Any:
  """Reads the base of rotary positions: a key of its own up to transformers 4, in `rope_parameters`
  from 5 on; None: nowhere.

  Raises:
    CheckpointError: several that differ.
  """
  said = {"rope_theta": c.get("rope_theta")} | {
    f"{key}.rope_theta": c[key].get("rope_theta")
    for key in SCALINGS
    if isinstance(c.get(key), Mapping)
  }
  said = {key: value for key, value in said.items() if value is not None}
  return _agreed(file, said, said)


def read_scaling(file: pathlib.Path, c: Mapping[str, Any]) -> Yarn | None:
  """Reads how config.json stretches positions, from whichever of `rope_scaling` and
  `rope_parameters` there is.

  Raises:
    CheckpointError: they differ; see also `read_yarn`.
  """
  said = {key: c[key] for key in SCALINGS if c.get(key) is not None}
  return _agreed(
    file, said, {key: read_yarn(f"{file}: {key}", values) for key, values in said.items()}
  )


def _agreed(file: pathlib.Path, said: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
  """Gives the one value that several keys of config.json give; None if there are none.

  Which of them counts depends on the version of transformers that reads the file, so there is no
  right one to choose.

  Args:
    file: config.json, for the message.
    said: key -> what stands there.
    values: key -> what that means.

  Raises:
    CheckpointError: they differ.
  """
  first = next(iter(values.values()), None)
  if any(value != first for value in values.values()):
    words = ", but ".join(f"{key} = {said[key]!r}" for key in values)
    raise CheckpointError(
      f"{file}: {words}; keep the one that the weights were trained with, and take the other out",
      where=file,
      differ=dict(said),
    )
  return first


def read_yarn(where: str, values: Any) -> Yarn | None:
  """What `rope_scaling` or `rope_parameters` of a config.json says, in the form of the transformers
  library.

  Raises:
    CheckpointError: another kind of scaling, keys missing or unknown, or values of the wrong kind.
  """
  if values is None:
    return None
  check_kinds(where, values, {})
  bare = values.keys() <= {"rope_theta"}  # as transformers reads it
  kind = values.get("rope_type", values.get("type", "default" if bare else None))
  if values.get("type", kind) != kind:
    raise CheckpointError(
      f"{where}: type {values['type']!r} and rope_type {kind!r} differ; take the wrong one out",
      where=where,
      differ={"type": values["type"], "rope_type": kind},
    )
  if kind not in ("default", "yarn"):
    raise CheckpointError(
      f"{where}: type {kind!r} is not supported; yarn is, and none at all (null)",
      where=where,
      value=kind,
      allowed=("default", "yarn"),
    )
  said = {key: value for key, value in values.items() if value is not None}
  if other := sorted(k for k in said.keys() - YARN_KEYS - {"type"} if said[k] != YARN_ONLY.get(k)):
    raise CheckpointError(
      f"{where}: {', '.join(other)} of YaRN not supported; {', '.join(sorted(YARN_KEYS))} are",
      where=where,
      unknown=other,
    )
  if kind == "default":
    return None
  optional = [key for key in ("attention_factor", *BETAS) if key in said]
  check_kinds(
    where,
    values,
    {"factor": ABOVE_0, "original_max_position_embeddings": POSITIONS}
    | dict.fromkeys(optional, ABOVE_0),
  )
  if said["factor"] < 1:
    raise CheckpointError(
      f"{where}: factor = {said['factor']}: must be at least 1",
      where=where,
      wrong={"factor": said["factor"]},
    )
  return yarn_of(
    said["factor"],
    said["original_max_position_embeddings"],
    said.get("attention_factor"),
    **{key: said[key] for key in BETAS if key in said},
  )


def yarn_of(
  factor: float, positions: float, attention: float | None = None, **betas: float
) -> Yarn:
  """YaRN as Qwen2.5 has it; attention None: the square root of what scores gain, 0.1 ln(factor) + 1
  (Peng et al. 2023, 3.4).
  """
  gain = 0.1 * math.log(factor) + 1 if attention is None else attention
  return Yarn(
    factor=float(factor),
    positions=int(positions),
    attention=float(gain),
    **{key: float(value) for key, value in (BETAS | betas).items()},
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
