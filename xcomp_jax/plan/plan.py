r"""Says what a run would take, and whether it fits, before there is a pod.

It compiles the run's programs for a topology.

  python -m xcomp_jax.plan --config=configs/sct.py --topology=v5e:4x4
  python -m xcomp_jax.plan --config=configs/sct.py:7b --topology=v5p:2x2x2 --programs gradient \
      apply --text 2048
  python -m xcomp_jax.plan --config=configs/sct.py --topology=v5e:4x4 --lengths FILE --quick
  python -m xcomp_jax.plan --config=configs/sct.py --lengths FILE --devices 1,8,32,256 --chip v5e
  python -m xcomp_jax.plan --config=configs/sct.py --topology=h100:8 --layers 2
  python -m xcomp_jax.plan --config=configs/sct.py --fits fits --cards h100 l4

The compiler of TPUs (pip install 'xcomp_jax[plan]') or of NVIDIA's GPUs ('xcomp_jax[plan-gpu]')
does it, and needs none of them; without --topology the programs are compiled for the devices that
are here. Programs are those of training (a gradient step for each shape of micro-batches, the
tower, the optimizer's step, evaluation) and of asking (the tower, prefill, a round that scores
frames, the question's rows, a token of the answer). With --lengths FILE (JSON, {"frames": [...],
"text": [...]}, a number per sample) or --data STORE (a folder written by predecode) mesh and
shapes are those that training on these samples has and the seconds of an average step are
predicted. Without, samples of 1,024 frames and 512 tokens fill a row each. Lengths without
--topology print a table of what the whole run takes at least, and nothing is compiled.

With all 28 layers a program takes many minutes; --quick has the compiler try less hard, --layers
2 compiles two layers and extrapolates. Ends with exit code 1 if something does not fit, and says
what would help.
"""

import argparse
import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.cli import command
from xcomp_jax.config import ConfigError, MeshConfig, RunConfig, VLMConfig, check_trained
from xcomp_jax.config_io import from_command_line
from xcomp_jax.data import packing
from xcomp_jax.data.batch import Length, length_table
from xcomp_jax.data.blend import measure_lengths
from xcomp_jax.data.packing import Micro
from xcomp_jax.errors import XCompError
from xcomp_jax.files import expanduser, path_of
from xcomp_jax.inference import generate
from xcomp_jax.parallel import chips
from xcomp_jax.parallel.mesh import AXES, LOGICAL, PARAMETERS, make_mesh, path_name
from xcomp_jax.plan import fits, programs
from xcomp_jax.plan.accounts import account_program
from xcomp_jax.plan.programs import NAMES, TRAINING, ProgramPlan, bytes_held
from xcomp_jax.plan.table import read_lengths, run_table
from xcomp_jax.training import loop, metrics
from xcomp_jax.training.costs import PICO, capability
from xcomp_jax.training.prepare import open_data

GB = 1e9
SHARE = 0.9  # of a card's memory that JAX may have and CUDA gets along
SHOWN = 2  # of the arrays that are not split
LARGE = 4 * 2**20  # bytes on every device from which on an array should be split


_say = functools.partial(print, flush=True)


class PlanError(XCompError, ValueError):
  """Something does not fit, or is not split; the message says by how much and what would help."""


# --- what it means
# ----------------------------------------------------------------------------------------


def unsplit(state: Any, mesh: Mesh) -> list[str]:
  """Large arrays that an axis for parameters does not split, although it could; in words, with what
  that costs.

  state: ShapeDtypeStructs with shardings.
  """
  axes = {axis for _, names in PARAMETERS for name in names if name for axis in LOGICAL[name]}
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    used = {name for names in leaf.sharding.spec for name in np.atleast_1d(names) if name}
    here, size = leaf.sharding.shard_shape(leaf.shape), bytes_held(leaf)
    parts = {axis: mesh.shape[axis] for axis in sorted(axes - used)}
    could = [axis for axis, n in parts.items() if n > 1 and any(side % n == 0 for side in here)]
    if size >= LARGE and could:
      n = parts[could[0]]
      found.append(
        f"{path_name(path)} {list(leaf.shape)} takes {_size(size)} on every device, and "
        f"would take "
        f"{_size(size / n)} if {could[0]} = {n} split it; give it a rule in sharding.PARAMETERS"
      )
  return found


def bytes_needed(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> float:
  """Bytes per device while a program runs, what the runtime keeps for itself included.

  rows: all programs; those of training stay loaded together.
  """
  beside = [
    r["memory"]["program"]
    for r in rows
    if r is not row and {r["name"], row["name"]} <= set(TRAINING)
  ]
  return sum(row["memory"].values()) + sum(beside)


def enough(total: float, shared: float, count: int, limit: float) -> tuple[int, float]:
  """How many devices, by doubling, bring the bytes of each from `total`, `shared` of them by
  `count` devices, to `limit`, and the bytes then.

  Twice as many, where no number does.
  """
  sizes = {factor * count: total - shared * (1 - 1 / factor) for factor in (2, 4, 8, 16, 32, 64)}
  return next(
    ((n, size) for n, size in sizes.items() if size <= limit), (2 * count, sizes[2 * count])
  )


def remedies(plan: ProgramPlan, row: Mapping[str, Any], total: float) -> list[str]:
  """Says what would make a program that needs `total` bytes smaller, and what it would need
  then.
  """
  config, memory, shape, limit = (
    plan.config,
    row["memory"],
    row["shape"],
    plan.device.hbm or math.inf,
  )
  state = sum(memory.get(kind, 0.0) for kind in ("parameters", "optimizer state", "gradients"))
  data, fsdp, tensor, context = (plan.mesh.shape[axis] for axis in AXES)
  out: list[tuple[str, float]] = []
  if plan.device.reserve > (1 - SHARE) * limit and capability(plan.device) > (0, 0):
    more = f"XLA_PYTHON_CLIENT_MEM_FRACTION={SHARE}, of which JAX takes {chips.memory_share():g}"
    out.append((more, total - plan.device.reserve + (1 - SHARE) * limit))
  if row["name"] in TRAINING and data > 1:
    whole = make_mesh(MeshConfig(1, data * fsdp, tensor, context), list(plan.mesh.devices.flat))
    _, _, new, sums = programs.abstract_training(dataclasses.replace(plan, mesh=whole), plan.full)
    split = "--config.mesh.data=1 --config.mesh.fsdp=-1 splits the state further"
    out.append(
      (split, total - state + bytes_held((new.trained, new.frozen, new.opt)) + bytes_held(sums))
    )
  if row["name"] == "gradient":
    # What the backward pass needs of a layer beside its input, if nothing is computed again: about
    # queries, keys, values, what is attended, two norms' and two residuals' outputs, and three
    # times the MLP's width.
    m, rows = plan.full.llm, shape.rows // (data * fsdp)
    kept = (7 * m.width + 3 * m.mlp_width) * np.dtype(plan.full.dtype).itemsize
    kept *= programs.slots(plan.full, shape) * rows / (tensor * context)
    if not config.model.remat:
      out.append(
        ("--config.model.remat=True (estimated)", total - min(kept, 0.9 * memory["temporaries"]))
      )
    half, smaller = rows * shape.frames // 2, total - (memory["temporaries"] + memory["batch"]) / 2
    if half >= np.max(plan.lengths, 0)[0]:
      share = half // (tensor * context)
      out.append(
        (
          f"--config.data.frames_per_device={share}, or such config.data.shapes (estimated)",
          smaller,
        )
      )
    elif half:
      out.append(
        (
          f"samples of at most {half} frames, by predecode, and shapes to match (estimated)",
          smaller,
        )
      )
    if config.model.param_dtype == "float32":
      trained = total - (memory["optimizer state"] + _trained(plan)) / 2
      out.append(
        ("--config.model.param_dtype=bfloat16, which also rounds what is learned", trained)
      )
  if row["name"] == "encode":
    out.append(
      (
        "--clips-per-chunk 1 (estimated)",
        total - (memory["temporaries"] + memory["clips"]) * (1 - 1 / plan.full.clips_per_chunk),
      )
    )
  if row["name"] in ("prefill", "decode"):
    kept = sum(memory.get(kind, 0.0) for kind in ("batch", "caches", "results", "temporaries"))
    out.append(
      (
        f"--select {shape.frames // 2}, which keeps half of these frames (estimated)",
        total - kept / 2,
      )
    )
  if row["name"] == "tower":
    chunks = (memory["temporaries"] + memory["clips"] + memory["next clips"]) * (
      1 - 1 / plan.full.clips_per_chunk
    )
    if chunks:
      out.append(("--config.model.clips_per_chunk=1 (estimated)", total - chunks))
    rest = total - memory["tower"] - memory["temporaries"] - memory["clips"] - memory["next clips"]
    out.append(
      (
        "features instead of frames (predecode --features), which need no tower: the state alone",
        rest,
      )
    )
  if row["name"] in TRAINING:
    # of the optimizer, which are as large as the state
    shared = state + (memory["temporaries"] if row["name"] == "apply" else 0.0)
    count, size = enough(total, shared, plan.device.count, limit)
    out.append((f"{count} devices of this kind: the state alone", size))
  return [
    f"{text}: {_size(size)}, {'fits' if size <= limit else 'not enough alone'}"
    for text, size in out
  ]


def _trained(plan: ProgramPlan) -> float:
  return bytes_held(programs.abstract_training(plan, plan.full)[2].trained)


def describe_program(plan: ProgramPlan, row: Mapping[str, Any]) -> str:
  """A program's account, for people."""
  count, cfg = plan.device.count, plan.full
  shape = "" if row["shape"] is None else f", {loop.describe_shape(row['shape'])}"
  if row["name"] in ("tower", "encode"):
    shape = f", {cfg.clips_per_chunk} clips of {cfg.clip_frames} frames a device"
  if row["name"] == "decode":
    shape += f", {generate.STREAM} of each"
  layers = (
    ""
    if row["layers"] == row["of"]
    else (
      f"\n  EXTRAPOLATED to {row['of']} layers from {row['layers']}: temporaries, program, "
      f"traffic, collectives; "
      "the rest is exact"
    )
  )
  slower = (
    ", with --quick: temporaries may be a tenth larger than in training, the program is smaller"
  )
  quick = slower if plan.effort else ""
  lines = [f"{TITLES[row['name']]}{shape}; compiled in {row['compile_s']:.0f} s{quick}{layers}"]
  kinds = "  ".join(f"{kind} {_size(size)}" for kind, size in row["memory"].items())
  of = f" of {_size(plan.device.hbm)}" if plan.device.hbm else ""
  lines.append(f"  per device       {kinds}  = {_size(bytes_needed(row))}{of}")
  if row["problem"]:
    return "\n".join([*lines, f"  the compiler     {row['problem']}"])
  flops = {kind: f"{number / count / 1e12:.4g}" for kind, number in row["flops"].items()}
  rows = (
    ", if a sample fills each row" if row["shape"] is not None and row["shape"].samples > 1 else ""
  )
  lines.append(
    f"  operations       {flops['executed']} TFLOP per device ({flops['kernels']} in "
    f"kernels{rows}), "
    f"{flops['model']} of the model; HBM traffic {_size(row['hbm'])}"
    + (f"; not counted: {', '.join(row['not counted'])}" if row["not counted"] else "")
  )
  if row["kernels"]:
    lines.append(
      "  kernels          "
      + "  ".join(f"{kind} {calls:.0f} x" for kind, calls in row["kernels"].items())
    )
  sent = "  ".join(
    f"{kind} {count:.0f} x, {_size(size)}" for kind, (count, size) in row["collectives"].items()
  )
  lines.append(f"  collectives      {sent or 'none'}")
  if row["seconds"]:
    bound = max(row["seconds"], key=row["seconds"].get)
    each = "  ".join(f"{kind} {seconds:.3f}" for kind, seconds in row["seconds"].items())
    lines.append(
      f"  seconds          at least {row['seconds'][bound]:.3f}{rows}, bound by {bound} ({each})"
    )
  else:
    lines.append(f"  seconds          not known: no figures for {plan.device.kind}")
  if row["estimate"]:
    lines.append(
      f"  the compiler     estimates {row['estimate']:.3f} s (kernels and loops counted in its own "
      f"way)"
    )
  return "\n".join(lines)


def _size(size: float) -> str:
  """Bytes, for people: decimal GB, or MB where they are few."""
  return f"{size / GB:.2f} GB" if size >= 0.1 * GB else f"{size / 1e6:.1f} MB"


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


def step_lines(plan: ProgramPlan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Predicts the seconds of an average step, on features and on frames, by the programs that were
  compiled.
  """
  of = {(row["name"], row["shape"]): row for row in rows if row["seconds"]}
  if not {("apply", None), *(("gradient", shape) for shape in plan.shapes)} <= of.keys():
    return []
  micros, count = [micro for step in plan.steps for micro in step], len(plan.steps)
  gradients = (
    sum(_micro_seconds(plan, of["gradient", micro.shape], micro) for micro in micros) / count
  )
  each = collections.Counter(micro.shape for micro in micros)
  rest = max(of["apply", None]["seconds"].values())
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
  if missing := sorted({what for row in rows for what in row["not counted"]}):
    lines.append(
      f"  not counted in these seconds: {', '.join(missing)}; `--lengths` without `--topology` "
      f"counts all attention"
    )
  return [*lines, f"compiled in {sum(row['compile_s'] for row in rows):.0f} s in all"]


def _micro_seconds(plan: ProgramPlan, row: Mapping[str, Any], micro: Micro) -> float:
  """Predicts a micro-batch: as its program, whose attention computes what the samples need."""
  spent, costs, device = dict(row["seconds"]), plan.costs, plan.device
  if row["flops"]["kernels"] and not plan.config.train.vision:
    load = (
      np.array([costs.attention[list(samples)].sum() for samples in micro.rows])
      .reshape(costs.groups, -1)
      .sum(1)
    )
    assert device.flops is not None  # or there were no seconds
    spent["compute"] += (
      load.max() / PICO
      + costs.squares(micro.shape)
      - row["flops"]["kernels"] / (device.count * device.flops)
    )
  return max(spent.values())


def _tower_seconds(plan: ProgramPlan, row: Mapping[str, Any]) -> tuple[float, float]:
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
  seconds = clips / cfg.clips_per_chunk * max(row["seconds"].values())
  if plan.device.links:
    features = frames * cfg.tokens_per_frame * cfg.vision.width * np.dtype(cfg.dtype).itemsize
    seconds += (row["memory"]["tower"] + features) * (n - 1) / n / plan.device.links
  return calls, seconds


def problems(plan: ProgramPlan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """What does not fit, with remedies."""
  out = []
  limit = plan.device.hbm or math.inf
  for row in rows:
    total = bytes_needed(row, rows)
    if row["problem"] or total > limit:
      over = f"needs {_size(total)} per device, {plan.device.kind} has {_size(limit)}"
      words = f"{TITLES[row['name']]} does not fit: {over}; what would help:"
      out.append("\n  ".join([words, *remedies(plan, row, total)]))
  return out


# --- the command
# ----------------------------------------------------------------------------------------


def account_programs(
  plan: ProgramPlan, names: Sequence[str], say: Callable[[str], None] = _say
) -> list[dict[str, Any]]:
  """Accounts for each program, and says so.

  Raises:
    PlanError: something does not fit, or a large array is not split.
    ConfigError: programs of training in a dtype that it has not.
  """
  cfg = plan.full
  if set(names) & set(TRAINING):
    check_trained(plan.config.model)
  say(
    f"{plan.device.count} x {plan.device.kind}, mesh {dict(plan.mesh.shape)}; "
    f"{plan.config.init_from}: "
    f"{cfg.llm.layers} layers of width {cfg.llm.width}, tower of {cfg.vision.layers}"
  )
  _, _, state, sums = programs.abstract_training(plan, cfg)
  if found := unsplit(state, plan.mesh) + unsplit(sums, plan.mesh):
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    odd = [f"{axis} = {n}" for axis, n in plan.mesh.shape.items() if n & (n - 1)]
    help = (
      f". {' and '.join(odd)} can't split most arrays: take 1, 2, 4, 8, ... devices, or another "
      f"mesh, such as --config.mesh.data={plan.mesh.size}"
      if odd
      else ""
    )
    raise PlanError("; ".join(found[:SHOWN]) + more + help)
  rows = []
  for name, shape in programs.asked_programs(plan, names):
    rows.append(account_program(plan, name, shape))
    say(describe_program(plan, rows[-1]))
  for line in step_lines(plan, rows):
    say(line)
  if found := problems(plan, rows):
    raise PlanError("\n".join(found))
  if plan.device.hbm:
    say("all of it fits")
  return rows


def stored_lengths(config: RunConfig, cfg: VLMConfig, store: str) -> list[Length]:
  """Measures the samples of a store as training does.

  Raises:
    StoreError: no such store, or a broken one.
    ConfigError: one that is not for this model.
    CheckpointError, ...: there is no tokenizer.
  """
  data = open_data(store, cfg)
  return measure_lengths(
    data, loading.read_tokenizer(resolve(config.init_from), cfg), config.data.mask
  )


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.plan",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog="Every other option overrides the config, as in training: --config.mesh.tensor=2",
  )
  add = parser.add_argument
  add(
    "--topology",
    help=(
      "a TPU version and shape, such as v5e:4x4, or a GPU and how many, h100:8, on hosts "
      "h100:2x8; default: the devices that are here"
    ),
  )
  names = f"default: all of {' '.join(NAMES)}"
  add("--programs", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=names)
  add("--layers", type=int, help="compile so many layers only, and extrapolate")
  add(
    "--quick",
    action="store_true",
    help="the compiler's least effort: an eighth of the time, more temporaries",
  )
  add(
    "--frames",
    type=int,
    help="of samples that fill a row each; default: config.data.shapes, or 1024",
  )
  add("--text", type=int, help="their tokens behind the frames; default: likewise, or 512")
  of = parser.add_mutually_exclusive_group().add_argument
  of("--lengths", type=path_of, metavar="FILE", help="of samples: JSON, frames and text of each")
  of(
    "--data",
    type=expanduser,
    metavar="STORE",
    help="measure the samples of a folder written by predecode instead",
  )
  add("--devices", metavar="N,N", help="of the table of --lengths or --data; default: 1,8,32,256")
  add("--chip", default="v5e", help="their kind; default: %(default)s")
  add(
    "--fits",
    type=path_of,
    metavar="OUT",
    help="instead: a table of what fits on which GPU; OUT keeps its cells, and the command goes on",
  )
  add(
    "--cards",
    nargs="+",
    choices=fits.CARDS,
    metavar="CARD",
    help=f"with --fits; default: all of {' '.join(fits.CARDS)}",
  )
  args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  with command(interrupted="interrupted"):
    given = args.lengths is not None or args.data is not None
    if given and (args.frames, args.text) != (None, None):
      raise ConfigError(
        "--frames and --text are of samples that are assumed, so there can be no --lengths or "
        "--data"
      )
    if args.devices is not None and (not given or args.topology):
      raise ConfigError("--devices is of the table of --lengths or --data without --topology")
    if args.fits and (
      given
      or (args.topology, args.layers, args.frames, args.text) != (None,) * 4
      or args.quick
      or args.programs != list(NAMES)
    ):
      raise ConfigError(
        "--fits makes a table of its own programs; of the other options only --cards and "
        "--config... go with it"
      )
    if args.cards is not None and not args.fits:
      raise ConfigError("--cards are those of the table of --fits")
    if args.topology or given or args.fits:
      jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    config = from_command_line(["plan", *rest])
    if args.fits:
      print(fits.fits_table(config, args.fits, args.cards or fits.CARDS))
      return
    cfg = programs.model_sizes(config)
    lengths = None
    if given:
      stored = args.data is not None
      lengths = (
        stored_lengths(config, cfg, args.data) if stored else read_lengths(args.lengths, cfg)
      )
    if lengths is not None and args.topology is None:
      print(run_table(config, cfg, lengths, args.devices or "1,8,32,256", args.chip))
      return
    plan = programs.make(
      config,
      args.topology,
      layers=args.layers,
      frames=args.frames,
      text=args.text,
      lengths=lengths,
      effort=-1.0 if args.quick else 0.0,
    )
    account_programs(plan, args.programs)
