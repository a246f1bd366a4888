"""The key/value cache of the decode loop: one pair of arrays a layer, `[B, K, S, H]`.

A pair a layer and not one stacked array: a scan over a stacked cache copies it at every token.

A cache of int8 holds one float32 factor a token and head beside them, and half the bytes of bfloat16.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerCache(NamedTuple):
    """Keys and values of one layer, `[B, K, S, H]` each; positions past a lane's length are garbage.

    Where they are int8, the factors `[B, K, S]` that they are to be multiplied with.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


Cache = tuple[LayerCache, ...]


def empty_cache(layers: int, lanes: int, kv_heads: int, capacity: int, head_dim: int, dtype) -> Cache:
    """A zero cache with room for `capacity` tokens in each of `lanes` lanes; `dtype` int8 is quantised."""
    shape = (lanes, kv_heads, capacity, head_dim)
    zeros = LayerCache(jnp.zeros(shape), jnp.zeros(shape))
    return tuple(stored(zeros, dtype) for _ in range(layers))


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds `[..., H]` to int8, the largest magnitude of each vector to 127.

    Returns:
        int8 `[..., H]` and float32 factors `[...]`; their product is off by half a factor at most.
    """
    x32 = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x32), axis=-1) / 127
    steps = jnp.round(x32 / jnp.where(scale == 0, 1, scale)[..., None])
    return steps.astype(jnp.int8), scale


def stored(layer: LayerCache, dtype) -> LayerCache:
    """Keys and values `[..., H]` in the form that a cache of `dtype` holds."""
    if dtype == jnp.int8:
        (k, k_scale), (v, v_scale) = quantise(layer.k), quantise(layer.v)
        return LayerCache(k, v, k_scale, v_scale)
    return LayerCache(layer.k.astype(dtype), layer.v.astype(dtype))


def write_token(cache: LayerCache, k_BKH: jax.Array, v_BKH: jax.Array, position_B: jax.Array) -> LayerCache:
    """Writes one token a lane at `position_B`; out-of-range positions are dropped, not clamped."""
    lane = jnp.arange(k_BKH.shape[0])

    def put(array, new):
        return array.at[lane, :, position_B].set(new, mode="drop")

    return jax.tree.map(put, cache, stored(LayerCache(k_BKH, v_BKH), cache.k.dtype))


def copy_lanes(cache: Cache, source: Cache, row_B: jax.Array) -> Cache:
    """Overwrites the first `T` positions of every lane `b` with row `row_B[b]` of `source`.

    Args:
        cache: `[B, K, S, H]` a layer.
        source: `[R, K, T, H]` a layer, `T <= S`, not quantised.
        row_B: row of `source` a lane takes; -1 keeps the lane as it is.
    """

    def put(old, new):
        T = new.shape[2]
        take = (row_B >= 0).reshape(-1, *[1] * (old.ndim - 1))
        chosen = jnp.where(take, new[jnp.maximum(row_B, 0)], old[:, :, :T])
        return jax.lax.dynamic_update_slice(old, chosen, (0,) * old.ndim)

    pairs = zip(cache, source, strict=True)
    return tuple(jax.tree.map(put, held, stored(layer, held.k.dtype)) for held, layer in pairs)


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens a lane: padded with zeros, or cut."""

    def resize(array):
        held = array[:, :, :capacity]
        missing = [(0, 0)] * array.ndim
        missing[2] = (0, capacity - held.shape[2])
        return jnp.pad(held, missing)

    return jax.tree.map(resize, cache)
