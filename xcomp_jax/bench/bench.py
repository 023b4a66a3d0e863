"""How fast every part is on the device that is here, beside what that device could do.

python -m xcomp_jax.bench --preset=cpu --out bench.json [--only tower prefill] [--like DIR]
[--torch] [--profile DIR]

Every row is timed with plain matrix products before and after each run, so that shares hold on a
busy machine. Beside the JSON a PNG shows the roofline (with matplotlib; `--plot bench.json` draws
it later). Needs jax, flax, optax, orbax-checkpoint, numpy and jaxtyping alone, on GPUs tokamax too
for attention at speed ("attention" in the JSON says what ran); rows that want more (`data`) say so
and are left out.
"""

import dataclasses
import functools
import gc
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from xcomp_jax import cli, files, inputs
from xcomp_jax.bench import parts
from xcomp_jax.bench.options import command_parser
from xcomp_jax.bench.timing import seconds_of, timed
from xcomp_jax.config import Dtype
from xcomp_jax.data.batch import Shape
from xcomp_jax.inference.rounds import PREFIX, TEXT
from xcomp_jax.model import kernels

# seconds of LP-Comp prefill on one H200, 863 text tokens
PAPER = {
  1024: 0.12,
  2048: 0.25,
  4096: 0.66,
}
WANTED = {1024: 0.075, 2048: 0.16, 4096: 0.45}  # likewise
# its sizes
RELEASED = pathlib.Path(__file__).parents[2] / "configs/OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448"
GROUPS = ("tower", "merge", "prefill", "plain", "select", "decode", "features", "frames", "data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes of all rows.

  like: a directory with config.json, None for the official CPU benchmark's sizes, "small" for tiny
  ones. side: of the plain matrix product. copied: bytes of the plain copy. runs: of each row.
  frames, text: of prefills; plain: frames of those without compression. clips: in the tower,
  `chunk` at once. tokens: of an answer. scored: frames that QC-Comp scores. row: samples, frames
  and text tokens of a full row of SCT. batch: samples per optimizer step.
  """

  like: str | None
  dtype: Dtype
  side: int
  copied: int
  runs: int
  frames: tuple[int, ...]
  plain: tuple[int, ...]
  text: int
  clips: int
  chunk: int
  tokens: int
  scored: int
  row: tuple[int, int, int]
  batch: int


PRESETS = {
  "smoke": Sizes(
    like="small",
    dtype="float32",
    side=256,
    copied=1 << 20,
    runs=2,
    frames=(16,),
    plain=(16,),
    text=PREFIX + TEXT,
    clips=2,
    chunk=1,
    tokens=4,
    scored=64,
    row=(2, 32, 64),
    batch=8,
  ),
  "cpu": Sizes(
    like=None,
    dtype="float32",
    side=4096,
    copied=1 << 28,
    runs=3,
    frames=(256, 1024),
    plain=(256,),
    text=PREFIX + TEXT,
    clips=1,
    chunk=1,
    tokens=16,
    scored=1024,
    row=(4, 128, 512),
    batch=256,
  ),
  "gpu": Sizes(
    like=str(RELEASED),
    dtype="bfloat16",
    side=8192,
    copied=1 << 32,
    runs=5,
    frames=(1024, 2048, 4096),
    plain=(1024, 2048, 4096),
    text=863,
    clips=32,
    chunk=8,
    tokens=64,
    scored=1024,
    row=(4, 1056, 1024),
    batch=32,  # about the mean of the paper's mixture
  ),
}


def compile_part(part: parts.Part) -> tuple[Callable[[], Any], Any, float]:
  """A call that runs the compiled part again and again, the compiled program, and the seconds of
  compiling.
  """
  spent, _, program = timed(
    jax.jit(part.run, donate_argnums=part.donated).lower(*part.args).compile
  )
  args = list(part.args)

  def call():
    out = program(*args)
    for place in part.donated:  # the call has used these up, and returned what takes their place
      args[place] = out[place]
    return out if not part.donated else out[-1]

  return call, program, spent


def measured_row(
  part: parts.Part, preset: Sizes, copy: float | None = None, traces: pathlib.Path | None = None
) -> dict[str, Any]:
  """A row: seconds (median, fastest, slowest), operations, bytes and their rates, shares of the
  plain programs' rates.

  copy: bytes per second of a plain copy. traces: folder for a trace of one more call. bytes are
  those that a call must move: arguments and results once; `least_s` is what operations and bytes
  take at the plain programs' rates, `bound` says which of both takes longer.
  """
  call, program, compiling = compile_part(part)
  product, _, _ = compile_part(parts.product(preset.side, preset.dtype))
  many = 3 if jax.default_backend() == "cpu" else 20
  seconds_of(call), seconds_of(product)
  runs, products = [], [seconds_of(product, many)]
  for _ in range(preset.runs):
    runs.append(seconds_of(call))
    products.append(seconds_of(product, many))
  used = program.memory_analysis()
  held = float(used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes)
  moved = part.bytes or held
  middle, matmul = statistics.median(runs), 2.0 * preset.side**3 / min(products)
  row = {
    "seconds": middle,
    "fastest_s": min(runs),
    "slowest_s": max(runs),
    "compile_s": compiling,
    "flops": part.flops,
    "bytes": moved,
    "flops/s": part.flops / middle,
    "bytes/s": moved / middle,
    part.unit + "/s": part.amount / middle,
    "matmul_flops/s": matmul,
    "of_matmul": part.flops / middle / matmul,
    "temporary_bytes": used.temp_size_in_bytes,
    "memory_bytes": used.temp_size_in_bytes + held,
  }
  if copy is not None:
    by = {"operations": part.flops / matmul, "bytes": moved / copy}
    row |= {
      "of_copy": moved / middle / copy,
      "least_s": max(by.values()),
      "bound": max(by, key=by.__getitem__),
    }
  if traces is not None:
    with jax.profiler.trace(traces):
      jax.block_until_ready(call())
  return row


def measured_rows(
  preset: Sizes, groups: Sequence[str], torch: bool, profile: pathlib.Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Measures group after group; yields the name and the values of each row. profile: folder of
  traces, None for none.
  """
  copied = measured_row(parts.copying(preset.copied), preset)
  product = measured_row(parts.product(preset.side, preset.dtype), preset)
  yield f"matrix product of {preset.side}", product
  yield "copy", copied

  def one(name: str, part: parts.Part, **more) -> tuple[str, dict[str, Any]]:
    folder = None if profile is None else profile / re.sub("[^a-z0-9]+", "-", name)
    return name, measured_row(part, preset, copied["bytes/s"], folder) | more

  cfg = parts.sized(preset.like, preset.dtype, clips_per_chunk=preset.chunk)
  if "tower" in groups:
    yield one(f"tower, {8 * preset.clips} frames", parts.tower(cfg, preset.clips))
  if "merge" in groups:
    yield one(f"merge, {8 * preset.chunk} frames", parts.merging(cfg, preset.chunk))
  for group, frames, compressed in (
    ("prefill", preset.frames, True),
    ("plain", preset.plain, False),
  ):
    published = compressed and preset.like not in (None, "small")
    for n in frames if group in groups else ():
      beside = {"paper_s": PAPER.get(n), "wanted_s": WANTED.get(n)} if published else {}
      yield one(
        f"{group}, {n} frames", parts.prefill_part(cfg, n, preset.text, compressed), **beside
      )
  for n in preset.frames if torch else ():
    yield f"PyTorch without compression, {n} frames", torch_prefill(cfg, n, preset.text)
  if "select" in groups:
    for mode in ("official", "aligned", "local", "global"):
      if mode == "official" and preset.scored < 1024:
        continue  # has no rounds that short (quirk Q13)
      seen, asked, calls = parts.selecting(cfg, mode, preset.scored)
      yield one(f"select {mode}, {calls} visual rounds", seen, calls=calls)
      yield one(f"select {mode}, the question's rows", asked, calls=calls)
  if "decode" in groups:
    for answers, of in ((1, ""), (5, " of 5 answers"), (10, " of 10 answers")):
      yield one(
        f"decode, {preset.tokens} tokens{of}",
        parts.decoding_part(cfg, preset.frames[0], preset.text, preset.tokens, answers),
      )
  for kind in ("features", "frames"):
    if kind in groups:
      yield from measure_training(preset, one, kind)
  if "data" in groups:
    yield from data(preset)


def measure_training(
  preset: Sizes, one: Callable[[str, parts.Part], tuple[str, dict]], kind: str
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Measures SCT's programs on full rows, and says how many samples per second they make.

  one: measures a part, returns the row's name and its values. kind: "features", or "frames": the
  frozen tower runs, too.
  """
  cfg = parts.sized(preset.like, preset.dtype, clips_per_chunk=preset.chunk, remat=True)
  samples, frames, text = preset.row
  training = functools.partial(
    parts.training_parts,
    cfg,
    Shape(rows=1, samples=samples, prefix=16, frames=frames, text=text),
    "float32",
  )
  # (name, what makes the part, calls per sample)
  jobs = [
    (
      f"gradient, a row of {samples} samples, {frames} frames, {kind}",
      lambda: training()[0],
      1 / samples,
    ),
    (f"optimizer's step, {kind}", lambda: training()[1], 1 / preset.batch),
  ]
  if kind == "frames":
    calls = frames / samples / (8 * preset.clips)
    jobs.append(
      (f"frozen tower, {preset.clips} clips", lambda: parts.tower(cfg, preset.clips), calls)
    )
  rows = []
  for name, make, share in jobs:
    rows.append((one(name, make()), share))
    yield rows[-1][0]
    gc.collect()  # the part's arrays would stay beside the next one's
  seconds, work = (
    sum(row[key] * share for (_, row), share in rows) for key in ("seconds", "flops")
  )
  matmul = max(row["matmul_flops/s"] for (_, row), _ in rows)
  yield (
    f"SCT on {kind}",
    {
      "seconds": seconds,
      "samples/s": 1 / seconds,
      "flops": work,
      "flops/s": work / seconds,
      "of_matmul": work / seconds / matmul,
    },
  )


def data(preset: Sizes) -> Iterator[tuple[str, dict[str, Any]]]:
  """Batches per second that the reader makes of stored frames."""
  try:
    from xcomp_jax.bench.data import storing
  except ImportError as error:
    yield "data", {"not run": f"{error.name} is not installed"}
    return
  size = 48 if preset.like == "small" else 448
  frames = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), np.uint8)
  for kind, row in storing(frames, 4, preset.runs).items():
    yield f"data, {kind}, read by one thread", row


def torch_prefill(cfg, frames: int, text: int) -> dict[str, Any]:
  """A plain Qwen2 in PyTorch over the same tokens: fused attention, no compression, float32, no
  caches.

  Raises:
    ImportError: there is no PyTorch.
  """
  import torch
  from torch.nn import functional as F

  m, one = cfg.llm, torch.ones(cfg.llm.width)
  heads = {"q": m.heads, "k": m.kv_heads, "v": m.kv_heads}
  shapes = {
    **{name: (n * m.head_dim, m.width) for name, n in heads.items()},
    "o": (m.width, m.heads * m.head_dim),
    "gate": (m.mlp_width, m.width),
    "up": (m.mlp_width, m.width),
    "down": (m.width, m.mlp_width),
  }
  layers = [
    {name: torch.randn(*shape) * 0.02 for name, shape in shapes.items()} for _ in range(m.layers)
  ]
  length = text + frames * cfg.tokens_per_frame
  angle = torch.arange(length)[:, None] * m.rope_theta ** -(
    torch.arange(m.head_dim // 2) / (m.head_dim // 2)
  )
  cos, sin = angle.cos(), angle.sin()

  def rotated(x):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

  @torch.inference_mode()
  def run(x):
    for w in layers:
      y = F.rms_norm(x, (m.width,), one, m.norm_eps)
      q, k, v = (
        F.linear(y, w[name]).view(length, n, m.head_dim).transpose(0, 1)[None]
        for name, n in heads.items()
      )
      out = F.scaled_dot_product_attention(
        rotated(q), rotated(k), v, is_causal=True, enable_gqa=True
      )
      x = x + F.linear(out[0].transpose(0, 1).reshape(length, -1), w["o"])
      y = F.rms_norm(x, (m.width,), one, m.norm_eps)
      x = x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])
    return x

  x = torch.randn(length, m.width)
  spent = [seconds_of(lambda: run(x)) for _ in range(3)]
  return {"seconds": statistics.median(spent), "fastest_s": min(spent), "slowest_s": max(spent)}


def row_line(name: str, row: Mapping[str, Any]) -> str:
  """A row as one line."""
  if "not run" in row:
    return f"{name:42} not run: {row['not run']}"
  rate = next(
    (
      key
      for key in row
      if key.endswith("/s") and key not in ("flops/s", "bytes/s", "matmul_flops/s")
    ),
    None,
  )
  shown = [
    f"{name:42} {row['seconds']:10.4f} s",
    f" {row[rate]:12,.1f} {rate}" if rate else " " * 13,
    f"  {row['of_matmul']:6.1%} of matmul" if row.get("of_matmul") else "",
    f"  {row['of_copy']:6.1%} of copy" if row.get("bound") == "bytes" else "",
    f"  paper {row['paper_s']} s" if row.get("paper_s") else "",
    f"  compiled in {row['compile_s']:.1f} s" if "compile_s" in row else "",
  ]
  return "".join(shown)


def plot_roofline(result: Mapping[str, Any], file: pathlib.Path) -> None:
  """Draws the roofline: operations per second against operations per byte, under what plain
  programs reach.

  Rates are scaled by that of the plain product around each row, which a busy machine changes.

  Raises:
    ImportError: there is no matplotlib.
  """
  from matplotlib.figure import Figure

  matmul, copy = result["matmul_flops/s"], result["copy_bytes/s"]
  places = {
    name: (row["flops"] / row["bytes"], row["of_matmul"] * matmul)
    for name, row in result["rows"].items()
    if row.get("flops") and row.get("bytes")
  }
  low, high = min(x for x, _ in places.values()) / 3, max(x for x, _ in places.values()) * 3
  figure = Figure(figsize=(9, 5.5), layout="constrained")
  axis, roof = figure.subplots(), np.geomspace(low, high, 201)
  axis.plot(roof, np.minimum(matmul, copy * roof), color="black", linewidth=1)
  axis.annotate(
    "plain matrix product",
    (high, matmul),
    (0, 4),
    textcoords="offset points",
    ha="right",
    fontsize=8,
  )
  for number, (name, (x, y)) in enumerate(sorted(places.items(), key=lambda place: place[1]), 1):
    axis.plot(x, y, "o", markersize=5, label=f"{number}  {name}")
    # neighbours in rate are often neighbours here
    place = ((4, 4), (4, -10), (-12, 4), (-12, -10))[number % 4]
    axis.annotate(str(number), (x, y), place, textcoords="offset points", fontsize=8)
  axis.set(
    xscale="log",
    yscale="log",
    xlim=(low, high),
    xlabel="operations per byte that must be moved",
    ylabel="operations per second",
    title=f"{result['device']}, {result['dtype']}",
  )
  axis.spines[["top", "right"]].set_visible(False)
  axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
  figure.savefig(file, dpi=130)


def run_benchmarks(
  preset: Sizes,
  name: str,
  groups: Sequence[str],
  torch: bool,
  out: pathlib.Path | None,
  profile: pathlib.Path | None,
) -> dict[str, Any]:
  """Measures, prints, and writes after every row what there is so far."""
  result: dict[str, Any] = {
    "preset": name,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "dtype": preset.dtype,
    "attention": kernels.describe_kernels(
      parts.sized(preset.like, preset.dtype, clips_per_chunk=preset.chunk)
    ),
    "rows": {},
  }
  print(result["attention"], file=sys.stderr)
  for title, row in measured_rows(preset, groups, torch, profile):
    result["rows"][title] = row
    if title == "copy":  # the second row
      result["matmul_flops/s"] = next(iter(result["rows"].values()))["flops/s"]
      result["copy_bytes/s"] = row["bytes/s"]
    print(row_line(title, row), flush=True)
    if out is not None:
      files.write_file(out, json.dumps(result, indent=1) + "\n")
    gc.collect()
  return result


def preset_option() -> dict[str, Any]:
  """--preset of the commands, whose default looks at the device that is here."""
  return {
    "choices": tuple(PRESETS),
    "default": "cpu" if jax.default_backend() == "cpu" else "gpu",
    "help": "sizes; default: those for the device that is here",
  }


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  args = command_parser(
    "bench",
    __doc__,
    {
      "--preset": preset_option(),
      "--out": {"type": files.path_of, "help": "JSON to be written, and a PNG beside it"},
      "--only": {"nargs": "+", "choices": GROUPS, "default": GROUPS, "help": "groups of rows"},
      "--like": {
        "type": files.expanduser,
        "help": "a directory with config.json, for other sizes than the preset's",
      },
      "--frames": {"type": int, "nargs": "+", "help": "of the prefills, instead of the preset's"},
      "--text": {"type": int, "help": "tokens of the prefills"},
      "--runs": {"type": int, "help": "of each row"},
      "--torch": {
        "action": "store_true",
        "help": "and a plain PyTorch Qwen2 without compression",
      },
      "--profile": {
        "type": files.path_of,
        "help": "folder of traces for xprof, of one more call of every row",
      },
      "--plot": {"type": files.path_of, "help": "draw this JSON instead"},
    },
  ).parse_args(argv)
  with cli.command(ImportError):
    if args.plot:
      plot_roofline(inputs.read_json(args.plot, ValueError), args.plot.with_suffix(".png"))
      return
    given = {
      "like": args.like,
      "text": args.text,
      "runs": args.runs,
      "frames": tuple(args.frames or ()) or None,
    }
    preset = dataclasses.replace(
      PRESETS[args.preset], **{key: value for key, value in given.items() if value is not None}
    )
    if any(n % 8 or n < 8 for n in preset.frames) or preset.text <= PREFIX or preset.runs < 1:
      raise ValueError(
        f"--frames must be multiples of 8, --text more than {PREFIX} and --runs at least 1"
      )
    for folder in (args.out and args.out.parent, args.profile):
      if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    result = run_benchmarks(preset, args.preset, args.only, args.torch, args.out, args.profile)
    if args.out is not None:
      try:
        plot_roofline(result, args.out.with_suffix(".png"))
      except ImportError as error:
        print(
          f"no PNG: {error.name} is not installed; draw it elsewhere with --plot {args.out}",
          file=sys.stderr,
        )
