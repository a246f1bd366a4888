"""Checksums against a restatement in NumPy, and what they must and must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from step_grpo import checksums
from step_grpo.mesh import make_mesh

TREE = {
    "w": jax.random.normal(jax.random.key(0), (16, 8, 4)),
    "half": (jax.random.normal(jax.random.key(1), (8, 6)).astype(jnp.bfloat16), jnp.int32(7)),
}


def mixed(x: int) -> int:
    """MurmurHash3's finaliser, on Python's integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def by_hand(array) -> int:
    """Word by word, in the order of the memory."""
    bits = np.asarray(array)
    words = bits.view({2: np.uint16, 4: np.uint32}[bits.dtype.itemsize]).ravel().tolist()
    return sum(mixed((word + mixed(place)) % 2**32) for place, word in enumerate(words)) % 2**32


def test_sum_is_over_the_mixed_words_in_their_places():
    found = checksums.begin(TREE)()
    assert found == {
        "w": by_hand(TREE["w"]),
        "half/0": by_hand(TREE["half"][0]),
        "half/1": by_hand(TREE["half"][1]),
    }


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_sum_does_not_depend_on_where_the_array_lies(sizes):
    mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    specs = {"w": PartitionSpec("fsdp", None, "tensor"), "half": (PartitionSpec("fsdp"), PartitionSpec())}
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), TREE, specs)
    assert checksums.begin(placed)() == checksums.begin(TREE)()


def test_flipped_bit_and_values_that_change_places_show():
    w = np.array(TREE["w"])
    flipped, swapped, negated = w.copy(), w.copy(), w.copy()
    flipped.view(np.uint32)[3, 2, 1] ^= 1
    swapped[[0, 1]] = w[[1, 0]]
    negated[0, 0, 0], negated[0, 0, 1] = -1.0, 1.0
    other = negated.copy()
    other[0, 0, 0], other[0, 0, 1] = 1.0, -1.0
    sums = [checksums.begin([jnp.asarray(x)])()["0"] for x in (w, flipped, swapped, negated, other)]
    assert len(set(sums)) == 5
