"""Does a run fit a TPU slice? Compiles its real programs for that slice; no TPU is needed.

    python -m step_grpo.fit --config=configs/qwen3_8b.py --topology=v5p:2x2x1

For every program of the run it prints what a device needs at the fullest moment, the arrays that lie beside
included, against what the chip has; then the most lanes and rows that would fit, what the devices exchange,
FLOPs, and an estimate of the time. It ends with 0 if all fits and with 1 if not, saying what to change, or
what the compiler said where it failed for another reason than the size.

--lanes gives completions in hand over all devices, instead of `config.rollout.lanes`; --largest=no leaves out
the search for the most lanes and rows. Needs libtpu (pip install 'jax[tpu]') and some minutes.
"""

import sys
from collections.abc import Callable

from ml_collections import ConfigDict
from rich.console import Console

from step_grpo import cli
from step_grpo.config import validate
from step_grpo.errors import UserError
from step_grpo.fit import report
from step_grpo.fit.check import Measure, Verdict, advice, compile_all, largest_lanes, largest_rows, make_plan
from step_grpo.fit.chips import chip_of
from step_grpo.fit.compile import Task, measure, measure_sizes, require_libtpu
from step_grpo.fit.programs import Sizes


def main(config: ConfigDict, topology: str, lanes: str = "0", largest: str = "yes") -> None:
    """Checks a run and ends the program with status 1 if it does not fit."""
    validate(config)
    if not lanes.isdigit():
        raise UserError(f"--lanes={lanes}: it must be a number; 0 for as many as the run itself would take")
    if largest not in ("yes", "no"):
        raise UserError(f"--largest={largest}: it must be yes or no")
    chip_of(topology)
    require_libtpu()
    sys.exit(check(config, topology, int(lanes), search=largest == "yes"))


def check(
    config: ConfigDict,
    topology: str,
    lanes: int,
    *,
    search: bool,
    measure: Measure = measure,
    measure_sizes: Callable[[Task], Sizes] = measure_sizes,
) -> int:
    """Prints what is found; returns 0 if the run fits and 1 if not.

    Args:
        config: of the run.
        topology: a slice.
        lanes: over all devices; 0 for those of the config.
        search: for the most lanes and rows too.
        measure: compiles a program.
        measure_sizes: tells what the run holds.
    """
    console = Console()
    plan = make_plan(config, topology, lanes, measure_sizes)
    console.print(report.of_run(plan))
    console.print(report.of_arrays(plan))
    with console.status("compiling ..."):
        verdict = Verdict(plan, compile_all(plan, measure, plan.programs))
    console.print(report.of_programs(verdict))
    most_lanes = most_rows = None
    if search and not verdict.problems:
        with console.status("looking for the most lanes and rows ..."):
            most_lanes, most_rows = largest_lanes(verdict, measure), largest_rows(verdict, measure)
        console.print(report.of_largest(plan, most_lanes, most_rows))
    console.print(report.of_traffic(verdict))
    console.print(report.of_time(verdict))
    if verdict.problems:
        console.print(report.of_problems(verdict), markup=False)
        return 1
    if verdict.fits:
        console.print(f"It fits {topology}.")
        return 0
    console.print(report.of_failure(verdict, advice(verdict, most_lanes, most_rows)))
    return 1


if __name__ == "__main__":
    cli.run(main)
