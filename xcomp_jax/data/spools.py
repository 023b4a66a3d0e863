"""Files that hold what became of one annotation, until its shard is written: records one after the
other, and an entry about them.

They are many, small and short-lived, so nothing waits until they have reached the disk. Should the
machine stop, what it lost of them is noticed as they are read, by the CRC-32 at their end.
"""

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

from xcomp_jax.data.store import StoreError
from xcomp_jax.files import replacing

# the last bytes: how many the entry before them has, and the CRC-32 of all before this
TRAILER = struct.Struct(">QI")


class DamagedError(StoreError):
  """A file is not what was written. fields: where, the file."""


@contextlib.contextmanager
def writing_spool(target: str) -> Generator[Callable[[bytes | dict[str, Any]], None]]:
  """A file that appears whole: the function that is given takes its records, and in the end its
  entry.
  """
  crc = 0

  def write(part: bytes | dict[str, Any]) -> None:
    nonlocal crc
    content = part if isinstance(part, bytes) else json.dumps(part).encode()
    crc = zlib.crc32(content, crc)
    file.write(content)
    if not isinstance(part, bytes):
      file.write(TRAILER.pack(len(content), crc))

  with replacing(target, synced=False) as temporary, open(temporary, "wb") as file:
    yield write
    file.flush()  # it takes its name before it is closed


def read_spool(file: str) -> tuple[dict[str, Any], Iterator[bytes]]:
  """The entry, and the records, which are read one by one; whether they are what was written is
  known after the last.

  Raises:
    DamagedError: they are not, or there is no entry.
  """
  try:
    with open(file, "rb") as content:
      end = content.seek(-TRAILER.size, os.SEEK_END)
      size, wanted = TRAILER.unpack(content.read())
      content.seek(end - size)
      text = content.read(size)
    entry = json.loads(text)
    lengths = entry.get("lengths", ())
    if sum(lengths) != end - size:
      raise _damaged(file)
  except FileNotFoundError:
    raise
  except (OSError, ValueError, AttributeError, TypeError, struct.error) as error:
    raise _damaged(file) from error

  def records() -> Iterator[bytes]:
    crc = 0
    with open(file, "rb") as content:
      for length in lengths:
        record = content.read(length)
        crc = zlib.crc32(record, crc)
        yield record
    if zlib.crc32(text, crc) != wanted:
      raise _damaged(file)

  return entry, records()


def _damaged(file: str) -> DamagedError:
  return DamagedError(
    f"{file} is not what was written, as if the disk were failing; the same command tries again",
    where=file,
  )
