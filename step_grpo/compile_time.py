"""How long this process has compiled."""

import functools
import time
from collections.abc import Iterable
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # fetching from the compilation cache included

Span = tuple[float, float]  # seconds of `time.monotonic`


@functools.cache
def _heard() -> list[Span]:
    """When each compilation ran, from the first call on, by whatever part of the program."""
    spans: list[Span] = []

    def hear(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            spans.append((time.monotonic() - duration_secs, time.monotonic()))

    jax.monitoring.register_event_duration_secs_listener(hear)
    return spans


def compile_seconds() -> float:
    """Seconds since the first call of this function in which XLA compiled something, if now at an end."""
    return covered(_heard())


def covered(spans: Iterable[Span]) -> float:
    """Seconds that lie in at least one span: threads compile side by side, which counts once."""
    total, reached = 0.0, -float("inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
