import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_grpo.errors import UserError
from step_grpo.reward.steps import count_steps, trigger_pattern

LETTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


def steps_by_hand(text: str, trigger: str) -> int:
    """METHOD.md, section 1, position by position."""
    count = 1
    for start in range(len(text)):
        end = start + len(trigger)
        if text[start:end] == trigger:
            before, after = text[start - 1 : start], text[end : end + 1]
            count += before not in LETTERS and after not in LETTERS
    return count


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", 1),
        ("no trigger", 1),
        ("Wait", 2),
        ("Wait, let me check. Wait", 3),
        ("Wait Wait\nWait\tWait", 5),
        ("Waiting, await, aWait, Waits, WaitWait", 1),
        ("wait WAIT", 1),
        ("Wait1 2Wait _Wait_", 4),
        ("éWaité ÄWait", 3),
        ("**Wait**…Wait。", 3),
        ("Wait\x00Wait\ud800", 3),
    ],
)
def test_only_triggers_untouched_by_ascii_letters_count(text: str, steps: int) -> None:
    assert count_steps(text) == steps


@given(
    st.text(alphabet="Wait,. éaZ1\n") | st.lists(st.sampled_from(["Wait", "a", ".", " ", "é"])).map("".join)
)
def test_count_equals_a_scan_by_hand(text: str) -> None:
    assert count_steps(text) == steps_by_hand(text, "Wait")


@given(st.lists(st.sampled_from(["Wait", "But", "Hmm", "Alternatively", "so", "."])))
def test_counts_of_several_triggers_add_up(words: list[str]) -> None:
    text, triggers = " ".join(words), ("Wait", "But", "Hmm", "Alternatively")
    assert count_steps(text, triggers) == 1 + sum(steps_by_hand(text, trigger) - 1 for trigger in triggers)


def test_of_two_triggers_that_start_together_one_counts() -> None:
    assert count_steps("Wait a moment. Wait, no", ("Wait", "Wait a moment")) == 3
    assert count_steps("Wait a moments", ("Wait", "Wait a moment")) == 2


def test_triggers_are_words_and_not_patterns() -> None:
    assert count_steps("Hmm... Hmmm. a.b", ("Hmm...",)) == 2
    assert count_steps("axb a.b", ("a.b",)) == 2


def test_pattern_is_compiled_once() -> None:
    assert trigger_pattern(("Wait", "But")) is trigger_pattern(("Wait", "But"))


@pytest.mark.parametrize("triggers", [(), ("",), ("Wait", ""), "Wait"])
def test_triggers_without_a_word_are_refused(triggers: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="triggers"):
        count_steps("text", triggers)
