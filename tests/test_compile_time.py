"""How long a process has compiled."""

import jax
import numpy as np

from step_grpo.compile_time import compile_seconds, covered


def test_what_threads_compile_side_by_side_counts_once():
    rng = np.random.default_rng(0)
    begins = rng.integers(0, 900, 40)
    spans = [(float(b), float(b + length)) for b, length in zip(begins, rng.integers(0, 30, 40), strict=True)]
    seconds = {second for begin, end in spans for second in range(int(begin), int(end))}
    assert covered(spans) == len(seconds)
    assert covered([]) == 0


def test_a_compilation_is_heard_and_a_second_call_is_none():
    before = compile_seconds()
    program = jax.jit(lambda x: x * 3 + 1)
    program(1.0)
    compiled = compile_seconds()
    assert compiled > before
    program(2.0)
    assert compile_seconds() == compiled
