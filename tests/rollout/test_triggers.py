"""The tables that tell the decode loop what each token's text holds."""

import itertools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from step_grpo.data.prompts import load_tokenizer
from step_grpo.data.tiny_tokenizer import build_tokenizer
from step_grpo.errors import UserError
from step_grpo.reward.steps import trigger_pattern
from step_grpo.rollout.triggers import (
    Recent,
    TriggerTable,
    build_triggers,
    find_trigger,
    nothing_recent,
    reach,
    remember,
    token_bytes,
)

TINY = build_tokenizer()
TINY_TEXTS = token_bytes(TINY, 128)
TINY_IDS = st.lists(st.integers(0, len(TINY) - 1), max_size=40)
SEVERAL = ("Wait", "Alternatively", "But", "Hmm", "Hold on", "Hmm...")


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


class Standing(NamedTuple):
    """One trigger of a token string."""

    begin: int  # its first byte
    end: int  # the byte behind it; of several triggers that begin together, the shortest that stands counts
    first: int  # the token that holds its first byte
    behind: int  # the token that holds the byte behind it, which shows that it stands


def standing(parts: list[bytes], triggers: tuple[str, ...]) -> list[Standing]:
    """The triggers of a text that have a byte behind them, by regex: a byte is a character to it."""
    words = sorted((word.encode().decode("latin-1") for word in triggers), key=len)
    text = b"".join(parts).decode("latin-1")
    holder = [at for at, part in enumerate(parts) for _ in part]
    begins = [match.start() for match in trigger_pattern(tuple(words)).finditer(text)]
    one_by_one = [trigger_pattern((word,)) for word in words]
    ends = [next(m.end() for p in one_by_one if (m := p.match(text, begin))) for begin in begins]
    return [Standing(b, e, holder[b], holder[e]) for b, e in zip(begins, ends, strict=True) if e < len(text)]


@jax.jit
def scan_tokens(table: TriggerTable, recent: Recent, sizes_V: jax.Array, ids_TB: jax.Array):
    """Whether each token confirms a trigger, and the position where it begins, `[T, B]`."""
    zero = jnp.zeros(ids_TB.shape[1])

    def step(carry, now):
        recent, state = carry
        position, token = now
        here = Recent(jnp.full_like(token, position), zero, zero.astype(jnp.uint32))
        found = find_trigger(table, recent, state, token, here)
        after = table.next_state[state, table.token_class[token]]
        return (remember(recent, sizes_V[token], here), after), (found.confirmed, found.begin.position)

    start = recent, jnp.zeros(ids_TB.shape[1], jnp.int32)
    return jax.lax.scan(step, start, (jnp.arange(len(ids_TB)), ids_TB))[1]


def found_by_tables(
    texts: list[bytes], ids_BT: np.ndarray, triggers: tuple[str, ...]
) -> list[list[tuple[int, int]]]:
    """The first token and the token behind of every trigger of a row, told as the decode loop does it."""
    table = build_triggers(texts, triggers)
    sizes = jnp.array([len(text) for text in texts])
    memory = nothing_recent(len(ids_BT), reach(table))
    confirmed, begin = map(np.asarray, scan_tokens(table, memory, sizes, jnp.asarray(ids_BT.T)))
    rows = [[] for _ in ids_BT]
    for row, at in np.argwhere(confirmed.T).tolist():
        rows[row].append((int(begin[at, row]), at))
    return rows


PIECES = 4  # of a trigger, at most


def spellings(texts: list[bytes], word: bytes) -> list[tuple[int, ...]]:
    """Every way to spell a word in up to PIECES tokens."""
    ids = {text: i for i, text in enumerate(texts)}
    found = []
    for cuts in range(PIECES):
        for inner in itertools.combinations(range(1, len(word)), cuts):
            edges = [0, *inner, len(word)]
            parts = [word[begin:end] for begin, end in itertools.pairwise(edges)]
            if all(part in ids for part in parts):
                found.append(tuple(ids[part] for part in parts))
    return found


def random_strings(
    texts: list[bytes], triggers: tuple[str, ...], count: int, units: int, seed: int = 0
) -> np.ndarray:
    """Token strings `[count, ...]` of spelled triggers, of what may touch them, and of any token.

    A unit that is shorter than others is filled up with a token that has no text.
    """
    rng, words = np.random.default_rng(seed), [word.encode() for word in triggers]
    empty = texts.index(b"")
    spelled = [spellings(texts, before + word) for word in words for before in (b"", b" ", b".")]
    around = [
        i for i, t in enumerate(texts) if t in (b",", b" ", b"ing", b"a", b"\n", b"\xc3", b".", b"Hold")
    ]
    holding = [i for i, t in enumerate(texts) if any(word in t for word in words)]
    kinds = [
        [ids for ways in spelled for ids in ways],
        [(i,) for i in around],
        [(i,) for i in holding],
        [(int(i),) for i in rng.integers(0, len(texts), 1000)],
    ]
    rows = [np.array([[*ids, *[empty] * (PIECES - len(ids))] for ids in kind]) for kind in kinds]
    drawn = np.stack([kind[rng.integers(0, len(kind), (count, units))] for kind in rows])
    which = rng.choice(len(kinds), (1, count, units, 1), p=[0.5, 0.3, 0.1, 0.1])
    return np.take_along_axis(drawn, which, axis=0)[0].reshape(count, -1)


@pytest.mark.parametrize("triggers", [("Wait",), SEVERAL])
@pytest.mark.parametrize("name", ["tiny", "qwen3"])
def test_tables_find_the_triggers_of_100000_strings_where_a_regex_finds_them(name, triggers, request):
    """25,000 strings for each of two vocabularies and two sets of triggers: 100,000 in sum."""
    texts = TINY_TEXTS if name == "tiny" else request.getfixturevalue("qwen3_texts")
    ids_BT = random_strings(texts, triggers, count=25_000, units=6)
    rows = [standing([texts[i] for i in ids], triggers) for ids in ids_BT.tolist()]
    expected = [[(trigger.first, trigger.behind) for trigger in row] for row in rows]
    assert found_by_tables(texts, ids_BT, triggers) == expected
    assert sum(map(len, expected)) > 20_000
    assert sum(begin < at - 1 for row in expected for begin, at in row) > 2000  # in several tokens


def test_qwen3_tokens_that_hold_wait_are_triggers_unless_a_letter_touches_them(qwen3_texts):
    holding = {14190: b"Wait", 13824: b" Wait", 28384: b".Wait", 42104: b"Waiting"}
    assert {i: qwen3_texts[i] for i in holding} == holding
    comma, ing, a = (qwen3_texts.index(text) for text in (b",", b"ing", b"a"))
    strings = [[before, i, after] for i in holding for before in (comma, a) for after in (comma, ing)]
    found = found_by_tables(qwen3_texts, np.array(strings), ("Wait",))
    standing = [(comma, 14190, comma), *((before, i, comma) for i in (13824, 28384) for before in (comma, a))]
    assert {tuple(ids) for ids, row in zip(strings, found, strict=True) if row} == set(standing)
    assert all(row in ([], [(1, 2)]) for row in found)


def test_only_tokens_that_hold_a_trigger_are_triggers_alone(qwen3_texts):
    """Over the whole vocabulary: between two line ends, what the regex says of each token's text."""
    table = build_triggers(qwen3_texts, SEVERAL)
    line_end = table.token_class[qwen3_texts.index(b"\n")]
    before = table.next_state[0, line_end]
    after = table.next_state[before, table.token_class]
    stands = np.asarray(table.confirms[before, table.token_class] | table.confirms[after, line_end])
    pattern = trigger_pattern(SEVERAL)
    expected = {i for i, text in enumerate(qwen3_texts) if pattern.search(text.decode("latin-1"))}
    assert set(np.flatnonzero(stands).tolist()) == expected
    assert len(expected) > 10


SHORT = st.text("ab .", min_size=1, max_size=3)


@given(
    triggers=st.lists(SHORT, min_size=1, max_size=3, unique=True).map(tuple),
    parts=st.lists(st.text("ab .", max_size=3).map(str.encode), max_size=12),
)
def test_any_triggers_in_any_pieces_are_found_where_a_regex_finds_them(triggers, parts):
    """Of those that one token confirms, the first is told."""
    try:
        table = build_triggers([*parts, b"a", b"b", b" ", b"."], triggers)
    except UserError as error:
        assume("stands inside" not in str(error))
        raise
    table = jax.tree.map(np.asarray, table)
    state, length, found = 0, 0, []
    for token, part in enumerate(parts):
        cell = state, table.token_class[token]
        if table.confirms[cell]:
            found.append((length - int(table.bytes_back[cell]), bool(table.ends_before[cell]), token))
        state, length = table.next_state[cell], length + len(part)
    starts = np.cumsum([0, *map(len, parts)])
    expected = {}
    for trigger in standing(parts, triggers):
        at = trigger.behind
        # A trigger that begins inside the token is told as beginning with it.
        told = min(trigger.begin, int(starts[at])), trigger.end <= starts[at], at
        expected.setdefault(at, told)
    assert found == list(expected.values())


def test_trigger_that_no_tokens_make_up_is_refused():
    with pytest.raises(UserError, match=r"config\.rollout\.triggers: .*'等等'"):
        build_triggers(TINY_TEXTS, ("等等",))


def test_trigger_inside_another_is_refused():
    with pytest.raises(UserError, match="'a' stands inside 'Wait a moment'"):
        build_triggers(TINY_TEXTS, ("Wait a moment", "a"))
    build_triggers(TINY_TEXTS, ("Wait a moment", "Wait", "on second thought", "Hold on"))
