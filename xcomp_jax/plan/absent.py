"""Compiling for devices that are not here: the GPU compiler, like the TPU compiler, needs none.

  with absent.computing_on(absent.gpus("h100")) as devices: ...  # lower and compile; nothing can be
  run

A process can compile for GPUs of one architecture only: the compiler of Mosaic's kernels (jaxlib
0.10 to 0.12) remembers the first one. The compiler comes with `pip install 'jax[cuda13]'` (4.4 GB),
which needs neither a GPU nor a driver for this. Only tests and `plan` use this file.
"""

import contextlib
import importlib
import unittest.mock
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.extend.backend

from xcomp_jax.model import kernels
from xcomp_jax.parallel import chips


def target(chip: chips.Chip) -> str:
  """What the compiler asks about a GPU: a GpuTargetConfigProto in text form."""
  gpu = chip.gpu
  assert gpu is not None and chip.capability is not None  # see `gpus`
  major, minor = chip.capability
  # the instructions of sm_90a and sm_100a
  feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      threads_per_core_limit: {gpu.threads}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
      driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
      shared_memory_per_core: {gpu.shared} core_count: {gpu.multiprocessors} fpus_per_core: {gpu.cores}
      memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.ghz}
      device_memory_size: {chip.memory:.0f} shared_memory_per_block_optin: {gpu.shared_block}
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
      platform_version: "Compute Capability {major}.{minor}{"a" * (major >= 9)}" name: "{gpu.model}"
    }}
    platform_name: "CUDA" device_description_str: "{gpu.model}"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }} runtime_version {{ major: 12 minor: 8 patch: 0 }}"""  # noqa: E501


def gpus(name: str, count: int = 1, hosts: int = 1) -> list[Any]:
  """Devices to compile for, so many on each of some hosts; name: of a chip that has a `Gpu`.

  Raises:
    KeyError: no such GPU.
    JaxRuntimeError: the GPU compiler is not installed.
  """
  from jax.experimental import topologies

  chip = chips.named(name)
  if chip.gpu is None:
    raise KeyError(
      f"{name}: GPUs that can be compiled for are {', '.join(c.name for c in chips.CHIPS if c.gpu)}"
    )
  topology = f"1x{hosts}x{count}"
  return list(
    topologies.get_topology_desc("", "cuda", target_config=target(chip), topology=topology).devices
  )


@contextlib.contextmanager
def computing_on(devices: Sequence[Any]) -> Generator[Sequence[Any]]:
  """Makes the first of these devices the default one for all code that asks: `model.kernels`,
  tokamax, and JAX's own kernels.

  What is traced within is for them. A jitted function remembers what it was traced as, so make it
  within, too. `jax.devices` gives these devices within, whatever platform it is asked for.
  """
  platform = kernels.card_of(devices[0]).platform

  def here(*args, **kwargs):
    return list(devices)

  seen: list[tuple[Any, str, Any]] = [
    (jax, "default_backend", lambda: platform),
    (jax, "devices", here),
    (jax, "local_devices", here),
    (jax.extend.backend, "get_default_device", lambda: devices[0]),
  ]
  with contextlib.suppress(ImportError):  # before jax 0.11 there is none
    info = importlib.import_module("jax._src.pallas.triton.gpu_info")
    seen += [
      (info, "get_device_kind", lambda: devices[0].device_kind),
      (info, "get_device_platform", lambda: platform),
    ]
  with contextlib.ExitStack() as stack:
    for owner, name, value in seen:
      stack.enter_context(unittest.mock.patch.object(owner, name, value))
    yield devices
