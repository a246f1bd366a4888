"""Every program of a run against the memory of a chip, the sizes that would fit, and what to change."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ml_collections import ConfigDict

from step_grpo.errors import UserError
from step_grpo.fit import solve
from step_grpo.fit.chips import CHIPS, GIB, Chip, chip_count, chip_of, tensor_limit
from step_grpo.fit.compile import SIZES, Result, Task
from step_grpo.fit.programs import ROLLOUT, STAGES, UPDATE, Sizes, beside, chosen_lanes
from step_grpo.rollout.engine import MOST_LANES

MARGIN = 0.99  # of a chip's memory: the rest is for the programs' own code and what falls between arrays
SIDE_BY_SIDE = 2  # compilations at a time; one takes most of a core and a few GiB

Measure = Callable[[Task], Result]


@dataclass(frozen=True)
class Plan:
    """How a run is spread over a slice.

    Attributes:
        task: for any program of it, with its lanes and rows.
        sizes: what it holds.
        chip: that the slice is made of.
        lanes_asked: by the user; else the run chooses.
    """

    task: Task
    sizes: Sizes
    chip: Chip
    lanes_asked: bool

    @property
    def limit(self) -> float:
        """Bytes of a device that a run may fill."""
        return self.chip.hbm * MARGIN

    @property
    def programs(self) -> tuple[str, ...]:
        """Those that the run has."""
        return tuple(p for p in STAGES if p != "grow" or self.sizes.grows)

    def total(self, program: str, result: Result, lanes: int | None = None) -> float:
        """Bytes of a device at the fullest moment of a program, all that lies beside it included."""
        return result.peak + beside(program, self.sizes.held, self.task.lanes if lanes is None else lanes)


def make_plan(config: ConfigDict, topology: str, lanes: int, measure_sizes: Callable[[Task], Sizes]) -> Plan:
    """The run on a slice, with the lanes and rows that it would use itself.

    Args:
        config: of the run.
        topology: a slice.
        lanes: over all devices; 0 for `config.rollout.lanes`, and if that is 0 as many as the run takes.
        measure_sizes: `compile.measure_sizes`, or what stands for it.

    Raises:
        UserError: lanes that do not spread evenly.
    """
    chip = chip_of(topology)
    sizes = measure_sizes(Task(config, topology, SIZES))
    asked = lanes or config.rollout.lanes
    if asked % sizes.groups:
        raise UserError(f"--lanes={asked}: they must spread over {sizes.groups} groups of devices")
    of_group = asked // sizes.groups or max(1, chosen_lanes(sizes, topology))
    task = Task(config, topology, "", of_group, config.grpo.rows or sizes.row_shares)
    return Plan(task, sizes, chip, bool(asked))


def compile_all(plan: Plan, measure: Measure, programs: Sequence[str]) -> dict[str, Result]:
    """The results of programs, a few compiled at a time."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        tasks = [replace(plan.task, program=program) for program in programs]
        return dict(zip(programs, pool.map(measure, tasks), strict=True))


@dataclass(frozen=True)
class Verdict:
    """What became of a plan."""

    plan: Plan
    results: Mapping[str, Result]

    @cached_property
    def totals(self) -> dict[str, float]:
        """Bytes of a device for each program, with what lies beside it."""
        return {name: self.plan.total(name, result) for name, result in self.results.items()}

    @property
    def worst(self) -> str:
        """The program that needs the most."""
        return max(self.totals, key=lambda name: self.totals[name])

    @property
    def too_large(self) -> list[str]:
        """Programs that do not fit."""
        return [
            name
            for name, total in self.totals.items()
            if not self.results[name].fits or total > self.plan.limit
        ]

    @property
    def fits(self) -> bool:
        """Whether the run can be started."""
        return not self.too_large

    @property
    def problems(self) -> dict[str, str]:
        """What the compiler said of programs that failed for another reason than their size."""
        return {name: result.problem for name, result in self.results.items() if result.problem}


# ---------------------------------------------------------------------- the largest sizes


def largest_lanes(verdict: Verdict, measure: Measure) -> int:
    """Most lanes of a group whose rollout was seen to fit; 0 for none."""
    plan, held = verdict.plan, verdict.plan.sizes.held
    worst = max((p for p in ROLLOUT if p in verdict.results), key=lambda p: verdict.totals[p])
    if worst not in ("segment", "grow"):
        worst = "grow" if plan.sizes.grows else "segment"

    def peak_of(program: str) -> Callable[[int], float]:
        return lambda lanes: _total_at(plan, measure, program, lanes=lanes)

    slope = held["cache"] * (1.5 if worst == "grow" else 1.0)
    most = min(MOST_LANES, plan.sizes.wanted)
    start = plan.task.lanes, verdict.totals[worst]
    found = solve.largest(peak_of(worst), start, slope, plan.limit, most)
    if found <= plan.task.lanes or worst == "segment":
        return found
    # The loop needs temporaries of its own: seen to fit with so many lanes too, or as many as it allows.
    at_found = peak_of("segment")(found)
    if at_found <= plan.limit:
        return found
    return solve.largest(peak_of("segment"), (found, at_found), held["cache"], plan.limit, found - 1)


def largest_rows(verdict: Verdict, measure: Measure) -> int:
    """Most rows of a micro-batch, over all devices, that were seen to fit; 0 for none."""
    plan, result = verdict.plan, verdict.results["accumulate"]
    shares = plan.sizes.row_shares
    now = plan.task.rows // shares  # rows of a device
    if not result.fits and now > 1:
        slope = plan.limit / now
    else:  # no row takes more than all temporaries
        slope = max((result.peak - result.arguments) / now, 1.0)
    if not result.fits and now == 1:
        return 0

    def peak(rows: int) -> float:
        return _total_at(plan, measure, "accumulate", rows=rows * shares)

    return shares * solve.largest(peak, (now, verdict.totals["accumulate"]), slope, plan.limit, 64)


def _total_at(plan: Plan, measure: Measure, program: str, **sizes: Any) -> float:
    task = replace(plan.task, program=program, **sizes)
    return replace(plan, task=task).total(program, measure(task))


# ---------------------------------------------------------------------- what to change


def advice(verdict: Verdict, lanes: int | None = None, rows: int | None = None) -> list[str]:
    """What would make the run fit, the cheapest first.

    Args:
        verdict: of a run that does not fit.
        lanes: of a group that would fit, if known.
        rows: of a micro-batch that would fit, if known.
    """
    plan, config = verdict.plan, verdict.plan.task.config
    said: list[str] = []
    if any(program in ROLLOUT for program in verdict.too_large):
        said += _for_rollout(plan, lanes)
    if any(program in UPDATE for program in verdict.too_large):
        said += _for_update(plan, rows)
    if config.grpo.moments_dtype == "float32":
        freed = plan.sizes.held["moments"] / 2 / GIB
        said.append(f"set config.grpo.moments_dtype=bfloat16, which frees {freed:.1f} GiB a device")
    if not config.lora.rank:
        freed = sum(plan.sizes.held[name] for name in ("params", "moments", "gradients")) / GIB
        said.append(f"train an adapter (config.lora.rank=16), which frees most of {freed:.1f} GiB a device")
    if larger := larger_slice(plan.task.topology, plan.sizes.mesh[2]):
        said.append(f"take a larger slice, such as {larger}")
    return said


def _for_rollout(plan: Plan, lanes: int | None) -> list[str]:
    config, held, said = plan.task.config, plan.sizes.held, []
    if lanes and plan.lanes_asked:
        said.append(f"lower config.rollout.lanes to {lanes * plan.sizes.groups}")
    tensor = plan.sizes.mesh[2]
    room = plan.sizes.groups_here % 2 == 0 and 2 * tensor <= tensor_limit(plan.task.topology)
    if held["decode weights"] > 0.1 * plan.limit and room:
        freed = held["decode weights"] / 2 / GIB
        said.append(
            f"raise config.mesh.tensor to {2 * tensor}: halves the decode weights, {freed:.1f} GiB a device"
        )
    if not config.rollout.cache_dtype:
        said.append("set config.rollout.cache_dtype=int8, which halves the cache")
    said.append("lower config.rollout.max_response_tokens")
    return said


def _for_update(plan: Plan, rows: int | None) -> list[str]:
    config, said = plan.task.config, []
    if plan.task.rows > plan.sizes.row_shares:
        to = f" to {rows}" if rows else ""
        said.append(f"lower config.grpo.rows{to} (0: one for each of {plan.sizes.row_shares} parts)")
    if config.model.remat != "full":
        said.append("set config.model.remat=full")
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.grpo.row_length > longest:
        said.append(f"lower config.grpo.row_length to {longest}")
    if plan.sizes.mesh[0] > 1:
        said.append("put the devices of config.mesh.data into config.mesh.fsdp, which spreads the weights")
    return said


def larger_slice(topology: str, tensor: int) -> str:
    """The next larger slice of the same chip that takes so large a `config.mesh.tensor`; empty for none."""
    kind = topology.partition(":")[0]
    names = [f"{kind}:{shape}" for shape in CHIPS[kind].slices]
    larger = (name for name in names if chip_count(name) > chip_count(topology))
    return next((name for name in larger if tensor <= tensor_limit(name)), "")
