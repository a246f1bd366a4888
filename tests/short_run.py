"""The training run of configs/tiny.py, made so small that a step takes seconds."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from step_grpo import cli
from step_grpo.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = {
    "steps": 2,
    "prompts_per_step": 4,
    "save_every": 1,
    "data": {"count": 200},
    "rollout": {"samples": 4, "lanes": 8, "max_response_tokens": 160},
    "grpo": {"prompts_per_update": 2, "rows": 2, "row_length": 192},
    "eval": {"questions": 16, "data": {"count": 16}, "max_response_tokens": 160},
}
ONE_STEP = {
    "steps": 1,
    "prompts_per_step": 1,
    "grpo": {"prompts_per_update": 1},
    "eval": {"questions": 4},
}
CLOCKS = (
    "compile_seconds",
    "generated_per_second",
    "prefill_seconds",
    "decode_seconds",
    "rollout_seconds",
    "grading_seconds",
    "update_seconds",
)


@dataclass(frozen=True)
class ShortRun:
    """What a run wrote and printed."""

    config: ConfigDict
    workdir: Path
    printed: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Its lines of metrics, without what depends on the clock."""
        lines = read_metrics(self.workdir / "metrics.jsonl")
        return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]

    @property
    def result(self) -> dict[str, Any]:
        """Its result.json."""
        return json.loads((self.workdir / "result.json").read_text())

    def completions(self, name: str) -> list[dict[str, Any]]:
        """The records of one of its evaluations."""
        return read_records(self.workdir / f"completions_{name}.jsonl")


def short_config(*changes: dict[str, Any]) -> ConfigDict:
    """configs/tiny.py with `SMALL`, then each of `changes`, over it."""
    config = cli.load_config(str(ROOT / "configs" / "tiny.py")).unlock()
    for change in (SMALL, *changes):
        config.update(change)
    return config.lock()


def train(config: ConfigDict, workdir: Path) -> ShortRun:
    """Runs `step_grpo.main`."""
    from step_grpo.main import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(config, workdir)
    return ShortRun(config, workdir, printed.getvalue())


def command(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m step_grpo.PROGRAM`, away from the repository's folder."""
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", f"step_grpo.{program}", *arguments],
        cwd=tempfile.gettempdir(),
        env={**os.environ, "PYTHONPATH": found, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
