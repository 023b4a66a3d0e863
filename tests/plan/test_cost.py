"""cost.py: operations, traffic and collectives are those that can be worked out by hand."""

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
from xcomp_jax.parallel.roofline import device_of
from xcomp_jax.plan import cost
from xcomp_jax.plan.cost import GIB, count_flops, read_program

P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def count(function, *args, causal=True, side=0):
  return count_flops(jax.make_jaxpr(function)(*args), lambda _: causal, side)


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
  apart = count(lambda x, y: (x @ y, x @ x), spec(8, 8), spec(8, 24), side=24)
  assert (apart.once, apart.total) == (2 * 8 * 8 * 24, 2 * 8 * 8 * 24 + 2 * 8**3)


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


def test_a_kernel_that_is_not_known_is_named():
  from jax.experimental import pallas as pl

  def double(x, out):
    out[...] = 2 * x[...]

  def run(x):
    return pl.pallas_call(double, out_shape=spec(8, 128), name="double")(x)

  assert count(run, spec(8, 128)).unknown == {"double"}


def program(function, *args, **options):
  return jax.jit(function, **options).lower(*args).compile().as_text()


def test_traffic_is_what_is_read_and_written_and_slices_of_a_loop_what_they_take():
  plain, _ = read_program(program(lambda x: 2 * x + 1, spec(1024, 1024)))
  assert plain.hbm == 2 * 4 * 1024**2 and not plain.collectives

  def step(c, w):
    return (jnp.tanh(c @ w), None)

  loop, _ = read_program(
    program(lambda x, w: jax.lax.scan(step, x, w)[0], spec(8, 256), spec(50, 256, 256))
  )
  once = 50 * 4 * 256 * 256
  assert once < loop.hbm < 5 * once  # and not 50 times


def test_collectives_count_bytes_sent_by_kind_and_trips(mesh):
  def each(x):  # [4, 8] of [8, 32]
    x = jax.lax.scan(lambda c, _: (jax.lax.psum(c, "fsdp") * 0.5, None), x, length=7)[0]
    return jax.lax.all_gather(x, "data"), jax.lax.ppermute(
      x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]
    )

  run = jax.shard_map(
    each,
    mesh=mesh,
    in_specs=P("data", "fsdp"),
    out_specs=(P(None, "data"), P("data", "fsdp")),
    check_vma=False,
  )
  sent = read_program(program(run, spec(8, 32)))[0].collectives
  size = 4 * 8 * 4
  assert sent["all-reduce"] == (7, 7 * 2 * size * 3 / 4)
  assert sent["all-gather"] == (1, size) and sent["collective-permute"] == (1, size)


def test_what_touches_the_vocabulary_is_told_apart(mesh):
  x = jax.ShapeDtypeStruct(
    (16, 4), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P(None, "fsdp"))
  )
  y = jax.ShapeDtypeStruct((24, 4), jnp.float32, sharding=x.sharding)
  whole = jax.sharding.NamedSharding(mesh, P())
  rest, words = read_program(
    program(lambda x, y: (x, y), x, y, out_shardings=(whole, whole)), side=24
  )
  assert rest.plus(words).collectives["all-gather"][1] == (16 + 24) * 4 * 3
  assert words.collectives["all-gather"] == (1, 24 * 4 * 3) and words.hbm > 0

  def scoped(x, w):
    with jax.named_scope("words"):
      return x @ w

  w = jax.ShapeDtypeStruct(
    (4, 16), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P("fsdp"))
  )
  rest, words = read_program(program(scoped, x, w, out_shardings=whole), scope="words")
  assert words.collectives["all-reduce"] == (1, 2 * 16 * 16 * 4 * 3 / 4) and not rest.collectives


TPU = """HloModule jit_step, is_scheduled=true

%start (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %c.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (p.1: bf16[8,128], q: bf16[32,128]) -> bf16[32,128] {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %gather.2 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%body (t: (s32[], bf16[8,128], bf16[32,128])) -> (s32[], bf16[8,128], bf16[32,128]) {
  %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %b = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %f = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kCustom, calls=%piece
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%i, %a, %f)
}

%condition (t.1: (s32[], bf16[8,128], bf16[32,128])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %j = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (x: bf16[8,128], y: f32[16,4]) -> f32[16,4] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[16,4]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %begin = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) fusion(%x), kind=kCustom, calls=%start
  %g = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begin), index=1
  %in = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %x, %g)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) while(%in), condition=%condition, body=%body
  ROOT %sum = f32[16,4]{1,0:T(8,128)} all-reduce(%y), channel_id=8, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
"""  # noqa: E501


def test_a_tpus_text_pieces_of_a_collective_are_one_and_vector_memory_is_no_traffic():
  traffic, _ = read_program(TPU)
  one = 8 * 128 * 2
  assert traffic.collectives == {"all-gather": (1, 3 * one), "all-reduce": (1, 2 * 16 * 4 * 4 / 2)}
  # Each of the 6 copies reads its operand from HBM; the sum reads and writes; what only passes a
  # piece is no traffic.
  assert traffic.hbm == 6 * one + 2 * 16 * 4 * 4


def chips(kind, *sizes, cores=1):
  points = [()]
  for size in sizes:
    points = [(*p, i) for p in points for i in range(size)]
  return [types.SimpleNamespace(device_kind=kind, coords=p) for p in points for _ in range(cores)]


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
  batch = batch_spec(Shape(1, 1, 16, 32, 48), ((16, cfg.vision.width), np.float32))

  def products():
    def loss(state, batch):
      return vlm.loss(nnx.merge(graph, state), batch).sum()

    return cost.count_flops(
      jax.make_jaxpr(jax.grad(loss))(state, batch), lambda shape: True
    ).products

  kept = products()
  monkeypatch.setattr(qwen2, "remat", jax.checkpoint)
  per_score = 4 * cfg.llm.heads * cfg.llm.head_dim
  lengths = [16 + 32 * count + 48 for count in lp_comp.counts(cfg.lp_comp, cfg.llm.layers)]
  assert products() - kept == per_score * sum(tiles.tiled_scores(n, n, True) for n in lengths)


GPU = r"""HloModule jit_step, is_scheduled=true

%branch.0 (a: (bf16[256,4,64], bf16[256,2,64])) -> bf16[256,4,64] {
  %a = (bf16[256,4,64]{2,1,0}, bf16[256,2,64]{2,1,0}) parameter(0)
  %q.1 = bf16[256,4,64]{2,1,0} get-tuple-element(%a), index=0
  %k.1 = bf16[256,2,64]{2,1,0} get-tuple-element(%a), index=1
  ROOT %t.1 = bf16[256,4,64]{2,1,0} custom-call(%q.1, %k.1, %k.1), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="x"}
}

%branch.1 (b: (bf16[256,4,64], bf16[256,2,64])) -> bf16[256,4,64] {
  %b = (bf16[256,4,64]{2,1,0}, bf16[256,2,64]{2,1,0}) parameter(0)
  ROOT %t.2 = bf16[256,4,64]{2,1,0} get-tuple-element(%b), index=0
}

ENTRY %main (q: bf16[256,4,64], k: bf16[256,2,64], m: s8[1,1,256], s: s32[]) -> bf16[256,4,64] {
  %q = bf16[256,4,64]{2,1,0} parameter(0)
  %k = bf16[256,2,64]{2,1,0} parameter(1)
  %m = s8[1,1,256]{2,1,0} parameter(2)
  %s = s32[] parameter(3)
  %f = (bf16[256,4,64]{2,1,0}, f32[4,256]{1,0}) custom-call(%q, %k, %k, %m), custom_call_target="mosaic_gpu_v2", metadata={op_name="{\"is_causal\":true}"}
  %o = bf16[256,4,64]{2,1,0} get-tuple-element(%f), index=0
  %r = f32[4,256]{1,0} get-tuple-element(%f), index=1
  %dq = bf16[256,4,64]{2,1,0} custom-call(%q, %k, %k, %o, %r, /*index=5*/%r), custom_call_target="mosaic_gpu_v2", metadata={op_name="{\"is_causal\":true}"}
  %dkv = (bf16[256,4,64]{2,1,0}, bf16[256,4,64]{2,1,0}) custom-call(%q, %k, %k, %o, %r), custom_call_target="mosaic_gpu_v2", metadata={op_name="{\"is_causal\":true}"}
  %z = (bf16[256,4,64]{2,1,0}, bf16[256,2,64]{2,1,0}) tuple(%q, %k)
  ROOT %c = bf16[256,4,64]{2,1,0} conditional(%s, %z, %z), branch_computations={%branch.0, %branch.1}
}
"""  # noqa: E501


def test_kernels_of_a_gpu_are_counted_in_the_compiled_program():
  square = 2 * 256 * 256 * 4 * 64  # operations of a product of all queries and keys
  found = cost.read_kernels(GPU)
  assert found["mosaic forward"] == (1, 2 * square / 2) and found["mosaic gradient"] == (
    2,
    (3 + 4) * square / 2,
  )
  assert found["triton forward"] == (0.5, 2 * square / 2)  # of two branches one runs
  assert cost.read_kernels(GPU.replace("mosaic_gpu_v2", "another")).keys() == {"triton forward"}
  cudnn = cost.read_kernels(
    GPU.replace("mosaic_gpu_v2", "__cudnn$fmhaSoftmax").replace('{\\"is_causal\\":true}', "")
  )
  assert cudnn["cudnn forward"] == (1, 2 * square)
