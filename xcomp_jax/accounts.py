"""Compiles a program and says what it takes, of devices that need not be there."""

import contextlib
import ctypes
import math
import re
import threading
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from xcomp_jax import absent, cost, metrics, official, qc_comp, rounds, sharding
from xcomp_jax.config import VLMConfig
from xcomp_jax.data.batch import Length, Shape
from xcomp_jax.files import one_line
from xcomp_jax.model import lp_comp, vlm
from xcomp_jax.programs import Plan, slots, traced


def model_flops(plan: Plan, cfg: VLMConfig, name: str, shape: Shape | None) -> float | None:
  """Counts useful operations of a program on all devices as metrics.py does, as if one sample filled each row.

  None: of a program that pads and repeats nothing.
  """
  if name in ("tower", "encode"):
    clips = [Length(cfg.clip_frames, cfg.clip_frames, 0, 0)] * (cfg.clips_per_chunk * plan.mesh.size)
    return float(metrics.forward_flops(cfg, clips, pixels=True)["vision"].sum())
  if shape is None:  # the optimizer's step
    return 0.0
  each = cfg.clip_frames if shape.frames > 1 else 1
  rows = [Length(shape.frames, each, shape.prefix, shape.text)] * shape.rows
  if name == "gradient":
    return metrics.training_flops(cfg, plan.config.train, rows, pixels=plan.config.train.vision)
  if name not in ("evaluation", "prefill"):
    return None
  parts = metrics.forward_flops(cfg, rows, pixels=False)
  logits = 2.0 * cfg.llm.width * cfg.llm.vocab_size * shape.rows * (shape.prefix + shape.text)  # prefill needs one
  return float(parts["projector"].sum() + parts["llm"].sum() - (logits if name == "prefill" else 0.0))


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


def account_program(plan: Plan, name: str, shape: Shape | None = None) -> dict[str, Any]:
  """Compiles one program and says what it takes. Bytes and seconds are a device's, operations those of all.

  With fewer layers than there are, the numbers are those of the whole model: memory of the state and operations
  exactly, the rest extrapolated ("layers" says from how many). What touches the vocabulary is there once, whatever the
  layers.
  """
  cfg, full, vocabulary = plan.cfg, plan.full, plan.full.llm.vocab_size
  with inside(plan):
    part = traced(plan, cfg, name, shape)
    products = here = executed_flops(cfg, part.program.jaxpr)
    out, spent = compiled(part.program.lower(), name, plan.effort)
    whole = part
    if cfg != full:
      whole = traced(plan, full, name, shape)
      products = executed_flops(full, whole.program.jaxpr)
  vision = name in ("tower", "encode")
  layers, of = ((c.vision if vision else c.llm).layers for c in (cfg, full))
  row: dict[str, Any] = {"name": name, "shape": shape, "compile_s": spent, "layers": layers, "of": of}
  memory = whole.given | whole.beside
  refused = isinstance(out, jax.errors.JaxRuntimeError)
  text = "" if refused else out.as_text()
  squares = sum(_attended(full, name, shape)) / sum(_attended(cfg, name, shape))
  attending = len(_attended(full, name, shape)) / len(_attended(cfg, name, shape))
  found = {} if refused else cost.read_kernels(text)
  row["kernels"] = {kind: calls * attending for kind, (calls, _) in found.items()}
  kernels = products.kernels + plan.device.count * squares * sum(flops for _, flops in found.values())
  executed, model = products.products + kernels, model_flops(plan, full, name, shape)
  row["flops"] = {"model": executed if model is None else model, "executed": executed, "kernels": kernels}
  row["not counted"] = sorted(products.unknown) if not row["kernels"] else []
  if refused:
    temporary = _refused(str(out), sum(whole.given.values()))
    memory |= {"temporaries": temporary, "program": 0.0, "reserve": plan.device.reserve}
    nothing = {"hbm": 0.0, "collectives": {}, "seconds": {}, "estimate": None}
    return row | nothing | {"memory": memory, "problem": one_line(out)[:400]}
  used = out.memory_analysis()
  results = float(max(0, used.output_size_in_bytes - used.alias_size_in_bytes))
  temporary, code = float(used.temp_size_in_bytes), float(used.generated_code_size_in_bytes)
  # The optimizer has no part that is told by the vocabulary: its traffic grows with all that is trained.
  repeated, once = cost.read_program(text, *((0, None) if name == "apply" else (vocabulary, vlm.VOCABULARY)))
  sent, estimate = repeated.plus(once).collectives, (out.cost_analysis() or {}).get("optimal_seconds", 0.0)
  hbm = repeated.hbm + once.hbm
  if cfg != full:
    trained = "gradients" if name == "apply" else "parameters"
    grows = whole.given[trained] / part.given[trained] if name == "apply" else _numbers(plan, full, name) / _numbers(plan, cfg, name)
    work = (products.total - products.once) / (here.total - here.once) if products.total else grows
    hbm = once.hbm + repeated.hbm * work
    sent, estimate = repeated.times(grows).plus(once).collectives, 0.0
    more = results * (_size(whole.program.out_info) / _size(part.program.out_info) - 1)
    results += more
    if name in ("prefill", "round"):
      temporary += more  # caches as they are made, before there is room for an answer
    code *= of / layers
    if name == "apply":
      temporary *= grows
    if name == "gradient" and shape is not None:
      temporary += kept_between(plan, full, shape) - kept_between(plan, cfg, shape)
  row["memory"] = memory | {"results": results, "temporaries": temporary, "program": code, "reserve": plan.device.reserve}
  seconds = cost.seconds(plan.device, executed / plan.device.count, hbm, sum(size for _, size in sent.values()))
  row |= {"hbm": hbm, "collectives": sent, "seconds": seconds, "problem": None}
  return row | {"estimate": estimate if estimate > 0 else None}


def _size(tree: Any) -> float:
  """Bytes of arrays that have no shardings."""
  return float(sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)))


def _attended(cfg: VLMConfig, name: str, shape: Shape | None) -> list[float]:
  """The square of the slots that each layer attends with; for the tower, whose layers are alike, 1."""
  if shape is None or name in ("tower", "encode"):
    return [1.0] * cfg.vision.layers
  around, frames, counts = shape.samples * shape.prefix + shape.text, shape.frames, lp_comp.counts(cfg.lp_comp, cfg.llm.layers)
  if name == "round":  # of the last layer that scores, keys are enough
    around, frames = rounds.PREFIX, rounds.usual(cfg, shape.frames)[0].frames
    counts = counts[: max(1, qc_comp.scored_layers(rounds.USUAL, cfg.llm.layers)[-1])]
  return [float(around + frames * cfg.tokens_per_frame // cfg.lp_comp.group * count) ** 2 for count in counts]


def kept_between(plan: Plan, cfg: VLMConfig, shape: Shape) -> float:
  """Bytes per device of the states that enter each layer and what its attention gave: `attention.remat` keeps these."""
  mesh, m = plan.mesh.shape, cfg.llm
  each = slots(cfg, shape) * shape.rows / (sharding.batch_devices(plan.mesh) * mesh["context"])
  return each * (m.width + m.heads * m.head_dim / mesh["tensor"]) * np.dtype(cfg.dtype).itemsize


def _numbers(plan: Plan, cfg: VLMConfig, name: str) -> int:
  """Parameters that a program computes with, those of the vocabulary aside."""
  parts = ("vision",) if name in ("tower", "encode") else ("projector", "llm")
  if name == "gradient" and plan.config.train.vision:
    parts = ("vision", *parts)
  shapes = [entry.shape for entry in official.names(cfg) if entry.path.split("/")[0] in parts]
  return sum(math.prod(shape) for shape in shapes if cfg.llm.vocab_size not in shape)


def _refused(message: str, arguments: float) -> float:
  """Bytes of temporaries and results of a program that the compiler would not make; it calls all of it temporaries."""
  found = re.search(r"temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", message)
  return max(0.0, float(found[1] or found[2]) * cost.GIB - arguments) if found else 0.0
