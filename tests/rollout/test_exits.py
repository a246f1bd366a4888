"""The confidence of a tentative answer, and what the machine makes of it."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_grpo.rollout import phases
from step_grpo.rollout.decode import fresh_lanes
from step_grpo.rollout.exits import probe_confidence, probe_is_hopeless
from step_grpo.rollout.phases import ANSWER, PROBE, THINK, Lane, Machine, Observation, Probed
from step_grpo.rollout.policies import Confidence, Look

PROBABILITY = st.one_of(st.floats(1e-14, 1), st.sampled_from([0.0, 1e-12, 1e-10, 1.0]))
ANSWERS = st.lists(st.tuples(st.lists(PROBABILITY, min_size=6, max_size=6), st.integers(0, 6), st.booleans()))


def restated(probabilities, length, closed, strict) -> float:
    """Eq. 2 in words: geometric mean, the first skipped, each at least 1e-10."""
    counted = [max(p, 1e-10) for p in probabilities[1:length]]
    if not counted or (strict and not closed):
        return 0.0
    return math.prod(p ** (1 / len(counted)) for p in counted)


def logs(probabilities) -> jnp.ndarray:
    with np.errstate(divide="ignore"):
        return jnp.array(np.log(np.array(probabilities)), jnp.float32)


@given(answers=ANSWERS.filter(len), strict=st.booleans())
def test_confidence_equals_its_restatement(answers, strict):
    probabilities, lengths, closed = zip(*answers, strict=True)
    got = probe_confidence(logs(probabilities), jnp.array(lengths), jnp.array(closed), strict=strict)
    expected = [restated(*answer, strict) for answer in answers]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-12)
    assert np.all((np.array(got) >= 0) & (np.array(got) <= 1))


def confidence(probabilities, closed=True, strict=True) -> float:
    length = len(probabilities)
    return float(probe_confidence(logs(probabilities), jnp.int32(length), jnp.bool_(closed), strict=strict))


def test_first_token_is_skipped():
    assert confidence([0.01, 0.9, 0.4]) == pytest.approx(0.6)


def test_fewer_than_two_tokens_score_nothing():
    assert confidence([1.0]) == 0
    assert confidence([1.0], strict=False) == 0


def test_strict_mode_wants_a_closed_answer():
    assert confidence([1.0, 0.9], closed=False) == 0
    assert confidence([1.0, 0.9], closed=False, strict=False) == pytest.approx(0.9)


def test_probability_is_floored():
    assert confidence([1.0, 0.0]) == pytest.approx(1e-10)
    assert confidence([1.0, 0.0, 1.0]) == pytest.approx(1e-5)


def test_what_lies_behind_the_answer_is_not_read():
    noise = logs([1.0, 0.9, 0.5]).at[2].set(jnp.nan)
    assert float(probe_confidence(noise, jnp.int32(2), jnp.bool_(True), strict=True)) == pytest.approx(0.9)


# ---------------------------------------------------------------------- giving up early

P = 20
LOGPROB = st.one_of(
    st.floats(-30, 0, width=32), st.floats(-0.125, 0, width=32), st.just(0.0), st.just(-math.inf)
)


@st.composite
def whole_probes(draw):
    """Top-1 log-probs `[P]`, the length, and a delta; often one right at, or next to, the confidence.

    Long runs of certain tokens after a few others make the bound tight.
    """
    head = draw(st.lists(LOGPROB, max_size=P))
    common = draw(LOGPROB)
    row = np.array([*head, *[common] * (P - len(head))], np.float32)
    length = draw(st.one_of(st.just(P), st.integers(1, P)))
    exact = float(probe_confidence(jnp.array(row), jnp.int32(length), jnp.bool_(True), strict=False))
    neighbours = [float(np.nextafter(np.float32(exact), np.float32(to))) for to in (0, 1)]
    delta = draw(st.one_of(st.sampled_from([exact, *neighbours, 0.0, 0.95, 1.0]), st.floats(0, 1)))
    return row, length, delta


def hopeless(row, delta):
    """After each token, `[P]`."""
    rows = jnp.broadcast_to(jnp.array(row), (P, P))
    return np.array(probe_is_hopeless(rows, jnp.arange(1, P + 1), delta=delta))


@settings(max_examples=400)
@given(whole_probes(), st.booleans(), st.booleans())
def test_probe_that_would_exit_is_never_given_up(probe, closed, strict):
    row, length, delta = probe
    full = probe_confidence(jnp.array(row), jnp.int32(length), jnp.bool_(closed), strict=strict)
    if bool(full > delta):
        assert not hopeless(row, delta)[:length].any()


@settings(max_examples=400)
@given(whole_probes())
def test_probe_is_given_up_as_soon_as_certain_tokens_to_the_end_would_not_do(probe):
    """The bound is the best there is; within its margin for rounding either answer is right."""
    row, _, delta = probe
    for m, given_up in enumerate(hopeless(row, delta), start=1):
        counted = np.clip(row[1:m].astype(np.float64), math.log(1e-10), 0)
        best = math.exp(counted.sum() / (P - 1))
        if best < delta * (1 - 1e-3):
            assert given_up
        elif best > delta:
            assert not given_up


@given(whole_probes())
def test_score_of_a_given_up_probe_is_not_above_delta(probe):
    row, _, delta = probe
    lengths = jnp.arange(1, P + 1)
    so_far = probe_confidence(jnp.broadcast_to(row, (P, P)), lengths, jnp.zeros(P, bool), strict=False)
    assert not np.any(np.array(so_far > delta) & hopeless(row, delta))


# ---------------------------------------------------------------------- the machine's test

THINK_END, WAIT = 2, 3
MACHINE = Machine(
    policy=Confidence(question=(4, 5), max_notes=5, delta=0.5, strict=True, early_abort=True),
    max_response=100, think_budget=90, budget_margin=10, max_probes=4, max_repetitions=3, temperature=1.0,
    top_p=1.0, think_end=THINK_END, eos=(0,), closing=(6, THINK_END, 6),
)  # fmt: skip


def end_of_probe(delta: float, last_logprob: float, length: int = 20) -> tuple[Lane, phases.Emit]:
    """A lane whose probe now decodes `</think>` as the second token of its tentative answer."""
    one = jnp.zeros(1, jnp.int32)
    lane = fresh_lanes(one, one, one + 7, one)._replace(
        phase=one + PROBE,
        queued=one + len(MACHINE.policy.question),
        probe_length=one + 1,
        held=one + WAIT,
        resume=one + 26,
        kv_length=one + 31,
        length=one + length,
    )
    seen = Observation(
        token=one + 9,
        logprob=jnp.zeros(1),
        look=Look(one + THINK_END, jnp.full(1, last_logprob)),
        closing_logprobs=jnp.zeros((1, 3)),
        is_delimiter=jnp.zeros(1, bool),
        is_trigger=jnp.zeros(1, bool),
        pieces=one,
        exit_logprob=jnp.zeros(1),
        finished_chunk_hash=jnp.zeros(1, jnp.uint32),
        recorded=one,
    )
    machine = dataclasses.replace(MACHINE, policy=dataclasses.replace(MACHINE.policy, delta=delta))
    lane, _, emit = phases.step_lanes(machine, lane, Probed(jnp.zeros((1, 5)), jnp.zeros((1, 4))), seen)
    return lane, emit


def test_confidence_of_exactly_delta_declines_and_puts_the_trigger_back():
    lane, emit = end_of_probe(delta=1.0, last_logprob=0.0)  # a confidence of exactly 1
    assert lane.phase[0] == THINK and lane.kv_length[0] == 26 and lane.token_in[0] == WAIT
    assert (emit.token[0], bool(emit.valid[0]), bool(emit.forced[0])) == (WAIT, True, False)


def test_confidence_above_delta_exits_with_the_first_closing_token_in_its_place():
    lane, emit = end_of_probe(delta=float(np.nextafter(np.float32(1), np.float32(0))), last_logprob=0.0)
    assert lane.phase[0] == ANSWER and lane.kv_length[0] == 26
    assert phases.REASONS[lane.reason[0]] == "early_exit"
    assert (emit.token[0], bool(emit.valid[0]), bool(emit.forced[0])) == (6, True, True)


@pytest.mark.parametrize(("length", "phase"), [(79, THINK), (80, ANSWER)])
def test_declined_probe_near_the_thinking_budget_ends_the_thinking(length, phase):
    """`budget_margin` tokens before it, and not one earlier."""
    lane, _ = end_of_probe(delta=1.0, last_logprob=-1.0, length=length)
    assert lane.phase[0] == phase
    assert phases.REASONS[lane.reason[0]] == ("budget" if phase == ANSWER else "unfinished")


@pytest.mark.parametrize("phase", [PROBE, phases.DONE])
def test_finished_lane_leaves_nothing_for_attention_to_read(phase):
    """Kernels read as much of a cache as its length says; the lane may wait long for the next completion."""
    one = jnp.zeros(1, jnp.int32)
    lane = fresh_lanes(one, one, one + 7, one)._replace(
        phase=one + phase, resume=one + 26, kv_length=one + 31
    )
    seen = Observation(
        token=one + 9, logprob=jnp.zeros(1), look=Look(one, jnp.zeros(1)), closing_logprobs=jnp.zeros((1, 3)),
        is_delimiter=one > 0, is_trigger=one > 0, pieces=one, exit_logprob=jnp.zeros(1),
        finished_chunk_hash=jnp.zeros(1, jnp.uint32), recorded=one,
    )  # fmt: skip
    lane, _, emit = phases.step_lanes(MACHINE, lane, Probed(jnp.zeros((1, 5)), jnp.zeros((1, 4))), seen)
    assert int(lane.kv_length[0]) == (31 if phase == PROBE else 0) and not emit.valid[0]
