"""Asks a video (or an image) a question and prints the answer.

  python -m xcomp_jax.ask --checkpoint exports/sct --video film.mp4 --question "What happens first?"

The answer goes to stdout, everything else to stderr. Frames are sampled as in FACTS.md 5, a short video's are
repeated up to --min-frames. Decoding is greedy.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

from xcomp_jax import generate, weights
from xcomp_jax.config import LPCompConfig, ModelConfig
from xcomp_jax.data import prompt, video
from xcomp_jax.data.batch import Batch, Bucket, Example, collate
from xcomp_jax.data.prompt import Prompt

RELEASED = LPCompConfig(schedule="cosine", keep="suffix", group=16)
TEXT_STEP = 64  # prompts are padded to a multiple of this, so that few lengths are compiled
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def as_batch(question: Prompt, frames: np.ndarray, clip_frames: int) -> Batch:
  """One prompt about frames uint8[T, S, S, 3] as a Batch of one row; T is a multiple of clip_frames, or 1."""
  clips = frames.reshape(-1, min(clip_frames, len(frames)), *frames.shape[1:])
  example = Example(clips, question.tokens, question.labels, question.query, index=0)
  slot = int(np.flatnonzero(question.tokens < 0)[0])
  text = -(-(len(question.tokens) - slot - 1) // TEXT_STEP) * TEXT_STEP
  return collate([example], Bucket(len(clips), clips.shape[1], slot, text))


def answer(args: argparse.Namespace) -> str:
  """What the command prints.

  Raises:
    CheckpointError, VideoError, AnnotationError, ConfigError, FileNotFoundError: bad arguments, by name.
  """
  say = lambda text: print(text, file=sys.stderr, flush=True)
  directory = weights.resolve(args.checkpoint)
  tuned = weights.read_lp_comp(directory) or RELEASED
  lp_comp = LPCompConfig(args.schedule or tuned.schedule, args.keep or tuned.keep, tuned.group)
  dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  clip_frames = args.clip_frames if args.clip_frames == "checkpoint" else int(args.clip_frames)
  model = ModelConfig(clip_frames, dtype, dtype, args.clips_per_chunk, "auto", remat=False)
  cfg = weights.read_config(directory, model, lp_comp)
  tokenizer = prompt.load_tokenizer(directory)

  still = args.video.lower().endswith(IMAGES)
  film = video.load(
    args.video, size=cfg.vision.image_size, max_frames=args.max_frames, min_frames=args.min_frames, fps=args.fps,
    clip_frames=cfg.clip_frames, style="ask", start=args.start, end=args.end, read_type="img" if still else "video",
  )  # fmt: skip
  message = "" if still else prompt.time_message(film.seconds, len(film.frames))
  batch = as_batch(prompt.ask(tokenizer, args.question, message), film.frames, cfg.clip_frames)
  say(f"{args.video}: {len(film.frames)} frames" + ("" if still else f" of {film.seconds:.2f} s"))

  begun = time.perf_counter()
  vlm = weights.load(directory, cfg, dtype=dtype)
  say(f"{args.checkpoint}: loaded in {time.perf_counter() - begun:.1f} s; LP-Comp {lp_comp.keep}, {jax.devices()[0].device_kind}")
  begun = time.perf_counter()
  sampling = generate.Sampling(args.max_new_tokens, tokenizer.eos, args.repetition_penalty)
  with jax.default_matmul_precision("highest" if dtype == "float32" else None):
    (tokens,) = generate.generate(vlm, batch, sampling)
  say(f"{len(tokens)} tokens in {time.perf_counter() - begun:.1f} s")
  return tokenizer.decode(tokens.tolist()).strip()


def main(argv: Sequence[str] | None = None) -> None:
  """The command; an error is one line on stderr and exit code 1."""
  parser = argparse.ArgumentParser(prog="python -m xcomp_jax.ask", description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--checkpoint", required=True, help="directory, hub id, or export")
  add("--video", required=True, help="a video file, or an image")
  add("--question", required=True)
  add("--start", type=float, help="second from which the video is looked at")
  add("--end", type=float, help="and until which")
  add("--max-frames", type=int, default=512, help="frames, at most")
  add("--min-frames", type=int, default=128, help="frames, at least; a short video's are repeated")
  add("--fps", type=float, default=8.0, help="frames per second, at most")
  add("--clip-frames", default="8", help='frames the tower sees together; "checkpoint": what config.json says (quirk Q1)')
  add("--clips-per-chunk", type=int, default=4, help="clips in the tower at once; bounds memory")
  add("--keep", choices=("suffix", "uniform", "stride", "avgpool", "none", "attention"), help="default: as tuned, else suffix")
  add("--schedule", choices=("cosine", "cosine_ceil"), help="default: as tuned, else cosine")
  add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
  add("--max-new-tokens", type=int, default=64)
  add("--repetition-penalty", type=float, default=1.0, help="1.1 in the release's generation_config (quirk Q20)")
  args = parser.parse_args(argv)
  try:
    print(answer(args))
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  main()
