r"""The embedded base model: a miniature VideoChat-Flash, trained from nothing and without
compression.

  make base

makes the synthetic videos (`xcomp_jax.world`), decodes them, and runs three stages, the first two
with the tower; every one starts from the last one's export. About three quarters of an hour on 2
CPU cores; the last steps of the stages had loss 0.006 (see), 0.044 (answer) and 0.126 (find). By
hand, for stage `see`:

  python -m xcomp_jax.world --init demo/base/init
  python -m xcomp_jax.world --out demo/base/see/world --train 5000 --heldout 0 --scenes 1 1 \
      --questions 0 --seed 100
  python -m xcomp_jax.predecode --root demo/base/see/world --out demo/base/see/train \
      --mixture demo/base/see/world/train.yaml --image-size 48 --min-frames 8
  python -m xcomp_jax.train --config=configs/base.py:see
  python -m xcomp_jax.export --checkpoint demo/base/see/run --format=torch \
      --out demo/base/see/model
"""

import pathlib
import runpy

from ml_collections import ConfigDict

SCT = runpy.run_path(str(pathlib.Path(__file__).with_name("sct.py")))  # wherever this runs

# What a stage has of its own: the stage it goes on from, and learning rate, epochs, whether the
# tower is trained; shapes are rows; samples, frames and tokens of text in a row.
STAGES = {
  # videos of one scene to describe
  "see": {"after": "init", "rate": 2e-3, "epochs": 2, "vision": True, "shapes": ((8, 1, 8, 64),)},
  # four questions about one scene
  "answer": {
    "after": "see/model",
    "rate": 1e-3,
    "epochs": 1,
    "vision": True,
    "shapes": ((8, 1, 8, 160),),
  },
  # four questions about two to six scenes
  "find": {"after": "answer/model", "rate": 1e-3, "epochs": 1, "vision": False, "shapes": None},
}


def get_config(stage: str = "see") -> ConfigDict:
  """The values of a stage: those of `configs/sct.py:tiny`, and what differs.

  Raises:
    ValueError: there is no such stage.
  """
  if stage not in STAGES:
    raise ValueError(f"no stage {stage!r}; known: {', '.join(STAGES)}")
  own = STAGES[stage]
  c = SCT["get_config"]("tiny")
  c.update(
    {
      "seed": 0,  # 42 is that of the release
      "workdir": f"demo/base/{stage}/run",
      "init_from": f"demo/base/{own['after']}",
      "model": {
        "clip_frames": 8,  # the base is made, so no checkpoint says it
        "yarn": None,  # positions as trained
      },
      "lp_comp": {
        "schedule": "cosine",  # has no effect,
        "keep": "none",  # since the base is trained without compression
      },
      "data": {
        "train": f"demo/base/{stage}/train",
        "heldout": None,  # the demo measures the tuned model
        "shapes": own["shapes"],  # of one length, but for those of `find`
        "frames_per_device": 192,  # of the rows of `find`
      },
      "optim": {
        "learning_rate": own["rate"],
        "warmup": 0.05,  # of few steps a larger share
      },
      "train": {
        "epochs": own["epochs"],
        "vision": own["vision"],  # it starts from nothing, too
        "projector_max_frames": None,  # so does the projector
        "log_every": 50,  # a step takes a fraction of a second
        "eval_every": 250,
        "save_every": 1000,  # a stage takes minutes
        "keep_last": 1,  # which is exported
      },
      "mesh": {"context": 1},  # rows are short
    }
  )
  return c
