"""Files of annotations, read as questions one by one."""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from xcomp_jax.errors import XCompError
from xcomp_jax.inputs import parse_json, quoted, read_text


class TaskError(XCompError, ValueError):
  """Annotations that can't be used; the message says where and why."""


def read_items(file: pathlib.Path) -> Iterator[Any]:
  """The questions of a file (a JSON list, or JSON lines), with an error in the place of what can't
  be read.

  Raises:
    TaskError: no JSON.
  """
  content = read_text(file, TaskError)
  items = (
    parse_json(content, file, TaskError)
    if content.lstrip().startswith("[")
    else [
      parse_json(line, f"{file}, line {n},", TaskError)
      for n, line in enumerate(content.split("\n"), 1)
      if line.strip()
    ]
  )
  for item in items:
    try:
      yield from _each(item)
    except Exception as error:
      yield error


def _each(item: Any) -> Iterable[Any]:
  """The questions that an annotation holds: itself, LVBench's own lines, or those of a
  conversation.
  """
  if not isinstance(item, dict):
    return [item]
  if "videos" in item or not isinstance(item.get("video", ""), str):
    rest = {key: value for key, value in item.items() if key != "videos"}
    item = rest | {"video": _only_video(item)}
  for key in ("start", "end"):
    if not isinstance(value := item.get(key), int | float | None):
      raise TaskError(f"its {key} is {quoted(value, 60)}; write seconds", where=key, value=value)
  if "qa" in item:
    return _published(item)
  if "conversations" in item or "messages" in item:
    return _rounds(item)
  return [item]


def _only_video(item: Mapping[str, Any]) -> str:
  """The name of the one video, where a list of them, or `videos`, has it."""
  given = [item.get(key) for key in ("video", "videos")]
  lists = [paths if isinstance(paths, list) else [paths] for paths in given]
  paths = [path for found in lists for path in found if path is not None]
  if len(paths) != 1 or not isinstance(paths[0], str):
    raise TaskError(
      f"it must have one video, the name of a file, not {quoted(paths, 60)}",
      where="video",
      value=paths,
    )
  return paths[0]


def _rounds(item: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
  """The questions of a conversation, of {"from", "value"} or {"role", "content"}; what a system
  turn says is left out.
  """
  turns = [
    (t.get("from") or t.get("role"), t.get("value", t.get("content")))
    for t in item.get("conversations") or item["messages"]
  ]
  turns = [turn for turn in turns if turn[0] != "system"]
  for n, (who, said) in enumerate(turns):
    if who not in (("human", "user"), ("gpt", "assistant"))[n % 2] or not isinstance(said, str):
      raise TaskError(
        f"turn {n} of the conversation is {quoted({'from': who, 'value': said}, 100)}; write "
        f'questions "from": "human" and answers "from": "gpt" in turn, with text as "value"',
        where="conversations",
        turn=n,
      )
  if len(turns) % 2 or not turns:
    raise TaskError(
      "the conversation does not end with an answer; write the right letter as its last turn, "
      '"from": "gpt"',
      where="conversations",
      turns=len(turns),
    )
  for (_, question), (_, answer) in zip(turns[::2], turns[1::2]):
    question = re.sub("^<(image|video)>\n?", "", question)
    if found := re.search("<(image|video)>", question):
      raise TaskError(
        f"{found[0]} is inside a question; leave it out, frames go first by themselves",
        where="conversations",
        found=found[0],
      )
    yield {**item, "question": question, "answer": answer}


def _published(video: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
  """LVBench's own lines: {"key", "type", "qa": [{"question": text and options, "answer": letter,
  ...}]}.
  """
  for item in video["qa"]:
    question, *options = re.split(r"\n(?=\([A-Z]\) )", item["question"])
    answer = next(
      (option for option in options if option.startswith(f"({item['answer']})")), item["answer"]
    )
    yield item | {
      "video": video["key"],
      "type": video.get("type", ""),
      "question": question,
      "candidates": options,
      "answer": answer,
    }
