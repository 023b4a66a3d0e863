"""How the site shows docstrings: a griffe extension, named in mkdocs.yml."""

import re

import griffe


class Blocks(griffe.Extension):
  """Indented parts of a docstring (commands, tables) stay as they are written: Markdown would fold them into a paragraph."""

  def on_instance(self, *, obj: griffe.Object, **_) -> None:
    """Called by griffe for every module, class and function."""
    if obj.docstring:
      obj.docstring.value = fence(obj.docstring.value)


SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")


def fence(text: str) -> str:
  """`text` with a fence of code around each indented part that is in no section of Google's style."""
  out, inside, section = [], False, False
  for line in text.splitlines():
    indented = line.startswith("  ")
    if line and not indented:
      section = bool(SECTION.match(line))
    if indented and not inside and not section:
      out += ["", "```text"]
      inside = True
    elif inside and line and not indented:
      out += ["```", ""]
      inside = False
    out.append(line)
  return "\n".join([*out, "```"] if inside else out)
