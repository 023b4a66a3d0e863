"""The InternVideo2 tower (its numbers against the official code are in test_parity.py), and a model
with it from end to end.
"""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from xcomp_jax import ask, evaluate, export, predecode
from xcomp_jax.checkpoints import loading, saving, tensor_files, tensor_names
from xcomp_jax.checkpoints.config_json import yarn_of
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.config import ConfigError, InternVideo2Config, MeshConfig, VLMConfig, Yarn
from xcomp_jax.config_io import from_command_line, from_dict, to_dict
from xcomp_jax.data import predecoding, store
from xcomp_jax.model import vlm
from xcomp_jax.model.internvideo2 import InternVideo2
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.model.vlm import VLM
from xcomp_jax.parallel.mesh import constrain, make_mesh, param_shardings, path_name
from xcomp_jax.parity.tower import tower_sizes
from xcomp_jax.synthetic import world
from xcomp_jax.training import loop

SIZES = InternVideo2Config(
  image_size=70, patch_size=14, width=32, layers=2, heads=4, mlp_width=64, frames=4
)


def clips(n, frames=4, size=70):
  return jnp.asarray(
    np.random.default_rng(0).integers(0, 256, (n, frames, size, size, 3)).astype(np.uint8)
  )


@pytest.fixture(scope="module")
def cfg(tiny):
  """A whole model with such a tower."""
  return tiny(vision=SIZES, clip_frames=4)


def test_sizes_are_read_back_as_those_of_their_tower(tiny, cfg):
  stretched = dataclasses.replace(
    cfg,
    llm=dataclasses.replace(
      cfg.llm,
      rope_scaling=Yarn(factor=4.0, positions=32768, beta_fast=32.0, beta_slow=1.0, attention=1.1),
    ),
  )
  for sizes in (tiny(), cfg, stretched):
    assert from_dict(VLMConfig, json.loads(json.dumps(to_dict(sizes)))) == sizes


def built(cfg):
  """A tower whose blocks count: they are scaled by next to nothing at the start."""
  tower = jax.jit(lambda: InternVideo2(cfg, rngs=nnx.Rngs(0)))()
  for block in tower.blocks:
    block.ls1[...], block.ls2[...] = jnp.full(32, 0.5), jnp.full(32, 0.5)
  return tower


@pytest.fixture(scope="module")
def tower(cfg):
  return built(cfg)


run = jax.jit(lambda tower, frames: tower(frames))


def test_frames_of_a_clip_see_each_other_and_clips_do_not(tower):
  out = run(tower, clips(2))
  assert out.shape == (2, 4 * 25, 32)  # no class token
  changed = run(tower, clips(2).at[1, 3].set(0))
  np.testing.assert_array_equal(out[0], changed[0])
  assert np.abs(out[1, :25] - changed[1, :25]).max() > 1e-3


def test_the_class_token_is_the_first_and_has_a_position(tower):
  embed = jax.jit(lambda tower, frames: (tower.embed(frames), tower.patch_embed(frames)))
  embedded, patches = embed(tower, clips(1))
  np.testing.assert_array_equal(
    embedded[0, 0], tower.cls_token[...][0, 0] + tower.pos_embed[...][0, 0]
  )
  np.testing.assert_array_equal(embedded[:, 1:], patches + tower.pos_embed[...][:, 1:])
  image, patches = embed(tower, clips(1, 1))
  np.testing.assert_array_equal(image[:, 1:], patches + tower.img_pos_embed[...][:, 1:])


def test_clips_of_another_length_have_no_positions(tower):
  with pytest.raises(ShapeError) as caught:
    tower(clips(1, 8))
  assert caught.value.fields == {"where": "frames", "value": 8, "allowed": (1, 4)}


def test_layers_split_over_a_mesh_give_the_same(cfg, tower):
  mesh = make_mesh(MeshConfig(2, 2, 2, 1))
  graph, state = nnx.split(tower)
  shardings = param_shardings({"vision": state}, mesh)["vision"]
  kernels = {path_name(path): s for path, s in jax.tree_util.tree_leaves_with_path(shardings)}
  assert kernels["blocks/0/attn/qkv/kernel"].spec == P("fsdp", "tensor") and kernels[
    "blocks/1/fc2/kernel"
  ].spec == P("tensor", "fsdp")
  assert kernels["pos_embed"].spec == P(None, None, "fsdp") and kernels["blocks/0/ls1"].spec == P()
  split = jax.jit(lambda state, frames: nnx.merge(graph, state)(constrain(frames, "clips")))
  with jax.set_mesh(mesh):
    out = split(jax.device_put(state, shardings), clips(4))
  assert len(out.sharding.device_set) == 8
  np.testing.assert_allclose(out, run(tower, clips(4)), rtol=0, atol=1e-5)


def test_every_parameter_of_such_a_model_has_a_rule(cfg):
  state = nnx.state(loading.abstract(cfg))
  assert len(jax.tree.leaves(param_shardings(state, make_mesh(MeshConfig(1, 2, 2, 2))))) == len(
    tensor_names.names(cfg)
  )


def test_remat_changes_no_gradient_and_all_but_the_positions_of_images_have_one(cfg):
  grads = []
  for remat in (False, True):
    module = built(
      dataclasses.replace(
        cfg, vision=dataclasses.replace(SIZES, layers=1), remat=remat, attention="einsum"
      )
    )
    grads.append(jax.jit(nnx.grad(lambda m: jnp.square(m(clips(1))).mean()))(module))
  assert not grads[0].pop("img_pos_embed")[...].any() and grads[1].pop("img_pos_embed")
  first, second = map(jax.tree.leaves, grads)
  assert len(first) == 4 + 13
  for a, b in zip(first, second, strict=True):
    assert np.abs(a).max() > 0
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_bfloat16_follows_float32(cfg, tower):
  graph = nnx.graphdef(
    nnx.eval_shape(
      lambda: InternVideo2(dataclasses.replace(cfg, dtype="bfloat16"), rngs=nnx.Rngs(0))
    )
  )
  half = run(nnx.merge(graph, nnx.state(tower)), clips(2))  # masters stay float32
  assert half.dtype == jnp.bfloat16
  assert np.abs(run(tower, clips(2)) - half.astype(jnp.float32)).mean() < 0.03


def test_clips_of_four_become_64_tokens_and_an_image_16(cfg):
  model = nnx.eval_shape(lambda: VLM(cfg, rngs=nnx.Rngs(0)))

  def shape(frames):
    return jax.eval_shape(
      vlm.encode_frames, model, jax.ShapeDtypeStruct((3, frames, 70, 70, 3), np.uint8)
    ).shape

  assert shape(4) == (3, 64, 32) and shape(1) == (3, 16, 32)


def test_sizes_come_from_the_tensors(reference):
  sizes = tower_sizes(reference / "internvideo2_tiny", 84, 4)
  assert sizes == InternVideo2Config(
    image_size=84, patch_size=14, width=48, layers=3, heads=4, mlp_width=209, frames=4
  )


# --- from end to end, as a user does
# ----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
  """Random weights in the official layout of such a model; its blocks count from the start."""
  tower = {
    "image_size": 70,
    "embed_dim": 64,
    "depth": 3,
    "heads": 2,
    "patch_size": 14,
    "mlp_ratio": 48 / 11,
  }
  own = {"mm_vision_tower": "internvideo2", "mm_local_num_frames": 4, "tiny_vision": tower}
  monkeypatch.setattr(world, "MODEL", world.MODEL | own)
  monkeypatch.setattr("xcomp_jax.model.internvideo2.LAYER_SCALE", 0.5)
  world.write_untrained(tmp_path / "init", 0, world.MODEL, world.world_words())
  return tmp_path / "init"


@pytest.mark.slow
def test_a_model_with_this_tower_is_tuned_exported_asked_and_evaluated(
  checkpoint, tmp_path, capsys
):
  world.write_world(
    tmp_path / "world",
    [
      world.WorldSplit(name="train", videos=8, fewest=1, most=2, questions=2),
      world.WorldSplit(name="heldout", videos=2, fewest=2, most=2, questions=2),
    ],
    seed=0,
    workers=1,
  )
  settings = predecoding.FrameSettings(
    image_size=70, max_frames=16, min_frames=8, fps=8.0, clip_frames=4
  )
  with pytest.raises(
    ConfigError,
    match=r"has positions for clips of 4 frames, not of 8: .* --clip-frames 4 of predecode",
  ):
    predecode.load_tower(str(checkpoint), dataclasses.replace(settings, clip_frames=8), 2)
  tower = predecode.load_tower(str(checkpoint), settings, 2)
  for name, features in (("frames", None), ("features", tower)):
    predecoding.predecode(
      tmp_path / "world/train.yaml",
      tmp_path / name,
      settings,
      root=tmp_path / "world",
      workers=0,
      tower=features,
    )
  assert store.open_store(str(tmp_path / "features")).features.width == 64

  runs = {}  # losses of the steps
  for name in ("frames", "features"):
    overrides = {
      "init_from": checkpoint,
      "workdir": tmp_path / f"run-{name}",
      "data.train": tmp_path / name,
      "data.heldout": None,
      "data.frames_per_device": 32,
      "train.steps": 3,
      "train.batch_size": 2,
      "train.log_every": 1,
      "optim.warmup": 0.0,
      "model.yarn": "(2.0, 64)",
    }
    config = from_command_line(
      [
        "train",
        "--config=configs/sct.py:tiny",
        *(f"--config.{k}={v}" for k, v in overrides.items()),
      ]
    )
    loop.train(config)
    runs[name] = [
      float(loss)
      for loss in re.findall(r"^step \d/3  loss (\S+)", capsys.readouterr().out, re.MULTILINE)
    ]
  assert len(runs["frames"]) == 3 and runs["frames"][-1] < runs["frames"][0]
  # features are kept in bfloat16
  np.testing.assert_allclose(runs["frames"], runs["features"], rtol=2e-3)

  export.main(
    [
      "--checkpoint",
      str(tmp_path / "run-frames"),
      "--format=orbax",
      "--out",
      str(tmp_path / "orbax"),
    ]
  )
  export.main(
    ["--checkpoint", str(tmp_path / "orbax"), "--format=torch", "--out", str(tmp_path / "torch")]
  )
  assert tensor_files.shapes(tmp_path / "torch") == tensor_files.shapes(checkpoint)
  before, after = (
    loading.load_model(place, read_vlm_config(place, saving.AS_IT_IS, saving.NOT_TUNED))
    for place in (checkpoint, tmp_path / "torch")
  )
  assert loading.tower_identity(before) == loading.tower_identity(after)  # bit by bit as it was
  assert read_vlm_config(
    tmp_path / "torch", saving.AS_IT_IS, saving.NOT_TUNED
  ).llm.rope_scaling == yarn_of(2.0, 64)
  assert not np.array_equal(before.llm.layers[0].q.kernel[...], after.llm.layers[0].q.kernel[...])

  film = next((tmp_path / "world/heldout").glob("*.mp4"))
  options = [
    "--checkpoint",
    str(tmp_path / "torch"),
    "--min-frames=8",
    "--max-frames=16",
    "--select=8",
    "--max-new-tokens=3",
  ]
  capsys.readouterr()
  ask.main([*options, "--video", str(film), "--question", world.QUESTIONS["digit"], "--json"])
  answer = json.loads(capsys.readouterr().out)
  assert (
    answer["sampled_frames"] == 16
    and len(answer["clip_scores"]) == 4
    and len(answer["frames"]) == 8
  )
  with pytest.raises(SystemExit):
    ask.main([*options, "--video", str(film), "--question", "Which?", "--clip-frames=8"])
  assert re.search(
    r"^error: .*has positions for clips of 4 frames, not of 8",
    capsys.readouterr().err,
    re.MULTILINE,
  )

  items = [
    {
      "video": film.stem,
      "type": film.stem,
      "question": text,
      "candidates": ["(A) x", "(B) y"],
      "answer": "(B) y",
      "question_type": ["a"],
    }
    for text in world.QUESTIONS.values()
  ]
  (tmp_path / "q.json").write_text(json.dumps(items))
  evaluate.main(
    [
      "--task=lvbench",
      "--annotations",
      str(tmp_path / "q.json"),
      "--videos",
      str(film.parent),
      "--preset=none",
      "--devices=1",
      *options,
      "--out",
      str(tmp_path / "results"),
    ]
  )
  found = json.loads((tmp_path / "results/results.json").read_text())
  assert found["made_with"]["clip_frames"] == 4 and not found["failed"]
  assert pathlib.Path(tmp_path / "results/samples.jsonl").read_text().count("\n") == 4
