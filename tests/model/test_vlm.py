import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed import one_each

from xcomp_jax.config import LPCompConfig, MeshConfig
from xcomp_jax.data.batch import IGNORE, Batch, Clips, Shape, batch_spec, fake_batch, split_text
from xcomp_jax.model import vlm
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.model.qwen2 import Decoder, Lengths, run_layers
from xcomp_jax.parallel.mesh import make_mesh


@pytest.fixture(scope="module")
def mixed(sample):
  return [sample(2, 3, 9, 0), sample(5, 6, 4, 1), sample(1, 1, 12, 2)]


losses = jax.jit(lambda *a: vlm.loss(*a)[:, 0])  # of the only sample of each row


def close(got, want):
  """Within 1e-5 of the largest absolute value."""
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def alone(example):
  """A batch of one sample, without padding."""
  return one_each([example], example.frames, *split_text(example))


ALL, ONE = slice(3), slice(1, 2)  # samples; each alone is a program to compile


@pytest.mark.parametrize(
  "keep, rows",
  [
    ("suffix", ALL),
    ("attention", ALL),
    ("uniform", ONE),
    ("stride", ONE),
    ("avgpool", ONE),
    ("none", ONE),
    *(
      pytest.param(keep, ALL, marks=pytest.mark.slow)
      for keep in ("uniform", "stride", "avgpool", "none")
    ),
  ],
)
def test_each_sample_of_a_mixed_batch_equals_it_alone(tiny, mixed, keep, rows):
  model = vlm.VLM(tiny(lp_comp=LPCompConfig((16, 8, 4, 1), keep, 16)), rngs=nnx.Rngs(0))
  together = losses(model, one_each(mixed, 48, 8, 16, 4))
  close(together[rows], np.concatenate([losses(model, alone(e)) for e in mixed[rows]]))


@pytest.mark.parametrize(
  "clips", [(5, 5, 5), pytest.param((2, 5, 1), marks=pytest.mark.slow)]
)  # padded, and as they are
def test_gradients_of_a_mixed_batch_are_the_sum_of_those_alone(tiny, mixed, clips):
  model = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  grad = jax.jit(nnx.grad(lambda m, b: (vlm.loss(m, b) * b.weight).sum()))
  together = grad(model, one_each(mixed, 48, 8, 16, 4))
  parts = [grad(model, one_each([e], 8 * n, 8, 16)) for e, n in zip(mixed, clips, strict=True)]
  jax.tree.map(lambda a, *b: close(a, sum(b)), together, *parts)


def test_sharded_over_eight_devices_equals_one(tiny, mixed):
  from xcomp_jax.parallel.mesh import batch_sharding, param_shardings

  model = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  batch = one_each(mixed, 48, 8, 16, 4)
  one = losses(model, batch)
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, context=1))
  graph, state = nnx.split(model)
  state = jax.device_put(state, param_shardings(state, mesh))
  with jax.set_mesh(mesh):
    sharded = jax.jit(lambda s, b: vlm.loss(nnx.merge(graph, s), b)[:, 0])(
      state, jax.device_put(batch, batch_sharding(mesh))
    )
  close(np.asarray(sharded), np.asarray(one))


def test_a_clip_chunk_of_any_size_gives_the_same_features(tiny):
  frames = np.random.default_rng(0).integers(0, 256, (5, 8, 48, 48, 3)).astype(np.uint8)
  features = []
  for size in (1, 2, 8):
    model = vlm.VLM(tiny(clips_per_chunk=size), rngs=nnx.Rngs(0))
    features.append(jax.jit(vlm.encode_frames)(model, frames))
  close(features[1], features[0])
  close(features[2], features[0])


def test_clips_fill_the_rows_that_they_are_of(tiny):
  model, rng = vlm.VLM(tiny(), rngs=nnx.Rngs(0)), np.random.default_rng(0)

  def shown(clips, frames):
    return rng.integers(0, 256, (2, clips, frames, 48, 48, 3)).astype(np.uint8)

  videos = Clips(shown(2, 8), np.array([[9, 0], [0, -1]], np.int32))
  images = Clips(shown(1, 1), np.array([[8], [-1]], np.int32))
  batch = Batch(
    **dict.fromkeys(field.name for field in dataclasses.fields(Batch))
    | {"visual": np.zeros((2, 18, 16, 32), np.float32)}
  )
  got = jax.jit(vlm.seen)(model, batch, (videos, images)).visual

  def alone(frames):
    return jax.jit(vlm.encode_frames)(model, frames[None])[0].reshape(-1, 16, 32)

  close(got[0, 9:17], alone(videos.frames[0, 0]))
  close(got[0, :8], alone(videos.frames[0, 1]))
  close(got[0, 8:9], alone(images.frames[0, 0]))
  close(got[1, :8], alone(videos.frames[1, 0]))
  assert not np.any(got[0, 17:]) and not np.any(got[1, 8:])


def test_images_and_text_alone_run(tiny, sample):
  model = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  image = sample(1, 3, 6, clip_frames=1)
  assert np.isfinite(losses(model, one_each([image], 1, 4, 8))).all()
  text = sample(0, 0, 9)
  short, padded = (losses(model, one_each([text], 0, p, t)) for p, t in ((0, 9), (4, 16)))
  close(padded, short)
  assert short[0] > 0


def test_loss_is_the_mean_over_supervised_tokens_then_over_samples(tiny, mixed):
  model = vlm.VLM(tiny(lp_comp=LPCompConfig("cosine", "none", 16)), rngs=nnx.Rngs(0))
  batch = alone(mixed[0])
  out = jax.jit(vlm.forward)(model, batch)
  logits = np.asarray(model.llm.logits(out.x))[0]
  example, n = mixed[0], 2 * 128
  labels = np.full(len(logits), -100)
  labels[:3], labels[3 + n :] = example.labels[:3], example.labels[4:]
  rows = np.flatnonzero(labels[1:] >= 0)
  logp = jax.nn.log_softmax(logits)[rows, labels[1:][rows]]
  close(losses(model, batch), [-logp.mean()])


def test_projector_gets_no_gradient_from_long_samples_on_request(tiny, mixed):  # quirk Q17
  model = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  batch = jax.device_put(one_each(mixed, 48, 8, 16))

  graph, projector, rest = nnx.split(model, nnx.PathContains("projector"), ...)

  def loss(p, row, limit):
    return vlm.loss(nnx.merge(graph, p, rest), batch, projector_max_frames=limit)[row, 0]

  of = jax.jit(jax.grad(loss), static_argnums=2)

  def gradient(row, limit):
    return sum(np.abs(g).max() for g in jax.tree.leaves(of(projector, row, limit)))

  assert (
    gradient(1, 40) == 0 and gradient(0, 40) > 0 and gradient(1, 41) > 0 and gradient(1, None) > 0
  )


def test_evaluate_counts_greedy_first_tokens(tiny, mixed):
  model = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  batch = alone(mixed[0])
  _, wrong = jax.jit(vlm.heldout_measures)(model, batch)
  logits = model.llm.logits(jax.jit(vlm.forward)(model, batch).x)
  row = int(np.flatnonzero(batch.query[0])[0])
  best = int(jnp.argmax(logits[0, -batch.text.shape[1] + row]))
  targets = batch.targets.copy()
  assert wrong[0, 0] == (targets[0, 4 + row] == best)
  targets[0, 4 + row] = best
  assert (
    jax.jit(vlm.heldout_measures)(model, dataclasses.replace(batch, targets=targets))[1][0, 0] == 1
  )


@pytest.mark.pure
def test_parameters_are_a_tree_per_layer(tiny):
  state = nnx.eval_shape(lambda: nnx.state(vlm.VLM(tiny(), rngs=nnx.Rngs(0))))
  assert set(state["llm"]["layers"]) == {0, 1, 2, 3} and "kernel" in state["llm"]["layers"][0]["q"]


def test_a_spec_and_its_fake_have_the_shapes_of_a_batch(mixed):
  spec = batch_spec(Shape(rows=3, samples=1, prefix=8, frames=48, text=16), ((16, 32), np.float32))
  for made in (one_each(mixed, 48, 8, 16), fake_batch(spec, vocab_size=64)):
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
      lambda a: (a.shape, a.dtype), spec
    )


@pytest.mark.pure
def test_a_group_that_does_not_divide_a_clip_is_refused(tiny, mixed):
  cfg = tiny(lp_comp=LPCompConfig("cosine", "suffix", 24))
  model = nnx.eval_shape(lambda: vlm.VLM(cfg, rngs=nnx.Rngs(0)))
  with pytest.raises(ShapeError) as caught:
    vlm.lengths(model, one_each(mixed, 48, 8, 16))
  assert caught.value.fields == {"where": "lp_comp.group", "value": 24, "clip": 128}


@pytest.mark.pure
def test_what_rows_lack_is_named(tiny):
  """Visual slots that are no whole groups, and rules that need the text's queries."""
  none = jnp.zeros((1, 1), jnp.int32)

  def run(slots, keep, group):
    cfg = tiny(lp_comp=LPCompConfig("cosine", keep, group))
    model = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((1, slots, 32), np.float32)
    with pytest.raises(ShapeError) as caught:
      jax.eval_shape(
        lambda model, x: run_layers(model, x, Lengths(none, none, none), prefix=2, text=3).x,
        model,
        x,
      )
    return caught.value.fields

  assert run(25, "suffix", 16) == {"where": "lp_comp.group", "value": 16, "slots": 20}
  assert run(21, "attention", 16) == {"where": "query"}


@pytest.mark.pure
def test_places_say_what_lies_in_a_slot():
  lengths = Lengths(*(jnp.array(n) for n in ([[2, 1], [3, 0]], [[1, 2], [1, 0]], [[0, 2], [3, 0]])))
  got = lengths.places(prefix=6, groups=4, text=4, count=2)
  np.testing.assert_array_equal(
    got.sample[0], [0, 0, -1, 1, -1, -1, 0, 0, 1, 1, 1, 1, -1, -1, 1, 1, -1, -1]
  )
  np.testing.assert_array_equal(got.position[0][got.valid[0]], [0, 1, 0, 2, 3, 1, 2, 3, 4, 5, 6])
  np.testing.assert_array_equal(
    got.sample[1], [0, 0, 0, -1, -1, -1, 0, 0, -1, -1, -1, -1, -1, -1, 0, 0, 0, -1]
  )
  np.testing.assert_array_equal(got.position[1][got.valid[1]], np.arange(8))


@pytest.mark.parametrize("rows", [14, 32])  # of two samples: chunks of 7 and 16
def test_losses_in_chunks_are_those_of_all_logits(tiny, rows):
  rng = np.random.default_rng(0)
  graph, state = nnx.split(vlm.VLM(tiny(remat=False), rngs=nnx.Rngs(0)))
  states = jnp.asarray(rng.normal(size=(2, 25, 32)).astype(np.float32))
  targets = jnp.asarray(np.where(rng.random((2, 25)) < 0.5, rng.integers(0, 64, (2, 25)), IGNORE))
  weight = jnp.asarray(rng.random((2, 25)))

  def run(**how):
    def total(state, states):
      losses, hits = vlm.predictions(nnx.merge(graph, state), states, targets, **how)
      return (losses * weight).sum(), (losses, hits)

    return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(state, states)

  for a, b in zip(jax.tree.leaves(run(logit_rows=rows)), jax.tree.leaves(run()), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


@pytest.mark.slow
def test_logits_of_a_large_vocabulary_never_exist_at_once(tiny):
  cfg = tiny(llm=dataclasses.replace(tiny().llm, vocab_size=50_000))
  graph, state = nnx.split(nnx.eval_shape(lambda: vlm.VLM(cfg, rngs=nnx.Rngs(0))))
  batch = batch_spec(
    Shape(rows=1, samples=1, prefix=16, frames=8, text=8192), ((16, 32), np.float32)
  )

  def loss(state, batch):
    return vlm.loss(nnx.merge(graph, state), batch).sum()

  memory = jax.jit(jax.grad(loss)).lower(state, batch).compile().memory_analysis()
  # and three times as much with all of them
  assert memory.temp_size_in_bytes < 0.6 * 8192 * 50_000 * 4
