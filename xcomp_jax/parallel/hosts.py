"""The processes of a run: how they find each other, who is missing, who is gone, and when all stop.

Every process keeps a connection to the first one (`Roll`) beside JAX's own. A process that does not
come up, or ends before its time, is thereby named to all others at once, and they end too: in a
collective they would wait for it for ever. What gives no sign at all, such as a host without power,
JAX's heartbeats find.

JAX's own service says less, and later: who is missing it does not say at all, who is gone only by a
number and after a heartbeat's limit, who ended with an error after the limit of a shutdown (then it
names those that still ran); and it aborts the others by a signal, so none ends with a message of
its own.
"""

import contextlib
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from xcomp_jax.config import ConfigError, DistributedConfig

# seconds in which a process may end by itself, with a message of its own, when another is gone
GRACE = 3.0
AGAIN = "Start all of them again with the same command: the run goes on from its last checkpoint"


@contextlib.contextmanager
def joined(
  config: DistributedConfig, initialize: Callable[..., Any] = jax.distributed.initialize
) -> Generator[None]:
  """Connects this process with the others of its run, before JAX looks for devices; what is already
  connected stays.

  A run of one process (config.coordinator None, or "auto" where there is no cluster) has nothing to
  connect. initialize: connects JAX.

  Raises:
    ConfigError: the processes can't be counted, or JAX looked for devices before.
  """
  roll = None
  if config.coordinator is not None and not jax.distributed.is_initialized():
    roll = _connect(config, initialize)
    print(
      banner()
      if jax.distributed.is_initialized()
      else f"no cluster found: a run of one process, on {socket.gethostname()}",
      flush=True,
    )
  try:
    yield
  except BaseException as error:
    if roll:
      if in_collective(error):
        time.sleep(3 * GRACE)  # most likely another is gone, and the roll says so and ends this one
      roll.close(well=False)
    raise
  if roll:
    roll.close(well=True)


def in_collective(error: BaseException | None) -> bool:
  """Says whether an error, or one that led to it, comes from a collective over processes."""
  while error is not None:
    # Orbax hands those of its threads on as ValueErrors.
    if isinstance(error, jax.errors.JaxRuntimeError) or re.match(
      r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ", str(error)
    ):
      return True
    error = error.__cause__
  return False


def _connect(config: DistributedConfig, initialize: Callable[..., Any]) -> "Roll | None":
  """Waits until all processes are there, or says who is not; None if there is only this one."""
  # SIGTERM is ours (`stop_signal`): JAX's service would swallow it even while nobody asks for it
  # yet.
  jax.config.update("jax_enable_preemption_service", False)
  coordinator, processes, process = config.coordinator, config.processes, config.process
  if coordinator == "auto":
    coordinator, processes, process = _detected(config.start_seconds)
  elif processes is None or process is None or not 0 <= process < processes:
    _address(coordinator or "")  # refuses what is none
    raise ConfigError(
      f"config.distributed.coordinator = {coordinator!r} with process {process} of {processes}: "
      "set config.distributed.processes to their number, and config.distributed.process from 0 "
      "on in each",
      where="config.distributed.process" if processes else "config.distributed.processes",
    )
  gpus, roll = slurm_gpus(os.environ), None
  if coordinator is not None and process is not None and processes is not None:
    address, port = _address(coordinator)
    roll = Roll(process, processes)
    roll.open(address, port + 1)
  late = threading.Timer(config.start_seconds, report_late, (roll, config, coordinator))
  late.daemon = True
  late.start()
  try:
    initialize(
      coordinator_address=coordinator,
      num_processes=processes,
      process_id=process,
      heartbeat_timeout_seconds=config.heartbeat_seconds,
      shutdown_timeout_seconds=config.heartbeat_seconds,
      initialization_timeout=config.start_seconds + 60,  # `report_late` is before, and says more
      local_device_ids=gpus,
    )
  except (ValueError, RuntimeError) as error:
    if roll:
      roll.close(well=False)
    elif "coordinator_address" in str(error):  # no cluster: one process
      return None
    raise ConfigError(
      f"the processes of this run can't be connected: {error} (config.distributed.coordinator = "
      f"None is a run of one process)",
      where="config.distributed.coordinator",
    ) from error
  finally:
    late.cancel()
  return roll


def _detected(seconds: int) -> tuple[str | None, int | None, int | None]:
  """(HOST:PORT of process 0, processes, which of them this is) by JAX's knowledge of clusters; all
  None where it will find none, finds a single process, or looks in another way by now. JAX is told
  what was found, so that it and the roll go by the same.
  """
  try:
    from jax._src.clusters import ClusterEnv  # no public way to ask before connecting

    address, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
      os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
    )
  except Exception:  # whatever a cluster's own clients raise; `initialize` will say it
    return None, None, None
  known = address and process is not None and processes and processes > 1
  return (address, processes, process) if known else (None, None, None)


def slurm_gpus(environment: Mapping[str, str]) -> list[int] | None:
  """The equal part of a SLURM node's GPUs that is this process's, numbered as it sees them; None:
  JAX chooses.

  JAX alone takes one GPU, numbered as the process on its node: right only with a process per GPU
  that all see all of them.

  Raises:
    ConfigError: a node's GPUs can't be split evenly over its processes.
  """
  names = ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "SLURM_LOCALID", "SLURM_GPUS_ON_NODE")
  if not all(name in environment for name in names):
    return None
  processes, nodes, local, gpus = (int(environment[name]) for name in names)
  visible = environment.get("CUDA_VISIBLE_DEVICES")
  seen = gpus if visible is None else len(visible.split(","))
  if seen < gpus:  # SLURM has split them itself (--gpus-per-task)
    return list(range(seen))
  if processes % nodes or gpus % (processes // nodes):
    raise ConfigError(
      f"{processes} processes on {nodes} nodes, and {gpus} GPUs on this one, can't be split "
      f"evenly; start a process per GPU (--ntasks-per-node={gpus}), or per node "
      "(--ntasks-per-node=1)",
      where="SLURM_NTASKS",
      processes=processes,
      gpus=gpus,
    )
  each = gpus // (processes // nodes)
  return list(range(local * each, (local + 1) * each))


def banner() -> str:
  """Which process this is, where, and what it has."""
  devices = jax.local_devices()
  numbers = sorted(device.id for device in devices)
  return (
    f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
    f"{len(devices)} x {devices[0].device_kind}, devices {numbers[0]} to {numbers[-1]} of "
    f"{jax.device_count()}"
  )


class Roll:
  """Who is there, heard by process 0 over one connection from each of the others; all methods
  return at once.

  exit: ends this process with a message. grace: seconds in which a process may end by itself.
  """

  def __init__(
    self,
    process: int,
    processes: int,
    exit: Callable[[str], Any] | None = None,
    grace: float = GRACE,
  ):
    self.process = process
    self.processes = processes
    self.grace = grace
    self.exit = exit or _end
    self.names = {process: socket.gethostname()}  # of those that are there
    self.lines: dict[int, socket.socket] = {}  # at process 0 to each, elsewhere to 0
    self._well, self._ending = False, threading.Lock()
    self._server: socket.socket | None = None

  def open(self, address: str, port: int) -> int:
    """Listens (process 0), or begins to call `address`; returns the port. Port 0 is any that is
    free.

    Raises:
      ConfigError: process 0 can't listen there.
    """
    if self.process == 0:
      try:
        self._server = socket.create_server(("", port))
      except OSError as error:
        raise ConfigError(
          f"process 0 can't listen on port {port} ({error.strerror}), the one after "
          "config.distributed.coordinator's; choose another",
          where="config.distributed.coordinator",
          port=port,
        ) from error
      port = self._server.getsockname()[1]
      self._begin(self._accept, self._server)
    else:
      self._begin(self._call, address, port)
    return port

  def missing(self) -> list[int]:
    """Processes that were never heard of; only process 0 knows."""
    return sorted(set(range(self.processes)) - self.names.keys())

  def close(self, well: bool) -> None:
    """Leaves. Unless all went well the others end too, and process 0 waits for them: JAX aborts
    whoever survives it.
    """
    self._well = True  # whatever the others do now
    reason = (
      f"process {self.process} ({self.names[self.process]}) ended with an error; its own "
      f"output says why. {AGAIN}"
    )
    self._tell("bye" if well else reason, last=True)
    deadline = time.monotonic() + 2 * self.grace
    while self.process == 0 and not well and self.lines and time.monotonic() < deadline:
      time.sleep(0.05)
    if self._server:
      self._server.close()

  def end(self, reason: str, seconds: float | None = None) -> None:
    """Tells the others why, and ends this process with one line and exit code 1, unless it ends by
    itself before (GRACE).
    """
    if self._well or not self._ending.acquire(blocking=False):
      return
    if self.process == 0:
      self._tell(reason)
    time.sleep(self.grace if seconds is None else seconds)
    if not self._well:
      self.exit(f"process {self.process}: {reason}")

  def _tell(self, text: str, last: bool = False) -> None:
    for line in list(self.lines.values()):
      with contextlib.suppress(OSError):
        line.sendall(f"{text}\n".encode())
        if last:
          line.shutdown(socket.SHUT_WR)

  def _begin(self, target, *arguments) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()

  def _accept(self, server: socket.socket) -> None:
    while True:
      try:
        line, _ = server.accept()
      except OSError:  # closed
        return
      self._begin(self._hear, line)

  def _hear(self, line: socket.socket) -> None:
    said = line.makefile("r", errors="replace")
    process, _, name = _next(said).partition(" ")
    # somebody else at this port
    if not name or not process.isdecimal() or not 0 < int(process) < self.processes:
      return line.close()
    process = int(process)
    # in this order: who is named can be told
    self.lines[process] = line
    self.names[process] = name
    last = _next(said)
    self.lines.pop(process, None)
    if last != "bye":
      self.end(
        last
        or (
          f"process {process} ({self.names.get(process, '?')}) is gone; its own output says why. "
          f"{AGAIN}"
        )
      )

  def _call(self, address: str, port: int) -> None:
    while not self._well:
      try:
        line = socket.create_connection((address, port), timeout=10)
        break
      except OSError:  # not there yet
        time.sleep(0.2)
    else:
      return
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    self.lines[0] = line
    with contextlib.suppress(OSError):
      line.sendall(f"{self.process} {self.names[self.process]}\n".encode())
    said = _next(line.makefile("r", errors="replace"))
    if said != "bye":  # without process 0 JAX aborts the others at once: no time for grace
      self.end(
        said or f"process 0 at {address} is gone; its own output says why. {AGAIN}",
        None if said else 0.0,
      )


def _next(said: io.TextIOBase) -> str:
  """The next line from another process; "" when there is none any more."""
  try:
    return said.readline().strip()
  except OSError:  # as port scanners and health checks reset what they opened
    return ""


def report_late(roll: Roll | None, config: DistributedConfig, coordinator: str | None) -> None:
  """Not all came up in time."""
  within = f"within config.distributed.start_seconds = {config.start_seconds} s"
  if roll is None:
    _end(
      f"not all processes came up {within}; your scheduler says which (squeue, kubectl get pods, "
      f"gcloud). {AGAIN}"
    )
  if roll.process == 0:
    missing = ", ".join(map(str, roll.missing())) or "none"
    there = ", ".join(f"{process} ({name})" for process, name in sorted(roll.names.items()))
    roll.end(
      f"did not come up {within}: process {missing} of {roll.processes}; there are {there}. Look "
      f"at the missing ones' own output, and whether they reach {coordinator} and the port after "
      f"it. {AGAIN}",
      1.0,
    )
  else:
    time.sleep(roll.grace)  # the first one knows more
    roll.end(
      f"process 0 does not answer at {coordinator} {within}; is it running there, and may this "
      f"host reach it? {AGAIN}",
      0,
    )


def _end(reason: str) -> NoReturn:
  print(f"error: {reason}", file=sys.stderr, flush=True)
  os._exit(1)  # the main thread may be waiting for what never comes


def _address(coordinator: str) -> tuple[str, int]:
  address, _, port = coordinator.rpartition(":")
  if not address or not port.isdigit() or not 0 < int(port) < 65535:
    raise ConfigError(
      f'config.distributed.coordinator = {coordinator!r}: expected HOST:PORT of process 0, "auto", '
      f"or None for one process",
      where="config.distributed.coordinator",
      value=coordinator,
    )
  return address, int(port)


def gather(value: Any) -> list:
  """What each process gives, as JSON holds it; all of them must call this."""
  if jax.process_count() == 1:
    return [json.loads(json.dumps(value))]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array(len(text)))
  texts = multihost_utils.process_allgather(np.pad(text, (0, sizes.max() - len(text))))
  return [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]


@contextlib.contextmanager
def stop_signal() -> Generator[Any]:
  """Gives a function that says whether any process was told to stop; a second signal acts at once.

  All processes hear the same answer at the same step: it is one more small sum over them.
  """
  got = []

  def note(number, _):
    # print is not safe here
    os.write(2, b"told to stop: what is under way is finished and saved; once more stops at once\n")
    got.append(number)
    signal.signal(number, old[number])

  old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

  def stopping() -> bool:
    if jax.process_count() == 1:
      return bool(got)
    return bool(multihost_utils.process_allgather(np.array(bool(got))).any())

  try:
    yield stopping
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
