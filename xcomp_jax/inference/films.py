"""What a program may hand over as a video: files, bytes, pictures."""

import contextlib
import io
import itertools
import os
import pathlib
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from xcomp_jax.data import stills, video
from xcomp_jax.data.sampling import FRAMES
from xcomp_jax.data.video import FrameSample, VideoError

# a picture: uint8[H, W, 3], or an image of Pillow
Picture = np.ndarray | Image.Image
# a path of a file or folder; a file's content; frames in order; or (seconds, frame) pairs
Film = str | os.PathLike | bytes | Picture | Iterable[Picture] | Iterable[tuple[float, Picture]]


@contextlib.contextmanager
def on_disk(film: Any) -> Generator[Any]:
  """What to read frames from: of bytes, a file that holds them while the block lasts; else the film
  itself.

  Raises:
    OSError: there is no room for it.
  """
  if not isinstance(film, (bytes, bytearray, memoryview)):
    yield film
    return
  with tempfile.TemporaryDirectory(prefix="xcomp_jax-") as folder:
    file = pathlib.Path(folder) / f"bytes{_suffix(bytes(film))}"
    file.write_bytes(film)
    yield file


def _suffix(content: bytes) -> str:
  """The ending of a name by which readers take bytes for a picture or an animation; "" for
  videos.
  """
  try:
    with Image.open(io.BytesIO(content), formats=stills.FORMATS) as image:
      return ".jpg" if image.format == "MPO" else f".{(image.format or '').lower()}"
  except Exception:  # a picture that is damaged says so when it is read
    return ""


def pictures_of(
  film: Iterable[Any], times: Sequence[float] | np.ndarray | None, size: int
) -> tuple[Sequence[np.ndarray], np.ndarray | None]:
  """Frames in memory, and when they are shown.

  Args:
    film: see `Film`. An array is left where it is; of what else there is, all frames are kept at
      `size` pixels square.
    times: seconds of each; None: those that the film's pairs have, else one frame per second.
    size: of a side.

  Raises:
    VideoError: something among them is no picture, or pairs and `times` are both there.
  """
  given = None if times is None else np.asarray(times, np.float64)
  if isinstance(film, np.ndarray):
    frames = list(film[None] if film.ndim == 3 else film)
    return [_array(frames[0], 0), *frames[1:]] if frames else [], given
  seconds: list[float] = []
  pictures = [
    video.resize(_array(frame, number)[None], size)[0]
    for number, frame in enumerate(itertools.islice(_frames(film, seconds), FRAMES.stop))
  ]
  if len(pictures) not in FRAMES:
    raise VideoError(
      f"a video has 1 to {FRAMES[-1]:,} frames, not {len(pictures):,} or more",
      where="frames",
      frames=len(pictures),
    )
  if seconds and (given is not None or len(seconds) != len(pictures)):
    raise VideoError(
      "either all frames come as (seconds, frame), or none does and `times` may be given",
      where="times",
    )
  return pictures, np.asarray(seconds, np.float64) if seconds else given


def _frames(film: Iterable[Any], seconds: list[float]) -> Iterator[Any]:
  """The frames among frames and (seconds, frame) pairs, whose seconds are appended."""
  for item in film:
    if isinstance(item, tuple) and len(item) == 2:
      seconds.append(float(item[0]))
      item = item[1]
    yield item


def _array(frame: Any, number: int) -> np.ndarray:
  """uint8[H, W, 3] of a picture."""
  image = isinstance(frame, Image.Image) and frame.mode != "F"  # whose range nobody knows
  found = stills.pixels(frame) if image else np.asarray(frame)
  if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3 or not found.size:
    raise VideoError(
      f"frame {number} is {type(frame).__name__} of {found.dtype}{list(found.shape)}; it must be a "
      f"picture, uint8[height, width, 3] (RGB) or an image of Pillow",
      where="frames",
      number=number,
    )
  return found


def sample_film(
  film: Any, times: Sequence[float] | np.ndarray | None, size: int, **request: Any
) -> FrameSample:
  """Picks the frames of a film by `video.sample` or `video.sample_pictures`.

  Raises:
    FileNotFoundError, VideoError: see there, and `pictures_of`.
  """
  if isinstance(film, (str, os.PathLike)):
    if not os.fspath(film):
      raise VideoError("the path of the video is empty", where="video")
    if times is not None:
      raise VideoError("times are for frames in memory; a file has its own", where="times")
    return video.sample(film, size=size, read_type=video.kind(film), **request)
  film = [film] if isinstance(film, Image.Image) else film
  if not isinstance(film, Iterable) or isinstance(film, bytes) or hasattr(film, "read"):
    raise VideoError(
      f"a video is a path, bytes (of an open file: its .read()), an array or frames, not "
      f"{type(film).__name__}",
      where="video",
    )
  pictures, shown = pictures_of(film, times, size)
  return video.sample_pictures(pictures, shown, size=size, **request)
