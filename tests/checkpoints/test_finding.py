"""Checkpoints by directory, and by hub id."""

import functools

import pytest
from tiny_checkpoints import read_config, tiny, tiny_tensors

from xcomp_jax.checkpoints import loading
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.tensor_files import CheckpointError


@pytest.fixture
def hub(tmp_path):
  """`resolve` with a hub cache of its own, and no network."""
  from huggingface_hub import snapshot_download

  def download(name, *, allow_patterns, local_files_only=True):
    return snapshot_download(
      name, allow_patterns=allow_patterns, local_files_only=True, cache_dir=tmp_path / "hub"
    )

  return functools.partial(resolve, download=download)


def test_hub_id_from_the_local_cache(reference, tmp_path, hub):
  commit = "0123456789abcdef0123456789abcdef01234567"
  repo = tmp_path / "hub" / "models--org--name"
  snapshot = tiny(repo / "snapshots" / commit, tiny_tensors(reference))
  (repo / "refs").mkdir()
  (repo / "refs" / "main").write_text(commit)
  found = hub("org/name")
  assert found == snapshot
  loading.load_model(found, read_config(found))
  (snapshot / "model.safetensors").unlink()  # a download that broke off
  assert hub("org/name", "about") == snapshot
  with pytest.raises(CheckpointError) as caught:
    hub("org/name")
  assert caught.value.fields["where"] == "org/name"
  assert caught.value.fields["found"] == f"only a part of it is there: {snapshot}"


def test_code_is_asked_for_alone_and_never_from_the_cache(tmp_path):
  asked = []

  def download(name, *, allow_patterns, local_files_only=False):
    asked.append((name, allow_patterns, local_files_only))
    if local_files_only:
      raise FileNotFoundError
    return str(tmp_path)

  (tmp_path / "modeling_stand.py").write_text("")
  assert resolve("org/name", "code", download=download) == tmp_path
  # of what is in the cache nobody knows whether it is all
  assert asked == [("org/name", ["*.py"], False)]
  (tmp_path / "config.json").write_text("{}")
  asked.clear()
  assert resolve("org/name", "about", download=download) == tmp_path
  assert [cached for _, _, cached in asked] == [True, False]


def test_init_from_that_is_nowhere(tmp_path, hub):
  with pytest.raises(CheckpointError) as caught:
    hub("org/other")
  assert caught.value.fields["where"] == "org/other" and caught.value.fields["found"]
  with pytest.raises(CheckpointError) as caught:
    resolve(str(tmp_path / "absent"))
  assert caught.value.fields == {"where": str(tmp_path / "absent"), "found": None}
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError) as caught:
    resolve(str(tmp_path / "file"))
  assert caught.value.fields == {"where": tmp_path / "file", "found": "a file"}
  assert resolve(str(tmp_path)) == tmp_path
