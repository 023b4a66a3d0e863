"""Compiles a program and says what it takes, of devices that need not be there."""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from xcomp_jax.config import VLMConfig
from xcomp_jax.data.batch import Length, Shape
from xcomp_jax.errors import one_line
from xcomp_jax.inference import rounds
from xcomp_jax.model import lp_comp
from xcomp_jax.parallel import roofline
from xcomp_jax.parallel.chips import GIB
from xcomp_jax.plan import cost, hlo
from xcomp_jax.plan.programs import VISION, ProgramPlan, Traced, cut, inside, trace_program
from xcomp_jax.progress import progress
from xcomp_jax.training import metrics
from xcomp_jax.training.costs import row_slots


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
  size, tokens = cfg.vision.width // cfg.vision.heads, cfg.clip_frames * cfg.vision.patches
  return cost.count_flops(jaxpr, lambda shape: shape[-1] != size or shape[-2] < tokens)


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
  with progress(desc=f"compiling {what}", bar_format="{desc}{elapsed}", leave=False) as bar:
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


Compile = Callable[[Any, str, float], tuple[Any, float]]  # as `compiled`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """What the compiler says of a program, for one device.

  problem: its refusal; the rest then means nothing. temporaries, results, code: bytes. seconds:
  those of compiling.
  """

  problem: str | None = None
  temporaries: float = 0.0
  results: float = 0.0
  code: float = 0.0
  costs: hlo.Costs = dataclasses.field(default_factory=hlo.Costs)
  seconds: float


def compile_program(
  plan: ProgramPlan, cfg: VLMConfig, name: str, shape: Shape | None, compile: Compile = compiled
) -> Compiled:
  """Compiles a program of a model and reads what it takes."""
  with inside(plan):
    lowered = trace_program(plan, cfg, name, shape).program.lower()
    out, spent = compile(lowered, name, plan.effort)
  if isinstance(out, jax.errors.JaxRuntimeError):
    return Compiled(problem=str(out), seconds=spent)
  used = out.memory_analysis()
  return Compiled(
    temporaries=float(used.temp_size_in_bytes),
    results=float(max(0, used.output_size_in_bytes - used.alias_size_in_bytes)),
    code=float(used.generated_code_size_in_bytes),
    costs=hlo.read_costs(out.as_text()),
    seconds=spent,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramAccount:
  """What a program takes. Bytes and seconds are a device's, operations those of all devices.

  shape: of the batch that it takes; None: it takes none. layers: those compiled; of: those that
  the model has. memory: bytes by kind. model: operations that the results need. executed: those
  that are computed, in_kernels: of these, those of attention's kernels. not_counted: kernels whose
  operations are not among these. kernels: calls by kind. hbm: bytes read and written. collectives:
  kind -> (how many, bytes sent). seconds: the least time, by what bounds it. problem: the
  compiler's refusal, as one line; there are no traffic and no seconds then.
  """

  name: str
  shape: Shape | Any  # None: it takes no batch
  layers: int
  of: int
  memory: dict[str, float]
  model: float
  executed: float
  in_kernels: float
  not_counted: list[str]
  kernels: dict[str, float]
  hbm: float
  collectives: dict[str, tuple[float, float]]
  seconds: dict[str, float]
  problem: str | None
  compile_s: float


def account_program(
  plan: ProgramPlan, name: str, shape: Shape | None = None, compile: Compile = compiled
) -> ProgramAccount:
  """Compiles one program and says what it takes.

  Of a plan with fewer layers (`Plan.layers`) the numbers are those of the whole model. State, what
  is given, and operations are exact. The rest is extrapolated (`_extrapolated`).
  """
  full, device = plan.full, plan.device
  of = _layers(full, name)
  least = 2 if name == "round" else 1  # of a model of one layer a round makes nothing but keys
  layers = of if plan.layers is None else min(max(plan.layers, least), of)
  whole = trace_program(plan, full, name, shape)
  counted = executed_flops(full, whole.program.jaxpr)
  found = (
    compile_program(plan, full, name, shape, compile)
    if layers == of
    else _extrapolated(plan, name, shape, layers, whole, compile)
  )
  costs, memory = found.costs, whole.given | whole.beside
  in_kernels = counted.kernels + device.count * sum(flops for _, flops in costs.kernels.values())
  executed, model = counted.products + in_kernels, model_flops(plan, full, name, shape)
  if found.problem:
    refused = refused_bytes(found.problem, sum(whole.given.values()))
    made, seconds = {"temporaries": refused, "program": 0.0}, {}
  else:
    made = {"results": found.results, "temporaries": found.temporaries, "program": found.code}
    sent = sum(size for _, size in costs.collectives.values())
    seconds = roofline.least_seconds(device, executed / device.count, costs.hbm, sent)
  return ProgramAccount(
    name=name,
    shape=shape,
    layers=layers,
    of=of,
    memory=memory | made | {"reserve": device.reserve},
    model=executed if model is None else model,
    executed=executed,
    in_kernels=in_kernels,
    not_counted=[] if costs.kernels else sorted(counted.unknown),
    kernels={kind: calls for kind, (calls, _) in costs.kernels.items()},
    hbm=costs.hbm,
    collectives=costs.collectives,
    seconds=seconds,
    problem=one_line(found.problem)[:400] if found.problem else None,
    compile_s=found.seconds,
  )


# --- from few layers to all
# ----------------------------------------------------------------------------------------

CACHING = ("prefill", "round")  # whose layers leave caches


def _extrapolated(
  plan: ProgramPlan, name: str, shape: Shape | None, layers: int, whole: Traced, compile: Compile
) -> Compiled:
  """Compiles a program with so many layers, and with one more, and says what it takes with all.

  Those of the LLM see as many tokens as its first one; the others' share in traffic and collectives
  is found by two more programs, whose layers see as many as its last. So is memory of what is kept
  for the backward pass; where nothing is, the first program has that of all.
  """
  full, of = plan.full, _layers(plan.full, name)
  counts = lp_comp.counts(full.lp_comp, full.llm.layers)

  def made(layers: int, count: int) -> Compiled:
    return compile_program(plan, cut(full, layers, count), name, shape, compile)

  cfg, first = cut(full, layers, counts[0]), made(layers, counts[0])
  if first.problem:
    return first
  part = trace_program(plan, cfg, name, shape)
  if name == "apply":
    return _of_more_state(first, whole.given["gradients"] / part.given["gradients"], of / layers)
  here = _running(cfg, name)
  longer = next(
    n for n in itertools.count(layers + 1) if _running(cut(full, n, counts[0]), name) != here
  )
  programs = [first, made(longer, counts[0])]
  if name not in VISION and counts[-1] != counts[0]:
    programs += [made(layers, counts[-1]), made(longer, counts[-1])]
  all_layers = functools.partial(
    grown,
    here=here,
    more=_running(cut(full, longer, counts[0]), name) - here,
    tokens=(1,) * of if name in VISION else counts[: _running(full, name)],
    ends=(counts[0], counts[-1]),
  )
  results = first.results * _growth_of_results(whole, part)
  temporaries = _temporaries(name, first, programs[-1], results)
  if name in ("gradient", "evaluation"):
    temporaries = all_layers([program.temporaries for program in programs])
  collectives = {}
  for kind in sorted(set().union(*(program.costs.collectives for program in programs))):
    each = [program.costs.collectives.get(kind, (0.0, 0.0)) for program in programs]
    collectives[kind] = all_layers([n for n, _ in each]), all_layers([size for _, size in each])
  squares, some = _attended(full, name, shape), _attended(cfg, name, shape)
  kernels = {
    kind: (calls * len(squares) / len(some), flops * sum(squares) / sum(some))
    for kind, (calls, flops) in first.costs.kernels.items()
  }
  return Compiled(
    temporaries=temporaries,
    results=results,
    code=first.code * of / layers,
    costs=hlo.Costs(all_layers([p.costs.hbm for p in programs]), collectives, kernels),
    seconds=sum(program.seconds for program in programs),
  )


def grown(
  numbers: Sequence[float], here: int, more: int, tokens: Sequence[int], ends: tuple[int, int]
) -> float:
  """Gives a number of a program with all layers, from those of programs with few.

  Each layer adds to it: something whatever its tokens, and something for each of them.

  Args:
    numbers: of a program of `here` layers and of one of `more` beyond these, whose layers see as
      many tokens as the first one of all; maybe of two more, which see as many as the last.
    here: see `numbers`.
    more: likewise.
    tokens: that each layer sees, of all.
    ends: that the first and the last layer see.
  """
  wide = (numbers[1] - numbers[0]) / more
  narrow = (numbers[3] - numbers[2]) / more if len(numbers) > 2 else wide
  slope = (wide - narrow) / max(ends[0] - ends[1], 1)
  return max(
    0.0, numbers[0] - here * wide + sum(narrow + slope * (count - ends[1]) for count in tokens)
  )


def _layers(cfg: VLMConfig, name: str) -> int:
  """Layers of what a program runs: of the tower, or of the LLM."""
  return (cfg.vision if name in VISION else cfg.llm).layers


def _running(cfg: VLMConfig, name: str) -> int:
  """Layers that run in a program: of a round those before the last one that scores, of which only
  the keys are made.
  """
  return rounds.scored_layer_count(cfg) if name == "round" else _layers(cfg, name)


def _of_more_state(first: Compiled, grows: float, layers: float) -> Compiled:
  """What the optimizer's step takes on so many times the state, of so many times the layers."""
  costs = first.costs
  sent = {kind: (n * grows, size * grows) for kind, (n, size) in costs.collectives.items()}
  return dataclasses.replace(
    first,
    temporaries=first.temporaries * grows,
    code=first.code * layers,
    costs=hlo.Costs(costs.hbm * grows, sent, costs.kernels),
  )


def _growth_of_results(whole: Traced, part: Traced) -> float:
  """How many times as large the results of the whole model are as those of a part of it."""
  sizes = [
    sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(traced.out_info))
    for traced in (whole.program, part.program)
  ]
  return sizes[0] / sizes[1]


def _temporaries(name: str, first: Compiled, last: Compiled, results: float) -> float:
  """Bytes of temporaries of all layers, where a layer needs none of another's.

  Where layers leave caches, at the beginning, or at the end, when there are those of all.
  """
  if name not in CACHING:
    return first.temporaries
  return max(first.temporaries, last.temporaries + max(0.0, results - last.results))


def memory_of(plan: ProgramPlan, name: str, shape: Shape | None = None) -> dict[str, float]:
  """Bytes of a device by kind while a program runs, as of `account_program`, but compiling less.

  Raises:
    JaxRuntimeError: the compiler refuses the program.
  """
  full, layers = plan.full, plan.layers or plan.full.llm.layers
  if name == "gradient":  # each layer adds to it
    account = account_program(plan, name, shape)
    if account.problem:
      raise jax.errors.JaxRuntimeError(account.problem)
    return {k: size for k, size in account.memory.items() if k not in ("program", "reserve")}
  counts = lp_comp.counts(full.lp_comp, full.llm.layers)
  ends = (counts[0], counts[-1]) if name in CACHING else counts[:1]
  like = [cut(full, layers, count) for count in ends]
  whole, part = (trace_program(plan, cfg, name, shape) for cfg in (full, like[0]))
  programs = [compile_program(plan, cfg, name, shape) for cfg in like]
  if problem := next((one.problem for one in programs if one.problem), None):
    raise jax.errors.JaxRuntimeError(problem)
  results = programs[0].results * _growth_of_results(whole, part)
  temporaries = _temporaries(name, programs[0], programs[-1], results)
  if name == "apply":
    temporaries *= whole.given["gradients"] / part.given["gradients"]
  return whole.given | whole.beside | {"results": results, "temporaries": temporaries}


def _attended(cfg: VLMConfig, name: str, shape: Shape | None) -> list[float]:
  """The square of the slots that each layer attends with; for the tower, whose layers are alike,
  1.
  """
  if shape is None or name in VISION:
    return [1.0] * cfg.vision.layers
  if name == "round":  # of the last layer that scores, keys are enough
    frames = rounds.usual(cfg, shape.frames)[0].frames
    shape = Shape(rows=1, samples=1, prefix=rounds.PREFIX, frames=frames, text=0)
  return [float(n) ** 2 for n, _ in row_slots(cfg, shape)[: _running(cfg, name)]]


def refused_bytes(message: str, arguments: float) -> float:
  """Bytes of temporaries and results of a program that the compiler would not make; it calls all of
  it temporaries.
  """
  found = re.search(r"temporaries \(([\d.]+)G\)|Used ([\d.]+)G of", message)
  return max(0.0, float(found[1] or found[2]) * GIB - arguments) if found else 0.0
