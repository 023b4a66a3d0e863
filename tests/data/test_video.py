"""Frame sampling, decoding and resizing against the official code's outputs, and the ways a file
can be bad.
"""

import gzip
import json
import os
import pathlib
import random
import shutil
import struct
import zlib

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from refused import refused
from watched import load_frames

from xcomp_jax import files, inputs
from xcomp_jax.data import decoder, prompt, sampling, streams, video

# a small recipe for small files
LIMITS = dict(max_frames=32, min_frames=16, fps=4.0, clip_frames=8)


def frame(i: int) -> np.ndarray:
  """RGB; eight light or dark columns spell the frame number, and blue is half of red."""
  bits = (i >> np.arange(8)) & 1
  image = np.broadcast_to(np.repeat(40 + 180 * bits, 8)[None, :, None], (48, 64, 3)).astype(
    np.uint8
  )
  image[..., 2] //= 2
  return image


def numbers(frames) -> list[int]:
  """The frame numbers that are spelt in frames of any size."""
  red, blue = (
    frames[..., c].astype(float).mean(1).reshape(len(frames), 8, -1).mean(2) for c in (0, 2)
  )
  assert (np.abs(red - 130) > 50).all() and (red - blue > 10).all(), (
    "neither light nor dark, or red and blue swapped"
  )
  return ((red > 130) << np.arange(8)).sum(1).tolist()


def write(path, n: int, rate: int = 8, codec: str = "libx264", options=None, **container):
  with av.open(str(path), "w", options=container) as output:
    stream = output.add_stream(codec, rate=rate, options=options or {})
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for i in range(n):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(frame(i), format="rgb24")))
    output.mux(stream.encode())
  return path


@pytest.mark.pure
def test_frame_indices_equal_the_official_180_cases(reference):
  cases = json.loads(gzip.open(reference / "frame_sampling.json.gz").read())
  assert len(cases) == 180
  for case in cases:
    limits = dict(
      max_frames=case["max"],
      min_frames=case["min"],
      target_fps=case["env_fps"],
      clip_frames=case["local_num_frames"],
    )
    train = case["eval"] if case["train"] == "same" else case["train"]
    for style, expected in (("ask", case["eval"]), ("train", train)):
      got = video.frame_indices(case["vlen"], case["fps"], style=style, **limits)
      assert got.tolist() == expected, (case["vlen"], case["fps"], case["min"], style)


@pytest.mark.pure
def test_asking_repeats_frames_of_a_short_video_like_load_video(reference):
  for case in json.loads((reference / "load_video.json").read_text()):
    vlen, fps = case["vlen"], case["fps"]
    limits = dict(max_frames=1024, min_frames=128, target_fps=8, clip_frames=8)
    got = video.stretch(video.frame_indices(vlen, fps, style="ask", **limits), 128)
    assert got.tolist() == case["frame_ids"]
    assert prompt.time_message(vlen / fps, len(got)) == case["msg"]


@pytest.mark.pure
def test_frame_indices_obey_any_limits():
  rng = random.Random(0)
  for _ in range(500):
    clip = rng.choice([4, 8])
    low = clip * rng.randint(1, 4)
    high = low + clip * rng.randint(0, 8)
    vlen, fps, target = (
      rng.randint(1, 400),
      rng.choice([1.0, 10.0, 29.97]),
      rng.choice([0.5, 2.0, 8.0]),
    )
    got = video.frame_indices(
      vlen,
      fps,
      max_frames=high,
      min_frames=low,
      target_fps=target,
      clip_frames=clip,
      style="train",
    )
    assert len(got) % clip == 0 and len(got) <= high and len(got) >= min(low, vlen // clip * clip)
    assert (np.diff(got) > 0).all() and (got >= 0).all() and (got < vlen).all()


@pytest.mark.pure
@pytest.mark.parametrize("low,high", [(12, 16), (8, 20), (16, 8), (0, 8)])
def test_frame_indices_refuse_limits_that_are_no_whole_clips(low, high):
  with refused(sampling.LimitsError, min_frames=low, max_frames=high):
    sampling.check_limits(high, low, 8)
  sampling.check_limits(max(high, 16), 8 * max(1, low // 8), 4)


def test_resize_equals_the_official_preprocessing(reference):
  # uint8 codes of the official numbers in `levels`, float32[3, 256]
  data = np.load(reference / "preprocess" / "out.npz")
  mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
  for i in range(5):
    pixels = np.asarray(Image.open(reference / "preprocess" / f"in{i}.png"))
    small = video.resize(pixels[None], int(data[f"size{i}"]))
    assert small.dtype == np.uint8
    pixels = (small[0] * np.float32(1 / 255) - mean) / std
    step = int(data[f"stride{i}"])
    official = data["levels"][np.arange(3)[:, None, None], data[f"out{i}"]]
    np.testing.assert_allclose(
      pixels.transpose(2, 0, 1)[:, ::step, ::step], official, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
  "suffix,codec",
  [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")],
)
def test_load_decodes_the_sampled_frames_only_and_in_order(tmp_path, suffix, codec):
  # 10 s at 8 fps: every second frame would be 40, the limit is 32
  path = write(tmp_path / f"a.{suffix}", 80, codec=codec)
  got = load_frames(path, size=32, style="train", **LIMITS)
  assert (
    got.frames.shape == (32, 32, 32, 3) and got.frames.dtype == np.uint8 and got.seconds == 10.0
  )
  expected = video.frame_indices(
    80, 8.0, max_frames=32, min_frames=16, target_fps=4.0, clip_frames=8, style="train"
  )
  assert got.indices.tolist() == expected.tolist()
  assert numbers(got.frames) == expected.tolist()


def test_load_gives_the_pixels_of_another_decoder(tmp_path):
  path = write(tmp_path / "a.mp4", 40)
  got = load_frames(path, size=48, style="train", **LIMITS)
  with av.open(str(path)) as file:
    pictures = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
  expected = video.resize(np.stack([pictures[i] for i in got.indices]), 48)
  # two builds of the colour conversion may round apart
  assert np.abs(got.frames.astype(int) - expected).max() <= 2


def test_load_reads_what_opencv_writes(tmp_path):
  path = tmp_path / "a.mp4"
  writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8, (64, 48))
  for i in range(24):
    writer.write(frame(i)[..., ::-1])
  writer.release()
  got = load_frames(path, size=16, style="train", **LIMITS)
  assert got.seconds == 3.0 and len(got.frames) == 16
  assert numbers(got.frames) == got.indices.tolist()


def test_load_cuts_from_start_to_end(tmp_path):
  path = write(tmp_path / "a.mp4", 80)
  got = load_frames(path, size=16, style="train", start=2.0, end=5.0, **LIMITS)
  assert got.seconds == 3.0 and len(got.frames) == 16  # 4 fps * 3 s = 12, raised to min_frames
  assert got.indices[0] == 16 and got.indices[-1] == 38
  tail = load_frames(path, size=16, style="train", start=8.0, end=99.0, **LIMITS)
  # of int(1.9 * 8) frames
  assert tail.seconds == pytest.approx(1.9) and tail.indices[0] == 64 and tail.indices[-1] == 77
  # there is no other
  assert load_frames(path, size=16, style="ask", start=9.9, **LIMITS).indices.tolist() == [79] * 16
  for bounds in (dict(start=5.0, end=5.0), dict(start=10.5), dict(end=-1.0)):
    with refused(video.VideoError, where=path, seconds=10.0):
      load_frames(path, size=16, style="train", **bounds, **LIMITS)


def test_a_path_through_a_link_is_the_systems(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("films/cuts").mkdir(parents=True)
  pathlib.Path("link").symlink_to("films/cuts")
  write("a.mp4", 8)
  write("films/a.mp4", 16)
  assert len(load_frames("link/../a.mp4", size=16, style="train", **LIMITS).frames) == 16
  assert files.absolute("link/../a.mp4") == f"{tmp_path}/link/../a.mp4"


def test_fewer_frames_than_a_clip_are_refused_in_training_and_repeated_when_asking(tmp_path):
  path = write(tmp_path / "a.mp4", 5)
  with refused(video.VideoError, where=path, found=5):
    load_frames(path, size=16, style="train", **LIMITS)
  got = load_frames(path, size=16, style="ask", **LIMITS)
  assert got.indices.tolist() == [[0, 0, 1, 1, 2, 3, 3, 4][i // 2] for i in range(16)]
  assert len(got.frames) == 16 and got.seconds == 5 / 8
  assert numbers(got.frames) == got.indices.tolist()


def test_a_missing_path_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4 does not exist"):
    load_frames(tmp_path / "nowhere.mp4", size=16, style="train", **LIMITS)


def test_an_address_is_named_as_it_was_given(tmp_path):
  for path in ("https://example.org/a.mp4", tmp_path / "https://example.org/a.mp4"):
    with pytest.raises(
      FileNotFoundError,
      match=r"^https://example\.org/a\.mp4 is an address; nothing is downloaded here",
    ):
      load_frames(path, size=16, style="ask", **LIMITS)


@pytest.mark.parametrize("style", ["train", "ask"])
@pytest.mark.parametrize(
  "content,fields", [(b"", {"bytes": 0}), (b"not a video " * 99, {"bytes": None})]
)
def test_an_empty_or_unreadable_file_is_refused(tmp_path, style, content, fields):
  path = tmp_path / "bad.mp4"
  path.write_bytes(content)
  with refused(video.VideoError, where=path, **fields) as caught:
    load_frames(path, size=16, style=style, **LIMITS)
  assert ("why" in caught.value.fields) == bool(content)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.85])
def test_a_truncated_file_is_refused_with_both_counts(tmp_path, suffix, share):
  path = write(
    tmp_path / f"cut.{suffix}",
    80,
    options={"g": "8", "x264-params": "qp=1"},
    movflags="faststart",
  )
  whole = path.read_bytes()
  load_frames(path, size=16, style="train", **LIMITS)
  path.write_bytes(whole[: int(len(whole) * share)])
  with refused(video.VideoError, where=path, stated=80) as caught:
    load_frames(path, size=16, style="train", **LIMITS)
  assert 0 <= caught.value.fields["readable"] < 80


def test_an_mp4_that_lacks_its_last_frame_is_refused(tmp_path):
  path = write(tmp_path / "cut.mp4", 80, movflags="faststart")
  path.write_bytes(path.read_bytes()[:-1])
  with refused(video.TailError, where=path, stated=80, readable=79):
    load_frames(path, size=16, style="train", **LIMITS)


def test_sound_that_outlasts_the_pictures_is_no_truncation(tmp_path):
  path = tmp_path / "sound.mkv"
  with av.open(str(path), "w") as output:
    stream = output.add_stream("libx264", rate=8)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    sound = output.add_stream("pcm_s16le", rate=8000, layout="mono")
    for i in range(80):
      output.mux(stream.encode(av.VideoFrame.from_ndarray(frame(i), format="rgb24")))
    output.mux(stream.encode())
    for i in range(105):  # 10.5 s
      block = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
      block.sample_rate, block.pts = 8000, i * 800
      output.mux(sound.encode(block))
    output.mux(sound.encode())
  assert load_frames(path, size=16, style="train", **LIMITS).seconds == 10.0  # of the pictures


def test_a_gif_runs_at_one_frame_per_second(tmp_path):
  path = tmp_path / "a.gif"
  pictures = [Image.fromarray(frame(i)) for i in range(20)]
  pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
  got = load_frames(path, size=16, style="train", read_type="gif", **LIMITS)
  assert got.seconds == 20.0 and len(got.frames) == 16
  assert numbers(got.frames) == got.indices.tolist()
  path.write_bytes(path.read_bytes()[:40])
  with refused(video.VideoError, where=path):
    load_frames(path, size=16, style="train", read_type="gif", **LIMITS)
  pictures[0].save(path, "JPEG")  # no GIF at all, and cut
  path.write_bytes(path.read_bytes()[:-20])
  with refused(video.VideoError, where=path, readable=None) as caught:
    load_frames(path, size=16, style="ask", read_type="gif", **LIMITS)
  assert "image file is truncated" in str(caught.value)


def test_a_folder_is_read_in_natural_order_at_one_frame_per_second(tmp_path):
  folder = tmp_path / "clip"
  folder.mkdir()
  for i in range(20):
    Image.fromarray(frame(i)).save(folder / f"img_{i}.png")
  (folder / "notes.txt").write_text("no image")
  for read_type in ("frames", "img"):  # annotations say img
    got = load_frames(folder, size=16, style="train", read_type=read_type, **LIMITS)
    assert got.seconds == 20.0 and len(got.frames) == 16
    assert numbers(got.frames) == got.indices.tolist()
  (folder / "img_12.png").write_bytes((folder / "img_12.png").read_bytes()[:60])
  with refused(video.VideoError, where=folder / "img_12.png"):
    load_frames(folder, size=16, style="train", read_type="frames", **LIMITS)


def test_a_folder_with_a_stated_duration_is_sampled_as_if_it_had_an_image_per_second(tmp_path):
  folder = tmp_path / "clip.1"
  folder.mkdir()
  for i in range(64):
    Image.fromarray(frame(i)).save(folder / f"{i}.png")
  (tmp_path / "clip.1.json").write_text('{"duration": 4.0}')
  ask = load_frames(folder, size=16, style="ask", read_type="frames", **LIMITS)
  train = load_frames(folder, size=16, style="train", read_type="frames", **LIMITS)
  assert ask.seconds == train.seconds == 4.0
  assert len(ask.frames) == len(train.frames) == 32  # 64 s at 4 fps, at most 32, not 4 s
  (tmp_path / "clip.1.json").write_text('{"length": 4.0}')
  with refused(video.VideoError, where=tmp_path / "clip.1.json"):
    load_frames(folder, size=16, style="ask", read_type="frames", **LIMITS)


@pytest.mark.parametrize(
  "name, side, given, rate",
  [
    ("films/TVQA_frames/a", None, None, 3.0),
    ("other/a", None, None, 1.0),
    ("other/a", None, 5.0, 5.0),
    ("tvqa/a", None, 5.0, 5.0),
    ("tvqa/a", 10.0, 5.0, 6.0),
  ],
)
@pytest.mark.parametrize("style", ["train", "ask"])
def test_how_fast_a_folder_is_and_what_a_cut_of_it_has(tmp_path, style, name, side, given, rate):
  """By hand: from round(start x rate), never the first image, to round(end x rate), both included,
  one clip in 8 seconds.
  """
  folder = tmp_path / name
  folder.mkdir(parents=True)
  for i in range(60):
    (folder / f"{i}.jpg").touch()
  if side:
    (folder.parent / f"{folder.name}.json").write_text(json.dumps({"duration": side}))
  how = dict(
    size=16,
    style=style,
    read_type="frames",
    folder_rate=given,
    max_frames=1024,
    min_frames=8,
    fps=8.0,
    clip_frames=8,
  )
  whole = video.sample(folder, **how)
  assert whole.seconds == 60 / rate and whole.times.tolist() == (whole.indices / rate).tolist()
  part = video.sample(folder, start=2.0, end=9.0, **how)
  first, last = round(2 * rate), round(9 * rate)
  assert part.seconds == 7.0 and part.indices.tolist() == [
    first + round(i * (last - first) / 7) for i in range(8)
  ]
  rest = video.sample(folder, end=1e9, **how)
  assert (
    rest.seconds == 60 / rate
    and rest.indices[0] == 1
    and rest.indices[-1] == 59
    and len(rest.indices) == 8 * max(1, 60 / rate // 8)
  )


@pytest.mark.parametrize(
  "name, part, count",
  [("tvqa", (61.1, 71.45), 24), ("tvqa", (23.18, 28.38), 8), ("other", (28.33, 33.8), 8)],
)
def test_the_length_of_a_part_of_a_folder_is_that_of_its_seconds(tmp_path, name, part, count):
  """Worked out from the release's rule: 31.05, 15.6 and 5.47 images, though 31, 16 and 7 lie
  between the rounded ends.
  """
  (tmp_path / name).mkdir()
  for i in range(270):
    (tmp_path / name / f"{i}.jpg").touch()
  how = dict(
    size=16,
    style="train",
    read_type="frames",
    max_frames=1024,
    min_frames=128,
    fps=8.0,
    clip_frames=8,
  )
  assert len(video.sample(tmp_path / name, start=part[0], end=part[1], **how).indices) == count


def test_wrong_kinds_of_path_are_refused(tmp_path):
  with refused(video.VideoError, where=tmp_path, found="no images"):
    load_frames(tmp_path, size=16, style="train", read_type="img", **LIMITS)
  with refused(video.VideoError, where=tmp_path, found="folder"):
    load_frames(tmp_path, size=16, style="train", **LIMITS)
  (tmp_path / "a.png").write_bytes(b"no image")
  with refused(video.VideoError, where=tmp_path / "a.png", found="file"):
    load_frames(tmp_path / "a.png", size=16, style="train", read_type="frames", **LIMITS)
  with refused(video.VideoError, where=tmp_path / "a.png", expected="image that can be read"):
    load_frames(tmp_path / "a.png", size=16, style="train", read_type="img", **LIMITS)


def test_a_picture_that_needs_another_program_is_refused(tmp_path):
  path = tmp_path / "drawing.jpg"
  # Pillow would ask Ghostscript
  path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
  with refused(video.VideoError, where=path):
    load_frames(path, size=8, style="train", read_type="img", **LIMITS)


def ask(path):
  return load_frames(path, size=8, style="ask", read_type=video.kind(path), **LIMITS)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
  """A PNG that claims its size, and has little data."""
  every = [
    (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
    *chunks,
    (b"IDAT", zlib.compress(bytes(100))),
    (b"IEND", b""),
  ]
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
    for kind, c in every
  )


ATTACKS = {
  "bomb.png": png(20_000, 20_000),
  "claim.png": png(2**31 - 1, 2**31 - 1),
  "thin.png": png(2**31 - 1, 1),
  "cut.png": png(8, 8)[:40],
  "text.png": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20)))),
  "frames.png": png(8, 8, (b"acTL", struct.pack(">II", 2**32 - 1, 0)), (b"fcTL", bytes(26))),
  "screen.gif": (
    b"GIF89a"
    + struct.pack("<HH", 65535, 65535)
    + bytes(9)
    + b"\x2c"
    + bytes(4)
    + struct.pack("<HHB", 65535, 65535, 0)
    + b"\2\2\x4c\1\0;"
  ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_picture_that_is_an_attack_is_refused_by_its_name(tmp_path, name):
  (tmp_path / name).write_bytes(ATTACKS[name])
  with refused(video.VideoError, where=tmp_path / name):
    ask(tmp_path / name)


def test_no_other_program_is_started(tmp_path, monkeypatch):
  (tmp_path / "bin").mkdir()
  for name in ("gs", "gswin64c", "djpeg", "netpbm"):
    (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "bin" / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
  drawing = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
  with Image.open(_text(tmp_path / "control.eps", drawing)) as image, pytest.raises(OSError):
    image.load()  # so Pillow would start it
  (tmp_path / "started").unlink()
  for name in ("a.gif", "a.jpg", "a.png", "a.webp", "a.mp4"):
    with refused(video.VideoError, where=tmp_path / name):
      ask(_text(tmp_path / name, drawing))
    for kind in ("gif", "img", "video"):
      with refused(video.VideoError, where=tmp_path / name):
        load_frames(tmp_path / name, size=8, style="train", read_type=kind, **LIMITS)
  assert not (tmp_path / "started").exists()


def _text(path, text):
  path.write_text(text)
  return path


LISTS = {
  "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{0}/b.ts\n#EXT-X-ENDLIST\n",
  "near.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nb.ts\n#EXT-X-ENDLIST\n",
  "web.m3u8": (
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nhttp://127.0.0.1:9/b.ts\n#EXT-X-ENDLIST\n"
  ),
  "a.ffconcat": "ffconcat version 1.0\nfile b.ts\n",
  "concat.mp4": "ffconcat version 1.0\nfile b.ts\n",
  "a.sdp": "v=0\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
  "a.mpd": (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation '
    'id="1"><BaseURL>b.ts</BaseURL></Representation></AdaptationSet></Period></MPD>'
  ),
  "%d.tiff": "numbered images",
  "a.svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="b.ts"/></svg>',
}


@pytest.mark.parametrize("name", LISTS)
def test_a_file_that_names_other_files_or_addresses_is_not_followed(tmp_path, name):
  write(tmp_path / "b.ts", 16)
  for i in range(3):
    Image.fromarray(frame(i)).save(tmp_path / f"{i}.tiff")
  with refused(video.VideoError, where=tmp_path / name) as caught:
    ask(_text(tmp_path / name, LISTS[name].format(tmp_path)))
  assert "why" in caught.value.fields  # it was not opened


def test_an_mp4_whose_data_are_in_another_file_is_read_alone(tmp_path):
  path, name = write(tmp_path / "a.mov", 16), b"b.mov"
  shutil.copy(path, tmp_path / "b.mov")
  data, where = bytearray(path.read_bytes()), b"volume:" + name
  link = (
    bytes(10)
    + b"\6"
    + b"volume".ljust(27, b"\0")
    + bytes(12)
    + bytes([len(name)])
    + name.ljust(63, b"\0")
    + bytes(16)
    + struct.pack(">hh", 0, 0)
  )
  link += (
    bytes(16)
    + struct.pack(">hh", 2, len(where))
    + where
    + bytes(len(where) % 2)
    + struct.pack(">hh", -1, 0)
  )
  at = data.index(b"dref") - 4
  old = struct.unpack_from(">I", data, at)[0]
  new = (
    struct.pack(">I4sII", 28 + len(link), b"dref", 0, 1)
    + struct.pack(">I4sI", 12 + len(link), b"alis", 0)
    + link
  )
  data[at : at + old] = new
  for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
    size = data.index(box) - 4
    struct.pack_into(">I", data, size, struct.unpack_from(">I", data, size)[0] + len(new) - old)
  path.write_bytes(data)
  with refused(video.VideoError, where=path, stated=16, readable=0):
    ask(path)


def test_pipes_devices_and_sockets_are_refused_without_waiting(tmp_path):
  for name in ("a.png", "a.gif", "a.mp4", "clip.json"):
    os.mkfifo(tmp_path / name)
  (tmp_path / "link.jpg").symlink_to("a.png")
  (tmp_path / "zero.png").symlink_to("/dev/zero")
  (tmp_path / "clip").mkdir()
  shutil.copytree(tmp_path / "clip", tmp_path / "inside")
  Image.fromarray(frame(0)).save(tmp_path / "clip" / "0.png")
  os.mkfifo(tmp_path / "inside" / "0.png")
  for name in ("a.png", "a.gif", "a.mp4", "link.jpg", "zero.png", "clip", "inside"):
    with pytest.raises(inputs.NoFileError) as caught:
      ask(tmp_path / name)
    assert name in str(caught.value)


def test_names_that_are_no_utf8_work(tmp_path):
  def name(suffix):
    return tmp_path / os.fsdecode(b"caf\xff" + suffix)

  os.rename(write(tmp_path / "a.mp4", 16), name(b".mp4"))
  name(b"").mkdir()
  pictures = [Image.fromarray(frame(i)) for i in range(9)]
  pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
  os.rename(tmp_path / "a.gif", name(b".gif"))
  pictures[0].save(tmp_path / "a.png")
  shutil.copy(tmp_path / "a.png", name(b"/\xfe.png"))
  os.rename(tmp_path / "a.png", name(b".png"))
  assert [len(ask(name(suffix)).frames) for suffix in (b".mp4", b".gif", b".png", b"")] == [
    16,
    16,
    1,
    16,
  ]
  name(b".png").write_bytes(b"no image")
  with refused(video.VideoError, where=name(b".png")):
    ask(name(b".png"))


class Panic(BaseException):
  """What libraries in Rust raise."""


@pytest.mark.parametrize(
  "error",
  [
    MemoryError(),
    RecursionError("deep"),
    Panic("panicked"),
    ZeroDivisionError("x"),
    Image.DecompressionBombError("large"),
    KeyError(5),
  ],
)
def test_whatever_a_decoder_raises_is_one_error_with_the_files_name(tmp_path, monkeypatch, error):
  (tmp_path / "clip").mkdir()
  for name in ("a.png", "a.gif", "clip/0.png"):
    Image.fromarray(frame(0)).save(tmp_path / name)
  write(tmp_path / "a.mp4", 16)

  def fail(*args, **how):
    raise error

  if isinstance(error, Exception):
    monkeypatch.setattr(Image, "open", fail)
  else:
    monkeypatch.setattr(Image.Image, "convert", fail)
  monkeypatch.setattr(decoder, "rgb", fail)
  for name in ("a.png", "a.gif", "clip", "a.mp4"):
    with refused(video.VideoError) as caught:
      ask(tmp_path / name)
    assert caught.value.fields["where"] in (tmp_path / name, tmp_path / name / "0.png")


def test_a_video_of_too_many_pixels_is_refused(tmp_path):
  path = write(tmp_path / "a.mp4", 16)
  with streams.opened_stream(path, None, pixels=64 * 48):
    pass
  fields = {"where": path, "found": (64, 48), "allowed": 3071}
  with refused(video.VideoError, **fields), streams.opened_stream(path, None, pixels=3071):
    pass


@pytest.mark.parametrize(
  "said",
  [
    b"\xff",
    b"[" * 100_000,
    b"[]",
    b'{"duration": "long"}',
    b'{"duration": NaN}',
    b'{"duration": -1}',
    b'{"duration": 1' + b"0" * 400 + b"}",
  ],
)
def test_a_folders_file_may_hold_anything(tmp_path, said):
  (tmp_path / "clip").mkdir()
  Image.fromarray(frame(0)).save(tmp_path / "clip" / "0.png")
  (tmp_path / "clip.json").write_bytes(said)
  with pytest.raises(video.VideoError) as caught:
    ask(tmp_path / "clip")
  assert str(caught.value).startswith(f"{tmp_path}/clip")


def test_a_still_image_is_one_frame(tmp_path):
  Image.fromarray(frame(3)).convert("L").save(tmp_path / "a.png")  # grey files become RGB
  got = load_frames(tmp_path / "a.png", size=16, style="train", read_type="img", **LIMITS)
  assert got.frames.shape == (1, 16, 16, 3) and got.seconds == 0.0


def test_a_rotation_tag_is_applied(tmp_path):
  """Phones store upright videos lying down."""
  path = write(tmp_path / "a.mp4", 16)
  data = bytearray(path.read_bytes())
  head = data.index(b"tkhd") + 4 + 40  # the track's 3x3 matrix, 16.16 fixed point
  data[head : head + 36] = np.array(
    [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4"
  ).tobytes()
  path.write_bytes(data)
  capture = cv2.VideoCapture(str(path))
  assert capture.read()[1].shape == (64, 48, 3)
  capture.release()
  assert load_frames(path, size=16, style="train", **LIMITS).frames.shape == (16, 16, 16, 3)
