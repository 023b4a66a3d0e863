"""The official code's numbers, on a thinned copy of its recorded arrays (VECTORS.md)."""

import gzip
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xcomp_jax.config import LPCompConfig
from xcomp_jax.parity import parity, tower
from xcomp_jax.parity.comparison import ParityError, compare_arrays, comparison_table

TENSORS = "model.vision_tower.vision_tower"
# Every stage of the command; `python -m xcomp_jax.parity` on the whole directory compares more
# arrays of each.
STAGES = (
  "vision: position tables",
  "vision: patch embedding",
  "vision: block 1",
  "vision: tower",
  "vision: merge steps",
  "vision: merge 0, partner, order, size",
  "vision: merge 1, x",
  "vision: merge 1, partner, order, size",
  "vision: projector",
  "vision_local4: merge 1, partner, order, size",
  "vision_local4: merged tokens",
  "inserted sequence",
  "state entering layer 22",
  "state entering layer 24",
  "layer outputs",
  "final norm",
  "logits",
  "cache lengths",
  "cached keys and values",
  "prefill positions",
  "decode positions",
  "greedy tokens",
  "decode logits",
  "training loss",
  "training labels",
  "gradients",
  "gradient norms",
  "QC-Comp: scores_default",
  "QC-Comp: scores_segments_8_4",
  "QC-Comp: scores_segments_4_2",
)


def linked(source, target, *without):
  """`target` with links to the files of `source`."""
  for file in source.iterdir():
    if file.name not in without:
      (target / file.name).symlink_to(file)
  return target


@pytest.fixture(scope="module")
def rows(reference, tmp_path_factory):
  return checked(
    reference,
    tmp_path_factory.mktemp("dev"),
    "vision",
    "vision_local4",
    "llm",
    "train",
    "qc_scores",
  )


def checked(reference, target, *recorded):
  """Rows of the stages that these files of arrays allow, by name."""
  others = {f.name for f in (reference / "dev").glob("*.npz")} - {
    f"{name}.npz" for name in recorded
  }
  return {
    row.stage: row for row in parity.compare_directory(linked(reference / "dev", target, *others))
  }


@pytest.mark.slow
def test_the_official_chat_selects_the_same_frames_and_answers_the_same(reference, tmp_path):
  rows = [row for row in checked(reference, tmp_path, "qc_chat").values() if row.arrays]
  assert [row.stage for row in rows] == [
    f"QC-Comp: {n}" for n in ("rounds", "round_scores", "selected frames", "answer")
  ]
  assert all(row.result == "pass" for row in rows), rows


@pytest.mark.slow  # four more programs of 28 layers
def test_other_rules_and_schedules_equal_the_official_code(reference, tmp_path):
  rows = checked(reference, tmp_path, "llm", "llm_variants")
  for name in ("cosine_nosuffix", "nexthalf_10_20_stride4", "avgpool_10_20_stride4", "none"):
    for what in ("states, logits", "tokens, cache lengths"):
      assert rows[f"{name}: {what}"].result == "pass", rows[f"{name}: {what}"]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_equals_the_official_code(rows, stage):
  assert rows[stage].result == "pass", rows[stage]


def test_nothing_fails_and_all_gradient_norms_are_compared(rows):
  assert not [row for row in rows.values() if row.result == "FAIL"]
  assert rows["gradient norms"].arrays == 342
  assert "0 fail" in comparison_table(list(rows.values()))


TOWER = ("first positions", "tower", "tower, image")


def internvideo2(reference, target, name="dev", **changes):
  """A directory with the recorded InternVideo2 tower, its arrays named after a set `name`; ""
  leaves the prefix out.
  """
  target.mkdir(exist_ok=True)
  (target / f"{name or 'any'}.safetensors").symlink_to(
    reference / "internvideo2_tiny" / "dev.safetensors"
  )
  recorded = {
    key.removeprefix("dev:"): array
    for key, array in np.load(reference / "internvideo2_tiny" / "vectors.npz").items()
  }
  np.savez(
    target / "vectors.npz",
    **{f"{name}:{key}".lstrip(":"): array for key, array in (recorded | changes).items()},
  )
  return target


@pytest.mark.parametrize("name", ["other", ""])
def test_internvideo2_equals_the_official_tower(reference, tmp_path, name):
  rows = {
    row.stage: row
    for row in parity.compare_directory(internvideo2(reference, tmp_path / "some", name))
    if row.arrays
  }
  assert list(rows) == [f"some {name}".rstrip() + f": {stage}" for stage in TOWER]
  assert all(row.result == "pass" for row in rows.values()), rows


def test_internvideo2_beside_a_whole_model(reference, tmp_path, capsys):
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).symlink_to(reference / "dev" / name)
  recorded = np.load(reference / "internvideo2_tiny" / "vectors.npz")[
    "dev:tower_out_image"
  ] + np.float32(2e-4)
  internvideo2(reference, tmp_path / "internvideo2_tiny", tower_out_image=recorded)
  code, said = run(tmp_path, capsys)
  assert code == 1 and "2 stages pass, 1 fail" in said.out
  assert re.search(r"internvideo2_tiny dev: tower, image .* 1\.0e-04  FAIL", said.out)
  assert re.search(r"vision\.npz .*absent", said.out)


def test_bad_directories_of_a_tower_are_named(reference, tmp_path, capsys):
  def error(place):
    code, said = run(place, capsys)
    assert code == 1 and said.err.startswith("error: "), said
    return said.err

  two = internvideo2(reference, tmp_path / "two")
  (two / "b.safetensors").symlink_to(reference / "internvideo2_tiny" / "dev.safetensors")
  assert "two has vectors.npz and 2 *.safetensors; there must be one" in error(two)
  lacking = internvideo2(reference, tmp_path / "lacking")
  tensors = load_file(lacking / "dev.safetensors")
  (lacking / "dev.safetensors").unlink()
  del tensors[f"{TENSORS}.blocks.1.ls2.weight"]
  save_file(tensors, lacking / "dev.safetensors")
  assert (
    f"does not hold the model that its vectors.npz describes:\n  1 missing: "
    f"{TENSORS}.blocks.1.ls2.weight" in error(lacking)
  )
  del tensors[f"{TENSORS}.pos_embed"]
  save_file(tensors, lacking / "dev.safetensors")
  assert f"lacks {TENSORS}.pos_embed: no InternVideo2 tower" in error(lacking)
  np.savez(two / "vectors.npz", **{"dev:heads": 4})
  assert "vectors.npz lacks dev:image_size, dev:lowres_u8" in error(two)


@pytest.fixture
def directory(reference, tmp_path):
  """A directory with weights and 8 frames through the tower; tests change what it records."""
  for name in ("config.json", "model.safetensors"):
    (tmp_path / name).symlink_to(reference / "dev" / name)
  recorded = np.load(reference / "dev" / "vision.npz")
  first = {
    k: v[:1] if v.ndim == 3 and len(v) == 2 else v
    for k, v in recorded.items()
    if not k.startswith("tome")
  }
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
  assert code == 1 and "vision.npz is no recording" in said.err
  path, _ = directory(
    frames_lowres_u8=np.zeros((7, 12, 12, 3), np.uint8), patch_embed=np.zeros((2, 1, 1))
  )
  assert "into how many clips 7 frames go" in run(path, capsys)[1].err


@pytest.mark.pure
def test_compare_takes_the_array_nearest_to_failing():
  recorded = {"a": np.zeros(3), "b": np.full(3, 100.0), "other": np.ones(1)}
  row = compare_arrays(
    "s", {"a": np.full(3, 4e-5), "b": np.full(3, 100 + 3e-5), "mine": 0}, recorded, 5e-5
  )
  assert (row.arrays, row.worst, row.result) == (2, "a", "pass")
  row = compare_arrays(
    "s", {"a": np.full(3, 6e-5), "b": np.full(3, 100 + 6e-3)}, recorded, 5e-5, 1e-4
  )
  assert (row.worst, row.result) == ("a", "FAIL")


@pytest.mark.pure
@pytest.mark.parametrize("ours", [np.zeros(4), np.full(3, np.nan), np.array([0, 0, 1])])
def test_compare_fails_on_shape_nan_and_integers(ours):
  assert compare_arrays("s", {"a": ours}, {"a": np.zeros(3, int)}).result == "FAIL"


@pytest.mark.pure
def test_only_ties_may_be_ordered_differently():
  score = np.array([[0.5, 0.9, 0.5 + 1e-7, 0.1]])
  ours, official = np.array([[1, 2, 0, 3]]), np.array([[1, 0, 2, 3]])
  np.testing.assert_array_equal(tower.same_ties(ours, official, score), official)
  wrong = np.array([[0, 1, 2, 3]])
  assert (tower.same_ties(wrong, official, score) != official).any()


@pytest.mark.pure
def test_variant_names_give_their_schedules():
  assert parity.lp_comp_of("cosine_nosuffix", 28) == LPCompConfig("cosine", "uniform", 16)
  assert parity.lp_comp_of("nexthalf_10_20_stride4", 28) == LPCompConfig(
    (16,) * 10 + (4,) * 10 + (1,) * 8, "stride", 16
  )
  assert parity.lp_comp_of("avgpool_6_stride2", 8) == LPCompConfig(
    (16,) * 6 + (8,) * 2, "avgpool", 16
  )
  with pytest.raises(ParityError) as caught:
    parity.lp_comp_of("mystery", 28)
  assert caught.value.fields == {"where": "llm_variants.npz", "value": "mystery"}


def test_chosen_frames_are_those_of_the_official_readers(reference, tmp_path, capsys):
  recorded = json.loads(gzip.open(reference / "cuts.json.gz").read())
  assert len(recorded) == 24
  (tmp_path / "cuts.json").write_text(json.dumps(recorded))
  (tmp_path / "other.json").write_text('{"duration": 3}')
  rows = {row.stage: row for row in parity.compare_directory(tmp_path) if row.arrays}
  assert {stage: row.arrays for stage, row in rows.items()} == {
    "cuts.json: frames, train": 16,
    "cuts.json: frames, ask": 16,
    "cuts.json: video, train": 2,
    "cuts.json: video, ask": 14,
  }
  assert all(row.result == "pass" for row in rows.values())
  recorded[0]["indices"][5] += 1
  recorded[-1]["clip"] = [1e9, 2e9]  # nothing of it can be read
  (tmp_path / "mine.json").write_text(json.dumps(recorded))
  with pytest.raises(SystemExit) as stop:
    parity.main([str(tmp_path / "mine.json")])
  out = capsys.readouterr().out
  assert stop.value.code == 1 and "2 stages pass, 2 fail, 0 absent" in out
  (tmp_path / "none.json").write_text("[]")
  with pytest.raises(SystemExit):
    parity.main([str(tmp_path / "none.json")])
  assert (
    "none.json has no cases of chosen frames as VECTORS.md describes" in capsys.readouterr().err
  )
  del recorded[3]["path"]
  (tmp_path / "mine.json").write_text(json.dumps(recorded))
  with pytest.raises(ParityError) as caught:
    parity.compare_directory(tmp_path / "mine.json")
  assert caught.value.fields == {"where": "mine.json", "case": 3}
  assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.pure
def test_an_array_of_another_shape_is_named_as_such():
  row = compare_arrays("stage", {"x": np.zeros(3), "y": np.zeros(2)}, {"x": np.zeros(4)})
  assert (row.result, row.worst, row.error) == ("FAIL", "shape of x", np.inf)
