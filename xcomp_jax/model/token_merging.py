"""Token merging (ToMe), 784 features per frame to 16, and the projector into the LLM (FACTS.md 8).

Deterministic from run to run and on any device: a merge is a matmul with a one-hot matrix instead
of a
scatter, and ties have a rule: the lowest position wins, as partner and in the ranking. (The
official order of ties is unspecified, so only there may results differ.)
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from xcomp_jax.config import VLMConfig
from xcomp_jax.model.layers import ShapeError
from xcomp_jax.parallel.mesh import gathered

# merging costs 2% of the tower, and its choices hang on small gaps
EXACT = jax.lax.Precision.HIGHEST


def merge_steps(tokens: int, target: int) -> list[int]:
  """How many tokens each step merges away, from `tokens` to `target`: at most half of what is
  there.

  Raises:
    ShapeError: fewer tokens than the target.
  """
  if tokens < target:
    raise ShapeError(
      f"{tokens} tokens can't be merged into {target}: frames are too small; use a larger "
      f"image_size",
      where="tokens",
      value=tokens,
      target=target,
    )
  steps = []
  while tokens != target:
    steps.append(min(tokens - target, tokens // 2))
    tokens -= steps[-1]
  return steps


def metric(x: Float[Array, "C N D"], heads: int) -> Float[Array, "C N d"]:
  """What tokens are compared by: float32, the mean over heads; no gradient flows through it."""
  return jax.lax.stop_gradient(x).astype(jnp.float32).reshape(*x.shape[:2], heads, -1).mean(2)


def match(
  x: Float[Array, "C N D"], heads: int
) -> tuple[Float[Array, "C A"], Int[Array, "C A"], Int[Array, "C A"]]:
  """The best partner of each even token (A) among the odd ones (B).

  Returns:
    score float32[C, A], cosine similarity to the best partner; partner int32[C, A], which B token
    that is; and order int32[C, A], A tokens by descending score: the first ones get merged.
  """
  y = metric(x, heads)
  y = y / jnp.linalg.norm(y, axis=-1, keepdims=True)
  scores = jnp.einsum("cad,cbd->cab", y[:, ::2], y[:, 1::2], precision=EXACT)
  score = scores.max(-1)
  return score, scores.argmax(-1), jnp.argsort(-score, axis=-1, stable=True)


def merge_step(
  x: Float[Array, "C N D"], size: Float[Array, "C N 1"], r: int, heads: int
) -> tuple[Float[Array, "C M D"], Float[Array, "C M 1"]]:
  """Merges the r most similar even tokens into their partners, weighted by size; M = N - r.

  Returns float32 features and sizes, in the order: the even tokens that stay, by descending score,
  then all odd tokens by position. So while r is half of the tokens, positions keep their order.
  """
  _, partner, order = match(x, heads)
  a, b = x[:, ::2].astype(jnp.float32), x[:, 1::2].astype(jnp.float32)
  size_a, size_b = size[:, ::2], size[:, 1::2]
  into = jax.nn.one_hot(partner, b.shape[1], dtype=jnp.float32)  # [C, A, B]
  if r < a.shape[1]:
    rank = jnp.argsort(order, axis=-1)  # the inverse permutation
    into = jnp.where((rank < r)[..., None], into, 0)
  total = jnp.einsum("cab,cad->cbd", into, a * size_a, precision=EXACT) + b * size_b
  size_b = jnp.einsum("cab,cad->cbd", into, size_a, precision=EXACT) + size_b

  def take(y):
    return jnp.take_along_axis(y, order[:, r:, None], axis=1)

  return jnp.concatenate([take(a), total / size_b], 1), jnp.concatenate([take(size_a), size_b], 1)


def merge(x: Float[Array, "C N D"], target: int, heads: int) -> Float[Array, "C M D"]:
  """The N features of each clip merged into `target`, in the dtype of x.

  Raises:
    ShapeError: fewer features than the target.
  """
  merged, size = x, jnp.ones((*x.shape[:2], 1), jnp.float32)
  for r in merge_steps(x.shape[1], target):
    merged, size = merge_step(merged, size, r, heads)
  return merged.astype(x.dtype)


def sources(x: Float[Array, "C N D"], target: int, heads: int) -> Int[Array, "C N"]:
  """Which of the `target` tokens of `merge` each of the N features went into: int32[C, N].

  Raises:
    ShapeError: fewer features than the target.
  """
  merged, size = x, jnp.ones((*x.shape[:2], 1), jnp.float32)
  into = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
  for r in merge_steps(x.shape[1], target):
    _, partner, order = match(merged, heads)
    rank, staying = jnp.argsort(order, axis=-1), order.shape[1] - r
    place = jnp.zeros(merged.shape[:2], jnp.int32)  # in the order that `merge_step` gives
    place = place.at[:, ::2].set(jnp.where(rank < r, staying + partner, rank - r))
    place = place.at[:, 1::2].set(staying + jnp.arange(merged.shape[1] // 2))
    into = jnp.take_along_axis(place, into, axis=1)
    merged, size = merge_step(merged, size, r, heads)
  return into


class Projector(nnx.Module):
  """Merged tower features to embeddings of the LLM."""

  def __init__(self, cfg: VLMConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
    linear = functools.partial(
      nnx.Linear, dtype=jnp.dtype(cfg.dtype), param_dtype=param_dtype, rngs=rngs
    )
    self.fc1 = linear(cfg.vision.width, cfg.llm.width)
    self.fc2 = linear(cfg.llm.width, cfg.llm.width)

  def __call__(self, x: Float[Array, "*B N D"]) -> Float[Array, "*B N H"]:
    whole = gathered(self, self.fc1.dtype)
    return whole.fc2(jax.nn.gelu(whole.fc1(x), approximate=False))
