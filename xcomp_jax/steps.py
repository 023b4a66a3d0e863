"""A training step as pure functions, and the state they act on.

A step adds up the gradients of its micro-batches (`grad_step`, one compilation per bucket) and applies them once
(`apply_step`); both are functions of arrays alone, the same for every mesh and any number of processes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from xcomp_jax import metrics, optim, weights
from xcomp_jax.config import ConfigError, RunConfig, VLMConfig
from xcomp_jax.data.batch import Batch
from xcomp_jax.model import vlm
from xcomp_jax.sharding import (
  batch_devices,
  batch_sharding,
  param_shardings,
  path_name,
  replicated,
  visual_sharding,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """trained, frozen: `nnx.State`s of parameters. opt: optimizer state.

  Leaves are arrays, ShapeDtypeStructs or shardings, as in `Sums`.
  """

  trained: Any
  frozen: Any
  opt: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
  """Over the samples of a step so far; all float32. grads: like the trained parameters; the others are scalars."""

  grads: Any
  loss: Any
  samples: Any
  frames: Any


def abstract_state(
  config: RunConfig, cfg: VLMConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
  """The model's graph and its TrainState as ShapeDtypeStructs with dtypes and shardings; allocates nothing.

  Trained parameters and optimizer state have `model.param_dtype`, frozen ones the compute dtype.
  """
  model = weights.abstract(cfg)
  graph, trained, frozen = nnx.split(model, optim.trained(config.train), ...)
  cast = lambda state, dtype: jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, np.dtype(dtype)), state)
  trained, frozen = cast(trained, config.model.param_dtype), cast(frozen, config.model.dtype)
  state = TrainState(trained, frozen, jax.eval_shape(tx.init, trained))
  placed = lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding)
  return graph, jax.tree.map(placed, state, param_shardings(state, mesh))


def init_state(config: RunConfig, cfg: VLMConfig, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
  """The state of step 0: `init_from`'s parameters, read straight into their shards, and fresh optimizer state.

  Raises:
    CheckpointError: see `weights.load`.
  """
  _, wanted = abstract_state(config, cfg, tx, mesh)
  shardings = param_shardings(wanted, mesh)
  leaves = jax.tree_util.tree_leaves_with_path((wanted.trained, wanted.frozen))
  dtypes = {path_name(path[1:]): leaf.dtype for path, leaf in leaves}
  model = weights.load(
    weights.resolve(config.init_from), cfg,
    shardings=nnx.merge_state(shardings.trained, shardings.frozen), dtype=dtypes.__getitem__,
  )
  _, trained, frozen = nnx.split(model, optim.trained(config.train), ...)
  opt = jax.jit(tx.init, out_shardings=shardings.opt)(trained)
  return TrainState(trained, frozen, opt)


def zero_sums(trained: nnx.State, mesh: Mesh) -> Sums:
  """Sums of nothing, sharded as the parameters."""

  def zeros():
    grads = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained)
    return Sums(grads, *jnp.zeros((3,), jnp.float32))

  return jax.jit(zeros, out_shardings=param_shardings(jax.eval_shape(zeros), mesh))()


def grad_step(
  graph: nnx.GraphDef, state: TrainState, sums: Sums, batch: Batch, projector_max_frames: int | None
) -> tuple[Sums, jax.Array]:
  """Adds a micro-batch's gradients and losses.

  Losses are summed over samples, each the mean over its supervised tokens, so that after any cut into
  micro-batches `apply_step` has the loss and gradient of the ungrouped batch.

  Returns:
    the new sums, and the samples' losses float32[B].
  """

  def total(trained):
    model = nnx.merge(graph, trained, state.frozen)
    losses = vlm.loss(model, batch, projector_max_frames=projector_max_frames)
    return jnp.sum(losses * batch.weight), (losses, metrics.count_frames(model.cfg, batch))

  (loss, (losses, frames)), grads = jax.value_and_grad(total, has_aux=True)(state.trained)
  sums = Sums(
    jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums.grads, grads),
    sums.loss + loss,
    sums.samples + batch.weight.sum(),
    sums.frames + frames,
  )
  return sums, losses


def apply_step(
  tx: optax.GradientTransformation, state: TrainState, sums: Sums
) -> tuple[TrainState, Sums, dict[str, jax.Array]]:
  """One optimizer step on the mean over the summed samples; if that or the step is not finite, the state stays.

  Returns:
    the new state, sums of nothing, and scalars: loss, grad_norm (before clipping), update_norm, samples, frames,
    finite.
  """
  grads = jax.tree.map(lambda g: g / sums.samples, sums.grads)
  norm, loss = optax.tree.norm(grads), sums.loss / sums.samples
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.trained)
  updates, opt = tx.update(grads, state.opt, state.trained)
  change = optax.tree.norm(updates)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(change)
  kept = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
  trained = kept(optax.apply_updates(state.trained, updates), state.trained)
  new = TrainState(trained, state.frozen, kept(opt, state.opt))
  out = {"loss": loss, "grad_norm": norm, "update_norm": change, "finite": finite}
  out |= {"samples": sums.samples, "frames": sums.frames}
  return new, jax.tree.map(jnp.zeros_like, sums), out


def eval_step(graph: nnx.GraphDef, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
  """Sums over a batch's samples: loss, correct (vlm.evaluate), samples."""
  losses, correct = vlm.evaluate(nnx.merge(graph, state.trained, state.frozen), batch)
  total = lambda x: jnp.sum(x * batch.weight)
  return {"loss": total(losses), "correct": total(correct), "samples": batch.weight.sum()}


def abstract_step(config: RunConfig, cfg: VLMConfig, batch: Batch) -> tuple[Callable, tuple]:
  """A function and the ShapeDtypeStructs to trace it with: `grad_step` on a `batch_spec`. Nothing is allocated or run."""
  graph, trained, frozen = nnx.split(weights.abstract(cfg), optim.trained(config.train), ...)
  cast = lambda tree, dtype: jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, np.dtype(dtype)), tree)
  state = TrainState(cast(trained, config.model.param_dtype), cast(frozen, config.model.dtype), None)
  scalar = jax.ShapeDtypeStruct((), np.float32)
  sums = Sums(cast(trained, np.float32), scalar, scalar, scalar)

  def step(state, sums, batch):
    return grad_step(graph, state, sums, batch, config.train.projector_max_frames)

  return step, (state, sums, batch)


@dataclasses.dataclass(frozen=True)
class Steps:
  """The three functions above, compiled for a mesh: grad and apply reuse the memory of what they replace."""

  grad: Any
  apply: Any
  evaluate: Any


def compiled_steps(state: TrainState, sums: Sums, mesh: Mesh) -> Steps:
  """`Steps` for a state and sums with these shapes, arrays or ShapeDtypeStructs."""
  one = replicated(mesh)
  state_at, sums_at = param_shardings(state, mesh), param_shardings(sums, mesh)
  return Steps(
    grad=jax.jit(
      grad_step, static_argnames=("graph", "projector_max_frames"), donate_argnames="sums", out_shardings=(sums_at, None)
    ),
    apply=jax.jit(
      apply_step, static_argnames="tx", donate_argnames=("state", "sums"), out_shardings=(state_at, sums_at, one)
    ),
    evaluate=jax.jit(eval_step, static_argnames="graph", out_shardings=one),
  )


def row_shares(mesh: Mesh) -> dict[int, tuple[int, int]]:
  """{process: (i, n)}: that process reads the i-th of n equal parts of every micro-batch's rows.

  Its devices may hold any rows, as they lie on the torus: the rows of a global batch are in another order than those that were
  read. Processes whose devices hold the same rows (a `tensor` axis over several) all read those.

  Raises:
    ConfigError: the rows of the processes are no such parts.
  """
  rows = batch_devices(mesh)
  held: dict[int, set[int]] = {}
  for device, index in batch_sharding(mesh).devices_indices_map((rows,)).items():
    held.setdefault(device.process_index, set()).update(range(rows)[index[0]])
  shares = sorted({tuple(sorted(some)) for some in held.values()})
  if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != rows:
    each = "; ".join(f"{process} {sorted(some)}" for process, some in sorted(held.items()))
    raise ConfigError(
      f"mesh {dict(mesh.shape)}: the devices of the processes hold rows that are neither apart nor the same, of every {rows} "
      f"(process: rows) {each}; choose config.mesh so that data x fsdp is a multiple of the processes"
    )
  return {process: (shares.index(tuple(sorted(some))), len(shares)) for process, some in held.items()}


def row_share(mesh: Mesh) -> tuple[int, int]:
  """That of `row_shares` for this process; errors likewise."""
  return row_shares(mesh)[jax.process_index()]


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
  """Where the arrays of a whole batch (or its ShapeDtypeStructs) lie: a Batch of NamedShardings."""
  shardings = jax.tree.map(lambda _: batch_sharding(mesh), batch)
  return dataclasses.replace(shardings, visual=visual_sharding(mesh, batch.visual.shape))


def place(batch: Batch, mesh: Mesh) -> Batch:
  """The rows that this process has (`row_share`), as global arrays."""
  _, shares = row_share(mesh)
  whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * shares, *x.shape[1:]), x.dtype), batch)
  put = lambda x, sharding, spec: jax.make_array_from_process_local_data(sharding, x, spec.shape)
  return jax.tree.map(put, batch, batch_shardings(whole, mesh), whole)
