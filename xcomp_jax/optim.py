"""AdamW as the release trains: clipping, warm-up, cosine decay to zero; and which parameters are trained."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from xcomp_jax.config import OptimConfig, TrainConfig


def schedule(config: OptimConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
  """Learning rate at a step, counted from 0: rises linearly from 0, then falls as a cosine to 0 at `steps`.

  The warm-up is ceil(steps * warmup) steps, and the very first step has rate 0, as in the release (train.sh; its
  trainer's cosine schedule).
  """
  warm = math.ceil(steps * config.warmup)

  def rate(step):
    rising = step / max(1, warm)
    falling = 0.5 * (1 + jnp.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return config.learning_rate * jnp.where(step < warm, rising, jnp.where(step < steps, falling, 0.0))

  return rate


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW on `schedule`.

  Weight decay, 0 in the release, is decoupled and applies to kernels and the embedding table, not to biases and
  norms.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule(config, steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ),
  )  # fmt: skip


def trained(train: TrainConfig) -> Callable[..., bool]:
  """A filter for `nnx.split`: the parts of the model (vision, projector, llm) that the config trains."""
  parts = {"vision": train.vision, "projector": train.projector, "llm": train.llm}
  return lambda path, _: parts[path[0]]
