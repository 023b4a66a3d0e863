"""Attention and whole programs compiled by the GPU compiler itself, without a GPU: `make
test-gpu-compile`, `make test-gpu-programs`.

Nothing is run: what is asked is whether it compiles, with which kernels, and in how much memory. A
process can compile for one
architecture only: the compiler of Mosaic's kernels goes on with that of its first.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xcomp_jax.config import MeshConfig
from xcomp_jax.config_io import from_command_line
from xcomp_jax.model import kernels
from xcomp_jax.model.attention import AttentionMask, attend
from xcomp_jax.model.kernel_calls import LIBRARY, compiles
from xcomp_jax.parallel import chips
from xcomp_jax.parallel.mesh import make_mesh
from xcomp_jax.plan import absent, hlo, plan, programs
from xcomp_jax.training import forecast

pytest.importorskip("jax_cuda13_plugin", reason="needs the CUDA packages: make test-gpu-compile")

CARDS = ("h100", "h200", "b200", "a100", "a10", "l4", "t4")
SHAPES = {  # slots, query heads, key heads, head size, causal, padded inside
  "448 px, 8 frames": (6272, 16, 16, 64, False, False),
  "448 px, 4 frames": (3136, 16, 16, 64, False, False),
  "224 px, 8 frames": (1568, 16, 16, 64, False, False),
  "InternVideo2": (1025, 16, 16, 88, False, False),
  "prefill": (16512, 12, 2, 128, True, True),
  "prefill after a prefix of 14": (16462, 12, 2, 128, True, True),
  "InternVideo2, half of its heads": (1025, 8, 8, 88, False, False),
  "images": (1039, 12, 2, 128, True, True),
  "7B": (4224, 28, 4, 128, True, True),
}
MARKS = {"mosaic": "mosaic_gpu", "triton": "__gpu$xla.gpu.triton", "cudnn": "__cudnn$fmhaSoftmax"}


def kernels_in(program) -> set[str]:
  """Which kernels a compiled program calls."""
  return {name for name, mark in MARKS.items() if mark in program.as_text()}


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CARDS)
def test_attention_compiles(kind, shape, gradient):
  (device,) = absent.gpus(kind)
  S, H, K, h, causal, padded = SHAPES[shape]
  card = kernels.card_of(device)
  dtype = jnp.dtype(kernels.compute_dtype(card, gradient=gradient))
  mesh = Mesh([device], ("x",), axis_types=(AxisType.Auto,))

  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

  def forward(q, k, v, m):
    return attend(q, k, v, AttentionMask(causal, m if padded else None))

  def total(*args):
    return forward(*args).astype(jnp.float32).sum()

  run = jax.grad(total, (0, 1, 2)) if gradient else forward
  precision = "highest" if dtype == jnp.float32 else None
  with absent.computing_on([device]), jax.set_mesh(mesh), jax.default_matmul_precision(precision):
    lowered = jax.jit(run).lower(
      array(1, S, H, h), array(1, S, K, h), array(1, S, K, h), array(1, S, dtype=bool)
    )
    program = lowered.compile()
  call = kernels.Call(
    batch=1,
    queries=S,
    keys=S,
    heads=H,
    kv_heads=K,
    size=h,
    dtype=str(dtype),
    causal=causal,
    mask="keys" if padded else None,
    gradient=gradient,
  )
  wanted = kernels.kernel_rule(card, kernels.library(), call)
  assert kernels_in(program) == {wanted} - {"xla_chunked"}
  # Kernels keep nothing but copies of what they are given; XLA's own keeps more, and its gradient
  # all of a part's scores.
  most = {"xla_chunked": 60 if gradient else 24}.get(wanted, 12)
  assert program.memory_analysis().temp_size_in_bytes < most * 4 * S * H * h


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("slots, heads, size", [(6272, 16, 64), (1025, 16, 88)])
@pytest.mark.parametrize("kind", ["h100", "b200", "a100", "l4"])
def test_attention_of_clips_by_cudnn_compiles(kind, slots, heads, size, gradient):
  """For two devices, each with its own clips. What cuDNN needs beside its results is not known
  without a GPU.
  """
  devices = absent.gpus(kind, 2)
  mesh = make_mesh(MeshConfig(1, 2, 1, 1), devices)
  x = jax.ShapeDtypeStruct(
    (4, slots, heads, size), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
  )

  def forward(q, k, v):
    return attend(q, k, v, AttentionMask(False), implementation="cudnn")

  def total(*args):
    return forward(*args).astype(jnp.float32).sum()

  with absent.computing_on(devices), jax.set_mesh(mesh):
    program = jax.jit(jax.grad(total, (0, 1, 2)) if gradient else forward).lower(x, x, x).compile()
  if gradient and slots % 2:  # which JAX refuses
    call = kernels.Call(
      batch=2,
      queries=slots,
      keys=slots,
      heads=heads,
      kv_heads=heads,
      size=size,
      dtype="bfloat16",
      causal=False,
      mask=None,
      gradient=True,
    )
    assert kernels_in(program) == {
      kernels.kernel_rule(kernels.card_of(devices[0]), kernels.library(), call)
    }
    return
  assert kernels_in(program) == {"cudnn"}
  square = 2 * 2 * slots * slots * heads * size
  found = hlo.read_costs(program.as_text())
  assert found.kernels.pop("cudnn forward") == (1, 2 * square) and found.kernels == (
    {"cudnn gradient": (1, 5 * square)} if gradient else {}
  )
  assert not found.collectives


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("slots, devices", [(16640, 1), (1039, 1), (4160, 4)])
@pytest.mark.parametrize("kind", CARDS)
def test_attention_of_several_samples_in_a_row_compiles(kind, slots, devices, gradient):
  cards = absent.gpus(kind, devices)
  card = kernels.card_of(cards[0])
  dtype = jnp.dtype(kernels.compute_dtype(card, gradient=True))  # only training has them
  mesh = make_mesh(MeshConfig(1, 1, 1, devices), cards)

  def array(*shape, dtype=dtype, split="context"):
    place = NamedSharding(mesh, PartitionSpec(None, split))
    return jax.ShapeDtypeStruct((1, slots, *shape), dtype, sharding=place)

  def forward(q, k, v, sample):
    return attend(q, k, v, AttentionMask(True, sample=sample), implementation="flash")

  def total(*args):
    return forward(*args).astype(jnp.float32).sum()

  run = jax.grad(total, (0, 1, 2)) if gradient else forward
  precision = "highest" if dtype == jnp.float32 else None
  with absent.computing_on(cards), jax.set_mesh(mesh), jax.default_matmul_precision(precision):
    args = array(12, 128), array(2, 128), array(2, 128), array(dtype=jnp.int32, split=None)
    program = jax.jit(run).lower(*args).compile()
  call = kernels.Call(
    batch=1,
    queries=slots // devices,
    keys=slots,
    heads=12,
    kv_heads=2,
    size=128,
    dtype=str(dtype),
    causal=devices == 1,
    mask="ranges",
    gradient=gradient,
  )
  wanted = kernels.kernel_rule(card, kernels.library(), call)
  assert kernels_in(program) == {wanted} - {"xla_chunked"}
  # A mask of all rows and keys would be 277 MB at 16,640 slots; Triton's gradient has one of a
  # strip and all keys.
  strip = (
    min(slots, LIBRARY.strip)
    * slots
    * {"mosaic": 0, "triton": 4, "xla_chunked": 12 * 4 * 8}[wanted]
  )
  assert program.memory_analysis().temp_size_in_bytes < 12 * 4 * slots * 12 * 128 + strip


@pytest.mark.parametrize("size", kernels.SIZES)
@pytest.mark.parametrize(
  "kind, dtype",
  [
    *(
      (kind, dtype)
      for kind in ("h100", "b200", "a100", "l4")
      for dtype in (jnp.bfloat16, jnp.float16)
    ),
    *((kind, jnp.float32) for kind in ("a100", "l4")),
  ],
)
def test_the_rules_say_what_compiles(kind, dtype, size):
  """The kernel of `kernels.kernel_rule` compiles, and nothing better does, as trying all of them
  shows.
  """
  (device,) = absent.gpus(kind)
  card = kernels.card_of(device)
  for gradient in (False, True):
    call = kernels.Call(
      batch=4,
      queries=1152,
      keys=1152,
      heads=4,
      kv_heads=2,
      size=size,
      dtype=jnp.dtype(dtype).name,
      causal=True,
      mask="keys",
      gradient=gradient,
    )
    with (
      absent.computing_on([device]),
      jax.default_matmul_precision("highest" if dtype == jnp.float32 else None),
    ):
      wanted = kernels.kernel_rule(card, kernels.library(), call)
      for mask in ("keys", "ranges"):
        assert wanted == "xla_chunked" or compiles(wanted, dataclasses.replace(call, mask=mask))
      if (kind, gradient) != ("b200", True):  # where one that compiles, in a minute, is not taken
        assert kernels.choose_kernel(card, "unknown", call, compiles) == wanted


def compiled(kind: str, name: str, mesh: MeshConfig, devices: int, frames: int, text: int):
  """Compiles a program of SCT of the 2B model at 448 px, two layers of it, on samples that fill a
  row each.
  """
  config = from_command_line(
    ["plan", "--config=configs/sct.py", f"--config.train.batch_size={devices}"]
  )
  config, like = dataclasses.replace(config, mesh=mesh), forecast.chips(kind, devices)
  made = programs.make(
    config, absent.gpus(kind, devices), layers=2, frames=frames, text=text, like=like
  )
  ((_, shape),) = programs.asked_programs(made, (name,))
  with programs.inside(made):
    return (
      programs.trace_program(made, programs.cut(made.full, 2, 16), name, shape)[0].lower().compile()
    )


@pytest.mark.parametrize("kind", CARDS)
def test_a_plan_says_what_a_card_has_to_do(kind):
  config = from_command_line(["plan", "--config=configs/sct.py", "--config.train.batch_size=2"])
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, dtype="float32" if kind == "t4" else "bfloat16"),
  )
  said = []
  made = programs.make(config, f"{kind}:2", layers=1, frames=256, text=96)
  prefill, scoring = plan.account_programs(made, ("prefill", "round"), said.append)
  assert (
    prefill.of == 28
    and prefill.hbm > 0
    and prefill.seconds["links"] > 0
    and scoring.memory["parameters"] > 0
  )
  calls = [sum(row.kernels.values()) for row in (prefill, scoring)]
  assert calls == [0, 0] if kind == "t4" else calls[0] == 28 and calls[1] > 0
  assert chips.named(kind).gpu.model in said[0] and said[-1] == "all of it fits"


@pytest.mark.parametrize("name", ["gradient", "prefill", "tower"])
@pytest.mark.parametrize("kind", ["h100", "a100", "h200"])
def test_programs_of_two_layers_compile(kind, name):
  program = compiled(kind, name, MeshConfig(1, 1, 1, 1), 1, frames=256, text=96)
  assert kernels_in(program) == {"triton" if kind == "a100" else "mosaic"}
  assert program.memory_analysis().temp_size_in_bytes < 3e9


@pytest.mark.parametrize("kind", ["h100"])
@pytest.mark.parametrize("name", ["gradient", "prefill"])
def test_programs_of_sequences_that_are_split_over_gpus_compile(name, kind):
  program = compiled(kind, name, MeshConfig(1, 2, 1, 2), 4, frames=512, text=512)
  assert kernels_in(program) == {"mosaic"}
