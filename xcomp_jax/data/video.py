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
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from xcomp_jax.data import container
from xcomp_jax.data.container import Index, TailError, VideoError
from xcomp_jax.files import absolute, local
from xcomp_jax.inputs import quoted, read_json, reading, regular

Style = Literal["train", "ask"]
Rate = Literal["own", "average"]
ReadType = Literal["video", "gif", "img", "frames"]

# for some others Pillow starts other programs
PICTURES = (
  "AVIF",
  "BMP",
  "GIF",
  "JPEG",
  "PNG",
  "PPM",
  "TIFF",
  "WEBP",
)
STILLS = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".webp")
FASTEST = 1000.0  # frames per second that may be asked for
# seconds: browsers show frames of animations that state less as long as the second
SHORTEST, USUAL = (
  0.011,
  0.1,
)
# seconds before the end of a video at which a part of it ends at the latest, in the release
# (FACTS.md 5)
TAIL = 0.1
FOLDER_RATES = {
  "tvqa": 3.0
  # frames per second of folders whose path has this in it, in the release; of others 1 (FACTS.md 5)
}


@dataclasses.dataclass(frozen=True)
class Video:
  """Sampled frames.

  frames: uint8[T, S, S, 3], RGB.
  seconds: duration of what was sampled from, as the time message states it; 0 for a still image.
  indices: int[T], each frame's number in the file; ascending, with repeats where a short video was
  stretched.
  """

  frames: UInt8[np.ndarray, "T S S 3"]
  seconds: float
  indices: Int[np.ndarray, " T"]


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
  fps).

  T is a multiple of `clip_frames`: whole clips at `target_fps`, at most `max_frames` and `vlen`,
  but at least `min_frames` where the video has them. Frames are the middles of T equal intervals.
  With fewer than `clip_frames` frames there is no clip to train on (T = 0), while asking repeats
  frames to fill one.

  Raises:
    ValueError: limits that are no multiples of `clip_frames`, or contradict each other.
  """
  _check_limits(max_frames, min_frames, clip_frames)
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

  Raises:
    ValueError: see `frame_indices`.
  """
  _check_limits(max_frames, min_frames, clip_frames)
  vlen = seconds * rate
  least = min_frames if min_frames <= vlen else int(vlen // clip_frames * clip_frames)
  count = clip_frames * max(1, int(vlen / rate * min(target_fps, 1.0) // clip_frames))
  count = max(least, min(count, max_frames))
  return first + np.rint((last - first) / max(1, count - 1) * np.arange(count)).astype(int)


def _check_limits(max_frames: int, min_frames: int, clip_frames: int) -> None:
  if not 0 < min_frames <= max_frames or min_frames % clip_frames or max_frames % clip_frames:
    raise ValueError(
      f"min_frames={min_frames} and max_frames={max_frames} must be positive multiples of "
      f"clip_frames={clip_frames}, and the first no larger than the second"
    )


def stretch(indices: Int[np.ndarray, " T"], min_frames: int) -> Int[np.ndarray, " N"]:
  """Repeats frames evenly up to `min_frames`, as asking does with short videos (FACTS.md 5)."""
  if len(indices) >= min_frames:
    return indices
  return indices[np.arange(min_frames) * len(indices) // min_frames]


def resize(frames: UInt8[np.ndarray, "T H W 3"], size: int) -> UInt8[np.ndarray, "T S S 3"]:
  """Resizes to a square without crop, by Pillow's antialiased bicubic (FACTS.md 6)."""
  return np.stack(
    [np.asarray(Image.fromarray(f).resize((size, size), Image.Resampling.BICUBIC)) for f in frames]
  )


@dataclasses.dataclass(frozen=True)
class FrameSample:
  """Says which frames were chosen, before they are decoded.

  indices: int[T], as in `Video`. times: float64[T], seconds from the first frame of the file on, at
  which they are shown. seconds: as in `Video`. size: pixels, square. lost: seconds at the end of
  the file that can't be read. stop: as in `container.pictures`.
  names: the images of a folder, else (). found: the index of a video, else None. how: the other
  arguments of `sample`, to pick again.
  """

  path: pathlib.Path
  read_type: ReadType
  indices: Int[np.ndarray, " T"]
  times: Float[np.ndarray, " T"]
  seconds: float
  size: int
  lost: float
  stop: int
  names: tuple[pathlib.Path, ...]
  found: Index | None
  how: Mapping[str, Any]


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
  if suffix not in (*STILLS, ".gif"):
    return "video"
  # what is wrong shows when it is read
  with (
    contextlib.suppress(Exception),
    Image.open(regular(file), formats=PICTURES) as image,
  ):
    # a photo with its preview
    several = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
    return "gif" if suffix == ".gif" or several else "img"
  return "gif" if suffix == ".gif" else "img"


def sample(
  path: str | os.PathLike,
  *,
  size: int,
  max_frames: int,
  min_frames: int,
  fps: float,
  clip_frames: int,
  style: Style,
  start: float | None = None,
  end: float | None = None,
  read_type: ReadType = "video",
  stream: int | None = None,
  rate: Rate = "own",
  folder_rate: float | None = None,
  tails: bool | None = None,
  found: Index | None = None,
) -> FrameSample:
  """Looks at a file and picks frames by `frame_indices`, to be decoded at `size` pixels square.

  `read_type` has the words of the annotations: "video" is any file that FFmpeg reads, "gif" an
  animation (asking goes by its own times, training by one frame per second, as the release does),
  "frames" or "img" a folder of images in natural order of their names, "img" also one still image
  (T = 1). A folder holds one frame per second, or three where its path contains "tvqa", or
  `folder_rate`, unless a file `<folder>.json` states the "duration" in seconds; a whole folder is
  sampled as if it were one per second even then, as in the release. `start` and `end`, in seconds
  from the first frame on, cut out a part, which begins with the frame that is shown at `start`; of
  a video it ends 0.1 seconds before the end at the latest, as in the release. Asking stretches a
  short video to `min_frames`.

  Args:
    path: file or folder.
    size: pixels of a side.
    max_frames: the most frames.
    min_frames: the fewest frames, if the video has so many.
    fps: frames per second at most.
    clip_frames: frames of a clip; the limits are multiples of it.
    style: of asking or training.
    start: seconds.
    end: seconds.
    read_type: see above.
    stream: number of the video stream in the file; None: the one that players take.
    rate: "own": frames have their own times; "average": they lie as far apart as the header's
      average rate says, which the release goes by. Only where frames have no constant rate these
      differ.
    folder_rate: frames per second of a folder without `<folder>.json`; None: as the release
      guesses.
    tails: whether a video that ends before it should is used all the same; None: when asking.
    found: the file's index, if it is known.

  Raises:
    FileNotFoundError: nothing at `path`.
    NoFileError: a pipe or device, which may never end.
    ValueError: limits that are no multiples of `clip_frames`, or contradict each other.
    TailError: the end of it is missing, and `tails` is false.
    VideoError: it can't be read, is cut to nothing, or has less than a clip to train on.
  """
  tails = style == "ask" if tails is None else tails
  how: dict[str, Any] = dict(
    size=size,
    max_frames=max_frames,
    min_frames=min_frames,
    fps=fps,
    clip_frames=clip_frames,
    style=style,
    start=start,
    end=end,
    read_type=read_type,
    stream=stream,
    rate=rate,
    folder_rate=folder_rate,
    tails=tails,
  )
  path = local(path, "videos are read as files")
  if not all(math.isfinite(t) for t in (start, end) if t is not None) or (start or 0) < 0:
    raise VideoError(f"{path}: start={start} and end={end} must be numbers of seconds, from 0 on")
  if not os.path.exists(path):
    raise FileNotFoundError(address(path) or f"{path} does not exist")
  if not path.is_dir():
    regular(path)
  if read_type == "img" and not path.is_dir():
    return FrameSample(path, "img", np.zeros(1, int), np.zeros(1), 0.0, size, 0.0, 1, (), None, how)
  _check_limits(max_frames, min_frames, clip_frames)
  with reading(path, VideoError):
    return _sample(path, found, how, **how)


def _sample(
  path: pathlib.Path,
  found: Index | None,
  how: Mapping[str, Any],
  *,
  size,
  max_frames,
  min_frames,
  fps,
  clip_frames,
  style,
  start,
  end,
  read_type,
  stream,
  rate,
  folder_rate,
  tails,
) -> FrameSample:
  names: list[pathlib.Path] = []
  lost = 0.0
  if read_type == "video":
    found = found or container.index(path, stream)
    lost = found.lost
    if found.lost and not tails:
      there = len(found.times)
      announced = (
        f"{found.stated} frames" if found.stated else f"{found.seconds + found.lost:.2f} seconds"
      )
      words = (
        f"it announces {announced} and has the data of "
        f"{there if found.stated else f'{found.seconds:.2f}'}; the last {found.lost:.2f} seconds "
        f"are "
        f"missing"
      )
      raise TailError(f"{path} is truncated: {words}", there)
    times, duration, constant = found.times, found.seconds, found.rate
    if rate == "average" and constant is None and found.average:
      constant, duration = found.average, len(times) / found.average
  elif read_type == "gif":
    constant, (times, duration, lost) = None, _animation(path, tails)
    if style == "train":
      constant, times, duration = 1.0, np.arange(float(len(times))), float(len(times))
  else:
    read_type, names = "frames", _folder(path)
    constant = _folder_rate(path, len(names), folder_rate)
    times, duration = np.arange(len(names)) / constant, len(names) / constant

  limits: dict[str, Any] = dict(
    max_frames=max_frames, min_frames=min_frames, target_fps=fps, clip_frames=clip_frames
  )
  if read_type == "frames" and (start is not None or end is not None):
    assert constant is not None
    first, count, seconds = _cut_folder(path, len(names), duration, constant, start, end)
    picked = folder_indices(first, first + count - 1, seconds, constant, **limits)
  else:
    first, count, seconds = _cut(
      path, times, duration, constant, start, end, TAIL if read_type == "video" else 0.0
    )
    # in the release, whatever they state
    per_second = 1.0 if read_type == "frames" else constant or count / seconds
    picked = first + frame_indices(count, per_second, style=style, **limits)
  if not len(picked):
    raise VideoError(
      f"{path} has {count} frames to sample from; training needs at least one clip of {clip_frames}"
    )
  picked = stretch(picked, min_frames) if style == "ask" else picked
  return FrameSample(
    path,
    read_type,
    picked,
    times[picked],
    seconds,
    size,
    lost,
    first + count,
    tuple(names),
    found,
    how,
  )


def without_tail(chosen: FrameSample, error: TailError) -> FrameSample:
  """Picks again, from those frames of a video that can be decoded.

  Raises:
    VideoError: see `sample`.
  """
  assert chosen.found is not None
  if not error.readable:
    raise VideoError(str(error)) from error
  how: dict[str, Any] = {**chosen.how, "tails": True}
  return sample(chosen.path, **how, found=chosen.found.cut(error.readable))


def frames(chosen: FrameSample) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
  """Decodes a sample's frames one by one, in order.

  Raises:
    TailError: the end of what was sampled from can't be decoded, even if only behind the last
      chosen frame.
    VideoError: a frame can't be decoded.
  """
  wanted, repeats = np.unique(chosen.indices, return_counts=True)
  if chosen.found is not None:
    decoded = container.pictures(chosen.path, chosen.found, wanted.tolist(), chosen.stop)
  elif chosen.read_type == "gif":
    decoded = _decode_gif(chosen.path, wanted)
  else:
    decoded = (
      _read_still(chosen.names[i] if chosen.names else chosen.path) for i in wanted.tolist()
    )
  with reading(chosen.path, VideoError):
    for i, image in enumerate(decoded):
      image = resize(image[None], chosen.size)[0]
      for _ in range(repeats[i]):
        yield image


def load_frames(path: str | os.PathLike, *, size: int, **settings) -> Video:
  """All frames of a `sample` with these settings.

  Raises:
    FileNotFoundError, VideoError: see `sample` and `frames`. No frames come back in such a case,
      not even the good ones.
  """
  chosen = sample(path, size=size, **settings)
  try:
    images = _all(chosen)
  except TailError as error:
    if not chosen.how["tails"]:
      raise
    chosen = without_tail(chosen, error)
    images = _all(chosen)
  return Video(images, chosen.seconds, chosen.indices)


def _all(chosen: FrameSample) -> np.ndarray:
  images = np.empty((len(chosen.indices), chosen.size, chosen.size, 3), np.uint8)
  for i, image in enumerate(frames(chosen)):
    images[i] = image
  return images


def _cut(
  path,
  times: np.ndarray,
  duration: float,
  rate: float | None,
  start: float | None,
  end: float | None,
  tail: float,
) -> tuple[int, int, float]:
  """First frame, number of frames, and seconds of the part between `start` and `end`. rate: None:
  `times` say when frames are shown.
  """
  if start is None and end is None:
    return 0, len(times), duration
  begin = max(0.0, start or 0.0)
  stop = duration if end is None else min(duration, end)
  if begin < duration - tail:  # what begins behind has no other end
    stop = min(stop, duration - tail)
  if rate is not None:
    first = int(begin * rate)
    count = min(max(1, int((stop - begin) * rate)), len(times) - first) if begin < stop else 0
  else:  # from the frame that is shown at `begin` on
    first = max(0, int(np.searchsorted(times, begin, "right")) - 1)
    count = int(np.searchsorted(times, stop)) - first if begin < stop else 0
  if count <= 0:
    raise _nothing(path, duration, start, end)
  return first, count, float(stop - begin)


def _cut_folder(
  path, count: int, duration: float, rate: float, start: float | None, end: float | None
) -> tuple[int, int, float]:
  """The same of a folder: from the second image on, and with both ends, as in the release."""
  begin = max(0.0, start or 0.0)
  stop = duration if end is None else min(duration, end)
  first, last = max(1, round(begin * rate)), min(round(stop * rate), count - 1)
  if begin >= stop:
    raise _nothing(path, duration, start, end)
  if first > last:
    raise VideoError(
      f"{path}: no image lies between start={start} and end={end}; a part of a folder never has "
      f"its first image, as in the release, and "
      f"this folder has {count}"
    )
  return first, last - first + 1, stop - begin


def _nothing(path, duration: float, start: float | None, end: float | None) -> VideoError:
  return VideoError(
    f"{path} lasts {duration:.2f} seconds; nothing lies between start={start} and end={end}"
  )


def _animation(path, tails: bool) -> tuple[np.ndarray, float, float]:
  """When the frames of an animation are shown, float64[N]; for how long all of them; and at least
  how many seconds of its end can't be read.

  Raises:
    TailError: there are such, and `tails` is false. VideoError: nothing can be read.
  """
  shown: list[float] = []
  lost = 0.0
  with (
    reading(path, VideoError, "animation that can be read"),
    Image.open(regular(path), formats=PICTURES) as image,
  ):
    for i in itertools.count():
      try:
        image.seek(i)
        image.load()  # or some formats don't know their frame's time
      except Exception as error:
        if not shown or isinstance(error, MemoryError):
          raise
        # a GIF doesn't say how many frames it has: behind the last one is its end
        lost = 0.0 if isinstance(error, EOFError) else USUAL
        break
      own = image.info.get("duration", 0) / 1000
      shown.append(own if own >= SHORTEST else USUAL)
      if image.format != "GIF" and i + 1 == getattr(image, "n_frames", 1):
        break
  if lost and not tails:
    raise TailError(
      f"{path} can't be read behind its first {len(shown)} frames; it is truncated or damaged",
      len(shown),
    )
  ends = np.cumsum(shown)
  return np.concatenate([[0.0], ends[:-1]]), float(ends[-1]), lost


def _decode_gif(path, wanted) -> Iterator[np.ndarray]:
  with Image.open(regular(path), formats=PICTURES) as image:
    for i in wanted.tolist():
      with reading(path, VideoError, f"animation whose frame {i} can be read"):
        image.seek(i)
        picture = np.asarray(image.convert("RGB"))
      yield picture


def _folder(path) -> list[pathlib.Path]:
  if not path.is_dir():
    raise VideoError(f"{path} is a file; a folder of images was expected")

  def natural(file: pathlib.Path) -> tuple[list[int | str], str]:
    return [
      int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", file.name))
    ], file.name

  names = sorted((p for p in path.iterdir() if p.suffix.lower() in STILLS), key=natural)
  if not names:
    raise VideoError(f"{path} holds no images ({', '.join(STILLS)})")
  return names


def _folder_rate(path, vlen: int, given: float | None) -> float:
  """Frames per second of a folder: of `<folder>.json`, which gives the duration, else `given`, else
  the release's guess.
  """
  path = pathlib.Path(absolute(path))
  side = path.with_name(path.name + ".json")
  if not side.exists():
    return given or next(
      (rate for name, rate in FOLDER_RATES.items() if name in str(path).lower()), 1.0
    )
  said = read_json(side, VideoError)
  duration = said.get("duration") if isinstance(said, dict) else None
  if not isinstance(duration, (int, float)) or not 1e-9 <= duration <= 1e9:
    raise VideoError(f'{side} must be {{"duration": seconds}}, not {quoted(said)}')
  return vlen / duration


def _read_still(path) -> np.ndarray:
  file = regular(path)
  with (
    reading(file, VideoError, "image that can be read"),
    Image.open(file, formats=PICTURES) as image,
  ):
    if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would make almost all of it white
      image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return np.asarray(image.convert("RGB"))
