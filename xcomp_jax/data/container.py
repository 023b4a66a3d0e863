"""Reads video files by PyAV, which brings FFmpeg: which frames are shown when, and their pictures.

A header's rate and number of frames may be wrong. What counts are the time stamps of the packets,
which are read without decoding, and what the decoder makes of them.
"""

import array
import bisect
import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import struct
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, Int, UInt8

from xcomp_jax.errors import XCompError
from xcomp_jax.files import absolute
from xcomp_jax.inputs import regular

# What FFmpeg may take a file for: formats that hold all they show in one file. Others (playlists,
# lists, numbered images, streams) name files and addresses, which it would open.
FORMATS = (
  "apng,asf,asf_o,av1,avi,avs2,avs3,bink,bmp_pipe,cavsvideo,dhav,dirac,dnxhd,dv,evc,flic,flv,gif,gxf,h261,h263,h264,hevc,ivf,j2k_pipe,jpeg_pipe,"
  "jpegxl_anim,jpegxl_pipe,kux,live_flv,lxf,m4v,matroska,mjpeg,mjpeg_2000,mov,mpeg,mpegts,mpegvideo,mpjpeg,mxf,nsv,nut,nuv,obu,ogg,png_pipe,ppm_pipe,rm,"
  "roq,smk,swf,thp,tiff_pipe,ty,vc1,vc1test,vivo,vvc,webp_pipe,wtv,yuv4mpegpipe"
)
PIXELS = 178_956_970  # of a picture, at most; Pillow has the same limit
STATED = {"mov", "matroska", "avi", "flv", "asf"}  # formats whose header says how long the file is
# of which FFmpeg says how long the file is now, while the header has its number of frames
COUNTED = {
  "avi",
  "ivf",
}
NONE = -(2**63)  # stands for a missing time stamp
# bits of `_Packets.flags`: decoding can begin here; never shown; damaged
KEY, HIDDEN, BROKEN = (
  1,
  2,
  4,
)
SKIP = (
  8  # frames; a key frame that is no further ahead is reached sooner by decoding on than by seeking
)
REORDERED = (
  32  # packets; a time stamp that is further out of order belongs to a second recording in the file
)
# decoded frames that are compared with the packets' time stamps before all of these are believed
HEAD = 16
ROUNDED = 1.01  # time units by which rounding may move the time stamps of a constant rate
# H.273's number to PyAV's name; newer PyAV knows BT.2020's by itself
MATRICES = {
  1: "ITU709",
  4: "FCC",
  7: "SMPTE240M",
}
# begins the part of an ASF header that says how long the file is
ASF = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
# degrees counterclockwise, as a display matrix
TURNS = {
  0: (1, 0, 0, 1),
  90: (0, -1, 1, 0),
  180: (-1, 0, 0, -1),
  270: (0, 1, -1, 0),
}
# that are no text; 19 replaces by itself
TITLES: dict[str, Any] = (
  {} if int(av.__version__.partition(".")[0]) > 18 else {"metadata_errors": "replace"}
)
NO_DECODER = (
  "convert it, `ffmpeg -i FILE -c:v libx264 OUT.mp4`, or install a PyAV whose FFmpeg "
  "can: its own wheels have AV1, VP9 and HEVC"
)


class VideoError(XCompError, ValueError):
  """A video or image that can't be used; the message names the file and why."""


class TailError(VideoError):
  """The end of a video can't be decoded. readable: how many of its frames can."""

  def __init__(self, message: str, readable: int):
    super().__init__(message)
    self.readable = readable

  def __reduce__(self) -> tuple:
    return type(self), (str(self), self.readable)  # or it could not come out of another process


class Key(NamedTuple):
  """A packet that decoding can begin with. pts, dts: its time stamps, in the stream's units."""

  pts: int
  dts: int


@dataclasses.dataclass(frozen=True)
class Index:
  """Lists the frames of a video stream that are shown, in the order in which they are shown.

  stream: its number in the file.
  times: float64[N], seconds from the first frame on, ascending.
  seconds: from the start of the first frame to the end of the last.
  rate: frames per second if it is constant; None: it varies.
  average: frames per second by the header, which the release uses; None: it states none.
  pts: int64[N], time stamps in the stream's units; None: they are unusable, and frames are counted
  as the decoder gives them.
  keys: where decoding can begin, ascending; from there every frame shown at `Key.pts` or later is
  decoded rightly.
  lost: seconds that are missing at the end, by the header.
  stated: how many frames the header announces, or its duration at its rate; 0: it doesn't say.
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
      self,
      times=self.times[:readable],
      seconds=seconds,
      pts=None if self.pts is None else self.pts[:readable],
      lost=self.lost + self.seconds - seconds,
    )


# --- which frames there are
# -----------------------------------------------------------------------------------------


class _Packets(NamedTuple):
  """What a stream's packets say, in the order of the file: int64[P] each; flags of KEY, HIDDEN,
  BROKEN.
  """

  pts: np.ndarray
  dts: np.ndarray
  length: np.ndarray
  flags: np.ndarray


def index(path: pathlib.Path, stream: int | None = None) -> Index:
  """Finds the frames of a video: one pass over its packets, and over its pictures only where
  packets don't say it.

  stream: a number among the file's streams; None: the one that players take.

  Raises:
    FileNotFoundError: there is no such file.
    VideoError: it has no video stream, no frame, or nothing decodes it.
  """
  with _opened(path, stream) as (container, found):
    packets = _packets(container, found)
    number, base, listed = found.index, float(found.time_base), found.frames
    average = None if not found.average_rate else float(found.average_rate)
    rates = [
      float(rate) for rate in (found.average_rate, found.guessed_rate, found.base_rate) if rate
    ]
    formats, begin = (
      set(container.format.name.split(",")),
      (container.start_time or 0) / av.time_base,
    )
    end = (container.duration or 0) / av.time_base if formats & STATED else 0.0
    end += begin if end < begin else 0.0  # some count it from zero on
  if formats & COUNTED and listed and average:
    end = max(end, listed / average)
  if "asf" in formats:
    end = max(end, _stated_asf(path))
  if not len(packets.pts) and listed:
    raise VideoError(f"{path} is truncated: it announces {listed} frames and has the data of 0")
  if not len(packets.pts):
    raise VideoError(f"{path} holds no frames")
  pts, keys = _shown(packets)
  pts, keys = _decoded(path, number, pts, keys)
  if pts is None:
    return _counted(path, number, rates, average)
  if not len(pts):
    raise VideoError(f"{path} holds no frame that can be decoded")
  last = packets.length[packets.pts == pts[-1]].max(initial=0) * base
  times, rate, seconds = _times(pts, base, rates, last)
  stop, frame = float(pts[-1]) * base + seconds - times[-1], seconds / len(pts)
  whole, lost = 0 < listed <= len(packets.pts), 0.0
  if packets.flags[-1] & BROKEN or (
    not whole and _short(path, number, stop, end, 1.5 * frame, bool(listed))
  ):
    lost = float(max(end - stop, frame))
  # of a rate that varies the header knows no number
  usual = average if average and abs(average * seconds / len(pts) - 1) < 0.1 else 0.0
  stated = listed or round((end - float(pts[0]) * base) * usual)
  return Index(number, times, seconds, rate, average, pts, tuple(keys), lost, stated)


def _stated_asf(path: pathlib.Path) -> float:
  """Reads from an ASF header how many seconds the file has, which FFmpeg doesn't tell of a file
  that was cut; 0: it says nothing.
  """
  with open(path, "rb") as file:
    head = file.read(1 << 16)
  at = head.find(ASF)
  if at < 0 or at + 92 > len(head):
    return 0.0
  play, _, preroll, flags = struct.unpack_from("<QQQI", head, at + 64)  # 100 ns, and milliseconds
  # a live recording is open-ended
  return 0.0 if flags & 1 else max(0.0, play / 1e7 - preroll / 1e3)


@contextlib.contextmanager
def _opened(path: pathlib.Path, stream: int | None) -> Generator[tuple[Any, Any]]:
  """Opens a file and one of its video streams.

  Raises:
    FileNotFoundError: there is no such file.
    VideoError: it can't be opened, has no such stream, or nothing decodes that.
  """
  if path.is_dir():
    raise VideoError(f"{path} is a folder; read it as read_type='frames'")
  if not regular(path).stat().st_size:
    raise VideoError(f"{path} is empty (0 bytes)")
  try:  # "file:", for "12:30.mp4" would be read by protocol "12"
    container = av.open(
      "file:" + absolute(path),
      options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
      **TITLES,
    )
  except (av.error.FFmpegError, OSError) as error:
    why = getattr(error, "strerror", None) or error
    advice = (
      "it may be truncated, or of a format that is not read; of lists of files, such as "
      "playlists, give the files"
    )
    raise VideoError(f"{path} can't be read as a video ({why}); {advice}") from error
  with container:
    videos: Any = container.streams.video
    found: Any = (
      container.streams.best("video")
      if stream is None
      else next((s for s in videos if s.index == stream), None)
    )
    if found is None and stream is None and videos:
      found = videos[0]
    if found is None:
      has = (
        f"its video streams are {', '.join(str(s.index) for s in videos)}"
        if videos
        else "it has sound alone, or is truncated"
      )
      raise VideoError(
        f"{path} can't be read as a video: no video "
        f"stream{'' if stream is None else f' {stream}'}; {has}"
      )
    if found.codec_context is None:
      raise VideoError(
        f"{path}: there is no decoder for its video stream {found.index}; {NO_DECODER}"
      )
    if found.width * found.height > PIXELS:
      raise VideoError(
        f"{path} has pictures of {found.width} x {found.height} pixels; {PIXELS:,} can be read"
      )
    found.codec_context.options = {"max_pixels": str(PIXELS)}  # they may grow on the way
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
        # a frame that others refer to, and nobody sees
        flag |= HIDDEN * (not memoryview(packet)[0] & 16)
      flags.append(flag)
  return _Packets(*(np.array(column, np.int64) for column in columns))


def _demuxed(container: Any, *streams: Any) -> Iterator[Any]:
  """Gives packets of some streams from here on. PyAV raises IndexError at each packet of a stream
  that the header didn't announce.
  """
  while True:
    try:
      yield from container.demux(*streams)
      return
    except IndexError:
      continue


def _restarts(codec: str, packet: Any) -> bool:
  """Says whether decoding that begins at a key packet gives right pictures.

  The file's own flag is not enough: some files flag every packet, and with intra-refresh an H.264
  picture gets whole over many frames.
  """
  if codec not in ("h264", "hevc", "mpeg4", "mpeg2video"):
    return True
  data = bytes(packet)
  for begin in _units(codec, data):
    unit = data[begin : begin + 8]
    if len(unit) < 4:
      break
    # a slice; types 16 to 21 need no earlier picture
    if codec == "hevc" and (unit[0] >> 1) & 63 < 32:
      return 16 <= (unit[0] >> 1) & 63 <= 21
    if codec == "mpeg4" and unit[0] == 0xB6:
      return unit[1] >> 6 == 0
    if codec == "mpeg2video" and unit[0] == 0:
      return (unit[2] >> 3) & 7 == 1
    if codec == "h264" and unit[0] & 31 == 5:  # IDR
      return True
    # SEI
    if (
      codec == "h264"
      and unit[0] & 31 == 6
      and (recovered := _recovers(data[begin + 1 : begin + 257])) is not None
    ):
      return recovered
  return codec == "mpeg4"  # short headers


def _recovers(messages: bytes) -> bool | None:
  """Says whether an H.264 SEI unit announces right pictures at once; None: it holds no recovery
  point.
  """
  at = 0
  while at + 2 < len(messages) and messages[at] != 0x80 and messages[at + 1] < 255:
    if messages[at] == 6:
      return messages[at + 2] >= 128  # after so many frames, in exp-Golomb: a first bit of 1 is 0
    at += 2 + messages[at + 1]
  return None


def _units(codec: str, data: bytes) -> Iterator[int]:
  """Finds where the units of a packet begin.

  H.264 and HEVC have lengths before units (MP4, Matroska) or start codes (TS, AVI), older codecs
  start codes only. The start code 00 00 01 xx reads as a length of 256 to 511, too, so lengths
  count only if they end where the packet does.
  """
  at, begins = 0, []
  while codec in ("h264", "hevc") and at + 4 <= len(data):
    begins.append(at + 4)
    at += 4 + int.from_bytes(data[at : at + 4], "big")
  if begins and at == len(data):
    yield from begins
    return
  at = data.find(b"\0\0\1")
  while at >= 0:
    yield at + 3
    at = data.find(b"\0\0\1", at + 3)


def _shown(packets: _Packets) -> tuple[np.ndarray | None, list[Key]]:
  """Time stamps of frames in the order in which they are shown, None if packets don't tell; and
  where decoding can begin.
  """
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


def _decoded(
  path, stream: int, pts: np.ndarray | None, keys: list[Key]
) -> tuple[np.ndarray | None, list[Key]]:
  """Has the decoder say which frames are shown.

  If the first HEAD frames agree with `pts`, the packets are believed, less those before the first
  frame that can be decoded. If not, the whole stream is decoded.

  Returns:
    time stamps, int64[N], or None if the decoder's are missing or don't ascend; and where decoding
    can begin.
  """
  with _opened(path, stream) as (container, found):
    given = (image.pts for image in _whole(container, found))
    if pts is not None and len(keys):
      head = list(itertools.islice((stamp for stamp in given if stamp is not None), HEAD))
      i = int(np.searchsorted(pts, head[0])) if head else 0
      if head and head == pts[i : i + len(head)].tolist() and head[0] <= keys[0].pts:
        return pts[i:], keys
      stamps: list[int | None] = [*head, *given]
    else:
      stamps = list(given)
  if None in stamps or (np.diff(np.array(stamps, np.int64)) <= 0).any():
    return None, []
  return np.array(stamps, np.int64), keys


def _counted(path, stream: int, rates: Sequence[float], average: float | None) -> Index:
  """Indexes a file whose time stamps are missing or go back: frames count in the order in which the
  decoder gives them.

  Where most time stamps are unusable the header's rate says when frames are shown, or one per
  second if there is no rate.
  """
  with _opened(path, stream) as (container, found):
    base = float(found.time_base)
    stamps = [NONE if image.pts is None else image.pts for image in _whole(container, found)]
  if not stamps:
    raise VideoError(f"{path} holds no frame that can be decoded")
  known = np.array(stamps, np.float64) * base
  gaps = np.diff(known)
  good = (gaps > 0) & (known[:-1] > NONE * base) & (known[1:] > NONE * base)
  usual = float(np.median(gaps[good])) if good.any() else 1.0
  # time stamps that mean nothing; else a few that go back
  rate = rates[0] if rates and good.sum() < max(1, 0.95 * len(good)) else None
  if rate is None:
    times = np.concatenate([[0.0], np.cumsum(np.where(good, gaps, usual))])
  else:
    times, usual = np.arange(len(stamps)) / rate, 1 / rate
  return Index(stream, times, float(times[-1] + usual), rate, average, None, (), 0.0, len(times))


def _times(
  pts: np.ndarray, base: float, rates: Sequence[float], last: float
) -> tuple[np.ndarray, float | None, float]:
  """Seconds from the first frame on, the rate if it is constant, and the end of the last frame,
  which may say how long it is.
  """
  ticks, n = (pts - pts[0]).astype(np.float64), len(pts)
  mean = [(n - 1) / (ticks[-1] * base)] if n > 1 else []
  for rate in (*rates, *mean):
    if np.abs(ticks - np.arange(n) / (rate * base)).max() <= ROUNDED:
      return np.arange(n) / rate, rate, n / rate
  times = ticks * base
  usual = float(np.median(np.diff(times))) if n > 1 else 1.0  # one frame, and no rate is known
  return times, None, float(times[-1] + (last if last >= usual / 4 else usual))


def _short(path, stream: int, stop: float, end: float, frame: float, listed: bool) -> bool:
  """Says whether a file ends before it should: neither its video nor another stream comes near to
  `end`.

  stop, end: seconds, by the file's clock. frame: seconds of slack. listed: the header also gives a
  number of frames.
  """
  slack = max(frame, 0.0 if listed else min(1.0, 0.1 * end))
  if not end or stop >= end - slack:
    return False
  with _opened(path, stream) as (container, found):
    with contextlib.suppress(av.error.FFmpegError, OSError):
      container.seek(int(stop / found.time_base), stream=found)
      for packet in _demuxed(
        container, *(s for s in container.streams if s.type in ("video", "audio"))
      ):
        if (
          packet.pts is not None
          and not packet.is_corrupt
          and float((packet.pts + (packet.duration or 0)) * packet.time_base) >= end - slack
        ):
          return False
  return True


# --- their pictures
# -------------------------------------------------------------------------------------------------


def pictures(
  path: pathlib.Path, found: Index, wanted: Sequence[int], stop: int
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  """Decodes frames of a video, rotated as players do.

  From one wanted frame to the next it decodes on, or begins again at the last key frame before the
  next, if that is ahead.

  Args:
    path: the file.
    found: its `index`.
    wanted: numbers of frames, ascending.
    stop: one more than the number of the last frame that may be chosen; that frame must be
      decodable, even if it is not wanted.

  Yields:
    uint8[H, W, 3], RGB, in the file's size.

  Raises:
    FileNotFoundError: see `index`.
    TailError: from some frame before `stop` on nothing can be decoded.
    VideoError: a wanted frame is damaged.
  """
  done = 0
  for way in (found, dataclasses.replace(found, keys=())):
    try:
      for image in _pictures(path, way, wanted[done:], stop):
        done += 1
        yield image
      return
    except (
      _LostError,
      TailError,
    ):  # seeking can fail in a damaged file whose frames decode in order
      if not way.keys:
        raise


class _LostError(XCompError):
  """A key frame was not found again where it is."""


def _pictures(
  path: pathlib.Path, found: Index, wanted: Sequence[int], stop: int
) -> Iterator[np.ndarray]:
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
          lost = found.seconds - found.times[last + 1]
          raise TailError(
            f"{path}: the last {lost:.2f} of {found.seconds:.2f} seconds can't be decoded; it is "
            f"truncated or damaged",
            last + 1,
          )
      if i in asked and number != i:
        raise VideoError(
          f"{path}: the frame at {found.times[i]:.2f} seconds, number {i}, is damaged"
        )
      if i in asked:
        # of the first alone: asking for side data makes a cycle, and frees a frame late
        matrix = _matrix(image) if matrix is None else matrix
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
    elif (
      image.pts is not None
      and (i := _number(found, image.pts)) < len(found.pts)
      and found.pts[i] == image.pts
    ):
      yield i, image


def _whole(container: Any, stream: Any, key: Key | None = None) -> Iterator[Any]:
  """Decodes from a key's packet on, or from where the file stands, and leaves out what is damaged.

  The decoder doesn't mark all that it predicts from a damaged or lost frame. So after a bad packet
  every frame is left out, up to the next packet at which decoding can begin. Frames that come after
  that packet but are shown before it are left out, too.
  """
  codec = stream.codec_context.name
  # packets that may be in the decoder's threads when it reports an error
  flight = 3 + min(os.cpu_count() or 1, 16)
  # time stamps of packets, as they were decoded
  order: collections.deque[int | None] = collections.deque(maxlen=256)
  # those of packets that decoding can begin with
  clean: collections.deque[int | None] = collections.deque(maxlen=64)
  suspect: set[int | None] = set()  # time stamps of frames to leave out
  bad = False  # a packet was bad, and decoding could not begin anew since
  leading: int | None = (
    None  # where it began anew after a bad one; what is shown before refers to what was damaged
  )
  for packet, cut in _with_cut(
    _from(container, stream, key) if key else _demuxed(container, stream)
  ):
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
        after = (
          list(order)[list(order).index(image.pts) :]
          if image.pts in order
          else list(order)[-flight:]
        )
        until = next((n for n, stamp in enumerate(after) if n and stamp in clean), None)
        suspect.update(after[:until])
        bad = bad or until is None
        suspect.add(image.pts)
      if not (bad if image.pts is None else image.pts in suspect or image.is_corrupt):
        yield image


def _with_cut(packets: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
  """Gives each packet, and whether the file was cut inside it: the last one, if it is marked as
  corrupt.
  """
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
  try:
    found = frame.side_data.get("DISPLAYMATRIX")
  # of a frame that has data of a type PyAV has no name for it tells the angle alone, and 14.0
  # nothing
  except ValueError as error:
    if not hasattr(frame, "rotation"):
      raise VideoError(
        f"PyAV {av.__version__} can't tell how this video is rotated ({error}): pip install -U av"
      ) from error
    return TURNS.get(round(frame.rotation) % 360, TURNS[0])
  if found is None:
    return TURNS[0]
  a, b, _, c, d = np.frombuffer(bytes(found), np.int32)[:5].tolist()
  return a, b, c, d


def _upright(image: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
  """Turns and mirrors an image as a display matrix says."""
  if abs(a) >= abs(b):
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
  return image.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1]


def _rgb(convert: VideoReformatter, frame: Any) -> np.ndarray:
  """Pixels by the matrix and range that the file says (BT.601's where it says none), colours
  interpolated as by OpenCV.
  """
  matrix, full = MATRICES.get(int(frame.colorspace)), int(frame.color_range) == 2
  if matrix is None and not full:
    return convert.reformat(frame, format="rgb24", interpolation="BICUBIC").to_ndarray()
  scale = "JPEG" if full else "MPEG"
  # PyAV before 16 looks at the matrix only if the result, which as RGB has none, is said to have
  # another.
  how: dict[str, Any] = {"src_colorspace": matrix, "dst_colorspace": "ITU601"} if matrix else {}
  return convert.reformat(
    frame,
    format="rgb24",
    interpolation="BICUBIC",
    src_color_range=scale,
    dst_color_range=scale,
    **how,
  ).to_ndarray()
