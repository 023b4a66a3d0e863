"""That `killing` sees what is wrong; `make kill` runs it over the commands."""

import random

import killing
import pytest

pytestmark = pytest.mark.slow


def old_out(shared, own):
  (own / "out").mkdir()
  for name in "abc":
    (own / "out" / name).write_text("old")


def whole(shared, own):
  found = [path for path in (own / "out", own / "out.old") if path.exists()]
  return (
    ""
    if any(
      len({file.read_text() for file in path.iterdir()}) == 1 and len(list(path.iterdir())) == 3
      for path in found
    )
    else "nothing is whole"
  )


@pytest.mark.parametrize(
  "how, seen", [("careful", ""), ("clumsy", "nothing is whole"), ("late", "differ")]
)
def test_what_is_lost_is_seen(tmp_path, how, seen):
  def result(own, said):
    return {"out": killing.contents(own / "out")}

  if how == "late":  # something that depends on how often the command was begun
    count = iter(range(100))

    def result(own, said):
      return {"out": next(count)}

  command = killing.Killed(
    name="x",
    leaves={"out"},
    result=result,
    before=old_out,
    between=whole,
    line=lambda shared, own: ["clumsy", how, str(own)],
  )
  faults = killing.Kills(command, tmp_path, tmp_path, random.Random(0)).faults(8)
  assert bool(faults) == bool(seen), faults
  assert not seen or any(seen in fault for fault in faults)


def test_what_is_left_is_seen(tmp_path):
  command = killing.Killed(
    name="x",
    leaves=set(),
    result=lambda own, said: {},
    before=old_out,
    line=lambda shared, own: ["clumsy", "careful", str(own)],
  )
  assert all(
    "leaves out" in fault
    for fault in killing.Kills(command, tmp_path, tmp_path, random.Random(0)).faults(2)
  )
