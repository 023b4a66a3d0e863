"""How the release asks, and which letter counts as an answer: pure text (FACTS.md 12)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from xcomp_jax.data.subtitles import Subtitle, listed_subtitles

CLOSING = "Answer with the option's letter from the given choices directly."
BEST_OPTION = "\nOnly give the best option."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
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
  number = re.search(r"\d,\d", text)
  out = text
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


def stated(answer: Any, count: int) -> str:
  """The letter of one of `count` options that an annotation's answer begins with: "A", "a", "A.",
  "(A)", "A. text"; "" if none.
  """
  found = re.fullmatch(
    r"\(?([a-z])([.:)]+(\s.*)?)?", str(answer).strip(), re.IGNORECASE | re.DOTALL
  )
  return found[1].upper() if found and found[1].upper() in LETTERS[:count] else ""


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
    "question based on the video. Respond with only the letter (A, B, C, or D) of the correct "
    "option."
  )
  return f"{opening}\nQuestion: {question}\nOption:\n" + "\n".join(options) + f"\n{CLOSING}"


def longvideobench_prompt(question: str, options: Sequence[str], subtitles: str) -> str:
  """LongVideoBench with its subtitles, one per line."""
  listed = "\n".join(f"({letter}). {option}" for letter, option in zip(LETTERS, options))
  return (
    f"{listed_subtitles(subtitles)}Select the best answer to the following multiple-choice "
    "question based on the video and the subtitles. Respond with only the letter of the correct "
    "option.\n"
    f"Question: {question}\n{listed}\n{CLOSING}\n"
  )


def _bracketed(options: Sequence[str]) -> str:
  return "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options))


def spoken_subtitles(items: Iterable[Mapping[str, Any]], duration: float) -> list[Subtitle]:
  """LongVideoBench's subtitles.

  Args:
    items: {"timestamp": [start, end], "text"} in seconds, or {"start", "end", "line"} as "H:M:S.s".
    duration: of the video, seconds, which is where an end that is no fraction is taken to be, as
      released.
  """
  found = []
  for item in items:
    if "timestamp" in item:
      start, end = item["timestamp"]
      found.append(Subtitle(start, end if isinstance(end, float) else duration, item["text"]))
    else:
      found.append(Subtitle(_seconds(item["start"]), _seconds(item["end"]), item["line"]))
  return found


def _seconds(clock: str) -> float:
  hours, minutes, seconds = clock.split(":")
  return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
