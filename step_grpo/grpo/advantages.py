"""Group-relative advantages."""

from typing import TypeVar

import jax
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)


def group_advantages(rewards: Array, *, eps: float = 1e-6) -> Array:
    """How much better each completion is than its group, in standard deviations of the group.

    `(R - mean) / (std + eps)` over the completions of one prompt, the std with Bessel's correction. Groups
    whose rewards are all equal, and groups of one, get advantages of exactly 0.

    Args:
        rewards: [prompts, samples], any real type; NumPy in, NumPy out, and JAX in, JAX out (also under jit).
        eps: added to the standard deviation.

    Returns:
        f32 [prompts, samples].
    """
    if not isinstance(rewards, jax.Array):
        rewards = np.asarray(rewards)
    rewards = rewards.astype(np.float32)
    # The rounded mean of equal values need not be that value (seven times 0.9, say), and the difference over
    # eps would pass for a signal. Seen from the group's first reward equal rewards are exact zeros.
    shifted = rewards - rewards[:, :1]
    centred = shifted - shifted.mean(axis=1, keepdims=True)
    degrees_of_freedom = max(rewards.shape[1] - 1, 1)
    std = ((centred**2).sum(axis=1, keepdims=True) / degrees_of_freedom) ** 0.5
    return centred / (std + eps)
