"""The folder of an evaluation's answers.

It holds `settings.json`, what they were made with, and `answers-*.jsonl`, one file per share of the
videos: a line per answer, and per question whose video could not be read.
"""

import collections
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax

from xcomp_jax.checkpoints import tensor_files
from xcomp_jax.errors import XCompError
from xcomp_jax.files import absolute, local, locked, sweep, write_json
from xcomp_jax.inference.prepared import PreparedModel
from xcomp_jax.inputs import quoted, read_json

# Settings that may differ when a run goes on; the checkpoint's identity may not, nor the clips that
# "auto" stands for.
FREE = ("checkpoint", "clips_per_chunk", "clip_frames", "attention")
# settings that older folders do not have, and what they were made with
ADDED = {"rows": "question"}
PACKAGES = (
  "xcomp_jax",
  "jax",
  "jaxlib",
  "flax",
  "numpy",
  "opencv-python-headless",
  "pillow",
  "tokenizers",
)
# by who asks, beside the answers
WRITTEN = (
  "results.json",
  "samples.jsonl",
  "heatmap.png",
  "run.json",
)


class AnswersError(XCompError, ValueError):
  """A folder of answers that can't be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class Wanted:
  """A question about (a part of) a video. prompt: what is said after the frames and the time
  message.
  """

  video: pathlib.Path
  prompt: str
  start: float | None = None
  end: float | None = None

  @property
  def watched(self) -> tuple[str, float | None, float | None]:
    """What is encoded together."""
    return absolute(self.video), self.start, self.end

  @functools.cached_property
  def key(self) -> str:
    """Names the question among answers."""
    return hashlib.blake2b(
      json.dumps([*self.watched, self.prompt]).encode(), digest_size=16
    ).hexdigest()


def checkpoint_identity(directory: pathlib.Path) -> str:
  """A hash of all that a checkpoint's folder holds, by content, but for an export's list of it."""
  digest = hashlib.blake2b(digest_size=16)
  for file in sorted(
    f for f in directory.rglob("*") if f.is_file() and f.name != tensor_files.EXPORTED
  ):
    with open(file, "rb") as opened:
      content = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16))
    digest.update(os.fsencode(file.relative_to(directory)) + b"\0" + content.digest())
  return digest.hexdigest()


def session() -> dict[str, Any]:
  """Versions and device of this process, and when it began."""
  versions = dict.fromkeys(PACKAGES)
  for package in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  device = jax.local_devices()[0]
  return {
    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "python": platform.python_version(),
    "device": device.device_kind,
    "platform": device.platform,
    "processes": jax.process_count(),
    "versions": versions,
  }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Settings that answers depend on and that are no longer the same: {name: (old, new)}. What the
  options stand for is only looked at where the options are the same.
  """
  old = ADDED | before["settings"]
  chosen = {"checkpoint": (before["identity"], now["identity"])}
  chosen |= {k: (old.get(k), value) for k, value in now["settings"].items() if k not in FREE}
  resolved = {k: (before[k], now[k]) for k in ("dtype", "clip_frames", "lp_comp")}
  resolved["qc_comp"] = (before["qc_comp"] and ADDED | before["qc_comp"], now["qc_comp"])

  def differ(pairs):
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

  return differ(chosen) or differ(resolved)


class Answers:
  """The answers in a folder; a context that holds the share's file for this process.

  lines: {key: the last line about it}. settings: what `settings.json` holds.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    reader: PreparedModel,
    share: tuple[int, int],
    *,
    about: Mapping[str, Any] | None = None,
    how: Mapping[str, Any] | None = None,
  ):
    """Makes the folder, or goes on in it.

    about: what else the answers depend on. how: what they don't, for the record of this process.

    Raises:
      AnswersError: it holds answers under other settings or of another checkpoint.
      OSError: it can't be written.
      ValueError: it is in a bucket.
    """
    self.folder = local(folder, "answers are written line by line", written=True)
    self.folder.mkdir(parents=True, exist_ok=True)
    sweep(self.folder)
    settings = {
      "checkpoint": reader.settings.checkpoint,
      "identity": checkpoint_identity(reader.directory),
      "settings": dataclasses.asdict(reader.settings) | dict(about or {}),
      "dtype": reader.dtype,
      "clip_frames": reader.cfg.clip_frames,
      "lp_comp": dataclasses.asdict(reader.cfg.lp_comp),
      "qc_comp": reader.select and dataclasses.asdict(reader.select),
    }
    self.settings: dict[str, Any] = json.loads(json.dumps(settings))
    self._agree(self.folder / "settings.json")
    self._session = session() | dict(how or {})
    self._file = self.folder / f"answers-{share[0]}-of-{share[1]}.jsonl"
    self.opened: TextIO  # the share's file, from `__enter__` on
    self._lock = contextlib.ExitStack()
    self.lines: dict[str, dict[str, Any]] = {}
    self.read()

  def _agree(self, file: pathlib.Path) -> None:
    """Sees to it that what the folder holds was made with the same settings, or writes them."""
    if not file.exists():
      if there := [name for name in WRITTEN if (self.folder / name).exists()]:
        raise AnswersError(
          f"{self.folder} holds a {there[0]} of something else, which would be overwritten; choose "
          f"another folder",
          where=self.folder,
          found=there[0],
        )
      write_json(file, self.settings, indent=2)
      return
    before = read_json(file, AnswersError)
    try:
      differ = _differences(before, self.settings)
    except Exception as error:  # it may hold anything
      raise AnswersError(
        f"{file} is not what an evaluation writes: {quoted(before)}; choose another folder",
        where=file,
      ) from error
    if differ:
      what = "; ".join(f"{key} was {old}, now {new}" for key, (old, new) in differ.items())
      raise AnswersError(
        f"{self.folder} holds answers made otherwise ({what}): choose another folder, or remove it",
        where=self.folder,
        differ=differ,
      )

  def read(self) -> None:
    """Takes in what is on disk, other shares' answers too; half a line, left by a kill, is no
    answer.
    """
    for line in self._all():
      if isinstance(line.get("key"), str) and ("answer" in line or line["key"] not in self.lines):
        self.lines[line["key"]] = line

  def _all(self) -> Iterator[dict[str, Any]]:
    for file in sorted(self.folder.glob("answers-*.jsonl")):
      # splitlines would split at U+2028 too
      for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
          line = json.loads(text)
          if isinstance(line, dict):
            yield line

  def __enter__(self) -> "Answers":
    """Takes the share's file.

    Raises:
      AnswersError: another process has it.
      OSError: it can't be opened, or locked.
    """
    taken = AnswersError(
      f"another process writes {self._file}; give every process its own --share", where=self._file
    )
    self._lock.enter_context(locked(self._file, taken, needed=True))
    # Names of files may be no UTF-8; what takes the place of such a byte is how JSON writes it.
    self.opened = open(self._file, "a", encoding="utf-8", errors="backslashreplace")
    if self._file.read_bytes()[-1:] not in (b"", b"\n"):
      self.opened.write("\n")  # ends the half line of a killed process
    self._write({"session": self._session})
    return self

  def __exit__(self, *_) -> None:
    """Gives the file back."""
    with self._lock, contextlib.suppress(OSError):  # of a disk that is full, which `add` has told
      self.opened.close()

  def _write(self, line: dict[str, Any]) -> None:
    try:
      self.opened.write(json.dumps(line, ensure_ascii=False) + "\n")
      self.opened.flush()
      os.fsync(self.opened.fileno())
    except OSError as error:
      why = error.strerror or error
      raise OSError(
        f"{self._file} can't be written: {why}; what is in it stays, and the same command continues"
      ) from error

  def add(self, line: dict[str, Any]) -> None:
    """Puts a line on disk."""
    self._write(line)
    self.lines[line["key"]] = line

  def answer(self, wanted: Wanted) -> str | None:
    """The answer; None if its video could not be read, or nobody has asked yet."""
    return self.lines.get(wanted.key, {}).get("answer")

  def sessions(self) -> list[dict[str, Any]]:
    """Versions and devices of all processes that have answered here."""
    return [line["session"] for line in self._all() if "session" in line]


def failures(lines: Iterable[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
  """What could not be asked about: {NAME, "error", "questions"}. name: what lines are about,
  "video" or "needle".
  """
  counts = collections.Counter((line[name], line["error"]) for line in lines if "error" in line)
  return [{name: about, "error": error, "questions": n} for (about, error), n in counts.items()]


def end_if_failed(failed: Sequence[Mapping[str, Any]], questions: int) -> None:
  """Ends a command, whose results are written, with exit code 1 if questions could not be asked.

  failed: see `failures`. questions: of all.
  """
  if failed:
    print(
      f"error: {sum(f['questions'] for f in failed):,} of {questions:,} questions could not be "
      "asked, and count as wrong; the same command asks them again",
      file=sys.stderr,
    )
    sys.exit(1)


def parse_share(text: str | None) -> tuple[int, int]:
  """(i, n) of "i/n", i from 0; None: this process's place among JAX's.

  Raises:
    AnswersError: no such share.
  """
  if text is None:
    return jax.process_index(), jax.process_count()
  try:
    i, n = map(int, text.split("/"))
  except ValueError:
    i, n = 0, 0
  if not 0 <= i < n:
    raise AnswersError(
      f"--share {text}: write 0/4, 1/4, 2/4 and 3/4 for four processes", where="--share", value=text
    )
  return i, n
