r"""Writes task files for lmms-eval: the release's protocol over local annotations and videos.

  python -m xcomp_jax.lmms_tasks --task lvbench --annotations lvbench_clean.json --videos DIR \
      --out tasks
  lmms-eval --model xcomp_jax --model_args checkpoint=exports/sct,out=answers --tasks \
      xcomp_lvbench --include_path tasks ...

The folder gets a YAML and the questions, ready to be asked; the functions here are the ones that
the YAML names. It takes no lmms-eval to write task files.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from xcomp_jax import cli, files
from xcomp_jax.evaluation import benchmarks
from xcomp_jax.evaluation.benchmarks import TASKS

# what the plugin answers about a video that can't be read: no letter stands alone in it
FAILED = "(undecodable)"
PREFIX = "xcomp_"

YAML = """\
# {count} questions of {source}; written by `python -m xcomp_jax.lmms_tasks`.
task: {prefix}{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function xcomp_jax.lmms_tasks.visual
doc_to_text: !function xcomp_jax.lmms_tasks.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  top_p: 1.0
  num_beams: 1
  do_sample: false
process_results: !function xcomp_jax.lmms_tasks.scored
metric_list:
  - metric: micro
    aggregation: !function xcomp_jax.lmms_tasks.micro
    higher_is_better: true
  - metric: macro
    aggregation: !function xcomp_jax.lmms_tasks.macro
    higher_is_better: true
metadata:
  version: 1.0
"""


def visual(doc: Mapping[str, Any]) -> list[Any]:
  """The video, and which part of it."""
  part = {key: doc[key] for key in ("start", "end") if doc[key] is not None}
  return [doc["path"], part] if part else [doc["path"]]


def text(doc: Mapping[str, Any]) -> str:
  """What is asked."""
  return doc["prompt"]


def scored(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
  """One answer, for both averages."""
  answer = None if results[0] == FAILED else results[0]
  letter, right = TASKS[doc["task"]].judge(answer, doc["options"], doc["answer"])
  line = {key: doc[key] for key in ("id", "task", "path", "options", "groups")} | {
    "answer": answer,
    "letter": letter,
    "truth": doc["answer"],
    "right": right,
  }
  return {"micro": line, "macro": line}


def micro(lines: Sequence[Mapping[str, Any]]) -> float:
  """Percent of all questions."""
  return _score(lines)["micro"]


def macro(lines: Sequence[Mapping[str, Any]]) -> float:
  """Mean percent of the task's groups."""
  return _score(lines)["macro"]


def _score(lines) -> dict[str, Any]:
  questions = [
    benchmarks.BenchmarkQuestion(
      videos=(),
      prompt="",
      options=tuple(line["options"]),
      answer=line["truth"],
      groups=line["groups"],
    )
    for line in lines
  ]
  answers = [line["answer"] for line in lines]
  return benchmarks.score_answers(TASKS[lines[0]["task"]], zip(questions, answers, strict=True))


def write_task(
  out: pathlib.Path,
  task: benchmarks.Task,
  annotations: pathlib.Path,
  videos: pathlib.Path,
  subtitles: pathlib.Path | None,
) -> pathlib.Path:
  """Writes the questions and the YAML, whose path comes back.

  Raises:
    FileNotFoundError, TaskError: see `benchmarks.read_questions`.
  """
  questions = benchmarks.read_questions(task, annotations, subtitles)
  benchmarks.say_doubts(videos, questions)
  listed, yaml = out / f"{task.name}.jsonl", out / f"{PREFIX}{task.name}.yaml"
  for file in (listed, yaml):
    files.apart(
      {"--out": file},
      {"--annotations": annotations, "--videos": videos, "--subtitles": subtitles},
      nested=True,
    )
  out.mkdir(parents=True, exist_ok=True)
  docs = [
    dataclasses.asdict(q)
    | {"task": task.name, "path": files.absolute(benchmarks.find_video(videos, q))}
    for q in questions
  ]
  files.write_file(listed, "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs))
  files.write_file(
    yaml,
    YAML.format(
      count=f"{len(docs):,}",
      source=annotations.name,
      prefix=PREFIX,
      name=task.name,
      questions=json.dumps(files.absolute(listed)),
    ),
  )
  return yaml


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.lmms_tasks", description=__doc__.splitlines()[0]
  )
  benchmarks.add_benchmark_options(parser)
  parser.add_argument(
    "--out",
    type=files.path_of,
    required=True,
    help="folder of task files, for lmms-eval's --include_path",
  )
  args = parser.parse_args(argv)
  with cli.command():
    annotations, videos = (
      files.local(path, "questions and videos are read as files")
      for path in (args.annotations, args.videos)
    )
    subtitles = benchmarks.subtitles_of(videos, args.subtitles)
    print(write_task(args.out, TASKS[args.task], annotations, videos, subtitles))
