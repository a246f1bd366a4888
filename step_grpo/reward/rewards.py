"""Rewards of groups of completions: step-aware (Step-GRPO), accuracy and format, length penalties.

Every array is `[prompts, samples]`: a row is a group, the completions of one prompt. Everything is computed
and returned in float64; the update casts it when it has subtracted the group's mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from step_grpo.errors import UserError

BASELINES = ("correct", "all")

Array = NDArray[np.float64]


def step_aware(
    correct: ArrayLike,
    formatted: ArrayLike,
    steps: ArrayLike,
    *,
    alpha: float = 0.9,
    beta: float = 0.5,
    baseline: str = "correct",
) -> Array:
    """Rewards a correct completion more, the fewer semantic steps it took compared with its group.

    `R = alpha * acc * (1 - beta * tanh((k - mu) / mu)) + (1 - alpha) * fmt`, where `mu` is the mean of k
    over the correct completions of the group. Without a correct one the factor in brackets is 1.

    Args:
        correct: acc, 0 or 1, `[prompts, samples]`.
        formatted: fmt, 0 or 1, `[prompts, samples]`.
        steps: k, semantic steps of the whole completion, at least 1, `[prompts, samples]`.
        alpha: Weight of correctness against format, in [0, 1].
        beta: Strength of the step term, in [0, 1]; 0 gives `accuracy_format`.
        baseline: "correct", or "all" for the ablation that averages k over every completion of the group.

    Returns:
        Rewards, float64 `[prompts, samples]`.

    Raises:
        UserError: A setting is out of range.
        ValueError: The arrays differ in shape or hold other values.

    Source: Step-GRPO (arXiv 2604.16890), Sections 3.3 and 3.4, Eq. 4 and 5.
    """
    _check_fraction("beta", beta)
    if baseline not in BASELINES:
        raise UserError(f"baseline={baseline!r}: must be one of {', '.join(BASELINES)}")
    acc, fmt = _indicator("correct", correct), _indicator("formatted", formatted)
    k = _counts("steps", steps, least=1)
    _check_shapes(correct=acc, formatted=fmt, steps=k)

    counted = acc if baseline == "correct" else np.ones_like(acc)
    any_correct = acc.any(axis=1, keepdims=True)
    total, number = (k * counted).sum(axis=1, keepdims=True), counted.sum(axis=1, keepdims=True)
    mu = np.where(any_correct, total / np.maximum(number, 1), 1.0)  # 1.0 only keeps the unused branch finite
    factor = np.where(any_correct, 1 - beta * np.tanh((k - mu) / mu), 1.0)
    return _combine(acc * factor, fmt, alpha)


def accuracy_format(correct: ArrayLike, formatted: ArrayLike, *, alpha: float = 0.9) -> Array:
    """Plain GRPO's reward: `R = alpha * acc + (1 - alpha) * fmt`.

    Args:
        correct: acc, 0 or 1, `[prompts, samples]`.
        formatted: fmt, 0 or 1, `[prompts, samples]`.
        alpha: Weight of correctness against format, in [0, 1].

    Returns:
        Rewards, float64 `[prompts, samples]`.

    Raises:
        UserError: `alpha` is out of range.
        ValueError: The arrays differ in shape or hold other values.

    Source: a reward for each outcome, as GRPO was introduced with (Shao et al. 2024, "DeepSeekMath", arXiv
    2402.03300); accuracy and format weighted as in Step-GRPO (arXiv 2604.16890), Eq. 5.
    """
    acc, fmt = _indicator("correct", correct), _indicator("formatted", formatted)
    _check_shapes(correct=acc, formatted=fmt)
    return _combine(acc, fmt, alpha)


def length_penalty(
    correct: ArrayLike,
    formatted: ArrayLike,
    tokens: ArrayLike,
    *,
    alpha: float = 0.9,
    penalty: float = 0.5,
    max_tokens: int,
) -> Array:
    """The GRPO+LP baseline: a correct completion earns less, the more tokens it took.

    `R = alpha * acc * clip(1 - penalty * n / max_tokens, 0, 1) + (1 - alpha) * fmt`

    Args:
        correct: acc, 0 or 1, `[prompts, samples]`.
        formatted: fmt, 0 or 1, `[prompts, samples]`.
        tokens: n, tokens of the completion, `[prompts, samples]`.
        alpha: Weight of correctness against format, in [0, 1].
        penalty: What a correct completion of `max_tokens` tokens loses, in [0, 1].
        max_tokens: The response budget in tokens.

    Returns:
        Rewards, float64 `[prompts, samples]`.

    Raises:
        UserError: A setting is out of range.
        ValueError: The arrays differ in shape or hold other values.

    Source: the reward of LCPO-Max, `acc * clip(a * (n_gold - n) + d, 0, 1)` (Aggarwal and Welleck, "L1",
    arXiv 2503.04697), with no target length (n_gold = 0), d = 1 and a = penalty / max_tokens.
    """
    _check_fraction("penalty", penalty)
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens}: must be at least 1")
    acc, fmt = _indicator("correct", correct), _indicator("formatted", formatted)
    n = _counts("tokens", tokens, least=0)
    _check_shapes(correct=acc, formatted=fmt, tokens=n)
    return _combine(acc * np.clip(1 - penalty * n / max_tokens, 0, 1), fmt, alpha)


def grpo_lambda(
    correct: ArrayLike,
    formatted: ArrayLike,
    tokens: ArrayLike,
    *,
    alpha: float = 0.9,
    penalty: float = 0.5,
    penalty_from: float = 0.5,
    max_tokens: int,
) -> Array:
    """The GRPO-lambda baseline: `length_penalty` in groups that are mostly correct, else `accuracy_format`.

    With p the share of correct completions in the group, `R = length_penalty` where p >= penalty_from, and
    `R = alpha * acc + (1 - alpha) * fmt` in the other groups, which have to become right before they become
    short.

    The paper chooses the reward of a group by its correctness ratio. Two things are choices made here. Its
    groups are said to be chosen by rank, a top share of each batch; a fixed least ratio rewards a group
    without regard to the others. And the penalty is that of the GRPO+LP baseline, so that the two differ in
    nothing but where it applies; it is not the paper's own formula.

    Args:
        correct: acc, 0 or 1, `[prompts, samples]`.
        formatted: fmt, 0 or 1, `[prompts, samples]`.
        tokens: n, tokens of the completion, `[prompts, samples]`.
        alpha: Weight of correctness against format, in [0, 1].
        penalty: As in `length_penalty`.
        penalty_from: Least share of correct completions for the penalty, in [0, 1]; 0 gives `length_penalty`.
        max_tokens: The response budget in tokens.

    Returns:
        Rewards, float64 `[prompts, samples]`.

    Raises:
        UserError: A setting is out of range.
        ValueError: The arrays differ in shape or hold other values.

    Source: Dai, Liu and Si, "Stable Reinforcement Learning for Efficient Reasoning" (arXiv 2505.18086).
    """
    _check_fraction("penalty_from", penalty_from)
    penalised = length_penalty(
        correct, formatted, tokens, alpha=alpha, penalty=penalty, max_tokens=max_tokens
    )
    acc = _indicator("correct", correct)
    mostly_correct = acc.mean(axis=1, keepdims=True) >= penalty_from
    return np.where(mostly_correct, penalised, accuracy_format(correct, formatted, alpha=alpha))


def kimi_length(
    correct: ArrayLike,
    formatted: ArrayLike,
    tokens: ArrayLike,
    *,
    alpha: float = 0.9,
    penalty: float = 0.5,
) -> Array:
    """The length reward of Kimi k1.5: a token penalty relative to the group, for wrong completions too.

    `R = alpha * acc + (1 - alpha) * fmt + penalty * r`, with `r = l` for a correct completion and `min(0, l)`
    for a wrong one, where `l = 0.5 - (n - shortest) / (longest - shortest)` over the whole group. A group of
    one length has r = 0. Other than `length_penalty` it makes long failures worse than short ones.

    Args:
        correct: acc, 0 or 1, `[prompts, samples]`.
        formatted: fmt, 0 or 1, `[prompts, samples]`.
        tokens: n, tokens of the completion, `[prompts, samples]`.
        alpha: Weight of correctness against format, in [0, 1].
        penalty: Weight of the length reward, in [0, 1].

    Returns:
        Rewards, float64 `[prompts, samples]`.

    Raises:
        UserError: A setting is out of range.
        ValueError: The arrays differ in shape or hold other values.

    Source: Kimi Team, "Kimi k1.5: Scaling Reinforcement Learning with LLMs" (arXiv 2501.12599), 2.3.3.
    """
    _check_fraction("penalty", penalty)
    acc, fmt = _indicator("correct", correct), _indicator("formatted", formatted)
    n = _counts("tokens", tokens, least=0)
    _check_shapes(correct=acc, formatted=fmt, tokens=n)
    spread = np.ptp(n, axis=1, keepdims=True)
    longer = n - n.min(axis=1, keepdims=True)
    short = np.where(spread > 0, 0.5 - longer / np.maximum(spread, 1), 0.0)
    return _combine(acc, fmt, alpha) + penalty * np.where(acc > 0, short, np.minimum(short, 0.0))


class _Settings(NamedTuple):
    alpha: float
    beta: float
    baseline: str
    penalty: float
    penalty_from: float
    max_tokens: int


_Reward = Callable[[ArrayLike, ArrayLike, ArrayLike, ArrayLike, _Settings], Array]
_REWARDS: dict[str, _Reward] = {
    "step_aware": lambda acc, fmt, k, n, use: step_aware(
        acc, fmt, k, alpha=use.alpha, beta=use.beta, baseline=use.baseline
    ),
    "accuracy": lambda acc, fmt, k, n, use: accuracy_format(acc, fmt, alpha=use.alpha),
    "length_penalty": lambda acc, fmt, k, n, use: length_penalty(
        acc, fmt, n, alpha=use.alpha, penalty=use.penalty, max_tokens=use.max_tokens
    ),
    "grpo_lambda": lambda acc, fmt, k, n, use: grpo_lambda(
        acc,
        fmt,
        n,
        alpha=use.alpha,
        penalty=use.penalty,
        penalty_from=use.penalty_from,
        max_tokens=use.max_tokens,
    ),
    "kimi_length": lambda acc, fmt, k, n, use: kimi_length(acc, fmt, n, alpha=use.alpha, penalty=use.penalty),
    "none": lambda acc, fmt, k, n, use: np.zeros_like(_indicator("correct", acc)),
}
NAMES = tuple(_REWARDS)
"""The rewards that `score` knows."""


def score(
    name: str,
    correct: ArrayLike,
    formatted: ArrayLike,
    steps: ArrayLike,
    tokens: ArrayLike,
    *,
    alpha: float,
    beta: float,
    baseline: str,
    length_penalty: float,
    penalty_from: float,
    max_tokens: int,
) -> Array:
    """Computes the reward that a config names; a setting that this reward does not use is ignored.

    Args:
        name: One of `NAMES`.
        correct: 0 or 1, `[prompts, samples]`.
        formatted: 0 or 1, `[prompts, samples]`.
        steps: Semantic steps, `[prompts, samples]`.
        tokens: Tokens of the completion, `[prompts, samples]`.
        alpha: As in each reward.
        beta: As in `step_aware`.
        baseline: As in `step_aware`.
        length_penalty: The `penalty` of `length_penalty`, `grpo_lambda` and `kimi_length`.
        penalty_from: As in `grpo_lambda`.
        max_tokens: As in the function `length_penalty`.

    Returns:
        Rewards, float64 `[prompts, samples]`.

    Raises:
        UserError: There is no such reward, or a setting is out of range.
        ValueError: The arrays differ in shape or hold other values.
    """
    if name not in _REWARDS:
        raise UserError(f"reward.name={name!r}: must be one of {', '.join(NAMES)}")
    settings = _Settings(alpha, beta, baseline, length_penalty, penalty_from, max_tokens)
    return _REWARDS[name](correct, formatted, steps, tokens, settings)


def _combine(accuracy: Array, fmt: Array, alpha: float) -> Array:
    _check_fraction("alpha", alpha)
    return alpha * accuracy + (1 - alpha) * fmt


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:  # false for NaN too
        raise UserError(f"{name}={value}: must lie between 0 and 1")


def _check_shapes(**arrays: Array) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"expected equal shapes [prompts, samples], got {shapes}")


def _indicator(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError(f"{name}: every value must be 0 or 1")
    return array


def _counts(name: str, values: ArrayLike, *, least: int) -> Array:
    array = np.asarray(values, np.float64)
    if not ((array >= least) & (array < np.inf)).all():
        raise ValueError(f"{name}: every value must be a finite count of at least {least}")
    return array
