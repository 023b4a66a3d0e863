"""Several samples in a row: each gives what it gives alone, whatever is beside it, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed import one_each

from xcomp_jax.config import LPCompConfig, MeshConfig
from xcomp_jax.data.batch import Shape, batch_spec, collate
from xcomp_jax.model import vlm
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.parallel.mesh import make_mesh, param_shardings
from xcomp_jax.training import steps

SHAPE = Shape(rows=4, samples=4, prefix=8, frames=64, text=48)


def close(got, want):
  """Within 1e-5 of the largest absolute value."""
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.fixture(scope="module")
def examples(sample):
  """Videos, an image, and text alone, of different lengths."""
  sizes = [
    (2, 8, 3, 9),
    (0, 8, 0, 12),
    (1, 1, 5, 4),
    (5, 8, 6, 16),
    (1, 8, 1, 5),
    (3, 8, 8, 30),
    (1, 1, 2, 7),
  ]
  return [
    sample(clips, before, after, seed, frames)
    for seed, (clips, frames, before, after) in enumerate(sizes)
  ]


def packed(examples, rows):
  return collate([[examples[i] for i in row] for row in rows], SHAPE, ((16, 32), np.float32))


ROWS = [(3, 1, 0, 2), (), (5, 4, 6), ()]


def by_sample(values, batch) -> dict[int, float]:
  """{index of a sample: its value} of values [B, M]."""
  return {
    int(i): np.asarray(value)
    for i, value in zip(batch.index.ravel(), np.asarray(values).ravel(), strict=True)
    if i >= 0
  }


@pytest.fixture(scope="module")
def model(tiny):
  """Of two layers, the second of which has thinned groups."""
  cfg = tiny(lp_comp=LPCompConfig((16, 3), "suffix", 16))
  return jax.jit(
    lambda: vlm.VLM(
      dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=2)), rngs=nnx.Rngs(0)
    )
  )()


@pytest.fixture(scope="module")
def alone(model, examples):
  """Loss and gradient of every sample in a row of its own, and the model."""
  graph, state = nnx.split(model)
  run = jax.jit(
    jax.value_and_grad(lambda state, batch: vlm.loss(nnx.merge(graph, state), batch).sum())
  )
  # padded: one program
  found = {e.index: jax.device_get(run(state, one_each([e], 40, 8, 30))) for e in examples}
  return graph, state, found


@pytest.mark.parametrize(
  "mesh",
  [
    (1, 1, 1, 1),
    (1, 2, 2, 2),
    *(pytest.param(m, marks=pytest.mark.slow) for m in ((2, 2, 2, 1), (1, 1, 1, 8))),
  ],
)
def test_a_packed_sample_gives_the_loss_and_gradient_that_it_gives_alone(alone, examples, mesh):
  graph, state, found = alone
  batch = packed(examples, ROWS)

  def total(state, batch):
    return (lambda losses: ((losses * batch.weight * (batch.index + 1)).sum(), losses))(
      vlm.loss(nnx.merge(graph, state), batch)
    )

  made = make_mesh(MeshConfig(*mesh), jax.devices()[: int(np.prod(mesh))])
  with jax.set_mesh(made):
    placed = jax.device_put(state, param_shardings(state, made))
    (_, losses), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(
      placed, steps.place_rows(batch, made)
    )
  got = by_sample(losses, batch)
  assert got.keys() == found.keys()
  for index, (loss, _) in found.items():
    np.testing.assert_allclose(got[index], loss, rtol=1e-5)
  want = jax.tree.map(
    lambda *g: sum((i + 1) * x for i, x in zip(found, g)), *(grad for _, grad in found.values())
  )
  jax.tree.map(close, jax.device_get(grads), want)


def test_what_is_beside_a_sample_changes_nothing_bit_by_bit(model, examples):
  graph, state = nnx.split(model)

  def run(state, batch):  # of the samples 0 and 4
    chosen = jnp.isin(batch.index, jnp.array([0, 4]))

    def total(state):
      return (lambda losses: (jnp.where(chosen, losses, 0).sum(), losses))(
        vlm.loss(nnx.merge(graph, state), batch)
      )

    return jax.value_and_grad(total, has_aux=True)(state)

  run = jax.jit(run)
  batch = packed(examples, ROWS)
  (_, before), gradient = run(state, batch)
  rng = np.random.default_rng(1)
  mine = {row: {m for m in range(4) if batch.index[row, m] in (0, 4)} for row in range(4)}
  visual, prefix, text = batch.visual.copy(), batch.prefix.copy(), batch.text.copy()
  for row in range(4):
    owners = {
      "visual": (visual, np.repeat(np.arange(4), batch.frames[row])),
      "text": (text, np.repeat(np.arange(4), batch.text_length[row])),
    }
    for values, owner in owners.values():
      other = np.append(
        ~np.isin(owner, list(mine[row])), np.ones(values.shape[1] - len(owner), bool)
      )
      noise = (
        rng.normal(size=values[row].shape) * 1e3
        if values.ndim > 2
        else rng.integers(0, 64, values[row].shape)
      )
      values[row, other] = noise[other].astype(values.dtype)
    for m in set(range(4)) - mine[row]:
      prefix[row, m] = rng.integers(0, 64, prefix.shape[-1])
    for m in range(4):
      prefix[row, m, batch.prefix_length[row, m] :] = 7
  noisy = dataclasses.replace(batch, visual=visual, prefix=prefix, text=text)
  (_, after), other = run(state, noisy)
  kept = np.isin(batch.index, [0, 4])
  np.testing.assert_array_equal(np.asarray(before)[kept], np.asarray(after)[kept])
  assert (np.asarray(before)[batch.index >= 0] != np.asarray(after)[batch.index >= 0]).sum() == len(
    examples
  ) - 2
  jax.tree.map(np.testing.assert_array_equal, gradient, other)


def test_evaluation_of_packed_samples_is_that_of_each_alone(model, examples):
  run = jax.jit(vlm.heldout_measures)
  batch = packed(examples, [(0, 3, 1), (2,), (4, 5, 6)])
  losses, correct = (by_sample(values, batch) for values in run(model, batch))
  for e in examples:
    loss, right = run(model, one_each([e], 40, 8, 30))
    np.testing.assert_allclose(losses[e.index], loss[0, 0], rtol=1e-5)
    assert correct[e.index] == right[0, 0]


def test_long_samples_alone_give_the_projector_no_gradient(model, examples):  # quirk Q17
  graph, projector, rest = nnx.split(model, nnx.PathContains("projector"), ...)
  batch = jax.device_put(packed(examples, [(3, 0)]))  # 40 and 16 frames
  of = jax.jit(
    jax.grad(
      lambda p, m: vlm.loss(nnx.merge(graph, p, rest), batch, projector_max_frames=17)[0, m]
    ),
    static_argnums=1,
  )

  def size(m):
    return sum(np.abs(g).max() for g in jax.tree.leaves(of(projector, m)))

  assert size(0) == 0 < size(1)


def test_what_keeps_other_places_in_each_sample_takes_one_a_row(tiny, examples):
  model = nnx.eval_shape(
    lambda: vlm.VLM(tiny(lp_comp=LPCompConfig((16, 8, 4, 1), "attention", 16)), rngs=nnx.Rngs(0))
  )
  with pytest.raises(ShapeError) as caught:
    jax.eval_shape(vlm.loss, model, packed(examples, ROWS))
  assert caught.value.fields == {"where": "lp_comp.keep", "value": "attention", "samples": 4}


def test_the_last_visual_token_of_a_sample_far_into_a_row_is_found(tiny):
  cfg = tiny(lp_comp=LPCompConfig("cosine", "none", 16))
  model = nnx.eval_shape(lambda: vlm.VLM(cfg, rngs=nnx.Rngs(0)))
  # frames times tokens of a row are more than int32 holds
  frames = np.array([[9000, 7000]], np.int32)
  batch = dataclasses.replace(
    batch_spec(Shape(rows=1, samples=2, prefix=1, frames=16000, text=1), ((16, 32), np.float32)),
    frames=jnp.asarray(frames),
  )
  x = jnp.arange(2 + 16 * 16000 + 1, dtype=jnp.float32)[None, :, None]
  rows = vlm.supervised_rows(model, x, batch)[0, :, 0]
  assert rows.tolist() == [0, 1, 2 + 16 * 9000 - 1, 2 + 16 * 16000 - 1, 2 + 16 * 16000]
