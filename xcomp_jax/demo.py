"""All of it on the embedded default, with nothing but the project's own commands.

  # what SCT recovers of the accuracy that LP-Comp costs; minutes
  python -m xcomp_jax.demo --out demo
  # trains the base model of assets/tiny again; three quarters of an hour
  python -m xcomp_jax.demo --base --out demo/base

Run it where configs/ and assets/ are. `make demo` and `make base` do.
"""

import argparse
import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Sequence

import jax
import numpy as np
from scipy.stats import binomtest

from xcomp_jax import ask, export
from xcomp_jax.checkpoints import loading
from xcomp_jax.cli import command
from xcomp_jax.config import LPCompConfig, RunConfig
from xcomp_jax.config_io import from_command_line
from xcomp_jax.data import pipeline, predecoding, prompt
from xcomp_jax.data.batch import Example, Shape, collate
from xcomp_jax.data.blend import Blend, measure_lengths
from xcomp_jax.files import alone, expanduser, made_by
from xcomp_jax.inference import encoded_video
from xcomp_jax.model import vlm
from xcomp_jax.synthetic import world
from xcomp_jax.training import loop

BASE = "assets/tiny"
ROWS = 8  # questions that are evaluated at once
STAGES = {  # of the base's training: the worlds of configs/base.py's variants
  "see": world.WorldSplit("train", 5000, 1, 1, 0),
  "answer": world.WorldSplit("train", 8000, 1, 1, 4),
  "find": world.WorldSplit("train", 4800, 2, 6, 4),
}
HELDOUT = world.WorldSplit("heldout", 400, 4, 6, 1)
SEED = 3  # of the videos shown; settings were picked on those of seed 2
MADE = ("world", "data", "start", "run", "export")  # folders of the demo, in the order of making
STAGE_MADE = ("world", "train", "run", "model")  # likewise of a stage of the base's training


def clear(folder: pathlib.Path, made: Sequence[str]) -> None:
  """Removes the folders that an earlier demo made in `folder`."""
  for name in made:
    for path in (folder / name, *folder.glob(f"{name}.*incomplete")):
      if path.exists():
        shutil.rmtree(path)


def gain(before: np.ndarray, after: np.ndarray, z: float = 1.96) -> tuple[float, float, float]:
  """Mean difference of two bool[n] of answers to the same questions, and its 95% interval (normal,
  paired).
  """
  change = after.astype(float) - before
  half = z * change.std(ddof=1) / math.sqrt(len(change))
  return change.mean(), change.mean() - half, change.mean() + half


def right_answers(checkpoint: str, lp_comp: LPCompConfig, config: RunConfig) -> np.ndarray:
  """Which held-out questions of config.data.heldout a checkpoint answers rightly: bool[n]."""
  directory = loading.resolve(checkpoint)
  cfg = loading.read_vlm_config(directory, config.model, lp_comp)
  model, evaluate = loading.load_model(directory, cfg), jax.jit(vlm.heldout_measures)
  assert config.data.heldout is not None  # `run_demo` says where they are
  data = loop.open_data(config.data.heldout, cfg)
  tokenizer, right = prompt.load_tokenizer(directory), np.zeros(len(data), bool)
  lengths = measure_lengths(data, tokenizer, config.data.mask)
  shape = Shape(
    ROWS,
    1,
    config.data.prefix_length,
    max(n.frames for n in lengths),
    max(n.text for n in lengths),
  )
  for first in range(0, len(data), ROWS):
    part = range(first, min(first + ROWS, len(data)))
    rows = [
      [watched(model, data, pipeline.read_example(data, tokenizer, config.data.mask, i))]
      for i in part
    ]
    right[part] = np.asarray(evaluate(model, collate(rows, shape))[1])[: len(part), 0] > 0.5
  return right


def watched(model: vlm.VLM, data: Blend, example: Example) -> Example:
  """A sample with what the tower makes of its video, if it has one and that is not there yet."""
  if example.visual is not None or not example.frames:
    return example
  clips = np.stack(list(encoded_video.encode_in_chunks(model, data.visual(example.index))))
  return dataclasses.replace(example, visual=clips.reshape(example.frames, -1, clips.shape[-1]))


def decode_world(source: pathlib.Path, out: pathlib.Path, split: str) -> None:
  """Pre-decodes a world's split at the base's input size."""
  settings = predecoding.FrameSettings(
    image_size=world.MODEL["tiny_vision"]["image_size"],
    max_frames=1024,
    min_frames=8,
    fps=world.FPS,
    clip_frames=world.FRAMES,
  )
  predecoding.predecode(source / f"{split}.yaml", out, settings, root=source, workers=2)


def run_demo(out: pathlib.Path, videos: int, steps: int | None) -> None:
  """The demo."""
  begun = time.perf_counter()

  def say(text):
    return print(f"\n[{time.perf_counter() - begun:4.0f} s] {text}", flush=True)

  clear(out, MADE)
  say("making videos")
  world.write_world(
    out / "world", [world.WorldSplit("train", videos, 4, 6, 4), HELDOUT], seed=SEED, workers=2
  )
  for split in ("train", "heldout"):
    decode_world(out / "world", out / "data" / split, split)
  say("converting the base model")
  export.main(["--checkpoint", BASE, "--format=orbax", "--out", str(out / "start")])
  overrides = {
    "init_from": out / "start",
    "workdir": out / "run",
    "data.train": out / "data/train",
    "data.heldout": out / "data/heldout",
    **({} if steps is None else {"train.steps": steps}),
  }
  config = from_command_line(
    ["demo", "--config=configs/sct.py:tiny", *(f"--config.{k}={v}" for k, v in overrides.items())]
  )
  table = []

  def measure(name: str, checkpoint: pathlib.Path, lp_comp: LPCompConfig) -> np.ndarray:
    right = right_answers(str(checkpoint), lp_comp, config)
    share = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    table.append(
      f"  {name:34} {right.mean():6.1%}   95% interval {share.low:.1%} to {share.high:.1%}"
    )
    say(table[-1].strip())
    return right

  measure(
    "no compression",
    out / "start",
    LPCompConfig(config.lp_comp.schedule, "none", config.lp_comp.group),
  )
  untrained = measure("LP-Comp, not trained", out / "start", config.lp_comp)
  say("supervised compression tuning")
  # measured below
  loop.run_whole(dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=None)))
  export.main(["--checkpoint", str(out / "run"), "--format=torch", "--out", str(out / "export")])
  tuned = measure("LP-Comp after SCT", out / "export", config.lp_comp)
  more, low, high = gain(untrained, tuned)
  table.append(
    f"  {'gain by SCT, question by question':34} {more:+6.1%}   95% interval {low:+.1%} to "
    f"{high:+.1%}"
  )
  sample = world.read_split(out / "world", "heldout")[0]
  ((question, truth, _),) = world.questions_in(sample)
  video = out / "world" / "heldout" / sample["video"]
  say(f"asking {video} (true answer: {truth})\n{question}")
  ask.main(
    [
      "--checkpoint",
      str(out / "export"),
      "--video",
      str(video),
      "--min-frames=8",
      "--question",
      question,
    ]
  )
  say(f"accuracy over {len(tuned)} held-out questions of four options\n" + "\n".join(table))


def train_tiny_base(out: pathlib.Path) -> None:
  """The base's stages; the result is out/find/model."""
  before = out / "init"
  clear(out, ("init",))
  world.write_untrained(before, 0, world.MODEL, world.world_words())
  for number, (name, split) in enumerate(STAGES.items()):
    stage = out / name
    clear(stage, STAGE_MADE)
    world.write_world(stage / "world", [split], seed=100 + number, workers=2)
    decode_world(stage / "world", stage / "train", "train")
    paths = {"init_from": before, "workdir": stage / "run", "data.train": stage / "train"}
    loop.run_whole(
      from_command_line(
        [
          "demo",
          f"--config=configs/base.py:{name}",
          *(f"--config.{k}={v}" for k, v in paths.items()),
        ]
      )
    )
    before = stage / "model"
    export.main(["--checkpoint", str(stage / "run"), "--format=torch", "--out", str(before)])


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.demo", description=__doc__.splitlines()[0]
  )
  parser.add_argument(
    "--out",
    type=expanduser,
    required=True,
    help="folder of everything that is made; a demo that is there is replaced",
  )
  parser.add_argument("--base", action="store_true", help="train the base model instead")
  parser.add_argument("--videos", type=int, default=1600, help="to tune on")
  parser.add_argument(
    "--steps", type=int, help="of tuning; default: as many as configs/sct.py:tiny says"
  )
  f = parser.parse_args(argv)
  out = pathlib.Path(f.out)
  with command():
    if out.exists() and not (out.is_dir() and (made_by(out, "demo") or not any(out.iterdir()))):
      raise FileExistsError(
        f"--out {out} holds what no demo has made; choose another folder, or remove it"
      )
    with alone(out, "demo"):
      (train_tiny_base(out) if f.base else run_demo(out, f.videos, f.steps))


if __name__ == "__main__":
  main()
