"""Loading is measured; random checkpoints are like real ones."""

import shutil

import numpy as np
import pytest
import tiny_checkpoints as w
from safetensors.numpy import load_file

from xcomp_jax.bench import load
from xcomp_jax.checkpoints import tensor_names
from xcomp_jax.data import prompt


def test_random_checkpoint_loads_with_little_memory_above_it(reference, tmp_path, capsys):
  # one large tensor
  like = w.configured(tmp_path / "like", **(w.TINY | {"vocab_size": 400_000, "hidden_size": 96}))
  for file in (reference / "qwen_subset").iterdir():
    shutil.copy(file, like)
  load.main(["random", "--like", str(like), "--out", str(tmp_path / "out")])
  # `ask` takes it
  assert (
    prompt.load_tokenizer(tmp_path / "out").vocab_size == prompt.load_tokenizer(like).vocab_size
  )
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  assert {name: t.shape for name, t in tensors.items()} == {
    e.name: e.shape for e in tensor_names.names(w.read_config(like))
  }
  embedding = tensors["model.embed_tokens.weight"].astype(np.float32)
  assert abs(embedding.std() - 0.02) < 1e-3 and len(np.unique(embedding[:, 0])) > 1000
  assert (
    tensors["model.norm.weight"].all() and not tensors["model.layers.0.self_attn.q_proj.bias"].any()
  )
  measured = load.measured_loading(tmp_path / "out")
  assert measured["parameters_GB"] == pytest.approx(sum(t.nbytes for t in tensors.values()) / 1e9)
  # no second copy of it
  assert measured["peak_above_parameters_GB"] < 0.5 * measured["parameters_GB"]
  assert measured["load_s"] > 0 and measured["load_GB/s"] > 0
  capsys.readouterr()
  load.main(["load", "--checkpoint", str(tmp_path / "out")])
  assert "load_GB/s" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as left:
    load.main(["random", "--like", str(tmp_path), "--out", str(tmp_path / "out")])
  assert left.value.code == 1 and "has no config.json" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
