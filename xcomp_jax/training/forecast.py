"""Says what a run's steps will compute and how long they take at least, before anything is
compiled.

The same prediction (`costs`) chooses the mesh and the shapes of the micro-batches (`schedule_run`).
"""

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xcomp_jax.config import ConfigError, DataConfig, MeshConfig, RunConfig, VLMConfig
from xcomp_jax.data import packing
from xcomp_jax.data.batch import Shape, length_table
from xcomp_jax.data.packing import Lengths, Micro
from xcomp_jax.parallel import roofline
from xcomp_jax.parallel.chips import find_chip, named
from xcomp_jax.parallel.mesh import check_tensor, make_mesh, mesh_sizes, row_groups
from xcomp_jax.training import costs, metrics
from xcomp_jax.training.costs import PICO, MeshCosts

# of meshes within a 20th of the fastest the one with least context is taken: gathered keys and
# values are waited for
CONTEXT = 20


def chips(name: str, count: int) -> list[Any]:
  """Makes devices that are not there, for `roofline.device_of`, of a kind such as "v5e" or "h100".

  TPUs form a torus as square as the count allows, of two axes (v5e, v6e) or three.

  Raises:
    ConfigError: an unknown chip.
  """
  try:
    chip = named(name)
  except KeyError as error:
    raise ConfigError(f"--chip {error.args[0]}", where="--chip", value=name) from error
  kind = chip.gpu.model if chip.gpu else chip.kind
  sizes, left = [], count
  for axes in range(2 if chip.ring == 16 else 3, 1, -1):
    sizes.append(max(n for n in range(1, left + 1) if left % n == 0 and n**axes <= left))
    left //= sizes[-1]
  return [
    types.SimpleNamespace(device_kind=kind, coords=at, process_index=-1)  # no process has them
    for at in np.ndindex(*sizes, left)
  ]


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
  data, size, lengths = config.data, config.train.batch_size, length_table(lengths)
  device = costs.rates(devices, cfg.dtype)
  shapes = [
    Shape(rows=rows, samples=samples, prefix=data.prefix_length, frames=frames, text=text)
    for rows, samples, frames, text in data.shapes or ()
  ]
  packing.check_fit(lengths, data.prefix_length, shapes or None)
  found, refused = [], []
  for mesh in _meshes(config, cfg, device.count) if like is None else [like.mesh]:
    spent = costs.mesh_costs(cfg, config.train, mesh, device, lengths)
    try:
      room = _room(data, cfg, mesh, lengths)
      if len({one.process_index for one in devices}) > 1:
        # refuses what hosts can't share
        row_groups(make_mesh(MeshConfig(*mesh), devices))
      if like is not None and packing.fits(lengths, like.shapes):
        return Schedule(mesh, like.shapes, spent)
      found.append(_first_choice(data, size, lengths, spent, room))
    except ConfigError as error:
      refused.append(error)
  if not found:
    raise refused[-1]  # of the mesh that splits a row most
  if data.shapes is None:  # look closer at those that may be the fastest
    fastest = sorted(found, key=lambda choice: choice.time)[:3]
    found = [choice.improved(lengths, size, 1) for choice in fastest]
  most = min(choice.time for choice in found) * (CONTEXT + 1) // CONTEXT
  fast = [choice for choice in found if choice.time <= most]
  best = min(fast, key=lambda choice: choice.costs.mesh[-1])
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
    return _Choice(
      *packing.choose_shapes(lengths, batch_size, self.room, self.costs, sweeps, self.shapes),
      self.costs,
      self.room,
    )


def _first_choice(
  data: DataConfig, size: int, lengths: Lengths, spent: MeshCosts, room: packing.ShapeRoom
) -> _Choice:
  """The shapes that the config names, or first ones."""
  if data.shapes is None:
    return _Choice((), 0, spent, room).improved(lengths, size, sweeps=0)
  shapes = packing.named_shapes(data.shapes, room)
  return _Choice(shapes, packing.average(lengths, size, shapes, spent), spent, room)


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
      f"largest row on {devices} device{'s' * (devices > 1)} by "
      f"config.data.frames_per_device={data.frames_per_device} and "
      f"text_per_device={data.text_per_device}; the most that a sample has is "
      f"{table[:, 0].max():,} and {table[:, 3].max():,}: raise these if memory allows, or use "
      "more devices",
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


def check_memory(plan: Schedule) -> None:
  """Refuses a run whose state and rows take more memory than its devices have, where that is known.

  Counted are trained parameters, their gradients and moments, and what each layer receives, which
  the backward pass needs; `xcomp_jax.plan` counts all.

  Raises:
    ConfigError: it takes more.
  """
  device = plan.costs.device
  there = (device.hbm or math.inf) - device.reserve
  state = 4 * 4 * costs.trained_numbers(plan.costs)
  shape = max(plan.shapes, key=lambda shape: costs.kept(plan.costs, shape))
  rows = costs.kept(plan.costs, shape)
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
    f"takes {state / 1e9:.1f} GB for trained state and {rows / 1e9:.1f} GB for a micro-batch of "
    f"{shape.rows} x ({shape.samples} samples, {shape.frames:,} frames, {shape.text:,} tokens); "
    f"{more}",
    where="devices",
    memory=there,
    state=state,
    rows=rows,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    known = find_chip(self.device.kind) is not None
    least = "takes at least" if known else "is counted as"
    assumed = (
      ""
      if known
      else f" by figures that nobody has measured for a {self.device.kind}, only to compare shapes"
    )
    return (
      f"{self.steps:,} steps of {self.batch_size} samples, each {self.micro_batches:.2f} "
      f"micro-batches on average, in {self.programs} shape{'s' * (self.programs > 1)}. Of the "
      f"operations executed {tower}{self.llm:.0%} of the LLM's and {self.all:.0%} of all are on "
      f"real tokens. A step {least} {self.step:.3g} s{assumed}, bound by {self.bound}; its real "
      f"operations alone {self.alone:.3g} s."
    )


def account(
  plan: Schedule, steps: Sequence[Sequence[Micro]], lengths: Lengths, pixels: bool
) -> Account:
  """Accounts for steps that were packed as planned; pixels: the tower runs, too."""
  cfg, train, device = plan.costs.cfg, plan.costs.train, plan.costs.device
  assert device.flops is not None  # see `costs.rates`
  samples = [packing.samples_of(micros) for micros in steps]
  ids = np.unique(np.concatenate(samples)).astype(np.int64)
  table = length_table(lengths)[ids]  # of what these steps have
  own = [np.searchsorted(ids, some) for some in samples]  # rows of the table, of each step
  towers = []  # operations and seconds of the frozen tower, of each step
  if pixels and not train.vision:
    towers = [costs.tower_costs(cfg, device, table[rows]) for rows in own]

  real = metrics.forward_flops(cfg, table, pixels)
  done = {part: sum(flops[rows].sum() for rows in own) for part, flops in real.items()}
  executed = _executed(plan, steps, own, table)
  if towers:
    executed["vision"] = sum(flops for flops, _ in towers)
  elif not pixels:
    executed["vision"] = 0.0
  times = costs.executed_passes(cfg, train)

  def share(*parts: str) -> float:
    total = sum(times[part] * executed[part] for part in parts)
    return sum(times[part] * done[part] for part in parts) / total if total else 1.0

  least = {
    part: times[part] * done[part] / len(steps) / (device.count * device.flops) for part in real
  }
  links = min(plan.costs.spent(shape)["links"] for shape in plan.shapes)
  return Account(
    mesh=plan.mesh,
    device=device,
    pixels=pixels,
    steps=len(steps),
    batch_size=round(sum(map(len, samples)) / len(steps)),
    micro_batches=sum(map(len, steps)) / len(steps),
    tower=share("vision"),
    llm=share("projector", "llm"),
    all=share(*real),
    programs=len({micro.shape for micros in steps for micro in micros}),
    seconds=_bound_seconds(plan, steps, [kinds for _, kinds in towers]),
    alone=sum(least.values()),
    linked=least["vision"] + max(least["projector"] + least["llm"], links),
  )


def _executed(
  plan: Schedule, steps: Sequence[Sequence[Micro]], own: Sequence[np.ndarray], table: np.ndarray
) -> dict[str, float]:
  """Operations of a pass over each part inside of micro-batches, padding included.

  own: of each step, which rows of the table its samples are.
  """
  cfg, train, device = plan.costs.cfg, plan.costs.train, plan.costs.device
  whole = costs.square_passes(cfg, train, device) / costs.executed_passes(cfg, train)["llm"]
  attended = costs.attention_flops(cfg, table, device) * (1 - whole)
  each = {}  # operations of a row
  for shape in plan.shapes:
    each[shape] = costs.row_flops(cfg, shape)
    each[shape]["llm"] += costs.square_flops(cfg, shape, device, plan.mesh[3]) * whole
  executed = dict.fromkeys(("vision", "projector", "llm"), 0.0)
  for micros, rows in zip(steps, own, strict=True):
    executed["llm"] += attended[rows].sum()
    for micro in micros:
      for part in executed:
        executed[part] += micro.shape.rows * each[micro.shape][part]
  return executed


def _bound_seconds(
  plan: Schedule, steps: Sequence[Sequence[Micro]], towers: Sequence[Mapping[str, float]]
) -> dict[str, float]:
  """Seconds of an average step, by what bounds each part of it. towers: of the frozen tower in each
  step, by kind; empty: it does not run.
  """
  spent = {shape: plan.costs.spent(shape) for shape in plan.shapes}
  seconds = {"operations": 0.0, "links": 0.0, "memory": 0.0}
  for number, micros in enumerate(steps):
    parts = [_of_micro(plan.costs, spent[micro.shape], micro) for micro in micros]
    for kinds in (*parts, *towers[number : number + 1], costs.optimizer_seconds(plan.costs)):
      bound = max(kinds, key=kinds.__getitem__)
      seconds[bound] += kinds[bound] / len(steps)
  return seconds


def _of_micro(spent: MeshCosts, kinds: Mapping[str, float], micro: Micro) -> dict[str, float]:
  """Seconds of a micro-batch by kind; operations are those of the row group that has most."""
  each = micro.shape.rows // spent.groups
  load = [spent.attention[list(row)].sum() / PICO for row in micro.rows]
  most = max(sum(load[first : first + each]) for first in range(0, len(load), each))
  return {**kinds, "operations": kinds["operations"] + most}
