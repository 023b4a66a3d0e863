"""Where arrays live: the device mesh, and one table from an array's logical axes to mesh axes.

The mesh has four axes: `data` and `fsdp` both split the rows of a batch, `fsdp` also splits
parameters and optimizer state, `tensor` splits heads and MLP channels, and `context` a row's own
sequence (and, as `fsdp` does, parameters), whose queries stay split while its few keys and values
are gathered. A frozen tower's clips are split over all of them. The last three split the
vocabulary: a device has some words' logits of all rows that a loss is taken of, which are few, and
no word's parameters are sent. The compiler adds the collectives (Auto axes), but for those of a
layer's kernels, which are `gathered`. An axis that does not divide a dimension is left out for that
dimension, so every mesh runs every model; what would be wasted that way is refused where a run
begins (`check_tensor`, `data.packing`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xcomp_jax.config import ConfigError, MeshConfig, VLMConfig
from xcomp_jax.errors import XCompError

AXES = ("data", "fsdp", "tensor", "context")

# Logical axis of a parameter or an activation -> mesh axes that split it.
LOGICAL: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),  # samples
  "replica": ("data",),  # samples, of arrays that the axes of parameters split otherwise
  "sequence": ("context",),  # slots or frames of a row
  "clips": ("data", "fsdp", "context"),  # of all samples
  "embed": ("fsdp", "context"),  # a parameter's side of the width of the residual stream
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor", "fsdp", "context"),
}

# Path of a parameter -> logical axis per dimension; of several matches the one that splits into
# most parts counts, then the first. Kernels are [in, out]: what widens puts its outputs on
# `tensor`, what narrows its inputs, so a block needs one sum over `tensor`.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"(q|k|v|qkv)/kernel", ("embed", "heads")),
  (r"(gate|up|fc1|patch_embed)/kernel", ("embed", "mlp")),
  (r"lm_head/kernel", (None, "vocab")),
  (r"lm_head/kernel", ("embed", None)),  # where the devices don't divide the vocabulary
  (r"(o|proj)/kernel", ("heads", "embed")),
  (r"(down|fc2)/kernel", ("mlp", "embed")),
  (r"embed/embedding", ("vocab", None)),  # [V, D]
  (r"embed/embedding", (None, "embed")),
  (r"((q|k|v)/bias|q_bias|v_bias)", ("heads",)),
  (r"fc1/bias", ("mlp",)),
  (r"(img_)?pos_embed", (None, None, "embed")),  # [1, N, D]
  (r"cls_token", (None, None, "embed")),
  (r"(bias|scale|ls1|ls2)", ()),
)


class RuleError(XCompError, ValueError):
  """An array that the tables above can't split."""


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
  """Devices along each of AXES; one size may be -1: what is left. (If fsdp and context are,
  `forecast.schedule_run` decides.)

  Raises:
    ConfigError: sizes that are not positive, or whose product is not the device count.
  """
  sizes = {axis: getattr(config, axis) for axis in AXES}
  shown = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ConfigError(
      f"mesh {shown}: sizes must be positive, and at most one may be -1 (what is left), or fsdp "
      f"and context together",
      where="config.mesh",
      sizes=sizes,
    )
  if free:
    taken = math.prod(size for size in sizes.values() if size != -1)
    if devices % taken:
      raise ConfigError(
        f"mesh {shown}: {taken} does not divide the {devices} devices there are; set config.mesh",
        where="config.mesh",
        taken=taken,
        devices=devices,
      )
    sizes[free[0]] = devices // taken
  if math.prod(sizes.values()) != devices:
    raise ConfigError(
      f"mesh {shown} = {math.prod(sizes.values())} devices, but there are {devices}; set "
      f"config.mesh so that the product is {devices}, or one axis to -1 for what is left",
      where="config.mesh",
      sizes=sizes,
      devices=devices,
    )
  return tuple(sizes.values())


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh of all devices (or of `devices`), with Auto axes data, fsdp, tensor, context; sizes
  and errors as `mesh_sizes`.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes, types = mesh_sizes(config, len(devices)), (AxisType.Auto,) * len(AXES)
  try:
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
  except NotImplementedError:  # an axis that is no product of whole axes of the torus
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  except (
    AssertionError
  ):  # the topologies of a TPU v4 list a chip as two devices, and JAX arranges only whole chips
    grid = np.array(devices, object).reshape(sizes)
  return Mesh(grid, AXES, axis_types=types)


def check_tensor(tensor: int, cfg: VLMConfig) -> None:
  """Refuses a tensor axis that could not split what it is for.

  Raises:
    ConfigError: it does not divide the LLM's heads for queries and those for keys.
  """
  # attention would be computed whole by several devices
  if cfg.llm.heads % tensor or cfg.llm.kv_heads % tensor:
    raise ConfigError(
      f"config.mesh.tensor = {tensor} does not divide the {cfg.llm.heads} query and "
      f"{cfg.llm.kv_heads} key heads of this LLM; the most that does is "
      f"{math.gcd(cfg.llm.heads, cfg.llm.kv_heads)}",
      where="config.mesh.tensor",
      value=tensor,
      most=math.gcd(cfg.llm.heads, cfg.llm.kv_heads),
    )


def row_groups(mesh: Mesh) -> dict[int, tuple[int, ...]]:
  """{process: the row groups that its devices hold, ascending}: data x fsdp splits a batch into so
  many, in order.

  A process may hold any of them, as its devices lie on the torus. Processes whose devices hold the
  same ones (a `tensor` axis over several) all read those.

  Raises:
    ConfigError: those of two processes are neither apart nor the same, or one has more than
      another.
  """
  count = batch_devices(mesh)
  return groups_of(batch_sharding(mesh).devices_indices_map((count,)), count, dict(mesh.shape))


def groups_of(
  indices: Mapping[Any, tuple[slice, ...]], count: int, shape: Mapping[str, int]
) -> dict[int, tuple[int, ...]]:
  """`row_groups` by which of `count` rows each device holds; shape: of the mesh, for the
  message.
  """
  held: dict[int, set[int]] = {}
  for device, index in indices.items():
    held.setdefault(device.process_index, set()).update(range(count)[index[0]])
  several = {tuple(sorted(some)) for some in held.values()}
  if len({len(some) for some in several}) > 1 or sum(map(len, several)) != count:
    each = "; ".join(f"{process} {sorted(some)}" for process, some in sorted(held.items()))
    raise ConfigError(
      f"mesh {shape}: the devices of the processes hold rows that are neither apart nor the same, "
      f"of every {count} (process: rows) {each}; choose config.mesh so that data x fsdp is a "
      "multiple of the processes",
      where="config.mesh",
      rows={process: sorted(some) for process, some in held.items()},
      count=count,
    )
  return {process: tuple(sorted(some)) for process, some in held.items()}


def path_name(path: Sequence[Any]) -> str:
  """'llm/layers/0/q/kernel' of a key path of `jax.tree_util` or of `nnx.State.flat_state`."""
  names = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
  return "/".join(names[:-1] if getattr(path[-1], "name", None) == "value" else names)


def parameter_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """How the parameter at `path` is split over `mesh`.

  Raises:
    RuleError: no rule for this path, or one that does not fit its shape.
  """
  found = [_fit(axes, shape, mesh) for axes in _rules(path, shape)]
  return max(
    found,
    key=lambda spec: math.prod(
      mesh.shape[name] for names in spec if names for name in np.atleast_1d(names)
    ),
  )


def _rules(path: str, shape: Sequence[int]) -> list[tuple[str | None, ...]]:
  found = [axes for pattern, axes in PARAMETERS if re.search(rf"(^|/){pattern}$", path)]
  if not found:
    raise RuleError(f"parameter {path} has no rule in mesh.PARAMETERS; add one", where=path)
  for axes in found:
    if len(axes) > len(shape):
      raise RuleError(
        f"parameter {path} has shape {tuple(shape)}, but its sharding rule {axes} has {len(axes)} "
        f"axes",
        where=path,
        shape=tuple(shape),
        rule=axes,
      )
  return found


def param_shardings(state: Any, mesh: Mesh) -> Any:
  """A NamedSharding per leaf of `state` (arrays or ShapeDtypeStructs), a tree whose paths end as
  parameters' do: `nnx.State`, optimizer state, or both together. Scalars are on every device.

  Raises:
    RuleError: see `parameter_spec`.
  """

  def one(path, leaf):
    return NamedSharding(
      mesh, parameter_spec(path_name(path), leaf.shape, mesh) if leaf.shape else PartitionSpec()
    )

  return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of an array with a row per sample: rows over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(LOGICAL["batch"]))


def clip_sharding(mesh: Mesh) -> NamedSharding:
  """Of an array with a clip for the frozen tower in each row: evenly over all devices, whatever
  they are otherwise for.
  """
  return NamedSharding(mesh, PartitionSpec(AXES))


def visual_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
  """Of a batch's visual tokens [B, T, ...]: rows over data and fsdp, frames over context."""
  return NamedSharding(mesh, _fit(("batch", "sequence"), shape, mesh))


def cache_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
  """Of a layer's keys or values [B, S, K, h]: rows over data and fsdp, heads over tensor."""
  return NamedSharding(mesh, _fit(("batch", None, "heads"), shape, mesh))


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
  """Parts a batch is split into: its rows must be a multiple of this."""
  return math.prod(mesh.shape[axis] for axis in LOGICAL["batch"])


def mesh_of(module: nnx.Module) -> Mesh | None:
  """The mesh that a module's parameters lie on; None: on a single device, or the host."""
  leaf = next(iter(jax.tree.leaves(nnx.state(module))), None)
  sharding = getattr(leaf, "sharding", None)
  return sharding.mesh if isinstance(sharding, NamedSharding) else None


def parts(axis: str) -> int:
  """Parts that the mesh of `jax.set_mesh` splits a logical axis into; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[name] for name in LOGICAL[axis])


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def split_axes(axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
  """How an activation is split over the mesh of `jax.set_mesh`; axes: a name of LOGICAL or None per
  dimension.

  Raises:
    RuleError: two of the axes lie on the same mesh axis.
  """
  return _fit(axes, shape, jax.sharding.get_abstract_mesh())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Pins activation `x` to the mesh of `jax.set_mesh`; without one (or inside `shard_map`) returns
  `x`.

  axes: as of `split_axes`, for the leading dimensions; those beyond them are not split.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return x
  return jax.lax.with_sharding_constraint(x, split_axes(axes, x.shape))


Module = TypeVar("Module", bound=nnx.Module)


def gathered(module: Module, dtype: Any) -> Module:
  """A layer with its kernels as it computes with them: in `dtype`, and whole along the residual
  stream's width.

  Left to itself the compiler may multiply by a sharded kernel piece by piece as it comes around the
  devices, reading and
  writing all results once per piece: of 16 devices, with 96 rows of a kernel at once, memory then
  takes longer than multiplying. Inside of `remat` kernels are gathered again for the gradient, not
  kept.

  Raises:
    RuleError: a parameter without a rule in PARAMETERS.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return module
  graph, weights = nnx.split(module)

  def one(path, leaf):
    axes = _rules(path_name(path), leaf.shape)[0]
    if "embed" not in axes:
      return leaf
    # or the compiler gathers before it rounds, twice as many bytes
    leaf = constrain(leaf.astype(dtype), *axes)
    return constrain(leaf, *(None if axis == "embed" else axis for axis in axes))

  return nnx.merge(graph, jax.tree_util.tree_map_with_path(one, weights))


def parameter_table(state: Any, shardings: Any) -> str:
  """A printable table: path, shape, dtype, split, bytes per device, and totals; equal layers on one
  line.
  """
  leaves = jax.tree_util.tree_leaves_with_path(state)
  rows: dict[tuple[str, ...], dict[str, int]] = {}  # of each the bytes of its arrays
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
    name, shape = path_name(path), " x ".join(map(str, leaf.shape))
    split = ["-" if axis is None else "+".join(np.atleast_1d(axis)) for axis in sharding.spec]
    row = re.sub(r"/\d+/", "/*/", name), shape, str(leaf.dtype), ", ".join(split) or "-"
    here = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    rows.setdefault(row, {})[name] = here
  lines = [("parameter", "shape", "dtype", "split over", "MiB per device")]
  for (name, *about), sizes in rows.items():
    layers = [int(layer) for each in sizes for layer in re.findall(r"/(\d+)/", each)]
    which = "..".join(str(layer) for layer in sorted({min(layers), max(layers)})) if layers else ""
    lines.append((name.replace("*", which), *about, f"{sum(sizes.values()) / 2**20:,.2f}"))
  count = sum(math.prod(leaf.shape) for _, leaf in leaves)
  total = sum(sum(sizes.values()) for sizes in rows.values())
  lines.append((f"{len(leaves)} arrays", f"{count:,} numbers", "", "", f"{total / 2**20:,.2f}"))
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join(
    "  ".join([*(cell.ljust(w) for cell, w in zip(line[:4], widths)), line[4].rjust(widths[4])])
    for line in lines
  )


def _fit(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """Keeps of each dimension's mesh axes those, from the first on, whose product divides it."""
  taken: dict[str, str | None] = {}
  spec = []
  for dim, axis in zip(shape, axes):
    names = LOGICAL[axis] if axis else ()
    for name in names:
      if name in taken:
        raise RuleError(
          f"an array of {tuple(axes)}: {taken[name]} and {axis} would both be split over mesh axis "
          f"{name}",
          where=name,
          axes=[taken[name], axis],
        )
      taken[name] = axis
    used = [name for name in names if mesh.shape.get(name, 1) > 1]
    sizes = np.cumprod([mesh.shape[name] for name in used], dtype=int)
    # a product divides if a longer one does
    kept = used[: np.count_nonzero(dim % sizes == 0)]
    spec.append(kept[0] if len(kept) == 1 else tuple(kept) or None)
  return PartitionSpec(*spec)
