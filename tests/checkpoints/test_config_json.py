"""config.json as transformers 4 and 5, the official code and training frameworks write it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as w
from safetensors.numpy import load_file

from xcomp_jax.checkpoints import loading, saving
from xcomp_jax.checkpoints.config_json import yarn_of
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.model import layers

# XComp's own config.json and, where they differ, that which its release lays over it.
OFFICIAL = {
  "_name_or_path": "checkpoints/baseline",
  "architectures": ["LlavaQwenForCausalLM"],
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "frame_aspect_ratio": "square",
  "frame_grid_pinpoints": None,
  "image_aspect_ratio": "square",
  "image_crop_resolution": None,
  "image_grid_pinpoints": None,
  "image_split_resolution": None,
  "initializer_range": 0.02,
  "llm_compress_layer_list": [8, 16, 24],
  "llm_compress_type": "attention",
  "llm_image_token_ratio_list": [1.0, 0.5, 0.25, 0.125],
  "max_num_pixels": 14745600000,
  "max_position_embeddings": 32768,
  "max_window_layers": 21,
  "min_slow_num_frames": 4,
  "mm_close_init": False,
  "mm_llm_compress": False,
  "mm_newline_position": "one_token",
  "mm_num_compress_latents": 128,
  "mm_num_compress_query_type": "learnable",
  "mm_patch_merge_type": "flat",
  "mm_pos_num_frames": 8,
  "mm_projector_lr": None,
  "mm_spatial_pool_mode": "bilinear",
  "mm_tunable_parts": "mm_mlp_adapter,mm_language_model",
  "mm_use_im_patch_token": False,
  "mm_use_im_start_end": False,
  "mm_vision_select_feature": "patch",
  "mm_vision_tower_lr": 2e-06,
  "model_type": "qwen2",
  "pos_skipping_range": 4096,
  "sliding_window": 32768,
  "tokenizer_model_max_length": 32768,
  "tokenizer_padding_side": "right",
  "transformers_version": "4.40.2",
  "use_cache": True,
  "use_mm_proj": True,
  "use_pos_skipping": False,
  "vision_encode_type": "video_image",
  "vision_tower_pretrained": None,
}
RELEASE = OFFICIAL | {
  "architectures": ["VideoChatFlashQwenForCausalLM"],
  "image_aspect_ratio": "anyres_nopad",
  "image_grid_pinpoints": [[448, 448], [448, 896]],
  "llm_compress_layer_list": [24],
  "llm_image_token_ratio_list": [1.0, 0.5],
  "max_position_embeddings": 131072,
  "mm_newline_position": "nothing",
  "mm_patch_merge_type": "spatial_nopad",
  "mm_resampler_type": None,
  "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
  "model_type": "videochat_flash_qwen",
  "auto_map": {"AutoModel": "modeling_videochat_flash.VideoChatFlashQwenForCausalLM"},
  "tokenizer_model_max_length": 131072,
}
FIVE = {"rope_theta": ..., "rope_scaling": ...}  # keys that transformers 5 no longer writes
YARN = {
  "rope_type": "yarn",
  "rope_theta": 1e6,
  "factor": 4.0,
  "original_max_position_embeddings": 32768,
}
QWEN = yarn_of(4.0, 32768)


@pytest.mark.pure
@pytest.mark.parametrize("config", [OFFICIAL, RELEASE], ids=["XComp", "release"])
def test_official_files_are_understood(tmp_path, config):
  cfg = w.read_config(w.configured(tmp_path, **config))
  assert cfg.llm.context == config["tokenizer_model_max_length"] and cfg.vision.image_size == 448


def test_every_released_variant_has_the_frequencies_of_transformers_in_either_form(
  reference, tmp_path
):
  recorded = json.loads((reference / "rope.json").read_text())
  assert {case["variant"] for case in recorded["cases"]} == w.RELEASED.keys()
  for i, case in enumerate(recorded["cases"]):
    changes = w.RELEASED[case["variant"]][1]
    written = (
      case["written"] | {"layer_types": ["full_attention"] * 28} | dict.fromkeys(case["gone"], ...)
    )
    for form, keys in (("4", case["said"]), ("5", written)):
      llm = w.read_config(
        w.configured(tmp_path / f"{i}-{form}", **(changes | keys)), clip_frames="auto"
      ).llm
      # turned by a position, each shows its frequency as an angle
      ones = jnp.zeros((1, 1, 1, 128)).at[..., :64].set(1)
      turned = np.asarray(
        layers.rotate(ones, jnp.ones((1, 1), jnp.int32), llm), np.float64
      ).reshape(2, 64)
      frequencies = recorded["frequencies"][case["frequencies"]]
      np.testing.assert_allclose(
        np.arctan2(turned[1], turned[0]),
        frequencies,
        rtol=1e-6,
        err_msg=f"{case['variant']}, {form}",
      )
      np.testing.assert_allclose(np.hypot(*turned), case["attention"], rtol=1e-6)


@pytest.mark.pure
@pytest.mark.parametrize(
  "changes, scaling",
  [
    (FIVE | {"rope_parameters": {"rope_theta": 1e6}}, None),
    (
      FIVE
      | {
        "rope_parameters": {
          "rope_theta": 1e6,
          "rope_type": "default",
          "partial_rotary_factor": 1.0,
        }
      },
      None,
    ),
    (FIVE | {"rope_parameters": YARN | {"truncate": True, "attention_factor": None}}, QWEN),
    ({"rope_parameters": YARN}, QWEN),  # rope_scaling null says nothing
    ({"rope_parameters": YARN | {"factor": 1.5}}, yarn_of(1.5, 32768)),
    ({"rope_parameters": YARN, "rope_scaling": w.YARN}, QWEN),
    (
      {
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "rope_scaling": {"type": "default"},
      },
      None,
    ),
  ],
)
def test_rope_parameters_alone_and_beside_old_keys_that_agree(tmp_path, changes, scaling):
  llm = w.read_config(w.configured(tmp_path, **changes)).llm
  assert (llm.rope_theta, llm.rope_scaling) == (1e6, scaling)


@pytest.mark.pure
@pytest.mark.parametrize(
  "changes, key, fields",
  [
    (
      {"rope_parameters": {"rope_theta": 1e4}},
      "",
      {"differ": {"rope_theta": 1e6, "rope_parameters.rope_theta": 1e4}},
    ),
    (
      {"rope_scaling": w.YARN | {"rope_theta": 1e4}},
      "",
      {"differ": {"rope_theta": 1e6, "rope_scaling.rope_theta": 1e4}},
    ),
    (
      {"rope_parameters": YARN | {"factor": 2.0}, "rope_scaling": w.YARN},
      "",
      {"differ": {"rope_scaling": w.YARN, "rope_parameters": YARN | {"factor": 2.0}}},
    ),
    (
      {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": w.YARN},
      "",
      {"differ": {"rope_scaling": w.YARN, "rope_parameters": {"rope_theta": 1e6}}},
    ),
    (FIVE | {"rope_parameters": {"rope_type": "default"}}, "", {"missing": ["rope_theta"]}),
    (
      FIVE | {"rope_parameters": {"full_attention": YARN}, "rope_theta": 1e6},
      "rope_parameters",
      {"value": None, "allowed": ("default", "yarn")},
    ),
    (
      {"rope_scaling": {"type": "yarn", "rope_type": "default"}},
      "rope_scaling",
      {"differ": {"type": "yarn", "rope_type": "default"}},
    ),
    (
      {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
      "rope_parameters",
      {"value": "llama3", "allowed": ("default", "yarn")},
    ),
    (
      {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
      "rope_parameters",
      {"unknown": ["partial_rotary_factor"]},
    ),
    (
      {"rope_parameters": YARN | {"truncate": False}},
      "rope_parameters",
      {"unknown": ["truncate"]},
    ),
    (
      {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
      "",
      {
        "wrong": {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
        "unknown": [],
      },
    ),
    (
      {"layer_types": ["full_attention"] * 27},
      "",
      {"wrong": {"layer_types": ["full_attention"] * 27}, "unknown": []},
    ),
    ({"model_type": "qwen3"}, "", {"wrong": {"model_type": "qwen3"}, "unknown": []}),
    ({"attention_bias": False}, "", {"wrong": {"attention_bias": False}, "unknown": []}),
    (
      {"mm_llm_compress": True, "frame_aspect_ratio": "anyres"},
      "",
      {"wrong": {"mm_llm_compress": True, "frame_aspect_ratio": "anyres"}, "unknown": []},
    ),
    (
      {"mm_patch_merge_type": "spatial_nopad", "mm_newline_position": "one_token"},
      "",
      {"wrong": {"mm_newline_position": "one_token"}, "unknown": []},
    ),
    (
      {"quantization_config": {"bits": 4}, "num_experts": 8},
      "",
      {"wrong": {}, "unknown": ["num_experts", "quantization_config"]},
    ),
    ({"rope_thetta": 1e4}, "", {"wrong": {}, "unknown": ["rope_thetta"]}),
  ],
)
def test_what_asks_for_another_model_or_contradicts_itself_is_named(tmp_path, changes, key, fields):
  with pytest.raises(CheckpointError) as caught:
    w.read_config(w.configured(tmp_path, **changes))
  where = caught.value.fields.pop("where")
  assert str(where) == str(tmp_path / "config.json") + (f": {key}" if key else "")
  assert caught.value.fields == fields


@pytest.mark.pure
@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"model_type": "qwen3"},
      "model_type = 'qwen3' is not supported; only 'videochat_flash_qwen' or 'llava_qwen' or "
      "'qwen2' is",
    ),
    (
      {"layer_types": ["full_attention"] * 27},
      "layer_types = .* only 'full_attention' of all 28 layers is",
    ),
    (
      {"rope_parameters": {"rope_theta": 1e4}},
      r"rope_theta = 1000000\.0, but rope_parameters\.rope_theta = 10000\.0; keep the one",
    ),
  ],
)
def test_a_message_says_what_could_stand_there(tmp_path, changes, message):
  with pytest.raises(CheckpointError, match=message):
    w.read_config(w.configured(tmp_path, **changes))


@pytest.mark.pure
def test_null_is_as_good_as_absent(tmp_path):
  nothing = {
    "quantization_config": None,
    "use_sliding_window": None,
    "layer_types": None,
    "rope_parameters": None,
  }
  assert w.read_config(w.configured(tmp_path / "a", **nothing)) == w.read_config(
    w.configured(tmp_path / "b")
  )


@pytest.mark.parametrize("layout", ["torch", "orbax"])
def test_exports_have_the_keys_that_the_official_code_reads(reference, tmp_path, layout):
  changes = FIVE | {"rope_parameters": YARN, "torch_dtype": ..., "dtype": "float32"}
  source = w.tiny(tmp_path / "in", w.tiny_tensors(reference), **changes)
  cfg = w.read_config(source)
  save = saving.save_torch if layout == "torch" else saving.save_orbax
  save(tmp_path / "out", loading.load_model(source, cfg), cfg, source, dtype="bfloat16")
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (written["rope_theta"], written["rope_scaling"]["factor"], written["torch_dtype"]) == (
    1e6,
    4.0,
    "bfloat16",
  )
  assert not {"rope_parameters", "dtype"} & written.keys()
  assert w.read_config(tmp_path / "out") == cfg


@pytest.mark.parametrize("layout", ["torch", "orbax"])
def test_a_head_that_is_no_embedding_is_kept_and_exported_untied(
  reference, tmp_path, caplog, layout
):
  tensors = w.tiny_tensors(reference)
  head = tensors["model.embed_tokens.weight"].copy()
  head[-1, -1] += 1
  source = w.tiny(tmp_path / "in", tensors | {"lm_head.weight": head}, tie_word_embeddings=True)
  cfg = w.read_config(source)
  assert "config.json says tie_word_embeddings, but lm_head.weight is another matrix" in caplog.text
  model = loading.load_model(source, cfg)
  np.testing.assert_array_equal(model.llm.lm_head.kernel[...], head.T)
  save = saving.save_torch if layout == "torch" else saving.save_orbax
  save(tmp_path / "out", model, cfg, source)
  assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
  caplog.clear()
  assert w.read_config(tmp_path / "out") == cfg and "tie_word" not in caplog.text
  np.testing.assert_array_equal(
    loading.load_model(tmp_path / "out", cfg).llm.lm_head.kernel[...], head.T
  )


def test_a_head_that_is_the_embedding_once_more_is_tied(reference, tmp_path, capsys):
  tensors = w.tiny_tensors(reference)
  source = w.tiny(
    tmp_path / "in",
    tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]},
    tie_word_embeddings=True,
  )
  cfg = w.read_config(source)
  assert cfg.llm.tied and "tie_word" not in capsys.readouterr().err
  saving.save_torch(tmp_path / "out", loading.load_model(source, cfg), cfg, source)
  assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
