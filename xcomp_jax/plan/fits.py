"""The table of `python -m xcomp_jax.plan --fits`: which card holds which model for which job.

Memory is the compiler's: of the whole model for a gradient step, whose memory grows with every
layer, else of two layers and extrapolated (`accounts.memory_of`). Cards of one compute capability
share a cell, which is a file of its own, so that the command goes on where it was.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import json
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from xcomp_jax import files, inputs
from xcomp_jax.config import ConfigError, Dtype, RunConfig
from xcomp_jax.inference import rounds
from xcomp_jax.model import kernels
from xcomp_jax.parallel import chips
from xcomp_jax.parallel.chips import Chip
from xcomp_jax.plan import accounts, programs

CARDS = ("h100", "h200", "b200", "a100-40", "a100-80", "l4", "a10g", "rtx4090", "t4")
MODELS = {
  "2B": "OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448",
  "7B": "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448",
}
# frames sampled, of which `rounds.USUAL` keeps 512
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
KEPT = 512  # frames
STATE = ("parameters", "gradients", "optimizer state")
LAYERS = 2  # compiled of all programs but the gradient step


def note(text: str) -> None:
  """Says what is being done, on stderr."""
  print(text, file=sys.stderr, flush=True)


def key(capability: tuple[int, int], model: str, job: str) -> str:
  """Gives the name of a cell's file."""
  return f"{capability[0]}.{capability[1]} {model} {job}".replace(",", "").replace(" ", "_")


def cell_stamp(config: RunConfig) -> str:
  """Gives all that a cell depends on beside its name; a cell with another stamp is made again."""
  own = (MODELS, KEPT, LAYERS, programs.TOKENS, rounds.TEXT, jax.__version__, kernels.library())
  return repr(
    (
      config.model,
      config.lp_comp,
      config.optim,
      config.train,
      config.mesh,
      config.data.prefix_length,
      *own,
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
    shown = min(frames, KEPT) if job in ASK and name in ("prefill", "decode") else frames
    layers, text = (
      None if name == "gradient" else LAYERS,
      programs.TOKENS if job in TUNE else rounds.TEXT,
    )
    plan = programs.make(config, f"{chip.name}:{count}", layers=layers, frames=shown, text=text)
    clips = plan.full.clips_per_chunk
    ((_, shape),) = programs.asked_programs(plan, (name,))
    held[name] = accounts.memory_of(plan, name, shape) | {"rounds": kept}
    if name == "round":  # what they leave stays for the next question
      of, rows = rounds.usual(plan.full, frames)
      kept = held[name]["results"] * -(-len(of.starts) // rows)
  words = {
    "stamp": about,
    "capability": capability,
    "model": model,
    "job": job,
    "dtype": dtype,
    "cards": count,
    "clips": clips,
  }
  return words | {"programs": held}


def _programs(job: str, frames: int) -> Sequence[str]:
  if job in TUNE:
    return TUNE[job]
  scored = ("round", "question") if job in ASK and frames > KEPT else ()
  return ("encode", *scored, "prefill", "decode")


def fits_table(config: RunConfig, out: pathlib.Path, cards: Sequence[str] = CARDS) -> str:
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
      f"--fits {out}: this is, or lies in, a file; give a folder that keeps the cells"
    ) from error
  found = [chips.named(name) for name in cards]
  wanted = [
    (chip.capability, model, job)
    for chip in found
    for model in MODELS
    for job in JOBS
    if chip.capability
  ]
  cells = {cell: out / f"{key(*cell)}.json" for cell in dict.fromkeys(wanted)}
  about = cell_stamp(config)
  read = {
    cell: whole
    for cell, file in cells.items()
    if (whole := _read(file, about)) and whole.get("dtype") == computed_in(cell[0], cell[2])
  }
  missing = [cell for cell in cells if cell not in read]
  if stale := sum(cells[cell].exists() for cell in missing):
    note(
      f"{stale} cells in {out} are damaged, or of another config or version of JAX or tokamax: "
      f"made again"
    )
  for capability in dict.fromkeys(cell[0] for cell in missing):
    # A process can compile for one architecture only; see `absent`.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
      for cell in (cell for cell in missing if cell[0] == capability):
        begun = time.perf_counter()
        try:
          result = pool.submit(make_cell, config, *cell).result()
        except concurrent.futures.process.BrokenProcessPool as error:
          raise ConfigError(
            f"--fits: compiling {cells[cell].stem} died, probably for memory; the same command "
            f"goes on"
          ) from error
        with files.replacing(cells[cell]) as temporary:
          temporary.write_text(json.dumps(result, indent=1))
        read[cell] = result
        note(
          f"{len(read)} of {len(cells)} cells: {cells[cell].stem}, "
          f"{time.perf_counter() - begun:.0f} s"
        )
  lines = [("card", "GB", "model", "dtype", "clips", *JOBS)]
  for chip in found:
    for model in MODELS:
      assert chip.capability is not None  # see `wanted`
      row = [
        [
          read[chip.capability, model, one]
          for one in ((FEATURES, FRAMES) if job == FRAMES else (job,))
        ]
        for job in JOBS
      ]
      first = row[0][0]
      dtypes = dict.fromkeys(cell["dtype"] for cells in row for cell in cells)
      of = (chip.name, f"{chip.memory / 1e9:.0f}", model, "/".join(dtypes), str(first["clips"]))
      lines.append((*of, *(verdict(chip, one) for one in row)))
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join(
    ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines]
    + ["", LEGEND]
  )


def _read(file: pathlib.Path, about: str) -> dict[str, Any] | None:
  """Reads a cell; None if it is damaged or has another stamp."""
  try:
    cell = inputs.read_json(file, ValueError, inputs.ABOUT)
    return cell if cell["stamp"] == about and cell["programs"] else None
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
      if kind in STATE or (name == "apply" and kind == "temporaries")
    )
    sizes.append(sum(memory.values()) + shared * (cell["cards"] / count - 1))
  return max(sizes)


def verdict(chip: Chip, cells: Sequence[Mapping[str, Any]]) -> str:
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
