"""From text to tokens: the chat template, what is supervised, where the frames go, where the
question is.

Training and asking share `_build`; they differ only in the text of a turn that shows frames (quirk
Q15).
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsInt

import numpy as np
from jaxtyping import Bool, Int

from xcomp_jax.config import Mask
from xcomp_jax.data.store import StoredSample
from xcomp_jax.data.subtitles import listed_subtitles
from xcomp_jax.errors import XCompError
from xcomp_jax.inputs import plain, quoted, read_json, read_text, reading

IMAGE_TOKEN = -200  # stands in tokens where the visual tokens go (FACTS.md 3)
IGNORE = -100  # a label or target that is not supervised
IMAGE = "<image>"  # where the frames go, in annotations
SYSTEM = "You are a helpful assistant."
_ROLES = {"human": "user", "gpt": "assistant"}  # the annotations' names
WORDS = (  # Qwen2's split, before the merges
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class AnnotationError(XCompError, ValueError):
  """A conversation that can't be used; the message quotes it."""


class TokenizerError(XCompError, ValueError):
  """Files that make no tokenizer; the message names them."""


class NoTokenizerError(XCompError, FileNotFoundError):
  """A directory without a tokenizer's files. fields: where, missing."""


class Tokenizer:
  """A Qwen2 tokenizer, or a smaller one with the same special tokens.

  core: what does the work, a `tokenizers.Tokenizer`. im_start, im_end, pad, newline: token ids.
  eos: the ids that end an answer (quirk Q20). vocab_size: all ids are below it (a model's table is
  often larger).
  """

  def __init__(self, core: Any, source: str):  # a tokenizers.Tokenizer
    core.no_truncation()
    core.no_padding()
    self.core = core
    vocabulary = core.get_vocab(with_added_tokens=True)
    special = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    missing = [token for token in special if token not in vocabulary]
    if missing:
      raise TokenizerError(
        f"the tokenizer in {source} lacks {', '.join(missing)}; the chat template needs them",
        where=source,
        missing=missing,
      )
    self.im_start, self.im_end, self.pad = (vocabulary[token] for token in special)
    self.eos = (self.im_end, self.pad)
    self.vocab_size = max(vocabulary.values()) + 1
    newline = self.encode("\n")
    if len(newline) != 1:
      raise TokenizerError(
        f"the tokenizer in {source} makes {len(newline)} tokens of a newline; it must be one",
        where=source,
        newline=newline,
      )
    self.newline = newline[0]

  def encode(self, text: str) -> list[int]:
    """Token ids; special tokens written out in the text count as such."""
    return self.core.encode(text, add_special_tokens=False).ids

  def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and the characters [start, end) that each one stands for."""
    encoding = self.core.encode(text, add_special_tokens=False)
    return encoding.ids, encoding.offsets

  def decode(self, ids: Iterable[SupportsInt], keep_special: bool = False) -> str:
    """Text, without the special tokens unless they are to be seen."""
    return self.core.decode([int(i) for i in ids], skip_special_tokens=not keep_special)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A tokenized conversation.

  tokens: int32[L], IMAGE_TOKEN once where the frames go (never, without frames).
  labels: int32[L], the token itself where it is supervised, else IGNORE.
  query: bool[L], True at each token whose successor is the first of an answer.
  question: [start, end) in `tokens` of the last question's own text: no time message, no template.
  """

  tokens: Int[np.ndarray, " L"]
  labels: Int[np.ndarray, " L"]
  query: Bool[np.ndarray, " L"]
  question: tuple[int, int]


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
  """Reads tokenizer.json, or else vocab.json, merges.txt and tokenizer_config.json (Qwen2's
  byte-level BPE).

  Raises:
    NoTokenizerError: the files that are missing.
    ValueError: a file that is no tokenizer, or one without the chat template's special tokens.
  """
  directory = pathlib.Path(directory)
  whole = directory / "tokenizer.json"
  parts = [directory / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")]
  missing = [path.name for path in parts if not path.exists()]
  if missing and not whole.exists():
    raise NoTokenizerError(
      f"no tokenizer in {directory}: {', '.join(missing)} missing, and no tokenizer.json instead",
      where=directory,
      missing=missing,
    )
  import tokenizers  # not at the top: a model runs without

  for file in [whole] if whole.exists() else parts:
    # not a pipe, which the library would wait for, nor what fits into no memory
    read_text(file, TokenizerError)
  with reading(whole if whole.exists() else directory, TokenizerError, "tokenizer"):
    core = tokenizers.Tokenizer.from_file(str(whole)) if whole.exists() else _read_parts(*parts)
  return Tokenizer(core, str(directory))


def time_message(seconds: float, frames: int) -> str:
  """What a prompt says about the video (FACTS.md 4)."""
  return (
    f"\nThe video lasts for {seconds:.2f} seconds, and {frames} frames are uniformly sampled "
    f"from it. "
  )


def checked_turns(conversations: Any, visual: bool) -> list[tuple[str, str]]:
  """An annotation's turns `{"from": "human" | "gpt", "value": text}`, as (role, text).

  Raises:
    AnnotationError: no turns, roles out of order or unknown, or not exactly one `<image>` (none,
      unless `visual`), in a question.
  """
  if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
    raise AnnotationError(
      f"an annotation needs conversations, a list of turns, not {quoted(conversations)}",
      where="conversations",
      value=conversations,
    )
  turns = []
  for i, turn in enumerate(conversations):
    if not isinstance(turn, Mapping) or not all(
      isinstance(turn.get(key), str) for key in ("from", "value")
    ):
      raise AnnotationError(
        f'turn {i} must be {{"from": ..., "value": ...}}, not {quoted(turn)}', where=i, value=turn
      )
    if turn["from"] not in _ROLES:
      raise AnnotationError(
        f"turn {i} is from {turn['from']!r}; known: {', '.join(_ROLES)}: {quoted(turn['value'])}",
        where=i,
        allowed=list(_ROLES),
        value=turn["from"],
      )
    if turn["from"] != ("human", "gpt")[i % 2]:
      raise AnnotationError(
        f"turn {i} is from {turn['from']!r}; human and gpt must alternate, human first: "
        f"{quoted(turn['value'])}",
        where=i,
        expected=("human", "gpt")[i % 2],
        value=turn["from"],
      )
    turns.append((_ROLES[turn["from"]], turn["value"]))
  if len(turns) % 2:
    raise AnnotationError(
      f"the conversation ends without an answer: {quoted(turns[-1][1])}",
      where=len(turns),
      missing="answer",
    )

  images = sum(value.count(IMAGE) for _, value in turns)
  wanted = int(visual)
  if images != wanted or any(IMAGE in value for role, value in turns if role == "assistant"):
    text = " / ".join(value for _, value in turns)
    raise AnnotationError(
      f"{images} {IMAGE} in a conversation that needs {wanted}, in a question: {quoted(text)}",
      where="conversations",
      expected=wanted,
      found=images,
    )
  return turns


def training_prompt(
  tokenizer: Tokenizer, conversations: Any, message: str | None, *, mask: Mask
) -> Prompt:
  """An annotation's conversation with its answers supervised (FACTS.md 3, 4).

  conversations: turns `{"from": "human" | "gpt", "value": text}`, questions and answers in turn.
  message: the time message of a video, "" with a still image, None for text alone.
  mask: "official" supervises the assistant's turns with their template, and every newline,
    `<|im_start|>` and `<|im_end|>` elsewhere (quirk Q16); "assistant" the answers and the
    `<|im_end|>` after them.

  Raises:
    AnnotationError: see `checked_turns`.
  """
  turns = checked_turns(conversations, visual=message is not None)
  question = ""
  for i, (role, value) in enumerate(turns):
    if role == "user":
      question = value
    if role == "user" and IMAGE in value:
      if not value.startswith(IMAGE):
        value = f"{IMAGE}\n{value.replace(IMAGE, '').strip()}".strip()
      rest = value.removeprefix(IMAGE)
      question = rest.lstrip()
      turns[i] = role, f"{IMAGE}{message.rstrip()} {rest}" if message else value
  return _build(tokenizer, turns, question, mask)


def sample_prompt(tokenizer: Tokenizer, sample: StoredSample, mask: Mask) -> Prompt:
  """A stored sample's conversation, as training has it."""
  message = sample.time_message if sample.frames else None
  return training_prompt(tokenizer, sample.conversations, message, mask=mask)


def question_prompt(
  tokenizer: Tokenizer,
  question: str,
  message: str | None,
  history: Sequence[tuple[str, str]] = (),
  subtitles: str = "",
) -> Prompt:
  """A question to be answered, after the (question, answer) pairs in `history` about the same
  frames.

  message: as for `training_prompt`; it and the frames stand in the first question (FACTS.md 4).
  subtitles: one per line, which stand behind the message; no part of the question.

  Raises:
    AnnotationError: an empty question, one that is no text, bytes that are no UTF-8, or `<image>`
      in any text: its place is decided here.
  """
  if not isinstance(question, str):
    raise AnnotationError(
      f"a question is a text (str), not {type(question).__name__}", where="question", value=question
    )
  if not question.strip():
    raise AnnotationError("the question is empty", where="question", missing=True)
  given = [("question", question), ("subtitles", subtitles)]
  for where, text in (*given, *(("history", text) for pair in history for text in pair)):
    plain(text, "the text", AnnotationError)
    if IMAGE in text:
      raise AnnotationError(
        f"{IMAGE} must not be written in a question, answer or subtitle, frames go first by "
        f"themselves: {quoted(text)}",
        where=where,
        value=text,
      )
  pairs = (*history, (question,))
  turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair)]
  first = (listed_subtitles(subtitles) if subtitles else "") + turns[0][1]
  if message is not None:
    first = f"{IMAGE}\n{message.strip()} {first}" if message else f"{IMAGE}\n{first}"
  turns[0] = ("user", first)
  return _build(tokenizer, turns, question, None)


def _build(
  tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], question: str, mask: Mask | None
) -> Prompt:
  """The chat template. With `mask` None a header for the answer ends the prompt and nothing is
  supervised.

  turns: (role, content); at most one content has IMAGE, at its start.
  question: the tail of the last user turn.
  """
  tokens, labels, query, span = [], [], [], (0, 0)
  turns = [("system", SYSTEM), *turns, *([("assistant", "")] if mask is None else [])]
  for i, (role, content) in enumerate(turns):
    header = f"<|im_start|>{role}\n"
    asked = mask is None and i == len(turns) - 1
    text = header if asked else f"{header}{content}<|im_end|>\n"
    ids, spans = _encode_turn(tokenizer, text)
    begin, end = len(header), len(header) + len(content)  # characters of the content
    supervised = np.zeros(len(ids), bool)
    answers = np.zeros(len(ids), bool)
    if role == "assistant":
      # the answer starts at its first own token; a newline that opens it melts into the header's
      answer = next((k for k, (left, _) in enumerate(spans) if left >= begin), len(ids))
      answers[answer - 1] = asked or mask is not None
      if mask == "official":
        supervised[:] = True
      elif mask == "assistant":
        # <|im_end|> starts at `end`
        supervised[answer:] = [left <= end for left, _ in spans[answer:]]
    elif role == "user":
      own = [
        k for k, (left, right) in enumerate(spans) if right > end - len(question) and left < end
      ]
      first = own[0] if own else len(ids) - 2  # no question: nothing, at <|im_end|>
      span = (len(tokens) + first, len(tokens) + first + len(own))
    if mask == "official":
      supervised |= np.isin(ids, (tokenizer.newline, tokenizer.im_start, tokenizer.im_end))
    tokens += ids
    labels += np.where(supervised, ids, IGNORE).tolist()
    query += answers.tolist()
  return Prompt(np.array(tokens, np.int32), np.array(labels, np.int32), np.array(query), span)


def _encode_turn(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
  """Like `encode_spans`, with IMAGE_TOKEN for IMAGE; the text on its two sides is tokenized
  apart.
  """
  before, image, after = text.partition(IMAGE)
  ids, spans = tokenizer.encode_spans(before)
  if image:
    shift = len(before) + len(image)
    rest, rest_spans = tokenizer.encode_spans(after)
    ids = [*ids, IMAGE_TOKEN, *rest]
    spans = [
      *spans,
      (len(before), shift),
      *((left + shift, right + shift) for left, right in rest_spans),
    ]
  return ids, spans


def _read_parts(vocab: pathlib.Path, merges: pathlib.Path, config: pathlib.Path):
  import tokenizers

  added = {
    token["content"]: (
      int(i),
      tokenizers.AddedToken(**{k: v for k, v in token.items() if k != "__type"}),
    )
    for i, token in read_json(config, TokenizerError)["added_tokens_decoder"].items()
  }
  ids, pairs = tokenizers.models.BPE.read_file(str(vocab), str(merges))
  # added tokens take the ids they have in the vocabulary; otherwise the library would count on from
  # its size
  ids |= {content: i for content, (i, _) in added.items()}
  core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=pairs))
  core.normalizer = tokenizers.normalizers.NFC()
  core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  core.decoder = tokenizers.decoders.ByteLevel()
  tokens = [token for _, token in added.values()]
  core.add_special_tokens([token for token in tokens if token.special])
  core.add_tokens([token for token in tokens if not token.special])
  return core
