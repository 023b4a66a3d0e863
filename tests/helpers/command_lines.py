"""What fuzzing and killing have in common: lines of commands, and the environment of these."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]


def environment() -> None:
  """Sets what a process needs that runs commands of this checkout one after the other."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ["JAX_NUM_CPU_DEVICES"] = "1"
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
  # or every run would compile again
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
  os.environ.setdefault("MPLCONFIGDIR", str(ROOT / ".cache" / "matplotlib"))
  sys.path.insert(0, str(ROOT))


def predecode(world: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
  return [
    "xcomp_jax.predecode",
    "--mixture",
    str(world / "mixture.yaml"),
    "--root",
    str(world),
    "--image-size=16",
    "--min-frames=8",
    "--max-frames=16",
    *more,
    "--out",
    str(out),
  ]


def evaluate(
  checkpoint: pathlib.Path,
  questions: pathlib.Path,
  videos: pathlib.Path,
  out: pathlib.Path,
  *more: str,
) -> list[str]:
  return [
    "xcomp_jax.evaluate",
    "--task=lvbench",
    "--annotations",
    str(questions),
    "--videos",
    str(videos),
    f"--checkpoint={checkpoint}",
    "--preset=none",
    "--devices=1",
    *more,
    "--out",
    str(out),
  ]


def export(checkpoint: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
  return [
    "xcomp_jax.export",
    "--format=torch",
    "--checkpoint",
    str(checkpoint),
    *more,
    "--out",
    str(out),
  ]


def needles(checkpoint: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
  return [
    "xcomp_jax.needles",
    f"--checkpoint={checkpoint}",
    "--mode=aligned",
    "--repeat=1",
    "--select=8",
    *more,
    "--out",
    str(out),
  ]


def questions(videos: list[str]) -> list[dict]:
  """Annotations of the task that `evaluate` is given: two questions about each video."""
  return [
    {
      "video": name,
      "type": "a",
      "question": f"{text}?",
      "candidates": ["(A) x", "(B) y"],
      "answer": "(B) y",
      "question_type": ["a"],
    }
    for name in videos
    for text in ("Who", "Where")
  ]
