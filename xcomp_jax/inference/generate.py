"""From prompts to new tokens: prefill, choose, decode. `chat` makes the prompts."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from xcomp_jax.config import ConfigError
from xcomp_jax.data.batch import Batch, Example, Leaf, Shape, collate, split_text
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.model import kernels, qwen2, vlm
from xcomp_jax.model.layout import padded
from xcomp_jax.parallel.mesh import constrain, parts

# texts are padded to a multiple of this many tokens, long ones of `qwen2.SHORT`, so that few
# lengths are compiled
TEXT_STEP = 64
CLIP_STEP = 8  # and videos to a multiple of this many clips
STREAM = 8  # tokens between two looks at what was generated


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen.

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
class State:
  """Between two tokens.

  logits: float32[B, V] of the next one. caches: one per layer, with free slots at their end. free:
  int32[], how many. seen: bool[B, V], tokens generated so far. done: bool[B], answers that have
  ended.
  """

  logits: Leaf
  caches: tuple[qwen2.LayerCache, ...]
  free: Leaf
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
    seen=jnp.zeros(logits.shape, bool),
    done=jnp.zeros(len(logits), bool),
  )


def _logits(model: vlm.VLM, x: jax.Array) -> jax.Array:
  """float32[B, V] of x [B, 1, D]: rows go to all devices, each of which has some of the words."""
  logits = model.llm.logits(constrain(x, "replica", None, None))
  return constrain(logits[:, 0], "replica", "vocab")


def choose_tokens(
  logits: jax.Array, seen: jax.Array, sampling: Sampling, key: jax.Array | None
) -> jax.Array:
  """The next tokens int32[B] from float32[B, V]; penalty, temperature, top_k and top_p in this
  order, as Hugging Face's generate does.
  """
  penalised = jnp.where(
    logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
  )
  logits = jnp.where(seen, penalised, logits)
  if sampling.temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = logits / sampling.temperature
  ranked = jnp.flip(jnp.sort(logits, axis=-1), -1)
  if sampling.top_k:
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
  share = jax.nn.softmax(ranked, -1)
  # never none: nothing is before the first
  ranked = jnp.where(jnp.cumsum(share, -1) - share < sampling.top_p, ranked, -jnp.inf)
  least = jnp.min(jnp.where(jnp.isinf(ranked), jnp.inf, ranked), -1, keepdims=True)
  assert key is not None  # only temperature 0 does without
  # The same noise for all rows, so that none depends on which others there are.
  draw = jax.vmap(lambda logits: jax.random.categorical(key, logits))
  return draw(jnp.where(logits < least, -jnp.inf, logits)).astype(jnp.int32)


def decode_tokens(
  model: vlm.VLM, state: State, sampling: Sampling, steps: int, key: jax.Array | None = None
):
  """`steps` more tokens of every answer, int32[B, steps], and the state behind them.

  After its end an answer goes on with the first eos id. The state must have room for `steps`
  tokens.
  """
  eos = jnp.array(sampling.eos, jnp.int32)
  keys = None if key is None else jax.random.split(key, steps)

  def one(state, key):
    token = choose_tokens(state.logits, state.seen, sampling, key)
    token = jnp.where(state.done, eos[0], token) if sampling.eos else token
    x, caches = qwen2.step(model.llm, model.llm.embed(token[:, None]), state.caches, state.free)
    return State(
      logits=_logits(model, x),
      caches=caches,
      free=state.free - 1,
      seen=state.seen.at[jnp.arange(len(token)), token].set(True),
      done=state.done | jnp.isin(token, eos),
    ), token

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
_decode = jax.jit(decode_tokens, static_argnames=("sampling", "steps"), donate_argnames="state")


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
  batches = (jax.tree.map(lambda *of: np.concatenate(of), *prompts[i::count]) for i in range(count))
  whole = _room(_prefill(model, next(batches), room=room), count)
  for place, batch in enumerate(batches, 1):
    whole = _put(whole, _prefill(model, batch, room=room), place)
  return whole


def stream(model: vlm.VLM, prompts: Sequence[Batch], sampling: Sampling) -> Iterator[np.ndarray]:
  """New tokens of every prompt, int32[B, n] at a time, until all have ended; prompts as of
  `prefill_each`.

  Raises:
    ConfigError: numbers that float16 does not have.
  """
  state = prefill_each(model, prompts, room=up(sampling.max_new_tokens, STREAM))
  rows = sum(len(prompt.text) for prompt in prompts)  # the state may have more
  once = dataclasses.replace(sampling, max_new_tokens=1, seed=0)  # neither changes the program
  for done in range(0, sampling.max_new_tokens, STREAM):
    kernels.check_finite(state.logits, "the LLM's logits", model.cfg.dtype)
    key = jax.random.fold_in(jax.random.key(sampling.seed), done) if sampling.temperature else None
    tokens, state = _decode(model, state, once, steps=STREAM, key=key)
    yield np.asarray(tokens)[:rows, : sampling.max_new_tokens - done]
    if np.asarray(state.done).all():
      return


def ended(tokens: np.ndarray, eos: Sequence[int]) -> np.ndarray:
  """The tokens before the first eos."""
  end = np.flatnonzero(np.isin(tokens, eos))
  return tokens[: end[0]] if len(end) else tokens


def generate(model: vlm.VLM, batch: Batch, sampling: Sampling) -> list[np.ndarray]:
  """New tokens of each prompt, up to and without its eos."""
  return [
    ended(row, sampling.eos)
    for row in np.concatenate(list(stream(model, [batch], sampling)), axis=1)
  ]


def as_batch(question: Prompt, visual: np.ndarray, clip_frames: int, text: int = 1) -> Batch:
  """One prompt as a Batch of one row, padded to few shapes.

  visual: [C, N, D] merged features of clips of `clip_frames` frames. text: slots for it, at least.
  """
  frames = len(visual) * clip_frames
  visual = visual.reshape(frames, -1, visual.shape[-1])
  example = Example(
    frames=frames,
    visual=visual,
    tokens=question.tokens,
    labels=question.labels,
    query=question.query,
    index=0,
  )
  before, after = split_text(example)
  slots = frames if len(visual) == clip_frames else up(len(visual), CLIP_STEP * clip_frames)
  return collate(
    [[example]],
    Shape(rows=1, samples=1, prefix=before, frames=slots, text=text_slots(max(text, after))),
  )


def text_slots(tokens: int, step: int = TEXT_STEP) -> int:
  """What a text is padded to."""
  return up(tokens, step if tokens <= qwen2.SHORT else qwen2.SHORT)


def up(n: int, step: int) -> int:
  """The next multiple of `step`."""
  return -(-n // step) * step
