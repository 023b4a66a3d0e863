"""Damaged files of every format, given to readers and commands (`fuzzing`); and that what is wrong
would be seen.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import damaging
import fuzzing
import pytest

pytestmark = pytest.mark.slow
SEED, CASES, COMMANDS = 33, 300, 30


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
  """What became of every case. Faults' files are kept in .cache/fuzz."""
  file = tmp_path_factory.mktemp("fuzz") / "cases.jsonl"
  line = [
    sys.executable,
    fuzzing.__file__,
    f"--seed={SEED}",
    f"--cases={CASES}",
    f"--commands={COMMANDS}",
    "--json",
    str(file),
  ]
  done = subprocess.run(line, cwd=fuzzing.ROOT, capture_output=True, text=True)
  assert file.exists(), done.stdout + done.stderr
  cases = [json.loads(line) for line in file.read_text().splitlines()]
  assert (done.returncode == 0) == (not any(case["fault"] for case in cases)), (
    done.stdout[-3000:] + done.stderr[-3000:]
  )
  return cases


def faults(cases):
  return "\n\n".join(fuzzing.told(case, SEED) for case in cases if case["fault"])


def test_damaged_files_are_refused_or_read_rightly(survey):
  readers = [case for case in survey if not case["command"]]
  assert len(readers) == CASES
  assert not faults(readers), "\n" + faults(readers)


def test_commands_over_damaged_files_end_with_one_error_or_are_right(survey):
  commands = [case for case in survey if case["command"]]
  assert len(commands) == COMMANDS
  assert not faults(commands), "\n" + faults(commands)


def test_every_format_is_damaged_in_many_ways(survey):
  assert (
    len({case["what"] for case in survey}) >= 22 + 14
    and len({name for case in survey for name, _ in case["steps"]}) >= 20
  )


def hangs(given, file):
  time.sleep(60)


def crashes(given, file):
  os.kill(os.getpid(), signal.SIGSEGV)


def grows(given, file):
  return len(b"x" * (400 << 20))


def writes(given, file):
  (given / "beside.txt").write_text("")


def litters(given, file):
  pathlib.Path(os.environ["TMPDIR"], "x").write_text("")


def changes(given, file):
  (given / "other" / "b.json").write_text("[3]")


def raises(given, file):
  json.loads(file.read_text())["a"]


def mumbles(given, file):
  raise FileNotFoundError("something is wrong")


def raves(given, file):
  raise OSError(f"{file}: " + "x" * 2000)


def believes(given, file):
  return "3"


def refuses(given, file):
  raise OSError(f"{file} is damaged")


SEEN = {
  hangs: "hangs",
  crashes: "is killed by signal 11",
  grows: "takes ",
  writes: "touches given/beside.txt",
  litters: "touches tmp/x",
  changes: "touches given/other/b.json",
  raises: "raises ",
  mumbles: "does not name the file",
  raves: "says 2,",
  believes: "reads 3",
  refuses: "",
}


@pytest.mark.parametrize("read", SEEN, ids=lambda read: read.__name__)
def test_what_is_wrong_is_seen(read, tmp_path):
  helpers = pathlib.Path(fuzzing.__file__).parent
  done = subprocess.run(
    [sys.executable, __file__, read.__name__, str(tmp_path)],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": f"{fuzzing.ROOT}{os.pathsep}{helpers}"},
  )
  assert done.returncode == 0, done.stderr
  fault = json.loads(done.stdout.splitlines()[-1])
  assert fault.startswith(SEEN[read]) and bool(fault) == bool(SEEN[read]), fault


def seen(read, tmp_path):
  """The fault of a reader; in a process that may fork."""
  good = tmp_path / "good"
  for name in ("own/a.json", "other/b.json"):
    (good / name).parent.mkdir(parents=True)
    (good / name).write_text("[1, 2]")
  fuzzing.READER = (2, 300 << 20)

  def right(given, file, good, found):
    return "" if found == good else f"reads {found}"

  subject = fuzzing.Subject(name="x", files=("own/a.json",), read=read, right=right)
  survey = fuzzing.Survey(good, tmp_path / "work", tmp_path / "kept", (subject,), (), 0)
  survey.known["x", "own/a.json"] = "1"
  return survey.fault(subject, pathlib.Path("own/a.json"), [("cut", 0)])[0]


def test_the_same_seed_damages_the_same_way(tmp_path):
  for r in map(random.Random, range(200)):
    file = tmp_path / f"own{r.random()}" / "a.json"
    file.parent.mkdir()
    file.write_text('{"a": [1, "b", {"c": null}]}')
    steps = damaging.choose(r, file)
    if steps[0][0] in {operation.__name__ for operation in damaging.AT}:
      continue
    made = []
    for _ in range(2):
      file.write_text('{"a": [1, "b", {"c": null}]}')
      damaging.damage(file, steps)
      made.append(file.read_bytes())
      shutil.rmtree(file.parent.with_name(damaging.ELSEWHERE))
    assert made[0] == made[1]


if __name__ == "__main__":
  name, place = sys.argv[1:]
  print(json.dumps(seen(globals()[name], pathlib.Path(place))))
