"""How far long work is: a bar where somebody watches, a line now and then in a log."""

import sys
from typing import Any

SECONDS = 30.0  # between two lines of a log


def progress(*things: Any, seconds: float | None = None, **how: Any) -> Any:
  """A bar of `tqdm` on stderr, by its arguments.

  Where stderr is no terminal it is a line every half minute (`seconds`) and a last one, and nothing
  at all of work that takes less.
  """
  from tqdm import tqdm  # not at the top: the benchmarks run without it

  if not sys.stderr.isatty():
    seconds = SECONDS if seconds is None else seconds
    how |= {"file": _Log(), "mininterval": seconds, "delay": seconds, "miniters": 1}
  return tqdm(*things, **how)


class _Log:
  """Makes lines of what would be drawn one over the other."""

  def write(self, text: str) -> None:
    if text.strip():
      print(text.strip(), file=sys.stderr, flush=True)

  def flush(self) -> None:
    pass
