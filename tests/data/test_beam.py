"""Pre-decoding through Apache Beam; `make test-beam` has an environment with it."""

import pathlib

import decoding
import pytest
from decoding import command, contents, make, make_video, manifest, talk, write

pytest.importorskip("apache_beam")
BEAM = "--beam=--runner=DirectRunner --direct_num_workers=2 --direct_running_mode="


@pytest.fixture
def world(tmp_path) -> pathlib.Path:
  root = decoding.make_world(tmp_path / "data")
  make_video(root / "videos" / "v1.mp4", 7)
  videos = [{"id": i, "video": f"v{i % 3}.mp4", "conversations": talk()} for i in range(9)]
  write(root / "videos.json", [*videos, {"video": "v7.mp4", "conversations": talk()}])
  return root


@pytest.mark.parametrize("mode", ["multi_threading", "multi_processing"])
def test_the_same_store_as_by_processes(world, mode):
  make(world, "whole", samples_per_shard=3, skip_bad=True)
  done = command(world, BEAM + mode, "--samples-per-shard=3", "--skip-bad", "--timeout=60")
  assert done.returncode == 0, done.stderr
  assert "5 of 5 shards to decode through Beam" in done.stderr and "10 samples" in done.stdout
  assert contents(world.parent / "out") == contents(world.parent / "whole")
  assert sum("reason" in line for line in manifest(world.parent / "out")) == 4


def test_goes_on_where_processes_stopped(world):
  write(
    world / "videos.json",
    [{"id": i, "video": f"v{i % 3}.mp4", "conversations": talk()} for i in range(9)],
  )
  first = command(world, "--workers=1", "--samples-per-shard=3")
  assert first.returncode == 1 and "3 of 13 samples can't be used" in first.stderr
  again = command(world, BEAM + "multi_threading", "--samples-per-shard=3")
  assert (
    again.returncode == 1
    and "3 of 13 samples can't be used" in again.stderr
    and "Traceback" not in again.stderr
  )
  make_video(world / "videos" / "v1.mp4", 8)
  done = command(world, BEAM + "multi_threading", "--samples-per-shard=3")
  assert done.returncode == 0, done.stderr
  make(world, "whole", samples_per_shard=3)
  assert contents(world.parent / "out") == contents(world.parent / "whole")
