"""Decodes frames of a video whose index is known."""

import bisect
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from xcomp_jax.data.container import Index
from xcomp_jax.data.streams import (
  Key,
  LostError,
  TailError,
  VideoError,
  opened_stream,
  whole_frames,
)

SKIP = (
  8  # frames; a key frame that is no further ahead is reached sooner by decoding on than by seeking
)
# H.273's number to PyAV's name; newer PyAV knows BT.2020's by itself
MATRICES = {
  1: "ITU709",
  4: "FCC",
  7: "SMPTE240M",
}
# degrees counterclockwise, as a display matrix
TURNS = {
  0: (1, 0, 0, 1),
  90: (0, -1, 1, 0),
  180: (-1, 0, 0, -1),
  270: (0, 1, -1, 0),
}


def pictures(
  path: pathlib.Path, found: Index, wanted: Sequence[int], stop: int, skip: int = SKIP
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  """Decodes frames of a video, rotated as players do.

  From one wanted frame to the next it decodes on, or begins again at the last key frame before the
  next, if that is ahead.

  Args:
    path: the file.
    found: its `index`.
    wanted: numbers of frames, ascending.
    stop: one more than the number of the last frame that may be chosen; that frame must be
      decodable, even if it is not wanted.
    skip: frames; a key frame that is no further ahead is reached by decoding on.

  Yields:
    uint8[H, W, 3], RGB, in the file's size.

  Raises:
    FileNotFoundError: see `index`.
    TailError: from some frame before `stop` on nothing can be decoded.
    VideoError: a wanted frame is damaged.
  """
  done = 0
  for way in (found, dataclasses.replace(found, keys=())):
    try:
      for image in _pictures(path, way, wanted[done:], stop, skip):
        done += 1
        yield image
      return
    except (
      LostError,
      TailError,
    ):  # seeking can fail in a damaged file whose frames decode in order
      if not way.keys:
        raise


def _pictures(
  path: pathlib.Path, found: Index, wanted: Sequence[int], stop: int, skip: int
) -> Iterator[np.ndarray]:
  with opened_stream(path, found.stream) as (container, stream):
    run = _numbered(found, whole_frames(container, stream))
    number, image, turn, convert = -1, None, None, VideoReformatter()
    asked = set(wanted)
    for i in sorted(asked | {stop - 1}):
      key = _key(found, i)
      if key is not None and number < i and _number(found, key.pts) > number + skip:
        run = _numbered(found, whole_frames(container, stream, key))
      while number < i:
        last = number
        number, image = next(run, (None, None))
        if number is None:
          raise TailError(
            f"{path}: the last {found.seconds - found.times[last + 1]:.2f} of {found.seconds:.2f} "
            f"seconds can't be decoded; it is truncated or damaged",
            readable=last + 1,
            where=path,
          )
      if i in asked and number != i:
        raise VideoError(
          f"{path}: the frame at {found.times[i]:.2f} seconds, number {i}, is damaged",
          where=path,
          frame=i,
        )
      if i in asked:
        # of the first alone: asking for side data makes a cycle, and frees a frame late
        turn = display_matrix(image) if turn is None else turn
        yield _upright(rgb(convert, image), *turn)


def _numbered(found: Index, run: Iterator[Any]) -> Iterator[tuple[int, Any]]:
  """Those decoded frames that have a number."""
  for n, image in enumerate(run):
    if found.pts is None:
      yield n, image
    elif (
      image.pts is not None
      and (i := _number(found, image.pts)) < len(found.pts)
      and found.pts[i] == image.pts
    ):
      yield i, image


def _number(found: Index, stamp: int) -> int:
  """The number of the first frame that is shown at a time stamp or later."""
  assert found.pts is not None  # or nothing is sought
  return int(np.searchsorted(found.pts, stamp))


def _key(found: Index, i: int) -> Key | None:
  """The last key frame from which frame `i` can be decoded."""
  if found.pts is None:
    return None
  at = bisect.bisect_right(found.keys, int(found.pts[i]), key=lambda key: key.pts)
  return found.keys[at - 1] if at else None


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
  """The display matrix [[a, b], [c, d]] of a frame: (x, y) is shown at (a x + c y, b x + d y)."""
  try:
    found = frame.side_data.get("DISPLAYMATRIX")
  # of a frame that has data of a type PyAV has no name for it tells the angle alone, and 14.0
  # nothing
  except ValueError as error:
    if not hasattr(frame, "rotation"):
      raise VideoError(
        f"PyAV {av.__version__} can't tell how this video is rotated ({error}): pip install -U av",
        av=av.__version__,
      ) from error
    return TURNS.get(round(frame.rotation) % 360, TURNS[0])
  if found is None:
    return TURNS[0]
  a, b, _, c, d = np.frombuffer(bytes(found), np.int32)[:5].tolist()
  return a, b, c, d


def _upright(image: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
  """Turns and mirrors an image as a display matrix says."""
  if abs(a) >= abs(b):
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
  return image.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]


def rgb(convert: VideoReformatter, frame: Any) -> np.ndarray:
  """Pixels by the matrix and range that the file says (BT.601's where it says none), colours
  interpolated as by OpenCV.
  """
  matrix, full = MATRICES.get(int(frame.colorspace)), int(frame.color_range) == 2
  if matrix is None and not full:
    return convert.reformat(frame, format="rgb24", interpolation="BICUBIC").to_ndarray()
  scale = "JPEG" if full else "MPEG"
  # PyAV before 16 looks at the matrix only if the result, which as RGB has none, is said to have
  # another.
  how: dict[str, Any] = {"src_colorspace": matrix, "dst_colorspace": "ITU601"} if matrix else {}
  return convert.reformat(
    frame,
    format="rgb24",
    interpolation="BICUBIC",
    src_color_range=scale,
    dst_color_range=scale,
    **how,
  ).to_ndarray()
