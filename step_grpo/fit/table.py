"""The smallest slice of each chip for each Qwen3: `python -m step_grpo.fit.table --out=docs/fit.md`.

Slices and meshes are tried from the smallest on. What cannot fit by counting arrays is passed over; of the
rest the programs that decide are compiled with full effort, and the first that fits is the answer. Every
result goes to a file of JSON lines (`--cache`) at once, so that the command can be interrupted and goes on
where it was; remove the file after a change of the model or the update.

`--only=Qwen3-8B` restricts it to some models, by a part of their names.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from step_grpo import cli
from step_grpo.config import base_config
from step_grpo.errors import UserError
from step_grpo.fit.architectures import PUBLISHED
from step_grpo.fit.check import SIDE_BY_SIDE, Measure, Plan, Verdict, compile_all
from step_grpo.fit.chips import CHIPS, GIB, chip_count, chip_of
from step_grpo.fit.compile import Result, Task, decoded, measure, measure_many_sizes, require_libtpu
from step_grpo.fit.programs import Sizes, chosen_lanes
from step_grpo.model.qwen import abstract_params, config_from_hf

MODELS = tuple(name for name in PUBLISHED if name.startswith("Qwen/"))
TENSORS = (1, 2, 4)  # as many as every host has devices
MODES = {"full": 0, "LoRA": 16}  # the rank of the adapter
MOMENTS = {"full": ("float32", "bfloat16"), "LoRA": ("float32",)}
DECIDING = ("weights", "grow", "apply", "accumulate", "segment")  # the quickest to compile first
MOST_SLICES = 3  # looked at, from the smallest that may hold the arrays
WORKING = 0.25  # GiB that a layer takes in the update for every thousand of its width, about
Many = Callable[[Sequence[Task]], list[Sizes | str]]


@dataclass(frozen=True)
class Cell:
    """What is looked for: a model on a chip."""

    model: str
    chip: str
    mode: str = "full"  # one of MODES


class Found(NamedTuple):
    """The smallest slice for a cell."""

    topology: str
    mesh: tuple[int, int, int]
    moments: str
    lanes: int  # over all devices
    worst: str  # program
    peak: float  # its bytes of a device

    @property
    def text(self) -> str:
        """As it stands in the table."""
        _, fsdp, tensor = self.mesh
        hbm = chip_of(self.topology).hbm
        note = ", bf16 moments" if self.moments == "bfloat16" else ""
        return (
            f"{self.topology} (fsdp {fsdp}, tensor {tensor}{note}): {self.peak / GIB:.1f} GiB, "
            f"{self.peak / hbm:.0%}, in {self.worst}; {self.lanes} lanes"
        )


def main(out: str = "docs/fit.md", cache: str = "docs/fit.jsonl", only: str = "") -> None:
    """Finds every cell and writes the table."""
    require_libtpu()
    models = [model for model in MODELS if only in model]
    if not models:
        raise UserError(f"--only={only}: no such model; there are {', '.join(MODELS)}")
    known = Remembered(Path(cache), measure)
    cells = [Cell(model, chip, mode) for mode in MODES for model in models for chip in CHIPS]
    found: dict[Cell, Found | None] = {}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        answers = pool.map(lambda cell: search(cell, known, measure_many_sizes), cells)
        for cell, answer in zip(cells, answers, strict=True):
            found[cell] = answer
            print(f"{cell.model} on {cell.chip}, {cell.mode}: {text_of(answer)}", flush=True)
            Path(out).write_text(render(found), encoding="utf-8")


# ---------------------------------------------------------------------- the search


def config_for(cell: Cell, tensor: int, moments: str) -> ConfigDict:
    """The paper's run of a model."""
    config = base_config().unlock()
    config.model.checkpoint = cell.model
    config.lora.rank = MODES[cell.mode]
    config.mesh.tensor = tensor
    config.grpo.moments_dtype = moments
    return config.lock()


def candidates(cell: Cell, sizes_of: Many) -> Iterator[Plan]:
    """Ways to spread the run that may fit by counting, the smallest slices first.

    Of one slice those with full moments come first, and then those with room for more lanes.
    """
    names = [name for name in slices(cell.chip) if at_least(cell, name) < chip_of(name).hbm][:MOST_SLICES]
    tasks = [
        Task(config_for(cell, tensor, moments), name, "")
        for name in names[:MOST_SLICES]
        for moments in MOMENTS[cell.mode]
        for tensor in TENSORS
        if chip_count(name) * CHIPS[cell.chip].devices % tensor == 0
    ]
    plans = []
    for task, sizes in zip(tasks, sizes_of(tasks), strict=True):
        if isinstance(sizes, str):
            continue
        lanes = chosen_lanes(sizes, task.topology)
        sized = replace(task, lanes=lanes, rows=sizes.row_shares)
        plan = Plan(sized, sizes, chip_of(task.topology), lanes_asked=False)
        if lanes and counted(plan) <= plan.limit:
            plans.append(plan)
    yield from sorted(plans, key=rank)


def slices(chip: str) -> list[str]:
    """Those of a chip, the smallest first."""
    return [f"{chip}:{shape}" for shape in CHIPS[chip].slices]


def at_least(cell: Cell, topology: str) -> float:
    """Bytes of a device for weights, two sums of gradients, moments and reference in bfloat16, evenly spread.

    Of an adapter, for the weights of which it is one.
    """
    shapes = abstract_params(config_from_hf(PUBLISHED[cell.model]))
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    each = 2.0 if MODES[cell.mode] else 18.0
    return each * numbers / (chip_count(topology) * chip_of(topology).devices)


def rank(plan: Plan) -> tuple[int, bool, int]:
    """By chips, then full moments, then lanes."""
    halved = plan.task.config.grpo.moments_dtype != "float32"
    return chip_count(plan.task.topology), halved, -plan.task.lanes * plan.sizes.groups


def counted(plan: Plan) -> float:
    """Bytes of a device that the backward pass needs at least.

    The arrays of the run, the gradients of a micro-batch beside their sum, half as much as the weights for
    them in bfloat16, and what is kept of every layer.
    """
    held, config = plan.sizes.held, plan.task.config
    cfg = config_from_hf(PUBLISHED[config.model.checkpoint])
    kept = cfg.layers * config.grpo.row_length * cfg.width * 2
    arrays = sum(
        held[name] for name in ("params", "moments", "reference", "gradients", "gradients", "batches")
    )
    return arrays + held["params"] / 2 + kept + WORKING * cfg.width / 1000 * GIB


def search(cell: Cell, measured: Measure, sizes_of: Many) -> Found | None:
    """The first candidate that fits; None if none does."""
    for plan in candidates(cell, sizes_of):
        verdict = Verdict(plan, {})
        for name in DECIDING:
            if name in plan.programs and verdict.fits:
                verdict = Verdict(plan, {**verdict.results, **compile_all(plan, measured, [name])})
        if verdict.fits:
            return Found(
                plan.task.topology,
                plan.sizes.mesh,
                plan.task.config.grpo.moments_dtype,
                plan.task.lanes * plan.sizes.groups,
                verdict.worst,
                verdict.totals[verdict.worst],
            )
    return None


# ---------------------------------------------------------------------- what is kept


class Remembered:
    """A measure whose results are kept in a file of JSON lines; it may be called from several threads."""

    def __init__(self, path: Path, measure: Measure):
        self.path, self.measure = path, measure
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        self.known: dict[str, dict[str, Any]] = {record["task"]: record["result"] for record in records}
        self._writing = threading.Lock()

    def __call__(self, task: Task) -> Result:
        """The result of a task, compiled if it is new."""
        key = name_of(task)
        if key not in self.known:
            result = self.measure(task)
            if result.problem:
                return result
            self.known[key] = result._asdict()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._writing, self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": key, "result": self.known[key]}) + "\n")
        return decoded(self.known[key])


def name_of(task: Task) -> str:
    """All that a result depends on, in words."""
    config = task.config
    mesh = "x".join(str(config.mesh[axis]) for axis in ("data", "fsdp", "tensor"))
    return (
        f"{config.model.checkpoint} rank {config.lora.rank} {task.topology} mesh {mesh} "
        f"moments {config.grpo.moments_dtype} "
        f"{task.program} lanes {task.lanes} rows {task.rows}"
    )


# ---------------------------------------------------------------------- the page

INTRODUCTION = """\
# What fits where

The smallest slice of each chip that holds a run with the paper's settings: 2048 + 16384 tokens, G = 5,
AdamW, and the reference. Made by `python -m step_grpo.fit.table`: the programs that decide (the backward
pass, AdamW, the decode loop, the growth of its cache, the weights that it reads) were compiled for the slice
with full effort. Nothing was run.

The figure is what a device needs at the fullest moment of the run, all other arrays included, its share of
the device's memory, and the program in which that is. Lanes are those that the run itself would take, over
all devices. A chip of tpu7x has two devices. On v5e and v6e slices of several hosts the compiler refuses most
rollouts whose weights are spread over a host's devices: `none` where they do not fit one device.
At most three slices of a chip were tried, from the smallest that may hold the arrays."""


def text_of(found: Found | None) -> str:
    """As it stands in the table."""
    return found.text if found else "none of its slices"


def render(found: dict[Cell, Found | None]) -> str:
    """The page in Markdown, a table for each mode."""
    lines = INTRODUCTION.splitlines()
    for mode in dict.fromkeys(cell.mode for cell in found):
        title = f"LoRA of rank {MODES[mode]}" if MODES[mode] else "Full fine-tuning"
        lines += ["", f"## {title}", "", f"| | {' | '.join(CHIPS)} |", f"|---{'|---' * len(CHIPS)}|"]
        for model in dict.fromkeys(cell.model for cell in found if cell.mode == mode):
            cells = [Cell(model, chip, mode) for chip in CHIPS]
            texts = [text_of(found[cell]) if cell in found else "not compiled yet" for cell in cells]
            lines.append(f"| {model.removeprefix('Qwen/')} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main)
