r"""Asks a benchmark's questions and scores the answers: the numbers that lmms-eval gives with the
same settings.

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
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from xcomp_jax import files
from xcomp_jax.evaluation import benchmarks
from xcomp_jax.evaluation.benchmarks import TASKS, Question, Task, TaskError
from xcomp_jax.evaluation.runner import Answers, Wanted, parse_share, run
from xcomp_jax.files import expanduser
from xcomp_jax.inference.video_model import COMPILED, options, prepare, settings
from xcomp_jax.inputs import number

# selected; Table B
PAPER_FRAMES = {
  "lvbench": 2048,
  "mlvu": 1024,
  "videomme_long": 512,
  "longvideobench": 256,
}
# FACTS.md 9
LOGS = {
  "mlvu": {"select": 256, "repeat": 2},
  "videomme_long": {"select": 512, "repeat": 8},
}


def preset(name: str, task: str) -> dict[str, Any]:
  """The options that a preset fixes.

  "paper": clips of 8 frames as trained (InternVideo2: 4), official QC-Comp, frames and repetitions
  of Table B (MVBench, which has none: 512, its rule of thumb). The paper does not say how many
  frames it selects from; here twice as many, at least the 1,024 from which the release selects at
  all. "released-logs": what the two logs of the release were made with, as far as can be told:
  config.json's own clips (quirk Q1), and the repetition penalty of generation_config.json (quirk
  Q20).

  Raises:
    TaskError: the release has no log of this task.
  """
  task = task.removesuffix("_best_option")
  same = {
    "mode": "official",
    "min_frames": 128,
    "fps": 8.0,
    "rate": "average",
    "context": 131072,
    "max_new_tokens": 16,
    "temperature": 0.0,
  }
  if name == "paper":
    select = PAPER_FRAMES.get(task, 512)
    own = {
      "select": select,
      "repeat": 2,
      "max_frames": max(1024, 2 * select),
      "clip_frames": "auto",
      "repetition_penalty": 1.0,
    }
  elif name == "released-logs":
    if task not in LOGS:
      raise TaskError(
        f"the release has no log of {task}, only of {' and '.join(LOGS)}; take --preset paper"
      )
    own = LOGS[task] | {"max_frames": 1024, "clip_frames": "checkpoint", "repetition_penalty": 1.1}
  else:
    raise TaskError(f"there is no preset {name}; known: paper, released-logs, none")
  return same | own


def wanted(questions: Sequence[Question], videos: pathlib.Path) -> list[Wanted]:
  """The questions with their video files, in the same order."""
  return [Wanted(benchmarks.find(videos, q), q.prompt, q.start, q.end) for q in questions]


def results(
  task: Task,
  questions: Sequence[Question],
  asked: Sequence[Wanted],
  answers: Answers,
  about: dict[str, Any],
) -> dict[str, Any]:
  """All that results.json holds; about: where the questions come from."""
  spent: dict[str, float] = {}
  for w in asked:
    for name, seconds in answers.lines[w.key].get("seconds", {}).items():
      spent[name] = spent.get(name, 0.0) + seconds
  pairs = ((q, answers.answer(w)) for q, w in zip(questions, asked, strict=True))
  return {
    "task": task.name,
    **about,
    "score": benchmarks.score(task, pairs),
    "failed": answers.failed(asked),
    "shortened": answers.shortened(asked),
    "made_with": answers.settings,
    "sessions": answers.sessions(),
    "seconds": {name: round(s, 2) for name, s in spent.items()},
  }


def samples(
  task: Task, questions: Sequence[Question], asked: Sequence[Wanted], answers: Answers
) -> str:
  """All that samples.jsonl holds: a line per question, in the order of the annotations."""
  lines = []
  for q, w in zip(questions, asked, strict=True):
    answer = answers.answer(w)
    letter = None if answer is None else task.letter(answer, q.options)
    right = letter == q.answer != ""
    lines.append(
      {"id": q.id, "right": right, "letter": letter, "truth": q.answer, **answers.lines[w.key]}
    )
  return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def table(found: dict[str, Any]) -> str:
  """Results for people."""
  score, counts = found["score"], found["score"]["counts"]
  lines = [
    f"{found['task']}: micro {score['micro']:.2f}%, macro over {score['macro_over']} "
    f"{score['macro']:.2f}%"
  ]
  lines.append(", ".join(f"{n} {name}" for name, n in counts.items()))
  for kind, cells in score["groups"].items():
    for name, cell in cells.items():
      lines.append(
        f"  {kind}: {name:40} {cell['accuracy']:6.2f}%  {cell['right']} of {cell['counted']}"
      )
  lines += [
    f"  failed: {f['video']} ({f['questions']} questions): {f['error']}" for f in found["failed"]
  ]
  lines += [
    f"  its last {lost:.2f} seconds could not be read: {video}"
    for video, lost in found["shortened"].items()
  ]
  return "\n".join(lines)


def read_questions(args: argparse.Namespace, task: Task) -> tuple[list[Question], dict[str, Any]]:
  """The questions, and what results.json says about where they come from.

  Raises:
    FileNotFoundError, TaskError: see `tasks.read`.
  """
  source, videos = (
    files.local(path, "questions and videos are read as files")
    for path in (args.annotations, args.videos)
  )
  if not videos.is_dir():
    raise FileNotFoundError(f"--videos {videos} is no folder")
  questions = benchmarks.read(task, source, benchmarks.subtitles_of(videos, args.subtitles))
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
  for note in filter(
    None, (benchmarks.unanswerable(questions), benchmarks.missing(videos, questions))
  ):
    print(note, file=sys.stderr)
  return questions, about


def evaluate(args: argparse.Namespace) -> dict[str, Any] | None:
  """The command's work; results, or None where other shares are not done yet.

  Raises:
    CheckpointError, ConfigError, TaskError, AnswersError, OSError: bad arguments, by name.
  """
  files.keep_compiled(args.compilation_cache, COMPILED)
  task, share, out = TASKS[args.task], parse_share(args.share), pathlib.Path(args.out)
  files.apart(
    {"--out": out},
    {
      f"--{name}": getattr(args, name)
      for name in ("annotations", "videos", "subtitles", "checkpoint")
    },
  )
  questions, about = read_questions(args, task)
  asked = wanted(questions, pathlib.Path(args.videos))
  reader = prepare(settings(args))
  print(reader.introduce(), file=sys.stderr)
  how = {name: getattr(args, name) for name in ("batch", "devices", "each_alone")}
  answers = Answers(out, reader, share, how=how)
  with answers:
    run(
      reader,
      asked,
      answers,
      share=share,
      devices=args.devices,
      ahead=args.ahead,
      batch=args.batch,
      once=not args.each_alone,
    )
  answers.read()
  if left := answers.missing(asked):
    rest = f"{left:,} of {len(asked):,} questions are left for other shares"
    print(f"{rest}; the last one writes {out / 'results.json'}", file=sys.stderr)
    return None
  found = results(task, questions, asked, answers, about)
  # as in `Answers`
  files.write(
    out / "samples.jsonl",
    samples(task, questions, asked, answers).encode("utf-8", "backslashreplace"),
  )
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
  benchmarks.options(parser)
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
  options(parser)
  first, _ = parser.parse_known_args(argv)
  if first.preset != "none":
    parser.set_defaults(**preset(first.preset, first.task))
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """The command; an error, or questions that could not be asked, is one line on stderr and exit
  code 1.
  """
  with files.command(interrupted="interrupted; the same command continues"):
    found = evaluate(parse(argv))
    if found:
      print(table(found))
    if found and (failed := sum(f["questions"] for f in found["failed"])):
      print(
        f"error: {failed:,} of {found['score']['counts']['questions']:,} questions could not be "
        f"asked, and count as wrong; the same command "
        "asks them again",
        file=sys.stderr,
      )
      sys.exit(1)


if __name__ == "__main__":
  main()
