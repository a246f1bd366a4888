"""The loss of GRPO, token by token, and its sums over a batch.

Nothing here divides by a number of tokens: sums of micro-batches, of packed rows and of devices add up to the
sum over the whole update batch, and whoever knows the whole count divides once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from step_grpo.errors import UserError
from step_grpo.grpo.settings import GrpoSettings

# exp() of a larger log-ratio may overflow, and 0 * inf is NaN. So large a ratio is beyond every clip: neither
# the loss nor its gradient, which is 0 there, depends on it.
_LOG_RATIO_MAX = 20.0


class PolicyLoss(NamedTuple):
    """Per token: the loss, f32, and where a bound decided it, bool; all of one shape."""

    loss: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    dual_clipped: jax.Array


class LossSums(NamedTuple):
    """Sums over the trained tokens, f32 scalars; divided by `tokens` they are token means.

    Attributes:
        loss: policy loss + kl_coef * KL, each token counted with its weight; the only one with a meaningful
            gradient. Divided by `tokens` it is the mean that `token_weights` was asked for.
        policy_loss: clipped policy loss.
        kl: k3 estimate of the KL to the reference, nats.
        entropy: entropy of the policy, nats.
        clipped_low: tokens whose ratio was below the lower clip, where that clip decided the loss.
        clipped_high: the same for the upper clip.
        dual_clipped: tokens where the dual clip decided the loss.
        policy_gap: |log-prob - old log-prob|, nats: how far the policy has moved.
        sampler_gap: |old log-prob - the sampler's|, nats: how far training and sampling programs disagree.
        sampler_gap_squared: its square.
        tokens: trained tokens; a count in f32, exact up to 2**24.
    """

    loss: jax.Array
    policy_loss: jax.Array
    kl: jax.Array
    entropy: jax.Array
    clipped_low: jax.Array
    clipped_high: jax.Array
    dual_clipped: jax.Array
    policy_gap: jax.Array
    sampler_gap: jax.Array
    sampler_gap_squared: jax.Array
    tokens: jax.Array


LOSS_MEANS = ("token", "sequence", "constant")
"""What `token_weights` knows."""


def token_weights(trained: ArrayLike, loss_mean: str, *, max_response_tokens: int) -> np.ndarray:
    """What a trained token of each completion counts in the loss of its update batch.

    The update divides the weighted sum over all tokens by their number, `T`. With `N` completions, `n_i`
    trained tokens in each and `l` the loss of a token, that quotient is

    - `token`: `sum(l) / T`, a mean over the tokens of the update batch (DAPO, Yu et al. 2025, arXiv
      2503.14476), by weights of 1;
    - `sequence`: `sum_i(sum_t(l) / n_i) / N`, over each completion's tokens and then over completions (GRPO,
      Shao et al. 2024, arXiv 2402.03300), by weights of `T / (N n_i)`;
    - `constant`: `sum(l) / (N * max_response_tokens)` (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783), by
      weights of `T / (N * max_response_tokens)`.

    The weights are those of the whole update batch, known before anything is packed; so packing,
    micro-batches and devices change nothing.

    Args:
        trained: number of trained tokens of each completion of an update batch, [completions].
        loss_mean: one of `LOSS_MEANS`.
        max_response_tokens: the response budget.

    Returns:
        f64 [completions].

    Raises:
        UserError: there is no such mean.
    """
    if loss_mean not in LOSS_MEANS:
        raise UserError(f"grpo.loss_mean={loss_mean!r}: must be one of {', '.join(LOSS_MEANS)}")
    tokens = np.asarray(trained, np.float64)
    if loss_mean == "token":
        return np.ones_like(tokens)
    lengths = tokens if loss_mean == "sequence" else np.full_like(tokens, max_response_tokens)
    return tokens.sum() / (len(tokens) * np.maximum(lengths, 1))


def sequence_log_ratios(log_ratios: jax.Array, mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """GSPO's log-ratio: the mean over the trained tokens of a sequence, at each of its tokens.

    `log s_i = mean over t of (logprob_t - old_t)`, so that `s_i` is the ratio of the sequences' likelihoods
    to the power of one over their length (Zheng et al. 2025, arXiv 2507.18071). The gradient flows
    through the mean.

    Args:
        log_ratios: f32 [B, T], of each token; finite.
        mask: f32 [B, T], 1 where the token is trained, else 0; the others do not enter the mean.
        segment_ids: int32 [B, T], equal for the tokens of one sequence of a row, at most T.

    Returns:
        f32 [B, T]; 0 for a sequence without a trained token.
    """
    segments = segment_ids.shape[1] + 1

    def sums(values: jax.Array, of: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, of, num_segments=segments)

    total = jax.vmap(sums)(log_ratios * mask, segment_ids)
    count = jax.vmap(sums)(mask, segment_ids)
    return jnp.take_along_axis(total / jnp.maximum(count, 1.0), segment_ids, axis=1)


def clipped_policy_loss(
    log_ratios: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float = 3.0,
) -> PolicyLoss:
    """PPO's clipped loss with a wider upper clip, and the dual clip for negative advantages.

    With r = exp(log-ratio) the loss is `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, for A < 0 at
    most `-A * dual_clip` (Schulman et al. 2017, arXiv 1707.06347; wider upper clip: DAPO, Yu et al. 2025,
    arXiv 2503.14476; dual clip: Ye et al. 2020, arXiv 1912.09729).

    Args:
        log_ratios: f32, any shape; log-prob less that of the policy that made the rollouts.
        advantages: the same shape.
        clip_low: below 1.
        clip_high: at least 0.
        dual_clip: above 1 + clip_high.

    Returns:
        PolicyLoss of that shape. A mask is true where the bound is what the loss rests on, so that the token
        has no gradient.
    """
    ratio = jnp.exp(jnp.minimum(log_ratios, _LOG_RATIO_MAX))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(-advantages * ratio, -advantages * clipped)
    negative = advantages < 0
    return PolicyLoss(
        loss=jnp.where(negative, jnp.minimum(loss, -advantages * dual_clip), loss),
        clipped_low=negative & (ratio < 1 - clip_low),
        clipped_high=(advantages > 0) & (ratio > 1 + clip_high),
        dual_clipped=negative & (ratio > dual_clip),
    )


def k3_kl(
    logprobs: jax.Array, ref_logprobs: jax.Array, *, log_ratio_bound: float = 20.0, value_bound: float = 10.0
) -> jax.Array:
    """The low-variance ("k3") estimate of KL(policy || reference) from one sampled token, nats.

    `exp(x) - x - 1` with `x = ref - logprob` (Schulman 2020, "Approximating KL divergence"), x clamped to
    plus or minus `log_ratio_bound` and the value to plus or minus `value_bound`.

    Args:
        logprobs: f32, any shape; the gradient flows through it.
        ref_logprobs: the same shape.
        log_ratio_bound: nats.
        value_bound: nats.

    Returns:
        f32 of that shape, never negative but for rounding.
    """
    log_ratio = jnp.clip(ref_logprobs - logprobs, -log_ratio_bound, log_ratio_bound)
    # expm1 keeps what exp(x) - 1 loses near 0, where most tokens are.
    return jnp.clip(jnp.expm1(log_ratio) - log_ratio, -value_bound, value_bound)


def grpo_loss_sums(
    logprobs: jax.Array,
    entropy: jax.Array,
    *,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    segment_ids: jax.Array,
    settings: GrpoSettings,
) -> LossSums:
    """Unreduced sums of the loss and of what is logged with it.

    Args:
        logprobs: f32 [B, T], of the policy in training.
        entropy: f32 [B, T].
        old_logprobs: f32 [B, T], of the policy that made the rollouts, as the training program sees it.
        ref_logprobs: f32 [B, T], of the frozen reference.
        sampler_logprobs: f32 [B, T], as the rollout program saw it.
        advantages: f32 [B, T].
        mask: f32 [B, T], 1 where the token is trained, else 0; what stands at 0 must be finite.
        weights: f32 [B, T], what the token counts in the loss (see `token_weights`).
        segment_ids: int32 [B, T], which sequence of its row a token belongs to.
        settings: of the loss.

    Returns:
        LossSums.
    """
    log_ratios = logprobs - old_logprobs
    if settings.ratio == "sequence":
        log_ratios = sequence_log_ratios(log_ratios, mask, segment_ids)
    clip_low, clip_high = settings.clip_range
    policy = clipped_policy_loss(
        log_ratios, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=settings.dual_clip
    )
    kl = k3_kl(
        logprobs, ref_logprobs, log_ratio_bound=settings.log_ratio_bound, value_bound=settings.kl_value_bound
    )
    sampler_gap = old_logprobs - sampler_logprobs

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(values * mask, dtype=jnp.float32)

    return LossSums(
        loss=total((policy.loss + settings.kl_coef * kl) * weights),
        policy_loss=total(policy.loss),
        kl=total(kl),
        entropy=total(entropy),
        clipped_low=total(policy.clipped_low),
        clipped_high=total(policy.clipped_high),
        dual_clipped=total(policy.dual_clipped),
        policy_gap=total(jnp.abs(logprobs - old_logprobs)),
        sampler_gap=total(jnp.abs(sampler_gap)),
        sampler_gap_squared=total(sampler_gap**2),
        tokens=total(jnp.ones_like(mask)),
    )
