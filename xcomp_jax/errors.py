"""The base of all errors that are raised about what a user gave."""

from typing import Any


class XCompError(Exception):
  """Says what was wrong, where, and what to do.

  `str(error)` is a line for people. `error.fields` has what the line names, for programs: `where`
  is the file, config key or option that is wrong; other fields are said where they are raised.
  """

  def __new__(cls, *args: Any, **fields: Any):
    """Keeps fields from bases that take none, such as OSError."""
    return super().__new__(cls, *args)

  def __init__(self, *args: Any, **fields: Any):
    super().__init__(*args)
    self.fields = fields
