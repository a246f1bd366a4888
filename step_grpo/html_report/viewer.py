"""The texts that the page shows: training rollouts, and the same question before and after.

Everything here was written by a model or by whoever wrote the questions. It goes into the page as JSON in
which nothing can end the element that holds it, and is shown by the script as text, never as markup.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from step_grpo.data.prompts import THINK_END
from step_grpo.html_report.read import Row, RunFiles
from step_grpo.rollout_log import split_triggers, with_probes

MOST_CHARACTERS = 3_000_000  # of each of the two lists in the page
Key = tuple[str, int]
_SCRIPT_SAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def as_script(value: Any) -> Markup:
    """JSON for the inside of a `<script type="application/json">`, whatever the strings in it say."""
    return Markup(json.dumps(value, ensure_ascii=False).translate(_SCRIPT_SAFE))


def spread(rows: Sequence[Row], sizes: Sequence[int], most: int = MOST_CHARACTERS) -> list[Row]:
    """As many rows as the budget of characters holds, evenly over all; at least one of any."""
    stride = 1
    while stride < len(rows) and sum(sizes[::stride]) > most:
        stride += 1
    return list(rows[::stride])


def shown_rollouts(rollouts: Sequence[Row]) -> list[Row]:
    """The training completions that the page holds."""
    return spread(rollouts, [len(json.dumps(row)) for row in rollouts])


def pairs(run: RunFiles) -> list[Row]:
    """The completions of the same question and sample before and after, in the order of the questions.

    Where only one evaluation is there, or a question has no partner, the other one is null.
    """
    triggers = tuple(run.settings.get("config.rollout.triggers", ("Wait",)))
    sides = {name: {key_of(row): row for row in rows} for name, rows in run.completions.items()}
    probes = probes_by_completion(run.probes)
    whose = probed(sides, probes, triggers)
    found: list[Row] = []
    for key in dict.fromkeys(key for rows in sides.values() for key in rows):
        either = next(rows[key] for rows in sides.values() if key in rows)
        pair = {"id": key[0], "sample": key[1], "prompt": either["prompt"], "answer": either["answer"]}
        for name in ("before", "after"):
            row = sides.get(name, {}).get(key)
            pair[name] = row and evaluated(row, triggers, probes.get(key, ()) if name == whose else ())
        found.append(pair)
    return spread(found, [len(json.dumps(pair)) for pair in found])


def key_of(row: Row) -> Key:
    """Which completion a row speaks of: question and sample."""
    return row["id"], row["sample"]


def probes_by_completion(probes: Sequence[Row]) -> Mapping[Key, list[Row]]:
    """The probes of `probes.jsonl` by completion, in the order of their places."""
    ordered = sorted(probes, key=lambda p: (str(p["id"]), p["sample"], p["position"]))
    return {key: list(group) for key, group in groupby(ordered, key=key_of)}


def probed(
    sides: Mapping[str, Mapping[Key, Row]], probes: Mapping[Key, Sequence[Row]], triggers: tuple[str, ...]
) -> str:
    """Which evaluation the probes are of: the one that has a trigger for each of them; empty if not certain.

    The file names questions and samples, but not the evaluation.
    """

    def fits(rows: Mapping[Key, Row]) -> bool:
        return all(key in rows and len(p) == triggers_of(rows[key], triggers) for key, p in probes.items())

    fitting = [name for name, rows in sides.items() if probes and fits(rows)]
    return fitting[0] if len(fitting) == 1 else ""


def triggers_of(row: Row, triggers: tuple[str, ...]) -> int:
    """Triggers in the thinking of a completion."""
    thought = row["text"].partition(THINK_END)[0]
    return sum(piece["kind"] == "trigger" for piece in split_triggers(thought, triggers))


def evaluated(row: Row, triggers: tuple[str, ...], probes: Sequence[Row]) -> Row:
    """What the page shows of a completion of an evaluation."""
    thought, end, answer = row["text"].partition(THINK_END)
    asked = [{"kind": "probe", **{k: p[k] for k in ("confidence", "answer", "correct")}} for p in probes]
    ended = [{"kind": "exit", "reason": row["exit_reason"]}] if end else []
    thinking = with_probes(list(split_triggers(thought, triggers)), asked)
    segments = [*thinking, *ended, *split_triggers(end + answer, triggers)]
    kept = {name: row[name] for name in ("correct", "tokens", "steps")}
    shown = [segment for segment in segments if segment.get("text", True)]
    return {**kept, "reason": row["exit_reason"], "segments": shown}
