"""Supervised compression tuning: from a config to checkpoints.

  python -m xcomp_jax.train --config=configs/sct.py --config.workdir=runs/sct --config.data.train=DIR

A step adds up the gradients of its micro-batches (`grad_step`, one compilation per bucket) and applies them once
(`apply_step`). The same command continues a run from its latest checkpoint, on as many or other devices and hosts;
SIGINT or SIGTERM saves and leaves.

Several folders, a quarter of the second in each epoch (any of them of frames, or all of features of this tower):

  --config.data.train="('data/a','data/b')" --config.data.weights="(1.0,0.25)"
"""

import contextlib
import dataclasses
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from xcomp_jax import checkpoint, encode, metrics, optim, weights
from xcomp_jax.config import ConfigError, RunConfig, VLMConfig, check, from_command_line, to_dict
from xcomp_jax.data import pipeline
from xcomp_jax.data.batch import Batch
from xcomp_jax.data.blend import Blend
from xcomp_jax.data.store import open_store
from xcomp_jax.files import command
from xcomp_jax.model import lp_comp, vlm
from xcomp_jax.sharding import (
  batch_devices,
  batch_sharding,
  make_mesh,
  param_shardings,
  parameter_table,
  path_name,
  replicated,
)


class NotFiniteError(ValueError):
  """A loss, gradient or update that is no number; the parameters are as they were before that step."""


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


def row_share(mesh: Mesh) -> tuple[int, int]:
  """(i, n): this process reads the i-th of n equal parts of every micro-batch's rows.

  Processes whose devices hold the same rows (a `tensor` axis over several) all read those.

  Raises:
    ConfigError: the rows of this process's devices are no such part.
  """
  rows = batch_devices(mesh)
  places = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  mine = sorted({row for (place,) in places for row in range(rows)[place]})
  if mine != list(range(mine[0], mine[0] + len(mine))) or rows % len(mine) or mine[0] % len(mine):
    raise ConfigError(
      f"mesh {dict(mesh.shape)}: the devices of process {jax.process_index()} hold rows {mine} of every {rows}, which is not "
      "one of several equal parts; choose config.mesh so that data x fsdp is a multiple of the processes"
    )
  return mine[0] // len(mine), rows // len(mine)


def place(batch: Batch, mesh: Mesh) -> Batch:
  """The rows that this process has, as global arrays."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def run(config: RunConfig) -> dict[str, float | int]:
  """Trains, from the latest checkpoint in the workdir if there is one.

  Returns:
    what the last line says: step, loss (mean over the steps done here, if any), and heldout_loss,
    heldout_accuracy if there are held-out data.

  Raises:
    ConfigError, StoreError, CheckpointError, ...: whatever can't work, before weights are read.
    NotFiniteError: a loss, gradient or update became inf or nan; workdir/nan/ says in which samples.
  """
  check(config)
  if config.compilation_cache is not None:
    jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
  mesh = make_mesh(config.mesh)
  directory = weights.resolve(config.init_from)
  cfg = weights.read_config(directory, config.model, config.lp_comp)
  schedule = lp_comp.counts(cfg.lp_comp, cfg.llm.layers)
  tokenizer = weights.read_tokenizer(directory, cfg)
  blend = open_data(config.data.train, cfg, config.data.weights)
  held = None if config.data.heldout is None else open_data(config.data.heldout, cfg)
  opened = [blend] if held is None else [blend, held]
  for data in opened:
    if data.features is not None and config.train.vision:
      raise ConfigError(
        f"config.train.vision = True, but {data.stores[0].path} holds features, which a tower that learns would not "
        "make again; set it to False, or train on frames"
      )
  description = checkpoint.describe(config, cfg, blend, held)
  checkpoint.agree(description)
  steps = config.train.epochs * pipeline.steps_per_epoch(blend.per_epoch, config.train.batch_size)
  steps = min(steps, config.train.steps or steps)
  share, shares = row_share(mesh)
  here = {"rows": batch_devices(mesh), "process_index": share, "process_count": shares}
  data = pipeline.batches(
    blend, tokenizer, config.data,
    batch_size=config.train.batch_size, seed=config.seed, epochs=config.train.epochs, **here,
  )
  heldout = None if held is None else pipeline.evaluation(held, tokenizer, config.data, **here)
  if not checkpoint.begun(config.workdir):
    weights.stored(directory, cfg)  # what is missing or broken is said before anything is written
  checkpoint.claim(config.workdir)

  tx = optim.optimizer(config.optim, steps)
  precision = "highest" if config.model.dtype == "float32" else None
  first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(data))
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(jax.default_matmul_precision(precision))
    checkpoints = stack.enter_context(contextlib.closing(checkpoint.manager(config.workdir, config.train)))
    graph, wanted = abstract_state(config, cfg, tx, mesh)
    start = checkpoints.latest_step()
    if start is None:
      state, start = init_state(config, cfg, tx, mesh), 0
    else:
      (trained, frozen), opt = checkpoint.restore(
        checkpoints, start, (wanted.trained, wanted.frozen), wanted.opt, data, description
      )
      state = TrainState(trained, frozen, opt)
    check_tower(nnx.merge(graph, state.trained, state.frozen), config.init_from, opened)
    sums = zero_sums(state.trained, mesh)
    step_functions = compiled_steps(state, sums, mesh)
    if first:
      print(f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
      for name, part in (("trained", state.trained), ("frozen", state.frozen)):
        print(f"{name} parameters\n{parameter_table(part, param_shardings(part, mesh))}")
      print(f"LP-Comp ({cfg.lp_comp.keep}): tokens per {cfg.lp_comp.group} in each layer {' '.join(map(str, schedule))}")
      print("\n".join(blend.made_with()))
      print(f"steps {start + 1} to {steps}, {config.train.batch_size} samples each", flush=True)
      (epath.Path(config.workdir) / "config.json").write_text(json.dumps(to_dict(config), indent=2))
    writer = stack.enter_context(
      contextlib.closing(metrics.Writer(epath.Path(config.workdir) / "tensorboard", purge_step=start))
    )
    compilations = stack.enter_context(metrics.Compilations("grad_step", "apply_step", "eval_step"))
    stopping = stack.enter_context(stop_signal())
    bar = stack.enter_context(tqdm(total=steps, initial=start, disable=None if first else True, unit="step"))
    say = bar.write if first else lambda _: None

    def evaluate() -> dict[str, float]:
      total = dict.fromkeys(("loss", "correct", "samples"), 0.0)
      for micro in heldout:
        out = step_functions.evaluate(graph, state, place(micro.batch, mesh))
        report_compilations(compilations, "eval_step", micro.batch, say)
        total = {key: total[key] + float(value) for key, value in out.items()}
      out = {"loss": total["loss"] / total["samples"], "accuracy": total["correct"] / total["samples"]}
      say(f"held-out after step {done}: loss {out['loss']:.4f}  accuracy {out['accuracy']:.1%} of {total['samples']:.0f}")
      writer.write(done, "heldout", out)
      return out

    rate = optim.schedule(config.optim, steps)
    clock, begun, done = metrics.Clock(), time.perf_counter(), start
    losses, evaluated = [], None  # of each step; (step, result)
    while done < steps and not stopping():
      seen = []
      last = False
      while not last:
        micro = clock.wait(data)
        if len(seen) > 1:  # one may compute while the next is copied; more would pile up in the device's memory
          jax.block_until_ready(seen[-2][1])
        batch = place(micro.batch, mesh)
        sums, sample_losses = step_functions.grad(
          graph, state, sums, batch, projector_max_frames=config.train.projector_max_frames
        )
        report_compilations(compilations, "grad_step", micro.batch, say)
        seen.append((batch.index, sample_losses))
        clock.flops += metrics.training_flops(cfg, config.train, micro.batch) * shares / jax.process_count()
        last = micro.last
      state, sums, out = step_functions.apply(tx, state, sums)
      report_compilations(compilations, "apply_step", None, say)
      out = {key: value.item() for key, value in jax.device_get(out).items()}
      if not out["finite"]:
        raise not_finite(config, done, out, seen, blend)
      done += 1
      losses.append(out["loss"])
      clock.samples += out["samples"]
      clock.frames += out["frames"]
      bar.update()
      if done % config.train.log_every == 0 or done == steps:
        recent = losses[-min(config.train.log_every, len(losses)) :]
        values = {
          "loss": float(np.mean(recent)), "lr": float(rate(done - 1)), "grad_norm": out["grad_norm"], **clock.report()
        }
        say(metrics.line(done, steps, values))
        writer.write(done, "train", values)
        clock.reset()
      if heldout is not None and (done % config.train.eval_every == 0 or done == steps):
        evaluated = (done, evaluate())
        clock.reset()
      if done % config.train.save_every == 0:
        save(checkpoints, done, state, data, description)
    stopped = done < steps
    save(checkpoints, done, state, data, description)
    if heldout is not None and not stopped and evaluated is None:  # nothing was left to do
      evaluated = (done, evaluate())
    seconds = time.perf_counter() - begun
    bar.close()
    checkpoints.wait_until_finished()
  result = {"step": done}
  if losses:
    result["loss"] = float(np.mean(losses))
  if evaluated:
    result |= {"heldout_loss": evaluated[1]["loss"], "heldout_accuracy": evaluated[1]["accuracy"]}
  if first:
    print(
      f"{'stopped by a signal' if stopped else 'done'}: step {done} of {steps}, {seconds:.0f} s, "
      + (f"mean loss {result['loss']:.4f}" if losses else "no step was left to do" if done == steps else "no step done")
      + (f", held-out loss {result['heldout_loss']:.4f}, accuracy {result['heldout_accuracy']:.1%}" if evaluated else "")
      + f"; checkpoint {checkpoint.folder(config.workdir) / str(done)}"
      + ("; the same command continues" if stopped else "")
    )
  return result


def save(checkpoints, step: int, state: TrainState, data: pipeline.Reader, description: dict) -> None:
  """Saves the state after `step` steps; see `checkpoint.save`."""
  checkpoint.save(checkpoints, step, (state.trained, state.frozen), state.opt, data, description)


def open_data(folders: str | tuple[str, ...], cfg: VLMConfig, weights: tuple[float, ...] | None = None) -> Blend:
  """Stores that the model can read; whether features are its own tower's only the weights can say (`check_tower`).

  Raises:
    StoreError: see `open_store`.
    ConfigError: frames have another size, clips another length, groups of LP-Comp don't fill a clip, or see `Blend`.
  """
  group = cfg.lp_comp.group
  stores = [open_store(folder) for folder in ((folders,) if isinstance(folders, str) else folders)]
  for store in stores:
    wanted = [(store, "image_size", cfg.vision.image_size), (store, "clip_frames", cfg.clip_frames)]
    if store.features is not None:
      wanted += [(store.features, "tokens_per_frame", cfg.tokens_per_frame), (store.features, "width", cfg.vision.width)]
    for has, name, value in wanted:
      if getattr(has, name) != value:
        raise ConfigError(
          f"{store.path} was written with {name} {getattr(has, name)}, but the model takes {value}; run predecode again"
        )
    for frames in sorted({sample.clip_frames for sample in store.samples if sample.frames}):
      if (tokens := frames * cfg.tokens_per_frame) % group:
        raise ConfigError(
          f"lp_comp.group = {group}: {store.path} has clips of {frames} frames, whose {tokens} tokens can't be cut "
          f"into groups of {group}"
        )
  return Blend(stores, weights)


def check_tower(model: vlm.VLM, name: str, data: Sequence[Blend]) -> None:
  """Makes sure that features are of this model's tower. Where several processes share it, all of them must call this.

  name: of the model, for the message.

  Raises:
    ConfigError: they are of other weights or settings.
  """
  stores = [store for blend in data for store in blend.stores if store.features is not None]
  identity = encode.tower_identity(model) if stores else None
  for store in stores:
    if store.features.identity != identity:
      raise ConfigError(
        f"{store.path} holds features by another tower: its identity is {store.features.identity}, that of the tower in "
        f"{name} {identity}. Make the features again with this checkpoint, or train on frames"
      )


@contextlib.contextmanager
def stop_signal() -> Iterator[Any]:
  """Gives a function that says whether any process was told to stop; a second signal acts at once."""
  got = []

  def note(number, _):
    got.append(number)
    signal.signal(number, old[number])

  old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

  def stopping() -> bool:
    if jax.process_count() == 1:
      return bool(got)
    return bool(multihost_utils.process_allgather(np.array(bool(got))).any())

  try:
    yield stopping
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def report_compilations(compilations: metrics.Compilations, name: str, batch: Batch | None, say) -> None:
  """Says what calling `name` just compiled, for which bucket, and whether that is more than the buckets explain."""
  shapes = compilations.seen[name]
  shapes.add(tuple(x.shape for x in jax.tree.leaves(batch)))
  for seconds in compilations.take(name):
    shape = "" if batch is None else f" for {metrics.shape_of(batch)}"
    say(f"compiled {name}{shape} in {seconds:.1f} s")
    if compilations.count[name] > len(shapes):
      say(
        f"warning: {name} was compiled {compilations.count[name]} times for {len(shapes)} batch shapes; "
        "something else changes from step to step"
      )


def not_finite(config: RunConfig, step: int, out: dict[str, Any], seen, data: Blend) -> NotFiniteError:
  """Writes workdir/nan/step_N.json, with every sample of the step and its loss; returns the error to raise."""
  gather = functools.partial(multihost_utils.process_allgather, tiled=True)
  samples = []
  for index, losses in seen:
    for i, loss in zip(gather(index).tolist(), gather(losses).tolist(), strict=True):
      if i >= 0:
        store, place = data.find(i)
        sample = store.samples[place]
        about = {"data": str(store.path), "index": place, "id": sample.id, "source": sample.source}
        samples.append({**about, "loss": _number(loss)})
  file = epath.Path(config.workdir) / "nan" / f"step_{step + 1}.json"
  if jax.process_index() == 0:
    file.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: _number(out[name]) for name in ("loss", "grad_norm", "update_norm")}
    file.write_text(json.dumps({"step": step + 1, **numbers, "samples": samples}, indent=2))
  return NotFiniteError(
    f"step {step + 1}: loss {out['loss']}, norm of the gradient {out['grad_norm']}, of the update {out['update_norm']}. "
    f"The step was not applied and nothing was saved after it; its samples and their losses are in {file}"
  )


def _number(value: float) -> float | str:
  return value if np.isfinite(value) else str(value)  # JSON has no nan


def main() -> None:
  """The command."""
  from absl import flags

  if {"-h", "--help"} & set(sys.argv):
    print(__doc__.strip())
    return
  flags.FLAGS.mark_as_parsed()  # Grain's readers look at absl flags
  with command():
    run(from_command_line(sys.argv))


if __name__ == "__main__":
  main()
