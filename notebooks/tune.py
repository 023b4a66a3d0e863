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
# # Tune the tiny model
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/xcomp_jax/blob/main/notebooks/tune.ipynb)
#
# Supervised compression tuning (SCT) with the real training loop, on synthetic videos: the
# miniature model that comes with the package learns to work with one visual token per frame. It
# takes about ten minutes on a laptop's CPU. `configs/sct.py` has the values of the paper's runs.

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

# %% tags=["parameters"]
# @title { display-mode: "form" }
videos = 800  # @param {type: "integer"}
heldout = 200  # @param {type: "integer"}
steps = 100  # @param {type: "integer"}
looks = 2  # @param {type: "integer"}
out = "runs/notebooks/tune"  # @param {type: "string"}

# %% [markdown]
# ## Videos
#
# Each is of four to six one-second scenes. One shows a moving shape, one a digit, each question
# asks for one attribute with four options. The videos are decoded once; here is what the training
# set holds, one row per video.

# %% tags=["picture-videos"]
import dataclasses

from matplotlib import pyplot as plt

from xcomp_jax import demo, export
from xcomp_jax.config import LPCompConfig
from xcomp_jax.config_io import from_command_line
from xcomp_jax.data.inspection import contact_sheet
from xcomp_jax.data.store import open_store
from xcomp_jax.synthetic import world
from xcomp_jax.training import loop
from xcomp_jax.viz import plots

plt.rcParams.update(plots.STYLE | {"figure.dpi": 110})
out = pathlib.Path(out)
demo.clear(out, demo.MADE)
splits = [
  world.WorldSplit(name="train", videos=videos, fewest=4, most=6, questions=4),
  dataclasses.replace(demo.HELDOUT, videos=heldout),
]
world.write_world(out / "world", splits, seed=demo.SEED, workers=2)
for split in splits:
  demo.decode_world(out / "world", out / "data" / split.name, split.name)
contact_sheet(open_store(out / "data" / "train"), rows=4)

# %% [markdown]
# ## Before
#
# The base model was trained without compression. Cutting its tokens unprepared costs answers.

# %%
values = {
  "init_from": demo.BASE,
  "workdir": out / "run",
  "data.train": out / "data/train",
  "data.heldout": out / "data/heldout",
  "train.steps": steps,
  "train.log_every": 1,
  "train.eval_every": max(1, steps // looks),
}
config = from_command_line(
  ["tune", "--config=configs/sct.py:tiny", *(f"--config.{k}={v}" for k, v in values.items())]
)
whole = LPCompConfig(config.lp_comp.schedule, "none", config.lp_comp.group)
right = {
  "no compression": demo.right_answers(demo.BASE, whole, config),
  "LP-Comp,\nnot trained": demo.right_answers(demo.BASE, config.lp_comp, config),
}
print(f"LP-Comp: {config.lp_comp.schedule} tokens of {config.lp_comp.group} in the layers")
for name, one in right.items():
  print(f"{' '.join(name.split()):22} {one.mean():.1%} of {len(one)} right")

# %% [markdown]
# ## Tune
#
# Interrupt it and run the cell again: it goes on where it was.

# %%
seen = {"train": [], "heldout": [(0, right["LP-Comp,\nnot trained"].mean())], "goodput": []}
watched = {"train": "loss", "heldout": "accuracy", "goodput": "step"}

# %%
result = loop.train(
  config, watch=lambda step, group, values: seen[group].append((step, values[watched[group]]))
)

# %% [markdown]
# ## Watch it learn

# %% tags=["picture-learning"]
figure = plots.learning(seen["train"], seen["heldout"], heldout, chance=0.25)

# %% [markdown]
# ## After
#
# The tuned model goes out in the official PyTorch layout, is read back, and answers the same
# questions.

# %%
export.main(
  [
    "--checkpoint",
    str(out / "run"),
    "--format=torch",
    "--out",
    str(out / "export"),
    "--overwrite",
  ]
)
right["LP-Comp\nafter SCT"] = demo.right_answers(str(out / "export"), config.lp_comp, config)
_, untrained, tuned = right.values()
more, low, high = demo.gain(untrained, tuned)
print(f"gain by SCT, question by question: {more:+.1%}, 95% interval {low:+.1%} to {high:+.1%}")

# %% tags=["picture-accuracy"]
figure = plots.draw_bars(
  {name: int(one.sum()) for name, one in right.items()}, heldout, chance=0.25
)
