"""Attention in plain einsum: the weights themselves, the oracle, and parts of it at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xcomp_jax.model.layout import by_blocks

MASKED = -1e30  # finite, so that a row that may see nothing gives finite garbage instead of NaN
BLOCK = 128  # queries whose scores with all keys exist at once, in gradients on a CPU
KEYS = 512  # at once, of those that are there by now; with 2,048 a CPU takes four times as long


def attention_weights(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B S K h"],
  *,
  causal: bool,
  key_valid: Bool[Array, "B S"] | None = None,
  sample: Int[Array, "B S"] | None = None,
  offset: int | Int[Array, ""] = 0,
) -> Float[Array, "B K G L S"]:
  """The softmax weights themselves, float32[B, K, H // K, L, S]; row i is slot i + offset of the
  sequence.
  """
  B, L, H, h = q.shape
  S, K = k.shape[1:3]
  q = q.reshape(B, L, K, H // K, h)
  scores = jnp.einsum("blkgh,bskh->bkgls", q, k, preferred_element_type=jnp.float32) * h**-0.5
  allowed = (
    jnp.ones((1, 1, 1, 1, S), bool) if key_valid is None else key_valid[:, None, None, None, :]
  )
  if causal:
    allowed = allowed & (jnp.arange(S) <= jnp.arange(L)[:, None] + offset)
  if sample is not None:
    allowed = allowed & (sample[:, :, None] == sample[:, None, :])[:, None, None]
  return jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)


def attend_einsum(q, k, v, *, causal, valid=None, sample=None, offset):
  """The oracle: all weights at once; arguments as of `attention_weights`, v like k."""
  weights = attention_weights(
    q, k, causal=causal, key_valid=valid, sample=sample, offset=offset
  )  # [B, K, G, L, S]
  return jnp.einsum("bkgls,bskh->blkgh", weights.astype(v.dtype), v).reshape(q.shape)


def attend_in_blocks(q, k, v, valid, causal):
  """The oracle for one block of queries after another; for gradients, which compute it again."""

  def one(block, offset):
    return attend_einsum(block, k, v, causal=causal, valid=valid, offset=offset)

  return by_blocks(one, q, BLOCK, first=k.shape[1] - q.shape[1]).astype(v.dtype)


def raise_maxima(largest: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A step of softmax over keys that come block by block.

  Args:
    largest: [...], of every row's scores so far.
    scores: [..., t], of a block.

  Returns:
    the new maxima, what sums of weights so far shrink by, and the weights of the block.
  """
  new = jnp.maximum(largest, scores.max(-1))
  return new, jnp.exp(largest - new), jnp.exp(scores - new[..., None])


def attend_first(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B S K h"],
  v: Float[Array, "B S K n"],
  seen: Callable[[jax.Array], jax.Array],
  count: int | Int[Array, ""],
) -> tuple[Float[Array, "B L H n"], Float[Array, "B L H"]]:
  """Attention to the first `count` of S keys, KEYS at a time: a longer S costs memory, and no time.

  Args:
    q: [B, L, H, h].
    k: [B, S, K, h], H a multiple of K.
    v: [B, S, K, n].
    seen: from slots int32[s] to which of them a row sees, bool[B or 1, L, s]; each sees at least
      one.
    count: may be traced.

  Returns:
    what is attended, in float32, and the logarithm of the sum of a row's exp(scores).
  """
  B, L, H, h = q.shape
  S, K = k.shape[1:3]
  size, q = min(S, KEYS), q.reshape(B, L, K, H // K, h)

  def block(j, carry):
    largest, total, out = carry
    # the last block begins earlier, and leaves out what the one before had
    first = jnp.minimum(j * size, S - size)
    slots = first + jnp.arange(size)
    keys, values = (jax.lax.dynamic_slice_in_dim(x, first, size, 1) for x in (k, v))
    scores = jnp.einsum("blkgh,bskh->bkgls", q, keys, preferred_element_type=jnp.float32) * h**-0.5
    scores = jnp.where((seen(slots) & (slots >= j * size))[:, None, None], scores, MASKED)
    largest, shrink, weights = raise_maxima(largest, scores)  # [B, K, G, L], ..., [B, K, G, L, s]
    more = jnp.einsum(
      "bkgls,bskn->bkgln", weights.astype(v.dtype), values, preferred_element_type=jnp.float32
    )
    return largest, total * shrink + weights.sum(-1), out * shrink[..., None] + more

  begun = (
    jnp.full((B, K, H // K, L), MASKED),
    jnp.zeros((B, K, H // K, L)),
    jnp.zeros((B, K, H // K, L, v.shape[-1])),
  )
  largest, total, out = (
    block(0, begun) if size == S else jax.lax.fori_loop(0, -(-count // size), block, begun)
  )

  def heads(x):  # [B, K, G, L, ...] -> [B, L, H, ...]
    return jnp.moveaxis(x, 3, 1).reshape(B, L, H, *x.shape[4:])

  return heads(out / total[..., None]), heads(largest + jnp.log(total))


def question_scores(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B W S K h"],
  share: Float[Array, "#B L"],
  others: Float[Array, "B L H"],
) -> Float[Array, "B W S"]:
  """The attention that question rows pay to each key of windows (paper 3.3): softmax weights, mean
  over heads, sum over rows.

  Args:
    q: [B, L, H, h].
    k: [B, W, S, K, h], H a multiple of K, of W windows.
    share: float32[B or 1, L], what a row counts; 0: it does not ask.
    others: float32[B, L, H], logarithm of the sum of exp(scores) of the other keys that a row sees,
      the same in all windows.
  """
  B, L, H, h = q.shape
  K = k.shape[3]
  q = q.reshape(B, L, K, H // K, h)
  scores = jnp.einsum("blkgh,bwskh->bwkgls", q, k, preferred_element_type=jnp.float32) * h**-0.5
  others = jnp.moveaxis(others.reshape(B, L, K, H // K), 1, 3)[:, None]  # [B, 1, K, G, L]
  total = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1), others)  # [B, W, K, G, L]
  weights = jnp.exp(scores - total[..., None])  # [B, W, K, G, L, S]
  share = jnp.broadcast_to(share / H, (B, L))
  # weights of bfloat16 would tie clips
  return jnp.einsum("bwkgls,bl->bws", weights, share, precision="highest")
