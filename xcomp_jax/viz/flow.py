"""What LP-Comp does inside the LLM, in numbers; `notebooks/inside.ipynb` draws them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from xcomp_jax.config import ConfigError
from xcomp_jax.data.batch import Batch
from xcomp_jax.model import lp_comp, vlm
from xcomp_jax.model.softmax import attention_weights


def attention_flow(model: vlm.VLM, batch: Batch) -> Float[Array, "B M 2 Q"]:
  """Where attention goes in every layer.

  All of a layer's attention weights exist at once, float32[B, H, S, S]: 0.06 GB for 64 frames at
  the 2B sizes.

  Args:
    model: the parameters. Its keep rule must be one that only selects.
    batch: features and text, of one sample a row.

  Returns:
    float32[B, M, 2, Q]: per layer, from the text after the frames (0) and from the visual tokens
    that stay to the last layer (1), the share of their attention that goes to the prefix, to each
    place of a group (0 where a layer has it no more), and to the text; mean over heads and rows. Q
    = 1 + group + 1, and the sum over it is 1.

  Raises:
    ValueError: several samples in a row.
    ConfigError: a keep rule under which a token has no place of its own.
  """
  cfg = model.cfg
  lp = cfg.lp_comp
  if not lp_comp.only_selects(lp):
    raise ConfigError(
      f'lp_comp.keep = "{lp.keep}": attention has places of a group to go to only where tokens are '
      f"selected",
      where="lp_comp.keep",
      value=lp.keep,
    )
  if batch.frames.shape[1] > 1:
    raise ValueError(
      "several samples in a row: what attention gives to each of them would be one number"
    )
  P, L = batch.prefix.shape[2], batch.text.shape[1]
  lengths, kept = vlm.lengths(model, batch), lp_comp.survivors(lp, cfg.llm.layers)
  out = []
  for layer, x, places in zip(
    model.llm.layers, vlm.forward(model, batch, entering=True).entering, kept, strict=True
  ):
    groups = (x.shape[1] - P - L) // len(places)
    at = lengths.places(P, groups, L, len(places))
    q, k, _ = layer.project(x)
    q, k = layer.rotate(q, at.position), layer.rotate(k, at.position)
    weights = attention_weights(q, k, causal=True, key_valid=at.valid)
    slots = np.concatenate(
      [np.zeros(P, int), np.tile(np.array(places) + 1, groups), np.full(L, lp.group + 1)]
    )
    rows = np.stack([slots == lp.group + 1, np.isin(slots, np.array(kept[-1]) + 1)])
    rows = (at.valid[:, None] & rows).astype(jnp.float32)  # [B, 2, S]
    rows = rows / jnp.maximum(rows.sum(-1, keepdims=True), 1)
    to = jax.nn.one_hot(slots, lp.group + 2)
    out.append(jnp.einsum("bkgls,brl,sq->brq", weights, rows, to) / q.shape[2])
  return jnp.stack(out, axis=1)


def agreement(
  logits: Float[Array, "B V"], reference: Float[Array, "B V"]
) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
  """How near logits are to others: bool[B], the most probable token is the same; float32[B],
  KL(reference || logits) in nats.
  """
  ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
  return (
    jnp.argmax(logits, -1) == jnp.argmax(reference, -1),
    (jnp.exp(theirs) * (theirs - ours)).sum(-1),
  )
