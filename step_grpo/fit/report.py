"""What the check prints."""

from collections.abc import Sequence

from rich.table import Table

from step_grpo.fit.architectures import architecture_of
from step_grpo.fit.check import Plan, Verdict
from step_grpo.fit.chips import GIB, chip_count
from step_grpo.fit.estimate import LANE_USE, LINK_SHARE, MEMORY_SHARE, PRODUCT_SHARE, RESPONSE_SHARE, estimate
from step_grpo.mesh import AXES
from step_grpo.model.qwen import config_from_hf


def of_run(plan: Plan) -> str:
    """What is checked, in a few lines."""
    config, sizes, topology = plan.task.config, plan.sizes, plan.task.topology
    rollout = config.rollout
    mesh = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes.mesh, strict=True))
    device = "a device" if plan.chip.devices > 1 else "a chip"
    lanes = "asked for" if plan.lanes_asked else "what the run itself would take"
    return (
        f"{config.model.checkpoint or 'random weights'}: {sizes.numbers / 1e9:.2f} billion weights, "
        f"{rollout.max_prompt_tokens} + {rollout.max_response_tokens} tokens, G = {rollout.samples}\n"
        f"{topology}: {chip_count(topology)} chips with {plan.chip.devices} device each, "
        f"{plan.chip.hbm / GIB:.2f} GiB {device}; mesh {mesh}\n"
        f"{plan.task.lanes} lanes in each of {sizes.groups} groups ({lanes}), "
        f"{plan.task.rows} rows of {config.grpo.row_length} tokens a micro-batch"
    )


def of_arrays(plan: Plan) -> Table:
    """What lies on a device."""
    table = Table("array", "GiB a device", title="Arrays of the run")
    notes = {"cache": ", of a lane", "prompts": ", of a lane", "embeddings": ", of the weights above"}
    for name, size in plan.sizes.held.items():
        shown = name + notes.get(name, "")
        table.add_row(shown, f"{size / GIB:.2f}")
    return table


def of_programs(verdict: Verdict) -> Table:
    """What each program needs."""
    table = Table(
        "program", "peak", "of it beside", "temporaries", "of the chip", "seconds", title="GiB a device"
    )
    for name, result in verdict.results.items():
        total = verdict.totals[name]
        share = f"{total / verdict.plan.chip.hbm:.0%}" + (
            " does not fit" if name in verdict.too_large else ""
        )
        cells = (total, total - result.peak, result.temporaries)
        shown = ["?" if result.problem else f"{cell / GIB:.2f}" for cell in cells]
        table.add_row(name, *shown, "failed" if result.problem else share, f"{result.seconds:.0f}")
    return table


def of_largest(plan: Plan, lanes: int, rows: int) -> str:
    """The most that was seen to fit."""
    of_all = lanes * plan.sizes.groups
    return (
        f"most lanes seen to fit: {lanes} a group, {of_all} in all (config.rollout.lanes={of_all})\n"
        f"most rows of a micro-batch seen to fit: {rows} (config.grpo.rows={rows})"
    )


def of_traffic(verdict: Verdict) -> Table:
    """What the devices exchange."""
    title = "Collectives of one run of each program; of a loop of unknown length, of one round"
    table = Table("program", "kind", "times", "MiB", "", title=title)
    for name, result in verdict.results.items():
        for kind in result.traffic:
            note = "a round" if kind.each_round else ""
            table.add_row(name, kind.kind, str(kind.times), f"{kind.bytes / 2**20:.1f}", note)
    return table


def of_time(verdict: Verdict) -> str:
    """FLOPs and an estimate of the time of a step."""
    plan = verdict.plan
    config, sizes = plan.task.config, plan.sizes
    segment = verdict.results["segment"].traffic
    exchanged = sum(kind.bytes for kind in segment if kind.each_round)
    found = estimate(
        config_from_hf(architecture_of(config.model)),
        config,
        plan.chip,
        chip_count(plan.task.topology),
        plan.task.lanes,
        sizes.groups,
        exchanged,
    )
    return (
        f"FLOPs of a step, over all chips: rollout {found.rollout_flops:.2e}, log-probs "
        f"{found.logprob_flops:.2e}, update {found.update_flops:.2e}\n"
        f"An estimate of a step's time, nothing was run: {found.seconds / 60:.0f} min = prefill "
        f"{found.prefill_seconds / 60:.1f} + decode {found.decode_seconds / 60:.0f} + log-probs "
        f"{found.logprob_seconds / 60:.1f} + update {found.update_seconds / 60:.1f}\n"
        f"  assumed: {PRODUCT_SHARE:.0%} of the peak in products, {MEMORY_SHARE:.0%} of the memory's and "
        f"{LINK_SHARE:.0%} of the links' bandwidth while decoding, {LANE_USE:.0%} of the lanes busy, "
        f"responses of {RESPONSE_SHARE:.0%} of the longest"
    )


def of_problems(verdict: Verdict) -> str:
    """What did not compile, in the first line of the compiler's own words; that says nothing of its size."""
    plan = verdict.plan
    lines = [f"{program}: {problem.splitlines()[0]}" for program, problem in verdict.problems.items()]
    return "\n".join([f"It does not compile for {plan.task.topology}:", *(f"- {line}" for line in lines)])


def of_failure(verdict: Verdict, advice: Sequence[str]) -> str:
    """Why it does not fit, and what would help."""
    plan, name = verdict.plan, verdict.worst
    lines = [
        f"It does not fit {plan.task.topology}: {name} needs {verdict.totals[name] / GIB:.2f} GiB of "
        f"{plan.chip.hbm / GIB:.2f} GiB a device."
    ]
    return "\n".join([*lines, "What would help:", *(f"- {line}" for line in advice)])
