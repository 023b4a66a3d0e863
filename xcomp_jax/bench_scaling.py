"""Measures time and memory: the command `python -m xcomp_jax.bench_scaling`."""

from xcomp_jax.bench.scaling import main

if __name__ == "__main__":
  main()
