"""Attention: implementations against the oracle, and what reaches the kernels of which device."""

import dataclasses
import functools
import sys

import cards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)

from xcomp_jax.bench import bench, parts
from xcomp_jax.config import ConfigError, MeshConfig
from xcomp_jax.model import attention, kernels, layout, splash, tiles
from xcomp_jax.model.attention import AttentionMask, attend
from xcomp_jax.model.kernel_calls import Library, compiles, prepare_tokamax
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.model.splash import attend_splash
from xcomp_jax.parallel.mesh import make_mesh
from xcomp_jax.plan import absent

LENGTHS = (1, 7, 8, 14, 127, 128, 129, 255, 256, 257, 300)
# tokens of a clip: 224 px with 4 frames, InternVideo2, 224/8, 448/4, 448/8
CLIPS = (
  784,
  1025,
  1568,
  3136,
  6272,
)
# slots of the LLM after a prefix of 14
FILMS = (
  14 + 8 * 16 + 96,
  14 + 256 * 16 + 96,
  14 + 1024 * 16 + 64,
)


def close(got, want):
  """Within 1e-5 of the largest absolute value."""
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


# --- which kernel
# --------------------------------------------------------------------------------------------------


def rule(kind, version, call, **changes):
  return kernels.kernel_rule(
    kernels.card_of(cards.gpu(kind)), version, dataclasses.replace(call, **changes)
  )


@pytest.mark.pure
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("version", kernels.TRIED)
def test_the_kernel_of_each_card_is_one_that_compiles_for_it(version, gradient):
  # docs/LOG.md has the table of what compiled, forward and gradient.
  for call in (cards.LLM, cards.CLIP, dataclasses.replace(cards.CLIP, size=88)):

    def of(kind, **changes):
      return rule(kind, version, call, gradient=gradient, **changes)  # noqa: B023

    assert of("h200") == of("h100") == "mosaic"
    assert of("a100") == of("a10") == of("l4") == "triton"
    assert of("b200") == ("triton" if version == "0.0.12" and gradient else "mosaic")
    assert of("t4") == of("t4", dtype="float32") == "xla_chunked"
    assert (
      of("h100", dtype="float32")
      == of("a100", dtype="float32")
      == of("b200", dtype="float32")
      == "triton"
    )


@pytest.mark.pure
@pytest.mark.parametrize(
  "size, forward, backward",
  [(64, "triton", "triton"), (88, "xla_chunked", "xla_chunked"), (128, "triton", "xla_chunked")],
)
def test_float32_blocks_of_triton_must_fit_into_shared_memory(size, forward, backward):
  def of(gradient):
    return rule("l4", "0.0.12", cards.CLIP, size=size, dtype="float32", gradient=gradient)

  assert (of(False), of(True)) == (forward, backward)


@pytest.mark.pure
def test_few_rows_on_a_b200_are_not_split_by_their_keys():
  def of(**changes):
    return rule("b200", "0.0.17", cards.CLIP, **changes)

  assert (
    of(batch=1, heads=8, queries=1025, keys=1025) == "triton"
    and of(batch=4, heads=8, queries=1025, keys=1025) == "mosaic"
  )
  assert of(batch=1, heads=1, causal=True) == of(batch=1, heads=1, mask="ranges") == "mosaic"
  # no rule knows heads of 96
  few = dataclasses.replace(cards.CLIP, batch=1, heads=2, size=96, queries=1792, keys=1792)
  card = kernels.card_of(cards.gpu("b200"))
  assert (
    kernels.choose_kernel(card, "0.0.12", few, lambda *_: True)
    == kernels.choose_kernel(card, "0.0.13", few, lambda *_: True)
    == "triton"
  )
  assert (
    kernels.choose_kernel(card, "0.0.13", dataclasses.replace(few, batch=8), lambda *_: True)
    == "mosaic"
  )
  assert (
    kernels.choose_kernel(
      card, "0.0.13", dataclasses.replace(few, dtype="float32"), lambda *_: False
    )
    == "xla_chunked"
  )


@pytest.mark.pure
def test_gpus_that_are_not_nvidias_get_no_kernel():
  card = kernels.card_of(cards.Device("rocm", "AMD Instinct MI300X", "gfx942"))
  assert card.platform == "gpu" and card.capability is None and card.bfloat16
  assert kernels.kernel_rule(card, "0.0.12", cards.CLIP) == "xla_chunked"


@pytest.mark.pure
@pytest.mark.parametrize(
  "kind, version, of_card, of_call",
  [
    ("h100", "0.0.13", {}, {}),
    ("h100", "0.1.0", {}, {}),
    ("a100", "0.0.17", {}, {"size": 96}),
    ("b200", "0.0.17", {"capability": (10, 3)}, {}),
    ("b200", "0.0.17", {"capability": (12, 0)}, {}),
  ],
)
def test_what_no_rule_knows_is_tried(kind, version, of_card, of_call):
  call = dataclasses.replace(cards.CLIP, gradient=True, **of_call)
  card = kernels.card_of(cards.gpu(kind, **of_card))
  asked, answers = [], {"mosaic": False, "triton": True}

  def compiles(kernel, call):
    asked.append((kernel, call))
    return answers[kernel]

  tried = ["mosaic", "triton"] if (9, 0) <= card.capability < (11, 0) else ["triton"]
  assert kernels.choose_kernel(card, version, call, compiles) == "triton" and asked == [
    (kernel, call) for kernel in tried
  ]
  answers["triton"] = False
  assert kernels.choose_kernel(card, version, call, compiles) == "xla_chunked"
  answers["mosaic"] = True
  assert kernels.choose_kernel(card, version, call, compiles) == (
    "mosaic" if "mosaic" in tried else "xla_chunked"
  )
  assert (
    kernels.choose_kernel(card, version, dataclasses.replace(call, dtype="float32"), compiles)
    == "xla_chunked"
  )


def test_trying_compiles_forward_and_gradient_once_and_apart_from_what_is_being_traced(caplog):
  forward = dataclasses.replace(cards.CLIP, batch=1, queries=30, keys=30, size=8, mask="keys")
  backward = dataclasses.replace(forward, gradient=True)

  @jax.custom_vjp
  def only_forward(q, k, v):
    return q

  def refuse(*_):
    # or nothing, as an assert does: then the kind of error is said
    raise ValueError("exceeds\nshared memory")

  only_forward.defvjp(refuse, refuse)

  class OnlyForward(cards.FakeKernels):
    def masked(self, kernel, q, k, v, mask, causal):
      self.handed.append((kernel, q.shape, k.shape, mask.shape, causal))
      return only_forward(q, k, v)

  library = OnlyForward()
  asked = functools.partial(compiles, "mosaic", library=library)

  @jax.jit
  def traced(x):
    assert asked(forward) and asked(forward) and not asked(backward)
    return x + 1

  assert traced(1) == 2
  padded = (1, 128, 16, 8)
  assert library.handed == [("mosaic", padded, padded, (1, 1, 1, 128), False)] * 2
  (said,) = (record.getMessage() for record in caplog.records)
  assert "mosaic does not compile" in said and "ValueError: exceeds shared memory" in said


# --- what reaches it
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "kind, version",
  [
    *((kind, "0.0.12") for kind in ("h200", "h100", "b200", "a100", "l4", "t4")),
    ("b200", "0.0.17"),
  ],
)
def test_no_kernel_sees_a_length_that_is_not_whole_or_padding_without_a_mask(kind, version):
  library = cards.FakeKernels(installed=version, computes=False)
  dtype = jnp.float32 if kind == "t4" else jnp.bfloat16
  calls = [(length, causal) for length in range(1, 301) for causal in (True, False)]
  calls += [(length, False) for length in CLIPS] + [(length, True) for length in FILMS]

  def array(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct((16, *shape), dtype)

  args = [
    (array(n, 12, 128), array(n, 2, 128), array(n, dtype=bool))
    if causal
    else (array(n, 16, 64),) * 2
    for n, causal in calls
  ]

  def every(args):
    def run(q, k, *valid):
      mask = AttentionMask(bool(valid), *valid)
      return attend(q, k, k, mask, implementation="flash", library=library)

    return [run(*each) for each in args]

  with absent.computing_on([cards.gpu(kind)]):
    out = jax.eval_shape(every, args)
  assert [(x.shape, x.dtype) for x in out] == [(q.shape, dtype) for q, *_ in args]
  wanted = {"a100": "triton", "a10": "triton", "l4": "triton", "t4": "xla_chunked"}.get(
    kind, "mosaic"
  )
  block = {"xla_chunked": 1}.get(wanted, 256 if (kind, version) == ("b200", "0.0.12") else 128)
  for (length, causal), (kernel, rows, keys, mask, was_causal) in zip(
    calls, library.handed, strict=True
  ):
    whole = -(-length // block) * block
    assert (kernel, was_causal, rows[1], keys[1]) == (wanted, causal, whole, whole)
    assert mask == (None if whole == length and not causal else (16 if causal else 1, 1, 1, whole))


def test_a_whole_clip_reaches_the_kernel_as_it_is():
  library = cards.FakeKernels(computes=False)
  x = jax.ShapeDtypeStruct((4, 6272, 16, 64), jnp.bfloat16)
  with absent.computing_on([cards.gpu("h100")]):
    program = jax.make_jaxpr(
      lambda x: attend(x, x, x, AttentionMask(causal=False), library=library)
    )(x)
  assert library.handed == [("mosaic", x.shape, x.shape, None, False)] and "pad" not in str(program)


def test_cudnn_has_what_it_can_say_and_no_more():
  library = cards.FakeKernels(computes=False)

  def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, *shape), dtype)

  def run(q, k, valid, causal):
    mask = AttentionMask(causal, valid)
    return attend(q, k, k, mask, implementation="cudnn", library=library)

  with absent.computing_on([cards.gpu("h100")]):
    jax.eval_shape(lambda x: run(x, x, None, False), array(1025, 16, 88))
    jax.eval_shape(
      lambda q, k, valid: run(q, k, valid, True),
      array(1100, 4, 64),
      array(1100, 2, 64),
      array(1100, dtype=bool),
    )
    taken = kernels.kernels_taken(
      parts.sized(str(bench.RELEASED), "bfloat16", attention="cudnn"), installed=lambda: "0.0.12"
    )
    assert taken == {"tower": "cudnn", "LLM": "mosaic of tokamax 0.0.12"}
  clip = 2, 1025, 16, 88
  assert library.handed[0] == ("cudnn", clip, clip, None, False)
  assert [(how, q[1]) for how, q, *_ in library.handed[1:]] == [("mosaic", 1152)]

  def unusable(kind, dtype):
    return kernels.unusable("cudnn", kernels.card_of(cards.gpu(kind)), None, dtype) or ""

  assert (
    not unusable("a100", "bfloat16")
    and "8.0 and more" in unusable("t4", "bfloat16")
    and "no float32" in unusable("h100", "float32")
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_reaches_the_tpu_kernel_is_whole_and_padding_a_segment_of_its_own(dtype, monkeypatch):
  handed = []

  def make(mask, *, block_sizes, **_):
    def run(q, k, v, segment_ids):
      handed.append(
        (
          mask.shape,
          q.shape,
          k.shape,
          block_sizes,
          segment_ids.q.shape,
          segment_ids.kv.shape,
          q.dtype,
        )
      )
      return q

    return run

  monkeypatch.setattr(splash_attention_kernel, "make_splash_mha", make)
  lengths = (*range(1, 301), *CLIPS, *FILMS)
  args = [
    (jax.ShapeDtypeStruct((1, n, 4, 64), dtype), jax.ShapeDtypeStruct((1, n, 2, 64), dtype))
    for n in lengths
  ]

  def run(q, k):
    return attend(q, k, k, AttentionMask(q.shape[1] not in CLIPS), implementation="splash")

  with absent.computing_on([cards.V5E]):
    jax.eval_shape(lambda args: [run(*each) for each in args], args)
  for length, (mask, q, k, blocks, *segments, computed) in zip(lengths, handed, strict=True):
    whole = q[1]
    assert (
      mask == (4, whole, whole)
      and k[1] == whole
      and segments == [(whole,), (whole,)]
      and computed == dtype
    )
    assert whole % 128 == 0 and 0 <= whole - length < max(128, length / 4)
    for size in (
      blocks.block_q,
      blocks.block_kv,
      blocks.block_q_dkv,
      blocks.block_kv_dkv,
      blocks.block_q_dq,
      blocks.block_kv_dq,
    ):
      assert size % 128 == 0 and whole % size == 0 and size <= 1024


@pytest.mark.parametrize(
  "kind, version, kernel",
  [("h100", "0.0.12", "mosaic"), ("b200", "0.0.12", "mosaic"), ("t4", "0.0.12", "xla_chunked")],
)
def test_numbers_and_gradients_of_any_length_by_exactly_what_is_handed(kind, version, kernel):
  library = cards.FakeKernels(installed=version)
  if kernel == "xla_chunked":  # which is plain XLA, and runs here
    library = Library()

  def run(how, length, causal):
    q, k, v = (
      jax.random.normal(jax.random.key(i), (3, length, heads, 8))
      for i, heads in enumerate((4, 2, 2))
    )
    # All of it; a hole after the first half, as behind a prefix; nothing valid in the first slots,
    # as where there is no prefix.
    slots, half = jnp.arange(length), length // 2
    valid = jnp.stack(
      [slots >= 0, (slots < half - 2) | (slots >= half), slots >= min(5, length - 1)]
    )
    mask = AttentionMask(causal, valid if causal else None)

    def shown(q, k, v):
      out = attend(q, k, v, mask, implementation=how, library=library)
      return jnp.where(valid[:, :, None, None] if causal else True, out, 0)

    return shown(q, k, v), jax.grad(lambda *args: jnp.sin(shown(*args)).sum(), (0, 1, 2))(q, k, v)

  def every(how):
    return [run(how, length, causal) for length in LENGTHS for causal in (True, False)]

  with absent.computing_on([cards.gpu(kind)]):
    got = jax.jit(lambda: every(kernel))()
  jax.tree.map(close, got, jax.jit(lambda: every("einsum"))())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["xla_chunked", "tiled", "auto"])
def test_attention_in_pieces_equals_the_oracle(causal, implementation):
  # more than a tile, no multiple of one; auto is in pieces from 1,024
  slots = 1100 if implementation == "auto" else 600
  q, k, v = (
    jax.random.normal(jax.random.key(i), (2, slots, heads, 8)) for i, heads in enumerate((4, 2, 2))
  )
  valid = jnp.arange(slots) < jnp.array([[slots], [317]])

  def run(how):
    return lambda q, k, v: attend(q, k, v, AttentionMask(causal, valid), implementation=how)

  close(run(implementation)(q, k, v), run("einsum")(q, k, v))

  def grads(how):
    return jax.grad(lambda *a: jnp.sin(run(how)(*a)).sum(), (0, 1, 2))(q, k, v)

  jax.tree.map(close, grads(implementation), grads("einsum"))


@pytest.mark.parametrize("causal", [True, False])
def test_scores_far_above_those_of_the_last_tile(causal):
  q, k, v = (jax.random.normal(jax.random.key(i), (1, 900, 2, 8)) for i in range(3))
  k = k.at[:, 5].multiply(300)  # e to the hundreds times the weight of others: no number of float32
  run = jax.jit(
    lambda how: attend(q, k, v, AttentionMask(causal), implementation=how), static_argnums=0
  )
  close(run("tiled"), run("einsum"))


@pytest.mark.parametrize("causal", [True, False])
def test_the_tpu_kernel_equals_the_oracle(causal):
  slots = 1300  # in two blocks of 768
  q, k, v = (
    jax.random.normal(jax.random.key(i), (2, slots, heads, 8)) for i, heads in enumerate((4, 2, 2))
  )
  valid = jnp.arange(slots) < jnp.array([[slots], [317]])

  def kernel(q, k, v):
    return attend_splash(q, k, v, causal=causal, valid=valid, interpret=True)

  def oracle(q, k, v):
    return attend(q, k, v, AttentionMask(causal, valid), implementation="einsum")

  def shown(out):
    return jnp.where(valid[:, :, None, None], out, 0)  # rows of padding are garbage

  close(shown(kernel(q, k, v)), shown(oracle(q, k, v)))

  def grads(how):
    return jax.grad(lambda *a: jnp.sin(shown(how(*a))).sum(), (0, 1, 2))(q, k, v)

  jax.tree.map(close, grads(kernel), grads(oracle))


@pytest.mark.parametrize("kv_heads", [2, 1])  # of which a tensor axis of two splits one
def test_kernels_run_on_every_device_of_a_mesh(kv_heads):
  q, k, v = (
    jax.random.normal(jax.random.key(i), (4, 500, heads, 8))
    for i, heads in enumerate((4, kv_heads, kv_heads))
  )
  valid = jnp.arange(500) < jnp.array([[500], [317], [500], [1]])
  run = jax.jit(
    lambda how: attend(q, k, v, AttentionMask(True, valid), implementation=how), static_argnums=0
  )
  alone = run("einsum")
  with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2, 1))):
    program = jax.jit(
      lambda q, k, v: attend(q, k, v, AttentionMask(True, valid), implementation="xla_chunked")
    )
    close(program(q, k, v), alone)
    # no device has it all
    assert "4,500,4,8" not in program.lower(q, k, v).compile().as_text().split("ENTRY")[0]


def test_a_gpu_without_the_kernel_library_still_attends(monkeypatch):
  q, k = (
    jax.random.normal(jax.random.key(0), (1, 1100, 2, 8)),
    jax.random.normal(jax.random.key(1), (1, 1100, 1, 8)),
  )
  oracle = attend(q, k, k, AttentionMask(True), implementation="einsum")
  monkeypatch.setitem(sys.modules, "tokamax", None)
  with (
    absent.computing_on([cards.gpu("h100")]),
    pytest.warns(UserWarning, match="pip install tokamax"),
  ):
    library = cards.FakeKernels(installed=None)
    got = jax.jit(lambda: attend(q, k, k, AttentionMask(True), library=library))()
  close(got, oracle)


@pytest.mark.parametrize("implementation", ["einsum", "tiled", "xla_chunked"])
def test_rows_after_a_sequence_attend_as_within_it(implementation):
  q, k, v = (
    jax.random.normal(jax.random.key(i), (1, 700, heads, 8)) for i, heads in enumerate((4, 2, 2))
  )
  whole = attend(q, k, v, AttentionMask(True), implementation="einsum")
  close(
    attend(q[:, 400:], k, v, AttentionMask(True), implementation=implementation), whole[:, 400:]
  )


@pytest.mark.pure
def test_kernels_need_their_library():
  library = cards.FakeKernels(installed=None)
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(ShapeError) as caught:
    attend(x, x, x, AttentionMask(True), implementation="xla_chunked", library=library)
  assert caught.value.fields == {
    "where": "implementation",
    "value": "xla_chunked",
    "missing": "tokamax",
  }


@pytest.mark.pure
def test_an_implementation_that_nobody_knows_is_refused():
  x = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(ShapeError) as caught:
    attend(x, x, x, AttentionMask(True), implementation="flush")
  assert caught.value.fields == {
    "where": "implementation",
    "value": "flush",
    "allowed": attention.IMPLEMENTATIONS,
  }


@pytest.mark.pure
def test_causal_attention_of_more_rows_than_keys_is_refused():
  q, k = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 3, 2, 8))
  with pytest.raises(ShapeError) as caught:
    attend(q, k, k, AttentionMask(True))
  assert caught.value.fields == {"where": "mask.causal", "queries": 4, "keys": 3}


# --- several samples in a row
# --------------------------------------------------------------------------------------

# Prefix, visual tokens and text of the samples of a row; its parts have room for 4 x 8, 150 and 118
# slots.
ROWS = (
  ((7, 90, 30), (0, 0, 0), (5, 41, 20), (0, 0, 55)),
  ((8, 150, 118), (0, 0, 0), (0, 0, 0), (0, 0, 0)),
  ((0, 0, 0),) * 4,
  ((0, 0, 40), (3, 100, 2), (0, 0, 35), (5, 20, 3)),
)


def slots_of(samples, prefix, visual, text):
  """Which sample each slot of a row belongs to: prefixes in places of their own, then visual
  tokens, then texts.
  """
  number = np.arange(len(samples), dtype=np.int32)
  before, tokens, after = np.transpose(samples)
  own = np.where(np.arange(prefix) < before[:, None], number[:, None], -1).ravel()
  parts = (
    np.pad(np.repeat(number, lengths), (0, room - lengths.sum()), constant_values=-1)
    for lengths, room in ((tokens, visual), (after, text))
  )
  return np.concatenate([own, *parts])


SAMPLE = np.stack([slots_of(row, 8, 150, 118) for row in ROWS])  # [4, 300]


def queries_keys_values():
  shapes = [(*SAMPLE.shape, heads, 8) for heads in (4, 2, 2)]
  return [np.array(jax.random.normal(jax.random.key(i), shape)) for i, shape in enumerate(shapes)]


def with_gradient(run, shown=SAMPLE >= 0):
  """A function of q, k and v: what `run` gives, 0 where it is not shown, and the gradient of
  that.
  """

  def out(*args):
    return jnp.where(shown[:, :, None, None], run(*args), 0)

  return jax.jit(
    lambda *args: (out(*args), jax.grad(lambda *a: jnp.sin(out(*a)).sum(), (0, 1, 2))(*args))
  )


def small_blocks(length):
  """As `splash.block_sizes`: a short row has several."""
  return 128, -(-length // 128) * 128


def together(how, sample=SAMPLE):
  """A function of q, k and v by tiles, blocks and strips of which a short row has several."""
  mask = AttentionMask(True, sample=jnp.asarray(sample))
  if how == "tiled":
    return functools.partial(tiles.attend_samples, sample=mask.sample, tile=64)
  if how == "splash":
    return functools.partial(
      attend_splash, causal=True, sample=mask.sample, sizes=small_blocks, interpret=True
    )
  library = Library(strip=128) if how == "xla_chunked" else cards.FakeKernels(strip=128)
  return lambda q, k, v: attend(q, k, v, mask, implementation=how, library=library)


@functools.cache
def alone():
  """Every sample by itself, in an array of its own."""

  def run(q, k, v):
    out = jnp.zeros(q.shape)
    for row, ids in enumerate(SAMPLE):
      for number in set(ids.tolist()) - {-1}:
        at = np.nonzero(ids == number)[0]
        one = attend(
          *(x[None, row, at] for x in (q, k, v)), AttentionMask(True), implementation="einsum"
        )
        out = out.at[row, at].set(one[0])
    return out

  return with_gradient(run)(*queries_keys_values())


@pytest.mark.parametrize("implementation", ["einsum", "tiled", "xla_chunked", "mosaic", "splash"])
def test_samples_of_a_row_attend_as_if_alone_and_do_not_feel_their_neighbours(
  implementation,
):
  program, arrays = with_gradient(together(implementation)), queries_keys_values()
  got = program(*arrays)
  jax.tree.map(close, got, alone())
  assert not any(gradient[SAMPLE < 0].any() for gradient in got[1])
  mine = SAMPLE == 2
  loud = program(*(np.where(mine[:, :, None, None], x, 1e6 * x) for x in arrays))
  for quiet, x in zip(jax.tree.leaves(got), jax.tree.leaves(loud), strict=True):
    np.testing.assert_array_equal(x[mine], quiet[mine])
    assert np.isfinite(x).all()


def test_tiles_and_the_tpu_kernel_get_what_attend_gets():
  q, k, v = (jnp.asarray(x) for x in queries_keys_values())
  sample, valid = jnp.asarray(SAMPLE), jnp.asarray(SAMPLE >= 0)

  def program(run):
    return str(jax.make_jaxpr(run)(q, k, v))

  for mask in (
    AttentionMask(True, valid),
    AttentionMask(False, valid),
    AttentionMask(True, sample=sample),
  ):
    parts = {"causal": mask.causal, "valid": mask.valid, "sample": mask.sample}
    assert program(
      lambda *a: attend(*a, mask, implementation="splash")  # noqa: B023
    ) == program(lambda *a: attend_splash(*a, **parts))  # noqa: B023
  close(
    with_gradient(
      lambda *a: attend(*a, AttentionMask(True, sample=sample), implementation="tiled")
    )(q, k, v)[0],
    alone()[0],
  )


@pytest.mark.parametrize("implementation", ["tiled", "splash"])
def test_blocks_without_a_pair_of_one_sample_are_not_computed(implementation):
  # Whole blocks of two samples and of padding by turns: NaN comes through where it is only masked.
  sample = jnp.repeat(jnp.array([[0, 1, -1, 0, 1, -1, 0]]), 128, axis=1)
  q, k, v = (
    jax.random.normal(jax.random.key(i), (1, 896, heads, 8)) for i, heads in enumerate((4, 2, 2))
  )
  mine = np.array(sample == 0)
  run = with_gradient(together(implementation, sample), mine)
  want = run(q, k, v)
  got = run(*(jnp.where(mine[:, :, None, None], x, jnp.nan) for x in (q, k, v)))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[mine], b[mine]), got, want)


@pytest.mark.parametrize("implementation", ["xla_chunked", "mosaic", "splash"])
def test_samples_of_a_row_that_is_split_attend_as_if_alone(implementation):
  with jax.set_mesh(make_mesh(MeshConfig(1, 2, 1, 4))):  # 75 queries a device
    jax.tree.map(close, with_gradient(together(implementation))(*queries_keys_values()), alone())


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla_chunked", "splash"])
def test_samples_of_a_long_row_attend_as_by_einsum(implementation):
  """With tiles, blocks and strips as they are: of 4,500 slots there are several, and keys in
  windows of three sizes.
  """
  rows = (
    [(14, 1900, 60), (0, 0, 500), (12, 640, 90), (14, 320, 200)],
    [(0, 0, 300), (0, 0, 250), (1, 16, 1), (16, 2600, 40)],
  )
  sample = np.stack([slots_of(row, 16, 3480, 956) for row in rows])
  arrays = [
    jax.random.normal(jax.random.key(i), (*sample.shape, heads, 16))
    for i, heads in enumerate((2, 1, 1))
  ]

  mask = AttentionMask(True, sample=jnp.asarray(sample))

  def run(how):
    def out(*args):
      if how == "splash":
        return attend_splash(*args, causal=True, sample=mask.sample, interpret=True)
      return attend(*args, mask, implementation=how)

    return with_gradient(out, sample >= 0)(*arrays)

  jax.tree.map(close, run(implementation), run("einsum"))


def test_pairs_are_as_many_as_the_tables_of_blocks_say():
  rng, length, block, ratios = np.random.default_rng(0), 3072, 128, []
  sizes = splash_attention_kernel.BlockSizes(*[block] * 8)
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))])
  kernel = splash_attention_kernel.make_splash_mha(
    mask, block_sizes=sizes, head_shards=1, q_seq_shards=1
  )

  @jax.jit
  def tables(ids):
    segments = splash_attention_kernel.SegmentIds(ids + 1, ids + 1)
    made = splash.only_shared_blocks(kernel, segments, block, block)
    infos = made.fwd_mask_info, made.dq_mask_info, made.dkv_mask_info
    _, _, start = layout.sample_order(ids[None])
    return [(info.block_mask[0], info.data_next[0]) for info in infos], start[0]

  for _ in range(20):
    samples = []
    while 16 * 15 + sum(map(sum, samples)) < length - 300 and len(samples) < 16:
      samples.append(
        (rng.integers(15), min(int(rng.exponential(300)) + 16, 900), rng.integers(1, 200))
      )
    lengths = np.sum(samples, 1)
    visual = sum(tokens for _, tokens, _ in samples)
    ids = slots_of(samples, 15, visual, 10**4)[:length]
    (forward, dq, dkv), start = jax.device_get(tables(ids))
    i, j = np.nonzero(forward[0])
    assert all((info[0] == forward[0]).all() for info in (dq, dkv))
    assert (forward[1][i, j] == j).all() and (dq[1][i, j] == j).all() and (dkv[1][i, j] == i).all()
    first = start.reshape(-1, block).min(1) // block  # the first block of keys for each of queries
    blocks = len(i), (np.arange(len(first)) + 1 - first).sum()
    estimates = [attention.packed_pairs(lengths, block, edges).sum() for edges in (3.0, 1.5)]
    ratios.append(np.multiply(blocks, block**2) / estimates)
  assert attention.packed_pairs(np.ones((2, 3)), block).shape == (2, 3)
  np.testing.assert_allclose(np.mean(ratios, 0), 1, atol=0.15)
  assert np.max(ratios) < 1.5 and np.min(ratios) > 0.5


@pytest.mark.pure
@pytest.mark.parametrize(
  "mask",
  [
    AttentionMask(False, sample=jnp.zeros((1, 8), int)),
    AttentionMask(True, jnp.ones((1, 8), bool), jnp.zeros((1, 8), int)),
  ],
)
def test_samples_of_a_row_are_causal_and_say_what_is_padding_themselves(mask):
  x = jnp.zeros((1, 8, 2, 8))
  with pytest.raises(ShapeError) as caught:
    attend(x, x, x, mask)
  assert caught.value.fields == {"where": "mask.sample"}


# --- what is said and refused
# --------------------------------------------------------------------------------------


@pytest.mark.pure
@pytest.mark.parametrize(
  "device, version, changes, said",
  [
    (
      cards.gpu("h100"),
      "0.0.12",
      {},
      "attention on NVIDIA H100 80GB HBM3, bfloat16: mosaic of tokamax 0.0.12; einsum where there "
      "are few queries",
    ),
    (
      cards.gpu("l4"),
      "0.0.17",
      {"dtype": "float32"},
      "float32: triton of tokamax 0.0.17 in the tower, xla_chunked of tokamax 0.0.17 in the LLM; "
      "einsum",
    ),
    (
      cards.gpu("b200"),
      "0.0.12",
      {},
      "bfloat16: mosaic of tokamax 0.0.12 in the tower, triton of tokamax 0.0.12 in the LLM",
    ),
    (
      cards.gpu("t4"),
      "0.0.17",
      {},
      "xla_chunked of tokamax 0.0.17; einsum where there are few queries; Tesla T4 has no "
      "bfloat16: use float32",
    ),
    (cards.gpu("h100"), "0.1.0", {}, "bfloat16: the first kernel that compiles; einsum"),
    (
      cards.gpu("h100"),
      "0.0.12",
      {"attention": "triton"},
      "bfloat16: triton of tokamax 0.0.12",
    ),
    (cards.V5E, None, {}, "attention on TPU v5 lite, bfloat16: splash; einsum"),
  ],
)
def test_what_attention_runs_as_is_said_in_a_line(device, version, changes, said):
  cfg = dataclasses.replace(parts.sized(str(bench.RELEASED), "bfloat16"), **changes)
  with absent.computing_on([device]):
    line = kernels.describe_kernels(cfg, gradient=True, installed=lambda: version)
  assert said in line and "\n" not in line and ("einsum" in line) == ("attention" not in changes)


@pytest.mark.pure
@pytest.mark.parametrize(
  "device, version, taken, refused",
  [
    (
      cards.gpu("h100"),
      "0.0.12",
      ("auto", "einsum", "flash", "mosaic", "triton", "xla_chunked", "tiled"),
      ("splash",),
    ),
    (cards.gpu("a100"), "0.0.17", ("auto", "triton", "flash"), ("mosaic", "splash")),
    (cards.gpu("t4"), "0.0.12", ("auto", "xla_chunked"), ("mosaic", "triton")),
    (cards.gpu("h100"), None, ("auto", "einsum", "tiled"), ("flash", "mosaic", "xla_chunked")),
    (cards.V5E, None, ("auto", "splash", "einsum", "tiled"), ("mosaic", "flash")),
  ],
)
def test_an_implementation_that_a_device_can_not_run_is_refused_before_any_work(
  device, version, taken, refused
):
  check = functools.partial(kernels.check_implementation, installed=lambda: version)
  with absent.computing_on([device]):
    for name in taken:
      check(name, "bfloat16")
    for name in refused:
      with pytest.raises(ConfigError) as caught:
        check(name, "bfloat16")
      assert caught.value.fields == {
        "where": "model.attention",
        "value": name,
        "device": device.device_kind,
      }


@pytest.mark.pure
def test_a_kernel_without_float32_is_refused_in_it():
  card = kernels.card_of(cards.gpu("h100"))
  assert kernels.unusable("mosaic", card, "0.0.17", "float32") == "mosaic kernels have no float32"
  with absent.computing_on([cards.gpu("h100")]), pytest.raises(ConfigError) as caught:
    kernels.check_implementation("mosaic", "float32", installed=lambda: "0.0.17")
  assert caught.value.fields["value"] == "mosaic"


@pytest.mark.pure
def test_cards_compute_in_bfloat16_if_they_have_it():
  def of(device):
    return kernels.compute_dtype(kernels.card_of(device))

  assert {
    of(device)
    for device in (
      cards.gpu("a100"),
      cards.gpu("l4"),
      cards.V5E,
      cards.Device("rocm", "MI300X", "gfx942"),
    )
  } == {"bfloat16"}


@pytest.mark.pure
def test_notes_on_missing_measurements_are_left_out_and_others_are_not(caplog):
  prepare_tokamax()
  logging.warning("Autotuning cache miss for %s on %s with key %s", 1, 2, 3)
  logging.warning("something else")
  assert [record.getMessage() for record in caplog.records] == ["something else"]
