"""QC-Comp: the frames that a question attends to (paper 3.3, Algorithms A and C; FACTS.md 9).

Three steps, all pure:
  plan       rounds of clips that run through the LLM together, and windows inside a round:
             arithmetic
  score      the attention of the question's rows to every clip of a window, at every layer that
             counts
  aggregate  mean over windows and rounds, sum over layers; then the best frames

The visual tokens of a round come before the question, so what they become does not depend on it:
`watch` runs them once, `score_windows` only the question's own rows. Scoring runs no MLP, no full
attention map and no decoding of its own: the rows' queries against the keys of a window (prefix,
clips, text), rotated to positions in the window.

Modes (`select_config`):
  official  every constant and quirk as released; rounds are shifted by parts of a clip, so they
            need their own pass through the tower, and frames are selected one by one
  aligned   rounds shifted by whole clips and whole clips selected: every clip is encoded once
  local     every window is a round of its own: no token sees more than a window, cost linear in
            frames
  global    one window per round: the paper's ablation, with the position bias that windows avoid
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xcomp_jax.config import ConfigError, SelectConfig
from xcomp_jax.data.batch import Leaf
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.model import qwen2, vlm
from xcomp_jax.model.qwen2 import LayerCache, Lengths
from xcomp_jax.model.softmax import attend_first, question_scores

OFFICIAL_CLIP = 8  # frames that the release scores together, whatever its tower's clips are
OFFICIAL_LEAST = 1024  # frames from which the release selects at all (quirk Q13)
DEPTH = 28  # layers that SelectConfig.layers refers to
ROWS = 128  # of a question whose attention to all windows exists at once


def select_config(
  mode: str, frames: int, repeat: int | None = None, rows: str = "question"
) -> SelectConfig:
  """A mode's values; `repeat` is 2 for "official", as in the paper's Table B, and 1 for the others
  by default.

  Raises:
    ConfigError: an unknown mode or rows, or less than one frame or repetition.
  """
  if mode not in ("official", "aligned", "local", "global"):
    raise ConfigError(
      f"select.mode = {mode!r}: known are official, aligned, local, global",
      where="select.mode",
      value=mode,
    )
  if rows not in ("question", "answer"):
    raise ConfigError(
      f"select.rows = {rows!r}: known are question, answer", where="select.rows", value=rows
    )
  official = mode == "official"
  cfg = SelectConfig(
    mode=mode,
    frames=frames,
    repeat=repeat if repeat is not None else 2 if official else 1,
    round=512,
    window=0 if mode == "global" else 64,
    stride=32,
    layers=(6, 23),
    causal=not official,
    bias=27 if official else None,
    rows=rows,
  )
  if cfg.frames < 1 or cfg.repeat < 1:
    raise ConfigError(
      f"select.frames = {cfg.frames}, select.repeat = {cfg.repeat}: both must be at least 1",
      where="select.frames" if cfg.frames < 1 else "select.repeat",
    )
  return cfg


# --- planning
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundPlan:
  """What runs through the LLM together, and what shares a softmax.

  starts: int[R], first frame of each round.
  frames: of every round; past the video's last frame it goes on at its first.
  unit: frames that get one score.
  windows: int[W, w], units of a round in each window; the same for all rounds.
  counted: bool[units of a round], those whose score is used.
  """

  starts: np.ndarray
  frames: int
  unit: int
  windows: np.ndarray
  counted: np.ndarray

  @property
  def units(self) -> int:
    """Units of a round."""
    return self.frames // self.unit


def windows(units: int, window: int, stride: int, cover: bool) -> np.ndarray:
  """Windows of `window` units every `stride`: int[W, w]. cover: one more, right-aligned, if a tail
  is left over.
  """
  window = min(window or units, units)
  starts = list(range(0, units - window + 1, stride))
  if cover and starts[-1] + window < units:
    starts.append(units - window)
  return np.array(starts)[:, None] + np.arange(window)


def plan_rounds(frames: int, clip_frames: int, cfg: SelectConfig) -> RoundPlan:
  """The rounds and windows for a video of `frames` frames.

  Raises:
    ConfigError: numbers that don't divide, by name; for "official" also a video it does not select
      from.
  """
  unit = OFFICIAL_CLIP if cfg.mode == "official" else clip_frames
  sizes = {
    "round": cfg.round,
    "window": cfg.window,
    "stride": cfg.stride,
    "number of sampled frames": frames,
  }
  for name, size in sizes.items():
    if size % unit or size < 0:
      raise ConfigError(
        f"QC-Comp ({cfg.mode}): the {name}, {size} frames, is no multiple of a clip's {unit}",
        where=name,
        value=size,
        unit=unit,
      )
  if cfg.mode == "official":
    return _official_plan(frames, clip_frames, cfg)
  n, window, stride = frames // unit, cfg.window // unit, cfg.stride // unit
  if cfg.mode == "local":
    starts = windows(n, window, stride, cover=True)[:, 0]
    return _counting_all(starts, unit, np.arange(min(window, n))[None])
  # A round reaches over into the next one by a window, so that clips at the seam are in whole
  # windows too. Spread evenly, `repeat` times as many rounds have every clip `repeat` times, but
  # for those near the ends.
  step = cfg.round // unit
  size = min(step + window, n)
  count = max(1, -(-(n - window) // step)) * cfg.repeat
  starts = np.unique(np.linspace(0, n - size, count).round().astype(int))
  return _counting_all(starts, unit, windows(size, window, stride, cover=True))


def _counting_all(starts: np.ndarray, unit: int, inside: np.ndarray) -> RoundPlan:
  """A plan of rounds from these units on, all of whose units are in a window and count."""
  size = int(inside.max()) + 1
  return RoundPlan(
    starts=starts * unit,
    frames=size * unit,
    unit=unit,
    windows=inside,
    counted=np.ones(size, bool),
  )


def _official_plan(frames: int, clip_frames: int, cfg: SelectConfig) -> RoundPlan:
  """FACTS.md 9: rounds wrap around, and only units in as many windows as any other count (quirk
  Q3).
  """
  for bad, says, fields in (
    (
      frames < OFFICIAL_LEAST,
      f"selects from {OFFICIAL_LEAST} frames or more, not from {frames} (quirk Q13)",
      {"where": "frames", "value": frames, "least": OFFICIAL_LEAST},
    ),
    (
      cfg.frames % clip_frames,
      f"cuts the selected frames into clips of {clip_frames}, which {cfg.frames} are no multiple "
      "of",
      {"where": "select.frames", "value": cfg.frames, "unit": clip_frames},
    ),
    (
      OFFICIAL_CLIP % clip_frames,
      f"scores {OFFICIAL_CLIP} frames at a time, which clips of {clip_frames} don't divide",
      {"where": "clip_frames", "value": clip_frames},
    ),
  ):
    if bad:
      raise ConfigError(f"QC-Comp (official) {says}", **fields)
  rounds = -(-frames // cfg.round)
  order = np.arange(rounds * cfg.repeat)
  shift = order // rounds
  starts = (
    order * cfg.round + shift * (OFFICIAL_CLIP // cfg.repeat) + shift * (cfg.round // cfg.repeat)
  ) % frames
  size = cfg.round + cfg.window
  inside = windows(
    size // OFFICIAL_CLIP, cfg.window // OFFICIAL_CLIP, cfg.stride // OFFICIAL_CLIP, cover=False
  )
  times = np.bincount(inside.ravel(), minlength=size // OFFICIAL_CLIP)
  return RoundPlan(
    starts=starts,
    frames=size,
    unit=OFFICIAL_CLIP,
    windows=inside,
    counted=times == np.max(times),
  )


# --- scoring
# ----------------------------------------------------------------------------------------


def scored_layers(cfg: SelectConfig, layers: int) -> range:
  """The layers whose attention counts, in a model of `layers` layers: 6..23 of 28 in the
  release.
  """
  first, last = (round(layer * layers / DEPTH) for layer in cfg.layers)
  return range(first, min(last, layers - 1) + 1)


def watch(
  model: vlm.VLM,
  features: Float[Array | np.ndarray, "B C N D"],
  clips: Int[Array | np.ndarray, " B"],
  prefix: Int[Array | np.ndarray, " P"],
  last: int,
) -> tuple[LayerCache, ...]:
  """Runs the visual tokens of rounds, which don't depend on a question.

  Args:
    model: the parameters.
    features: [B, C, N, D] merged tower features of each round, right-padded in C.
    clips: int32[B], valid ones.
    prefix: int32[P], the tokens before the visual slot.
    last: the last layer that counts; static. Those after it don't run.

  Returns:
    keys (not rotated) and values of the layers up to that one, for `score_windows`; of that one the
    keys alone.

  Raises:
    ConfigError: keep="attention", where what stays depends on the question.
  """
  if model.cfg.lp_comp.keep == "attention":
    raise ConfigError(
      'QC-Comp can\'t score under lp_comp.keep = "attention", where the question decides which '
      "tokens stay",
      where="lp_comp.keep",
      value="attention",
    )
  B, _, N, _ = features.shape
  P = len(prefix)
  features = jnp.asarray(features, model.cfg.dtype)
  before, nothing = jnp.broadcast_to(prefix, (B, P)), jnp.zeros((B, 0), jnp.int32)
  x = vlm.place_tokens(model, features, before, nothing)  # [B, P + C * N, E]
  zero = jnp.zeros((B, 1), jnp.int32)
  groups = clips[:, None] * (N // model.cfg.lp_comp.group)  # [B, 1]
  lengths = Lengths(prefix=zero + P, groups=groups, text=zero)
  return qwen2.run_layers(
    model.llm, x, lengths, prefix=P, text=0, caches=True, rotated=False, stop=last
  ).caches


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AskedText:
  """The text of a prompt that scores, or with a leading Q those of several; arrays of numpy or jax.

  text: int32[L], the tokens after the visual slot that a window holds, padded.
  valid: bool[L]. asked: bool[L], the rows that score: the question's, or the last one.
  """

  text: Leaf
  valid: Leaf
  asked: Leaf


def asked_text(tokens: np.ndarray, question: int, header: int, cfg: SelectConfig) -> AskedText:
  """Which text rows score.

  Args:
    tokens: int32[L], the prompt after the visual slot.
    question: place in it of the question's first token; used unless cfg.bias says otherwise.
    header: place of the assistant's `<|im_start|>`; the rows that score end before it.
    cfg: a mode's values. A window that is a whole round also shows the assistant's header, as
      released (FACTS.md 9); the others need no row from there on, unless it is the last one that
      scores (rows="answer").

  Raises:
    ConfigError: no row is left to score.
  """
  last = len(tokens) if cfg.rows == "answer" else header
  first = last - 1 if cfg.rows == "answer" else question if cfg.bias is None else cfg.bias
  if not 0 <= first < last:
    raise ConfigError(
      f"QC-Comp: no question token is left between text token {first} and the answer at {header}",
      where="question",
      first=first,
      end=last,
    )
  shown = len(tokens) if cfg.window == 0 else last
  i = np.arange(shown)
  text = tokens[:shown].astype(np.int32)
  return AskedText(text, np.ones(shown, bool), (i >= first) & (i < last))


def from_prompt(prompt: Prompt, cfg: SelectConfig) -> AskedText:
  """`asked_text` for a prompt that ends in the assistant's header; its newest question scores."""
  slot = int(np.flatnonzero(prompt.tokens < 0)[0])
  start, end = prompt.question
  # A user's turn ends in two tokens, <|im_end|> and a newline.
  return asked_text(prompt.tokens[slot + 1 :], start - slot - 1, end - slot - 1 + 2, cfg)


def stack_questions(questions: Sequence[AskedText], length: int = 0) -> AskedText:
  """Several questions as one Asked of arrays [Q, L], padded to the longest, or to `length`."""
  L = max(length, *(len(q.text) for q in questions))
  return jax.tree.map(
    lambda *rows: np.stack([np.pad(row, (0, L - len(row))) for row in rows]), *questions
  )


def score_windows(
  model: vlm.VLM,
  caches: tuple[LayerCache, ...],
  asked: AskedText,
  windows: Int[Array | np.ndarray, "W w"],
  *,
  layers: range,
  causal: bool,
  prefix: int,
  units: int,
) -> Float[Array, "Q B M W w"]:
  """The attention of questions to every unit of every window, per scored layer.

  Args:
    model: the parameters.
    caches: of B rounds, from `watch`.
    asked: Q questions, which share the caches and know nothing of each other.
    windows: int[W, w], units of a round.
    layers: whose attention counts; static, as all below.
    causal: a row sees the text up to itself; False: all that is shown (quirk Q2).
    prefix: P, slots before the visual tokens.
    units: of a round, padding included.

  Returns:
    float32[Q, B, M, W, w], mean over heads, question rows and the unit's tokens; M as in `layers`.
  """
  asked = jax.tree.map(jnp.asarray, asked)
  B, L = len(caches[0].key), asked.text.shape[-1]
  # Which rows run and ask is the same for all questions, so that each needs no program of its own.
  count, some = qwen2.pieces(asked.valid), asked.asked.any(0)
  look = functools.partial(
    _look,
    first=jnp.argmax(some),
    end=L - jnp.argmax(some[::-1]),
    shown=jnp.minimum(count * qwen2.PART, L),
    windows=windows,
    causal=causal,
    prefix=prefix,
    units=units,
  )

  def one(asked):
    """float32[B, M, W, w] of one question."""
    text, valid = (jnp.broadcast_to(a, (B, L)) for a in (asked.text, asked.valid))
    _, _, projected = qwen2.extend(model.llm, model.llm.embed(text), valid, caches, count)
    scores = [look(model.llm.layers[i], caches[i].key, *projected[i], asked) for i in layers]
    return jnp.stack(scores, axis=1)

  return jax.vmap(one)(asked)  # [Q, B, M, W, w]


def _look(layer, keys, q, k, asked, *, first, end, shown, windows, causal, prefix, units):
  """The attention of one question at one layer: float32[B, W, w].

  Args:
    layer: of the LLM.
    keys: [B, P + units * t, K, h], t tokens of a unit, not rotated; likewise
    q: [B, L, H, h], of the text's rows, and
    k: [B, L, K, h].
    asked: the question.
    first: the first row that asks.
    end: the one behind the last.
    shown: rows that run.
    windows: int[W, w]; this and what follows as in `score_windows`.
    causal: of the text.
    prefix: P.
    units: of a round.
  """
  B, L = q.shape[:2]
  W, w = windows.shape
  t = (keys.shape[1] - prefix) // units
  inside = _window_keys(layer, keys[:, prefix:], windows, prefix, units)  # [B, W, w * t, K, h]
  # What lies around the frames has the same places in every window, and so the same part in its
  # softmax.
  place = prefix + w * t + jnp.cumsum(asked.valid) - 1  # [L]
  places = jnp.concatenate([jnp.arange(prefix), place])  # [P + L]
  around = layer.rotate(jnp.concatenate([keys[:, :prefix], k], axis=1), places[None])
  valid = jnp.concatenate([jnp.ones(prefix, bool), asked.valid])  # [P + L]
  share = asked.asked / asked.asked.sum()  # [L]
  size = min(L, ROWS)

  def add_part(i, paid):
    # the last part begins earlier, and leaves out what the one before had
    begin = jnp.minimum(i * size, L - size)

    def cut(a, axis=0):
      return jax.lax.dynamic_slice_in_dim(a, begin, size, axis)

    rows = begin + jnp.arange(size)  # [r]
    queries = layer.rotate(cut(q, 1), cut(place)[None])  # [B, r, H, h]

    def seen(slots):  # int[s] -> bool[1, r, s]
      return (valid[slots] & ((slots <= prefix + rows[:, None]) | (not causal)))[None]

    count = prefix + (begin + size if causal else shown)
    _, others = attend_first(queries, around, around[..., :0], seen, count)  # [B, r, H]
    counts = jnp.where(rows >= i * size, cut(share), 0)  # [r]
    return paid + question_scores(queries, inside, counts[None], others)  # [B, W, w * t]

  paid = jnp.zeros((B, W, w * t))
  if size == L:
    paid = add_part(0, paid)
  else:
    paid = jax.lax.fori_loop(first // size, -(-end // size), add_part, paid)
  return paid.reshape(B, W, w, t).mean(-1)  # [B, W, w]


def _window_keys(layer, visual, windows, prefix: int, units: int):
  """Keys of the units of windows, rotated to their places there: [B, W, w * t, K, h].

  visual: [B, units * t, K, h], not rotated.
  """
  B, _, K, h = visual.shape
  W = len(windows)
  visual = visual.reshape(B, units, -1, K, h)  # [B, units, t, K, h]
  inside = visual[:, windows].reshape(B * W, -1, K, h)  # [B * W, w * t, K, h]
  places = prefix + jnp.arange(inside.shape[1])
  return layer.rotate(inside, places[None]).reshape(B, W, -1, K, h)


# --- selecting
# -------------------------------------------------------------------------------------------------


def unit_scores(
  plan: RoundPlan, scores: Float[np.ndarray, "R M W w"]
) -> Float[np.ndarray, "R M units"]:
  """Each unit's mean over the windows it is in, float64; meaningless where `plan.counted` is
  False.
  """
  member = np.zeros((plan.windows.size, plan.units))
  member[np.arange(plan.windows.size), plan.windows.ravel()] = 1
  return (
    scores.reshape(*scores.shape[:2], -1).astype(np.float64) @ member / np.maximum(member.sum(0), 1)
  )


def aggregate(
  plan: RoundPlan, scores: Float[np.ndarray, "R M W w"], frames: int
) -> Float[np.ndarray, " T"]:
  """Scores of frames: float64[T], from those of all rounds.

  A frame has its unit's score, mean over windows and rounds, sum over layers.

  Raises:
    ConfigError: a frame that no round scores (quirk Q4).
  """
  total, times = np.zeros((scores.shape[1], frames)), np.zeros(frames)
  used = plan.counted.repeat(plan.unit)
  for start, values in zip(plan.starts, unit_scores(plan, scores), strict=True):
    where = (start + np.arange(plan.frames))[used] % frames
    times[where] += 1
    total[:, where] += values.repeat(plan.unit, axis=1)[:, used]
  if not times.all():
    raise ConfigError(
      f"QC-Comp: {int((times == 0).sum())} of {frames} frames are in no window, first frame "
      f"{int(np.argmin(times))}; sample a multiple of the round, or use a mode that covers the "
      "tail (quirk Q4)",
      where="frames",
      missing=np.flatnonzero(times == 0).tolist(),
    )
  return (total / times).sum(0)


def top(scores: Float[np.ndarray, " T"], k: int, unit: int = 1) -> Int[np.ndarray, " K"]:
  """The k best frames in ascending order, of equal ones the earlier; in whole units of `unit`
  frames, so k rounded up.
  """
  if unit > 1:
    best = top(scores.reshape(-1, unit).mean(1), -(-k // unit))
    return (best[:, None] * unit + np.arange(unit)).ravel()
  return np.sort(np.argsort(-scores, kind="stable")[:k])
