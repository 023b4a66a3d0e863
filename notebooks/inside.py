# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look inside LP-Comp
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/xcomp_jax/blob/main/notebooks/inside.ipynb)
#
# Between the layers of the LLM the visual tokens of every group of 16 thin out, the last ones stay.
# What does that do? Here are the schedule, the patches that surviving tokens stand for, where
# attention goes while tokens are still there, and how far the answers move.

# %% tags=["install"]
# Install, where the package is not there yet: in Colab on a TPU, a GPU or a CPU.
import glob
import importlib.util
import os
import pathlib
import subprocess
import sys

# EDIT: where this project lives, as in the link above
REPOSITORY = "https://github.com/OWNER/xcomp_jax"

if importlib.util.find_spec("xcomp_jax") is None:
  tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  extra = "tpu," if tpu else "gpu," if glob.glob("/dev/nvidia[0-9]*") else ""
  # the notebook's own clone, or a new one
  home = ".." if os.path.isfile("../xcomp_jax/__init__.py") else "xcomp"
  if not os.path.isdir(home):
    if "/OWNER/" in REPOSITORY:
      raise SystemExit(
        "put the project's address into REPOSITORY above: the notebook reads assets/ and configs/ "
        "from a clone of it"
      )
    subprocess.run(["git", "clone", "-q", "--depth=1", REPOSITORY, home], check=True)
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "-q", "-e", f"{os.path.abspath(home)}[{extra}plot]"],
    check=True,
  )
  sys.path.insert(0, os.path.abspath(home))

import jax

import xcomp_jax

os.chdir(pathlib.Path(xcomp_jax.__file__).parents[1])
print(jax.devices())
if glob.glob("/dev/nvidia[0-9]*") and jax.default_backend() == "cpu":
  print("There is an NVIDIA GPU, but JAX does not use it: see `gpu` in docs/troubleshooting.md.")

# %% [markdown]
# ## What to look at
#
# `tuned` is a checkpoint after SCT of the same model, such as the export that the notebook `tune`
# makes; without one only `checkpoint` is looked at, under the released cosine.

# %% tags=["parameters"]
# @title { display-mode: "form" }
checkpoint = "assets/tiny"  # @param {type: "string"}
tuned = "runs/notebooks/tune/export"  # @param {type: "string"}
videos = 50  # @param {type: "integer"}
out = "runs/notebooks/inside"  # @param {type: "string"}

# %% [markdown]
# ## Models and held-out questions
#
# Both models see the same synthetic videos, four questions about each. The tower is frozen in SCT,
# so one encoding serves both.

# %%
import numpy as np
from matplotlib import pyplot as plt

from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.tuned import read_tuned
from xcomp_jax.config import COSINE, LPCompConfig
from xcomp_jax.data import prompt
from xcomp_jax.data import video as movies
from xcomp_jax.inference import generate
from xcomp_jax.inference.places import computing
from xcomp_jax.model import lp_comp, token_merging
from xcomp_jax.synthetic import world
from xcomp_jax.viz import plots
from xcomp_jax.viz.flow import agreement, attention_flow

plt.rcParams.update(plots.STYLE | {"figure.dpi": 110})
out = pathlib.Path(out)
watching = xcomp_jax.load(checkpoint, select=0, min_frames=8, max_frames=64)
models = {"not tuned": watching.vlm}
looked = COSINE
if tuned and pathlib.Path(tuned).exists():
  models["tuned"] = loading.load_model(resolve(tuned), watching.cfg, dtype=watching.dtype)
  if known := read_tuned(resolve(tuned)):
    looked = known.lp_comp
model, layers = models["not tuned"], watching.cfg.llm.layers

made = out / f"world_{videos}"
if not made.exists():
  world.write_world(
    made,
    [world.WorldSplit(name="heldout", videos=videos, fewest=4, most=6, questions=4)],
    seed=7,
    workers=2,
  )
batches, truths = [], []
for annotation in world.read_split(made, "heldout"):
  film = watching.encode(made / "heldout" / annotation["video"], show_progress=False)
  message = prompt.time_message(film.seconds, len(film.times))
  for text, truth, _ in world.questions_in(annotation):
    batches.append(
      generate.as_batch(
        prompt.question_prompt(watching.tokenizer, text, message),
        film.features[0],
        film.clip_frames,
      )
    )
    truths.append(truth)
print(f"{', '.join(models)}; {len(batches)} questions; looking at {looked}")

# %% [markdown]
# ## The schedule
#
# How many tokens of every group each layer works on, as the checkpoint was tuned and by the two
# cosines.

# %% tags=["picture-schedule"]
cosine, paper = COSINE, LPCompConfig("cosine_ceil", "suffix", looked.group)
tuning = {} if looked == cosine else {"as tuned": looked}
figure = plots.draw_schedules(
  tuning | {"cosine, as released": cosine, "cosine_ceil, the paper's": paper}, layers
)

# %% [markdown]
# ## Which tokens survive, and where they are on the frames
#
# A merged token stands for patches that looked alike, anywhere in the 8 frames of a clip. Patches
# whose token a layer has no more are faded; white lines part neighbours of different tokens. In the
# last row a colour is a group: one token per frame's worth, but not one frame's.

# %% tags=["picture-places"]
first = world.read_split(made, "heldout")[0]
path = str(made / "heldout" / first["video"])
scene = next(
  where for text, _, where in world.questions_in(first) if text.startswith(world.QUESTIONS["shape"])
)
clip = np.stack(list(movies.frames(watching.sample(path))))[
  scene * 8 : scene * 8 + watching.cfg.clip_frames
]
sources = jax.jit(
  lambda model, clips: token_merging.sources(
    model.vision(clips), watching.cfg.clip_tokens, watching.cfg.vision.heads
  )
)
with computing(model):
  into = sources(model, clip[None])
counts = lp_comp.counts(looked, layers)
steps = [layer for layer in range(layers) if layer == 0 or counts[layer] < counts[layer - 1]]
figure = plots.patch_places(
  clip, np.asarray(into[0]), looked, layers, steps[:: -max(1, len(steps) // 5)][::-1]
)

# %% [markdown]
# ## Where attention goes
#
# Shares of attention in percent, mean over heads, rows and all questions: to the prefix, to each
# place of the groups, to the text. Above from the text after the frames (time message, question,
# options), below from the visual tokens that stay to the last layer, which have to collect what the
# others know before those go.

# %% tags=["picture-flow"]
kept_flow = jax.jit(attention_flow)
under = {name: loading.with_lp_comp(one, looked) for name, one in models.items()}
with computing(model):
  shares = {
    name: np.mean([np.asarray(kept_flow(one, batch)[0]) for batch in batches], axis=0)
    for name, one in under.items()
  }
figure = plots.draw_flow(shares, dict.fromkeys(shares, looked))

# %% [markdown]
# Of the attention that the text pays to visual tokens, how much goes to those that stay to the end?
# Where only these are left it is all. Before that, what lies above the dotted line is more than
# their number explains.

# %% tags=["picture-kept"]
figure = plots.kept_share(shares, dict.fromkeys(shares, looked))

# %% [markdown]
# ## How far the answers move
#
# The logits of an answer's first token under milder and harder schedules, against those of the
# model before tuning without compression: how often the most probable token is the same, and the KL
# divergence. 95% intervals over the questions. `0.9` and `0.7` leave that share of the tokens at
# every layer; `one` leaves one per frame from the first layer on.


# %%
def geometric(rate):
  return tuple(max(1, round(looked.group * rate ** (layer + 1))) for layer in range(layers))


schedules = {
  "none": geometric(1.0),
  "0.9": geometric(0.9),
  "cosine": lp_comp.counts(cosine, layers),
  "0.7": geometric(0.7),
}
schedules |= {name: lp_comp.counts(one, layers) for name, one in tuning.items()} | {
  "one": geometric(0.0)
}
logits = jax.jit(lambda model, batch: generate.prefill(model, batch, 0).logits[0])
given = {}
with computing(model):
  for name, one in models.items():
    for schedule, left in schedules.items():
      squeezed = loading.with_lp_comp(one, LPCompConfig(left, "suffix", looked.group))
      given[name, schedule] = np.stack([np.asarray(logits(squeezed, batch)) for batch in batches])
work = {schedule: float(np.mean(left)) / looked.group for schedule, left in schedules.items()}
against = {
  key: [np.asarray(a) for a in agreement(one, given["not tuned", "none"])]
  for key, one in given.items()
}
for (name, schedule), (same, apart) in against.items():
  said = [watching.tokenizer.decode([token]).strip() for token in given[name, schedule].argmax(-1)]
  right = np.mean([text == truth for text, truth in zip(said, truths, strict=True)])
  print(
    f"{name:10} {schedule:10} work {work[schedule]:4.0%}  same {same.mean():4.0%}  KL "
    f"{apart.mean():6.3f}  right {right:4.0%}"
  )


# %% tags=["picture-agreement"]
def pick(which):
  return {name: [against[name, schedule][which] for schedule in schedules] for name in models}


figure = plots.draw_agreement(work, pick(0), pick(1))
