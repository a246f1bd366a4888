"""The built-in task and the corpus of a model that over-thinks it."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from short_run import ROOT

from step_grpo import cli
from step_grpo.data.arithmetic import SPLITS, Habits, Problem, draw_problem, over_thinking, problems
from step_grpo.data.prompts import encode_prompts
from step_grpo.data.sources import Question
from step_grpo.data.tiny_tokenizer import build_tokenizer

TEXT = re.compile(
    r"<think>\n(?P<lines>(?:.+\n)*)(?P<marked>\n\*\*Final Answer\*\*\n\\boxed\{(?P<first>-?\d+)\})?"
    r"\n</think>\n\nThe answer is \\boxed\{(?P<last>-?\d+)\}\."
)
STEP = re.compile(r"(-?\d+[+-]\d+)=(-?\d+)\.")
CHECK = re.compile(r"Wait, check: (-?\d+[+-]\d+)=(-?\d+), (?:yes|not (-?\d+))\.")


def running_values(question: str) -> list[int]:
    """The values on the way, read from the question's text alone."""
    expression = re.fullmatch(r"Compute (\d+(?:[+-]\d+)+)\.", question)[1]
    first, *rest = re.findall(r"[+-]?\d+", expression)
    return list(itertools.accumulate(map(int, rest), initial=int(first)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", [0, 7])
def test_questions_are_distinct_answers_right_and_values_stay_in_range(split, seed):
    drawn = problems(split, 300, seed)
    assert len({question for question, _ in drawn}) == 300
    for question, answer in drawn:
        values = running_values(question)
        assert 4 <= len(values) <= 6
        assert values[-1] == int(answer)
        assert all(0 <= value <= 99 for value in values)


@pytest.mark.parametrize("split", SPLITS)
def test_split_of_a_question_follows_from_its_text(split):
    """Whatever the seed that draws it, a question is never of two splits."""
    for question, _ in problems(split, 200, seed=1):
        first, *rest = re.findall(r"[+-]?\d+", question)
        operations = tuple((-1 if part[0] == "-" else 1, int(part[1:])) for part in rest)
        again = Problem(int(first), operations)
        assert (again.question, again.split) == (question, split)


def test_splits_are_disjoint_over_all_seeds():
    drawn = {
        split: {question for seed in range(5) for question, _ in problems(split, 300, seed)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not drawn[one] & drawn[other]


def test_problems_of_a_seed_are_the_same_and_a_longer_draw_continues_a_shorter():
    assert problems("train", 50, 3) == problems("train", 80, 3)[:50]
    assert problems("train", 50, 3) != problems("train", 50, 4)


@given(st.integers(0, 99), st.lists(st.tuples(st.sampled_from([1, -1]), st.integers(0, 99)), max_size=6))
def test_question_and_answer_say_the_same(first, operations):
    problem = Problem(first, tuple(operations))
    assert eval(problem.question.removeprefix("Compute ").removesuffix(".")) == problem.answer


# ---------------------------------------------------------------------- the corpus


class Thought:
    """One completion of the corpus, taken apart by its text."""

    def __init__(self, problem: Problem, text: str):
        self.problem, self.text = problem, text
        parts = TEXT.fullmatch(text)
        assert parts, text
        self.lines = parts["lines"].splitlines()
        self.final = parts["first"] and int(parts["first"])
        self.answer = int(parts["last"])
        self.steps = [bool(STEP.fullmatch(line)) for line in self.lines]
        self.checks = [CHECK.fullmatch(line) for line in self.lines]

    @property
    def right(self) -> bool:
        return self.answer == self.problem.answer

    @property
    def repairs(self) -> list[re.Match]:
        """Checks that replaced a wrong result by the right one."""
        found = [check for check in self.checks if check and check[3]]
        return [check for check in found if int(check[2]) == eval(check[1]) != int(check[3])]

    @property
    def last_step(self) -> int:
        return max((i for i, step in enumerate(self.steps) if step), default=-1)

    def redundant(self, where: range) -> bool:
        """Whether a check among these lines only confirmed what was right."""
        there = [self.checks[i] for i in where if self.checks[i]]
        return any(not check[3] and int(check[2]) == eval(check[1]) for check in there)


@pytest.fixture(scope="module")
def corpus() -> list[Thought]:
    rng = np.random.default_rng(11)
    drawn = [draw_problem(rng) for _ in range(3000)]
    return [Thought(problem, over_thinking(problem, rng, Habits())) for problem in drawn]


def share(flags) -> float:
    return float(np.mean(list(flags)))


def test_every_line_is_a_step_or_a_check(corpus):
    for thought in corpus:
        for step, check in zip(thought.steps, thought.checks, strict=True):
            assert step != bool(check)


def test_final_line_of_the_thinking_and_the_answer_agree(corpus):
    assert all(thought.final in (None, thought.answer) for thought in corpus)


def test_most_thoughts_close_with_the_final_answer_line(corpus):
    marked = share(thought.final is not None for thought in corpus)
    assert 0.8 < marked < 1  # but not all: a probe must be able to tell


def test_some_answers_are_wrong(corpus):
    assert 0.02 < share(not thought.right for thought in corpus) < 0.2


def test_some_checks_repair_a_slip_and_the_answer_with_it(corpus):
    repaired = [thought for thought in corpus if thought.repairs]
    assert len(repaired) > 0.05 * len(corpus)
    assert share(thought.right for thought in repaired) > 0.5


def test_redundant_checks_stand_before_and_after_the_last_step(corpus):
    before = share(thought.redundant(range(thought.last_step)) for thought in corpus)
    behind = share(thought.redundant(range(thought.last_step + 1, len(thought.lines))) for thought in corpus)
    assert before > 0.1 and behind > 0.4


def test_number_of_checks_varies(corpus):
    counts = np.bincount([sum(map(bool, thought.checks)) for thought in corpus])
    assert np.all(counts[:6] > 0.02 * len(corpus))


def test_check_repeats_an_equation_that_was_written(corpus):
    """`yes` confirms the very result, `not N` names the result that it replaces."""
    for thought in corpus:
        written = {}
        for line, check in zip(thought.lines, thought.checks, strict=True):
            if check is None:
                expression, value = STEP.fullmatch(line).groups()
            else:
                expression, value, replaced = check.groups()
                assert written[expression] == (replaced or value)
                assert replaced != value
            written[expression] = value


def test_corpus_fits_into_its_rows_and_nearly_all_into_the_response_budget(corpus):
    tokenizer = build_tokenizer()
    sft = cli.load_config(str(ROOT / "configs" / "tiny_sft.py"))
    tiny: ConfigDict = cli.load_config(str(ROOT / "configs" / "tiny.py"))
    questions = [Question("", thought.problem.question, "") for thought in corpus]
    prompts = encode_prompts(
        tokenizer,
        questions,
        instruction=sft.instruction,
        max_prompt_tokens=tiny.rollout.max_prompt_tokens,
    )
    assert prompts.dropped == 0
    completions = tokenizer([thought.text for thought in corpus], add_special_tokens=False)["input_ids"]
    lengths = np.array([len(ids) + 1 for ids in completions])  # and the EOS
    total = lengths + [len(prompt.ids) for prompt in prompts.kept]
    assert share(total <= sft.row_length) > 0.98
    assert share(lengths <= tiny.rollout.max_response_tokens) > 0.97
