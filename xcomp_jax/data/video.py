"""From a video file to the frames the model sees: which ones, when they are shown, decoded,
resized.

A video's rotation tag is applied; the EXIF tag of still images is not, as in the release.
Interlaced frames stay as they are.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from xcomp_jax.data import container, decoder, stills
from xcomp_jax.data.container import Index
from xcomp_jax.data.sampling import (
  Rate,
  Style,
  check_limits,
  folder_indices,
  frame_indices,
  stretch,
)
from xcomp_jax.data.streams import TailError, VideoError
from xcomp_jax.files import local
from xcomp_jax.inputs import reading, regular

ReadType = Literal["video", "gif", "img", "frames"]

FASTEST = 1000.0  # frames per second that may be asked for
# seconds before the end of a video at which a part of it ends at the latest, in the release
# (FACTS.md 5)
TAIL = 0.1


def resize(frames: UInt8[np.ndarray, "T H W 3"], size: int) -> UInt8[np.ndarray, "T S S 3"]:
  """Resizes to a square without crop, by Pillow's antialiased bicubic (FACTS.md 6)."""
  return np.stack(
    [np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BICUBIC)) for f in frames]
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameRequest:
  """What is asked of a file or folder.

  `read_type` has the words of the annotations: "video" is any file that FFmpeg reads, "gif" an
  animation (asking goes by its own times, training by one frame per second, as the release does),
  "frames" or "img" a folder of images in natural order of their names, "img" also one still image
  (T = 1). A folder holds one frame per second, or three where its path contains "tvqa", or
  `folder_rate`, unless a file `<folder>.json` states the "duration" in seconds; a whole folder is
  sampled as if it were one per second even then, as in the release. `start` and `end`, in seconds
  from the first frame on, cut out a part, which begins with the frame that is shown at `start`; of
  a video it ends 0.1 seconds before the end at the latest, as in the release. Asking stretches a
  short video to `min_frames`.

  size: pixels of a side.
  max_frames: the most frames.
  min_frames: the fewest frames, if the video has so many.
  fps: frames per second at most.
  clip_frames: frames of a clip; the limits are multiples of it.
  style: of asking or training.
  start, end: seconds.
  read_type: see above.
  stream: number of the video stream in the file; None: the one that players take.
  rate: "own": frames have their own times; "average": they lie as far apart as the header's average
    rate says, which the release goes by. Only where frames have no constant rate these differ.
  folder_rate: frames per second of a folder without `<folder>.json`; None: as the release guesses.
  tails: whether a video that ends before it should is used all the same; None: when asking.
  """

  size: int
  max_frames: int
  min_frames: int
  fps: float
  clip_frames: int
  style: Style
  start: float | None = None
  end: float | None = None
  read_type: ReadType = "video"
  stream: int | None = None
  rate: Rate = "own"
  folder_rate: float | None = None
  tails: bool | None = None

  @property
  def takes_tails(self) -> bool:
    """Whether a video that ends before it should is used."""
    return self.style == "ask" if self.tails is None else self.tails


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameSample:
  """Says which frames were chosen, before they are decoded.

  indices: int[T], each frame's number in the file; ascending, with repeats where a short video was
  stretched. times: float64[T], seconds from the first frame of the file on, at which they are
  shown. request: what was asked. seconds: duration of what was sampled from, as the time message
  states it; 0 for a still image. lost: seconds at the end of the file that can't be read. stop: as
  in `decoder.pictures`.
  names: the images of a folder, else (). found: the index of a video, else None. pictures: uint8[H,
  W, 3] each, of a video that is in memory, else ().
  """

  path: pathlib.Path
  indices: Int[np.ndarray, " T"]
  times: Float[np.ndarray, " T"]
  request: FrameRequest
  seconds: float = 0.0
  lost: float = 0.0
  stop: int = 1
  names: tuple[pathlib.Path, ...] = ()
  found: Index | None = None
  pictures: Sequence[np.ndarray] = ()


def address(path: str | os.PathLike) -> str:
  """Says what to do about an address of the web, which is no path; "" if it is none."""
  # a pathlib.Path has one slash left
  found = re.search(r"(?:^|/)(https?|ftp|rtsp|rtmp):/+(.*)", os.fspath(path))
  return (
    f"{found[1]}://{found[2]} is an address; nothing is downloaded here: give a file of this "
    f"machine"
    if found
    else ""
  )


def kind(path: str | os.PathLike) -> ReadType:
  """Says what a file or folder is, where no annotation does."""
  file = pathlib.Path(path)
  if file.is_dir():
    return "frames"
  suffix = file.suffix.lower()
  if suffix not in (*stills.SUFFIXES, ".gif"):
    return "video"
  # what is wrong shows when it is read
  with contextlib.suppress(Exception), stills.opened_image(file) as image:
    # a photo with its preview
    several = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
    return "gif" if suffix == ".gif" or several else "img"
  return "gif" if suffix == ".gif" else "img"


def sample(path: str | os.PathLike, *, found: Index | None = None, **request: Any) -> FrameSample:
  """Looks at a file or folder and picks frames by `frame_indices`, to be decoded at `size` pixels
  square.

  Args:
    path: file or folder.
    found: the file's index, if it is known.
    request: fields of `FrameRequest`.

  Raises:
    FileNotFoundError: nothing at `path`.
    NoFileError: a pipe or device, which may never end.
    LimitsError: limits that are no multiples of `clip_frames`, or contradict each other.
    TailError: the end of it is missing, and `tails` is false.
    VideoError: it can't be read, is cut to nothing, or has less than a clip to train on.
  """
  asked = FrameRequest(**request)
  path = local(path, "videos are read as files")
  _check_ends(path, asked)
  if not os.path.exists(path):
    raise FileNotFoundError(address(path) or f"{path} does not exist")
  if not path.is_dir():
    regular(path)
  if asked.read_type == "img" and not path.is_dir():
    return FrameSample(path=path, indices=np.zeros(1, int), times=np.zeros(1), request=asked)
  check_limits(asked.max_frames, asked.min_frames, asked.clip_frames)
  with reading(path, VideoError):
    return _pick(path, asked, _look(path, asked, found))


def _check_ends(path: pathlib.Path, asked: FrameRequest) -> None:
  """Sees to it that `start` and `end` are seconds."""
  times = [t for t in (asked.start, asked.end) if t is not None]
  numbers = all(isinstance(t, (int, float, np.number)) and math.isfinite(t) for t in times)
  if not numbers or (asked.start or 0) < 0:
    raise VideoError(
      f"{path}: start={asked.start} and end={asked.end} must be numbers of seconds, from 0 on",
      where=path,
      start=asked.start,
      end=asked.end,
    )


LAST = 1e9  # seconds that a video can have
MEMORY = pathlib.Path("the frames in memory")  # how messages call them


def sample_pictures(
  pictures: Sequence[UInt8[np.ndarray, "H W 3"]],
  times: Float[np.ndarray, " T"] | None,
  **request: Any,
) -> FrameSample:
  """Picks frames of a video that is in memory, as `sample` does; a single one is a still image.

  Args:
    pictures: all frames, in order of time.
    times: float64[T], seconds at which they are shown, which count from the first frame's; None:
      one per second.
    request: fields of `FrameRequest`.

  Raises:
    LimitsError: see `sample`.
    VideoError: there is no frame, times that are not theirs, or a part without frames.
  """
  asked = dataclasses.replace(FrameRequest(**request), read_type="frames")
  count = len(pictures)
  _check_ends(MEMORY, asked)
  shown = np.arange(float(count)) if times is None else np.asarray(times, np.float64)
  if (
    not count
    or shown.shape != (count,)
    or not np.isfinite(shown).all()
    or (np.diff(shown) < 0).any()
    or shown[-1] - shown[0] >= LAST
  ):
    raise VideoError(
      f"{count:,} frames in memory, and times of shape {list(shown.shape)}: there must be at least "
      f"one frame, and a time in seconds for each, ascending, over less than {LAST:,.0f} seconds",
      where="times",
      frames=count,
    )
  if count == 1:
    still = dataclasses.replace(asked, read_type="img")
    return FrameSample(
      path=MEMORY, indices=np.zeros(1, int), times=np.zeros(1), request=still, pictures=pictures
    )
  check_limits(asked.max_frames, asked.min_frames, asked.clip_frames)
  shown = shown - shown[0]
  rate = 1.0 if times is None else None
  last = float(np.median(np.diff(shown))) if shown[-1] else 1.0
  seen = _Seen(times=shown, seconds=float(shown[-1]) + last, rate=rate)
  return dataclasses.replace(_pick(MEMORY, asked, seen), pictures=pictures)


@dataclasses.dataclass(kw_only=True)
class _Seen:
  """What there is to sample from.

  times: float64[N], when its frames are shown. seconds: for how long all are. rate: frames per
  second; None: `times` say when.
  """

  times: np.ndarray
  seconds: float
  rate: float | None
  lost: float = 0.0
  names: tuple[pathlib.Path, ...] = ()
  found: Index | None = None


def _look(path: pathlib.Path, asked: FrameRequest, found: Index | None) -> _Seen:
  """Finds the frames of a file or folder, and when they are shown.

  Raises:
    TailError: the end of it is missing, and tails are not wanted. VideoError: it can't be read.
  """
  if asked.read_type == "video":
    return _look_at_video(path, asked, found or container.index(path, asked.stream))
  if asked.read_type == "gif":
    times, seconds, lost = stills.animation(path, asked.takes_tails)
    if asked.style == "train":  # one frame per second
      return _Seen(
        times=np.arange(float(len(times))), seconds=float(len(times)), rate=1.0, lost=lost
      )
    return _Seen(times=times, seconds=seconds, rate=None, lost=lost)
  names = stills.images_of(path)
  rate = stills.folder_rate(path, len(names), asked.folder_rate)
  return _Seen(
    times=np.arange(len(names)) / rate, seconds=len(names) / rate, rate=rate, names=tuple(names)
  )


def _look_at_video(path: pathlib.Path, asked: FrameRequest, found: Index) -> _Seen:
  if found.lost and not asked.takes_tails:
    there, announced = f"{found.seconds:.2f}", f"{found.seconds + found.lost:.2f} seconds"
    if found.stated:
      there, announced = str(len(found.times)), f"{found.stated} frames"
    raise TailError(
      f"{path} is truncated: it announces {announced} and has the data of {there}; the last "
      f"{found.lost:.2f} seconds are missing",
      readable=len(found.times),
      where=path,
      stated=found.stated,
    )
  rate, seconds = found.rate, found.seconds
  if asked.rate == "average" and rate is None and found.average:
    rate, seconds = found.average, len(found.times) / found.average
  return _Seen(times=found.times, seconds=seconds, rate=rate, lost=found.lost, found=found)


def _pick(path: pathlib.Path, asked: FrameRequest, seen: _Seen) -> FrameSample:
  """Picks frames of the part that is asked for."""
  limits: dict[str, Any] = dict(
    max_frames=asked.max_frames,
    min_frames=asked.min_frames,
    target_fps=asked.fps,
    clip_frames=asked.clip_frames,
  )
  if seen.names and (asked.start is not None or asked.end is not None):
    assert seen.rate is not None  # folders have one
    first, count, seconds = _cut_folder(path, asked, seen, seen.rate)
    picked = folder_indices(first, first + count - 1, seconds, seen.rate, **limits)
  else:
    first, count, seconds = _cut(path, asked, seen)
    # in the release, whatever a folder states
    per_second = 1.0 if seen.names else seen.rate or count / seconds
    picked = first + frame_indices(count, per_second, style=asked.style, **limits)
  if not len(picked):
    raise VideoError(
      f"{path} has {count} frames to sample from; training needs at least one clip of "
      f"{asked.clip_frames}",
      where=path,
      found=count,
    )
  if asked.style == "ask":
    picked = stretch(picked, asked.min_frames)
  return FrameSample(
    path=path,
    indices=picked,
    times=seen.times[picked],
    request=asked,
    seconds=seconds,
    lost=seen.lost,
    stop=first + count,
    names=seen.names,
    found=seen.found,
  )


def _cut(path: pathlib.Path, asked: FrameRequest, seen: _Seen) -> tuple[int, int, float]:
  """First frame, number of frames, and seconds of the part between `start` and `end`."""
  if asked.start is None and asked.end is None:
    return 0, len(seen.times), seen.seconds
  begin, stop = _ends(asked, seen)
  tail = TAIL if asked.read_type == "video" else 0.0
  if begin < seen.seconds - tail:  # what begins behind has no other end
    stop = min(stop, seen.seconds - tail)
  if begin >= stop:
    raise _nothing(path, asked, seen)
  if seen.rate is not None:
    first = int(begin * seen.rate)
    count = min(max(1, int((stop - begin) * seen.rate)), len(seen.times) - first)
  else:  # from the frame that is shown at `begin` on
    first = max(0, int(np.searchsorted(seen.times, begin, "right")) - 1)
    count = int(np.searchsorted(seen.times, stop)) - first
  if count <= 0:
    raise _nothing(path, asked, seen)
  return first, count, float(stop - begin)


def _cut_folder(
  path: pathlib.Path, asked: FrameRequest, seen: _Seen, rate: float
) -> tuple[int, int, float]:
  """The same of a folder: from the second image on, and with both ends, as in the release."""
  begin, stop = _ends(asked, seen)
  if begin >= stop:
    raise _nothing(path, asked, seen)
  first, last = max(1, round(begin * rate)), min(round(stop * rate), len(seen.names) - 1)
  if first > last:
    raise VideoError(
      f"{path}: no image lies between start={asked.start} and end={asked.end}; a part of a folder "
      f"never has its first image, as in the release, and this folder has {len(seen.names)}",
      where=path,
      images=len(seen.names),
    )
  return first, last - first + 1, stop - begin


def _ends(asked: FrameRequest, seen: _Seen) -> tuple[float, float]:
  """Seconds at which the part that is asked for begins and ends."""
  stop = seen.seconds if asked.end is None else min(seen.seconds, asked.end)
  return max(0.0, asked.start or 0.0), stop


def _nothing(path: pathlib.Path, asked: FrameRequest, seen: _Seen) -> VideoError:
  return VideoError(
    f"{path} lasts {seen.seconds:.2f} seconds; nothing lies between start={asked.start} and "
    f"end={asked.end}",
    where=path,
    seconds=seen.seconds,
  )


def without_tail(chosen: FrameSample, error: TailError) -> FrameSample:
  """Picks again, from those frames of a video that can be decoded.

  Raises:
    VideoError: see `sample`.
  """
  assert chosen.found is not None
  if not error.readable:
    raise VideoError(str(error), **error.fields) from error
  request = vars(chosen.request) | {"tails": True}
  return sample(chosen.path, **request, found=chosen.found.cut(error.readable))


def frames(chosen: FrameSample) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
  """Decodes a sample's frames one by one, in order.

  Raises:
    TailError: the end of what was sampled from can't be decoded, even if only behind the last
      chosen frame.
    VideoError: a frame can't be decoded.
  """
  wanted, repeats = np.unique(chosen.indices, return_counts=True)
  if len(chosen.pictures):
    decoded = (np.asarray(chosen.pictures[i]) for i in wanted.tolist())
  elif chosen.found is not None:
    decoded = decoder.pictures(chosen.path, chosen.found, wanted.tolist(), chosen.stop)
  elif chosen.request.read_type == "gif":
    decoded = stills.read_animation(chosen.path, wanted.tolist())
  else:
    decoded = (
      stills.read_still(chosen.names[i] if chosen.names else chosen.path) for i in wanted.tolist()
    )
  with reading(chosen.path, VideoError):
    for image, count in zip(decoded, repeats.tolist()):
      yield from itertools.repeat(resize(image[None], chosen.request.size)[0], count)
