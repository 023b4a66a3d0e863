"""train.py: runs train, what is frozen stays, and what can't work is said (test_steps.py has the
steps).
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.config import ConfigError, RunConfig, VLMConfig
from xcomp_jax.config_io import from_dict
from xcomp_jax.data.batch import Shape
from xcomp_jax.data.blend import run_order
from xcomp_jax.data.store import open_store
from xcomp_jax.training import checkpoint, loop, metrics, prepare


def one_device():
  """The first device: programs for it compile in a fraction of the time."""
  return jax.devices()[:1]


def test_a_run_trains_evaluates_and_leaves_the_tower_bit_unchanged(tiny_run, tmp_path, capsys):
  jax.clear_caches()  # compilations are counted below, whatever ran before
  config = tiny_run(tmp_path / "w", **{"train.epochs": 3})
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(
      config.data, heldout=config.data.train.removesuffix("train") + "heldout"
    ),
  )
  told = []
  result = loop.train(config, watch=lambda *what: told.append(what), devices=one_device)
  text = capsys.readouterr().out
  assert [step for step, group, _ in told if group == "train"] == list(range(1, 13))
  assert [values["loss"] for _, group, values in told if group == "heldout"][-1] == result[
    "heldout_loss"
  ]
  assert (
    result["step"] == 12 and result["heldout_loss"] > 0 and 0 <= result["heldout_accuracy"] <= 1
  )
  lines = [line for line in text.splitlines() if line.startswith("step ")]
  first, last = (float(line.split("loss ")[1].split()[0]) for line in (lines[0], lines[-1]))
  assert len(lines) == 12 and last < first - 0.5
  for word in (
    "MFU -",
    "data wait",
    "samples/s",
    "held-out after step 12",
    "vision/blocks/0..1/fc1/kernel",
    "done: step 12 of 12",
    "train: sampling not recorded",
    "  compile ",
  ):
    assert word in text
  assert "warning" not in text
  assert sum(line.startswith("compiled grad_step") for line in text.splitlines()) == 1
  shares = {
    name: float(share)
    for name, share in re.findall(r"(\w+) +([\d.]+)%", text.splitlines()[-2].split("s:")[1])
  }
  assert (
    sum(shares.values()) == pytest.approx(100, abs=0.5)
    and min(shares["compile"], shares["step"]) > 0
  )

  saved, step = checkpoint.read_description(config.workdir)
  assert from_dict(RunConfig, saved["run"]) == config and step == 12
  cfg = from_dict(VLMConfig, saved["vlm"])
  before = nnx.state(loading.load_model(resolve(config.init_from), cfg))
  after = checkpoint.read_params(
    config.workdir, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), before)
  )
  before, after = loading.parameters(before), loading.parameters(after)
  for path in before:
    same = np.asarray(before[path]).tobytes() == np.asarray(after[path]).tobytes()
    assert same == path.startswith("vision"), path
  assert list((tmp_path / "w" / "tensorboard").iterdir())


def losses(config):
  """Those of every step of a run."""
  out = []
  loop.train(
    config,
    watch=lambda step, group, values: out.append(values["loss"]) if group == "train" else None,
    devices=one_device,
  )
  return np.array(out)


def test_training_on_features_is_training_on_frames(tiny_run, features, tmp_path):
  want = losses(tiny_run(tmp_path / "frames"))
  got = losses(tiny_run(tmp_path / "features", **{"data.train": features}))
  assert len(want) == 4 and np.ptp(want) > 1
  # bfloat16 has 8 bits, and every step grows the difference
  np.testing.assert_allclose(got, want, rtol=1e-2)


def test_features_of_another_tower_are_refused_before_a_step(tiny_run, features, tmp_path):
  config = tiny_run(tmp_path / "w", **{"data.train": features})
  shutil.copytree(config.init_from, tmp_path / "base")
  tensors = load_file(tmp_path / "base" / "model.safetensors")
  name = next(name for name in tensors if "vision" in name and tensors[name].ndim > 1)
  save_file(tensors | {name: tensors[name] * 1.5}, tmp_path / "base" / "model.safetensors")
  with pytest.raises(ConfigError) as caught:
    loop.train(dataclasses.replace(config, init_from=str(tmp_path / "base")), devices=one_device)
  assert caught.value.fields["where"] == features
  assert caught.value.fields["found"] == open_store(features).features.identity
  assert caught.value.fields["expected"] != caught.value.fields["found"]
  assert (
    not list((tmp_path / "w" / "checkpoints").iterdir())
    and not (tmp_path / "w" / "config.json").exists()
  )


def test_features_that_cannot_be_used_are_refused_before_anything_is_written(
  tiny_run, features, tmp_path
):
  def run(**changes):
    return loop.train(tiny_run(tmp_path / "w", **{"data.train": features} | changes))

  with pytest.raises(ConfigError) as caught:
    run(**{"train.vision": True})
  assert caught.value.fields == {"where": "config.train.vision", "data": features}
  with pytest.raises(ConfigError, match=r"holds frames .* holds features"):
    run(**{"data.train": [tiny_run(tmp_path).data.train, features]})
  file = tmp_path / "narrow" / "store.json"
  shutil.copytree(features, file.parent)
  file.write_text(file.read_text().replace('"width": 32', '"width": 16'))
  with pytest.raises(ConfigError) as caught:
    run(**{"data.train": str(file.parent)})
  assert caught.value.fields == {
    "where": str(file.parent),
    "key": "width",
    "found": 16,
    "expected": 32,
  }
  assert not (tmp_path / "w").exists()


def test_a_run_on_a_blend_goes_on_with_its_weights_only(tiny_run, tmp_path, capsys):
  data = tiny_run(tmp_path).data.train
  both = {"data.train": [data, data.removesuffix("train") + "heldout"], "data.weights": [0.5, 1.0]}
  config = tiny_run(tmp_path / "w", **both, **{"train.steps": 1})
  assert loop.train(config, devices=one_device)["step"] == 1
  said = capsys.readouterr().out
  assert "train: sampling not recorded; an epoch reads 6 of 12 samples" in said
  assert "heldout: sampling not recorded; an epoch reads 5 of 5 samples" in said
  for changes, key in (
    ({"data.weights": [1.0, 1.0]}, "config.data.weights"),
    ({"data.train": both["data.train"][::-1]}, "identity of the data in config.data.train"),
  ):
    with pytest.raises(ConfigError) as caught:
      loop.train(
        tiny_run(tmp_path / "w", **both | changes, **{"train.steps": 1}), devices=one_device
      )
    was, now = caught.value.fields["changed"].pop(key)
    if "data.weights" in changes:
      assert (was, now) == ([0.5, 1.0], [1.0, 1.0])
    else:
      assert re.fullmatch(r"\w{16}, \w{16}", was) and was == ", ".join(now.split(", ")[::-1])
    assert not caught.value.fields["changed"].keys() - {"samples in config.data.train"}


def test_a_loss_that_is_no_number_stops_before_anything_is_overwritten(tiny_run, tmp_path):
  config = tiny_run(tmp_path / "w", **{"train.save_every": 1})
  cfg = read_vlm_config(resolve(config.init_from), config.model, config.lp_comp)
  third = run_order(prepare.open_data(config.data.train, cfg), 3, 0, 1)[2]
  bad = third[1]

  class Poisoned(loop.Loop):
    def add(self, micro):
      batch = micro.batch
      weight = np.where(batch.index == bad, np.nan, batch.weight).astype(np.float32)
      return super().add(micro._replace(batch=dataclasses.replace(batch, weight=weight)))

  with pytest.raises(loop.NotFiniteError) as caught:
    loop.train(config, devices=one_device, kind=Poisoned)
  file = tmp_path / "w" / "nan" / "step_3.json"
  assert caught.value.fields == {"where": str(file), "step": 3}
  report = json.loads(file.read_text())
  assert report["step"] == 3 and report["loss"] == "nan"
  assert sorted(s["index"] for s in report["samples"]) == sorted(third)
  assert {s["id"] for s in report["samples"]} == {f"s{i}" for i in third}
  assert sorted(
    int(p.name) for p in (tmp_path / "w" / "checkpoints").iterdir() if p.name.isdigit()
  ) == [1, 2]


@pytest.mark.pure
def test_a_compilation_that_no_new_shape_explains_is_said():
  said = []
  compilations = metrics.Compilations("grad_step", "apply_step", "eval_step")
  specs = [
    loop.describe_shape(Shape(rows=rows, samples=2, prefix=8, frames=16, text=32))
    for rows in (1, 2)
  ]

  def call(name, what, compiles):
    for _ in range(compiles):
      jax.monitoring.record_event_duration_secs(
        metrics.BACKEND_COMPILE, 1.0, fun_name=f"jit({name})"
      )
    said.extend(compilations.lines(name, what))

  with compilations:
    for spec in specs:
      call("grad_step", spec, 1)
      call("eval_step", spec, 1)
    call("apply_step", "", 1)
    call("grad_step", specs[0], 0)
    assert said[0] == f"compiled grad_step for {specs[0]} in 1.0 s"
    assert len(said) == 5 and not any("warning" in line for line in said)
    call("grad_step", specs[1], 1)  # other functions' shapes are no excuse
    assert said[-1].startswith("warning: grad_step was compiled 3 times for 2 shapes")
    call("apply_step", "", 1)
    assert said[-1].startswith("warning: apply_step was compiled 2 times for 1 shapes")
  call("apply_step", "", 1)  # not heard
  assert len(said) == 9


@pytest.mark.pure
def test_where_the_time_went_adds_up():
  clock = [0.0]

  def compiles(seconds, kind="backend_compile"):
    jax.monitoring.record_event_duration_secs(
      f"/jax/core/compile/{kind}_duration", seconds, fun_name="f"
    )

  with metrics.Goodput(clock=lambda: clock[0]) as goodput:
    clock[0] = 10  # start
    compiles(2)  # of these
    with goodput.part("evaluate"):
      clock[0] = 20
      compiles(3, "jaxpr_trace")
      clock[0] = 25
      compiles(4, "jaxpr_to_mlir_module")
      compiles(9, "jaxpr_trace")  # of a function that calls these two
      clock[0] = 30
    goodput.enter("step")
    clock[0] = 60
    compiles(10)
    compiles(10, "pgle_profile")  # JAX has other events too
    other = threading.Thread(target=compiles, args=(20,))  # nobody waits for it
    other.start()
    other.join()
    clock[0] = 80
    with goodput.part("save"):
      clock[0] = 95
      compiles(5)
      clock[0] = 100
    assert goodput.shares() == {
      "connect": 0,
      "start": 0.08,
      "restore": 0,
      "compile": 0.26,
      "data": 0,
      "step": 0.4,
      "evaluate": 0.11,
      "save": 0.15,
    }
    assert goodput.line() == (
      "of 100 s: connect 0.0%  start 8.0%  restore 0.0%  compile 26.0%  data 0.0%  step 40.0%  "
      "evaluate 11.0%  save 15.0%"
    )
  compiles(50)
  assert goodput.shares()["compile"] == 0.26  # nothing is heard after the end


def test_what_jax_traces_lowers_and_compiles_is_no_step():
  inner = jax.jit(lambda x: (time.sleep(0.2), x @ x)[1])  # sleeps when it is traced
  outer = jax.jit(lambda x: inner(x) + jax.grad(lambda y: inner(y).sum())(x))
  x = np.ones((4, 4), np.float32)
  with metrics.Goodput() as goodput:
    begun = time.perf_counter()
    goodput.enter("step")
    outer(x)
    once = goodput.shares()
    time.sleep(0.2)
    outer(x)
    shares = goodput.shares()
    total = time.perf_counter() - begun
  assert 0.2 < once["compile"] * total and once["step"] < 0.5 < once["compile"]
  assert sum(once.values()) == pytest.approx(1) == sum(shares.values())
  assert 0.2 / total < shares["step"] <= 1 - shares["compile"]


def test_waiting_for_other_hosts_is_neither_start_nor_step(tiny_run, tmp_path):
  clock, shares = [0.0], []

  def passes(seconds):
    clock[0] += seconds

  @contextlib.contextmanager
  def joined(config):
    passes(15)
    yield

  def devices():
    passes(5)
    return one_device()

  class Ended(Exception):
    pass

  def kind(config, prepared, goodput, watch, stack):
    shares.append(goodput.shares())
    raise Ended

  goodput = metrics.Goodput(clock=lambda: clock[0])
  with pytest.raises(Ended):
    loop.train(tiny_run(tmp_path / "w"), devices=devices, kind=kind, join=joined, goodput=goodput)
  assert shares[0] == dict.fromkeys(metrics.Goodput.PARTS, 0) | {"connect": 0.75, "start": 0.25}


def test_the_compilation_cache_is_where_the_config_says(tiny_run, tmp_path):
  before = jax.config.jax_compilation_cache_dir
  for folder in (str(tmp_path / "c"), None):  # None leaves it as it is
    try:
      with pytest.raises(ValueError, match="/nowhere"):  # at the start, before anything compiles
        loop.train(tiny_run(tmp_path / "w", init_from="/nowhere", compilation_cache=folder))
      assert jax.config.jax_compilation_cache_dir == (folder or before)
    finally:
      jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      {"mesh": {"data": 3, "fsdp": 1, "tensor": 1}},
      "data=3 x fsdp=1 x tensor=1 x context=1 = 3 devices, but there are 8",
    ),
    ({"train.batch_size": 13}, "batch_size = 13"),
    ({"train.batch_size": 0}, "config.train.batch_size = 0"),
    ({"train.projector": False, "train.llm": False}, "trains nothing"),
    ({"data.train": "/nowhere"}, "/nowhere"),
    (
      {"data.heldout": "/nowhere"},
      r"config\.data\.heldout \(None: no evaluation\): no data at /nowhere",
    ),
    ({"init_from": "/nowhere"}, "/nowhere"),
    ({"model.clip_frames": 8}, "clip_frames 4"),
    ({"lp_comp.schedule": [4, 8]}, "lp_comp.schedule"),
    (
      {"lp_comp.group": 24, "lp_comp.schedule": "cosine"},
      "lp_comp.group = 24: .* 4 frames, whose 64 tokens can't be cut",
    ),
    ({"lp_comp.group": 0}, "config.lp_comp.group = 0: must be an integer from 1 to 1,000,000"),
    (
      {"model.clips_per_chunk": 0},
      "config.model.clips_per_chunk = 0: must be an integer from 1 to 1,000",
    ),
    ({"data.text_per_device": 0}, "config.data.text_per_device = 0: must be an integer from 1"),
    (
      {"data.shapes": [[8, 2, 64]]},
      "config.data.shapes = .* must be one or more of .rows, samples, frames, text.",
    ),
    ({"data.shapes": [[8, 0, 64, 512]]}, "config.data.shapes = "),
    ({"data.shapes": [[8, 2, 8, 160]]}, "config.data.shapes"),  # some samples have 12 frames
    ({"data.prefix_length": 8}, "data.prefix_length"),
    (
      {"data.threads": -1, "data.prefetch": -2},
      "config.data.threads = -1: .*; config.data.prefetch = -2: must be an integer from 0 to 1,000",
    ),
    (
      {"train.epochs": 8_000_000_000, "train.batch_size": 10**9},
      "train.batch_size = 1000000000: .*; config.train.epochs = 8000000000: .* from 1 to 1,000",
    ),
    ({"data.shapes": []}, "config.data.shapes = .* one or more"),
    (
      {"data.shapes": None, "data.frames_per_device": 8, "mesh.context": 1},
      r"the data does not fit 8 frames with .*: sample \d+ has 12 frames",
    ),
    (
      {"optim.learning_rate": math.nan},
      "config.optim.learning_rate = nan: must be a number above 0",
    ),
    ({"optim.learning_rate": 0.0}, "config.optim.learning_rate = 0.0"),
    ({"optim.weight_decay": -0.1}, "config.optim.weight_decay = -0.1"),
    ({"optim.clip_norm": 0.0}, "config.optim.clip_norm = 0.0: .* 1e9 clips nothing"),
    (
      {"optim.b1": 1.0, "optim.b2": -0.1},
      "config.optim.b1 = 1.0: .*; config.optim.b2 = -0.1: ",
    ),
    ({"optim.eps": 0.0}, "config.optim.eps = 0.0"),
  ],
)
def test_what_cannot_work_is_said_before_anything_is_written(tiny_run, tmp_path, changes, words):
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    loop.train(tiny_run(tmp_path / "w", **changes))
  assert not (tmp_path / "w").exists()


class Small:
  """A card with a tenth of a megabyte."""

  device_kind, process_index, id = "NVIDIA L4", 0, 0

  def memory_stats(self):
    return {"bytes_limit": 100_000}


def test_what_devices_can_not_hold_is_said_before_anything_is_written(tiny_run, tmp_path):
  with pytest.raises(ConfigError) as caught:
    loop.train(tiny_run(tmp_path / "w"), devices=lambda: [Small()])
  fields = caught.value.fields
  assert fields["where"] == "devices" and fields["memory"] == 100_000
  assert fields["state"] + fields["rows"] > 100_000
  assert "does not fit 1 x NVIDIA L4: each has 0.0 GB, and takes " in str(caught.value)
  assert not (tmp_path / "w").exists()


def cut(base):
  file = base / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-10])


def lose(base):
  tensors = load_file(base / "model.safetensors")
  del tensors["model.norm.weight"]
  save_file(tensors, base / "model.safetensors")


def shrink(base):
  values = json.loads((base / "config.json").read_text())
  (base / "config.json").write_text(json.dumps(values | {"vocab_size": 100}))


@pytest.mark.parametrize(
  "damage, words",
  [
    (cut, "cut short"),
    (lose, r"1 missing: model\.norm\.weight"),
    (shrink, "embedding table has only 100 rows"),
  ],
)
def test_a_damaged_start_is_said_before_anything_is_written(tiny_run, tmp_path, damage, words):
  shutil.copytree(tiny_run(tmp_path).init_from, tmp_path / "base")
  damage(tmp_path / "base")
  with pytest.raises(CheckpointError, match=words):
    loop.train(tiny_run(tmp_path / "w", init_from=str(tmp_path / "base")))
  assert not (tmp_path / "w").exists()


def test_a_workdir_is_no_folder_of_others(tiny_run, tmp_path):
  config = tiny_run(tmp_path / "w")
  for workdir in (config.init_from, config.data.train):
    with pytest.raises(ValueError, match=r"config\.workdir .* is config"):
      loop.train(dataclasses.replace(config, workdir=workdir))
  shutil.copytree(config.init_from, tmp_path / "other")
  before = (tmp_path / "other" / "config.json").read_bytes()
  with pytest.raises(ConfigError) as caught:
    loop.train(dataclasses.replace(config, workdir=str(tmp_path / "other")))
  assert caught.value.fields == {"where": str(tmp_path / "other" / "config.json")}
  assert (tmp_path / "other" / "config.json").read_bytes() == before


def test_a_workdir_that_cannot_be_written_is_said_before_weights_are_read(tiny_run, tmp_path):
  def reads(*parts):
    pytest.fail("weights were read")

  def refused(workdir, part):
    with pytest.raises(ConfigError) as caught:
      loop.train(tiny_run(workdir), kind=reads)
    assert caught.value.fields == {"where": "config.workdir", "value": str(workdir)}
    assert f"{part}'" in str(caught.value)

  (tmp_path / "file").write_text("")
  refused(tmp_path / "file" / "w", "file/w")
  for name in ("checkpoints", "tensorboard"):
    (tmp_path / "w").mkdir(exist_ok=True)
    (tmp_path / "w" / name).write_text("")
    refused(tmp_path / "w", f"w/{name}")
    (tmp_path / "w" / name).unlink()


def test_the_command_says_errors_in_one_line_and_exits_with_1(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  command = [
    sys.executable,
    "-m",
    "xcomp_jax.train",
    "--config=configs/sct.py:tiny",
    f"--config.workdir={tmp_path}/w",
    "--config.optim.learning_rat=1",
  ]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert done.returncode == 1 and not (tmp_path / "w").exists()
  assert done.stderr.strip().splitlines()[-1] == (
    "error: config.optim.learning_rat is unknown; did you mean config.optim.learning_rate?"
  )


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_command_explains_itself(capsys, flag):
  loop.main([flag])
  assert "python -m xcomp_jax.train --config=configs/sct.py" in capsys.readouterr().out


@pytest.mark.slow
def test_1200_files_of_clips_under_256_open_files(tmp_path):
  from xcomp_jax.data import store, store_writing
  from xcomp_jax.files import fresh_folder

  layout, rng = store.Layout(48, 8, None, None), np.random.default_rng(0)
  talk = ({"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "A"})
  with fresh_folder(tmp_path / "data", "store") as folder:
    parts = []
    for i in range(1200):
      sample = store.StoredSample(
        id=str(i),
        source=f"{i}.png",
        annotation="a.json",
        position=i,
        conversations=talk,
        time_message="",
      )
      parts.append(
        store_writing.write_shard(
          folder / f"{i}", [(sample, rng.integers(0, 256, (1, 1, 48, 48, 3), np.uint8))], layout
        )
      )
    store_writing.finish_store(folder, parts, layout, {})
  line = [
    sys.executable,
    "-m",
    "xcomp_jax.train",
    "--config=configs/sct.py:tiny",
    "--config.data.heldout=None",
  ]
  line += [f"--config.data.train={tmp_path / 'data'}", f"--config.workdir={tmp_path / 'run'}"]
  done = subprocess.run(
    ["bash", "-c", 'ulimit -n 256; exec "$@"', "-", *line],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0 and "done: step 150 of 150" in done.stdout, done.stderr
