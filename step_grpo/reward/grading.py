r"""Grading: is the last `\boxed{}` of a completion mathematically equal to the reference answer?

Two ways lead to a verdict. Plain numbers and equal strings are compared here, at once. Everything else is
sent to math-verify, inside worker processes that can be killed: a completion is untrusted text, and a few
characters of LaTeX can ask for more time and memory than there is. A grader that fails says so in
`Grade.error` and in `Grader.failures`; it never turns silently into a wrong answer. Letters, words and lists
are compared as text (`choices.py`).
"""

import atexit
import functools
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from multiprocessing.connection import wait
from typing import Self

from step_grpo.errors import UserError
from step_grpo.reward.boxes import last_box, without_outer_braces
from step_grpo.reward.choices import TEXT_GRADING, exact_key
from step_grpo.reward.grading_process import GradingProcess, Pair, Verdict, WorkerDied
from step_grpo.reward.numbers import INTEGER, plain_characters, plain_number, value_of_answer

MAX_CHARACTERS = 1000
MAX_DEPTH = 32
"""A box or a reference answer that is longer, or whose brackets nest deeper, is never parsed: such a
completion is wrong, unless the two are identical or both plain integers. The longest answer of GSM8K, MATH,
AIME and OlympiadBench has 204 characters."""

_FAILED_STARTS = 3
_SIZE = re.compile(r"\\(?:left|right)(?=[()\[\]])")
_DISPLAY_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_DISPLAY_STYLE = re.compile(r"\A\\displaystyle(?![a-zA-Z])[ \t\r\n]*+\$?")
# Blanks that change nothing, and commands with those behind them, where math-verify does not always overlook
# them. Others are between two letters or digits; behind a backslash, whose they are; and where `1, 234` would
# become a number of four digits.
_BLANKS = re.compile(
    r"(?P<command>\\[a-zA-Z]+[ \t\r\n]*)"
    r"|(?<![a-zA-Z0-9\\,])[ \t\r\n]+"
    r"|(?<!\\)[ \t\r\n]+(?![a-zA-Z0-9 \t\r\n])"
    r"|(?<=,)[ \t\r\n]+(?![0-9]{3})"
)
_WORDS = re.compile(r"\\text\{ *+[a-zA-Z][a-zA-Z ]*+\}")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# What says that the answer is not what follows. math-verify leaves it out: `\neq 5` is 5 to it.
_DENIAL = re.compile(
    r"[<>\u2260\u2264\u2265\u00ac]"
    r"|\\(?:not|neg|lnot|neq?|l[te]|g[te]|[lg]eq(?:q|slant)?|ll|gg|nless|ngtr)(?![a-zA-Z])"
)
_CLOSE = Fraction(1, 100_000)  # math-verify takes decimals for equal that agree in their sixth place


@dataclass(frozen=True)
class Grade:
    r"""What grading found out about one completion.

    Attributes:
        correct: The content of the last closed `\boxed{}` equals the reference answer.
        formatted: There is a closed `\boxed{}`; as scored with `closed_thinking`, behind the thinking.
        error: Why grading itself failed (deadline, memory, a worker that died); None where it did not. A
            grade with an error has `correct=False`, but means "not known".
    """

    correct: bool
    formatted: bool
    error: str | None = None


def grade(completion: str, answer: str) -> Grade:
    r"""Grades one completion with a `Grader` of default settings that the whole process shares.

    Args:
        completion: The whole completion; its last closed `\boxed{}` holds the answer.
        answer: The reference answer: `72`, `\frac{3}{4}`, `$x^2$`, `(3, \frac{\pi}{2})`, `\text{east}`, ...

    Returns:
        The grade, within the default deadline of 5 seconds and about one more.
    """
    return _shared_grader(os.getpid()).grade_many([completion], [answer])[0]


def exact_verdict(box: str, answer: str) -> bool | None:
    r"""Compares strings that are spelled alike and plain numbers; None where only math-verify can tell.

    Blanks and dollar signs around either side do not count. A plain integer may carry a sign, leading zeros
    and commas between thousands; its digits are compared as text, so its length does not matter. Other plain
    numbers are decimals and fractions of a few digits; in a box, also as `x = 5`, `5 \text{ km}` or `2 + 3`.
    math-verify rounds decimals, so those that are close and not equal are left to it. Words are no number.
    Wrong, where math-verify would overlook it, are boxes that begin with a relation such as `\neq` or `<`
    when the answer does not, and equations between integers that differ.
    """
    box, answer = box.strip(" \t\r\n$"), answer.strip(" \t\r\n$")
    if not box:
        return False
    if box == answer or spelled_alike(box) == spelled_alike(answer):
        return True
    left, right = INTEGER.fullmatch(box), INTEGER.fullmatch(answer)
    if left and right:
        return _canonical(left) == _canonical(right)
    if (number := plain_number(answer)) is not None and (said := _equals_number(box, number)) is not None:
        return said
    if _denies(box, answer) or _is_false_equation(box):
        return False
    return None if _readable(box) and _readable(answer) else False


def _equals_number(box: str, number: Fraction) -> bool | None:
    """Whether a box is a plain number of this value; None if it may be another expression for it."""
    if (guess := value_of_answer(_DISPLAY_STYLE.sub("", box))) is not None:
        distance = abs(guess - number)
        return distance == 0 if distance == 0 or distance > _CLOSE else None
    return False if _WORDS.fullmatch(box) else None


def spelled_alike(text: str) -> str:
    """A text without what LaTeX only shows differently: display style, growing brackets, blanks."""
    if len(text) > MAX_CHARACTERS:
        return text
    text = _DISPLAY_FRACTION.sub(r"\\frac", _DISPLAY_STYLE.sub("", text))
    return _BLANKS.sub(lambda found: found["command"] or "", _SIZE.sub("", text))


def answer_key(box: str, kind: str) -> str:
    """A text that is equal for boxes with plainly the same answer; for counting votes among completions.

    Args:
        box: The content of a box.
        kind: How it is graded, as for `Grader.grade_many`.
    """
    if kind != "math":
        return exact_key(box)
    text = _plain(box).strip(" \t\r\n$")
    number = plain_number(text)
    return "".join(spelled_alike(text).split()) if number is None else str(number)


def _plain(text: str) -> str:
    """A text as it is compared: digits and minus signs in ASCII, no braces around all of it."""
    return without_outer_braces(plain_characters(text).strip(" \t\r\n"))


def _denies(box: str, answer: str) -> bool:
    """Whether a box only tells where the answer is not, or within what bounds."""
    return _DENIAL.match(box) is not None and _DENIAL.match(answer) is None


def _is_false_equation(box: str) -> bool:
    """Whether a box is an equation between plain integers that differ; math-verify takes the last one."""
    if "=" not in box or len(box) > MAX_CHARACTERS:
        return False
    sides = [INTEGER.fullmatch(side.strip()) for side in box.split("=")]
    integers = {_canonical(side) for side in sides if side}
    return all(sides) and len(integers) > 1


def _readable(text: str) -> bool:
    """Whether a text is short and flat enough for a recursive parser, and has no control characters.

    Brackets need not match.
    """
    if len(text) > MAX_CHARACTERS or _CONTROL.search(text):
        return False
    steps = (1 if character in "([{" else -1 for character in text if character in "([{}])")
    return max(accumulate(steps), default=0) <= MAX_DEPTH


def _canonical(integer: re.Match[str]) -> tuple[bool, str]:
    """Returns an integer as (is it negative, its digits without separators and leading zeros)."""
    digits = integer["digits"].replace(",", "").lstrip("0")
    return integer["sign"] == "-" and digits != "", digits


class Grader:
    """Grades completions with worker processes that start when first needed and are replaced when they fail.

    Use it as a context manager, or call `close`. Its methods may be called from several threads; one batch
    is graded at a time. Workers end by themselves when the process that owns them ends, however it ends.

    Attributes:
        failures: How many grades carried an error so far.
    """

    def __init__(
        self, workers: int = 2, deadline: float = 5.0, memory_mib: int = 1024, recycle_after: int = 2000
    ) -> None:
        """Sets the limits; starts nothing.

        Args:
            workers: Number of worker processes, at least 1.
            deadline: Seconds that math-verify may take for one answer.
            memory_mib: Address space of one worker in MiB, its imports (about 70 MiB) included, at least 256.
            recycle_after: A worker is replaced after this many answers, for what sympy's caches hold.

        Raises:
            UserError: One of these numbers is too small.
        """
        for name, value, least in (
            ("workers", workers, 1),
            ("memory_mib", memory_mib, 256),
            ("recycle_after", recycle_after, 1),
        ):
            if value < least:
                raise UserError(f"grading: {name}={value}: must be at least {least}")
        if not 0 < deadline < float("inf"):
            raise UserError(f"grading: deadline={deadline}: must be a positive number of seconds")
        self.failures = 0
        self._deadline = deadline
        self._memory_mib = memory_mib
        self._size = workers
        self._recycle_after = recycle_after
        self._processes: list[GradingProcess] = []
        self._failed_starts = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. The grader can be used again: it starts new ones."""
        with self._lock:
            for process in list(self._processes):
                self._retire(process)

    def grade_many(
        self, completions: Sequence[str], answers: Sequence[str], kinds: Sequence[str] | None = None
    ) -> list[Grade]:
        """Grades completions against their reference answers, in order.

        Equal pairs of box and answer are graded once. The time is bounded by about `deadline * pairs /
        workers` and a start of a worker for each one that fails, twice that where workers die.

        Args:
            completions: Whole completions.
            answers: The reference answer of each.
            kinds: How each is graded: `math`, or a key of `choices.TEXT_GRADING`; None for all by `math`.

        Returns:
            One grade for each completion.

        Raises:
            ValueError: The two sequences differ in length.
            RuntimeError: No worker can be started, for instance because math-verify is not installed.
        """
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions, but {len(answers)} answers")
        boxes = [last_box(completion) for completion in completions]
        pairs = [(_plain(box or ""), _plain(answer)) for box, answer in zip(boxes, answers, strict=True)]
        kinds = ["math"] * len(pairs) if kinds is None else kinds
        asked = list(zip(pairs, kinds, strict=True))
        exact = {
            (pair, kind): exact_verdict(*pair) if kind == "math" else TEXT_GRADING[kind](*pair)
            for pair, kind in asked
        }
        open_pairs = [pair for (pair, _), equal in exact.items() if equal is None]
        with self._lock:
            verified = self._verify(open_pairs)
            grades = []
            for box, (pair, kind) in zip(boxes, asked, strict=True):
                equal = exact[pair, kind]
                correct, error = verified[pair] if equal is None else (equal, None)
                grades.append(Grade(correct, box is not None, error))
            self.failures += sum(grade.error is not None for grade in grades)
        return grades

    def _verify(self, pairs: Iterable[Pair]) -> dict[Pair, Verdict]:
        """Asks math-verify about every pair; one that takes too much, or kills two workers, gets an error."""
        waiting, verdicts = deque(pairs), dict[Pair, Verdict]()
        survived = set[Pair]()  # the first death of their worker, which may have had nothing to do with them
        while waiting or any(process.pairs for process in self._processes):
            self._hand_out(waiting)
            patience = max(0.0, min(process.due for process in self._processes) - time.monotonic())
            readable = wait([process.replies for process in self._processes], patience)
            for process in list(self._processes):
                verdicts.update(self._hear(process, process.replies in readable, waiting, survived))
        return verdicts

    def _hand_out(self, waiting: deque[Pair]) -> None:
        """Deals pairs to the workers that have room, and starts workers for what is left."""
        while waiting and (free := [process for process in self._processes if process.has_room]):
            process = min(free, key=lambda process: len(process.pairs))
            try:
                process.send(waiting[0])
                waiting.popleft()
            except OSError:
                if not process.pairs:  # it died while it had nothing to do
                    self._retire(process)
        starting = sum(not process.ready for process in self._processes)
        for _ in range(min(self._size - len(self._processes), len(waiting) - starting)):
            self._processes.append(GradingProcess(self._deadline, self._memory_mib))

    def _hear(
        self, process: GradingProcess, readable: bool, waiting: deque[Pair], survived: set[Pair]
    ) -> list[tuple[Pair, Verdict]]:
        """Takes a worker's replies, its end, or its overstepping of the time.

        The first pair of a worker that is given up is lost, and of one that died by itself if the pair is one
        of `survived`; others go back to `waiting`, as do all that are left with a worker that is replaced.
        """
        try:
            verdicts = process.receive() if readable else []
            if not readable and time.monotonic() >= process.due:
                raise WorkerDied("deadline" if process.ready else "it took too long to start")
        except WorkerDied as death:
            verdicts = []
            if process.pairs and death.by_itself and process.pairs[0] not in survived:
                survived.add(process.pairs[0])
            elif process.pairs:
                verdicts = [(process.pairs.popleft(), (False, str(death)))]
            waiting.extendleft(reversed(process.pairs))
            self._retire(process)
            if not process.ready:
                self._count_failed_start(str(death))
            return verdicts
        if process.ready:
            self._failed_starts = 0
        if process.spent or process.answers >= self._recycle_after:
            waiting.extendleft(reversed(process.pairs))
            self._retire(process)
        return verdicts

    def _count_failed_start(self, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS:
            self._failed_starts = 0
            raise RuntimeError(f"grading workers do not start: {reason}")

    def _retire(self, process: GradingProcess) -> None:
        self._processes.remove(process)
        process.kill()


@functools.cache
def _shared_grader(process_id: int) -> Grader:  # a fork must not talk into its parent's pipes
    grader = Grader()
    atexit.register(grader.close)
    return grader
