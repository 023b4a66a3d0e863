"""Whole commands over the damaged files of `fuzz_subjects`."""

import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import command_lines
import fuzz_subjects
from fuzz_subjects import (
  FILMS,
  LOOK,
  LP_COMP,
  MODEL,
  NAMED,
  PARTS,
  STILLS,
  digest,
  right_mixture,
  tensors,
)
from fuzzing import Command, Subject

# What commands import is imported before the first fork.
from watched import load_frames

from xcomp_jax import ask, evaluate, export, predecode  # noqa: F401
from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.data import prompt, store
from xcomp_jax.evaluation import needles  # noqa: F401
from xcomp_jax.inference import encoded_video
from xcomp_jax.parity import parity  # noqa: F401

Line = Callable[[pathlib.Path, pathlib.Path, pathlib.Path], list[str]]


def above(file: pathlib.Path, given: pathlib.Path) -> pathlib.Path:
  """The folder of `given` that a file lies in."""
  return next(folder for folder in file.parents if folder.parent == given)


def asking(checkpoint: str | pathlib.Path, what: list[str]) -> list[str]:
  return ["xcomp_jax.ask", f"--checkpoint={checkpoint}", *LOOK, *what]


def ask_line(given, file, out) -> list[str]:
  """Asks with the damaged file in its place."""
  checkpoint, what = (
    given / "tiny",
    ["--video", str(given / "world" / "videos" / "film.mp4"), "--question=Which?"],
  )
  if file.parent.parent == given and (file.parent / "config.json").exists():
    checkpoint = file.parent
  elif given / "orbax" in file.parents:
    checkpoint = given / "orbax"
  elif file.suffix == ".npz":
    what = ["--encoded", str(file), "--question=Which?"]
  elif file.suffix == ".txt":
    what = [*what[:2], "--questions", str(file)]
  else:
    what[1] = str(file)
  return asking(checkpoint, what)


def said(given, file, out, stdout) -> Any:
  return stdout


def read_asked(given, file) -> Any:
  return pathlib.Path(file).read_bytes().decode("utf-8-sig").split()


def read_film(given, file) -> Any:
  """Of this model's tower, unlike `read_encoded`."""
  model = loading.load_model(given / "tiny", read_vlm_config(given / "tiny", MODEL, LP_COMP))
  found = encoded_video.load_video(file, model)
  return {
    "features": [list(found.features[0].shape), digest(found.features[0])],
    "times": digest(found.times),
    "seconds": found.seconds,
  }


def right_film(given, file, good, found) -> str:
  return "" if found["features"][0] == good["features"][0] else "takes features of another shape"


QUESTIONS = Subject(
  name="questions of ask", files=(), read=read_asked, right=lambda *_: "", plain=True
)
FILM = Subject(name="encoded video of tiny", files=(), read=read_film, right=right_film)


def predecode_line(given, file, out) -> list[str]:
  return command_lines.predecode(given / "world", out, "--workers=0")


def predecoded(given, file, out, stdout) -> Any:
  if not (out / "store.json").exists():
    return None
  opened = store.open_store(out)  # without JAX
  return [
    [s.source.rpartition("/")[2], s.frames, list(s.conversations), digest(opened.visual(i))]
    for i, s in enumerate(opened.samples)
  ]


def read_world(given, file) -> Any:
  """Whether predecode should take it: annotations without faults, and files of which a clip can be
  read.
  """
  found = fuzz_subjects.read_mixture(given, file)
  if faults := [fault for job in found["jobs"] for fault in job["faults"]]:
    raise prompt.AnnotationError(f"{file.name}: {faults[0]}")
  for job in found["jobs"]:
    if job["reader"] is not None:
      part = {"read_type": job["reader"], "start": job["start"], "end": job["end"]}
      load_frames(
        job["sample"]["source"],
        size=16,
        max_frames=16,
        min_frames=8,
        fps=8.0,
        clip_frames=8,
        style="train",
        **part,
      )
  return found


def right_world(given, file, good, found) -> str:
  return (
    right_mixture(given, file, good, found) if file.suffix in (".json", ".jsonl", ".yaml") else ""
  )


WORLD = Subject(name="world", files=(), read=read_world, right=right_world)


def verify_line(given, file, out) -> list[str]:
  return ["xcomp_jax.predecode", "--verify", str(above(file, given) / "data")]


def inspect_line(given, file, out) -> list[str]:
  return [
    "xcomp_jax.predecode",
    "--inspect",
    str(above(file, given) / "data"),
    "--sheet",
    f"{out}.png",
  ]


def export_line(given, file, out) -> list[str]:
  return command_lines.export(above(file, given), out)


def exported(given, file, out, stdout) -> Any:
  """The tensors of an export in the official layout."""
  return tensors(out / "model.safetensors") if (out / "model.safetensors").exists() else None


def evaluate_line(given, file, out) -> list[str]:
  questions, videos = given / "bench" / "questions.json", given / "world" / "videos"
  return command_lines.evaluate(given / "tiny", questions, videos, out, *LOOK)


def evaluated(given, file, out, stdout) -> Any:
  """(video, question, answer) of all, in the order of the annotations."""
  if not (out / "samples.jsonl").exists():
    return None
  lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().split("\n") if line]
  return [[os.path.basename(line["video"]), line["prompt"], line.get("answer")] for line in lines]


def others_answered(good, found) -> str:
  """A bad video costs its own questions."""
  if found is None:
    return "answers nothing about the other videos"
  wrong = [
    b
    for a, b in zip(good, found, strict=True)
    if a != b and (b[2] is not None or not b[0].startswith("film"))
  ]
  return f"answers something else: {wrong[0]}" if wrong else ""


def needles_line(given, file, out) -> list[str]:
  own = ["--needles", str(given / "needles" / "needles.json"), "--images", str(given / "needles")]
  haystack = ["--haystack", str(given / "world" / "videos" / "film.mp4")]
  size = ["--clips-per-chunk=2", "--frames", "32", "--depths", "0.5", "--min-frames=8"]
  return command_lines.needles(given / "tiny", out, *own, *haystack, *size)


def found_needles(given, file, out, stdout) -> Any:
  if not (out / "results.json").exists():
    return None
  found = json.loads((out / "results.json").read_text())
  return [found["right"], found["found"], found["cells"]]


def parity_line(given, file, out) -> list[str]:
  return ["xcomp_jax.parity", str(given / "recorded")]


def rows(given, file, out, stdout) -> Any:
  return re.findall(r"\b(pass|FAIL|absent)\b", stdout)


def command(
  name: str,
  subject: str | Subject,
  files: tuple[str, ...],
  line: Line,
  result: Callable[..., Any],
  **more,
) -> Command:
  return Command(
    name=name,
    subject=NAMED[subject] if isinstance(subject, str) else subject,
    files=files,
    line=line,
    result=result,
    **more,
  )


WORLD_FILES = (
  "world/videos/v?.mp4",
  "world/videos/still*.png",
  "world/videos/move.gif",
  "world/videos/steps/*",
)
COMMANDS = (
  command("ask about a video", "video", FILMS, ask_line, said),
  command("ask about a picture", "image", (*STILLS, "world/videos/move.gif"), ask_line, said),
  command(
    "ask with a config", "config.json", ("tiny/config.json", "tiny/xcomp.json"), ask_line, said
  ),
  command(
    "ask with weights", "index", ("tiny/model.safetensors", "sharded/model*"), ask_line, said
  ),
  command(
    "ask with a tokenizer", "tokenizer", tuple(f"tiny/{name}" for name in PARTS), ask_line, said
  ),
  command("ask an encoded video", FILM, ("film/film.npz",), ask_line, said),
  command("ask questions of a file", QUESTIONS, ("asked/questions.txt",), ask_line, said),
  command(
    "evaluate with a bad video",
    "video",
    ("world/videos/film.mp4",),
    evaluate_line,
    evaluated,
    apart=others_answered,
  ),
  command(
    "evaluate bad questions", "questions", ("bench/questions.json",), evaluate_line, evaluated
  ),
  command(
    "predecode annotations",
    WORLD,
    ("world/mixture.yaml", "world/*.json", "world/*.jsonl"),
    predecode_line,
    predecoded,
  ),
  command("predecode files", WORLD, WORLD_FILES, predecode_line, predecoded),
  command(
    "verify",
    "shards, verified",
    ("*/data/store.json", "*/data/manifest.jsonl", "*/data/*/*"),
    verify_line,
    said,
  ),
  command(
    "inspect",
    "shards",
    ("store/data/store.json", "jpeg/data/*/*"),
    inspect_line,
    lambda *_: None,
  ),
  command(
    "export",
    "index",
    ("tiny/*.json", "tiny/*.safetensors", "sharded/model*"),
    export_line,
    exported,
  ),
  command("export an Orbax checkpoint", "Orbax", ("orbax/params/**/*",), export_line, exported),
  command("needles", "needles", ("needles/*",), needles_line, found_needles),
  command(
    "parity",
    "recorded arrays",
    ("recorded/vectors.npz",),
    parity_line,
    rows,
    verdict=r"recorded .*FAIL",
  ),
)
