"""The programs of a run and of asking, traced for devices that need not be there.

Those of a topology come from the TPU's or GPU's compiler, without a TPU or GPU.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xcomp_jax.checkpoints import finding, loading
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.config import ConfigError, MeshConfig, RunConfig, VLMConfig, check_run
from xcomp_jax.data import blend, packing
from xcomp_jax.data.batch import Batch, Clips, Length, Shape, batch_spec
from xcomp_jax.errors import one_line
from xcomp_jax.inference import generate, rounds
from xcomp_jax.model import vlm
from xcomp_jax.parallel import chips, roofline
from xcomp_jax.parallel.mesh import (
  batch_devices,
  batch_sharding,
  cache_sharding,
  clip_sharding,
  make_mesh,
  mesh_sizes,
  param_shardings,
  replicated,
  row_groups,
)
from xcomp_jax.plan import absent
from xcomp_jax.training import costs, forecast, optim, steps

TRAINING = ("gradient", "tower", "apply", "evaluation")
ROUNDS = ("round", "question")
VISION = ("tower", "encode")  # those of the tower
ASKING = ("encode", "prefill", *ROUNDS, "decode")
NAMES = (*TRAINING, *ASKING)
STATE = ("parameters", "gradients", "optimizer state")  # memory that devices share
ROOM = 64  # tokens to answer that prefill makes room for
FRAMES, TOKENS = 1024, 512  # of a sample, where nothing is known of the data
# has the config.json of released checkpoints, by hub id
RELEASED = pathlib.Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramPlan:
  """What is planned.

  full: the model. layers: compiled ones; None: all. shapes: of micro-batches. effort: of the
  compiler, from -1 (an eighth of the time, a tenth more of temporaries) to 0 (as it is for
  training). lengths: of samples, or of those
  that are assumed. steps: the micro-batches of each step of them. costs: by which they were packed.
  """

  config: RunConfig
  full: VLMConfig
  layers: int | None
  mesh: Mesh
  device: roofline.Device
  shapes: tuple[Shape, ...]
  effort: float
  lengths: packing.Lengths
  steps: Sequence[Sequence[packing.Micro]]
  costs: costs.MeshCosts


# --- what is asked for
# ------------------------------------------------------------------------------------------------


def topology(name: str) -> list[Any]:
  """The devices of a topology such as "v5e:4x4", "h100:8" or "h100:2x8" (two hosts), to compile for
  only.

  Raises:
    ConfigError: no compiler for it, or no such topology.
  """
  try:
    chip = chips.named(name.partition(":")[0])
  except KeyError:
    chip = None
  if chip is not None and chip.capability:
    return _gpus(name, chip)
  if not re.match(r"v\d", name):
    cards = ", ".join(chip.name for chip in chips.CHIPS if chip.gpu)
    raise ConfigError(
      f"--topology={name}: TPUs are written v5e:2x2, v5e:4x4 or v5p:2x2x2, GPUs h100:8 or "
      f"h100:2x8; GPUs that can be compiled for are {cards}",
      where="--topology",
      value=name,
      allowed=cards,
    )
  return _tpus(name)


def _gpus(name: str, chip: chips.Chip) -> list[Any]:
  found = re.fullmatch(r"(?:(\d+)x)?([1-8])", name.partition(":")[2])
  if not found or found[1] == "0":
    raise ConfigError(
      f"--topology={name}: write the card and how many a host has, from 1 to 8, such as h100:8; "
      f"h100:2x8 are two hosts",
      where="--topology",
      value=name,
      expected="CARD:1 to CARD:8",
    )
  try:
    return absent.gpus(chip.name, int(found[2]), int(found[1] or 1))
  except KeyError as error:
    raise ConfigError(f"--topology={error.args[0]}", where="--topology", value=name) from error
  except (RuntimeError, ValueError) as error:  # JAX has no backend "cuda", or it lacks a part
    raise ConfigError(
      f"--topology={name} needs the GPU compiler: pip install 'xcomp_jax[plan-gpu]' (4.4 GB; no "
      f"GPU needed): {one_line(error)}",
      where="--topology",
      value=name,
      missing="xcomp_jax[plan-gpu]",
    ) from error


def _tpus(name: str) -> list[Any]:
  # Outside of a Google cloud nothing answers libtpu's questions; nothing here touches a TPU, so its
  # lock is not needed.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ConfigError(
      "--topology needs the TPU compiler: pip install 'xcomp_jax[plan]' (no TPU needed)",
      where="--topology",
      value=name,
      missing="xcomp_jax[plan]",
    ) from error
  from jax.experimental import topologies

  sizes = [int(n) for n in re.findall(r"\d+", name.partition(":")[2])]
  one = {"chips_per_host_bounds": [1] * 3} if math.prod(sizes) == 1 else {}
  try:
    return list(topologies.get_topology_desc(name, "tpu", **one).devices)
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(
      f"--topology={name}: {one_line(error)}. Write the version and the shape, such as v5e:2x2, "
      f"v5e:16x16, v5p:2x2x2, v6e:4x4; or a card, such as h100:8",
      where="--topology",
      value=name,
      found=one_line(error),
    ) from error


def model_sizes(
  config: RunConfig,
  device: Any = None,
  resolve: Callable[[str], pathlib.Path] = finding.resolve,
) -> VLMConfig:
  """Reads the model's sizes for a device: from `init_from` if it is a directory, of released
  checkpoints without a network, else where `resolve` finds them.
  """
  released = RELEASED / config.init_from
  directory = pathlib.Path(config.init_from)
  if not directory.is_dir():
    directory = released if (released / "config.json").is_file() else resolve(config.init_from)
  return read_vlm_config(directory, config.model, config.lp_comp, device)


def cut(cfg: VLMConfig, layers: int, count: int) -> VLMConfig:
  """The model with so many layers of the LLM, all with `count` tokens of a group, and of the
  tower.
  """
  return dataclasses.replace(
    cfg,
    llm=dataclasses.replace(cfg.llm, layers=layers),
    lp_comp=dataclasses.replace(cfg.lp_comp, schedule=(count,) * layers),
    vision=dataclasses.replace(cfg.vision, layers=min(layers, cfg.vision.layers)),
  )


def make(
  config: RunConfig,
  where: str | Sequence[Any] | None,
  *,
  layers: int | None = None,
  frames: int | None = None,
  text: int | None = None,
  lengths: packing.Lengths | None = None,
  like: Sequence[Any] | None = None,
  effort: float = 0.0,
) -> ProgramPlan:
  """Makes a plan.

  Args:
    config: of the run.
    where: a topology's name, or devices; None: those that are here.
    layers: compiled ones, from which the rest is extrapolated; None: all.
    frames: of the samples that are assumed, if there are no lengths,
    text: and their tokens behind the frames; None for both: as `config.data.shapes` says, if it
      does.
    lengths: of all samples. The mesh and the shapes are those that training on them has.
    like: devices that say what these can do, where these can't be asked (`forecast.chips`).
    effort: of the compiler; see `ProgramPlan`.

  Raises:
    ConfigError: values that can't be.
    CheckpointError: no such checkpoint.
  """
  check_run(config)
  devices = jax.devices() if where is None else topology(where) if isinstance(where, str) else where
  full, seen, size = model_sizes(config, (like or devices)[0]), config, config.train.batch_size
  if layers is not None and not 0 < layers < full.llm.layers:
    raise ConfigError(
      f"--layers {layers}: the model has {full.llm.layers}", where="--layers", value=layers
    )
  if lengths is None:
    seen, lengths = _assumed(config, full, len(devices), frames, text)
  order = blend.order(range(len(lengths)), size, config.seed, 0)  # refuses too few
  schedule = forecast.schedule_run(seen, full, lengths, like or devices)
  mesh = make_mesh(MeshConfig(*schedule.mesh), devices)
  row_groups(mesh)  # refuses what training would
  return ProgramPlan(
    config=config,
    full=full,
    layers=layers,
    mesh=mesh,
    device=roofline.device_of(like or devices),
    shapes=schedule.shapes,
    effort=effort,
    lengths=lengths,
    steps=packing.pack_steps(lengths, order, schedule.shapes, schedule.costs),
    costs=schedule.costs,
  )


def _assumed(
  config: RunConfig, cfg: VLMConfig, devices: int, frames: int | None, text: int | None
) -> tuple[RunConfig, packing.Lengths]:
  """Closes what a config leaves open, and assumes samples that fill a row each, for a step.

  Raises:
    ConfigError: frames that don't fill clips.
  """
  if frames is not None and (frames < 1 or (frames % cfg.clip_frames and frames != 1)):
    raise ConfigError(
      f"--frames {frames}: must be 1, or a multiple of the {cfg.clip_frames} frames of a clip",
      where="--frames",
      value=frames,
    )
  mesh, shapes, prefix = config.mesh, config.data.shapes, config.data.prefix_length
  if (mesh.fsdp, mesh.context) == (-1, -1):
    mesh = dataclasses.replace(mesh, context=1)
  if shapes is None or (frames, text) != (None, None):
    groups = math.prod(mesh_sizes(mesh, devices)[:2])
    shapes = ((groups, 1, FRAMES if frames is None else frames, TOKENS if text is None else text),)
  data = dataclasses.replace(config.data, shapes=shapes)
  _, _, frames, text = max(shapes, key=lambda shape: shape[2:])
  length = Length(frames, cfg.clip_frames if frames > 1 else 1, prefix, text)
  return dataclasses.replace(config, mesh=mesh, data=data), [length] * config.train.batch_size


# --- programs
# ----------------------------------------------------------------------------------------


def asked_programs(plan: ProgramPlan, names: Sequence[str]) -> list[tuple[str, Shape | None]]:
  """Lists programs of these names, with the shape of what each takes."""
  slots = {shape: sum(n for n, _ in costs.row_slots(plan.full, shape)) for shape in plan.shapes}
  most = max(plan.shapes, key=lambda shape: (slots[shape], shape))
  prompts = dataclasses.replace(most, rows=batch_devices(plan.mesh), samples=1)
  shapes = {"gradient": plan.shapes, "evaluation": plan.shapes} | dict.fromkeys(ASKING, (prompts,))
  # which tokens stay depends on the question there
  left = ROUNDS if plan.full.lp_comp.keep == "attention" else ()
  return [
    (name, shape) for name in names if name not in left for shape in shapes.get(name, (None,))
  ]


def batch_of(plan: ProgramPlan, cfg: VLMConfig, shape: Shape) -> Batch:
  """Makes a micro-batch of ShapeDtypeStructs with shardings."""
  spec = batch_spec(shape, ((cfg.tokens_per_frame, cfg.vision.width), cfg.dtype))
  return _placed(spec, steps.batch_shardings(spec, plan.mesh))


def clips_of(plan: ProgramPlan, cfg: VLMConfig, shape: Shape) -> tuple[Clips, ...]:
  """Makes the clips of a micro-batch, if the tower is trained: those of videos."""
  if not plan.config.train.vision:
    return ()
  each = cfg.clip_frames if shape.frames > 1 else 1
  clips, side = (shape.rows, shape.frames // each), cfg.vision.image_size
  frames = jax.ShapeDtypeStruct((*clips, each, side, side, 3), np.dtype(np.uint8))
  spec = Clips(frames, jax.ShapeDtypeStruct(clips, np.dtype(np.int32)))
  return (_placed(spec, steps.batch_shardings(spec, plan.mesh)),)


def _placed(tree: Any, at: Any, dtype: Any = None) -> Any:
  """ShapeDtypeStructs of a tree's leaves, where `at` says, a sharding or a tree of them; dtype:
  None: their own.
  """
  return jax.tree.map(
    lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=at),
    tree,
    jax.tree.broadcast(at, tree),
  )


def abstract_training(
  plan: ProgramPlan, cfg: VLMConfig
) -> tuple[Any, nnx.GraphDef, steps.TrainState, steps.Sums]:
  """The optimizer, the model's graph, and state and sums as ShapeDtypeStructs with shardings."""
  tx = optim.optimizer(plan.config.optim, 1000)
  graph, state = steps.abstract_state(plan.config, cfg, tx, plan.mesh)
  number = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(plan.mesh))
  grads = jax.tree.map(lambda p: p.update(dtype=np.float32), state.trained)
  return tx, graph, state, steps.Sums(grads, number, number, number)


@contextlib.contextmanager
def inside(plan: ProgramPlan) -> Generator[None]:
  """The devices, the mesh and the precision that training has."""
  with (
    absent.computing_on(list(plan.mesh.devices.flat)),
    jax.set_mesh(plan.mesh),
    jax.default_matmul_precision("highest" if plan.full.dtype == "float32" else None),
  ):
    yield


class Traced(NamedTuple):
  """A program, traced for the mesh.

  given: bytes per device of its arguments, by what they are. beside: of what else is there
  meanwhile, temporaries aside.
  """

  program: Any
  given: dict[str, float]
  beside: dict[str, float]


def trace_program(plan: ProgramPlan, cfg: VLMConfig, name: str, shape: Shape | None) -> Traced:
  """Traces a program for the mesh, `inside` the plan."""
  with inside(plan):
    if shape is not None and name in ASKING:
      return _asking(plan, cfg, name, shape)
    return _training(plan, cfg, name, shape)


def _training(plan: ProgramPlan, cfg: VLMConfig, name: str, shape: Shape | None) -> Traced:
  """Traces a program of training.

  One batch, or chunk of clips, is copied while another is computed on, so training holds two; and
  all features of a step wait for their micro-batches.
  """
  tx, graph, state, sums = abstract_training(plan, cfg)
  compiled = steps.compiled_steps(cfg, state, sums, plan.mesh)
  parameters = {"parameters": bytes_held((state.trained, state.frozen))}
  gradients, optimizer = {"gradients": bytes_held(sums)}, {"optimizer state": bytes_held(state.opt)}
  memory = parameters | gradients
  if name == "apply":
    return Traced(compiled.apply.trace(tx, state, sums), memory | optimizer, {})
  if name == "tower":
    part = state.frozen if "vision" in state.frozen else state.trained
    tower, frames = _placed(part["vision"], replicated(plan.mesh)), _chunk(plan, cfg)
    given = {"tower": bytes_held(tower), "clips": bytes_held(frames)}
    beside = memory | optimizer | {"next clips": bytes_held(frames), "features": waiting(plan, cfg)}
    return Traced(compiled.encode.trace(tower, frames), given, beside)
  assert shape is not None
  batch, clips = batch_of(plan, cfg, shape), clips_of(plan, cfg, shape)
  size = bytes_held((batch, clips))
  beside = optimizer | {"other batches": max(size, waiting(plan, cfg))}
  if name == "evaluation":
    state = dataclasses.replace(state, opt=None)
    return Traced(
      compiled.evaluate.trace(graph, state, batch),
      parameters | {"batch": bytes_held(batch)},
      gradients | beside,
    )
  most = plan.config.train.projector_max_frames
  program = compiled.grad.trace(graph, state, sums, batch, clips, projector_max_frames=most)
  return Traced(program, memory | {"batch": size}, beside)


def _asking(plan: ProgramPlan, cfg: VLMConfig, name: str, shape: Shape) -> Traced:
  """Traces a program of asking: the whole model in the compute dtype, a question in each row
  group. Nothing is computed again for a gradient.
  """
  cfg = dataclasses.replace(cfg, remat=False)
  graph, params = nnx.split(loading.abstract(cfg))
  dtype = np.dtype(cfg.dtype)
  params = _placed(params, param_shardings(params, plan.mesh), dtype)

  def traced(run: Callable[..., Any], kind: str, given: Any, donated: tuple[int, ...] = ()):
    program = jax.jit(run, donate_argnums=donated).trace(params, given)
    return Traced(program, {"parameters": bytes_held(params), kind: bytes_held(given)}, {})

  def split(leaf):  # over row groups, where the first axis is of rows
    return _placed(leaf, batch_sharding(plan.mesh) if leaf.ndim else replicated(plan.mesh))

  def cached(leaf):  # keys and values also over heads
    return _placed(leaf, cache_sharding(plan.mesh, leaf.shape)) if leaf.ndim == 4 else split(leaf)

  def prefill(params, batch):
    return generate.prefill(nnx.merge(graph, params), batch, ROOM)

  def decode(params, state):
    sampling = generate.stack_sampling([generate.Sampling(1, (0,))] * shape.rows)
    return generate.decode_tokens(nnx.merge(graph, params), state, sampling, generate.STREAM)

  if name == "encode":
    return traced(
      lambda params, clips: vlm.encode_apart(nnx.merge(graph, params), clips),
      "clips",
      _chunk(plan, cfg),
    )
  batch = batch_of(plan, cfg, shape)
  if name == "prefill":
    return traced(prefill, "batch", batch)
  if name == "decode":
    state = jax.eval_shape(prefill, params, batch)
    return traced(decode, "caches", jax.tree.map(cached, state), donated=(1,))
  of, rows = rounds.usual(cfg, shape.frames)
  rows, clips = shape.rows * rows, of.frames // cfg.clip_frames
  watch, score = rounds.scoring(graph, of, rounds.USUAL, rows, clip_frames=cfg.clip_frames)
  tokens = cfg.clip_frames * cfg.tokens_per_frame
  features = split(jax.ShapeDtypeStruct((rows, clips, tokens, cfg.vision.width), dtype))
  if name == "round":
    return traced(watch, "features", features)
  caches = jax.eval_shape(watch, params, features)
  return traced(score, "caches", jax.tree.map(cached, caches))


def _chunk(plan: ProgramPlan, cfg: VLMConfig) -> Any:
  """Clips of the tower at once, on all devices."""
  side = cfg.vision.image_size
  shape = (cfg.clips_per_chunk * plan.mesh.size, cfg.clip_frames, side, side, 3)
  return jax.ShapeDtypeStruct(shape, np.dtype(np.uint8), sharding=clip_sharding(plan.mesh))


def waiting(plan: ProgramPlan, cfg: VLMConfig) -> float:
  """Counts the bytes per device of a step's features, which wait for their micro-batches; 0 if the
  tower is trained.
  """
  if plan.config.train.vision:
    return 0.0
  sizes = {shape: bytes_held(batch_of(plan, cfg, shape).visual) for shape in plan.shapes}
  return max(sum(sizes[micro.shape] for micro in micros) for micros in plan.steps)


def bytes_held(tree: Any) -> float:
  """Bytes per device of arrays that have shardings."""
  leaves = jax.tree.leaves(tree)
  return float(
    sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)
  )
