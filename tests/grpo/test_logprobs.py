"""Tiled log-probs against the plain softmax over the whole vocabulary, and the memory that tiles are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from step_grpo.grpo.logprobs import token_logprobs

B, T, D, V = 3, 13, 8, 37


def plain(hidden, head, targets, temperature):
    logits = hidden @ head / temperature
    log_p = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], entropy


@pytest.fixture(name="arrays")
def make_arrays():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return hidden, head, targets, jnp.asarray(rng.normal(size=(2, B, T)), jnp.float32)


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


# Tiles that divide and that do not, smaller than one position of every row, and larger than everything.
TILES = [(1, 1), (6, 7), (9, 16), (15, 36), (39, 37), (10_000, 10_000)]


@pytest.mark.parametrize(("chunk", "vocab_chunk"), TILES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_equals_unchunked(arrays, chunk, vocab_chunk, temperature):
    hidden, head, targets, _ = arrays
    tiled = token_logprobs(
        hidden, head, targets, temperature=temperature, chunk=chunk, vocab_chunk=vocab_chunk
    )
    logprobs, entropy = plain(hidden, head, targets, temperature)
    assert tiled.logprobs.dtype == tiled.entropy.dtype == jnp.float32
    close(tiled.logprobs, logprobs)
    close(tiled.entropy, entropy)


@pytest.mark.parametrize(("chunk", "vocab_chunk"), TILES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_gradients_equal_unchunked(arrays, chunk, vocab_chunk, temperature):
    hidden, head, targets, weights = arrays

    def tiled_loss(hidden, head):
        out = token_logprobs(
            hidden, head, targets, temperature=temperature, chunk=chunk, vocab_chunk=vocab_chunk
        )
        return (weights[0] * out.logprobs + weights[1] * out.entropy).sum()

    def plain_loss(hidden, head):
        logprobs, entropy = plain(hidden, head, targets, temperature)
        return (weights[0] * logprobs + weights[1] * entropy).sum()

    got = jax.jit(jax.grad(tiled_loss, (0, 1)))(hidden, head)
    for one, expected in zip(got, jax.grad(plain_loss, (0, 1))(hidden, head), strict=True):
        close(one, expected)


def test_head_stored_vocabulary_first_gives_the_same(arrays):
    hidden, head, targets, weights = arrays

    def loss(hidden, head, vocab_axis):
        out = token_logprobs(hidden, head, targets, chunk=6, vocab_chunk=7, vocab_axis=vocab_axis)
        return (weights[0] * out.logprobs + weights[1] * out.entropy).sum()

    value, (d_hidden, d_head) = jax.value_and_grad(loss, (0, 1))(hidden, head, 1)
    value_vd, (d_hidden_vd, d_head_vd) = jax.value_and_grad(loss, (0, 1))(hidden, head.T, 0)
    close(value_vd, value)
    close(d_hidden_vd, d_hidden)
    close(d_head_vd.T, d_head)


def test_huge_logits_stay_finite(arrays):
    hidden, head, targets, _ = arrays
    out, grads = jax.value_and_grad(
        lambda h: token_logprobs(h, head, targets, chunk=6, vocab_chunk=7).logprobs.sum()
    )(hidden * 1e4)
    assert np.isfinite(out)
    assert np.isfinite(grads).all()
    entropy = token_logprobs(hidden * 1e4, head, targets, chunk=6, vocab_chunk=7).entropy
    assert (np.abs(entropy) < 1e-3).all()


def test_gradient_of_an_f32_head_is_accumulated_in_f32():
    # A bf16 sum of thousands of equal terms stalls at 256 of them.
    tokens = 2048
    hidden = jnp.ones((1, tokens, 1), jnp.bfloat16)
    head = jnp.zeros((1, 2), jnp.float32)
    targets = jnp.zeros((1, tokens), jnp.int32)
    grad = jax.grad(lambda w: token_logprobs(hidden, w, targets, chunk=1, vocab_chunk=1).logprobs.sum())(head)
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad, [[tokens / 2, -tokens / 2]])


def array_sizes(jaxpr):
    """Elements of every array that a program makes, those of inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from array_sizes(inner)


def test_no_array_of_all_logits_exists_forward_or_backward():
    b, t, d, v = 4, 64, 8, 1024
    hidden, head = jnp.zeros((b, t, d)), jnp.zeros((d, v))
    targets = jnp.zeros((b, t), jnp.int32)

    def loss(hidden, head):
        return token_logprobs(hidden, head, targets, chunk=32, vocab_chunk=128).logprobs.sum()

    def plain_loss(hidden, head):
        return plain(hidden, head, targets, 1.0)[0].sum()

    def largest(function):
        return max(array_sizes(jax.make_jaxpr(jax.grad(function, (0, 1)))(hidden, head).jaxpr))

    assert largest(plain_loss) == b * t * v  # the measure sees them where they are
    assert largest(loss) <= max(d * v, 32 * 128)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("width", [1024, 4096])
def test_full_size_batch_needs_under_a_gibibyte_of_temporaries(width, dtype, vocab_axis):
    """Compiled for one device, not run; the hidden states are an argument, both gradients are results."""
    rows, length, vocab = 4, 16_384, 151_936

    def loss(hidden, head, targets):
        return token_logprobs(hidden, head, targets, vocab_axis=vocab_axis).logprobs.sum()

    shapes = (
        jax.ShapeDtypeStruct((rows, length, width), dtype),
        jax.ShapeDtypeStruct((width, vocab) if vocab_axis else (vocab, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
    )
    for function in (loss, jax.value_and_grad(loss, (0, 1))):
        memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
        assert memory.argument_size_in_bytes > rows * length * width * dtype.dtype.itemsize
        assert memory.temp_size_in_bytes <= 2**30
