"""Measures what it costs to use the model.

  python -m xcomp_jax.bench random --like DIR --out DIR
  python -m xcomp_jax.bench load --checkpoint DIR
  python -m xcomp_jax.bench select [--frames 1024] [--mode aligned]
  python -m xcomp_jax.bench questions --like DIR
  python -m xcomp_jax.bench needles --checkpoint DIR --world DIR

`random` writes an official-layout checkpoint of random bfloat16 weights, of the sizes in `--like`'s config.json
and with the tokenizer that lies there; `load` reports time, rate and memory of `weights.load`; `select` time,
operations and memory of QC-Comp's scoring in each mode, on random weights of the sizes at which the official code was
measured; `questions` counts the operations of a first and a later question at the sizes of `--like`; `needles` how often the clip with the answer is selected.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import jax.extend.core
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm

from xcomp_jax import encode, export, generate, qc_comp, weights, world
from xcomp_jax.config import LLMConfig, LPCompConfig, ModelConfig, SelectConfig, VisionConfig, VLMConfig
from xcomp_jax.data import prompt, video
from xcomp_jax.data.batch import IGNORE, IMAGE_TOKEN, Bucket, batch_spec
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.export import AS_IT_IS, NOT_TUNED
from xcomp_jax.model import vlm
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


# --- QC-Comp ---------------------------------------------------------------------------------------------------

MEASURED = LLMConfig(  # the official code's own benchmark; 15.3e12 operations for its rounds over 1,024 frames
  vocab_size=4096, width=512, layers=28, heads=8, kv_heads=2, head_dim=64, mlp_width=1408, rope_theta=1e6, norm_eps=1e-6,
  tied=True, context=None,
)
OFFICIAL_FLOPS = 15.3e12
PREFIX, TEXT = 14, 72  # tokens before and behind the visual ones
QUESTION = (27, TEXT - 5)  # its place in the text


def flops(function, *args) -> float:
  """Floating-point operations of all matrix products of a function, a multiply-add as two; loops by their length."""
  return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    inner = sum(_flops(getattr(sub, "jaxpr", sub)) for sub in jax.extend.core.jaxprs_in_params(equation.params))
    total += inner * equation.params.get("length", 1)
  return total


def asked_tokens() -> Prompt:
  """A prompt of the benchmark's length."""
  tokens = np.arange(PREFIX + 1 + TEXT, dtype=np.int32)
  tokens[PREFIX] = IMAGE_TOKEN
  none = np.zeros(len(tokens), bool)
  return Prompt(tokens, np.full_like(tokens, IGNORE), none, tuple(PREFIX + 1 + place for place in QUESTION))


def scoring(graph: nnx.GraphDef, plan: qc_comp.Plan, setting: SelectConfig, rows: int):
  """Functions (state, features [rows, C, N, D]) -> caches and (state, caches) -> scores: a call of `watch` and of `score`."""
  question, clips = asked_tokens(), plan.frames // 8
  asked = qc_comp.from_prompt(question, setting, generate.SCORE_STEP)

  def watch(state, features):
    model = nnx.merge(graph, state)
    last = qc_comp.scored_layers(setting, model.cfg.llm.layers)[-1]
    return qc_comp.watch(model, features, jnp.full(rows, clips), jnp.asarray(question.tokens[:PREFIX]), last=last)

  def score(state, caches):
    model = nnx.merge(graph, state)
    layers = qc_comp.scored_layers(setting, model.cfg.llm.layers)
    windows = jnp.asarray(plan.windows)
    return qc_comp.score(model, caches, asked, windows, layers=layers, causal=setting.causal, prefix=PREFIX, units=clips)

  return watch, score


def select(mode: str, frames: int) -> dict[str, float]:
  """Scores a video of given visual tokens by a random model of the official benchmark's sizes.

  Returns:
    seconds of the visual rounds and of the question's rows; operations, and how many times as many the official
    code counts for 1,024 frames; the largest arguments plus temporaries of one call.
  """
  vision = VisionConfig(image_size=48, patch_size=8, width=64, layers=1, heads=2, mlp_width=64, table="umt-hd")
  cfg = VLMConfig(vision, MEASURED, LPCompConfig("cosine", "suffix", 16), 8, 16, "float32", 1, "auto", remat=False)
  model = nnx.jit(lambda: VLM(cfg, rngs=nnx.Rngs(0)))()
  graph, state = nnx.split(model)
  setting = qc_comp.setting(mode, 8)
  plan = qc_comp.plan(frames, 8, setting)
  rows, clips = max(1, setting.round // plan.frames), plan.frames // 8
  calls = -(-len(plan.starts) // rows)
  watch, score = scoring(graph, plan, setting, rows)
  features = jnp.asarray(np.random.default_rng(0).standard_normal((rows, clips, 128, 64), np.float32))
  caches = jax.eval_shape(watch, state, features)
  work = calls * (flops(watch, state, features) + flops(score, state, caches))
  first, second = (jax.jit(f).lower(state, x).compile() for f, x in ((watch, features), (score, caches)))
  memory = [program.memory_analysis() for program in (first, second)]
  out = {"calls": calls}
  for name, program, argument in (("visual_s", first, features), ("question_s", second, None)):
    argument = first(state, features) if argument is None else argument
    jax.block_until_ready(program(state, argument))
    begun = time.perf_counter()
    for _ in range(calls):
      jax.block_until_ready(program(state, argument))
    out[name] = time.perf_counter() - begun
  return out | {
    "total_s": out["visual_s"] + out["question_s"], "TFLOP": work / 1e12, "official_TFLOP_ratio": OFFICIAL_FLOPS * frames / 1024 / work,
    "memory_GB": max(m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes for m in memory) / 1e9,
  }


def questions(like: pathlib.Path, mode: str, frames: int, kept: int, tokens: int) -> dict[str, float]:
  """Operations of a first and a later question about an encoded video, of the model that `like` describes; none are run."""
  cfg = dataclasses.replace(weights.read_config(like, AS_IT_IS, LPCompConfig("cosine", "suffix", 16)), clip_frames=8)
  graph, state = nnx.split(weights.abstract(cfg))
  setting, D = qc_comp.setting(mode, kept), cfg.vision.width
  plan = qc_comp.plan(frames, 8, setting)
  rows, clips, size = max(1, setting.round // plan.frames), plan.frames // 8, cfg.vision.image_size
  calls = -(-len(plan.starts) // rows)
  watch, score = scoring(graph, plan, setting, rows)
  features = jax.ShapeDtypeStruct((rows, clips, 128, D), np.dtype(cfg.dtype))
  batch = batch_spec(Bucket(kept // 8, 8, PREFIX, generate.up(TEXT, generate.TEXT_STEP)), 1, ((128, D), np.dtype(cfg.dtype)))

  def answer(state, batch):
    model = nnx.merge(graph, state)
    return generate.decode(model, generate.prefill(model, batch, tokens), generate.Sampling(tokens, ()), tokens)[0]

  encode_clip = flops(
    lambda state, clips: vlm.encode(nnx.merge(graph, state), clips), state, jax.ShapeDtypeStruct((1, 1, 8, size, size, 3), np.uint8)
  )
  phases = len(generate.phases(frames, 8, setting))
  tower = encode_clip * (frames // 8) * phases
  visual = flops(watch, state, features) * calls
  asking = flops(score, state, jax.eval_shape(watch, state, features)) * calls
  final = flops(answer, state, batch)
  if phases > 1:  # selected frames are cut into clips anew
    final += encode_clip * (kept // 8)
  first, later = tower + visual + asking + final, asking + final
  parts = {"tower": tower, "visual rounds": visual, "question's rows": asking, "answer": final, "first": first, "later": later}
  return {f"{name}, TFLOP": value / 1e12 for name, value in parts.items()} | {"later / first": later / first}


def needles(checkpoint: pathlib.Path, folder: pathlib.Path, modes: Sequence[str], kept: int) -> dict[str, tuple[int, int]]:
  """How often the clip that shows the answer is among `kept` frames: {mode: (hits, questions)} over a world's held-out videos.

  A hit is any frame of that clip. "uniform" takes clips at equal distances, whatever the question.
  """
  lp_comp = weights.read_lp_comp(checkpoint)
  model_config = ModelConfig(world.FRAMES, "float32", "float32", 16, "auto", remat=False)
  cfg = weights.read_config(checkpoint, model_config, lp_comp)
  model, tokenizer = weights.load(checkpoint, cfg), prompt.load_tokenizer(checkpoint)
  settings = {mode: qc_comp.setting(mode, kept) for mode in modes}
  hits, asked = dict.fromkeys([*modes, "uniform"], 0), 0
  for annotation in tqdm(world.read_annotations(folder, "heldout"), unit="video"):
    sample = video.sample(
      folder / "heldout" / annotation["video"], size=cfg.vision.image_size, max_frames=1 << 20, min_frames=8, fps=world.FPS,
      clip_frames=world.FRAMES, style="ask",
    )
    T = len(sample.indices)
    phases = sorted({phase for setting in settings.values() for phase in generate.phases(T, world.FRAMES, setting)})
    film = encode.encode(model, video.frames(sample), sample.times, sample.seconds, "", phases=phases)
    even = np.linspace(0, film.clips - 1, kept // world.FRAMES).round().astype(int)
    rounds = {}
    for turn, scene in zip(annotation["conversations"][::2], annotation["scenes"], strict=True):
      question = prompt.ask(tokenizer, turn["value"].removeprefix("<image>\n"), prompt.time_message(film.seconds, T))
      asked += 1
      hits["uniform"] += scene in even
      for mode, setting in settings.items():
        frames = generate.select(model, film, question, setting, rounds=rounds).frames
        hits[mode] += scene in frames // world.FRAMES
  return {mode: (int(n), asked) for mode, n in hits.items()}


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(prog="python -m xcomp_jax.bench", description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(dest="command", required=True)
  random = commands.add_parser("random", help="write a checkpoint of random weights")
  random.add_argument("--like", required=True, help="a directory with config.json")
  random.add_argument("--out", required=True, help="directory to be made")
  loading = commands.add_parser("load", help="measure loading")
  loading.add_argument("--checkpoint", required=True, help="a directory with config.json and weights")
  scoring = commands.add_parser("select", help="measure QC-Comp's scoring")
  asking = commands.add_parser("questions", help="count the operations of a first and a later question")
  asking.add_argument("--like", required=True, help="a directory with config.json")
  asking.add_argument("--keep", type=int, default=512, help="frames kept for the answer")
  asking.add_argument("--tokens", type=int, default=16, help="of the answer")
  finding = commands.add_parser("needles", help="count how often QC-Comp keeps the clip that shows the answer")
  finding.add_argument("--checkpoint", required=True, help="a tuned model of the synthetic world")
  finding.add_argument("--world", required=True, help="folder of `xcomp_jax.world`, whose heldout split is asked")
  finding.add_argument("--keep", type=int, default=64, help="frames")
  finding.add_argument("--mode", action="append", choices=("official", "aligned", "local", "global"))
  for command in (scoring, asking):
    command.add_argument("--frames", type=int, default=1024)
    command.add_argument("--mode", action="append", choices=("official", "aligned", "local", "global"))
  args = parser.parse_args(argv)
  try:
    if args.command in ("select", "questions"):
      like = args.command == "questions" and pathlib.Path(args.like)
      for mode in args.mode or ("official", "aligned", "local", "global"):
        out = questions(like, mode, args.frames, args.keep, args.tokens) if like else select(mode, args.frames)
        print(f"{mode}, {args.frames} frames\n" + "\n".join(f"{name:>26} {value:10.3f}" for name, value in out.items()), flush=True)
    elif args.command == "needles":
      modes = args.mode or ("official", "aligned", "local", "global")
      found = needles(weights.resolve(args.checkpoint), pathlib.Path(args.world), modes, args.keep)
      print("\n".join(f"{mode:>10} {n:5} of {asked} questions  {n / asked:6.1%}" for mode, (n, asked) in found.items()))
    elif args.command == "random":
      random_checkpoint(pathlib.Path(args.like), pathlib.Path(args.out))
    else:
      print("\n".join(f"{name:>26} {value:8.3f}" for name, value in load(weights.resolve(args.checkpoint)).items()))
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  main()
