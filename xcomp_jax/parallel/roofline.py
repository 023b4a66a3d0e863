"""What devices can do in a second, and what work takes at least."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core

from xcomp_jax.parallel import chips


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """One device of a mesh; rates are per second, None where unknown. links: bytes/s that it sends
  over all its links.
  """

  kind: str
  count: int
  hbm: float | None
  reserve: float
  flops: float | None
  bandwidth: float | None
  links: float | None


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
    return Device(
      kind=kind, count=count, hbm=None, reserve=0.0, flops=None, bandwidth=None, links=None
    )
  flops = chip.flops32 if dtype == "float32" else chip.flops
  if not chip.ring:
    mine = next(
      (device for device in devices if device.process_index == jax.process_index()), devices[0]
    )
    allowed = chips.device_memory(mine) or chip.memory
    hbm = max(chip.memory, allowed)  # of which JAX has not taken all
    reserve = hbm - allowed
    links = min(chip.link, chip.network) if _hosts(devices) > 1 else chip.link
    return Device(
      kind=kind,
      count=count,
      hbm=hbm,
      reserve=reserve,
      flops=flops,
      bandwidth=chip.bandwidth,
      links=links,
    )
  coords = {tuple(device.coords) for device in devices}
  sizes = [1 + max(axis) - min(axis) for axis in zip(*coords)]
  closed = all(size % chip.ring == 0 for size in sizes) if chip.ring == 4 else None
  links = sum(
    (2 if (size >= chip.ring if closed is None else closed) else 1) for size in sizes if size > 1
  )
  share = len(coords) / count
  return Device(
    kind=kind,
    count=count,
    hbm=chip.memory * share,
    reserve=chip.reserve * share,
    flops=flops * share,
    bandwidth=chip.bandwidth * share,
    links=chip.link * links * share,
  )


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
  return {kind: amount / rate for kind, (amount, rate) in pairs.items() if rate} | (
    {"links": 0.0} if device.links == 0 else {}
  )
