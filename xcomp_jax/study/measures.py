"""What a model answers about the study's films, what QC-Comp finds in them, and what both cost."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from xcomp_jax.bench import parts
from xcomp_jax.bench.timing import timed
from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.config import LPCompConfig, ModelConfig, SelectConfig
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import Example, Shape, batch_spec, collate
from xcomp_jax.data.store import Store
from xcomp_jax.inference import selection
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
  built = prompt.training_prompt(
    tokenizer,
    world.conversation([(one.question, one.answer)]),
    message or store.samples[one.film].time_message,
    mask="assistant",
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
  return Shape(rows=rows, samples=1, prefix=PREFIX, frames=clips * FRAMES, text=TEXT)


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
  return parts.flops(
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
  seen, paid, calls = parts.scoring_parts(
    model.cfg, nnx.split(model), select, clips * FRAMES, plan, rows, questions[0]
  )
  return calls * (seen.flops / len(questions) + paid.flops)


def load_for_measures(checkpoint: str | pathlib.Path, cfg: LPCompConfig) -> vlm.VLM:
  """A checkpoint to be measured under a rule, in float32."""
  directory = resolve(str(checkpoint))
  model = ModelConfig(
    clip_frames=FRAMES,
    yarn=None,
    dtype="float32",
    param_dtype="float32",
    clips_per_chunk=ROWS,
    attention="auto",
    remat=False,
  )
  return loading.load_model(directory, read_vlm_config(directory, model, cfg))


@dataclasses.dataclass(frozen=True)
class Programs:
  """What measuring runs, with other functions in tests."""

  answer: Callable[..., np.ndarray] = answered_rightly
  select: Callable[..., list[selection.Selection]] = selection.select_frames
  cost: Callable[..., float] = cost
  scoring_cost: Callable[..., float] = scoring_cost


PROGRAMS = Programs()


def measured(
  study: Study,
  checkpoint: str | pathlib.Path,
  cfg: LPCompConfig,
  name: str,
  clips: int | None = None,
  programs: Programs = PROGRAMS,
) -> dict[str, Any]:
  """Answers to a split's questions from so many clips at equal distances; None: all.

  Returns:
    right: "1" or "0" for every question, film by film in the order of KINDS; hits: likewise, "1"
      where every scene that is needed was shown; tokens: visual ones a layer works on, on average;
      TFLOP and seconds: of the LLM for one question.
  """
  model, scenes = load_for_measures(checkpoint, cfg), study.splits[name].scenes[0]
  shown = even(scenes, clips or scenes)
  message = prompt.time_message(scenes * FRAMES / world.FPS, len(shown) * FRAMES)
  asked = [(one, shown) for one in study.asked(name)]
  return _answered(study, model, study.store(name), asked, programs, message)


def _answered(
  study: Study,
  model: vlm.VLM,
  store: Store,
  asked: Sequence[tuple[AskedFilm, np.ndarray]],
  programs: Programs,
  message: str | None = None,
) -> dict[str, Any]:
  programs.answer(model, study.tokenizer, store, asked[:ROWS], message)  # compiles
  spent = timed(lambda: programs.answer(model, study.tokenizer, store, asked, message))
  clips = len(asked[0][1])
  kept = float(np.mean(lp_comp.counts(model.cfg.lp_comp, model.cfg.llm.layers)))
  return {
    "right": bits(spent.result),
    "hits": bits([set(one.scenes) <= set(shown) for one, shown in asked]),
    "tokens": kept * clips * FRAMES,
    "seconds": spent.seconds / len(asked),
    "TFLOP": programs.cost(model, clips) / 1e12,
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundScenes:
  """What QC-Comp finds for a question among the scenes of its film.

  kept: int[K], the scenes that it selects, ascending.
  scores: float[S], of all scenes, relative to their mean.
  others: likewise, by the question before it on the film, of the first by the last one's.
  seconds: that selecting took.
  """

  asked: AskedFilm
  kept: np.ndarray
  scores: np.ndarray
  others: np.ndarray
  seconds: float

  def needed(self) -> dict[str, float | None]:
    """Of the one scene that is needed, if it is one: how many others have a higher score, likewise
    by the other question's scores, and its own.
    """
    if len(self.asked.scenes) > 1:
      return dict.fromkeys(("rank", "other", "score"))
    (scene,) = self.asked.scenes
    return {
      "rank": int((self.scores > self.scores[scene]).sum()),
      "other": int((self.others > self.others[scene]).sum()),
      "score": round(float(self.scores[scene]), 3),
    }


def selected_answers(
  study: Study,
  checkpoint: str | pathlib.Path,
  cfg: LPCompConfig,
  name: str,
  modes: Sequence[str],
  frames: int,
  programs: Programs = PROGRAMS,
) -> dict[str, Any]:
  """Answers from so many frames that QC-Comp selects of a split's films, and what it found, by
  mode.

  Returns:
    place: of the needed scene, 0 to 1, where it is one, else null.
    MODE: as of `measured`, cost and time with what one of a film's six questions takes to select;
      rank: how many scenes have a higher score than the one that is needed, or null; other: the
      same by the scores of the question before it on the film, of the first by the last one's;
      score: of the needed scene, or null; relevance: mean score by place (16 bins) of scenes in
      which there is nothing to see, and of shots; few: right, from the two scenes with the highest
      scores. Scores are relative to their film's mean.
  """
  model, store, asked = load_for_measures(checkpoint, cfg), study.store(name), study.asked(name)
  scenes = study.splits[name].scenes[0]

  def answered(kept):  # scenes for each question
    return _answered(study, model, store, list(zip(asked, kept, strict=True)), programs)

  def answered_from_few(best):
    few = programs.answer(model, study.tokenizer, store, list(zip(asked, best, strict=True)))
    return {"few": bits(few)}

  out: dict[str, Any] = {
    "place": [
      round((one.scenes[0] + 0.5) / scenes, 4) if len(one.scenes) == 1 else None for one in asked
    ]
  }
  for mode in modes:
    if mode == "uniform":
      out[mode] = answered([even(scenes, frames // FRAMES)] * len(asked))
      out[mode] |= answered_from_few([even(scenes, FEW)] * len(asked))
      continue
    select = measured_setting(mode, frames)
    found = find_scenes(study, model, store, asked, select, programs)
    result = out[mode] = answered([one.kept for one in found])
    if mode != "official":  # it scores four scenes together
      result |= answered_from_few([np.sort(np.argsort(-one.scores)[:FEW]) for one in found])
    # of a film: the first one's has compilation in it
    result["seconds"] += float(np.median([one.seconds for one in found]))
    prompts = _prompts(study, store, [one for one in asked if one.film == 0])
    result["TFLOP"] += programs.scoring_cost(model, scenes, prompts, select) / 1e12
    needed = [one.needed() for one in found]
    result |= {key: [one[key] for one in needed] for key in needed[0]}
    result["relevance"] = relevance(found)
  return out


def find_scenes(
  study: Study,
  model: vlm.VLM,
  store: Store,
  asked: Sequence[AskedFilm],
  select: SelectConfig,
  programs: Programs = PROGRAMS,
) -> list[FoundScenes]:
  """What QC-Comp finds for the questions about all films."""
  found = []
  for number in range(len(store.samples)):
    several, film = [one for one in asked if one.film == number], as_film(store, number)
    prompts = _prompts(study, store, several)
    begun = time.perf_counter()
    selector = selection.frame_selector(len(film.times), film.clip_frames, select)
    chosen = programs.select(model, film, prompts, selector)
    seconds = (time.perf_counter() - begun) / len(several)
    scores = [_by_scene(one) for one in chosen]
    found += [
      FoundScenes(
        asked=one,
        kept=np.unique(chosen[k].frames // FRAMES),
        scores=scores[k],
        others=scores[k - 1],
        seconds=seconds,
      )
      for k, one in enumerate(several)
    ]
  return found


def _prompts(study: Study, store: Store, asked: Sequence[AskedFilm]) -> list[prompt.Prompt]:
  """Of questions about one film."""
  message = store.samples[asked[0].film].time_message
  return [prompt.question_prompt(study.tokenizer, one.question, message) for one in asked]


def relevance(found: Sequence[FoundScenes]) -> list[list[float]]:
  """Mean scores by place, [2, BINS]: of scenes in which there is nothing to see, and of shots."""
  sums, counts = np.zeros(2 * BINS), np.zeros(2 * BINS)
  for _, several in itertools.groupby(found, lambda one: one.asked.film):
    several = list(several)
    scenes = np.arange(len(several[0].scores))
    # all shots: one question needs them all
    shot = np.isin(scenes, [scene for one in several for scene in one.asked.scenes])
    where = shot * BINS + scenes * BINS // len(scenes)
    counts += len(several) * np.bincount(where, minlength=2 * BINS)
    sums += np.bincount(where, np.sum([one.scores for one in several], axis=0), 2 * BINS)
  return np.round(sums / np.maximum(counts, 1), 4).reshape(2, BINS).tolist()


def _by_scene(kept: selection.Selection) -> np.ndarray:
  """Scores by scene, relative to their mean."""
  assert kept.scores is not None  # more frames than are kept
  scores = kept.scores.reshape(-1, FRAMES).mean(1)
  return scores / scores.mean()


def as_film(store: Store, i: int) -> EncodedVideo:
  """A stored film as QC-Comp takes it."""
  features = store.visual(i).astype(np.float32)
  times = np.arange(len(features) * FRAMES) / world.FPS
  return EncodedVideo(features={0: features}, times=times, seconds=len(times) / world.FPS)


def even(scenes: int, clips: int) -> np.ndarray:
  """int[clips] of `scenes`, the middles of equal intervals."""
  return ((np.arange(clips) + 0.5) * scenes / clips).astype(int)


def bits(values: Sequence[bool] | np.ndarray) -> str:
  """bool[n] as a text of 0 and 1."""
  return "".join("01"[int(v)] for v in values)
