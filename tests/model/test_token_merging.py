import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xcomp_jax.model.layers import ShapeError
from xcomp_jax.model.token_merging import Projector, match, merge, merge_step, merge_steps, sources


def features(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.pure
@pytest.mark.parametrize(
  "tokens, target, steps",
  [
    (6272, 128, [3136, 1568, 784, 392, 196, 68]),
    (3136, 64, [1568, 784, 392, 196, 98, 34]),
    (1568, 128, [784, 392, 196, 68]),
    (784, 16, [392, 196, 98, 49, 24, 9]),
    (128, 128, []),
  ],
)
def test_steps_are_the_official_ones(tokens, target, steps):
  assert merge_steps(tokens, target) == steps


@pytest.mark.pure
def test_too_few_tokens_is_an_error():
  with pytest.raises(ShapeError) as caught:
    merge_steps(72, 128)
  assert caught.value.fields == {"where": "tokens", "value": 72, "target": 128}


def by_hand(x, size, r, heads):
  """One step of one clip in plain loops."""
  metric = x.reshape(len(x), heads, -1).mean(1)
  metric /= np.linalg.norm(metric, axis=-1, keepdims=True)
  scores = metric[::2] @ metric[1::2].T
  order = sorted(range(len(scores)), key=lambda i: -scores[i].max())
  total, weight = x[1::2] * size[1::2], size[1::2].copy()
  for i in order[:r]:
    j = scores[i].argmax()
    total[j] += x[2 * i] * size[2 * i]
    weight[j] += size[2 * i]
  stay = [2 * i for i in order[r:]]
  return np.concatenate([x[stay], total / weight]), np.concatenate([size[stay], weight])


@pytest.mark.parametrize("n, r", [(36, 18), (36, 7), (25, 12), (25, 5)])
def test_step_equals_loops_and_orders_unmerged_first(n, r):
  x = np.asarray(features(2, n, 24))
  size = np.random.default_rng(1).integers(1, 5, (2, n, 1)).astype(np.float32)
  out, weight = merge_step(jnp.asarray(x), jnp.asarray(size), r, 4)
  assert out.shape == (2, n - r, 24)
  for clip in range(2):
    expected, expected_weight = by_hand(x[clip], size[clip], r, 4)
    np.testing.assert_array_equal(weight[clip], expected_weight)
    np.testing.assert_allclose(out[clip], expected, rtol=0, atol=1e-5)


def test_merging_keeps_the_weighted_mean():
  x = features(3, 72, 24)
  merged, size = x, jnp.ones((3, 72, 1))
  for r in merge_steps(72, 16):
    merged, size = merge_step(merged, size, r, 4)
  np.testing.assert_array_equal(size.sum(1), np.full((3, 1), 72))
  np.testing.assert_allclose((merged * size).sum(1), x.sum(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n, target", [(72, 16), (75, 16), (16, 16)])
def test_a_merged_token_is_the_mean_of_its_sources(n, target):
  x = features(3, n, 24)
  into = np.asarray(sources(x, target, 4))
  assert into.shape == (3, n) and all(set(clip) == set(range(target)) for clip in into)
  for clip, found, merged in zip(np.asarray(x), into, np.asarray(merge(x, target, 4)), strict=True):
    means = [clip[found == token].mean(0) for token in range(target)]
    np.testing.assert_allclose(merged, means, rtol=0, atol=1e-5)


def test_ties_go_to_the_lowest_position():
  score, partner, order = match(jnp.tile(features(1, 1, 24), (1, 10, 1)), 4)
  assert np.ptp(score) == 0
  np.testing.assert_array_equal(partner[0], 0)
  np.testing.assert_array_equal(order[0], np.arange(5))


def test_same_input_gives_the_same_bits_alone_or_in_a_batch():
  x = features(4, 72, 24)
  run = jax.jit(lambda x: merge(x, 16, 4))
  np.testing.assert_array_equal(run(x), run(x))
  np.testing.assert_allclose(run(x[2:3]), run(x)[2:3], rtol=0, atol=1e-5)


def test_dtype_is_kept_and_choices_are_made_in_float32():
  x = features(2, 72, 24).astype(jnp.bfloat16)
  out = merge(x, 16, 4)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, merge(x.astype(jnp.float32), 16, 4).astype(jnp.bfloat16))


def test_gradient_is_the_weighted_mean_s():
  x = features(1, 36, 24)

  def size(x):
    return merge_step(x, jnp.ones((1, 36, 1)), 18, 4)[1]

  grad = jax.grad(lambda x: (merge_step(x, jnp.ones((1, 36, 1)), 18, 4)[0] * size(x)).sum())(x)
  np.testing.assert_allclose(grad, np.ones_like(grad), rtol=0, atol=1e-5)


def test_projector_uses_the_exact_gelu(tiny):
  model = Projector(tiny(), rngs=nnx.Rngs(0))
  x = features(2, 5, 32)
  hidden = np.asarray(model.fc1(x))
  erf = np.asarray(jax.scipy.special.erf(hidden / np.sqrt(2)))
  np.testing.assert_allclose(
    model(x), model.fc2(jnp.asarray(hidden * (1 + erf) / 2)), rtol=0, atol=1e-6
  )
  assert model(x).shape == (2, 5, 32)
