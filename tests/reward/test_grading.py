import itertools
import json
import os
import random
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from benchmarks.grading import answer_pairs
from step_grpo.errors import UserError
from step_grpo.reward import grading_process
from step_grpo.reward.grading import MAX_CHARACTERS, MAX_DEPTH, Grade, Grader, exact_verdict, grade
from step_grpo.reward.numbers import plain_number, value_of_answer

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"
"""A box that math-verify would evaluate for ever."""


def box(content: str) -> str:
    return f"Some thinking, a first \\boxed{{guess}}.\n</think>\n\nThe answer is \\boxed{{{content}}}."


def math_verify_says(answer: str, guess: str) -> bool:
    gold, target = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (answer, guess))
    return verify(gold, target, timeout_seconds=None)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    # Roomy, so that a busy machine does not make an ordinary answer late.
    with Grader(deadline=30) as grader:
        yield grader


@pytest.fixture(scope="module")
def reference_answers() -> list[str]:
    folder = os.environ.get("STEP_GRPO_TEST_DATA")
    if not folder:
        pytest.skip("STEP_GRPO_TEST_DATA is not set: it names the folder with benchmarks/*.jsonl")
    files = sorted(Path(folder, "benchmarks").glob("*.jsonl"))
    assert files
    return [json.loads(line)["answer"] for file in files for line in file.read_text("utf-8").splitlines()]


PAIRS = [  # (reference answer, content of the box, equal)
    ("72", "72", True),
    ("72", "72.0", True),
    ("72", "\\$72", True),
    ("72", "72 \\text{ dollars}", True),
    ("72", "\\frac{144}{2}", True),
    ("72", "x = 72", True),
    ("72", "71", False),
    ("72", "7.2", False),
    ("1234", "1{,}234", True),
    ("1234", "1,\\!234", True),
    ("\\frac{3}{4}", "0.75", True),
    ("\\frac{3}{4}", "3/4", True),
    ("\\frac{3}{4}", "\\dfrac34", True),
    ("\\frac{3}{4}", "75\\%", True),
    ("\\frac{3}{4}", "\\frac{4}{3}", False),
    ("50\\%", "50", True),
    ("$x^2$", "x \\cdot x", True),
    ("$x^2$", "x^3", False),
    ("(3, \\frac{\\pi}{2})", "\\left( 3, \\pi/2 \\right)", True),
    ("(3, \\frac{\\pi}{2})", "(\\frac{\\pi}{2}, 3)", False),
    ("11\\sqrt2", "\\sqrt{242}", True),
    ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}", True),
    ("6 - 5i", "-5i + 6", True),
    ("(3,4]", "[3,4]", False),
    ("90^\\circ", "90", True),
    ("\\text{Evelyn}", "Evelyn", True),
    ("\\text{Evelyn}", "\\text{Angela}", False),
    ("$\\sin^2 x + \\cos^2 x$", "1", True),
    ("72", "", False),
    ("72", "\\text{I do not know}", False),
]


def test_ordinary_answers_are_graded_as_a_reader_would(grader: Grader) -> None:
    grades = grader.grade_many([box(guess) for _, guess, _ in PAIRS], [answer for answer, _, _ in PAIRS])
    assert grades == [Grade(equal, True) for _, _, equal in PAIRS]


def test_every_reference_answer_is_equal_to_itself(grader: Grader, reference_answers: list[str]) -> None:
    grades = grader.grade_many([box(answer) for answer in reference_answers], reference_answers)
    assert grades == [Grade(True, True)] * len(reference_answers)
    # math-verify rejects none of them either, so that equal strings are no exception to it.
    hard = sorted({answer for answer in reference_answers if plain_number(answer.strip("$ ")) is None})
    sample = random.Random(0).sample(hard, 60)
    assert all(math_verify_says(answer, answer) for answer in sample)
    # Not only because the strings are identical.
    grades = grader.grade_many([box(f"\\! {answer}") for answer in sample], sample)
    assert grades == [Grade(True, True)] * len(sample)


def test_2000_verdicts_equal_math_verify_called_directly(reference_answers: list[str]) -> None:
    pairs = answer_pairs(reference_answers, 1350, seed=1)
    hard = [answer for answer in reference_answers if plain_number(answer.strip("$ ")) is None]
    pairs += answer_pairs(hard, 180, seed=2)
    numbers = [
        f"{s}{n}" for s in ("", "-") for n in ("0", "3", "0.75", "3/4", "\\frac34", "75\\%", "0.750001")
    ]
    numbers += ["0.333333", "\\frac{1}{3}", ".3333333", "1,000", "1000.0", "33.3333\\%", "1e3", "10^3"]
    pairs += itertools.product(numbers, numbers)
    pairs += [(guess, answer) for answer, guess, _ in PAIRS]
    assert len(set(pairs)) >= 2000
    with Grader(deadline=60) as grader:
        grades = grader.grade_many([box(guess) for guess, _ in pairs], [answer for _, answer in pairs])
    said = {pair: math_verify_says(pair[1], pair[0]) for pair in dict.fromkeys(pairs)}
    assert [pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct != said[pair]] == []
    assert not any(grade.error for grade in grades)
    assert 0.3 * len(pairs) < sum(grade.correct for grade in grades) < 0.7 * len(pairs)


decimals = st.tuples(
    st.sampled_from(["", "-", "+"]), st.integers(0, 99999), st.integers(0, 999), st.integers(1, 3)
).map(lambda parts: f"{parts[0]}{parts[1]}.{parts[2]:0{parts[3]}d}")
fractions = st.tuples(
    st.sampled_from(["{0}/{1}", "\\frac{{{0}}}{{{1}}}", "-\\dfrac{{{0}}}{{{1}}}", "\\frac{{-{0}}}{{{1}}}"]),
    st.integers(0, 999),
    st.integers(1, 999),
).map(lambda parts: parts[0].format(*parts[1:]))
numbers = st.one_of(decimals, fractions, st.integers(-9999, 9999).map(str))


@settings(max_examples=40)
@given(numbers, numbers)
@example("1/3", "0.333333")
@example("1/3", "0.3333")
@example("0.10", "\\frac{1}{10}")
@example("-0.0", "0")
@example("+0.5", "2/4")
@example("\\frac12", "\\frac{1}2")
@example("1,234.5", "1234.5")
@example("5/0", "5")
@example("0.999999", "1")
@example("0.9999999", "1")
def test_fast_path_equals_slow_path_on_decimals_and_fractions(guess: str, answer: str) -> None:
    fast = exact_verdict(guess, answer)
    assert fast is None or fast is math_verify_says(answer, guess)


def test_fast_path_equals_slow_path_whatever_letter_names_the_number() -> None:
    assert all(exact_verdict(f"{letter} = 5", "5") is True for letter in string.ascii_letters)
    assert all(math_verify_says("5", f"{letter} = 5") for letter in string.ascii_letters)


@settings(max_examples=60)
@given(
    st.sampled_from(["{}", "x={}", "N = {}", "\\displaystyle {}", "\\displaystyle ${}$", "$r= {}$"]),
    numbers,
    st.sampled_from(["", " \\text{km}", "\\text{ units}", " \\text{million}", "\\text{ e}", "\\text{x}"]),
    numbers,
)
@example("x={}", "1,000", "", "1000")
@example("x = {}", "1/3", "", "0.333333")
@example("{}", "5", " \\text{ percent}", "5")
@example("{}", "5", " \\text{ and }", "5")
@example("{}", "5", " \\text{or so}", "5")
@example("{}", "5", " \\text{km}^2", "5")
@example("y = {}", "5", " \\text{ km}", "5")
@example("y = x = {}", "5", "", "5")
def test_fast_path_equals_slow_path_on_numbers_with_a_name_or_a_unit(
    name: str, number: str, unit: str, answer: str
) -> None:
    for guess in {name.format(number + unit), name.format(answer + unit)}:
        fast = exact_verdict(guess, answer)
        assert fast is None or fast is math_verify_says(answer, guess)


terms = st.one_of(
    st.integers(0, 3000).map(str),
    st.tuples(st.sampled_from(["\\frac", "\\dfrac"]), st.integers(0, 99), st.integers(1, 9)).map(
        lambda t: f"{t[0]}{{{t[1]}}}{{{t[2]}}}"
    ),
)


@settings(max_examples=40)
@given(
    st.sampled_from(["", "-", "x = "]),
    st.lists(terms, min_size=2, max_size=4),
    st.lists(st.sampled_from(["+", " + ", "-", " - ", "- "]), min_size=3, max_size=3),
    st.integers(0, 1),
)
@example("", ["5", "\\frac{1}{0}"], ["+"], 0)
@example("", ["10", "12"], ["-"], 1)
@example("", ["123456789012", "1"], ["+"], 0)
def test_fast_path_equals_slow_path_on_sums(name: str, parts: list[str], signs: list[str], off: int) -> None:
    guess = name + parts[0] + "".join(sign + part for sign, part in zip(signs, parts[1:], strict=False))
    value = value_of_answer(guess)
    if value is None:
        assert "{0}" in guess or sum(map(str.isdecimal, guess)) > 12
        return
    answer = str(value + off)
    fast = exact_verdict(guess, answer)
    assert fast is (off == 0) is math_verify_says(answer, guess)


@given(numbers)
def test_words_are_no_number(answer: str) -> None:
    for words in ("no answer", " five ", "percent", "e", "pi", "True", "and"):
        assert exact_verdict(f"\\text{{{words}}}", answer) is False
        assert not math_verify_says(answer, f"\\text{{{words}}}")


@pytest.mark.parametrize(
    ("guess", "answer", "verdict"),
    [
        ("( 3 ,4 )", "(3, 4)", True),
        ("\\displaystyle  1+2 \\sqrt{3}", "1 + 2\\sqrt{3}", True),
        ("\\frac{1}{4} \\pi, \\frac{3}{4} \\pi", "\\frac{1}{4}\\pi,\\frac{3}{4}\\pi", True),
        ("1, 234", "1,234", None),
        ("(1, 234)", "(1,234)", None),
        ("2 \\pi x", "2 \\pix", None),
        ("m_{\\max}=n-1", "m_{\\max }=n-1", None),  # of which math-verify thinks that they differ
        ("1 2", "12", None),
        ("a\\ +b", "a\\+b", None),
        ("x = 5", "5", True),
        ("x = 6 \\text{ km}", "5", False),
        ("x = 1,000", "1000", None),
        ("5 \\text{ percent}", "5", None),
    ],
)
def test_what_differs_in_nothing_but_its_dress_is_known_at_once(
    guess: str, answer: str, verdict: bool | None
) -> None:
    assert exact_verdict(guess, answer) is verdict
    if verdict is not None:
        assert math_verify_says(answer, guess) is verdict


@settings(max_examples=40)
@given(numbers)
def test_fast_path_knows_its_equals(text: str) -> None:
    value = plain_number(text)
    assert value is not None
    spelled = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert exact_verdict(text, spelled) is True
    assert math_verify_says(spelled, text)


integers = st.integers(-(10**12), 10**12)
spelled = st.tuples(integers, st.sampled_from(["{}", "{:,}", "${}$", " {} ", "+{}", "00{}"])).map(
    lambda pair: pair[1].format(pair[0]) if pair[0] >= 0 else pair[1].lstrip("+0").format(pair[0])
)


@given(st.tuples(spelled, spelled) | integers.flatmap(lambda n: st.just((f"{n:,}", f"${n}$"))))
@example(("-0", "0"))
@example(("-5", "5"))
@example(("-1,234", "$-1234$"))
@example(("+5", "5"))
@example(("007", "7"))
@example(("1,234", "1234"))
def test_fast_path_equals_slow_path_on_integers(pair: tuple[str, str]) -> None:
    guess, answer = pair
    assert exact_verdict(guess, answer) is math_verify_says(answer, guess)


@pytest.mark.parametrize(
    "text", ["12,34", "0,123", "1,2345", "1e2", "1 2", "٣", "5%", "--5", "1,234,", "12_3"]
)
def test_what_is_no_plain_number_is_left_to_math_verify(text: str) -> None:
    assert exact_verdict(text, "123") is None


@pytest.mark.parametrize(
    ("content", "correct"),
    [
        ("\uff17\uff12", True),
        ("\u0667\u0662", True),
        ("7\u200b2", True),
        ("7\u00b2", False),
        ("7\x002", False),
        ("{{{72}}}", True),
        ("\\neq 72", False),
        ("< 72", False),
        ("71 = 72", False),
        ("72 = 72", True),
        ("36 \\cdot 2 = 72", True),
        ("\\left(72\\right)", True),
    ],
)
def test_other_digits_are_read_and_denials_and_false_equations_are_wrong(
    content: str, correct: bool, grader: Grader
) -> None:
    assert grader.grade_many([box(content)], ["72"]) == [Grade(correct, True)]


def test_a_bound_is_right_where_the_answer_is_one(grader: Grader) -> None:
    assert grader.grade_many([box("\\geq 3"), box("\\ge 3")], ["\\geq 3"] * 2) == [Grade(True, True)] * 2


def test_integers_of_any_length_are_compared_exactly() -> None:
    digits = "7" * 100_000
    assert exact_verdict(digits, "000" + digits) is True
    assert exact_verdict(digits, digits[:-1] + "8") is False


def test_exact_answers_start_no_process() -> None:
    with Grader() as grader:
        grades = grader.grade_many([box("7"), box("1,000"), box("\\pi"), "none"], ["7", "999", "\\pi", "7"])
        assert [grade.correct for grade in grades] == [True, False, True, False]
        assert grader._processes == []


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("the answer is 7", Grade(False, False)),
        ("\\boxed{7", Grade(False, False)),
        ("\\boxed{}", Grade(False, True)),
        ("\\boxed{7}", Grade(True, True)),
        ("\\boxed{7} or \\boxed{8}", Grade(False, True)),
        ("\\boxed{8} or \\boxed{7}", Grade(True, True)),
        ("\\boxed{7} or \\boxed{8", Grade(True, True)),
    ],
)
def test_only_the_last_closed_box_counts(completion: str, expected: Grade) -> None:
    assert grade(completion, "7") == expected


def test_an_empty_box_is_never_right() -> None:
    assert grade("\\boxed{ }", "") == Grade(False, True)


def test_boxes_too_long_or_too_deep_are_wrong_without_a_process() -> None:
    deep = "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)
    for content in ("1+" * MAX_CHARACTERS + "1", deep, "(" * 900):
        assert exact_verdict(content, "1") is False
        assert exact_verdict(content, content) is True


def test_order_is_kept_and_equal_pairs_get_equal_grades(grader: Grader) -> None:
    numbers = [random.Random(2).randrange(20) for _ in range(200)]
    grades = grader.grade_many([box(f"x+{number}") for number in numbers], ["7+x"] * 200)
    assert [grade.correct for grade in grades] == [number == 7 for number in numbers]


def test_several_threads_can_share_a_grader(grader: Grader) -> None:
    results: dict[int, list[Grade]] = {}

    def work(number: int) -> None:
        completions = [box(f"x+{n}") for n in range(20)]
        results[number] = grader.grade_many(completions, [f"{number}+x"] * 20)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [Grade(n == number, True) for n in range(20)] for number in range(4)}


def test_an_answer_past_its_deadline_is_an_error_and_the_others_are_graded() -> None:
    right = [box(f"x+{n}") for n in range(5)]
    completions = right + [ENDLESS] * 3 + right
    answers = [f"{n}+x" for n in range(5)]
    answers = answers + ["5"] * 3 + answers
    with Grader(workers=1, deadline=1.5) as grader:
        grades = grader.grade_many(completions, answers)
        assert (
            grades == [Grade(True, True)] * 5 + [Grade(False, True, "deadline")] * 3 + [Grade(True, True)] * 5
        )
        assert grader.failures == 3
        assert grader.grade_many([box("2x")], ["x+x"]) == [Grade(True, True)]
        assert grader.failures == 3


def test_pairs_behind_one_that_never_ends_are_graded_by_another_worker() -> None:
    """A worker has its next pairs ahead; only the one that it is working on may be lost."""
    waiting = [(f"{n}x + y", f"y + {n} \\cdot x") for n in range(2, 12)]
    pairs = [*waiting[:5], (ENDLESS[7:-1], "5"), *waiting[5:]]
    with Grader(workers=1, deadline=1.5) as grader:
        grades = grader.grade_many([box(guess) for guess, _ in pairs], [answer for _, answer in pairs])
    assert grades == [Grade(True, True)] * 5 + [Grade(False, True, "deadline")] + [Grade(True, True)] * 5


def test_a_batch_loses_nothing_where_a_worker_is_killed_from_outside() -> None:
    with Grader(workers=2, deadline=30) as grader:
        grader.grade_many([box("2x"), box("4x")], ["x+x", "x+3x"])
        victim = next(process for process in grader._processes if process.ready)  # one may still be starting

        def kill_while_busy() -> None:
            while not victim.pairs:
                time.sleep(0.001)
            os.kill(victim._process.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_while_busy)
        killer.start()
        slow = [box(f"\\sum_{{n=1}}^{{{count}}} n^2") for count in range(3000, 3012)]
        grades = grader.grade_many(slow, [f"{n * (n + 1) * (2 * n + 1)}/6" for n in range(3000, 3012)])
        killer.join()
        assert victim not in grader._processes
        assert grades == [Grade(True, True)] * 12
        assert grader.failures == 0


STAND_IN = f"""
import os, sys, time
sys.path.insert(0, {str(Path(grading_process.__file__).parent)!r})
import _grading_worker

def judge(answer, guess):
    if "9" in guess:
        os.abort()
    if "8" in guess:
        time.sleep(30)
    return guess == answer

_grading_worker.load_judge = lambda: judge
_grading_worker.main()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that a 9 in a box kills, and that an 8 keeps from answering."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(grading_process, "_PROGRAM", tmp_path / "stand_in.py")


def test_an_answer_that_kills_two_workers_is_given_up_and_costs_no_other(stand_in: None) -> None:
    pairs = [(f"x+{a}{b}y", f"{a}{b}y+x") for a in range(4) for b in (0, 9, 1)]
    with Grader(workers=1, deadline=30) as grader:
        grades = grader.grade_many([box(guess) for guess, _ in pairs], [answer for _, answer in pairs])
        killers = ["9" in guess for guess, _ in pairs]
        assert [grade.error for grade in grades] == [
            "worker died (exit status -6)" if killer else None for killer in killers
        ]
        assert grader.failures == 4


def test_an_answer_whose_worker_was_late_is_not_tried_again(stand_in: None) -> None:
    """Neither where its parent ends it, nor where its own alarm does while the parent is busy."""
    begun = time.monotonic()
    with Grader(workers=1, deadline=0.5) as grader:
        assert grader.grade_many([box("x+8")], ["1"]) == [Grade(False, True, "deadline")]
    assert time.monotonic() - begun < 30
    process = grading_process.GradingProcess(0.2, 512)
    while not process.ready:
        process.receive()
    process.send(("x+8", "1"))
    process._process.wait(timeout=30)
    with pytest.raises(grading_process.WorkerDied, match=r"^deadline$") as death:
        process.receive()
    assert not death.value.by_itself
    process.kill()


def test_a_worker_killed_between_batches_costs_nothing() -> None:
    with Grader(workers=1, deadline=30) as grader:
        grader.grade_many([box("2x")], ["x+x"])
        victim = grader._processes[0]._process
        os.kill(victim.pid, signal.SIGKILL)
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        assert grader.grade_many([box("4x")], ["x+3x"]) == [Grade(True, True)]
        assert grader.failures == 0


def test_exhausted_memory_is_an_error_and_not_a_wrong_answer() -> None:
    with Grader(workers=1, deadline=60, memory_mib=256) as grader:
        completions, answers = [box("(x+1)^{100000}"), box("2x")], ["(x+2)^{100000}", "x+x"]
        assert grader.grade_many(completions, answers) == [Grade(False, True, "memory"), Grade(True, True)]


def test_workers_are_replaced_after_a_number_of_answers() -> None:
    with Grader(workers=1, deadline=30, recycle_after=2) as grader:
        assert all(grade.correct for grade in grader.grade_many([box("2x")], ["x+x"]))
        first = grader._processes[0]
        grades = grader.grade_many([box(f"{n}+x") for n in range(4)], [f"x+{n}" for n in range(4)])
        assert all(grade.correct for grade in grades)
        assert first not in grader._processes


def test_closing_ends_the_workers_and_the_grader_can_start_again() -> None:
    with Grader(workers=1, deadline=30) as grader:
        grader.grade_many([box("2x")], ["x+x"])
        process = grader._processes[0]._process
        grader.close()
        assert process.poll() is not None
        assert grader.grade_many([box("2x")], ["x+x"]) == [Grade(True, True)]


def test_workers_that_cannot_start_are_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "broken.py"
    program.write_text('import sys\nsys.stdout.write(\'{"fatal": "no module named math_verify"}\\n\')\n')
    monkeypatch.setattr(grading_process, "_PROGRAM", program)
    with Grader() as grader, pytest.raises(RuntimeError, match="do not start: no module named math_verify"):
        grader.grade_many([box("2x")], ["x+x"])


@pytest.mark.parametrize(
    "setting", [{"workers": 0}, {"deadline": 0}, {"deadline": float("nan")}, {"memory_mib": 10}]
)
def test_impossible_limits_are_a_user_error_that_names_them(setting: dict) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        Grader(**setting)


def test_sequences_of_different_length_are_refused(grader: Grader) -> None:
    with pytest.raises(ValueError, match="2 completions, but 1 answers"):
        grader.grade_many(["a", "b"], ["1"])


PARENT = """
import sys, threading
from step_grpo.reward.grading import Grader
grader = Grader(workers=2, deadline=2)
grader.grade_many([r"\\boxed{2x}", r"\\boxed{4x}"], ["x+x", "x+3x"])
threading.Thread(target=grader.grade_many, args=([r"\\boxed{9^{9^{9^{9}}}}"], ["5"]), daemon=True).start()
while not any(process.pairs for process in grader._processes):
    pass
heavy = {"jax", "sympy", "math_verify", "latex2sympy2_extended"} & set(sys.modules)
print([process._process.pid for process in grader._processes], sorted(heavy), flush=True)
sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_idle_and_busy_end_when_their_parent_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin and parent.stdout
    workers, heavy = parent.stdout.readline().strip().rsplit(" ", 1)
    pids = json.loads(workers)
    assert heavy == "[]"
    assert len(pids) == 2
    assert all(is_running(pid) for pid in pids)
    parent.kill()
    parent.wait()
    give_up = time.monotonic() + 15
    while any(is_running(pid) for pid in pids) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)
    parent.stdin.close()
    parent.stdout.close()


MAIN = """
import sys
print("main", __name__, flush=True)
from step_grpo.reward.grading import grade
print(grade(r"\\boxed{2x}", "x+x").correct, flush=True)
"""


def test_workers_do_not_run_the_callers_main_module_again(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(MAIN)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-m", "program"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "main __main__\nTrue\n"
    assert run.stderr == ""
