"""Compares with what the official code computed: the command `python -m xcomp_jax.parity`."""

from xcomp_jax.parity.parity import main

if __name__ == "__main__":
  main()
