"""Real processes on loopback: the run is the same on any mesh, is said to end when a process does,
and goes on after it.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cluster import ROOT, Cluster, arrays

sys.path.insert(0, str(ROOT / "launch"))
import local_cluster

SPLIT = {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
CONTEXT = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
ONE = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


@pytest.fixture(scope="module")
def make(tiny_run, tmp_path_factory):
  """A function (name, mesh, **changes) -> Cluster of a run of 50 steps in float32 at a learning
  rate of 1e-5.
  """
  root = tmp_path_factory.mktemp("pods")

  def cluster(name, mesh, **changes):
    values = {
      "mesh": mesh,
      "optim.learning_rate": 1e-5,
      "train.epochs": 17,
      "train.steps": 50,
      "train.batch_size": 4,
      "train.save_every": 25,
      "distributed": {"start_seconds": 120, "heartbeat_seconds": 10},
    }
    return Cluster(tiny_run(root / name / "w", **(values | changes)), root / name)

  return cluster


@pytest.fixture(scope="module")
def alone(make):
  """The losses and samples of 50 steps on one device."""
  cluster = make("alone", ONE)
  code, said = cluster.run(1, 1)
  assert code == 0, said
  return cluster, *cluster.trace()


def same_run(got, want):
  """Losses to 1e-5 in the first ten steps, to 1e-4 in all; the same samples."""
  (losses, samples), (whole, read) = got, want
  whole = dict(whole)
  for step, loss in losses:
    np.testing.assert_allclose(
      loss, whole[step], rtol=1e-5 if step <= 10 else 1e-4, err_msg=f"step {step}"
    )
    assert samples[step] == read[step]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [SPLIT, CONTEXT], ids=["2x2x2", "context"])
def test_two_processes_of_four_devices_take_the_steps_of_one_device(make, alone, mesh):
  cluster = make(f"two{mesh['context']}", mesh)
  code, said = cluster.run(2, 4)
  assert code == 0, said
  assert (
    "[0] process 0 of 2 on " in said
    and "4 x cpu, devices" in said
    and "[1] process 1 of 2 on " in said
  )
  losses, samples = cluster.trace()
  assert [step for step, _ in losses] == list(range(1, 51)) and np.ptp(
    [loss for _, loss in losses]
  ) > 0.1
  same_run((losses, samples), alone[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
  "first, then",
  [
    ((2, 4, SPLIT), (1, 8, {"data": 1, "fsdp": 8, "tensor": 1, "context": 1})),
    ((1, 8, SPLIT), (1, 1, ONE)),
  ],
  ids=["2x2x2 of two processes to 1x8 of one", "eight devices to one"],
)
def test_a_run_goes_on_elsewhere_with_the_same_samples(make, alone, first, then):
  processes, devices, mesh = first
  cluster = make(f"from{processes}", mesh)
  if processes == 2:
    source = make("two1", SPLIT)  # what the test above has left
    if not (source.folder / "w" / "checkpoints" / "25").exists():
      assert source.run(2, 4)[0] == 0
    shutil.copytree(source.folder / "w", cluster.folder / "w")
    shutil.rmtree(cluster.folder / "w" / "checkpoints" / "50")
  else:
    assert cluster.run(1, devices, arguments=["--config.train.save_every=5"], timeout=300)[0] == 0
    for step in (cluster.folder / "w" / "checkpoints").iterdir():
      if step.name != "45":
        shutil.rmtree(step)
  for file in cluster.folder.glob("trace.*"):
    file.unlink()
  other = make(f"from{processes}", then[2])
  code, said = other.run(then[0], then[1])
  assert code == 0, said
  losses, samples = other.trace()
  assert [step for step, _ in losses] == list(range(26 if processes == 2 else 46, 51))
  same_run((losses, samples), alone[1:])


def kills(make, count, seed, steps=16):
  """Kills one or all of two processes `count` times at random moments; says what happened. Raises
  if the run is not the same.
  """
  draw = random.Random(seed)
  changes = {"train.steps": steps, "train.save_every": 3, "train.keep_last": 2}
  mesh = {"data": 1, "fsdp": 2, "tensor": 1, "context": 1}
  whole = make(f"whole{seed}", mesh, **changes)
  assert whole.run(2, 1)[0] == 0
  want, read = whole.trace()
  want = dict(want)
  expected = arrays(whole.config)
  done = 0
  for number in range(1000):
    if done == count:
      return
    cluster, happened = make(f"killed{seed}.{number}", mesh, **changes), []
    while True:
      kill = None
      if done < count and len(happened) < 4:
        last = max((step for step, _ in cluster.trace()[0]), default=0)
        if last < steps - 3:
          phase = ("data", "step", "save")[done % 3]
          kill = {
            "process": draw.randrange(2),
            "phase": phase,
            "step": draw.randint(last + 1, last + 3),
            "delay": draw.random() * 0.05,
          }
      everyone = kill is not None and draw.random() < 0.5
      code, said = cluster.run(2, 1, kill=kill, grace=0 if everyone else 30)
      if kill is None:
        assert code == 0, said
        break
      assert code == 128 + signal.SIGKILL, said
      if not everyone:
        # The other one says who is gone; without process 0 JAX may be the first to say so.
        words = (
          ("error: process 0: process 1 (",)
          if kill["process"]
          else ("error: process 1: process 0 at", "the leader")
        )
        assert any(text in said for text in words), said
      done += 1
      happened.append(kill | {"all": everyone})
      print(f"killed {done} of {count}: {happened[-1]}", flush=True)
    losses, samples = cluster.trace()
    assert losses[-1][0] == steps and {step for step, _ in losses} == set(range(1, steps + 1))
    assert all(loss == want[step] for step, loss in losses), "losses differ"
    assert samples == read
    assert arrays(cluster.config) == expected, "parameters differ"


@pytest.mark.slow
def test_killed_at_random_moments_it_is_the_same_run_bit_by_bit(make, request):
  kills(make, request.config.getoption("kills"), request.config.getoption("kills_seed"))


@pytest.mark.slow
def test_processes_agree_to_skip_what_one_of_them_cannot_read(make):
  mesh = {"data": 1, "fsdp": 2, "tensor": 1, "context": 1}
  cluster = make("torn", mesh, **{"train.steps": 6, "train.save_every": 3})
  assert cluster.run(2, 1)[0] == 0
  want = dict(cluster.trace()[0])
  shutil.rmtree(cluster.folder / "w" / "checkpoints" / "6" / "opt" / "ocdbt.process_1")
  code, said = cluster.run(2, 1)
  assert (
    code == 0 and "checkpoints/6 is damaged and is skipped: " in said and "steps 4 to 6" in said
  ), said
  losses, _ = cluster.trace()
  assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 4, 5, 6] and all(
    loss == want[step] for step, loss in losses
  )
  assert (cluster.folder / "w" / "damaged" / "6").is_dir()


@pytest.mark.slow
def test_sigterm_to_one_host_saves_on_all_and_the_run_goes_on(make, alone):
  cluster = make("term", SPLIT | {"data": 1, "tensor": 1}, **{"train.save_every": 1000})
  launched = cluster.start(2, 1)
  while launched.poll() is None and len(cluster.trace()[0]) < 5:
    time.sleep(0.02)
  children = [
    int(p) for p in open(f"/proc/{launched.pid}/task/{launched.pid}/children").read().split()
  ]
  os.kill(children[1], signal.SIGTERM)  # of one host only
  said, _ = launched.communicate(timeout=120)
  assert launched.returncode == 0 and "the same command continues" in said, said
  first, _ = cluster.trace()
  last = first[-1][0]
  assert 5 <= last < 50 and f"stopped by a signal: step {last} of 50" in said
  assert [int(path.name) for path in (cluster.folder / "w" / "checkpoints").iterdir()] == [last]
  code, said = cluster.run(2, 1)
  assert code == 0, said
  losses, samples = cluster.trace()
  assert [step for step, _ in losses] == list(range(1, 51))  # none twice, none left out
  same_run((losses, samples), alone[1:])


@pytest.mark.slow
def test_sigterm_to_one_host_within_an_evaluation_leaves_it_to_the_continued_run_on_all(
  make, tiny_run, tmp_path
):
  changes = {
    "data.heldout": tiny_run(tmp_path).data.train,
    "train.steps": 12,
    "train.eval_every": 1,
    "train.save_every": 1000,
  }
  cluster = make("evaluated", SPLIT | {"data": 1, "tensor": 1}, **changes)
  launched = cluster.start(2, 1)
  # noted just before the step's evaluation
  while launched.poll() is None and len(cluster.trace()[0]) < 5:
    time.sleep(0.02)
  children = [
    int(p) for p in open(f"/proc/{launched.pid}/task/{launched.pid}/children").read().split()
  ]
  os.kill(children[1], signal.SIGTERM)
  said, _ = launched.communicate(timeout=120)
  assert launched.returncode == 0 and "the same command continues" in said, said
  code, more = cluster.run(2, 1)
  assert code == 0, more

  def steps(text):
    return [
      int(line.split("step ")[1].split(":")[0])
      for line in text.splitlines()
      if "held-out after step" in line
    ]

  # each once, wherever the signal came
  assert steps(said) and steps(said) + steps(more) == list(range(1, 13))
  assert [step for step, _ in cluster.trace()[0]] == list(range(1, 13))


@pytest.mark.parametrize("here", [0, 1])
def test_a_process_that_does_not_come_up_is_named(make, here):
  cluster = make(
    f"missing{here}",
    {"data": 1, "fsdp": 2, "tensor": 1, "context": 1},
    **{"distributed.start_seconds": 3},
  )
  program = [sys.executable, "-m", "xcomp_jax.train"]
  line = local_cluster.commands(
    [f"--config={cluster.folder / 'config.py'}"], 2, local_cluster.free_port(), program
  )[here]
  environment, begun = local_cluster.environment(1) | {"PYTHONPATH": str(ROOT)}, time.monotonic()
  done = subprocess.run(
    line, cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment
  )
  assert done.returncode == 1 and time.monotonic() - begun < 60
  words = (
    "error: process 0: did not come up within config.distributed.start_seconds = 3 s: process 1 of "
    "2; there are 0 ("
    if here == 0
    else "error: process 1: process 0 does not answer at localhost:"
  )
  assert words in done.stderr and not (cluster.folder / "w").exists()
