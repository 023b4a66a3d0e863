"""What loading a checkpoint costs, in time and memory.

# a checkpoint of random weights of any size (DIR has config.json)
python -m xcomp_jax.bench_load random --like DIR --out DIR
# seconds, memory above the parameters
python -m xcomp_jax.bench_load load --checkpoint DIR
"""

import pathlib
import shutil
import threading
from collections.abc import Iterator, Sequence

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from xcomp_jax.bench.options import command_parser, figures
from xcomp_jax.bench.timing import timed
from xcomp_jax.checkpoints import saving, tensor_files, tensor_names
from xcomp_jax.checkpoints.finding import resolve
from xcomp_jax.checkpoints.loading import load_model
from xcomp_jax.checkpoints.sizes import read_vlm_config
from xcomp_jax.cli import command
from xcomp_jax.files import expanduser, path_of


def random_checkpoint(like: pathlib.Path, out: pathlib.Path) -> None:
  """Streams random bfloat16 weights of the model that config.json in `like` describes into
  directory `out`.

  Raises:
    CheckpointError: a config that can't be used, or a directory that is not free.
  """
  cfg = read_vlm_config(like, saving.AS_IT_IS, saving.NOT_TUNED)
  rng = np.random.default_rng(0)
  dtype = np.dtype(ml_dtypes.bfloat16)

  def blocks(entry: tensor_names.Entry) -> Iterator[np.ndarray]:
    if len(entry.shape) == 1:  # norms near one, so that a forward pass stays finite
      yield np.full(
        entry.shape, float("norm" in entry.name and entry.name.endswith("weight")), dtype
      )
      return
    for start in range(0, entry.shape[0], tensor_files.ROWS):
      shape = (min(tensor_files.ROWS, entry.shape[0] - start), *entry.shape[1:])
      yield (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)

  tensors = [
    saving.Tensor(e.name, e.shape, dtype, lambda e=e: blocks(e))
    for e in sorted(tensor_names.names(cfg), key=lambda e: e.name)
  ]
  with saving.appearing(out, overwrite=False) as temporary:
    shutil.copyfile(like / "config.json", temporary / "config.json")
    saving.copy_tokenizer(temporary, like)
    saving.write_safetensors(temporary, tensors)


def measured_loading(directory: pathlib.Path) -> dict[str, float]:
  """Loads a checkpoint as stored.

  Returns:
    seconds, GB/s and processor seconds; gigabytes of parameters, and of anonymous memory above them
    at its peak.

  Raises:
    CheckpointError: see `loading.load_model`.
  """
  cfg, before = read_vlm_config(directory, saving.AS_IT_IS, saving.NOT_TUNED), _anonymous()
  with _Peak() as peak:
    loading = timed(lambda: load_model(directory, cfg))
  parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(loading.result)))
  return {
    "load_s": loading.seconds,
    "load_GB/s": parameters / loading.seconds / 1e9,
    "load_cpu_s": loading.cpu,
    "parameters_GB": parameters / 1e9,
    "peak_above_parameters_GB": (peak.bytes - before - parameters) / 1e9,
  }


class _Peak:
  """Largest anonymous memory of this process within a `with` block."""

  def __enter__(self) -> "_Peak":
    self.bytes, self._over = 0, threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self) -> None:
    while not self._over.wait(0.005):
      self.bytes = max(self.bytes, _anonymous())

  def __exit__(self, *_) -> None:
    self._over.set()
    self._thread.join()


def _anonymous() -> int:
  """Bytes of anonymous memory now: not of mapped files, whose pages the system can drop."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  args = command_parser(
    "bench_load",
    __doc__,
    {},
    {
      "random": (
        "write a checkpoint of random weights",
        {
          "--like": {"type": path_of, "required": True, "help": "a directory with config.json"},
          "--out": {"type": path_of, "required": True, "help": "directory to be made"},
        },
      ),
      "load": (
        "measure loading",
        {
          "--checkpoint": {
            "type": expanduser,
            "required": True,
            "help": "a directory with config.json and weights",
          }
        },
      ),
    },
  ).parse_args(argv)
  with command():
    if args.command == "random":
      random_checkpoint(args.like, args.out)
    else:
      print(figures(measured_loading(resolve(args.checkpoint))))
