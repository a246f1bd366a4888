"""One number for each array of a tree, to tell later whether it still holds what it held.

It depends on the bits of every value and on the place of each, and not on the devices that the array lies
over: integers are added modulo 2^32, which is exact in any order. Whatever single value changes changes it;
what changes several, such as two values that change places, goes unseen once in 2^32 times.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # of 8 bytes there are two words


def begin(tree: Any) -> Callable[[], dict[str, int]]:
    """Begins to add up, on the devices; all processes must call it alike.

    Args:
        tree: of arrays that lie over the same devices; they may be given away as soon as this returns.

    Returns:
        Waits, and returns the number of each array by its place in the tree, such as `params/layers/wq_DNH`.
    """
    leaves = jax.tree.leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    places = (getattr(array, "sharding", None) for _, array in leaves)
    meshes = [place.mesh for place in places if isinstance(place, NamedSharding)]
    where = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    sums = _sums([array for _, array in leaves], where)
    return lambda: dict(zip(names, np.asarray(sums).tolist(), strict=True))


@partial(jax.jit, static_argnums=1)
def _sums(arrays: list[jax.Array], where: NamedSharding | None) -> jax.Array:
    """The sums in one array, whole in every process where it is told to lie everywhere."""
    sums = jnp.stack([_sum(array) for array in arrays])
    return jax.lax.with_sharding_constraint(sums, where) if where else sums


def _sum(array: jax.Array) -> jax.Array:
    bits = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    words = jax.lax.bitcast_convert_type(bits, UNSIGNED[bits.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mixed(words + _mixed(place)), dtype=jnp.uint32)


def _mixed(words: jax.Array) -> jax.Array:
    """A permutation of the 32-bit words without pattern: the last steps of MurmurHash3 (Appleby, 2011)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words = (words ^ (words >> shift)) * jnp.uint32(factor)
    return words ^ (words >> 16)
