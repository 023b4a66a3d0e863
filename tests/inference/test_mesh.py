"""Asking over a mesh: answers, selections and scores are those of one device (head layout of 7B)."""

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
    llm=llm,
    # a token a frame: rounds of scoring are quick
    lp_comp=LPCompConfig((8, 2), "suffix", 8),
    tokens_per_frame=1,
    clips_per_chunk=8,
    remat=False,
  )
  return jax.jit(lambda: VLM(cfg, rngs=nnx.Rngs(0)))()


def ask(model, pixels, mode):
  """The answers to a question and one after it, and to several at once."""
  select = qc_comp.select_config(mode, 64)
  selector = frame_selector(FRAMES, 8, select)
  film = encoded_video.encode_video(
    model, iter(pixels), np.arange(FRAMES) / 8, 128.0, "", phases=selector.phases
  )
  sampling = Sampling(10, (), repetition_penalty=1.5)
  tokenizer = prompt.load_tokenizer(TINY)
  chat = Chat(model, tokenizer, film, selector=selector, sampling=sampling)
  return film, [*map(chat.ask, QUESTIONS[:2]), *chat.ask_apart(QUESTIONS)]


@pytest.fixture(scope="module")
def pixels():
  return np.random.default_rng(0).integers(0, 256, (FRAMES, 48, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def alone(model, pixels):
  return {mode: ask(model, pixels, mode) for mode in ("aligned", "official")}


def bytes_on(device, tree):
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device
  )


@pytest.mark.parametrize(
  "sizes", [(1, 1, 4), (1, 4, 1), (4, 1, 1)], ids=["tensor", "fsdp", "data"]
)
def test_answers_over_a_mesh_are_those_of_one_device(model, pixels, alone, sizes):
  mesh = make_mesh(MeshConfig(*sizes, 1), jax.devices()[:4])
  split = jax.device_put(model, param_shardings(model, mesh))
  share = bytes_on(jax.devices()[3], split) / bytes_on(jax.devices()[0], model)
  assert share == 1 if sizes[0] == 4 else share < 0.27
  for mode, (film, answers) in alone.items():
    with jax.set_mesh(mesh):
      watched, got = ask(split, pixels, mode)
    for phase, features in film.features.items():
      np.testing.assert_allclose(watched.features[phase], features, atol=1e-5)
    assert [one.text for one in got] == [one.text for one in answers]
    for one, want in zip(got, answers, strict=True):
      np.testing.assert_array_equal(one.selection.frames, want.selection.frames)
      np.testing.assert_allclose(one.selection.scores, want.selection.scores, atol=1e-5)
