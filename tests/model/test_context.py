"""The context axis: a sample's own sequence over several devices gives what one device gives, and
no device has it all.
"""

import dataclasses
import re

import cards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed import one_each

from xcomp_jax.config import ConfigError, MeshConfig
from xcomp_jax.model import mlp, vlm
from xcomp_jax.model.attention import AttentionMask, attend
from xcomp_jax.model.kernel_calls import Library
from xcomp_jax.model.splash import attend_splash
from xcomp_jax.parallel.mesh import check_tensor, make_mesh, param_shardings
from xcomp_jax.training import steps

SPLIT = MeshConfig(1, 2, 2, 2)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("implementation", ["xla_chunked", "splash", "mosaic"])
def test_queries_are_split_and_see_what_they_should(implementation):
  # two masks of a device's 150 rows
  library = Library(rows=128)
  if implementation == "mosaic":  # by einsum over what it is handed, in blocks of 128
    library = cards.FakeKernels(rows=128)
  q, k, v = (
    jax.random.normal(jax.random.key(i), (2, 300, heads, 8)) for i, heads in enumerate((4, 2, 2))
  )
  valid = jnp.arange(300) < jnp.array([[300], [217]])

  def run(how):
    def out(q, k, v):
      if how == "splash":
        return attend_splash(q, k, v, causal=True, valid=valid, interpret=True)
      return attend(q, k, v, AttentionMask(True, valid), implementation=how, library=library)

    def shown(*a):
      return jnp.where(valid[:, :, None, None], out(*a), 0)  # rows of padding are garbage

    return jax.jit(
      lambda *a: (shown(*a), jax.grad(lambda *a: jnp.sin(shown(*a)).sum(), (0, 1, 2))(*a))
    )

  alone = run("einsum")(q, k, v)
  with jax.set_mesh(make_mesh(SPLIT)):
    program = run(implementation)
    jax.tree.map(close, program(q, k, v), alone)
    if implementation == "xla_chunked":
      text = program.lower(q, k, v).compile().as_text().split("ENTRY")[0]
      # queries of half a sequence
      assert re.search(r"f32\[\d+,1,\d+,2,8\]", text) and not re.search(r"\b1,300,[24],8\b", text)


def test_the_tpu_kernel_lowers_for_split_queries():
  q, k = (jax.ShapeDtypeStruct((2, 1552, heads, 128), jnp.bfloat16) for heads in (12, 2))

  def loss(q, k, v):
    return attend(q, k, v, AttentionMask(True), implementation="splash").astype(jnp.float32).sum()

  with jax.set_mesh(make_mesh(MeshConfig(1, 2, 1, 4))):
    program = (
      jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
    )
  assert program.count("tpu_custom_call") == 3  # forward, and backward for queries and for keys


def test_a_sample_over_two_devices_gives_the_loss_and_gradient_of_one(tiny, sample, monkeypatch):
  cfg = tiny(remat=False)
  cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=2))
  graph, state = nnx.split(jax.jit(lambda: vlm.VLM(cfg, rngs=nnx.Rngs(0)))())
  batch = one_each([sample(4, 3, 9, 0), sample(3, 6, 14, 1)], 32, 8, 16)

  def total(state, batch):
    return (vlm.loss(nnx.merge(graph, state), batch) * jnp.array([[1.0], [2.0]])).sum()

  def both():
    return jax.jit(jax.value_and_grad(total))

  alone = jax.device_get(both()(state, batch))
  # On the mesh with all that saves memory.
  monkeypatch.setattr(mlp, "ROWS", 20)
  graph = nnx.graphdef(
    nnx.eval_shape(lambda: vlm.VLM(dataclasses.replace(cfg, remat=True), rngs=nnx.Rngs(0)))
  )
  mesh = make_mesh(SPLIT)
  placed = steps.place_rows(batch, mesh)
  assert placed.visual.addressable_shards[0].data.shape[:2] == (1, 16)  # a row, half of its frames
  with jax.set_mesh(mesh):
    got = both()(jax.device_put(state, param_shardings(state, mesh)), placed)
  np.testing.assert_allclose(got[0], alone[0], rtol=1e-5)
  jax.tree.map(close, jax.device_get(got[1]), alone[1])
  jax.tree.map(close, jax.device_get(both()(state, batch)), alone)


@pytest.mark.parametrize(
  "sizes, words",
  [
    ((1, 1, 8, 1), r"config\.mesh\.tensor = 8 does not divide the 4 query and 2 key heads"),
    ((1, 2, 4, 1), r"config\.mesh\.tensor = 4 .* the most that does is 2"),
    ((2, 2, 2, 1), None),
  ],
)
def test_heads_that_an_axis_cannot_split_are_refused(tiny, sizes, words):
  if words is None:
    check_tensor(sizes[2], tiny())
  else:
    with pytest.raises(ConfigError, match=words):
      check_tensor(sizes[2], tiny())
