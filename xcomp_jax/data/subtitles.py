"""Subtitles of a video: read from a file, and placed in a prompt as the release places
LongVideoBench's (FACTS.md 12).
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from xcomp_jax.errors import XCompError
from xcomp_jax.inputs import read_text, reading

MOMENTS = 512  # at one of which a subtitle has to be seen
LARGEST = 1 << 23  # bytes of a file, at most
OPEN = 1000  # marks of style that begin and don't end, at most


class SubtitleError(XCompError, ValueError):
  """A file that holds no subtitles; the message names it."""


@dataclasses.dataclass(frozen=True)
class Subtitle:
  """What is said from `start` to `end`, in seconds."""

  start: float
  end: float
  text: str


def read_subtitles(path: str | os.PathLike) -> list[Subtitle]:
  """Reads a file of SubRip (.srt), WebVTT (.vtt), SubStation Alpha (.ass, .ssa), or another kind
  that pysubs2 tells by its content. Comments, drawings and marks of style are left out, and a text
  of several lines becomes one.

  Raises:
    OSError: it can't be read.
    SubtitleError: it holds no subtitles, is no UTF-8, or has more than LARGEST bytes.
  """
  import pysubs2  # not at the top: few ask with subtitles

  content = read_text(path, SubtitleError, LARGEST)
  with reading(path, SubtitleError, "file of subtitles (.srt, .vtt or .ass)"):
    # from each of them pysubs2 searches the rest of the text
    marks = (part.count(begin) for begin, end in ("<>", "{}") for part in content.split(end))
    if max(marks) > OPEN:
      raise ValueError(f"more than {OPEN:,} marks of style begin and don't end")
    events = sorted(pysubs2.SSAFile.from_string(content), key=lambda event: event.start)
    found = [
      Subtitle(event.start / 1000, event.end / 1000, text)
      for event in events
      if event.is_text and (text := " ".join(event.plaintext.split()))
    ]
    if not found:
      raise ValueError("it holds no text")
  return found


def seen_subtitles(subtitles: Sequence[Subtitle], duration: float, offset: float) -> str:
  """The subtitles that one of up to MOMENTS evenly spaced moments falls into, one per line.

  duration: seconds of what is watched. offset: second of the subtitles' clock at which it begins.
  """
  count = min(int(duration), MOMENTS)
  moments = np.arange(count) * max(duration / MOMENTS, 1.0)
  lines = []
  for one in subtitles:
    start, end = one.start - offset, one.end - offset
    if end - start < 1:
      start, end = (start + end) / 2 - 0.5, (start + end) / 2 + 0.5
    if ((start < moments) & (moments < end)).any():
      lines.append(one.text)
  return "\n".join(lines)


def listed_subtitles(seen: str) -> str:
  """What stands before a question about a video with these subtitles, one per line."""
  return f" This video's subtitles are listed below: \n{seen}.\n "
