r"""Hostile answers, each with the verdict that is right by construction, through a real `Grader`.

`python -m benchmarks.hostile` grades all of them and prints, on its last line, one JSON object:

- `answers`: how many there are, at least 2,000, the same for a seed;
- `hangs`: how many did not have their verdict within the deadline of their batch;
- `wrong`: how many verdicts are not the right one (the first few are printed above);
- `deadlines`: of the hostile ones, how many were given up at the deadline;
- `worker_peak_mb`: the largest resident memory of a worker, in MiB, read from `/proc` while it ran;
- `seconds`, `workers_used`, and `code_run`: whether one of the injected programs left its mark.

An answer is wrong where a reader could not take it for the reference answer, or where it passes the limits
that `reward.grading` states for a box (1000 characters, brackets 32 deep, no control characters).
"""

import argparse
import itertools
import json
import math
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from step_grpo.reward.grading import Grade, Grader

START_SECONDS = 20.0  # to replace a worker that was given up, on a machine that is busy
SAMPLING_SECONDS = 0.01
SHOWN = 20  # wrong verdicts printed


@dataclass(frozen=True)
class Hostile:
    """A completion made to mislead, stall or take over the grader, and whether it is right."""

    family: str
    completion: str
    answer: str
    correct: bool
    slow: bool = False  # may need more time than there is


Made = Iterator[tuple[str, str, bool]]
"""Completion (or content of its box, for a family of boxes), reference answer, and whether it is right."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Grades the corpus and prints its figures; returns the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="takes every so-manieth answer of each family")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds, of the answers made to be slow")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hostile_") as folder:
        marker = Path(folder) / "code_was_run"
        result = attack(corpus(args.seed, str(marker), args.every), args.workers, args.deadline)
        result["code_run"] = marker.exists()
    result["settings"] = vars(args)
    print(json.dumps(result))
    return result


# ---------------------------------------------------------------------- grading


def attack(hostile: Sequence[Hostile], workers: int, deadline: float) -> dict[str, Any]:
    """Grades hostile answers in batches as large as a rollout's share of them, and measures.

    Those that must be read get a deadline that a busy machine keeps; the slow ones get `deadline`.
    """
    start = time.perf_counter()
    memory, hangs, wrong, deadlines = WorkerMemory(), 0, 0, 0
    for slow, limit in ((False, 30.0), (True, deadline)):
        chosen = [one for one in hostile if one.slow == slow]
        with Grader(workers, deadline=limit, recycle_after=400) as grader, memory.watch(grader):
            for at in range(0, len(chosen), 64):
                batch = chosen[at : at + 64]
                grades = graded_in_time(grader, batch, (limit + START_SECONDS) * len(batch))
                if grades is None:
                    hangs += len(batch)
                    break  # the grader is stuck; so would be the next batch
                deadlines += sum(grade.error == "deadline" for grade in grades)
                for one, grade in zip(batch, grades, strict=True):
                    if not verdict_is_right(one, grade):
                        wrong += 1
                        if wrong <= SHOWN:
                            print(f"{one.family}: {one.completion[-160:]!r} for {one.answer[:80]!r}: {grade}")
    return {
        "answers": len(hostile),
        "hangs": hangs,
        "wrong": wrong,
        "deadlines": deadlines,
        "worker_peak_mb": memory.peak_mib,
        "workers_used": len(memory.seen),
        "seconds": time.perf_counter() - start,
    }


def verdict_is_right(one: Hostile, grade: Grade) -> bool:
    """Whether a grade is the right one; only an answer that was made to be slow may be given up."""
    return grade.correct == one.correct and (grade.error is None or one.slow)


def graded_in_time(grader: Grader, batch: Sequence[Hostile], seconds: float) -> list[Grade] | None:
    """The grades of a batch, or None where they do not come within so many seconds."""
    grades: list[Grade] = []

    def work() -> None:
        completions, answers = [one.completion for one in batch], [one.answer for one in batch]
        grades.extend(grader.grade_many(completions, answers))

    thread = threading.Thread(target=work, daemon=True)  # one that hangs must not keep the program
    thread.start()
    thread.join(seconds)
    return grades if len(grades) == len(batch) else None


class WorkerMemory:
    """Samples the workers of a grader while they run: those that are killed cannot be asked afterwards."""

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self.seen: set[int] = set()  # process ids
        self._watching = threading.Event()

    def watch(self, grader: Grader) -> "WorkerMemory":
        """Begins to sample the workers of a grader, as a context manager."""
        self._grader = grader
        return self

    def __enter__(self) -> None:
        self._watching.set()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._watching.clear()
        self._thread.join()

    def _sample(self) -> None:
        while self._watching.is_set():
            for process in list(self._grader._processes):
                self.seen.add(process._process.pid)
                self.peak_mib = max(self.peak_mib, resident_peak_mib(process._process.pid))
            time.sleep(SAMPLING_SECONDS)


def resident_peak_mib(pid: int) -> float:
    """The largest resident memory that a process has had, in MiB; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line[:6] == "VmHWM:"), 0.0)


# ---------------------------------------------------------------------- the corpus


def corpus(seed: int, marker: str, every: int = 1) -> list[Hostile]:
    """At least 2,000 hostile answers, all different; with `every`, a part of each family.

    Args:
        seed: of all that is drawn.
        marker: a file that the injected programs would make.
        every: takes the first of so many of each family.
    """
    made: list[Hostile] = []
    for families, in_box, slow in ((BOXES, True, False), (TEXTS, False, False), (SLOW, True, True)):
        for family, count in families:
            rng = random.Random(f"{seed} {family.__name__}")
            drawn = dict.fromkeys(itertools.islice(family(rng, marker), count))
            for text, answer, correct in itertools.islice(drawn, 0, None, every):
                completion = in_a_completion(text, rng) if in_box else text
                made.append(Hostile(family.__name__, completion, answer, correct, slow))
    return made


def in_a_completion(box: str, rng: random.Random) -> str:
    """A completion with a wrong box on the way and this one at its end."""
    thought = f"First I try {rng.randrange(100)}, so maybe \\boxed{{maybe}}. Wait, check.\n</think>\n\n"
    return f"{thought}The answer is \\boxed{{{box}}}{rng.choice(['', '.', chr(10), ' $', ' I hope.'])}"


def _number(rng: random.Random) -> int:
    return rng.choice([rng.randrange(10, 100), rng.randrange(1000, 10**6), rng.randrange(10**9, 10**15)])


def _near(number: int, rng: random.Random) -> int:
    """The number or, as often, a neighbour."""
    return number + rng.choice([0, 0, 1, -1, 10])


# ---- whole completions


def several_boxes(rng: random.Random, marker: str) -> Made:
    """The last box counts, whatever was boxed before it."""
    while True:
        numbers = [_number(rng) for _ in range(rng.randrange(2, 60))]
        text = " or ".join(f"\\boxed{{{number}}}" for number in numbers)
        right = rng.random() < 0.5
        yield text, str(numbers[-1] if right else numbers[0]), right or numbers[0] == numbers[-1]


def unclosed_boxes(rng: random.Random, marker: str) -> Made:
    """An open box is none; what was closed before it counts."""
    while True:
        number, open_boxes = _number(rng), "\\boxed{" * rng.choice([1, 2, 50, 3000])
        yield f"\\boxed{{{number}}} {open_boxes}{number + 1}", str(number), True
        yield f"\\boxed{{{number + 1}}} {open_boxes}{number}", str(number), False
        yield f"{open_boxes}{number}", str(number), False
        yield f"\\boxed{{{number}\\}}", str(number), False


def nested_boxes(rng: random.Random, marker: str) -> Made:
    r"""Of `\boxed{\boxed{...}}` the inner one counts."""
    while True:
        number, depth = _number(rng), rng.choice([1, 2, 5, 100, 5000])
        said = _near(number, rng)
        yield "\\boxed{" * depth + str(said) + "}" * depth, str(number), said == number
        yield "\\boxed{" * depth + f"{said} \\boxed{{{number}}}" + "}" * depth, str(number), True


def megabytes(rng: random.Random, marker: str) -> Made:
    """A long text around a box changes nothing; a long box is never right, but for dollar signs around."""
    fillers = ["{", "}", "\\", "\\boxed", "$", "9", " ", "\\{", "\\frac{1}{", "\x00", "é", "Wait, ", "\n"]
    while True:
        number, filler = _number(rng), rng.choice(fillers)
        said, long = _near(number, rng), filler * (10**6 // len(filler))
        # A backslash in front of a box would escape it.
        before = "" if filler in ("\\", "\\boxed") else long
        yield f"{before} \\boxed{{{said}}}", str(number), said == number
        yield f"\\boxed{{{said}}} {long}", str(number), said == number
        if filler not in (" ", "\n", "{", "}", "\\", "\\boxed", "\\frac{1}{"):
            yield f"\\boxed{{{long}{number}}}", str(number), filler == "$"


def huge_integers(rng: random.Random, marker: str) -> Made:
    """Integers of 100,000 digits are compared digit by digit."""
    while True:
        digits = str(rng.randrange(1, 10)) + "".join(rng.choices("0123456789", k=rng.choice([1000, 10**5])))
        other = digits[:-1] + str((int(digits[-1]) + 1) % 10)
        yield f"\\boxed{{{digits}}}", digits, True
        yield f"\\boxed{{000{digits}}}", digits, True
        yield f"\\boxed{{{other}}}", digits, False
        yield f"\\boxed{{-{digits}}}", digits, False
        yield f"\\boxed{{{digits}}}", str(rng.randrange(10**6)), False


def deep_braces(rng: random.Random, marker: str) -> Made:
    """Braces around a number are nothing; other brackets are never read below a depth."""
    while True:
        number, depth = _number(rng), rng.choice([1, 2, 4, 8, 16, 40, 400, 100_000])
        said = _near(number, rng)
        yield f"\\boxed{{{'{' * depth}{said}{'}' * depth}}}", str(number), said == number
        yield f"\\boxed{{{'(' * 40}{number}{')' * 40}}}", str(number), False


# ---- boxes with a value


def scripts(rng: random.Random, marker: str) -> Made:
    """Decimal digits of any script stand for their value."""
    zeros = "０٠۰०০੦૦୦௦౦೦൦๐໐༠၀០᠐𝟎𝟘𝟢𝟬𝟶"
    while True:
        number, zero = _number(rng), ord(rng.choice(zeros))
        said = _near(number, rng)
        yield "".join(chr(zero + int(digit)) for digit in str(said)), str(number), said == number


def minus_signs(rng: random.Random, marker: str) -> Made:
    """Unicode's minus signs are minus signs."""
    while True:
        number, minus = _number(rng), rng.choice("−－﹣")
        yield f"{minus}{number}", str(-number), True
        yield f"{minus}{number}", str(number), False
        yield f"{minus}{number + 1}", str(-number), False


def invisible(rng: random.Random, marker: str) -> Made:
    """Characters without width are nothing."""
    while True:
        number, mark = str(_number(rng)), rng.choice("\u200b\u200c\u200d\u2060\ufeff")
        at = rng.randrange(len(number) + 1)
        yield number[:at] + mark + number[at:], number, True
        yield number[:at] + mark + "1" + number[at:], number, False


def raised_digits(rng: random.Random, marker: str) -> Made:
    """A raised or lowered digit, a circled number, or a fraction in one character, is no digit."""
    while True:
        number = str(_number(rng))
        last = int(number[-1])
        yield number[:-1] + "⁰¹²³⁴⁵⁶⁷⁸⁹"[last], number, False
        yield number[:-1] + "₀₁₂₃₄₅₆₇₈₉"[last], number, False
        yield number[:-1] + "⓪①②③④⑤⑥⑦⑧⑨"[last], number, False
        yield number[:-1] + "½", number[:-1] + "12", False


def look_alike_letters(rng: random.Random, marker: str) -> Made:
    """A letter of another alphabet is another letter."""
    twins = {"x": "хχⅹ", "a": "аαɑ", "c": "сϲ", "p": "рρ", "y": "уγ", "e": "еℯ", "n": "ոո", "k": "кκ"}
    while True:
        letter = rng.choice(list(twins))
        twin, number = rng.choice(twins[letter]), rng.randrange(2, 10**6)
        form = rng.choice(["{0}^2+{1}", "{1}{0}", "\\frac{{{0}}}{{{1}}}", "{0}+{1}", "\\text{{b{0}t}}"])
        yield form.format(twin, number), form.format(letter, number), False


def reversed_text(rng: random.Random, marker: str) -> Made:
    """Marks that turn the direction of text do not turn the number."""
    while True:
        number = str(_number(rng))
        if number != number[::-1]:
            mark = rng.choice("\u202e\u2067\u200f")
            yield mark + number[::-1], number, False


def control_characters(rng: random.Random, marker: str) -> Made:
    """No answer holds a control character."""
    controls = [chr(i) for i in (*range(9), 11, 12, *range(14, 32), *range(127, 160))]
    while True:
        number, control = str(_number(rng)), rng.choice(controls)
        at = rng.randrange(len(number) + 1)
        yield number[:at] + control * rng.choice([1, 1, 500]) + number[at:], number, False
        yield f"\x1b[{rng.randrange(100)}m{number}\x1b[0m", number, False


def powers(rng: random.Random, marker: str) -> Made:
    """Large powers, written out or not."""
    while True:
        base, exponent = rng.randrange(2, 30), rng.randrange(5, 40)
        yield f"{base}^{{{exponent}}}", str(base**exponent), True
        yield f"{base}^{{{exponent}}}", str(base**exponent + rng.choice([-1, 1, 10])), False
        yield f"{base}^{{{exponent}}} + {rng.randrange(1, 9)}", str(base**exponent), False


def factorials(rng: random.Random, marker: str) -> Made:
    """Factorials, written out or not."""
    while True:
        n = rng.randrange(4, 26)
        yield f"{n}!", str(math.factorial(n)), True
        yield f"{n}!", str(math.factorial(n) + rng.choice([-1, 1])), False
        yield f"({n}! + {n})", str(math.factorial(n)), False


def deep_fractions(rng: random.Random, marker: str) -> Made:
    """Continued fractions."""
    while True:
        terms = [rng.randrange(1, 10) for _ in range(rng.randrange(2, 7))]
        value, text = Fraction(terms[-1]), str(terms[-1])
        for term in reversed(terms[:-1]):
            value, text = term + 1 / value, f"{term}+\\frac{{1}}{{{text}}}"
        right = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        wrong = f"\\frac{{{value.numerator + 1}}}{{{value.denominator}}}"
        yield text, right, True
        yield text, wrong, False
        deep = rng.randrange(33, 90)
        yield "\\frac{1}{" * deep + "2" + "}" * deep, str(_number(rng)), False


def roots(rng: random.Random, marker: str) -> Made:
    """Roots in roots."""
    while True:
        root, depth = rng.randrange(2, 9), rng.randrange(1, 4)
        inside = str(root ** (2**depth))
        yield "\\sqrt{" * depth + inside + "}" * depth, str(root), True
        yield "\\sqrt{" * depth + inside + "}" * depth, str(root + 1), False
        yield "\\sqrt{" * 80 + inside + "}" * 80, str(root), False


def polynomials(rng: random.Random, marker: str) -> Made:
    """A power of a sum, written out."""
    while True:
        n, a = rng.randrange(2, 6), rng.randrange(1, 9)
        terms = [math.comb(n, k) * a ** (n - k) for k in range(n + 1)]
        at = rng.randrange(n + 1)
        other = [c + (k == at) for k, c in enumerate(terms)]
        answer = f"(x+{a})^{n}"
        for coefficients, right in ((terms, True), (other, False)):
            yield "+".join(f"{c}x^{{{k}}}" for k, c in enumerate(coefficients)), answer, right


def spaced_out(rng: random.Random, marker: str) -> Made:
    """Blanks around a number are nothing, and so are leading zeros."""
    while True:
        number = _number(rng)
        said, blanks = _near(number, rng), " " * rng.choice([1, 50, 10**5])
        yield f"{blanks}{said}{blanks}", str(number), said == number
        yield f"\n\t {'0' * rng.randrange(400)}{said}\r\n", str(number), said == number


# ---- boxes that are never right


def not_numbers(rng: random.Random, marker: str) -> Made:
    """Infinities and what is not a number equal no number."""
    texts = ["NaN", "nan", "-NaN", "inf", "-inf", "\\infty", "-\\infty", "oo", "zoo", "\\text{NaN}"]
    texts += ["\\frac{0}{0}", "\\frac{1}{0}", "\\infty-\\infty", "0\\cdot\\infty", "\\frac{\\infty}{\\infty}"]
    texts += ["1e400", "-1e400", "1e999999999", "\\tan(\\frac{\\pi}{2})", "\\log(0)", "undefined", "None"]
    while True:
        yield rng.choice(texts), str(rng.choice([0, 1, -1, _number(rng)])), False


def hedges(rng: random.Random, marker: str) -> Made:
    """More than one answer, or what the answer is not, or a claim that is false."""
    forms = ["{1} or {0}", "{0} or {1}", "{1}, {0}", "{0}, {1}", "\\{{{0}, {1}\\}}", "[0, {1}]", "({0}, {1})"]
    forms += ["\\neq {0}", "\\ne {0}", "x \\neq {0}", "> {0}", "< {0}", "\\geq {0}", "\\le {0}", "≠ {0}"]
    forms += ["\\not= {0}", "{0} \\pm 1", "\\pm {0}", "{1} = {0}", "{0} = {1}", "\\text{{not }} {0}"]
    forms += ["\\neg {0}", "{0} \\text{{ or }} {1}", "{0} \\lor {1}", "{0}; {1}", "{0} \\cup {1}", "{0} {1}"]
    forms += [
        "\\text{{any number}}",
        "x",
        "n",
        "\\mathbb{{R}}",
        "\\mathbb{{Z}}",
        "...",
        "?",
        "answer",
        "{0}{0}",
    ]
    forms += [
        "\\gt {0}",
        "\\lt {0}",
        "\\geqslant {0}",
        "x > {0}",
        "x \\ge {0}",
        "{0} < x",
        "{0}?{1}",
        "{0}|{1}",
    ]
    while True:
        number = _number(rng)
        yield rng.choice(forms).format(number, number + rng.randrange(1, 9)), str(number), False


def python_injections(rng: random.Random, marker: str) -> Made:
    """Programs in Python, of which none may run."""
    calls = [
        f"__import__('os').system('touch {marker}')",
        f"__import__('pathlib').Path('{marker}').touch()",
        f"open('{marker}','w').close()",
        f"exec(\"open('{marker}','w')\")",
        f'eval(\'open("{marker}","w")\')',
        f"().__class__.__base__.__subclasses__()[104].load_module('os').system('touch {marker}')",
        f"Symbol('x').__class__.__init__.__globals__['os'].system('touch {marker}')",
        f"sympy.sympify(\"__import__('os').system('touch {marker}')\")",
        f"parse_expr(\"__import__('os').system('touch {marker}')\")",
        f"lambdify([], \"__import__('os').system('touch {marker}')\")()",
        f"(lambda: __import__('subprocess').run(['touch','{marker}']))()",
        f"[c for c in ().__class__.__mro__][-1].__subclasses__() or open('{marker}','w')",
        f"breakpoint() or open('{marker}','w')",
        f"`touch {marker}`",
        f"$(touch {marker})",
        f"; touch {marker} #",
        f"1; import os; os.system('touch {marker}')",
    ]
    forms = ["{0}", "{1}+{0}", "{0}+{1}", "\\text{{{0}}}", "\\operatorname{{{0}}}(1)", "{1} and {0}"]
    forms += ["\\mathrm{{{0}}}", "({0},{1})", "\\frac{{{0}}}{{{1}}}", "{1}^{{{0}}}", "x = {0}", "answer: {0}"]
    forms += ["1/1 {0}", "(1+1) {0}", "{1}.__class__ {0}"]
    while True:
        number = _number(rng)
        yield rng.choice(forms).format(rng.choice(calls), number), str(number), False


def latex_injections(rng: random.Random, marker: str) -> Made:
    """Commands of TeX that read, write, run or define."""
    commands = [
        "\\input{/etc/passwd}",
        "\\include{/etc/passwd}",
        f"\\write18{{touch {marker}}}",
        f"\\immediate\\write18{{touch {marker}}}",
        f'\\input|"touch {marker}"',
        f"\\openout1={marker}",
        "\\def\\x{\\x\\x}\\x",
        "\\newcommand{\\x}{1}\\x",
        "\\renewcommand{\\frac}[2]{#1}",
        "\\let\\frac\\sqrt",
        "\\catcode`\\{=12",
        "\\loop\\iftrue\\repeat",
        "\\csname end\\endcsname",
        "\\usepackage{shellesc}",
        "\\directlua{os.execute('true')}",
        "\\special{psfile=/etc/passwd}",
        "\\href{javascript:alert(1)}{1}",
        "\\verb|1|",
        "\\expandafter\\x",
    ]
    while True:
        number, command = _number(rng), rng.choice(commands)
        yield (
            rng.choice([f"{command}{number}", f"{number}{command}", f"{number} {command}"]),
            str(number),
            False,
        )


def protocol_injections(rng: random.Random, marker: str) -> Made:
    """Texts that look like messages between the grader and its workers."""
    while True:
        number = _number(rng)
        message = rng.choice(['{"correct": true, "memory": false}', '{"ready": true}', '{"fatal": "no"}'])
        request = json.dumps({"guess": str(number), "answer": str(number)})
        yield f"{number + 1}\n{message}\n", str(number), False
        yield f'{number + 1}"}}\n{request}\n', str(number), False
        yield f"{request}\r\n{message}", str(number), False


def regex_bombs(rng: random.Random, marker: str) -> Made:
    """Texts that make patterns with nested repetitions go back and forth."""
    pieces = [
        "a",
        "answer ",
        "final answer is ",
        "$",
        "$ ",
        "1,",
        "1 ",
        "5%",
        "\\boxed ",
        "\\text ",
        "=",
        "- ",
    ]
    pieces += ["((", "))", "[", "\\[", "\\(", "^", "_", "&", "\\\\", "|", "\\frac", "\\sqrt", ", and ", "or "]
    pieces += [
        "\\left(",
        "\\right)",
        ".",
        "1.",
        "1/",
        "\\,",
        "~",
        "#",
        "@",
        "'",
        '"',
        "\\",
        "<",
        "\u0301",
        "🧮",
    ]
    while True:
        first, second = rng.choice(pieces), rng.choice(["", "", rng.choice(pieces)])
        unit = first + second
        repeated = unit * (rng.choice([20, 100, 900]) // len(unit) + 1)
        # An odd backslash at the end would escape the brace that closes the box.
        yield f"{repeated}{rng.choice(['!', ' x', ' .'])}", "7919", False


# ---- boxes that may need more time or memory than there is


def towers(rng: random.Random, marker: str) -> Made:
    """Powers of powers, factorials of factorials, and other numbers that no memory holds."""
    forms = [
        "{0}^{{{1}^{{{2}^{{{3}}}}}}}",
        "{0}^{1}^{2}^{3}",
        "(({0}!)!)!",
        "{0}!!!",
        "{0}{0}{0}!",
        "10^{{10^{{{1}0}}}}",
    ]
    forms += ["{0}**{1}**{2}**{3}", "\\binom{{10^{{9}}}}{{{0} \\cdot 10^{{8}}}}", "{0}^{{{1}00000}} \\mod 7"]
    forms += ["\\log_{{{0}}}(3^{{10^{{9}}}})", "\\sin(10^{{10^{{{0}0}}}})", "(x+{0})^{{100000}}"]
    forms += ["\\sum_{{n=1}}^{{10^9}} \\frac{{{0}}}{{n^2+n^{{1/3}}}}", "\\prod_{{n={0}}}^{{1000000}} n"]
    forms += [
        "\\int_0^{0} e^{{x^{{x^{{x}}}}}} \\sin(x^x) dx",
        "(x+y+z)^{{{0}00}}",
        "\\lfloor e^{{10^{{1{0}}}}} \\rfloor",
    ]
    while True:
        for form in forms:
            yield form.format(*(rng.randrange(5, 10) for _ in range(4))), str(_number(rng)), False


Family = Callable[[random.Random, str], Made]
BOXES: tuple[tuple[Family, int], ...] = (
    (scripts, 120),
    (minus_signs, 60),
    (invisible, 80),
    (raised_digits, 80),
    (look_alike_letters, 80),
    (reversed_text, 50),
    (control_characters, 140),
    (powers, 90),
    (factorials, 60),
    (deep_fractions, 90),
    (roots, 60),
    (polynomials, 40),
    (spaced_out, 60),
    (not_numbers, 90),
    (hedges, 260),
    (python_injections, 260),
    (latex_injections, 140),
    (protocol_injections, 60),
)
"""Families of boxes that must be read, and how many of each are drawn."""

TEXTS: tuple[tuple[Family, int], ...] = (
    (several_boxes, 60),
    (unclosed_boxes, 60),
    (nested_boxes, 50),
    (megabytes, 60),
    (huge_integers, 50),
    (deep_braces, 60),
)
"""Families of whole completions."""

SLOW: tuple[tuple[Family, int], ...] = ((towers, 68), (regex_bombs, 220))
"""Families of boxes that are given up at a deadline."""


if __name__ == "__main__":
    main()
