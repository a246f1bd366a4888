"""Writes `report.html`, one self-contained page, for the workdir of a run, finished or not.

    python -m step_grpo.html_report --workdir=workdir

It reads what `step_grpo.main` leaves there; of all but `metrics.jsonl` there may be less, and the page says
what is missing. Where `probes.jsonl` of `step_grpo.probing` lies there, or in a folder `probes` of it, the
page has a reliability diagram. `--picture=FILE.png` (or `.svg`) draws the course of the training beside it.
"""

from pathlib import Path

from step_grpo import cli
from step_grpo.html_report.page import write_report
from step_grpo.html_report.picture import draw_run
from step_grpo.html_report.read import read_run


def main(workdir: Path, picture: str = "") -> None:
    """Writes the page, and a picture where one is asked for, and says where they are."""
    if picture:
        draw_run(read_run(workdir), Path(picture))
        print(f"picture: {picture}")
    print(f"report: {write_report(workdir)}")


if __name__ == "__main__":
    cli.run(main)
