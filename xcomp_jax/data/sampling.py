"""Which frames of a video are taken: settings, and their arithmetic."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from xcomp_jax.errors import XCompError

Style = Literal["train", "ask"]
Rate = Literal["own", "average"]

# Bounds of what can be asked for, and of what a store can say.
SIZES = range(1, 4_097)  # pixels of a frame's side
CLIPS = range(1, 1_001)  # frames of a clip
FRAMES = range(1, 1_000_001)  # of a video


class LimitsError(XCompError, ValueError):
  """Numbers of frames that contradict each other. fields: min_frames, max_frames."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSettings:
  """How frames are chosen for training (FACTS.md 5 and 6); the defaults are the release's.

  `predecode` has an option for each, jobs go by them, and store.json says them, in this order.
  """

  image_size: int = 448  # pixels, square
  max_frames: int = 1024
  min_frames: int = 128
  fps: float = 8.0  # frames per second, at most
  clip_frames: int = 8  # frames of a clip
  rate: Rate = "own"  # when frames of a video are shown
  keep_tails: bool = False  # take what can be read of a video that ends before it should


def frame_indices(
  vlen: int,
  fps: float,
  *,
  max_frames: int,
  min_frames: int,
  target_fps: float,
  clip_frames: int,
  style: Style,
) -> Int[np.ndarray, " T"]:
  """Which of `vlen` frames at `fps` to take (FACTS.md 5; the paper: 128 to 1024 frames at up to 8
  fps), by limits that `check_limits` lets through.

  T is a multiple of `clip_frames`: whole clips at `target_fps`, at most `max_frames` and `vlen`,
  but at least `min_frames` where the video has them. Frames are the middles of T equal intervals.
  With fewer than `clip_frames` frames there is no clip to train on (T = 0), while asking repeats
  frames to fill one.
  """
  if vlen < clip_frames:
    return np.arange(clip_frames if style == "ask" and vlen else 0) * vlen // clip_frames
  whole = vlen // clip_frames * clip_frames
  count = clip_frames * max(1, int(vlen / fps * target_fps // clip_frames))
  count = max(min(count, max_frames, whole), min(min_frames, whole))
  bounds = np.linspace(0, vlen, count + 1).astype(int)
  return (bounds[:-1] + bounds[1:] - 1) // 2


def folder_indices(
  first: int,
  last: int,
  seconds: float,
  rate: float,
  *,
  max_frames: int,
  min_frames: int,
  target_fps: float,
  clip_frames: int,
) -> Int[np.ndarray, " T"]:
  """Which images to take of a part of a folder, from `first` to `last`, both included (FACTS.md 5).

  Whole clips at one frame per second, or `target_fps` if that is less; at most `max_frames`, at
  least `min_frames` where `seconds` at `rate` have them. T points at equal distances; images repeat
  where there are fewer.
  """
  vlen = seconds * rate
  least = min_frames if min_frames <= vlen else int(vlen // clip_frames * clip_frames)
  count = clip_frames * max(1, int(vlen / rate * min(target_fps, 1.0) // clip_frames))
  count = max(least, min(count, max_frames))
  return first + np.rint((last - first) / max(1, count - 1) * np.arange(count)).astype(int)


def check_limits(max_frames: int, min_frames: int, clip_frames: int) -> None:
  """Refuses limits that are no multiples of a clip, or contradict each other.

  Raises:
    LimitsError: they do.
  """
  if not 0 < min_frames <= max_frames or min_frames % clip_frames or max_frames % clip_frames:
    raise LimitsError(
      f"min_frames={min_frames} and max_frames={max_frames} must be positive multiples of "
      f"clip_frames={clip_frames}, and the first no larger than the second",
      min_frames=min_frames,
      max_frames=max_frames,
    )


def stretch(indices: Int[np.ndarray, " T"], min_frames: int) -> Int[np.ndarray, " N"]:
  """Repeats frames evenly up to `min_frames`, as asking does with short videos (FACTS.md 5)."""
  count = max(len(indices), min_frames)
  return indices[np.arange(count) * len(indices) // count]
