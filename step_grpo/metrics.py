"""The metrics stream: one JSON object a line, one line a step."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from step_grpo import paths


class StepLines:
    """Appends to a file of JSON lines that have a `step` each.

    What was written is on the disk or in the bucket before the call returns.

    Attributes:
        steps: those that the file had a line for.
        first_line: the first that was there, empty where none was.
    """

    def __init__(self, path: Path, first_step: int = 0):
        """Opens the file; lines of steps after `first_step`, left by a run that is resumed, are dropped."""
        paths.make(path.parent)
        self.steps: set[int] = set()
        self.first_line: dict[str, Any] = {}
        if path != Path(os.devnull):  # of the processes that write nothing
            keep = [line for line in read_metrics(path) if line["step"] <= first_step]
            # As a whole or not at all: an interruption here must not lose what was there.
            paths.write_text(path, "".join(json.dumps(line) + "\n" for line in keep))
            self.steps, self.first_line = {line["step"] for line in keep}, (keep or [{}])[0]
        self._file = paths.append_to(path)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Writes a line for each."""
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._file.close()


class MetricsWriter(StepLines):
    """The figures of the steps: `metrics.jsonl`, one line a step."""

    def __init__(self, path: Path, first_step: int = 0):
        """Opens the file, and says which steps up to `first_step` have no line."""
        super().__init__(path, first_step)
        if path != Path(os.devnull):
            warn_of_missing(self.steps, first_step)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Writes one line; a figure that is not finite becomes null."""
        line = {"step": step, **{name: _finite(value) for name, value in figures.items()}}
        self.first_line = self.first_line or line
        self.append([line])

    def first(self, name: str) -> float:
        """A figure of the first line of the stream; 0 where it has none."""
        return self.first_line.get(name) or 0.0


def warn_of_missing(there: set[int], first_step: int) -> None:
    """Says in one line which steps of a resumed run have no line."""
    missing = sorted(set(range(1, first_step + 1)) - there)
    if missing:
        print(f"warning: metrics.jsonl has no line for {len(missing)} steps, from step {missing[0]} on")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; one cut short by a crash is not among them."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
