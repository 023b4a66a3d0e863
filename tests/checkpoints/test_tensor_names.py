"""The table against the official parameter lists."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from tiny_checkpoints import RELEASED, configured, read_config, table

from xcomp_jax.checkpoints import loading, tensor_names
from xcomp_jax.checkpoints.tensor_names import families
from xcomp_jax.model import vlm


@pytest.mark.parametrize("variant", RELEASED)
def test_every_released_variant_maps_one_to_one_by_init_from_alone(reference, tmp_path, variant):
  official, changes, size = RELEASED[variant]
  cfg = read_config(configured(tmp_path, **changes), clip_frames="auto")
  entries = tensor_names.names(cfg)
  assert len({e.name for e in entries}) == len({e.path for e in entries}) == len(entries)
  assert {e.name: e.shape for e in entries} == table(reference, official)
  leaves = loading.parameters(loading.abstract(cfg))
  assert {e.path: e.ours for e in entries} == {path: leaf.shape for path, leaf in leaves.items()}
  shown = families(entries)  # counts, and one entry for all layers
  assert (
    sum(count for count, _ in shown) == len(entries)
    and len({e.name for _, e in shown}) == len(shown) < 50
  )
  assert (cfg.llm.layers, "llm/layers/*/q/kernel") in [(count, e.path) for count, e in shown]
  assert cfg.vision.image_size == size
  assert cfg.clip_frames == (4 if "InternVideo2" in variant else 8)
  frames = jax.ShapeDtypeStruct((2, cfg.clip_frames, size, size, 3), np.uint8)
  features = jax.eval_shape(vlm.encode_frames, loading.abstract(cfg), frames)
  assert features.shape == (2, cfg.clip_tokens, changes.get("mm_hidden_size", 1024))
  text = jax.ShapeDtypeStruct((1, 16), np.int32)
  placed = jax.eval_shape(
    lambda m, f, t: vlm.place_tokens(m, f[None], t, t), loading.abstract(cfg), features, text
  )
  assert placed.shape == (1, 32 + 2 * cfg.clip_tokens, cfg.llm.width)
  known = pathlib.Path(__file__).parents[2] / "configs/OpenGVLab" / f"VideoChat-Flash-{variant}"
  if variant != "XComp":  # the sizes that `plan` has without a network
    alike = read_config(known, clip_frames="auto")

    def like(cfg):
      return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, context=None))

    assert like(alike) == like(cfg)
