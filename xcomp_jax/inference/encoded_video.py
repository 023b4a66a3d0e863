"""What the tower makes of a video, apart from any question: encode once, ask many."""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from xcomp_jax.checkpoints.loading import tower_identity
from xcomp_jax.config import ConfigError
from xcomp_jax.errors import XCompError
from xcomp_jax.files import expanduser, replacing
from xcomp_jax.inference.moments import extent
from xcomp_jax.inputs import parse_json, reading, regular
from xcomp_jax.model import kernels, vlm
from xcomp_jax.parallel.mesh import clip_sharding, constrain, mesh_of

THUMBNAIL = 96  # pixels
JOINED = 8  # clips that are stacked by one program, whatever their number

# Merged features of C clips, [N, D] each: those of one array, or an array of each. Encoded videos
# have them on the devices, those of a file in the host's memory.
ClipFeatures = np.ndarray | Sequence[jax.Array | np.ndarray]


class EncodedVideoError(XCompError, ValueError):
  """An encoded video that can't be read, or belongs to another model or video; the message says
  what differs.
  """


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EncodedVideo:
  """What the tower makes of a video: encode once, ask many.

  features: {phase: C times [N, D]}, merged tokens of clips that start at frame `phase` (and go on
    at the first frame after the last). Phase 0 serves everything but the "official" selection,
    whose rounds need others.
  times: float64[T], seconds at which the sampled frames are shown.
  seconds: of the whole, as prompts state it.
  thumbnails: uint8[C, 96, 96, 3], a frame from the middle of each clip; None: nobody will look.
  frames: uint8[T, S, S, 3], only where the "official" selection will encode selected frames again;
    else None.
  identity: of the tower's weights and settings; see `identity`.
  source: which file, sampled how; in words.
  spent: seconds that making it took: "decoding", and "tower", which is what it took beyond that,
    for both go on at once; not kept in a file.
  start: second of the file from which it was looked at.
  parts: the videos that were joined to this one; see `several`.
  """

  features: dict[int, ClipFeatures]
  times: np.ndarray
  seconds: float
  thumbnails: np.ndarray | None = None
  frames: np.ndarray | None = None
  identity: str = ""
  source: str = ""
  spent: Mapping[str, float] = dataclasses.field(default_factory=dict)
  start: float = 0.0
  parts: tuple["EncodedVideo", ...] = ()

  @property
  def clips(self) -> int:
    """C."""
    return len(self.features[0])

  @property
  def clip_frames(self) -> int:
    """Frames of a clip; 1 for a still image."""
    return len(self.times) // self.clips

  def save(self, path: str | os.PathLike) -> None:
    """Writes it to a file; see `save_video`. `VideoModel.read_video` reads it."""
    save_video(self, path)

  def __repr__(self) -> str:
    return f"EncodedVideo({self.source}: {len(self.times):,} frames of {self.seconds:.2f} s)"

  def _repr_html_(self) -> str:
    """What a notebook shows."""
    from xcomp_jax.inference.html_report import framed, page

    return framed(page(self, [], self.spent), 400)


def identity(model: vlm.VLM) -> str:
  """`tower_identity`, and what it computes in."""
  return f"{tower_identity(model)}-{model.cfg.dtype}"


Item = TypeVar("Item")


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
  """Runs of so many; the last may have fewer."""
  left = iter(items)
  while some := list(itertools.islice(left, size)):
    yield some


def _ahead(items: Iterable[Item], count: int) -> Generator[Item, None, None]:
  """The items, which another thread makes, `count` of them before they are asked for; it has ended
  when this has.
  """
  left, pool = iter(items), ThreadPoolExecutor(1)

  def make() -> list[Item]:
    return list(itertools.islice(left, 1))

  try:
    made = collections.deque(pool.submit(make) for _ in range(count))
    while item := made.popleft().result():
      made.append(pool.submit(make))
      yield from item
  finally:
    pool.shutdown(cancel_futures=True)


@jax.jit
def encode_chunk(
  model: vlm.VLM, frames: UInt8[Array, "C F S S 3"]
) -> Sequence[Float[Array, "N D"]]:
  """Merged features [N, D] of each clip; on a mesh each of its devices has those of all."""
  return list(constrain(vlm.encode_apart(model, frames)))


def encode_in_chunks(
  model: vlm.VLM, clips: Iterable[np.ndarray], encode: Callable = encode_chunk
) -> Iterator[jax.Array]:
  """Merged features [N, D] of clips uint8[F, S, S, 3], which stay on the devices.

  They are encoded in chunks of `clips_per_chunk` for each device of the parameters' mesh; the last
  ones, if they would not nearly fill one, in chunks of one for each. So there are two programs, and
  fewer clips of padding than devices. While the devices work on a chunk, another thread takes the
  next one's clips from their decoder, and the chunk before is handed over: memory is bounded.

  encode: as `encode_chunk`; with another one, tests do less.

  Raises:
    ConfigError: numbers that float16 does not have. Those of `clips` arrive as they are.
  """
  mesh = mesh_of(model.projector)
  devices = 1 if mesh is None else mesh.size

  def send(clips: list[np.ndarray], size: int) -> Sequence[jax.Array]:
    frames = np.stack(clips + clips[-1:] * (size - len(clips)))
    if mesh is None:
      return encode(model, frames)[: len(clips)]
    with jax.set_mesh(mesh):
      return encode(model, jax.device_put(frames, clip_sharding(mesh)))[: len(clips)]

  def receive(features: Sequence[jax.Array]) -> Iterator[jax.Array]:
    for one in jax.block_until_ready(features):
      kernels.check_finite(one, "features of the tower", model.cfg.dtype)
      yield one

  size, sent = devices * model.cfg.clips_per_chunk, []
  # one device alone runs its chunk's program for all but a lone clip: by one for a single clip
  # numbers can differ in their last bit
  few = 1 if devices == 1 else size - devices
  with contextlib.closing(_ahead(clips, size)) as decoded:
    for chunk in _batched(decoded, size):
      each = size if len(chunk) > few else devices
      for some in _batched(chunk, each):
        sent, before = send(some, each), sent
        yield from receive(before)
    yield from receive(sent)


_stack, _join = jax.jit(jnp.stack), jax.jit(jnp.concatenate)


def stacked(arrays: ClipFeatures, count: int) -> np.ndarray | jax.Array:
  """Arrays one after another, and zeros behind them up to `count`. Where all are on devices they
  stay there, and `count` and their shape decide which programs run.
  """
  first, missing = arrays[0], count - len(arrays)
  if not all(isinstance(one, jax.Array) for one in arrays):
    out = np.zeros((count, *first.shape), first.dtype)
    for place, one in zip(out, arrays):  # a list of them all would be a copy more
      place[...] = one
    return out
  every = [*arrays, *[jnp.zeros_like(first)] * missing]
  # a program takes the longer to compile the more arrays it is given
  return _join([_stack(some) for some in _batched(every, JOINED)])


def encode_video(
  model: vlm.VLM,
  frames: Iterable[np.ndarray],
  times: np.ndarray,
  seconds: float,
  source: str,
  *,
  start: float = 0.0,
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
    start: second of the file from which it is looked at.
    phases: starts of clips to encode; others than 0 keep the frames in memory.
    tower: `identity(model)`, where many videos are encoded; None: find it out, which reads all of
      the tower's weights.
    report: called with the number of clips done since the last call.

  Raises:
    ConfigError: frames that make no whole clips.
  """
  T = len(times)
  F = 1 if T == 1 else model.cfg.clip_frames
  if not T or T % F:
    raise ConfigError(f"{T} frames are no whole clips of {F}", where="times", value=T)
  from xcomp_jax.data.video import resize

  size = model.cfg.vision.image_size
  later = sorted(set(phases) - {0})
  kept = np.empty((T if later else 0, size, size, 3), np.uint8)
  thumbnails = []

  def decoded() -> Iterator[np.ndarray]:
    """Clips uint8[F, S, S, 3] in order; keeps what is needed of them."""
    for clip in _batched(frames, F):
      if later:
        start = len(thumbnails) * F
        kept[start : start + F] = clip
      thumbnails.append(resize(clip[F // 2][None], THUMBNAIL)[0])
      yield np.stack(clip)

  def encoded(clips: Iterable[np.ndarray]) -> list[jax.Array]:
    """C times [N, D], one of the phases."""
    done = []
    for one in encode_in_chunks(model, clips):
      done.append(one)
      report(1)
    return done

  features = {0: encoded(decoded())}
  if len(features[0]) != T // F:
    found = len(features[0]) * F
    raise ConfigError(f"there are {found} frames and {T} times", where="frames", value=found)
  for phase in later:
    # the last clip goes on at the first frame
    starts = range(phase, phase + T, F)
    features[phase] = encoded(kept[(start + np.arange(F)) % T] for start in starts)
  return EncodedVideo(
    features=features,
    times=np.asarray(times, np.float64),
    seconds=seconds,
    thumbnails=np.stack(thumbnails),
    frames=kept if later else None,
    identity=tower or identity(model),
    source=source,
    start=start,
  )


def save_video(video: EncodedVideo, path: str | os.PathLike) -> None:
  """Writes an .npz file: `about` (json: seconds, start, identity, source, dtype), times,
  thumbnails, features_PHASE (bfloat16 as uint16), and frames if there are any.

  Nothing is left behind if it is interrupted.

  Raises:
    OSError: the file can't be written.
    EncodedVideoError: several videos were joined to this one.
  """
  if video.parts:
    raise EncodedVideoError("save the videos one by one, not joined", where=str(path))
  about = {
    "seconds": video.seconds,
    "start": video.start,
    "identity": video.identity,
    "source": video.source,
    "dtype": str(video.features[0][0].dtype),
  }
  assert video.thumbnails is not None  # `encode_video` makes them
  features = {phase: np.stack(jax.device_get(clips)) for phase, clips in video.features.items()}
  arrays: dict[str, Any] = {
    # NumPy has no bfloat16
    f"features_{phase}": a.view(np.uint16) if a.dtype == ml_dtypes.bfloat16 else a
    for phase, a in features.items()
  } | {
    "times": video.times,
    "thumbnails": video.thumbnails,
    "about": np.array(json.dumps(about)),
  }
  if video.frames is not None:
    arrays["frames"] = video.frames
  with replacing(expanduser(path)) as temporary, open(temporary, "wb") as file:
    np.savez(file, **arrays)


FIXED = {"about", "times", "thumbnails", "frames"}  # arrays of a file, beside features_PHASE
FRAMES = 1_000_000  # of a video, at most


def load_video(path: str | os.PathLike, model: vlm.VLM, tower: str | None = None) -> EncodedVideo:
  """Reads what `save_video` wrote. What it says of itself is checked before an array is read:
  nothing in a file makes it take more memory than the file is large.

  tower: `identity(model)`, if it is known.

  Raises:
    EncodedVideoError: no encoded video, a damaged one, or not by the weights and settings of
      `model`.
    OSError: it can't be read.
  """
  file = regular(expanduser(path))
  with reading(file, EncodedVideoError, "encoded video"), zipfile.ZipFile(file) as archive:
    headers = _headers(archive, file.stat().st_size)
    about = parse_json(str(_array(archive, "about")), file, EncodedVideoError)
    check_identity(file, str(about["identity"]), tower or identity(model))
    cfg, T = model.cfg, headers["times"][0][0]
    F = 1 if T == 1 else cfg.clip_frames
    if not 0 < T <= FRAMES or T % F:
      raise ValueError(f"{T:,} frames are no whole clips of {F}, from 1 to {FRAMES:,}")
    phases = sorted(int(name.removeprefix("features_")) for name in headers if name not in FIXED)
    if 0 not in phases or not all(0 <= phase < F for phase in phases):
      raise ValueError(f"its features begin at frames {phases}, and clips have {F}")
    dtype, size = np.dtype(cfg.dtype), cfg.vision.image_size
    stored = np.dtype(np.uint16) if dtype == ml_dtypes.bfloat16 else dtype
    wanted: dict[str, tuple[tuple[int, ...], np.dtype]] = {
      "about": ((), headers["about"][1]),
      "times": ((T,), np.dtype(np.float64)),
      "thumbnails": ((T // F, THUMBNAIL, THUMBNAIL, 3), np.dtype(np.uint8)),
      **{
        f"features_{phase}": ((T // F, F * cfg.tokens_per_frame, cfg.vision.width), stored)
        for phase in phases
      },
    }
    if "frames" in headers:
      wanted["frames"] = ((T, size, size, 3), np.dtype(np.uint8))
    if headers != wanted:
      name = next(name for name in headers | wanted if headers.get(name) != wanted.get(name))
      raise ValueError(f"{name} is {_shown(headers.get(name))}, must be {_shown(wanted.get(name))}")
    times, seconds = _array(archive, "times"), float(about["seconds"])
    # earlier versions did not say it
    start = float(about.get("start", extent(times, seconds)[0]))
    if (
      not np.isfinite(times).all()
      or (np.diff(times) < 0).any()
      or not 0 <= seconds < 1e9
      or not 0 <= start < 1e9
      or not isinstance(about["source"], str)
    ):
      raise ValueError("its times, seconds, start or source are none that a video has")
    features: dict[int, ClipFeatures] = {
      phase: _array(archive, f"features_{phase}").view(dtype)
      for phase in phases
      if phase == 0 or "frames" in headers  # the others are of no use without them
    }
    for phase, tokens in features.items():
      if not all(np.isfinite(clip).all() for clip in tokens):
        raise ValueError(f"features_{phase} holds numbers that are not finite")
    return EncodedVideo(
      features=features,
      times=times,
      seconds=seconds,
      thumbnails=_array(archive, "thumbnails"),
      frames=_array(archive, "frames") if "frames" in headers else None,
      identity=about["identity"],
      source=about["source"],
      start=start,
    )


def _headers(archive: zipfile.ZipFile, size: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of each array; what the archive says of its sizes fits the file."""
  found = {}
  for entry in archive.infolist():
    name = entry.filename.removesuffix(".npy")
    if name in found or (name not in FIXED and not re.fullmatch(r"features_\d{1,6}", name)):
      raise ValueError(
        f"it holds {name!r}" + (" twice" if name in found else ", which is no part of one")
      )
    if (
      entry.compress_type != zipfile.ZIP_STORED
      or entry.flag_bits & 1
      or entry.file_size != entry.compress_size
      or entry.file_size > size
    ):
      raise ValueError(f"{name} is packed, encrypted, or larger than the file")
    with archive.open(entry) as opened:
      version = np.lib.format.read_magic(opened)
      read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
      )
      shape, by_columns, dtype = read(opened)
      if (
        dtype.hasobject
        or (by_columns and len(shape) > 1)
        or opened.tell() + math.prod(shape) * dtype.itemsize != entry.file_size
      ):
        raise ValueError(f"{name} is {_shown((shape, dtype))} in {entry.file_size:,} bytes")
    found[name] = shape, dtype
  if lacking := {"about", "times", "thumbnails", "features_0"} - found.keys():
    raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
  if (
    found["about"][0] != ()
    or found["about"][1].kind != "U"
    or found["about"][1].itemsize > 1 << 20
    or len(found["times"][0]) != 1
  ):
    raise ValueError(f"about is {_shown(found['about'])}, and times are {_shown(found['times'])}")
  return found


def _shown(array: tuple[tuple[int, ...], np.dtype] | None) -> str:
  return "absent" if array is None else f"{array[1]}{list(array[0])}"


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
  with archive.open(f"{name}.npy") as opened:
    return np.lib.format.read_array(opened, allow_pickle=False)


def check_identity(file: str | os.PathLike, own: str, mine: str) -> None:
  """Sees to it that a video is of the tower that will ask about it.

  Args:
    file: that holds it, or its source.
    own: identity of what made it.
    mine: of what asks.

  Raises:
    EncodedVideoError: they differ.
  """
  (_, _, dtype), (_, _, wanted) = own.rpartition("-"), mine.rpartition("-")
  if dtype != wanted:
    raise EncodedVideoError(
      f"{file} was encoded in {dtype or 'another dtype'}, and this is to be computed in {wanted}; "
      f"give that --dtype, or another file",
      where=str(file),
      found=dtype,
      expected=wanted,
    )
  if own != mine:
    raise EncodedVideoError(
      f"{file} was encoded by another tower or with other settings (its identity is {own[:12]}, "
      f"this checkpoint's {mine[:12]}); encode the video again",
      where=str(file),
      found=own,
      expected=mine,
    )
