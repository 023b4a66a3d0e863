"""Pictures of what the package computes, for notebooks and the documentation; every function
returns a figure of matplotlib.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from jaxtyping import Float, Int, UInt8
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure

from xcomp_jax.config import LPCompConfig
from xcomp_jax.data.video import resize
from xcomp_jax.inference.pictures import BLUE, INK, ORANGE
from xcomp_jax.model import lp_comp

GREY, LIGHT = "#8a8f98", "#dfe5ea"
STYLE: Any = {  # the types of matplotlib want every key by name
  "font.size": 10,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": GREY,
}
WINDOW = 20  # steps whose mean loss is drawn
FRAME = 168  # pixels of a frame with its patches, about
_COLOURS = matplotlib.color_sequences["tab10"]


# --- LP-Comp
# ----------------------------------------------------------------------------------------


def draw_schedules(settings: Mapping[str, LPCompConfig], layers: int) -> Figure:
  """Tokens of a group in each layer: bars for the first setting, lines for the others."""
  figure, ax = plt.subplots(figsize=(8, 3.1))
  x, group = np.arange(layers), max(cfg.group for cfg in settings.values())
  for i, (name, cfg) in enumerate(settings.items()):
    n = lp_comp.counts(cfg, layers)
    label = f"{name}: mean {np.mean(n):.2f}"
    if i:
      ax.step(
        np.append(x - 0.5, layers - 0.5),
        np.append(n, n[-1]),
        where="post",
        color=(ORANGE, INK, GREY)[(i - 1) % 3],
        lw=1.8,
        label=label,
      )
      continue
    ax.bar(x, n, color=BLUE, width=0.8, label=label)
    for layer, count in zip(x, n, strict=True):
      ax.text(
        float(layer),
        count - 0.25,
        str(count),
        ha="center",
        va="top",
        color="white",
        fontsize=7.5,
        weight="bold",
      )
  ax.set(
    xlabel="layer",
    ylabel=f"tokens of a group of {group}",
    xticks=x[:: max(1, layers // 9)],
    yticks=range(0, group + 1, 4),
  )
  ax.legend(frameon=False, loc="upper right")
  return figure


def draw_survivors(settings: Sequence[LPCompConfig], layers: int) -> Figure:
  """Which tokens of a group each layer works on."""
  figure, axes = plt.subplots(1, len(settings), figsize=(10, 3.6), sharey=True, squeeze=False)
  step = max(1, layers // 3)
  for ax, cfg in zip(axes[0], settings, strict=True):
    places = np.arange(cfg.group)
    ax.pcolormesh(
      [np.isin(places, kept).astype(float) for kept in lp_comp.survivors(cfg, layers)],
      cmap=ListedColormap([LIGHT, BLUE]),
      edgecolors="white",
      linewidth=0.6,
      rasterized=True,
    )
    ax.set(
      title=f'keep = "{cfg.keep}"',
      xlabel="token of the group",
      ylim=(layers, 0),
      xticks=places[::5] + 0.5,
      xticklabels=places[::5],
      yticks=np.arange(0, layers, step) + 0.5,
      yticklabels=range(0, layers, step),
    )
    ax.spines[:].set_visible(False)
  axes[0, 0].set_ylabel("layer")
  return figure


def patch_places(
  frames: UInt8[np.ndarray, "F S S 3"],
  into: Int[np.ndarray, " N"],
  cfg: LPCompConfig,
  layers: int,
  shown: Sequence[int],
) -> Figure:
  """Which patches of a clip the visual tokens of a layer stand for; the others are faded.

  Args:
    frames: the clip.
    into: int32[N], the merged token of each patch (`token_merging.sources`), in order (frame, row,
      column).
    cfg: LP-Comp; a rule that only selects.
    layers: of the LLM.
    shown: a row for each of these layers; in the last row every token has its group's colour.
  """
  F = len(frames)
  grid = round((len(into) // F) ** 0.5)
  scale = max(3, FRAME // grid)
  large = resize(frames, grid * scale).astype(np.float64) / 255

  def enlarge(a):
    return a.reshape(F, grid, grid).repeat(scale, 1).repeat(scale, 2)

  group, place = np.divmod(into, cfg.group)
  kept = lp_comp.survivors(cfg, layers)
  figure, axes = plt.subplots(len(shown), 1, figsize=(10, 1.52 * len(shown)), squeeze=False)
  for ax, layer in zip(axes[:, 0], shown, strict=True):
    alive = np.isin(place, kept[layer])
    faded = 0.9 + 0.1 * large.mean(-1, keepdims=True)
    picture = np.where(enlarge(alive)[..., None], large, faded)
    if layer == shown[-1]:
      tint = np.array(_COLOURS)[enlarge(group) % len(_COLOURS)]
      picture = np.where(enlarge(alive)[..., None], 0.25 * picture + 0.75 * tint, picture)
    token = enlarge(np.where(alive, into, -1))
    # where one token's patches end and another's begin
    below, right = (
      np.diff(token, axis=1, prepend=token[:, :1]),
      np.diff(token, prepend=token[..., :1]),
    )
    picture = np.where(((below != 0) | (right != 0))[..., None], 1.0, picture)
    picture = np.pad(picture, ((0, 0), (0, 0), (0, 8), (0, 0)), constant_values=1.0)
    ax.imshow(np.concatenate(picture, axis=1)[:, :-8], interpolation="nearest")
    ax.set_title(
      f"layer {layer}: {len(kept[layer])} of {cfg.group} tokens of every group, which stand for "
      f"{alive.mean():.0%} of the patches",
      loc="left",
      fontsize=9.5,
      pad=3,
    )
    ax.axis("off")
  figure.tight_layout(pad=0.4)
  return figure


def draw_flow(
  shares: Mapping[str, Float[np.ndarray, "M 2 Q"]], settings: Mapping[str, LPCompConfig]
) -> Figure:
  """Where attention goes in each layer, a column of panels for each model.

  Args:
    shares: of `flow.attention_flow`, by name of the model.
    settings: their LP-Comp, likewise.
  """
  figure, axes = plt.subplots(
    2,
    len(shares),
    figsize=(10, 1.4 + 0.34 * 2 * len(next(iter(shares.values())))),
    squeeze=False,
    sharex=True,
    layout="constrained",
  )
  whose = ("text looks at", "visual tokens that stay to the end look at")
  for column, (name, share) in enumerate(shares.items()):
    kept, group = lp_comp.survivors(settings[name], len(share)), settings[name].group
    gone = np.array(
      [[False, *(place not in alive for place in range(group)), False] for alive in kept]
    )
    for row, words in enumerate(whose):
      ax, cells = axes[row, column], np.ma.array(share[:, row], mask=gone)
      colors = ax.pcolormesh(
        cells, cmap="Blues", norm=PowerNorm(0.5, 0, 1), edgecolors="white", linewidth=0.6
      )
      if len(share) <= 12:
        for layer, place in zip(*np.nonzero(~gone & (share[:, row] >= 0.005)), strict=True):
          value = share[layer, row, place]
          ax.text(
            place + 0.5,
            layer + 0.5,
            f"{100 * value:.0f}",
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if value > 0.35 else INK,
          )
      step = max(1, len(share) // 7)
      ax.set(
        ylim=(len(share), 0),
        yticks=np.arange(0, len(share), step) + 0.5,
        yticklabels=range(0, len(share), step),
        ylabel="" if column else "layer",
        facecolor=LIGHT,
      )
      ax.set_xticks(np.arange(group + 2) + 0.5, ["prefix", *range(group), "text"], fontsize=7.5)
      for label in ax.get_xticklabels()[:1] + ax.get_xticklabels()[-1:]:  # of the lower panel alone
        label.set_rotation(60)
      ax.spines[:].set_visible(False)
      ax.set_title(f"{name}: {words}", fontsize=9.5, loc="left")
    axes[1, column].set_xlabel("token of the group (grey: dropped before this layer)")
  figure.colorbar(
    colors, ax=axes, shrink=0.6, format=lambda v, _: f"{v:.0%}", label="share of attention"
  )
  return figure


def kept_share(
  shares: Mapping[str, Float[np.ndarray, "M 2 Q"]], settings: Mapping[str, LPCompConfig]
) -> Figure:
  """Of the attention that text pays to visual tokens, the share of those that stay to the end;
  arguments of `draw_flow`.

  Dotted: what they would get if all visual tokens of the layer got the same.
  """
  figure, ax = plt.subplots(figsize=(8, 3))
  for i, (name, share) in enumerate(shares.items()):
    kept = lp_comp.survivors(settings[name], len(share))
    paid = share[:, 0, 1 + np.array(kept[-1])].sum(-1) / share[:, 0, 1:-1].sum(-1)
    ax.plot(paid, "o-", color=(ORANGE, BLUE, GREY)[i % 3], label=name, ms=5)
    ax.plot(
      [len(kept[-1]) / len(alive) for alive in kept],
      ":",
      color=GREY,
      lw=1.3,
      label="all visual tokens alike" if i == len(shares) - 1 else None,
    )
  ax.set(
    xlabel="layer",
    ylabel="of the attention\nto visual tokens",
    ylim=(0, 1.03),
    xticks=range(0, len(share), max(1, len(share) // 7)),
  )
  ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
  ax.legend(frameon=False, loc="lower right")
  return figure


def draw_agreement(
  work: Mapping[str, float],
  same: Mapping[str, Sequence[np.ndarray]],
  apart: Mapping[str, Sequence[np.ndarray]],
) -> Figure:
  """How far compression moves the first token of answers, by schedule.

  Args:
    work: mean tokens of a group over the layers, as a share of the group, by name of the schedule.
    same: bool[n] per schedule, whether the most probable token is that without compression; by name
      of the model.
    apart: float[n] per schedule, KL in nats; likewise.
  """
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
  x, order = np.array(list(work.values())), np.argsort(list(work.values()))
  for i, name in enumerate(same):
    color, shift = (ORANGE, BLUE, GREY)[i % 3], 0.004 * (2 * i - len(same) + 1)
    share = np.array([one.mean() for one in same[name]])
    low, high = np.array([_interval(int(one.sum()), len(one)) for one in same[name]]).T
    mean = np.array([one.mean() for one in apart[name]])
    error = np.array([1.96 * one.std(ddof=1) / len(one) ** 0.5 for one in apart[name]])
    around_share = np.maximum([share - low, high - share], 0)
    for ax, y, bars in ((axes[0], share, around_share), (axes[1], mean, np.stack([error, error]))):
      ax.errorbar(
        x[order] + shift,
        y[order],
        yerr=bars[:, order],
        fmt="o-",
        color=color,
        ms=4,
        capsize=3,
        lw=1.3,
        label=name,
      )
  axes[0].set(ylabel="same first token", ylim=(0, 1.03))
  axes[0].yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
  axes[1].set(ylabel="KL, nats", ylim=(0, None))
  for ax in axes:
    ax.set(xlabel="visual tokens per layer, of those without compression", xlim=(0, 1.03))
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    for name, value in work.items():
      ax.axvline(value, color=LIGHT, lw=1, zorder=0)
      ax.text(
        value,
        1.015,
        name,
        transform=ax.get_xaxis_transform(),
        rotation=50,
        fontsize=8,
        ha="left",
        va="bottom",
        color=INK,
      )
  axes[1].legend(frameon=False)
  return figure


# --- questions
# ----------------------------------------------------------------------------------------


def learning(
  losses: Sequence[tuple[int, float]],
  right: Sequence[tuple[int, float]],
  asked: int,
  chance: float,
) -> Figure:
  """A run: the loss of every step with its mean over so many, and the share of held-out questions
  answered rightly.

  Args:
    losses: (step, loss).
    right: (step, share of `asked` questions); shown with 95% intervals.
    asked: how many questions.
    chance: the share that guessing has.
  """
  figure, (left, ax) = plt.subplots(1, 2, figsize=(10, 3.1), layout="constrained")
  steps, values = np.array(losses).T
  window = min(WINDOW, max(1, len(values) // 4))
  mean = np.convolve(values, np.ones(window) / window, "valid")
  left.plot(steps, values, color=GREY, lw=0.8, label="of a step")
  left.plot(steps[window - 1 :], mean, color=BLUE, lw=2, label=f"mean of {window} steps")
  left.set(xlabel="step", ylabel="loss", ylim=(0, None))
  left.legend(frameon=False)
  steps, share = np.array(right).T
  low, high = np.array([_interval(round(one * asked), asked) for one in share]).T
  ax.errorbar(steps, share, yerr=[share - low, high - share], fmt="o-", color=BLUE, capsize=4, ms=5)
  ax.axhline(chance, color=GREY, ls=":", lw=1, label="chance")
  ax.set(
    xlabel="step",
    ylabel=f"right, of {asked} held-out questions",
    ylim=(0, 1),
    xlim=(-0.05 * steps[-1], None),
  )
  ax.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
  ax.legend(frameon=False)
  return figure


def _interval(right: int, asked: int) -> tuple[float, float]:
  """The 95% interval of a share of questions, by Wilson."""
  found = scipy.stats.binomtest(right, asked).proportion_ci(method="wilson")
  return found.low, found.high


def draw_bars(right: Mapping[str, int], asked: int, chance: float) -> Figure:
  """Right answers of so many, with 95% intervals, beside a share that guessing has."""
  figure, ax = plt.subplots(figsize=(5.2, 3))
  for i, n in enumerate(right.values()):
    low, high = _interval(n, asked)
    ax.bar(i, 100 * n / asked, color=(GREY, ORANGE, BLUE)[i % 3], width=0.6)
    ax.errorbar(
      i,
      100 * n / asked,
      yerr=[[100 * (n / asked - low)], [100 * (high - n / asked)]],
      color=INK,
      capsize=4,
      lw=1.2,
    )
    ax.text(i + 0.08, 100 * high + 0.8, f"{100 * n / asked:.1f}%", ha="left", fontsize=9)
  ax.axhline(100 * chance, color=GREY, ls=":", lw=1)
  ax.text(len(right) - 0.64, 100 * chance, "chance", va="center", fontsize=8, color=INK)
  ax.set(
    xticks=range(len(right)),
    xticklabels=list(right),
    ylabel=f"right, of {asked} (%)",
    ylim=(0, 100),
  )
  return figure


def draw_errors(rows: Sequence[Any]) -> Figure:
  """How much of its tolerance each stage of `parity` takes; stages that are compared exactly have
  no point of their own.

  Args:
    rows: of `parity`, `parity.comparison.Row`.
  """
  near = [row for row in rows if row.arrays and row.tolerance]
  exact = [row for row in rows if row.arrays and not row.tolerance]
  figure, ax = plt.subplots(figsize=(9, 0.19 * len(near) + 1.2), layout="constrained")
  share = np.array([max(row.error / row.tolerance, 1e-5) for row in near])
  colors = [BLUE if row.result == "pass" else ORANGE for row in near]
  ax.hlines(range(len(near)), 1e-5, share, color=colors, lw=1)
  ax.scatter(share, range(len(near)), color=colors, s=16, zorder=2)
  ax.axvline(1, color=INK, lw=1.2)
  ax.set(
    xscale="log",
    xlim=(1e-5, max(3, 2 * share.max(initial=0))),
    xlabel="largest error, of what is tolerated",
  )
  ax.set_yticks(range(len(near)), [row.stage for row in near], fontsize=7)
  ax.invert_yaxis()
  ax.margins(y=0.01)
  ax.set_title(
    f"{sum(row.result == 'pass' for row in near)} of {len(near)} stages within; "
    f"{sum(row.result == 'pass' for row in exact)} of {len(exact)} others exactly equal",
    loc="left",
    fontsize=10,
  )
  return figure
