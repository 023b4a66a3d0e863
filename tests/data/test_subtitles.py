"""Subtitles: read from files, and which of them are seen."""

import pytest

from xcomp_jax.data import prompt
from xcomp_jax.data.subtitles import (
  LARGEST,
  Subtitle,
  SubtitleError,
  listed_subtitles,
  read_subtitles,
  seen_subtitles,
)
from xcomp_jax.evaluation.protocol import longvideobench_prompt
from xcomp_jax.inputs import NoFileError

pytestmark = pytest.mark.pure

FILES = {
  "film.srt": "1\n00:00:01,000 --> 00:00:02,500\n<i>Hello,</i>\nyou.\n\n"
  "2\n00:01:00,000 --> 00:01:03,000\nGrüße\n",
  "film.vtt": "WEBVTT\n\nNOTE a comment\n\n00:01.000 --> 00:02.500 align:start\n<b>Hello,</b>\nyou."
  "\n\n00:01:00.000 --> 00:01:03.000\nGrüße\n",
  "film.ass": "[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\n\n[Events]\n"
  "Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
  "Dialogue: 0,0:01:00.00,0:01:03.00,Default,,0,0,0,,{\\an8}Grüße\n"
  "Comment: 0,0:00:05.00,0:00:06.00,Default,,0,0,0,,not said\n"
  "Dialogue: 0,0:00:05.00,0:00:06.00,Default,,0,0,0,,{\\p1}m 0 0 l 1 1{\\p0}\n"
  "Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\i1}Hello,{\\i0}\\Nyou.\n",
}


@pytest.fixture(scope="module")
def tokenizer(reference):
  return prompt.load_tokenizer(reference / "qwen_subset")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_kinds_of_files_say_the_same(name, mark, tmp_path):
  (tmp_path / name).write_text(mark + FILES[name], encoding="utf-8")
  assert read_subtitles(tmp_path / name) == [
    Subtitle(1.0, 2.5, "Hello, you."),
    Subtitle(60.0, 63.0, "Grüße"),
  ]


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\n\n",
    b"no subtitles at all",
    b"1\n00:00:xx --> 00:00:03\nbroken\n",
    FILES["film.srt"].encode("utf-16"),
    FILES["film.srt"].encode("latin-1"),
    b"WEBVTT\n\n00:01.000 --> 00:02.000\n\n",
    b"[Script Info]\n\n[Events]\nFormat: Start, End\nDialogue: 1\n",
    b"\x00" * 64,
    b"{10}{20}frames of no rate\n",
    b"WEBVTT\n\n00:01.000 --> 00:02.000\n" + b"{" * 2_000_000,  # searched for minutes
    b"1\n00:00:01,000 --> 00:00:02,000\n" + b"<i\n" * 2_000_000,
  ],
)
def test_what_holds_none_is_an_error_with_the_file_s_name(content, tmp_path):
  file = tmp_path / "film.srt"
  file.write_bytes(content)
  with pytest.raises(SubtitleError) as caught:
    read_subtitles(file)
  assert caught.value.fields["where"] == file


def test_large_files_and_what_is_no_file_are_refused(tmp_path):
  with open(tmp_path / "large.srt", "wb") as file:
    file.truncate(LARGEST + 1)
  with pytest.raises(SubtitleError) as caught:
    read_subtitles(tmp_path / "large.srt")
  assert caught.value.fields["allowed"] == LARGEST
  with pytest.raises(NoFileError):
    read_subtitles(tmp_path)
  with pytest.raises(FileNotFoundError):
    read_subtitles(tmp_path / "nowhere.srt")


def test_those_that_a_moment_falls_into_are_seen():
  said = [Subtitle(float(i), i + 0.5, f"line {i}") for i in range(10)]
  # widened to a second around their middles, all but the last are seen at whole seconds
  assert seen_subtitles(said, 5.0, 0.0).splitlines() == [f"line {i}" for i in range(5)]
  assert seen_subtitles(said, 3.0, 4.0).splitlines() == [f"line {i}" for i in (4, 5, 6)]
  assert seen_subtitles(said, 3.0, 40.0) == "" == seen_subtitles(said, 0.9, 0.0)
  # of a long video only those that one of 512 moments, 4 s apart, falls into
  assert seen_subtitles(said, 2048.0, 0.0).splitlines() == ["line 0", "line 4", "line 8"]


def test_they_stand_where_the_release_has_them(tokenizer):
  seen, message = "One\nTwo", prompt.time_message(12.0, 16)
  whole = longvideobench_prompt("Which?", ["this", "that"], seen)
  asked = whole.removeprefix(listed_subtitles(seen))
  assert asked.startswith("Select the best answer") and "One" not in asked
  released = prompt.question_prompt(tokenizer, whole, message)
  placed = prompt.question_prompt(tokenizer, asked, message, subtitles=seen)
  assert placed.tokens.tolist() == released.tokens.tolist()
  # the question alone scores
  (start, end), (first, last) = placed.question, released.question
  assert first < start and end == last
  assert tokenizer.decode(placed.tokens[start:end]).strip() == asked.strip()


def test_a_later_question_has_them_before_the_first_one(tokenizer):
  message, before = prompt.time_message(12.0, 16), [("What?", "That.")]
  got = prompt.question_prompt(tokenizer, "And?", message, before, "One")
  text = tokenizer.decode(got.tokens[got.tokens >= 0])
  assert text.index("listed below") < text.index("What?") < text.index("And?")
  assert text.count("listed below: \nOne.\n What?") == 1
  assert tokenizer.decode(got.tokens[slice(*got.question)]) == "And?"


def test_a_subtitle_must_not_place_the_frames(tokenizer):
  with pytest.raises(prompt.AnnotationError) as caught:
    prompt.question_prompt(tokenizer, "What?", "", subtitles="an <image> of it")
  assert caught.value.fields["where"] == "subtitles"
