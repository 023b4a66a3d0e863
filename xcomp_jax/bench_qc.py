"""Counts what QC-Comp costs: the command `python -m xcomp_jax.bench_qc`."""

from xcomp_jax.bench.qc import main

if __name__ == "__main__":
  main()
