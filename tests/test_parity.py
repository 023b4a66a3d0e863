"""The official code's numbers, on a thinned copy of its recorded arrays (VECTORS.md)."""

import re

import numpy as np
import pytest

from xcomp_jax import parity
from xcomp_jax.config import LPCompConfig

# Every stage of the command; `python -m xcomp_jax.parity` on the whole directory compares more arrays of each.
STAGES = (
  "vision: position tables", "vision: patch embedding", "vision: block 1", "vision: tower", "vision: merge steps",
  "vision: merge 0, partner, order, size", "vision: merge 1, x", "vision: merge 1, partner, order, size",
  "vision: projector", "vision_local4: merge 1, partner, order, size", "vision_local4: merged tokens",
  "inserted sequence", "state entering layer 22", "state entering layer 24", "layer outputs", "final norm", "logits",
  "cache lengths", "cached keys and values", "prefill positions", "decode positions", "greedy tokens",
  "decode logits", "cosine_nosuffix: states, logits", "cosine_nosuffix: tokens, cache lengths",
  "nexthalf_10_20_stride4: states, logits", "avgpool_10_20_stride4: states, logits", "none: states, logits",
  "training loss", "training labels", "gradients", "gradient norms", "QC-Comp: scores_default",
  "QC-Comp: scores_segments_8_4", "QC-Comp: scores_segments_4_2",
)


def linked(source, target, *without):
  """`target` with links to the files of `source`."""
  for file in source.iterdir():
    if file.name not in without:
      (target / file.name).symlink_to(file)
  return target


@pytest.fixture(scope="module")
def rows(reference, tmp_path_factory):
  return {row.stage: row for row in parity.check(linked(reference / "dev", tmp_path_factory.mktemp("dev"), "qc_chat.npz"))}


@pytest.mark.slow
def test_the_official_chat_selects_the_same_frames_and_answers_the_same(reference, tmp_path):
  others = {f.name for f in (reference / "dev").glob("*.npz")} - {"qc_chat.npz"}
  rows = [row for row in parity.check(linked(reference / "dev", tmp_path, *others)) if row.arrays]
  assert [row.stage for row in rows] == [f"QC-Comp: {n}" for n in ("rounds", "round_scores", "selected frames", "answer")]
  assert all(row.result == "pass" for row in rows), rows


@pytest.mark.parametrize("stage", STAGES)
def test_stage_equals_the_official_code(rows, stage):
  assert rows[stage].result == "pass", rows[stage]


def test_nothing_fails_and_all_gradient_norms_are_compared(rows):
  assert not [row for row in rows.values() if row.result == "FAIL"]
  assert rows["gradient norms"].arrays == 342
  assert "0 fail" in parity.show(list(rows.values()))


@pytest.fixture
def directory(reference, tmp_path):
  """A directory with weights and 8 frames through the tower; tests change what it records."""
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).symlink_to(reference / "dev" / name)
  recorded = np.load(reference / "dev" / "vision.npz")
  first = {k: v[:1] if v.ndim == 3 and len(v) == 2 else v for k, v in recorded.items() if not k.startswith("tome")}
  first["frames_lowres_u8"] = recorded["frames_lowres_u8"][:8]

  def make(**changes):
    np.savez(tmp_path / "vision.npz", **first | changes)
    return tmp_path, first

  return make


def run(directory, capsys):
  with pytest.raises(SystemExit) as exit:
    parity.main([str(directory)])
  return exit.value.code, capsys.readouterr()


def test_other_number_of_clips_passes_and_missing_files_are_absent(directory, capsys):
  code, said = run(directory()[0], capsys)
  assert code == 0, said.out
  assert re.search(r"vision: tower .* pass", said.out)
  for file in ("llm.npz", "train.npz", "pos_embed_tables.npz"):
    assert re.search(rf"{file} .*absent", said.out)


def test_one_wrong_number_fails(directory, capsys):
  _, recorded = directory()
  wrong = recorded["vision_out"].copy()
  wrong[0, 17, 3] += 1e-4
  code, said = run(directory(vision_out=wrong)[0], capsys)
  assert code == 1
  assert re.search(r"vision: tower .* FAIL +vision_out", said.out)
  assert re.search(r"vision: block 1 .* pass", said.out)


def test_nothing_to_compare_is_no_success(directory, capsys):
  path, _ = directory()
  (path / "vision.npz").unlink()
  code, said = run(path, capsys)
  assert code == 1
  assert "nothing to compare" in said.err


def test_bad_directories_are_named(directory, tmp_path, capsys):
  code, said = run(tmp_path / "none", capsys)
  assert code == 1 and said.err.startswith("error: ") and "config.json" in said.err
  path, _ = directory()
  (path / "vision.npz").write_bytes(b"PK\x03\x04 cut short")
  code, said = run(path, capsys)
  assert code == 1 and "vision.npz can't be read" in said.err
  path, _ = directory(frames_lowres_u8=np.zeros((7, 12, 12, 3), np.uint8), patch_embed=np.zeros((2, 1, 1)))
  assert "into how many clips 7 frames go" in run(path, capsys)[1].err


def test_compare_takes_the_array_nearest_to_failing():
  recorded = {"a": np.zeros(3), "b": np.full(3, 100.0), "other": np.ones(1)}
  row = parity.compare("s", {"a": np.full(3, 4e-5), "b": np.full(3, 100 + 3e-5), "mine": 0}, recorded, 5e-5)
  assert (row.arrays, row.worst, row.result) == (2, "a", "pass")
  row = parity.compare("s", {"a": np.full(3, 6e-5), "b": np.full(3, 100 + 6e-3)}, recorded, 5e-5, 1e-4)
  assert (row.worst, row.result) == ("a", "FAIL")


@pytest.mark.parametrize("ours", [np.zeros(4), np.full(3, np.nan), np.array([0, 0, 1])])
def test_compare_fails_on_shape_nan_and_integers(ours):
  assert parity.compare("s", {"a": ours}, {"a": np.zeros(3, int)}).result == "FAIL"


def test_only_ties_may_be_ordered_differently():
  score = np.array([[0.5, 0.9, 0.5 + 1e-7, 0.1]])
  ours, official = np.array([[1, 2, 0, 3]]), np.array([[1, 0, 2, 3]])
  np.testing.assert_array_equal(parity.same_ties(ours, official, score), official)
  wrong = np.array([[0, 1, 2, 3]])
  assert (parity.same_ties(wrong, official, score) != official).any()


def test_variant_names_give_their_schedules():
  assert parity.lp_comp_of("cosine_nosuffix", 28) == LPCompConfig("cosine", "uniform", 16)
  assert parity.lp_comp_of("nexthalf_10_20_stride4", 28) == LPCompConfig((16,) * 10 + (4,) * 10 + (1,) * 8, "stride", 16)
  assert parity.lp_comp_of("avgpool_6_stride2", 8) == LPCompConfig((16,) * 6 + (8,) * 2, "avgpool", 16)
  with pytest.raises(parity.ParityError, match="'mystery'"):
    parity.lp_comp_of("mystery", 28)
