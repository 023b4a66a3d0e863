"""Decodes the videos and images of a mixture once, into a store that training reads (docs/DATA.md).

  # frames, raw (or --frames jpeg)
  python -m xcomp_jax.predecode --mixture M.yaml --out DIR
  # what the frozen tower makes of them
  python -m xcomp_jax.predecode --mixture M.yaml --out DIR --features --checkpoint DIR
  python -m xcomp_jax.predecode --verify DIR
  python -m xcomp_jax.predecode --inspect DIR

A mixture is VideoChat-Flash's YAML: `datasets`, a list of json_path (json or jsonl),
sampling_strategy, data_root and video_read_type. Relative paths start from --root. All
annotations are checked before the first frame is decoded. The same command continues a run that
was stopped or killed, and its result is the same.
"""

import argparse
import collections
import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np

from xcomp_jax import cli
from xcomp_jax.config import COSINE, Attention, ConfigError, Dtype, Mask, ModelConfig, Tuned
from xcomp_jax.data import sampling, store, video
from xcomp_jax.data.predecoding import PER_SHARD, Tower, passed_over, predecode
from xcomp_jax.data.sampling import FrameSettings
from xcomp_jax.files import apart, expanduser
from xcomp_jax.inputs import number


def load_tower(
  checkpoint: str,
  settings: FrameSettings,
  clips_per_chunk: int | None = None,
  attention: Attention = "auto",
  dtype: Dtype | None = None,
) -> Tower:
  """The tower of a checkpoint (directory, hub id, or export), whose merged tokens are taken before
  the projector.

  dtype: to compute in; None: by the device.

  Raises:
    CheckpointError, ConfigError, OSError: what is wrong with it, or that it takes frames of another
      size.
  """
  import jax
  import ml_dtypes

  from xcomp_jax.checkpoints import finding, loading, sizes, tuned
  from xcomp_jax.inference import encoded_video
  from xcomp_jax.model import kernels

  directory = finding.resolve(checkpoint)
  card = kernels.here()
  as_tuned = tuned.read_tuned(directory) or Tuned(lp_comp=COSINE)
  dtype = dtype or kernels.compute_dtype(card, as_tuned.dtype)
  kernels.check_implementation(attention, dtype)
  model = ModelConfig(
    clip_frames=settings.clip_frames,
    yarn=None,
    dtype=dtype,
    param_dtype=dtype,
    clips_per_chunk=clips_per_chunk or "auto",
    attention=attention,
    remat=False,
  )
  # LP-Comp is the LLM's, which is not run
  cfg = sizes.read_vlm_config(directory, model, COSINE, option="--clip-frames {own}")
  size = cfg.vision.image_size
  if size != settings.image_size:
    raise ConfigError(
      f"the tower of {checkpoint} takes {size} pixels, not {settings.image_size}; give "
      f"--image-size {size}",
      where=checkpoint,
      allowed=size,
      value=settings.image_size,
    )
  # float16 has not all of a bfloat16's small numbers, and the identity is that of training's tower.
  vlm = loading.load_model(directory, cfg, dtype=None if dtype == "float16" else dtype)
  features = store.Features(loading.tower_identity(vlm), cfg.tokens_per_frame, cfg.vision.width)
  how = {
    "computed_in": dtype,
    "clips_per_chunk": cfg.clips_per_chunk,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }
  kernel = kernels.kernels_taken(cfg)["tower"]
  # where an earlier version's rules may have given wrong numbers
  if attention != "auto" or card.platform == "gpu":
    how |= {"attention": kernel}

  def run(clips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
      for one in encoded_video.encode_in_chunks(vlm, clips):
        yield np.asarray(one).astype(ml_dtypes.bfloat16)

  return Tower(features, how, run, f"attention of the tower on {card.kind}, {dtype}: {kernel}")


def options() -> argparse.ArgumentParser:
  """Makes the parser of the command's options; those of frames have the defaults of
  FrameSettings.
  """
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.predecode",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add, modes = parser.add_argument, parser.add_mutually_exclusive_group()
  usual = FrameSettings()
  add("--mixture", type=expanduser, help="YAML with the datasets to read")
  modes.add_argument(
    "--out",
    type=expanduser,
    help="folder to write; the same command continues one that is incomplete",
  )
  modes.add_argument(
    "--verify",
    type=expanduser,
    help="instead: read everything in this folder again, and compare it with its manifest",
  )
  modes.add_argument(
    "--inspect",
    type=expanduser,
    help="instead: show what is in this folder, and draw a contact sheet",
  )
  add("--root", type=expanduser, default=".", help="where relative paths of the mixture start")
  add(
    "--subset",
    type=number(0.0, 1.0, float),
    default=1.0,
    help="share of each annotation file's selection; 0.25 in the release",
  )
  add(
    "--image-size",
    type=number(1, sampling.SIZES[-1], int),
    help="pixels, square: of the checkpoint's tower; default: as --checkpoint was tuned, else "
    f"{usual.image_size}",
  )
  frames = number(1, sampling.FRAMES[-1], int)
  add("--max-frames", type=frames, default=usual.max_frames, help="frames of a video, at most")
  add(
    "--min-frames",
    type=frames,
    default=usual.min_frames,
    help="frames of a video, if it has as many",
  )
  add(
    "--fps",
    type=number(0.001, video.FASTEST, float),
    default=usual.fps,
    help="frames per second, at most",
  )
  add(
    "--clip-frames",
    type=number(1, sampling.CLIPS[-1], int),
    help="frames that the tower sees together; default: as --checkpoint was tuned, else "
    f"{usual.clip_frames}",
  )
  add("--frames", choices=("raw", "jpeg"), default="raw", help="how frames are stored")
  add("--quality", type=number(1, 100, int), default=95, help="of JPEG")
  add(
    "--features",
    action="store_true",
    help="store the merged tokens of the tower of --checkpoint (bfloat16) instead of frames",
  )
  add(
    "--checkpoint",
    type=expanduser,
    help="with --features: directory, hub id, or export; with --inspect: whose tokenizer",
  )
  add(
    "--clips-per-chunk",
    type=number(1, 1_000_000, int),
    help="with --features: clips in the tower at once; default: by the device's memory",
  )
  add(
    "--attention",
    choices=get_args(Attention),
    default="auto",
    help="with --features: which implementation; auto: by the device",
  )
  add(
    "--dtype",
    choices=get_args(Dtype),
    help="with --features: what the tower computes in; default: bfloat16, but float16 on GPUs that "
    "have none, and float32 on CPUs",
  )
  add(
    "--workers",
    type=number(0, 10_000, int),
    default=os.cpu_count(),
    help="decoding processes; 0: none beside this one, and no time limit",
  )
  add(
    "--timeout",
    type=number(0.001, 1e6, float),
    default=600.0,
    help="seconds for decoding one annotation, which then is bad",
  )
  add(
    "--samples-per-shard",
    type=number(1, 1_000_000, int),
    help="annotations in one file of clips; default: as in the unfinished work that is there, else "
    f"{PER_SHARD}",
  )
  add(
    "--skip-bad",
    action="store_true",
    help="leave out what can't be used, and list it in manifest.jsonl",
  )
  add(
    "--rate",
    choices=get_args(video.Rate),
    default=usual.rate,
    help="where frames have no constant rate: own: they have their own times; average: they lie as "
    "far apart as the average rate says, as in the release",
  )
  add(
    "--keep-tails",
    action="store_true",
    help="take what can be read of videos that are cut off, instead of leaving them out",
  )
  add("--restart", action="store_true", help="throw away what a run that was stopped has done")
  add(
    "--beam",
    help='options of a Beam pipeline that decodes: "--runner=DirectRunner --direct_num_workers=2"',
  )
  add(
    "--sheet",
    type=expanduser,
    help="with --inspect: the contact sheet; default: the folder's name with .png",
  )
  add(
    "--prompts",
    type=number(0, 1_000_000, int),
    default=3,
    help="with --inspect: prompts to show",
  )
  add(
    "--mask",
    choices=get_args(Mask),
    default="official",
    help="with --inspect: which tokens are supervised",
  )
  return parser


def frame_settings(args: argparse.Namespace) -> FrameSettings:
  """The settings of frames among the options; sizes that are not given are those that the tower of
  --features was tuned with, as far as its checkpoint says.
  """
  as_tuned: dict[str, Any] = {}
  if args.features:
    from xcomp_jax.checkpoints import finding, tuned  # brings jax

    if found := tuned.read_tuned(finding.resolve(args.checkpoint, "about")):
      as_tuned = {"image_size": found.image_size, "clip_frames": found.clip_frames}
  given = {field.name: getattr(args, field.name) for field in dataclasses.fields(FrameSettings)}
  settings = [*as_tuned.items(), *given.items()]  # the last value of each that is one counts
  return FrameSettings(**{name: value for name, value in settings if value is not None})


def make_store(args: argparse.Namespace) -> None:
  """Writes the store that the options ask for, and prints what is in it.

  Raises:
    ValueError: options that are missing, or don't go together; and see `predecode`.
  """
  for name in ("mixture", "out"):
    if getattr(args, name) is None:
      raise ValueError(
        f"--{name} is missing; give --mixture M.yaml --out DIR, or --verify DIR, or --inspect DIR"
      )
  if args.features and (args.checkpoint is None or args.frames != "raw" or args.beam is not None):
    raise ValueError(
      "--features needs --checkpoint DIR, and goes neither with --frames jpeg nor with --beam"
    )
  for name, default in (("attention", "auto"), ("dtype", None)):
    if not args.features and getattr(args, name) != default:
      raise ValueError(f"--{name} goes with --features")
  settings, tower = frame_settings(args), None
  if args.features:
    tower = load_tower(args.checkpoint, settings, args.clips_per_chunk, args.attention, args.dtype)
    print(tower.about, file=sys.stderr)
  info = predecode(
    args.mixture,
    args.out,
    settings,
    root=args.root,
    subset=args.subset,
    workers=args.workers,
    samples_per_shard=args.samples_per_shard,
    skip_bad=args.skip_bad,
    quality=args.quality if args.frames == "jpeg" else None,
    tower=tower,
    timeout=args.timeout,
    restart=args.restart,
    beam=None if args.beam is None else shlex.split(args.beam),
  )
  passed = sum(
    # not of an earlier version
    (collections.Counter(file.get("passed_over", {})) for file in info["annotation_files"]),
    collections.Counter(),
  )
  print(
    f"{args.out}: {info['samples']} samples, {info['frames']} frames, {info['skipped']} "
    f"skipped{passed_over(passed)}"
  )


def main(argv: Sequence[str] | None = None) -> None:
  """The command; an error is one line on stderr (and a list of what is bad), exit code 1."""
  given = list(sys.argv[1:] if argv is None else argv)
  if "--beam" in given[:-1]:  # its value begins with --, which argparse would take for an option
    at = given.index("--beam")
    given[at : at + 2] = [f"--beam={given[at + 1]}"]
  args = options().parse_args(cli.hyphenated(given))
  logging.getLogger("absl").setLevel(logging.WARNING)  # TFDS tells which files it opens
  again = "interrupted" + ("" if args.out is None else "; the same command continues")
  with cli.command(interrupted=again):
    if args.verify is None and args.inspect is None:
      make_store(args)
      return
    from xcomp_jax.data import inspection  # brings tokenizers

    if args.verify is not None:
      inspection.verify(args.verify)
      return
    sheet = args.sheet or f"{args.inspect.rstrip('/')}.png"
    apart(
      {"--sheet": sheet}, {"--inspect": args.inspect, "--checkpoint": args.checkpoint}, nested=True
    )
    inspection.inspect(args.inspect, sheet, args.prompts, args.mask, args.checkpoint)


if __name__ == "__main__":
  main()
