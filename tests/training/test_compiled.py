"""What a compiled training step must not hold: logits or attention of visual tokens, or a word with
the host.
"""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from xcomp_jax.bench import parts
from xcomp_jax.data.batch import Shape, batch_spec
from xcomp_jax.model import vlm
from xcomp_jax.training import steps

# a number that no other side has; prefix, last visual token, text
VOCABULARY, ROWS = (
  211,
  16 + 1 + 48,
)
FRAMES = 64  # 1,024 visual tokens
HOST = r"infeed|outfeed|\b(send|recv)\(|callback|annotate_device_placement|S\(5\)"


def program(cfg) -> str:
  """The text of a compiled gradient step on features."""
  graph, params = nnx.split(nnx.eval_shape(lambda: vlm.VLM(cfg, rngs=nnx.Rngs(0))))
  trained, frozen = (
    nnx.State({k: params[k] for k in ("projector", "llm")}),
    nnx.State({"vision": params["vision"]}),
  )
  number = jax.ShapeDtypeStruct((), np.float32)
  state, sums = steps.TrainState(trained, frozen, None), steps.Sums(trained, number, number, number)
  batch = batch_spec(
    Shape(rows=1, samples=1, prefix=16, frames=FRAMES, text=48),
    ((16, cfg.vision.width), np.float32),
  )
  step = jax.jit(
    steps.grad_step, static_argnames=("graph", "projector_max_frames"), donate_argnames="sums"
  )
  return step.lower(graph, state, sums, batch, (), projector_max_frames=None).compile().as_text()


def shapes(text: str) -> set[tuple[int, ...]]:
  """Of all arrays in the text of a program."""
  return {
    tuple(map(int, sides.split(","))) for sides in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
  }


def logits(text: str) -> int:
  """Most rows of an array with a side of the vocabulary."""
  return max(math.prod(shape) // VOCABULARY for shape in shapes(text) if VOCABULARY in shape)


def scores(text: str) -> int:
  """Most visual tokens by visual tokens that an array holds: the second largest side."""
  return max(sorted(shape)[-2] for shape in shapes(text) if len(shape) > 1)


@pytest.fixture(scope="module")
def model(tiny):
  return tiny(llm=dataclasses.replace(tiny().llm, vocab_size=VOCABULARY, layers=2))


def test_a_training_step_holds_no_logits_or_scores_of_visual_tokens(model):
  text = program(model)
  assert logits(text) <= ROWS and scores(text) < 1024  # a tile of scores is smaller
  assert not re.search(HOST, text)


def test_the_checks_above_see_what_they_look_for(model, monkeypatch):
  def everything(model, x, batch):
    return x

  monkeypatch.setattr(vlm, "supervised_rows", everything)

  def padded(model, rows, targets):
    return (model.llm.logits(rows).sum(-1)[:, :ROWS], targets >= 0)

  monkeypatch.setattr(vlm, "predictions", padded)
  text = program(
    dataclasses.replace(
      model, attention="einsum", lp_comp=dataclasses.replace(model.lp_comp, keep="none")
    )
  )
  assert logits(text) > 1024 and scores(text) > 1024


def test_a_host_callback_is_seen():
  def step(x):
    jax.debug.callback(lambda x: None, x.sum())
    return x

  assert re.search(HOST, jax.jit(step).lower(np.zeros(4, np.float32)).compile().as_text())


@pytest.mark.parametrize("attention, held", [("auto", False), ("einsum", True)])
def test_the_tower_holds_no_scores_of_a_clip(attention, held):
  cfg = parts.sized("small", "float32", clips_per_chunk=1, attention=attention)
  # 8 x 400 patches
  cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, image_size=160))
  part = parts.tower(cfg, 2, real=False)
  text = jax.jit(part.run).lower(*part.args).compile().as_text()
  assert (scores(text) >= 3200) == held
