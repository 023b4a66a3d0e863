"""Rows of samples, for tests."""

import numpy as np

from xcomp_jax.data.batch import Shape, collate


def one_each(examples, frames, prefix, text, rows=None):
  """A batch with one sample in each row."""
  visual = next(
    (e.visual for e in examples if e.visual is not None), np.zeros((0, 16, 32), np.float32)
  )
  kind = visual.shape[1:], visual.dtype
  return collate(
    [[e] for e in examples],
    Shape(rows=rows or len(examples), samples=1, prefix=prefix, frames=frames, text=text),
    kind,
  )
