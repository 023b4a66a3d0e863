"""Counts what QC-Comp costs.

  python -m xcomp_jax.bench_qc select [--frames 1024] [--mode aligned]
  python -m xcomp_jax.bench_qc questions --like DIR

`select` counts the operations of scoring in each mode, at the sizes at which the official code was
measured; `questions` those of a first and a later question at the sizes of `--like`. What scoring
takes is measured by `xcomp_jax.bench`, and what it finds by `xcomp_jax.needles`.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from xcomp_jax.bench import parts
from xcomp_jax.bench.parts import flops
from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.saving import AS_IT_IS
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.cli import command
from xcomp_jax.config import COSINE, VLMConfig
from xcomp_jax.data.batch import Shape, batch_spec
from xcomp_jax.files import expanduser
from xcomp_jax.inference import generate
from xcomp_jax.inference.rounds import PREFIX, TEXT, scoring
from xcomp_jax.inference.selection import frame_selector
from xcomp_jax.model import qc_comp, vlm

MODES = ("official", "aligned", "local", "global")
OFFICIAL_FLOPS = 15.3e12  # that the official code counts for its rounds over 1,024 frames


def scoring_costs(cfg: VLMConfig, mode: str, frames: int) -> dict[str, float]:
  """Counts the operations of scoring a video of given visual tokens.

  Returns:
    calls of the visual rounds, and of the question's rows; operations of all, and how many times as
    many the official code counts for 1,024 frames.
  """
  *both, calls = parts.selecting(cfg, mode, frames, real=False)
  work = calls * sum(part.flops for part in both)
  ratio = OFFICIAL_FLOPS * frames / 1024 / work
  return {"calls": calls, "TFLOP": work / 1e12, "official_TFLOP_ratio": ratio}


def question_costs(
  like: pathlib.Path, mode: str, frames: int, kept: int, tokens: int
) -> dict[str, float]:
  """Operations of a first and a later question about an encoded video, of the model that `like`
  describes; none are run.
  """
  cfg = dataclasses.replace(read_vlm_config(like, AS_IT_IS, COSINE), clip_frames=8)
  graph, state = nnx.split(loading.abstract(cfg))
  setting, D = qc_comp.select_config(mode, kept), cfg.vision.width
  plan = qc_comp.plan_rounds(frames, 8, setting)
  rows, clips, size = max(1, setting.round // plan.frames), plan.frames // 8, cfg.vision.image_size
  calls = -(-len(plan.starts) // rows)
  watch, score = scoring(graph, plan, setting, rows)
  features = jax.ShapeDtypeStruct((rows, clips, 128, D), np.dtype(cfg.dtype))
  batch = batch_spec(
    Shape(
      rows=1, samples=1, prefix=PREFIX, frames=kept, text=generate.up(TEXT, generate.TEXT_STEP)
    ),
    ((16, D), cfg.dtype),
  )

  def answer(state, batch):
    model = nnx.merge(graph, state)
    return generate.decode_tokens(
      model, generate.prefill(model, batch, tokens), generate.Sampling(tokens, ()), tokens
    )[0]

  encode_clip = flops(
    lambda state, clips: vlm.encode_frames(nnx.merge(graph, state), clips),
    state,
    jax.ShapeDtypeStruct((1, 8, size, size, 3), np.uint8),
  )
  phases = len(frame_selector(frames, 8, setting).phases)
  tower = encode_clip * (frames // 8) * phases
  visual = flops(watch, state, features) * calls
  asking = flops(score, state, jax.eval_shape(watch, state, features)) * calls
  final = flops(answer, state, batch)
  if phases > 1:  # selected frames are cut into clips anew
    final += encode_clip * (kept // 8)
  first, later = tower + visual + asking + final, asking + final
  spent = {
    "tower": tower,
    "visual rounds": visual,
    "question's rows": asking,
    "answer": final,
    "first": first,
    "later": later,
  }
  return {f"{name}, TFLOP": value / 1e12 for name, value in spent.items()} | {
    "later / first": later / first
  }


def main(argv: Sequence[str] | None = None, sizes: str | None = None) -> None:
  """The command; sizes: of the model of `select`, as `parts.sized` takes them."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.bench_qc", description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(dest="command", required=True)
  scoring = commands.add_parser("select", help="count the operations of scoring")
  asking = commands.add_parser(
    "questions", help="count the operations of a first and a later question"
  )
  asking.add_argument("--like", type=expanduser, required=True, help="a directory with config.json")
  asking.add_argument("--keep", type=int, default=512, help="frames kept for the answer")
  asking.add_argument("--tokens", type=int, default=16, help="of the answer")
  for one in (scoring, asking):
    one.add_argument("--frames", type=int, default=1024)
    one.add_argument("--mode", action="append", choices=MODES)
  args = parser.parse_args(argv)
  with command():
    for mode in args.mode or MODES:
      if args.command == "select":
        out = scoring_costs(parts.sized(sizes, "float32"), mode, args.frames)
      else:
        out = question_costs(pathlib.Path(args.like), mode, args.frames, args.keep, args.tokens)
      print(
        f"{mode}, {args.frames} frames\n"
        + "\n".join(f"{name:>26} {value:10.3f}" for name, value in out.items()),
        flush=True,
      )
