"""The miniature of the paper: its films, its base, and models tuned from it under the rules of
configs/study.py.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from xcomp_jax import export, predecode
from xcomp_jax.config import LPCompConfig, RunConfig
from xcomp_jax.config_io import from_command_line, to_dict
from xcomp_jax.data import predecoding, prompt
from xcomp_jax.data.store import Store, open_store
from xcomp_jax.files import write_json
from xcomp_jax.inputs import read_json
from xcomp_jax.synthetic import films, world
from xcomp_jax.synthetic.films import FRAMES, FilmSplit
from xcomp_jax.training import loop

BASE = "assets/study"
CONFIG = "configs/study.py"
SEED = 11  # of the films


@dataclasses.dataclass(frozen=True)
class Amounts:
  """How much of everything; films are measured by six questions each.

  tuning, heldout: films of 12 scenes. wide: of 24, measured with ever more of their frames. long:
  of 128, of which QC-Comp selects; window: of 32, as long as the base has seen; hour: of 512, for
  the official mode. seeds: of every tuning.
  rules, others: of configs/study.py, to tune under; what is tuned without compression is measured
  under `rules` too.
  longer: epochs of longer tunings, or 0.
  """

  tuning: int
  heldout: int
  wide: int
  window: int
  long: int
  hour: int
  seeds: tuple[int, ...]
  rules: tuple[str, ...]
  others: tuple[str, ...] = ()
  longer: int = 0


PRESETS = {
  "full": Amounts(
    3200,
    120,
    90,
    90,
    90,
    90,
    (0, 1, 2),
    ("none", "heuristic", "stepwise", "progressive", "uniform", "early"),
    ("late", "average"),
    3,
  ),
  "quick": Amounts(1280, 60, 0, 0, 8, 0, (0,), ("progressive",)),
}


class AskedFilm(NamedTuple):
  """A question about the stored film of that number. scenes: that have to be seen to answer it."""

  film: int
  question: str
  answer: str
  scenes: Sequence[int]


class Study:
  """A folder of work with a base: films, their features, tuned models. What is there already is
  used again.

  Raises:
    FileNotFoundError: there is no such base.
  """

  def __init__(self, out: pathlib.Path, preset: Amounts, base: str | pathlib.Path = BASE):
    self.out, self.preset, self.base = out, preset, pathlib.Path(base)
    if not (self.base / "model.safetensors").exists():
      raise FileNotFoundError(
        f"{base} has no model.safetensors; run it where {BASE} is, or train a base (--base) and "
        f"name it by --model"
      )
    sizes = {
      "tuning": (preset.tuning, 12),
      "heldout": (preset.heldout, 12),
      "wide": (preset.wide, 24),
    }
    sizes |= {"window": (preset.window, 32), "long": (preset.long, 128), "hour": (preset.hour, 512)}
    self.splits = {
      name: FilmSplit(
        name, count, (scenes, scenes), (3, 5), len(films.KINDS) if name == "tuning" else 0
      )
      for name, (count, scenes) in sizes.items()
    }

  def made(
    self, splits: Sequence[str], rules: Sequence[str] = (), epochs: int = 1
  ) -> dict[str, Any]:
    """What comes from these splits, under these rules, depends on, to be compared with what it was
    made from (`differences`).
    """
    films = {name: dataclasses.asdict(self.splits[name]) for name in splits}
    made = {
      "base": self._digest,
      "films": films,
      "seed": SEED,
      "rules": {name: to_dict(study_rule(name)) for name in rules},
    }
    # of all rules the same
    return made | (
      variant_settings("progressive", train__epochs=epochs) if "tuning" in splits else {}
    )

  @functools.cached_property
  def _digest(self) -> str:
    return digest(self.base)

  @functools.cached_property
  def tokenizer(self) -> prompt.Tokenizer:
    """The base's."""
    return prompt.load_tokenizer(str(self.base))

  def store(self, name: str) -> Store:
    """The features of a split's films, made if they are not there.

    Raises:
      ValueError: what is there was made otherwise.
    """
    folder = self.out / name
    write_origin(folder, self.made([name]))
    if not (folder / "features").exists():
      decode_films(folder, self.splits[name], SEED, tower=str(self.base))
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
      ValueError: what is there was made otherwise.
    """
    folder = self.out / (f"{name}_{seed}" if epochs == 1 else f"{name}_{seed}_{epochs}_epochs")
    write_origin(folder, self.made(["tuning"], [name], epochs))
    if not (folder / "model").exists():
      self.store("tuning")
    films = self.out / "tuning" / "features"
    return train_variant(
      folder, name, seed=seed, init_from=self.base, data__train=films, train__epochs=epochs
    )


def decode_films(folder: pathlib.Path, split: FilmSplit, seed: int, tower: str | None) -> None:
  """folder/films and folder/features (with a tower's checkpoint) or folder/frames."""
  if not (folder / "films").exists():
    films.write_films(folder / "films", split, seed, workers=2)
  settings = predecoding.FrameSettings(
    image_size=films.MODEL["tiny_vision"]["image_size"],
    max_frames=1024,
    min_frames=FRAMES,
    fps=world.FPS,
    clip_frames=FRAMES,
  )
  # at once: a film's, which are filled up to as many
  clips = min(16, 1 << (split.scenes[1] - 1).bit_length())
  made = predecode.load_tower(tower, settings, clips) if tower else None
  predecoding.predecode(
    folder / "films" / f"{split.name}.yaml",
    folder / ("features" if tower else "frames"),
    settings,
    root=folder / "films",
    workers=2,
    tower=made,
  )


def configured(variant: str, **values: Any) -> RunConfig:
  """A variant of configs/study.py with other values; `__` in their names stands for a dot."""
  changes = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]
  return from_command_line(["study", f"--config={CONFIG}:{variant}", *changes])


def variant_settings(variant: str, **values: Any) -> dict[str, Any]:
  """What a model that is trained by a variant depends on, but for its rule."""
  config = to_dict(configured(variant, **values))
  return {part: config[part] for part in ("data", "optim", "train")}


def train_variant(folder: pathlib.Path, variant: str, **values: Any) -> pathlib.Path:
  """folder/model, trained by a variant of configs/study.py with other values if it is not there;
  goes on with a run that was stopped.
  """
  run, model = folder / "run", folder / "model"
  if not model.exists():
    loop.run_whole(configured(variant, workdir=run, **values))
    export.main(["--checkpoint", str(run), "--format=torch", "--out", str(model)])
  shutil.rmtree(run, ignore_errors=True)
  return model


def study_rule(name: str) -> LPCompConfig:
  """One of configs/study.py."""
  return configured(name).lp_comp


STAGES = {  # of the base's training: its films, and whether the tower is frozen by then
  "see": (FilmSplit("see", 12000, (1, 1), (1, 1), 8, described=1.0), False),
  # No stage after `see` has films of a single shot: nothing has to be found to answer about it, and
  # an average with many of them falls although nothing else is learned.
  "answer": (FilmSplit("answer", 8000, (2, 3), (2, 3), 8), True),
  "tell": (FilmSplit("tell", 13000, (2, 3), (2, 3), 8, described=0.35), True),
  "again": (FilmSplit("again", 13000, (2, 3), (2, 3), 8, described=0.2), True),
  "ask": (FilmSplit("ask", 4000, (4, 12), (2, 5), 4, first="order"), True),
  "watch": (FilmSplit("watch", 2000, (8, 32), (2, 5), 4, first="order"), True),
}


def train_study_base(out: pathlib.Path) -> None:
  """The base's stages; the result is out/watch/model. Goes on where it stopped.

  Raises:
    ValueError: what is there was made otherwise.
  """
  before, words = out / "init", films.film_words()
  write_origin(out, {"model": films.MODEL, "words": words})
  if not before.exists():
    # In random layers embeddings soon drown, and what a question asks about is found much later.
    world.write_untrained(before, 0, films.MODEL, words, silent_layers=True)
  for stage, (split, frozen) in STAGES.items():
    folder = out / stage
    write_origin(
      folder,
      {"before": digest(before), "films": dataclasses.asdict(split), "seed": SEED}
      | variant_settings(stage),
    )
    if not (folder / "model").exists():
      decode_films(folder, split, SEED, str(before) if frozen else None)
    before = train_variant(
      folder, stage, init_from=before, data__train=folder / ("features" if frozen else "frames")
    )
  print(f"a base: {before}; to study it: --model {before} --out DIR", flush=True)


def write_origin(folder: pathlib.Path, made: dict[str, Any]) -> None:
  """Says in a folder what it comes from.

  Raises:
    ValueError: it comes from something else.
  """
  file = folder / "made.json"
  if not file.exists():
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, made)
    return
  if other := differences(read_json(file, ValueError), made):
    raise ValueError(
      f"{file} was made otherwise ({', '.join(other)}): give --out another folder, or remove "
      f"{folder}"
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
