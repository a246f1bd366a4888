r"""What a thought did, read from its text alone: which checks were needed, and when the answer was there.

`read(question, completion)` goes through the lines of the thinking and keeps, as a reader on paper
would, the results that the text holds at each point. A check is judged by what it did to them:

| verdict | the check |
| --- | --- |
| `useful` | replaced a wrong result by the right one, or rejected a wrong solution |
| `redundant` | confirmed what was right |
| `missed` | confirmed what was wrong, or replaced it by something wrong |
| `harmful` | replaced or rejected what was right |

A result is right if it follows from the results that it was computed from. Models write what they like: a
line that is no step of the family, or does not fit what stands before it, is skipped.
"""

import dataclasses
import itertools
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from step_grpo.data.prompts import THINK_END
from step_grpo.data.tasks import chains, equations, search
from step_grpo.data.tasks.thoughts import HARMFUL, MISSED, REDUNDANT, USEFUL, VERDICTS, Step, judge

LINE = re.compile(r"(?:(\d{0,6}x)=)?(-?\d{1,6})(x?)([-+/])(\d{1,6})(x?)=(-?\d{1,6})(x?)\.")
CHECK = re.compile(r"Wait, check: (.+), (?:yes|not (-?\d{1,6})x?)\.")
EQUATION = re.compile(r"(-?\d{1,6}x?[-+/]\d{1,6}x?)=(-?\d{1,6})x?")
PUT_IN = re.compile(r"(\d{1,6})\*(-?\d{1,6})=(-?\d{1,6}), (-?\d{1,6})([+-]\d{1,6})=(-?\d{1,6})")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "/": operator.floordiv,
}


@dataclass(frozen=True)
class Reading:
    """The steps of a thought, one a line that could be read, and the right answer to its question."""

    steps: tuple[Step, ...]
    answer: int
    skipped: int  # lines that could not be read

    @property
    def first_right(self) -> int | None:
        """Index of the first step at which the text had arrived at the right answer; None: at none."""
        return next((i for i, step in enumerate(self.steps) if step.answer == self.answer), None)

    @property
    def before(self) -> int:
        """Steps up to the first right answer, that one included; all of them where there is none."""
        first = self.first_right
        return len(self.steps) if first is None else first + 1

    @property
    def after(self) -> int:
        """Steps behind the first right answer."""
        return len(self.steps) - self.before

    @property
    def ends_right(self) -> bool:
        """Whether the text had arrived at the right answer when the thinking ended."""
        return bool(self.steps) and self.steps[-1].answer == self.answer

    def checks(self, verdict: str) -> int:
        """The number of checks with this verdict, one of `VERDICTS`."""
        return sum(step.check == verdict for step in self.steps)

    def counts(self) -> dict[str, int]:
        """All of it as numbers, to be summed over completions."""
        verdicts = {verdict: self.checks(verdict) for verdict in VERDICTS}
        reached = int(self.first_right is not None)
        ends = int(self.ends_right)
        return {
            "before": self.before,
            "after": self.after,
            "reached": reached,
            "ends_right": ends,
            **verdicts,
        }


def read(question: str, completion: str) -> Reading:
    """Reads a completion about a question of `step_grpo.data.tasks`.

    Args:
        question: as its family writes it, blanks around it aside.
        completion: whatever a model wrote; what stands before `</think>` and before the final-answer line
            is read.

    Raises:
        ValueError: the question is of no family.
    """
    family, parts = _recognise(question)
    if parts is None:
        raise ValueError(f"{question!r} is no question of the built-in families")
    page = PAGES[family](parts)
    steps: list[Step] = []
    skipped = 0
    for line in thinking_lines(completion):
        check = page.read(line)
        if check is None:
            skipped += 1
        else:
            steps.append(Step(line, check, page.answer()))
    return Reading(tuple(steps), page.right, skipped)


def family_of(question: str) -> str | None:
    """The family that a question belongs to by its form, or None."""
    return _recognise(question)[0] or None


def _recognise(question: str) -> tuple[str, re.Match[str] | None]:
    for family, form in FORMS.items():
        parts = form.fullmatch(question.strip())
        if parts:
            return family, parts
    return "", None


def thinking_lines(completion: str) -> Iterator[str]:
    """The lines of the thinking that are not empty."""
    thinking = completion.partition(THINK_END)[0].partition("**Final Answer**")[0]
    for line in thinking.replace("<think>", "").splitlines():
        if line.strip():
            yield line.strip()


class Page(Protocol):
    """What a text has written down so far about one question."""

    right: int

    def read(self, line: str) -> str | None:
        """Takes in a line: a verdict for a check, empty for other work, None for what makes no sense."""

    def answer(self) -> int | None:
        """The answer arrived at, if any."""


@dataclass(frozen=True)
class Sum:
    """A step as written: a name before it, two operands, and the result."""

    name: str
    expression: str
    left: int
    sign: str
    operand: int
    value: int

    @property
    def truth(self) -> int:
        """The right result, rounded down; a division by nothing gives -1, which is right nowhere."""
        if self.sign == "/" and not self.operand:
            return -1
        return OPERATIONS[self.sign](self.left, self.operand)


def parse(line: str) -> Sum | None:
    """A line of the form `17+25=42.`, `4x=41-5=36.` or `7x-3x=4x.`; None where it has another."""
    found = LINE.fullmatch(line)
    if not found:
        return None
    name, left, x1, sign, operand, x2, value, x3 = found.groups()
    if not x1 == x2 == x3 or (x1 and (name or sign != "-")):
        return None
    expression = f"{left}{x1}{sign}{operand}{x2}"
    return Sum(x1 + (name or ""), expression, int(left), sign, int(operand), int(value))


@dataclass
class Worked:
    """Stages worked out one after the other, each with its line; a repair takes away what stood behind."""

    stages: list[Sum] = field(default_factory=list)

    def check(self, line: str) -> str | None:
        """Takes in a check that computes a stage again.

        It is about the latest stage with this expression. `yes` must confirm the result that stands there
        and `not N` must replace it by another.
        """
        found = CHECK.fullmatch(line)
        equation = found and EQUATION.fullmatch(found[1])
        if not found or not equation:
            return None
        value, replaced = int(equation[2]), found[2] and int(found[2])
        for i in reversed(range(len(self.stages))):
            stage = self.stages[i]
            expected = value if replaced is None else replaced
            if stage.expression == equation[1] and stage.value == expected and value != replaced:
                verdict = judge(stage.value, value, stage.truth)
                if replaced is not None:
                    self.stages[i:] = [dataclasses.replace(stage, value=value)]
                return verdict
        return None


class ChainPage:
    """A chain: each line is the next operation, or a check of one before."""

    def __init__(self, found: re.Match[str]):
        self.operations = re.findall(r"([+-])(\d+)", found[2])
        self.right = int(found[1]) + sum(int(sign + operand) for sign, operand in self.operations)
        self.worked = Worked()

    def read(self, line: str) -> str | None:
        """See `Page`."""
        step = parse(line)
        if step is None:
            return self.worked.check(line)
        done = len(self.worked.stages)
        expected = self.operations[done : done + 1]
        if step.name or expected != [(step.sign, str(step.operand))]:
            return None
        self.worked.stages.append(step)
        return ""

    def answer(self) -> int | None:
        """The last result, once all operations are done."""
        stages = self.worked.stages
        return stages[-1].value if len(stages) == len(self.operations) else None


class EquationPage:
    """An equation: coefficient of x (if x is on both sides), product, solution; each may be written anew."""

    def __init__(self, found: re.Match[str]):
        a, b, c, d = (int(part or 0) for part in found.groups())
        self.a, self.b, self.c, self.d = a, b, c, d
        self.right = (d - b) // (a - c)
        self.worked = Worked()

    def read(self, line: str) -> str | None:
        """See `Page`."""
        step = parse(line)
        if step is not None:
            return self.take(step)
        verdict = self.worked.check(line)
        return self.put_in(line) if verdict is None else verdict

    def take(self, step: Sum) -> str | None:
        """Writes a step down in its stage; the stages behind it are void."""
        stage = self.stage(step)
        if stage is None or stage > len(self.worked.stages):
            return None
        self.worked.stages[stage:] = [step]
        return ""

    def stage(self, step: Sum) -> int | None:
        """The number of the stage that a step belongs to; None where it is a step of another problem."""
        both = int(self.c > 0)
        if both and step.expression == f"{self.a}x-{self.c}x":
            return 0
        if step.expression == f"{self.d}{-self.b:+d}" and step.name not in ("", "x"):
            return both
        return both + 1 if step.sign == "/" and step.name == "x" and step.operand else None

    def put_in(self, line: str) -> str | None:
        """Takes in a check that puts the solution into the equation; a rejected one takes all with it."""
        found, x = CHECK.fullmatch(line), self.answer()
        sides = found and PUT_IN.findall(found[1])
        expected = [(self.a, self.b), (self.c, self.d)][: 1 + (self.c > 0)]
        if not found or not sides or x is None:
            return None
        if ", ".join(f"{f}*{v}={p}, {q}{n}={s}" for f, v, p, q, n, s in sides) != found[1]:
            return None
        if [(int(f), int(n)) for f, _, _, _, n, _ in sides] != expected or {s[1] for s in sides} != {str(x)}:
            return None
        if found[2] is None:
            return REDUNDANT if x == self.right else MISSED
        self.worked.stages.clear()
        return HARMFUL if x == self.right else USEFUL

    def answer(self) -> int | None:
        """The solution, once the last stage is done."""
        stages = self.worked.stages
        return stages[-1].value if stages and stages[-1].sign == "/" else None


class SearchPage:
    """A search: the sums of the pairs tried; a pair is the answer from when its sum is the target."""

    def __init__(self, found: re.Match[str]):
        self.numbers, self.target = set(map(int, found[1].split(","))), int(found[2])
        pairs = itertools.combinations(sorted(self.numbers), 2)
        self.right = next(large for small, large in pairs if small + large == self.target)
        self.sums: dict[str, Worked] = {}
        self.hit = ""

    def read(self, line: str) -> str | None:
        """See `Page`."""
        step = parse(line)
        if step is None:
            return self.check(line)
        pair = {step.left, step.operand}
        if step.name or step.sign != "+" or len(pair) < 2 or not pair <= self.numbers:
            return None
        self.sums[step.expression] = Worked([step])
        self.believe(step)
        return ""

    def check(self, line: str) -> str | None:
        """Takes in a check that adds a pair up again."""
        for tried in self.sums.values():
            before, verdict = tried.stages[0], tried.check(line)
            if verdict is not None:
                if tried.stages[0] is not before:
                    self.believe(tried.stages[0])
                return verdict
        return None

    def believe(self, step: Sum) -> None:
        """Makes the pair of a step the hit if its new sum is the target, and no longer if it is not."""
        if step.value == self.target:
            self.hit = step.expression
        elif step.expression == self.hit:
            self.hit = ""

    def answer(self) -> int | None:
        """The larger number of the hit."""
        if not self.hit:
            return None
        step = self.sums[self.hit].stages[0]
        return max(step.left, step.operand)


FORMS = {"chains": chains.QUESTION, "equations": equations.QUESTION, "search": search.QUESTION}
PAGES: dict[str, Callable[[re.Match[str]], Page]] = {
    "chains": ChainPage,
    "equations": EquationPage,
    "search": SearchPage,
}
