"""What an error says to programs."""

import contextlib

import pytest


@contextlib.contextmanager
def refused(kind: type[Exception], **fields):
  """Sees to it that an error of a kind is raised that has at least these fields."""
  with pytest.raises(kind) as caught:
    yield caught
  found = caught.value.fields
  assert {name: found.get(name) for name in fields} == fields, str(caught.value)
