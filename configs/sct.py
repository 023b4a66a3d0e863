r"""Supervised compression tuning: every value of a run, with its unit and where it comes from.

  python -m xcomp_jax.train --config=configs/sct.py --config.data.train=DIR \
      --config.workdir=runs/sct

DIR is written by `python -m xcomp_jax.predecode`; the recipe is that command's defaults (128 to
1,024 frames, at most 8 a second) and --subset=0.25, and training prints what DIR was written with.
Without suffix this is the paper's 2B recipe (Table A, train.sh of the release, FACTS.md 3):
  hardware  8 x H100, about 24 h in the paper, 71,927 samples
  steps     2,247 of 32 samples
  loss      0.63 at the first step, 0.69 on average (released log)
Variants, as in `configs/sct.py:tiny`:
  tiny      the model that comes with the package, on its synthetic videos; minutes on a laptop's
            CPU
  7b        the 7B model, same recipe; the paper has no numbers for it
Of `predecode --features` with this checkpoint DIR holds what the frozen tower makes of the frames;
training on it is the same without the tower, at 1,024 frames a sixth of the work (docs/LOG.md).
Override any value: `--config.optim.learning_rate=2e-5`, `--config.train.steps=100`,
`--config.mesh.fsdp=4`.
"""

from ml_collections import ConfigDict, FieldReference

# What differs from the paper's recipe, by variant.
VARIANTS = {
  "": {},
  "tiny": {
    "workdir": "runs/tiny",
    "init_from": "assets/tiny",  # the miniature VideoChat-Flash of configs/base.py
    "compilation_cache": None,  # too small to need it
    "distributed": {"coordinator": None},  # one process
    "model": {
      "dtype": "float32",  # CPUs gain nothing from bfloat16
      "clips_per_chunk": 8,  # all of a video
      # the fastest to train with on a CPU as long as the score matrix is small
      "attention": "einsum",
      "remat": False,  # so small a model's activations fit
    },
    # Half of the tokens at every layer: faster than the cosine, costs more, and gains more by
    # tuning (docs/LOG.md).
    "lp_comp": {"schedule": (8, 4, 2, 1, 1, 1)},
    "data": {
      "train": "demo/data/train",  # `make demo` makes both
      "heldout": "demo/data/heldout",
      "frames_per_device": 384,  # all of a step fits one micro-batch
      "mask": "assistant",  # all other texts of these videos are alike
      "threads": 1,  # a laptop has few cores
      "prefetch": 2,
    },
    "optim": {
      "learning_rate": 1e-3,  # so small a model takes larger steps
      "b2": 0.98,  # a few hundred steps
    },
    "train": {
      "batch_size": 8,  # so that few samples are many steps
      "log_every": 10,  # a step takes a fraction of a second
      "eval_every": 100,
      "save_every": 100,
    },
  },
  "7b": {
    "workdir": "runs/sct_7b",
    "init_from": "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448",
  },
}


def get_config(variant: str = "") -> ConfigDict:
  """The values of a variant.

  Raises:
    ValueError: there is no such variant.
  """
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; known: {', '.join(v for v in VARIANTS if v)}")
  c = _paper()
  c.update(VARIANTS[variant])
  return c


def _open(value) -> FieldReference:
  """A value that may be overridden with another type, such as None."""
  return FieldReference(value, field_type=object)


def _paper() -> ConfigDict:
  c = ConfigDict()
  c.seed = 42  # of the data order; the release's trainer default
  c.workdir = "runs/sct"  # checkpoints, logs, the resolved config
  c.init_from = "OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448"  # directory, hub id, or Orbax export
  # folder: a stopped run goes on without compiling again; None: none
  c.compilation_cache = _open("runs/compiled")

  c.model = ConfigDict()
  # frames: 8, 4 for InternVideo2; or a number, or "checkpoint": what config.json says (quirk Q1)
  c.model.clip_frames = _open("auto")
  # what config.json's rope_scaling says; None; or (4.0, 32768), Qwen2.5's factor and positions
  c.model.yarn = _open("checkpoint")
  c.model.dtype = "bfloat16"  # of the computation
  c.model.param_dtype = "float32"  # of trained parameters and optimizer state
  # clips of a device in the tower at once: by its memory; or a number
  c.model.clips_per_chunk = _open("auto")
  c.model.attention = "auto"  # the fastest that the device has
  c.model.remat = (
    True  # recompute activations in the backward pass (gradient checkpointing in train.sh)
  )

  c.lp_comp = ConfigDict()
  # as the release rounds it; "cosine_ceil" is the paper's Eq. 1
  c.lp_comp.schedule = _open("cosine")
  c.lp_comp.keep = "suffix"  # the last tokens of every group (paper 3.2)
  c.lp_comp.group = 16  # consecutive visual tokens

  c.data = ConfigDict()
  c.data.train = _open("data/sct")  # folder written by predecode, or several: ("data/a", "data/b")
  # how often an epoch reads a sample of each, e.g. (1.0, 0.25); None: once
  c.data.weights = _open(None)
  c.data.heldout = _open(None)  # folder written by predecode; None: no evaluation
  # Of micro-batches: rows over all devices; samples, frames, and tokens after the visual slots of a
  # row. ((8, 4, 1024, 2048), ...);
  # each compiles once. None: at most four, chosen from the data's lengths for the devices that
  # there are.
  c.data.shapes = _open(None)
  c.data.prefix_length = 16  # tokens before it; the chat header has 14
  # at most in a micro-batch; a row on several devices (context) has as many times: bounds memory
  c.data.frames_per_device = 1024
  c.data.text_per_device = 8192  # likewise tokens after the visual slot
  c.data.mask = (
    "official"  # every newline, <|im_start|> and <|im_end|> is supervised too (quirk Q16)
  )
  c.data.threads = 4  # readers per process
  c.data.prefetch = 4  # micro-batches, and calls of the tower; a clip takes 5 MB

  c.optim = ConfigDict()
  c.optim.learning_rate = 1e-5  # peak (Table A); then a cosine to 0
  c.optim.warmup = 0.03  # share of all steps (Table A)
  c.optim.weight_decay = 0.0  # Table A
  c.optim.clip_norm = 1.0  # the release's trainer default
  c.optim.b1 = 0.9  # AdamW, likewise
  c.optim.b2 = 0.999
  c.optim.eps = 1e-8

  c.train = ConfigDict()
  c.train.batch_size = 32  # samples per step: 8 devices x 4 accumulated
  c.train.epochs = 1
  c.train.steps = _open(None)  # None: as many as the epochs have
  c.train.vision = False  # frozen
  c.train.projector = True  # as in train.sh; the paper's Table A lists the LLM only
  c.train.llm = True
  # frames from which a sample gives the projector no gradient (quirk Q17); None: never
  c.train.projector_max_frames = _open(512)
  c.train.log_every = 1  # steps
  c.train.eval_every = 500  # steps
  c.train.save_every = 250  # steps
  c.train.keep_last = 2  # checkpoints
  c.train.keep_every = _open(None)  # steps; None: only the last ones

  c.mesh = ConfigDict()
  c.mesh.data = 1  # devices
  # and context: what is predicted to be fastest. Splits rows, parameters and optimizer state
  c.mesh.fsdp = -1
  c.mesh.tensor = (
    1  # heads (must divide those of keys), MLP channels and the vocabulary; within a host
  )
  c.mesh.context = -1  # splits each row's sequence, parameters and optimizer state

  c.distributed = ConfigDict()
  # as TPU pods, GKE and SLURM say; HOST:PORT of process 0; None: one process
  c.distributed.coordinator = _open("auto")
  c.distributed.processes = _open(None)  # with HOST:PORT: how many,
  c.distributed.process = _open(None)  # and which of them this is
  c.distributed.start_seconds = 600  # in which all must have come up
  c.distributed.heartbeat_seconds = 100  # a process that gives no sign for so long is gone
  return c
