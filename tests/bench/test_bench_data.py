"""bench_data.py: its tables are about what they say."""

import re

import pytest

from xcomp_jax.bench import data


def test_run(tmp_path, capsys):
  path = str(tmp_path / "a.mp4")
  data.main(["make", path, "--seconds", "6", "--width", "64", "--height", "48"])
  data.main(["run", path, "--image-size", "32", "--samples", "1", "--repeat", "1"])
  out = capsys.readouterr().out
  assert "decoding 180 frames, 128 of them sampled and resized to 32" in out
  for what in ("looking at the packets", "decoding"):
    assert re.search(rf"\n  {what} +\d+\.\d\d ", out)
  sizes = {
    name: float(kb) for name, kb in re.findall(r"\n  (raw|JPEG 95|features) +([\d,.]+) kB", out)
  }
  assert 0 < sizes["raw"] < 3.3 and 0 < sizes["JPEG 95"] < 3.3 and 25 < sizes["features"] < 33


def test_errors_are_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as end:
    data.main(["run", str(tmp_path / "none.mp4")])
  assert end.value.code == 1 and capsys.readouterr().err.startswith("error: ")
