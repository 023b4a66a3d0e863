"""Files and folders appear whole or not at all; commands end with a line and a code."""

import argparse
import errno
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import jax
import pytest

# here, where there is a home: it looks for one when it is imported
from huggingface_hub import (
  constants,
)

from xcomp_jax import cli, files
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.tensor_files import CheckpointError


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
  file = tmp_path / "page.html"
  file.write_text("old")
  with pytest.raises(KeyboardInterrupt), files.replacing(file) as out:
    out.write_bytes(b"half")
    raise KeyboardInterrupt
  assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
  files.write_file(file, "new \u00e4")
  assert file.read_bytes() == "new \u00e4".encode() and list(tmp_path.iterdir()) == [file]


def test_a_file_that_was_never_begun_is_not_missed(tmp_path):
  with files.replacing(tmp_path / "records") as out:
    out.unlink()
  assert not list(tmp_path.iterdir())


def test_only_files_are_replaced_and_not_links_to_them(tmp_path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "link").symlink_to("folder/file")
  for text in ("new", "newer"):
    files.write_file(tmp_path / "link", text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == text
  os.mkfifo(tmp_path / "pipe")
  for name in ("pipe", "folder"):
    with pytest.raises(FileExistsError) as caught, files.replacing(tmp_path / name):
      raise AssertionError("not reached")
    assert caught.value.filename == str(tmp_path / name)
  assert (tmp_path / "pipe").is_fifo() and {path.name for path in tmp_path.iterdir()} == {
    "folder",
    "link",
    "pipe",
  }


def test_names_may_be_as_long_as_the_system_allows(tmp_path):
  name = "\u00e4" * 127
  with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / name) as left:
    kept = left.with_name("kept")
    left.rename(kept)
    raise ZeroDivisionError
  kept.rename(left)  # as a kill leaves it
  files.sweep(tmp_path, name)
  files.write_file(tmp_path / name, "")
  assert [path.name for path in tmp_path.iterdir()] == [name]


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
      with pytest.raises(files.TakenError) as caught, files.fresh_folder(target, "test"):
        raise AssertionError("not reached")
      assert caught.value.fields == {"where": target, "found": "a file or folder"}
      break
    with files.fresh_folder(target, "test", replace) as folder:
      (folder / "file").write_text(content)
      assert not (target / "file").exists() or (target / "file").read_text() == "first"
  with pytest.raises(ZeroDivisionError), files.fresh_folder(target, "test", replace=True) as folder:
    (folder / "file").write_text("third")
    raise ZeroDivisionError
  assert (target / "file").read_text() == ("second" if replace else "first")
  assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ["out"]


STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir")


def killed(step, work):
  """Whether a process that works, and is killed before its so many-th step that changes a folder,
  got so far.
  """
  pid = os.fork()
  if not pid:
    count = itertools.count()

    def wrap(real):
      def run(*a, **k):
        if next(count) == step:
          os._exit(7)  # nothing is cleaned up
        return real(*a, **k)

      return run

    for kind in STEPS:
      setattr(os, kind, wrap(getattr(os, kind)))
    try:
      work()
    finally:
      os._exit(0)
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def whole(folder):
  return {file.name: file.read_text() for file in folder.iterdir()}


def test_whenever_it_is_killed_there_is_a_whole_folder_and_nothing_beside_it_in_the_end(tmp_path):
  def make(content):
    with files.fresh_folder(target, "test", replace=True) as folder:
      for name in "abc":
        (folder / name).write_text(content)

  contents, seen = [dict.fromkeys("abc", text) for text in ("old", "new")], set()
  for step in itertools.count():
    target = tmp_path / str(step) / "out"
    make("old")
    reached = killed(step, lambda: make("new"))
    seen.add((target.exists(), len(list(target.parent.iterdir()))))
    found = files.local(target, "it is read")  # as any command begins
    assert whole(found) in contents
    make("new")
    assert whole(target) == contents[1] and list(target.parent.iterdir()) == [target]
    if not reached:
      break
  assert step > 8 and (False, 1) in seen  # also between the renames


def test_a_folder_whose_rename_fails_is_put_back(tmp_path):
  target = tmp_path / "out"
  target.mkdir()
  (target / "a").write_text("old")
  with (
    pytest.raises(FileNotFoundError),
    files.fresh_folder(target, "test", replace=True) as folder,
  ):
    folder.rmdir()  # so that nothing can take the place of what has already given way
  assert whole(target) == {"a": "old"} and list(tmp_path.iterdir()) == [target]


def test_a_folder_that_somebody_else_made_meanwhile_costs_neither(tmp_path):
  target = tmp_path / "out"
  with pytest.raises(files.TakenError) as caught, files.fresh_folder(target, "test"):
    target.mkdir()
    (target / "a").write_text("theirs")
  assert caught.value.fields == {"where": target, "found": "a file or folder"}
  assert whole(target) == {"a": "theirs"} and list(tmp_path.iterdir()) == [target]


def test_one_process_makes_a_folder(tmp_path):
  with files.fresh_folder(tmp_path / "out", "test") as folder:
    (folder / "a").write_text("first")
    with (
      pytest.raises(files.WriteError) as caught,
      files.fresh_folder(tmp_path / "out", "test"),
    ):
      raise AssertionError("not reached")
    assert caught.value.fields == {"where": tmp_path / "out", "found": "another process"}
    with (
      files.fresh_folder(tmp_path / "other", "test"),
      files.fresh_folder(tmp_path / "out2", "test"),
    ):
      pass
  assert whole(tmp_path / "out") == {"a": "first"}


@pytest.mark.parametrize("lock", [None, "xcomp_jax other"])
def test_a_work_folder_of_others_is_left_alone(tmp_path, lock):
  theirs = tmp_path / "out.test.incomplete"
  theirs.mkdir()
  (theirs / "thesis").write_text("all of it")
  if lock:
    (theirs / "lock").write_text(lock)
  before = whole(theirs)
  with pytest.raises(files.TakenError) as caught, files.fresh_folder(tmp_path / "out", "test"):
    raise AssertionError("not reached")
  assert caught.value.fields == {"where": tmp_path / "out", "work": theirs}
  assert whole(theirs) == before


def test_what_a_link_points_to_is_replaced(tmp_path):
  (tmp_path / "real").mkdir()
  (tmp_path / "real" / "a").write_text("old")
  (tmp_path / "link").symlink_to("real")
  with files.fresh_folder(tmp_path / "link", "test", replace=True) as folder:
    (folder / "a").write_text("new")
  assert (tmp_path / "link").is_symlink() and whole(tmp_path / "real") == {"a": "new"}


def test_links_that_go_round_in_a_circle_are_no_target(tmp_path):
  (tmp_path / "loop").symlink_to("loop")
  for target in ("loop", "loop/x"):
    with (
      pytest.raises(files.WriteError) as caught,
      files.fresh_folder(tmp_path / target, "test", replace=True),
    ):
      raise AssertionError("not reached")
    assert caught.value.fields["where"] == tmp_path / target
    assert os.strerror(errno.ELOOP) in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_one_command_works_in_a_folder_and_sweeps_it(tmp_path):
  (tmp_path / f"a.json.{'0' * 32}.tmp").touch()
  (tmp_path / "mine.tmp").touch()
  with files.replacing(tmp_path / "b.json") as written, files.alone(tmp_path, "test"):
    assert written.exists()  # its process lives
    with pytest.raises(files.WriteError) as caught, files.alone(tmp_path, "other"):
      raise AssertionError("not reached")
    assert caught.value.fields == {"where": tmp_path, "found": "another command"}
  assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "b.json", "mine.tmp"]
  with files.alone(tmp_path, "other"):
    assert files.made_by(tmp_path, "test") and not files.made_by(tmp_path, "other")


def test_a_message_about_a_full_disk_names_the_file(tmp_path):
  page = tmp_path / "page.html"
  with pytest.raises(OSError) as caught, files.replacing(page):
    os.write(os.open("/dev/full", os.O_WRONLY), b"x")
  assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(page))


@pytest.mark.parametrize(
  "stream, mode, name",
  [
    ("stdin", "r", "standard input"),
    ("stdout", "w", "standard output"),
    ("stderr", "a", "standard error"),
  ],
)
def test_no_output_is_what_a_stream_is_bound_to(tmp_path, stream, mode, name):
  (tmp_path / "file").touch()
  body = """
    import sys
    from xcomp_jax import files
    files.apart({"--report": sys.argv[1] + "/other", "--out": sys.argv[1]}, {})
    try:
      files.apart({"--report": sys.argv[1] + "/file"}, {})
    except files.PathError as error:
      sys.exit(9 if error.fields["other"] == sys.argv[2] else 8)
  """
  with open(tmp_path / "file", mode) as bound:
    got = subprocess.run(
      [sys.executable, "-c", textwrap.dedent(body), str(tmp_path), name],
      check=False,
      **{stream: bound},
    )
  assert got.returncode == 9


@pytest.mark.parametrize(
  "output, source, nested, how",
  [
    ("film", "film", False, "is"),
    ("./x/../film", "film", False, "is"),
    ("link", "film", False, "is"),
    ("hard", "film", False, "is"),
    ("x", "x/in", False, "contains"),
    ("alias", "x/in", False, "contains"),
    ("x/in", "x", True, "lies in"),
    ("x/new", "alias", True, "lies in"),
    ("x/in", "x", False, ""),
    ("other", "film", True, ""),
    ("gs://b/x", "gs://b/x", False, ""),
    ("film", None, False, ""),
    ("new", "new", False, "is"),
  ],
)
def test_no_output_is_an_input(tmp_path, monkeypatch, output, source, nested, how):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("film").touch()
  pathlib.Path("link").symlink_to("film")
  os.link("film", "hard")
  pathlib.Path("x").mkdir()
  pathlib.Path("x/in").touch()
  pathlib.Path("alias").symlink_to("x")
  if not how:
    return files.apart({"--out": output}, {"--video": source}, nested)
  with pytest.raises(files.PathError) as caught:
    files.apart({"--out": output}, {"--video": source}, nested)
  assert caught.value.fields == {"where": "--out", "how": how, "other": "--video"}


def ends(shell, body):
  """Exit code and stderr of a command whose body is given, run by a shell as `shell` says."""
  code = f"from xcomp_jax import cli\nimport sys\nwith cli.command():\n  {body}"
  line = shell.format(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}")
  done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
  return done.returncode, done.stderr


MANY = "for i in range(100_000): print(i)"


@pytest.mark.parametrize(
  "shell, body, code, said",
  [
    ("{} >&-", "print('lost')", 1, "error: stdout is closed"),
    ("{} > /dev/full", "print('lost')", 1, "error: .*No space left.*stdout"),
    ("{} > /dev/full", "print('lost', flush=True)", 1, "^error: .*No space left.*stdout"),
    ("set -o pipefail; {} | head -1", MANY, 141, "^$"),
    ("{}", "raise BrokenPipeError(32, 'Broken pipe', 'bucket')", 1, "error: .*Broken pipe"),
    (
      "{} <&- 2>&- > /dev/null",
      "assert not sys.stdin.readline(); print(1, file=sys.stderr); assert "
      "open('/dev/null').fileno() > 2",
      0,
      "^$",
    ),
    ("PYTHONIOENCODING=ascii {}", "print('ä')", 0, "^$"),
    ("printf '\\377\\n' | {}", "assert sys.stdin.readline() == '\\udcff\\n'", 0, "^$"),
    ("{}", "raise MemoryError", 1, "error: it needs more memory than there is"),
    (
      "{}",
      "raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes')",
      1,
      "error: it needs more memory than there is",
    ),
  ],
)
def test_streams_that_are_closed_full_or_no_text(shell, body, code, said):
  got, stderr = ends(shell, body)
  assert got == code and re.search(said, stderr) and "Traceback" not in stderr, stderr


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
  with pytest.raises(SystemExit) as stop, cli.command(*kinds):
    raise error
  assert stop.value.code == code and capsys.readouterr().err == said


def test_a_fault_of_the_program_keeps_its_trace():
  with pytest.raises(ImportError), cli.command():
    raise ImportError("a bug")


def test_a_progress_bar_of_a_command_starts_no_thread():
  # Ctrl-C while tqdm waits for its thread to start is an error of the thread's to tqdm, which goes
  # on.
  body = """
    import threading
    from tqdm import tqdm
    from xcomp_jax import cli
    with cli.command():
      tqdm(total=1).close()
    print(threading.active_count())
    tqdm.monitor_interval = 10
    tqdm(total=1).close()
    print(threading.active_count())
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == ["1", "2"]


def test_compiled_programs_are_kept_where_they_can_be(tmp_path, caplog):
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    cli.keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir is None
    cli.keep_compiled(None, str(tmp_path / "a" / "b"))
    assert (
      jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
      and (tmp_path / "a" / "b").is_dir()
    )
    cli.keep_compiled(None, str(tmp_path / "c"))  # one that is set stays,
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
    cli.keep_compiled(str(tmp_path / "c"))  # unless another is asked for,
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "c")
    cli.keep_compiled("")  # or none
    assert jax.config.jax_compilation_cache_dir is None and not caplog.records
    (tmp_path / "file").touch()
    for bad in (str(tmp_path / "file"), "nothing://bucket/compiled"):
      cli.keep_compiled(bad)
      (said,) = (record.getMessage() for record in caplog.records)
      caplog.clear()
      assert jax.config.jax_compilation_cache_dir is None and f"{bad} can't be written" in said
    # as by an environment variable
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "file" / "inside"))
    cli.keep_compiled(None, str(tmp_path / "c"))
    assert (
      jax.config.jax_compilation_cache_dir is None
      and "compiled programs are not kept" in caplog.text
    )
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_names_that_are_no_utf8_are_printed_with_escapes(capsys):
  with cli.command():
    print("caf\udcff")
  assert capsys.readouterr().out == "caf\\udcff\n"


@pytest.fixture
def homeless(monkeypatch, tmp_path):
  """A container's user: a mere number, without HOME; in an empty folder."""
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
  monkeypatch.chdir(tmp_path)


def test_without_a_home_a_leading_tilde_is_refused(homeless):
  for path in ("~", "~/x", pathlib.Path("~/x")):
    with pytest.raises(files.HomeError) as caught:
      files.path_of(path)
    assert caught.value.fields == {"where": str(path)}
  assert files.expanduser("~x/y") == "~x/y" and files.expanduser("a/~") == "a/~"  # names as others
  parser = argparse.ArgumentParser(exit_on_error=False)
  parser.add_argument("--out", type=files.expanduser)
  with pytest.raises(argparse.ArgumentError, match="this user has none"):
    parser.parse_args(["--out", "~/x"])


def test_without_a_home_no_program_is_kept_and_no_folder_is_made(homeless, caplog):
  before = jax.config.jax_compilation_cache_dir
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    cli.keep_compiled(None, "~/.cache/xcomp_jax")
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  assert (
    "compiled programs are not kept: ~/.cache/xcomp_jax: ~ is the home directory" in caplog.text
  )
  assert os.listdir() == []


def test_without_a_home_a_hub_id_names_the_variable_to_set(homeless, monkeypatch):
  # as at an import without a home
  monkeypatch.setattr(constants, "HF_HOME", os.path.expanduser("~/.cache/huggingface"))
  with pytest.raises(CheckpointError) as caught:
    resolve("org/name")
  assert caught.value.fields == {"where": "org/name", "missing": "HF_HOME"}
  assert os.listdir() == []
