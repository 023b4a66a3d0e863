"""In what a model computes: precision and mesh, entered for each piece of work and then left."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import jax
from flax import nnx

from xcomp_jax.model import vlm
from xcomp_jax.parallel.mesh import mesh_of, replicated

Piece = TypeVar("Piece")
Got = TypeVar("Got")


@contextlib.contextmanager
def computing(model: vlm.VLM) -> Generator[None]:
  """Computes exactly in float32, and where the model's parameters lie: on their mesh, or on their
  device, for which kernels are then chosen.

  Without it an accelerator multiplies float32 in fewer bits.
  """
  mesh = mesh_of(model.projector)  # a small part of it
  (device, *_) = features_place(model).device_set
  with (
    jax.default_matmul_precision("highest" if model.cfg.dtype == "float32" else None),
    jax.default_device(device) if mesh is None else jax.set_mesh(mesh),
  ):
    yield


def features_place(model: vlm.VLM) -> jax.sharding.Sharding:
  """Where features lie for a model: on every device of its mesh, or on its only one."""
  if (mesh := mesh_of(model.projector)) is not None:
    return replicated(mesh)
  leaf = jax.tree.leaves(nnx.state(model.projector))[0]
  return leaf.sharding


def stepwise(
  context: Callable[[], contextlib.AbstractContextManager], steps: Generator[Piece, None, Got]
) -> Generator[Piece, None, Got]:
  """Runs every step of a generator in a context that is left while others work, and ends it where
  nobody takes the next.
  """
  try:
    while True:
      with context():
        try:
          piece = next(steps)
        except StopIteration as end:
          return end.value
      yield piece
  finally:
    steps.close()


def drained(
  steps: Generator[Piece, None, Got], write: Callable[[Any], None] = lambda piece: None
) -> Got:
  """What a generator returns behind its last piece; `write` gets each."""
  while True:
    try:
      write(next(steps))
    except StopIteration as end:
      return end.value
