"""Checks that a GPU computes the right numbers, then measures how fast.

  python -m xcomp_jax.gpu_check --out check [--minutes 8]

The parts run in the order of their importance, each in a process of its own: kernels against
einsum, the recorded outputs of the official code, a gradient step, a question about a clip, the
benchmark. A part writes what it finds at once, so a check that is cut short has told something. It
ends with exit code 1 if a number is wrong or a part fails. It needs a clone of the repository.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xcomp_jax import cli, files
from xcomp_jax.bench import bench, parts
from xcomp_jax.bench.options import command_parser
from xcomp_jax.bench.timing import seconds_of
from xcomp_jax.data.batch import Shape, batch_spec, fake_batch
from xcomp_jax.errors import one_line
from xcomp_jax.model import kernels, vlm
from xcomp_jax.model.attention import AttentionMask, attend

ROOT = pathlib.Path(__file__).parents[2]
# of the benchmark, in this order
MEASURED = (
  ("prefill", "--frames", "1024"),
  ("tower",),
  ("decode",),
  ("select",),
  ("features",),
)


class Case(NamedTuple):
  """A shape of attention: [batch, slots, heads, size].

  heads: of queries, and of keys. prompt: causal, and the samples have other lengths and holes, and
  the last one begins with padding; otherwise of clips, where all see all.
  """

  name: str
  batch: int
  slots: int
  heads: tuple[int, int]
  size: int = 128
  prompt: bool = True
  dtype: str = "bfloat16"


CASES = (
  Case("clip of 8 frames, 448 px", 1, 6272, (16, 16), 64, False),
  Case("prefill of 256 frames after a prefix of 14", 3, 14 + 256 * 16 + 96, (12, 2)),
  Case("clip of 8 frames, 224 px", 4, 1568, (16, 16), 64, False),
  Case("clip of 4 frames, 448 px", 1, 3136, (16, 16), 64, False),
  Case("clip of InternVideo2", 4, 1025, (16, 16), 88, False),
  Case("images", 8, 16 + 16 + 1007, (12, 2)),
  Case("7B", 2, 2062, (28, 4)),
  Case("prefill in float32", 2, 1134, (12, 2), dtype="float32"),
  Case("clip in float32", 1, 1568, (16, 16), 64, False, dtype="float32"),
  Case("prefill in float16", 2, 1134, (12, 2), dtype="float16"),
)
SMALL = (
  Case("small clip", 2, 130, (4, 4), 64, False),
  Case("small prefill", 3, 142, (4, 2), 64),
  Case("small prefill in float32", 3, 142, (4, 2), 64, dtype="float32"),
)


def distance(got: Any, wanted: Any) -> float:
  """Gives the L2 distance of two trees relative to the wanted one; infinite if a number is not
  finite.
  """
  got, wanted = (
    np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
    for tree in (got, wanted)
  )
  return (
    float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    if np.isfinite(got).all()
    else float("inf")
  )


def _mask(case: Case) -> AttentionMask:
  """What each row sees."""
  slots = jnp.arange(case.slots)
  length = case.slots - jnp.arange(case.batch)[:, None] * (case.slots // 7)  # [B, 1]
  hole = (slots >= case.slots // 3) & (slots < case.slots // 3 + 9)  # [S]
  valid = ((slots < length) & ~hole).at[-1, :14].set(False)  # [B, S]
  return AttentionMask(case.prompt, valid if case.prompt else None)


def program(case: Case, implementation: str, attend: Callable = attend) -> Callable:
  """A function of q, k, v that gives an implementation's results and gradients."""
  mask = _mask(case)
  counts = True if mask.valid is None else mask.valid[:, :, None, None]

  def shown(q, k, v):
    out = attend(q, k, v, mask, implementation=implementation)
    return jnp.where(counts, out, 0).astype(jnp.float32)

  def loss(q, k, v):
    return jnp.sin(shown(q, k, v)).sum()

  both = jax.jit(lambda *args: (shown(*args), jax.grad(loss, (0, 1, 2))(*args)))

  def run(*args):  # float32 is not rounded to TF32
    with jax.default_matmul_precision("highest" if args[0].dtype == jnp.float32 else None):
      return both(*args)

  return run


@functools.cache
def prepared(case: Case) -> tuple[tuple[jax.Array, ...], Any, Any]:
  """Draws a case's q, k and v, and computes it by einsum: in float32, and in its own dtype."""
  inputs = tuple(
    jax.random.normal(jax.random.key(i), (case.batch, case.slots, heads, case.size), case.dtype)
    for i, heads in enumerate((*case.heads, case.heads[1]))
  )
  oracle = program(case, "einsum")(*(x.astype(jnp.float32) for x in inputs))
  return inputs, oracle, program(case, "einsum")(*inputs)


def compare_implementation(
  case: Case, implementation: str, attend: Callable = attend
) -> dict[str, Any]:
  """Compares an implementation's results and gradients with einsum in float32.

  attend: has the implementations.

  Returns:
    "result" and "gradient": distances from it, and those of einsum in the same dtype; "result
    right", "gradient right", "right": they are not much larger; "seconds": of both together.
  """
  inputs, oracle, by_einsum = prepared(case)
  run = program(case, implementation, attend)
  got = run(*inputs)
  out: dict[str, Any] = {}
  for i, part in enumerate(("result", "gradient")):
    apart, own = distance(got[i], oracle[i]), distance(by_einsum[i], oracle[i])
    most = 2 * own + (1e-5 if case.dtype == "float32" else 1e-3)
    out |= {part: apart, f"{part} by einsum": own, f"{part} right": apart <= most}
  return out | {
    "seconds": statistics.median(seconds_of(lambda: run(*inputs)) for _ in range(5)),
    "right": out["result right"] and out["gradient right"],
  }


def check_kernels(out: pathlib.Path, small: bool) -> bool:
  """Compares every kernel that the card can have, the chosen one of every case first; writes
  kernels.json.

  Returns:
    Whether the chosen ones are right.

  Raises:
    ValueError: there is no GPU.
  """
  card, found, right = kernels.here(), {}, True
  if card.platform != "gpu" and not small:
    raise ValueError(
      f"there is no GPU: JAX computes on {card.kind}; `python -c 'import jax; "
      f"print(jax.devices())'` says what it finds"
    )
  usable = [
    k
    for k in get_args(kernels.Kernel)
    if not kernels.unusable(k, card, kernels.library(), "bfloat16")
  ]
  print(f"{card}, jax {jax.__version__}, tokamax {kernels.library()}")
  for implementation in ("flash", *usable):
    for case in SMALL if small else CASES:
      # what such a card takes instead
      if case.dtype == "bfloat16" and card.float16 and not card.bfloat16:
        case = case._replace(dtype="float16")
      if kernels.unusable(implementation, card, kernels.library(), case.dtype) or (
        implementation == "cudnn" and case.prompt
      ):
        continue
      try:
        row = compare_implementation(case, implementation)
      except Exception as error:  # one that does not compile is a result, too
        row = {"right": False, "error": one_line(error)[:300]}
      wrong = not row["right"] and implementation == "flash"  # what nobody takes may fail
      right &= not wrong
      found[f"{implementation}: {case.name}"] = row
      files.write_json(out / "kernels.json", found, indent=1)
      figures = ", ".join(f"{key} {x:.2g}" for key, x in row.items() if type(x) is float)
      print(
        f"{'WRONG' if wrong else 'right' if row['right'] else 'no'}  {implementation}: "
        f"{case.name}: {row.get('error') or figures}",
        flush=True,
      )
  return right


def check_step(out: pathlib.Path, small: bool) -> bool:
  """Compares loss and gradient of two layers of the LLM by the chosen kernels and by einsum; writes
  step.json.

  One of the samples has no video, so its first slots are padding.

  Returns:
    Whether they agree.
  """
  dtype = kernels.compute_dtype(kernels.here(), gradient=True)
  cfg = parts.without_tower(
    parts.sized("small" if small else str(bench.RELEASED), dtype, remat=True)
  )
  cfg = dataclasses.replace(
    cfg,
    llm=dataclasses.replace(cfg.llm, layers=2),
    lp_comp=dataclasses.replace(cfg.lp_comp, schedule=(16, 9)),
  )
  shape = Shape(rows=2, samples=1, prefix=16, frames=32 if small else 256, text=96)
  batch = fake_batch(batch_spec(shape, ((16, cfg.vision.width), np.float32)), cfg.llm.vocab_size)
  batch = dataclasses.replace(
    batch,
    frames=batch.frames * [[1], [0]],
    prefix_length=batch.prefix_length * [[1], [0]],
    text_length=batch.text_length - [[0], [9]],
  )
  batch.targets[1, :17] = batch.targets[1, -9:] = -100

  def make(cfg):
    return vlm.VLM(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.float32)

  state = nnx.split(jax.jit(lambda: make(cfg))())[1]

  def gradient(how):
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(dataclasses.replace(cfg, attention=how))))

    def total(state):
      return vlm.loss(nnx.merge(graph, state), batch).sum()

    loss, grads = jax.jit(jax.value_and_grad(total))(state)
    return float(loss), {"llm": grads["llm"]}

  with jax.default_matmul_precision("highest" if dtype == "float32" else None):
    (loss, got), (wanted_loss, wanted) = gradient("flash"), gradient("einsum")
  row = {
    "loss": loss,
    "loss by einsum": wanted_loss,
    "gradient": distance(got, wanted),
    "computed in": dtype,
  }
  row["right"] = abs(loss - wanted_loss) < 0.01 * abs(wanted_loss) and row["gradient"] < (
    0.05 if dtype == "bfloat16" else 1e-3
  )
  files.write_json(out / "step.json", row, indent=1)
  print(f"{'right' if row['right'] else 'WRONG'}  {row}")
  return row["right"]


Stages = dict[str, list[list[str]]]


def stages(out: pathlib.Path, small: bool) -> Stages:
  """Commands of each part."""
  world = out / "world"

  def run(module, *args):
    return [sys.executable, "-m", f"xcomp_jax.{module}", *map(str, args)]

  def mine(stage):
    return [run("gpu_check", "--stage", stage, "--out", out, *["--small"] * small)]

  def measure(group, *more):
    return run(
      "bench",
      f"--preset={'smoke' if small else 'gpu'}",
      f"--out={out / f'bench_{group}.json'}",
      f"--profile={out / 'profile'}",
      "--only",
      group,
      *(() if small else more),
    )

  ask = [
    f"--checkpoint={ROOT / 'assets' / 'tiny'}",
    f"--video={world / 'heldout' / '00000.mp4'}",
    "--question=Which digit was shown?",
    "--min-frames=8",
    "--max-frames=32",
    "--compilation-cache=",
    "--attention=flash",
  ]
  recorded = ("internvideo2_tiny",) if small else ("internvideo2_tiny", "dev")
  return {
    "kernels": mine("kernels"),
    "parity": [run("parity", ROOT / "tests" / "reference" / name) for name in recorded],
    "step": mine("step"),
    "ask": [run("world", "--out", world, "--train", 1, "--heldout", 1), run("ask", *ask)],
    "bench": [measure(*group) for group in MEASURED],
  }


def run_commands(commands: Sequence[Sequence[str]], log: pathlib.Path, limit: float) -> str:
  """Runs commands one after the other, in so many seconds, and writes what they say to a file.

  Returns:
    "done", "cut short", or "exit code N".
  """
  ends = time.monotonic() + limit
  with open(log, "w") as file:
    for command in commands:
      try:
        done = subprocess.run(
          command,
          stdout=file,
          stderr=subprocess.STDOUT,
          timeout=max(1.0, ends - time.monotonic()),
          cwd=ROOT,
        )
      except subprocess.TimeoutExpired:
        return "cut short"
      if done.returncode:
        return f"exit code {done.returncode}"
  return "done"


def supervise(out: pathlib.Path, minutes: float, parts: Stages) -> bool:
  """Runs the parts in order, and writes their output and summary.json.

  Each of the first four may take 0.4 of the time, the benchmark takes the rest.

  Returns:
    Whether all have ended well; a benchmark that is cut short has.
  """
  ends, results = time.monotonic() + minutes * 60, {}
  os.environ["PYTHONUNBUFFERED"] = "1"  # what a part has said is there if it is cut short
  for name, commands in parts.items():
    begun, log = time.monotonic(), out / f"{name}.txt"
    left = ends - begun
    limit = left if name == "bench" else min(left, 0.4 * 60 * minutes)
    print(f"=== {name}, at most {limit:.0f} s", flush=True)
    status, seconds = run_commands(commands, log, limit), round(time.monotonic() - begun, 1)
    results[name] = {"status": status, "seconds": seconds}
    files.write_json(out / "summary.json", results, indent=1)
    tail = log.read_text(errors="replace").splitlines()[-30:]
    print(*tail, f"=== {name}: {status}, {seconds} s", sep="\n", flush=True)
    if name == "kernels" and any(line.startswith("error: there is no GPU") for line in tail):
      return False
  print(", ".join(f"{name}: {row['status']}" for name, row in results.items()))
  return all(
    row["status"] == "done" or (name, row["status"]) == ("bench", "cut short")
    for name, row in results.items()
  )


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  args = command_parser(
    "gpu_check",
    __doc__,
    {
      "--out": {"type": files.path_of, "required": True, "help": "folder of results"},
      "--minutes": {
        "type": float,
        "default": 8.0,
        "help": "for all parts together (8); the benchmark takes what the others leave",
      },
      "--small": {
        "action": "store_true",
        "help": "tiny sizes, to try the check itself without a GPU",
      },
      "--stage": {
        "choices": ("kernels", "step"),
        "help": "what the check itself starts: one part, in this process",
      },
    },
  ).parse_args(argv)
  with cli.command():
    if args.minutes <= 0:
      raise ValueError(f"--minutes {args.minutes:g}: must be more than 0")
    if not args.stage and args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
      raise ValueError(f"--out {args.out} is there and not an empty folder; choose another one")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage:
      right = {"kernels": check_kernels, "step": check_step}[args.stage](args.out, args.small)
    else:
      os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
      out = args.out.resolve()
      right = supervise(out, args.minutes, stages(out, args.small))
  sys.exit(not right)
