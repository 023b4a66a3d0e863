"""The demo and the base recipe from end to end, at the smallest size."""

import json

import numpy as np
import pytest

from xcomp_jax import demo


@pytest.mark.pure
def test_a_gain_is_paired():
  before, after = (
    np.array([True, False, False, True] * 25),
    np.array([True, True, False, True] * 25),
  )
  mean, low, high = demo.gain(before, after)
  # a quarter of the answers changed for the better, none for the worse
  half = 1.96 * np.sqrt(0.25 * 0.75 / 99)
  assert (mean, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))


@pytest.mark.pure
def test_only_what_an_earlier_demo_made_is_cleared(tmp_path, capsys):
  theirs = {"notes.txt", "base/many/model/weights", "run.txt"}
  for name in ("world/mine", *theirs):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()

  def files():
    return {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}

  for there in ((), (".lock",)):  # a run has a lock, too
    for name in there:
      (tmp_path / name).touch()
    with pytest.raises(SystemExit):
      demo.main(["--out", str(tmp_path)])
    assert (
      files() == {"world/mine", *theirs, *there}
      and "holds what no demo has made" in capsys.readouterr().err
    )
  (tmp_path / ".lock").unlink()
  demo.clear(tmp_path / "absent", demo.MADE)
  for name in demo.MADE:
    (tmp_path / name / "of").mkdir(parents=True, exist_ok=True)
    (tmp_path / name / "of" / "demo").touch()
  demo.clear(tmp_path, demo.MADE)
  assert files() == theirs and not any((tmp_path / name).exists() for name in demo.MADE)


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(tmp_path, capsys):
  demo.main(["--out", str(tmp_path / "demo"), "--videos", "16", "--steps", "2"])
  out = tmp_path / "demo"
  printed = capsys.readouterr().out
  for name in ("no compression", "LP-Comp, not trained", "LP-Comp after SCT"):
    assert (
      printed.count(name) >= 2
      and "over 400 held-out questions" in printed
      and "gain by SCT" in printed
    )
  assert (out / "run" / "checkpoints" / "2").is_dir()
  assert (out / "export" / "model.safetensors").exists()
  assert json.loads((out / "export" / "xcomp.json").read_text())["lp_comp"]["keep"] == "suffix"
