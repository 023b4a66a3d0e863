"""What LP-Comp does inside: attention flow and agreement of logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from packed import one_each

from xcomp_jax.checkpoints import loading
from xcomp_jax.config import ConfigError, LPCompConfig
from xcomp_jax.model import lp_comp, vlm
from xcomp_jax.viz import flow


@pytest.fixture
def small(tiny):
  """A function (schedule, keep) -> VLMConfig of two layers."""
  llm = dataclasses.replace(tiny().llm, layers=2)
  return lambda schedule, keep: tiny(llm=llm, lp_comp=LPCompConfig(schedule, keep, 16))


@pytest.mark.parametrize("keep", ["suffix", "uniform"])
def test_even_attention_goes_where_tokens_are(small, sample, keep):
  """With queries of zero every row looks evenly at what it may see, so the shares can be
  counted.
  """
  cfg = small((9, 3), keep)
  model = vlm.VLM(cfg, rngs=nnx.Rngs(0))
  for layer in model.llm.layers:
    layer.q.kernel[...] = jnp.zeros_like(layer.q.kernel[...])
    layer.q.bias[...] = jnp.zeros_like(layer.q.bias[...])
  batch = one_each([sample(1, 3, 6), sample(2, 2, 4, seed=1)], 16, 4, 8)
  shares = np.asarray(jax.jit(flow.attention_flow)(model, batch))
  assert shares.shape == (2, 2, 2, 18)
  kept = lp_comp.survivors(cfg.lp_comp, 2)
  for row, (clips, prefix, text) in enumerate([(1, 3, 6), (2, 2, 4)]):
    for layer, alive in enumerate(kept):
      # without padding
      slots = [0] * prefix + [place + 1 for place in alive] * (clips * 8) + [17] * text
      rows = [
        [i for i, slot in enumerate(slots) if slot == 17],
        [i for i, slot in enumerate(slots) if slot - 1 in kept[-1]],
      ]
      for kind, these in enumerate(rows):
        expected = np.mean(
          [np.bincount(slots[: i + 1], minlength=18) / (i + 1) for i in these], axis=0
        )
        np.testing.assert_allclose(shares[row, layer, kind], expected, atol=1e-6)


def test_attention_has_no_place_to_go_where_tokens_are_averaged(small, sample):
  model = vlm.VLM(small("cosine", "avgpool"), rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError) as caught:
    flow.attention_flow(model, one_each([sample(1, 3, 6)], 8, 4, 8))
  assert caught.value.fields == {"where": "lp_comp.keep", "value": "avgpool"}


@pytest.mark.pure
def test_agreement_by_hand():
  log = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
  same, apart = flow.agreement(log[::-1] + 3.0, log)  # a constant moves no probability
  assert same.tolist() == [False, False]
  expected = [
    0.5 * np.log(5) + 0.25 * np.log(0.25 / 0.8) + 0.25 * np.log(2.5),
    0.1 * np.log(0.2) + 0.8 * np.log(3.2) + 0.1 * np.log(0.4),
  ]
  np.testing.assert_allclose(apart, expected, rtol=1e-5)
  same, apart = flow.agreement(log, log)
  assert same.all() and np.abs(apart).max() < 1e-7


def test_another_lp_comp_shares_the_parameters(small, sample):
  model = vlm.VLM(small((9, 3), "suffix"), rngs=nnx.Rngs(0))
  whole = loading.with_lp_comp(model, LPCompConfig("cosine", "none", 16))
  assert all(
    a is b
    for a, b in zip(
      jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(whole)), strict=True
    )
  )
  assert {layer.cfg.lp_comp.keep for layer in (whole, whole.llm, *whole.llm.layers)} == {"none"}
  features = dataclasses.replace(
    one_each([sample(1, 3, 6)], 8, 4, 8), visual=jnp.ones((1, 8, 16, 32))
  )
  assert jax.jit(vlm.forward)(whole, features).x.shape == (1, 4 + 128 + 8, 32)
