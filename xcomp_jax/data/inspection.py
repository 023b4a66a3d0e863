"""Looks at a store: is everything as its manifest says, and what is in it."""

import collections
import concurrent.futures
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import tokenizers
from PIL import Image, ImageDraw

from xcomp_jax import inputs
from xcomp_jax.config import Mask
from xcomp_jax.data import prompt, video
from xcomp_jax.data.store import (
  Store,
  StoreError,
  checksum,
  content_checksum,
  content_crc,
  open_store,
)
from xcomp_jax.errors import listed, one_line, too_many_files
from xcomp_jax.files import replacing
from xcomp_jax.progress import progress

THUMBNAIL = 112  # pixels
THREADS = 32  # at most: each may hold a file open beside those of `store.OPEN`
# of lines of a manifest that are about what was selected
COMMON = {
  "annotation",
  "position",
  "source",
}
PASSED = {"annotation", "position", "passed_over"}  # of the others


def verify(path: str | os.PathLike) -> None:
  """Reads every record again, compares all with manifest and counts, and prints that it is so.

  Raises:
    StoreError: it is no store or has no manifest; or all differences, listed.
    OSError: this process has too many open files.
  """
  store = open_store(path)
  lines = _manifest(store)
  with inputs.reading(store.path / "store.json", StoreError):
    wrong = list(_count_differences(store, lines))
  wanted = {line["sample"]: line for line in lines if "sample" in line}
  with concurrent.futures.ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
    found = pool.map(lambda i: _difference(store, i, wanted.get(i)), range(len(store)))
    wrong += [
      text for text in progress(found, total=len(store), unit="sample", desc="verify") if text
    ]
  if wrong:
    raise StoreError(
      listed(f"{path} differs from its manifest", wrong), where=path, differences=wrong
    )
  print(
    f"{path}: {len(store)} samples, {sum(s.frames for s in store.samples)} frames, "
    f"{sum('reason' in line for line in lines)} skipped; all as the manifest says"
  )


def inspect(
  path: str | os.PathLike,
  sheet: str | os.PathLike,
  prompts: int,
  mask: Mask,
  checkpoint: str | None,
) -> None:
  """Prints what is in a store, and draws a contact sheet.

  Args:
    path: the store.
    sheet: PNG file to write; none is written for features.
    prompts: how many prompts to print, with what is supervised in brackets.
    mask: which tokens those are.
    checkpoint: whose tokenizer splits them; None: into bytes.

  Raises:
    StoreError: it is no store. OSError, ValueError: no such tokenizer, or the sheet can't be
      written.
  """
  store = open_store(path)
  tokenizer = prompt.load_tokenizer(checkpoint) if checkpoint else bytes_tokenizer()
  print("\n".join(describe_store(store)))
  for i in _spread(len(store), prompts):
    print(
      f"\nprompt of sample {i}; supervised by the {mask} mask: ⟦ "
      f"⟧\n{show_prompt(store, tokenizer, mask, i)}"
    )
  if store.features:
    print("\nno contact sheet: features can't be looked at")
  elif any(s.frames for s in store.samples):
    with replacing(sheet) as temporary:
      contact_sheet(store).save(temporary, "PNG")
    print(f"\ncontact sheet: {sheet}")


def describe_store(store: Store) -> Iterator[str]:
  """Kind, sizes, counts and histogram, line by line."""
  layout = store.layout
  kind = f"JPEG {layout.quality}" if layout.quality else "raw"
  if store.features:
    kind = (
      f"features of tower {store.features.identity[:12]}: {store.features.tokens_per_frame} "
      f"tokens of {store.features.width} per frame, from"
    )
  size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
  frames = sum(s.frames for s in store.samples)
  kinds = collections.Counter(
    "text" if not s.frames else "image" if s.clip_frames == 1 else "video" for s in store.samples
  )
  yield (
    f"{store.path}: {kind} frames of {layout.image_size} x {layout.image_size} in clips of "
    f"{layout.clip_frames}; {store.made_with()}"
  )
  named = ", ".join(
    f"{count} {name}{'s' if count != 1 and name != 'text' else ''}"
    for name, count in kinds.most_common()
  )
  yield (
    f"{len(store)} samples ({named}), {frames} frames, {size / 1e6:.1f} MB, "
    f"{size / max(1, frames) / 1e3:.1f} kB per frame"
  )
  yield f"identity {store.identity()}"
  yield "\nframes      samples"
  bins = collections.Counter(s.frames.bit_length() for s in store.samples)
  for b in sorted(bins):
    low, high = (1 << b) >> 1, (1 << b) - 1
    span = f"{low}" if low >= high else f"{low} to {high}"
    yield f"{span:>12}{bins[b]:8}  {'#' * -(-40 * bins[b] // max(bins.values()))}"
  for file in store.info.get("annotation_files", ()):
    counts = ", ".join(
      f"{name} {file[name]}" for name in ("annotations", "drawn", "selected", "written", "skipped")
    )
    passed = "".join(
      f", {count} passed over: {reason}" for reason, count in file.get("passed_over", {}).items()
    )
    yield f"{file['annotation']}: {counts}{passed}"
  reasons = (
    [line["reason"] for line in _manifest(store) if "reason" in line]
    if store.info.get("skipped")
    else []
  )
  yield from (f"  skipped: {reason}" for reason in reasons[:10])
  if len(reasons) > 10:
    yield f"  ... and {len(reasons) - 10} more in {store.path / 'manifest.jsonl'}"


def show_prompt(store: Store, tokenizer: prompt.Tokenizer, mask: Mask, index: int) -> str:
  """A sample's prompt as training sees it, with ⟦ ⟧ around what is supervised."""
  sample = store.samples[index]
  built = prompt.sample_prompt(tokenizer, sample, mask)
  parts = []
  for supervised, group in itertools.groupby(
    zip(built.tokens.tolist(), built.labels.tolist()), lambda pair: pair[1] != prompt.IGNORE
  ):
    tokens = (token for token, _ in group)
    text = "".join(
      f"<{sample.frames} frames>" if slot else tokenizer.decode(ids, keep_special=True)
      for slot, ids in itertools.groupby(tokens, lambda token: token == prompt.IMAGE_TOKEN)
    )
    parts.append(f"⟦{text}⟧" if supervised else text)
  return "".join(parts)


def contact_sheet(store: Store, rows: int = 10, columns: int = 8) -> Image.Image:
  """Frames of samples all over the store, a row each, with a line about them above it."""
  visible = [i for i, s in enumerate(store.samples) if s.frames]
  chosen = [visible[k] for k in _spread(len(visible), rows)]
  line = 18
  sheet = Image.new("RGB", (columns * THUMBNAIL, len(chosen) * (THUMBNAIL + line)), "white")
  draw = ImageDraw.Draw(sheet)
  for row, index in enumerate(chosen):
    sample, top = store.samples[index], row * (THUMBNAIL + line)
    question = (
      sample.conversations[0]["value"].replace(prompt.IMAGE, "") if sample.conversations else ""
    )
    count = f"{sample.frames} frames" if sample.frames > 1 else "an image"
    text = one_line(f"{index}: {count}, {pathlib.Path(sample.source).name}: {question}")
    draw.text((3, top + 3), text[: columns * THUMBNAIL // 3], fill="black")  # no letter is narrower
    visual = store.visual(index)
    frames = visual.reshape(-1, *visual.shape[2:])
    for column, frame in enumerate(frames[_spread(len(frames), columns)]):
      thumbnail = Image.fromarray(video.resize(frame[None], THUMBNAIL - 2)[0])
      sheet.paste(thumbnail, (column * THUMBNAIL + 1, top + line))
  return sheet


def bytes_tokenizer() -> prompt.Tokenizer:
  """A token per byte, for texts to be looked at without a checkpoint."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  core = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
  )
  core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  core.decoder = tokenizers.decoders.ByteLevel()
  core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
  return prompt.Tokenizer(core, "bytes")


def _spread(count: int, wanted: int) -> list[int]:
  """At most `wanted` of 0 to count - 1, evenly."""
  return sorted({(2 * k + 1) * count // (2 * wanted) for k in range(wanted)}) if count else []


def _manifest(store: Store) -> list[dict[str, Any]]:
  file = store.path / "manifest.jsonl"
  try:
    lines = [json.loads(line) for line in inputs.read_text(file, StoreError).split("\n") if line]
  except (OSError, ValueError) as error:
    raise StoreError(
      f"{store.path}: its manifest.jsonl is missing or unreadable ({error}); `predecode` writes "
      f"one",
      where=file,
      missing=isinstance(error, FileNotFoundError),
    ) from error
  for n, line in enumerate(lines, 1):
    keys = line.keys() if isinstance(line, dict) else set()
    if keys != PASSED and not any(
      COMMON | more == keys for more in ({"reason"}, {"sample", "frames", "crc32"})
    ):
      raise StoreError(
        f"{store.path}: line {n} of its manifest.jsonl is not one of `predecode`: "
        f"{json.dumps(line)[:200]}",
        where=file,
        line=n,
      )
  return lines


def _count_differences(store: Store, lines: Sequence[dict[str, Any]]) -> Iterator[str]:
  if checksum(store.samples) != store.info.get("checksum"):
    yield "samples/: ids, frame counts or texts are not those that were written"
  numbers = [line["sample"] for line in lines if "sample" in line]
  if numbers != list(range(len(store))):
    yield f"manifest.jsonl names {len(numbers)} samples, not 0 to {len(store) - 1} in order"
  if content_checksum(line["crc32"] for line in lines if "sample" in line) != store.info.get(
    "content"
  ):
    yield "store.json: its content is not that of manifest.jsonl"
  files = store.info.get("annotation_files", ())
  selected, begin = [line for line in lines if "passed_over" not in line], 0
  for file in files:
    mine = selected[begin : begin + file["selected"]]
    begin += file["selected"]
    written = sum("sample" in line for line in mine)
    counts = written, len(mine) - written
    others = {line["annotation"] for line in mine} - {file["annotation"]}
    if others or counts != (file["written"], file["skipped"]):
      name = inputs.printable(file["annotation"])[:200]
      yield f"store.json: the counts of {name} are not those of manifest.jsonl"
  counted = sum(
    (collections.Counter(file.get("passed_over", {})) for file in files), collections.Counter()
  )
  if counted != collections.Counter(line["passed_over"] for line in lines if "passed_over" in line):
    yield "store.json: what was passed over is not as in manifest.jsonl"
  if begin != len(selected):
    yield f"store.json: {begin} selected annotations, manifest.jsonl has {len(selected)}"


def _difference(store: Store, index: int, line: dict[str, Any] | None) -> str:
  """How a sample differs from its line of the manifest; "" if it does not."""
  sample = store.samples[index]
  if line is None:
    return f"sample {index} is not in manifest.jsonl"
  for name in ("annotation", "position", "source", "frames"):
    if getattr(sample, name) != line[name]:
      return f"sample {index}: {name} is {getattr(sample, name)!r}, written was {line[name]!r}"
  try:
    crc = 0
    for content in store.stored(index):
      crc = content_crc(content, crc)
  except Exception as error:  # damaged records make the readers raise anything
    if text := too_many_files(error):
      raise OSError(text) from error
    return f"sample {index} ({sample.source}) can't be read: {one_line(error)}"
  return (
    ""
    if crc == line["crc32"]
    else (
      f"sample {index} ({sample.source}): its {store.layout.folder} are not those that were written"
    )
  )
