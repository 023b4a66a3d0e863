import jax
import numpy as np
import pytest
from flax import nnx

from xcomp_jax import generate
from xcomp_jax.data.batch import Bucket, Example, collate
from xcomp_jax.generate import Sampling
from xcomp_jax.model import vlm

BUCKET = Bucket(4, 8, 8, 32)


@pytest.fixture(scope="module")
def model(tiny):
  model = vlm.VLM(tiny(), rngs=nnx.Rngs(0))
  model.llm.norm.scale[...] = jax.random.normal(jax.random.key(1), 32)  # else the tied head repeats its input
  return model


def test_cached_decoding_equals_a_full_pass_per_token(model, sample):
  prompts = [sample(2, 3, 9, 0), sample(4, 6, 4, 1)]
  answers = generate.generate(model, collate(prompts, BUCKET), Sampling(5, (), 1.0))
  run = nnx.jit(lambda m, b: generate.prefill(m, b, 0).logits)
  for prompt, answer in zip(prompts, answers, strict=True):
    tokens = prompt.tokens
    for token in answer:
      more = Example(prompt.visual, tokens, np.full_like(tokens, -100), np.zeros(len(tokens), bool), 0)
      assert int(run(model, collate([more], BUCKET)).argmax()) == token
      tokens = np.append(tokens, token).astype(np.int32)


def test_an_answer_ends_before_its_eos(model, sample):
  batch = collate([sample(2, 3, 9, 0)], BUCKET)
  (free,) = generate.generate(model, batch, Sampling(6, (), 1.0))
  eos = int(free[3])
  (ended,) = generate.generate(model, batch, Sampling(6, (eos,), 1.0))
  np.testing.assert_array_equal(ended, free[: list(free).index(eos)])


def test_repetition_penalty_counts_new_tokens_only(model, sample):  # quirk Q20
  batch = collate([sample(2, 3, 9, 0)], BUCKET)
  (free,) = generate.generate(model, batch, Sampling(8, (), 1.0))
  (strict,) = generate.generate(model, batch, Sampling(8, (), 1e6))
  assert strict[0] == free[0]  # nothing is new yet
  assert len(set(strict.tolist())) == len(strict)
