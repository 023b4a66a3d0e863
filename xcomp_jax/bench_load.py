"""Measures what loading a checkpoint costs: the command `python -m xcomp_jax.bench_load`."""

from xcomp_jax.bench.load import main

if __name__ == "__main__":
  main()
