"""Files and folders appear whole or not at all; commands end with a line and a code."""

import argparse
import io
import json
import os
import pathlib

import jax
import pytest
from huggingface_hub import constants  # here, where there is a home: it looks for one when it is imported
from tqdm import tqdm

from xcomp_jax import files, weights


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
  file = tmp_path / "page.html"
  file.write_text("old")
  with pytest.raises(KeyboardInterrupt), files.replacing(file) as out:
    out.write_bytes(b"half")
    raise KeyboardInterrupt
  assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
  files.write(file, "new \u00e4")
  assert file.read_bytes() == "new \u00e4".encode() and list(tmp_path.iterdir()) == [file]


def test_a_file_that_was_never_begun_is_not_missed(tmp_path):
  with files.replacing(tmp_path / "records"):
    pass
  assert not list(tmp_path.iterdir())


def test_json_for_people_has_lines_and_an_order(tmp_path):
  files.write_json(tmp_path / "a", {"b": 1, "a": 2}, indent=2)
  files.write_json(tmp_path / "b", {"b": 1, "a": 2})
  assert (tmp_path / "a").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
  assert json.loads((tmp_path / "b").read_text()) == {"b": 1, "a": 2}


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_appears_by_its_last_step(tmp_path, replace):
  target = tmp_path / "out"
  for content in ("first", "second"):
    if content == "second" and not replace:
      with pytest.raises(FileExistsError, match="already exists"), files.fresh_folder(target):
        raise AssertionError("not reached")
      break
    with files.fresh_folder(target, replace) as folder:
      (folder / "file").write_text(content)
      assert not (target / "file").exists() or (target / "file").read_text() == "first"
  with pytest.raises(ZeroDivisionError), files.fresh_folder(target, replace=True) as folder:
    (folder / "file").write_text("third")
    raise ZeroDivisionError
  assert (target / "file").read_text() == ("second" if replace else "first")
  assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ["out"]


@pytest.mark.parametrize(
  "error, kinds, code, said",
  [
    (ValueError("no"), (), 1, "error: no\n"),
    (FileNotFoundError("gone"), (), 1, "error: gone\n"),
    (ImportError("missing"), (ImportError,), 1, "error: missing\n"),
    (KeyboardInterrupt(), (), 130, "interrupted\n"),
  ],
)
def test_a_command_ends_with_one_line(capsys, error, kinds, code, said):
  with pytest.raises(SystemExit) as stop, files.command(*kinds):
    raise error
  assert stop.value.code == code and capsys.readouterr().err == said


def test_a_fault_of_the_program_keeps_its_trace():
  with pytest.raises(ImportError), files.command():
    raise ImportError("a bug")


def test_a_progress_bar_of_a_command_starts_no_thread(monkeypatch):
  # Ctrl-C while tqdm waits for its thread to start is an error of the thread's to tqdm, which goes on.
  started = []
  monkeypatch.setattr("tqdm.std.TMonitor", lambda *args: started.append(args))
  monkeypatch.setattr(tqdm, "monitor_interval", 10)
  monkeypatch.setattr(tqdm, "monitor", None)
  tqdm(total=1, file=io.StringIO()).close()
  assert len(started) == 1
  with files.command():
    tqdm(total=1, file=io.StringIO()).close()
  assert len(started) == 1


def test_compiled_programs_are_kept_where_they_can_be(tmp_path, capsys):
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    files.keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir is None
    files.keep_compiled(None, str(tmp_path / "a" / "b"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b") and (tmp_path / "a" / "b").is_dir()
    files.keep_compiled(None, str(tmp_path / "c"))  # one that is set stays,
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
    files.keep_compiled(str(tmp_path / "c"))  # unless another is asked for,
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "c")
    files.keep_compiled("")  # or none
    assert jax.config.jax_compilation_cache_dir is None and capsys.readouterr().err == ""
    (tmp_path / "file").touch()
    for bad in (str(tmp_path / "file"), "nothing://bucket/compiled"):
      files.keep_compiled(bad)
      said = capsys.readouterr().err
      assert jax.config.jax_compilation_cache_dir is None and said.count("\n") == 1 and f"{bad} can't be written" in said
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "inside"))  # as by an environment variable
    files.keep_compiled(None, str(tmp_path / "c"))
    assert jax.config.jax_compilation_cache_dir is None and "compiled programs are not kept" in capsys.readouterr().err
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def homeless(monkeypatch, tmp_path):
  """A container's user: a mere number, without HOME; in an empty folder."""
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
  monkeypatch.chdir(tmp_path)


def test_without_a_home_a_leading_tilde_is_refused(homeless):
  for path in ("~", "~/x", pathlib.Path("~/x")):
    with pytest.raises(files.HomeError, match="~ is the home directory, and this user has none"):
      files.path_of(path)
  assert files.expanduser("~x/y") == "~x/y" and files.expanduser("a/~") == "a/~"  # names as others
  parser = argparse.ArgumentParser(exit_on_error=False)
  parser.add_argument("--out", type=files.expanduser)
  with pytest.raises(argparse.ArgumentError, match="this user has none"):
    parser.parse_args(["--out", "~/x"])


def test_without_a_home_no_program_is_kept_and_no_folder_is_made(homeless, capsys):
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    files.keep_compiled(None, "~/.cache/xcomp_jax")
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  assert "compiled programs are not kept: ~/.cache/xcomp_jax: ~ is the home directory" in capsys.readouterr().err
  assert os.listdir() == []


def test_without_a_home_a_hub_id_names_the_variable_to_set(homeless, monkeypatch):
  monkeypatch.setattr(constants, "HF_HOME", os.path.expanduser("~/.cache/huggingface"))  # as at an import without a home
  with pytest.raises(weights.CheckpointError, match="set HF_HOME to a folder"):
    weights.resolve("org/name")
  assert os.listdir() == []
