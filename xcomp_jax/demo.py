"""All of it on the embedded default, with nothing but the project's own commands.

  # what SCT recovers of the accuracy that LP-Comp costs; minutes
  python -m xcomp_jax.demo --out demo
  # trains the base model of assets/tiny again; three quarters of an hour
  python -m xcomp_jax.demo --base --out demo/base

Run it where configs/ and assets/ are. `make demo` and `make base` do.
"""

import argparse
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import binomtest, sem

from xcomp_jax import ask, export, predecode
from xcomp_jax.checkpoints import finding, loading, sizes
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
from xcomp_jax.training import loop, prepare

BASE = "assets/tiny"
ROWS = 8  # questions that are evaluated at once
STAGES = {  # of the base's training: the worlds of configs/base.py's variants
  "see": world.WorldSplit(name="train", videos=5000, fewest=1, most=1, questions=0),
  "answer": world.WorldSplit(name="train", videos=8000, fewest=1, most=1, questions=4),
  "find": world.WorldSplit(name="train", videos=4800, fewest=2, most=6, questions=4),
}
HELDOUT = world.WorldSplit(name="heldout", videos=400, fewest=4, most=6, questions=1)
SEED = 3  # of the videos shown; settings were picked on those of seed 2
MADE = ("world", "data", "start", "run", "export")  # folders of the demo, in the order of making
STAGE_MADE = ("world", "train", "run", "model")  # likewise of a stage of the base's training


def clear(folder: pathlib.Path, made: Sequence[str]) -> None:
  """Removes the folders that an earlier demo made in `folder`."""
  for name in made:
    for path in (folder / name, *folder.glob(f"{name}.*incomplete")):
      if path.exists():
        shutil.rmtree(path)


def gain(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
  """Mean difference of two bool[n] of answers to the same questions, and its 95% interval (normal,
  paired).
  """
  change = after.astype(float) - before
  half = 1.96 * sem(change)
  return change.mean(), change.mean() - half, change.mean() + half


def right_answers(checkpoint: str, lp_comp: LPCompConfig, config: RunConfig) -> np.ndarray:
  """Which held-out questions of config.data.heldout a checkpoint answers rightly: bool[n]."""
  directory = finding.resolve(checkpoint)
  cfg = sizes.read_vlm_config(directory, config.model, lp_comp)
  model, evaluate = loading.load_model(directory, cfg), jax.jit(vlm.heldout_measures)
  assert config.data.heldout is not None  # `run_demo` says where they are
  data = prepare.open_data(config.data.heldout, cfg)
  tokenizer, right = prompt.load_tokenizer(directory), np.zeros(len(data), bool)
  lengths = measure_lengths(data, tokenizer, config.data.mask)
  shape = Shape(
    rows=ROWS,
    samples=1,
    prefix=config.data.prefix_length,
    frames=max(n.frames for n in lengths),
    text=max(n.text for n in lengths),
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


def decode_world(
  source: pathlib.Path,
  out: pathlib.Path,
  split: str,
  *,
  sizes: Mapping[str, Any] = world.MODEL,
  tower: str | None = None,
  chunk: int | None = None,
) -> None:
  """Pre-decodes a split of a world, or of films, at the input size of a base.

  sizes: of the base. tower: checkpoint whose features are stored in place of frames, so many clips
  (`chunk`) at a time.
  """
  settings = predecoding.FrameSettings(
    image_size=sizes["tiny_vision"]["image_size"],
    max_frames=1024,
    min_frames=sizes["mm_local_num_frames"],
    fps=world.FPS,
    clip_frames=sizes["mm_local_num_frames"],
  )
  predecoding.predecode(
    source / f"{split}.yaml",
    out,
    settings,
    root=source,
    workers=2,
    tower=predecode.load_tower(tower, settings, chunk) if tower else None,
  )


def configured(config: str, changes: Mapping[str, Any]) -> RunConfig:
  """The config of FILE:VARIANT, with other values of keys such as "data.train"."""
  return from_command_line(
    ["demo", f"--config={config}", *(f"--config.{key}={value}" for key, value in changes.items())]
  )


def train_exported(folder: pathlib.Path, config: str, changes: Mapping[str, Any]) -> pathlib.Path:
  """folder/model, trained in folder/run by FILE:VARIANT with changes; goes on with a run that was
  stopped.
  """
  run, model = folder / "run", folder / "model"
  loop.run_whole(configured(config, {"workdir": run, **changes}))
  export.main(["--checkpoint", str(run), "--format=torch", "--out", str(model)])
  return model


def train_base(
  out: pathlib.Path,
  stages: Iterable[str],
  train: Callable[[pathlib.Path, str, pathlib.Path], pathlib.Path],
  *,
  sizes: Mapping[str, Any],
  words: Sequence[str],
  silent_layers: bool = False,
) -> pathlib.Path:
  """Trains a base from nothing; every stage starts from the last one's model, which is returned.

  Args:
    out: folder of the untrained model and of the stages.
    stages: variants of a config, in their order.
    train: (folder of the stage, stage, checkpoint before it) to the stage's model.
    sizes: of the model, as in config.json.
    words: that its tokenizer learns.
    silent_layers: see `world.write_untrained`.
  """
  before = out / "init"
  if not before.exists():
    world.write_untrained(before, 0, sizes, words, silent_layers=silent_layers)
  for stage in stages:
    before = train(out / stage, stage, before)
  return before


def run_demo(out: pathlib.Path, videos: int, steps: int | None) -> None:
  """The demo."""
  begun = time.perf_counter()

  def say(text: str) -> None:
    print(f"\n[{time.perf_counter() - begun:4.0f} s] {text}", flush=True)

  clear(out, MADE)
  say("making videos")
  train = world.WorldSplit(name="train", videos=videos, fewest=4, most=6, questions=4)
  world.write_world(out / "world", [train, HELDOUT], seed=SEED, workers=2)
  for split in ("train", "heldout"):
    decode_world(out / "world", out / "data" / split, split)
  say("converting the base model")
  export.main(["--checkpoint", BASE, "--format=orbax", "--out", str(out / "start")])
  config = configured(
    "configs/sct.py:tiny",
    {
      "init_from": out / "start",
      "workdir": out / "run",
      "data.train": out / "data/train",
      "data.heldout": out / "data/heldout",
      **({} if steps is None else {"train.steps": steps}),
    },
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
    dataclasses.replace(config.lp_comp, keep="none"),
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

  def train(folder, stage, before):
    clear(folder, STAGE_MADE)
    seed = 100 + list(STAGES).index(stage)
    world.write_world(folder / "world", [STAGES[stage]], seed=seed, workers=2)
    decode_world(folder / "world", folder / "train", "train")
    changes = {"init_from": before, "data.train": folder / "train"}
    return train_exported(folder, f"configs/base.py:{stage}", changes)

  clear(out, ("init",))
  train_base(out, STAGES, train, sizes=world.MODEL, words=world.world_words())


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
      if f.base:
        train_tiny_base(out)
      else:
        run_demo(out, f.videos, f.steps)


if __name__ == "__main__":
  main()
