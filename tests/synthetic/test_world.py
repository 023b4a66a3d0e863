import json
import os
import re

import cv2
import numpy as np
import pytest

from xcomp_jax.data import prompt
from xcomp_jax.synthetic import world
from xcomp_jax.synthetic.world import QUESTIONS, VALUES, WorldSplit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  out = tmp_path_factory.mktemp("world") / "out"
  world.write_world(
    out,
    [
      WorldSplit(name="train", videos=3, fewest=2, most=4, questions=4),
      WorldSplit(name="heldout", videos=8, fewest=1, most=3, questions=1),
    ],
    seed=3,
    workers=1,
  )
  return out


@pytest.mark.pure
def test_each_attribute_is_shown_in_exactly_one_scene():
  for seed in range(50):
    shown = world.scenes(np.random.default_rng(seed), 5)
    for kind in VALUES:
      assert sum(getattr(scene, kind) is not None for scene in shown) == 1


@pytest.mark.pure
def test_the_letter_names_the_value_that_was_shown():
  shown = world.scenes(np.random.default_rng(0), 4)
  for kind in QUESTIONS:
    question, letter = world.turn(shown, kind)
    (value,) = re.findall(rf"^{letter}\. (.*)$", question, re.MULTILINE)
    assert value in {getattr(scene, kind) for scene in shown}


@pytest.mark.pure
def test_answers_are_balanced():
  letters = [world.turn(world.scenes(np.random.default_rng(i), 3), "digit")[1] for i in range(400)]
  assert all(70 < letters.count(letter) < 130 for letter in "ABCD")


@pytest.mark.pure
def test_a_scene_shows_its_colour_and_its_motion():
  still = world.Scene(seed=5)
  for motion, (dx, dy) in world.MOTIONS.items():
    difference = (
      np.abs(
        world.render(world.Scene(seed=5, colour="red", shape="square", motion=motion)).astype(int)
        - world.render(still)
      ).sum(-1)
      > 60
    )
    centre = np.array([np.argwhere(frame).mean(0) for frame in difference])
    assert np.sign(np.round((centre[-1] - centre[0]) / 10)).tolist() == [dy, dx]


def test_files_are_videos_with_annotations_of_both_kinds(made):
  for name, count, turns in (("train", 3, 8), ("heldout", 8, 2)):
    annotations = json.loads((made / f"{name}.json").read_text())
    assert len(annotations) == count and all(len(a["conversations"]) == turns for a in annotations)
    capture = cv2.VideoCapture(str(made / name / annotations[0]["video"]))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) % 8 == 0 and capture.get(cv2.CAP_PROP_FPS) == 8
  assert (made / "train.yaml").exists()


def test_what_is_asked_is_answered_by_the_scene_that_shows_it(made):
  for annotation in world.read_split(made, "train"):
    asked = world.questions_in(annotation)
    assert sorted(text.splitlines()[0] for text, _, _ in asked) == sorted(QUESTIONS.values())
    # one scene shows all of it
    assert len({scene for text, _, scene in asked if "shape" in text}) == 1
    assert all(letter in "ABCD" for _, letter, _ in asked)


def test_the_same_seed_makes_the_same_videos(made, tmp_path):
  world.write_world(
    tmp_path / "again",
    [WorldSplit(name="train", videos=3, fewest=2, most=4, questions=4)],
    seed=3,
    workers=1,
  )
  for file in (made / "train").iterdir():
    assert file.read_bytes() == (tmp_path / "again" / "train" / file.name).read_bytes()


def test_train_and_heldout_share_no_video(made):
  def frames(name):
    return {(made / name / f.name).read_bytes() for f in (made / name).iterdir()}

  assert not frames("train") & frames("heldout")


@pytest.mark.pure
def test_the_tokenizer_has_the_template_and_one_token_per_letter(tmp_path):
  world.write_tokenizer(tmp_path, world.world_words())
  tokenizer = prompt.load_tokenizer(tmp_path)
  assert len({tokenizer.im_start, tokenizer.im_end, tokenizer.pad, tokenizer.newline}) == 4
  assert tokenizer.vocab_size <= world.VOCABULARY
  for letter in "ABCD":
    assert len(tokenizer.encode(letter)) == 1
  for text in ("Which colour was the shape?\nA. red", "něco jiného 🙂"):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.pure
@pytest.mark.parametrize(
  "videos, scenes, questions, where",
  [
    (0, (1, 1), 4, "videos"),
    (1, (0, 1), 4, "scenes"),
    (1, (3, 2), 4, "scenes"),
    (1, (1, 4097), 4, "scenes"),
    (1, (1, 1), 5, "questions"),
    (1, (1, 1), -1, "questions"),
  ],
)
def test_impossible_worlds_are_refused_and_leave_nothing(
  videos, scenes, questions, where, tmp_path
):
  fewest, most = scenes
  split = WorldSplit(name="train", videos=videos, fewest=fewest, most=most, questions=questions)
  with pytest.raises(world.WorldError) as caught:
    world.write_world(tmp_path / "out", [split], seed=0, workers=1)
  assert caught.value.fields["where"] == where
  assert not any(tmp_path.iterdir())


@pytest.mark.pure
def test_a_folder_that_is_no_utf8_is_refused(tmp_path):
  out = tmp_path / os.fsdecode(b"caf\xff")
  with pytest.raises(
    world.WorldError,
    match=r"the name of the folder .*caf\\udcff.*' holds bytes that are no UTF-8",
  ):
    world.write_world(
      out,
      [world.WorldSplit(name="heldout", videos=1, fewest=1, most=1, questions=1)],
      seed=0,
      workers=1,
    )
  assert not out.exists()
