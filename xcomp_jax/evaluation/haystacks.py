"""Needles and haystacks: what is hidden in a video, and the features of both."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from xcomp_jax.data import video
from xcomp_jax.errors import XCompError
from xcomp_jax.inference import encoded_video
from xcomp_jax.inference.places import computing
from xcomp_jax.inference.prepared import fault
from xcomp_jax.inference.video_model import VideoModel
from xcomp_jax.inputs import quoted, read_json, regular
from xcomp_jax.progress import progress
from xcomp_jax.synthetic import world


class NeedleError(XCompError, ValueError):
  """Needles or a haystack that can't be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Needle:
  """What is hidden, and what is asked about it.

  clips: pictures uint8[F, H, W, 3] per hop, in the order of the chain; () if one can't be read, and
  `fault` says why.
  questions: {kind: (text, letter)}.
  """

  clips: tuple[np.ndarray, ...]
  questions: dict[str, tuple[str, str]]
  fault: str = ""


def read_needles(
  file: pathlib.Path, images: pathlib.Path, clip_frames: int, size: int
) -> list[Needle]:
  """VideoChat-Flash's files: [{"image", "question", "answer"}], or several "images" with
  "question1", "answer1" (about the caption of the last one) and "question2", "answer2" (about what
  it shows). Pictures become clips of `size` pixels.

  Raises:
    NeedleError: another kind of file. OSError: it can't be read.
  """
  items = read_json(file, NeedleError)
  if not isinstance(items, list):
    raise NeedleError(
      f"{file}: expected a list of needles, not {quoted(items, 60)}", where=file, value=items
    )
  out = []
  for i, item in enumerate(items):
    try:
      names, questions = _chain(item)
    except (KeyError, TypeError) as error:
      raise NeedleError(
        f"{file}, needle {i}: {error!r}; expected image, question, answer, or images, question1, "
        "answer1, question2, answer2",
        where=file,
        needle=i,
      ) from error
    try:
      out.append(Needle(tuple(_still(images / n, clip_frames, size) for n in names), questions))
    except BaseException as error:  # costs the questions about this needle
      out.append(Needle((), questions, fault(error)))
  return out


def _chain(item: dict) -> tuple[list[str], dict[str, tuple[str, str]]]:
  """The names of a needle's pictures, and its questions."""
  if "images" in item:
    names, kinds = item["images"], {"caption": "1", "question": "2"}
  else:
    names, kinds = [item["image"]], {"question": ""}
  questions = {kind: (item[f"question{n}"], item[f"answer{n}"]) for kind, n in kinds.items()}
  if not all(isinstance(text, str) for text in (*sum(questions.values(), ()), *names)):
    raise TypeError("something that is no text")
  return names, questions


def _still(picture: pathlib.Path, clip_frames: int, size: int) -> np.ndarray:
  """A picture as a clip, uint8[clip_frames, size, size, 3]."""
  if os.path.isdir(picture):  # which would be a film of pictures
    regular(picture)
  chosen = video.sample(
    picture,
    size=size,
    max_frames=8,
    min_frames=8,
    fps=1.0,
    clip_frames=8,
    style="ask",
    read_type="img",
  )
  (frame,) = video.frames(chosen)
  return np.broadcast_to(frame, (clip_frames, *frame.shape))


def synthetic(count: int, seed: int) -> list[Needle]:
  """Scenes of the synthetic world that show all that is asked about: a moving shape and a digit."""
  videos = [world.scenes(np.random.default_rng((seed, i)), 1) for i in range(count)]
  return [
    Needle((world.render(shown[0]),), {kind: world.turn(shown, kind) for kind in world.QUESTIONS})
    for shown in videos
  ]


def synthetic_hay(clips: int, seed: int) -> Iterator[np.ndarray]:
  """Scenes that show nothing: uint8[8, 96, 96, 3] each."""
  for i in range(clips):
    drawn = np.random.default_rng((seed, 1, i)).integers(2**31)
    yield world.render(world.Scene(seed=int(drawn)))


def needle_places(frames: int, hops: int, clip_frames: int, depth: float) -> list[int]:
  """First frames of the needles in a video of `frames`, needles included.

  One needle lies at `depth`, from 0 (the beginning) to 1 (the end); several are spread from the
  first frame to the last.
  """
  free = frames - hops * clip_frames
  gaps = [int(depth * free)] if hops == 1 else [int(j * free / (hops - 1)) for j in range(hops)]
  return [gap + j * clip_frames for j, gap in enumerate(gaps)]


def hide(
  hay: Float[np.ndarray, "T N D"],
  needles: Sequence[Float[np.ndarray, "F N D"]],
  frames: int,
  starts: Sequence[int],
) -> Float[np.ndarray, "frames N D"]:
  """The haystack's first frames (again from its beginning, where it is too short) with needles
  between them.
  """
  out = np.empty((frames, *hay.shape[1:]), hay.dtype)
  free = np.ones(frames, bool)
  for start, needle in zip(starts, needles, strict=True):
    out[start : start + len(needle)] = needle
    free[start : start + len(needle)] = False
  out[free] = hay[np.arange(int(free.sum())) % len(hay)]
  return out


def per_frame(model: VideoModel, clips: Iterator[np.ndarray]) -> Float[np.ndarray, "T N D"]:
  """Features of clips of pictures, cut into frames of 16 tokens."""
  resized = (video.resize(clip, model.cfg.vision.image_size) for clip in clips)
  with computing(model.vlm):
    features = np.stack(list(encoded_video.encode_in_chunks(model.vlm, resized)))  # [C, F * N, D]
  return features.reshape(-1, model.cfg.tokens_per_frame, features.shape[-1])  # [T, N, D]


def haystack(
  model: VideoModel, file: str | None, frames: int, seed: int
) -> Float[np.ndarray, "T N D"]:
  """Features of a video, sampled at --fps, or of synthetic scenes.

  Raises:
    VideoError, FileNotFoundError: what is wrong with the video.
  """
  F = model.cfg.clip_frames

  def encode(clips, count):
    bar = progress(clips, total=count, desc="haystack", unit="clip", leave=False)
    return per_frame(model, iter(bar))

  def encode_film(sample):
    decoded = video.frames(sample)
    count = len(sample.indices) // F
    return encode((np.stack([next(decoded) for _ in range(F)]) for _ in range(count)), count)

  if file is None:
    count = -(-frames // F)
    return encode(synthetic_hay(count, seed), count)
  sample = model.sample(file)
  try:
    return encode_film(sample)
  except video.TailError as error:
    return encode_film(model.shortened(sample, error))
