"""Measures QC-Comp: what it costs, and what it finds.

  python -m xcomp_jax.bench_qc select [--frames 1024] [--mode aligned]
  python -m xcomp_jax.bench_qc questions --like DIR
  python -m xcomp_jax.bench_qc needles --checkpoint DIR --world DIR

`select` reports time, operations and memory of scoring in each mode, on random weights of the sizes
at which the official code was measured; `questions` counts the operations of a first and a later
question at the sizes of `--like`; `needles` how often the clip with the answer is selected.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from xcomp_jax.bench import parts
from xcomp_jax.bench.parts import flops
from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.saving import AS_IT_IS
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tuned import read_tuned
from xcomp_jax.cli import command
from xcomp_jax.config import COSINE, ModelConfig, Tuned
from xcomp_jax.data import prompt, video
from xcomp_jax.data.batch import Shape, batch_spec
from xcomp_jax.files import expanduser
from xcomp_jax.inference import encoded_video, generate
from xcomp_jax.inference.rounds import PREFIX, TEXT, scoring
from xcomp_jax.inference.selection import frame_selector, select_frames
from xcomp_jax.model import qc_comp, vlm
from xcomp_jax.progress import progress
from xcomp_jax.synthetic import world

MODES = ("official", "aligned", "local", "global")
OFFICIAL_FLOPS = 15.3e12  # that the official code counts for its rounds over 1,024 frames


def time_scoring(mode: str, frames: int) -> dict[str, float]:
  """Scores a video of given visual tokens by a random model of the official benchmark's sizes.

  Returns:
    seconds of the visual rounds and of the question's rows; operations, and how many times as many
    the official code counts for 1,024 frames; the largest arguments plus temporaries of one call.
  """
  *both, calls = parts.selecting(parts.sized(None, "float32"), mode, frames)
  out: dict[str, float] = {"calls": calls}
  memory = []
  for name, part in zip(("visual_s", "question_s"), both, strict=True):
    program = jax.jit(part.run).lower(*part.args).compile()
    jax.block_until_ready(program(*part.args))
    begun = time.perf_counter()
    for _ in range(calls):
      jax.block_until_ready(program(*part.args))
    out[name] = time.perf_counter() - begun
    used = program.memory_analysis()
    assert used is not None  # every backend has it
    memory.append(used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes)
  work = calls * sum(part.flops for part in both)
  return out | {
    "total_s": out["visual_s"] + out["question_s"],
    "TFLOP": work / 1e12,
    "official_TFLOP_ratio": OFFICIAL_FLOPS * frames / 1024 / work,
    "memory_GB": max(memory) / 1e9,
  }


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
    Shape(1, 1, PREFIX, kept, generate.up(TEXT, generate.TEXT_STEP)), ((16, D), cfg.dtype)
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


def needles(
  checkpoint: pathlib.Path, folder: pathlib.Path, modes: Sequence[str], kept: int
) -> dict[str, tuple[int, int]]:
  """How often the clip that shows the answer is among `kept` frames: {mode: (hits, questions)} over
  a world's held-out videos.

  A hit is any frame of that clip. "uniform" takes clips at equal distances, whatever the question.
  """
  lp_comp = (read_tuned(checkpoint) or Tuned(lp_comp=COSINE)).lp_comp
  model_config = ModelConfig(
    clip_frames=world.FRAMES,
    yarn="checkpoint",
    dtype="float32",
    param_dtype="float32",
    clips_per_chunk=16,
    attention="auto",
    remat=False,
  )
  cfg = read_vlm_config(checkpoint, model_config, lp_comp)
  model, tokenizer = loading.load_model(checkpoint, cfg), prompt.load_tokenizer(checkpoint)
  settings = {mode: qc_comp.select_config(mode, kept) for mode in modes}
  hits, asked = dict.fromkeys([*modes, "uniform"], 0), 0
  for annotation in progress(world.read_split(folder, "heldout"), unit="video"):
    sample = video.sample(
      folder / "heldout" / annotation["video"],
      size=cfg.vision.image_size,
      max_frames=1 << 20,
      min_frames=8,
      fps=world.FPS,
      clip_frames=world.FRAMES,
      style="ask",
    )
    T = len(sample.indices)
    selectors = {
      mode: frame_selector(T, world.FRAMES, setting) for mode, setting in settings.items()
    }
    phases = sorted({phase for selector in selectors.values() for phase in selector.phases})
    film = encoded_video.encode_video(
      model, video.frames(sample), sample.times, sample.seconds, "", phases=phases
    )
    even = np.linspace(0, film.clips - 1, kept // world.FRAMES).round().astype(int)
    rounds = {}
    for turn, scene in zip(annotation["conversations"][::2], annotation["scenes"], strict=True):
      question = prompt.question_prompt(
        tokenizer, turn["value"].removeprefix("<image>\n"), prompt.time_message(film.seconds, T)
      )
      asked += 1
      hits["uniform"] += scene in even
      for mode, selector in selectors.items():
        frames = select_frames(model, film, [question], selector, rounds=rounds)[0].frames
        hits[mode] += scene in frames // world.FRAMES
  return {mode: (int(n), asked) for mode, n in hits.items()}


def _run(args: argparse.Namespace) -> None:
  modes = args.mode or MODES
  if args.command == "needles":
    found = needles(resolve(args.checkpoint), pathlib.Path(args.world), modes, args.keep)
    print(
      "\n".join(
        f"{mode:>10} {n:5} of {asked} questions  {n / asked:6.1%}"
        for mode, (n, asked) in found.items()
      )
    )
    return
  for mode in modes:
    if args.command == "select":
      out = time_scoring(mode, args.frames)
    else:
      out = question_costs(pathlib.Path(args.like), mode, args.frames, args.keep, args.tokens)
    print(
      f"{mode}, {args.frames} frames\n"
      + "\n".join(f"{name:>26} {value:10.3f}" for name, value in out.items()),
      flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.bench_qc", description=__doc__.splitlines()[0]
  )
  commands = parser.add_subparsers(dest="command", required=True)
  scoring = commands.add_parser("select", help="measure scoring")
  asking = commands.add_parser(
    "questions", help="count the operations of a first and a later question"
  )
  asking.add_argument("--like", type=expanduser, required=True, help="a directory with config.json")
  asking.add_argument("--keep", type=int, default=512, help="frames kept for the answer")
  asking.add_argument("--tokens", type=int, default=16, help="of the answer")
  finding = commands.add_parser(
    "needles", help="count how often the clip that shows the answer is kept"
  )
  finding.add_argument(
    "--checkpoint", type=expanduser, required=True, help="a tuned model of the synthetic world"
  )
  finding.add_argument(
    "--world",
    type=expanduser,
    required=True,
    help="folder of `xcomp_jax.world`, whose heldout split is asked",
  )
  finding.add_argument("--keep", type=int, default=64, help="frames")
  for one in (scoring, asking):
    one.add_argument("--frames", type=int, default=1024)
  for one in (scoring, asking, finding):
    one.add_argument("--mode", action="append", choices=MODES)
  args = parser.parse_args(argv)
  with command():
    _run(args)
