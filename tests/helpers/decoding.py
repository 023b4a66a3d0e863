"""What the tests of pre-decoding share: a small world of videos and annotations, and ways to run
the command.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import cv2
import ml_dtypes
import numpy as np
import yaml
from PIL import Image

from xcomp_jax.data import predecoding as predecode_lib
from xcomp_jax.data.predecoding import FrameSettings, Tower, predecode
from xcomp_jax.data.store import Features

SETTINGS = FrameSettings(image_size=16, max_frames=16, min_frames=8, fps=8.0, clip_frames=8)
SAMPLING = {
  "max_frames": 16,
  "min_frames": 8,
  "fps": 8.0,
  "clip_frames": 8,
  "style": "train",
  "size": 16,
}


def talk(question: str = "<image>\nWhat?") -> list[dict]:
  return [{"from": "human", "value": question}, {"from": "gpt", "value": "That."}]


def make_video(path: pathlib.Path, frames: int, seed: int = 0) -> pathlib.Path:
  rng = np.random.default_rng(seed)
  writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8, (48, 32))
  for _ in range(frames):
    writer.write(np.kron(rng.integers(0, 256, (4, 6, 3), np.uint8), np.ones((8, 8, 1), np.uint8)))
  writer.release()
  return path


def make_world(root: pathlib.Path) -> pathlib.Path:
  """A folder with videos, an image, a gif, a folder of frames, and a mixture of all of them: 7
  samples, 65 frames.
  """
  (root / "videos" / "steps").mkdir(parents=True)
  for i, frames in enumerate((40, 8, 19)):
    make_video(root / "videos" / f"v{i}.mp4", frames, i)
  colours = np.random.default_rng(9).integers(0, 256, (11, 20, 30, 3), np.uint8)
  images = [Image.fromarray(c) for c in colours]
  images[0].save(root / "videos" / "still ü.png")
  images[0].save(root / "videos" / "move.gif", save_all=True, append_images=images[1:])
  for i, image in enumerate(images):
    image.save(root / "videos" / "steps" / f"{i}.png")

  write(
    root / "videos.json",
    [{"id": i, "video": f"v{i}.mp4", "conversations": talk()} for i in range(3)],
  )
  write(root / "part.jsonl", [{"video": "v0.mp4", "start": 1, "end": 2.5, "conversations": talk()}])
  write(
    root / "images.json",
    [{"id": "i", "image": "still ü.png", "conversations": talk("Was?\n<image>")}],
  )
  write(root / "gifs.json", [{"video": "move.gif", "conversations": talk()}])
  write(root / "folders.json", [{"video": "steps", "conversations": talk()}])
  mixture(
    root,
    {"json_path": "videos.json", "sampling_strategy": "all"},
    {"json_path": "part.jsonl"},
    {"json_path": "images.json"},
    {"json_path": "gifs.json", "video_read_type": "gif"},
    {"json_path": "folders.json", "video_read_type": "img"},
  )
  return root


def write(path: pathlib.Path, items: list) -> None:
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
  else:
    path.write_text(json.dumps(items))


def mixture(root: pathlib.Path, *datasets: dict) -> None:
  (root / "mixture.yaml").write_text(
    yaml.safe_dump({"datasets": [{"data_root": "videos"} | d for d in datasets]})
  )


def make(root, out="out", *, settings=SETTINGS, **changes):
  return predecode(root / "mixture.yaml", root.parent / out, settings, root=root, **changes)


def summing_tower(width: int = 4) -> Tower:
  """Features that tell clips, places and frame sizes apart."""

  def encode(clips):
    for clip in clips:
      sums = clip.reshape(len(clip), 2, -1).mean(-1).reshape(-1, 1)
      yield (sums + np.arange(width)).astype(ml_dtypes.bfloat16)

  return Tower(Features("sums", 2, width), {"computed_in": "float32"}, encode)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file of a folder."""
  return {
    str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
  }


def manifest(folder: pathlib.Path) -> list[dict]:
  return [
    json.loads(line)
    for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
  ]


def command(world, *more, start=subprocess.run, **how):
  line = [
    sys.executable,
    "-m",
    "xcomp_jax.predecode",
    "--mixture",
    str(world / "mixture.yaml"),
    "--root",
    str(world),
    "--image-size=16",
    "--min-frames=8",
    "--max-frames=16",
    "--out",
    str(world.parent / "out"),
    *more,
  ]
  return run(line, start, **how)


def run(line, start=subprocess.run, **how):
  where = pathlib.Path(__file__).parents[2]
  return start(
    line,
    env=os.environ | {"PYTHONPATH": str(where)},
    **(how or {"capture_output": True, "text": True}),
  )


def wait_for(condition, seconds=60.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.05)


def group_lives(group: int) -> bool:
  try:
    os.killpg(group, 0)
  except ProcessLookupError:
    return False
  return True


@dataclasses.dataclass(frozen=True)
class Trap(predecode_lib.store.StoredSample):
  """A sample whose file does something bad to the process that decodes it; pickled by name into
  such processes.
  """

  deed: str = ""
  home: int = dataclasses.field(default_factory=os.getpid)

  def __getattribute__(self, name):
    if name == "source" and self.home != os.getpid():
      self.act()
    return super().__getattribute__(name)

  def act(self) -> None:
    import ctypes

    if self.deed == "sleep":
      # as a decoder that never comes back to Python: nobody else gets its lock
      ctypes.PyDLL(None).sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)


def nap() -> tuple[int, int]:
  """A call of `processes`: takes one of the process's life, and says which process it was."""
  time.sleep(0.05)
  return 1, os.getpid()
