"""Loading and saving, and what a broken checkpoint is told."""

import dataclasses
import json
import math
import os
import resource
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
from safetensors.numpy import load_file
from tiny_checkpoints import LP_COMP, TINY, configured, equal, read_config, tiny, tiny_tensors

from xcomp_jax.checkpoints import loading, orbax_files, saving, tensor_files, tensor_names
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.checkpoints.tuned import read_tuned
from xcomp_jax.config import MeshConfig
from xcomp_jax.data import prompt
from xcomp_jax.inputs import NoFileError
from xcomp_jax.model.vlm import VLM
from xcomp_jax.parallel.mesh import make_mesh, param_shardings


def test_abstract_model_is_the_model(reference, tmp_path):
  cfg = read_config(configured(tmp_path, **TINY))
  graph, state = nnx.split(nnx.eval_shape(lambda: VLM(cfg, rngs=nnx.Rngs(0))))
  assert nnx.split(loading.abstract(cfg))[0] == graph

  def like(s):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in loading.parameters(s).items()}

  assert like(loading.abstract(cfg)) == like(state)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(reference, tmp_path):
  own = prompt.load_tokenizer(reference / "qwen_subset").vocab_size

  def cfg(size):
    return read_config(configured(tmp_path, vocab_size=size))

  assert loading.read_tokenizer(reference / "qwen_subset", cfg(own)).vocab_size == own
  with pytest.raises(CheckpointError) as caught:
    loading.read_tokenizer(reference / "qwen_subset", cfg(own - 1))
  assert caught.value.fields == {
    "where": reference / "qwen_subset",
    "value": own,
    "allowed": own - 1,
  }


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
  index = tmp_path / "out" / tensor_files.INDEX
  with pytest.raises(CheckpointError) as caught:
    loading.load_model(tmp_path / "out", cfg)
  assert caught.value.fields == {"where": index, "missing": [files[1].name]}
  index.write_text('{"weight_map": 3}')
  with pytest.raises(CheckpointError) as caught:
    loading.load_model(tmp_path / "out", cfg)
  assert caught.value.fields == {"where": index, "value": 3}


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
    "  2 missing: model.layers.1.mlp.up_proj.weight;",
    "    model.norm.weight",
    "  1 unexpected: model.condenser.weight",
    "  1 of another shape: model.mm_projector.mlp.0.weight is [32, 24], must be [24, 32]",
    "  1 unreadable: model.layers.0.self_attn.q_proj.bias is I32, not one of BF16, F16, F32",
  ]


def test_orbax_export_of_another_model(reference, tmp_path):
  source = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(source)
  saving.save_orbax(tmp_path / "out", loading.load_model(source, cfg), cfg, source)
  other = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, tied=False, mlp_width=48))
  with pytest.raises(CheckpointError) as caught:
    loading.load_model(tmp_path / "out", other)
  fields = caught.value.fields
  assert fields["where"] == tmp_path / "out" / "params"
  assert fields["missing"] == ["llm/lm_head/kernel"] and fields["unexpected"] == []
  assert len(fields["misshapen"]) == 6
  assert fields["misshapen"][0] == "llm/layers/0/gate/kernel is [24, 40], must be [24, 48]"
  for file in (tmp_path / "out" / "params").iterdir():
    if file.is_file():
      file.unlink()
  with pytest.raises(CheckpointError) as caught:
    loading.load_model(tmp_path / "out", cfg)
  assert caught.value.fields == {"where": tmp_path / "out" / "params", "missing": "_METADATA"}


def test_truncated_empty_and_absent_files(reference, tmp_path):
  directory = tiny(tmp_path, tiny_tensors(reference))
  cfg = read_config(directory)
  file = directory / "model.safetensors"
  for content in (file.read_bytes()[:-10], b""):
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
      loading.load_model(directory, cfg)
    assert caught.value.fields["where"] == file
    assert caught.value.fields["expected"] == "safetensors file, or cut short"
  file.unlink()
  with pytest.raises(CheckpointError) as caught:
    loading.load_model(directory, cfg)
  assert caught.value.fields == {
    "where": directory,
    "missing": ["*.safetensors", "params/"],
  }


@pytest.mark.parametrize("save", [saving.save_torch, saving.save_orbax])
def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
  reference, tmp_path, monkeypatch, save
):
  source = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(source)
  model = loading.load_model(source, cfg)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
  with pytest.raises(CheckpointError) as caught:
    save(tmp_path / "out", model, cfg, source)
  size = sum(leaf.nbytes for leaf in loading.parameters(model).values())
  assert caught.value.fields == {
    "where": tmp_path / "out",
    "found": f"it takes {size / 1e6:,.1f} MB, and 0.0 MB are free there",
  }
  assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_saving_is_all_or_nothing(reference, tmp_path):
  source = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(source)
  model = loading.load_model(source, cfg)
  out = tmp_path / "out"
  saving.save_torch(out, model, cfg, source)
  for save in (saving.save_torch, saving.save_orbax):
    with pytest.raises(CheckpointError) as caught:
      save(out, model, cfg, source)
    assert caught.value.fields == {"where": out, "missing": "overwrite"}
  saving.save_orbax(out, model, cfg, source, overwrite=True)
  assert not (out / "model.safetensors").exists()
  with pytest.raises(CheckpointError) as caught, saving.appearing(tmp_path / "other", False):
    raise OSError(28, "No space left on device")
  assert caught.value.fields["where"] == tmp_path / "other"
  assert "No space left" in caught.value.fields["found"]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
  (tmp_path / "in" / "config.json").unlink()
  with pytest.raises(CheckpointError) as caught:
    saving.check_free(tmp_path / "in", overwrite=True)
  assert caught.value.fields == {"where": tmp_path / "in", "missing": tensor_files.EXPORTED}
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError) as caught:
    saving.save_torch(tmp_path / "file", model, cfg, source, dtype="float32")
  assert caught.value.fields == {"where": tmp_path / "file", "found": "a file"}
  with pytest.raises(CheckpointError) as caught:
    saving.save_torch(tmp_path / "file" / "below", model, cfg, source, dtype="float32")
  assert caught.value.fields["where"] == tmp_path / "file" / "below"


def test_a_writer_that_fails_leaves_nothing(reference, tmp_path):
  source = tiny(tmp_path / "in", tiny_tensors(reference))
  cfg = read_config(source)
  model = loading.load_model(source, cfg)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
  try:
    with pytest.raises(CheckpointError) as caught:
      saving.save_torch(tmp_path / "other", model, cfg, source)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert caught.value.fields["where"] == tmp_path / "other"
  assert "File too large" in caught.value.fields["found"]
  assert [path.name for path in tmp_path.iterdir()] == ["in"]


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
  with pytest.raises(CheckpointError) as caught:
    loading.load_model(directory, read_config(directory))
  assert caught.value.fields == {
    "where": directory,
    "adapters": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
  }
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(CheckpointError) as caught:
    read_config(tmp_path)
  assert caught.value.fields == {"where": tmp_path, "adapters": "adapter_config.json"}


def test_a_model_of_a_thousand_layers_is_refused_by_its_files_before_it_is_made(
  reference, tmp_path
):
  directory = tiny(tmp_path, tiny_tensors(reference), num_hidden_layers=1000)
  cfg = read_config(directory)
  # of no attention that it names could a model be made
  cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, kv_heads=0))
  with pytest.raises(Exception) as made:
    loading.abstract(dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=1)))
  assert not isinstance(made.value, CheckpointError)
  with pytest.raises(CheckpointError) as caught:
    loading.load_model(directory, cfg)
  assert len(caught.value.fields["missing"]) == 12 * 998
  assert f"{12 * 998} missing: " in str(caught.value) and "; and 11876 more" in str(caught.value)


@pytest.mark.parametrize(
  "name", ["../a.safetensors", "/etc/passwd", "b/a.safetensors", "..", "", "a\0b", 5, None, ["a"]]
)
def test_an_index_names_only_files_beside_it(reference, tmp_path, name):
  directory = tiny(tmp_path / "in", tiny_tensors(reference))
  (directory / "model.safetensors").rename(tmp_path / "a.safetensors")
  (directory / tensor_files.INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
  with pytest.raises(CheckpointError) as caught:
    loading.load_model(directory, read_config(directory))
  assert caught.value.fields == {"where": directory / tensor_files.INDEX, "value": name}


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
  for make, kind in (
    (os.mkfifo, "a pipe"),
    (lambda path: path.symlink_to("/dev/zero"), "a device"),
  ):
    (directory / file).unlink(missing_ok=True)
    make(directory / file)
    with pytest.raises(NoFileError) as caught:
      if file == "xcomp.json":
        read_tuned(directory)
      else:
        loading.load_model(directory, read_config(directory) if file == "config.json" else cfg)
    fields = caught.value.fields
    assert (fields["where"], fields["found"]) == (directory / file, kind)
    assert fields["allowed"] == ("a file",)


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


@pytest.mark.pure
def test_shards_come_in_the_order_of_their_names(tmp_path):
  names = [f"model-{i:05}-of-00032.safetensors" for i in range(1, 33)]
  places = {f"tensor {i}": name for i, name in enumerate(reversed(names))}
  (tmp_path / tensor_files.INDEX).write_text(json.dumps({"weight_map": places}))
  assert [file.name for file in tensor_files.shards(tmp_path)] == names
