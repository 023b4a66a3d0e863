"""Where a program's time goes: a traced call, its operations summed by the function of the package
that wrote them.
"""

import collections
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

PACKAGE = str(pathlib.Path(__file__).parents[1])
# lines of a TPU that repeat what others have
NOT_OPERATIONS = (
  "Steps",
  "XLA Modules",
  "XLA TraceMe",
  "Async XLA Ops",
)


def trace_call(call: Callable[[], Any], folder: pathlib.Path) -> pathlib.Path:
  """Runs a call under the profiler; returns the trace, which xprof and TensorBoard open too (with
  `folder` as --logdir).
  """
  with jax.profiler.trace(folder):
    jax.block_until_ready(call())
  return max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime_ns)


def shares(trace: pathlib.Path, text: str) -> dict[str, float]:
  """Shares of the time that operations took, largest first.

  text: the compiled program. Names are "function: primitive" with the innermost function of this
  package, the compiler's own name where it says none. Time inside a loop's or a call's operations
  is theirs alone; work of threads beside each other counts for each.
  """
  names, spent = written_by(text), collections.defaultdict[str, float](float)
  for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
    for line in plane.lines:
      if line.name not in NOT_OPERATIONS:
        for op, seconds in _own(_operations(plane.name, line.events)):
          spent[names.get(op) or re.sub(r"[.\d]+$", "", op)] += seconds
  total = sum(spent.values())
  return (
    {name: seconds / total for name, seconds in sorted(spent.items(), key=lambda s: -s[1])}
    if total
    else {}
  )


def _operations(plane: str, events: Iterable[Any]) -> list[tuple[float, float, str]]:
  """(start, end, HLO name) of a line's operations; an accelerator's kernels that name none go by
  their own names.
  """
  out = []
  for event in events:
    op = dict(event.stats).get("hlo_op", event.name if plane.startswith("/device:") else None)
    if op is not None and event.duration_ns > 0:
      name = re.match(r"%?([^\s=]+)", str(op))
      out.append(
        (event.start_ns, event.start_ns + event.duration_ns, name.group(1) if name else str(op))
      )
  return out


def _own(operations: Sequence[tuple[float, float, str]]) -> Iterable[tuple[str, float]]:
  """Every operation's time without that of operations inside it."""
  around: list[tuple[float, str]] = []
  spent = collections.defaultdict[str, float](float)
  for start, end, name in sorted(operations, key=lambda o: (o[0], -o[1])):
    while around and around[-1][0] <= start:
      around.pop()
    if around:
      spent[around[-1][1]] -= min(end, around[-1][0]) - start
    spent[name] += end - start
    around.append((end, name))
  return spent.items()


def written_by(text: str) -> dict[str, str]:
  """HLO name -> "function: primitive" of a compiled program's text, from the stack frames that it
  carries.
  """
  files = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FileNames"), re.M))
  functions = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, "FunctionNames"), re.M))
  at = re.findall(
    r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)", _table(text, "FileLocations"), re.M
  )
  places = {
    place: functions[function].split(".<locals>")[0]
    for place, file, function in at
    if files[file].startswith(PACKAGE)
  }
  frames = re.findall(
    r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
    _table(text, "StackFrames"),
    re.M,
  )
  # jax 0.10 prints a parent's number plus one
  shift = any(frame == parent for frame, _, parent in frames)
  parents = {int(frame): (place, int(parent or shift) - shift) for frame, place, parent in frames}

  def function(frame: str | None) -> str | None:
    number = int(frame or 0)
    while number in parents:
      place, number = parents[number]
      if place in places:
        return places[place]
    return None

  out, roots, inside = {}, {}, ""
  for row in text.splitlines():
    if opened := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", row):
      inside = opened.group(1)
    if not (op := re.match(r"\s+(ROOT )?%(\S+) = ", row)):
      continue
    said = re.search(r'metadata=\{.*?op_name="([^"]*)"(?:.*?stack_frame_id=(\d+))?', row)
    called = re.search(r"calls=%([\w.-]+)", row)
    if said:
      primitive, writer = said.group(1).rsplit("/", 1)[-1], function(said.group(2))
      out[op.group(2)] = f"{writer}: {primitive}" if writer else primitive
    # a fusion without a word of its own: what ends it, or begins
    elif called and called.group(1) in roots:
      out[op.group(2)] = roots[called.group(1)]
    if op.group(2) in out and (op.group(1) or inside not in roots):
      roots[inside] = out[op.group(2)]
  return out


def _table(text: str, title: str) -> str:
  found = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", text, re.M | re.S)
  return found.group(1) if found else ""
