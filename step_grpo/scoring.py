"""Completions as text: decoded, graded, their steps counted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np

from step_grpo.data.prompts import THINK_END, EncodedPrompt
from step_grpo.distributed import as_bytes, gather
from step_grpo.reward.boxes import last_box
from step_grpo.reward.grading import Grade, Grader
from step_grpo.reward.steps import count_steps
from step_grpo.rollout.engine import Completion, RolloutStats


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
    *,
    closed_thinking: bool = False,
) -> list[Scored]:
    r"""Decodes, grades and counts the steps of completions, in order.

    Args:
        tokenizer: of the model.
        prompts: what `Completion.prompt` points into.
        completions: of the rollout engine.
        grader: compares with the reference answers.
        triggers: words that open a step.
        closed_thinking: a completion is formatted only if there is a closed `\boxed{}` behind `</think>`.
    """
    texts = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
    asked = [prompts[c.prompt] for c in completions]
    questions = [prompt.question for prompt in asked]
    grades = grader.grade_many(texts, [q.answer for q in questions], [q.grading for q in questions])
    if closed_thinking:
        grades = [
            replace(grade, formatted=last_box(text.partition(THINK_END)[2]) is not None)
            for grade, text in zip(grades, texts, strict=True)
        ]
    rows = zip(asked, completions, texts, grades, strict=True)
    return [Scored(p, c, text, grade, count_steps(text, triggers)) for p, c, text, grade in rows]


# ---------------------------------------------------------------------- several processes

ARRAYS = ("tokens", "logprobs", "forced", "confidences")  # of a `Completion`


def exchange(
    scored: Sequence[Scored], stats: RolloutStats, prompts: Sequence[EncodedPrompt]
) -> tuple[list[Scored], RolloutStats]:
    """What all processes made of their shares of the prompts, in the order of prompt and sample.

    Args:
        scored: what this process made of `distributed.share(prompts)`.
        stats: of its rollout.
        prompts: of all processes.

    Returns:
        The same in every process. The time is that of the slowest, all else of the cost is summed.
    """
    if jax.process_count() == 1:
        return list(scored), stats
    said = gather(_to_arrays(scored, stats))
    everything = [s for process, arrays in enumerate(said) for s in _from_arrays(arrays, process, prompts)]
    everything.sort(key=lambda s: (s.completion.prompt, s.completion.sample))
    return everything, _together([json.loads(bytes(arrays["stats"])) for arrays in said])


def _to_arrays(scored: Sequence[Scored], stats: RolloutStats) -> dict[str, np.ndarray]:
    """Without the prompts, which every process has."""
    rows = [
        (c.prompt, c.sample, c.reason, c.probe_tokens, s.text, asdict(s.grade), s.steps)
        for s in scored
        for c in [s.completion]
    ]
    arrays = {"rows": as_bytes(json.dumps(rows)), "stats": as_bytes(json.dumps(asdict(stats)))}
    return arrays | joined([s.completion for s in scored])


def joined(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    """The arrays of completions, at least one, each kind end to end; and where each ends."""
    arrays = {}
    for name in ARRAYS:
        parts = [getattr(completion, name) for completion in completions]
        arrays[name] = np.concatenate(parts)
        arrays[f"{name} end"] = np.cumsum([len(part) for part in parts])
    return arrays


def parted(arrays: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The inverse: of each kind those of every completion."""
    return {name: np.split(arrays[name], arrays[f"{name} end"][:-1]) for name in ARRAYS}


def _from_arrays(
    arrays: Mapping[str, np.ndarray], process: int, prompts: Sequence[EncodedPrompt]
) -> list[Scored]:
    """The inverse, for the arrays of a process; prompts are counted over all processes."""
    parts = parted(arrays)
    made = []
    for i, (own, sample, reason, probe_tokens, text, grade, steps) in enumerate(
        json.loads(bytes(arrays["rows"]))
    ):
        prompt = own * jax.process_count() + process
        written = {name: parts[name][i] for name in ARRAYS}
        completion = Completion(
            prompt=prompt, sample=sample, reason=reason, probe_tokens=probe_tokens, **written
        )
        made.append(Scored(prompts[prompt], completion, text, Grade(**grade), steps))
    return made


def _together(stats: Sequence[Mapping[str, Any]]) -> RolloutStats:
    """The cost of a rollout whose processes worked side by side."""
    combine = {name: max if name.endswith("seconds") else sum for name in stats[0]}
    return RolloutStats(**{name: of([s[name] for s in stats]) for name, of in combine.items()})
