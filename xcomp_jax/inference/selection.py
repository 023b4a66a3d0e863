"""Which frames a question keeps: planned once for a video, scored and picked for each question."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from xcomp_jax.config import SelectConfig
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.inference.encoded_video import (
  ClipFeatures,
  EncodedVideo,
  encode_in_chunks,
  stacked,
)
from xcomp_jax.inference.generate import CLIP_STEP, text_slots, up
from xcomp_jax.model import kernels, qc_comp, vlm
from xcomp_jax.parallel.mesh import parts

# tokens, the shortest that a text is padded to where it scores: its rows run in every round
SCORE_STEP = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSelector:
  """How many of a video's frames are selected, and by which rounds; `frame_selector` makes it.

  config: the mode; None keeps all frames.
  frames: T, that were sampled.
  clip_frames: F, of a clip; 1 for a still image.
  plan: what runs together to score; None where nothing is selected.
  note: why nothing is selected, in words, or "".
  """

  config: SelectConfig | None
  frames: int
  clip_frames: int
  plan: qc_comp.RoundPlan | None
  note: str

  @property
  def phases(self) -> tuple[int, ...]:
    """At which frames of a clip rounds begin; the video's clips are encoded from each of them."""
    starts = [] if self.plan is None else self.plan.starts.tolist()
    return tuple(sorted({0, *(start % self.clip_frames for start in starts)}))

  @property
  def kept(self) -> int:
    """Frames that an answer sees."""
    if self.config is None or self.plan is None:
      return self.frames
    return up(self.config.frames, self.clip_frames)

  def without_bias(self) -> "FrameSelector":
    """The same, but all tokens of a question score, wherever it begins (quirk Q11)."""
    config = self.config and dataclasses.replace(self.config, bias=None)
    return dataclasses.replace(self, config=config)

  def pick(self, scores: Float[np.ndarray, " T"]) -> Int[np.ndarray, " K"]:
    """The best frames by score, ascending; whole clips, but for "official"."""
    assert self.config is not None  # something is selected
    unit = 1 if self.config.mode == "official" else self.clip_frames
    return qc_comp.top(scores, self.config.frames, unit)


def frame_selector(frames: int, clip_frames: int, config: SelectConfig | None) -> FrameSelector:
  """Plans how some of `frames` frames in clips of `clip_frames` are selected, if any are.

  Raises:
    ConfigError: numbers that don't fit together, by name.
  """
  plan = None
  if config is None:
    note = "no selection asked for"
  elif config.frames >= frames:
    note = f"{config.frames} frames may be kept and there are {frames}, so nothing is selected"
  elif config.mode == "official" and frames < qc_comp.OFFICIAL_LEAST:
    note = (
      f"the release selects from {qc_comp.OFFICIAL_LEAST} frames or more, and there are "
      f"{frames} (quirk Q13)"
    )
  else:
    note, plan = "", qc_comp.plan_rounds(frames, clip_frames, config)
  return FrameSelector(config=config, frames=frames, clip_frames=clip_frames, plan=plan, note=note)


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which sampled frames a question keeps.

  frames: int[K], ascending. scores: float64[T], of all; None where nothing was selected. note: why
  not, in words.
  """

  frames: np.ndarray
  scores: np.ndarray | None
  note: str


def select_frames(
  model: vlm.VLM,
  video: EncodedVideo,
  questions: Sequence[Prompt],
  selector: FrameSelector,
  *,
  text: int = 0,
  rounds: dict | None = None,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Selection]:
  """The frames that each question attends to.

  Args:
    model: the parameters.
    video: with the selector's phases.
    questions: their prompts about all frames.
    selector: of this video's frames.
    text: see `score_rounds`.
    rounds: likewise.
    report: likewise.

  Raises:
    ConfigError: scores that float16 does not have, or a frame that no round scores.
  """
  if selector.plan is None:
    return [Selection(np.arange(selector.frames), None, selector.note) for _ in questions]
  paid = score_rounds(model, video, questions, selector, text=text, rounds=rounds, report=report)
  scores = [qc_comp.aggregate(selector.plan, one, selector.frames) for one in paid]  # [T] each
  kernels.check_finite(np.array(scores), "the scores of frames", model.cfg.dtype)
  return [Selection(selector.pick(one), one, "") for one in scores]


_watch = jax.jit(qc_comp.watch, static_argnames="last")
_score = jax.jit(qc_comp.score_windows, static_argnames=("layers", "causal", "prefix", "units"))


def score_rounds(
  model: vlm.VLM,
  video: EncodedVideo,
  questions: Sequence[Prompt],
  selector: FrameSelector,
  *,
  text: int = 0,
  rounds: dict | None = None,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
  """The attention that questions pay, float32[Q, R, M, W, w]: rounds, scored layers, windows, units
  of a window.

  Args:
    model: the parameters.
    video: the features.
    questions: their prompts, which share what comes before the frames.
    selector: that selects some of the video's frames.
    text: tokens that texts are padded to, at least.
    rounds: what the visual tokens of each round left in the LLM is kept here, and used again for
      the next questions about this video with this model; None: run them again every time.
    report: called with the number of rounds done, and of all.
  """
  cfg, plan = selector.config, selector.plan
  assert cfg is not None and plan is not None  # something is selected
  prefix, _ = around_frames(questions[0])
  texts = [qc_comp.from_prompt(question, cfg) for question in questions]
  longest = max(text, *(len(one.text) for one in texts))
  asked = qc_comp.stack_questions(texts, text_slots(longest, SCORE_STEP))  # [Q, L]
  layers = qc_comp.scored_layers(cfg, model.cfg.llm.layers)
  clips = up(plan.frames // video.clip_frames, CLIP_STEP)  # of a round, padding included
  units = clips * video.clip_frames // plan.unit
  windows = _padded_windows(plan, cfg, units)
  each = parts("batch")  # devices that take rounds of their own
  together = max(1, cfg.round // plan.frames) * each  # rounds of a call
  together = min(together, up(len(plan.starts), each))
  scores = []
  for first in range(0, len(plan.starts), together):
    starts = plan.starts[first : first + together]
    key = (starts.tobytes(), plan.frames, layers[-1], prefix.tobytes())
    caches = None if rounds is None else rounds.get(key)
    if caches is None:
      features, valid = _features_of_rounds(video, starts, plan.frames, together, clips)
      caches = _watch(model, features, valid, prefix, last=layers[-1])
      if rounds is not None:
        rounds[key] = caches
    paid = _score(
      model,
      caches,
      asked,
      windows,
      layers=layers,
      causal=cfg.causal,
      prefix=len(prefix),
      units=units,
    )  # [Q, together, M, padded W, w]
    scores.append(np.asarray(paid)[:, : len(starts), :, : len(plan.windows)])
    report(first + len(starts), len(plan.starts))
  return np.concatenate(scores, axis=1)


def around_frames(asked: Prompt) -> tuple[np.ndarray, np.ndarray]:
  """The tokens before the visual slot, and those after it."""
  slot = int(np.flatnonzero(asked.tokens < 0)[0])
  return asked.tokens[:slot], asked.tokens[slot + 1 :]


def _features_of_rounds(
  video: EncodedVideo, starts: np.ndarray, frames: int, rounds: int, clips: int
) -> tuple[np.ndarray | jax.Array, np.ndarray]:
  """[rounds, clips, N, D] of rounds that begin at these frames, zeros behind the `frames` of each
  and for rounds too many; and int32[rounds], how many clips are valid.
  """
  F, features = video.clip_frames, video.features
  valid = frames // F
  # past the video's last clip a round goes on at its first
  rows = [
    stacked([features[start % F][(start // F + i) % video.clips] for i in range(valid)], clips)
    for start in starts
  ]
  return stacked(rows, rounds), np.full(rounds, valid, np.int32)


def _padded_windows(plan: qc_comp.RoundPlan, cfg: SelectConfig, units: int) -> np.ndarray:
  """int[W, w]: the plan's windows, the last one repeated until there are as many as a round of
  `units` has, so that the program of such a round serves.
  """
  if units == plan.units or not cfg.window:
    return plan.windows
  most = qc_comp.windows(units, cfg.window // plan.unit, cfg.stride // plan.unit, cover=True)
  missing = max(0, len(most) - len(plan.windows))
  return np.concatenate([plan.windows, plan.windows[-1:].repeat(missing, 0)])


def selected_features(
  model: vlm.VLM,
  video: EncodedVideo,
  frames: np.ndarray,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> ClipFeatures:
  """Merged features [N, D] of each clip of F frames, of K selected frames.

  Clips that the video has, at whatever phase, are taken from there; those that the selection tore
  apart, which only "official" does, are encoded again. report: called with the number of those
  done, and of all.
  """
  F, features = video.clip_frames, video.features
  clips = frames.reshape(-1, F)  # [K / F, F]
  start = clips[:, 0]
  whole = (clips == start[:, None] + np.arange(F)).all(1) & np.isin(start % F, list(features))
  torn = np.flatnonzero(~whole)
  again = {}
  if len(torn):
    assert video.frames is not None  # rounds that tear clips begin at phases for which it has them
    encoded = encode_in_chunks(model, (video.frames[clips[i]] for i in torn))
    for i, clip in zip(torn, encoded, strict=True):
      again[i] = clip
      report(len(again), len(torn))
  return [again[i] if i in again else features[s % F][s // F] for i, s in enumerate(start)]
