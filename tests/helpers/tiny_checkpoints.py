"""Checkpoints for tests: config.json files of the released models, and a two-layer model with the
official names.
"""

import ast
import dataclasses
import gzip
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.config import LPCompConfig, ModelConfig

MODEL = ModelConfig(
  clip_frames=8,
  yarn="checkpoint",
  dtype="bfloat16",
  param_dtype="float32",
  clips_per_chunk=1,
  attention="auto",
  remat=False,
)

LP_COMP = LPCompConfig(schedule="cosine", keep="suffix", group=16)

# The official file (FACTS.md 11) of the 2B model: only what decides sizes.
CONFIG = {
  "hidden_act": "silu",
  "hidden_size": 1536,
  "intermediate_size": 8960,
  "mm_hidden_size": 1024,
  "mm_local_num_frames": 4,
  "mm_projector_type": "tome16_mlp_hd64",
  "mm_vision_select_layer": -2,
  "mm_vision_tower": "umt-hd-large",
  "num_attention_heads": 12,
  "num_hidden_layers": 28,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_scaling": None,
  "rope_theta": 1000000.0,
  "tie_word_embeddings": True,
  "torch_dtype": "bfloat16",
  "use_sliding_window": False,
  "vocab_size": 151936,
}

SEVEN = {
  "hidden_size": 3584,
  "intermediate_size": 18944,
  "num_attention_heads": 28,
  "num_key_value_heads": 4,
  "tie_word_embeddings": False,
  "vocab_size": 152064,
}

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

TINY = {
  "hidden_size": 24,
  "intermediate_size": 40,
  "num_attention_heads": 3,
  "num_key_value_heads": 1,
  "vocab_size": 600,
  "num_hidden_layers": 2,
  "mm_hidden_size": 32,
  "tiny_vision": {
    "image_size": 64,
    "embed_dim": 32,
    "depth": 3,
    "heads": 2,
    "patch_size": 16,
    "mlp_ratio": 4.0,
  },
}

# Dimensions of the real 2B model -> of the tiny one; 600 rows are several blocks of reading and an
# uneven rest.
SHRINK = {151936: 600, 1536: 24, 256: 8, 8960: 40, 1024: 32, 3072: 96, 4096: 128}


def table(reference: pathlib.Path, model: str) -> dict[str, tuple[int, ...]]:
  """Official name -> shape."""
  lines = gzip.open(reference / f"params_{model}.tsv.gz", "rt").read().splitlines()
  return {
    name: tuple(ast.literal_eval(shape)) for name, shape, _ in (line.split("\t") for line in lines)
  }


def configured(directory: pathlib.Path, **changes) -> pathlib.Path:
  """A directory with a config.json; `...` as a value drops the key."""
  directory.mkdir(parents=True, exist_ok=True)
  config = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
  (directory / "config.json").write_text(json.dumps(config))
  return directory


def tiny_tensors(reference: pathlib.Path, dtype=np.float32, tied=True) -> dict[str, np.ndarray]:
  """Random tensors with the official names of a two-layer model, from the official list and not
  from our table.
  """
  rng = np.random.default_rng(0)
  tensors = {}
  for name, shape in table(reference, "2b_448").items():
    parts = name.split(".")
    number = next((int(p) for p in parts if p.isdigit()), 0)
    if number < 2 or "mm_projector" in name:
      tensors[name] = rng.normal(size=[SHRINK.get(n, n) for n in shape]).astype(dtype)
  if not tied:
    tensors["lm_head.weight"] = rng.normal(size=(600, 24)).astype(dtype)
  return tensors


def tiny(directory: pathlib.Path, tensors: dict[str, np.ndarray], **changes) -> pathlib.Path:
  """A torch directory with those tensors and a tokenizer file."""
  configured(
    directory, **(TINY | {"tie_word_embeddings": "lm_head.weight" not in tensors} | changes)
  )
  (directory / "vocab.json").write_text("{}")
  save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  return directory


def read_config(directory, **changes):
  return read_vlm_config(directory, dataclasses.replace(MODEL, **changes), LP_COMP)


def equal(a: dict, b: dict):
  """Same names, dtypes and bits."""
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


# Qwen2.5-7B-Instruct-1M
HIGH = {
  "rope_scaling": None,
  "max_position_embeddings": 1010000,
  "rope_theta": 1e7,
  "rms_norm_eps": 1e-5,
}

RELEASED = {  # variant -> official table, config.json beside CONFIG, image size
  "Qwen2_5-2B_res448": ("2b_448", {}, 448),
  "Qwen2-7B_res448": ("7b_448", SEVEN, 448),
  "Qwen2-7B_res224": ("7b_224", SEVEN | {"mm_vision_tower": "umt-large"}, 224),
  "Qwen2_5-7B-1M_res224": ("7b_224", SEVEN | HIGH | {"mm_vision_tower": "umt-large"}, 224),
  "Qwen2_5-7B_InternVideo2-1B": (
    "7b_internvideo2",
    SEVEN | {"mm_vision_tower": "internvideo2", "mm_hidden_size": 1408},
    224,
  ),
  "XComp": (
    "2b_448",
    {"tokenizer_model_max_length": 131072, "max_position_embeddings": 131072},
    448,
  ),
}
