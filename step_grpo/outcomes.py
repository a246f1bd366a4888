"""What a model did on a set of questions: from scored completions, or read from a `completions.jsonl`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from step_grpo import statistics
from step_grpo.errors import UserError
from step_grpo.reward.boxes import last_box
from step_grpo.reward.grading import answer_key
from step_grpo.scoring import Scored
from step_grpo.statistics import Outcomes


def outcomes_of(scored: Sequence[Scored], eos_ids: Sequence[int]) -> Outcomes:
    """The arrays of a run's completions, which are ordered by question and sample.

    Args:
        scored: equally many completions of each question.
        eos_ids: what ends a completion; one that does not end so was cut off by the length limit.
    """
    groups = [list(group) for _, group in groupby(scored, key=lambda s: s.completion.prompt)]
    ends = set(eos_ids)
    return Outcomes(
        correct=np.array([[s.grade.correct for s in group] for group in groups]),
        tokens=np.array([[len(s.completion.tokens) for s in group] for group in groups]),
        steps=np.array([[s.steps for s in group] for group in groups]),
        truncated=np.array([[int(s.completion.tokens[-1]) not in ends for s in group] for group in groups]),
        votes=np.array([votes_of(group) for group in groups]),
    )


def votes_of(group: Sequence[Scored]) -> list[int]:
    """The number of each completion's answer among those of its question; -1 for none.

    All right answers are one, since all equal the reference; wrong ones are told apart by `answer_key`.
    """
    numbers: dict[str, int] = {}
    votes = []
    for s in group:
        box = last_box(s.text)
        if s.grade.correct:
            votes.append(0)
        elif box is None or not box.strip():
            votes.append(-1)
        else:
            key = answer_key(box, s.prompt.question.grading)
            votes.append(numbers.setdefault(key, 1 + len(numbers)))
    return votes


# ---------------------------------------------------------------------- runs that are on disk

Question = tuple[str, str]
"""The id of a question, and its text."""


@dataclass(frozen=True)
class Recorded:
    """A run's outcomes and the questions that they are of, in the same order."""

    questions: tuple[Question, ...]
    outcomes: Outcomes


def recorded(scored: Sequence[Scored], outcomes: Outcomes) -> Recorded:
    """The outcomes of a run with the questions of its completions, in the order of `scored`."""
    asked = [next(group).prompt.question for _, group in groupby(scored, key=lambda s: s.completion.prompt)]
    return Recorded(tuple((question.id, question.question) for question in asked), outcomes)


def read_recorded(path: Path) -> Recorded:
    """The run that wrote a `completions.jsonl`.

    Raises:
        UserError: no such file, not one of ours, or questions with different numbers of completions.
    """
    try:
        # Not `splitlines`, which also splits at line ends of Unicode that a completion may hold.
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
        groups: dict[Question, list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["id"], row["prompt"]), []).append(row)
        figures = {
            name: [[row[name] for row in group] for group in groups.values()]
            for name in ("correct", "tokens", "steps", "truncated")
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a completions.jsonl of step_grpo.evaluate ({type(error).__name__}: "
            f"{error}); name one, or the folder that an evaluation wrote"
        ) from None
    counts = {len(group) for group in groups.values()}
    if len(counts) != 1:
        raise UserError(f"{path} has questions with {sorted(counts)} completions; it must be one number")
    arrays = {name: np.array(values) for name, values in figures.items()}
    unknown = np.zeros_like(arrays["tokens"])  # votes are not compared between runs
    return Recorded(tuple(groups), Outcomes(votes=unknown, **arrays))


def find_completions(against: Path, benchmark: str) -> Path:
    """Where an evaluation left the completions of a benchmark.

    Args:
        against: the folder of the evaluation, a file of its results there, or the completions themselves.
        benchmark: name of it; empty for `config.eval.data`.
    """
    if against.suffix == ".jsonl":
        return against
    folder = against.parent if against.suffix == ".json" else against
    return folder / benchmark / "completions.jsonl"


def on_common_questions(base: Recorded, other: Recorded) -> tuple[Outcomes, Outcomes]:
    """The outcomes of both runs on the questions that both were asked, in the same order.

    Raises:
        UserError: there are none.
    """
    places = {question: place for place, question in enumerate(base.questions)}
    common = [question for question in other.questions if question in places]
    if not common:
        raise UserError("no question was asked in both evaluations; compare the same benchmarks")
    mine = {question: place for place, question in enumerate(other.questions)}
    return (
        _rows(base.outcomes, [places[question] for question in common]),
        _rows(other.outcomes, [mine[question] for question in common]),
    )


def _rows(outcomes: Outcomes, places: Sequence[int]) -> Outcomes:
    return Outcomes(**{field.name: getattr(outcomes, field.name)[places] for field in fields(Outcomes)})


def comparison(base: Outcomes, other: Outcomes) -> dict[str, Any]:
    """`statistics.compare` as plain numbers, and how many questions it rests on."""
    found = statistics.compare(base, other)
    return {"questions": len(base.correct), **{name: vars(found[name]) for name in found}}
