"""The loss of GRPO, token by token, and its sums over a batch.

Nothing here divides by a number of tokens: sums of micro-batches, of packed rows and of devices add up to the
sum over the whole update batch, and whoever knows the whole count divides once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
        loss: policy loss + kl_coef * KL; the only one with a meaningful gradient.
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


def clipped_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float = 3.0,
) -> PolicyLoss:
    """PPO's clipped loss with a wider upper clip, and the dual clip for negative advantages.

    With r = exp(logprob - old) the loss is `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, for A < 0 at
    most `-A * dual_clip` (Schulman et al. 2017, arXiv 1707.06347; dual clip: Ye et al. 2020, arXiv
    1912.09729).

    Args:
        logprobs: f32, any shape; the gradient flows through it.
        old_logprobs: the same shape, of the policy that made the rollouts.
        advantages: the same shape.
        clip_low: below 1.
        clip_high: at least 0.
        dual_clip: above 1 + clip_high.

    Returns:
        PolicyLoss of that shape. A mask is true where the bound is what the loss rests on, so that the token
        has no gradient.
    """
    ratio = jnp.exp(jnp.minimum(logprobs - old_logprobs, _LOG_RATIO_MAX))
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
        settings: of the loss.

    Returns:
        LossSums.
    """
    policy = clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    kl = k3_kl(
        logprobs, ref_logprobs, log_ratio_bound=settings.log_ratio_bound, value_bound=settings.kl_value_bound
    )
    sampler_gap = old_logprobs - sampler_logprobs

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(values * mask, dtype=jnp.float32)

    return LossSums(
        loss=total(policy.loss + settings.kl_coef * kl),
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
