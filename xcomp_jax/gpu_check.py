"""Checks that a GPU computes the right numbers: the command `python -m xcomp_jax.gpu_check`."""

from xcomp_jax.bench.gpu_check import main

if __name__ == "__main__":
  main()
