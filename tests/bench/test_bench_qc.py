"""What QC-Comp costs is counted."""

import pathlib

import pytest

from xcomp_jax.bench import parts, qc

BASE = pathlib.Path(__file__).parents[2] / "assets" / "tiny"


def test_a_later_question_leaves_out_the_tower_and_the_visual_rounds():
  for mode in ("aligned", "local"):
    got = qc.question_costs(BASE, mode, 128, 64, 8)
    spent = [
      got[f"{name}, TFLOP"] for name in ("tower", "visual rounds", "question's rows", "answer")
    ]
    assert min(spent) > 0
    assert got["first, TFLOP"] == pytest.approx(sum(spent)) and got[
      "later, TFLOP"
    ] == pytest.approx(sum(spent[2:]))


def test_the_operations_of_scoring_are_counted(capsys):
  small = parts.sized("small", "float32")
  for mode in ("aligned", "local", "global"):
    got = qc.scoring_costs(small, mode, 128)
    seen, asked, calls = parts.selecting(small, mode, 128, real=False)
    assert got["calls"] == calls >= 1
    assert got["TFLOP"] == pytest.approx(calls * (seen.flops + asked.flops) / 1e12) and asked.flops
    assert got["official_TFLOP_ratio"] == pytest.approx(qc.OFFICIAL_FLOPS / 8 / got["TFLOP"] / 1e12)
  qc.main(["select", "--frames=64", "--mode=local"], sizes="small")
  assert "official_TFLOP_ratio" in capsys.readouterr().out
