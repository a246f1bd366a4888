"""Evaluations beside each other: accuracy, tokens and steps, and how they differ from the first.

`python -m step_grpo.compare --base='workdir/study/rows/vanilla/seed*/test' --others='workdir/mine/seed*'`

Each pattern names the folders that `step_grpo.evaluate` left for one model: one folder, or one for each seed,
whose completions of a question are taken together. The seeds of `--others` are matched with those of
`--base` by the order of their names. Several patterns are separated by commas, and each becomes a row of a
Markdown table like those of a study, on the questions that both were asked.
"""

from glob import glob
from pathlib import Path

from step_grpo import cli
from step_grpo.errors import UserError
from step_grpo.outcomes import Recorded, find_completions, read_recorded
from step_grpo.study_results import markdown, row_figures


def main(base: str, others: str, benchmark: str = "") -> None:
    """Prints the table; `--benchmark=NAME` compares that of several benchmarks."""
    patterns = [base, *(pattern for pattern in others.split(",") if pattern)]
    runs = {pattern: read_runs(pattern, benchmark) for pattern in patterns}
    for pattern, run in runs.items():
        if len(run) != len(runs[base]):
            raise UserError(
                f"--others: {pattern} names {len(run)} evaluations, and --base={base} {len(runs[base])}; "
                "each is compared with the one of the same seed"
            )
    figures = {name: row_figures(name != base, runs[base], run) for name, run in runs.items()}
    print(markdown({benchmark or "completions": figures}, {name: name for name in figures}), end="")


def read_runs(pattern: str, benchmark: str) -> list[Recorded]:
    """The evaluations that a pattern names, in the order of their names.

    Raises:
        UserError: there is none, or one is no evaluation.
    """
    found = sorted(Path(name) for name in glob(pattern))
    if not found:
        raise UserError(f"{pattern}: no such folder; name those that step_grpo.evaluate wrote")
    return [read_recorded(find_completions(path, benchmark)) for path in found]


if __name__ == "__main__":
    cli.run(main)
