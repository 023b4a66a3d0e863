"""Measures what it costs to use the model.

  python -m xcomp_jax.bench random --like DIR --out DIR
  python -m xcomp_jax.bench load --checkpoint DIR
  python -m xcomp_jax.bench prefill [--like DIR] [--frames 1024 2048] [--torch]
  python -m xcomp_jax.bench tower [--like DIR] [--clips 4]
  python -m xcomp_jax.bench step [--like DIR] [--frames 1024] [--pixels]
  python -m xcomp_jax.bench scaling --out docs/scaling

`random` writes an official-layout checkpoint of random bfloat16 weights, of the sizes in `--like`'s config.json
and with the tokenizer that lies there; `load` reports time, rate and memory of `weights.load`. `prefill`, `tower` and
`step` time the model on random weights, beside the rate of a plain matrix product in the same run, and `scaling` plots
time and memory; without `--like` sizes are those at which the official code was measured on a CPU.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.extend.core
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from xcomp_jax import export, generate, metrics, weights
from xcomp_jax.config import LLMConfig, LPCompConfig, ModelConfig, VisionConfig, VLMConfig
from xcomp_jax.data.batch import Bucket, batch_spec, fake_batch
from xcomp_jax.export import AS_IT_IS, NOT_TUNED
from xcomp_jax.files import command
from xcomp_jax.model import attention, decoder, vlm
from xcomp_jax.model.vlm import VLM


def random_checkpoint(like: pathlib.Path, out: pathlib.Path) -> None:
  """Streams random bfloat16 weights of the model that config.json in `like` describes into directory `out`.

  Raises:
    CheckpointError: a config that can't be used, or a directory that is not free.
  """
  cfg = weights.read_config(like, AS_IT_IS, NOT_TUNED)
  rng = np.random.default_rng(0)
  dtype = np.dtype(ml_dtypes.bfloat16)

  def blocks(entry: weights.Entry) -> Iterator[np.ndarray]:
    if len(entry.shape) == 1:  # norms near one, so that a forward pass stays finite
      yield np.full(entry.shape, float("norm" in entry.name and entry.name.endswith("weight")), dtype)
      return
    for start in range(0, entry.shape[0], weights.ROWS):
      shape = (min(weights.ROWS, entry.shape[0] - start), *entry.shape[1:])
      yield (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)

  tensors = [export.Tensor(e.name, e.shape, dtype, lambda e=e: blocks(e)) for e in sorted(weights.names(cfg), key=lambda e: e.name)]
  with export.appearing(out, overwrite=False) as temporary:
    shutil.copyfile(like / "config.json", temporary / "config.json")
    export.copy_tokenizer(temporary, like)
    export.write_safetensors(temporary, tensors)


def load(directory: pathlib.Path) -> dict[str, float]:
  """Loads a checkpoint as stored, after merely reading its files; both from a cold page cache where that can be had.

  Returns:
    seconds, GB/s and processor seconds of both; gigabytes of parameters, and of anonymous memory above them at its peak.

  Raises:
    CheckpointError: see `weights.load`.
  """
  cfg = weights.read_config(directory, AS_IT_IS, NOT_TUNED)
  files = sorted(directory.rglob("*.safetensors")) or [f for f in sorted((directory / "params").rglob("*")) if f.is_file()]
  size = sum(file.stat().st_size for file in files)
  _forget(files)
  began, cpu = time.perf_counter(), time.process_time()
  buffer = memoryview(bytearray(1 << 24))
  for file in files:
    with open(file, "rb", buffering=0) as opened:
      while opened.readinto(buffer):
        pass
  reading, reading_cpu = time.perf_counter() - began, time.process_time() - cpu
  _forget(files)
  del buffer
  before = _anonymous()
  with _Peak() as peak:
    began, cpu = time.perf_counter(), time.process_time()
    model = weights.load(directory, cfg)
    loading, loading_cpu = time.perf_counter() - began, time.process_time() - cpu
  resident = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
  return {
    "read_s": reading, "read_GB/s": size / reading / 1e9, "read_cpu_s": reading_cpu,
    "load_s": loading, "load_GB/s": size / loading / 1e9, "load_cpu_s": loading_cpu,
    "parameters_GB": resident / 1e9, "peak_above_parameters_GB": (peak.bytes - before - resident) / 1e9,
  }


class _Peak:
  """Largest anonymous memory of this process within a `with` block."""

  def __enter__(self) -> "_Peak":
    self.bytes, self._over = 0, threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self) -> None:
    while not self._over.wait(0.005):
      self.bytes = max(self.bytes, _anonymous())

  def __exit__(self, *_) -> None:
    self._over.set()
    self._thread.join()


def _anonymous() -> int:
  """Bytes of anonymous memory now: not of mapped files, whose pages the system can drop."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _forget(files: Sequence[pathlib.Path]) -> None:
  """Drops files from the page cache, so that they are read from where they lie."""
  for file in files:
    with open(file, "rb") as opened:
      os.fsync(opened.fileno())
      os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- the model's speed -----------------------------------------------------------------------------------------

MEASURED = LLMConfig(  # the official code's own benchmark on a CPU
  vocab_size=4096, width=512, layers=28, heads=8, kv_heads=2, head_dim=64, mlp_width=1408, rope_theta=1e6, norm_eps=1e-6,
  tied=True, context=None,
)
TOWER = VisionConfig(image_size=448, patch_size=16, width=1024, layers=23, heads=16, mlp_width=4096, table="umt-hd")
SIDE = 4096  # of the plain matrix product
PREFIX, TEXT = 14, 72  # tokens before and behind the visual ones


def flops(function, *args) -> float:
  """Floating-point operations of all matrix products of a function, a multiply-add as two; loops by their length.

  Attention in tiles, whose loops have no length, by the scores it computes.
  """
  return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.params.get("name") in ("causal_attention", "full_attention"):
      (B, L, H, h), S = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
      causal = equation.params["name"] == "causal_attention"
      total += 4.0 * B * H * h * attention.tiled_scores(L, S, causal)
      continue
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    inner = sum(_flops(getattr(sub, "jaxpr", sub)) for sub in jax.extend.core.jaxprs_in_params(equation.params))
    total += inner * equation.params.get("length", 1)
  return total


@dataclasses.dataclass(frozen=True)
class Cost:
  """One program, measured.

  seconds: of the fastest of several runs. compile_seconds. useful, counted: operations that the numbers asked for
  need, and those of all matrix products in the program (0 where it has kernels, whose loops are not counted).
  matmul: operations per second of a plain matrix product, in the same run. memory: bytes of arguments, temporaries and
  results; temporary: of temporaries alone.
  """

  seconds: float
  compile_seconds: float
  useful: float
  counted: float
  matmul: float
  memory: int
  temporary: int

  def lines(self) -> dict[str, float]:
    """What is printed."""
    rate = lambda n: n / self.seconds
    return {
      "seconds": self.seconds, "compile_s": self.compile_seconds, "memory_GB": self.memory / 1e9,
      "temporary_GB": self.temporary / 1e9, "matmul_TFLOP/s": self.matmul / 1e12,
      "useful_TFLOP": self.useful / 1e12, "useful_TFLOP/s": rate(self.useful) / 1e12, "useful/matmul": rate(self.useful) / self.matmul,
      "counted_TFLOP": self.counted / 1e12, "counted/matmul": rate(self.counted) / self.matmul,
    }  # fmt: skip


def measure(function, useful: float, dtype: str, *args, repeats: int = 3) -> Cost:
  """Compiles and times a function of arrays; products of matrices of SIDE are timed before and after each run.

  With repeats=0 nothing is run, args may be ShapeDtypeStructs, and times are nan.
  """
  begun = time.perf_counter()
  program = jax.jit(function).lower(*args).compile()
  compiling = time.perf_counter() - begun
  used = program.memory_analysis()
  counted = flops(function, *args) if jax.default_backend() == "cpu" else 0.0
  memory = used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes
  if not repeats:
    return Cost(math.nan, compiling, useful, counted, math.nan, memory, used.temp_size_in_bytes)
  side = jnp.ones((SIDE, SIDE), dtype)
  product = jax.jit(lambda a: a @ a).lower(side).compile()

  def timed(call, times):
    begun = time.perf_counter()
    jax.block_until_ready([call() for _ in range(times)])
    return (time.perf_counter() - begun) / times

  many = 3 if jax.default_backend() == "cpu" else 50
  runs, products = [], []
  timed(lambda: program(*args), 1), timed(lambda: product(side), 1)
  for _ in range(repeats):
    products.append(timed(lambda: product(side), many))
    runs.append(timed(lambda: program(*args), 1))
  products.append(timed(lambda: product(side), many))
  return Cost(min(runs), compiling, useful, counted, 2 * SIDE**3 / min(products), memory, used.temp_size_in_bytes)


def sized(like: str | None, dtype: str, **model) -> VLMConfig:
  """Sizes of `like`'s config.json with the released cosine, or those of the official code's benchmark."""
  values = {"clip_frames": 8, "param_dtype": dtype, "clips_per_chunk": 4, "attention": "auto", "remat": False} | model
  lp_comp = LPCompConfig("cosine", "suffix", 16)
  if like:
    return weights.read_config(pathlib.Path(like), ModelConfig(dtype=dtype, **values), lp_comp)
  return VLMConfig(TOWER, MEASURED, lp_comp, 8, 16, dtype, values["clips_per_chunk"], values["attention"], values["remat"])


def _random(cfg: VLMConfig) -> tuple[nnx.GraphDef, nnx.State]:
  """A model with random weights in the compute dtype."""
  return nnx.split(nnx.jit(lambda: VLM(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(cfg.dtype)))())


def prefill(like: str | None, frames: int, text: int, dtype: str, repeats: int = 3) -> Cost:
  """LP-Comp prefill of given visual tokens and `text` tokens, with caches and the next token's logits."""
  cfg = sized(like, dtype)
  cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, width=64, layers=1, mlp_width=64))  # not used
  graph, state = _random(cfg)
  after, groups = text - PREFIX, frames * cfg.tokens_per_frame // cfg.lp_comp.group

  def run(state, x):
    model, one = nnx.merge(graph, state), lambda n: jnp.full(1, n)
    lengths = decoder.Lengths(one(PREFIX), one(groups), one(after))
    out = decoder.run(model.llm, x, lengths, prefix=PREFIX, text=after, caches=True)
    return generate.start(model, out, after, one(after), 16)

  x = jax.random.normal(jax.random.key(0), (1, text + frames * cfg.tokens_per_frame, cfg.llm.width), cfg.dtype)
  spec = batch_spec(Bucket(frames // 8, 8, PREFIX, after), 1, ((8 * cfg.tokens_per_frame, 1), np.dtype(np.float32)))
  useful = metrics.forward_flops(cfg, fake_batch(spec, 8))["llm"] - 2.0 * cfg.llm.width * cfg.llm.vocab_size * text
  return measure(run, useful, dtype, state, x, repeats=repeats)


def plain(like: str | None, frames: int, text: int) -> float:
  """Seconds of a plain Qwen2 in PyTorch over the same tokens: fused attention, no compression, float32, no caches.

  Raises:
    ImportError: there is no PyTorch.
  """
  import torch
  from torch.nn import functional as F

  m = sized(like, "float32").llm
  random = lambda *shape: torch.randn(*shape) * 0.02
  heads = {"q": m.heads, "k": m.kv_heads, "v": m.kv_heads}
  layer = lambda: {
    **{name: random(n * m.head_dim, m.width) for name, n in heads.items()}, "o": random(m.width, m.heads * m.head_dim),
    "gate": random(m.mlp_width, m.width), "up": random(m.mlp_width, m.width), "down": random(m.width, m.mlp_width),
  }  # fmt: skip
  layers, one = [layer() for _ in range(m.layers)], torch.ones(m.width)
  length = text + frames * 16
  angle = torch.arange(length)[:, None] * m.rope_theta ** -(torch.arange(m.head_dim // 2) / (m.head_dim // 2))
  cos, sin = angle.cos(), angle.sin()

  def rotated(x):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

  @torch.inference_mode()
  def run(x):
    for w in layers:
      y = F.rms_norm(x, (m.width,), one, m.norm_eps)
      q, k, v = (F.linear(y, w[name]).view(length, n, m.head_dim).transpose(0, 1)[None] for name, n in heads.items())
      out = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
      x = x + F.linear(out[0].transpose(0, 1).reshape(length, -1), w["o"])
      y = F.rms_norm(x, (m.width,), one, m.norm_eps)
      x = x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])
    return x

  x, seconds = torch.randn(length, m.width), []
  for _ in range(2):
    begun = time.perf_counter()
    run(x)
    seconds.append(time.perf_counter() - begun)
  return min(seconds)


def tower(like: str | None, clips: int, dtype: str, clips_per_chunk: int, repeats: int = 3) -> Cost:
  """The tower with merging on `clips` clips of 8 frames, so many at a time."""
  cfg = sized(like, dtype, clips_per_chunk=clips_per_chunk)
  cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, layers=1, vocab_size=8))  # not used
  graph, state = _random(cfg)
  size = cfg.vision.image_size
  frames = jax.random.bits(jax.random.key(0), (1, clips, 8, size, size, 3), np.uint8)
  run = lambda state, frames: vlm.encode(nnx.merge(graph, state), frames)
  spec = batch_spec(Bucket(clips, 8, 1, 1), 1, ((8, size, size, 3), np.dtype(np.uint8)))
  useful = metrics.forward_flops(cfg, fake_batch(spec, 8))["vision"]
  return measure(run, useful, dtype, state, frames, repeats=repeats)


def scaling(like: str | None, frames: Sequence[int], texts: Sequence[int], most: int, dtype: str, out: pathlib.Path) -> None:
  """Time and memory against frames and against text, as <out>.json and <out>.png; more than `most` frames are not run.

  Raises:
    ImportError: there is no matplotlib.
  """
  import matplotlib
  from matplotlib import pyplot

  matplotlib.use("Agg")
  rows: dict[str, list[dict[str, float]]] = {"frames": [], "text": [], "encoding": []}
  for n in frames:
    rows["frames"].append({"x": n, **prefill(like, n, PREFIX + TEXT, dtype, 2 if n <= most else 0).lines()})
    print(json.dumps(rows["frames"][-1]), flush=True)
  for n in texts:
    rows["text"].append({"x": n, **prefill(like, min(frames), n, dtype, 2).lines()})
    print(json.dumps(rows["text"][-1]), flush=True)
  for n in frames:
    rows["encoding"].append({"x": n, **tower(like, n // 8, dtype, 1, 0).lines()})
    print(json.dumps(rows["encoding"][-1]), flush=True)
  out.with_suffix(".json").write_text(json.dumps(rows, indent=1).replace("NaN", "null"))
  figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
  panels = (
    ("frames", "seconds", "Prefill: seconds"), ("frames", "counted_TFLOP", "Prefill: TFLOP, counted"),
    ("text", "seconds", f"Prefill of {min(frames)} frames: seconds"), ("frames", "temporary_GB", "Temporaries, GB"),
  )  # fmt: skip
  for axis, (group, name, title) in zip(axes.flat, panels, strict=True):
    axis.plot(*zip(*[(row["x"], row[name]) for row in rows[group]]), "o-", label="prefill")
    if name == "temporary_GB":
      axis.plot(*zip(*[(row["x"], row[name]) for row in rows["encoding"]]), "s-", label="encoding, a clip at a time")
      axis.legend(frameon=False)
    axis.set(title=title, xlabel="text tokens" if group == "text" else "frames", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(out.with_suffix(".png"), dpi=120)


def step(like: str | None, frames: int, text: int, dtype: str, pixels: bool, clips_per_chunk: int) -> Cost:
  """Loss and gradient of SCT's projector and LLM on one sample, of features or of pixels.

  Useful are forward and twice as much backward of what is trained, and the frozen tower's forward.
  """
  cfg = sized(like, dtype, remat=True, clips_per_chunk=clips_per_chunk)
  graph, state = _random(cfg)
  size = cfg.vision.image_size
  row = ((8, size, size, 3), np.dtype(np.uint8)) if pixels else ((8 * cfg.tokens_per_frame, cfg.vision.width), np.dtype(dtype))
  batch = fake_batch(batch_spec(Bucket(frames // 8, 8, PREFIX, text - PREFIX), 1, row), cfg.llm.vocab_size)
  frozen, trained = {"vision": state["vision"]}, {name: state[name] for name in ("projector", "llm")}

  def run(trained, frozen, batch):
    loss = lambda trained: vlm.loss(nnx.merge(graph, nnx.State(trained | frozen)), batch).sum()
    return jax.value_and_grad(loss)(trained)

  cost = metrics.forward_flops(cfg, batch)
  return measure(run, cost["vision"] + 3 * (cost["projector"] + cost["llm"]), dtype, trained, frozen, jax.tree.map(jnp.asarray, batch))


def table(title: str, values: Mapping[str, float]) -> None:
  """Prints numbers, one a line."""
  print(title + "\n" + "\n".join(f"{name:>26} {value:10.3f}" for name, value in values.items()), flush=True)


def _run(args: argparse.Namespace) -> None:
  device = jax.devices()[0].device_kind
  if args.command == "random":
    random_checkpoint(pathlib.Path(args.like), pathlib.Path(args.out))
  elif args.command == "load":
    table(args.checkpoint, load(weights.resolve(args.checkpoint)))
  elif args.command == "scaling":
    scaling(args.like, args.frames, args.text, args.run_up_to, args.dtype, pathlib.Path(args.out))
  elif args.command == "tower":
    for n in args.clips:
      table(f"tower, {n} clips, {args.dtype}, {device}", tower(args.like, n, args.dtype, args.clips_per_chunk).lines())
  elif args.command == "step":
    for n in args.frames:
      kind = "pixels" if args.pixels else "features"
      cost = step(args.like, n, args.text, args.dtype, args.pixels, args.clips_per_chunk)
      table(f"step, {n} frames of {kind}, {args.dtype}, {device}", cost.lines())
  else:
    for n in args.frames:
      lines = prefill(args.like, n, args.text, args.dtype).lines()
      if args.torch:
        lines["plain PyTorch, seconds"] = plain(args.like, n, args.text)
      table(f"prefill, {n} frames, {args.dtype}, {device}", lines)


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(prog="python -m xcomp_jax.bench", description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(dest="command", required=True)
  random = commands.add_parser("random", help="write a checkpoint of random weights")
  random.add_argument("--like", required=True, help="a directory with config.json")
  random.add_argument("--out", required=True, help="directory to be made")
  loading = commands.add_parser("load", help="measure loading")
  loading.add_argument("--checkpoint", required=True, help="a directory with config.json and weights")
  cpu = jax.default_backend() == "cpu"
  add = lambda name, help: commands.add_parser(name, help=help)
  prefilling, towering = add("prefill", "time LP-Comp prefill"), add("tower", "time the tower")
  stepping, plotting = add("step", "time the gradient of a tuning step"), add("scaling", "plot time and memory")
  for one in (prefilling, towering, stepping, plotting):
    one.add_argument("--like", help="a directory with config.json; default: the sizes of the official benchmark")
    one.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if cpu else "bfloat16")
  for one in (prefilling, stepping):
    one.add_argument("--frames", type=int, nargs="+", default=[1024])
    one.add_argument("--text", type=int, default=PREFIX + TEXT, help="tokens")
  for one in (towering, stepping):
    one.add_argument("--clips-per-chunk", type=int, default=1 if cpu else 4, help="in the tower at once")
  prefilling.add_argument("--torch", action="store_true", help="and a plain PyTorch Qwen2 without compression")
  towering.add_argument("--clips", type=int, nargs="+", default=[1])
  stepping.add_argument("--pixels", action="store_true", help="from frames, through the tower")
  plotting.add_argument("--frames", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
  plotting.add_argument("--text", type=int, nargs="+", default=[86, 512, 1024, 2048], help="tokens")
  plotting.add_argument("--run-up-to", type=int, default=2048, help="frames; what is longer is compiled and counted")
  plotting.add_argument("--out", required=True, help="name of the .json and the .png")
  args = parser.parse_args(argv)
  with command(ImportError):
    _run(args)


if __name__ == "__main__":
  main()
