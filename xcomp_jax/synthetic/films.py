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
COUNT = "How many shapes were shown?"
WHOLE = "Which shape was shown most?"
NUMBER = "Which colour was number {}?"
ABOUT = {  # questions about a colour
  "digit": "Which digit was with {}?",
  "shape": "Which shape was {}?",
  "motion": "Which way went {}?",
  "after": "Which colour came after {}?",
  "before": "Which colour came before {}?",
}

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


@dataclasses.dataclass(frozen=True, kw_only=True)
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
  asked = [COUNT, WHOLE, world.DESCRIBE, *(NUMBER.format(count) for count in COUNTS.values())]
  asked += [text.format(colour) for colour in VALUES["colour"] for text in ABOUT.values()]
  return [*asked, *values, *(f" {v}" for v in values), *(f"{v}, " for v in VALUES["digit"])]


def shots(film: Sequence[Scene]) -> list[int]:
  """Scenes that show something."""
  return [i for i, scene in enumerate(film) if scene.colour is not None]


def draw_film(rng: np.random.Generator, scenes: int, count: int) -> list[Scene]:
  """A film of so many scenes, `count` of them shots."""
  film = [Scene(seed=int(seed)) for seed in rng.integers(2**31, size=scenes)]
  values = {name: rng.permutation(VALUES[name])[:count] for name in ("colour", "digit")}
  values |= {name: rng.choice(VALUES[name], count) for name in ("shape", "motion")}
  for k, place in enumerate(np.sort(rng.choice(scenes, count, replace=False))):
    one = {name: str(drawn[k]) for name, drawn in values.items()}
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
      FilmQuestion("needle", ABOUT["digit"].format(shot.colour), shot.digit, (i,)),
      FilmQuestion("attribute", ABOUT["shape"].format(shot.colour), shot.shape, (i,)),
      FilmQuestion("motion", ABOUT["motion"].format(shot.colour), shot.motion, (i,)),
      FilmQuestion("order", NUMBER.format(COUNTS[place]), shot.colour, tuple(at[:place])),
    ]
  for (i, first), (k, second) in zip(zip(at, seen), zip(at[1:], seen[1:])):
    assert first.colour and second.colour
    out += [
      FilmQuestion("order", ABOUT["after"].format(first.colour), second.colour, (i, k)),
      FilmQuestion("order", ABOUT["before"].format(second.colour), first.colour, (i, k)),
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


def annotated_film(split: FilmSplit, seed: int, number: int) -> tuple[list[Scene], dict]:
  """A film and its annotation; of a film to measure with, `scenes` says what each question
  needs.
  """
  rng = np.random.default_rng((seed, int.from_bytes(split.name.encode()), number))
  scenes = int(rng.integers(split.scenes[0], split.scenes[1] + 1))
  count = int(rng.integers(split.shots[0], min(split.shots[1], scenes) + 1))
  film = draw_film(rng, scenes, count)
  asked = film_questions(film)
  if split.questions:
    turns = (
      [(world.DESCRIBE, describe_film(film))]
      if rng.random() < split.described
      else [(q.text, q.answer) for q in _in_turn(rng, asked, split.first)[: split.questions]]
    )
    return film, {"conversations": world.conversation(turns)}
  while len({q.kind for q in asked}) < len(KINDS):  # another one, in which each kind can be asked
    film = draw_film(rng, scenes, count)
    asked = film_questions(film)
  by_kind = ([q for q in asked if q.kind == kind] for kind in KINDS)
  each = [of[rng.integers(len(of))] for of in by_kind]
  return film, {
    "conversations": world.conversation([(q.text, q.answer) for q in each]),
    "scenes": [q.scenes for q in each],
  }


def _in_turn(
  rng: np.random.Generator, asked: Sequence[FilmQuestion], first: str | None
) -> list[FilmQuestion]:
  """Questions of a conversation, their kinds in turn, so that there are as many of the rare ones.

  No answer tells another; of order, whose answers together tell what others can't be, there is one:
  with several, they were learned from the text before them and not from the film.

  first: the kind that goes first; None: any.
  """
  kinds = sorted(map(str, rng.permutation(KINDS)), key=lambda kind: kind != first)
  of_kind: dict[str, dict[Any, FilmQuestion]] = {kind: {} for kind in kinds}
  for i in rng.permutation(len(asked)):
    question = asked[i]
    same = "once" if question.kind == "order" else question.scenes
    of_kind[question.kind].setdefault(same, question)
  rows = itertools.zip_longest(*(of.values() for of in of_kind.values()))
  return list(filter(None, itertools.chain.from_iterable(rows)))


def write_films(out: pathlib.Path, split: FilmSplit, seed: int, workers: int) -> None:
  """out/NAME/*.mp4, out/NAME.json and out/NAME.yaml; `out` appears whole or not at all."""
  film = functools.partial(annotated_film, split, seed)
  with fresh_folder(out, "films") as temporary:
    world.write_split(temporary, split.name, split.films, film, FRAMES, workers)
