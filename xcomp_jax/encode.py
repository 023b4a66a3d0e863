"""What the tower makes of a video, apart from any question: encode once, ask many."""

import dataclasses
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from xcomp_jax.config import ConfigError
from xcomp_jax.files import replacing
from xcomp_jax.model import kernels, vlm

THUMBNAIL = 96  # pixels


class EncodedVideoError(ValueError):
  """An encoded video that can't be read, or belongs to another model or video; the message says what differs."""


@dataclasses.dataclass(frozen=True)
class EncodedVideo:
  """What the tower makes of a video: encode once, ask many.

  features: {phase: [C, N, D]}, merged tokens of clips that start at frame `phase` (and go on at the first frame
    after the last). Phase 0 serves everything but the "official" selection, whose rounds need others.
  times: float64[T], seconds at which the sampled frames are shown; seconds: of the whole, as prompts state it.
  thumbnails: uint8[C, 96, 96, 3], a frame from the middle of each clip.
  frames: uint8[T, S, S, 3], only where the "official" selection will encode selected frames again; else None.
  identity: of the tower's weights and settings; see `identity`.
  source: which file, sampled how; in words.
  """

  features: dict[int, np.ndarray]
  times: np.ndarray
  seconds: float
  thumbnails: np.ndarray
  frames: np.ndarray | None
  identity: str
  source: str

  @property
  def clips(self) -> int:
    """C."""
    return len(self.features[0])

  @property
  def clip_frames(self) -> int:
    """Frames of a clip; 1 for a still image."""
    return len(self.times) // self.clips


def tower_identity(model: vlm.VLM) -> str:
  """A hash of the tower's sizes, settings and weights (as bfloat16), whatever it computes in; the projector comes later.

  Where several processes share the parameters, all of them must call this; each holds one whole array at a time.
  """
  cfg = model.cfg
  digest = hashlib.blake2b(repr((cfg.vision, cfg.clip_frames, cfg.tokens_per_frame)).encode(), digest_size=16)
  for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(nnx.state(model.vision)), key=lambda item: str(item[0])):
    digest.update(str(path).encode())
    whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
    digest.update(np.ascontiguousarray(whole).astype(ml_dtypes.bfloat16).view(np.uint8).data)
  return digest.hexdigest()


def identity(model: vlm.VLM) -> str:
  """`tower_identity`, and what it computes in."""
  return f"{tower_identity(model)}-{model.cfg.dtype}"


_encode = jax.jit(vlm.encode)


def encode_clips(model: vlm.VLM, clips: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
  """Merged features [N, D] of clips uint8[F, S, S, 3], a chunk at a time: one compilation, bounded memory.

  Raises:
    ConfigError: numbers that float16 does not have.
  """
  size, waiting = model.cfg.clips_per_chunk, []

  def run():
    chunk = np.stack(waiting + [waiting[-1]] * (size - len(waiting)))
    done = np.asarray(_encode(model, chunk))[: len(waiting)]
    kernels.check_finite(done, "features of the tower", model.cfg.dtype)
    return done

  for clip in clips:
    waiting.append(clip)
    if len(waiting) == size:
      yield from run()
      waiting = []
  if waiting:
    yield from run()


def encode(
  model: vlm.VLM,
  frames: Iterable[np.ndarray],
  times: np.ndarray,
  seconds: float,
  source: str,
  *,
  phases: Sequence[int] = (0,),
  tower: str | None = None,
  report: Callable[[int], None] = lambda clips: None,
) -> EncodedVideo:
  """Encodes a video, whose frames may come one by one from a decoder.

  Args:
    model: the parameters.
    frames: uint8[S, S, 3] each, len(times) of them: whole clips, or one frame (an image).
    times: float64[T], seconds of the frames.
    seconds: of the whole.
    source: what this is, in words; kept.
    phases: starts of clips to encode; others than 0 keep the frames in memory.
    tower: `identity(model)`, where many videos are encoded; None: find it out, which reads all of the tower's weights.
    report: called with the number of clips done since the last call.

  Raises:
    ConfigError: frames that make no whole clips.
  """
  T = len(times)
  F = 1 if T == 1 else model.cfg.clip_frames
  if not T or T % F:
    raise ConfigError(f"{T} frames are no whole clips of {F}")
  from xcomp_jax.data.video import resize  # brings OpenCV, which a given encoded video does not need

  size = model.cfg.vision.image_size
  later = sorted(set(phases) - {0})
  kept = np.empty((T, size, size, 3), np.uint8) if later else None
  thumbnails = []

  def clips():
    clip = []
    for i, frame in enumerate(frames):
      clip.append(frame)
      if kept is not None:
        kept[i] = frame
      if len(clip) == F:
        thumbnails.append(resize(clip[F // 2][None], THUMBNAIL)[0])
        yield np.stack(clip)
        clip = []

  def run(clips):
    done = []
    for one in encode_clips(model, clips):
      done.append(one)
      report(1)
    return np.stack(done)

  features = {0: run(clips())}
  if kept is not None:
    for phase in later:
      features[phase] = run(kept[(phase + start + np.arange(F)) % T] for start in range(0, T, F))
  return EncodedVideo(features, np.asarray(times, np.float64), seconds, np.stack(thumbnails), kept, tower or identity(model), source)


def save(video: EncodedVideo, path: str | os.PathLike) -> None:
  """Writes an .npz file: `about` (json: seconds, identity, source, dtype), times, thumbnails, features_PHASE (bfloat16
  as uint16), and frames if there are any.

  Nothing is left behind if it is interrupted.

  Raises:
    OSError: the file can't be written.
  """
  path = pathlib.Path(path)
  about = {"seconds": video.seconds, "identity": video.identity, "source": video.source, "dtype": str(video.features[0].dtype)}
  raw = lambda a: a.view(np.uint16) if a.dtype == ml_dtypes.bfloat16 else a
  arrays = {f"features_{phase}": raw(a) for phase, a in video.features.items()}
  arrays |= {"times": video.times, "thumbnails": video.thumbnails, "about": np.array(json.dumps(about))}
  arrays |= {} if video.frames is None else {"frames": video.frames}
  with replacing(path) as temporary, open(temporary, "wb") as file:
    np.savez(file, **arrays)


def load(path: str | os.PathLike, model: vlm.VLM) -> EncodedVideo:
  """Reads what `save` wrote.

  Raises:
    EncodedVideoError: no such file, or not by the weights and settings of `model`.
    OSError: it can't be read.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays.pop("about")))
    times, thumbnails, frames = arrays.pop("times"), arrays.pop("thumbnails"), arrays.pop("frames", None)
    typed = lambda a: a.view(ml_dtypes.bfloat16) if about["dtype"] == "bfloat16" else a
    features = {int(name.removeprefix("features_")): typed(a) for name, a in arrays.items()}
    video = EncodedVideo(features, times, about["seconds"], thumbnails, frames, about["identity"], about["source"])
  except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
    raise EncodedVideoError(f"{path} is no encoded video: {error}") from error
  mine = identity(model)
  (_, _, dtype), (_, _, wanted) = video.identity.rpartition("-"), mine.rpartition("-")
  if dtype != wanted:
    raise EncodedVideoError(f"{path} was encoded in {dtype or 'another dtype'}, and this is to be computed in {wanted}; give that --dtype, or another file")
  if video.identity != mine:
    raise EncodedVideoError(
      f"{path} was encoded by another tower or with other settings (its identity is {video.identity[:12]}, this "
      f"checkpoint's {mine[:12]}); encode the video again"
    )
  return video
