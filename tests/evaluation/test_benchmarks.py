"""Benchmarks: `reference/benchmarks` has real annotations, and what the release's own code makes of
them and of answers.
"""

import json
import pathlib

import pytest

from xcomp_jax.evaluation.annotations import TaskError
from xcomp_jax.evaluation.benchmarks import (
  TASKS,
  BenchmarkQuestion,
  find_video,
  read_questions,
  say_doubts,
  score_answers,
)
from xcomp_jax.evaluation.protocol import CLOSING, any_letter, bracketed_letter, first_capital

pytestmark = pytest.mark.pure


def refused(task, file, *subtitles):
  """What is said of each bad question of a file, as fields."""
  with pytest.raises(TaskError) as caught:
    read_questions(TASKS[task], file, *subtitles)
  assert caught.value.fields["where"] == file
  return caught.value.fields["faults"]


@pytest.fixture(scope="module")
def benchmarks(reference):
  return reference / "benchmarks"


@pytest.fixture(scope="module")
def prompts(benchmarks):
  return json.loads((benchmarks / "prompts.json").read_text())


@pytest.mark.parametrize("name,source", [("lvbench", "lvbench.json"), ("mlvu", "mlvu")])
def test_prompts_of_50_real_questions_are_the_release_s(benchmarks, prompts, name, source):
  questions = read_questions(TASKS[name], benchmarks / source)
  assert [q.prompt for q in questions] == prompts[name] and len(questions) == 50
  assert len({q.id for q in questions}) == 50


def test_prompts_letter_by_letter(benchmarks):  # FACTS.md 12, written out
  first = read_questions(TASKS["lvbench"], benchmarks / "lvbench.json")[0]
  assert first.prompt == (
    "What year appears in the opening caption of the video?\nA. (A) 1636\nB. (B) 1366\nC. (C) "
    "1363\nD. (D) 1633\n"
    "Answer with the option's letter from the given choices directly."
  )
  assert (first.answer, first.videos, first.groups["type"]) == ("D", ("00000000",), "cartoon")
  first = read_questions(TASKS["mlvu"], benchmarks / "mlvu" / "4_count.json")[0]
  item = json.loads((benchmarks / "mlvu" / "4_count.json").read_text())[0]
  options = "".join(f"({letter}) {text}\n" for letter, text in zip("ABCD", item["candidates"]))
  assert first.prompt == f"Question:{item['question']}\nOption:\n{options}{CLOSING}"
  assert first.videos == (f"4_count/{item['video']}", item["video"])
  other = read_questions(TASKS["mlvu_best_option"], benchmarks / "mlvu" / "4_count.json")[0]
  assert (
    other.prompt == f"Question:{item['question']}\nOption:\n{options}\nOnly give the best option."
  )


def test_prompts_of_the_other_benchmarks(benchmarks, prompts, tmp_path):
  made = json.loads((benchmarks / "others.json").read_text())
  for name in ("mvbench", "videomme_long"):
    (tmp_path / f"{name}.json").write_text(json.dumps([made[name]]))
    (question,) = read_questions(TASKS[name], tmp_path / f"{name}.json")
    assert question.prompt == prompts[name][0]
  (tmp_path / "y_en.json").write_text(json.dumps(made["subtitles"]))
  for duration, wanted in zip((20.4, 2000.0), prompts["longvideobench"], strict=True):
    (tmp_path / "lvb.json").write_text(
      json.dumps([made["longvideobench"] | {"duration": duration}])
    )
    (question,) = read_questions(TASKS["longvideobench"], tmp_path / "lvb.json", tmp_path)
    assert question.prompt == wanted and question.answer == "C" and len(question.options) == 5
  assert refused("longvideobench", tmp_path / "lvb.json") == [
    {"where": "--subtitles", "file": "lvb.json", "questions": [0]}
  ]
  (missing,) = refused("longvideobench", tmp_path / "lvb.json", tmp_path / "nowhere")
  assert missing["where"] == tmp_path / "nowhere" / "y_en.json"


def test_answers_of_many_shapes_count_as_the_release_counts_them(benchmarks):
  recorded = json.loads((benchmarks / "parsed.json").read_text())
  for answer, letter, capital, bracketed in recorded["answers"]:
    assert any_letter(answer) == letter, answer
    assert first_capital(answer) == capital, answer
    assert bracketed_letter(answer, recorded["options"]) == bracketed, answer


@pytest.mark.parametrize(
  "answer,letter",
  [
    ("(B)", "B"),
    ("B.", "B"),
    ("The answer is B", "B"),
    ("b", "B"),
    ("", ""),
    ("A and B", "A"),
    ("B. a dog", "B"),
  ],
)
def test_answers_by_hand(answer, letter):
  assert any_letter(answer) == letter


def question(i, answer="A", **groups):
  return BenchmarkQuestion(
    id=str(i),
    videos=("v",),
    prompt="?",
    options=("x", "y", "z", "w"),
    answer=answer,
    groups=groups or {"task": "one"},
  )


def test_averages_are_those_of_the_released_log():
  """The released log of MLVU: 66.6667 over all questions; the mean over its tasks is another
  number.
  """
  log = {
    "anomaly_reco": (200, 76.5),
    "count": (206, 40.7767),
    "ego": (352, 62.5),
    "needle": (355, 79.7183),
    "order": (259, 28.5714),
    "plotqa": (539, 77.9221),
    "topic_reasoning": (264, 81.8182),
  }
  pairs = []
  for name, (n, accuracy) in log.items():
    right = round(n * accuracy / 100)
    pairs += [(question(i, task=name), "A" if i < right else "B") for i in range(n)]
  found = score_answers(TASKS["mlvu"], pairs)
  assert found["micro"] == pytest.approx(66.6667, abs=1e-4) and found["macro"] == pytest.approx(
    63.972, abs=1e-3
  )
  assert found["counts"]["questions"] == 2175
  for name, (_, accuracy) in log.items():
    assert found["groups"]["task"][name]["accuracy"] == pytest.approx(accuracy, abs=1e-4)


def test_empty_answers_and_videos_that_failed():
  pairs = [
    (question(0), "A"),
    (question(1), ""),
    (question(2), None),
    (question(3), "pear"),
    (question(4, ""), "."),
  ]
  found = score_answers(TASKS["lvbench"], pairs)
  assert found["counts"] == {
    "questions": 5,
    "counted": 4,
    "right": 1,
    "empty": 1,
    "unparsed": 2,
    "failed": 1,
  }
  assert found["micro"] == 25.0  # the empty one left the denominator; the video that failed did not
  assert score_answers(TASKS["videomme_long"], pairs)["counts"]["counted"] == 5


def test_a_question_without_a_right_option_is_always_wrong(benchmarks):
  without = [q for q in read_questions(TASKS["mlvu"], benchmarks / "mlvu") if not q.answer]
  assert len(without) == 1
  for answer in ("A", "B", "C", "D", ".", without[0].options[0]):
    assert score_answers(TASKS["mlvu"], [(without[0], answer)])["counts"]["right"] == 0


def test_several_groups_of_a_question():
  pairs = [(question(0, kind="a; b"), "A"), (question(1, kind="b"), "B")]
  groups = score_answers(TASKS["lvbench"], pairs)["groups"]["kind"]
  assert {name: (cell["right"], cell["counted"]) for name, cell in groups.items()} == {
    "a": (1, 1),
    "b": (1, 2),
  }


def test_the_1549_questions_as_lvbench_publishes_them(benchmarks, tmp_path):
  item = json.loads((benchmarks / "lvbench.json").read_text())[0]
  text = item["question"] + "\n" + "\n".join(item["candidates"])
  line = {
    "key": "Cm73ma6Ibcs",
    "type": "cartoon",
    "qa": [{"uid": "0", "question": text, "answer": "D", "question_type": ["a", "b"]}] * 2,
  }
  (tmp_path / "meta.jsonl").write_text(json.dumps(line) + "\n")
  first, _ = read_questions(TASKS["lvbench"], tmp_path / "meta.jsonl")
  assert first.prompt == read_questions(TASKS["lvbench"], benchmarks / "lvbench.json")[0].prompt
  assert (first.answer, first.videos) == ("D", ("Cm73ma6Ibcs",))


def test_only_long_videos_of_videomme(benchmarks, tmp_path):
  made = json.loads((benchmarks / "others.json").read_text())["videomme_long"]
  (tmp_path / "v.json").write_text(
    json.dumps([made | {"duration": "short"}, made, made | {"duration": "medium"}])
  )
  assert len(read_questions(TASKS["videomme_long"], tmp_path / "v.json")) == 1
  (tmp_path / "v.json").write_text(json.dumps([made | {"duration": "short"}]))
  with pytest.raises(TaskError) as caught:
    read_questions(TASKS["videomme_long"], tmp_path / "v.json")
  assert caught.value.fields == {"where": tmp_path / "v.json", "found": 0}


@pytest.mark.parametrize("text,where", [("[{}]", "candidates"), ("[3]", "TypeError")])
def test_annotations_of_another_kind_are_refused(tmp_path, text, where):
  (tmp_path / "x.json").write_text(text)
  assert refused("lvbench", tmp_path / "x.json") == [
    {"where": where, "file": "x.json", "questions": [0]}
  ]


def test_annotations_that_are_no_json_or_empty_are_refused(tmp_path):
  (tmp_path / "x.json").write_text("[]")
  with pytest.raises(TaskError) as caught:
    read_questions(TASKS["lvbench"], tmp_path / "x.json")
  assert caught.value.fields == {"where": tmp_path / "x.json", "found": 0}
  (tmp_path / "x.json").write_text("{")
  with pytest.raises(TaskError, match=r"x\.json, line 1, is no JSON"):
    read_questions(TASKS["lvbench"], tmp_path / "x.json")


def test_annotations_that_are_no_utf8_are_named(tmp_path):
  (tmp_path / "x.json").write_bytes('[{"question": "é"}]'.encode("latin1"))
  with pytest.raises(TaskError, match=r"x\.json, line 1: byte 0xe9 is no UTF-8"):
    read_questions(TASKS["lvbench"], tmp_path / "x.json")


def test_videos_are_found_with_and_without_their_suffix(tmp_path):
  asked = BenchmarkQuestion(videos=("a/film", "film"), prompt="", options=(), answer="A", groups={})
  assert find_video(tmp_path, asked) == tmp_path / "a" / "film"  # nowhere: the likeliest
  (tmp_path / "film.mkv").touch()
  assert find_video(tmp_path, asked) == tmp_path / "film.mkv"
  (tmp_path / "a" / "film").mkdir(parents=True)  # a folder of frames
  assert find_video(tmp_path, asked) == tmp_path / "a" / "film"
  assert isinstance(find_video(tmp_path, asked), pathlib.Path)


def letters(tmp_path, *answers, **more):
  """Reads questions of the task `letters` with these answers."""
  text = "<video>\nWhich?\nA. red\nB. blue\nC. green"

  def talk(answer):
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]}

  (tmp_path / "q.json").write_text(
    json.dumps([{"video": "v.mp4", **talk(answer), **more} for answer in answers])
  )
  return read_questions(TASKS["letters"], tmp_path / "q.json")


def test_truths_of_many_shapes_are_letters(tmp_path):
  forms = ("B", "b", "B.", "(B)", "(b).", " B\n", "B)", "B:", "B. blue", "(B) blue")
  questions = letters(tmp_path, *forms)
  assert [q.answer for q in questions] == ["B"] * len(forms)
  assert questions[0].prompt == "Which?\nA. red\nB. blue\nC. green" and questions[0].options == (
    "red",
    "blue",
    "green",
  )
  assert score_answers(TASKS["letters"], [(q, "(B)") for q in questions])["micro"] == 100


def test_truths_that_are_no_letters_are_all_listed_in_their_order(tmp_path):
  with pytest.raises(
    TaskError,
    match=(
      r"^\S+/q.json has bad questions:\n  .*, questions 1, 4: its answer 'blue' is none of "
      r"the letters A to C; write one.*\n  .*, question 2: .*'D'.*\n  .*, question 3: .*''"
    ),
  ) as caught:
    letters(tmp_path, "A", "blue", "D", "", "blue")
  wrong = {"where": "answer", "allowed": "ABC", "file": "q.json"}
  assert caught.value.fields["faults"] == [
    wrong | {"value": value, "questions": n}
    for value, n in (("blue", [1, 4]), ("D", [2]), ("", [3]))
  ]
  with pytest.raises(TaskError) as caught:
    letters(tmp_path, "a blue one")
  assert caught.value.fields["faults"] == [wrong | {"value": "a blue one", "questions": [0]}]
  (tmp_path / "q.json").write_text(json.dumps([{"question": "?", "answer": "A"}]))
  (missing,) = refused("letters", tmp_path / "q.json")
  assert missing == {"where": "video", "file": "q.json", "questions": [0]}


def test_conversations_of_roles_are_read_and_others_refused(tmp_path):
  turns = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>\nWhich?"},
    {"role": "assistant", "content": "(A)"},
  ]
  file = tmp_path / "q.json"

  def write(talk):
    file.write_text(json.dumps([{"video": "v.mp4", "messages": talk}]))

  write(turns)
  (question,) = read_questions(TASKS["letters"], file)
  assert (question.prompt, question.answer) == ("Which?", "A")
  said = {"where": "conversations"}
  for talk, fields in (
    (turns[:2], said | {"turns": 1}),
    (turns[1:2] * 2, said | {"turn": 1}),
    ([turns[1], {"role": "assistant", "content": [{"type": "text"}]}], said | {"turn": 1}),
    ([], said | {"turns": 0}),
    ([3], {"where": "AttributeError"}),
  ):
    write(talk)
    assert refused("letters", file) == [{**fields, "file": "q.json", "questions": [0]}]


def test_letters_as_truths_of_benchmarks(benchmarks, tmp_path, capsys):
  item = json.loads((benchmarks / "mlvu" / "4_count.json").read_text())[0]
  right = "ABCD"[item["candidates"].index(item["answer"])]
  (tmp_path / item["video"]).touch()
  for answer in (right, f"({right})", f"{right}.", right.lower()):
    (tmp_path / "4_count.json").write_text(json.dumps([item | {"answer": answer}]))
    (question,) = read_questions(TASKS["mlvu"], tmp_path / "4_count.json")
    assert question.answer == right
    say_doubts(tmp_path, [question])
  assert not capsys.readouterr().err
  (tmp_path / "4_count.json").write_text(json.dumps([item, item | {"answer": "E"}]))
  say_doubts(tmp_path, read_questions(TASKS["mlvu"], tmp_path / "4_count.json"))
  said = capsys.readouterr().err
  assert said.startswith("1 of 2 questions have an answer that is none") and said.count("\n") == 1
  (tmp_path / "4_count.json").write_text(json.dumps([item | {"answer": "E"}]))
  with pytest.raises(TaskError) as caught:
    read_questions(TASKS["mlvu"], tmp_path / "4_count.json")
  assert caught.value.fields == {"where": tmp_path / "4_count.json", "found": 1}
  made = json.loads((benchmarks / "others.json").read_text())
  (tmp_path / "v.json").write_text(json.dumps([made["videomme_long"] | {"answer": "(c)"}]))
  assert read_questions(TASKS["videomme_long"], tmp_path / "v.json")[0].answer == "C"
  (tmp_path / "y_en.json").write_text(json.dumps(made["subtitles"]))

  def choose(choice):
    item = made["longvideobench"] | {"correct_choice": choice}
    (tmp_path / "l.json").write_text(json.dumps([item]))
    return tmp_path / "l.json"

  (question,) = read_questions(TASKS["longvideobench"], choose("b"), tmp_path)
  assert question.answer == "B"
  for choice in (-1, 5):
    (wrong,) = refused("longvideobench", choose(choice), tmp_path)
    assert (wrong["where"], wrong["value"], wrong["allowed"]) == ("answer", choice, "ABCDE")


def one_question(tmp_path, **about):
  """A file with a question about a video."""
  item = {"question": "Which?\n(A) red\n(B) blue", "answer": "A", **about}
  (tmp_path / "q.json").write_text(json.dumps([item]))
  return tmp_path / "q.json"


@pytest.mark.parametrize("video", [{"video": ["v.mp4"]}, {"videos": ["v.mp4"], "video": None}])
def test_videos_of_questions_may_be_lists_of_one(tmp_path, video):
  (question,) = read_questions(TASKS["letters"], one_question(tmp_path, **video))
  assert question.videos == ("v.mp4",)


@pytest.mark.parametrize(
  "video, where, value",
  [
    ({"video": ["a.mp4", "b.mp4"]}, "video", ["a.mp4", "b.mp4"]),
    ({"video": 3}, "video", [3]),
    ({"video": "v.mp4", "start": "1"}, "start", "1"),
    ({"video": "v.mp4", "end": [2]}, "end", [2]),
  ],
)
def test_videos_of_questions_are_one_file(tmp_path, video, where, value):
  (wrong,) = refused("letters", one_question(tmp_path, **video))
  assert wrong == {"where": where, "value": value, "file": "q.json", "questions": [0]}


def test_a_place_for_frames_inside_a_question_is_refused(tmp_path):
  talk = [
    {"from": "human", "value": "Look <video> here\n(A) red\n(B) blue"},
    {"from": "gpt", "value": "A"},
  ]
  (tmp_path / "q.json").write_text(json.dumps([{"video": "v.mp4", "conversations": talk}]))
  (wrong,) = refused("letters", tmp_path / "q.json")
  assert (wrong["where"], wrong["found"]) == ("conversations", "<video>")


def test_a_video_that_one_of_its_questions_lacks_is_missing(tmp_path, capsys):
  def asked(*names):
    return BenchmarkQuestion(videos=names, prompt="?", options=("a",), answer="A", groups={})

  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "v.mp4").touch()
  both = [asked("v.mp4", "a/v.mp4"), asked("v.mp4", "b/v.mp4")]
  for questions in (both, both[::-1]):
    say_doubts(tmp_path, [*questions, asked("b/v.mp4")])
    assert capsys.readouterr().err.startswith("1 of 2 videos are missing")
    with pytest.raises(FileNotFoundError):
      say_doubts(tmp_path, questions)
