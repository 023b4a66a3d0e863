"""Whole programs with the kernel of each card replaced by einsum over exactly what it is handed,
against attention by einsum.
"""

import dataclasses

import cards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokamax
from flax import nnx

from xcomp_jax.bench import bench, parts
from xcomp_jax.bench.gpu_check import distance
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.config import COSINE, ModelConfig
from xcomp_jax.data.batch import Shape, batch_spec, fake_batch
from xcomp_jax.inference import generate, rounds
from xcomp_jax.model import kernels, qc_comp, vlm
from xcomp_jax.plan import absent

pytestmark = pytest.mark.slow

# What is handed over differs by the size of blocks: 128, 256 of the older Mosaic on a B200; XLA's
# own (T4) runs here as it is.
CHOICES = {"h100": "0.0.12", "a100": "0.0.17", "b200": "0.0.12", "t4": "0.0.12"}


def close(got, want, most=2e-3):
  """The same operations in bfloat16, in another order; `distance` is infinite where a number is
  none.
  """
  assert distance(got, want) <= most


@pytest.fixture
def on(monkeypatch):
  """A function (kind, run, *args): what jit(run) gives where the card is of that kind, and the
  kernels that it took.
  """

  def on(kind, run, *args):
    handed, own = [], tokamax.dot_product_attention

    def xla(q, k, v, **more):
      return handed.append((more["implementation"], q.shape)) or own(q, k, v, **more)

    with monkeypatch.context() as patch, absent.computing_on([cards.gpu(kind)]):
      patch.setattr(kernels, "library", lambda: CHOICES[kind])
      patch.setattr(
        tokamax, "dot_product_attention", xla if kind == "t4" else cards.fake_kernel(handed)
      )
      with jax.default_matmul_precision("highest" if kind == "t4" else None):
        out = jax.block_until_ready(jax.jit(run)(*args))
    return out, [(name, shape[1]) for name, shape, *_ in handed]

  return on


def towers():
  """Name -> config of a tower at full width, two layers of it."""

  def cut(cfg):
    return dataclasses.replace(
      parts.without_llm(cfg), vision=dataclasses.replace(cfg.vision, layers=2)
    )

  def read(folder, frames):
    return read_vlm_config(
      bench.RELEASED.parent / folder,
      ModelConfig(
        clip_frames=frames,
        yarn=None,
        dtype="bfloat16",
        param_dtype="bfloat16",
        clips_per_chunk=1,
        attention="auto",
        remat=False,
      ),
      COSINE,
    )

  large = read("VideoChat-Flash-Qwen2_5-2B_res448", 8)
  small = read("VideoChat-Flash-Qwen2-7B_res224", 8)
  other = read("VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B", 4)
  return {
    "448/8": cut(large),
    "448/4": cut(dataclasses.replace(large, clip_frames=4)),
    "224/8": cut(small),
    "InternVideo2": cut(other),
  }


@pytest.mark.parametrize(
  "name, kinds",
  [
    ("448/8", ("h100",)),
    ("448/4", ("h100", "b200")),
    ("224/8", ("h100", "a100", "b200")),
    ("InternVideo2", ("h100", "a100", "b200")),
  ],
)
def test_features_of_a_clip_are_those_by_einsum(name, kinds, on):
  cfg = towers()[name]

  def make(cfg):
    return vlm.VLM(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16).vision

  graph, state = nnx.split(jax.jit(lambda: make(cfg))())
  oracle = nnx.graphdef(nnx.eval_shape(lambda: make(dataclasses.replace(cfg, attention="einsum"))))
  size = cfg.vision.image_size
  frames = np.random.default_rng(0).integers(0, 256, (1, cfg.clip_frames, size, size, 3), np.uint8)
  want = jax.jit(lambda state, frames: nnx.merge(oracle, state)(frames))(state, frames)
  for kind in kinds:
    got, handed = on(kind, lambda state, frames: nnx.merge(graph, state)(frames), state, frames)
    block = 256 if kind == "b200" else 128
    length = cfg.vision.tokens(cfg.clip_frames)
    assert handed == [("triton" if kind == "a100" else "mosaic", -(-length // block) * block)] * 2
    close(got, want)


def language(dtype):
  """Two layers with heads as large as the real ones, of which the second keeps 9 of 16 tokens."""
  cfg = parts.without_tower(parts.sized(str(bench.RELEASED), dtype))
  llm = dataclasses.replace(cfg.llm, layers=2, width=512, mlp_width=1024, heads=4, vocab_size=512)
  return dataclasses.replace(
    cfg, llm=llm, lp_comp=dataclasses.replace(COSINE, schedule=(16, 9)), remat=True
  )


@pytest.mark.parametrize("kind", ["h100", "b200", "t4"])  # an A100 is handed what an H100 is
def test_prefill_decoding_scores_and_gradients_are_those_by_einsum(kind, on):
  dtype = "float32" if kind == "t4" else "bfloat16"
  cfg = language(dtype)

  def make(cfg):
    return vlm.VLM(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))

  graph, state = nnx.split(jax.jit(lambda: make(cfg))())
  oracle = nnx.graphdef(nnx.eval_shape(lambda: make(dataclasses.replace(cfg, attention="einsum"))))
  # A video, one of half the length with less text, and a sample without one: its first slots are
  # padding.
  batch = fake_batch(
    batch_spec(
      Shape(rows=3, samples=1, prefix=14, frames=112, text=96), ((16, cfg.vision.width), dtype)
    ),
    cfg.llm.vocab_size,
  )
  batch = dataclasses.replace(
    batch,
    frames=np.int32([[112], [56], [0]]),
    prefix_length=np.int32([[14], [14], [0]]),
    text_length=np.int32([[96], [50], [96]]),
  )
  batch.targets[1, -46:] = batch.targets[2, :15] = -100
  batch = jax.tree.map(jnp.asarray, batch)
  setting = dataclasses.replace(qc_comp.select_config("aligned", 64), layers=(0, 27))
  plan = qc_comp.plan_rounds(112, 8, setting)

  def run(graph):
    watch, score = rounds.scoring(graph, plan, setting, 1)

    def programs(state):
      model = nnx.merge(graph, state)
      begun = generate.prefill(model, batch, room=4)
      greedy = generate.stack_sampling([generate.Sampling(4, ())] * 3)
      _, ended = generate.decode_tokens(model, begun, greedy, 4)
      loss, grads = jax.value_and_grad(
        lambda state: vlm.loss(nnx.merge(graph, state), batch).sum()
      )(state)
      return (
        begun.logits,
        ended.logits,
        score(state, watch(state, batch.visual[:1].reshape(1, 14, 128, -1))),
        loss,
        {"llm": grads["llm"]},
      )

    return programs

  got, handed = on(kind, run(graph), state)
  with jax.default_matmul_precision("highest" if kind == "t4" else None):
    want = jax.jit(run(oracle))(state)
  if kind == "t4":
    assert set(handed) == {
      ("xla_chunked", 1902),
      ("xla_chunked", 1118),
      ("xla_chunked", 14 + plan.frames * 16),
    }
  else:
    assert {name for name, _ in handed} == {"h100": {"mosaic"}, "b200": {"mosaic", "triton"}}[kind]
    assert {length for _, length in handed} >= ({2048, 1280} if kind == "b200" else {1920, 1152})
  for a, b in zip(got, want, strict=True):
    close(a, b, 1e-5 if kind == "t4" else 1e-2)
