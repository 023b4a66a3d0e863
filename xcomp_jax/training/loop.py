r"""Supervised compression tuning: from a config to checkpoints.

  python -m xcomp_jax.train --config=configs/sct.py --config.workdir=runs/sct \
      --config.data.train=DIR

A step runs the frozen tower over its clips, adds up the gradients of its micro-batches
(`grad_step`, one compilation per shape) and applies them once (`apply_step`). What that will
compute is said at the start. The same command continues a run from its latest checkpoint, on as
many or other devices and hosts; SIGINT or SIGTERM saves and leaves.

Several folders, a quarter of the second in each epoch (any of them of frames, or all of features
of this tower):

  --config.data.train="('data/a','data/b')" --config.data.weights="(1.0,0.25)"
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from xcomp_jax.checkpoints import loading
from xcomp_jax.cli import command, keep_compiled
from xcomp_jax.config import ConfigError, MeshConfig, RunConfig, VLMConfig, check_run, check_trained
from xcomp_jax.config_io import from_command_line, to_dict
from xcomp_jax.data import packing, pipeline
from xcomp_jax.data.batch import Batch, Clips, Shape, length_table
from xcomp_jax.data.blend import Blend, measure_lengths, run_order
from xcomp_jax.data.packing import Micro
from xcomp_jax.data.store import Features, Store, StoreError, open_store
from xcomp_jax.errors import XCompError
from xcomp_jax.files import apart
from xcomp_jax.model import kernels, lp_comp, vlm
from xcomp_jax.parallel import hosts
from xcomp_jax.parallel.mesh import make_mesh, param_shardings, parameter_table
from xcomp_jax.progress import progress
from xcomp_jax.training import checkpoint, forecast, metrics, optim, workdir
from xcomp_jax.training.forecast import Account, Schedule
from xcomp_jax.training.steps import (
  Steps,
  TrainState,
  abstract_state,
  clip_share,
  compiled_steps,
  init_state,
  place_clips,
  place_rows,
  row_share,
  zero_sums,
)


class NotFiniteError(XCompError, ValueError):
  """A loss, gradient or update that is no number; the parameters are as they were before that
  step.
  """


class PreparedRun(NamedTuple):
  """What a run is of, before any weight is read."""

  cfg: VLMConfig
  mesh: Mesh
  opened: list[Blend]  # what it trains on, and if there are, held-out data
  lengths: np.ndarray  # int64[n, 4] of the samples that it trains on, columns as `Length`
  schedule: Schedule
  plan: list[list[Micro]]  # the micro-batches of each step
  data: pipeline.BatchReader
  heldout: Callable[[], pipeline.BatchReader] | None  # reads all of it, from the beginning
  description: dict  # of `checkpoint.description`

  @property
  def steps(self) -> int:
    """Optimizer steps of the whole run."""
    return len(self.plan)

  @property
  def pixels(self) -> bool:
    """Whether the tower runs, too."""
    return self.opened[0].features is None

  def account(self, steps: Sequence[Sequence[Micro]]) -> Account:
    """Says what some of the steps compute and take at least."""
    return forecast.account(self.schedule, steps, self.lengths, self.pixels)


Watch = Callable[[int, str, Mapping[str, float]], None]  # (step, group, values)


def train(
  config: RunConfig, watch: Watch = lambda step, group, values: None
) -> dict[str, float | int]:
  """Trains, from the latest checkpoint in the workdir if there is one, together with the other
  processes of the run.

  Args:
    config: of the run.
    watch: called with what goes to TensorBoard, as it comes: "train" and "goodput" every
      `log_every` steps, "heldout".

  Returns:
    what the last line says: step, steps (of the whole run), loss (mean over the steps done here, if
      any), and
    heldout_loss, heldout_accuracy if there are held-out data.

  Raises:
    ConfigError, StoreError, CheckpointError, ...: whatever can't work, before weights are read.
    SaveError: a checkpoint could not be saved; the last one is good.
    NotFiniteError: a loss, gradient or update became inf or nan; workdir/nan/ says in which
      samples.
  """
  with metrics.Goodput() as goodput, contextlib.ExitStack() as stack:
    check_run(config)
    check_trained(config.model)
    with goodput.part("connect"):
      stack.enter_context(hosts.joined(config.distributed))
    prepared = prepare_run(config)
    stack.enter_context(workdir.holding(config.workdir))
    return _train(config, prepared, goodput, watch)


def run_whole(config: RunConfig) -> None:
  """`train` for a program that goes on with what was trained.

  Raises:
    KeyboardInterrupt: a signal stopped it, after saving; the same call continues.
  """
  result = train(config)
  if result["step"] < result["steps"]:
    raise KeyboardInterrupt


def prepare_run(config: RunConfig) -> PreparedRun:
  """Reads what a config names, and makes sure that it goes together and that the workdir can be
  written.
  """
  data = config.data.train if isinstance(config.data.train, tuple) else (config.data.train,)
  read = {"config.init_from": config.init_from, "config.data.heldout": config.data.heldout}
  read |= {
    f"config.data.train[{i}]" if len(data) > 1 else "config.data.train": path
    for i, path in enumerate(data)
  }
  apart({"config.workdir": config.workdir}, read)
  keep_compiled(config.compilation_cache)
  kernels.check_implementation(config.model.attention, config.model.dtype)
  directory = loading.resolve(config.init_from, whole=False)
  cfg = loading.read_vlm_config(directory, config.model, config.lp_comp)
  lp_comp.counts(cfg.lp_comp, cfg.llm.layers)  # refuses schedules that can't be
  tokenizer = loading.read_tokenizer(directory, cfg)
  blend = open_data(config.data.train, cfg, config.data.weights)
  with _about_heldout():
    held = None if config.data.heldout is None else open_data(config.data.heldout, cfg)
  opened = [blend] if held is None else [blend, held]
  for data in opened:
    if data.features is not None and config.train.vision:
      raise ConfigError(
        f"config.train.vision = True, but {data.stores[0].path} holds features, which a tower that "
        f"learns would not "
        "make again; set it to False, or train on frames"
      )
  description = checkpoint.description(config, cfg, blend, held)
  checkpoint.agree(description)
  order = run_order(blend, config.train.batch_size, config.seed, config.train.epochs)[
    : config.train.steps
  ]
  lengths = [measure_lengths(data, tokenizer, config.data.mask) for data in opened]
  schedule = forecast.schedule_run(config, cfg, lengths[0], devices())
  forecast.check_memory(schedule)
  mesh = make_mesh(MeshConfig(*schedule.mesh), devices())
  plan = packing.pack_steps(lengths[0], order, schedule.shapes, schedule.costs)
  checkpoint.agree({"plan of the steps": zlib.crc32(repr((schedule.mesh, plan)).encode())})
  share = share_of(mesh, config, cfg.clips_per_chunk)
  data = pipeline.read_steps(blend, tokenizer, config.data, lengths[0], plan, share)
  heldout = None
  if held is not None:
    size = config.train.batch_size
    parts = [range(first, min(first + size, len(held))) for first in range(0, len(held), size)]
    with _about_heldout():
      other = forecast.schedule_run(config, cfg, lengths[1], devices(), schedule)
    seen = packing.pack_steps(lengths[1], parts, other.shapes, other.costs)
    whole = dataclasses.replace(share, trained=False)
    heldout = functools.partial(
      pipeline.read_steps, held, tokenizer, config.data, lengths[1], seen, whole
    )
  if not checkpoint.begun(config.workdir):
    # what is missing or broken is said before anything is written
    loading.stored(loading.resolve(config.init_from), cfg)
  workdir.claim(config.workdir)
  return PreparedRun(
    cfg, mesh, opened, length_table(lengths[0]), schedule, plan, data, heldout, description
  )


def devices() -> list[jax.Device]:
  """What a run computes on: all devices of all its processes."""
  return jax.devices()


def share_of(mesh: Mesh, config: RunConfig, clips: int) -> pipeline.ProcessShare:
  """What this process reads of a run on a mesh; clips: of a device in the tower at once.

  Raises:
    ConfigError: see `row_share`.
  """
  rows, groups = row_share(mesh)
  return pipeline.ProcessShare(
    rows=rows,
    groups=groups,
    devices=mesh.size,
    mine=tuple(clip_share(mesh)),
    clips=clips,
    trained=config.train.vision,
  )


class ClipEncoder:
  """Brings clips through the frozen tower to the rows of micro-batches, in the order in which a
  reader gives both.
  """

  def __init__(self, functions: Steps, mesh: Mesh):
    self._functions, self._mesh = functions, mesh
    self._tower: Any = None  # its weights on every device; gathered once a step
    self._visual: dict[int, jax.Array] = {}  # by number of a micro-batch
    self._running: list[jax.Array] = []  # results of calls that may still run

  def encode(self, state: TrainState, call: pipeline.TowerCall) -> None:
    """Encodes clips, by the tower as it is in `state`."""
    if self._tower is None:
      self._tower = self._functions.tower(state)
    # one may compute while the next is copied; more would pile up in the device's memory
    if len(self._running) > 1:
      jax.block_until_ready(self._running.pop(0))
    features = self._functions.encode(self._tower, place_clips(call.frames, self._mesh))
    self._running.append(features)
    for fill in call.fills:
      visual = self._room(fill.number, fill.shape)
      self._visual[fill.number] = self._functions.fill(visual, features, fill.place)

  def batch(self, micro: pipeline.MicroBatch) -> tuple[Batch, tuple[Clips, ...]]:
    """Places a micro-batch on the mesh, with its visual tokens; all calls of its step come
    before.
    """
    self._tower, self._running = None, []  # memory
    batch, clips = (
      place_rows(micro.batch, self._mesh),
      tuple(place_rows(some, self._mesh) for some in micro.clips),
    )
    if batch.visual is None:
      batch = dataclasses.replace(batch, visual=self._room(micro.number, micro.shape))
    return batch, clips

  def _room(self, number: int, shape: Shape) -> jax.Array:
    visual = self._visual.pop(number, None)
    return self._functions.room(shape.rows, shape.frames) if visual is None else visual


def _train(
  config: RunConfig, prepared: PreparedRun, goodput: metrics.Goodput, watch: Watch
) -> dict[str, float | int]:
  cfg, mesh, opened, data, steps = (
    prepared.cfg,
    prepared.mesh,
    prepared.opened,
    prepared.data,
    prepared.steps,
  )
  tx = optim.optimizer(config.optim, steps)
  precision = "highest" if config.model.dtype == "float32" else None
  first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    stack.enter_context(contextlib.closing(data))
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(jax.default_matmul_precision(precision))
    checkpoints = stack.enter_context(
      checkpoint.closing(checkpoint.manager(config.workdir, config.train))
    )
    graph, wanted = abstract_state(config, cfg, tx, mesh)
    with goodput.part("restore"):
      found = checkpoint.restore_checkpoint(
        checkpoints,
        (wanted.trained, wanted.frozen),
        wanted.opt,
        data,
        prepared.description,
        print if first else lambda _: None,
      )
    if found is None:
      start, state = 0, init_state(config, cfg, tx, mesh)
    else:
      start, (trained, frozen), opt = found
      state = TrainState(trained, frozen, opt)
    owed = found is not None and checkpoint.evaluation_due(config.workdir, start)
    check_tower(nnx.merge(graph, state.trained, state.frozen), config.init_from, opened)
    sums = zero_sums(state.trained, mesh)
    functions = compiled_steps(cfg, state, sums, mesh)
    encoder = ClipEncoder(functions, mesh)
    if first:
      introduce(config, prepared, state, start)
    writer = stack.enter_context(
      contextlib.closing(
        metrics.Writer(epath.Path(config.workdir) / "tensorboard", purge_step=start)
      )
    )
    compilations = stack.enter_context(
      metrics.Compilations("encode_step", "grad_step", "apply_step", "eval_step")
    )
    stopping = stack.enter_context(hosts.stop_signal())
    bar = stack.enter_context(
      progress(total=steps, initial=start, desc="train", unit="step", disable=not first)
    )
    say = bar.write if first else lambda _: None

    def tell(step: int, group: str, values: Mapping[str, float]) -> None:
      writer.write(step, group, values)
      watch(step, group, values)

    def compiled(name, what):
      return report_compilations(compilations, name, what, say)

    def evaluates():
      return prepared.heldout is not None and (done % config.train.eval_every == 0 or done == steps)

    def encode(encoder: ClipEncoder, call: pipeline.TowerCall) -> None:
      encoder.encode(state, call)
      compiled("encode_step", f"{len(call.fills[0].place)} clips of {call.frames.shape[1]} frames")

    def evaluate() -> dict[str, float] | None:
      assert prepared.heldout is not None  # see `evaluates`
      encoder = ClipEncoder(functions, mesh)  # nothing of it is left if this is interrupted
      total = dict.fromkeys(("loss", "correct", "samples"), 0.0)
      with contextlib.closing(prepared.heldout()) as items:
        while True:
          item = next(items, None)
          if item is None:
            out = {
              "loss": total["loss"] / total["samples"],
              "accuracy": total["correct"] / total["samples"],
            }
            samples = f"{out['accuracy']:.1%} of {total['samples']:.0f}"
            say(f"held-out after step {done}: loss {out['loss']:.4f}  accuracy {samples}")
            tell(done, "heldout", out)
            return out
          if isinstance(item, pipeline.TowerCall):
            encode(encoder, item)
            continue
          if stopping():
            break
          out = functions.evaluate(graph, state, encoder.batch(item)[0])
          compiled("eval_step", describe_shape(item.shape))
          total = {key: total[key] + float(value) for key, value in out.items()}
      say(f"the evaluation after step {done} is left to the run that continues this one")
      return None

    def save() -> None:
      about = prepared.description | ({"evaluation_due": True} if owed else {})
      with goodput.part("save"):
        checkpoint.save_checkpoint(
          checkpoints, done, (state.trained, state.frozen), state.opt, data, about
        )

    rate = optim.learning_rate(config.optim, steps)
    mine = len(mesh.local_devices) / mesh.size  # this process's part of the work
    clock, done = metrics.Clock(), start
    # of each step; the last evaluation, None if it was not done or dropped
    losses, evaluated = (
      [],
      None,
    )
    # stopped within an evaluation, or nothing else is left to do
    owed = evaluates() and (owed or done == steps)
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
          item = clock.wait(data)
        if isinstance(item, pipeline.TowerCall):
          encode(encoder, item)
          continue
        # one may compute while the next is copied; more would pile up in the device's memory
        if len(seen) > 1:
          jax.block_until_ready(seen[-2][1])
        batch, clips = encoder.batch(item)
        sums, sample_losses = functions.grad(
          graph, state, sums, batch, clips, projector_max_frames=config.train.projector_max_frames
        )
        compiled("grad_step", describe_shape(item.shape))
        seen.append((batch.index, sample_losses))
        last = item.last
      state, sums, out = functions.apply(tx, state, sums)
      compiled("apply_step", "")
      out = {key: value.item() for key, value in jax.device_get(out).items()}
      if not out["finite"]:
        raise not_finite(config, done, out, seen, opened[0])
      done += 1
      losses.append(out["loss"])
      clock.samples += out["samples"]
      clock.frames += out["frames"]
      of = prepared.lengths[packing.samples_of(prepared.plan[done - 1])]
      clock.flops += metrics.training_flops(cfg, config.train, of, prepared.pixels) * mine
      bar.update()
      if done % config.train.log_every == 0 or done == steps:
        recent = losses[-min(config.train.log_every, len(losses)) :]
        values = {
          "loss": float(np.mean(recent)),
          "lr": np.asarray(rate(done - 1)).item(),
          "grad_norm": out["grad_norm"],
          **clock.report(),
          "real_share": prepared.account(prepared.plan[done - len(recent) : done]).all,
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
    checkpoint.wait_until_saved(checkpoints)
  result = {"step": done, "steps": steps}
  if losses:
    result["loss"] = float(np.mean(losses))
  if evaluated:
    result |= {"heldout_loss": evaluated["loss"], "heldout_accuracy": evaluated["accuracy"]}
  if first:
    print(goodput.line())
    print(
      f"{'stopped by a signal' if stopped else 'done'}: step {done} of {steps}, "
      + (
        f"mean loss {result['loss']:.4f}"
        if losses
        else "no step was left to do"
        if done == steps
        else "no step done"
      )
      + (
        f", held-out loss {result['heldout_loss']:.4f}, accuracy {result['heldout_accuracy']:.1%}"
        if evaluated
        else ""
      )
      + f"; checkpoint {checkpoint.folder(config.workdir) / str(done)}"
      + ("; the same command continues" if stopped else ""),
      flush=True,
    )
  return result


def introduce(config: RunConfig, prepared: PreparedRun, state: TrainState, start: int) -> None:
  """Says what is about to run, where every parameter lies, and writes the resolved config."""
  cfg, mesh = prepared.cfg, prepared.mesh
  print(f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
  print(kernels.describe_kernels(cfg, gradient=True))
  if prepared.pixels:
    auto = " (auto: by its memory)" if config.model.clips_per_chunk == "auto" else ""
    print(f"the tower takes {cfg.clips_per_chunk} clips of a device at once{auto}")

  def table(part):
    return parameter_table(part, param_shardings(part, mesh))

  print(f"trained parameters\n{table(state.trained)}\nfrozen parameters\n{table(state.frozen)}")
  print(
    f"optimizer state, split as the trained parameters: "
    f"{table(state.opt).splitlines()[-1].split()[-1]} MiB per device"
  )
  schedule = lp_comp.counts(cfg.lp_comp, cfg.llm.layers)
  print(
    f"LP-Comp ({cfg.lp_comp.keep}): tokens per {cfg.lp_comp.group} in each layer "
    f"{' '.join(map(str, schedule))}"
  )
  print("\n".join(prepared.opened[0].made_with()))
  print(prepared.account(prepared.plan).paragraph())
  todo = f"steps {start + 1} to {prepared.steps}, {config.train.batch_size} samples each"
  todo += f", from checkpoint {start}" if start else ""
  print(todo if start < prepared.steps else f"all {prepared.steps} steps are done", flush=True)
  (epath.Path(config.workdir) / "config.json").write_text(json.dumps(to_dict(config), indent=2))


@contextlib.contextmanager
def _about_heldout() -> Generator[None]:
  """Says that it is the held-out data something is wrong with."""
  try:
    yield
  except (ConfigError, StoreError) as error:
    raise type(error)(
      f"held-out data in config.data.heldout (None: no evaluation): {error}"
    ) from error


def open_data(
  folders: str | tuple[str, ...], cfg: VLMConfig, weights: tuple[float, ...] | None = None
) -> Blend:
  """Stores that the model can read; whether features are its own tower's only the weights can say
  (`check_tower`).

  Raises:
    StoreError: see `open_store`.
    ConfigError: frames have another size, clips another length, groups of LP-Comp don't fill a
      clip, or see `Blend`.
  """
  group = cfg.lp_comp.group
  stores = [open_store(folder) for folder in ((folders,) if isinstance(folders, str) else folders)]
  for store in stores:
    wanted: list[tuple[Store | Features, str, int]] = [
      (store, "image_size", cfg.vision.image_size),
      (store, "clip_frames", cfg.clip_frames),
    ]
    if store.features is not None:
      wanted += [
        (store.features, "tokens_per_frame", cfg.tokens_per_frame),
        (store.features, "width", cfg.vision.width),
      ]
    for has, name, value in wanted:
      if getattr(has, name) != value:
        raise ConfigError(
          f"{store.path} was written with {name} {getattr(has, name)}, but the model takes "
          f"{value}; run predecode again"
        )
    for frames in sorted({sample.clip_frames for sample in store.samples if sample.frames}):
      if (tokens := frames * cfg.tokens_per_frame) % group:
        raise ConfigError(
          f"lp_comp.group = {group}: {store.path} has clips of {frames} frames, whose {tokens} "
          f"tokens can't be cut "
          f"into groups of {group}"
        )
  return Blend(stores, weights)


def check_tower(model: vlm.VLM, name: str, data: Sequence[Blend]) -> None:
  """Makes sure that features are of this model's tower. Where several processes share it, all of
  them must call this.

  name: of the model, for the message.

  Raises:
    ConfigError: they are of other weights or settings.
  """
  made = [
    (store.path, store.features.identity)
    for blend in data
    for store in blend.stores
    if store.features is not None
  ]
  identity = loading.tower_identity(model) if made else None
  for path, other in made:
    if other != identity:
      raise ConfigError(
        f"{path} holds features by another tower: its identity is {other}, that of the tower in "
        f"{name} {identity}. Make the features again with this checkpoint, or train on frames"
      )


def describe_shape(shape: Shape) -> str:
  """A micro-batch's shape, in words."""
  rows = f"{shape.rows} rows of up to " if shape.rows > 1 else "a row of up to "
  return f"{rows}{shape.samples} samples, {shape.frames} frames, {shape.text} tokens of text"


def report_compilations(compilations: metrics.Compilations, name: str, what: str, say) -> None:
  """Says what calling `name` on `what` (a shape, in words) just compiled, and whether that is more
  than the shapes explain.
  """
  shapes = compilations.seen[name]
  shapes.add(what)
  for seconds in compilations.take(name):
    say(f"compiled {name}{what and f' for {what}'} in {seconds:.1f} s")
    if compilations.count[name] > len(shapes):
      say(
        f"warning: {name} was compiled {compilations.count[name]} times for {len(shapes)} shapes; "
        "something else changes from step to step"
      )


def not_finite(
  config: RunConfig, step: int, out: dict[str, Any], seen, data: Blend
) -> NotFiniteError:
  """Writes workdir/nan/step_N.json, with every sample of the step and its loss; returns the error
  to raise.
  """
  gather = functools.partial(multihost_utils.process_allgather, tiled=True)
  samples = []
  for index, losses in seen:
    for i, loss in zip(
      gather(index).ravel().tolist(), gather(losses).ravel().tolist(), strict=True
    ):
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
    f"step {step + 1}: loss {out['loss']}, norm of the gradient {out['grad_norm']}, of the update "
    f"{out['update_norm']}. "
    f"The step was not applied and nothing was saved after it; its samples and their losses are in "
    f"{file}"
  )


def _number(value: float) -> float | str:
  return value if np.isfinite(value) else str(value)  # JSON has no nan


def main() -> None:
  """The command."""
  from absl import flags

  flags.FLAGS.mark_as_parsed()  # Grain's readers look at absl flags
  try:
    with command():
      if {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        return
      train(from_command_line(sys.argv))
  except BaseException as error:
    if isinstance(error, SystemExit) and not error.code:
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # At exit JAX would wait for the other processes, and Orbax for the threads of a save that
    # failed.
    os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
