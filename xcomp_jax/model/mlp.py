"""The gated MLP of the LLM, whole or some rows at once."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from xcomp_jax.parallel.mesh import constrain, parts

ROWS = 4096  # whose six times as wide middle exists at once in training: 0.07 GB at the 2B sizes


def gated_mlp(modules, x, rows=("batch", "sequence")):
  """The gated MLP of x [B, L, D]; modules: norm, gate, up and down. rows: logical axes of B, L."""
  norm, gate, up, down = modules
  y = norm(x)
  return down(constrain(jax.nn.silu(gate(y)) * up(y), *rows, "mlp"))


def mlp_in_parts(modules, x: jax.Array) -> jax.Array:
  """`gated_mlp` of x [B, L, D], ROWS rows of a device's share of L at once, computed again part by
  part for the gradient.
  """
  B, L, D = x.shape
  X = parts("sequence") if L % parts("sequence") == 0 else 1
  count = -(-L // X // ROWS)
  if count == 1:
    return gated_mlp(modules, x)
  size = -(-L // X // count)
  x = jnp.pad(x.reshape(B, X, L // X, D), ((0, 0), (0, 0), (0, count * size - L // X), (0, 0)))
  y = _each_part(*nnx.split(modules), jnp.moveaxis(x.reshape(B, X, count, size, D), 2, 0))
  return jnp.moveaxis(y, 0, 2).reshape(B, X, count * size, D)[:, :, : L // X].reshape(B, L, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each_part(graph: nnx.GraphDef, weights: nnx.State, x: jax.Array) -> jax.Array:
  """`gated_mlp` of every part of x [parts, B, X, rows, D], one after the other.

  The gradient is our own for its sums over the parts: those of a loop of JAX's begin as zeros,
  which the compiler keeps for all layers from the program's first instruction on.
  """
  return jax.lax.map(lambda part: _one_part(graph, weights, part), x)


def _one_part(graph, weights, part):
  B, X, rows, D = part.shape
  return gated_mlp(
    nnx.merge(graph, weights), constrain(part.reshape(B, X * rows, D), "batch", "sequence")
  ).reshape(part.shape)


def _each_part_backward(graph, kept, dy):
  weights, x = kept

  def one(x, dy):
    return jax.vjp(functools.partial(_one_part, graph), weights, x)[1](dy)

  def more(sums, part):
    new, dx = one(*part)
    return jax.tree.map(jnp.add, sums, new), dx

  first, begun = one(x[0], dy[0])
  # or the compiler works at both at once
  first, rest = jax.lax.optimization_barrier((first, (x[1:], dy[1:])))
  sums, dx = jax.lax.scan(more, first, rest)
  return sums, jnp.concatenate([begun[None], dx])


_each_part.defvjp(
  lambda graph, weights, x: (_each_part(graph, weights, x), (weights, x)), _each_part_backward
)
