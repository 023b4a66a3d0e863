"""hosts.py: who is there and who is gone; tests/training/test_pods.py has whole runs."""

import os
import socket
import struct
import subprocess
import sys
import time

import jax
import pytest

from xcomp_jax.config import ConfigError, DistributedConfig
from xcomp_jax.parallel import hosts


@pytest.fixture
def ended(monkeypatch):
  """What would have ended a process."""
  said = []
  monkeypatch.setattr(hosts, "GRACE", 0.05)
  monkeypatch.setattr(hosts, "_end", said.append)
  return said


def rolls(count, missing=()):
  first = hosts.Roll(0, count)
  port = first.open("", 0)
  all_ = [first] + [hosts.Roll(i, count) for i in range(1, count) if i not in missing]
  for roll in all_[1:]:
    roll.open("localhost", port)
  until(lambda: len(first.names) == count - len(missing))
  return all_


def until(holds, seconds=10):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_process_that_ends_with_an_error_is_named_by_all_others(ended):
  first, second, third = rolls(3)
  second.close(well=False)
  until(lambda: len(ended) == 2)
  name = socket.gethostname()
  assert sorted(ended) == [
    f"process {i}: process 1 ({name}) ended with an error; its own output says why. {hosts.AGAIN}"
    for i in (0, 2)
  ]
  first.close(well=True)
  third.close(well=True)


def test_the_first_process_is_missed_too(ended):
  first, second = rolls(2)
  for line in list(first._lines.values()):  # as the end of a process closes it
    line.shutdown(socket.SHUT_RDWR)
  until(lambda: len(ended) == 2)  # the first one's own end is the loss of its line to the second
  assert any(
    line.startswith(
      "process 1: process 0 at localhost is gone; its own output says why. Start all of"
    )
    for line in ended
  )
  second.close(well=True)
  first.close(well=True)


def test_the_first_process_tells_of_its_error_and_waits_for_the_others(ended):
  first, second, third = rolls(3)
  first.close(well=False)
  until(lambda: len(ended) == 2)
  assert sorted(line[:19] for line in ended) == ["process 1: process ", "process 2: process "]
  assert all(
    f"process 0 ({socket.gethostname()}) ended with an error; its own output says why." in line
    for line in ended
  )
  second.close(well=True)
  third.close(well=True)


def test_a_process_that_is_gone_without_a_word_is_named_by_all_others(ended):
  first, second, third = rolls(3)
  second._lines[0].shutdown(socket.SHUT_RDWR)  # as the end of a process closes it
  until(lambda: len(ended) == 3)  # the second one's own end is the loss of its line to the first
  assert any(
    line.startswith(f"process 2: process 1 ({socket.gethostname()}) is gone;") for line in ended
  )
  for roll in (first, second, third):
    roll.close(well=True)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_who_leaves_well_is_not_missed(ended, order):
  all_ = rolls(3)
  for i in order:
    all_[i].close(well=True)
    time.sleep(0.1)
  time.sleep(0.3)
  assert not ended


def test_who_never_came_is_known_to_the_first_and_told_to_the_others(ended):
  first, third = rolls(4, missing=(1, 3))
  assert first.missing() == [1, 3]
  hosts._late(first, DistributedConfig("localhost:1234", 4, 0, 7, 100), "localhost:1234")
  until(lambda: len(ended) == 2)
  name = socket.gethostname()
  for i in (0, 2):
    assert any(
      line.startswith(
        f"process {i}: did not come up within config.distributed.start_seconds = 7 s: process 1, 3 "
        f"of 4; there are "
        f"0 ({name}), 2 ({name}). Look at the missing ones' own output, and whether they reach "
        f"localhost:1234"
      )
      for line in ended
    ), ended
  first.close(well=True)
  third.close(well=True)


def test_a_stranger_at_the_port_is_no_process(ended):
  first = hosts.Roll(0, 2)
  port = first.open("", 0)
  for text in (b"GET / HTTP/1.1\r\n\r\n", b"7 host\n", "² host\n".encode(), b"1", b""):
    with socket.create_connection(("localhost", port)) as line:
      line.sendall(text)
  for text in (b"", b"1"):  # closed by a reset, as port scanners and health checks do
    with socket.create_connection(("localhost", port)) as line:
      line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
      line.sendall(text)
  time.sleep(0.3)
  assert first.missing() == [1] and not ended
  first.close(well=True)


@pytest.mark.parametrize(
  "values, words",
  [
    (
      ("localhost", 2, 0),
      r"config\.distributed\.coordinator = 'localhost': expected HOST:PORT",
    ),
    (("localhost:http", 2, 0), "expected HOST:PORT"),
    (
      ("localhost:1234", None, 0),
      r"with process 0 of None: set config\.distributed\.processes",
    ),
    (("localhost:1234", 2, 2), "with process 2 of 2: .* from 0 on in each"),
  ],
)
def test_processes_that_cannot_be_counted_are_refused(values, words):
  with pytest.raises(ConfigError, match=words), hosts.joined(DistributedConfig(*values, 10, 100)):
    pass


def test_a_port_that_is_taken_is_said():
  with (
    socket.create_server(("", 0)) as taken,
    pytest.raises(ConfigError, match=r"can't listen on port \d+ \(Address already in use"),
  ):
    hosts.Roll(0, 2).open("", taken.getsockname()[1])


def test_one_process_has_nothing_to_connect(monkeypatch, capsys):
  with hosts.joined(DistributedConfig(None, None, None, 10, 100)):
    pass
  assert not capsys.readouterr().out
  monkeypatch.setattr(hosts, "_connect", lambda *_: None)  # as where there is no cluster
  with hosts.joined(DistributedConfig("auto", None, None, 10, 100)):
    pass
  assert capsys.readouterr().out.startswith("no cluster found: a run of one process, on ")


@pytest.mark.parametrize(
  "processes, nodes, local, gpus, visible, mine",
  [
    (16, 2, 3, 8, None, [3]),  # a process per GPU
    (2, 2, 0, 8, "0,1,2,3,4,5,6,7", [0, 1, 2, 3, 4, 5, 6, 7]),  # a process per node
    (2, 1, 1, 8, None, [4, 5, 6, 7]),
    (8, 1, 3, 8, "3", [0]),  # --gpus-per-task=1: the only one that it sees
    (2, 2, 0, None, None, None),  # no GPUs
  ],
)
def test_every_gpu_of_a_slurm_node_has_a_process(
  monkeypatch, processes, nodes, local, gpus, visible, mine
):
  names = (
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_NODES",
    "SLURM_LOCALID",
    "SLURM_GPUS_ON_NODE",
    "CUDA_VISIBLE_DEVICES",
  )
  for name, value in zip(names, (processes, nodes, local, gpus, visible), strict=True):
    monkeypatch.delenv(name, raising=False)
    if value is not None:
      monkeypatch.setenv(name, str(value))
  assert hosts._slurm_gpus() == mine
  if gpus and not visible:
    monkeypatch.setenv("SLURM_NTASKS", str(3 * nodes))
    with pytest.raises(
      ConfigError,
      match=(
        f"{3 * nodes} processes on {nodes} nodes, and 8 GPUs on this one, .*--ntasks-per-node=8"
      ),
    ):
      hosts._slurm_gpus()


def test_jax_is_told_of_all_gpus_of_a_slurm_node(monkeypatch):
  names = {
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "4",
  }
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  for name, value in names.items():
    monkeypatch.setenv(name, value)
  told = {}
  monkeypatch.setattr(jax.distributed, "initialize", lambda **options: told.update(options))
  with hosts.joined(DistributedConfig("auto", None, None, 10, 100)):
    assert told["local_device_ids"] == [0, 1, 2, 3]


def slurm(numbers, seconds):
  """Processes of a SLURM step of two that join, those of `numbers`; they and what they said."""
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
  code = (
    "import os\nimport jax\nfrom xcomp_jax.parallel import hosts\nfrom xcomp_jax.config import "
    "DistributedConfig\n"
    f"with hosts.joined(DistributedConfig('auto', None, None, {seconds}, 10)):\n"
    "  print('gpus', jax.config.read('jax_cuda_visible_devices'), flush=True)\n"
    # Gloo, which CPUs talk by, sometimes waits for ever where Python ends
    "jax.distributed.shutdown()\nos._exit(0)\n"
  )
  common = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_GPUS_ON_NODE": "8",
    "JAX_COORDINATOR_PORT": str(port),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      env=os.environ | common | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for i in numbers
  ]
  try:
    return processes, [process.communicate(timeout=60)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()


@pytest.mark.slow  # 8 s: two processes that import JAX
def test_slurms_variables_are_enough():
  processes, said = slurm((0, 1), 60)
  for i, gpus in enumerate(("0,1,2,3", "4,5,6,7")):
    assert (
      processes[i].returncode == 0
      and f"process {i} of 2" in said[i]
      and f"gpus {gpus}\n" in said[i]
    ), said[i]


@pytest.mark.slow
def test_a_process_that_slurm_did_not_start_is_named():
  for here, words in (
    (0, "did not come up within config.distributed.start_seconds = 3 s: process 1 of 2"),
    (1, "process 0 does not answer at localhost:"),
  ):
    (process,), (said,) = slurm((here,), 3)
    assert process.returncode == 1 and words in said, said


def test_a_lost_process_is_seen_behind_a_failed_save():
  def saved(reason):
    try:
      raise OSError("no room") from reason
    except OSError as error:
      return error

  assert hosts._in_collective(
    saved(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
  )
  assert hosts._in_collective(jax.errors.JaxRuntimeError("INTERNAL: peer"))
  assert not hosts._in_collective(saved(ValueError("no such folder"))) and not hosts._in_collective(
    saved(None)
  )
