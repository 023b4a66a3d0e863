"""Asks a video, or an image, questions.

The video is encoded once, and every question picks the frames it needs.

  python -m xcomp_jax.ask --checkpoint exports/sct --video film.mp4 --question "What happens first?"

Several questions: repeat --question, or --questions FILE (one per line); without either, they are
read from the terminal as one conversation, until stdin ends; the line /new starts another one.
Answers go to stdout, everything else to stderr. Frames are sampled as in FACTS.md 5; a short
video's are repeated up to --min-frames.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import jax

from xcomp_jax import cli, files, inputs
from xcomp_jax.data import prompt, video
from xcomp_jax.errors import one_line
from xcomp_jax.files import expanduser
from xcomp_jax.inference import encoded_video
from xcomp_jax.inference.chat import Answer, Chat
from xcomp_jax.inference.video_model import (
  COMPILED,
  VideoModel,
  add_options,
  fault,
  prepare_model,
  settings_of,
)
from xcomp_jax.model.vlm import VLM
from xcomp_jax.progress import progress
from xcomp_jax.viz import html_report

QUESTIONS = 1 << 24  # bytes of all, or letters of a typed one, at most
NEW = "/new"  # typed instead of a question


def say(text: str) -> None:
  """Prints to stderr."""
  print(text, file=sys.stderr, flush=True)


def check_target(option: str, path: str | None) -> None:
  """Sees to it before any work that a file can be written.

  Raises:
    OSError: it can't.
  """
  if path is None:
    return
  file = files.local(path, f"{option} names a file", written=True)
  if not file.parent.is_dir():
    raise FileNotFoundError(f"{option} {file}: there is no folder {file.parent}")
  real = pathlib.Path(os.path.realpath(file))
  files.sweep(real.parent, real.name)
  try:
    with files.replacing(file) as probe:
      probe.unlink()
  except OSError as error:
    raise type(error)(f"{option} {file}: {error.strerror}") from error


def sampled(args: argparse.Namespace, reader: VideoModel) -> video.FrameSample | None:
  """Which frames to decode; None if --encoded is there to be read.

  Raises:
    VideoError, FileNotFoundError, ConfigError: what is wrong with the video or the arguments.
  """
  file = pathlib.Path(args.encoded) if args.encoded else None
  if file and file.exists():
    return None
  if not args.video:
    raise FileNotFoundError("no --video" + (f", and {file} does not exist" if file else ""))
  return reader.sample(args.video, args.start, args.end)


def encoded(
  args: argparse.Namespace,
  reader: VideoModel,
  model: VLM,
  sample: video.FrameSample | None,
  spent: dict[str, float],
) -> encoded_video.EncodedVideo:
  """The video, read from --encoded, or decoded and encoded, and then written there if wanted.

  Raises:
    VideoError, EncodedVideoError, OSError: what is wrong with the video or the file.
  """
  if sample is None:
    begun = time.perf_counter()
    film = encoded_video.load_video(args.encoded, model)
    wanted = args.video and reader.source(args.video, args.start, args.end)
    if wanted and wanted != film.source:
      raise encoded_video.EncodedVideoError(
        f"{args.encoded} holds {film.source}, not {wanted}; leave --video out, or name another file"
      )
    T = len(film.times)
    reader.check(T, film.seconds)
    if lacking := set(reader.phases(T)) - set(film.features):
      raise encoded_video.EncodedVideoError(
        f"--mode {args.mode} needs clips that start at frame "
        f"{', '.join(map(str, sorted(lacking)))} too, which {args.encoded} "
        "does not hold; give --video and another --encoded file"
      )
    spent["reading"] = time.perf_counter() - begun
    return film
  T = len(sample.indices)
  say(
    f"{args.video}: {T} frame{'s' if T > 1 else ''}"
    + (f" of {sample.seconds:.2f} s" if sample.seconds else "")
  )
  clips = T // min(reader.cfg.clip_frames, T) * len(reader.phases(T))
  with progress(total=clips, desc="encoding", unit="clip", leave=False) as bar:
    film, seconds = reader.encode(
      model, sample, reader.source(args.video, args.start, args.end), report=bar.update
    )
  spent |= seconds
  if args.encoded:
    try:
      encoded_video.save_video(film, args.encoded)
      say(
        f"{args.encoded}: {sum(f.nbytes for f in film.features.values()) / 1e6:.1f} MB of features"
      )
    except (
      OSError
    ) as error:  # it only saves the next one time; the answer has cost most of its own already
      say(
        f"warning: {args.encoded} is not written, and the next time the video is encoded again: "
        f"{one_line(error)}"
      )
  return film


def questions_of(args: argparse.Namespace) -> list[str]:
  """The questions of the command line.

  Raises:
    OSError: there is no --questions file. AnnotationError: it is empty, or no UTF-8.
  """
  found: list[str] = list(args.question or ())
  if args.questions:
    lines = inputs.read_text(
      args.questions, prompt.AnnotationError, QUESTIONS, pipes=True
    ).splitlines()
    found += (asked := [line.strip() for line in lines if line.strip()])
    if not asked:
      raise prompt.AnnotationError(
        f"{'standard input' if args.questions == '-' else args.questions} holds no question"
      )
  return found


def typed() -> Iterator[str]:
  """Lines from stdin until it ends."""
  while True:
    if sys.stdin.isatty():
      print("? ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline(QUESTIONS)
    if not line:
      return
    if len(line) == QUESTIONS:  # it may never end
      raise prompt.AnnotationError(
        f"a line on stdin has more than the {QUESTIONS:,} letters that a question may have"
      )
    if line.strip():
      yield line.strip()


def seconds_spent(video: dict[str, float], question: dict[str, float]) -> dict[str, float]:
  """Seconds spent on the video and on a question."""
  return {name: video.get(name, 0) + question.get(name, 0) for name in video | question}


def answer_line(
  question: str, answer: Answer, film: encoded_video.EncodedVideo, spent: dict[str, float]
) -> str:
  """One line of --json."""
  kept = answer.selection
  scores = (
    None if kept.scores is None else kept.scores.reshape(-1, film.clip_frames).mean(1).tolist()
  )
  return json.dumps(
    {
      "question": question,
      "answer": answer.text,
      "video": film.source,
      "seconds": film.seconds,
      "sampled_frames": len(film.times),
      "frames": kept.frames.tolist(),
      "ranges": html_report.ranges(kept.frames, film.times, film.seconds),
      "note": kept.note,
      "clip_scores": scores,
      "spent": seconds_spent(spent, answer.spent),
    }
  )


def answer_all(args: argparse.Namespace) -> None:
  """Answers all questions.

  Raises:
    CheckpointError, VideoError, EncodedVideoError, AnnotationError, ConfigError, OSError: bad
    arguments, by name.
  """
  cli.keep_compiled(args.compilation_cache, COMPILED)
  reader = prepare_model(settings_of(args))
  page = pathlib.Path(args.report) if args.report else None
  check_target("--report", args.report)
  files.apart(
    {"--report": args.report},
    {f"--{name}": getattr(args, name) for name in ("video", "encoded", "questions")},
  )
  files.apart({"--report": args.report}, {"--checkpoint": args.checkpoint}, nested=True)
  if args.encoded and not pathlib.Path(args.encoded).exists():
    check_target("--encoded", args.encoded)
    files.apart({"--encoded": args.encoded}, {"--checkpoint": args.checkpoint}, nested=True)

  fixed = questions_of(args)
  for question in fixed:
    prompt.question_prompt(
      reader.tokenizer, question, ""
    )  # what is wrong with it shows before any work
  sample = sampled(args, reader)
  if sample is not None:
    for question in fixed or ["?"]:
      reader.check(len(sample.indices), sample.seconds, question)

  spent, done = {}, []
  begun = time.perf_counter()
  model = reader.load()
  spent["loading"] = time.perf_counter() - begun
  say(
    f"{args.checkpoint}: loaded in {spent['loading']:.1f} s; LP-Comp {reader.cfg.lp_comp.keep}, "
    f"{jax.devices()[0].device_kind}"
  )
  say(reader.introduce())
  with reader.precision():
    film = encoded(args, reader, model, sample, spent)
    kept_rounds = len(fixed) != 1 and not args.forget_rounds
    talk = not fixed or args.follow_up
    chat = Chat(
      model,
      reader.tokenizer,
      film,
      select=reader.select,
      sampling=reader.sampling,
      keep_rounds=kept_rounds,
      talk=talk,
    )
    if not fixed:
      say(f"a conversation, question by question; {NEW} starts another one")
    question, failed = None, 0
    for question in fixed or typed():
      new = question == NEW and not fixed
      if new or not talk:
        chat.forget()
      if new:
        say("a new conversation")
        continue
      with progress(total=0, desc="scoring", leave=False) as bar:

        def scored(what, done, total, bar=bar):
          bar.set_description(what, refresh=False)
          bar.total = total
          bar.update(done - bar.n)

        def write(text, bar=bar):
          bar.close()
          if not args.json:
            print(text, end="", flush=True)

        try:
          got = chat.ask(question, write=write, report=scored)
        except Exception as error:
          if fixed or isinstance(error, OSError):  # nobody reads the answers
            raise
          bar.close()
          failed += 1
          say(f"error: {fault(error)}")  # the conversation goes on
          continue
      print(answer_line(question, got, film, spent) if args.json else "", flush=True)
      done.append((question, got))
      kept, clock = got.selection, lambda t: html_report.clock(t, film.seconds)
      if kept.note and reader.select and len(film.times) > 1:
        say(kept.note)
      elif kept.scores is not None:
        spans = html_report.ranges(kept.frames, film.times, film.seconds)
        say(
          f"looked at {len(kept.frames)} of {len(film.times)} frames: "
          + ", ".join(f"{clock(a)} to {clock(b)}" for a, b in spans)
        )
      say(
        "spent "
        + ", ".join(
          f"{name} {seconds:.1f} s" for name, seconds in seconds_spent(spent, got.spent).items()
        )
      )
      if talk and (ending := chat.ending()):
        say(ending + ("" if fixed else f"; {NEW} does so here"))
      if page:
        try:
          files.write_file(page, html_report.page(film, done, reader.cfg, spent))
        except OSError as error:
          if fixed:
            raise
          say(f"error: {error}")
    if question is None:
      raise prompt.AnnotationError("no --question, and none on stdin")
    if failed and not sys.stdin.isatty():
      raise prompt.AnnotationError(
        f"{failed} question{'s' * (failed > 1)} of standard input could not be answered, as said "
        f"above"
      )


def main(argv: Sequence[str] | None = None) -> None:
  """The command; an error is one line on stderr and exit code 1."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.ask", description=__doc__.splitlines()[0]
  )
  add_options(parser)
  add = parser.add_argument
  add("--video", type=expanduser, help="a video file, a GIF, a folder of frames, or an image")
  add(
    "--encoded",
    type=expanduser,
    help="file of the encoded video: read if it is there, else written",
  )
  add("--question", action="append", help="may be repeated")
  add(
    "--questions",
    type=expanduser,
    help="file of questions, one per line; also a pipe, or -: standard input",
  )
  add(
    "--follow-up",
    action="store_true",
    help="each question continues the conversation; always so at the terminal",
  )
  add("--json", action="store_true", help="one JSON object per question instead of text")
  add(
    "--report",
    type=expanduser,
    help="HTML page to be written: relevance over time, thumbnails, cost",
  )
  add(
    "--forget-rounds",
    action="store_true",
    help="run scoring rounds again for every question; saves memory",
  )
  add(
    "--start",
    type=inputs.number(0.0, 1e9, float),
    help="second from which the video is looked at",
  )
  add("--end", type=inputs.number(0.0, 1e9, float), help="and until which")
  args = parser.parse_args(argv)
  with cli.command(OverflowError):
    answer_all(args)


if __name__ == "__main__":
  main()
