"""A model that watches videos and answers: what `xcomp_jax.load` returns, and all commands ask.

  model = xcomp_jax.load("exports/sct")
  video = model.encode("film.mp4")
  print(model.ask(video, "What happens first?"))

`PreparedModel` has what comes before the parameters, `Chat` what comes of a question.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar, Unpack, overload

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xcomp_jax import cli
from xcomp_jax.checkpoints import loading
from xcomp_jax.config import ConfigError, MeshConfig
from xcomp_jax.data.prompt import question_prompt, time_message
from xcomp_jax.data.subtitles import read_subtitles, seen_subtitles
from xcomp_jax.data.video import FrameSample, TailError, frames
from xcomp_jax.inference import encoded_video, several
from xcomp_jax.inference.chat import Answer, Chat, firsts
from xcomp_jax.inference.encoded_video import EncodedVideo, EncodedVideoError
from xcomp_jax.inference.films import Film, on_disk
from xcomp_jax.inference.generate import Sampling, batches, text_slots
from xcomp_jax.inference.places import computing, features_place
from xcomp_jax.inference.prepared import PreparedModel, prepare_model
from xcomp_jax.inference.selection import SCORE_STEP, around_frames
from xcomp_jax.inference.settings import COMPILED, AskSettings, SamplingSettings, Settings, checked
from xcomp_jax.model import vlm
from xcomp_jax.model.qc_comp import from_prompt
from xcomp_jax.parallel.mesh import AXES, check_tensor, make_mesh, param_shardings
from xcomp_jax.progress import progress

LOG = logging.getLogger(__name__)
TOGETHER = 8  # questions that are answered together, at most
Got = TypeVar("Got")


class Pieces(Generic[Got]):
  """An answer that comes piece by piece.

  Iterating, once, gives the text as it is generated; who stops iterating stops the work. `whole` is
  what `ask` would have returned.
  """

  def __init__(self, steps: Generator[Any, None, Got]):
    self._steps = steps
    self._whole: list[Got] = []

  def __iter__(self) -> Iterator[Any]:
    try:
      whole = yield from self._steps
      if whole is not None:  # as it is of work that was left
        self._whole.append(whole)
    finally:
      self._steps.close()

  @property
  def whole(self) -> Got:
    """The answer, or answers: the work is done first, if it is not.

    Raises:
      ConfigError: iterating was left before the end.
    """
    for _ in self:
      pass
    if not self._whole:
      raise ConfigError("the answer was not waited for, so there is none", where="stream")
    return self._whole[0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VideoModel(PreparedModel):
  """A checkpoint with its parameters, which encodes videos and answers questions about them.

  Every method computes as the model's dtype needs it, where its parameters lie. Programs are
  compiled for sizes, not for questions; `warm_up` says which.

  vlm: the parameters.
  """

  vlm: vlm.VLM

  def __repr__(self) -> str:
    cfg = self.cfg
    return (
      f"VideoModel({self.directory}: {cfg.llm.layers} layers, LP-Comp {cfg.lp_comp.keep}, "
      f"{self.dtype})"
    )

  @functools.cached_property
  def identity(self) -> str:
    """Of the tower's weights and settings, by which an encoded video knows what made it."""
    return encoded_video.identity(self.vlm)

  def on(self, device: jax.Device) -> "VideoModel":
    """The same model on another device."""
    graph, state = nnx.split(self.vlm)
    there = dataclasses.replace(self, vlm=nnx.merge(graph, jax.device_put(state, device)))
    vars(there)["identity"] = self.identity  # or it would read all weights again
    return there

  def encode(
    self,
    film: Film | FrameSample,
    *,
    start: float | None = None,
    end: float | None = None,
    frames: int | None = None,
    rate: float | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    decoded: Iterable[np.ndarray] | None = None,
    show_progress: bool = True,
  ) -> EncodedVideo:
    """Decodes and encodes a video: once, for any number of questions.

    Args:
      film: a path of a video, folder of frames, GIF or image; the bytes of a file; an array
        uint8[T, H, W, 3] (RGB); or frames, or (seconds, frame) pairs, one after the other; see
        `films.Film`. Also what `sample` has made of one.
      start: second from which it is looked at.
      end: and until which.
      frames: that are sampled, at most; None: as the model was loaded.
      rate: frames per second, at most; likewise.
      times: seconds of frames in memory, which count from the first frame's, as `start` and the
        moments of answers do; None: one frame per second.
      decoded: the frames of a sample, where they are decoded already.
      show_progress: on stderr.

    Raises:
      FileNotFoundError, VideoError: what is wrong with the video.
      ConfigError: numbers that are out of bounds, or don't fit together.

    Example:
      >>> video = model.encode(np.zeros((16, 48, 48, 3), np.uint8), rate=1, frames=16)
      >>> len(video.times), video.clips
      (16, 2)
    """
    given = {"start": start, "end": end, "frames": frames, "rate": rate, "times": times}
    if isinstance(film, FrameSample) and (
      named := [name for name, value in given.items() if value is not None]
    ):
      raise ConfigError(
        f"a sample is taken already; give {', '.join(named)} where it is made", where=named[0]
      )
    reader = self._within(frames, rate)
    with on_disk(film) as readable:
      sample = reader.sample(readable, start, end, times)
      selector = reader.selector(len(sample.indices))
      clips = selector.frames // selector.clip_frames * len(selector.phases)
      with progress(
        total=clips, desc="encoding", unit="clip", leave=False, disable=not show_progress
      ) as bar:
        try:
          return reader._encode(sample, decoded, bar.update)
        except TailError as error:  # once it is known, the other frames are others
          return reader._encode(reader.shortened(sample, error), None, bar.update)

  def _within(self, frames: int | None, rate: float | None) -> "VideoModel":
    """The model with other limits of sampling."""
    if frames is None and rate is None:
      return self
    given = {"max_frames": frames, "fps": rate}
    wanted = {name: value for name, value in given.items() if value is not None}
    s = checked(dataclasses.replace(self.settings, **wanted))
    s = dataclasses.replace(s, min_frames=min(s.min_frames, s.max_frames))
    there = dataclasses.replace(self, settings=s)
    vars(there)["identity"] = self.identity  # or it would read all weights again
    return there

  def _encode(
    self,
    sample: FrameSample,
    decoded: Iterable[np.ndarray] | None,
    report: Callable[[int], Any],
  ) -> EncodedVideo:
    self.check(len(sample.indices), sample.seconds)
    begun, decoding = time.perf_counter(), 0.0

    def timed() -> Iterator[np.ndarray]:
      nonlocal decoding
      asked = time.perf_counter()
      for frame in frames(sample) if decoded is None else decoded:
        decoding += time.perf_counter() - asked
        yield frame
        asked = time.perf_counter()
      decoding += time.perf_counter() - asked

    asked = sample.request
    film = sample.pictures if len(sample.pictures) else sample.path
    with computing(self.vlm):
      video = encoded_video.encode_video(
        self.vlm,
        timed(),
        sample.times,
        sample.seconds,
        self.source(film, asked.start, asked.end),
        start=float(asked.start or 0.0),
        phases=self.selector(len(sample.indices)).phases,
        tower=self.identity,
        report=report,
      )
    tower = time.perf_counter() - begun - decoding
    return dataclasses.replace(video, spent={"decoding": decoding, "tower": tower})

  def read_video(self, path: str | os.PathLike) -> EncodedVideo:
    """Reads a file that `EncodedVideo.save` wrote.

    Raises:
      EncodedVideoError: it is none, or of another tower; or lacks what the mode of selection needs.
      AnnotationError, ConfigError: a question about it does not fit into the context.
      OSError: it can't be read.
    """
    video = encoded_video.load_video(path, self.vlm, self.identity)
    self.check(len(video.times), video.seconds)
    self._check_phases(video, str(path))
    return video

  def _check_phases(self, video: EncodedVideo, name: str = "") -> None:
    """Sees to it that a video has the clips that the mode of selection needs."""
    wanted = set(self.selector(len(video.times), video.clip_frames).phases)
    if not video.parts and (lacking := wanted - set(video.features)):
      raise EncodedVideoError(
        f"--mode {self.settings.mode} needs clips that start at frame "
        f"{', '.join(map(str, sorted(lacking)))} too, which {name or video.source} does not hold; "
        f"encode the video again",
        where=name or video.source,
        missing=sorted(lacking),
      )

  def _here(self, video: EncodedVideo) -> EncodedVideo:
    """A video whose features lie where the model does, whichever encoded it."""
    first, place = video.features[0][0], features_place(self.vlm)
    if not isinstance(first, jax.Array) or first.sharding.device_set == place.device_set:
      return video
    moved = {phase: jax.device_put(list(clips), place) for phase, clips in video.features.items()}
    return dataclasses.replace(video, features=moved)

  def chat(
    self,
    video: EncodedVideo | Sequence[EncodedVideo],
    *,
    subtitles: str | os.PathLike | None = None,
    keep_rounds: bool = True,
    talk: bool = True,
  ) -> Chat:
    """A conversation about a video, or several, in which questions see those before them; see
    `Chat`.

    subtitles: as in `ask`; they stand before the first question.

    Raises:
      ConfigError, EncodedVideoError, SubtitleError, OSError: see `ask`.
    """
    videos = [video] if isinstance(video, EncodedVideo) else video
    if isinstance(videos, str) or not all(isinstance(one, EncodedVideo) for one in videos):
      raise EncodedVideoError(
        f"{type(video).__name__} is no encoded video; encode it first: model.encode(...)",
        where="video",
      )
    film = several.joined_videos([self._here(one) for one in several.parts_of(videos)])
    self._check_phases(film)
    if film.identity:  # features that no file and no tower made have none
      encoded_video.check_identity(film.source, film.identity, self.identity)
    selector = self.selector(len(film.times), film.clip_frames)
    if film.parts and set(selector.phases) - {0}:
      raise ConfigError(
        f"--mode {self.settings.mode} needs clips that reach from one video into the next; to ask "
        f"about several take --mode aligned, local or global",
        where="--mode",
        value=self.settings.mode,
      )
    return Chat(
      self.vlm,
      self.tokenizer,
      film,
      selector=selector,
      sampling=self.sampling,
      keep_rounds=keep_rounds,
      talk=talk,
      subtitles=_seen(film, subtitles),
    )

  @overload
  def ask(
    self,
    video: EncodedVideo | Sequence[EncodedVideo],
    question: str,
    *,
    subtitles: str | os.PathLike | None = None,
    stream: Literal[False] = False,
    **how: Unpack[SamplingSettings],
  ) -> Answer: ...
  @overload
  def ask(
    self,
    video: EncodedVideo | Sequence[EncodedVideo],
    question: Sequence[str],
    *,
    subtitles: str | os.PathLike | None = None,
    stream: Literal[False] = False,
    **how: Unpack[SamplingSettings],
  ) -> list[Answer]: ...
  @overload
  def ask(
    self,
    video: EncodedVideo | Sequence[EncodedVideo],
    question: str | Sequence[str],
    *,
    subtitles: str | os.PathLike | None = None,
    stream: Literal[True],
    **how: Unpack[SamplingSettings],
  ) -> Pieces: ...
  def ask(
    self,
    video: EncodedVideo | Sequence[EncodedVideo],
    question: str | Sequence[str],
    *,
    subtitles: str | os.PathLike | None = None,
    stream: bool = False,
    **how: Unpack[SamplingSettings],
  ) -> Answer | list[Answer] | Pieces:
    """Answers a question about a video, or several, each by itself.

    Several are answered together, TOGETHER at a time. What scoring them left in the LLM is kept
    until another video is asked.

    Args:
      video: of `encode`; or several, or several images, which are shown one behind the other, see
        `several.joined_videos`. No released checkpoint was tuned so.
      question: one, or several.
      subtitles: a file (.srt, .vtt, .ass) of a single video's; those of the part that was encoded
        are listed before each question, as the release does for LongVideoBench. Frames are scored
        by the question alone, but by all of it in `official` mode, as released.
      stream: return `Pieces` to iterate over: pieces of text of one question, or for several
        questions (number of the question, piece) pairs.
      how: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed`: a value,
        or one for each question; by default as the model was loaded.

    Raises:
      AnnotationError: an empty question.
      ConfigError: a question that is too long for the model, or a value out of bounds; several
        videos with subtitles, or in a mode whose clips reach from one into the next.
      EncodedVideoError: another tower has encoded the video; images together with videos.
      SubtitleError, OSError: the file holds no subtitles, or can't be read.

    Example:
      >>> answer = model.ask(video, "What is shown?", max_new_tokens=4)
      >>> str(answer) == answer.text, len(answer.frames)
      (True, 16)
    """
    questions = [question] if isinstance(question, str) else list(question)
    samplings = self._samplings(len(questions), how)
    chat = self._asked(video, subtitles)
    for one, sampling in zip(questions, samplings, strict=True):
      chat.check(one, sampling)
    if isinstance(question, str):
      pieces = Pieces(_only(chat.stream_apart(questions, samplings)))
    else:
      pieces = Pieces(_together(chat, questions, samplings))
    return pieces if stream else pieces.whole

  def _asked(
    self,
    video: EncodedVideo | Sequence[EncodedVideo],
    subtitles: str | os.PathLike | None = None,
  ) -> Chat:
    """The videos' chat, kept while no others are asked; with these subtitles."""
    videos = [video] if isinstance(video, EncodedVideo) else list(video)
    # read and written once: other threads may ask about other videos; two are equal if they are the
    # same one
    before, chat = vars(self).get("_kept", (None, None))
    if chat is None or before != videos:
      chat = None
      vars(self).pop("_kept", None)  # its memory first
      chat = self.chat(video, talk=False)
      vars(self)["_kept"] = videos, chat
    if subtitles is None:
      return chat
    chat = copy.copy(chat)  # no part of what is kept depends on them
    chat.subtitles = _seen(chat.video, subtitles)
    return chat

  def _samplings(self, questions: int, how: SamplingSettings) -> list[Sampling]:
    """How each of so many questions is answered.

    Raises:
      ConfigError: a value that is out of bounds; or several values, not one for each question.
    """
    columns: dict[str, list[Any]] = {}
    for name, value in how.items():
      each = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
      values = list(value) if each else [value] * questions
      if len(values) != questions:
        raise ConfigError(
          f"{name} has {len(values)} values for {questions} questions; give one value, or one for "
          f"each",
          where=name,
          value=value,
        )
      columns[name] = values
    if unknown := sorted(set(columns) - SamplingSettings.__annotations__.keys()):
      raise ConfigError(
        f"{', '.join(unknown)}: an answer has no such setting; it has "
        f"{', '.join(SamplingSettings.__annotations__)}",
        where=unknown[0],
      )
    rows = [{name: values[i] for name, values in columns.items()} for i in range(questions)]
    return [
      self.sampling
      if not row
      else checked(dataclasses.replace(self.settings, **row)).sampling(self.tokenizer.eos)
      for row in rows
    ]

  def warm_up(
    self,
    frames: int | None = None,
    questions: int = 1,
    *,
    text: int = 64,
    new_tokens: int | None = None,
  ) -> None:
    """Compiles what encoding and asking need, so that nobody waits for it later.

    It is for `ask`; a conversation of `chat` has programs of its own.

    Videos share their programs with those that are padded to as many frames, and all shorter
    questions, smaller batches and ways of sampling are served, too; `generate` says which sizes of
    texts, answers and batches share one.

    Args:
      frames: that are sampled of a video; None: as many as the model was loaded for, at most.
      questions: that are asked together, at most.
      text: tokens of the longest question, about.
      new_tokens: of an answer, at most; None: as the model was loaded.

    Raises:
      ConfigError: numbers that are out of bounds, or don't fit together.
    """
    if not (isinstance(questions, int) and isinstance(text, int) and questions > 0 < text):
      raise ConfigError("questions and text are numbers from 1 on", where="questions")
    # a frame a second, as frames in memory have by themselves
    model = self._within(self.settings.max_frames if frames is None else frames, 1.0)
    size = self.cfg.vision.image_size
    still = np.broadcast_to(np.zeros((), np.uint8), (model.settings.max_frames, size, size, 3))
    video = model.encode(still, show_progress=False)
    how = SamplingSettings() if new_tokens is None else SamplingSettings(max_new_tokens=new_tokens)
    most = min(questions, TOGETHER)
    together = sorted({most, *(1 << n for n in range(most.bit_length()))})
    for asked in model._of_every_size(video, text):
      for rows in together:
        model.ask(video, [asked] * rows, **how)

  def _of_every_size(self, video: EncodedVideo, text: int) -> list[str]:
    """Questions of up to so many tokens, one of every size that texts are padded to."""
    found: dict[tuple[int, int], str] = {}
    selector = self.selector(len(video.times))
    message = time_message(video.seconds, len(video.times))
    for words in [*range(1, text, SCORE_STEP // 2), text]:  # none of the sizes is passed over
      asked = "a" + " a" * (words - 1)
      prompt = question_prompt(self.tokenizer, asked, message)
      _, after = around_frames(prompt)
      scores = (
        len(from_prompt(prompt, selector.config).text) if selector.config and selector.plan else 0
      )
      found.setdefault((text_slots(len(after)), text_slots(scores, SCORE_STEP)), asked)
    return list(found.values())


def _seen(video: EncodedVideo, subtitles: str | os.PathLike | None) -> str:
  """The subtitles of what was encoded, one per line.

  Raises:
    ConfigError: several videos. SubtitleError, OSError: see `read_subtitles`.
  """
  if subtitles is None:
    return ""
  if video.parts:
    raise ConfigError("subtitles go with one video, not with several", where="subtitles")
  seen = seen_subtitles(read_subtitles(subtitles), video.seconds, video.start)
  if not seen:
    LOG.warning("%s: none of its subtitles is shown in what was encoded", subtitles)
  return seen


def _only(steps: Generator[list[str], None, list[Answer]]) -> Generator[str, None, Answer]:
  (answer,) = yield from firsts(steps)
  return answer


def _together(
  chat: Chat, questions: Sequence[str], samplings: Sequence[Sampling]
) -> Generator[tuple[int, str], None, list[Answer]]:
  """Answers questions, a batch at a time, in pieces of text with their question's number."""
  answers: list[Answer] = []
  for part in batches(list(zip(questions, samplings, strict=True)), TOGETHER):
    steps = chat.stream_apart([q for q, _ in part], [s for _, s in part])
    first = len(answers)
    with contextlib.closing(steps):
      while True:
        try:
          piece = next(steps)
        except StopIteration as end:
          answers += end.value
          break
        yield from ((first + i, text) for i, text in enumerate(piece) if text)
  return answers


def local_mesh(fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh of all devices of this process, with a copy of the parameters for every fsdp * tensor of
  them.

  Raises:
    ConfigError: fsdp * tensor does not divide them.
  """
  devices = jax.local_devices()
  if min(fsdp, tensor) < 1 or len(devices) % (fsdp * tensor):
    raise ConfigError(
      f"fsdp {fsdp} times tensor {tensor} does not divide the {len(devices)} devices of this "
      "process",
      where="mesh",
      devices=len(devices),
    )
  return make_mesh(MeshConfig(-1, fsdp, tensor, 1), devices)


def mesh_of_command(args: argparse.Namespace) -> Mesh | None:
  """The mesh that --fsdp and --tensor ask for; None: neither does.

  Raises:
    ConfigError: see `local_mesh`; or --devices, which has a whole model on each.
  """
  if args.fsdp * args.tensor == 1:
    return None
  if getattr(args, "devices", None) is not None:
    raise ConfigError(
      "--devices has a whole model on each device, --fsdp and --tensor a part: give either",
      where="--devices",
    )
  return local_mesh(args.fsdp, args.tensor)


def load_prepared(
  prepared: PreparedModel, *, device: jax.Device | None = None, mesh: Mesh | None = None
) -> VideoModel:
  """A prepared model with its parameters.

  Args:
    prepared: of `prepare_model`.
    device: that holds them; None: `jax.default_device`, if it is set.
    mesh: that they are split over, by its axes `fsdp` and `tensor`, such as `local_mesh` makes.
      Clips are split over all of its devices, rounds of scoring and questions over `data` and
      `fsdp`. None, and no device: every GPU or TPU of this process has a copy.

  Raises:
    CheckpointError: see `loading.load_model`.
    ConfigError: both a device and a mesh, or heads that `tensor` can't split.
  """
  if device is not None and mesh is not None:
    raise ConfigError("give a device, or a mesh, not both", where="mesh")
  chosen = device or jax.config.jax_default_device  # ty: ignore[missing-attribute]
  several = len(jax.local_devices()) > 1 and jax.default_backend() != "cpu"  # one chip, in pieces
  if mesh is None and chosen is None and several:
    mesh = local_mesh()
  split = None
  if mesh is not None:
    if set(getattr(mesh, "axis_names", ())) != set(AXES):
      raise ConfigError(
        f"a mesh has the axes {', '.join(AXES)}, as xcomp_jax.local_mesh makes it", where="mesh"
      )
    check_tensor(mesh.shape["tensor"], prepared.cfg)
    split = param_shardings(nnx.state(loading.abstract(prepared.cfg)), mesh)
  with contextlib.nullcontext() if device is None else jax.default_device(device):
    model = loading.load_model(
      prepared.directory, prepared.cfg, dtype=prepared.dtype, shardings=split
    )
  return VideoModel(
    **{f.name: getattr(prepared, f.name) for f in dataclasses.fields(prepared)}, vlm=model
  )


def load(
  checkpoint: str | os.PathLike,
  *,
  device: jax.Device | None = None,
  mesh: Mesh | None = None,
  compilation_cache: str | None = None,
  **settings: Unpack[Settings],
) -> VideoModel:
  """Reads a checkpoint, to encode videos and ask about them.

  Args:
    checkpoint: a directory (VideoChat-Flash's safetensors, or an export), or a hub id.
    device: that holds its parameters; see `load_prepared`.
    mesh: that they are split over.
    compilation_cache: folder of compiled programs, for the next time; "": none; None:
      JAX_COMPILATION_CACHE_DIR, else ~/.cache/xcomp_jax.
    settings: any of `AskSettings`, with the defaults and bounds of the options of `ask`, such as
      `dtype`, `select`, `mode`, `keep`, `schedule`, `context`.

  Raises:
    CheckpointError: no checkpoint, a damaged one, or of something else.
    ConfigError: a setting that is out of bounds, or does not fit the checkpoint.
    OSError: it can't be read.

  Example:
    >>> model = load(tiny, select=0, dtype="float32")
    >>> model.cfg.tokens_per_frame
    16
  """
  known = {field.name for field in dataclasses.fields(AskSettings)}
  if unknown := sorted(set(settings) - known):
    raise ConfigError(
      f"{', '.join(unknown)}: there is no such setting; there are {', '.join(sorted(known))}",
      where=unknown[0],
    )
  cli.keep_compiled(compilation_cache, COMPILED)
  # dtype and kernels are chosen for the device that computes
  with contextlib.nullcontext() if device is None else jax.default_device(device):
    prepared = prepare_model(AskSettings(checkpoint=os.fspath(checkpoint), **settings))
  return load_prepared(prepared, device=device, mesh=mesh)
