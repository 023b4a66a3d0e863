"""The context axis: a sample's own sequence over several devices gives what one device gives, and no device has it all."""

import dataclasses
import functools
import re

import cards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokamax
from flax import nnx

from xcomp_jax.config import ConfigError, DataConfig, MeshConfig
from xcomp_jax.data.batch import Bucket, collate
from xcomp_jax.model import attention, decoder, vlm
from xcomp_jax.model.attention import AttentionMask, attend
from xcomp_jax.sharding import (
  batch_sharding,
  check_mesh,
  make_mesh,
  mesh_sizes,
  param_shardings,
  visual_sharding,
)

SPLIT = MeshConfig(1, 2, 2, 2)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("implementation", ["xla_chunked", "splash", "mosaic"])
def test_queries_are_split_and_see_what_they_should(implementation, monkeypatch):
  if implementation == "mosaic":  # by einsum over what it is handed: 150 rows of a device, in blocks of 128
    monkeypatch.setattr(tokamax, "dot_product_attention", cards.fake_kernel([]))
  monkeypatch.setattr(attention, "ROWS", 128)  # two masks of a device's 150 rows
  monkeypatch.setattr(attention, "_splash", functools.partial(attention._splash, interpret=True))
  q, k, v = (jax.random.normal(jax.random.key(i), (2, 300, heads, 8)) for i, heads in enumerate((4, 2, 2)))
  valid = jnp.arange(300) < jnp.array([[300], [217]])

  def run(how):
    out = lambda q, k, v: attend(q, k, v, AttentionMask(True, valid), implementation=how)
    shown = lambda *a: jnp.where(valid[:, :, None, None], out(*a), 0)  # rows of padding are garbage
    return jax.jit(lambda *a: (shown(*a), jax.grad(lambda *a: jnp.sin(shown(*a)).sum(), (0, 1, 2))(*a)))

  alone = run("einsum")(q, k, v)
  with jax.set_mesh(make_mesh(SPLIT)):
    program = run(implementation)
    jax.tree.map(close, program(q, k, v), alone)
    if implementation == "xla_chunked":
      text = program.lower(q, k, v).compile().as_text().split("ENTRY")[0]
      assert re.search(r"f32\[\d+,1,\d+,2,8\]", text) and not re.search(r"\b1,300,[24],8\b", text)  # queries of half a sequence


def test_the_tpu_kernel_lowers_for_split_queries():
  q, k = (jax.ShapeDtypeStruct((2, 1552, heads, 128), jnp.bfloat16) for heads in (12, 2))
  loss = lambda q, k, v: attend(q, k, v, AttentionMask(True), implementation="splash").astype(jnp.float32).sum()
  with jax.set_mesh(make_mesh(MeshConfig(1, 2, 1, 4))):
    program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
  assert program.count("tpu_custom_call") == 3  # forward, and backward for queries and for keys


@pytest.mark.parametrize("kind", ["frames", "features"])
def test_a_sample_over_two_devices_gives_the_loss_and_gradient_of_one(tiny, sample, kind, monkeypatch):
  cfg = tiny(remat=False, clips_per_chunk=1)
  cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=2))
  graph, state = nnx.split(jax.jit(lambda: vlm.VLM(cfg, rngs=nnx.Rngs(0)))())
  batch = collate([sample(4, 3, 9, 0), sample(3, 6, 14, 1)], Bucket(4, 8, 8, 16))
  if kind == "features":
    batch = dataclasses.replace(batch, visual=np.random.default_rng(0).normal(size=(2, 4, 128, 32)).astype(np.float32))
  total = lambda state, batch: (vlm.loss(nnx.merge(graph, state), batch) * jnp.array([1.0, 2.0])).sum()
  both = lambda: jax.jit(jax.value_and_grad(total))
  alone = jax.device_get(both()(state, batch))
  if kind == "features":  # here with all that saves memory
    monkeypatch.setattr(decoder, "MLP_ROWS", 20)
    graph = nnx.graphdef(nnx.eval_shape(lambda: vlm.VLM(dataclasses.replace(cfg, remat=True), rngs=nnx.Rngs(0))))
  mesh = make_mesh(SPLIT)
  placed = jax.device_put(batch, batch_sharding(mesh))
  visual = jax.device_put(batch.visual, visual_sharding(mesh, batch.visual.shape))
  assert visual.addressable_shards[0].data.shape[:2] == (1, 2)  # a sample, half of its clips
  with jax.set_mesh(mesh):
    got = both()(jax.device_put(state, param_shardings(state, mesh)), dataclasses.replace(placed, visual=visual))
  np.testing.assert_allclose(got[0], alone[0], rtol=1e-5)
  jax.tree.map(close, jax.device_get(got[1]), alone[1])
  if kind == "features":
    jax.tree.map(close, jax.device_get(both()(state, batch)), alone)


@pytest.mark.parametrize(
  "devices, batch_size, sizes",
  [
    (1, 32, (1, 1, 1, 1)), (8, 32, (1, 8, 1, 1)), (32, 32, (1, 32, 1, 1)), (256, 32, (1, 32, 1, 8)), (16, None, (1, 16, 1, 1)),
    # What does not divide the sequence, of which 16 parts can be made here, is left to fsdp.
    (12, 8, (1, 12, 1, 1)), (48, 32, (1, 48, 1, 1)), (512, 32, (1, 32, 1, 16)), (1024, 32, (1, 64, 1, 16)),
  ],
)  # fmt: skip
def test_devices_that_samples_cannot_fill_split_their_sequences(devices, batch_size, sizes):
  assert mesh_sizes(MeshConfig(1, -1, 1, -1), devices, batch_size, sequence=16) == sizes


@pytest.mark.parametrize(
  "sizes, changes, words",
  [
    ((1, 1, 8, 1), {}, r"config\.mesh\.tensor = 8 does not divide the 4 query and 2 key heads"),
    ((1, 2, 4, 1), {}, r"config\.mesh\.tensor = 4 .* the most that does is 2"),
    ((1, 2, 1, 4), {"prefix_length": 14}, r"config\.mesh\.context = 4 does not divide the .* and the 78 slots around videos; the most that does is 2\. .*prefix_length"),
    ((1, 1, 1, 8), {"frame_buckets": (0, 12)}, r"config\.mesh\.context = 8 does not divide the 12 groups of a video of 12 frames .*the most that does is 4"),
    ((1, 2, 1, 4), {}, None),
    ((2, 2, 2, 1), {"prefix_length": 15}, None),
  ],
)
def test_axes_that_would_split_nothing_are_refused(tiny, sizes, changes, words):
  data = DataConfig("", None, None, (1, 16), (64,), 16, 16, 64, "official", False, 0, 0)
  mesh = make_mesh(MeshConfig(*sizes))
  if words is None:
    check_mesh(mesh, tiny(), dataclasses.replace(data, **changes))
  else:
    with pytest.raises(ConfigError, match=words):
      check_mesh(mesh, tiny(), dataclasses.replace(data, **changes))
