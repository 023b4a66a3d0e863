"""What devices can do in a second, and what work takes at least."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from xcomp_jax.parallel import chips


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """One device of a mesh; rates are per second, None where unknown. links: bytes/s that it sends
  over all its links.
  """

  kind: str
  count: int
  hbm: float | None = None
  reserve: float = 0.0
  flops: float | None = None
  bandwidth: float | None = None
  links: float | None = None


def device_of(devices: Sequence[Any], dtype: str = "bfloat16") -> Device:
  """What the tables say of these devices, all of one kind, computing in `dtype`; of a chip with two
  devices each has half.

  A chip's links are those of its torus that there are: along an axis of n chips none for n = 1, two
  where it is closed to a ring, else one, since the chips at its ends have no more. A ring of GPUs
  through several hosts crosses between them on all adapters of a host at once.
  """
  kind, count = devices[0].device_kind, len(devices)
  chip = chips.find_chip(kind)
  if chip is None:
    return Device(kind=kind, count=count)
  flops = chip.flops32 if dtype == "float32" else chip.flops
  if chip.ring:
    links, share = _torus(devices, chip.ring)
    return Device(
      kind=kind,
      count=count,
      hbm=chip.memory * share,
      reserve=chip.reserve * share,
      flops=flops * share,
      bandwidth=chip.bandwidth * share,
      links=chip.link * links * share,
    )
  mine = [device for device in devices if device.process_index == jax.process_index()]
  allowed = chips.device_memory(mine[0] if mine else devices[0]) or chip.memory
  hbm = max(chip.memory, allowed)  # of which JAX has not taken all
  return Device(
    kind=kind,
    count=count,
    hbm=hbm,
    reserve=hbm - allowed,
    flops=flops,
    bandwidth=chip.bandwidth,
    links=min(chip.link, chip.network) if _hosts(devices) > 1 else chip.link,
  )


def _torus(devices: Sequence[Any], ring: int) -> tuple[int, float]:
  """The links of a chip among these, and the chips per device. ring: of `Chip`."""
  coords = {tuple(device.coords) for device in devices}
  sizes = [1 + max(axis) - min(axis) for axis in zip(*coords)]
  if ring == 4:  # an axis of a cube is closed where all are
    closed = [all(size % ring == 0 for size in sizes)] * len(sizes)
  else:
    closed = [size >= ring for size in sizes]
  links = sum(1 + ends for size, ends in zip(sizes, closed) if size > 1)
  return links, len(coords) / len(devices)


def _hosts(devices: Sequence[Any]) -> int:
  """Counts the hosts of GPUs: of eight at most, and each with its own processes."""
  processes = len({device.process_index for device in devices})
  return max(processes if processes < len(devices) else 1, -(-len(devices) // 8))


def least_seconds(device: Device, flops: float, hbm: float, sent: float) -> dict[str, float]:
  """The least time of each kind, by what a device can do at best: {"compute", "memory", "links"};
  unknown ones left out.

  They may overlap, so the program takes at least the largest. Collectives count as if all links of
  a device were busy in one direction each, which a mesh axis that is a ring over the torus comes
  near to, and others do not.

  Args:
    device: from `device_of`.
    flops: of one device.
    hbm: bytes, likewise.
    sent: bytes of collectives, likewise.
  """
  pairs = {
    "compute": (flops, device.flops),
    "memory": (hbm, device.bandwidth),
    "links": (sent, device.links),
  }
  seconds = {kind: amount / rate for kind, (amount, rate) in pairs.items() if rate}
  if device.links == 0:  # a single chip sends nothing
    seconds["links"] = 0.0
  return seconds
