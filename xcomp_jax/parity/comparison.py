"""Rows of `parity`'s table: our arrays against recorded ones."""

import collections
import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from xcomp_jax.errors import XCompError
from xcomp_jax.inputs import reading, regular

LARGE = 256 << 20  # bytes of an array from which on it may not be
PACKED = 100  # times larger than in its file
MOST = 64 << 30  # bytes of all arrays of a recording, however small they are packed
Arrays = Mapping[str, np.ndarray]


class ParityError(XCompError, ValueError):
  """A directory that can't be compared; the message says which file and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A line of the table; error and tolerance are those of the array that is nearest to failing.

  The defaults say that a file, or a stage's arrays, are not there.
  """

  stage: str
  arrays: int = 0
  worst: str = ""
  error: float = 0.0
  tolerance: float = 0.0

  @property
  def result(self) -> str:
    """'pass', 'FAIL' or 'absent'."""
    return "absent" if not self.arrays else "pass" if self.error <= self.tolerance else "FAIL"


def compare_arrays(
  stage: str, ours: Mapping, recorded: Arrays, absolute: float = 0.0, relative: float = 0.0
) -> Row:
  """Compares each of our arrays that is recorded under the same name; tolerance 0 means exactly.

  `absolute` or `relative` to an array's largest value, whichever is larger.
  """
  pairs = {
    name: (np.asarray(ours[name]), np.asarray(recorded[name]))
    for name in ours.keys() & recorded.keys()
  }
  rows = [
    Row(
      stage=stage,
      arrays=len(pairs),
      worst=name if a.shape == b.shape else f"shape of {name}",
      error=_largest_difference(a, b),
      tolerance=max(absolute, float(relative * np.abs(b).max(initial=0))),
    )
    for name, (a, b) in pairs.items()
  ]

  return max(
    rows,
    key=lambda row: (row.error > row.tolerance, row.error / (row.tolerance or 1)),
    default=Row(stage=stage),
  )


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
  error = np.abs(a.astype(np.float64) - b).max(initial=0) if a.shape == b.shape else np.inf
  return float(np.nan_to_num(error, nan=np.inf, posinf=np.inf))


def read_arrays(file: pathlib.Path) -> Arrays:
  """All arrays of an npz file; none if it is not there.

  Raises:
    ParityError, OSError: a file that can't be read.
  """
  if not file.exists():
    return {}
  regular(file)
  with reading(file, ParityError, "recording"):
    with zipfile.ZipFile(
      file
    ) as archive:  # recordings are as the official code made them, packed ones too
      if (size := sum(entry.file_size for entry in archive.infolist())) > MOST:
        raise ParityError(
          f"{file} claims {size / 1e9:,.0f} GB of arrays; {MOST / 1e9:,.0f} is the most",
          where=file,
          value=size,
          allowed=MOST,
        )
      for entry in archive.infolist():
        if entry.file_size > LARGE and entry.file_size > PACKED * entry.compress_size:
          raise ParityError(
            f"{file}: {entry.filename[:100]} claims {entry.file_size / 1e9:,.1f} GB, of "
            f"{entry.compress_size:,} bytes; no recording packs that well",
            where=file,
            value=entry.file_size,
          )
    with np.load(file, allow_pickle=False) as arrays:
      return dict(arrays)


def comparison_table(rows: Sequence[Row]) -> str:
  """The table."""
  width = max(len(row.stage) for row in rows)
  lines = [f"{'stage':{width}}  arrays  max error  tolerance  result  worst array"]
  for row in rows:
    numbers = f"{row.error:9.1e}  {row.tolerance:9.1e}" if row.arrays else f"{'':20}"
    lines.append(
      f"{row.stage:{width}}  {row.arrays:6}  {numbers}  {row.result:6}  {row.worst}".rstrip()
    )
  count = collections.Counter(row.result for row in rows)
  return "\n".join(
    [*lines, f"{count['pass']} stages pass, {count['FAIL']} fail, {count['absent']} absent"]
  )
