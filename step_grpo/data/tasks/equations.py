"""Linear equations with an integer solution: `Solve 3x+17=62.` or, less often, `Solve 7x+5=3x+41.` as text.

The thought brings x to the left (`7x-3x=4x.`), the numbers to the right (`4x=41-5=36.`) and divides
(`x=36/4=9.`). It may forget a carry or a borrow, or divide off by one. What does not divide is rounded down,
which a careful reader takes for a sign. A check computes one step again and goes on from there, or puts x
into the equation, `Wait, check: 3*15=45, 45+17=62, yes.`; where both sides differ all is worked out again.

Out of distribution: x on both sides, which training has in one of five, and a number taken away on the left,
which training has only where x stands on one side.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from step_grpo.data.arithmetic import Habits
from step_grpo.data.tasks.thoughts import (
    HARMFUL,
    MISSED,
    OUT_OF_DISTRIBUTION,
    REDUNDANT,
    USEFUL,
    Step,
    add,
    complete,
    judge,
    split_of,
)

PHRASES = ("Solve ",)
BOTH_SIDES = 0.2  # share of the equations with x on both sides, but out of distribution
LARGEST = 99  # of either side, with the solution put in
QUESTION = re.compile(r"Solve (\d+)x([+-]\d+)=(?:(\d+)x\+)?(\d+)\.")


@dataclass(frozen=True)
class Equation:
    """`a x + b = c x + d`; c is 0 where x stands on the left alone."""

    a: int
    b: int
    c: int
    d: int

    @property
    def question(self) -> str:
        """The question as text."""
        return f"Solve {self.a}x{self.b:+d}={f'{self.c}x+' if self.c else ''}{self.d}."

    @property
    def answer(self) -> int:
        """The solution, an integer by the way equations are drawn."""
        return (self.d - self.b) // (self.a - self.c)

    @property
    def split(self) -> str:
        """The split this problem belongs to."""
        return OUT_OF_DISTRIBUTION if self.c and self.b < 0 else split_of(self.question)


@dataclass(frozen=True)
class EquationHabits(Habits):
    """How the corpus thinks about equations."""

    slip: float = 0.35
    slip_in_division: float = 0.2
    substitute: float = 0.5  # a check of a solution puts it into the equation

    def slipping(self, factor: float) -> "EquationHabits":
        """The same, but for slips outside a check, those in a division too."""
        return replace(self, slip=factor * self.slip, slip_in_division=factor * self.slip_in_division)


def draw(rng: np.random.Generator, hard: bool) -> Equation:
    """An equation whose sides are at most 99 at the solution; `hard`: one that is out of distribution."""
    if hard or rng.random() < BOTH_SIDES:
        c = int(rng.integers(2, 8))
        a = c + int(rng.integers(2, 10 - c))
    else:
        a, c = int(rng.integers(2, 10)), 0
    x = int(rng.integers(2, 1 + min(40, (LARGEST - 2) // a)))
    if hard or (c == 0 and rng.random() < 0.5):
        b = -int(rng.integers(2, (a - c) * x))
    else:
        b = int(rng.integers(2, LARGEST + 1 - a * x))
    return Equation(a, b, c, (a - c) * x + b)


def over_thinking(problem: Equation, rng: np.random.Generator, habits: EquationHabits) -> str:
    """A completion in the style described above, from `<think>` to the last sentence."""
    thought = Thought(problem, rng, habits)
    thought.run()
    return complete([step.text for step in thought.steps], thought.values[-1], problem, rng, habits)


class Thought:
    """The lines written so far, and the believed results of the stages: coefficient of x, its product, x."""

    def __init__(self, problem: Equation, rng: np.random.Generator, habits: EquationHabits):
        self.problem, self.rng, self.habits = problem, rng, habits
        self.stages = 3 if problem.c else 2
        self.values: list[int] = []
        self.steps: list[Step] = []

    def run(self) -> None:
        """Works the equation out and checks it again and again."""
        self.work_out(0)
        for checks in range(self.habits.max_checks):
            if checks >= self.habits.least_checks and self.rng.random() >= self.habits.check_on:
                return
            if self.rng.random() < self.habits.substitute:
                self.put_in()
            else:
                self.recompute()

    def work_out(self, start: int) -> None:
        """Writes the stages from `start` on, each on its own line, now and then followed by a check."""
        del self.values[start:]
        while len(self.values) < self.stages:
            left = self.left_side(len(self.values))
            value, text = self.compute(len(self.values), self.habits.slip)
            self.values.append(value)
            self.note(f"{left}{text}.")
            if len(self.values) < self.stages and self.rng.random() < self.habits.check_early:
                self.recompute()

    def recompute(self) -> None:
        """Computes one stage again; a difference repairs it and works out everything after it."""
        slipped = [i for i in range(len(self.values)) if self.values[i] != self.exact(i)]
        if slipped and self.rng.random() < self.habits.notice:
            i = slipped[0]
        else:
            i = int(self.rng.integers(len(self.values)))
        value, text = self.compute(i, self.habits.slip_in_check)
        written = self.values[i]
        verdict = judge(written, value, self.exact(i))
        if value == written:
            self.note(f"Wait, check: {text}, yes.", verdict)
            return
        reached = len(self.values)
        del self.values[i:]
        self.values.append(value)
        self.note(f"Wait, check: {text}, not {written}{'x' if self.names_x(i) else ''}.", verdict)
        if reached > i + 1:
            self.work_out(i + 1)

    def put_in(self) -> None:
        """Puts the solution into the equation; where the sides differ, all is worked out again."""
        p, x = self.problem, self.values[-1]
        right = x == p.answer
        left_value, text = self.side(p.a, x, p.b)
        other = p.d
        if p.c:
            other = left_value
            left_value, right_text = self.side(p.c, x, p.d)
            text = f"{text}, {right_text}"
        if left_value == other:
            self.note(f"Wait, check: {text}, yes.", REDUNDANT if right else MISSED)
            return
        self.values.clear()
        self.note(f"Wait, check: {text}, not {other}.", HARMFUL if right else USEFUL)
        self.work_out(0)

    def side(self, factor: int, x: int, number: int) -> tuple[int, str]:
        """Value and text of `factor * x + number`."""
        product = factor * x
        value = add(product, number, self.rng, self.habits.slip_in_check)
        return value, f"{factor}*{x}={product}, {product}{number:+d}={value}"

    def names_x(self, stage: int) -> bool:
        """Whether the stage is the one that subtracts multiples of x."""
        return self.stages == 3 and stage == 0

    def left_side(self, stage: int) -> str:
        """What stands before the expression on the line of a stage."""
        if stage == self.stages - 1:
            return "x="
        if self.names_x(stage):
            return ""
        return f"{self.coefficient()}x="

    def coefficient(self) -> int:
        """The believed coefficient of x once it is on the left alone."""
        return self.values[0] if self.stages == 3 else self.problem.a

    def exact(self, stage: int) -> int:
        """The right result of a stage, given the results before it."""
        if self.names_x(stage):
            return self.problem.a - self.problem.c
        if stage == self.stages - 1:
            return self.values[stage - 1] // self.coefficient()
        return self.problem.d - self.problem.b

    def compute(self, stage: int, slip: float) -> tuple[int, str]:
        """Value and text of a stage from the believed results before it."""
        p, value = self.problem, self.exact(stage)
        if self.names_x(stage):
            return value, f"{p.a}x-{p.c}x={value}x"
        if stage == self.stages - 1:
            slip *= self.habits.slip_in_division / self.habits.slip
            if self.rng.random() < slip:
                value += 1 if value < 1 or self.rng.random() < 0.5 else -1
            return value, f"{self.values[stage - 1]}/{self.coefficient()}={value}"
        value = add(p.d, -p.b, self.rng, slip)
        return value, f"{p.d}{-p.b:+d}={value}"

    def note(self, text: str, check: str = "") -> None:
        """Writes a line; the state is already what it leads to."""
        answer = self.values[-1] if len(self.values) == self.stages else None
        self.steps.append(Step(text, check, answer))
