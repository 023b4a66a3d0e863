"""Several videos or images in one question, and a video's subtitles."""

import logging
import pathlib

import numpy as np
import pytest

import xcomp_jax
from xcomp_jax import ask
from xcomp_jax.config import ConfigError
from xcomp_jax.data import prompt
from xcomp_jax.data.subtitles import SubtitleError
from xcomp_jax.inference.encoded_video import EncodedVideo, EncodedVideoError
from xcomp_jax.inference.several import joined_videos, moments_by_video
from xcomp_jax.model import qc_comp

TINY = pathlib.Path(__file__).parents[2] / "assets" / "tiny"
QUESTION = "Which colour?"
SRT = (
  "1\n00:00:01,000 --> 00:00:02,500\nred balloons\n\n2\n00:00:04,200 --> 00:00:05,500\ngrey mice\n"
)


@pytest.fixture(scope="module")
def model():
  return xcomp_jax.load(TINY, select=16, min_frames=8, max_new_tokens=4)


@pytest.fixture(scope="module")
def shots():
  return np.random.default_rng(0).integers(0, 256, (48, 40, 40, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def films(model, shots):
  """32 frames of 4 seconds; and 16 frames from second 4 to 6 of six."""
  times = np.arange(48) / 8
  first = model.encode(shots[:32], times=times[:32], show_progress=False)
  return [first, model.encode(shots, times=times, start=4, show_progress=False)]


@pytest.fixture(scope="module")
def images(model, shots):
  return [model.encode(shot, show_progress=False) for shot in shots[:3]]


@pytest.fixture
def srt(tmp_path):
  (tmp_path / "film.srt").write_text(SRT)
  return tmp_path / "film.srt"


def text_of(model, answer):
  tokens = answer.prompt.tokens
  return model.tokenizer.decode(tokens[tokens >= 0])


def scored_text(model, asked, cfg):
  rows = qc_comp.from_prompt(asked, cfg)
  return model.tokenizer.decode(rows.text[rows.asked]).strip()


def test_whole_clips_lie_one_behind_the_other_in_the_order_given(films):
  whole = joined_videos(films)
  assert whole.clips == 6 and whole.clip_frames == 8 and whole.parts == tuple(films)
  wanted = [clip for film in films for clip in film.features[0]]
  np.testing.assert_array_equal(np.stack(whole.features[0]), np.stack(wanted))
  np.testing.assert_array_equal(whole.thumbnails[4:], films[1].thumbnails)
  # the second one's own times begin at second 4
  np.testing.assert_allclose(whole.times, np.arange(48) / 8)
  assert whole.seconds == 6.0 == films[0].seconds + films[1].seconds
  assert films[1].times[0] == 4.0 and films[1].start == 4 and films[0].start == 0
  assert films[0].source in whole.source and films[1].source in whole.source
  turned = joined_videos(films[::-1])
  np.testing.assert_array_equal(np.stack(turned.features[0][:2]), np.stack(films[1].features[0]))
  np.testing.assert_allclose(turned.times, np.arange(48) / 8)
  assert joined_videos([whole, films[0]]).parts == (*films, films[0])
  assert joined_videos([films[0]]) is films[0] is joined_videos(films[0])


def test_frames_are_selected_among_all_videos(model, films, caplog):
  with caplog.at_level(logging.WARNING):
    answer = model.ask(films, QUESTION)
    again = model.ask(list(films), QUESTION)  # joined once, so it is said once
    assert caplog.text.count("no released checkpoint was tuned") == 1
    turned = model.ask(films[::-1], QUESTION)
  assert caplog.text.count("no released checkpoint was tuned") == 2
  assert again.video is answer.video and turned.video.parts == (films[1], films[0])
  assert answer.scores.shape == (48,) and len(answer.frames) == 16
  clips = answer.frames.reshape(-1, 8)
  np.testing.assert_array_equal(clips, clips[:, :1] // 8 * 8 + np.arange(8))  # whole ones
  said = text_of(model, answer)
  assert "lasts for 6.00 seconds, and 48 frames" in said
  # as one video of the same clips
  whole = joined_videos(films)
  alone = EncodedVideo(features=whole.features, times=whole.times, seconds=6.0)
  same = model.ask(alone, QUESTION)
  assert same.text == answer.text
  np.testing.assert_array_equal(same.scores, answer.scores)
  assert answer._repr_html_().startswith("<iframe")
  own = answer.moments_by_video
  assert len(own) == 2 and sum(map(len, own)) == len(answer.moments)
  assert same.moments_by_video == [same.moments]


def test_moments_do_not_reach_from_one_video_into_the_next(films):
  whole = joined_videos(films)
  frames = np.arange(24, 40)
  assert list(moments_by_video(whole, frames, own=True)) == [[(3.0, 4.0)], [(4.0, 5.0)]]
  assert list(moments_by_video(whole, frames, own=False)) == [[(3.0, 4.0)], [(4.0, 5.0)]]
  turned = joined_videos(films[::-1])
  frames = np.arange(8, 24)
  assert list(moments_by_video(turned, frames, own=True)) == [[(5.0, 6.0)], [(0.0, 1.0)]]
  assert list(moments_by_video(turned, frames, own=False)) == [[(1.0, 2.0)], [(2.0, 3.0)]]
  assert list(moments_by_video(turned, frames[:0], own=True)) == [[], []]


def test_images_have_no_times_and_are_selected_one_by_one(images):
  model = xcomp_jax.load(TINY, select=2, min_frames=8, max_new_tokens=4)
  whole = joined_videos(images)
  assert (whole.clips, whole.clip_frames, whole.seconds) == (3, 1, 0.0)
  np.testing.assert_array_equal(whole.times, [0, 1, 2])
  answer = model.ask(images, QUESTION)
  wanted = prompt.question_prompt(model.tokenizer, QUESTION, "")
  np.testing.assert_array_equal(answer.prompt.tokens, wanted.tokens)
  assert answer.scores.shape == (3,) and len(answer.frames) == 2
  assert answer.frames.tolist() == sorted(np.argsort(-answer.scores)[:2])
  assert answer.moments_by_video == [[(0.0, 0.0)] * (i in answer.frames) for i in range(3)]


@pytest.mark.parametrize(
  "call, kind, where",
  [
    (lambda model, films, images: model.ask([], "Why?"), EncodedVideoError, "video"),
    (lambda model, films, images: model.ask([films[0], images[0]], "?"), EncodedVideoError, None),
    (lambda model, films, images: model.chat([images[0], films[0]]), EncodedVideoError, None),
    (lambda model, films, images: joined_videos(films).save("x.npz"), EncodedVideoError, "x.npz"),
    (
      lambda model, films, images: model.ask(films, "Why?", subtitles="x.srt"),
      ConfigError,
      "subtitles",
    ),
    (lambda model, films, images: model.ask(films, "Why? " * 40_000), ConfigError, "--context"),
  ],
)
def test_what_can_t_be_asked_together_is_refused(model, films, images, call, kind, where):
  with pytest.raises(kind) as caught:
    call(model, films, images)
  assert where is None or caught.value.fields["where"] == where


def test_videos_of_several_towers_are_refused(model, films):
  other = EncodedVideo(
    features=films[0].features, times=films[0].times, seconds=4.0, identity="f00-float32"
  )
  with pytest.raises(EncodedVideoError) as caught:
    joined_videos([films[0], other])
  assert caught.value.fields["found"] == "f00-float32"


def test_clips_that_would_reach_into_the_next_video_are_refused(films):
  official = xcomp_jax.load(TINY, select=16, mode="official")
  assert official.chat(films).selector.plan is None  # the release selects from no video so short
  long = [
    EncodedVideo(features={0: np.zeros((64, 128, 32))}, times=np.arange(512.0), seconds=512.0)
  ] * 2
  with pytest.raises(ConfigError) as caught:
    official.chat(long)
  assert caught.value.fields == {"where": "--mode", "value": "official"}


def test_subtitles_stand_before_the_question_and_do_not_score(model, films, srt):
  answer = model.ask(films[0], QUESTION, subtitles=srt)
  said = text_of(model, answer)
  assert (
    f"sampled from it.  This video's subtitles are listed below: \nred balloons.\n {QUESTION}"
    in said
  )
  assert answer.question == QUESTION and len(answer.frames) == 16
  for mode in ("aligned", "local", "global"):
    cfg = qc_comp.select_config(mode, 16)
    assert scored_text(model, answer.prompt, cfg) == QUESTION
  official = scored_text(model, answer.prompt, qc_comp.select_config("official", 16))
  assert "red balloons" in official and official.endswith(QUESTION)
  plain = model.ask(films[0], QUESTION)
  assert "subtitles" not in text_of(model, plain)
  assert not np.array_equal(plain.scores, answer.scores)  # they are read


def test_subtitles_are_those_of_the_part_that_was_encoded(model, films, srt, tmp_path, caplog):
  assert model.chat(films[1], subtitles=str(srt)).subtitles == "grey mice"
  films[1].save(tmp_path / "film.npz")
  again = model.read_video(tmp_path / "film.npz")
  assert model.chat(again, subtitles=srt).subtitles == "grey mice"
  srt.write_text("1\n00:01:00,000 --> 00:01:02,000\nlate\n")
  with caplog.at_level(logging.WARNING):
    assert model.chat(films[1], subtitles=srt).subtitles == ""
  assert "none of its subtitles" in caplog.text
  srt.write_text("")
  with pytest.raises(SubtitleError):
    model.chat(films[1], subtitles=srt)


def test_a_conversation_has_them_once(model, films, srt):
  chat, plain = model.chat(films[0], subtitles=srt), model.chat(films[0])
  taken = plain.left() - chat.left()
  assert taken > 0
  for one in chat, plain:
    one.history = [(QUESTION, "red")]
  assert plain.left() - chat.left() == taken


def test_streams_keep_their_own_subtitles(model, films, srt):
  pieces = model.ask(films[0], QUESTION, subtitles=srt, stream=True)
  model.ask(films[0], QUESTION)
  assert "red balloons" in text_of(model, pieces.whole)


def test_the_command_takes_subtitles(model, shots, srt, tmp_path, capsys):
  from PIL import Image

  (tmp_path / "film").mkdir()
  for number, shot in enumerate(shots[:8]):
    Image.fromarray(shot).save(tmp_path / "film" / f"{number:03}.png")
  args = ["--checkpoint", str(TINY), "--video", str(tmp_path / "film"), "--question", QUESTION]
  args += ["--min-frames", "8", "--max-new-tokens", "1", "--subtitles"]
  with pytest.raises(SystemExit):
    ask.main([*args, str(tmp_path / "none.srt")], load=lambda reader: pytest.fail("too late"))
  asked = []

  def load(reader, mesh):
    asked.append(reader)
    raise ConfigError("enough", where="test")

  with pytest.raises(SystemExit):
    ask.main([*args, str(srt)], load=load)
  assert len(asked) == 1 and "enough" in capsys.readouterr().err
