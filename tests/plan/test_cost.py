"""cost.py: operations are those that can be worked out by hand; and what devices do in a second."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from xcomp_jax.data.batch import Shape, batch_spec
from xcomp_jax.model import lp_comp, qwen2, tiles, vlm
from xcomp_jax.model.attention import AttentionMask, attend
from xcomp_jax.parallel import roofline
from xcomp_jax.parallel.chips import GIB
from xcomp_jax.parallel.roofline import device_of
from xcomp_jax.plan.cost import count_flops

P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def count(function, *args, causal=True):
  return count_flops(jax.make_jaxpr(function)(*args), lambda _: causal)


@pytest.mark.pure
def test_products_count_twice_loops_by_their_length_and_a_mesh_by_its_devices(mesh):
  def step(c, w):
    return (jnp.tanh(c @ w), None)

  assert (
    count(lambda x, w: jax.lax.scan(step, x, w)[0], spec(8, 16), spec(5, 16, 16)).total
    == 5 * 2 * 8 * 16 * 16
  )
  each = jax.shard_map(
    lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data", "fsdp"), check_vma=False
  )
  assert count(each, spec(8, 16)).total == 8 * 2 * 4 * 4 * 16  # also what devices do twice
  several = count(lambda x, y: (x @ y, x @ x), spec(8, 8), spec(8, 24))
  assert several.total == 2 * 8 * 8 * 24 + 2 * 8**3


@pytest.mark.pure
@pytest.mark.parametrize("length, blocks", [(1024, 1), (2048, 2), (2688, 3)])
def test_kernels_count_by_formula_and_of_causal_ones_the_blocks_that_are_visited(length, blocks):
  q, kv = spec(1, length, 4, 128, dtype=jnp.bfloat16), spec(1, length, 2, 128, dtype=jnp.bfloat16)

  def run(q, k, v):
    return attend(q, k, v, AttentionMask(True), implementation="splash").sum()

  square = 2.0 * 4 * length**2 * 128
  seen = (blocks + 1) / (2 * blocks)
  assert count(run, q, kv, kv).kernels == 2 * square * seen
  # Scores and values forward; again scores for the gradients of queries and of keys, and those of
  # weights, both times.
  assert count(jax.grad(run, (0, 1, 2)), q, kv, kv).kernels == (2 + 3 + 4) * square * seen
  assert count(run, q, kv, kv, causal=False).kernels == 2 * square


@pytest.mark.pure
def test_a_kernel_that_is_not_known_is_named():
  from jax.experimental import pallas as pl

  def double(x, out):
    out[...] = 2 * x[...]

  def run(x):
    return pl.pallas_call(double, out_shape=spec(8, 128), name="double")(x)

  assert count(run, spec(8, 128)).unknown == {"double"}


def chips(kind, *sizes, cores=1):
  points = [()]
  for size in sizes:
    points = [(*p, i) for p in points for i in range(size)]
  return [types.SimpleNamespace(device_kind=kind, coords=p) for p in points for _ in range(cores)]


@pytest.mark.pure
@pytest.mark.parametrize(
  "devices, hbm, flops, links",
  [
    (chips("TPU v5 lite", 1, 1, 1), 16 * GIB, 197e12, 0),
    (chips("TPU v5 lite", 2, 2, 1), 16 * GIB, 197e12, 2 * 50e9),
    (chips("TPU v5 lite", 16, 16, 1), 16 * GIB, 197e12, 4 * 50e9),
    (chips("TPU v6 lite", 4, 4, 1), 32 * GIB, 918e12, 2 * 100e9),
    (chips("TPU v5", 2, 2, 2), 96 * GIB, 459e12, 3 * 100e9),
    (chips("TPU v5", 4, 4, 8), 96 * GIB, 459e12, 6 * 100e9),
    (
      chips("TPU v4", 2, 2, 1, cores=2),
      16 * GIB,
      137.5e12,
      50e9,
    ),  # two devices of a chip have half of it each
  ],
)
def test_devices_have_their_share_of_a_chip_and_the_links_that_there_are(
  devices, hbm, flops, links
):
  found = device_of(devices)
  assert (found.hbm, found.flops, found.links, found.count) == (hbm, flops, links, len(devices))


@pytest.mark.pure
def test_time_is_the_largest_and_unknown_devices_have_none():
  device = device_of(chips("TPU v5 lite", 2, 2, 1))
  assert roofline.least_seconds(device, 197e12, 819e9 / 2, 1e9) == {
    "compute": 1.0,
    "memory": 0.5,
    "links": 0.01,
  }
  assert roofline.least_seconds(device_of(jax.devices()), 1e12, 1e9, 0) == {}


def test_what_attention_gave_is_not_computed_again_for_the_gradient(tiny, monkeypatch):
  cfg = tiny(attention="tiled", remat=True)
  graph, state = nnx.split(nnx.eval_shape(lambda: vlm.VLM(cfg, rngs=nnx.Rngs(0))))
  batch = batch_spec(
    Shape(rows=1, samples=1, prefix=16, frames=32, text=48), ((16, cfg.vision.width), np.float32)
  )

  def products():
    def loss(state, batch):
      return vlm.loss(nnx.merge(graph, state), batch).sum()

    return count(jax.grad(loss), state, batch).products

  kept = products()
  monkeypatch.setattr(qwen2, "remat", jax.checkpoint)
  per_score = 4 * cfg.llm.heads * cfg.llm.head_dim
  lengths = [16 + 32 * count + 48 for count in lp_comp.counts(cfg.lp_comp, cfg.llm.layers)]
  assert products() - kept == per_score * sum(tiles.tiled_scores(n, n, True) for n in lengths)
