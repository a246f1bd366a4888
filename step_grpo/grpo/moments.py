"""Adam's moments in bfloat16: half the memory of the optimizer, the arithmetic in float32.

The second moment falls by at most a thousandth of itself an update (b2 = 0.999), which is about a quarter of
the distance to the next bfloat16 number at most. Rounded to the nearest it would never fall, so every moment
is rounded up or down at random, with the probabilities that make the mean exact.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def bfloat16_moments(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`adam` with both moments kept in bfloat16 between updates.

    An update uses its moments as float32 computed them; they are rounded when they are stored. The random
    numbers follow from the number of updates made, so that a run that goes on from a checkpoint repeats them.

    Args:
        adam: `optax.scale_by_adam(...)`, or another with its state.

    Returns:
        The transformation; its state is an `optax.ScaleByAdamState`.
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        state = adam.init(params)
        return state._replace(mu=_cast(state.mu, jnp.bfloat16), nu=_cast(state.nu, jnp.bfloat16))

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        wide = state._replace(mu=_cast(state.mu, jnp.float32), nu=_cast(state.nu, jnp.float32))
        updates, wide = adam.update(grads, wide, params)
        mu_key, nu_key = jax.random.split(jax.random.fold_in(jax.random.key(0), wide.count))
        return updates, wide._replace(mu=_round_all(mu_key, wide.mu), nu=_round_all(nu_key, wide.nu))

    return optax.GradientTransformation(init, update)


def round_stochastically(key: jax.Array, values: jax.Array) -> jax.Array:
    """One of the two bfloat16 neighbours of each value, so chosen that the expectation is the value.

    A bfloat16 number is the upper half of a float32 one: a random number of 16 bits is added to the lower
    half, which is then cut off.

    Args:
        key: of the random numbers.
        values: float32, any shape.

    Returns:
        bfloat16 of that shape.
    """
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _round_all(key: jax.Array, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    rounded = [round_stochastically(k, leaf) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, rounded)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
