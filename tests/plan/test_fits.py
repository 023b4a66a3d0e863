"""What fits on which card, and what is known of chips, without a compiler."""

import json

import jax
import pytest
from cards import Device

from xcomp_jax.config import ConfigError
from xcomp_jax.config_io import from_command_line
from xcomp_jax.parallel import chips, roofline
from xcomp_jax.plan import fits, programs

pytestmark = pytest.mark.pure
CARDS = ", ".join(chip.name for chip in chips.CHIPS if chip.gpu)
STATE = {"parameters": 4e9, "gradients": 2e9, "optimizer state": 4e9}
CELL = {
  "job": "SCT on features",
  "cards": 8,
  "programs": {"gradient": STATE | {"temporaries": 6e9}, "apply": STATE | {"temporaries": 1e9}},
}


def test_a_device_is_found_by_its_whole_name():
  def found(kind):
    return (chip := chips.find_chip(kind)) and chip.name

  # another chip, 16 GB
  assert (
    found("NVIDIA GeForce RTX 4090") == "rtx4090"
    and found("NVIDIA GeForce RTX 4090 Laptop GPU") is None
  )
  assert found("NVIDIA H100 NVL") is None
  kinds = (
    "NVIDIA A100-SXM4-40GB",
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA A100 80GB PCIe",
    "NVIDIA A10G",
    "NVIDIA A10",
    "NVIDIA L4",
    "NVIDIA L40",
  )
  assert [found(kind) for kind in kinds] == [
    "a100-40",
    "a100-80",
    "a100-80",
    "a10g",
    "a10",
    "l4",
    None,
  ]
  assert chips.named("A100") is chips.named("a100-80") and chips.named("v5p").ring == 4
  for chip in chips.CHIPS:
    assert chip.gpu is None or chips.find_chip(chip.gpu.model) is chip
    assert chips.find_chip(chip.gpu.model if chip.gpu else chip.kind).flops == chip.flops
    assert chip.flops > chip.flops32
  with pytest.raises(KeyError, match=r"h101: known are v6e, .*t4"):
    chips.named("h101")


@pytest.mark.parametrize(
  "processes, share, links",
  [((0,) * 8, "", 450e9), ((0, 1) * 8, "0.9", 400e9), (range(16), "", 400e9)],
)
def test_what_jax_leaves_and_networks_bound(monkeypatch, processes, share, links):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
  device = roofline.device_of([Absent("NVIDIA H100 80GB HBM3", process) for process in processes])
  assert device.links == links and device.hbm == 84_942_979_072
  assert device.reserve == pytest.approx((0.1 if share else 0.25) * device.hbm)
  assert roofline.device_of([Absent("NVIDIA H100 80GB HBM3", 0)], "float32").flops == 67e12


class Absent(Device):
  """A GPU to compile for only."""

  def __init__(self, kind, process_index):
    super().__init__("gpu", kind)
    object.__setattr__(self, "process_index", process_index)

  def memory_stats(self):
    raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT")


@pytest.mark.parametrize(
  "name, fields",
  [
    ("h100", {"expected": "CARD:1 to CARD:8"}),
    ("h100:9", {"expected": "CARD:1 to CARD:8"}),
    ("h100:0x8", {"expected": "CARD:1 to CARD:8"}),
    ("rtx5090:8", {"allowed": CARDS}),
    ("gb200:8", {}),
  ],
)
def test_a_topology_of_gpus_that_is_none_is_refused(name, fields):
  with pytest.raises(ConfigError) as caught:
    programs.topology(name)
  assert caught.value.fields == {"where": "--topology", "value": name} | fields
  assert name.endswith(":8") == ("GPUs that can be compiled for are" in str(caught.value))


def test_state_is_shared_and_the_rest_is_not():
  assert fits.bytes_per_card(CELL, 8) == 16e9 and fits.bytes_per_card(CELL, 16) == 11e9
  # the optimizer's step: all that it makes is of the state's size
  assert fits.bytes_per_card(CELL, 1) == 88e9
  assert (
    fits.verdict(chips.named("h100"), [CELL]) == "2 cards, 46.0 GB"
    and fits.verdict(chips.named("b200"), [CELL]) == "88.0 GB"
  )
  assert fits.verdict(chips.named("l4"), [CELL]) == "8 cards, 16.0 GB"
  assert fits.verdict(chips.named("t4"), [CELL]) == "16 cards, 11.0 GB"

  def tower(size):
    return CELL | {"job": "SCT on frames", "programs": {"tower": {"temporaries": size}}}

  assert fits.verdict(chips.named("l4"), [CELL, tower(13e9)]) == "8 cards, 16.0 GB"
  assert fits.verdict(chips.named("l4"), [CELL, tower(17e9)]) == "8 cards, 17.0 GB"
  assert fits.verdict(chips.named("t4"), [CELL, tower(17e9)]) == "no: 17.0 GB on each of 32 cards"

  def alone(size):
    return CELL | {"job": "ask 256", "cards": 1, "programs": {"decode": {"temporaries": size}}}

  assert (
    fits.verdict(chips.named("t4"), [alone(16e9)]) == "no: 16.0 GB"
    and fits.verdict(chips.named("a100-40"), [alone(16e9)]) == "16.0 GB"
  )
  assert fits.verdict(chips.named("l4"), [alone(20e9)]) == "20.0 GB*"


class Made(Exception):
  """A cell was made."""


def making(config, cells):
  if cells:
    raise Made
  return iter(())


def test_the_table_is_made_of_cells_that_are_there(tmp_path, capsys):
  config = from_command_line(["plan", "--config=configs/sct.py"])
  for model in fits.MODELS:
    for job in fits.JOBS:
      cell = CELL | {
        "stamp": fits.cell_stamp(config),
        "job": job,
        "dtype": "bfloat16",
        "clips": 4,
        "cards": 8 if job in fits.TUNE else 1,
      }
      (tmp_path / f"{fits.key((8, 9), model, job)}.json").write_text(json.dumps(cell))
  out = fits.fits_table(config, tmp_path, ["l4", "rtx4090"], make=making).splitlines()
  assert [line.split()[:5] for line in out[1:5]] == [
    [card, size, model, "bfloat16", "4"]
    for card, size in (("l4", "24"), ("rtx4090", "25"))
    for model in ("2B", "7B")
  ]
  assert out[1].count("16.0 GB") == len(fits.JOBS) and "8 cards" in out[1]
  assert not capsys.readouterr().err
  other = from_command_line(["plan", "--config=configs/sct.py", "--config.model.clips_per_chunk=1"])
  # cells of another config are not believed
  with pytest.raises(Made):
    fits.fits_table(other, tmp_path, ["l4"], make=making)
  # nor are damaged ones
  for text in (
    "",
    '{"stamp":',
    "[1, 2]",
    json.dumps({"stamp": fits.cell_stamp(config)}),
  ):
    (tmp_path / f"{fits.key((8, 9), '7B', 'ask 256')}.json").write_text(text)
    with pytest.raises(Made):
      fits.fits_table(config, tmp_path, ["l4"], make=making)
    assert "1 cells in" in capsys.readouterr().err.splitlines()[-1]
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError) as caught:
    fits.fits_table(config, tmp_path / "file" / "cells", ["l4"])
  assert caught.value.fields == {"where": "--fits", "value": str(tmp_path / "file" / "cells")}


@pytest.mark.parametrize("name", chips.SHARES)
@pytest.mark.parametrize("share", ["75", "0", "-1", "abc", "nan"])
def test_a_share_of_memory_that_is_none_is_refused(name, share, monkeypatch):
  monkeypatch.setenv(name, share)
  with pytest.raises(ValueError, match=f"{name}={share}: must be a number above 0, at most 1"):
    chips.memory_share()
  monkeypatch.setenv(name, "0.5")
  assert chips.memory_share() == 0.5
