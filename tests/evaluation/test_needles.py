"""Needles in a haystack; `reference/benchmarks/needles.json` has entries of VideoChat-Flash's own
files.
"""

import json
import os
import pathlib

import numpy as np
import odd
import pytest
from PIL import Image

from xcomp_jax.evaluation import haystacks, needles
from xcomp_jax.evaluation.answers import failures
from xcomp_jax.inference.prepared import prepare_model
from xcomp_jax.inference.settings import AskSettings
from xcomp_jax.inference.video_model import VideoModel
from xcomp_jax.model.vlm import VLM

TINY = pathlib.Path(__file__).parents[2] / "assets" / "tiny"


def hidden(frames, hops, depth=0.0, clip_frames=8, hay=10_000):
  """Numbers in place of features: the haystack's frames from 0 up, the needles' from -1 down."""
  starts = haystacks.needle_places(frames, hops, clip_frames, depth)
  numbers = [np.full((clip_frames, 1, 1), -1.0 - j) for j in range(hops)]
  return (
    starts,
    haystacks.hide(np.arange(hay, dtype=float)[:, None, None], numbers, frames, starts)[:, 0, 0],
  )


@pytest.mark.pure
@pytest.mark.parametrize("depth,start", [(0.0, 0), (0.2, 198), (0.5, 496), (1.0, 992)])
def test_a_needle_lies_at_its_depth_and_the_haystack_goes_on_behind_it(depth, start):
  (at,), video = hidden(1000, 1, depth)
  assert at == start and len(video) == 1000 and (video[at : at + 8] == -1).all()
  np.testing.assert_array_equal(video[video >= 0], np.arange(992))


@pytest.mark.pure
def test_a_chain_is_spread_from_the_first_frame_to_the_last():
  starts, video = hidden(1000, 5, clip_frames=4)
  assert starts[0] == 0 and starts[-1] == 996 and len(set(np.diff(starts))) <= 2
  assert [video[s] for s in starts] == [-1, -2, -3, -4, -5]
  np.testing.assert_array_equal(video[video >= 0], np.arange(980))


@pytest.mark.pure
def test_a_haystack_that_is_too_short_is_taken_again():
  _, video = hidden(100, 1, 0.0, hay=40)
  np.testing.assert_array_equal(video[8:], np.arange(92) % 40)


SMALL = ["--mode=aligned", "--repeat=1", "--clips-per-chunk=8"]


def go(out, *more, **parts):
  needles.main(["--checkpoint", str(TINY), "--out", str(out), *SMALL, *more], **parts)


def test_synthetic_needles_as_a_heat_map_and_a_run_that_goes_on(tmp_path, capsys):
  arguments = ["--synthetic=2", "--frames", "64", "--depths", "0", "1", "--select=8"]
  asked, most = [], 5

  def ask(*a):
    if len(asked) == most:
      raise KeyboardInterrupt
    asked.append(a)
    return needles.ask_needle(*a)

  with pytest.raises(SystemExit) as stopped:
    go(tmp_path, *arguments, ask=ask)
  assert stopped.value.code == 130
  most = None
  go(tmp_path, *arguments, ask=ask)
  assert len(asked) == 2 * 2 * 4  # none was asked twice
  found = json.loads((tmp_path / "results.json").read_text())
  assert [(c["frames"], c["depth"], c["questions"]) for c in found["cells"]] == [
    (64, 0, 8),
    (64, 1, 8),
  ]
  assert found["found"] > 50  # by chance a clip of 8 meets the needle's once in eight times
  assert np.mean([c["right"] for c in found["cells"]]) == pytest.approx(found["right"])
  with Image.open(tmp_path / "heatmap.png") as image:
    assert (
      image.size[0] > 500
      and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    )
  assert "heatmap.png" in capsys.readouterr().out
  with pytest.raises(SystemExit):
    go(tmp_path, *arguments[1:], "--synthetic=3")
  assert "holds answers made otherwise (needles was" in capsys.readouterr().err


@pytest.mark.pure
def test_cells_average_over_needles_and_kinds():
  def line(frames, depth, right, found):
    return {"frames": frames, "depth": depth, "right": right, "found": found}

  found = needles.summary(
    [line(64, 0.5, True, False), line(64, 0.5, False, False), line(128, 0.5, True, True)], "depth"
  )
  assert [(c["frames"], c["right"], c["found"], c["questions"]) for c in found["cells"]] == [
    (64, 50, 0, 2),
    (128, 100, 100, 1),
  ]
  assert found["right"] == pytest.approx(200 / 3) and found["questions"] == 3


@pytest.mark.slow
def test_the_published_protocols_run_on_pictures_and_a_film(reference, tmp_path, capsys):
  entries = json.loads((reference / "benchmarks" / "needles.json").read_text())
  rng = np.random.default_rng(0)
  names = {name for item in entries["multi"] for name in item["images"]} | {
    item["image"] for item in entries["single"]
  }
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(tmp_path / name)
  film = odd.write(
    tmp_path / "hay.mp4", range(0, 40_000, 1000), container={"movflags": "faststart"}, g="8"
  )
  for kind, rows in (("single", [0.0, 0.5]), ("multi", ["caption", "question"])):
    (tmp_path / f"{kind}.json").write_text(json.dumps(entries[kind]))
    files = [
      "--needles",
      str(tmp_path / f"{kind}.json"),
      "--images",
      str(tmp_path),
      "--haystack",
      str(film),
    ]
    go(tmp_path / kind, *files, "--frames", "64", "--depths", "0", "0.5", "--min-frames=8")
    found = json.loads((tmp_path / kind / "results.json").read_text())
    assert [cell[found["row"]] for cell in found["cells"]] == rows and found["questions"] == 4
    lines = [
      json.loads(line)
      for line in (tmp_path / kind / "answers-0-of-1.jsonl").read_text().splitlines()[1:]
    ]
    assert {line["kept"] for line in lines} == {1}  # one frame is selected
    assert ("seconds can't be decoded" in capsys.readouterr().err) == (kind == "multi")
    whole = film.read_bytes()
    film.write_bytes(whole[: (at := int(len(whole) * 0.8))] + bytes(len(whole) - at))
  (tmp_path / "single" / "missing.json").write_text(
    json.dumps([{"image": "nowhere.jpg", "question": "?", "answer": "A"}])
  )
  files[1] = str(tmp_path / "single" / "missing.json")
  with pytest.raises(SystemExit):
    go(tmp_path / "x", *files)
  assert "nowhere.jpg" in capsys.readouterr().err
  files[1] = str(tmp_path / "single" / "results.json")
  with pytest.raises(SystemExit):
    go(tmp_path / "x", *files)
  assert "results.json" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments,words",
  [
    ([], "--synthetic COUNT"),
    (["--needles=x.json"], "--images DIR"),
    (["--synthetic=1", "--frames", "100"], "--frames 100: a multiple of 8"),
    (["--synthetic=1", "--clip-frames=4"], "is a clip of 8 frames"),
    (
      ["--synthetic=1", "--frames", "64", "--select=0", "--context=500"],
      "the model's context has 500",
    ),
    (["--synthetic=1", "--share=3/2"], "--share 3/2"),
  ],
)
def test_bad_arguments_end_in_one_line(tmp_path, capsys, arguments, words):
  with pytest.raises(SystemExit) as stop:
    go(tmp_path / "out", *arguments)
  err = capsys.readouterr().err
  assert stop.value.code == 1 and err.splitlines()[-1].startswith("error: ") and words in err


@pytest.mark.parametrize(
  "option", ["--synthetic=-1", "--depths=2", "--depths=nan", "--frames=8000000000", "--limit=0"]
)
def test_numbers_have_bounds_that_are_said(tmp_path, capsys, option):
  with pytest.raises(SystemExit) as stop:
    go(tmp_path / "out", option)
  assert (
    stop.value.code == 2
    and f"argument {option.split('=')[0]}: {option.split('=')[1]}: must be a"
    in capsys.readouterr().err
  )


def test_a_picture_that_cannot_be_read_costs_its_own_needle(tmp_path):
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "good.png")
  (tmp_path / "bad.png").write_bytes(b"no image")
  os.mkfifo(tmp_path / "pipe.png")
  one = {"question": "Which?", "answer": "A"}
  (tmp_path / "n.json").write_text(
    json.dumps(
      [
        {"image": name} | one
        for name in ("bad.png", "good.png", "pipe.png", "nowhere.png", "\ud800.png", "")
      ]
    )
  )
  found = haystacks.read_needles(tmp_path / "n.json", tmp_path, 8, 16)
  assert [len(needle.clips) for needle in found] == [0, 1, 0, 0, 0, 0]
  assert all(
    words in needle.fault
    for needle, words in zip(
      found,
      (
        "bad.png is no image",
        "",
        "is a pipe",
        "nowhere.png does not exist",
        "does not exist",
        "is a folder",
      ),
    )
  )
  reader = prepare_model(AskSettings(checkpoint=str(TINY)))
  model = VideoModel(**vars(reader), vlm=object.__new__(VLM))  # without parameters: a mistake
  hay = np.zeros((8, 16, 4))
  cells = [needles.NeedleCell(64, 0.5, n) for n in range(2)]
  searching = needles.NeedleSearch(model, found, hay, "film")
  lines = [line for c in cells for line in searching.ask(c, ["question"])]
  assert (
    [line["right"] for line in lines] == [False, False]
    and "bad.png" in lines[0]["error"]
    and "unexpected AttributeError in places.py" in lines[1]["error"]
  )
  assert [(f["needle"], f["questions"]) for f in failures(lines, "needle")] == [(0, 1), (1, 1)]
  assert needles.summary(lines, "depth")["right"] == 0


@pytest.mark.pure
@pytest.mark.parametrize("changes", [None, {"answer": 3}, {"image": 3}, {"question": ["?"]}])
def test_needles_that_are_none_are_named(tmp_path, changes):
  good = {"image": "a", "question": "?", "answer": "A"}
  bad = {"image": "a", "question": "?"} if changes is None else good | changes
  for second in (bad, 3):
    (tmp_path / "n.json").write_text(json.dumps([good, second]))
    with pytest.raises(haystacks.NeedleError) as caught:
      haystacks.read_needles(tmp_path / "n.json", tmp_path, 8, 16)
    assert caught.value.fields == {"where": tmp_path / "n.json", "needle": 1}


@pytest.mark.pure
def test_files_without_needles_are_named(tmp_path):
  (tmp_path / "n.json").write_text("{}")
  with pytest.raises(haystacks.NeedleError) as caught:
    haystacks.read_needles(tmp_path / "n.json", tmp_path, 8, 16)
  assert caught.value.fields == {"where": tmp_path / "n.json", "value": {}}
  (tmp_path / "n.json").write_text("[" * 100_000)
  with pytest.raises(haystacks.NeedleError, match=r"n\.json"):
    haystacks.read_needles(tmp_path / "n.json", tmp_path, 8, 16)
