"""Draws the figures of "How it works", from the package's own functions: PYTHONPATH=.
.venv/bin/python docs/figures.py

The figures are committed; draw them again when what they show has changed. The same code draws the
same bytes.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from xcomp_jax.config import Keep, LPCompConfig, VisionConfig
from xcomp_jax.model import lp_comp, qc_comp
from xcomp_jax.viz import plots
from xcomp_jax.viz.plots import BLUE, GREY, LIGHT, ORANGE, STYLE

OUT = pathlib.Path(__file__).parent / "figures"
LAYERS = qc_comp.DEPTH  # of the released LLMs
# frames of a clip, tokens of a group, tokens of a frame after merging
CLIP, GROUP, PER_FRAME = (
  8,
  16,
  16,
)


def save(figure, name: str) -> None:
  """Writes figures/name.svg, without a date."""
  OUT.mkdir(exist_ok=True)
  figure.savefig(
    OUT / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight", facecolor="white", dpi=160
  )
  plt.close(figure)


def schedule(name: str = "cosine", keep: Keep = "suffix") -> tuple[int, ...]:
  """Tokens per group in each layer."""
  return lp_comp.counts(LPCompConfig(name, keep, GROUP), LAYERS)


def overview() -> None:
  """A clip on its way: what every stage makes of its tokens."""
  tower = VisionConfig(  # FACTS.md 7
    image_size=448, patch_size=16, width=1024, layers=23, heads=16, mlp_width=4096, table="umt-hd"
  )
  tokens, merged, counts = tower.tokens(CLIP), CLIP * PER_FRAME, schedule()
  figure, axes = plt.subplots(figsize=(10, 1.9))
  axes.set(xlim=(0, 100), ylim=(5.5, 25))
  axes.axis("off")
  stages = [
    ("a clip", f"{CLIP} frames of\n448 x 448", "1,024 frames are\n128 clips"),
    ("tower (frozen)", f"UMT-L\n{tokens:,} tokens", f"{CLIP} x {tower.patches} patches"),
    ("merge", f"ToMe\n{merged} tokens", "the most similar\npairs become one"),
    ("project", f"MLP\n{merged} tokens", f"{merged // GROUP} groups of {GROUP}"),
  ]
  for i, (title, inside, below) in enumerate(stages):
    x = i * 14.5
    axes.add_patch(
      FancyBboxPatch(
        (x + 0.5, 11), 11, 9, boxstyle="round,pad=0,rounding_size=1", fc=LIGHT, ec=GREY
      )
    )
    axes.text(x + 6, 15.5, inside, ha="center", va="center", fontsize=8.5)
    axes.text(x + 6, 22, title, ha="center", weight="bold")
    axes.text(x + 6, 9.5, below, ha="center", va="top", fontsize=8, color="#555b63")
    axes.annotate(
      "", (x + 14.7, 15.5), (x + 11.8, 15.5), arrowprops={"arrowstyle": "->", "color": GREY}
    )
  first, width = 59.5, 30 / LAYERS
  for i, n in enumerate(counts):
    axes.add_patch(
      plt.Rectangle((first + i * width, 15.5 - n * 0.28), width * 0.75, n * 0.56, color=BLUE)
    )
  axes.text(first + 15, 22, f"LLM: {LAYERS} layers with LP-Comp", ha="center", weight="bold")
  axes.text(
    first + 15,
    9.5,
    f"{merged} tokens of the clip in the first layers,\n{merged // GROUP * counts[-1]} in the "
    f"last: one per frame",
    ha="center",
    va="top",
    fontsize=8,
    color="#555b63",
  )
  axes.annotate(
    "answer",
    (90, 15.5),
    (93.5, 15.5),
    arrowprops={"arrowstyle": "<-", "color": GREY},
    va="center",
    fontsize=9,
  )
  save(figure, "overview")


def schedules() -> None:
  """Tokens per group and layer: as released, and by the paper's formula."""
  names = {"cosine, as released": "cosine", "cosine_ceil, the paper's Eq. 1": "cosine_ceil"}
  save(
    plots.draw_schedules(
      {name: LPCompConfig(kind, "suffix", GROUP) for name, kind in names.items()}, LAYERS
    ),
    "schedule",
  )


def survivors() -> None:
  """Which tokens of a group each layer works on, by keep rule."""
  save(
    plots.draw_survivors(
      [LPCompConfig("cosine", rule, GROUP) for rule in ("suffix", "uniform", "stride")], LAYERS
    ),
    "survivors",
  )


def windows() -> None:
  """The rounds of 1,024 frames in each mode, and the windows of the first ones."""
  frames = 1024
  modes = ("official", "aligned", "local", "global")
  plans = {
    mode: qc_comp.plan_rounds(frames, CLIP, qc_comp.select_config(mode, 512)) for mode in modes
  }
  figure, axes = plt.subplots(
    len(modes),
    1,
    figsize=(9, 6.6),
    sharex=True,
    gridspec_kw={
      "height_ratios": [max(3.0, min(len(plan.starts), 9)) for plan in plans.values()],
      "hspace": 0.55,
    },
  )
  for ax, (mode, plan) in zip(axes, plans.items(), strict=True):
    shown = min(len(plan.starts), 9)
    for row, start in enumerate(plan.starts[:shown]):
      for part, length in wrapped(int(start), plan.frames, frames):
        ax.broken_barh([(part, length)], (row + 0.1, 0.8), color=LIGHT)
      for i, units in enumerate(plan.windows):
        begin = (int(start) + int(units[0]) * plan.unit) % frames
        for part, length in wrapped(begin, len(units) * plan.unit, frames):
          # Windows overlap: every other one is drawn higher.
          low = 0.35 if len(plan.windows) == 1 else 0.16 if i % 2 else 0.52
          ax.broken_barh(
            [(part, length)], (row + low, 0.3), color=(BLUE, ORANGE)[i % 2], ec="white", lw=0.6
          )
    count = f"{len(plan.starts)} rounds of {plan.frames} frames" + (
      f", the first {shown} shown" if shown < len(plan.starts) else ""
    )
    each = (
      "1 window each"
      if len(plan.windows) == 1
      else f"{len(plan.windows)} windows of {plan.windows.shape[1] * plan.unit} frames each"
    )
    ax.set_title(f"{mode}: {count}, {each}", loc="left", fontsize=10)
    ax.set(ylim=(shown, 0), xlim=(0, frames), yticks=[], xticks=range(0, frames + 1, 128))
    ax.spines["left"].set_visible(False)
  axes[-1].set_xlabel("sampled frame")
  save(figure, "windows")


def wrapped(start: int, length: int, frames: int) -> list[tuple[int, int]]:
  """A run of frames that goes on at the first one past the last: (start, length) of its parts."""
  first = min(length, frames - start)
  return [(start, first)] + ([(0, length - first)] if first < length else [])


def tuning() -> None:
  """What SCT gives back, by `make demo` (docs/LOG.md, 2026-11-22): answers that were right, of
  400.
  """
  right = {"no compression": 356, "LP-Comp,\nnot trained": 268, "LP-Comp\nafter SCT": 313}
  save(plots.draw_bars(right, 400, 0.25), "tuning")


if __name__ == "__main__":
  with plt.rc_context(STYLE), plt.rc_context({"svg.hashsalt": "xcomp_jax"}):
    for one in (overview, schedules, survivors, windows, tuning):
      one()
