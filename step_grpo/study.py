"""Every method trained and evaluated alike, in one table and one picture.

`python -m step_grpo.study --config=configs/study_tiny.py --workdir=DIR`

Each row of the table is a short list of commands: a training, if it has one, and an evaluation on every
split, for each seed; the pictured split once more in static batches, to see what refilling lanes saves; and
last, probes of its completions, to see whether their confidence can be trusted. They run one after the other,
each in a process of its own; what is finished is not run again, so the same line goes on where it was
stopped. `results.json`, `results.md`, `results.tex`, `pareto.png` and `calibration.png` are written anew
after every row. With `--beside=results/study_tiny/results.json` a row of your own stands among those that
were run before, in the time that it and the first row take.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from step_grpo import cli
from step_grpo.errors import UserError
from step_grpo.study_config import validate_study
from step_grpo.study_results import PROBES, STATIC, TRAINING, Results, read_earlier, write_results

TRAINERS = {
    "train": "step_grpo.main",
    "imitate": "step_grpo.imitate",
    "verifier": "step_grpo.train_verifier",
}
PROBE = "probe"
OTHERS = {"evaluate": "step_grpo.evaluate", PROBE: "step_grpo.probing"}
FINISHED = {
    **dict.fromkeys(TRAINERS, "result.json"),
    "evaluate": "evaluation.json",
    PROBE: "calibration.json",
}
UNTRAINED = "untrained"  # the seeds of such a row differ in their sampling alone
VERIFIER = "verifier"  # what is trained only judges the untrained model


@dataclass(frozen=True)
class Stage:
    """One command of a row.

    Attributes:
        row: name of the row.
        seed: of the run.
        kind: one of `TRAINERS`, `evaluate` or `probe`.
        folder: where the command writes.
        command: what follows `python`.
    """

    row: str
    seed: int
    kind: str
    folder: Path
    command: tuple[str, ...]

    @property
    def title(self) -> str:
        """As it is told while it runs."""
        return f"{self.row}, seed {self.seed}: {self.kind} {self.folder.name}"

    @property
    def finished(self) -> bool:
        """Whether it has run to its end."""
        return (self.folder / FINISHED[self.kind]).is_file()


def main(config: ConfigDict, workdir: Path = Path("workdir/study"), only: str = "", beside: str = "") -> None:
    """Runs what is not finished, and writes the results.

    `--only=ROW,ROW` restricts it to some rows. `--beside=FILE`, a `results.json` of the same study, puts the
    rows that it has into the tables as they are; they are not run here, unless `--only` names them.
    """
    validate_study(config)
    earlier = read_earlier(Path(beside), config) if beside else None
    base, *others = chosen_rows(config, only)
    if earlier is not None and not only:
        others = [row for row in others if row not in earlier["rows"]]
    rows = [base, *others]
    plan = {row: list(stages_of(row, config, workdir)) for row in rows}
    everything = [stage for stages in plan.values() for stage in stages]
    check_unchanged(everything)
    clock = Clock(workdir / "seconds.json", config.seconds.to_dict())
    left = [stage for stage in everything if not stage.finished]
    print(f"{len(rows)} rows, {len(everything)} commands, {len(left)} to run: about {clock.told(left)}")
    failed: list[str] = []
    written = False
    for row, stages in plan.items():
        known = is_finished(stages)
        failed += run_row(stages, left, workdir, clock)
        if is_finished(stages):
            print(f"{row} is finished", flush=True)
        if is_finished(stages) and not known:
            written = write_finished(config, workdir, plan, earlier) or written
    if not written:
        write_finished(config, workdir, plan, earlier)
    if failed:
        raise UserError(
            f"{len(failed)} commands failed, and what follows from them was left out: {failed[0]}"
        )
    print(f"table: {workdir / 'results.md'}\npictures: {workdir / 'pareto.png'}, calibration.png beside it")


def write_finished(
    config: ConfigDict, workdir: Path, plan: Mapping[str, Sequence[Stage]], earlier: Results | None
) -> bool:
    """Writes the results of the rows that are finished; False where the first is not, for want of a base."""
    rows = [row for row, stages in plan.items() if is_finished(stages)]
    if rows[:1] != [config.order[0]]:
        return False
    write_results(config, workdir, rows, earlier)
    print(f"the table so far, of {len(rows)} rows: {workdir / 'results.md'}", flush=True)
    return True


def is_finished(stages: Sequence[Stage]) -> bool:
    """Whether all commands of a row have run to their end."""
    return all(stage.finished for stage in stages)


def chosen_rows(config: ConfigDict, only: str) -> list[str]:
    """The rows to run; the one that all are compared with is the first.

    Raises:
        UserError: there is no such row.
    """
    names = [name for name in only.split(",") if name] or config.order
    for name in names:
        if name not in config.order:
            raise UserError(f"--only={only}: no row {name!r}; there are {', '.join(config.order)}")
    base, *others = config.order
    return [base, *(name for name in others if name in names)]


# ---------------------------------------------------------------------- the commands


def stages_of(row: str, config: ConfigDict, workdir: Path) -> Iterator[Stage]:
    """The commands of a row, in the order in which they must run."""
    settings = config.rows[row]
    probe: list[Stage] = []
    for seed in config.seeds:
        folder = workdir / "rows" / row / f"seed{seed}"
        checkpoint = config.checkpoint
        asked: tuple[str, ...] = ()
        if settings.kind != UNTRAINED:
            overrides = (*config.train, *settings.train)
            out = folder / TRAINING
            command = command_of(settings.kind, config, seed, out, overrides)
            yield Stage(row, seed, settings.kind, out, command)
            if settings.kind == VERIFIER:
                asked = ("eval.exit=verifier", f"rollout.verifier.checkpoint={out / 'export'}")
            else:
                checkpoint = str(out / "export")
        for split, of_split in config.splits.items():
            overrides = (*config.evaluate, *of_split, *settings.evaluate, *asked)
            out = folder / split
            command = command_of("evaluate", config, seed, out, overrides, f"--checkpoint={checkpoint}")
            yield Stage(row, seed, "evaluate", out, command)
            if split == config.pictured and seed == config.seeds[0]:
                out = folder / f"{split}_{STATIC}"
                overrides = (*overrides, "rollout.rebatch=False")
                command = command_of("evaluate", config, seed, out, overrides, f"--checkpoint={checkpoint}")
                yield Stage(row, seed, "evaluate", out, command)
                probe = probe_stages(row, config, folder, checkpoint, overrides[:-1])
    yield from probe  # behind all that the table of a row needs


def probe_stages(
    row: str, config: ConfigDict, folder: Path, checkpoint: str, overrides: Sequence[str]
) -> list[Stage]:
    """The probes of a row's first seed; none where its completions are cut short and hold few triggers.

    Args:
        row: name of the row.
        config: of the study.
        folder: of the row's first seed.
        checkpoint: that was evaluated.
        overrides: of the evaluation whose completions are probed.
    """
    exits = [text.partition("=")[2] for text in overrides if text.startswith("eval.exit=")]
    if exits and exits[-1] != "none":
        return []
    seed, out = config.seeds[0], folder / PROBES
    flags = (
        f"--checkpoint={checkpoint}",
        f"--completions={folder / config.pictured / 'completions.jsonl'}",
        f"--questions={config.probed_questions}",
    )
    return [Stage(row, seed, PROBE, out, command_of(PROBE, config, seed, out, overrides, *flags))]


def command_of(
    kind: str, config: ConfigDict, seed: int, out: Path, overrides: Sequence[str], *flags: str
) -> tuple[str, ...]:
    """What follows `python`: the module, the config file with its overrides, and the folder."""
    module = (TRAINERS | OTHERS)[kind]
    fields = [f"seed={seed}", *overrides]
    if kind in TRAINERS:
        fields.insert(1, f"model.checkpoint={config.checkpoint}")
    return (
        *("-m", module, f"--config={config.config}", f"--workdir={out}", *flags),
        *(f"--config.{field}" for field in fields),
    )


def check_unchanged(stages: Sequence[Stage]) -> None:
    """Refuses to go on in folders that were made by other commands.

    Raises:
        UserError: naming the folder.
    """
    for stage in stages:
        noted = stage.folder / "command.json"
        if noted.is_file() and tuple(json.loads(noted.read_text(encoding="utf-8"))) != stage.command:
            raise UserError(
                f"--workdir: {stage.folder} was made with other settings than the config has now; remove "
                "that folder, or name another workdir"
            )


def run_row(stages: Sequence[Stage], left: list[Stage], workdir: Path, clock: "Clock") -> list[str]:
    """Runs what is not finished of a row, and takes it out of `left`; what failed, a line each.

    What follows a command that failed for the same seed is not run.
    """
    failed: dict[int, str] = {}
    for stage in stages:
        if stage.finished:
            continue
        if stage.seed not in failed:
            print(f"{stage.title} (about {clock.told([stage])}; in all {clock.told(left)} left)", flush=True)
            if problem := run_stage(stage, workdir, clock):
                print(problem, flush=True)
                failed[stage.seed] = problem
        left.remove(stage)
    return list(failed.values())


def run_stage(stage: Stage, workdir: Path, clock: "Clock") -> str:
    """Runs one command; what went wrong, or nothing."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / "command.json").write_text(json.dumps(stage.command) + "\n", encoding="utf-8")
    log = stage.folder / "log.txt"
    began = time.monotonic()
    code = run_python(stage.command, log, workdir / "compiled")
    if code or not stage.finished:
        return f"{stage.title} ended with {code}; see {log}, or run: python {shlex.join(stage.command)}"
    clock.note(stage, time.monotonic() - began)
    return ""


def run_python(command: Sequence[str], log: Path, compiled: Path) -> int:
    """Runs `python` with these arguments, what it says behind what is in `log`; its exit status.

    What it compiles is kept in `compiled` for the commands after it, and glibc takes memory in huge pages
    where the kernel hands them out on request, unless the environment says otherwise.
    """
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # of Linux alone; elsewhere nothing reads it
    }
    with log.open("a", encoding="utf-8") as said:
        return subprocess.run(
            [sys.executable, *command], stdout=said, stderr=said, env={**kept, **os.environ}, check=False
        ).returncode


# ---------------------------------------------------------------------- how long it takes


class Clock:
    """How long commands take: what the config expects, until one of that kind has run in this workdir."""

    def __init__(self, path: Path, expected: Mapping[str, float]):
        self.path, self.expected = path, expected
        self.known: dict[str, list[float]] = {}
        if path.is_file():
            self.known = json.loads(path.read_text(encoding="utf-8"))

    def note(self, stage: Stage, seconds: float) -> None:
        """A command of this kind took so long."""
        self.known.setdefault(stage.kind, []).append(round(seconds, 1))
        self.path.write_text(json.dumps(self.known) + "\n", encoding="utf-8")

    def seconds(self, stages: Sequence[Stage]) -> float:
        """An estimate for commands that run one after the other."""
        means = {kind: sum(times) / len(times) for kind, times in self.known.items()}
        return sum(means.get(stage.kind, self.expected[stage.kind]) for stage in stages)

    def told(self, stages: Sequence[Stage]) -> str:
        """The estimate in words."""
        minutes = round(self.seconds(stages) / 60)
        return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(minutes, 1)} min"


if __name__ == "__main__":
    cli.run(main)
