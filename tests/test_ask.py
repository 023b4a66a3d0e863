"""Asking a video from the command line."""

import pathlib

import cv2
import numpy as np
import pytest
from flax import nnx

from xcomp_jax import ask, weights
from xcomp_jax.config import ModelConfig
from xcomp_jax.data import prompt, video
from xcomp_jax.model import vlm


@pytest.fixture(scope="module")
def checkpoint(tiny_run, tmp_path_factory):
  return pathlib.Path(tiny_run(tmp_path_factory.mktemp("ask")).init_from)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
  path = tmp_path_factory.mktemp("film") / "film.mp4"
  writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 64))
  rng = np.random.default_rng(0)
  for _ in range(12):
    writer.write(cv2.resize(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8), (64, 64)))
  writer.release()
  return path


def run(checkpoint, film, *more):
  ask.main([
    "--checkpoint", str(checkpoint), "--video", str(film), "--question", "Which?", "--clip-frames=4", "--min-frames=8",
    "--max-frames=8", "--max-new-tokens=3", *more,
  ])  # fmt: skip


def test_the_answer_is_the_greedy_continuation_of_the_prompt(checkpoint, film, capsys):
  run(checkpoint, film)
  printed = capsys.readouterr()
  assert "8 frames of 1.50 s" in printed.err
  tuned = weights.read_lp_comp(checkpoint)
  cfg = weights.read_config(checkpoint, ModelConfig(4, "float32", "float32", 4, "einsum", remat=False), tuned)
  frames = video.load(film, size=48, max_frames=8, min_frames=8, fps=8, clip_frames=4, style="ask").frames
  tokenizer, model = prompt.load_tokenizer(checkpoint), weights.load(checkpoint, cfg)
  question, tokens = prompt.ask(tokenizer, "Which?", prompt.time_message(1.5, 8)), []
  forward = nnx.jit(lambda model, batch: model.llm.logits(vlm.forward(model, batch).x))
  while len(tokens) < 3:
    longer = prompt.Prompt(
      np.append(question.tokens, np.array(tokens, np.int32)), *(np.zeros(len(question.tokens) + len(tokens), t) for t in (np.int32, bool)),
      question=question.question,
    )  # fmt: skip
    batch = ask.as_batch(longer, frames, 4)
    row = int(batch.text_length[0]) - 1 - batch.text.shape[1]
    tokens.append(int(forward(model, batch)[0, row].argmax()))
    if tokens[-1] in tokenizer.eos:
      tokens.pop()
      break
  assert printed.out.strip() == tokenizer.decode(tokens).strip()


def test_an_image_is_asked_without_a_time_message(checkpoint, tmp_path, capsys):
  cv2.imwrite(str(tmp_path / "still.png"), np.zeros((20, 30, 3), np.uint8))
  run(checkpoint, tmp_path / "still.png")
  assert "1 frames" in capsys.readouterr().err


@pytest.mark.parametrize(
  "change,words",
  [
    (["--video", "nowhere.mp4"], "nowhere.mp4 does not exist"),
    (["--checkpoint", "nowhere"], "nowhere"),
    (["--question", " "], "question is empty"),
    (["--start", "5"], "1.5"),
  ],
)
def test_bad_arguments_end_in_one_line(checkpoint, film, capsys, change, words):
  with pytest.raises(SystemExit) as stop:
    run(checkpoint, film, *change)
  printed = capsys.readouterr()
  assert stop.value.code == 1 and not printed.out
  assert printed.err.startswith("error: ") and words in printed.err
