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
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from xcomp_jax.cli import command
from xcomp_jax.config import RunConfig, check_run, check_trained
from xcomp_jax.config_io import from_command_line, to_dict
from xcomp_jax.data import packing, pipeline
from xcomp_jax.data.batch import Batch, Clips, Shape
from xcomp_jax.data.blend import Blend
from xcomp_jax.errors import XCompError
from xcomp_jax.model import kernels, lp_comp
from xcomp_jax.parallel import hosts
from xcomp_jax.parallel.mesh import param_shardings, parameter_table
from xcomp_jax.progress import progress
from xcomp_jax.training import checkpoint, metrics, optim, workdir
from xcomp_jax.training.prepare import PreparedRun, check_tower, prepare_run
from xcomp_jax.training.steps import (
  Steps,
  TrainState,
  abstract_state,
  compiled_steps,
  init_state,
  place_clips,
  place_rows,
  zero_sums,
)

Watch = Callable[[int, str, Mapping[str, float]], None]  # (step, group, values)
Taken = tuple[jax.Array, jax.Array]  # of a micro-batch: the samples' numbers, and their losses


class NotFiniteError(XCompError, ValueError):
  """A loss, gradient or update that is no number; the parameters are as they were before that
  step.
  """


class Loop:
  """A run at work: its state, its programs, and what is told of it.

  `run` is the algorithm. A class made from this one may add to any of its parts, as tests do.
  """

  def __init__(
    self,
    config: RunConfig,
    prepared: PreparedRun,
    goodput: metrics.Goodput,
    watch: Watch,
    stack: contextlib.ExitStack,
  ):
    """Restores or begins; what has to be closed at the end is left to `stack`."""
    from tensorboardX import SummaryWriter

    self.config = config
    self.prepared = prepared
    self.goodput = goodput
    self.watch = watch
    self.mesh = prepared.mesh
    self.first = jax.process_index() == 0  # who speaks
    self.tx = optim.optimizer(config.optim, prepared.steps)
    self.rate = optim.learning_rate(config.optim, prepared.steps)
    stack.enter_context(contextlib.closing(prepared.data))
    stack.enter_context(jax.set_mesh(self.mesh))
    stack.enter_context(
      jax.default_matmul_precision("highest" if config.model.dtype == "float32" else None)
    )
    self.checkpoints = stack.enter_context(
      checkpoint.closing(checkpoint.manager(config.workdir, config.train))
    )
    self.losses: list[float] = []  # of each step done here
    self.heldout: dict[str, float] | None = None  # of the last evaluation, unless it was dropped
    self.restore()
    self.sums = zero_sums(self.state.trained, self.mesh)
    self.programs = compiled_steps(prepared.cfg, self.state, self.sums, self.mesh)
    self.encoder = ClipEncoder(self.programs, self.mesh)
    if self.first:
      introduce(config, prepared, self.state, self.done)
    self.writer = stack.enter_context(
      # points after purge_step are of steps that the run now takes again
      SummaryWriter(
        str(epath.Path(config.workdir) / "tensorboard"),
        purge_step=self.done + 1,
        write_to_disk=self.first,
      )
    )
    self.compilations = stack.enter_context(
      metrics.Compilations("encode_step", "grad_step", "apply_step", "eval_step")
    )
    self.stopping = stack.enter_context(hosts.stop_signal())
    self.bar = stack.enter_context(
      progress(
        total=prepared.steps,
        initial=self.done,
        desc="train",
        unit="step",
        disable=not self.first,
      )
    )
    self.clock = metrics.Clock(goodput)

  def restore(self) -> None:
    """Takes the state of the newest checkpoint that can be read, or else of step 0."""
    config, cfg = self.config, self.prepared.cfg
    self.graph, wanted = abstract_state(config, cfg, self.tx, self.mesh)
    with self.goodput.part("restore"):
      found = checkpoint.restore_checkpoint(
        self.checkpoints, wanted, self.prepared.data, self.prepared.description
      )
    self.done, self.state, left = found or (0, init_state(config, cfg, self.tx, wanted), False)
    # stopped within an evaluation, or nothing else is left to do
    self.evaluation_due = self.evaluates() and (left or self.done == self.prepared.steps)
    check_tower(
      nnx.merge(self.graph, self.state.trained, self.state.frozen),
      config.init_from,
      self.prepared.opened,
    )

  def run(self) -> None:
    """Takes all steps that are left, or those until a signal; saves at the end."""
    train, steps = self.config.train, self.prepared.steps
    if self.evaluation_due:
      self.evaluate()
    self.goodput.enter("step")
    while self.done < steps and not self.stopping():
      self.step()
      if self.done % train.log_every == 0 or self.done == steps:
        self.log()
      if self.evaluates():
        self.evaluate()
      with checkpoint.saving(self.checkpoints):
        self.checkpoints.check_for_errors()  # of a save in the background
      if self.done % train.save_every == 0:
        self.save()
    self.goodput.enter("save")
    self.save()
    self.bar.close()
    checkpoint.wait_until_saved(self.checkpoints)

  def step(self) -> None:
    """One optimizer step.

    Raises:
      NotFiniteError: it is not applied.
    """
    taken = self.accumulate()
    self.state, self.sums, out = self.programs.apply(self.tx, self.state, self.sums)
    self.compiled("apply_step", "")
    out = {key: value.item() for key, value in jax.device_get(out).items()}
    if not out["finite"]:
      raise not_finite(self.config, self.done, out, taken, self.prepared.opened[0])
    samples = self.prepared.lengths[packing.samples_of(self.prepared.plan[self.done])]
    self.done += 1
    self.losses.append(out["loss"])
    self.gradient = out["grad_norm"]
    self.clock.samples += out["samples"]
    self.clock.frames += out["frames"]
    mine = len(self.mesh.local_devices) / self.mesh.size  # this process's part of the work
    self.clock.flops += mine * metrics.training_flops(
      self.prepared.cfg, self.config.train, samples, self.prepared.pixels
    )
    self.bar.update()

  def accumulate(self) -> list[Taken]:
    """Adds up the gradients of a step's micro-batches."""
    taken: list[Taken] = []
    while True:
      item = self.read()
      if isinstance(item, pipeline.TowerCall):
        self.encode(self.encoder, item)
        continue
      # one may compute while the next is copied; more would pile up in the device's memory
      if len(taken) > 1:
        jax.block_until_ready(taken[-2][1])
      taken.append(self.add(item))
      if item.last:
        return taken

  def read(self) -> pipeline.Item:
    """Waits for what is to be computed next."""
    with self.goodput.part("data"):
      return next(self.prepared.data)

  def encode(self, encoder: "ClipEncoder", call: pipeline.TowerCall) -> None:
    """Encodes clips for micro-batches that follow."""
    encoder.encode(self.state, call)
    clips = f"{len(call.fills[0].place)} clips of {call.frames.shape[1]} frames"
    self.compiled("encode_step", clips)

  def add(self, micro: pipeline.MicroBatch) -> Taken:
    """Adds a micro-batch's gradients to the sums."""
    batch, clips = self.encoder.batch(micro)
    self.sums, losses = self.programs.grad(
      self.graph,
      self.state,
      self.sums,
      batch,
      clips,
      projector_max_frames=self.config.train.projector_max_frames,
    )
    self.compiled("grad_step", describe_shape(micro.shape))
    return batch.index, losses

  def log(self) -> None:
    """Says what the steps since the last line were like."""
    recent = self.losses[-self.config.train.log_every :]
    account = self.prepared.account(self.prepared.plan[self.done - len(recent) : self.done])
    values = {
      "loss": float(np.mean(recent)),
      "lr": np.asarray(self.rate(self.done - 1)).item(),
      "grad_norm": self.gradient,
      **self.clock.report(),
      "real_share": account.all,
    }
    self.say(metrics.line(self.done, self.prepared.steps, values))
    self.tell("train", values)
    self.tell("goodput", self.goodput.shares())
    self.clock.reset()

  def evaluates(self) -> bool:
    """Whether an evaluation follows the step that was done last."""
    return self.prepared.heldout is not None and (
      self.done % self.config.train.eval_every == 0 or self.done == self.prepared.steps
    )

  def evaluate(self) -> None:
    """Evaluates all held-out data. After a signal what was done of it is dropped, and left to the
    run that continues this one.
    """
    with self.goodput.part("evaluate"):
      self.heldout = self._evaluated()
    self.evaluation_due = self.heldout is None
    self.clock.reset()

  def _evaluated(self) -> dict[str, float] | None:
    assert self.prepared.heldout is not None  # see `evaluates`
    encoder = ClipEncoder(self.programs, self.mesh)  # nothing of it is left if this is interrupted
    total = dict.fromkeys(("loss", "correct", "samples"), 0.0)
    with contextlib.closing(self.prepared.heldout()) as items:
      for item in items:
        if isinstance(item, pipeline.TowerCall):
          self.encode(encoder, item)
          continue
        if self.stopping():
          self.say(
            f"the evaluation after step {self.done} is left to the run that continues this one"
          )
          return None
        total = {key: total[key] + value for key, value in self.measure(encoder, item).items()}
    loss, accuracy = (total[key] / total["samples"] for key in ("loss", "correct"))
    self.say(
      f"held-out after step {self.done}: loss {loss:.4f}  accuracy {accuracy:.1%} of "
      f"{total['samples']:.0f}"
    )
    values = {"loss": loss, "accuracy": accuracy}
    self.tell("heldout", values)
    return values

  def measure(self, encoder: "ClipEncoder", micro: pipeline.MicroBatch) -> dict[str, float]:
    """Sums over a micro-batch of held-out data, as `eval_step`."""
    out = self.programs.evaluate(self.graph, self.state, encoder.batch(micro)[0])
    self.compiled("eval_step", describe_shape(micro.shape))
    return {key: float(value) for key, value in out.items()}

  def save(self) -> None:
    """Begins to save a checkpoint, unless that step has one."""
    left = {"evaluation_due": True} if self.evaluation_due else {}
    with self.goodput.part("save"):
      checkpoint.save_checkpoint(
        self.checkpoints,
        self.done,
        self.state,
        self.prepared.data,
        self.prepared.description | left,
      )

  def say(self, text: str) -> None:
    """A line, by one of the processes."""
    if self.first:
      self.bar.write(text)

  def tell(self, group: str, values: Mapping[str, float]) -> None:
    """Numbers, to TensorBoard (but for inf and nan) and to who watches."""
    for name, value in values.items():
      if np.isfinite(value):
        self.writer.add_scalar(f"{group}/{name}", float(value), self.done)
    self.watch(self.done, group, values)

  def compiled(self, name: str, what: str) -> None:
    """Says what a call of a program on `what` has just compiled."""
    for line in self.compilations.lines(name, what):
      self.say(line)

  def report(self) -> dict[str, float | int]:
    """Says how the run ended (launch/slurm.sh and pod.sh look for it), when all is closed; returns
    it, too.
    """
    steps = self.prepared.steps
    result: dict[str, float | int] = {"step": self.done, "steps": steps}
    said = "no step was left to do" if self.done == steps else "no step done"
    if self.losses:
      result["loss"] = float(np.mean(self.losses))
      said = f"mean loss {result['loss']:.4f}"
    if self.heldout:
      result |= {f"heldout_{name}": value for name, value in self.heldout.items()}
      said += ", held-out loss {loss:.4f}, accuracy {accuracy:.1%}".format(**self.heldout)
    said += f"; checkpoint {checkpoint.folder(self.config.workdir) / str(self.done)}"
    end = "done"
    if self.done < steps or self.evaluation_due:
      end, said = "stopped by a signal", said + "; the same command continues"
    if self.first:
      print(f"{self.goodput.line()}\n{end}: step {self.done} of {steps}, {said}", flush=True)
    return result


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
    batch, *clips = (place_rows(some, self._mesh) for some in (micro.batch, *micro.clips))
    if batch.visual is None:
      batch = dataclasses.replace(batch, visual=self._room(micro.number, micro.shape))
    return batch, tuple(clips)

  def _room(self, number: int, shape: Shape) -> jax.Array:
    visual = self._visual.pop(number, None)
    return self._functions.room(shape.rows, shape.frames) if visual is None else visual


def train(
  config: RunConfig,
  watch: Watch = lambda step, group, values: None,
  devices: Callable[[], Sequence[Any]] = jax.devices,
  kind: Callable[..., Loop] = Loop,
  join: Callable[..., contextlib.AbstractContextManager] = hosts.joined,
  goodput: metrics.Goodput | None = None,
) -> dict[str, float | int]:
  """Trains, from the latest checkpoint in the workdir if there is one, together with the other
  processes of the run.

  Args:
    config: of the run.
    watch: called with what goes to TensorBoard, as it comes: "train" and "goodput" every
      `log_every` steps, "heldout".
    devices: says what the run computes on, when its processes are connected.
    kind: of the loop.
    join: connects the processes.
    goodput: sees where the time goes.

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
  with goodput or metrics.Goodput() as goodput, contextlib.ExitStack() as held:
    check_run(config)
    check_trained(config.model)
    with goodput.part("connect"):
      held.enter_context(join(config.distributed))
    prepared = prepare_run(config, devices())
    held.enter_context(workdir.holding(config.workdir))
    with contextlib.ExitStack() as stack:
      loop = kind(config, prepared, goodput, watch, stack)
      loop.run()
    return loop.report()


def run_whole(config: RunConfig) -> None:
  """`train` for a program that goes on with what was trained.

  Raises:
    KeyboardInterrupt: a signal stopped it, after saving; the same call continues.
  """
  result = train(config)
  if result["step"] < result["steps"]:
    raise KeyboardInterrupt


def introduce(config: RunConfig, prepared: PreparedRun, state: TrainState, start: int) -> None:
  """Says what is about to run, where every parameter lies, and writes the resolved config."""
  cfg, mesh = prepared.cfg, prepared.mesh
  auto = " (auto: by its memory)" if config.model.clips_per_chunk == "auto" else ""
  clips = f"the tower takes {cfg.clips_per_chunk} clips of a device at once{auto}"
  trained, frozen, opt = (
    parameter_table(part, param_shardings(part, mesh))
    for part in (state.trained, state.frozen, state.opt)
  )
  schedule = " ".join(map(str, lp_comp.counts(cfg.lp_comp, cfg.llm.layers)))
  last = f", from checkpoint {start}" if start else ""
  todo = f"steps {start + 1} to {prepared.steps}, {config.train.batch_size} samples each{last}"
  print(
    f"{mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}",
    kernels.describe_kernels(cfg, gradient=True),
    *([clips] if prepared.pixels else []),
    f"trained parameters\n{trained}\nfrozen parameters\n{frozen}",
    "optimizer state, split as the trained parameters: "
    f"{opt.splitlines()[-1].split()[-1]} MiB per device",
    f"LP-Comp ({cfg.lp_comp.keep}): tokens per {cfg.lp_comp.group} in each layer {schedule}",
    *prepared.opened[0].made_with(),
    prepared.account(prepared.plan).paragraph(),
    todo if start < prepared.steps else f"all {prepared.steps} steps are done",
    sep="\n",
    flush=True,
  )
  (epath.Path(config.workdir) / "config.json").write_text(json.dumps(to_dict(config), indent=2))


def describe_shape(shape: Shape) -> str:
  """A micro-batch's shape, in words."""
  rows = f"{shape.rows} rows of up to " if shape.rows > 1 else "a row of up to "
  return f"{rows}{shape.samples} samples, {shape.frames} frames, {shape.text} tokens of text"


def not_finite(
  config: RunConfig, step: int, out: dict[str, Any], taken: Sequence[Taken], data: Blend
) -> NotFiniteError:
  """Writes workdir/nan/step_N.json, with every sample of the step and its loss; returns the error
  to raise.
  """
  samples = []
  for pair in taken:
    index, losses = (multihost_utils.process_allgather(x, tiled=True).ravel() for x in pair)
    for i, loss in zip(index[index >= 0].tolist(), losses[index >= 0].tolist()):
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
    f"{out['update_norm']}. The step was not applied and nothing was saved after it; its samples "
    f"and their losses are in {file}",
    where=str(file),
    step=step + 1,
  )


def _number(value: float) -> float | str:
  return value if np.isfinite(value) else str(value)  # JSON has no nan


def main(argv: Sequence[str] | None = None, kind: type[Loop] = Loop) -> None:
  """The command."""
  from absl import flags

  flags.FLAGS.mark_as_parsed()  # Grain's readers look at absl flags
  argv = sys.argv if argv is None else ["train", *argv]
  try:
    with command():
      if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return
      train(from_command_line(list(argv)), kind=kind)
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
