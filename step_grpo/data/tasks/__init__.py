"""The built-in families of problems, each with a corpus of thoughts that check themselves too often.

| family | question | out of distribution |
| --- | --- | --- |
| `chains` | `Compute 17+25-8+14.` | more operations |
| `equations` | `Solve 3x+17=62.` | x on both sides and a number taken away |
| `search` | `Which two of 12,35,27,8,41 add up to 62? Give the larger.` | more numbers |

A problem of the splits `train`, `validation` and `test` belongs to its split for ever, by a hash of its text;
those of `ood` are of a kind that the others never have.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from step_grpo.data.arithmetic import Habits, over_thinking
from step_grpo.data.tasks import chains, equations, search
from step_grpo.data.tasks.thoughts import OUT_OF_DISTRIBUTION, SPLITS, Problem
from step_grpo.errors import UserError

__all__ = ["FAMILIES", "SPLITS", "Family", "Problem", "draw", "families", "problems"]

IN_VAIN = 20_000  # draws without a new question, after which a split is taken to be used up


@dataclass(frozen=True)
class Family:
    """How one family makes problems and thinks about them.

    Attributes:
        draw: a random problem; of the split `ood` where the flag is set, else of any other.
        over_thinking: a completion about such a problem by somebody of these habits, from `<think>` to the
            last sentence.
        habits: of the corpus.
        phrases: texts that its questions repeat, for the tokenizer.
    """

    draw: Callable[[np.random.Generator, bool], Problem]
    over_thinking: Callable[[Any, np.random.Generator, Any], str]
    habits: Habits
    phrases: tuple[str, ...]


FAMILIES = {
    "chains": Family(chains.draw, over_thinking, Habits(), chains.PHRASES),
    "equations": Family(
        equations.draw, equations.over_thinking, equations.EquationHabits(), equations.PHRASES
    ),
    "search": Family(search.draw, search.over_thinking, search.SearchHabits(), search.PHRASES),
}


def families(names: str, where: str) -> tuple[Family, ...]:
    """The families of a comma-separated list.

    Raises:
        UserError: naming the field `where`, if the list is empty, repeats a name or has an unknown one.
    """
    listed = [name.strip() for name in names.split(",")]
    if len(set(listed)) < len(listed) or not set(listed) <= set(FAMILIES):
        known = ", ".join(FAMILIES)
        raise UserError(f"{where} is {names!r}; it must be a comma-separated list of some of {known}")
    return tuple(FAMILIES[name] for name in listed)


def draw(family: Family, split: str, rng: np.random.Generator) -> Problem:
    """A random problem of a split."""
    while True:
        problem = family.draw(rng, split == OUT_OF_DISTRIBUTION)
        if problem.split == split:
            return problem


def problems(names: str, split: str, count: int, seed: int, *, where: str = "names") -> list[tuple[str, str]]:
    """Draws `count` different questions of a split, the families in turn, with their answers.

    The same for the same seed; a longer draw continues a shorter one.

    Raises:
        UserError: an unknown family (naming `where`), or more questions than the split has.
    """
    chosen = families(names, where)
    root = np.random.SeedSequence([seed, zlib.crc32(split.encode())])
    streams = [
        _different(family, split, child)
        for family, child in zip(chosen, root.spawn(len(chosen)), strict=True)
    ]
    found = [next(stream) for stream in itertools.islice(itertools.cycle(streams), count)]
    return [(problem.question, str(problem.answer)) for problem in found]


def _different(family: Family, split: str, seed: np.random.SeedSequence) -> Iterator[Problem]:
    """Problems of one family without end, or until there seem to be no more, each question once."""
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    in_vain = 0
    while in_vain < IN_VAIN:
        problem = draw(family, split, rng)
        in_vain += 1
        if problem.question not in seen:
            seen.add(problem.question)
            in_vain = 0
            yield problem
    raise UserError(f"{split!r} has only {len(seen)} questions like {problem.question!r}; ask for fewer")
