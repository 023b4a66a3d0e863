"""Is a converted model the official one? Every stage against recorded outputs of the official code.

  python -m xcomp_jax.parity DIR

DIR has the form that VECTORS.md describes: config.json, weights, and npz files of arrays. Prints a table of
stages; exit status 0 only if everything that is there passes. A stage whose arrays are not there is listed as
absent. Runs in float32 at highest matmul precision; tolerances are those of VECTORS.md.

Where a stage's official input is recorded it starts from that, so that one wrong stage does not fail those
behind it; towers, merged tokens, projector, inserted sequence and training run from the pixels.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xcomp_jax import chat, encode, generate, qc_comp, weights
from xcomp_jax.config import LPCompConfig, ModelConfig, VisionConfig, VLMConfig
from xcomp_jax.data.batch import IGNORE, IMAGE_TOKEN, Bucket, Example, collate
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.files import command
from xcomp_jax.model import decoder, vlm
from xcomp_jax.model.decoder import Lengths
from xcomp_jax.model.merge import match, merge_step, merge_steps, metric
from xcomp_jax.model.vision import normalise, position_table
from xcomp_jax.model.vlm import VLM

Arrays = Mapping[str, np.ndarray]

VISION = 5e-5  # absolute
LLM = 1e-4  # absolute
LOSS = 1e-5  # of the loss
GRADIENT = (2e-5, 1e-4)  # absolute, or of an array's largest value
QC_SCORES, QC_CHAT = 1e-5, 1e-3  # of each score
TIE = 1e-6  # similarities closer than float32 noise are a tie, whose order is unspecified (FACTS.md 8)


class ParityError(ValueError):
  """A directory that can't be compared; the message says which file and why."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table; error and tolerance are those of the array that is nearest to failing."""

  stage: str
  arrays: int
  worst: str
  error: float
  tolerance: float

  @property
  def result(self) -> str:
    """'pass', 'FAIL' or 'absent'."""
    return "absent" if not self.arrays else "pass" if self.error <= self.tolerance else "FAIL"


def compare(stage: str, ours: Mapping, recorded: Arrays, absolute: float = 0.0, relative: float = 0.0) -> Row:
  """Compares each of our arrays that is recorded under the same name; tolerance 0 means exactly.

  `absolute` or `relative` to an array's largest value, whichever is larger.
  """
  rows = []
  for name in ours.keys() & recorded.keys():
    a, b = np.asarray(ours[name]), np.asarray(recorded[name])
    error = np.abs(a.astype(np.float64) - b).max(initial=0) if a.shape == b.shape else np.inf
    largest = np.abs(b).max(initial=0)
    rows.append((name, float(np.nan_to_num(error, nan=np.inf)), max(absolute, float(relative * largest))))
  nearness = lambda row: (row[1] > row[2], row[1] / row[2] if row[2] else row[1])
  name, error, tolerance = max(rows, key=nearness, default=("", 0.0, 0.0))
  return Row(stage, len(rows), name, error, tolerance)


# --- the stages ------------------------------------------------------------------------------------------------


def tables(cfg: VisionConfig, recorded: Arrays, stage: str) -> Row:
  """Position tables of the real geometries, at any width: whole (1, N, D), or the rows in NAME_rows."""
  ours = {}
  for name, array in recorded.items():
    if found := re.fullmatch(r"(hd|s224)_(8f|4f|img)", name):
      size, frames = found.groups()
      image_size, kind = (448, "umt-hd") if size == "hd" else (224, "umt")
      real = dataclasses.replace(cfg, image_size=image_size, patch_size=16, width=array.shape[-1], table=kind)
      table = position_table(real, {"8f": 8, "4f": 4, "img": 1}[frames])
      ours[name] = table[recorded[f"{name}_rows"]] if f"{name}_rows" in recorded else table[None]
  return compare(stage, ours, recorded, VISION)


def frames_of(recorded: Arrays) -> np.ndarray:
  """uint8[T, S, S, 3]; the files hold them without their enlargement."""
  n = int(recorded["upsample"])
  return recorded["frames_lowres_u8"].repeat(n, axis=1).repeat(n, axis=2)


def in_clips(frames: np.ndarray, recorded: Arrays) -> np.ndarray:
  """Cuts frames [T, ...] into clips [C, F, ...] as the recorded outputs were."""
  outputs = ("patch_embed", "vision_out", "tome_out", "projector_out")
  count = next((len(recorded[name]) for name in outputs if name in recorded), None)
  if not count or len(frames) % count:
    raise ParityError(f"no array of {', '.join(outputs)} says into how many clips {len(frames)} frames go")
  return frames.reshape(count, -1, *frames.shape[1:])


def vision(model: VLM, clips: np.ndarray, recorded: Arrays, label: str) -> tuple[list[Row], jax.Array]:
  """Position table to projector, for clips [C, F, S, S, 3]; also returns the merged tokens [C, N, D]."""
  cfg, tower = model.cfg.vision, model.vision
  frames = clips.shape[1]
  table = position_table(cfg, frames)
  ours = {"pos_embed": table[None], "img_pos_embed": position_table(cfg, 1)[None]}
  rows = [compare(f"{label}: position tables", ours, recorded, VISION)]

  # One clip at a time, as attention matrices of many clips may not fit.
  each = nnx.jit(lambda module, x: jax.lax.map(lambda clip: module(clip[None])[0], x))
  embedded = each(tower.patch_embed, clips)
  pixels = np.moveaxis(normalise(jnp.asarray(clips[0, :1])), -1, 1)
  ours = {"pixel_values_frame0": pixels, "patch_embed": embedded}
  rows.append(compare(f"{label}: patch embedding", ours, recorded, VISION))

  x = recorded.get("patch_embed", embedded) + table
  for i, block in enumerate(tower.blocks):
    y = each(block, x)
    rows.append(compare(f"{label}: block {i}", {f"block{i}": y}, recorded, VISION))
    x = recorded.get(f"block{i}", y)

  ours = {"vision_out": each(tower, clips), "vision_out_image": tower(jnp.asarray(clips[:1, :1]))}
  rows.append(compare(f"{label}: tower", ours, recorded, VISION))

  x, size = recorded.get("vision_out", ours["vision_out"]), jnp.ones((*ours["vision_out"].shape[:2], 1))
  steps = merge_steps(x.shape[1], frames * model.cfg.tokens_per_frame)
  rows.append(compare(f"{label}: merge steps", {"tome_r": np.array(steps)}, recorded))
  for i, r in enumerate(steps):
    name, stage = f"tome{i}_", f"{label}: merge {i}"
    x = jnp.asarray(x)
    score, partner, order = map(np.asarray, match(x, cfg.heads))
    merged, merged_size = merge_step(x, jnp.asarray(size), r, cfg.heads)
    ours = {f"{name}metric": metric(x, cfg.heads), f"{name}node_max": score, f"{name}x": merged}
    rows.append(compare(f"{stage}, x", ours, recorded, VISION))
    exact = {f"{name}node_idx": partner, f"{name}size": merged_size}
    if r < order.shape[1]:  # if all are merged, then their order changes nothing (VECTORS.md)
      exact[f"{name}order"] = same_ties(order, recorded.get(f"{name}order", order), score)
    rows.append(compare(f"{stage}, partner, order, size", exact, recorded))
    x, size = recorded.get(f"{name}x", merged), recorded.get(f"{name}size", merged_size)

  features = nnx.jit(vlm.encode)(model, clips[None])[0]
  rows.append(compare(f"{label}: merged tokens", {"tome_out": features}, recorded, VISION))
  rows.append(compare(f"{label}: projector", {"projector_out": model.projector(features)}, recorded, VISION))
  return rows, features


def same_ties(order: np.ndarray, recorded: np.ndarray, score: np.ndarray) -> np.ndarray:
  """`order` with the recorded choice wherever that has the same score."""
  if order.shape != recorded.shape:
    return order
  take = lambda o: np.take_along_axis(score, o, axis=-1)
  return np.where(np.abs(take(order) - take(recorded)) < TIE, recorded, order)


@functools.partial(nnx.jit, static_argnames=("prefix", "text", "room"))
def prefill_and_decode(model: VLM, x, prefix: int, text: int, room: int):
  """From an inserted sequence [S, D]: all states of the prefill, its logits, and `room` greedy tokens and logits."""
  one = lambda n: jnp.full(1, n, jnp.int32)
  lengths = Lengths(one(prefix), one((len(x) - prefix - text) // model.cfg.lp_comp.group), one(text))
  out = decoder.run(model.llm, x[None], lengths, prefix=prefix, text=text, caches=True, entering=True)
  def step(state, _):
    tokens, after = generate.decode(model, state, generate.Sampling(room, ()), 1)
    return after, (tokens[0, 0], state.logits[0])

  _, (tokens, new_logits) = jax.lax.scan(step, generate.start(model, out, text, one(text), room), length=room)
  return out, model.llm.logits(out.x)[0], tokens, new_logits


def slot_of(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Token ids before and after the visual slot."""
  slots = np.flatnonzero(ids == IMAGE_TOKEN)
  if len(slots) != 1:
    raise ParityError(f"input_ids has {len(slots)} visual slots ({IMAGE_TOKEN}); expected one")
  return ids[: slots[0]], ids[slots[0] + 1 :]


def llm(model: VLM, features: jax.Array | None, recorded: Arrays, variants: Arrays) -> list[Row]:
  """From the inserted sequence to greedy tokens, for the released setting and every other recorded one.

  features: [C, N, D] merged tokens of the same frames, if there are any.
  """
  prefix, text = slot_of(recorded["input_ids"])
  rows, x = [], recorded.get("inputs_embeds")
  if features is not None:
    placed = vlm.place(model, features[None], jnp.asarray(prefix[None]), jnp.asarray(text[None]))[0]
    rows.append(compare("inserted sequence", {"inputs_embeds": placed}, recorded, LLM))
    x = placed if x is None else x
  if x is None:
    raise ParityError("llm.npz has no inputs_embeds, and there are no frames to make it from")
  go = lambda model, room: prefill_and_decode(model, jnp.asarray(x), len(prefix), len(text), room)

  room = len(recorded.get("generated", ()))
  out, logits, tokens, new_logits = go(model, room)
  for i, state in enumerate(out.entering):
    rows.append(compare(f"state entering layer {i}", {f"hidden_in_{i:02}": state[0]}, recorded, LLM))
  ours = {}
  for i, (layer, state, cache) in enumerate(zip(model.llm.layers, out.entering, out.caches, strict=True)):
    names = {f"layer_out_pre_drop_{i:02}", f"layer_out_{i:02}"} & recorded.keys()
    if names:
      positions = jnp.arange(state.shape[1])[None]
      ours |= dict.fromkeys(names, layer(state, positions, cache.valid[:, : state.shape[1]])[0][0])
  rows.append(compare("layer outputs", ours, recorded, LLM))
  rows.append(compare("final norm", {"final_norm": model.llm.norm(out.x)[0]}, recorded, LLM))
  rows.append(compare("logits", {"logits": logits}, recorded, LLM))

  lengths = np.array([int(cache.valid.sum()) for cache in out.caches])
  ours = {f"layer_out_len_{i:02}": np.array(state.shape[1]) for i, state in enumerate(out.entering)}
  rows.append(compare("cache lengths", ours | {"kv_len": lengths}, recorded))
  ours = {}
  for i, cache in enumerate(out.caches):
    ours[f"k_cache_{i:02}"], ours[f"v_cache_{i:02}"] = (jnp.moveaxis(a[0], 0, 1) for a in (cache.key, cache.value))
  rows.append(compare("cached keys and values", ours, recorded, LLM))
  ours = {"prefill_first_pos": np.zeros_like(lengths), "prefill_last_pos": lengths - 1}
  rows.append(compare("prefill positions", ours, recorded))
  # Positions count the valid tokens of a layer, and a new token's is the length of that layer's own cache; that
  # keys are rotated by these shows in the caches and logits. Row 0 is the last token of the prefill.
  ours = {"decode_pos": lengths - 1 + np.arange(room)[:, None]}
  rows.append(compare("decode positions", ours, recorded))
  rows.append(compare("greedy tokens", {"generated": tokens}, recorded))
  rows.append(compare("decode logits", {"gen_logits": new_logits}, recorded, LLM))

  for name in sorted({key.partition(":")[0] for key in variants if ":" in key} - {"untied"}):
    mine = {key.partition(":")[2]: value for key, value in variants.items() if key.startswith(f"{name}:")}
    setting = dataclasses.replace(model.cfg, lp_comp=lp_comp_of(name, model.cfg.llm.layers))
    other = nnx.merge(nnx.graphdef(nnx.eval_shape(lambda c=setting: VLM(c, rngs=nnx.Rngs(0)))), nnx.state(model))
    varied, all_logits, tokens, new_logits = go(other, len(mine.get("generated", ())))
    ours = {f"hidden_in_{i:02}": state[0] for i, state in enumerate(varied.entering)}
    ours |= {"logits": all_logits, "gen_logits": new_logits}
    rows.append(compare(f"{name}: states, logits", ours, mine, LLM))
    ours = {"generated": tokens, "kv_len": np.array([int(cache.valid.sum()) for cache in varied.caches])}
    rows.append(compare(f"{name}: tokens, cache lengths", ours, mine))
  if "untied_lm_head_weight" in variants:
    cfg = dataclasses.replace(model.cfg, llm=dataclasses.replace(model.cfg.llm, tied=False))
    untied = nnx.eval_shape(lambda: decoder.Decoder(cfg, rngs=nnx.Rngs(0)))
    nnx.update(untied, nnx.state(model.llm))
    untied.lm_head.kernel = nnx.Param(jnp.asarray(variants["untied_lm_head_weight"].T))
    rows.append(compare("untied head", {"untied:logits": untied.logits(out.x)[0]}, variants, LLM))
  return rows


def lp_comp_of(name: str, layers: int) -> LPCompConfig:
  """The LP-Comp setting that a name in llm_variants.npz stands for (VECTORS.md)."""
  known = {"cosine_suffix": "suffix", "cosine_nosuffix": "uniform", "none": "none"}
  if name in known:
    return LPCompConfig("cosine", known[name], 16)
  if found := re.fullmatch(r"(nexthalf|avgpool)_(\d+(?:_\d+)*)_stride(\d+)", name):
    kind, after, stride = found[1], [int(n) for n in found[2].split("_")], int(found[3])
    schedule = tuple(16 // stride ** sum(layer >= n for n in after) for layer in range(layers))
    return LPCompConfig(schedule, "stride" if kind == "nexthalf" else "avgpool", 16)
  raise ParityError(f"llm_variants.npz has the setting {name!r}, which is not one of VECTORS.md")


def training(model: VLM, recorded: Arrays) -> list[Row]:
  """Loss, logits and gradients of one sample, from its frames."""
  ids, labels = recorded["input_ids"], recorded["labels"]
  prefix, text = slot_of(ids)
  frames = frames_of(recorded)
  clips = frames.reshape(-1, min(8, len(frames)), *frames.shape[1:])  # the release trains with clips of 8 frames
  example = Example(clips, ids.astype(np.int32), labels.astype(np.int32), np.zeros(len(ids), bool), 0)
  batch = collate([example], Bucket(len(clips), clips.shape[1], len(prefix), len(text)))
  graph, tuned, frozen = nnx.split(model, nnx.Any(nnx.PathContains("llm"), nnx.PathContains("projector")), ...)

  @jax.jit
  def run(tuned, frozen, batch):
    def loss_and_logits(tuned):
      model = nnx.merge(graph, tuned, frozen)
      loss = vlm.loss(model, batch, projector_max_frames=512).sum()  # quirk Q17
      return loss, model.llm.logits(vlm.forward(model, batch).x)[0]

    return jax.value_and_grad(loss_and_logits, has_aux=True)(tuned)

  (loss, logits), grads = run(tuned, frozen, batch)
  rows = [compare("training loss", {"loss": loss, "loss_fp64": loss}, recorded, relative=LOSS)]
  rows.append(compare("training logits", {"logits": logits}, recorded, LLM))
  # Row by row the next token's label; the very first token has none that predicts it.
  P, visual = len(prefix), len(logits) - len(prefix) - len(text)
  targets = np.concatenate([batch.targets[0, :P], np.full(visual - 1, IGNORE), batch.targets[0, P:]])
  after = np.concatenate([labels[:1], targets[:-1]])
  rows.append(compare("training labels", {"labels_after_drops": after}, recorded))
  by_path = weights.parameters(grads)
  entries = {e.name: e for e in weights.names(model.cfg) if e.path in by_path}
  ours = {f"grad:{e.name}": by_path[e.path].T if e.form == "transpose" else by_path[e.path] for e in entries.values()}
  rows.append(compare("gradients", ours, recorded, *GRADIENT))
  pairs = zip(recorded.get("grad_names", ()), recorded.get("grad_norms_fp64", ()))
  norms = {str(name): np.asarray(norm) for name, norm in pairs}
  ours = {name: jnp.linalg.norm(by_path[e.path].ravel()) for name, e in entries.items()}
  rows.append(compare("gradient norms", ours, norms, *GRADIENT))
  if strange := sorted(norms.keys() - ours.keys()):
    raise ParityError(f"train.npz has gradients of parameters that are not trained here: {', '.join(strange)}")
  return rows


# --- the command -----------------------------------------------------------------------------------------------


def qc_scores(model: VLM, recorded: Arrays) -> list[Row]:
  """QC-Comp's scores of every layer in one prefill of given visual tokens, for each recorded cut into windows."""
  prefix, text = slot_of(recorded["input_ids"])
  layers, units = model.cfg.llm.layers, int(recorded["n_clips"])
  header = int(recorded["first_conv_length"]) - len(prefix) - 1
  x = jnp.concatenate([model.llm.embed(jnp.asarray(prefix)), jnp.asarray(recorded["visual_tokens"])])
  one = lambda n: jnp.full(1, n, jnp.int32)
  lengths = Lengths(one(len(prefix)), one((len(x) - len(prefix)) // model.cfg.lp_comp.group), one(0))
  caches = nnx.jit(
    lambda llm, x: decoder.run(llm, x, lengths, prefix=len(prefix), text=0, caches=True, rotated=False, stop=layers - 1).caches
  )(model.llm, x[None])
  rows = []
  for name in sorted(recorded):
    if not (found := re.fullmatch(r"scores_(?:default|segments_(\d+)_(\d+))", name)):
      continue
    window, stride = (int(n or 0) for n in found.groups())
    cfg = dataclasses.replace(qc_comp.setting("official", 1), window=window, bias=int(recorded["query_bias"]))
    inside = qc_comp.windows(units, window, stride or 1, cover=False)
    times = np.bincount(inside.ravel(), minlength=units)
    plan = qc_comp.Plan(np.zeros(1, int), units, 1, inside, times == times.max())
    asked = qc_comp.together([qc_comp.asked(text, 0, header, cfg)])
    score = functools.partial(qc_comp.score, layers=range(layers), causal=False, prefix=len(prefix), units=units)
    ours = qc_comp.unit_scores(plan, np.asarray(nnx.jit(score)(model, caches, asked, inside)[0]))[0]
    rows.append(scores_row(f"QC-Comp: {name}", ours, plan, recorded[name], QC_SCORES))
  return rows


def scores_row(stage: str, ours: np.ndarray, plan: qc_comp.Plan, recorded: np.ndarray, tolerance: float) -> Row:
  """Scores [..., units] relative to the recorded ones, which are 1e9 exactly where a unit does not count (quirk Q3)."""
  if ours.shape != recorded.shape:
    return Row(stage, 1, "shape", np.inf, tolerance)
  ours = np.where(plan.counted, ours, 1e9)
  return Row(stage, 1, stage.rpartition(" ")[2], float(np.nan_to_num(np.abs(ours / recorded - 1), nan=np.inf).max()), tolerance)


def qc_chat(directory: pathlib.Path, cfg: VLMConfig, recorded: Arrays) -> list[Row]:
  """The whole of the official chat(): rounds, scores, selected frames, and the answer about them."""
  small = dataclasses.replace(cfg.vision, image_size=int(recorded["image_size"]))
  cfg = dataclasses.replace(
    cfg, vision=small, clip_frames=int(recorded["mm_local_num_frames"]), clips_per_chunk=16, attention="auto"
  )
  model = weights.load(directory, cfg, dtype=np.float32)
  frames, ids = frames_of(recorded), recorded["input_ids"].astype(np.int32)
  T, header = len(frames), int(recorded["first_conv_length"])
  rounds = len(recorded["round_starts"])
  mode = qc_comp.setting("official", int(recorded["select"]), repeat=rounds // -(-T // 512))
  plan = qc_comp.plan(T, cfg.clip_frames, mode)
  rows = [compare("QC-Comp: rounds", {"round_starts": plan.starts}, recorded)]
  none = np.zeros(len(ids), bool)
  question = Prompt(ids, np.full_like(ids, IGNORE), none, (0, header - 2))  # a user's turn ends in two tokens
  film = encode.encode(model, iter(frames), np.arange(T) / 8, T / 8, "", phases=chat.phases(T, cfg.clip_frames, mode))
  scores = chat.score_rounds(model, film, [question], plan, mode)[0]
  layers = qc_comp.scored_layers(mode, cfg.llm.layers)
  mine = qc_comp.unit_scores(plan, scores)
  rows.append(scores_row("QC-Comp: round_scores", mine, plan, recorded["round_scores"][:, layers[0] : layers[-1] + 1], QC_CHAT))
  kept = qc_comp.top(qc_comp.aggregate(plan, scores, T), mode.frames)
  rows.append(compare("QC-Comp: selected frames", {"selected_idx": kept}, recorded))
  wanted = recorded["final_generated"]
  batch = generate.as_batch(question, chat.selected(model, film, kept), cfg.clip_frames)
  (tokens,) = generate.generate(model, batch, generate.Sampling(len(wanted), ()))
  return [*rows, compare("QC-Comp: answer", {"final_generated": tokens}, recorded)]


def read(file: pathlib.Path) -> Arrays:
  """All arrays of an npz file; none if it is not there.

  Raises:
    ParityError: a file that can't be read.
  """
  if not file.exists():
    return {}
  try:
    with np.load(file) as arrays:
      return dict(arrays)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ParityError(f"{file} can't be read: {error}") from error


def check(directory: pathlib.Path) -> list[Row]:
  """Every stage of a directory.

  Raises:
    ParityError, weights.CheckpointError: a directory whose files can't be read or don't fit together.
  """
  model_config = ModelConfig(
    clip_frames="checkpoint", dtype="float32", param_dtype="float32",
    clips_per_chunk=1, attention="einsum", remat=False,
  )  # fmt: skip
  with jax.default_matmul_precision("highest"):
    cfg = weights.read_config(directory, model_config, LPCompConfig("cosine", "suffix", 16))
    model = weights.load(directory, cfg, dtype=np.float32)
    rows = []
    for name in ("pos_embed_tables.npz", "pos_embed_1024_rows.npz"):
      found = read(directory / name) or read(directory.parent / name)
      rows.append(tables(cfg.vision, found, name) if found else absent(name))
    main = read(directory / "vision.npz")
    features = None
    if main:
      frames = frames_of(main)
      main_rows, features = vision(model, in_clips(frames, main), main, "vision")
      rows += main_rows
      for file in sorted(directory.glob("vision_local*.npz")):
        other = read(file)
        rows += vision(model, in_clips(frames, other), other, file.stem)[0]
    else:
      rows.append(absent("vision.npz"))
    prompts, samples = read(directory / "llm.npz"), read(directory / "train.npz")
    rows += llm(model, features, prompts, read(directory / "llm_variants.npz")) if prompts else [absent("llm.npz")]
    rows += training(model, samples) if samples else [absent("train.npz")]
    scores, chat = read(directory / "qc_scores.npz"), read(directory / "qc_chat.npz")
    rows += qc_scores(model, scores) if scores else [absent("qc_scores.npz")]
    rows += qc_chat(directory, cfg, chat) if chat else [absent("qc_chat.npz")]
  return rows


def absent(file: str) -> Row:
  """A line for a file that is not there."""
  return Row(file, 0, "", 0.0, 0.0)


def show(rows: Sequence[Row]) -> str:
  """The table."""
  width = max(len(row.stage) for row in rows)
  lines = [f"{'stage':{width}}  arrays  max error  tolerance  result  worst array"]
  for row in rows:
    numbers = f"{row.error:9.1e}  {row.tolerance:9.1e}" if row.arrays else f"{'':20}"
    lines.append(f"{row.stage:{width}}  {row.arrays:6}  {numbers}  {row.result:6}  {row.worst}".rstrip())
  count = {result: sum(row.result == result for row in rows) for result in ("pass", "FAIL", "absent")}
  return "\n".join([*lines, f"{count['pass']} stages pass, {count['FAIL']} fail, {count['absent']} absent"])


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(prog="python -m xcomp_jax.parity", description=__doc__.splitlines()[0])
  parser.add_argument("directory", type=pathlib.Path, help="config.json, weights and recorded arrays (VECTORS.md)")
  args = parser.parse_args(argv)
  with command():
    rows = check(args.directory)
  print(show(rows))
  results = {row.result for row in rows}
  if "pass" not in results:
    print(f"error: nothing to compare in {args.directory}", file=sys.stderr)
  sys.exit(0 if "pass" in results and "FAIL" not in results else 1)


if __name__ == "__main__":
  main()
