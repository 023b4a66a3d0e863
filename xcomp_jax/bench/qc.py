"""Counts what QC-Comp costs.

  python -m xcomp_jax.bench_qc select [--frames 1024] [--mode aligned]
  python -m xcomp_jax.bench_qc questions --like DIR

`select` counts the operations of scoring in each mode, at the sizes at which the official code was
measured; `questions` those of a first and a later question at the sizes of `--like`. What scoring
takes is measured by `xcomp_jax.bench`, and what it finds by `xcomp_jax.needles`.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from xcomp_jax.bench import parts
from xcomp_jax.bench.options import command_parser, figures
from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.saving import AS_IT_IS
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.cli import command
from xcomp_jax.config import COSINE, VLMConfig
from xcomp_jax.data.batch import Shape, batch_spec
from xcomp_jax.files import path_of
from xcomp_jax.inference import generate
from xcomp_jax.inference.rounds import PREFIX, TEXT
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
  return {
    "calls": calls,
    "TFLOP": work / 1e12,
    "official_TFLOP_ratio": OFFICIAL_FLOPS * frames / 1024 / work,
  }


def question_costs(
  like: pathlib.Path, mode: str, frames: int, kept: int, tokens: int
) -> dict[str, float]:
  """Operations of a first and a later question about an encoded video, of the model that `like`
  describes; none are run.
  """
  cfg = dataclasses.replace(read_vlm_config(like, AS_IT_IS, COSINE), clip_frames=8)
  graph, state = nnx.split(loading.abstract(cfg))
  setting, size = qc_comp.select_config(mode, kept), cfg.vision.image_size
  plan = qc_comp.plan_rounds(frames, 8, setting)
  rows = max(1, setting.round // plan.frames)
  seen, scored, calls = parts.scoring_parts(cfg, (graph, state), setting, frames, plan, rows)
  batch = batch_spec(
    Shape(rows=1, samples=1, prefix=PREFIX, frames=kept, text=generate.text_slots(TEXT)),
    ((16, cfg.vision.width), cfg.dtype),
  )

  def answer(state, batch):
    model = nnx.merge(graph, state)
    greedy = generate.stack_sampling([generate.Sampling(tokens, ())])
    begun = generate.prefill(model, batch, tokens)
    return generate.decode_tokens(model, begun, greedy, tokens)[0]

  encode_clip = parts.flops(
    lambda state, clips: vlm.encode_frames(nnx.merge(graph, state), clips),
    state,
    jax.ShapeDtypeStruct((1, 8, size, size, 3), np.uint8),
  )
  phases = len(frame_selector(frames, 8, setting).phases)
  # selected frames are cut into clips anew where there are several
  anew = encode_clip * (kept // 8) if phases > 1 else 0
  spent = {
    "tower": encode_clip * (frames // 8) * phases,
    "visual rounds": seen.flops * calls,
    "question's rows": scored.flops * calls,
    "answer": parts.flops(answer, state, batch) + anew,
  }
  later = spent["question's rows"] + spent["answer"]
  first = spent["tower"] + spent["visual rounds"] + later
  spent |= {"first": first, "later": later}
  return {f"{name}, TFLOP": value / 1e12 for name, value in spent.items()} | {
    "later / first": later / first
  }


def main(argv: Sequence[str] | None = None, sizes: str | None = None) -> None:
  """The command; sizes: of the model of `select`, as `parts.sized` takes them."""
  args = command_parser(
    "bench_qc",
    __doc__,
    {
      "--frames": {"type": int, "default": 1024},
      "--mode": {"action": "append", "choices": MODES},
    },
    {
      "select": ("count the operations of scoring", {}),
      "questions": (
        "count the operations of a first and a later question",
        {
          "--like": {"type": path_of, "required": True, "help": "a directory with config.json"},
          "--keep": {"type": int, "default": 512, "help": "frames kept for the answer"},
          "--tokens": {"type": int, "default": 16, "help": "of the answer"},
        },
      ),
    },
  ).parse_args(argv)
  with command():
    for mode in args.mode or MODES:
      if args.command == "select":
        out = scoring_costs(parts.sized(sizes, "float32"), mode, args.frames)
      else:
        out = question_costs(args.like, mode, args.frames, args.keep, args.tokens)
      print(f"{mode}, {args.frames} frames\n{figures(out)}", flush=True)
