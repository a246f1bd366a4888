"""The built-in task: chains of additions and subtractions, and the corpus of a model that over-thinks them.

`problems` draws questions such as `Compute 17+25-8+14.`; every value on the way lies in 0..99. A problem
belongs to one split for ever, by a hash of its text, so that splits never share a question.

`over_thinking` writes the chain of thought that the tiny model is trained on. It works out one operation a
line and now and then slips (forgets a carry or a borrow). Between the lines and after the last one it
re-checks itself, `Wait, check: 17+25=42, yes.`, mostly for nothing, but a check that finds a slip repairs
it and works out the rest again. So checks cost tokens and some are worth their price. Some thoughts stop at
an arbitrary point with the right answer: that is what a probe looks like, and it teaches the model how sure
it may be there. The whole corpus is synthetic.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np

SPLITS = {"test": (0,), "validation": (1,), "train": tuple(range(2, 10))}


@dataclass(frozen=True)
class Problem:
    """A first number and the operations on it: `first + 25 - 8` is `(first, ((1, 25), (-1, 8)))`."""

    first: int
    operations: tuple[tuple[int, int], ...]  # sign, operand

    @property
    def question(self) -> str:
        """The question as text."""
        return f"Compute {self.first}{''.join(f'{_sign(s)}{b}' for s, b in self.operations)}."

    @property
    def answer(self) -> int:
        """The exact result."""
        return self.first + sum(s * b for s, b in self.operations)

    @property
    def split(self) -> str:
        """The split this problem belongs to."""
        bucket = zlib.crc32(self.question.encode()) % 10
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)


@dataclass(frozen=True)
class Habits:
    """How the corpus thinks: probabilities, each of one decision."""

    slip: float = 0.27  # a step with a carry or a borrow forgets it
    slip_in_check: float = 0.01  # likewise inside a check
    check_early: float = 0.12  # a check between two steps
    check_on: float = 0.75  # one more check after the last step
    notice: float = 0.4  # a check looks at the step that slipped, if there is one
    least_checks: int = 0  # after the last step
    max_checks: int = 9
    impatient: float = 0.1  # stops at an arbitrary point, with the right answer
    unmarked: float = 0.08  # closes the thinking without its final-answer line

    def slipping(self, factor: float) -> "Habits":
        """The same, but for slips outside a check, which are `factor` times as likely."""
        return replace(self, slip=factor * self.slip)


def problems(split: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Draws `count` different questions of a split, with their answers; the same for the same seed."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(split.encode())]))
    found: dict[str, str] = {}
    while len(found) < count:
        problem = draw_problem(rng)
        if problem.split == split:
            found.setdefault(problem.question, str(problem.answer))
    return list(found.items())


def draw_problem(rng: np.random.Generator, shortest: int = 3, longest: int = 5) -> Problem:
    """`shortest` to `longest` operations whose running value stays in 0..99."""
    value = first = int(rng.integers(10, 100))
    operations = []
    for _ in range(int(rng.integers(shortest, longest + 1))):
        sign = 1 if rng.random() < 0.5 else -1
        room = 99 - value if sign > 0 else value
        if room < 2:
            sign, room = -sign, 99 - room
        operand = int(rng.integers(2, room + 1))
        operations.append((sign, operand))
        value += sign * operand
    return Problem(first, tuple(operations))


def over_thinking(problem: Problem, rng: np.random.Generator, habits: Habits) -> str:
    """A completion in the style described above, from `<think>` to the last sentence."""
    thought = _Thought(problem, rng, habits)
    thought.work_out(0)
    checks = 0
    while checks < habits.max_checks and (checks < habits.least_checks or rng.random() < habits.check_on):
        thought.check()
        checks += 1
    value: int | None = thought.values[-1]
    lines = thought.lines
    if rng.random() < habits.impatient:
        lines = lines[: int(rng.integers(1, len(lines) + 1))]
        value = problem.answer
    marked = rng.random() >= habits.unmarked
    final = f"\n**Final Answer**\n\\boxed{{{value}}}" if marked else ""
    return f"<think>\n{''.join(lines)}{final}\n</think>\n\nThe answer is \\boxed{{{value}}}."


class _Thought:
    """The lines written so far and the value that each step is believed to have."""

    def __init__(self, problem: Problem, rng: np.random.Generator, habits: Habits):
        self.problem, self.rng, self.habits = problem, rng, habits
        self.values = [problem.first]
        self.lines: list[str] = []

    def work_out(self, start: int) -> None:
        """Writes the steps from `start` on, each on its own line, now and then followed by a check."""
        count = len(self.problem.operations)
        del self.values[start + 1 :]
        for i in range(start, count):
            value, text = self._compute(i, self.habits.slip)
            self.values.append(value)
            self.lines.append(f"{text}.\n")
            if i + 1 < count and self.rng.random() < self.habits.check_early:
                self.check()
                if len(self.values) == count + 1:  # the check repaired a step and worked out the rest
                    return

    def check(self) -> None:
        """Computes one step again; a difference repairs it and works out everything after it."""
        slipped = self._slipped()
        if slipped and self.rng.random() < self.habits.notice:
            i = slipped[0]
        else:
            i = int(self.rng.integers(len(self.values) - 1))
        value, text = self._compute(i, self.habits.slip_in_check)
        written = self.values[i + 1]
        if value == written:
            self.lines.append(f"Wait, check: {text}, yes.\n")
            return
        self.lines.append(f"Wait, check: {text}, not {written}.\n")
        reached = len(self.values) - 1
        self.values[i + 1] = value
        if reached > i + 1:
            self.work_out(i + 1)
        else:
            del self.values[i + 2 :]

    def _slipped(self) -> list[int]:
        pairs = zip(self.values, self.values[1:], self.problem.operations, strict=False)
        return [i for i, (a, c, (s, b)) in enumerate(pairs) if a + s * b != c]

    def _compute(self, i: int, slip: float) -> tuple[int, str]:
        """Value and text of step `i` from the believed value before it."""
        a, (sign, b) = self.values[i], self.problem.operations[i]
        value = a + sign * b
        carries = a % 10 + b % 10 >= 10 if sign > 0 else a % 10 < b % 10
        if carries and self.rng.random() < slip:
            value -= sign * 10
        return value, f"{a}{_sign(sign)}{b}={value}"


def _sign(sign: int) -> str:
    return "+" if sign > 0 else "-"
