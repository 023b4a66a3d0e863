"""The check of a card, at sizes that run here; what it calls right and wrong."""

import json
import sys
import time

import pytest

from xcomp_jax.bench import gpu_check
from xcomp_jax.model.attention import attend


@pytest.mark.parametrize("case", gpu_check.SMALL, ids=lambda case: case.name)
def test_a_kernel_that_is_right_and_one_that_sees_too_much(case):
  assert gpu_check.compare_implementation(case, "xla_chunked")["right"]

  def wrong(q, k, v, mask, *, implementation):
    return attend(q, k * 1.05, v, mask, implementation=implementation)

  row = gpu_check.compare_implementation(case, "xla_chunked", wrong)
  assert not row["right"] and row["result"] > 2 * row["result by einsum"]


@pytest.mark.pure
def test_without_a_gpu_nothing_is_checked(tmp_path):
  with pytest.raises(ValueError, match="there is no GPU: JAX computes on cpu"):
    gpu_check.check_kernels(tmp_path, small=False)


@pytest.mark.pure
def test_numbers_that_are_none_are_far_from_all():
  assert gpu_check.distance([1.0, float("nan")], [1.0, 2.0]) == float("inf")


def test_parts_run_one_after_another_and_what_is_cut_short_is_kept(tmp_path, capsys):
  def python(code):
    return [sys.executable, "-c", code]

  found = {
    "kernels": [python("print('figures')")],
    "parity": [
      python("print('begun', flush=True); import time; time.sleep(60)"),
      python("print('never')"),
    ],
    "step": [python("raise SystemExit(3)")],
    "ask": [python("print(1)"), python("print(2)")],
    "bench": [python("import time; time.sleep(60)")],
  }
  begun = time.monotonic()
  assert not gpu_check.supervise(tmp_path, 0.06, found)
  assert time.monotonic() - begun < 30
  summary = {
    name: row["status"] for name, row in json.loads((tmp_path / "summary.json").read_text()).items()
  }
  assert summary == {
    "kernels": "done",
    "parity": "cut short",
    "step": "exit code 3",
    "ask": "done",
    "bench": "cut short",
  }
  assert (
    "begun" in (tmp_path / "parity.txt").read_text()
    and "never" not in (tmp_path / "parity.txt").read_text()
  )
  assert "=== ask: done" in capsys.readouterr().out
  # a benchmark that ran out of time is no fault
  assert gpu_check.supervise(tmp_path, 0.02, {name: found[name] for name in ("kernels", "bench")})
