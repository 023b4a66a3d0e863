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
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from xcomp_jax import cli, files
from xcomp_jax.config import ConfigError
from xcomp_jax.data import prompt
from xcomp_jax.evaluation.answers import Answers, end_if_failed, failures, parse_share
from xcomp_jax.evaluation.haystacks import (
  Needle,
  NeedleError,
  haystack,
  hide,
  needle_places,
  per_frame,
  read_needles,
  synthetic,
)
from xcomp_jax.evaluation.protocol import any_letter
from xcomp_jax.inference import generate
from xcomp_jax.inference.encoded_video import FRAMES, EncodedVideo
from xcomp_jax.inference.places import computing
from xcomp_jax.inference.prepared import PreparedModel, fault, prepare_model
from xcomp_jax.inference.selection import frame_selector, select_frames
from xcomp_jax.inference.settings import COMPILED, add_options, settings_of
from xcomp_jax.inference.video_model import VideoModel, load_prepared, mesh_of_command
from xcomp_jax.inputs import number
from xcomp_jax.progress import progress
from xcomp_jax.synthetic import world

Ask = Callable[..., tuple[str, np.ndarray]]  # as `ask_needle`


def ask_needle(
  model: VideoModel,
  film: EncodedVideo,
  text: str,
  message: str,
  rounds: dict | None,
) -> tuple[str, np.ndarray]:
  """The answer, and which frames gave it."""
  question = prompt.question_prompt(model.tokenizer, text, message)
  # The official bias counts the tokens of a message that may be missing here.
  selector = frame_selector(len(film.times), film.clip_frames, model.select).without_bias()
  with computing(model.vlm):
    (selection,) = select_frames(model.vlm, film, [question], selector, rounds=rounds)
    visual = [film.features[0][i] for i in selection.frames]
    batch = generate.as_batch(question, visual, 1)
    (tokens,) = generate.generate(model.vlm, batch, model.sampling)
  return model.tokenizer.decode(tokens).strip(), selection.frames


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


class NeedleSearch:
  """Needles, and a haystack in which they are hidden one after the other.

  film: the haystack's file; None: a synthetic one. ask: with another one, tests do less.
  """

  def __init__(
    self,
    model: VideoModel,
    needles: Sequence[Needle],
    hay: Float[np.ndarray, "T N D"],
    film: str | None,
    ask: Ask = ask_needle,
  ):
    self.model, self.needles, self.hay, self.film = model, needles, hay, film
    self.ask_needle = ask
    self.rate = model.settings.fps if film else world.FPS
    self.features = functools.cache(self._features)

  def _features(self, number: int) -> list[Float[np.ndarray, "F N D"]]:
    """Features of a needle, per hop."""
    clips = self.needles[number].clips
    return np.split(per_frame(self.model, iter(clips)), len(clips))

  def ask(self, c: NeedleCell, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The lines of a cell's questions of some kinds. What can't be asked counts as wrong."""
    needle, left = self.needles[c.needle], list(kinds)

    def line(kind):
      return {"key": c.key(kind), **dataclasses.asdict(c), "kind": kind}

    try:
      if needle.fault:
        raise NeedleError(needle.fault)
      starts = needle_places(c.frames, len(needle.clips), self.model.cfg.clip_frames, c.depth)
      watched = EncodedVideo(
        features={0: hide(self.hay, self.features(c.needle), c.frames, starts)},
        times=np.arange(c.frames) / self.rate,
        seconds=c.frames / self.rate,
      )
      message = "" if self.film else prompt.time_message(watched.seconds, c.frames)
      # of a large model and many rounds they would not fit into a device
      rounds = None if self.film else {}
      while left:
        text, letter = needle.questions[left[0]]
        answer, kept = self.ask_needle(self.model, watched, text, message, rounds)
        # by the protocol of the film, or of this package
        given = re.sub("[()]", "", answer).upper() if self.film else any_letter(answer)
        last = (kept >= starts[-1]) & (kept < starts[-1] + self.model.cfg.clip_frames)
        yield line(left.pop(0)) | {
          "answer": answer,
          "right": given == letter,
          "found": bool(last.any()),
          "kept": len(kept),
        }
    except BaseException as error:  # costs the questions about this needle, not those about others
      wrong = {"error": needle.fault or fault(error), "right": False, "found": False}
      yield from (line(kind) | wrong for kind in left)


def search(
  reader: PreparedModel,
  needles: Sequence[Needle],
  cells: Sequence[NeedleCell],
  answers: Answers,
  film: str | None,
  seed: int,
  ask: Ask,
  mesh: Mesh | None = None,
) -> None:
  """Asks what has no answer yet.

  Args:
    reader: the checkpoint.
    needles: all of them.
    cells: to be asked about.
    answers: where they go.
    film: the haystack; None: a synthetic one.
    seed: of that.
    ask: see `NeedleSearch`.
    mesh: see `load_prepared`.

  Raises:
    VideoError, FileNotFoundError, CheckpointError: what stops everything.
  """
  unasked = {
    c: [
      kind
      for kind in needles[c.needle].questions
      if "answer" not in answers.lines.get(c.key(kind), {})
    ]
    for c in cells
  }
  todo = {c: kinds for c, kinds in unasked.items() if kinds}
  if not todo:
    return
  done = len(cells) - len(todo)
  with progress(total=len(cells), initial=done, unit="needle", desc="needles") as bar:
    model = load_prepared(reader, mesh=mesh)
    hay = haystack(model, film, max(c.frames for c in cells), seed)
    searching = NeedleSearch(model, needles, hay, film, ask)
    for c, kinds in todo.items():
      for line in searching.ask(c, kinds):
        answers.add(line)
      bar.update()


def summary(lines: Sequence[Mapping[str, Any]], row: str) -> dict[str, Any]:
  """Cells of the heat map: percent right, and how often a frame of the (last) needle was among
  those kept.

  lines: of `search`. row: what goes downwards, "depth" or "kind".
  """

  def shares(of):
    right, found = (100 * sum(line[name] for line in of) / len(of) for name in ("right", "found"))
    return {"right": right, "found": found, "questions": len(of)}

  places = collections.defaultdict(list)
  for line in lines:
    places[line["frames"], line[row]].append(line)
  cells = [{"frames": n, row: at, **shares(places[n, at])} for n, at in sorted(places)]
  return {**shares(lines), "row": row, "cells": cells}


def plot_needles(found: Mapping[str, Any], title: str, file: pathlib.Path) -> None:
  """The heat map, as PNG: frames to the right, depth (or the kind of question) downwards; answers
  left, selections right.
  """
  from matplotlib.figure import Figure

  by_depth = found["row"] == "depth"
  frames = sorted({cell["frames"] for cell in found["cells"]})
  rows = sorted({cell[found["row"]] for cell in found["cells"]})
  figure = Figure(
    figsize=(2.2 + 1.1 * max(4, 2 * len(frames)), 1.6 + 0.5 * max(3, len(rows))),
    layout="constrained",
  )
  figure.suptitle(title, fontsize=11)
  shown = {"right": "answered rightly", "found": "needle among kept frames"}
  for axes, (name, words) in zip(figure.subplots(1, 2, sharey=True), shown.items()):
    values = np.full((len(rows), len(frames)), np.nan)
    for cell in found["cells"]:
      y, x = rows.index(cell[found["row"]]), frames.index(cell["frames"])
      values[y, x] = cell[name]
      color = "white" if cell[name] > 60 else "black"
      axes.text(x, y, f"{cell[name]:.0f}", ha="center", va="center", fontsize=9, color=color)
    image = axes.imshow(values, vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    axes.set_title(f"{words}: {found[name]:.1f}%", fontsize=10)
    axes.set_xticks(range(len(frames)), [f"{n:,}" for n in frames])
    axes.set_yticks(range(len(rows)), [f"{at:.0%}" if by_depth else at for at in rows])
    axes.set_xlabel("frames")
  figure.axes[0].set_ylabel("depth of the needle" if by_depth else "question")
  figure.colorbar(image, ax=figure.axes, label="percent", shrink=0.9)
  with files.replacing(file) as temporary:
    figure.savefig(temporary, dpi=130, format="png")


def title(reader: PreparedModel, questions: int) -> str:
  """What a heat map is of."""
  select = reader.select
  how = "all frames"
  if select is not None:
    how = (
      f"{select.frames} frame{'s' * (select.frames != 1)} selected, {select.mode}"
      + " by the answer's row" * (select.rows == "answer")
      + f", each scored {select.repeat} times" * (select.repeat > 1)
    )
  return (
    f"{pathlib.Path(reader.settings.checkpoint).name}: LP-Comp {reader.cfg.lp_comp.keep}, "
    f"{how}; {questions} questions"
  )


def check_arguments(args: argparse.Namespace) -> None:
  """Arguments that can be judged by themselves.

  Raises:
    NeedleError: which one is wrong.
  """
  if (args.synthetic is None) == (args.needles is None) or (
    args.needles and not (args.images and args.haystack)
  ):
    raise NeedleError(
      "give --synthetic COUNT, or --needles FILE with --images DIR and --haystack VIDEO",
      where="--synthetic",
    )
  if importlib.util.find_spec("matplotlib") is None:
    raise NeedleError(
      "the heat map needs matplotlib: pip install 'xcomp_jax[plot]'", where="matplotlib"
    )


def hidden_things(args: argparse.Namespace, reader: PreparedModel) -> list[Needle]:
  """The needles that the arguments ask for, at least one of which can be hidden.

  Raises:
    NeedleError, ConfigError, OSError: arguments that don't go together, by name; a file that can't
      be read.
  """
  F, size = reader.cfg.clip_frames, reader.cfg.vision.image_size
  if args.synthetic is not None:
    if world.FRAMES != F:
      raise ConfigError(f"--clip-frames {F}: a synthetic scene is a clip of {world.FRAMES} frames")
    return synthetic(args.synthetic, args.seed)
  every = read_needles(pathlib.Path(args.needles), pathlib.Path(args.images), F, size)
  needles = every[: args.limit]
  if not needles:
    raise NeedleError(
      f"{args.needles} holds no needle, or --limit {args.limit} leaves none", where=args.needles
    )
  if not any(needle.clips for needle in needles):
    raise NeedleError(
      f"no needle's pictures can be read, such as: {needles[0].fault}", where=args.images
    )
  return needles


def cells_of(
  needles: Sequence[Needle], frames: Sequence[int], depths: Sequence[float]
) -> list[NeedleCell]:
  """Every needle in every haystack, at every depth."""
  pictures = [hashed(b"".join(clip.tobytes() for clip in needle.clips)) for needle in needles]
  return [
    NeedleCell(n, depth, i, pictures[i] if needle.clips else "")
    for n in frames
    for depth in depths
    for i, needle in enumerate(needles)
  ]


def hashed(content: bytes) -> str:
  """A short hash."""
  return hashlib.blake2b(content, digest_size=8).hexdigest()


def run_needles(args: argparse.Namespace, ask: Ask) -> dict[str, Any] | None:
  """The command's work; None where other shares are not done yet.

  ask: see `NeedleSearch`.

  Raises:
    NeedleError, VideoError, CheckpointError, ConfigError, AnswersError, OSError: bad arguments, by
    name.
  """
  check_arguments(args)
  read = ("needles", "images", "haystack", "checkpoint")
  files.apart({"--out": args.out}, {f"--{name}": getattr(args, name) for name in read})
  cli.keep_compiled(args.compilation_cache, COMPILED)
  first, step = parse_share(args.share)
  reader = prepare_model(settings_of(args))
  print(reader.introduce(), file=sys.stderr)
  reader.check_clips()
  needles = hidden_things(args, reader)
  most = max(len(needle.clips) for needle in needles)
  least = most * reader.cfg.clip_frames
  for frames in args.frames:
    if frames % 8 or frames < least:
      raise NeedleError(
        f"--frames {frames}: a multiple of 8, and at least the {least} of the needles",
        where="--frames",
        value=frames,
        least=least,
      )
    reader.check(frames, float(frames))
  depths, row = (sorted(set(args.depths)), "depth") if most == 1 else ([0.0], "kind")
  cells = cells_of(needles, args.frames, depths)
  about = {
    "haystack": reader.source(args.haystack) if args.haystack else f"synthetic, seed {args.seed}",
    "needles": hashed(repr([needle.questions for needle in needles]).encode()),
  }
  with Answers(args.out, reader, (first, step), about=about) as answers:
    search(
      reader,
      needles,
      cells[first::step],
      answers,
      args.haystack,
      args.seed,
      ask,
      mesh_of_command(args),
    )
  answers.read()
  keys = [c.key(kind) for c in cells for kind in needles[c.needle].questions]
  if left := sum(key not in answers.lines for key in keys):
    print(f"{left} of {len(keys)} questions are left for other shares")
    return None
  lines = [answers.lines[key] for key in keys]
  found: dict[str, Any] = summary(lines, row) | {"failed": failures(lines, "needle")}
  made = {"made_with": answers.settings, "sessions": answers.sessions()}
  files.write_json(args.out / "results.json", found | made, indent=2)
  plot_needles(found, title(reader, found["questions"]), args.out / "heatmap.png")
  return found


def main(argv: Sequence[str] | None = None, ask: Ask = ask_needle) -> None:
  """The command; an error is one line on stderr and exit code 1. ask: see `NeedleSearch`."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.needles", description=__doc__.splitlines()[0]
  )
  add = parser.add_argument
  add(
    "--out",
    type=files.path_of,
    required=True,
    help="folder of answers, results.json and heatmap.png; a run that is there is continued",
  )
  add(
    "--needles",
    type=files.expanduser,
    help="VideoChat-Flash's file, niah-coco-singlehop_20.json or niah-coco-multihop-100.json",
  )
  add("--images", type=files.expanduser, help="folder of its pictures")
  add(
    "--haystack",
    type=files.expanduser,
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
    default=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
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
    if found := run_needles(args, ask):
      print(
        f"right {found['right']:.1f}%, needle among the kept frames {found['found']:.1f}% "
        f"({found['questions']} questions): {args.out}/heatmap.png"
      )
      for needle in found["failed"]:
        print(
          f"needle {needle['needle']}: {needle['questions']} questions failed: {needle['error']}",
          file=sys.stderr,
        )
      end_if_failed(found["failed"], found["questions"])
