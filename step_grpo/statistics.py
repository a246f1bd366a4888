"""What k completions a question say: averages, pass@k, majorities, intervals, and comparisons of two runs.

Pure NumPy over arrays `[questions, samples]`. Questions are drawn from a population and completions of one
question resemble each other, so every interval resamples questions and never single completions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95  # of every interval
RESAMPLES = 10_000
_CHUNK = 2_000_000  # drawn questions in memory at a time


@dataclass(frozen=True)
class Outcomes:
    """What a model did on a set of questions, `[Q, S]` each, for Q questions with S completions.

    Attributes:
        correct: whether the answer was right.
        tokens: of the completion.
        steps: of the completion.
        truncated: whether it was cut off by the length limit.
        votes: number of the answer among the question's answers, equal for equal answers; -1 for none.
    """

    correct: np.ndarray
    tokens: np.ndarray
    steps: np.ndarray
    truncated: np.ndarray
    votes: np.ndarray


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Another run minus a base run, its 95 % interval, and a two-sided p-value of there being none."""

    mean: float
    low: float
    high: float
    p_value: float


# ---------------------------------------------------------------------- of one question


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Chance that at least one of k completions is right, of each question, without bias.

    One minus the share of the subsets of k completions that hold no right one (Chen et al. 2021, "Evaluating
    Large Language Models Trained on Code", equation 1).

    >>> print(pass_at_k(np.array([[1, 0, 0, 0], [1, 1, 1, 1]]), k=2))
    [0.5 1. ]

    Args:
        correct: `[Q, S]`.
        k: 1 to S.

    Returns:
        `[Q]`.

    Raises:
        ValueError: k is not in its range.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {samples}, the completions a question")
    subsets = math.comb(samples, k)
    chance = np.array([1 - math.comb(samples - right, k) / subsets for right in range(samples + 1)])
    return chance[correct.astype(bool).sum(axis=1)]


def majority(correct: np.ndarray, votes: np.ndarray) -> np.ndarray:
    """Whether the most frequent answer of each question is right; answers that tie share the vote.

    Args:
        correct: `[Q, S]`; equal answers are equally right.
        votes: `[Q, S]`, equal for equal answers, below 0 for a completion without one, which has no vote.

    Returns:
        `[Q]`, between 0 and 1; 0 where no completion has an answer.
    """
    supporters = (votes[:, :, None] == votes[:, None, :]).sum(axis=2) * (votes >= 0)  # of each one's answer
    most = supporters.max(axis=1, keepdims=True)
    winning = (supporters == most) & (most > 0)
    # Each of the answers that tie has equally many winning completions, so their mean is the answers' mean.
    return np.where(winning, correct, 0).sum(axis=1) / np.maximum(winning.sum(axis=1), 1)


# ---------------------------------------------------------------------- over questions


def bootstrap(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of questions drawn with replacement, as many as there are.

    Args:
        values: `[Q, M]`: M figures of each question, resampled together.
        seed: the same seed draws the same questions, whatever the figures.
        resamples: R.

    Returns:
        `[R, M]`.
    """
    questions = len(values)
    rng = np.random.default_rng(seed)
    means = [counts @ values / questions for counts in _draws(rng, questions, resamples)]
    return np.concatenate(means)


def _draws(rng: np.random.Generator, questions: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each question is drawn, `[some resamples, Q]` at a time."""
    at_once = max(1, _CHUNK // questions)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = rng.integers(questions, size=(rows, questions)) + questions * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * questions).reshape(rows, questions).astype(float)


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """The ends of the 95 % interval of bootstrap draws `[R]`."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean of a figure of each question, `[Q]`, with its bootstrap interval."""
    draws = bootstrap(values[:, None].astype(float), seed, resamples)[:, 0]
    return Interval(float(values.mean()), *percentiles(draws))


def accuracy_interval(correct: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """avg@k of `[Q, S]` verdicts with its 95 % interval.

    Wilson's where there is a single sample a question, and where all completions of all questions are right,
    or all are wrong: resampling them would claim certainty. Else the bootstrap over questions.
    """
    questions, samples = correct.shape
    if samples == 1 or correct.all() or not correct.any():
        right = int(correct[:, 0].sum())
        return Interval(right / questions, *wilson_interval(right, questions))
    return mean_interval(correct.mean(axis=1), seed, resamples)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default (Wilson 1927)."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def average_interval(values: Sequence[np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean of the means of several benchmarks, each counting the same, resampled each by itself.

    Args:
        values: a figure of each question, `[Q]` of each benchmark.
        seed: of the draws.
        resamples: of the draws.
    """
    draws = [
        bootstrap(v[:, None].astype(float), _child(seed, i), resamples)[:, 0] for i, v in enumerate(values)
    ]
    return Interval(float(np.mean([v.mean() for v in values])), *percentiles(np.mean(draws, axis=0)))


def _child(seed: int, number: int) -> int:
    """A seed of its own for each benchmark; the first has the seed itself."""
    return seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


# ---------------------------------------------------------------------- two runs


def paired_bootstrap(
    base: np.ndarray, other: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """The difference of two runs on the same questions, resampled together.

    Args:
        base: `[Q]`, a figure of each question.
        other: `[Q]`, the same of the other run.
        seed: of the draws.
        resamples: of the draws.

    Raises:
        ValueError: the runs have different numbers of questions.
    """
    return average_difference([base], [other], seed, resamples)


def average_difference(
    bases: Sequence[np.ndarray], others: Sequence[np.ndarray], seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """`paired_bootstrap` averaged over benchmarks, each counting the same, resampled each by itself."""
    gains = [_difference(base, other) for base, other in zip(bases, others, strict=True)]
    draws = [bootstrap(g[:, None], _child(seed, i), resamples)[:, 0] for i, g in enumerate(gains)]
    return _judge(float(np.mean([g.mean() for g in gains])), np.mean(draws, axis=0))


def paired_saving(
    base: np.ndarray, other: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """Relative change of a positive figure, such as tokens: mean of the other over mean of the base, minus 1.

    Args:
        base: `[Q]`, a figure of each question.
        other: `[Q]`, the same of the other run.
        seed: of the draws.
        resamples: of the draws.

    Raises:
        ValueError: the runs have different numbers of questions.
    """
    return average_saving([base], [other], seed, resamples)


def average_saving(
    bases: Sequence[np.ndarray], others: Sequence[np.ndarray], seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """`paired_saving` averaged over benchmarks, each counting the same, resampled each by itself."""
    changes, draws = [], []
    for i, (base, other) in enumerate(zip(bases, others, strict=True)):
        _difference(base, other)  # refuses what does not fit
        drawn = bootstrap(np.stack([base, other], axis=1).astype(float), _child(seed, i), resamples)
        changes.append(other.mean() / base.mean() - 1)
        draws.append(drawn[:, 1] / drawn[:, 0] - 1)
    return _judge(float(np.mean(changes)), np.mean(draws, axis=0))


def _difference(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    if base.shape != other.shape or base.ndim != 1:
        raise ValueError(f"the runs must have one figure for each question, not {base.shape}, {other.shape}")
    return other.astype(float) - base.astype(float)


def _judge(mean: float, draws: np.ndarray) -> Difference:
    """Interval and p-value of bootstrap draws `[R]` of a difference.

    The p-value is the level at which the percentile interval would just reach 0. The observed difference
    counts as one more draw, on both sides, so that it is never 0 (Davison and Hinkley 1997, section 4.2).
    """
    tiny = 1e-12 * max(1.0, float(np.abs(draws).max()))  # sums in another order differ by so much
    tail = min(np.count_nonzero(draws <= tiny), np.count_nonzero(draws >= -tiny))
    p_value = min(1.0, 2 * (tail + 1) / (len(draws) + 1))
    return Difference(mean, *percentiles(draws), p_value)


def compare(
    base: Outcomes, other: Outcomes, seed: int = 0, resamples: int = RESAMPLES
) -> Mapping[str, Difference]:
    """Differences of accuracy, tokens and steps of two runs on the same questions.

    The runs may have different numbers of completions a question; a question counts by its mean.

    Returns:
        `accuracy`, `tokens` and `steps`, and `tokens_relative`, where -0.3 says 30 % fewer tokens.
    """

    def means(name: str) -> tuple[np.ndarray, np.ndarray]:
        return getattr(base, name).mean(axis=1), getattr(other, name).mean(axis=1)

    return {
        "accuracy": paired_bootstrap(*means("correct"), seed, resamples),
        "tokens": paired_bootstrap(*means("tokens"), seed, resamples),
        "tokens_relative": paired_saving(*means("tokens"), seed, resamples),
        "steps": paired_bootstrap(*means("steps"), seed, resamples),
    }


# ---------------------------------------------------------------------- all figures of an evaluation


def figures(outcomes: Outcomes, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """What an evaluation reports, all plain numbers.

    Returns:
        `accuracy` is avg@k. `pass_at_k` has an entry for each power of two up to the number of completions,
        and for that number. Those ending in `_low` and `_high` are the ends of 95 % intervals.
    """
    questions, samples = outcomes.correct.shape
    accuracy = accuracy_interval(outcomes.correct, seed, resamples)
    tokens = mean_interval(outcomes.tokens.mean(axis=1), seed, resamples)
    steps = mean_interval(outcomes.steps.mean(axis=1), seed, resamples)
    voted = majority(outcomes.correct, outcomes.votes)
    ks = sorted({1 << i for i in range(samples.bit_length())} | {samples})
    return {
        **named("accuracy", accuracy),
        **named("tokens", tokens),
        "tokens_median": float(np.median(outcomes.tokens)),
        **named("steps", steps),
        "truncated": float(outcomes.truncated.mean()),
        "questions": questions,
        "samples": samples,
        "pass_at_k": {str(k): float(pass_at_k(outcomes.correct, k).mean()) for k in ks},
        **named("maj_at_k", mean_interval(voted, seed, resamples)),
    }


def named(name: str, interval: Interval) -> dict[str, float]:
    """An interval as entries of a report."""
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
