"""Reads what a compiled program's text says: traffic of memory, collectives, kernels.

XLA's own `cost_analysis` counts a loop's body once, and a kernel as nothing; here loops count by
their length. No library reads the text: JAX has no public parser of it.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

# --- the text
# ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
  """One operation.

  type: of its result. code: what it does. inside: what the parentheses hold; operands: the names in
  it. attributes: what follows. root: None unless its result is that of its computation.
  """

  name: str
  type: str
  code: str
  inside: str
  attributes: str
  root: str | None

  @functools.cached_property
  def operands(self) -> list[str]:
    """Names of the operations whose results it takes."""
    return re.findall(r"%([\w.\-]+)", self.inside)

  def attribute(self, pattern: str) -> str:
    """What the first group of a regular expression finds in the attributes; "": nothing."""
    found = re.search(pattern, self.attributes)
    return found[1] if found else ""


Computation = dict[str, Op]

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(
  r" +(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) "
  r"(?P<code>[\w\-]+)\((?P<inside>[^)]*)\)(?P<attributes>.*)"
)
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
  r"(?:calls|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|\S+)"
)
# whose computation says how two numbers become one
COMBINING = {
  "reduce",
  "scatter",
  "sort",
  "all-reduce",
  "reduce-scatter",
  "reduce-window",
  "map",
}


def parse_text(text: str) -> tuple[dict[str, Computation], str]:
  """Reads the computations of a program by their names, and the name of the first one to run."""
  computations: dict[str, Computation] = {}
  entry, current = "", {}
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations[header[2]] = {}
      entry = header[2] if header[1] else entry
    elif op := _OP.match(line):
      current[op["name"]] = Op(**op.groupdict())
  return computations, entry


def called(
  computations: Mapping[str, Computation], name: str, times: float = 1.0, fused: bool = False
) -> Iterator[tuple[str, float, bool]]:
  """Gives a computation that runs so many times and those that it calls, one for each call: how
  often, loops by their length, and whether inside of a fusion, which is no traffic.
  """
  yield name, times, fused
  for op in computations[name].values():
    if op.code == "while":
      condition = computations[op.attribute(r"condition=%?([\w.\-]+)")]
      body = op.attribute(r"body=%?([\w.\-]+)")
      yield from called(computations, body, times * _trips(op, condition), fused)
    elif op.code not in COMBINING:
      names = re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(op.attributes)))
      inner = [name for name in names if name in computations]
      each = len(inner) if op.code == "conditional" else 1  # its branches count alike
      within = fused or op.code not in ("call", "conditional")
      for name in inner:
        yield from called(computations, name, times / each, within)


def _trips(loop: Op, condition: Computation) -> int:
  """A loop's length: as the compiler notes it, or the number that its counter is compared with."""
  if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
    return int(known)
  numbers = [op.inside for op in condition.values() if op.code == "constant"]
  return max((int(number) for number in numbers if number.isdecimal()), default=1)


@functools.lru_cache(maxsize=100_000)
def bytes_of(kind: str, hbm: bool = False) -> float:
  """Bytes of a type, all of a tuple's; with `hbm` only what lies there, not in vector memory."""
  total = 0.0
  for name, dims, layout in _ARRAY.findall(kind):
    if not (hbm and re.search(r"S\([1-9]", layout)):
      bits = 8 if name == "pred" else int((re.findall(r"\d+", name) or [0])[0])
      total += bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
  return total


# --- what a program costs
# ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Costs:
  """What one run of a program costs one device.

  hbm: bytes read and written. collectives: kind -> (how many, bytes that a device sends). kernels:
  of attention, "mosaic forward" and the like -> (calls, operations).
  """

  hbm: float = 0.0
  collectives: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  kernels: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


def read_costs(text: str) -> Costs:
  """Reads the text of a compiled program (`compiled.as_text()`), loops by their length.

  What lies in a TPU's vector memory is no traffic of HBM, slices count by what they take, and a
  collective that the compiler has cut into pieces (one channel), maybe over a loop that it goes on
  beside, as often as its first piece. A kernel reads each operand once.

  Operations of a kernel are those of whole blocks that are seen by a causal row, or, where rows
  have ranges of keys, as if each range reached from the first key to the row. A TPU's are counted
  in the jaxpr (`cost.count_flops`), and are 0 here.
  """
  computations, entry = parse_text(text)
  runs: dict[str, float] = collections.defaultdict(float)
  moving = set()
  for name, times, fused in called(computations, entry):
    runs[name] += times
    if not fused:
      moving.add(name)
  hbm, kernels = 0.0, {}
  sent: dict[tuple[str, ...], tuple[bool, float, float]] = {}
  for name, times in runs.items():
    ops = computations[name]
    first = any("AsyncCollectiveStart" in op.attributes for op in ops.values())
    for op in ops.values():
      if name in moving:
        hbm += times * _traffic(op, ops, computations)
      if size := _bytes_sent(op, ops):
        channel = op.attribute(r"channel_id=(\d+)")
        key = (_collective(op), channel) if channel else (_collective(op), name, op.name)
        sent[key] = max(sent.get(key, (False, 0.0, 0.0)), (first, times, size))
      if kernel := _kernel(op, ops):
        _add(kernels, kernel[0], times, times * kernel[1])
  collectives: dict[str, tuple[float, float]] = {}
  for (kind, *_), (_, times, size) in sorted(sent.items()):
    _add(collectives, kind, times, times * size)
  return Costs(hbm, collectives, kernels)


def _add(totals: dict[str, tuple[float, float]], kind: str, count: float, amount: float) -> None:
  before = totals.get(kind, (0.0, 0.0))
  totals[kind] = (before[0] + count, before[1] + amount)


# --- collectives
# ----------------------------------------------------------------------------------------

# Of what a device holds, the part that it sends in a ring of n devices.
COLLECTIVES: Mapping[str, Callable[[float, int], float]] = {
  "all-gather": lambda size, n: size * (n - 1),
  "reduce-scatter": lambda size, n: size * (n - 1) / n,
  "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
  "all-to-all": lambda size, n: size * (n - 1) / n,
  "ragged-all-to-all": lambda size, n: size * (n - 1) / n,
  "collective-permute": lambda size, n: size,
}


def _collective(op: Op) -> str:
  return op.code.removesuffix("-start")


def _bytes_sent(op: Op, ops: Computation) -> float:
  """What a device sends for an operation; 0 if that is no collective, or one of a single device."""
  kind = _collective(op)
  if kind not in COLLECTIVES:
    return 0.0
  held = sum(bytes_of(ops[name].type) for name in op.operands if name in ops)
  if op.code == "all-reduce":  # a conversion may be part of it
    held = min(held, bytes_of(op.type))
  return COLLECTIVES[kind](held, _group(op.attributes))


def _group(attributes: str) -> int:
  """Devices that take part in one collective."""
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{('[^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return listed[1].count(",") + 1
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
    return int(iota[2])
  return 2


# --- traffic
# ----------------------------------------------------------------------------------------

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


def _traffic(op: Op, ops: Computation, computations: Mapping[str, Computation]) -> float:
  """Bytes of HBM that an operation outside of fusions reads and writes."""
  target = r'custom_call_target="(ConcatBitcast|Assume\w+|Async\w+|Sharding)"'
  if op.code in NO_TRAFFIC or op.attribute(target):
    return 0.0
  made = bytes_of(op.type, hbm=True)
  read = [bytes_of(ops[name].type, hbm=True) if name in ops else 0.0 for name in op.operands]
  if op.code.endswith("-done"):
    return made
  if op.code.endswith("-start"):
    # a slice on its way into vector memory
    return min(sum(read), bytes_of(op.type)) if "slice" in op.name else sum(read)
  if op.code in SLICES:
    return bytes_of(op.type) + made
  if op.code == "dynamic-update-slice":
    return 2 * read[1]
  if op.code == "fusion":
    inner = computations[op.attribute(r"calls=%?([\w.\-]+)")]
    return _fusion_reads(inner, read) + _fusion_writes(inner, op)
  return sum(read) + made


def _fusion_reads(inner: Computation, sizes: Sequence[float]) -> float:
  """What a fusion reads of its operands, which have these sizes in HBM."""
  users: dict[str, list[Op]] = collections.defaultdict(list)
  for op in reversed(inner.values()):  # users come after what they use
    for name in op.operands:
      users[name] += users[op.name] if op.code == "bitcast" else [op]
  total = 0.0
  for op in inner.values():
    if op.code == "parameter":
      size, uses = sizes[int(op.inside)], users[op.name]
      if all(
        use.code in SLICES or (use.code == "dynamic-update-slice" and use.operands[0] == op.name)
        for use in uses
      ):
        size = min(size, sum(bytes_of(use.type) for use in uses if use.code in SLICES))
      elif all(use.code in PASSED_ON for use in uses):
        size = 0.0
      total += size
  return total


def _fusion_writes(inner: Computation, fusion: Op) -> float:
  """What a fusion writes."""
  root = next(op for op in inner.values() if op.root)
  if root.code == "tuple" and len(root.operands) > 1:
    parts = zip(root.operands, _ARRAY.finditer(fusion.type), strict=False)
    return sum(_written(inner[name], inner, bytes_of(a.group(), hbm=True)) for name, a in parts)
  while root.code in ("bitcast", "tuple"):
    root = inner[root.operands[0]]
  return _written(root, inner, bytes_of(fusion.type, hbm=True))


def _written(part: Op, inner: Computation, size: float) -> float:
  """What a fusion writes of a result of `size` bytes: of an updated slice that alone, of what it
  passes on nothing.
  """
  if part.code == "dynamic-update-slice":
    return bytes_of(inner[part.operands[1]].type)
  return 0.0 if part.code in (*PASSED_ON, "parameter") else size


# --- kernels of attention
# ----------------------------------------------------------------------------------------

# Custom calls of kernels, by their target in the compiler's text.
KERNELS = {
  "mosaic_gpu": "mosaic",
  "mosaic_gpu_v2": "mosaic",
  "__gpu$xla.gpu.triton": "triton",
  "tpu_custom_call": "splash",
  "__cudnn$fmhaSoftmax": "cudnn",
  "__cudnn$fmhaSoftmaxBackward": "cudnn",
}


def _kernel(op: Op, ops: Computation) -> tuple[str, float] | None:
  """The name and the operations of an attention kernel; None: the operation is none."""
  kind = KERNELS.get(op.attribute(r'custom_call_target="([^"]+)"'))
  if op.code != "custom-call" or kind is None:
    return None
  given = [shape for name in op.operands if name in ops for shape in _matrices(ops[name].type)]
  if kind == "splash" or len(given) < 3:
    back = re.search(r"_(dq|dkv)(_|\b)", f"{op.name} {op.inside}){op.attributes}")
    return f"{kind} {'gradient' if back else 'forward'}", 0.0
  # queries [..., L, H, h], keys and values [..., S, K, h], and for gradients the result's as well
  (*batch, L, H, h), S = given[0], given[1][-3]
  gradient, made = len(given) > 3, len(_matrices(op.type))
  # Matrix products for each pair of a query and a key, without a gradient scores and values. In a
  # gradient one for each array that it makes, and scores and those of the weights, which all but
  # cuDNN compute once for queries and once for keys and values.
  again = 4 if made == 3 and kind != "cudnn" else 2
  products = made + again if gradient else 2
  causal = op.attribute(r'(is_causal[\\":]+true|k_(?:start|end)[\\":]+\w+\[)') and L == S
  flops = products * 2.0 * math.prod(batch) * L * S * H * h * (0.5 if causal else 1.0)
  return f"{kind} {'gradient' if gradient else 'forward'}", flops


def _matrices(kind: str) -> list[tuple[int, ...]]:
  """The shapes of a type's floating-point arrays of three sides or more."""
  return [
    tuple(map(int, dims.split(",")))
    for name, dims, _ in _ARRAY.findall(kind)
    if name in ("bf16", "f16", "f32") and dims.count(",") >= 2
  ]
