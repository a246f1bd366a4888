"""What a workdir holds of a run, as far as it is there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_grpo.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """A run, as far as its workdir tells it.

    Attributes:
        name: of the workdir.
        metrics: lines of `metrics.jsonl`, one a step.
        evaluations: `before` and `after` -> what `evaluate.summarise` returned.
        completions: `before` and `after` -> lines of `completions_*.jsonl`.
        rollouts: lines of `rollouts.jsonl`.
        probes: lines of `probes.jsonl`, or else of `probes/probes.jsonl`.
        settings: fields of the config by their dotted names.
        version: of step_grpo.
        evaluation_seconds: of `before` and `after`.
        seconds: of the whole run, or of the part of it behind the last interruption; 0 while it goes on.
    """

    name: str
    metrics: Sequence[Row]
    evaluations: Mapping[str, Row]
    completions: Mapping[str, Sequence[Row]]
    rollouts: Sequence[Row]
    probes: Sequence[Row]
    settings: Mapping[str, Any]
    version: str
    evaluation_seconds: Mapping[str, float]
    seconds: float


def read_run(workdir: Path, result: Mapping[str, Any] | None = None) -> RunFiles:
    """Reads a workdir.

    Args:
        workdir: of a run.
        result: of a run that has not written its `result.json` yet.

    Raises:
        UserError: there is no line of `metrics.jsonl`.
    """
    metrics = read_rows(workdir / "metrics.jsonl")
    if not metrics:
        raise UserError(f"--workdir={workdir} has no metrics.jsonl; name that of a run of step_grpo.main")
    result = read_object(workdir / "result.json") if result is None else result
    remembered = read_object(workdir / "evaluation_before.json")
    facts = remembered.get("facts", {})
    evaluations = {
        "before": result.get("before") or remembered.get("result"),
        "after": result.get("after"),
    }
    return RunFiles(
        name=workdir.absolute().name if isinstance(workdir, Path) else workdir.name,
        metrics=metrics,
        evaluations={name: found for name, found in evaluations.items() if found},
        completions={
            name: rows
            for name in ("before", "after")
            if (rows := read_rows(workdir / f"completions_{name}.jsonl"))
        },
        rollouts=read_rows(workdir / "rollouts.jsonl"),
        probes=read_rows(workdir / "probes.jsonl") or read_rows(workdir / "probes" / "probes.jsonl"),
        settings=facts.get("config", {}),
        version=facts.get("version", ""),
        evaluation_seconds=result.get("evaluation_seconds", {}),
        seconds=result.get("seconds", 0.0),
    )


def read_rows(path: Path) -> list[Row]:
    """The objects of a jsonl file, up to a line that was cut short; none where there is no file."""
    if not path.exists():
        return []
    found = []
    # Not `splitlines`, which also splits at line ends of Unicode that a text may hold.
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def read_object(path: Path) -> Row:
    """The object of a JSON file; empty where there is none, or one cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
