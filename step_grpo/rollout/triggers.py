"""What the decode loop must know of each token's text, as arrays over the vocabulary.

The loop sees token ids only. These tables, made once from the tokenizer, let it find triggers and tell
whether two chunks of thinking hold the same words without any text on the device.
"""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from step_grpo.errors import UserError
from step_grpo.reward.steps import trigger_pattern

HASH_BASE = 1000003


class Vocabulary(NamedTuple):
    """Tables `[V]`.

    A token's text is split at its spaces into a prefix that ends the current word, whole words inside, and
    a suffix that opens the next word. A word is known by a polynomial hash of its bytes modulo 2**32; the
    words inside count as a single one (in tokenizers of natural text only runs of white space hold several).
    """

    trigger_after_letter: jax.Array  # holds a standalone trigger even when a letter comes before it
    trigger_after_other: jax.Array  # holds one when no letter comes before it
    ends_in_letter: jax.Array
    empty: jax.Array  # no text at all: keeps what came before as it is
    has_space: jax.Array
    prefix_hash: jax.Array
    prefix_power: jax.Array  # HASH_BASE ** bytes of the prefix (of the whole token without a space)
    has_inside: jax.Array
    inside_hash: jax.Array
    suffix_hash: jax.Array


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


def build_vocabulary(texts: list[bytes], triggers: tuple[str, ...]) -> Vocabulary:
    """Makes the tables of a vocabulary.

    Raises:
        UserError: no token holds a trigger, so that no probe could ever start.
    """
    pattern = trigger_pattern(triggers)
    strings = [text.decode("utf-8", "replace") for text in texts]
    after_other = np.array([bool(pattern.search(s)) for s in strings])
    after_letter = np.array([bool(pattern.search("x" + s)) for s in strings])
    if not after_other.any():
        raise UserError(f"config.rollout.triggers: no token of the tokenizer holds any of {triggers!r}")
    pieces = [text.split(b" ") for text in texts]
    inside = [sorted(set(p[1:-1])) for p in pieces]
    return Vocabulary(
        trigger_after_letter=jnp.asarray(after_letter),
        trigger_after_other=jnp.asarray(after_other),
        ends_in_letter=jnp.asarray([s[-1:].isascii() and s[-1:].isalpha() for s in strings]),
        empty=jnp.asarray([not s for s in strings]),
        has_space=jnp.asarray([len(p) > 1 for p in pieces]),
        prefix_hash=jnp.asarray(np.array([_hash(p[0]) for p in pieces], np.uint32)),
        prefix_power=jnp.asarray(np.array([pow(HASH_BASE, len(p[0]), 2**32) for p in pieces], np.uint32)),
        has_inside=jnp.asarray([bool(words) for words in inside]),
        inside_hash=jnp.asarray(np.array([_hash(b" ".join(words)) for words in inside], np.uint32)),
        suffix_hash=jnp.asarray(np.array([_hash(p[-1]) if len(p) > 1 else 0 for p in pieces], np.uint32)),
    )


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
