"""Rewards and metrics of the user's own, named by import path in the config.

`config.reward.functions=("my_module:my_reward",)` adds terms to the reward that `config.reward.name` names;
`config.log.metrics=("my_module:my_metric",)` adds figures to each step. Both are given `Completions`:

    def my_reward(completions: Completions) -> np.ndarray: ...  # finite, [prompts, samples]
    def my_metric(completions: Completions) -> dict[str, float]: ...

A module is imported because the config of the command line names it, and for no other reason: the config that
a checkpoint holds is never looked at for this.
"""

import importlib
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike, NDArray

from step_grpo.data.sources import Question
from step_grpo.distributed import from_first
from step_grpo.errors import FunctionError, UserError
from step_grpo.scoring import Scored

REWARDS, METRICS = "config.reward.functions", "config.log.metrics"


@dataclass(frozen=True)
class Completions:
    r"""The graded completions of a step; arrays are `[prompts, samples]` and cannot be written to.

    Attributes:
        questions: the text of each prompt's question, `[prompts]`.
        answers: its reference answer, `[prompts]`.
        texts: what the model wrote, thinking and answer, special tokens left out, `[prompts][samples]`.
        reasons: why the thinking ended, one of `step_grpo.rollout.phases.REASONS`, `[prompts][samples]`.
        correct: whether the answer equals the reference, bool.
        formatted: whether there is a closed `\boxed{}`, if `config.reward.closed_thinking` is set one behind
            the closed thinking; bool.
        steps: semantic steps, at least 1, int.
        tokens: of the completion, forced ones and EOS included, int.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    reasons: tuple[tuple[str, ...], ...]
    correct: NDArray[np.bool_]
    formatted: NDArray[np.bool_]
    steps: NDArray[np.int64]
    tokens: NDArray[np.int64]

    def __post_init__(self):
        """Nobody may change what others are given too."""
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), np.ndarray):
                value.flags.writeable = False


Reward = Callable[[Completions], ArrayLike]
Metric = Callable[[Completions], Mapping[str, float]]


@dataclass(frozen=True)
class Functions:
    """The functions of a run by their import paths; what they return is checked."""

    rewards: Mapping[str, Reward]
    metrics: Mapping[str, Metric]

    def judge(self, scored: Sequence[Scored], reward: NDArray) -> tuple[NDArray, dict[str, float]]:
        """Adds the terms of the user's functions to the reward, and gives the figures of his metrics.

        They are called in the first process alone, so that all processes go on with the same numbers.

        Args:
            scored: the completions of the step, ordered by prompt and sample.
            reward: what they earn without the functions, `[prompts, samples]`.

        Returns:
            The reward; and figures: `reward/NAME`, the mean of each term, and `NAME/KEY` of each metric.

        Raises:
            FunctionError: in every process: a function fails or returns something else.
        """
        if not self.rewards and not self.metrics:
            return reward, {}
        try:
            found = from_first(lambda: self._ask(completions_of(scored, reward.shape)))
        except UserError as error:
            raise FunctionError(str(error)) from error
        terms = {path: np.array(term) for path, term in found["terms"].items()}
        means = {f"reward/{_name(path)}": float(term.mean()) for path, term in terms.items()}
        return sum(terms.values(), reward), means | found["figures"]

    def rehearse(self, questions: Sequence[Question], samples: int) -> None:
        """Calls every function on made-up completions of real questions: mistakes show before the first step.

        Of each question the first completion is right, the others are empty.

        Raises:
            UserError: as `judge`.
        """
        if self.rewards or self.metrics:
            from_first(lambda: self._ask(_made_up(questions, samples)))

    def _ask(self, completions: Completions) -> dict[str, Any]:
        """What JSON can hold of the answers of all functions."""
        terms = {path: _term(path, function, completions) for path, function in self.rewards.items()}
        figures: dict[str, float] = {}
        for path, function in self.metrics.items():
            figures |= _figures(path, function, completions)
        return {"terms": terms, "figures": figures}


def load(config: ConfigDict) -> Functions:
    """Imports the functions that the config of the command line names.

    Raises:
        UserError: naming the one that cannot be had, or two of the same name.
    """
    rewards = {path: _imported(path, REWARDS) for path in config.reward.functions}
    metrics = {path: _imported(path, METRICS) for path in config.log.metrics}
    for field, paths, taken in ((REWARDS, rewards, ()), (METRICS, metrics, ("reward",))):
        names = [*taken, *map(_name, paths)]
        if twice := [path for path in paths if names.count(_name(path)) > 1]:
            raise UserError(
                f"{field}: {twice[-1]} is not the only {_name(twice[-1])!r}, and figures go by that name; "
                "rename the function"
            )
    return Functions(rewards, metrics)


def _name(path: str) -> str:
    return path.rpartition(":")[2]


def _imported(path: str, field: str) -> Callable[[Completions], Any]:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{field}: importing {module} fails: {_told(error)}") from error
        raise UserError(
            f"{field}: there is no module {error.name!r}; start from the folder of its file, or name that "
            "folder in PYTHONPATH"
        ) from None
    except Exception as error:  # whatever the user's module does
        raise UserError(f"{field}: importing {module} fails: {_told(error)}") from error
    if not callable(function):
        what = "there is no function" if function is None else f"{type(function).__name__}, no function,"
        raise UserError(f"{field}: {what} {name!r} in {module}")
    return function


# ---------------------------------------------------------------------- what they are given


def completions_of(scored: Sequence[Scored], shape: tuple[int, ...]) -> Completions:
    """The completions of a step, which are ordered by prompt and sample, `shape` being [prompts, samples]."""
    prompts, samples = shape
    groups = [scored[row * samples : (row + 1) * samples] for row in range(prompts)]
    questions = [group[0].prompt.question for group in groups]
    return Completions(
        questions=tuple(q.question for q in questions),
        answers=tuple(q.answer for q in questions),
        texts=tuple(tuple(s.text for s in group) for group in groups),
        reasons=tuple(tuple(s.completion.reason for s in group) for group in groups),
        correct=np.array([[s.grade.correct for s in group] for group in groups]),
        formatted=np.array([[s.grade.formatted for s in group] for group in groups]),
        steps=np.array([[s.steps for s in group] for group in groups]),
        tokens=np.array([[len(s.completion.tokens) for s in group] for group in groups]),
    )


def _made_up(questions: Sequence[Question], samples: int) -> Completions:
    first = np.arange(samples) == 0
    right = np.tile(first, (len(questions), 1))
    return Completions(
        questions=tuple(q.question for q in questions),
        answers=tuple(q.answer for q in questions),
        texts=tuple((rf"\boxed{{{q.answer}}}", *[""] * (samples - 1)) for q in questions),
        reasons=tuple(("natural",) * samples for _ in questions),
        correct=right.copy(),
        formatted=right.copy(),
        steps=np.ones(right.shape, np.int64),
        tokens=np.ones(right.shape, np.int64),
    )


# ---------------------------------------------------------------------- what they return


def _call(field: str, path: str, function: Callable[[Completions], Any], completions: Completions) -> Any:
    try:
        return function(completions)
    except Exception as error:  # whatever the user's function does
        raise UserError(f"{field}: {path} fails: {_told(error)}") from error


def _term(path: str, function: Reward, completions: Completions) -> list[list[float]]:
    returned = _call(REWARDS, path, function, completions)
    try:
        term = np.asarray(returned, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{REWARDS}: {path} returns {type(returned).__name__}, not an array") from None
    wanted = completions.correct.shape
    if term.shape != wanted:
        raise UserError(
            f"{REWARDS}: {path} returns shape {term.shape}; it must be [prompts, samples], here {wanted}"
        )
    if not np.isfinite(term).all():
        row, column = np.argwhere(~np.isfinite(term))[0]
        raise UserError(
            f"{REWARDS}: {path} returns {term[row, column]} for completion {column} of the question "
            f"{completions.questions[row][:80]!r}; every value must be finite"
        )
    return term.tolist()


def _figures(path: str, function: Metric, completions: Completions) -> dict[str, float]:
    returned = _call(METRICS, path, function, completions)
    if not isinstance(returned, Mapping):
        raise UserError(f"{METRICS}: {path} returns {type(returned).__name__}, not a dict of floats")
    found = {}
    for key, value in returned.items():
        if not isinstance(key, str) or not re.fullmatch(r"[\w.-]+", key):
            raise UserError(f"{METRICS}: {path} returns the name {key!r}; use letters, digits and . _ -")
        try:
            found[f"{_name(path)}/{key}"] = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{METRICS}: {path} returns {value!r} for {key!r}, not a float") from None
    return found


def _told(error: BaseException) -> str:
    """An exception in a line, with the place in the user's file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
