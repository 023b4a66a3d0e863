"""Benchmarks as the release asks and scores them: annotations to questions, answers to letters,
letters to averages.

All of it is pure text (FACTS.md 12): nothing here knows of models. `evaluate` and the lmms-eval
task files share it, so both have the same prompts and the same numbers.
"""

import argparse
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xcomp_jax.errors import XCompError, listed
from xcomp_jax.files import expanduser
from xcomp_jax.inputs import parse_json, quoted, read_json, read_text

CLOSING = "Answer with the option's letter from the given choices directly."
BEST_OPTION = "\nOnly give the best option."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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
SUBTITLE_FRAMES = 512  # LongVideoBench: moments at which a subtitle has to be seen
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


class TaskError(XCompError, ValueError):
  """Annotations that can't be used; the message says where and why."""


@dataclasses.dataclass(frozen=True)
class BenchmarkQuestion:
  """A question of a benchmark, ready to be asked.

  id: unique within the task. videos: names relative to the folder of videos, the likeliest first,
  suffix or not.
  start, end: seconds of the part to be watched. prompt: all that is said after the frames and the
  time message.
  options: their texts. answer: letter of the right one, "" where the annotation has none. groups:
  {kind of group: its name}; several names are joined by "; ".
  """

  id: str
  videos: tuple[str, ...]
  prompt: str
  options: tuple[str, ...]
  answer: str
  groups: dict[str, str]
  start: float | None = None
  end: float | None = None


@dataclasses.dataclass(frozen=True)
class Task:
  """How a benchmark is read and scored.

  question: (annotation, stem of its file, folder of subtitles) to Question, or None for what is not
  asked.
  letter: (answer, options) to the letter that counts as answered, or to something that is no
  letter.
  macro: the kind of group whose accuracies the macro average is over.
  skip_empty: empty answers leave the denominator.
  sizes: numbers of questions that published results are over.
  """

  name: str
  question: Callable[[Mapping[str, Any], str, pathlib.Path | None], BenchmarkQuestion | None]
  letter: Callable[[str, Sequence[str]], str]
  macro: str
  skip_empty: bool
  sizes: tuple[int, ...]


# --- answers
# ----------------------------------------------------------------------------------------

_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def any_letter(answer: str, options: Sequence[str] = ()) -> str:
  """LVBench, MLVU, MVBench: "X. text" is X; else the first A to E (or a to e) that stands alone;
  else the text (FACTS.md 12).

  So "A man" counts as A, and so does "a man". Marks go away where a blank is at their side (or a
  number has a comma), and become blanks elsewhere, as released.
  """
  stated = re.fullmatch(r"([A-E])\.\s*(.+)", answer.strip(), re.IGNORECASE)
  if stated:
    return stated[1].upper()
  text = answer.replace("\n", " ").replace("\t", " ").strip()
  number, out = re.search(r"\d,\d", text), text
  for mark in _MARKS:
    beside = f"{mark} " in text or f" {mark}" in text or number
    out = out.replace(mark, "" if beside else " ")
  # the release passes re.UNICODE, which is 32, as the count
  out = re.sub(r"\.(?!\d)", "", out, count=32)
  out = out.strip("'").strip('"').strip().lower()
  alone = re.search(r"\b[a-e]\b", out)
  return alone[0].upper() if alone else out


def first_capital(answer: str, options: Sequence[str] = ()) -> str:
  """VideoMME: the first capital A to D, wherever it stands, once some openings are cut; else
  nothing.

  So "b" counts as no answer, and "Best answer: C" as B: the release means to cut that opening, but
  lacks a comma.
  """
  for opening in ("The best answer is", "The correct answer is", "The answer is", "The answer"):
    answer = answer.replace(opening, "")
  found = re.search("[ABCD]", answer)
  return found[0] if found else ""


def bracketed_letter(answer: str, options: Sequence[str]) -> str:
  """LongVideoBench: the last "(X)", else the last "X ", else the last "X.", else the last option
  that is quoted; else nothing.

  Where the release finds nothing it draws a letter; here that is a wrong answer, so that numbers
  can be repeated.
  """
  for mark in ",.!?;:'":
    answer = answer.strip(mark)
  answer, letters = f" {answer} ", LETTERS[: len(options)]
  for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
    found = [letter for letter in letters if form.format(letter) in answer]
    if found:
      return found[int(np.argmax([answer.rfind(place.format(letter)) for letter in found]))]
  places = [answer.lower().rfind(option.lower()) for option in options]
  return letters[int(np.argmax(places))] if len(answer.split()) > 5 and max(places) >= 0 else ""


# --- prompts
# ----------------------------------------------------------------------------------------


def lvbench_prompt(question: str, options: Sequence[str]) -> str:
  """LVBench; the options carry letters of their own, hence "A. (A) ..."."""
  return (
    f"{question}\n"
    + "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options))
    + CLOSING
  )


def mlvu_prompt(question: str, options: Sequence[str], closing: str = CLOSING) -> str:
  """MLVU, multiple choice. closing: the release's default; VideoChat-Flash's own configuration has
  BEST_OPTION.
  """
  return f"Question:{question}\nOption:\n{_bracketed(options)}{closing}"


def mvbench_prompt(question: str, options: Sequence[str]) -> str:
  """MVBench."""
  return f"Question: {question}\nOption:\n{_bracketed(options)}{BEST_OPTION}"


def videomme_prompt(question: str, options: Sequence[str]) -> str:
  """VideoMME without subtitles; the options carry "A. "."""
  opening = (
    "These are the frames of a video. Select the best answer to the following multiple-choice "
    "question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
  )
  return f"{opening}\nQuestion: {question}\nOption:\n" + "\n".join(options) + f"\n{CLOSING}"


def longvideobench_prompt(question: str, options: Sequence[str], subtitles: str) -> str:
  """LongVideoBench with its subtitles, one per line."""
  listed = "\n".join(f"({letter}). {option}" for letter, option in zip(LETTERS, options))
  return (
    f" This video's subtitles are listed below: \n{subtitles}.\n Select the best answer to the "
    f"following multiple-choice "
    "question based on the video and the subtitles. Respond with only the letter of the correct "
    "option.\n"
    f"Question: {question}\n{listed}\n{CLOSING}\n"
  )


def _bracketed(options: Sequence[str]) -> str:
  return "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options))


def seen_subtitles(subtitles: Iterable[Mapping[str, Any]], duration: float, offset: float) -> str:
  """The subtitles that one of up to 512 evenly spaced moments falls into, one per line (FACTS.md
  12).

  Args:
    subtitles: {"timestamp": [start, end], "text"} in seconds, or {"start", "end", "line"} as
      "H:M:S.s".
    duration: of the video, seconds; also where an end that is no fraction is taken to be, as
      released.
    offset: what the subtitles' times start from.
  """
  count = SUBTITLE_FRAMES if duration > SUBTITLE_FRAMES else int(duration)
  moments = np.arange(count) * (duration / SUBTITLE_FRAMES if duration > SUBTITLE_FRAMES else 1.0)
  lines = []
  for subtitle in subtitles:
    if "timestamp" in subtitle:
      start, end = subtitle["timestamp"]
      end, text = end if isinstance(end, float) else duration, subtitle["text"]
    else:
      start, end, text = _seconds(subtitle["start"]), _seconds(subtitle["end"]), subtitle["line"]
    start, end = start - offset, end - offset
    if end - start < 1:
      start, end = (start + end) / 2 - 0.5, (start + end) / 2 + 0.5
    if ((start < moments) & (moments < end)).any():
      lines.append(text)
  return "\n".join(lines)


def _seconds(clock: str) -> float:
  hours, minutes, seconds = clock.split(":")
  return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


# --- annotations
# -----------------------------------------------------------------------------------------------


def _lvbench(item, stem, _):
  options = item["candidates"]
  groups = {"type": item.get("type", ""), "question type": "; ".join(item.get("question_type", ()))}
  prompt = lvbench_prompt(item["question"], options)
  return BenchmarkQuestion(
    "", (item["video"],), prompt, tuple(options), _right(item, options), groups
  )


def _mlvu(item, stem, _, closing=CLOSING):
  options = item["candidates"]
  return BenchmarkQuestion(
    "",
    (f"{stem}/{item['video']}", item["video"]),
    mlvu_prompt(item["question"], options, closing),
    tuple(options),
    _right(item, options),
    {"task": item["question_type"]},
  )


def _mlvu_best_option(item, stem, subtitles):
  return _mlvu(item, stem, subtitles, BEST_OPTION)


def _mvbench(item, stem, _):
  options, folder = item["candidates"], MVBENCH_FOLDERS.get(stem, stem)
  return BenchmarkQuestion(
    "",
    (f"{folder}/{item['video']}", f"{stem}/{item['video']}", item["video"]),
    mvbench_prompt(item["question"], options),
    tuple(options),
    _right(item, options),
    {"task": stem},
    item.get("start"),
    item.get("end"),
  )


def _videomme_long(item, stem, _):
  if item["duration"] != "long":
    return None
  groups = {
    "task": item.get("task_type", ""),
    "domain": item.get("domain", ""),
    "category": item.get("sub_category", ""),
  }
  options = tuple(item["options"])
  names = (item["videoID"], f"videos/{item['videoID']}", f"data/{item['videoID']}")
  return BenchmarkQuestion(
    "",
    names,
    videomme_prompt(item["question"], options),
    options,
    _letter(item["answer"], options),
    groups,
  )


def _longvideobench(item, stem, subtitles):
  options = item.get("candidates") or [
    item[f"option{i}"] for i in range(5) if item.get(f"option{i}", "N/A") != "N/A"
  ]
  if subtitles is None:
    raise TaskError(
      "LongVideoBench is asked with subtitles: give the folder that has them, --subtitles"
    )
  name = item["subtitle_path"]
  file = subtitles / (name if "_en.json" in name else name.replace(".json", "_en.json"))
  try:
    spoken = read_json(file, TaskError)
  except FileNotFoundError:
    raise TaskError(
      f"{file} does not exist; --subtitles is the folder of LongVideoBench's subtitles"
    ) from None
  listed = seen_subtitles(spoken, item["duration"], item["starting_timestamp_for_subtitles"])
  groups = {"duration": str(item["duration_group"]), "question category": item["question_category"]}
  names = (item["video_path"], f"videos/{item['video_path']}")
  prompt = longvideobench_prompt(item["question"], options, listed)
  choice = item["correct_choice"]
  answer = LETTERS[choice] if choice in range(len(options)) else _letter(choice, options)
  return BenchmarkQuestion("", names, prompt, tuple(options), answer, groups)


def _letters(item, stem, _):
  options = tuple(re.findall(r"^(?:\([A-E]\)|[A-E][.:)]) (.*)$", item["question"], re.MULTILINE))
  part = item.get("start"), item.get("end")
  return BenchmarkQuestion(
    "",
    (item["video"],),
    item["question"],
    options,
    _letter(item["answer"], options),
    {"file": stem},
    *part,
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
    f'them, such as "A"'
  )


def stated(answer: Any, count: int) -> str:
  """The letter of one of `count` options that an annotation's answer begins with: "A", "a", "A.",
  "(A)", "A. text"; "" if none.
  """
  found = re.fullmatch(
    r"\(?([a-z])([.:)]+(\s.*)?)?", str(answer).strip(), re.IGNORECASE | re.DOTALL
  )
  return found[1].upper() if found and found[1].upper() in LETTERS[:count] else ""


TASKS = {
  task.name: task
  for task in (
    Task("lvbench", _lvbench, any_letter, "type", True, (1519, 1549)),
    Task("mlvu", _mlvu, any_letter, "task", True, (2175,)),
    Task(
      "mlvu_best_option", _mlvu_best_option, any_letter, "task", True, (2175,)
    ),  # VideoChat-Flash's own closing words
    Task("videomme_long", _videomme_long, first_capital, "task", False, (900,)),
    Task("longvideobench", _longvideobench, bracketed_letter, "duration", False, (1337,)),
    Task("mvbench", _mvbench, any_letter, "task", True, (4000,)),
    Task(
      "letters", _letters, any_letter, "file", True, ()
    ),  # any VideoChat-Flash annotations whose answers are letters
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
    TaskError: no annotations of this task; the message says where.
  """
  files = (
    sorted(f for f in annotations.iterdir() if f.suffix in (".json", ".jsonl"))
    if annotations.is_dir()
    else [annotations]
  )
  found, faults = [], []
  for file in files:
    wrong: dict[str, list[int]] = {}  # by the reason
    for i, item in enumerate(_questions(file)):
      try:
        question = task.question(_whole(item), file.stem, subtitles)
      except Exception as error:  # it may hold anything
        wrong.setdefault(_reason(task, error), []).append(i)
        continue
      if question is not None:
        found.append(dataclasses.replace(question, id=f"{file.stem}/{i}"))
    faults += [
      f"{file}, question{'s' * (len(n) > 1)} {_places(n)}: {reason}" for reason, n in wrong.items()
    ]
  if faults:
    raise TaskError(
      faults[0] if len(faults) == 1 else listed(f"{annotations} has bad questions", faults)
    )
  if not found:
    raise TaskError(f"{annotations} holds no question of {task.name}")
  if not any(q.answer for q in found):
    raise TaskError(
      f"{annotations}: no question's answer is one of its options; write the option as it is in "
      f"the list, or its letter"
    )
  return found


def _reason(task: Task, error: Exception) -> str:
  if isinstance(error, TaskError):
    return str(error)
  return f"no annotation of {task.name}: " + (
    f"it has no {error}"
    if isinstance(error, KeyError)
    else f"{type(error).__name__}: {str(error)[:300]}"
  )


def _places(numbers: Sequence[int]) -> str:
  return ", ".join(map(str, numbers[:20])) + (
    f" and {len(numbers) - 20} more" if len(numbers) > 20 else ""
  )


def unanswerable(questions: Sequence[BenchmarkQuestion]) -> str:
  """How many questions have an answer that is none of their options, in words; "" if none."""
  lost = [q.id for q in questions if not q.answer]
  if not lost:
    return ""
  return (
    f"{len(lost)} of {len(questions)} questions have an answer that is none of their "
    f"options, such as {lost[0]}: nothing is right there"
  )


def _items(file: pathlib.Path) -> list[Any]:
  content = read_text(file, TaskError)
  if content.lstrip().startswith("["):
    return parse_json(content, file, TaskError)
  return [
    parse_json(line, f"{file}, line {n},", TaskError)
    for n, line in enumerate(content.split("\n"), 1)
    if line.strip()
  ]


def _questions(file: pathlib.Path) -> Iterator[Any]:
  """The questions of a file's annotations, with an error in the place of what can't be read."""
  for item in _items(file):
    try:
      yield from _each(item)
    except Exception as error:
      yield error


def _whole(item: Any) -> Any:
  if isinstance(item, Exception):
    raise item
  return item


def _each(item: Any) -> Iterable[Any]:
  """The questions that an annotation holds: itself, LVBench's own lines, or those of a
  conversation.
  """
  if isinstance(item, dict) and ("videos" in item or not isinstance(item.get("video", ""), str)):
    paths = [
      path
      for key in ("video", "videos")
      for path in (item[key] if isinstance(item.get(key), list) else [item.get(key)])
      if path is not None
    ]
    if len(paths) != 1 or not isinstance(paths[0], str):
      raise TaskError(f"it must have one video, the name of a file, not {quoted(paths, 60)}")
    item = {key: value for key, value in item.items() if key != "videos"} | {"video": paths[0]}
  if isinstance(item, dict) and (
    bad := [
      key for key in ("start", "end") if not isinstance(item.get(key), (int, float, type(None)))
    ]
  ):
    raise TaskError(f"its {bad[0]} is {quoted(item[bad[0]], 60)}; write seconds")
  if isinstance(item, dict) and "qa" in item:
    return _published(item)
  if isinstance(item, dict) and ("conversations" in item or "messages" in item):
    return _rounds(item)
  return [item]


def _rounds(item: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
  """The questions of a conversation, of {"from", "value"} or {"role", "content"}; what a system
  turn says is left out.
  """
  turns = [
    (t.get("from") or t.get("role"), t.get("value", t.get("content")))
    for t in item.get("conversations") or item["messages"]
  ]
  turns = [turn for turn in turns if turn[0] != "system"]
  for n, (who, said) in enumerate(turns):
    if who not in (("human", "user"), ("gpt", "assistant"))[n % 2] or not isinstance(said, str):
      raise TaskError(
        f"turn {n} of the conversation is {quoted({'from': who, 'value': said}, 100)}; write "
        f'questions "from": "human" and answers "from": "gpt" in turn, with text as "value"'
      )
  if len(turns) % 2 or not turns:
    raise TaskError(
      "the conversation does not end with an answer; write the right letter as its last turn, "
      '"from": "gpt"'
    )
  for (_, question), (_, answer) in zip(turns[::2], turns[1::2]):
    question = re.sub("^<(image|video)>\n?", "", question)
    if found := re.search("<(image|video)>", question):
      raise TaskError(
        f"{found[0]} is inside a question; leave it out, frames go first by themselves"
      )
    yield {**item, "question": question, "answer": answer}


def _published(video: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
  """LVBench's own lines: {"key", "type", "qa": [{"question": text and options, "answer": letter,
  ...}]}.
  """
  for item in video["qa"]:
    question, *options = re.split(r"\n(?=\([A-Z]\) )", item["question"])
    answer = next(
      (option for option in options if option.startswith(f"({item['answer']})")), item["answer"]
    )
    about = {"video": video["key"], "type": video.get("type", "")}
    yield item | about | {"question": question, "candidates": options, "answer": answer}


def subtitles_of(videos: pathlib.Path, given: str | None) -> pathlib.Path | None:
  """The folder of subtitles: the one given, or `subtitles` beside the videos if it is there."""
  folder = pathlib.Path(given) if given else videos.parent / "subtitles"
  return folder if folder.is_dir() else None


def find_video(videos: pathlib.Path, question: BenchmarkQuestion) -> pathlib.Path:
  """The video file, or folder of frames, of a question; where none is there, the likeliest name."""
  names = [videos / f"{name}{suffix}" for name in question.videos for suffix in SUFFIXES]
  # where pathlib raises, it is not there
  return next((name for name in names if os.path.exists(name)), names[0])


def missing(videos: pathlib.Path, questions: Sequence[BenchmarkQuestion]) -> str:
  """How many videos are not there, in words; "" if all are.

  Raises:
    FileNotFoundError: not one of them is.
  """
  every = {q.videos[0] for q in questions}
  lost = {
    q.videos[0]: find_video(videos, q)
    for q in questions
    if not os.path.exists(find_video(videos, q))
  }
  if len(lost) == len(every):
    raise FileNotFoundError(
      f"--videos {videos} has none of the {len(lost)} videos, such as {min(lost.values())}"
    )
  if not lost:
    return ""
  return (
    f"{len(lost)} of {len(every)} videos are missing, such as {min(lost.values())}: their "
    f"questions will count as wrong"
  )


# --- averages
# --------------------------------------------------------------------------------------------------


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
  counts = dict.fromkeys(("questions", "counted", "right", "empty", "unparsed", "failed"), 0)
  tally: dict[str, dict[str, list[int]]] = {}
  for question, answer in answered:
    letter = "" if answer is None else task.letter(answer, question.options)
    counts["questions"] += 1
    counts["failed"] += answer is None
    counts["empty"] += answer == ""
    counts["unparsed"] += bool(answer) and letter not in tuple(LETTERS[: len(question.options)])
    if answer == "" and task.skip_empty:
      continue
    right = answer is not None and question.answer != "" and letter == question.answer
    counts["counted"] += 1
    counts["right"] += right
    for kind, names in question.groups.items():
      for name in names.split("; "):
        cell = tally.setdefault(kind, {}).setdefault(name, [0, 0])
        cell[0] += right
        cell[1] += 1

  def share(right, counted):
    return 100 * right / counted if counted else 0.0

  groups = {
    kind: {
      name: {"accuracy": share(*cell), "right": cell[0], "counted": cell[1]}
      for name, cell in sorted(cells.items())
    }
    for kind, cells in sorted(tally.items())
  }
  macro = [cell["accuracy"] for cell in groups.get(task.macro, {}).values()]
  return {
    "micro": share(counts["right"], counts["counted"]),
    "macro": sum(macro) / len(macro) if macro else 0.0,
    "macro_over": task.macro,
    "counts": counts,
    "groups": groups,
  }


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
