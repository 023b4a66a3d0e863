"""Looks for needles in a haystack: the command `python -m xcomp_jax.needles`."""

from xcomp_jax.evaluation.needles import main

if __name__ == "__main__":
  main()
