"""LP-Comp: between the layers, the tokens of every group thin out to one (paper 3.2, FACTS.md 1).

Pure functions on static shapes: no parameters and no state. A group is `group` (16) *consecutive
visual tokens* of the sequence, not the tokens of one frame. Before layer l every group is reduced
from the count of layer l - 1 to its own; positions are renumbered by the decoder.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from xcomp_jax.config import ConfigError, LPCompConfig


def counts(cfg: LPCompConfig, layers: int) -> tuple[int, ...]:
  """Tokens per group that each layer processes.

  "cosine" rounds half up as the released code does, "cosine_ceil" is the paper's Eq. 1; a tuple of
  `layers` integers is taken as it is (step-wise schedules). With keep="none" every layer sees whole
  groups.

  Raises:
    ConfigError: a list of another length, increasing, or outside 1..group; an unknown name.
  """
  g = cfg.group
  if cfg.keep == "none":
    return (g,) * layers
  if isinstance(cfg.schedule, str):
    # Layer l runs after l + 1 steps of the curve, so that the last one reaches 1. The 1e-9 keeps
    # the rounding of cos away from integers.
    curve = [(g - 1) / 2 * (1 + math.cos(math.pi * (l + 1) / layers)) for l in range(layers)]
    if cfg.schedule == "cosine":
      return tuple(1 + math.floor(c + 0.5 + 1e-9) for c in curve)
    if cfg.schedule == "cosine_ceil":
      return tuple(1 + math.ceil(c - 1e-9) for c in curve)
    raise ConfigError(
      f"lp_comp.schedule = {cfg.schedule!r}: known are 'cosine', 'cosine_ceil', or a list of "
      f"{layers} counts",
      where="lp_comp.schedule",
      value=cfg.schedule,
      allowed=("cosine", "cosine_ceil"),
    )
  if (
    len(cfg.schedule) != layers
    or any(not 1 <= n <= g for n in cfg.schedule)
    or any(a < b for a, b in itertools.pairwise(cfg.schedule))
  ):
    raise ConfigError(
      f"lp_comp.schedule = {cfg.schedule}: expected {layers} counts (one per layer), none above "
      f"the one before, within 1..{g}",
      where="lp_comp.schedule",
      value=cfg.schedule,
      counts=layers,
      most=g,
    )
  return tuple(cfg.schedule)


def survivors(cfg: LPCompConfig, layers: int) -> tuple[tuple[int, ...], ...]:
  """Which tokens of a group (0-based, by their first place) each layer processes.

  "suffix" keeps the last ones, "stride" the last of each of equal windows (the release's older
  rule), "uniform" the released greedy lists, "none" all. "avgpool" and "attention", which don't
  only select, have as many as "suffix".

  Raises:
    ConfigError: another rule.
  """
  kept, out = tuple(range(cfg.group)), []
  for n in counts(cfg, layers):
    if cfg.keep == "uniform":
      kept = _thin_evenly(kept, n, cfg.group)
    elif cfg.keep == "stride":
      kept = tuple(kept[(i + 1) * len(kept) // n - 1] for i in range(n))
    elif cfg.keep in ("suffix", "none", "avgpool", "attention"):
      kept = kept[len(kept) - n :]
    else:
      raise ConfigError(f"keep = {cfg.keep!r} has no rule", where="lp_comp.keep", value=cfg.keep)
    out.append(kept)
  return tuple(out)


def only_selects(cfg: LPCompConfig) -> bool:
  """Whether what stays is known before a layer has run, and stays as it is: what goes need not be
  finished.
  """
  return cfg.keep not in ("avgpool", "attention")


@dataclasses.dataclass(frozen=True)
class LayerTokens:
  """The tokens of a group at one layer, as `survivors` names them.

  arriving: those that the layer before hands on. seen: those that the layer has queries, keys and
  values of. leaving: those of its rows that it finishes and hands on.
  """

  arriving: tuple[int, ...]
  seen: tuple[int, ...]
  leaving: tuple[int, ...]


def layer_tokens(cfg: LPCompConfig, layers: int) -> tuple[LayerTokens, ...]:
  """What each layer gets, sees and hands on.

  Under a rule that only selects, a layer hands on what the next one sees: what that one drops is
  needed as keys and values here, and no further.
  """
  seen = survivors(cfg, layers)
  leaving = (*seen[1:], seen[-1]) if only_selects(cfg) else seen
  arriving = (tuple(range(cfg.group)), *leaving[:-1])
  return tuple(LayerTokens(*tokens) for tokens in zip(arriving, seen, leaving, strict=True))


def _thin_evenly(kept: tuple[int, ...], n: int, group: int) -> tuple[int, ...]:
  """Greedy removal of the released lists: each time the token whose loss leaves the most even
  spacing.
  """
  while len(kept) > n:
    m = len(kept) - 1
    even = [(j + 1) / m * group for j in range(m - 1)]  # the last token is no part of the sum
    rest = [kept[:i] + kept[i + 1 :] for i in range(len(kept))]
    kept = min(rest, key=lambda r: sum((e - (t + 1)) ** 2 for e, t in zip(even, r, strict=False)))
  return kept


def reduce(
  x: Float[Array, "B N *D"], cfg: LPCompConfig, before: Sequence[int], after: Sequence[int]
) -> Float[Array, "B M *D"]:
  """Thins every group of visual tokens.

  Args:
    x: [B, G * len(before), ...], groups of the tokens `before`.
    cfg: keep is one of the rules on static places; "attention" has a function of its own below.
    before: `survivors` of the layer that has run.
    after: `survivors` of the layer that comes.

  Returns:
    [B, G * len(after), ...]; nothing is computed on kept states except by "avgpool", which averages
    windows.
  """
  n, m = len(before), len(after)
  if n == m:
    return x
  B, _, *D = x.shape
  x = x.reshape(B, -1, n, *D)
  if cfg.keep == "suffix":
    x = x[:, :, n - m :]
  elif cfg.keep == "avgpool":
    x = jnp.einsum("bgn...,mn->bgm...", x, jnp.asarray(_windows(n, m), x.dtype))
  else:
    x = x[:, :, np.searchsorted(before, after)]
  return x.reshape(B, -1, *D)


def _windows(n: int, m: int) -> np.ndarray:
  """float[m, n]: the mean over m windows that cover n tokens; windows share a token where m does
  not divide n.
  """
  i, j = np.arange(m)[:, None], np.arange(n)
  inside = (j >= i * n // m) & (j < -(-(i + 1) * n // m))
  return inside / inside.sum(1, keepdims=True)


def keep_attended(
  x: Float[Array, "B N D"],
  score: Float[Array, "B N"],
  valid: Bool[Array, "B N"],
  keep: Int[Array, " B"],
  slots: int,
) -> Float[Array, "B slots D"]:
  """VideoChat-Flash's own drop, the paper's heuristic baseline (FACTS.md 13): the most attended
  tokens stay, in order.

  Args:
    x: [B, N, D] visual tokens, right-padded.
    score: float32[B, N], attention that the query paid to each.
    valid: bool[B, N].
    keep: int32[B], tokens to keep of each sample.
    slots: static length of the result.

  Returns:
    [B, slots, D], right-padded; of equal scores the earlier token stays.
  """
  N = x.shape[1]
  order = jnp.argsort(jnp.where(valid, -score, jnp.inf), axis=1, stable=True)
  rank = jnp.argsort(order, axis=1, stable=True)
  place = jnp.where(rank < keep[:, None], jnp.arange(N), N)
  kept = jnp.sort(place, axis=1)[:, :slots]
  return jnp.take_along_axis(x, jnp.minimum(kept, N - 1)[..., None], axis=1)
