"""Completions as text: decoded, graded, their steps counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from step_grpo.data.prompts import EncodedPrompt
from step_grpo.reward.grading import Grade, Grader
from step_grpo.reward.steps import count_steps
from step_grpo.rollout.engine import Completion


@dataclass(frozen=True)
class Scored:
    """A completion, what it says, and what that is worth."""

    prompt: EncodedPrompt
    completion: Completion
    text: str
    grade: Grade
    steps: int


def score_completions(
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    completions: Sequence[Completion],
    grader: Grader,
    triggers: tuple[str, ...],
) -> list[Scored]:
    """Decodes, grades and counts the steps of completions, in order.

    Args:
        tokenizer: of the model.
        prompts: what `Completion.prompt` points into.
        completions: of the rollout engine.
        grader: compares with the reference answers.
        triggers: words that open a step.
    """
    texts = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
    asked = [prompts[c.prompt] for c in completions]
    grades = grader.grade_many(texts, [prompt.question.answer for prompt in asked])
    rows = zip(asked, completions, texts, grades, strict=True)
    return [Scored(p, c, text, grade, count_steps(text, triggers)) for p, c, text, grade in rows]
