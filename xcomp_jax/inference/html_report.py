"""What a video answered, as one HTML page: which frames a question kept, how relevant each was,
what it cost.

The page needs nothing else: no script, no network, pictures inside. Plots are SVG whose drawing
stretches with the page while their text does not.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image

from xcomp_jax.config import VLMConfig
from xcomp_jax.inference.chat import Answer
from xcomp_jax.inference.encoded_video import EncodedVideo
from xcomp_jax.inference.moments import clock, extent
from xcomp_jax.inference.selection import Selection
from xcomp_jax.model.lp_comp import counts
from xcomp_jax.model.qc_comp import top

THUMBNAILS = 24  # of a question, at most
# seconds
_TICKS = (
  0.1,
  0.2,
  0.5,
  1,
  2,
  5,
  10,
  15,
  30,
  60,
  120,
  300,
  600,
  900,
  1800,
  3600,
  7200,
  14400,
  43200,
)


def best_clips(video: EncodedVideo, selection: Selection, most: int) -> Int[np.ndarray, " n"]:
  """Chosen clips to be shown, in order of time: the best by score, at most so many; without scores,
  evenly spaced.
  """
  clips = np.unique(selection.frames // video.clip_frames)
  count = min(len(clips), most)
  if selection.scores is None:
    return clips[np.arange(count) * len(clips) // count]
  chosen = np.isin(np.arange(len(selection.scores)), selection.frames)
  scores = np.where(chosen, selection.scores, -np.inf).reshape(-1, video.clip_frames).max(1)
  return clips[top(scores[clips], count)]


def total_seconds(columns: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Seconds by what they went into, in the order in which that first comes up."""
  stages = dict.fromkeys(stage for spent in columns.values() for stage in spent)
  return {stage: sum(spent.get(stage, 0.0) for spent in columns.values()) for stage in stages}


# --- the page
# --------------------------------------------------------------------------------------------------


def page(video: EncodedVideo, answers: Sequence[Answer], spent: Mapping[str, float]) -> str:
  """Questions that were asked of a video, as HTML; without any, the video alone.

  Args:
    video: with its thumbnails.
    answers: in order.
    spent: seconds that went into the video itself, by what for.
  """
  title, _, how = (html.escape(part) for part in video.source.partition(" ("))
  facts = {
    "Duration": _when(video.seconds, video.seconds),
    "Sampled frames": f"{len(video.times):,}",
    "Clips": f"{video.clips:,}, {_many(video.clip_frames, 'frame')} each",
  }
  if not video.seconds:  # a still image
    facts = {"Sampled frames": facts["Sampled frames"]}
  columns = {"video": spent} | {
    "question" if len(answers) == 1 else f"question {i}": a.spent for i, a in enumerate(answers, 1)
  }
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{f'<p class="note">({how}</p>' if how else ""}
<dl class="facts">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())}</dl>
{_costs(columns)}
</header>
{"".join(_question(i, answer) for i, answer in enumerate(answers, 1)) or _thumbnails(video)}</main>
</body>
</html>
"""  # noqa: E501


def framed(whole: str, height: int = 600) -> str:
  """A page inside another one, such as a notebook, with a style of its own."""
  return f'<iframe srcdoc="{html.escape(whole)}" width="100%" height="{height}"></iframe>'


def _costs(columns: Mapping[str, Mapping[str, float]]) -> str:
  """A bar and a table of seconds: {who: {what for: seconds}}."""
  total = total_seconds(columns)
  stages = list(total)
  columns = {"total": total, **columns}
  digits = 1 if sum(total.values()) >= 10 else 2

  def number(s):
    return "<td></td>" if s is None else f"<td>{s:,.{digits}f}</td>"

  # Every stage has a tint of the accent colour, from full to faint.
  tints = {
    stage: f"--tint:{1 - 0.7 * i / max(1, len(stages) - 1):.2f}" for i, stage in enumerate(stages)
  }
  bar = "".join(
    f'<i style="{tints[stage]};flex-grow:{s:.4f}" title="{html.escape(stage)}: {s:,.{digits}f} '
    f's"></i>'
    for stage, s in total.items()
    if s > 0
  )
  rows = "".join(
    f'<tr><th scope="row"><i class="key" style="{tints[stage]}"></i>{html.escape(stage)}</th>'
    + "".join(number(spent.get(stage)) for spent in columns.values())
    + "</tr>"
    for stage in stages
  )
  return f"""<h2 class="label">Seconds spent</h2>
<div class="bar" aria-hidden="true">{bar}</div>
<div class="wide" tabindex="0" role="region" aria-label="Seconds spent">
<table>
<thead><tr><td></td>{"".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)}</tr></thead>
<tbody>{rows}</tbody>
<tfoot><tr><th scope="row">total</th>{"".join(number(sum(s.values())) for s in columns.values())}</tr></tfoot>
</table></div>"""  # noqa: E501


def _question(number: int, answer: Answer) -> str:
  """A section: question, answer, and how it came about."""
  video, selection = answer.video, answer.selection
  _, end = extent(video.times, video.seconds)
  kept, sampled = len(selection.frames), len(video.times)
  spans = answer.moments
  if kept < sampled:
    looked = f"""<p>{kept:,} of {_many(sampled, "sampled frame")}, in {_many(len(spans), "time range")}:</p>
<ul class="times">{"".join(f"<li>{_when(end, *span)}</li>" for span in spans)}</ul>"""  # noqa: E501
  else:
    looked = f"<p>{'All ' * (sampled > 1)}{_many(sampled, 'sampled frame')}.</p>"
  if selection.note:
    looked += f'<p class="note">{html.escape(selection.note[0].upper() + selection.note[1:])}.</p>'
  curve = "" if selection.scores is None else _curve(video, selection.scores, spans)
  return f"""<section aria-labelledby="q{number}">
<p class="label">Question {number}</p>
<h2 id="q{number}">{html.escape(answer.question)}</h2>
<p class="answer">{html.escape(answer.text)}</p>
<h3>Frames that answered</h3>
{looked}
{curve}
{_thumbnails(video, selection)}
<h3>Tokens per layer</h3>
{_layers(answer.cfg, kept, len(answer.prompt.tokens) - 1)}
</section>
"""


def _curve(video: EncodedVideo, scores: np.ndarray, spans: Sequence[tuple[float, float]]) -> str:
  """Relevance over time, a step per score, the chosen ranges shaded."""
  begin, end = extent(video.times, video.seconds)

  def place(t):
    return np.round((t - begin) / ((end - begin) or 1) * 1000, 1)

  height = np.round(100 - 100 * (scores - scores.min()) / (np.ptp(scores) or 1), 1)
  steps = np.flatnonzero(np.append(True, np.diff(height) != 0))
  line = "".join(
    f"H{x:g}V{y:g}" for x, y in zip(place(video.times[steps]), height[steps], strict=True)
  )

  def band(first, last):
    x, width = place(first), max(place(last) - place(first), 1.5)  # narrower ones would not be seen
    return (
      f"<g><title>{_when(end, first, last)}</title>"
      f'<rect class="band" x="{x:g}" y="0" width="{width:.1f}" height="100"/>'
      f'<rect class="rug" x="{x:g}" y="104" width="{width:.1f}" height="5"/></g>'
    )

  def tick(t):
    x = place(t) / 10
    anchor = "start" if x < 3 else "end" if x > 97 else "middle"
    return (
      f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="126" y2="130"/>'
      f'<text x="{x:.2f}%" y="144" text-anchor="{anchor}">{clock(t, end)}</text>'
    )

  step = next((s for s in _TICKS if (end - begin) / s <= 7), 86400)
  ticks = range(math.ceil(begin / step), int(end / step + 1e-6) + 1)
  peak = _when(end, video.times[np.argmax(scores)])
  return f"""<figure>
<figcaption>Relevance to the question, highest at {peak}. Shaded: chosen frames.</figcaption>
<svg class="plot" width="100%" height="150" role="img"
 aria-label="Relevance over time, highest at {peak}; the chosen ranges are listed above">
<svg viewBox="0 -2 1000 112" preserveAspectRatio="none" width="100%" height="124">
{"".join(band(*span) for span in spans)}
<path class="curve" d="M{place(video.times[0]):g} 100{line}H1000V100Z"/>
</svg>
{"".join(tick(n * step) for n in ticks)}
</svg>
</figure>"""


def _thumbnails(video: EncodedVideo, selection: Selection | None = None) -> str:
  """Pictures of the chosen clips, or of all: the best by score, in order of time; without scores,
  evenly spaced.
  """
  if video.thumbnails is None:
    return ""
  selection = selection or Selection(np.arange(len(video.times)), None, "")
  _, end = extent(video.times, video.seconds)
  chosen = len(np.unique(selection.frames // video.clip_frames))
  shown = best_clips(video, selection, THUMBNAILS)
  times = video.times[shown * video.clip_frames + video.clip_frames // 2]
  items = (
    f'<li><img src="{_jpeg(picture)}" alt="Frame at {when}" width="96" height="96">{when}</li>'
    for picture, when in zip(video.thumbnails[shown], (_when(end, t) for t in times), strict=True)
  )
  listed = f'<ul class="clips">{"".join(items)}</ul>'
  if len(shown) == chosen:
    return listed
  which = (
    f"{len(shown)} of {chosen:,} clips, evenly spaced"
    if selection.scores is None
    else f"The {len(shown)} most relevant of {chosen:,} chosen clips"
  )
  return f'{listed}\n<p class="note">{which}; {chosen - len(shown):,} more.</p>'


def _jpeg(image: np.ndarray) -> str:
  """uint8[H, W, 3] as a data URI."""
  out = io.BytesIO()
  Image.fromarray(image).save(out, "JPEG", quality=80, optimize=True)
  return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _layers(cfg: VLMConfig, frames: int, text: int) -> str:
  """Bars of the tokens in each layer of the answer's prefill."""
  groups = frames * cfg.tokens_per_frame // cfg.lp_comp.group
  visual = [n * groups for n in counts(cfg.lp_comp, cfg.llm.layers)]
  scale = 100 / (max(visual) + text)
  bars = (
    f"<g><title>layer {i + 1} of {len(visual)}: {n:,} visual and {text:,} text tokens</title>"
    f'<rect class="visual" x="{i}" y="{100 - n * scale:.2f}" width=".8" '
    f'height="{n * scale:.2f}"/>'
    f'<rect class="text" x="{i}" y="{100 - (n + text) * scale:.2f}" width=".8" '
    f'height="{text * scale:.2f}"/></g>'
    for i, n in enumerate(visual)
  )
  label = (
    f"{visual[0]:,} visual tokens in the first layer, {visual[-1]:,} in the last; {text:,} "
    f"of text in each"
  )
  return f"""<figure class="layers">
<svg width="100%" height="84" viewBox="0 0 {len(visual) - 0.2:g} 100" preserveAspectRatio="none" role="img"
 aria-label="{label}">
{"".join(bars)}
</svg>
<div><span>first of {len(visual)} layers<br><b>{visual[0]:,}</b> + {text:,}</span>
<span>last<br><b>{visual[-1]:,}</b> + {text:,}</span></div>
<figcaption><i class="key"></i>visual <i class="key ink"></i>text</figcaption>
</figure>"""  # noqa: E501


def _many(n: int, noun: str) -> str:
  return f"{n:,} {noun}" + "s" * (n != 1)


def _when(whole: float, *times: float) -> str:
  """A time, or both ends of a range (one, where they read the same), in a video of `whole`
  seconds.
  """
  return "–".join(dict.fromkeys(clock(t, whole) for t in times)) + " s" * (whole < 60)


_STYLE = """
:root {
  color-scheme: light dark; --page: #fff; --ink: #1c2024; --soft: #60676f; --line: #e2e5e9;
  --accent: #1f66ad
}
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #14171a; --ink: #e4e7ea; --soft: #9aa2ab; --line: #2c3238; --accent: #6cb0f5 }
}
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums
}
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1rem 4rem }
h1, h2, h3, p, dl, dd, ul, figure { margin: 0; padding: 0 }
h1, h2, .answer { overflow-wrap: anywhere }
h1 { font-size: 1.4rem; line-height: 1.3; font-weight: 600 }
h2 { font-size: 1.2rem; line-height: 1.35; font-weight: 600 }
h3, .label { font-size: .8rem; font-weight: 600; color: var(--soft); text-align: left }
h3 { margin: 1.75rem 0 .35rem; break-after: avoid }
section { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line) }
.answer {
  margin-top: .6rem; padding-left: .9rem; border-left: 3px solid var(--accent); font-size: 1.05rem;
  white-space: pre-line
}
.facts { display: flex; flex-wrap: wrap; gap: .25rem 2rem; margin: .75rem 0 1.75rem }
dt, .note, figcaption, .layers div, thead th { font-size: .8rem; color: var(--soft) }
.bar { display: flex; gap: 1px; margin-top: .5rem; height: 8px; border-radius: 2px; overflow: hidden }
.bar i, .key { background: var(--accent); opacity: var(--tint, 1) }
.bar i { flex-basis: 0 }
.key { display: inline-block; width: .6rem; height: .6rem; margin-right: .4rem; border-radius: 2px }
.key + .key { margin-left: .5rem }
.wide { overflow-x: auto; margin-top: .75rem }
table { border-collapse: collapse; font-size: .875rem }
th { font-weight: 400; text-align: left; white-space: nowrap }
td, thead th { padding: .15rem 0 .15rem 1.5rem; text-align: right }
tfoot { border-top: 1px solid var(--line) }
tfoot, td:nth-child(2) { font-weight: 600 }
ul { list-style: none }
.times { display: flex; flex-wrap: wrap; gap: 0 1.1rem; font-size: .875rem; margin-top: .2rem }
figure { margin-top: 1rem; break-inside: avoid }
.plot { display: block; margin-top: .4rem }
.plot line { stroke: var(--soft) }
.plot text { font-size: 11px; fill: var(--soft) }
.band { fill: var(--accent); opacity: .3 }
.rug, .visual { fill: var(--accent) }
.curve { fill: var(--ink); fill-opacity: .12; stroke: var(--soft); vector-effect: non-scaling-stroke }
.clips {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(86px, 1fr)); gap: .6rem;
  margin-top: 1rem; font-size: .75rem; color: var(--soft)
}
.clips li { break-inside: avoid }
.clips img { display: block; width: 100%; height: auto; border-radius: 3px }
.note { margin-top: .4rem }
.layers { max-width: 26rem; margin-top: .5rem }
.layers svg { display: block; border-bottom: 1px solid var(--soft) }
.layers div { display: flex; justify-content: space-between; margin: .3rem 0 }
.layers span:last-child { text-align: right }
.layers b { color: var(--ink) }
.text, .ink { fill: var(--soft); background: var(--soft) }
:focus-visible { outline: 2px solid var(--accent) }
"""  # noqa: E501
