"""Ways to damage a file, each decided by a random number generator: what `fuzzing` does to good
files.

Some change bytes whatever they mean, some the values inside (of JSON, YAML, safetensors, npz, PNG),
some what lies at the path.
"""

import io
import json
import os
import pathlib
import random
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import yaml

DEEP = 100_000  # lists inside each other
BOMB = 1 << 30  # bytes that a small file unpacks to
ELSEWHERE = "elsewhere"  # the folder of what nobody has named


# --- bytes
# ----------------------------------------------------------------------------------------


def bits(r: random.Random, data: bytes) -> bytes:
  out = bytearray(data)
  for _ in range(r.choice((1, 1, 2, 8)) if data else 0):
    out[r.randrange(len(out))] ^= 1 << r.randrange(8)
  return bytes(out)


def noise(r: random.Random, data: bytes) -> bytes:
  start = r.randrange(len(data) or 1)
  return (
    data[:start] + r.randbytes(min(r.choice((1, 4, 64)), len(data) - start)) + data[start + 64 :]
  )


def length(r: random.Random, data: bytes) -> bytes:
  """Writes a number that is zero, huge or negative where one may stand: at the beginning, at the
  end, or beside a tag of four letters.
  """
  width, order = r.choice((1, 2, 4, 8)), r.choice(("little", "big"))
  number = r.choice(
    (
      0,
      1,
      (1 << 8 * width) - 1,
      1 << (8 * width - 1),
      (1 << (8 * width - 1)) - 1,
      1 << (8 * width - 2),
    )
  )
  tags = [match.start() for match in re.finditer(rb"[A-Za-z]{4}", data[:65536])]
  places = [r.randrange(min(len(data), 64) or 1), max(0, len(data) - r.randrange(1, 128))]
  place = (
    max(0, r.choice(tags) + r.choice((-4, 4, 8, 12, 16)))
    if tags and r.random() < 0.7
    else r.choice(places)
  )
  return data[:place] + number.to_bytes(width, order) + data[place + width :]


def cut(r: random.Random, data: bytes) -> bytes:
  return data[: r.randrange(len(data) or 1)]


def headless(r: random.Random, data: bytes) -> bytes:
  return data[r.randrange(len(data) or 1) :]


def repeated(r: random.Random, data: bytes) -> bytes:
  a, b = sorted((r.randrange(len(data) + 1), r.randrange(len(data) + 1)))
  return data[:b] + data[a:b] + data[b:]


def twice(r: random.Random, data: bytes) -> bytes:
  return data + data


def hole(r: random.Random, data: bytes) -> bytes:
  start = r.randrange(len(data) or 1)
  return data[:start] + data[start + r.choice((1, 7, 512)) :]


def zeros(r: random.Random, data: bytes) -> bytes:
  start = r.randrange(len(data) or 1)
  size = min(r.choice((8, 512, 1 << 20)), len(data) - start)
  return data[:start] + bytes(size) + data[start + size :]


def junk(r: random.Random, data: bytes) -> bytes:
  return data + r.randbytes(r.choice((1, 100, 10_000)))


def empty(r: random.Random, data: bytes) -> bytes:
  return b""


def encoding(r: random.Random, data: bytes) -> bytes:
  """Text in another encoding, or with bytes that are none."""
  text = data.decode("utf-8", "replace")
  start = r.randrange(len(data) or 1)
  return r.choice(
    (
      text.encode("utf-16"),
      text.encode("utf-32"),
      b"\xef\xbb\xbf" + data,
      data.replace(b"\n", b"\r\n"),
      data[:start] + b"\xff\xfe\xe9" + data[start:],
      data[:start] + b"\0" + data[start:],
      data[:start] + "\u2028".encode() + data[start:],
      data[:start] + b"\xed\xa0\x80" + data[start:],
    )
  )


def foreign(r: random.Random, data: bytes) -> bytes:
  """Another kind of file, such as one that makes a program start others or read what it names."""
  there = f"../{ELSEWHERE}"
  return r.choice(
    (
      b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(made-by-postscript) (w) file closefile "
      b"showpage\n",
      f"ffconcat version 1.0\nfile '{there}/film.mp4'\n".encode(),
      f"#EXTM3U\n#EXTINF:1,\n{there}/film.mp4\n#EXT-X-ENDLIST\n".encode(),
      f"<svg xmlns='http://www.w3.org/2000/svg'><image href='{there}/secret.txt'/></svg>".encode(),
      b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
      b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ftouch made-by-me\x85R.",
      b"<html>",
      b"PK\x05\x06" + bytes(18),
      b"version https://git-lfs.github.com/spec/v1\n",
    )
  )


BYTES = (
  bits,
  bits,
  noise,
  length,
  length,
  cut,
  cut,
  headless,
  repeated,
  twice,
  hole,
  zeros,
  junk,
  empty,
  encoding,
  foreign,
)


# --- values
# ----------------------------------------------------------------------------------------


def nodes(tree: Any) -> list[tuple[Any, Any]]:
  """Every place of a tree of dicts and lists: (container, key)."""
  found = (
    [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
    if isinstance(tree, (dict, list))
    else []
  )
  return found + [node for container, key in list(found) for node in nodes(container[key])]


def odd(r: random.Random, old: Any, tree: Any) -> Any:
  """A value that should not stand in the place of `old`."""
  other = nodes(tree)
  container, key = r.choice(other) if other else (None, None)
  numbers = (
    0,
    -1,
    1,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    10**12,
    10**400,
    -(10**400),
  )
  names = (
    f"../{ELSEWHERE}/secret.txt",
    "/dev/zero",
    "/etc/passwd",
    "..",
    "a\0b",
    "\ud800",
    "x" * 300,
    "x" * 10**6,
    "",
  )
  kinds = (None, True, False, [], {}, [[]], {"": None}, str(old), [old], {"a": old}, "@deep@")
  if type(old) in (int, float) and r.random() < 0.7:
    return r.choice((*numbers, old + 1, old * 2, -old, old * 10**6, float(old)))
  if isinstance(old, str) and r.random() < 0.5:
    return r.choice((*names, f"../{ELSEWHERE}/{old[:99]}", old + "x", old.upper(), old[:-1]))
  return r.choice((*numbers, *names, *kinds, container[key] if other else None))


def reshape(r: random.Random, tree: Any) -> Any:
  """A tree with a value that is odd, missing, there twice, or in the place of another."""
  found = nodes(tree)
  if not found:
    return odd(r, tree, tree)
  container, key = r.choice(found)
  what = r.random()
  if what < 0.6:
    container[key] = odd(r, container[key], tree)
  elif what < 0.75:
    del container[key]
  elif isinstance(container, list):
    container.insert(r.randrange(len(container) + 1), container[key])
  elif what < 0.9:
    container[f"{key}x" if r.random() < 0.5 else "unknown"] = (
      container.pop(key) if r.random() < 0.5 else container[key]
    )
  else:
    container["@twice@" + str(key)] = odd(r, container[key], tree)
  return tree


def as_json(tree: Any, indent: int | None = None) -> bytes:
  """JSON with what `json` can't write: what is nested too deeply, a key that is there twice."""
  text = (
    json.dumps(tree, indent=indent)
    .replace('"@deep@"', "[" * DEEP + "]" * DEEP)
    .replace('"@twice@', '"')
  )
  return text.encode("utf-8", "surrogatepass")


def in_json(r: random.Random, data: bytes) -> bytes:
  lines = data.decode().split("\n")
  try:
    return as_json(reshape(r, json.loads(data)), 1)
  except ValueError:  # JSON lines
    number = r.randrange(sum(bool(line) for line in lines))
    lines[number] = as_json(reshape(r, json.loads(lines[number]))).decode("utf-8", "surrogatepass")
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def in_yaml(r: random.Random, data: bytes) -> bytes:
  if r.random() < 0.25:  # aliases that grow without end, tags that make objects
    laughs = "\n".join(
      f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'] * 10)}]" for i in range(12)
    )
    key = r.choice(
      (
        "data_root",
        "json_path",
        "video_read_type",
        "sampling_strategy",
        "frame_rate",
        "text_samples",
        "other",
      )
    )
    tag = r.choice(
      (
        "*a11",
        "!!python/object/apply:os.system ['touch made-by-me']",
        "&b [*b]",
        "2001-01-01",
        "0x7fffffffffffffff",
        "1e400",
      )
    )
    return (
      f"{laughs if tag == '*a11' else ''}\ndatasets:\n- json_path: videos.json\n  data_root: "
      f"videos\n  {key}: {tag}\n"
    ).encode()
  text = yaml.safe_dump(reshape(r, yaml.safe_load(data)))
  return re.sub("'?@deep@'?", "[" * 2000 + "]" * 2000, text).encode("utf-8", "surrogatepass")


def in_safetensors(r: random.Random, data: bytes) -> bytes:
  size = int.from_bytes(data[:8], "little")
  header = as_json(reshape(r, json.loads(data[8 : 8 + size])))
  return len(header).to_bytes(8, "little") + header + data[8 + size :]


def in_npz(r: random.Random, data: bytes) -> bytes:
  """Arrays of other shapes, types and numbers, what says so in the file's own tables, or an array
  that unpacks without end.
  """
  with np.load(io.BytesIO(data)) as file:
    arrays = dict(file)
  name = r.choice(sorted(arrays))
  a, raw = arrays[name], {}
  what = r.choice(
    (
      "about",
      "shape",
      "type",
      "numbers",
      "object",
      "gone",
      "more",
      "header",
      "bomb",
      "table",
      "table",
      "name",
    )
  )
  if what == "about" and "about" in arrays:
    raw["about"] = npy(
      np.array(as_json(reshape(r, json.loads(str(arrays["about"])))).decode("utf-8", "replace"))
    )
  elif what == "shape" and a.ndim:
    raw[name] = npy(
      r.choice((a[:-1], a[None], a.ravel(), a[:0], np.concatenate([a, a]), a[..., :1], a.T))
    )
  elif what == "type" and a.dtype.kind in "fui":
    raw[name] = npy(
      a.astype(r.choice(("float64", "int8", "bool", "complex64", "U9", "float16", "uint16", ">f4")))
    )
  elif what == "numbers" and a.dtype.kind in "fui" and a.size:
    b = a.copy()
    floats = a.dtype.kind == "f"  # others may be bfloat16 by their bits
    b.flat[r.randrange(b.size)] = r.choice(
      (np.nan, np.inf, 1e30)
      if floats
      else (0x7FC0 & np.iinfo(a.dtype).max, 0x7F80 & np.iinfo(a.dtype).max)
    )
    raw[name] = npy(b)
  elif what == "object":
    raw[name] = npy(np.array([{"a": 1}], object))
  elif what == "header":
    claim = (
      f"{{'descr': '<f4', 'fortran_order': False, 'shape': "
      f"({r.choice((1 << 40, 1 << 62, -1, 10**30))},), }}\n"
    ).encode()
    raw[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(claim)) + claim + bytes(64)
  elif what == "more":
    raw[r.choice(("features_1", "features_x", "features_-1", "frames", "../made-by-me", "x"))] = (
      npy(a)
    )
  elif what == "name":
    raw[name + "x"] = npy(arrays.pop(name))
  elif what == "gone":
    del arrays[name]
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as file:
    for key, content in ({key: npy(value) for key, value in arrays.items()} | raw).items():
      if what == "bomb" and key == name:
        info = zipfile.ZipInfo(key + ".npy")
        info.compress_type = zipfile.ZIP_DEFLATED
        with file.open(info, "w") as member:
          claim = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({BOMB},), }}\n".encode()
          member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(claim)) + claim)
          for _ in range(BOMB >> 24):
            member.write(bytes(1 << 24))
      else:
        file.writestr(key + ".npy", content)
  content = out.getvalue()
  if what == "table":
    places = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    # encrypted, method, sizes, where it begins
    field, width = r.choice(((8, 2), (10, 2), (20, 4), (24, 4), (42, 4)))
    place = r.choice(places) + field
    content = (
      content[:place]
      + r.choice((1, 99, 12, (1 << 8 * width) - 1)).to_bytes(width, "little")
      + content[place + width :]
    )
  return content


def npy(array: np.ndarray) -> bytes:
  out = io.BytesIO()
  np.save(out, array)
  return out.getvalue()


def in_png(r: random.Random, data: bytes) -> bytes:
  """A chunk that says something else, or too much, with a checksum that fits."""

  def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  chunks, at = [], 8
  while at < len(data):
    size = struct.unpack(">I", data[at : at + 4])[0]
    chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + size]])
    at += size + 12
  head = bytearray(chunks[0][1])
  what = r.choice(("size", "kind", "text", "profile", "none", "twice", "order"))
  if what == "size":
    head[:8] = struct.pack(
      ">II", r.choice((0, 1, 60_000, 2**31 - 1, 2**31)), r.choice((1, 60_000, 2**31 - 1))
    )
  elif what == "kind":
    head[r.randrange(8, 13)] = r.choice((0, 1, 3, 7, 16, 255))
  elif what in ("text", "profile"):
    body = b"x\0\0" + zlib.compress(bytes(1 << 28), 1)
    chunks.insert(1, [b"zTXt" if what == "text" else b"iCCP", body])
  elif what == "none":
    del chunks[r.randrange(1, len(chunks))]
  elif what == "twice":
    chunks.insert(1, list(r.choice(chunks)))
  else:
    r.shuffle(chunks)
  if what in ("size", "kind"):
    chunks[0][1] = bytes(head)
  return data[:8] + b"".join(chunk(kind, body) for kind, body in chunks)


INSIDE: dict[str, Callable[[random.Random, bytes], bytes]] = {
  ".json": in_json,
  ".jsonl": in_json,
  ".yaml": in_yaml,
  ".safetensors": in_safetensors,
  ".npz": in_npz,
  ".png": in_png,
  "_METADATA": in_json,
  "_sharding": in_json,
  "_CHECKPOINT_METADATA": in_json,
}


# --- what lies at the path
# -------------------------------------------------------------------------------------


def pipe(file: pathlib.Path, elsewhere: pathlib.Path) -> None:
  os.mkfifo(file)


def bound(file: pathlib.Path, elsewhere: pathlib.Path) -> None:
  mode = stat.S_IFSOCK | 0o600
  os.mknod(file, mode)


def device(file: pathlib.Path, elsewhere: pathlib.Path) -> None:
  file.symlink_to("/dev/zero")


def loop(file: pathlib.Path, elsewhere: pathlib.Path) -> None:
  file.symlink_to(file.name)


def folder(file: pathlib.Path, elsewhere: pathlib.Path) -> None:
  file.mkdir()


def gone(file: pathlib.Path, elsewhere: pathlib.Path) -> None:
  pass


def vast(file: pathlib.Path, elsewhere: pathlib.Path) -> None:
  """More bytes than fit into any memory, of which none are on the disk."""
  with open(file, "wb") as opened:
    opened.truncate(1 << 40)


def linked(file: pathlib.Path, elsewhere: pathlib.Path) -> None:
  """The good file, by a link: caches of hubs consist of these."""
  file.symlink_to(elsewhere / file.name)


AT = (pipe, bound, device, loop, folder, gone, vast, linked)
# are no file that anything could be read from
NEVER = {
  "pipe",
  "bound",
  "device",
  "loop",
  "folder",
}
OPERATIONS = {operation.__name__: operation for operation in (*BYTES, *AT)}


def choose(r: random.Random, file: pathlib.Path) -> list[tuple[str, int]]:
  """What is done to a file: names of operations, each with a seed; usually one, sometimes several
  that change bytes.
  """
  inside = file.suffix in INSIDE or file.name in INSIDE
  family = r.choices(("bytes", "inside", "at"), (5, 6 if inside else 0, 2))[0]
  if family == "at":
    return [(r.choice(AT).__name__, 0)]
  steps = [("inside", r.randrange(2**32))] if family == "inside" else []
  for _ in range(r.choice((0, 0, 1)) if steps else r.choice((1, 1, 1, 2, 3))):
    steps.append((r.choice(BYTES).__name__, r.randrange(2**32)))
  return steps


def damage(file: pathlib.Path, steps: list[tuple[str, int]]) -> None:
  """Does to a file what `choose` has chosen, without touching what else has a name for it.

  A folder `elsewhere`, beside the one that the file lies in, has the good files of that for what
  names it.
  """
  data, elsewhere = file.read_bytes(), file.parent.with_name(ELSEWHERE)
  elsewhere.mkdir()
  (elsewhere / "secret.txt").write_text("nobody has named this")
  for good in filter(pathlib.Path.is_file, file.parent.iterdir()):
    os.link(good, elsewhere / good.name)
  file.unlink()
  for name, seed in steps:
    r = random.Random(seed)
    if name == "inside":
      data = (INSIDE.get(file.suffix) or INSIDE[file.name])(r, data)
    elif OPERATIONS[name] in AT:
      return OPERATIONS[name](file, elsewhere)
    else:
      data = OPERATIONS[name](r, data)
  file.write_bytes(data)
