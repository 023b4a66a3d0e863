"""Measures what a question takes: the command `python -m xcomp_jax.bench_evaluate`."""

from xcomp_jax.bench.evaluation import main

if __name__ == "__main__":
  main()
