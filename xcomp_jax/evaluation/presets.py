"""Settings of the paper and of the released logs."""

from typing import Any

from xcomp_jax.evaluation.annotations import TaskError

# selected; Table B
PAPER_FRAMES = {
  "lvbench": 2048,
  "mlvu": 1024,
  "videomme_long": 512,
  "longvideobench": 256,
}

# FACTS.md 9
LOGS = {
  "mlvu": {"select": 256, "repeat": 2},
  "videomme_long": {"select": 512, "repeat": 8},
}
COMMON = {
  "mode": "official",
  "min_frames": 128,
  "fps": 8.0,
  "rate": "average",
  "context": 131072,
  "max_new_tokens": 16,
  "temperature": 0.0,
}


def preset(name: str, task: str) -> dict[str, Any]:
  """The options that a preset fixes.

  "paper": clips of 8 frames as trained (InternVideo2: 4), official QC-Comp, frames and repetitions
  of Table B (MVBench, which has none: 512, its rule of thumb). The paper does not say how many
  frames it selects from; here twice as many, at least the 1,024 from which the release selects at
  all. "released-logs": what the two logs of the release were made with, as far as can be told:
  config.json's own clips (quirk Q1), and the repetition penalty of generation_config.json (quirk
  Q20).

  Raises:
    TaskError: the release has no log of this task.
  """
  task = task.removesuffix("_best_option")
  if name == "paper":
    select = PAPER_FRAMES.get(task, 512)
    return COMMON | {
      "select": select,
      "repeat": 2,
      "max_frames": max(1024, 2 * select),
      "clip_frames": "auto",
      "repetition_penalty": 1.0,
    }
  if name != "released-logs":
    raise TaskError(
      f"there is no preset {name}; known: paper, released-logs, none", where="--preset", value=name
    )
  if task not in LOGS:
    raise TaskError(
      f"the release has no log of {task}, only of {' and '.join(LOGS)}; take --preset paper",
      where="--task",
      value=task,
      allowed=list(LOGS),
    )
  return (
    COMMON
    | LOGS[task]
    | {"max_frames": 1024, "clip_frames": "checkpoint", "repetition_penalty": 1.1}
  )
