"""Choosing the next token: pure functions of logits and a key folded from an identity."""

import jax
import jax.numpy as jnp


def sample_key(
    run_key: jax.Array, prompt_id: jax.Array, sample_id: jax.Array, position: jax.Array
) -> jax.Array:
    """The key of one token: it depends on what is sampled, not on when or where."""
    for identity in (prompt_id, sample_id, position):
        run_key = jax.random.fold_in(run_key, identity)
    return run_key


def sample(logits_BV: jax.Array, keys_B: jax.Array, *, temperature: float, top_p: float) -> jax.Array:
    """Draws one token a lane.

    Args:
        logits_BV: untempered logits.
        keys_B: one key a lane.
        temperature: 0 means greedy.
        top_p: nucleus mass in (0, 1], taken of the tempered distribution.

    Returns:
        Token ids `[B]`.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / temperature
    if top_p < 1:
        logits_BV = jnp.where(nucleus(jax.nn.softmax(logits_BV, axis=-1), top_p), logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def nucleus(probs_BV: jax.Array, top_p: float) -> jax.Array:
    """The smallest set of most probable tokens whose mass reaches `top_p`, as a mask `[B, V]`.

    No sort: positive floats are ordered like their bit patterns, so 31 halvings of the interval of
    patterns find the largest threshold whose tokens still have the mass. Tokens that tie with the last one
    are all kept.
    """
    bits_BV = jax.lax.bitcast_convert_type(probs_BV.astype(jnp.float32), jnp.int32)
    total_B = jnp.sum(probs_BV, axis=-1)

    def halve(_, interval):
        low_B, high_B = interval  # mass at low is enough, at high it is not
        middle_B = low_B + (high_B - low_B) // 2
        mass_B = jnp.sum(jnp.where(bits_BV >= middle_B[:, None], probs_BV, 0.0), axis=-1)
        enough = mass_B >= top_p * total_B
        return jnp.where(enough, middle_B, low_B), jnp.where(enough, high_B, middle_B)

    low_B = jnp.zeros(probs_BV.shape[0], jnp.int32)
    high_B = jnp.max(bits_BV, axis=-1) + 1
    low_B, _ = jax.lax.fori_loop(0, 31, halve, (low_B, high_B))
    return bits_BV >= low_B[:, None]
