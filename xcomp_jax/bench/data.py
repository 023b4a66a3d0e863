"""Measures pre-decoding: decoding, writing, reading.

  # a synthetic video, 30 frames per second
  python -m xcomp_jax.bench_data make hour.mp4 --seconds 3600
  python -m xcomp_jax.bench_data run hour.mp4

`run` takes the frames of one training sample from the video (FACTS.md 5) and prints two tables: how
fast they are decoded; and sizes and rates of a store that holds them raw, as JPEG, or as features.
Times are the best of several.
"""

import collections
import concurrent.futures
import functools
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import ml_dtypes
import numpy as np

from xcomp_jax.bench.options import command_parser
from xcomp_jax.bench.timing import timed
from xcomp_jax.cli import command
from xcomp_jax.data import store, store_writing, video
from xcomp_jax.files import expanduser
from xcomp_jax.inputs import plain

CLIP = 8  # frames
sample = functools.partial(
  video.sample, max_frames=1024, min_frames=128, fps=8.0, clip_frames=CLIP, style="train"
)
TOWER = store.Features("random", tokens_per_frame=16, width=1024)  # of the released models


def make_video(path: str, seconds: int, width: int, height: int) -> None:
  """A disc that wanders over a gradient, at 30 frames per second (MPEG-4)."""
  writer = cv2.VideoWriter(
    plain(path, "the name of the file"), cv2.VideoWriter.fourcc(*"mp4v"), 30, (width, height)
  )
  if not writer.isOpened():
    raise OSError(f"{path} can't be written")
  x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
  ground = np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)
  for i in range(30 * seconds):
    centre = (int(width * (0.5 + 0.4 * np.sin(i / 97))), int(height * (0.5 + 0.4 * np.cos(i / 61))))
    colour = (i % 256, 80, 255 - i % 256)
    writer.write(cv2.circle(ground.copy(), centre, height // 8, colour, -1))
  writer.release()


def best(work: Callable[[], object], repeat: int) -> tuple[float, float]:
  """Seconds and CPU seconds, the best of `repeat` each."""
  runs = [timed(work) for _ in range(repeat)]
  return min(run.seconds for run in runs), min(run.cpu for run in runs)


def decoding_costs(path: str, size: int, repeat: int) -> tuple[np.ndarray, str]:
  """Frames uint8[T, S, S, 3] of a training sample, and a table of what they cost."""
  chosen = sample(path, size=size)
  frames = np.stack(list(video.frames(chosen)))
  spent = {
    "looking at the packets": best(lambda: sample(path, size=size), repeat),
    # keeps none of them
    "decoding": best(lambda: collections.deque(video.frames(chosen), maxlen=0), repeat),
  }
  files, taken = chosen.stop, len(frames)
  rows = (
    f"\n  {name:24}{s:8.2f}{cpu:8.2f}{files / s:10,.0f}{taken / s:10,.1f}"
    for name, (s, cpu) in spent.items()
  )
  return frames, (
    f"decoding {files:,} frames, {taken:,} of them sampled and resized to {size}: seconds, CPU-s, "
    f"frames of the file and samples per second{''.join(rows)}"
  )


def storing(frames: np.ndarray, samples: int, repeat: int) -> dict[str, dict[str, float]]:
  """Stores with `samples` copies of frames uint8[T, S, S, 3]: for each kind size, seconds of
  reading all, and rates.

  Frames per second are those written, and read by one thread and by two.
  """
  size = frames.shape[1]
  clips = frames.reshape(-1, CLIP, *frames.shape[1:])
  tokens = (
    np.random.default_rng(0)
    .normal(size=(len(clips), CLIP * TOWER.tokens_per_frame, TOWER.width))
    .astype(ml_dtypes.bfloat16)
  )
  kinds: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "raw": (clips, {}),
    "JPEG 95": (clips, {"quality": 95}),
    "features": (tokens, {"features": TOWER}),
  }
  with tempfile.TemporaryDirectory() as place:
    return {
      name: _stored(pathlib.Path(place) / name, visual, samples, repeat, image_size=size, **how)
      for name, (visual, how) in kinds.items()
    }


def _stored(
  place: pathlib.Path, visual: np.ndarray, samples: int, repeat: int, **how: Any
) -> dict[str, float]:
  """A row of `storing`. how: arguments of `write_store`."""
  talk = ({"from": "human", "value": "<image>"}, {"from": "gpt", "value": ""})
  items = [
    (
      store.StoredSample(
        id=str(i), source="", annotation="", position=i, conversations=talk, time_message=""
      ),
      visual,
    )
    for i in range(samples)
  ]
  folders = (place / str(n) for n in range(repeat))
  written, _ = best(
    lambda: store_writing.write_store(next(folders), items, clip_frames=CLIP, **how), repeat
  )
  opened, total = store.open_store(place / "0"), samples * len(visual) * CLIP

  def reading(threads):
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
      return best(lambda: [v.shape for v in pool.map(opened.visual, range(samples))], repeat)[0]

  alone = reading(1)
  return {
    "seconds": alone,
    "frames/s": total / alone,
    "by two threads": total / reading(2),
    "written": total / written,
    "kB": sum(f.stat().st_size for f in (place / "0").rglob("*") if f.is_file()) / total / 1e3,
  }


def measure_data(path: str, size: int, samples: int, repeat: int) -> None:
  """Prints both tables.

  Raises:
    FileNotFoundError: there is no such video.
  """
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"there is no file {path}")
  frames, table = decoding_costs(path, size, repeat)
  print(table, flush=True)
  print(
    f"storing {samples} x {len(frames):,} frames: kB per frame; frames per second written, read by "
    f"one thread, by two"
  )
  for name, row in storing(frames, samples, repeat).items():
    print(
      f"  {name:10}{row['kB']:10,.1f} "
      f"kB{row['written']:10,.0f}{row['frames/s']:10,.0f}{row['by two threads']:10,.0f}"
    )


def main(argv: Sequence[str] | None = None) -> None:
  """The command; an error is one line on stderr and exit code 1."""
  args = command_parser(
    "bench_data",
    __doc__,
    {"path": {"type": expanduser}},
    {
      "make": (
        "write a synthetic video",
        {
          "--seconds": {"type": int, "default": 3600},
          "--width": {"type": int, "default": 320},
          "--height": {"type": int, "default": 180},
        },
      ),
      "run": (
        "measure with a video",
        {
          "--image-size": {"type": int, "default": 448},
          "--samples": {
            "type": int,
            "default": 2,
            "help": "copies in the stores that are measured",
          },
          "--repeat": {"type": int, "default": 3, "help": "the best of so many counts"},
        },
      ),
    },
  ).parse_args(argv)
  with command():
    if args.command == "make":
      make_video(args.path, args.seconds, args.width, args.height)
    else:
      measure_data(args.path, args.image_size, args.samples, args.repeat)
