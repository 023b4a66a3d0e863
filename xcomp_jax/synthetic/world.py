"""A synthetic world of long videos: the task that the package carries with it.

A video is a few scenes of one second over gradients or noise. One scene shows a coloured shape that
moves, one (any, so perhaps the same) shows a digit in a corner, and in the others there is nothing
to see. Each question asks for one attribute of what was shown, with all four values as options, so
it takes the one short scene that has it; chance is 25%.

  python -m xcomp_jax.world --out demo/world --train 600 --heldout 200 --seed 0

writes train/*.mp4, heldout/*.mp4, VideoChat-Flash annotations (train.json, heldout.json) and
mixture YAMLs (train.yaml, heldout.yaml). `--init DIR` writes a tokenizer and an untrained model
instead.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xcomp_jax.cli import command
from xcomp_jax.errors import XCompError
from xcomp_jax.files import expanduser, fresh_folder
from xcomp_jax.inputs import plain
from xcomp_jax.progress import progress

SIZE = 96  # pixels of a video, square
FRAMES = 8  # of a scene: one clip
FPS = 8
LABEL = 32  # pixels of the corner that shows a digit
BAR = 4  # of its pixels on each side, if in colour

COLOURS = {
  "red": (220, 50, 45),
  "green": (60, 180, 65),
  "blue": (70, 110, 245),
  "yellow": (235, 220, 50),
  "white": (245, 245, 245),
  "pink": (245, 120, 210),
}
SHAPES = ("square", "triangle", "cross", "ring")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
DIGITS = {
  "0": "01110 10001 10011 10101 11001 10001 01110",
  "1": "00100 01100 00100 00100 00100 00100 01110",
  "4": "00010 00110 01010 10010 11111 00010 00010",
  "7": "11111 00001 00010 00100 01000 01000 01000",
  "2": "01110 10001 00001 00010 00100 01000 11111",
  "3": "11110 00001 00001 01110 00001 00001 11110",
}
# What this world shows; `films` shows all.
VALUES = {
  "colour": tuple(COLOURS)[:4],
  "shape": SHAPES,
  "motion": tuple(MOTIONS),
  "digit": tuple(DIGITS)[:4],
}
QUESTIONS = {
  "colour": "Which colour was the shape?",
  "shape": "Which shape was shown?",
  "motion": "Which way did the shape move?",
  "digit": "Which digit was shown?",
}
DESCRIBE = "Describe the video."
MOST_SCENES = 4096


# The base's sizes, in the form of an official config.json (`tiny_vision` is no official key).
MODEL: dict[str, Any] = {
  "architectures": ["VideoChatFlashQwenForCausalLM"],
  "model_type": "videochat_flash_qwen",
  "hidden_act": "silu",
  "hidden_size": 96,
  "intermediate_size": 256,
  "num_hidden_layers": 6,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "vocab_size": 512,
  "rope_theta": 10000.0,
  "rope_scaling": None,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": True,
  "use_sliding_window": False,
  "max_position_embeddings": 32768,
  "mm_vision_tower": "umt-hd-large",
  "mm_hidden_size": 64,
  "mm_vision_select_layer": -2,
  "mm_projector_type": "tome16_mlp_hd64",
  "mm_local_num_frames": 8,
  "mm_patch_merge_type": "spatial_nopad",
  "mm_newline_position": "nothing",
  "torch_dtype": "float32",
  "tiny_vision": {
    "image_size": 48,
    "embed_dim": 64,
    "depth": 3,
    "heads": 2,
    "patch_size": 8,
    "mlp_ratio": 4.0,
  },
}


class WorldError(XCompError, ValueError):
  """A world that can't be made; the message says what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
  """What one scene shows, in words (None: nothing of the kind), and the seed of everything that
  nobody asks about.

  bars: colour at both sides of the digit; None: black, as all that is around it.
  """

  seed: int
  colour: str | None = None
  shape: str | None = None
  motion: str | None = None
  digit: str | None = None
  bars: str | None = None


def scenes(rng: np.random.Generator, count: int) -> list[Scene]:
  """The scenes of a video."""
  drawn = {kind: str(rng.choice(values)) for kind, values in VALUES.items()}
  moving, labelled = rng.integers(count, size=2)
  shown = [Scene(seed=int(seed)) for seed in rng.integers(2**31, size=count)]
  shown[labelled] = dataclasses.replace(shown[labelled], digit=drawn.pop("digit"))
  shown[moving] = dataclasses.replace(shown[moving], **drawn)
  return shown


def render(scene: Scene, count: int = FRAMES) -> np.ndarray:
  """One scene of `count` frames: uint8[F, 96, 96, 3] RGB."""
  rng = np.random.default_rng(scene.seed)
  y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
  low, high = rng.uniform(25, 115, (2, 3)).astype(np.float32)
  if rng.integers(2):
    angle = rng.uniform(0, 2 * np.pi)
    mix = (np.cos(angle) * (x / SIZE - 0.5) + np.sin(angle) * (y / SIZE - 0.5)) / 1.5 + 0.5
  else:
    mix = rng.random((SIZE // 12, SIZE // 12), np.float32).repeat(12, 0).repeat(12, 1)
  frames = np.repeat((low + (high - low) * mix[..., None])[None], count, axis=0)
  # The path is centred on the frame, apart from some jitter, so that no single frame tells the
  # motion.
  step = np.linspace(-1, 1, count, dtype=np.float32) * rng.uniform(13, 17)
  start = SIZE / 2 - 0.5 + rng.uniform(-4, 4, 2)
  corner = rng.integers(2, size=2) * (SIZE - LABEL)
  if scene.shape is not None:
    assert scene.colour and scene.motion  # of the shape: `scenes` gives all three or none
    dx, dy = MOTIONS[scene.motion]
    # [F, 96, 96], pixels from the centre
    u = x - (start[0] + dx * step)[:, None, None].astype(np.float32)
    v = y - (start[1] + dy * step)[:, None, None].astype(np.float32)
    body = _coverage(scene.shape, u, v)[..., None]
    frames = frames * (1 - body) + np.asarray(COLOURS[scene.colour], np.float32) * body
  if scene.digit is not None:
    top, left = corner
    frames[:, top : top + LABEL, left : left + LABEL] = _label(scene.digit)[..., None]
    if scene.bars is not None:
      for side in (left, left + LABEL - BAR):
        frames[:, top : top + LABEL, side : side + BAR] = COLOURS[scene.bars]
  frames += 3 * rng.standard_normal(frames.shape, np.float32)
  return np.clip(frames, 0, 255).astype(np.uint8)


def _label(digit: str) -> np.ndarray:
  """A white digit on black: float32[32, 32]."""
  glyph = np.array([[c == "1" for c in row] for row in DIGITS[digit].split()], np.float32)
  return 5 + 240 * np.pad(glyph.repeat(4, 0).repeat(4, 1), ((2, 2), (6, 6)))


def _coverage(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """1 inside the shape, 0 outside, a pixel's ramp at its edge."""
  au, av = np.abs(u), np.abs(v)
  distance = {  # about the distance to the edge in pixels, negative inside
    "square": lambda: np.maximum(au, av) - 21,
    "triangle": lambda: np.maximum(v - 19, (au * 1.8 - v - 40) / 2.06),
    "cross": lambda: np.minimum(np.maximum(au - 9, av - 26), np.maximum(au - 26, av - 9)),
    "ring": lambda: np.abs(np.hypot(u, v) - 19) - 6,
  }[shape]()
  return np.clip(0.5 - distance, 0, 1)


def value(shown: Sequence[Scene], kind: str) -> str:
  """What a video shows of a kind."""
  (only,) = (getattr(scene, kind) for scene in shown if getattr(scene, kind) is not None)
  return only


def describe_scenes(shown: Sequence[Scene]) -> str:
  """All that is asked about a video, such as "red ring left 7"."""
  return " ".join(value(shown, kind) for kind in VALUES)


def turn(shown: Sequence[Scene], kind: str) -> tuple[str, str]:
  """A question with four options, and its letter."""
  options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", VALUES[kind]))
  return f"{QUESTIONS[kind]}\n{options}", "ABCD"[VALUES[kind].index(value(shown, kind))]


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 512


def world_words() -> list[str]:
  """The texts of this world, for its tokenizer."""
  values = sum(VALUES.values(), ())
  texts = [text for v in values for text in (v, *(f"{name}. {v}\n" for name in "ABCD"))]
  return [DESCRIBE, *QUESTIONS.values(), *(f" {v}" for v in values), *texts]


def write_tokenizer(out: pathlib.Path, texts: Sequence[str]) -> None:
  """A byte-level BPE learned from a world's own text: vocab.json, merges.txt,
  tokenizer_config.json.
  """
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

  from xcomp_jax.data import prompt

  chat = [
    "system\nYou are a helpful assistant.",
    "user\n",
    "assistant\n",
    *(
      f"\nThe video lasts for {s}.00 seconds, and {8 * s} frames are uniformly sampled from it. \n"
      for s in range(1, 9)
    ),
    "Answer with the option's letter from the given choices directly.",
    "Question: Option:\n",
    "(A) (B) (C) (D)",
  ]
  bpe = Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(prompt.WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  bpe.decoder = decoders.ByteLevel()
  bpe.train_from_iterator(
    [*chat, *texts] * 2,
    trainers.BpeTrainer(
      vocab_size=VOCABULARY - len(SPECIAL),
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  out.mkdir(parents=True, exist_ok=True)
  bpe.model.save(str(out))
  first = bpe.get_vocab_size()
  config = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "added_tokens_decoder": {
      str(first + i): {
        "content": s,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
      }
      for i, s in enumerate(SPECIAL)
    },
    "additional_special_tokens": list(SPECIAL[1:]),
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": SPECIAL[2],
    "errors": "replace",
    "model_max_length": 32768,
    "pad_token": SPECIAL[0],
    "padding_side": "right",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
  }
  (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldSplit:
  """Videos of one purpose.

  fewest, most: scenes of a video. questions: about each, 1 to 4; where it is one, the kinds take
  turns over the videos, else they come in random order. 0: a description is asked for instead.
  """

  name: str
  videos: int
  fewest: int
  most: int
  questions: int


def write_world(out: pathlib.Path, splits: Sequence[WorldSplit], seed: int, workers: int) -> None:
  """Videos, annotations and mixtures of all splits; `out` appears whole or not at all.

  Raises:
    WorldError: numbers of scenes or videos that can't be.
    StoreError: a folder that is there and not empty, or can't be written.
  """
  for split in splits:
    if not 1 <= split.fewest <= split.most <= MOST_SCENES:
      raise WorldError(
        f"{split.fewest} to {split.most} scenes: a video has 1 to {MOST_SCENES}",
        where="scenes",
        value=(split.fewest, split.most),
      )
    if split.videos < 1 or not 0 <= split.questions <= len(QUESTIONS):
      raise WorldError(
        f"{split.videos} videos, {split.questions} questions each: must be at least 1, and 0 to "
        f"{len(QUESTIONS)}",
        where="videos" if split.videos < 1 else "questions",
        value=(split.videos, split.questions),
      )
  with fresh_folder(out, "films") as temporary:
    for split in splits:
      film = functools.partial(_annotated, split, seed)
      write_split(temporary, split.name, split.videos, film, FRAMES, workers)


def read_split(out: pathlib.Path, name: str) -> list[dict]:
  """The annotations of a split."""
  return json.loads((out / f"{name}.json").read_text())


def questions_in(annotation: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
  """The questions of an annotation, each with its right answer and the scene that shows it (or in
  `films`, all of them).
  """
  texts = [turn["value"].removeprefix("<image>\n") for turn in annotation["conversations"]]
  return list(zip(texts[::2], texts[1::2], annotation["scenes"], strict=True))


def write_untrained(
  out: pathlib.Path,
  seed: int,
  sizes: Mapping[str, Any],
  texts: Sequence[str],
  *,
  silent_layers: bool = False,
) -> None:
  """A checkpoint of random weights in official layout, with a tokenizer of `texts` and config.json:
  where a base starts.

  silent_layers: the LLM's layers add nothing to their input yet (their last kernels are zero).
  """
  import jax.numpy as jnp
  from flax import nnx

  from xcomp_jax.checkpoints import saving
  from xcomp_jax.checkpoints.sizes import read_vlm_config
  from xcomp_jax.model.vlm import VLM

  saving.check_free(out, overwrite=False)
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder)
    write_tokenizer(source, texts)
    (source / "config.json").write_text(json.dumps(sizes, indent=2))
    cfg = read_vlm_config(source, saving.AS_IT_IS, saving.NOT_TUNED)
    model = VLM(cfg, rngs=nnx.Rngs(seed))
    for layer in model.llm.layers if silent_layers else ():
      layer.o.kernel[...] = jnp.zeros_like(layer.o.kernel[...])
      layer.down.kernel[...] = jnp.zeros_like(layer.down.kernel[...])
    saving.save_torch(out, model, cfg, source, dtype=jnp.float32)


def _annotated(split: WorldSplit, seed: int, number: int) -> tuple[list[Scene], dict]:
  """A video's scenes and its annotation, whose `scenes` say where the answer to each question is
  shown.
  """
  rng = np.random.default_rng((seed, split.name == "heldout", number))
  shown = scenes(rng, int(rng.integers(split.fewest, split.most + 1)))
  kinds = list(QUESTIONS)
  asked = (
    [kinds[number % len(kinds)]]
    if split.questions == 1
    else [str(kind) for kind in rng.permutation(kinds)[: split.questions]]
  )
  turns = [turn(shown, kind) for kind in asked] or [(DESCRIBE, describe_scenes(shown))]
  where = [
    next(i for i, scene in enumerate(shown) if getattr(scene, kind) is not None) for kind in asked
  ]
  return shown, {"conversations": conversation(turns), "scenes": where}


def conversation(turns: Sequence[tuple[str, str]]) -> list[dict]:
  """Questions and answers about a video as an annotation has them."""
  texts = [text for pair in turns for text in pair]
  texts[0] = f"<image>\n{texts[0]}"
  return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


Film = Callable[[int], tuple[list[Scene], dict]]  # a video's scenes and annotation, by its number


def write_split(
  out: pathlib.Path, name: str, count: int, film: Film, frames: int, workers: int
) -> None:
  """out/NAME/*.mp4 of scenes of so many frames, out/NAME.json of their annotations, and
  out/NAME.yaml.
  """
  import yaml

  plain(str(out), "the name of the folder", WorldError)  # OpenCV would end the process
  (out / name).mkdir()
  work = functools.partial(_write_video, out, name, film, frames)
  with concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("spawn")
  ) as pool:
    made = pool.map(work, range(count), chunksize=16)
    annotations = list(progress(made, total=count, desc="videos", unit="video", leave=False))
  (out / f"{name}.json").write_text(json.dumps(annotations, indent=1) + "\n")
  entry = {"json_path": f"{name}.json", "sampling_strategy": "all", "data_root": name}
  (out / f"{name}.yaml").write_text(yaml.safe_dump({"datasets": [entry]}, sort_keys=False))


def _write_video(out: pathlib.Path, name: str, film: Film, frames: int, number: int) -> dict:
  """Writes a video and returns its annotation."""
  import cv2

  shown, annotation = film(number)
  file = f"{number:05d}.mp4"
  writer = cv2.VideoWriter(
    str(out / name / file), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (SIZE, SIZE)
  )
  if not writer.isOpened():
    raise WorldError(
      f"{out / name / file} can't be written: this OpenCV has no mp4 encoder, or the disk is full"
    )
  for scene in shown:
    for frame in render(scene, frames):
      writer.write(frame[..., ::-1])
  writer.release()
  return {"id": f"{name}/{number:05d}", "video": file, **annotation}


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.world", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--out", type=expanduser, help="folder of videos to be made")
  parser.add_argument("--train", type=int, default=600, help="videos to train on")
  parser.add_argument("--heldout", type=int, default=200, help="videos to ask about")
  parser.add_argument(
    "--scenes",
    type=int,
    nargs=2,
    default=(4, 6),
    metavar=("MIN", "MAX"),
    help=f"of a video, at most {MOST_SCENES}",
  )
  parser.add_argument(
    "--questions",
    type=int,
    default=4,
    help="about each training video, 1 to 4; 0: a description instead",
  )
  parser.add_argument("--heldout-questions", type=int, default=1, help="about each held-out video")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--workers", type=int, default=os.cpu_count())
  parser.add_argument("--init", type=expanduser, help="folder of an untrained model to be made")
  f = parser.parse_args(argv)
  with command():
    if not f.out and not f.init:
      raise WorldError("nothing to write; give --out for videos or --init for an untrained model")
    if f.init:
      write_untrained(pathlib.Path(f.init), f.seed, MODEL, world_words())
    if f.out:
      fewest, most = f.scenes
      amounts = (("train", f.train, f.questions), ("heldout", f.heldout, f.heldout_questions))
      splits = [
        WorldSplit(name=name, videos=videos, fewest=fewest, most=most, questions=questions)
        for name, videos, questions in amounts
        if videos
      ]
      write_world(pathlib.Path(f.out), splits, f.seed, f.workers)
