"""What is said of a plan: an account of every program, the seconds of a step, what does not fit and
what would help.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from xcomp_jax.config import MeshConfig
from xcomp_jax.data import packing
from xcomp_jax.data.batch import Length, length_table
from xcomp_jax.inference import generate
from xcomp_jax.parallel.chips import G, T, memory_share
from xcomp_jax.parallel.mesh import AXES, make_mesh
from xcomp_jax.plan.accounts import ProgramAccount
from xcomp_jax.plan.programs import (
  STATE,
  TRAINING,
  VISION,
  ProgramPlan,
  abstract_training,
  bytes_held,
)
from xcomp_jax.training import costs, loop, metrics

TITLES = {
  "gradient": "gradient step",
  "tower": "tower with merging",
  "apply": "optimizer step",
  "evaluation": "evaluation step",
  "encode": "tower with merging, when asking",
  "prefill": "prefill of features",
  "round": "round of scoring, without the question",
  "question": "the question's rows in a round",
  "decode": "tokens of an answer",
}


def size_text(size: float) -> str:
  """Bytes, for people: decimal GB, or MB where they are few."""
  return f"{size / G:.2f} GB" if size >= 0.1 * G else f"{size / 1e6:.1f} MB"


def describe_program(plan: ProgramPlan, account: ProgramAccount) -> str:
  """A program's account, for people."""
  memory = "  ".join(f"{kind} {size_text(size)}" for kind, size in account.memory.items())
  of = f" of {size_text(plan.device.hbm)}" if plan.device.hbm else ""
  said = {"per device": f"{memory}  = {size_text(sum(account.memory.values()))}{of}"}
  if account.problem:
    said["the compiler"] = account.problem
  else:
    several = account.shape is not None and account.shape.samples > 1
    rows = ", if a sample fills each row" if several else ""
    sent = "  ".join(
      f"{kind} {count:.0f} x, {size_text(size)}"
      for kind, (count, size) in account.collectives.items()
    )
    said |= {
      "operations": _operations(plan.device.count, account, rows),
      "kernels": "  ".join(f"{kind} {calls:.0f} x" for kind, calls in account.kernels.items()),
      "collectives": sent or "none",
      "seconds": _seconds(plan, account, rows),
    }
  lines = [f"  {label:<17}{words}" for label, words in said.items() if words]
  return "\n".join([_title(plan, account), *lines])


def _seconds(plan: ProgramPlan, account: ProgramAccount, rows: str) -> str:
  """The least time, and what bounds it."""
  if not account.seconds:
    return f"not known: no figures for {plan.device.kind}"
  bound = max(account.seconds, key=account.seconds.__getitem__)
  each = "  ".join(f"{kind} {seconds:.3f}" for kind, seconds in account.seconds.items())
  return f"at least {account.seconds[bound]:.3f}{rows}, bound by {bound} ({each})"


def _title(plan: ProgramPlan, account: ProgramAccount) -> str:
  """What a program is, on what, and how it was compiled."""
  cfg, shape = plan.full, ""
  if account.name in VISION:
    shape = f", {cfg.clips_per_chunk} clips of {cfg.clip_frames} frames a device"
  elif account.shape is not None:
    shape = f", {loop.describe_shape(account.shape)}"
  if account.name == "decode":
    shape += f", {generate.STREAM} of each"
  title = f"{TITLES[account.name]}{shape}; compiled in {account.compile_s:.0f} s"
  if plan.effort:
    slower = "temporaries may be a tenth larger than in training, the program is smaller"
    title += f", with --quick: {slower}"
  if account.layers != account.of:
    title += (
      f"\n  EXTRAPOLATED to {account.of} layers from {account.layers}: temporaries, program, "
      f"traffic, collectives; the rest is exact"
    )
  return title


def _operations(count: int, account: ProgramAccount, rows: str) -> str:
  """Operations and traffic."""
  executed, kernels, model = (
    f"{number / count / T:.4g}" for number in (account.executed, account.in_kernels, account.model)
  )
  unknown = f"; not counted: {', '.join(account.not_counted)}" if account.not_counted else ""
  return (
    f"{executed} TFLOP per device ({kernels} in kernels{rows}), {model} of the "
    f"model; HBM traffic {size_text(account.hbm)}{unknown}"
  )


def step_lines(plan: ProgramPlan, accounts: Sequence[ProgramAccount]) -> list[str]:
  """Predicts the seconds of an average step, on features and on frames, by the programs that were
  compiled.
  """
  of = {(account.name, account.shape): account for account in accounts if account.seconds}
  if not {("apply", None), *(("gradient", shape) for shape in plan.shapes)} <= of.keys():
    return []
  micros, count = [micro for step in plan.steps for micro in step], len(plan.steps)
  gradients = (
    sum(_micro_seconds(plan, of["gradient", micro.shape], micro) for micro in micros) / count
  )
  rest = max(of["apply", None].seconds.values())
  shapes = collections.Counter(micro.shape for micro in micros)
  lines = [
    f"a step of {plan.config.train.batch_size} samples, the average of {count:,}:",
    *(f"  {n / count:.2f} x {loop.describe_shape(shape)}" for shape, n in sorted(shapes.items())),
    f"  on features at least {gradients + rest:.3f} s: gradients {gradients:.3f} s, optimizer "
    f"{rest:.3f} s",
  ]
  if ("tower", None) in of and not plan.config.train.vision:
    calls, tower = _tower_seconds(plan, of["tower", None])
    whole = gradients + rest + tower
    lines.append(
      f"  on frames at least {whole:.3f} s: the tower's {calls:.1f} calls {tower:.3f} s more"
    )
  if missing := sorted({what for account in accounts for what in account.not_counted}):
    lines.append(
      f"  not counted in these seconds: {', '.join(missing)}; `--lengths` without `--topology` "
      f"counts all attention"
    )
  return [*lines, f"compiled in {sum(account.compile_s for account in accounts):.0f} s in all"]


def _micro_seconds(plan: ProgramPlan, account: ProgramAccount, micro: packing.Micro) -> float:
  """Predicts a micro-batch: as its program, whose attention computes what the samples need."""
  spent, device = dict(account.seconds), plan.device
  if account.in_kernels and not plan.config.train.vision:
    rows = np.array([plan.costs.attention[list(samples)].sum() for samples in micro.rows])
    load = rows.reshape(plan.costs.groups, -1).sum(1)
    assert device.flops is not None  # or there were no seconds
    spent["compute"] += (
      load.max() / costs.PICO
      + plan.costs.squares(micro.shape)
      - account.in_kernels / (device.count * device.flops)
    )
  return max(spent.values())


def _tower_seconds(plan: ProgramPlan, account: ProgramAccount) -> tuple[float, float]:
  """Predicts the calls of the tower in an average step, and seconds, those of sending weights and
  results included.
  """
  cfg, n, count = plan.full, plan.device.count, len(plan.steps)
  table = length_table(plan.lengths)

  def work(size: int) -> float:
    return float(metrics.forward_flops(cfg, [Length(size, size, 0, 0)], pixels=True)["vision"][0])

  kinds = {
    size: work(size) / work(cfg.clip_frames)
    for size in np.unique(table[table[:, 0] > 0, 1]).tolist()
  }
  calls = clips = frames = 0.0
  for micros in plan.steps:
    ids = packing.samples_of(micros)
    frames += table[ids, 0].sum() / count
    for size, share in kinds.items():
      each = -(-int(table[ids, 0][table[ids, 1] == size].sum()) // (size * n))  # clips of a device
      calls += sum(divmod(each, cfg.clips_per_chunk)) / count
      clips += each * share / count
  seconds = clips / cfg.clips_per_chunk * max(account.seconds.values())
  if plan.device.links:
    features = frames * cfg.tokens_per_frame * cfg.vision.width * np.dtype(cfg.dtype).itemsize
    seconds += (account.memory["tower"] + features) * (n - 1) / n / plan.device.links
  return calls, seconds


# --- what does not fit, and what would help
# ----------------------------------------------------------------------------------------

SHARE = 0.9  # of a card's memory that JAX may have and CUDA gets along


def bytes_needed(account: ProgramAccount, accounts: Sequence[ProgramAccount] = ()) -> float:
  """Bytes per device while a program runs, what the runtime keeps for itself included.

  accounts: of all programs; those of training stay loaded together.
  """
  return sum(account.memory.values()) + sum(
    other.memory["program"]
    for other in accounts
    if other is not account and {other.name, account.name} <= set(TRAINING)
  )


def problems(plan: ProgramPlan, accounts: Sequence[ProgramAccount]) -> list[tuple[str, str]]:
  """Programs that do not fit, by name, with remedies."""
  found, limit = [], plan.device.hbm or math.inf
  for account in accounts:
    total = bytes_needed(account, accounts)
    if account.problem or total > limit:
      over = f"needs {size_text(total)} per device, {plan.device.kind} has {size_text(limit)}"
      words = f"{TITLES[account.name]} does not fit: {over}; what would help:"
      found.append((account.name, "\n  ".join([words, *remedies(plan, account, total)])))
  return found


def remedies(plan: ProgramPlan, account: ProgramAccount, total: float) -> list[str]:
  """Says what would make a program that needs `total` bytes smaller, and what it would need
  then.
  """
  limit, needed = plan.device.hbm or math.inf, {}
  for words, saved in (*_for_all(plan, account), *_for_one(plan, account)):
    needed[words] = total - saved
  if account.name in TRAINING:
    # shares the state, and the optimizer's temporaries, which are as large, with more devices
    beside = account.memory["temporaries"] if account.name == "apply" else 0.0
    count, size = enough(total, _state(account) + beside, plan.device.count, limit)
    needed[f"{count} devices of this kind: the state alone"] = size
  return [
    f"{words}: {size_text(size)}, {'fits' if size <= limit else 'not enough alone'}"
    for words, size in needed.items()
  ]


Remedies = Iterator[tuple[str, float]]  # what would help, and the bytes that it saves


def _for_all(plan: ProgramPlan, account: ProgramAccount) -> Remedies:
  """What helps whatever program it is."""
  # JAX takes more of a card's memory
  saved = plan.device.reserve - (1 - SHARE) * (plan.device.hbm or math.inf)
  if saved > 0 and costs.capability(plan.device) > (0, 0):
    yield (
      f"XLA_PYTHON_CLIENT_MEM_FRACTION={SHARE}, of which JAX takes {memory_share():g}",
      saved,
    )
  # splits the state over all devices, where several hold the same
  data, fsdp, tensor, context = (plan.mesh.shape[axis] for axis in AXES)
  if account.name in TRAINING and data > 1:
    whole = make_mesh(MeshConfig(1, data * fsdp, tensor, context), list(plan.mesh.devices.flat))
    _, _, new, sums = abstract_training(dataclasses.replace(plan, mesh=whole), plan.full)
    size = bytes_held((new.trained, new.frozen, new.opt)) + bytes_held(sums)
    words = "--config.mesh.data=1 --config.mesh.fsdp=-1 splits the state further"
    yield words, _state(account) - size


def _for_one(plan: ProgramPlan, account: ProgramAccount) -> Remedies:
  """What helps this program alone."""
  memory, clips_per_chunk = account.memory, plan.full.clips_per_chunk
  clips = sum(memory.get(kind, 0.0) for kind in ("temporaries", "clips", "next clips"))
  match account.name:
    case "gradient":
      yield from _for_gradient(plan, account)
    case "encode":  # the tower of `ask` takes one clip at a time
      yield "--clips-per-chunk 1 (estimated)", clips * (1 - 1 / clips_per_chunk)
    case "prefill" | "decode":  # half of the frames are kept for an answer
      kinds = ("batch", "caches", "results", "temporaries")
      words = f"--select {account.shape.frames // 2}, which keeps half of these frames (estimated)"
      yield words, sum(memory.get(kind, 0.0) for kind in kinds) / 2
    case "tower":  # trains with one clip at a time, or without the tower
      if saved := clips * (1 - 1 / clips_per_chunk):
        yield "--config.model.clips_per_chunk=1 (estimated)", saved
      words = "features instead of frames (predecode --features), which need no tower"
      yield f"{words}: the state alone", memory["tower"] + clips


def _for_gradient(plan: ProgramPlan, account: ProgramAccount) -> Remedies:
  """What helps a gradient step."""
  m, memory, model, shape = plan.full.llm, account.memory, plan.config.model, account.shape
  data, fsdp, tensor, context = (plan.mesh.shape[axis] for axis in AXES)
  rows, devices = shape.rows // (data * fsdp), tensor * context  # of a row group
  # Computes again what the backward pass needs of a layer beside its input: about queries, keys,
  # values, what is attended, two norms' and two residuals' outputs, and three times the MLP's
  # width.
  if not model.remat:
    kept = (7 * m.width + 3 * m.mlp_width) * np.dtype(plan.full.dtype).itemsize
    kept *= sum(n for n, _ in costs.row_slots(plan.full, shape)) * rows / devices
    yield "--config.model.remat=True (estimated)", min(kept, 0.9 * memory["temporaries"])
  half = rows * shape.frames // 2  # frames of a row
  saved = (memory["temporaries"] + memory["batch"]) / 2
  if half >= np.max(plan.lengths, 0)[0]:
    share = f"--config.data.frames_per_device={half // devices}"
    yield f"{share}, or such config.data.shapes (estimated)", saved
  elif half:
    samples = f"samples of at most {half} frames, by predecode"
    yield f"{samples}, and shapes to match (estimated)", saved
  if model.param_dtype == "float32":  # what is trained, and its moments, in half as many bytes
    trained = bytes_held(abstract_training(plan, plan.full)[2].trained)
    words = "--config.model.param_dtype=bfloat16, which also rounds what is learned"
    yield words, (memory["optimizer state"] + trained) / 2


def _state(account: ProgramAccount) -> float:
  return sum(account.memory.get(kind, 0.0) for kind in STATE)


def enough(total: float, shared: float, count: int, limit: float) -> tuple[int, float]:
  """How many devices, by doubling, bring the bytes of each from `total`, `shared` of them by
  `count` devices, to `limit`, and the bytes then.

  Twice as many, where no number does.
  """
  sizes = {factor * count: total - shared * (1 - 1 / factor) for factor in (2, 4, 8, 16, 32, 64)}
  return next(
    ((n, size) for n, size in sizes.items() if size <= limit), (2 * count, sizes[2 * count])
  )
