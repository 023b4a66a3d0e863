"""The measurements run, and measure what they say."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_weights as w
from safetensors.numpy import load_file

from xcomp_jax import bench, weights, world
from xcomp_jax.data import prompt

BASE = pathlib.Path(__file__).parents[1] / "assets" / "tiny"


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


def test_a_later_question_leaves_out_the_tower_and_the_visual_rounds():
  for mode in ("aligned", "local"):
    got = bench.questions(BASE, mode, 128, 64, 8)
    parts = [got[f"{name}, TFLOP"] for name in ("tower", "visual rounds", "question's rows", "answer")]
    assert min(parts) > 0
    assert got["first, TFLOP"] == pytest.approx(sum(parts)) and got["later, TFLOP"] == pytest.approx(sum(parts[2:]))


def test_needles_count_the_clips_that_were_kept(tmp_path):
  world.write_world(tmp_path / "w", [world.Split("heldout", 1, 16, 16, 4)], seed=0, workers=1)
  asked = bench.needles(BASE, tmp_path / "w", ("local",), kept=64)
  assert set(asked) == {"local", "uniform"} and all(n == 4 for _, n in asked.values())
  (annotation,) = world.read_annotations(tmp_path / "w", "heldout")
  even = np.linspace(0, 15, 8).round()
  assert asked["uniform"][0] == sum(scene in even for scene in annotation["scenes"])
  assert bench.needles(BASE, tmp_path / "w", ("local",), kept=128)["local"] == (4, 4)


def test_the_cost_of_scoring_is_measured_and_counted(monkeypatch, capsys):
  small = dataclasses.replace(bench.MEASURED, vocab_size=128, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp_width=64)
  monkeypatch.setattr(bench, "MEASURED", small)
  got = {mode: bench.select(mode, 128) for mode in ("aligned", "local", "global")}
  for out in got.values():
    assert min(out[name] for name in ("visual_s", "question_s", "TFLOP", "memory_GB")) > 0
    assert out["official_TFLOP_ratio"] == pytest.approx(bench.OFFICIAL_FLOPS / 8 / out["TFLOP"] / 1e12)
  assert got["local"]["calls"] == 1 and got["local"]["memory_GB"] < got["aligned"]["memory_GB"] * 2
  bench.main(["select", "--frames=64", "--mode=local"])
  assert "official_TFLOP_ratio" in capsys.readouterr().out
