"""Reads still images, animations and folders of images, by Pillow."""

import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from xcomp_jax.data.streams import TailError, VideoError
from xcomp_jax.inputs import quoted, read_json, reading, regular

# for some others Pillow starts other programs
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".webp")
# seconds: browsers show frames of animations that state less as long as the second
SHORTEST, USUAL = 0.011, 0.1


def opened_image(path: pathlib.Path) -> Image.Image:
  """Opens an image, of a format that Pillow reads by itself; it closes at the end of a `with`."""
  return Image.open(regular(path), formats=FORMATS)


def animation(path: pathlib.Path, tails: bool) -> tuple[np.ndarray, float, float]:
  """When the frames of an animation are shown, float64[N]; for how long all of them; and at least
  how many seconds of its end can't be read.

  Raises:
    TailError: there are such, and `tails` is false. VideoError: nothing can be read.
  """
  shown: list[float] = []
  lost = 0.0
  with reading(path, VideoError, "animation that can be read"), opened_image(path) as image:
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
      readable=len(shown),
      where=path,
    )
  ends = np.cumsum(shown)
  return np.concatenate([[0.0], ends[:-1]]), float(ends[-1]), lost


def read_animation(
  path: pathlib.Path, wanted: Sequence[int]
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  """Decodes frames of an animation, by their numbers, ascending."""
  with opened_image(path) as image:
    for i in wanted:
      with reading(path, VideoError, f"animation whose frame {i} can be read"):
        image.seek(i)
        picture = np.asarray(image.convert("RGB"))
      yield picture


def images_of(path: pathlib.Path) -> list[pathlib.Path]:
  """Lists the images of a folder, in natural order of their names.

  Raises:
    VideoError: it is no folder, or has none.
  """
  if not path.is_dir():
    raise VideoError(f"{path} is a file; a folder of images was expected", where=path, found="file")

  def natural(file: pathlib.Path) -> tuple[list[int | str], str]:
    return [
      int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", file.name))
    ], file.name

  names = sorted((p for p in path.iterdir() if p.suffix.lower() in SUFFIXES), key=natural)
  if not names:
    raise VideoError(
      f"{path} holds no images ({', '.join(SUFFIXES)})", where=path, found="no images"
    )
  return names


def folder_rate(path: pathlib.Path, vlen: int, given: float | None) -> float:
  """Frames per second of a folder: of `<folder>.json`, which gives the duration, else `given`, else
  the release's guess.
  """
  path = path.absolute()
  side = path.with_name(path.name + ".json")
  if not side.exists():
    return given or (3.0 if "tvqa" in str(path).lower() else 1.0)  # FACTS.md 5
  said = read_json(side, VideoError)
  duration = said.get("duration") if isinstance(said, dict) else None
  if not isinstance(duration, (int, float)) or not 1e-9 <= duration <= 1e9:
    raise VideoError(f'{side} must be {{"duration": seconds}}, not {quoted(said)}', where=side)
  return vlen / duration


def read_still(path: pathlib.Path) -> UInt8[np.ndarray, "H W 3"]:
  """Decodes one image."""
  with reading(path, VideoError, "image that can be read"), opened_image(path) as image:
    return pixels(image)


def pixels(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
  """An image of Pillow as RGB."""
  if image.mode.startswith("I"):  # 16 bits; Pillow's conversion would make almost all of it white
    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
  return np.asarray(image.convert("RGB"))
