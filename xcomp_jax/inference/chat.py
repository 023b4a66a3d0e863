"""From questions about an encoded video to answers: select frames, prefill, decode.

The pieces are functions; `Chat` puts them together for one video and any number of questions.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from xcomp_jax.config import ConfigError, SelectConfig, VLMConfig
from xcomp_jax.data import prompt
from xcomp_jax.data.prompt import Prompt, Tokenizer
from xcomp_jax.inference.encoded_video import EncodedVideo, encode_in_chunks
from xcomp_jax.inference.generate import (
  CLIP_STEP,
  Sampling,
  as_batch,
  ended,
  stream,
  text_slots,
  up,
)
from xcomp_jax.model import kernels, qc_comp, vlm

# texts that score, whose rows run in every round, are padded to a multiple of this many tokens, as
# far as they are short
SCORE_STEP = 16
# tokens of text that a conversation has room for at first; more than that, and it has all of the
# context
TALK = 4096
SOON = 5  # turns before the context's end from which on it is announced


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which sampled frames a question keeps.

  frames: int[K], ascending. scores: float64[T], of all; None where nothing was selected. note: why
  not, in words.
  """

  frames: np.ndarray
  scores: np.ndarray | None
  note: str


_watch = jax.jit(qc_comp.watch, static_argnames="last")
_score = jax.jit(qc_comp.score_windows, static_argnames=("layers", "causal", "prefix", "units"))


def phases(frames: int, clip_frames: int, cfg: SelectConfig | None) -> tuple[int, ...]:
  """Which phases of a video `select_frames` will need encoded."""
  if cfg is None or cfg.mode != "official" or why_not(frames, cfg):
    return (0,)
  return tuple(
    sorted(
      {0} | {int(s) % clip_frames for s in qc_comp.plan_rounds(frames, clip_frames, cfg).starts}
    )
  )


def why_not(frames: int, cfg: SelectConfig | None) -> str:
  """Why nothing is selected from so many frames, or ''."""
  if cfg is None:
    return "no selection asked for"
  if cfg.frames >= frames:
    return f"{cfg.frames} frames may be kept and there are {frames}, so nothing is selected"
  if cfg.mode == "official" and frames < qc_comp.OFFICIAL_LEAST:
    return (
      f"the release selects from {qc_comp.OFFICIAL_LEAST} frames or more, and there are "
      f"{frames} (quirk Q13)"
    )
  return ""


@dataclasses.dataclass(frozen=True)
class ContextRoom:
  """What a pass of the LLM leaves of its context for text.

  text: tokens. frames, answer: that take the rest. what, advice: which frames, and how there can be
  fewer.
  """

  text: int
  frames: int
  answer: int
  what: str
  advice: str


def rooms(
  model: VLMConfig, frames: int, select: SelectConfig | None, answer: int
) -> list[ContextRoom]:
  """The passes that a question needs; none where nobody knows the model's context. Arguments as of
  `prompt_of`.
  """
  parts = [
    (
      frames,
      answer,
      "kept",
      "keep fewer frames (--select)" if select else "sample fewer frames (--max-frames)",
    )
  ]
  if select and not why_not(frames, select):
    clip = min(model.clip_frames, frames)
    parts = [(up(select.frames, clip), answer, "kept", "keep fewer frames (--select)")]
    parts += [
      (
        qc_comp.plan_rounds(frames, clip, select).frames,
        0,
        "scored together",
        "take another --mode",
      )
    ]
  context = model.llm.context
  return [
    ContextRoom(context - part[0] * model.tokens_per_frame - part[1], *part)
    for part in parts
    if context
  ]


def prompt_of(
  model: VLMConfig,
  tokenizer: Tokenizer,
  question: str,
  frames: int,
  seconds: float,
  select: SelectConfig | None,
  answer: int,
  history: Sequence[tuple[str, str]] = (),
) -> Prompt:
  """Builds the prompt of a question and checks that it fits into the model's context, before any
  frame is decoded.

  Args:
    model: its sizes.
    tokenizer: the checkpoint's.
    question: its text.
    frames: that were sampled.
    seconds: of what they were sampled from.
    select: how some of them are kept; None: all are.
    answer: tokens of it, at most.
    history: (question, answer) pairs that came before.

  Raises:
    AnnotationError: an empty question.
    ConfigError: no token of the question is left to score frames by; or the model's context does
      not hold the final prompt with its answer, or a round that scores.
  """
  asked = prompt.question_prompt(
    tokenizer, question, "" if frames == 1 else prompt.time_message(seconds, frames), history
  )
  if select and not why_not(frames, select):
    qc_comp.from_prompt(asked, select)  # has rows that score
  text, context = len(asked.tokens) - 1, model.llm.context
  for room in rooms(model, frames, select, answer):
    if text > room.text:
      new = f", and an answer of up to {room.answer}" if room.answer else ""
      needed = text + room.frames * model.tokens_per_frame + room.answer
      raise ConfigError(
        f"{text} tokens of text, {room.frames} frames {room.what}, of {model.tokens_per_frame} "
        f"tokens each{new} make {needed} tokens, and the model's "
        f"context has {context}: {'start a new conversation, ' if history else ''}shorten the "
        f"question, {room.advice}, or give another --context"
      )
  return asked


def select_frames(
  model: vlm.VLM,
  video: EncodedVideo,
  questions: Sequence[Prompt],
  cfg: SelectConfig | None,
  *,
  text: int = 0,
  rounds: dict | None = None,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Selection]:
  """The frames that each question attends to.

  Args:
    model: the parameters.
    video: with the `phases` that the mode needs.
    questions: their prompts about all frames.
    cfg: the mode; None keeps all frames.
    text: see `score_rounds`.
    rounds: likewise.
    report: likewise.

  Raises:
    ConfigError: numbers that don't fit together, by name; scores that float16 does not have.
  """
  T, F = len(video.times), video.clip_frames
  note = why_not(T, cfg)
  if cfg is None or note:
    return [Selection(np.arange(T), None, note) for _ in questions]
  plan = qc_comp.plan_rounds(T, F, cfg)
  paid = score_rounds(model, video, questions, plan, cfg, text=text, rounds=rounds, report=report)
  scores = [qc_comp.aggregate(plan, one, T) for one in paid]
  kernels.check_finite(np.array(scores), "the scores of frames", model.cfg.dtype)
  return [
    Selection(qc_comp.top(score, cfg.frames, 1 if cfg.mode == "official" else F), score, "")
    for score in scores
  ]


def score_rounds(
  model: vlm.VLM,
  video: EncodedVideo,
  questions: Sequence[Prompt],
  plan: qc_comp.RoundPlan,
  cfg: SelectConfig,
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
    plan: of the video's frames under cfg.
    cfg: the mode.
    text: tokens that texts are padded to, at least.
    rounds: what the visual tokens of each round left in the LLM is kept here, and used again for
      the next questions about this video with this model; None: run them again every time.
    report: called with the number of rounds done, and of all.
  """
  F = video.clip_frames
  slot = int(np.flatnonzero(questions[0].tokens < 0)[0])
  prefix = questions[0].tokens[:slot]
  rows = [qc_comp.from_prompt(question, cfg) for question in questions]
  asked = qc_comp.stack_questions(
    rows, text_slots(max(text, *(len(one.text) for one in rows)), SCORE_STEP)
  )
  layers = qc_comp.scored_layers(cfg, model.cfg.llm.layers)
  size = plan.frames // F
  padded = up(size, CLIP_STEP)
  windows = plan.windows
  # as many windows as a padded round would have, so that its program serves
  if padded != size and cfg.window:
    more = qc_comp.windows(
      padded * F // plan.unit, cfg.window // plan.unit, cfg.stride // plan.unit, cover=True
    )
    windows = np.concatenate([windows, windows[-1:].repeat(max(0, len(more) - len(windows)), 0)])
  rows = min(max(1, cfg.round // plan.frames), len(plan.starts))
  scores = []
  for first in range(0, len(plan.starts), rows):
    starts = plan.starts[first : first + rows]
    key = (starts.tobytes(), plan.frames, layers[-1], prefix.tobytes())
    caches = None if rounds is None else rounds.get(key)
    if caches is None:
      features = np.zeros((rows, padded, *video.features[0].shape[1:]), video.features[0].dtype)
      for row, begin in enumerate(starts):
        features[row, :size] = video.features[begin % F][
          (begin // F + np.arange(size)) % video.clips
        ]
      caches = _watch(model, features, np.full(rows, size, np.int32), prefix, last=layers[-1])
      if rounds is not None:
        rounds[key] = caches
    paid = _score(
      model,
      caches,
      asked,
      windows,
      layers=layers,
      causal=cfg.causal,
      prefix=slot,
      units=padded * F // plan.unit,
    )
    scores.append(np.asarray(paid)[:, : len(starts), :, : len(plan.windows)])
    report(first + len(starts), len(plan.starts))
  return np.concatenate(scores, axis=1)


def selected_features(
  model: vlm.VLM,
  video: EncodedVideo,
  frames: np.ndarray,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
  """Merged features [K / F, N, D] of K selected frames, cut into clips of F.

  Clips that the video has, at whatever phase, are taken from there; those that the selection tore
  apart, which only "official" does, are encoded again. report: called with the number of those
  done, and of all.
  """
  F = video.clip_frames
  clips = frames.reshape(-1, F)
  start = clips[:, 0]
  known = (clips == start[:, None] + np.arange(F)).all(1) & np.isin(start % F, list(video.features))
  out = np.empty((len(clips), *video.features[0].shape[1:]), video.features[0].dtype)
  for i in np.flatnonzero(known):
    out[i] = video.features[start[i] % F][start[i] // F]
  torn = np.flatnonzero(~known)
  if not len(torn):
    return out
  assert video.frames is not None  # where `phases` are such that clips may be torn, they were kept
  for done, (i, features) in enumerate(
    zip(torn, encode_in_chunks(model, (video.frames[clips[i]] for i in torn)), strict=True)
  ):
    out[i] = features
    report(done + 1, len(torn))
  return out


@dataclasses.dataclass(frozen=True)
class Answer:
  """text: of the answer. selection: what it looked at. spent: seconds by what they went into.
  prompt: its tokens.
  """

  text: str
  selection: Selection
  spent: dict[str, float]
  prompt: Prompt


class Chat:
  """Questions and answers about one video; every question sees those before it and gets its own
  selection.

  What is compiled depends on how long a text is padded to. In a conversation that is TALK tokens,
  and beyond that as many as the context holds, so that it compiles three programs (scoring,
  prefill, decoding) once more before it ends.

  history: the (question, answer) pairs so far.
  """

  def __init__(
    self,
    model: vlm.VLM,
    tokenizer: Tokenizer,
    video: EncodedVideo,
    *,
    select: SelectConfig | None,
    sampling: Sampling,
    keep_rounds: bool = True,
    talk: bool = False,
  ):
    """Begins a conversation.

    keep_rounds: hold what scoring rounds left in the LLM for later questions (0.24 GB per 1,024
      frames at 2B). talk: the first
    question is padded as later ones are, so that the second compiles nothing.
    """
    self.model, self.tokenizer, self.video = model, tokenizer, video
    self.config, self.sampling = select, sampling
    self.history: list[tuple[str, str]] = []
    self._rounds, self._talk = {} if keep_rounds else None, talk

  def forget(self) -> None:
    """Starts a new conversation about the same video."""
    self.history = []

  def left(self) -> int | None:
    """How many more tokens of questions and answers the context holds; None where nobody knows
    it.
    """
    room = self._room()
    return None if room is None else max(0, room - self._text(self.history))

  def ending(self) -> str:
    """What to say of the context's end: "" while it is far, a sentence from about SOON turns before
    it on.
    """
    if not self.history or (left := self.left()) is None:
      return ""
    longest = max(self._text([turn]) for turn in self.history) - self._text([])
    turns = left // longest
    if turns > SOON:
      return ""
    return (
      f"the context's end is near: it holds {left:,} more tokens of questions and answers, "
      f"{f'about {turns}' if turns else 'less than one'} "
      f"turn{'s' * (turns > 1)} like the longest of this conversation; then give another "
      f"--context, or start a new conversation"
    )

  def _least(self, asked: Prompt) -> int:
    """Tokens that the text behind the frames is padded to, at least."""
    if not (self._talk or self.history):
      return 0
    slot = int(np.flatnonzero(asked.tokens < 0)[0])
    most = (self._room() or up(len(asked.tokens), 8 * TALK)) - slot
    return min(most, TALK) if len(asked.tokens) - slot - 1 <= TALK else most

  def _room(self) -> int | None:
    """Tokens of text that the context holds beside the frames and an answer."""
    texts = [
      room.text
      for room in rooms(
        self.model.cfg, len(self.video.times), self.config, self.sampling.max_new_tokens
      )
    ]
    return min(texts, default=None)

  def _text(self, history: Sequence[tuple[str, str]]) -> int:
    """Tokens of text of the shortest question after others."""
    frames = len(self.video.times)
    message = "" if frames == 1 else prompt.time_message(self.video.seconds, frames)
    return len(prompt.question_prompt(self.tokenizer, "?", message, history).tokens) - 1

  def ask(
    self,
    question: str,
    *,
    write: Callable[[str], None] = lambda text: None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
  ) -> Answer:
    """Answers a question.

    Args:
      question: the text.
      write: called with the answer's text as it comes.
      report: called with "scoring" and the number of rounds done, and of all; or "encoding" and of
        torn clips.

    Raises:
      AnnotationError, ConfigError: an empty question, or one too long for the model.
    """
    # The bias counts from the first question's message; a later question has none before it (quirk
    # Q11).
    cfg = (
      dataclasses.replace(self.config, bias=None) if self.config and self.history else self.config
    )
    asked = self._prompt(question, self.history, cfg)
    (got,) = self._answer([asked], cfg, write, report, self._least(asked))
    self.history.append((question, got.text))
    return got

  def check(self, question: str) -> None:
    """Refuses a question that `ask_apart` would.

    Raises:
      AnnotationError, ConfigError: an empty question, or one too long for the model.
    """
    self._prompt(question, [], self.config)

  def ask_apart(self, questions: Sequence[str]) -> list[Answer]:
    """Answers several questions at once, each as the first of a conversation of its own.

    They are scored and decoded together, with the caches of all of them in memory; the answers, but
    for rounding, are those that each gets alone. What it took is divided evenly among them.

    Raises:
      AnnotationError, ConfigError: see `check`.
    """
    return self._answer(
      [self._prompt(question, [], self.config) for question in questions], self.config
    )

  def _prompt(
    self, question: str, history: Sequence[tuple[str, str]], cfg: SelectConfig | None
  ) -> Prompt:
    video, answer = self.video, self.sampling.max_new_tokens
    return prompt_of(
      self.model.cfg,
      self.tokenizer,
      question,
      len(video.times),
      video.seconds,
      cfg,
      answer,
      history,
    )

  def _answer(
    self,
    asked: Sequence[Prompt],
    cfg: SelectConfig | None,
    write: Callable[[str], None] = lambda text: None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
    least: int = 0,
  ) -> list[Answer]:
    """Answers prompts, padded to `least` tokens of text at least; `write` gets the text of the
    first.
    """
    begun, spent = time.perf_counter(), {}

    def note(name):
      nonlocal begun
      spent[name], begun = (time.perf_counter() - begun) / len(asked), time.perf_counter()

    model, video = self.model, self.video
    kept = select_frames(
      model,
      video,
      asked,
      cfg,
      text=least,
      rounds=self._rounds,
      report=functools.partial(report, "scoring"),
    )
    note("scoring")
    encoding = functools.partial(report, "encoding")
    visual = [selected_features(model, video, one.frames, encoding) for one in kept]
    note("tower")
    longest = max(
      least, *(len(one.tokens) - int(np.flatnonzero(one.tokens < 0)[0]) - 1 for one in asked)
    )
    prompts = [
      as_batch(one, seen, video.clip_frames, longest)
      for one, seen in zip(asked, visual, strict=True)
    ]
    tokens, written = np.zeros((len(asked), 0), np.int32), ""

    def text(row):
      return self.tokenizer.decode(ended(row, self.sampling.eos)).strip()

    for new in stream(model, prompts, self.sampling):
      if not tokens.size:
        note("prefill and first tokens")
      tokens = np.concatenate([tokens, new], axis=1)
      whole = text(tokens[0])
      # a character may need the next token
      if whole.startswith(written) and not whole.endswith("\ufffd"):
        write(whole[len(written) :])
        written = whole
    note("generation")
    texts = [text(row) for row in tokens]
    write(texts[0][len(written) :])
    return [
      Answer(said, seen, dict(spent), one)
      for said, seen, one in zip(texts, kept, asked, strict=True)
    ]
