"""Semantic steps: how often a completion opens a new line of reasoning (Step-GRPO, Eq. 3)."""

import functools
import re

from step_grpo.errors import UserError


def count_steps(text: str, triggers: tuple[str, ...] = ("Wait",)) -> int:
    """Counts the semantic steps of a completion: `k = 1 + number of standalone triggers`.

    A trigger stands alone where no ASCII letter touches it: "Wait," counts, "Waiting" and "await" do not.
    Case matters.

    >>> count_steps("2 + 2 = 4. Wait, is it? Waiting helps. Wait: yes.")
    3

    Args:
        text: The whole completion, thinking and answer.
        triggers: Words that open a new step.

    Returns:
        The number of steps, at least 1.

    Raises:
        UserError: `triggers` is empty, holds an empty word, or is one string instead of a tuple of them.

    Source: Step-GRPO (arXiv 2604.16890), Section 3.1, Eq. 3.
    """
    if isinstance(triggers, str):
        raise UserError(f"triggers={triggers!r}: give a tuple of words, as in ({triggers!r},)")
    return 1 + sum(1 for _ in trigger_pattern(tuple(triggers)).finditer(text))


@functools.lru_cache(maxsize=64)
def trigger_pattern(triggers: tuple[str, ...]) -> re.Pattern[str]:
    """Compiles the pattern that finds standalone triggers; of two that start together the longer one wins.

    Args:
        triggers: Words that open a new step.

    Returns:
        A pattern whose non-overlapping matches are the triggers of a text.

    Raises:
        UserError: `triggers` is empty, or holds an empty word.
    """
    if not triggers or not all(triggers):
        raise UserError(f"triggers={triggers!r}: give at least one word, and no empty one, as in ('Wait',)")
    words = "|".join(re.escape(word) for word in sorted(triggers, key=len, reverse=True))
    return re.compile(rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])")
