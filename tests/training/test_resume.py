"""checkpoint.py and the loop: a run that was interrupted is the same run, and another run is
refused.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from xcomp_jax.config import ConfigError
from xcomp_jax.config_io import to_dict
from xcomp_jax.data.store import open_store
from xcomp_jax.data.store_writing import write_store
from xcomp_jax.training import checkpoint, loop, workdir


def train(config, kind=loop.Loop, **options):
  """On no more devices than the config names: programs compile in a fraction of the time."""
  mesh = config.mesh
  few = mesh.data * mesh.fsdp * mesh.tensor
  return loop.train(config, devices=lambda: jax.devices()[:few], kind=kind, **options)


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory):
  """Four steps in one go: config, result, samples in the order of reading, items of the last
  checkpoint.
  """
  config, order = make(tiny_run, tmp_path_factory.mktemp("straight") / "w"), []
  return config, train(config, recording(order)), order, items(config)


def make(tiny_run, workdir, **changes):
  return tiny_run(
    workdir, **({"mesh": {"data": 1, "fsdp": 1, "tensor": 1}, "train.log_every": 1} | changes)
  )


def recording(order, stop=None, how=None):
  """A kind of loop that notes the samples of every micro-batch, and calls `how` when the line of
  step `stop` was written.
  """

  class Recording(loop.Loop):
    def add(self, micro):
      order.append(micro.batch.index.ravel().tolist())
      return super().add(micro)

    def tell(self, group, values):
      super().tell(group, values)
      if group == "train" and self.done == stop:
        how()

  return Recording


def items(config):
  """The arrays of the latest checkpoint, by path."""
  import orbax.checkpoint as ocp

  with checkpoint.manager(config.workdir, config.train) as checkpoints:
    step = checkpoints.latest_step()
    out = checkpoints.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(),
        opt=ocp.args.StandardRestore(),
        data=ocp.args.JsonRestore(),
      ),
    )
  return as_bytes(out.params, out.opt), out.data


def as_bytes(params, opt):
  leaves = jax.tree_util.tree_leaves_with_path({"params": params, "opt": opt})
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_steps_then_resumed_to_four_equal_four_straight_bit_by_bit(
  tiny_run, straight, tmp_path, capsys, number
):
  config = make(tiny_run, tmp_path / "w", **{"train.save_every": 100})
  order, handler = [], signal.getsignal(number)
  told = recording(order, 2, lambda: os.kill(os.getpid(), number))
  assert train(config, told)["step"] == 2
  said = capsys.readouterr().out  # launch/slurm.sh and pod.sh look for the last words
  assert "stopped by a signal: step 2 of 4" in said and "; the same command continues\n" in said
  assert signal.getsignal(number) is handler
  assert train(config, recording(order))["step"] == 4
  assert order == straight[2]
  assert items(config) == straight[3]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tiny_run, straight, tmp_path):
  def end():
    raise KeyboardInterrupt

  config, order = make(tiny_run, tmp_path / "w"), []  # saves after step 2
  with pytest.raises(KeyboardInterrupt):
    train(config, recording([], 3, end))
  assert train(config, recording(order))["step"] == 4
  assert order == straight[2][-len(order) :] and 0 < len(order) < len(straight[2])
  assert items(config) == straight[3]


def test_a_finished_run_has_nothing_left_to_do(straight, capsys):
  assert train(straight[0]) == {"step": 4, "steps": 4}
  said = capsys.readouterr().out
  assert "\nall 4 steps are done\n" in said and "steps 5 to 4" not in said
  assert "no step was left to do" in said and "loss" not in said.splitlines()[-1]


@pytest.mark.slow
def test_a_run_stopped_within_an_evaluation_saves_and_its_continuation_has_all_of_it_once(
  tiny_run, tmp_path, capsys
):
  heldout = tiny_run(tmp_path).data.train.removesuffix("train") + "heldout"
  config = make(
    tiny_run, tmp_path / "w", **{"data.heldout": heldout, "train.steps": 2, "train.eval_every": 1}
  )
  measured = []

  class Evaluated(loop.Loop):
    def measure(self, encoder, micro):
      measured.append(self.done)
      if len(measured) == stop:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().measure(encoder, micro)

  def logged(said):
    return [int(step) for step in re.findall(r"held-out after step (\d+):", said)]

  stop = 1  # at the first of two batches of the first evaluation
  assert "heldout_loss" not in train(config, Evaluated) and measured == [1]
  said = capsys.readouterr().out
  assert "stopped by a signal: step 1 of 2" in said and not logged(said)

  stop = 1 + 2 + 1  # after all of that, and a batch of the one after the last step
  assert train(config, Evaluated)["step"] == 2 and measured == [1, 1, 1, 2]
  said = capsys.readouterr().out
  assert (
    "stopped by a signal: step 2 of 2" in said
    and "the same command continues" in said
    and logged(said) == [1]
  )

  stop = None
  assert train(config)["heldout_loss"] > 0
  said = capsys.readouterr().out
  assert "\nall 2 steps are done\n" in said and "done: step 2 of 2" in said and logged(said) == [2]


def test_a_run_goes_on_from_before_a_damaged_checkpoint_and_ends_the_same(
  tiny_run, straight, tmp_path, capsys
):
  shutil.copytree(straight[0].workdir, tmp_path / "w")
  shutil.rmtree(tmp_path / "w" / "checkpoints" / "4" / "opt")
  config = make(tiny_run, tmp_path / "w")
  assert train(config)["step"] == 4
  said = capsys.readouterr().out
  assert "checkpoints/4 is damaged and is skipped: " in said and "steps 3 to 4" in said
  assert items(config) == straight[3]


def test_a_second_run_in_a_workdir_is_refused_while_the_first_is_at_work(
  tiny_run, straight, tmp_path
):
  shutil.copytree(straight[0].workdir, tmp_path / "w")
  config = make(tiny_run, tmp_path / "w")
  with (
    workdir.holding(config.workdir),
    pytest.raises(ConfigError) as caught,
  ):
    train(config)
  assert caught.value.fields == {"where": "config.workdir", "value": config.workdir}
  assert "another run is at work in" in str(caught.value)
  train(config)


def test_a_run_goes_on_without_the_weights_that_it_started_from(tiny_run, straight, tmp_path):
  shutil.copytree(straight[0].init_from, tmp_path / "base")
  (tmp_path / "base" / "model.safetensors").unlink()
  assert train(make(tiny_run, straight[0].workdir, init_from=str(tmp_path / "base")))["step"] == 4


class Command:
  """`python -m xcomp_jax.train` as a process of its own, on one device."""

  def __init__(self, config):
    file = pathlib.Path(f"{config.workdir}.py")
    values = json.dumps(to_dict(config))
    file.write_text(
      f"import json\nfrom ml_collections import ConfigDict\nget_config = lambda: "
      f"ConfigDict(json.loads({values!r}))\n"
    )
    self.config, self.workdir = config, pathlib.Path(config.workdir)
    self.arguments = [sys.executable, "-m", "xcomp_jax.train", f"--config={file}"]
    self.environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}

  def start(self):
    return subprocess.Popen(
      self.arguments,
      cwd=pathlib.Path(__file__).parents[2],
      env=self.environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
    )

  def finish(self):
    """Runs to the end; step -> its loss, as said."""
    process = self.start()
    said, _ = process.communicate()
    assert process.returncode == 0 and "done: step 24 of 24" in said
    return {
      int(line.split()[1].split("/")[0]): line.split("loss ")[1].split()[0]
      for line in said.splitlines()
      if line.startswith("step ")
    }

  def saving(self):
    """Whether a checkpoint after the first is there, or about to be."""
    names = [path.name for path in (self.workdir / "checkpoints").glob("*")]
    return any(int(re.match(r"\d*", name)[0] or 0) > 2 for name in names)


@pytest.fixture
def command(tiny_run):
  """A function workdir -> Command for 24 steps, saved every second one."""
  return lambda workdir: Command(make(tiny_run, workdir, **{"train.epochs": 6}))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_got_a_signal_goes_on_as_if_nothing_had_been(command, tmp_path, number):
  whole, parts = command(tmp_path / "whole"), command(tmp_path / "parts")
  losses = whole.finish()
  process = parts.start()
  while process.poll() is None and not parts.saving():
    time.sleep(0.001)
  process.send_signal(number)
  said, _ = process.communicate()
  if number == signal.SIGTERM:
    assert process.returncode == 0 and "the same command continues" in said
  else:
    assert process.returncode == -number and "done: step" not in said
  rest = parts.finish()
  assert 0 < len(rest) < 24 and rest.items() <= losses.items()
  assert items(parts.config) == items(whole.config)


def test_a_folder_that_is_lost_while_training_stops_the_run_and_the_last_good_one_stays(
  tiny_run, straight, tmp_path
):
  shutil.copytree(straight[0].workdir, tmp_path / "w")
  steps, away = tmp_path / "w" / "checkpoints", tmp_path / "away"
  shutil.rmtree(steps / "4")
  config = make(tiny_run, tmp_path / "w", **{"train.save_every": 1})

  def lose():
    steps.rename(away)
    steps.write_text("")

  with pytest.raises(checkpoint.SaveError) as caught:
    train(config, recording([], 3, lose))
  assert caught.value.fields == {"where": str(steps), "steps": []}
  steps.unlink()
  away.rename(steps)
  assert train(config)["step"] == 4
  assert items(config) == straight[3]


def test_what_only_changes_the_pace_may_change(tiny_run, straight, tmp_path):
  shutil.copytree(straight[0].workdir, tmp_path / "moved")
  changes = {
    "model.remat": False,
    "data.threads": 2,
    "data.prefetch": 3,
    "train.log_every": 7,
    "train.save_every": 3,
  }
  assert train(make(tiny_run, tmp_path / "moved", **changes))["step"] == 4


@pytest.mark.parametrize(
  "changes, key, was, now",
  [
    ({"optim.learning_rate": 0.5}, "config.optim.learning_rate", 0.01, 0.5),
    ({"lp_comp.schedule": [4, 1]}, "config.lp_comp.schedule", [8, 1], [4, 1]),
    ({"train.projector": False}, "config.train.projector", True, False),
    ({"train.batch_size": 2}, "config.train.batch_size", 3, 2),
    ({"seed": 1}, "config.seed", 0, 1),
    ({"train.epochs": 9}, "config.train.epochs", 1, 9),
  ],
)
def test_another_run_is_refused(tiny_run, straight, changes, key, was, now):
  before = items(straight[0])
  with pytest.raises(ConfigError) as caught:
    train(make(tiny_run, straight[0].workdir, **changes))
  assert caught.value.fields["changed"] == {key: (was, now)}
  assert caught.value.fields["where"].endswith("checkpoints/4")
  assert f"{key} was {was!r}, is {now!r}. Set config.workdir to another folder" in str(caught.value)
  assert items(straight[0]) == before


def test_another_model_is_refused(tiny_run, straight, tmp_path):
  base = pathlib.Path(straight[0].init_from)
  shutil.copytree(base, tmp_path / "base")
  values = json.loads((base / "config.json").read_text())
  (tmp_path / "base" / "config.json").write_text(json.dumps(values | {"intermediate_size": 128}))
  with pytest.raises(ConfigError) as caught:
    train(make(tiny_run, straight[0].workdir, init_from=str(tmp_path / "base")))
  assert caught.value.fields["changed"]["vlm.llm.mlp_width"] == (64, 128)


def by_step(order):
  """The samples of each step of three."""
  samples = [i for rows in order for i in rows if i >= 0]
  return [sorted(samples[n : n + 3]) for n in range(0, len(samples), 3)]


def test_on_other_devices_a_run_goes_on_with_the_same_samples(tiny_run, straight, tmp_path):
  losses, orders = [], []
  for devices, shape in ((1, (1, 2, 16, 160)), (2, (2, 2, 16, 160))):
    workdir = tmp_path / str(devices)
    shutil.copytree(straight[0].workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    orders.append([])
    mesh = {"data": 1, "fsdp": devices, "tensor": 1}
    config = make(tiny_run, workdir, mesh=mesh, **{"data.shapes": [shape]})
    out = train(config, recording(orders[-1]))
    assert out["step"] == 4
    losses.append(out["loss"])
  assert (
    orders[0] != orders[1] and by_step(orders[0]) == by_step(orders[1]) == by_step(straight[2])[2:]
  )
  np.testing.assert_allclose(*losses, rtol=1e-4)


def test_other_data_is_refused(tiny_run, straight, tmp_path):
  first = open_store(straight[0].data.train)
  items = [(s, first.visual(i) if s.frames else None) for i, s in enumerate(first.samples)]
  write_store(tmp_path / "same", items, image_size=48, clip_frames=4)
  assert (
    train(make(tiny_run, straight[0].workdir, **{"data.train": str(tmp_path / "same")}))["step"]
    == 4
  )
  talk, visual = (items[5][0].conversations[0], {"from": "gpt", "value": "C"}), items[5][1]
  for number, change in enumerate(({"id": "other"}, {"conversations": talk}, {})):
    items[5] = dataclasses.replace(first.samples[5], **change), visual if change else 255 - visual
    write_store(tmp_path / f"{number}", items, image_size=48, clip_frames=4)
    with pytest.raises(ConfigError) as caught:
      train(make(tiny_run, straight[0].workdir, **{"data.train": str(tmp_path / f"{number}")}))
    ((key, values),) = caught.value.fields["changed"].items()
    assert key == "identity of the data in config.data.train"
    assert len(set(values)) == 2 and all(re.fullmatch("[0-9a-f]{16}", value) for value in values)


def of_format(number, config, folder):
  """A copy of a run whose checkpoints say another format."""
  shutil.copytree(config.workdir, folder)
  for file in (folder / "checkpoints").glob("*/config/*"):
    text = file.read_text()
    file.write_text(text.replace('"format": 3', f'"format": {number}'))


def test_a_checkpoint_of_a_later_format_is_refused(tiny_run, straight, tmp_path):
  of_format(4, straight[0], tmp_path / "w")
  for read in (
    lambda: train(make(tiny_run, tmp_path / "w")),
    lambda: checkpoint.read_description(str(tmp_path / "w")),
  ):
    with pytest.raises(ConfigError) as caught:
      read()
    assert caught.value.fields == {"where": f"{tmp_path}/w/checkpoints/4", "format": 4}
    assert "this version of xcomp_jax reads up to 3" in str(caught.value)


def test_a_checkpoint_of_an_earlier_format_is_refused(tiny_run, straight, tmp_path):
  of_format(2, straight[0], tmp_path / "w")
  with pytest.raises(ConfigError) as caught:
    train(make(tiny_run, tmp_path / "w"))
  assert caught.value.fields == {"where": f"{tmp_path}/w/checkpoints/4", "format": 2}
  assert checkpoint.EARLIER[2] in str(caught.value)
  assert checkpoint.read_description(str(tmp_path / "w"))[1] == 4  # an export goes on reading it


@pytest.mark.pure
@pytest.mark.parametrize(
  "changes, changed",
  [
    ({"data": "b"}, {"identity of the data in config.data.train": ("a", "b")}),
    ({"run": {"seed": 2, "workdir": "w"}}, {"config.seed": (1, 2)}),
    ({"run": {"seed": 1, "workdir": "other"}}, {}),
  ],
)
def test_processes_that_would_run_something_else_are_refused(changes, changed):
  first = {"data": "a", "run": {"seed": 1, "workdir": "w"}}

  def gather(mine):
    return [mine, mine, mine | changes]

  with pytest.raises(ConfigError) if changed else contextlib.nullcontext() as caught:
    checkpoint.agree(first, gather)
  if changed:
    assert caught.value.fields == {"changed": changed, "process": 2}
    (key, (one, other)) = next(iter(changed.items()))
    assert f"{key} in process 0 is {one!r}, in process 2 {other!r}" in str(caught.value)


def test_arrays_restore_onto_another_mesh(tiny_run, straight, capsys):
  states = []

  class Restoring(loop.Loop):
    def restore(self):
      super().restore()
      states.append(self.state)

  config = make(tiny_run, straight[0].workdir, mesh={"data": 1, "fsdp": 1, "tensor": 2})
  assert train(config, Restoring)["step"] == 4
  (state,) = states
  params = checkpoint.nest_leaves(state.trained, state.frozen)
  assert as_bytes(params, checkpoint.nest_leaves(state.opt)) == straight[3][0]
  kernel = params["llm"]["layers"]["0"]["gate"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 2
  row = next(
    line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith("llm/layers/0..1/gate/kernel")
  )
  assert row.split()[5:7] == ["-,", "tensor"]


def test_checkpoints_of_a_missing_step_are_named(straight, tmp_path):
  assert checkpoint.read_description(straight[0].workdir)[1] == 4
  with pytest.raises(checkpoint.NoCheckpointError) as caught:
    checkpoint.read_description(straight[0].workdir, 3)
  assert caught.value.fields == {
    "where": f"{straight[0].workdir}/checkpoints",
    "step": 3,
    "steps": [2, 4],
  }
  with pytest.raises(checkpoint.NoCheckpointError) as caught:
    checkpoint.read_description(str(tmp_path))
  assert caught.value.fields == {"where": str(tmp_path)}
