"""What the decode loop must know of each token's text, as arrays over the vocabulary.

The loop sees token ids only. These tables, made once from the tokenizer, let it find triggers and tell
whether two chunks of thinking hold the same words without any text on the device.

Triggers are found by a deterministic automaton over bytes, the scanner of `reward.steps.trigger_pattern`
with its choices made as early as they are certain: a trigger stands as soon as the byte behind it is known
not to be a letter. Whole tokens are composed from it: `TriggerTable` says for every state and token what
reading the token does. So a trigger is found in whatever pieces it arrives ("W" + "ait", ".Wait"), and
"Wait" + "ing" is none. Tokens that act alike share a class, which keeps the table to a few kilobytes.
"""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from step_grpo.errors import UserError

HASH_BASE = 1000003


class TriggerTable(NamedTuple):
    """The automaton that finds triggers, a token at a time: `[V]`, and `[S, C]` of states and classes.

    State 0 is the start of a text. A token confirms a trigger when its text shows that no letter follows
    the trigger, so the token is often the one behind the trigger. Of several that one token confirms, the
    first is told.
    """

    token_class: jax.Array  # [V]
    next_state: jax.Array
    confirms: jax.Array
    bytes_back: jax.Array  # of the text before the confirming token, from the trigger's first byte on
    ends_before: jax.Array  # no byte of the trigger lies in the confirming token


class Vocabulary(NamedTuple):
    """Tables `[V]`.

    A token's text is split at its spaces into a prefix that ends the current word, whole words inside, and
    a suffix that opens the next word. A word is known by a polynomial hash of its bytes modulo 2**32; the
    words inside count as a single one (in tokenizers of natural text only runs of white space hold several).
    """

    triggers: TriggerTable
    delimiters: TriggerTable  # a token confirms a delimiter that it completes
    size: jax.Array  # bytes
    has_space: jax.Array
    prefix_hash: jax.Array
    prefix_power: jax.Array  # HASH_BASE ** bytes of the prefix (of the whole token without a space)
    has_inside: jax.Array
    inside_hash: jax.Array
    suffix_hash: jax.Array


class Recent(NamedTuple):
    """Of each of the last `M` bytes of a lane's text, the last byte first, what its token met; `[B, M]`.

    A trigger is certain only when what follows it is known; this tells what was known where it began. `M`
    is the longest way back to there.
    """

    position: jax.Array  # of the token in the completion
    closing_logprob: jax.Array  # of the first closing token in its place
    chunk_hash: jax.Array  # of the chunk, had it ended before the token


class Found(NamedTuple):
    """The trigger that a token confirms; `[B]` each."""

    confirmed: jax.Array  # else the rest means nothing
    ends_before: jax.Array  # no byte of it lies in the confirming token
    begin: Recent  # what was known at the token in which it begins


def find_trigger(
    table: TriggerTable, recent: Recent, state_B: jax.Array, token_B: jax.Array, here: Recent
) -> Found:
    """Looks for a trigger that `token_B`, behind a text that left the automaton in `state_B`, confirms.

    Args:
        table: the automaton.
        recent: of the text before the token, `[B, M]`.
        state_B: the automaton's.
        token_B: the next token.
        here: `[B]`, what the token itself meets.
    """
    at = state_B, table.token_class[token_B]
    back_B = table.bytes_back[at]

    def there(old_BM, new_B):
        old_B = jnp.take_along_axis(old_BM, jnp.maximum(back_B - 1, 0)[:, None], axis=1)[:, 0]
        return jnp.where(back_B > 0, old_B, new_B)

    return Found(table.confirms[at], table.ends_before[at], jax.tree.map(there, recent, here))


def remember(recent: Recent, size_B: jax.Array, here: Recent) -> Recent:
    """Appends a token of `size_B` bytes (0: nothing is appended) that met `here`, `[B]`."""
    back_BM = jnp.arange(recent.position.shape[1]) - size_B[:, None]

    def shift(old_BM, new_B):
        old_BM = jnp.take_along_axis(old_BM, jnp.maximum(back_BM, 0), axis=1)
        return jnp.where(back_BM >= 0, old_BM, new_B[:, None])

    return jax.tree.map(shift, recent, here)


def nothing_recent(lanes: int, reach: int) -> Recent:
    """The memory of `lanes` empty texts, `reach` bytes long."""
    zero = jnp.zeros((lanes, reach), jnp.int32)
    return Recent(zero, zero.astype(jnp.float32), zero.astype(jnp.uint32))


def reach(table: TriggerTable) -> int:
    """Bytes between the beginning of a trigger and the token that confirms it, at most; at least 1."""
    return max(1, int(np.max(np.asarray(table.bytes_back))))


def token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """The bytes that each id below `size` stands for; ids that the tokenizer does not know are empty."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    added = {i: str(token).encode() for i, token in tokenizer.added_tokens_decoder.items()}
    known = min(size, len(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(known)))
    if "ByteLevel" in json.dumps(decoder):
        to_byte = {character: byte for byte, character in _byte_level_alphabet().items()}
        texts = [bytes(to_byte[c] for c in p) if p and i not in added else b"" for i, p in enumerate(pieces)]
    else:
        texts = [b"" if i in added else tokenizer.decode([i]).encode() for i in range(known)]
    return [added.get(i, texts[i]) for i in range(known)] + [b""] * (size - known)


def build_vocabulary(
    texts: list[bytes], triggers: tuple[str, ...], delimiters: tuple[str, ...] = ()
) -> Vocabulary:
    """Makes the tables of a vocabulary.

    Args:
        texts: `token_bytes`.
        triggers: words that open a step.
        delimiters: texts at which a second model judges the thinking, whatever stands around them.

    Raises:
        UserError: no string of tokens holds a trigger or a delimiter, so that no probe could ever start; or
            a trigger stands inside another one.
    """
    pieces = [text.split(b" ") for text in texts]
    inside = [sorted(set(p[1:-1])) for p in pieces]
    return Vocabulary(
        triggers=build_triggers(texts, triggers),
        delimiters=build_delimiters(texts, delimiters),
        size=jnp.asarray([len(text) for text in texts], jnp.int32),
        has_space=jnp.asarray([len(p) > 1 for p in pieces]),
        prefix_hash=jnp.asarray(np.array([_hash(p[0]) for p in pieces], np.uint32)),
        prefix_power=jnp.asarray(np.array([pow(HASH_BASE, len(p[0]), 2**32) for p in pieces], np.uint32)),
        has_inside=jnp.asarray([bool(words) for words in inside]),
        inside_hash=jnp.asarray(np.array([_hash(b" ".join(words)) for words in inside], np.uint32)),
        suffix_hash=jnp.asarray(np.array([_hash(p[-1]) if len(p) > 1 else 0 for p in pieces], np.uint32)),
    )


def build_triggers(texts: list[bytes], triggers: tuple[str, ...]) -> TriggerTable:
    """The automaton that finds triggers where they stand alone.

    Raises:
        UserError: as `build_vocabulary`.
    """
    return _table("triggers", triggers, _byte_automaton(triggers), texts)


def build_delimiters(texts: list[bytes], delimiters: tuple[str, ...]) -> TriggerTable:
    """The automaton that finds delimiters, whatever stands around them; without any, it finds none.

    Raises:
        UserError: as `build_vocabulary`.
    """
    return _table("verifier.delimiters", delimiters, _delimiter_automaton(delimiters), texts)


def _table(
    field: str, words: tuple[str, ...], automaton: tuple[np.ndarray, np.ndarray], texts: list[bytes]
) -> TriggerTable:
    """Composes an automaton over bytes along the bytes of every token.

    Args:
        field: of `config.rollout` that holds the words.
        words: what the automaton finds.
        automaton: `[S, 256]` the state after each byte, and the bytes from the beginning of the word that
            this byte shows to be there to the byte itself, 0 where there is none.
        texts: `token_bytes`.

    Raises:
        UserError: there are words, but no string of tokens holds one.
    """
    steps = _compose(*automaton, texts)  # [S, V] each
    columns = np.ascontiguousarray(np.concatenate(steps).T)  # [V, 4 S]
    rows = columns.view(np.dtype((np.void, columns.itemsize * columns.shape[1])))[:, 0]
    _, first, token_class = np.unique(rows, return_index=True, return_inverse=True)
    next_state, confirms, bytes_back, ends_before = (step[:, first] for step in steps)
    if words and not confirms[_reachable(next_state)].any():
        raise UserError(f"config.rollout.{field}: no tokens of the tokenizer make up any of {words!r}")
    return TriggerTable(
        token_class=jnp.asarray(token_class, jnp.int32),
        next_state=jnp.asarray(next_state, jnp.int32),
        confirms=jnp.asarray(confirms, bool),
        bytes_back=jnp.asarray(bytes_back, jnp.int32),
        ends_before=jnp.asarray(ends_before, bool),
    )


class _Scan(NamedTuple):
    """A text read so far, as much of it as can still matter."""

    tail: bytes = b""  # from the first byte on at which a trigger may stand
    after_letter: bool = False  # whether a letter comes before the tail
    covered: int = 0  # bytes of the tail that a confirmed trigger covers; a longer one may take its place


def _read(scan: _Scan, byte: int, words: list[bytes]) -> tuple[_Scan, bytes]:
    """Reads a byte; returns also the text from the trigger that it confirms up to it, or nothing."""
    tail, after_letter, covered = scan.tail + bytes([byte]), scan.after_letter, scan.covered
    found = b""
    while tail:
        if not after_letter:
            ended = [w for w in words if tail.startswith(w) and w != tail and not _is_letter(tail[len(w)])]
            if ended and not covered:
                found = tail
            covered = max([covered, *map(len, ended)])
            if any(w.startswith(tail) for w in words):
                return _Scan(tail, after_letter, covered), found
        done = covered or 1
        after_letter, tail, covered = _is_letter(tail[done - 1]), tail[done:], 0
    return _Scan(b"", after_letter), found


def _byte_automaton(triggers: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The state after each byte, and the bytes from the trigger that it confirms up to it: `[S, 256]`."""
    words = sorted({word.encode() for word in triggers})
    own = set(b"".join(words))
    kind = [byte if byte in own else -1 - _is_letter(byte) for byte in range(256)]
    like = [kind.index(k) for k in kind]  # the first byte that acts as each one does
    states = {_Scan(): 0}
    queue = list(states)
    next_state, length = [], []
    for scan in queue:  # grows as states are met
        steps = {byte: _read(scan, byte, words) for byte in set(like)}
        for after, found in steps.values():
            if after not in states:
                states[after] = len(states)
                queue.append(after)
            if found and not any(found[:-1] == word for word in words):
                inner, outer = _nested(found, scan, words)
                raise UserError(
                    f"config.rollout.triggers: {inner!r} stands inside {outer!r}, so that it would be known "
                    "as a trigger only when the longer one breaks off; remove one of them"
                )
        next_state.append([states[steps[byte][0]] for byte in like])
        length.append([len(steps[byte][1]) for byte in like])
    return np.array(next_state, np.int16), np.array(length, np.int16)


def _delimiter_automaton(delimiters: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Finds each delimiter at its last byte, anew behind the one before: as `_byte_automaton`, `[S, 256]`."""
    words = [word.encode() for word in delimiters]
    starts = sorted({word[:n] for word in words for n in range(1, len(word))}, key=len)
    states = {b"": 0, **{start: n for n, start in enumerate(starts, 1)}}
    next_state, length = np.zeros((2, len(states), 256), np.int16)
    for start, state in states.items():
        for byte in range(256):
            text = start + bytes([byte])
            found = max((len(word) for word in words if text.endswith(word)), default=0)
            tails = [text[n:] for n in range(len(text) + 1)] if not found else [b""]
            next_state[state, byte] = next(states[tail] for tail in tails if tail in states)
            length[state, byte] = found
    return next_state, length


def _nested(found: bytes, scan: _Scan, words: list[bytes]) -> tuple[str, str]:
    """The trigger that `found` begins with, and the one that had to break off first."""
    inner = next(word for word in words if found.startswith(word))
    outer = next(word for word in words if word.startswith(scan.tail))
    return inner.decode(), outer.decode()


def _compose(next_byte: np.ndarray, length: np.ndarray, texts: list[bytes]) -> list[np.ndarray]:
    """What reading a whole token does in each state: the columns of `TriggerTable`, `[S, V]` int16 each."""
    sizes = np.array([len(text) for text in texts])
    starts = np.cumsum(sizes) - sizes
    flat = np.frombuffer(b"".join(texts), np.uint8)
    S, V = len(next_byte), len(texts)
    state = np.repeat(np.arange(S, dtype=np.int16)[:, None], V, axis=1)
    confirms, bytes_back, ends_before = (np.zeros((S, V), np.int16) for _ in range(3))
    for j in range(sizes.max(initial=0)):
        at = np.flatnonzero(sizes > j)
        byte = flat[starts[at] + j]
        found = length[state[:, at], byte]
        first = (found > 0) & (confirms[:, at] == 0)
        bytes_back[:, at] = np.where(first, np.maximum(found - 1 - j, 0), bytes_back[:, at])
        ends_before[:, at] |= first & (j == 0)
        confirms[:, at] |= first
        state[:, at] = next_byte[state[:, at], byte]
    return [state, confirms, bytes_back, ends_before]


def _reachable(next_state: np.ndarray) -> np.ndarray:
    """The states that some string of tokens leads to."""
    reached = np.array([0])
    while True:
        more = np.unique(np.append(next_state[reached], reached))
        if len(more) == len(reached):
            return reached
        reached = more


def _is_letter(byte: int) -> bool:
    return bytes([byte]).isalpha()  # of bytes, the ASCII letters alone


def _hash(word: bytes) -> int:
    value = 0
    for byte in word:
        value = (value * HASH_BASE + byte + 1) % 2**32
    return value


def _byte_level_alphabet() -> dict[int, str]:
    """Byte -> character of byte-level BPE: printable Latin-1 as it is, the rest moved behind 255."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
