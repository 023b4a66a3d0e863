"""Makes a synthetic world of long videos: the command `python -m xcomp_jax.world`."""

from xcomp_jax.synthetic.world import main

if __name__ == "__main__":
  main()
