"""Supervised compression tuning: from a config to checkpoints.

  python -m xcomp_jax.train --config=configs/sct.py --config.workdir=runs/sct --config.data.train=DIR

A step adds up the gradients of its micro-batches (`grad_step`, one compilation per bucket) and applies them once
(`apply_step`). The same command continues a run from its latest checkpoint, on as many or other devices and hosts;
SIGINT or SIGTERM saves and leaves.

Several folders, a quarter of the second in each epoch (any of them of frames, or all of features of this tower):

  --config.data.train="('data/a','data/b')" --config.data.weights="(1.0,0.25)"
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from xcomp_jax import checkpoint, encode, hosts, metrics, optim, weights, workdir
from xcomp_jax.config import ConfigError, RunConfig, VLMConfig, check, from_command_line, to_dict
from xcomp_jax.data import pipeline
from xcomp_jax.data.batch import Batch
from xcomp_jax.data.blend import Blend
from xcomp_jax.data.store import Features, Store, open_store
from xcomp_jax.files import command, keep_compiled
from xcomp_jax.model import kernels, lp_comp, vlm
from xcomp_jax.sharding import (
  batch_devices,
  check_mesh,
  make_mesh,
  param_shardings,
  parameter_table,
  sequence_parts,
)
from xcomp_jax.steps import (
  TrainState,
  abstract_state,
  compiled_steps,
  init_state,
  place,
  row_share,
  zero_sums,
)


class NotFiniteError(ValueError):
  """A loss, gradient or update that is no number; the parameters are as they were before that step."""


class Prepared(NamedTuple):
  """What a run is of, before any weight is read."""

  cfg: VLMConfig
  mesh: Mesh
  opened: list[Blend]  # what it trains on, and if there are, held-out data
  data: pipeline.Reader
  heldout: Any  # its micro-batches, or None
  steps: int
  description: dict  # of `checkpoint.describe`


Watch = Callable[[int, str, Mapping[str, float]], None]  # (step, group, values)


def run(config: RunConfig, watch: Watch = lambda step, group, values: None) -> dict[str, float | int]:
  """Trains, from the latest checkpoint in the workdir if there is one, together with the other processes of the run.

  Args:
    config: of the run.
    watch: called with what goes to TensorBoard, as it comes: "train" and "goodput" every `log_every` steps, "heldout".

  Returns:
    what the last line says: step, steps (of the whole run), loss (mean over the steps done here, if any), and
    heldout_loss, heldout_accuracy if there are held-out data.

  Raises:
    ConfigError, StoreError, CheckpointError, ...: whatever can't work, before weights are read.
    SaveError: a checkpoint could not be saved; the last one is good.
    NotFiniteError: a loss, gradient or update became inf or nan; workdir/nan/ says in which samples.
  """
  with metrics.Goodput() as goodput, contextlib.ExitStack() as stack:
    check(config)
    with goodput.part("connect"):
      stack.enter_context(hosts.joined(config.distributed))
    prepared = prepare(config)
    stack.enter_context(workdir.held(config.workdir))
    return _train(config, prepared, goodput, watch)


def run_whole(config: RunConfig) -> None:
  """`run` for a program that goes on with what was trained.

  Raises:
    KeyboardInterrupt: a signal stopped it, after saving; the same call continues.
  """
  result = run(config)
  if result["step"] < result["steps"]:
    raise KeyboardInterrupt


def prepare(config: RunConfig) -> Prepared:
  """Reads what a config names, and makes sure that it goes together and that the workdir can be written."""
  keep_compiled(config.compilation_cache)
  kernels.check(config.model.attention, config.model.dtype)
  directory = weights.resolve(config.init_from)
  cfg = weights.read_config(directory, config.model, config.lp_comp)
  lp_comp.counts(cfg.lp_comp, cfg.llm.layers)  # refuses schedules that can't be
  mesh = make_mesh(config.mesh, batch_size=config.train.batch_size, sequence=sequence_parts(cfg, config.data))
  check_mesh(mesh, cfg, config.data)
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
  workdir.claim(config.workdir)
  return Prepared(cfg, mesh, opened, data, heldout, steps, description)


def _train(config: RunConfig, prepared: Prepared, goodput: metrics.Goodput, watch: Watch) -> dict[str, float | int]:
  cfg, mesh, opened, data, heldout, steps, description = prepared
  tx = optim.optimizer(config.optim, steps)
  precision = "highest" if config.model.dtype == "float32" else None
  first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(data))
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(jax.default_matmul_precision(precision))
    checkpoints = stack.enter_context(checkpoint.closing(checkpoint.manager(config.workdir, config.train)))
    graph, wanted = abstract_state(config, cfg, tx, mesh)
    with goodput.part("restore"):
      found = checkpoint.restore(
        checkpoints, (wanted.trained, wanted.frozen), wanted.opt, data, description, print if first else lambda _: None
      )
    if found is None:
      start, state = 0, init_state(config, cfg, tx, mesh)
    else:
      start, (trained, frozen), opt = found
      state = TrainState(trained, frozen, opt)
    owed = found is not None and checkpoint.evaluation_due(config.workdir, start)
    check_tower(nnx.merge(graph, state.trained, state.frozen), config.init_from, opened)
    sums = zero_sums(state.trained, mesh)
    step_functions = compiled_steps(state, sums, mesh)
    if first:
      introduce(config, prepared, state, start)
    writer = stack.enter_context(
      contextlib.closing(metrics.Writer(epath.Path(config.workdir) / "tensorboard", purge_step=start))
    )
    compilations = stack.enter_context(metrics.Compilations("grad_step", "apply_step", "eval_step"))
    stopping = stack.enter_context(hosts.stop_signal())
    bar = stack.enter_context(tqdm(total=steps, initial=start, disable=None if first else True, unit="step"))
    say = bar.write if first else lambda _: None

    def tell(step: int, group: str, values: Mapping[str, float]) -> None:
      writer.write(step, group, values)
      watch(step, group, values)

    compiled = lambda name, batch: report_compilations(compilations, name, batch, say)
    evaluates = lambda: heldout is not None and (done % config.train.eval_every == 0 or done == steps)

    def evaluate() -> dict[str, float] | None:
      total = dict.fromkeys(("loss", "correct", "samples"), 0.0)
      with contextlib.closing(iter(heldout)) as entries:
        while not stopping():
          if (micro := next(entries, None)) is None:
            out = {"loss": total["loss"] / total["samples"], "accuracy": total["correct"] / total["samples"]}
            samples = f"{out['accuracy']:.1%} of {total['samples']:.0f}"
            say(f"held-out after step {done}: loss {out['loss']:.4f}  accuracy {samples}")
            tell(done, "heldout", out)
            return out
          out = step_functions.evaluate(graph, state, place(micro.batch, mesh))
          compiled("eval_step", micro.batch)
          total = {key: total[key] + float(value) for key, value in out.items()}
      say(f"the evaluation after step {done} is left to the run that continues this one")
      return None

    def save() -> None:
      about = description | ({"evaluation_due": True} if owed else {})
      with goodput.part("save"):
        checkpoint.save(checkpoints, done, (state.trained, state.frozen), state.opt, data, about)

    rate = optim.schedule(config.optim, steps)
    mine = row_share(mesh)[1] / jax.process_count()  # this process's part of the work on the rows that it reads
    clock, done = metrics.Clock(), start
    losses, evaluated = [], None  # of each step; the last evaluation, None if it was not done or dropped
    owed = evaluates() and (owed or done == steps)  # stopped within an evaluation, or nothing else is left to do
    if owed:
      with goodput.part("evaluate"):
        evaluated = evaluate()
      owed = evaluated is None
      clock.reset()
    goodput.enter("step")
    while done < steps and not stopping():
      seen = []
      last = False
      while not last:
        with goodput.part("data"):
          micro = clock.wait(data)
        if len(seen) > 1:  # one may compute while the next is copied; more would pile up in the device's memory
          jax.block_until_ready(seen[-2][1])
        batch = place(micro.batch, mesh)
        sums, sample_losses = step_functions.grad(
          graph, state, sums, batch, projector_max_frames=config.train.projector_max_frames
        )
        compiled("grad_step", micro.batch)
        seen.append((batch.index, sample_losses))
        clock.flops += metrics.training_flops(cfg, config.train, micro.batch) * mine
        last = micro.last
      state, sums, out = step_functions.apply(tx, state, sums)
      compiled("apply_step", None)
      out = {key: value.item() for key, value in jax.device_get(out).items()}
      if not out["finite"]:
        raise not_finite(config, done, out, seen, opened[0])
      done += 1
      losses.append(out["loss"])
      clock.samples += out["samples"]
      clock.frames += out["frames"]
      bar.update()
      if done % config.train.log_every == 0 or done == steps:
        recent = losses[-min(config.train.log_every, len(losses)) :]
        values = {
          "loss": float(np.mean(recent)), "lr": np.asarray(rate(done - 1)).item(), "grad_norm": out["grad_norm"], **clock.report()
        }
        say(metrics.line(done, steps, values))
        tell(done, "train", values)
        tell(done, "goodput", goodput.shares())
        clock.reset()
      if evaluates():
        with goodput.part("evaluate"):
          evaluated = evaluate()
        owed = evaluated is None  # what was done of it is dropped
        clock.reset()
      with checkpoint.saving(checkpoints):
        checkpoints.check_for_errors()  # of a save in the background
      if done % config.train.save_every == 0:
        save()
    goodput.enter("save")
    stopped = done < steps or owed
    save()
    bar.close()
    checkpoint.finish(checkpoints)
  result = {"step": done, "steps": steps}
  if losses:
    result["loss"] = float(np.mean(losses))
  if evaluated:
    result |= {"heldout_loss": evaluated["loss"], "heldout_accuracy": evaluated["accuracy"]}
  if first:
    print(goodput.line())
    print(
      f"{'stopped by a signal' if stopped else 'done'}: step {done} of {steps}, "
      + (f"mean loss {result['loss']:.4f}" if losses else "no step was left to do" if done == steps else "no step done")
      + (f", held-out loss {result['heldout_loss']:.4f}, accuracy {result['heldout_accuracy']:.1%}" if evaluated else "")
      + f"; checkpoint {checkpoint.folder(config.workdir) / str(done)}"
      + ("; the same command continues" if stopped else ""), flush=True,
    )
  return result


def introduce(config: RunConfig, prepared: Prepared, state: TrainState, start: int) -> None:
  """Says what is about to run, where every parameter lies, and writes the resolved config."""
  cfg, mesh = prepared.cfg, prepared.mesh
  print(f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
  print(kernels.describe(cfg, gradient=True))
  if (size := config.train.batch_size) % (rows := batch_devices(mesh)):
    print(f"note: {size} samples of a step over data x fsdp = {rows} parts: some of them have only padding")
  table = lambda part: parameter_table(part, param_shardings(part, mesh))
  print(f"trained parameters\n{table(state.trained)}\nfrozen parameters\n{table(state.frozen)}")
  print(f"optimizer state, split as the trained parameters: {table(state.opt).splitlines()[-1].split()[-1]} MiB per device")
  schedule = lp_comp.counts(cfg.lp_comp, cfg.llm.layers)
  print(f"LP-Comp ({cfg.lp_comp.keep}): tokens per {cfg.lp_comp.group} in each layer {' '.join(map(str, schedule))}")
  print("\n".join(prepared.opened[0].made_with()))
  todo = f"steps {start + 1} to {prepared.steps}, {config.train.batch_size} samples each"
  print(todo if start < prepared.steps else f"all {prepared.steps} steps are done", flush=True)
  (epath.Path(config.workdir) / "config.json").write_text(json.dumps(to_dict(config), indent=2))


def open_data(folders: str | tuple[str, ...], cfg: VLMConfig, weights: tuple[float, ...] | None = None) -> Blend:
  """Stores that the model can read; whether features are its own tower's only the weights can say (`check_tower`).

  Raises:
    StoreError: see `open_store`.
    ConfigError: frames have another size, clips another length, groups of LP-Comp don't fill a clip, or see `Blend`.
  """
  group = cfg.lp_comp.group
  stores = [open_store(folder) for folder in ((folders,) if isinstance(folders, str) else folders)]
  for store in stores:
    wanted: list[tuple[Store | Features, str, int]] = [
      (store, "image_size", cfg.vision.image_size), (store, "clip_frames", cfg.clip_frames)
    ]  # fmt: skip
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
  made = [(store.path, store.features.identity) for blend in data for store in blend.stores if store.features is not None]
  identity = encode.tower_identity(model) if made else None
  for path, other in made:
    if other != identity:
      raise ConfigError(
        f"{path} holds features by another tower: its identity is {other}, that of the tower in "
        f"{name} {identity}. Make the features again with this checkpoint, or train on frames"
      )


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
  try:
    with command():
      run(from_command_line(sys.argv))
  except BaseException as error:
    if isinstance(error, SystemExit) and not error.code:
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # At exit JAX would wait for the other processes, and Orbax for the threads of a save that failed.
    os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


if __name__ == "__main__":
  main()
