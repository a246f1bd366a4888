"""The parser of a grading process finds what math-verify's own finds, with less work."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from antlr4.atn.ParserATNSimulator import ParserATNSimulator
from latex2sympy2_extended import latex2sympy2

from step_grpo.reward import _grading_worker as worker

WITHOUT_CONTEXT = [
    r"2 - \sqrt{3}",
    r"(-\infty, 2) \cup (3, \infty)",
    r"120^\circ",
    r"\{ 1, 2, x \}",
]
WITH_CONTEXT = ["x^3 - 2x + 1", "a^{3}+2 a b=2013", "a_{2k+2}", r"c_{i} \neq c_{j}"]
WRONG = [r"\frac{1}{", "1 +", "} x", r"x \unknown{y}", "§", "5 § 6", r"\text{the sum of", ""]


@pytest.fixture
def parsers() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """math-verify's parser and the worker's, each from a text to its tree or error."""
    original = latex2sympy2._Latex2Sympy.create_parser
    worker.parse_in_two_stages()
    changed = latex2sympy2._Latex2Sympy.create_parser
    latex2sympy2._Latex2Sympy.create_parser = original
    assert changed is not original
    return tree_of(original), tree_of(changed)


def tree_of(create_parser: Callable[[Any, str], Any]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        parser = create_parser(latex2sympy2._Latex2Sympy(), text)
        try:
            return parser.math().toStringTree(recog=parser)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return parse


@pytest.fixture
def in_context(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets one entry for each prediction with full context."""
    calls, predict = list[int](), ParserATNSimulator.execATNWithFullContext

    def counted(*args: Any) -> Any:
        calls.append(1)
        return predict(*args)

    monkeypatch.setattr(ParserATNSimulator, "execATNWithFullContext", counted)
    return calls


@pytest.mark.parametrize("text", WITHOUT_CONTEXT)
def test_answers_are_parsed_without_full_context(parsers: Any, in_context: list[int], text: str) -> None:
    original, changed = parsers
    tree = changed(text)
    assert not in_context
    assert tree == original(text)
    assert in_context, "this parser needs no first stage"


@pytest.mark.parametrize("text", WITH_CONTEXT)
def test_what_needs_full_context_gets_it(parsers: Any, in_context: list[int], text: str) -> None:
    original, changed = parsers
    tree = changed(text)
    assert in_context
    assert tree == original(text)
    assert tree.startswith("(math ")


@pytest.mark.parametrize("text", WRONG)
def test_wrong_syntax_is_told_as_before(parsers: Any, text: str) -> None:
    original, changed = parsers
    assert changed(text) == original(text)


def test_a_full_memory_is_no_reason_to_parse_again(parsers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[int]()

    def out_of_memory(*args: Any) -> None:
        started.append(1)
        raise MemoryError

    monkeypatch.setattr(ParserATNSimulator, "adaptivePredict", out_of_memory)
    assert parsers[1]("1+1") == "MemoryError: "
    assert len(started) == 1


JUDGE = r"""
from antlr4.atn.ParserATNSimulator import ParserATNSimulator
from step_grpo.reward import _grading_worker

judge = _grading_worker.load_judge()
del ParserATNSimulator.execATNWithFullContext
print(judge(r"2 - \sqrt{3}", r"-\sqrt{3} + 2"))
"""


def test_judge_of_a_worker_parses_without_full_context() -> None:
    run = subprocess.run([sys.executable, "-c", JUDGE], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
