"""The chains of additions and subtractions of `step_grpo.data.arithmetic`, as a family with longer ones.

Out of distribution: six to eight operations in place of three to five.
"""

import re
from dataclasses import dataclass

import numpy as np

from step_grpo.data import arithmetic
from step_grpo.data.tasks.thoughts import OUT_OF_DISTRIBUTION, split_of

PHRASES = ()
USUAL_LENGTHS, HARD_LENGTHS = (3, 5), (6, 8)  # operations, the shortest and the longest
QUESTION = re.compile(r"Compute (\d+)((?:[+-]\d+)+)\.")


@dataclass(frozen=True)
class Chain(arithmetic.Problem):
    """A chain of any length."""

    @property
    def split(self) -> str:
        """The split this problem belongs to."""
        longer = len(self.operations) >= HARD_LENGTHS[0]
        return OUT_OF_DISTRIBUTION if longer else split_of(self.question)


def draw(rng: np.random.Generator, hard: bool) -> Chain:
    """A chain whose running value stays in 0..99; `hard`: one that is out of distribution."""
    problem = arithmetic.draw_problem(rng, *(HARD_LENGTHS if hard else USUAL_LENGTHS))
    return Chain(problem.first, problem.operations)
