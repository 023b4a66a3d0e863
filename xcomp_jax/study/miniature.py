"""The miniature of the paper: its films, its base, and models tuned from it under the rules of
configs/study.py.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from xcomp_jax import demo
from xcomp_jax.config import LPCompConfig
from xcomp_jax.config_io import to_dict
from xcomp_jax.data import prompt
from xcomp_jax.data.store import Store, open_store
from xcomp_jax.errors import XCompError
from xcomp_jax.files import write_json
from xcomp_jax.inputs import read_json
from xcomp_jax.synthetic import films, world

BASE = "assets/study"
CONFIG = "configs/study.py"
SEED = 11  # of the films


class StudyError(XCompError, ValueError):
  """Work of the study that was made otherwise, or is not there; the message says what."""


SCENES = {"tuning": 12, "heldout": 12, "wide": 24, "window": 32, "long": 128, "hour": 512}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amounts:
  """How much of everything.

  films: of each split, of so many scenes each as SCENES says; those that are measured, all but
    `tuning`, by six questions each. wide: measured with ever more of their frames. long: of these
    QC-Comp selects; window: likewise, as long as the base has seen; hour: for the official mode.
  seeds: of every tuning.
  rules, others: of configs/study.py, to tune under; what is tuned without compression is measured
    under `rules` too.
  longer: epochs of longer tunings, or 0.
  """

  films: Mapping[str, int]
  seeds: tuple[int, ...]
  rules: tuple[str, ...]
  others: tuple[str, ...] = ()
  longer: int = 0


PRESETS = {
  "full": Amounts(
    films={"tuning": 3200, "heldout": 120, "wide": 90, "window": 90, "long": 90, "hour": 90},
    seeds=(0, 1, 2),
    rules=("none", "heuristic", "stepwise", "progressive", "uniform", "early"),
    others=("late", "average"),
    longer=3,
  ),
  "quick": Amounts(
    films={"tuning": 1280, "heldout": 60, "wide": 0, "window": 0, "long": 8, "hour": 0},
    seeds=(0,),
    rules=("progressive",),
  ),
}


class AskedFilm(NamedTuple):
  """A question about the stored film of that number. scenes: that have to be seen to answer it."""

  film: int
  question: str
  answer: str
  scenes: Sequence[int]


def variant_settings(variant: str, changes: Mapping[str, Any]) -> dict[str, Any]:
  """What a model that is trained by a variant depends on, but for its rule."""
  config = to_dict(demo.configured(f"{CONFIG}:{variant}", changes))
  return {part: config[part] for part in ("data", "optim", "train")}


def study_rule(name: str) -> LPCompConfig:
  """One of configs/study.py."""
  return demo.configured(f"{CONFIG}:{name}", {}).lp_comp


def train_variant(folder: pathlib.Path, variant: str, changes: Mapping[str, Any]) -> pathlib.Path:
  """folder/model, trained by a variant of configs/study.py if it is not there; goes on with a run
  that was stopped.
  """
  if not (folder / "model").exists():
    demo.train_exported(folder, f"{CONFIG}:{variant}", changes)
  shutil.rmtree(folder / "run", ignore_errors=True)
  return folder / "model"


def decode_films(
  folder: pathlib.Path, split: films.FilmSplit, seed: int, tower: str | None
) -> None:
  """folder/films and folder/features (with a tower's checkpoint) or folder/frames."""
  source = folder / "films"
  if not source.exists():
    films.write_films(source, split, seed, workers=2)
  # clips at once: a film's, which are filled up to as many
  chunk = min(16, 1 << (split.scenes[1] - 1).bit_length())
  demo.decode_world(
    source,
    folder / ("features" if tower else "frames"),
    split.name,
    sizes=films.MODEL,
    tower=tower,
    chunk=chunk,
  )


# (folder, films, seed, checkpoint of a tower): makes features, or frames
Decode = Callable[[pathlib.Path, films.FilmSplit, int, str | None], None]
# (folder, variant of the config, changes): trains a model
Train = Callable[[pathlib.Path, str, Mapping[str, Any]], pathlib.Path]


class Study:
  """A folder of work with a base: films, their features, tuned models. What is there already is
  used again.

  Raises:
    FileNotFoundError: there is no such base.
  """

  def __init__(
    self,
    out: pathlib.Path,
    preset: Amounts,
    base: str | pathlib.Path = BASE,
    *,
    rule: Callable[[str], LPCompConfig] = study_rule,
    decode: Decode = decode_films,
    train: Train = train_variant,
  ):
    """rule: by its name. decode, train: what makes features and models."""
    self.out, self.preset, self.base = out, preset, pathlib.Path(base)
    self.rule, self._decode, self._train = rule, decode, train
    if not (self.base / "model.safetensors").exists():
      raise FileNotFoundError(
        f"{base} has no model.safetensors; run it where {BASE} is, or train a base (--base) and "
        f"name it by --model"
      )
    self.splits = {
      name: films.FilmSplit(
        name=name,
        films=preset.films[name],
        scenes=(scenes, scenes),
        shots=(3, 5),
        questions=len(films.KINDS) if name == "tuning" else 0,
      )
      for name, scenes in SCENES.items()
    }

  def made(
    self, splits: Sequence[str], rules: Sequence[str] = (), epochs: int = 1
  ) -> dict[str, Any]:
    """What comes from these splits, under these rules, depends on, to be compared with what it was
    made from (`differences`).
    """
    made = {
      "base": digest(self.base),
      "films": {name: dataclasses.asdict(self.splits[name]) for name in splits},
      "seed": SEED,
      "rules": {name: to_dict(self.rule(name)) for name in rules},
    }
    if "tuning" in splits:  # of all rules the same
      made |= variant_settings("progressive", {"train.epochs": epochs})
    return made

  @functools.cached_property
  def tokenizer(self) -> prompt.Tokenizer:
    """The base's."""
    return prompt.load_tokenizer(str(self.base))

  def store(self, name: str) -> Store:
    """The features of a split's films, made if they are not there.

    Raises:
      StudyError: what is there was made otherwise.
    """
    folder = self.out / name
    write_origin(folder, self.made([name]))
    if not (folder / "features").exists():
      self._decode(folder, self.splits[name], SEED, str(self.base))
    return open_store(str(folder / "features"))

  def asked(self, name: str) -> list[AskedFilm]:
    """The questions about a split's films, film by film as they are stored, each in the order of
    KINDS.
    """
    store, annotations = self.store(name), world.read_split(self.out / name / "films", name)
    told = (world.questions_in(annotations[sample.position]) for sample in store.samples)
    return [AskedFilm(film, *one) for film, several in enumerate(told) for one in several]

  def tuned(self, name: str, seed: int, epochs: int = 1) -> pathlib.Path:
    """The base, tuned under a rule on all films so many times; goes on with a tuning that was
    stopped.

    Raises:
      StudyError: what is there was made otherwise.
    """
    folder = self.out / (f"{name}_{seed}" if epochs == 1 else f"{name}_{seed}_{epochs}_epochs")
    write_origin(folder, self.made(["tuning"], [name], epochs))
    if not (folder / "model").exists():
      self.store("tuning")
    return self._train(
      folder,
      name,
      {
        "seed": seed,
        "init_from": self.base,
        "data.train": self.out / "tuning" / "features",
        "train.epochs": epochs,
      },
    )


STAGES = {  # of the base's training: its films, and whether the tower is frozen by then
  "see": (
    films.FilmSplit(
      name="see", films=12000, scenes=(1, 1), shots=(1, 1), questions=8, described=1.0
    ),
    False,
  ),
  # No stage after `see` has films of a single shot: nothing has to be found to answer about it, and
  # an average with many of them falls although nothing else is learned.
  "answer": (
    films.FilmSplit(name="answer", films=8000, scenes=(2, 3), shots=(2, 3), questions=8),
    True,
  ),
  "tell": (
    films.FilmSplit(
      name="tell", films=13000, scenes=(2, 3), shots=(2, 3), questions=8, described=0.35
    ),
    True,
  ),
  "again": (
    films.FilmSplit(
      name="again", films=13000, scenes=(2, 3), shots=(2, 3), questions=8, described=0.2
    ),
    True,
  ),
  "ask": (
    films.FilmSplit(
      name="ask", films=4000, scenes=(4, 12), shots=(2, 5), questions=4, first="order"
    ),
    True,
  ),
  "watch": (
    films.FilmSplit(
      name="watch", films=2000, scenes=(8, 32), shots=(2, 5), questions=4, first="order"
    ),
    True,
  ),
}


def train_study_base(
  out: pathlib.Path, *, decode: Decode = decode_films, train: Train = train_variant
) -> None:
  """The base's stages; the result is out/watch/model. Goes on where it stopped.

  decode, train: as of `Study`.

  Raises:
    StudyError: what is there was made otherwise.
  """

  def train_stage(folder, stage, before):
    split, frozen = STAGES[stage]
    made = {"before": digest(before), "films": dataclasses.asdict(split), "seed": SEED}
    write_origin(folder, made | variant_settings(stage, {}))
    if not (folder / "model").exists():
      decode(folder, split, SEED, str(before) if frozen else None)
    shown = folder / ("features" if frozen else "frames")
    return train(folder, stage, {"init_from": before, "data.train": shown})

  made = {"model": films.MODEL, "words": films.film_words()}
  write_origin(out, made)
  # In random layers embeddings soon drown, and what a question asks about is found much later.
  base = demo.train_base(
    out, STAGES, train_stage, sizes=films.MODEL, words=made["words"], silent_layers=True
  )
  print(f"a base: {base}; to study it: --model {base} --out DIR", flush=True)


def write_origin(folder: pathlib.Path, made: dict[str, Any]) -> None:
  """Says in a folder what it comes from.

  Raises:
    StudyError: it comes from something else.
  """
  file = folder / "made.json"
  if not file.exists():
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, made)
    return
  if other := differences(read_json(file, StudyError), made):
    raise StudyError(
      f"{file} was made otherwise ({', '.join(other)}): give --out another folder, or remove "
      f"{folder}",
      where=folder.name,
      differ=other,
    )


def differences(before: dict[str, Any], made: dict[str, Any]) -> list[str]:
  """What differs between what something was made from, as it was read back, and what it would be
  made from now.
  """
  now = json.loads(json.dumps(made))
  return [key for key in now if before.get(key) != now[key]]


def digest(checkpoint: pathlib.Path) -> str:
  """SHA-256 of a checkpoint's tensors."""
  return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
