"""What a run is made of: frozen dataclasses without defaults.

`configs/*.py` hold every value as a nested `ml_collections.ConfigDict`; `from_command_line` and
`from_dict` turn one into a `RunConfig` here and nowhere else, so a key that is unknown, missing or
of the wrong type dies at start, and so does a value that no run can have (`check_run`).
The sizes of the model are not in a config: they come from the checkpoint
(`sizes.read_vlm_config`).
"""

import dataclasses
import math
import operator
from typing import Annotated, Literal

from xcomp_jax.errors import XCompError
from xcomp_jax.inputs import beyond

Path = Annotated[str, "path"]  # a leading ~ is the home directory


class ConfigError(XCompError, ValueError):
  """A config that can't be run; the message says which key and what to write instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
  """Sizes that every tower has."""

  image_size: int  # pixels, square
  patch_size: int  # pixels
  width: int
  layers: int  # blocks that are built: one fewer than the official depth
  heads: int  # also the heads that token merging averages its metric over (FACTS.md 8)
  mlp_width: int

  @property
  def patches(self) -> int:
    """Patches per frame."""
    return (self.image_size // self.patch_size) ** 2

  def tokens(self, frames: int) -> int:
    """What a clip's blocks work on."""
    return frames * self.patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerConfig):
  """The UMT-L tower (FACTS.md 7)."""

  table: Literal["umt", "umt-hd"]  # how the fixed position table is resized


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVideo2Config(TowerConfig):
  """The InternVideo2 tower (FACTS.md 7)."""

  frames: int  # of a clip: its learned positions are those of so many frames, and of a single image

  def tokens(self, frames: int) -> int:
    """What a clip's blocks work on: the class token, too."""
    return 1 + frames * self.patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """YaRN's stretched rotary positions (`model.rope`); Qwen2.5's rule is factor 4 over 32,768
  positions.
  """

  factor: float
  positions: int  # that the model was trained on
  beta_fast: float  # turns within those from which on a frequency stays as it is,
  beta_slow: float  # and up to which it is divided by the factor
  attention: float  # what rotated queries and keys are multiplied by ("mscale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMConfig:
  """Sizes of the Qwen2 decoder."""

  vocab_size: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_width: int
  rope_theta: float
  rope_scaling: Yarn | None
  norm_eps: float
  tied: bool  # the embedding table is the output head
  # tokens of a prompt, visual ones before compression included; None: not known
  context: int | None


Dtype = Literal["bfloat16", "float32", "float16"]  # training has no float16: `check_trained`
# see `attention.attend`
Attention = Literal[
  "auto", "einsum", "flash", "mosaic", "triton", "cudnn", "splash", "xla_chunked", "tiled"
]
Keep = Literal["suffix", "uniform", "stride", "avgpool", "none", "attention"]


@dataclasses.dataclass(frozen=True)
class LPCompConfig:
  """LP-Comp (paper 3.2): how many tokens of a group each layer sees, and which ones stay."""

  schedule: str | tuple[int, ...]  # "cosine", "cosine_ceil", or tokens per group for every layer
  keep: Keep
  group: int  # consecutive visual tokens in a group; 16 in the release


COSINE = LPCompConfig(schedule="cosine", keep="suffix", group=16)  # as released


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
  """Says what a checkpoint was tuned with; None: it doesn't say."""

  lp_comp: LPCompConfig
  clip_frames: int | None = None  # that the tower saw together
  image_size: int | None = None  # pixels, square
  dtype: Dtype | None = None  # of the computation
  context: int | None = None  # tokens of a prompt, visual ones before compression included


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """What a run decides about the model, beside its checkpoint."""

  # Frames the tower sees together. "auto": as tuned, else 8 as XComp was trained, or what a tower
  # for clips of one length takes; "checkpoint": config.json's own (quirk Q1).
  clip_frames: int | Literal["auto", "checkpoint"]
  # Stretched positions: (factor, positions trained on); "checkpoint": config.json's own; None:
  # none.
  yarn: tuple[float, ...] | Literal["checkpoint"] | None
  dtype: Dtype  # of the computation
  param_dtype: Dtype  # of trained parameters and optimizer state
  # clips in the tower at once; "auto": by the device's memory (`sizes.clips_at_once`)
  clips_per_chunk: int | Literal["auto"]
  attention: Attention
  remat: bool  # recompute each layer's activations in the backward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class VLMConfig:
  """A model that can be built: sizes from the checkpoint, choices from the run."""

  vision: VisionConfig | InternVideo2Config
  llm: LLMConfig
  lp_comp: LPCompConfig
  clip_frames: int
  tokens_per_frame: int  # after merging: 16
  dtype: str
  clips_per_chunk: int
  attention: str
  remat: bool

  @property
  def clip_tokens(self) -> int:
    """Visual tokens of one clip after merging."""
    return self.clip_frames * self.tokens_per_frame


Mode = Literal["official", "aligned", "local", "global"]
Rows = Literal["question", "answer"]
Mask = Literal["official", "assistant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
  """QC-Comp (paper 3.3): which frames a question keeps. `qc_comp.select_config` has the values of
  each mode.
  """

  mode: Mode
  frames: int  # to keep
  repeat: int  # times that a frame is scored, in rounds that start elsewhere
  round: int  # frames scored together, without the overlap
  window: int  # frames that share a softmax; 0: a whole round
  stride: int  # frames from one window to the next
  # first and last layer whose attention counts, of 28; other depths in proportion
  layers: tuple[int, int]
  causal: bool  # a question's row sees the text up to itself; False: all of it (quirk Q2)
  bias: int | None  # text tokens before the question; None: as many as there are (quirk Q11)
  # whose attention counts: its tokens' (paper), or that of the prompt's last one, which the answer
  # follows
  rows: Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What is read, and the few shapes that it is packed into."""

  train: Path | tuple[Path, ...]  # folder written by predecode, or several
  weights: tuple[float, ...] | None  # how often an epoch reads a sample of each folder; None: once
  heldout: Path | None  # folder written by predecode; None: no evaluation while training
  # Of micro-batches: (rows over all devices; samples, frames, and tokens after the visual slots of
  # a row). None: chosen from the data.
  shapes: tuple[tuple[int, ...], ...] | None
  prefix_length: int  # tokens before the visual slot, padded
  frames_per_device: int  # the most of a chosen row, for each device that shares it
  text_per_device: int  # likewise tokens after the visual slot
  mask: Mask  # which tokens are supervised (FACTS.md 3)
  threads: int  # of the reader
  prefetch: int  # micro-batches, and calls of the tower, read ahead


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """AdamW with warm-up and cosine decay to zero."""

  learning_rate: float
  warmup: float  # share of all steps
  weight_decay: float
  clip_norm: float
  b1: float
  b2: float
  eps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """The loop."""

  batch_size: int  # samples per optimizer step, over all devices
  epochs: int
  steps: int | None  # stop earlier than the epochs say
  vision: bool  # train the tower (SCT freezes it)
  projector: bool
  llm: bool
  # samples of this many frames give the projector no gradient (512 in the release, quirk Q17)
  projector_max_frames: int | None
  log_every: int  # steps, as all below
  eval_every: int
  save_every: int
  keep_last: int  # checkpoints
  keep_every: int | None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices per axis; one of them, or fsdp and context, may be -1: what is left
  (`mesh.mesh_sizes`).
  """

  data: int  # splits samples
  fsdp: int  # splits samples, parameters and optimizer state
  tensor: int  # splits heads, MLP channels and the vocabulary
  context: int  # splits every sample's own sequence, parameters and optimizer state


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig:
  """How the processes of a run find each other (`hosts.joined`)."""

  # HOST:PORT of process 0, reached by all; "auto": as the cluster says; None: one process
  coordinator: str | None
  processes: int | None  # with HOST:PORT: how many,
  process: int | None  # and which of them this is
  start_seconds: int  # in which all must have come up
  heartbeat_seconds: int  # a process that gives no sign for so long is gone


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """All of a training run."""

  seed: int
  workdir: Path  # checkpoints, logs, and the resolved config
  init_from: Path  # checkpoint directory, hub id, or Orbax export
  # folder where compiled programs are kept for later runs; None: as JAX is set up
  compilation_cache: Path | None
  model: ModelConfig
  lp_comp: LPCompConfig
  data: DataConfig
  optim: OptimConfig
  train: TrainConfig
  mesh: MeshConfig
  distributed: DistributedConfig


MOST = 1_000_000  # of nearly everything that is counted
BOUNDS = {  # of a run's integers
  "seed": range(2**32),
  "model.clip_frames": range(1, 1_001),
  "model.clips_per_chunk": range(1, 1_001),
  "lp_comp.group": range(1, MOST + 1),
  "data.prefix_length": range(1, MOST + 1),
  "data.frames_per_device": range(1, MOST + 1),
  "data.text_per_device": range(1, 10 * MOST + 1),
  "data.threads": range(1_001),
  "data.prefetch": range(1_001),
  "train.batch_size": range(1, MOST + 1),
  "train.epochs": range(1, 1_001),
  "train.steps": range(1, 1000 * MOST + 1),
  "train.projector_max_frames": range(1, MOST + 1),
  "train.log_every": range(1, 1000 * MOST + 1),
  "train.eval_every": range(1, 1000 * MOST + 1),
  "train.save_every": range(1, 1000 * MOST + 1),
  "train.keep_last": range(1, MOST + 1),
  "train.keep_every": range(1, 1000 * MOST + 1),
  "mesh.data": range(-1, MOST + 1),
  "mesh.fsdp": range(-1, MOST + 1),
  "mesh.tensor": range(-1, MOST + 1),
  "mesh.context": range(-1, MOST + 1),
  "distributed.start_seconds": range(1, MOST + 1),
  "distributed.heartbeat_seconds": range(5, MOST + 1),
}
SHAPE = (
  f"must be one or more of (rows, samples, frames, text), each from 1 to {MOST:,}, as ((8, "
  f"4, 1024, 2048),), or None: chosen from the data"
)
YARN = (
  'must be (factor, positions trained on), from 1 to 1e9, as (4.0, 32768); "checkpoint"; or None'
)


def check_run(config: RunConfig) -> None:
  """Values that no run can have.

  Raises:
    ConfigError: all of them.
  """
  t, o, d, yarn = config.train, config.optim, config.data, config.model.yarn
  found = {key: operator.attrgetter(key)(config) for key in BOUNDS}
  problems = {
    f"config.{key}": text
    for key, value in found.items()
    if isinstance(value, int) and (text := beyond(f"config.{key}", value, BOUNDS[key]))
  }
  if not (t.vision or t.projector or t.llm):
    problems["config.train"] = (
      "config.train trains nothing: set one of vision, projector, llm to True"
    )
  rules = [
    (
      "model.yarn",
      yarn in (None, "checkpoint")
      or (len(yarn) == 2 and all(1 <= number <= 1e9 for number in yarn)),
      YARN,
    ),
    ("data.shapes", d.shapes is None or (all(map(_is_shape, d.shapes)) and d.shapes), SHAPE),
    ("optim.learning_rate", 0 < o.learning_rate < math.inf, "must be a number above 0"),
    ("optim.warmup", 0 <= o.warmup <= 1, "is a share of all steps, from 0 to 1"),
    ("optim.weight_decay", 0 <= o.weight_decay < math.inf, "must be a number from 0 on"),
    (
      "optim.clip_norm",
      0 < o.clip_norm < math.inf,
      "must be a number above 0; a large one such as 1e9 clips nothing",
    ),
    ("optim.b1", 0 <= o.b1 < 1, "must be from 0 to below 1"),
    ("optim.b2", 0 <= o.b2 < 1, "must be from 0 to below 1"),
    ("optim.eps", 0 < o.eps < math.inf, "must be a number above 0"),
  ]
  problems |= {
    f"config.{key}": f"config.{key} = {operator.attrgetter(key)(config)}: {words}"
    for key, holds, words in rules
    if not holds
  }
  if problems:
    raise ConfigError("; ".join(problems.values()), where=list(problems))


def check_trained(model: ModelConfig) -> None:
  """Refuses to train in float16.

  Raises:
    ConfigError: what to take instead.
  """
  for name in ("dtype", "param_dtype"):
    if getattr(model, name) == "float16":
      raise ConfigError(
        f"config.model.{name} = 'float16': it is for asking. Small gradients would be 0 in it, "
        "and loss scaling, which would help, is not built: take bfloat16, or float32 on a card "
        "without it (T4)",
        where=f"config.model.{name}",
        value="float16",
      )


def _is_shape(values: tuple[int, ...]) -> bool:
  return len(values) == 4 and 1 <= min(values) and max(values) <= MOST
