"""The study's world: films of many scenes, and questions whose answers are known.

A film is a row of scenes of two frames, one clip each. A few of them are *shots*: a coloured shape
that moves, and a digit in a corner, between bars of the shape's colour; no two shots of a film
share a colour or a digit. In all other scenes there is nothing to see. There are six kinds of
questions:

  needle     which digit was with a colour: one scene, found by what it shows, read elsewhere in it
  attribute  which shape had a colour; motion: which way it moved
  order      which colour was number two, or came right after, or right before, another
  count      how many shapes there were
  whole      which shape was the most frequent one

Answers are single words. Everything is a function of a seed; real video files are written, and
decoded by the real path.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from xcomp_jax.files import fresh_folder
from xcomp_jax.synthetic import world
from xcomp_jax.synthetic.world import Scene

FRAMES = 2  # of a scene: one clip
KINDS = ("needle", "attribute", "motion", "order", "count", "whole")
VALUES = {
  "colour": tuple(world.COLOURS),
  "shape": world.SHAPES,
  "motion": tuple(world.MOTIONS),
  "digit": tuple(world.DIGITS),
}
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
COUNT, WHOLE, DESCRIBE = (
  "How many shapes were shown?",
  "Which shape was shown most?",
  "Describe the video.",
)

# The base's sizes. Eight layers, so that a cosine has as many lengths.
MODEL: dict[str, Any] = world.MODEL | {
  "hidden_size": 64,
  "intermediate_size": 160,
  "num_hidden_layers": 8,
  "num_attention_heads": 2,
  "num_key_value_heads": 2,
  "mm_local_num_frames": FRAMES,
}


@dataclasses.dataclass(frozen=True)
class FilmQuestion:
  """kind: of KINDS. scenes: that have to be seen to answer it."""

  kind: str
  text: str
  answer: str
  scenes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FilmSplit:
  """Films of one purpose: numbers of scenes and of shots, fewest and most.

  questions: about each film, in one conversation; 0: one of each kind, to measure with.
  first: kind of the question that a conversation begins with; None: any.
  described: share of the films that are described instead, shot by shot.
  """

  name: str
  films: int
  scenes: tuple[int, int]
  shots: tuple[int, int]
  questions: int
  first: str | None = None
  described: float = 0.0


def film_words() -> list[str]:
  """The texts of this world, for its tokenizer."""
  values = [*sum(VALUES.values(), ()), *COUNTS.values()]
  asked = [COUNT, WHOLE, DESCRIBE, *(_number(k) for k in COUNTS)]
  for colour in VALUES["colour"]:
    asked += [
      _digit_with(colour),
      _shape_of(colour),
      _motion_of(colour),
      _after(colour),
      _before(colour),
    ]
  return [*asked, *values, *(f" {v}" for v in values), *(f"{v}, " for v in VALUES["digit"])]


def shots(film: Sequence[Scene]) -> list[int]:
  """Scenes that show something."""
  return [i for i, scene in enumerate(film) if scene.colour is not None]


def draw_film(rng: np.random.Generator, scenes: int, count: int) -> list[Scene]:
  """A film of so many scenes, `count` of them shots."""
  seeds = rng.integers(2**31, size=scenes)
  film = [Scene(None, None, None, None, int(seed)) for seed in seeds]
  distinct = {name: rng.permutation(VALUES[name])[:count] for name in ("colour", "digit")}
  free = {name: rng.choice(VALUES[name], count) for name in ("shape", "motion")}
  for k, place in enumerate(np.sort(rng.choice(scenes, count, replace=False))):
    one = {name: str(values[k]) for name, values in (distinct | free).items()}
    film[place] = dataclasses.replace(film[place], bars=one["colour"], **one)
  return film


def film_questions(film: Sequence[Scene]) -> list[FilmQuestion]:
  """All that can be asked about a film."""
  at = shots(film)
  seen = [film[i] for i in at]
  out = []
  for place, (i, shot) in enumerate(zip(at, seen, strict=True), 1):
    assert shot.colour and shot.digit and shot.shape and shot.motion  # a shot shows all of them
    out += [
      FilmQuestion("needle", _digit_with(shot.colour), shot.digit, (i,)),
      FilmQuestion("attribute", _shape_of(shot.colour), shot.shape, (i,)),
      FilmQuestion("motion", _motion_of(shot.colour), shot.motion, (i,)),
      FilmQuestion("order", _number(place), shot.colour, tuple(at[:place])),
    ]
  for (i, first), (k, second) in zip(zip(at, seen), zip(at[1:], seen[1:])):
    assert first.colour and second.colour
    out += [
      FilmQuestion("order", _after(first.colour), second.colour, (i, k)),
      FilmQuestion("order", _before(second.colour), first.colour, (i, k)),
    ]
  out.append(FilmQuestion("count", COUNT, COUNTS[len(seen)], tuple(at)))
  shapes = collections.Counter(shot.shape for shot in seen).most_common(2)
  if len(shapes) == 1 or shapes[0][1] > shapes[1][1]:
    assert shapes[0][0]
    out.append(FilmQuestion("whole", WHOLE, shapes[0][0], tuple(at)))
  return out


def describe_film(film: Sequence[Scene]) -> str:
  """A film's shots, such as "red ring, red left, red 7, blue cross, blue up, blue 0": each value
  right after what it is found by.
  """
  seen = (film[i] for i in shots(film))
  return ", ".join(f"{s.colour} {value}" for s in seen for value in (s.shape, s.motion, s.digit))


def _annotated(split: FilmSplit, seed: int, number: int) -> tuple[list[Scene], dict]:
  """A film and its annotation; of a film to measure with, `scenes` says what each question
  needs.
  """
  rng = np.random.default_rng((seed, int.from_bytes(split.name.encode()), number))
  scenes = int(rng.integers(split.scenes[0], split.scenes[1] + 1))
  count = int(rng.integers(split.shots[0], min(split.shots[1], scenes) + 1))
  film = draw_film(rng, scenes, count)
  asked = film_questions(film)
  if not split.questions:
    while len({q.kind for q in asked}) < len(KINDS):  # another one, in which each kind can be asked
      film = draw_film(rng, scenes, count)
      asked = film_questions(film)
    each = [
      of[rng.integers(len(of))] for of in ([q for q in asked if q.kind == kind] for kind in KINDS)
    ]
    return film, {
      "conversations": world.conversation([(q.text, q.answer) for q in each]),
      "scenes": [q.scenes for q in each],
    }
  if rng.random() < split.described:
    return film, {"conversations": world.conversation([(DESCRIBE, describe_film(film))])}
  # Kinds in turn, so that there are as many of the rare ones. No answer tells another; of order,
  # whose answers together tell what others can't be, there is one: with several, they were learned
  # from the text before them and not from the film.
  turns: dict[str, dict] = {
    str(kind): {} for kind in sorted(rng.permutation(KINDS), key=lambda kind: kind != split.first)
  }
  for i in rng.permutation(len(asked)):
    question = asked[i]
    turns[question.kind].setdefault(
      "once" if question.kind == "order" else question.scenes, question
    )
  rows = itertools.zip_longest(*(of.values() for of in turns.values()))
  chosen = [(q.text, q.answer) for row in rows for q in row if q]
  return film, {"conversations": world.conversation(chosen[: split.questions])}


def write_films(out: pathlib.Path, split: FilmSplit, seed: int, workers: int) -> None:
  """out/NAME/*.mp4, out/NAME.json and out/NAME.yaml; `out` appears whole or not at all."""
  with fresh_folder(out, "films") as temporary:
    world.write_split(
      temporary,
      split.name,
      split.films,
      functools.partial(_annotated, split, seed),
      FRAMES,
      workers,
    )


def _digit_with(colour: str) -> str:
  return f"Which digit was with {colour}?"


def _number(place: int) -> str:
  return f"Which colour was number {COUNTS[place]}?"


def _shape_of(colour: str) -> str:
  return f"Which shape was {colour}?"


def _motion_of(colour: str) -> str:
  return f"Which way went {colour}?"


def _after(colour: str) -> str:
  return f"Which colour came after {colour}?"


def _before(colour: str) -> str:
  return f"Which colour came before {colour}?"
