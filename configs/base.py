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

from ml_collections import ConfigDict, FieldReference

# learning rate, epochs, tower trained, shapes: rows; samples, frames and tokens of text in a row
STAGES = {
  "see": (2e-3, 2, True, ((8, 1, 8, 64),)),  # videos of one scene to describe
  "answer": (1e-3, 1, True, ((8, 1, 8, 160),)),  # four questions about one scene
  "find": (1e-3, 1, False, None),  # four questions about two to six scenes
}


def get_config(stage: str = "see") -> ConfigDict:
  """The values of a stage.

  Raises:
    ValueError: there is no such stage.
  """
  if stage not in STAGES:
    raise ValueError(f"no stage {stage!r}; known: {', '.join(STAGES)}")
  rate, epochs, vision, shapes = STAGES[stage]

  def free(value):
    return FieldReference(value, field_type=object)

  before = {"see": "init", "answer": "see/model", "find": "answer/model"}[stage]
  c = ConfigDict()
  c.seed = 0
  c.workdir = f"demo/base/{stage}/run"
  c.init_from = f"demo/base/{before}"
  c.compilation_cache = free(None)

  c.model = ConfigDict()
  c.model.clip_frames = free(8)
  c.model.yarn = free(None)  # positions as trained
  c.model.dtype = "float32"  # CPUs gain nothing from bfloat16
  c.model.param_dtype = "float32"
  c.model.clips_per_chunk = 8  # all of a video: a chunk costs little memory at 48 pixels
  c.model.attention = "einsum"
  c.model.remat = False

  c.lp_comp = ConfigDict()
  c.lp_comp.schedule = free("cosine")
  c.lp_comp.keep = "none"  # the base is trained without compression
  c.lp_comp.group = 16

  c.data = ConfigDict()
  c.data.train = free(f"demo/base/{stage}/train")
  c.data.weights = free(None)
  c.data.heldout = free(None)
  c.data.shapes = free(shapes)
  c.data.prefix_length = 16
  c.data.frames_per_device = 192
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
  c.train.batch_size = 8
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
  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.mesh.tensor = 1
  c.mesh.context = 1

  c.distributed = ConfigDict()
  c.distributed.coordinator = free(None)
  c.distributed.processes = free(None)
  c.distributed.process = free(None)
  c.distributed.start_seconds = 600
  c.distributed.heartbeat_seconds = 100
  return c
