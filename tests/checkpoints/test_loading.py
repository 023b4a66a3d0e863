"""The table against the official parameter lists, loading and saving, and what a broken checkpoint
is told.
"""

import ast
import dataclasses
import gzip
import json
import math
import os
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from xcomp_jax.checkpoints import loading, orbax_files, saving, tensor_files, tensor_names
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.checkpoints.tensor_names import families
from xcomp_jax.checkpoints.tuned import read_tuned
from xcomp_jax.config import ConfigError, InternVideo2Config, LPCompConfig, MeshConfig, ModelConfig
from xcomp_jax.data import prompt
from xcomp_jax.inputs import NoFileError
from xcomp_jax.model import vlm
from xcomp_jax.model.vlm import VLM
from xcomp_jax.parallel.mesh import make_mesh, param_shardings

MODEL = ModelConfig(
  clip_frames=8,
  yarn="checkpoint",
  dtype="bfloat16",
  param_dtype="float32",
  clips_per_chunk=1,
  attention="auto",
  remat=False,
)
LP_COMP = LPCompConfig(schedule="cosine", keep="suffix", group=16)
# The official file (FACTS.md 11) of the 2B model: only what decides sizes.
CONFIG = {
  "hidden_act": "silu",
  "hidden_size": 1536,
  "intermediate_size": 8960,
  "mm_hidden_size": 1024,
  "mm_local_num_frames": 4,
  "mm_projector_type": "tome16_mlp_hd64",
  "mm_vision_select_layer": -2,
  "mm_vision_tower": "umt-hd-large",
  "num_attention_heads": 12,
  "num_hidden_layers": 28,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "use_sliding_window": False,
  "vocab_size": 151936,
}
SEVEN = {
  "hidden_size": 3584,
  "intermediate_size": 18944,
  "num_attention_heads": 28,
  "num_key_value_heads": 4,
  "tie_word_embeddings": False,
  "vocab_size": 152064,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
TINY = {
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_attention_heads": 3,
  "num_key_value_heads": 1,
  "vocab_size": 600,
  "num_hidden_layers": 2,
  "mm_hidden_size": 32,
  "tiny_vision": {
    "image_size": 64,
    "embed_dim": 32,
    "depth": 3,
    "heads": 2,
    "patch_size": 16,
    "mlp_ratio": 4.0,
  },
}
# Dimensions of the real 2B model -> of the tiny one; 600 rows are several blocks of reading and an
# uneven rest.
SHRINK = {151936: 600, 1536: 24, 256: 8, 8960: 40, 1024: 32, 3072: 96, 4096: 128}


def table(reference: pathlib.Path, model: str) -> dict[str, tuple[int, ...]]:
  """Official name -> shape."""
  lines = gzip.open(reference / f"params_{model}.tsv.gz", "rt").read().splitlines()
  return {
    name: tuple(ast.literal_eval(shape)) for name, shape, _ in (line.split("\t") for line in lines)
  }


def configured(directory: pathlib.Path, **changes) -> pathlib.Path:
  """A directory with a config.json; `...` as a value drops the key."""
  directory.mkdir(parents=True, exist_ok=True)
  config = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
  (directory / "config.json").write_text(json.dumps(config))
  return directory


def tiny_tensors(reference: pathlib.Path, dtype=np.float32, tied=True) -> dict[str, np.ndarray]:
  """Random tensors with the official names of a two-layer model, from the official list and not
  from our table.
  """
  rng = np.random.default_rng(0)
  tensors = {}
  for name, shape in table(reference, "2b_448").items():
    parts = name.split(".")
    number = next((int(p) for p in parts if p.isdigit()), 0)
    if number < 2 or "mm_projector" in name:
      tensors[name] = rng.normal(size=[SHRINK.get(n, n) for n in shape]).astype(dtype)
  if not tied:
    tensors["lm_head.weight"] = rng.normal(size=(600, 24)).astype(dtype)
  return tensors


def tiny(directory: pathlib.Path, tensors: dict[str, np.ndarray], **changes) -> pathlib.Path:
  """A torch directory with those tensors and a tokenizer file."""
  configured(
    directory, **(TINY | {"tie_word_embeddings": "lm_head.weight" not in tensors} | changes)
  )
  (directory / "vocab.json").write_text("{}")
  save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  return directory


def read_config(directory, **changes):
  return read_vlm_config(directory, dataclasses.replace(MODEL, **changes), LP_COMP)


def equal(a: dict, b: dict):
  """Same names, dtypes and bits."""
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


# Qwen2.5-7B-Instruct-1M
HIGH = {
  "rope_scaling": None,
  "max_position_embeddings": 1010000,
  "rope_theta": 1e7,
  "rms_norm_eps": 1e-5,
}
RELEASED = {  # variant -> official table, config.json beside CONFIG, image size
  "Qwen2_5-2B_res448": ("2b_448", {}, 448),
  "Qwen2-7B_res448": ("7b_448", SEVEN, 448),
  "Qwen2-7B_res224": ("7b_224", SEVEN | {"mm_vision_tower": "umt-large"}, 224),
  "Qwen2_5-7B-1M_res224": ("7b_224", SEVEN | HIGH | {"mm_vision_tower": "umt-large"}, 224),
  "Qwen2_5-7B_InternVideo2-1B": (
    "7b_internvideo2",
    SEVEN | {"mm_vision_tower": "internvideo2", "mm_hidden_size": 1408},
    224,
  ),
  "XComp": (
    "2b_448",
    {"tokenizer_model_max_length": 131072, "max_position_embeddings": 131072},
    448,
  ),
}


@pytest.mark.parametrize("variant", RELEASED)
def test_every_released_variant_maps_one_to_one_by_init_from_alone(reference, tmp_path, variant):
  official, changes, size = RELEASED[variant]
  cfg = read_config(configured(tmp_path, **changes), clip_frames="auto")
  entries = tensor_names.names(cfg)
  assert len({e.name for e in entries}) == len({e.path for e in entries}) == len(entries)
  assert {e.name: e.shape for e in entries} == table(reference, official)
  leaves = loading.parameters(loading.abstract(cfg))
  assert {e.path: e.ours for e in entries} == {path: leaf.shape for path, leaf in leaves.items()}
  shown = families(entries)  # counts, and one entry for all layers
  assert (
    sum(count for count, _ in shown) == len(entries)
    and len({e.name for _, e in shown}) == len(shown) < 50
  )
  assert (cfg.llm.layers, "llm/layers/*/q/kernel") in [(count, e.path) for count, e in shown]
  assert cfg.vision.image_size == size
  assert cfg.clip_frames == (4 if "InternVideo2" in variant else 8)
  frames = jax.ShapeDtypeStruct((2, cfg.clip_frames, size, size, 3), np.uint8)
  features = jax.eval_shape(vlm.encode_frames, loading.abstract(cfg), frames)
  assert features.shape == (2, cfg.clip_tokens, changes.get("mm_hidden_size", 1024))
  text = jax.ShapeDtypeStruct((1, 16), np.int32)
  placed = jax.eval_shape(
    lambda m, f, t: vlm.place_tokens(m, f[None], t, t), loading.abstract(cfg), features, text
  )
  assert placed.shape == (1, 32 + 2 * cfg.clip_tokens, cfg.llm.width)
  known = pathlib.Path(__file__).parents[2] / "configs/OpenGVLab" / f"VideoChat-Flash-{variant}"
  if variant != "XComp":  # the sizes that `plan` has without a network
    alike = read_config(known, clip_frames="auto")

    def like(cfg):
      return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, context=None))

    assert like(alike) == like(cfg)


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
  with pytest.raises(
    ConfigError,
    match=r"has positions for clips of 4 frames, not of 8: set model\.clip_frames to 4 or auto",
  ):
    read_config(configured(tmp_path, **changes), clip_frames=wanted)


def test_abstract_model_is_the_model(reference, tmp_path):
  cfg = read_config(configured(tmp_path, **TINY))
  graph, state = nnx.split(nnx.eval_shape(lambda: VLM(cfg, rngs=nnx.Rngs(0))))
  assert nnx.split(loading.abstract(cfg))[0] == graph

  def like(s):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in loading.parameters(s).items()}

  assert like(loading.abstract(cfg)) == like(state)


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


def test_quirk_q1_clip_length_of_config_json_only_on_request(tmp_path, capsys):
  directory = configured(tmp_path)
  assert read_config(directory).clip_frames == 8
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "clips of 8 frames, not the 4" in said
  assert read_config(directory, clip_frames="checkpoint").clip_frames == 4
  assert read_config(directory, clip_frames=4).clip_frames == 4
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"rope_theta": ..., "vocab_size": ...}, r"config\.json lacks vocab_size, rope_theta"),
    (
      {"rope_scaling": {"type": "linear", "factor": 2.0}},
      "rope_scaling: type 'linear' is not supported; yarn is",
    ),
    ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn': must be an object"),
    (
      {"rope_scaling": {"type": "yarn", "factor": 4.0}},
      "rope_scaling lacks original_max_position_embeddings",
    ),
    (
      {"rope_scaling": YARN | {"factor": 0.5}},
      r"rope_scaling: factor = 0\.5: must be at least 1",
    ),
    ({"rope_scaling": YARN | {"mscale": 0.7}}, "rope_scaling: mscale of YaRN not supported"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type = 'mlp2x_gelu' is not supported"),
    ({"mm_vision_tower": "siglip"}, "mm_vision_tower 'siglip'"),
    ({"mm_hidden_size": 1152}, "mm_hidden_size is 1152"),
    ({"tiny_vision": {"depth": 3}}, "tiny_vision lacks image_size"),
    ({"tiny_vision": 5}, "tiny_vision = 5: must be an object"),
    (
      {"tiny_vision": TINY["tiny_vision"] | {"heads": 0}},
      "tiny_vision: heads = 0: must be an integer from 1 to 1,000,000",
    ),
    ({"hidden_size": "96"}, "hidden_size = '96': must be an integer from 1"),
    (
      {"hidden_size": None, "rope_theta": True},
      "hidden_size = None: must be .*; rope_theta = True: must be a number above 0",
    ),
    ({"num_attention_heads": 0}, "num_attention_heads = 0: must be an integer from 1"),
    ({"mm_vision_tower": None}, "mm_vision_tower = None: must be text"),
    ({"mm_vision_select_layer": None}, "mm_vision_select_layer = None: must be an integer"),
    (
      {"mm_local_num_frames": "x"},
      "mm_local_num_frames = 'x': must be an integer from 1 to 1,000",
    ),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': must be true or false"),
    ({"head_dim": "128"}, "head_dim = '128'"),
    ({"num_attention_heads": 11}, "num_attention_heads does not divide"),
    ({"mm_vision_select_layer": 2}, "mm_vision_select_layer"),
  ],
)
def test_config_that_cannot_be_used(tmp_path, changes, message):
  with pytest.raises(CheckpointError, match=message):
    read_config(configured(tmp_path, **changes))


def test_no_or_broken_config_json(tmp_path):
  with pytest.raises(CheckpointError, match=r"has no config\.json"):
    read_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(CheckpointError, match=r"config\.json is no JSON"):
    read_config(tmp_path)
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(CheckpointError, match="does not hold a JSON object"):
    read_config(tmp_path)
  (tmp_path / "xcomp.json").write_text('{"lp_comp": 3}')
  with pytest.raises(ConfigError, match=r"xcomp\.json\.lp_comp must be a group of keys, not 3"):
    read_tuned(tmp_path)


def test_a_run_is_told_to_be_exported_first(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"seed": 0, "workdir": "w", "init_from": "i"}))
  with pytest.raises(
    CheckpointError,
    match=r"is a run; export it first: python -m xcomp_jax\.export --checkpoint /",
  ):
    read_config(tmp_path)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(reference, tmp_path):
  own = prompt.load_tokenizer(reference / "qwen_subset").vocab_size

  def cfg(size):
    return read_config(configured(tmp_path, vocab_size=size))

  assert loading.read_tokenizer(reference / "qwen_subset", cfg(own)).vocab_size == own
  with pytest.raises(
    CheckpointError,
    match=rf"ids go up to {own - 1}, but the embedding table has only {own - 1} rows",
  ):
    loading.read_tokenizer(reference / "qwen_subset", cfg(own - 1))


def test_every_tensor_arrives_in_its_place(reference, tmp_path):
  tensors = tiny_tensors(reference, tied=False)
  directory = tiny(tmp_path, tensors)
  model = loading.load_model(directory, read_config(directory))

  def value(v):
    return np.asarray(v[...])

  name = "model.layers.1.self_attn.k_proj"
  np.testing.assert_array_equal(value(model.llm.layers[1].k.kernel), tensors[f"{name}.weight"].T)
  np.testing.assert_array_equal(value(model.llm.layers[1].k.bias), tensors[f"{name}.bias"])
  np.testing.assert_array_equal(
    value(model.llm.embed.embedding), tensors["model.embed_tokens.weight"]
  )
  np.testing.assert_array_equal(value(model.llm.lm_head.kernel), tensors["lm_head.weight"].T)
  encoder = "model.vision_tower.vision_tower.encoder"
  patch = tensors[f"{encoder}.patch_embed.proj.weight"]
  row, column, rgb = 3, 11, 2
  np.testing.assert_array_equal(
    value(model.vision.patch_embed.kernel)[(row * 16 + column) * 3 + rgb],
    patch[:, rgb, 0, row, column],
  )
  np.testing.assert_array_equal(
    value(model.vision.blocks[1].attn.qkv.kernel),
    tensors[f"{encoder}.blocks.1.attn.qkv.weight"].T,
  )
  np.testing.assert_array_equal(
    value(model.vision.norm.scale), tensors[f"{encoder}.vision_layernorm.weight"]
  )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact(reference, tmp_path, dtype, tied):
  tensors = tiny_tensors(reference, dtype, tied)
  source = tiny(tmp_path / "in", tensors)
  cfg = read_config(source)
  model = loading.load_model(source, cfg, dtype="float32")  # as masters of a training run
  assert {leaf.dtype for leaf in loading.parameters(model).values()} == {np.dtype(np.float32)}
  saving.save_torch(tmp_path / "out", model, cfg, source)
  equal(load_file(tmp_path / "out" / "model.safetensors"), tensors)
  with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as f:
    assert f.metadata() == {"format": "pt"}
  assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
    ".export.json",
    "config.json",
    "model.safetensors",
    "vocab.json",
    "xcomp.json",
  ]
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config == json.loads((source / "config.json").read_text()) | {"mm_local_num_frames": 8}
  assert read_tuned(tmp_path / "out").lp_comp == LP_COMP
  assert read_tuned(source) is None


def test_round_trip_through_several_files(reference, tmp_path):
  tensors = tiny_tensors(reference, ml_dtypes.bfloat16)
  source = tiny(tmp_path / "in", tensors)
  cfg = read_config(source)
  saving.save_torch(
    tmp_path / "out", loading.load_model(source, cfg), cfg, source, shard_bytes=50_000
  )
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
  assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
  both = {}
  for file in files:
    part = load_file(file)
    assert all(index["weight_map"][name] == file.name for name in part)
    both |= part
  equal(both, tensors)
  again = loading.load_model(tmp_path / "out", cfg)
  equal(loading.parameters(again), loading.parameters(loading.load_model(source, cfg)))

  files[1].unlink()
  with pytest.raises(CheckpointError, match=rf"names {files[1].name}, which is not there"):
    loading.load_model(tmp_path / "out", cfg)
  (tmp_path / "out" / tensor_files.INDEX).write_text('{"weight_map": 3}')
  with pytest.raises(
    CheckpointError,
    match=r"index\.json: weight_map must be an object of tensor names and file names",
  ):
    loading.load_model(tmp_path / "out", cfg)


def test_dtype_of_a_saved_directory_can_be_chosen(reference, tmp_path):
  source = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(source)
  saving.save_torch(
    tmp_path / "out", loading.load_model(source, cfg), cfg, source, dtype="bfloat16"
  )
  assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {
    np.dtype(ml_dtypes.bfloat16)
  }
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", ["torch", "orbax"])
def test_load_into_shardings_and_dtypes(reference, tmp_path, layout):
  tensors = tiny_tensors(reference, tied=False)
  directory = tiny(tmp_path / "in", tensors)
  cfg = read_config(directory)
  whole = loading.load_model(directory, cfg)
  if layout == "orbax":
    saving.save_orbax(tmp_path / "out", whole, cfg, directory)
    directory = tmp_path / "out"
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, context=1))
  shardings = param_shardings(nnx.state(whole), mesh)

  def dtype(path):
    return jnp.bfloat16 if path.startswith("vision/") else jnp.float32

  split = loading.load_model(directory, cfg, shardings=shardings, dtype=dtype)
  assert split.llm.layers[0].gate.kernel[...].sharding.spec == PartitionSpec("fsdp", "tensor")
  assert split.llm.layers[0].gate.kernel[...].addressable_shards[0].data.shape == (12, 20)
  one, many = loading.parameters(whole), loading.parameters(split)
  placed = loading.parameters(shardings)
  for path, leaf in many.items():
    assert leaf.sharding == placed[path], path
    assert leaf.dtype == dtype(path), path
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(one[path].astype(leaf.dtype)), path)


def test_orbax_export_is_read_by_init_from_and_by_plain_orbax(reference, tmp_path):
  import orbax.checkpoint as ocp

  source = tiny(tmp_path / "in", tiny_tensors(reference, ml_dtypes.bfloat16))
  cfg = read_config(source)
  model = loading.load_model(source, cfg, dtype="float32")
  saving.save_orbax(tmp_path / "out", model, cfg, source)
  assert read_config(tmp_path / "out") == cfg and read_tuned(tmp_path / "out").lp_comp == LP_COMP
  equal(
    loading.parameters(loading.load_model(tmp_path / "out", cfg)),
    loading.parameters(loading.load_model(source, cfg)),
  )
  with ocp.StandardCheckpointer() as reader:
    plain = reader.restore(tmp_path / "out" / "params")
  assert plain["llm"]["layers"]["1"]["o"]["kernel"].dtype == jnp.bfloat16
  saving.save_torch(
    tmp_path / "back", loading.load_model(tmp_path / "out", cfg), cfg, tmp_path / "out"
  )
  equal(load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors"))


def test_tied_head_and_rotary_buffers_are_accepted(reference, tmp_path):
  tensors = tiny_tensors(reference)
  extra = {
    "lm_head.weight": tensors["model.embed_tokens.weight"],
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
  }
  directory = tiny(tmp_path, tensors | extra, tie_word_embeddings=True)
  assert "llm/lm_head/kernel" not in loading.parameters(
    loading.load_model(directory, read_config(directory))
  )


def test_all_differences_are_in_one_error(reference, tmp_path):
  tensors = tiny_tensors(reference)
  del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
  tensors["model.condenser.weight"] = np.ones(3, np.float32)
  tensors["model.mm_projector.mlp.0.weight"] = tensors["model.mm_projector.mlp.0.weight"].T.copy()
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(24, np.int32)
  directory = tiny(tmp_path, tensors)
  with pytest.raises(CheckpointError) as raised:
    loading.load_model(directory, read_config(directory))
  lines = str(raised.value).splitlines()
  assert lines[1:] == [
    "  2 missing: model.layers.1.mlp.up_proj.weight; model.norm.weight",
    "  1 unexpected: model.condenser.weight",
    "  1 of another shape: model.mm_projector.mlp.0.weight is [32, 24], must be [24, 32]",
    "  1 unreadable: model.layers.0.self_attn.q_proj.bias is I32, not one of BF16, F16, F32",
  ]


def test_orbax_export_of_another_model(reference, tmp_path):
  source = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(source)
  saving.save_orbax(tmp_path / "out", loading.load_model(source, cfg), cfg, source)
  other = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, tied=False, mlp_width=48))
  with pytest.raises(
    CheckpointError,
    match=(
      r"1 missing: llm/lm_head/kernel\n.*6 of another shape: llm/layers/0/gate/kernel is "
      r"\[24, 40\]"
    ),
  ):
    loading.load_model(tmp_path / "out", other)
  for file in (tmp_path / "out" / "params").iterdir():
    if file.is_file():
      file.unlink()
  with pytest.raises(CheckpointError, match="params has no _METADATA"):
    loading.load_model(tmp_path / "out", cfg)


def test_truncated_empty_and_absent_files(reference, tmp_path):
  directory = tiny(tmp_path, tiny_tensors(reference))
  cfg = read_config(directory)
  file = directory / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(
    CheckpointError, match=r"model\.safetensors is no safetensors file, or cut short"
  ):
    loading.load_model(directory, cfg)
  file.write_bytes(b"")
  with pytest.raises(
    CheckpointError, match=r"model\.safetensors is no safetensors file, or cut short"
  ):
    loading.load_model(directory, cfg)
  file.unlink()
  with pytest.raises(CheckpointError, match=r"has neither \*\.safetensors nor params/"):
    loading.load_model(directory, cfg)


@pytest.mark.parametrize("save", [saving.save_torch, saving.save_orbax])
def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
  reference, tmp_path, monkeypatch, save
):
  source = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(source)
  model = loading.load_model(source, cfg)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
  with pytest.raises(
    CheckpointError, match=r"out can't be written: it takes 0\.\d MB, and 0\.0 MB are free there"
  ):
    save(tmp_path / "out", model, cfg, source)
  assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_saving_is_all_or_nothing(reference, tmp_path, monkeypatch):
  source = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(source)
  model = loading.load_model(source, cfg)
  out = tmp_path / "out"
  saving.save_torch(out, model, cfg, source)
  with pytest.raises(CheckpointError, match="out is not empty"):
    saving.save_torch(out, model, cfg, source)
  with pytest.raises(CheckpointError, match="out is not empty"):
    saving.save_orbax(out, model, cfg, source)
  saving.save_orbax(out, model, cfg, source, overwrite=True)
  assert not (out / "model.safetensors").exists()

  def full_disk(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(saving, "write_safetensors", full_disk)
  with pytest.raises(CheckpointError, match=r"other can't be written: .*No space left"):
    saving.save_torch(tmp_path / "other", model, cfg, source)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
  (tmp_path / "in" / "config.json").unlink()
  with pytest.raises(CheckpointError, match="in is not empty and no export"):
    saving.check_free(tmp_path / "in", overwrite=True)
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="file is a file"):
    saving.save_torch(tmp_path / "file", model, cfg, source)
  with pytest.raises(CheckpointError, match="can't be written"):
    saving.save_torch(tmp_path / "file" / "below", model, cfg, source)


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """An empty hub cache, and no network."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return tmp_path / "hub"


def test_hub_id_from_the_local_cache(reference, tmp_path, hub):
  commit = "0123456789abcdef0123456789abcdef01234567"
  repo = hub / "models--org--name"
  snapshot = tiny(repo / "snapshots" / commit, tiny_tensors(reference))
  (repo / "refs").mkdir()
  (repo / "refs" / "main").write_text(commit)
  found = resolve("org/name")
  assert found == snapshot
  loading.load_model(found, read_config(found))
  (snapshot / "model.safetensors").unlink()  # a download that broke off
  with pytest.raises(
    CheckpointError,
    match=r"org/name, and as a hub id it can't be fetched: .*only a part of it is there",
  ):
    resolve("org/name")


def test_init_from_that_is_nowhere(tmp_path, hub):
  with pytest.raises(
    CheckpointError, match=r"there is no directory org/other, and as a hub id it can't be fetched"
  ):
    resolve("org/other")
  with pytest.raises(CheckpointError, match=r"there is no directory .*absent$"):
    resolve(str(tmp_path / "absent"))
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="is a file; give the directory"):
    resolve(str(tmp_path / "file"))
  assert resolve(str(tmp_path)) == tmp_path


def test_loaded_parameters_can_be_donated(reference, tmp_path):
  """Loading on CPU takes over host memory; a donated update must not disturb it."""
  directory = tiny(tmp_path, tensors := tiny_tensors(reference))
  state = nnx.state(loading.load_model(directory, read_config(directory)))
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  after = loading.parameters(step(step(state)))
  np.testing.assert_array_equal(
    np.asarray(after["llm/embed/embedding"]), tensors["model.embed_tokens.weight"] + 1 + 1
  )


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
  "rename",
  [
    lambda name: f"module.{name}",
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module.base_model.model.{name}",
    lambda name: f"model.{name}",  # "model.model.norm.weight", but also "model.lm_head.weight"
    lambda name: name.replace("model.layers.", "model.layers._orig_mod.").replace(
      ".mlp.gate", ".mlp._fsdp_wrapped_module.gate"
    ),
  ],
  ids=["module", "compile", "peft", "doubled", "within"],
)
def test_prefixes_of_training_frameworks_are_named_and_the_python_of_the_message_takes_them_off(
  reference, tmp_path, rename
):
  tensors = tiny_tensors(reference, ml_dtypes.bfloat16, tied=False)
  directory = tiny(
    tmp_path, {rename(name): t for name, t in tensors.items()}, tie_word_embeddings=False
  )
  cfg = read_config(directory)
  with pytest.raises(CheckpointError) as raised:
    loading.load_model(directory, cfg)
  said, python = str(raised.value).split(" This Python takes it off, in the files themselves:\n")
  changed = [name for name in tensors if rename(name) != name]
  assert (
    "a training framework has added " in said
    and f"to the names of {len(changed)} of {len(tensors)} tensors" in said
  )
  index = directory / "model.safetensors.index.json"
  index.write_text(
    json.dumps({"weight_map": {rename(name): "model.safetensors" for name in tensors}})
  )
  exec(python, {})
  equal(load_file(directory / "model.safetensors"), tensors)
  assert json.loads(index.read_text()) == {
    "weight_map": dict.fromkeys(tensors, "model.safetensors")
  }
  loading.load_model(directory, cfg)


def test_lora_adapters_are_to_be_merged_first(reference, tmp_path):
  tensors = tiny_tensors(reference) | {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 24), np.float32)
  }
  directory = tiny(tmp_path / "both", tensors)
  with pytest.raises(
    CheckpointError,
    match=r"both holds LoRA adapters \(.*q_proj\.lora_A\.weight\).*: merge them first",
  ):
    loading.load_model(directory, read_config(directory))
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(CheckpointError, match=r"holds LoRA adapters \(adapter_config\.json\)"):
    read_config(tmp_path)


@pytest.mark.parametrize(
  "changes",
  [
    {"num_hidden_layers": 10**6},
    {"hidden_size": 1e30},
    {"vocab_size": 10**10},
    {"rope_theta": 10**400},
    {"rms_norm_eps": 1e300},
    {"max_position_embeddings": 10**12},
    {"mm_local_num_frames": 8 * 10**9},
    {"mm_vision_select_layer": -(10**9)},
    {"rope_scaling": YARN | {"original_max_position_embeddings": 10**12}},
    *(
      {"tiny_vision": TINY["tiny_vision"] | wrong}
      for wrong in (
        {"image_size": 10**5},
        {"depth": 10**8},
        {"mlp_ratio": 1e30},
        {"patch_size": 65},
        {"patch_size": 1, "image_size": 4096},
        {"heads": True},
      )
    ),
  ],
)
def test_numbers_of_config_json_have_bounds(tmp_path, changes):
  with pytest.raises(CheckpointError, match=r"config\.json.*(must be|no JSON|more than 65,536)"):
    read_config(configured(tmp_path, **(TINY | changes)))


@pytest.mark.parametrize(
  "changes",
  [
    {"clip_frames": 0},
    {"clip_frames": 10**9},
    {"image_size": -1},
    {"context": 10**12},
    {"lp_comp": {"schedule": "cosine", "keep": "suffix", "group": 0}},
  ],
)
def test_numbers_of_xcomp_json_have_bounds(tmp_path, changes):
  (tmp_path / "xcomp.json").write_text(
    json.dumps({"lp_comp": {"schedule": "cosine", "keep": "suffix", "group": 16}} | changes)
  )
  with pytest.raises(CheckpointError, match=r"xcomp\.json: .* must be an integer from 1 to "):
    read_tuned(tmp_path)


def test_a_model_of_a_thousand_layers_is_refused_by_its_files_before_it_is_made(
  reference, tmp_path, monkeypatch
):
  directory = tiny(tmp_path, tiny_tensors(reference), num_hidden_layers=1000)
  cfg = read_config(directory)
  monkeypatch.setattr(loading, "abstract", None)
  with pytest.raises(CheckpointError, match=r"\d+ missing: .*; and \d+ more"):
    loading.load_model(directory, cfg)


@pytest.mark.parametrize(
  "name", ["../a.safetensors", "/etc/passwd", "b/a.safetensors", "..", "", "a\0b", 5, None, ["a"]]
)
def test_an_index_names_only_files_beside_it(reference, tmp_path, name):
  directory = tiny(tmp_path / "in", tiny_tensors(reference))
  (directory / "model.safetensors").rename(tmp_path / "a.safetensors")
  (directory / tensor_files.INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
  with pytest.raises(
    CheckpointError, match=r"index\.json: weight_map must name files of its own folder, not "
  ):
    loading.load_model(directory, read_config(directory))


def test_links_in_a_checkpoint_are_followed_as_in_the_cache_of_the_hub(reference, tmp_path):
  directory = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(directory)
  saving.save_orbax(tmp_path / "orbax", loading.load_model(directory, cfg), cfg, directory)
  blobs = tmp_path / "blobs"
  blobs.mkdir()
  for folder in ("in", "orbax"):
    for i, file in enumerate(
      file for file in sorted((tmp_path / folder).rglob("*")) if file.is_file()
    ):
      file.symlink_to(file.rename(blobs / f"{folder}{i}"))
    equal(
      loading.parameters(loading.load_model(tmp_path / folder, read_config(tmp_path / folder))),
      loading.parameters(loading.load_model(tmp_path / "orbax", cfg)),
    )


@pytest.mark.parametrize(
  "file", ["config.json", "model.safetensors", tensor_files.INDEX, "xcomp.json"]
)
def test_pipes_and_devices_in_a_checkpoint_are_never_opened(reference, tmp_path, file):
  directory = tiny(tmp_path, tiny_tensors(reference))
  cfg = read_config(directory)
  for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
    (directory / file).unlink(missing_ok=True)
    make(directory / file)
    with pytest.raises(
      (CheckpointError, OSError), match=f"{file} is a (pipe|device), and must be a file"
    ):
      loading.load_model(
        directory, cfg if file != "config.json" else read_config(directory)
      ) if file != "xcomp.json" else read_tuned(directory)


def deep(file):
  file.write_text("[" * 100_000)


ORBAX = {
  "no description": lambda d: (d / "_METADATA").unlink(),
  "a deep description": lambda d: deep(d / "_METADATA"),
  "a deep sharding": lambda d: deep(d / "_sharding"),
  "a deep list of arrays": lambda d: deep(next((d / "array_metadatas").iterdir())),
  "a description of another kind": (
    lambda d: (d / "_METADATA").write_text(
      (d / "_METADATA").read_text().replace("jax.Array", "string")
    )
  ),
  "names that leave the folder": (
    lambda d: (d / "_METADATA").write_text(
      (d / "_METADATA").read_text().replace('"key": "llm"', '"key": "../../llm"')
    )
  ),
  "a pipe": lambda d: ((d / "manifest.ocdbt").unlink(), os.mkfifo(d / "manifest.ocdbt")),
  "no manifest": lambda d: (d / "manifest.ocdbt").unlink(),
  "half of all arrays": lambda d: [
    f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]) for f in d.rglob("d/*")
  ],
  "noise for arrays": lambda d: [
    f.write_bytes(np.random.default_rng(0).bytes(f.stat().st_size))
    for f in d.glob("ocdbt.process_0/d/*")
  ],
  "no arrays": lambda d: [f.unlink() for f in d.glob("ocdbt.process_0/d/*")],
}


@pytest.fixture(scope="module")
def orbax(reference, tmp_path_factory):
  """An Orbax export."""
  root = tmp_path_factory.mktemp("orbax")
  directory = tiny(root / "in", tiny_tensors(reference))
  cfg = read_config(directory)
  saving.save_orbax(root / "out", loading.load_model(directory, cfg), cfg, directory)
  return root / "out", cfg


@pytest.mark.parametrize("damage", ORBAX)
def test_a_damaged_orbax_export_is_one_error_with_its_name(orbax, tmp_path, damage):
  shutil.copytree(orbax[0], tmp_path / "x")
  ORBAX[damage](tmp_path / "x" / "params")
  with pytest.raises((CheckpointError, NoFileError)) as raised:
    loading.load_model(tmp_path / "x", orbax[1])
  first = str(raised.value).splitlines()[0]
  assert first.startswith(f"{tmp_path}/x/params") and len(first) < 1000


def test_arrays_that_can_not_be_in_so_few_bytes_are_refused_before_memory_is_asked_for(orbax):
  directory, cfg = orbax
  entries = tensor_names.names(cfg)
  with pytest.raises(CheckpointError) as caught:
    orbax_files.orbax_dtypes(directory, entries, packed=0.1)
  fields = caught.value.fields
  assert fields["where"] == directory / "params"
  assert fields["value"] == sum(4 * math.prod(e.ours) for e in entries) > fields["allowed"] > 0


def test_a_path_and_the_default_device_are_obeyed(reference, tmp_path):
  directory = resolve(tiny(tmp_path, tiny_tensors(reference)))
  with jax.default_device(jax.devices()[3]):
    leaf = next(
      iter(loading.parameters(loading.load_model(directory, read_config(directory))).values())
    )
  assert leaf.devices() == {jax.devices()[3]}
