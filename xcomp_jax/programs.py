"""Compiles the programs of a run for devices that need not be there, and says what each of them takes.

A TPU topology's come from the TPU compiler itself (libtpu), without a TPU.
"""

import contextlib
import ctypes
import dataclasses
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from xcomp_jax import absent, cost, forecast, generate, metrics, official, optim, sharding, steps, weights
from xcomp_jax.config import ConfigError, MeshConfig, RunConfig, VLMConfig, check
from xcomp_jax.data import packing, pipeline
from xcomp_jax.data.batch import Batch, Clips, Length, Shape, batch_spec
from xcomp_jax.data.packing import Lengths, Micro
from xcomp_jax.files import one_line
from xcomp_jax.model import kernels, lp_comp, vlm

TRAINING = ("gradient", "tower", "apply")
NAMES = (*TRAINING, "prefill")
ROOM = 64  # tokens to answer that prefill makes room for
FRAMES, TEXT = 1024, 512  # of a sample, where nothing is known of the data
RELEASED = pathlib.Path(__file__).parents[1] / "configs"  # has the config.json of released checkpoints, by hub id


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is planned.

  cfg: the model as compiled. full: with all of its layers. shapes: of micro-batches. effort: of the compiler, from -1
  (an eighth of the time, a tenth more of temporaries) to 0 (as it is for training). lengths: of samples, or of those
  that are assumed. steps: the micro-batches of each step of them. costs: by which they were packed.
  """

  config: RunConfig
  cfg: VLMConfig
  full: VLMConfig
  mesh: Mesh
  device: cost.Device
  shapes: tuple[Shape, ...]
  effort: float
  lengths: Lengths
  steps: Sequence[Sequence[Micro]]
  costs: forecast.Costs


# --- what is asked for ------------------------------------------------------------------------------------------------


def topology(name: str) -> list[Any]:
  """The devices of a TPU topology such as "v5e:4x4", to compile for only.

  Raises:
    ConfigError: no libtpu, or no such topology.
  """
  # Outside of a Google cloud nothing answers libtpu's questions; nothing here touches a TPU, so its lock is not needed.
  quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  for key, value in quiet.items():
    os.environ.setdefault(key, value)
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ConfigError("--topology needs the TPU compiler: pip install 'xcomp_jax[plan]' (no TPU needed)") from error
  from jax.experimental import topologies

  sizes = [int(n) for n in re.findall(r"\d+", name.partition(":")[2])]
  one = {"chips_per_host_bounds": [1] * 3} if math.prod(sizes) == 1 else {}
  try:
    return list(topologies.get_topology_desc(name, "tpu", **one).devices)
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(
      f"--topology={name}: {one_line(error)}. Write the version and the shape, such as v5e:2x2, v5e:16x16, v5p:2x2x2, "
      "v6e:4x4"
    ) from error


def sizes(config: RunConfig) -> VLMConfig:
  """Reads the model's sizes: from `init_from` if it is a directory, of released checkpoints without a network."""
  known = RELEASED / config.init_from
  directory = pathlib.Path(config.init_from)
  if not directory.is_dir():
    directory = known if (known / "config.json").is_file() else weights.resolve(config.init_from)
  return weights.read_config(directory, config.model, config.lp_comp)


def cut(cfg: VLMConfig, layers: int | None) -> VLMConfig:
  """The model with so many layers of the LLM and the tower; the LLM's are taken evenly from the schedule.

  Raises:
    ConfigError: more than there are, or none.
  """
  if layers is None or layers == cfg.llm.layers:
    return cfg
  if not 0 < layers < cfg.llm.layers:
    raise ConfigError(f"--layers {layers}: the model has {cfg.llm.layers}")
  counts = lp_comp.counts(cfg.lp_comp, cfg.llm.layers)
  taken = tuple(counts[round(i * (len(counts) - 1) / max(1, layers - 1))] for i in range(layers))
  return dataclasses.replace(
    cfg, llm=dataclasses.replace(cfg.llm, layers=layers), lp_comp=dataclasses.replace(cfg.lp_comp, schedule=taken),
    vision=dataclasses.replace(cfg.vision, layers=min(layers, cfg.vision.layers)),
  )  # fmt: skip


def slots(cfg: VLMConfig, shape: Shape) -> int:
  """Counts the token slots of a row in all layers."""
  groups = shape.frames * cfg.tokens_per_frame // cfg.lp_comp.group
  around = shape.samples * shape.prefix + shape.text
  return sum(around + groups * count for count in lp_comp.counts(cfg.lp_comp, cfg.llm.layers))


def make(
  config: RunConfig,
  where: str | Sequence[Any] | None,
  *,
  layers: int | None = None,
  frames: int | None = None,
  text: int | None = None,
  lengths: Lengths | None = None,
  chips: Sequence[Any] | None = None,
  effort: float = 0.0,
) -> Plan:
  """Makes a plan.

  Args:
    config: of the run.
    where: a TPU topology's name, or devices; None: those that are here.
    layers: compiled ones; see `cut`.
    frames: of the samples that are assumed, if there are no lengths,
    text: and their tokens behind the frames; None for both: as `config.data.shapes` says, if it does.
    lengths: of all samples. The mesh and the shapes are those that training on them has.
    chips: like the devices, where those can't be asked (`forecast.chips`).
    effort: of the compiler; see `Plan`.

  Raises:
    ConfigError: values that can't be.
    CheckpointError: no such checkpoint.
  """
  check(config)
  devices = jax.devices() if where is None else topology(where) if isinstance(where, str) else where
  full, seen, size = sizes(config), config, config.train.batch_size
  if lengths is None:
    seen, lengths = _assumed(config, full, len(devices), frames, text)
  pipeline.steps_per_epoch(len(lengths), size)  # refuses too few
  schedule = forecast.schedule(seen, full, lengths, chips or devices)
  mesh = sharding.make_mesh(MeshConfig(*schedule.mesh), devices)
  sharding.row_groups(mesh)  # refuses what training would
  order = pipeline.order(range(len(lengths)), size, config.seed, 0)
  packed = packing.pack_steps(lengths, order, schedule.shapes, schedule.costs)
  device = cost.device_of(chips or devices)
  return Plan(
    config, cut(full, layers), full, mesh, device, schedule.shapes, effort, lengths, packed, schedule.costs
  )  # fmt: skip


def _assumed(
  config: RunConfig, cfg: VLMConfig, devices: int, frames: int | None, text: int | None
) -> tuple[RunConfig, Lengths]:
  """Closes what a config leaves open, and assumes samples that fill a row each, for a step.

  Raises:
    ConfigError: frames that don't fill clips.
  """
  if frames is not None and (frames < 1 or (frames % cfg.clip_frames and frames != 1)):
    raise ConfigError(f"--frames {frames}: must be 1, or a multiple of the {cfg.clip_frames} frames of a clip")
  mesh, shapes, prefix = config.mesh, config.data.shapes, config.data.prefix_length
  if (mesh.fsdp, mesh.context) == (-1, -1):
    mesh = dataclasses.replace(mesh, context=1)
  if shapes is None or (frames, text) != (None, None):
    groups = math.prod(sharding.mesh_sizes(mesh, devices)[:2])
    shapes = ((groups, 1, FRAMES if frames is None else frames, TEXT if text is None else text),)
  data = dataclasses.replace(config.data, shapes=shapes)
  _, _, frames, text = max(shapes, key=lambda shape: shape[2:])
  length = Length(frames, cfg.clip_frames if frames > 1 else 1, prefix, text)
  return dataclasses.replace(config, mesh=mesh, data=data), [length] * config.train.batch_size


# --- programs ---------------------------------------------------------------------------------------------------------


def asked(plan: Plan, names: Sequence[str]) -> list[tuple[str, Shape | None]]:
  """Lists programs of these names, with the shape of what each takes."""
  most = max(plan.shapes, key=lambda shape: (slots(plan.full, shape), shape))
  prompts = dataclasses.replace(most, rows=sharding.batch_devices(plan.mesh), samples=1)
  shapes = {"gradient": plan.shapes, "prefill": (prompts,)}
  return [(name, shape) for name in names for shape in shapes.get(name, (None,))]


def batch_of(plan: Plan, cfg: VLMConfig, shape: Shape) -> Batch:
  """Makes a micro-batch of ShapeDtypeStructs with shardings."""
  return _placed(plan, batch_spec(shape, ((cfg.tokens_per_frame, cfg.vision.width), cfg.dtype)))


def clips_of(plan: Plan, cfg: VLMConfig, shape: Shape) -> tuple[Clips, ...]:
  """Makes the clips of a micro-batch, if the tower is trained: those of videos."""
  if not plan.config.train.vision:
    return ()
  each = cfg.clip_frames if shape.frames > 1 else 1
  clips, side = (shape.rows, shape.frames // each), cfg.vision.image_size
  frames = jax.ShapeDtypeStruct((*clips, each, side, side, 3), np.dtype(np.uint8))
  return (_placed(plan, Clips(frames, jax.ShapeDtypeStruct(clips, np.dtype(np.int32)))),)


def _placed(plan: Plan, spec: Any) -> Any:
  def one(leaf, at):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

  return jax.tree.map(one, spec, steps.batch_shardings(spec, plan.mesh))


def training(plan: Plan, cfg: VLMConfig) -> tuple[Any, nnx.GraphDef, steps.TrainState, steps.Sums]:
  """The optimizer, the model's graph, and state and sums as ShapeDtypeStructs with shardings."""
  tx = optim.optimizer(plan.config.optim, 1000)
  graph, state = steps.abstract_state(plan.config, cfg, tx, plan.mesh)
  number = jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(plan.mesh))
  grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, np.float32, sharding=p.sharding), state.trained)
  return tx, graph, state, steps.Sums(grads, number, number, number)


def traced(
  plan: Plan, cfg: VLMConfig, name: str, shape: Shape | None
) -> tuple[Any, dict[str, float], dict[str, float]]:
  """Traces a program for the mesh.

  One batch, or chunk of clips, is copied while another is computed on, so training holds two; and all features of a
  step wait for their micro-batches.

  Returns:
    the traced program; bytes per device of what it is given; and of what else is there meanwhile, temporaries aside.
  """
  if name == "prefill":
    assert shape is not None
    graph, params = nnx.split(weights.abstract(cfg))
    at, dtype = sharding.param_shardings(params, plan.mesh), np.dtype(cfg.dtype)
    params = jax.tree.map(lambda p, at: jax.ShapeDtypeStruct(p.shape, dtype, sharding=at), params, at)
    batch = batch_of(plan, cfg, shape)
    run = jax.jit(lambda params, batch: generate.prefill(nnx.merge(graph, params), batch, ROOM))
    return run.trace(params, batch), {"parameters": held(params), "batch": held(batch)}, {}
  tx, graph, state, sums = training(plan, cfg)
  compiled = steps.compiled_steps(cfg, state, sums, plan.mesh)
  memory = {"parameters": held((state.trained, state.frozen)), "gradients": held(sums)}
  optimizer = {"optimizer state": held(state.opt)}
  if name == "apply":
    return compiled.apply.trace(tx, state, sums), memory | optimizer, {}
  if name == "tower":
    one, side = sharding.replicated(plan.mesh), cfg.vision.image_size
    part = state.frozen if "vision" in state.frozen else state.trained
    tower = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=one), part["vision"])
    frames = jax.ShapeDtypeStruct(
      (cfg.clips_per_chunk * plan.mesh.size, cfg.clip_frames, side, side, 3), np.dtype(np.uint8),
      sharding=sharding.clip_sharding(plan.mesh),
    )  # fmt: skip
    given = {"tower": held(tower), "clips": held(frames)}
    beside = memory | optimizer | {"next clips": held(frames), "features": waiting(plan, cfg)}
    return compiled.encode.trace(tower, frames), given, beside
  assert shape is not None
  batch, clips = batch_of(plan, cfg, shape), clips_of(plan, cfg, shape)
  most = plan.config.train.projector_max_frames
  program = compiled.grad.trace(graph, state, sums, batch, clips, projector_max_frames=most)
  size = held((batch, clips))
  return program, memory | {"batch": size}, optimizer | {"other batches": max(size, waiting(plan, cfg))}


def waiting(plan: Plan, cfg: VLMConfig) -> float:
  """Counts the bytes per device of a step's features, which wait for their micro-batches; 0 if the tower is trained."""
  if plan.config.train.vision:
    return 0.0
  sizes = {shape: held(batch_of(plan, cfg, shape).visual) for shape in plan.shapes}
  return max(sum(sizes[micro.shape] for micro in micros) for micros in plan.steps)


def held(tree: Any) -> float:
  """Bytes per device of arrays that have shardings."""
  leaves = jax.tree.leaves(tree)
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves))


def model_flops(plan: Plan, cfg: VLMConfig, name: str, shape: Shape | None) -> float:
  """Counts useful operations of a program on all devices as metrics.py does, as if one sample filled each row."""
  if name == "tower":
    clips = [Length(cfg.clip_frames, cfg.clip_frames, 0, 0)] * (cfg.clips_per_chunk * plan.mesh.size)
    return float(metrics.forward_flops(cfg, clips, pixels=True)["vision"].sum())
  if shape is None:  # the optimizer's step
    return 0.0
  each = cfg.clip_frames if shape.frames > 1 else 1
  rows = [Length(shape.frames, each, shape.prefix, shape.text)] * shape.rows
  if name == "gradient":
    return metrics.training_flops(cfg, plan.config.train, rows, pixels=plan.config.train.vision)
  parts = metrics.forward_flops(cfg, rows, pixels=False)
  logits = 2.0 * cfg.llm.width * cfg.llm.vocab_size * shape.rows * (shape.prefix + shape.text)  # prefill needs one
  return float(parts["projector"].sum() + parts["llm"].sum() - logits)


def executed_flops(cfg: VLMConfig, jaxpr: Any) -> cost.Flops:
  """Counts what a traced program computes on all devices; only kernels on the tower's tokens are not causal."""
  v = cfg.vision

  def causal(shape):
    return shape[-1] != v.width // v.heads or shape[-2] < cfg.clip_frames * v.patches

  return cost.count_flops(jaxpr, causal, cfg.llm.vocab_size)


@contextlib.contextmanager
def inside(plan: Plan) -> Generator[None]:
  """The devices, the mesh and the precision that training has."""
  precision = "highest" if plan.cfg.dtype == "float32" else None
  devices = list(plan.mesh.devices.flat)
  with absent.computing_on(devices), jax.set_mesh(plan.mesh), jax.default_matmul_precision(precision):
    yield


def compiled(lowered: Any, what: str, effort: float) -> tuple[Any, float]:
  """Compiles with the seconds on show, and can be interrupted.

  Returns:
    the program, or the compiler's refusal; and seconds.
  """
  result: list[Any] = []

  def run():
    try:
      result.append(lowered.compile({"exec_time_optimization_effort": effort} if effort else None))
    except BaseException as error:
      result.append(error)

  _trim()
  begun = time.perf_counter()
  thread = threading.Thread(target=run, daemon=True)
  shown = tqdm(desc=f"compiling {what}", bar_format="{desc}: {elapsed}", leave=False, disable=None)
  with cost.own_names(), shown as bar:
    thread.start()
    while thread.is_alive():
      thread.join(1.0)
      bar.update()
  out = result[0]
  refused = isinstance(out, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(out)
  if isinstance(out, BaseException) and not refused:
    raise out
  return out, time.perf_counter() - begun


def _trim() -> None:
  """Gives back what the last compilation has freed: glibc keeps it, 10 GB after seven programs of 28 layers."""
  with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
    ctypes.CDLL(None).malloc_trim(0)


def account(plan: Plan, name: str, shape: Shape | None = None) -> dict[str, Any]:
  """Compiles one program and says what it takes. Bytes and seconds are a device's, operations those of all.

  With fewer layers than there are, the numbers are those of the whole model: memory of the state and operations
  exactly, the rest extrapolated ("layers" says from how many). What touches the vocabulary is there once, whatever the
  layers.
  """
  cfg, full, vocabulary = plan.cfg, plan.full, plan.full.llm.vocab_size
  with inside(plan):
    program, given, beside = traced(plan, cfg, name, shape)
    flops = here = executed_flops(cfg, program.jaxpr)
    out, spent = compiled(program.lower(), name, plan.effort)
    trained = given.get("gradients", 0.0)
    if cfg != full:
      complete, given, beside = traced(plan, full, name, shape)
      flops = executed_flops(full, complete.jaxpr)
  row: dict[str, Any] = {"name": name, "shape": shape, "compile_s": spent}
  of = {"layers": cfg.vision.layers, "of": full.vision.layers} if name == "tower" else {"layers": cfg.llm.layers, "of": full.llm.layers}
  row |= of
  row["flops"] = {"model": model_flops(plan, full, name, shape), "executed": flops.total, "kernels": flops.kernels}
  unknown = flops.unknown
  if not flops.kernels and name != "apply" and kernels.card_of(plan.mesh.devices.flat[0]).platform == "gpu":
    unknown = unknown | {"attention in kernels"}  # those of Mosaic are not even named in the program
  row["not counted"], memory = sorted(unknown), given | beside
  if isinstance(out, jax.errors.JaxRuntimeError):
    temporary = _refused(str(out), sum(given.values()))
    memory |= {"temporaries": temporary, "program": 0.0, "reserve": plan.device.reserve}
    refused = {"hbm": 0.0, "collectives": {}, "seconds": {}, "estimate": None}
    return row | refused | {"memory": memory, "problem": one_line(out)[:400]}
  used = out.memory_analysis()
  temporary = float(used.temp_size_in_bytes + max(0, used.output_size_in_bytes - used.alias_size_in_bytes))
  code = float(used.generated_code_size_in_bytes)
  # The optimizer has no part that is told by the vocabulary: its traffic grows with all that is trained.
  once_by = (0, None) if name == "apply" else (vocabulary, vlm.VOCABULARY)
  layers, once = cost.read_program(out.as_text(), *once_by)
  sent, estimate = layers.plus(once).collectives, (out.cost_analysis() or {}).get("optimal_seconds", 0.0)
  hbm = layers.hbm + once.hbm
  if cfg != full:
    grows = given["gradients"] / trained if name == "apply" else _numbers(plan, full, name) / _numbers(plan, cfg, name)
    hbm = once.hbm + layers.hbm * ((flops.total - flops.once) / (here.total - here.once) if flops.total else grows)
    sent, estimate = layers.times(grows).plus(once).collectives, 0.0
    code *= row["of"] / row["layers"]
    if name == "apply":
      temporary *= grows
    if name == "gradient" and shape is not None:
      temporary += kept_between(plan, full, shape) - kept_between(plan, cfg, shape)
  row["memory"] = memory | {"temporaries": temporary, "program": code, "reserve": plan.device.reserve}
  seconds = cost.seconds(plan.device, flops.total / plan.device.count, hbm, sum(size for _, size in sent.values()))
  row |= {"hbm": hbm, "collectives": sent, "seconds": seconds, "problem": None}
  return row | {"estimate": estimate if estimate > 0 else None}


def kept_between(plan: Plan, cfg: VLMConfig, shape: Shape) -> float:
  """Bytes per device of the states that enter each layer and what its attention gave: `attention.remat` keeps these."""
  mesh, m = plan.mesh.shape, cfg.llm
  each = slots(cfg, shape) * shape.rows / (sharding.batch_devices(plan.mesh) * mesh["context"])
  return each * (m.width + m.heads * m.head_dim / mesh["tensor"]) * np.dtype(cfg.dtype).itemsize


def _numbers(plan: Plan, cfg: VLMConfig, name: str) -> int:
  """Parameters that a program computes with, those of the vocabulary aside."""
  parts = ("vision",) if name == "tower" else ("projector", "llm")
  if name == "gradient" and plan.config.train.vision:
    parts = ("vision", *parts)
  shapes = [entry.shape for entry in official.names(cfg) if entry.path.split("/")[0] in parts]
  return sum(math.prod(shape) for shape in shapes if cfg.llm.vocab_size not in shape)


def _refused(message: str, arguments: float) -> float:
  """Bytes of temporaries and results of a program that the compiler would not make; it calls all of it temporaries."""
  found = re.search(r"temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", message)
  return max(0.0, float(found[1] or found[2]) * cost.GIB - arguments) if found else 0.0
