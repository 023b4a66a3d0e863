"""What the micro-batches of a run, its tower and its optimizer take of a device: operations, bytes
and seconds, padding included.

Each of them is predicted to take the longest of three: operations of the most loaded device, bytes
over links, and bytes of memory. Rates are those of data sheets (`chips.CHIPS`), so real runs take
longer.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xcomp_jax.config import TrainConfig, VLMConfig
from xcomp_jax.data.batch import Length, Shape, length_table
from xcomp_jax.data.packing import Lengths
from xcomp_jax.model import attention
from xcomp_jax.parallel import roofline
from xcomp_jax.parallel.chips import find_chip
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
OTHER = {"flops": 1e14, "bandwidth": 1e12, "links": 3e10}


def rates(devices: Sequence[Any], dtype: str = "bfloat16") -> roofline.Device:
  """Looks devices up, and fills in what is not known."""
  found = roofline.device_of(devices, dtype)
  assumed = CPU if found.kind == "cpu" else OTHER
  return dataclasses.replace(
    found, **{key: rate for key, rate in assumed.items() if getattr(found, key) is None}
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
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
    assert self.device.flops is not None  # see `rates`
    each = square_passes(self.cfg, self.train, self.device) * square_flops(
      self.cfg, shape, self.device, self.mesh[3]
    )
    return shape.rows // self.groups * each / (self.mesh[2] * self.mesh[3] * self.device.flops)

  def spent(self, shape: Shape) -> dict[str, float]:
    """Seconds of a micro-batch by kind, attention's operations left out."""
    assert self.device.flops is not None  # see `rates`
    _, _, tensor, context = self.mesh
    rows, times = shape.rows // self.groups, executed_passes(self.cfg, self.train)
    inside = ["projector", "llm"]
    if self.train.vision:  # a frozen tower runs before
      inside.append("vision")
    flops = rows * sum(times[part] * row_flops(self.cfg, shape)[part] for part in inside)
    flops += self.squares(shape) * tensor * context * self.device.flops
    slots = rows * sum(entering for entering, _ in row_slots(self.cfg, shape))
    sent, moved = self._traffic(slots, times["llm"])
    return seconds(self.device, flops / (tensor * context), sent, moved)

  def _traffic(self, slots: int, passes: int) -> tuple[float, float]:
    """Bytes that a device sends, and bytes from and to its memory, in `passes` over the LLM with so
    many slots in all its layers.
    """
    data, fsdp, tensor, context = self.mesh
    m, v, parts = self.cfg.llm, self.cfg.vision, fsdp * context
    backward = metrics.training_passes(self.train)["llm"] > 1
    projector = m.width * (m.width + v.width)
    layers = m.layers * sum(metrics.layer_products(m))
    used = (layers + projector) / tensor
    trained = (layers * self.train.llm + projector * self.train.projector) / tensor
    # Parameters are gathered in two bytes for each pass over them, and gradients summed in four. So
    # are a row's keys and values where `context` splits it, and gathered once more to compute
    # again.
    sent = (2 * (1 + backward) * used + 4 * trained) * (parts - 1) / parts + 8 * trained / parts * (
      data - 1
    ) / data
    keys = 2 * slots * m.kv_heads * m.head_dim / tensor
    sent += keys * (8 if backward else 2) * (context - 1) / context
    # `tensor` sums what attention and MLP give, in each pass.
    sent += 2 * passes * slots / context * 2 * m.width * 2 * (tensor - 1) / tensor
    # Gathered parameters are written once and read about once a pass; gradients are written and
    # added.
    moved = 2 * used * (passes + 1 + backward) + 8 * trained
    moved += TRAFFIC * passes * slots / (tensor * context) * _activations(m.width, m.mlp_width)
    return sent, moved


def mesh_costs(
  cfg: VLMConfig,
  train: TrainConfig,
  mesh: tuple[int, ...],
  device: roofline.Device,
  lengths: Lengths,
) -> MeshCosts:
  """What micro-batches of these samples take on a mesh; device: of `rates`."""
  assert device.flops is not None
  skipping = executed_passes(cfg, train)["llm"] - square_passes(cfg, train, device)
  took = attention_flops(cfg, lengths, device) * skipping / (mesh[2] * mesh[3] * device.flops)
  return MeshCosts(
    cfg=cfg,
    train=train,
    mesh=mesh,
    device=device,
    attention=np.rint(took * PICO).astype(np.int64),
  )


def seconds(device: roofline.Device, flops: float, sent: float, moved: float) -> dict[str, float]:
  """The least seconds of each kind: operations, bytes sent, and bytes to and from memory."""
  found = roofline.least_seconds(device, flops, moved, sent)
  return {"operations": found["compute"], "links": found["links"], "memory": found["memory"]}


def executed_passes(cfg: VLMConfig, train: TrainConfig) -> dict[str, int]:
  """How many times the operations of its forward pass each part executes:
  `metrics.training_passes`, and what is recomputed.

  Attention, which remat does not compute again, has kernels that compute scores again instead.
  """
  times = metrics.training_passes(train)
  return times | {"llm": times["llm"] + (cfg.remat and times["llm"] > 1)}


def row_slots(cfg: VLMConfig, shape: Shape) -> list[tuple[int, int]]:
  """Token slots of a row that each layer attends with, and that it finishes."""
  around = shape.samples * shape.prefix + shape.text
  groups = shape.frames * cfg.tokens_per_frame // cfg.lp_comp.group
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
    2 * entering * first + 2 * left * rest for entering, left in row_slots(cfg, shape)
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
  around = table[:, 2] + table[:, 3]
  groups = table[:, 0] * cfg.tokens_per_frame // cfg.lp_comp.group
  pairs = [
    attention.packed_pairs(around + groups * entering, BLOCK, edges)
    for entering, _ in metrics.entering_and_leaving(cfg)
  ]
  return np.sum(pairs, 0) * (4.0 * cfg.llm.heads * cfg.llm.head_dim)


def square_flops(cfg: VLMConfig, shape: Shape, device: roofline.Device, context: int) -> float:
  """Operations of a row's attention in one of `square_passes`: of its square what the kernel can't
  leave out.

  Mosaic's gradient leaves out no blocks of other samples, but those above the diagonal. Triton's
  kernels, and XLA's own attention, see a quarter, half or all of the keys. Where the sequence is
  split over devices, they compute all.
  """
  mosaic = capability(device) >= (9, 0) and cfg.dtype != "float32"
  share = 1.0 if context > 1 or cfg.attention == "einsum" else 0.5 if mosaic else 0.7
  pairs = share * sum(float(entering) ** 2 for entering, _ in row_slots(cfg, shape))
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


def tower_costs(
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
  return flops * n, seconds(device, flops, (sent + weights) * (n - 1) / n, moved)


def optimizer_seconds(costs: MeshCosts) -> dict[str, float]:
  """Seconds of the optimizer's step, by kind: parameters and moments are read and written,
  gradients read.
  """
  assert costs.device.bandwidth is not None  # see `rates`
  # the compiler's program moves twice what must be moved
  return {"memory": 2 * 7 * 4 * trained_numbers(costs) / costs.device.bandwidth}


def kept(costs: MeshCosts, shape: Shape) -> float:
  """Bytes on a device of what each layer of the LLM receives in a micro-batch, which its backward
  pass needs.
  """
  size = np.dtype(costs.cfg.dtype).itemsize
  slots = shape.rows // costs.groups * sum(entering for entering, _ in row_slots(costs.cfg, shape))
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
