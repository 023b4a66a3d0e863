"""The gradient step of a run, to be traced: nothing is allocated."""

import jax
import numpy as np
from flax import nnx

from xcomp_jax.checkpoints import loading
from xcomp_jax.training import optim, steps


def abstract_step(config, cfg, batch):
  """A function and the ShapeDtypeStructs to trace it with: `grad_step` on a `batch_spec`. Nothing
  is allocated or run.
  """
  graph, trained, frozen = nnx.split(loading.abstract(cfg), optim.trained_parts(config.train), ...)

  def cast(tree, dtype):
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, np.dtype(dtype)), tree)

  state = steps.TrainState(
    cast(trained, config.model.param_dtype), cast(frozen, config.model.dtype), None
  )
  scalar = jax.ShapeDtypeStruct((), np.float32)
  sums = steps.Sums(cast(trained, np.float32), scalar, scalar, scalar)

  def step(state, sums, batch):
    return steps.grad_step(graph, state, sums, batch, (), config.train.projector_max_frames)

  return step, (state, sums, batch)
