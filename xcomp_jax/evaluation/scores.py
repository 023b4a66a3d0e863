"""From answers to scores: results.json, samples.jsonl and the table."""

import collections
import json
from collections.abc import Sequence
from typing import Any

from xcomp_jax.evaluation import benchmarks
from xcomp_jax.evaluation.answers import Answers, Wanted
from xcomp_jax.evaluation.benchmarks import BenchmarkQuestion, Task


def results(
  task: Task,
  questions: Sequence[BenchmarkQuestion],
  asked: Sequence[Wanted],
  answers: Answers,
  about: dict[str, Any],
) -> dict[str, Any]:
  """All that results.json holds; about: where the questions come from."""
  spent = collections.Counter()  # seconds by what they went into
  for w in asked:
    spent.update(answers.lines[w.key].get("seconds", {}))
  pairs = ((q, answers.answer(w)) for q, w in zip(questions, asked, strict=True))
  return {
    "task": task.name,
    **about,
    "score": benchmarks.score_answers(task, pairs),
    "failed": answers.failed(asked),
    "shortened": answers.shortened(asked),
    "made_with": answers.settings,
    "sessions": answers.sessions(),
    "seconds": {name: round(s, 2) for name, s in spent.items()},
  }


def sample_lines(
  task: Task, questions: Sequence[BenchmarkQuestion], asked: Sequence[Wanted], answers: Answers
) -> str:
  """All that samples.jsonl holds: a line per question, in the order of the annotations."""
  lines = []
  for q, w in zip(questions, asked, strict=True):
    letter, right = task.judge(answers.answer(w), q.options, q.answer)
    judged = {"id": q.id, "right": right, "letter": letter, "truth": q.answer}
    lines.append(judged | answers.lines[w.key])
  return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


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
