"""QC-Comp's two programs as functions of parameters, for what times and compiles them without a
video or a question.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from xcomp_jax.config import SelectConfig, VLMConfig
from xcomp_jax.data.batch import IGNORE, IMAGE_TOKEN
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.inference.generate import text_slots
from xcomp_jax.inference.selection import SCORE_STEP, around_frames
from xcomp_jax.model import qc_comp

# tokens before and behind the visual ones, as the official code's benchmark has them
PREFIX, TEXT = 14, 72
USUAL = qc_comp.select_config("aligned", 512)  # as `ask` has it


def usual(cfg: VLMConfig, frames: int) -> tuple[qc_comp.RoundPlan, int]:
  """The rounds of so many frames by `ask`'s defaults, and how many of them a call has."""
  plan = qc_comp.plan_rounds(
    -(-frames // cfg.clip_frames) * cfg.clip_frames, cfg.clip_frames, USUAL
  )
  return plan, max(1, min(USUAL.round // plan.frames, len(plan.starts)))


def scored_layer_count(cfg: VLMConfig) -> int:
  """Layers that run in a round before the last one that scores, of which keys are enough; at least
  one.
  """
  return max(1, qc_comp.scored_layers(USUAL, cfg.llm.layers)[-1])


def asked_tokens() -> Prompt:
  """A prompt of PREFIX and TEXT tokens, with a question in it."""
  tokens = np.arange(PREFIX + 1 + TEXT, dtype=np.int32)
  tokens[PREFIX] = IMAGE_TOKEN
  return Prompt(
    tokens,
    np.full_like(tokens, IGNORE),
    np.zeros(len(tokens), bool),
    (PREFIX + 1 + 27, PREFIX + 1 + TEXT - 5),
  )


def scoring(
  graph: nnx.GraphDef,
  plan: qc_comp.RoundPlan,
  setting: SelectConfig,
  rows: int,
  question: Prompt | None = None,
  clip_frames: int = 8,
) -> tuple[Callable, Callable]:
  """Functions (state, features [rows, C, N, D]) -> caches and (state, caches) -> scores: a call of
  `watch` and of `score`.

  question: None: `asked_tokens`. clip_frames: of the C clips.
  """
  question = question or asked_tokens()
  prefix, _ = around_frames(question)
  text = qc_comp.from_prompt(question, setting)
  asked = qc_comp.stack_questions([text], text_slots(len(text.text), SCORE_STEP))

  def watch(state, features):
    model = nnx.merge(graph, state)
    return qc_comp.watch(
      model,
      features,
      jnp.full(rows, plan.frames // clip_frames),
      jnp.asarray(prefix),
      last=qc_comp.scored_layers(setting, model.cfg.llm.layers)[-1],
    )

  def score(state, caches):
    model = nnx.merge(graph, state)
    return qc_comp.score_windows(
      model,
      caches,
      asked,
      jnp.asarray(plan.windows),
      layers=qc_comp.scored_layers(setting, model.cfg.llm.layers),
      causal=setting.causal,
      prefix=len(prefix),
      units=plan.units,
    )

  return watch, score
