"""VideoChat-Flash's mixtures: which annotations are read, and what is wrong with them.

A mixture is a YAML file with `datasets`, a list of json_path (json or jsonl), sampling_strategy,
data_root, video_read_type, frame_rate and text_samples. An annotation is an object with
"conversations" (or "messages"), at most one of "image", "images", "video" and "videos", and perhaps
"id", "start" and "end".
"""

import concurrent.futures
import dataclasses
import difflib
import hashlib
import json
import math
import os
import pathlib
import random
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xcomp_jax.data import prompt, store, video
from xcomp_jax.data.prompt import AnnotationError
from xcomp_jax.errors import one_line
from xcomp_jax.files import expanduser, local
from xcomp_jax.inputs import quoted, read_text
from xcomp_jax.progress import progress

# video_read_type, and what `video.sample` calls it
READERS: dict[str, video.ReadType] = {"decord": "video", "gif": "gif", "img": "frames"}
TEXT, SEVERAL = "text alone", "several images or videos"  # what the release passes over
ROLES = {"user": "human", "assistant": "gpt"}  # other names of those who speak
VIDEO = "<video>"  # what others write for prompt.IMAGE
LARGEST = 1 << 20  # characters of a mixture, at most, with what its aliases stand for
THREADS = 16  # that ask the file system


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
  """An entry of a mixture: docs/DATA.md says what its keys mean."""

  json_path: str
  sampling_strategy: str = "all"
  data_root: str = ""
  video_read_type: str = "decord"
  frame_rate: float | None = None
  text_samples: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A selected annotation that waits for its pixels."""

  sample: store.StoredSample  # without time message, frames and records
  reader: video.ReadType | None  # None: text alone
  start: float | None  # seconds
  end: float | None
  frame_rate: float | None  # of folders of frames: see `video.sample`
  faults: tuple[str, ...]  # why it can't be used; () if it looks good

  def where(self) -> str:
    """What people look for."""
    return f"{self.sample.annotation}, annotation {self.sample.position}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
  """What was read of an annotation file."""

  annotation: str  # json_path
  digest: str  # of its bytes
  annotations: int
  drawn: int  # by strategy and subset
  # of these: with exactly one image or video, as the release wants them, or none where text is
  # wanted, too
  selected: int
  passed: tuple[tuple[int, str], ...]  # of the others: position, and TEXT or SEVERAL


def drawn_annotations(count: int, strategy: str = "all", subset: float = 1.0) -> list[int]:
  """Which of a file's `count` annotations are drawn, in the order of reading (FACTS.md 14).

  Args:
    count: annotations of the file.
    strategy: "all", or first, first2, ..., end, a colon, and a count or a percentage:
      "first2:2.5%".
    subset: share that is kept after that; 0.25 in the release.

  Raises:
    AnnotationError: a strategy that does not exist.
  """
  match = re.fullmatch(
    r"all|(first|end)(\d{0,9}):(\d{1,9}|\d{1,9}(?:\.\d{1,9})?%)", strategy.strip()
  )
  if not match or (match[1] == "end" and match[2]) or match[2] == "0":
    raise AnnotationError(
      f"sampling_strategy {quoted(strategy)} is unknown; write all, first:100, first:2.5%, "
      f"first2:10% (the second tenth) or end:100",
      where="sampling_strategy",
      value=strategy,
    )
  chosen = list(range(count))
  random.Random(12345).shuffle(chosen)
  if match[1]:
    n = math.ceil(float(match[3][:-1]) * count / 100) if match[3].endswith("%") else int(match[3])
    k = int(match[2] or 1)
    chosen = chosen[(k - 1) * n : k * n] if match[1] == "first" else chosen[max(count - n, 0) :]
  random.Random(42).shuffle(chosen)
  return chosen[: int(len(chosen) * subset)]


def select_annotations(
  items: Sequence[Mapping[str, Any]],
  strategy: str = "all",
  subset: float = 1.0,
  text: bool = False,
) -> tuple[list[int], list[int]]:
  """Draws annotations of a file (see `drawn_annotations`), and picks the usable ones (FACTS.md 14).

  Returns:
    positions that are drawn; of these, those with exactly one image or video, or with `text` none.
  """
  drawn = drawn_annotations(len(items), strategy, subset)
  return drawn, [i for i in drawn if len(_visuals(items[i])) in ((0, 1) if text else (1,))]


def read_mixture(
  path: str | os.PathLike, root: str | os.PathLike, subset: float
) -> tuple[list[Job], list[File]]:
  """Reads a mixture and checks all its selected annotations; paths start from `root`.

  Returns:
    jobs in the order of reading, with what is wrong with them; what was read of each annotation
    file.

  Raises:
    AnnotationError: the mixture or an annotation file as a whole can't be read.
  """
  path, root = (local(each, "annotations and videos are read as files") for each in (path, root))
  entries = progress(_entries(path, root), unit="file", desc="check", delay=5.0, leave=False)
  read = [
    _read_dataset(entry, root, subset, f"mixture {path}, dataset {n}")
    for n, entry in enumerate(entries)
  ]
  return [job for jobs, _ in read for job in jobs], [file for _, file in read]


def _entries(path: pathlib.Path, root: pathlib.Path) -> list[dict[str, Any]]:
  """What stands under `datasets` of a mixture.

  Raises:
    AnnotationError: it can't be read, or is no list of objects.
  """
  try:
    mixture = _yaml(read_text(path, ValueError, LARGEST))
  except Exception as error:  # its library raises more than its own
    there = not path.is_absolute() and not path.exists() and (root / path).exists()
    advice = f"; there is {root / path}: give that" if there else ""
    raise AnnotationError(
      f"mixture {path} can't be read: {one_line(error)}{advice}",
      where=path,
      there=root / path if there else None,
    ) from error
  datasets = mixture.get("datasets") if isinstance(mixture, dict) else None
  if (
    not isinstance(datasets, list) or not datasets or not all(isinstance(d, dict) for d in datasets)
  ):
    raise AnnotationError(
      f"mixture {path}: expected a list under `datasets`, each with json_path and data_root",
      where=path,
      value=datasets,
    )
  return datasets


def _dataset(entry: Mapping[str, Any], where: str) -> Dataset:
  """Reads an entry of a mixture; what is null, or false, is not there.

  Raises:
    AnnotationError: a key that there isn't, or a value that can't be.
  """
  known = [field.name for field in dataclasses.fields(Dataset)]
  for key in entry.keys() - set(known):
    near = difflib.get_close_matches(str(key)[:100], known, 1)
    advice = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    raise AnnotationError(f"{where}: {str(key)[:100]} is unknown; {advice}", where=key, near=near)
  if not isinstance(entry.get("json_path"), str):
    raise AnnotationError(f"{where}: json_path is missing", where="json_path", missing=True)
  given = {  # these two may not be empty
    key: value for key, value in entry.items() if value or key in ("json_path", "sampling_strategy")
  }
  rate, reader = entry.get("frame_rate"), given.get("video_read_type", "decord")
  good_rate = rate is None or (
    reader == "img"
    and not isinstance(rate, bool)
    and isinstance(rate, (int, float))
    and 0 < rate <= video.FASTEST
  )
  for key, good, what in (
    ("data_root", isinstance(given.get("data_root", ""), str), "must be a path, not {}"),
    (
      "video_read_type",
      isinstance(reader, str) and reader in READERS,
      f"{{}} is unknown; known: {', '.join(READERS)}",
    ),
    (
      "frame_rate",
      good_rate,
      f"is how many images of a folder make a second, a number above 0 and up to "
      f"{video.FASTEST:g} beside `video_read_type: img`, not {{}}",
    ),
    (
      "text_samples",
      isinstance(given.get("text_samples", False), bool),
      "must be true or false, not {}",
    ),
    (
      "sampling_strategy",
      isinstance(given.get("sampling_strategy", "all"), str),
      "must be a text such as first:10%, not {}",
    ),
  ):
    if not good:
      said = what.format(quoted(entry[key]))
      raise AnnotationError(f"{where}: {key} {said}", where=key, value=entry[key])
  return Dataset(**given)


def _read_dataset(
  entry: Mapping[str, Any], root: pathlib.Path, subset: float, where: str
) -> tuple[list[Job], File]:
  """Reads the annotation file of an entry of a mixture, and looks at the files of its selected
  annotations.
  """
  dataset = _dataset(entry, where)
  path = root / expanduser(dataset.json_path)
  try:
    items = read_annotations(path)
    drawn, chosen = select_annotations(
      items, dataset.sampling_strategy, subset, dataset.text_samples
    )
  except AnnotationError as error:
    why = error.__cause__ or error
    raise AnnotationError(f"{where}: {error}", **error.fields) from why
  file = File(
    annotation=dataset.json_path,
    digest=hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest(),
    annotations=len(items),
    drawn=len(drawn),
    selected=len(chosen),
    passed=tuple(
      (i, SEVERAL if _visuals(items[i]) else TEXT) for i in sorted({*drawn} - {*chosen})
    ),
  )
  folder = root / expanduser(dataset.data_root)
  sources = [_source(items[i], folder, READERS[dataset.video_read_type]) for i in chosen]
  jobs = [
    _job(items[i], i, dataset, source, faults)
    for i, source, faults in zip(chosen, sources, path_faults(sources), strict=True)
  ]
  return jobs, file


def _yaml(text: str) -> Any:
  """What YAML says.

  Raises:
    ValueError: its aliases stand for too much: each may stand for several others, and so on,
      without end.
    yaml.YAMLError, RecursionError: and others.
  """
  import yaml

  sizes: dict[int, int] = {}

  class Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
      alias = self.check_event(yaml.AliasEvent)
      node = super().compose_node(parent, index)
      if alias and id(node) not in sizes:
        raise ValueError(f"line {node.start_mark.line + 1}: something contains itself")
      if not alias:
        parts = (
          ()
          if isinstance(node, yaml.ScalarNode)
          else (
            part
            for value in node.value
            for part in (value if isinstance(value, tuple) else [value])
          )
        )
        sizes[id(node)] = len(node.value) + sum(sizes[id(part)] for part in parts)
      if sizes[id(node)] > LARGEST:
        raise ValueError(
          f"line {node.start_mark.line + 1}: its aliases (*) stand for more than the {LARGEST:,} "
          f"characters that a mixture may have"
        )
      return node

  return yaml.load(text, Loader)


def read_annotations(path: str | os.PathLike) -> list[dict]:
  """The annotations of a json (a list) or jsonl file.

  Raises:
    AnnotationError: no such file, not UTF-8, not JSON (with the line), or not a list of objects.
  """
  path = pathlib.Path(path)
  try:
    text = read_text(path, ValueError)
  except (OSError, ValueError) as error:  # not UTF-8, or no path at all
    start = ""
    if not path.is_absolute():
      start = f" (from {pathlib.Path.cwd()}; a mixture's relative paths start at --root)"
    raise AnnotationError(
      f"annotations {path} can't be read: {one_line(error)}{start}",
      where=path,
    ) from error
  # In jsonl every line is a document; split at "\n" only, as text may hold other separators that
  # splitlines() knows.
  whole: Any = (
    [_parsed(line, path, n) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl"
    else _parsed(text, path, 1)
  )
  if not isinstance(whole, list):
    raise AnnotationError(
      f"annotations {path}: expected a list of objects", where=path, value=whole
    )
  for i, item in enumerate(whole):
    if not isinstance(item, dict):
      raise AnnotationError(
        f"annotations {path}: expected a list of objects; annotation {i} is {quoted(item, 100)}",
        where=path,
        position=i,
        value=item,
      )
  return whole


def _parsed(document: str, path: pathlib.Path, line: int) -> Any:
  """What a document of a file says that begins at a line.

  Raises:
    AnnotationError: it is no JSON.
  """
  try:
    return json.loads(document)
  except (ValueError, RecursionError) as error:
    says = one_line(error)  # a number of thousands of digits
    if isinstance(error, json.JSONDecodeError):
      line, says = line + error.lineno - 1, f"not JSON: {error.msg}"
    elif isinstance(error, RecursionError):
      says = "lists or objects inside each other without end"
    raise AnnotationError(
      f"annotations {path}, line {line}: {says}", where=path, line=line
    ) from error


def _visuals(item: Mapping[str, Any]) -> list[tuple[str, Any]]:
  """An annotation's images and videos, as (key, path). Tables write null or NaN for what is not
  there, some an empty text.
  """
  found: list[tuple[str, Any]] = [
    (key.removesuffix("s"), path)
    for key in ("image", "images", "video", "videos")
    for path in (item[key] if isinstance(item.get(key), list) else [item.get(key)])
    if path is not None and path == path
  ]
  return [one for one in found if one[1] != ""] or found[:1]


def _talk(item: Mapping[str, Any], visual: bool) -> Any:
  """An annotation's conversation under the names that the release knows; what is none is left as it
  is.
  """
  talk = item.get("conversations")
  talk = item.get("messages") if talk is None else talk
  if not isinstance(talk, list) or not all(isinstance(turn, dict) for turn in talk):
    return talk
  turns = []
  for turn in talk:
    role, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    turns.append(
      {"from": ROLES.get(role, role) if isinstance(role, str) else role, "value": value}
      if {"from", "role"} & turn.keys()
      else turn
    )
  texts = [text for turn in turns if isinstance(text := turn.get("value"), str)]
  if (
    visual
    and len(texts) == len(turns)
    and not any("<image>" in text for text in texts)
    and "".join(texts).count(VIDEO) == 1
  ):
    turns = [turn | {"value": turn["value"].replace(VIDEO, "<image>")} for turn in turns]
  return turns


def _source(
  item: Mapping[str, Any], folder: pathlib.Path, reader: video.ReadType
) -> tuple[str, video.ReadType | None, str]:
  """Of an annotation that `select_annotations` has let through: its file or folder, how that is
  read, and what is wrong with its name.
  """
  for key, name in _visuals(item):
    good = isinstance(name, str) and name
    fault = "" if good else f"{key} must be a path, not {quoted(name)}"
    return str(folder / name) if good else str(folder), "img" if key == "image" else reader, fault
  return "", None, ""  # text alone


def _job(
  item: Mapping[str, Any],
  position: int,
  dataset: Dataset,
  file: tuple[str, video.ReadType | None, str],
  faults: list[str],
) -> Job:
  """The job of an annotation whose file is known, and what is wrong with that."""
  source, kind, _ = file
  talk: Any = _talk(item, kind is not None)  # checked below
  turns = ()
  try:
    prompt.checked_turns(talk, visual=kind is not None)
    turns = tuple({"from": t["from"], "value": t["value"]} for t in talk)
    faults += [
      f"turn {i} has {VIDEO} beside <image>, or several: write <image> once, where the frames go"
      for i, t in enumerate(turns)
      if VIDEO in t["value"]
    ]
    faults += [
      f"turn {i}, an answer, is empty: write one, or leave out its question, too"
      for i in range(1, len(turns), 2)
      if not turns[i]["value"].strip()
    ]
  except ValueError as error:
    faults.append(str(error))
  times = [None if t != t else t for t in (item.get("start"), item.get("end"))]
  if not all(
    t is None or (isinstance(t, (int, float)) and not isinstance(t, bool) and abs(t) < 1e9)
    for t in times
  ):
    faults.append(f"start {quoted(times[0])} and end {quoted(times[1])} must be seconds")
    times = [None, None]
  start, end = (t if t is None else float(t) for t in times)
  if (start or 0) < 0 or (end is not None and end <= (start or 0)):
    faults.append(f"start {times[0]} and end {times[1]}: expected 0 <= start < end")
  name = position if item.get("id") is None else item["id"]
  sample = store.StoredSample(
    id=name if isinstance(name, str) else quoted(name),
    source=source,
    annotation=dataset.json_path,
    position=position,
    conversations=turns,
    time_message="",
  )
  try:
    "".join((sample.id, source, dataset.json_path, *(t["value"] for t in turns))).encode()
  except UnicodeEncodeError:  # JSON can spell half of a character that takes two
    faults.append("a text or name holds half a character (a lone surrogate), which can't be stored")
    sample = dataclasses.replace(sample, id=str(position), source=ascii(source), conversations=())
  return Job(
    sample=sample,
    reader=kind,
    start=start,
    end=end,
    frame_rate=dataset.frame_rate,
    faults=tuple(ascii(f) if not f.isprintable() else f for f in faults),
  )


def path_faults(sources: Sequence[tuple[str, video.ReadType | None, str]]) -> Iterator[list[str]]:
  """What is wrong with each of some files; asked side by side, as a file system on a network takes
  its time to answer.
  """

  def look(first):
    return [
      [fault] if fault else _path_fault(path, kind) if kind else []
      for path, kind, fault in sources[first : first + 64]
    ]

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for found in pool.map(look, range(0, len(sources), 64)):
      yield from found


def _path_fault(path: str, reader: str) -> list[str]:
  try:
    mode = os.stat(path).st_mode
    folder = stat.S_ISDIR(mode)
    if not folder and not stat.S_ISREG(mode):
      return [f"{path} is neither a file nor a folder"]  # reading a pipe would wait for ever
    if folder != (reader == "frames"):
      kind = "a folder" if folder else "a file"
      return [
        f"{path} is {kind}; video_read_type img means folders of frames, all others files, and an "
        f"image is a file"
      ]
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
      return [f"{path} can't be read: no permission"]
  except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: no path at all
    return [video.address(path) or f"{path} does not exist"]
  except OSError as error:
    return [f"{path} can't be read: {error.strerror}"]
  return []
