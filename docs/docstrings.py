"""How the site shows docstrings: a griffe extension, named in mkdocs.yml."""

import itertools
import re

import griffe

# of Google's style, which mkdocstrings reads itself
SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")
# "starts: int[R], first frame of each round"
FIELD = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.+)")


class Blocks(griffe.Extension):
  """Lists of fields and indented parts (commands, tables) stay as they are written: Markdown would
  fold them together.
  """

  def on_instance(self, *, obj: griffe.Object, **_) -> None:
    """Called by griffe for every module, class and function."""
    if obj.docstring:
      obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
  """A docstring whose fields are a list and whose indented parts are code; sections are left
  alone.
  """
  out: list[str] = []
  inside = ""  # what an indented line belongs to: a section, a field, or code
  for above, line in itertools.pairwise(["-", *text.splitlines()]):
    indented = line.startswith("  ")
    if indented and not inside:
      out += ["", "```text"]
      inside = "code"
    elif line and not indented:
      # A list of fields begins a paragraph; elsewhere such a line is part of a sentence.
      field = FIELD.fullmatch(line) if inside == "field" or not above else None
      if inside == "code":
        out += ["```", ""]
      elif (inside == "field") != bool(field):
        out.append("")
      inside = "section" if SECTION.match(line) else "field" if field else ""
      line = f"- `{field[1]}`: {field[2]}" if field else line
    out.append(line)
  return "\n".join([*out, "```"] if inside == "code" else out)
