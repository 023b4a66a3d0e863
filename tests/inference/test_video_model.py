"""The Python API: `xcomp_jax.load`, and what its model does."""

import doctest
import io
import pathlib
import re
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

import xcomp_jax
from xcomp_jax.config import ConfigError
from xcomp_jax.data.video import VideoError
from xcomp_jax.inference import places, settings, video_model

ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny"
BLACK = np.zeros((8, 8, 3), np.uint8)
OTHER = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
QUESTIONS = [
  "Which colour?",
  "Which shape was shown?\nA. square\nB. ring",
  "What moves, and where?",
]


@pytest.fixture(scope="module")
def model():
  return xcomp_jax.load(TINY, select=16, min_frames=8, max_new_tokens=6)


@pytest.fixture(scope="module")
def shots():
  """uint8[48, 60, 80, 3], a scene of a colour of its own every 8 frames."""
  rng = np.random.default_rng(0)
  return np.repeat(rng.integers(0, 256, (6, 1, 1, 3)), 8, 0).astype(np.uint8) + np.zeros(
    (48, 60, 80, 3), np.uint8
  )


@pytest.fixture(scope="module")
def film(model, shots):
  return model.encode(shots, times=np.arange(48) / 8, show_progress=False)


def test_docstrings_hold(model):
  found = doctest.DocTestFinder().find(
    video_model, globs={"np": np, "tiny": TINY, "load": video_model.load}
  )
  examples = [test for test in found if test.examples]
  assert [test.name.rpartition(".")[2] for test in examples] == ["ask", "encode", "load"]
  shared = {}
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  # as one who reads the page: load, encode, ask
  for test in sorted(
    examples, key=lambda test: ("load", "encode", "ask").index(test.name.rpartition(".")[2])
  ):
    test.globs |= shared
    runner.run(test, clear_globs=False)
    shared |= test.globs
  assert runner.failures == 0 and runner.tries == 6


@pytest.mark.parametrize("page", ["README.md", "docs/start.md", "docs/reference/index.md"])
def test_the_python_of_pages_runs(page, shots, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for file in ("film.mp4", "world/heldout/00000.mp4"):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 64))
    for shot in shots:
      writer.write(cv2.resize(shot, (64, 64)))
    writer.release()
  for folder in ("exports/sct", "assets/tiny"):
    (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / folder).symlink_to(TINY)
  blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
  assert blocks
  for block in blocks:
    exec(block, {})
  assert capsys.readouterr().out.strip()


def test_an_answer_says_where_it_looked(model, film):
  answer = model.ask(film, QUESTIONS[1])
  assert str(answer) == answer.text and answer.question == QUESTIONS[1]
  assert len(answer.frames) == 16 and answer.scores.shape == (48,)
  for first, last in answer.moments:
    assert 0 <= first < last <= 6.0
  inside = [any(a <= t < b for a, b in answer.moments) for t in film.times]
  np.testing.assert_array_equal(np.flatnonzero(inside), answer.frames)
  assert {"scoring", "generation"} <= set(answer.spent) and set(film.spent) == {"decoding", "tower"}


def test_several_questions_have_the_answers_of_each_alone(model, film):
  together = model.ask(film, QUESTIONS)
  for question, answer in zip(QUESTIONS, together, strict=True):
    alone = model.ask(film, question)
    assert (alone.text, answer.question) == (answer.text, question)
    np.testing.assert_array_equal(alone.frames, answer.frames)
    np.testing.assert_allclose(alone.scores, answer.scores, rtol=1e-4)


def test_an_answer_comes_in_pieces_and_can_be_left(model, film):
  pieces = model.ask(film, QUESTIONS[0], stream=True, max_new_tokens=24)
  first, *more = list(pieces)
  assert first + "".join(more) == pieces.whole.text
  texts = ["", "", ""]
  several = model.ask(film, QUESTIONS, stream=True, max_new_tokens=24)
  for number, text in several:
    texts[number] += text
  assert texts == [answer.text for answer in several.whole]
  left = model.ask(film, QUESTIONS[0], stream=True, max_new_tokens=24)
  for _ in left:
    break
  with pytest.raises(ConfigError) as caught:
    _ = left.whole
  assert caught.value.fields["where"] == "stream"


def test_what_computes_is_left_between_two_pieces(model, film):
  before = jax.config.jax_default_matmul_precision
  for _ in model.ask(film, QUESTIONS[0], stream=True, max_new_tokens=24):
    assert jax.config.jax_default_matmul_precision == before


def test_every_question_may_have_its_own_settings(model, film):
  drawn = model.ask(
    film, QUESTIONS, temperature=[0.0, 2.0, 2.0], seed=[0, 1, 2], max_new_tokens=[1, 6, 3]
  )
  assert drawn[0].text == model.ask(film, QUESTIONS[0], max_new_tokens=1).text
  assert drawn[1].text == model.ask(film, QUESTIONS[1], temperature=2.0, seed=1).text


def test_a_conversation_sees_what_came_before(model, film):
  chat = model.chat(film)
  chat.ask(QUESTIONS[0])
  again = chat.ask(QUESTIONS[0])
  assert len(chat.history) == 2 and len(again.prompt.tokens) > len(
    model.ask(film, QUESTIONS[0]).prompt.tokens
  )


def test_videos_come_in_many_forms(model, shots, tmp_path):
  folder = tmp_path / "frames"
  folder.mkdir()
  for number, shot in enumerate(shots):
    Image.fromarray(shot).save(folder / f"{number:03}.png")
  wanted = model.encode(folder, show_progress=False)
  seconds = np.arange(48.0)
  forms = {
    "text": str(folder),
    "array": shots,
    "list": list(shots),
    "images": [Image.fromarray(shot) for shot in shots],
    "pairs": zip(seconds, shots),
    "iterator": iter(shots),
  }
  for name, form in forms.items():
    video = model.encode(form, show_progress=False)
    np.testing.assert_array_equal(video.times, wanted.times, name)
    np.testing.assert_allclose(video.features[0], wanted.features[0], err_msg=name)
  timed = model.encode(shots, times=seconds / 8, start=1, end=3, show_progress=False)
  assert timed.times[0] == 1.0 and timed.times[-1] < 3.0


def test_a_video_is_asked_where_the_model_is(model, film):
  there = model.on(jax.devices()[3])
  assert there.ask(film, QUESTIONS[0]).text == model.ask(film, QUESTIONS[0]).text
  moved = there.encode(BLACK[None].repeat(8, 0), show_progress=False)
  assert there.ask([film, moved], QUESTIONS[0]).text  # of two devices


def test_sixteen_bits_are_the_upper_eight(model):
  grey = np.arange(64 * 64).reshape(64, 64).astype(np.uint16) % 256
  deep = model.encode([Image.fromarray(grey * 256)], show_progress=False)
  plain = model.encode([Image.fromarray(grey.astype(np.uint8))], show_progress=False)
  np.testing.assert_array_equal(deep.thumbnails, plain.thumbnails)


def test_bytes_are_a_file(model, shots):
  out = io.BytesIO()
  Image.fromarray(shots[0]).save(out, "PNG")
  image = model.encode(out.getvalue(), show_progress=False)
  assert len(image.times) == 1 and image.seconds == 0
  np.testing.assert_array_equal(
    image.features[0], model.encode(shots[0], show_progress=False).features[0]
  )


def test_a_video_is_saved_and_belongs_to_its_tower(model, film, tmp_path):
  film.save(tmp_path / "film.npz")
  again = model.read_video(tmp_path / "film.npz")
  assert again.identity == film.identity == model.identity and again.source == film.source
  assert model.ask(again, QUESTIONS[0]).text == model.ask(film, QUESTIONS[0]).text
  other = xcomp_jax.load(TINY, clip_frames="4", dtype="float32")
  with pytest.raises(xcomp_jax.XCompError) as caught:
    other.ask(film, QUESTIONS[0])
  assert caught.value.fields["found"] == film.identity


def devices_of(model):
  return {device for leaf in jax.tree.leaves(model.vlm) for device in leaf.devices()}


def test_parameters_lie_where_they_are_wanted(model):
  third = jax.devices()[3]
  assert devices_of(xcomp_jax.load(TINY, device=third)) == {third}
  with jax.default_device(third):
    assert devices_of(xcomp_jax.load(TINY)) == {third}
  with places.computing(model.on(third).vlm):
    assert jax.extend.backend.get_default_device() == third
  assert devices_of(model.on(third)) == {third} and model.on(third).identity == model.identity
  for bad in (
    {"device": third, "mesh": xcomp_jax.local_mesh()},
    {"mesh": xcomp_jax.local_mesh(tensor=8)},
  ):
    with pytest.raises(ConfigError):
      xcomp_jax.load(TINY, **bad)


@pytest.mark.slow
def test_a_mesh_answers_as_one_device_does(model, film, shots):
  spread = xcomp_jax.load(
    TINY, select=16, min_frames=8, max_new_tokens=6, mesh=xcomp_jax.local_mesh(fsdp=2)
  )
  assert len(devices_of(spread)) == 8
  there = spread.encode(shots, times=np.arange(48) / 8, show_progress=False)
  for ours, theirs in zip(there.features[0], film.features[0], strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  for one, alone in zip(spread.ask(there, QUESTIONS), model.ask(film, QUESTIONS), strict=True):
    assert one.text == alone.text
    np.testing.assert_array_equal(one.frames, alone.frames)
    np.testing.assert_allclose(one.scores, alone.scores, atol=1e-5)


def test_a_notebook_sees_it(model, film):
  assert film._repr_html_().startswith("<iframe") and "48 frames" in repr(film)
  answer = model.ask(film, QUESTIONS[1])
  assert "Which shape was shown?" in answer._repr_html_()
  figure = answer.show()
  assert len(figure.axes) == 3  # the curve, and two clips


def test_nothing_is_compiled_after_warming_up(shots):
  model = xcomp_jax.load(TINY, select=16, min_frames=8, max_new_tokens=6)
  model.warm_up(frames=48, questions=2, text=16)
  rng, compiled = np.random.default_rng(0), []

  def count(event, _, **more):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(more.get("fun_name"))

  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    film = model.encode(shots, times=np.arange(48) / 8, show_progress=False)
    for _ in range(8):
      some = ["Who? " * int(n) for n in rng.integers(1, 4, rng.integers(1, 3))]
      how = {"temperature": float(rng.uniform(0, 2)), "top_p": float(rng.uniform(0.1, 1))}
      model.ask(film, some, seed=int(rng.integers(99)), top_k=int(rng.integers(9)), **how)
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
  assert not compiled


@pytest.mark.parametrize(
  "call, kind, where",
  [
    (lambda model, film: model.ask(film, ""), ValueError, None),
    (lambda model, film: model.ask(film, "Why?", temperature=-1.0), ConfigError, "--temperature"),
    (lambda model, film: model.ask(film, ["a", "b"], seed=[1]), ConfigError, "seed"),
    (lambda model, film: model.ask(film, "Why?", heat=1.0), ConfigError, "heat"),
    (lambda model, film: model.ask(film, "Why? " * 40_000), ConfigError, "--context"),
    (lambda model, film: model.encode("nowhere.mp4"), FileNotFoundError, None),
    (lambda model, film: model.encode(b"no video"), VideoError, None),
    (lambda model, film: model.encode([]), VideoError, "frames"),
    (lambda model, film: model.encode([np.zeros((2, 2))]), VideoError, "frames"),
    (lambda model, film: model.encode(np.zeros((4, 8, 8, 3))), VideoError, "frames"),
    (
      lambda model, film: model.encode(np.zeros((4, 8, 8, 3), np.uint8), times=[0, 1]),
      VideoError,
      "times",
    ),
    (lambda model, film: model.encode("x.mp4", times=[0]), VideoError, "times"),
    (lambda model, film: model.encode(""), VideoError, "video"),
    (lambda model, film: model.encode([(0.0, BLACK), (1e12, BLACK)]), VideoError, "times"),
    (lambda model, film: model.encode([BLACK] * 8, start=float("nan")), VideoError, None),
    (lambda model, film: model.encode(model.sample([BLACK] * 8), start=1.0), ConfigError, "start"),
    (lambda model, film: model.encode(model.sample([BLACK] * 8), rate=1.0), ConfigError, "rate"),
    (
      lambda model, film: model.encode(model.sample([BLACK] * 8), times=np.arange(8)),
      ConfigError,
      "times",
    ),
    (lambda model, film: xcomp_jax.local_mesh(fsdp=3), ConfigError, "mesh"),
    (lambda model, film: model.warm_up(questions=0), ConfigError, "questions"),
    (lambda model, film: xcomp_jax.load(TINY, mesh=OTHER), ConfigError, "mesh"),
    (lambda model, film: model.encode("x.mp4", frames=0), ConfigError, "--max-frames"),
    (lambda model, film: model.encode("x.mp4", rate=-1.0), ConfigError, "--fps"),
    (lambda model, film: xcomp_jax.load(TINY, colour="red"), ConfigError, "colour"),
    (lambda model, film: xcomp_jax.load(TINY, yarn=5000.0), ConfigError, "--yarn"),
    (lambda model, film: xcomp_jax.load("nowhere"), ValueError, "nowhere"),
  ],
)
def test_bad_input_is_an_error_of_a_named_type(model, film, call, kind, where):
  with pytest.raises(kind) as caught:
    call(model, film)
  if where is not None:
    assert isinstance(caught.value, xcomp_jax.XCompError) and caught.value.fields["where"] == where


@pytest.mark.pure
def test_keywords_are_the_settings():
  named = {name: kind for name, kind in settings.AskSettings.__annotations__.items()}
  named.pop("checkpoint")
  assert settings.Settings.__annotations__ == named
  assert settings.SamplingSettings.__annotations__.keys() == {*settings.DRAWN, "max_new_tokens"}


@pytest.mark.pure
def test_importing_is_light_and_the_commands_are_listed():
  code = (
    "import sys, xcomp_jax; "
    "print(xcomp_jax.__version__, 'jax' in sys.modules, 'numpy' in sys.modules)"
  )
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout.split()[1:] == ["False", "False"]
  listed = subprocess.run(
    [sys.executable, "-m", "xcomp_jax"], capture_output=True, text=True, check=True
  ).stdout
  for name in ("ask", "train", "evaluate", "plan", "study"):
    assert f"  {name} " in listed
  assert dir(xcomp_jax) and xcomp_jax.VideoModel is video_model.VideoModel
