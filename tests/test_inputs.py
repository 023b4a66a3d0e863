"""Everything a user names is read so that what is wrong is one kind of error with the name."""

import argparse
import errno
import json
import os
import socket

import pytest

from xcomp_jax import inputs
from xcomp_jax.errors import XCompError

pytestmark = pytest.mark.pure


class Fault(XCompError, ValueError):
  pass


class Panic(BaseException):  # what libraries in Rust raise
  pass


@pytest.mark.parametrize(
  "error",
  [
    Panic("boom"),
    RecursionError("deep"),
    MemoryError(),
    ValueError("a\nb"),
    KeyError("k"),
    OSError("no errno"),
    ZeroDivisionError(),
  ],
)
def test_whatever_a_reader_raises_is_one_kind_with_the_name(error):
  with pytest.raises(Fault) as caught, inputs.reading("x/y.bin", Fault, "picture"):
    raise error
  assert caught.value.fields["where"] == "x/y.bin"
  assert caught.value.fields["expected"] == "picture"
  assert str(caught.value).startswith("x/y.bin is no picture: ")
  assert "\n" not in str(caught.value)


def test_a_kind_without_fields_will_do():
  with pytest.raises(ValueError, match=r"^x is damaged: deep$") as caught:
    with inputs.reading("x", ValueError):
      raise RecursionError("deep")
  assert type(caught.value) is ValueError


def test_what_the_system_says_stays_what_it_is_and_gets_the_name():
  with pytest.raises(PermissionError) as caught, inputs.reading("x/y.bin", Fault):
    raise PermissionError(errno.EACCES, "Permission denied")
  assert caught.value.filename == "x/y.bin"


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(3), Fault("as it is")])
def test_endings_and_the_kind_itself_pass(ending):
  with pytest.raises(type(ending)) as caught, inputs.reading("x", Fault):
    raise ending
  assert caught.value is ending


def test_only_regular_files(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "link").symlink_to("pipe")
  at = socket.socket(socket.AF_UNIX)
  at.bind(os.fspath(tmp_path / "socket"))
  kinds = {
    "pipe": "a pipe",
    "link": "a pipe",
    "socket": "a socket",
    ".": "a folder",
    "/dev/zero": "a device",
  }
  for name, kind in kinds.items():
    with pytest.raises(inputs.NoFileError) as caught:
      inputs.read_text(tmp_path / name, Fault)
    assert caught.value.fields == {
      "where": tmp_path / name,
      "found": kind,
      "allowed": ("a file",),
    }


@pytest.mark.parametrize(
  "content, line, value",
  [(b"\xff", 1, 0xFF), (b"{}\n\n\xc3(", 3, 0xC3), (b"\xff\xfe{\0}\0", 1, 0xFF)],
)
def test_text_that_is_no_utf8_says_where(tmp_path, content, line, value):
  file = tmp_path / "a.json"
  file.write_bytes(content)
  with pytest.raises(Fault) as caught:
    inputs.read_json(file, Fault)
  assert caught.value.fields == {"where": file, "line": line, "value": value}


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b""])
def test_json_that_is_none_is_one_kind(tmp_path, content):
  file = tmp_path / "a.json"
  file.write_bytes(content)
  with pytest.raises(Fault) as caught:
    inputs.read_json(file, Fault)
  assert (caught.value.fields["where"], caught.value.fields["expected"]) == (file, "JSON")
  assert "a.json is no JSON" in str(caught.value)


def test_a_mark_at_the_start_is_no_content(tmp_path):
  (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"ä": 1}).encode())
  assert inputs.read_json(tmp_path / "a.json", Fault) == {"ä": 1}


def test_a_text_too_large_is_not_read(tmp_path):
  with open(tmp_path / "a", "wb") as file:
    file.truncate(inputs.TEXT + 1)
  with pytest.raises(Fault) as caught:
    inputs.read_text(tmp_path / "a", Fault)
  assert caught.value.fields == {"where": tmp_path / "a", "allowed": inputs.TEXT}


def test_bytes_that_are_no_text_are_named():
  assert inputs.plain("ä?", "the question") == "ä?"
  with pytest.raises(Fault) as caught:
    inputs.plain("a\udcff", "the question", Fault)
  assert caught.value.fields == {"where": "the question", "value": "a\udcff"}
  with pytest.raises(ValueError):
    inputs.plain("a\udcff", "the question")


@pytest.mark.parametrize("said", ["0", "8000000000", "nan", "1e3", "", "x"])
def test_numbers_have_bounds(said):
  with pytest.raises(inputs.BoundsError) as caught:
    inputs.number(1, 1000, int)(said)
  assert caught.value.fields == {"value": said, "allowed": (1, 1000), "kind": int}


def test_numbers_within_bounds():
  assert inputs.number(1, 1000, int)("1000") == 1000
  assert inputs.number(0.0, 1.0, float)("0.5") == 0.5
  with pytest.raises(argparse.ArgumentTypeError, match=r"nan: must be a number from 0\.0 to 1\.0"):
    inputs.number(0.0, 1.0, float)("nan")


def test_a_pipe_is_read_where_it_may_be_one(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  assert inputs.read_text(tmp_path / "pipe", Fault, pipes=True) == ""  # nobody writes to it
  out, into = os.pipe()
  os.write(into, "ä\n".encode())
  os.close(into)
  assert inputs.read_text(f"/dev/fd/{out}", Fault, pipes=True) == "ä\n"
  os.close(out)
  with pytest.raises(inputs.NoFileError) as caught:
    inputs.read_text("/dev/zero", Fault, pipes=True)
  assert caught.value.fields == {
    "where": "/dev/zero",
    "found": "a device",
    "allowed": ("a file", "a pipe"),
  }


def test_a_pipe_has_a_limit_too():
  out, into = os.pipe()
  os.write(into, b"a" * 11)
  os.close(into)
  with pytest.raises(Fault) as caught:
    inputs.read_text(f"/dev/fd/{out}", Fault, 10, pipes=True)
  assert caught.value.fields == {"where": f"/dev/fd/{out}", "allowed": 10}
  os.close(out)


def test_what_is_quoted_is_short_whatever_it_holds():
  deep, wide = [], ["x" * 10_000] * 1000
  for _ in range(100_000):
    deep = [deep]
  for value in (
    deep,
    wide,
    {"a": deep, "b": wide},
    10**5000,
    "x" * 10_000,
    {i: i for i in range(10_000)},
  ):
    assert 1 < len(inputs.quoted(value)) < 500
  assert (
    inputs.quoted("a\udcff") == "'a\\udcff'" and inputs.quoted({"from": "bot"}) == "{'from': 'bot'}"
  )
