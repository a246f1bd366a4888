"""The forms that a weight of a linear map can have, and the product with each.

A weight is a dense array, a rounded one (`Rounded`: a few bits a number), or either with an adapter beside it
(`Adapted`; LoRA, arXiv 2106.09685). All forms are pytrees, so that a tree of weights is scanned, placed and
taken apart whatever forms it holds.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from step_grpo.model.rounding import Rounded, restore


@partial(jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=("scale",))
@dataclass(frozen=True)
class Adapted:
    """The weight `base + scale * a @ b`, its parts kept apart.

    Attributes:
        base: `[..., inputs, outputs]`; a map can have several axes of either kind, such as heads.
        a: `[..., inputs, r]`.
        b: `[..., r, outputs]`.
        scale: a Python number.
    """

    base: jax.Array | Rounded
    a: jax.Array
    b: jax.Array
    scale: float


Plain: TypeAlias = jax.Array | Rounded
Weight: TypeAlias = Plain | Adapted


def product(axes: str, x: jax.Array, weight: Weight) -> jax.Array:
    """The einsum of activations and one layer's weight, in the type of both.

    Args:
        axes: such as `BTD,DNH->BTNH`; letters of the weight that `x` has are its inputs.
        x: activations.
        weight: of one layer.
    """
    if isinstance(weight, Adapted):
        return product(axes, x, weight.base) + _beside(axes, x, weight)
    if isinstance(weight, Rounded):
        # The backward pass makes the dense layer anew; kept for it, there would be one of every layer.
        return jax.checkpoint(lambda x, rounded: jnp.einsum(axes, x, restore(rounded, x.dtype)))(x, weight)
    return jnp.einsum(axes, x, weight)


def _beside(axes: str, x: jax.Array, weight: Adapted) -> jax.Array:
    """The adapter's share of a product: down to the rank, and up again."""
    operands, out = axes.split("->")
    left, letters = operands.split(",")
    inputs = "".join(letter for letter in letters if letter in left)
    outputs = letters.removeprefix(inputs)
    kept = "".join(letter for letter in left if letter not in inputs)
    low = jnp.einsum(f"{left},{inputs}r->{kept}r", x, weight.a)
    return jnp.einsum(f"{kept}r,r{outputs}->{out}", low * weight.scale, weight.b)


def dense(weight: Weight) -> jax.Array:
    """One layer's weight as an array; in float32 if it is rounded or has an adapter."""
    if isinstance(weight, Adapted):
        a, b = weight.a.astype(jnp.float32), weight.b.astype(jnp.float32)
        return dense(weight.base) + weight.scale * jnp.tensordot(a, b, axes=1, precision="highest")
    if isinstance(weight, Rounded):
        return restore(weight, jnp.float32)
    return weight


def axes_of(names: tuple[str | None, ...], weight: Weight) -> Any:
    """The logical axes of every part of a weight, in the form of the weight.

    Scales are whole along the axis of their blocks, which may be few; the rank is not spread.

    Args:
        names: of the dense weight, with `L` or without.
        weight: arrays, or what has their shapes.
    """
    if isinstance(weight, Adapted):
        inputs, outputs = weight.a.ndim - 1, weight.b.ndim - 1
        stacked = names[: inputs + outputs - len(names)]  # `L` belongs to both
        a, b = (*names[:inputs], None), (*stacked, None, *names[inputs:])
        return Adapted(axes_of(names, weight.base), a, b, weight.scale)  # type: ignore[arg-type]
    if isinstance(weight, Rounded):
        place = len(names) + weight.axis
        scales = (*names[:place], None, *names[place + 1 :])
        return Rounded(names, scales, weight.kind, weight.axis)  # type: ignore[arg-type]
    return names


def cast(weight: Weight, dtype) -> Weight:
    """A weight whose products are computed in `dtype`, in its own form; what is rounded stays as it is."""
    if isinstance(weight, Adapted):
        a, b = weight.a.astype(dtype), weight.b.astype(dtype)
        return Adapted(_cast_plain(weight.base, dtype), a, b, weight.scale)
    return _cast_plain(weight, dtype)


def _cast_plain(weight: Plain, dtype) -> Plain:
    return weight if isinstance(weight, Rounded) else weight.astype(dtype)


def settled(weight: Weight, dtype) -> Weight:
    """One layer's weight as the decode loop multiplies with it: an adapter merged, if the base is dense."""
    base = weight.base if isinstance(weight, Adapted) else weight
    return cast(weight, dtype) if isinstance(base, Rounded) else dense(weight).astype(dtype)
