"""A checkpoint and its settings, understood and checked before anything expensive."""

import dataclasses
import hashlib
import logging
import os
import pathlib
import traceback
from collections.abc import Sequence

import numpy as np

from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tuned import read_tuned
from xcomp_jax.config import (
  COSINE,
  ConfigError,
  LPCompConfig,
  ModelConfig,
  SelectConfig,
  Tuned,
  VLMConfig,
)
from xcomp_jax.data import prompt
from xcomp_jax.data.video import MEMORY, FrameSample, TailError, VideoError, without_tail
from xcomp_jax.errors import one_line, out_of_memory
from xcomp_jax.inference import generate
from xcomp_jax.inference.chat import prompt_of
from xcomp_jax.inference.films import Film, sample_film
from xcomp_jax.inference.selection import FrameSelector, frame_selector
from xcomp_jax.inference.settings import SAMPLED_CLIP, TRAINED, AskSettings, checked
from xcomp_jax.inputs import ENDINGS, printable
from xcomp_jax.model import kernels, qc_comp

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PreparedModel:
  """A checkpoint and its settings, understood and checked; `VideoModel` has the parameters, too.

  select: None where all frames are kept. dtype: of computation and parameters.
  """

  settings: AskSettings
  directory: pathlib.Path
  cfg: VLMConfig
  tokenizer: prompt.Tokenizer
  select: SelectConfig | None
  sampling: generate.Sampling
  dtype: str

  def sample(
    self,
    film: Film | FrameSample,
    start: float | None = None,
    end: float | None = None,
    times: Sequence[float] | np.ndarray | None = None,
  ) -> FrameSample:
    """Which frames of a video to decode.

    Args:
      film: a video, folder of frames, GIF or image; or frames in memory, see `films.Film`.
      start: second from which it is looked at.
      end: and until which.
      times: seconds of frames in memory.

    Raises:
      VideoError, FileNotFoundError: what is wrong with it.
      ConfigError: clips that sampling can't fill.
    """
    if isinstance(film, FrameSample):
      return film
    self.check_clips()
    s = self.settings
    chosen = sample_film(
      film,
      times,
      self.cfg.vision.image_size,
      max_frames=s.max_frames,
      min_frames=s.min_frames,
      fps=s.fps,
      clip_frames=SAMPLED_CLIP,
      style="ask",
      start=start,
      end=end,
      rate=s.rate,
      stream=s.stream,
    )
    if chosen.lost:
      # an animation doesn't say how long it should be
      lost = f"last {chosen.lost:.2f} seconds are" if chosen.found else "end is"
      LOG.warning("%s: its %s missing, the rest is used", chosen.path, lost)
    return chosen

  def shortened(self, sample: FrameSample, error: TailError) -> FrameSample:
    """What can be read of a video whose end can't; says so.

    Raises:
      VideoError: nothing can. ConfigError: see `check`.
    """
    LOG.warning("%s; the rest is used", error)
    sample = without_tail(sample, error)
    self.check(len(sample.indices), sample.seconds)
    return sample

  def selector(self, frames: int, clip_frames: int | None = None) -> FrameSelector:
    """How some of so many sampled frames are selected for a question.

    clip_frames: of a clip of theirs; None: as many as the tower sees together.

    Raises:
      ConfigError: see `frame_selector`.
    """
    # a still image is a clip of one frame
    F = clip_frames or min(self.cfg.clip_frames, frames)
    return frame_selector(frames, F, self.select)

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

  def check(self, frames: int, seconds: float, question: str = "?", subtitles: str = "") -> None:
    """Checks, before any frame is decoded, that a question about so many frames can be scored and
    fits into the context.

    Args:
      frames: that were sampled.
      seconds: of what they were sampled from.
      question: its text; "?": the shortest one there is, where none is known yet.
      subtitles: that are listed before it, one per line.

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
      subtitles=subtitles,
    )

  def source(
    self,
    film: str | os.PathLike | Sequence[np.ndarray],
    start: float | None = None,
    end: float | None = None,
  ) -> str:
    """Which video, sampled how; its size and beginning tell it from another one of its name.

    film: a path, or frames in memory.
    """
    s, digest = self.settings, hashlib.blake2b(digest_size=4)
    if not isinstance(film, (str, os.PathLike)):
      name, size = MEMORY.name, sum(frame.nbytes for frame in film)
      # a few rows: a frame may be a view of less memory than it seems to have
      digest.update(film[0][: max(1, (1 << 20) // (3 * film[0].shape[1]))].tobytes())
    elif (file := pathlib.Path(film)).is_dir():
      name, size = file.name, sum(f.stat().st_size for f in file.iterdir())
    else:
      name, size = file.name, file.stat().st_size
      with open(file, "rb") as opened:
        digest.update(opened.read(1 << 20))
    part = "" if start is None and end is None else f" from {start or 0} s to {end or 'the end'}"
    rate = "" if s.rate == "own" else ", by the average rate"
    stream = "" if s.stream is None else f", stream {s.stream}"
    return (
      f"{printable(name)} ({size:,} bytes, {digest.hexdigest()}){part}, {s.min_frames} to "
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
  if isinstance(error, (VideoError, prompt.AnnotationError, ConfigError, OSError)):
    return one_line(error)
  last = traceback.extract_tb(error.__traceback__)[-1]
  where, said = os.path.basename(last.filename), one_line(error)[:300]
  return f"unexpected {type(error).__name__} in {where}, line {last.lineno}: {said}"


def prepare_model(s: AskSettings) -> PreparedModel:
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
    LOG.warning(
      "a context of %s tokens (--context), not the %s of %s",
      f"{s.context:,}",
      f"{cfg.llm.context or 'unknown number'}",
      directory,
    )
    cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, context=s.context))
  tokenizer = loading.read_tokenizer(directory, cfg)
  select = qc_comp.select_config(s.mode, s.select, s.repeat, s.rows) if s.select else None
  if select and lp_comp.keep == "attention":
    raise ConfigError("--keep attention can't be scored by QC-Comp: add --select 0", where="--keep")
  return PreparedModel(
    settings=s,
    directory=directory,
    cfg=cfg,
    tokenizer=tokenizer,
    select=select,
    sampling=s.sampling(tokenizer.eos),
    dtype=dtype,
  )
