"""Attention in tiles of queries and keys, for CPUs: scores of a tile stay in the cache, and tiles
that nothing is seen of are left out.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from xcomp_jax.model.layout import even_size, from_blocks, in_blocks, moved, sample_order
from xcomp_jax.model.softmax import MASKED, attend_in_blocks, raise_maxima

# queries and keys at once, causal; larger ones are hardly faster on a CPU, and compute more for
# nothing
TILE = 384
TALL, WIDE = 8192, 256  # and where all see all; docs/LOG.md has the measurements
SMALL = 1e-30  # sum of weights that none has but a row that sees nothing
LARGE = 1e30  # sum of weights that float32 holds with room to spare

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def tile_sizes(L: int, S: int, causal: bool, tile: int = TILE) -> tuple[int, int]:
  """Returns the even number of queries and keys of a tile, `tile` at most where it is causal."""
  most = (tile, tile) if causal else (TALL, WIDE)
  rows, keys = (even_size(length, size) for length, size in zip((L, S), most))
  return rows + rows % 2, keys + keys % 2


def tiled_scores(L: int, S: int, causal: bool) -> int:
  """How many scores of a head are computed: what lies in tiles of which something is seen."""
  rows, keys = tile_sizes(L, S, causal)
  ends = [min((i + 1) * rows + S - L, S) if causal else S for i in range(-(-L // rows))]
  return sum(rows * keys * -(-end // keys) for end in ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_tiled(q, k, v, valid, causal):
  """Attention of one sample a row; `valid`: bool[B, S], the keys that count."""
  return causal_attention(q, k, v, valid) if causal else full_attention(q, k, v, valid)


def _tiled_backward(causal, saved, gradient):
  *qkv, valid = saved
  back = jax.vjp(lambda q, k, v: attend_in_blocks(q, k, v, valid, causal), *qkv)[1]
  return *back(gradient), None


attend_tiled.defvjp(
  lambda q, k, v, valid, causal: (attend_tiled(q, k, v, valid, causal), (q, k, v, valid)),
  _tiled_backward,
)


def attend_samples(q, k, v, sample, tile=TILE):
  """Causal attention of several samples in a row; `sample`: int32[B, S], as of AttentionMask."""
  order, place, start = sample_order(sample)
  q, k, v = (moved(x, order, place) for x in (q, k, v))
  return moved(_attend_ranges(q, k, v, start, tile), place, order)


@functools.partial(jax.jit, static_argnames="tile")
def causal_attention(q, k, v, valid, start=None, tile=TILE):
  """Jitted for a name in programs and profiles, by which `cost.count_flops` knows it.

  start: int32[B, S], the first key that each row sees; None: key 0.
  """
  return _over_tiles(q, k, v, valid, True, tile, start)


@jax.jit
def full_attention(q, k, v, valid):
  """Likewise where rows see all keys: all queries of a head against a few keys, whose scores a
  CPU's cache holds.
  """
  K = k.shape[2]

  def heads(x):  # -> [K, B, L, H / K, h]
    return jnp.moveaxis(x.reshape(*x.shape[:2], K, -1, x.shape[-1]), 2, 0)

  out = jax.lax.map(
    lambda qkv: _over_tiles(*qkv, valid, False), (heads(q), heads(k), heads(v))
  )  # [K, B, L, H / K, h]
  return jnp.moveaxis(out, 0, 2).reshape(q.shape)


def _by_key_head(x, K, size):
  """Tiles of `size` slots, in which a key head's queries are rows of one matrix.

  [B, L, H, h] -> [n, B, K, G * size, h]
  """
  B, L, H, h = x.shape
  x = in_blocks(x.reshape(B, L, K, H // K, h), size)  # [n, B, size, K, G, h]
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, K, H // K * size, h)


def _by_slot(x, size, length):
  """Undoes `_by_key_head`: [n, B, K, G * size, h] -> [B, L, H, h]."""
  n, B, K, _, h = x.shape
  x = x.reshape(n, B, K, -1, size, h).transpose(0, 1, 4, 2, 3, 5)  # [n, B, size, K, G, h]
  return from_blocks(x.reshape(n, B, size, -1, h), length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _QueryTile:
  """A tile of queries, and all tiles of keys and values.

  q: [B, K, R, h + 1], R = G * rows. k, v: [m, B, K, t, h + 1].
  length: S, behind which keys are padding.
  slot: int[R, 1], of every row; None: rows see all keys.
  start: int32[B, 1, R, 1], the first key that each row sees; None: key 0.
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  length: int
  slot: Any = None
  start: Any = None

  def scores(self, j):
    """[B, K, R, t], with tile j of the keys."""
    return _product("bkrh,bkth->bkrt", self.q, self.k[j])

  def weigh(self, weights, j):
    """[B, K, R, h + 1], sums of the values of tile j by weights [B, K, R, t]."""
    return _product("bkrt,bkth->bkrh", weights.astype(self.v.dtype), self.v[j])

  def edge_scores(self, j):
    """`scores` of a tile of which not all rows see all keys."""
    slots = j * self.k.shape[3] + jnp.arange(self.k.shape[3])
    seen = slots < self.length
    if self.slot is not None:
      seen &= slots <= self.slot
    if self.start is not None:
      seen &= slots >= self.start
    return jnp.where(seen, self.scores(j), MASKED)

  def add_exactly(self, scores, first, end, carry):
    """Adds the tiles from `first` to `end` to (largest scores [B, K, R], sums [B, K, R, h + 1]).

    scores: of a tile, one of the functions above.
    """

    def add(j, carry):
      largest, out = carry
      largest, shrink, weights = raise_maxima(largest, scores(j))
      return largest, out * shrink[..., None] + self.weigh(weights, j)

    return jax.lax.fori_loop(first, end, add, carry)

  def add_inner(self, first, end, carry):
    """Adds the tiles from `first` to `end`, which all rows see whole, by the maxima so far.

    Where weights grow too large for float32 that is done again, with all maxima.
    """
    largest, begun = carry
    out = jax.lax.fori_loop(
      first,
      end,
      lambda j, out: out + self.weigh(jnp.exp(self.scores(j) - largest[..., None]), j),
      begun,
    )

    return jax.lax.cond(
      out[..., -1].max() < LARGE,
      lambda: out,
      lambda: self.add_exactly(self.scores, first, end, carry)[1],
    )


def _over_tiles(q, k, v, valid, causal, tile=TILE, start=None):
  """Softmax from tile to tile (Milakov and Gimelshein, "Online normalizer calculation for
  softmax").

  For each tile of queries a loop over the tiles of keys on the edge of what is seen, and one over
  those that all of them see. On a CPU going along rows costs as much as an eighth of a matrix
  product: one more column of the keys adds what masks padding, one more of the values, all ones,
  adds up the weights, and the maximum is that of the edge: any number near it would do.

  Rows with a `start` see keys from there on: the tiles around these starts are an edge, too, and
  those before are left out.
  """
  L, H, h = q.shape[1:]
  S, K = k.shape[1:3]
  offset = S - L
  rows, keys = tile_sizes(L, S, causal, tile)

  def widened(x, column):  # [..., h] -> [..., h + 1]
    return jnp.concatenate([x, jnp.broadcast_to(column, (*x.shape[:3], 1)).astype(x.dtype)], -1)

  wide_k = widened(k, jnp.where(valid, 0, MASKED)[:, :, None, None])  # [B, S, K, h + 1]
  # a key that counts
  reference = jnp.take_along_axis(wide_k, jnp.argmax(valid, 1)[:, None, None, None], axis=1)[:, 0]
  query_tiles = _by_key_head(widened(q * h**-0.5, 1), K, rows)  # [n, B, K, R, h + 1]
  key_tiles = _by_key_head(wide_k, K, keys)  # [m, B, K, t, h + 1]
  value_tiles = _by_key_head(widened(v, 1), K, keys)  # [m, B, K, t, h + 1]
  row = jnp.tile(jnp.arange(rows), H // K)[:, None] + offset  # [R, 1]
  # What is padded starts as the last row does: a later start would make an edge of all that its
  # tile sees.
  starts = None if start is None else in_blocks(start, rows, "edge")  # [n, B, rows]

  def one(tile_of):
    i, q, start = tile_of
    tile = _QueryTile(
      q=q,
      k=key_tiles,
      v=value_tiles,
      length=S,
      slot=i * rows + row if causal else None,
      start=None if start is None else jnp.tile(start, H // K)[:, None, :, None],
    )
    # rows see up to their own key
    first, last = (i * rows + offset, (i + 1) * rows + offset) if causal else (S, S)
    whole, seen = jnp.minimum(first + 1, S - 1) // keys, -(-jnp.minimum(last, S) // keys)
    largest = _product("bkrh,bkh->bkr", q, reference)
    inner = 0
    if start is not None:
      largest = jnp.full_like(largest, MASKED)  # the reference may be of another sample
      inner = jnp.minimum(-(-start.max() // keys), whole)
    carry = tile.add_exactly(tile.edge_scores, whole, seen, (largest, jnp.zeros(q.shape)))
    if start is not None:
      carry = tile.add_exactly(tile.edge_scores, start.min() // keys, inner, carry)
    out = tile.add_inner(inner, whole, carry)  # [B, K, R, h + 1]
    return out[..., :h] / jnp.maximum(out[..., h:], SMALL)

  out = jax.lax.map(one, (jnp.arange(len(query_tiles)), query_tiles, starts))
  return _by_slot(out, rows, L).astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_ranges(q, k, v, start, tile):
  """Causal attention to the keys from `start` int32[B, S] on."""
  return causal_attention(q, k, v, jnp.ones(k.shape[:2], bool), start, tile)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GradientTile(_QueryTile):
  """A tile of queries with the gradient of what they attended, rows = t; h instead of h + 1."""

  gradient: jax.Array

  def scores_and_slopes(self, j):
    """[B, K, R, t] each: scores, and the gradients of their weights."""
    return self.edge_scores(j), _product("bkrh,bkth->bkrt", self.gradient, self.v[j])

  def sum_up(self, j, carry):
    """Adds tile j to the maxima, sums of weights, and sums of weights times slopes [B, K, R]."""
    largest, total, mean = carry
    scores, slope = self.scores_and_slopes(j)
    largest, shrink, weights = raise_maxima(largest, scores)
    return largest, total * shrink + weights.sum(-1), mean * shrink + (weights * slope).sum(-1)

  def add(self, sums, j, carry):
    """Adds tile j to the gradients of q [B, K, R, h], and of k and v [m, B, K, t, h]."""
    largest, total, mean = sums
    dq, dk, dv = carry
    scores, slope = self.scores_and_slopes(j)
    weights = jnp.exp(scores - largest[..., None]) / total[..., None]
    slope = (weights * (slope - (mean / total)[..., None])).astype(self.k.dtype)
    dv = dv.at[j].add(_product("bkrt,bkrh->bkth", weights.astype(self.v.dtype), self.gradient))
    dk = dk.at[j].add(_product("bkrt,bkrh->bkth", slope, self.q))
    return dq + _product("bkrt,bkth->bkrh", slope, self.k[j]), dk, dv


def _ranges_backward(tile, saved, gradient):
  """Goes over tiles of queries, and for each over the tiles of keys that one of them sees, twice.

  The weights of a row, and the mean by them of its weights' gradients, are known only when all of
  its keys have been seen.
  """
  q, k, v, start = saved
  (S, H, h), K = q.shape[1:], k.shape[2]
  rows, _ = tile_sizes(S, S, True, tile)
  scale = h**-0.5
  # [n, B, K, G * rows, h] each, of keys and values with G = 1
  queries, gradients, keys, values = (_by_key_head(x, K, rows) for x in (q * scale, gradient, k, v))
  row = jnp.tile(jnp.arange(rows), H // K)[:, None]  # [R, 1]

  def one(sums, tile_of):
    i, q, start, gradient = tile_of
    tile = _GradientTile(
      q=q,
      gradient=gradient,
      k=keys,
      v=values,
      slot=i * rows + row,
      start=jnp.tile(start, H // K)[:, None, :, None],
      length=S,
    )
    first = start.min() // rows
    begun = jnp.full(q.shape[:-1], MASKED), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape[:-1])
    of_rows = jax.lax.fori_loop(first, i + 1, tile.sum_up, begun)
    add = functools.partial(tile.add, of_rows)
    dq, *sums = jax.lax.fori_loop(first, i + 1, add, (jnp.zeros(q.shape, jnp.float32), *sums))
    return tuple(sums), dq * scale

  begun = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
  tiles = jnp.arange(len(queries)), queries, in_blocks(start, rows, "edge"), gradients
  (dk, dv), dq = jax.lax.scan(one, begun, tiles)
  return *(_by_slot(d, rows, S).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v))), None


_attend_ranges.defvjp(
  lambda q, k, v, start, tile: (_attend_ranges(q, k, v, start, tile), (q, k, v, start)),
  _ranges_backward,
)
