r"""Says what a run would take, and whether it fits, before there is a pod.

It compiles the run's programs for a topology.

  python -m xcomp_jax.plan --config=configs/sct.py --topology=v5e:4x4
  python -m xcomp_jax.plan --config=configs/sct.py:7b --topology=v5p:2x2x2 --programs gradient \
      apply --text 2048
  python -m xcomp_jax.plan --config=configs/sct.py --topology=v5e:4x4 --lengths FILE --quick
  python -m xcomp_jax.plan --config=configs/sct.py --lengths FILE --devices 1,8,32,256 --chip v5e
  python -m xcomp_jax.plan --config=configs/sct.py --topology=h100:8 --layers 2
  python -m xcomp_jax.plan --config=configs/sct.py --fits fits --cards h100 l4

The compiler of TPUs (pip install 'xcomp_jax[plan]') or of NVIDIA's GPUs ('xcomp_jax[plan-gpu]')
does it, and needs none of them; without --topology the programs are compiled for the devices that
are here. Programs are those of training (a gradient step for each shape of micro-batches, the
tower, the optimizer's step, evaluation) and of asking (the tower, prefill, a round that scores
frames, the question's rows, a token of the answer). With --lengths FILE (JSON, {"frames": [...],
"text": [...]}, a number per sample) or --data STORE (a folder written by predecode) mesh and
shapes are those that training on these samples has and the seconds of an average step are
predicted. Without, samples of 1,024 frames and 512 tokens fill a row each. Lengths without
--topology print a table of what the whole run takes at least, and nothing is compiled.

With all 28 layers a program takes many minutes; --quick has the compiler try less hard, --layers
2 compiles two layers and extrapolates. Ends with exit code 1 if something does not fit, and says
what would help.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xcomp_jax.checkpoints import finding, loading
from xcomp_jax.cli import command
from xcomp_jax.config import ConfigError, RunConfig, VLMConfig, check_trained
from xcomp_jax.config_io import from_command_line
from xcomp_jax.data.batch import Length
from xcomp_jax.data.blend import measure_lengths
from xcomp_jax.errors import XCompError
from xcomp_jax.files import expanduser, path_of
from xcomp_jax.parallel.mesh import LOGICAL, PARAMETERS, path_name
from xcomp_jax.plan import fits, programs
from xcomp_jax.plan.accounts import ProgramAccount, account_program
from xcomp_jax.plan.describe import describe_program, problems, size_text, step_lines
from xcomp_jax.plan.programs import NAMES, TRAINING, ProgramPlan, bytes_held
from xcomp_jax.plan.table import read_lengths, run_table
from xcomp_jax.training.prepare import open_data

SHOWN = 2  # of the arrays that are not split
LARGE = 4 * 2**20  # bytes on every device from which on an array should be split
DEVICES = "1,8,32,256"  # of the table


_say = functools.partial(print, flush=True)


class PlanError(XCompError, ValueError):
  """Something does not fit, or is not split; the message says by how much and what would help.

  where: the programs that do not fit, or the arrays that are not split.
  """


def unsplit(state: Any, mesh: Mesh) -> dict[str, str]:
  """Large arrays that an axis for parameters does not split, although it could: by name, and in
  words, with what that costs.

  state: ShapeDtypeStructs with shardings.
  """
  axes = {axis for _, names in PARAMETERS for name in names if name for axis in LOGICAL[name]}
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    used = {name for names in leaf.sharding.spec for name in np.atleast_1d(names) if name}
    here, size = leaf.sharding.shard_shape(leaf.shape), bytes_held(leaf)
    parts = {axis: mesh.shape[axis] for axis in sorted(axes - used)}
    could = [axis for axis, n in parts.items() if n > 1 and any(side % n == 0 for side in here)]
    if size >= LARGE and could:
      n, name = parts[could[0]], path_name(path)
      found[name] = (
        f"{name} {list(leaf.shape)} takes {size_text(size)} on every device, and would take "
        f"{size_text(size / n)} if {could[0]} = {n} split it; give it a rule in mesh.PARAMETERS"
      )
  return found


def check_split(plan: ProgramPlan) -> None:
  """Checks that every large array of training is split.

  Raises:
    PlanError: one is not.
  """
  _, _, state, sums = programs.abstract_training(plan, plan.full)
  found = [*unsplit(state, plan.mesh).items(), *unsplit(sums, plan.mesh).items()]
  if not found:
    return
  more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
  odd = [f"{axis} = {n}" for axis, n in plan.mesh.shape.items() if n & (n - 1)]
  if odd:
    more += (
      f". {' and '.join(odd)} can't split most arrays: take 1, 2, 4, 8, ... devices, or another "
      f"mesh, such as --config.mesh.data={plan.mesh.size}"
    )
  raise PlanError(
    "; ".join(words for _, words in found[:SHOWN]) + more, where=[name for name, _ in found]
  )


# --- the command
# ----------------------------------------------------------------------------------------


def account_programs(
  plan: ProgramPlan,
  names: Sequence[str],
  say: Callable[[str], None] = _say,
  account: Callable[..., ProgramAccount] = account_program,
) -> list[ProgramAccount]:
  """Accounts for each program, and says so.

  Raises:
    PlanError: something does not fit, or a large array is not split.
    ConfigError: programs of training in a dtype that it has not.
  """
  cfg = plan.full
  if set(names) & set(TRAINING):
    check_trained(plan.config.model)
  say(
    f"{plan.device.count} x {plan.device.kind}, mesh {dict(plan.mesh.shape)}; "
    f"{plan.config.init_from}: {cfg.llm.layers} layers of width {cfg.llm.width}, tower of "
    f"{cfg.vision.layers}"
  )
  check_split(plan)
  accounts = []
  for name, shape in programs.asked_programs(plan, names):
    accounts.append(account(plan, name, shape))
    say(describe_program(plan, accounts[-1]))
  for line in step_lines(plan, accounts):
    say(line)
  if found := problems(plan, accounts):
    words = "\n".join(words for _, words in found)
    raise PlanError(words, where=[name for name, _ in found])
  if plan.device.hbm:
    say("all of it fits")
  return accounts


def stored_lengths(config: RunConfig, cfg: VLMConfig, store: str) -> list[Length]:
  """Measures the samples of a store as training does.

  Raises:
    StoreError: no such store, or a broken one.
    ConfigError: one that is not for this model.
    CheckpointError, ...: there is no tokenizer.
  """
  data = open_data(store, cfg)
  return measure_lengths(
    data, loading.read_tokenizer(finding.resolve(config.init_from), cfg), config.data.mask
  )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m xcomp_jax.plan",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog="Every other option overrides the config, as in training: --config.mesh.tensor=2",
  )
  add = parser.add_argument
  add(
    "--topology",
    help=(
      "a TPU version and shape, such as v5e:4x4, or a GPU and how many, h100:8, on hosts "
      "h100:2x8; default: the devices that are here"
    ),
  )
  names = f"default: all of {' '.join(NAMES)}"
  add("--programs", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=names)
  add("--layers", type=int, help="compile so many layers only, and extrapolate")
  add(
    "--quick",
    action="store_true",
    help="the compiler's least effort: an eighth of the time, more temporaries",
  )
  add(
    "--frames",
    type=int,
    help="of samples that fill a row each; default: config.data.shapes, or 1024",
  )
  add("--text", type=int, help="their tokens behind the frames; default: likewise, or 512")
  of = parser.add_mutually_exclusive_group().add_argument
  of("--lengths", type=path_of, metavar="FILE", help="of samples: JSON, frames and text of each")
  of(
    "--data",
    type=expanduser,
    metavar="STORE",
    help="measure the samples of a folder written by predecode instead",
  )
  add("--devices", metavar="N,N", help=f"of the table of --lengths or --data; default: {DEVICES}")
  add("--chip", default="v5e", help="their kind; default: %(default)s")
  add(
    "--fits",
    type=path_of,
    metavar="OUT",
    help="instead: a table of what fits on which GPU; OUT keeps its cells, and the command goes on",
  )
  add(
    "--cards",
    nargs="+",
    choices=fits.CARDS,
    metavar="CARD",
    help=f"with --fits; default: all of {' '.join(fits.CARDS)}",
  )
  return parser


def check_together(args: argparse.Namespace) -> None:
  """Checks that options go together.

  Raises:
    ConfigError: some do not.
  """
  given = args.lengths is not None or args.data is not None
  own = (args.topology, args.layers, args.frames, args.text) == (None,) * 4
  own &= not (given or args.quick) and tuple(args.programs) == NAMES
  for option, wrong, words in (
    (
      "--frames",
      given and (args.frames, args.text) != (None, None),
      "--frames and --text are of samples that are assumed, so there can be no --lengths or --data",
    ),
    (
      "--devices",
      args.devices is not None and (not given or args.topology),
      "--devices is of the table of --lengths or --data without --topology",
    ),
    (
      "--fits",
      args.fits and not own,
      "--fits makes a table of its own programs; of the other options only --cards and "
      "--config... go with it",
    ),
    (
      "--cards",
      args.cards is not None and not args.fits,
      "--cards are those of the table of --fits",
    ),
  ):
    if wrong:
      raise ConfigError(words, where=option)


def main(argv: Sequence[str] | None = None) -> None:
  """The command."""
  args, rest = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
  with command(interrupted="interrupted"):
    check_together(args)
    if args.topology or args.fits or (args.lengths, args.data) != (None, None):
      jax.config.update("jax_platforms", "cpu")  # a TPU that is here is left alone
    config = from_command_line(["plan", *rest])
    if args.fits:
      print(fits.fits_table(config, args.fits, args.cards or fits.CARDS))
      return
    cfg, lengths = programs.model_sizes(config), None
    if args.data is not None:
      lengths = stored_lengths(config, cfg, args.data)
    elif args.lengths is not None:
      lengths = read_lengths(args.lengths, cfg)
    if lengths is not None and args.topology is None:
      print(run_table(config, cfg, lengths, args.devices or DEVICES, args.chip))
      return
    plan = programs.make(
      config,
      args.topology,
      layers=args.layers,
      frames=args.frames,
      text=args.text,
      lengths=lengths,
      effort=-1.0 if args.quick else 0.0,
    )
    account_programs(plan, args.programs)
