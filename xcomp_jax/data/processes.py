"""Calls in other processes, which may hang or die at them: a process that dies costs the call that
it was at, nothing else.

Each process has a pipe of its own, and answers its calls in order, so that it is always known which
one it is at. The system ends a call that takes too long, by the signal of a timer: a decoder that
hangs may never come back to Python.

A process is a fresh Python that imports what its calls need, and nothing of the program that
started it: a fork would copy the locks of threads, and what `multiprocessing` starts runs the
program's own file again.
"""

import collections
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Sequence
from multiprocessing import connection
from typing import Any

from xcomp_jax.errors import XCompError

CODE = (
  "import sys; sys.path[:] = sys.argv[3:]; from xcomp_jax.data import processes; "
  "processes.serve(int(sys.argv[1]), sys.argv[2])"
)
TRIES = 3  # to start a process
# calls that a process has: the one it is at, and the next, so that it does not wait for this
# process
AHEAD = 2

Ended = tuple[Any, Any, Exception | None]  # key of a call, its value, its error


class StartError(XCompError):
  """Processes die before they take any call."""


class DiedError(XCompError):
  """The process of a call died at it."""

  def __init__(self, code: int):
    names = {s.value: s.name for s in signal.Signals}  # not of all there are
    how = f"exit code {code}" if code >= 0 else names.get(-code, f"signal {-code}")
    super().__init__(f"its process died ({how})")
    self.code = code  # minus the number of the signal that ended it

  @property
  def late(self) -> bool:
    """Whether it took more time than it had."""
    return self.code == -signal.SIGALRM


class Processes:
  """So many processes that do calls.

  A call is a function that returns what it has used up of the life of its process, and a value. A
  process that has no life left is replaced by a fresh one. The first lives have different lengths,
  so that they do not end together. `module` is what the functions need, which a process imports
  before it is given a call.
  """

  def __init__(self, count: int, life: int, module: str, line: str = CODE):
    """line: of Python, that a process runs."""
    self._life, self._module, self._line, self._waiting = life, module, line, collections.deque()
    self.lives: list[int] = []  # of all processes that were started
    self._stillborn = 0  # processes that died before they were ready, since the last that was
    self._each = [self._begin(life * (i + 1) // count) for i in range(count)]

  def call(
    self,
    key: Hashable,
    function: Callable[..., tuple[int, Any]],
    *args: Any,
    timeout: float | None = None,
  ) -> None:
    """Begins a call, or puts it behind others; after `timeout` seconds its process is killed."""
    self._waiting.append((key, (function, args, timeout)))
    self._feed()

  def ended(self) -> list[Ended]:
    """Waits for news of the processes, and returns the calls that have ended; sometimes none.

    Raises:
      StartError: no call is to blame for it.
    """
    if not self._waiting and not any(each.calls for each in self._each):
      return []
    ready = connection.wait([each.pipe for each in self._each])
    found = [
      one for i, each in enumerate(self._each) if each.pipe in ready for one in self._news(i)
    ]
    self._feed()
    return found

  def stop(self) -> None:
    """Kills all processes, whatever they do."""
    for each in self._each:
      each.end()

  def _begin(self, life: int) -> "_Process":
    self.lives.append(life)
    return _Process(life, self._module, self._line)

  def _news(self, i: int) -> list[Ended]:
    each, found = self._each[i], []
    try:
      while each.pipe.poll():
        answer = each.pipe.recv()
        if each.ready:
          used, value, error = answer
          each.left = 0 if isinstance(error, MemoryError) else each.left - used
          found.append((each.calls.popleft()[0], value, error))
        each.ready, self._stillborn = True, 0  # the first message says only this
      if each.left > 0 or each.calls:
        return found
      each.end()
    except (EOFError, OSError) as error:
      code = each.end()
      if each.ready and each.calls:
        found.append((each.calls.popleft()[0], None, DiedError(code)))
      self._stillborn += not each.ready
      if self._stillborn == TRIES:
        raise StartError(f"exit code {code}", code=code) from error
      self._waiting.extendleft(reversed(each.calls))
    self._each[i] = self._begin(self._life)
    return found

  def _feed(self) -> None:
    while self._waiting:
      each = min(self._each, key=lambda one: (one.left <= 0, len(one.calls)))
      if each.left <= 0 or len(each.calls) == AHEAD:
        return
      try:
        each.pipe.send(self._waiting[0][1])
      except OSError:  # it has just died, which `ended` will find
        each.left = 0
      else:
        each.calls.append(self._waiting.popleft())


class Here:
  """The same in this process, where no time limit holds."""

  def __init__(self):
    self._ended: list[Ended] = []

  def call(
    self,
    key: Hashable,
    function: Callable[..., tuple[int, Any]],
    *args: Any,
    timeout: float | None = None,
  ) -> None:
    """Does a call."""
    self._ended.append((key, *_outcome(function, args)[1:]))

  def ended(self) -> list[Ended]:
    """Returns the calls that have ended."""
    found, self._ended = self._ended, []
    return found

  def stop(self) -> None:
    """Does nothing."""


class _Process:
  def __init__(self, life: int, module: str, code: str):
    ours, theirs = socket.socketpair()
    # of Ctrl-C, which it would answer with a trace; it inherits this
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
      self.process = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs.fileno()), module, *sys.path],
        stdin=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
      )
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
      theirs.close()
    self.pipe = connection.Connection(ours.detach())
    self.left, self.ready = life, False
    self.calls = collections.deque()  # that were sent, with their keys; it is at the first

  def end(self) -> int:
    self.process.kill()  # one that has died by itself keeps its exit code
    with self.process:
      self.pipe.close()
    return self.process.returncode


def serve(handle: int, module: str) -> None:
  """Does calls that come through a socket, until the process at its other end is gone."""
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  threading.Thread(
    target=lambda: (os.read(0, 1), os._exit(1)), daemon=True
  ).start()  # its end comes at once, also within a call
  pipe = connection.Connection(handle)
  importlib.import_module(module)
  pipe.send("ready")
  # FFmpeg complains at length; the reason comes back as an exception
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  while True:
    try:
      function, args, timeout = pipe.recv()
    except (EOFError, ConnectionError):
      return
    except Exception as error:
      function, args, timeout = _fail, (error,), None
    gc.freeze()  # what is there before a call need not be looked through after it
    signal.setitimer(signal.ITIMER_REAL, min(timeout or 0, 1e9))
    used, value, error = _outcome(function, args)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if used:
      # small objects in cycles, of PyAV, hold much memory that Python does not know of
      gc.collect()
    pipe.send((used, value, error and _portable(error)))


def _fail(error: Exception) -> tuple[int, Any]:
  raise error


def _outcome(
  function: Callable[..., tuple[int, Any]], args: Sequence[Any]
) -> tuple[int, Any, Exception | None]:
  """What a call used up, its value, and its error."""
  try:
    return *function(*args), None
  except Exception as error:
    return 0, None, error


def _portable(error: Exception) -> Exception:
  """An error that another process can read, with its trace, which would be lost."""
  error.add_note("in another process:\n" + "".join(traceback.format_exception(error)))
  try:
    return pickle.loads(pickle.dumps(error))
  except Exception:  # made from other arguments than it keeps
    return RuntimeError(f"{type(error).__name__}: {error}")
