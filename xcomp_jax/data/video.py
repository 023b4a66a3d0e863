"""From a video file to the frames the model sees: which ones, decoded, resized.

Frames are oriented as OpenCV hands them out (a video's rotation tag is applied); the EXIF tag of still images
is not applied, as in the release.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Literal

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from xcomp_jax.files import local

cv2.setNumThreads(1)  # readers run side by side; the pool would only oversubscribe the cores

Style = Literal["train", "ask"]
ReadType = Literal["video", "gif", "img", "frames"]

PICTURES = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow would start other programs for some others
STILLS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # any of them may open an MP4 or MOV file


class VideoError(ValueError):
  """A video or image that can't be used; the message names the file and why."""


@dataclasses.dataclass(frozen=True)
class Video:
  """Sampled frames.

  frames: uint8[T, S, S, 3], RGB.
  seconds: duration of what was sampled from, as the time message states it; 0 for a still image.
  indices: int[T], each frame's number in the file; ascending, with repeats where a short video was stretched.
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
  """Which of `vlen` frames at `fps` to take (FACTS.md 5; the paper: 128 to 1024 frames at up to 8 fps).

  T is a multiple of `clip_frames`: whole clips at `target_fps`, at most `max_frames` and `vlen`, but at least
  `min_frames` where the video has them. Frames are the middles of T equal intervals. With fewer than
  `clip_frames` frames there is no clip to train on (T = 0), while asking repeats frames to fill one.

  Raises:
    ValueError: limits that are no multiples of `clip_frames`, or contradict each other.
  """
  if not 0 < min_frames <= max_frames or min_frames % clip_frames or max_frames % clip_frames:
    raise ValueError(
      f"min_frames={min_frames} and max_frames={max_frames} must be positive multiples of "
      f"clip_frames={clip_frames}, and the first no larger than the second"
    )
  if vlen < clip_frames:
    return np.arange(clip_frames if style == "ask" and vlen else 0) * vlen // clip_frames
  whole = vlen // clip_frames * clip_frames
  count = clip_frames * max(1, int(vlen / fps * target_fps // clip_frames))
  count = max(min(count, max_frames, whole), min(min_frames, whole))
  bounds = np.linspace(0, vlen, count + 1).astype(int)
  return (bounds[:-1] + bounds[1:] - 1) // 2


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
class Sample:
  """Frames that were chosen, not decoded yet.

  indices: int[T], as in `Video`. times: float64[T], seconds from the start of the file at which they are shown.
  seconds: as in `Video`. size: pixels, square. The rest says how to decode them.
  """

  path: pathlib.Path
  read_type: ReadType
  indices: Int[np.ndarray, " T"]
  times: Float[np.ndarray, " T"]
  seconds: float
  size: int
  vlen: int
  stop: int
  names: tuple[pathlib.Path, ...]


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
) -> Sample:
  """Looks at a file and picks frames by `frame_indices`, to be decoded at `size` pixels square.

  `read_type` has the words of the annotations: "video" is any file that FFmpeg reads, "gif" an animation at
  one frame per second, "frames" or "img" a folder of images in natural order of their names, "img" also one
  still image (T = 1). A folder holds one frame per second unless a file `<folder>.json` states the "duration"
  in seconds; training samples as if it did even then (FACTS.md 5). `start` and `end`, in seconds, cut out a
  part. Asking stretches a short video to `min_frames`.

  Raises:
    FileNotFoundError: nothing at `path`.
    VideoError: it can't be read, is cut to nothing, or has less than a clip to train on.
  """
  path = local(path, "videos are read as files")
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; check the path in the annotation and the data root")
  if read_type == "img" and not path.is_dir():
    return Sample(path, "img", np.zeros(1, int), np.zeros(1), 0.0, size, 1, 1, ())

  names: list[pathlib.Path] = []
  if read_type == "video":
    vlen, rate = _probe(path)
  elif read_type == "gif":
    vlen, rate = _count_gif(path), 1.0
  else:
    read_type, names = "frames", _folder(path)
    vlen, rate = len(names), _folder_rate(path, len(names))

  first, count, seconds = _cut(path, vlen, rate, start, end)
  sampled_rate = 1.0 if names and style == "train" else rate
  picked = frame_indices(
    count,
    sampled_rate,
    max_frames=max_frames,
    min_frames=min_frames,
    target_fps=fps,
    clip_frames=clip_frames,
    style=style,
  )
  if not len(picked):
    raise VideoError(
      f"{path} has {count} frames to sample from; training needs at least one clip of {clip_frames}"
    )
  picked = (stretch(picked, min_frames) if style == "ask" else picked) + first
  return Sample(path, read_type, picked, picked / rate, seconds, size, vlen, first + count, tuple(names))


def frames(chosen: Sample) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
  """Decodes a sample's frames one by one, in order.

  Raises:
    VideoError: the file ends before the frames it announces, even if only behind the last chosen one.
  """
  wanted, times = np.unique(chosen.indices, return_counts=True)
  if chosen.read_type == "video":
    decoded = _decode(chosen.path, chosen.vlen, wanted, chosen.stop)
  elif chosen.read_type == "gif":
    decoded = _decode_gif(chosen.path, wanted)
  else:
    decoded = (_read_still(chosen.names[i] if chosen.names else chosen.path) for i in wanted.tolist())
  for i, image in enumerate(decoded):
    image = resize(image[None], chosen.size)[0]
    for _ in range(times[i]):
      yield image


def load(path: str | os.PathLike, *, size: int, **settings) -> Video:
  """All frames of a `sample` with these settings.

  Raises:
    FileNotFoundError, VideoError: see `sample` and `frames`. No frames come back in such a case, not even the
      good ones.
  """
  chosen = sample(path, size=size, **settings)
  images = np.empty((len(chosen.indices), size, size, 3), np.uint8)
  for i, image in enumerate(frames(chosen)):
    images[i] = image
  return Video(images, chosen.seconds, chosen.indices)


def _cut(path, vlen: int, rate: float, start: float | None, end: float | None) -> tuple[int, int, float]:
  """First frame, number of frames, and seconds of the part between `start` and `end`."""
  duration = vlen / rate
  if start is None and end is None:
    return 0, vlen, duration
  begin = max(0.0, start or 0.0)
  stop = duration if end is None else min(duration, end)
  first = int(begin * rate)
  count = min(int((stop - begin) * rate), vlen - first)
  if count <= 0:
    raise VideoError(f"{path} lasts {duration:.2f} seconds; nothing lies between start={start} and end={end}")
  return first, count, stop - begin


def _probe(path) -> tuple[int, float]:
  """Frames and frames per second of a video file, from its packets; they are not decoded."""
  if path.is_dir():
    raise VideoError(f"{path} is a folder; read it as read_type='frames'")
  if not path.stat().st_size:
    raise VideoError(f"{path} is empty (0 bytes)")
  capture = cv2.VideoCapture(
    os.path.abspath(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_FORMAT, -1]
  )  # an absolute path: "12:30.mp4" would be read by protocol "12"; -1: packets instead of images
  try:
    rate = capture.get(cv2.CAP_PROP_FPS)
    if not capture.isOpened() or not 0 < rate < np.inf:
      raise VideoError(
        f"{path} can't be read as a video; it may be truncated, or of a format FFmpeg does not know"
      )
    announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    packets, last = 0, 0.0
    while capture.grab():
      packets += 1
      last = max(last, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
  finally:
    capture.release()
  # MP4 files list their frames. Others only state a duration, which OpenCV turns into frames and which sound
  # that outlasts the pictures may stretch: those have to reach its end, give or take.
  seconds = announced / rate
  with open(path, "rb") as file:
    listed = file.read(8)[4:] in _MP4_BOXES
  if packets < announced and (listed or last + 1 / rate < seconds - max(1.5 / rate, min(1.0, 0.1 * seconds))):
    raise VideoError(f"{path} is truncated: it announces {announced} frames and has the data of {packets}")
  if not packets:
    raise VideoError(f"{path} holds no frames")
  return packets, rate


def _decode(path, vlen: int, wanted, stop: int) -> Iterator[np.ndarray]:
  """The wanted frames, ascending; every frame before `stop` has to decode. Seeking would be slower."""
  wanted = set(wanted.tolist())
  capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
  try:
    for i in range(stop):
      good, image = capture.grab(), None
      if good and i in wanted:
        good, image = capture.retrieve()
      if not good:
        raise VideoError(
          f"{path} announces {vlen} frames, but only {i} could be decoded: it is truncated or damaged, or was "
          "cut without encoding it again (then do that)"
        )
      if image is not None:
        yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
  finally:
    capture.release()


def _count_gif(path) -> int:
  try:
    with Image.open(path) as image:
      return getattr(image, "n_frames", 1)
  except (OSError, EOFError, SyntaxError) as error:
    raise VideoError(f"{path} can't be read as a GIF: {error}") from error


def _decode_gif(path, wanted) -> Iterator[np.ndarray]:
  with Image.open(path) as image:
    for i in wanted.tolist():
      try:
        image.seek(i)
        yield np.asarray(image.convert("RGB"))
      except (OSError, EOFError, SyntaxError) as error:
        raise VideoError(
          f"{path} announces {getattr(image, 'n_frames', 1)} frames, but frame {i} can't be decoded: {error}"
        ) from error


def _folder(path) -> list[pathlib.Path]:
  if not path.is_dir():
    raise VideoError(f"{path} is a file; a folder of images was expected")
  natural = lambda p: [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", p.name))]
  names = sorted((p for p in path.iterdir() if p.suffix.lower() in STILLS), key=natural)
  if not names:
    raise VideoError(f"{path} holds no images ({', '.join(STILLS)})")
  return names


def _folder_rate(path, vlen: int) -> float:
  """Frames per second of a folder: 1, unless `<folder>.json` gives the duration (FACTS.md 5)."""
  side = path.with_name(path.name + ".json")
  if not side.exists():
    return 1.0
  try:
    duration = float(json.loads(side.read_text())["duration"])
    if not 0 < duration < np.inf:
      raise ValueError(duration)
  except (ValueError, KeyError, TypeError) as error:
    raise VideoError(f'{side} must be {{"duration": seconds}}: {error!r}') from error
  return vlen / duration


def _read_still(path) -> np.ndarray:
  try:
    with Image.open(path, formats=PICTURES) as image:
      if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would make almost all of it white
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
      return np.asarray(image.convert("RGB"))
  except (OSError, SyntaxError) as error:
    raise VideoError(f"{path} can't be read as an image: {error}") from error
