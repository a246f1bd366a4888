"""The key/value cache of the decode loop: one pair of arrays a layer, `[B, K, S, H]`.

A pair a layer and not one stacked array: a scan over a stacked cache copies it at every token.

A cache of int8 holds one float32 factor a token and head beside them, and half the bytes of bfloat16.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "k_scale", "v_scale"],
    meta_fields=["keys_as_columns"],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer; positions past a lane's length are garbage.

    Attributes:
        k: `[B, K, S, H]` keys; `[B, K, H, S]` where they stand as columns.
        v: `[B, K, S, H]` values.
        k_scale: `[B, K, S]` factors that int8 keys are to be multiplied with; None for other types.
        v_scale: of the values, likewise.
        keys_as_columns: scores of one query are then a product of matrices as they lie, which XLA's CPU
            products read several times faster.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    keys_as_columns: bool = False

    @property
    def capacity(self) -> int:
        """Positions `S`."""
        return self.v.shape[2]

    def each(self, function: Callable, *others: "LayerCache") -> "LayerCache":
        """`function(axis of the positions, array, *arrays of others)` for every array there is."""

        def one(name, axis):
            held = getattr(self, name)
            return None if held is None else function(axis, held, *(getattr(o, name) for o in others))

        k = one("k", 3 if self.keys_as_columns else 2)
        v, k_scale, v_scale = (one(name, 2) for name in ("v", "k_scale", "v_scale"))
        return LayerCache(k, v, k_scale, v_scale, self.keys_as_columns)

    def laid_out(self, keys_as_columns: bool) -> "LayerCache":
        """With the keys as asked."""
        if self.keys_as_columns == keys_as_columns:
            return self
        return dataclasses.replace(self, k=self.k.swapaxes(2, 3), keys_as_columns=keys_as_columns)


Cache = tuple[LayerCache, ...]


def empty_cache(
    layers: int,
    lanes: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    dtype,
    *,
    keys_as_columns: bool = False,
) -> Cache:
    """A zero cache with room for `capacity` tokens in each of `lanes` lanes; `dtype` int8 is quantised."""
    shape = (lanes, kv_heads, capacity, head_dim)
    zeros = stored(LayerCache(jnp.zeros(shape), jnp.zeros(shape)), dtype)
    return tuple(zeros.laid_out(keys_as_columns) for _ in range(layers))


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
    """Keys and values in the form that a cache of `dtype` holds, if they are not yet."""
    if layer.k.dtype == dtype:
        return layer
    rows = layer.laid_out(False)
    return stored_token(rows.k, rows.v, dtype).laid_out(layer.keys_as_columns)


def write_token(cache: LayerCache, k_BKH: jax.Array, v_BKH: jax.Array, position_B: jax.Array) -> LayerCache:
    """Writes one token a lane at `position_B`; out-of-range positions are dropped, not clamped."""
    lane = jnp.arange(k_BKH.shape[0])

    def put(axis, array, new):
        place = (lane, *[slice(None)] * (axis - 1), position_B)
        return array.at[place].set(new, mode="drop")

    return cache.each(put, stored_token(k_BKH, v_BKH, cache.k.dtype))


def stored_token(k: jax.Array, v: jax.Array, dtype) -> LayerCache:
    """Keys and values `[..., H]`, as of one token a lane, in the form that a cache of `dtype` holds."""
    if dtype == jnp.int8:
        (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
        return LayerCache(k, v, k_scale, v_scale)
    return LayerCache(k.astype(dtype), v.astype(dtype))


def copy_lanes(cache: Cache, source: Cache, row_B: jax.Array) -> Cache:
    """Overwrites the first `T` positions of every lane `b` with row `row_B[b]` of `source`.

    Args:
        cache: of `B` lanes with room for `S` tokens.
        source: of any rows with room for `T <= S`; it is quantised where `cache` is and it is not.
        row_B: row of `source` a lane takes; -1 keeps the lane as it is.
    """

    def put(axis, old, new):
        take = (row_B >= 0).reshape(-1, *[1] * (old.ndim - 1))
        head = jax.lax.slice_in_dim(old, 0, new.shape[axis], axis=axis)
        chosen = jnp.where(take, new[jnp.maximum(row_B, 0)], head)
        return jax.lax.dynamic_update_slice(old, chosen, (0,) * old.ndim)

    def like(held, layer):
        return stored(layer.laid_out(held.keys_as_columns), held.k.dtype)

    return tuple(held.each(put, like(held, layer)) for held, layer in zip(cache, source, strict=True))


def with_capacity(cache: Cache, capacity: int) -> Cache:
    """The cache with room for `capacity` tokens a lane: padded with zeros, or cut."""

    def resize(axis, array):
        held = jax.lax.slice_in_dim(array, 0, min(capacity, array.shape[axis]), axis=axis)
        missing = [(0, 0)] * array.ndim
        missing[axis] = (0, capacity - held.shape[axis])
        return jnp.pad(held, missing)

    return tuple(layer.each(resize) for layer in cache)
