"""From prompts to new tokens: prefill, choose, decode. `chat` makes the prompts.

A program is compiled for the shapes of its arrays alone. How tokens are chosen are arrays, a value
per row, so all of that shares a program, and greedy rows share it with rows that draw. Sizes come
from short lists, and what is between two of them shares the program of the larger one:

- a text behind the frames (`text_slots`): 64, 128, 192, 256, 512, ... LONG tokens, then multiples
  of LONG; where it scores frames (`selection.score_rounds`) 16, 32, 48, 64, 128, ...;
- the longest answer of a batch (`answer_slots`): 64, 256, 1,024, ... tokens;
- questions answered together (`batches`): as many as may be, and the powers of two below.

Prefill has a program for each text and answer, decoding for each text, answer and number of
questions, scoring for each text and number of questions; all of them another one for other numbers
of frames.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from xcomp_jax.config import ConfigError
from xcomp_jax.data.batch import Batch, Example, Leaf, Shape, collate, split_text
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.inference.encoded_video import ClipFeatures, stacked
from xcomp_jax.model import kernels, qwen2, vlm
from xcomp_jax.model.layout import padded
from xcomp_jax.parallel.mesh import constrain, parts

TEXT_STEP = 64  # tokens, the shortest that a text is padded to
LONG = 4096  # tokens of text up to which what it is padded to doubles, from four steps on
ANSWER = 64  # tokens, the shortest that room is made for
CLIP_STEP = 8  # videos are padded to a multiple of this many clips
STREAM = 8  # tokens between two looks at what was generated
ALL = np.iinfo(np.int32).max  # more tokens than any vocabulary has


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens of one answer are chosen.

  max_new_tokens: of an answer, at most; room is made for them in every layer's cache.
  eos: token ids that end an answer.
  repetition_penalty: 1.0 is none; the release's generation_config has 1.1, applied to new tokens
  only (quirk Q20).
  temperature: 0 takes the most probable token; the others then don't matter.
  top_k: draw from the k most probable tokens; 0: from all.
  top_p: draw from the fewest tokens that together have this probability; 1.0: from all.
  seed: of the draws.
  """

  max_new_tokens: int
  eos: tuple[int, ...]
  _: dataclasses.KW_ONLY
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
      "max_new_tokens": self.max_new_tokens >= 1,
      "repetition_penalty": self.repetition_penalty > 0,
      "temperature": self.temperature >= 0,
      "top_k": self.top_k >= 0,
      "top_p": 0 < self.top_p <= 1,
    }
    bad = {name: getattr(self, name) for name, good in ranges.items() if not good}
    if bad:
      said = ", ".join(f"{name} = {value}" for name, value in bad.items())
      raise ConfigError(
        f"sampling: {said} makes no sense: max_new_tokens >= 1, repetition_penalty > 0, "
        f"temperature and top_k >= 0, 0 < top_p <= 1",
        where="sampling",
        value=bad,
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSampling:
  """How the next token of every row is chosen; `stack_sampling` makes it.

  repetition_penalty, temperature, top_p: float32[B]. top_k: int32[B], ALL where `Sampling` has 0.
  seed: uint32[B]. eos: of all rows; a part of the program.
  """

  repetition_penalty: Leaf
  temperature: Leaf
  top_k: Leaf
  top_p: Leaf
  seed: Leaf
  eos: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def stack_sampling(each: Sequence[Sampling]) -> RowSampling:
  """One `Sampling` a row, without the lengths of their answers, as arrays.

  Raises:
    ValueError: they end at other tokens.
  """
  (eos,) = {one.eos for one in each}

  def column(values: list[Any], dtype: Any = np.float32) -> np.ndarray:
    return np.array(values, dtype)

  return RowSampling(
    repetition_penalty=column([one.repetition_penalty for one in each]),
    temperature=column([one.temperature for one in each]),
    top_k=column([min(one.top_k or ALL, ALL) for one in each], np.int32),
    top_p=column([one.top_p for one in each]),
    seed=column([one.seed % 2**32 for one in each], np.uint32),
    eos=eos,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """Between two tokens.

  logits: float32[B, V] of the next one. caches: one per layer, with free slots at their end. free:
  int32[], how many. made: int32[], tokens generated so far. seen: bool[B, V], which. done: bool[B],
  answers that have ended.
  """

  logits: Leaf
  caches: tuple[qwen2.LayerCache, ...]
  free: Leaf
  made: Leaf
  seen: Leaf
  done: Leaf


def prefill(model: vlm.VLM, batch: Batch, room: int, in_pieces: bool = False) -> State:
  """Runs a batch of prompts, one a row, and keeps every layer's own, shorter cache.

  in_pieces: run long texts piece by piece, so that their padding takes no time, where the rule of
  keeping allows it.
  """
  text = batch.text.shape[1]
  in_pieces = in_pieces and text > qwen2.SHORT and model.cfg.lp_comp.keep != "attention"
  out = vlm.forward_in_pieces(model, batch) if in_pieces else vlm.forward(model, batch, caches=True)
  return start(model, out, text, batch.text_length[:, 0], room)


def start(model: vlm.VLM, out: qwen2.Decoded, text: int, text_length, room: int) -> State:
  """Makes a pass with caches ready for `room` new tokens; `text`: slots of the last part, int32[B]
  of them valid.
  """
  last = out.x.shape[1] - text + text_length - 1
  logits = _logits(model, jnp.take_along_axis(out.x, last[:, None, None], axis=1))
  return State(
    logits=logits,
    caches=jax.tree.map(functools.partial(padded, count=room), out.caches),
    free=jnp.int32(room),
    made=jnp.int32(0),
    seen=jnp.zeros(logits.shape, bool),
    done=jnp.zeros(len(logits), bool),
  )


def _logits(model: vlm.VLM, x: jax.Array) -> jax.Array:
  """float32[B, V] of x [B, 1, D]: rows go to all devices, each of which has some of the words."""
  logits = model.llm.logits(constrain(x, "replica", None, None))
  return constrain(logits[:, 0], "replica", "vocab")


def choose_tokens(
  logits: jax.Array, seen: jax.Array, sampling: RowSampling, keys: jax.Array
) -> jax.Array:
  """The next tokens int32[B] from float32[B, V]; penalty, temperature, top_k and top_p in this
  order, as Hugging Face's generate does. keys: [B], of the draws.
  """
  penalty = sampling.repetition_penalty[:, None]
  penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
  logits = jnp.where(seen, penalised, logits)
  best = jnp.argmax(logits, -1).astype(jnp.int32)
  draws = sampling.temperature > 0
  # Where all rows are greedy the vocabulary is not sorted.
  return jax.lax.cond(
    jnp.any(draws),
    lambda: jnp.where(draws, _draw_tokens(logits, sampling, keys), best),
    lambda: best,
  )


def _draw_tokens(logits: jax.Array, sampling: RowSampling, keys: jax.Array) -> jax.Array:
  """Draws int32[B]; of rows with temperature 0 whatever."""
  temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1)
  logits = logits / temperature[:, None]
  ranked = jnp.flip(jnp.sort(logits, axis=-1), -1)
  ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k[:, None], ranked, -jnp.inf)
  share = jax.nn.softmax(ranked, -1)
  # never none: nothing is before the first
  inside = jnp.cumsum(share, -1) - share < sampling.top_p[:, None]
  ranked = jnp.where(inside, ranked, -jnp.inf)
  least = jnp.min(jnp.where(jnp.isinf(ranked), jnp.inf, ranked), -1, keepdims=True)
  # A row's noise is that of its seed, so that it does not depend on which others there are.
  draw = jax.vmap(jax.random.categorical)
  return draw(keys, jnp.where(logits < least, -jnp.inf, logits)).astype(jnp.int32)


def decode_tokens(model: vlm.VLM, state: State, sampling: RowSampling, steps: int):
  """`steps` more tokens of every answer, int32[B, steps], and the state behind them.

  After its end an answer goes on with the first eos id. The state must have room for `steps`
  tokens. What is drawn depends on `steps`, too.
  """
  eos = jnp.array(sampling.eos, jnp.int32)

  def keys_of(seed):
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), state.made), steps)

  def one(state, keys):
    token = choose_tokens(state.logits, state.seen, sampling, keys)
    token = jnp.where(state.done, eos[0], token) if sampling.eos else token
    x, caches = qwen2.step(model.llm, model.llm.embed(token[:, None]), state.caches, state.free)
    return State(
      logits=_logits(model, x),
      caches=caches,
      free=state.free - 1,
      made=state.made + 1,
      seen=state.seen.at[jnp.arange(len(token)), token].set(True),
      done=state.done | jnp.isin(token, eos),
    ), token

  keys = jax.vmap(keys_of, out_axes=1)(jnp.asarray(sampling.seed))  # [steps, B]
  state, tokens = jax.lax.scan(one, state, keys, length=steps)
  return tokens.T, state


@functools.partial(jax.jit, static_argnames="count")
def _room(one: State, count: int) -> State:
  """A state with `count` rows for every row of `one`, which is the first of them."""

  def more(a):
    return padded(a[:, None], count - 1).reshape(-1, *a.shape[1:]) if a.ndim else a

  return jax.tree.map(more, one)


@functools.partial(jax.jit, donate_argnames="whole")
def _put(whole: State, one: State, place: Int[Array, ""] | int) -> State:
  """`whole` with rows of `one` at that place of the rows that `_room` has for each."""

  def put(a, b):
    return a.reshape(len(b), -1, *a.shape[1:]).at[:, place].set(b).reshape(a.shape)

  return jax.tree.map(lambda a, b: put(a, b) if a.ndim else b, whole, one)


_prefill = jax.jit(functools.partial(prefill, in_pieces=True), static_argnames="room")
_decode = jax.jit(decode_tokens, static_argnames="steps", donate_argnames="state")


def _rows(*of: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
  """Arrays one under the other, where they are."""
  return of[0] if len(of) == 1 else jnp.concatenate(of)


def prefill_each(model: vlm.VLM, prompts: Sequence[Batch], room: int) -> State:
  """Prompts of one row each and of one shape (or a single batch of any), one after another: a
  prompt of many frames fills a device by itself. Devices that split rows take one each.

  So their program is that of a single one, and what exists at once on a device is the caches of its
  prompts, those of one more, and one prompt's activations. Behind several prompts there may be more
  rows, until every such device has as many: the last prompt again.
  """
  if len(prompts) == 1:
    return _prefill(model, prompts[0], room=room)
  rows = up(len(prompts), parts("batch"))
  count = rows // parts("batch")  # of a device, which lie one behind another
  prompts = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
  batches = (jax.tree.map(_rows, *prompts[i::count]) for i in range(count))
  whole = _room(_prefill(model, next(batches), room=room), count)
  for place, batch in enumerate(batches, 1):
    whole = _put(whole, _prefill(model, batch, room=room), place)
  return whole


def stream(
  model: vlm.VLM, prompts: Sequence[Batch], sampling: Sampling | Sequence[Sampling]
) -> Iterator[list[np.ndarray]]:
  """New tokens int32[n] of every prompt, up to and without its eos, some at a time, until all have
  ended; prompts as of `prefill_each`.

  sampling: of all, or one for each, whose answers end at the same tokens.

  Raises:
    ConfigError: numbers that float16 does not have.
  """
  rows = sum(len(batch.text) for batch in prompts)
  each = [sampling] * rows if isinstance(sampling, Sampling) else list(sampling)
  left = np.array([one.max_new_tokens for one in each])
  state = prefill_each(model, prompts, room=answer_slots(max(left.tolist())))
  chosen = stack_sampling([*each, *each[-1:] * (len(state.done) - rows)])
  while left.any():
    kernels.check_finite(state.logits, "the LLM's logits", model.cfg.dtype)
    tokens, state = _decode(model, state, chosen, steps=STREAM)
    new = [
      _ended(row[:n], chosen.eos) for row, n in zip(np.asarray(tokens)[:rows], left, strict=True)
    ]
    left = np.where(np.asarray(state.done)[:rows], 0, np.maximum(left - STREAM, 0))
    yield new


def _ended(tokens: np.ndarray, eos: Sequence[int]) -> np.ndarray:
  """The tokens before the first eos."""
  end = np.flatnonzero(np.isin(tokens, eos))
  return tokens[: end[0]] if len(end) else tokens


def generate(
  model: vlm.VLM, batch: Batch, sampling: Sampling | Sequence[Sampling]
) -> list[np.ndarray]:
  """New tokens of each prompt, as `stream` gives them."""
  pieces = zip(*stream(model, [batch], sampling), strict=True)
  return [np.concatenate(row) for row in pieces]


def as_batch(question: Prompt, visual: ClipFeatures, clip_frames: int, text: int = 1) -> Batch:
  """One prompt as a Batch of one row, padded to few shapes.

  visual: merged features [N, D] of C clips of `clip_frames` frames. text: slots for it, at least.
  """
  example = Example(
    frames=len(visual) * clip_frames,
    visual=None,
    tokens=question.tokens,
    labels=question.labels,
    query=question.query,
    index=0,
  )
  before, after = split_text(example)
  clips = 1 if len(visual) == 1 else up(len(visual), CLIP_STEP)
  slots = clips * clip_frames
  batch = collate(
    [[example]],
    Shape(rows=1, samples=1, prefix=before, frames=slots, text=text_slots(max(text, after))),
  )
  tokens = stacked(visual, clips)  # [clips, N, D]
  return dataclasses.replace(batch, visual=tokens.reshape(1, slots, -1, tokens.shape[-1]))


def text_slots(tokens: int, step: int = TEXT_STEP) -> int:
  """What a text is padded to: a few sizes, of which `step` is the shortest."""
  if tokens > LONG:
    return up(tokens, LONG)
  return up(tokens, step) if tokens <= 4 * step else _grown(4 * step, tokens, 2)


def answer_slots(tokens: int) -> int:
  """How much room there is for answers of up to so many tokens."""
  return _grown(ANSWER, tokens, 4)


def _grown(size: int, least: int, factor: int) -> int:
  """The first of size, size * factor, size * factor^2, ... that is not below `least`."""
  while size < least:
    size *= factor
  return size


def batches(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
  """Runs of `size`, and of powers of two of what is left: a few sizes to compile, and no row for
  nothing.
  """
  while things:
    n = size if len(things) >= size else 1 << len(things).bit_length() - 1
    yield things[:n]
    things = things[n:]


def up(n: int, step: int) -> int:
  """The next multiple of `step`."""
  return -(-n // step) * step
