"""Finds which frames a video file shows when.

A header's rate and number of frames may be wrong. What counts are the time stamps of the packets,
which are read without decoding, and what the decoder makes of them.
"""

import array
import contextlib
import dataclasses
import itertools
import pathlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import av
import numpy as np
from jaxtyping import Float, Int

from xcomp_jax.data.streams import Key, VideoError, demuxed, opened_stream, restarts, whole_frames

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
REORDERED = (
  32  # packets; a time stamp that is further out of order belongs to a second recording in the file
)
# decoded frames that are compared with the packets' time stamps before all of these are believed
HEAD = 16
ROUNDED = 1.01  # time units by which rounding may move the time stamps of a constant rate
# begins the part of an ASF header that says how long the file is
ASF = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


@dataclasses.dataclass(frozen=True, kw_only=True)
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
  pts: Int[np.ndarray, " N"] | None = None
  keys: tuple[Key, ...] = ()
  lost: float = 0.0
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
  with opened_stream(path, stream) as (container, found):
    packets = _packets(container, found)
    number, base, listed = found.index, float(found.time_base), found.frames
    average = None if not found.average_rate else float(found.average_rate)
    rates = [
      float(rate) for rate in (found.average_rate, found.guessed_rate, found.base_rate) if rate
    ]
    formats = set(container.format.name.split(","))
    begin = (container.start_time or 0) / av.time_base
    end = (container.duration or 0) / av.time_base if formats & STATED else 0.0
    end += begin if end < begin else 0.0  # some count it from zero on
  if formats & COUNTED and listed and average:
    end = max(end, listed / average)
  if "asf" in formats:
    end = max(end, _stated_asf(path))
  if not len(packets.pts) and listed:
    raise VideoError(
      f"{path} is truncated: it announces {listed} frames and has the data of 0",
      where=path,
      stated=listed,
      readable=0,
    )
  if not len(packets.pts):
    raise VideoError(f"{path} holds no frames", where=path, packets=0)
  pts, keys = _shown(packets)
  pts, keys, stamps = _decoded(path, number, pts, keys)
  if pts is None:
    return _counted(number, base, stamps, rates, average)
  if not len(pts):
    raise VideoError(f"{path} holds no frame that can be decoded", where=path, readable=0)
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
  return Index(
    stream=number,
    times=times,
    seconds=seconds,
    rate=rate,
    average=average,
    pts=pts,
    keys=tuple(keys),
    lost=lost,
    stated=listed or round((end - float(pts[0]) * base) * usual),
  )


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


def _packets(container: Any, stream: Any) -> _Packets:
  columns = [array.array("q") for _ in range(4)]
  pts, dts, length, flags = columns
  codec = stream.codec_context.name
  with contextlib.suppress(av.error.FFmpegError, OSError):  # what comes behind can't be read
    for packet in demuxed(container, stream):
      if not packet.size:
        continue
      pts.append(NONE if packet.pts is None else packet.pts)
      dts.append(NONE if packet.dts is None else packet.dts)
      length.append(packet.duration or 0)
      flag = BROKEN * packet.is_corrupt | HIDDEN * packet.is_discard
      if packet.is_keyframe and restarts(codec, packet):
        flag |= KEY
      elif codec.startswith("vp8") or codec == "libvpx":
        # a frame that others refer to, and nobody sees
        flag |= HIDDEN * (not memoryview(packet)[0] & 16)
      flags.append(flag)
  return _Packets(*(np.array(column, np.int64) for column in columns))


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
) -> tuple[np.ndarray | None, list[Key], list[int | None]]:
  """Has the decoder say which frames are shown.

  If the first HEAD frames agree with `pts`, the packets are believed, less those before the first
  frame that can be decoded. If not, the whole stream is decoded.

  Returns:
    time stamps, int64[N], or None if the decoder's are missing or don't ascend; where decoding can
    begin; and, where there are no time stamps, what the decoder said of each frame.
  """
  head = []
  with opened_stream(path, stream) as (container, found):
    given, every = itertools.tee(image.pts for image in whole_frames(container, found))
    if pts is not None and len(keys):
      head = list(itertools.islice((stamp for stamp in given if stamp is not None), HEAD))
      i = int(np.searchsorted(pts, head[0])) if head else 0
      if head and head == pts[i : i + len(head)].tolist() and head[0] <= keys[0].pts:
        return pts[i:], keys, []
    stamps: list[int | None] = [*head, *given]
    said = list(every)  # all of it has been read
  if None in stamps or (np.diff(np.array(stamps, np.int64)) <= 0).any():
    return None, [], said
  return np.array(stamps, np.int64), keys, []


def _counted(
  stream: int,
  base: float,
  stamps: Sequence[int | None],
  rates: Sequence[float],
  average: float | None,
) -> Index:
  """Indexes a file whose time stamps are missing or go back: frames count in the order in which the
  decoder gives them.

  Where most time stamps are unusable the header's rate says when frames are shown, or one per
  second if there is no rate.
  """
  known = np.array([NONE if stamp is None else stamp for stamp in stamps], np.float64) * base
  gaps = np.diff(known)
  good = (gaps > 0) & (known[:-1] > NONE * base) & (known[1:] > NONE * base)
  usual = float(np.median(gaps[good])) if good.any() else 1.0
  # time stamps that mean nothing; else a few that go back
  rate = rates[0] if rates and good.sum() < max(1, 0.95 * len(good)) else None
  if rate is None:
    times = np.concatenate([[0.0], np.cumsum(np.where(good, gaps, usual))])
  else:
    times, usual = np.arange(len(stamps)) / rate, 1 / rate
  return Index(
    stream=stream,
    times=times,
    seconds=float(times[-1] + usual),
    rate=rate,
    average=average,
    stated=len(times),
  )


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
  with opened_stream(path, stream) as (container, found):
    with contextlib.suppress(av.error.FFmpegError, OSError):
      container.seek(int(stop / found.time_base), stream=found)
      for packet in demuxed(
        container, *(s for s in container.streams if s.type in ("video", "audio"))
      ):
        if (
          packet.pts is not None
          and not packet.is_corrupt
          and float((packet.pts + (packet.duration or 0)) * packet.time_base) >= end - slack
        ):
          return False
  return True
