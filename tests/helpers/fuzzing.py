"""Gives damaged files to everything that reads files, in processes that may die.

`damaging` says how files are damaged, `fuzz_subjects` and `fuzz_commands` which, and what reads
them.

  # with a new seed, which is printed
  python tests/helpers/fuzzing.py --cases 3000 --commands 100
  python tests/helpers/fuzzing.py --seed 7 --cases 3000 --commands 100   the same again
  python tests/helpers/fuzzing.py --seed 7 --number 123                  one of them, in all words

What must be: an error is one of the documented ones, names the file and is a line; nothing crashes,
hangs, takes memory without bound, or touches a file that it was not told to write; and what is read
without an error is right.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import runpy
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import damaging
from command_lines import ROOT, environment

DATA = 6 << 30  # bytes that a process may ask for, threads' stacks included
LONGEST = 1500  # characters of a message
READER, COMMAND = (30, 900 << 20), (120, 2 << 30)  # seconds, and bytes that are resident at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
  """A format, and what reads it.

  files: patterns of files in the folder of good files; one of them is damaged at a time.
  read: (folder, file) -> what was read, as JSON has it.
  right: (folder, file, good, found) -> what is wrong with what was read, or "". good: what comes of
  the good file.
  plain: a bare ValueError is documented.
  padded: what lies behind its end is not a part of it, so that it changes nothing.
  """

  name: str
  files: tuple[str, ...]
  read: Callable[[pathlib.Path, pathlib.Path], Any]
  right: Callable[[pathlib.Path, pathlib.Path, Any, Any], str]
  plain: bool = False
  padded: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """A command over a damaged file.

  subject: whose files are damaged; it must be able to read, and rightly, what the command takes
  without an error.
  line: (folder, file, out) -> the module and its arguments.
  result: (folder, file, out, stdout) -> what it made, the same whenever what was read is the same.
  """

  name: str
  subject: Subject
  files: tuple[str, ...]
  line: Callable[[pathlib.Path, pathlib.Path, pathlib.Path], list[str]]
  result: Callable[[pathlib.Path, pathlib.Path, pathlib.Path, str], Any]
  # what a command that failed must have done all the same
  apart: Callable[[Any, Any], str] = lambda good, found: ""
  verdict: str = (
    ""  # what stdout says where it fails for what it was made to find, and not for an error
  )


@dataclasses.dataclass(kw_only=True)
class Ended:
  """How a child ended. code: None: it was killed. told: what it wrote for its parent."""

  code: int | None
  signal: int
  late: bool
  resident: int
  told: Any
  out: str
  err: str

  @property
  def fault(self) -> str:
    """What no process may do."""
    if self.late:
      return "hangs"
    return f"is killed by signal {self.signal}" if self.signal else ""


def listing(folder: pathlib.Path, but: Sequence[str] = ()) -> dict[str, Any]:
  """Everything below a folder: kind, size, time, and what is in it."""
  found: dict[str, Any] = {}
  for at, folders, names in os.walk(folder):
    folders[:] = [
      name for name in folders if os.path.relpath(os.path.join(at, name), folder) not in but
    ]
    for name in folders + names:
      path = pathlib.Path(at, name)
      about, key = path.lstat(), str(path.relative_to(folder))
      if stat.S_ISREG(about.st_mode):
        content = (
          hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
          if about.st_size < 1 << 26
          else ""
        )
        found[key] = (about.st_size, about.st_mtime_ns, content)
      else:
        found[key] = os.readlink(path) if path.is_symlink() else stat.S_IFMT(about.st_mode)
  return found


def forked(case: pathlib.Path, limits: tuple[int, int], deed: Callable[[], Any]) -> Ended:
  """Lets a child do something, within limits, in a folder of its own; `deed` gives what it tells,
  and SystemExit is its end.
  """
  seconds, _ = limits
  for name in ("home", "tmp", "cwd"):
    (case / name).mkdir(exist_ok=True)
  pid = os.fork()
  if not pid:
    code = 99
    try:
      os.setsid()
      os.chdir(case / "cwd")
      os.environ |= {"HOME": str(case / "home"), "TMPDIR": str(case / "tmp")}
      for number, name in ((0, os.devnull), (1, case / "stdout"), (2, case / "stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
      resource.setrlimit(resource.RLIMIT_DATA, (DATA, DATA))
      resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
      try:
        (case / "told").write_text(json.dumps(deed()))
        code = 0
      except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
      except BaseException:
        traceback.print_exc()
        code = 98
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(code)
  end, late, status, used = time.monotonic() + seconds, False, 0, None
  while True:
    done, status, used = os.wait4(pid, os.WNOHANG)
    if done:
      break
    if time.monotonic() > end and not late:
      late = True
      os.kill(pid, signal.SIGKILL)
    time.sleep(0.01)
  try:
    os.killpg(pid, signal.SIGKILL)  # whom it has left behind
  except ProcessLookupError:
    pass
  code = os.waitstatus_to_exitcode(status)

  def text(name):
    return (case / name).read_text("utf-8", "replace") if (case / name).exists() else ""

  told = json.loads(text("told") or "null")
  out, err = text("stdout"), text("stderr")
  for name in ("told", "stdout", "stderr"):
    (case / name).unlink(missing_ok=True)
  return Ended(
    code=code if code >= 0 else None,
    signal=max(0, -code),
    late=late,
    resident=used.ru_maxrss << 10,
    told=told,
    out=out,
    err=err,
  )


def read_in_child(case: pathlib.Path, subject: Subject, file: pathlib.Path) -> Ended:
  """What a reader makes of a file: {"found": ...}, or {"error": ...}."""

  def deed():
    try:
      return {"found": subject.read(case / "given", file)}
    except Exception as error:
      ours = type(error).__module__.startswith("xcomp_jax.") or (
        subject.plain and type(error) is ValueError
      )
      own = isinstance(error, OSError) or (isinstance(error, ValueError) and ours)
      return {
        "error": str(error),
        "kind": type(error).__name__,
        "own": own,
        "trace": traceback.format_exc(),
      }

  return forked(case, READER, deed)


def run_in_child(case: pathlib.Path, command: Command, file: pathlib.Path) -> Ended:
  """`python -m MODULE ...`, without the seconds for importing it."""

  def deed():
    module, *arguments = command.line(case / "given", file, case / "out" / "made")
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it begins afresh, as by itself
    runpy.run_module(module, run_name="__main__", alter_sys=True)

  return forked(case, COMMAND, deed)


def made_in_child(case: pathlib.Path, command: Command, file: pathlib.Path, ended: Ended) -> Any:
  """What a command has made; threads of libraries that read it would not survive in later
  children.
  """
  read = forked(
    case, READER, lambda: command.result(case / "given", file, case / "out" / "made", ended.out)
  )
  assert read.code == 0, read.err
  return read.told


def wrong_about_error(text: str, given: pathlib.Path, file: pathlib.Path) -> str:
  """What is wrong with what is said: it lacks the name of the file, or of a folder that it lies in;
  or has no end.
  """
  folders = [str(folder) for folder in file.parents if given in folder.parents]
  if not any(name in text for name in (file.name, ascii(file.name)[1:-1], *folders)):
    return "does not name the file"
  longest = max(map(len, text.splitlines()))
  return f"says {longest:,} characters in a line" if longest > LONGEST else ""


class Survey:
  """Cases of a seed, over the good files in a folder."""

  def __init__(
    self,
    good: pathlib.Path,
    work: pathlib.Path,
    keep: pathlib.Path,
    subjects: Sequence[Subject],
    commands: Sequence[Command],
    seed: int,
  ):
    self.good, self.work, self.keep = good, work, keep
    self.subjects, self.commands, self.seed = subjects, commands, seed
    self.same = False  # whether the last reader has read what it reads of the good file
    self.known: dict[tuple[str, str], Any] = {}

  def chosen(
    self, number: int, command: bool
  ) -> tuple[Subject | Command, pathlib.Path, list[tuple[str, int]]]:
    """What is damaged in a case (a path inside the folder of good files), and how."""
    r = random.Random(f"{self.seed}/{command}/{number}")
    kinds = self.commands if command else self.subjects
    kind = kinds[number % len(kinds)]
    files = sorted(
      {path for pattern in kind.files for path in self.good.glob(pattern) if path.is_file()}
    )
    file = r.choice(files)
    return kind, file.relative_to(self.good), damaging.choose(r, file)

  def fresh(self) -> pathlib.Path:
    """A folder with the good files."""
    case = self.work / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(self.good, case / "given", copy_function=os.link)
    return case

  def fine(self, kind: Subject | Command, name: pathlib.Path) -> Any:
    """What comes of the good file."""
    key = (kind.name, str(name))
    if key not in self.known:
      case = self.fresh()
      file = case / "given" / name
      if isinstance(kind, Subject):
        ended = read_in_child(case, kind, file)
        assert ended.told and "found" in ended.told and not ended.fault, (
          f"{key} can't be read undamaged: {ended}"
        )
        self.known[key] = ended.told["found"]
      else:
        (case / "out").mkdir()
        ended = run_in_child(case, kind, file)
        assert ended.code == 0, f"{key} fails undamaged: {ended}"
        self.known[key] = made_in_child(case, kind, file, ended)
    return self.known[key]

  def fault(
    self, kind: Subject | Command, name: pathlib.Path, steps: list[tuple[str, int]]
  ) -> tuple[str, str]:
    """What is wrong with how a damaged file is taken ("" if nothing), and what it said."""
    good = self.fine(kind, name)
    if isinstance(kind, Command):
      self.fine(kind.subject, name)
    case = self.fresh()
    file = case / "given" / name
    (case / "good").mkdir()
    os.link(file, case / "good" / file.name)  # for `right`
    damaging.damage(file, steps)
    if isinstance(kind, Subject):
      return self.fault_of_reader(kind, case, name, steps)
    (case / "out").mkdir()
    before = listing(case, ("out", "home", "tmp", "cwd"))
    ended = run_in_child(case, kind, file)
    fault = ended.fault or self.touched(case, before) or self.too_much(ended, COMMAND)
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if not fault and ("Traceback" in ended.err or ended.code not in (0, 1)):
      fault = "traceback" if "Traceback" in ended.err else f"ends with exit code {ended.code}"
    if not fault and ended.code == 1:
      judged = bool(kind.verdict and re.search(kind.verdict, ended.out))
      fault = "" if len(lines) == 1 - judged else f"says {len(lines)} errors"
      fault = (
        fault
        or (not judged and wrong_about_error(ended.err, case / "given", file))
        or kind.apart(good, made_in_child(case, kind, file, ended))
      )
    if not fault and ended.code == 0:
      made = made_in_child(case, kind, file, ended)
      shutil.rmtree(case / "out", ignore_errors=True)
      fault, _ = self.fault_of_reader(kind.subject, case, name, steps, taken=True)
      fault = fault and f"succeeds, though its reader {fault}"
      if not fault and self.same and made != good:
        fault = f"makes something else of what is the same: {made!r:.200} and not {good!r:.200}"
    return fault, ended.err[-4000:] + ended.out[-1000:]

  def fault_of_reader(
    self, subject: Subject, case: pathlib.Path, name: pathlib.Path, steps, taken: bool = False
  ) -> tuple[str, str]:
    """The same of a reader. taken: a command has succeeded with this file, so an error is a
    fault.
    """
    file, good, self.same = case / "given" / name, self.known[subject.name, str(name)], False
    before = listing(case, ("home", "tmp", "cwd"))
    ended = read_in_child(case, subject, file)
    fault = ended.fault or self.touched(case, before) or self.too_much(ended, READER)
    told = ended.told or {}
    if not fault and "error" in told:
      fault = (
        f"refuses it: {told['error'][:300]}"
        if taken
        else ""
        if told["own"]
        else f"raises {told['kind']}"
      )
      fault = fault or wrong_about_error(told["error"], case / "given", file)
      return fault, f"{told['kind']}: {told['error'][:3000]}\n{told['trace'][-3000:]}"
    if not fault and "found" not in told:
      fault = f"ends with exit code {ended.code}"
    if fault:
      return fault, ended.err[-4000:]
    self.same = told["found"] == good
    ways = {step for step, _ in steps}
    if ways & damaging.NEVER and not self.same:  # else it is not needed
      fault = "reads something else of what is no file"
    elif (ways == {"linked"} or (subject.padded and ways == {"junk"})) and not self.same:
      fault = "reads something else where nothing has changed"
    return (
      fault or subject.right(case / "given", file, good, told["found"]),
      json.dumps(told["found"])[:2000],
    )

  def touched(self, case: pathlib.Path, before: dict[str, Any]) -> str:
    """Which files were touched that it was not told to write."""
    after = listing(
      case, ("out", "home", "tmp", "cwd") if "out" not in before else ("home", "tmp", "cwd")
    )
    other = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    other += [f"{name}/{key}" for name in ("home", "tmp", "cwd") for key in listing(case / name)]
    return f"touches {', '.join(other[:5])}" if other else ""

  def too_much(self, ended: Ended, limits: tuple[int, int]) -> str:
    """Whether it took more memory than it should."""
    return f"takes {ended.resident >> 20} MB" if ended.resident > limits[1] else ""

  def case(self, number: int, command: bool) -> dict[str, Any]:
    """Does one case; a fault is made simpler, and its files are kept."""
    kind, name, steps = self.chosen(number, command)
    fault, said = self.fault(kind, name, steps)
    about = {
      "number": number,
      "command": command,
      "what": kind.name,
      "file": str(name),
      "steps": steps,
      "fault": fault,
      "said": said,
    }
    if not fault:
      return about
    for step in list(steps) if len(steps) > 1 else []:  # does it take all of them?
      fewer = [other for other in steps if other is not step]
      simpler, text = self.fault(kind, name, fewer) if fewer else ("", "")
      if simpler.split()[:1] == fault.split()[:1]:
        steps, fault, said = fewer, simpler, text
    if about["steps"] != steps:
      self.fault(kind, name, steps)
    fault_of = "command" if command else "reader"
    kept = self.keep / f"{self.seed}-{fault_of}-{number}-{re.sub('[ /]', '_', kind.name)}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    (self.work / "case").rename(kept)
    about |= {
      "steps": steps,
      "fault": fault,
      "said": said,
      "kept": str(kept),
      "damaged": str(kept / "given" / name),
    }
    (kept / "case.json").write_text(json.dumps(about, indent=1))
    return about

  def cases(self, numbers: Sequence[tuple[int, bool]], jobs: int) -> Iterator[dict[str, Any]]:
    """Does cases in several processes; in the order in which they are done."""
    context = multiprocessing.get_context("fork")
    queue, root = context.Queue(), self.work

    def work(share):
      self.work = root / f"worker-{share}"
      self.work.mkdir(parents=True, exist_ok=True)
      for number, command in numbers[share::jobs]:
        begun = time.monotonic()
        try:
          about = self.case(number, command)
        except Exception:
          about = {
            "number": number,
            "command": command,
            "what": "the fuzzer",
            "file": "",
            "steps": [],
          }
          about |= {"fault": "fails", "said": traceback.format_exc()}
        queue.put(about | {"seconds": round(time.monotonic() - begun, 2)})

    workers = [context.Process(target=work, args=(share,)) for share in range(jobs)]
    for worker in workers:
      worker.start()
    for _ in numbers:
      yield queue.get(timeout=20 * 60)
    for worker in workers:
      worker.join()


def told(case: dict[str, Any], seed: int) -> str:
  """A fault, for a person."""
  kind = " --command" * case["command"]
  return (
    f"{case['what']}: {case['file']} damaged by "
    f"{', '.join(f'{name}({n})' for name, n in case['steps'])}: {case['fault']}\n"
    f"  the file: {case.get('damaged', 'not kept')}\n  again: python tests/helpers/fuzzing.py "
    f"--seed "
    f"{seed} --number {case['number']}{kind}\n"
    f"  it said: {case['said'].strip()[:1000]}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
  parser.add_argument("--cases", type=int, default=300, help="of readers")
  parser.add_argument("--commands", type=int, default=30, help="cases through whole commands")
  parser.add_argument("--number", type=int, help="instead: this case alone")
  parser.add_argument("--command", action="store_true", help="with --number: of commands")
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument(
    "--keep",
    type=pathlib.Path,
    default=ROOT / ".cache" / "fuzz",
    help="folder for the files of faults",
  )
  parser.add_argument(
    "--json", type=pathlib.Path, help="file for what became of every case, a line each"
  )
  args = parser.parse_args()
  args.keep = args.keep.absolute()
  print(f"seed {args.seed}", flush=True)

  import fuzz_commands

  work = args.keep / f"work-{os.getpid()}"
  work.mkdir(parents=True)
  try:
    made = forked(work, (300, 1 << 40), lambda: fuzz_commands.fuzz_subjects.make(work / "good"))
    assert made.code == 0, made.err
    shutil.copytree(work / "good", work / "compare", copy_function=shutil.copy2)
    before = listing(work / "good")
    survey = Survey(
      work / "good",
      work,
      args.keep,
      fuzz_commands.fuzz_subjects.SUBJECTS,
      fuzz_commands.COMMANDS,
      args.seed,
    )
    numbers = [(n, True) for n in range(args.commands)] + [(n, False) for n in range(args.cases)]
    if args.number is not None:
      numbers = [(args.number, args.command)]
    faults, counts = [], collections.Counter()
    for case in survey.cases(numbers, args.jobs):
      counts[case["what"]] += 1
      if args.json:
        with open(args.json, "a") as file:
          file.write(json.dumps(case) + "\n")
      if args.number is not None:
        print(json.dumps(case, indent=1))
      if case["fault"]:
        faults.append(case)
        print(told(case, args.seed), flush=True)
    if listing(work / "good") != before:
      faults.append({})
      print("the good files themselves were changed")
  finally:
    shutil.rmtree(work, ignore_errors=True)
  print(
    f"seed {args.seed}: {len(numbers)} cases, {len(faults)} faults; "
    f"{', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}"
  )
  sys.exit(bool(faults))


if __name__ == "__main__":
  environment()
  import fuzzing  # not this module, which has its classes a second time

  fuzzing.main()
