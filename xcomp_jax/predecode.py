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

import collections
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
from absl import app, flags, logging

from xcomp_jax.cli import command
from xcomp_jax.config import Attention, Dtype
from xcomp_jax.data import store, video
from xcomp_jax.data.decode_jobs import FrameSettings
from xcomp_jax.data.predecoding import PER_SHARD, Tower, _passed_over, predecode
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
    CheckpointError, ConfigError, OSError: what is wrong with it.
    ValueError: it takes frames of another size.
  """
  import jax
  import ml_dtypes

  from xcomp_jax.checkpoints import loading
  from xcomp_jax.checkpoints.finding import resolve
  from xcomp_jax.checkpoints.sizes import read_vlm_config
  from xcomp_jax.checkpoints.tuned import read_tuned
  from xcomp_jax.config import COSINE, ModelConfig, Tuned
  from xcomp_jax.inference import encoded_video
  from xcomp_jax.model import kernels

  directory = resolve(checkpoint)
  card = kernels.here()
  dtype = dtype or kernels.compute_dtype(
    card, (read_tuned(directory) or Tuned(lp_comp=COSINE)).dtype
  )
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
  cfg = read_vlm_config(directory, model, COSINE, option="--clip_frames {own}")
  if cfg.vision.image_size != settings.image_size:
    size = cfg.vision.image_size
    raise ValueError(
      f"the tower of {checkpoint} takes {size} pixels, not {settings.image_size}; give "
      f"--image_size {size}"
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
        yield one.astype(ml_dtypes.bfloat16)

  return Tower(features, how, run, f"attention of the tower on {card.kind}, {dtype}: {kernel}")


class _Path(flags.ArgumentParser):
  """A leading ~ is the home directory."""

  def parse(self, argument: str) -> str:
    return expanduser(argument)


class _Number(flags.ArgumentParser):
  """A number within bounds; absl's own lets through what is no number."""

  def __init__(self, low: float, high: float):
    self._read = number(low, high, type(low))

  def flag_type(self) -> str:
    return "number"

  def parse(self, argument: Any) -> float:
    return self._read(str(argument))  # a default is a number already


def _define_number(name: str, default: float | None, text: str, low: float, high: float) -> None:
  flags.DEFINE(_Number(low, high), name, default, text)


def _define_path(name: str, default: str | None, text: str) -> None:
  flags.DEFINE(_Path(), name, default, text)


def _define_flags() -> None:
  _define_path("mixture", None, "YAML with the datasets to read")
  _define_path("out", None, "folder to write; the same command continues one that is incomplete")
  _define_path(
    "verify",
    None,
    "instead: read everything in this folder again, and compare it with its manifest",
  )
  _define_path("inspect", None, "instead: show what is in this folder, and draw a contact sheet")
  _define_path("root", ".", "where relative paths of the mixture start")
  _define_number(
    "subset", 1.0, "share of each annotation file's selection; 0.25 in the release", 0.0, 1.0
  )
  _define_number(
    "image_size",
    None,
    "pixels, square: of the checkpoint's tower; default: as --checkpoint was tuned, else 448",
    1,
    store.PIXELS[-1],
  )
  _define_number("max_frames", 1024, "frames of a video, at most", 1, 1_000_000)
  _define_number("min_frames", 128, "frames of a video, if it has as many", 1, 1_000_000)
  _define_number("fps", 8.0, "frames per second, at most", 0.001, video.FASTEST)
  _define_number(
    "clip_frames",
    None,
    "frames that the tower sees together; default: as --checkpoint was tuned, else 8",
    1,
    store.FRAMES[-1],
  )
  flags.DEFINE_enum("frames", "raw", ["raw", "jpeg"], "how frames are stored")
  _define_number("quality", 95, "of JPEG", 1, 100)
  flags.DEFINE_bool(
    "features",
    False,
    "store the merged tokens of the tower of --checkpoint (bfloat16) instead of frames",
  )
  _define_path(
    "checkpoint",
    None,
    "with --features: directory, hub id, or export; with --inspect: whose tokenizer",
  )
  _define_number(
    "clips_per_chunk",
    None,
    "with --features: clips in the tower at once; default: by the device's memory",
    1,
    1_000_000,
  )
  flags.DEFINE_enum(
    "attention",
    "auto",
    get_args(Attention),
    "with --features: which implementation; auto: by the device",
  )
  flags.DEFINE_enum(
    "dtype",
    None,
    get_args(Dtype),
    "with --features: what the tower computes in; default: bfloat16, but float16 on GPUs that have "
    "none, and float32 on CPUs",
  )
  _define_number(
    "workers",
    os.cpu_count(),
    "decoding processes; 0: none beside this one, and no time limit",
    0,
    10_000,
  )
  _define_number(
    "timeout", 600.0, "seconds for decoding one annotation, which then is bad", 0.001, 1e6
  )
  _define_number(
    "samples_per_shard",
    None,
    f"annotations in one file of clips; default: as in the unfinished work that is there, else "
    f"{PER_SHARD}",
    1,
    1_000_000,
  )
  flags.DEFINE_bool(
    "skip_bad", False, "leave out what can't be used, and list it in manifest.jsonl"
  )
  flags.DEFINE_enum(
    "rate",
    "own",
    get_args(video.Rate),
    "where frames have no constant rate: own: they have their own times; average: they lie as far "
    "apart as the average rate says, as in the release",
  )
  flags.DEFINE_bool(
    "keep_tails",
    False,
    "take what can be read of videos that are cut off, instead of leaving them out",
  )
  flags.DEFINE_bool("restart", False, "throw away what a run that was stopped has done")
  flags.DEFINE_string(
    "beam",
    None,
    'options of a Beam pipeline that decodes: "--runner=DirectRunner --direct_num_workers=2"',
  )
  _define_path(
    "sheet", None, "with --inspect: the contact sheet; default: the folder's name with .png"
  )
  _define_number("prompts", 3, "with --inspect: prompts to show", 0, 1_000_000)
  flags.DEFINE_enum(
    "mask", "official", ["official", "assistant"], "with --inspect: which tokens are supervised"
  )


def _tuned(checkpoint: str) -> tuple[int | None, int | None]:
  """Image size and clip length that a checkpoint was tuned with, as far as it says."""
  from xcomp_jax.checkpoints.finding import resolve
  from xcomp_jax.checkpoints.tuned import read_tuned  # brings jax

  tuned = read_tuned(resolve(checkpoint, whole=False))
  return (tuned.image_size, tuned.clip_frames) if tuned else (None, None)


def _make(f) -> None:
  missing = [name for name in ("mixture", "out") if getattr(f, name) is None]
  if missing:
    raise ValueError(
      f"--{missing[0]} is missing; give --mixture M.yaml --out DIR, or --verify DIR, or --inspect "
      f"DIR"
    )
  if f.features and (f.checkpoint is None or f.frames != "raw" or f.beam is not None):
    raise ValueError(
      "--features needs --checkpoint DIR, and goes neither with --frames jpeg nor with --beam"
    )
  if f.attention != "auto" and not f.features:
    raise ValueError("--attention goes with --features")
  if f.dtype is not None and not f.features:
    raise ValueError("--dtype goes with --features")
  size, clip = _tuned(f.checkpoint) if f.features else (None, None)
  settings = FrameSettings(
    f.image_size or size or 448,
    f.max_frames,
    f.min_frames,
    f.fps,
    f.clip_frames or clip or 8,
    f.rate,
    f.keep_tails,
  )
  tower = (
    load_tower(f.checkpoint, settings, f.clips_per_chunk, f.attention, f.dtype)
    if f.features
    else None
  )
  if tower:
    print(tower.about, file=sys.stderr)
  info = predecode(
    f.mixture,
    f.out,
    settings,
    root=f.root,
    subset=f.subset,
    workers=f.workers,
    samples_per_shard=f.samples_per_shard,
    skip_bad=f.skip_bad,
    quality=f.quality if f.frames == "jpeg" else None,
    tower=tower,
    timeout=f.timeout,
    restart=f.restart,
    beam=None if f.beam is None else shlex.split(f.beam),
  )
  passed = collections.Counter()
  for file in info["annotation_files"]:
    passed.update(file.get("passed_over", {}))  # not of an earlier version
  print(
    f"{f.out}: {info['samples']} samples, {info['frames']} frames, {info['skipped']} "
    f"skipped{_passed_over(passed.elements())}"
  )


def main(argv: Sequence[str]) -> None:
  """The command; an error is one line on stderr (and a list of what is bad), exit code 1."""
  f = flags.FLAGS
  logging.set_verbosity(logging.WARNING)  # TFDS tells which files it opens
  again = "interrupted" + ("" if f.out is None else "; the same command continues")
  with command(interrupted=again):
    if argv[1:]:
      raise ValueError(f"unexpected argument {argv[1]!r}; everything is given by flags, see --help")
    modes = [name for name in ("out", "verify", "inspect") if getattr(f, name) is not None]
    if len(modes) > 1:
      raise ValueError(f"--{modes[0]} and --{modes[1]} exclude each other")
    if f.verify is None and f.inspect is None:
      _make(f)
      return
    from xcomp_jax.data import inspection  # brings jax

    if f.verify is not None:
      inspection.verify(f.verify)
    else:
      sheet = f.sheet or f"{f.inspect.rstrip('/')}.png"
      apart({"--sheet": sheet}, {"--inspect": f.inspect, "--checkpoint": f.checkpoint}, nested=True)
      inspection.inspect(f.inspect, sheet, f.prompts, f.mask, f.checkpoint)


if __name__ == "__main__":
  _define_flags()  # not on import: those who call `predecode` have flags of their own
  with command():  # absl prints, too
    app.run(main)
