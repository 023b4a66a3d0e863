"""Asks a video (or an image) questions; the video is encoded once, and every question picks the frames it needs.

  python -m xcomp_jax.ask --checkpoint exports/sct --video film.mp4 --question "What happens first?"

Several questions: repeat --question, or --questions FILE (one per line); without either, they are read from the
terminal as one conversation. Answers go to stdout, everything else to stderr. Frames are sampled as in
FACTS.md 5; a short video's are repeated up to --min-frames.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from xcomp_jax import encode, files, generate, qc_comp, report, weights
from xcomp_jax.config import ConfigError, LPCompConfig, ModelConfig, SelectConfig, VLMConfig
from xcomp_jax.data import prompt, video
from xcomp_jax.model.vlm import VLM

RELEASED = LPCompConfig(schedule="cosine", keep="suffix", group=16)
SAMPLED_CLIP = 8  # the release samples whole clips of 8 frames even where its tower takes clips of 4 (FACTS.md 5)


def say(text: str) -> None:
  """Prints to stderr."""
  print(text, file=sys.stderr, flush=True)


def check_target(option: str, path: str | None) -> None:
  """Sees to it before any work that a file can be written.

  Raises:
    OSError: it can't.
  """
  if path is None:
    return
  file = pathlib.Path(path)
  if not file.parent.is_dir():
    raise FileNotFoundError(f"{option} {file}: there is no folder {file.parent}")
  if file.is_dir() or not os.access(file.parent, os.W_OK):
    raise PermissionError(f"{option} {file}: " + ("this is a folder" if file.is_dir() else f"{file.parent} can't be written to"))


def sampled(args: argparse.Namespace, cfg: VLMConfig) -> video.Sample | None:
  """Which frames to decode; None if --encoded is there to be read.

  Raises:
    VideoError, FileNotFoundError, ConfigError: what is wrong with the video or the arguments.
  """
  file = pathlib.Path(args.encoded) if args.encoded else None
  if file and file.exists():
    return None
  if not args.video:
    raise FileNotFoundError("no --video" + (f", and {file} does not exist" if file else ""))
  if SAMPLED_CLIP % cfg.clip_frames:
    raise ConfigError(f"--clip-frames {cfg.clip_frames}: videos are sampled in clips of {SAMPLED_CLIP}, so take a divisor of that")
  file = pathlib.Path(args.video)
  kinds = {".gif": "gif"} | dict.fromkeys(video.STILLS, "img")
  read_type = "frames" if file.is_dir() else kinds.get(file.suffix.lower(), "video")
  return video.sample(
    args.video, size=cfg.vision.image_size, max_frames=args.max_frames, min_frames=args.min_frames, fps=args.fps,
    clip_frames=SAMPLED_CLIP, style="ask", start=args.start, end=args.end, read_type=read_type,
  )


def check(select: SelectConfig | None, frames: int, clip_frames: int) -> None:
  """Sees to it before any frame is decoded that so many can be selected from.

  Raises:
    ConfigError: see `qc_comp.plan`.
  """
  if not generate.why_not(frames, select):
    qc_comp.plan(frames, clip_frames, select)


def encoded(
  args: argparse.Namespace, model: VLM, sample: video.Sample | None, select: SelectConfig | None, spent: dict[str, float]
) -> encode.EncodedVideo:
  """The video, read from --encoded, or decoded and encoded, and then written there if wanted.

  Raises:
    VideoError, EncodedVideoError, OSError: what is wrong with the video or the file.
  """
  begun = time.perf_counter()
  if sample is None:
    film = encode.load(args.encoded, model)
    if args.video and source(args) != film.source:
      raise encode.EncodedVideoError(
        f"{args.encoded} holds {film.source}, not {source(args)}; leave --video out, or name another file"
      )
    T = len(film.times)
    check(select, T, film.clip_frames)
    if lacking := set(generate.phases(T, film.clip_frames, select)) - set(film.features):
      raise encode.EncodedVideoError(
        f"--mode {args.mode} needs clips that start at frame {', '.join(map(str, sorted(lacking)))} too, which {args.encoded} "
        "does not hold; give --video and another --encoded file"
      )
    spent["reading"] = time.perf_counter() - begun
    return film
  T = len(sample.indices)
  say(f"{args.video}: {T} frame{'s' if T > 1 else ''}" + (f" of {sample.seconds:.2f} s" if sample.seconds else ""))
  F = min(model.cfg.clip_frames, T)
  phases = generate.phases(T, F, select)
  decoding = 0.0

  def frames() -> Iterator[np.ndarray]:
    nonlocal decoding
    decoder = video.frames(sample)
    while True:
      begun = time.perf_counter()
      frame = next(decoder, None)
      decoding += time.perf_counter() - begun
      if frame is None:
        return
      yield frame

  with tqdm(total=T // F * len(phases), desc="encoding", unit="clip", leave=False, disable=None) as bar:
    film = encode.encode(model, frames(), sample.times, sample.seconds, source(args), phases=phases, report=bar.update)
  spent["decoding"], spent["tower"] = decoding, time.perf_counter() - begun - decoding
  if args.encoded:
    encode.save(film, args.encoded)
    say(f"{args.encoded}: {sum(f.nbytes for f in film.features.values()) / 1e6:.1f} MB of features")
  return film


def source(args: argparse.Namespace) -> str:
  """Which video, sampled how; its size and beginning tell it from another one of its name."""
  file = pathlib.Path(args.video)
  size = sum(f.stat().st_size for f in file.iterdir()) if file.is_dir() else file.stat().st_size
  digest = hashlib.blake2b(digest_size=4)
  if not file.is_dir():
    with open(file, "rb") as opened:
      digest.update(opened.read(1 << 20))
  part = "" if args.start is None and args.end is None else f" from {args.start or 0} s to {args.end or 'the end'}"
  return f"{file.name} ({size:,} bytes, {digest.hexdigest()}){part}, {args.min_frames} to {args.max_frames} frames at up to {args.fps:g} per second"


def listed(args: argparse.Namespace) -> list[str]:
  """The questions of the command line.

  Raises:
    FileNotFoundError: there is no --questions file. AnnotationError: it is empty.
  """
  found = list(args.question or ())
  if args.questions:
    found += [line.strip() for line in pathlib.Path(args.questions).read_text().splitlines() if line.strip()]
    if not found:
      raise prompt.AnnotationError(f"{args.questions} holds no question")
  return found


def typed() -> Iterator[str]:
  """Lines from stdin until it ends."""
  while True:
    if sys.stdin.isatty():
      print("? ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    if line.strip():
      yield line.strip()


def together(video: dict[str, float], question: dict[str, float]) -> dict[str, float]:
  """Seconds spent on the video and on a question."""
  return {name: video.get(name, 0) + question.get(name, 0) for name in video | question}


def as_json(question: str, answer: generate.Answer, film: encode.EncodedVideo, spent: dict[str, float]) -> str:
  """One line of --json."""
  kept = answer.selection
  scores = None if kept.scores is None else kept.scores.reshape(-1, film.clip_frames).mean(1).tolist()
  return json.dumps({
    "question": question, "answer": answer.text, "video": film.source, "seconds": film.seconds, "sampled_frames": len(film.times),
    "frames": kept.frames.tolist(), "ranges": report.ranges(kept.frames, film.times, film.seconds), "note": kept.note,
    "clip_scores": scores, "spent": together(spent, answer.spent),
  })  # fmt: skip


def answer(args: argparse.Namespace) -> None:
  """Answers all questions.

  Raises:
    CheckpointError, VideoError, EncodedVideoError, AnnotationError, ConfigError, OSError: bad arguments, by name.
  """
  if args.compilation_cache and jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(args.compilation_cache).expanduser()))
  directory = weights.resolve(args.checkpoint)
  tuned = weights.read_lp_comp(directory) or RELEASED
  lp_comp = LPCompConfig(args.schedule or tuned.schedule, args.keep or tuned.keep, tuned.group)
  dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  clip_frames = args.clip_frames if args.clip_frames == "checkpoint" else int(args.clip_frames)
  if args.clips_per_chunk < 1 or (clip_frames != "checkpoint" and clip_frames < 1):
    raise ConfigError("--clips-per-chunk and --clip-frames must be at least 1")
  cfg = weights.read_config(directory, ModelConfig(clip_frames, dtype, dtype, args.clips_per_chunk, "auto", remat=False), lp_comp)
  tokenizer = weights.read_tokenizer(directory, cfg)
  select = qc_comp.setting(args.mode, args.select, args.repeat) if args.select else None
  sampling = generate.Sampling(
    args.max_new_tokens, tokenizer.eos, args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.seed
  )
  page = pathlib.Path(args.report) if args.report else None
  check_target("--report", args.report)
  if args.encoded and not pathlib.Path(args.encoded).exists():
    check_target("--encoded", args.encoded)

  fixed = listed(args)
  for question in fixed:
    prompt.ask(tokenizer, question, "")  # what is wrong with it shows before any work
  if select and lp_comp.keep == "attention":
    raise ConfigError('--keep attention can\'t be scored by QC-Comp: add --select 0')
  sample = sampled(args, cfg)
  if sample is not None:
    check(select, len(sample.indices), cfg.clip_frames)

  spent, done = {}, []
  begun = time.perf_counter()
  vlm = weights.load(directory, cfg, dtype=dtype)
  spent["loading"] = time.perf_counter() - begun
  say(f"{args.checkpoint}: loaded in {spent['loading']:.1f} s; LP-Comp {lp_comp.keep}, {jax.devices()[0].device_kind}")
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.default_matmul_precision("highest" if dtype == "float32" else None))
    film = encoded(args, vlm, sample, select, spent)
    chat = generate.Chat(vlm, tokenizer, film, select=select, sampling=sampling, keep_rounds=len(fixed) != 1 and not args.forget_rounds)
    for question in fixed or typed():
      if fixed and not args.follow_up:
        chat.forget()
      with tqdm(total=0, desc="scoring", leave=False, disable=None) as bar:

        def progress(what, done, total, bar=bar):
          bar.set_description(what, refresh=False)
          bar.total = total
          bar.update(done - bar.n)

        def write(text, bar=bar):
          bar.close()
          if not args.json:
            print(text, end="", flush=True)

        try:
          got = chat.ask(question, write=write, report=progress)
        except ValueError as error:
          if fixed:
            raise
          say(f"error: {error}")  # at the terminal the conversation goes on
          continue
      print(as_json(question, got, film, spent) if args.json else "", flush=True)
      done.append((question, got))
      kept, clock = got.selection, lambda t: report.clock(t, film.seconds)
      if kept.note and select and len(film.times) > 1:
        say(kept.note)
      elif kept.scores is not None:
        spans = report.ranges(kept.frames, film.times, film.seconds)
        say(f"looked at {len(kept.frames)} of {len(film.times)} frames: " + ", ".join(f"{clock(a)} to {clock(b)}" for a, b in spans))
      say("spent " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in together(spent, got.spent).items()))
      if page:
        files.write(page, report.page(film, done, cfg, spent))


def main(argv: Sequence[str] | None = None) -> None:
  """The command; an error is one line on stderr and exit code 1."""
  parser = argparse.ArgumentParser(prog="python -m xcomp_jax.ask", description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--checkpoint", required=True, help="directory, hub id, or export")
  add("--video", help="a video file, or an image")
  add("--encoded", help="file of the encoded video: read if it is there, else written")
  add("--question", action="append", help="may be repeated")
  add("--questions", help="file of questions, one per line")
  add("--follow-up", action="store_true", help="each question continues the conversation; always so at the terminal")
  add("--json", action="store_true", help="one JSON object per question instead of text")
  add("--report", help="HTML page to be written: relevance over time, thumbnails, cost")
  add("--select", type=int, default=512, help="frames that QC-Comp keeps for a question; 0: all")
  add("--mode", choices=("aligned", "local", "official", "global"), default="aligned", help="how QC-Comp scores them")
  add("--repeat", type=int, help="times a frame is scored; default: 2 in official mode, 1 in the others")
  add("--forget-rounds", action="store_true", help="run scoring rounds again for every question; saves memory")
  add("--start", type=float, help="second from which the video is looked at")
  add("--end", type=float, help="and until which")
  add("--max-frames", type=int, default=1024, help="frames, at most")
  add("--min-frames", type=int, default=128, help="frames, at least; a short video's are repeated")
  add("--fps", type=float, default=8.0, help="frames per second, at most")
  add("--clip-frames", default="8", help='frames the tower sees together; "checkpoint": what config.json says (quirk Q1)')
  add("--clips-per-chunk", type=int, default=4, help="clips in the tower at once; bounds memory")
  add("--keep", choices=("suffix", "uniform", "stride", "avgpool", "none", "attention"), help="default: as tuned, else suffix")
  add("--schedule", choices=("cosine", "cosine_ceil"), help="default: as tuned, else cosine")
  add("--compilation-cache", default="~/.cache/xcomp_jax", help="folder that keeps compiled programs for the next time; '': none")
  add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
  add("--max-new-tokens", type=int, default=64)
  add("--repetition-penalty", type=float, default=1.0, help="1.1 in the release's generation_config (quirk Q20)")
  add("--temperature", type=float, default=0.0, help="0: the most probable token each time")
  add("--top-k", type=int, default=0, help="draw from this many tokens; 0: from all")
  add("--top-p", type=float, default=1.0, help="draw from the fewest tokens of this probability")
  add("--seed", type=int, default=0, help="of the draws")
  args = parser.parse_args(argv)
  with files.command(OverflowError):
    answer(args)


if __name__ == "__main__":
  main()
