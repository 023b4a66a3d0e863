"""The measurements run, and measure what they say."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_weights as w
from safetensors.numpy import load_file

from xcomp_jax import bench, weights
from xcomp_jax.config import VisionConfig
from xcomp_jax.data import prompt


def test_random_checkpoint_loads_with_little_memory_above_it(reference, tmp_path, capsys):
  like = w.configured(tmp_path / "like", **(w.TINY | {"vocab_size": 400_000, "hidden_size": 96}))  # one large tensor
  for file in (reference / "qwen_subset").iterdir():
    shutil.copy(file, like)
  bench.main(["random", "--like", str(like), "--out", str(tmp_path / "out")])
  assert prompt.load_tokenizer(tmp_path / "out").vocab_size == prompt.load_tokenizer(like).vocab_size  # `ask` takes it
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  assert {name: t.shape for name, t in tensors.items()} == {e.name: e.shape for e in weights.names(w.read_config(like))}
  embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
  assert abs(embedding.std() - 0.02) < 1e-3 and len(np.unique(embedding[:, 0])) > 1000
  assert tensors["model.norm.weight"].all() and not tensors["model.layers.0.self_attn.q_proj.bias"].any()
  measured = bench.load(tmp_path / "out")
  assert measured["parameters_GB"] == pytest.approx(sum(t.nbytes for t in tensors.values()) / 1e9)
  assert measured["peak_above_parameters_GB"] < 0.5 * measured["parameters_GB"]  # no second copy of it
  assert measured["load_s"] > 0 and measured["read_GB/s"] > 0
  capsys.readouterr()
  bench.main(["load", "--checkpoint", str(tmp_path / "out")])
  assert "load_GB/s" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as left:
    bench.main(["random", "--like", str(tmp_path), "--out", str(tmp_path / "out")])
  assert left.value.code == 1 and "has no config.json" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_operations_are_those_of_matrix_products_and_loops():
  x = jnp.ones((8, 4))
  product = lambda x: jax.lax.scan(lambda c, _: (c @ c.T @ c, None), x, None, length=3)[0]
  assert bench.flops(product, x) == 3 * (2 * 8 * 8 * 4 + 2 * 8 * 4 * 8)
  assert bench.flops(jax.jit(lambda x: x.T @ x), x) == 2 * 4 * 4 * 8


SMALL = {"vocab_size": 128, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 64}


@pytest.fixture
def small(monkeypatch):
  """Sizes that run in milliseconds."""
  tower = VisionConfig(image_size=48, patch_size=8, width=32, layers=2, heads=4, mlp_width=64, table="umt-hd")
  monkeypatch.setattr(bench, "MEASURED", dataclasses.replace(bench.MEASURED, **SMALL))
  monkeypatch.setattr(bench, "TOWER", tower)
  monkeypatch.setattr(bench, "SIDE", 128)


@pytest.mark.parametrize("command", [["prefill", "--frames", "16"], ["tower"], ["step", "--frames=16", "--pixels"]])
def test_speed_is_printed_beside_that_of_a_product(small, capsys, command):
  bench.main(command)
  printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
  printed = {name.strip(): value for name, value in printed.items()}
  assert 0 < float(printed["seconds"]) and 0 < float(printed["matmul_TFLOP/s"]) and 0 < float(printed["compile_s"])


def test_useful_operations_are_at_most_those_counted(small):
  for cost in (bench.prefill(None, 64, 20, "float32", 0), bench.tower(None, 2, "float32", 1, 0)):
    assert 0.5 * cost.counted < cost.useful < cost.counted and np.isnan(cost.seconds)


def test_scaling_is_drawn(small, tmp_path):
  bench.scaling(None, (8, 16), (20,), 8, "float32", tmp_path / "scaling")
  rows = json.loads((tmp_path / "scaling.json").read_text())
  assert [row["x"] for row in rows["frames"]] == [8, 16] and rows["frames"][1]["seconds"] is None
  assert (tmp_path / "scaling.png").stat().st_size > 10_000
