"""checkpoint.py and the loop: a run that was interrupted is the same run, and another run is
refused.
"""

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
from xcomp_jax.training import checkpoint, loop, metrics, workdir


@pytest.fixture(autouse=True)
def few_devices(monkeypatch):
  """No more devices than the config names: one compiles in a fraction of the time."""

  def several(config):
    return jax.devices()[: config.data * config.fsdp * config.tensor]

  prepare = loop.prepare_run

  def prepared(config):
    monkeypatch.setattr(loop, "devices", lambda: several(config.mesh))
    return prepare(config)

  monkeypatch.setattr(loop, "prepare_run", prepared)


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory):
  """Four steps in one go: config, result, samples in the order of reading, items of the last
  checkpoint.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "devices", lambda: jax.devices()[:1])
    order = record(patch)
    config = make(tiny_run, tmp_path_factory.mktemp("straight") / "w")
    return config, loop.train(config), order, items(config)


def make(tiny_run, workdir, **changes):
  return tiny_run(
    workdir, **({"mesh": {"data": 1, "fsdp": 1, "tensor": 1}, "train.log_every": 1} | changes)
  )


def record(patch):
  """Notes the samples of every micro-batch that training takes."""
  order, original = [], loop.place_rows
  patch.setattr(
    loop,
    "place_rows",
    lambda batch, mesh: (order.append(batch.index.ravel().tolist()), original(batch, mesh))[1],
  )
  return order


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


def interrupt(patch, step, number):
  """Sends this process a signal when the line of that step is written."""
  original = metrics.line

  def line(done, *rest):
    if done == step:
      os.kill(os.getpid(), number)
    return original(done, *rest)

  patch.setattr(metrics, "line", line)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_steps_then_resumed_to_four_equal_four_straight_bit_by_bit(
  tiny_run, straight, tmp_path, monkeypatch, capsys, number
):
  config = make(tiny_run, tmp_path / "w", **{"train.save_every": 100})
  order, handler = record(monkeypatch), signal.getsignal(number)
  with monkeypatch.context() as patch:
    interrupt(patch, 2, number)
    assert loop.train(config)["step"] == 2
  said = capsys.readouterr().out  # launch/slurm.sh and pod.sh look for the last words
  assert "stopped by a signal: step 2 of 4" in said and "; the same command continues\n" in said
  assert signal.getsignal(number) is handler
  assert loop.train(config)["step"] == 4
  assert order == straight[2]
  assert items(config) == straight[3]


def test_a_killed_run_goes_on_from_its_last_checkpoint(tiny_run, straight, tmp_path, monkeypatch):
  config = make(tiny_run, tmp_path / "w")  # saves after step 2
  with monkeypatch.context() as patch:
    patch.setattr(
      metrics, "line", lambda done, *_: exec("raise KeyboardInterrupt") if done == 3 else ""
    )
    with pytest.raises(KeyboardInterrupt):
      loop.train(config)
  order = record(monkeypatch)
  assert loop.train(config)["step"] == 4
  assert order == straight[2][-len(order) :] and 0 < len(order) < len(straight[2])
  assert items(config) == straight[3]


def test_a_finished_run_has_nothing_left_to_do(straight, capsys):
  assert loop.train(straight[0]) == {"step": 4, "steps": 4}
  said = capsys.readouterr().out
  assert "\nall 4 steps are done\n" in said and "steps 5 to 4" not in said
  assert "no step was left to do" in said and "loss" not in said.splitlines()[-1]


@pytest.mark.slow
def test_a_run_stopped_within_an_evaluation_saves_and_its_continuation_has_all_of_it_once(
  tiny_run, tmp_path, monkeypatch, capsys
):
  heldout = tiny_run(tmp_path).data.train.removesuffix("train") + "heldout"
  config = make(
    tiny_run, tmp_path / "w", **{"data.heldout": heldout, "train.steps": 2, "train.eval_every": 1}
  )
  evaluated, original = [], loop.report_compilations

  def report(compilations, name, *rest):
    if name == "eval_step":
      evaluated.append(name)
      if len(evaluated) == stop:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(compilations, name, *rest)

  monkeypatch.setattr(loop, "report_compilations", report)

  def logged(said):
    return [int(step) for step in re.findall(r"held-out after step (\d+):", said)]

  stop = 1  # at the first of two batches of the first evaluation
  assert "heldout_loss" not in loop.train(config) and len(evaluated) == 1
  said = capsys.readouterr().out
  assert "stopped by a signal: step 1 of 2" in said and not logged(said)

  stop = 1 + 2 + 1  # after all of that, and a batch of the one after the last step
  assert loop.train(config)["step"] == 2 and len(evaluated) == stop
  said = capsys.readouterr().out
  assert (
    "stopped by a signal: step 2 of 2" in said
    and "the same command continues" in said
    and logged(said) == [1]
  )

  stop = None
  assert loop.train(config)["heldout_loss"] > 0
  said = capsys.readouterr().out
  assert "\nall 2 steps are done\n" in said and "done: step 2 of 2" in said and logged(said) == [2]


def test_a_run_goes_on_from_before_a_damaged_checkpoint_and_ends_the_same(
  tiny_run, straight, tmp_path, capsys
):
  shutil.copytree(straight[0].workdir, tmp_path / "w")
  shutil.rmtree(tmp_path / "w" / "checkpoints" / "4" / "opt")
  config = make(tiny_run, tmp_path / "w")
  assert loop.train(config)["step"] == 4
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
    pytest.raises(
      ConfigError, match=r"another run is at work in .*; set config\.workdir to another"
    ),
  ):
    loop.train(config)
  loop.train(config)


def test_a_run_goes_on_without_the_weights_that_it_started_from(tiny_run, straight, tmp_path):
  shutil.copytree(straight[0].init_from, tmp_path / "base")
  (tmp_path / "base" / "model.safetensors").unlink()
  assert (
    loop.train(make(tiny_run, straight[0].workdir, init_from=str(tmp_path / "base")))["step"] == 4
  )


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
  tiny_run, straight, tmp_path, monkeypatch
):
  shutil.copytree(straight[0].workdir, tmp_path / "w")
  steps, away = tmp_path / "w" / "checkpoints", tmp_path / "away"
  shutil.rmtree(steps / "4")
  config = make(tiny_run, tmp_path / "w", **{"train.save_every": 1})

  def lose(done, *_):
    if done == 3:
      steps.rename(away)
      steps.write_text("")
    return ""

  with monkeypatch.context() as patch:
    patch.setattr(metrics, "line", lose)
    with pytest.raises(
      checkpoint.SaveError,
      match=rf"could not be saved in {steps}: .*bring the folder back; then the same command",
    ):
      loop.train(config)
  steps.unlink()
  away.rename(steps)
  assert loop.train(config)["step"] == 4
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
  assert loop.train(make(tiny_run, tmp_path / "moved", **changes))["step"] == 4


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"optim.learning_rate": 0.5}, r"config\.optim\.learning_rate was 0\.01, is 0\.5"),
    ({"lp_comp.schedule": [4, 1]}, r"config\.lp_comp\.schedule was \[8, 1\], is \[4, 1\]"),
    ({"train.projector": False}, r"config\.train\.projector was True, is False"),
    ({"train.batch_size": 2}, r"config\.train\.batch_size was 3, is 2"),
    ({"seed": 1}, r"config\.seed was 0, is 1"),
    (
      {"train.epochs": 9},
      r"config\.train\.epochs was \d, is 9.*with config\.init_from from what this run learned \(an "
      r"export of it\)",
    ),
  ],
)
def test_another_run_is_refused(tiny_run, straight, changes, words):
  before = items(straight[0])
  with pytest.raises(ConfigError, match=rf"(?=.*{words}).*Set config\.workdir to another folder"):
    loop.train(make(tiny_run, straight[0].workdir, **changes))
  assert items(straight[0]) == before


def test_another_model_is_refused(tiny_run, straight, tmp_path):
  base = pathlib.Path(straight[0].init_from)
  shutil.copytree(base, tmp_path / "base")
  values = json.loads((base / "config.json").read_text())
  (tmp_path / "base" / "config.json").write_text(json.dumps(values | {"intermediate_size": 128}))
  with pytest.raises(ConfigError, match=r"vlm\.llm\.mlp_width was 64, is 128"):
    loop.train(make(tiny_run, straight[0].workdir, init_from=str(tmp_path / "base")))


def by_step(order):
  """The samples of each step of three."""
  samples = [i for rows in order for i in rows if i >= 0]
  return [sorted(samples[n : n + 3]) for n in range(0, len(samples), 3)]


def test_on_other_devices_a_run_goes_on_with_the_same_samples(
  tiny_run, straight, tmp_path, monkeypatch
):
  losses, orders = [], []
  for devices, shape in ((1, (1, 2, 16, 160)), (2, (2, 2, 16, 160))):
    workdir = tmp_path / str(devices)
    shutil.copytree(straight[0].workdir, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    with monkeypatch.context() as patch:
      orders.append(record(patch))
      mesh = {"data": 1, "fsdp": devices, "tensor": 1}
      out = loop.train(make(tiny_run, workdir, mesh=mesh, **{"data.shapes": [shape]}))
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
    loop.train(make(tiny_run, straight[0].workdir, **{"data.train": str(tmp_path / "same")}))[
      "step"
    ]
    == 4
  )
  talk, visual = (items[5][0].conversations[0], {"from": "gpt", "value": "C"}), items[5][1]
  for number, change in enumerate(({"id": "other"}, {"conversations": talk}, {})):
    items[5] = dataclasses.replace(first.samples[5], **change), visual if change else 255 - visual
    write_store(tmp_path / f"{number}", items, image_size=48, clip_frames=4)
    with pytest.raises(
      ConfigError,
      match=(
        r"identity of the data in config\.data\.train was '[0-9a-f]{16}', is '[0-9a-f]{16}'\. "
        r"Set"
      ),
    ):
      loop.train(make(tiny_run, straight[0].workdir, **{"data.train": str(tmp_path / f"{number}")}))


def test_a_checkpoint_of_a_later_format_is_refused(tiny_run, straight, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, "FORMAT", 0)
  with pytest.raises(
    ConfigError, match=r"checkpoints holds step 4 in format 3, this version .* up to 0"
  ):
    loop.train(straight[0])
  with pytest.raises(ConfigError, match="format 3"):
    checkpoint.read_description(straight[0].workdir)


def test_a_checkpoint_of_an_earlier_format_is_refused(tiny_run, straight, tmp_path):
  shutil.copytree(straight[0].workdir, tmp_path / "w")
  for file in (tmp_path / "w" / "checkpoints").glob("*/config/*"):
    if '"format": 3' in (text := file.read_text()):
      file.write_text(text.replace('"format": 3', '"format": 2'))
  words = (
    r"step 4 in format 2, .*config\.data\.shapes took the place of "
    r"config\.data\.frame_buckets and config\.data\.text_buckets.*group_by_text_length"
  )
  with pytest.raises(ConfigError, match=words + ".*version .* that began the run"):
    loop.train(make(tiny_run, tmp_path / "w"))
  assert checkpoint.read_description(str(tmp_path / "w"))[1] == 4  # an export goes on reading it


def test_processes_that_would_run_something_else_are_refused(monkeypatch):
  def others(array):  # what a second process with this config would add
    values = texts if array.ndim else sizes
    return np.stack([np.asarray(value) for value in values])

  for changes, words in (
    (
      {"data": "b"},
      "identity of the data in config.data.train in process 0 is 'a', in process 1 'b'",
    ),
    ({"run": {"seed": 2, "workdir": "w"}}, "config.seed in process 0 is 1, in process 1 2"),
    ({"run": {"seed": 1, "workdir": "other"}}, None),
  ):
    first = {"data": "a", "run": {"seed": 1, "workdir": "w"}}
    encoded = [
      np.frombuffer(json.dumps(value).encode(), np.uint8) for value in (first, first | changes)
    ]
    sizes = [len(text) for text in encoded]
    texts = [np.pad(text, (0, max(sizes) - len(text))) for text in encoded]
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", others)
    if words is None:
      checkpoint.agree(first)
    else:
      with pytest.raises(ConfigError, match=words):
        checkpoint.agree(first)


def test_arrays_restore_onto_another_mesh(tiny_run, straight, capsys, monkeypatch):
  restored, restore = [], checkpoint.restore_checkpoint
  monkeypatch.setattr(
    checkpoint,
    "restore_checkpoint",
    lambda *a: (restored.append(restore(*a)[1:]), (4, *restored[0]))[1],
  )
  config = make(tiny_run, straight[0].workdir, mesh={"data": 1, "fsdp": 1, "tensor": 2})
  assert loop.train(config)["step"] == 4
  ((parts, opt),) = restored
  params = checkpoint.nest_leaves({name: part[name] for part in parts for name in part})
  assert as_bytes(params, checkpoint.nest_leaves(opt)) == straight[3][0]
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
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 .*there are \[2, 4\]"):
    checkpoint.read_description(straight[0].workdir, 3)
  with pytest.raises(FileNotFoundError, match="no checkpoints in"):
    checkpoint.read_description(str(tmp_path))
