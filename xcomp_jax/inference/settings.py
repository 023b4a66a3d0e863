"""How videos are watched and questions answered: settings, and the options made of them."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, TypedDict, get_args

from xcomp_jax.config import Attention, ConfigError, Dtype, Keep, Mode, Rows
from xcomp_jax.data import video
from xcomp_jax.errors import one_line
from xcomp_jax.files import expanduser
from xcomp_jax.inference import encoded_video
from xcomp_jax.inference.generate import Sampling
from xcomp_jax.inputs import number

TRAINED = 32768  # positions that Qwen2.5 was trained on, over which it is stretched
COMPILED = "~/.cache/xcomp_jax"  # folder of compiled programs
COUNT = number(1, encoded_video.FRAMES, int)  # of frames, or clips
DRAWN = ("repetition_penalty", "temperature", "top_k", "top_p", "seed")
# the release samples whole clips of 8 frames even where its tower takes clips of 4 (FACTS.md 5)
SAMPLED_CLIP = 8


def clips(text: str) -> int | Literal["auto"]:
  """Reads --clips-per-chunk."""
  return "auto" if text == "auto" else COUNT(text)


def clip_frames(text: str) -> str:
  """Reads --clip-frames."""
  return text if text in ("auto", "checkpoint") else str(COUNT(text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskSettings:
  """How videos are watched and questions answered; `add_options` makes an option of each."""

  checkpoint: str = field(metadata={"type": expanduser, "help": "directory, hub id, or export"})
  select: int = field(
    default=512,
    metadata={
      "type": number(0, encoded_video.FRAMES, int),
      "help": "frames that QC-Comp keeps for a question; 0: all",
    },
  )
  mode: Mode = field(
    default="aligned",
    metadata={
      "choices": ("aligned", "local", "official", "global"),
      "help": "how QC-Comp scores them",
    },
  )
  repeat: int | None = field(
    default=None,
    metadata={
      "type": number(1, 1000, int),
      "help": "times a frame is scored; default: 2 in official mode, 1 in the others",
    },
  )
  rows: Rows = field(
    default="question",
    metadata={
      "choices": get_args(Rows),
      "help": "tokens whose attention scores frames: the question's, as in the paper, or the "
      "one that the answer follows",
    },
  )
  max_frames: int = field(default=1024, metadata={"type": COUNT, "help": "frames, at most"})
  min_frames: int = field(
    default=128,
    metadata={
      "type": COUNT,
      "help": "frames, at least; a short video's are repeated",
    },
  )
  fps: float = field(
    default=8.0,
    metadata={"type": number(0.001, video.FASTEST, float), "help": "frames per second, at most"},
  )
  rate: video.Rate = field(
    default="own",
    metadata={
      "choices": get_args(video.Rate),
      "help": "where a video's frames have no constant rate: own: they have their own times; "
      "average: they lie as far apart as the average rate says, as in the release",
    },
  )
  stream: int | None = field(
    default=None,
    metadata={
      "type": number(0, 1000, int),
      "help": "number of the video's stream in its file; default: the one that players take",
    },
  )
  clip_frames: str = field(
    default="auto",
    metadata={
      "type": clip_frames,
      "help": 'frames the tower sees together; "auto": as tuned, else 8 as XComp was trained, '
      '4 for InternVideo2; "checkpoint": what config.json says (quirk Q1)',
    },
  )
  yarn: float | None = field(
    default=None,
    metadata={
      "type": number(1.0, 1000.0, float),
      "help": f"stretch positions so many times over {TRAINED:,} (4 for 10,000 frames without "
      "compression); 1: not at all; default: as config.json says",
    },
  )
  context: int | None = field(
    default=None,
    metadata={
      "type": number(1, 10_000_000, int),
      "help": "tokens that a prompt may have, 16 for each frame before compression; 131072 in the "
      "release's evaluation; default: as tuned, else as config.json says",
    },
  )
  clips_per_chunk: int | Literal["auto"] = field(
    default="auto",
    metadata={"type": clips, "help": "clips in the tower at once; default: by the device's memory"},
  )
  keep: Keep | None = field(
    default=None, metadata={"choices": get_args(Keep), "help": "default: as tuned, else suffix"}
  )
  schedule: str | None = field(
    default=None,
    metadata={"choices": ("cosine", "cosine_ceil"), "help": "default: as tuned, else cosine"},
  )
  dtype: Dtype | None = field(
    default=None,
    metadata={
      "choices": get_args(Dtype),
      "help": "default: bfloat16, but float16 on GPUs that have none, such as a T4, and float32 on "
      "CPUs; the release evaluates in float16",
    },
  )
  attention: Attention = field(
    default="auto",
    metadata={
      "choices": get_args(Attention),
      "help": "auto: by the device. einsum, tiled and xla_chunked run on any; flash "
      "is a GPU's, mosaic, triton and cudnn (the tower) are NVIDIA's, splash is a TPU's",
    },
  )
  max_new_tokens: int = field(default=64, metadata={"type": number(1, 100_000, int)})
  repetition_penalty: float = field(
    default=1.0,
    metadata={
      "type": number(0.001, 1000.0, float),
      "help": "1.1 in the release's generation_config (quirk Q20)",
    },
  )
  temperature: float = field(
    default=0.0,
    metadata={"type": number(0.0, 1000.0, float), "help": "0: the most probable token each time"},
  )
  top_k: int = field(
    default=0,
    metadata={
      "type": number(0, 10_000_000, int),
      "help": "draw from this many tokens; 0: from all",
    },
  )
  top_p: float = field(
    default=1.0,
    metadata={
      "type": number(1e-6, 1.0, float),
      "help": "draw from the fewest tokens of this probability",
    },
  )
  seed: int = field(default=0, metadata={"type": number(0, 2**32 - 1, int), "help": "of the draws"})

  def sampling(self, eos: tuple[int, ...]) -> Sampling:
    """How tokens are chosen, until one of `eos`."""
    return Sampling(self.max_new_tokens, eos, **{name: getattr(self, name) for name in DRAWN})


class SamplingSettings(TypedDict, total=False):
  """Settings of one answer, or of several: see `generate.Sampling`."""

  max_new_tokens: int | Sequence[int]
  repetition_penalty: float | Sequence[float]
  temperature: float | Sequence[float]
  top_k: int | Sequence[int]
  top_p: float | Sequence[float]
  seed: int | Sequence[int]


class Settings(TypedDict, total=False):
  """`AskSettings` as keywords; the checkpoint is apart."""

  select: int
  mode: Mode
  repeat: int | None
  rows: Rows
  max_frames: int
  min_frames: int
  fps: float
  rate: video.Rate
  stream: int | None
  clip_frames: str
  yarn: float | None
  context: int | None
  clips_per_chunk: int | Literal["auto"]
  keep: Keep | None
  schedule: str | None
  dtype: Dtype | None
  attention: Attention
  max_new_tokens: int
  repetition_penalty: float
  temperature: float
  top_k: int
  top_p: float
  seed: int


def option_of(name: str) -> str:
  """How a setting is written on the command line."""
  return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds an option for every setting, and for where parameters and compiled programs are."""
  for setting in dataclasses.fields(AskSettings):
    how = (
      {"required": True} if setting.default is dataclasses.MISSING else {"default": setting.default}
    )
    parser.add_argument(option_of(setting.name), **how, **setting.metadata)
  parser.add_argument(
    "--fsdp",
    type=number(1, 10_000, int),
    default=1,
    help="devices that each hold a part of the parameters, gathered a layer at a time",
  )
  parser.add_argument(
    "--tensor",
    type=number(1, 10_000, int),
    default=1,
    help="likewise, with heads and channels apart: for a model that one device does not hold",
  )
  parser.add_argument(
    "--compilation-cache",
    type=expanduser,
    help=f"folder of compiled programs, for the next time; '': none; "
    f"default: JAX_COMPILATION_CACHE_DIR, else {COMPILED}",
  )


def settings_of(args: argparse.Namespace) -> AskSettings:
  """The settings among a command's arguments."""
  return AskSettings(
    **{one.name: getattr(args, one.name) for one in dataclasses.fields(AskSettings)}
  )


def checked(s: AskSettings) -> AskSettings:
  """The settings as the options of the command line read them, so that what Python code sets has
  the same bounds and choices.

  Raises:
    ConfigError: which one can't be, and why.
  """
  read = {}
  for setting in dataclasses.fields(s):
    value, option = getattr(s, setting.name), option_of(setting.name)
    if value is None and setting.default is not None:
      raise ConfigError(f"{option}: None is no value for it", where=option, value=None)
    try:
      read[setting.name] = value if value is None else _read(str(value), setting.metadata)
    except (argparse.ArgumentTypeError, ValueError) as error:
      raise ConfigError(f"{option}: {one_line(error)}", where=option, value=value) from error
  return AskSettings(**read)


def _read(said: str, option: Mapping[str, Any]) -> Any:
  """The value of an option, as argparse reads it."""
  choices = option.get("choices", (said,))
  if said not in choices:
    raise ValueError(f"invalid choice: {said!r} (choose from {', '.join(map(repr, choices))})")
  return option.get("type", str)(said)
