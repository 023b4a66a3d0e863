"""Runs of several processes on this machine, by launch/local_cluster.py, and what they noted
(tests/helpers/traced.py).
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp

from xcomp_jax.config_io import to_dict
from xcomp_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[2]


class Cluster:
  """Starts runs with a config; each adds to one trace."""

  def __init__(self, config, folder):
    self.config, self.folder = config, pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    values = json.dumps(to_dict(config))
    (self.folder / "config.py").write_text(
      "import json\nfrom ml_collections import ConfigDict, FieldReference\n\n\ndef get_config():\n"
      f"  c = ConfigDict(json.loads({values!r}))\n"
      "  for key in ('coordinator', 'processes', 'process'):\n"
      "    c.distributed[key] = FieldReference(c.distributed[key], field_type=object)\n  return c\n"
    )

  def start(self, processes, devices, kill=None, grace=20, arguments=()):
    """Begins a run; a Popen of the launcher."""
    options = json.dumps({"trace": str(self.folder / "trace")} | ({"kill": kill} if kill else {}))
    program = f"{sys.executable} {ROOT}/tests/helpers/traced.py '{options}'"
    line = [
      sys.executable,
      "launch/local_cluster.py",
      f"--processes={processes}",
      f"--devices={devices}",
      f"--grace={grace}",
      f"--program={program}",
      "--",
      f"--config={self.folder / 'config.py'}",
      *arguments,
    ]
    return subprocess.Popen(
      line,
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )

  def run(self, processes, devices, timeout=300, **options):
    """(exit code, all that was said) of a run."""
    launched = self.start(processes, devices, **options)
    try:
      said, _ = launched.communicate(timeout=timeout)
    finally:
      launched.terminate()
    return launched.returncode, said

  def trace(self):
    """[(step, loss)] in the order in which process 0 took them, and step -> samples of all
    processes, the last time.
    """
    losses, samples = [], {}
    for file in sorted(self.folder.glob("trace.*")):
      own = {}
      for kind, value in map(json.loads, file.read_text().splitlines()):
        if kind == "step":
          own[value[0]] = value[2]
          if file.suffix == ".0":
            losses.append((value[0], float.fromhex(value[1])))
      for step, ids in own.items():
        samples.setdefault(step, set()).update(ids)
    return losses, samples


def arrays(config):
  """The bytes of everything in the newest checkpoint, by path, whatever processes wrote it; and its
  step.
  """
  place = max(
    (path for path in checkpoint.folder(config.workdir).iterdir() if path.name.isdigit()),
    key=lambda path: int(path.name),
  )
  handler, out = ocp.PyTreeCheckpointHandler(), {}
  for item in ("params", "opt"):
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(place / item).tree
    )
    out[item] = handler.restore(place / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
  leaves = jax.tree_util.tree_leaves_with_path(out)
  return {
    jax.tree_util.keystr(path): (leaf.dtype, leaf.shape, leaf.tobytes()) for path, leaf in leaves
  }, int(place.name)
