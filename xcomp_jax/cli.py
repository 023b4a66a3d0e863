"""How a command ends, and what all commands have."""

import contextlib
import errno
import io
import logging
import os
import re
import select
import sys
import tempfile
from collections.abc import Generator, Sequence
from typing import TextIO

from xcomp_jax.errors import one_line, out_of_memory, too_many_files
from xcomp_jax.files import HomeError, absolute, expanduser

LOG = logging.getLogger(__name__)


def keep_compiled(folder: str | None, default: str | None = None) -> None:
  """Has JAX keep compiled programs; where that can't be written, it says so in a line and keeps
  none.

  folder: where; "": nowhere; None: as the environment says, else in `default`.
  """
  import jax

  before = jax.config.jax_compilation_cache_dir  # ty: ignore[missing-attribute]  (made at run time)
  wanted = (before or default) if folder is None else folder
  try:
    if wanted and "://" in wanted:
      from etils import epath

      epath.Path(wanted).mkdir(parents=True, exist_ok=True)
    elif wanted:
      wanted = absolute(expanduser(wanted))
      os.makedirs(wanted, exist_ok=True)
      tempfile.TemporaryFile(dir=wanted).close()
  except Exception as error:  # a bucket's client has errors of its own
    why = (
      one_line(error)
      if isinstance(error, HomeError)
      else f"{wanted} can't be written: {one_line(error)}"
    )
    LOG.warning("compiled programs are not kept: %s", why)
    wanted = None
  if (wanted or None) != before:
    jax.config.update("jax_compilation_cache_dir", wanted or None)


class _Said(logging.Handler):
  """Prints what the package logs to stderr, wherever that goes by then."""

  def emit(self, record: logging.LogRecord) -> None:
    print(record.getMessage(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _saying() -> Generator[None]:
  """Has a command say what a program that uses the package would find in its log."""
  said, package = _Said(), logging.getLogger("xcomp_jax")
  package.addHandler(said)
  before, package.propagate = package.propagate, False
  try:
    yield
  finally:
    package.removeHandler(said)
    package.propagate = before


@contextlib.contextmanager
def command(*errors: type[Exception], interrupted: str = "interrupted") -> Generator[None]:
  """The body of a command: an error of the user's is one line on stderr and exit code 1, Ctrl-C
  ends with 130.

  Who stops reading what it prints (`| head`) ends it with 141 and no word. What stdout can't spell
  is escaped.

  Args:
    errors: kinds that are the user's, beside ValueError and OSError.
    interrupted: what is said after Ctrl-C.
  """
  with contextlib.suppress(ModuleNotFoundError):  # the benchmarks run without it
    from tqdm import tqdm

    # an interrupt that comes while tqdm starts its thread of this is taken for the thread's error,
    # and lost
    tqdm.monitor_interval = 0
  try:
    _streams()
    with _saying():
      yield
    sys.stdout.flush()
  except Exception as error:
    if isinstance(error, BrokenPipeError) and _unread(sys.stdout):
      _give_up_stdout()
      sys.exit(141)
    memory, advice = out_of_memory(error), too_many_files(error)
    if not (memory or advice or isinstance(error, (ValueError, OSError, *errors))):
      raise
    text = memory or str(error)
    if (
      isinstance(error, OSError)
      and error.errno in (errno.ENOSPC, errno.EDQUOT)
      and error.filename is None
    ):
      text += ", for what stdout goes to, or a temporary file"  # what else is written has a name
    print(f"error: {text}" + (f"; {advice}" if advice not in text else ""), file=sys.stderr)
    _give_up_stdout()
    sys.exit(1)
  except KeyboardInterrupt:
    print(interrupted, file=sys.stderr)
    sys.exit(130)


def hyphenated(argv: Sequence[str]) -> list[str]:
  """Returns a command's arguments with the names of options spelled as they are now: earlier
  versions wrote some with underscores, which a line on stderr says.

  The names of a config's values, which have dots, stay.
  """
  parts = [argument.partition("=") for argument in argv]
  now = {
    name: name.replace("_", "-")
    for name, _, _ in parts
    if "_" in name and re.fullmatch(r"--\w[\w-]*", name)
  }
  if now:
    names = ", ".join(f"{new} for {old}" for old, new in now.items())
    print(f"options have hyphens now: write {names}", file=sys.stderr)
  return [now.get(name, name) + equals + value for name, equals, value in parts]


def _give_up_stdout() -> None:
  """Drops what can't be printed, or Python would fail at it once more at its end."""
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _unread(stream: TextIO | io.TextIOBase) -> bool:
  """Whether a stream goes to a pipe whose reader has left; a broken pipe may also be a
  network's.
  """
  look = select.poll()
  look.register(stream.fileno(), 0)
  return any(events & select.POLLERR for _, events in look.poll(0))


def _streams() -> None:
  """Makes what a shell has closed safe to use: the next file that is opened would become stdout.

  Raises:
    OSError: stdout is closed, and answers would be lost.
  """
  missing = [
    number for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)) if stream is None
  ]
  for _ in missing:
    os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
  sys.stdin = sys.stdin or open(0, closefd=False)
  sys.stdout = sys.stdout or open(1, "w", closefd=False)
  sys.stderr = sys.stderr or open(2, "w", closefd=False)
  if 1 in missing:
    raise OSError(
      "stdout is closed, and what is printed would be lost; send it to a file, or to /dev/null"
    )
  # as stderr does
  for stream, handling in (
    (sys.stdin, "surrogateescape"),
    (sys.stdout, "backslashreplace"),
  ):
    if isinstance(stream, io.TextIOWrapper):  # not in a test
      stream.reconfigure(errors=handling)
