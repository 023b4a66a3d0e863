"""Programs for TPUs, compiled by the TPU compiler itself, without a TPU. `make test-slow` installs
it (libtpu).
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import NamedSharding, PartitionSpec
from lengths import mixture

from xcomp_jax.bench import bench, parts
from xcomp_jax.checkpoints import loading
from xcomp_jax.config import MeshConfig
from xcomp_jax.config_io import from_command_line
from xcomp_jax.data import packing
from xcomp_jax.inference import rounds
from xcomp_jax.model import qc_comp
from xcomp_jax.model.attention import AttentionMask, attend
from xcomp_jax.parallel import roofline
from xcomp_jax.parallel.chips import GIB
from xcomp_jax.parallel.mesh import batch_devices, batch_sharding, make_mesh, replicated, row_groups
from xcomp_jax.plan import absent, accounts, hlo, plan, programs

pytestmark = pytest.mark.slow
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
KERNEL = 'custom_call_target="tpu_custom_call"'
QUICK = {"exec_time_optimization_effort": -1.0}  # an eighth of the time


@pytest.fixture(scope="module", autouse=True)
def compiler():
  pytest.importorskip("libtpu")


def mesh_on(name):
  return make_mesh(MeshConfig(1, -1, 1, 1), programs.topology(name))


def short(made, layers):
  """The plan of a model of so few layers, all over whole groups."""
  return dataclasses.replace(made, full=programs.cut(made.full, layers, 16))


@pytest.mark.parametrize(
  "name",
  [
    "v4:2x2x2",
    "v5e:2x2",
    "v5e:4x4",
    "v5e:4x8",
    "v5e:8x8",
    "v5e:16x16",
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:2x2x4",
    "v5p:2x4x4",
    "v5p:4x4x4",
    "v6e:2x2",
    "v6e:2x4",
    "v6e:4x4",
    "v6e:4x8",
    "v6e:8x8",
    "v6e:16x16",
  ],
)
def test_training_would_start_on_every_slice_with_the_default_mesh(name, monkeypatch):
  monkeypatch.setattr(packing, "SAMPLED", 64)  # chooses shapes sooner
  made = programs.make(
    from_command_line(["plan", "--config=configs/sct.py"]), name, lengths=mixture(64)
  )
  devices = list(made.mesh.devices.flat)
  assert made.mesh.size == len(programs.topology(name))
  held, groups = row_groups(made.mesh), batch_devices(made.mesh)
  assert all(shape.rows % groups == 0 for shape in made.shapes)
  assert held.keys() == {device.process_index for device in devices}
  assert {group for some in held.values() for group in some} == set(range(groups))


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize(
  "length, heads, kv_heads, size, causal",
  [
    (2576, 12, 2, 128, True),
    (6272, 16, 16, 64, False),
    (1025, 16, 16, 88, False),  # LLM, UMT, InternVideo2
  ],
)
def test_splash_attention_and_its_gradient_compile(name, length, heads, kv_heads, size, causal):
  mesh = mesh_on(name)

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((4, *shape), dtype, sharding=batch_sharding(mesh))

  q, kv = array(length, heads, size), array(length, kv_heads, size)

  def run(q, k, v, valid):
    return (
      attend(q, k, v, AttentionMask(causal, valid), implementation="splash")
      .astype(jnp.float32)
      .sum()
    )

  with jax.set_mesh(mesh), jax.default_matmul_precision(None):
    for function, kernels in ((run, 1), (jax.grad(run, (0, 1, 2)), 3)):
      compiled = jax.jit(function).lower(q, kv, kv, array(length, dtype=bool)).compile()
      assert compiled.as_text().count(KERNEL) == kernels
  # of queries; of keys and values
  assert hlo.read_costs(compiled.as_text()).kernels == {
    "splash forward": (1, 0),
    "splash gradient": (2, 0),
  }
  one = length * heads * size * 2
  # linear in the length: scores would take 100 times as much
  assert compiled.memory_analysis().temp_size_in_bytes < 40 * one


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize(
  "rows, length, context", [(4, 16640, 1), (8, 2577, 1), (2, 4160, 2)]
)  # 1, 2 and 1 rows a device
def test_splash_attention_of_several_samples_in_a_row_compiles(name, rows, length, context):
  mesh = make_mesh(MeshConfig(1, -1, 1, context), programs.topology(name))

  def array(*shape, dtype=jnp.bfloat16, split="context"):
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), split))
    return jax.ShapeDtypeStruct((rows, length, *shape), dtype, sharding=place)

  def run(q, k, v, sample):
    return (
      attend(q, k, v, AttentionMask(True, sample=sample), implementation="splash")
      .astype(jnp.float32)
      .sum()
    )

  with jax.set_mesh(mesh), jax.default_matmul_precision(None):
    for function, kernels in ((run, 1), (jax.grad(run, (0, 1, 2)), 3)):
      args = array(12, 128), array(2, 128), array(2, 128), array(dtype=jnp.int32, split=None)
      compiled = jax.jit(function).lower(*args).compile()
      # whose tables of blocks are made on the device
      assert compiled.as_text().count(KERNEL) == kernels
  assert compiled.memory_analysis().temp_size_in_bytes < 40 * length * 12 * 128 * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["v5e:1x1", "v6e:1x1"])
def test_programs_that_ask_compile_and_only_whole_sequences_reach_the_kernel(
  name, dtype, monkeypatch
):
  released = parts.sized(str(bench.RELEASED), dtype)
  # heads of the real size
  llm = dataclasses.replace(
    released.llm, layers=2, width=512, mlp_width=1024, heads=4, vocab_size=2048
  )
  cfg = dataclasses.replace(
    released, llm=llm, lp_comp=dataclasses.replace(released.lp_comp, schedule=(16, 9))
  )
  (device,), handed = programs.topology(name), []
  make = splash_attention_kernel.make_splash_mha

  def note(mask, **more):
    return handed.append(mask.shape) or make(mask, **more)

  monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", note)
  mesh = make_mesh(MeshConfig(1, 1, 1, 1), [device])

  def here(tree):
    return jax.tree.map(
      lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated(mesh)), tree
    )

  def compiled(run, *args):
    """Results as shapes, kernels in the compiled program, and the [L, S] of their masks."""
    handed.clear()
    traced = jax.jit(run).trace(*map(here, args))
    return (
      traced.out_info,
      traced.lower().compile(QUICK).as_text().count(KERNEL),
      [shape[-2:] for shape in handed],
    )

  with (
    absent.computing_on([device]),
    jax.set_mesh(mesh),
    jax.default_matmul_precision("highest" if dtype == "float32" else None),
  ):
    part = parts.prefill_part(cfg, 128, 14 + 96, real=False, room=8)
    state, kernels, masks = compiled(part.run, *part.args)
    # 14 + 128 x 16 + 96 in three blocks, and x 9 in two
    assert kernels == 2 and masks == [
      (2304, 2304),
      (1280, 1280),
    ]
    # one row against all keys
    assert compiled(parts.decode_function(cfg, 8), part.args[0], state)[1:] == (
      0,
      [],
    )
    cfg = parts.without_tower(cfg)
    graph, params = nnx.split(loading.abstract(cfg))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
    setting = dataclasses.replace(qc_comp.select_config("aligned", 64), layers=(0, 27))
    plan = qc_comp.plan_rounds(128, 8, setting)
    watch, score = rounds.scoring(graph, plan, setting, 1)
    features = jax.ShapeDtypeStruct((1, plan.frames // 8, 128, cfg.vision.width), dtype)
    caches, kernels, masks = compiled(watch, params, features)
    assert kernels == 1 and masks == [(2304, 2304)]  # of the last scored layer the keys are enough
    assert compiled(score, params, caches)[1:] == (0, [])  # the question's few rows


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_layer_of_the_tower_with_merging_compiles(name):
  config = from_command_line(
    [
      "plan",
      "--config=configs/sct.py",
      "--config.model.clips_per_chunk=2",
      "--config.train.batch_size=4",
    ]
  )
  made = short(programs.make(config, name, frames=16, text=512, effort=-1.0), 1)
  row = accounts.account_program(made, "tower")
  assert row.problem is None and not row.not_counted
  # A kernel for each of two clips on each of four devices: scores and values of 16 heads of 64, all
  # against all.
  assert row.in_kernels == 8 * 2 * 2 * 16 * 6272**2 * 64
  assert row.model < row.executed < 1.5 * row.model
  assert row.memory["temporaries"] < 1e9 and max(row.seconds.values()) > 0


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_two_layers_of_a_training_step_compile_and_are_accounted_for(name, tmp_path):
  (tmp_path / "config.json").write_text(
    json.dumps(
      {  # real head sizes; the rest small, which compiles sooner
        "hidden_size": 512,
        "intermediate_size": 1024,
        "mm_hidden_size": 1024,
        "mm_local_num_frames": 8,
        "vocab_size": 2048,
        "mm_projector_type": "tome16_mlp_hd64",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "umt-hd-large",
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
      }
    )
  )
  config = from_command_line(["plan", "--config=configs/sct.py", f"--config.init_from={tmp_path}"])
  config = dataclasses.replace(
    config, lp_comp=dataclasses.replace(config.lp_comp, schedule=(16, 9))
  )
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=4))
  made, said = programs.make(config, name, frames=128, text=512, effort=-1.0), []
  rows = plan.account_programs(made, ("gradient", "apply"), said.append)
  words = "\n".join(said)
  assert "all of it fits" in words and "bound by" in words and f"4 x {made.device.kind}" in words
  assert "1.00 x 4 rows of up to 1 samples" in words and "on features at least" in words
  gradient, apply = rows
  # Per layer a kernel forward, whose result is kept, and two for gradients: 2 + 3 + 4 products of
  # blocks.
  pairs = sum(n * n * (b + 1) / (2 * b) for n, b in ((2688, 3), (1792, 2)))
  assert gradient.in_kernels == 4 * 9 * 2 * 4 * 128 * pairs
  # read and written
  assert gradient.collectives and gradient.hbm > 2 * gradient.memory["gradients"]
  assert set(gradient.seconds) == {"compute", "memory", "links"}
  # likewise
  assert apply.model == 0 and apply.hbm >= 2 * apply.memory["optimizer state"]


def test_on_many_devices_kernels_are_gathered_and_not_multiplied_piece_by_piece():
  def config(samples):
    return from_command_line(
      ["plan", "--config=configs/sct.py", f"--config.train.batch_size={samples}"]
    )

  plans = [
    short(programs.make(config(samples), name, frames=256, text=512, effort=-1.0), 2)
    for name, samples in (("v5e:2x2", 4), ("v5e:4x4", 16))
  ]
  few, many = (accounts.account_program(made, "gradient", made.shapes[0]) for made in plans)
  # A device of either has the same work, a sample; of more devices it holds a smaller part of the
  # parameters.
  assert many.executed == pytest.approx(4 * few.executed, rel=0.01)
  assert many.hbm < 1.1 * few.hbm


def test_kernels_are_gathered_as_they_are_computed_with():
  made = short(
    programs.make(
      from_command_line(["plan", "--config=configs/sct.py"]),
      "v5e:4x4",
      frames=256,
      text=512,
      effort=-1.0,
    ),
    2,
  )
  llm, size = made.full.llm, 2  # bytes of bfloat16
  kernels = (
    llm.layers * llm.width * (2 * (llm.heads + llm.kv_heads) * llm.head_dim + 3 * llm.mlp_width)
  )
  _, gathered = accounts.account_program(made, "gradient", made.shapes[0]).collectives["all-gather"]
  # forth and back; the rest is projector and embeddings
  assert 1 < gathered / (2 * kernels * size * 15 / 16) < 1.5


@pytest.mark.parametrize("name", ("v4:2x2x1", "v5e:1x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"))
def test_the_compiler_has_as_much_memory_as_the_table_of_chips_says(name):
  mesh = mesh_on(name)
  # 120 GiB
  x = jax.ShapeDtypeStruct(
    (120 * 2**11, 1024, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refused:
    jax.jit(lambda x: x + 1).lower(x).compile()
  device = roofline.device_of(list(mesh.devices.flat))
  assert f"available HBM ({(device.hbm - device.reserve) / GIB:.2f}G)" in str(refused.value)
  assert accounts.refused_bytes(str(refused.value), 120 * GIB) == 120 * GIB  # the result


@pytest.mark.parametrize(
  "name, field, words",
  [
    ("v5e:3x5", "found", "not divisible"),
    ("v9:2x2", "found", "v9"),
    ("nonsense", "allowed", "h100"),
  ],
)
def test_a_topology_that_is_none_is_refused(name, field, words):
  with pytest.raises(programs.ConfigError) as caught:
    programs.topology(name)
  assert caught.value.fields["value"] == name and words in caught.value.fields[field]
  assert "v5e:2x2" in str(caught.value)
