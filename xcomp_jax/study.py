"""The paper in miniature: its comparisons on films whose answers are known, with several seeds and intervals.

  python -m xcomp_jax.study --out study                 all cells; hours on 2 cores, goes on where it stopped
  python -m xcomp_jax.study --out study --only tune     those whose names begin so
  python -m xcomp_jax.study --preset quick --out DIR    one tuning and its measures, minutes
  python -m xcomp_jax.study --report                    tables of docs/STUDY.md and plots, from the cells that are there
  python -m xcomp_jax.study --base --out study/base     trains another base
  python -m xcomp_jax.study --model study/base/watch/model --out DIR      all cells with it

A cell is one tuning or what needs none, with all that is measured of it, in docs/study/NAME.json (quick, or another base: in --out).
A cell that is there is not done again; one that was made with another base, other films or another tuning is refused, and so is such
a folder. Run it where configs/, assets/ and docs/ are.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from xcomp_jax import chat, export, films, findings, predecode, qc_comp, train, weights, world
from xcomp_jax.bench_parts import flops, scoring
from xcomp_jax.config import LPCompConfig, ModelConfig, RunConfig, SelectConfig, from_command_line, to_dict
from xcomp_jax.data import prompt
from xcomp_jax.data.batch import Bucket, Example, batch_spec, collate
from xcomp_jax.data.store import Store, open_store
from xcomp_jax.encode import EncodedVideo
from xcomp_jax.files import command, locked, write_json
from xcomp_jax.films import FRAMES, Split
from xcomp_jax.model import lp_comp, vlm

BASE = "assets/study"
CONFIG = "configs/study.py"
CELLS, PAGE, FIGURES = "docs/study", pathlib.Path("docs/STUDY.md"), pathlib.Path("docs/figures")
ROWS = 16  # questions measured at once
BINS = 16  # of places in a film
WIDE = (3, 6, 12, 18, 24)  # clips that are taken of a film of 24
PREFIX, TEXT = 16, 48  # slots for a measured question's tokens before and after the frames
SELECTED = {"window": 24, "long": 24, "hour": 48}  # frames that QC-Comp keeps of a film
FEW = 2  # scenes that are kept when there is no room for all shots
# Modes of QC-Comp that are compared on them, by the question's rows or the answer's.
MODES = {
  "window": ("global", "global_answer"),
  "long": ("uniform", "global", "local", "aligned", "global_answer", "local_answer"),
  "hour": ("uniform", "local", "official"),
}


@dataclasses.dataclass(frozen=True)
class Preset:
  """How much of everything; films are measured by six questions each.

  tuning, heldout: films of 12 scenes. wide: of 24, measured with ever more of their frames. long: of 128, of which
  QC-Comp selects; window: of 32, as long as the base has seen; hour: of 512, for the official mode. steps, seeds: of every
  tuning. rules, free: of configs/study.py, to tune under and to be measured without.
  """

  tuning: int
  heldout: int
  wide: int
  window: int
  long: int
  hour: int
  steps: int | None
  seeds: tuple[int, ...]
  rules: tuple[str, ...]
  free: tuple[str, ...] = ()


PRESETS = {
  "full": Preset(
    3200, 120, 90, 90, 90, 90, None, (0, 1, 2), ("none", "heuristic", "stepwise", "progressive", "uniform", "early"), ("late", "average")
  ),
  "quick": Preset(1280, 60, 0, 0, 8, 0, None, (0,), ("progressive",)),
}
SEED = 11  # of the films


class Asked(NamedTuple):
  """A question about the stored film of that number. scenes: that have to be seen to answer it."""

  film: int
  question: str
  answer: str
  scenes: Sequence[int]


class Study:
  """A folder of work with a base: films, their features, tuned models. What is there already is used again.

  Raises:
    FileNotFoundError: there is no such base.
  """

  def __init__(self, out: pathlib.Path, preset: Preset, base: str | pathlib.Path = BASE):
    self.out, self.preset, self.base = out, preset, pathlib.Path(base)
    if not (self.base / "model.safetensors").exists():
      raise FileNotFoundError(f"{base} has no model.safetensors; run it where {BASE} is, or train a base (--base) and name it by --model")
    sizes = {"tuning": (preset.tuning, 12), "heldout": (preset.heldout, 12), "wide": (preset.wide, 24)}
    sizes |= {"window": (preset.window, 32), "long": (preset.long, 128), "hour": (preset.hour, 512)}
    self.splits = {
      name: Split(name, count, (scenes, scenes), (3, 5), len(films.KINDS) if name == "tuning" else 0)
      for name, (count, scenes) in sizes.items()
    }

  def made(self, splits: Sequence[str], rules: Sequence[str] = ()) -> dict[str, Any]:
    """What everything follows from that comes from these splits and rules."""
    base = hashlib.sha256((self.base / "model.safetensors").read_bytes()).hexdigest()
    films = {name: [self.splits[name].films, self.splits[name].scenes[0], SELECTED.get(name)] for name in splits}
    made = {"base": base, "films": films, "seed": SEED, "rules": {name: to_dict(rule(name)) for name in rules}}
    return _plain(made | (_settings("progressive", self.preset.steps) if "tuning" in splits else {}))

  @functools.cached_property
  def tokenizer(self) -> prompt.Tokenizer:
    """The base's."""
    return prompt.load_tokenizer(str(self.base))

  def store(self, name: str) -> Store:
    """The features of a split's films, made if they are not there."""
    folder = self.out / name
    if not (folder / "features").exists():
      decode(folder, self.splits[name], SEED, tower=str(self.base))
    return open_store(str(folder / "features"))

  def asked(self, name: str) -> list[Asked]:
    """The questions about a split's films, film by film as they are stored, each in the order of KINDS."""
    store, annotations = self.store(name), world.read_annotations(self.out / name / "films", name)
    told = (world.asked(annotations[sample.position]) for sample in store.samples)
    return [Asked(film, *one) for film, several in enumerate(told) for one in several]

  def tuned(self, name: str, seed: int) -> pathlib.Path:
    """The base, tuned under a rule; goes on with a tuning that was stopped.

    Raises:
      ValueError: what is there was made otherwise.
    """
    folder = self.out / f"{name}_{seed}"
    _stamp(folder, self.made(["tuning"], [name]))
    if not (folder / "model").exists():
      self.store("tuning")
      data, steps = self.out / "tuning" / "features", self.preset.steps
      train.run_whole(configured(name, seed=seed, init_from=self.base, workdir=folder / "run", data__train=data, train__steps=steps))
      export.main(["--checkpoint", str(folder / "run"), "--format=torch", "--out", str(folder / "model")])
      shutil.rmtree(folder / "run")
    return folder / "model"

  def measured(self, checkpoint: str | pathlib.Path, cfg: LPCompConfig, name: str, clips: int | None = None) -> dict[str, Any]:
    """Answers to a split's questions from so many clips at equal distances; None: all.

    Returns:
      right: "1" or "0" for every question, film by film in the order of KINDS; hits: likewise, "1" where every scene that
      is needed was shown; tokens: visual ones a layer works on, on average; TFLOP and seconds: of the LLM for one question.
    """
    scenes = self.splits[name].scenes[0]
    shown = even(scenes, clips or scenes)
    return self._answered(load(checkpoint, cfg), self.store(name), [(one, shown) for one in self.asked(name)])

  def _answered(self, model: vlm.VLM, store: Store, asked: Sequence[tuple[Asked, np.ndarray]]) -> dict[str, Any]:
    answers(model, self.tokenizer, store, asked[:ROWS])  # compiles
    begun, right = time.perf_counter(), answers(model, self.tokenizer, store, asked)
    seconds, clips = (time.perf_counter() - begun) / len(asked), len(asked[0][1])
    kept = float(np.mean(lp_comp.counts(model.cfg.lp_comp, model.cfg.llm.layers)))
    hits = np.array([set(one.scenes) <= set(shown) for one, shown in asked])
    spent = {"tokens": kept * clips * FRAMES, "seconds": seconds, "TFLOP": cost(model, clips) / 1e12}
    return {"right": bits(right), "hits": bits(hits)} | spent

  def selected(self, checkpoint: str | pathlib.Path, cfg: LPCompConfig, name: str, modes: Sequence[str]) -> dict[str, Any]:
    """Answers from what QC-Comp selects of a split's films, and what it found, by mode.

    Returns:
      place: of the needed scene, 0 to 1, where it is one, else null.
      MODE: as of `measured`, cost and time with what one of a film's six questions takes to select; rank: how many scenes
      have a higher score than the one that is needed, or null; other: the same by the scores of another question on the film;
      score: of the needed scene, or null; relevance: mean score by place (16 bins) of scenes in which there is nothing to
      see, and of shots; few: right, from the two scenes with the highest scores. Scores are relative to their film's mean.
    """
    model, store, asked = load(checkpoint, cfg), self.store(name), self.asked(name)
    scenes, frames = self.splits[name].scenes[0], SELECTED[name]
    settings = {mode: _setting(mode, frames) for mode in modes if mode != "uniform"}
    kept: dict[str, list[np.ndarray]] = {mode: [] for mode in modes}
    few: dict[str, list[np.ndarray]] = {mode: [] for mode in modes if mode != "official"}  # it scores four scenes together
    needed: dict[str, dict[str, list[float | None]]] = {mode: {"rank": [], "other": [], "score": []} for mode in settings}
    took: dict[str, list[float]] = {mode: [] for mode in settings}
    sums, counts, work = {mode: np.zeros(2 * BINS) for mode in modes}, np.zeros(2 * BINS), {}
    for number in range(len(store.samples)):
      film, several = as_film(store, number), [one for one in asked if one.film == number]
      visible = np.zeros(scenes, int)
      visible[sorted({scene for one in several for scene in one.scenes})] = 1  # all shots: one question needs them all
      where = visible * BINS + np.arange(scenes) * BINS // scenes
      counts += len(several) * np.bincount(where, minlength=2 * BINS)
      prompts = [prompt.ask(self.tokenizer, one.question, store.samples[number].time_message) for one in several]
      if "uniform" in modes:
        kept["uniform"] += [even(scenes, frames // FRAMES)] * len(several)
        few["uniform"] += [even(scenes, FEW)] * len(several)
      for mode, setting in settings.items():
        work[mode] = work.get(mode) or scoring_cost(model, scenes, prompts, setting)
        begun = time.perf_counter()
        chosen = chat.select(model, film, prompts, setting)
        took[mode].append((time.perf_counter() - begun) / len(several))
        kept[mode] += [np.unique(got.frames // FRAMES) for got in chosen]
        scores = np.stack([_by_scene(got, scenes) for got in chosen])
        sums[mode] += np.bincount(where, scores.sum(0), 2 * BINS)
        if mode in few:
          few[mode] += list(np.sort(np.argsort(-scores, axis=1)[:, :FEW]))
        for k, one in enumerate(several):
          scene, own, other = one.scenes[0], scores[k], scores[k - 1]
          values = int((own > own[scene]).sum()), int((other > other[scene]).sum()), round(float(own[scene]), 3)
          for name_of, value in zip(("rank", "other", "score"), values, strict=True):
            needed[mode][name_of].append(value if len(one.scenes) == 1 else None)
    single = [one.scenes[0] if len(one.scenes) == 1 else None for one in asked]
    out: dict[str, Any] = {"place": [None if scene is None else round((scene + 0.5) / scenes, 4) for scene in single]}
    for mode, clips in kept.items():
      out[mode] = self._answered(model, store, list(zip(asked, clips, strict=True)))
      if mode in few:
        out[mode]["few"] = bits(answers(model, self.tokenizer, store, list(zip(asked, few[mode], strict=True))))
      if mode in settings:
        out[mode]["seconds"] += float(np.median(took[mode]))  # of a film: the first one's has compilation in it
        out[mode]["TFLOP"] += work[mode] / 1e12
        out[mode] |= needed[mode]
        out[mode]["relevance"] = np.round(sums[mode] / np.maximum(counts, 1), 4).reshape(2, BINS).tolist()
    return out


# --- what is measured -------------------------------------------------------------------------------------------------


_evaluate = jax.jit(vlm.evaluate)


def answers(
  model: vlm.VLM, tokenizer: prompt.Tokenizer, store: Store, asked: Sequence[tuple[Asked, np.ndarray]]
) -> np.ndarray:
  """Which questions are answered rightly, each from some clips int[C] of its film, as many for all: bool[n].

  An answer is the most probable first token: all are single tokens.
  """
  right = np.zeros(len(asked), bool)
  for first in range(0, len(asked), ROWS):
    part = [_example(tokenizer, store, one, clips) for one, clips in asked[first : first + ROWS]]
    batch = collate(part, _bucket(len(asked[first][1])), ROWS)
    right[first : first + ROWS] = np.asarray(_evaluate(model, batch)[1])[: len(part)] > 0.5
  return right


def _example(tokenizer: prompt.Tokenizer, store: Store, one: Asked, clips: np.ndarray) -> Example:
  turns = world.conversation([(one.question, one.answer)])
  built = prompt.train(tokenizer, turns, store.samples[one.film].time_message, mask="assistant")
  return Example(store.visual(one.film)[clips], built.tokens, built.labels, built.query, one.film)


def _bucket(clips: int) -> Bucket:
  return Bucket(clips, FRAMES, PREFIX, TEXT)


def _setting(mode: str, frames: int) -> SelectConfig:
  name, _, rows = mode.partition("_")
  # The official mode counts the tokens before a question for the real tokenizer (quirk Q11).
  return dataclasses.replace(qc_comp.setting(name, frames, rows=rows or "question"), bias=None)


def cost(model: vlm.VLM, clips: int) -> float:
  """Operations of the LLM for one question about so many clips of features."""
  shape = FRAMES * model.cfg.tokens_per_frame, model.cfg.vision.width
  graph, state = nnx.split(model)
  batch = batch_spec(_bucket(clips), 1, (shape, np.dtype(np.float32)))
  return flops(lambda state, batch: vlm.evaluate(nnx.merge(graph, state), batch)[0], state, batch)


def scoring_cost(model: vlm.VLM, clips: int, questions: Sequence[prompt.Prompt], setting: SelectConfig) -> float:
  """Operations of QC-Comp's scores for one of several questions about a film of so many clips, seen once for all of them."""
  plan = qc_comp.plan(clips * FRAMES, FRAMES, setting)
  rows = min(max(1, setting.round // plan.frames), len(plan.starts))
  graph, state = nnx.split(model)
  watch, score = scoring(graph, plan, setting, rows, questions[0], FRAMES)
  shape = rows, plan.frames // FRAMES, FRAMES * model.cfg.tokens_per_frame, model.cfg.vision.width
  features = jax.ShapeDtypeStruct(shape, np.dtype(np.float32))
  seen, paid = flops(watch, state, features), flops(score, state, jax.eval_shape(watch, state, features))
  return -(-len(plan.starts) // rows) * (seen / len(questions) + paid)


def load(checkpoint: str | pathlib.Path, cfg: LPCompConfig) -> vlm.VLM:
  """A checkpoint to be measured under a rule, in float32."""
  directory = weights.resolve(str(checkpoint))
  model = ModelConfig(FRAMES, None, "float32", "float32", ROWS, "auto", remat=False)
  return weights.load(directory, weights.read_config(directory, model, cfg))


def _by_scene(selection: chat.Selection, scenes: int) -> np.ndarray:
  """Scores by scene, relative to their mean."""
  assert selection.scores is not None  # more frames than are kept
  scores = selection.scores.reshape(scenes, FRAMES).mean(1)
  return scores / scores.mean()


def as_film(store: Store, i: int) -> EncodedVideo:
  """A stored film as QC-Comp takes it."""
  features = store.visual(i).astype(np.float32)
  times = np.arange(len(features) * FRAMES) / world.FPS
  return EncodedVideo({0: features}, times, len(times) / world.FPS, np.zeros((len(features), 1, 1, 3), np.uint8), None, "", "")


def even(scenes: int, clips: int) -> np.ndarray:
  """int[clips] of `scenes`, the middles of equal intervals."""
  return ((np.arange(clips) + 0.5) * scenes / clips).astype(int)


def bits(values: np.ndarray) -> str:
  """bool[n] as a text of 0 and 1."""
  return "".join("01"[int(v)] for v in values)


# --- making -----------------------------------------------------------------------------------------------------------


def decode(folder: pathlib.Path, split: Split, seed: int, tower: str | None) -> None:
  """folder/films and folder/features (with a tower's checkpoint) or folder/frames."""
  if not (folder / "films").exists():
    films.write(folder / "films", split, seed, workers=2)
  settings = predecode.Settings(
    image_size=films.MODEL["tiny_vision"]["image_size"], max_frames=1024, min_frames=FRAMES, fps=world.FPS, clip_frames=FRAMES
  )
  clips = min(16, 1 << (split.scenes[1] - 1).bit_length())  # at once: a film's, which are filled up to as many
  made = predecode.load_tower(tower, settings, clips) if tower else None
  predecode.predecode(
    folder / "films" / f"{split.name}.yaml", folder / ("features" if tower else "frames"), settings, root=folder / "films",
    workers=2, tower=made,
  )


def configured(variant: str, **values: Any) -> RunConfig:
  """A variant of configs/study.py with other values; `__` in their names stands for a dot, and None leaves one as it is."""
  changes = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items() if value is not None]
  return from_command_line(["study", f"--config={CONFIG}:{variant}", *changes])


def _settings(variant: str, steps: int | None = None) -> dict[str, Any]:
  """What a model that is trained by it follows from."""
  config = to_dict(configured(variant, train__steps=steps))
  return {part: config[part] for part in ("data", "optim", "train")}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
  return json.loads(json.dumps(values))  # as it is read back


def rule(name: str) -> LPCompConfig:
  """One of configs/study.py."""
  return configured(name).lp_comp


STAGES = {  # of the base's training: its films, and whether the tower is frozen by then
  "see": (Split("see", 12000, (1, 1), (1, 1), 8, described=1.0), False),
  # No stage after `see` has films of a single shot: nothing has to be found to answer about it, and an average with many of them
  # falls although nothing else is learned.
  "answer": (Split("answer", 8000, (2, 3), (2, 3), 8), True),
  "tell": (Split("tell", 13000, (2, 3), (2, 3), 8, described=0.35), True),
  "again": (Split("again", 13000, (2, 3), (2, 3), 8, described=0.2), True),
  "ask": (Split("ask", 4000, (4, 12), (2, 5), 4, first="order"), True),
  "watch": (Split("watch", 2000, (8, 32), (2, 5), 4, first="order"), True),
}


def train_base(out: pathlib.Path) -> None:
  """The base's stages; the result is out/watch/model. Goes on where it stopped."""
  before = out / "init"
  if not before.exists():
    # In random layers embeddings soon drown, and what a question asks about is found much later.
    world.write_untrained(before, 0, films.MODEL, films.words(), silent_layers=True)
  for stage, (split, frozen) in STAGES.items():
    folder = out / stage
    _stamp(folder, _plain({"films": dataclasses.asdict(split), "seed": SEED} | _settings(stage)))
    if not (folder / "model").exists():
      decode(folder, split, SEED, str(before) if frozen else None)
      data = folder / ("features" if frozen else "frames")
      train.run_whole(configured(stage, init_from=before, workdir=folder / "run", data__train=data))
      export.main(["--checkpoint", str(folder / "run"), "--format=torch", "--out", str(folder / "model")])
    before = folder / "model"
  print(f"a base: {before}; to study it: --model {before} --out DIR", flush=True)


# --- cells ------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
  """name, splits and rules that it comes from, and what does it."""

  name: str
  splits: Sequence[str]
  rules: Sequence[str]
  do: Callable[[], dict[str, Any]]


def cells(study: Study) -> Iterator[Cell]:
  """All cells."""
  preset = study.preset
  rules = list(dict.fromkeys(("none", *preset.rules, *preset.free)))
  wide, window = (["wide"] if preset.wide else []), (["window"] if preset.window else [])
  yield Cell("base", ["heldout"], rules, lambda: {"heldout": {name: study.measured(study.base, rule(name), "heldout") for name in rules}})
  if wide:
    both = ["none", "progressive"]
    yield Cell("base_frames", wide, both, lambda: {"wide": {name: _by_frames(study, study.base, name) for name in both}})
  yield Cell("base_select", ["long", *window], ["none"], lambda: _selections(study, study.base, "none", ["long", *window]))
  for seed in preset.seeds:
    for name in preset.rules:
      under = preset.rules if name == "none" else (name,)  # the same tuning, and then compression without tuning for it
      yield Cell(f"tune_{name}_{seed}", ["tuning", "heldout", *wide], under, functools.partial(_tuning, study, name, seed, under))
    selections = {"select": ["long", *window]}
    if preset.hour and seed == preset.seeds[0]:  # a quarter of an hour: one seed says enough
      selections["official"] = ["hour"]
    for kind, splits in selections.items():
      yield Cell(f"{kind}_{seed}", ["tuning", *splits], ["progressive"], functools.partial(_tuned_selections, study, seed, splits))


def _tuning(study: Study, name: str, seed: int, under: Sequence[str]) -> dict[str, Any]:
  model = study.tuned(name, seed)
  out: dict[str, Any] = {"heldout": {other: study.measured(model, rule(other), "heldout") for other in under}}
  if study.preset.wide and name in ("none", "progressive", "early"):
    out["wide"] = {name: _by_frames(study, model, name)}
  return out


def _tuned_selections(study: Study, seed: int, splits: Sequence[str]) -> dict[str, Any]:
  return _selections(study, study.tuned("progressive", seed), "progressive", splits)


def _selections(study: Study, model: str | pathlib.Path, name: str, splits: Sequence[str]) -> dict[str, Any]:
  return {split: study.selected(model, rule(name), split, MODES[split]) for split in splits}


def _by_frames(study: Study, model: str | pathlib.Path, name: str) -> dict[str, dict[str, Any]]:
  return {str(clips * FRAMES): study.measured(model, rule(name), "wide", clips) for clips in WIDE}


def run(study: Study, where: pathlib.Path, only: str) -> None:
  """Does the cells whose names begin with `only` and that are not in `where` yet.

  Raises:
    ValueError: no cell is called so, or what is in the study's folder or `where` was made otherwise.
  """
  every = list(cells(study))
  todo = [cell for cell in every if cell.name.startswith(only)]
  if not todo:
    raise ValueError(f"--only {only}: no cell's name begins so; there are {', '.join(cell.name for cell in every)}")
  _stamp(study.out, study.made(list(study.splits)))
  where.mkdir(parents=True, exist_ok=True)
  for number, cell in enumerate(todo, 1):
    file, made = where / f"{cell.name}.json", study.made(cell.splits, cell.rules)
    if file.exists():
      _agree(file, json.loads(file.read_text()).get("made", {}), made, "remove it to do it again")
      continue
    print(f"cell {number} of {len(todo)}: {cell.name}", flush=True)
    for split in cell.splits:
      study.store(split)  # several cells': not part of this one's time
    begun = time.perf_counter()
    write_json(file, {"made": made, "result": cell.do(), "seconds": time.perf_counter() - begun})


def _stamp(folder: pathlib.Path, made: dict[str, Any]) -> None:
  """Says in a folder what it comes from, or refuses one that comes from something else."""
  file = folder / "made.json"
  if not file.exists():
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, made)
  _agree(file, json.loads(file.read_text()), made, f"give --out another folder, or remove {folder}")


def _agree(file: pathlib.Path, before: dict[str, Any], made: dict[str, Any], advice: str) -> None:
  if other := [key for key in made if before.get(key) != made[key]]:
    raise ValueError(f"{file} was made otherwise ({', '.join(other)}): {advice}")


def _alone(out: pathlib.Path) -> contextlib.AbstractContextManager[None]:
  out.mkdir(parents=True, exist_ok=True)
  return locked(out / ".lock", ValueError(f"another command is at work in {out}; wait for it, or give --out another folder"))


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("study"), help="folder of films, features and models")
  parser.add_argument("--preset", choices=list(PRESETS), default="full")
  parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path(BASE), help="the base; a folder with a checkpoint")
  parser.add_argument("--only", default="", metavar="NAME", help="cells whose names begin so")
  parser.add_argument("--report", action="store_true", help="only tables and plots, from the cells that are there")
  parser.add_argument("--base", action="store_true", help="train a base instead")
  f = parser.parse_args(argv)
  with command(interrupted="interrupted; what was finished stays, and the same command goes on"):
    full = f.preset == "full" and f.model == pathlib.Path(BASE)  # the one that the page is about
    where = pathlib.Path(CELLS) if full else f.out / "cells"
    if f.base or not f.report:
      with _alone(f.out):
        train_base(f.out) if f.base else run(Study(f.out, PRESETS[f.preset], f.model), where, f.only)
    if not f.base:
      findings.report(where, *((PAGE, FIGURES) if full else ()))


if __name__ == "__main__":
  main()
