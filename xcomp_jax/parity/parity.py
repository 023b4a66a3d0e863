"""Is a converted model the official one? Every stage against recorded outputs of the official code.

  python -m xcomp_jax.parity DIR

DIR has the form that VECTORS.md describes: config.json, weights, and npz files of arrays; or
vectors.npz and one *.safetensors, of an InternVideo2 tower alone; or both, that in a folder
internvideo2_tiny; or JSON files of chosen frames, such as cuts.json, of which DIR may also be one.
Prints a table of stages; exit status 0 only if everything that is there passes. A stage whose
arrays are not there is listed as absent. Runs in float32 at highest matmul precision; tolerances
are those of VECTORS.md.

Where a stage's official input is recorded it starts from that, so that one wrong stage does not
fail those behind it; towers, merged tokens, projector, inserted sequence and training run from the
pixels.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xcomp_jax.checkpoints import loading, saving, sizes, tensor_names
from xcomp_jax.cli import command
from xcomp_jax.config import COSINE, InternVideo2Config, Keep, LPCompConfig, VLMConfig
from xcomp_jax.data.batch import IGNORE, IMAGE_TOKEN, Clips, Example, Shape, collate
from xcomp_jax.data.prompt import Prompt
from xcomp_jax.files import path_of
from xcomp_jax.inference import encoded_video, generate, selection
from xcomp_jax.model import qc_comp, qwen2, vlm
from xcomp_jax.parity.comparison import (
  Arrays,
  ParityError,
  Row,
  compare_arrays,
  comparison_table,
  read_arrays,
)
from xcomp_jax.parity.frames import cases, choices
from xcomp_jax.parity.tower import frames_of, in_clips, internvideo2, tables, vision

LLM = 1e-4  # absolute
LOSS = 1e-5  # of the loss
GRADIENT = (2e-5, 1e-4)  # absolute, or of an array's largest value
QC_SCORES, QC_CHAT = 1e-5, 1e-3  # of each score


class Answered(NamedTuple):
  """What a prompt gives: all states and caches of the prefill, its logits [S, V], and greedy tokens
  [T] with their logits [T, V].
  """

  prefill: Any
  logits: jax.Array
  tokens: jax.Array
  new_logits: jax.Array

  @property
  def cached(self) -> np.ndarray:
    """int[layers], valid tokens in each layer's cache."""
    return np.array([int(cache.valid.sum()) for cache in self.prefill.caches])


def _one(n: int) -> jax.Array:
  return jnp.full((1, 1), n, jnp.int32)


@functools.partial(jax.jit, static_argnames=("prefix", "text", "room"))
def prefill_and_decode(model: vlm.VLM, x, prefix: int, text: int, room: int) -> Answered:
  """From an inserted sequence [S, D] to `room` greedy tokens."""
  groups = (len(x) - prefix - text) // model.cfg.lp_comp.group
  out = qwen2.run_layers(
    model.llm,
    x[None],
    qwen2.Lengths(_one(prefix), _one(groups), _one(text)),
    prefix=prefix,
    text=text,
    caches=True,
    entering=True,
  )

  greedy = generate.stack_sampling([generate.Sampling(1, ())])

  def step(state, _):
    tokens, after = generate.decode_tokens(model, state, greedy, 1)
    return after, (tokens[0, 0], state.logits[0])

  _, (tokens, new_logits) = jax.lax.scan(
    step, generate.start(model, out, text, _one(text)[0], room), length=room
  )
  return Answered(out, model.llm.logits(out.x)[0], tokens, new_logits)


def slot_of(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Token ids before and after the visual slot."""
  slots = np.flatnonzero(ids == IMAGE_TOKEN)
  if len(slots) != 1:
    raise ParityError(
      f"input_ids has {len(slots)} visual slots ({IMAGE_TOKEN}); expected one",
      where="input_ids",
      found=len(slots),
    )
  return ids[: slots[0]], ids[slots[0] + 1 :]


def llm(
  model: vlm.VLM, features: jax.Array | None, variants: Arrays, recorded: Arrays
) -> list[Row]:
  """From the inserted sequence to greedy tokens, for the released setting and every other recorded
  one.

  features: [C, N, D] merged tokens of the same frames, if there are any.
  """
  prefix, text = slot_of(recorded["input_ids"])
  rows, x = [], recorded.get("inputs_embeds")
  if features is not None:
    placed = vlm.place_tokens(
      model, features[None], jnp.asarray(prefix[None]), jnp.asarray(text[None])
    )[0]
    rows = [compare_arrays("inserted sequence", {"inputs_embeds": placed}, recorded, LLM)]
    x = placed if x is None else x
  if x is None:
    raise ParityError(
      "llm.npz has no inputs_embeds, and there are no frames to make it from",
      where="llm.npz",
      missing="inputs_embeds",
    )

  def answer(model, like):
    return prefill_and_decode(
      model, jnp.asarray(x), len(prefix), len(text), room=len(like.get("generated", ()))
    )

  released = answer(model, recorded)
  rows += released_setting(model, released, recorded)
  for name in sorted({key.partition(":")[0] for key in variants if ":" in key} - {"untied"}):
    mine = {
      key.partition(":")[2]: value for key, value in variants.items() if key.startswith(f"{name}:")
    }
    other = loading.with_lp_comp(model, lp_comp_of(name, model.cfg.llm.layers))
    rows += other_setting(name, answer(other, mine), mine)
  if "untied_lm_head_weight" in variants:
    ours = {"untied:logits": untied_logits(model, released, variants["untied_lm_head_weight"])}
    rows.append(compare_arrays("untied head", ours, variants, LLM))
  return rows


def released_setting(model: vlm.VLM, got: Answered, recorded: Arrays) -> list[Row]:
  """Every state of the prefill, caches, positions and greedy tokens."""
  out, cached = got.prefill, got.cached
  caches = {
    f"{kind}_cache_{i:02}": jnp.moveaxis(array[0], 0, 1)
    for i, cache in enumerate(out.caches)
    for kind, array in (("k", cache.key), ("v", cache.value))
  }
  lengths = {
    f"layer_out_len_{i:02}": np.array(state.shape[1]) for i, state in enumerate(out.entering)
  }
  # Positions count the valid tokens of a layer, and a new token's is the length of that layer's own
  # cache; that keys are rotated by these shows in the caches and logits. Row 0 is the last token of
  # the prefill.
  decoded = cached - 1 + np.arange(len(got.tokens))[:, None]
  return [
    *(
      compare_arrays(f"state entering layer {i}", {f"hidden_in_{i:02}": state[0]}, recorded, LLM)
      for i, state in enumerate(out.entering)
    ),
    compare_arrays("layer outputs", layer_outputs(model, out, recorded), recorded, LLM),
    compare_arrays("final norm", {"final_norm": model.llm.norm(out.x)[0]}, recorded, LLM),
    compare_arrays("logits", {"logits": got.logits}, recorded, LLM),
    compare_arrays("cache lengths", lengths | {"kv_len": cached}, recorded),
    compare_arrays("cached keys and values", caches, recorded, LLM),
    compare_arrays(
      "prefill positions",
      {"prefill_first_pos": np.zeros_like(cached), "prefill_last_pos": cached - 1},
      recorded,
    ),
    compare_arrays("decode positions", {"decode_pos": decoded}, recorded),
    compare_arrays("greedy tokens", {"generated": got.tokens}, recorded),
    compare_arrays("decode logits", {"gen_logits": got.new_logits}, recorded, LLM),
  ]


def layer_outputs(model: vlm.VLM, out: Any, recorded: Arrays) -> dict[str, jax.Array]:
  """The output [S, D] of each recorded layer, from what enters it here, under the recorded name."""
  ours = {}
  for i, (layer, state, cache) in enumerate(
    zip(model.llm.layers, out.entering, out.caches, strict=True)
  ):
    if names := {f"layer_out_pre_drop_{i:02}", f"layer_out_{i:02}"} & recorded.keys():
      size = state.shape[1]
      places = qwen2.Places(
        jnp.where(cache.valid[:, :size], 0, -1), jnp.arange(size)[None], several=False
      )
      ours |= dict.fromkeys(names, layer(state, places)[0][0])
  return ours


def other_setting(name: str, got: Answered, recorded: Arrays) -> list[Row]:
  """States, logits and greedy tokens of another LP-Comp."""
  states = {f"hidden_in_{i:02}": state[0] for i, state in enumerate(got.prefill.entering)}
  states |= {"logits": got.logits, "gen_logits": got.new_logits}
  return [
    compare_arrays(f"{name}: states, logits", states, recorded, LLM),
    compare_arrays(
      f"{name}: tokens, cache lengths",
      {"generated": got.tokens, "kv_len": got.cached},
      recorded,
    ),
  ]


def untied_logits(model: vlm.VLM, got: Answered, weight: np.ndarray) -> jax.Array:
  """Logits of the same states by an output head [V, D] of its own."""
  cfg = dataclasses.replace(model.cfg, llm=dataclasses.replace(model.cfg.llm, tied=False))
  untied = nnx.eval_shape(lambda: qwen2.Decoder(cfg, rngs=nnx.Rngs(0)))
  nnx.update(untied, nnx.state(model.llm))
  untied.lm_head.kernel = nnx.Param(jnp.asarray(weight.T))
  return untied.logits(got.prefill.x)[0]


def lp_comp_of(name: str, layers: int) -> LPCompConfig:
  """The LP-Comp setting that a name in llm_variants.npz stands for (VECTORS.md)."""
  known: dict[str, Keep] = {"cosine_suffix": "suffix", "cosine_nosuffix": "uniform", "none": "none"}
  if name in known:
    return LPCompConfig(schedule="cosine", keep=known[name], group=16)
  if found := re.fullmatch(r"(nexthalf|avgpool)_(\d+(?:_\d+)*)_stride(\d+)", name):
    kind, after, stride = found[1], [int(n) for n in found[2].split("_")], int(found[3])
    schedule = tuple(16 // stride ** sum(layer >= n for n in after) for layer in range(layers))
    return LPCompConfig(schedule, "stride" if kind == "nexthalf" else "avgpool", 16)
  raise ParityError(
    f"llm_variants.npz has the setting {name!r}, which is not one of VECTORS.md",
    where="llm_variants.npz",
    value=name,
  )


def compare_training(model: vlm.VLM, recorded: Arrays) -> list[Row]:
  """Loss, logits and gradients of one sample, from its frames."""
  ids, labels = recorded["input_ids"], recorded["labels"]
  prefix, text = slot_of(ids)
  frames = frames_of(recorded)
  # the release trains with clips of 8 frames
  clips = frames.reshape(-1, min(8, len(frames)), *frames.shape[1:])
  example = Example(
    frames=len(frames),
    # zeros, into which the tower's tokens are filled
    visual=np.zeros(
      (len(frames), model.cfg.tokens_per_frame, model.cfg.vision.width), model.cfg.dtype
    ),
    tokens=ids.astype(np.int32),
    labels=labels.astype(np.int32),
    query=np.zeros(len(ids), bool),
    index=0,
  )
  batch = collate(
    [[example]],
    Shape(rows=1, samples=1, prefix=len(prefix), frames=len(frames), text=len(text)),
  )
  shown = Clips(clips[None], np.arange(0, len(frames), clips.shape[1], dtype=np.int32)[None])
  graph, tuned, frozen = nnx.split(
    model, nnx.Any(nnx.PathContains("llm"), nnx.PathContains("projector")), ...
  )

  @jax.jit
  def run(tuned, frozen, batch, clips):
    def loss_and_logits(tuned):
      model = nnx.merge(graph, tuned, frozen)
      whole = vlm.seen(model, batch, (clips,))
      loss = vlm.loss(model, whole, projector_max_frames=512).sum()  # quirk Q17
      return loss, model.llm.logits(vlm.forward(model, whole).x)[0]

    return jax.value_and_grad(loss_and_logits, has_aux=True)(tuned)

  (loss, logits), grads = run(tuned, frozen, batch, shown)
  # Row by row the next token's label; the very first token has none that predicts it.
  before, visual = len(prefix), len(logits) - len(prefix) - len(text)
  targets = np.concatenate(
    [batch.targets[0, :before], np.full(visual - 1, IGNORE), batch.targets[0, before:]]
  )
  after = np.concatenate([labels[:1], targets[:-1]])
  by_path = loading.parameters(grads)
  trained = [e for e in tensor_names.names(model.cfg) if e.path in by_path]
  ours = {
    f"grad:{e.name}": by_path[e.path].T if e.form == "transpose" else by_path[e.path]
    for e in trained
  }
  recorded_norms = {
    str(name): np.asarray(norm)
    for name, norm in zip(recorded.get("grad_names", ()), recorded.get("grad_norms_fp64", ()))
  }
  norms = {e.name: jnp.linalg.norm(by_path[e.path].ravel()) for e in trained}
  if strange := sorted(recorded_norms.keys() - norms.keys()):
    raise ParityError(
      f"train.npz has gradients of parameters that are not trained here: {', '.join(strange)}",
      where="train.npz",
      unknown=strange,
    )
  return [
    compare_arrays("training loss", {"loss": loss, "loss_fp64": loss}, recorded, relative=LOSS),
    compare_arrays("training logits", {"logits": logits}, recorded, LLM),
    compare_arrays("training labels", {"labels_after_drops": after}, recorded),
    compare_arrays("gradients", ours, recorded, *GRADIENT),
    compare_arrays("gradient norms", norms, recorded_norms, *GRADIENT),
  ]


def qc_scores(model: vlm.VLM, recorded: Arrays) -> list[Row]:
  """QC-Comp's scores of every layer in one prefill of given visual tokens, for each recorded cut
  into windows.
  """
  prefix, text = slot_of(recorded["input_ids"])
  layers, units = model.cfg.llm.layers, int(recorded["n_clips"])
  header = int(recorded["first_conv_length"]) - len(prefix) - 1
  x = jnp.concatenate(
    [model.llm.embed(jnp.asarray(prefix)), jnp.asarray(recorded["visual_tokens"])]
  )

  groups = (len(x) - len(prefix)) // model.cfg.lp_comp.group
  prefill = functools.partial(
    qwen2.run_layers,
    lengths=qwen2.Lengths(_one(len(prefix)), _one(groups), _one(0)),
    prefix=len(prefix),
    text=0,
    caches=True,
    rotated=False,
    stop=layers - 1,
  )
  caches = jax.jit(prefill)(model.llm, x[None]).caches
  rows = []
  for name in sorted(recorded):
    if not (found := re.fullmatch(r"scores_(?:default|segments_(\d+)_(\d+))", name)):
      continue
    window, stride = (int(n or 0) for n in found.groups())
    cfg = dataclasses.replace(
      qc_comp.select_config("official", 1), window=window, bias=int(recorded["query_bias"])
    )
    inside = qc_comp.windows(units, window, stride or 1, cover=False)
    times = np.bincount(inside.ravel(), minlength=units)
    plan = qc_comp.RoundPlan(
      starts=np.zeros(1, int),
      frames=units,
      unit=1,
      windows=inside,
      counted=times == np.max(times),
    )
    asked = qc_comp.stack_questions([qc_comp.asked_text(text, 0, header, cfg)])
    score = functools.partial(
      qc_comp.score_windows, layers=range(layers), causal=False, prefix=len(prefix), units=units
    )
    ours = qc_comp.unit_scores(plan, np.asarray(jax.jit(score)(model, caches, asked, inside)[0]))[0]
    rows.append(scores_row(f"QC-Comp: {name}", ours, plan, recorded[name], QC_SCORES))
  return rows


def scores_row(
  stage: str, ours: np.ndarray, plan: qc_comp.RoundPlan, recorded: np.ndarray, tolerance: float
) -> Row:
  """Scores [..., units] relative to the recorded ones, which are 1e9 exactly where a unit does not
  count (quirk Q3).
  """
  name = stage.rpartition(" ")[2]
  if ours.shape == recorded.shape:
    ours = np.where(plan.counted, ours, 1e9) / recorded
  return compare_arrays(stage, {name: ours}, {name: np.ones_like(recorded)}, tolerance)


def qc_chat(directory: pathlib.Path, cfg: VLMConfig, recorded: Arrays) -> list[Row]:
  """The whole of the official chat(): rounds, scores, selected frames, and the answer about
  them.
  """
  cfg = dataclasses.replace(
    cfg,
    vision=dataclasses.replace(cfg.vision, image_size=int(recorded["image_size"])),
    clip_frames=int(recorded["mm_local_num_frames"]),
    clips_per_chunk=16,
    attention="auto",
  )
  model = loading.load_model(directory, cfg, dtype=np.float32)
  frames, ids = frames_of(recorded), recorded["input_ids"].astype(np.int32)
  T, header = len(frames), int(recorded["first_conv_length"])
  mode = qc_comp.select_config(
    "official", int(recorded["select"]), repeat=len(recorded["round_starts"]) // -(-T // 512)
  )
  selector = selection.frame_selector(T, cfg.clip_frames, mode)
  plan = selector.plan
  assert plan is not None  # the release selected
  # a user's turn ends in two tokens
  question = Prompt(ids, np.full_like(ids, IGNORE), np.zeros(len(ids), bool), (0, header - 2))
  film = encoded_video.encode_video(
    model, iter(frames), np.arange(T) / 8, T / 8, "", phases=selector.phases
  )
  scores = selection.score_rounds(model, film, [question], selector)[0]
  layers = qc_comp.scored_layers(mode, cfg.llm.layers)
  recorded_scores = recorded["round_scores"][:, layers[0] : layers[-1] + 1]
  kept = selector.pick(qc_comp.aggregate(plan, scores, T))
  batch = generate.as_batch(
    question, selection.selected_features(model, film, kept), cfg.clip_frames
  )
  (tokens,) = generate.generate(
    model, batch, generate.Sampling(len(recorded["final_generated"]), ())
  )
  return [
    compare_arrays("QC-Comp: rounds", {"round_starts": plan.starts}, recorded),
    scores_row(
      "QC-Comp: round_scores", qc_comp.unit_scores(plan, scores), plan, recorded_scores, QC_CHAT
    ),
    compare_arrays("QC-Comp: selected frames", {"selected_idx": kept}, recorded),
    compare_arrays("QC-Comp: answer", {"final_generated": tokens}, recorded),
  ]


def compare_directory(directory: pathlib.Path) -> list[Row]:
  """Every stage of a directory.

  Raises:
    ParityError, CheckpointError: a directory whose files can't be read or don't fit
      together.
  """
  if directory.is_file():
    if not (found := cases(directory)):
      raise ParityError(
        f"{directory} has no cases of chosen frames as VECTORS.md describes (cuts.json)",
        where=directory,
      )
    return choices(directory.name, found)
  towers = [
    place
    for place in (directory, directory / "internvideo2_tiny")
    if (place / "vectors.npz").exists()
  ]
  chosen = {file.name: found for file in sorted(directory.glob("*.json")) if (found := cases(file))}
  with jax.default_matmul_precision("highest"):
    rows = [
      tables(read_arrays(directory / name) or read_arrays(directory.parent / name), name)
      for name in ("pos_embed_tables.npz", "pos_embed_1024_rows.npz")
    ]
    for name, found in chosen.items():
      rows += choices(name, found)
    if (directory / "config.json").exists() or not (towers or chosen):
      rows += whole_model(directory)
    for place in towers:
      rows += internvideo2(place)
  rows += [] if chosen else [Row(stage="cuts.json")]
  return rows if towers else [*rows, Row(stage="internvideo2_tiny/vectors.npz")]


def whole_model(directory: pathlib.Path) -> list[Row]:
  """Every stage of a checkpoint and what is recorded beside it; errors as of
  `compare_directory`.
  """
  # as the recorded outputs were computed
  cfg = sizes.read_vlm_config(
    directory, dataclasses.replace(saving.AS_IT_IS, attention="einsum"), COSINE
  )
  model = loading.load_model(directory, cfg, dtype=np.float32)
  rows, features = [], None
  if main := read_arrays(directory / "vision.npz"):
    if isinstance(cfg.vision, InternVideo2Config):
      raise ParityError(
        f"{directory}: vision.npz is recorded of a UMT tower, and config.json names {cfg.vision}",
        where=directory / "vision.npz",
        found=cfg.vision,
      )
    frames = frames_of(main)
    rows, features = vision(model, in_clips(frames, main), main, "vision")
    for file in sorted(directory.glob("vision_local*.npz")):
      other = read_arrays(file)
      rows += vision(model, in_clips(frames, other), other, file.stem)[0]
  else:
    rows.append(Row(stage="vision.npz"))

  stages: dict[str, Callable[[Arrays], list[Row]]] = {
    "llm.npz": lambda prompts: llm(
      model, features, read_arrays(directory / "llm_variants.npz"), prompts
    ),
    "train.npz": functools.partial(compare_training, model),
    "qc_scores.npz": functools.partial(qc_scores, model),
    "qc_chat.npz": functools.partial(qc_chat, directory, cfg),
  }
  for file, compare in stages.items():
    recorded = read_arrays(directory / file)
    rows += compare(recorded) if recorded else [Row(stage=file)]
  return rows


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.parity", description=__doc__.splitlines()[0]
  )
  parser.add_argument(
    "directory",
    type=path_of,
    help="config.json, weights and recorded arrays, or a JSON file of chosen frames (VECTORS.md)",
  )
  args = parser.parse_args(argv)
  with command():
    rows = compare_directory(args.directory)
  print(comparison_table(rows))
  results = {row.result for row in rows}
  if "pass" not in results:
    print(f"error: nothing to compare in {args.directory}", file=sys.stderr)
  sys.exit(0 if "pass" in results and "FAIL" not in results else 1)
