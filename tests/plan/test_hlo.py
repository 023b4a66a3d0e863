"""hlo.py: traffic, collectives and kernels are those that can be worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xcomp_jax.plan.hlo import read_costs

pytestmark = pytest.mark.pure
P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def costs(function, *args, **options):
  return read_costs(jax.jit(function, **options).lower(*args).compile().as_text())


def test_traffic_is_what_is_read_and_written_and_slices_of_a_loop_what_they_take():
  plain = costs(lambda x: 2 * x + 1, spec(1024, 1024))
  assert plain.hbm == 2 * 4 * 1024**2 and not plain.collectives

  def step(c, w):
    return (jnp.tanh(c @ w), None)

  loop = costs(lambda x, w: jax.lax.scan(step, x, w)[0], spec(8, 256), spec(50, 256, 256))
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
  sent, size = costs(run, spec(8, 32)).collectives, 4 * 8 * 4
  assert sent["all-reduce"] == (7, 7 * 2 * size * 3 / 4)
  assert sent["all-gather"] == (1, size) and sent["collective-permute"] == (1, size)


def test_what_the_compiler_puts_in_is_counted_too(mesh):
  def array(*shape, split=(None, "fsdp")):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*split)))

  whole = NamedSharding(mesh, P())
  gathered = costs(lambda x, y: (x, y), array(16, 4), array(24, 4), out_shardings=(whole, whole))
  assert gathered.collectives["all-gather"][1] == (16 + 24) * 4 * 3 and gathered.hbm > 0
  summed = costs(
    lambda x, w: x @ w, array(16, 4), array(4, 16, split=("fsdp",)), out_shardings=whole
  )
  assert summed.collectives == {"all-reduce": (1, 2 * 16 * 16 * 4 * 3 / 4)}


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
  found, one = read_costs(TPU), 8 * 128 * 2
  assert found.collectives == {"all-gather": (1, 3 * one), "all-reduce": (1, 2 * 16 * 4 * 4 / 2)}
  # Each of the 6 copies reads its operand from HBM; the sum reads and writes; what only passes a
  # piece is no traffic.
  assert found.hbm == 6 * one + 2 * 16 * 4 * 4 and found.kernels == {}


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
  assert read_costs(GPU).kernels == {
    "mosaic forward": (1, 2 * square / 2),
    "mosaic gradient": (2, (3 + 4) * square / 2),
    "triton forward": (0.5, 2 * square / 2),  # of two branches one runs
  }
  other = GPU.replace("mosaic_gpu_v2", "another")
  assert read_costs(other).kernels.keys() == {"triton forward"}
  cudnn = GPU.replace("mosaic_gpu_v2", "__cudnn$fmhaSoftmax")
  found = read_costs(cudnn.replace('{\\"is_causal\\":true}', "")).kernels
  assert found["cudnn forward"] == (1, 2 * square)
