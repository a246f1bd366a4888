r"""Answers graded a second, against math-verify called directly on the same ones, and whether they agree.

`python -m benchmarks.grading --data=FOLDER` takes the reference answers of the files `FOLDER/*.jsonl` (column
`answer`; by default those of `$STEP_GRPO_TEST_DATA/benchmarks`), each with what a model could have written:
the answer itself, the same in another spelling, and wrong neighbours, at the end of a completion of some
thousand characters. No pair comes twice, as those of a group often do. Ordinary answers are drawn as often as
they occur there, hard ones from those that are no plain number. The last line is one JSON object:

- `first_per_second`: of ordinary answers, by a `Grader` whose two workers have just started: math-verify's
  parser becomes faster by use, twice as fast within a thousand answers;
- `answers_per_second`: of as many others, graded behind those;
- `answers_per_cpu_second`: of the latter, by the processor time of workers and parent together; what a
  machine that does other things at the same time cannot change much;
- `hard_answers_per_second`, `hard_answers_per_cpu_second`: the same of hard ones;
- `speed_vs_math_verify`: ratio to math-verify in this process, on the ordinary answers;
- `verdicts_equal`: every verdict is that of math-verify.
"""

import argparse
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from step_grpo.reward.grading import Grader
from step_grpo.reward.grading_process import Pair
from step_grpo.reward.numbers import plain_number


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark and prints its figures; returns the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grading", description=__doc__)
    parser.add_argument("--data", default=str(Path(os.environ.get("STEP_GRPO_TEST_DATA", "."), "benchmarks")))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--hard-pairs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    answers = reference_answers(Path(args.data))
    first, ordinary = (answer_pairs(answers, args.pairs, seed=seed) for seed in (2, 0))
    hard = answer_pairs([a for a in answers if plain_number(a.strip("$ ")) is None], args.hard_pairs, seed=1)
    with Grader(args.workers, deadline=60.0, recycle_after=10**9) as grader:
        grader.grade_many(["\\boxed{x+1}"] * 64, [f"x+{n}" for n in range(64)])  # starts the workers
        first_verdicts, first_seconds = timed(lambda: graded(grader, first))
        idle = processor_seconds(grader)
        verdicts, seconds = timed(lambda: graded(grader, ordinary))
        between = processor_seconds(grader)
        hard_verdicts, hard_seconds = timed(lambda: graded(grader, hard))
        processor, hard_processor = between - idle, processor_seconds(grader) - between
    judge = direct_judge()
    others = [judge(*pair) for pair in hard + first]
    direct, direct_seconds = timed(lambda: [judge(*pair) for pair in ordinary])
    result = {
        "first_per_second": len(first) / first_seconds,
        "answers_per_second": len(ordinary) / seconds,
        "answers_per_cpu_second": len(ordinary) / processor,
        "hard_answers_per_second": len(hard) / hard_seconds,
        "hard_answers_per_cpu_second": len(hard) / hard_processor,
        "speed_vs_math_verify": direct_seconds / seconds,
        "verdicts_equal": verdicts + hard_verdicts + first_verdicts == direct + others,
        "right_share": sum(direct) / len(direct),
        "settings": vars(args),
    }
    print(json.dumps(result))
    return result


def timed(work: Callable[[], list[bool]]) -> tuple[list[bool], float]:
    """What the work returns, and how many seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def graded(grader: Grader, pairs: Sequence[Pair]) -> list[bool]:
    """The grader's verdicts."""
    boxes = [f"{THOUGHT}\n</think>\n\nThe answer is \\boxed{{{box}}}." for box, _ in pairs]
    return [grade.correct for grade in grader.grade_many(boxes, [answer for _, answer in pairs])]


def processor_seconds(grader: Grader) -> float:
    """What this process and the grader's workers have used so far; Linux only."""
    clock_ticks = [
        sum(map(int, Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        for worker in grader._processes
    ]
    return time.process_time() + sum(clock_ticks) / os.sysconf("SC_CLK_TCK")


def direct_judge() -> Callable[[str, str], bool]:
    """math-verify with a worker's settings, in this process: `judge(box, answer)`."""
    from math_verify import parse, verify  # noqa: PLC0415 (a second of import)

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def judge(box: str, answer: str) -> bool:
        gold, target = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (answer, box))
        return bool(verify(gold, target, timeout_seconds=None))

    judge("x+1", "\\frac{1}{2}")  # the first answer builds parser tables
    return judge


# ---------------------------------------------------------------------- pairs

THOUGHT = "So we try $x_1 = \\frac{3}{4}$ and get \\boxed{5}? Wait, check: {a} + {b} is 7. " * 40


def reference_answers(folder: Path) -> list[str]:
    """The column `answer` of all jsonl files of a folder, in the order of their names."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise SystemExit(f"--data={folder}: no jsonl files there")
    return [json.loads(line)["answer"] for file in files for line in file.read_text("utf-8").splitlines()]


def answer_pairs(answers: Sequence[str], count: int, seed: int) -> list[Pair]:
    """Boxes and reference answers: about two thirds rewritten, the others wrong neighbours.

    Args:
        answers: drawn as often as they are there.
        count: of the pairs, which all differ as long as there are enough.
        seed: of the draws.
    """
    rng = random.Random(seed)
    found: dict[Pair, None] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        answer = rng.choice(answers)
        change = rng.choice(SAME if rng.random() < 2 / 3 else OTHER)
        found[change(answer, rng, answers), answer] = None
    return list(found)


Change = Callable[[str, random.Random, Sequence[str]], str]


def _twice(answer: str) -> str:
    """A fraction for an integer."""
    return f"\\frac{{{2 * int(answer)}}}{{2}}" if answer.isdecimal() else answer


def _thousands(answer: str) -> str:
    return f"{int(answer):,}" if answer.isdecimal() else answer


def _next_digit(match: re.Match[str]) -> str:
    return str((int(match[0]) + 1) % 10)


SAME: tuple[Change, ...] = (
    lambda answer, rng, answers: answer,
    lambda answer, rng, answers: f"${answer.strip('$')}$",
    lambda answer, rng, answers: f" {answer} ",
    lambda answer, rng, answers: answer.replace("\\frac", "\\dfrac"),
    lambda answer, rng, answers: answer.replace("\\left", "").replace("\\right", ""),
    lambda answer, rng, answers: answer.replace(" ", ""),
    lambda answer, rng, answers: answer + ".0" if answer.isdecimal() else answer.replace("\\dfrac", "\\frac"),
    lambda answer, rng, answers: _twice(answer),
    lambda answer, rng, answers: _thousands(answer),
    lambda answer, rng, answers: f"x = {answer.strip('$')}",
    lambda answer, rng, answers: (
        answer + " \\text{ units}" if answer.isdecimal() else f"\\displaystyle {answer}"
    ),
)
"""Other spellings; most are equal to the answer, whatever that is."""

OTHER: tuple[Change, ...] = (
    lambda answer, rng, answers: re.sub(r"[0-9]", _next_digit, answer, count=1),
    lambda answer, rng, answers: re.sub(r"[0-9](?=[^0-9]*$)", _next_digit, answer),
    lambda answer, rng, answers: f"-{answer.strip('$')}",
    lambda answer, rng, answers: rng.choice(answers),
    lambda answer, rng, answers: f"{answer.strip('$')} + 1",
    lambda answer, rng, answers: str(rng.randrange(1000)),
    lambda answer, rng, answers: "\\text{no answer}",
)
"""Neighbours; most are wrong."""


if __name__ == "__main__":
    main()
