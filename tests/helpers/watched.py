"""Frames of a file, all at once; commands take them one by one."""

import os
from typing import NamedTuple

import numpy as np

from xcomp_jax.data import video
from xcomp_jax.data.streams import TailError


class Watched(NamedTuple):
  """frames: uint8[T, S, S, 3], RGB. seconds, indices: as in `video.FrameSample`."""

  frames: np.ndarray
  seconds: float
  indices: np.ndarray


def load_frames(path: str | os.PathLike, **request) -> Watched:
  """All frames of a `video.sample`, and errors as of that and `video.frames`; without the end of
  the file, if that can't be decoded and is not needed.
  """
  chosen = video.sample(path, **request)
  try:
    images = np.stack(list(video.frames(chosen)))
  except TailError as error:
    if not chosen.request.takes_tails:
      raise
    chosen = video.without_tail(chosen, error)
    images = np.stack(list(video.frames(chosen)))
  return Watched(images, chosen.seconds, chosen.indices)
