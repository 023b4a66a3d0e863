"""The measurements run, and measure what they say."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from xcomp_jax.bench import bench, parts, scaling
from xcomp_jax.data.batch import Shape

ROOT = pathlib.Path(__file__).parents[2]
SMALL = parts.sized("small", "float32", clips_per_chunk=1)


@pytest.mark.pure
def test_operations_are_those_of_matrix_products_and_loops():
  x = jnp.ones((8, 4))

  def product(x):
    return jax.lax.scan(lambda c, _: (c @ c.T @ c, None), x, None, length=3)[0]

  assert parts.flops(product, x) == 3 * (2 * 8 * 8 * 4 + 2 * 8 * 4 * 8)
  assert parts.flops(jax.jit(lambda x: x.T @ x), x) == 2 * 4 * 4 * 8


@pytest.mark.pure
@pytest.mark.parametrize("causal", [True, False])
def test_operations_of_attention_in_tiles(causal):
  from xcomp_jax.model.attention import AttentionMask, attend

  q, k = jnp.ones((2, 1300, 8, 16)), jnp.ones((2, 1300, 2, 16))

  def run(q, k):
    return attend(q, k, k, AttentionMask(causal), implementation="tiled")

  needed = 4 * 2 * 8 * 16 * 1300**2 * (0.5 if causal else 1.0)
  counted = parts.flops(run, q, k)
  # tiles on the diagonal are computed whole
  assert needed < counted < needed * (1.3 if causal else 1.02)
  backward = (
    parts.flops(jax.value_and_grad(lambda q, k: jnp.sin(run(q, k)).sum(), (0, 1)), q, k) - counted
  )
  assert backward > 2.4 * counted  # five products, some more than once, instead of two


def test_useful_operations_are_at_most_those_counted():
  for part in (
    parts.prefill_part(SMALL, 64, 30, real=False),
    parts.prefill_part(SMALL, 64, 30, False, real=False),
    parts.tower(SMALL, 2, real=False),
  ):
    counted = parts.flops(part.run, *part.args)
    assert 0.4 * counted < part.flops < counted
  plain, ours = (
    parts.prefill_part(SMALL, 64, 30, False, real=False).flops,
    parts.prefill_part(SMALL, 64, 30, real=False).flops,
  )
  assert plain > 1.5 * ours


@pytest.mark.slow
def test_rows_are_timed_beside_a_product_and_drawn(tmp_path, capsys):
  out = tmp_path / "bench.json"
  bench.main(
    [
      "--preset=smoke",
      "--only",
      "tower",
      "merge",
      "prefill",
      "decode",
      "data",
      "--runs=1",
      "--out",
      str(out),
    ]
  )
  assert len(capsys.readouterr().out.splitlines()) == len(json.loads(out.read_text())["rows"])
  bench.main(
    ["--preset=smoke", "--only", "merge", "--runs=1", "--profile", str(tmp_path / "traces")]
  )
  assert list((tmp_path / "traces" / "merge-8-frames").rglob("*.xplane.pb"))
  result = json.loads(out.read_text())
  rows = result["rows"]
  assert [name.split(",")[0] for name in rows][2:6] == ["tower", "merge", "prefill", "decode"]
  assert (
    "tiled in the LLM" in result["attention"]
    and result["matmul_flops/s"] > 0
    and result["copy_bytes/s"] > 0
  )
  for name in ("tower, 16 frames", "merge, 8 frames", "prefill, 16 frames", "decode, 4 tokens"):
    row = rows[name]
    assert row["fastest_s"] <= row["seconds"] <= row["slowest_s"] and row["compile_s"] > 0
    assert row["flops/s"] == pytest.approx(row["flops"] / row["seconds"])
    assert row["least_s"] == pytest.approx(
      max(row["flops"] / row["matmul_flops/s"], row["bytes"] / result["copy_bytes/s"])
    )
  assert rows["tower, 16 frames"]["frames/s"] == pytest.approx(
    16 / rows["tower, 16 frames"]["seconds"]
  )
  assert all(
    rows[f"data, {kind}, read by one thread"]["frames/s"] > 0
    for kind in ("raw", "JPEG 95", "features")
  )
  assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_profile_is_a_trace_of_one_more_call(tmp_path):
  smoke = dataclasses.replace(bench.PRESETS["smoke"], runs=1)
  row = bench.measured_row(parts.merging(SMALL, 1), smoke, traces=tmp_path / "traces")
  (trace,) = (tmp_path / "traces").rglob("*.xplane.pb")  # what xprof opens
  assert trace.stat().st_size > 0 and row["seconds"] > 0


def test_a_training_step_is_timed_as_often_as_wanted():
  gradient, _ = parts.training_parts(
    SMALL, Shape(rows=1, samples=2, prefix=8, frames=16, text=32), "float32"
  )
  call, _, _ = bench.compile_part(gradient)
  # the sums of the first call are an argument of the second
  losses = [float(call()[0].sum()) for _ in range(2)]
  assert losses[0] == losses[1] > 0
  _, apply = parts.training_parts(
    SMALL, Shape(rows=1, samples=2, prefix=8, frames=16, text=32), "float32"
  )
  call, _, _ = bench.compile_part(apply)
  assert [bool(call()["finite"]) for _ in range(2)] == [True, True]


def without_the_libraries_of_data(*arguments) -> subprocess.CompletedProcess:
  """The benchmark as on a machine that has only jax, flax, optax, orbax, numpy and jaxtyping."""
  absent = (
    "cv2",
    "grain",
    "tensorflow_datasets",
    "array_record",
    "ml_collections",
    "tokenizers",
    "safetensors",
  )
  absent += (
    "huggingface_hub",
    "tokamax",
    "tensorboardX",
    "PIL",
    "tqdm",
    "matplotlib",
    "tensorstore_",
  )
  script = f"""
import sys
class Absent:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {absent!r}: raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
from xcomp_jax.bench import bench
bench.main({["--preset=smoke", *map(str, arguments)]!r})
"""
  return subprocess.run(
    [sys.executable, "-c", script],
    cwd=ROOT,
    env=os.environ,
    capture_output=True,
    text=True,
    timeout=900,
  )


def test_it_begins_without_the_libraries_of_data():
  done = without_the_libraries_of_data("--frames=12")
  assert done.returncode == 1 and "multiples of 8" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_all_rows_without_the_libraries_of_data(tmp_path):
  done = without_the_libraries_of_data("--runs=1", "--out", tmp_path / "out.json")
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / "out.json").read_text())["rows"]
  assert {"SCT on features", "SCT on frames", "select local, the question's rows"} <= set(rows)
  assert "is not installed" in rows["data"]["not run"] and "no PNG" in done.stderr
  (gradient,) = [
    row["seconds"]
    for name, row in rows.items()
    if name.startswith("gradient") and name.endswith("frames")
  ]
  spent = (
    gradient / 2
    + rows["optimizer's step, frames"]["seconds"] / 8
    + rows["frozen tower, 2 clips"]["seconds"]
  )
  assert rows["SCT on frames"]["seconds"] == pytest.approx(spent)


@pytest.mark.pure
def test_bad_sizes_are_one_line(capsys):
  with pytest.raises(SystemExit) as left:
    bench.main(["--preset=smoke", "--frames", "12"])
  assert left.value.code == 1 and "multiples of 8" in capsys.readouterr().err
  with pytest.raises(SystemExit) as left:
    scaling.main(["--preset=smoke", "--frames", "12", "--out", "scaling"])
  assert left.value.code == 1 and "multiples of 8" in capsys.readouterr().err


@pytest.mark.slow
def test_scaling_is_measured_and_drawn(tmp_path):
  out = tmp_path / "scaling"
  scaling.main(
    [
      "--preset=smoke",
      "--frames",
      "64",
      "32",
      "--text",
      "30",
      "--run-up-to",
      "32",
      "--out",
      str(out),
    ]
  )
  rows = json.loads(out.with_suffix(".json").read_text())
  assert [row["x"] for row in rows["frames"]] == [32, 64] and rows["frames"][0]["seconds"] > 0
  assert (
    rows["frames"][1]["seconds"] is None and rows["frames"][1]["TFLOP"] > rows["frames"][0]["TFLOP"]
  )
  # a clip at a time, however many
  assert rows["encoding"][0]["temporary_GB"] == rows["encoding"][1]["temporary_GB"]
  assert out.with_suffix(".png").stat().st_size > 10_000
