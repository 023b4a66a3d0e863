"""AdamW as the release trains: clipping, warm-up, cosine decay to zero; and which parameters are
trained.
"""

import math
from collections.abc import Callable

import jax
import optax

from xcomp_jax.config import OptimConfig, TrainConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
  """Learning rate at a step, counted from 0: rises linearly from 0, then falls as a cosine to 0 at
  `steps`.

  The warm-up is ceil(steps * warmup) steps, and the very first step has rate 0, as in the release
  (train.sh; its trainer's cosine schedule).
  """
  warm = math.ceil(steps * config.warmup)
  # optax wants a step of decay even where all are warm-up.
  return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warm, max(steps, warm + 1))


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW on `learning_rate`.

  Weight decay, 0 in the release, is decoupled and applies to kernels and the embedding table, not
  to biases and norms.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate(config, steps),
      config.b1,
      config.b2,
      config.eps,
      weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    ),
  )


def trained_parts(train: TrainConfig) -> Callable[..., bool]:
  """A filter for `nnx.split`: the parts of the model (vision, projector, llm) that the config
  trains.
  """
  return lambda path, _: getattr(train, path[0])
