"""What a lane knows of its own text: which words its chunk holds, without any text on the device."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from step_grpo.data.tiny_tokenizer import build_tokenizer
from step_grpo.rollout.decode import fresh_lanes
from step_grpo.rollout.phases import Emit, finished_chunk_hash, read_text
from step_grpo.rollout.triggers import Recent, Vocabulary, build_vocabulary, nothing_recent, token_bytes

LONGEST = 96
TOKENIZER = build_tokenizer()
TEXTS = token_bytes(TOKENIZER, 128)
VOCAB = build_vocabulary(TEXTS, ("Wait",))
(WAIT,) = TOKENIZER.encode("Wait")


@jax.jit
def chunk_hash(vocab, tokens, valid):
    """The hash of the last chunk's words and the lane, after the tokens; `[1]` each."""
    zero = jnp.zeros(1, jnp.int32)
    lane = fresh_lanes(zero, zero, zero + 3, zero)
    words = jnp.zeros((1, LONGEST, 2), jnp.uint32)

    def record(carry, token):
        lane, words, recent = carry
        token, valid = token
        nothing = jnp.zeros(1)
        emit = Emit(valid[None], token[None], nothing, nothing > 0, nothing)
        here = Recent(lane.length, nothing, nothing.astype(jnp.uint32))
        lane = lane._replace(length=lane.length + valid)
        return read_text(lane, words, recent, vocab, emit, here), None

    (lane, words, _), _ = jax.lax.scan(record, (lane, words, nothing_recent(1, 4)), (tokens, valid))
    return finished_chunk_hash(lane, words), lane


def hash_of(ids: list[int], vocab: Vocabulary = VOCAB) -> int:
    """The hash of the chunk behind the last trigger of a token string."""
    padded = np.zeros(LONGEST, np.int32)
    padded[: len(ids)] = ids
    return int(chunk_hash(vocab, padded, np.arange(LONGEST) < len(ids))[0][0])


def words_of(ids: list[int]) -> set[str]:
    return set(b"".join(TEXTS[i] for i in ids).decode().split(" "))


def spelled(text: str) -> list[int]:
    """A text token by token, one for each character."""
    return [i for character in text for i in TOKENIZER.encode(character, add_special_tokens=False)]


def inner_words(text: bytes) -> set[bytes]:
    return set(text.split(b" ")[1:-1])


# Left out: tokens with several whole words inside, which count as one word.
IDS = [i for i in range(len(TOKENIZER)) if TEXTS[i] not in (b"Wait", b"W") and len(inner_words(TEXTS[i])) < 2]
FEW = spelled("ab ") * 3 + TOKENIZER.encode(", check: ", add_special_tokens=False) + spelled(", check:1\n")
CHUNK = st.one_of(
    st.lists(st.sampled_from(IDS), max_size=LONGEST // 2 - 2), st.lists(st.sampled_from(FEW), max_size=12)
)


@given(CHUNK, CHUNK)
def test_chunks_have_the_same_hash_exactly_when_they_have_the_same_words(one, other):
    assert (hash_of(one) == hash_of(other)) == (words_of(one) == words_of(other))


@given(CHUNK, st.randoms())
def test_order_and_repetition_of_words_change_nothing(chunk, random):
    words = sorted(words_of(chunk) & words_of(spelled(" ".join(words_of(chunk)))))
    shuffled = words + random.sample(words, min(len(words), 2))
    random.shuffle(shuffled)
    again = spelled(" ".join(shuffled))[:LONGEST]
    assert (hash_of(again) == hash_of(chunk)) == (words_of(again) == words_of(chunk))


@given(CHUNK, st.sampled_from(["Wait", "pieces"]), CHUNK)
def test_chunk_begins_behind_its_trigger(one, way, other):
    """What was written before the trigger, and the trigger itself, is forgotten; also one in pieces."""
    trigger = [WAIT] if way == "Wait" else spelled("W") + spelled("ait")
    trigger = [*spelled("."), *trigger]
    assert hash_of([*one, *trigger, *spelled(","), *other]) == hash_of([*spelled(","), *other])


@given(CHUNK, CHUNK)
def test_trigger_with_a_letter_behind_it_is_a_word_like_any_other(one, other):
    with_word = [*one, *spelled(" "), WAIT, *spelled("s "), *other]
    assert hash_of(with_word) == hash_of([*one, *spelled(" Waits "), *other])
    assert hash_of(with_word) != hash_of([*spelled(" "), *other])


def test_word_may_arrive_in_any_pieces():
    phrase = TOKENIZER.encode("1, check: 2", add_special_tokens=False)
    assert len(phrase) < len(spelled("1, check: 2"))
    assert hash_of(phrase) == hash_of(spelled("1, check: 2"))


def test_word_that_is_twice_in_one_token_counts_once():
    vocab = build_vocabulary([b"x", b" ", b"x x ", b"Wait"], ("Wait",))
    assert hash_of([2], vocab) == hash_of([0, 1], vocab) == hash_of([0, 1, 2, 2], vocab)
    assert hash_of([2], vocab) != hash_of([0], vocab)  # `x ` ends in an empty word


def test_token_that_is_not_recorded_changes_nothing():
    """Such as those of a probe."""
    ids = np.array([*spelled("ab c"), WAIT, *spelled("zz y")], np.int32)
    tokens = np.zeros(LONGEST, np.int32)
    tokens[: len(ids)] = ids
    valid = np.zeros(LONGEST, bool)
    valid[:4] = True
    skipped = chunk_hash(VOCAB, tokens, valid)
    plain = chunk_hash(VOCAB, np.array([*ids[:4], *[0] * (LONGEST - 4)], np.int32), valid)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), skipped, plain))
    assert int(skipped[0][0]) == hash_of(ids[:4].tolist())
