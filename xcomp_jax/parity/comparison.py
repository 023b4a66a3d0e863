"""Rows of `parity`'s table: our arrays against recorded ones."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np

from xcomp_jax.errors import XCompError
from xcomp_jax.inputs import reading, regular

MOST = 64 << 30  # bytes of all arrays of a recording, however small they are packed
Arrays = Mapping[str, np.ndarray]


class ParityError(XCompError, ValueError):
  """A directory that can't be compared; the message says which file and why."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table; error and tolerance are those of the array that is nearest to failing."""

  stage: str
  arrays: int
  worst: str
  error: float
  tolerance: float

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
  rows = []
  for name in ours.keys() & recorded.keys():
    a, b = np.asarray(ours[name]), np.asarray(recorded[name])
    error = np.abs(a.astype(np.float64) - b).max(initial=0) if a.shape == b.shape else np.inf
    largest = np.abs(b).max(initial=0)
    rows.append(
      (name, float(np.nan_to_num(error, nan=np.inf)), max(absolute, float(relative * largest)))
    )

  def nearness(row):
    return (row[1] > row[2], row[1] / row[2] if row[2] else row[1])

  name, error, tolerance = max(rows, key=nearness, default=("", 0.0, 0.0))
  return Row(stage, len(rows), name, error, tolerance)


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
          f"{file} claims {size / 1e9:,.0f} GB of arrays; {MOST / 1e9:,.0f} is the most"
        )
    with np.load(file, allow_pickle=False) as arrays:
      return dict(arrays)


def absent(file: str) -> Row:
  """A line for a file that is not there."""
  return Row(file, 0, "", 0.0, 0.0)


def comparison_table(rows: Sequence[Row]) -> str:
  """The table."""
  width = max(len(row.stage) for row in rows)
  lines = [f"{'stage':{width}}  arrays  max error  tolerance  result  worst array"]
  for row in rows:
    numbers = f"{row.error:9.1e}  {row.tolerance:9.1e}" if row.arrays else f"{'':20}"
    lines.append(
      f"{row.stage:{width}}  {row.arrays:6}  {numbers}  {row.result:6}  {row.worst}".rstrip()
    )
  count = {
    result: sum(row.result == result for row in rows) for result in ("pass", "FAIL", "absent")
  }
  return "\n".join(
    [*lines, f"{count['pass']} stages pass, {count['FAIL']} fail, {count['absent']} absent"]
  )
