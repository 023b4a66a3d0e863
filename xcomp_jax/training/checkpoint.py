"""Checkpoints of a run: Orbax `CheckpointManager` under workdir/checkpoints, saved in the
background.

Every step folder has four items:
  params   all parameters, trained and frozen, as nested dicts by path (xcomp_jax model tree)
  opt      optimizer state, nested by path
  data     JSON of `pipeline.BatchReader.get_state`: how many steps of the data were read
  config   JSON of `description`
All of it restores onto any mesh and any number of processes. Every later step then has the samples
that it would have had; its sums are taken in another order, so equal bits need the same mesh. What
does not change stays in `init_from`, which a resumed run and an export read again: config.json and
the tokenizer, and for an export the parameters that were not trained, in the dtype in which they
came.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import fsspec.config
import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from xcomp_jax.checkpoints import tensor_files
from xcomp_jax.checkpoints.orbax_files import only_files, reading_orbax
from xcomp_jax.config import ConfigError, RunConfig, TrainConfig, VLMConfig
from xcomp_jax.config_io import to_dict
from xcomp_jax.data.blend import Blend
from xcomp_jax.data.pipeline import BatchReader
from xcomp_jax.errors import XCompError, one_line
from xcomp_jax.files import absolute
from xcomp_jax.parallel import hosts
from xcomp_jax.parallel.mesh import path_name
from xcomp_jax.training.steps import TrainState

# Other processes, and TensorStore in this one, change a bucket's folders: what a listing said must
# not be remembered.
fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False

AGAIN_AFTER = 1.0  # seconds, after which a checkpoint that could not be read is tried once more
FORMAT = 3  # of a checkpoint; raised when an older reader would misread it
EARLIER = {  # what another format means for a run that goes on
  1: "which says the position in the data otherwise",
  2: (
    "whose steps have other samples and shapes: config.data.shapes took the place of "
    "config.data.frame_buckets and config.data.text_buckets, and config.data.group_by_text_length "
    "is gone, since a step has random samples as in the release"
  ),
}

PLACES = (  # what may differ between the processes of a run
  "run.workdir",
  "run.init_from",
  "run.compilation_cache",
  "run.data.train",
  "run.data.heldout",
  "run.data.threads",
  "run.data.prefetch",
  "run.distributed",
)
# What may differ when a run continues: places, pace and reports. All else would make it another
# run.
FREE = (
  *PLACES,
  "format",
  "heldout",
  "evaluation_due",
  "run.mesh",
  "run.data.shapes",
  "run.data.frames_per_device",
  "run.data.text_per_device",
  "run.model.clip_frames",
  "run.model.yarn",  # as resolved they are in vlm
  "run.model.clips_per_chunk",
  "run.model.attention",
  "run.model.remat",
  "run.train.log_every",
  "run.train.eval_every",
  "run.train.save_every",
  "run.train.keep_last",
  "run.train.keep_every",
  "vlm.clips_per_chunk",
  "vlm.attention",
  "vlm.remat",
  "vlm.lp_comp",
  "vlm.dtype",  # run has these too
)
NAMES = {
  "samples": "samples in config.data.train",
  "data": "identity of the data in config.data.train",
  "heldout": "identity of the data in config.data.heldout",
}


class NoCheckpointError(XCompError, FileNotFoundError):
  """There is no checkpoint, or none of the step that was asked for."""


class SaveError(XCompError, OSError):
  """A checkpoint could not be written; those before it are whole."""


def nest_leaves(*states: Any) -> dict:
  """Leaves of pytrees that share no path as nested dicts by path, e.g. {"llm": {"layers": {"0":
  {"q": {"kernel": ...}}}}}.
  """
  leaves = {path: leaf for state in states for path, leaf in tensor_files.by_path(state).items()}
  return unflatten_dict(leaves, sep="/")


def folder(workdir: str) -> epath.Path:
  """Where a run keeps its checkpoints."""
  # a bucket has no working directory
  return epath.Path(workdir if "://" in workdir else absolute(workdir)) / "checkpoints"


def there(workdir: str) -> bool:
  """Whether a workdir has a folder of checkpoints.

  Raises:
    OSError: it is in a bucket that can't be reached.
  """
  try:
    return folder(workdir).is_dir()
  except Exception as error:  # those of a bucket's clients have no common base
    raise OSError(f"{workdir} can't be read: {one_line(error)}") from error


def begun(workdir: str) -> bool:
  """Whether there is a checkpoint to go on from."""
  return bool(_finished(folder(workdir)))


def manager(workdir: str, train: TrainConfig) -> ocp.CheckpointManager:
  """Opens a run's checkpoints for saving and restoring; `close()` it at the end, which waits for a
  running save.
  """
  logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax narrates every save
  return ocp.CheckpointManager(
    folder(workdir),
    options=ocp.CheckpointManagerOptions(
      max_to_keep=train.keep_last,
      keep_period=train.keep_every,
      cleanup_tmp_directories=True,
      # What can't be made is then an error at once, and no thread waits minutes for it.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    ),
  )


def save_checkpoint(
  checkpoints: ocp.CheckpointManager,
  step: int,
  state: TrainState,
  data: BatchReader,
  config: Mapping,
) -> None:
  """Begins saving; returns as soon as the arrays are copied. Does nothing if `step` is already
  saved.

  Args:
    checkpoints: of `manager`.
    step: optimizer steps done.
    state: of the model and the optimizer.
    data: what training reads, between two steps.
    config: of `description`.
  """
  if checkpoints.latest_step() == step:
    return
  with saving(checkpoints):
    checkpoints.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(nest_leaves(state.trained, state.frozen)),
        opt=ocp.args.StandardSave(nest_leaves(state.opt)),
        data=ocp.args.JsonSave(data.get_state()),
        config=ocp.args.JsonSave(dict(config)),
      ),
      force=True,
    )


@contextlib.contextmanager
def saving(checkpoints: ocp.CheckpointManager) -> Generator[None]:
  """Around what may hear of a save that failed, now or in the background.

  Raises:
    SaveError: it did.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError:  # a process that is gone, whom `hosts` names
    raise
  except Exception as error:  # an OSError, TensorStore's ValueError, what a bucket's client raises
    steps = _finished(checkpoints.directory)
    last = f"the last good one is of step {steps[-1]}" if steps else "there is none yet"
    raise SaveError(
      f"a checkpoint could not be saved in {checkpoints.directory}: {one_line(error)[:500]}; "
      f"{last}. Make room there (or set config.train.keep_last lower), or bring the folder back; "
      "then the same command goes on from the last good one",
      where=str(checkpoints.directory),
      steps=steps,
    ) from error


def wait_until_saved(checkpoints: ocp.CheckpointManager) -> None:
  """Waits until all is saved.

  Raises:
    SaveError: it can't be.
  """
  with saving(checkpoints):
    checkpoints.wait_until_finished()
    checkpoints.check_for_errors()


@contextlib.contextmanager
def closing(checkpoints: ocp.CheckpointManager) -> Generator[ocp.CheckpointManager]:
  """Closes at the end; an error that ends the block is not hidden behind that of an unfinished
  save.
  """
  try:
    yield checkpoints
  except BaseException:
    with contextlib.suppress(Exception):
      checkpoints.close()
    raise
  checkpoints.close()


def restore_checkpoint(
  checkpoints: ocp.CheckpointManager,
  like: TrainState,
  data: BatchReader,
  config: Mapping,
  say: Callable[[str], Any] = print,
  wait: Callable[[float], None] = time.sleep,
) -> tuple[int, TrainState, bool] | None:
  """(step, state, whether the run was stopped before the evaluation after that step was done) of
  the newest checkpoint that can be read; None if there is none. Moves `data` in place.

  Those that can't be read are said, and moved to workdir/damaged, where a later save is not in
  their way. All processes take the same step. Arrays come in the shardings and dtypes of the
  ShapeDtypeStructs in `like`; arguments as of `save_checkpoint`. wait: lets seconds pass.

  Raises:
    ConfigError: the run was started with a config or data that this one can't continue, or by a
      version with another format.
    CheckpointError: there are checkpoints, and none can be read.
  """
  damaged: dict[int, str] = {}
  # all processes try those that process 0 sees, whatever the others see yet
  for step in hosts.gather(sorted(checkpoints.all_steps(), reverse=True))[0]:
    place = checkpoints.directory / str(step)
    for attempt in range(2):  # a bucket that was busy, or a file system that lags, is no damage
      if attempt:
        wait(AGAIN_AFTER)
      found, reason = _attempt(place, like, data, config)
      if all(hosts.gather(found is not None)) and found is not None:
        if damaged:
          _put_aside(checkpoints, damaged, say)
        return step, *found
    damaged[step] = reason or "another process can't read it"
    if jax.process_index() == 0:
      say(f"warning: checkpoint {place} is damaged and is skipped: {damaged[step]}")
  if damaged:
    raise tensor_files.CheckpointError(
      f"none of the checkpoints in {checkpoints.directory} can be read "
      f"({', '.join(map(str, damaged))}; see above). Bring one back from a copy, or set "
      "config.workdir to another folder to start afresh",
      where=str(checkpoints.directory),
      damaged=list(damaged),
    )
  return None


def _attempt(
  place: epath.Path, like: TrainState, data: BatchReader, config: Mapping
) -> tuple[tuple[TrainState, bool] | None, str]:
  """What `_restore` gives, or None and why."""
  try:
    return _restore(place, like, data, config), ""
  except (ConfigError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:  # whatever Orbax, TensorStore and JSON make of files that have changed
    return None, one_line(error)[:300] or type(error).__name__


def _restore(
  place: epath.Path, like: TrainState, data: BatchReader, config: Mapping
) -> tuple[TrainState, bool]:
  """The state of a step, and whether its evaluation is due; waits for no other process."""
  if missing := _lacks(place, "config", "params", "opt", "data"):
    raise ValueError(f"it lacks {missing}")
  only_files(place)
  saved = _config(place)
  if (version := saved.get("format", 1)) < FORMAT:
    raise ConfigError(
      f"{place.parent} holds step {place.name} in format {version}, {EARLIER[version]}. Go on "
      "with the version of xcomp_jax that began the run, or set config.workdir to another folder "
      "and config.init_from to an export of this one",
      where=str(place),
      format=version,
    )
  if changed := _changes(saved, config, FREE):
    raise ConfigError(
      f"{place.parent} holds step {place.name} of a run that this config can't continue: "
      f"{_in_words(changed, 'was', 'is')}. Set config.workdir to another folder to start afresh, "
      "with config.init_from from what this run learned (an export of it); or undo the change",
      where=str(place),
      changed=changed,
    )
  position = ocp.JsonCheckpointHandler().restore(place / "data")
  if position["step"] != int(place.name):
    raise ValueError(f"its data was read up to step {position['step']}")
  params, opt = _read(place / "params", like.trained, like.frozen), _read(place / "opt", like.opt)
  data.set_state(position)
  return TrainState(*params, *opt), saved.get("evaluation_due", False)


def _read(place: epath.Path, *like: Any) -> list[Any]:
  """The arrays of an item, as pytrees that share no path and together are all of it."""
  wanted = ocp.args.StandardRestore(nest_leaves(*like))
  leaves = flatten_dict(ocp.StandardCheckpointHandler().restore(place, args=wanted), sep="/")
  return [
    jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], state)
    for state in like
  ]


def _put_aside(
  checkpoints: ocp.CheckpointManager, steps: Mapping[int, str], say: Callable[[str], Any]
) -> None:
  """Moves checkpoints that can't be read to workdir/damaged, a file with the reason beside each;
  loses nothing.
  """
  aside = checkpoints.directory.parent / "damaged"
  if jax.process_index() == 0:
    aside.mkdir(exist_ok=True)
    for step, reason in steps.items():
      target = aside / str(step)
      if target.exists():
        target.rmtree()  # of an earlier time
      # also what makes the folder be there: a bucket has no empty ones
      (aside / f"{step}.txt").write_text(f"{reason}\n")
      (checkpoints.directory / str(step)).rename(target)
    say(f"moved to {aside}: {', '.join(map(str, sorted(steps)))}")
  multihost_utils.sync_global_devices("damaged checkpoints are put aside")
  checkpoints.reload()


def description(run: RunConfig, vlm: VLMConfig, data: Blend, heldout: Blend | None = None) -> dict:
  """What a checkpoint says about its run; plain JSON. data: what it trains on."""
  # As an export from another folder finds it; a hub id and a bucket stay what they are.
  place = {"init_from": absolute(run.init_from)} if os.path.isdir(run.init_from) else {}
  return json.loads(
    json.dumps(
      {
        "format": FORMAT,
        "run": to_dict(run) | place,
        "vlm": to_dict(vlm),
        "samples": len(data),
        "data": data.identity(),
        "heldout": None if heldout is None else heldout.identity(),
      }
    )
  )


def agree(config: Mapping, gather: Callable[[Any], list] = hosts.gather) -> None:
  """Makes sure that all processes run the same: else they would wait for each other for ever.

  gather: gives what each process says.

  Raises:
    ConfigError: in every process, if the `description` of one differs from the first's in more than
      PLACES.
  """
  first, *others = gather(config)
  for number, other in enumerate(others, 1):
    if changed := _changes(first, other, PLACES):
      words = _in_words(changed, "in process 0 is", f"in process {number}")
      raise ConfigError(
        f"the processes of this run differ: {words}. Give all of them the same config and data",
        changed=changed,
        process=number,
      )


def read_description(workdir: str, step: int | None = None) -> tuple[Mapping[str, Any], int]:
  """What `description` said when a checkpoint (default: the latest) was saved, and its step.

  As it was saved: a later version may have more keys.

  Raises:
    NoCheckpointError: there is no such checkpoint.
    CheckpointError: a part of it is missing.
    ConfigError: a later version wrote it, with another format.
  """
  place = _place(workdir, step)
  return _config(place, "params"), int(place.name)


def read_params(workdir: str, like: Any, step: int | None = None) -> Any:
  """All parameters of a checkpoint (default: the latest), without optimizer state.

  like: `nnx.State` of the whole model, of ShapeDtypeStructs; their dtypes and, if given, shardings
  are what comes.

  Raises:
    NoCheckpointError: there is no such checkpoint.
    CheckpointError: it is damaged.
  """
  place = _place(workdir, step)
  with reading_orbax(place):
    return _read(place / "params", like)[0]


def _place(workdir: str, step: int | None) -> epath.Path:
  """The folder of a checkpoint (None: the latest)."""
  path = folder(workdir)
  if not there(workdir):
    raise NoCheckpointError(f"no checkpoints in {workdir}: expected {path}", where=workdir)
  steps = _finished(path)
  if not steps or step not in (None, *steps):
    wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
    raise NoCheckpointError(
      f"no {wanted} in {path}; there are {steps or 'none'}", where=str(path), step=step, steps=steps
    )
  return path / str(steps[-1] if step is None else step)


def _lacks(place: epath.Path, *items: str) -> str:
  """Which of a step's items are not there, in words."""
  return ", ".join(item for item in items if not (place / item).is_dir())


def _config(place: epath.Path, *needed: str) -> Mapping[str, Any]:
  """What `description` said; an error if a step's folder lacks that or what else is needed, or is
  of a later format.
  """
  if missing := _lacks(place, "config", *needed):
    raise tensor_files.CheckpointError(
      f"{place} is damaged: it lacks {missing}; remove it to go on from the one before",
      where=str(place),
      missing=missing,
    )
  with reading_orbax(place / "config"):
    saved = ocp.JsonCheckpointHandler().restore(place / "config")
    version = int(saved.get("format", 1))  # the first ones did not say
  if version > FORMAT:
    raise ConfigError(
      f"{place.parent} holds step {place.name} in format {version}, this version of xcomp_jax "
      f"reads up to {FORMAT}; install a later one",
      where=str(place),
      format=version,
    )
  return saved


def _finished(path: epath.Path) -> list[int]:
  """Steps whose checkpoints are whole, as far as names say, or in a bucket the file that is written
  last.
  """
  try:
    return sorted(
      int(step.name)
      for step in path.iterdir()
      if step.name.isdigit() and ocp.utils.is_checkpoint_finalized(step)
    )
  except Exception:  # no such folder; `claim` says what is wrong with it
    return []


def _changes(old: Mapping, new: Mapping, free: Sequence[str]) -> dict[str, tuple[Any, Any]]:
  """What differs between two of `description`, by name: both values. Keys and groups in `free`
  may.
  """
  old, new = flatten_dict(old, sep="."), flatten_dict(new, sep=".")
  return {
    NAMES.get(key, key.replace("run.", "config.", 1)): (old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not any(f"{key}.".startswith(f"{name}.") for name in free)
  }


def _in_words(changed: Mapping[str, tuple[Any, Any]], was: str, now: str) -> str:
  return "; ".join(f"{name} {was} {old!r}, {now} {new!r}" for name, (old, new) in changed.items())
