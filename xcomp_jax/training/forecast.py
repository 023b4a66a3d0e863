"""Says what a run's steps will compute and how long they take at least, before anything is
compiled.

The same prediction chooses the mesh and the shapes of the micro-batches (`schedule_run`). Each part
of a step (a micro-batch, the tower, the optimizer) is predicted to take the longest of three:
operations of the most loaded device, bytes over links, and bytes of memory. Rates are those of data
sheets (`chips.CHIPS`), so real runs take longer.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xcomp_jax.config import ConfigError, DataConfig, MeshConfig, RunConfig, TrainConfig, VLMConfig
from xcomp_jax.data import packing
from xcomp_jax.data.batch import Length, Shape, length_table
from xcomp_jax.data.packing import Lengths, Micro
from xcomp_jax.model import attention
from xcomp_jax.parallel import roofline
from xcomp_jax.parallel.chips import find_chip, named
from xcomp_jax.parallel.mesh import check_tensor, make_mesh, mesh_sizes, row_groups
from xcomp_jax.training import metrics

BLOCK = 512  # queries, and keys, of a block of attention's kernels
# Memory traffic of a layer in units of what its activations take, per forward pass (a gradient is
# two more); fitted to programs compiled for TPUs (docs/LOG.md), which it meets within a fifth.
TRAFFIC = 3.2
PICO = 10**12
# Of a virtual CPU device, whose figures nobody knows: collectives among threads cost more than what
# they send.
CPU = {"flops": 2e10, "bandwidth": 1e10, "links": 2e8}
# likewise of a GPU that `chips.CHIPS` does not have
OTHER = {
  "flops": 1e14,
  "bandwidth": 1e12,
  "links": 3e10,
}
# of meshes within a 20th of the fastest the one with least context is taken: gathered keys and
# values are waited for
CONTEXT = 20


# --- devices
# ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Chip:
  """A device that is not there, for `roofline.device_of`."""

  device_kind: str
  coords: tuple[int, ...]
  process_index: int = -1

  def memory_stats(self) -> None:
    """Knows nothing."""


def chips(name: str, count: int) -> list[Any]:
  """Makes devices that are not there, of a kind such as "v5e" or "h100".

  TPUs form a torus as square as the count allows, of two axes (v5e, v6e) or three.

  Raises:
    ConfigError: an unknown chip.
  """
  try:
    chip = named(name)
  except KeyError as error:
    raise ConfigError(f"--chip {error.args[0]}") from error
  kind = chip.gpu.model if chip.gpu else chip.kind
  sizes, left = [], count
  for axes in range(2 if chip.ring == 16 else 3, 1, -1):
    sizes.append(max(n for n in range(1, left + 1) if left % n == 0 and n**axes <= left))
    left //= sizes[-1]
  return [_Chip(kind, at) for at in np.ndindex(*sizes, left)]


def _rates(devices: Sequence[Any], dtype: str = "bfloat16") -> roofline.Device:
  """Looks devices up, and fills in what is not known."""
  found = roofline.device_of(devices, dtype)
  assumed = CPU if found.kind == "cpu" else OTHER
  return dataclasses.replace(
    found, **{key: rate for key, rate in assumed.items() if getattr(found, key) is None}
  )


# --- what a micro-batch takes
# -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MeshCosts:
  """What micro-batches take on a mesh; see `packing.MicroCosts`.

  mesh: sizes along data, fsdp, tensor, context. attention: of each sample, in picoseconds of its
  row's devices.
  """

  cfg: VLMConfig
  train: TrainConfig
  mesh: tuple[int, ...]
  device: roofline.Device
  attention: np.ndarray
  prices: dict[Shape, tuple[int, int]] = dataclasses.field(default_factory=dict)

  @property
  def groups(self) -> int:
    """Row groups: each has devices of its own."""
    return self.mesh[0] * self.mesh[1]

  def price(self, shape: Shape) -> tuple[int, int]:
    """Picoseconds of operations without attention, and of what may go on meanwhile."""
    if shape not in self.prices:
      spent = self.spent(shape)
      self.prices[shape] = (
        round(PICO * spent["operations"]),
        round(PICO * max(spent["links"], spent["memory"])),
      )
    return self.prices[shape]

  def squares(self, shape: Shape) -> float:
    """Seconds of the passes whose attention computes whole rows, whatever samples they hold."""
    assert self.device.flops is not None  # see `_rates`
    each = square_passes(self.cfg, self.train, self.device) * square_flops(
      self.cfg, shape, self.device, self.mesh[3]
    )
    return shape.rows // self.groups * each / (self.mesh[2] * self.mesh[3] * self.device.flops)

  def spent(self, shape: Shape) -> dict[str, float]:
    """Seconds of a micro-batch by kind, attention's operations left out."""
    data, fsdp, tensor, context = self.mesh
    assert self.device.flops is not None  # see `_rates`
    m, v, parts, rows = self.cfg.llm, self.cfg.vision, fsdp * context, shape.rows // self.groups
    times, backward = (
      executed_passes(self.cfg, self.train),
      metrics.training_passes(self.train)["llm"] > 1,
    )
    # a frozen tower runs before
    inside = (
      "projector",
      "llm",
      *(("vision",) if self.train.vision else ()),
    )
    flops = rows * sum(times[part] * row_flops(self.cfg, shape)[part] for part in inside)
    flops += self.squares(shape) * tensor * context * self.device.flops
    slots = rows * sum(entering for entering, _ in _slots(self.cfg, shape))

    projector = m.width * (m.width + v.width)
    layers = m.layers * sum(metrics.layer_products(m))
    used, trained = (
      (layers + projector) / tensor,
      (layers * self.train.llm + projector * self.train.projector) / tensor,
    )
    # Parameters are gathered in two bytes for each pass over them, and gradients summed in four. So
    # are a row's keys and values where `context` splits it, and gathered once more to compute
    # again.
    sent = (2 * (1 + backward) * used + 4 * trained) * (parts - 1) / parts + 8 * trained / parts * (
      data - 1
    ) / data
    keys = 2 * slots * m.kv_heads * m.head_dim / tensor
    sent += keys * (8 if backward else 2) * (context - 1) / context
    # `tensor` sums what attention and MLP give, in each pass.
    sent += 2 * times["llm"] * slots / context * 2 * m.width * 2 * (tensor - 1) / tensor
    # Gathered parameters are written once and read about once a pass; gradients are written and
    # added.
    moved = 2 * used * (times["llm"] + 1 + backward) + 8 * trained
    moved += (
      TRAFFIC * times["llm"] * slots / (tensor * context) * _activations(m.width, m.mlp_width)
    )
    return _seconds(self.device, flops / (tensor * context), sent, moved)


def executed_passes(cfg: VLMConfig, train: TrainConfig) -> dict[str, int]:
  """How many times the operations of its forward pass each part executes:
  `metrics.training_passes`, and what is recomputed.

  Attention, which remat does not compute again, has kernels that compute scores again instead.
  """
  times = metrics.training_passes(train)
  return times | {"llm": times["llm"] + (cfg.remat and times["llm"] > 1)}


def _slots(cfg: VLMConfig, shape: Shape) -> list[tuple[int, int]]:
  """Token slots of a row that each layer attends with, and that it finishes."""
  around, groups = (
    shape.samples * shape.prefix + shape.text,
    shape.frames * cfg.tokens_per_frame // cfg.lp_comp.group,
  )
  return [
    (around + groups * entering, around + groups * left)
    for entering, left in metrics.entering_and_leaving(cfg)
  ]


def row_flops(cfg: VLMConfig, shape: Shape) -> dict[str, float]:
  """Operations of a row's forward pass, all its slots, without the LLM's attention; as
  `metrics.forward_flops`.
  """
  first, rest = metrics.layer_products(cfg.llm)
  frames = metrics.forward_flops(cfg, [Length(shape.frames, cfg.clip_frames, 0, 0)], pixels=True)
  logits = (
    2.0 * cfg.llm.width * cfg.llm.vocab_size * (shape.samples * (shape.prefix + 1) + shape.text)
  )
  llm = logits + sum(
    2 * entering * first + 2 * left * rest for entering, left in _slots(cfg, shape)
  )
  return {
    "vision": float(frames["vision"][0]),
    "projector": float(frames["projector"][0]),
    "llm": llm,
  }


def attention_flops(cfg: VLMConfig, lengths: Lengths, device: roofline.Device) -> np.ndarray:
  """Operations of the LLM's attention in each sample's forward pass, as executed: with what kernels
  can't leave out.
  """
  # elsewhere slots are brought into sample order
  edges = 3.0 if device.kind.startswith("TPU") else 1.5
  table = length_table(lengths)
  around, groups = (
    table[:, 2] + table[:, 3],
    table[:, 0] * cfg.tokens_per_frame // cfg.lp_comp.group,
  )
  pairs = np.zeros(len(table))
  for entering, _ in metrics.entering_and_leaving(cfg):
    pairs += attention.packed_pairs(around + groups * entering, BLOCK, edges)
  return pairs * (4.0 * cfg.llm.heads * cfg.llm.head_dim)


def square_flops(cfg: VLMConfig, shape: Shape, device: roofline.Device, context: int) -> float:
  """Operations of a row's attention in one of `square_passes`: of its square what the kernel can't
  leave out.

  Mosaic's gradient leaves out no blocks of other samples, but those above the diagonal. Triton's
  kernels, and XLA's own attention, see a quarter, half or all of the keys. Where the sequence is
  split over devices, they compute all.
  """
  mosaic = capability(device) >= (9, 0) and cfg.dtype != "float32"
  share = 1.0 if context > 1 or cfg.attention == "einsum" else 0.5 if mosaic else 0.7
  pairs = share * sum(float(entering) ** 2 for entering, _ in _slots(cfg, shape))
  return pairs * 4.0 * cfg.llm.heads * cfg.llm.head_dim


def square_passes(cfg: VLMConfig, train: TrainConfig, device: roofline.Device) -> int:
  """Of the passes over the LLM, those whose attention computes whole rows, whatever samples they
  hold.
  """
  times = executed_passes(cfg, train)["llm"]
  if cfg.attention == "einsum":
    return times
  if device.kind == "cpu" or device.kind.startswith("TPU"):
    return 0
  kernels = capability(device) >= (8, 0) and cfg.dtype != "float32"
  return times - 1 if kernels else times


def capability(device: roofline.Device) -> tuple[int, int]:
  """Gives the compute capability of a GPU, and (0, 0) of all else."""
  chip = find_chip(device.kind)
  return (0, 0) if chip is None or chip.capability is None else chip.capability


def _activations(width: int, mlp_width: int) -> int:
  """Bytes of a token's activations in a layer: queries, keys, values, two norms, two sums; and the
  MLP's.
  """
  return 2 * (7 * width + 3 * mlp_width)


def _seconds(device: roofline.Device, flops: float, sent: float, moved: float) -> dict[str, float]:
  found = roofline.least_seconds(device, flops, moved, sent)
  return {"operations": found["compute"], "links": found["links"], "memory": found["memory"]}


# --- the choice of mesh and shapes
# ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How a run computes its steps. mesh: sizes along data, fsdp, tensor, context."""

  mesh: tuple[int, ...]
  shapes: tuple[Shape, ...]
  costs: MeshCosts


def schedule_run(
  config: RunConfig,
  cfg: VLMConfig,
  lengths: Lengths,
  devices: Sequence[Any],
  like: Schedule | None = None,
) -> Schedule:
  """Chooses the mesh, where the config leaves it open, and the shapes of micro-batches, unless the
  config names them.

  Of the meshes it takes the one with least context that is nearly the fastest (CONTEXT).

  Args:
    config: of the run.
    cfg: sizes of the model.
    lengths: of all samples.
    devices: of JAX, or from `chips`.
    like: of the same run's training, for held-out samples: the mesh is its mesh, and so are the
      shapes if all samples fit.

  Raises:
    ConfigError: samples that fit no shape, shapes that the mesh can't split, a mesh that can't be.
  """
  data, size, device, lengths = (
    config.data,
    config.train.batch_size,
    _rates(devices, cfg.dtype),
    length_table(lengths),
  )
  named = None if data.shapes is None else [_named(shape, data) for shape in data.shapes]
  packing.check_fit(lengths, data.prefix_length, named)
  meshes = _meshes(config, cfg, device.count) if like is None else [like.mesh]
  found, refused = [], []
  several = len({one.process_index for one in devices}) > 1
  for mesh in meshes:
    costs = _costs(cfg, config.train, mesh, device, lengths)
    try:
      room = _room(data, cfg, mesh, lengths)
      if several:
        # refuses what hosts can't share
        row_groups(make_mesh(MeshConfig(*mesh), devices))
      if like is not None and packing.fits(lengths, like.shapes):
        return Schedule(mesh, like.shapes, costs)
      if data.shapes is None:
        found.append(
          _Choice(*packing.choose_shapes(lengths, size, room, costs, sweeps=0), costs, room)
        )
      else:
        shapes = packing.named_shapes(data.shapes, room)
        found.append(_Choice(shapes, packing.average(lengths, size, shapes, costs), costs, room))
    except ConfigError as error:
      refused.append(error)
  if not found:
    raise refused[-1]  # of the mesh that splits a row most
  if data.shapes is None:  # look closer at those that may be the fastest
    found = [
      choice.improved(lengths, size, 1) for choice in sorted(found, key=lambda f: f.time)[:3]
    ]
  most = min(choice.time for choice in found) * (CONTEXT + 1) // CONTEXT
  best = min(
    (choice for choice in found if choice.time <= most), key=lambda choice: choice.costs.mesh[-1]
  )
  if data.shapes is None:
    best = best.improved(lengths, size, 3)
  return Schedule(best.costs.mesh, best.shapes, best.costs)


class _Choice(NamedTuple):
  """A mesh with shapes, and the time of an average step's micro-batches."""

  shapes: tuple[Shape, ...]
  time: int
  costs: MeshCosts
  room: packing.ShapeRoom

  def improved(self, lengths: Lengths, batch_size: int, sweeps: int) -> "_Choice":
    """Searches for better shapes."""
    found = packing.choose_shapes(lengths, batch_size, self.room, self.costs, sweeps, self.shapes)
    return _Choice(*found, self.costs, self.room)


def _named(sizes: Sequence[int], data: DataConfig) -> Shape:
  rows, samples, frames, text = sizes
  return Shape(rows, samples, data.prefix_length, frames, text)


def _meshes(config: RunConfig, cfg: VLMConfig, devices: int) -> list[tuple[int, ...]]:
  """The meshes that the config allows; those that leave fsdp and context open have all that they
  can split.
  """
  mesh, both = config.mesh, (config.mesh.fsdp, config.mesh.context) == (-1, -1)
  data, left, tensor, context = mesh_sizes(
    dataclasses.replace(mesh, context=1) if both else mesh, devices
  )
  check_tensor(tensor, cfg)
  if not both:
    return [(data, left, tensor, context)]
  return [(data, left // n, tensor, n) for n in range(1, left + 1) if left % n == 0]


def _room(
  data: DataConfig, cfg: VLMConfig, mesh: Sequence[int], lengths: Lengths
) -> packing.ShapeRoom:
  """What shapes may be: what devices hold by the config.

  Raises:
    ConfigError: samples that are larger.
  """
  parts, devices, table = mesh[3], mesh[2] * mesh[3], length_table(lengths)
  step = cfg.lp_comp.group * parts // math.gcd(cfg.lp_comp.group * parts, cfg.tokens_per_frame)
  frames, text = -(-data.frames_per_device * devices // step) * step, data.text_per_device * devices
  if data.shapes is None:
    packing.refuse(
      f"the data does not fit {frames:,} frames with {text:,} tokens after the visual slot, the "
      f"largest row on {devices} "
      f"device{'s' * (devices > 1)} by config.data.frames_per_device={data.frames_per_device} and "
      f"text_per_device={data.text_per_device}; the most that a sample has is "
      f"{table[:, 0].max():,} and {table[:, 3].max():,}: raise "
      "these if memory allows, or use more devices",
      [
        f"sample {i} has {table[i, 0]:,} frames and {table[i, 3]:,} tokens"
        for i in np.flatnonzero((table[:, 0] > frames) | (table[:, 3] > text))
      ],
    )
  samples = 1 if cfg.lp_comp.keep == "attention" else len(lengths)
  return packing.ShapeRoom(
    groups=mesh[0] * mesh[1],
    parts=parts,
    step=step,
    samples=samples,
    prefix=data.prefix_length,
    frames=frames,
    text=text,
  )


def _costs(
  cfg: VLMConfig,
  train: TrainConfig,
  mesh: tuple[int, ...],
  device: roofline.Device,
  lengths: Lengths,
) -> MeshCosts:
  assert device.flops is not None  # see _rates
  skipping = executed_passes(cfg, train)["llm"] - square_passes(cfg, train, device)
  seconds = attention_flops(cfg, lengths, device) * skipping / (mesh[2] * mesh[3] * device.flops)
  return MeshCosts(cfg, train, mesh, device, np.rint(seconds * PICO).astype(np.int64))


def check_memory(plan: Schedule) -> None:
  """Refuses a run whose state and rows take more memory than its devices have, where that is known.

  Counted are trained parameters, their gradients and moments, and what each layer receives, which
  the backward pass needs; `xcomp_jax.plan` counts all.

  Raises:
    ConfigError: it takes more.
  """
  device, costs = plan.costs.device, plan.costs
  there, state = (device.hbm or math.inf) - device.reserve, 4 * 4 * trained_numbers(costs)
  shape = max(plan.shapes, key=lambda shape: kept(costs, shape))
  rows = kept(costs, shape)
  if state + rows <= there:
    return
  more = (
    "use more devices"
    if state > there
    else (
      "use more devices, or less in a row (config.data.shapes, frames_per_device, text_per_device)"
    )
  )
  raise ConfigError(
    f"this run does not fit {device.count} x {device.kind}: each has {there / 1e9:.1f} GB, and "
    f"takes {state / 1e9:.1f} GB for trained "
    f"state and {rows / 1e9:.1f} GB for a micro-batch of {shape.rows} x ({shape.samples} samples, "
    f"{shape.frames:,} frames, "
    f"{shape.text:,} tokens); {more}"
  )


# --- the account of a run
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Account:
  """What the steps of a run compute and take; numbers of an average step.

  tower, llm, all: real operations as a share of those executed, padding and attention that can't be
  left out included.
  programs: gradient programs of the LLM. seconds: predicted, by what bounds them. alone: seconds of
  the real operations at the peak, recomputation included; linked: the same, but at least what one
  micro-batch needs the links.
  """

  mesh: tuple[int, ...]
  device: roofline.Device
  pixels: bool
  steps: int
  batch_size: int
  micro_batches: float
  tower: float
  llm: float
  all: float
  programs: int
  seconds: Mapping[str, float]
  alone: float
  linked: float

  @property
  def step(self) -> float:
    """Predicted seconds of a step."""
    return sum(self.seconds.values())

  @property
  def bound(self) -> str:
    """What most of the time goes into."""
    return max(self.seconds, key=self.seconds.__getitem__)

  def paragraph(self) -> str:
    """Says it at the start of a run."""
    tower = f"{self.tower:.0%} of the tower's, " if self.pixels else ""
    known = metrics.peak_flops(self.device.kind) is not None
    least = "takes at least" if known else "is counted as"
    assumed = (
      ""
      if known
      else f" by figures that nobody has measured for a {self.device.kind}, only to compare shapes"
    )
    return (
      f"{self.steps:,} steps of {self.batch_size} samples, each {self.micro_batches:.2f} "
      f"micro-batches on average, in "
      f"{self.programs} shape{'s' * (self.programs > 1)}. Of the operations executed "
      f"{tower}{self.llm:.0%} of the LLM's and {self.all:.0%} of all are "
      f"on real tokens. A step {least} {self.step:.3g} s{assumed}, bound by {self.bound}; its real "
      f"operations alone "
      f"{self.alone:.3g} s."
    )


def account(
  plan: Schedule, steps: Sequence[Sequence[Micro]], lengths: Lengths, pixels: bool
) -> Account:
  """Accounts for steps that were packed as planned; pixels: the tower runs, too."""
  costs = plan.costs
  ids = np.unique([i for micros in steps for i in packing.samples_of(micros)]).astype(np.int64)
  table = length_table(lengths)[ids]  # of what these steps have
  cfg, train, device, n = costs.cfg, costs.train, costs.device, costs.device.count
  assert device.flops is not None and device.bandwidth is not None  # see _rates
  times, real = executed_passes(cfg, train), metrics.forward_flops(cfg, table, pixels)
  count, all_passes = max(1, len(steps)), times["llm"]
  whole = square_passes(cfg, train, device) / all_passes
  attended = attention_flops(cfg, table, device) * (1 - whole)
  done, executed = dict.fromkeys(real, 0.0), dict.fromkeys(real, 0.0)
  seconds = {"operations": 0.0, "links": 0.0, "memory": 0.0}
  rows = {shape: row_flops(cfg, shape) for shape in plan.shapes}
  for shape, parts in rows.items():
    parts["llm"] += square_flops(cfg, shape, device, costs.mesh[3]) * whole
  spent = {shape: costs.spent(shape) for shape in plan.shapes}

  def take(kinds: Mapping[str, float]) -> None:
    bound = max(kinds, key=kinds.__getitem__)
    seconds[bound] += kinds[bound] / count

  for micros in steps:
    own = np.searchsorted(ids, packing.samples_of(micros))
    for part, flops in real.items():
      done[part] += flops[own].sum()
    executed["llm"] += attended[own].sum()
    for micro in micros:
      shape, each = micro.shape, micro.shape.rows // costs.groups
      for part in ("projector", "llm", *(("vision",) if train.vision and pixels else ())):
        executed[part] += shape.rows * rows[shape][part]
      load = [costs.attention[list(row)].sum() / PICO for row in micro.rows]
      most = max(sum(load[k : k + each]) for k in range(0, len(load), each))
      take(spent[shape] | {"operations": spent[shape]["operations"] + most})
    if pixels and not train.vision:
      flops, kinds = _tower(cfg, device, table[own])
      executed["vision"] += flops
      take(kinds)
    take({"memory": _optimizer_bytes(costs) / device.bandwidth})

  def share(parts: Sequence[str]) -> float:
    total = sum(times[part] * executed[part] for part in parts)
    return sum(times[part] * done[part] for part in parts) / total if total else 1.0

  needed = {part: times[part] * done[part] / count / (n * device.flops) for part in real}
  links = min(kinds["links"] for kinds in spent.values())
  linked = needed["vision"] + max(needed["projector"] + needed["llm"], links)
  micro_batches = sum(map(len, steps))
  samples = sum(len(packing.samples_of(micros)) for micros in steps)
  used = {micro.shape for micros in steps for micro in micros}
  return Account(
    plan.mesh,
    device,
    pixels,
    len(steps),
    round(samples / count),
    micro_batches / count,
    share(("vision",)),
    share(("projector", "llm")),
    share(tuple(real)),
    len(used),
    seconds,
    sum(needed.values()),
    linked,
  )


def _tower(
  cfg: VLMConfig, device: roofline.Device, table: np.ndarray
) -> tuple[float, dict[str, float]]:
  """Operations of the frozen tower over a step's clips, spread evenly over all devices; and its
  seconds by kind.
  """
  v, n = cfg.vision, device.count
  flops = tokens = sent = 0.0
  for size in np.unique(table[:, 1]).tolist():
    clips = int(table[table[:, 1] == size, 0].sum()) // max(size, 1)
    each = -(-clips // n)  # of a device
    flops += each * float(
      metrics.forward_flops(cfg, [Length(size, size, 0, 0)], pixels=True)["vision"][0]
    )
    tokens += each * v.tokens(size)
    # merged features, gathered by every device
    sent += clips * size * cfg.tokens_per_frame * 2 * v.width
  weights = 2 * v.layers * (4 * v.width**2 + 2 * v.width * v.mlp_width)
  moved = 2 * weights + TRAFFIC * tokens * v.layers * _activations(v.width, 2 * v.mlp_width // 3)
  return flops * n, _seconds(device, flops, (sent + weights) * (n - 1) / n, moved)


def _optimizer_bytes(costs: MeshCosts) -> float:
  """Memory traffic of the optimizer's step on a device: parameters and moments are read and
  written, gradients read.
  """
  return 2 * 7 * 4 * trained_numbers(costs)  # the compiler's program moves twice what must be moved


def kept(costs: MeshCosts, shape: Shape) -> float:
  """Bytes on a device of what each layer of the LLM receives in a micro-batch, which its backward
  pass needs.
  """
  size = np.dtype(costs.cfg.dtype).itemsize
  slots = shape.rows // costs.groups * sum(entering for entering, _ in _slots(costs.cfg, shape))
  return slots * costs.cfg.llm.width * size / costs.mesh[3]


def trained_numbers(costs: MeshCosts) -> float:
  """Numbers that are trained on each device."""
  m, v, train = costs.cfg.llm, costs.cfg.vision, costs.train
  numbers = train.llm * (
    m.layers * sum(metrics.layer_products(m)) + m.vocab_size * m.width * (1 if m.tied else 2)
  )
  numbers += train.projector * m.width * (m.width + v.width)
  numbers += train.vision * v.layers * (4 * v.width**2 + 2 * v.width * v.mlp_width)
  return numbers / math.prod(costs.mesh[1:])
