"""Writes task files for lmms-eval: the command `python -m xcomp_jax.lmms_tasks`.

Task files name the functions here, so they keep this address.
"""

from xcomp_jax.evaluation.lmms_tasks import macro, main, micro, scored, text, visual

__all__ = ["macro", "main", "micro", "scored", "text", "visual"]

if __name__ == "__main__":
  main()
