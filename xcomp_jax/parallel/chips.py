"""What TPUs and GPUs can do, by what their makers say, and what the GPU compiler asks about a card.

Operations and bytes are per second unless said otherwise. Sources, of all figures that no line
names another for:
  TPUs       "System architecture" of each version in the Cloud TPU documentation (v4: Jouppi et al.
             2023, Table 4). A link is the bandwidth of all ports (400 GB/s of v5e count both
             directions) over ports and directions; `reserve` is what libtpu 0.0.42 leaves free of a
             program that is too large.
  GPUs       NVIDIA's data sheets of each card, dense products (a sheet with sparsity has twice as
             much); links are NVLink or, where there is none, 16 lanes of PCIe, all together in one
             direction.
  compiler   the specifications that OpenXLA publishes with its compiler (H100, H200, B200, A100),
             which have the bytes of memory that a driver reports, too; the white papers of Ampere,
             Ada and Turing for the others.
"""

import dataclasses
import math
import os
import re
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
  """Holds what the compiler asks about the processors of a GPU; sizes are in bytes.

  model: as a device calls itself. cores, threads, shared: of a multiprocessor; shared_block: the
  most of `shared` for one block of
  threads. l2: the second cache. ghz: the clock.
  """

  model: str
  multiprocessors: int
  cores: int
  threads: int
  shared: int
  shared_block: int
  l2: int
  ghz: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """Holds what one chip can do. Rates are per second.

  name: in options. kind: regular expression for whole words of `jax.Device.device_kind`. flops:
  operations of 16-bit matrix products.
  flops32: of 32-bit ones at highest precision. memory: bytes. reserve: bytes of these that programs
  can't have. bandwidth: bytes from and to memory. link: bytes that one link of a TPU sends, or all
  links of a GPU. ring: number of chips along an axis of a TPU's torus from which on the axis is a
  closed ring; 0 for GPUs. capability: compute capability of a GPU. network: bytes that all adapters
  of a host with eight GPUs send. gpu: what the compiler asks; None: it can't compile for the
  chip.
  """

  name: str
  kind: str
  flops: float
  flops32: float
  memory: float
  bandwidth: float
  link: float
  reserve: float = 0.0
  ring: int = 0
  network: float = 0.0
  capability: tuple[int, int] | None = None
  gpu: Gpu | None = None


GIB, G, T = 2**30, 10**9, 10**12
PCIE3, PCIE4 = 16 * G, 32 * G
# A host has 100 Gb/s (in a cloud), or InfiniBand for each of eight cards (DGX): of 200 Gb/s beside
# an A100, 400 beside an H100.
SLOW, FAST, FASTER = 12.5 * G, 8 * 25 * G, 8 * 50 * G


def _tpu(
  name: str,
  kind: str,
  tflops: float,
  memory: float,
  reserve: float,
  bandwidth: float,
  link: float,
  ring: int,
) -> Chip:
  return Chip(
    name=name,
    kind=kind,
    flops=tflops * T,
    flops32=tflops * T / 6,  # six passes in bfloat16
    memory=memory * GIB,
    bandwidth=bandwidth * G,
    link=link * G,
    reserve=reserve * GIB,
    ring=ring,
  )


def _gpu(
  name: str,
  kind: str,
  capability: tuple[int, int],
  tflops: float,
  tflops32: float,
  memory: float,
  bandwidth: float,
  link: float,
  network: float,
  gpu: Gpu | None,
) -> Chip:
  return Chip(
    name=name,
    kind=kind,
    capability=capability,
    flops=tflops * T,
    flops32=tflops32 * T,
    memory=memory,
    bandwidth=bandwidth * G,
    link=link,
    network=network,
    gpu=gpu,
  )


# The first whose kind occurs in a device's name counts.
CHIPS = (
  _tpu("v6e", "TPU v6 lite", 918, 32, 0.75, 1638, 100, 16),
  _tpu("v5e", "TPU v5 lite", 197, 16, 0.25, 819, 50, 16),
  _tpu("v5p", "TPU v5p", 459, 96, 0.26, 2765, 100, 4),
  _tpu("v5p", "TPU v5", 459, 96, 0.26, 2765, 100, 4),  # its older name
  _tpu("v4", "TPU v4", 275, 32, 1.5, 1228, 50, 4),
  _tpu("v7x", "TPU7x", 2307, 192, 0, 7380, 100, 4),
  _gpu("gb200", "GB200", (10, 0), 2500, 80, 186 * G, 8000, 900 * G, FASTER, None),
  _gpu(
    "b200",
    "B200",
    (10, 0),
    2250,
    75,
    191_514_411_008,
    7672,
    900 * G,
    FASTER,
    Gpu(
      model="NVIDIA B200",
      multiprocessors=148,
      cores=128,
      threads=2048,
      shared=233472,
      shared_block=232448,
      l2=132644864,
      ghz=1.965,
    ),
  ),
  _gpu("gh200", "GH200", (9, 0), 989, 67, 96 * G, 4000, 450 * G, FASTER, None),
  _gpu(
    "h200",
    "H200",
    (9, 0),
    989,
    67,
    151_397_597_184,
    4800,
    450 * G,
    FASTER,
    Gpu(
      model="NVIDIA H200",
      multiprocessors=132,
      cores=128,
      threads=2048,
      shared=233472,
      shared_block=232448,
      l2=52428800,
      ghz=1.98,
    ),
  ),
  _gpu("h100-pcie", "H100 PCIe", (9, 0), 756, 51, 84_942_979_072, 2039, 300 * G, FASTER, None),
  _gpu(
    "h100",
    "H100(?! NVL)",
    (9, 0),
    989,
    67,
    84_942_979_072,
    3352,
    450 * G,
    FASTER,
    Gpu(
      model="NVIDIA H100 80GB HBM3",
      multiprocessors=132,
      cores=128,
      threads=2048,
      shared=233472,
      shared_block=232448,
      l2=52428800,
      ghz=1.98,
    ),
  ),
  _gpu(
    "a100-40",
    r"A100\S*-40GB",
    (8, 0),
    312,
    19.5,
    42_300_000_000,
    1555,
    300 * G,
    FAST,
    Gpu(
      model="NVIDIA A100-SXM4-40GB",
      multiprocessors=108,
      cores=64,
      threads=2048,
      shared=167936,
      shared_block=166912,
      l2=41943040,
      ghz=1.41,
    ),
  ),
  _gpu(
    "a100-80",
    "A100",
    (8, 0),
    312,
    19.5,
    85_100_000_000,
    2039,
    300 * G,
    FAST,
    Gpu(
      model="NVIDIA A100-SXM4-80GB",
      multiprocessors=108,
      cores=64,
      threads=2048,
      shared=167936,
      shared_block=166912,
      l2=41943040,
      ghz=1.41,
    ),
  ),
  _gpu("l40s", "L40S", (8, 9), 362, 91.6, 48 * G, 864, PCIE4, SLOW, None),
  _gpu(
    "l4",
    "L4",
    (8, 9),
    121,
    30.3,
    23_690_000_000,
    300,
    PCIE4,
    SLOW,
    Gpu(
      model="NVIDIA L4",
      multiprocessors=58,
      cores=128,
      threads=1536,
      shared=102400,
      shared_block=101376,
      l2=50331648,
      ghz=2.04,
    ),
  ),
  # AWS's A10G has tensor cores at half of an A10's rate.
  _gpu(
    "a10g",
    "A10G",
    (8, 6),
    70,
    35,
    23_835_181_056,
    600,
    PCIE4,
    SLOW,
    Gpu(
      model="NVIDIA A10G",
      multiprocessors=80,
      cores=128,
      threads=1536,
      shared=102400,
      shared_block=101376,
      l2=6291456,
      ghz=1.71,
    ),
  ),
  _gpu(
    "a10",
    "A10",
    (8, 6),
    125,
    31.2,
    23_690_000_000,
    600,
    PCIE4,
    SLOW,
    Gpu(
      model="NVIDIA A10",
      multiprocessors=72,
      cores=128,
      threads=1536,
      shared=102400,
      shared_block=101376,
      l2=6291456,
      ghz=1.695,
    ),
  ),
  # With sums in float32, as here, its tensor cores reach half of what the sheet says of float16
  # with sums in float16.
  _gpu(
    "rtx4090",
    r"RTX 4090(?! (?:Laptop|D)\b)",
    (8, 9),
    165,
    82.6,
    25_390_000_000,
    1008,
    PCIE4,
    SLOW,
    Gpu(
      model="NVIDIA GeForce RTX 4090",
      multiprocessors=128,
      cores=128,
      threads=1536,
      shared=102400,
      shared_block=101376,
      l2=75497472,
      ghz=2.52,
    ),
  ),
  _gpu(
    "t4",
    "T4",
    (7, 5),
    65,
    8.1,
    15_828_320_256,
    320,
    PCIE3,
    SLOW,
    Gpu(
      model="Tesla T4",
      multiprocessors=40,
      cores=64,
      threads=1024,
      shared=65536,
      shared_block=65536,
      l2=4194304,
      ghz=1.59,
    ),
  ),
)
OTHER_NAMES = {"a100": "a100-80"}
# JAX looks at the first, then at the older second
SHARES = (
  "XLA_CLIENT_MEM_FRACTION",
  "XLA_PYTHON_CLIENT_MEM_FRACTION",
)


def find_chip(kind: str) -> Chip | None:
  """Finds the chip of a device by how it calls itself (`jax.Device.device_kind`)."""
  return next((chip for chip in CHIPS if re.search(rf"\b{chip.kind}\b", kind)), None)


def named(name: str) -> Chip:
  """Finds a chip by its name in options.

  Raises:
    KeyError: there is none; the message lists the names.
  """
  name = name.lower()
  for chip in CHIPS:
    if chip.name == OTHER_NAMES.get(name, name):
      return chip
  raise KeyError(f"{name}: known are {', '.join(dict.fromkeys(chip.name for chip in CHIPS))}")


def memory_share() -> float:
  """Gives the part of a GPU's memory that JAX takes, and lets programs have.

  Raises:
    ValueError: the environment states no number above 0 and at most 1.
  """
  name, text = next(
    ((name, text) for name in SHARES if (text := os.environ.get(name))), ("", "0.75")
  )
  try:
    share = float(text)
  except ValueError:
    share = math.nan
  if not 0 < share <= 1:
    raise ValueError(f"{name}={text}: must be a number above 0, at most 1")
  return share


def device_memory(device: Any) -> float | None:
  """Bytes that programs can have of a device, which may be one to compile for only; None if no
  table knows it.
  """
  limit, chip = None, find_chip(device.device_kind)
  try:
    if device.process_index == jax.process_index():  # others can't be asked
      limit = (device.memory_stats() or {}).get("bytes_limit")
  except jax.errors.JaxRuntimeError:  # not here
    pass
  if limit or chip is None:
    return limit
  return memory_share() * chip.memory if chip.capability else chip.memory - chip.reserve
