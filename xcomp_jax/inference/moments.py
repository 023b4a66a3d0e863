"""When frames are seen: seconds of frames, spans of time, and how times are written."""

import numpy as np
from jaxtyping import Float, Int


def clock(seconds: float, whole: float | None = None) -> str:
  """A time as 1:02:03 or 2:03; as 3.5 where the `whole` video (by default: the time itself) is
  under a minute.
  """
  if (seconds if whole is None else whole) < 60:
    return f"{seconds:.1f}"
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def spans(
  frames: Int[np.ndarray, " K"], times: Float[np.ndarray, " T"], seconds: float
) -> list[tuple[float, float]]:
  """When chosen frames are seen, in seconds; neighbours and repeated frames merge.

  A frame lasts until the next sampled one, the last as long as the one before it and not past the
  video's end.

  Args:
    frames: int[K], ascending.
    times: float64[T], seconds of all sampled frames, ascending; equal where a short video was
      stretched.
    seconds: of the whole.
  """
  ends, out = _ends(times, seconds), []
  for begin, end in zip(times[frames].tolist(), ends[frames].tolist(), strict=True):
    if out and begin <= out[-1][1]:
      begin = out.pop()[0]
    out.append((begin, end))
  return out


def _ends(times, seconds: float) -> np.ndarray:
  """float64[T]: when each frame's time is over."""
  moments = np.unique(times)
  last = moments[-1] + (moments[-1] - moments[-2] if len(moments) > 1 else seconds)
  # else they are of a later part of the file, and `seconds` is that part's length
  if seconds > moments[-1]:
    last = min(last, seconds)
  return np.append(moments, last)[np.searchsorted(moments, times, side="right")]


def extent(times: Float[np.ndarray, " T"], seconds: float) -> tuple[float, float]:
  """First and last second of an axis of time."""
  begin = float(times[0]) if times[-1] > seconds else 0.0
  return begin, float(_ends(times, seconds)[-1])
