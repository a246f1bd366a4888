"""Choosing the next token: pure functions of logits and a key folded from an identity."""

import jax
import jax.numpy as jnp

AGAIN = 2**30  # more than the positions of any completion


def sample_key(
    run_key: jax.Array, prompt_id: jax.Array, sample_id: jax.Array, position: jax.Array, drawn: jax.Array
) -> jax.Array:
    """The key of one token: it depends on what is sampled, not on when or where.

    Args:
        run_key: of the run.
        prompt_id: identity of the prompt.
        sample_id: number of the completion.
        position: in the completion.
        drawn: positions below this one had a token that was sampled and discarded: what is sampled there
            again has a key of its own.
    """
    place = position + jnp.where(position < drawn, AGAIN, 0)
    for identity in (prompt_id, sample_id, place):
        run_key = jax.random.fold_in(run_key, identity)
    return run_key


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> jax.Array:
    """Draws one token a lane.

    What is switched off costs nothing: at temperature 1 with the other three off the program is that of
    `jax.random.categorical`.

    Args:
        logits_BV: untempered logits.
        keys_B: one key a lane.
        temperature: 0 means greedy.
        top_k: as in `allowed`; 0 is off.
        top_p: as in `allowed`; 1 is off.
        min_p: as in `allowed`; 0 is off.

    Returns:
        Token ids `[B]`.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    if temperature != 1:
        logits_BV = logits_BV / temperature
    if top_k > 0 or top_p < 1 or min_p > 0:
        kept_BV = allowed(logits_BV, top_k=top_k, top_p=top_p, min_p=min_p)
        logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def allowed(logits_BV: jax.Array, *, top_k: int, top_p: float, min_p: float) -> jax.Array:
    """The tokens that may be drawn, as a mask `[B, V]`.

    The limits apply one after the other, in the order of transformers. Tokens whose probabilities are equal
    in float32 stay or go together: those that tie with the last one are all kept (so do transformers for
    top-k and min-p; for top-p its sort decides).

    Args:
        logits_BV: tempered logits.
        top_k: the so many most probable tokens; 0 is off.
        top_p: of these, the smallest set of most probable tokens with this share of their mass; 1 is off.
        min_p: of all, those with at least this share of the largest probability; 0 is off.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    kept_BV = jnp.full(weights_BV.shape, True)
    if 0 < top_k < weights_BV.shape[1]:
        needed_B = jnp.full(weights_BV.shape[0], float(top_k))
        kept_BV = heaviest(weights_BV, jnp.ones_like(weights_BV), needed_B)
    if top_p < 1:
        mass_BV = jnp.where(kept_BV, weights_BV, 0.0)
        kept_BV &= heaviest(mass_BV, mass_BV, top_p * jnp.sum(mass_BV, axis=-1))
    if min_p > 0:
        kept_BV &= weights_BV >= min_p
    return kept_BV


def heaviest(weights_BV: jax.Array, measure_BV: jax.Array, needed_B: jax.Array) -> jax.Array:
    """The smallest set of heaviest tokens whose summed measure reaches `needed_B`, as a mask `[B, V]`.

    No sort: floats that are not negative are ordered like their bit patterns, so halving the interval of
    patterns finds the largest threshold whose tokens still have the measure. It ends when no interval holds
    two tokens any more: after 31 passes over the weights at most (ties), a dozen where few tokens are heavy.

    Args:
        weights_BV: not negative, float32.
        measure_BV: what is summed, not negative.
        needed_B: at most the sum over a row.
    """
    bits_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)

    def unsettled(interval):
        low_B, high_B, tokens_B = interval
        return jnp.any((high_B - low_B > 1) & (tokens_B[0] - tokens_B[1] > 1))

    def halve(interval):
        low_B, high_B, (from_low_B, from_high_B) = interval  # at low the measure is enough, at high it is not
        middle_B = low_B + (high_B - low_B) // 2
        above_BV = bits_BV >= middle_B[:, None]
        enough_B = jnp.sum(jnp.where(above_BV, measure_BV, 0.0), axis=-1) >= needed_B
        tokens_B = jnp.sum(above_BV, axis=-1, dtype=jnp.int32)
        return (
            jnp.where(enough_B, middle_B, low_B),
            jnp.where(enough_B, high_B, middle_B),
            (jnp.where(enough_B, tokens_B, from_low_B), jnp.where(enough_B, from_high_B, tokens_B)),
        )

    low_B = jnp.zeros(bits_BV.shape[0], jnp.int32)
    high_B = jnp.max(bits_BV, axis=-1) + 1
    low_B, *_ = jax.lax.while_loop(
        unsettled, halve, (low_B, high_B, (low_B + bits_BV.shape[1], jnp.zeros_like(low_B)))
    )
    return bits_BV >= low_B[:, None]
