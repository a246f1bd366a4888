"""Group-relative advantages, and which groups have any."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import ArrayLike

from step_grpo.errors import UserError

Array = TypeVar("Array", np.ndarray, jax.Array)


def group_advantages(rewards: Array, *, eps: float = 1e-6) -> Array:
    """How much better each completion is than its group, in standard deviations of the group.

    `(R - mean) / (std + eps)` over the completions of one prompt, the std with Bessel's correction. Groups
    whose rewards are all equal, and groups of one, get advantages of exactly 0.

    >>> print(group_advantages(np.array([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]])).round(3))
    [[-1.  0.  1.]
     [ 0.  0.  0.]]

    Args:
        rewards: [prompts, samples], any real type; NumPy in, NumPy out, and JAX in, JAX out (also under jit).
        eps: added to the standard deviation.

    Returns:
        f32 [prompts, samples].

    Source: GRPO, Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300).
    """
    centred = centred_advantages(rewards)
    degrees_of_freedom = max(centred.shape[1] - 1, 1)
    std = ((centred**2).sum(axis=1, keepdims=True) / degrees_of_freedom) ** 0.5
    return centred / (std + eps)


def centred_advantages(rewards: Array) -> Array:
    """How much better each completion is than the mean of its group, in units of the reward.

    `R - mean`, the advantage of Dr. GRPO: dividing by the std would give questions that are nearly always or
    nearly never answered more weight than the others. Equal rewards give exactly 0.

    Args:
        rewards: as in `group_advantages`.

    Returns:
        f32 [prompts, samples].

    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv 2503.20783). Its other half, a
    loss divided by a constant, is `config.grpo.loss_mean = "constant"`.
    """
    if not isinstance(rewards, jax.Array):
        rewards = np.asarray(rewards)
    rewards = rewards.astype(np.float32)
    # The rounded mean of equal values need not be that value (seven times 0.9, say), and the difference over
    # eps would pass for a signal. Seen from the group's first reward equal rewards are exact zeros.
    shifted = rewards - rewards[:, :1]
    return shifted - shifted.mean(axis=1, keepdims=True)


def leave_one_out_advantages(rewards: Array) -> Array:
    """How much better each completion is than the mean of the others of its group, in units of the reward.

    `R_i - sum of R_j over j != i / (G - 1)`, which is `G / (G - 1)` times the centred reward. Groups of one,
    which have no others, and equal rewards give exactly 0.

    Args:
        rewards: as in `group_advantages`.

    Returns:
        f32 [prompts, samples].

    Source: RLOO, Ahmadian et al. 2024, "Back to Basics" (arXiv 2402.14740). This is its baseline
    alone: the paper's KL inside the reward and its plain REINFORCE loss are not part of it.
    """
    centred = centred_advantages(rewards)
    samples = centred.shape[1]
    return centred * (samples / max(samples - 1, 1))


_ADVANTAGES: dict[str, Callable[[Any], Any]] = {
    "grpo": group_advantages,
    "dr_grpo": centred_advantages,
    "rloo": leave_one_out_advantages,
}
NAMES = tuple(_ADVANTAGES)
"""The advantages that `advantages` knows."""


def advantages(name: str, rewards: Array) -> Array:
    """The advantages that a config names, f32 `[prompts, samples]`.

    Args:
        name: one of `NAMES`.
        rewards: as in `group_advantages`.

    Raises:
        UserError: there are no such advantages.
    """
    if name not in _ADVANTAGES:
        raise UserError(f"grpo.advantage={name!r}: must be one of {', '.join(NAMES)}")
    return _ADVANTAGES[name](rewards)


def mixed_groups(correct: ArrayLike) -> np.ndarray:
    """The groups that DAPO's dynamic sampling keeps: some completions are correct, and some are not.

    `0 < number of correct completions < G`. A group that is all correct is dropped even where a reward of
    steps or length would tell its completions apart: the paper's rule speaks of accuracy alone.

    Args:
        correct: 0 or 1, `[prompts, samples]`.

    Returns:
        Their row numbers, ascending, int `[kept]`.

    Source: Yu et al. 2025, DAPO (arXiv 2503.14476).
    """
    correct = np.asarray(correct, bool)
    return np.flatnonzero(correct.any(axis=1) & ~correct.all(axis=1))
