"""The table of `python -m xcomp_jax.plan --lengths FILE`: what a run computes and takes at least on
so many devices.
"""

import dataclasses
import math
import pathlib

import numpy as np

from xcomp_jax import inputs
from xcomp_jax.config import ConfigError, RunConfig, VLMConfig, check_run, check_trained
from xcomp_jax.data import blend, packing
from xcomp_jax.data.batch import Shape
from xcomp_jax.parallel.mesh import AXES
from xcomp_jax.progress import progress
from xcomp_jax.training import forecast

MOST = 100_000  # frames or tokens of a sample
PREFIX = 14  # tokens of the chat header


def read_lengths(file: pathlib.Path, cfg: VLMConfig) -> np.ndarray:
  """Reads {"frames": [...], "text": [...]}, a number per sample; 1 frame is an image, 0 text alone.

  Returns:
    int64[n, 4], columns as `Length`; text is what follows the visual slot, and PREFIX tokens come
    before it.

  Raises:
    ConfigError: a file that is not so.
  """
  found = inputs.read_json(file, ConfigError)
  frames, text = (found.get(key) if isinstance(found, dict) else None for key in ("frames", "text"))
  if not (isinstance(frames, list) and isinstance(text, list) and frames and text):
    raise ConfigError(
      f'{file}: expected {{"frames": [...], "text": [...]}}, each with a number per sample',
      where=str(file),
      expected=("frames", "text"),
    )
  if len(frames) != len(text):
    raise ConfigError(
      f"{file}: {len(frames):,} numbers in frames, but {len(text):,} in text",
      where=str(file),
      frames=len(frames),
      text=len(text),
    )
  problems = []
  for i, (f, t) in enumerate(zip(frames, text)):
    if type(f) is not int or not 0 <= f <= MOST or (f > 1 and f % cfg.clip_frames):
      problems.append(f"frames[{i}] = {f!r}")
    if type(t) is not int or not 1 <= t <= MOST:
      problems.append(f"text[{i}] = {t!r}")
  packing.refuse(
    f"{file}: frames must be 0 (text alone), 1 (an image), or a multiple of the {cfg.clip_frames} "
    f"frames of a clip, text whole numbers from 1, both at most {MOST:,}",
    problems,
  )
  f = np.array(frames)
  before = np.where(f > 0, PREFIX, 0)
  each = np.where(f > 1, cfg.clip_frames, 1)
  return np.stack([f, each, before, np.array(text) + PREFIX - before], 1)


def run_table(
  config: RunConfig, cfg: VLMConfig, lengths: packing.Lengths, devices: str, chip: str
) -> str:
  """Makes the table of a run on these samples.

  A step has a sample for each device, if the config has fewer and there are as many.

  Args:
    config: of the run.
    cfg: sizes of the model.
    lengths: of the samples.
    devices: numbers of them, such as "1,8,32"; a pair of lines for each.
    chip: their kind, such as "v5e" or "h100".

  Raises:
    ConfigError: see `forecast.schedule_run`; arguments that can't be; fewer samples than a step
      has.
  """
  check_run(config)
  check_trained(config.model)
  counts = [int(n) if n.strip().isdecimal() else 0 for n in devices.split(",")]
  if min(counts) < 1:
    raise ConfigError(
      f"--devices {devices}: must be numbers of devices from 1 on, such as 1,8,32",
      where="--devices",
      value=devices,
    )
  forecast.chips(chip, 1)  # refuses unknown ones
  rows, notes, refused = [], [], []
  for count in progress(counts, desc="planning", unit="mesh", leave=False):
    size = max(config.train.batch_size, count if count <= len(lengths) else 0)
    some = dataclasses.replace(config.train, batch_size=size)
    order = blend.order(range(len(lengths)), size, config.seed, 0)  # refuses too few
    try:
      plan = forecast.schedule_run(
        dataclasses.replace(config, train=some), cfg, lengths, forecast.chips(chip, count)
      )
    except ConfigError as error:
      refused.append(error)
      notes.append(f"{count} x {chip}: {error}")
      continue
    steps = packing.pack_steps(lengths, order, plan.shapes, plan.costs)
    total = min(len(steps) * some.epochs, some.steps or math.inf)
    used = sorted({micro.shape for micros in steps for micro in micros})
    notes.append(f"{count} x {chip}: " + ", ".join(map(_shape, used)))
    fits = "yes"
    try:
      forecast.check_memory(plan)
    except ConfigError as error:
      fits = "no"
      notes.append(f"  DOES NOT FIT: {error}")
    for pixels in (True, False):
      a = forecast.account(plan, steps, lengths, pixels)
      hours = a.step * total / 3600
      mesh = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, a.mesh) if size > 1)
      rows.append(
        {
          "devices": f"{count}",
          "batch": f"{a.batch_size}",
          "mesh": mesh or "1",
          "data": "frames" if pixels else "features",
          "micro-batches": f"{a.micro_batches:.2f}",
          "tower": f"{a.tower:.3f}" if pixels else "-",
          "LLM": f"{a.llm:.3f}",
          "all": f"{a.all:.3f}",
          "programs": f"{a.programs}",
          "s a step": f"{a.step:.3f}",
          "of real work": f"{a.step / a.alone:.2f} x",
          "and links": f"{a.step / a.linked:.2f} x",
          "bound by": a.bound,
          "steps": f"{total:,}",
          "hours": f"{hours:.2f}",
          "chip-hours": f"{hours * count:,.1f}",
          "fits": fits,
        }
      )
  if not rows:
    raise refused[-1]
  widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
  return "\n".join(
    [
      "  ".join(column.rjust(width) for column, width in widths.items()),
      *("  ".join(row[column].rjust(width) for column, width in widths.items()) for row in rows),
      "",
      "shapes: rows x (samples, frames, text tokens); a row is split over `context`",
      *notes,
      "",
      LEGEND,
    ]
  )


LEGEND = """batch: config.train.batch_size, or a sample for each device if that is more (training has what the config says)
tower, LLM, all: share of the executed operations that is on real tokens
of real work: the predicted time over that of real operations at the peak; and links: over that of real operations and
  the links of one micro-batch
hours: what the whole run takes at least, if devices do what their data sheets say
fits: no if trained state and a micro-batch are too much for a device, by formula; --topology has the compiler count all"""  # noqa: E501


def _shape(shape: Shape) -> str:
  return f"{shape.rows} x ({shape.samples}, {shape.frames:,}, {shape.text:,})"
