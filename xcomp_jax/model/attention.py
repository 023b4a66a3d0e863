"""Attention: one function, a reference in plain einsum, and memory-linear implementations of the same numbers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row that may see nothing gives finite garbage instead of NaN


def attend(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B S K h"],
  v: Float[Array, "B S K h"],
  *,
  causal: bool,
  key_valid: Bool[Array, "B S"] | None = None,
  implementation: str = "auto",
) -> Float[Array, "B L H h"]:
  """Softmax attention with grouped key/value heads; scores and softmax in float32, scale h**-0.5.

  Args:
    q: [B, L, H, h].
    k: [B, S, K, h], H a multiple of K.
    v: [B, S, K, h].
    causal: row i sees keys 0..i of its sample (L == S, slots in sequence order).
    key_valid: bool[B, S], False for padding keys; None: all valid. A row that may see no key returns garbage.
    implementation: "einsum" (the oracle, memory L*S), "xla_chunked" (memory linear, any backend), or "auto".

  Returns:
    [B, L, H, h] in q's dtype.

  Raises:
    ValueError: causal attention of L != S, or an unknown implementation.
  """
  if causal and q.shape[1] != k.shape[1]:
    raise ValueError(f"causal attention of {q.shape[1]} queries over {k.shape[1]} keys: they must be as many")
  if implementation == "auto":
    # Below this size the score matrix is small and plain XLA is the fastest to compile and to run.
    implementation = "einsum" if q.shape[1] * k.shape[1] <= 1024 * 1024 else "flash"
  if implementation == "einsum":
    return _einsum(q, k, v, causal, key_valid)
  backends = {"flash": ("mosaic", "triton", "xla_chunked"), "xla_chunked": ("xla_chunked",)}
  if implementation not in backends:
    raise ValueError(f"attention implementation {implementation!r}: known are auto, einsum, {', '.join(backends)}")
  import tokamax
  from absl import flags

  if not flags.FLAGS.is_parsed():  # tokamax reads them, and would parse a command line that is not absl's
    flags.FLAGS.mark_as_parsed()
  mask = None if key_valid is None else key_valid[:, None, None, :]
  return tokamax.dot_product_attention(
    q, k, v, mask=mask, is_causal=causal, implementation=backends[implementation]
  ).astype(q.dtype)


def _einsum(q, k, v, causal, key_valid):
  weights = attention_weights(q, k, causal=causal, key_valid=key_valid)
  out = jnp.einsum("bkgls,bskh->blkgh", weights.astype(v.dtype), v)
  return out.reshape(q.shape).astype(q.dtype)


def attention_weights(
  q: Float[Array, "B L H h"],
  k: Float[Array, "B S K h"],
  *,
  causal: bool,
  key_valid: Bool[Array, "B S"] | None = None,
  offset: int = 0,
) -> Float[Array, "B K G L S"]:
  """The softmax weights themselves, float32[B, K, H // K, L, S]; row i is slot i + offset of the sequence."""
  B, L, H, h = q.shape
  S, K = k.shape[1:3]
  q = q.reshape(B, L, K, H // K, h)
  scores = jnp.einsum("blkgh,bskh->bkgls", q, k, preferred_element_type=jnp.float32) * h**-0.5
  allowed = jnp.ones((1, 1, 1, 1, S), bool) if key_valid is None else key_valid[:, None, None, None, :]
  if causal:
    allowed = allowed & (jnp.arange(S) <= jnp.arange(L)[:, None] + offset)
  return jax.nn.softmax(jnp.where(allowed, scores, MASKED), axis=-1)
