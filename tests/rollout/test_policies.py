"""Exit policies: their scores, thresholds and tokens, and what they refuse."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_grpo.config import base_config, validate
from step_grpo.data.tiny_tokenizer import build_tokenizer
from step_grpo.errors import UserError
from step_grpo.mesh import make_mesh
from step_grpo.model import qwen
from step_grpo.model.load import load_model
from step_grpo.rollout import programs
from step_grpo.rollout.decode import fresh_lanes
from step_grpo.rollout.engine import build_engine
from step_grpo.rollout.exits import log_odds, sufficiency_score
from step_grpo.rollout.phases import Emit, read_delimiters
from step_grpo.rollout.policies import (
    POLICIES,
    Confidence,
    Judge,
    Sufficiency,
    Verifier,
    build_policy,
    load_judge,
    verdict_tokens,
)
from step_grpo.rollout.triggers import build_vocabulary

TINY = build_tokenizer()
SMALL = qwen.QwenConfig(
    vocab_size=11, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, ffn=8, rope_theta=1e4, rms_eps=1e-6,
    tied=True, qk_norm=True, qkv_bias=False,
)  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_config_takes_every_policy(name):
    config = base_config()
    config.rollout.exit = name
    config.rollout.verifier.checkpoint = "builtin:tiny"
    validate(config)
    built = build_policy(config.rollout, TINY, jnp.float32)
    hash(built.policy)
    assert (built.judge_params is not None) == (name == "verifier")


# ---------------------------------------------------------------------- scores

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5)


@given(LOGITS)
def test_share_of_yes_equals_its_restatement(logits):
    """Probabilities of the forms of yes add up, and so do those of no; the rest is ignored."""
    p = [math.exp(x) for x in logits]
    share = (p[1] + p[3]) / (p[1] + p[3] + p[0])
    row = jnp.array([logits], jnp.float32)
    odds = log_odds(row[:, jnp.array([1, 3])], row[:, jnp.array([0])])
    assert float(jax.nn.sigmoid(odds)[0]) == pytest.approx(share, abs=1e-6)
    score = float(sufficiency_score(odds)[0])
    assert score == int(score) and abs(score - 100 * share) <= 0.5 + 1e-4


@pytest.mark.parametrize(
    ("share", "score"), [(0.9951, 100), (0.9949, 99), (0.5051, 51), (0.0049, 0), (0.0051, 1)]
)
def test_sufficiency_is_rounded_to_the_nearest_hundredth(share, score):
    assert float(sufficiency_score(jnp.log(share / (1 - share)))) == score


def reading(policy, share):
    note = jnp.array([math.log(share / (1 - share))], jnp.float32)
    return policy.read(note, jnp.int32(1), jnp.bool_(False), jnp.bool_(False))


def test_highest_sufficiency_threshold_can_be_reached():
    policy = Sufficiency(question=(1,), yes=(2,), no=(3,), threshold=100, min_gap=64)
    assert bool(policy.passes(reading(policy, 0.996).score))
    assert not policy.passes(reading(policy, 0.99).score)


@pytest.mark.parametrize("threshold", range(101))
def test_sufficiency_of_exactly_the_threshold_passes(threshold):
    policy = Sufficiency(question=(1,), yes=(2,), no=(3,), threshold=threshold, min_gap=64)
    score = np.float32(threshold) / np.float32(100)
    assert policy.passes(score) and not policy.passes(score - np.float32(0.01))


def test_verifier_at_exactly_its_threshold_declines():
    policy = Verifier(question=(1,), yes=(2,), no=(3,), threshold=0.5, judge=Judge(SMALL, ()))
    assert not policy.passes(reading(policy, 0.5).score)
    assert policy.passes(reading(policy, 0.51).score)


# ---------------------------------------------------------------------- when a check may begin


def test_sufficiency_waits_for_its_gap():
    policy = Sufficiency(question=(1,), yes=(2,), no=(3,), threshold=100, min_gap=64)
    gaps = jnp.array([0, 63, 64, 2**30])
    assert policy.may_check(True, False, gaps).tolist() == [False, False, True, True]
    assert not np.any(policy.may_check(False, True, gaps))


def test_confidence_goes_by_triggers_and_verifier_by_delimiters():
    confidence = Confidence((1,), max_notes=5, delta=0.9, strict=True, early_abort=True)
    verifier = Verifier(question=(1,), yes=(2,), no=(3,), threshold=0.5, judge=Judge(SMALL, ()))
    assert confidence.may_check(True, False, 0) and not confidence.may_check(False, True, 0)
    assert verifier.may_check(False, True, 0) and not verifier.may_check(True, False, 0)


PIECES = [b"\n", b"\n\n", b".\n\n", b"\n\n\n", b"a", b"a\n", b"", b"<sep", b">", b"<s", b"ep>\n", b"<"]
DELIMITERS = ("\n\n", "<sep>")
TABLES = build_vocabulary([*PIECES, b"Wait"], ("Wait",), DELIMITERS).delimiters


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30))
def test_delimiters_in_whatever_pieces_are_those_of_a_regex_over_the_text(ids):
    text = b"".join(PIECES[i] for i in ids)
    ends = {match.end() for match in re.finditer(rb"\n\n|<sep>", text)}
    state, at = 0, 0
    for i in ids:
        found = bool(TABLES.confirms[state, TABLES.token_class[i]])
        state = int(TABLES.next_state[state, TABLES.token_class[i]])
        assert found == any(at < end <= at + len(PIECES[i]) for end in ends)
        at += len(PIECES[i])


def test_held_delimiter_is_read_once_it_is_recorded():
    """One token ends a delimiter and begins the next: read twice, it would be taken for that."""
    vocab = build_vocabulary([b"<sep", b">\n", b"\n", b"Wait"], ("Wait",), DELIMITERS)
    zero = jnp.zeros(1, jnp.int32)
    lane = fresh_lanes(zero, zero, zero + 1, zero)
    found = []
    for token, recorded in [(0, True), (1, False), (1, True), (2, True)]:
        found.append(
            bool(vocab.delimiters.confirms[lane.delimiter_state[0], vocab.delimiters.token_class[token]])
        )
        emit = Emit(zero + recorded > 0, zero + token, zero, zero > 0, zero)
        lane = read_delimiters(lane, vocab, emit)
    assert found == [False, True, True, True]


def test_delimiter_that_no_tokens_make_up_is_refused():
    with pytest.raises(UserError, match=r"config\.rollout\.verifier\.delimiters: .*'%%'"):
        build_vocabulary(PIECES, ("a",), ("%%",))


# ---------------------------------------------------------------------- tokens and models


def test_token_that_begins_a_yes_and_a_no_says_nothing():
    """The tiny tokenizer spells both: a word is known by its first letter, one with a space not at all."""
    letter = {c: TINY.encode(c, add_special_tokens=False)[0] for c in "YyNn"}
    yes, no = verdict_tokens(TINY, ("Yes", "yes", " yes"), ("No", "no", " no"))
    assert set(yes) == {letter["Y"], letter["y"]} and set(no) == {letter["N"], letter["n"]}


def test_words_with_the_same_first_token_are_refused():
    with pytest.raises(UserError, match=r"config\.rollout\.yes_words .* first token"):
        verdict_tokens(TINY, ("not so",), ("no",))


def test_judge_with_another_vocabulary_is_refused():
    other = build_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(UserError, match=r"config\.rollout\.verifier\.checkpoint: .*another vocabulary"):
        load_judge("builtin:tiny", other)


def test_narrow_head_gives_the_logits_of_yes_and_no():
    params = qwen.init_params(SMALL, 0)
    policy = Verifier(question=(1,), yes=(7, 2), no=(3,), threshold=0.5, judge=Judge(SMALL, ()))
    hidden = jax.random.normal(jax.random.key(0), (3, SMALL.width))
    narrow = qwen.unembed(policy.judge_params(params, jnp.float32), hidden)
    expected = qwen.unembed(params, hidden)[:, jnp.array([7, 2, 3])]
    np.testing.assert_allclose(narrow, expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "highest"), [("sufficiency", 100.0), ("verifier", 1.0)])
def test_builtin_model_runs_with_the_thresholds_of_the_config(monkeypatch, name, highest):
    """A threshold that always passes ends the thinking at the first check, one that never does at none."""
    monkeypatch.setattr(programs, "CAPACITY_LEVELS", 1)  # a growing cache is tested elsewhere
    config = base_config()
    config.model.checkpoint = "builtin:tiny"
    config.rollout.update({"exit": name, "lanes": 2, "max_prompt_tokens": 32, "yes_words": ("1",)})
    config.rollout.update({"no_words": ("0",), "budget_margin": 0})
    config.rollout.verifier.update(
        {"checkpoint": "builtin:tiny", "delimiters": (", check: ",), "prefix": "x"}
    )
    described, params = load_model(config.model, 0)
    prompt = tuple(TINY.encode("Compute 12+34*5."))
    first = {}
    for threshold in (0.0, highest):
        config.rollout[name].threshold = threshold
        engine = build_engine(
            described, config.rollout, make_mesh(1), "float32", truncate=True, temperature=1.0, top_k=0,
            top_p=1.0, min_p=0.0, max_response=64,
        )  # fmt: skip
        ready = qwen.decode_params(params, jnp.float32)
        first[threshold] = engine(ready, [prompt], 8, jax.random.key(0))[0]
    always, never = first.values()
    assert [len(c.confidences) for c in always] == [int(c.reason == "early_exit") for c in always]
    assert sum(len(c.confidences) for c in always) > 2
    assert sum(len(c.confidences) for c in never) > 2
    assert all(c.reason != "early_exit" for c in never)
