"""A search with one solution: which two of some numbers add up to a target.

A question is `Which two of 12,35,27,8,41 add up to 62? Give the larger.` The thought tries pair by pair,
`12+35=47.`, until one hits. A forgotten carry may miss the hit, or make one of a pair that is ten too large.
Checks add a pair up again, the one that hit or an earlier one, mostly for nothing: `Wait, check: 35+27=62,
yes.` One that finds a slip may find or refute a hit. Where no pair hits, it checks on.

Out of distribution: six or seven numbers in place of four or five.
"""

import itertools
import re
from dataclasses import dataclass

import numpy as np

from step_grpo.data.arithmetic import Habits
from step_grpo.data.tasks.thoughts import OUT_OF_DISTRIBUTION, Step, add, complete, judge, split_of

PHRASES = ("Which two of ", " add up to ", "? Give the larger.")
NUMBERS = 3, 50  # each is at least the first and below the second
USUAL_COUNTS, HARD_COUNTS = (4, 5), (6, 7)
QUESTION = re.compile(r"Which two of (\d+(?:,\d+)+) add up to (\d+)\? Give the larger\.")

Pair = tuple[int, int]


@dataclass(frozen=True)
class Search:
    """Distinct numbers of which exactly two add up to the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def question(self) -> str:
        """The question as text."""
        return f"Which two of {','.join(map(str, self.numbers))} add up to {self.target}? Give the larger."

    @property
    def hits(self) -> list[Pair]:
        """The pairs that add up to the target: one, by the way problems are drawn."""
        return [pair for pair in itertools.combinations(self.numbers, 2) if sum(pair) == self.target]

    @property
    def answer(self) -> int:
        """The larger of the two."""
        return max(self.hits[0])

    @property
    def split(self) -> str:
        """The split this problem belongs to."""
        return OUT_OF_DISTRIBUTION if len(self.numbers) in HARD_COUNTS else split_of(self.question)


@dataclass(frozen=True)
class SearchHabits(Habits):
    """How the corpus thinks about a search."""

    slip: float = 0.4
    trap: float = 0.6  # there is a pair that a forgotten carry would make a hit
    look_at_hit: float = 0.6  # a check that notices nothing looks at the pair that hit


def draw(rng: np.random.Generator, hard: bool) -> Search:
    """Numbers and a target that one pair of them makes; `hard`: one that is out of distribution."""
    trap = rng.random() < SearchHabits().trap
    while True:
        count = int(rng.choice(HARD_COUNTS if hard else USUAL_COUNTS))
        numbers = tuple(int(n) for n in rng.choice(np.arange(*NUMBERS), count, replace=False))
        pairs = list(itertools.combinations(numbers, 2))
        problem = Search(numbers, sum(pairs[int(rng.integers(len(pairs)))]))
        trapped = any(sum(pair) == problem.target + 10 for pair in pairs)
        if len(problem.hits) == 1 and (trapped or not trap):
            return problem


def over_thinking(problem: Search, rng: np.random.Generator, habits: SearchHabits) -> str:
    """A completion in the style described above, from `<think>` to the last sentence."""
    thought = Thought(problem, rng, habits)
    thought.run()
    value = max(thought.hit or thought.nearest())
    return complete([step.text for step in thought.steps], value, problem, rng, habits)


class Thought:
    """The lines written so far, the believed sums of the pairs tried, and the pair that is thought to hit."""

    def __init__(self, problem: Search, rng: np.random.Generator, habits: SearchHabits):
        self.problem, self.rng, self.habits = problem, rng, habits
        self.sums: dict[Pair, int] = {}
        self.hit: Pair | None = None
        self.steps: list[Step] = []

    def run(self) -> None:
        """Tries the pairs and checks the sums again and again."""
        self.work_out()
        for checks in range(self.habits.max_checks):
            enough = self.hit and checks >= self.habits.least_checks
            if enough and self.rng.random() >= self.habits.check_on:
                return
            self.check()

    def work_out(self) -> None:
        """Tries the pairs not tried yet until one hits, now and then with a check in between."""
        for pair in itertools.combinations(self.problem.numbers, 2):
            if self.hit:
                return
            if pair not in self.sums:
                value, text = self.compute(pair, self.habits.slip)
                self.believe(pair, value)
                self.note(f"{text}.")
                if not self.hit and self.rng.random() < self.habits.check_early:
                    self.check()

    def check(self) -> None:
        """Adds one pair up again; a difference may find a hit, or refute it and start the search anew."""
        pair = self.choose()
        value, text = self.compute(pair, self.habits.slip_in_check)
        written = self.sums[pair]
        verdict = judge(written, value, sum(pair))
        if value == written:
            self.note(f"Wait, check: {text}, yes.", verdict)
            return
        refuted = pair == self.hit
        self.believe(pair, value)
        self.note(f"Wait, check: {text}, not {written}.", verdict)
        if refuted:
            self.work_out()

    def choose(self) -> Pair:
        """The pair that a check looks at."""
        slipped = [pair for pair, value in self.sums.items() if sum(pair) != value]
        if slipped and self.rng.random() < self.habits.notice:
            return slipped[0]
        if self.hit and self.rng.random() < self.habits.look_at_hit:
            return self.hit
        tried = list(self.sums)
        return tried[int(self.rng.integers(len(tried)))]

    def compute(self, pair: Pair, slip: float) -> tuple[int, str]:
        """Value and text of the sum of a pair."""
        value = add(*pair, self.rng, slip)
        return value, f"{pair[0]}+{pair[1]}={value}"

    def believe(self, pair: Pair, value: int) -> None:
        """Takes `value` for the sum of `pair`; the last pair found to hit is the hit."""
        self.sums[pair] = value
        if value == self.problem.target:
            self.hit = pair
        elif pair == self.hit:
            self.hit = None

    def nearest(self) -> Pair:
        """The guess where nothing hits: the first of the pairs whose believed sums are nearest."""
        return min(self.sums, key=lambda pair: abs(self.sums[pair] - self.problem.target))

    def note(self, text: str, check: str = "") -> None:
        """Writes a line; the state is already what it leads to."""
        self.steps.append(Step(text, check, max(self.hit) if self.hit else None))
