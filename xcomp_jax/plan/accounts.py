"""Compiles a program and says what it takes, of devices that need not be there."""

import contextlib
import ctypes
import math
import re
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from xcomp_jax.config import VLMConfig
from xcomp_jax.data.batch import Length, Shape
from xcomp_jax.errors import one_line
from xcomp_jax.inference import rounds
from xcomp_jax.model import lp_comp, vlm
from xcomp_jax.parallel import roofline
from xcomp_jax.plan import absent, cost
from xcomp_jax.plan.programs import VISION, ProgramPlan, Traced, cut, trace_program
from xcomp_jax.progress import progress
from xcomp_jax.training import metrics


def model_flops(plan: ProgramPlan, cfg: VLMConfig, name: str, shape: Shape | None) -> float | None:
  """Counts useful operations of a program on all devices as metrics.py does, as if one sample
  filled each row.

  None: of a program that pads and repeats nothing.
  """
  if name in VISION:
    clips = [Length(cfg.clip_frames, cfg.clip_frames, 0, 0)] * (
      cfg.clips_per_chunk * plan.mesh.size
    )
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
  # prefill needs one
  logits = 2.0 * cfg.llm.width * cfg.llm.vocab_size * shape.rows * (shape.prefix + shape.text)
  return float(
    parts["projector"].sum() + parts["llm"].sum() - (logits if name == "prefill" else 0.0)
  )


def executed_flops(cfg: VLMConfig, jaxpr: Any) -> cost.Flops:
  """Counts what a traced program computes on all devices; only kernels on the tower's tokens are
  not causal.
  """
  v = cfg.vision

  def causal(shape):
    return shape[-1] != v.width // v.heads or shape[-2] < cfg.clip_frames * v.patches

  return cost.count_flops(jaxpr, causal, cfg.llm.vocab_size)


@contextlib.contextmanager
def inside(plan: ProgramPlan) -> Generator[None]:
  """The devices, the mesh and the precision that training has."""
  precision = "highest" if plan.full.dtype == "float32" else None
  devices = list(plan.mesh.devices.flat)
  with (
    absent.computing_on(devices),
    jax.set_mesh(plan.mesh),
    jax.default_matmul_precision(precision),
  ):
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
  shown = progress(desc=f"compiling {what}", bar_format="{desc}{elapsed}", leave=False)
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
  """Gives back what the last compilation has freed: glibc keeps it, 10 GB after seven programs of
  28 layers.
  """
  with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
    ctypes.CDLL(None).malloc_trim(0)


class Taken(NamedTuple):
  """What a compiled program takes, on one device.

  problem: the compiler's refusal; the rest then means nothing. temporaries, results, code, hbm:
  bytes. sent: kind of a collective -> (how many, bytes). kernels: kind -> (calls, operations).
  products: of all devices. estimate: the compiler's own seconds.
  """

  problem: str | None
  temporaries: float
  results: float
  code: float
  hbm: float
  sent: dict[str, tuple[float, float]]
  kernels: dict[str, tuple[float, float]]
  products: cost.Flops
  estimate: float
  seconds: float


def compiled_account(plan: ProgramPlan, cfg: VLMConfig, name: str, shape: Shape | None) -> Taken:
  """Compiles a program of a model and reads what it takes."""
  with inside(plan):
    program = trace_program(plan, cfg, name, shape).program
    products = executed_flops(cfg, program.jaxpr)
    out, spent = compiled(program.lower(), name, plan.effort)
  if isinstance(out, jax.errors.JaxRuntimeError):
    return Taken(str(out), 0.0, 0.0, 0.0, 0.0, {}, {}, products, 0.0, spent)
  used, text = out.memory_analysis(), out.as_text()
  repeated, once = cost.read_program(text, cfg.llm.vocab_size, vlm.VOCABULARY)
  everything = repeated.plus(once)
  results = float(max(0, used.output_size_in_bytes - used.alias_size_in_bytes))
  return Taken(
    None,
    float(used.temp_size_in_bytes),
    results,
    float(used.generated_code_size_in_bytes),
    everything.hbm,
    everything.collectives,
    cost.read_kernels(text),
    products,
    (out.cost_analysis() or {}).get("optimal_seconds", 0.0),
    spent,
  )


def account_program(plan: ProgramPlan, name: str, shape: Shape | None = None) -> dict[str, Any]:
  """Compiles one program and says what it takes. Bytes and seconds are a device's, operations those
  of all.

  Of a plan with fewer layers (`Plan.layers`) the numbers are those of the whole model. State, what
  is given, and operations are exact. The rest is extrapolated (`_extrapolated`).
  """
  full = plan.full
  vision = name in VISION
  of = (full.vision if vision else full.llm).layers
  least = 2 if name == "round" else 1  # of a model of one layer a round makes nothing but keys
  layers = of if plan.layers is None else min(max(plan.layers, least), of)
  with inside(plan):
    whole = trace_program(plan, full, name, shape)
    products = executed_flops(full, whole.program.jaxpr)
  found = (
    compiled_account(plan, full, name, shape)
    if layers == of
    else _extrapolated(plan, name, shape, layers, of, whole)
  )
  row: dict[str, Any] = {
    "name": name,
    "shape": shape,
    "compile_s": found.seconds,
    "layers": layers,
    "of": of,
  }
  memory = whole.given | whole.beside
  row["kernels"] = {kind: calls for kind, (calls, _) in found.kernels.items()}
  kernels = products.kernels + plan.device.count * sum(flops for _, flops in found.kernels.values())
  executed, model = products.products + kernels, model_flops(plan, full, name, shape)
  row["flops"] = {
    "model": executed if model is None else model,
    "executed": executed,
    "kernels": kernels,
  }
  row["not counted"] = sorted(products.unknown) if not row["kernels"] else []
  if found.problem:
    temporary = _refused(found.problem, sum(whole.given.values()))
    memory |= {"temporaries": temporary, "program": 0.0, "reserve": plan.device.reserve}
    nothing = {"hbm": 0.0, "collectives": {}, "seconds": {}, "estimate": None}
    return row | nothing | {"memory": memory, "problem": one_line(found.problem)[:400]}
  row["memory"] = memory | {
    "results": found.results,
    "temporaries": found.temporaries,
    "program": found.code,
    "reserve": plan.device.reserve,
  }
  seconds = roofline.least_seconds(
    plan.device,
    executed / plan.device.count,
    found.hbm,
    sum(size for _, size in found.sent.values()),
  )
  row |= {"hbm": found.hbm, "collectives": found.sent, "seconds": seconds, "problem": None}
  return row | {"estimate": found.estimate if found.estimate > 0 else None}


def _extrapolated(
  plan: ProgramPlan, name: str, shape: Shape | None, layers: int, of: int, whole: Traced
) -> Taken:
  """Compiles a program with so many layers, and with one more, and says what it takes with all.

  Those of the LLM see as many tokens as its first one; the others' share in traffic and collectives
  is found by two more programs, whose layers see as many as its last. So is memory of what is kept
  for the backward pass; where nothing is, the first program has that of all.
  """
  full = plan.full
  counts = lp_comp.counts(full.lp_comp, full.llm.layers)
  with inside(plan):
    part = trace_program(plan, cut(full, layers, counts[0]), name, shape)
  first = compiled_account(plan, cut(full, layers, counts[0]), name, shape)
  if first.problem:
    return first
  if name == "apply":
    grows = whole.given["gradients"] / part.given["gradients"]
    sent = {kind: (n * grows, size * grows) for kind, (n, size) in first.sent.items()}
    return first._replace(
      temporaries=first.temporaries * grows,
      code=first.code * of / layers,
      hbm=first.hbm * grows,
      sent=sent,
      estimate=0.0,
    )
  # Of a round the layers after the last one that scores don't run, and of that one only the keys
  # are made.
  run = (
    rounds.scored_layer_count
    if name == "round"
    else lambda cfg: (cfg.vision if name in VISION else cfg.llm).layers
  )
  here, all_of_them = run(cut(full, layers, counts[0])), run(full)
  longer = next(n for n in range(layers + 1, layers + 3) if run(cut(full, n, counts[0])) > here)
  more = run(cut(full, longer, counts[0])) - here
  programs = [first, compiled_account(plan, cut(full, longer, counts[0]), name, shape)]
  if name not in VISION and counts[-1] != counts[0]:
    programs += [
      compiled_account(plan, cut(full, n, counts[-1]), name, shape) for n in (layers, longer)
    ]

  def grown(numbers: Sequence[float]) -> float:
    """A number that each layer adds to: something whatever its tokens, and something for each of
    them.
    """
    wide = (numbers[1] - numbers[0]) / more
    narrow = (numbers[3] - numbers[2]) / more if len(numbers) > 2 else wide
    slope = (wide - narrow) / max(counts[0] - counts[-1], 1)
    each = (
      [narrow + slope * (count - counts[-1]) for count in counts[:all_of_them]]
      if name not in VISION
      else [wide] * all_of_them
    )
    return max(0.0, numbers[0] - here * wide + sum(each))

  sent = {
    kind: (
      grown([t.sent.get(kind, (0.0, 0.0))[0] for t in programs]),
      grown([t.sent.get(kind, (0.0, 0.0))[1] for t in programs]),
    )
    for kind in sorted(set().union(*(t.sent for t in programs)))
  }
  results = first.results * _size(whole.program.out_info) / _size(part.program.out_info)
  temporaries = (
    _caching(first, programs[-1], results) if name in ("prefill", "round") else first.temporaries
  )
  if name in ("gradient", "evaluation"):
    temporaries = grown([t.temporaries for t in programs])
  squares, part_squares = (
    _attended(full, name, shape),
    _attended(cut(full, layers, counts[0]), name, shape),
  )
  kernels = {
    kind: (calls * len(squares) / len(part_squares), flops * sum(squares) / sum(part_squares))
    for kind, (calls, flops) in first.kernels.items()
  }
  hbm, seconds = grown([t.hbm for t in programs]), sum(t.seconds for t in programs)
  return Taken(
    None,
    temporaries,
    results,
    first.code * of / layers,
    hbm,
    sent,
    kernels,
    first.products,
    0.0,
    seconds,
  )


def _caching(first: Taken, last: Taken, results: float) -> float:
  """Bytes of temporaries where layers leave caches: at the beginning, or at the end, when there are
  those of all layers.
  """
  return max(first.temporaries, last.temporaries + max(0.0, results - last.results))


def memory_of(plan: ProgramPlan, name: str, shape: Shape | None = None) -> dict[str, float]:
  """Bytes of a device by kind while a program runs, as of `account_program`, but compiling less.

  Raises:
    JaxRuntimeError: the compiler refuses the program.
  """
  full, layers = plan.full, plan.layers or plan.full.llm.layers
  counts = lp_comp.counts(full.lp_comp, full.llm.layers)
  if name == "gradient":  # each layer adds to it
    row = account_program(plan, name, shape)
    if row["problem"]:
      raise jax.errors.JaxRuntimeError(row["problem"])
    return {
      kind: size for kind, size in row["memory"].items() if kind not in ("program", "reserve")
    }
  like = [
    cut(full, layers, count)
    for count in ((counts[0], counts[-1]) if name in ("prefill", "round") else (counts[0],))
  ]
  with inside(plan):
    whole, part = trace_program(plan, full, name, shape), trace_program(plan, like[0], name, shape)
  programs = [compiled_account(plan, cfg, name, shape) for cfg in like]
  if problem := next((one.problem for one in programs if one.problem), None):
    raise jax.errors.JaxRuntimeError(problem)
  results, temporaries = (
    programs[0].results * _size(whole.program.out_info) / _size(part.program.out_info),
    programs[0].temporaries,
  )
  if name == "apply":
    temporaries *= whole.given["gradients"] / part.given["gradients"]
  if name in ("prefill", "round"):
    temporaries = _caching(programs[0], programs[-1], results)
  return whole.given | whole.beside | {"results": results, "temporaries": temporaries}


def _size(tree: Any) -> float:
  """Bytes of arrays that have no shardings."""
  return float(sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)))


def _attended(cfg: VLMConfig, name: str, shape: Shape | None) -> list[float]:
  """The square of the slots that each layer attends with; for the tower, whose layers are alike,
  1.
  """
  if shape is None or name in VISION:
    return [1.0] * cfg.vision.layers
  around, frames, counts = (
    shape.samples * shape.prefix + shape.text,
    shape.frames,
    lp_comp.counts(cfg.lp_comp, cfg.llm.layers),
  )
  if name == "round":  # of the last layer that scores, keys are enough
    around, frames = rounds.PREFIX, rounds.usual(cfg, shape.frames)[0].frames
    counts = counts[: rounds.scored_layer_count(cfg)]
  return [
    float(around + frames * cfg.tokens_per_frame // cfg.lp_comp.group * count) ** 2
    for count in counts
  ]


def _refused(message: str, arguments: float) -> float:
  """Bytes of temporaries and results of a program that the compiler would not make; it calls all of
  it temporaries.
  """
  found = re.search(r"temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", message)
  return max(0.0, float(found[1] or found[2]) * cost.GIB - arguments) if found else 0.0
