"""The study of the paper in miniature (docs/STUDY.md): its base model, and its tunings.

  python -m xcomp_jax.study --base --out study/base
  python -m xcomp_jax.study --out study

A base is a miniature VideoChat-Flash of eight layers, trained from nothing and without compression
on films of `xcomp_jax.synthetic.films`: stages `see`, `answer`, `tell`, `again`, `ask`, `watch`,
the first with the tower; every one starts from the last one's export. (The one in assets/study had
ten, by hand: docs/LOG.md.) A row of the study's tables is tuned by the variant of its rule, as
`configs/study.py:progressive`; the command sets seeds.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

SCT = runpy.run_path(str(pathlib.Path(__file__).with_name("sct.py")))  # wherever this runs

# What a stage has of its own; frames and text are those of a row: films are of one length, so each
# has its own.
LATER = {"rate": 2e-3, "batch": 8, "epochs": 2, "vision": False, "frames": 6, "text": 160}
STAGES = {
  # one shot to describe; the tower is frozen as it is then
  "see": {"rate": 3e-3, "batch": 16, "epochs": 2, "vision": True, "frames": 2, "text": 64},
  "answer": LATER,  # questions about two or three: which one is asked about has to be found
  "tell": LATER,  # the same and descriptions, without which motion is forgotten
  "again": LATER,  # both, at the full rate: digits, motion and order are found late
  "ask": LATER | {"rate": 1.5e-3, "frames": 24, "text": 96},  # up to five in up to 12 scenes
  # in up to 32, as many as a window of QC-Comp has
  "watch": LATER | {"rate": 1e-3, "epochs": 1, "frames": 64, "text": 96},
}
TUNING = LATER | {"epochs": 1, "frames": 24, "text": 128}  # the same for all rules

# At every layer so many tokens of 16, by all rules 7.6 on average of eight layers (paper, Table 2);
# operations differ by up to a seventh.
STEPS = (16, 16, 8, 8, 8, 2, 2, 1)
RULES = {  # schedule and keep
  "none": ("cosine", "none"),
  # VideoChat-Flash's drop of what is attended least (FACTS.md 13)
  "heuristic": (STEPS, "attention"),
  "stepwise": (STEPS, "suffix"),
  "progressive": ("cosine", "suffix"),  # XComp
  "uniform": ("cosine", "uniform"),
  # Not of the paper:
  "early": ((11, 10, 9, 9, 8, 7, 6, 1), "suffix"),
  "late": ((16, 16, 16, 8, 2, 1, 1, 1), "suffix"),
  "average": ("cosine", "avgpool"),
}


def get_config(variant: str = "see") -> ConfigDict:
  """The values of a stage of the base, or of a tuning under a rule: those of `configs/sct.py:tiny`,
  and what differs.

  Raises:
    ValueError: there is no such variant.
  """
  if variant in RULES:
    own, (schedule, keep) = TUNING, RULES[variant]
    places = {"workdir": f"study/{variant}_0/run", "init_from": "assets/study"}
    data = "study/tuning/features"
  elif variant in STAGES:
    own, (schedule, keep) = STAGES[variant], RULES["none"]  # trained without compression
    before = dict(zip(STAGES, ["init", *(f"{stage}/model" for stage in STAGES)]))[variant]
    places = {"workdir": f"study/base/{variant}/run", "init_from": f"study/base/{before}"}
    data = f"study/base/{variant}/{'frames' if own['vision'] else 'features'}"
  else:
    raise ValueError(f"no variant {variant!r}; known: {', '.join(STAGES | RULES)}")
  c = SCT["get_config"]("tiny")
  c.update(
    places,
    seed=0,  # 42 is that of the release
    model={
      "clip_frames": 2,  # a film's shot
      "yarn": None,  # positions as trained
      "clips_per_chunk": 16,  # all of a film: a chunk costs little memory at 48 pixels
    },
    lp_comp={"schedule": schedule, "keep": keep},
    data={
      "train": data,
      "heldout": None,  # the study measures by itself
      "shapes": ((own["batch"], 1, own["frames"], own["text"]),),
      "frames_per_device": 1024,  # has no effect where shapes are named
    },
    optim={"learning_rate": own["rate"], "warmup": 0.05},  # of few steps a larger share
    train={
      "batch_size": own["batch"],
      "epochs": own["epochs"],
      "vision": own["vision"],
      "projector_max_frames": None,  # the projector starts from nothing, too
      "log_every": 50,  # a step takes a fraction of a second
      "eval_every": 250,
      "save_every": 1000,  # a run takes minutes
      "keep_last": 1,  # which is exported
    },
    mesh={"data": -1, "fsdp": 1, "context": 1},  # so small a model lies on every device
  )
  return c
