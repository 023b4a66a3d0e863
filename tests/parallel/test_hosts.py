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


class Ended(list):
  """What would have ended processes, which are rolls of this one."""

  def roll(self, process, processes):
    return hosts.Roll(process, processes, exit=self.append, grace=0.05)

  def rolls(self, count, missing=()):
    """Those of a run, connected."""
    first = self.roll(0, count)
    port = first.open("", 0)
    all_ = [first] + [self.roll(i, count) for i in range(1, count) if i not in missing]
    for roll in all_[1:]:
      roll.open("localhost", port)
    until(lambda: len(first.names) == count - len(missing))
    return all_


@pytest.fixture
def ended():
  return Ended()


def until(holds, seconds=10):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_process_that_ends_with_an_error_is_named_by_all_others(ended):
  first, second, third = ended.rolls(3)
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
  first, second = ended.rolls(2)
  for line in list(first.lines.values()):  # as the end of a process closes it
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
  first, second, third = ended.rolls(3)
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
  first, second, third = ended.rolls(3)
  second.lines[0].shutdown(socket.SHUT_RDWR)  # as the end of a process closes it
  until(lambda: len(ended) == 3)  # the second one's own end is the loss of its line to the first
  assert any(
    line.startswith(f"process 2: process 1 ({socket.gethostname()}) is gone;") for line in ended
  )
  for roll in (first, second, third):
    roll.close(well=True)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_who_leaves_well_is_not_missed(ended, order):
  all_ = ended.rolls(3)
  for i in order:
    all_[i].close(well=True)
    time.sleep(0.1)
  time.sleep(0.3)
  assert not ended


@pytest.mark.pure
def test_who_never_came_is_known_to_the_first_and_told_to_the_others(ended):
  first, third = ended.rolls(4, missing=(1, 3))
  assert first.missing() == [1, 3]
  config = distributed("localhost:1234", 4, 0, start_seconds=7)
  hosts.report_late(first, config, "localhost:1234")
  until(lambda: len(ended) == 2)
  name = socket.gethostname()
  for i in (0, 2):
    assert any(
      line.startswith(
        f"process {i}: did not come up within config.distributed.start_seconds = 7 s: process 1, 3 "
        f"of 4; there are 0 ({name}), 2 ({name}). Look at the missing ones' own output, and "
        "whether they reach localhost:1234"
      )
      for line in ended
    ), ended
  first.close(well=True)
  third.close(well=True)


def test_a_stranger_at_the_port_is_no_process(ended):
  first = ended.roll(0, 2)
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


def distributed(coordinator, processes=None, process=None, start_seconds=10):
  return DistributedConfig(
    coordinator=coordinator,
    processes=processes,
    process=process,
    start_seconds=start_seconds,
    heartbeat_seconds=100,
  )


@pytest.mark.pure
@pytest.mark.parametrize(
  "values, key, value",
  [
    (("localhost", 2, 0), "coordinator", "localhost"),
    (("localhost:http", 2, 0), "coordinator", "localhost:http"),
    (("localhost:1234", None, 0), "processes", None),
    (("localhost:1234", 2, 2), "process", None),
  ],
)
def test_processes_that_cannot_be_counted_are_refused(values, key, value):
  with pytest.raises(ConfigError) as caught, hosts.joined(distributed(*values)):
    pass
  assert caught.value.fields["where"] == f"config.distributed.{key}"
  assert caught.value.fields.get("value") == value


@pytest.mark.pure
def test_a_port_that_is_taken_is_said():
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(ConfigError) as caught:
      hosts.Roll(0, 2).open("", port)
  assert caught.value.fields == {"where": "config.distributed.coordinator", "port": port}
  assert "Address already in use" in str(caught.value)


def no_cluster(**options):
  """What JAX says without one."""
  raise ValueError("coordinator_address should be defined.")


def test_one_process_has_nothing_to_connect(capsys):
  with hosts.joined(distributed(None)):
    pass
  assert not capsys.readouterr().out
  with hosts.joined(distributed("auto"), initialize=no_cluster):
    pass
  assert capsys.readouterr().out.startswith("no cluster found: a run of one process, on ")


def test_a_cluster_that_jax_can_not_join_is_said():
  def refuse(**options):
    raise RuntimeError("jax.distributed.initialize() must be called before any JAX calls")

  with pytest.raises(ConfigError) as caught, hosts.joined(distributed("auto"), initialize=refuse):
    pass
  assert caught.value.fields == {"where": "config.distributed.coordinator"}
  assert "must be called before any JAX calls" in str(caught.value)


@pytest.mark.pure
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
def test_every_gpu_of_a_slurm_node_has_a_process(processes, nodes, local, gpus, visible, mine):
  values = {
    "SLURM_NTASKS": processes,
    "SLURM_STEP_NUM_NODES": nodes,
    "SLURM_LOCALID": local,
    "SLURM_GPUS_ON_NODE": gpus,
    "CUDA_VISIBLE_DEVICES": visible,
  }
  environment = {name: str(value) for name, value in values.items() if value is not None}
  assert hosts.slurm_gpus(environment) == mine
  if gpus and not visible:
    with pytest.raises(ConfigError) as caught:
      hosts.slurm_gpus(environment | {"SLURM_NTASKS": str(3 * nodes)})
    assert caught.value.fields == {"where": "SLURM_NTASKS", "processes": 3 * nodes, "gpus": 8}
    assert "--ntasks-per-node=8" in str(caught.value)


def test_jax_is_told_of_all_gpus_of_a_slurm_node_and_of_what_was_found(monkeypatch, ended):
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
  names = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "4",
    "JAX_COORDINATOR_PORT": str(port),
  }
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  for name, value in names.items():
    monkeypatch.setenv(name, value)
  told = {}
  with hosts.joined(distributed("auto"), initialize=lambda **options: told.update(options)):
    pass
  assert told == {
    "coordinator_address": f"localhost:{port}",
    "num_processes": 2,
    "process_id": 0,
    "local_device_ids": [0, 1, 2, 3],
    "initialization_timeout": 70,
    "heartbeat_timeout_seconds": 100,
    "shutdown_timeout_seconds": 100,
  }


def slurm(numbers, seconds):
  """Processes of a SLURM step of two that join, those of `numbers`; they and what they said."""
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
  code = (
    "import os\nimport jax\nfrom xcomp_jax.parallel import hosts\nfrom xcomp_jax.config import "
    "DistributedConfig\n"
    f"config = DistributedConfig(coordinator='auto', processes=None, process=None, "
    f"start_seconds={seconds}, heartbeat_seconds=10)\n"
    "with hosts.joined(config):\n"
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


@pytest.mark.pure
def test_a_lost_process_is_seen_behind_a_failed_save():
  def saved(reason):
    try:
      raise OSError("no room") from reason
    except OSError as error:
      return error

  assert hosts.in_collective(
    saved(ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"))
  )
  assert hosts.in_collective(jax.errors.JaxRuntimeError("INTERNAL: peer"))
  assert not hosts.in_collective(saved(ValueError("no such folder"))) and not hosts.in_collective(
    saved(None)
  )
