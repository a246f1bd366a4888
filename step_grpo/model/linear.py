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

    Rows and positions are one axis of the product. With two, the gradient of a weight is a sum over both, for
    which XLA on a CPU first turns its operands over, at several times the cost of the product.

    Args:
        axes: such as `BTD,DNH->BTNH`; letters of the weight that `x` has are its inputs, and its last ones.
        x: activations.
        weight: of one layer.
    """
    operands, _ = axes.split("->")
    left, letters = operands.split(",")
    inputs = "".join(letter for letter in letters if letter in left)
    kept = len(left) - len(inputs)
    tokens = x.reshape(-1, *x.shape[kept:])
    out = _of_tokens(inputs, letters.removeprefix(inputs), tokens, weight)
    return out.reshape(*x.shape[:kept], *out.shape[1:])


def _of_tokens(inputs: str, outputs: str, x: jax.Array, weight: Weight) -> jax.Array:
    """The product for activations `[tokens, *inputs]`."""
    axes = f"t{inputs},{inputs}{outputs}->t{outputs}"
    if isinstance(weight, Adapted):
        low = jnp.einsum(f"t{inputs},{inputs}r->tr", x, weight.a)  # down to the rank, and up again
        beside = jnp.einsum(f"tr,r{outputs}->t{outputs}", low * weight.scale, weight.b)
        return _of_tokens(inputs, outputs, x, weight.base) + beside
    if isinstance(weight, Rounded):
        # The backward pass makes the dense layer anew; kept for it, there would be one of every layer.
        return jax.checkpoint(lambda x, rounded: jnp.einsum(axes, x, restore(rounded, x.dtype)))(x, weight)
    return jnp.einsum(axes, x, weight)


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
