"""Opens video files by PyAV, which brings FFmpeg, and gives what a stream holds: packets, and the
pictures that the decoder makes of them.
"""

import collections
import contextlib
import itertools
import os
import pathlib
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import av

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
  """The end of a video can't be decoded. fields: readable, how many of its frames can."""

  @property
  def readable(self) -> int:
    """How many of its frames can be decoded."""
    return self.fields["readable"]


class Key(NamedTuple):
  """A packet that decoding can begin with. pts, dts: its time stamps, in the stream's units."""

  pts: int
  dts: int


@contextlib.contextmanager
def opened_stream(
  path: pathlib.Path, stream: int | None, pixels: int = PIXELS
) -> Generator[tuple[Any, Any]]:
  """Opens a file and one of its video streams, whose pictures have at most so many pixels.

  Raises:
    FileNotFoundError: there is no such file.
    VideoError: it can't be opened, has no such stream, or nothing decodes that.
  """
  if path.is_dir():
    raise VideoError(
      f"{path} is a folder; read it as read_type='frames'", where=path, found="folder"
    )
  if not regular(path).stat().st_size:
    raise VideoError(f"{path} is empty (0 bytes)", where=path, bytes=0)
  try:  # "file:", for "12:30.mp4" would be read by protocol "12"
    container = av.open(
      "file:" + absolute(path),
      options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
      **TITLES,
    )
  except (av.error.FFmpegError, OSError) as error:
    why = getattr(error, "strerror", None) or error
    raise VideoError(
      f"{path} can't be read as a video ({why}); it may be truncated, or of a format that is not "
      f"read; of lists of files, such as playlists, give the files",
      where=path,
      why=why,
    ) from error
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
        f"stream{'' if stream is None else f' {stream}'}; {has}",
        where=path,
        stream=stream,
        there=[s.index for s in videos],
      )
    if found.codec_context is None:
      raise VideoError(
        f"{path}: there is no decoder for its video stream {found.index}; {NO_DECODER}",
        where=path,
        without_decoder=found.index,
      )
    if found.width * found.height > pixels:
      raise VideoError(
        f"{path} has pictures of {found.width} x {found.height} pixels; {pixels:,} can be read",
        where=path,
        found=(found.width, found.height),
        allowed=pixels,
      )
    found.codec_context.options = {"max_pixels": str(pixels)}  # they may grow on the way
    found.thread_type = "AUTO"
    yield container, found


def demuxed(container: Any, *streams: Any) -> Iterator[Any]:
  """Gives packets of some streams from here on. PyAV raises IndexError at each packet of a stream
  that the header didn't announce.
  """
  while True:
    with contextlib.suppress(IndexError):
      yield from container.demux(*streams)
      return


def restarts(codec: str, packet: Any) -> bool:
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
      and (recovered := recovers(data[begin + 1 : begin + 257])) is not None
    ):
      return recovered
  return codec == "mpeg4"  # short headers


def recovers(messages: bytes) -> bool | None:
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


def whole_frames(container: Any, stream: Any, key: Key | None = None) -> Iterator[Any]:
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
  for packet in _uncut(packets_from(container, stream, key) if key else demuxed(container, stream)):
    if packet.size:
      if packet.is_keyframe and restarts(codec, packet):
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


def _uncut(packets: Iterator[Any]) -> Iterator[Any]:
  """Gives the packets without one inside which the file was cut: the last one, if it is marked as
  corrupt.
  """
  held = None
  with contextlib.suppress(av.error.FFmpegError, OSError):
    for packet in packets:
      if held is not None and packet.size:
        yield held
      held = packet if packet.is_corrupt else None
      if held is None:
        yield packet


def packets_from(container: Any, stream: Any, key: Key) -> Iterator[Any]:
  """Packets from a key's on.

  Raises:
    LostError: it can't be found.
  """
  with contextlib.suppress(av.error.FFmpegError, OSError):
    for back in (0.0, 2.0, 20.0):
      container.seek(int(min(key.dts, key.pts) - back / stream.time_base), stream=stream)
      packets = demuxed(container, stream)
      for packet in packets:
        if packet.pts == key.pts and packet.size:
          return itertools.chain([packet], packets)
        if packet.dts is not None and packet.dts > key.dts:
          break  # behind it
  raise LostError


class LostError(XCompError):
  """A key frame was not found again where it is."""
