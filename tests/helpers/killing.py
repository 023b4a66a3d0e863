"""Kills commands, at renames and removals and at random moments, and gives the same command again:
its files must be those of a run that nobody disturbed, bit by bit, logs and times aside, and
nothing may be left beside them.

  # ten kills of each command, with a new seed, which is printed
  python tests/helpers/killing.py
  python tests/helpers/killing.py --seed 7 export       the same again, of one command

A round begins afresh: killed, the same command killed again while it mends and goes on, then the
same command until it is done.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import command_lines
from command_lines import ROOT, environment

MOMENTS = (
  "os.rename",
  "os.remove",
  "os.rmdir",
  "os.mkdir",
  "os.link",
  "os.truncate",
  "shutil.rmtree",
  "shutil.move",
)
LOOK = ("--min-frames=8", "--max-frames=16", "--select=8", "--max-new-tokens=3")
AGAIN = 4  # times a command is given until it is done,
PAUSE = 2.0  # with seconds between them for what a kill has orphaned


# --- the process that is killed
# --------------------------------------------------------------------------------


def trap(number: int, log: str, place: str, line: list[str]) -> None:
  """`python -m` of a line, killed just before its `number`-th rename, removal or the like below
  `place`; notes all of them.
  """
  count, me = itertools.count(1), os.getpid()
  notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

  def hook(event: str, arguments: tuple) -> None:
    if event not in MOMENTS or os.getpid() != me:
      return
    paths = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
    folders = [a for a in arguments[1:] if type(a) is int and a >= 0]  # relative to an open folder
    if paths and not os.path.isabs(paths[0]) and folders and event != "os.mkdir":
      paths[0] = os.path.join(os.readlink(f"/proc/self/fd/{folders[0]}"), paths[0])
    if not any(os.path.abspath(path).startswith(place + "/") for path in paths):
      return
    n = next(count)
    os.write(notes, f"{n} {event} {' '.join(paths)}\n".encode())
    if n == number:
      os.kill(me, signal.SIGKILL)

  sys.addaudithook(hook)
  sys.argv = line
  runpy.run_module(line[0], run_name="__main__", alter_sys=True)


# --- commands
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Killed:
  """A command that is killed.

  line: (what all commands have, a folder of its own) -> module and arguments.
  result: (own folder, what it said last) -> what must be the same, by name.
  leaves: what may lie in the own folder in the end.
  before: makes what lies there at the beginning.
  between: (shared, own) -> what is wrong with what a kill has left, for commands that only read.
  """

  name: str
  line: Callable[[pathlib.Path, pathlib.Path], list[str]]
  result: Callable[[pathlib.Path, str], dict[str, Any]]
  leaves: set[str]
  before: Callable[[pathlib.Path, pathlib.Path], None] = lambda shared, own: None
  between: Callable[[pathlib.Path, pathlib.Path], str] = lambda shared, own: ""


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def timeless(value: Any) -> Any:
  """JSON without seconds, and without who was at work when."""
  if isinstance(value, dict):
    return {
      key: timeless(item)
      for key, item in value.items()
      if key not in ("seconds", "sessions", "spent")
    }
  return [timeless(item) for item in value] if isinstance(value, list) else value


def answered(folder: pathlib.Path) -> dict[str, Any]:
  """What `evaluate` and `needles` leave."""
  out: dict[str, Any] = {"names": sorted(path.name for path in folder.iterdir())}
  for path in folder.iterdir():
    if path.suffix == ".jsonl":
      lines = [
        json.loads(line)
        for line in path.read_text().split("\n")
        if line.strip() and not line.startswith('{"session"')
      ]
      out[path.name] = timeless(lines)
    else:
      out[path.name] = (
        timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
      )
  return out


def asked(own: pathlib.Path, said: str) -> dict[str, Any]:
  page = re.sub(
    r"<h2 class=\"label\">Seconds spent.*?</table>",
    "",
    (own / "page.html").read_text(),
    flags=re.DOTALL,
  )
  return {
    "answer": said,
    "film.npz": (own / "film.npz").read_bytes(),
    "page.html": re.sub(r"\d+\.\d+ s\b", "", page),
  }


def trained(own: pathlib.Path, said: str) -> dict[str, Any]:
  """Arrays of all checkpoints: Orbax gives files names and times of their own."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  out: dict[str, Any] = {"names": sorted(path.name for path in (own / "run").iterdir())}
  out["config"] = (own / "run" / "config.json").read_bytes()
  steps = own / "run" / "checkpoints"
  out["steps"] = sorted(path.name for path in steps.iterdir())
  for step in steps.iterdir():
    for part in ("params", "opt"):
      tree = ocp.StandardCheckpointHandler().restore(step / part)
      leaves = jax.tree_util.tree_leaves_with_path(tree)
      out |= {
        f"{step.name} {part} {jax.tree_util.keystr(path)}": np.asarray(leaf).tobytes()
        for path, leaf in leaves
      }
    out |= {
      f"{step.name} {part}": (step / part / "metadata").read_bytes() for part in ("data", "config")
    }
  return out


_reading = threading.Lock()


def tensors(folder: pathlib.Path) -> dict[str, tuple[str, bytes]]:
  """What a command that only reads finds of a checkpoint."""
  import numpy as np

  from xcomp_jax.checkpoints import loading, saving
  from xcomp_jax.checkpoints.finding import resolve
  from xcomp_jax.checkpoints.sizes import read_vlm_config

  with _reading:
    found = resolve(str(folder))
    cfg = read_vlm_config(found, saving.AS_IT_IS, saving.NOT_TUNED)
    loading.read_tokenizer(found, cfg)
    return {
      path: (str(leaf.dtype), np.asarray(leaf).tobytes())
      for path, leaf in loading.parameters(loading.load_model(found, cfg)).items()
    }


def old_or_new(shared: pathlib.Path, own: pathlib.Path) -> str:
  """A whole export is there at any moment: the old one or the new one."""
  try:
    found = tensors(own / "out")
  except (OSError, ValueError) as error:
    return f"no export can be loaded: {error}; there are {sorted(os.listdir(own))}"
  return (
    ""
    if found in (tensors(shared / "old"), tensors(shared / "new"))
    else "the export is neither the old nor the new one"
  )


def old_export(shared: pathlib.Path, own: pathlib.Path) -> None:
  shutil.copytree(shared / "old", own / "out")


def tiny_training(shared: pathlib.Path, own: pathlib.Path) -> list[str]:
  changes = {
    "workdir": own / "run",
    "init_from": shared / "tiny",
    "data.train": shared / "store",
    "data.heldout": None,
    "data.threads": 1,
    "train.steps": 6,
    "train.batch_size": 2,
    "train.save_every": 1,
    "train.keep_last": 2,
    "train.log_every": 1,
  }
  return [
    "xcomp_jax.train",
    f"--config={ROOT / 'configs' / 'sct.py'}:tiny",
    *(f"--config.{key}={value}" for key, value in changes.items()),
  ]


COMMANDS = (
  Killed(
    name="predecode",
    leaves={"out"},
    result=lambda own, said: contents(own / "out"),
    line=lambda shared, own: command_lines.predecode(
      shared / "world", own / "out", "--workers=2", "--samples-per-shard=2"
    ),
  ),
  Killed(
    name="export",
    leaves={"out"},
    result=lambda own, said: contents(own / "out"),
    between=old_or_new,
    before=old_export,
    line=lambda shared, own: command_lines.export(
      shared / "tiny", own / "out", "--dtype=bfloat16", "--overwrite"
    ),
  ),
  Killed(
    name="ask",
    leaves={"film.npz", "page.html"},
    result=asked,
    line=lambda shared, own: [
      "xcomp_jax.ask",
      "--checkpoint",
      str(shared / "tiny"),
      "--video",
      str(shared / "world" / "videos" / "v0.mp4"),
      *LOOK,
      "--question=Which digit?",
      "--question=And then?",
      "--encoded",
      str(own / "film.npz"),
      "--report",
      str(own / "page.html"),
    ],
  ),
  Killed(
    name="evaluate",
    leaves={"out"},
    result=lambda own, said: answered(own / "out"),
    line=lambda shared, own: command_lines.evaluate(
      shared / "tiny",
      shared / "questions.json",
      shared / "world" / "videos",
      own / "out",
      *LOOK,
    ),
  ),
  Killed(
    name="needles",
    leaves={"out"},
    result=lambda own, said: answered(own / "out"),
    line=lambda shared, own: command_lines.needles(
      shared / "tiny",
      own / "out",
      "--synthetic=2",
      "--frames",
      "64",
      "--depths",
      "0",
      "1",
      "--clips-per-chunk=8",
    ),
  ),
  Killed(name="train", leaves={"run"}, result=trained, line=tiny_training),
)


def make(shared: pathlib.Path) -> None:
  """Writes what the commands read."""
  import decoding

  from xcomp_jax.data import predecoding

  shutil.copytree(ROOT / "assets" / "tiny", shared / "tiny")
  world = decoding.make_world(shared / "world")
  settings = predecoding.FrameSettings(
    image_size=48, max_frames=16, min_frames=8, fps=8.0, clip_frames=8
  )
  predecoding.predecode(world / "mixture.yaml", shared / "store", settings, root=world)
  questions = command_lines.questions(["v0", "v1", "v2"])
  (shared / "questions.json").write_text(json.dumps(questions))
  for name, dtype in (("old", "float32"), ("new", "bfloat16")):
    line = command_lines.export(shared / "tiny", shared / name, f"--dtype={dtype}")
    subprocess.run([sys.executable, "-m", *line], cwd=ROOT, check=True, capture_output=True)


# --- kills
# ----------------------------------------------------------------------------------------


class Kills:
  """The kills of one command."""

  def __init__(self, command: Killed, shared: pathlib.Path, work: pathlib.Path, r: random.Random):
    self.command, self.shared, self.r = command, shared, r
    self.own, self.log = work / command.name, work / f"{command.name}.log"
    self.history: list[str] = []

  def fresh(self) -> None:
    shutil.rmtree(self.own, ignore_errors=True)
    self.own.mkdir()
    self.command.before(self.shared, self.own)
    self.history = []

  def run(self, number: int = 0, after: float | None = None) -> tuple[int, str, str]:
    """Runs the command; killed before its `number`-th moment, or so many seconds `after` its start.
    Its end, and what it said.
    """
    self.log.unlink(missing_ok=True)
    line = [
      sys.executable,
      __file__,
      "trap",
      str(number),
      str(self.log),
      str(self.own),
      *self.command.line(self.shared, self.own),
    ]
    with (
      open(self.own.with_suffix(".out"), "w+") as out,
      open(self.own.with_suffix(".err"), "w+") as err,
    ):
      environment = os.environ | {"PYTHONPATH": str(ROOT)}
      process = subprocess.Popen(
        line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
      )
      try:
        process.wait(after if after is not None else 600)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
      out.seek(0)
      err.seek(0)
      said = out.read(), err.read()
    moments = self.log.read_text().splitlines() if self.log.exists() else []
    last = moments[-1] if moments else "nothing"
    if process.returncode >= 0:
      self.history.append(f"ended with {process.returncode}")
    else:
      self.history.append(
        f"killed before {last}" if after is None else f"killed after {after:.1f} s, {last}"
      )
    return process.returncode, *said

  def moments(self) -> list[str]:
    return self.log.read_text().splitlines()

  def undisturbed(self) -> None:
    """What comes of a run that is left alone, how long that takes, and its moments."""
    self.fresh()
    begun = time.monotonic()
    code, out, err = self.run()
    self.seconds = time.monotonic() - begun
    assert code == 0, err
    self.good, self.all = self.command.result(self.own, out), self.moments()

  def aims(self, count: int) -> list[int]:
    """Moments to be killed before: renames first, the others as chance wills."""
    numbers = [int(line.split()[0]) for line in self.all]
    renames = [n for n, line in zip(numbers, self.all) if " os.rename " in line]
    after = [n + 1 for n in renames]
    chosen = self.r.sample(renames, min(len(renames), count // 2 or 1)) + self.r.sample(
      after, min(len(after), count // 4 or 1)
    )
    others = [n for n in numbers if n not in chosen]
    chosen += self.r.sample(others, min(len(others), max(0, count - len(chosen))))
    self.r.shuffle(chosen)
    return chosen or [1]

  def faults(self, kills: int) -> list[str]:
    """Kills it so often, and says what was wrong."""
    self.undisturbed()
    aims, killed, found, rounds = itertools.cycle(self.aims(kills)), 0, [], 0
    while killed < kills and rounds < 3 * kills:
      rounds += 1
      self.fresh()
      fault, done = "", None  # what the command that was done has said
      for attempt in range(2):
        aimed = (rounds + attempt) % 2 == 1
        code, out, err = (
          self.run(next(aims)) if aimed else self.run(after=self.r.uniform(0.3, 1.0) * self.seconds)
        )
        killed += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL):
          fault = f"ends with {code} after a kill: {err[-600:]}"
        done = None if code else out
        fault = fault or self.command.between(self.shared, self.own)
        if fault or code == 0:
          break
      for _ in range(AGAIN):
        if fault or done is not None:
          break
        code, out, err = self.run()
        if code:
          time.sleep(PAUSE)
        else:
          done = out
      if done is None:
        fault = fault or f"is not done after {AGAIN} times: {err[-600:]}"
      else:
        fault = fault or self.differs(done)
      if fault:
        found.append(f"{self.command.name}: {fault}\n  " + "\n  ".join(self.history))
        print(found[-1], flush=True)
    if killed < kills:
      found.append(f"{self.command.name}: only {killed} kills in {rounds} rounds")
      print(found[-1], flush=True)
    print(
      f"{self.command.name}: {killed} kills in {rounds} rounds, {len(self.all)} moments, "
      f"{len(found)} faults",
      flush=True,
    )
    return found

  def differs(self, said: str) -> str:
    """What is not as in the undisturbed run."""
    made = self.command.result(self.own, said)
    other = sorted(
      key for key in made.keys() | self.good.keys() if made.get(key) != self.good.get(key)
    )
    if other:
      key = other[0]
      return (
        f"{', '.join(other[:5])} differ: {str(made.get(key))[:200]} and undisturbed "
        f"{str(self.good.get(key))[:200]}"
      )
    left = sorted(path.name for path in self.own.iterdir() if path.name not in self.command.leaves)
    return f"leaves {', '.join(left)}" if left else ""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
  parser.add_argument("--kills", type=int, default=10)
  parser.add_argument("--jobs", type=int, default=2)
  parser.add_argument("--work", type=pathlib.Path, default=ROOT / ".cache" / "kill")
  parser.add_argument(
    "commands",
    nargs="*",
    help=f"of {', '.join(command.name for command in COMMANDS)}; default: all",
  )
  args = parser.parse_args()
  args.work = args.work.absolute()
  print(f"seed {args.seed}", flush=True)
  shutil.rmtree(args.work, ignore_errors=True)
  args.work.mkdir(parents=True)
  make(args.work / "shared")
  chosen = [command for command in COMMANDS if command.name in (args.commands or [command.name])]

  def faults(command):
    chance = random.Random(f"{args.seed}/{command.name}")
    return Kills(command, args.work / "shared", args.work, chance).faults(args.kills)

  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    found = [fault for some in pool.map(faults, chosen) for fault in some]
  print(f"seed {args.seed}: {len(found)} faults")
  sys.exit(bool(found))


if __name__ == "__main__":
  environment()
  if sys.argv[1:2] == ["trap"]:
    number, log, place, *line = sys.argv[2:]
    trap(int(number), log, place, line)
  else:
    main()
