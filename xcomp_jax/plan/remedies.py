"""What does not fit, and what would help."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from xcomp_jax.config import MeshConfig
from xcomp_jax.parallel import chips
from xcomp_jax.parallel.mesh import AXES, make_mesh
from xcomp_jax.plan import programs
from xcomp_jax.plan.accounts import ProgramAccount
from xcomp_jax.plan.describe import TITLES, size_text
from xcomp_jax.plan.programs import TRAINING, ProgramPlan, bytes_held
from xcomp_jax.training.costs import capability

SHARE = 0.9  # of a card's memory that JAX may have and CUDA gets along
STATE = ("parameters", "optimizer state", "gradients")


def bytes_needed(account: ProgramAccount, accounts: Sequence[ProgramAccount] = ()) -> float:
  """Bytes per device while a program runs, what the runtime keeps for itself included.

  accounts: of all programs; those of training stay loaded together.
  """
  beside = [
    other.memory["program"]
    for other in accounts
    if other is not account and {other.name, account.name} <= set(TRAINING)
  ]
  return sum(account.memory.values()) + sum(beside)


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
  limit = plan.device.hbm or math.inf
  return [
    f"{words}: {size_text(size)}, {'fits' if size <= limit else 'not enough alone'}"
    for help in (_memory_share, _split_further, *BY_PROGRAM.get(account.name, ()), _more_devices)
    for words, size in help(plan, account, total)
  ]


Remedies = Iterator[tuple[str, float]]  # what would help, and the bytes needed then


def _memory_share(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Has JAX take more of a card's memory."""
  reserve, most = plan.device.reserve, (1 - SHARE) * (plan.device.hbm or math.inf)
  if reserve > most and capability(plan.device) > (0, 0):
    share = f"XLA_PYTHON_CLIENT_MEM_FRACTION={SHARE}, of which JAX takes {chips.memory_share():g}"
    yield share, total - reserve + most


def _split_further(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Splits the state over all devices, where several hold the same."""
  data, fsdp, tensor, context = (plan.mesh.shape[axis] for axis in AXES)
  if account.name in TRAINING and data > 1:
    devices = list(plan.mesh.devices.flat)
    whole = make_mesh(MeshConfig(1, data * fsdp, tensor, context), devices)
    _, _, new, sums = programs.abstract_training(dataclasses.replace(plan, mesh=whole), plan.full)
    size = bytes_held((new.trained, new.frozen, new.opt)) + bytes_held(sums)
    words = "--config.mesh.data=1 --config.mesh.fsdp=-1 splits the state further"
    yield words, total - _state(account) + size


def _rows_and_devices(plan: ProgramPlan, account: ProgramAccount) -> tuple[int, int]:
  """The rows of a row group, and the devices that share each."""
  data, fsdp, tensor, context = (plan.mesh.shape[axis] for axis in AXES)
  return account.shape.rows // (data * fsdp), tensor * context


def _recompute(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Computes again what the backward pass needs of a layer beside its input.

  That is about queries, keys, values, what is attended, two norms' and two residuals' outputs, and
  three times the MLP's width.
  """
  if not plan.config.model.remat:
    m, rows, devices = plan.full.llm, *_rows_and_devices(plan, account)
    kept = (7 * m.width + 3 * m.mlp_width) * np.dtype(plan.full.dtype).itemsize
    kept *= programs.slots(plan.full, account.shape) * rows / devices
    smaller = total - min(kept, 0.9 * account.memory["temporaries"])
    yield "--config.model.remat=True (estimated)", smaller


def _shorter_rows(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Halves the frames of a row."""
  rows, devices = _rows_and_devices(plan, account)
  half = rows * account.shape.frames // 2
  smaller = total - (account.memory["temporaries"] + account.memory["batch"]) / 2
  if half >= np.max(plan.lengths, 0)[0]:
    share = f"--config.data.frames_per_device={half // devices}"
    yield f"{share}, or such config.data.shapes (estimated)", smaller
  elif half:
    samples = f"samples of at most {half} frames, by predecode"
    yield f"{samples}, and shapes to match (estimated)", smaller


def _smaller_parameters(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Keeps what is trained, and its moments, in half as many bytes."""
  if plan.config.model.param_dtype == "float32":
    trained = bytes_held(programs.abstract_training(plan, plan.full)[2].trained)
    words = "--config.model.param_dtype=bfloat16, which also rounds what is learned"
    yield words, total - (account.memory["optimizer state"] + trained) / 2


def _a_clip_at_a_time(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Has the tower of `ask` take one clip at a time."""
  chunk = account.memory["temporaries"] + account.memory["clips"]
  yield "--clips-per-chunk 1 (estimated)", total - chunk * (1 - 1 / plan.full.clips_per_chunk)


def _fewer_frames(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Keeps half of the frames for an answer."""
  kinds = ("batch", "caches", "results", "temporaries")
  kept = sum(account.memory.get(kind, 0.0) for kind in kinds)
  words = f"--select {account.shape.frames // 2}, which keeps half of these frames (estimated)"
  yield words, total - kept / 2


def _less_tower(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Trains with one clip at a time, or without the tower."""
  memory = account.memory
  clips = memory["temporaries"] + memory["clips"] + memory["next clips"]
  if saved := clips * (1 - 1 / plan.full.clips_per_chunk):
    yield "--config.model.clips_per_chunk=1 (estimated)", total - saved
  words = "features instead of frames (predecode --features), which need no tower: the state alone"
  yield words, total - memory["tower"] - clips


def _more_devices(plan: ProgramPlan, account: ProgramAccount, total: float) -> Remedies:
  """Shares the state, and the optimizer's temporaries, which are as large, with more devices."""
  if account.name in TRAINING:
    beside = account.memory["temporaries"] if account.name == "apply" else 0.0
    shared, limit = _state(account) + beside, plan.device.hbm or math.inf
    count, size = enough(total, shared, plan.device.count, limit)
    yield f"{count} devices of this kind: the state alone", size


BY_PROGRAM: dict[str, tuple[Callable[[ProgramPlan, ProgramAccount, float], Remedies], ...]] = {
  "gradient": (_recompute, _shorter_rows, _smaller_parameters),
  "encode": (_a_clip_at_a_time,),
  "prefill": (_fewer_frames,),
  "decode": (_fewer_frames,),
  "tower": (_less_tower,),
}


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
