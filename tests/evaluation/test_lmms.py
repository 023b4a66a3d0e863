"""lmms-eval as released, with the plugin, on generated videos (`make test-lmms`, in an environment
of its own).
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from xcomp_jax import ask, evaluate
from xcomp_jax.evaluation import lmms_tasks
from xcomp_jax.synthetic import world

CHECKPOINT = pathlib.Path(__file__).parents[2] / "assets" / "tiny"
SETTINGS = {"min_frames": 8, "max_frames": 64, "select": 16, "clips_per_chunk": 8}
OPTIONS = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
VIDEOS, QUESTIONS = 4, 4


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  """Folder with a world whose last video is damaged, task files, and the results of `evaluate`."""
  root = tmp_path_factory.mktemp("lmms")
  world.write_world(
    root / "world",
    [world.WorldSplit(name="heldout", videos=VIDEOS, fewest=3, most=5, questions=QUESTIONS)],
    seed=31,
    workers=1,
  )
  damaged = root / "world" / "heldout" / f"{VIDEOS - 1:05d}.mp4"
  damaged.write_bytes(damaged.read_bytes()[:500])
  files = [
    "--task=letters",
    f"--annotations={root / 'world' / 'heldout.json'}",
    f"--videos={root / 'world' / 'heldout'}",
  ]
  lmms_tasks.main([*files, f"--out={root / 'tasks'}"])
  evaluate.main(
    [
      *files,
      f"--out={root / 'own'}",
      f"--checkpoint={CHECKPOINT}",
      "--preset=none",
      "--max-new-tokens=16",
      *OPTIONS,
    ]
  )
  return root


def harness(root, out, processes=1, tasks="xcomp_letters", folder=None):
  """lmms-eval's command line."""
  start = [sys.executable, "-m", "lmms_eval"]
  if processes > 1:
    start = [
      sys.executable,
      "-m",
      "torch.distributed.run",
      f"--nproc-per-node={processes}",
      "--master-port=29517",
      "-m",
      "lmms_eval",
    ]
  args = ",".join(
    f"{key}={value}"
    for key, value in (
      {"checkpoint": CHECKPOINT, "out": out / "answers", "preset": "none"} | SETTINGS
    ).items()
  )
  return [
    *start,
    "--model",
    "xcomp_jax",
    "--model_args",
    args,
    "--tasks",
    tasks,
    "--include_path",
    str(folder or root / "tasks"),
    "--log_samples",
    "--output_path",
    str(out),
    "--batch_size",
    "2",
  ]


@pytest.fixture(scope="module")
def env(task):
  """The harness's environment: no network, no GPU, one JAX device."""
  more = {
    "HF_HOME": str(task / "hf"),
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_NUM_CPU_DEVICES": "1",
  }
  return os.environ | more | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}


def found(out):
  """Results and samples of the harness: (metrics, {question: answer}, lines)."""
  (file,) = out.rglob("*_results.json")
  (samples,) = out.rglob("*_samples_xcomp_letters.jsonl")
  lines = [json.loads(line) for line in samples.read_text().splitlines()]
  metrics = json.loads(file.read_text())["results"]["xcomp_letters"]
  return metrics, {line["micro"]["id"]: line["filtered_resps"] for line in lines}, lines


def test_killed_in_the_middle_and_continued_it_has_the_answers_of_evaluate_and_ask(
  task, env, tmp_path, capsys
):
  answers = tmp_path / "answers" / "xcomp_letters" / "answers-0-of-1.jsonl"

  def count():
    return answers.read_text().count('"answer"') if answers.exists() else 0

  process = subprocess.Popen(
    harness(task, tmp_path), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  while process.poll() is None and count() < 3:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait(timeout=60)
  before = count()
  assert 3 <= before < (VIDEOS - 1) * QUESTIONS and not list(tmp_path.rglob("*_results.json"))
  subprocess.run(
    harness(task, tmp_path),
    env=env,
    check=True,
    timeout=900,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  assert count() == (VIDEOS - 1) * QUESTIONS  # none was asked twice
  metrics, given, lines = found(tmp_path)
  own = json.loads((task / "own" / "results.json").read_text())
  assert (
    metrics["micro,none"] == own["score"]["micro"]
    and metrics["macro,none"] == own["score"]["macro"]
  )
  # of the damaged video, which stopped nothing
  assert own["score"]["counts"]["failed"] == QUESTIONS
  mine = [json.loads(line) for line in (task / "own" / "samples.jsonl").read_text().splitlines()]
  assert given == {line["id"]: line.get("answer", lmms_tasks.FAILED) for line in mine}
  made = json.loads((tmp_path / "answers" / "xcomp_letters" / "run.json").read_text())
  assert [(pathlib.Path(f["video"]).name, f["questions"]) for f in made["failed"]] == [
    ("00003.mp4", QUESTIONS)
  ]
  assert (
    made["made_with"]["identity"] == own["made_with"]["identity"]
    and made["made_with"]["settings"] == own["made_with"]["settings"]
  )
  assert (
    len(made["sessions"]) == 2
    and made["sessions"][1]["versions"]["jax"]
    and made["sessions"][1]["batch"] == 2
  )
  first = [line for line in lines if line["micro"]["path"] == lines[0]["micro"]["path"]]
  capsys.readouterr()
  ask.main(
    [
      "--checkpoint",
      str(CHECKPOINT),
      "--video",
      first[0]["micro"]["path"],
      "--json",
      "--max-new-tokens=16",
      *OPTIONS,
      *(f"--question={line['input']}" for line in first),
    ]
  )
  asked = [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]
  assert asked == [line["filtered_resps"] for line in first]


def test_two_processes_share_the_videos(task, env, tmp_path):
  subprocess.run(
    harness(task, tmp_path, processes=2),
    env=env,
    check=True,
    timeout=900,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  folder, mine = tmp_path / "answers" / "xcomp_letters", {}
  for share in range(2):
    lines = [
      json.loads(line) for line in (folder / f"answers-{share}-of-2.jsonl").read_text().splitlines()
    ]
    mine[share] = {line["video"] for line in lines if "key" in line}
  # no video was encoded twice
  assert len(mine[0]) == len(mine[1]) == VIDEOS // 2 and not mine[0] & mine[1]
  own = json.loads((task / "own" / "results.json").read_text())
  assert found(tmp_path)[0]["micro,none"] == own["score"]["micro"]


PICTURE = """\
task: picture
dataset_path: json
dataset_kwargs:
  data_files:
    test: {docs}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_new_tokens: 4
process_results: !function utils.scored
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
from PIL import Image


def visual(doc):
  return [Image.open(doc["file"])]


def scored(doc, results):
  return {"exact": float(results[0] == doc["answer"])}
"""


def test_a_task_of_others_with_pictures_in_memory(task, env, tmp_path, capsys):
  picture, question = (
    tmp_path / "one.png",
    "Which shape was shown?\nA. square\nB. triangle\nC. cross\nD. ring",
  )
  Image.fromarray(
    world.render(world.Scene(seed=3, colour="red", shape="ring", motion="up"))[4]
  ).save(picture)
  ask.main(
    [
      "--checkpoint",
      str(CHECKPOINT),
      "--video",
      str(picture),
      "--json",
      "--max-new-tokens=4",
      f"--question={question}",
    ]
  )
  answer = json.loads(capsys.readouterr().out)["answer"].split("\n")[0]
  docs = tmp_path / "tasks" / "docs.jsonl"
  docs.parent.mkdir()
  docs.write_text(json.dumps({"file": str(picture), "question": question, "answer": answer}) + "\n")
  (docs.parent / "utils.py").write_text(UTILS)
  (docs.parent / "picture.yaml").write_text(PICTURE.format(docs=docs))
  command = harness(task, tmp_path / "out", tasks="picture", folder=docs.parent)
  subprocess.run(
    command,
    env=env,
    check=True,
    timeout=900,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  (file,) = (tmp_path / "out").rglob("*_results.json")
  assert answer and json.loads(file.read_text())["results"]["picture"]["exact,none"] == 1.0
