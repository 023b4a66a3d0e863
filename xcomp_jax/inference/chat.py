"""From questions about an encoded video to answers: prompts, selected frames, prefill, decoding."""

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from xcomp_jax.config import ConfigError, VLMConfig
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import Batch
from xcomp_jax.data.prompt import Prompt, Tokenizer
from xcomp_jax.inference.encoded_video import EncodedVideo
from xcomp_jax.inference.generate import Sampling, as_batch, stream, up
from xcomp_jax.inference.places import Got, computing, drained, stepwise
from xcomp_jax.inference.selection import (
  FrameSelector,
  Selection,
  around_frames,
  select_frames,
  selected_features,
)
from xcomp_jax.inference.several import moments_by_video
from xcomp_jax.model import qc_comp, vlm

# tokens of text that a conversation has room for at first; more than that, and it has all of the
# context
TALK = 4096
SOON = 5  # turns before the context's end from which on it is announced


@dataclasses.dataclass(frozen=True, kw_only=True)
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


def rooms(model: VLMConfig, selector: FrameSelector, answer: int) -> list[ContextRoom]:
  """The passes that a question needs; none where nobody knows the model's context.

  answer: tokens of it, at most.
  """
  fewer = (
    "keep fewer frames (--select)" if selector.config else "sample fewer frames (--max-frames)"
  )
  passes = [(selector.kept, answer, "kept", fewer)]
  if selector.plan:
    passes.append((selector.plan.frames, 0, "scored together", "take another --mode"))
  context = model.llm.context
  return [
    ContextRoom(
      text=context - frames * model.tokens_per_frame - tokens,
      frames=frames,
      answer=tokens,
      what=what,
      advice=advice,
    )
    for frames, tokens, what, advice in passes
    if context
  ]


def prompt_of(
  model: VLMConfig,
  tokenizer: Tokenizer,
  question: str,
  seconds: float,
  selector: FrameSelector,
  answer: int,
  history: Sequence[tuple[str, str]] = (),
  subtitles: str = "",
) -> Prompt:
  """Builds the prompt of a question and checks that it fits into the model's context, before any
  frame is decoded.

  Args:
    model: its sizes.
    tokenizer: the checkpoint's.
    question: its text.
    seconds: of what the frames were sampled from.
    selector: of these frames.
    answer: tokens of it, at most.
    history: (question, answer) pairs that came before.
    subtitles: of the video, one per line.

  Raises:
    AnnotationError: an empty question.
    ConfigError: no token of the question is left to score frames by; or the model's context does
      not hold the final prompt with its answer, or a round that scores.
  """
  message = _message(seconds, selector)
  asked = prompt.question_prompt(tokenizer, question, message, history, subtitles)
  if selector.config and selector.plan:
    qc_comp.from_prompt(asked, selector.config)  # has rows that score
  text, context = len(asked.tokens) - 1, model.llm.context
  for room in rooms(model, selector, answer):
    if text > room.text:
      new = f", and an answer of up to {room.answer}" if room.answer else ""
      needed = text + room.frames * model.tokens_per_frame + room.answer
      raise ConfigError(
        f"{text} tokens of text, {room.frames} frames {room.what}, of {model.tokens_per_frame} "
        f"tokens each{new} make {needed} tokens, and the model's context has {context}: "
        f"{'start a new conversation, ' if history else ''}"
        f"{'leave the subtitles out, ' if subtitles else ''}shorten the question, {room.advice}, "
        "or give another --context",
        where="--context",
        value=context,
        needed=needed,
        advice=room.advice,
        turns=len(history),
      )
  return asked


def _message(seconds: float, selector: FrameSelector) -> str:
  """What a prompt says of the frames' times: nothing of a still image, or of several."""
  still = selector.frames == 1 or (selector.clip_frames == 1 and not seconds)
  return "" if still else prompt.time_message(seconds, selector.frames)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Answer:
  """What a video answered. `str` is the text alone.

  question, text: of it. video: that was asked. selection: what it looked at. spent: seconds by what
  they went into. prompt: its tokens. cfg: sizes of the model.
  """

  question: str
  text: str
  video: EncodedVideo
  selection: Selection
  spent: dict[str, float]
  prompt: Prompt
  cfg: VLMConfig

  def __str__(self) -> str:
    return self.text

  def __repr__(self) -> str:
    return f"Answer({self.text!r}, {len(self.frames):,} of {len(self.video.times):,} frames)"

  @property
  def frames(self) -> np.ndarray:
    """int[K], which of the sampled frames it looked at, ascending."""
    return self.selection.frames

  @property
  def scores(self) -> np.ndarray | None:
    """float64[T], relevance of every sampled frame; None where nothing was selected."""
    return self.selection.scores

  @property
  def moments(self) -> list[tuple[float, float]]:
    """When it looked, as (first, last) seconds; see `moments.spans`. Several videos are on one
    axis, on which each begins where the one before it ends; none of these reaches over into the
    next.
    """
    found = moments_by_video(self.video, self.frames, own=False)
    return [span for spans in found for span in spans]

  @property
  def moments_by_video(self) -> list[list[tuple[float, float]]]:
    """`moments` of each video, in order, in its own seconds."""
    return list(moments_by_video(self.video, self.frames, own=True))

  def show(self) -> Any:
    """Relevance over time and the frames it looked at, as a figure of matplotlib (extra `plot`)."""
    from xcomp_jax.inference.pictures import draw_answer

    return draw_answer(self)

  def _repr_html_(self) -> str:
    """What a notebook shows."""
    from xcomp_jax.inference.html_report import framed, page

    return framed(page(self.video, [self], self.video.spent))


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
    selector: FrameSelector,
    sampling: Sampling,
    keep_rounds: bool = True,
    talk: bool = False,
    text: int = TALK,
    subtitles: str = "",
  ):
    """Begins a conversation.

    selector: of the video's frames. keep_rounds: hold what scoring rounds left in the LLM for later
    questions (0.24 GB per 1,024 frames at 2B). talk: the first question is padded as later ones
    are, so that the second compiles nothing. text: what they are padded to, as long as that will
    do. subtitles: of the video, one per line, listed before the first question.
    """
    self.model, self.tokenizer, self.video = model, tokenizer, video
    self.selector, self.sampling, self.subtitles = selector, sampling, subtitles
    self.history: list[tuple[str, str]] = []
    self._rounds = {} if keep_rounds else None
    self._talk, self._slots = talk, text

  def forget(self) -> None:
    """Starts a new conversation about the same video."""
    self.history = []

  def left(self) -> int | None:
    """How many more tokens of questions and answers the context holds; None where nobody knows
    it.
    """
    room = self._room()
    return None if room is None else max(0, room - self._shortest(self.history))

  def ending(self) -> str:
    """What to say of the context's end: "" while it is far, a sentence from about SOON turns before
    it on.
    """
    if not self.history or (left := self.left()) is None:
      return ""
    longest = max(self._shortest([turn]) for turn in self.history) - self._shortest([])
    turns = left // longest
    if turns > SOON:
      return ""
    return (
      f"the context's end is near: it holds {left:,} more tokens of questions and answers, "
      f"{f'about {turns}' if turns else 'less than one'} turn{'s' * (turns > 1)} like the longest "
      "of this conversation; then give another --context, or start a new conversation"
    )

  def ask(
    self,
    question: str,
    *,
    sampling: Sampling | None = None,
    write: Callable[[str], None] = lambda text: None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
  ) -> Answer:
    """Answers a question.

    Args:
      question: the text.
      sampling: of this answer; None: the conversation's.
      write: called with the answer's text as it comes.
      report: called with "scoring" and the number of rounds done, and of all; or "encoding" and of
        torn clips.

    Raises:
      AnnotationError, ConfigError: an empty question, or one too long for the model.
    """
    return drained(self.stream(question, sampling=sampling, report=report), write)

  def stream(
    self,
    question: str,
    *,
    sampling: Sampling | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
  ) -> Generator[str, None, Answer]:
    """`ask`, whose text comes in pieces; the question counts as asked when the last one came."""
    # The bias counts from the first question's message; a later question has none before it (quirk
    # Q11).
    selector = self.selector.without_bias() if self.history else self.selector
    how = sampling or self.sampling
    asked = self._prompt(question, selector, how, self.history)
    pieces = self._answer([question], [asked], selector, [how], report, self._padded(asked))
    (got,) = yield from firsts(pieces)
    self.history.append((question, got.text))
    return got

  def check(self, question: str, sampling: Sampling | None = None) -> None:
    """Refuses a question that `ask_apart` would.

    Raises:
      AnnotationError, ConfigError: an empty question, or one too long for the model.
    """
    self._prompt(question, self.selector, sampling or self.sampling)

  def ask_apart(
    self, questions: Sequence[str], samplings: Sequence[Sampling] | None = None
  ) -> list[Answer]:
    """Answers several questions at once, each as the first of a conversation of its own.

    They are scored and decoded together, with the caches of all of them in memory; the answers, but
    for rounding, are those that each gets alone. What it took is divided evenly among them.

    samplings: of each answer; None: the conversation's.

    Raises:
      AnnotationError, ConfigError: see `check`.
    """
    return drained(self.stream_apart(questions, samplings))

  def stream_apart(
    self,
    questions: Sequence[str],
    samplings: Sequence[Sampling] | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
  ) -> Generator[list[str], None, list[Answer]]:
    """`ask_apart`, of which a piece of every answer's text comes at a time; "" where there is none
    new.
    """
    how = samplings or [self.sampling] * len(questions)
    asked = [self._prompt(one, self.selector, s) for one, s in zip(questions, how, strict=True)]
    return (yield from self._answer(questions, asked, self.selector, how, report))

  def _prompt(
    self,
    question: str,
    selector: FrameSelector,
    sampling: Sampling,
    history: Sequence[tuple[str, str]] = (),
  ) -> Prompt:
    return prompt_of(
      self.model.cfg,
      self.tokenizer,
      question,
      self.video.seconds,
      selector,
      sampling.max_new_tokens,
      history,
      self.subtitles,
    )

  def _shortest(self, history: Sequence[tuple[str, str]]) -> int:
    """Tokens of text of the shortest question after others."""
    message = _message(self.video.seconds, self.selector)
    shortest = prompt.question_prompt(self.tokenizer, "?", message, history, self.subtitles)
    return len(shortest.tokens) - 1

  def _room(self) -> int | None:
    """Tokens of text that the context holds beside the frames and an answer."""
    passes = rooms(self.model.cfg, self.selector, self.sampling.max_new_tokens)
    return min((room.text for room in passes), default=None)

  def _padded(self, asked: Prompt) -> int:
    """Tokens that the text behind the frames is padded to, at least."""
    if not (self._talk or self.history):
      return 0
    before, after = around_frames(asked)
    most = (self._room() or up(len(asked.tokens), 8 * self._slots)) - len(before)
    return min(most, self._slots) if len(after) <= self._slots else most

  def _answer(
    self,
    questions: Sequence[str],
    asked: Sequence[Prompt],
    selector: FrameSelector,
    samplings: Sequence[Sampling],
    report: Callable[[str, int, int], None],
    text: int = 0,
  ) -> Generator[list[str], None, list[Answer]]:
    """Answers prompts, padded to so many tokens of text at least, in pieces of every answer's
    text.
    """
    steps = self._steps(asked, selector, samplings, report, text)
    # what computes between two pieces must not stay in force while others work
    selections, texts, spent = yield from stepwise(lambda: computing(self.model), steps)
    return [
      Answer(
        question=question,
        text=said,
        video=self.video,
        selection=seen,
        spent=spent.copy(),
        prompt=one,
        cfg=self.model.cfg,
      )
      for question, said, seen, one in zip(questions, texts, selections, asked, strict=True)
    ]

  def _steps(
    self,
    asked: Sequence[Prompt],
    selector: FrameSelector,
    samplings: Sequence[Sampling],
    report: Callable[[str, int, int], None],
    text: int,
  ) -> Generator[list[str], None, tuple[list[Selection], list[str], dict[str, float]]]:
    model, video, watch = self.model, self.video, _Stopwatch(len(asked))
    selections = select_frames(
      model,
      video,
      asked,
      selector,
      text=text,
      rounds=self._rounds,
      report=functools.partial(report, "scoring"),
    )
    watch.lap("scoring")
    visual = [
      selected_features(model, video, one.frames, functools.partial(report, "encoding"))
      for one in selections
    ]
    watch.lap("tower")
    longest = max(text, *(len(around_frames(one)[1]) for one in asked))
    batches = [
      as_batch(one, seen, video.clip_frames, longest)
      for one, seen in zip(asked, visual, strict=True)
    ]
    texts = yield from self._generate(batches, samplings, watch)
    return selections, texts, watch.spent

  def _generate(
    self, batches: Sequence[Batch], samplings: Sequence[Sampling], watch: "_Stopwatch"
  ) -> Generator[list[str], None, list[str]]:
    """Prefills and decodes prompts in pieces of text; returns the text of every answer."""
    pieces, written = [], [""] * len(batches)
    for new in stream(self.model, batches, samplings):
      if not pieces:
        watch.lap("prefill and first tokens")
      pieces.append(new)
      texts = [self._decoded(row) for row in zip(*pieces, strict=True)]
      # a character may need the next token
      whole = [
        text if text.startswith(before) and not text.endswith("\ufffd") else before
        for text, before in zip(texts, written, strict=True)
      ]
      yield [text[len(before) :] for text, before in zip(whole, written, strict=True)]
      written = whole
    watch.lap("generation")
    texts = [self._decoded(row) for row in zip(*pieces, strict=True)]
    yield [text[len(before) :] for text, before in zip(texts, written, strict=True)]
    return texts

  def _decoded(self, tokens: Sequence[np.ndarray]) -> str:
    return self.tokenizer.decode(np.concatenate(tokens)).strip()


def firsts(pieces: Generator[list[str], None, Got]) -> Generator[str, None, Got]:
  """The text of the first answer alone, in pieces that are not empty."""
  while True:
    try:
      first = next(pieces)[0]
    except StopIteration as end:
      return end.value
    if first:
      yield first


class _Stopwatch:
  """Seconds by what they went into, divided evenly among so many questions."""

  def __init__(self, questions: int):
    self.spent: dict[str, float] = {}
    self._questions = questions
    self._begun = time.perf_counter()

  def lap(self, name: str) -> None:
    """Ends what has gone on since the last lap."""
    now = time.perf_counter()
    self.spent[name] = (now - self._begun) / self._questions
    self._begun = now
