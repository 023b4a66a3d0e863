"""Intervals and tables of the study."""

import json

import numpy as np
import pytest

from xcomp_jax import demo, findings
from xcomp_jax.films import KINDS


def drawn(seed, films, share=0.7):
  return np.random.default_rng(seed).random((films, len(KINDS))) < share


def bits(rows):
  return "".join("01"[int(v)] for v in rows.ravel())


def test_an_interval_of_independent_questions_is_that_of_a_share():
  rows = drawn(0, 400)
  share = findings.interval([rows])
  low, high = demo.wilson(int(rows.sum()), rows.size)
  assert share.mean == rows.mean()
  assert (share.low, share.high) == pytest.approx((low, high), abs=0.006)


def test_questions_about_one_film_are_not_independent():
  films = np.random.default_rng(1).random((200, 1)) < 0.7
  together, apart = findings.interval([np.repeat(films, len(KINDS), 1)]), findings.interval([drawn(1, 200)])
  assert together.high - together.low > 2 * (apart.high - apart.low)


def test_seeds_that_differ_widen_the_interval():
  same = [drawn(seed, 400) for seed in range(3)]
  differ = [drawn(seed, 400, share) for seed, share in enumerate((0.6, 0.7, 0.8))]
  wide = lambda rows: findings.interval(rows).high - findings.interval(rows).low
  assert wide(differ) > 3 * wide(same)


def test_a_difference_is_paired_by_film():
  rows = drawn(0, 200, 0.5)
  better = rows.copy()
  better[::4] = True
  gain = findings.interval([better], [rows])
  alone = findings.interval([better])
  assert gain.mean == pytest.approx(better.mean() - rows.mean()) and gain.low > 0
  assert gain.high - gain.low < alone.high - alone.low
  nothing = findings.interval([rows], [rows])
  assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)


def test_a_difference_between_measures_of_the_same_models_is_paired_by_seed():
  seeds = [drawn(seed, 200, share) for seed, share in enumerate((0.5, 0.7, 0.9))]
  nothing = findings.interval(seeds, seeds, same=True)
  assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)
  apart = findings.interval(seeds, seeds)
  assert apart.mean == 0 and apart.high - apart.low > 0.3


def test_the_bound_is_what_was_shown_and_chance():
  hits = np.zeros((10, len(KINDS)), bool)
  hits[:5] = True
  assert float(findings._bound({"hits": bits(hits)})) == pytest.approx(100 * (0.5 + 0.5 * np.mean(list(findings.CHANCE.values()))), abs=0.1)


def measure(seed, share=0.7):
  return {"right": bits(drawn(seed, 20, share)), "tokens": 187.2, "TFLOP": 0.001, "seconds": 0.01}


def test_tables_have_what_is_there(tmp_path, capsys):
  write = lambda name, result: (tmp_path / f"{name}.json").write_text(json.dumps({"result": result}))
  write("base", {"heldout": {rule: measure(1, 0.5) for rule in ("none", "progressive", "uniform")}})
  for seed in range(2):
    write(f"tune_progressive_{seed}", {"heldout": {"progressive": measure(seed, 0.9)}})
  page = tmp_path / "page.md"
  page.write_text("before\n<!-- compression -->\nold\n<!-- end -->\nafter\n" + "".join(f"<!-- {name} -->\n<!-- end -->\n" for name in findings.TABLES if name != "compression"))
  printed = findings.report(tmp_path, page)
  assert printed in capsys.readouterr().out
  lines = {line.split(" | ")[0].strip("| "): [cell.strip("| ") for cell in line.split(" | ")] for line in page.read_text().splitlines()}
  right = findings.right(measure(1, 0.5)).mean()
  assert lines["progressive"][1].startswith(f"{100 * right:.1f} (") and lines["progressive"][7] == "2"
  assert lines["uniform"][3] == "-" and "stepwise" not in lines
  assert lines["uniform"][8:] == ["187", "1.000", "10"]
  assert lines["chance"][1:] == ["17", "25", "25", "17", "33", "25"]
  assert "old" not in page.read_text() and page.read_text().startswith("before") and "after" in page.read_text()
  page.write_text("nothing")
  with pytest.raises(ValueError, match="has 0 places between <!-- compression -->"):
    findings.report(tmp_path, page)


def test_modes_of_selection_are_paired_with_local_and_tell_what_they_cost(tmp_path):
  hits = {"hits": bits(np.ones((20, len(KINDS)), bool)), "rank": [0, 1, 0, None, None, None] * 20}
  modes = {"uniform": measure(0, 0.2) | hits, "global": measure(1, 0.6) | hits, "local": measure(1, 0.6) | hits}
  for seed in range(2):
    (tmp_path / f"select_{seed}.json").write_text(json.dumps({"result": {"long": {"place": [], **modes}}}))
  lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in findings.selection(findings.Cells(tmp_path)).splitlines()]
  assert [line[1] for line in lines[2:]] == ["uniform", "global", "local"]
  uniform, same, local = lines[2:]
  right = {mode: findings.right(one).mean() for mode, one in modes.items()}
  assert uniform[3].startswith(f"{100 * (right['uniform'] - right['local']):.1f} (")
  assert same[3] == "0.0 (0.0 to 0.0)" and local[3] == "-"
  assert uniform[6] == "-" and local[6].startswith("66.7 (")
  assert [*local[4:6], *local[7:]] == ["100.0", "100.0 (100.0 to 100.0)", "2", "187", "1.000", "10"]


def test_the_plot_of_bias_tells_where_what_is_needed_is_ranked_first(tmp_path):
  places = [0.02, 0.03, 0.98, None]
  modes = {"global": [1, 0, 0, None], "local": [0, 0, 0, None]}
  relevance = {"global": np.linspace(1, 2, 32).reshape(2, 16), "local": np.ones((2, 16))}
  result = {mode: {"rank": ranks, "relevance": relevance[mode].tolist()} for mode, ranks in modes.items()}
  (tmp_path / "select_0.json").write_text(json.dumps({"result": {"long": {"place": places, **result}}}))
  figure = findings.plot_bias(findings.Cells(tmp_path))
  empty, shots, first = (
    {line.get_label(): np.asarray(line.get_ydata(), float) for line in axes.lines} for axes in figure.axes
  )
  np.testing.assert_allclose(empty["global"], relevance["global"][0])
  np.testing.assert_allclose(shots["local"], 1)
  assert first["global"][0] == 0.5 and first["local"][0] == 1 and first["global"][3] == 1 and np.isnan(first["global"][1])
