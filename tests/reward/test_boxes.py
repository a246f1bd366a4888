import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from step_grpo.reward.boxes import last_box, without_outer_braces

PIECES = ["\\boxed{", "\\boxed {", "\\boxed", "{", "}", "\\{", "\\}", "\\\\", "\\", "7", " "]


def boxes_by_brute_force(text: str) -> list[str]:
    """Every closed box in the order of opening: from each opening, count braces to the end of the text."""
    # A character is escaped if an odd run of backslashes ends just before it.
    escaped = [len(text[:i]) - len(text[:i].rstrip("\\")) & 1 for i in range(len(text))]
    found = []
    for start in range(len(text)):
        head = text[start:]
        brace = start + len("\\boxed") + len(head[6:]) - len(head[6:].lstrip())
        if not head.startswith("\\boxed") or escaped[start] or text[brace : brace + 1] != "{":
            continue
        depth = 0
        for end in range(brace, len(text)):
            depth += (text[end] == "{" and not escaped[end]) - (text[end] == "}" and not escaped[end])
            if depth == 0:
                found.append(text[brace + 1 : end])
                break
    return found


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
@example("\\\\boxed{1}")
@example("\\\\\\boxed{1}")
def test_last_box_equals_brute_force(text: str) -> None:
    boxes = boxes_by_brute_force(text)
    assert last_box(text) == (boxes[-1] if boxes else None)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("7", None),
        ("\\boxed7", None),
        ("\\boxed{7", None),
        ("\\boxed{}", ""),
        ("so \\boxed{7}.", "7"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{\\boxed{3}}", "3"),
        ("} } \\boxed{4}}}", "4"),
        ("{ { \\boxed{5}", "5"),
        ("\\boxed\n{6}", "6"),
    ],
)
def test_last_closed_box_is_found(text: str, content: str | None) -> None:
    assert last_box(text) == content


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 400_000,
        "{" * 3_000_000,
        "}" * 3_000_000,
        "\\" * 3_000_000,
        ("\\boxed" + " " * 1000) * 3000,
    ],
    ids=["open boxes", "open braces", "closed braces", "backslashes", "blanks"],
)
def test_three_megabytes_of_anything_take_linear_time(text: str) -> None:
    start = time.process_time()
    assert last_box(text) is None
    assert time.process_time() - start < 5


def is_enclosed(text: str) -> bool:
    """Whether the first brace opens what the last one closes, by counting."""
    depth = 0
    for i, character in enumerate(text):
        escaped = len(text[:i]) - len(text[:i].rstrip("\\")) & 1
        depth += 0 if escaped else (character == "{") - (character == "}")
        if depth <= 0:
            return i == len(text) - 1 > 0 and depth == 0
    return False


@given(st.lists(st.sampled_from(["{", "}", "\\{", "\\}", "\\\\", "7", "{{", "}}"]), max_size=12).map("".join))
@example("{{72}}")
@example("{1}{2}")
@example("{1\\}")
def test_outer_braces_are_those_that_enclose_everything(text: str) -> None:
    bare = text
    while is_enclosed(bare):
        bare = bare[1:-1]
    assert without_outer_braces(text) == (bare or text)


def test_a_hundred_thousand_outer_braces_are_removed_at_once() -> None:
    assert without_outer_braces("{" * 100_000 + "7" + "}" * 100_000) == "7"
