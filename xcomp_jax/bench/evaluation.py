r"""Measures what a question of `evaluate` takes.

Videos are encoded once or for every question, in batches, by two processes.

  python -m xcomp_jax.bench_evaluate --checkpoint assets/tiny --out DIR \
      [--videos 4 --questions 10 --scenes 32 --rounds 3]

On videos of `xcomp_jax.world`. Every variant runs as a command of its own, after one that
compiled its programs, and the variants take turns, so that whatever else the machine does falls
on all of them. Options of `evaluate` may follow.
"""

import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from xcomp_jax import cli, files
from xcomp_jax.bench.options import command_parser
from xcomp_jax.errors import XCompError
from xcomp_jax.synthetic import world

ALONE, ONCE = "a video encoded for every question", "encoded once"
VARIANTS = {  # options of each process
  ALONE: [["--each-alone"]],
  ONCE: [[]],
  "encoded once, 5 questions together": [["--batch=5"]],
  "encoded once, 10 questions together": [["--batch=10"]],
  "encoded for every question, two processes": [
    ["--each-alone", f"--share={i}/2"] for i in range(2)
  ],
  "encoded once, two processes": [[f"--share={i}/2"] for i in range(2)],
}


class BenchError(XCompError, RuntimeError):
  """A measurement that failed; the message says why."""


def write_questions(folder: pathlib.Path, videos: int, questions: int, scenes: int) -> list[str]:
  """Videos of a synthetic world and so many questions about each, in `folder`; the options of
  `evaluate` that say so.
  """
  if not folder.exists():
    world.write_world(
      folder,
      [
        world.WorldSplit(
          name="heldout", videos=videos, fewest=scenes, most=scenes, questions=len(world.QUESTIONS)
        )
      ],
      seed=0,
      workers=1,
    )
  asked = []
  for annotation in world.read_split(folder, "heldout"):
    turns, talk = annotation["conversations"], []
    for i in range(questions):  # the same few, in other words
      human, answer = turns[2 * i % len(turns)], turns[2 * i % len(turns) + 1]
      talk += [
        human | {"value": f"Question {i + 1}. {human['value'].removeprefix('<image>').strip()}"},
        answer,
      ]
    asked.append(annotation | {"conversations": talk})
  files.write_json(folder / "questions.json", asked)
  return [
    "--task=letters",
    f"--annotations={folder / 'questions.json'}",
    f"--videos={folder / 'heldout'}",
  ]


def once(
  processes: Sequence[Sequence[str]], options: Sequence[str], out: pathlib.Path
) -> tuple[float, float, dict[str, Any]]:
  """Runs processes that share an evaluation: seconds, those of processors, and its results.

  Raises:
    BenchError: one of them failed.
  """

  def used():
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

  begun, before = time.perf_counter(), used()
  with tempfile.TemporaryDirectory(prefix="answers-", dir=out) as folder:
    command = [sys.executable, "-m", "xcomp_jax.evaluate", f"--out={folder}", *options]
    running = [
      subprocess.Popen(
        [*command, *own], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
      )
      for own in processes
    ]
    ends = [process.communicate()[1] for process in running]
    for process, own, end in zip(running, processes, ends, strict=True):
      if process.returncode:
        raise BenchError(
          f"{' '.join([*command, *own])}: "
          f"{end.strip().splitlines()[-1] if end.strip() else process.returncode}"
        )
    return (
      time.perf_counter() - begun,
      used() - before,
      json.loads((pathlib.Path(folder) / "results.json").read_text()),
    )


def measure_variants(
  options: Sequence[str], out: pathlib.Path, rounds: int, variants: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """What each variant took, by its name: "seconds", "cpu_seconds" and "asking" (without starting
  and loading) of every round, in seconds per question; "parts" of the last round, "micro" and
  "questions".
  """
  for name in variants:  # compiles
    once(VARIANTS[name], options, out)
  found: dict[str, dict[str, Any]] = {
    name: {"seconds": [], "cpu_seconds": [], "asking": []} for name in variants
  }
  for _ in range(rounds):
    for name in variants:
      wall, cpu, results = once(VARIANTS[name], options, out)
      parts, n = results["seconds"], results["score"]["counts"]["questions"]
      spent = {"seconds": wall, "cpu_seconds": cpu, "asking": sum(parts.values())}
      for key, seconds in spent.items():
        found[name][key].append(seconds / n)
      found[name] |= {"parts": parts, "micro": results["score"]["micro"], "questions": n}
      print(f"{name}: {wall:.1f} s, {cpu:.1f} s of processors", file=sys.stderr, flush=True)
  return found


def variants_table(found: dict[str, dict[str, Any]]) -> str:
  """Medians and extremes for people."""
  middle = statistics.median
  return "\n".join(
    [
      f"{'seconds per question':44} {'asking':>8} {'all':>8} {'processors':>11}   of all",
      *(
        f"{name:44} {middle(row['asking']):8.3f} {middle(row['seconds']):8.3f} "
        f"{middle(row['cpu_seconds']):11.3f}   {min(row['seconds']):.3f} to "
        f"{max(row['seconds']):.3f}"
        for name, row in found.items()
      ),
    ]
  )


def main(argv: Sequence[str] | None = None) -> None:
  """The command; options that it does not know are for `evaluate`."""
  args, more = command_parser(
    "bench_evaluate",
    __doc__,
    {
      "--checkpoint": {"type": files.expanduser, "required": True},
      "--out": {
        "type": files.path_of,
        "required": True,
        "help": "folder of videos, answers, and bench.json",
      },
      "--videos": {"type": int, "default": 4},
      "--questions": {"type": int, "default": 10, "help": "about each video"},
      "--scenes": {"type": int, "default": 32, "help": "of each video, of 8 frames each"},
      "--rounds": {"type": int, "default": 3, "help": "in which every variant has its turn"},
      "--variant": {
        "action": "append",
        "choices": VARIANTS,
        "help": "may be repeated; default: all",
      },
    },
  ).parse_known_args(argv)
  with cli.command(BenchError, interrupted="interrupted"):
    given = write_questions(args.out / "world", args.videos, args.questions, args.scenes)
    given += [f"--checkpoint={args.checkpoint}", "--preset=none", "--devices=1", "--min-frames=8"]
    found = measure_variants([*given, *more], args.out, args.rounds, args.variant or list(VARIANTS))
    files.write_json(args.out / "bench.json", found, indent=2)
    print(variants_table(found))
