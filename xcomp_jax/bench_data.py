"""Measures pre-decoding: the command `python -m xcomp_jax.bench_data`."""

from xcomp_jax.bench.data import main

if __name__ == "__main__":
  main()
