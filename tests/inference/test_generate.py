import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed import one_each

from xcomp_jax.checkpoints import loading
from xcomp_jax.config import ConfigError
from xcomp_jax.data.batch import Example
from xcomp_jax.inference import generate
from xcomp_jax.inference.generate import Sampling
from xcomp_jax.model import qwen2, softmax, vlm
from xcomp_jax.training.metrics import Compilations

SHAPE = 32, 8, 32  # frames, prefix, text
PREFILL = jax.jit(generate.prefill, static_argnames="room")
DECODE = jax.jit(generate.decode_tokens, static_argnames=("sampling", "steps"))


@pytest.fixture(scope="module")
def model(tiny):
  model = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  # else the tied head repeats its input
  model.llm.norm.scale[...] = jax.random.normal(jax.random.key(1), 32)
  return model


def test_cached_decoding_equals_a_full_pass_at_every_step(model, sample):
  prompts = [sample(2, 3, 9, 0), sample(4, 6, 4, 1)]  # other lengths of every part
  state = PREFILL(model, one_each(prompts, *SHAPE), room=5)
  for _ in range(5):
    whole = [PREFILL(model, one_each([p], *SHAPE), room=5).logits[0] for p in prompts]
    np.testing.assert_allclose(state.logits, np.stack(whole), atol=1e-5 * np.abs(whole).max())
    tokens, state = DECODE(model, state, Sampling(1, ()), steps=1)
    for i, (p, token) in enumerate(zip(prompts, np.asarray(tokens)[:, 0], strict=True)):
      assert token == whole[i].argmax()
      longer = np.append(p.tokens, token).astype(np.int32)
      prompts[i] = Example(
        frames=p.frames,
        visual=p.visual,
        tokens=longer,
        labels=np.full_like(longer, -100),
        query=np.zeros(len(longer), bool),
        index=0,
      )


@pytest.mark.parametrize("keep", ["suffix", "avgpool"])
def test_a_text_in_pieces_is_the_text_in_one(model, sample, monkeypatch, keep):
  """Other lengths in a batch, pieces and blocks that end within them, and pieces that don't run."""
  model = loading.with_lp_comp(model, dataclasses.replace(model.cfg.lp_comp, keep=keep))
  batch = one_each([sample(2, 3, 9, 0), sample(4, 6, 21, 1)], *SHAPE)
  whole = jax.jit(lambda model, batch: generate.prefill(model, batch, 5))(model, batch)
  for name, size in {"SHORT": 8, "PART": 4}.items():
    monkeypatch.setattr(qwen2, name, size)
  monkeypatch.setattr(softmax, "KEYS", 24)
  pieces = jax.jit(lambda model, batch: generate.prefill(model, batch, 5, in_pieces=True))(
    model, batch
  )
  np.testing.assert_allclose(pieces.logits, whole.logits, atol=1e-5 * np.abs(whole.logits).max())
  for a, b in zip(pieces.caches, whole.caches, strict=True):
    np.testing.assert_array_equal(a.valid, b.valid)
    for key in ("key", "value"):
      np.testing.assert_allclose(
        *(np.where(b.valid[..., None, None], getattr(c, key), 0) for c in (a, b)), atol=1e-5
      )


def test_an_answer_ends_before_its_eos(model, sample):
  batch = one_each([sample(2, 3, 9, 0)], *SHAPE)
  (free,) = generate.generate(model, batch, Sampling(6, ()))
  eos = int(free[3])
  (ended,) = generate.generate(model, batch, Sampling(6, (eos,)))
  np.testing.assert_array_equal(ended, free[: list(free).index(eos)])


def test_repetition_penalty_counts_new_tokens_only(model, sample):  # quirk Q20
  batch = one_each([sample(2, 3, 9, 0)], *SHAPE)
  (free,) = generate.generate(model, batch, Sampling(8, ()))
  (strict,) = generate.generate(model, batch, Sampling(8, (), repetition_penalty=1e6))
  assert strict[0] == free[0]  # nothing is new yet
  assert len(set(strict.tolist())) == len(strict)


def test_batches_of_other_lengths_and_ends_stop_together(model, sample):
  prompts = [sample(2, 3, 9, 0), sample(4, 6, 4, 1)]
  alone = [generate.generate(model, one_each([p], *SHAPE), Sampling(20, ()))[0] for p in prompts]
  eos = int(alone[0][2])
  got = generate.generate(model, one_each(prompts, *SHAPE), Sampling(20, (eos,)))
  for row, free in zip(got, alone, strict=True):
    np.testing.assert_array_equal(row, free[: list(free).index(eos)] if eos in free else free)
  pieces = list(generate.stream(model, [one_each(prompts[:1], *SHAPE)], Sampling(20, (eos,))))
  assert len(pieces) == 1  # what comes after the end is not computed


def test_another_prompt_of_the_same_shape_compiles_nothing(model, sample):
  shape = 32, 8, 72  # one that no other test has
  with Compilations("prefill", "decode_tokens") as compilations:
    generate.generate(model, one_each([sample(2, 3, 9, 0)], *shape), Sampling(12, ()))
    first = dict(compilations.count)
    generate.generate(model, one_each([sample(3, 5, 7, 2)], *shape), Sampling(9, (), seed=3))
  assert all(first.values()) and compilations.count == first


LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


def drawn(count=400, logits=LOGITS, seen=None, **how):
  seen = jnp.zeros(logits.shape, bool) if seen is None else seen
  sampling = Sampling(1, (), **how)

  def one(key):
    return generate.choose_tokens(logits, seen, sampling, key)[0]

  return np.bincount(jax.vmap(one)(jax.random.split(jax.random.key(0), count)), minlength=4) / count


def test_draws_follow_the_probabilities():
  np.testing.assert_allclose(drawn(4000, temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_draws_are_those_of_seed_zero_unless_another_is_given(model, sample):
  batch = one_each([sample(2, 3, 9, 0)], *SHAPE)
  once, again, other = (
    generate.generate(model, batch, Sampling(12, (), temperature=1.0, **how))[0].tolist()
    for how in ({}, {"seed": 0}, {"seed": 1})
  )
  assert once == again != other


def test_temperature_sharpens():
  np.testing.assert_allclose(
    drawn(4000, temperature=0.5), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365, atol=0.03
  )


def test_top_k_and_top_p_leave_out_the_tail():
  np.testing.assert_allclose(drawn(4000, temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
  # the second one crosses 0.6
  np.testing.assert_allclose(
    drawn(4000, temperature=1.0, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.03
  )
  assert drawn(temperature=1.0, top_p=0.01)[0] == 1  # never none


@pytest.mark.pure
def test_a_penalty_divides_positive_and_multiplies_negative_logits():
  logits = jnp.array([[2.0, 1.5, -1.0, -3.0]])
  seen = jnp.array([[True, False, True, False]])
  np.testing.assert_array_equal(
    generate.choose_tokens(logits, seen, Sampling(1, (), repetition_penalty=2.0), None), [1]
  )


@pytest.mark.pure
@pytest.mark.parametrize(
  "bad",
  [
    {"temperature": -1.0},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"repetition_penalty": 0.0},
  ],
)
def test_sampling_that_means_nothing_is_refused(bad):
  with pytest.raises(ConfigError) as caught:
    Sampling(1, (), **bad)
  assert caught.value.fields == {"where": "sampling", "value": bad}
