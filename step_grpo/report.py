"""What a run shows: a progress bar with live figures, and the closing table."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from step_grpo.rollout.phases import REASONS

PLAIN_INTERVAL = 10.0  # seconds between two lines where there is no terminal


class _TwoLines(Progress):
    """The bar of a stage, and below it the figures, which would not fit beside it."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, then the figures where there are any."""
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            yield Text(self.figures)


class ProgressBar:
    """Shows how far a run is and what it is at, with figures; plain lines where there is no terminal."""

    def __init__(self, console: Console, title: str, total: int, done: int = 0):
        """Shows nothing yet; use `progress_bar`."""
        self._console, self._title, self._total = console, title, total
        self._first = self._done = done
        self._stage = self._figures = ""
        self._began = time.monotonic()
        self._said = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[stage]}"),
        )
        self.progress = _TwoLines(*columns, console=console, disable=not console.is_terminal)
        self._task = self.progress.add_task(title, total=total, completed=done, stage="")

    def stage(self, name: str, done: int = 0, total: int = 0) -> None:
        """Says what the run is at, and how far that is, where it is known."""
        self._stage = f"{name} {done}/{total}" if total else name
        self.progress.update(self._task, stage=self._stage)
        self._say()

    def update(self, done: int, **figures: float | str) -> None:
        """Sets how much is done, and the figures to show with it."""
        self._done, self._stage = done, ""
        self._figures = "  ".join(f"{name} {show(value)}" for name, value in figures.items())
        self.progress.figures = self._figures
        self.progress.update(self._task, completed=done, stage="")
        self._say(done >= self._total)

    def _say(self, now: bool = False) -> None:
        """A plain line, unless there is a terminal or there was one only just now."""
        if self._console.is_terminal or not (now or time.monotonic() - self._said > PLAIN_INTERVAL):
            return
        self._said = time.monotonic()
        left = f"left {timedelta(seconds=round(self.seconds_left()))}" if self._done > self._first else ""
        parts = (f"{self._title} {self._done}/{self._total}", left, self._stage, self._figures)
        print("  ".join(part for part in parts if part), flush=True)

    def seconds_left(self) -> float:
        """What is left to do, at the pace of what was done since the bar was made."""
        pace = (time.monotonic() - self._began) / max(self._done - self._first, 1)
        return pace * (self._total - self._done)


@contextmanager
def progress_bar(title: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
    """A `ProgressBar` for as long as the block runs; `done` was so before."""
    bar = ProgressBar(Console(), title, total, done)
    with bar.progress:
        yield bar


def live_figures(figures: Mapping[str, float]) -> dict[str, float | str]:
    """What is shown while training, of a step's line of metrics."""
    exits = {name: figures[f"exit_{name}"] for name in REASONS if figures[f"exit_{name}"]}
    said = ", ".join(f"{name} {share:.0%}" for name, share in exits.items())
    shown = {name: figures[name] for name in ("accuracy", "tokens", "steps", "reward", "kl")}
    return {"tokens/s": figures["generated_per_second"], **shown, "exits": said}


def show(value: float | str) -> str:
    """A figure in few characters."""
    if isinstance(value, str | int):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def evaluation_table(
    evaluations: Mapping[str, Mapping[str, Any]], exits: Mapping[str, float] | None = None
) -> Table:
    """The figures of evaluations side by side.

    Args:
        evaluations: column title -> what `evaluate.summarise` returns.
        exits: share of the training rollouts that left the thinking for each reason.
    """
    table = Table(title="Plain sampling on held-out questions")
    table.add_column("")
    for title in evaluations:
        table.add_column(title, justify="right")
    for name, row in _rows(*evaluations.values()):
        table.add_row(name, *row)
    if exits:
        table.add_section()
        ends = ", ".join(f"{reason} {share:.0%}" for reason, share in exits.items())
        table.add_row("exits in training", *[""] * (len(evaluations) - 1), ends)
    return table


def _rows(*evaluations: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str]]]:
    yield "questions", [str(e["questions"]) for e in evaluations]
    if any(e["samples"] > 1 for e in evaluations):
        yield "samples a question", [str(e["samples"]) for e in evaluations]
    yield (
        "accuracy (95 % interval)",
        [f"{e['accuracy']:.1%} ({e['accuracy_low']:.1%} to {e['accuracy_high']:.1%})" for e in evaluations],
    )
    if any(e["samples"] > 1 for e in evaluations):
        yield "majority", [f"{e['maj_at_k']:.1%}" for e in evaluations]
        yield "any right", [f"{e['pass_at_k'][str(e['samples'])]:.1%}" for e in evaluations]
    yield "tokens, mean", [f"{e['tokens']:.1f}" for e in evaluations]
    yield "tokens, median", [f"{e['tokens_median']:.1f}" for e in evaluations]
    yield "steps, mean", [f"{e['steps']:.2f}" for e in evaluations]
    yield "cut off by the length limit", [f"{e['truncated']:.1%}" for e in evaluations]


# ---------------------------------------------------------------------- tables of benchmarks

HEADS = (
    *("benchmark", "questions", "avg@k (95 %)", "maj@k", "pass@k", "tokens (95 %)", "median"),
    *("steps (95 %)", "cut off"),
)
_NEGATIVE = re.compile(r"-(?=[0-9])(?<![A-Za-z0-9]-)")  # the sign, not the hyphen of a name
AGAINST = ("accuracy against base (95 %; p)", "tokens against base (95 %; p)")


def results_markdown(benchmarks: Mapping[str, Mapping[str, Any]], average: Mapping[str, Any]) -> str:
    """A Markdown table of `evaluate.summarise` of each benchmark by its title, and of their average."""
    heads, rows = _table(benchmarks, average)
    rule = ["---", *["---:"] * (len(heads) - 1)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)]
    return "\n".join([*lines, "", *_notes(benchmarks)]) + "\n"


def results_latex(benchmarks: Mapping[str, Mapping[str, Any]], average: Mapping[str, Any]) -> str:
    """The same table for LaTeX with `booktabs`."""
    heads, rows = _table(benchmarks, average)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_NEGATIVE.sub("$-$", cell.replace("%", r"\%")) for cell in cells) + r" \\"

    body = [line(row) for row in rows]
    rule = r"\midrule"
    table = [
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        line(heads),
        rule,
        *body[:-1],
        rule,
        body[-1],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*table, *(f"% {note}" for note in _notes(benchmarks))]) + "\n"


def _notes(benchmarks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    samples = sorted({e["samples"] for e in benchmarks.values()})
    notes = [
        f"k = {', '.join(map(str, samples))} completions a question; intervals over questions; the average "
        "counts each benchmark the same."
    ]
    left_out = {title: e["left_out"] for title, e in benchmarks.items() if e["left_out"]}
    if left_out:
        parts = ", ".join(f"{count} of {title}" for title, count in left_out.items())
        notes.append(f"Left out, their prompts being too long: {parts}.")
    failures = sum(e["grading_failures"] for e in benchmarks.values())
    if failures:
        notes.append(f"{failures} answers could not be graded and count as wrong.")
    return notes


def _table(
    benchmarks: Mapping[str, Mapping[str, Any]], average: Mapping[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table; the last row is the average."""
    compared = "against" in average
    rows = [
        [
            title,
            str(e["questions"]),
            _share(e, "accuracy"),
            f"{e['maj_at_k']:.1%}",
            f"{e['pass_at_k'][str(e['samples'])]:.1%}",
            _length(e, "tokens", 1),
            f"{e['tokens_median']:.0f}",
            _length(e, "steps", 2),
            f"{e['truncated']:.1%}",
            *(_differences(e["against"]) if compared else ()),
        ]
        for title, e in benchmarks.items()
    ]
    last = ["average", "", _share(average, "accuracy"), "", "", _length(average, "tokens", 1), ""]
    last += [_length(average, "steps", 2), "", *(_differences(average["against"]) if compared else ())]
    return [*HEADS, *(AGAINST if compared else ())], [*rows, last]


def _share(figures: Mapping[str, Any], name: str) -> str:
    mean, low, high = (figures[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{mean:.1%} ({low:.1%} to {high:.1%})"


def _length(figures: Mapping[str, Any], name: str, digits: int) -> str:
    mean, low, high = (figures[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _differences(against: Mapping[str, Any]) -> list[str]:
    accuracy = against["accuracy"]
    points = [f"{100 * accuracy[name]:+.1f}" for name in ("mean", "low", "high")]
    tokens = against["tokens_relative"]
    change = [f"{tokens[name]:+.1%}" for name in ("mean", "low", "high")]
    return [
        f"{points[0]} ({points[1]} to {points[2]}; p = {accuracy['p_value']:.2g})",
        f"{change[0]} ({change[1]} to {change[2]}; p = {tokens['p_value']:.2g})",
    ]
