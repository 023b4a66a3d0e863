"""Where files are, and files and folders that are there whole or not at all."""

import argparse
import contextlib
import errno
import fcntl
import glob
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Generator, Mapping
from typing import Any

from xcomp_jax.errors import XCompError


def local(path: str | os.PathLike, why: str, written: bool = False) -> pathlib.Path:
  """A path of this machine; what a killed command left between two renames is put there first.

  Args:
    path: with or without a scheme; a leading ~ is the home directory.
    why: it has to be one, for the message.
    written: it is a result, not what is read.

  Raises:
    PathError: it is in a bucket.
  """
  if found := re.match("(gs|s3|az):/+(.*)", os.fspath(path)):  # a pathlib.Path has one slash left
    advice = (
      "Give a folder of this machine, and copy it when it is done (`gcloud storage cp -r`)"
      if written
      else (
        "Copy it to this machine (`gcloud storage cp -r`) or mount the bucket (`gcsfuse`), and "
        "give that path"
      )
    )
    place = f"{found[1]}://{found[2]}"
    raise PathError(f"{place} is in a bucket, but {why}. {advice}", where=place)
  found = path_of(path)
  if not found.exists():
    settle(found)
  return found


class PathError(XCompError, ValueError):
  """A path that can't be used for what it was given for."""


class WriteError(XCompError, OSError):
  """A folder that can't be written."""


class TakenError(XCompError, FileExistsError):
  """Something is where a folder would be made."""


# argparse shows the text of its own kind of error
class HomeError(XCompError, ValueError, argparse.ArgumentTypeError):
  """A path begins with ~, and there is no home directory."""


def expanduser(path: str | os.PathLike) -> str:
  """A path in which a leading ~ is the home directory: shells see to that only where it begins a
  word, not in --out=~/x.

  Raises:
    HomeError: there is none, as in a container whose user is a mere number. A folder named ~ would
      come of it.
  """
  found = os.path.expanduser(path)
  if found.partition(os.sep)[0] == "~":
    raise HomeError(
      f"{found}: ~ is the home directory, and this user has none; give a path without it, or set "
      f"HOME",
      where=found,
    )
  return os.fspath(found)


def path_of(path: str | os.PathLike) -> pathlib.Path:
  """`expanduser`, as a path."""
  return pathlib.Path(expanduser(path))


def absolute(path: str | os.PathLike) -> str:
  """A path from the root that means the same: `os.path.abspath` would take `link/..` for the folder
  in which the link lies.
  """
  return os.fspath(pathlib.Path(path).absolute())


@contextlib.contextmanager
def replacing(target: str | os.PathLike, synced: bool = True) -> Generator[pathlib.Path]:
  """A name to write a file to, which becomes `target`, and reaches the disk, when the block ends
  well.

  When the block fails the file is removed; if the block has removed it, none is made. What a killed
  process left, `sweep` removes. What a link points to is replaced, not the link.

  synced: it reaches the disk before it takes its name.

  Raises:
    OSError: it can't be written, or is no file, such as /dev/null or a pipe; the message names
      `target`.
  """
  target = pathlib.Path(target)
  # Machines that share the folder may have processes of the same number.
  temporary = pathlib.Path(f"{_stem(os.path.realpath(target))}.{uuid.uuid4().hex}.tmp")
  try:
    if target.exists() and not target.is_file():
      raise FileExistsError(
        errno.EEXIST,
        "is a folder, a pipe or a device, where a file has to be",
        os.fspath(temporary),
      )
    with open(temporary, "wb") as mine:
      with contextlib.suppress(OSError):  # no locks here
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield temporary
      if temporary.exists():
        if synced:
          sync(temporary)
        os.replace(temporary, os.path.realpath(target))
  except BaseException as error:
    # a file system that can't be written says so, even if there is no file
    with contextlib.suppress(OSError):
      temporary.unlink()
    if (
      isinstance(error, OSError)
      and error.errno is not None
      and error.filename in (None, os.fspath(temporary))
    ):
      raise type(error)(
        error.errno, f"can't be written: {error.strerror}", os.fspath(target)
      ) from error
    raise


def _stem(name: str) -> str:
  """The beginning of a name that leaves room for what `replacing` adds to it."""
  head, tail = os.path.split(name)
  return os.path.join(
    head, os.fsdecode(os.fsencode(tail)[: 255 - len(f".{uuid.UUID(int=0).hex}.tmp")])
  )


def sweep(folder: str | os.PathLike, name: str = "") -> None:
  """Removes what killed processes left of `replacing` in a folder; name: of one file. Who still
  writes holds a lock.
  """
  for path in pathlib.Path(folder).glob(f"{glob.escape(_stem(name)) or '*'}.{'[0-9a-f]' * 32}.tmp"):
    # no locks here, or no permission: it stays
    with contextlib.suppress(OSError), open(path, "rb") as left:
      fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
      path.unlink()


def write_file(target: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file (text as UTF-8) that is there whole or not at all."""
  with replacing(target) as temporary:
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(target: str | os.PathLike, value: Any, indent: int | None = None) -> None:
  """Writes a value as JSON, whole or not at all; with `indent` for people: lines, sorted keys."""
  write_file(
    target,
    json.dumps(value, indent=indent, sort_keys=indent is not None)
    + ("" if indent is None else "\n"),
  )


def sync(path: str | os.PathLike) -> None:
  """Waits until a file has reached the disk: no name may be older than what it stands for, should
  the machine stop.
  """
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


@contextlib.contextmanager
def fresh_folder(
  target: str | os.PathLike, by: str, replace: bool = False
) -> Generator[pathlib.Path]:
  """An empty folder to write into, which becomes `target` when the block ends well; the one that
  was there goes after that.

  It is `new` in the work folder `<target>.<by>.incomplete`, where a `lock` says whose that is, and
  where what gives way is `old`. So there is a whole one at `target`, or `settle` puts it there,
  whenever a process is killed. When the block fails the work folder is removed; what a killed
  process left is removed by the next one.

  Args:
    target: folder to be, whole or not at all.
    by: the command that makes it; others don't touch its work folder.
    replace: a folder that is there may give way.

  Raises:
    TakenError: target is already there; or something else is where the work folder would be.
    WriteError: it can't be made, or another process is making it.
    PathError: it is in a bucket, where no folder can be renamed.
  """
  target = pathlib.Path(
    os.path.realpath(
      local(target, "a folder that is whole or not at all appears by a rename", written=True)
    )
  )
  settle(target)
  _check_free(target, replace)
  work, mark = target.with_name(f"{target.name}.{by}.incomplete"), _mark(by)
  try:
    work.mkdir(parents=True, exist_ok=True)
    if not {path.name for path in work.iterdir()} <= {"lock"} and (
      not (work / "lock").is_file() or (work / "lock").read_text() != mark
    ):
      raise FileExistsError(f"{work} is in the way, and `{by}` did not make it; move it away")
  except OSError as error:
    kind = TakenError if isinstance(error, FileExistsError) else WriteError
    raise kind(
      f"{target} can't be written: {error.strerror or error}", where=target, work=work
    ) from error
  with locked(
    work / "lock",
    WriteError(
      f"another process is writing {target}; wait for it, or choose another folder",
      where=target,
      found="another process",
    ),
  ):
    (work / "lock").write_text(mark)
    _settle(work, target)
    _empty(work)  # a killed process's
    (work / "new").mkdir()
    try:
      yield work / "new"
      _check_free(target, replace)
      become(work, "new", target, replace)
    except BaseException:
      _settle(work, target)
      _remove(work)
      raise


def _check_free(target: pathlib.Path, replace: bool) -> None:
  if target.is_symlink():  # a path without links, but for those that go round in a circle
    raise WriteError(
      f"{target} can't be written: {os.strerror(errno.ELOOP)}", where=target, found="a circle"
    )
  if os.path.ismount(target):
    raise TakenError(
      f"{target} is where a file system is mounted, which no rename can replace; choose a folder "
      f"inside it",
      where=target,
      found="a mount",
    )
  if not replace and target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise TakenError(
      f"{target} already exists; remove it or choose another folder",
      where=target,
      found="a file or folder",
    )


def become(work: pathlib.Path, name: str, target: pathlib.Path, replace: bool = False) -> None:
  """Makes a folder in a work folder the target, when it has reached the disk, and removes the work
  folder.

  Raises:
    OSError: there is something at the target, and it may not be replaced.
  """
  for file in (work / name).rglob("*"):
    if file.is_file():
      sync(file)
  if replace and target.exists() and any(target.iterdir()):
    os.rename(target, work / "old")
  os.rename(work / name, target)  # of an empty folder it takes the place
  sync(target.parent)
  _remove(work)


def settle(target: str | os.PathLike) -> None:
  """Finishes what a process that was killed in `become` left: between its two renames nothing is at
  `target`.

  Every command does this for the folders that it is told to read or write.
  """
  try:
    target = pathlib.Path(os.path.realpath(target))
  except ValueError:  # no path at all
    return
  for work in target.parent.glob(f"{glob.escape(target.name)}.*.incomplete"):
    # no permission: nothing changes, and who needs the folder says that it is not there
    with contextlib.suppress(OSError):
      if (work / "old").exists():
        with locked(work / "lock", None):
          _settle(work, target)
          _remove(work)


def _settle(work: pathlib.Path, target: pathlib.Path) -> None:
  if (work / "old").exists() and not target.exists():
    try:
      os.rename(work / "new", target)
    except OSError:
      os.rename(work / "old", target)
  if (work / "old").exists() and (work / "new").exists():
    raise TakenError(
      f"{target} was made by somebody else at the same time; what was there before is "
      f"{work / 'old'}: move it away",
      where=target,
      found=work / "old",
    )


def _empty(work: pathlib.Path) -> None:
  for path in work.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    elif path.name != "lock":
      path.unlink()


def _remove(work: pathlib.Path) -> None:
  """Removes a work folder; its lock last, for a folder without one is nobody's."""
  _empty(work)
  (work / "lock").unlink(missing_ok=True)
  with contextlib.suppress(OSError):  # the next process has come already
    work.rmdir()


@contextlib.contextmanager
def locked(
  file: str | os.PathLike, taken: Exception | None, needed: bool = False
) -> Generator[None]:
  """Keeps other processes out of what a lock file stands for, as far as its file system has locks.

  Args:
    file: is made if it is not there.
    taken: raised if another process holds it; None: waits.
    needed: a file system without locks won't do.

  Raises:
    taken: another process holds it, or has just removed it.
    OSError: it can't be opened, or locked where that is `needed`.
  """
  with contextlib.ExitStack() as stack:
    try:
      handle = stack.enter_context(open(file, "a"))
    except FileNotFoundError as error:  # another process has just removed its folder
      if taken:
        raise taken from error
      raise
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if taken else 0))
      mine = os.fstat(handle.fileno()).st_ino == os.stat(file).st_ino
    except (BlockingIOError, FileNotFoundError):
      mine = False
    except OSError as error:
      if needed:
        raise OSError(f"its file system can't lock {file}: {error.strerror}") from error
      mine = True
    if not mine:
      raise taken or FileNotFoundError(f"{file} is gone")
    yield


@contextlib.contextmanager
def alone(folder: str | os.PathLike, by: str) -> Generator[None]:
  """Makes a folder in which a command writes, and keeps others out of it meanwhile; its lock says
  who was there first.

  Raises:
    WriteError: another process is at work in it.
    OSError: it can't be made.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  lock = folder / ".lock"
  with locked(
    lock,
    WriteError(
      f"another command is at work in {folder}; wait for it, or give --out another folder",
      where=folder,
      found="another command",
    ),
  ):
    if not lock.stat().st_size:
      lock.write_text(_mark(by))
    sweep(folder)
    yield


def made_by(folder: str | os.PathLike, by: str) -> bool:
  """Whether a command was the first that was `alone` in a folder."""
  lock = pathlib.Path(folder) / ".lock"
  return lock.is_file() and lock.read_bytes() == _mark(by).encode()


def _mark(by: str) -> str:
  return f"xcomp_jax {by}"


def apart(
  outputs: Mapping[str, str | os.PathLike | None],
  inputs: Mapping[str, str | os.PathLike | None],
  nested: bool = False,
) -> None:
  """Sees to it that nothing that is written is what is read, or a folder around it, or a standard
  stream's, under whatever name.

  Args:
    outputs: by the option that names each; None: not given.
    inputs: likewise. Those that are not there are left to who reads them.
    nested: nor may an output lie in an input.

  Raises:
    PathError: which ones are the same.
  """
  for option, output in _named_paths(outputs).items():
    for number, stream in enumerate(("standard input", "standard output", "standard error")):
      with contextlib.suppress(OSError):  # it is closed, or there is no output yet
        if output.is_file() and os.path.samestat(os.fstat(number), os.stat(output)):
          raise PathError(
            f"{option} {output} is also {stream}, which would be damaged; give another {option}",
            where=option,
            how="is also",
            other=stream,
          )
    for name, source in _named_paths(inputs).items():
      within, around = _contains(source, output), _contains(output, source)
      how = "is" if within and around else "contains" if around else "lies in"
      if around or (within and nested):
        raise PathError(
          f"{option} {output} {how} {name} {source}, which would be damaged; give another {option}",
          where=option,
          how=how,
          other=name,
        )


def _named_paths(paths: Mapping[str, str | os.PathLike | None]) -> dict[str, pathlib.Path]:
  """Those that are given, and of this machine."""
  return {
    name: pathlib.Path(os.path.realpath(path_of(path)))
    for name, path in paths.items()
    if path and "://" not in os.fspath(path)
  }


def _contains(outer: pathlib.Path, inner: pathlib.Path) -> bool:
  """Whether a path is another, or a folder around it, under whatever name."""
  return any(
    part == outer or (outer.exists() and part.exists() and part.samefile(outer))
    for part in (inner, *inner.parents)
  )
