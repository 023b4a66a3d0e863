"""Two processes of one run, connected on this machine: they read and train what one process
would.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from xcomp_jax.config import RunConfig
from xcomp_jax.config_io import from_dict, to_dict
from xcomp_jax.training import loop, steps


def noting(noted, local, losses):
  """A kind of loop that notes of every micro-batch the samples of all processes and a hash of all
  arrays but visual tokens; how many rows are this process's; and the loss of every step.
  """

  class Noting(loop.Loop):
    def add(self, micro):
      local.append(micro.batch.index.size)
      whole = [
        np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        for leaf in jax.tree.leaves(steps.place_rows(micro.batch, self.mesh))
      ]
      digest = hashlib.sha256(
        b"".join(f"{x.dtype}{x.shape}".encode() + x.tobytes() for x in whole)
      ).hexdigest()
      noted.append((whole[-1].ravel().tolist(), digest))
      return super().add(micro)

    def tell(self, group, values):
      if group == "train":
        losses.append(values["loss"])
      super().tell(group, values)

  return Noting


def one_of_two(port, number, config, out, order):
  """A process of two: trains, its devices in that order in the mesh, and writes what it read and
  how it ended.
  """
  jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
  noted, local, result, said = [], [], None, None

  def devices():
    return [jax.devices()[int(i)] for i in order] or jax.devices()

  try:
    values = json.loads(pathlib.Path(config).read_text())
    result = loop.train(
      from_dict(RunConfig, values), devices=devices, kind=noting(noted, local, [])
    )
  except ValueError as error:
    said = str(error)
  pathlib.Path(out).write_text(
    json.dumps({"noted": noted, "local": local, "result": result, "said": said})
  )


def two(tmp_path, *configs, devices=1, order=""):
  """Runs both processes of so many devices; what each wrote."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  root = pathlib.Path(__file__).parents[2]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(root)}
  processes = []
  for number, config in enumerate(configs):
    (tmp_path / f"config{number}").write_text(json.dumps(to_dict(config)))
    arguments = [
      str(port),
      str(number),
      str(tmp_path / f"config{number}"),
      str(tmp_path / f"out{number}"),
      order,
    ]
    processes.append(
      subprocess.Popen([sys.executable, __file__, *arguments], cwd=root, env=environment)
    )
  try:
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
  finally:
    for process in processes:
      process.kill()
  return [json.loads((tmp_path / f"out{number}").read_text()) for number in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind, axis", [("frames", "tensor"), ("features", "fsdp")]
)  # the same rows in both; half in each
def test_two_processes_go_on_with_a_run_of_one(tiny_run, features, tmp_path, kind, axis):
  data = {"data.train": features} if kind == "features" else {}
  config = tiny_run(tmp_path / "one", mesh={"data": 1, "fsdp": 1, "tensor": 1} | {axis: 2}, **data)
  noted, losses = [], []
  two_devices = {"devices": lambda: jax.devices()[:2], "kind": noting(noted, [], losses)}
  assert loop.train(config, **two_devices)["step"] == 4
  shutil.copytree(tmp_path / "one", tmp_path / "two")
  shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
  ways = two(
    tmp_path, *(dataclasses.replace(config, workdir=str(tmp_path / "two")) for _ in range(2))
  )
  for way in ways:
    assert way["said"] is None and way["result"]["step"] == 4
    batches = [(samples, digest) for samples, digest in way["noted"]]
    # the same global batches, bit by bit
    assert 0 < len(batches) < len(noted) and batches == noted[-len(batches) :]
    assert way["local"] == [len(samples) // (2 if axis == "fsdp" else 1) for samples, _ in batches]
    assert sum(i >= 0 for samples, _ in batches for i in samples) == 2 * 3
    np.testing.assert_allclose(way["result"]["loss"], np.mean(losses[2:]), rtol=1e-5)


@pytest.mark.slow
def test_rows_scattered_over_the_hosts_are_the_same_samples_and_losses(tiny_run, tmp_path):
  config = tiny_run(tmp_path / "one", mesh={"data": 1, "fsdp": 4, "tensor": 1})
  noted = []
  alone = loop.train(config, devices=lambda: jax.devices()[:4], kind=noting(noted, [], []))
  # As a ring lies on a torus: the first host has the first and the last row, or every other one.
  for order in ("0231", "0213"):
    config = dataclasses.replace(config, workdir=str(tmp_path / order))
    for way in two(tmp_path, config, config, devices=2, order=order):
      assert way["said"] is None
      assert [samples for samples, _ in way["noted"]] == [samples for samples, _ in noted]
      np.testing.assert_allclose(way["result"]["loss"], alone["loss"], rtol=1e-5)


def test_two_processes_that_differ_are_refused_by_both(tiny_run, features, tmp_path):
  config = tiny_run(tmp_path / "w", mesh={"data": 1, "fsdp": 2, "tensor": 1})
  other = dataclasses.replace(config, seed=1, data=dataclasses.replace(config.data, train=features))
  for way in two(tmp_path, config, other):
    assert (
      "the processes of this run differ: identity of the data in config.data.train in process 0"
      in way["said"]
    )
    assert "; config.seed in process 0 is 0, in process 1 1. Give all of them" in way["said"]
  assert not (tmp_path / "w").exists()


@pytest.mark.slow  # two processes that import JAX
def test_a_workdir_that_is_not_shared_is_refused_by_both(tiny_run, tmp_path):
  config = tiny_run(tmp_path / "a", mesh={"data": 1, "fsdp": 2, "tensor": 1})
  for way in two(tmp_path, config, dataclasses.replace(config, workdir=str(tmp_path / "b"))):
    assert (
      "is not one folder for all processes: process 1 can't see what process 0 writes there; set "
      "it to a shared" in way["said"]
    )
  assert not list(tmp_path.glob("?/.shared*"))


if __name__ == "__main__":
  one_of_two(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
