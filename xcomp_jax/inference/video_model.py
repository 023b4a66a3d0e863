"""A checkpoint that is ready to watch videos and answer: what `ask`, `evaluate` and `needles` have
in common.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from typing import Any, Literal, get_args

import jax
import numpy as np

from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tuned import read_tuned
from xcomp_jax.config import (
  COSINE,
  Attention,
  ConfigError,
  Dtype,
  Keep,
  LPCompConfig,
  Mode,
  ModelConfig,
  Rows,
  SelectConfig,
  Tuned,
  VLMConfig,
)
from xcomp_jax.data import prompt, video
from xcomp_jax.errors import one_line, out_of_memory
from xcomp_jax.files import expanduser
from xcomp_jax.inference import encoded_video, generate
from xcomp_jax.inference.chat import Chat, prompt_of
from xcomp_jax.inference.selection import FrameSelector, frame_selector
from xcomp_jax.inputs import ENDINGS, number, printable
from xcomp_jax.model import kernels, qc_comp, vlm

TRAINED = 32768  # positions that Qwen2.5 was trained on, over which it is stretched
COMPILED = "~/.cache/xcomp_jax"  # folder of compiled programs
COUNT = number(1, encoded_video.FRAMES, int)  # of frames, or clips
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


def option_of(name: str) -> str:
  """How a setting is written on the command line."""
  return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds an option for every setting, and the folder of compiled programs."""
  for setting in dataclasses.fields(AskSettings):
    how = (
      {"required": True} if setting.default is dataclasses.MISSING else {"default": setting.default}
    )
    parser.add_argument(option_of(setting.name), **how, **setting.metadata)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoModel:
  """A checkpoint and its settings, understood and checked; `load` reads the parameters.

  select: None where all frames are kept. dtype: of computation and parameters.
  """

  settings: AskSettings
  directory: pathlib.Path
  cfg: VLMConfig
  tokenizer: prompt.Tokenizer
  select: SelectConfig | None
  sampling: generate.Sampling
  dtype: str

  def load(self) -> vlm.VLM:
    """The model, on the first device of this process.

    Raises:
      CheckpointError: see `loading.load_model`.
    """
    return loading.load_model(self.directory, self.cfg, dtype=self.dtype)

  def precision(self) -> contextlib.AbstractContextManager:
    """In which to compute."""
    return jax.default_matmul_precision("highest" if self.dtype == "float32" else None)

  def sample(
    self, path: str, start: float | None = None, end: float | None = None
  ) -> video.FrameSample:
    """Which frames of a video, folder of frames, GIF or image to decode.

    Raises:
      VideoError, FileNotFoundError: what is wrong with it.
      ConfigError: clips that sampling can't fill.
    """
    self.check_clips()
    s = self.settings
    chosen = video.sample(
      path,
      size=self.cfg.vision.image_size,
      max_frames=s.max_frames,
      min_frames=s.min_frames,
      fps=s.fps,
      clip_frames=SAMPLED_CLIP,
      style="ask",
      start=start,
      end=end,
      read_type=video.kind(path),
      rate=s.rate,
      stream=s.stream,
    )
    if chosen.lost:
      # an animation doesn't say how long it should be
      lost = f"last {chosen.lost:.2f} seconds are" if chosen.found else "end is"
      print(f"{path}: its {lost} missing, the rest is used", file=sys.stderr)
    return chosen

  def shortened(self, sample: video.FrameSample, error: video.TailError) -> video.FrameSample:
    """What can be read of a video whose end can't; says so.

    Raises:
      VideoError: nothing can. ConfigError: see `check`.
    """
    print(f"{error}; the rest is used", file=sys.stderr)
    sample = video.without_tail(sample, error)
    self.check(len(sample.indices), sample.seconds)
    return sample

  def selector(self, frames: int) -> FrameSelector:
    """How some of so many sampled frames are selected for a question.

    Raises:
      ConfigError: see `frame_selector`.
    """
    # a still image is a clip of one frame
    return frame_selector(frames, min(self.cfg.clip_frames, frames), self.select)

  def introduce(self) -> str:
    """What it computes with, in a line."""
    return kernels.describe_kernels(self.cfg)

  def check_clips(self) -> None:
    """Sees to it that sampled clips are whole clips of the tower.

    Raises:
      ConfigError: they are not.
    """
    if SAMPLED_CLIP % self.cfg.clip_frames:
      raise ConfigError(
        f"--clip-frames {self.cfg.clip_frames}: videos are sampled in clips of {SAMPLED_CLIP}, so "
        f"take a divisor of that",
        where="--clip-frames",
      )

  def check(self, frames: int, seconds: float, question: str = "?") -> None:
    """Checks, before any frame is decoded, that a question about so many frames can be scored and
    fits into the context.

    Args:
      frames: that were sampled.
      seconds: of what they were sampled from.
      question: its text; "?": the shortest one there is, where none is known yet.

    Raises:
      AnnotationError, ConfigError: see `chat.prompt_of` and `frame_selector`.
    """
    prompt_of(
      self.cfg,
      self.tokenizer,
      question,
      seconds,
      self.selector(frames),
      self.sampling.max_new_tokens,
    )

  def _encode(
    self,
    model: vlm.VLM,
    sample: video.FrameSample,
    source: str,
    decoded: Iterable[np.ndarray] | None,
    identity: str | None,
    report: Callable[[int], None],
  ) -> tuple[encoded_video.EncodedVideo, dict[str, float]]:
    begun, decoding = time.perf_counter(), 0.0

    def frames() -> Iterator[np.ndarray]:
      nonlocal decoding
      asked = time.perf_counter()
      for frame in video.frames(sample) if decoded is None else decoded:
        decoding += time.perf_counter() - asked
        yield frame
        asked = time.perf_counter()
      decoding += time.perf_counter() - asked

    film = encoded_video.encode_video(
      model,
      frames(),
      sample.times,
      sample.seconds,
      source,
      phases=self.selector(len(sample.indices)).phases,
      tower=identity,
      report=report,
    )
    return film, {"decoding": decoding, "tower": time.perf_counter() - begun - decoding}

  def encode(
    self,
    model: vlm.VLM,
    sample: video.FrameSample,
    source: str,
    *,
    decoded: Iterable[np.ndarray] | None = None,
    identity: str | None = None,
    report: Callable[[int], None] = lambda clips: None,
  ) -> tuple[encoded_video.EncodedVideo, dict[str, float]]:
    """Decodes (unless `decoded` has the frames) and encodes a video; seconds went into "decoding"
    and "tower".

    Raises:
      VideoError: a frame can't be decoded.
    """
    try:
      return self._encode(model, sample, source, decoded, identity, report)
    except video.TailError as error:  # once it is known, the other frames are others
      return self._encode(model, self.shortened(sample, error), source, None, identity, report)

  def chat(
    self,
    model: vlm.VLM,
    film: encoded_video.EncodedVideo,
    *,
    keep_rounds: bool = True,
    talk: bool = False,
  ) -> Chat:
    """A conversation about an encoded video; see `Chat`."""
    return Chat(
      model,
      self.tokenizer,
      film,
      selector=self.selector(len(film.times)),
      sampling=self.sampling,
      keep_rounds=keep_rounds,
      talk=talk,
    )

  def source(self, path: str, start: float | None = None, end: float | None = None) -> str:
    """Which video, sampled how; its size and beginning tell it from another one of its name."""
    s, file = self.settings, pathlib.Path(path)
    size = sum(f.stat().st_size for f in file.iterdir()) if file.is_dir() else file.stat().st_size
    digest = hashlib.blake2b(digest_size=4)
    if not file.is_dir():
      with open(file, "rb") as opened:
        digest.update(opened.read(1 << 20))
    part = "" if start is None and end is None else f" from {start or 0} s to {end or 'the end'}"
    rate = "" if s.rate == "own" else ", by the average rate"
    stream = "" if s.stream is None else f", stream {s.stream}"
    return (
      f"{printable(file.name)} ({size:,} bytes, {digest.hexdigest()}){part}, {s.min_frames} to "
      f"{s.max_frames} frames at up to {s.fps:g} per second{rate}{stream}"
    )


def fault(error: BaseException) -> str:
  """Says in a line why one video could not be watched or asked about, so that others still can.

  What no file can cause is a mistake of this program, and is told with its kind and place.

  Raises:
    KeyboardInterrupt, SystemExit, GeneratorExit: the error itself, for it ends everything.
  """
  if isinstance(error, ENDINGS):
    raise error
  if text := out_of_memory(error):
    return text
  if isinstance(error, (video.VideoError, prompt.AnnotationError, ConfigError, OSError)):
    return one_line(error)
  last = traceback.extract_tb(error.__traceback__)[-1]
  where, said = os.path.basename(last.filename), one_line(error)[:300]
  return f"unexpected {type(error).__name__} in {where}, line {last.lineno}: {said}"


def prepare_model(s: AskSettings) -> VideoModel:
  """Reads what a checkpoint says about itself, and checks the settings against it.

  Raises:
    CheckpointError, ConfigError, OSError: bad settings, by name.
  """
  s = checked(s)
  directory = resolve(s.checkpoint)
  tuned = read_tuned(directory) or Tuned(lp_comp=COSINE)
  lp_comp = LPCompConfig(
    s.schedule or tuned.lp_comp.schedule, s.keep or tuned.lp_comp.keep, tuned.lp_comp.group
  )
  dtype = s.dtype or kernels.compute_dtype(kernels.here(), tuned.dtype)
  kernels.check_implementation(s.attention, dtype)
  frames = s.clip_frames if s.clip_frames in ("auto", "checkpoint") else int(s.clip_frames)
  yarn = "checkpoint" if s.yarn is None else (s.yarn, TRAINED) if s.yarn > 1 else None
  model = ModelConfig(
    clip_frames=frames,
    yarn=yarn,
    dtype=dtype,
    param_dtype=dtype,
    clips_per_chunk=s.clips_per_chunk,
    attention=s.attention,
    remat=False,
  )
  cfg = read_vlm_config(directory, model, lp_comp, option="--clip-frames checkpoint")
  if s.context not in (None, cfg.llm.context):
    print(
      f"a context of {s.context:,} tokens (--context), not the "
      f"{cfg.llm.context or 'unknown number'} of {directory}",
      file=sys.stderr,
    )
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, context=s.context))
  tokenizer = loading.read_tokenizer(directory, cfg)
  select = qc_comp.select_config(s.mode, s.select, s.repeat, s.rows) if s.select else None
  if select and lp_comp.keep == "attention":
    raise ConfigError("--keep attention can't be scored by QC-Comp: add --select 0", where="--keep")
  sampling = generate.Sampling(
    max_new_tokens=s.max_new_tokens,
    eos=tokenizer.eos,
    repetition_penalty=s.repetition_penalty,
    temperature=s.temperature,
    top_k=s.top_k,
    top_p=s.top_p,
    seed=s.seed,
  )
  return VideoModel(
    settings=s,
    directory=directory,
    cfg=cfg,
    tokenizer=tokenizer,
    select=select,
    sampling=sampling,
    dtype=dtype,
  )
