"""QC-Comp: plans, scores and selection."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xcomp_jax.config import ConfigError, LPCompConfig
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.inference import generate, selection
from xcomp_jax.inference.encoded_video import EncodedVideo
from xcomp_jax.model import qc_comp, qwen2, softmax, vlm
from xcomp_jax.model.layers import rotate
from xcomp_jax.model.qwen2 import Lengths
from xcomp_jax.training.metrics import Compilations

# small ones, of clips of 4 frames
SETTING = {
  "round": 64,
  "window": 32,
  "stride": 16,
  "layers": (6, 23),
}


def setting(mode, frames=8, **changes):
  return dataclasses.replace(
    qc_comp.select_config(mode, frames),
    **(SETTING | ({"window": 0} if mode == "global" else {}) | changes),
  )


@pytest.mark.pure
def test_official_rounds_are_those_of_the_release():
  plan = qc_comp.plan_rounds(1024, 8, qc_comp.select_config("official", 512))
  assert plan.starts.tolist() == [0, 512, 260, 772]
  assert (plan.frames, plan.unit, plan.windows.shape) == (576, 8, (17, 8))
  assert plan.windows[:, 0].tolist() == list(range(0, 65, 4))
  # in one window instead of two (quirk Q3)
  assert np.flatnonzero(~plan.counted).tolist() == [
    0,
    1,
    2,
    3,
    68,
    69,
    70,
    71,
  ]
  eight = qc_comp.plan_rounds(2048, 4, qc_comp.select_config("official", 512, repeat=8))
  assert len(eight.starts) == 32 and sorted({int(s) % 8 for s in eight.starts}) == list(range(8))


@pytest.mark.pure
def test_every_frame_counts_in_each_official_repetition():
  for frames, repeat in ((1024, 2), (2048, 2), (1536, 8)):
    plan = qc_comp.plan_rounds(frames, 8, qc_comp.select_config("official", 512, repeat))
    times = np.zeros(frames, int)
    for start in plan.starts:
      np.add.at(times, (start + np.flatnonzero(plan.counted.repeat(8))) % frames, 1)
    assert set(times) == {repeat}


@pytest.mark.pure
@pytest.mark.parametrize("mode", ["aligned", "local", "global"])
@pytest.mark.parametrize("frames", [8, 56, 64, 72, 128, 512, 520, 576, 584, 1024, 1032, 4096])
@pytest.mark.parametrize("repeat", [1, 2])
def test_every_clip_is_in_a_window_of_whole_clips(mode, frames, repeat):
  plan = qc_comp.plan_rounds(frames, 8, qc_comp.select_config(mode, 8, repeat))
  assert plan.counted.all() and not (plan.starts % 8).any()
  # nothing wraps around
  assert plan.starts.min() >= 0 and plan.starts.max() + plan.frames <= frames
  times = np.zeros(frames // 8, int)
  for start in plan.starts:
    np.add.at(times, start // 8 + plan.windows.ravel(), 1)
  assert times.min() >= 1
  if mode == "local" and frames >= 64:
    assert plan.frames == 64 and len(plan.starts) == -(-(frames - 64) // 32) + 1


@pytest.mark.pure
def test_an_aligned_plan_of_1024_frames_has_two_rounds():
  plan = qc_comp.plan_rounds(1024, 8, qc_comp.select_config("aligned", 512))
  assert plan.starts.tolist() == [0, 448] and plan.frames == 576
  assert qc_comp.plan_rounds(
    1024, 8, qc_comp.select_config("aligned", 512, repeat=2)
  ).starts.tolist() == [
    0,
    152,
    296,
    448,
  ]


@pytest.mark.pure
def test_windows_cover_a_tail_only_if_asked():
  assert qc_comp.windows(10, 8, 4, cover=False).tolist() == [list(range(8))]
  assert qc_comp.windows(10, 8, 4, cover=True)[:, 0].tolist() == [0, 2]
  assert qc_comp.windows(3, 8, 4, cover=True).tolist() == [[0, 1, 2]]


@pytest.mark.pure
@pytest.mark.parametrize(
  ("mode", "frames", "clip", "wrong"),
  [
    ("official", 512, 8, {"where": "frames", "value": 512, "least": 1024}),
    ("official", 1028, 4, {"where": "number of sampled frames", "value": 1028, "unit": 8}),
    ("official", 1024, 16, {"where": "select.frames", "value": 8, "unit": 16}),
    ("aligned", 100, 8, {"where": "number of sampled frames", "value": 100, "unit": 8}),
    ("aligned", 96, 12, {"where": "round", "value": 512, "unit": 12}),
  ],
)
def test_numbers_that_do_not_divide_are_named(mode, frames, clip, wrong):
  with pytest.raises(ConfigError) as caught:
    qc_comp.plan_rounds(frames, clip, qc_comp.select_config(mode, 8))
  assert caught.value.fields == wrong


@pytest.mark.pure
def test_official_units_are_whole_clips():
  with pytest.raises(ConfigError) as caught:
    qc_comp.plan_rounds(1024, 16, qc_comp.select_config("official", 512))
  assert caught.value.fields == {"where": "clip_frames", "value": 16}


@pytest.mark.pure
@pytest.mark.parametrize(
  ("mode", "frames", "repeat", "where"),
  [("best", 8, 1, "mode"), ("local", 0, 1, "frames"), ("local", 8, 0, "repeat")],
)
def test_settings_that_mean_nothing_are_refused(mode, frames, repeat, where):
  with pytest.raises(ConfigError) as caught:
    qc_comp.select_config(mode, frames, repeat)
  assert caught.value.fields["where"] == f"select.{where}"


@pytest.mark.pure
def test_frames_that_no_round_scores_are_named():
  plan = qc_comp.RoundPlan(
    starts=np.array([0]),
    frames=16,
    unit=8,
    windows=np.array([[0, 1]]),
    counted=np.array([True, False]),
  )
  with pytest.raises(ConfigError) as caught:
    qc_comp.aggregate(plan, np.ones((1, 2, 1, 2)), 16)
  assert caught.value.fields == {"where": "frames", "missing": list(range(8, 16))}
  assert "8 of 16 frames are in no window, first frame 8" in str(caught.value)


@pytest.mark.pure
def test_scores_are_means_over_windows_and_rounds_and_a_sum_over_layers():
  # 8 frames, the second round wraps
  plan = qc_comp.RoundPlan(
    starts=np.array([0, 4]),
    frames=6,
    unit=2,
    windows=np.array([[0, 1], [1, 2]]),
    counted=np.ones(3, bool),
  )
  scores = np.arange(16.0).reshape(2, 2, 2, 2)
  first = [[0, (1 + 2) / 2, 3], [4, (5 + 6) / 2, 7]]
  second = [[8, (9 + 10) / 2, 11], [12, (13 + 14) / 2, 15]]
  expected = [
    [
      (first[m][0] + second[m][2]) / 2,
      first[m][1],
      (first[m][2] + second[m][0]) / 2,
      second[m][1],
    ]
    for m in (0, 1)
  ]
  np.testing.assert_allclose(qc_comp.aggregate(plan, scores, 8), np.repeat(np.sum(expected, 0), 2))


@pytest.mark.pure
def test_of_equal_scores_the_earlier_frame_is_kept():
  assert qc_comp.top(np.array([1.0, 3, 3, 2, 3]), 2).tolist() == [1, 2]
  many = np.tile([2.0, 1.0, 2.0], 100)  # where sorts that are not stable mix equal ones
  assert qc_comp.top(many, 150).tolist() == [i for i in range(300) if i % 3 != 1][:150]
  # whole clips, rounded up
  assert qc_comp.top(np.array([1.0, 1, 3, 3, 3, 3]), 3, unit=2).tolist() == [
    2,
    3,
    4,
    5,
  ]


@pytest.mark.pure
def test_layers_are_scaled_to_other_depths():
  assert qc_comp.scored_layers(setting("local"), 28) == range(6, 24)
  assert qc_comp.scored_layers(setting("local"), 6) == range(1, 6)


# --- scores
# ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny):
  return vlm.VLM(tiny(clip_frames=4), rngs=nnx.Rngs(0))


WATCH = jax.jit(qc_comp.watch, static_argnames="last")
SCORE = jax.jit(qc_comp.score_windows, static_argnames=("layers", "causal", "prefix", "units"))


def film(frames, seed=0, phases=(0,)):
  rng = np.random.default_rng(seed)
  features = {phase: rng.normal(size=(frames // 4, 64, 32)).astype(np.float32) for phase in phases}
  return EncodedVideo(features=features, times=np.arange(frames) / 4.0, seconds=frames / 4)


def selector_of(video, cfg):
  return selection.frame_selector(len(video.times), video.clip_frames, cfg)


def select_frames(model, video, questions, cfg, **how):
  return selection.select_frames(model, video, questions, selector_of(video, cfg), **how)


def score_rounds(model, video, asked, cfg):
  return selection.score_rounds(model, video, [asked], selector_of(video, cfg))[0]


def question(length=12, start=6, seed=0):
  """Prefix of 5 tokens, the slot, a text of `length` with the question from `start` on, and a
  header of 3 tokens.
  """
  rng = np.random.default_rng(seed)
  tokens = np.concatenate([[7, 8, 9, 10, 11, -200], rng.integers(0, 64, length + 3)]).astype(
    np.int32
  )
  return Prompt(
    tokens, np.full_like(tokens, -100), np.zeros(len(tokens), bool), (6 + start, 6 + length - 2)
  )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def entering(llm, x, P, G, L):
  """States entering each layer."""

  def one(n):
    return jnp.full((1, 1), n)

  return qwen2.run_layers(
    llm, x, Lengths(one(P), one(G), one(L)), prefix=P, text=L, entering=True
  ).entering


def oracle(
  model, features, asked, layer, clips, header=False, causal=True, first=6, rows="question"
):
  """Clip scores of one window by the definition: hidden states of the whole round, a full attention
  map of the window.
  """
  llm, cfg = model.llm, model.cfg
  tokens, P = asked.tokens, 5
  after = tokens[P + 1 :]
  visual = model.projector(jnp.asarray(features)).reshape(-1, 32)
  x = jnp.concatenate([llm.embed(tokens[:P]), visual, llm.embed(after)])[None]
  state = entering(llm, x, P, len(visual) // 16, len(after))[layer][0]
  per = (len(state) - P - len(after)) // len(features)  # visual tokens of a clip at this layer
  end = len(after) if header or rows == "answer" else len(after) - 3
  places = np.concatenate(
    [
      np.arange(P),
      P + (np.array(clips)[:, None] * per + np.arange(per)).ravel(),
      len(state) - len(after) + np.arange(end),
    ]
  )
  window = state[places]
  q, k, _ = llm.layers[layer].project(window[None])
  q, k = (np.asarray(rotate(a, jnp.arange(len(window))[None], cfg.llm))[0] for a in (q, k))
  k = k.repeat(q.shape[1] // k.shape[1], axis=1)
  scores = np.einsum("lhd,shd->hls", q, k) / np.sqrt(q.shape[-1])
  if causal:
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights = (weights / weights.sum(-1, keepdims=True)).mean(0)
  asking = np.arange(first, len(after) - 3) if rows == "question" else np.array([len(after) - 1])
  paid = weights[P + len(clips) * per + asking, P : P + len(clips) * per].mean(0)
  return paid.reshape(len(clips), per).mean(1)


@pytest.mark.parametrize(
  "mode, rows",
  [("aligned", "question"), ("local", "question"), ("global", "question"), ("aligned", "answer")],
)
def test_scores_are_the_attention_of_a_full_map(model, mode, rows):
  video, asked, cfg = film(80), question(), setting(mode, rows=rows)
  plan = qc_comp.plan_rounds(80, 4, cfg)
  got = score_rounds(model, video, asked, cfg)
  layers = qc_comp.scored_layers(cfg, 4)
  assert got.shape == (len(plan.starts), len(layers), *plan.windows.shape)
  for r, w in {(0, 0), (len(plan.starts) - 1, len(plan.windows) - 1)}:
    start = plan.starts[r] // 4
    features = video.features[0][start : start + plan.frames // 4]
    for m, layer in enumerate(layers):
      expected = oracle(
        model, features, asked, layer, plan.windows[w], header=mode == "global", rows=rows
      )
      np.testing.assert_allclose(got[r, m, w], expected, rtol=2e-5)


def test_official_rounds_go_on_at_the_first_frame(model):
  """Clips of 4 frames in units of 8, and rounds that wrap around: scores are those of a full map
  over just these clips.
  """
  cfg, asked = (
    dataclasses.replace(qc_comp.select_config("official", 8), **SETTING),
    question(length=40),
  )
  video = film(1024)
  plan = qc_comp.plan_rounds(1024, 4, cfg)
  got = score_rounds(model, video, asked, cfg)
  last = int(np.flatnonzero(plan.starts + plan.frames > 1024)[0])
  layers = qc_comp.scored_layers(cfg, 4)
  clips = (plan.starts[last] // 4 + np.arange(plan.frames // 4)) % 256
  assert len(plan.starts) == 32 and 0 in clips[1:]
  for w in (0, len(plan.windows) - 1):
    inside = (plan.windows[w][:, None] * 2 + np.arange(2)).ravel()  # the clips of 8-frame units
    for m, layer in enumerate(layers):
      paid = oracle(model, video.features[0][clips], asked, layer, inside, causal=False, first=27)
      np.testing.assert_allclose(got[last, m, w], paid.reshape(-1, 2).mean(1), rtol=2e-5)


def test_questions_and_videos_of_few_lengths_compile_few_programs(tiny):
  # nothing of which is compiled yet
  model = vlm.VLM(tiny(clip_frames=4, attention="einsum"), rngs=nnx.Rngs(0))
  cfg = setting("aligned")
  with Compilations("watch", "score_windows") as compilations:
    for frames, length in ((84, 9), (88, 12), (96, 14)):  # 21 to 24 clips, texts of up to 16
      select_frames(model, film(frames), [question(length=length)], cfg)
    assert compilations.count == {"watch": 1, "score_windows": 1}
    select_frames(model, film(500), [question(length=30)], cfg)
  assert compilations.count == {"watch": 1, "score_windows": 2}


@pytest.mark.parametrize("mode", ["official", "aligned", "local", "global"])
def test_a_follow_up_is_scored_by_its_own_question_after_all_that_was_said(model, mode):
  """The conversation so far is text that the rows see, but only the rows of the newest question
  score.
  """
  official = mode == "official"
  cfg = (
    dataclasses.replace(qc_comp.select_config("official", 8), **SETTING, bias=None)
    if official
    else setting(mode)
  )
  video, asked = film(1024 if official else 64), question(length=60, start=45)
  plan = qc_comp.plan_rounds(len(video.times), 4, cfg)
  got = score_rounds(model, video, asked, cfg)
  clips = plan.frames // 4
  inside = (plan.windows[0][:, None] * (plan.unit // 4) + np.arange(plan.unit // 4)).ravel()
  layer = qc_comp.scored_layers(cfg, 4)[-1]
  paid = oracle(
    model,
    video.features[0][:clips],
    asked,
    layer,
    inside,
    mode == "global",
    not official,
    first=45,
  )
  np.testing.assert_allclose(
    got[0, -1, 0], paid.reshape(len(plan.windows[0]), -1).mean(1), rtol=2e-5
  )


@pytest.mark.parametrize("causal", [True, False])
def test_long_texts_score_in_pieces_as_in_one(model, causal, monkeypatch):
  """Two questions of other lengths, whose rows that ask lie in several parts."""
  video, cfg = film(40), setting("aligned", causal=causal)
  several = [question(length=60, start=21, seed=1), question(length=50, start=38, seed=2)]
  asked = qc_comp.stack_questions([qc_comp.from_prompt(one, cfg) for one in several], 62)
  plan, layers = qc_comp.plan_rounds(40, 4, cfg), qc_comp.scored_layers(cfg, 4)
  caches = WATCH(
    model,
    video.features[0][None],
    np.array([10], np.int32),
    several[0].tokens[:5],
    last=layers[-1],
  )

  def score():
    return jax.jit(
      lambda model: qc_comp.score_windows(
        model, caches, asked, plan.windows, layers=layers, causal=causal, prefix=5, units=10
      )
    )(model)

  whole = score()
  for module, name, size in (
    (qwen2, "SHORT", 16),
    (qwen2, "PART", 8),
    (qc_comp, "ROWS", 12),
    (softmax, "KEYS", 24),
  ):
    monkeypatch.setattr(module, name, size)
  np.testing.assert_allclose(score(), whole, rtol=2e-5)


def test_without_a_causal_mask_all_shown_text_is_seen(model):
  video, asked = film(32), question()
  cfg = setting("aligned", causal=False)
  got = score_rounds(model, video, asked, cfg)
  expected = oracle(model, video.features[0], asked, 3, range(8), causal=False)
  np.testing.assert_allclose(got[0, -1, 0], expected, rtol=2e-5)


@pytest.mark.parametrize("keep", ["none", "uniform", "avgpool"])
def test_other_rules_of_keeping_are_scored_too(tiny, keep):
  model = vlm.VLM(
    tiny(clip_frames=4, lp_comp=LPCompConfig((8, 4, 2, 1), keep, 16)), rngs=nnx.Rngs(0)
  )
  video, asked, cfg = film(32), question(), setting("aligned")
  got = score_rounds(model, video, asked, cfg)
  np.testing.assert_allclose(
    got[0, -1, 0], oracle(model, video.features[0], asked, 3, range(8)), rtol=2e-5
  )


def test_attention_ranked_keeping_is_refused(tiny):
  model = vlm.VLM(
    tiny(clip_frames=4, lp_comp=LPCompConfig("cosine", "attention", 16)), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ConfigError) as caught:
    select_frames(model, film(32), [question()], setting("aligned"))
  assert caught.value.fields == {"where": "lp_comp.keep", "value": "attention"}


@pytest.mark.parametrize("mode", ["aligned", "local", "global"])
def test_a_later_question_scores_as_a_fresh_one(model, mode):
  video, cfg, rounds = film(96), setting(mode), {}
  select_frames(model, video, [question(seed=1)], cfg, rounds=rounds)
  kept = dict(rounds)
  later = select_frames(model, video, [question(length=20, seed=2)], cfg, rounds=rounds)[0]
  fresh = select_frames(model, video, [question(length=20, seed=2)], cfg)[0]
  # none was run again
  assert kept and rounds.keys() == kept.keys() and all(rounds[key] is kept[key] for key in kept)
  np.testing.assert_array_equal(later.scores, fresh.scores)
  np.testing.assert_array_equal(later.frames, fresh.frames)


def test_padding_of_text_and_clips_changes_no_score(model):
  video, asked, cfg = film(40), question(), setting("aligned")  # 10 clips, padded to 16
  plan = qc_comp.plan_rounds(40, 4, cfg)
  got = score_rounds(model, video, asked, cfg)
  layers = qc_comp.scored_layers(cfg, 4)
  caches = WATCH(
    model,
    jnp.asarray(video.features[0][None]),
    jnp.array([10]),
    jnp.asarray(asked.tokens[:5]),
    last=layers[-1],
  )
  text = qc_comp.from_prompt(asked, cfg)
  exact = SCORE(
    model,
    caches,
    qc_comp.stack_questions([text]),
    jnp.asarray(plan.windows),
    layers=layers,
    causal=True,
    prefix=5,
    units=10,
  )[0]
  np.testing.assert_allclose(got, exact, rtol=1e-5)


def test_local_windows_do_not_depend_on_the_rest_of_the_video(model):
  cfg = setting("local")
  video, asked = film(96), question()
  other = dataclasses.replace(video, features={0: video.features[0].copy()})
  other.features[0][16:] += 1
  a, b = (score_rounds(model, v, asked, cfg) for v in (video, other))
  np.testing.assert_array_equal(a[:3], b[:3])  # frames 0 to 64
  assert np.abs(a[3:] - b[3:]).max() > 0


@pytest.mark.pure
def test_the_newest_question_scores_from_its_first_token():
  cfg = setting("aligned")
  asked = qc_comp.from_prompt(question(length=12, start=6), cfg)
  assert np.flatnonzero(asked.asked).tolist() == list(range(6, 12))
  assert np.flatnonzero(asked.valid).tolist() == list(range(12))
  assert np.flatnonzero(
    qc_comp.from_prompt(question(length=12), setting("global")).valid
  ).tolist() == list(range(15))
  biased = qc_comp.from_prompt(question(length=12, start=6), setting("aligned", bias=3))
  assert np.flatnonzero(biased.asked).tolist() == list(range(3, 12))
  with pytest.raises(ConfigError) as caught:
    # 27 tokens are skipped, there are 12
    qc_comp.from_prompt(question(length=12), setting("official"))
  assert caught.value.fields == {"where": "question", "first": 27, "end": 12}


@pytest.mark.pure
def test_the_token_before_the_answer_can_score_instead():
  for cfg in (setting("aligned", rows="answer"), setting("official", rows="answer")):
    # 12 tokens, and three of the assistant's header
    asked = qc_comp.from_prompt(question(length=12), cfg)
    assert np.flatnonzero(asked.asked).tolist() == [14] and np.flatnonzero(
      asked.valid
    ).tolist() == list(range(15))
  with pytest.raises(ConfigError) as caught:
    qc_comp.select_config("aligned", 8, rows="all")
  assert caught.value.fields == {"where": "select.rows", "value": "all"}


def test_nothing_is_selected_where_all_frames_may_stay(model):
  got = select_frames(model, film(32), [question()], setting("aligned", frames=32))[0]
  assert (
    got.scores is None
    and got.frames.tolist() == list(range(32))
    and "nothing is selected" in got.note
  )
  assert select_frames(model, film(32), [question()], None)[0].frames.tolist() == list(range(32))
  assert (
    "1024 frames or more"
    in select_frames(model, film(32), [question()], qc_comp.select_config("official", 8))[0].note
  )


def test_a_count_that_is_no_multiple_of_a_clip_keeps_whole_clips(model):
  for mode in ("aligned", "local"):
    got = select_frames(model, film(96), [question()], setting(mode, frames=1))[0]
    assert len(got.frames) == 4 and got.frames[0] % 4 == 0
    best = got.scores.argmax()
    assert best in got.frames


def test_official_selection_names_what_its_tower_takes(model):
  with pytest.raises(ConfigError) as caught:
    select_frames(model, film(1024), [question(length=40)], qc_comp.select_config("official", 2))
  assert caught.value.fields == {"where": "select.frames", "value": 2, "unit": 4}


def test_official_rounds_read_the_phase_they_start_in(model):
  """Clips that start at another frame have other features; with repeat 4 rounds start at frames 0,
  2, 4, 6 of a clip.
  """
  cfg = dataclasses.replace(qc_comp.select_config("official", 8, repeat=4))
  assert selection.frame_selector(1024, 4, cfg).phases == (0, 2)
  video = film(1024, phases=(0, 2))
  other = dataclasses.replace(video, features={0: video.features[0], 2: video.features[2] + 1})
  asked = question(length=40)
  plan = qc_comp.plan_rounds(1024, 4, cfg)
  a, b = (score_rounds(model, v, asked, cfg) for v in (video, other))
  changed = [bool(np.abs(x - y).max() > 0) for x, y in zip(a, b, strict=True)]
  assert changed == [bool(start % 4) for start in plan.starts] and sorted(set(plan.starts % 4)) == [
    0,
    2,
  ]


def test_features_on_devices_serve_as_those_of_the_host_do(model):
  cfg, asked = qc_comp.select_config("official", 8, repeat=4), question(length=40)
  video = film(1024, phases=(0, 2))
  moved = dataclasses.replace(
    video, features={phase: [*map(jnp.asarray, one)] for phase, one in video.features.items()}
  )
  host, devices = (score_rounds(model, v, asked, cfg) for v in (video, moved))
  np.testing.assert_array_equal(host, devices)
  host, devices = (
    generate.as_batch(asked, selection.selected_features(model, v, np.arange(2, 42)), 4).visual
    for v in (video, moved)
  )
  np.testing.assert_array_equal(host, devices)
  assert isinstance(devices, jax.Array) and devices.shape[:2] == (1, 64)  # of 40 frames


def test_selected_clips_are_taken_and_torn_ones_encoded_again(model):
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (16, 48, 48, 3)).astype(np.uint8)
  video = dataclasses.replace(film(16), frames=frames)
  np.testing.assert_array_equal(
    selection.selected_features(model, video, np.arange(4, 12)), video.features[0][1:3]
  )
  torn, done = np.array([0, 1, 2, 5, 6, 7, 8, 9]), []
  expected = vlm.encode_frames(model, jnp.asarray(frames[torn].reshape(2, 4, 48, 48, 3)))
  got = selection.selected_features(model, video, torn, lambda *a: done.append(a))
  np.testing.assert_allclose(got, expected, atol=2e-5)
  assert done == [(1, 2), (2, 2)]
  video.features[2] = video.features[0] + 1
  np.testing.assert_array_equal(
    selection.selected_features(model, video, np.array([0, 1, 2, 3, 6, 7, 8, 9]))[1],
    video.features[2][1],
  )
