"""steps.py, metrics.py and optim.py: a step is the ungrouped batch's mean on any mesh, and what is
not finite changes nothing.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from gradient import abstract_step
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from packed import one_each
from released import TWO_B

from xcomp_jax.bench.parts import flops
from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.config import (
  ConfigError,
  MeshConfig,
  TrainConfig,
)
from xcomp_jax.data import blend, packing, pipeline, prompt
from xcomp_jax.data.batch import Length, Shape, batch_spec
from xcomp_jax.model import vlm
from xcomp_jax.parallel.chips import find_chip
from xcomp_jax.parallel.mesh import groups_of, make_mesh
from xcomp_jax.training import loop, metrics, optim, prepare, steps

ONE = MeshConfig(1, 1, 1, 1)


def close(got, want):
  """Within 1e-5 of the largest absolute value."""
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


class Prepared:
  """A model's state on a mesh and the compiled steps."""

  def __init__(self, config, devices):
    self.mesh = make_mesh(config.mesh, jax.devices()[:devices])
    self.cfg = read_vlm_config(resolve(config.init_from), config.model, config.lp_comp)
    self.config, self.tx = config, optim.optimizer(config.optim, 10)
    with jax.set_mesh(self.mesh):
      self.graph, wanted = steps.abstract_state(config, self.cfg, self.tx, self.mesh)
      self.state = steps.init_state(config, self.cfg, self.tx, wanted)
      self.sums = steps.zero_sums(self.state.trained, self.mesh)
      self.steps = steps.compiled_steps(self.cfg, self.state, self.sums, self.mesh)

  def add(self, batch):
    with jax.set_mesh(self.mesh):
      self.sums, losses = self.steps.grad(
        self.graph,
        self.state,
        self.sums,
        steps.place_rows(batch, self.mesh),
        (),
        projector_max_frames=self.config.train.projector_max_frames,
      )
    return losses[:, 0] if losses.shape[1] == 1 else losses

  def apply(self):
    with jax.set_mesh(self.mesh):
      self.state, self.sums, out = self.steps.apply(self.tx, self.state, self.sums)
    return out


@pytest.fixture(scope="module")
def examples(sample):
  """Mixed: 2, 3, 1 and no clips, text of different lengths."""

  def make(clips, before, after, seed):
    return sample(clips, before, after, seed, clip_frames=4, vocab=99)

  return [
    make(2, 3, 9, 0),
    make(3, 6, 4, 1),
    make(1, 1, 12, 2),
    make(0, 0, 12, 3),
    make(3, 4, 16, 4),
  ]


def test_accumulated_gradients_of_mixed_buckets_equal_the_ungrouped_batch(
  tiny_run, examples, tmp_path
):
  config = tiny_run(tmp_path)
  config = dataclasses.replace(config, mesh=ONE)
  whole, parts = Prepared(config, 1), Prepared(config, 1)
  whole.add(one_each(examples, 12, 8, 16))
  losses = [parts.add(one_each([examples[i] for i in (1, 4)], 16, 6, 32))]
  # two rows of padding
  losses += [parts.add(one_each([examples[i] for i in (0, 2)], 8, 4, 16, 4))[:2]]
  losses += [parts.add(one_each(examples[3:4], 0, 8, 16, 2))[:1]]
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
    losses = it.add(one_each(examples, 12, 8, 16, 8))
    gradients = jax.device_get(it.sums.grads)
    out = it.apply()
    results.append(jax.device_get((losses[:5], gradients, out["grad_norm"])))
    kernel = it.state.trained["llm"]["layers"][0]["gate"]["kernel"][...]
    moment = it.state.opt[1][0].mu["llm"]["layers"][0]["gate"]["kernel"][...]
    assert kernel.sharding.spec == moment.sharding.spec
    assert kernel.addressable_shards[0].data.size == kernel.size // (4 if devices == 8 else 1)
  jax.tree.map(close, results[1], results[0])


Device = collections.namedtuple("Device", "process_index number")


def held(*processes):
  """Rows of a batch of 8 that each process's devices hold, as a sharding says it."""
  return {
    Device(p, n): (slice(*rows),)
    for p, several in enumerate(processes)
    for n, rows in enumerate(several)
  }


@pytest.mark.pure
@pytest.mark.parametrize(
  "processes, groups",
  [
    ([[(0, 4)], [(4, 6), (6, 8)]], [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ([[(6, 8)], [(0, 2)], [(2, 4)], [(4, 6)]], [(6, 7), (0, 1), (2, 3), (4, 5)]),
    # tensor over two processes
    (
      [[(0, 4)], [(0, 4)], [(4, 8)], [(4, 8)]],
      [(0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 6, 7), (4, 5, 6, 7)],
    ),
    # as a ring lies on a torus
    ([[(0, 1), (1, 2), (6, 7), (7, 8)], [(2, 6)]], [(0, 1, 6, 7), (2, 3, 4, 5)]),
    ([[(None, None)], [(None, None)]], [tuple(range(8))] * 2),
  ],
)
def test_every_process_reads_the_rows_of_its_devices(processes, groups):
  assert list(groups_of(held(*processes), 8, {}).values()) == groups


@pytest.mark.pure
@pytest.mark.parametrize(
  "processes, rows",
  [
    ([[(0, 3)], [(3, 8)]], {0: [0, 1, 2], 1: [3, 4, 5, 6, 7]}),
    ([[(0, 4)], [(2, 6)], [(4, 8)]], {0: [0, 1, 2, 3], 1: [2, 3, 4, 5], 2: [4, 5, 6, 7]}),
  ],
)
def test_rows_that_processes_can_not_share_are_refused(processes, rows):
  with pytest.raises(ConfigError) as caught:
    groups_of(held(*processes), 8, {})
  assert caught.value.fields == {"where": "config.mesh", "rows": rows, "count": 8}


def test_one_process_has_the_rows_of_all():
  assert steps.row_share(make_mesh(MeshConfig(2, 4, 1, 1))) == (tuple(range(8)), 8)


def test_rows_that_lie_scattered_are_placed_where_their_devices_are():
  mesh = Mesh(np.array(jax.devices())[[0, 1, 6, 7, 2, 3, 4, 5]].reshape(8, 1), ("fsdp", "tensor"))
  batch = np.arange(8)
  placed = jax.make_array_from_process_local_data(
    NamedSharding(mesh, PartitionSpec("fsdp")), batch, (8,)
  )
  assert [
    int(shard.data[0]) for shard in sorted(placed.addressable_shards, key=lambda s: s.device.id)
  ] == [0, 1, 4, 5, 6, 7, 2, 3]


def test_quirk_q17_long_samples_give_the_projector_no_gradient(tiny_run, examples, tmp_path):
  batch = one_each(examples[:2], 12, 8, 16)  # 8 and 12 frames
  config = tiny_run(
    tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1}, **{"train.projector_max_frames": 12}
  )
  grads = {}
  for weight in ((1, 1), (1, 0), (0, 1)):
    it = Prepared(config, 1)
    it.add(dataclasses.replace(batch, weight=np.array(weight, np.float32)[:, None]))
    grads[weight] = jax.device_get(it.sums.grads)
  jax.tree.map(close, grads[1, 1]["projector"], grads[1, 0]["projector"])
  assert all(np.any(g) for g in jax.tree.leaves(grads[1, 0]["projector"]))
  assert not any(np.any(g) for g in jax.tree.leaves(grads[0, 1]["projector"]))
  assert np.any(grads[0, 1]["llm"]["layers"][0]["q"]["kernel"][...])


def test_warm_up_and_cosine_are_those_of_the_release(tiny_run, tmp_path):
  config = dataclasses.replace(tiny_run(tmp_path).optim, learning_rate=1e-5, warmup=0.03)
  rate = optim.learning_rate(config, 2247)  # 68 steps of warm-up
  np.testing.assert_allclose(
    [rate(0), rate(1), rate(67), rate(68)], [0, 1e-5 / 68, 67e-5 / 68, 1e-5], rtol=1e-6
  )
  np.testing.assert_allclose(rate(68 + 2179 / 2), 0.5e-5, rtol=1e-5)
  assert 0 < rate(2246) < 1e-10 and rate(2247) == 0
  whole = optim.learning_rate(dataclasses.replace(config, warmup=1.0), 4)  # nothing but warm-up
  np.testing.assert_allclose(
    [whole(step) for step in range(4)], [0, 0.25e-5, 0.5e-5, 0.75e-5], rtol=1e-6
  )


def test_weight_decay_leaves_norms_and_biases_alone(tiny_run, tmp_path):
  config = dataclasses.replace(tiny_run(tmp_path).optim, weight_decay=0.5)
  tx = optim.optimizer(config, 10)
  params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.5 * config.learning_rate)
  np.testing.assert_array_equal(updates["scale"], 0)


@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)  # compiles slowly
def test_losses_and_gradients_on_features_are_those_on_frames(
  tiny_run, write_features, tmp_path, dtype
):
  one = {"data.shapes": [[4, 3, 32, 400]]}
  config = tiny_run(
    tmp_path,
    mesh={"data": 1, "fsdp": 1, "tensor": 1},
    **one,
    **{"model.remat": False, "model.dtype": dtype},
  )
  write_features(config, tmp_path / "features")
  tokenizer, out = prompt.load_tokenizer(config.init_from), []
  for folder in (config.data.train, str(tmp_path / "features")):
    it = Prepared(config, 1)
    data = prepare.open_data(folder, it.cfg)
    micro = packing.Micro(
      Shape(rows=4, samples=3, prefix=80, frames=32, text=400),
      tuple(tuple(range(i, i + 3)) for i in range(0, 12, 3)),
    )
    lengths, encoder = (
      blend.measure_lengths(data, tokenizer, "assistant"),
      loop.ClipEncoder(it.steps, it.mesh),
    )
    with jax.set_mesh(it.mesh):
      for item in pipeline.read_steps(
        data,
        tokenizer,
        config.data,
        lengths,
        [[micro]],
        prepare.share_of(it.mesh, config, it.cfg.clips_per_chunk),
      ):
        if isinstance(item, pipeline.TowerCall):
          encoder.encode(it.state, item)
        else:
          batch, clips = encoder.batch(item)
          it.sums, losses = it.steps.grad(
            it.graph, it.state, it.sums, batch, clips, projector_max_frames=None
          )
    assert float(it.sums.samples) == 12 and float(it.sums.frames) == 4 * 18
    out.append(jax.device_get((losses, it.sums.grads)))
  (want, wanted), (got, gradients) = out

  def norm(tree):
    return np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(tree)))

  # a tower in bfloat16 differs with the batch's shape
  loss, gradient = (2e-3, 4e-3) if dtype == "float32" else (2e-2, 1e-1)
  np.testing.assert_allclose(got, want, rtol=loss)
  assert norm(jax.tree.map(np.subtract, gradients, wanted)) < gradient * norm(wanted)


@pytest.mark.parametrize("devices, mesh", [(1, ONE), (8, MeshConfig(2, 2, 2, 1))])
def test_features_are_known_by_their_tower_wherever_it_lies(
  tiny_run, features, tmp_path, devices, mesh
):
  for dtype in ("float32", "bfloat16"):
    it = Prepared(
      dataclasses.replace(tiny_run(tmp_path, **{"model.dtype": dtype}), mesh=mesh), devices
    )
    model = nnx.merge(it.graph, it.state.trained, it.state.frozen)
    prepare.check_tower(model, "m", [prepare.open_data(features, it.cfg)])
    kernel = model.vision.blocks[0].fc1.kernel
    kernel[...] = kernel[...].at[0, 0].add(1)
    data = prepare.open_data(features, it.cfg)
    with pytest.raises(ConfigError) as caught:
      prepare.check_tower(model, "m", [data])
    assert caught.value.fields == {
      "where": features,
      "found": data.features.identity,
      "expected": loading.tower_identity(model),
    }


def test_a_step_that_is_not_finite_changes_nothing(tiny_run, examples, tmp_path):
  it = Prepared(tiny_run(tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1}), 1)
  batch = one_each(examples[:2], 12, 8, 16)
  it.add(dataclasses.replace(batch, weight=np.array([[1], [np.inf]], np.float32)))
  before = jax.device_get(it.state)
  out = it.apply()
  assert not out["finite"]
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(it.state), before)


def test_an_update_that_is_not_finite_is_not_applied(tiny_run, examples, tmp_path):
  config = tiny_run(tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1})
  # corrects by 1 - b1: 0 / 0
  it = Prepared(dataclasses.replace(config, optim=dataclasses.replace(config.optim, b1=1.0)), 1)
  it.add(one_each(examples[:2], 12, 8, 16))
  before = jax.device_get(it.state)
  out = it.apply()
  assert np.isfinite(out["grad_norm"]) and np.isnan(out["update_norm"]) and not out["finite"]
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(it.state), before)


def test_masters_are_float32_and_what_is_frozen_has_the_compute_dtype(tiny_run, tmp_path):
  config = tiny_run(
    tmp_path, mesh={"data": 1, "fsdp": 1, "tensor": 1}, **{"model.dtype": "bfloat16"}
  )
  state = Prepared(config, 1).state

  def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if leaf.ndim}

  assert dtypes(state.trained) == dtypes(state.opt) == {"float32"} and dtypes(state.frozen) == {
    "bfloat16"
  }
  assert set(state.trained) == {"projector", "llm"} and set(state.frozen) == {"vision"}


def test_flops_of_a_batch_are_those_that_xla_counts(tiny):
  # Wide enough that what is left out (merging, norms, softmax, the masked half of attention) is
  # little.
  cfg = tiny(attention="einsum", remat=False)
  cfg = dataclasses.replace(
    cfg,
    vision=dataclasses.replace(cfg.vision, width=256, mlp_width=1024),
    llm=dataclasses.replace(cfg.llm, width=256, head_dim=64, mlp_width=1024),
  )
  graph, state = nnx.split(loading.abstract(cfg))

  def loss(state, batch):
    return vlm.loss(nnx.merge(graph, state), batch).sum()

  # Of the program as traced: after optimizing, which takes ten times as long, XLA counts the same.
  def counted(f, spec):
    return jax.jit(f).lower(state, spec).cost_analysis()["flops"]

  def near(flops):
    return pytest.approx(flops, rel=0.1)

  features = batch_spec(
    Shape(rows=1, samples=1, prefix=4, frames=16, text=8), ((16, 256), np.float32)
  )
  clips = jax.ShapeDtypeStruct((2, 8, 48, 48, 3), np.uint8)
  flops = metrics.forward_flops(cfg, [Length(16, 8, 4, 8)], pixels=True)
  assert flops["projector"] + flops["llm"] == near(counted(loss, features))
  assert flops["vision"] == near(
    counted(lambda state, clips: vlm.encode_frames(nnx.merge(graph, state), clips), clips)
  )

  everything = TrainConfig(
    batch_size=1,
    epochs=1,
    steps=None,
    vision=False,
    projector=True,
    llm=True,
    projector_max_frames=None,
    log_every=1,
    eval_every=1,
    save_every=1,
    keep_last=1,
    keep_every=None,
  )
  trained = metrics.training_flops(cfg, everything, [Length(16, 8, 4, 8)], pixels=False)
  assert trained == near(counted(jax.grad(loss), features))


@pytest.mark.slow
def test_at_the_2b_sizes_a_step_on_features_costs_a_sixth_of_one_on_frames(tiny_run, tmp_path):
  # Counted over the traced program, recomputation included: 1,024 frames and 512 text tokens.
  config = tiny_run(tmp_path, **{"train.projector_max_frames": 512, "model.dtype": "bfloat16"})
  cfg = dataclasses.replace(TWO_B, attention="einsum")
  step, arguments = abstract_step(
    config,
    cfg,
    batch_spec(
      Shape(rows=1, samples=1, prefix=16, frames=1024, text=512), ((16, 1024), ml_dtypes.bfloat16)
    ),
  )
  features = flops(step, *arguments)
  graph, state = nnx.split(loading.abstract(cfg))
  clips = jax.ShapeDtypeStruct((128, 8, 448, 448, 3), np.uint8)
  tower = flops(
    lambda state, clips: vlm.encode_frames(nnx.merge(graph, state), clips), state, clips
  )
  length = [Length(1024, 8, 16, 512)]
  assert tower == pytest.approx(
    metrics.forward_flops(cfg, length, pixels=True)["vision"].sum(), rel=0.02
  )
  assert features < (features + tower) / 6
  with_tower, without = (
    metrics.training_flops(cfg, config.train, length, pixels=pixels) for pixels in (True, False)
  )
  assert with_tower - without == pytest.approx(tower, rel=0.02)


@pytest.mark.pure
def test_the_peak_is_that_of_the_whole_name():
  def peak(kind):
    chip = find_chip(kind)
    return chip.flops / 1e12 if chip else 0

  kinds = ("L4", "L40S", "L40", "A100-SXM4-80GB", "H100 PCIe", "H100 80GB HBM3")
  assert [peak(f"NVIDIA {kind}") for kind in kinds] == [121, 362, 0, 312, 756, 989] and not peak(
    "cpu"
  )
  assert [peak(f"TPU {kind}") for kind in ("v4", "v5 lite", "v5", "v5p", "v6 lite")] == [
    275,
    197,
    459,
    459,
    918,
  ]
