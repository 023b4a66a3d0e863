"""train.py: a step is the ungrouped batch's mean; what is frozen stays; what can't work is said."""

import dataclasses
import json
import math
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from xcomp_jax import bench_parts, metrics, optim, steps, train, weights
from xcomp_jax.config import (
  ConfigError,
  LLMConfig,
  LPCompConfig,
  MeshConfig,
  RunConfig,
  TrainConfig,
  VisionConfig,
  VLMConfig,
  from_dict,
)
from xcomp_jax.data import pipeline, prompt
from xcomp_jax.data.batch import Bucket, batch_spec, collate, fake_batch
from xcomp_jax.model import vlm
from xcomp_jax.sharding import make_mesh

ONE = MeshConfig(1, 1, 1, 1)


@pytest.fixture
def one_device(monkeypatch):
  """Runs on the first device: compiles in a fraction of the time."""
  monkeypatch.setattr(train, "make_mesh", lambda config, **_: make_mesh(config, jax.devices()[:1]))


def close(got, want):
  """Within 1e-5 of the largest absolute value."""
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


class Prepared:
  """A model's state on a mesh and the compiled steps."""

  def __init__(self, config, devices):
    self.mesh = make_mesh(config.mesh, jax.devices()[:devices])
    self.cfg = weights.read_config(weights.resolve(config.init_from), config.model, config.lp_comp)
    self.config, self.tx = config, optim.optimizer(config.optim, 10)
    with jax.set_mesh(self.mesh):
      self.graph, _ = train.abstract_state(config, self.cfg, self.tx, self.mesh)
      self.state = train.init_state(config, self.cfg, self.tx, self.mesh)
      self.sums = train.zero_sums(self.state.trained, self.mesh)
      self.steps = train.compiled_steps(self.state, self.sums, self.mesh)

  def add(self, batch):
    with jax.set_mesh(self.mesh):
      self.sums, losses = self.steps.grad(
        self.graph, self.state, self.sums, train.place(batch, self.mesh),
        projector_max_frames=self.config.train.projector_max_frames,
      )
    return losses

  def apply(self):
    with jax.set_mesh(self.mesh):
      self.state, self.sums, out = self.steps.apply(self.tx, self.state, self.sums)
    return out


@pytest.fixture(scope="module")
def examples(sample):
  """Mixed: 2, 3, 1 and no clips, text of different lengths."""
  make = lambda clips, before, after, seed: sample(clips, before, after, seed, clip_frames=4, vocab=99)
  return [make(2, 3, 9, 0), make(3, 6, 4, 1), make(1, 1, 12, 2), make(0, 0, 12, 3), make(3, 4, 16, 4)]


def test_accumulated_gradients_of_mixed_buckets_equal_the_ungrouped_batch(tiny_run, examples, tmp_path):
  config = tiny_run(tmp_path)
  config = dataclasses.replace(config, mesh=ONE)
  whole, parts = Prepared(config, 1), Prepared(config, 1)
  whole.add(collate(examples, Bucket(3, 4, 8, 16)))
  losses = [parts.add(collate([examples[i] for i in (1, 4)], Bucket(4, 4, 6, 32)))]
  losses += [parts.add(collate([examples[i] for i in (0, 2)], Bucket(2, 4, 4, 16), 4))[:2]]  # two rows of padding
  losses += [parts.add(collate(examples[3:4], Bucket(0, 4, 8, 16), 2))[:1]]
  jax.tree.map(close, parts.sums, whole.sums)
  assert float(parts.sums.samples) == 5 and float(parts.sums.frames) == 4 * 9

  # and that is the mean over samples of each sample's mean over its supervised tokens
  mean = jax.tree.map(lambda g: g / 5, whole.sums.grads)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(jax.device_get(mean))))
  out = whole.apply()
  np.testing.assert_allclose(out["loss"], np.mean(np.concatenate(losses)), rtol=1e-5)
  np.testing.assert_allclose(out["grad_norm"], norm, rtol=1e-5)
  assert not any(np.any(g) for g in jax.tree.leaves(jax.device_get(whole.sums)))


def test_a_step_over_eight_devices_equals_one_device(tiny_run, examples, tmp_path):
  config = tiny_run(tmp_path)
  results = []
  for devices, mesh in ((1, ONE), (8, MeshConfig(2, 2, 2, 1))):
    it = Prepared(dataclasses.replace(config, mesh=mesh), devices)
    losses = it.add(collate(examples, Bucket(3, 4, 8, 16), 8))
    gradients = jax.device_get(it.sums.grads)
    out = it.apply()
    results.append(jax.device_get((losses[:5], gradients, out["grad_norm"])))
    kernel = it.state.trained["llm"]["layers"][0]["gate"]["kernel"][...]
    moment = it.state.opt[1][0].mu["llm"]["layers"][0]["gate"]["kernel"][...]
    assert kernel.sharding.spec == moment.sharding.spec
    assert kernel.addressable_shards[0].data.size == kernel.size // (4 if devices == 8 else 1)
  jax.tree.map(close, results[1], results[0])


def test_every_process_reads_the_rows_of_its_devices():
  class Two:  # of a batch of 8 rows: the devices of one process

    def __init__(self, *rows):
      self.rows = rows

    def addressable_devices_indices_map(self, shape):
      assert shape == (8,)
      return {i: (slice(*rows),) for i, rows in enumerate(self.rows)}

  mesh = make_mesh(MeshConfig(2, 4, 1, 1))
  assert train.row_share(mesh) == (0, 1)
  for rows, share in ((((0, 4), (4, 8)), (0, 1)), (((4, 6), (6, 8)), (1, 2)), (((6, 8), (6, 8)), (3, 4)), (((None, None),), (0, 1))):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(steps, "batch_sharding", lambda mesh, rows=rows: Two(*rows))
      assert train.row_share(mesh) == share
  for rows in (((0, 2), (4, 6)), ((1, 3),), ((0, 3),)):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(steps, "batch_sharding", lambda mesh, rows=rows: Two(*rows))
      with pytest.raises(ConfigError, match=r"the devices of process 0 hold rows .* of every 8"):
        train.row_share(mesh)


def test_quirk_q17_long_samples_give_the_projector_no_gradient(tiny_run, examples, tmp_path):
  batch = collate(examples[:2], Bucket(3, 4, 8, 16))  # 8 and 12 frames
  config = tiny_run(tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1}, **{"train.projector_max_frames": 12})
  grads = {}
  for weight in ((1, 1), (1, 0), (0, 1)):
    it = Prepared(config, 1)
    it.add(dataclasses.replace(batch, weight=np.array(weight, np.float32)))
    grads[weight] = jax.device_get(it.sums.grads)
  jax.tree.map(close, grads[1, 1]["projector"], grads[1, 0]["projector"])
  assert all(np.any(g) for g in jax.tree.leaves(grads[1, 0]["projector"]))
  assert not any(np.any(g) for g in jax.tree.leaves(grads[0, 1]["projector"]))
  assert np.any(grads[0, 1]["llm"]["layers"][0]["q"]["kernel"][...])


def test_warm_up_and_cosine_are_those_of_the_release(tiny_run, tmp_path):
  config = dataclasses.replace(tiny_run(tmp_path).optim, learning_rate=1e-5, warmup=0.03)
  rate = optim.schedule(config, 2247)  # 68 steps of warm-up
  np.testing.assert_allclose([rate(0), rate(1), rate(67), rate(68)], [0, 1e-5 / 68, 67e-5 / 68, 1e-5], rtol=1e-6)
  np.testing.assert_allclose(rate(68 + 2179 / 2), 0.5e-5, rtol=1e-5)
  assert 0 < rate(2246) < 1e-10 and rate(2247) == 0
  whole = optim.schedule(dataclasses.replace(config, warmup=1.0), 4)  # nothing but warm-up
  np.testing.assert_allclose([whole(step) for step in range(4)], [0, 0.25e-5, 0.5e-5, 0.75e-5], rtol=1e-6)


def test_weight_decay_leaves_norms_and_biases_alone(tiny_run, tmp_path):
  config = dataclasses.replace(tiny_run(tmp_path).optim, weight_decay=0.5)
  tx = optim.optimizer(config, 10)
  params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.5 * config.learning_rate)
  np.testing.assert_array_equal(updates["scale"], 0)


def test_a_run_trains_evaluates_and_leaves_the_tower_bit_unchanged(tiny_run, tmp_path, capsys, one_device):
  from xcomp_jax import checkpoint

  jax.clear_caches()  # compilations are counted below, whatever ran before
  config = tiny_run(tmp_path / "w", **{"train.epochs": 3})
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, heldout=config.data.train.removesuffix("train") + "heldout"),
  )
  result = train.run(config)
  text = capsys.readouterr().out
  assert result["step"] == 12 and result["heldout_loss"] > 0 and 0 <= result["heldout_accuracy"] <= 1
  lines = [line for line in text.splitlines() if line.startswith("step ")]
  first, last = (float(line.split("loss ")[1].split()[0]) for line in (lines[0], lines[-1]))
  assert len(lines) == 12 and last < first - 0.5
  for word in ("MFU -", "data wait", "samples/s", "held-out after step 12", "vision/blocks/0..1/fc1/kernel", "done: step 12 of 12", "train: sampling not recorded", "  compile "):
    assert word in text
  assert "warning" not in text
  assert sum(line.startswith("compiled grad_step") for line in text.splitlines()) == 3  # 0, 8 and 16 frames

  saved, step = checkpoint.read_config(config.workdir)
  assert from_dict(RunConfig, saved["run"]) == config and step == 12
  cfg = from_dict(VLMConfig, saved["vlm"])
  before = nnx.state(weights.load(weights.resolve(config.init_from), cfg))
  after = checkpoint.read_params(config.workdir, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), before))
  before, after = weights.parameters(before), weights.parameters(after)
  for path in before:
    same = np.asarray(before[path]).tobytes() == np.asarray(after[path]).tobytes()
    assert same == path.startswith("vision"), path
  assert list((tmp_path / "w" / "tensorboard").iterdir())


def losses(patch, config):
  """Those of every step of a run."""
  out, original = [], metrics.line
  patch.setattr(metrics, "line", lambda done, steps, values: (out.append(values["loss"]), original(done, steps, values))[1])
  train.run(config)
  return np.array(out)


def test_training_on_features_is_training_on_frames(tiny_run, features, tmp_path, monkeypatch, one_device):
  want = losses(monkeypatch, tiny_run(tmp_path / "frames"))
  got = losses(monkeypatch, tiny_run(tmp_path / "features", **{"data.train": features}))
  assert len(want) == 4 and np.ptp(want) > 1
  np.testing.assert_allclose(got, want, rtol=1e-2)  # bfloat16 has 8 bits, and every step grows the difference


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])  # compiles slowly
def test_losses_and_gradients_on_features_are_those_on_frames(tiny_run, write_features, tmp_path, dtype):
  one = {"data.frame_buckets": [0, 12], "data.frames_per_device": 144, "data.text_per_device": 2048}
  config = tiny_run(tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1}, **one, **{"model.remat": False, "model.dtype": dtype})
  write_features(config, tmp_path / "features")
  tokenizer, out = prompt.load_tokenizer(config.init_from), []
  for folder in (config.data.train, str(tmp_path / "features")):
    it = Prepared(config, 1)
    data = train.open_data(folder, it.cfg)
    _, videos = pipeline.batches(data, tokenizer, config.data, batch_size=12, rows=1, seed=0, epochs=1)
    losses = it.add(videos.batch)
    assert float(it.sums.samples) == 9 and float(it.sums.frames) == 4 * 18
    out.append(jax.device_get((losses, it.sums.grads)))
  (want, wanted), (got, gradients) = out
  norm = lambda tree: np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(tree)))
  loss, gradient = (2e-3, 4e-3) if dtype == "float32" else (2e-2, 1e-1)  # a tower in bfloat16 differs with the batch's shape
  np.testing.assert_allclose(got, want, rtol=loss)
  assert norm(jax.tree.map(np.subtract, gradients, wanted)) < gradient * norm(wanted)


@pytest.mark.parametrize("devices, mesh", [(1, ONE), (8, MeshConfig(2, 2, 2, 1))])
def test_features_are_known_by_their_tower_wherever_it_lies(tiny_run, features, tmp_path, devices, mesh):
  for dtype in ("float32", "bfloat16"):
    it = Prepared(dataclasses.replace(tiny_run(tmp_path, **{"model.dtype": dtype}), mesh=mesh), devices)
    model = nnx.merge(it.graph, it.state.trained, it.state.frozen)
    train.check_tower(model, "m", [train.open_data(features, it.cfg)])
    kernel = model.vision.blocks[0].fc1.kernel
    kernel[...] = kernel[...].at[0, 0].add(1)
    with pytest.raises(ConfigError, match=r"train holds features by another tower: its identity is [0-9a-f]+, .* in m [0-9a-f]+"):
      train.check_tower(model, "m", [train.open_data(features, it.cfg)])


def test_features_of_another_tower_are_refused_before_a_step(tiny_run, features, tmp_path, one_device):
  config = tiny_run(tmp_path / "w", **{"data.train": features})
  shutil.copytree(config.init_from, tmp_path / "base")
  tensors = load_file(tmp_path / "base" / "model.safetensors")
  name = next(name for name in tensors if "vision" in name and tensors[name].ndim > 1)
  save_file(tensors | {name: tensors[name] * 1.5}, tmp_path / "base" / "model.safetensors")
  with pytest.raises(ConfigError, match=r"holds features by another tower: .* Make the features again"):
    train.run(dataclasses.replace(config, init_from=str(tmp_path / "base")))
  assert not list((tmp_path / "w" / "checkpoints").iterdir()) and not (tmp_path / "w" / "config.json").exists()


def test_features_that_cannot_be_used_are_refused_before_anything_is_written(tiny_run, features, tmp_path):
  run = lambda **changes: train.run(tiny_run(tmp_path / "w", **{"data.train": features} | changes))
  with pytest.raises(ConfigError, match=r"config\.train\.vision = True, but .*train holds features"):
    run(**{"train.vision": True})
  with pytest.raises(ConfigError, match=r"holds frames .* holds features"):
    run(**{"data.train": [tiny_run(tmp_path).data.train, features]})
  file = tmp_path / "narrow" / "store.json"
  shutil.copytree(features, file.parent)
  file.write_text(file.read_text().replace('"width": 32', '"width": 16'))
  with pytest.raises(ConfigError, match="written with width 16, but the model takes 32"):
    run(**{"data.train": str(file.parent)})
  assert not (tmp_path / "w").exists()


def test_a_run_on_a_blend_goes_on_with_its_weights_only(tiny_run, tmp_path, one_device, capsys):
  data = tiny_run(tmp_path).data.train
  both = {"data.train": [data, data.removesuffix("train") + "heldout"], "data.weights": [0.5, 1.0]}
  config = tiny_run(tmp_path / "w", **both, **{"train.steps": 1})
  assert train.run(config)["step"] == 1
  said = capsys.readouterr().out
  assert "train: sampling not recorded; an epoch reads 6 of 12 samples" in said
  assert "heldout: sampling not recorded; an epoch reads 5 of 5 samples" in said
  for changes, words in (
    ({"data.weights": [1.0, 1.0]}, r"config\.data\.weights was \[0\.5, 1\.0\], is \[1\.0, 1\.0\]"),
    ({"data.train": both["data.train"][::-1], "data.weights": [0.5, 1.0]}, r"identity .* was '\w{16}, \w{16}', is '\w{16}, \w{16}'"),
  ):
    with pytest.raises(ConfigError, match=words):
      train.run(tiny_run(tmp_path / "w", **both | changes, **{"train.steps": 1}))


def test_a_loss_that_is_no_number_stops_before_anything_is_overwritten(tiny_run, tmp_path, monkeypatch, one_device):
  config = tiny_run(tmp_path / "w", **{"train.save_every": 1})
  original = pipeline.collate

  def poisoned(examples, bucket, size=None):
    batch = original(examples, bucket, size)
    return dataclasses.replace(batch, weight=np.where(batch.index == bad, np.nan, batch.weight).astype(np.float32))

  tokenizer = prompt.load_tokenizer(config.init_from)
  cfg = weights.read_config(weights.resolve(config.init_from), config.model, config.lp_comp)
  entries = pipeline.batches(
    train.open_data(config.data.train, cfg), tokenizer, config.data, batch_size=3, rows=1, seed=0, epochs=1
  )
  done, third = 0, []
  for micro in entries:
    third += [i for i in micro.batch.index.tolist() if i >= 0 and done == 2]
    done += micro.last
  bad = third[1]
  monkeypatch.setattr(pipeline, "collate", poisoned)
  with pytest.raises(train.NotFiniteError, match=r"step 3: .*step_3\.json"):
    train.run(config)
  report = json.loads((tmp_path / "w" / "nan" / "step_3.json").read_text())
  assert report["step"] == 3 and report["loss"] == "nan"
  assert sorted(s["index"] for s in report["samples"]) == sorted(third)
  assert {s["id"] for s in report["samples"]} == {f"s{i}" for i in third}
  assert sorted(int(p.name) for p in (tmp_path / "w" / "checkpoints").iterdir() if p.name.isdigit()) == [1, 2]


def test_a_step_that_is_not_finite_changes_nothing(tiny_run, examples, tmp_path):
  it = Prepared(tiny_run(tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1}), 1)
  batch = collate(examples[:2], Bucket(3, 4, 8, 16))
  it.add(dataclasses.replace(batch, weight=np.array([1, np.inf], np.float32)))
  before = jax.device_get(it.state)
  out = it.apply()
  assert not out["finite"]
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(it.state), before)


def test_an_update_that_is_not_finite_is_not_applied(tiny_run, examples, tmp_path):
  config = tiny_run(tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1})
  it = Prepared(dataclasses.replace(config, optim=dataclasses.replace(config.optim, b1=1.0)), 1)  # corrects by 1 - b1: 0 / 0
  it.add(collate(examples[:2], Bucket(3, 4, 8, 16)))
  before = jax.device_get(it.state)
  out = it.apply()
  assert np.isfinite(out["grad_norm"]) and np.isnan(out["update_norm"]) and not out["finite"]
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(it.state), before)


def test_masters_are_float32_and_what_is_frozen_has_the_compute_dtype(tiny_run, tmp_path):
  config = tiny_run(tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1}, **{"model.dtype": "bfloat16"})
  state = Prepared(config, 1).state
  dtypes = lambda tree: {leaf.dtype.name for leaf in jax.tree.leaves(tree) if leaf.ndim}
  assert dtypes(state.trained) == dtypes(state.opt) == {"float32"} and dtypes(state.frozen) == {"bfloat16"}
  assert set(state.trained) == {"projector", "llm"} and set(state.frozen) == {"vision"}


def test_flops_of_a_batch_are_those_that_xla_counts(tiny):
  # Wide enough that what is left out (merging, norms, softmax, the masked half of attention) is little.
  cfg = tiny(attention="einsum", remat=False)
  cfg = dataclasses.replace(
    cfg,
    vision=dataclasses.replace(cfg.vision, width=256, mlp_width=1024),
    llm=dataclasses.replace(cfg.llm, width=256, head_dim=64, mlp_width=1024),
  )
  graph, state = nnx.split(weights.abstract(cfg))
  loss = lambda state, batch: vlm.loss(nnx.merge(graph, state), batch).sum()
  # Of the program as traced: after optimizing, which takes ten times as long, XLA counts the same.
  counted = lambda f, spec: jax.jit(f).lower(state, spec).cost_analysis()["flops"]
  near = lambda flops: pytest.approx(flops, rel=0.1)
  bucket = Bucket(2, 8, 4, 8)
  frames = batch_spec(bucket, 1, ((8, 48, 48, 3), np.dtype(np.uint8)))
  features = batch_spec(bucket, 1, ((128, 256), np.dtype(np.float32)))

  batch = fake_batch(frames, 64)
  flops = metrics.forward_flops(cfg, batch)
  rest = counted(loss, features)
  assert flops["projector"] + flops["llm"] == near(rest)
  assert flops["vision"] == near(counted(loss, frames) - rest)
  one = metrics.forward_flops(cfg, dataclasses.replace(batch, clips=np.array([1], np.int32)))
  assert one["vision"] == flops["vision"] / 2  # padding does not count

  everything = TrainConfig(1, 1, None, False, True, True, None, 1, 1, 1, 1, None)
  trained = metrics.training_flops(cfg, everything, fake_batch(features, 64))
  assert trained == near(counted(jax.grad(loss), features))


@pytest.mark.slow
def test_at_the_2b_sizes_a_step_on_features_costs_a_sixth_of_one_on_frames(tiny_run, tmp_path):
  # Counted over the traced program, recomputation included: 1,024 frames and 512 text tokens.
  config = tiny_run(tmp_path, **{"train.projector_max_frames": 512, "model.dtype": "bfloat16"})
  cfg = VLMConfig(
    vision=VisionConfig(448, 16, 1024, 23, 16, 4096, "umt-hd"),
    llm=LLMConfig(151936, 1536, 28, 12, 2, 128, 8960, 1e6, None, 1e-6, True, None),
    lp_comp=LPCompConfig("cosine", "suffix", 16),
    clip_frames=8, tokens_per_frame=16, dtype="bfloat16", clips_per_chunk=4, attention="einsum", remat=True,
  )
  bucket, counted = Bucket(128, 8, 16, 512), {}
  visuals = {"frames": ((8, 448, 448, 3), np.dtype(np.uint8)), "features": ((128, 1024), np.dtype(ml_dtypes.bfloat16))}
  for name, visual in visuals.items():
    step, arguments = steps.abstract_step(config, cfg, batch_spec(bucket, 1, visual))
    counted[name] = bench_parts.flops(step, *arguments)
  tower = counted["frames"] - counted["features"]
  batch = fake_batch(batch_spec(bucket, 1, visuals["features"]), 100)
  frames = dataclasses.replace(batch, visual=np.broadcast_to(np.uint8(0), (1, 128, *visuals["frames"][0])))
  assert tower == pytest.approx(metrics.forward_flops(cfg, frames)["vision"], rel=0.02)
  assert counted["features"] < counted["frames"] / 6
  assert metrics.training_flops(cfg, config.train, frames) - metrics.training_flops(cfg, config.train, batch) == pytest.approx(tower, rel=0.02)


def test_the_peak_is_that_of_the_whole_name():
  peak = lambda kind: (metrics.peak_flops(kind) or 0) / 1e12
  kinds = ("L4", "L40S", "L40", "A100-SXM4-80GB", "H100 PCIe", "H100 80GB HBM3")
  assert [peak(f"NVIDIA {kind}") for kind in kinds] == [121, 362, 0, 312, 756, 989] and not peak("cpu")
  assert [peak(f"TPU {kind}") for kind in ("v4", "v5 lite", "v5", "v5p", "v6 lite")] == [275, 197, 459, 459, 918]


def test_a_compilation_that_no_new_shape_explains_is_said():
  said = []
  compilations = metrics.Compilations("grad_step", "apply_step", "eval_step")
  specs = [batch_spec(Bucket(clips, 4, 8, 16), 2, ((4, 48, 48, 3), np.dtype(np.uint8))) for clips in (1, 2)]

  def call(name, batch, compiles):
    for _ in range(compiles):
      compilations._listen("/jax/core/compile/backend_compile_duration", 1.0, fun_name=f"jit({name})")
    train.report_compilations(compilations, name, batch, said.append)

  for spec in specs:
    call("grad_step", spec, 1)
    call("eval_step", spec, 1)
  call("apply_step", None, 1)
  call("grad_step", specs[0], 0)
  assert len(said) == 5 and not any("warning" in line for line in said)
  call("grad_step", specs[1], 1)  # other functions' shapes are no excuse
  assert said[-1].startswith("warning: grad_step was compiled 3 times for 2 batch shapes")
  call("apply_step", None, 1)
  assert said[-1].startswith("warning: apply_step was compiled 2 times for 1 batch shapes")


def test_where_the_time_went_adds_up(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  goodput = metrics.Goodput()
  with goodput.part("start"):
    now[0] += 10
  with goodput.part("evaluate"):
    now[0] += 20
    goodput.seconds["compile"] += 15  # of these 20
  now[0] += 60  # steps, a third of which compiles
  goodput.seconds["compile"] += 20
  with goodput.part("save"):
    now[0] += 10
  assert goodput.shares() == {"start": 0.1, "restore": 0, "compile": 0.35, "data": 0, "step": 0.4, "evaluate": 0.05, "save": 0.1}
  assert goodput.line() == "of 100 s: start 10.0%  restore 0.0%  compile 35.0%  data 0.0%  step 40.0%  evaluate 5.0%  save 10.0%"


def test_the_compilation_cache_is_where_the_config_says(tiny_run, tmp_path):
  before = jax.config.jax_compilation_cache_dir
  for folder in (str(tmp_path / "c"), None):  # None leaves it as it is
    try:
      with pytest.raises(ValueError, match="/nowhere"):  # at the start, before anything compiles
        train.run(tiny_run(tmp_path / "w", init_from="/nowhere", compilation_cache=folder))
      assert jax.config.jax_compilation_cache_dir == (folder or before)
    finally:
      jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"mesh": {"data": 3, "fsdp": 1, "tensor": 1}}, "data=3 x fsdp=1 x tensor=1 x context=1 = 3 devices, but there are 8"),
    ({"train.batch_size": 13}, "batch_size = 13"),
    ({"train.batch_size": 0}, "config.train.batch_size = 0"),
    ({"train.projector": False, "train.llm": False}, "trains nothing"),
    ({"data.train": "/nowhere"}, "/nowhere"),
    ({"init_from": "/nowhere"}, "/nowhere"),
    ({"model.clip_frames": 8}, "clip_frames 4"),
    ({"lp_comp.schedule": [4, 8]}, "lp_comp.schedule"),
    ({"lp_comp.group": 24, "lp_comp.schedule": "cosine"}, "lp_comp.group = 24: .* 4 frames, whose 64 tokens can't be cut"),
    ({"lp_comp.group": 0}, "config.lp_comp.group = 0: must be at least 1"),
    ({"model.clips_per_chunk": 0}, "config.model.clips_per_chunk = 0: must be at least 1"),
    ({"data.text_per_device": 0}, "config.data.text_per_device = 0: must be at least 1"),
    ({"data.frame_buckets": [-8, 8]}, "config.data.frame_buckets = .* from 0 on, ascending"),
    ({"data.text_buckets": [0, 8]}, "config.data.text_buckets = .* from 1 on, ascending"),
    ({"data.text_buckets": [64, 8]}, "config.data.text_buckets = .* ascending"),
    ({"data.threads": -1, "data.prefetch": -2}, "config.data.threads = -1: .*; config.data.prefetch = -2: must be 0 or more"),
    ({"data.text_buckets": []}, "config.data.text_buckets = .* one or more"),
    ({"optim.learning_rate": math.nan}, "config.optim.learning_rate = nan: must be a number above 0"),
    ({"optim.learning_rate": 0.0}, "config.optim.learning_rate = 0.0"),
    ({"optim.weight_decay": -0.1}, "config.optim.weight_decay = -0.1"),
    ({"optim.clip_norm": 0.0}, "config.optim.clip_norm = 0.0: .* 1e9 clips nothing"),
    ({"optim.b1": 1.0, "optim.b2": -0.1}, "config.optim.b1 = 1.0: .*; config.optim.b2 = -0.1: "),
    ({"optim.eps": 0.0}, "config.optim.eps = 0.0"),
  ],
)
def test_what_cannot_work_is_said_before_anything_is_written(tiny_run, tmp_path, changes, words):
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    train.run(tiny_run(tmp_path / "w", **changes))
  assert not (tmp_path / "w").exists()


def cut(base):
  file = base / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-10])


def lose(base):
  tensors = load_file(base / "model.safetensors")
  del tensors["model.norm.weight"]
  save_file(tensors, base / "model.safetensors")


def shrink(base):
  values = json.loads((base / "config.json").read_text())
  (base / "config.json").write_text(json.dumps(values | {"vocab_size": 100}))


@pytest.mark.parametrize(
  "damage, words",
  [(cut, "truncated"), (lose, r"1 missing: model\.norm\.weight"), (shrink, "embedding table has only 100 rows")],
)
def test_a_damaged_start_is_said_before_anything_is_written(tiny_run, tmp_path, damage, words):
  shutil.copytree(tiny_run(tmp_path).init_from, tmp_path / "base")
  damage(tmp_path / "base")
  with pytest.raises(weights.CheckpointError, match=words):
    train.run(tiny_run(tmp_path / "w", init_from=str(tmp_path / "base")))
  assert not (tmp_path / "w").exists()


def test_a_workdir_that_cannot_be_written_is_said_before_weights_are_read(tiny_run, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(weights, "load", lambda *a, **k: pytest.fail("weights were read"))
  with pytest.raises(ConfigError, match=r"workdir .*file/w can't be written .*config\.workdir"):
    train.run(tiny_run(tmp_path / "file" / "w"))
  for name in ("checkpoints", "tensorboard"):
    (tmp_path / "w").mkdir(exist_ok=True)
    (tmp_path / "w" / name).write_text("")
    with pytest.raises(ConfigError, match=rf"workdir .*w can't be written .*w/{name}'\); set config\.workdir"):
      train.run(tiny_run(tmp_path / "w"))
    (tmp_path / "w" / name).unlink()


def test_the_command_says_errors_in_one_line_and_exits_with_1(tmp_path):
  root = pathlib.Path(__file__).parents[1]
  command = [
    sys.executable, "-m", "xcomp_jax.train", "--config=configs/sct.py:tiny", f"--config.workdir={tmp_path}/w",
    "--config.optim.learning_rat=1",
  ]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert done.returncode == 1 and not (tmp_path / "w").exists()
  assert done.stderr.strip().splitlines()[-1] == (
    "error: config.optim.learning_rat is unknown; did you mean config.optim.learning_rate?"
  )


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_command_explains_itself(monkeypatch, capsys, flag):
  monkeypatch.setattr(sys, "argv", ["train", flag])
  train.main()
  assert "python -m xcomp_jax.train --config=configs/sct.py" in capsys.readouterr().out
