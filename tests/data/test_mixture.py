"""data/mixture.py: which annotations are read, and what can't be."""

import json
import math
import os
import random
from pathlib import Path

import decoding
import pytest
import yaml
from decoding import mixture
from refused import refused

from xcomp_jax import inputs
from xcomp_jax.data.mixture import (
  drawn_annotations,
  read_annotations,
  read_mixture,
  select_annotations,
)
from xcomp_jax.data.prompt import AnnotationError

pytestmark = pytest.mark.pure


@pytest.fixture
def world(tmp_path):
  """An annotation file, and a mixture to be overwritten."""
  decoding.write(tmp_path / "videos.json", [{"video": "v0.mp4", "conversations": decoding.talk()}])
  return tmp_path


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
  return [
    i
    for i in items
    if ("image" in i) != ("video" in i) and not isinstance(i.get("image", i.get("video")), list)
  ]


@pytest.mark.parametrize("subset", [0.25, 1.0])
@pytest.mark.parametrize(
  "strategy",
  [
    "all",
    "first:25%",
    "first:7",
    "first2:10%",
    "first2:2.5%",
    "first2:1%",
    "first3:4",
    "first6:10%",
    "end:9",
    "end:30%",
  ],
)
def test_selection_of_sct(strategy, subset):
  for n in (0, 1, 9, 173):
    items = [{"n": i, "video": f"{i}.mp4"} for i in range(n)]
    for i in range(0, n, 11):
      items[i] = (
        {"n": i, "image": ["a", "b"]},
        {"n": i, "image": "a", "video": "b"},
        {"n": i},
        {"n": i, "image": "a"},
      )[i // 11 % 4]
    assert [items[i] for i in select_annotations(items, strategy, subset)[1]] == by_the_book(
      items, strategy, subset
    )


def test_the_papers_mixture_reads_what_the_release_reads(tmp_path, reference):
  """The 84 files of the paper's mixture, with other annotations in them; subset 0.25 as in the
  release.
  """
  listed = json.loads((reference / "sct_mixture.json").read_text())
  assert len(listed) == 84 and sum(name.endswith(".jsonl") for name, *_ in listed) == 52
  rng = random.Random(7)
  datasets, wanted = [], []
  for name, strategy, *kind in listed:
    items = []
    for i in range(rng.randint(0, 900)):
      visual = rng.choice(
        [{"video": f"{i}.mp4"}] * 8
        + [{"image": f"{i}.png"}, {"image": ["a", "b"]}, {"video": "v", "image": "i"}, {}]
      )
      items.append({"id": f"{name} {i}", **visual, "conversations": []})
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    decoding.write(file, items)
    datasets.append(
      {"json_path": name, "sampling_strategy": strategy, "data_root": "data/"}
      | ({"video_read_type": kind[0]} if kind else {})
    )
    wanted += [item["id"] for item in by_the_book(items, strategy, 0.25)]
  (tmp_path / "paper.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
  jobs, files = read_mixture(tmp_path / "paper.yaml", tmp_path, 0.25)
  assert [job.sample.id for job in jobs] == wanted and len(wanted) > 500
  assert [file.annotation for file in files] == [name for name, *_ in listed]
  assert sum(file.drawn for file in files) > sum(file.selected for file in files) == len(jobs)
  kinds = {
    name: {None: "video", "img": "frames", "gif": "gif"}[kind[0] if kind else None]
    for name, _, *kind in listed
  }
  for job in jobs:
    assert job.reader == (
      "img" if job.sample.source.endswith(".png") else kinds[job.sample.annotation]
    )


def test_the_amounts_of_a_strategy():
  """Worked out by hand: ceil(173 * 10%) = 18, of which int(18 * 0.25) = 4 are kept; the second
  tenth has other members than the first.
  """
  second, first = (
    drawn_annotations(173, "first2:10%", 0.25),
    drawn_annotations(173, "first:10%", 1.0),
  )
  assert (
    len(second) == 4
    and len(first) == 18
    and not set(first) & set(drawn_annotations(173, "first2:10%"))
  )
  assert (
    len(drawn_annotations(173, "first2:2.5%")) == 5
    and len(drawn_annotations(173, "end:9")) == 9
    and len(drawn_annotations(10, "first6:20%")) == 0
  )


def test_selection_leaves_the_random_state_alone(monkeypatch):
  # not by comparing states: the checker of types draws from the same generator
  for name in ("seed", "shuffle"):
    monkeypatch.setattr(
      random, name, lambda *a: pytest.fail("the process's own generator was used")
    )
  assert len(select_annotations([{"video": "a"}] * 9, "first:3")[1]) == 3


@pytest.mark.parametrize(
  "strategy",
  [
    "some",
    "first",
    "first:",
    "first:a",
    "first0:10%",
    "end2:10%",
    "first:-3",
    "last:3",
    "first:1.5",
  ],
)
def test_unknown_strategy(strategy):
  with refused(AnnotationError, where="sampling_strategy", value=strategy):
    select_annotations([{"video": "a"}] * 9, strategy)


@pytest.mark.parametrize(
  ("entry", "fields"),
  [
    ({"json-path": "videos.json"}, {"where": "json-path", "near": ["json_path"]}),
    ({"json_path": "videos.json", "epochs": 3}, {"where": "epochs", "near": []}),
    ({"sampling_strategy": "all"}, {"where": "json_path", "missing": True}),
    (
      {"json_path": "videos.json", "video_read_type": "webm"},
      {"where": "video_read_type", "value": "webm"},
    ),
    (
      {"json_path": "videos.json", "video_read_type": ["img"]},
      {"where": "video_read_type", "value": ["img"]},
    ),
    (
      {"json_path": "frames.json", "video_read_type": "img", "frame_rate": "3"},
      {"where": "frame_rate", "value": "3"},
    ),
    ({"json_path": "videos.json", "frame_rate": 3}, {"where": "frame_rate", "value": 3}),
    (
      {"json_path": "videos.json", "video_read_type": "img", "frame_rate": 0},
      {"where": "frame_rate", "value": 0},
    ),
    (
      {"json_path": "videos.json", "video_read_type": "img", "frame_rate": True},
      {"where": "frame_rate", "value": True},
    ),
    (
      {"json_path": "videos.json", "sampling_strategy": "first:x"},
      {"where": "sampling_strategy", "value": "first:x"},
    ),
    ({"json_path": "videos.json", "sampling_strategy": None}, {"where": "sampling_strategy"}),
    ({"json_path": "videos.json", "text_samples": "yes"}, {"where": "text_samples"}),
    ({"json_path": "videos.json", "data_root": 3}, {"where": "data_root", "value": 3}),
  ],
)
def test_mixture_errors(world, entry, fields):
  mixture(world, {"json_path": "videos.json"}, entry)
  with refused(AnnotationError, **fields) as caught:
    read_mixture(world / "mixture.yaml", world, 1.0)
  assert str(caught.value).startswith(f"mixture {world}/mixture.yaml, dataset 1: ")


@pytest.mark.parametrize("name", ["none.json", "a\0.json", ""])
def test_annotation_files_that_are_not_there(world, name):
  mixture(world, {"json_path": name})
  with refused(AnnotationError, where=world / name):
    read_mixture(world / "mixture.yaml", world, 1.0)


@pytest.mark.parametrize(
  "text", ["", "- a", "\0", "[" * 5000, "datasets:", "datasets: [3]", "a: [", "datasets: {}"]
)
def test_not_a_mixture(world, text):
  (world / "mixture.yaml").write_text(text)
  with refused(AnnotationError, where=world / "mixture.yaml"):
    read_mixture(world / "mixture.yaml", world, 1.0)


def unfolding(form: str) -> str:
  """Thirty lines of YAML that stand for 10^30 texts."""
  return "a0: &a0 {k: v}\n" + "".join(
    f"a{i}: &a{i} {form.format(', '.join([f'*a{i - 1}'] * 10))}\n" for i in range(1, 31)
  )


@pytest.mark.parametrize(
  "text, message",
  [
    *(
      (
        unfolding("[{0}]") + f"datasets:\n- json_path: a\n  {key}: *a30\n",
        "line 7: its aliases .* stand for more than the 1,048,576 characters",
      )
      for key in (
        "data_root",
        "video_read_type",
        "sampling_strategy",
        "frame_rate",
        "text_samples",
      )
    ),
    (unfolding("{{<<: [{0}]}}") + "datasets:\n- <<: *a30\n", "its aliases"),
    ("datasets: &d\n- *d\n", "line 1: something contains itself"),
    ("datasets:\n- &d\n  <<: *d\n", "line 2: something contains itself"),
    (
      "datasets:\n- json_path: videos.json\n  sampling_strategy: 'first:" + "9" * 400 + "%'",
      "is unknown",
    ),
    (
      "datasets:\n- json_path: videos.json\n  sampling_strategy: [all]",
      r"sampling_strategy must be a text .*, not \['all'\]",
    ),
    (
      "datasets:\n- json_path: a\n  data_root: " + "[" * 20 + "]" * 20,
      r"data_root must be a path, not \[\[\[",
    ),
    (
      "datasets:\n- json_path: a\n  video_read_type: img\n  frame_rate: 0x" + "f" * 20_000,
      "not a long int",
    ),
    ("datasets:\n- json_path: a\n  video_read_type: img\n  frame_rate: 1001", "up to 1000"),
    ("datasets: !!python/object/apply:os.system ['true']", "constructor"),
    ("datasets: \udcff", r"line 1: byte 0xff is no UTF-8"),
    ("#" * (1 << 20) + "\n", "has more than the 1,048,576 bytes"),
  ],
)
def test_a_mixture_that_unfolds_without_end_is_refused(world, text, message):
  decoding.write(world / "videos.json", [])
  (world / "mixture.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
  with pytest.raises(AnnotationError, match=message) as error:
    read_mixture(world / "mixture.yaml", world, 1.0)
  assert len(str(error.value)) < 1000


def test_aliases_of_a_mixture_are_followed_within_it(world):
  decoding.write(world / "videos.json", [])
  (world / "mixture.yaml").write_text(
    "datasets:\n- &first {json_path: videos.json, data_root: &root videos}\n- <<: *first\n  "
    "sampling_strategy: first:1\n  data_root: *root\n"
  )
  assert [file.annotation for file in read_mixture(world / "mixture.yaml", world, 1.0)[1]] == [
    "videos.json"
  ] * 2


@pytest.mark.parametrize("key", ["id", "video", "start", "conversations", "messages"])
def test_annotations_may_hold_anything_however_deep(world, key):
  deep = "[" * 900 + "]" * 900
  (world / "videos.json").write_text(f'[{{"video": "v.mp4", "{key}": {deep}}}]')
  mixture(world, {"json_path": "videos.json"})
  (job,), _ = read_mixture(world / "mixture.yaml", world, 1.0)
  assert job.faults and all(len(fault) < 1000 for fault in job.faults)


def test_annotations_from_a_pipe_are_refused_for_they_are_read_again(world):
  (world / "videos.json").unlink()
  os.mkfifo(world / "videos.json")
  mixture(world, {"json_path": "videos.json"})
  with refused(AnnotationError, where=world / "videos.json") as caught:
    read_mixture(world / "mixture.yaml", world, 1.0)
  assert isinstance(caught.value.__cause__, inputs.NoFileError)


@pytest.mark.parametrize(
  ("name", "content", "fields"),
  [
    ("a.json", b'[{"a": 1},\n{"b" 2}]', {"line": 2}),
    ("a.jsonl", b'{"a": 1}\n\n{"b" 2}\n', {"line": 3}),
    ("a.json", b'{"a": 1}', {"value": {"a": 1}}),
    ("a.json", b'[{"a": 1}, 3]', {"position": 1, "value": 3}),
    ("a.jsonl", b"3\n", {"position": 0, "value": 3}),
    ("a.json", b'["\xff"]', {"line": None}),
    ("a.json", b"", {"line": 1}),
    ("a.json", b"[" * 100000, {"line": 1}),
    ("a.json", b'[{"id": ' + b"9" * 5000 + b"}]", {"line": 1}),
    ("a.jsonl", "[]".encode("utf-16"), {"line": None}),
  ],
)
def test_annotation_files_that_are_not(tmp_path, name, content, fields):
  (tmp_path / name).write_bytes(content)
  with refused(AnnotationError, where=tmp_path / name, **fields):
    read_annotations(tmp_path / name)


def test_lines_of_jsonl_end_with_newlines_only(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\r\n{"a": "z"}', encoding="utf-8")
  assert read_annotations(tmp_path / "a.jsonl") == [{"a": "x\u2028y"}, {"a": "z"}]


def test_a_byte_order_mark_is_no_fault(tmp_path):
  (tmp_path / "a.json").write_text('[{"a": 1}]', encoding="utf-8-sig")
  assert read_annotations(tmp_path / "a.json") == [{"a": 1}]


def test_relative_paths_start_from_root(tmp_path, monkeypatch):
  monkeypatch.chdir(decoding.make_world(tmp_path / "data"))
  jobs, files = read_mixture("mixture.yaml", ".", 1.0)
  assert len(jobs) == 7 and not any(job.faults for job in jobs) and len(files) == 5


def read_one(world, items, **entry):
  decoding.write(world / "videos.json", items)
  mixture(world, {"json_path": "videos.json"} | entry)
  return read_mixture(world / "mixture.yaml", world, 1.0)


def test_what_is_null_is_not_there_and_a_list_of_one_is_that(world):
  """Tables have every column in every row."""
  (world / "videos").mkdir()
  for name in ("v0.mp4", "a.png"):
    (world / "videos" / name).touch()
  blank = {"id": None, "start": None, "end": None}
  items = [
    {"video": "v0.mp4", "image": None},
    {"video": None, "image": "a.png"},
    {"video": ["v0.mp4"], "image": []},
    {"videos": ["v0.mp4"], "images": None},
    {"video": None, "image": None},
    {"image": ["a.png", "a.png"]},
    {"video": "v0.mp4", "image": "a.png"},
    {},
    {"video": "v0.mp4", "image": math.nan, "start": math.nan},
    {"video": "", "image": "a.png"},
    {"image": [None, "a.png"]},
  ]
  items = [blank | item | {"conversations": decoding.talk()} for item in items]
  jobs, (file,) = read_one(world, items)
  assert {
    job.sample.position: (job.sample.source.rpartition("/")[2], job.reader) for job in jobs
  } == {
    0: ("v0.mp4", "video"),
    1: ("a.png", "img"),
    2: ("v0.mp4", "video"),
    3: ("v0.mp4", "video"),
    8: ("v0.mp4", "video"),
    9: ("a.png", "img"),
    10: ("a.png", "img"),
  }
  assert not any(job.faults for job in jobs) and {job.sample.id for job in jobs} == {
    "0",
    "1",
    "2",
    "3",
    "8",
    "9",
    "10",
  }
  assert file.passed == (
    (4, "text alone"),
    (5, "several images or videos"),
    (6, "several images or videos"),
    (7, "text alone"),
  )


def test_text_alone_is_taken_where_a_mixture_wants_it(world):
  items = [
    {"conversations": decoding.talk("What?")},
    {"video": None, "conversations": decoding.talk("<image> What?")},
  ]
  jobs, (file,) = read_one(world, items, text_samples=True)
  assert (
    file.passed == ()
    and [job.reader for job in jobs] == [None, None]
    and [job.sample.source for job in jobs] == ["", ""]
  )
  faults = {job.sample.position: job.faults for job in jobs}
  assert faults[0] == () and "1 <image> in a conversation that needs 0" in faults[1][0]
  with refused(AnnotationError, where="text_samples", value="yes"):
    read_one(world, items, text_samples="yes")


@pytest.mark.parametrize(
  "talk",
  [
    [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That."}],
    [{"role": "user", "content": "<video>\nWhat?"}, {"role": "assistant", "content": "That."}],
    [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "That."}],
  ],
)
@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_conversations_in_the_words_of_others(world, talk, key):
  (world / "videos").mkdir()
  (world / "videos" / "v0.mp4").touch()
  (job,), _ = read_one(world, [{"video": "v0.mp4", key: talk}])
  assert job.faults == () and list(job.sample.conversations) == decoding.talk("<image>\nWhat?")


@pytest.mark.parametrize(
  "talk, fault",
  [
    (
      [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": " "}],
      "turn 1, an answer, is empty: write one, or leave out its question, too",
    ),
    (
      [{"from": "human", "value": "<video>\n<image>"}, {"from": "gpt", "value": "A"}],
      "turn 0 has <video> beside <image>, or several: write <image> once",
    ),
    (
      [{"from": "human", "value": "<video><video>"}, {"from": "gpt", "value": "A"}],
      "0 <image> in a conversation that needs 1",
    ),
    (
      [
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "assistant", "content": "A"},
      ],
      'turn 0 must be {"from": ..., "value": ...}',
    ),
    (
      [{"role": ["user"], "content": "<image>"}, {"role": "assistant", "content": "A"}],
      'turn 0 must be {"from": ..., "value": ...}',
    ),
    (
      [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "A"}],
      "turn 0 is from 'system'; known: human, gpt",
    ),
    ("What?", "an annotation needs conversations, a list of turns"),
  ],
)
def test_conversations_that_are_none_are_named(world, talk, fault):
  (world / "videos").mkdir()
  (world / "videos" / "v0.mp4").touch()
  (job,), _ = read_one(world, [{"video": "v0.mp4", "conversations": talk}])
  assert len(job.faults) == 1 and fault in job.faults[0]


def test_a_mixture_that_lies_in_the_root_is_pointed_to(world, tmp_path_factory, monkeypatch):
  mixture(world, {"json_path": "videos.json"})
  monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
  with refused(AnnotationError, where=Path("mixture.yaml"), there=world / "mixture.yaml"):
    read_mixture("mixture.yaml", world, 1.0)
