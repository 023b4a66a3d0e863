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
# # Ask a video
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/xcomp_jax/blob/main/notebooks/ask.ipynb)
#
# A video is encoded once; every question then picks the frames that it needs (QC-Comp), and a tuned
# model answers from one token per frame in its last layers (LP-Comp). By default the video is a
# synthetic one of many one-second scenes, of which one shows a moving shape and one a digit, and
# the model is the miniature that comes with the package. It was trained on videos of up to six
# scenes.

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
# ## What to ask
#
# `checkpoint` is a directory or a hub id, such as `OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448` (an
# accelerator is needed for that). Empty: the miniature, as the notebook `tune` has tuned it on this
# machine (in Colab every notebook has one of its own), or untuned and without LP-Comp. With a
# `video` of your own, also write a `question`.

# %% tags=["parameters"]
# @title { display-mode: "form" }
checkpoint = ""  # @param {type: "string"}
video = ""  # @param {type: "string"}
question = ""  # @param {type: "string"}
mode = "aligned"  # @param ["aligned", "local", "official", "global"]
frames = 64  # @param {type: "integer"}
scenes = 128  # @param {type: "integer"}
out = "runs/notebooks/ask"  # @param {type: "string"}

# %% [markdown]
# ## The video
#
# Questions about the synthetic one have four options, as the tiny model was taught; `scene` is the
# second that shows the answer.

# %%
from matplotlib import pyplot as plt

from xcomp_jax import files
from xcomp_jax.inference import html_report, pictures
from xcomp_jax.synthetic import world
from xcomp_jax.viz import plots

plt.rcParams.update(plots.STYLE | {"figure.dpi": 110})
out = pathlib.Path(out)
checkpoint = checkpoint or next(
  c for c in ("runs/notebooks/tune/export", "assets/tiny") if os.path.exists(c)
)
path, questions, shown = video, [question], None
if video and not question.strip():
  raise SystemExit("a video of your own needs a question")
if not video:
  made = out / f"world_{scenes}"
  if not made.exists():
    world.write_world(
      made,
      [world.WorldSplit(name="heldout", videos=1, fewest=scenes, most=scenes, questions=4)],
      seed=5,
      workers=1,
    )
  (annotation,) = world.read_split(made, "heldout")
  path = str(made / "heldout" / annotation["video"])
  questions, truths, shown = zip(*world.questions_in(annotation), strict=True)
  for text, truth, scene in zip(questions, truths, shown, strict=True):
    print(f"scene {scene:4}  {text.splitlines()[0]}  {truth}")

# %% [markdown]
# ## Encode it once

# %%
model = xcomp_jax.load(checkpoint, select=frames, mode=mode, min_frames=8)
film = model.encode(path)
print(f"{checkpoint}: LP-Comp {model.cfg.lp_comp}")
print(
  f"{len(film.times)} frames of {film.seconds:.0f} s, {film.clips} clips, "
  f"{sum(clip.nbytes for clip in film.features[0]) / 1e6:.1f} MB of features"
)

# %% [markdown]
# ## Ask

# %%
# each question by itself; `model.chat(film)` keeps a conversation
answers = [model.ask(film, text) for text in questions]
for answer in answers:
  print(answer.question, "->", answer, end="\n\n")
if shown:
  right = [answer.text == truth for answer, truth in zip(answers, truths, strict=True)]
  print(f"{sum(right)} of {len(right)} right; guessing has 1 of 4")

# %% [markdown]
# ## Where it looked
#
# Relevance of every clip to each question, selected frames in blue. Where the truth is known, a
# triangle marks the scene that shows the
# answer: a selection that misses it leaves the model to guess.

# %% tags=["picture-relevance"]
figure = pictures.draw_relevance(answers, shown and [(scene, scene + 1) for scene in shown])

# %% [markdown]
# ## What it cost
#
# The same as a page that needs nothing else, with the best clips of every question and the seconds
# that went into it. The first question waits for programs to be compiled. Later ones find them, and
# what the visual tokens left in the LLM.

# %%
from IPython.display import HTML

page = html_report.page(film, answers, film.spent)
files.write_file(out / "report.html", page)
print(out / "report.html")
HTML(html_report.framed(page, 800))
