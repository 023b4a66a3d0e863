"""Tunes a model: the command `python -m xcomp_jax.train`."""

from xcomp_jax.training.loop import main

if __name__ == "__main__":
  main()
