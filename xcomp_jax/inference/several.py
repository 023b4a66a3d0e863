"""Several videos, or several images, in one question: one behind the other in the visual slot."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from xcomp_jax.inference.encoded_video import EncodedVideo, EncodedVideoError, check_identity
from xcomp_jax.inference.moments import extent, spans

LOG = logging.getLogger(__name__)


def parts_of(videos: EncodedVideo | Sequence[EncodedVideo]) -> list[EncodedVideo]:
  """The single videos of what is asked about, in order."""
  given = [videos] if isinstance(videos, EncodedVideo) else videos
  return [part for video in given for part in video.parts or (video,)]


def joined_videos(videos: EncodedVideo | Sequence[EncodedVideo]) -> EncodedVideo:
  """Puts videos one behind the other, in the order given; a single one stays as it is.

  The release has one visual slot per conversation, so all clips go there. A question selects among
  the frames of all, and the time message states the sum of their seconds and frames. Images have no
  time message, however many there are, as a single one has none.

  Only clips that start at a video's own first frame are joined: those of other phases would have to
  reach from one video into the next.

  Returns:
    The whole, with the videos as its `parts`. On its axis of time each video begins where the one
    before it ends, and an image takes a second.

  Raises:
    EncodedVideoError: there is no video; they are of several towers; or images and videos.
  """
  parts = parts_of(videos)
  if not parts:
    raise EncodedVideoError("there is no video to ask about", where="video", missing=True)
  if len(parts) == 1:
    return parts[0]
  first = parts[0]
  for part in parts[1:]:
    check_identity(part.source, part.identity, first.identity)
    if (part.clip_frames, len(part.times) == 1) != (first.clip_frames, len(first.times) == 1):
      raise EncodedVideoError(
        f"{part.source} has clips of {part.clip_frames} and {first.source} of "
        f"{first.clip_frames} frames; ask about images together with images only, and about videos "
        f"with videos",
        where=part.source,
        found=part.clip_frames,
        expected=first.clip_frames,
      )
  LOG.warning("no released checkpoint was tuned on several videos or images in one question")
  times, end = [], 0.0
  for part in parts:
    begin, stop = extent(part.times, part.seconds)
    times.append(part.times - begin + end)
    end += max(part.seconds, stop - begin) or 1.0
  pictures = [part.thumbnails for part in parts if part.thumbnails is not None]
  names = ", ".join(part.source.partition(" (")[0] for part in parts)
  return EncodedVideo(
    features={0: [clip for part in parts for clip in part.features[0]]},
    times=np.concatenate(times),
    seconds=sum(part.seconds for part in parts),
    thumbnails=np.concatenate(pictures) if len(pictures) == len(parts) else None,
    identity=first.identity,
    source=f"{names} ({'; '.join(part.source for part in parts)})",
    spent=sum((Counter(part.spent) for part in parts), Counter()),
    parts=tuple(parts),
  )


def moments_by_video(
  video: EncodedVideo, frames: Int[np.ndarray, " K"], own: bool
) -> Iterator[list[tuple[float, float]]]:
  """When chosen frames are seen, for each of a video's parts; see `moments.spans`.

  own: in seconds of each part itself; else of all of them, as `joined_videos` has put them.
  """
  first = 0
  for part in parts_of(video):
    after = first + len(part.times)
    shift = 0.0 if own else float(video.times[first] - part.times[0])
    inside = frames[(frames >= first) & (frames < after)] - first
    yield [(a + shift, b + shift) for a, b in spans(inside, part.times, part.seconds)]
    first = after
