"""Rotary positions, plain and stretched by YaRN, against formulas written anew."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as w
from flax import nnx

from xcomp_jax import config, config_io
from xcomp_jax.checkpoints import loading, saving
from xcomp_jax.checkpoints.config_json import read_yarn, rope_scaling, yarn_of
from xcomp_jax.model import layers
from xcomp_jax.model.qwen2 import Decoder, Lengths, run_layers

QWEN = yarn_of(4.0, 32768)


def qwen_frequencies(head_dim, theta, factor, trained, fast=32, slow=1):
  """Qwen2.5's rule, frequency by frequency: how often it turns within the trained positions
  decides.
  """
  whole = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]

  def index_of(turns):
    return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

  first, last = max(math.floor(index_of(fast)), 0), min(math.ceil(index_of(slow)), head_dim - 1)
  out = []
  for i, frequency in enumerate(whole):
    share = min(max((i - first) / (last - first), 0.0), 1.0)
    out.append(frequency / factor * share + frequency * (1 - share))
  return out, first, last


def rotated(x, positions, frequencies, scale):
  """The rotation as complex numbers, in float64."""
  half = x.shape[-1] // 2
  turned = (
    (x[..., :half] + 1j * x[..., half:])
    * np.exp(1j * np.asarray(positions)[:, None] * np.asarray(frequencies))
    * scale
  )
  return np.concatenate([turned.real, turned.imag], -1)


def llm(tiny, **changes):
  return dataclasses.replace(tiny().llm, **changes)


@pytest.mark.pure
@pytest.mark.parametrize(
  "head_dim, theta, factor", [(128, 1e6, 4.0), (128, 1e7, 8.0), (64, 1e4, 2.5)]
)
def test_yarn_is_the_formula(head_dim, theta, factor):
  wanted, first, last = qwen_frequencies(head_dim, theta, factor, 32768)
  half = head_dim // 2
  ours = theta ** (-np.arange(half) / half) * layers.slower(yarn_of(factor, 32768), half, theta)
  np.testing.assert_allclose(ours, wanted, rtol=1e-6)
  stretch = layers.slower(yarn_of(factor, 32768), half, theta)
  assert (
    (stretch[: first + 1] == 1).all()
    and np.allclose(stretch[last:], 1 / factor)
    and (np.diff(stretch) <= 0).all()
  )


@pytest.mark.pure
def test_frequencies_of_the_10_000_frame_setting():
  # Of 64 frequencies those up to 23 turn 32 times and more within 32,768 positions, those from 40
  # on less than once.
  stretch = layers.slower(QWEN, 64, 1e6)
  turns = 32768 * 1e6 ** (-np.arange(64) / 64) / (2 * np.pi)
  assert (stretch[turns >= 33] == 1).all() and (stretch[turns < 1] == 0.25).all()
  assert ((0.25 < stretch[24:40]) & (stretch[24:40] < 1)).all()
  assert QWEN.attention == pytest.approx(1.1386294361119891, rel=1e-12)  # 0.1 ln 4 + 1


@pytest.mark.parametrize("scaling", [None, QWEN])
def test_rotation_with_and_without_yarn(tiny, scaling):
  cfg = llm(tiny, head_dim=128, rope_theta=1e6, rope_scaling=scaling)
  x = np.random.default_rng(0).normal(size=(1, 5, 2, 128)).astype(np.float32)
  positions = np.array([0, 1, 77, 4096, 16384])
  frequencies = (
    qwen_frequencies(128, 1e6, 4.0, 32768)[0] if scaling else 1e6 ** (-np.arange(64) / 64)
  )
  wanted = rotated(
    np.moveaxis(x[0], 1, 0), positions, frequencies, QWEN.attention if scaling else 1.0
  )
  ours = np.moveaxis(
    np.asarray(layers.rotate(jnp.asarray(x), jnp.asarray(positions)[None], cfg))[0], 1, 0
  )
  np.testing.assert_allclose(ours[:, :3], wanted[:, :3], rtol=0, atol=5e-5)
  # angles of 16,384 radians in float32 have 1e-3 left
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-2)


def test_scores_are_multiplied_by_the_square_of_the_factor(tiny):
  """At equal positions the rotations cancel, and what is left of YaRN in a score is its factor
  twice.
  """
  cfg = llm(tiny, head_dim=64, rope_scaling=QWEN)
  q, k = np.random.default_rng(0).normal(size=(2, 1, 3, 1, 64)).astype(np.float32)
  at = jnp.full((1, 3), 123)

  def score(llm):
    return np.einsum(
      "blhd,blhd->bl",
      layers.rotate(jnp.asarray(q), at, llm),
      layers.rotate(jnp.asarray(k), at, llm),
    )

  np.testing.assert_allclose(
    score(cfg), (q * k).sum(-1)[..., 0] * (0.1 * np.log(4) + 1) ** 2, rtol=2e-4
  )


def test_a_decoder_with_yarn_is_another_one(tiny):
  """All of prefill goes through it; a stretch of 1 changes nothing."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 32)).astype(np.float32))

  def one(n):
    return jnp.full((1, 1), n, jnp.int32)

  def out(scaling):
    llm = dataclasses.replace(tiny().llm, layers=1, rope_theta=100.0, rope_scaling=scaling)
    cfg = tiny(
      llm=llm, lp_comp=config.LPCompConfig((16,), "suffix", 16), remat=False, attention="einsum"
    )
    decoder = jax.jit(lambda: Decoder(cfg, rngs=nnx.Rngs(0)))()
    return jax.jit(
      lambda decoder, x: run_layers(decoder, x, Lengths(one(2), one(1), one(2)), prefix=2, text=2).x
    )(decoder, x)

  plain = out(None)
  np.testing.assert_array_equal(plain, out(yarn_of(1.0, 4)))
  assert np.abs(plain - out(yarn_of(4.0, 4))).max() > 1e-3


@pytest.mark.pure
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_yarn_of_a_config_json(tmp_path, kind):
  values = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
  cfg = w.read_config(w.configured(tmp_path, rope_scaling=values, max_position_embeddings=32768))
  assert (
    cfg.llm.rope_scaling
    == QWEN
    == config.Yarn(
      factor=4.0, positions=32768, beta_fast=32.0, beta_slow=1.0, attention=0.1 * math.log(4) + 1
    )
  )
  assert cfg.llm.context == 131072
  more = values | {"attention_factor": 1.0, "beta_fast": 16, "beta_slow": 2, "rope_theta": 1e6}
  assert w.read_config(w.configured(tmp_path, rope_scaling=more)).llm.rope_scaling == config.Yarn(
    factor=4.0, positions=32768, beta_fast=16.0, beta_slow=2.0, attention=1.0
  )
  yarn = config.Yarn(factor=4.0, positions=32768, beta_fast=16.0, beta_slow=2.0, attention=1.0)
  assert read_yarn("", rope_scaling(yarn)).beta_fast == 16.0
  assert (
    w.read_config(w.configured(tmp_path, rope_scaling={kind: "default"})).llm.rope_scaling is None
  )


@pytest.mark.pure
def test_yarn_as_an_explicit_value_goes_before_the_checkpoints(tmp_path):
  there = w.configured(tmp_path, rope_scaling=w.YARN | {"factor": 2.0})
  assert w.read_config(there, yarn="checkpoint").llm.rope_scaling.factor == 2
  assert w.read_config(there, yarn=(4.0, 32768)).llm.rope_scaling == QWEN
  assert w.read_config(there, yarn=None).llm.rope_scaling is None


@pytest.mark.pure
def test_yarn_in_a_run_is_checked():
  def read(value):
    return config_io.from_command_line(
      ["train", "--config=configs/sct.py", f"--config.model.yarn={value}"]
    )

  for wrong in ("(4.0,)", "(0.5, 32768)", "(4.0, 32768, 1.0)"):
    with pytest.raises(
      config.ConfigError,
      match=r"config\.model\.yarn = .*: must be \(factor, positions trained on\)",
    ):
      config.check_run(read(wrong))
  run = read("(4.0, 32768)")
  config.check_run(run)
  assert run.model.yarn == (4.0, 32768.0)
  with pytest.raises(
    config.ConfigError, match=r"model\.yarn = 'on': expected .* 'checkpoint' or None"
  ):
    read("on")


@pytest.mark.parametrize("layout", ["torch", "orbax"])
def test_yarn_is_exported(reference, tmp_path, layout):
  source = w.tiny(tmp_path / "in", w.tiny_tensors(reference), rope_scaling=None)
  cfg = w.read_config(source, yarn=(4.0, 32768))
  save = saving.save_torch if layout == "torch" else saving.save_orbax
  save(tmp_path / "out", loading.load_model(source, cfg), cfg, source)
  written = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
  assert written == {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32768,
  }
  assert w.read_config(tmp_path / "out") == cfg
  plain = w.read_config(tmp_path / "out", yarn=None)
  save(tmp_path / "back", loading.load_model(tmp_path / "out", plain), plain, tmp_path / "out")
  assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_scaling"] is None
