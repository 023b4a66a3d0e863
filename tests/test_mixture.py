"""data/mixture.py: which annotations are read, and what can't be."""

import math
import random

import decoding
import pytest
from decoding import mixture

from xcomp_jax.data.mixture import read_annotations, read_mixture, select
from xcomp_jax.data.prompt import AnnotationError


@pytest.fixture
def world(tmp_path):
  return decoding.make_world(tmp_path / "data")


def by_the_book(items, strategy, subset):
  """FACTS.md 14, sentence by sentence."""
  items = list(items)
  random.seed(12345)
  random.shuffle(items)
  if strategy != "all":
    kind, amount = strategy.split(":")
    n = math.ceil(float(amount.rstrip("%")) * len(items) / 100) if "%" in amount else int(amount)
    if kind == "first":
      items = items[0:n]
    elif kind == "end":
      items = items[-n:]
    else:
      k = int(kind.removeprefix("first"))
      items = items[(k - 1) * n : k * n]
  random.seed(42)
  random.shuffle(items)
  items = items[int(len(items) * 0) : int(len(items) * subset)]
  return [i for i in items if ("image" in i) != ("video" in i) and not isinstance(i.get("image", i.get("video")), list)]


@pytest.mark.parametrize("subset", [0.25, 1.0])
@pytest.mark.parametrize(
  "strategy", ["all", "first:25%", "first:7", "first2:10%", "first2:2.5%", "first2:1%", "first3:4", "first6:10%", "end:9", "end:30%"]
)
def test_selection_of_sct(strategy, subset):
  for n in (0, 1, 9, 173):
    items = [{"n": i, "video": f"{i}.mp4"} for i in range(n)]
    for i in range(0, n, 11):
      items[i] = ({"n": i, "image": ["a", "b"]}, {"n": i, "image": "a", "video": "b"}, {"n": i}, {"n": i, "image": "a"})[i // 11 % 4]
    assert [items[i] for i in select(items, strategy, subset)] == by_the_book(items, strategy, subset)


def test_selection_leaves_the_random_state_alone(monkeypatch):
  # not by comparing states: the checker of types draws from the same generator
  for name in ("seed", "shuffle"):
    monkeypatch.setattr(random, name, lambda *a: pytest.fail("the process's own generator was used"))
  assert len(select([{"video": "a"}] * 9, "first:3")) == 3


@pytest.mark.parametrize("strategy", ["some", "first", "first:", "first:a", "first0:10%", "end2:10%", "first:-3", "last:3", "first:1.5"])
def test_unknown_strategy(strategy):
  with pytest.raises(AnnotationError, match="write all, first:100"):
    select([{"video": "a"}] * 9, strategy)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"json_path": "none.json"}, r"none\.json can't be read"),
    ({"json-path": "videos.json"}, "json-path is unknown; did you mean json_path"),
    ({"sampling_strategy": "all"}, "dataset 0: json_path is missing"),
    ({"json_path": "videos.json", "video_read_type": "webm"}, "'webm' is unknown; known: decord, gif, img"),
    ({"json_path": "videos.json", "sampling_strategy": "first:x"}, "dataset 0: sampling_strategy 'first:x'"),
  ],
)
def test_mixture_errors(world, entry, message):
  mixture(world, entry)
  with pytest.raises(AnnotationError, match=message):
    read_mixture(world / "mixture.yaml", world, 1.0)


@pytest.mark.parametrize("text", ["", "- a", "datasets:", "datasets: [3]", "a: [", "datasets: {}"])
def test_not_a_mixture(world, text):
  (world / "mixture.yaml").write_text(text)
  with pytest.raises(AnnotationError, match=r"mixture .*mixture\.yaml"):
    read_mixture(world / "mixture.yaml", world, 1.0)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.json", b'[{"a": 1},\n{"b" 2}]', r"a\.json, line 2: not JSON"),
    ("a.jsonl", b'{"a": 1}\n\n{"b" 2}\n', r"a\.jsonl, line 3: not JSON"),
    ("a.json", b'{"a": 1}', "expected a list of objects"),
    ("a.jsonl", b"3\n", "expected a list of objects"),
    ("a.json", b'["\xff"]', "can't be read: .*utf-8"),
    ("a.json", b"", "line 1: not JSON"),
  ],
)
def test_annotation_files_that_are_not(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(AnnotationError, match=message):
    read_annotations(tmp_path / name)


def test_lines_of_jsonl_end_with_newlines_only(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\r\n{"a": "z"}', encoding="utf-8")
  assert read_annotations(tmp_path / "a.jsonl") == [{"a": "x\u2028y"}, {"a": "z"}]


def test_relative_paths_start_from_root(world, monkeypatch):
  monkeypatch.chdir(world)
  jobs, files = read_mixture("mixture.yaml", ".", 1.0)
  assert len(jobs) == 7 and not any(job.faults for job in jobs) and len(files) == 5


