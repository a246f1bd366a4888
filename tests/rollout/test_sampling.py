"""Choosing the next token."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_grpo.rollout.sampling import nucleus, sample, sample_key

# Whole weights and shares in sixteenths, so that no sum is rounded and the reference can be exact.
WEIGHT = st.one_of(st.integers(0, 4), st.integers(0, 4096))
WEIGHTS = st.lists(WEIGHT, min_size=7, max_size=7).filter(any)


@given(weights=WEIGHTS, sixteenths=st.integers(1, 16))
def test_nucleus_equals_a_sort(weights, sixteenths):
    """The smallest set of largest weights with the mass; those that tie with its last one are in."""
    needed, mass = sum(weights) * sixteenths, 0
    for last in sorted(weights, reverse=True):
        mass += last
        if 16 * mass >= needed:
            break
    kept = nucleus(jnp.array([weights], jnp.float32), sixteenths / 16)
    assert kept[0].tolist() == [weight >= last for weight in weights]


def test_nucleus_of_a_large_vocabulary_holds_the_mass_and_no_token_more():
    probs = np.array(jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (4, 5000))), np.float64)
    kept = np.array(nucleus(jnp.array(probs, jnp.float32), 0.9))
    for row, mask in zip(probs, kept, strict=True):
        assert row[mask].sum() >= 0.9 - 1e-5
        assert row[mask].sum() - row[mask].min() < 0.9 + 1e-5
        assert row[mask].min() > row[~mask].max()


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(5), count)


LOGITS = 2 * jax.random.normal(jax.random.key(1), (64, 33))


def test_temperature_and_top_p_of_one_add_nothing():
    plain = jax.vmap(jax.random.categorical)(keys(64), LOGITS)
    assert sample(LOGITS, keys(64), temperature=1.0, top_p=1.0).tolist() == plain.tolist()

    def loops(top_p: float) -> int:
        program = jax.make_jaxpr(lambda logits, k: sample(logits, k, temperature=1.0, top_p=top_p))
        text = str(program(LOGITS, keys(64)))
        return text.count("while[") + text.count("scan[")

    assert loops(1.0) == 0 < loops(0.9)


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
    together = jax.vmap(sample_key, (None, 0, 0, 0))(run_key, *map(jnp.array, zip(*identities, strict=True)))
    alone = [sample_key(run_key, *identity) for identity in identities[::-1]][::-1]
    words = [tuple(jax.random.key_data(key).tolist()) for key in alone]
    assert words == [tuple(row) for row in jax.random.key_data(together).tolist()]
    assert max(Counter(words).values()) == 1  # no two identities share one: (1, 2) is not (2, 1)
    assert tuple(jax.random.key_data(sample_key(jax.random.key(8), 0, 0, 0)).tolist()) not in words
