"""The tables that tell the decode loop what each token's text holds."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_grpo.data.prompts import load_tokenizer
from step_grpo.data.tiny_tokenizer import build_tokenizer
from step_grpo.errors import UserError
from step_grpo.reward.steps import count_steps
from step_grpo.rollout.triggers import build_vocabulary, token_bytes

TINY = build_tokenizer()
TINY_TEXTS = token_bytes(TINY, 128)
TINY_TABLES = build_vocabulary(TINY_TEXTS, ("Wait",))
TINY_IDS = st.lists(st.integers(0, len(TINY) - 1), max_size=40)
STANDALONE = re.compile(r"(?<![A-Za-z])Wait(?![A-Za-z])")


@pytest.fixture(scope="module")
def qwen3():
    data = os.environ.get("STEP_GRPO_TEST_DATA")
    if not data:
        pytest.skip("STEP_GRPO_TEST_DATA is not set")
    return load_tokenizer(str(Path(data) / "qwen3_tokenizer"))


@pytest.fixture(scope="module")
def qwen3_texts(qwen3):
    return token_bytes(qwen3, 151936)


# ---------------------------------------------------------------------- bytes


def test_bytes_of_random_qwen3_tokens_joined_are_what_the_tokenizer_decodes(qwen3, qwen3_texts):
    """Halves of characters included: pieces that are no UTF-8 alone."""
    rng = np.random.default_rng(0)
    for length in [1] * 200 + [3, 10, 100] * 30:
        ids = rng.integers(0, len(qwen3), length).tolist()
        joined = b"".join(qwen3_texts[i] for i in ids).decode("utf-8", "replace")
        assert joined == qwen3.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_bytes_of_encoded_text_joined_are_the_text(qwen3, qwen3_texts):
    text = "Wait, 3 × 4 = 12 — naïve. 等等, 让我想想 🤔\n\n\t  <think>\n</think>"
    assert b"".join(qwen3_texts[i] for i in qwen3.encode(text)) == text.encode()


def test_ids_behind_the_tokenizer_are_empty(qwen3, qwen3_texts):
    assert len(qwen3_texts) == 151936 > len(qwen3)
    assert set(qwen3_texts[len(qwen3) :]) == {b""}


@given(TINY_IDS)
def test_bytes_of_tiny_tokens_joined_are_what_the_tokenizer_decodes(ids):
    assert b"".join(TINY_TEXTS[i] for i in ids).decode() == TINY.decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------------- triggers


def test_qwen3_tokens_that_hold_wait_are_triggers(qwen3_texts):
    tables = build_vocabulary(qwen3_texts, ("Wait",))
    expected = {14190: b"Wait", 13824: b" Wait", 28384: b".Wait", 42104: b"Waiting"}
    assert {i: qwen3_texts[i] for i in expected} == expected
    assert [bool(tables.trigger_after_other[i]) for i in expected] == [True, True, True, False]
    assert [bool(tables.trigger_after_letter[i]) for i in expected] == [False, True, True, False]


def test_tables_of_qwen3_equal_a_regex_over_every_tokens_text(qwen3_texts):
    """Behind a letter, a digit or nothing; `replace` stands for bytes that are no UTF-8 alone."""
    tables = build_vocabulary(qwen3_texts, ("Wait",))
    texts = [text.decode("utf-8", "replace") for text in qwen3_texts]
    for before, table in {
        "x": tables.trigger_after_letter,
        "": tables.trigger_after_other,
        "7": tables.trigger_after_other,
    }.items():
        expected = [bool(STANDALONE.search(before + text)) for text in texts]
        assert np.array(table).tolist() == expected


def flags(ids: list[int]) -> list[bool]:
    """Which tokens open a step, told as the decode loop does it: from the tables alone."""
    after_letter, found = False, []
    for i in ids:
        table = TINY_TABLES.trigger_after_letter if after_letter else TINY_TABLES.trigger_after_other
        found.append(bool(table[i]))
        if not TINY_TABLES.empty[i]:
            after_letter = bool(TINY_TABLES.ends_in_letter[i])
    return found


(WAIT,) = TINY.encode("Wait")
LETTERS = set(range(len(TINY))) - {i for i, text in enumerate(TINY_TEXTS) if text in (b"W",)}
MANY_TRIGGERS = st.lists(st.one_of(st.just(WAIT), st.sampled_from(sorted(LETTERS))), max_size=30)


@given(MANY_TRIGGERS)
def test_token_opens_a_step_where_a_regex_finds_a_trigger_in_the_text_up_to_it(ids):
    """What follows is not known yet when the token is drawn, so the text is read up to the token alone."""
    for at, flagged in enumerate(flags(ids)):
        before = b"".join(TINY_TEXTS[i] for i in ids[:at]).decode()
        text = before + TINY_TEXTS[ids[at]].decode()
        assert flagged == any(match.end() > len(before) for match in STANDALONE.finditer(text))


@given(MANY_TRIGGERS)
def test_steps_seen_by_the_tables_are_those_of_the_reward(ids):
    """Except where a letter follows at once, which only the whole text shows."""
    texts = [TINY_TEXTS[i].decode() for i in ids]
    standing = [
        flagged and not re.match("[A-Za-z]", "".join(texts[at + 1 :]))
        for at, flagged in enumerate(flags(ids))
    ]
    assert 1 + sum(standing) == count_steps("".join(texts))


def test_several_triggers_are_found_each_by_its_own_token(qwen3, qwen3_texts):
    words = ("Wait", "Alternatively", "But", "Hmm")
    tables = build_vocabulary(qwen3_texts, words)
    for word in words:
        for text in (word, " " + word):
            (token,) = qwen3.encode(text, add_special_tokens=False)
            assert tables.trigger_after_other[token]
    (other,) = qwen3.encode(" Button", add_special_tokens=False)
    assert not tables.trigger_after_other[other]


def test_trigger_that_no_token_holds_is_refused():
    with pytest.raises(UserError, match=r"config\.rollout\.triggers: .*'Hmm'"):
        build_vocabulary(TINY_TEXTS, ("Hmm",))
