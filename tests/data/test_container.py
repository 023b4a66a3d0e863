"""Videos with everything that is odd about those of the world: which frames are found, when they
are shown, and what is in them.
"""

import dataclasses
import os
import pathlib
import pickle
import struct
from fractions import Fraction

import av
import numpy as np
import odd
import pytest
from PIL import Image
from refused import refused
from watched import load_frames

from xcomp_jax.data import container, decoder, streams, video

LIMITS = dict(size=odd.WIDTH, max_frames=32, min_frames=16, fps=4.0, clip_frames=8)
GOP = {"g": "24", "bf": "3"}
STEADY = np.arange(100) * 40
HALVES = np.concatenate([np.arange(10) * 1000, 10000 + np.arange(100) * 33])
BROWSER = np.cumsum(np.random.default_rng(0).integers(20, 120, 100))
MPEG2 = {"g": "12", "bf": "2", "b": "4M", "base": Fraction(1, 25)}


def x264(**options):
  return {"x264-params": ":".join(f"{key}={value}" for key, value in options.items())} | GOP


# wheels have one of them
AV1 = next(name for name in ("libsvtav1", "libaom-av1") if name in av.codecs_available)

# name: times in milliseconds (HALVES: a frame per second, then 30; BROWSER: 20 to 120 ms apart, as
# browsers record), codec, what else `odd.write` is given
CORPUS = {
  "interlaced.ts": (STEADY, "libx264", x264(tff=1)),
  "interlaced.mp4": (STEADY, "libx264", x264(tff=1)),
  "fields.ts": (STEADY, "libx265", {"x265-params": "interlace=tff:keyint=24:log-level=none"}),
  "mpeg2.ts": (100, "mpeg2video", MPEG2 | {"flags": "+ildct+ilme"}),
  "mpeg2.mpg": (100, "mpeg2video", MPEG2),
  "mpeg4.avi": (100, "mpeg4", {"g": "12", "bf": "2", "base": Fraction(1, 25)}),
  "no time stamps.avi": (60, "libx264", {"base": Fraction(1, 25)} | GOP),
  "fragmented, with sound.mp4": (
    STEADY,
    "libx264",
    {"sound": 4.6, "container": {"movflags": "frag_keyframe+delay_moov"}} | GOP,
  ),
  "variable.mkv": (HALVES, "libx264", GOP),
  "variable.mp4": (HALVES, "libx264", GOP),
  "no rate.webm": (BROWSER, "libvpx", {"rate": None, "g": "30", "deadline": "realtime"}),
  "hidden frames.webm": (
    STEADY,
    "libvpx",
    {"g": "60", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "50k"},
  ),
  "vp9.webm": (STEADY, "libvpx-vp9", {"g": "60", "b": "100k"}),
  "late.mkv": (3_600_000 + STEADY, "libx264", GOP),
  "negative.mkv": (
    STEADY - 2000,
    "libx264",
    {"container": {"avoid_negative_ts": "disabled"}} | GOP,
  ),
  "av1.mp4": (STEADY[:40], AV1, {"g": "24"}),
  "10 bits, open GOPs.mp4": (
    STEADY,
    "libx265",
    {"pixels": "yuv420p10le", "x265-params": "keyint=24:open-gop=1:bframes=4:log-level=none"},
  ),
  "open GOPs.mp4": (STEADY, "libx264", x264(**{"open-gop": 1, "scenecut": 0})),
  "open GOPs.ts": (STEADY, "libx264", x264(**{"open-gop": 1, "scenecut": 0})),
  "no key frames.mkv": (STEADY, "libx264", x264(**{"intra-refresh": 1, "keyint": 24})),
  "gap.mp4": (np.where(STEADY < 2000, STEADY, STEADY + 60000), "libx264", GOP),
  "slow.mkv": (np.arange(30) * 10000, "libx264", GOP),
  "fast.mp4": (240, "libx264", {"rate": 240, "base": Fraction(1, 240)} | GOP),
  "12:30 ü.flv": (STEADY, "flv", {"g": "12"}),
  "old.wmv": (STEADY, "wmv2", {"g": "12"}),
  "raw.h264": (STEADY, "libx264", GOP),
  "every one a picture.avi": (100, "mjpeg", {"base": Fraction(1, 25), "pixels": "yuvj420p"}),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A function (name) that gives a file of the corpus."""
  folder, made = tmp_path_factory.mktemp("corpus"), {}

  def get(name: str) -> pathlib.Path:
    if name not in made:
      times, codec, how = CORPUS[name]
      made[name] = odd.write(folder / name, times, codec, **how)
    return made[name]

  return get


def shown(name: str) -> np.ndarray:
  """When the frames of a file are shown, in seconds from the first one."""
  times, _, how = CORPUS[name]
  times = np.arange(times) * 1000.0 / how.get("rate", 25) if isinstance(times, int) else times
  return (times - times[0]) / 1000


def pictures(path, found, wanted, **how) -> list[np.ndarray]:
  return list(decoder.pictures(path, found, list(wanted), len(found.times), **how))


@pytest.mark.parametrize("name", CORPUS)
def test_frames_are_those_that_were_written_and_have_their_times(corpus, name):
  path, times = corpus(name), shown(name)
  found = container.index(path)
  np.testing.assert_allclose(found.times, times, atol=0.0011)
  gaps = np.diff(times)
  assert (
    0.5 * np.median(gaps) < found.seconds - times[-1] < 1.5 * np.median(gaps) and found.lost == 0
  )
  if np.ptp(gaps) < 1e-6:
    assert found.rate == pytest.approx(1 / gaps[0]) and found.seconds == len(times) / found.rate
  else:
    assert found.rate is None
  assert odd.read(pictures(path, found, range(len(times)))) == list(range(len(times)))


@pytest.mark.parametrize("name", CORPUS)
def test_seeking_gives_the_same_as_reading_on(corpus, name):
  path, found = corpus(name), container.index(corpus(name))
  wanted = range(5, len(found.times), 13)
  sought, sequential = (
    pictures(path, found, wanted, skip=0),
    pictures(path, dataclasses.replace(found, keys=()), wanted),
  )
  assert odd.read(sought) == list(wanted)
  for a, b in zip(sought, sequential, strict=True):
    np.testing.assert_array_equal(a, b)
  # which have no time stamps, or none that is known to the end
  if name not in (
    "raw.h264",
    "negative.mkv",
    "no time stamps.avi",
  ):
    assert len(found.keys) > 1 or name == "no key frames.mkv"


def test_only_what_is_needed_is_decoded(corpus, monkeypatch):
  path, found, fed = corpus("open GOPs.mp4"), container.index(corpus("open GOPs.mp4")), []
  demuxed = streams.demuxed

  def watched(*args):
    for packet in demuxed(*args):
      fed.append(packet.pts)
      yield packet

  monkeypatch.setattr(streams, "demuxed", watched)
  got = list(decoder.pictures(path, found, [2, 74], 80))
  assert odd.read(got) == [2, 74] and 10 < len(fed) < 70


def test_what_an_edit_list_hides_is_not_counted(tmp_path):
  path = odd.write(
    tmp_path / "a.mp4", STEADY - 2000, container={"avoid_negative_ts": "disabled"}, **GOP
  )
  with av.open(str(path)) as file:
    assert sum(packet.size > 0 for packet in file.demux(video=0)) > 50
  found = container.index(path)
  assert (
    found.seconds == 2.0
    and found.lost == 0
    and odd.read(pictures(path, found, range(50))) == list(range(50, 100))
  )


@pytest.mark.parametrize(
  "seconds, numbers",
  [
    ((0, 2), [*range(25), *range(50, 75)]),
    ((2, 0), [*range(50, 75), *range(25)]),
    ((0, 0), [*range(25)] * 2),
  ],
)
def test_edits_are_shown_in_their_order(tmp_path, seconds, numbers):
  path = odd.write(tmp_path / "a.mp4", 100, base=Fraction(1, 25), **GOP)
  with av.open(str(path)) as file:
    second = file.streams.video[0].time_base.denominator
  data = bytearray(path.read_bytes())
  at = data.index(b"elst") - 4
  begin, old = (
    struct.unpack(">i", data[at + 20 : at + 24])[0],
    struct.unpack(">I", data[at : at + 4])[0],
  )
  # for how long, from when on, how fast
  entries = b"".join(struct.pack(">IiI", 1000, begin + n * second, 1 << 16) for n in seconds)
  for box in (b"edts", b"trak", b"moov"):
    head = data.rindex(box, 0, at) - 4
    data[head : head + 4] = struct.pack(
      ">I", struct.unpack(">I", data[head : head + 4])[0] + 16 + len(entries) - old
    )
  data[at : at + old] = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(seconds)) + entries
  path.write_bytes(data)
  found = container.index(path)
  assert found.seconds == pytest.approx(2, abs=0.05) and found.lost == 0
  assert odd.read(pictures(path, found, range(50))) == numbers
  assert [odd.read(pictures(path, found, [i]))[0] for i in range(0, 50, 7)] == numbers[::7]


def test_a_cut_begins_with_the_frame_that_is_shown_at_its_start(corpus):
  def sample(name, **how):
    return video.sample(corpus(name), style="ask", **LIMITS | how)

  part = sample("variable.mp4", start=4.5, end=6.5)
  assert part.indices.tolist() == [4] * 6 + [5] * 6 + [6] * 4
  assert part.seconds == 2.0 and part.times.min() == 4.0
  # what is shown until the gap ends
  assert set(sample("gap.mp4", start=30.0, end=61.0).indices) == {49}
  steady = sample("late.mkv", start=1.0, end=3.0)
  assert (
    steady.indices[0] >= int(1.0 * 25)
    and steady.seconds == 2.0
    and sample("late.mkv").seconds == 4.0
  )
  with refused(video.VideoError, where=corpus("late.mkv"), seconds=4.0):
    sample("late.mkv", start=3600.0)


def test_the_average_rate_is_the_release_s(corpus):
  own = video.sample(corpus("variable.mp4"), style="ask", **LIMITS)
  average = video.sample(corpus("variable.mp4"), style="ask", rate="average", **LIMITS)
  found = own.found
  assert own.seconds == found.seconds == pytest.approx(13.3, abs=0.05)
  assert (
    average.seconds == 110 / found.average
    and own.times.tolist() == found.times[own.indices].tolist()
  )
  assert average.times.tolist() == found.times[average.indices].tolist()

  def cut(rate):
    return video.sample(
      corpus("variable.mp4"), style="ask", rate=rate, start=5.0, end=9.0, **LIMITS
    ).indices

  assert cut("own").max() == 8 and cut("average").min() >= int(5 * found.average) > 10


def test_a_stream_is_chosen(tmp_path):
  path = tmp_path / "two.mkv"
  with av.open(str(path), "w") as output:
    streams = [output.add_stream("libx264", rate=rate) for rate in (25, 5)]
    for stream, factor in zip(streams, (1, 2)):
      stream.width, stream.height, stream.pix_fmt = (
        odd.WIDTH * factor,
        odd.HEIGHT * factor,
        "yuv420p",
      )
    for stream, first, count in ((streams[0], 0, 50), (streams[1], 500, 10)):
      for i in range(count):
        image = odd.picture(first + i)
        if first:
          image = image.repeat(2, 0).repeat(2, 1)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
      output.mux(stream.encode())

  def numbers(stream):
    return odd.read(pictures(path, found := container.index(path, stream), range(len(found.times))))

  assert numbers(0) == list(range(50)) and numbers(1) == list(range(500, 510))
  assert numbers(None) == numbers(0)
  with refused(video.VideoError, where=path, stream=7, there=[0, 1]):
    container.index(path, 7)


def test_sound_alone_and_an_unknown_format_are_named(tmp_path):
  with av.open(str(tmp_path / "a.mkv"), "w") as output:
    sound = output.add_stream("pcm_s16le", rate=8000, layout="mono")
    block = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
    block.sample_rate = 8000
    output.mux(sound.encode(block))
    output.mux(sound.encode())
  with refused(video.VideoError, where=tmp_path / "a.mkv", stream=None, there=[]):
    container.index(tmp_path / "a.mkv")
  path = odd.write(tmp_path / "b.mp4", 10)
  path.write_bytes(path.read_bytes().replace(b"avc1", b"xyz7"))
  with refused(video.VideoError, where=path, without_decoder=0):
    container.index(path)


def test_a_name_need_not_be_text(tmp_path):
  path = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad \xff.mp4"))
  odd.write(tmp_path / "a.mp4", 20).rename(path)
  assert odd.read(pictures(path, container.index(path), range(20))) == list(range(20))


# --- ends and damage
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, how", [("mp4", {"movflags": "faststart"}), ("mkv", {})])
def test_a_cut_tail_costs_the_tail_when_asking_and_the_sample_in_training(tmp_path, suffix, how):
  path = odd.write(tmp_path / f"cut.{suffix}", 100, container=how, g="10")
  path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
  chosen = video.sample(path, style="ask", **LIMITS)
  assert 0.5 < chosen.lost < 3 and chosen.seconds + chosen.lost == pytest.approx(4, abs=0.1)
  # the last ones may refer to some that are lost
  assert odd.read(video.frames(chosen)) == np.rint(chosen.times * 25).tolist()
  for how in ({}, {"tails": False}):
    with refused(video.TailError, where=path, stated=100) as caught:
      video.sample(path, style="train", **LIMITS, **how)
    assert 0 < caught.value.readable < 100
  assert len(load_frames(path, style="train", tails=True, **LIMITS).frames) == 16


def test_a_tail_that_does_not_decode_is_found_on_the_way(tmp_path):
  path = odd.write(tmp_path / "zeros.mp4", 100, container={"movflags": "faststart"}, g="10")
  whole, at = path.read_bytes(), int(path.stat().st_size * 0.8)
  path.write_bytes(whole[:at] + bytes(len(whole) - at))
  chosen = video.sample(path, style="ask", **LIMITS)
  assert chosen.lost == 0 and chosen.seconds == 4.0
  with refused(video.TailError, where=path, stated=None) as error:
    list(video.frames(chosen))
  error = pickle.loads(pickle.dumps(error.value))  # it may come out of another process
  shorter = video.without_tail(chosen, error)
  assert f"the last {shorter.lost:.2f} of" in str(error)
  assert (
    shorter.seconds == pytest.approx(4 - shorter.lost)
    and odd.read(video.frames(shorter)) == shorter.indices.tolist()
  )
  got = load_frames(path, style="ask", **LIMITS)
  assert got.seconds == shorter.seconds and odd.read(got.frames) == got.indices.tolist()
  with pytest.raises(video.TailError):
    load_frames(path, style="train", **LIMITS)


def test_a_damaged_frame_is_an_error_with_its_time_and_never_a_picture(tmp_path):
  path = odd.write(tmp_path / "holes.mkv", 100, g="20", bf="0")
  data, index = bytearray(path.read_bytes()), container.index(path)
  with av.open(str(path)) as file:
    packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
  at = data.index(packets[40])  # a key frame: what follows refers to it
  data[at + 8 : at + len(packets[40])] = b"\xff" * (len(packets[40]) - 8)
  path.write_bytes(data)
  assert odd.read(decoder.pictures(path, index, [39, 60, 70], 100)) == [39, 60, 70]
  # the second is not marked by the decoder, and shows something of the first
  for wanted in (
    40,
    45,
  ):
    with refused(video.VideoError, where=path, frame=wanted):
      list(decoder.pictures(path, index, [wanted], 100))


@pytest.mark.parametrize("which", [24, 25, 26, 30])
def test_what_follows_a_damaged_packet_is_right_or_an_error(tmp_path, which):
  """Decoding runs ahead of showing: a key frame may come out of the decoder after the error of a
  packet behind it.
  """
  path = odd.write(tmp_path / "a.mkv", 48, g="12", bf="3")
  found, data = container.index(path), bytearray(path.read_bytes())
  with av.open(str(path)) as file:
    packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
  at = 0
  for packet in packets[: which + 1]:  # alike ones are in every group
    at = data.index(packet, at + 1)
  packet = packets[which]
  data[at + 5 : at + len(packet)] = b"\xff" * (len(packet) - 5)
  path.write_bytes(data)
  errors = []
  for i in range(48):
    try:
      assert odd.read(decoder.pictures(path, found, [i], 48)) == [i]
    except video.VideoError:
      errors.append(i)
  assert errors and 12 <= min(errors) and max(errors) < 37 and len(errors) < 20


def test_a_hole_in_a_broadcast_is_right_or_an_error(tmp_path):
  path = odd.write(
    tmp_path / "a.ts", STEADY, "libx265", **{"x265-params": "keyint=12:bframes=3:log-level=none"}
  )
  data = path.read_bytes()
  # of a transport packet: 0x47, a bit "a frame begins here" and the stream's number, a counter
  size = 188
  inner = [at for at in range(0, len(data), size) if data[at + 1 : at + 3] == b"\x01\x00"]
  assert len(inner) > 75
  for at in inner[15::60]:
    path.write_bytes(data[:at] + data[at + size :])
    found, errors = container.index(path), 0
    for i, number in enumerate(np.rint(found.times * 25).astype(int)):
      try:
        assert odd.read(pictures(path, found, [i])) == [number]
      except video.VideoError:
        errors += 1
    assert 0 < 100 - len(found.times) + errors < 24


def test_not_all_that_is_called_a_key_frame_is_one(tmp_path):
  for codec in ("libx265", "mpeg4", "mpeg2video"):
    how = (
      {"x265-params": "keyint=12:log-level=none"}
      if codec == "libx265"
      else {"g": "12", "b": "4M", "base": Fraction(1, 25)}
    )
    path = odd.write(tmp_path / f"{codec}.mp4", 60, codec, **how)
    # the table of key frames: without it all are
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    found = container.index(path)
    assert 5 <= len(found.keys) <= 7
    assert [odd.read(decoder.pictures(path, found, [i], i + 1)) for i in (11, 30, 59)] == [
      [11],
      [30],
      [59],
    ]


@pytest.mark.parametrize(
  "name, codec",
  [("a.ts", "mpeg2video"), ("a.mp4", "mpeg2video"), ("a.mp4", "mpeg4"), ("a.avi", "mpeg4")],
)
def test_key_frames_are_found_in_packets_of_any_size(tmp_path, name, codec):
  """A start code 00 00 01 B3 could be a length of 435, which only larger packets have room for."""
  rng = np.random.default_rng(0)
  with av.open(str(tmp_path / name), "w") as output:
    stream = output.add_stream(
      codec, rate=25, options={"g": "12", "bf": "0", "b": "4M", "sc_threshold": "1000000000"}
    )
    stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
    for _ in range(36):
      output.mux(
        stream.encode(
          av.VideoFrame.from_ndarray(
            rng.integers(0, 256, (240, 320, 3)).astype(np.uint8), format="rgb24"
          )
        )
      )
    output.mux(stream.encode())
  (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"stss", b"free"))
  found = container.index(tmp_path / name)
  assert len(found.times) == 36 and [
    round(25 * found.times[np.searchsorted(found.pts, key.pts)]) for key in found.keys
  ] == [0, 12, 24]


@pytest.mark.parametrize(
  "messages, found",
  [
    (b"\x06\x01\xc4\x80", True),
    (b"\x06\x01\x24\x80", False),
    (b"\x01\x01\x00\x06\x01\xc4\x80", True),
    (b"\x00\x02\xff\xff\x01\x01\x00\x80", None),
    (b"\x05\xff\x06\x01\xc4", None),
    (b"", None),
  ],
)
def test_a_recovery_point_may_come_after_other_messages(messages, found):
  """SEI: type, length, content; 6 is a recovery point: how many frames later, in exp-Golomb (a
  first bit of 1: at once).
  """
  assert streams.recovers(messages) is found


@pytest.mark.parametrize(
  "name, codec, how",
  [
    ("a.avi", "rawvideo", {"base": Fraction(1, 25)}),
    ("b.avi", "mpeg4", {"g": "12", "base": Fraction(1, 25)}),
    ("c.ivf", "libvpx-vp9", {"g": "12"}),
    ("d.wmv", "wmv2", {"g": "12"}),
  ],
)
def test_older_formats_that_were_cut_say_how_much_is_missing(tmp_path, name, codec, how):
  path = odd.write(tmp_path / name, 100, codec, **how)
  assert container.index(path).lost == 0
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  found = container.index(path)
  assert 10 < len(found.times) < 80 and found.lost == pytest.approx(4 - found.seconds, abs=0.1)


def test_a_stream_that_begins_late_costs_nothing(tmp_path):
  first = odd.write(tmp_path / "a.ts", 60, **GOP).read_bytes()
  other = {"mpegts_start_pid": "0x200", "mpegts_pmt_start_pid": "0x1010"}
  second = odd.write(
    tmp_path / "b.ts", 60 * 40 + STEADY[:60], sound=2.0, first=60, container=other, **GOP
  ).read_bytes()
  (tmp_path / "late.ts").write_bytes(first + second)
  found = container.index(tmp_path / "late.ts")
  assert odd.read(pictures(tmp_path / "late.ts", found, range(60))) == list(range(60))


def test_a_video_of_one_frame_lasts_as_long_as_one(tmp_path):
  for name in ("a.mp4", "a.h264"):
    found = container.index(odd.write(tmp_path / name, 1))
    assert found.times.tolist() == [0.0] and found.seconds == pytest.approx(1 / 25)


def test_seconds_that_are_none_are_refused(corpus):
  for how in ({"start": float("nan")}, {"end": float("inf")}, {"start": -1.0}):
    with refused(video.VideoError, where=corpus("late.mkv"), seconds=None) as caught:
      video.sample(corpus("late.mkv"), style="ask", **LIMITS, **how)
    assert {"start", "end"} < caught.value.fields.keys()


# --- pixels
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [0, 90, 180, 270, "mirrored"])
def test_pictures_stand_as_players_show_them(tmp_path, turn):
  path, fixed = odd.write(tmp_path / "a.mp4", 8), 1 << 16
  matrix = {
    0: (fixed, 0, 0, fixed),
    90: (0, fixed, -fixed, 0),
    180: (-fixed, 0, 0, -fixed),
    270: (0, -fixed, fixed, 0),
    "mirrored": (-fixed, 0, 0, fixed),
  }[turn]
  data = bytearray(path.read_bytes())
  head = data.index(b"tkhd") + 4 + 40  # the track's 3x3 matrix, 16.16 fixed point
  data[head : head + 36] = np.array(
    [*matrix[:2], 0, *matrix[2:], 0, 0, 0, 1 << 30], ">i4"
  ).tobytes()
  path.write_bytes(data)
  got = pictures(path, container.index(path), [5])[0]
  with av.open(str(path)) as file:
    frame = next(file.decode(video=0))
  # what is left where the matrix can't be read
  if turn != "mirrored" and hasattr(frame, "rotation"):
    assert np.sign(decoder.display_matrix(frame)).tolist() == list(
      decoder.TURNS[round(frame.rotation) % 360]
    )
  image = odd.picture(5)
  wanted = image[:, ::-1] if turn == "mirrored" else np.rot90(image, -(turn // 90))  # clockwise
  assert got.shape == wanted.shape and np.abs(got.astype(int) - wanted).max() < 40


@pytest.mark.parametrize("space, scale", [("bt709", "tv"), ("smpte170m", "tv"), ("bt709", "pc")])
def test_colours_are_those_that_the_file_says_they_are(tmp_path, space, scale):
  """A frame is made of Y'CbCr that the standards' matrices give for known colours, whatever a
  converter would make of them.
  """
  colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]]) / 255
  kr, kb = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114)}[space]
  y = colours @ [kr, 1 - kr - kb, kb]
  cb, cr = (colours[:, 2] - y) / (2 - 2 * kb), (colours[:, 0] - y) / (2 - 2 * kr)
  y, cb, cr = (
    (255 * y, 128 + 255 * cb, 128 + 255 * cr)
    if scale == "pc"
    else (16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr)
  )
  frame = av.VideoFrame(64, 32, "yuv420p")
  for plane, values in zip(frame.planes, (y, cb, cr)):
    row = np.repeat(np.rint(values).astype(np.uint8), plane.width // 4)
    plane.update(
      np.pad(
        np.broadcast_to(row, (plane.height, plane.width)),
        ((0, 0), (0, plane.line_size - plane.width)),
      ).tobytes()
    )
  path = tmp_path / "a.mp4"
  with av.open(str(path), "w") as output:
    stream = output.add_stream(
      "libx264",
      rate=8,
      options={
        "qp": "0",
        "x264-params": f"colormatrix={space}:fullrange={'on' if scale == 'pc' else 'off'}",
      },
    )
    stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
    frame.colorspace, frame.color_range = (
      {"bt709": 1, "smpte170m": 6}[space],
      2 if scale == "pc" else 1,
    )
    for _ in range(8):
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
  got = pictures(path, container.index(path), [3])[0][16, [6, 22, 38, 54]]
  assert np.abs(got - colours * 255).max() <= 4


# --- animations
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, how", [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_animations_have_their_own_times_when_asking(tmp_path, suffix, how):
  path, images = tmp_path / f"a.{suffix}", [Image.fromarray(odd.picture(i)) for i in range(20)]
  images[0].save(
    path, save_all=True, append_images=images[1:], duration=[100] * 10 + [500] * 10, loop=0, **how
  )
  assert video.kind(path) == "gif"
  asked = video.sample(path, style="ask", read_type="gif", **LIMITS)
  assert asked.seconds == pytest.approx(6) and asked.times[-1] == pytest.approx(
    1 + 0.5 * (asked.indices[-1] - 10)
  )
  assert odd.read(video.frames(asked)) == asked.indices.tolist()
  part = video.sample(path, style="ask", read_type="gif", start=1.2, end=2.4, **LIMITS)
  assert set(part.indices) == {10, 11, 12}
  trained = video.sample(path, style="train", read_type="gif", **LIMITS)
  assert trained.seconds == 20.0 and trained.times.tolist() == trained.indices.tolist()


@pytest.mark.parametrize("suffix, how", [("gif", {}), ("webp", {"lossless": True})])
def test_an_animation_that_was_cut_is_one_without_its_end(tmp_path, suffix, how):
  path, images = tmp_path / f"a.{suffix}", [Image.fromarray(odd.picture(i)) for i in range(30)]
  images[0].save(path, save_all=True, append_images=images[1:], duration=100, **how)
  path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
  if suffix == "webp":  # its decoder takes whole files only
    with refused(video.VideoError, where=path, readable=None):
      video.sample(path, style="ask", read_type="gif", **LIMITS)
    return
  asked = load_frames(path, style="ask", read_type="gif", **LIMITS)
  assert odd.read(asked.frames) == asked.indices.tolist() and 1 < asked.seconds < 2
  with refused(video.TailError, where=path) as error:
    video.sample(path, style="train", read_type="gif", **LIMITS)
  kept = video.sample(path, style="train", read_type="gif", tails=True, **LIMITS)
  assert kept.seconds == error.value.readable == round(10 * asked.seconds) and kept.lost > 0
  assert kept.found is None  # so that who asks is not told seconds that nobody knows


def test_pictures_with_notes_that_nobody_knows():
  """PyAV raises ValueError for types of side data that it has no name for, such as EXIF."""

  class Frame:
    rotation = 90

    @property
    def side_data(self):
      raise ValueError("31 is not a valid Type")

  assert decoder.display_matrix(Frame()) == decoder.TURNS[90]
  del Frame.rotation
  with refused(video.VideoError, av=av.__version__):
    decoder.display_matrix(Frame())


def test_still_images_are_no_animations(tmp_path):
  for suffix in ("png", "webp", "jpg", "avif"):
    Image.fromarray(odd.picture(5)).save(tmp_path / f"a.{suffix}")
    assert video.kind(tmp_path / f"a.{suffix}") == "img"
    assert odd.read(
      load_frames(
        tmp_path / f"a.{suffix}", style="ask", read_type="img", **LIMITS | {"size": 160}
      ).frames
    ) == [5]
  photo, preview = Image.fromarray(odd.picture(5)), Image.fromarray(odd.picture(6))
  # as cameras do
  photo.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[preview])
  assert video.kind(tmp_path / "photo.jpg") == "img"
  assert video.kind(tmp_path) == "frames" and video.kind(tmp_path / "a.mp4") == "video"
