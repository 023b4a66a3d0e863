"""What is measured of a selection, against the same counted plainly from scores that are drawn."""

import numpy as np
import pytest

from xcomp_jax.data.store import open_store
from xcomp_jax.inference import selection
from xcomp_jax.study import measures, miniature
from xcomp_jax.study.miniature import Study
from xcomp_jax.synthetic.films import FRAMES, KINDS, FilmSplit

SCENES, KEPT = 8, 3


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  """Two films of eight scenes, as frames: nothing here looks at them."""
  out = tmp_path_factory.mktemp("study")
  its = Stored(out, miniature.PRESETS["quick"])
  its.splits["long"] = FilmSplit(
    name="long", films=2, scenes=(SCENES, SCENES), shots=(2, 2), questions=0
  )
  miniature.decode_films(out / "long", its.splits["long"], 3, None)
  return its


class Stored(Study):
  """The study, whose films are frames."""

  def store(self, name):
    return open_store(str(self.out / name / "frames"))


@pytest.fixture
def shown():
  """What the model is asked: for every call the clips of all questions, and what the prompt
  says; filled by `programs`.
  """
  return []


@pytest.fixture(scope="module")
def scores():
  """What QC-Comp will score scenes with: [films, questions, scenes]; of the second film they fall
  from its first scene on.
  """
  drawn = np.random.default_rng(0).permuted(
    np.tile(np.arange(1.0, SCENES + 1), (2, len(KINDS), 1)), axis=2
  )
  drawn[1] = np.arange(SCENES, 0, -1)
  return drawn


@pytest.fixture
def programs(shown, scores):
  """Answers that are right if all that is needed is seen, selections by `scores`, fixed costs."""
  films = iter(scores)

  def answers(model, tokenizer, store, asked, message=None):
    shown.append(([clips.tolist() for _, clips in asked], message))
    return np.array([set(one.scenes) <= set(clips) for one, clips in asked])

  def select(model, film, prompts, selector):
    own = next(films)
    assert len(prompts) == len(own) and selector.config == measures.measured_setting(
      "local", KEPT * FRAMES
    )
    best = np.sort(np.argsort(-own, axis=1)[:, :KEPT])
    frames = (best[:, :, None] * FRAMES + np.arange(FRAMES)).reshape(len(own), -1)
    return [selection.Selection(f, np.repeat(s, FRAMES), "") for f, s in zip(frames, own)]

  return measures.Programs(answers, select, lambda *_: 2e12, lambda *_: 3e12)


def selected(study, programs, *modes):
  rule = miniature.study_rule("none")
  return measures.selected_answers(
    study, miniature.BASE, rule, "long", modes, KEPT * FRAMES, programs
  )


def test_a_selection_is_measured_by_what_is_needed(study, programs, scores):
  got, asked = selected(study, programs, "uniform", "local"), study.asked("long")
  local, uniform = got["local"], got["uniform"]
  assert [len(one.scenes) for one in asked[:3]] == [1, 1, 1]
  few = []
  for i, one in enumerate(asked):
    film, k = divmod(i, len(KINDS))
    own, other = list(scores[film, k]), list(scores[film, (k - 1) % len(KINDS)])
    ranked = sorted(range(SCENES), key=lambda scene: -own[scene])
    few.append(set(one.scenes) <= set(ranked[:2]))
    assert int(local["hits"][i]) == (set(one.scenes) <= set(ranked[:KEPT]))
    assert int(uniform["hits"][i]) == (set(one.scenes) <= {1, 4, 6})
    if len(one.scenes) > 1:
      assert got["place"][i] is local["rank"][i] is local["other"][i] is local["score"][i] is None
    else:
      (scene,) = one.scenes
      assert got["place"][i] == (scene + 0.5) / SCENES
      assert local["rank"][i] == ranked.index(scene) and local["other"][i] == sum(
        score > other[scene] for score in other
      )
      assert local["score"][i] == round(own[scene] / np.mean(own), 3)
  assert local["few"] == "".join("01"[right] for right in few) and local["right"] == local["hits"]
  assert local["TFLOP"] == 5 and uniform["TFLOP"] == 2 and uniform["tokens"] == KEPT * FRAMES * 16


def test_relevance_is_by_place_and_by_whether_there_is_something_to_see(study, programs, scores):
  relevance = np.array(selected(study, programs, "local")["local"]["relevance"])
  shots = [
    set().union(*(one.scenes for one in study.asked("long") if one.film == film))
    for film in range(2)
  ]
  assert [len(one) for one in shots] == [2, 2]
  for scene in range(SCENES):
    for kind in (0, 1):
      of = [
        scores[film, :, scene] / np.mean(scores[film], 1)
        for film in range(2)
        if (scene in shots[film]) == kind
      ]
      assert relevance[kind, scene * measures.BINS // SCENES] == pytest.approx(
        np.mean(of) if of else 0, abs=1e-4
      )


def test_a_prompt_says_how_many_frames_are_shown(study, programs, shown):
  whole, rule = study.store("long").samples[0].time_message, miniature.study_rule("none")
  for clips in (None, 2):
    measures.measured(study, miniature.BASE, rule, "long", clips, programs)
  selected(study, programs, "local")
  said = [(len(clips[0]), message) for clips, message in shown]
  assert (
    (SCENES, whole) in said
    and (2, whole.replace("and 16 frames", "and 4 frames")) in said
    and "and 16 frames" in whole
  )
  # as chat: the whole film's
  assert {message for clips, message in said if clips == KEPT} == {None}
