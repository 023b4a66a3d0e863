"""Questions asked together get the answers that each gets alone (the embedded model, float32)."""

import argparse
import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from xcomp_jax.config import ConfigError
from xcomp_jax.data import video
from xcomp_jax.data.prompt import IMAGE_TOKEN, AnnotationError, Prompt, Tokenizer
from xcomp_jax.inference import encoded_video, generate
from xcomp_jax.inference.chat import SOON, Chat, prompt_of
from xcomp_jax.inference.prepared import prepare_model
from xcomp_jax.inference.selection import (
  around_frames,
  frame_selector,
  select_frames,
  selected_features,
)
from xcomp_jax.inference.settings import AskSettings, add_options, settings_of
from xcomp_jax.inference.video_model import load_prepared
from xcomp_jax.model import qc_comp
from xcomp_jax.model.vlm import VLM
from xcomp_jax.synthetic import world
from xcomp_jax.training.metrics import BACKEND_COMPILE, Compilations

TINY = pathlib.Path(__file__).parents[2] / "assets" / "tiny"
QUESTIONS = [  # of two to sixty tokens: texts of two padded lengths, when alone
  "Which digit was shown?\nA. 1\nB. 4\nC. 7\nD. 9",
  "Where did the red ring move, and what was shown before it moved there?\nA. up\nB. down\nC. "
  "left\nD. right\n" * 3,
  "Colour?",
  "Which shape was shown?\nA. square\nB. triangle\nC. cross\nD. ring",
  "What is it?",
]


@pytest.fixture(scope="module")
def reader():
  reader = prepare_model(AskSettings(checkpoint=str(TINY), select=16, clips_per_chunk=8))
  assert reader.dtype == "float32"
  return reader


@pytest.fixture(scope="module")
def model(reader):
  return load_prepared(reader).vlm


@pytest.fixture(scope="module")
def film(model):
  rng = np.random.default_rng(1)

  def drawn(*kinds):
    return {kind: str(rng.choice(world.VALUES[kind])) for kind in kinds}

  scenes = [
    world.Scene(seed=i, **drawn(*(("colour", "shape", "motion") if i % 2 else ("digit",))))
    for i in range(12)
  ]
  size = model.cfg.vision.image_size
  frames = (frame for scene in scenes for frame in video.resize(world.render(scene), size))
  return encoded_video.encode_video(model, frames, np.arange(96) / 8, 12.0, "")


@pytest.fixture
def chat(reader, model, film):
  """A function (select, **sampling) -> Chat that knows nothing yet."""

  def make(select=True, **how):
    sampling = dataclasses.replace(reader.sampling, **({"max_new_tokens": 20} | how))
    selector = frame_selector(len(film.times), film.clip_frames, reader.select if select else None)
    return Chat(model, reader.tokenizer, film, selector=selector, sampling=sampling)

  return make


def alone(make, **how):
  one = make(**how)
  out = []
  for question in QUESTIONS:
    one.forget()
    out.append(one.ask(question))
  return out


def same(together, alone):
  assert [a.text for a in together] == [a.text for a in alone]
  for a, b in zip(together, alone, strict=True):
    np.testing.assert_array_equal(a.selection.frames, b.selection.frames)
    if b.selection.scores is not None:
      np.testing.assert_allclose(a.selection.scores, b.selection.scores, rtol=1e-4)


LETTER = 34  # "C", which ends some of the answers below, while others go on to the last token


@pytest.mark.parametrize(
  "how,different",
  [
    ({"repetition_penalty": 3.0, "eos": (LETTER,)}, 4),
    pytest.param({"temperature": 2.0, "seed": 3, "eos": ()}, 3, marks=pytest.mark.slow),
    pytest.param({}, 1, marks=pytest.mark.slow),
    pytest.param({"select": False}, 1, marks=pytest.mark.slow),
  ],
)
def test_answers_of_a_batch_are_those_of_each_question_alone(chat, how, different):
  """Other lengths of questions and answers, other frames, other ends."""
  wanted = alone(chat, **how)
  assert len({a.text for a in wanted}) >= different
  if how.get("select", True):
    assert len({tuple(a.selection.frames) for a in wanted}) > 1
  same(chat(**how).ask_apart(QUESTIONS), wanted)


@pytest.mark.slow
def test_a_conversation_is_neither_seen_nor_changed(chat):
  talk = chat()
  talk.ask(QUESTIONS[0])
  same(talk.ask_apart(QUESTIONS[1:3]), alone(chat)[1:3])
  assert [question for question, _ in talk.history] == QUESTIONS[:1]


@pytest.mark.slow
def test_prompts_of_a_batch_are_filled_by_the_program_of_one(chat):
  talk = chat(max_new_tokens=9)
  talk.ask_apart(QUESTIONS[:4])
  with Compilations("prefill", "decode_tokens", "score_windows") as compilations:
    talk.ask_apart([QUESTIONS[1], QUESTIONS[0], QUESTIONS[4], QUESTIONS[2]])
    assert not any(compilations.count.values())
    talk.ask(QUESTIONS[1])
  assert compilations.count["prefill"] == 0


@pytest.mark.pure
def test_options_and_settings_are_the_same():
  parser = argparse.ArgumentParser()
  add_options(parser)
  chosen = settings_of(
    parser.parse_args([f"--checkpoint={TINY}", "--select=16", "--clips-per-chunk=8"])
  )
  assert chosen == AskSettings(checkpoint=str(TINY), select=16, clips_per_chunk=8)


@pytest.mark.pure
def test_questions_are_cut_into_few_sizes_and_none_is_asked_twice():
  for n in range(1, 40):
    for size in (1, 4, 5, 8):
      parts = list(generate.batches(range(n), size))
      assert [i for part in parts for i in part] == list(range(n))
      assert all(len(part) == size or len(part) in (1, 2, 4) for part in parts)
  assert [len(part) for part in generate.batches("abcdefghijk", 8)] == [8, 2, 1]


TEXT = "What is it that was to be seen there, at the beginning and at the end of it all? "


@pytest.fixture
def talk(model, reader, film):
  """A function (tokens) -> Chat of two layers: room for 700 tokens of text at first, and in the
  context for so many.
  """
  cfg = dataclasses.replace(model.cfg, llm=dataclasses.replace(model.cfg.llm, layers=2))
  answer = 8
  sampling = dataclasses.replace(reader.sampling, max_new_tokens=answer, eos=())

  def make(tokens, text=700, **more):
    frames = film.clip_frames * 2 * cfg.tokens_per_frame
    llm = dataclasses.replace(cfg.llm, context=tokens + frames + answer)
    small = VLM(dataclasses.replace(cfg, llm=llm), rngs=nnx.Rngs(0))
    select = qc_comp.select_config("local", 16)
    selector = frame_selector(
      len(film.times), film.clip_frames, dataclasses.replace(select, window=16, stride=16)
    )
    return Chat(
      small, reader.tokenizer, film, selector=selector, sampling=sampling, text=text, **more
    )

  return make


def test_a_text_that_just_fills_its_room_is_padded_no_further(talk):
  def asked(one, text):
    return prompt_of(one.model.cfg, one.tokenizer, text, one.video.seconds, one.selector, 8)

  room = len(around_frames(asked(talk(1300), TEXT * 4))[1])
  one = talk(1300, text=room, talk=True)
  with Compilations("score_windows", "prefill", "decode_tokens") as compilations:
    one.ask(TEXT * 4)
    first = dict(compilations.count)
    one.forget()
    one.ask(TEXT)  # by the same programs
  assert all(first.values()) and compilations.count == first


def test_a_letter_is_written_when_its_last_token_is_there(talk):
  class Halved(Tokenizer):
    """Decodes as if the eighth token began a letter that the ninth ends."""

    def decode(self, ids, **_):
      return "caf\ufffd" if len(ids) <= 8 else "café au lait"

  one, pieces = talk(1300), []
  one.tokenizer = Halved(one.tokenizer.core, "test")
  one.sampling = dataclasses.replace(one.sampling, max_new_tokens=16)
  assert one.ask(TEXT, write=pieces.append).text == "".join(pieces) == "café au lait"


def test_the_slot_of_the_frames_is_no_token_of_the_vocabulary():
  tokens = np.array([0, 5, IMAGE_TOKEN, 0, 7], np.int32)
  asked = Prompt(tokens=tokens, labels=tokens, query=tokens > 0, question=(0, 2))
  assert [part.tolist() for part in around_frames(asked)] == [[0, 5], [0, 7]]


def answered_alone(one, before, question):
  """What a chat answers after others, by programs for just this text, in one piece."""
  model, selector, sampling = one.model, one.selector.without_bias(), one.sampling
  asked = prompt_of(
    model.cfg, one.tokenizer, question, one.video.seconds, selector, sampling.max_new_tokens, before
  )
  (kept,) = select_frames(model, one.video, [asked], selector)
  visual = selected_features(model, one.video, kept.frames)
  batch = generate.as_batch(asked, visual, one.video.clip_frames)
  room = sampling.max_new_tokens
  state = jax.jit(generate.prefill, static_argnames="room")(model, batch, room=room)
  decode = jax.jit(generate.decode_tokens, static_argnames="steps")
  tokens, _ = decode(model, state, generate.stack_sampling([sampling]), steps=room)
  return one.tokenizer.decode(np.asarray(tokens)[0]).strip()


def test_a_conversation_compiles_few_programs_up_to_the_end_of_its_context(talk):
  one, compiled, said, lengths = talk(1300), [], [], []

  def listen(event, seconds, **about):
    return compiled.append(about["fun_name"]) if event == BACKEND_COMPILE else None

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for _ in range(2):
      one.ask(TEXT)
    assert one.ending() == ""
    second = len(compiled)
    with pytest.raises(ConfigError) as caught:
      while len(lengths) < 40:
        lengths.append(len(one.ask(TEXT * 2).prompt.tokens))
        said.append(one.ending())
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  fields = caught.value.fields
  assert (fields["where"], fields["turns"]) == ("--context", len(one.history))
  assert fields["needed"] > fields["value"] == one.model.cfg.llm.context
  assert fields["advice"] == "keep fewer frames (--select)"
  later = [name.removeprefix("jit(").removesuffix(")") for name in compiled[second:]]
  assert (
    sorted(later) == ["decode_tokens", "prefill", "score_windows"]
    and lengths[0] < 700 < lengths[-1]
  )
  first = next(i for i, text in enumerate(said) if text)
  assert 3 <= len(said) - first <= 2 * SOON and all(said[first:])
  assert (
    f"holds {one.left():,} more tokens" in said[-1]
    and one.left() < len(one.tokenizer.encode(TEXT * 2)) + 40
  )
  # Nothing is lost by the refusal, and what the programs for long texts answer is what one for just
  # this text does.
  *_, (question, answer) = one.history
  assert answered_alone(one, one.history[:-1], question) == answer
  one.forget()
  assert one.ending() == "" and one.left() > 1000


def test_what_can_not_be_asked_is_named_before_the_others_are_run(chat):
  with pytest.raises(ConfigError) as caught:
    chat().check("word " * 100_000)
  assert (caught.value.fields["where"], caught.value.fields["turns"]) == ("--context", 0)
  with pytest.raises(AnnotationError):
    chat().check("  ")
  assert chat().check(QUESTIONS[2]) is None
