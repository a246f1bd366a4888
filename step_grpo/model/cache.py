"""The key/value cache of the decode loop: one pair of arrays a layer, `[B, K, S, H]`.

A pair a layer and not one stacked array: a scan over a stacked cache copies it at every token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of one layer, `[B, K, S, H]` each; positions past a lane's length are garbage."""

    k: jax.Array
    v: jax.Array


Cache = tuple[LayerCache, ...]


def empty_cache(layers: int, lanes: int, kv_heads: int, capacity: int, head_dim: int, dtype) -> Cache:
    """A zero cache with room for `capacity` tokens in each of `lanes` lanes."""
    shape = (lanes, kv_heads, capacity, head_dim)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))


def write_token(cache: LayerCache, k_BKH: jax.Array, v_BKH: jax.Array, position_B: jax.Array) -> LayerCache:
    """Writes one token a lane at `position_B`; out-of-range positions are dropped, not clamped."""
    lane = jnp.arange(k_BKH.shape[0])

    def put(array, new):
        return array.at[lane, :, position_B].set(new.astype(array.dtype), mode="drop")

    return LayerCache(put(cache.k, k_BKH), put(cache.v, v_BKH))


def copy_lanes(cache: Cache, source: Cache, row_B: jax.Array) -> Cache:
    """Overwrites the first `T` positions of every lane `b` with row `row_B[b]` of `source`.

    Args:
        cache: `[B, K, S, H]` a layer.
        source: `[R, K, T, H]` a layer, `T <= S`.
        row_B: row of `source` a lane takes; -1 keeps the lane as it is.
    """
    take = row_B >= 0

    def put(old, new):
        T = new.shape[2]
        chosen = jnp.where(take[:, None, None, None], new[jnp.maximum(row_B, 0)], old[:, :, :T])
        return jax.lax.dynamic_update_slice(old, chosen.astype(old.dtype), (0, 0, 0, 0))

    return jax.tree.map(put, cache, source)


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens a lane: padded with zeros, or cut."""

    def resize(array):
        held = array[:, :, :capacity]
        missing = [(0, 0)] * array.ndim
        missing[2] = (0, capacity - held.shape[2])
        return jnp.pad(held, missing)

    return jax.tree.map(resize, cache)
