"""Clocks of the measurements."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Timed(NamedTuple):
  """What a call took, in seconds of the wall clock and of this process, and what it gave."""

  seconds: float
  cpu: float
  result: Any


def timed(work: Callable[[], Any]) -> Timed:
  """Times a call."""
  begun, before = time.perf_counter(), time.process_time()
  result = work()
  return Timed(time.perf_counter() - begun, time.process_time() - before, result)


def seconds_of(call: Callable[[], Any], times: int = 1) -> float:
  """Seconds of a call of JAX, of `times` in a row, until its results are there."""
  import jax  # not needed where nothing but decoding is timed

  return timed(lambda: jax.block_until_ready([call() for _ in range(times)])).seconds / times
