"""Reads a run's options as training will, without JAX, so that nothing is queued in vain: says what
is wrong with them, or nothing.

  python launch/check.py --config=configs/sct.py:7b --config.train.epochs=2

Exit code 1: something is wrong; 3: this Python can't tell, for it lacks absl-py, ml_collections or
what the config imports.
"""

import os
import pathlib
import sys


def main() -> int:
  """The command; its exit code."""
  # An own config may import what lies where the command runs, as with `python -m`.
  sys.path[:1] = [os.getcwd(), str(pathlib.Path(__file__).resolve().parents[1])]
  from xcomp_jax import config, config_io

  try:
    run = config_io.from_command_line(sys.argv)
    config.check_run(run)
    config.check_trained(run.model)
  except ImportError:
    return 3
  except config.ConfigError as error:
    # what is not here may be there where it trains
    lacks = isinstance(error.__cause__, ImportError)
    print(f"{'note' if lacks else 'error'}: {error}", file=sys.stderr)
    return 3 if lacks else 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
