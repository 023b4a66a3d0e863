"""Notebooks: pairs that agree, and all of them run at a small size."""

import importlib.util
import json
import os
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(notebooks)


@pytest.mark.pure
def test_every_notebook_is_a_pair():
  for suffix in ("py", "ipynb"):
    assert {file.stem for file in (ROOT / "notebooks").glob(f"*.{suffix}")} == set(notebooks.NAMES)


@pytest.mark.pure
@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_is_what_its_text_says_without_outputs(name):
  written = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
  assert written == notebooks.pair(name), (
    f"notebooks/{name}.ipynb and .py differ: edit the .py, then docs/notebooks.py --pair"
  )
  notebook = json.loads(written)
  assert notebook["metadata"]["kernelspec"]["name"] == "python3"
  assert all(
    not cell["outputs"] and cell["execution_count"] is None
    for cell in notebook["cells"]
    if cell["cell_type"] == "code"
  )
  assert len(written) < 40_000 and not re.search(
    r"(^|[\"'\s])/(home|root|work|tmp|Users|content)/", written
  )


@pytest.mark.pure
def test_all_notebooks_install_the_same_way_first():
  cells = {
    name: next(c for c in notebooks.read(name).cells if c.cell_type == "code")
    for name in notebooks.NAMES
  }
  assert len({cell.source for cell in cells.values()}) == 1
  assert all(cell.metadata.tags == ["install"] for cell in cells.values())
  owner = re.search(r'REPOSITORY = "https://github.com/(\S+)"', cells["ask"].source)[1]
  for name in notebooks.NAMES:
    title = notebooks.read(name).cells[0].source
    assert (
      f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name}.ipynb" in title
    )


@pytest.mark.pure
def test_unknown_values_are_refused():
  with pytest.raises(KeyError) as caught:
    notebooks.execute("tune", {"vidoes": 1})
  (words,) = caught.value.args
  unknown, known = words.split(": no parameter of tune, which has ")
  assert unknown == "vidoes" and {"heldout", "looks", "videos"} <= set(known.split(", "))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A function (name, then, **values): runs a notebook on one device in a folder of its own, and
  sees to its pictures.
  """
  folder = tmp_path_factory.mktemp("notebooks")

  def execute(name, then, pictures, **values):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    done = notebooks.execute(name, {"out": str(folder / name)} | values, then, env)
    found = notebooks.pictures(done)
    assert set(found) == set(pictures)
    # not empty
    assert all(len(set(picture.convert("L").tobytes())) > 3 for picture in found.values())
    return folder / name

  return execute


@pytest.fixture(scope="module")
def tuned(run):
  """What the notebook `tune` exports."""
  then = """
losses = [loss for _, loss in seen["train"]]
assert len(losses) == result["step"] == steps and sum(losses[-6:]) < sum(losses[:6]), losses
assert [step for step, _ in seen["heldout"]] == [0, 12, 24] and all(len(one) == heldout for one in right.values())
"""  # noqa: E501
  return (
    run(
      "tune",
      then,
      ["videos", "learning", "accuracy"],
      videos=192,
      heldout=24,
      steps=24,
      looks=2,
    )
    / "export"
  )


@pytest.mark.slow
def test_tune(tuned):
  assert (tuned / "model.safetensors").exists()


@pytest.mark.slow
def test_inside(run, tuned):
  then = """
assert list(models) == ["not tuned", "tuned"] and looked.schedule[0] == 8
for name, share in shares.items():
  np.testing.assert_allclose(share.sum(-1), 1, atol=1e-5)
  assert (share[0, :, 1:9] == 0).all() and (share[0, 0, 9:17] > 0).all()  # the last 8 of 16 are there
same, apart = against["not tuned", "none"]
assert same.all() and np.abs(apart).max() < 1e-5
assert against["not tuned", "one"][1].mean() > against["not tuned", "0.9"][1].mean() > 1e-4
"""  # noqa: E501
  run(
    "inside",
    then,
    ["schedule", "places", "flow", "kept", "agreement"],
    videos=4,
    tuned=str(tuned),
  )


@pytest.mark.slow
def test_inside_without_a_tuned_model(run):
  then = """
assert list(models) == ["not tuned"] and looked == COSINE
assert against["not tuned", "cosine"][1].mean() > 0
"""
  run("inside", then, ["schedule", "places", "flow", "kept", "agreement"], videos=2, tuned="")


@pytest.mark.slow
def test_ask(run):
  then = """
assert [answer.text in tuple("ABCD") for answer in answers] == [True] * 4
assert all(len(answer.selection.frames) == frames for answer in answers)
assert (out / "report.html").stat().st_size > 10_000
"""
  run(
    "ask",
    then,
    ["relevance"],
    checkpoint="assets/tiny",
    scenes=16,
    frames=32,
  )


@pytest.mark.slow
def test_convert(run, reference, tmp_path):
  # the others take minutes
  for name in (
    "config.json",
    "model.safetensors",
    "vision.npz",
    "llm.npz",
    "qc_scores.npz",
  ):
    (tmp_path / name).symlink_to(reference / "dev" / name)
  then = """
assert sum(row.result == "pass" for row in rows) > 20 and not any(row.result == "FAIL" for row in rows)
assert same and apart < 1e-6 and equal == len(kept) == len(stored)
"""  # noqa: E501
  folder = run("convert", then, ["parity"], vectors=str(tmp_path))
  assert (folder / "torch" / "model.safetensors").exists() and (
    folder / "orbax" / "params"
  ).is_dir()
