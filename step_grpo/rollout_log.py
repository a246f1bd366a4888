"""A few training completions of every step, kept with all that happened to them: `rollouts.jsonl`.

One JSON object a line, one line a completion: `step`, the question (`id`, `prompt`, `answer`), the completion
(`sample`, `reason`, `tokens`, `steps`), what it is worth (`correct`, `formatted`, `reward`,
`advantage`), the `confidences` of its checks, and `segments`, the text in pieces:

| kind | fields | |
| --- | --- | --- |
| `text` | `text` | sampled |
| `trigger` | `text` | a standalone trigger |
| `forced` | `text` | put in by the machine |
| `probe` | `confidence` | a probe of the confidence policy, at the place where it asked |
| `exit` | `reason` | the end of the thinking |
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from step_grpo.data.prompts import think_end_id
from step_grpo.grpo.advantages import advantages
from step_grpo.metrics import StepLines
from step_grpo.reward.steps import trigger_pattern
from step_grpo.rollout.engine import Completion
from step_grpo.scoring import Scored

Segment = dict[str, Any]


class RolloutLog(StepLines):
    """Appends to `rollouts.jsonl`."""

    def write(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Writes a line for each record."""
        self.append([{"step": step, **record} for record in records])


def kept_rollouts(
    scored: Sequence[Scored], reward: np.ndarray, tokenizer: Any, config: ConfigDict
) -> list[dict[str, Any]]:
    """The records of `config.log.rollouts` completions, evenly over the step: nothing chooses among them.

    Args:
        scored: ordered by prompt and sample.
        reward: `[prompts, samples]`.
        tokenizer: of the model.
        config: of the run.
    """
    count = min(config.log.rollouts, len(scored))
    advantage = advantages(config.grpo.advantage, reward)
    think_end, triggers = think_end_id(tokenizer), tuple(config.rollout.triggers)
    placed = config.rollout.exit == "confidence"
    records = []
    for i in (number * len(scored) // count for number in range(count)):
        s, completion = scored[i], scored[i].completion
        records.append(
            {
                "id": s.prompt.question.id,
                "sample": completion.sample,
                "prompt": s.prompt.question.question,
                "answer": s.prompt.question.answer,
                "reason": completion.reason,
                "correct": s.grade.correct,
                "formatted": s.grade.formatted,
                "reward": float(reward.ravel()[i]),
                "advantage": float(advantage.ravel()[i]),
                "tokens": len(completion.tokens),
                "steps": s.steps,
                "confidences": completion.confidences.tolist(),
                "segments": segments_of(completion, tokenizer, think_end, triggers, placed),
            }
        )
    return records


def segments_of(
    completion: Completion,
    tokenizer: Any,
    think_end: int,
    triggers: tuple[str, ...],
    placed: bool,
) -> list[Segment]:
    """A completion in pieces, whose texts put together are the whole text.

    Args:
        completion: of the rollout engine.
        tokenizer: of the model.
        think_end: the token that ends the thinking.
        triggers: words that open a step.
        placed: put the checks at the triggers of the thinking; else no place is known.
    """
    tokens, forced = completion.tokens, completion.forced
    ends = np.flatnonzero(forced | (tokens == think_end))
    end = int(ends[0]) if len(ends) else len(tokens)
    known: Sequence[float] = completion.confidences.tolist() if placed else []
    probes = [{"kind": "probe", "confidence": confidence} for confidence in known]
    thought = list(split_triggers(decode(tokenizer, tokens[:end]), triggers))
    pieces = [*with_probes(thought, probes), {"kind": "exit", "reason": completion.reason}]
    for is_forced, group in groupby(range(end, len(tokens)), key=lambda i: bool(forced[i])):
        text = decode(tokenizer, tokens[list(group)])
        pieces += [{"kind": "forced", "text": text}] if is_forced else split_triggers(text, triggers)
    return [piece for piece in pieces if piece.get("text", True)]


def decode(tokenizer: Any, tokens: np.ndarray) -> str:
    """The text of some tokens, as the whole completion is decoded for its grade."""
    return tokenizer.decode(tokens, skip_special_tokens=True)


def split_triggers(text: str, triggers: tuple[str, ...]) -> Iterator[Segment]:
    """A text in pieces, its standalone triggers apart."""
    at = 0
    for match in trigger_pattern(triggers).finditer(text):
        yield {"kind": "text", "text": text[at : match.start()]}
        yield {"kind": "trigger", "text": match[0]}
        at = match.end()
    yield {"kind": "text", "text": text[at:]}


def with_probes(pieces: Sequence[Segment], probes: Sequence[Segment]) -> list[Segment]:
    """The pieces of a thinking with its probes: one before each trigger, in order, as far as there are any.

    The trigger of a probe that ended the thinking was held back and is not in the text, so such a probe is
    one more than the triggers and stands at the end.
    """
    left = list(probes)
    placed: list[Segment] = []
    for piece in pieces:
        if piece["kind"] == "trigger" and left:
            placed.append(left.pop(0))
        placed.append(piece)
    return placed + left
