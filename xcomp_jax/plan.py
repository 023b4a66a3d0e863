"""What a run would take, before there is a pod: compiles its programs for a topology and says whether they fit.

  python -m xcomp_jax.plan --config=configs/sct.py --topology=v5e:4x4
  python -m xcomp_jax.plan --config=configs/sct.py:7b --topology=v5p:2x2x2 --programs features apply --text 512
  python -m xcomp_jax.plan --table docs/plan --quick

The TPU compiler itself does it (libtpu; pip install 'xcomp_jax[plan]'), no TPU is needed; without --topology the programs are
compiled for the devices that are here. Programs are the gradient step on frames and on features, the optimizer's step, prefill and
the tower, each on the bucket that takes most. With all 28 layers one takes many minutes; --quick has the compiler try less
hard, --layers 2 compiles two layers and extrapolates. Ends with exit code 1 if something does not fit, and says what would
help.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xcomp_jax import programs, sharding
from xcomp_jax.config import ConfigError, from_command_line
from xcomp_jax.files import command, write_json
from xcomp_jax.programs import GRADIENTS, NAMES, TRAINING, Plan, held

GB = 1e9
LARGE = 4 * 2**20  # bytes on every device from which on an array should be split


_say = functools.partial(print, flush=True)


class PlanError(ValueError):
  """Something does not fit, or is not split; the message says by how much and what would help."""


# --- what it means ----------------------------------------------------------------------------------------------------


def unsplit(state: Any, mesh: Mesh) -> list[str]:
  """Large arrays that an axis for parameters does not split, although it could; in words, with what that costs.

  state: ShapeDtypeStructs with shardings.
  """
  axes = {axis for _, names in sharding.PARAMETERS for name in names if name for axis in sharding.LOGICAL[name]}
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    used = {name for names in leaf.sharding.spec for name in np.atleast_1d(names) if name}
    here, size = leaf.sharding.shard_shape(leaf.shape), held(leaf)
    could = [axis for axis in sorted(axes - used) if (n := mesh.shape[axis]) > 1 and any(side % n == 0 for side in here)]
    if size >= LARGE and could:
      found.append(
        f"{sharding.path_name(path)} {list(leaf.shape)} takes {_size(size)} on every device, and would take "
        f"{_size(size / mesh.shape[could[0]])} if {could[0]} = {mesh.shape[could[0]]} split it; give it a rule in sharding.PARAMETERS"
      )
  return found


def needed(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> float:
  """Bytes per device while a program runs, what the runtime keeps for itself included.

  rows: other programs; of training's, the optimizer's step and a gradient step stay loaded together.
  """
  beside = [r["memory"]["program"] for r in rows if r["name"] in TRAINING and (r["name"] == "apply") != (row["name"] == "apply")]
  return sum(row["memory"].values()) + (max(beside, default=0.0) if row["name"] in TRAINING else 0.0)


def remedies(plan: Plan, row: Mapping[str, Any], total: float) -> list[str]:
  """What would make a program that needs `total` bytes smaller, with what would then be needed; estimates say so."""
  config, memory = plan.config, row["memory"]
  state = sum(memory.get(kind, 0.0) for kind in ("parameters", "optimizer state", "gradients"))
  parts, mesh = sharding.batch_devices(plan.mesh), plan.mesh.shape
  out: list[tuple[str, float]] = []
  if row["name"] in TRAINING and mesh.get("data", 1) > 1:
    whole = dataclasses.replace(config.mesh, data=1, fsdp=-1)
    sequence = sharding.sequence_parts(plan.full, config.data)
    other = dataclasses.replace(plan, mesh=sharding.make_mesh(whole, list(plan.mesh.devices.flat), config.train.batch_size, sequence))
    _, _, new, sums = programs.training(other, plan.full)
    out.append(("--config.mesh.data=1 --config.mesh.fsdp=-1 splits the state further", total - state + held(new) + held(sums)))
  if row["name"] in GRADIENTS:
    # What the backward pass needs of a layer beside its input, if nothing is computed again: about queries, keys, values,
    # what is attended, two norms' and two residuals' outputs, and three times the MLP's width.
    m, rows = plan.full.llm, plan.rows // parts
    kept = sum(programs.slots(plan.full, plan.bucket)) * rows * (7 * m.width + 3 * m.mlp_width) * np.dtype(plan.full.dtype).itemsize
    if not config.model.remat:
      out.append(("--config.model.remat=True (estimated)", total - min(kept, 0.9 * memory["temporaries"])))
    if rows > 1:
      less = (memory["temporaries"] + memory["batch"]) * (1 - 1 / rows)
      out.append((f"one sample per device, --config.data.frames_per_device={plan.bucket.frames} (estimated)", total - less))
    tokens, half = sum(programs.slots(plan.full, plan.bucket)), dataclasses.replace(plan.bucket, clips=plan.bucket.clips // 2)
    if half.clips:
      less = (memory["temporaries"]) * (1 - sum(programs.slots(plan.full, half)) / tokens) + memory["batch"] / 2
      out.append((f"at most {half.frames} frames, by predecode and config.data.frame_buckets (estimated)", total - less))
    if config.model.param_dtype == "float32":
      trained = total - (memory["optimizer state"] + _trained(plan)) / 2
      out.append(("--config.model.param_dtype=bfloat16, which also rounds what is learned", trained))
  if row["name"] == "frames":
    features = 2 * held(programs.batch_of(plan, plan.full, "features"))
    out.append(("features instead of frames (predecode --features): the batch alone", total - memory["batch"] + features))
  if row["name"] in ("frames", "tower") and config.model.clips_per_chunk > 1:
    out.append(("--config.model.clips_per_chunk=1: less in the tower; plan it", math.nan))
  out.append((f"{2 * plan.device.count} devices of this kind: the state alone", total - state / 2))
  limit = plan.device.hbm or math.inf
  verdict = lambda size: "" if math.isnan(size) else f": {_size(size)}, {'fits' if size <= limit else 'not enough alone'}"
  return [text + verdict(size) for text, size in out]


def _trained(plan: Plan) -> float:
  return held(programs.training(plan, plan.full)[2].trained)


def describe(plan: Plan, row: Mapping[str, Any]) -> str:
  """A program's account, for people."""
  n, count = plan.bucket, plan.device.count
  shape = "" if row["name"] == "apply" else (
    f", {plan.rows} x ({n.frames} frames, {n.prefix} + {n.text} text tokens)"
  )  # fmt: skip
  layers = "" if row["layers"] == row["of"] else (
    f"\n  EXTRAPOLATED to {row['of']} layers from {row['layers']}: temporaries, program, traffic, collectives; the rest is exact"
  )  # fmt: skip
  quick = ", with --quick: temporaries may be a tenth larger than in training, the program is smaller" if row["effort"] else ""
  lines = [f"{TITLES[row['name']]}{shape}; compiled in {row['compile_s']:.0f} s{quick}{layers}"]
  kinds = "  ".join(f"{kind} {_size(size)}" for kind, size in row["memory"].items())
  of = f" of {_size(plan.device.hbm)}" if plan.device.hbm else ""
  lines.append(f"  per device       {kinds}  = {_size(needed(row))}{of}")
  if row["problem"]:
    return "\n".join([*lines, f"  the compiler     {row['problem']}"])
  flops = row["flops"]
  lines.append(
    f"  operations       {flops['executed'] / count / 1e12:.4g} TFLOP per device ({flops['kernels'] / count / 1e12:.4g} in kernels), "
    f"{flops['model'] / count / 1e12:.4g} of the model; HBM traffic {_size(row['hbm'])}"
    + (f"; not counted: {', '.join(row['not counted'])}" if row["not counted"] else "")
  )
  sent = "  ".join(f"{kind} {count:.0f} x, {_size(size)}" for kind, (count, size) in row["collectives"].items())
  lines.append(f"  collectives      {sent or 'none'}")
  if row["seconds"]:
    bound = max(row["seconds"], key=row["seconds"].get)
    each = "  ".join(f"{kind} {seconds:.3f}" for kind, seconds in row["seconds"].items())
    lines.append(f"  seconds          at least {row['seconds'][bound]:.3f}, bound by {bound} ({each})")
  else:
    lines.append(f"  seconds          not known: no figures for {plan.device.kind}")
  if row["estimate"]:
    lines.append(f"  the compiler     estimates {row['estimate']:.3f} s (kernels and loops counted in its own way)")
  return "\n".join(lines)


def _size(size: float) -> str:
  """Bytes, for people: decimal GB, or MB where they are few."""
  return f"{size / GB:.2f} GB" if size >= 0.1 * GB else f"{size / 1e6:.1f} MB"


TITLES = {
  "features": "gradient step on features", "frames": "gradient step on frames", "apply": "optimizer step",
  "prefill": "prefill of features", "tower": "tower with merging",
}  # fmt: skip


def step_line(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """What an optimizer step takes at least, if its micro-batches all are of the largest bucket; one line per kind of data."""
  seconds = {row["name"]: max(row["seconds"].values()) for row in rows if row["seconds"]}
  micro = math.ceil(plan.config.train.batch_size / plan.rows)
  return [
    f"a step of {plan.config.train.batch_size} samples on {kind}: {micro} x {seconds[kind]:.2f} + {seconds['apply']:.2f} s, at least "
    f"{micro * seconds[kind] + seconds['apply']:.2f} s"
    for kind in GRADIENTS if kind in seconds and "apply" in seconds
  ]  # fmt: skip


def problems(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """What does not fit, with remedies."""
  out = []
  limit = plan.device.hbm or math.inf
  for row in rows:
    total = needed(row, rows)
    if row["problem"] or total > limit:
      over = f"needs {_size(total)} per device, {plan.device.kind} has {_size(limit)}"
      out.append("\n  ".join([f"{TITLES[row['name']]} does not fit: {over}; what would help:", *remedies(plan, row, total)]))
  return out


# --- the command ------------------------------------------------------------------------------------------------------


def run(plan: Plan, names: Sequence[str], say: Callable[[str], None] = _say) -> list[dict[str, Any]]:
  """Accounts for each program, and says so.

  Raises:
    PlanError: something does not fit, or a large array is not split.
  """
  cfg = plan.full
  say(
    f"{plan.device.count} x {plan.device.kind}, mesh {dict(plan.mesh.shape)}; {plan.config.init_from}: {cfg.llm.layers} layers of width "
    f"{cfg.llm.width}, tower of {cfg.vision.layers}"
  )
  _, _, state, sums = programs.training(plan, cfg)
  if found := unsplit(state, plan.mesh) + unsplit(sums, plan.mesh):
    raise PlanError("; ".join(found))
  rows = []
  for name in names:
    rows.append(programs.account(plan, name))
    say(describe(plan, rows[-1]))
  for line in step_line(plan, rows):
    say(line)
  buckets = len(plan.config.data.frame_buckets) * len(plan.config.data.text_buckets)
  code = max((row["memory"]["program"] for row in rows if row["name"] in GRADIENTS), default=0.0)
  if buckets > 1 and code:
    say(f"every bucket that occurs in the data, of {buckets}, keeps a program of its own: up to {_size(code)} each")
  if found := problems(plan, rows):
    raise PlanError("\n".join(found))
  if plan.device.hbm:
    say("all of it fits")
  return rows


# What the README's table shows: variant of configs/sct.py, topology, frames, data, and what else the config needs.
CONTEXT = ("--config.mesh.context=4",)
CELLS: tuple[tuple[str, str, int, str, tuple[str, ...]], ...] = (
  *((v, t, 1024, d, ()) for v, t in (("", "v5e:2x2"), ("", "v5e:4x4"), ("", "v5p:2x2x1"), ("", "v6e:2x2")) for d in GRADIENTS),
  *(("7b", t, 1024, d, ()) for t in ("v5e:4x4", "v5p:2x2x2") for d in GRADIENTS),
  ("", "v5e:4x4", 4096, "features", CONTEXT),
  ("", "v5e:16x16", 1024, "features", ()),
)  # fmt: skip
TEXT = 512  # tokens behind the frames, in the table


def table(folder: pathlib.Path, layers: int | None, effort: float, say: Callable[[str], None] = _say) -> str:
  """The README's table; a cell that is done lies in the folder, and the same program is not compiled again by the same versions.

  Raises:
    ConfigError: see `programs.make`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  libtpu = next((d.version for d in importlib.metadata.distributions(name="libtpu")), None)
  lines = [
    "| | topology | frames | data | GB per device | of | TFLOP per device | at least | bound by |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for i, (variant, where, frames, data, extra) in enumerate(CELLS, 1):
    model = "7B" if variant else "2B"
    asked: dict[str, Any] = {"cell": [variant, where, frames, data, *extra], "layers": layers, "text": TEXT, "effort": effort}
    asked |= {"jax": jax.__version__, "libtpu": libtpu}
    file = folder / f"{model}_{where}_{frames}_{data}{'' if layers is None else f'_{layers}'}.json".replace(":", "_")
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    before = {row["name"]: row for row in known["programs"]} if known.get("asked") == asked else {}
    say(f"cell {i} of {len(CELLS)}: {model}, {where}, {frames} frames, {data}")
    config = from_command_line(["plan", f"--config=configs/sct.py:{variant}".rstrip(":"), *extra])
    jax.clear_caches()  # of the cells before: ten of them and a compilation of 7B are more than 24 GB
    plan = programs.make(config, where, layers=layers, frames=frames, text=TEXT, effort=effort)
    rows = [programs.account(plan, name, before.get(name)) for name in (data, "apply")]
    for row in rows:
      say(describe(plan, row))
    known = {"asked": asked, "hbm": plan.device.hbm, "devices": plan.device.count, "programs": rows}
    write_json(file, known, indent=1)
    row = known["programs"][0]
    size, limit = max(needed(row, known["programs"]) for row in known["programs"]), known["hbm"]
    assert limit is not None  # of every chip in CELLS
    bound = max(row["seconds"], key=row["seconds"].get, default="-")
    seconds = f"{row['seconds'][bound]:.2f} s" if row["seconds"] else "-"
    lines.append(
      f"| {model} | {where} | {frames:,} | {data} | {size / GB:.2f}{'' if size <= limit else ' (**does not fit**)'} | {limit / GB:.1f} | "
      f"{row['flops']['executed'] / known['devices'] / 1e12:.0f} | {seconds} | {bound} |"
    )
  if effort:
    lines.append("\nCompiled with --quick: the compiler's least effort, whose programs take a little more memory than those of training.")
  if layers is not None:
    lines.append(f"\nExtrapolated from {layers} layers, except for state, operations and their time.")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    epilog="Every other option overrides the config, as in training: --config.mesh.tensor=2",
  )  # fmt: skip
  add = parser.add_argument
  add("--topology", help="a TPU version and shape, such as v5e:4x4; default: the devices that are here")
  add("--programs", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=f"default: all of {' '.join(NAMES)}")
  add("--layers", type=int, help="compile so many layers only, and extrapolate")
  add("--quick", action="store_true", help="the compiler's least effort: an eighth of the time, a tenth more of temporaries")
  add("--frames", type=int, help="of a sample; default: those of the bucket that takes most")
  add("--text", type=int, help="tokens behind the frames, likewise")
  add("--table", type=pathlib.Path, metavar="FOLDER", help="make the README's table, keeping every cell there")
  args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  effort = -1.0 if args.quick else 0.0
  with command(interrupted="interrupted; what was finished stays"):
    if args.topology or args.table:
      jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    if args.table:
      if rest:
        raise ConfigError(f"--table has cells of its own, so it takes no {rest[0]}")
      print(table(args.table, args.layers, effort))
      return
    config = from_command_line(["plan", *rest])
    plan = programs.make(config, args.topology, layers=args.layers, frames=args.frames, text=args.text, effort=effort)
    run(plan, args.programs)


if __name__ == "__main__":
  main()
