"""The programs of a run, compiled for devices that need not be there, and what each of them takes.

A TPU topology's come from the TPU compiler itself (libtpu), without a TPU.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from xcomp_jax import absent, cost, generate, metrics, official, optim, sharding, steps, weights
from xcomp_jax.config import ConfigError, RunConfig, VLMConfig, check
from xcomp_jax.data import pipeline
from xcomp_jax.data.batch import Batch, Bucket, batch_spec
from xcomp_jax.files import one_line
from xcomp_jax.model import lp_comp, vlm

GRADIENTS = ("features", "frames")
TRAINING = (*GRADIENTS, "apply")
NAMES = (*TRAINING, "prefill", "tower")
ROOM = 64  # tokens to answer that prefill makes room for
RELEASED = pathlib.Path(__file__).parents[1] / "configs"  # has the config.json of released checkpoints, by hub id


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is planned.

  cfg: the model as compiled. full: with all of its layers. bucket: the largest, `rows` samples of it. effort: of the
  compiler, from -1 (an eighth of the time, a tenth more of temporaries) to 0 (as it is for training).
  """

  config: RunConfig
  cfg: VLMConfig
  full: VLMConfig
  mesh: Mesh
  device: cost.Device
  bucket: Bucket
  rows: int
  effort: float


# --- what is asked for ------------------------------------------------------------------------------------------------


def topology(name: str) -> list[Any]:
  """The devices of a TPU topology such as "v5e:4x4", to compile for only.

  Raises:
    ConfigError: no libtpu, or no such topology.
  """
  # Outside of a Google cloud nothing answers libtpu's questions; nothing here touches a TPU, so its lock is not needed.
  for key, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
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
      f"--topology={name}: {one_line(error)}. Write the version and the shape, such as v5e:2x2, v5e:16x16, v5p:2x2x2, v6e:4x4"
    ) from error


def sizes(config: RunConfig) -> VLMConfig:
  """The model's sizes: from `init_from` if it is a directory, of a released checkpoint without a network, else as in training."""
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


def slots(cfg: VLMConfig, bucket: Bucket) -> list[int]:
  """Tokens of one sample in every layer, padding included."""
  groups = bucket.frames * cfg.tokens_per_frame // cfg.lp_comp.group
  return [bucket.prefix + groups * count + bucket.text for count in lp_comp.counts(cfg.lp_comp, cfg.llm.layers)]


def largest(config: RunConfig, cfg: VLMConfig, mesh: Mesh, frames: int | None, text: int | None) -> tuple[Bucket, int]:
  """The bucket with most tokens in all layers, and its rows; `frames` and `text` fix its sizes.

  Raises:
    ConfigError: frames that don't fill clips.
  """
  if frames is not None and (frames < 1 or (frames % cfg.clip_frames and frames != 1)):
    raise ConfigError(f"--frames {frames}: must be 1, or a multiple of the {cfg.clip_frames} frames of a clip")
  data = config.data
  rows = pipeline.rows_of(data, sharding.batch_devices(mesh), config.train.batch_size)
  found = []
  for f in data.frame_buckets if frames is None else (frames,):
    clip = cfg.clip_frames if f > 1 else 1
    found += [Bucket(f // clip, clip, data.prefix_length, t) for t in (data.text_buckets if text is None else (text,))]
  tokens = lambda b: rows(b) * (sum(slots(cfg, b)) - cfg.llm.layers * b.prefix)
  bucket = max(found, key=lambda b: (tokens(b), b))  # of as many tokens the longest sequences, whose attention takes most
  return bucket, rows(bucket)


def make(
  config: RunConfig,
  where: str | None,
  *,
  layers: int | None = None,
  frames: int | None = None,
  text: int | None = None,
  effort: float = 0.0,
) -> Plan:
  """A plan for a topology, or for the devices that are here.

  Raises:
    ConfigError: values that can't be.
    CheckpointError: no such checkpoint.
  """
  check(config)
  devices = jax.devices() if where is None else topology(where)
  full = sizes(config)
  mesh = sharding.make_mesh(config.mesh, devices, config.train.batch_size, sharding.sequence_parts(full, config.data))
  sharding.check_mesh(mesh, full, config.data)
  steps.row_shares(mesh)  # refuses what training would
  bucket, rows = largest(config, full, mesh, frames, text)
  return Plan(config, cut(full, layers), full, mesh, cost.device_of(devices), bucket, rows, effort)


# --- programs ---------------------------------------------------------------------------------------------------------


def batch_of(plan: Plan, cfg: VLMConfig, visual: str) -> Batch:
  """A batch of ShapeDtypeStructs with shardings, of "frames" or "features"."""
  side = cfg.vision.image_size
  row = {
    "frames": ((plan.bucket.clip_frames, side, side, 3), np.dtype(np.uint8)),
    "features": ((plan.bucket.clip_frames * cfg.tokens_per_frame, cfg.vision.width), np.dtype("bfloat16")),
  }[visual]
  spec = batch_spec(plan.bucket, plan.rows, row)
  place = lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at)
  return jax.tree.map(place, spec, steps.batch_shardings(spec, plan.mesh))


def training(plan: Plan, cfg: VLMConfig) -> tuple[Any, nnx.GraphDef, steps.TrainState, steps.Sums]:
  """The optimizer, the model's graph, and state and sums as ShapeDtypeStructs with shardings."""
  tx = optim.optimizer(plan.config.optim, 1000)
  graph, state = steps.abstract_state(plan.config, cfg, tx, plan.mesh)
  number = jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(plan.mesh))
  grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, np.float32, sharding=p.sharding), state.trained)
  return tx, graph, state, steps.Sums(grads, number, number, number)


def traced(plan: Plan, cfg: VLMConfig, name: str) -> tuple[Any, dict[str, float]]:
  """A program traced for the mesh, and the bytes per device of what is there while it runs, temporaries aside.

  One batch is copied while another is computed on, so training holds two.
  """
  if name in TRAINING:
    tx, graph, state, sums = training(plan, cfg)
    compiled = steps.compiled_steps(state, sums, plan.mesh)
    memory = {
      "parameters": held(state.trained) + held(state.frozen), "optimizer state": held(state.opt), "gradients": held(sums)
    }  # fmt: skip
    if name == "apply":
      return compiled.apply.trace(tx, state, sums), memory | {"batch": 0.0}
    batch = batch_of(plan, cfg, name)
    frames = plan.config.train.projector_max_frames
    return compiled.grad.trace(graph, state, sums, batch, projector_max_frames=frames), memory | {"batch": 2 * held(batch)}
  graph, params = nnx.split(weights.abstract(cfg))
  place = lambda p, at: jax.ShapeDtypeStruct(p.shape, np.dtype(cfg.dtype), sharding=at)
  params = jax.tree.map(place, params, sharding.param_shardings(params, plan.mesh))
  batch = batch_of(plan, cfg, "frames" if name == "tower" else "features")
  memory = {"parameters": held(params), "batch": held(batch)}
  if name == "tower":
    return jax.jit(lambda p, frames: vlm.encode(nnx.merge(graph, p), frames)).trace(params, batch.visual), memory
  return jax.jit(lambda p, batch: generate.prefill(nnx.merge(graph, p), batch, ROOM)).trace(params, batch), memory


def held(tree: Any) -> float:
  """Bytes per device of arrays that have shardings."""
  size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
  return float(sum(map(size, jax.tree.leaves(tree))))


def model_flops(plan: Plan, cfg: VLMConfig, name: str) -> float:
  """Useful operations of a program on all devices, as metrics.py counts them; 0 for the optimizer's step."""
  if name == "apply":
    return 0.0
  n = plan.rows
  full = lambda most: np.full(n, most, np.int32)
  spec = dataclasses.replace(
    batch_of(plan, cfg, "features" if name in ("features", "prefill") else "frames"), clips=full(plan.bucket.clips),
    prefix_length=full(plan.bucket.prefix), text_length=full(plan.bucket.text), weight=np.ones(n, np.float32),
  )  # fmt: skip
  if name in TRAINING:
    return metrics.training_flops(cfg, plan.config.train, spec)
  parts = metrics.forward_flops(cfg, spec)
  if name == "tower":
    return parts["vision"]
  rows = n * (plan.bucket.prefix + plan.bucket.text)  # of logits; prefill needs one
  return parts["projector"] + parts["llm"] - 2.0 * cfg.llm.width * cfg.llm.vocab_size * rows


def executed_flops(cfg: VLMConfig, jaxpr: Any) -> cost.Flops:
  """What a traced program computes on all devices; the kernels on the tower's tokens are the ones that are not causal."""
  v = cfg.vision
  tower = lambda shape: shape[-1] == v.width // v.heads and shape[-2] >= cfg.clip_frames * v.patches
  return cost.count_flops(jaxpr, lambda shape: not tower(shape), cfg.llm.vocab_size)


@contextlib.contextmanager
def inside(plan: Plan) -> Generator[None]:
  """The devices, the mesh and the precision that training has."""
  precision = "highest" if plan.cfg.dtype == "float32" else None
  with absent.computing_on(list(plan.mesh.devices.flat)), jax.set_mesh(plan.mesh), jax.default_matmul_precision(precision):
    yield


def compiled(lowered: Any, what: str, effort: float) -> tuple[Any, float]:
  """Compiles with the seconds on show, and can be interrupted; returns the program, or the compiler's refusal, and seconds."""
  result: list[Any] = []

  def run():
    try:
      result.append(lowered.compile({"exec_time_optimization_effort": effort} if effort else None))
    except BaseException as error:
      result.append(error)

  _trim()
  begun = time.perf_counter()
  thread = threading.Thread(target=run, daemon=True)
  with cost.own_names(), tqdm(desc=f"compiling {what}", bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:
    thread.start()
    while thread.is_alive():
      thread.join(1.0)
      bar.update()
  out = result[0]
  if isinstance(out, BaseException) and not (isinstance(out, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(out)):
    raise out
  return out, time.perf_counter() - begun


def _trim() -> None:
  """Gives back what the last compilation has freed: glibc keeps it, and after seven programs of 28 layers that was 10 GB."""
  with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
    ctypes.CDLL(None).malloc_trim(0)


def account(plan: Plan, name: str, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Compiles one program and says what it takes: a dict for JSON. Bytes and seconds are a device's, operations those of all.

  known: what this gave before, with the same compiler and plan; it is given again if the program is still the same.

  With fewer layers than there are, the numbers are those of the whole model: memory of the state and operations exactly,
  the rest extrapolated ("layers" says from how many). What touches the vocabulary is there once, whatever the layers.
  """
  cfg, full, vocabulary = plan.cfg, plan.full, plan.full.llm.vocab_size
  with inside(plan):
    program, memory = traced(plan, cfg, name)
    flops = here = executed_flops(cfg, program.jaxpr)
    lowered = program.lower()
    digest = hashlib.blake2b(lowered.as_text().encode(), digest_size=8).hexdigest()
    if known and known.get("program") == digest:
      return dict(known)
    out, spent = compiled(lowered, name, plan.effort)
    if cfg != full:
      complete, memory = traced(plan, full, name)
      flops = executed_flops(full, complete.jaxpr)
  row: dict[str, Any] = {"name": name, "program": digest, "compile_s": spent, "layers": cfg.llm.layers, "of": full.llm.layers, "effort": plan.effort}
  row["flops"] = {"model": model_flops(plan, full, name), "executed": flops.total, "kernels": flops.kernels}
  row["not counted"] = sorted(flops.unknown)
  if isinstance(out, jax.errors.JaxRuntimeError):
    unseen = memory["optimizer state"] + memory["batch"] / 2 if name in GRADIENTS else 0.0
    temporary = _refused(str(out), sum(memory.values()) - unseen)
    memory |= {"temporaries": temporary, "program": 0.0, "reserve": plan.device.reserve}
    refused = {"hbm": 0.0, "collectives": {}, "seconds": {}, "estimate": None}
    return row | refused | {"memory": memory, "problem": one_line(out)[:400]}
  used = out.memory_analysis()
  temporary = float(used.temp_size_in_bytes + max(0, used.output_size_in_bytes - used.alias_size_in_bytes))
  code = float(used.generated_code_size_in_bytes)
  layers, once = cost.read_program(out.as_text(), vocabulary, vlm.VOCABULARY)
  sent, estimate = layers.plus(once).collectives, (out.cost_analysis() or {}).get("optimal_seconds", 0.0)
  hbm = layers.hbm + once.hbm
  if cfg != full:
    grows = _numbers(full, name) / _numbers(cfg, name)
    hbm = once.hbm + layers.hbm * ((flops.total - flops.once) / (here.total - here.once) if flops.total else grows)
    sent, estimate = layers.times(grows).plus(once).collectives, 0.0
    code *= full.llm.layers / cfg.llm.layers
    temporary += kept_between(plan, full) - kept_between(plan, cfg) if name in GRADIENTS else 0.0
  row["memory"] = memory | {"temporaries": temporary, "program": code, "reserve": plan.device.reserve}
  seconds = cost.seconds(plan.device, flops.total / plan.device.count, hbm, sum(size for _, size in sent.values()))
  row |= {"hbm": hbm, "collectives": sent, "seconds": seconds, "problem": None}
  return row | {"estimate": estimate if estimate > 0 else None}


def kept_between(plan: Plan, cfg: VLMConfig) -> float:
  """Bytes per device of the states that enter each layer and what its attention gave: `attention.remat` keeps these."""
  rows, m = plan.rows // sharding.batch_devices(plan.mesh), cfg.llm
  return float(rows * sum(slots(cfg, plan.bucket)) * (m.width + m.heads * m.head_dim) * np.dtype(cfg.dtype).itemsize)


def _numbers(cfg: VLMConfig, name: str) -> int:
  """Parameters that a program computes with, those of the vocabulary aside."""
  parts = {"frames": ("vision", "projector", "llm"), "tower": ("vision",)}.get(name, ("projector", "llm"))
  return sum(
    math.prod(e.shape) for e in official.names(cfg) if e.path.split("/")[0] in parts and cfg.llm.vocab_size not in e.shape
  )


def _refused(message: str, arguments: float) -> float:
  """Bytes of temporaries and results of a program that the compiler would not make; what it calls temporaries is all."""
  found = re.search(r"temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", message)
  return max(0.0, float(found[1] or found[2]) * cost.GIB - arguments) if found else 0.0
