"""Lengths of samples, for tests that read no data."""

import numpy as np


def mixture(n: int, seed: int = 0) -> np.ndarray:
  """Lengths distributed about as those of the paper's data."""
  rng = np.random.default_rng(seed)
  frames = rng.choice([1, 128, 144, 288, 864, 1024], n, p=[0.18, 0.24, 0.28, 0.12, 0.09, 0.09])
  text = np.clip(rng.lognormal(5.1, 0.75, n), 30, 3200).astype(int)
  return np.stack([frames, np.where(frames > 1, 8, 1), np.full(n, 14), text], 1)
