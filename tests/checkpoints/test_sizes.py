"""From config.json and xcomp.json to the sizes of a model."""

import json
import pathlib
import types

import pytest
from tiny_checkpoints import HIGH, LP_COMP, RELEASED, SEVEN, TINY, YARN, configured, read_config

from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.checkpoints.tuned import read_tuned
from xcomp_jax.config import ConfigError, InternVideo2Config, ModelConfig

pytestmark = pytest.mark.pure


def test_rope_fields_come_from_config_json(tmp_path):
  llm = read_config(configured(tmp_path, **SEVEN, **HIGH)).llm
  assert (llm.rope_theta, llm.norm_eps, llm.context, llm.rope_scaling) == (1e7, 1e-5, 1010000, None)


def test_the_internvideo2_tower_has_the_official_sizes(tmp_path):
  v = read_config(
    configured(tmp_path, **RELEASED["Qwen2_5-7B_InternVideo2-1B"][1]), clip_frames=4
  ).vision
  assert v == InternVideo2Config(
    image_size=224, patch_size=14, width=1408, layers=39, heads=16, mlp_width=6144, frames=4
  )
  assert (v.patches, v.tokens(4), v.tokens(1)) == (256, 1025, 257)


@pytest.mark.parametrize("wanted", [8, "checkpoint"])
def test_clips_that_the_internvideo2_tower_does_not_take_are_refused(tmp_path, wanted):
  changes = RELEASED["Qwen2_5-7B_InternVideo2-1B"][1] | {"mm_local_num_frames": 8}
  with pytest.raises(ConfigError) as caught:
    read_config(configured(tmp_path, **changes), clip_frames=wanted)
  assert caught.value.fields == {"where": tmp_path / "config.json", "value": 8, "allowed": 4}


def test_config_of_the_official_2b(tmp_path):
  cfg = read_config(configured(tmp_path))
  v, m = cfg.vision, cfg.llm
  assert (v.patch_size, v.width, v.layers, v.heads, v.mlp_width, v.patches) == (
    16,
    1024,
    23,
    16,
    4096,
    784,
  )
  assert (m.head_dim, m.rope_theta, m.norm_eps, m.tied) == (128, 1e6, 1e-6, True)
  assert (cfg.tokens_per_frame, cfg.dtype, cfg.lp_comp) == (16, "bfloat16", LP_COMP)


def test_quirk_q1_clip_length_of_config_json_only_on_request(tmp_path, caplog):
  directory = configured(tmp_path)
  assert read_config(directory).clip_frames == 8
  (said,) = (record.getMessage() for record in caplog.records)
  caplog.clear()
  assert "clips of 8 frames, not the 4" in said
  assert read_config(directory, clip_frames="checkpoint").clip_frames == 4
  assert read_config(directory, clip_frames=4).clip_frames == 4
  assert not caplog.records


WIDTH = range(1, 1_000_001)
ABOVE_0 = "a number above 0 and below 1e38"


@pytest.mark.parametrize(
  "changes, key, fields",
  [
    ({"rope_theta": ..., "vocab_size": ...}, "", {"missing": ["vocab_size", "rope_theta"]}),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0}},
      "rope_scaling",
      {"value": "linear", "allowed": ("default", "yarn")},
    ),
    ({"rope_scaling": "yarn"}, "rope_scaling", {"value": "yarn"}),
    (
      {"rope_scaling": {"type": "yarn", "factor": 4.0}},
      "rope_scaling",
      {"missing": ["original_max_position_embeddings"]},
    ),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling", {"wrong": {"factor": 0.5}}),
    ({"rope_scaling": YARN | {"mscale": 0.7}}, "rope_scaling", {"unknown": ["mscale"]}),
    ({"use_sliding_window": True}, "", {"wrong": {"use_sliding_window": True}, "unknown": []}),
    (
      {"mm_projector_type": "mlp2x_gelu"},
      "",
      {"wrong": {"mm_projector_type": "mlp2x_gelu"}, "unknown": []},
    ),
    (
      {"mm_vision_tower": "siglip"},
      "",
      {
        "wrong": {"mm_vision_tower": "siglip"},
        "allowed": ("umt-hd-large", "umt-large", "internvideo2"),
      },
    ),
    ({"mm_hidden_size": 1152}, "", {"wrong": {"mm_hidden_size": 1152}, "expected": 1024}),
    (
      {"tiny_vision": {"depth": 3}},
      "tiny_vision",
      {"missing": ["image_size", "embed_dim", "heads", "patch_size", "mlp_ratio"]},
    ),
    ({"tiny_vision": 5}, "tiny_vision", {"value": 5}),
    (
      {"tiny_vision": TINY["tiny_vision"] | {"heads": 0}},
      "tiny_vision",
      {"wrong": {"heads": 0}, "allowed": {"heads": WIDTH}},
    ),
    (
      {"hidden_size": "96"},
      "",
      {"wrong": {"hidden_size": "96"}, "allowed": {"hidden_size": WIDTH}},
    ),
    (
      {"hidden_size": None, "rope_theta": True},
      "",
      {
        "wrong": {"hidden_size": None, "rope_theta": True},
        "allowed": {"hidden_size": WIDTH, "rope_theta": ABOVE_0},
      },
    ),
    (
      {"num_attention_heads": 0},
      "",
      {"wrong": {"num_attention_heads": 0}, "allowed": {"num_attention_heads": WIDTH}},
    ),
    (
      {"mm_vision_tower": None},
      "",
      {"wrong": {"mm_vision_tower": None}, "allowed": {"mm_vision_tower": "text"}},
    ),
    (
      {"mm_vision_select_layer": None},
      "",
      {
        "wrong": {"mm_vision_select_layer": None},
        "allowed": {"mm_vision_select_layer": range(-1_000, 1_001)},
      },
    ),
    (
      {"mm_local_num_frames": "x"},
      "",
      {
        "wrong": {"mm_local_num_frames": "x"},
        "allowed": {"mm_local_num_frames": range(1, 1_001)},
      },
    ),
    (
      {"tie_word_embeddings": "no"},
      "",
      {
        "wrong": {"tie_word_embeddings": "no"},
        "allowed": {"tie_word_embeddings": "true or false"},
      },
    ),
    ({"head_dim": "128"}, "", {"wrong": {"head_dim": "128"}, "allowed": {"head_dim": WIDTH}}),
    ({"num_attention_heads": 11}, "", {"wrong": {"hidden_size": 1536, "num_attention_heads": 11}}),
    ({"mm_vision_select_layer": 2}, "", {"wrong": {"mm_vision_select_layer": 2}}),
  ],
)
def test_config_that_cannot_be_used(tmp_path, changes, key, fields):
  with pytest.raises(CheckpointError) as caught:
    read_config(configured(tmp_path, **changes))
  where = caught.value.fields.pop("where")
  assert str(where) == str(tmp_path / "config.json") + (f": {key}" if key else "")
  assert caught.value.fields == fields


def test_a_message_says_what_must_stand_there(tmp_path):
  with pytest.raises(
    CheckpointError,
    match=r"hidden_size = None: must be an integer from 1 to 1,000,000; rope_theta = True: must be "
    r"a number above 0",
  ):
    read_config(configured(tmp_path, hidden_size=None, rope_theta=True))


def test_no_or_broken_config_json(tmp_path):
  file = tmp_path / "config.json"
  with pytest.raises(CheckpointError) as caught:
    read_config(tmp_path)
  assert caught.value.fields == {"where": tmp_path, "missing": "config.json"}
  file.write_text("{")
  with pytest.raises(CheckpointError) as caught:
    read_config(tmp_path)
  assert caught.value.fields["where"] == file and caught.value.fields["expected"] == "JSON"
  file.write_text("[]")
  with pytest.raises(CheckpointError) as caught:
    read_config(tmp_path)
  assert caught.value.fields == {"where": file, "value": []}
  (tmp_path / "xcomp.json").write_text('{"lp_comp": 3}')
  with pytest.raises(ConfigError, match=r"xcomp\.json\.lp_comp must be a group of keys, not 3"):
    read_tuned(tmp_path)


def test_a_run_is_told_to_be_exported_first(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"seed": 0, "workdir": "w", "init_from": "i"}))
  with pytest.raises(CheckpointError) as caught:
    read_config(tmp_path)
  assert caught.value.fields == {"where": tmp_path, "found": "a run"}


@pytest.mark.parametrize(
  "memory, dtype, clips",
  [
    (63.7e9, "bfloat16", 8),
    (17.8e9, "bfloat16", 8),
    (11.9e9, "float32", 4),
    (None, "float32", 4),
    (1e9, "float32", 1),
  ],
)
def test_clips_at_once_are_by_memory(memory, dtype, clips):
  model = ModelConfig(
    clip_frames=8,
    yarn="checkpoint",
    dtype=dtype,
    param_dtype=dtype,
    clips_per_chunk="auto",
    attention="auto",
    remat=False,
  )
  released = (
    pathlib.Path(__file__).parents[2] / "configs/OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448"
  )
  device = types.SimpleNamespace(
    device_kind="none", process_index=0, memory_stats=lambda: memory and {"bytes_limit": memory}
  )
  assert read_vlm_config(released, model, LP_COMP, device).clips_per_chunk == clips


@pytest.mark.parametrize(
  "changes, wrong",
  [
    ({"num_hidden_layers": 10**6}, {"num_hidden_layers"}),
    ({"hidden_size": 1e30}, {"hidden_size"}),
    ({"vocab_size": 10**10}, {"vocab_size"}),
    ({"rope_theta": 10**400}, {"rope_theta"}),
    ({"rms_norm_eps": 1e300}, {"rms_norm_eps"}),
    ({"max_position_embeddings": 10**12}, {"max_position_embeddings"}),
    ({"mm_local_num_frames": 8 * 10**9}, {"mm_local_num_frames"}),
    ({"mm_vision_select_layer": -(10**9)}, {"mm_vision_select_layer"}),
    (
      {"rope_scaling": YARN | {"original_max_position_embeddings": 10**12}},
      {"original_max_position_embeddings"},
    ),
    *(
      ({"tiny_vision": TINY["tiny_vision"] | changes}, wrong)
      for changes, wrong in (
        ({"image_size": 10**5}, {"image_size"}),
        ({"depth": 10**8}, {"depth"}),
        ({"mlp_ratio": 1e30}, {"mlp_ratio"}),
        ({"patch_size": 65}, {"image_size", "patch_size"}),
        ({"patch_size": 1, "image_size": 4096}, {"image_size", "patch_size"}),
        ({"heads": True}, {"heads"}),
      )
    ),
  ],
)
def test_numbers_of_config_json_have_bounds(tmp_path, changes, wrong):
  with pytest.raises(CheckpointError) as caught:
    read_config(configured(tmp_path, **(TINY | changes)))
  fields = caught.value.fields
  assert str(fields["where"]).startswith(str(tmp_path / "config.json"))
  # Python does not read integers of more than 4,300 digits
  assert fields.get("expected") == "JSON" or fields["wrong"].keys() == wrong


@pytest.mark.parametrize(
  "changes, wrong",
  [
    ({"clip_frames": 0}, {"clip_frames": 0}),
    ({"clip_frames": 10**9}, {"clip_frames": 10**9}),
    ({"image_size": -1}, {"image_size": -1}),
    ({"context": 10**12}, {"context": 10**12}),
    ({"lp_comp": {"schedule": "cosine", "keep": "suffix", "group": 0}}, {"lp_comp.group": 0}),
  ],
)
def test_numbers_of_xcomp_json_have_bounds(tmp_path, changes, wrong):
  (tmp_path / "xcomp.json").write_text(
    json.dumps({"lp_comp": {"schedule": "cosine", "keep": "suffix", "group": 16}} | changes)
  )
  with pytest.raises(CheckpointError) as caught:
    read_tuned(tmp_path)
  fields = caught.value.fields
  assert fields["where"] == tmp_path / "xcomp.json" and fields["wrong"] == wrong
  assert all(bounds[0] == 1 for bounds in fields["allowed"].values())
