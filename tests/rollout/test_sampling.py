"""Choosing the next token."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_grpo.rollout.sampling import allowed, heaviest, sample, sample_key

# Whole weights and shares in sixteenths, so that no sum is rounded and the reference can be exact.
WEIGHT = st.one_of(st.integers(0, 4), st.integers(0, 4096))
WEIGHTS = st.lists(WEIGHT, min_size=7, max_size=7).filter(any)
jitted_heaviest = jax.jit(heaviest)
LARGE = 3 * jax.random.normal(jax.random.key(0), (4, 5000))


@given(weights=WEIGHTS, sixteenths=st.integers(1, 16))
def test_smallest_set_with_a_mass_equals_a_sort(weights, sixteenths):
    """The heaviest first, until the mass is reached; those that tie with the last one are in."""
    needed, mass = sum(weights) * sixteenths, 0
    for last in sorted(weights, reverse=True):
        mass += last
        if 16 * mass >= needed:
            break
    rows = jnp.array([weights], jnp.float32)
    kept = jitted_heaviest(rows, rows, jnp.array([needed / 16]))
    assert kept[0].tolist() == [weight >= last for weight in weights]


@given(weights=st.lists(WEIGHT, min_size=7, max_size=7), k=st.integers(1, 7))
def test_smallest_set_with_a_count_equals_a_sort(weights, k):
    rows = jnp.array([weights], jnp.float32)
    kept = jitted_heaviest(rows, jnp.ones_like(rows), jnp.array([float(k)]))
    assert kept[0].tolist() == [weight >= sorted(weights)[-k] for weight in weights]


def test_rows_are_settled_each_by_itself():
    """One that ties throughout takes all passes; the others have their sets long before."""
    rows = jnp.array([[1.0] * 5, [0.5, 1.0, 0.25, 1e-30, 0.0], [1e-38, 1.0, 1e-38, 2e-38, 0.0]])
    kept = heaviest(rows, jnp.ones_like(rows), jnp.array([2.0, 2.0, 3.0]))
    assert kept.tolist() == [[True] * 5, [True, True, False, False, False], [True, True, True, True, False]]


def allowed_by_sort(logits, top_k, top_p, min_p) -> np.ndarray:
    """The three limits one after the other, each restated with a sort, in float64."""
    p = np.exp(np.float64(logits) - np.max(logits))
    ranked = np.sort(p)[::-1]
    kept = p >= ranked[min(top_k or len(p), len(p)) - 1]
    mass = np.cumsum(np.sort(p[kept])[::-1])
    kept &= p >= np.sort(p[kept])[::-1][np.searchsorted(mass, top_p * mass[-1] * (1 - 1e-12))]
    return kept & (p >= min_p)


LIMITS = [(0, 0.9, 0.0), (40, 1.0, 0.0), (0, 1.0, 0.02), (40, 0.8, 0.0), (500, 0.95, 0.01), (3, 0.5, 0.9)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("limits", LIMITS)
def test_allowed_tokens_equal_a_sort_with_ties_in_any_dtype(limits, dtype):
    """Half precision ties many tokens of a large vocabulary; integers tie exactly."""
    top_k, top_p, min_p = limits
    drawn = jnp.concatenate([LARGE, jnp.round(LARGE)]).astype(dtype)
    kept = np.array(allowed(drawn, top_k=top_k, top_p=top_p, min_p=min_p))
    for row, mask in zip(np.array(drawn, np.float64), kept, strict=True):
        expected = allowed_by_sort(row, top_k, top_p, min_p)
        p = np.exp(row - row.max())
        # A sum in float32 may end one group of ties sooner or later than in float64.
        differ = np.unique(p[expected != mask])
        assert len(differ) == 0 or (top_p < 1 and len(differ) == 1 and differ[0] < 1e-3 * p.sum())
        assert mask.sum() > 0


@pytest.mark.parametrize("limits", LIMITS)
def test_allowed_tokens_are_those_of_transformers(limits):
    """Temperature first, then top-k, top-p, min-p, as its `generate` orders them."""
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    top_k, top_p, min_p = limits
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.6)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    theirs = warpers(None, torch.tensor(np.array(LARGE)))
    kept = allowed(LARGE / 0.6, top_k=top_k, top_p=top_p, min_p=min_p)
    assert np.array_equal(np.isfinite(theirs.numpy()), np.array(kept))


def test_limits_apply_in_this_order():
    """Another order of these three would keep other tokens."""
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.15, 0.1, 0.05]]))
    one = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert allowed(logits, **one | {"top_p": 0.75}).sum() == 3
    assert allowed(logits, **one | {"top_k": 3, "top_p": 0.75}).sum() == 2  # of the mass of three
    assert allowed(logits, **one | {"top_p": 0.8, "min_p": 0.5}).sum() == 2
    assert allowed(logits, **one | {"top_p": 0.6, "min_p": 0.7}).sum() == 2  # not of what min-p leaves


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(5), count)


LOGITS = 2 * jax.random.normal(jax.random.key(1), (64, 33))


OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def program(**settings) -> str:
    """The lowered program of `sample`."""
    draw = jax.jit(lambda logits, k: sample(logits, k, **OFF | settings))
    return draw.lower(LOGITS, keys(64)).as_text()


def test_what_is_switched_off_is_not_in_the_program():
    plain = jax.jit(lambda logits, k: jax.vmap(jax.random.categorical)(k, logits)).lower(LOGITS, keys(64))
    assert program() == plain.as_text()
    for field, value in {"temperature": 0.9, "top_k": 3, "top_p": 0.9, "min_p": 0.1}.items():
        assert program(**{field: value}) != plain.as_text()


def test_off_draws_what_categorical_draws():
    plain = jax.vmap(jax.random.categorical)(keys(64), LOGITS)
    assert sample(LOGITS, keys(64), **OFF).tolist() == plain.tolist()


def test_limits_change_only_the_tokens_that_they_forbid():
    """The noise of a token is the same whatever the limits: a draw that is allowed anyway stays."""
    limits = {"top_k": 8, "top_p": 0.9, "min_p": 0.05}
    kept = np.array(allowed(LOGITS, **limits))
    plain = sample(LOGITS, keys(64), **OFF)
    limited = sample(LOGITS, keys(64), **OFF | limits)
    lanes = np.arange(64)
    assert kept[lanes, limited].all() and not kept[lanes, plain].all()
    assert np.array_equal(limited[kept[lanes, plain]], plain[kept[lanes, plain]])


def test_temperature_zero_takes_the_most_probable_whatever_the_key():
    best = np.argmax(np.array(LOGITS), axis=-1).tolist()
    for k in (keys(64), keys(64)[::-1]):
        assert sample(LOGITS, k, temperature=0.0, top_p=0.5).tolist() == best


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (0.6, 0.95), (2.0, 0.5)]
)
def test_frequencies_are_the_tempered_nucleus(temperature, top_p):
    """The nucleus is taken of the tempered distribution; restated with a sort."""
    logits, draws = np.array([2.0, 1.5, 0.5, 0.0, -1.0, -3.0]), 20_000
    p = np.exp(logits / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    keep = order[: int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-9)) + 1]
    expected = np.where(np.isin(np.arange(6), keep), p, 0)
    expected /= expected.sum()
    rows = jnp.broadcast_to(jnp.array(logits, jnp.float32), (draws, 6))
    tokens = sample(rows, keys(draws), temperature=temperature, top_p=top_p)
    measured = np.bincount(tokens, minlength=6) / draws
    assert np.all(measured[expected == 0] == 0)
    np.testing.assert_allclose(measured, expected, atol=4.5 * 0.5 / draws**0.5)


def test_key_depends_on_identity_alone():
    run_key = jax.random.key(9)
    identities = list(itertools.product([0, 1, 2**31 - 1], [0, 1, 2], [0, 1, 2]))
    identities = [(*identity, drawn) for identity in identities for drawn in (0, 3)]
    columns = map(jnp.array, zip(*identities, strict=True))
    together = jax.vmap(sample_key, (None, 0, 0, 0, 0))(run_key, *columns)
    alone = [sample_key(run_key, *identity) for identity in identities[::-1]][::-1]
    words = [tuple(jax.random.key_data(key).tolist()) for key in alone]
    assert words == [tuple(row) for row in jax.random.key_data(together).tolist()]
    assert max(Counter(words).values()) == 1  # no two identities share one: (1, 2) is not (2, 1)
    assert tuple(jax.random.key_data(sample_key(jax.random.key(8), 0, 0, 0, 0)).tolist()) not in words


def test_token_sampled_again_is_independent_of_the_discarded_one():
    """Independent draws of one distribution `p` agree with probability `sum(p**2)`."""
    p, draws = np.array([0.4, 0.3, 0.2, 0.1]), 20_000
    rows = jnp.broadcast_to(jnp.log(p), (draws, 4))

    def drawn(below):
        keys = jax.vmap(lambda sample: sample_key(jax.random.key(5), 7, sample, 40, below))(jnp.arange(draws))
        return np.asarray(sample(rows, keys, temperature=1.0))

    assert np.mean(drawn(0) == drawn(40)) == 1  # nothing was discarded in this place
    assert np.mean(drawn(0) == drawn(41)) == pytest.approx(np.sum(p**2), abs=4.5 * 0.5 / draws**0.5)
