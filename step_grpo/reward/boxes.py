r"""Finding the final answer: the last closed `\boxed{}` of a completion, in time linear in its length."""

import re

# One alternative per token that matters. An escaped character (`\{`, `\}`, `\\`) neither opens nor closes.
# The possessive `\s*+` never gives back what it took, so a run of blanks is read once.
_TOKEN = re.compile(r"(?P<box>\\boxed\s*+\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


def last_box(text: str) -> str | None:
    r"""Returns the content of the closed `\boxed{}` that opens last, or None where no box is closed.

    Braces inside are balanced, escaped ones ignored. Of nested boxes the inner one is returned. Stray braces
    elsewhere in the text and a box cut off at the end do no harm.

    >>> last_box(r"First \boxed{3}, no: \boxed{\frac{1}{2}}, and \boxed{cut o")
    '\\frac{1}{2}'

    Args:
        text: Any text, of any length; no recursion and no backtracking.

    Returns:
        What stands between the braces, blanks included.
    """
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    content = _closed_at(text, start)
    return _last_closed(text) if content is None else content


def _closed_at(text: str, start: int) -> str | None:
    """The content of the box that begins here; None where none does, or it is not closed."""
    box, before = _TOKEN.match(text, start), text[:start]
    is_escaped = (len(before) - len(before.rstrip("\\"))) % 2
    if box is None or box.lastgroup != "box" or is_escaped:
        return None
    depth = 1
    for token in _TOKEN.finditer(text, box.end()):
        depth += {"open": 1, "box": 1, "close": -1}.get(token.lastgroup or "", 0)
        if depth == 0:
            return text[box.end() : token.start()]
    return None


def _last_closed(text: str) -> str | None:
    """What `last_box` returns, in one pass over all of the text, however many boxes are open at once."""
    openings: list[int | None] = []  # where the content of each open box starts; None for an ordinary brace
    last: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "box":
            openings.append(token.end())
        elif kind == "open":
            openings.append(None)
        elif kind == "close" and openings:
            start = openings.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
    return None if last is None else text[slice(*last)]


def without_outer_braces(text: str) -> str:
    """The text without the braces that enclose all of it, however many; the same where nothing is inside.

    They mean nothing in LaTeX, and a parser may take time that doubles with each pair of them.
    """
    leading = len(text) - len(text.lstrip("{"))
    before = text.rstrip("}")
    is_escaped = (len(before) - len(before.rstrip("\\"))) % 2  # the first of the closing braces
    pairs = min(leading, len(text) - len(before) - is_escaped)
    # What is between them may close some of the leading braces and open as many again; these do not count.
    depth = lowest = 0
    for token in _TOKEN.finditer(text, pairs, len(text) - pairs):
        depth += {"open": 1, "box": 1, "close": -1}.get(token.lastgroup or "", 0)
        lowest = min(lowest, depth)
        if pairs + lowest <= 0:
            return text
    outer = pairs + lowest if depth == 0 else 0
    inside = text[outer : len(text) - outer]
    return inside if inside.strip() else text
