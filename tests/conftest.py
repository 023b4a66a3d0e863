"""The suite runs on 8 virtual CPU devices, in float32 at highest precision, with a compile
cache.
"""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import jaxtyping
import pytest
from absl import flags
from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int serves as a float
# shapes and types of annotations are checked
jaxtyping.install_import_hook("xcomp_jax", "conftest.typechecker")

flags.FLAGS.mark_as_parsed()  # grain's readers look at absl flags
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
  parser.addoption(
    "--kills",
    type=int,
    default=3,
    help="how often tests/training/test_pods.py kills a run (default: 3)",
  )
  parser.addoption("--kills-seed", type=int, default=0, help="of the moments when it does")


REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def reference() -> pathlib.Path:
  """Small copies of the official code's outputs."""
  return REFERENCE


@pytest.fixture(scope="session")
def tiny():
  """A function (**changes) -> VLMConfig: the full structure, at a size that runs in
  milliseconds.
  """
  import dataclasses

  from xcomp_jax.config import LLMConfig, LPCompConfig, VisionConfig, VLMConfig

  base = VLMConfig(
    vision=VisionConfig(
      image_size=48, patch_size=8, width=32, layers=2, heads=4, mlp_width=64, table="umt-hd"
    ),
    llm=LLMConfig(
      vocab_size=64,
      width=32,
      layers=4,
      heads=4,
      kv_heads=2,
      head_dim=8,
      mlp_width=64,
      rope_theta=1e6,
      rope_scaling=None,
      norm_eps=1e-6,
      tied=True,
      context=None,
    ),
    lp_comp=LPCompConfig("cosine", "suffix", 16),
    clip_frames=8,
    tokens_per_frame=16,
    dtype="float32",
    clips_per_chunk=2,
    attention="auto",
    remat=True,
  )
  return lambda **changes: dataclasses.replace(base, **changes)


@pytest.fixture(scope="session")
def sample():
  """A function (clips, before, after, seed) -> random Example with features of that many clips, and
  tokens around its visual slot.
  """
  import numpy as np

  from xcomp_jax.data.batch import IGNORE, IMAGE_TOKEN, Example

  def make(clips, before, after, seed=0, clip_frames=8, vocab=64):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, before + (clips > 0) + after).astype(np.int32)
    if clips:
      tokens[before] = IMAGE_TOKEN
    labels = np.where(
      (rng.random(len(tokens)) < 0.5) & (tokens != IMAGE_TOKEN), tokens, IGNORE
    ).astype(np.int32)
    labels[-1] = tokens[-1]
    query = np.zeros(len(tokens), bool)
    query[-2] = True
    visual = rng.normal(size=(clips * clip_frames, 16, 32)).astype(np.float32) if clips else None
    return Example(
      frames=clips * clip_frames,
      visual=visual,
      tokens=tokens,
      labels=labels,
      query=query,
      index=seed,
    )

  return make


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, reference):
  """A function (workdir, **{"train.steps": 2, ...}) -> RunConfig: a random two-layer model, 12
  samples of 0 to 3 clips.
  """
  import json

  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from xcomp_jax.checkpoints import saving
  from xcomp_jax.checkpoints.sizes import read_vlm_config
  from xcomp_jax.config import LPCompConfig, ModelConfig, RunConfig
  from xcomp_jax.config_io import from_dict
  from xcomp_jax.data import prompt
  from xcomp_jax.data.store import StoredSample
  from xcomp_jax.data.store_writing import write_store
  from xcomp_jax.model.vlm import VLM

  root = tmp_path_factory.mktemp("tiny_run")
  init = root / "init"
  init.mkdir()
  vocabulary = json.loads((reference / "qwen_subset" / "vocab.json").read_text())
  # a small table
  vocabulary = {token: i for i, token in enumerate(sorted(vocabulary, key=vocabulary.get))}
  (init / "vocab.json").write_text(json.dumps(vocabulary))
  (init / "merges.txt").write_text((reference / "qwen_subset" / "merges.txt").read_text())
  tokenizer = json.loads((reference / "qwen_subset" / "tokenizer_config.json").read_text())
  special = tokenizer["added_tokens_decoder"].values()
  tokenizer["added_tokens_decoder"] = {
    str(len(vocabulary) + i): token for i, token in enumerate(special)
  }
  (init / "tokenizer_config.json").write_text(json.dumps(tokenizer))
  values = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "mm_hidden_size": 32,
    "mm_local_num_frames": 4,
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "umt-hd-large",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": prompt.load_tokenizer(init).vocab_size,
    "tiny_vision": {
      "image_size": 48,
      "embed_dim": 32,
      "depth": 3,
      "heads": 4,
      "patch_size": 8,
      "mlp_ratio": 2,
    },
  }
  (init / "config.json").write_text(json.dumps(values))
  model = ModelConfig(
    clip_frames=4,
    yarn="checkpoint",
    dtype="float32",
    param_dtype="float32",
    clips_per_chunk=2,
    attention="auto",
    remat=True,
  )
  lp = LPCompConfig((8, 1), "suffix", 16)
  cfg = read_vlm_config(init, model, lp)
  saving.save_torch(
    root / "base", jax.jit(lambda: VLM(cfg, rngs=nnx.Rngs(0)))(), cfg, init, dtype=jnp.float32
  )

  def items(count, seed):
    rng = np.random.default_rng(seed)
    for i in range(count):
      clips = (3, 1, 2, 0)[i % 4]
      slot = "<image>\n" if clips else ""
      talk = (
        {"from": "human", "value": f"{slot}Which {i}?"},
        {"from": "gpt", "value": "AB"[i % 2] * (1 + 9 * (i % 3))},
      )
      message = prompt.time_message(clips / 2, clips * 4) if clips else ""
      visual = rng.integers(0, 256, (clips, 4, 48, 48, 3)).astype(np.uint8) if clips else None
      yield (
        StoredSample(
          id=f"s{i}",
          source=f"{i}.mp4",
          annotation="a.json",
          position=i,
          conversations=talk,
          time_message=message,
        ),
        visual,
      )

  write_store(root / "train", items(12, 0), image_size=48, clip_frames=4)
  write_store(root / "heldout", items(5, 1), image_size=48, clip_frames=4)
  base = {
    "seed": 0,
    "workdir": "",
    "init_from": str(root / "base"),
    "compilation_cache": None,
    "model": {
      "clip_frames": 4,
      "yarn": "checkpoint",
      "dtype": "float32",
      "param_dtype": "float32",
      "clips_per_chunk": 2,
      "attention": "auto",
      "remat": True,
    },
    "lp_comp": {"schedule": (8, 1), "keep": "suffix", "group": 16},
    "data": {
      "train": str(root / "train"),
      "weights": None,
      "heldout": None,
      "shapes": ((8, 2, 16, 160),),
      "prefix_length": 80,
      "frames_per_device": 128,
      "text_per_device": 2048,
      "mask": "assistant",
      "threads": 1,
      "prefetch": 1,
    },
    "optim": {
      "learning_rate": 1e-2,
      "warmup": 0.0,
      "weight_decay": 0.0,
      "clip_norm": 1.0,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
    },
    "train": {
      "batch_size": 3,
      "epochs": 1,
      "steps": None,
      "vision": False,
      "projector": True,
      "llm": True,
      "projector_max_frames": None,
      "log_every": 1,
      "eval_every": 2,
      "save_every": 2,
      "keep_last": 2,
      "keep_every": None,
    },
    "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "context": 1},
    "distributed": {
      "coordinator": None,
      "processes": None,
      "process": None,
      "start_seconds": 60,
      "heartbeat_seconds": 100,
    },
  }

  def make(workdir, **changes):
    values = json.loads(json.dumps(base | {"workdir": str(workdir)}))
    for key, value in changes.items():
      group, _, name = key.partition(".")
      if name:
        values[group][name] = value
      else:
        values[group] = values[group] | value if isinstance(value, dict) else value
    return from_dict(RunConfig, values)

  return make


@pytest.fixture(scope="session")
def write_features():
  """A function (config, folder): writes a run's training data as merged features of its tower.

  They are encoded in the run's dtype and kept in bfloat16.
  """
  import ml_dtypes
  import numpy as np

  from xcomp_jax.checkpoints import loading
  from xcomp_jax.checkpoints.finding import resolve
  from xcomp_jax.checkpoints.sizes import read_vlm_config
  from xcomp_jax.data.store import Features, open_store
  from xcomp_jax.data.store_writing import write_store
  from xcomp_jax.inference import encoded_video

  def write(config, folder):
    cfg = read_vlm_config(resolve(config.init_from), config.model, config.lp_comp)
    model = loading.load_model(resolve(config.init_from), cfg, dtype=lambda _: np.dtype(cfg.dtype))
    frames = open_store(config.data.train)

    def items():
      for i, sample in enumerate(frames.samples):
        clips = (
          list(encoded_video.encode_in_chunks(model, frames.visual(i))) if sample.frames else None
        )
        yield sample, clips and np.stack(clips).astype(ml_dtypes.bfloat16)

    made = Features(loading.tower_identity(model), cfg.tokens_per_frame, cfg.vision.width)
    write_store(
      folder,
      items(),
      image_size=frames.layout.image_size,
      clip_frames=frames.layout.clip_frames,
      features=made,
    )

  return write


@pytest.fixture(scope="session")
def features(tiny_run, write_features, tmp_path_factory) -> str:
  """The training data of `tiny_run` as features, encoded in float32: a folder."""
  folder = tmp_path_factory.mktemp("features") / "train"
  write_features(tiny_run(folder), folder)
  return str(folder)
