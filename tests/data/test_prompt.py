"""Prompts against the official ids and labels, and every annotation that must be refused.

reference/qwen_subset is Qwen2's tokenizer with only those merges that these texts use, under their
real ids.
"""

import json
import os
import re
import shutil

import numpy as np
import pytest
from refused import refused

from xcomp_jax import inputs
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import IGNORE, IMAGE_TOKEN

pytestmark = pytest.mark.pure

MESSAGE = prompt.time_message(123.45, 128)


@pytest.fixture(scope="module")
def tokenizer(reference):
  return prompt.load_tokenizer(reference / "qwen_subset")


@pytest.fixture(scope="module")
def cases(reference):
  return json.loads((reference / "tokenization.json").read_text())


def turns(*texts):
  return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def text_of(tokenizer, got):
  return tokenizer.core.decode([int(i) for i in got.tokens if i >= 0], skip_special_tokens=False)


def own_question(tokenizer, got):
  return tokenizer.decode(got.tokens[slice(*got.question)])


def test_ids_of_the_special_tokens(tokenizer):
  assert (tokenizer.im_start, tokenizer.im_end, tokenizer.pad, tokenizer.newline) == (
    151644,
    151645,
    151643,
    198,
  )
  assert tokenizer.eos == (151645, 151643) and tokenizer.vocab_size == 151665


def test_training_ids_and_labels_equal_the_official_ones_q15_q16(tokenizer, cases):
  cases = [case for case in cases if case["kind"] == "train"]
  assert len(cases) == 2
  for case in cases:
    assert case["time_msg"] == MESSAGE
    got = prompt.training_prompt(tokenizer, case["conversation"], case["time_msg"], mask="official")
    assert got.tokens.tolist() == case["input_ids"] and got.tokens.dtype == np.int32
    assert got.labels.tolist() == case["labels"] and got.labels.dtype == np.int32


def test_asking_ids_equal_the_official_ones_without_the_newline_of_training_q15(tokenizer, cases):
  cases = [case for case in cases if case["kind"] == "eval"]
  assert len(cases) == 2
  for case in cases:
    got = prompt.question_prompt(tokenizer, case["question"], case["time_msg"])
    assert got.tokens.tolist() == case["input_ids"]
    assert (got.labels == IGNORE).all()
    assert np.flatnonzero(got.query).tolist() == [len(got.tokens) - 1]


def test_the_assistant_mask_supervises_answers_and_their_ends_only(tokenizer, cases):
  got = prompt.training_prompt(tokenizer, cases[0]["conversation"], MESSAGE, mask="assistant")
  answers = tokenizer.encode("A dog runs.<|im_end|>") + tokenizer.encode(
    "It sleeps.\nThe end.<|im_end|>"
  )
  assert got.labels[got.labels != IGNORE].tolist() == answers
  supervised = np.flatnonzero(got.labels != IGNORE)
  assert (got.tokens[supervised] == got.labels[supervised]).all()
  assert (np.diff(supervised) != 1).sum() == 1, "two runs, one for each answer"


@pytest.mark.parametrize("mask", ["official", "assistant"])
def test_query_marks_the_newline_before_each_answer(tokenizer, cases, mask):
  got = prompt.training_prompt(tokenizer, cases[0]["conversation"], MESSAGE, mask=mask)
  rows = np.flatnonzero(got.query)
  assert [tokenizer.decode([got.tokens[i + 1]]) for i in rows] == ["A", "It"]
  assert got.tokens[rows].tolist() == [tokenizer.newline] * 2


def test_question_is_the_last_question_without_the_time_message(tokenizer, cases):
  def train(case):
    return own_question(
      tokenizer, prompt.training_prompt(tokenizer, case["conversation"], MESSAGE, mask="official")
    )

  assert [train(case) for case in cases[:2]] == ["And then?", "Describe the video."]
  for case in cases[2:]:
    got = prompt.question_prompt(tokenizer, case["question"], MESSAGE)
    assert own_question(tokenizer, got) == " " + case["question"]
    assert got.tokens[got.question[1]] == tokenizer.im_end
  got = prompt.question_prompt(tokenizer, "And then?", MESSAGE, [("Who is speaking?", "A dog.")])
  assert own_question(tokenizer, got) == "And then?"
  got = prompt.training_prompt(tokenizer, turns("<image>", "A dog."), MESSAGE, mask="official")
  assert own_question(tokenizer, got) == "" and got.tokens[got.question[0]] == tokenizer.im_end


def test_history_puts_the_frames_into_the_first_question(tokenizer):
  got = prompt.question_prompt(tokenizer, "And then?", MESSAGE, [("Who is speaking?", "A dog.")])
  assert text_of(tokenizer, got) == (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n\n{MESSAGE.strip()} Who is speaking?<|im_end|>\n"
    "<|im_start|>assistant\nA dog.<|im_end|>\n"
    "<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
  )
  assert (got.tokens == IMAGE_TOKEN).sum() == 1 and np.flatnonzero(got.query).tolist() == [
    len(got.tokens) - 1
  ]


def test_a_still_image_has_no_time_message(tokenizer):
  asked = prompt.question_prompt(tokenizer, "What happens?", "")
  trained = prompt.training_prompt(
    tokenizer, turns("What happens?<image>", "A dog."), "", mask="assistant"
  )
  user = "<|im_start|>user\n\nWhat happens?<|im_end|>\n"
  for got in (asked, trained):
    assert user in text_of(tokenizer, got)
    slot = got.tokens.tolist().index(IMAGE_TOKEN)
    assert got.tokens[slot - 1] == got.tokens[slot + 1] == tokenizer.newline
    assert own_question(tokenizer, got) == "What happens?"


def test_text_alone_has_no_visual_slot(tokenizer):
  asked = prompt.question_prompt(tokenizer, "What happens?", None)
  trained = prompt.training_prompt(
    tokenizer, turns("What happens?", "A dog."), None, mask="official"
  )
  for got in (asked, trained):
    assert IMAGE_TOKEN not in got.tokens
    assert "<|im_start|>user\nWhat happens?<|im_end|>" in text_of(tokenizer, got)
  assert trained.tokens[: len(asked.tokens)].tolist() == asked.tokens.tolist()


@pytest.mark.parametrize("answer", ["", " And", "\nAnd", "\n\n And"])
def test_answers_of_odd_shape_keep_mask_and_query_together(tokenizer, answer):
  got = prompt.training_prompt(tokenizer, turns("What?", answer), None, mask="assistant")
  (row,) = np.flatnonzero(got.query)
  supervised = np.flatnonzero(got.labels != IGNORE)
  assert supervised[0] == row + 1 and got.tokens[supervised[-1]] == tokenizer.im_end
  assert tokenizer.decode(got.tokens[row + 1 :]).strip() == answer.strip()


def test_decoding_gives_back_any_text(tokenizer):
  for text in ("Hello, world! It's 12:30.", "多模态 視頻", "👩‍👩‍👧 naïve\t x\n\n  y"):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert (
    tokenizer.decode(
      [tokenizer.im_start, *tokenizer.encode("A dog"), tokenizer.im_end, tokenizer.pad]
    )
    == "A dog"
  )


def test_a_tokenizer_json_is_the_same_tokenizer(tokenizer, cases, tmp_path):
  tokenizer.core.save(str(tmp_path / "tokenizer.json"))
  got = prompt.question_prompt(prompt.load_tokenizer(tmp_path), cases[2]["question"], MESSAGE)
  assert got.tokens.tolist() == cases[2]["input_ids"]


def test_a_small_vocabulary_has_its_own_ids(reference, tmp_path, cases):
  """Nothing relies on the ids of the release: the same text comes back under other numbers."""
  source = reference / "qwen_subset"
  shutil.copy(source / "merges.txt", tmp_path)
  vocab = {
    token: i for i, token in enumerate(reversed(json.loads((source / "vocab.json").read_text())))
  }
  (tmp_path / "vocab.json").write_text(json.dumps(vocab))
  config = json.loads((source / "tokenizer_config.json").read_text())
  added = list(config["added_tokens_decoder"].values())[:3]
  config["added_tokens_decoder"] = {str(len(vocab) + i): token for i, token in enumerate(added)}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  big, small = prompt.load_tokenizer(source), prompt.load_tokenizer(tmp_path)
  assert small.vocab_size == len(vocab) + 3 and small.newline == vocab["Ċ"] != big.newline
  a, b = (
    prompt.training_prompt(t, cases[0]["conversation"], MESSAGE, mask="official")
    for t in (big, small)
  )

  def name(t, ids):
    return [t.core.id_to_token(int(i)) for i in ids if i != IMAGE_TOKEN]

  assert name(big, a.tokens) == name(small, b.tokens)
  np.testing.assert_array_equal(a.labels == IGNORE, b.labels == IGNORE)


@pytest.mark.parametrize(
  "conversations,message,error",
  [
    (None, MESSAGE, "needs conversations"),
    ([], MESSAGE, "needs conversations"),
    ("<image>\nWhat?", MESSAGE, "needs conversations"),
    ([{"from": "human"}], MESSAGE, "turn 0 must be"),
    ([{"from": "human", "value": 3}], MESSAGE, "turn 0 must be"),
    (
      [{"from": "user", "value": "<image> Where?"}],
      MESSAGE,
      "turn 0 is from 'user'; known: human, gpt: '<image> Where",
    ),
    (turns("<image>", "b")[::-1], MESSAGE, "human and gpt must alternate, human first: 'b'"),
    (turns("<image> a", "b", "Why?"), MESSAGE, "without an answer: 'Why?'"),
    (
      turns("<image> a <image>", "b"),
      MESSAGE,
      "2 <image> in a conversation that needs 1, .*'<image> a <image> / b'",
    ),
    (
      turns("<image> a", "b", "<image> c", "d"),
      MESSAGE,
      "2 <image> .*'<image> a / b / <image> c / d'",
    ),
    (turns("a", "b"), MESSAGE, "0 <image> in a conversation that needs 1, .*'a / b'"),
    (
      turns("a", "<image> b"),
      MESSAGE,
      "1 <image> in a conversation that needs 1, in a question: 'a / <image> b'",
    ),
    (turns("<image> a", "b"), None, "1 <image> in a conversation that needs 0"),
  ],
)
def test_annotations_that_cannot_be_used_are_quoted(tokenizer, conversations, message, error):
  with pytest.raises(prompt.AnnotationError, match=error.replace("?", r"\?")):
    prompt.training_prompt(tokenizer, conversations, message, mask="official")


def test_questions_that_cannot_be_asked_are_quoted(tokenizer):
  with refused(prompt.AnnotationError, where="question", missing=True):
    prompt.question_prompt(tokenizer, " \n", MESSAGE)
  with refused(prompt.AnnotationError, where="question", value="What <image>"):
    prompt.question_prompt(tokenizer, "What <image>", MESSAGE)
  with refused(prompt.AnnotationError, where="history", value="a<image>"):
    prompt.question_prompt(tokenizer, "What?", MESSAGE, [("Why?", "a<image>")])


def test_a_directory_without_a_tokenizer_names_what_is_missing(reference, tmp_path):
  names = ["vocab.json", "merges.txt", "tokenizer_config.json"]
  with refused(prompt.NoTokenizerError, where=tmp_path, missing=names):
    prompt.load_tokenizer(tmp_path)
  for name in ("vocab.json", "merges.txt"):
    shutil.copy(reference / "qwen_subset" / name, tmp_path)
  with refused(prompt.NoTokenizerError, where=tmp_path, missing=["tokenizer_config.json"]):
    prompt.load_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
  missing = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
  with refused(prompt.TokenizerError, where=str(tmp_path), missing=missing):
    prompt.load_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON"):
    prompt.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"{}", b'{"model": 5}'])
def test_a_damaged_tokenizer_is_one_error_with_its_name(tmp_path, content):
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(prompt.TokenizerError) as caught:
    prompt.load_tokenizer(tmp_path)
  assert re.search(r"tokenizer\.json( is no tokenizer: |, line 1: byte 0xff)", str(caught.value))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_a_tokenizer_is_never_read_from_a_pipe(reference, tmp_path, name):
  shutil.copytree(reference / "qwen_subset", tmp_path / "t")
  (tmp_path / "t" / name).unlink(missing_ok=True)
  os.mkfifo(tmp_path / "t" / name)
  with pytest.raises(inputs.NoFileError) as caught:
    prompt.load_tokenizer(tmp_path / "t")
  assert name in str(caught.value)
