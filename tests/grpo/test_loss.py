"""The loss against a float64 restatement of METHOD section 4, token by token in plain Python."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_grpo.errors import UserError
from step_grpo.grpo.loss import clipped_policy_loss, grpo_loss_sums, k3_kl
from step_grpo.grpo.settings import GrpoSettings


def policy_loss_of_token(logprob, old, advantage):
    ratio = math.exp(logprob - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.3))
    return min(loss, -advantage * 3.0) if advantage < 0 else loss


def k3_of_token(logprob, ref):
    x = min(max(ref - logprob, -20.0), 20.0)
    return min(max(math.exp(x) - x - 1, -10.0), 10.0)


def each(function, *arrays):
    return np.array([function(*values) for values in zip(*(a.ravel().tolist() for a in arrays), strict=True)])


def random_tokens(shape=(7, 50), seed=0):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2, shape)
    logprobs = np.minimum(old + rng.normal(0, 0.8, shape), 0)
    return [
        a.astype(np.float32)
        for a in (logprobs, old, rng.normal(size=shape), np.minimum(old + rng.normal(0, 2, shape), 0))
    ]


def test_policy_loss_equals_the_restatement():
    logprobs, old, advantages, _ = random_tokens()
    got = clipped_policy_loss(logprobs, old, advantages)
    np.testing.assert_allclose(
        got.loss.ravel(), each(policy_loss_of_token, logprobs, old, advantages), rtol=2e-6, atol=1e-7
    )
    for mask in (got.clipped_low, got.clipped_high, got.dual_clipped):
        assert 0 < mask.sum() < mask.size  # the sample visits every branch


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "bound"),
    [
        (1.0, 2.0, -2.0, -2.0, None),
        (1.2, 2.0, -2.4, -2.4, None),
        (1.4, 2.0, -2.6, 0.0, "clipped_high"),
        (0.5, 2.0, -1.0, -1.0, None),
        (0.5, -2.0, 1.6, 0.0, "clipped_low"),
        (0.9, -2.0, 1.8, 1.8, None),
        (1.4, -2.0, 2.8, 2.8, None),
        (2.9, -2.0, 5.8, 5.8, None),
        (3.5, -2.0, 6.0, 0.0, "dual_clipped"),
        (3.5, 2.0, -2.6, 0.0, "clipped_high"),
        (1e30, -2.0, 6.0, 0.0, "dual_clipped"),
        (3.5, 0.0, 0.0, 0.0, None),
    ],
)
def test_each_clip_bounds_loss_and_gradient(ratio, advantage, loss, slope, bound):
    # slope: d loss / d logprob = -A r where no bound holds.
    logprob = jnp.float32(math.log(ratio))
    got = clipped_policy_loss(logprob, 0.0, advantage)
    grad = jax.grad(lambda lp: clipped_policy_loss(lp, 0.0, advantage).loss)(logprob)
    np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
    np.testing.assert_allclose(grad, slope, rtol=1e-6)
    names = ("clipped_low", "clipped_high", "dual_clipped")
    assert [n for n in names if getattr(got, n)] == ([bound] if bound else [])


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_absurd_ratios_have_a_finite_loss_and_no_gradient(gap, advantage):
    value, grad = jax.value_and_grad(lambda lp: clipped_policy_loss(lp, 0.0, advantage).loss)(gap)
    assert np.isfinite(value)
    assert grad == 0


def test_k3_equals_the_restatement():
    logprobs, _, _, ref = random_tokens()
    np.testing.assert_allclose(
        k3_kl(logprobs, ref).ravel(), each(k3_of_token, logprobs, ref), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("gap", "expected", "slope"),
    [
        (0.0, 0.0, 0.0),
        (1e-3, 1e-3**2 / 2 + 1e-9 / 6, -(math.exp(1e-3) - 1)),
        (1.0, math.e - 2, -(math.e - 1)),
        (-1.0, math.exp(-1), 1 - math.exp(-1)),
        (5.0, 10.0, 0.0),  # the value clamp
        (30.0, 10.0, 0.0),  # both
        (-30.0, 10.0, 0.0),
        (-9.0, 8 + math.exp(-9), 1 - math.exp(-9)),
    ],
)
def test_k3_and_its_clamps_at_known_points(gap, expected, slope):
    # gap: reference minus policy.
    value, grad = jax.value_and_grad(lambda lp: k3_kl(lp, jnp.float32(gap)))(jnp.float32(0))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-10)
    np.testing.assert_allclose(grad, slope, rtol=1e-5, atol=1e-7)


def test_log_ratio_is_clamped_before_the_value():
    assert k3_kl(jnp.float32(0), jnp.float32(-30), value_bound=100.0) == pytest.approx(19 + math.exp(-20))


def all_inputs(seed=0):
    logprobs, old, advantages, ref = random_tokens(seed=seed)
    rng = np.random.default_rng(seed + 100)
    mask = (rng.random(old.shape) < 0.6).astype(np.float32)
    entropy = rng.random(old.shape).astype(np.float32)
    sampler = (old + rng.normal(0, 0.01, old.shape)).astype(np.float32)
    return (logprobs, entropy), {
        "old_logprobs": old,
        "ref_logprobs": ref,
        "sampler_logprobs": sampler,
        "advantages": advantages,
        "mask": mask,
    }


def test_sums_equal_the_restatement_over_the_mask():
    (logprobs, entropy), rest = all_inputs()
    sums = grpo_loss_sums(logprobs, entropy, **rest, settings=GrpoSettings())
    chosen = rest["mask"] == 1
    lp, old, adv = logprobs[chosen], rest["old_logprobs"][chosen], rest["advantages"][chosen]
    policy = each(policy_loss_of_token, lp, old, adv)
    kl = each(k3_of_token, lp, rest["ref_logprobs"][chosen])
    ratio = np.exp(lp.astype(np.float64) - old)
    gap = old.astype(np.float64) - rest["sampler_logprobs"][chosen]
    expected = {
        "loss": (policy + 0.01 * kl).sum(),
        "policy_loss": policy.sum(),
        "kl": kl.sum(),
        "entropy": entropy[chosen].sum(),
        "clipped_low": ((adv < 0) & (ratio < 0.8)).sum(),
        "clipped_high": ((adv > 0) & (ratio > 1.3)).sum(),
        "dual_clipped": ((adv < 0) & (ratio > 3)).sum(),
        "policy_gap": np.abs(lp - old).sum(),
        "sampler_gap": np.abs(gap).sum(),
        "sampler_gap_squared": (gap**2).sum(),
        "tokens": chosen.sum(),
    }
    assert set(expected) == set(sums._fields)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=2e-5, err_msg=name)


def test_padding_changes_no_sum():
    (logprobs, entropy), rest = all_inputs()
    whole = grpo_loss_sums(logprobs, entropy, **rest, settings=GrpoSettings())

    def wide(array):
        return np.pad(array, ((0, 3), (0, 9)))

    padded = grpo_loss_sums(
        wide(logprobs), wide(entropy), **{k: wide(v) for k, v in rest.items()}, settings=GrpoSettings()
    )
    for name, a, b in zip(whole._fields, whole, padded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


def test_every_loss_setting_matters():
    (logprobs, entropy), rest = all_inputs()
    base = GrpoSettings()
    changed = {
        "clip_low": 0.1,
        "clip_high": 0.1,
        "dual_clip": 2.0,
        "kl_coef": 0.5,
        "log_ratio_bound": 0.5,
        "kl_value_bound": 0.5,
    }
    reference = grpo_loss_sums(logprobs, entropy, **rest, settings=base).loss
    for name, value in changed.items():
        other = dataclasses.replace(base, **{name: value})
        assert grpo_loss_sums(logprobs, entropy, **rest, settings=other).loss != reference, name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_low", 1.0),
        ("clip_high", -0.1),
        ("dual_clip", 1.2),
        ("kl_coef", -1.0),
        ("log_ratio_bound", 0.0),
        ("kl_value_bound", float("nan")),
        ("temperature", 0.0),
        ("logprob_chunk", 0),
        ("logprob_vocab_chunk", 0),
    ],
)
def test_meaningless_settings_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        GrpoSettings(**{field: value})
