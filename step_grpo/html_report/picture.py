"""The course of a run as one small picture, for a README or a slide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_grpo.errors import UserError
from step_grpo.html_report.read import Row, RunFiles

SUFFIXES = (".png", ".svg")
TRAINING, PLAIN = "#7aa6d6", "#b3422c"  # curves of the training; points of the evaluations
PANELS = {  # figure of metrics and evaluations -> its title, how it is written, and what it is multiplied by
    "accuracy": ("right answers, %", "{:.1f} %", 100.0),
    "tokens": ("tokens of a completion", "{:.1f}", 1.0),
    "steps": ("semantic steps of a completion", "{:.2f}", 1.0),
}


def draw_run(run: RunFiles, out: Path) -> None:
    """Accuracy, tokens and steps over the training, between the evaluations before and after it.

    Args:
        run: with at least one step; an evaluation that is missing is left out.
        out: a file to write, `.png` or `.svg`; its folder is made.

    Raises:
        UserError: the file's name ends otherwise.
    """
    if out.suffix not in SUFFIXES:
        raise UserError(f"--picture={out}: it must end in {' or '.join(SUFFIXES)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (slow to import)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw_panel(axes, run, name)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def draw_panel(axes: Any, run: RunFiles, name: str) -> None:
    """One figure: its curve over the training, and what plain sampling gave before and after."""
    from matplotlib.patheffects import withStroke  # noqa: PLC0415 (slow to import)

    title, form, factor = PANELS[name]
    steps, values = points(run.metrics, name, factor)
    cut = run.settings.get("config.rollout.exit", "none") != "none"
    said = "training completions, cut short where a probe passes" if cut else "training completions"
    axes.plot(steps, values, color=TRAINING, linewidth=1.8, label=said)
    ends = {"before": 0.0, "after": steps[-1] if steps else 1.0}
    for when, at in ends.items():
        if (found := run.evaluations.get(when)) is None:
            continue
        mean, low, high = (factor * found[key] for key in (name, f"{name}_low", f"{name}_high"))
        axes.errorbar(
            at, mean, yerr=[[mean - low], [high - mean]], fmt="o", color=PLAIN, markersize=5, capsize=2,
            label="held-out questions, plain sampling" if when == "before" else None, zorder=3,
        )  # fmt: skip
        axes.annotate(
            form.format(mean), (at, high), xytext=(5 if when == "after" else -5, 4),
            textcoords="offset points", ha="right" if when == "after" else "left", color=PLAIN,
            fontsize=10, fontweight="bold", gid=f"{name}-{when}",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip
    top = axes.get_ylim()[1]
    axes.set(xlabel="step of the training", ylim=(0, 115 if name == "accuracy" else 1.12 * top))
    if name == "accuracy":
        axes.set_yticks(range(0, 101, 25))
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def points(metrics: Sequence[Row], name: str, factor: float) -> tuple[list[float], list[float]]:
    """The steps that have a figure, and the figure."""
    there = [(line["step"], factor * line[name]) for line in metrics if line.get(name) is not None]
    return [step for step, _ in there], [value for _, value in there]
