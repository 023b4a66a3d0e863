"""What QC-Comp costs and finds is measured, and counted."""

import pathlib
import shutil

import numpy as np
import pytest

from xcomp_jax.bench import parts, qc
from xcomp_jax.bench.parts import SMALL_LLM, SMALL_TOWER
from xcomp_jax.synthetic import world

BASE = pathlib.Path(__file__).parents[2] / "assets" / "tiny"


def test_a_later_question_leaves_out_the_tower_and_the_visual_rounds():
  for mode in ("aligned", "local"):
    got = qc.question_costs(BASE, mode, 128, 64, 8)
    parts = [
      got[f"{name}, TFLOP"] for name in ("tower", "visual rounds", "question's rows", "answer")
    ]
    assert min(parts) > 0
    assert got["first, TFLOP"] == pytest.approx(sum(parts)) and got[
      "later, TFLOP"
    ] == pytest.approx(sum(parts[2:]))


def test_needles_count_the_clips_that_were_kept(tmp_path):
  world.write_world(
    tmp_path / "w",
    [world.WorldSplit(name="heldout", videos=1, fewest=16, most=16, questions=4)],
    seed=0,
    workers=1,
  )
  asked = qc.needles(BASE, tmp_path / "w", ("local",), kept=64)
  assert set(asked) == {"local", "uniform"} and all(n == 4 for _, n in asked.values())
  (annotation,) = world.read_split(tmp_path / "w", "heldout")
  even = np.linspace(0, 15, 8).round()
  assert asked["uniform"][0] == sum(scene in even for scene in annotation["scenes"])
  # as released checkpoints are
  bare = shutil.copytree(BASE, tmp_path / "bare", ignore=shutil.ignore_patterns("xcomp.json"))
  assert qc.needles(bare, tmp_path / "w", ("local",), kept=128)["local"] == (4, 4)


def test_the_cost_of_scoring_is_measured_and_counted(monkeypatch, capsys):
  monkeypatch.setattr(parts, "MEASURED", SMALL_LLM)
  monkeypatch.setattr(parts, "TOWER", SMALL_TOWER)
  got = {mode: qc.time_scoring(mode, 128) for mode in ("aligned", "local", "global")}
  for out in got.values():
    assert min(out[name] for name in ("visual_s", "question_s", "TFLOP", "memory_GB")) > 0
    assert out["official_TFLOP_ratio"] == pytest.approx(qc.OFFICIAL_FLOPS / 8 / out["TFLOP"] / 1e12)
  assert got["local"]["calls"] == 1 and got["local"]["memory_GB"] < got["aligned"]["memory_GB"] * 2
  qc.main(["select", "--frames=64", "--mode=local"])
  assert "official_TFLOP_ratio" in capsys.readouterr().out
