"""Checkpoints that are torn, and disks that are full or gone: a good one is used, and what is wrong
is said.
"""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.config_io import to_dict
from xcomp_jax.data import pipeline
from xcomp_jax.parallel.mesh import make_mesh
from xcomp_jax.training import checkpoint, optim, workdir
from xcomp_jax.training.steps import abstract_state


class Run:
  """Checkpoints of a run that never trained: every step has other numbers."""

  def __init__(self, config):
    self.config = config
    self.mesh = make_mesh(config.mesh, jax.devices()[:1])
    cfg = read_vlm_config(resolve(config.init_from), config.model, config.lp_comp)
    _, self.wanted = abstract_state(config, cfg, optim.optimizer(config.optim, 4), self.mesh)
    self.description = json.loads(
      json.dumps({"format": checkpoint.FORMAT, "run": to_dict(config), "vlm": to_dict(cfg)})
    )
    self.data = pipeline.BatchReader(range(9), lambda _: None)

  def state(self, step):
    number = iter(range(10**6))

    def fill(s):
      return jax.device_put(
        np.random.default_rng([step, next(number)]).normal(size=s.shape).astype(s.dtype),
        s.sharding,
      )

    return jax.tree.map(fill, self.wanted)

  def save(self, *steps):
    with checkpoint.manager(self.config.workdir, self.config.train) as checkpoints:
      for step in steps:
        state = self.state(step)
        self.data.set_state({"step": step})
        checkpoint.save_checkpoint(checkpoints, step, state, self.data, self.description)
        checkpoint.wait_until_saved(checkpoints)

  def restore(self, said=None, wait=lambda seconds: None):
    """The step that is restored, after a look at every number."""
    say = (lambda text: None) if said is None else said.append
    with checkpoint.manager(self.config.workdir, self.config.train) as checkpoints:
      step, found, _ = checkpoint.restore_checkpoint(
        checkpoints, self.wanted, self.data, self.description, say, wait
      )
    jax.tree.map(np.testing.assert_array_equal, found, self.state(step))
    assert self.data.get_state() == {"step": step}
    return step


@pytest.fixture(scope="module")
def saved(tiny_run, tmp_path_factory):
  """Checkpoints of steps 2 and 4."""
  run = Run(tiny_run(tmp_path_factory.mktemp("damage") / "w", mesh={"fsdp": 1}))
  run.save(2, 4)
  return run


@pytest.fixture
def run(saved, tmp_path, tiny_run):
  """A copy of them, to be damaged."""
  shutil.copytree(saved.config.workdir, tmp_path / "w")
  return Run(tiny_run(tmp_path / "w", mesh={"fsdp": 1}))


def largest(folder):
  return max(
    (file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
  )


def cut(file, size):
  with open(file, "r+b") as handle:
    handle.truncate(size)


DAMAGES = {
  "no parameters": lambda step: shutil.rmtree(step / "params"),
  "no optimizer state": lambda step: shutil.rmtree(step / "opt"),
  "no position in the data": lambda step: shutil.rmtree(step / "data"),
  "no config": lambda step: shutil.rmtree(step / "config"),
  "half of the largest file of parameters": lambda step: cut(
    largest(step / "params"), largest(step / "params").stat().st_size // 2
  ),
  "a tenth less of every file of arrays": lambda step: [
    cut(file, file.stat().st_size * 9 // 10) for file in (step / "opt").rglob("d/*")
  ],
  "nothing in the largest file of optimizer state": lambda step: cut(largest(step / "opt"), 0),
  "no manifest": lambda step: (step / "params" / "manifest.ocdbt").unlink(),
  "half a manifest": lambda step: cut(step / "opt" / "manifest.ocdbt", 40),
  "no arrays of a process": lambda step: shutil.rmtree(step / "params" / "ocdbt.process_0"),
  "half of the metadata": lambda step: cut(step / "opt" / "_METADATA", 1000),
  "empty position": lambda step: cut(step / "data" / "metadata", 0),
  "position of another step": lambda step: (step / "data" / "metadata").write_text('{"step": 3}'),
  "position that is none": lambda step: (step / "data" / "metadata").write_text('["step"]'),
  "half a config": lambda step: cut(step / "config" / "metadata", 100),
  "an empty folder": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_kept_aside(run, damage):
  step, said = pathlib.Path(run.config.workdir) / "checkpoints" / "4", []
  DAMAGES[damage](step)
  assert run.restore(said) == 2
  assert any(f"checkpoint {step} is damaged and is skipped: " in line for line in said), said
  assert not step.exists() and (step.parents[1] / "damaged" / "4").is_dir()
  run.save(4)  # nothing is in its way
  assert run.restore() == 4


def test_what_can_be_read_the_second_time_is_not_damaged(run):
  step = pathlib.Path(run.config.workdir) / "checkpoints" / "4"
  (step / "opt").rename(away := step.parents[1] / "opt")
  waited, said = [], []

  def wait(seconds):
    waited.append(seconds)
    away.rename(step / "opt")

  assert run.restore(said, wait) == 4 and not said
  assert waited == [checkpoint.AGAIN_AFTER] and checkpoint.AGAIN_AFTER > 0
  assert not (pathlib.Path(run.config.workdir) / "damaged").exists()


def test_a_newest_checkpoint_that_is_gone_is_not_missed(run):
  shutil.rmtree(pathlib.Path(run.config.workdir) / "checkpoints" / "4")
  assert run.restore() == 2


def test_a_save_that_a_kill_has_cut_short_is_no_checkpoint(run):
  steps = pathlib.Path(run.config.workdir) / "checkpoints"
  (steps / "4").rename(steps / "4.orbax-checkpoint-tmp")
  assert run.restore() == 2


def test_without_any_file_it_is_a_good_one_bit_by_bit_or_the_one_before(run):
  folder = pathlib.Path(run.config.workdir) / "checkpoints" / "4"
  files, steps = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()], []
  for file in files:
    shutil.copytree(folder.parents[1], whole := folder.parents[2] / "whole")
    (folder / file).unlink()
    steps.append(run.restore())  # looks at every number
    shutil.rmtree(folder.parents[1])
    whole.rename(folder.parents[1])
  assert len(files) > 15 and set(steps) == {2, 4}


def test_if_none_can_be_read_nothing_is_moved_or_begun_anew(run):
  steps = pathlib.Path(run.config.workdir) / "checkpoints"
  for step in ("2", "4"):
    shutil.rmtree(steps / step / "opt")
  with pytest.raises(CheckpointError) as caught:
    run.restore()
  assert caught.value.fields == {"where": str(steps), "damaged": [4, 2]}
  assert (
    sorted(path.name for path in steps.iterdir()) == ["2", "4"]
    and not (steps.parent / "damaged").exists()
  )


def test_keep_last_and_keep_every(tiny_run, tmp_path):
  run = Run(
    tiny_run(tmp_path / "w", mesh={"fsdp": 1}, **{"train.keep_last": 2, "train.keep_every": 3})
  )
  run.save(*range(1, 8))
  assert sorted(int(path.name) for path in (tmp_path / "w" / "checkpoints").iterdir()) == [3, 6, 7]


def full(run, steps):
  """What a full disk does, from here on: no file may grow beyond a few bytes."""
  import resource
  import signal

  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def lost(run, steps):
  shutil.rmtree(steps)
  steps.write_text("another disk")


def fail(how, config):
  """In a process of its own: saves step 2, then step 4 while the disk is no longer what it was."""
  from xcomp_jax.config import RunConfig
  from xcomp_jax.config_io import from_dict

  run = Run(from_dict(RunConfig, json.loads(pathlib.Path(config).read_text())))
  run.save(2)
  {"full": full, "lost": lost}[how](run, pathlib.Path(run.config.workdir) / "checkpoints")
  try:
    run.save(4)
  except checkpoint.SaveError as error:
    print(f"error: {error}", flush=True)
    os._exit(3)


@pytest.mark.parametrize("how", ["full", "lost"])
def test_a_disk_that_is_full_or_gone_ends_in_a_clear_error(tiny_run, tmp_path, how):
  config = tiny_run(tmp_path / "w", mesh={"fsdp": 1}, **{"train.keep_last": 1})
  (tmp_path / "config").write_text(json.dumps(to_dict(config)))
  done = subprocess.run(
    [sys.executable, __file__, how, str(tmp_path / "config")],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 3, done.stderr[-2000:]
  assert f"error: a checkpoint could not be saved in {tmp_path}/w/checkpoints: " in done.stdout
  if how == "full":
    assert (
      os.strerror(errno.EFBIG) in done.stdout
      and "the last good one is of step 2. Make room there" in done.stdout
    )
    assert Run(config).restore() == 2
  else:
    assert "there is none yet" in done.stdout


def test_a_bucket_stays_one_all_the_way_to_the_libraries(tiny_run, monkeypatch):
  # There is none here: what can be seen is the path that Orbax, TensorBoard and `claim` are given,
  # and that it is etils'.
  config = tiny_run("gs://bucket/runs/sct")
  folder, given = checkpoint.folder(config.workdir), []
  assert str(folder) == "gs://bucket/runs/sct/checkpoints" and isinstance(
    folder, type(epath.Path("gs://bucket"))
  )
  real = checkpoint.ocp.CheckpointManager
  monkeypatch.setattr(real, "__init__", lambda self, path, **_: given.append(path))
  checkpoint.manager(config.workdir, config.train)
  assert given == [folder]
  backend = type(folder / "x")
  for name in ("mkdir", "write_text", "unlink"):
    monkeypatch.setattr(
      backend, name, lambda self, *a, name=name, **k: given.append((name, str(self)))
    )
  workdir.claim(config.workdir)
  made = [path for what, path in given[1:] if what == "mkdir"]
  assert made == [f"gs://bucket/runs/sct{part}" for part in ("", "/checkpoints", "/tensorboard")]
  assert [path for what, path in given[1:] if what == "write_text"] == [
    "gs://bucket/runs/sct/.write-test-0"
  ]


if __name__ == "__main__":
  fail(*sys.argv[1:])
