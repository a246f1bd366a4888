"""Evaluations beside each other."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from step_grpo import compare
from step_grpo.errors import UserError

QUESTIONS = 40


def write(folder: Path, correct: Mapping[int, Sequence[bool]], tokens: int) -> None:
    """What an evaluation leaves: completions of questions, all of one length."""
    folder.mkdir(parents=True)
    rows = [
        {"id": str(q), "prompt": f"{q}?", "correct": right, "tokens": tokens, "steps": 2, "truncated": False}
        for q, verdicts in correct.items()
        for right in verdicts
    ]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def evaluations(tmp_path):
    """Two seeds of two models; the second was asked half of the questions, and has half the tokens."""
    rng = np.random.default_rng(0)
    right: dict[tuple[str, int], np.ndarray] = {}
    for model, questions, tokens in (("long", range(QUESTIONS), 100), ("short", range(0, QUESTIONS, 2), 50)):
        for seed in (0, 1):
            verdicts = rng.random((QUESTIONS, 3)) < 0.7
            write(
                tmp_path / model / f"seed{seed}", {q: list(map(bool, verdicts[q])) for q in questions}, tokens
            )
            right[model, seed] = verdicts[::2]
    return tmp_path, right


def test_seeds_are_taken_together_on_the_questions_that_both_were_asked(evaluations, capsys):
    folder, right = evaluations
    compare.main(f"{folder}/long/seed*", f"{folder}/short/seed*")
    said = capsys.readouterr().out
    long, short = (100 * np.mean([right[model, seed] for seed in (0, 1)]) for model in ("long", "short"))
    row = next(line for line in said.splitlines() if line.startswith(f"| {folder}/short"))
    cells = [cell.strip() for cell in row.split("|")[2:]]
    assert float(cells[0].split()[0]) == pytest.approx(short, abs=0.051)
    assert cells[1].startswith("50.0 ")
    assert float(re.split(r"[* ]", cells[5])[0]) == pytest.approx(short - long, abs=0.051)
    assert cells[6] == "-50.0* (-50.0 to -50.0)"
    assert not math.isclose(long, short)


def test_seeds_are_matched_by_their_names(tmp_path, capsys):
    """Each seed is another set of questions here: matched in another order, they have none in common."""
    for seed in (0, 1, 2):
        verdicts = {q: [True] for q in range(10 * seed, 10 * seed + 10)}
        for model, name in (("a", f"seed{seed}"), ("b", f"run{seed}")):
            write(tmp_path / model / name, verdicts, 10)
    compare.main(f"{tmp_path}/a/*", f"{tmp_path}/b/*")
    assert capsys.readouterr().out.count("100.0 (") == 2


def test_benchmarks_have_folders_of_their_own(tmp_path, capsys):
    for model in ("a", "b"):
        write(tmp_path / model / "gsm8k", {1: [True], 2: [False]}, 10)
    compare.main(f"{tmp_path}/a", f"{tmp_path}/b", benchmark="gsm8k")
    assert "## gsm8k, 2 questions" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(evaluations):
    folder, _ = evaluations
    with pytest.raises(UserError, match=r"long/x\*: no such folder"):
        compare.main(f"{folder}/long/x*", f"{folder}/short/seed*")
    with pytest.raises(UserError, match=r"seed0 names 1 evaluations, and --base=.* 2"):
        compare.main(f"{folder}/long/seed*", f"{folder}/short/seed0")
    with pytest.raises(UserError, match=r"long/completions\.jsonl is not"):
        compare.main(f"{folder}/long", f"{folder}/short/seed0")
