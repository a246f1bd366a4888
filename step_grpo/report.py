"""What a run shows: a progress bar with live figures, and the closing table."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

PLAIN_INTERVAL = 10.0  # seconds between two lines where there is no terminal


class ProgressBar:
    """Shows how far a stage is, with figures beside it; plain lines where there is no terminal."""

    def __init__(self, console: Console, title: str, total: int):
        """Shows nothing yet; use `progress_bar`."""
        self._console, self._title, self._total = console, title, total
        self._said = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self.progress.add_task(title, total=total, figures="")

    def update(self, done: int, **figures: float | str) -> None:
        """Sets how much is done, and the figures to show beside it."""
        text = "  ".join(f"{name} {show(value)}" for name, value in figures.items())
        self.progress.update(self._task, completed=done, figures=text)
        if not self._console.is_terminal and (
            done >= self._total or time.monotonic() - self._said > PLAIN_INTERVAL
        ):
            self._said = time.monotonic()
            print(f"{self._title} {done}/{self._total}  {text}".rstrip(), flush=True)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[ProgressBar]:
    """A `ProgressBar` for as long as the block runs."""
    bar = ProgressBar(Console(), title, total)
    with bar.progress:
        yield bar


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
    yield (
        "accuracy (95 % interval)",
        [f"{e['accuracy']:.1%} ({e['accuracy_low']:.1%} to {e['accuracy_high']:.1%})" for e in evaluations],
    )
    yield "tokens, mean", [f"{e['tokens']:.1f}" for e in evaluations]
    yield "steps, mean", [f"{e['steps']:.2f}" for e in evaluations]
