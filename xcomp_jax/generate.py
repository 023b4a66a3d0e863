"""From questions to answers: select frames, prefill, decode.

The pieces are functions; `Chat` puts them together for one video and any number of questions.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xcomp_jax import qc_comp
from xcomp_jax.config import ConfigError, SelectConfig
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import Batch, Bucket, Example, Leaf, collate
from xcomp_jax.data.prompt import Prompt, Tokenizer
from xcomp_jax.encode import EncodedVideo, encode_clips
from xcomp_jax.model import decoder, vlm
from xcomp_jax.model.decoder import LayerCache

TEXT_STEP = 64  # prompts are padded to a multiple of this many tokens, so that few lengths are compiled
SCORE_STEP = 16  # and those that score, whose rows run in every round, to a multiple of this many
CLIP_STEP = 8  # and videos to a multiple of this many clips
STREAM = 8  # tokens between two looks at what was generated

# --- tokens ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen.

  max_new_tokens: of an answer, at most; room is made for them in every layer's cache.
  eos: token ids that end an answer.
  repetition_penalty: 1.0 is none; the release's generation_config has 1.1, applied to new tokens only (quirk Q20).
  temperature: 0 takes the most probable token; the others then don't matter.
  top_k: draw from the k most probable tokens; 0: from all.
  top_p: draw from the fewest tokens that together have this probability; 1.0: from all.
  seed: of the draws.
  """

  max_new_tokens: int
  eos: tuple[int, ...]
  repetition_penalty: float = 1.0
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    """Refuses values that mean nothing.

    Raises:
      ConfigError: which one, and its range.
    """
    ranges = {
      "max_new_tokens": self.max_new_tokens >= 1, "repetition_penalty": self.repetition_penalty > 0,
      "temperature": self.temperature >= 0, "top_k": self.top_k >= 0, "top_p": 0 < self.top_p <= 1,
    }  # fmt: skip
    bad = [f"{name} = {getattr(self, name)}" for name, good in ranges.items() if not good]
    if bad:
      raise ConfigError(f"sampling: {', '.join(bad)} makes no sense: max_new_tokens >= 1, repetition_penalty > 0, temperature and top_k >= 0, 0 < top_p <= 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Between two tokens.

  logits: float32[B, V] of the next one. caches: one per layer, with free slots at their end. free: int32[], how
  many. seen: bool[B, V], tokens generated so far. done: bool[B], answers that have ended.
  """

  logits: Leaf
  caches: tuple[LayerCache, ...]
  free: Leaf
  seen: Leaf
  done: Leaf


def prefill(model: vlm.VLM, batch: Batch, room: int) -> State:
  """Runs a batch of prompts (frames or features) and keeps every layer's own, shorter cache."""
  return start(model, vlm.forward(model, batch, caches=True), batch.text.shape[1], batch.text_length, room)


def start(model: vlm.VLM, out: decoder.Decoded, text: int, text_length, room: int) -> State:
  """Makes a pass with caches ready for `room` new tokens; `text`: slots of the last part, int32[B] of them valid."""
  last = out.x.shape[1] - text + text_length - 1
  logits = model.llm.logits(jnp.take_along_axis(out.x, last[:, None, None], axis=1))[:, 0]
  widen = lambda a: jnp.pad(a, [(0, 0), (0, room)] + [(0, 0)] * (a.ndim - 2))
  return State(
    logits, jax.tree.map(widen, out.caches), jnp.int32(room), jnp.zeros(logits.shape, bool), jnp.zeros(len(logits), bool)
  )


def choose(logits: jax.Array, seen: jax.Array, sampling: Sampling, key: jax.Array | None) -> jax.Array:
  """The next tokens int32[B] from float32[B, V]; penalty, temperature, top_k and top_p in this order, as Hugging Face's generate does."""
  penalised = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
  logits = jnp.where(seen, penalised, logits)
  if sampling.temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = logits / sampling.temperature
  ranked = jnp.flip(jnp.sort(logits, axis=-1), -1)
  if sampling.top_k:
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
  share = jax.nn.softmax(ranked, -1)
  ranked = jnp.where(jnp.cumsum(share, -1) - share < sampling.top_p, ranked, -jnp.inf)  # never none: nothing is before the first
  least = jnp.min(jnp.where(jnp.isinf(ranked), jnp.inf, ranked), -1, keepdims=True)
  return jax.random.categorical(key, jnp.where(logits < least, -jnp.inf, logits)).astype(jnp.int32)


def decode(model: vlm.VLM, state: State, sampling: Sampling, steps: int, key: jax.Array | None = None):
  """`steps` more tokens of every answer, int32[B, steps], and the state behind them.

  After its end an answer goes on with the first eos id. The state must have room for `steps` tokens.
  """
  eos = jnp.array(sampling.eos, jnp.int32)
  keys = None if key is None else jax.random.split(key, steps)

  def one(state, key):
    token = choose(state.logits, state.seen, sampling, key)
    token = jnp.where(state.done, eos[0], token) if sampling.eos else token
    x, caches = decoder.step(model.llm, model.llm.embed(token[:, None]), state.caches, state.free)
    seen = state.seen.at[jnp.arange(len(token)), token].set(True)
    done = state.done | jnp.isin(token, eos)
    return State(model.llm.logits(x)[:, 0], caches, state.free - 1, seen, done), token

  state, tokens = jax.lax.scan(one, state, keys, length=steps)
  return tokens.T, state


_prefill = nnx.jit(prefill, static_argnames="room")
_decode = nnx.jit(decode, static_argnames=("sampling", "steps"), donate_argnames="state")


def stream(model: vlm.VLM, batch: Batch, sampling: Sampling) -> Iterator[np.ndarray]:
  """New tokens of every prompt, int32[B, n] at a time, until all have ended."""
  total = -(-sampling.max_new_tokens // STREAM) * STREAM
  state = _prefill(model, batch, room=total)
  once = dataclasses.replace(sampling, max_new_tokens=1, seed=0)  # neither changes the program
  for done in range(0, sampling.max_new_tokens, STREAM):
    key = jax.random.fold_in(jax.random.key(sampling.seed), done) if sampling.temperature else None
    tokens, state = _decode(model, state, once, steps=STREAM, key=key)
    yield np.asarray(tokens)[:, : sampling.max_new_tokens - done]
    if np.asarray(state.done).all():
      return


def ended(tokens: np.ndarray, eos: Sequence[int]) -> np.ndarray:
  """The tokens before the first eos."""
  end = np.flatnonzero(np.isin(tokens, eos))
  return tokens[: end[0]] if len(end) else tokens


def generate(model: vlm.VLM, batch: Batch, sampling: Sampling) -> list[np.ndarray]:
  """New tokens of each prompt, up to and without its eos."""
  return [ended(row, sampling.eos) for row in np.concatenate(list(stream(model, batch, sampling)), axis=1)]


def as_batch(question: Prompt, visual: np.ndarray, clip_frames: int) -> Batch:
  """One prompt as a Batch of one row, padded to few shapes.

  visual: uint8[C, F, S, S, 3] clips of frames, or [C, N, D] merged features.
  """
  example = Example(visual, question.tokens, question.labels, question.query, index=0)
  slot = int(np.flatnonzero(question.tokens < 0)[0])
  text = up(len(question.tokens) - slot - 1, TEXT_STEP)
  clips = len(visual) if len(visual) == 1 else up(len(visual), CLIP_STEP)
  return collate([example], Bucket(clips, clip_frames, slot, text))


def up(n: int, step: int) -> int:
  """The next multiple of `step`."""
  return -(-n // step) * step


# --- questions -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Selection:
  """Which sampled frames a question keeps.

  frames: int[K], ascending. scores: float64[T], of all; None where nothing was selected. note: why not, in words.
  """

  frames: np.ndarray
  scores: np.ndarray | None
  note: str


_watch = nnx.jit(qc_comp.watch, static_argnames="last")
_score = nnx.jit(qc_comp.score, static_argnames=("layers", "causal", "prefix", "units"))


def phases(frames: int, clip_frames: int, cfg: SelectConfig | None) -> tuple[int, ...]:
  """Which phases of a video `select` will need encoded."""
  if cfg is None or cfg.mode != "official" or why_not(frames, cfg):
    return (0,)
  return tuple(sorted({0} | {int(s) % clip_frames for s in qc_comp.plan(frames, clip_frames, cfg).starts}))


def why_not(frames: int, cfg: SelectConfig | None) -> str:
  """Why nothing is selected from so many frames, or ''."""
  if cfg is None:
    return "no selection asked for"
  if cfg.frames >= frames:
    return f"{cfg.frames} frames may be kept and there are {frames}, so nothing is selected"
  if cfg.mode == "official" and frames < qc_comp.OFFICIAL_LEAST:
    return f"the release selects from {qc_comp.OFFICIAL_LEAST} frames or more, and there are {frames} (quirk Q13)"
  return ""


def select(
  model: vlm.VLM,
  video: EncodedVideo,
  question: Prompt,
  cfg: SelectConfig | None,
  *,
  rounds: dict | None = None,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> Selection:
  """The frames that a question attends to.

  Args:
    model: the parameters.
    video: with the `phases` that the mode needs.
    question: its prompt about all frames.
    cfg: the mode; None keeps all frames.
    rounds: see `score_rounds`.
    report: likewise.

  Raises:
    ConfigError: numbers that don't fit together, by name.
  """
  T, F = len(video.times), video.clip_frames
  note = why_not(T, cfg)
  if note:
    return Selection(np.arange(T), None, note)
  plan = qc_comp.plan(T, F, cfg)
  score = qc_comp.aggregate(plan, score_rounds(model, video, question, plan, cfg, rounds=rounds, report=report), T)
  return Selection(qc_comp.top(score, cfg.frames, 1 if cfg.mode == "official" else F), score, "")


def score_rounds(
  model: vlm.VLM,
  video: EncodedVideo,
  question: Prompt,
  plan: qc_comp.Plan,
  cfg: SelectConfig,
  *,
  rounds: dict | None = None,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
  """The attention a question pays, float32[R, M, W, w]: rounds, scored layers, windows, units of a window.

  Args:
    model: the parameters.
    video: the features.
    question: its prompt.
    plan: of the video's frames under cfg.
    cfg: the mode.
    rounds: what the visual tokens of each round left in the LLM is kept here, and used again for the next
      question about this video with this model; None: run them again for every question.
    report: called with the number of rounds done, and of all.
  """
  F = video.clip_frames
  slot = int(np.flatnonzero(question.tokens < 0)[0])
  asked = qc_comp.from_prompt(question, cfg, SCORE_STEP)
  layers = qc_comp.scored_layers(cfg, model.cfg.llm.layers)
  size = plan.frames // F
  padded = up(size, CLIP_STEP)
  windows = plan.windows
  if padded != size and cfg.window:  # as many windows as a padded round would have, so that its program serves
    more = qc_comp.windows(padded * F // plan.unit, cfg.window // plan.unit, cfg.stride // plan.unit, cover=True)
    windows = np.concatenate([windows, windows[-1:].repeat(max(0, len(more) - len(windows)), 0)])
  rows = min(max(1, cfg.round // plan.frames), len(plan.starts))
  scores = []
  for first in range(0, len(plan.starts), rows):
    starts = plan.starts[first : first + rows]
    key = (starts.tobytes(), plan.frames, layers[-1], question.tokens[:slot].tobytes())
    caches = None if rounds is None else rounds.get(key)
    if caches is None:
      features = np.zeros((rows, padded, *video.features[0].shape[1:]), video.features[0].dtype)
      for row, begin in enumerate(starts):
        features[row, :size] = video.features[begin % F][(begin // F + np.arange(size)) % video.clips]
      caches = _watch(model, features, np.full(rows, size, np.int32), question.tokens[:slot], last=layers[-1])
      if rounds is not None:
        rounds[key] = caches
    paid = _score(
      model, caches, asked, windows, layers=layers, causal=cfg.causal, prefix=slot, units=padded * F // plan.unit
    )
    scores.append(np.asarray(paid)[: len(starts), :, : len(plan.windows)])
    report(first + len(starts), len(plan.starts))
  return np.concatenate(scores)


def selected(
  model: vlm.VLM,
  video: EncodedVideo,
  frames: np.ndarray,
  report: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
  """Merged features [K / F, N, D] of K selected frames, cut into clips of F.

  Clips that the video has, at whatever phase, are taken from there; those that the selection tore apart, which only
  "official" does, are encoded again. report: called with the number of those done, and of all.
  """
  F = video.clip_frames
  clips = frames.reshape(-1, F)
  start = clips[:, 0]
  known = (clips == start[:, None] + np.arange(F)).all(1) & np.isin(start % F, list(video.features))
  out = np.empty((len(clips), *video.features[0].shape[1:]), video.features[0].dtype)
  for i in np.flatnonzero(known):
    out[i] = video.features[start[i] % F][start[i] // F]
  torn = np.flatnonzero(~known)
  for done, (i, features) in enumerate(zip(torn, encode_clips(model, (video.frames[clips[i]] for i in torn)), strict=True)):
    out[i] = features
    report(done + 1, len(torn))
  return out


@dataclasses.dataclass(frozen=True)
class Answer:
  """text: of the answer. selection: what it looked at. spent: seconds by what they went into. prompt: its tokens."""

  text: str
  selection: Selection
  spent: dict[str, float]
  prompt: Prompt


class Chat:
  """Questions and answers about one video; every question sees those before it and gets its own selection.

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
  ):
    """keep_rounds: hold what scoring rounds left in the LLM for later questions (0.24 GB per 1,024 frames at 2B)."""
    self.model, self.tokenizer, self.video = model, tokenizer, video
    self.config, self.sampling = select, sampling
    self.history: list[tuple[str, str]] = []
    self._rounds = {} if keep_rounds else None

  def forget(self) -> None:
    """Starts a new conversation about the same video."""
    self.history = []

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
      report: called with "scoring" and the number of rounds done, and of all; or "encoding" and of torn clips.

    Raises:
      AnnotationError, ConfigError: an empty question, or one too long for the model.
    """
    video, model = self.video, self.model
    message = "" if len(video.times) == 1 else prompt.time_message(video.seconds, len(video.times))
    asked = prompt.ask(self.tokenizer, question, message, self.history)
    begun = time.perf_counter()
    spent = {}

    def note(name):
      nonlocal begun
      spent[name], begun = time.perf_counter() - begun, time.perf_counter()

    # The bias counts from the first question's message; a later question has none before it (quirk Q11).
    cfg = dataclasses.replace(self.config, bias=None) if self.config and self.history else self.config
    self._check_length(asked, cfg)
    selection = select(model, video, asked, cfg, rounds=self._rounds, report=functools.partial(report, "scoring"))
    note("scoring")
    batch = as_batch(asked, selected(model, video, selection.frames, functools.partial(report, "encoding")), video.clip_frames)
    note("tower")
    tokens, text = [], ""
    for new in stream(model, batch, self.sampling):
      if not tokens:
        note("prefill and first tokens")
      tokens += new[0].tolist()
      whole = self.tokenizer.decode(ended(np.array(tokens), self.sampling.eos)).strip()
      if whole.startswith(text) and not whole.endswith("\ufffd"):  # a character may need the next token
        write(whole[len(text) :])
        text = whole
    note("generation")
    whole = self.tokenizer.decode(ended(np.array(tokens), self.sampling.eos)).strip()
    write(whole[len(text) :])
    self.history.append((question, whole))
    return Answer(whole, selection, spent, asked)

  def _check_length(self, asked: Prompt, cfg: SelectConfig | None) -> None:
    """Refuses what the model's context does not hold: the final prompt with its answer, or a round that scores."""
    T, F, context = len(self.video.times), self.video.clip_frames, self.model.cfg.llm.context
    text = len(asked.tokens) - 1
    parts = [(T, self.sampling.max_new_tokens, "kept")]
    if not why_not(T, cfg):
      parts = [(up(cfg.frames, F), self.sampling.max_new_tokens, "kept"), (qc_comp.plan(T, F, cfg).frames, 0, "scored together")]
    for frames, answer, what in parts:
      needed = text + frames * self.model.cfg.tokens_per_frame + answer
      if context and needed > context:
        raise ConfigError(
          f"{text} tokens of text, {frames} frames {what}, of {self.model.cfg.tokens_per_frame} tokens each, and an answer of up "
          f"to {answer} make {needed} tokens, and the model's context has {context}: shorten the question or keep fewer frames"
        )
