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
# # Convert and check a checkpoint
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/xcomp_jax/blob/main/notebooks/convert.ipynb)
#
# From an official checkpoint to JAX and back: which tensor goes where, whether the numbers are
# those of the official code on this machine's device, and whether what is written is what was read.
# `checkpoint` is a directory or a hub id, such as `OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448`;
# the default is the miniature that comes with the package. All of it takes about ten minutes on a
# laptop's CPU, most of them for the recorded outputs.

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
checkpoint = "assets/tiny"  # @param {type: "string"}
vectors = "tests/reference/dev"  # @param {type: "string"}
beside_cpu = True  # @param {type: "boolean"}
exports = True  # @param {type: "boolean"}
out = "runs/notebooks/convert"  # @param {type: "string"}

# %% [markdown]
# ## Which tensor goes where
#
# One table serves both directions; `*` is a layer's number. A tensor that is missing, left over or
# of another shape would be an error here.

# %%
import dataclasses

import numpy as np
from flax import nnx
from matplotlib import pyplot as plt

from xcomp_jax import export
from xcomp_jax.checkpoints import loading, tensor_names
from xcomp_jax.data import prompt
from xcomp_jax.data import video as movies
from xcomp_jax.inference import generate
from xcomp_jax.inference.places import computing
from xcomp_jax.model import vlm
from xcomp_jax.parity import comparison, parity
from xcomp_jax.synthetic import world
from xcomp_jax.viz import flow, plots

plt.rcParams.update(plots.STYLE | {"figure.dpi": 110})
out = pathlib.Path(out)
model = xcomp_jax.load(checkpoint, select=0, min_frames=8, max_frames=8)
stored = loading.stored(model.directory, model.cfg)
for count, entry in tensor_names.families(tensor_names.names(model.cfg)):
  print(f"{count:3} x {entry.name:67} {list(entry.shape)!s:19} {entry.form:9} {entry.path}")
print(
  f"{len(stored)} tensors as {', '.join(sorted({str(dtype) for dtype in stored.values()}))} in "
  f"{model.directory}"
)

# %% [markdown]
# ## A forward pass

# %%
made = out / "world"
if not made.exists():
  world.write_world(
    made,
    [world.WorldSplit(name="heldout", videos=1, fewest=1, most=1, questions=4)],
    seed=1,
    workers=1,
  )
(annotation,) = world.read_split(made, "heldout")
path = str(made / "heldout" / annotation["video"])
film = model.encode(path)
answers = model.ask(film, [text for text, _, _ in world.questions_in(annotation)])
for (text, truth, _), answer in zip(world.questions_in(annotation), answers, strict=True):
  print(f"{text.splitlines()[0]}  {answer.text}  (right: {truth})")

# %% [markdown]
# ## This device against a CPU
#
# The same weights and frames, here in the dtype of the device (bfloat16 but on CPUs), on the CPU in
# float32 with plain attention. This works for any checkpoint; the 2B model takes a minute and 10 GB
# of memory. bfloat16 moves logits by percents, so look at the token and at the KL divergence.

# %%
if beside_cpu:
  cpu, cfg = (
    jax.devices("cpu")[0],
    dataclasses.replace(model.cfg, dtype="float32", attention="xla_chunked"),
  )
  exact = jax.tree.map(
    lambda a: jax.device_put(np.asarray(a, np.float32), cpu), nnx.state(model.vlm)
  )
  exact = nnx.merge(nnx.graphdef(loading.abstract(cfg)), exact)
  frames = np.stack(list(movies.frames(model.sample(path))))
  clips = frames.reshape(-1, film.clip_frames, *frames.shape[1:])
  asked = prompt.question_prompt(
    model.tokenizer,
    world.questions_in(annotation)[0][0],
    prompt.time_message(film.seconds, len(film.times)),
  )

  def logits(model):
    features = np.asarray(jax.jit(vlm.encode_frames)(model, clips))
    batch = generate.as_batch(asked, features, film.clip_frames)
    return np.asarray(
      jax.jit(lambda model, batch: generate.prefill(model, batch, 0).logits)(model, batch)
    )

  with computing(model.vlm):
    ours = logits(model.vlm)
  with jax.default_device(cpu), jax.default_matmul_precision("highest"):
    theirs = logits(exact)
  (same,), (apart,) = flow.agreement(ours, theirs)
  print(
    f"{jax.devices()[0].device_kind}, {model.dtype}: largest difference "
    f"{np.abs(ours - theirs).max():.2e} of logits up to {np.abs(theirs).max():.1f}"
  )
  print(f"same first token: {bool(same)}; KL {apart:.2e} nats")

# %% [markdown]
# ## This code against the official one
#
# Outputs of the official PyTorch code for a small model of random weights, recorded stage by stage,
# and ours on this device in float32 at the highest matmul precision. The tolerances are those of
# CPUs and are never loosened: a device whose float32 products are less exact shows here.

# %% tags=["picture-parity"]
rows = parity.compare_directory(pathlib.Path(vectors))
print(
  f"{jax.devices()[0].device_kind}: tolerance {parity.LLM:.0e} for states and logits, "
  f"{parity.LOSS:.0e} of the loss, {parity.QC_SCORES:.0e} of scores"
)
print(comparison.comparison_table(rows))
figure = plots.draw_errors(rows)

# %% [markdown]
# ## Out and back
#
# Both formats are written and read again: every parameter must be equal, bit by bit.

# %%
if exports:
  kept = loading.parameters(loading.load_model(model.directory, model.cfg))
  for form in ("torch", "orbax"):
    export.main(
      [
        "--checkpoint",
        str(model.directory),
        f"--format={form}",
        "--out",
        str(out / form),
        "--overwrite",
      ]
    )
    back = loading.parameters(loading.load_model(out / form, model.cfg))
    equal = sum(
      np.asarray(a).tobytes() == np.asarray(back[path]).tobytes() for path, a in kept.items()
    )
    print(f"{form}: {equal} of {len(kept)} parameters equal")
