"""What `fuzzing` damages: good files of every format that is read, their readers, and when what was
read is right.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import zipfile
from collections.abc import Mapping
from typing import Any

import av
import command_lines
import cv2
import decoding
import numpy as np
import yaml
from command_lines import ROOT
from fuzzing import Subject
from PIL import Image

# All that readers import is imported before the first child is forked; JAX itself begins in the
# children.
from watched import load_frames

from xcomp_jax import ask
from xcomp_jax.checkpoints import loading, saving, tensor_names
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tuned import read_tuned, write_tuned
from xcomp_jax.config import LPCompConfig
from xcomp_jax.data import inspection, mixture, predecoding, prompt, store, subtitles, video
from xcomp_jax.evaluation import benchmarks, needles
from xcomp_jax.inference import encoded_video
from xcomp_jax.inference.video_model import load_prepared
from xcomp_jax.parity import comparison

MODEL = dataclasses.replace(saving.AS_IT_IS, clip_frames=8, clips_per_chunk=2)
LP_COMP = LPCompConfig("cosine", "suffix", 16)
IDENTITY = (
  "0123456789abcdef-float32"  # of the tower, so that readers of encoded videos need no weights
)
SIZE = 48
LOOK = ["--min-frames=8", "--max-frames=8", "--select=0", "--max-new-tokens=2"]


# --- good files
# ------------------------------------------------------------------------------------------------


def make(good: pathlib.Path) -> None:
  """Writes the good files."""
  shutil.copytree(ROOT / "assets" / "tiny", good / "tiny")
  tiny = good / "tiny"
  cfg = read_vlm_config(tiny, MODEL, LP_COMP)
  model = loading.load_model(tiny, cfg)
  (tiny / "xcomp.json").unlink()
  saving.save_torch(good / "sharded", model, cfg, tiny, shard_bytes=1 << 20)
  saving.save_orbax(good / "orbax", model, cfg, tiny)
  write_tuned(tiny, read_tuned(good / "sharded"))
  shutil.copytree(tiny, good / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
  prompt.load_tokenizer(tiny).core.save(str(good / "tokenizer" / "tokenizer.json"))

  world = decoding.make_world(good / "world")
  pictures = [
    Image.fromarray(c) for c in np.random.default_rng(5).integers(0, 256, (12, 32, 48, 3), np.uint8)
  ]
  videos = world / "videos"
  for suffix in ("jpg", "webp", "bmp", "tiff"):
    pictures[0].save(videos / f"still.{suffix}")
  pictures[0].save(videos / "move.webp", save_all=True, append_images=pictures[1:], duration=100)
  pictures[0].convert("P").save(videos / "palette.png")
  for name, codec in (
    ("film.mp4", "libx264"),
    ("film.mkv", "libx264"),
    ("film.avi", "mpeg4"),
    ("film.webm", "libvpx-vp9"),
  ):
    film(videos / name, codec)
  settings = predecoding.FrameSettings(
    image_size=16, max_frames=16, min_frames=8, fps=8.0, clip_frames=8
  )
  for name, more in (
    ("store", {}),
    ("jpeg", {"quality": 90}),
    ("features", {"tower": decoding.summing_tower()}),
  ):
    predecoding.predecode(
      world / "mixture.yaml",
      good / name / "data",
      settings,
      root=world,
      samples_per_shard=3,
      **more,
    )

  (good / "film").mkdir()
  model = load_prepared(ask.prepare_model(ask.settings_of(ask_arguments(tiny))))
  watched = model.encode(videos / "film.mp4")
  encoded_video.save_video(watched, good / "film" / "film.npz")
  (good / "other").mkdir()
  encoded_video.save_video(
    dataclasses.replace(watched, identity=IDENTITY), good / "other" / "film.npz"
  )

  (good / "bench").mkdir()
  questions = command_lines.questions(["film", "v0"])
  (good / "bench" / "questions.json").write_text(json.dumps(questions, indent=1))
  (good / "needles").mkdir()
  hidden = [
    {"image": f"{i}.png", "question": f"Q{i}?\nA. x\nB. y", "answer": "A"} for i in range(2)
  ]
  (good / "needles" / "needles.json").write_text(json.dumps(hidden))
  for i in range(2):
    pictures[i].save(good / "needles" / f"{i}.png")
  (good / "recorded").mkdir()
  for file in (ROOT / "tests" / "reference" / "internvideo2_tiny").iterdir():
    shutil.copyfile(file, good / "recorded" / file.name)
  (good / "spoken").mkdir()
  cues = (
    "00:00:01,000 --> 00:00:02,000\n<i>Grün,</i>\nnicht rot.",
    "00:00:02,200 --> 00:00:03,000\nTwo",
  )
  (good / "spoken" / "film.srt").write_text(
    "".join(f"{i}\n{cue}\n\n" for i, cue in enumerate(cues, 1)), "utf-8"
  )
  (good / "asked").mkdir()
  (good / "asked" / "questions.txt").write_text(
    "Which digit was shown?\nWelche Ziffer war zu sehen, äöü?\n"
  )


def film(file: pathlib.Path, codec: str) -> None:
  rng = np.random.default_rng(1)
  with av.open(str(file), "w") as container:
    stream = container.add_stream(codec, rate=8)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for _ in range(24):
      picture = cv2.resize(
        rng.integers(0, 256, (3, 4, 3), np.uint8), (64, 48), interpolation=cv2.INTER_NEAREST
      )
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
    container.mux(stream.encode(None))


def ask_arguments(checkpoint: pathlib.Path):
  import argparse

  parser = argparse.ArgumentParser()
  ask.add_options(parser)
  return parser.parse_args([f"--checkpoint={checkpoint}", *LOOK])


# --- readers, and what is right
# --------------------------------------------------------------------------------


def digest(array: Any) -> str:
  return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def equal(given, file, good, found) -> str:
  """Nothing but the good result is right."""
  return "" if found == good else f"reads something else: {short(found)}, not {short(good)}"


def short(found: Any) -> str:
  text = json.dumps(found)
  return text if len(text) < 200 else text[:200] + "..."


def parsed(file: pathlib.Path) -> Any:
  """What another reader makes of JSON or YAML; None if that can't."""
  try:
    text = file.read_text("utf-8-sig")
    if file.suffix == ".jsonl":
      return [json.loads(line) for line in text.split("\n") if line.strip()]
    return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
  except (ValueError, OSError, RecursionError, yaml.YAMLError):
    return None


def read_config(given, file) -> Any:
  cfg = read_vlm_config(file.parent, MODEL, LP_COMP)
  loading.stored(file.parent, cfg)
  tuned = read_tuned(file.parent)
  return {"cfg": dataclasses.asdict(cfg), "tuned": tuned and dataclasses.asdict(tuned)}


def right_config(given, file, good, found) -> str:
  """All that was accepted is what the file says."""
  said = parsed(file)
  if file.name != "config.json" or not isinstance(said, dict):
    keys = "group schedule keep".split()
    said = said if isinstance(said, dict) else {}
    wrong = [
      key
      for key in keys
      if found["tuned"] and found["tuned"]["lp_comp"][key] != said.get("lp_comp", {}).get(key)
    ]
    return f"reads another {', '.join(wrong)}" if wrong else ""
  llm, tower = found["cfg"]["llm"], found["cfg"]["vision"]
  pairs = {
    "hidden_size": llm["width"],
    "intermediate_size": llm["mlp_width"],
    "num_hidden_layers": llm["layers"],
    "rms_norm_eps": llm["norm_eps"],
    "num_attention_heads": llm["heads"],
    "num_key_value_heads": llm["kv_heads"],
    "vocab_size": llm["vocab_size"],
    "rope_theta": llm["rope_theta"],
    "mm_hidden_size": tower["width"],
  }
  wrong = [
    f"{key} = {value}, not {said.get(key)}"
    for key, value in pairs.items()
    if said.get(key) != value
  ]
  return f"reads {', '.join(wrong)}" if wrong else ""


def read_weights(given, file) -> Any:
  folder = next(folder for folder in file.parents if folder.parent == given)
  cfg = read_vlm_config(folder, MODEL, LP_COMP)
  model = loading.load_model(folder, cfg)
  return {
    path: [list(leaf.shape), str(leaf.dtype), digest(leaf)]
    for path, leaf in loading.parameters(model).items()
  }


def right_shapes(given, file, good, found) -> str:
  """A flipped bit makes another legal number, in files without checksums; shapes and types are what
  the model has.
  """
  wrong = [path for path in good if found.get(path, [])[:2] != good[path][:2]] + sorted(
    found.keys() - good.keys()
  )
  return f"reads {wrong[0]} as {found.get(wrong[0])}" if wrong else ""


def right_tensors(given, file, good, found) -> str:
  """Each tensor is what lies where the header says, by another reader of headers."""
  if wrong := right_shapes(given, file, good, found):
    return wrong
  now, before = tensors(file), tensors(given.parent / "good" / file.name)
  paths = {
    e.name: e.path for e in tensor_names.names(read_vlm_config(given / "tiny", MODEL, LP_COMP))
  }
  for name, path in paths.items():
    if (now.get(name) == before.get(name)) != (found[path] == good[path]):
      return f"reads another {name} than the file holds"
  return ""


def tensors(file: pathlib.Path) -> Mapping[str, Any]:
  data = file.read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])

  def at(it):
    return data[8 + size :][slice(*it["data_offsets"])]

  return {
    name: (it["dtype"], it["shape"], hashlib.blake2b(at(it)).hexdigest())
    for name, it in header.items()
    if name != "__metadata__"
  }


def right_index(given, file, good, found) -> str:
  places = (parsed(file) or {}).get("weight_map", {}) if file.name.endswith("index.json") else {}
  out = [name for name in places.values() if os.path.basename(name) != name]
  return (
    f"follows {out[0][:100]}"
    if out
    else right_shapes(given, file, good, found)
    if not places
    else equal(given, file, good, found)
  )


WORDS = ("Which digit was shown?", "äöü 12 <|im_start|>\n\n'll", "\U0001f600 \u2028")


def read_tokenizer(given, file) -> Any:
  tokenizer = loading.read_tokenizer(file.parent, read_vlm_config(given / "tiny", MODEL, LP_COMP))
  ids = [tokenizer.encode(text) for text in WORDS]
  return {
    "ids": ids,
    "text": [tokenizer.decode(one, keep_special=True) for one in ids],
    "size": tokenizer.vocab_size,
    "special": [tokenizer.im_start, tokenizer.im_end, tokenizer.pad, tokenizer.newline],
  }


def right_tokenizer(given, file, good, found) -> str:
  """Another vocabulary is another tokenizer; but text is what it was after there and back, and ids
  have embeddings.
  """
  if any(
    not 0 <= i < found["size"] <= 512 for ids in [*found["ids"], found["special"]] for i in ids
  ):
    return "gives ids beyond its size"
  lost = [text for text, back in zip(good["text"], found["text"]) if text != back]
  return f"turns {good['text'][0]!r} into {found['text'][0]!r}, or the like" if lost else ""


def read_mixture(given, file) -> Any:
  jobs, files = mixture.read_mixture(given / "world" / "mixture.yaml", given / "world", 1.0)
  return {
    "jobs": [json.loads(json.dumps(dataclasses.asdict(job))) for job in jobs],
    "files": [dataclasses.asdict(one) for one in files],
  }


def right_mixture(given, file, good, found) -> str:
  """Jobs without faults say what their annotations say, by another reader of JSON; and a file that
  says the same gives the same.
  """
  now, before = parsed(file), parsed(given.parent / "good" / file.name)

  def strip(result):
    return [{key: value for key, value in job.items()} for job in result["jobs"]]

  if now == before and now is not None:
    return (
      "" if strip(found) == strip(good) else "reads something else in a file that says the same"
    )
  for job in found["jobs"]:
    sample = job["sample"]
    items = parsed(given / "world" / sample["annotation"])
    if job["faults"] or not isinstance(items, list):
      continue
    item = items[sample["position"]]
    talk = (
      item.get("conversations") if item.get("conversations") is not None else item.get("messages")
    )
    if [turn["value"] for turn in sample["conversations"]] != [
      turn.get("value", turn.get("content")) for turn in talk
    ]:
      return (
        f"reads another conversation than annotation {sample['position']} of "
        f"{sample['annotation']} holds"
      )
    times = [None if t != t else t for t in (item.get("start"), item.get("end"))]
    if [job["start"], job["end"]] != times:
      return f"reads other times than annotation {sample['position']} of {sample['annotation']} has"
    if not os.path.isfile(sample["source"]) and not os.path.isdir(sample["source"]):
      return f"takes {sample['source'][:100]} for a video"
  return ""


def read_store(given, file) -> Any:
  folder = next(folder for folder in file.parents if (folder.parent.parent == given))
  opened = store.open_store(folder)
  pixels = [digest(opened.visual(i)) for i in range(len(opened))]
  samples = [dataclasses.asdict(sample) for sample in opened.samples]
  return {
    "samples": samples,
    "pixels": pixels,
    "sizes": [opened.layout.image_size, opened.layout.clip_frames],
  }


def verify_store(given, file) -> Any:
  inspection.verify(next(folder for folder in file.parents if (folder.parent.parent == given)))
  return read_store(given, file)


def right_store(given, file, good, found) -> str:
  if file.name in ("store.json", "manifest.jsonl") and found == good:
    now, before = parsed(file), parsed(given.parent / "good" / file.name)
    counted = ("samples", "frames", "records", "checksum", "content")
    if file.name == "store.json" and any(now[key] != before[key] for key in counted):
      return "finds nothing wrong with other counts"
    return (
      "finds nothing wrong with another manifest"
      if file.name == "manifest.jsonl" and now != before
      else ""
    )
  return equal(given, file, good, found)


def read_encoded(given, file) -> Any:
  model = loading.abstract(read_vlm_config(given / "tiny", MODEL, LP_COMP))
  found = encoded_video.load_video(file, model, IDENTITY)
  arrays = {f"features {phase}": a for phase, a in found.features.items()} | {
    "times": found.times,
    "thumbnails": found.thumbnails,
  }
  arrays |= {} if found.frames is None else {"frames": found.frames}
  about = {
    name: [
      list(a.shape),
      str(a.dtype),
      bool(np.isfinite(np.asarray(a, np.float64)).all()),
      digest(a),
    ]
    for name, a in arrays.items()
  }
  ascending = bool((np.diff(found.times) >= 0).all())
  return about | {
    "seconds": found.seconds,
    "source": found.source,
    "ascending": ascending,
    "clips": [found.clips, found.clip_frames],
  }


def right_encoded(given, file, good, found) -> str:
  """Shapes and types are those of the model, numbers are finite; other numbers may be, where the
  file's checksums fit them.
  """
  for name, about in found.items():
    if isinstance(about, list) and len(about) == 4:
      if not about[2]:
        return f"takes {name} that are not finite"
      if name in good and about[:2] != good[name][:2]:
        return f"takes {name} of {about[:2]}, not {good[name][:2]}"
  if (
    not isinstance(found["seconds"], (int, float))
    or not 0 <= found["seconds"] < math.inf
    or not isinstance(found["source"], str)
  ):
    return f"takes {found['seconds']!r:.50} for seconds, or {found['source']!r:.50} for a source"
  if not found["ascending"] or found["clips"] != good["clips"]:
    return "takes times that go back, or other clips"
  return ""


def read_frames(given, file, style: str = "ask") -> Any:
  got = load_frames(
    file,
    size=16,
    max_frames=16,
    min_frames=8,
    fps=8.0,
    clip_frames=8,
    style=style,
    read_type=video.kind(file),
  )
  shape, kind = list(got.frames.shape), str(got.frames.dtype)
  return {
    "shape": shape,
    "type": kind,
    "seconds": got.seconds,
    "indices": got.indices.tolist(),
    "pixels": digest(got.frames),
  }


def right_frames(given, file, good, found) -> str:
  """Whole clips of pictures as they should be, or one picture; what they show, nobody can tell."""
  count, *shape = found["shape"]
  if shape != [16, 16, 3] or found["type"] != "uint8" or not (count == 1 or count in (8, 16)):
    return f"gives {found['type']}{found['shape']}"
  if (
    not 0 <= found["seconds"] < 1e9
    or found["indices"] != sorted(found["indices"])
    or found["indices"][0] < 0
  ):
    return f"gives seconds {found['seconds']}, frames {found['indices']}"
  other = (count == 1) != (good["shape"][0] == 1) and file.suffix != ".webp"
  return "reads a film where there is a picture, or the other way" if other else ""


def read_spoken(given, file) -> Any:
  return [dataclasses.astuple(one) for one in subtitles.read_subtitles(file)]


def right_spoken(given, file, good, found) -> str:
  """What is said stands in the file, with marks of style in between."""
  text = file.read_text("utf-8-sig")
  for *_, said in found:
    letters = iter(text)
    if not all(letter in letters for letter in said if letter != " "):
      return f"says {said!r}"
  return ""


def read_questions(given, file) -> Any:
  return [
    dataclasses.asdict(q) for q in benchmarks.read_questions(benchmarks.TASKS["lvbench"], file)
  ]


def right_questions(given, file, good, found) -> str:
  now = parsed(file)
  if not isinstance(now, list) or len(now) != len(found):
    return f"reads {len(found)} questions"

  def same(item, q):
    return q["prompt"].startswith(str(item["question"])) and q["videos"] == [item["video"]]

  wrong = [i for i, pair in enumerate(zip(now, found)) if not same(*pair)]
  return f"reads another question {wrong[0]}" if wrong else ""


def read_recorded(given, file) -> Any:
  return {
    name: [list(a.shape), str(a.dtype), digest(a)]
    for name, a in comparison.read_arrays(file).items()
  }


def right_recorded(given, file, good, found) -> str:
  """What the zip file's checksums fit; a file that is not there is one that was not recorded."""
  if not file.exists():
    return "" if found == {} else "reads what is not there"
  with zipfile.ZipFile(file) as opened:
    return (
      ""
      if sorted(found) == sorted({name.removesuffix(".npy") for name in opened.namelist()})
      else "reads other arrays"
    )


def read_needles(given, file) -> Any:
  read = needles.read_needles(given / "needles" / "needles.json", given / "needles", 8, 16)
  if faults := [needle.fault for needle in read if not needle.clips]:
    raise needles.NeedleError("; ".join(faults))  # the questions about it are counted as failed
  return [
    [dict(needle.questions), [[list(c.shape), digest(c)] for c in needle.clips]] for needle in read
  ]


def right_needles(given, file, good, found) -> str:
  now = parsed(given / "needles" / "needles.json")
  if not isinstance(now, list) or len(now) != len(found):
    return f"reads {len(found)} needles"
  wrong = [
    i
    for i, (item, (asked, _)) in enumerate(zip(now, found))
    if asked["question"] != [item["question"], item["answer"]]
  ]
  if wrong:
    return f"reads another needle {wrong[0]}"
  return (
    ""
    if all(clip[0] == [8, 16, 16, 3] for _, clips in found for clip in clips)
    else "gives other clips"
  )


STILLS = tuple(
  f"world/videos/{name}"
  for name in ("still*.png", "palette.png", "still.jpg", "still.webp", "still.bmp")
)
FILMS = ("world/videos/film.*", "world/videos/v1.mp4")
PARTS = ("vocab.json", "merges.txt", "tokenizer_config.json")
of = Subject
SUBJECTS = (
  of(name="config.json", files=("tiny/config.json",), read=read_config, right=right_config),
  of(name="xcomp.json", files=("tiny/xcomp.json",), read=read_config, right=right_config),
  of(
    name="safetensors",
    files=("tiny/model.safetensors",),
    read=read_weights,
    right=right_tensors,
  ),
  of(
    name="index",
    files=("sharded/*.index.json", "sharded/*.index.json", "sharded/*.safetensors"),
    read=read_weights,
    right=right_index,
  ),
  of(name="Orbax", files=("orbax/params/**/*",), read=read_weights, right=right_shapes),
  of(
    name="tokenizer",
    files=tuple(f"tiny/{name}" for name in PARTS),
    read=read_tokenizer,
    right=right_tokenizer,
    plain=True,
  ),
  of(
    name="tokenizer.json",
    files=("tokenizer/tokenizer.json",),
    read=read_tokenizer,
    right=right_tokenizer,
    plain=True,
  ),
  of(
    name="annotations",
    files=("world/*.json", "world/*.jsonl"),
    read=read_mixture,
    right=right_mixture,
  ),
  of(name="mixture", files=("world/mixture.yaml",), read=read_mixture, right=right_mixture),
  of(name="store.json", files=("*/data/store.json",), read=verify_store, right=right_store),
  of(name="manifest", files=("store/data/manifest.jsonl",), read=verify_store, right=right_store),
  of(
    name="shards",
    files=("store/data/*/*", "jpeg/data/*/*", "features/data/*/*"),
    read=read_store,
    right=right_store,
  ),
  of(
    name="shards, verified",
    files=("*/data/*/*array_record*",),
    read=verify_store,
    right=right_store,
  ),
  of(name="encoded video", files=("other/film.npz",), read=read_encoded, right=right_encoded),
  of(name="image", files=STILLS, read=read_frames, right=right_frames, padded=True),
  of(
    name="GIF",
    files=("world/videos/move.gif", "world/videos/move.webp"),
    read=read_frames,
    right=right_frames,
  ),
  of(
    name="GIF for training",
    files=("world/videos/move.gif",),
    read=functools.partial(read_frames, style="train"),
    right=right_frames,
  ),
  of(name="video", files=FILMS, read=read_frames, right=right_frames),
  of(
    name="video for training",
    files=FILMS,
    read=functools.partial(read_frames, style="train"),
    right=right_frames,
  ),
  of(
    name="questions",
    files=("bench/questions.json",),
    read=read_questions,
    right=right_questions,
  ),
  of(name="subtitles", files=("spoken/film.srt",), read=read_spoken, right=right_spoken),
  of(name="needles", files=("needles/*",), read=read_needles, right=right_needles),
  of(
    name="recorded arrays",
    files=("recorded/vectors.npz",),
    read=read_recorded,
    right=right_recorded,
  ),
)
NAMED = {subject.name: subject for subject in SUBJECTS}
