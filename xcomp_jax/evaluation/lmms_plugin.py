"""xcomp_jax as a model of lmms-eval, which finds it by itself (entry point `lmms_eval.models`;
docs/EVALUATION.md).

  lmms-eval --model xcomp_jax --model_args checkpoint=exports/sct,out=answers,preset=paper --tasks
  xcomp_lvbench ...

`model_args` are the options of `evaluate` with underscores. All requests come at once, so every
video is encoded once, the answers are on disk under `out` at once, and the same command continues a
run that was killed. Nothing else of this package imports this file or lmms-eval.
"""

import argparse
import dataclasses
import hashlib
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from xcomp_jax import cli, files
from xcomp_jax.evaluation.answers import Answers, AnswersError, Wanted, failures
from xcomp_jax.evaluation.lmms_tasks import FAILED, PREFIX
from xcomp_jax.evaluation.presets import preset
from xcomp_jax.evaluation.runner import answer_wanted
from xcomp_jax.inference.prepared import prepare_model
from xcomp_jax.inference.settings import (
  COMPILED,
  AskSettings,
  add_options,
  option_of,
  settings_of,
)
from xcomp_jax.inference.video_model import mesh_of_command

LOG = logging.getLogger(__name__)
GIVEN = {"max_new_tokens", "temperature", "top_p", "top_k"}  # by a task, in place of the settings
# read below, or without meaning for a greedy answer
IGNORED = {
  "do_sample",
  "num_beams",
  "until",
  "repetition_penalty",
}


def manifest() -> ModelManifest:
  """How lmms-eval finds the model."""
  return ModelManifest(
    model_id="xcomp_jax", simple_class_path="xcomp_jax.evaluation.lmms_plugin.XComp"
  )


class XComp(lmms):
  """A checkpoint that answers lmms-eval's requests."""

  def __init__(
    self,
    checkpoint: str,
    out: str,
    preset: str = "paper",
    ahead: int = 1,
    devices: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    max_batch_size: int | None = None,
    **more: Any,
  ):
    """model_args; `more` are those of `settings.add_options`. The last line's are the harness's
    own, only --batch_size has an effect: the questions about a video that are answered together.
    """
    super().__init__()
    self.out, self.preset, self.ahead, self.devices = pathlib.Path(out), preset, int(ahead), devices
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
      raise AnswersError(
        f"--batch_size {batch_size}: must be a number from 1 on, of questions about a video "
        f"answered together",
        where="--batch_size",
        value=batch_size,
      )
    self.batch = int(batch_size)
    given = {"checkpoint": checkpoint} | more
    self.options = [f"{option_of(key)}={value}" for key, value in given.items()]
    self.device = "cpu"  # where the harness puts the counts that its processes exchange
    self._settings("", {})  # what is wrong with the options shows at once

  def _settings(self, task: str, wishes: dict[str, Any]) -> AskSettings:
    """The settings of a task: the preset's, then model_args, then what the task itself asks for."""
    parser = argparse.ArgumentParser(prog="--model_args of xcomp_jax")
    add_options(parser)
    if self.preset != "none":
      parser.set_defaults(**preset(self.preset, task or "mlvu"))
    args = parser.parse_args(self.options)
    self.mesh = mesh_of_command(args)
    cli.keep_compiled(args.compilation_cache, COMPILED)
    if unknown := sorted(set(wishes) - GIVEN - IGNORED):
      LOG.warning(
        "xcomp_jax does not know the generation_kwargs %s of task %s", ", ".join(unknown), task
      )
    if int(wishes.get("num_beams") or 1) != 1:
      raise AnswersError(
        f"task {task} asks for {wishes['num_beams']} beams; xcomp_jax has none: --gen_kwargs "
        f"num_beams=1",
        where="num_beams",
        value=wishes["num_beams"],
      )
    given = {key: wishes[key] for key in GIVEN & set(wishes) if wishes[key] is not None}
    if not wishes.get("do_sample"):
      given["temperature"] = 0.0
    return dataclasses.replace(settings_of(args), **given)  # `prepare_model` checks them

  def generate_until(self, requests: Sequence[Instance]) -> list[str]:
    """Answers in the order of the requests.

    Raises:
      CheckpointError, ConfigError, AnswersError: bad settings, by name; requests about anything but
      one video or image.
    """
    answers: dict[tuple[str, str], str] = {}
    asked = [(request.args[4], self._wanted(request), request.args[1]) for request in requests]
    for task in dict.fromkeys(task for task, _, _ in asked):
      wanted = [w for name, w, _ in asked if name == task]
      wishes = next(kwargs for name, _, kwargs in asked if name == task)
      for w, answer in zip(wanted, self._answers(task, wanted, wishes), strict=True):
        answers[task, w.key] = answer
    return [answers[task, w.key] for task, w, _ in asked]

  def _answers(self, task: str, wanted: list[Wanted], wishes: dict[str, Any]) -> list[str]:
    reader = prepare_model(self._settings(task.removeprefix(PREFIX), wishes))
    share = (self.rank, self.world_size)
    by_key = {w.key: w for part in _gathered(wanted, self.world_size) for w in part}
    everything = sorted(by_key.values(), key=lambda w: (str(w.video), w.key))
    how = {"batch": self.batch, "preset": self.preset}
    with Answers(self.out / task, reader, share, how=how) as folder:
      answer_wanted(
        reader,
        everything,
        folder,
        share=share,
        devices=self.devices,
        mesh=self.mesh,
        ahead=self.ahead,
        batch=self.batch,
      )
    for lines in _gathered(folder.lines, self.world_size):
      folder.lines |= {
        key: line for key, line in lines.items() if "answer" in line or key not in folder.lines
      }
    failed = failures([folder.lines.get(w.key, {}) for w in everything], "video")
    if self.rank == 0:
      made = {"made_with": folder.settings, "sessions": folder.sessions(), "failed": failed}
      files.write_json(folder.folder / "run.json", made, indent=2)
      for video in failed:
        LOG.error("%s (%d questions): %s", video["video"], video["questions"], video["error"])
    stops = wishes.get("until") or []
    stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
    out = []
    for w in wanted:
      answer = folder.answer(w)
      for stop in stops:
        answer = answer and answer.split(stop)[0]
      out.append(FAILED if answer is None else answer)
    return out

  def _wanted(self, request: Instance) -> Wanted:
    context, _, visual, number, task, split = request.args
    try:
      seen = visual(self.task_dict[task][split][number]) or []
      part = seen[1] if len(seen) == 2 and isinstance(seen[1], dict) else {}
      if len(seen) - bool(part) != 1:
        raise AnswersError(
          f"task {task}, document {number}: xcomp_jax needs one video or image, and here are "
          f"{len(seen)}",
          where=task,
          found=len(seen),
        )
      return Wanted(self._file(seen[0]), context, part.get("start"), part.get("end"))
    except AnswersError:
      raise
    except (
      Exception
    ) as error:  # a picture that can't be read costs its own question, by a file that is not there
      LOG.error("task %s, document %s: %s: %s", task, number, type(error).__name__, error)
      return Wanted(self.out / "pictures" / f"unreadable, document {number} of {task}", context)

  def _file(self, seen: Any) -> pathlib.Path:
    """A path; pictures that the harness holds in memory are put on disk."""
    if isinstance(seen, str):
      return pathlib.Path(seen)
    if not hasattr(seen, "tobytes") or not hasattr(seen, "save"):
      raise AnswersError(
        f"xcomp_jax answers about videos and images, not about {type(seen).__name__}",
        where=type(seen).__name__,
      )
    picture = seen.convert("RGB")
    file = (
      self.out
      / "pictures"
      / f"{hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()}.png"
    )
    if not file.exists():
      file.parent.mkdir(parents=True, exist_ok=True)
      with files.replacing(file) as temporary:
        picture.save(temporary, "PNG")
    return file

  def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
    """Not offered: the protocols here generate."""
    raise NotImplementedError(
      "xcomp_jax generates answers; choose a task of output_type generate_until"
    )

  def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
    """Not offered."""
    raise NotImplementedError(
      "xcomp_jax answers single questions; choose a task of output_type generate_until"
    )


def _gathered(value: Any, processes: int) -> list[Any]:
  """The value of every process of lmms-eval."""
  if processes == 1:
    return [value]
  from torch import distributed

  out = [None] * processes
  distributed.all_gather_object(out, value)
  return out
