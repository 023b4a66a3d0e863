"""The embedded base model: a miniature VideoChat-Flash, trained from nothing and without compression.

  make base

makes the synthetic videos (`xcomp_jax.world`), decodes them, and runs three stages, tower included; every stage
starts from the last one's export. About half an hour on 2 CPU cores; the last step of each stage had loss 0.006 (one),
0.37 (two) and 0.22 (many). By hand, for stage `one`:

  python -m xcomp_jax.world --init demo/base/init
  python -m xcomp_jax.world --out demo/base/one/world --train 5000 --heldout 0 --scenes 1 1 --questions 0 --seed 100
  python -m xcomp_jax.predecode --root demo/base/one/world --mixture demo/base/one/world/train.yaml
      --out demo/base/one/train --image_size 48 --min_frames 8
  python -m xcomp_jax.train --config=configs/base.py:one
  python -m xcomp_jax.export --checkpoint demo/base/one/run --format=torch --out demo/base/one/model
"""

from ml_collections import ConfigDict, FieldReference

STAGES = {  # learning rate, epochs, frame buckets, text buckets
  "one": (2e-3, 2, (8,), (64,)),  # to see: videos of one scene to describe
  "two": (1e-3, 1, (8, 16), (160,)),  # to answer: four questions about one or two scenes
  "many": (1e-3, 1, (32, 48), (160,)),  # to find: three to six scenes
}


def get_config(stage: str = "one") -> ConfigDict:
  """The values of a stage.

  Raises:
    ValueError: there is no such stage.
  """
  if stage not in STAGES:
    raise ValueError(f"configs/base.py has no stage {stage!r}; known: {', '.join(STAGES)}")
  rate, epochs, frames, text = STAGES[stage]
  free = lambda value: FieldReference(value, field_type=object)
  before = {"one": "init", "two": "one/model", "many": "two/model"}[stage]
  c = ConfigDict()
  c.seed = 0
  c.workdir = f"demo/base/{stage}/run"
  c.init_from = f"demo/base/{before}"

  c.model = ConfigDict()
  c.model.clip_frames = free(8)
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
  c.data.train = f"demo/base/{stage}/train"
  c.data.heldout = free(None)
  c.data.frame_buckets = frames
  c.data.text_buckets = text
  c.data.prefix_length = 16
  c.data.frames_per_device = 192
  c.data.mask = "assistant"  # nothing but answers: everything else in these texts is the same each time
  c.data.group_by_text_length = False
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
  c.train.vision = True
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
  return c
