"""Writes `report.html`, one self-contained page, for the workdir of a run, finished or not.

    python -m step_grpo.html_report --workdir=workdir

It reads what `step_grpo.main` leaves there; of all but `metrics.jsonl` there may be less, and the page says
what is missing. Where a `probes.jsonl` of `step_grpo.probing` lies there, the page has a reliability diagram.
"""

from pathlib import Path

from step_grpo import cli
from step_grpo.html_report.page import write_report


def main(workdir: Path) -> None:
    """Writes the page and says where it is."""
    print(f"report: {write_report(workdir)}")


if __name__ == "__main__":
    cli.run(main)
