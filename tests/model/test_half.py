"""float16: how often it decides otherwise than float32, what stays finite in it, and where it is
refused.

The table of docs/results.md: `pytest tests/model/test_half.py -m "slow or not slow" -k decides -s`.
"""

import dataclasses
import json

import cards
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from packed import one_each

from xcomp_jax import predecode
from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.config import COSINE, ConfigError, ModelConfig
from xcomp_jax.config_io import from_command_line
from xcomp_jax.data.sampling import FrameSettings
from xcomp_jax.inference import encoded_video, generate, video_model
from xcomp_jax.model import kernels, layers, token_merging, umt, vlm
from xcomp_jax.model.attention import AttentionMask, attend
from xcomp_jax.model.qwen2 import Decoder
from xcomp_jax.model.softmax import attend_first, question_scores
from xcomp_jax.parity import parity
from xcomp_jax.parity.tower import frames_of, in_clips
from xcomp_jax.plan import absent, fits
from xcomp_jax.training import loop

HALVES = ("float16", "bfloat16")
# programs that run once
QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
LARGEST = 65504.0
GREEDY = {"bfloat16": 36, "float16": 40}  # tokens of 40, at least


def load(directory, dtype):
  """The recorded model."""
  cfg = read_vlm_config(
    directory,
    ModelConfig(
      clip_frames="checkpoint",
      yarn="checkpoint",
      dtype=dtype,
      param_dtype=dtype,
      clips_per_chunk=1,
      attention="einsum",
      remat=False,
    ),
    COSINE,
  )
  return loading.load_model(directory, cfg, dtype=dtype)


def together(sources):
  """Of merged tokens: which of a clip's tokens are in one with which."""
  return sources[:, :, None] == sources[:, None]


def test_how_often_token_merging_decides_otherwise(reference):
  into, recorded = {}, parity.read_arrays(reference / "dev" / "vision.npz")
  run = jax.jit(lambda tower, clips: token_merging.sources(tower(clips), clips.shape[1] * 16, 4))
  for dtype in ("float32", *HALVES):
    tower, clips = load(reference / "dev", dtype).vision, in_clips(frames_of(recorded), recorded)
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
      into[dtype] = np.asarray(run(tower, clips))
  for dtype, (others, moved) in {"bfloat16": (0.1, 0.2), "float16": (0.01, 0.05)}.items():
    other = (together(into[dtype]) != together(into["float32"])).any(-1)
    place = into[dtype] != into["float32"]
    print(
      f"{dtype}: of {other.size} tokens {other.mean():.1%} are merged with others than in float32, "
      f"{place.mean():.1%} end at another place"
    )
    assert other.mean() <= others and place.mean() <= moved


@pytest.mark.slow  # programs of 28 layers
@pytest.mark.parametrize("dtype", HALVES)
def test_how_often_greedy_decoding_decides_otherwise(reference, dtype):
  recorded, variants = (
    parity.read_arrays(reference / "dev" / f"{name}.npz") for name in ("llm", "llm_variants")
  )
  prefix, text = map(len, parity.slot_of(recorded["input_ids"]))
  # float32 gives all of these (tests/parity/test_parity.py)
  wanted = {"cosine_suffix": recorded["generated"]}
  wanted |= {
    key.partition(":")[0]: tokens for key, tokens in variants.items() if key.endswith(":generated")
  }
  model, x, same = load(reference / "dev", dtype), jnp.asarray(recorded["inputs_embeds"], dtype), []
  with jax.default_matmul_precision(None):
    for name, tokens in wanted.items():
      varied = loading.with_lp_comp(model, parity.lp_comp_of(name, model.cfg.llm.layers))
      program = parity.prefill_and_decode.lower(varied, x, prefix, text, 8).compile(QUICK)
      _, logits, new, _ = program(varied, x)
      same.append(np.asarray(new) == tokens)
      if name == "cosine_suffix":
        other = np.asarray(logits).argmax(-1) != recorded["logits"].argmax(-1)
        error = np.abs(np.asarray(logits) - recorded["logits"]).max()
  same = np.concatenate(same)
  print(
    f"{dtype}: {same.sum()} of {len(same)} greedy tokens as recorded; at {other.sum()} of "
    f"{len(other)} places of the prompt another token is the most probable next one; its logits "
    f"differ by up to {error:.2g} of {np.abs(recorded['logits']).max():.0f}"
  )
  assert same.sum() >= GREEDY[dtype] and other.sum() <= 1


# --- 65,504 and more
# -----------------------------------------------------------------------------------------------


def near(*shape, seed=0):
  """Numbers of float16 of all sizes, the largest included."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 4, shape)
  x.ravel()[:: x.size // 7] = LARGEST * np.where(
    np.arange(len(x.ravel()[:: x.size // 7])) % 2, 1, -1
  )
  return jnp.asarray(np.clip(x, -LARGEST, LARGEST), jnp.float16)


def close(half, whole, of=2e-3):
  """What is computed from the same numbers in float16 is finite, and as in float32 but for its
  rounding.
  """
  half, whole = np.asarray(half, np.float32), np.asarray(whole, np.float32)
  assert np.isfinite(half).all() and np.linalg.norm(half - whole) <= of * np.linalg.norm(whole)


def test_norms_of_the_largest_numbers(tiny):
  x = near(2, 5, 32)
  for make in (
    lambda dtype: layers.RMSNorm(32, 1e-6, dtype, jnp.float32),
    lambda dtype: umt.layer_norm(tiny(dtype=dtype.__name__), 1e-12, nnx.Rngs(0), jnp.float32),
  ):
    out = make(jnp.float16)(x)
    assert out.dtype == jnp.float16
    close(out, make(jnp.float32)(x.astype(jnp.float32)))


def test_merging_the_largest_numbers():
  x, run = near(2, 36, 24), jax.jit(lambda x: token_merging.merge(x, 24, 4))
  out = run(x)
  assert out.dtype == jnp.float16
  # choices included
  np.testing.assert_array_equal(out, run(x.astype(jnp.float32)).astype(jnp.float16))


@pytest.mark.parametrize("how", ["einsum", "tiled"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_whose_scores_float16_has_not(how, causal):
  q, k = 100 * jax.random.normal(jax.random.key(0), (2, 2, 390, 4, 16)).astype(jnp.float16)
  k, v, valid = (
    k[:, :, :2],
    near(2, 390, 2, 16),
    (jnp.arange(390) % 9 > 0) & (jnp.arange(390) < 370),
  )
  mask, wide = (
    AttentionMask(causal, jnp.stack([valid, valid[::-1]])),
    [x.astype(jnp.float32) for x in (q, k, v)],
  )
  assert float(jnp.abs(jnp.einsum("blhd,bshd->bhls", wide[0][:, :, ::2], wide[1])).max()) > LARGEST
  run = jax.jit(
    lambda q, k, v: jnp.where(
      mask.valid[..., None, None], attend(q, k, v, mask, implementation=how), 0
    )
  )
  out = run(q, k, v)
  assert out.dtype == jnp.float16
  close(out, run(*wide), 5e-3)


def test_a_softmax_over_more_keys_than_float16_counts():
  q, k, v = (
    jnp.zeros((1, 1, 1, 8), jnp.float16),
    near(1, 70000, 1, 8),
    jnp.ones((1, 70000, 1, 8), jnp.float16),
  )
  np.testing.assert_allclose(
    attend(q, k, v, AttentionMask(False), implementation="einsum"), 1, rtol=2e-3
  )
  first, rest = k[:, None, :40000], k[:, 40000:]
  ones, others = attend_first(
    q, rest, v[:, 40000:], lambda slots: jnp.ones((1, 1, len(slots)), bool), 30000
  )
  np.testing.assert_allclose(ones, 1, rtol=2e-3)
  np.testing.assert_allclose(
    question_scores(q, first, jnp.ones((1, 1)), others), 1 / 70000, rtol=1e-5
  )


def test_logits_are_float32(tiny):
  cfg = tiny(dtype="float16")
  llm = nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.float16))
  llm.norm.scale = nnx.Param(jnp.full(32, 3e4, jnp.float16))
  llm.embed.embedding = nnx.Param(jnp.ones((64, 32), jnp.float16))
  logits = llm.logits(jnp.full((1, 32), LARGEST, jnp.float16))
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, 32 * 3e4, rtol=2e-3)


def test_numbers_that_float16_has_not_are_no_answer(tiny, sample):
  model = vlm.VLM(tiny(dtype="float16"), rngs=nnx.Rngs(0), param_dtype=jnp.float16)
  frames = np.zeros((8, 48, 48, 3), np.uint8)
  model.vision.norm.bias[...] = jnp.full(32, jnp.inf, jnp.float16)
  with pytest.raises(ConfigError) as caught:
    encoded_video.encode_video(model, frames, np.arange(8) / 8, 1.0, "it")
  assert caught.value.fields == {"where": "features of the tower", "value": "float16"}
  assert "float16, whose largest number is 65,504: take --dtype float32" in str(caught.value)
  kernels.check_finite(np.array([np.inf]), "logits", "float32")  # not looked at
  model.llm.norm.scale[...] = jnp.full(32, jnp.inf, jnp.float16)
  prompt = one_each([sample(0, 0, 9)], 0, 0, 16)
  with pytest.raises(ConfigError) as caught:
    next(generate.stream(model, [prompt], generate.Sampling(8, ())))
  assert caught.value.fields == {"where": "the LLM's logits", "value": "float16"}


# --- where it is taken, and where not
# ------------------------------------------------------------------------------


@pytest.mark.pure
def test_what_a_device_computes_in_where_nobody_says():
  def of(device, **more):
    return kernels.compute_dtype(kernels.card_of(device), **more)

  volta = cards.Device("gpu", "Tesla V100-SXM2-16GB", "7.0")
  assert {of(device) for device in (cards.gpu("t4"), volta)} == {"float16"} and of(
    cards.gpu("t4"), gradient=True
  ) == "float32"
  assert of(cards.Device("gpu", "Tesla P100", "6.0")) == of(cards.Device("cpu", "cpu")) == "float32"
  assert [fits.computed_in((7, 5), job) for job in ("ask 256", fits.FEATURES)] == [
    "float16",
    "float32",
  ]
  assert fits.computed_in((8, 9), "ask 256") == fits.computed_in((8, 9), fits.FRAMES) == "bfloat16"


def test_cells_of_another_dtype_are_made_again(tmp_path, monkeypatch, capsys):
  config = from_command_line(["plan", "--config=configs/sct.py"])
  for model in fits.MODELS:
    for job in fits.JOBS:
      cell = {
        "stamp": fits.cell_stamp(config),
        "job": job,
        "dtype": fits.computed_in((7, 5), job),
        "clips": 4,
        "cards": 1,
        "programs": {"decode": {"temporaries": 1e9}},
      }
      (tmp_path / f"{fits.key((7, 5), model, job)}.json").write_text(json.dumps(cell))
  assert fits.fits_table(config, tmp_path, ["t4"]).splitlines()[1].split()[:5] == [
    "t4",
    "16",
    "2B",
    "float16/float32",
    "4",
  ]
  (tmp_path / f"{fits.key((7, 5), '2B', 'ask 256')}.json").write_text(
    json.dumps(cell | {"dtype": "float32"})
  )
  monkeypatch.setattr(
    fits.concurrent.futures, "ProcessPoolExecutor", lambda *_: pytest.fail("made again")
  )
  with pytest.raises(pytest.fail.Exception, match="made again"):
    fits.fits_table(config, tmp_path, ["t4"])
  assert "1 cells" in capsys.readouterr().err


def test_tpus_and_training_have_no_float16(tmp_path):
  with (
    absent.computing_on([cards.V5E]),
    pytest.raises(ConfigError) as caught,
  ):
    kernels.check_implementation("auto", "float16")
  assert caught.value.fields == {
    "where": "model.dtype",
    "value": "float16",
    "device": "TPU v5 lite",
    "allowed": "bfloat16",
  }
  with pytest.raises(ConfigError) as caught:
    kernels.check_implementation("xla_chunked", "float16")
  assert caught.value.fields == {
    "where": "model.attention",
    "value": "xla_chunked",
    "device": "cpu",
  }
  for name in ("xla_chunked", "flash"):
    why = kernels.unusable(name, kernels.here(), kernels.library(), "float16")
    assert why == f"{name} has no float16 on CPUs"
  for name in ("dtype", "param_dtype"):
    config = from_command_line(
      [
        "train",
        "--config=configs/sct.py",
        f"--config.model.{name}=float16",
        f"--config.workdir={tmp_path / 'run'}",
      ]
    )
    with pytest.raises(
      ConfigError, match=f"config.model.{name} = 'float16': it is for asking.*loss scaling"
    ):
      loop.train(config)


@pytest.mark.pure
def test_kernels_of_cards_take_it():
  for kind in ("h100", "b200", "a100", "l4", "t4"):
    card = kernels.card_of(cards.gpu(kind))
    call = dataclasses.replace(cards.CLIP, batch=1)
    half = dataclasses.replace(call, dtype="float16")
    assert kernels.kernel_rule(card, "0.0.12", half) == kernels.kernel_rule(card, "0.0.12", call)
    with absent.computing_on([cards.gpu(kind)]):
      kernels.check_implementation("auto", "float16")
    assert kernels.unusable("cudnn", card, "0.0.12", "float16") == kernels.unusable(
      "cudnn", card, "0.0.12", "bfloat16"
    )
  assert (
    kernels.block(card, "0.0.12", "xla_chunked", "float16") == 2
    and kernels.block(card, "0.0.12", "xla_chunked", "float32") == 1
  )


def test_an_encoded_video_of_another_dtype_is_refused(tiny, tmp_path):
  def make(dtype):
    return vlm.VLM(tiny(dtype=dtype), rngs=nnx.Rngs(0))

  video = encoded_video.encode_video(
    make("float16"), np.zeros((8, 48, 48, 3), np.uint8), np.arange(8) / 8, 1.0, "it"
  )
  assert video.features[0][0].dtype == np.float16 and video.identity.endswith("-float16")
  encoded_video.save_video(video, tmp_path / "v.npz")
  np.testing.assert_array_equal(
    encoded_video.load_video(tmp_path / "v.npz", make("float16")).features[0], video.features[0]
  )
  with pytest.raises(
    encoded_video.EncodedVideoError,
    match="was encoded in float16, and this is to be computed in bfloat16; give that --dtype",
  ):
    encoded_video.load_video(tmp_path / "v.npz", make("bfloat16"))


def test_a_store_of_features_says_that_it_was_computed_in_float16(reference):
  assets = str(reference.parents[1] / "assets" / "tiny")
  wide, half = (
    predecode.load_tower(assets, FrameSettings(image_size=48), 4, dtype=dtype)
    for dtype in ("float32", "float16")
  )
  assert half.features == wide.features  # one tower; training takes both
  assert half.settings == wide.settings | {"computed_in": "float16"} and "float16" in half.about
  (made,) = half.encode(iter(np.zeros((1, 8, 48, 48, 3), np.uint8)))
  assert made.dtype == ml_dtypes.bfloat16 and np.isfinite(made.astype(np.float32)).all()
  assert (
    video_model.prepare_model(video_model.AskSettings(checkpoint=assets, dtype="float16")).cfg.dtype
    == "float16"
  )
