"""Which frames are read, against recorded choices of the official readers (VECTORS.md:
cuts.json).
"""

import pathlib
import tempfile
from typing import Any

import numpy as np

from xcomp_jax.data import container, prompt, video
from xcomp_jax.inputs import read_json
from xcomp_jax.parity.comparison import ParityError, Row, compare_arrays

KEYS = {"kind", "clip", "style", "count", "indices", "message"}


def cases(file: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the cases of a file; none if its first is of another form.

  Raises:
    ParityError, OSError: it can't be read.
  """
  found = read_json(file, ParityError)
  first = found[0] if isinstance(found, list) and found else None
  return found if isinstance(first, dict) and KEYS <= first.keys() else []


def choices(name: str, recorded: list[dict[str, Any]]) -> list[Row]:
  """A row for each kind and style: frames and time messages, which have to be equal.

  Raises:
    ParityError: a case that is not as VECTORS.md says.
  """
  found: dict[str, tuple[dict, dict]] = {}
  with tempfile.TemporaryDirectory() as folder:
    for n, case in enumerate(recorded):
      try:
        ours, theirs = found.setdefault(f"{name}: {case['kind']}, {case['style']}", ({}, {}))
        theirs |= _named(n, np.array(case["indices"]), case["message"])
        indices, message = _chosen(pathlib.Path(folder) / str(n), case)
      except video.VideoError as error:  # nothing is chosen where the official code chooses
        indices, message = np.zeros(0, int), str(error)
      except Exception as error:  # it may hold anything
        raise ParityError(
          f"{name}, case {n} is not as VECTORS.md says: {error!r}", where=name, case=n
        ) from error
      ours |= _named(n, indices, message)
  return [compare_arrays(stage, *both) for stage, both in found.items()]


def _named(n: int, indices: np.ndarray, message: str) -> dict[str, np.ndarray]:
  return {f"frames {n}": indices, f"message {n}": np.frombuffer(message.encode(), np.uint8)}


def _chosen(root: pathlib.Path, case: dict[str, Any]) -> tuple[np.ndarray, str]:
  """Chooses frames as `video.sample` does, from empty files made in `root`. Returns: int[T] numbers
  of frames; the time message.
  """
  count, (start, end), index = case["count"], case["clip"] or (None, None), None
  if case["kind"] == "frames":
    parts = pathlib.PurePosixPath(case["path"]).parts
    path = root.joinpath(*(part for part in parts if part not in ("/", "..")))
    path.mkdir(parents=True)
    for i in range(count):
      (path / f"img_{i + 1:05}.jpg").touch()
  else:
    path, rate = root / "video.mp4", case["fps_of_file"]
    root.mkdir()
    path.touch()
    index = container.Index(
      stream=0,
      times=np.arange(count) / rate,
      seconds=count / rate,
      rate=rate,
      average=rate,
      pts=np.arange(count),
      stated=count,
    )
  chosen = video.sample(
    path,
    size=1,
    max_frames=case["max_frames"],
    min_frames=case["min_frames"],
    fps=case["target_fps"],
    clip_frames=8,
    style=case["style"],
    start=start,
    end=end,
    read_type="video" if index else "frames",
    found=index,
  )
  return chosen.indices, prompt.time_message(chosen.seconds, len(chosen.indices))
