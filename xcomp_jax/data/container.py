"""Reads video files by PyAV, which brings FFmpeg: which frames are shown when, and their pictures.

A header's rate and number of frames may be wrong. What counts are the time stamps of the packets, which are read without
decoding, and what the decoder makes of them.
"""

import array
import bisect
import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, UInt8

STATED = {"mov", "matroska", "avi", "flv", "asf"}  # formats whose header says how long the whole file is
FRAMED = STATED - {"avi"} | {"ogg", "ivf"}  # formats whose packets are whole frames that say when they are shown
NONE = -(2**63)  # no time stamp
KEY, HIDDEN, BROKEN = 1, 2, 4  # what is known of a packet
SKIP = 8  # frames that are sooner decoded than sought
REORDERED = 32  # frames by which decoding may be ahead of showing; more are another recording in the same file
HEAD = 16  # frames that tell whether the decoder gives what the packets say
ROUNDED = 1.01  # units by which time stamps of a constant rate are off, at most
MATRICES = {1: "ITU709", 4: "FCC", 7: "SMPTE240M"}  # by the standard's code; the newer PyAV knows BT.2020's by itself
NO_DECODER = "convert it, `ffmpeg -i FILE -c:v libx264 OUT.mp4`, or install a PyAV whose FFmpeg can: its own wheels have AV1, VP9 and HEVC"


class VideoError(ValueError):
  """A video or image that can't be used; the message names the file and why."""


class TailError(VideoError):
  """The end of a video can't be decoded. readable: how many of its frames can."""

  def __init__(self, message: str, readable: int):
    super().__init__(message)
    self.readable = readable


class Key(NamedTuple):
  """A packet that decoding can begin with. pts, dts: its time stamps, in the stream's units."""

  pts: int
  dts: int


@dataclasses.dataclass(frozen=True)
class Index:
  """The frames of a video stream that are shown, in this order.

  stream: its number in the file. times: float64[N], seconds from the first frame on, ascending. seconds: from the start of the
  first frame to the end of the last. rate: frames per second, where it is constant. average: the header's average rate, by which
  the release goes. pts: int64[N], time stamps in the stream's units; None: the decoder's frames are counted instead. keys: where
  decoding gives what it gives from the beginning, for frames from a key's time stamp on; ascending. lost: seconds that are missing
  at the end, by what the header says; of so many frames as are `stated`.
  """

  stream: int
  times: Float[np.ndarray, " N"]
  seconds: float
  rate: float | None
  average: float | None
  pts: Int[np.ndarray, " N"] | None
  keys: tuple[Key, ...]
  lost: float
  stated: int

  def cut(self, readable: int) -> "Index":
    """The index of the same file without the frames from `readable` on."""
    if readable >= len(self.times):
      return self
    seconds = float(self.times[readable])
    return dataclasses.replace(
      self, times=self.times[:readable], seconds=seconds, pts=None if self.pts is None else self.pts[:readable],
      lost=self.lost + self.seconds - seconds,
    )  # fmt: skip


# --- which frames there are -----------------------------------------------------------------------------------------


class _Packets(NamedTuple):
  """What a stream's packets say, in the order of the file: int64[P] each; flags of KEY, HIDDEN, BROKEN."""

  pts: np.ndarray
  dts: np.ndarray
  length: np.ndarray
  flags: np.ndarray


def index(path: pathlib.Path, stream: int | None = None) -> Index:
  """Finds the frames of a video: one pass over its packets, and over its pictures only where packets don't say it.

  stream: a number among the file's streams; None: the one that players take.

  Raises:
    VideoError: no video in it, no frame, or nothing to decode it with.
  """
  with _opened(path, stream) as (container, found):
    packets = _packets(container, found)
    number, base, listed = found.index, float(found.time_base), found.frames
    average = None if not found.average_rate else float(found.average_rate)
    rates = [float(rate) for rate in (found.average_rate, found.guessed_rate, found.base_rate) if rate]
    formats, begin = set(container.format.name.split(",")), (container.start_time or 0) / av.time_base
    end = (container.duration or 0) / av.time_base if formats & STATED else 0.0
    end += begin if end < begin else 0.0  # some count it from zero on
  if not len(packets.pts) and listed:
    raise VideoError(f"{path} is truncated: it announces {listed} frames and has the data of 0")
  if not len(packets.pts):
    raise VideoError(f"{path} holds no frames")
  pts, keys = _shown(packets)
  if pts is None or not formats & FRAMED or (len(keys) and len(pts) and pts[0] < keys[0].pts):
    pts, keys = _decoded(path, number, pts, keys)
  if pts is None:
    return _counted(path, number, rates, average)
  if not len(pts):
    raise VideoError(f"{path} holds no frame that can be decoded")
  last = packets.length[packets.pts == pts[-1]].max(initial=0) * base
  times, rate, seconds = _times(pts, base, rates, last)
  whole = listed and listed <= len(packets.pts) and not packets.flags[-1] & BROKEN
  stop = float(pts[-1]) * base + seconds - times[-1]
  lost = 0.0
  if packets.flags[-1] & BROKEN or (not whole and _short(path, number, stop, end, 1.5 * seconds / len(pts), bool(listed))):
    lost = max(end - stop, seconds / len(pts))
  stated = listed or round((end - float(pts[0]) * base) * (average or len(pts) / seconds))
  return Index(number, times, seconds, rate, average, pts, tuple(keys), lost, stated)


@contextlib.contextmanager
def _opened(path: pathlib.Path, stream: int | None) -> Generator[tuple[Any, Any]]:
  """Opens a file and one of its video streams.

  Raises:
    VideoError: it can't be opened, has no such stream, or nothing decodes that.
  """
  if path.is_dir():
    raise VideoError(f"{path} is a folder; read it as read_type='frames'")
  if not path.stat().st_size:
    raise VideoError(f"{path} is empty (0 bytes)")
  try:  # "file:", for "12:30.mp4" would be read by protocol "12"
    container = av.open("file:" + os.path.abspath(path), metadata_errors="replace")
  except (av.error.FFmpegError, OSError) as error:
    why = getattr(error, "strerror", None) or error
    raise VideoError(f"{path} can't be read as a video ({why}); it may be truncated, or of a format FFmpeg does not know") from error
  with container:
    videos: Any = container.streams.video
    found: Any = container.streams.best("video") if stream is None else next((s for s in videos if s.index == stream), None)
    if found is None and stream is None and videos:
      found = videos[0]
    if found is None:
      has = f"its video streams are {', '.join(str(s.index) for s in videos)}" if videos else "it holds none"
      raise VideoError(f"{path} can't be read as a video: no video stream{'' if stream is None else f' {stream}'}; {has}")
    if found.codec_context is None:
      raise VideoError(f"{path}: there is no decoder for its video stream {found.index}; {NO_DECODER}")
    found.thread_type = "AUTO"
    yield container, found


def _packets(container: Any, stream: Any) -> _Packets:
  columns = [array.array("q") for _ in range(4)]
  pts, dts, length, flags = columns
  codec = stream.codec_context.name
  with contextlib.suppress(av.error.FFmpegError, OSError):  # what comes behind can't be read
    for packet in _demuxed(container, stream):
      if not packet.size:
        continue
      pts.append(NONE if packet.pts is None else packet.pts)
      dts.append(NONE if packet.dts is None else packet.dts)
      length.append(packet.duration or 0)
      flag = BROKEN * packet.is_corrupt | HIDDEN * packet.is_discard
      if packet.is_keyframe and _restarts(codec, packet):
        flag |= KEY
      elif codec.startswith("vp8") or codec == "libvpx":
        flag |= HIDDEN * (not memoryview(packet)[0] & 16)  # a frame that others refer to, and nobody sees
      flags.append(flag)
  return _Packets(*(np.array(column, np.int64) for column in columns))


def _demuxed(container: Any, *streams: Any) -> Iterator[Any]:
  """Packets of some streams from here on. A stream that begins late, which nobody asked for, makes PyAV stumble over each of its packets."""
  while True:
    try:
      yield from container.demux(*streams)
      return
    except IndexError:
      continue


def _restarts(codec: str, packet: Any) -> bool:
  """Says whether a key frame is one from which all that follows is decoded rightly.

  Some files call every frame one. In H.264 there are pictures that get whole bit by bit.
  """
  if codec not in ("h264", "hevc", "mpeg4", "mpeg2video"):
    return True
  data = bytes(packet)
  for begin in _units(data):
    unit = data[begin : begin + 8]
    if len(unit) < 4:
      break
    if codec == "hevc" and (unit[0] >> 1) & 63 < 32:  # a slice: of a picture that others need not precede, or not
      return 16 <= (unit[0] >> 1) & 63 <= 21
    if codec == "mpeg4" and unit[0] == 0xB6:
      return unit[1] >> 6 == 0
    if codec == "mpeg2video" and unit[0] == 0:
      return (unit[2] >> 3) & 7 == 1
    if codec == "h264" and unit[0] & 31 == 5:  # IDR
      return True
    if codec == "h264" and unit[0] & 31 == 6 and unit[1] == 6:  # SEI: a recovery point, after so many frames: exp-Golomb, "1" is 0
      return unit[3] >= 128
  return codec == "mpeg4"  # short headers


def _units(data: bytes) -> Iterator[int]:
  """Where the units of a packet begin: behind their lengths, as in MP4, or behind start codes."""
  size = int.from_bytes(data[:4], "big")
  if 4 < size + 4 <= len(data) and size != 1:
    at = 0
    while at + 4 < len(data):
      yield at + 4
      at += 4 + int.from_bytes(data[at : at + 4], "big")
    return
  at = data.find(b"\0\0\1")
  while at >= 0:
    yield at + 3
    at = data.find(b"\0\0\1", at + 3)


def _shown(packets: _Packets) -> tuple[np.ndarray | None, list[Key]]:
  """Time stamps of frames in the order in which they are shown, None if packets don't tell; and where decoding can begin."""
  end = len(packets.flags) - int(packets.flags[-1] & BROKEN != 0)  # the last one may have been cut
  pts, dts, flags = packets.pts[:end], packets.dts[:end], packets.flags[:end]
  starts = np.flatnonzero(flags & KEY)
  if len(starts):  # what comes before needs what is not there
    pts, dts, flags = pts[starts[0] :], dts[starts[0] :], flags[starts[0] :]
  order = np.argsort(pts, kind="stable")
  if (pts == NONE).any() or not len(pts) or np.abs(order - np.arange(len(order))).max() > REORDERED:
    return None, []
  shown = pts[order][flags[order] & HIDDEN == 0]
  if (np.diff(shown) == 0).any():
    return None, []
  at = np.flatnonzero(flags & (KEY | HIDDEN) == KEY)  # a hidden one may be of another time
  keys = sorted(Key(int(pts[i]), int(pts[i] if dts[i] == NONE else dts[i])) for i in at)
  return shown, keys


def _decoded(path, stream: int, pts: np.ndarray | None, keys: list[Key]) -> tuple[np.ndarray | None, list[Key]]:
  """The same by the decoder: of the first frames if they are as expected, but for those that refer to what is not there; else of all.

  None where the decoder gives no time stamps that ascend.
  """
  with _opened(path, stream) as (container, found):
    given = (image.pts for image in _whole(container, found))
    if pts is not None and len(keys):
      head = list(itertools.islice((stamp for stamp in given if stamp is not None), HEAD))
      if head and head == pts[(i := int(np.searchsorted(pts, head[0]))) : i + len(head)].tolist() and head[0] <= keys[0].pts:
        return pts[i:], keys
      stamps: list[int | None] = [*head, *given]
    else:
      stamps = list(given)
  if None in stamps or (np.diff(np.array(stamps, np.int64)) <= 0).any():
    return None, []
  return np.array(stamps, np.int64), keys


def _counted(path, stream: int, rates: Sequence[float], average: float | None) -> Index:
  """The index of a file whose time stamps are none, or go back: frames as the decoder gives them, in this order."""
  with _opened(path, stream) as (container, found):
    base = float(found.time_base)
    stamps = [NONE if image.pts is None else image.pts for image in _whole(container, found)]
  if not stamps:
    raise VideoError(f"{path} holds no frame that can be decoded")
  known = np.array(stamps, np.float64) * base
  gaps = np.diff(known)
  good = (gaps > 0) & (known[:-1] > NONE * base) & (known[1:] > NONE * base)
  usual = float(np.median(gaps[good])) if good.any() else 1.0
  rate = rates[0] if rates and good.sum() < max(1, 0.95 * len(good)) else None  # time stamps that mean nothing; else a few that go back
  if rate is None:
    times = np.concatenate([[0.0], np.cumsum(np.where(good, gaps, usual))])
  else:
    times, usual = np.arange(len(stamps)) / rate, 1 / rate
  return Index(stream, times, float(times[-1] + usual), rate, average, None, (), 0.0, len(times))


def _times(pts: np.ndarray, base: float, rates: Sequence[float], last: float) -> tuple[np.ndarray, float | None, float]:
  """Seconds from the first frame on, the rate if it is constant, and the end of the last frame, which may say how long it is."""
  ticks, n = (pts - pts[0]).astype(np.float64), len(pts)
  mean = [(n - 1) / (ticks[-1] * base)] if n > 1 else []
  for rate in (*rates, *mean):
    if np.abs(ticks - np.arange(n) / (rate * base)).max() <= ROUNDED:
      return np.arange(n) / rate, rate, n / rate
  times = ticks * base
  usual = float(np.median(np.diff(times))) if n > 1 else 1 / rates[0] if rates else 1.0
  return times, None, float(times[-1]) + (last if last >= usual / 4 else usual)


def _short(path, stream: int, stop: float, end: float, frame: float, listed: bool) -> bool:
  """Says whether a file that should go on until `end` ends before: neither its video, at `stop`, nor another stream gets there."""
  slack = max(frame, 0.0 if listed else min(1.0, 0.1 * end))
  if not end or stop >= end - slack:
    return False
  with _opened(path, stream) as (container, found):
    with contextlib.suppress(av.error.FFmpegError, OSError):
      container.seek(int(stop / found.time_base), stream=found)
      for packet in _demuxed(container, *(s for s in container.streams if s.type in ("video", "audio"))):
        if packet.pts is not None and not packet.is_corrupt and float((packet.pts + (packet.duration or 0)) * packet.time_base) >= end - slack:
          return False
  return True


# --- their pictures -------------------------------------------------------------------------------------------------


def pictures(path: pathlib.Path, found: Index, wanted: Sequence[int], stop: int) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  """Decodes frames of a video, rotated as players do.

  From one wanted frame to the next it decodes on, or begins again at the last key frame before the next, if that is ahead.

  Args:
    path: the file.
    found: its `index`.
    wanted: numbers of frames, ascending.
    stop: behind the last frame that they were chosen from, which has to be there, too.

  Yields:
    uint8, RGB, of any size.

  Raises:
    TailError: from some frame before `stop` on nothing can be decoded.
    VideoError: a wanted frame is damaged.
  """
  done = 0
  for index in (found, dataclasses.replace(found, keys=())):
    try:
      for image in _pictures(path, index, wanted[done:], stop):
        done += 1
        yield image
      return
    except (_LostError, TailError):  # so without seeking, which finds what can be decoded of a damaged file
      if not index.keys:
        raise


class _LostError(Exception):
  """A key frame was not found again where it is."""


def _pictures(path: pathlib.Path, found: Index, wanted: Sequence[int], stop: int) -> Iterator[np.ndarray]:
  with _opened(path, found.stream) as (container, stream):
    run = _numbered(found, _whole(container, stream))
    number, image, matrix, convert = -1, None, None, VideoReformatter()
    asked = set(wanted)
    for i in sorted(asked | {stop - 1}):
      key = _key(found, i)
      if key is not None and number < i and _number(found, key.pts) > number + SKIP:
        run = _numbered(found, _whole(container, stream, key))
      while number < i:
        last = number
        number, image = next(run, (None, None))
        if number is None:
          lost = found.seconds - (found.times[last] if last >= 0 else 0.0)
          raise TailError(f"{path}: the last {lost:.2f} of {found.seconds:.2f} seconds can't be decoded; it is truncated or damaged", last + 1)
      if i in asked and number != i:
        raise VideoError(f"{path}: the frame at {found.times[i]:.2f} seconds, number {i}, is damaged")
      if i in asked:
        matrix = _matrix(image) if matrix is None else matrix  # once: a frame that was asked for it is freed late, for it is in a cycle
        yield _upright(_rgb(convert, image), *matrix)


def _number(found: Index, stamp: int) -> int:
  """The number of the first frame that is shown at a time stamp or later."""
  assert found.pts is not None  # or nothing is sought
  return int(np.searchsorted(found.pts, stamp))


def _key(found: Index, i: int) -> Key | None:
  """The last key frame from which frame `i` can be decoded."""
  if found.pts is None:
    return None
  at = bisect.bisect_right(found.keys, int(found.pts[i]), key=lambda key: key.pts)
  return found.keys[at - 1] if at else None


def _from(container: Any, stream: Any, key: Key) -> Iterator[Any]:
  """Packets from a key's on.

  Raises:
    _LostError: it can't be found.
  """
  with contextlib.suppress(av.error.FFmpegError, OSError):
    for back in (0.0, 2.0, 20.0):
      container.seek(int(min(key.dts, key.pts) - back / stream.time_base), stream=stream)
      packets = _demuxed(container, stream)
      for packet in packets:
        if packet.pts == key.pts and packet.size:
          return itertools.chain([packet], packets)
        if packet.dts is not None and packet.dts > key.dts:
          break  # behind it
  raise _LostError


def _numbered(found: Index, run: Iterator[Any]) -> Iterator[tuple[int, Any]]:
  """Those decoded frames that have a number."""
  for n, image in enumerate(run):
    if found.pts is None:
      yield n, image
    elif image.pts is not None and (i := _number(found, image.pts)) < len(found.pts) and found.pts[i] == image.pts:
      yield i, image


def _whole(container: Any, stream: Any, key: Key | None = None) -> Iterator[Any]:
  """Decodes from a key's packet on, or from where the file stands, and leaves out what is damaged.

  A decoder calls frames whole that it makes from damaged or lost ones. So from a bad packet on none counts until the next that
  decoding can begin with, and of those behind it none that is shown before it.
  """
  codec = stream.codec_context.name
  flight = 3 + min(os.cpu_count() or 1, 16)  # packets that the decoder's threads may have when one is said to be bad
  order: collections.deque[int | None] = collections.deque(maxlen=256)  # time stamps of packets, as they were decoded
  clean: collections.deque[int | None] = collections.deque(maxlen=64)  # those of packets that decoding can begin with
  suspect: set[int | None] = set()
  bad, leading = False, None  # whether there was no such packet since; its time stamp, until the next
  for packet, cut in _with_next(_from(container, stream, key) if key else _demuxed(container, stream)):
    if cut:
      continue
    if packet.size:
      if packet.is_keyframe and _restarts(codec, packet):
        bad, leading = False, packet.pts if bad else None
        clean.append(packet.pts)
      bad |= packet.is_corrupt
      order.append(packet.pts)
      if bad or (leading is not None and packet.pts is not None and packet.pts < leading):
        suspect.add(packet.pts)
    images = []
    try:
      images = packet.decode()
    except av.error.FFmpegError:
      bad = bad or bool(packet.size)
      suspect.update(list(order)[-flight:])
    for image in images:
      if image.is_corrupt:
        after = list(order)[list(order).index(image.pts) :] if image.pts in order else list(order)[-flight:]
        until = next((n for n, stamp in enumerate(after) if n and stamp in clean), None)
        suspect.update(after[:until])
        bad = bad or until is None
        suspect.add(image.pts)
      if not (bad if image.pts is None else image.pts in suspect or image.is_corrupt):
        yield image


def _with_next(packets: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
  """Packets, and whether one is the last and not whole: it was cut with the file."""
  held = None
  while True:
    try:
      packet = next(packets)
    except (StopIteration, av.error.FFmpegError, OSError):
      return
    if held is not None:
      yield held, not packet.size
    held = None
    if packet.is_corrupt:
      held = packet
    else:
      yield packet, False


def _matrix(frame: Any) -> tuple[int, int, int, int]:
  """The display matrix [[a, b], [c, d]] of a frame: (x, y) is shown at (a x + c y, b x + d y)."""
  for side in frame.side_data:
    if side.type.name == "DISPLAYMATRIX":
      a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].tolist()
      return a, b, c, d
  return 1, 0, 0, 1


def _upright(image: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
  """Turns and mirrors an image as a display matrix says."""
  if abs(a) >= abs(b):
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
  return image.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]


def _rgb(convert: VideoReformatter, frame: Any) -> np.ndarray:
  """Pixels by the matrix and range that the file says (BT.601's where it says none), colours interpolated as by OpenCV."""
  matrix, full = MATRICES.get(int(frame.colorspace)), int(frame.color_range) == 2
  if matrix is None and not full:
    return convert.reformat(frame, format="rgb24", interpolation="BICUBIC").to_ndarray()
  scale = "JPEG" if full else "MPEG"
  # PyAV before 16 looks at the matrix only if the result, which as RGB has none, is said to have another.
  how: dict[str, Any] = {"src_colorspace": matrix, "dst_colorspace": "ITU601"} if matrix else {}
  return convert.reformat(frame, format="rgb24", interpolation="BICUBIC", src_color_range=scale, dst_color_range=scale, **how).to_ndarray()
