"""The demo and the base recipe from end to end, at the smallest size."""

import json

import pytest

from xcomp_jax import demo


def test_wilson_interval():  # the textbook example: 10 of 20
  low, high = demo.wilson(10, 20)
  assert low == pytest.approx(0.2993, abs=1e-4) and high == pytest.approx(0.7007, abs=1e-4)


@pytest.mark.slow
def test_the_demo_leaves_what_it_promises(tmp_path, capsys):
  demo.main(["--out", str(tmp_path / "demo"), "--videos", "16", "--steps", "2"])
  out = tmp_path / "demo"
  printed = capsys.readouterr().out
  for name in ("no compression", "LP-Comp, not trained", "LP-Comp after SCT"):
    assert printed.count(name) >= 2 and "400 questions" in printed
  assert (out / "run" / "checkpoints" / "2").is_dir()
  assert (out / "export" / "model.safetensors").exists()
  assert json.loads((out / "export" / "xcomp.json").read_text())["lp_comp"]["keep"] == "suffix"
