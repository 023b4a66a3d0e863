"""The study's films: what is asked follows from what is shown, and the real path shows it."""

import collections
import dataclasses
import itertools
import pathlib
import re

import numpy as np
import pytest

from xcomp_jax.data import predecoding, prompt
from xcomp_jax.data.store import open_store
from xcomp_jax.study import cell_results
from xcomp_jax.study.miniature import PRESETS, SEED, STAGES, Study
from xcomp_jax.synthetic import films, world
from xcomp_jax.synthetic.films import FRAMES, KINDS, FilmSplit

HELDOUT = FilmSplit(name="heldout", films=4, scenes=(12, 12), shots=(3, 5), questions=0)
NUMBERS = ["one", "two", "three", "four", "five"]


def solve(shots, text):
  """The answer by the scene list alone, read from the question's words."""
  words = text.rstrip("?").split()
  order = [s.colour for s in shots]
  of = {s.colour: s for s in shots}
  match words:
    case ["Which", "digit", "was", "with", colour]:
      return of[colour].digit
    case ["Which", "colour", "was", "number", number]:
      return order[NUMBERS.index(number)]
    case ["Which", "shape", "was", "shown", "most"]:
      return max(films.VALUES["shape"], key=[s.shape for s in shots].count)
    case ["Which", "shape", "was", colour]:
      return of[colour].shape
    case ["Which", "way", "went", colour]:
      return of[colour].motion
    case ["Which", "colour", "came", "after", colour]:
      return order[order.index(colour) + 1]
    case ["Which", "colour", "came", "before", colour]:
      return order[order.index(colour) - 1]
    case ["How", "many", *_]:
      return NUMBERS[len(shots) - 1]
  raise AssertionError(text)


def conversations(split, numbers, seed=0):
  for number in numbers:
    film, one = films.annotated_film(split, seed, number)
    texts = [turn["value"].removeprefix("<image>\n") for turn in one["conversations"]]
    yield film, one, list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.pure
@pytest.mark.parametrize(
  "split",
  [HELDOUT, FilmSplit(name="train", films=1, scenes=(4, 12), shots=(1, 5), questions=8)],
  ids=lambda s: s.name,
)
def test_every_answer_follows_from_the_scenes(split):
  seen = collections.Counter()
  for film, _, turns in conversations(split, range(150)):
    shots = [scene for scene in film if scene.colour]
    for text, answer in turns:
      assert solve(shots, text) == answer
      seen[
        re.sub(r"\b(" + "|".join([*sum(films.VALUES.values(), ()), *NUMBERS]) + r")\b", "X", text)
      ] += 1
  assert len(seen) == 8 and min(seen.values()) > 20


@pytest.mark.pure
def test_no_two_shots_share_a_colour_or_a_digit():
  for seed in range(50):
    shots = [s for s in films.draw_film(np.random.default_rng(seed), 12, 5) if s.colour]
    assert len(shots) == len({s.colour for s in shots}) == len({s.digit for s in shots}) == 5


@pytest.mark.pure
def test_a_conversation_asks_once_for_order_and_nothing_twice():
  for _, _, turns in conversations(
    FilmSplit(name="train", films=1, scenes=(8, 8), shots=(4, 5), questions=99), range(60)
  ):
    assert (
      len(turns) == len(set(turns))
      and sum("came" in text or "number" in text for text, _ in turns) == 1
    )


@pytest.mark.pure
def test_each_film_that_measures_is_asked_one_question_of_each_kind():
  for film, one, turns in conversations(HELDOUT, range(40)):
    assert len(turns) == len(one["scenes"]) == len(KINDS)
    shots = tuple(films.shots(film))
    needed = dict(zip(KINDS, one["scenes"], strict=True))
    assert all(
      len(needed[kind]) == 1 and needed[kind][0] in shots
      for kind in ("needle", "attribute", "motion")
    )
    assert needed["order"] in {
      shots[first : last + 1] for last in range(len(shots)) for first in {0, max(last - 1, 0)}
    }
    assert needed["count"] == needed["whole"] == shots


def test_chance_is_what_is_right_without_looking_it_up():
  answers, any_shot, films_drawn = (
    collections.defaultdict(collections.Counter),
    collections.Counter(),
    3000,
  )
  fields = {
    "needle": "digit",
    "attribute": "shape",
    "motion": "motion",
    "order": "colour",
    "whole": "shape",
  }
  for film, _, turns in conversations(HELDOUT, range(films_drawn)):
    for kind, (text, answer) in zip(KINDS, turns, strict=True):
      answers[kind][answer] += 1
      if kind in fields:
        shown = [
          value
          for i in films.shots(film)
          if (value := getattr(film[i], fields[kind])) not in text or kind != "order"
        ]
        any_shot[kind] += shown.count(answer) / len(shown)
  for kind, counts in answers.items():
    assert counts.most_common(1)[0][1] / films_drawn == pytest.approx(
      cell_results.CHANCE[kind], abs=0.02
    ), kind
  for kind in fields:
    assert any_shot[kind] / films_drawn == pytest.approx(cell_results.ANY_SHOT[kind], abs=0.02), (
      kind
    )


@pytest.mark.pure
def test_splits_share_no_scene():
  splits = [
    *Study(pathlib.Path(), PRESETS["full"]).splits.values(),
    *(split for split, _ in STAGES.values()),
  ]
  seeds = {
    split.name: {scene.seed for i in range(30) for scene in films.annotated_film(split, SEED, i)[0]}
    for split in splits
  }
  assert len(seeds) == 12 and all(seeds.values())
  assert not any(one & other for one, other in itertools.combinations(seeds.values(), 2))


@pytest.mark.pure
def test_answers_are_single_tokens(tmp_path):
  world.write_tokenizer(tmp_path, films.film_words())
  tokenizer = prompt.load_tokenizer(tmp_path)
  for word in [*sum(films.VALUES.values(), ()), *films.COUNTS.values()]:
    assert len(tokenizer.encode_spans(word)[0]) == 1, word


def test_the_real_path_shows_a_scene_in_each_clip(tmp_path):
  films.write_films(
    tmp_path / "films",
    FilmSplit(name="heldout", films=1, scenes=(5, 5), shots=(3, 3), questions=0),
    seed=2,
    workers=1,
  )
  settings = predecoding.FrameSettings(
    image_size=96, max_frames=1024, min_frames=FRAMES, fps=world.FPS, clip_frames=FRAMES
  )
  predecoding.predecode(
    tmp_path / "films" / "heldout.yaml", tmp_path / "frames", settings, root=tmp_path / "films"
  )
  store = open_store(str(tmp_path / "frames"))
  film, _ = films.annotated_film(
    FilmSplit(name="heldout", films=1, scenes=(5, 5), shots=(3, 3), questions=0), 2, 0
  )
  for clip, scene in zip(store.visual(0), film, strict=True):
    shown = world.render(scene, FRAMES)
    assert np.abs(clip.astype(float) - shown).mean() < 12  # mp4 blurs
    others = [
      np.abs(clip.astype(float) - world.render(other, FRAMES)).mean()
      for other in film
      if other is not scene
    ]
    assert np.abs(clip.astype(float) - shown).mean() < min(others) / 2


@pytest.mark.pure
def test_bars_of_the_shots_colour_are_beside_its_digit_and_nowhere_else():
  shot = world.Scene(seed=3, colour="red", shape="ring", motion="left", digit="7")
  changed = (
    np.abs(
      world.render(dataclasses.replace(shot, bars="red"), FRAMES).astype(int)
      - world.render(shot, FRAMES)
    ).sum(-1)
    > 90
  )
  assert changed.sum() == FRAMES * world.LABEL * 2 * world.BAR
  film = films.draw_film(np.random.default_rng(0), 12, 4)
  assert all(scene.bars == scene.colour for scene in film)


@pytest.mark.pure
def test_a_split_can_begin_each_conversation_with_a_kind():
  for _, _, turns in conversations(
    FilmSplit(name="train", films=1, scenes=(2, 8), shots=(2, 5), questions=4, first="order"),
    range(40),
  ):
    assert "came" in turns[0][0] or "number" in turns[0][0]
    assert len(turns) == 4
