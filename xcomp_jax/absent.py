"""Compiling for devices that are not here: the GPU compiler, like the TPU compiler, needs none.

  with absent.computing_on(absent.gpus("h100")) as devices: ...  # lower and compile; nothing can be run

A process can compile for GPUs of one architecture only: the compiler of Mosaic's kernels (jaxlib 0.10 to 0.12) remembers the first one.
The compiler comes with `pip install 'jax[cuda13]'` (4.4 GB), which needs neither a GPU nor a driver for this. Only tests and
`plan` use this file.
"""

import contextlib
import dataclasses
import importlib
import unittest.mock
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.extend.backend

from xcomp_jax.model import kernels


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What the compiler asks of a GPU; all sizes are in bytes."""

  name: str
  capability: tuple[int, int]
  multiprocessors: int
  cores: int  # of a multiprocessor
  threads: int  # likewise
  shared: int  # memory of a multiprocessor
  shared_block: int  # and the most that one block of threads can have of it
  l2: int  # cache
  bandwidth: int  # of memory, bytes per second
  ghz: float  # clock
  memory: int  # of the card

  @property
  def target(self) -> str:
    """A GpuTargetConfigProto in text form."""
    major, minor = self.capability
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"  # the instructions of sm_90a and sm_100a
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        threads_per_core_limit: {self.threads}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
        driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
        shared_memory_per_core: {self.shared} core_count: {self.multiprocessors} fpus_per_core: {self.cores}
        memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} clock_rate_ghz: {self.ghz}
        device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared_block}
        cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
        platform_version: "Compute Capability {major}.{minor}{"a" * (major >= 9)}" name: "{self.name}"
      }}
      platform_name: "CUDA" device_description_str: "{self.name}"
      dnn_version_info {{ major: 9 minor: 10 patch: 0 }} runtime_version {{ major: 12 minor: 8 patch: 0 }}"""


# From the specifications that OpenXLA publishes with its compiler (h100, h200, b200, a100) and NVIDIA's data sheets (a10, l4, t4).
GPUS = {
  "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 233472, 232448, 52428800, 4800 * 10**9, 1.98, 151397597184),
  "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233472, 232448, 52428800, 3352 * 10**9, 1.98, 84942979072),
  "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 233472, 232448, 132644864, 7672 * 10**9, 1.965, 191514411008),
  "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167936, 166912, 41943040, 2039 * 10**9, 1.41, 85100000000),
  "a10": Gpu("NVIDIA A10", (8, 6), 72, 128, 1536, 102400, 101376, 6291456, 600 * 10**9, 1.695, 24 * 10**9),
  "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 102400, 101376, 50331648, 300 * 10**9, 2.04, 23690000000),
  "t4": Gpu("Tesla T4", (7, 5), 40, 64, 1024, 65536, 65536, 4194304, 320 * 10**9, 1.59, 15828320256),
}


def gpus(kind: str, count: int = 1) -> list[Any]:
  """Devices of one host to compile for; kind: of GPUS.

  Raises:
    KeyError: no such kind.
    JaxRuntimeError: the GPU compiler is not installed.
  """
  from jax.experimental import topologies

  config = GPUS[kind].target
  return list(topologies.get_topology_desc("", "cuda", target_config=config, topology=f"1x1x{count}").devices)


@contextlib.contextmanager
def computing_on(devices: Sequence[Any]) -> Generator[Sequence[Any]]:
  """Makes the first of these devices the default one for all code that asks: `model.kernels`, tokamax, and JAX's own kernels.

  What is traced within is for them. A jitted function remembers what it was traced as, so make it within, too. `jax.devices` gives
  these devices within, whatever platform it is asked for.
  """
  platform = kernels.card_of(devices[0]).platform
  here = lambda *args, **kwargs: list(devices)
  seen: list[tuple[Any, str, Any]] = [
    (jax, "default_backend", lambda: platform), (jax, "devices", here), (jax, "local_devices", here),
    (jax.extend.backend, "get_default_device", lambda: devices[0]),
  ]  # fmt: skip
  with contextlib.suppress(ImportError):  # before jax 0.11 there is none
    info = importlib.import_module("jax._src.pallas.triton.gpu_info")
    seen += [(info, "get_device_kind", lambda: devices[0].device_kind), (info, "get_device_platform", lambda: platform)]
  with contextlib.ExitStack() as stack:
    for owner, name, value in seen:
      stack.enter_context(unittest.mock.patch.object(owner, name, value))
    yield devices
