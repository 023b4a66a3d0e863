"""The study's quick preset is a gate on quality: what parity tests can't see, the share of right
answers does.
"""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xcomp_jax import files
from xcomp_jax.data.store import StoredSample
from xcomp_jax.data.store_writing import write_store
from xcomp_jax.inference import selection
from xcomp_jax.model import lp_comp, qwen2
from xcomp_jax.study import cell_results, measures, miniature, study
from xcomp_jax.study.miniature import Study, StudyError, study_rule
from xcomp_jax.synthetic import films
from xcomp_jax.training import loop

FULL = miniature.PRESETS["full"]


@pytest.mark.pure
def test_all_rules_keep_as_many_tokens_on_average():
  counts = {name: lp_comp.counts(study_rule(name), 8) for name in (*FULL.rules, *FULL.others)}
  assert set(counts.pop("none")) == {16} and len(counts) == 7
  assert {np.mean(one) for one in counts.values()} == {7.625} and {
    one[-1] for one in counts.values()
  } == {1}


@pytest.mark.pure
def test_clips_at_equal_distances():
  np.testing.assert_array_equal(measures.even(12, 12), np.arange(12))
  np.testing.assert_array_equal(measures.even(24, 3), [4, 12, 20])


@pytest.mark.pure
def test_cells_have_names_of_their_own_and_all_rules_all_seeds(tmp_path):
  names = [cell.name for cell in study.cells(Study(tmp_path, FULL))]
  assert len(set(names)) == len(names)
  assert {
    f"tune_{name}_{seed}" for name in (*FULL.rules, *FULL.others) for seed in range(3)
  } <= set(names)


@pytest.mark.pure
@pytest.mark.parametrize("given", [["--preset", "quick"], ["--base"], ["--model", "some"]])
def test_what_is_not_the_full_study_needs_a_folder_of_its_own(given, capsys):
  with pytest.raises(SystemExit):
    study.main(given)
  assert (
    "--preset quick, --model and --base need a folder of their own: --out DIR"
    in capsys.readouterr().err
  )


def test_what_is_not_there_is_said(tmp_path, capsys):
  with pytest.raises(SystemExit):
    study.main(["--preset", "quick", "--out", str(tmp_path), "--report"])
  assert (
    "cells has no cells to report; the same command without --report makes them"
    in capsys.readouterr().err
  )
  with pytest.raises(SystemExit):
    study.main(["--out", str(tmp_path)], found=lambda name: None)
  assert "the plots need matplotlib: pip install 'xcomp_jax[plot]'" in capsys.readouterr().err


@pytest.mark.pure
def test_a_base_that_is_not_there_is_said(tmp_path, capsys):
  with pytest.raises(SystemExit):
    study.main(
      ["--preset", "quick", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "base")]
    )
  assert re.match(
    r"error: \S+/base has no model.safetensors; run it where assets/study is, or train a base "
    r"\(--base\)",
    capsys.readouterr().err,
  )


def quick_in(folder, base=miniature.BASE):
  return Study(folder, miniature.PRESETS["quick"], base)


class WithoutFilms(Study):
  """A study whose films nobody needs; `asked_for` has the splits that were."""

  def __init__(self, *args, **how):
    super().__init__(*args, **how)
    self.asked_for = []

  def store(self, name):
    self.asked_for.append(name)


def cell(name, do, splits=(), rules=()):
  return study.StudyCell(name=name, splits=splits, rules=rules, do=do)


def noting(done, name, splits=(), rules=()):
  """A cell that notes when it is done."""

  def do():
    done.append(name)
    return {"of": name}

  return cell(name, do, splits, rules)


@pytest.mark.pure
def test_a_cell_that_is_there_is_not_done_again(tmp_path):
  done = []
  every = [noting(done, name) for name in ("a", "b_1", "b_2")]
  its, where = quick_in(tmp_path / "work"), tmp_path / "cells"
  study.run_cells(its, every, where, "b")
  assert done == ["b_1", "b_2"]
  (where / "b_2.json").unlink()
  study.run_cells(its, every, where)
  assert done == ["b_1", "b_2", "a", "b_2"]
  assert json.loads((where / "a.json").read_text())["result"] == {"of": "a"}
  with pytest.raises(StudyError) as caught:
    study.run_cells(its, every, where, "c")
  assert caught.value.fields == {"where": "--only", "value": "c", "allowed": ["a", "b_1", "b_2"]}


@pytest.mark.pure
def test_the_films_of_a_cell_are_made_before_its_time_runs(tmp_path):
  its = WithoutFilms(tmp_path / "work", miniature.PRESETS["quick"])
  times = iter([5.0, 7.0])

  def clock():
    assert its.asked_for == ["long", "wide"]
    return next(times)

  every = [cell("a", dict, splits=["long", "wide"])]
  study.run_cells(its, every, tmp_path / "cells", clock=clock)
  assert json.loads((tmp_path / "cells" / "a.json").read_text())["seconds"] == 2


@pytest.mark.pure
def test_one_command_at_a_time(tmp_path, capsys):
  with files.alone(tmp_path, "study"), pytest.raises(SystemExit):
    study.main(["--preset", "quick", "--out", str(tmp_path)])
  assert (
    f"another command is at work in {tmp_path}; wait for it, or give --out another"
    in capsys.readouterr().err
  )


@pytest.fixture
def another(tmp_path):
  """Some file as a base, for tests that measure nothing."""
  (tmp_path / "another").mkdir()
  (tmp_path / "another" / "model.safetensors").write_bytes(b"one")
  return tmp_path / "another"


def uniform_rule(name):
  return dataclasses.replace(study_rule(name), keep="uniform")


def test_what_was_made_otherwise_is_refused(tmp_path, another):
  done = []
  every = [noting(done, "a", ["heldout"], ["early"]), noting(done, "b", ["long"], ["early"])]

  def run(preset=miniature.PRESETS["quick"], **how):
    its = WithoutFilms(tmp_path / "work", preset, **how)
    return study.run_cells(its, every, tmp_path / "cells")

  run()
  for preset, how, differ in (
    (FULL, {}, ["films"]),
    (miniature.PRESETS["quick"], {"rule": uniform_rule}, ["rules"]),
    (miniature.PRESETS["quick"], {"base": another}, ["base"]),
  ):
    with pytest.raises(StudyError) as caught:
      run(preset, **how)
    assert caught.value.fields == {"where": ["a", "b"], "differ": [differ] * 2}
  (tmp_path / "cells" / "a.json").unlink()
  its, modes = quick_in(tmp_path / "work"), study.MODES | {"long": ("uniform", "global")}
  with pytest.raises(StudyError) as caught:
    study.check_cells(its, every, tmp_path / "cells", modes)
  assert caught.value.fields == {"where": ["b"], "differ": [["measures"]]}
  assert "remove them to do them again" in str(caught.value)
  with pytest.raises(StudyError):
    run(FULL)
  assert done == ["a", "b"]  # refused before anything is done


def test_films_that_were_made_otherwise_are_refused(tmp_path):
  def decode(folder, split, seed, tower):
    talk = ({"from": "human", "value": "?"}, {"from": "gpt", "value": "A"})
    film = (
      StoredSample(
        id="s",
        source="s.mp4",
        annotation="a.json",
        position=0,
        conversations=talk,
        time_message="",
      ),
      None,
    )
    write_store(folder / "features", [film], image_size=48, clip_frames=2)

  its = Study(tmp_path, miniature.PRESETS["quick"], decode=decode)
  for _ in range(2):
    its.store("heldout")
  with pytest.raises(StudyError) as caught:
    Study(tmp_path, FULL).store("heldout")
  assert caught.value.fields == {"where": "heldout", "differ": ["films"]}


def test_a_stage_that_comes_after_another_model_is_refused(tmp_path):
  content = b"tuned"

  def trained(folder, stage, changes):
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(content)
    return folder / "model"

  for _ in range(2):
    miniature.train_study_base(tmp_path, decode=lambda *_: None, train=trained)
  content = b"tuned anew"
  with pytest.raises(StudyError) as caught:
    miniature.train_study_base(tmp_path, decode=lambda *_: None, train=trained)
  assert caught.value.fields == {"where": "answer", "differ": ["before"]}


def test_cells_of_another_base_stay_out_of_the_docs(tmp_path, another):
  reported = []
  study.main(
    ["--out", str(tmp_path / "work"), "--model", str(another)],
    cells=lambda its: [cell("a", lambda: {"base": its.base.name})],
    report=reported.append,
  )
  where = tmp_path / "work" / "cells"
  assert reported == [where]
  assert json.loads((where / "a.json").read_text())["result"] == {"base": "another"}
  assert not (pathlib.Path(study.CELLS) / "a.json").exists()


def test_a_model_that_was_tuned_otherwise_is_refused(tmp_path):
  its = Study(tmp_path, FULL)
  (tmp_path / "early_1" / "model").mkdir(parents=True)
  assert its.tuned("early", 1) == tmp_path / "early_1" / "model" and its.tuned("early", 1)
  fewer = dataclasses.replace(FULL, films=FULL.films | {"tuning": 7})
  for other, differ in (
    (Study(tmp_path, FULL, rule=uniform_rule), ["rules"]),
    (Study(tmp_path, fewer), ["films"]),
  ):
    with pytest.raises(StudyError) as caught:
      other.tuned("early", 1)
    assert caught.value.fields == {"where": "early_1", "differ": differ}


def test_a_longer_tuning_is_another_model(tmp_path):
  given = []

  def trained(folder, name, changes):
    given.append((folder, changes["train.epochs"]))
    return folder

  its = WithoutFilms(tmp_path, FULL, train=trained)
  assert its.tuned("early", 1) != its.tuned("early", 1, 3)
  assert given == [(tmp_path / "early_1", 1), (tmp_path / "early_1_3_epochs", 3)]
  made = {
    cell.name: study.cell_origin(its, cell)["train"]["epochs"]
    for cell in study.cells(its)
    if cell.name in ("tune_early_1", "longer_early_1")
  }
  assert made == {"tune_early_1": 1, "longer_early_1": 3}


def test_a_tuning_that_was_stopped_is_no_model(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(loop, "train", lambda config: {"step": 3, "steps": 160})

  def cells(its):
    quiet = WithoutFilms(its.out, its.preset)
    return [cell("a", lambda: quiet.tuned("progressive", 0))]

  with pytest.raises(SystemExit):
    study.main(["--preset", "quick", "--out", str(tmp_path / "work")], cells=cells)
  assert "the same command goes on" in capsys.readouterr().err
  assert not (tmp_path / "work" / "progressive_0" / "model").exists() and not list(
    (tmp_path / "work" / "cells").glob("*.json")
  )


# --- the gate
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
  """The quick preset, run by its command."""
  out = tmp_path_factory.mktemp("study")
  study.main(["--preset", "quick", "--out", str(out)])
  return Study(out, miniature.PRESETS["quick"]), cell_results.Cells(out / "cells")


# Shares of right answers, and of scenes that were found: about half way between what was measured
# with and without the defects below (docs/LOG.md).
# No defect is without compression: UNCOMPRESSED only lies well below what was measured.
UNCOMPRESSED, TUNED, NEEDLE, FAR, FOUND, FIRST = 0.78, 0.725, 0.95, 0.60, 0.5, 0.6


@pytest.fixture
def mutated(monkeypatch):
  """Programs are traced anew with what a test changes, and so are those that come after it."""
  jax.clear_caches()
  yield monkeypatch
  jax.clear_caches()


def tuned(its, name):
  """Whether questions are answered rightly: bool[films, kinds]."""
  return cell_results.right(
    measures.measured(its, its.tuned("progressive", 0), study_rule("progressive"), name)
  )


def needles(answers):
  return answers[:, films.KINDS.index("needle")].mean()


def found(quick, mode):
  its, frames = quick[0], measures.SELECTED["long"]
  model, rule = its.tuned("progressive", 0), study_rule("progressive")
  return measures.selected_answers(its, model, rule, "long", (mode,), frames)[mode]


def hits(measure):
  return cell_results.right(measure, "hits")[:, :3].mean()  # kinds that need one scene


@pytest.mark.slow
def test_quality_holds(quick):
  (base,), (after,) = (
    quick[1].seeds("base", "heldout", "none"),
    quick[1].seeds("tune_progressive_{seed}", "heldout", "progressive"),
  )
  (before,), (long,) = (
    quick[1].seeds("base", "heldout", "progressive"),
    quick[1].seeds("select_progressive_{seed}", "long"),
  )
  assert cell_results.right(base).mean() > UNCOMPRESSED
  assert (
    cell_results.right(after).mean() > TUNED > cell_results.right(before).mean()
    and needles(cell_results.right(after)) > NEEDLE
  )
  assert hits(long["aligned"]) > FOUND > hits(long["uniform"])
  own, others = (
    cell_results.ranked_first(long["local_answer"], key).mean() for key in ("rank", "other")
  )
  assert own > FIRST > others


@pytest.mark.slow
def test_selecting_costs_more_than_answering(quick):
  (long,) = quick[1].seeds("select_progressive_{seed}", "long")
  uniform = long["uniform"]
  for mode in ("global", "local", "aligned"):
    assert long[mode]["tokens"] == uniform["tokens"]
    # 128 scenes by a sixth for each question, and 12
    assert long[mode]["TFLOP"] > 3 * uniform["TFLOP"]


@pytest.mark.slow
def test_prefixes_instead_of_suffixes_fall_through(quick, mutated, tmp_path):
  survivors = lp_comp.survivors

  def first(cfg, layers):
    return tuple(
      tuple(cfg.group - 1 - place for place in kept[::-1]) for kept in survivors(cfg, layers)
    )

  mutated.setattr(lp_comp, "survivors", first)
  mutated.setattr(
    lp_comp, "reduce", lambda x, cfg, before, after: _first(x, len(before), len(after))
  )
  for name in ("tuning", "heldout"):
    (tmp_path / name).symlink_to(quick[0].out / name)
  # tuned with prefixes, as it would be if the code kept them
  answers = tuned(Study(tmp_path, quick[0].preset), "heldout")
  assert answers.mean() < TUNED and needles(answers) < NEEDLE


def _first(x, before, after):
  return x.reshape(len(x), -1, before, *x.shape[2:])[:, :, :after].reshape(len(x), -1, *x.shape[2:])


@pytest.mark.slow
def test_positions_as_before_compression_fall_through(quick, mutated):
  # Short films hardly need positions; these are four times as long as what the model was tuned on.
  far = films.FilmSplit(name="far", films=30, scenes=(48, 48), shots=(3, 5), questions=0)
  quick[0].splits["far"] = far
  assert tuned(quick[0], "far").mean() > FAR
  rotate, groups = qwen2.Layer.rotate, far.scenes[0] * films.FRAMES

  def old(layer, x, positions):
    kept = (x.shape[1] - measures.PREFIX - measures.TEXT) // groups
    # of what is left among all visual tokens
    place = np.arange(groups)[:, None] * 16 + 16 - kept + np.arange(kept)
    begin, end = measures.PREFIX, measures.PREFIX + groups * kept
    first = positions[:, begin : begin + 1]
    return rotate(
      layer,
      x,
      jnp.concatenate(
        [
          positions[:, :begin],
          first + place.ravel(),
          positions[:, end:] + groups * (16 - kept),
        ],
        axis=1,
      ),
    )

  mutated.setattr(qwen2.Layer, "rotate", old)
  jax.clear_caches()
  assert tuned(quick[0], "far").mean() < FAR


@pytest.mark.slow
def test_shuffled_scores_fall_through(quick, mutated):
  rounds, rng = selection.score_rounds, np.random.default_rng(0)
  mutated.setattr(
    selection, "score_rounds", lambda *args, **kw: rng.permuted(rounds(*args, **kw), axis=-1)
  )
  assert hits(found(quick, "aligned")) < FOUND


@pytest.mark.slow
def test_scores_of_another_question_fall_through(quick, mutated):
  rounds = selection.score_rounds
  mutated.setattr(
    selection, "score_rounds", lambda *args, **kw: np.roll(rounds(*args, **kw), 1, axis=0)
  )
  assert cell_results.ranked_first(found(quick, "local_answer")).mean() < FIRST
