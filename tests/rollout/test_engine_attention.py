"""The engine with the kernels for TPU, and with a cache of int8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from step_grpo.mesh import make_mesh
from step_grpo.model import qwen
from step_grpo.model.attention import XLA, Attention
from step_grpo.rollout.engine import RolloutEngine
from step_grpo.rollout.phases import Machine
from step_grpo.rollout.policies import Confidence
from step_grpo.rollout.triggers import build_vocabulary

TEXTS = [b"<eos>", b"</think>", b"Wait", b" a", b" b", b"c", b"\n", b"{", b"}"]
CFG = qwen.QwenConfig(
    vocab_size=len(TEXTS), width=32, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=48, rope_theta=1e4,
    rms_eps=1e-6, tied=False, qk_norm=True, qkv_bias=False, init_std=0.35,
)  # fmt: skip
PROBE = Confidence(question=(6, 7), max_notes=4, delta=0.2, strict=False, early_abort=True)
MACHINE = Machine(
    policy=PROBE, max_response=32, think_budget=24, budget_margin=4, max_probes=2, max_repetitions=2,
    temperature=1.0, top_p=1.0, think_end=1, eos=(0,), closing=(6, 1, 6),
)  # fmt: skip
PROMPTS = [(3, 4, 6), (5,), (4, 4, 3, 8, 7)]
PALLAS = Attention("pallas", interpret=True)


@functools.cache
def params():
    made = qwen.init_params(CFG, 1)
    return {**made, "head_DV": made["head_DV"] * jnp.ones(len(TEXTS)).at[jnp.array([0, 1])].set(0.2)}


@functools.cache
def run(lanes=4, attention=XLA, dtype="float32"):
    engine = RolloutEngine(
        CFG,
        MACHINE,
        build_vocabulary(TEXTS, ("Wait",)),
        lanes=lanes,
        max_prompt=8,
        dtype=jnp.dtype(dtype),
        mesh=make_mesh(max(1, lanes // 2)),
        attention=attention,
    )
    return engine(qwen.decode_params(params(), jnp.float32), PROMPTS, 8, jax.random.key(3))[0]


@jax.jit
def next_logprobs(tokens):
    """Log-probs `[1, T, V]` of what follows each token, from one pass over the whole text."""
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = qwen.forward(params(), CFG, tokens, positions, jnp.ones_like(tokens), jnp.float32)
    return jax.nn.log_softmax(qwen.unembed(params(), hidden))


def teacher_forced(completion):
    """Log-probs of the completion's tokens with nothing rounded."""
    start, tokens = len(PROMPTS[completion.prompt]), completion.tokens
    text = np.zeros((1, 48), np.int32)
    text[0, : start + len(tokens)] = [*PROMPTS[completion.prompt], *tokens]
    logprobs = np.asarray(next_logprobs(text))[0, start - 1 : start - 1 + len(tokens)]
    return np.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_kernels_make_the_completions_that_xla_makes(dtype):
    expected, found = run(dtype=dtype), run(dtype=dtype, attention=PALLAS)
    assert {c.reason for c in expected} & {"early_exit", "budget", "rep"}, "the machine must have had work"
    assert sum(c.probe_tokens for c in expected) > 0
    # In int8 a value halfway between two integers is rounded to either, as the last bits before it fall.
    tolerance = 1e-3 if dtype == "int8" else 1e-4
    for e, f in zip(expected, found, strict=True):
        np.testing.assert_array_equal(f.tokens, e.tokens)
        np.testing.assert_allclose(f.logprobs, e.logprobs, atol=tolerance)
        np.testing.assert_allclose(f.confidences, e.confidences, atol=tolerance)
        assert f.reason == e.reason


def test_int8_cache_makes_completions_that_do_not_depend_on_the_lanes():
    for alone, beside in zip(run(1, dtype="int8"), run(dtype="int8"), strict=True):
        np.testing.assert_array_equal(alone.tokens, beside.tokens)
        assert alone.reason == beside.reason


def test_int8_cache_moves_logprobs_a_little():
    gaps = np.concatenate([c.logprobs - teacher_forced(c) for c in run(dtype="int8")])
    exact = np.concatenate([c.logprobs - teacher_forced(c) for c in run()])
    assert np.abs(exact).max() < 1e-4
    assert 1e-4 < np.abs(gaps).max() < 0.2
