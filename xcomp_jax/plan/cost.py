"""What a compiled program asks of a device: operations, memory traffic, collectives, and the least
time these take.

Operations are counted in the jaxpr and traffic in the compiler's text, loops by their length: XLA's
own `cost_analysis` counts a loop's body once, and a kernel as nothing.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.interpreters import partial_eval

from xcomp_jax.model import tiles

GIB = 2**30


# --- operations, from the jaxpr
# --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Flops:
  """Operations of a program on all devices, a multiply-add as two: of matrix products outside and
  inside of kernels.

  once: those outside whose matrices have a side of the size that was asked for. unknown: kernels
  that are not counted.
  """

  products: float = 0.0
  kernels: float = 0.0
  once: float = 0.0
  unknown: set[str] = dataclasses.field(default_factory=set)

  @property
  def total(self) -> float:
    """All that could be counted."""
    return self.products + self.kernels


# Matrix products per pair of a query and a key, of splash attention's three kernels: scores and
# values; scores and the gradients of weights and queries; scores and the gradients of values,
# weights and keys.
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def count_flops(jaxpr: Any, causal: Callable[[tuple[int, ...]], bool], side: int = 0) -> Flops:
  """Counts a jaxpr's matrix products, padding and recomputation included; loops by their length.

  Attention in tiles, whose loops have no length of their own, counts by the scores that it
  computes.

  Args:
    jaxpr: as traced, for the whole mesh.
    causal: whether an attention kernel on queries of this shape [..., H, L, h] is.
    side: products with a matrix of this side are counted apart, too.
  """
  total, jaxpr = Flops(), getattr(jaxpr, "jaxpr", jaxpr)
  # what nobody uses is not compiled either
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  _count(jaxpr, 1.0, causal, side, total)
  return total


def _count(jaxpr, times: float, causal, side: int, total: Flops) -> None:
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
      flops = times * 2 * math.prod(out) * math.prod(shape[i] for i in contracted)
      total.products += flops
      total.once += flops if side in (*shape, *out) else 0.0
    elif params.get("name") in ("causal_attention", "full_attention"):
      (B, L, H, h), S = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
      total.products += (
        times * 4.0 * B * H * h * tiles.tiled_scores(L, S, params["name"] == "causal_attention")
      )
    elif name == "pallas_call":
      flops = _splash(equation, causal)
      total.kernels += times * (flops or 0)
      total.unknown |= set() if flops else {str(params["name"])}
    else:
      inside = times * params.get("length", 1) * (params["mesh"].size if name == "shard_map" else 1)
      subs = list(jax.extend.core.jaxprs_in_params(params))
      for sub in subs:  # branches count alike
        _count(
          getattr(sub, "jaxpr", sub),
          inside / (len(subs) if name == "cond" else 1),
          causal,
          side,
          total,
        )


def _splash(equation, causal) -> float | None:
  """Operations of a kernel of splash attention; of a causal one those blocks that it visits. None:
  another kernel.
  """
  found = re.match(r"splash_\w+?_(fwd|dq|dkv)_", str(equation.params["name"]))
  if not found:
    return None
  # Queries and keys are the first two operands of [..., heads, length, size]; the ones before are
  # tables of blocks.
  q, k = [
    v.aval.shape
    for v in equation.invars
    if len(v.aval.shape) >= 3 and jax.dtypes.issubdtype(v.aval.dtype, np.floating)
  ][:2]
  blocks = equation.params["grid_mapping"].grid[-1]
  seen = (blocks + 1) / (2 * blocks) if causal(q) else 1.0
  return SPLASH[found[1]] * 2.0 * math.prod(q) * k[-2] * seen


# --- memory traffic and collectives, from the compiler's text
# ---------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Of one run of a program on one device, in bytes. hbm: read and written.

  collectives: kind -> (how many, bytes that a device sends).
  """

  hbm: float
  collectives: dict[str, tuple[float, float]]

  def times(self, factor: float) -> "Traffic":
    """So many times as much."""
    return Traffic(
      self.hbm * factor,
      {kind: (n * factor, size * factor) for kind, (n, size) in self.collectives.items()},
    )

  def plus(self, other: "Traffic") -> "Traffic":
    """Both."""
    kinds = sorted(self.collectives.keys() | other.collectives.keys())

    def both(kind):
      return (self.collectives.get(kind, (0.0, 0.0)), other.collectives.get(kind, (0.0, 0.0)))

    return Traffic(
      self.hbm + other.hbm,
      {kind: (n + m, a + b) for kind in kinds for (n, a), (m, b) in [both(kind)]},
    )


@dataclasses.dataclass(frozen=True)
class _Op:
  name: str
  type: str
  code: str
  operands: tuple[str, ...]
  rest: str
  root: bool


# Of what a device holds, the part that it sends in a ring of n devices.
COLLECTIVES: Mapping[str, Callable[[float, int], float]] = {
  "all-gather": lambda size, n: size * (n - 1),
  "reduce-scatter": lambda size, n: size * (n - 1) / n,
  "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
  "all-to-all": lambda size, n: size * (n - 1) / n,
  "ragged-all-to-all": lambda size, n: size * (n - 1) / n,
  "collective-permute": lambda size, n: size,
}
NO_TRAFFIC = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "iota",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "async-update",
}
SLICES = {"slice", "dynamic-slice", "gather"}
# of a buffer, inside of a fusion
PASSED_ON = {
  "tuple",
  "get-tuple-element",
  "custom-call",
  *COLLECTIVES,
}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")


@contextlib.contextmanager
def own_names() -> Generator[None]:
  """What is compiled within has the names that its code says; one from a compilation cache could
  have those of older code.
  """
  key = "jax_compilation_cache_include_metadata_in_key"
  before = getattr(jax.config, key)
  jax.config.update(key, True)
  try:
    yield
  finally:
    jax.config.update(key, before)


def read_program(text: str, side: int = 0, scope: str | None = None) -> tuple[Traffic, Traffic]:
  """Reads the text of a compiled program (`compiled.as_text()`): traffic of HBM and collectives,
  loops by their length.

  What lies in a TPU's vector memory is no traffic of HBM, slices count by what they take, and a
  collective that the compiler has cut into pieces (one channel), maybe over a loop that it goes on
  beside, as often as its first piece. A kernel reads each operand once.

  Returns:
    what touches no array with a side of this size and is not of this `jax.named_scope`, and what
    does, or is.
  """
  computations, entry = _parse(text)
  hbm, sent = [0.0, 0.0], {}
  for name, (times, fused) in _multiplicity(computations, entry).items():
    ops = computations[name]
    first = any("AsyncCollectiveStart" in op.rest for op in ops.values())
    for op in ops.values():
      types = [op.type, *(ops[o].type for o in op.operands if o in ops)]
      touches = bool(side) and any(re.search(rf"[\[,]{side}[\],]", kind) for kind in types)
      touches |= scope is not None and re.search(rf'op_name="[^"]*\b{scope}\b', op.rest) is not None
      kind = op.code.removesuffix("-start")
      if kind in COLLECTIVES:
        channel = re.search(r"channel_id=(\d+)", op.rest)
        key = (touches, kind, channel[1]) if channel else (touches, kind, name, op.name)
        held = sum(map(_bytes, types[1:]))
        if op.code == "all-reduce":  # a conversion may be part of it
          held = min(held, _bytes(op.type))
        size = COLLECTIVES[kind](held, _group(op.rest))
        if size:
          sent[key] = max(sent.get(key, (False, 0.0, 0.0)), (first, times, size))
      if not fused:
        hbm[touches] += times * _traffic(op, ops, computations)
  collectives: tuple[dict[str, tuple[float, float]], ...] = ({}, {})
  for (touches, kind, *_), (_, times, size) in sorted(sent.items()):
    count, total = collectives[touches].get(kind, (0.0, 0.0))
    collectives[touches][kind] = (count + times, total + times * size)
  return Traffic(hbm[0], collectives[0]), Traffic(hbm[1], collectives[1])


# Custom calls of kernels, by their target in the compiler's text.
KERNELS = {
  "mosaic_gpu": "mosaic",
  "mosaic_gpu_v2": "mosaic",
  "__gpu$xla.gpu.triton": "triton",
  "tpu_custom_call": "splash",
  "__cudnn$fmhaSoftmax": "cudnn",
  "__cudnn$fmhaSoftmaxBackward": "cudnn",
}


def read_kernels(text: str) -> dict[str, tuple[float, float]]:
  """Finds the attention kernels in the text of a compiled program, loops by their length.

  Operations are those of whole blocks that are seen by a causal row, or, where rows have ranges of
  keys, as if each range reached from the first key to the row. A TPU's are counted in the jaxpr
  (`count_flops`), and are 0 here.

  Returns:
    "mosaic forward" and the like -> (calls, operations) of one run on one device.
  """
  computations, entry = _parse(text)
  found: dict[str, tuple[float, float]] = {}
  for name, (times, _) in _multiplicity(computations, entry).items():
    ops = computations[name]
    for op in ops.values():
      target = (
        re.search(r'custom_call_target="([^"]+)"', op.rest) if op.code == "custom-call" else None
      )
      kind = KERNELS.get(target[1]) if target else None
      if kind is None:
        continue
      given = [shape for name in op.operands if name in ops for shape in _matrices(ops[name].type)]
      made = len(_matrices(op.type))
      if kind == "splash" or len(given) < 3:
        direction, flops = (
          "gradient" if re.search(r"_(dq|dkv)(_|\b)", f"{op.name} {op.rest}") else "forward",
          0.0,
        )
      else:
        twice = made == 3 and kind != "cudnn"
        direction, flops = _attention(
          given,
          made + (4 if twice else 2),
          re.search(r'is_causal[\\":]+true|k_(start|end)[\\":]+\w+\[', op.rest) is not None,
        )
      before = found.get(key := f"{kind} {direction}", (0.0, 0.0))
      found[key] = (before[0] + times, before[1] + times * flops)
  return found


def _matrices(kind: str) -> list[tuple[int, ...]]:
  """The shapes of a type's floating-point arrays of three sides or more."""
  shapes = [
    tuple(map(int, dims.split(",")))
    for name, dims, _ in _ARRAY.findall(kind)
    if name in ("bf16", "f16", "f32") and dims
  ]
  return [shape for shape in shapes if len(shape) > 2]


def _attention(given: Sequence[tuple[int, ...]], products: int, causal: bool) -> tuple[str, float]:
  """Operations of a kernel on queries [..., L, H, h], keys and values [..., S, K, h], and for
  gradients the result's as well.

  products: of matrices, for each pair of a query and a key, in a gradient: one for each array that
  it makes, and scores and those of the weights, which all but cuDNN compute once for queries and
  once for keys and values. Without a gradient scores and values.
  """
  (*batch, L, H, h), S = given[0], given[1][-3]
  gradient = len(given) > 3
  return ("gradient" if gradient else "forward"), (products if gradient else 2) * 2.0 * math.prod(
    batch
  ) * L * S * H * h * (0.5 if causal and L == S else 1.0)


def _parse(text: str) -> tuple[dict[str, dict[str, _Op]], str]:
  computations, entry, current = {}, "", {}
  for line in text.splitlines():
    if not line.startswith(" "):
      header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
      if header:
        current = computations[header[2]] = {}
        entry = header[2] if header[1] else entry
    elif found := re.match(r" +(ROOT )?%?([\w.\-]+) = (.*)", line):
      kind, _, rest = _split_type(found[3])
      code, _, rest = rest.partition("(")
      inside, _, rest = rest.partition(")")
      current[found[2]] = _Op(
        found[2],
        kind,
        code,
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside + ")" + rest,
        bool(found[1]),
      )
  return computations, entry


def _split_type(text: str) -> tuple[str, str, str]:
  """Type, space, and the rest."""
  if not text.startswith("("):
    return text.partition(" ")
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[: i + 1], " ", text[i + 2 :]
  raise ValueError(f"no type: {text[:80]}")


def _multiplicity(computations, entry: str) -> dict[str, tuple[float, bool]]:
  """How often each computation runs, and whether it is part of a fusion, whose inside is no
  traffic.
  """
  runs: dict[str, tuple[float, bool]] = {}

  def visit(name: str, times: float, fused: bool):
    before = runs.get(name, (0.0, fused))
    runs[name] = (before[0] + times, before[1] and fused)
    for op in computations[name].values():
      loop = (
        re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", op.rest)
        if op.code == "while"
        else None
      )
      if loop:
        visit(loop[2], times * _trips(op.rest, loop[1], computations), fused)
        continue
      called = re.findall(
        r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", op.rest
      )
      called += [
        c
        for group in re.findall(r"branch_computations=\{([^}]*)\}", op.rest)
        for c in re.findall(r"%?([\w.\-]+)", group)
      ]
      for inner in called:
        if inner in computations and op.code not in (
          "reduce",
          "scatter",
          "sort",
          "all-reduce",
          "reduce-scatter",
          "reduce-window",
          "map",
        ):
          each = len(called) if op.code == "conditional" else 1  # its branches count alike
          visit(inner, times / each, fused or op.code not in ("call", "conditional"))

  visit(entry, 1.0, False)
  return runs


def _trips(rest: str, condition: str, computations) -> int:
  """A loop's length: as the compiler notes it, or the number that its counter is compared with."""
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', rest):
    return int(known[1])
  numbers = [
    int(n[1])
    for op in computations[condition].values()
    if op.code == "constant" and (n := re.match(r"(\d+)\)", op.rest))
  ]
  return max(numbers, default=1)


def _traffic(op: _Op, ops, computations) -> float:
  code = op.code
  if code in NO_TRAFFIC or re.search(
    r'custom_call_target="(ConcatBitcast|Assume\w+|Async\w+|Sharding)"', op.rest
  ):
    return 0.0

  def read(name):
    return _bytes(ops[name].type, hbm=True) if name in ops else 0.0

  if code.endswith("-done"):
    return _bytes(op.type, hbm=True)
  if code.endswith("-start"):
    whole = sum(map(read, op.operands))
    # a slice on its way into vector memory
    return min(whole, _bytes(op.type)) if "slice" in op.name else whole
  if code in SLICES:
    return _bytes(op.type) + _bytes(op.type, hbm=True)
  if code == "dynamic-update-slice":
    return 2 * read(op.operands[1])
  called = re.search(r"calls=%?([\w.\-]+)", op.rest)
  if code == "fusion" and called and called[1] in computations:
    return _fusion(op, ops, computations[called[1]])
  return sum(map(read, op.operands)) + _bytes(op.type, hbm=True)


def _fusion(op: _Op, ops, inner: dict[str, _Op]) -> float:
  """What a fusion reads of each operand, and writes."""
  total = 0.0
  users: dict[str, list[_Op]] = {}
  for one in reversed(inner.values()):  # users come after what they use
    for name in one.operands:
      users.setdefault(name, []).extend(users.get(one.name, []) if one.code == "bitcast" else [one])
  for one in inner.values():
    if one.code == "parameter":
      outer = op.operands[int(one.rest.split(")")[0])]
      size = _bytes(ops[outer].type, hbm=True) if outer in ops else 0.0
      uses = users.get(one.name, [])
      if all(
        u.code in SLICES or (u.code == "dynamic-update-slice" and u.operands[0] == one.name)
        for u in uses
      ):
        size = min(size, sum(_bytes(u.type) for u in uses if u.code in SLICES))
      elif all(u.code in PASSED_ON for u in uses):
        size = 0.0
      total += size
  root = next(one for one in inner.values() if one.root)
  parts = [inner[name] for name in root.operands] if root.code == "tuple" else [root]
  whole = _bytes(op.type, hbm=True)
  if len(parts) == 1:
    while parts[0].code == "bitcast":
      parts = [inner[parts[0].operands[0]]]
    return total + _written(parts[0], inner, whole)
  sizes = [_bytes(m.group(), hbm=True) for m in _ARRAY.finditer(op.type)]
  return total + sum(_written(part, inner, size) for part, size in zip(parts, sizes, strict=False))


def _written(part: _Op, inner: dict[str, _Op], size: float) -> float:
  """What a fusion writes of a result of `size` bytes."""
  if part.code == "dynamic-update-slice":
    return _bytes(inner[part.operands[1]].type)
  return 0.0 if part.code in (*PASSED_ON, "parameter") else size


@functools.lru_cache(maxsize=100_000)
def _bytes(kind: str, hbm: bool = False) -> float:
  """Bytes of a type, all of a tuple's; with `hbm` only what lies there."""
  total = 0.0
  for name, dims, layout in _ARRAY.findall(kind):
    if hbm and re.search(r"S\([1-9]", layout):
      continue
    bits = 8 if name == "pred" else int((re.findall(r"\d+", name) or [0])[0])
    total += bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
  return total


def _group(rest: str) -> int:
  """Devices that take part in one collective."""
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{('[^}]*)\}", rest):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return listed[1].count(",") + 1
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
    return int(iota[2])
  return 2


# --- time
# ----------------------------------------------------------------------------------------
