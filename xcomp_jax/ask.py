"""Asks a video, or an image, questions.

The video is encoded once, and every question picks the frames it needs.

  python -m xcomp_jax.ask --checkpoint exports/sct --video film.mp4 --question "What happens first?"

Several questions: repeat --question, or --questions FILE (one per line); without either, they are
read from the terminal as one conversation, until stdin ends; the line /new starts another one.
Answers go to stdout, everything else to stderr. Frames are sampled as in FACTS.md 5; a short
video's are repeated up to --min-frames.
"""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

import jax

from xcomp_jax import cli, files, inputs
from xcomp_jax.data import prompt, subtitles, video
from xcomp_jax.errors import one_line
from xcomp_jax.inference import html_report
from xcomp_jax.inference.chat import Answer, Chat
from xcomp_jax.inference.encoded_video import EncodedVideo, EncodedVideoError
from xcomp_jax.inference.moments import clock
from xcomp_jax.inference.prepared import PreparedModel, fault, prepare_model
from xcomp_jax.inference.settings import COMPILED, add_options, settings_of
from xcomp_jax.inference.video_model import VideoModel, load_prepared, mesh_of_command
from xcomp_jax.progress import progress

QUESTIONS = 1 << 24  # bytes of all, or letters of a typed one, at most
NEW = "/new"  # typed instead of a question
Lines = TextIO | io.TextIOBase  # where questions are typed


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
  files.sweep(*os.path.split(os.path.realpath(file)))
  try:
    with files.replacing(file) as probe:
      probe.unlink()
  except OSError as error:
    raise type(error)(f"{option} {file}: {error.strerror}") from error


def check_files(args: argparse.Namespace) -> None:
  """Sees to it before any work that what will be written can be, and is nothing that is read.

  Raises:
    OSError, FileNotFoundError: what can't be written, and why.
  """
  check_target("--report", args.report)
  names = ("video", "encoded", "questions", "subtitles")
  read = {f"--{name}": getattr(args, name) for name in names}
  files.apart({"--report": args.report}, read)
  files.apart({"--report": args.report}, {"--checkpoint": args.checkpoint}, nested=True)
  if args.encoded and not pathlib.Path(args.encoded).exists():
    check_target("--encoded", args.encoded)
    files.apart({"--encoded": args.encoded}, {"--checkpoint": args.checkpoint}, nested=True)


def sampled(args: argparse.Namespace, reader: PreparedModel) -> video.FrameSample | None:
  """Which frames to decode; None if --encoded is there to be read.

  Raises:
    VideoError, FileNotFoundError, ConfigError: what is wrong with the video or the arguments.
  """
  if args.encoded and os.path.exists(args.encoded):
    return None
  if not args.video:
    lacking = f", and {args.encoded} does not exist" if args.encoded else ""
    raise FileNotFoundError(f"no --video{lacking}")
  return reader.sample(args.video, args.start, args.end)


def read_encoded(args: argparse.Namespace, model: VideoModel) -> EncodedVideo:
  """The video of --encoded, which must be that of --video, if one is given.

  Raises:
    EncodedVideoError, ConfigError, OSError: what is wrong with the file, or its frames.
  """
  film = model.read_video(args.encoded)
  wanted = args.video and model.source(args.video, args.start, args.end)
  if wanted and wanted != film.source:
    raise EncodedVideoError(
      f"{args.encoded} holds {film.source}, not {wanted}; leave --video out, or name another file",
      where=args.encoded,
      found=film.source,
      expected=wanted,
    )
  return film


def encode(
  args: argparse.Namespace,
  model: VideoModel,
  sample: video.FrameSample,
  save: Callable[[EncodedVideo, str], None] = EncodedVideo.save,
) -> EncodedVideo:
  """Decodes and encodes the video, and writes it to --encoded if wanted.

  Raises:
    VideoError: what is wrong with the video.
  """
  T = len(sample.indices)
  lasts = f" of {sample.seconds:.2f} s" if sample.seconds else ""
  say(f"{args.video}: {T} frame{'s' * (T > 1)}{lasts}")
  film = model.encode(sample)
  if args.encoded:
    try:
      save(film, args.encoded)
      size = sum(clip.nbytes for clips in film.features.values() for clip in clips)
      say(f"{args.encoded}: {size / 1e6:.1f} MB of features")
    except OSError as error:
      # it only saves the next one time; the answer has cost most of its own already
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
    text = inputs.read_text(args.questions, prompt.AnnotationError, QUESTIONS, pipes=True)
    asked = [line.strip() for line in text.splitlines() if line.strip()]
    if not asked:
      raise prompt.AnnotationError(
        f"{'standard input' if args.questions == '-' else args.questions} holds no question"
      )
    found += asked
  return found


def typed_lines(stdin: Lines, most: int = QUESTIONS) -> Iterator[str]:
  """Lines from stdin until it ends, each shorter than `most` letters."""
  while True:
    if stdin.isatty():
      print("? ", end="", file=sys.stderr, flush=True)
    line = stdin.readline(most)
    if not line:
      return
    if len(line) == most:  # it may never end
      raise prompt.AnnotationError(
        f"a line on stdin has more than the {most:,} letters that a question may have",
        where="stdin",
        allowed=most,
      )
    if line.strip():
      yield line.strip()


@dataclasses.dataclass(kw_only=True)
class Interview:
  """Questions put to a video one after the other, and what is said of their answers.

  args: of the command. spent: seconds that went into the video. typed: where questions are typed,
  and a bad one does not end the conversation; None: they are all known. talk: each continues the
  one before it.
  """

  args: argparse.Namespace
  chat: Chat
  spent: dict[str, float]
  typed: Lines | None
  talk: bool
  answers: list[Answer] = dataclasses.field(default_factory=list)
  failed: int = 0

  def put_all(self, questions: Iterable[str]) -> None:
    """Asks all questions.

    Raises:
      AnnotationError: there is none; or one that came through a pipe could not be answered.
      Exception: whatever went wrong with one that was not typed.
    """
    question = None
    for question in questions:
      if self.typed and question == NEW:
        self.chat.forget()
        say("a new conversation")
      elif (answer := self.put(question)) is not None:
        self.answers.append(answer)
        self.tell(answer)
        self.write_report()
    if question is None:
      raise prompt.AnnotationError("no --question, and none on stdin", where="--question")
    if self.typed and self.failed and not self.typed.isatty():
      raise prompt.AnnotationError(
        f"{self.failed} question{'s' * (self.failed > 1)} of standard input could not be answered, "
        f"as said above",
        where="stdin",
        value=self.failed,
      )

  def put(self, question: str) -> Answer | None:
    """Asks one question; None where a typed one failed, which is said."""
    if not self.talk:
      self.chat.forget()
    with progress(total=0, desc="scoring", leave=False) as bar:

      def scored(what: str, done: int, total: int) -> None:
        bar.set_description(what, refresh=False)
        bar.total = total
        bar.update(done - bar.n)

      def write(text: str) -> None:
        bar.close()
        if not self.args.json:
          print(text, end="", flush=True)

      try:
        return self.chat.ask(question, write=write, report=scored)
      except Exception as error:
        if not self.typed or isinstance(error, OSError):  # nobody reads the answers
          raise
        bar.close()
        self.failed += 1
        say(f"error: {fault(error)}")  # the conversation goes on
        return None

  def tell(self, answer: Answer) -> None:
    """Says what an answer looked at and what it cost."""
    film, kept = answer.video, answer.selection
    spent = html_report.total_seconds({"video": self.spent, "question": answer.spent})
    print(answer_line(answer, spent) if self.args.json else "", flush=True)
    if kept.note and self.chat.selector.config and len(film.times) > 1:
      say(kept.note)
    elif kept.scores is not None:
      listed = [f"{clock(a, film.seconds)} to {clock(b, film.seconds)}" for a, b in answer.moments]
      say(f"looked at {len(kept.frames)} of {len(film.times)} frames: {', '.join(listed)}")
    say("spent " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in spent.items()))
    if self.talk and (ending := self.chat.ending()):
      say(ending + (f"; {NEW} does so here" if self.typed else ""))

  def write_report(self) -> None:
    """Writes --report anew, if wanted."""
    if not self.args.report:
      return
    page = html_report.page(self.chat.video, self.answers, self.spent)
    try:
      files.write_file(pathlib.Path(self.args.report), page)
    except OSError as error:
      if not self.typed:
        raise
      say(f"error: {error}")


def answer_line(answer: Answer, spent: dict[str, float]) -> str:
  """One line of --json. spent: seconds, those of the video too."""
  film, scores = answer.video, answer.scores
  return json.dumps(
    {
      "question": answer.question,
      "answer": answer.text,
      "video": film.source,
      "seconds": film.seconds,
      "sampled_frames": len(film.times),
      "frames": answer.frames.tolist(),
      "ranges": answer.moments,
      "note": answer.selection.note,
      "clip_scores": None
      if scores is None
      else scores.reshape(-1, film.clip_frames).mean(1).tolist(),
      "spent": spent,
    }
  )


def answer_all(
  args: argparse.Namespace,
  stdin: Lines,
  load: Callable[..., VideoModel] = load_prepared,
) -> None:
  """Answers all questions; without any, those that are typed.

  Raises:
    CheckpointError, VideoError, EncodedVideoError, AnnotationError, SubtitleError, ConfigError,
    OSError: bad arguments, by name.
  """
  cli.keep_compiled(args.compilation_cache, COMPILED)
  reader = prepare_model(settings_of(args))
  check_files(args)
  fixed = questions_of(args)
  for question in fixed:  # what is wrong with one shows before any work
    prompt.question_prompt(reader.tokenizer, question, "")
  spoken = subtitles.read_subtitles(args.subtitles) if args.subtitles else []
  sample = sampled(args, reader)
  if sample is not None:
    begins = sample.request.start or 0.0
    told = subtitles.seen_subtitles(spoken, sample.seconds, begins)
    for question in fixed or ["?"]:
      reader.check(len(sample.indices), sample.seconds, question, told)

  begun = time.perf_counter()
  model = load(reader, mesh=mesh_of_command(args))
  spent = {"loading": time.perf_counter() - begun}
  say(
    f"{args.checkpoint}: loaded in {spent['loading']:.1f} s; LP-Comp {reader.cfg.lp_comp.keep}, "
    f"{jax.devices()[0].device_kind}"
  )
  say(reader.introduce())
  if sample is None:
    begun = time.perf_counter()
    film = read_encoded(args, model)
    spent["reading"] = time.perf_counter() - begun
  else:
    film = encode(args, model, sample)
    spent |= film.spent
  talk = not fixed or args.follow_up
  keep_rounds = len(fixed) != 1 and not args.forget_rounds
  if not fixed:
    say(f"a conversation, question by question; {NEW} starts another one")
  Interview(
    args=args,
    chat=model.chat(film, subtitles=args.subtitles, keep_rounds=keep_rounds, talk=talk),
    spent=spent,
    typed=None if fixed else stdin,
    talk=talk,
  ).put_all(fixed or typed_lines(stdin))


def main(
  argv: Sequence[str] | None = None,
  stdin: Lines | None = None,
  load: Callable[..., VideoModel] = load_prepared,
) -> None:
  """The command; an error is one line on stderr and exit code 1."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.ask", description=__doc__.splitlines()[0]
  )
  add_options(parser)
  add = parser.add_argument
  add("--video", type=files.expanduser, help="a video file, a GIF, a folder of frames, or an image")
  add(
    "--encoded",
    type=files.expanduser,
    help="file of the encoded video: read if it is there, else written",
  )
  add("--question", action="append", help="may be repeated")
  add(
    "--questions",
    type=files.expanduser,
    help="file of questions, one per line; also a pipe, or -: standard input",
  )
  add(
    "--subtitles",
    type=files.expanduser,
    help="the video's, as .srt, .vtt or .ass: listed before the first question",
  )
  add(
    "--follow-up",
    action="store_true",
    help="each question continues the conversation; always so at the terminal",
  )
  add("--json", action="store_true", help="one JSON object per question instead of text")
  add(
    "--report",
    type=files.expanduser,
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
    answer_all(args, stdin or sys.stdin, load)


if __name__ == "__main__":
  main()
