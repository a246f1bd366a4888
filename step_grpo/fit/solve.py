"""The largest size whose peak stays within a limit, in as few compilations as may be."""

import math
from collections.abc import Callable


def largest(
    peak: Callable[[int], float],
    start: tuple[int, float],
    slope: float,
    limit: float,
    most: int,
    *,
    tries: int = 4,
) -> int:
    """The largest size that was seen to fit; the peak is taken to grow nearly linearly.

    Args:
        peak: of a size, in bytes; infinite where it cannot be told. Each call is dear.
        start: a size and its known peak.
        slope: what one more takes, at a first guess.
        limit: of the peak.
        most: the largest size of interest.
        tries: calls of `peak` at most.

    Returns:
        A size whose peak is known to be within the limit; 0 if none was found.
    """
    known = {start[0]: start[1]}
    for _ in range(tries):
        fits = max((n for n, bytes_ in known.items() if bytes_ <= limit), default=0)
        fails = min((n for n, bytes_ in known.items() if bytes_ > limit), default=most + 1)
        if fails - fits <= 1:
            break
        guess = _guess(known, slope, limit)
        size = min(max(guess, fits + 1), fails - 1)
        if fits and guess <= fits:
            break  # the next larger one is not expected to fit
        if known.get(fails) == math.inf:  # nothing to draw a line through
            size = min(size, (fits + fails) // 2)
        known[size] = peak(size)
    return max((n for n, bytes_ in known.items() if bytes_ <= limit), default=0)


def _guess(known: dict[int, float], slope: float, limit: float) -> int:
    """Where a line through the two known peaks next to the limit meets it; with one known, a given slope."""
    finite = sorted(
        (n for n, bytes_ in known.items() if bytes_ < math.inf), key=lambda n: abs(known[n] - limit)
    )
    if not finite:
        return min(known) // 2
    nearest = finite[0]
    if len(finite) > 1:
        slope = (known[nearest] - known[finite[1]]) / (nearest - finite[1])
    return int(nearest + (limit - known[nearest]) // max(slope, 1.0))
