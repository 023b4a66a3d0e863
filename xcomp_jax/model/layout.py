"""Where slots lie: samples of a row side by side, blocks of a sequence, and each device's part."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Int

from xcomp_jax.parallel.mesh import split_axes


def even_size(length: int, most: int) -> int:
  """Returns the size of blocks: as few as `most` allows, then as small as they may be."""
  return -(-length // -(-length // most))


def in_blocks(x: jax.Array, size: int, mode: str = "constant") -> jax.Array:
  """Cuts x [B, L, ...] into blocks of rows [n, B, size, ...]; the end is padded."""
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2), mode=mode)
  return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def from_blocks(blocks: jax.Array, length: int) -> jax.Array:
  """Undoes `in_blocks`: [n, B, size, ...] -> [B, length, ...]."""
  x = jnp.moveaxis(blocks, 0, 1)
  return x.reshape(len(x), -1, *x.shape[3:])[:, :length]


def by_blocks(
  run: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, most: int, first: Any
) -> jax.Array:
  """Runs rows x [B, L, ...] in blocks of `most` at most, one after another, and again for the
  gradient, for which nothing is kept.

  run: from a block, and the slot of its first row, to rows. first: slot of the first row of all.
  """
  blocks = in_blocks(x, even_size(x.shape[1], most))  # [n, B, size, ...]
  slots = first + jnp.arange(len(blocks)) * blocks.shape[2]
  run = jax.checkpoint(run)
  return from_blocks(jax.lax.map(lambda part: run(*part), (blocks, slots)), x.shape[1])


def padded(x: jax.Array, count: int, axis: int = 1, value: bool | int = 0) -> jax.Array:
  """Pads the end of an axis with `count` values."""
  if not count:
    return x
  return jax.lax.pad(
    x, np.array(value, x.dtype), [(0, count * (i == axis), 0) for i in range(x.ndim)]
  )


def sample_order(sample: Int[Array, "B S"]) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Orders the slots of a row so that those of a sample are next to each other, and padding is
  last.

  Returns:
    int32[B, S] each: the slot at every place of that order; the place of every slot; and the place
    where the keys of every place begin, which end with its own. Padding sees itself, because rows
    without a key have NaN as gradient in some kernels.
  """
  order = jnp.argsort(jnp.where(sample < 0, np.iinfo(np.int32).max, sample), axis=1)
  ordered = jnp.take_along_axis(sample, order, 1)
  first = (ordered < 0) | (ordered != jnp.roll(ordered, 1, 1)) | (jnp.arange(sample.shape[1]) == 0)
  start = jax.lax.cummax(jnp.where(first, jnp.arange(sample.shape[1]), 0), axis=1)
  return order, jnp.argsort(order, axis=1), start


@jax.custom_vjp
def moved(x, order, back):
  """Gives x[:, order]; its gradient is moved back, which is faster than the sum that a gather has
  as gradient.
  """
  return jnp.take_along_axis(x, order[:, :, None, None], 1)


moved.defvjp(
  lambda x, order, back: (moved(x, order, back), (back, order)),
  lambda ways, gradient: (moved(gradient, *ways), None, None),
)


@dataclasses.dataclass(frozen=True)
class DeviceParts:
  """How kernels, which the compiler can't split, run on every device's own part of the arrays.

  mesh: that of `jax.set_mesh`; None where arrays are not split, or already are.
  queries: PartitionSpec of [B, L, H, h].
  keys: that of [B, S, K, h].
  """

  mesh: Any = None
  queries: Any = None
  keys: Any = None

  @property
  def rows(self) -> Any:
    """The mesh axes that split the rows of queries; None: every device has all."""
    return None if self.mesh is None else self.queries[1]

  def run(self, one: Callable[..., jax.Array], q, k, v, *of_keys) -> jax.Array:
    """Calls `one` with each device's part of q, k and v, and of arrays [B, S] of their keys."""
    if self.mesh is None:
      return one(q, k, v, *of_keys)
    specs = self.queries, self.keys, self.keys, *(PartitionSpec(self.keys[0]) for _ in of_keys)
    return jax.shard_map(one, in_specs=specs, out_specs=self.queries, check_vma=False)(
      q, k, v, *of_keys
    )


def device_parts(q: jax.Array, k: jax.Array, causal: bool) -> DeviceParts:
  """Splits samples (or the clips of a tower), heads and, where they are causal, queries."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return DeviceParts()
  # the fewer heads decide
  keys = split_axes(("batch" if causal else "clips", None, "heads", None), k.shape)
  rows = split_axes((None, "sequence"), q.shape)[1] if causal else None
  return DeviceParts(mesh, PartitionSpec(keys[0], rows, *keys[2:]), keys)
