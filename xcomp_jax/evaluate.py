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
import hashlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from xcomp_jax import cli, files
from xcomp_jax.evaluation import benchmarks
from xcomp_jax.evaluation.answers import Answers, Wanted, parse_share
from xcomp_jax.evaluation.benchmarks import TASKS, BenchmarkQuestion, Task
from xcomp_jax.evaluation.presets import preset
from xcomp_jax.evaluation.runner import answer_wanted
from xcomp_jax.evaluation.scores import results, results_table, sample_lines
from xcomp_jax.files import expanduser
from xcomp_jax.inference.video_model import (
  COMPILED,
  AskSettings,
  VideoModel,
  add_options,
  prepare_model,
  settings_of,
)
from xcomp_jax.inputs import number


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
  questions = benchmarks.read_questions(
    task, source, benchmarks.subtitles_of(videos, args.subtitles)
  )
  if task.sizes and len(questions) not in task.sizes:
    sizes = " or ".join(f"{n:,}" for n in task.sizes)
    print(
      f"{source} holds {len(questions):,} questions; published numbers of {task.name} are over "
      f"{sizes}",
      file=sys.stderr,
    )
  digest = hashlib.blake2b("".join(map(repr, questions)).encode(), digest_size=16).hexdigest()
  about = {"annotations": source.name, "questions": len(questions), "questions_identity": digest}
  about |= {"preset": args.preset, "limit": args.limit}
  questions = questions[: args.limit]
  benchmarks.say_doubts(videos, questions)
  return questions, about


def evaluate_command(
  args: argparse.Namespace,
  *,
  prepare: Callable[[AskSettings], VideoModel] = prepare_model,
  folder: Callable[..., Answers] = Answers,
  **parts: Any,
) -> dict[str, Any] | None:
  """The command's work; results, or None where other shares are not done yet.

  prepare, folder: make the model and the folder of answers. parts: see `answer_wanted`.

  Raises:
    CheckpointError, ConfigError, TaskError, AnswersError, OSError: bad arguments, by name.
  """
  cli.keep_compiled(args.compilation_cache, COMPILED)
  task, share = TASKS[args.task], parse_share(args.share)
  out, videos = pathlib.Path(args.out), pathlib.Path(args.videos)
  read = ("annotations", "videos", "subtitles", "checkpoint")
  files.apart({"--out": out}, {f"--{name}": getattr(args, name) for name in read})
  questions, about = questions_of_command(args, task)
  asked = [Wanted(benchmarks.find_video(videos, q), q.prompt, q.start, q.end) for q in questions]
  reader = prepare(settings_of(args))
  print(reader.introduce(), file=sys.stderr)
  how = {name: getattr(args, name) for name in ("batch", "devices", "each_alone")}
  with folder(out, reader, share, how=how) as answers:
    answer_wanted(
      reader,
      asked,
      answers,
      share=share,
      devices=args.devices,
      ahead=args.ahead,
      batch=args.batch,
      once=not args.each_alone,
      **parts,
    )
  answers.read()
  if left := answers.missing(asked):
    rest = f"{left:,} of {len(asked):,} questions are left for other shares"
    print(f"{rest}; the last one writes {out / 'results.json'}", file=sys.stderr)
    return None
  found = results(task, questions, asked, answers, about)
  lines = sample_lines(task, questions, asked, answers)
  # as in `Answers`
  files.write_file(out / "samples.jsonl", lines.encode("utf-8", "backslashreplace"))
  files.write_json(out / "results.json", found, indent=2)
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
  benchmarks.add_benchmark_options(parser)
  add(
    "--out",
    type=expanduser,
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
    found = evaluate_command(parse(argv), **parts)
    if found:
      print(results_table(found))
    if found and (failed := sum(f["questions"] for f in found["failed"])):
      print(
        f"error: {failed:,} of {found['score']['counts']['questions']:,} questions could not be "
        "asked, and count as wrong; the same command asks them again",
        file=sys.stderr,
      )
      sys.exit(1)


if __name__ == "__main__":
  main()
