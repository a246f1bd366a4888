"""The scores that end a thinking, as formulas: how sure of the answer, whether enough was thought."""

import math

import jax
import jax.numpy as jnp

PROBABILITY_FLOOR = 1e-10


def probe_confidence(
    top1_logprobs: jax.Array, length: jax.Array, closed: jax.Array, *, strict: bool
) -> jax.Array:
    """Confidence of a tentative answer (arXiv 2604.16890, Eq. 2; arXiv 2504.15895).

    The geometric mean of the top-1 probabilities of the answer's tokens, the first one skipped because it
    only opens the brace, each floored at 1e-10. A closing `</think>` is one of the tokens.

    Args:
        top1_logprobs: `[..., P]` log of the largest probability of the untempered softmax at each token.
        length: `[...]` tokens in the tentative answer, at most `P`; what lies behind is not read.
        closed: `[...]` whether the tentative answer ended in `</think>`.
        strict: an answer that is not closed scores 0 (for models that are over-confident, such as Qwen3).

    Returns:
        `[...]` float32 in [0, 1]; 0 for fewer than two tokens.
    """
    mean = counted_sum(top1_logprobs, length) / jnp.maximum(length - 1, 1)
    valid = (length >= 2) & (closed | (not strict))
    return jnp.where(valid, jnp.exp(mean), 0.0)


def probe_is_hopeless(top1_logprobs: jax.Array, length: jax.Array, *, delta: float) -> jax.Array:
    """Whether a tentative answer can no longer reach a confidence above `delta`, however it goes on.

    Proof. Let `a_t <= 0` be the log-probability counted for token `t` (floored; the first token's is not
    counted), `S = a_2 + .. + a_m` the sum over the `m` tokens so far, `n` the unknown final length,
    `m <= n <= P`. Every later term is at most 0, so the final sum is at most `S`; `S <= 0` and
    `n - 1 <= P - 1`, so the final mean is at most `S / (n - 1) <= S / (P - 1)`. Hence

        confidence = exp(mean) <= exp(S / (P - 1)),

    and no smaller bound holds: it is reached when the answer goes on with probabilities of 1 up to `P`.
    Where the bound is at most `delta`, the probe cannot exit (exit iff confidence > delta). Strict mode only
    lowers the confidence (to 0) and never settles it before the end, since `</think>` may come as late as
    the last token; nor does the rule of two tokens, which lowers it as well.

    Rounding. With unit roundoff `u = 2**-24`, a float32 sum of at most `P - 1` terms of one sign is, in any
    order, within a factor `1 +- (P - 1) u` of the exact sum of the same terms; so is the computed sum of
    later. The division, the exponential (its argument at most 23) and the float32 value of `delta` add less
    than `50 u` together. The computed confidence of later is therefore at most
    `exp(S' (1 - r) / (P - 1)) (1 + r)`, with the computed `S'` of now and `r = 2 (P + 50) u`. The test uses
    a margin of `8 r`: a probe that is given up would have declined as computed, not only as defined.

    Args:
        top1_logprobs: `[..., P]` as for `probe_confidence`, the last axis as long as a probe may get.
        length: `[...]` tokens in the tentative answer so far.
        delta: the threshold, in [0, 1].

    Returns:
        `[...]` bool; False as long as the confidence may still be above `delta`.
    """
    if delta == 0:
        return jnp.zeros(length.shape, bool)  # every probability is floored above 0
    P = top1_logprobs.shape[-1]
    margin = (P + 50) * 2**-20
    return counted_sum(top1_logprobs, length) * (1 - margin) <= (P - 1) * (math.log(delta) - margin)


def counted_sum(top1_logprobs: jax.Array, length: jax.Array) -> jax.Array:
    """Sum of the log-probs of tokens 2 to `length`, each kept between the floor and 0."""
    at = jnp.arange(top1_logprobs.shape[-1])
    counted = (at >= 1) & (at < length[..., None])
    bounded = jnp.clip(top1_logprobs, math.log(PROBABILITY_FLOOR), 0.0)
    return jnp.sum(jnp.where(counted, bounded, 0.0), axis=-1)


def log_odds(yes_logits: jax.Array, no_logits: jax.Array) -> jax.Array:
    """`log(P(yes) / P(no))`, `[...]`, of the logits of the tokens that say yes and of those that say no."""
    return jax.nn.logsumexp(yes_logits, axis=-1) - jax.nn.logsumexp(no_logits, axis=-1)


def sufficiency_score(odds: jax.Array) -> jax.Array:
    """The score of 0 to 100 that a model gives its reasoning: the share of yes, to the nearest whole number.

    `100 P(yes) / (P(yes) + P(no))`, halves rounded up. So 100 means at least 99.5 %, and can be reached.

    Args:
        odds: `log_odds` of the answer to the question whether the reasoning suffices.
    """
    return jnp.floor(100 * jax.nn.sigmoid(odds) + 0.5)
