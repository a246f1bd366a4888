"""The page: what a workdir tells, put into the template."""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from step_grpo import paths
from step_grpo.errors import UserError
from step_grpo.html_report import figures, viewer
from step_grpo.html_report.read import RunFiles, read_run
from step_grpo.outcomes import comparison, on_common_questions, read_recorded

PAGE = "report.html"
SETTINGS = {  # of the head of the page
    "config.model.checkpoint": "model",
    "config.rollout.exit": "exit",
    "config.rollout.delta": "delta",
    "config.reward.name": "reward",
    "config.grpo.learning_rate": "learning rate",
    "config.lora.rank": "LoRA rank",
    "config.seed": "seed",
}


def write_report(workdir: Path, result: Mapping[str, Any] | None = None) -> Path:
    """Writes `report.html` into a workdir, as a whole or not at all.

    Args:
        workdir: of a run.
        result: of a run that has not written its `result.json` yet.

    Raises:
        UserError: there is no line of `metrics.jsonl`.
    """
    run = read_run(workdir, result)
    target = workdir / PAGE
    paths.write_text(target, render(run, compare_evaluations(workdir, run)))
    return target


def compare_evaluations(workdir: Path, run: RunFiles) -> Mapping[str, Any] | None:
    """After minus before on the same questions; None where there are no two evaluations to compare."""
    if len(run.completions) < 2:
        return None
    try:
        before, after = (read_recorded(workdir / f"completions_{name}.jsonl") for name in ("before", "after"))
        return comparison(*on_common_questions(before, after))
    except UserError:  # one of them is not whole
        return None


def render(run: RunFiles, compared: Mapping[str, Any] | None) -> str:
    """The page of a run.

    Args:
        run: what its workdir holds.
        compared: of `compare_evaluations`.
    """
    rollouts, pairs = viewer.shown_rollouts(run.rollouts), viewer.pairs(run)
    script, style = (part(name) for name in ("report.js", "report.css"))
    return template().render(
        run=run,
        last=run.metrics[-1],
        settings={said: run.settings[name] for name, said in SETTINGS.items() if name in run.settings},
        all_settings=[(name, str(value)) for name, value in sorted(run.settings.items())],
        tiles=tiles(run),
        evaluations=figures.evaluation_rows(run, compared) if run.evaluations else None,
        curves=figures.curves(run.metrics),
        ends=[
            figures.exits_figure(run.metrics),
            figures.percentiles_figure(run.metrics),
            figures.confidence_histogram(run.rollouts, run.probes),
            figures.reliability_figure(run.probes),
        ],
        lengths=figures.lengths_figure(run.completions),
        times=figures.time_figures(run.metrics),
        spent=figures.time_spent(run),
        rollouts=rollouts,
        pairs=pairs,
        texts=viewer.as_script({"rollouts": rollouts, "pairs": pairs, "reasons": figures.REASON_TEXTS}),
        script=script,
        style=style,
        script_hash=content_hash(script),
        style_hash=content_hash(style),
    )


def tiles(run: RunFiles) -> list[tuple[str, str, str]]:
    """The headline: name, value after (or before, while there is no after), and what it was before."""
    before, after = run.evaluations.get("before"), run.evaluations.get("after")
    newest = after or before
    if newest is None:
        return []
    shown = {"accuracy": figures.percent, "tokens": "{:.1f}".format, "steps": "{:.2f}".format}
    said = {"accuracy": "accuracy", "tokens": "tokens a completion", "steps": "steps a completion"}
    return [
        (said[name], show(newest[name]), f"before: {show(before[name])}" if before and after else "")
        for name, show in shown.items()
    ]


@cache
def template() -> jinja2.Template:
    """The template, which escapes all that it is given as text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(part("report.html.jinja"))


def part(name: str) -> Markup:
    """A file beside the template, which goes into the page as it is."""
    return Markup((files("step_grpo.html_report") / "templates" / name).read_text(encoding="utf-8"))


def content_hash(text: str) -> str:
    """How a Content-Security-Policy names the one script or style sheet that the browser may use."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
