"""Videos with what is odd about those of the world, small and made by PyAV. Every frame shows its
number as a pattern.
"""

import fractions
import pathlib
from collections.abc import Callable, Iterable, Sequence

import av
import numpy as np

BITS, WIDTH, HEIGHT = 20, 160, 64
MS = fractions.Fraction(1, 1000)


def picture(number: int) -> np.ndarray:
  """uint8[H, W, 3]: light and dark columns spell a number; blue is half of red."""
  bits = (number >> np.arange(BITS)) & 1
  image = np.broadcast_to(
    np.repeat(40 + 180 * bits, WIDTH // BITS)[None, :, None], (HEIGHT, WIDTH, 3)
  ).astype(np.uint8)
  image[..., 2] //= 2
  return image


def read(images: Iterable[np.ndarray]) -> list[int]:
  """The numbers in pictures of any size."""
  out = []
  for image in images:
    red, blue = (image[..., c].astype(float).mean(0).reshape(BITS, -1).mean(1) for c in (0, 2))
    assert (np.abs(red - 130) > 40).all() and (red - blue > 10).all(), (
      "neither light nor dark, or red and blue swapped"
    )
    out.append(int(((red > 130) << np.arange(BITS)).sum()))
  return out


def write(
  path: pathlib.Path,
  times: Sequence[int] | int,
  codec: str = "libx264",
  *,
  rate: int | None = 25,
  base: fractions.Fraction = MS,
  pixels: str = "yuv420p",
  container: dict | None = None,
  sound: float = 0.0,
  first: int = 0,
  change: Callable | None = None,
  **options: str,
) -> pathlib.Path:
  """Writes a video whose frames are shown at `times` (in units of `base`), or so many frames at a
  constant `rate`.

  pixels: FFmpeg's pixel format. container: options of the muxer. sound: seconds of silence beside
  the video. first: the number that the
  first frame shows. change: called with the stream before it is encoded. options: of the codec. A
  number of frames needs a rate.
  """
  stamps = times if not isinstance(times, int) else [round(i / rate / base) for i in range(times)]
  with av.open(str(path), "w", options=container or {}) as output:
    stream = output.add_stream(codec, rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt, stream.time_base = WIDTH, HEIGHT, pixels, base
    stream.codec_context.time_base = base
    if change:
      change(stream)
    audio = output.add_stream("aac", rate=8000, layout="mono") if sound else None
    for i, stamp in enumerate(stamps):
      frame = av.VideoFrame.from_ndarray(picture(first + i), format="rgb24")
      frame.pts, frame.time_base = int(stamp), base
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
    if audio:
      for i in range(int(sound * 8000 / 1024)):
        block = av.AudioFrame.from_ndarray(
          np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        block.sample_rate, block.pts = 8000, i * 1024
        output.mux(audio.encode(block))
      output.mux(audio.encode())
  return path
