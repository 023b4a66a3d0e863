"""What a user names, read so that nothing hangs, and that whatever is wrong is one kind of error
with the file's name.

docs/promises.md says what is held here: only regular files are opened, text is UTF-8, numbers have
bounds, and every reader's own exceptions become one.
"""

import argparse
import contextlib
import json
import os
import pathlib
import reprlib
import stat
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from xcomp_jax.errors import XCompError
from xcomp_jax.files import one_line, too_many_files

Number = TypeVar("Number", int, float)

TEXT = 1 << 30  # bytes of a text file, at most: ten times the largest annotations known
# likewise of one that describes other files; the largest tokenizers have half of that
ABOUT = 64 << 20
ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit)  # are no fault of a file


class NoFileError(XCompError, OSError):
  """A pipe, a device or a folder where a file has to be; the message names it."""


class BoundsError(argparse.ArgumentTypeError, ValueError):
  """An option's value that is no number, or out of bounds."""


@contextlib.contextmanager
def reading(path: str | os.PathLike, kind: type[Exception], what: str = "") -> Generator[None]:
  """Makes whatever a reader raises about a file one `kind` of error, whose text begins with the
  file's name.

  Libraries that are written in Rust raise panics, which are no Exception. What the system says of
  the file itself (it is not there, no permission) and a process with too many open files stay an
  OSError.

  Args:
    path: the file, or folder.
    kind: raised as it is, or made.
    what: it should have been, such as "an encoded video".
  """
  try:
    yield
  except BaseException as error:
    if isinstance(error, (kind, NoFileError, *ENDINGS)):
      raise
    if text := too_many_files(error):
      raise OSError(text) from error
    if (
      isinstance(error, OSError)
      and error.errno is not None
      and error.filename in (None, path, os.fspath(path))
    ):
      raise OSError(
        error.errno, error.strerror, os.fspath(path)
      ) from error  # becomes the kind that stands for the number
    # Orbax raises a bare Exception that says how it reads; TensorStore, whose error led to that,
    # says what is wrong.
    inner = (type(error) is Exception and error.__cause__) or error
    says = (
      "it needs more memory than there is"
      if isinstance(error, MemoryError)
      else one_line(inner) or type(inner).__name__
    )
    fields = {"where": path} if issubclass(kind, XCompError) else {}
    raise kind(
      f"{printable(path)} is {f'no {what}' if what else 'damaged'}: {says[:500]}", **fields
    ) from error


def regular(path: str | os.PathLike, pipes: bool = False) -> pathlib.Path:
  """The path of a regular file; opening a pipe or a device may wait for ever, or never end.

  pipes: also of a pipe.

  Raises:
    FileNotFoundError, PermissionError: from the system.
    NoFileError: it is something else.
  """
  mode = os.stat(path).st_mode
  if not stat.S_ISREG(mode) and not (pipes and stat.S_ISFIFO(mode)):
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise NoFileError(
      f"{printable(path)} is {kinds.get(stat.S_IFMT(mode), 'a device')}, and must be a "
      f"file{' or a pipe' * pipes}"
    )
  return pathlib.Path(path)


def read_text(
  path: str | os.PathLike, kind: type[Exception], most: int = TEXT, pipes: bool = False
) -> str:
  """The text of a file in UTF-8, with or without a mark at its start.

  pipes: it may also be a pipe, or "-", which is standard input. A pipe that nobody writes to is
  empty.

  Raises:
    OSError: it can't be read.
    kind: it is larger than `most` bytes, or no UTF-8; says at which line.
  """
  file, path = (0, "standard input") if pipes and path == "-" else (regular(path, pipes), path)
  with (
    reading(path, kind),
    open(file, "rb", closefd=file != 0, opener=_at_once if pipes else None) as opened,
  ):
    size = os.fstat(opened.fileno()).st_size  # 0 of a pipe
    content = b"" if size > most else opened.read(most + 1) if pipes else opened.read()
    if max(size, len(content)) > most:
      raise kind(f"{printable(path)} has more than the {most:,} bytes that it may have")
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise kind(
      f"{printable(path)}, line {line}: byte {content[error.start]:#04x} is no UTF-8; save it as "
      f"UTF-8"
    ) from error


def _at_once(path: str, flags: int) -> int:
  """Opens a pipe without waiting for somebody who writes to it."""
  handle = os.open(path, flags | os.O_NONBLOCK)
  os.set_blocking(handle, True)
  return handle


def read_json(path: str | os.PathLike, kind: type[Exception], most: int = TEXT) -> Any:
  """What a JSON file holds.

  Raises:
    OSError: it can't be read.
    kind: no UTF-8, no JSON, or nested too deeply.
  """
  return parse_json(read_text(path, kind, most), path, kind)


def parse_json(content: str, where: str | os.PathLike, kind: type[Exception]) -> Any:
  """What JSON says; where: for the message.

  Raises:
    kind: no JSON, or nested too deeply.
  """
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as error:
    says = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
    raise kind(f"{printable(where)} is no JSON: {says}") from error


def plain(said: str, what: str, kind: type[Exception] = ValueError) -> str:
  """Text that a person gave, if it is text: the system passes on bytes that are no UTF-8 as lone
  surrogates.

  Raises:
    kind: it holds such bytes.
  """
  try:
    said.encode()
  except UnicodeEncodeError as error:
    raise kind(f"{what} {quoted(said)} holds bytes that are no UTF-8") from error
  return said


def quoted(value: Any, most: int = 200) -> str:
  """Shows a value in a message; of one that is long or deep only a part, for it may unfold without
  end.
  """
  if isinstance(value, str):
    return repr(value if len(value) <= most else value[:most] + "...")
  short = reprlib.Repr()
  short.maxlevel, short.maxstring, short.maxother = 3, most, most
  try:
    return short.repr(value)[: 2 * most]
  except ValueError:  # Python does not write integers of more than 4,300 digits
    return f"a long {type(value).__name__}"


def printable(name: Any) -> str:
  """A name for a message: what can't be printed is escaped."""
  shown = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
  return (
    shown
    if shown.isprintable()
    else shown.encode("unicode_escape", "backslashreplace").decode("ascii")
  )


def beside(name: Any) -> bool:
  """Whether what a file says is the name of another file in the same folder; files may name no
  others.
  """
  return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\0"} & {*name}


def beyond(name: str, value: Any, bounds: range) -> str:
  """Says that what a file has for an integer is none within bounds; "" if it is."""
  if type(value) is int and value in bounds:
    return ""
  return f"{name} = {quoted(value, 100)}: must be an integer from {bounds[0]:,} to {bounds[-1]:,}"


def number(low: Number, high: Number, kind: type[Number]) -> Callable[[str], Number]:
  """Reads an option's number, from `low` to `high`; for argparse, which names the option."""

  def read(said: str) -> Number:
    try:
      value: Number | None = kind(said)
    except ValueError:
      value = None
    if value is None or not low <= value <= high:  # also what is no number
      raise BoundsError(
        f"{said}: must be {'an integer' if kind is int else 'a number'} from {low:,} to {high:,}"
      )
    return value

  return read
