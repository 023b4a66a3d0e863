r"""Asks a benchmark's questions and scores the answers.

The numbers are those that lmms-eval gives with the same settings.

  python -m xcomp_jax.evaluate --task lvbench --annotations lvbench_clean.json --videos DIR \
      --checkpoint exports/sct --out DIR

Annotations and videos are files (docs/EVALUATION.md says where they come from). --preset has all
settings of the paper, or of the released logs; options override it. Every answer goes to --out at
once and the same command continues a run that was stopped; videos that can't be read are tried
again. Several processes share the videos with --share 0/4, 1/4, ..., or by their place among
JAX's processes; who finishes last writes results.json and samples.jsonl.
"""

import argparse
import collections
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from xcomp_jax import cli, files
from xcomp_jax.evaluation.answers import Answers, Wanted, end_if_failed, failures, parse_share
from xcomp_jax.evaluation.benchmarks import (
  TASKS,
  BenchmarkQuestion,
  Task,
  add_benchmark_options,
  find_video,
  read_questions,
  say_doubts,
  score_answers,
  subtitles_of,
)
from xcomp_jax.evaluation.presets import preset
from xcomp_jax.evaluation.runner import answer_wanted
from xcomp_jax.inference.prepared import prepare_model
from xcomp_jax.inference.settings import COMPILED, add_options, settings_of
from xcomp_jax.inference.video_model import mesh_of_command
from xcomp_jax.inputs import number

HOW = ("batch", "devices", "fsdp", "tensor", "each_alone")  # of a session, for its record


def questions_of_command(
  args: argparse.Namespace, task: Task
) -> tuple[list[BenchmarkQuestion], dict[str, Any]]:
  """The questions, and what results.json says about where they come from.

  Raises:
    FileNotFoundError, TaskError: see `benchmarks.read_questions`.
  """
  source, videos = (
    files.local(path, "questions and videos are read as files")
    for path in (args.annotations, args.videos)
  )
  if not videos.is_dir():
    raise FileNotFoundError(f"--videos {videos} is no folder")
  questions = read_questions(task, source, subtitles_of(videos, args.subtitles))
  if task.sizes and len(questions) not in task.sizes:
    sizes = " or ".join(f"{n:,}" for n in task.sizes)
    print(
      f"{source} holds {len(questions):,} questions; published numbers of {task.name} are over "
      f"{sizes}",
      file=sys.stderr,
    )
  digest = hashlib.blake2b("".join(map(repr, questions)).encode(), digest_size=16).hexdigest()
  asked = questions[: args.limit]
  say_doubts(videos, asked)
  return asked, {
    "annotations": source.name,
    "questions": len(questions),
    "questions_identity": digest,
    "preset": args.preset,
    "limit": args.limit,
  }


def results(
  task: Task,
  questions: Sequence[BenchmarkQuestion],
  lines: Sequence[dict[str, Any]],
  answers: Answers,
  about: dict[str, Any],
) -> dict[str, Any]:
  """All that results.json holds.

  lines: about each question, of `answers`. about: where the questions come from.
  """
  spent = collections.Counter()  # seconds by what they went into
  for line in lines:
    spent.update(line.get("seconds", {}))
  given = (line.get("answer") for line in lines)
  return {
    "task": task.name,
    **about,
    "score": score_answers(task, zip(questions, given, strict=True)),
    "failed": failures(lines, "video"),
    # videos whose end could not be read, and how many seconds of it
    "shortened": {line["video"]: line["lost"] for line in lines if "lost" in line},
    "made_with": answers.settings,
    "sessions": answers.sessions(),
    "seconds": {name: round(s, 2) for name, s in spent.items()},
  }


def sample_lines(
  task: Task, questions: Sequence[BenchmarkQuestion], lines: Sequence[dict[str, Any]]
) -> str:
  """All that samples.jsonl holds: a line per question, in the order of the annotations."""
  samples = []
  for q, line in zip(questions, lines, strict=True):
    letter, right = task.judge(line.get("answer"), q.options, q.answer)
    samples.append({"id": q.id, "right": right, "letter": letter, "truth": q.answer} | line)
  return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)


def results_table(found: dict[str, Any]) -> str:
  """Results for people."""
  score = found["score"]
  cells = (
    (kind, name, cell) for kind, names in score["groups"].items() for name, cell in names.items()
  )
  return "\n".join(
    [
      f"{found['task']}: micro {score['micro']:.2f}%, macro over {score['macro_over']} "
      f"{score['macro']:.2f}%",
      ", ".join(f"{n} {name}" for name, n in score["counts"].items()),
      *(
        f"  {kind}: {name:40} {cell['accuracy']:6.2f}%  {cell['right']} of {cell['counted']}"
        for kind, name, cell in cells
      ),
      *(
        f"  failed: {f['video']} ({f['questions']} questions): {f['error']}"
        for f in found["failed"]
      ),
      *(
        f"  its last {lost:.2f} seconds could not be read: {video}"
        for video, lost in found["shortened"].items()
      ),
    ]
  )


def evaluate_command(
  args: argparse.Namespace,
  *,
  folder: Callable[..., Answers] = Answers,
  **parts: Any,
) -> dict[str, Any] | None:
  """The command's work; results, or None where other shares are not done yet.

  folder: makes the folder of answers. parts: see `answer_wanted`.

  Raises:
    CheckpointError, ConfigError, TaskError, AnswersError, OSError: bad arguments, by name.
  """
  cli.keep_compiled(args.compilation_cache, COMPILED)
  task, share = TASKS[args.task], parse_share(args.share)
  read = ("annotations", "videos", "subtitles", "checkpoint")
  files.apart({"--out": args.out}, {f"--{name}": getattr(args, name) for name in read})
  questions, about = questions_of_command(args, task)
  videos = files.path_of(args.videos)
  asked = [Wanted(find_video(videos, q), q.prompt, q.start, q.end) for q in questions]
  reader = prepare_model(settings_of(args))
  print(reader.introduce(), file=sys.stderr)
  how = {name: getattr(args, name) for name in HOW}
  with folder(args.out, reader, share, how=how) as answers:
    answer_wanted(
      reader,
      asked,
      answers,
      share=share,
      devices=args.devices,
      mesh=mesh_of_command(args),
      ahead=args.ahead,
      batch=args.batch,
      once=not args.each_alone,
      **parts,
    )
  answers.read()
  if left := sum(w.key not in answers.lines for w in asked):
    print(
      f"{left:,} of {len(asked):,} questions are left for other shares; the last one writes "
      f"{args.out / 'results.json'}",
      file=sys.stderr,
    )
    return None
  lines = [answers.lines[w.key] for w in asked]
  found = results(task, questions, lines, answers, about)
  samples = sample_lines(task, questions, lines)
  # as in `Answers`
  files.write_file(args.out / "samples.jsonl", samples.encode("utf-8", "backslashreplace"))
  files.write_json(args.out / "results.json", found, indent=2)
  return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Arguments; options that are not given have the preset's values.

  Raises:
    TaskError: see `preset`.
  """
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.evaluate", description=__doc__.splitlines()[0]
  )
  add = parser.add_argument
  add_benchmark_options(parser)
  add(
    "--out",
    type=files.path_of,
    required=True,
    help="folder of answers and results; an evaluation that is there is continued",
  )
  add(
    "--preset",
    choices=("paper", "released-logs", "none"),
    default="paper",
    help="all settings; none: as `ask`",
  )
  add("--share", help="i/n: every n-th video from the i-th on; default: by JAX's processes")
  add("--limit", type=number(1, 10_000_000, int), help="only the first questions, for a trial")
  add(
    "--devices",
    type=number(1, 10_000, int),
    help="of this process, each with the whole model and videos of its own; default: all",
  )
  add(
    "--batch",
    type=number(1, 10_000, int),
    default=1,
    help="questions about a video that are answered together; memory for the caches of all",
  )
  add(
    "--ahead",
    type=number(0, 10_000, int),
    default=1,
    help="videos decoded while others are watched; 0.6 GB each at 1,024 frames of 448 pixels",
  )
  add(
    "--each-alone",
    action="store_true",
    help="encode a video again for every question, to measure what encoding once saves",
  )
  add_options(parser)
  first, _ = parser.parse_known_args(argv)
  if first.preset != "none":
    parser.set_defaults(**preset(first.preset, first.task))
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, **parts: Any) -> None:
  """The command; an error, or questions that could not be asked, is one line on stderr and exit
  code 1.

  parts: see `evaluate_command`.
  """
  with cli.command(interrupted="interrupted; the same command continues"):
    if found := evaluate_command(parse(argv), **parts):
      print(results_table(found))
      end_if_failed(found["failed"], found["score"]["counts"]["questions"])


if __name__ == "__main__":
  main()
