import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed import one_each

from xcomp_jax.checkpoints import loading
from xcomp_jax.config import ConfigError
from xcomp_jax.data.batch import Example
from xcomp_jax.data.prompt import IMAGE_TOKEN, Prompt
from xcomp_jax.inference import generate
from xcomp_jax.inference.generate import Sampling, stack_sampling
from xcomp_jax.model import qwen2, softmax, vlm
from xcomp_jax.training.metrics import BACKEND_COMPILE, Compilations

SHAPE = 32, 8, 32  # frames, prefix, text
PREFILL = jax.jit(generate.prefill, static_argnames="room")
DECODE = jax.jit(generate.decode_tokens, static_argnames="steps")


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
    tokens, state = DECODE(model, state, stack_sampling([Sampling(1, ())] * 2), steps=1)
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


def drawn_sampling(rng, **how):
  """Any `Sampling`; every fourth is greedy."""
  return Sampling(
    **{
      "max_new_tokens": int(rng.integers(1, 30)),
      "eos": (3, 5),
      "temperature": float(rng.choice([0, 0.5, 1, 2.5])),
      "top_k": int(rng.choice([0, 1, 5, 1000])),
      "top_p": float(rng.choice([0.2, 0.9, 1])),
      "repetition_penalty": float(rng.choice([1, 1.1, 3])),
      "seed": int(rng.integers(-(2**40), 2**40)),
    }
    | how
  )


def test_rows_of_a_batch_are_chosen_as_each_alone(model, sample):
  prompts = [sample(2, 3, 9, 0), sample(4, 6, 4, 1), sample(3, 5, 7, 2), sample(1, 2, 8, 3)] * 2
  rng = np.random.default_rng(0)
  lengths = [1, 3, 8, 9, 16, 20, 21, 24]
  each = [drawn_sampling(rng, eos=(), max_new_tokens=n) for n in lengths]
  assert {one.temperature > 0 for one in each} == {True, False}
  got = generate.generate(model, one_each(prompts, *SHAPE), each)
  assert [len(row) for row in got] == lengths
  for p, one, row in zip(prompts, each, got, strict=True):
    (alone,) = generate.generate(model, one_each([p], *SHAPE), one)
    np.testing.assert_array_equal(row, alone)


def test_a_stream_ends_with_its_last_row(model, sample):
  batch = one_each([sample(2, 3, 9, 0), sample(4, 6, 4, 1)], *SHAPE)
  pieces = list(generate.stream(model, [batch], [Sampling(17, ()), Sampling(4, ())]))
  assert [[len(row) for row in piece] for piece in pieces] == [[8, 4], [8, 0], [1, 0]]


def test_a_hundred_questions_compile_nothing_after_the_short_lists(tiny):
  """Texts of 1 to 128 tokens, answers of up to 100, up to four questions together."""
  cfg, rng, compiled = tiny(), np.random.default_rng(0), []
  model = vlm.VLM(
    dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=1)), rngs=nnx.Rngs(0)
  )

  def asked(texts, each):
    def prompt(count):
      tokens = rng.integers(0, 64, 1 + count).astype(np.int32)
      tokens[0] = IMAGE_TOKEN
      return Prompt(tokens, tokens, tokens < 0, (1, 1 + count))

    visual = rng.normal(size=(1, 128, 32)).astype(np.float32)
    batches = [generate.as_batch(prompt(n), visual, 8, max(texts)) for n in texts]
    return generate.stream(model, batches, each)

  def listen(event, seconds, **about):
    return compiled.append(about["fun_name"]) if event == BACKEND_COMPILE else None

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for text in {generate.text_slots(n) for n in range(1, 129)}:
      for answer in {generate.answer_slots(n) for n in range(1, 101)}:
        for together in {len(part) for n in range(1, 5) for part in generate.batches(range(n), 4)}:
          next(asked([text] * together, Sampling(answer, (3, 5))))
    warm = len(compiled)
    questions = [
      (int(rng.integers(1, 129)), drawn_sampling(rng, max_new_tokens=int(rng.integers(1, 101))))
      for _ in range(100)
    ]
    while questions:
      some = int(rng.integers(1, 8))
      for part in generate.batches(questions[:some], 4):
        texts, each = zip(*part, strict=True)
        assert len(list(asked(texts, each))) <= 13
      questions = questions[some:]
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert warm and compiled[warm:] == []


@pytest.mark.pure
def test_sizes_come_from_short_lists():
  texts = {generate.text_slots(n) for n in range(1, 32769)}
  assert sorted(texts) == [64, 128, 192, 256, 512, 1024, 2048, *range(4096, 32769, 4096)]
  assert {generate.text_slots(n, 16) for n in range(1, 65)} == {16, 32, 48, 64}
  assert {generate.answer_slots(n) for n in range(1, 1025)} == {64, 256, 1024}
  sizes = (64, 65, 256, 257)
  assert [generate.answer_slots(n) for n in sizes] == [64, 256, 256, 1024]
  assert all(generate.text_slots(n) >= n for n in (64, 65, 4095, 4097))


@pytest.mark.pure
def test_rows_that_end_otherwise_are_refused():
  with pytest.raises(ValueError):
    stack_sampling([Sampling(1, (3,)), Sampling(1, (5,))])


@pytest.mark.pure
def test_the_vocabulary_is_sorted_for_draws_alone():
  """The sort is in the one branch that greedy rows do not take."""

  def sorts(jaxpr):
    return sum(
      (eqn.primitive.name == "sort")
      + sum(sorts(inner) for inner in jax.extend.core.jaxprs_in_params(eqn.params))
      for eqn in jaxpr.eqns
    )

  keys = jax.random.split(jax.random.key(0), 1)
  traced = jax.make_jaxpr(
    lambda temperature: generate.choose_tokens(
      LOGITS,
      LOGITS > 0,
      dataclasses.replace(stack_sampling([Sampling(1, ())]), temperature=temperature),
      keys,
    )
  )(np.zeros(1, np.float32))
  (cond,) = (eqn for eqn in traced.eqns if eqn.primitive.name == "cond")
  greedy, drawn = (sorts(branch.jaxpr) for branch in cond.params["branches"])
  assert (greedy, drawn, sorts(traced.jaxpr)) == (0, 1, 1)


LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))


def drawn(count=400, logits=LOGITS, seen=None, **how):
  seen = jnp.zeros(logits.shape, bool) if seen is None else seen
  sampling = stack_sampling([Sampling(1, (), **how)])

  def one(key):
    return generate.choose_tokens(logits, seen, sampling, key[None])[0]

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
  sampling = stack_sampling([Sampling(1, (), repetition_penalty=2.0)])
  np.testing.assert_array_equal(
    generate.choose_tokens(logits, seen, sampling, jax.random.split(jax.random.key(0), 1)), [1]
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
