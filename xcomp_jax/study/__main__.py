"""Repeats the paper in miniature: the command `python -m xcomp_jax.study`."""

from xcomp_jax.study.study import main

if __name__ == "__main__":
  main()
