"""Time and memory of prefill and encoding, against frames and against text.

python -m xcomp_jax.bench_scaling --out docs/scaling [--run-up-to 2048]

What is longer than --run-up-to is compiled and counted, and not run.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from xcomp_jax import cli, files
from xcomp_jax.bench import bench, parts
from xcomp_jax.bench.options import command_parser
from xcomp_jax.inference.rounds import PREFIX, TEXT


def row(part: parts.Part, x: int, preset: bench.Sizes | None) -> dict[str, Any]:
  """Seconds (None without a preset), counted operations, the share of a matrix product's rate that
  these are, memory.
  """
  counted = parts.flops(part.run, *part.args)
  seconds = share = None
  if preset is None:
    used = jax.jit(part.run).lower(*part.args).compile().memory_analysis()
    assert used is not None  # every backend has it
    temporary = used.temp_size_in_bytes
  else:
    got = bench.measured_row(part, preset)
    seconds, temporary = got["fastest_s"], got["temporary_bytes"]
    share = counted / seconds / got["matmul_flops/s"]
  return {
    "x": x,
    "seconds": seconds,
    "TFLOP": counted / 1e12,
    "of_matmul": share,
    "temporary_GB": temporary / 1e9,
  }


def scaling_rows(
  preset: bench.Sizes, frames: Sequence[int], texts: Sequence[int], most: int
) -> dict[str, list[dict[str, Any]]]:
  """Rows of prefill against frames ("frames") and text ("text"), and of encoding ("encoding", not
  run).
  """
  cfg = parts.sized(preset.like, preset.dtype, clips_per_chunk=1)
  out = {"frames": [], "text": [], "encoding": []}

  def add(group, part, x, run):
    out[group].append(row(part, x, preset if run else None))
    print(json.dumps({group: out[group][-1]}), flush=True)

  for n in frames:
    add("frames", parts.prefill_part(cfg, n, PREFIX + TEXT, real=n <= most), n, n <= most)
  for n in texts:
    add("text", parts.prefill_part(cfg, min(frames), n), n, True)
  for n in frames:
    add("encoding", parts.tower(cfg, n // 8, real=False), n, False)
  return out


def draw_scaling(rows: dict[str, list[dict[str, Any]]], file: pathlib.Path) -> None:
  """Draws what `scaling_rows` gives.

  Raises:
    ImportError: there is no matplotlib.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 6.5), layout="constrained")
  panels = (
    ("frames", "seconds", "Prefill: seconds"),
    ("frames", "TFLOP", "Prefill: TFLOP, counted"),
    ("text", "seconds", f"Prefill of {rows['frames'][0]['x']} frames: seconds"),
    ("frames", "temporary_GB", "Temporaries, GB"),
  )
  for axis, (group, name, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
    lines = {"prefill": (group, "o-")}
    if name == "temporary_GB":
      lines["encoding, a clip at a time"] = ("encoding", "s-")
    for label, (of, style) in lines.items():
      shown = [(row["x"], row[name]) for row in rows[of] if row[name] is not None]
      axis.plot(*zip(*shown), style, label=label)
    if len(lines) > 1:
      axis.legend(frameon=False)
    axis.set(
      title=title,
      xlabel="text tokens" if group == "text" else "frames",
      ylim=(0, None),
      xlim=(0, None),
    )
    axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  args = command_parser(
    "bench_scaling",
    __doc__,
    {
      "--preset": bench.preset_option(),
      "--frames": {"type": int, "nargs": "+", "default": [256, 512, 1024, 2048, 4096, 8192]},
      "--text": {"type": int, "nargs": "+", "default": [86, 512, 1024], "help": "tokens"},
      "--run-up-to": {
        "type": int,
        "default": 2048,
        "help": "frames; what is longer is compiled and counted",
      },
      "--out": {"type": files.path_of, "required": True, "help": "name of the .json and the .png"},
    },
  ).parse_args(argv)
  with cli.command(ImportError):
    if any(n % 8 or n < 8 for n in args.frames) or min(args.text) <= PREFIX:
      raise ValueError(f"--frames must be multiples of 8, and --text more than {PREFIX}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = scaling_rows(bench.PRESETS[args.preset], sorted(args.frames), args.text, args.run_up_to)
    files.write_file(args.out.with_suffix(".json"), json.dumps(rows, indent=1) + "\n")
    draw_scaling(rows, args.out.with_suffix(".png"))
