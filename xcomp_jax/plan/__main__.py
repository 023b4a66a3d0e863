"""Says what a run takes on devices that need not be here: the command `python -m xcomp_jax.plan`."""

from xcomp_jax.plan.plan import main

if __name__ == "__main__":
  main()
