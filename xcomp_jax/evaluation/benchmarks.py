"""Benchmarks as the release asks and scores them: annotations to questions, letters to averages.

Nothing here knows of models. `evaluate` and the lmms-eval task files share it, so both have the
same prompts and the same numbers.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from xcomp_jax.data.subtitles import seen_subtitles
from xcomp_jax.errors import listed
from xcomp_jax.evaluation.annotations import TaskError, read_items
from xcomp_jax.evaluation.protocol import (
  BEST_OPTION,
  CLOSING,
  LETTERS,
  any_letter,
  bracketed_letter,
  first_capital,
  longvideobench_prompt,
  lvbench_prompt,
  mlvu_prompt,
  mvbench_prompt,
  spoken_subtitles,
  stated,
  videomme_prompt,
)
from xcomp_jax.files import expanduser
from xcomp_jax.inputs import quoted, read_json

# tried in turn behind a video's name
SUFFIXES = (
  "",
  ".mp4",
  ".mkv",
  ".webm",
  ".avi",
  ".mov",
  ".MP4",
)
MVBENCH_FOLDERS = {  # of MVBench's own archive, below its video folder
  "action_sequence": "star/Charades_v1_480",
  "action_prediction": "star/Charades_v1_480",
  "object_interaction": "star/Charades_v1_480",
  "action_antonym": "ssv2_video",
  "fine_grained_action": "Moments_in_Time_Raw/videos",
  "unexpected_action": "FunQA_test/test",
  "object_existence": "clevrer/video_validation",
  "moving_direction": "clevrer/video_validation",
  "moving_count": "clevrer/video_validation",
  "moving_attribute": "clevrer/video_validation",
  "counterfactual_inference": "clevrer/video_validation",
  "object_shuffle": "perception/videos",
  "action_count": "perception/videos",
  "state_change": "perception/videos",
  "character_order": "perception/videos",
  "action_localization": "sta/sta_video",
  "scene_transition": "scene_qa/video",
  "fine_grained_pose": "nturgbd",
  "egocentric_navigation": "vlnqa",
  "episodic_reasoning": "tvqa/frames_fps3_hq",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkQuestion:
  """A question of a benchmark, ready to be asked.

  id: unique within the task. videos: names relative to the folder of videos, the likeliest first,
  suffix or not.
  start, end: seconds of the part to be watched. prompt: all that is said after the frames and the
  time message.
  options: their texts. answer: letter of the right one, "" where the annotation has none. groups:
  {kind of group: its name}; several names are joined by "; ".
  """

  id: str = ""
  videos: tuple[str, ...]
  prompt: str
  options: tuple[str, ...]
  answer: str
  groups: dict[str, str]
  start: float | None = None
  end: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """How a benchmark is read and scored.

  question: (annotation, stem of its file, folder of subtitles) to the question, whose `id` comes
  later, or None for what is not asked.
  letter: (answer, options) to the letter that counts as answered, or to something that is no
  letter.
  macro: the kind of group whose accuracies the macro average is over.
  skip_empty: empty answers leave the denominator.
  sizes: numbers of questions that published results are over.
  """

  name: str
  question: Callable[[Mapping[str, Any], str, pathlib.Path | None], BenchmarkQuestion | None]
  letter: Callable[[str, Sequence[str]], str] = any_letter
  macro: str = "task"
  skip_empty: bool = True
  sizes: tuple[int, ...] = ()

  def judge(
    self, answer: str | None, options: Sequence[str], truth: str
  ) -> tuple[str | None, bool]:
    """Which letter an answer counts as, and whether that is right; no answer is no letter."""
    letter = None if answer is None else self.letter(answer, options)
    return letter, truth != "" and letter == truth


# --- annotations of each benchmark to questions


def _lvbench(item, stem, _):
  options = item["candidates"]
  return BenchmarkQuestion(
    prompt=lvbench_prompt(item["question"], options),
    videos=(item["video"],),
    options=tuple(options),
    answer=_right(item, options),
    groups={
      "type": item.get("type", ""),
      "question type": "; ".join(item.get("question_type", ())),
    },
  )


def _mlvu(item, stem, _, closing=CLOSING):
  options = item["candidates"]
  return BenchmarkQuestion(
    videos=(f"{stem}/{item['video']}", item["video"]),
    prompt=mlvu_prompt(item["question"], options, closing),
    options=tuple(options),
    answer=_right(item, options),
    groups={"task": item["question_type"]},
  )


def _mvbench(item, stem, _):
  options, folder = item["candidates"], MVBENCH_FOLDERS.get(stem, stem)
  return BenchmarkQuestion(
    videos=(f"{folder}/{item['video']}", f"{stem}/{item['video']}", item["video"]),
    prompt=mvbench_prompt(item["question"], options),
    options=tuple(options),
    answer=_right(item, options),
    groups={"task": stem},
    start=item.get("start"),
    end=item.get("end"),
  )


def _videomme_long(item, stem, _):
  if item["duration"] != "long":
    return None
  options = tuple(item["options"])
  return BenchmarkQuestion(
    videos=tuple(f"{folder}{item['videoID']}" for folder in ("", "videos/", "data/")),
    prompt=videomme_prompt(item["question"], options),
    options=options,
    answer=_letter(item["answer"], options),
    groups={
      "task": item.get("task_type", ""),
      "domain": item.get("domain", ""),
      "category": item.get("sub_category", ""),
    },
  )


def _longvideobench(item, stem, subtitles):
  options = item.get("candidates") or [
    item[f"option{i}"] for i in range(5) if item.get(f"option{i}", "N/A") != "N/A"
  ]
  if subtitles is None:
    raise TaskError(
      "LongVideoBench is asked with subtitles: give the folder that has them, --subtitles",
      where="--subtitles",
    )
  name = item["subtitle_path"]
  file = subtitles / (name if "_en.json" in name else name.replace(".json", "_en.json"))
  try:
    spoken = read_json(file, TaskError)
  except FileNotFoundError:
    raise TaskError(
      f"{file} does not exist; --subtitles is the folder of LongVideoBench's subtitles", where=file
    ) from None
  lasts, begins = item["duration"], item["starting_timestamp_for_subtitles"]
  seen = seen_subtitles(spoken_subtitles(spoken, lasts), lasts, begins)
  choice = item["correct_choice"]
  return BenchmarkQuestion(
    videos=(item["video_path"], f"videos/{item['video_path']}"),
    prompt=longvideobench_prompt(item["question"], options, seen),
    options=tuple(options),
    answer=LETTERS[choice] if choice in range(len(options)) else _letter(choice, options),
    groups={
      "duration": str(item["duration_group"]),
      "question category": item["question_category"],
    },
  )


def _letters(item, stem, _):
  options = tuple(re.findall(r"^(?:\([A-E]\)|[A-E][.:)]) (.*)$", item["question"], re.MULTILINE))
  return BenchmarkQuestion(
    videos=(item["video"],),
    prompt=item["question"],
    options=options,
    answer=_letter(item["answer"], options),
    groups={"file": stem},
    start=item.get("start"),
    end=item.get("end"),
  )


def _right(item, options) -> str:
  """The letter of the option that is the answer; "" if none is, as in two questions of MLVU: no
  answer is right then.
  """
  answer = item["answer"]
  return LETTERS[options.index(answer)] if answer in options else stated(answer, len(options))


def _letter(answer: Any, options: Sequence[str]) -> str:
  """The letter of an answer that has to be one."""
  count = len(options) or 5  # `any_letter` finds no others
  if letter := stated(answer, count):
    return letter
  raise TaskError(
    f"its answer {quoted(answer)} is none of the letters A to {LETTERS[count - 1]}; write one of "
    f'them, such as "A"',
    where="answer",
    value=answer,
    allowed=LETTERS[:count],
  )


_best_option = functools.partial(_mlvu, closing=BEST_OPTION)  # VideoChat-Flash's own closing words
TASKS = {
  task.name: task
  for task in (
    Task(name="lvbench", question=_lvbench, macro="type", sizes=(1519, 1549)),
    Task(name="mlvu", question=_mlvu, sizes=(2175,)),
    Task(name="mlvu_best_option", question=_best_option, sizes=(2175,)),
    Task(
      name="videomme_long",
      question=_videomme_long,
      letter=first_capital,
      skip_empty=False,
      sizes=(900,),
    ),
    Task(
      name="longvideobench",
      question=_longvideobench,
      letter=bracketed_letter,
      macro="duration",
      skip_empty=False,
      sizes=(1337,),
    ),
    Task(name="mvbench", question=_mvbench, sizes=(4000,)),
    # any VideoChat-Flash annotations whose answers are letters
    Task(name="letters", question=_letters, macro="file"),
  )
}


def read_questions(
  task: Task, annotations: pathlib.Path, subtitles: pathlib.Path | None = None
) -> list[BenchmarkQuestion]:
  """The questions of a file (a JSON list, or JSON lines), or of all such files in a folder, in the
  order of their names.

  LVBench may also be the lines that its authors publish (1,549 questions), with the options inside
  the question.

  Raises:
    FileNotFoundError: there is no such file or folder.
    TaskError: no annotations of this task; the message says where. fields: `faults`, for each
      reason the fields of its error, the `file` and numbers of `questions`.
  """
  files = (
    sorted(f for f in annotations.iterdir() if f.suffix in (".json", ".jsonl"))
    if annotations.is_dir()
    else [annotations]
  )
  found: list[BenchmarkQuestion] = []
  faults: dict[tuple[pathlib.Path, str], dict[str, Any]] = {}  # by the file and the reason
  for file in files:
    for i, item in enumerate(read_items(file)):
      try:
        if isinstance(item, Exception):
          raise item
        question = task.question(item, file.stem, subtitles)
      except Exception as error:  # it may hold anything
        fault = _fault(task, error)
        about = {**fault.fields, "file": file.name, "questions": []}
        faults.setdefault((file, str(fault)), about)["questions"].append(i)
      else:
        if question is not None:
          found.append(dataclasses.replace(question, id=f"{file.stem}/{i}"))
  if faults:
    lines = [
      f"{file}, {_places(about['questions'])}: {reason}" for (file, reason), about in faults.items()
    ]
    says = lines[0] if len(lines) == 1 else listed(f"{annotations} has bad questions", lines)
    raise TaskError(says, where=annotations, faults=list(faults.values()))
  if not found:
    raise TaskError(f"{annotations} holds no question of {task.name}", where=annotations, found=0)
  if not any(q.answer for q in found):
    raise TaskError(
      f"{annotations}: no question's answer is one of its options; write the option as it is in "
      f"the list, or its letter",
      where=annotations,
      found=len(found),
    )
  return found


def _fault(task: Task, error: Exception) -> TaskError:
  """What is wrong with an annotation."""
  if isinstance(error, TaskError):
    return error
  says, where = f"{type(error).__name__}: {str(error)[:300]}", type(error).__name__
  if isinstance(error, KeyError):
    says, where = f"it has no {error}", error.args[0]
  return TaskError(f"no annotation of {task.name}: {says}", where=where)


def _places(numbers: Sequence[int]) -> str:
  more = f" and {len(numbers) - 20} more" if len(numbers) > 20 else ""
  return f"question{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:20]))}{more}"


def subtitles_of(videos: pathlib.Path, given: str | None) -> pathlib.Path | None:
  """The folder of subtitles: the one given, or `subtitles` beside the videos if it is there."""
  folder = pathlib.Path(given) if given else videos.parent / "subtitles"
  return folder if folder.is_dir() else None


def find_video(videos: pathlib.Path, question: BenchmarkQuestion) -> pathlib.Path:
  """The video file, or folder of frames, of a question; where none is there, the likeliest name."""
  names = [videos / f"{name}{suffix}" for name in question.videos for suffix in SUFFIXES]
  # where pathlib raises, it is not there
  return next((name for name in names if os.path.exists(name)), names[0])


def say_doubts(videos: pathlib.Path, questions: Sequence[BenchmarkQuestion]) -> None:
  """Says on stderr how many questions nobody can answer rightly, for their answer is none of their
  options, and how many videos are not there.

  Raises:
    FileNotFoundError: not one video is.
  """
  named = {q.videos[0] for q in questions}  # of other names one question may have more than another
  places = {q.videos[0]: p for q in questions if not os.path.exists(p := find_video(videos, q))}
  missing = places.values()
  if len(missing) == len(named):
    raise FileNotFoundError(
      f"--videos {videos} has none of the {len(missing)} videos, such as {min(missing)}"
    )
  if unanswerable := [q.id for q in questions if not q.answer]:
    print(
      f"{len(unanswerable)} of {len(questions)} questions have an answer that is none of their "
      f"options, such as {unanswerable[0]}: nothing is right there",
      file=sys.stderr,
    )
  if missing:
    print(
      f"{len(missing)} of {len(named)} videos are missing, such as {min(missing)}: their "
      f"questions will count as wrong",
      file=sys.stderr,
    )


def score_answers(
  task: Task, answered: Iterable[tuple[BenchmarkQuestion, str | None]]
) -> dict[str, Any]:
  """Accuracies of questions with their answers (None: its video could not be read, which counts as
  wrong).

  Returns:
    `micro`, per question, as the release reports groups; `macro`, the mean over the groups of
    `task.macro`, as upstream lmms-eval reports MLVU; both in percent. `counts`; `groups`, {kind:
    {name: {"accuracy", "right", "counted"}}}.
  """
  judged = [(q, answer, *task.judge(answer, q.options, q.answer)) for q, answer in answered]
  counted = [(q, right) for q, answer, _, right in judged if answer != "" or not task.skip_empty]
  tally: dict[str, dict[str, list[bool]]] = {}  # which answers were right
  for question, right in counted:
    for kind, names in question.groups.items():
      for name in names.split("; "):
        tally.setdefault(kind, {}).setdefault(name, []).append(right)
  groups = {
    kind: {name: _accuracy(right) for name, right in sorted(names.items())}
    for kind, names in sorted(tally.items())
  }
  macro = [cell["accuracy"] for cell in groups.get(task.macro, {}).values()]
  whole = _accuracy([right for _, right in counted])
  return {
    "micro": whole["accuracy"],
    "macro": sum(macro) / len(macro) if macro else 0.0,
    "macro_over": task.macro,
    "counts": {
      "questions": len(judged),
      "counted": whole["counted"],
      "right": whole["right"],
      "empty": sum(answer == "" for _, answer, _, _ in judged),
      "unparsed": sum(
        bool(answer) and letter not in tuple(LETTERS[: len(q.options)])
        for q, answer, letter, _ in judged
      ),
      "failed": sum(answer is None for _, answer, _, _ in judged),
    },
    "groups": groups,
  }


def _accuracy(right: Sequence[bool]) -> dict[str, float]:
  """In percent, 0 of no answers at all, and the numbers that it comes from."""
  accuracy = 100 * sum(right) / len(right) if right else 0.0
  return {"accuracy": accuracy, "right": sum(right), "counted": len(right)}


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options that say which questions: --task, --annotations, --videos and --subtitles."""
  add = parser.add_argument
  add("--task", required=True, choices=TASKS)
  add(
    "--annotations",
    type=expanduser,
    required=True,
    help="file, or folder of files (MLVU, MVBench)",
  )
  add("--videos", type=expanduser, required=True, help="folder of videos, or of folders of frames")
  add(
    "--subtitles",
    type=expanduser,
    help="folder of LongVideoBench's subtitles; default: `subtitles` beside --videos",
  )
