"""When is the answer certain? The score that a probe yields."""

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
    at = jnp.arange(top1_logprobs.shape[-1])
    counted = (at >= 1) & (at < length[..., None])
    floored = jnp.maximum(top1_logprobs, jnp.log(PROBABILITY_FLOOR))
    total = jnp.sum(jnp.where(counted, floored, 0.0), axis=-1)
    mean = total / jnp.maximum(length - 1, 1)
    valid = (length >= 2) & (closed | (not strict))
    return jnp.where(valid, jnp.exp(mean), 0.0)
