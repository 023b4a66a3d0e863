"""A training step as pure functions, and the state they act on.

The frozen tower runs first, over all clips of a step (`encode_step`), wherever they will be needed;
`fill_step` brings what it gives to the rows of micro-batches. Then a step adds up the gradients of
its micro-batches (`grad_step`, one compilation per shape) and applies them once (`apply_step`). All
are functions of arrays alone, the same for every mesh and any number of processes.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.config import RunConfig, VLMConfig
from xcomp_jax.data.batch import Batch, Clips
from xcomp_jax.model import vlm
from xcomp_jax.parallel.mesh import (
  AXES,
  batch_devices,
  batch_sharding,
  clip_sharding,
  param_shardings,
  replicated,
  row_groups,
  visual_sharding,
)
from xcomp_jax.training import optim


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
  """Over the samples of a step so far; all float32. grads: like the trained parameters; the others
  are scalars.
  """

  grads: Any
  loss: Any
  samples: Any
  frames: Any


def abstract_state(
  config: RunConfig, cfg: VLMConfig, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
  """The model's graph and its TrainState as ShapeDtypeStructs with dtypes and shardings; allocates
  nothing.

  Trained parameters and optimizer state have `model.param_dtype`, frozen ones the compute dtype.
  """
  model = loading.abstract(cfg)
  graph, trained, frozen = nnx.split(model, optim.trained_parts(config.train), ...)

  def cast(state, dtype):
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, np.dtype(dtype)), state)

  trained, frozen = cast(trained, config.model.param_dtype), cast(frozen, config.model.dtype)
  state = TrainState(trained, frozen, jax.eval_shape(tx.init, trained))

  return graph, jax.tree.map(
    lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding),
    state,
    param_shardings(state, mesh),
  )


def init_state(
  config: RunConfig, cfg: VLMConfig, tx: optax.GradientTransformation, like: TrainState
) -> TrainState:
  """The state of step 0: `init_from`'s parameters, read straight into their shards, and fresh
  optimizer state. like: of `abstract_state`.

  Raises:
    CheckpointError: see `loading.load_model`.
  """
  shardings = jax.tree.map(lambda p: p.sharding, like)
  leaves = loading.parameters(nnx.merge_state(like.trained, like.frozen))
  model = loading.load_model(
    resolve(config.init_from),
    cfg,
    shardings=nnx.merge_state(shardings.trained, shardings.frozen),
    dtype=lambda path: leaves[path].dtype,
  )
  _, trained, frozen = nnx.split(model, optim.trained_parts(config.train), ...)
  opt = jax.jit(tx.init, out_shardings=shardings.opt)(trained)
  return TrainState(trained, frozen, opt)


def zero_sums(trained: nnx.State, mesh: Mesh) -> Sums:
  """Sums of nothing, sharded as the parameters."""

  def zeros():
    return Sums(
      jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trained),
      *jnp.zeros((3,), jnp.float32),
    )

  return jax.jit(zeros, out_shardings=param_shardings(jax.eval_shape(zeros), mesh))()


def encode_step(
  graph: nnx.GraphDef, cfg: VLMConfig, mesh: Mesh, tower: nnx.State, frames: jax.Array
) -> jax.Array:
  """Gives the merged tokens [K, N, D] of clips uint8[K, F, S, S, 3], which are split evenly over
  all devices.

  graph, tower: the tower alone, on every device; so none waits for another.
  """
  return vlm.tower_apart(graph, tower, cfg, frames, mesh)


def fill_step(mesh: Mesh, visual: jax.Array, features: jax.Array, place: jax.Array) -> jax.Array:
  """Puts merged clips where they belong in a micro-batch's rows, as `vlm.fill`; every device takes
  what it has rows for.

  visual: [B, T, n, D], split as `visual_sharding`. features: [K, N, D] of `encode_step`. place:
  int32[K, 2], in the rows of all.
  """
  spec = visual_sharding(mesh, visual.shape).spec

  def one(visual, features, place):
    features = jax.lax.all_gather(features, AXES, tiled=True)
    first = [
      jax.lax.axis_index(axis) * size if axis else 0 for axis, size in zip(spec, visual.shape)
    ]
    return vlm.fill(visual, features, place - jnp.array(first[:2]))

  specs = spec, PartitionSpec(AXES), PartitionSpec()
  return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(
    visual, features, place
  )


def grad_step(
  graph: nnx.GraphDef,
  state: TrainState,
  sums: Sums,
  batch: Batch,
  clips: tuple[Clips, ...],
  projector_max_frames: int | None,
) -> tuple[Sums, jax.Array]:
  """Adds a micro-batch's gradients and losses.

  Losses are summed over samples, each the mean over its supervised tokens, so that after any cut
  into micro-batches `apply_step` has the loss and gradient of the ungrouped batch. clips: of a
  tower that is trained; else none.

  Returns:
    the new sums, and the samples' losses float32[B, M].
  """

  def total(trained):
    model = nnx.merge(graph, trained, state.frozen)
    losses = vlm.loss(
      model, vlm.seen(model, batch, clips), projector_max_frames=projector_max_frames
    )
    return jnp.sum(losses * batch.weight), losses

  (loss, losses), grads = jax.value_and_grad(total, has_aux=True)(state.trained)
  sums = Sums(
    jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums.grads, grads),
    sums.loss + loss,
    sums.samples + batch.weight.sum(),
    sums.frames + jnp.sum(batch.frames * batch.weight),
  )
  return sums, losses


def apply_step(
  tx: optax.GradientTransformation, state: TrainState, sums: Sums
) -> tuple[TrainState, Sums, dict[str, jax.Array]]:
  """One optimizer step on the mean over the summed samples; if that or the step is not finite, the
  state stays.

  Returns:
    the new state, sums of nothing, and scalars: loss, grad_norm (before clipping), update_norm,
    samples, frames, finite.
  """
  grads = jax.tree.map(lambda g: g / sums.samples, sums.grads)
  norm, loss = optax.tree.norm(grads), sums.loss / sums.samples
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.trained)
  updates, opt = tx.update(grads, state.opt, state.trained)
  change = optax.tree.norm(updates)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(change)

  def kept(new, old):
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  trained = kept(optax.apply_updates(state.trained, updates), state.trained)
  new = TrainState(trained, state.frozen, kept(opt, state.opt))
  out = {
    "loss": loss,
    "grad_norm": norm,
    "update_norm": change,
    "samples": sums.samples,
    "frames": sums.frames,
    "finite": finite,
  }
  return new, jax.tree.map(jnp.zeros_like, sums), out


def eval_step(graph: nnx.GraphDef, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
  """Sums over a batch's samples: loss, correct (vlm.evaluate), samples."""
  losses, correct = vlm.heldout_measures(nnx.merge(graph, state.trained, state.frozen), batch)
  return {
    "loss": jnp.sum(losses * batch.weight),
    "correct": jnp.sum(correct * batch.weight),
    "samples": batch.weight.sum(),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
  """The functions above, compiled for a mesh: fill, grad and apply reuse the memory of what they
  replace.

  tower: (state) -> the tower's parameters on every device. room: (rows, frames) -> the visual
  tokens of a micro-batch, all zeros.
  encode: (tower, frames). fill: (visual, features, place). grad, apply and evaluate: as the
  functions.
  """

  tower: Callable
  room: Callable
  encode: Any
  fill: Any
  grad: Any
  apply: Any
  evaluate: Any


def compiled_steps(cfg: VLMConfig, state: TrainState, sums: Sums, mesh: Mesh) -> Steps:
  """`Steps` for a state and sums with these shapes, arrays or ShapeDtypeStructs."""
  one, every = replicated(mesh), clip_sharding(mesh)
  state_at, sums_at = param_shardings(state, mesh), param_shardings(sums, mesh)
  graph = nnx.graphdef(loading.abstract(cfg).vision)

  def tower(state):
    part = state.frozen if "vision" in state.frozen else state.trained
    return jax.device_put(part["vision"], one)

  @functools.cache
  def room(rows, frames):
    shape = rows, frames, cfg.tokens_per_frame, cfg.vision.width
    return jax.jit(lambda: jnp.zeros(shape, cfg.dtype), out_shardings=visual_sharding(mesh, shape))

  return Steps(
    tower=tower,
    room=lambda rows, frames: room(rows, frames)(),
    encode=jax.jit(functools.partial(encode_step, graph, cfg, mesh), out_shardings=every),
    fill=jax.jit(functools.partial(fill_step, mesh), donate_argnums=0),
    grad=jax.jit(
      grad_step,
      static_argnames=("graph", "projector_max_frames"),
      donate_argnames="sums",
      out_shardings=(sums_at, None),
    ),
    apply=jax.jit(
      apply_step,
      static_argnames="tx",
      donate_argnames=("state", "sums"),
      out_shardings=(state_at, sums_at, one),
    ),
    evaluate=jax.jit(eval_step, static_argnames="graph", out_shardings=one),
  )


def row_share(mesh: Mesh) -> tuple[tuple[int, ...], int]:
  """Gives the row groups that this process's devices hold, ascending, and how many there are;
  errors as `mesh.row_groups`.
  """
  return row_groups(mesh)[jax.process_index()], batch_devices(mesh)


def clip_share(mesh: Mesh) -> list[int]:
  """Which parts of a list of clips, of as many as there are devices, this process's devices take,
  ascending.
  """
  return [
    i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()
  ]


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
  """Where the arrays of a whole Batch or Clips (or their ShapeDtypeStructs) lie: the same of
  NamedShardings.
  """
  if isinstance(batch, Clips):
    return jax.tree.map(lambda x: visual_sharding(mesh, x.shape), batch)
  shardings = jax.tree.map(lambda _: batch_sharding(mesh), batch)
  if batch.visual is not None:
    shardings = dataclasses.replace(shardings, visual=visual_sharding(mesh, batch.visual.shape))
  return shardings


def place_rows(batch: Any, mesh: Mesh) -> Any:
  """The rows of a Batch or Clips that this process has (`row_share`), as global arrays."""
  held, groups = row_share(mesh)
  whole = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((len(x) // len(held) * groups, *x.shape[1:]), x.dtype), batch
  )
  return jax.tree.map(
    lambda x, sharding, spec: jax.make_array_from_process_local_data(sharding, x, spec.shape),
    batch,
    batch_shardings(whole, mesh),
    whole,
  )


def place_clips(frames: np.ndarray, mesh: Mesh) -> jax.Array:
  """The clips uint8[K, F, S, S, 3] that this process has (`clip_share`), as a global array."""
  parts = len(clip_share(mesh))
  shape = len(frames) // parts * mesh.size, *frames.shape[1:]
  return jax.make_array_from_process_local_data(clip_sharding(mesh), frames, shape)
