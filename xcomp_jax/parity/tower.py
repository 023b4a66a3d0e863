"""Stages of `parity` up to the LLM: position tables, towers, token merging, projector."""

import pathlib
import re
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xcomp_jax.checkpoints import tensor_files, tensor_names
from xcomp_jax.config import InternVideo2Config, LLMConfig, LPCompConfig, VisionConfig, VLMConfig
from xcomp_jax.model import vlm
from xcomp_jax.model.internvideo2 import InternVideo2, position_start
from xcomp_jax.model.token_merging import match, merge_step, merge_steps, metric
from xcomp_jax.model.umt import normalise, position_table
from xcomp_jax.parity.comparison import Arrays, ParityError, Row, compare_arrays, read_arrays

VISION = 5e-5  # absolute
INTERNVIDEO2 = 1e-4  # likewise
TIE = (
  1e-6  # similarities closer than float32 noise are a tie, whose order is unspecified (FACTS.md 8)
)


def tables(recorded: Arrays, stage: str) -> Row:
  """Position tables of the real geometries, at any width: whole (1, N, D), or the rows in
  NAME_rows.
  """
  ours = {}
  for name, array in recorded.items():
    if found := re.fullmatch(r"(hd|s224)_(8f|4f|img)", name):
      image_size, kind = {"hd": (448, "umt-hd"), "s224": (224, "umt")}[found[1]]
      cfg = VisionConfig(
        image_size=image_size,
        patch_size=16,
        width=array.shape[-1],
        layers=1,
        heads=1,
        mlp_width=1,
        table=kind,
      )
      table = position_table(cfg, {"8f": 8, "4f": 4, "img": 1}[found[2]])
      ours[name] = table[recorded[f"{name}_rows"]] if f"{name}_rows" in recorded else table[None]
  return compare_arrays(stage, ours, recorded, VISION)


def frames_of(recorded: Arrays) -> np.ndarray:
  """uint8[T, S, S, 3]; the files hold them without their enlargement."""
  n = int(recorded["upsample"])
  return recorded["frames_lowres_u8"].repeat(n, axis=1).repeat(n, axis=2)


def in_clips(frames: np.ndarray, recorded: Arrays) -> np.ndarray:
  """Cuts frames [T, ...] into clips [C, F, ...] as the recorded outputs were."""
  outputs = ("patch_embed", "vision_out", "tome_out", "projector_out")
  count = next((len(recorded[name]) for name in outputs if name in recorded), None)
  if not count or len(frames) % count:
    raise ParityError(
      f"no array of {', '.join(outputs)} says into how many clips {len(frames)} frames go",
      where=outputs,
      frames=len(frames),
      found=count,
    )
  return frames.reshape(count, -1, *frames.shape[1:])


def vision(
  model: vlm.VLM, clips: np.ndarray, recorded: Arrays, label: str
) -> tuple[list[Row], jax.Array]:
  """Position table to projector, for clips [C, F, S, S, 3]; also returns the merged tokens [C, N,
  D].
  """
  frames = clips.shape[1]
  table = position_table(model.cfg.vision, frames)  # [N, D]
  # One clip at a time, as attention matrices of many clips may not fit.
  each = jax.jit(lambda module, x: jax.lax.map(lambda clip: module(clip[None])[0], x))
  embedded = each(model.vision.patch_embed, clips)  # [C, N, D]
  pixels = jnp.moveaxis(normalise(jnp.asarray(clips[0, :1])), -1, 1)  # [1, 3, S, S]
  out = each(model.vision, clips)  # [C, N, D]
  image = model.vision(jnp.asarray(clips[:1, :1]))  # [1, N / F, D]
  features = jax.jit(vlm.encode_frames)(model, clips)  # [C, tokens, D]
  rows = [
    compare_arrays(
      f"{label}: position tables",
      {"pos_embed": table[None], "img_pos_embed": position_table(model.cfg.vision, 1)[None]},
      recorded,
      VISION,
    ),
    compare_arrays(
      f"{label}: patch embedding",
      {"pixel_values_frame0": pixels, "patch_embed": embedded},
      recorded,
      VISION,
    ),
    *_blocks(
      each,
      model.vision.blocks,
      recorded.get("patch_embed", embedded) + table,
      recorded,
      label,
    ),
    compare_arrays(
      f"{label}: tower", {"vision_out": out, "vision_out_image": image}, recorded, VISION
    ),
    *_merges(
      recorded.get("vision_out", out),
      frames * model.cfg.tokens_per_frame,
      model.cfg.vision.heads,
      recorded,
      label,
    ),
    compare_arrays(f"{label}: merged tokens", {"tome_out": features}, recorded, VISION),
    compare_arrays(
      f"{label}: projector", {"projector_out": model.projector(features)}, recorded, VISION
    ),
  ]
  return rows, features


def _blocks(each: Callable, blocks: Iterable, x, recorded: Arrays, label: str) -> Iterator[Row]:
  """Each block, from what enters it [C, N, D]."""
  for i, block in enumerate(blocks):
    y = each(block, x)
    yield compare_arrays(f"{label}: block {i}", {f"block{i}": y}, recorded, VISION)
    x = recorded.get(f"block{i}", y)


def _merges(x, tokens: int, heads: int, recorded: Arrays, label: str) -> Iterator[Row]:
  """Each merge of tokens [C, N, D] down to so many, from what enters it."""
  size = jnp.ones((*x.shape[:2], 1))  # how many tokens each stands for
  steps = merge_steps(x.shape[1], tokens)
  yield compare_arrays(f"{label}: merge steps", {"tome_r": np.array(steps)}, recorded)
  for i, r in enumerate(steps):
    name, stage = f"tome{i}_", f"{label}: merge {i}"
    x = jnp.asarray(x)
    score, partner, order = map(np.asarray, match(x, heads))  # [C, N / 2]
    merged, merged_size = merge_step(x, jnp.asarray(size), r, heads)  # [C, N - r, D], [C, N - r, 1]
    numbers = {f"{name}metric": metric(x, heads), f"{name}node_max": score, f"{name}x": merged}
    exact = {f"{name}node_idx": partner, f"{name}size": merged_size}
    if r < order.shape[1]:  # if all are merged, then their order changes nothing (VECTORS.md)
      exact[f"{name}order"] = same_ties(order, recorded.get(f"{name}order", order), score)
    yield compare_arrays(f"{stage}, x", numbers, recorded, VISION)
    yield compare_arrays(f"{stage}, partner, order, size", exact, recorded)
    x, size = recorded.get(f"{name}x", merged), recorded.get(f"{name}size", merged_size)


def same_ties(order: np.ndarray, recorded: np.ndarray, score: np.ndarray) -> np.ndarray:
  """`order` with the recorded choice wherever that has the same score."""
  if order.shape != recorded.shape:
    return order
  ours, theirs = (np.take_along_axis(score, chosen, axis=-1) for chosen in (order, recorded))
  return np.where(np.abs(ours - theirs) < TIE, recorded, order)


def internvideo2(directory: pathlib.Path) -> list[Row]:
  """An InternVideo2 tower alone: its vectors.npz, of keys SET:NAME or NAME, and its one
  *.safetensors.

  Raises:
    ParityError: files that are not of this form. CheckpointError: tensors missing, unexpected or of
      other shapes.
  """
  sets: dict[str, dict[str, np.ndarray]] = {}
  for key, array in read_arrays(directory / "vectors.npz").items():
    name, _, inner = key.rpartition(":")
    sets.setdefault(name, {})[inner] = array
  rows = []
  for name, recorded in sorted(sets.items()):
    if missing := {"lowres_u8", "image_size", "heads"} - recorded.keys():
      keys = sorted(f"{name}:{key}" for key in missing)
      raise ParityError(
        f"{directory / 'vectors.npz'} lacks {', '.join(keys)}",
        where=directory / "vectors.npz",
        missing=keys,
      )
    rows += _internvideo2(directory, recorded, f"{directory.name} {name}".rstrip())
  return rows


def _internvideo2(directory: pathlib.Path, recorded: Arrays, label: str) -> list[Row]:
  v = tower_sizes(directory, int(recorded["image_size"]), int(recorded["heads"]))
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  arrays = tensor_files.read_torch(
    directory,
    tensor_names.tower_names(v),
    lambda path, stored: (first, np.dtype(np.float32)),
    by="vectors.npz",
  )
  graph, state = nnx.split(nnx.eval_shape(lambda: InternVideo2(_around(v), rngs=nnx.Rngs(0))))
  leaves = [arrays[f"vision/{path}"] for path in tensor_files.by_path(state)]
  tower = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))

  starts = {
    f"{kind}pos_embed_init_sincos": position_start(v.width, frames, v.image_size // v.patch_size)
    for kind, frames in (("", v.frames), ("img_", 1))
  }
  frames = _enlarged(recorded["lowres_u8"], v.image_size)
  run = jax.jit(lambda tower, frames: tower.with_class_token(frames))
  every, image = run(tower, frames), run(tower, frames[:, :1])  # [C, 1 + N, D]
  return [
    compare_arrays(f"{label}: first positions", starts, recorded, VISION),
    compare_arrays(
      f"{label}: tower",
      {"out_with_cls": every, "tower_out": every[:, 1:]},
      recorded,
      INTERNVIDEO2,
    ),
    compare_arrays(
      f"{label}: tower, image", {"tower_out_image": image[:, 1:]}, recorded, INTERNVIDEO2
    ),
  ]


def _around(v: InternVideo2Config) -> VLMConfig:
  """A config around a tower; its LLM is not built."""
  return VLMConfig(
    vision=v,
    llm=LLMConfig(
      vocab_size=1,
      width=2,
      layers=1,
      heads=1,
      kv_heads=1,
      head_dim=2,
      mlp_width=1,
      rope_theta=1.0,
      rope_scaling=None,
      norm_eps=1.0,
      tied=True,
      context=None,
    ),
    lp_comp=LPCompConfig(schedule="cosine", keep="none", group=16),
    clip_frames=v.frames,
    tokens_per_frame=16,
    dtype="float32",
    clips_per_chunk=1,
    attention="einsum",
    remat=False,
  )


def tower_sizes(directory: pathlib.Path, image_size: int, heads: int) -> InternVideo2Config:
  """Sizes of an InternVideo2 tower by the shapes of its tensors.

  Raises:
    ParityError: not one *.safetensors, or without the tensors that tell. CheckpointError: a file
      that can't be read.
  """
  if len(files := sorted(directory.glob("*.safetensors"))) != 1:
    raise ParityError(
      f"{directory} has vectors.npz and {len(files)} *.safetensors; there must be one",
      where=directory,
      found=len(files),
    )
  shapes = tensor_files.shapes(directory)
  telling = [
    f"{tensor_names.TOWER}.{name}"
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
  ]
  if missing := [name for name in telling if name not in shapes]:
    raise ParityError(
      f"{files[0]} lacks {', '.join(missing)}: no InternVideo2 tower",
      where=files[0],
      missing=missing,
    )
  (width, _, _, patch, _), (_, tokens, _), (mlp_width, _) = (shapes[name] for name in telling)
  layers = 1 + max(
    int(found[1])
    for name in shapes
    if (found := re.match(rf"{re.escape(tensor_names.TOWER)}\.blocks\.(\d+)\.", name))
  )
  return InternVideo2Config(
    image_size=image_size,
    patch_size=patch,
    width=width,
    layers=layers,
    heads=heads,
    mlp_width=mlp_width,
    frames=(tokens - 1) // (image_size // patch) ** 2,
  )


def _enlarged(lowres: np.ndarray, size: int) -> np.ndarray:
  """The frames uint8[C, F, S, S, 3] that VECTORS.md says are stored as [C, F, g, g, 3]."""
  times = size // lowres.shape[2]
  frames = lowres.repeat(times, axis=2).repeat(times, axis=3).astype(int) // 2
  row, column = np.indices((size, size))
  return (frames + ((row * 7 + column * 13) % 101)[:, :, None]).astype(np.uint8)
