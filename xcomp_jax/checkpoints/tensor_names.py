"""Where a checkpoint's tensor gets its name: one table between the official PyTorch names and our
parameter paths, used both ways (FACTS.md 7, 11).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from xcomp_jax.config import InternVideo2Config, LLMConfig, TowerConfig, VLMConfig

TOWER = "model.vision_tower.vision_tower"
_NUMBER = re.compile(r"(?<=(?:blocks|layers)[./])\d+")  # of a layer
Form = Literal["copy", "transpose", "patch"]

# What a module consists of: the ends of the official name and of our path, and the form.
PARTS: dict[str, tuple[tuple[str, str, Form], ...]] = {
  "linear": ((".weight", "/kernel", "transpose"), (".bias", "/bias", "copy")),
  "matrix": ((".weight", "/kernel", "transpose"),),
  "patches": ((".weight", "/kernel", "patch"), (".bias", "/bias", "copy")),
  "layer norm": ((".weight", "/scale", "copy"), (".bias", "/bias", "copy")),
  "norm": ((".weight", "/scale", "copy"),),
  "embedding": ((".weight", "/embedding", "copy"),),
  "scale": ((".weight", "", "copy"),),
  "parameter": (("", "", "copy"),),
}
# A module: official name, our path, a key of PARTS, and the official sizes; of these the first is
# its bias's.
Module = tuple


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter under both names.

  name: the official one. shape: the official one; ours is `ours`.
  path: ours, as `mesh.path_name` writes it ('llm/layers/0/q/kernel').
  form: how official becomes ours: 'copy'; 'transpose' [out, in] -> [in, out]; 'patch' [D, 3, 1, p,
  p] -> [p*p*3, D].
  """

  name: str
  path: str
  form: Form
  shape: tuple[int, ...]

  @property
  def ours(self) -> tuple[int, ...]:
    """Shape of our parameter."""
    if self.form == "patch":
      return math.prod(self.shape[1:]), self.shape[0]
    return self.shape[::-1] if self.form == "transpose" else self.shape


def names(cfg: VLMConfig) -> tuple[Entry, ...]:
  """Every parameter of the model, once (FACTS.md 11)."""
  d = cfg.llm.width
  projector = [
    ("model.mm_projector.mlp.0", "projector/fc1", "linear", d, cfg.vision.width),
    ("model.mm_projector.mlp.2", "projector/fc2", "linear", d, d),
  ]
  return (*tower_names(cfg.vision), *_entries(projector), *_entries(_llm(cfg.llm)))


def tower_names(v: TowerConfig) -> tuple[Entry, ...]:
  """Every parameter of a tower, once."""
  return tuple(_entries(_internvideo2(v) if isinstance(v, InternVideo2Config) else _umt(v)))


def families(entries: Sequence[Entry]) -> list[tuple[int, Entry]]:
  """The table in short: how many entries differ in the numbers of layers alone, and their first
  with these as `*`.
  """
  found: dict[str, list[Entry]] = {}
  for entry in entries:
    found.setdefault(_NUMBER.sub("*", entry.path), []).append(entry)
  return [
    (len(alike), dataclasses.replace(alike[0], name=_NUMBER.sub("*", alike[0].name), path=path))
    for path, alike in found.items()
  ]


def _entries(modules: Sequence[Module]) -> Iterator[Entry]:
  for name, path, kind, *sizes in modules:
    for official, ours, form in PARTS[kind]:
      shape = sizes[:1] if official == ".bias" else sizes
      yield Entry(name + official, path + ours, form, tuple(shape))


def _layers(name: str, path: str, count: int, modules: Sequence[Module]) -> list[Module]:
  """The modules of all layers, from those of one."""
  return [
    (f"{name}.{i}.{inner}", f"{path}/{i}/{ours}", *rest)
    for i in range(count)
    for inner, ours, *rest in modules
  ]


def _umt(v: TowerConfig) -> list[Module]:
  d, p = v.width, v.patch_size
  layer = [
    ("norm1", "norm1", "layer norm", d),
    ("norm2", "norm2", "layer norm", d),
    ("attn.qkv", "attn/qkv", "matrix", 3 * d, d),
    ("attn.q_bias", "attn/q_bias", "parameter", d),
    ("attn.v_bias", "attn/v_bias", "parameter", d),
    ("attn.proj", "attn/proj", "linear", d, d),
    ("mlp.fc1", "fc1", "linear", v.mlp_width, d),
    ("mlp.fc2", "fc2", "linear", d, v.mlp_width),
  ]
  return [
    (f"{TOWER}.encoder.patch_embed.proj", "vision/patch_embed", "patches", d, 3, 1, p, p),
    *_layers(f"{TOWER}.encoder.blocks", "vision/blocks", v.layers, layer),
    (f"{TOWER}.encoder.vision_layernorm", "vision/norm", "layer norm", d),
  ]


def _internvideo2(v: InternVideo2Config) -> list[Module]:
  d, p = v.width, v.patch_size
  layer = [
    ("norm1", "norm1", "norm", d),
    ("norm2", "norm2", "norm", d),
    ("attn.q_norm", "attn/q_norm", "norm", d),
    ("attn.k_norm", "attn/k_norm", "norm", d),
    ("ls1", "ls1", "scale", d),
    ("ls2", "ls2", "scale", d),
    ("attn.qkv", "attn/qkv", "matrix", 3 * d, d),
    ("attn.proj", "attn/proj", "linear", d, d),
    ("mlp.fc1", "fc1", "linear", v.mlp_width, d),
    ("mlp.fc2", "fc2", "linear", d, v.mlp_width),
  ]
  return [
    (f"{TOWER}.patch_embed.proj", "vision/patch_embed", "patches", d, 3, 1, p, p),
    (f"{TOWER}.cls_token", "vision/cls_token", "parameter", 1, 1, d),
    (f"{TOWER}.pos_embed", "vision/pos_embed", "parameter", 1, v.tokens(v.frames), d),
    (f"{TOWER}.img_pos_embed", "vision/img_pos_embed", "parameter", 1, v.tokens(1), d),
    *_layers(f"{TOWER}.blocks", "vision/blocks", v.layers, layer),
  ]


def _llm(m: LLMConfig) -> list[Module]:
  d, q, kv = m.width, m.heads * m.head_dim, m.kv_heads * m.head_dim
  layer = [
    ("input_layernorm", "input_norm", "norm", d),
    ("post_attention_layernorm", "post_norm", "norm", d),
    ("self_attn.q_proj", "q", "linear", q, d),
    ("self_attn.k_proj", "k", "linear", kv, d),
    ("self_attn.v_proj", "v", "linear", kv, d),
    ("self_attn.o_proj", "o", "matrix", d, q),
    ("mlp.gate_proj", "gate", "matrix", m.mlp_width, d),
    ("mlp.up_proj", "up", "matrix", m.mlp_width, d),
    ("mlp.down_proj", "down", "matrix", d, m.mlp_width),
  ]
  return [
    ("model.embed_tokens", "llm/embed", "embedding", m.vocab_size, d),
    *_layers("model.layers", "llm/layers", m.layers, layer),
    ("model.norm", "llm/norm", "norm", d),
    *([] if m.tied else [("lm_head", "llm/lm_head", "matrix", m.vocab_size, d)]),
  ]
