"""One table between the official PyTorch names and our parameter paths, used both ways (FACTS.md 7,
11).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from xcomp_jax.config import InternVideo2Config, LLMConfig, TowerConfig, VLMConfig

TOWER = "model.vision_tower.vision_tower"
_NUMBER = re.compile(r"(?<=(?:blocks|layers)[./])\d+")  # of a layer


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
  form: Literal["copy", "transpose", "patch"]
  shape: tuple[int, ...]

  @property
  def ours(self) -> tuple[int, ...]:
    """Shape of our parameter."""
    if self.form == "patch":
      return math.prod(self.shape[1:]), self.shape[0]
    return self.shape[::-1] if self.form == "transpose" else self.shape


def families(entries: Sequence[Entry]) -> list[tuple[int, Entry]]:
  """The table in short: how many entries differ in the numbers of layers alone, and their first
  with these as `*`.
  """
  found: dict[str, list[Entry]] = {}
  for entry in entries:
    found.setdefault(_NUMBER.sub("*", entry.path), []).append(entry)

  def general(e):
    return dataclasses.replace(e, name=_NUMBER.sub("*", e.name), path=_NUMBER.sub("*", e.path))

  return [(len(alike), general(alike[0])) for alike in found.values()]


def names(cfg: VLMConfig) -> tuple[Entry, ...]:
  """Every parameter of the model, once (FACTS.md 11)."""
  v, d = cfg.vision, cfg.llm.width
  return (
    *tower_names(v),
    *_linear("model.mm_projector.mlp.0", "projector/fc1", v.width, d),
    *_linear("model.mm_projector.mlp.2", "projector/fc2", d, d),
    *_llm(cfg.llm),
  )


def tower_names(v: TowerConfig) -> tuple[Entry, ...]:
  """Every parameter of a tower, once."""
  return tuple(_internvideo2(v) if isinstance(v, InternVideo2Config) else _umt(v))


def _copy(name: str, path: str, *shape: int) -> Entry:
  return Entry(name, path, "copy", shape)


def _linear(name: str, path: str, inputs: int, outputs: int, bias: bool = True) -> Iterator[Entry]:
  yield Entry(f"{name}.weight", f"{path}/kernel", "transpose", (outputs, inputs))
  if bias:
    yield _copy(f"{name}.bias", f"{path}/bias", outputs)


def _patches(name: str, v: TowerConfig) -> Iterator[Entry]:
  yield Entry(
    f"{name}.weight",
    "vision/patch_embed/kernel",
    "patch",
    (v.width, 3, 1, v.patch_size, v.patch_size),
  )
  yield _copy(f"{name}.bias", "vision/patch_embed/bias", v.width)


def _umt(v: TowerConfig) -> Iterator[Entry]:
  def layer_norm(name, path):
    return _copy(f"{name}.weight", f"{path}/scale", v.width), _copy(
      f"{name}.bias", f"{path}/bias", v.width
    )

  yield from _patches(f"{TOWER}.encoder.patch_embed.proj", v)
  for i in range(v.layers):
    name, path = f"{TOWER}.encoder.blocks.{i}", f"vision/blocks/{i}"
    yield from layer_norm(f"{name}.norm1", f"{path}/norm1")
    yield from layer_norm(f"{name}.norm2", f"{path}/norm2")
    yield from _linear(f"{name}.attn.qkv", f"{path}/attn/qkv", v.width, 3 * v.width, bias=False)
    yield _copy(f"{name}.attn.q_bias", f"{path}/attn/q_bias", v.width)
    yield _copy(f"{name}.attn.v_bias", f"{path}/attn/v_bias", v.width)
    yield from _linear(f"{name}.attn.proj", f"{path}/attn/proj", v.width, v.width)
    yield from _linear(f"{name}.mlp.fc1", f"{path}/fc1", v.width, v.mlp_width)
    yield from _linear(f"{name}.mlp.fc2", f"{path}/fc2", v.mlp_width, v.width)
  yield from layer_norm(f"{TOWER}.encoder.vision_layernorm", "vision/norm")


def _internvideo2(v: InternVideo2Config) -> Iterator[Entry]:
  yield from _patches(f"{TOWER}.patch_embed.proj", v)
  yield _copy(f"{TOWER}.cls_token", "vision/cls_token", 1, 1, v.width)
  yield _copy(f"{TOWER}.pos_embed", "vision/pos_embed", 1, v.tokens(v.frames), v.width)
  yield _copy(f"{TOWER}.img_pos_embed", "vision/img_pos_embed", 1, v.tokens(1), v.width)
  for i in range(v.layers):
    name, path = f"{TOWER}.blocks.{i}", f"vision/blocks/{i}"
    for norm in ("norm1", "norm2", "attn.q_norm", "attn.k_norm"):
      yield _copy(f"{name}.{norm}.weight", f"{path}/{norm.replace('.', '/')}/scale", v.width)
    yield _copy(f"{name}.ls1.weight", f"{path}/ls1", v.width)
    yield _copy(f"{name}.ls2.weight", f"{path}/ls2", v.width)
    yield from _linear(f"{name}.attn.qkv", f"{path}/attn/qkv", v.width, 3 * v.width, bias=False)
    yield from _linear(f"{name}.attn.proj", f"{path}/attn/proj", v.width, v.width)
    yield from _linear(f"{name}.mlp.fc1", f"{path}/fc1", v.width, v.mlp_width)
    yield from _linear(f"{name}.mlp.fc2", f"{path}/fc2", v.mlp_width, v.width)


def _llm(m: LLMConfig) -> Iterator[Entry]:
  d, q, kv = m.width, m.heads * m.head_dim, m.kv_heads * m.head_dim
  yield _copy("model.embed_tokens.weight", "llm/embed/embedding", m.vocab_size, d)
  for i in range(m.layers):
    name, path = f"model.layers.{i}", f"llm/layers/{i}"
    yield _copy(f"{name}.input_layernorm.weight", f"{path}/input_norm/scale", d)
    yield _copy(f"{name}.post_attention_layernorm.weight", f"{path}/post_norm/scale", d)
    yield from _linear(f"{name}.self_attn.q_proj", f"{path}/q", d, q)
    yield from _linear(f"{name}.self_attn.k_proj", f"{path}/k", d, kv)
    yield from _linear(f"{name}.self_attn.v_proj", f"{path}/v", d, kv)
    yield from _linear(f"{name}.self_attn.o_proj", f"{path}/o", q, d, bias=False)
    yield from _linear(f"{name}.mlp.gate_proj", f"{path}/gate", d, m.mlp_width, bias=False)
    yield from _linear(f"{name}.mlp.up_proj", f"{path}/up", d, m.mlp_width, bias=False)
    yield from _linear(f"{name}.mlp.down_proj", f"{path}/down", m.mlp_width, d, bias=False)
  yield _copy("model.norm.weight", "llm/norm/scale", d)
  if not m.tied:
    yield from _linear("lm_head", "llm/lm_head", d, m.vocab_size, bias=False)
