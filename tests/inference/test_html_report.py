import dataclasses
import html.parser
import re

import numpy as np
import pytest

from xcomp_jax.config import LPCompConfig
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.inference import html_report
from xcomp_jax.inference.chat import Answer, Selection
from xcomp_jax.inference.encoded_video import EncodedVideo
from xcomp_jax.inference.moments import clock, spans

pytestmark = pytest.mark.pure
VOID = {"meta", "img", "br"}


def film(frames, seconds, clip=8, source="film.mp4"):
  rng = np.random.default_rng(0)
  times = (np.arange(frames) + 0.5) * seconds / frames
  clips = frames // clip
  pictures = rng.integers(0, 256, (clips, 96, 96, 3)).astype(np.uint8)
  return EncodedVideo(
    features={0: np.zeros((clips, 1, 1))},
    times=times,
    seconds=seconds,
    thumbnails=pictures,
    source=source,
  )


def answer(
  cfg, video, frames, scores=None, note="", question="What?", text="Yes.", tokens=51, spent=None
):
  prompt = Prompt(
    np.zeros(tokens, np.int32), np.zeros(tokens, np.int32), np.zeros(tokens, bool), (0, 1)
  )
  return Answer(
    question=question,
    text=text,
    video=video,
    selection=Selection(np.asarray(frames), scores, note),
    spent=spent or {"scoring": 1.0, "tower": 0.0},
    prompt=prompt,
    cfg=cfg,
  )


class Balanced(html.parser.HTMLParser):
  """Fails where an end tag does not match; collects (tag, attributes) and the text outside
  styles.
  """

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.text = [], [], ""
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data * ("style" not in self.open)

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


@pytest.mark.parametrize(
  ("seconds", "whole", "text"),
  [
    (3.5, None, "3.5"),
    (0, None, "0.0"),
    (123, None, "2:03"),
    (3723, None, "1:02:03"),
    (3599.7, None, "1:00:00"),
    (3.5, 600.0, "0:04"),
    (3.5, 59.9, "3.5"),
    (60.0, None, "1:00"),
    (36000, None, "10:00:00"),
  ],
)
def test_clock(seconds, whole, text):
  assert clock(seconds, whole) == text


@pytest.mark.parametrize(
  ("frames", "times", "seconds", "expected"),
  [
    ([0, 1, 4], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], 6.0, [(0.5, 2.5), (4.5, 5.5)]),
    ([5], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], 6.0, [(5.5, 6.0)]),
    ([1], [0.0, 2.0], 9.0, [(2.0, 4.0)]),
    ([], [0.0, 2.0], 9.0, []),
    (
      [0, 1, 2, 5],
      [0.0, 0.0, 0.0, 1.0, 1.0, 2.0],
      3.0,
      [(0.0, 1.0), (2.0, 3.0)],
    ),  # a stretched video
    ([0, 1, 2, 3], [0.0, 0.0, 0.0, 1.0, 1.0, 2.0], 3.0, [(0.0, 2.0)]),
    ([1], [600.0, 605.0], 10.0, [(605.0, 610.0)]),  # a part of a file
    ([0, 1], [0.0, 0.0], 2.0, [(0.0, 2.0)]),
    ([0], [0.0], 0.0, [(0.0, 0.0)]),  # a still image
  ],
)
def test_spans(frames, times, seconds, expected):
  assert spans(np.array(frames, int), np.array(times), seconds) == expected


def test_text_is_escaped(tiny):
  bad = '<script>"&'
  video = film(16, 4.0, source=bad)
  page = html_report.page(
    video,
    [answer(tiny(), video, range(16), note=bad, question=bad, text=bad, spent={bad: 1.0})],
    {bad: 1.0},
  )
  assert "<script" not in page
  assert Balanced(page).text.count(bad) == 6  # title, heading, stage, question, answer, note
  assert page.count("&lt;script&gt;&quot;&amp;") == 7  # and the tooltip of the bar


def test_a_page_says_what_was_chosen_and_what_it_cost(tiny):
  scores = np.repeat([1.0, 4.0, 2.0, 3.0], 8)
  video = film(32, 240.0)
  asked = answer(
    tiny(),
    video,
    [*range(8, 16), *range(24, 32)],
    scores,
    spent={"scoring": 1.25, "generation": 0.5},
  )
  page = Balanced(html_report.page(video, [asked], {"decode": 2.0, "tower": 3.0}))
  text = " ".join(page.text.split())
  assert "16 of 32 sampled frames, in 2 time ranges" in text
  assert "1:04–2:04" in text and "3:04–4:00" in text
  assert "highest at 1:04" in text
  assert [img["alt"] for img in page.all("img")] == ["Frame at 1:34", "Frame at 3:34"]
  for seconds in ("1.25", "0.50", "2.00", "3.00", "6.75"):
    assert seconds in text
  # 16 groups with 14 tokens in the first of four layers, 1 in the last; 50 tokens of text
  assert "224 + 50" in text and "16 + 50" in text
  assert len([r for r in page.all("rect") if r["class"] == "visual"]) == tiny().llm.layers
  assert len([r for r in page.all("rect") if r["class"] == "band"]) == 2


def test_nothing_selected(tiny):
  video = film(512, 100.0)
  page = Balanced(html_report.page(video, [answer(tiny(), video, range(512), note="no need")], {}))
  assert "All 512 sampled frames." in page.text and "No need." in page.text
  assert not page.all("path")
  assert len(page.all("img")) == html_report.THUMBNAILS
  assert "24 of 64 clips, evenly spaced; 40 more" in page.text


def test_the_best_clips_are_shown_in_order_of_time(tiny):
  scores = np.random.default_rng(0).permutation(64).astype(float)
  chosen = np.arange(40 * 8)
  video = film(512, 512.0)
  page = Balanced(html_report.page(video, [answer(tiny(), video, chosen, scores.repeat(8))], {}))
  best = np.sort(np.argsort(-scores[:40])[:24])
  assert [i["alt"] for i in page.all("img")] == [
    f"Frame at {clock(c * 8 + 4.5, 512)}" for c in best
  ]
  assert "The 24 most relevant of 40 chosen clips; 16 more" in page.text


def test_a_still_image_and_no_compression(tiny):
  cfg = dataclasses.replace(tiny(), lp_comp=LPCompConfig("cosine", "none", 16))
  video = dataclasses.replace(film(1, 0.0, clip=1), seconds=0.0)
  page = Balanced(
    html_report.page(
      video, [answer(cfg, video, [0], note="no selection asked for")], {"tower": 0.1}
    )
  )
  assert "Duration" not in page.text and page.text.count("16 + 50") == 2


def test_equal_scores_and_no_questions(tiny):
  video = film(16, 4.0)
  Balanced(html_report.page(video, [answer(tiny(), video, range(8), np.ones(16))], {}))
  page = Balanced(html_report.page(video, [], {"decode": 1.0}))
  assert not page.all("section")
  assert [img["alt"] for img in page.all("img")] == ["Frame at 1.1 s", "Frame at 3.1 s"]


def test_a_long_video_makes_a_small_page_that_needs_nothing_else(tiny):
  rng = np.random.default_rng(0)
  asked, video = [], film(4096, 2048.0)
  for _ in range(3):  # the worst case: every frame has its own score, chosen ones stand alone
    asked.append(answer(tiny(), video, np.arange(0, 4096, 8), rng.random(4096)))
  page = html_report.page(video, asked, {"decode": 1.0})
  assert len(page) < 2_000_000
  assert not re.search(r"https?:|url\(|<link|<script", page)
  curve = Balanced(page).all("path")[0]["d"]
  assert curve.startswith("M0.1 100H0.1V") and curve.endswith("H1000V100Z")


def test_equal_neighbours_are_one_step(tiny):
  video = film(32, 32.0)
  page = html_report.page(
    video, [answer(tiny(), video, range(8), np.repeat([0.0, 1, 1, 0.5], 8))], {}
  )
  (curve,) = Balanced(page).all("path")
  assert curve["d"] == "M15.6 100H15.6V100H265.6V0H765.6V50H1000V100Z"
