"""The parts of the model that benchmarks time: each a function with its arguments, operations and
bytes.

Parameters are random, in the compute dtype; nothing is read from disk.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.config import (
  COSINE,
  Attention,
  Dtype,
  LLMConfig,
  MeshConfig,
  ModelConfig,
  OptimConfig,
  SelectConfig,
  VisionConfig,
  VLMConfig,
)
from xcomp_jax.data.batch import Length, Shape, batch_spec, fake_batch
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.inference import generate
from xcomp_jax.inference.rounds import PREFIX, scoring
from xcomp_jax.model import qc_comp, qwen2, token_merging, vlm
from xcomp_jax.parallel.mesh import make_mesh
from xcomp_jax.plan import cost
from xcomp_jax.training import metrics, optim, steps

# The official code's own benchmark on a CPU.
MEASURED = LLMConfig(
  vocab_size=4096,
  width=512,
  layers=28,
  heads=8,
  kv_heads=2,
  head_dim=64,
  mlp_width=1408,
  rope_theta=1e6,
  rope_scaling=None,
  norm_eps=1e-6,
  tied=True,
  context=None,
)
TOWER = VisionConfig(
  image_size=448, patch_size=16, width=1024, layers=23, heads=16, mlp_width=4096, table="umt-hd"
)
SMALL_LLM = dataclasses.replace(
  MEASURED, vocab_size=128, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp_width=64
)
SMALL_TOWER = VisionConfig(
  image_size=48, patch_size=8, width=32, layers=2, heads=4, mlp_width=64, table="umt-hd"
)
OPTIM = OptimConfig(
  learning_rate=1e-5, warmup=0.0, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """One program.

  run: function of `args`. args: arrays, or ShapeDtypeStructs where nothing will be run. flops:
  operations that its results need, a multiply-add as two, half of causal attention; padding,
  recomputation and softmax are not counted.
  amount: of what `unit` says, in one call. donated: which arguments it uses up and returns, by
  their place in both. bytes: that must be moved; None: arguments and results once.
  """

  run: Callable
  args: tuple
  flops: float
  amount: float
  unit: str
  donated: tuple[int, ...] = ()
  bytes: float | None = None


def flops(function, *args) -> float:
  """Floating-point operations of all matrix products of a function (`cost.count_flops`)."""
  return cost.count_flops(jax.make_jaxpr(function)(*args), lambda shape: True).total


def sized(
  like: str | None,
  dtype: Dtype,
  clips_per_chunk: int = 4,
  attention: Attention = "auto",
  remat: bool = False,
) -> VLMConfig:
  """Sizes of `like`'s config.json with the released cosine, those of the official benchmark (None),
  or tiny ones ("small").

  Raises:
    CheckpointError: a config.json that is missing or can't be used.
  """
  if like in (None, "small"):
    return VLMConfig(
      vision=SMALL_TOWER if like else TOWER,
      llm=SMALL_LLM if like else MEASURED,
      lp_comp=COSINE,
      clip_frames=8,
      tokens_per_frame=16,
      dtype=dtype,
      clips_per_chunk=clips_per_chunk,
      attention=attention,
      remat=remat,
    )
  model = ModelConfig(
    clip_frames=8,
    yarn="checkpoint",
    dtype=dtype,
    param_dtype=dtype,
    clips_per_chunk=clips_per_chunk,
    attention=attention,
    remat=remat,
  )
  return read_vlm_config(pathlib.Path(like), model, COSINE)


def without_tower(cfg: VLMConfig) -> VLMConfig:
  """The model with next to no tower, for parts that don't use it."""
  return dataclasses.replace(
    cfg, vision=dataclasses.replace(cfg.vision, width=64, layers=1, heads=2, mlp_width=64)
  )


def without_llm(cfg: VLMConfig) -> VLMConfig:
  """Likewise the LLM."""
  return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=1, vocab_size=8))


def _random(cfg: VLMConfig, real: bool) -> tuple[nnx.GraphDef, nnx.State]:
  def make():
    return vlm.VLM(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(cfg.dtype))

  return nnx.split(jax.jit(make)() if real else nnx.eval_shape(make))


def _array(real: bool, shape: tuple[int, ...], dtype: Any) -> Any:
  """Random numbers, or their shape alone: 8,192 frames are 5 GB."""
  if not real:
    return jax.ShapeDtypeStruct(shape, dtype)
  draw = jax.random.bits if np.dtype(dtype) == np.uint8 else jax.random.normal
  return jax.jit(lambda: draw(jax.random.key(0), shape, dtype))()


def _ones(function: Callable, *args) -> Any:
  """Arrays such as a function gives, without running it."""
  return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), jax.eval_shape(function, *args))


def _useful(cfg: VLMConfig, frames: int, text: int, pixels: bool) -> dict[str, float]:
  of = metrics.forward_flops(cfg, [Length(frames, 8, PREFIX, text - PREFIX)], pixels)
  return {part: float(each.sum()) for part, each in of.items()}


def tower(cfg: VLMConfig, clips: int, real: bool = True) -> Part:
  """The tower with merging on so many clips of 8 frames, `cfg.clips_per_chunk` at a time."""
  cfg, size = without_llm(cfg), cfg.vision.image_size
  graph, state = _random(cfg, real)

  def run(state, frames):
    return vlm.encode_frames(nnx.merge(graph, state), frames)

  return Part(
    run=run,
    args=(state, _array(real, (clips, 8, size, size, 3), np.uint8)),
    flops=_useful(cfg, 8 * clips, PREFIX + 1, True)["vision"],
    amount=8 * clips,
    unit="frames",
  )


def merging(cfg: VLMConfig, clips: int) -> Part:
  """Token merging alone; its operations are all those of its matrix products."""
  x = _array(True, (clips, 8 * cfg.vision.patches, cfg.vision.width), cfg.dtype)

  def run(x):
    return token_merging.merge(x, 8 * cfg.tokens_per_frame, cfg.vision.heads)

  return Part(run=run, args=(x,), flops=flops(run, x), amount=8 * clips, unit="frames")


def prefill_part(
  cfg: VLMConfig,
  frames: int,
  text: int,
  compressed: bool = True,
  real: bool = True,
  room: int = 16,
) -> Part:
  """Prefill of given visual tokens and `text` tokens: every layer's cache, and the next token's
  logits.
  """
  lp_comp = cfg.lp_comp if compressed else dataclasses.replace(COSINE, keep="none")
  cfg = dataclasses.replace(without_tower(cfg), lp_comp=lp_comp)
  graph, state = _random(cfg, real)
  after, groups = text - PREFIX, frames * cfg.tokens_per_frame // cfg.lp_comp.group

  def run(state, x):
    model, one = nnx.merge(graph, state), lambda n: jnp.full((1, 1), n)
    lengths = qwen2.Lengths(one(PREFIX), one(groups), one(after))
    out = qwen2.run_layers(model.llm, x, lengths, prefix=PREFIX, text=after, caches=True)
    return generate.start(model, out, after, one(after)[0], room)

  x = _array(real, (1, text + frames * cfg.tokens_per_frame, cfg.llm.width), cfg.dtype)
  logits = 2.0 * cfg.llm.width * cfg.llm.vocab_size * text  # the last row's alone are made
  useful = _useful(cfg, frames, text, False)["llm"] - logits
  return Part(run=run, args=(state, x), flops=useful, amount=frames, unit="frames")


def decode_function(cfg: VLMConfig, tokens: int) -> Callable:
  """A function (state, what `prefill_part` leaves) -> so many tokens int32[B, tokens]."""
  graph, _ = _random(without_tower(cfg), False)

  def run(params, state):
    greedy = generate.stack_sampling([generate.Sampling(tokens, ())] * len(state.logits))
    return generate.decode_tokens(nnx.merge(graph, params), state, greedy, tokens)[0]

  return run


def decoding_part(cfg: VLMConfig, frames: int, text: int, tokens: int, answers: int = 1) -> Part:
  """So many tokens of answers, one after the other, behind so many frames each; a token is a
  product with every parameter.
  """
  begun = prefill_part(cfg, frames, text, room=tokens)
  state = dataclasses.replace(_ones(begun.run, *begun.args), free=jnp.int32(tokens))
  state = jax.tree.map(lambda a: a.repeat(answers, 0) if a.ndim else a, state)
  m, keys = cfg.llm, sum(cache.key.shape[1] for cache in state.caches)
  useful = (
    2.0 * m.layers * m.width * (2 * (m.heads + m.kv_heads) * m.head_dim + 3 * m.mlp_width)
    + 2.0 * m.width * m.vocab_size
    + 4.0 * keys * m.heads * m.head_dim
  )
  # all of it for every token
  held = sum(leaf.nbytes for leaf in jax.tree.leaves((begun.args[0]["llm"], state.caches)))
  return Part(
    run=decode_function(cfg, tokens),
    args=(begun.args[0], state),
    flops=tokens * answers * useful,
    amount=tokens * answers,
    unit="tokens",
    bytes=float(tokens * held),
  )


def selecting(cfg: VLMConfig, mode: str, frames: int, real: bool = True) -> tuple[Part, Part, int]:
  """QC-Comp of a video of given visual tokens: the visual rounds, the question's rows, and how many
  calls of each.
  """
  cfg, setting = without_tower(cfg), qc_comp.select_config(mode, 8)
  plan = qc_comp.plan_rounds(frames, 8, setting)
  rows = max(1, setting.round // plan.frames)
  return scoring_parts(cfg, _random(cfg, real), setting, frames, plan, rows, real=real)


def scoring_parts(
  cfg: VLMConfig,
  model: tuple[nnx.GraphDef, nnx.State],
  setting: SelectConfig,
  frames: int,
  plan: qc_comp.RoundPlan,
  rows: int,
  question: Prompt | None = None,
  real: bool = False,
) -> tuple[Part, Part, int]:
  """Likewise of a model, as `nnx.split` gives it, with so many rounds in a call.

  question: one of those that are stacked; None: as `scoring` has it.
  """
  graph, state = model
  watch, score = scoring(graph, plan, setting, rows, question, cfg.clip_frames)
  tokens, clips = cfg.clip_frames * cfg.tokens_per_frame, plan.frames // cfg.clip_frames
  features = _array(real, (rows, clips, tokens, cfg.vision.width), cfg.dtype)
  caches = (_ones if real else jax.eval_shape)(watch, state, features)
  calls = -(-len(plan.starts) // rows)

  def part(run, given):
    return Part(
      run=run,
      args=(state, given),
      flops=flops(run, state, given),
      amount=frames / calls,
      unit="frames",
    )

  return part(watch, features), part(score, caches), calls


def training_parts(cfg: VLMConfig, shape: Shape, param_dtype: str) -> tuple[Part, Part]:
  """SCT's two programs, as `train` compiles them: gradients of a micro-batch of full rows, and the
  optimizer's step.
  """
  cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, layers=1))
  batch = fake_batch(
    batch_spec(shape, ((cfg.tokens_per_frame, cfg.vision.width), cfg.dtype)), cfg.llm.vocab_size
  )
  graph, params = _random(cfg, True)
  trained = nnx.State(
    {
      name: jax.tree.map(lambda p: p.astype(param_dtype), params[name])
      for name in ("projector", "llm")
    }
  )
  tx = optim.optimizer(OPTIM, 1000)
  state = steps.TrainState(
    trained, nnx.State({"vision": params["vision"]}), jax.jit(tx.init)(trained)
  )
  sums = steps.zero_sums(trained, make_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1]))
  held = np.stack(
    [batch.frames, np.ones_like(batch.frames), batch.prefix_length, batch.text_length], axis=-1
  ).reshape(-1, 4)
  forward = metrics.forward_flops(cfg, held, pixels=False)
  useful = 3 * float(forward["projector"].sum() + forward["llm"].sum())

  def gradient(sums, state, batch):
    return steps.grad_step(graph, state, sums, batch, (), None)

  def apply(state, sums):
    return steps.apply_step(tx, state, dataclasses.replace(sums, samples=jnp.ones(())))

  return (
    Part(
      run=gradient,
      args=(sums, state, jax.tree.map(jnp.asarray, batch)),
      flops=useful,
      amount=float(batch.weight.sum()),
      unit="samples",
      donated=(0,),
    ),
    Part(
      run=apply,
      args=(state, sums),
      flops=0.0,
      amount=float(sum(p.size for p in jax.tree.leaves(trained))),
      unit="parameters",
      donated=(0, 1),
    ),
  )


def product(side: int, dtype: str) -> Part:
  """A plain matrix product, what all others are compared with."""
  a = jnp.ones((side, side), dtype)
  return Part(run=lambda a: a @ a, args=(a,), flops=2.0 * side**3, amount=1, unit="products")


def copying(size: int) -> Part:
  """A plain copy of so many bytes, read and written."""
  x = jnp.ones(size // 4, jnp.float32)
  return Part(run=lambda x: x + 1, args=(x,), flops=0.0, amount=2.0 * size, unit="bytes")
