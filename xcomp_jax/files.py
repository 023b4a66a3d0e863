"""Files and folders that are there whole or not at all, and what commands say when something goes wrong."""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import resource
import shutil
import sys
import tempfile
import uuid
from collections.abc import Generator, Sequence
from typing import Any


def local(path: str | os.PathLike, why: str, written: bool = False) -> pathlib.Path:
  """A path of this machine.

  Args:
    path: with or without a scheme; a leading ~ is the home directory.
    why: it has to be one, for the message.
    written: it is a result, not what is read.

  Raises:
    ValueError: it is in a bucket.
  """
  if found := re.match("(gs|s3|az):/+(.*)", os.fspath(path)):  # a pathlib.Path has one slash left
    advice = (
      "Give a folder of this machine, and copy it when it is done (`gcloud storage cp -r`)" if written
      else "Copy it to this machine (`gcloud storage cp -r`) or mount the bucket (`gcsfuse`), and give that path"
    )  # fmt: skip
    raise ValueError(f"{found[1]}://{found[2]} is in a bucket, but {why}. {advice}")
  return path_of(path)


class HomeError(ValueError, argparse.ArgumentTypeError):  # argparse shows the text of the latter
  """A path begins with ~, and there is no home directory."""


def expanduser(path: str | os.PathLike) -> str:
  """A path in which a leading ~ is the home directory: shells see to that only where it begins a word, not in --out=~/x.

  Raises:
    HomeError: there is none, as in a container whose user is a mere number. A folder named ~ would come of it.
  """
  found = os.path.expanduser(path)
  if found.partition(os.sep)[0] == "~":
    raise HomeError(f"{found}: ~ is the home directory, and this user has none; give a path without it, or set HOME")
  return os.fspath(found)


def path_of(path: str | os.PathLike) -> pathlib.Path:
  """`expanduser`, as a path."""
  return pathlib.Path(expanduser(path))


@contextlib.contextmanager
def replacing(target: str | os.PathLike) -> Generator[pathlib.Path]:
  """A name to write a file to, which becomes `target`, and reaches the disk, when the block ends well.

  When the block fails the file is removed; one that is not there in the end is not missed.
  """
  target = pathlib.Path(target)
  # Machines that share the folder may have processes of the same number.
  temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
  try:
    yield temporary
    if temporary.exists():
      sync(temporary)
      os.replace(temporary, target)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write(target: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file (text as UTF-8) that is there whole or not at all."""
  with replacing(target) as temporary:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(target: str | os.PathLike, value: Any, indent: int | None = None) -> None:
  """Writes a value as JSON, whole or not at all; with `indent` for people: lines, sorted keys."""
  write(target, json.dumps(value, indent=indent, sort_keys=indent is not None) + ("" if indent is None else "\n"))


def sync(path: str | os.PathLike) -> None:
  """Waits until a file has reached the disk: no name may be older than what it stands for, should the machine stop."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


@contextlib.contextmanager
def fresh_folder(target: str | os.PathLike, replace: bool = False) -> Generator[pathlib.Path]:
  """An empty folder to write into, which becomes `target` by one rename when the block ends well.

  When the block fails the folder is removed; what a killed process left is removed by the next one.

  Args:
    target: folder to be, whole or not at all.
    replace: a folder that is there goes when the new one is whole.

  Raises:
    FileExistsError: target is already there.
    OSError: it can't be made.
    ValueError: it is in a bucket, where no folder can be renamed.
  """
  target = local(target, "a folder that is whole or not at all appears by a rename", written=True).absolute()
  if not replace and target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise FileExistsError(f"{target} already exists; remove it or choose another folder")
  temporary = target.with_name(target.name + ".incomplete")
  try:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
  except OSError as error:
    raise OSError(f"{target} can't be written: {error.strerror or error}") from error
  try:
    yield temporary
    if replace and target.exists():
      shutil.rmtree(target)
    os.rename(temporary, target)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


@contextlib.contextmanager
def locked(file: str | os.PathLike, taken: Exception) -> Generator[None]:
  """Keeps other processes out of what a lock file stands for, as far as its file system has locks.

  Raises:
    taken: another process holds it.
  """
  with open(file, "w") as handle:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise taken from error
    except OSError:  # no locks here
      pass
    yield


def keep_compiled(folder: str | None, default: str | None = None) -> None:
  """Has JAX keep compiled programs; where that can't be written, it says so in a line and keeps none.

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
      wanted = os.path.abspath(expanduser(wanted))
      os.makedirs(wanted, exist_ok=True)
      with tempfile.TemporaryFile(dir=wanted):
        pass
  except Exception as error:  # a bucket's client has errors of its own
    why = one_line(error) if isinstance(error, HomeError) else f"{wanted} can't be written: {one_line(error)}"
    print(f"compiled programs are not kept: {why}", file=sys.stderr)
    wanted = None
  if (wanted or None) != before:
    jax.config.update("jax_compilation_cache_dir", wanted or None)


def too_many_files(error: BaseException) -> str:
  """Says what to do if an error, or what led to it, is that this process has as many files open as it may; else ""."""
  seen: BaseException | None = error
  while seen is not None:
    # Some libraries pass the system's words on without its number.
    if getattr(seen, "errno", None) == errno.EMFILE or re.search(f"{os.strerror(errno.EMFILE)}(?! in system)", str(seen)):
      limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
      more = 4096 if most == resource.RLIM_INFINITY else min(most, 4096)
      advice = f"`ulimit -n {more}` allows more" if more > limit else "to allow more, raise the hard limit (`ulimit -Hn`)"
      return f"Too many open files: a process may have {limit} here; {advice}, and the same command goes on"
    seen = seen.__cause__ or seen.__context__
  return ""


def listed(text: str, lines: Sequence[str], shown: int = 50) -> str:
  """A message with a list, of which it shows the first lines."""
  more = [f"... and {len(lines) - shown} more"] if len(lines) > shown else []
  return f"{text}:\n  " + "\n  ".join([*lines[:shown], *more])


def one_line(error: BaseException | str) -> str:
  """What an error says, on one line."""
  return " ".join(str(error).split())


@contextlib.contextmanager
def command(*errors: type[Exception], interrupted: str = "interrupted") -> Generator[None]:
  """The body of a command: an error of the user's is one line on stderr and exit code 1, Ctrl-C ends with 130.

  Args:
    errors: kinds that are the user's, beside ValueError and OSError.
    interrupted: what is said after Ctrl-C.
  """
  with contextlib.suppress(ModuleNotFoundError):  # the benchmarks run without it
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # an interrupt that comes while tqdm starts its thread of this is taken for the thread's error, and lost
  try:
    yield
  except Exception as error:
    text, advice = str(error), too_many_files(error)
    if not advice and not isinstance(error, (ValueError, OSError, *errors)):
      raise
    print(f"error: {text}" + (f"; {advice}" if advice not in text else ""), file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print(interrupted, file=sys.stderr)
    sys.exit(130)
