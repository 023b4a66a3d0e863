"""The table of `python -m xcomp_jax.plan --fits`: which card holds which model for which job.

Memory is the compiler's: of the whole model for a gradient step, whose memory grows with every
layer, else of two layers and extrapolated (`accounts.memory_of`). Cards of one compute capability
share a cell, which is a file of its own, so that the command goes on where it was.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from xcomp_jax import files, inputs
from xcomp_jax.config import ConfigError, Dtype, RunConfig
from xcomp_jax.inference import rounds
from xcomp_jax.model import kernels
from xcomp_jax.parallel import chips
from xcomp_jax.plan import accounts, programs

CARDS = ("h100", "h200", "b200", "a100-40", "a100-80", "l4", "a10g", "rtx4090", "t4")
MODELS = {
  "2B": "OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448",
  "7B": "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448",
}
# frames sampled, of which KEPT are kept
ASK = {
  "ask 256": 256,
  "ask 1,024": 1024,
  "ask 4,096": 4096,
}
WHOLE = "ask 4,096, all kept"  # --select 0
# a sample of 1,024 frames and 512 tokens on each card
FEATURES, FRAMES = (
  "SCT on features",
  "SCT on frames",
)
# programs; training on frames has both
TUNE = {
  FEATURES: ("gradient", "apply"),
  FRAMES: ("tower",),
}
JOBS = (*ASK, WHOLE, *TUNE)
COUNTS = (1, 2, 4, 8, 16, 32)  # cards that share a run's state
# of a card's memory that JAX may have: its own choice, and one that leaves CUDA enough
SHARES = (
  0.75,
  0.9,
)
KEPT = rounds.USUAL.frames
LAYERS = 2  # compiled of all programs but the gradient step


def note(text: str) -> None:
  """Says what is being done, on stderr."""
  print(text, file=sys.stderr, flush=True)


def key(capability: tuple[int, int], model: str, job: str) -> str:
  """Gives the name of a cell's file."""
  return f"{capability[0]}.{capability[1]} {model} {job}".replace(",", "").replace(" ", "_")


def cell_stamp(config: RunConfig) -> str:
  """Gives all that a cell depends on beside its name; a cell with another stamp is made again."""
  return repr(
    (
      config.model,
      config.lp_comp,
      config.optim,
      config.train,
      config.mesh,
      config.data.prefix_length,
      MODELS,
      KEPT,
      LAYERS,
      programs.TOKENS,
      rounds.TEXT,
      jax.__version__,
      kernels.library(),
    )
  )


def computed_in(capability: tuple[int, int], job: str) -> Dtype:
  """What a card takes for a job where nobody says."""
  return kernels.compute_dtype(kernels.Card("gpu", "", capability), gradient=job in TUNE)


def make_cell(
  config: RunConfig, capability: tuple[int, int], model: str, job: str
) -> dict[str, Any]:
  """Compiles a cell's programs for one card of a run, and gives the bytes of each by kind, under
  "programs".
  """
  jax.config.update("jax_platforms", "cpu")  # a card that is here is left alone
  about = cell_stamp(config)
  chip = next(chip for name in CARDS if (chip := chips.named(name)).capability == capability)
  dtype = computed_in(capability, job)
  count = 8 if job in TUNE else 1
  config = dataclasses.replace(
    config,
    init_from=MODELS[model],
    model=dataclasses.replace(config.model, dtype=dtype),
    train=dataclasses.replace(config.train, batch_size=count),
  )
  frames = {**ASK, WHOLE: 4096}.get(job, 1024)
  held, kept, clips = {}, 0.0, 0
  for name in _programs(job, frames):
    plan = programs.make(
      config,
      f"{chip.name}:{count}",
      layers=None if name == "gradient" else LAYERS,
      frames=min(frames, KEPT) if job in ASK and name in ("prefill", "decode") else frames,
      text=programs.TOKENS if job in TUNE else rounds.TEXT,
    )
    clips = plan.full.clips_per_chunk
    ((_, shape),) = programs.asked_programs(plan, (name,))
    held[name] = accounts.memory_of(plan, name, shape) | {"rounds": kept}
    if name == "round":  # what they leave stays for the next question
      of, rows = rounds.usual(plan.full, frames)
      kept = held[name]["results"] * -(-len(of.starts) // rows)
  return {
    "stamp": about,
    "capability": capability,
    "model": model,
    "job": job,
    "dtype": dtype,
    "cards": count,
    "clips": clips,
    "programs": held,
  }


def _programs(job: str, frames: int) -> Sequence[str]:
  if job in TUNE:
    return TUNE[job]
  scored = ("round", "question") if job in ASK and frames > KEPT else ()
  return ("encode", *scored, "prefill", "decode")


Cell = tuple[tuple[int, int], str, str]  # compute capability, model, job


def made_cells(config: RunConfig, cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
  """Makes cells, those of each architecture in a process of their own: it can compile for one only
  (see `absent`).

  Raises:
    ConfigError: a compiler died.
  """
  for capability in dict.fromkeys(cell[0] for cell in cells):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
      for cell in (cell for cell in cells if cell[0] == capability):
        try:
          yield cell, pool.submit(make_cell, config, *cell).result()
        except concurrent.futures.BrokenExecutor as error:
          raise ConfigError(
            f"--fits: compiling {key(*cell)} died, probably for memory; the same command goes on",
            where="--fits",
            value=key(*cell),
          ) from error


def fits_table(
  config: RunConfig,
  out: pathlib.Path,
  cards: Sequence[str] = CARDS,
  make: Callable[..., Iterator[tuple[Cell, dict[str, Any]]]] = made_cells,
) -> str:
  """Makes the cells that are not in `out` yet, or were made by another config or version of JAX,
  and the table of all.

  Raises:
    ConfigError: there is no GPU compiler, `out` is no folder, or a compiler died.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    files.sweep(out)
  except (FileExistsError, NotADirectoryError) as error:
    raise ConfigError(
      f"--fits {out}: this is, or lies in, a file; give a folder that keeps the cells",
      where="--fits",
      value=str(out),
    ) from error
  found = [chips.named(name) for name in cards]
  kinds = [chip.capability for chip in found if chip.capability]
  wanted = [(kind, model, job) for kind in kinds for model in MODELS for job in JOBS]
  stored = {cell: out / f"{key(*cell)}.json" for cell in dict.fromkeys(wanted)}
  read = {cell: whole for cell, file in stored.items() if (whole := _read(file, config, cell))}
  missing = [cell for cell in stored if cell not in read]
  if stale := sum(stored[cell].exists() for cell in missing):
    note(
      f"{stale} cells in {out} are damaged, or of another config or version of JAX or tokamax: "
      f"made again"
    )
  begun = time.perf_counter()
  for cell, result in make(config, missing):
    files.write_file(stored[cell], json.dumps(result, indent=1))
    read[cell] = result
    ended = time.perf_counter()
    note(f"{len(read)} of {len(stored)} cells: {stored[cell].stem}, {ended - begun:.0f} s")
    begun = ended
  lines: list[tuple[str, ...]] = [("card", "GB", "model", "dtype", "clips", *JOBS)]
  lines += [_line(chip, model, read) for chip in found for model in MODELS]
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join(
    ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines]
    + ["", LEGEND]
  )


def _line(chip: chips.Chip, model: str, cells: Mapping[Any, Mapping[str, Any]]) -> tuple[str, ...]:
  """The words of a card and a model."""
  parts = dict.fromkeys(JOBS, ()) | {FRAMES: (FEATURES,)}  # beside a job's own cell
  row = [[cells[chip.capability, model, one] for one in (*parts[job], job)] for job in JOBS]
  dtypes = "/".join(dict.fromkeys(cell["dtype"] for some in row for cell in some))
  of = (chip.name, f"{chip.memory / 1e9:.0f}", model, dtypes, str(row[0][0]["clips"]))
  return *of, *(verdict(chip, some) for some in row)


def _read(file: pathlib.Path, config: RunConfig, cell: Cell) -> dict[str, Any] | None:
  """Reads a cell; None if it is damaged, or was made in another dtype or of another config."""
  capability, _, job = cell
  try:
    whole = inputs.read_json(file, ValueError, inputs.ABOUT)
    wanted = (cell_stamp(config), computed_in(capability, job))
    return whole if (whole["stamp"], whole["dtype"]) == wanted and whole["programs"] else None
  except (OSError, ValueError, TypeError, KeyError):
    return None


def bytes_per_card(cell: Mapping[str, Any], count: int) -> float:
  """Gives the bytes that one of `count` cards needs: those of the program that needs most.

  The cards share the parts of `STATE` and the temporaries of the optimizer's step; all else each
  card has for itself.
  """
  sizes = []
  for name, memory in cell["programs"].items():
    shared = sum(
      size
      for kind, size in memory.items()
      if kind in programs.STATE or (name == "apply" and kind == "temporaries")
    )
    sizes.append(sum(memory.values()) + shared * (cell["cards"] / count - 1))
  return max(sizes)


def verdict(chip: chips.Chip, cells: Sequence[Mapping[str, Any]]) -> str:
  """Says whether a job of these cells fits, in how many GB, on how many cards, and with how much of
  the memory for JAX.
  """
  counts = COUNTS if cells[0]["job"] in TUNE else (1,)
  sizes = {count: max(bytes_per_card(cell, count) for cell in cells) for count in counts}
  for count, size in sizes.items():
    for share in SHARES:
      if size <= share * chip.memory:
        several = f"{count} cards, " if count > 1 else ""
        return f"{several}{size / 1e9:.1f} GB{'*' if share != SHARES[0] else ''}"
  several = f" on each of {counts[-1]} cards" if counts[-1] > 1 else ""
  return f"no: {sizes[counts[-1]] / 1e9:.1f} GB{several}"


LEGEND = """clips: in the tower at once (clips_per_chunk = "auto"). ask: frames sampled, of which QC-Comp keeps 512 ("all kept": --select 0), 448 px.
SCT: state over as many cards as it takes, a sample of 1,024 frames and 512 tokens on each; the number of cards is the least that is enough.
Two dtypes: of asking and of SCT.
*: with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9; without, JAX takes 75% of the memory
no: remedies when asking are --clips-per-chunk 1, --forget-rounds, --select 256 and fewer frames; when tuning features instead of frames,
  shorter samples (predecode --max-frames), a smaller model"""  # noqa: E501
