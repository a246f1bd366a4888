import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from step_grpo.errors import UserError
from step_grpo.grpo.advantages import group_advantages
from step_grpo.reward.rewards import (
    NAMES,
    accuracy_format,
    grpo_lambda,
    kimi_length,
    length_penalty,
    score,
    step_aware,
)

SETTINGS: dict[str, Any] = {
    "alpha": 0.9,
    "beta": 0.5,
    "baseline": "correct",
    "length_penalty": 0.5,
    "penalty_from": 0.5,
    "max_tokens": 100,
}


def step_aware_by_hand(acc, fmt, k, *, alpha, beta, baseline):
    """METHOD.md, section 3, one completion at a time."""
    rewards = np.zeros(np.shape(k))
    for g in range(len(k)):
        counted = [k[g][i] for i in range(len(k[g])) if acc[g][i] or baseline == "all"]
        for i in range(len(k[g])):
            factor = 1.0
            if any(acc[g]):
                mu = sum(counted) / len(counted)
                factor = 1 - beta * math.tanh((k[g][i] - mu) / mu)
            rewards[g, i] = alpha * acc[g][i] * factor + (1 - alpha) * fmt[g][i]
    return rewards


@st.composite
def groups(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = draw(array_shapes(min_dims=2, max_dims=2, max_side=6))
    correct, formatted = draw(arrays(bool, shape)), draw(arrays(bool, shape))
    return correct, formatted, draw(arrays(np.int32, shape, elements=st.integers(1, 60)))


fractions = st.floats(0, 1)


@given(groups(), fractions, fractions, st.sampled_from(["correct", "all"]))
def test_step_aware_equals_the_formula_written_with_loops(group, alpha, beta, baseline) -> None:
    rewards = step_aware(*group, alpha=alpha, beta=beta, baseline=baseline)
    expected = step_aware_by_hand(*group, alpha=alpha, beta=beta, baseline=baseline)
    np.testing.assert_allclose(rewards, expected, rtol=1e-12, atol=1e-15)


def test_step_aware_of_a_worked_example() -> None:
    # mu = (1 + 3) / 2 = 2; the wrong completion of 100 steps does not move it.
    rewards = step_aware([[1, 1, 0]], [[1, 0, 1]], [[1, 3, 100]])
    expected = [[0.9 * (1 + 0.5 * math.tanh(0.5)) + 0.1, 0.9 * (1 - 0.5 * math.tanh(0.5)), 0.1]]
    np.testing.assert_allclose(rewards, expected, rtol=1e-12)


@given(groups())
def test_fewer_steps_never_earn_less_among_the_correct(group) -> None:
    correct, _, steps = group
    rewards = step_aware(correct, np.ones_like(correct), steps)
    for row in range(len(rewards)):
        chosen = rewards[row][correct[row]][np.argsort(steps[row][correct[row]], kind="stable")]
        assert (np.diff(chosen) <= 1e-12).all()


@given(groups())
def test_a_correct_completion_earns_more_than_a_wrong_one(group) -> None:
    correct, _, steps = group
    rewards = step_aware(correct, np.ones_like(correct), steps)
    assert (rewards[correct] > 0.1 + 0.9 * 0.49).all()
    np.testing.assert_allclose(rewards[~correct], 0.1)


@given(groups())
def test_group_without_a_correct_completion_earns_its_format_only(group) -> None:
    correct, formatted, steps = group
    for baseline in ("correct", "all"):
        rewards = step_aware(np.zeros_like(correct), formatted, steps, baseline=baseline)
        np.testing.assert_allclose(rewards, 0.1 * formatted)


@given(groups(), fractions)
def test_beta_zero_is_the_accuracy_reward(group, alpha) -> None:
    np.testing.assert_array_equal(
        step_aware(*group, alpha=alpha, beta=0.0), accuracy_format(*group[:2], alpha=alpha)
    )


@given(groups())
def test_equal_steps_give_exactly_the_accuracy_reward(group) -> None:
    correct, formatted, steps = group
    same = np.full_like(steps, 7)
    np.testing.assert_array_equal(step_aware(correct, formatted, same), accuracy_format(correct, formatted))


@given(groups())
def test_a_group_is_rewarded_without_regard_to_the_others(group) -> None:
    together = step_aware(*group)
    alone = [step_aware(*(array[row : row + 1] for array in group))[0] for row in range(len(together))]
    np.testing.assert_array_equal(together, alone)


@given(groups())
def test_order_within_a_group_does_not_matter(group) -> None:
    backwards = step_aware(*(array[:, ::-1] for array in group))[:, ::-1]
    np.testing.assert_allclose(step_aware(*group), backwards, rtol=1e-12)


@given(groups(), fractions)
def test_length_penalty_equals_the_formula_written_with_loops(group, penalty) -> None:
    correct, formatted, tokens = group
    rewards = length_penalty(correct, formatted, tokens, penalty=penalty, max_tokens=40)
    for index in np.ndindex(rewards.shape):
        share = min(max(1 - penalty * int(tokens[index]) / 40, 0.0), 1.0)
        assert rewards[index] == pytest.approx(0.9 * correct[index] * share + 0.1 * formatted[index])


def test_length_penalty_is_linear_in_tokens_for_correct_completions_only() -> None:
    rewards = length_penalty([[1, 1, 1, 0]], [[1, 1, 1, 1]], [[0, 50, 100, 100]], penalty=0.5, max_tokens=100)
    np.testing.assert_allclose(rewards, [[1.0, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1]])


def grpo_lambda_by_hand(acc, fmt, n, *, penalty, share, longest):
    """GRPO-lambda, arXiv 2505.18086: a group's correctness ratio decides between two rewards."""
    rewards = np.zeros(np.shape(n))
    for g, group in enumerate(acc):
        short_counts = sum(bool(right) for right in group) >= share * len(group)
        for i, right in enumerate(group):
            factor = max(1 - penalty * int(n[g][i]) / longest, 0.0) if short_counts else 1.0
            rewards[g, i] = 0.9 * bool(right) * factor + 0.1 * bool(fmt[g][i])
    return rewards


@given(groups(), fractions, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_grpo_lambda_equals_the_formula_written_with_loops(group, penalty, share) -> None:
    rewards = grpo_lambda(*group, penalty=penalty, penalty_from=share, max_tokens=40)
    expected = grpo_lambda_by_hand(*group, penalty=penalty, share=share, longest=40)
    np.testing.assert_allclose(rewards, expected, rtol=1e-12, atol=1e-15)


def test_grpo_lambda_penalises_length_from_the_least_share_on() -> None:
    correct = [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]  # three fifths, and less
    rewards = grpo_lambda(correct, np.zeros((2, 5)), np.full((2, 5), 100), penalty_from=0.6, max_tokens=100)
    np.testing.assert_allclose(rewards, [[0.45, 0.45, 0.45, 0, 0], [0.9, 0.9, 0, 0, 0]])


@given(groups(), fractions)
def test_grpo_lambda_of_every_group_is_the_length_penalty(group, penalty) -> None:
    np.testing.assert_array_equal(
        grpo_lambda(*group, penalty=penalty, penalty_from=0.0, max_tokens=40),
        length_penalty(*group, penalty=penalty, max_tokens=40),
    )


def test_strength_of_a_penalty_cancels_in_a_group_that_is_all_right() -> None:
    def advantages(correct: Any, penalty: float) -> np.ndarray:
        rewards = length_penalty(correct, [[1, 1, 1]], [[20, 60, 90]], penalty=penalty, max_tokens=100)
        return group_advantages(rewards)

    np.testing.assert_allclose(advantages([[1, 1, 1]], 0.25), advantages([[1, 1, 1]], 1.0), rtol=1e-4)
    weak, strong = advantages([[1, 1, 0]], 0.25), advantages([[1, 1, 0]], 1.0)
    assert strong[0, 0] - strong[0, 1] > 2 * (weak[0, 0] - weak[0, 1])


def kimi_length_by_hand(acc, fmt, n, *, penalty):
    """Kimi k1.5, arXiv 2501.12599, section 2.3.3, one completion at a time."""
    rewards = np.zeros(np.shape(n))
    for g, tokens in enumerate(n):
        for i, own in enumerate(tokens):
            length = 0.0
            if min(tokens) < max(tokens):
                length = 0.5 - (int(own) - int(min(tokens))) / (int(max(tokens)) - int(min(tokens)))
            if not acc[g][i]:
                length = min(0.0, length)
            rewards[g, i] = 0.9 * bool(acc[g][i]) + 0.1 * bool(fmt[g][i]) + penalty * length
    return rewards


@given(groups(), fractions)
def test_kimi_length_equals_the_formula_written_with_loops(group, penalty) -> None:
    rewards = kimi_length(*group, penalty=penalty)
    np.testing.assert_allclose(rewards, kimi_length_by_hand(*group, penalty=penalty), rtol=1e-12, atol=1e-15)


def test_kimi_length_makes_long_failures_worse_and_short_ones_no_better() -> None:
    rewards = kimi_length([[1, 1, 0, 0], [0, 0, 0, 0]], np.zeros((2, 4)), [[10, 30, 10, 30]] * 2, penalty=0.4)
    np.testing.assert_allclose(rewards, [[0.9 + 0.2, 0.9 - 0.2, 0, -0.2], [0, -0.2, 0, -0.2]])


def test_score_dispatches_by_name() -> None:
    correct, formatted, steps, tokens = [[1, 1, 0]], [[1, 1, 0]], [[1, 4, 2]], [[10, 90, 50]]
    expected = {
        "step_aware": step_aware(correct, formatted, steps),
        "accuracy": accuracy_format(correct, formatted),
        "length_penalty": length_penalty(correct, formatted, tokens, penalty=0.5, max_tokens=100),
        "grpo_lambda": grpo_lambda(correct, formatted, tokens, penalty=0.5, penalty_from=0.5, max_tokens=100),
        "kimi_length": kimi_length(correct, formatted, tokens, penalty=0.5),
        "none": np.zeros((1, 3)),
    }
    assert set(expected) == set(NAMES)
    for name in NAMES:
        rewards = score(name, correct, formatted, steps, tokens, **SETTINGS)
        assert rewards.dtype == np.float64
        np.testing.assert_array_equal(rewards, expected[name])


def test_score_passes_every_setting_on() -> None:
    batch: Any = ([[1, 1, 0]], [[1, 1, 1]], [[1, 4, 2]], [[10, 90, 50]])
    reads = {
        "step_aware": {"alpha", "beta", "baseline"},
        "accuracy": {"alpha"},
        "length_penalty": {"alpha", "length_penalty", "max_tokens"},
        "grpo_lambda": {"alpha", "length_penalty", "penalty_from", "max_tokens"},
        "kimi_length": {"alpha", "length_penalty"},
    }
    other = {"alpha": 0.5, "beta": 0.25, "baseline": "all", "length_penalty": 0.25, "max_tokens": 200}
    other |= {"penalty_from": 0.75}
    for name, used in reads.items():
        before = score(name, *batch, **SETTINGS)
        for field, value in other.items():
            changed = not np.array_equal(before, score(name, *batch, **{**SETTINGS, field: value}))
            assert changed == (field in used), (name, field)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("no_such", "alpha", 0.9),
        ("accuracy", "alpha", 1.5),
        ("accuracy", "alpha", float("nan")),
        ("step_aware", "beta", -0.1),
        ("step_aware", "baseline", "median"),
        ("length_penalty", "length_penalty", 2.0),
        ("length_penalty", "max_tokens", 0),
        ("grpo_lambda", "penalty_from", 1.5),
        ("kimi_length", "length_penalty", -0.1),
    ],
)
def test_wrong_setting_is_a_user_error_that_names_it(name: str, field: str, value: Any) -> None:
    named = "step_aware, accuracy" if name == "no_such" else field.removeprefix("length_")
    with pytest.raises(UserError, match=named):
        score(name, [[1]], [[1]], [[1]], [[1]], **{**SETTINGS, field: value})


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        (([[2]], [[1]], [[1]]), "correct"),
        (([[1]], [[0.5]], [[1]]), "formatted"),
        (([[1]], [[1]], [[0]]), "steps"),
        (([[1]], [[1]], [[float("nan")]]), "steps"),
        (([[1, 1]], [[1]], [[1]]), "prompts, samples"),
        (([1], [1], [1]), "prompts, samples"),
    ],
)
def test_wrong_array_is_an_error_that_names_it(arrays: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        step_aware(*arrays)


def test_empty_batch_gives_an_empty_batch() -> None:
    assert step_aware(np.zeros((0, 5)), np.zeros((0, 5)), np.zeros((0, 5))).shape == (0, 5)
