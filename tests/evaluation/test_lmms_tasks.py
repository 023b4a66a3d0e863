"""Task files for lmms-eval, without lmms-eval."""

import json

import pytest
import yaml

from xcomp_jax.evaluation import benchmarks, lmms_tasks
from xcomp_jax.evaluation.benchmarks import TASKS


class Loader(yaml.SafeLoader):
  """Reads `!function` as text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.fixture
def written(reference, tmp_path):
  """The YAML's values, and the documents, of 50 real questions of MLVU."""
  (tmp_path / "videos").mkdir()
  source = reference / "benchmarks" / "mlvu"
  for question in benchmarks.read_questions(TASKS["mlvu"], source)[:10]:
    (tmp_path / "videos" / question.videos[1]).touch()
  lmms_tasks.main(
    [
      "--task=mlvu",
      f"--annotations={source}",
      f"--videos={tmp_path / 'videos'}",
      f"--out={tmp_path / 'out'}",
    ]
  )
  values = yaml.load((tmp_path / "out" / "xcomp_mlvu.yaml").read_text(), Loader)
  return values, [
    json.loads(line) for line in (tmp_path / "out" / "mlvu.jsonl").read_text().splitlines()
  ]


@pytest.mark.pure
def test_documents_are_the_questions_and_scores_those_of_evaluate(reference, written, tmp_path):
  _, docs = written
  questions = benchmarks.read_questions(TASKS["mlvu"], reference / "benchmarks" / "mlvu")
  assert [lmms_tasks.text(doc) for doc in docs] == [q.prompt for q in questions]
  assert lmms_tasks.visual(docs[0]) == [str(tmp_path / "videos" / questions[0].videos[1])]
  assert lmms_tasks.visual(docs[0] | {"start": 1.5, "end": 3.0})[1] == {"start": 1.5, "end": 3.0}
  answers = [["A", "(B)", "", lmms_tasks.FAILED, "C. x"][i % 5] for i in range(50)]
  lines = [lmms_tasks.scored(doc, [answer]) for doc, answer in zip(docs, answers, strict=True)]
  wanted = benchmarks.score_answers(
    TASKS["mlvu"], zip(questions, [None if a == lmms_tasks.FAILED else a for a in answers])
  )
  assert lmms_tasks.micro([line["micro"] for line in lines]) == wanted["micro"] > 0
  assert lmms_tasks.macro([line["macro"] for line in lines]) == wanted["macro"] > 0
  assert wanted["counts"]["failed"] == wanted["counts"]["empty"] == 10


@pytest.mark.pure
def test_the_yaml_names_functions_that_are_there(written):
  values, docs = written
  names = [values[key] for key in ("doc_to_visual", "doc_to_text", "process_results")]
  names += [metric["aggregation"] for metric in values["metric_list"]]
  assert all(
    callable(getattr(lmms_tasks, name.removeprefix("xcomp_jax.lmms_tasks."))) for name in names
  )
  assert (
    values["task"] == "xcomp_mlvu"
    and values["generation_kwargs"]["max_new_tokens"] == 16
    and len(docs) == 50
  )


@pytest.mark.pure
def test_no_letter_stands_alone_in_what_is_said_of_a_video_that_failed():
  for task in TASKS.values():
    assert task.letter(lmms_tasks.FAILED, ["x"] * 5) not in tuple("ABCDE")
