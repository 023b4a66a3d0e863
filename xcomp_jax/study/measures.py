"""What a model answers about the study's films, what QC-Comp finds in them, and what both cost."""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from xcomp_jax.bench.parts import flops, scoring
from xcomp_jax.checkpoints import loading
from xcomp_jax.config import LPCompConfig, ModelConfig, SelectConfig
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import Example, Shape, batch_spec, collate
from xcomp_jax.data.store import Store
from xcomp_jax.inference import chat
from xcomp_jax.inference.encoded_video import EncodedVideo
from xcomp_jax.model import lp_comp, qc_comp, vlm
from xcomp_jax.study.miniature import AskedFilm, Study
from xcomp_jax.synthetic import world
from xcomp_jax.synthetic.films import FRAMES

ROWS = 16  # questions measured at once
BINS = 16  # of places in a film
SELECTED = {"window": 24, "long": 24, "hour": 48}  # frames that QC-Comp keeps of a film, by split
PREFIX, TEXT = 16, 48  # slots for a measured question's tokens before and after the frames
FEW = 2  # scenes that are kept when there is no room for all shots


def measured(
  study: Study,
  checkpoint: str | pathlib.Path,
  cfg: LPCompConfig,
  name: str,
  clips: int | None = None,
) -> dict[str, Any]:
  """Answers to a split's questions from so many clips at equal distances; None: all.

  Returns:
    right: "1" or "0" for every question, film by film in the order of KINDS; hits: likewise, "1"
      where every scene that
    is needed was shown; tokens: visual ones a layer works on, on average; TFLOP and seconds: of the
    LLM for one question.
  """
  scenes = study.splits[name].scenes[0]
  shown = even(scenes, clips or scenes)
  message = prompt.time_message(scenes * FRAMES / world.FPS, len(shown) * FRAMES)
  return _answered(
    study,
    load_for_measures(checkpoint, cfg),
    study.store(name),
    [(one, shown) for one in study.asked(name)],
    message,
  )


def _answered(
  study: Study,
  model: vlm.VLM,
  store: Store,
  asked: Sequence[tuple[AskedFilm, np.ndarray]],
  message: str | None = None,
) -> dict[str, Any]:
  answered_rightly(model, study.tokenizer, store, asked[:ROWS], message)  # compiles
  begun, right = (
    time.perf_counter(),
    answered_rightly(model, study.tokenizer, store, asked, message),
  )
  seconds, clips = (time.perf_counter() - begun) / len(asked), len(asked[0][1])
  kept = float(np.mean(lp_comp.counts(model.cfg.lp_comp, model.cfg.llm.layers)))
  hits = np.array([set(one.scenes) <= set(shown) for one, shown in asked])
  spent = {"tokens": kept * clips * FRAMES, "seconds": seconds, "TFLOP": cost(model, clips) / 1e12}
  return {"right": bits(right), "hits": bits(hits)} | spent


def selected_answers(
  study: Study, checkpoint: str | pathlib.Path, cfg: LPCompConfig, name: str, modes: Sequence[str]
) -> dict[str, Any]:
  """Answers from what QC-Comp selects of a split's films, and what it found, by mode.

  Returns:
    place: of the needed scene, 0 to 1, where it is one, else null.
    MODE: as of `measured`, cost and time with what one of a film's six questions takes to select;
      rank: how many scenes
    have a higher score than the one that is needed, or null; other: the same by the scores of the
    question before it on the film, of the first by the last one's;
    score: of the needed scene, or null; relevance: mean score by place (16 bins) of scenes in which
      there is nothing to
    see, and of shots; few: right, from the two scenes with the highest scores. Scores are relative
    to their film's mean.
  """
  model, store, asked = load_for_measures(checkpoint, cfg), study.store(name), study.asked(name)
  scenes, frames = study.splits[name].scenes[0], SELECTED[name]
  settings = {mode: measured_setting(mode, frames) for mode in modes if mode != "uniform"}
  kept: dict[str, list[np.ndarray]] = {mode: [] for mode in modes}
  # it scores four scenes together
  few: dict[str, list[np.ndarray]] = {mode: [] for mode in modes if mode != "official"}
  needed: dict[str, dict[str, list[float | None]]] = {
    mode: {"rank": [], "other": [], "score": []} for mode in settings
  }
  took: dict[str, list[float]] = {mode: [] for mode in settings}
  sums, counts, work = {mode: np.zeros(2 * BINS) for mode in modes}, np.zeros(2 * BINS), {}
  for number in range(len(store.samples)):
    film, several = as_film(store, number), [one for one in asked if one.film == number]
    visible = np.zeros(scenes, int)
    visible[sorted({scene for one in several for scene in one.scenes})] = (
      1  # all shots: one question needs them all
    )
    where = visible * BINS + np.arange(scenes) * BINS // scenes
    counts += len(several) * np.bincount(where, minlength=2 * BINS)
    prompts = [
      prompt.question_prompt(study.tokenizer, one.question, store.samples[number].time_message)
      for one in several
    ]
    if "uniform" in modes:
      kept["uniform"] += [even(scenes, frames // FRAMES)] * len(several)
      few["uniform"] += [even(scenes, FEW)] * len(several)
    for mode, select in settings.items():
      work[mode] = work.get(mode) or scoring_cost(model, scenes, prompts, select)
      begun = time.perf_counter()
      chosen = chat.select_frames(model, film, prompts, select)
      took[mode].append((time.perf_counter() - begun) / len(several))
      kept[mode] += [np.unique(got.frames // FRAMES) for got in chosen]
      scores = np.stack([_by_scene(got, scenes) for got in chosen])
      if mode in few:
        few[mode] += list(np.sort(np.argsort(-scores, axis=1)[:, :FEW]))
      sums[mode] += np.bincount(where, scores.sum(0), 2 * BINS)
      for k, one in enumerate(several):
        scene, own, other = one.scenes[0], scores[k], scores[k - 1]
        values = (
          int((own > own[scene]).sum()),
          int((other > other[scene]).sum()),
          round(float(own[scene]), 3),
        )
        for name_of, value in zip(("rank", "other", "score"), values, strict=True):
          needed[mode][name_of].append(value if len(one.scenes) == 1 else None)
  single = [one.scenes[0] if len(one.scenes) == 1 else None for one in asked]
  out: dict[str, Any] = {
    "place": [None if scene is None else round((scene + 0.5) / scenes, 4) for scene in single]
  }
  for mode, clips in kept.items():
    out[mode] = _answered(study, model, store, list(zip(asked, clips, strict=True)))
    if mode in few:
      out[mode]["few"] = bits(
        answered_rightly(model, study.tokenizer, store, list(zip(asked, few[mode], strict=True)))
      )
    if mode in settings:
      # of a film: the first one's has compilation in it
      out[mode]["seconds"] += float(np.median(took[mode]))
      out[mode]["TFLOP"] += work[mode] / 1e12
      out[mode] |= needed[mode]
      out[mode]["relevance"] = (
        np.round(sums[mode] / np.maximum(counts, 1), 4).reshape(2, BINS).tolist()
      )
  return out


_evaluate = jax.jit(vlm.heldout_measures)


def answered_rightly(
  model: vlm.VLM,
  tokenizer: prompt.Tokenizer,
  store: Store,
  asked: Sequence[tuple[AskedFilm, np.ndarray]],
  message: str | None = None,
) -> np.ndarray:
  """Which questions are answered rightly, each from some clips int[C] of its film, as many for all:
  bool[n].

  An answer is the most probable first token: all are single tokens. message: what a prompt says
  about the video; None: what it says about the whole film, as chat does when frames are selected.
  """
  right = np.zeros(len(asked), bool)
  for first in range(0, len(asked), ROWS):
    part = [
      _example(tokenizer, store, one, clips, message) for one, clips in asked[first : first + ROWS]
    ]
    batch = collate([[example] for example in part], _shape(ROWS, len(asked[first][1])))
    right[first : first + ROWS] = np.asarray(_evaluate(model, batch)[1])[: len(part), 0] > 0.5
  return right


def _example(
  tokenizer: prompt.Tokenizer, store: Store, one: AskedFilm, clips: np.ndarray, message: str | None
) -> Example:
  turns = world.conversation([(one.question, one.answer)])
  built = prompt.training_prompt(
    tokenizer, turns, message or store.samples[one.film].time_message, mask="assistant"
  )
  visual = store.visual(one.film)[clips]
  visual = visual.reshape(len(clips) * FRAMES, -1, visual.shape[-1])
  return Example(
    frames=len(visual),
    visual=visual,
    tokens=built.tokens,
    labels=built.labels,
    query=built.query,
    index=one.film,
  )


def _shape(rows: int, clips: int) -> Shape:
  return Shape(rows, 1, PREFIX, clips * FRAMES, TEXT)


def measured_setting(mode: str, frames: int) -> SelectConfig:
  """Of a mode of QC-Comp, whose name may end in `_answer`, that keeps so many frames."""
  name, _, rows = mode.partition("_")
  # The official mode counts the tokens before a question for the real tokenizer (quirk Q11).
  return dataclasses.replace(
    qc_comp.select_config(name, frames, rows=rows or "question"), bias=None
  )


def cost(model: vlm.VLM, clips: int) -> float:
  """Operations of the LLM for one question about so many clips of features."""
  graph, state = nnx.split(model)
  batch = batch_spec(
    _shape(1, clips), ((model.cfg.tokens_per_frame, model.cfg.vision.width), np.float32)
  )
  return flops(
    lambda state, batch: vlm.heldout_measures(nnx.merge(graph, state), batch)[0], state, batch
  )


def scoring_cost(
  model: vlm.VLM, clips: int, questions: Sequence[prompt.Prompt], select: SelectConfig
) -> float:
  """Operations of QC-Comp's scores for one of several questions about a film of so many clips, seen
  once for all of them.
  """
  plan = qc_comp.plan_rounds(clips * FRAMES, FRAMES, select)
  rows = min(max(1, select.round // plan.frames), len(plan.starts))
  graph, state = nnx.split(model)
  watch, score = scoring(graph, plan, select, rows, questions[0], FRAMES)
  shape = rows, plan.frames // FRAMES, FRAMES * model.cfg.tokens_per_frame, model.cfg.vision.width
  features = jax.ShapeDtypeStruct(shape, np.dtype(np.float32))
  seen, paid = (
    flops(watch, state, features),
    flops(score, state, jax.eval_shape(watch, state, features)),
  )
  return -(-len(plan.starts) // rows) * (seen / len(questions) + paid)


def load_for_measures(checkpoint: str | pathlib.Path, cfg: LPCompConfig) -> vlm.VLM:
  """A checkpoint to be measured under a rule, in float32."""
  directory = loading.resolve(str(checkpoint))
  model = ModelConfig(FRAMES, None, "float32", "float32", ROWS, "auto", remat=False)
  return loading.load_model(directory, loading.read_vlm_config(directory, model, cfg))


def _by_scene(selection: chat.Selection, scenes: int) -> np.ndarray:
  """Scores by scene, relative to their mean."""
  assert selection.scores is not None  # more frames than are kept
  scores = selection.scores.reshape(scenes, FRAMES).mean(1)
  return scores / scores.mean()


def as_film(store: Store, i: int) -> EncodedVideo:
  """A stored film as QC-Comp takes it."""
  features = store.visual(i).astype(np.float32)
  times = np.arange(len(features) * FRAMES) / world.FPS
  return EncodedVideo(
    {0: features},
    times,
    len(times) / world.FPS,
    np.zeros((len(features), 1, 1, 3), np.uint8),
    None,
    "",
    "",
  )


def even(scenes: int, clips: int) -> np.ndarray:
  """int[clips] of `scenes`, the middles of equal intervals."""
  return ((np.arange(clips) + 0.5) * scenes / clips).astype(int)


def bits(values: np.ndarray) -> str:
  """bool[n] as a text of 0 and 1."""
  return "".join("01"[int(v)] for v in values)
