"""Answers made to stall, crash or take over the grader: each costs at most its deadline, and nothing else."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hostile import attack, corpus
from step_grpo.reward import _grading_worker as worker
from step_grpo.reward.grading import Grade, Grader

DEADLINE = 0.5
SLACK = 1.0

NEVER_PARSED = {  # wrong without asking math-verify, or without a closed box
    "megabyte of open braces": "{" * 10**6,
    "megabyte of open boxes": "\\boxed{" * 150_000,
    "megabyte of braces in a box": "\\boxed{" + "{}" * 500_000 + "}",
    "megabyte of nested braces": "\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
    "megabyte of backslashes": "\\" * 10**6 + "boxed{1}",
    "megabyte of digits": "\\boxed{" + "9" * 10**6 + "}",
    "megabyte of digit groups": "\\boxed{1" + ",999" * 250_000 + "}",
    "nearly an integer": "\\boxed{1" + ",999" * 250_000 + ",99}",
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 300 + "2" + "}" * 300 + "}",
    "nested roots": "\\boxed{" + "\\sqrt{" * 140 + "2" + "}" * 140 + "}",
    "nested powers": "\\boxed{" + "e^{" * 300 + "x" + "}" * 300 + "}",
    "nested parentheses": "\\boxed{" + "(" * 450 + "1" + ")" * 450 + "}",
    "open parentheses": "\\boxed{" + "(" * 900 + "}",
    "nested text": "\\boxed{" + "\\text{a" * 150 + "}" * 150 + "}",
    "empty box": "\\boxed{}",
    "blanks": "\\boxed{" + " " * 10**6 + "}",
    "dollars": "\\boxed{" + "$" * 10**6 + "}",
}
ASKED = {
    "power tower": "9^{9^{9^{9}}}",
    "python power tower": "9**9**9**9",
    "unbraced power tower": "9^9^9^9",
    "100,000-digit power": "10^{100000}",
    "another 100,000-digit power": "2^{332192}",
    "enormous power": "10^{10^{10}}",
    "power of a long integer": "7^{" + "9" * 900 + "}",
    "factorial tower": "((10!)!)!",
    "unbraced factorial tower": "10!!!",
    "fifty factorials": "5" + "!" * 50,
    "long factorial": "170000!",
    "enormous binomial": "\\binom{10^{9}}{5 \\cdot 10^{8}}",
    "enormous floor": "\\lfloor e^{10^{12}} \\rfloor",
    "enormous sine": "\\sin(10^{10^{10}})",
    "enormous logarithm": "\\log_{2}(3^{10^{9}})",
    "enormous remainder": "3^{10^{9}} \\mod 7",
    "enormous divisor": "\\gcd(10^{10^9}, 6)",
    "enormous exponent": "1e1000000000",
    "long sum": "\\sum_{n=1}^{10^9} \\frac{1}{n^2 + n^{1/3}}",
    "long product": "\\prod_{n=1}^{1000000} n",
    "hard integral": "\\int_0^1 e^{x^{x^{x}}} \\sin(x^x) dx",
    "hard limit": "\\lim_{x \\to 0} \\frac{\\sin(\\tan(\\sin(x^x)))}{x^{x^x}}",
    "hard equation": "x^{17} + \\sin(x)^{x} + e^x = \\tan(x^5)",
    "large expansion": "(x+y+z)^{500}",
    "larger expansion": "(x+1)^{100000}",
    "many symbols": "+".join(f"x_{{{i}}}" for i in range(130)),
    "bars": "|" * 900,
    "minus signs": "-" * 900 + "5",
    "chain of equations": "x=" * 400 + "2",
    "chain of inequalities": "1<" * 400 + "2",
    "unbraced powers": "2^" * 400 + "2",
    "percent signs": "5%" * 400,
    "spaced digits": "1 " * 400,
    "large set": "\\{" + ",".join(map(str, range(250))) + "\\}",
    "power of a matrix": "\\begin{pmatrix}" + "1&" * 300 + "1\\end{pmatrix}^{1000}",
    "line breaks": "\\\\" * 400,
    "answer words": "answer " * 140,
    "null byte": "1\x00",
    "only null bytes": "\x00" * 500,
    "lone surrogate": "1\ud800",
    "right-to-left and emoji": "\u202e١٢٣ 🧮" * 50,
    "unknown command": "\\input{/etc/passwd}",
    "endless macro": "\\def\\x{\\x\\x}\\x",
    "not a number": "\\frac{0}{0}",
    "infinity": "\\infty - \\infty",
}


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, deadline=DEADLINE) as grader:
        yield grader


@pytest.mark.parametrize("completion", NEVER_PARSED.values(), ids=NEVER_PARSED)
def test_what_no_answer_can_look_like_is_wrong_and_no_error(completion: str, grader: Grader) -> None:
    start = time.process_time()
    [grade] = grader.grade_many([completion], ["1"])
    assert time.process_time() - start < DEADLINE + SLACK
    assert not grade.correct
    assert grade.error is None


@pytest.mark.parametrize("content", ASKED.values(), ids=ASKED)
def test_hostile_answer_costs_its_deadline_at_most(content: str, grader: Grader) -> None:
    # Also starts a worker where the last answer has cost one, outside the time measured below.
    while grader.grade_many(["\\boxed{2x}"], ["x+x"]) != [Grade(True, True)]:
        pass
    start = time.perf_counter()
    [grade] = grader.grade_many([f"\\boxed{{{content}}}"], ["1"])
    assert time.perf_counter() - start < DEADLINE + SLACK
    assert not grade.correct
    assert grade.formatted
    assert grade.error in (None, "deadline", "memory")


def test_sample_of_the_hostile_corpus_gets_the_verdicts_it_was_made_for(tmp_path: Path) -> None:
    """`python -m benchmarks.hostile` grades all of it."""
    marker = tmp_path / "code_was_run"
    hostile = corpus(seed=0, marker=str(marker), every=24)
    assert len(hostile) > 90 and sum(one.correct for one in hostile) > 15
    result = attack(hostile, workers=2, deadline=0.3)
    assert (result["hangs"], result["wrong"]) == (0, 0)
    assert 50 < result["worker_peak_mb"] <= 1024  # its bound
    assert not marker.exists()


def test_corpus_is_the_same_for_a_seed_and_large_enough() -> None:
    made = corpus(seed=3, marker="marker")
    assert len(made) >= 2000
    assert made == corpus(seed=3, marker="marker") != corpus(seed=4, marker="marker")


def test_no_answer_runs_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    calls = [
        f"__import__('os').system('touch {canary}')",
        f"__import__('pathlib').Path('{canary}').touch()",
        f"open('{canary}','w')",
        f"exec(\"open('{canary}','w')\")",
        f"().__class__.__base__.__subclasses__()[0]; open('{canary}','w')",
        f"\\text{{__import__('os').system('touch {canary}')}}",
        f"1 + __import__('os').system('touch {canary}')",
        f"lambda: __import__('os').system('touch {canary}')",
        f"\\operatorname{{__import__('os').system('touch {canary}')}}(1)",
        f"\\write18{{touch {canary}}}",
        f'{{"guess": "1", "answer": "1"}}\n$(touch {canary})`touch {canary}`',
    ]
    with Grader(workers=2, deadline=30) as grader:
        grades = grader.grade_many([f"\\boxed{{{call}}}" for call in calls], ["1"] * len(calls))
        assert grades == [Grade(False, True)] * len(calls)
        # As reference answers they get no further.
        grader.grade_many(["\\boxed{x+1}"] * len(calls), calls)
        assert grader.failures == 0
    assert not canary.exists()


ESCAPES = [
    "os.system('true')",
    "subprocess.run(['true'])",
    "os.fork()",
    "os.execv('/bin/true', ['true'])",
    "os.kill(os.getppid(), 0)",
    "os.remove('file')",
    "os.mkdir('folder')",
    "open('file', 'w')",
    "open('file', 'a')",
    "os.open('file', os.O_CREAT | os.O_WRONLY)",
    "socket.create_connection(('127.0.0.1', 9))",
    "ctypes.CDLL(None)",
]


def test_confined_process_cannot_start_programs_write_files_or_reach_the_network(tmp_path: Path) -> None:
    program = f"""
import ctypes, os, socket, subprocess, sys
sys.path.insert(0, {str(Path(worker.__file__).parent)!r})
import _grading_worker
_grading_worker.confine(512)
for escape in {ESCAPES!r}:
    try:
        eval(escape)
    except PermissionError as error:
        assert "grading must not" in str(error), error
    else:
        print("not refused:", escape)
try:
    bytearray(2**30)
except MemoryError:
    print("memory is bounded")
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert run.stdout == "memory is bounded\n"
    assert list(tmp_path.iterdir()) == []


def test_memory_error_is_reported_and_other_exceptions_are_wrong_answers() -> None:
    def judge(answer: str, guess: str) -> bool:
        if guess != "fine":
            raise {"memory": MemoryError, "depth": RecursionError}[guess]
        return True

    requests = [{"answer": "1", "guess": guess} for guess in ("memory", "depth", "fine")]
    lines, replies = b"".join(json.dumps(request).encode() + b"\n" for request in requests), io.BytesIO()
    worker.serve(judge, io.BytesIO(lines), replies, deadline=60, memory_mib=10**9)
    assert [json.loads(line) for line in replies.getvalue().splitlines()] == [
        {"correct": False, "memory": True},
        {"correct": False, "memory": False},
        {"correct": True, "memory": False},
    ]
