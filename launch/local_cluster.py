"""A cluster on this machine: the same training command in several processes, connected over
loopback.

  python launch/local_cluster.py --processes 2 --devices 4 -- --config=configs/sct.py:tiny
  --config.mesh.fsdp=8

Everything after `--` goes to `python -m xcomp_jax.train`, with the Python that runs this, and is
read before anything starts (launch/check.py). Without a --config there it is CONFIG's, FILE or
FILE:VARIANT, or configs/sct.py. Each process has its own virtual CPU devices (with --devices 0, the
devices that JAX finds); all that makes several hosts hard is real: collectives, saving together,
signals, sudden ends. Lines are prefixed by the process they come from. SIGINT and SIGTERM are
passed on to all processes, a second one kills them. When one ends badly the others have --grace
seconds to say so. The exit code is the first bad one, or 0.
"""

import argparse
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time


def free_port() -> int:
  """A port that is free, and the one after it too."""
  while True:
    with socket.socket() as one, socket.socket() as two:
      one.bind(("localhost", 0))
      port = one.getsockname()[1]
      try:
        two.bind(("localhost", port + 1))
      except (OSError, OverflowError):
        continue
      return port


def commands(
  arguments: list[str], processes: int, port: int, program: list[str]
) -> list[list[str]]:
  """What each process runs."""
  shared = [
    f"--config.distributed.coordinator=localhost:{port}",
    f"--config.distributed.processes={processes}",
  ]
  return [
    [*program, *arguments, *shared, f"--config.distributed.process={i}"] for i in range(processes)
  ]


def environment(devices: int) -> dict[str, str]:
  """Of each process."""
  if not devices:
    return dict(os.environ)
  return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def run(lines: list[list[str]], devices: int, grace: float) -> int:
  """Starts the processes and waits for all; returns the exit code of the first that ended badly
  (128 + signal), or 0.
  """
  processes: list[subprocess.Popen] = []
  told = []

  def forward(number, _):
    for process in processes:
      if process.poll() is None:
        process.send_signal(signal.SIGKILL if told else number)
    told.append(number)

  old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
  readers, code, end = [], 0, None
  try:
    for number, line in enumerate(lines):
      # A group of its own: Ctrl-C at a terminal comes once, from `forward`.
      process = subprocess.Popen(
        line,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )
      processes.append(process)
      readers.append(threading.Thread(target=show, args=(process.stdout, number), daemon=True))
      readers[-1].start()
    while any(process.poll() is None for process in processes):
      bad = [(i, p.returncode) for i, p in enumerate(processes) if p.poll() not in (None, 0)]
      if bad and end is None:
        number, status = bad[0]
        code, end = status if status > 0 else 128 - status, time.monotonic() + grace
        how = f"exit code {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
        say(f"process {number} ended with {how}; the others have {grace:g} s")
      if end is not None and time.monotonic() > end:
        break
      time.sleep(0.05)
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
      process.wait()
    for reader in readers:
      reader.join(timeout=5)
    for number, handler in old.items():
      signal.signal(number, handler)
  statuses = [process.returncode for process in processes if process.returncode]
  return code or next((status if status > 0 else 128 - status for status in statuses), 0)


def show(stream, number: int) -> None:
  """Prints a process's lines; of a progress bar the last state of each line."""
  for line in stream:
    text = line.decode(errors="replace").rstrip("\n").rpartition("\r")[2]
    if text:
      say(text, number)


def say(text: str, number: int | None = None) -> None:
  """One whole line."""
  sys.stdout.write(f"[{'cluster' if number is None else number}] {text}\n")
  sys.stdout.flush()


def main() -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=int, default=2, help="how many (default: 2)")
  parser.add_argument(
    "--devices",
    type=int,
    default=4,
    help="virtual CPU devices of each (default: 4); 0: what JAX finds",
  )
  parser.add_argument(
    "--grace",
    type=float,
    default=20,
    help="seconds that the others have when one is gone (default: 20)",
  )
  parser.add_argument("--program", default=None, help="instead of `python -m xcomp_jax.train`")
  parser.add_argument("--dry-run", action="store_true", help="print the commands")
  parser.add_argument(
    "arguments", nargs=argparse.REMAINDER, help="-- and what `xcomp_jax.train` is given"
  )
  given = parser.parse_args()
  if given.processes < 1 or given.devices < 0:
    parser.error("there must be at least one process, and 0 or more devices")
  arguments = given.arguments[1:] if given.arguments[:1] == ["--"] else given.arguments
  program = (
    shlex.split(given.program) if given.program else [sys.executable, "-m", "xcomp_jax.train"]
  )
  if not given.program and not any(re.match("--?config(=|$)", argument) for argument in arguments):
    arguments = [f"--config={os.environ.get('CONFIG') or 'configs/sct.py'}", *arguments]
  lines = commands(arguments, given.processes, free_port(), program)
  if (
    not given.program
    and subprocess.run(
      [sys.executable, pathlib.Path(__file__).with_name("check.py"), *lines[0][len(program) :]]
    ).returncode
    == 1
  ):
    sys.exit(1)
  if given.dry_run:
    device = f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={given.devices} " if given.devices else ""
    print("\n".join(device + shlex.join(line) for line in lines))
    return
  sys.exit(run(lines, given.devices, given.grace))


if __name__ == "__main__":
  main()
