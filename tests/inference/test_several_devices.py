"""Asking over a mesh: answers, selections, scores are those of one device (heads of the 7B)."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from xcomp_jax.config import LPCompConfig, MeshConfig
from xcomp_jax.data import prompt
from xcomp_jax.inference import encoded_video
from xcomp_jax.inference.chat import Chat
from xcomp_jax.inference.generate import Sampling
from xcomp_jax.inference.selection import frame_selector
from xcomp_jax.model import qc_comp
from xcomp_jax.model.vlm import VLM
from xcomp_jax.parallel.mesh import make_mesh, param_shardings

TINY = pathlib.Path(__file__).parents[2] / "assets" / "tiny"
FRAMES = 1024  # the fewest that "official" selects from
QUESTIONS = ["Which digit?", "Where did the red ring move?", "Colour?"]


@pytest.fixture(scope="module")
def model(tiny):
  cfg = tiny()
  llm = dataclasses.replace(
    cfg.llm, vocab_size=512, width=112, layers=2, heads=28, kv_heads=4, head_dim=4, tied=False
  )
  cfg = dataclasses.replace(
    cfg,
    vision=dataclasses.replace(cfg.vision, image_size=16),
    llm=llm,
    # a token a frame: rounds of scoring are quick
    lp_comp=LPCompConfig((8, 2), "suffix", 8),
    tokens_per_frame=1,
    clips_per_chunk=32,
    remat=False,
  )
  return jax.jit(lambda: VLM(cfg, rngs=nnx.Rngs(0)))()


def ask(model):
  """A video's features, and answers: to several questions at once, and by another mode to one."""
  pixels = np.random.default_rng(0).integers(0, 256, (FRAMES, 16, 16, 3), np.uint8)
  film = encoded_video.encode_video(
    model, iter(pixels), np.arange(FRAMES) / 8, 128.0, "", phases=(0, 4)
  )
  sampling = Sampling(10, (), repetition_penalty=1.5)
  tokenizer = prompt.load_tokenizer(TINY)
  aligned, official = (
    Chat(
      model,
      tokenizer,
      film,
      selector=frame_selector(FRAMES, 8, qc_comp.select_config(mode, 64)),
      sampling=sampling,
    )
    for mode in ("aligned", "official")
  )
  return film.features, [*aligned.ask_apart(QUESTIONS), official.ask(QUESTIONS[1])]


@pytest.fixture(scope="module")
def alone(model):
  return ask(model)


def bytes_on(device, tree):
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device
  )


@pytest.mark.parametrize(
  "sizes",
  [
    pytest.param((1, 1, 4), id="tensor"),
    pytest.param((1, 4, 1), id="fsdp", marks=pytest.mark.slow),
    pytest.param((4, 1, 1), id="data", marks=pytest.mark.slow),
    pytest.param((2, 1, 2), id="both", marks=pytest.mark.slow),
  ],
)
def test_answers_over_a_mesh_are_those_of_one_device(model, alone, sizes):
  mesh = make_mesh(MeshConfig(*sizes, 1), jax.devices()[:4])
  split = jax.device_put(model, param_shardings(model, mesh))
  share = bytes_on(jax.devices()[3], split) / bytes_on(jax.devices()[0], model)
  assert share < 0.01 + sizes[0] / 4 if sizes[0] < 4 else share == 1
  with jax.set_mesh(mesh):
    features, answers = ask(split)
  jax.tree.map(lambda *two: np.testing.assert_allclose(*two, atol=1e-5), features, alone[0])
  assert [one.text for one in answers] == [one.text for one in alone[1]]
  for one, want in zip(answers, alone[1], strict=True):
    np.testing.assert_array_equal(one.selection.frames, want.selection.frames)
    np.testing.assert_allclose(one.selection.scores, want.selection.scores, atol=1e-5)
