"""A corpus of bad files and annotations: each is skipped with its reason or refused, the good ones
all arrive, nothing hangs.
"""

import fractions
import json
import os
import pathlib
import re
import struct
import tempfile
import zlib

import av
import cv2
import decoding
import numpy as np
import pytest
from decoding import make, make_video, manifest, mixture, talk, write
from PIL import Image
from refused import refused
from watched import load_frames

from xcomp_jax.data import inspection, video
from xcomp_jax.data import mixture as mixtures
from xcomp_jax.data.prompt import AnnotationError
from xcomp_jax.data.store import open_store

# name: annotation, and the reason it can't be used
BAD = {
  "no conversations": ({"video": "v0.mp4"}, "needs conversations"),
  "empty conversations": ({"video": "v0.mp4", "conversations": []}, "needs conversations"),
  "a text": ({"video": "v0.mp4", "conversations": "talk"}, "needs conversations"),
  "two slots": ({"video": "v0.mp4", "conversations": talk("<image><image>What?")}, "2 <image>"),
  "slot in the answer": (
    {
      "video": "v0.mp4",
      "conversations": [talk("What?")[0], {"from": "gpt", "value": "<image>"}],
    },
    "in a question",
  ),
  "no slot": ({"video": "v0.mp4", "conversations": talk("What?")}, "0 <image>"),
  "no answer": ({"video": "v0.mp4", "conversations": talk()[:1]}, "ends without an answer"),
  "unknown role": (
    {"video": "v0.mp4", "conversations": [{"from": "bot", "value": "<image>"}]},
    "known: human, gpt",
  ),
  "no such video": ({"video": "v7.mp4", "conversations": talk()}, r"v7\.mp4 does not exist"),
  "no such image": ({"image": "v7.png", "conversations": talk()}, r"v7\.png does not exist"),
  "folder": ({"video": "steps", "conversations": talk()}, "steps is a folder"),
  "no path": ({"video": "", "conversations": talk()}, "video must be a path, not ''"),
  "path of another kind": ({"image": 7, "conversations": talk()}, "image must be a path, not 7"),
  "negative start": (
    {"video": "v0.mp4", "start": -1, "conversations": talk()},
    "start -1 and end None",
  ),
  "inverted": (
    {"video": "v0.mp4", "start": 2, "end": 1, "conversations": talk()},
    "0 <= start < end",
  ),
  "a pipe": ({"video": "pipe.mp4", "conversations": talk()}, "neither a file nor a folder"),
  "a link to nothing": ({"video": "nowhere.mp4", "conversations": talk()}, "does not exist"),
  "a link to itself": (
    {"video": "loop.mp4", "conversations": talk()},
    "does not exist|can't be read",
  ),
  "too long a name": (
    {"video": "x" * 300, "conversations": talk()},
    "does not exist|can't be read: File name too long",
  ),
  "a zero byte": ({"video": "v0\0.mp4", "conversations": talk()}, r"does not exist"),
  "half a character": (
    {"video": "v0.mp4", "conversations": talk("<image> \ud83d")},
    "half a character",
  ),
  "a file for a folder": ({"image": "steps", "conversations": talk()}, "steps is a folder"),
  "turns of another kind": (
    {"video": "v0.mp4", "conversations": ["<image>", "That."]},
    "turn 0 must be",
  ),
  "a number for a text": (
    {"video": "v0.mp4", "conversations": [{"from": "human", "value": 3}]},
    "turn 0 must be",
  ),
  "endless": ({"video": "v0.mp4", "start": 10**400, "conversations": talk()}, "must be seconds"),
  "infinite": (
    {"video": "v0.mp4", "end": float("inf"), "conversations": talk()},
    "must be seconds",
  ),
  "words": ({"video": "v0.mp4", "start": "1:00", "conversations": talk()}, "must be seconds"),
}


def encode(
  path: pathlib.Path,
  frames: int,
  *,
  codec="libx264",
  size=(64, 48),
  pix_fmt="yuv420p",
  times=None,
  sound=False,
  **container,
):
  """A video that starts dark and ends light; `times` in quarters of a frame."""
  with av.open(str(path), "w", options=container) as output:
    voice = output.add_stream("aac", rate=8000, layout="mono") if sound else None
    if frames:
      stream = output.add_stream(codec, rate=8)
      stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
      if times:
        stream.codec_context.time_base = fractions.Fraction(1, 32)
    for i in range(frames):
      image = np.full((size[1], size[0], 3), 20 + 200 * i // frames, np.uint8)
      image[: size[1] // 2] //= 2  # the upper half is darker
      picture = av.VideoFrame.from_ndarray(image, format="rgb24")
      if times:
        picture.pts, picture.time_base = times[i], fractions.Fraction(1, 32)
      output.mux(stream.encode(picture))
    if frames:
      output.mux(stream.encode())
    if sound:
      for i in range(10):
        block = av.AudioFrame.from_ndarray(
          np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        block.sample_rate, block.pts = 8000, i * 1024
        output.mux(voice.encode(block))
      output.mux(voice.encode())
  return path


def rotated(path: pathlib.Path) -> None:
  """A phone's upright video: 64 x 48 with a flag that turns it."""
  encode(path, 16)
  data = bytearray(path.read_bytes())
  head = data.index(b"tkhd") + 44
  data[head : head + 36] = np.array(
    [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4"
  ).tobytes()
  path.write_bytes(data)


def huge_png(path: pathlib.Path) -> None:
  """60,000 x 60,000 pixels, says the header."""

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
  path.write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(bytes(99)))
    + chunk(b"IEND", b"")
  )


def folder(path: pathlib.Path, count: int, size: int = 20) -> pathlib.Path:
  path.mkdir()
  for i in range(count):
    Image.fromarray(np.full((size, size, 3), 10 * i, np.uint8)).save(path / f"{i}.jpg")
  return path


def good_files(at: pathlib.Path) -> dict[str, list[dict]]:
  """By reader, annotations of files that look odd and are not bad."""
  rotated(at / "portrait.mp4")
  encode(at / "odd.mkv", 16, codec="ffv1", size=(47, 33), pix_fmt="yuv444p")
  encode(at / "variable.mkv", 24, times=[4 * i + i % 3 for i in range(24)])
  encode(at / "ten bits.mkv", 16, codec="ffv1", pix_fmt="yuv420p10le")
  encode(at / "sixteen bits.mkv", 16, codec="ffv1", pix_fmt="gray16le")
  encode(at / "with sound.mp4", 16, sound=True)
  encode(at / "one clip.mp4", 8)
  encode(at / "tiny.mkv", 16, codec="ffv1", size=(2, 2), pix_fmt="yuv444p")
  names = [
    'it\'s "quoted".mp4',
    "视频 ü 🐕.mp4",
    "100% %03d [a]*?.mp4",
    "12:30.mp4",
    "-i.mp4",
    "new\nline.mp4",
    "dots..mp4",
  ]
  for name in names:
    encode(at / name, 16)
  (at / "really mp4.avi").write_bytes((at / "-i.mp4").read_bytes())
  (at / "no extension").write_bytes((at / "-i.mp4").read_bytes())
  (at / "link.mp4").symlink_to(at / "-i.mp4")
  names += [
    "portrait.mp4",
    "odd.mkv",
    "variable.mkv",
    "ten bits.mkv",
    "sixteen bits.mkv",
    "with sound.mp4",
    "one clip.mp4",
    "tiny.mkv",
  ]
  names += ["really mp4.avi", "no extension", "link.mp4", str(at / "-i.mp4")]
  videos = [{"id": "same", "video": name, "conversations": talk()} for name in names]
  videos.append(
    {"video": "with sound.mp4", "start": 0.5, "end": 99, "conversations": talk("What\n<image>?")}
  )

  grey = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
  Image.fromarray(grey).save(at / "sixteen.png")
  cv2.imwrite(str(at / "colour sixteen.png"), np.dstack([grey] * 3))
  picture = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(20, 20, 3).astype(np.uint8))
  for mode, name in [
    ("L", "grey.png"),
    ("P", "palette.png"),
    ("RGBA", "alpha.png"),
    ("CMYK", "cmyk.jpg"),
    ("1", "bits.png"),
    ("LA", "la.png"),
  ]:
    picture.convert(mode).save(at / name)
  picture.crop((0, 0, 1, 1)).save(at / "a pixel.png")
  picture.save(at / "jpeg.png", "JPEG")
  names = [
    "sixteen.png",
    "colour sixteen.png",
    "grey.png",
    "palette.png",
    "alpha.png",
    "cmyk.jpg",
    "bits.png",
    "la.png",
    "a pixel.png",
    "jpeg.png",
  ]
  images = [{"id": i, "image": name, "conversations": talk()} for i, name in enumerate(names)]
  folder(at / "frames é", 12)
  return {
    "decord": videos,
    "images": images,
    "img": [{"video": "frames é", "conversations": talk()}],
    "gif": [],
  }


def bad_files(at: pathlib.Path) -> dict[str, list[tuple[dict, str]]]:
  """By reader, annotations that look good, and the reason that their files have in store."""
  (at / "empty.mp4").touch()
  encode(at / "whole.mp4", 80, movflags="faststart")
  whole = (at / "whole.mp4").read_bytes()
  (at / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
  (at / "headless.mp4").write_bytes(whole[len(whole) // 2 :])
  (at / "stub.mp4").write_bytes(whole[:64])
  scrambled = bytearray(whole)
  begin = scrambled.index(b"mdat") + 4
  scrambled[begin:] = (
    np.random.default_rng(0).integers(0, 256, len(whole) - begin, np.uint8).tobytes()
  )
  (at / "scrambled.mp4").write_bytes(scrambled)
  encode(at / "sound alone.mp4", 0, sound=True)
  encode(at / "one frame.mp4", 1)
  encode(at / "seven frames.mp4", 7)
  (at / "text.mp4").write_text("404: not found")
  (at / "zeros.mp4").write_bytes(bytes(10000))
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(at / "picture.jpg")
  (at / "picture.mp4").write_bytes((at / "picture.jpg").read_bytes())
  videos = {
    "empty.mp4": "is empty",
    "cut.mp4": "truncated|decoded",
    "headless.mp4": "can't be read",
    "stub.mp4": "can't be read",
    "scrambled.mp4": "truncated|can be decoded|can't be read",
    "sound alone.mp4": "can't be read|no frames",
    "one frame.mp4": "1 frames",
    "seven frames.mp4": "7 frames.*one clip of 8",
    "text.mp4": "can't be read",
    "zeros.mp4": "can't be read",
    "picture.mp4": "1 frames|can't be read",
  }
  found = {
    "decord": [
      ({"video": name, "conversations": talk()}, reason) for name, reason in videos.items()
    ]
  }
  late = {"video": "whole.mp4", "start": 60, "conversations": talk()}
  short = {"video": "whole.mp4", "start": 1, "end": 1.5, "conversations": talk()}
  found["decord"] += [(late, "nothing lies between start=60"), (short, "has 4 frames")]

  (at / "empty.png").touch()
  (at / "text.png").write_text("no image")
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
    at / "cut.png"
  )
  (at / "cut.png").write_bytes((at / "cut.png").read_bytes()[:3000])
  huge_png(at / "huge.png")
  images = {
    "empty.png": "is no image that can be read",
    "text.png": "is no image that can be read",
    "cut.png": "truncated",
    "huge.png": "huge.png is no .*decompression bomb",
  }
  found["images"] = [
    ({"image": name, "conversations": talk()}, reason) for name, reason in images.items()
  ]

  (folder(at / "corrupt", 12, 200) / "7.jpg").write_bytes(
    (at / "corrupt" / "8.jpg").read_bytes()[:300]
  )
  folder(at / "no letters", 12)
  pathlib.Path(os.fsdecode(os.fsencode(at / "no letters") + b"/5\xff.jpg")).write_text(
    "no image, and a name that is no UTF-8"
  )
  folder(at / "nothing inside", 0)
  folder(at / "too few", 3)
  folder(at / "bad length", 12)
  (at / "bad length.json").write_text('{"duration": "long"}')
  folders = {
    "corrupt": r"7\.jpg is no image",
    "no letters": r"5\\udcff\.jpg is no image",
    "nothing inside": "holds no images",
    "too few": "3 frames",
    "bad length": "must be .*duration",
  }
  found["img"] = [
    ({"video": name, "conversations": talk()}, reason) for name, reason in folders.items()
  ]

  pictures = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8))
    for i in range(12)
  ]
  pictures[0].save(at / "cut.gif", save_all=True, append_images=pictures[1:])
  (at / "cut.gif").write_bytes(
    (at / "cut.gif").read_bytes()[: (at / "cut.gif").stat().st_size // 2]
  )
  pictures[0].save(at / "still.gif")
  (at / "text.gif").write_text("GIF89a, not really")
  gifs = {
    "cut.gif": "frame|frames",
    "still.gif": "1 frames",
    "text.gif": "is no animation that can be read",
  }
  found["gif"] = [
    ({"video": name, "conversations": talk()}, reason) for name, reason in gifs.items()
  ]
  return found


@pytest.fixture
def world(tmp_path):
  root = decoding.make_world(tmp_path / "data")
  videos = root / "videos"
  os.mkfifo(videos / "pipe.mp4")
  (videos / "nowhere.mp4").symlink_to("away.mp4")
  (videos / "loop.mp4").symlink_to("loop.mp4")
  return root


def test_bad_annotations_are_all_listed_before_anything_is_decoded(world):
  write(world / "bad.json", [item for item, _ in BAD.values()])
  mixture(world, {"json_path": "bad.json"}, {"json_path": "videos.json"})
  with pytest.raises(AnnotationError) as error:
    make(world, start=lambda _: pytest.fail("decoded"))
  lines = error.value.fields["bad"]
  assert str(error.value).splitlines()[1:] == [f"  {line}" for line in lines]
  assert len(lines) == len(BAD) and list(world.parent.iterdir()) == [world]
  for i, (_, message) in enumerate(BAD.values()):
    (line,) = [line for line in lines if line.startswith(f"bad.json, annotation {i}: ")]
    assert re.search(message, line), line


def test_the_corpus(world):
  """One run over everything: what is written, what is skipped, and why."""
  good, bad = good_files(world / "videos"), bad_files(world / "videos")
  datasets, wanted = [], {}
  for reader in good:
    items = (
      [(item, None) for item in good[reader]]
      + bad[reader]
      + (list(BAD.values()) if reader == "decord" else [])
    )
    name = f"{reader}.json"
    write(world / name, [item for item, _ in items])
    datasets.append(
      {"json_path": name} | ({} if reader == "images" else {"video_read_type": reader})
    )
    wanted |= {(name, i): reason for i, (_, reason) in enumerate(items)}
  mixture(world, *datasets)
  reasons = [reason for reason in wanted.values() if reason]
  assert len(reasons) > 40 and len(wanted) - len(reasons) > 25
  info = make(world, workers=2, skip_bad=True, timeout=60.0, samples_per_shard=16)
  lines = {(line["annotation"], line["position"]): line for line in manifest(world.parent / "out")}
  assert lines.keys() == wanted.keys()
  for key, reason in wanted.items():
    if reason is None:
      assert "sample" in lines[key], lines[key]
    else:
      assert "reason" in lines[key] and re.search(reason, lines[key]["reason"]), (
        reason,
        lines[key],
      )
  assert info["skipped"] == len(reasons) and info["samples"] == len(wanted) - len(reasons)
  inspection.verify(world.parent / "out")

  store = open_store(world.parent / "out")
  by_name = {pathlib.Path(s.source).name: store.visual(i) for i, s in enumerate(store.samples)}
  assert sum(s.id == "same" for s in store.samples) == len(good["decord"]) - 1
  for name in (
    "portrait.mp4",
    "variable.mkv",
    "ten bits.mkv",
    "sixteen bits.mkv",
    "12:30.mp4",
    "100% %03d [a]*?.mp4",
  ):
    frames = by_name[name].reshape(-1, 16, 16, 3).astype(int)
    level = frames[:, -2, -2].mean(-1) if name != "portrait.mp4" else frames.max((1, 2, 3))
    assert (np.diff(level) > 0).all() and level[0] < 60 and level[-1] > 160, name
  turned = by_name["portrait.mp4"][-1, -1].astype(int)
  # the halves lie side by side
  assert abs(turned[2, 2] - turned[-3, 2]).max() < 30 < abs(turned[2, 2] - turned[2, -3]).max()
  for name in ("sixteen.png", "colour sixteen.png"):
    assert 100 < by_name[name].mean() < 155  # not white

  with pytest.raises(AnnotationError) as caught:
    make(world, "again")
  assert len(caught.value.fields["bad"]) > 0
  for reader in good:  # without the bad annotations: the bad files, and nothing is lost
    items = json.loads((world / f"{reader}.json").read_text())
    write(world / f"{reader}.json", items[: len(good[reader]) + len(bad[reader])])
  count = sum(len(files) for files in bad.values())
  with pytest.raises(video.VideoError) as caught:
    make(world, "again", workers=2, samples_per_shard=16)
  assert len(caught.value.fields["lost"]) == count
  assert f" {count} of {count + info['samples']} samples" in f" {caught.value}"
  assert make(world, "again", samples_per_shard=16, skip_bad=True)["samples"] == info["samples"]


def test_what_may_not_be_read(world):
  """Permissions do not hold for root, so root becomes nobody for a moment."""
  with tempfile.TemporaryDirectory() as place:
    at = pathlib.Path(place)
    at.chmod(0o755)
    make_video(at / "secret.mp4", 8).chmod(0)
    (at / "closed").mkdir()
    make_video(at / "closed" / "v.mp4", 8)
    (at / "closed").chmod(0)
    names = ("secret.mp4", "closed/v.mp4")
    root = os.geteuid() == 0
    try:
      if root:
        os.seteuid(65534)
      found = [*mixtures.path_faults([(str(at / name), "video", "") for name in names])]
      with refused(video.VideoError, where=at / "secret.mp4"):
        load_frames(at / "secret.mp4", **decoding.SAMPLING)
    finally:
      if root:
        os.seteuid(0)
      (at / "closed").chmod(0o755)
  assert all(
    len(faults) == 1 and re.search("no permission|Permission denied", faults[0]) for faults in found
  ), found
