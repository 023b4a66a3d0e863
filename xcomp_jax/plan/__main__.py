"""Says what a run takes on other devices: the command `python -m xcomp_jax.plan`."""

from xcomp_jax.plan.plan import main

if __name__ == "__main__":
  main()
