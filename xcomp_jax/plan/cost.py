"""Counts the operations of a program in its jaxpr, loops by their length.

XLA's own `cost_analysis` counts a loop's body once, and a kernel as nothing.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.interpreters import partial_eval

from xcomp_jax.model import tiles


@dataclasses.dataclass
class Flops:
  """Operations of a program on all devices, a multiply-add as two: of matrix products outside and
  inside of kernels.

  unknown: kernels that are not counted.
  """

  products: float = 0.0
  kernels: float = 0.0
  unknown: set[str] = dataclasses.field(default_factory=set)

  @property
  def total(self) -> float:
    """All that could be counted."""
    return self.products + self.kernels


# Matrix products per pair of a query and a key, of splash attention's three kernels: scores and
# values; scores and the gradients of weights and queries; scores and the gradients of values,
# weights and keys.
SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}
TILED = {"causal_attention": True, "full_attention": False}  # `attend` in tiles: is it causal


def count_flops(jaxpr: Any, causal: Callable[[tuple[int, ...]], bool]) -> Flops:
  """Counts a jaxpr's matrix products, padding and recomputation included; loops by their length.

  Attention in tiles, whose loops have no length of their own, counts by the scores that it
  computes.

  Args:
    jaxpr: as traced, for the whole mesh.
    causal: whether an attention kernel on queries of this shape [..., H, L, h] is.
  """
  total, jaxpr = Flops(), getattr(jaxpr, "jaxpr", jaxpr)
  # what nobody uses is not compiled either
  jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  _add_equations(jaxpr, 1.0, causal, total)
  return total


def _add_equations(jaxpr, times: float, causal, total: Flops) -> None:
  """Adds what the equations of a jaxpr compute that runs so many times."""
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      total.products += times * _product(equation)
    elif params.get("name") in TILED:
      total.products += times * _tiled(equation, TILED[params["name"]])
    elif name == "pallas_call":
      flops = _splash(equation, causal)
      total.kernels += times * (flops or 0)
      total.unknown |= set() if flops else {str(params["name"])}
    else:
      inside = times * params.get("length", 1) * (params["mesh"].size if name == "shard_map" else 1)
      parts = list(jax.extend.core.jaxprs_in_params(params))
      each = inside / (len(parts) if name == "cond" else 1)  # branches count alike
      for part in parts:
        _add_equations(getattr(part, "jaxpr", part), each, causal, total)


def _product(equation) -> float:
  """Operations of a matrix product."""
  (contracted, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  return (
    2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
  )


def _tiled(equation, causal: bool) -> float:
  """Operations of attention in tiles on queries [B, L, H, h] and keys [B, S, K, h]."""
  (B, L, H, h), S = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
  return 4.0 * B * H * h * tiles.tiled_scores(L, S, causal)


def _splash(equation, causal) -> float | None:
  """Operations of a kernel of splash attention; of a causal one those blocks that it visits. None:
  another kernel.
  """
  found = re.match(r"splash_\w+?_(fwd|dq|dkv)_", str(equation.params["name"]))
  if not found:
    return None
  # Queries and keys are the first two operands of [..., heads, length, size]; the ones before are
  # tables of blocks.
  q, k = [
    v.aval.shape
    for v in equation.invars
    if len(v.aval.shape) >= 3 and jax.dtypes.issubdtype(v.aval.dtype, np.floating)
  ][:2]
  blocks = equation.params["grid_mapping"].grid[-1]
  seen = (blocks + 1) / (2 * blocks) if causal(q) else 1.0
  return SPLASH[found[1]] * 2.0 * math.prod(q) * k[-2] * seen
