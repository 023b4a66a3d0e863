"""What a run is said to compute and take, before anything is compiled."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from lengths import mixture
from released import TWO_B

from xcomp_jax.checkpoints import loading
from xcomp_jax.config import (
  ConfigError,
  MeshConfig,
)
from xcomp_jax.config_io import from_command_line
from xcomp_jax.data import packing
from xcomp_jax.data.batch import Length, Shape, length_table
from xcomp_jax.plan import table
from xcomp_jax.training import costs, forecast, metrics


@pytest.fixture(scope="module")
def config():
  return from_command_line(["forecast", "--config=configs/sct.py"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """Chooses shapes by fewer steps, and looks at fewer."""
  monkeypatch.setattr(packing, "SAMPLED", 256)
  monkeypatch.setattr(packing, "MOVES", packing.MOVES[1::2])


@pytest.mark.parametrize("devices", [1, 8, 32])
def test_a_mixture_is_computed_with_little_padding(config, devices):
  lengths = mixture(1800)
  plan = forecast.schedule_run(config, TWO_B, lengths, forecast.chips("v5e", devices))
  assert np.prod(plan.mesh) == devices and len(plan.shapes) <= 4
  steps = packing.pack_steps(
    lengths, np.arange(1792).reshape(-1, 32).tolist(), plan.shapes, plan.costs
  )
  frames, features = (forecast.account(plan, steps, lengths, pixels) for pixels in (True, False))
  assert frames.tower >= (0.97 if devices <= 16 else 0.95) and frames.all >= 0.9
  assert (
    features.llm == frames.llm >= (0.75 if devices <= 8 else 0.58) and features.all == features.llm
  )
  assert features.step <= (1.3 if devices <= 8 else 1.8) * features.alone
  assert features.alone <= features.linked <= features.step < frames.step
  assert frames.programs <= 4 and frames.steps == 56 and frames.batch_size == 32
  assert (
    "56 steps of 32 samples" in frames.paragraph() and "bound by operations" in frames.paragraph()
  )


@pytest.mark.pure
def test_real_operations_are_those_that_metrics_counts(config):
  lengths = mixture(64)
  plan = forecast.Schedule(
    (1, 1, 1, 1),
    (Shape(rows=1, samples=16, prefix=16, frames=4096, text=8192),),
    costs.mesh_costs(
      TWO_B, config.train, (1, 1, 1, 1), costs.rates(forecast.chips("h100", 1)), lengths
    ),
  )
  steps = packing.pack_steps(lengths, [range(32), range(32, 64)], plan.shapes, plan.costs)
  a = forecast.account(plan, steps, lengths, True)
  again = metrics.forward_flops(TWO_B, lengths, True)["llm"].sum()  # recomputed
  assert a.alone * 2 * 989e12 == pytest.approx(
    metrics.training_flops(TWO_B, config.train, lengths, True) + again
  )


@pytest.mark.pure
def test_a_full_row_has_no_padding_but_what_attention_can_not_leave_out():
  sample, row = (
    [Length(1024, 8, 16, 512)],
    Shape(rows=1, samples=1, prefix=16, frames=1024, text=512),
  )
  real, executed = metrics.forward_flops(TWO_B, sample, False), costs.row_flops(TWO_B, row)
  device = costs.rates(forecast.chips("h100", 1))
  attended = costs.attention_flops(TWO_B, sample, device)
  assert executed["projector"] == real["projector"][0]
  assert 1 < (executed["llm"] + attended[0]) / real["llm"][0] < 1.06


@pytest.mark.pure
def test_links_and_memory_are_near_those_of_compiled_programs(config):
  # As compiled (docs/LOG.md): one sample of 1,024 frames and 512 text tokens on each device, on
  # features.
  for chip, devices, hbm, gathered in (
    ("v5e", 4, 287.7e9, 3.95e9),
    ("v5p", 4, 287.7e9, 3.95e9),
    ("v5e", 16, 282.5e9, 4.97e9),
  ):
    device = costs.rates(forecast.chips(chip, devices))
    one = costs.mesh_costs(TWO_B, config.train, (1, devices, 1, 1), device, mixture(1))
    spent = one.spent(Shape(rows=devices, samples=1, prefix=16, frames=1024, text=512))
    assert spent["memory"] * device.bandwidth == pytest.approx(hbm, rel=0.25)
    # and as much again for gradients
    assert spent["links"] * device.links == pytest.approx(2 * gathered, rel=0.1)


@pytest.mark.pure
def test_the_torus_of_a_count_of_chips():
  def links(chip, n):
    return costs.rates(forecast.chips(chip, n)).links

  assert [links("v5e", n) / 50e9 for n in (1, 2, 8, 16, 256)] == [0, 1, 2, 2, 4]
  assert [links("v5p", n) / 100e9 for n in (4, 8, 64)] == [2, 3, 6]
  assert links("h100", 8) == 450e9 and links("h100", 64) == 400e9 and links("a100", 16) == 200e9


def test_what_can_not_fit_is_refused_with_numbers(config):
  def plan(devices, **data):
    return forecast.schedule_run(
      dataclasses.replace(config, data=dataclasses.replace(config.data, **data)),
      TWO_B,
      mixture(64),
      forecast.chips("v5e", devices),
    )

  with pytest.raises(ConfigError) as caught:
    forecast.check_memory(plan(1))
  assert caught.value.fields["where"] == "devices"
  assert caught.value.fields["memory"] == pytest.approx(16.9e9, rel=5e-3)
  assert caught.value.fields["state"] == pytest.approx(24.8e9, rel=5e-3)
  assert str(caught.value).endswith("; use more devices")
  forecast.check_memory(plan(4))
  huge = plan(4, shapes=((4, 64, 100_000, 100_000),))
  inputs = (
    4
    // huge.costs.groups
    * sum(entering for entering, _ in costs.row_slots(TWO_B, huge.shapes[0]))
    * TWO_B.llm.width
    * 2
  )
  with pytest.raises(ConfigError) as caught:
    forecast.check_memory(huge)
  assert caught.value.fields["rows"] == pytest.approx(inputs / huge.mesh[3])
  assert (
    "4 x (64 samples, 100,000 frames, 100,000 tokens); use more devices, or less in a row"
    in str(caught.value)
  )


@pytest.mark.pure
def test_context_splits_what_sums_gather(config):
  lengths, device = mixture(8), costs.rates(forecast.chips("v5e", 8))
  one, two = (
    costs.mesh_costs(TWO_B, config.train, (1, 8 // n, 1, n), device, lengths) for n in (1, 2)
  )
  shape = Shape(rows=8, samples=4, prefix=16, frames=1024, text=1024)
  assert two.price(dataclasses.replace(shape, rows=4))[0] == pytest.approx(one.price(shape)[0] / 2)
  assert (two.attention * 2 == pytest.approx(one.attention, abs=2)) and two.spent(shape)[
    "links"
  ] > one.spent(shape)["links"]


def test_a_mesh_or_shapes_of_the_config_are_taken(config):
  lengths, devices = mixture(64), forecast.chips("v5e", 8)
  shapes = ((4, 8, 1024, 3328), (4, 30, 2048, 4000))
  named = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, shapes=shapes),
    mesh=MeshConfig(data=1, fsdp=4, tensor=1, context=-1),
  )
  plan = forecast.schedule_run(named, TWO_B, lengths, devices)
  assert plan.mesh == (1, 4, 1, 2) and plan.shapes == (
    Shape(rows=4, samples=8, prefix=16, frames=1024, text=3328),
    Shape(rows=4, samples=30, prefix=16, frames=2048, text=4000),
  )
  heldout = forecast.schedule_run(named, TWO_B, mixture(20, seed=1), devices, plan)
  assert (
    heldout.shapes == plan.shapes
    and heldout.mesh == plan.mesh
    and len(heldout.costs.attention) == 20
  )
  wrong = dataclasses.replace(named, mesh=MeshConfig(1, 8, 1, 1))
  with pytest.raises(ConfigError, match="4 rows can't be split over data x fsdp = 8"):
    forecast.schedule_run(wrong, TWO_B, lengths, devices)
  lengths[5, 0] = 4096
  with pytest.raises(ConfigError, match="sample 5 has 4,096 frames"):
    forecast.schedule_run(named, TWO_B, lengths, devices)


def test_a_sample_that_is_larger_than_rows_may_be_takes_more_devices(config):
  lengths = np.array([[4096, 8, 14, 100], [8, 8, 14, 9000]] * 16)
  with pytest.raises(
    ConfigError,
    match=(
      r"row on 2 devices by .* has is 4,096 and 9,000: raise .*: sample 0 has 4,096 frames "
      r"and 100 tokens; "
    ),
  ):
    forecast.schedule_run(config, TWO_B, lengths, forecast.chips("v5e", 2))
  plan = forecast.schedule_run(config, TWO_B, lengths, forecast.chips("v5e", 8))
  assert plan.mesh[3] >= 4 and packing.fits(lengths, plan.shapes)


def test_a_tower_that_learns_is_computed_with_its_rows(config):
  train = dataclasses.replace(config.train, vision=True)
  lengths = mixture(32)
  device = costs.rates(forecast.chips("v5e", 1))
  plan = [
    forecast.Schedule(
      (1,) * 4,
      (Shape(rows=1, samples=32, prefix=16, frames=8192, text=16384),),
      costs.mesh_costs(TWO_B, t, (1,) * 4, device, lengths),
    )
    for t in (config.train, train)
  ]
  frozen, learning = (
    forecast.account(p, packing.pack_steps(lengths, [range(32)], p.shapes, p.costs), lengths, True)
    for p in plan
  )
  assert frozen.tower == 1 and learning.tower < 1 and learning.step > 2.9 * frozen.step


def test_the_command_prints_a_table(config, tmp_path):
  file, lengths = tmp_path / "lengths.json", mixture(200)
  file.write_text(json.dumps({"frames": lengths[:, 0].tolist(), "text": lengths[:, 3].tolist()}))
  fixed = dataclasses.replace(config, mesh=MeshConfig(1, -1, 1, 1))
  out = table.run_table(fixed, TWO_B, table.read_lengths(file, TWO_B), "2,64", "v5e")
  rows = [line.split() for line in out.splitlines()]
  assert rows[0][:4] == ["devices", "batch", "mesh", "data"]
  assert [row[:4] for row in rows[1:5]] == [
    [n, size, f"fsdp={n}", kind]
    for n, size in (("2", "32"), ("64", "64"))
    for kind in ("frames", "features")
  ]
  assert "2 x v5e: 2 x (" in out


@pytest.mark.pure
@pytest.mark.parametrize(
  "text, words",
  [
    ("[1, 2", "is no JSON"),
    ("[1, 2]", "expected"),
    ('{"frames": [1], "text": []}', "expected"),
    ('{"frames": [1, 8], "text": [5]}', "2 numbers in frames, but 1 in text"),
    (
      '{"frames": [1, 12, -8], "text": [5, 0, 2.5]}',
      r"or a multiple of the 8 frames .*: frames\[1\] = 12; .*text\[2\] = 2.5",
    ),
  ],
)
def test_a_file_of_lengths_that_is_none_is_refused(tmp_path, text, words):
  (tmp_path / "lengths.json").write_text(text)
  with pytest.raises(ConfigError, match=words):
    table.read_lengths(tmp_path / "lengths.json", TWO_B)


@pytest.mark.pure
def test_wrong_arguments_are_named(config, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.json"):
    table.read_lengths(tmp_path / "none.json", TWO_B)
  for devices, chip, words in (
    ("8,x", "v5e", "--devices 8,x: must be numbers"),
    ("8", "v9", "--chip v9: known are v6e, v5e, .* h100, a100-40"),
  ):
    with pytest.raises(ConfigError, match=words):
      table.run_table(config, TWO_B, np.array([[1, 1, 14, 9]] * 40), devices, chip)
  with pytest.raises(ConfigError, match="batch_size = 32, but an epoch reads only 20 samples"):
    table.run_table(config, TWO_B, np.array([[1, 1, 14, 9]] * 20), "64", "v5e")


def test_a_count_of_devices_that_can_not_hold_the_samples_has_a_note(config):
  lengths = np.array([[1, 1, 14, 9]] * 39 + [[2048, 8, 14, 100]])
  out = table.run_table(config, TWO_B, lengths, "1,2", "h100")
  assert [line.split()[0] for line in out.splitlines()[1:3]] == ["2", "2"] and out.splitlines()[
    1
  ].endswith("yes")
  assert (
    "1 x h100: the data does not fit 1,024 frames with 8,192 tokens" in out
    and "sample 39 has 2,048 frames" in out
  )
  assert "DOES NOT FIT: this run does not fit 1 x TPU v5 lite" in table.run_table(
    config, TWO_B, lengths[:39], "1", "v5e"
  )


@pytest.mark.pure
def test_what_is_trained_is_what_the_model_has(config):
  graph = nnx.to_flat_state(nnx.state(loading.abstract(TWO_B)))
  sizes = dict.fromkeys(("llm", "projector", "vision"), 0)
  for path, leaf in graph:
    sizes[path[0]] += leaf.size
  frozen = dataclasses.replace(config.train, llm=False, projector=False, vision=False)
  device = costs.rates(forecast.chips("v5e", 4))

  def numbers(mesh, **parts):
    train = dataclasses.replace(frozen, **parts)
    return costs.trained_numbers(costs.mesh_costs(TWO_B, train, mesh, device, mixture(1)))

  for part, size in sizes.items():  # biases and norms are left out
    assert numbers((1, 1, 1, 1), **{part: True}) == pytest.approx(size, rel=0.02)
    assert 4 * numbers((1, 2, 2, 1), **{part: True}) == numbers((4, 1, 1, 1), **{part: True})


@pytest.mark.pure
def test_a_tower_moves_its_weights_once_and_the_activations_of_every_clip():
  device, v = costs.rates(forecast.chips("v5e", 1)), TWO_B.vision

  def moved(clips):
    table = length_table([Length(8 * clips, 8, 16, 100)])
    return costs.tower_costs(TWO_B, device, table)[1]["memory"] * device.bandwidth

  clip = 8 * 784 * v.layers * costs.TRAFFIC * 2 * (7 * v.width + 2 * v.mlp_width // 3 * 3)
  assert moved(24) - moved(8) == pytest.approx(16 * clip)
  weights = v.layers * 12 * v.width**2
  assert moved(8) - 8 * clip == pytest.approx(2 * 2 * weights)


@pytest.mark.pure
@pytest.mark.parametrize("tensor", [1, 2])
def test_keys_and_values_are_sent_once_where_context_splits_them(config, tensor):
  device, llm = costs.rates(forecast.chips("v5e", 2 * tensor)), TWO_B.llm
  train, mesh = config.train, (1, 1, tensor, 2)
  seen = costs.mesh_costs(TWO_B, train, mesh, device, mixture(1))
  shapes = [Shape(rows=1, samples=1, prefix=16, frames=n, text=512) for n in (1024, 2048)]
  few, many = (sum(entering for entering, _ in costs.row_slots(TWO_B, s)) for s in shapes)
  sent = [seen.spent(shape)["links"] * device.links for shape in shapes]
  # in two bytes, there and back, and once more to compute again; half of them are a device's own
  keys = 2 * llm.kv_heads * llm.head_dim / tensor * 8 / 2
  passes = costs.executed_passes(TWO_B, train)["llm"]
  sums = 2 * passes / 2 * 2 * llm.width * 2 * (tensor - 1) / tensor
  assert (sent[1] - sent[0]) / (many - few) == pytest.approx(keys + sums)


@pytest.mark.pure
def test_operations_of_a_clip_are_those_of_its_matrices():
  v, n = TWO_B.vision, 8 * 784
  products = [(v.width, 3 * v.width), (v.width, v.width), *[(v.width, v.mlp_width)] * 2]
  layer = 2 * n * sum(a * b for a, b in products) + 2 * 2 * n * n * v.width
  (found,) = metrics.forward_flops(TWO_B, [Length(8, 8, 0, 0)], pixels=True)["vision"]
  assert found == pytest.approx(v.layers * layer + 2 * n * 16 * 16 * 3 * v.width)
