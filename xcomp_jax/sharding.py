"""Where arrays live: the device mesh, one table from parameter path to mesh axes, and `constrain` for activations.

The mesh has three axes: `data` and `fsdp` both split the batch, `fsdp` also splits parameters and optimizer state,
`tensor` splits heads, MLP channels and the vocabulary. The compiler adds the collectives (Auto axes). An axis that
does not divide a dimension is left out for that dimension, so every mesh runs every model.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xcomp_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split samples

# Path of a parameter -> mesh axis per dimension; the first match counts. Kernels are [in, out]: what widens puts its
# outputs on `tensor`, what narrows its inputs, so a block needs one sum over `tensor`.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"(q|k|v|qkv|gate|up|fc1|patch_embed|lm_head)/kernel", ("fsdp", "tensor")),
  (r"(o|down|fc2|proj)/kernel", ("tensor", "fsdp")),
  (r"embed/embedding", ("tensor", "fsdp")),  # [V, D]
  (r"((q|k|v|fc1)/bias|q_bias|v_bias)", ("tensor",)),
  (r"(bias|scale)", ()),
)

# Logical axis of an activation -> mesh axes.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
  "batch": BATCH,
  "heads": ("tensor",),
  "mlp": ("tensor",),
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of all devices (or of `devices`), with Auto axes data, fsdp, tensor.

  Raises:
    ConfigError: sizes that are not positive (one may be -1: what is left), or whose product is not the device count.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = [config.data, config.fsdp, config.tensor]
  shown = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ConfigError(f"mesh {shown}: sizes must be positive, and at most one may be -1 (what is left)")
  if -1 in sizes:
    rest = math.prod(size for size in sizes if size != -1)
    if len(devices) % rest:
      raise ConfigError(f"mesh {shown}: {rest} does not divide the {len(devices)} devices there are; set config.mesh")
    sizes[sizes.index(-1)] = len(devices) // rest
  if math.prod(sizes) != len(devices):
    raise ConfigError(
      f"mesh {shown} = {math.prod(sizes)} devices, but there are {len(devices)}; set config.mesh so that the "
      f"product is {len(devices)}, or one axis to -1 for what is left"
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_name(path: Sequence[Any]) -> str:
  """'llm/layers/0/q/kernel' of a key path of `jax.tree_util` or of `nnx.State.flat_state`."""
  names = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
  return "/".join(names[:-1] if getattr(path[-1], "name", None) == "value" else names)


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """How the parameter at `path` is split over `mesh`.

  Raises:
    ValueError: no rule for this path, or a rule for another number of dimensions.
  """
  for pattern, axes in PARAMETERS:
    if re.search(rf"(^|/){pattern}$", path):
      if len(axes) > len(shape):
        raise ValueError(f"parameter {path} has shape {tuple(shape)}, but its sharding rule {axes} has {len(axes)} axes")
      return _fit([(axis,) for axis in axes], shape, mesh)
  raise ValueError(f"parameter {path} has no rule in sharding.PARAMETERS; add one")


def param_shardings(state: Any, mesh: Mesh) -> Any:
  """A NamedSharding per leaf of `state` (arrays or ShapeDtypeStructs), a tree whose paths end as parameters' do:
  `nnx.State`, optimizer state, or both together. Scalars are on every device.

  Raises:
    ValueError: see `parameter_spec`.
  """

  def one(path, leaf):
    return NamedSharding(mesh, parameter_spec(path_name(path), leaf.shape, mesh) if leaf.shape else PartitionSpec())

  return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of every array of a Batch: rows over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
  """Parts a batch is split into: its rows must be a multiple of this."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_parts() -> int:
  """Parts that the mesh of `jax.set_mesh` splits a batch into; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else batch_devices(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def split(axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
  """How an activation is split over the mesh of `jax.set_mesh`; axes: a name of ACTIVATIONS or None per dimension."""
  wanted = [ACTIVATIONS[axis] if axis else () for axis in axes]
  return _fit(wanted, shape, jax.sharding.get_abstract_mesh())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins activation `x` to the mesh of `jax.set_mesh`; without one (or inside `shard_map`) returns `x`.

  axes: as of `split`, for the leading dimensions; those beyond them are not split.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return x
  return jax.lax.with_sharding_constraint(x, split(axes, x.shape))


def parameter_table(state: Any, shardings: Any) -> str:
  """A printable table: path, shape, dtype, split, bytes per device, and totals; equal layers on one line."""
  rows: dict[tuple, list] = {}
  leaves = jax.tree_util.tree_leaves_with_path(state)
  count = total = 0
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
    name = path_name(path)
    bytes_here = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    split = ", ".join("-" if axis is None else "+".join(np.atleast_1d(axis)) for axis in sharding.spec) or "-"
    key = (re.sub(r"/\d+/", "/*/", name), leaf.shape, str(leaf.dtype), split)
    row = rows.setdefault(key, [[], 0])
    row[0] += [int(i) for i in re.findall(r"/(\d+)/", name)]
    row[1] += bytes_here
    count += math.prod(leaf.shape)
    total += bytes_here
  lines = [("parameter", "shape", "dtype", "split over", "MiB per device")]
  for (name, shape, dtype, split), (layers, size) in rows.items():
    if layers:
      name = name.replace("*", f"{min(layers)}..{max(layers)}" if len(layers) > 1 else str(layers[0]))
    lines.append((name, " x ".join(map(str, shape)), dtype, split, f"{size / 2**20:,.2f}"))
  lines.append((f"{len(leaves)} arrays", f"{count:,} numbers", "", "", f"{total / 2**20:,.2f}"))
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join(
    "  ".join(cell.rjust(w) if i == 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
    for line in lines
  )


def _fit(axes: Sequence[tuple[str, ...]], shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """Keeps of each dimension's mesh axes those, from the first on, whose product divides it."""
  spec = []
  for dim, names in zip(shape, axes):
    kept, parts = [], 1
    for name in names:
      size = mesh.shape.get(name, 1)
      if size == 1:
        continue
      if dim % (parts * size):
        break
      kept.append(name)
      parts *= size
    spec.append(None if not kept else kept[0] if len(kept) == 1 else tuple(kept))
  return PartitionSpec(*spec)
