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

from ml_collections import ConfigDict, FieldReference

# learning rate, films in a batch, epochs, tower trained, frames and text of a row: films are of one
# length, so each has its own
STAGES = {
  "see": (3e-3, 16, 2, True, 2, 64),  # one shot to describe; the tower is frozen as it is then
  "answer": (
    2e-3,
    8,
    2,
    False,
    6,
    160,
  ),  # questions about two or three: which one is asked about has to be found
  "tell": (
    2e-3,
    8,
    2,
    False,
    6,
    160,
  ),  # the same and descriptions, without which motion is forgotten
  "again": (
    2e-3,
    8,
    2,
    False,
    6,
    160,
  ),  # both, at the full rate: digits, motion and order are found late
  "ask": (1.5e-3, 8, 2, False, 24, 96),  # up to five in up to 12 scenes
  "watch": (1e-3, 8, 1, False, 64, 96),  # in up to 32, as many as a window of QC-Comp has
}
TUNING = (2e-3, 8, 1, False, 24, 128)  # the same for all rules

# At every layer so many tokens of 16, by all rules 7.6 on average of eight layers (paper, Table 2);
# operations differ by up to a seventh.
STEPS = (16, 16, 8, 8, 8, 2, 2, 1)
RULES = {  # schedule and keep
  "none": ("cosine", "none"),
  "heuristic": (
    STEPS,
    "attention",
  ),  # VideoChat-Flash's drop of what is attended least (FACTS.md 13)
  "stepwise": (STEPS, "suffix"),
  "progressive": ("cosine", "suffix"),  # XComp
  "uniform": ("cosine", "uniform"),
  # Not of the paper:
  "early": ((11, 10, 9, 9, 8, 7, 6, 1), "suffix"),
  "late": ((16, 16, 16, 8, 2, 1, 1, 1), "suffix"),
  "average": ("cosine", "avgpool"),
}


def get_config(variant: str = "see") -> ConfigDict:
  """The values of a stage of the base, or of a tuning under a rule.

  Raises:
    ValueError: there is no such variant.
  """
  if variant not in STAGES | RULES:
    raise ValueError(f"no variant {variant!r}; known: {', '.join(STAGES | RULES)}")
  tuned = variant in RULES
  rate, batch, epochs, vision, frames, text = TUNING if tuned else STAGES[variant]
  schedule, keep = RULES.get(variant, RULES["none"])  # the base is trained without compression

  def free(value):
    return FieldReference(value, field_type=object)

  base, before = (
    pathlib.PurePath("study/base"),
    dict(zip(STAGES, ["init", *(f"{stage}/model" for stage in STAGES)])),
  )
  c = ConfigDict()
  c.seed = 0
  c.workdir = f"study/{variant}_0/run" if tuned else str(base / variant / "run")
  c.init_from = "assets/study" if tuned else str(base / before[variant])
  c.compilation_cache = free(None)

  c.model = ConfigDict()
  c.model.clip_frames = free(2)
  c.model.yarn = free(None)  # positions as trained
  c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
  c.model.param_dtype = "float32"
  c.model.clips_per_chunk = 16  # all of a film: a chunk costs little memory at 48 pixels
  c.model.attention = "einsum"
  c.model.remat = False

  c.lp_comp = ConfigDict()
  c.lp_comp.schedule = free(schedule)
  c.lp_comp.keep = keep
  c.lp_comp.group = 16

  c.data = ConfigDict()
  c.data.train = free(
    "study/tuning/features" if tuned else str(base / variant / ("frames" if vision else "features"))
  )
  c.data.weights = free(None)
  c.data.heldout = free(None)
  c.data.shapes = free(((batch, 1, frames, text),))
  c.data.prefix_length = 16
  c.data.frames_per_device = 1024
  c.data.text_per_device = 8192
  c.data.mask = (
    "assistant"  # nothing but answers: everything else in these texts is the same each time
  )
  c.data.threads = 1
  c.data.prefetch = 2

  c.optim = ConfigDict()
  c.optim.learning_rate = rate
  c.optim.warmup = 0.05
  c.optim.weight_decay = 0.0
  c.optim.clip_norm = 1.0
  c.optim.b1 = 0.9
  c.optim.b2 = 0.98
  c.optim.eps = 1e-8

  c.train = ConfigDict()
  c.train.batch_size = batch
  c.train.epochs = epochs
  c.train.steps = free(None)
  c.train.vision = vision
  c.train.projector = True
  c.train.llm = True
  c.train.projector_max_frames = free(None)
  c.train.log_every = 50
  c.train.eval_every = 250
  c.train.save_every = 1000
  c.train.keep_last = 1
  c.train.keep_every = free(None)

  c.mesh = ConfigDict()
  c.mesh.data = -1  # so small a model lies on every device
  c.mesh.fsdp = 1
  c.mesh.tensor = 1
  c.mesh.context = 1

  c.distributed = ConfigDict()
  c.distributed.coordinator = free(None)
  c.distributed.processes = free(None)
  c.distributed.process = free(None)
  c.distributed.start_seconds = 600
  c.distributed.heartbeat_seconds = 100
  return c
