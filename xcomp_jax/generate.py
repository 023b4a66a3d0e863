"""From an encoded video and a prompt to new tokens: prefill once, then one token at a time, greedily."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xcomp_jax.data.batch import Batch, Leaf
from xcomp_jax.model import decoder, vlm
from xcomp_jax.model.decoder import LayerCache


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are chosen: greedily.

  max_new_tokens: room made in every layer's cache.
  eos: token ids that end an answer.
  repetition_penalty: 1.0 is none; the release's generation_config has 1.1, applied to new tokens only (quirk Q20).
  """

  max_new_tokens: int
  eos: tuple[int, ...]
  repetition_penalty: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
  """What a prompt leaves: logits float32[B, V] of its last token, and one cache per layer with room for new ones."""

  logits: Leaf
  caches: tuple[LayerCache, ...]


def prefill(model: vlm.VLM, batch: Batch, room: int) -> Prefill:
  """Runs a batch of prompts (frames or features) and keeps every layer's own, shorter cache."""
  return start(model, vlm.forward(model, batch, caches=True), batch.text.shape[1], batch.text_length, room)


def start(model: vlm.VLM, out: decoder.Decoded, text: int, text_length, room: int) -> Prefill:
  """Makes a pass with caches ready for `room` new tokens; `text`: slots of the last part, int32[B] of them valid."""
  last = out.x.shape[1] - text + text_length - 1
  logits = model.llm.logits(jnp.take_along_axis(out.x, last[:, None, None], axis=1))[:, 0]
  widen = lambda a: jnp.pad(a, [(0, 0), (0, room)] + [(0, 0)] * (a.ndim - 2))
  return Prefill(logits, jax.tree.map(widen, out.caches))


def decode(model: vlm.VLM, start: Prefill, sampling: Sampling):
  """Greedy tokens int32[B, max_new_tokens] (eos and what follows it: the first eos id), and their logits float32[B, n, V].

  `start.caches` must have room for max_new_tokens.
  """
  n = sampling.max_new_tokens
  B, V = start.logits.shape
  eos = jnp.array(sampling.eos, jnp.int32)

  def one(carry, t):
    logits, caches, seen, done = carry
    penalised = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    token = jnp.argmax(jnp.where(seen, penalised, logits), -1).astype(jnp.int32)
    token = jnp.where(done, eos[0], token) if sampling.eos else token
    done = done | jnp.isin(token, eos)
    seen = seen.at[jnp.arange(B), token].set(True)
    x, caches = decoder.step(model.llm, model.llm.embed(token[:, None]), caches, n - t)
    return (model.llm.logits(x)[:, 0], caches, seen, done), (token, logits)

  carry = (start.logits, start.caches, jnp.zeros((B, V), bool), jnp.zeros(B, bool))
  _, (tokens, logits) = jax.lax.scan(one, carry, jnp.arange(n))
  return tokens.T, jnp.moveaxis(logits, 0, 1)


def generate(model: vlm.VLM, batch: Batch, sampling: Sampling) -> list[np.ndarray]:
  """New tokens of each prompt, up to and without its eos."""
  @nnx.jit
  def run(model, batch):
    return decode(model, prefill(model, batch, sampling.max_new_tokens), sampling)[0]

  rows = np.asarray(run(model, batch))
  ends = [np.flatnonzero(np.isin(row, sampling.eos)) for row in rows]
  return [row[: end[0]] if len(end) else row for row, end in zip(rows, ends, strict=True)]
