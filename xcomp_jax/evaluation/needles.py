r"""Needle in a haystack: pictures hidden in a long video, frames against depth, as a heat map.

  python -m xcomp_jax.needles --checkpoint exports/sct --out DIR \
      --needles niah-coco-singlehop_20.json --images DIR --haystack video_haystack.mkv
  python -m xcomp_jax.needles --checkpoint demo/export --out DIR --synthetic 8 \
      --frames 1024 2048 4096

The first is VideoChat-Flash's protocol: one picture per question, or (its multi-hop file) a chain
of pictures spread over the video, each pointing to the next. The second makes its own: a scene of
`xcomp_jax.world` between scenes that show nothing. As there, a picture becomes a clip of its own,
and the video is cut and joined behind the tower, where a frame is 16 tokens: so the haystack is
encoded once. By default one frame is selected, every frame being scored 8 times (the paper's
Figure A); `--keep none` gives QC-Comp on a model that does not compress, `--select 0` no
selection. A run that was stopped continues.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from xcomp_jax import cli, files
from xcomp_jax.config import ConfigError
from xcomp_jax.data import prompt, video
from xcomp_jax.errors import XCompError
from xcomp_jax.evaluation import benchmarks
from xcomp_jax.evaluation.runner import Answers, parse_share
from xcomp_jax.files import expanduser
from xcomp_jax.inference import encoded_video, generate
from xcomp_jax.inference.selection import frame_selector, select_frames
from xcomp_jax.inference.video_model import (
  COMPILED,
  FRAMES,
  VideoModel,
  add_options,
  fault,
  prepare_model,
  settings_of,
)
from xcomp_jax.inputs import number, quoted, read_json
from xcomp_jax.model.vlm import VLM
from xcomp_jax.progress import progress
from xcomp_jax.synthetic import world

DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


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
  load = functools.partial(
    video.load_frames,
    size=size,
    max_frames=8,
    min_frames=8,
    fps=1.0,
    clip_frames=8,
    style="ask",
    read_type="img",
  )
  out, items = [], read_json(file, NeedleError)
  if not isinstance(items, list):
    raise NeedleError(f"{file}: expected a list of needles, not {quoted(items, 60)}")
  for i, item in enumerate(items):
    try:
      if "images" in item:
        questions = {
          "caption": (item["question1"], item["answer1"]),
          "question": (item["question2"], item["answer2"]),
        }
        names = item["images"]
      else:
        questions, names = {"question": (item["question"], item["answer"])}, [item["image"]]
      if not all(isinstance(text, str) for text in (*sum(questions.values(), ()), *names)):
        raise TypeError("something that is no text")
    except (KeyError, TypeError) as error:
      wanted = "image, question, answer, or images, question1, answer1, question2, answer2"
      raise NeedleError(f"{file}, needle {i}: {error!r}; expected {wanted}") from error
    try:
      pictures = [load(images / name).frames for name in names]
      out.append(
        Needle(
          tuple(
            np.broadcast_to(picture, (clip_frames, *picture.shape[1:])) for picture in pictures
          ),
          questions,
        )
      )
    except BaseException as error:  # costs the questions about this needle
      out.append(Needle((), questions, fault(error)))
  return out


def synthetic(count: int, seed: int) -> list[Needle]:
  """Scenes of the synthetic world that show all that is asked about: a moving shape and a digit."""
  out = []
  for i in range(count):
    rng = np.random.default_rng((seed, i))
    (scene,) = world.scenes(rng, 1)
    out.append(
      Needle((world.render(scene),), {kind: world.turn([scene], kind) for kind in world.QUESTIONS})
    )
  return out


def synthetic_hay(clips: int, seed: int) -> Iterator[np.ndarray]:
  """Scenes that show nothing: uint8[8, 96, 96, 3] each."""
  for i in range(clips):
    yield world.render(
      world.Scene(None, None, None, None, int(np.random.default_rng((seed, 1, i)).integers(2**31)))
    )


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


def per_frame(
  reader: VideoModel, model: VLM, clips: Iterator[np.ndarray]
) -> Float[np.ndarray, "T N D"]:
  """Features of clips of pictures, cut into frames of 16 tokens."""
  size = reader.cfg.vision.image_size
  features = np.stack(
    list(encoded_video.encode_in_chunks(model, (video.resize(clip, size) for clip in clips)))
  )
  return features.reshape(-1, reader.cfg.tokens_per_frame, features.shape[-1])


def haystack(
  reader: VideoModel, model: VLM, file: str | None, frames: int, seed: int
) -> Float[np.ndarray, "T N D"]:
  """Features of a video, sampled at --fps, or of synthetic scenes.

  Raises:
    VideoError, FileNotFoundError: what is wrong with the video.
  """
  F = reader.cfg.clip_frames

  def read(clips: Iterator[np.ndarray], count: int) -> np.ndarray:
    with progress(total=count, desc="haystack", unit="clip", leave=False) as bar:
      return per_frame(reader, model, (clip for clip in clips if bar.update() or True))

  def film(sample: video.FrameSample) -> np.ndarray:
    decoded, count = video.frames(sample), len(sample.indices) // F
    return read((np.stack([next(decoded) for _ in range(F)]) for _ in range(count)), count)

  if file is None:
    return read(synthetic_hay(-(-frames // F), seed), -(-frames // F))
  sample = reader.sample(file)
  try:
    return film(sample)
  except video.TailError as error:
    return film(reader.shortened(sample, error))


def ask_needle(
  reader: VideoModel,
  model: VLM,
  film: encoded_video.EncodedVideo,
  text: str,
  message: str,
  rounds: dict | None,
) -> tuple[str, np.ndarray]:
  """The answer, and which frames gave it."""
  question = prompt.question_prompt(reader.tokenizer, text, message)
  # The official bias counts the tokens of a message that may be missing here.
  selector = frame_selector(len(film.times), film.clip_frames, reader.select).without_bias()
  (selection,) = select_frames(model, film, [question], selector, rounds=rounds)
  visual = film.features[0][selection.frames]
  (tokens,) = generate.generate(model, generate.as_batch(question, visual, 1), reader.sampling)
  return reader.tokenizer.decode(tokens).strip(), selection.frames


@dataclasses.dataclass(frozen=True)
class NeedleCell:
  """One needle in one haystack. frames: of the whole. depth: 0 to 1. needle: its number. pictures:
  a hash of them, "" if they can't be read.
  """

  frames: int
  depth: float
  needle: int
  pictures: str = ""

  def key(self, kind: str) -> str:
    """Names a question's answer, which is another one about other pictures."""
    return f"{self.frames}/{self.depth:g}/{self.needle}/{kind}/{self.pictures}"


def search(
  reader: VideoModel,
  needles: Sequence[Needle],
  cells: Sequence[NeedleCell],
  answers: Answers,
  film: str | None,
  seed: int,
) -> None:
  """Asks what has no answer yet.

  Args:
    reader: the checkpoint.
    needles: all of them.
    cells: to be asked about.
    answers: where they go.
    film: the haystack; None: a synthetic one.
    seed: of that.

  Raises:
    VideoError, FileNotFoundError, CheckpointError: what stops everything.
  """

  def unasked(c):
    return [
      kind
      for kind in needles[c.needle].questions
      if "answer" not in answers.lines.get(c.key(kind), {})
    ]

  todo = [c for c in cells if unasked(c)]
  if not todo:
    return
  with (
    reader.precision(),
    progress(
      total=len(cells), initial=len(cells) - len(todo), unit="needle", desc="needles"
    ) as bar,
  ):
    model = reader.load()
    hay = haystack(reader, model, film, max(c.frames for c in cells), seed)
    hidden: dict[int, list[np.ndarray]] = {}  # features of a needle, per hop
    for c in todo:
      for line in _asked(reader, model, needles[c.needle], hidden, hay, c, unasked(c), film):
        answers.add(line)
      bar.update()


def _asked(
  reader: VideoModel,
  model: VLM,
  needle: Needle,
  hidden: dict[int, list[np.ndarray]],
  hay: np.ndarray,
  c: NeedleCell,
  kinds: Sequence[str],
  film: str | None,
) -> Iterator[dict[str, Any]]:
  """The lines of a cell's questions of some kinds. What can't be asked counts as wrong."""

  def line(kind):
    return {"key": c.key(kind), **dataclasses.asdict(c), "kind": kind}

  F, rate = reader.cfg.clip_frames, reader.settings.fps if film else world.FPS
  done = 0
  try:
    if needle.fault:
      raise NeedleError(needle.fault)
    if c.needle not in hidden:
      hidden[c.needle] = np.split(per_frame(reader, model, iter(needle.clips)), len(needle.clips))
    starts = needle_places(c.frames, len(needle.clips), F, c.depth)
    features = hide(hay, hidden[c.needle], c.frames, starts)
    seconds = c.frames / rate
    watched = encoded_video.EncodedVideo(
      features={0: features}, times=np.arange(c.frames) / rate, seconds=seconds
    )
    message = "" if film else prompt.time_message(seconds, c.frames)
    # of a large model and many rounds they would not fit into a device
    rounds = None if film else {}
    for kind in kinds:
      text, letter = needle.questions[kind]
      answer, kept = ask_needle(reader, model, watched, text, message, rounds)
      given = (
        answer.replace("(", "").replace(")", "").upper() if film else benchmarks.any_letter(answer)
      )
      found = bool(((kept >= starts[-1]) & (kept < starts[-1] + F)).any())
      yield line(kind) | {
        "answer": answer,
        "right": given == letter,
        "found": found,
        "kept": len(kept),
      }
      done += 1
  except BaseException as error:  # costs the questions about this needle, not those about others
    text = needle.fault or fault(error)
    for kind in kinds[done:]:
      yield line(kind) | {"error": text, "right": False, "found": False}


def failed(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Needles that could not be asked about: {"needle", "error", "questions"}."""
  counts = collections.Counter((line["needle"], line["error"]) for line in lines if "error" in line)
  return [
    {"needle": needle, "error": error, "questions": n} for (needle, error), n in counts.items()
  ]


def summary(lines: Sequence[Mapping[str, Any]], row: str) -> dict[str, Any]:
  """Cells of the heat map: percent right, and how often a frame of the (last) needle was among
  those kept.

  lines: of `search`. row: what goes downwards, "depth" or "kind".
  """
  cells = []
  for n, at in sorted({(line["frames"], line[row]) for line in lines}):
    here = [line for line in lines if (line["frames"], line[row]) == (n, at)]

    def share(name, here=here):
      return 100 * sum(line[name] for line in here) / len(here)

    cells.append(
      {
        "frames": n,
        row: at,
        "right": share("right"),
        "found": share("found"),
        "questions": len(here),
      }
    )

  def mean(name):
    return sum(line[name] for line in lines) * 100 / len(lines)

  return {
    "right": mean("right"),
    "found": mean("found"),
    "questions": len(lines),
    "row": row,
    "cells": cells,
  }


def plot_needles(found: Mapping[str, Any], title: str, file: pathlib.Path) -> None:
  """The heat map, as PNG: frames to the right, depth (or the kind of question) downwards; answers
  left, selections right.
  """
  from matplotlib.figure import Figure

  frames = sorted({cell["frames"] for cell in found["cells"]})
  rows = sorted({cell[found["row"]] for cell in found["cells"]})

  def label(at):
    return f"{at:.0%}" if found["row"] == "depth" else at

  figure = Figure(
    figsize=(2.2 + 1.1 * max(4, 2 * len(frames)), 1.6 + 0.5 * max(3, len(rows))),
    layout="constrained",
  )
  figure.suptitle(title, fontsize=11)
  shown = {"right": "answered rightly", "found": "needle among kept frames"}
  for axes, (name, words) in zip(figure.subplots(1, 2, sharey=True), shown.items()):
    values = np.full((len(rows), len(frames)), np.nan)
    for cell in found["cells"]:
      values[rows.index(cell[found["row"]]), frames.index(cell["frames"])] = cell[name]
    image = axes.imshow(values, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    for (y, x), value in np.ndenumerate(values):
      if not np.isnan(value):
        axes.text(
          x,
          y,
          f"{value:.0f}",
          ha="center",
          va="center",
          fontsize=9,
          color="white" if value > 60 else "black",
        )
    axes.set_title(f"{words}: {found[name]:.1f}%", fontsize=10)
    axes.set_xticks(range(len(frames)), [f"{n:,}" for n in frames])
    axes.set_yticks(range(len(rows)), [label(at) for at in rows])
    axes.set_xlabel("frames")
  figure.axes[0].set_ylabel("depth of the needle" if found["row"] == "depth" else "question")
  figure.colorbar(image, ax=figure.axes, label="percent", shrink=0.9)
  with files.replacing(file) as temporary:
    figure.savefig(temporary, dpi=130, format="png")


def hidden_things(args: argparse.Namespace, reader: VideoModel) -> list[Needle]:
  """The needles that the arguments ask for.

  Raises:
    NeedleError, ConfigError, OSError: arguments that don't go together, by name; a file that can't
      be read.
  """
  F = reader.cfg.clip_frames
  if args.synthetic is None:
    size = reader.cfg.vision.image_size
    return read_needles(pathlib.Path(args.needles), pathlib.Path(args.images), F, size)[
      : args.limit
    ]
  if world.FRAMES != F:
    raise ConfigError(f"--clip-frames {F}: a synthetic scene is a clip of {world.FRAMES} frames")
  return synthetic(args.synthetic, args.seed)


def check_arguments(args: argparse.Namespace) -> None:
  """Arguments that can be judged by themselves.

  Raises:
    NeedleError: which one is wrong.
  """
  if (args.synthetic is None) == (args.needles is None) or (
    args.needles and not (args.images and args.haystack)
  ):
    raise NeedleError(
      "give --synthetic COUNT, or --needles FILE with --images DIR and --haystack VIDEO"
    )
  if importlib.util.find_spec("matplotlib") is None:
    raise NeedleError("the heat map needs matplotlib: pip install 'xcomp_jax[plot]'")


def run_needles(args: argparse.Namespace) -> dict[str, Any] | None:
  """The command's work; None where other shares are not done yet.

  Raises:
    NeedleError, VideoError, CheckpointError, ConfigError, AnswersError, OSError: bad arguments, by
    name.
  """
  check_arguments(args)
  files.apart(
    {"--out": args.out},
    {f"--{name}": getattr(args, name) for name in ("needles", "images", "haystack", "checkpoint")},
  )
  cli.keep_compiled(args.compilation_cache, COMPILED)
  share, reader, out = (
    parse_share(args.share),
    prepare_model(settings_of(args)),
    pathlib.Path(args.out),
  )
  print(reader.introduce(), file=sys.stderr)
  reader.check_clips()
  needles = hidden_things(args, reader)
  if not needles:
    raise NeedleError(f"{args.needles} holds no needle, or --limit {args.limit} leaves none")
  most = max(len(needle.clips) for needle in needles)
  if not most:
    raise NeedleError(f"no needle's pictures can be read, such as: {needles[0].fault}")
  if bad := [n for n in args.frames if n % 8 or n < most * reader.cfg.clip_frames]:
    raise NeedleError(
      f"--frames {bad[0]}: a multiple of 8, and at least the {most * reader.cfg.clip_frames} of "
      f"the needles"
    )
  for frames in args.frames:
    reader.check(frames, float(frames))
  depths, row = (sorted(set(args.depths)), "depth") if most == 1 else ([0.0], "kind")

  def hashed(content):
    return hashlib.blake2b(content, digest_size=8).hexdigest()

  pictures = [
    hashed(b"".join(clip.tobytes() for clip in needle.clips)) if needle.clips else ""
    for needle in needles
  ]
  cells = [
    NeedleCell(n, depth, i, pictures[i])
    for n in args.frames
    for depth in depths
    for i in range(len(needles))
  ]
  source = reader.source(args.haystack) if args.haystack else f"synthetic, seed {args.seed}"
  answers = Answers(
    out,
    reader,
    share,
    about={
      "haystack": source,
      "needles": hashed(repr([needle.questions for needle in needles]).encode()),
    },
  )
  with answers:
    search(reader, needles, cells[share[0] :: share[1]], answers, args.haystack, args.seed)
  answers.read()
  keys = [c.key(kind) for c in cells for kind in needles[c.needle].questions]
  if left := sum(key not in answers.lines for key in keys):
    print(f"{left} of {len(keys)} questions are left for other shares")
    return None
  lines = [answers.lines[key] for key in keys]
  found: dict[str, Any] = summary(lines, row) | {"failed": failed(lines)}
  files.write_json(
    out / "results.json",
    found | {"made_with": answers.settings, "sessions": answers.sessions()},
    indent=2,
  )
  plot_needles(found, title(reader, found["questions"]), out / "heatmap.png")
  return found


def title(reader: VideoModel, questions: int) -> str:
  """What a heat map is of."""
  select = reader.select
  how = (
    "all frames"
    if select is None
    else f"{select.frames} frame{'s' * (select.frames != 1)} selected, {select.mode}"
  )
  how += " by the answer's row" if select and select.rows == "answer" else ""
  how += (
    "" if select is None else f", each scored {select.repeat} times" if select.repeat > 1 else ""
  )
  return (
    f"{pathlib.Path(reader.settings.checkpoint).name}: LP-Comp {reader.cfg.lp_comp.keep}, "
    f"{how}; {questions} questions"
  )


def main(argv: Sequence[str] | None = None) -> None:
  """The command; an error is one line on stderr and exit code 1."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.needles", description=__doc__.splitlines()[0]
  )
  add = parser.add_argument
  add(
    "--out",
    type=expanduser,
    required=True,
    help="folder of answers, results.json and heatmap.png; a run that is there is continued",
  )
  add(
    "--needles",
    type=expanduser,
    help="VideoChat-Flash's file, niah-coco-singlehop_20.json or niah-coco-multihop-100.json",
  )
  add("--images", type=expanduser, help="folder of its pictures")
  add(
    "--haystack",
    type=expanduser,
    help="video that they are hidden in; taken from its beginning again where it is too short",
  )
  add(
    "--synthetic", type=number(1, 100_000, int), help="make so many needles, and the haystack too"
  )
  add(
    "--frames",
    type=number(8, FRAMES, int),
    nargs="+",
    default=list(range(1000, 10001, 1000)),
    help="of the whole; multiples of 8",
  )
  add(
    "--depths",
    type=number(0.0, 1.0, float),
    nargs="+",
    default=DEPTHS,
    help="where a single needle lies, from 0 to 1",
  )
  add("--limit", type=number(1, 100_000, int), help="only the first needles, for a trial")
  add("--share", help="i/n: every n-th needle from the i-th on; default: by JAX's processes")
  add_options(parser)
  parser.set_defaults(
    select=1, repeat=8, mode="official", fps=1.0, max_frames=10000, max_new_tokens=1
  )
  args = parser.parse_args(argv)
  with cli.command(interrupted="interrupted; the same command continues"):
    found = run_needles(args)
    if found:
      shares = f"right {found['right']:.1f}%, needle among the kept frames {found['found']:.1f}%"
      print(f"{shares} ({found['questions']} questions): {args.out}/heatmap.png")
    if found and found["failed"]:
      for needle in found["failed"]:
        print(
          f"needle {needle['needle']}: {needle['questions']} questions failed: {needle['error']}",
          file=sys.stderr,
        )
      print(
        f"error: {sum(f['questions'] for f in found['failed'])} of {found['questions']} questions "
        f"could not be asked, and count as wrong",
        file=sys.stderr,
      )
      sys.exit(1)
