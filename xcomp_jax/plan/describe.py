"""What is said of a plan: an account of every program, and the seconds of a step."""

import collections
from collections.abc import Sequence

import numpy as np

from xcomp_jax.data import packing
from xcomp_jax.data.batch import Length, length_table
from xcomp_jax.data.packing import Micro
from xcomp_jax.inference import generate
from xcomp_jax.plan.accounts import ProgramAccount
from xcomp_jax.plan.programs import VISION, ProgramPlan
from xcomp_jax.training import forecast, loop, metrics

GB, TERA = 1e9, 1e12

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
  return f"{size / GB:.2f} GB" if size >= 0.1 * GB else f"{size / 1e6:.1f} MB"


def describe_program(plan: ProgramPlan, account: ProgramAccount) -> str:
  """A program's account, for people."""
  memory = "  ".join(f"{kind} {size_text(size)}" for kind, size in account.memory.items())
  of = f" of {size_text(plan.device.hbm)}" if plan.device.hbm else ""
  total = size_text(sum(account.memory.values()))
  lines = [_title(plan, account), f"  per device       {memory}  = {total}{of}"]
  if account.problem:
    return "\n".join([*lines, f"  the compiler     {account.problem}"])
  several = account.shape is not None and account.shape.samples > 1
  rows = ", if a sample fills each row" if several else ""
  lines += [_operations(plan.device.count, account, rows)]
  if account.kernels:
    calls = "  ".join(f"{kind} {calls:.0f} x" for kind, calls in account.kernels.items())
    lines.append(f"  kernels          {calls}")
  sent = "  ".join(
    f"{kind} {count:.0f} x, {size_text(size)}"
    for kind, (count, size) in account.collectives.items()
  )
  lines.append(f"  collectives      {sent or 'none'}")
  if account.seconds:
    bound = max(account.seconds, key=account.seconds.__getitem__)
    each = "  ".join(f"{kind} {seconds:.3f}" for kind, seconds in account.seconds.items())
    least = f"at least {account.seconds[bound]:.3f}{rows}, bound by {bound} ({each})"
    lines.append(f"  seconds          {least}")
  else:
    lines.append(f"  seconds          not known: no figures for {plan.device.kind}")
  if account.estimate:
    own = f"estimates {account.estimate:.3f} s (kernels and loops counted in its own way)"
    lines.append(f"  the compiler     {own}")
  return "\n".join(lines)


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
  """The line of operations and traffic."""
  executed, kernels, model = (
    f"{number / count / TERA:.4g}"
    for number in (account.executed, account.in_kernels, account.model)
  )
  unknown = f"; not counted: {', '.join(account.not_counted)}" if account.not_counted else ""
  return (
    f"  operations       {executed} TFLOP per device ({kernels} in kernels{rows}), {model} of the "
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
  each = collections.Counter(micro.shape for micro in micros)
  lines = [
    f"a step of {plan.config.train.batch_size} samples, the average of {count:,}:",
    *(f"  {n / count:.2f} x {loop.describe_shape(shape)}" for shape, n in sorted(each.items())),
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


def _micro_seconds(plan: ProgramPlan, account: ProgramAccount, micro: Micro) -> float:
  """Predicts a micro-batch: as its program, whose attention computes what the samples need."""
  spent, costs, device = dict(account.seconds), plan.costs, plan.device
  if account.in_kernels and not plan.config.train.vision:
    rows = np.array([costs.attention[list(samples)].sum() for samples in micro.rows])
    load = rows.reshape(costs.groups, -1).sum(1)
    assert device.flops is not None  # or there were no seconds
    spent["compute"] += (
      load.max() / forecast.PICO
      + costs.squares(micro.shape)
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
