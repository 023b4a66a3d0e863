"""sharding.py: the mesh, the table from paths to axes, and what the compiler is told about
activations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from xcomp_jax.config import ConfigError, MeshConfig
from xcomp_jax.model.vlm import VLM
from xcomp_jax.parallel.mesh import (
  RuleError,
  batch_devices,
  batch_sharding,
  constrain,
  gathered,
  make_mesh,
  param_shardings,
  parameter_spec,
  parameter_table,
  path_name,
  split_axes,
  visual_sharding,
)

pytestmark = pytest.mark.pure


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(MeshConfig(2, 2, 2, 1))


def test_the_mesh_has_what_was_asked_and_minus_one_is_the_rest():
  assert dict(make_mesh(MeshConfig(2, -1, 2, 1)).shape) == {
    "data": 2,
    "fsdp": 2,
    "tensor": 2,
    "context": 1,
  }
  assert dict(make_mesh(MeshConfig(1, 1, -1, 1), jax.devices()[:3]).shape) == {
    "data": 1,
    "fsdp": 1,
    "tensor": 3,
    "context": 1,
  }
  assert batch_devices(make_mesh(MeshConfig(2, -1, 2, 1))) == 4


@pytest.mark.parametrize(
  "sizes, fields",
  [
    ((3, 1, 1), {"devices": 8}),
    ((4, 4, 1), {"devices": 8}),
    ((3, -1, 1), {"taken": 3, "devices": 8}),
    ((-1, -1, 1), {}),
    ((0, 8, 1), {}),
  ],
)
def test_a_mesh_that_does_not_match_the_devices_is_refused(sizes, fields):
  with pytest.raises(ConfigError) as caught:
    make_mesh(MeshConfig(*sizes, 1))
  if "taken" not in fields:
    fields = fields | {"sizes": dict(zip(("data", "fsdp", "tensor", "context"), (*sizes, 1)))}
  assert caught.value.fields == {"where": "config.mesh"} | fields


def test_a_mesh_that_does_not_match_says_what_would():
  with pytest.raises(
    ConfigError,
    match=r"data=3 x fsdp=1 x tensor=1 x context=1 = 3 devices, but there are 8; .*config\.mesh",
  ):
    make_mesh(MeshConfig(3, 1, 1, 1))


@pytest.mark.parametrize(
  "path, shape, spec",
  [
    ("llm/layers/3/q/kernel", (8, 8), P("fsdp", "tensor")),
    ("llm/layers/3/o/kernel", (8, 8), P("tensor", "fsdp")),
    ("llm/layers/3/down/kernel", (8, 8), P("tensor", "fsdp")),
    ("vision/blocks/0/attn/qkv/kernel", (8, 24), P("fsdp", "tensor")),
    ("vision/blocks/0/attn/q_bias", (8,), P("tensor")),
    ("vision/blocks/0/attn/proj/kernel", (8, 8), P("tensor", "fsdp")),
    ("vision/blocks/0/attn/proj/bias", (8,), P()),
    ("llm/embed/embedding", (8, 4), P(("tensor", "fsdp"), None)),
    ("llm/embed/embedding", (7, 4), P(None, "fsdp")),  # 2 does not divide 7: the width is split
    ("llm/norm/scale", (8,), P()),
    ("opt/1/0/mu/llm/lm_head/kernel", (8, 8), P(None, ("tensor", "fsdp"))),
    ("opt/1/0/mu/llm/lm_head/kernel", (8, 7), P("fsdp", None)),
    ("llm/layers/0/q/kernel", (7, 8), P(None, "tensor")),  # 2 does not divide 7
    ("llm/layers/0/q/kernel", (7, 9), P(None, None)),
  ],
)
def test_the_table_of_parameters(mesh, path, shape, spec):
  assert parameter_spec(path, shape, mesh) == spec


def test_a_parameter_without_a_rule_is_an_error(mesh):
  with pytest.raises(RuleError) as caught:
    parameter_spec("llm/gate_new/weight", (8, 8), mesh)
  assert caught.value.fields == {"where": "llm/gate_new/weight"}
  with pytest.raises(RuleError) as caught:
    parameter_spec("llm/layers/0/q/kernel", (8,), mesh)
  assert caught.value.fields == {
    "where": "llm/layers/0/q/kernel",
    "shape": (8,),
    "rule": ("embed", "heads"),
  }


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_of_the_model_has_a_rule_and_every_kernel_is_split(tiny, mesh, tied):
  import dataclasses

  cfg = tiny()
  cfg = tiny(llm=dataclasses.replace(cfg.llm, tied=tied))
  state = nnx.split(nnx.eval_shape(lambda: VLM(cfg, rngs=nnx.Rngs(0))))[1]
  shardings = param_shardings(state, mesh)
  for (path, leaf), sharding in zip(
    jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True
  ):
    if len(leaf.shape) > 1:
      assert np.prod(sharding.shard_shape(leaf.shape)) == np.prod(leaf.shape) / 4, path_name(path)


def test_the_printed_table_collapses_layers_and_adds_up(tiny, mesh):
  cfg = tiny()
  state = nnx.split(nnx.eval_shape(lambda: VLM(cfg, rngs=nnx.Rngs(0))))[1]
  lines = parameter_table(state, param_shardings(state, mesh)).splitlines()
  row = next(line.split() for line in lines if line.startswith("llm/layers/0..3/gate/kernel"))
  # 4 layers x 2,048 numbers / 4, in MiB
  assert row[1:] == [
    "32",
    "x",
    "64",
    "float32",
    "fsdp,",
    "tensor",
    "0.01",
  ]
  leaves = jax.tree.leaves(state)
  assert (
    f"{len(leaves)} arrays" in lines[-1] and f"{sum(x.size for x in leaves):,} numbers" in lines[-1]
  )
  assert not any(line.startswith("llm/layers/0/") for line in lines)


def test_constrain_splits_what_divides_and_is_nothing_without_a_mesh(mesh):
  x = jnp.zeros((4, 6, 8))
  assert constrain(x, "batch", None, "mlp") is x
  with jax.set_mesh(mesh):

    def spec(shape, *axes):
      return jax.jit(lambda x: constrain(x, *axes))(jnp.zeros(shape)).sharding.spec

    assert spec((4, 6, 8), "batch", None, "mlp") == P(("data", "fsdp"), None, "tensor")
    assert spec((2, 6, 8), "batch", None, "mlp") == P("data", None, "tensor")  # one of the two axes
    assert spec((4, 6, 7), "batch", None, "mlp") == P(("data", "fsdp"))
    with pytest.raises(KeyError):
      constrain(x, "rows")


def test_a_gathered_layer_is_whole_along_the_width_and_the_same(mesh):
  def mlp():
    return nnx.Dict(
      up=nnx.Linear(8, 16, rngs=nnx.Rngs(0)), down=nnx.Linear(16, 8, rngs=nnx.Rngs(1))
    )

  one = mlp()
  assert gathered(one, jnp.bfloat16) is one  # no mesh
  with jax.set_mesh(mesh):
    two = jax.jit(lambda m: gathered(m, jnp.bfloat16))(
      jax.device_put(mlp(), param_shardings(mlp(), mesh))
    )
  for name, before, after in (
    ("up", P("fsdp", "tensor"), P(None, "tensor")),
    ("down", P("tensor", "fsdp"), P("tensor")),
  ):
    kernel, was = two[name].kernel[...], one[name].kernel[...]
    assert (
      kernel.sharding.spec == after and parameter_spec(f"{name}/kernel", was.shape, mesh) == before
    )
    np.testing.assert_array_equal(kernel, was.astype(jnp.bfloat16))
    assert two[name].bias[...].dtype == jnp.float32  # nothing to gather


def test_two_axes_on_the_same_mesh_axis_are_refused_by_name(mesh):
  with jax.set_mesh(mesh), pytest.raises(RuleError) as caught:
    split_axes((None, "heads", "mlp"), (1, 8, 8))
  assert caught.value.fields == {"where": "tensor", "axes": ["heads", "mlp"]}
  with jax.set_mesh(mesh), pytest.raises(RuleError) as caught:
    jax.jit(lambda x: constrain(x, "batch", "embed"))(jnp.zeros((8, 8)))
  assert caught.value.fields == {"where": "fsdp", "axes": ["batch", "embed"]}


def test_parameters_are_split_over_context_too():
  mesh = make_mesh(MeshConfig(1, 2, 2, 2))
  assert parameter_spec("llm/layers/0/q/kernel", (8, 8), mesh) == P(("fsdp", "context"), "tensor")
  assert visual_sharding(mesh, (2, 4, 128, 8)).spec == P("fsdp", "context")


def test_constrain_is_nothing_inside_shard_map(mesh):
  @jax.jit
  @lambda f: jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
  def f(x):
    return constrain(x, "batch") + 1

  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(f(jnp.zeros(4)), 1)


def test_a_batch_is_split_over_data_and_fsdp(mesh):
  assert batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)
