"""Weights in a few bits: blocks of numbers divided by their largest magnitude and rounded (QLoRA's base).

Two codes of four bits share a byte. JAX has types of four bits, but programs compiled ahead of time refuse
arrays of them (the layouts that both sides report differ), and that is how the rollout calls its programs.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from step_grpo.errors import UserError

BLOCK = 64  # numbers that share a scale (arXiv 2305.14314)
# The sixteen values of NF4 (arXiv 2305.14314, appendix E): quantiles of a normal distribution.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
LARGEST = {"int8": 127.5, "int4": 7.5, "nf4": 1.0}  # what the largest magnitude of a block is scaled to


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("kind", "axis"))
@dataclass(frozen=True)
class Rounded:
    """A rounded array; a slice along a leading axis is one too.

    Attributes:
        codes: int8 of the array's shape, or for four bits uint8 with `axis` half as long: the second half of
            the axis lies in the upper bits.
        scales: one a block, of the array's shape with `axis` divided by the length of a block.
        kind: of `LARGEST`.
        axis: along which blocks lie, counted from the last.
    """

    codes: jax.Array
    scales: jax.Array
    kind: str
    axis: int


@partial(jax.jit, static_argnames=("kind", "axis", "dtype"))
def round_off(array: jax.Array, kind: str, axis: int, dtype) -> Rounded:
    """Rounds to the nearest of the values that a block has.

    Args:
        array: float32.
        kind: `int8`, `int4` or `nf4`.
        axis: along which blocks lie, counted from the last (negative); a block is as long as `BLOCK` and the
            axis have in common.
        dtype: of the scales.

    Raises:
        UserError: an axis of odd length, whose codes of four bits do not pair up.
    """
    size = array.shape[axis]
    if kind != "int8" and size % 2:
        raise UserError(f"config.lora.base is {kind!r}, but the model has an odd width, {size}; use 'int8'")
    largest = jnp.max(jnp.abs(_blocks(array, axis, math.gcd(size, BLOCK))), axis=axis)
    scales = (largest / LARGEST[kind]).astype(dtype)
    spread = _spread(scales.astype(jnp.float32), size, axis)
    scaled = array / jnp.where(spread > 0, spread, 1.0)
    if kind == "int8":
        return Rounded(jnp.clip(jnp.round(scaled), -128, 127).astype(jnp.int8), scales, kind, axis)
    if kind == "int4":
        codes = (jnp.clip(jnp.round(scaled), -8, 7) + 8).astype(jnp.uint8)
    else:
        between = (np.array(NF4[1:]) + np.array(NF4[:-1])) / 2
        codes = sum(((scaled > edge).astype(jnp.uint8) for edge in between.tolist()), jnp.uint8(0))
    low, high = jnp.split(codes, 2, axis)
    return Rounded(low | high << 4, scales, kind, axis)


def restore(rounded: Rounded, dtype) -> jax.Array:
    """The array that the codes and scales stand for, computed in `dtype`."""
    codes, axis = rounded.codes, rounded.axis
    if rounded.kind != "int8":
        codes = jnp.concatenate([codes & 15, codes >> 4], axis)
    if rounded.kind == "nf4":
        values = jnp.asarray(NF4, dtype)[codes]
    else:
        values = codes.astype(dtype) - jnp.asarray(8 if rounded.kind == "int4" else 0, dtype)
    return values * _spread(rounded.scales.astype(dtype), values.shape[axis], axis)


def _blocks(array: jax.Array, axis: int, block: int) -> jax.Array:
    """The axis taken apart into `[blocks, block]`."""
    axis += array.ndim
    return array.reshape(*array.shape[:axis], -1, block, *array.shape[axis + 1 :])


def _spread(scales: jax.Array, size: int, axis: int) -> jax.Array:
    """Each scale once for every number of its block."""
    return jnp.repeat(scales, size // scales.shape[axis], axis, total_repeat_length=size)
