"""The base of all errors that are raised about what a user gave, and words for messages."""

import errno
import os
import re
import resource
from collections.abc import Sequence
from typing import Any


class XCompError(Exception):
  """Says what was wrong, where, and what to do.

  `str(error)` is a line for people. `error.fields` has what the line names, for programs: `where`
  is the file, config key or option that is wrong; other fields are said where they are raised.
  """

  def __new__(cls, *args: Any, **fields: Any):
    """Keeps fields from bases that take none, such as OSError."""
    return super().__new__(cls, *args)

  def __init__(self, *args: Any, **fields: Any):
    super().__init__(*args)
    self.fields = fields


def too_many_files(error: BaseException) -> str:
  """Says what to do if an error, or what led to it, is that this process has as many files open as
  it may; else "".
  """
  causes: list[BaseException] = [error]
  while len(causes) < 20 and (before := causes[-1].__cause__ or causes[-1].__context__):
    causes.append(before)  # they may go round in a circle
  # Some libraries pass the system's words on without its number.
  words = f"{os.strerror(errno.EMFILE)}(?! in system)"
  if not any(
    getattr(cause, "errno", None) == errno.EMFILE or re.search(words, str(cause))
    for cause in causes
  ):
    return ""
  limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  more = 4096 if most == resource.RLIM_INFINITY else min(most, 4096)
  advice = (
    f"`ulimit -n {more}` allows more"
    if more > limit
    else "to allow more, raise the hard limit (`ulimit -Hn`)"
  )
  return (
    f"Too many open files: a process may have {limit} here; {advice}, and the same command goes on"
  )


def out_of_memory(error: BaseException) -> str:
  """Says what to do if an error is that the memory of the machine, or of a device, is used up; else
  "".
  """
  text = str(error)
  of_jax = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text
  if not isinstance(error, MemoryError) and not of_jax:
    return ""
  return (
    "it needs more memory than there is: take fewer frames (--max-frames, --select), or less at "
    "once (--clips-per-chunk, --batch, --ahead, --workers); "
    f"{one_line(text)[:200] or type(error).__name__}"
  )


def listed(text: str, lines: Sequence[str], shown: int = 50) -> str:
  """A message with a list, of which it shows the first lines."""
  more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
  return f"{text}:\n  " + "\n  ".join([*lines[:shown], *more])


def one_line(error: BaseException | str) -> str:
  """What an error says, on one line."""
  return " ".join(str(error).split())
