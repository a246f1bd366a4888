"""Group advantages against a float64 restatement of METHOD section 4, and what must be exactly zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from step_grpo.grpo.advantages import group_advantages

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
REWARDS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=st.floats(-8, 8, width=32)
)


def restated(rewards):
    out = np.zeros(rewards.shape)
    for row, group in enumerate(np.asarray(rewards, np.float64)):
        out[row] = (group - group.mean()) / (group.std(ddof=1) + 1e-6)
    return out


@given(FINITE, st.integers(1, 64))
def test_equal_rewards_give_exactly_zero_advantages(value, samples):
    advantages = group_advantages(np.full((2, samples), value, np.float32))
    assert advantages.dtype == np.float32
    assert (advantages == 0).all()


@pytest.mark.parametrize(("value", "samples"), [(0.1, 5), (0.9, 7), (0.7, 11)])
def test_rounding_of_the_mean_of_equal_rewards_leaves_no_signal(value, samples):
    for dtype in (np.float32, np.float64):
        rewards = np.full((1, samples), value, dtype)
        assert (group_advantages(rewards) == 0).all()
    rewards = jnp.full((1, samples), value)
    assert (group_advantages(rewards) == 0).all()
    assert (jax.jit(group_advantages)(rewards) == 0).all()


def test_some_mean_of_equal_rewards_really_is_rounded():
    # Else the test above would hold for the plain formula too.
    groups = [np.full(n, v, np.float32) for v in (0.1, 0.7, 0.9) for n in range(2, 20)]
    assert any(group.mean() != group[0] for group in groups)


def test_group_of_one_gives_zero():
    assert group_advantages(np.array([[0.3], [1.0]], np.float32)).tolist() == [[0.0], [0.0]]


@given(REWARDS)
def test_advantages_equal_the_restatement(rewards):
    expected = restated(rewards)
    spread = np.ptp(rewards, axis=1, keepdims=True)
    # Where rewards differ only in their last bits, the float32 differences are what is left of them.
    sane = np.broadcast_to((spread > 1e-3) | (spread == 0), rewards.shape)
    np.testing.assert_allclose(group_advantages(rewards)[sane], expected[sane], rtol=1e-4, atol=1e-4)


@given(REWARDS)
def test_better_rewards_never_get_smaller_advantages(rewards):
    for group, advantages in zip(rewards, group_advantages(rewards), strict=True):
        assert (np.diff(advantages[np.argsort(group, kind="stable")]) >= 0).all()
        assert np.isfinite(advantages).all()


@given(hnp.arrays(np.float32, (2, 5), elements=st.floats(-8, 8, width=32)))  # one shape: one compilation
def test_jax_and_numpy_agree(rewards):
    np.testing.assert_allclose(
        group_advantages(jnp.asarray(rewards)), group_advantages(rewards), rtol=1e-4, atol=1e-5
    )


def test_each_prompt_is_its_own_group():
    rewards = np.array([[0, 1, 1], [1, 1, 1]], np.float32)
    advantages = group_advantages(rewards)
    np.testing.assert_allclose(advantages[0], restated(rewards)[0], rtol=1e-6)
    assert (advantages[1] == 0).all()


def test_integer_and_boolean_rewards_are_taken():
    expected = group_advantages(np.array([[0, 1, 1]], np.float32))
    np.testing.assert_array_equal(group_advantages(np.array([[0, 1, 1]])), expected)
    np.testing.assert_array_equal(group_advantages(np.array([[False, True, True]])), expected)
