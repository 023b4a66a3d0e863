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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

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
  ModelConfig,
  SelectConfig,
  Tuned,
  VLMConfig,
)
from xcomp_jax.data import prompt, video
from xcomp_jax.errors import one_line, out_of_memory
from xcomp_jax.files import expanduser
from xcomp_jax.inference import chat, encoded_video, generate
from xcomp_jax.inputs import ENDINGS, number, printable
from xcomp_jax.model import kernels, qc_comp
from xcomp_jax.model.vlm import VLM

TRAINED = 32768  # positions that Qwen2.5 was trained on, over which it is stretched
COMPILED = "~/.cache/xcomp_jax"  # folder of compiled programs
FRAMES = 1_000_000  # of a video, at most
CLIPS = number(1, FRAMES, int)
# the release samples whole clips of 8 frames even where its tower takes clips of 4 (FACTS.md 5)
SAMPLED_CLIP = 8


@dataclasses.dataclass(frozen=True)
class AskSettings:
  """How videos are watched and questions answered; `add_options` explains each."""

  checkpoint: str
  select: int
  mode: str
  repeat: int | None
  rows: str
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


def clips(text: str) -> int | Literal["auto"]:
  """Reads --clips-per-chunk."""
  return "auto" if text == "auto" else CLIPS(text)


def clip_frames(text: str) -> str:
  """Reads --clip-frames."""
  return text if text in ("auto", "checkpoint") else str(CLIPS(text))


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds an option for every setting; their defaults are those of `ask`."""
  add = parser.add_argument
  add("--checkpoint", type=expanduser, required=True, help="directory, hub id, or export")
  add(
    "--select",
    type=number(0, FRAMES, int),
    default=512,
    help="frames that QC-Comp keeps for a question; 0: all",
  )
  add(
    "--mode",
    choices=("aligned", "local", "official", "global"),
    default="aligned",
    help="how QC-Comp scores them",
  )
  add(
    "--repeat",
    type=number(1, 1000, int),
    help="times a frame is scored; default: 2 in official mode, 1 in the others",
  )
  add(
    "--rows",
    choices=("question", "answer"),
    default="question",
    help="tokens whose attention scores frames: the question's, as in the paper, or the "
    "one that the answer follows",
  )
  add("--max-frames", type=number(1, FRAMES, int), default=1024, help="frames, at most")
  add(
    "--min-frames",
    type=number(1, FRAMES, int),
    default=128,
    help="frames, at least; a short video's are repeated",
  )
  add(
    "--fps",
    type=number(0.001, video.FASTEST, float),
    default=8.0,
    help="frames per second, at most",
  )
  add(
    "--rate",
    choices=get_args(video.Rate),
    default="own",
    help="where a video's frames have no constant rate: own: they have their own times; "
    "average: they lie as far apart as the average rate says, as in the release",
  )
  add(
    "--stream",
    type=number(0, 1000, int),
    help="number of the video's stream in its file; default: the one that players take",
  )
  add(
    "--clip-frames",
    type=clip_frames,
    default="auto",
    help='frames the tower sees together; "auto": as tuned, else 8 as XComp was trained, '
    '4 for InternVideo2; "checkpoint": what config.json says (quirk Q1)',
  )
  add(
    "--yarn",
    type=number(1.0, 1000.0, float),
    help=f"stretch positions so many times over {TRAINED:,} (4 for 10,000 frames without "
    "compression); 1: not at all; default: as config.json says",
  )
  add(
    "--context",
    type=number(1, 10_000_000, int),
    help="tokens that a prompt may have, 16 for each frame before compression; 131072 in the "
    "release's evaluation; default: as tuned, else as config.json says",
  )
  add(
    "--clips-per-chunk",
    type=clips,
    default="auto",
    help="clips in the tower at once; default: by the device's memory",
  )
  add("--keep", choices=get_args(Keep), help="default: as tuned, else suffix")
  add("--schedule", choices=("cosine", "cosine_ceil"), help="default: as tuned, else cosine")
  add(
    "--dtype",
    choices=get_args(Dtype),
    help="default: bfloat16, but float16 on GPUs that have none, such as a T4, and float32 on "
    "CPUs; the release evaluates in float16",
  )
  add(
    "--attention",
    choices=get_args(Attention),
    default="auto",
    help="auto: by the device. einsum, tiled and xla_chunked run on any; flash "
    "is a GPU's, mosaic, triton and cudnn (the tower) are NVIDIA's, splash is a TPU's",
  )
  add("--max-new-tokens", type=number(1, 100_000, int), default=64)
  add(
    "--repetition-penalty",
    type=number(0.001, 1000.0, float),
    default=1.0,
    help="1.1 in the release's generation_config (quirk Q20)",
  )
  add(
    "--temperature",
    type=number(0.0, 1000.0, float),
    default=0.0,
    help="0: the most probable token each time",
  )
  add(
    "--top-k",
    type=number(0, 10_000_000, int),
    default=0,
    help="draw from this many tokens; 0: from all",
  )
  add(
    "--top-p",
    type=number(1e-6, 1.0, float),
    default=1.0,
    help="draw from the fewest tokens of this probability",
  )
  add("--seed", type=number(0, 2**32 - 1, int), default=0, help="of the draws")
  add(
    "--compilation-cache",
    type=expanduser,
    help=f"folder of compiled programs, for the next time; '': none; "
    f"default: JAX_COMPILATION_CACHE_DIR, else {COMPILED}",
  )


def settings_of(args: argparse.Namespace) -> AskSettings:
  """The settings among a command's arguments."""
  return AskSettings(
    **{field.name: getattr(args, field.name) for field in dataclasses.fields(AskSettings)}
  )


def default(checkpoint: str | os.PathLike, **changes) -> AskSettings:
  """The settings that `ask` has without options, but for `changes`."""
  parser = argparse.ArgumentParser()
  add_options(parser)
  return dataclasses.replace(
    settings_of(parser.parse_args([f"--checkpoint={os.fspath(checkpoint)}"])), **changes
  )


def checked(s: AskSettings) -> AskSettings:
  """The settings as the options of the command line read them, so that what Python code sets has
  the same bounds and choices.

  Raises:
    ConfigError: which one can't be, and why.
  """
  parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
  add_options(parser)
  given = {name: value for name, value in vars(s).items() if value is not None}
  try:
    read = settings_of(
      parser.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in given.items()])
    )
  except argparse.ArgumentError as error:
    raise ConfigError(one_line(error).removeprefix("argument ")) from error
  if unset := [
    name for name, value in vars(read).items() if value is not None and name not in given
  ]:
    raise ConfigError(f"--{unset[0].replace('_', '-')}: None is no value for it")
  return read


@dataclasses.dataclass(frozen=True)
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

  def load(self) -> VLM:
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
        f"take a divisor of that"
      )

  def check(self, frames: int, seconds: float, question: str = "?") -> None:
    """Checks, before any frame is decoded, that a question about so many frames can be scored and
    fits into the context.

    Args:
      frames: that were sampled.
      seconds: of what they were sampled from.
      question: its text; "?": the shortest one there is, where none is known yet.

    Raises:
      AnnotationError, ConfigError: see `chat.prompt_of` and `qc_comp.plan_rounds`.
    """
    chat.prompt_of(
      self.cfg,
      self.tokenizer,
      question,
      frames,
      seconds,
      self.select,
      self.sampling.max_new_tokens,
    )

  def _encode(self, model, sample, source, decoded, identity, report):
    begun, decoding = time.perf_counter(), 0.0

    def frames() -> Iterator[np.ndarray]:
      nonlocal decoding
      decoder = iter(video.frames(sample) if decoded is None else decoded)
      while True:
        begun = time.perf_counter()
        frame = next(decoder, None)
        decoding += time.perf_counter() - begun
        if frame is None:
          return
        yield frame

    phases = self.phases(len(sample.indices))
    film = encoded_video.encode_video(
      model,
      frames(),
      sample.times,
      sample.seconds,
      source,
      phases=phases,
      tower=identity,
      report=report,
    )
    return film, {"decoding": decoding, "tower": time.perf_counter() - begun - decoding}

  def encode(
    self,
    model: VLM,
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

  def phases(self, frames: int) -> Sequence[int]:
    """Which phases of so many frames selecting needs."""
    return chat.phases(frames, min(self.cfg.clip_frames, frames), self.select)

  def source(self, path: str, start: float | None = None, end: float | None = None) -> str:
    """Which video, sampled how; its size and beginning tell it from another one of its name."""
    s, file = self.settings, pathlib.Path(path)
    size = sum(f.stat().st_size for f in file.iterdir()) if file.is_dir() else file.stat().st_size
    digest = hashlib.blake2b(digest_size=4)
    if not file.is_dir():
      with open(file, "rb") as opened:
        digest.update(opened.read(1 << 20))
    part = "" if start is None and end is None else f" from {start or 0} s to {end or 'the end'}"
    sampled = f"{s.min_frames} to {s.max_frames} frames at up to {s.fps:g} per second"
    sampled += ("" if s.rate == "own" else ", by the average rate") + (
      "" if s.stream is None else f", stream {s.stream}"
    )
    return f"{printable(file.name)} ({size:,} bytes, {digest.hexdigest()}){part}, {sampled}"


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
    raise ConfigError("--keep attention can't be scored by QC-Comp: add --select 0")
  sampling = generate.Sampling(
    s.max_new_tokens, tokenizer.eos, s.repetition_penalty, s.temperature, s.top_k, s.top_p, s.seed
  )
  return VideoModel(s, directory, cfg, tokenizer, select, sampling, dtype)
