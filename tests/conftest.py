"""The suite runs on 8 virtual CPU devices, in float32 at highest precision, with a compile cache."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()  # grain's readers look at absl flags
jax.config.update("jax_default_matmul_precision", "highest")

REFERENCE = pathlib.Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def reference() -> pathlib.Path:
  """Small copies of the official code's outputs."""
  return REFERENCE
