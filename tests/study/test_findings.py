"""Intervals and tables of the study."""

import json
import pathlib

import numpy as np
import pytest
from scipy.stats import binomtest

from xcomp_jax.study import cell_results, figures, findings, intervals, miniature, study
from xcomp_jax.synthetic.films import KINDS


def drawn(seed, films, share=0.7):
  return np.random.default_rng(seed).random((films, len(KINDS))) < share


def bits(rows):
  return "".join("01"[int(v)] for v in rows.ravel())


@pytest.mark.pure
def test_an_interval_of_independent_questions_is_that_of_a_share():
  rows = drawn(0, 400)
  share = intervals.interval([rows])
  whole = binomtest(int(rows.sum()), rows.size).proportion_ci(method="wilson")
  assert share.mean == rows.mean()
  assert (share.low, share.high) == pytest.approx((whole.low, whole.high), abs=0.006)


@pytest.mark.pure
def test_questions_about_one_film_are_not_independent():
  films = np.random.default_rng(1).random((200, 1)) < 0.7
  together, apart = (
    intervals.interval([np.repeat(films, len(KINDS), 1)]),
    intervals.interval([drawn(1, 200)]),
  )
  assert together.high - together.low > 2 * (apart.high - apart.low)


@pytest.mark.pure
def test_seeds_that_differ_widen_the_interval():
  same = [drawn(seed, 400) for seed in range(3)]
  differ = [drawn(seed, 400, share) for seed, share in enumerate((0.6, 0.7, 0.8))]

  def wide(rows):
    return intervals.interval(rows).high - intervals.interval(rows).low

  assert wide(differ) > 3 * wide(same)


@pytest.mark.pure
def test_a_difference_is_paired_by_film():
  rows = drawn(0, 200, 0.5)
  better = rows.copy()
  better[::4] = True
  gain = intervals.interval([better], [rows])
  alone = intervals.interval([better])
  assert gain.mean == pytest.approx(better.mean() - rows.mean()) and gain.low > 0
  assert gain.high - gain.low < alone.high - alone.low
  nothing = intervals.interval([rows], [rows])
  assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)


@pytest.mark.pure
def test_a_difference_between_measures_of_the_same_models_is_paired_by_seed():
  seeds = [drawn(seed, 200, share) for seed, share in enumerate((0.5, 0.7, 0.9))]
  nothing = intervals.interval(seeds, seeds, same=True)
  assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)
  apart = intervals.interval(seeds, seeds)
  assert apart.mean == 0 and apart.high - apart.low > 0.3


@pytest.mark.pure
def test_questions_that_do_not_count_are_left_out():
  rows = drawn(0, 300)
  rows[:, 3:] = False
  part = np.where(np.arange(len(KINDS)) < 3, rows, np.nan)
  part[:150] = np.nan
  share, alone = intervals.interval([part, part]), intervals.interval([rows[150:, :3]])
  assert share.mean == pytest.approx(rows[150:, :3].mean()) and share.mean == alone.mean
  assert (share.low, share.high) == pytest.approx((alone.low, alone.high), abs=0.01)


@pytest.mark.pure
def test_a_share_that_no_resample_changes_has_the_exact_interval():
  every = intervals.interval([np.ones((20, 6), bool)] * 3)
  # all of 20 films right, by 1 in 40
  assert every.mean == every.high == 1 and every.low**20 == pytest.approx(0.025)
  # half of the films don't count
  none = intervals.interval([np.where(np.arange(40)[:, None] < 20, np.zeros((40, 6)), np.nan)])
  assert none.mean == none.low == 0 and (1 - none.high) ** 20 == pytest.approx(0.025)


@pytest.mark.pure
def test_no_share_is_less_than_nothing():
  assert str(intervals.RightShare(-0.0001, -0.021, -0.0004)) == "0.0 (-2.1 to 0.0)"


@pytest.mark.pure
def test_the_bound_is_what_was_shown_and_chance():
  hits, chance = np.zeros((10, len(KINDS)), bool), np.mean(list(cell_results.CHANCE.values()))
  hits[:5] = True
  none = {"hits": bits(np.zeros_like(hits))}
  assert cell_results.bound([{"hits": bits(hits)}]) == pytest.approx(0.5 + 0.5 * chance)
  # of several seeds their mean
  assert cell_results.bound([{"hits": bits(hits)}, none]) == pytest.approx(0.25 + 0.75 * chance)


def measure(seed, share=0.7):
  return {"right": bits(drawn(seed, 20, share)), "tokens": 187.2, "TFLOP": 0.001, "seconds": 0.01}


@pytest.mark.pure
def test_tables_have_what_is_there(tmp_path, capsys):
  def write(name, result):
    return (tmp_path / f"{name}.json").write_text(json.dumps({"result": result}))

  write("base", {"heldout": {rule: measure(1, 0.5) for rule in ("none", "progressive", "uniform")}})
  for seed in range(2):
    write(f"tune_progressive_{seed}", {"heldout": {"progressive": measure(seed, 0.9)}})
  page = tmp_path / "page.md"
  page.write_text(
    "before\n<!-- compression -->\nold\n<!-- end -->\nafter\n"
    + "".join(
      f"<!-- {name} -->\n<!-- end -->\n" for name in findings.TABLES if name != "compression"
    )
  )
  printed = findings.report_findings(tmp_path, page)
  assert printed in capsys.readouterr().out
  lines = {
    line.split(" | ")[0].strip("| "): [cell.strip("| ") for cell in line.split(" | ")]
    for line in page.read_text().splitlines()
  }
  right = cell_results.right(measure(1, 0.5)).mean()
  assert (
    lines["progressive"][1].startswith(f"{100 * right:.1f} (") and lines["progressive"][8] == "2"
  )
  assert lines["uniform"][3] == "-" and "stepwise" not in lines
  assert lines["uniform"][9:] == ["187", "1.000", "10"]
  assert lines["chance"][1:] == ["17", "25", "25", "17", "33", "25"]
  assert (
    "old" not in page.read_text()
    and page.read_text().startswith("before")
    and "after" in page.read_text()
  )
  page.write_text("nothing")
  with pytest.raises(miniature.StudyError) as caught:
    findings.report_findings(tmp_path, page)
  assert caught.value.fields == {"where": "compression", "found": 0}


def cells_of(rows):
  names, *lines = map(list, rows)
  assert all(len(line) == len(names) for line in lines)
  return lines


@pytest.mark.pure
def test_modes_of_selection_are_paired_and_tell_what_they_cost(tmp_path):
  few, ranks = drawn(4, 20), [0, 1, 0, None, None, None] * 20
  hits = {
    "hits": bits(np.ones((20, len(KINDS)), bool)),
    "few": bits(few),
    "rank": ranks,
    "other": ranks,
  }
  modes = {
    "uniform": measure(0, 0.2) | hits,
    "global": measure(1, 0.6) | hits,
    "local": measure(1, 0.6) | hits,
  }
  modes |= {
    "global_answer": measure(2, 0.5) | hits,
    "local_answer": measure(3, 0.9) | hits | {"other": [5, 1, 0, None, None, None] * 20},
  }
  for seed in range(2):
    (tmp_path / f"select_progressive_{seed}.json").write_text(
      json.dumps({"result": {"long": {"place": [], **modes}}})
    )
  lines = cells_of(findings.selection(cell_results.Cells(tmp_path)))
  assert [line[1] for line in lines] == [
    "uniform",
    "global",
    "local",
    "global, the answer's row",
    "local, the answer's row",
  ]
  uniform, same, local, _, answer = lines
  right = {mode: cell_results.right(one).mean() for mode, one in modes.items()}

  def less(mode, other):
    return f"{100 * (right[mode] - right[other]):.1f} ("

  assert uniform[3].startswith(less("uniform", "global")) and uniform[4].startswith(
    less("uniform", "local")
  )
  assert same[3:5] == ["-", "0.0 (0.0 to 0.0)"] and local[3:5] == ["0.0 (0.0 to 0.0)", "-"]
  # by the same rows
  assert answer[3].startswith(less("local_answer", "global_answer")) and answer[4] == "-"
  # of the kinds that need one scene
  assert uniform[6].startswith(f"{100 * few[:, :3].mean():.1f} (")
  assert local[5] == "100.0" and local[7:] == ["2", "1.000", "10"]
  uniform, _, local, _, answer = cells_of(findings.retrieval(cell_results.Cells(tmp_path)))
  assert uniform[1:] == ["uniform", "100.0 (83.2 to 100.0)", "-", "-", "-"]
  assert (
    local[3].startswith("66.7 (")
    and local[4].startswith("66.7 (")
    and answer[4].startswith("33.3 (")
  )
  assert local[5] == "100, 0, 100"


@pytest.mark.pure
def test_frames_are_compared_with_as_many_and_half_of_them(tmp_path):
  hits = {"hits": bits(np.ones((20, len(KINDS)), bool))}
  wide = {"none": {6: 0.3, 12: 0.4}, "progressive": {6: 0.5, 12: 0.9}, "early": {6: 0.6, 12: 0.5}}
  rows = {
    rule: {str(n): measure(n, share) | hits for n, share in of.items()} for rule, of in wide.items()
  }
  for rule, of in rows.items():
    (tmp_path / f"tune_{rule}_0.json").write_text(json.dumps({"result": {"wide": {rule: of}}}))
  lines = {line[0]: line[1:] for line in cells_of(findings.by_frames(cell_results.Cells(tmp_path)))}
  right = {
    rule: {n: cell_results.right(one).mean() for n, one in of.items()} for rule, of in rows.items()
  }

  def less(n, other):
    return f"{100 * (right['progressive'][n] - right['none'][other]):.1f} ("

  name = "LP-Comp after SCT less no compression, tuned, with {} frames"
  assert [
    cell.startswith(less(n, n)) for cell, n in zip(lines[name.format("as many")], ("6", "12"))
  ] == [True, True]
  assert lines[name.format("half of the")][0] == "-" and lines[name.format("half of the")][
    1
  ].startswith(less("12", "6"))
  early = lines["the early schedule after SCT less LP-Comp after SCT, with as many frames"]
  assert not any("1,200" in name for name in lines)
  assert early[1].startswith(f"{100 * (right['early']['12'] - right['progressive']['12']):.1f} (")
  for rule in ("none", "progressive"):
    (tmp_path / f"longer_{rule}_0.json").write_text((tmp_path / f"tune_{rule}_0.json").read_text())
  lines |= {
    line[0]: line[1:] for line in cells_of(findings.by_frames(cell_results.Cells(tmp_path)))
  }
  assert lines["LP-Comp, 1,200 steps"] == lines["LP-Comp after SCT"]
  for frames in ("as many", "half of the"):
    assert (
      lines[f"LP-Comp, 1,200 steps less no compression, 1,200 steps, with {frames} frames"]
      == lines[name.format(frames)]
    )


@pytest.mark.pure
def test_longer_tunings_are_compared_with_shorter_ones_and_with_other_rules(tmp_path):
  # of early only the longer one is there
  shares = {
    "none": (0.8, 0.85),
    "progressive": (0.6, 0.75),
    "early": (None, 0.8),
  }
  right = {}
  for rule, pair in shares.items():
    for cell, share in zip(("tune", "longer"), pair):
      if share is None:
        continue
      seeds = range(2 if (cell, rule) == ("tune", "none") else 1)
      for seed in seeds:
        measures = [measure(len(right) + 10 * k + seed, share) for k in range(3)]
        right.setdefault((cell, rule), []).append(
          [cell_results.right(one).mean() for one in measures]
        )
        result = {
          "heldout": {rule: measures[0]},
          "wide": {rule: {"48": measures[1], "24": measures[2]}},
        }
        (tmp_path / f"{cell}_{rule}_{seed}.json").write_text(json.dumps({"result": result}))
  lines = cells_of(findings.longer(cell_results.Cells(tmp_path)))
  assert [line[:2] for line in lines] == [
    [films_of, rule] for films_of in ("12 scenes", "24 scenes, 48 frames") for rule in shares
  ]

  def percent(value):
    return f"{100 * value:.1f}"

  for k, part in enumerate((lines[:3], lines[3:])):
    of = {key: np.mean(seeds, 0)[k] for key, seeds in right.items()}
    none, progressive, early = ([cell.split(" (")[0] for cell in line[2:]] for line in part)
    long = of["longer", "none"]
    assert none == [
      percent(of["tune", "none"]),
      percent(long),
      percent(long - of["tune", "none"]),
      "-",
      "-",
      "2 and 1",
    ]
    short, long, other = of["tune", "progressive"], of["longer", "progressive"], long
    assert progressive == [
      percent(short),
      percent(long),
      percent(long - short),
      percent(long - other),
      "-",
      "1 and 1",
    ]
    assert early == [
      "-",
      percent(of["longer", "early"]),
      "-",
      *(percent(of["longer", "early"] - less) for less in (other, long)),
      "0 and 1",
    ]


@pytest.mark.pure
def test_places_tell_what_happens_in_each_quarter(tmp_path):
  # the fourth kind needs several, or one
  place, rank = (
    [0.02, 0.3, 0.98, 0.1, None, None] * 10,
    [1, 0, 0, 0, None, None] * 10,
  )
  place[6:8], rank[6:8] = [0.2, 0.6], [0, 0]
  one = {
    "rank": rank,
    "score": [2.0, 3.0, 4.0, 9.0, None, None] * 10,
    "hits": bits(np.ones((10, len(KINDS)), bool)),
  }
  (tmp_path / "select_progressive_0.json").write_text(
    json.dumps({"result": {"window": {"place": place, "global": one}}})
  )
  (line,) = cells_of(findings.position_bias(cell_results.Cells(tmp_path)))
  assert line[:2] == ["32 scenes, LP-Comp after SCT", "global"]
  assert [cell.split(" (")[0] for cell in line[2:7]] == ["10.0", "100.0", "100.0", "100.0", "90.0"]
  assert line[7:] == ["100, 100, 100, 100", "2.0, 3.0, 3.0, 4.0"]


@pytest.mark.pure
def test_the_plot_of_bias_tells_where_what_is_needed_is_ranked_first(tmp_path):
  place, ranks = (
    [0.02, 0.03, 0.98, None, None, None],
    {"global": [1, 0, 0, None, None, None], "local": [0, 0, 0, None, None, None]},
  )
  relevance = {"global": np.linspace(1, 2, 32).reshape(2, 16), "local": np.ones((2, 16))}
  result = {
    mode: {"rank": rank, "relevance": relevance[mode].tolist()} for mode, rank in ranks.items()
  }
  (tmp_path / "select_progressive_0.json").write_text(
    json.dumps({"result": {"long": {"place": place, **result}}})
  )
  figure = figures.plot_bias(cell_results.Cells(tmp_path))
  empty, shots, first = figure.axes

  def of(axes):
    return {text: artist for artist, text in zip(*axes.get_legend_handles_labels())}

  np.testing.assert_allclose(of(empty)["global"].get_ydata(), relevance["global"][0])
  np.testing.assert_allclose(of(shots)["local"].get_ydata(), 1)
  values = {mode: np.asarray(of(first)[mode].lines[0].get_ydata(), float) for mode in ranks}
  assert (
    values["global"][0] == 0.5
    and values["local"][0] == 1
    and values["global"][3] == 1
    and np.isnan(values["global"][1])
  )


def test_the_page_has_what_the_cells_say(tmp_path):
  page = tmp_path / "STUDY.md"
  page.write_text(study.PAGE.read_text())
  findings.report_findings(pathlib.Path(study.CELLS), page)
  assert page.read_text() == study.PAGE.read_text()


def test_the_cells_are_what_would_be_made_now(tmp_path):
  its, where = miniature.Study(tmp_path, miniature.PRESETS["full"]), pathlib.Path(study.CELLS)
  study.check_cells(its, study.cells(its), where)
  assert {file.stem for file in where.glob("*.json")} == {cell.name for cell in study.cells(its)}
