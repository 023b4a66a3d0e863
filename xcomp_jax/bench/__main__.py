"""Measures how fast every part is: the command `python -m xcomp_jax.bench`."""

from xcomp_jax.bench.bench import main

if __name__ == "__main__":
  main()
