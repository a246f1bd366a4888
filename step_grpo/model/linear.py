"""The forms that a weight of a linear map can have, and the product with each.

A weight is a dense array, or a dense array with an adapter beside it (`Adapted`; LoRA, arXiv 2106.09685). All
forms are pytrees, so that a tree of weights is scanned, placed and taken apart whatever forms it holds.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp


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

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = field(default=1.0)


Weight = jax.Array | Adapted


def is_weight(node: object) -> bool:
    """Whether a node of a tree is a whole weight, whatever it consists of."""
    return isinstance(node, Adapted)


def product(axes: str, x: jax.Array, weight: Weight) -> jax.Array:
    """The einsum of activations and one layer's weight, in the type of both.

    Args:
        axes: such as `BTD,DNH->BTNH`; letters of the weight that `x` has are its inputs.
        x: activations.
        weight: of one layer.
    """
    if isinstance(weight, Adapted):
        return product(axes, x, weight.base) + _beside(axes, x, weight)
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
    """One layer's weight as an array; with an adapter, their sum in float32."""
    if isinstance(weight, Adapted):
        a, b = weight.a.astype(jnp.float32), weight.b.astype(jnp.float32)
        return dense(weight.base) + weight.scale * jnp.tensordot(a, b, axes=1, precision="highest")
    return weight


def cast(weight: Weight, dtype) -> Weight:
    """A weight whose products are computed in `dtype`, in the form that it has."""
    return jax.tree.map(lambda part: part.astype(dtype), weight)


def settled(weight: Weight, dtype) -> Weight:
    """One layer's weight in `dtype`, as it is multiplied with fastest, over and over."""
    return dense(weight).astype(dtype)
