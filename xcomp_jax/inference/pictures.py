"""Pictures of answers; every function returns a figure of matplotlib."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xcomp_jax.inference.chat import Answer
from xcomp_jax.inference.html_report import best_clips
from xcomp_jax.inference.moments import clock, extent

BLUE, ORANGE, INK = "#2a6f97", "#d9772b", "#333333"
FRAMES = 8  # that are shown of an answer, at most


def draw_answer(answer: Answer) -> Figure:
  """Relevance over time, and below it the best of the frames that were looked at."""
  video = answer.video
  best = best_clips(video, answer.selection, FRAMES)
  figure = plt.figure(figsize=(10, 3.6), layout="constrained")
  grid = figure.add_gridspec(2, FRAMES, height_ratios=(1.7, 1))
  curve = figure.add_subplot(grid[0, :])
  draw_curve(curve, answer)
  curve.set(xlim=extent(video.times, video.seconds))
  label_time(curve, video.seconds)
  for column, clip in enumerate(best):
    axes = figure.add_subplot(grid[1, column])
    axes.axis("off")
    if video.thumbnails is not None:
      axes.imshow(video.thumbnails[clip])
    when = video.times[clip * video.clip_frames + video.clip_frames // 2]
    axes.set_title(clock(when, video.seconds), fontsize=8)
  return figure


def draw_curve(ax: Axes, answer: Answer) -> None:
  """Draws scores over time on `ax`; blue: selected frames."""
  video, kept = answer.video, answer.selection
  for first, last in answer.moments:
    ax.axvspan(first, last, color=BLUE, alpha=0.25, lw=0)
  if kept.scores is None:
    ax.text(0.5, 0.5, kept.note, transform=ax.transAxes, ha="center", va="center", color=INK)
  else:
    _, end = extent(video.times, video.seconds)
    ax.stairs(kept.scores, np.append(video.times, end), color=INK, lw=1.1, baseline=None)
    ax.set_ylim(min(0, kept.scores.min()), kept.scores.max() * 1.22)
  first, *rest = answer.question.splitlines()
  told = next((line for line in rest if line.startswith(f"{answer.text}.")), answer.text)
  ax.set_title(f"{first}  {told}", loc="left", fontsize=10)
  ax.set(yticks=[0], ylabel="relevance")


def label_time(ax: Axes, seconds: float) -> None:
  """Writes times under an axis, of a video of so many seconds."""
  ax.set_xlabel("time, " + ("seconds" if seconds < 60 else "minutes:seconds"))
  ax.xaxis.set_major_formatter(lambda t, _: clock(t, seconds))


def draw_relevance(
  answers: Sequence[Answer], shown: Sequence[tuple[float, float]] | None = None
) -> Figure:
  """Scores over time for each answer about a video; blue: selected frames.

  Args:
    answers: about one video.
    shown: seconds between which each question's answer is really to be seen, if that is known.
  """
  video = answers[0].video
  begin, end = extent(video.times, video.seconds)
  figure, axes = plt.subplots(
    len(answers),
    1,
    figsize=(10, 1.75 * len(answers) + 0.3),
    sharex=True,
    squeeze=False,
    layout="constrained",
  )
  for i, (ax, answer) in enumerate(zip(axes[:, 0], answers, strict=True)):
    draw_curve(ax, answer)
    if shown is not None:
      ax.plot(
        np.mean(shown[i]),
        0.93,
        "v",
        color=ORANGE,
        ms=8,
        transform=ax.get_xaxis_transform(),
        clip_on=False,
      )
    ax.set(xlim=(begin, end))
  label_time(axes[-1, 0], video.seconds)
  return figure
