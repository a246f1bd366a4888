"""Runs that are killed, and the same line once more: as if nothing had happened, bit for bit.

`STEP_GRPO_TEST_KILLS=20` kills so many runs, each at another place; else a few suffice.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kill_worker import POINTS, TINY
from quick_xla import devices_flag
from safetensors.numpy import load_file
from short_run import ROOT, ShortRun, short_config

from step_grpo import checkpoint

KILLS = int(os.environ.get("STEP_GRPO_TEST_KILLS", "0"))
GROUPS = TINY["prompts_per_step"] * TINY["rollout"]["samples"]  # completions of a step
OF_THE_LANES = ("lane_use",)  # the figures that tell how the completions of a step were made
SEED = int(os.environ.get("STEP_GRPO_TEST_SEED", "0"))


class Worker:
    """`kill_worker.py` in a process of its own."""

    def __init__(self, compiled: Path):
        found = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        flags = {"XLA_FLAGS": devices_flag(1)}
        flags |= {  # every run compiles the same programs
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "kill_worker.py")],
            env={**os.environ, "PYTHONPATH": found, **flags},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir: Path, **task) -> tuple[int, str]:
        """Exit code, or minus the signal, and what was printed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"workdir": str(workdir), **task}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["printed"]

    def close(self) -> None:
        """Ends it."""
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    made = Worker(tmp_path_factory.mktemp("compiled"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(worker, tmp_path_factory) -> ShortRun:
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, printed = worker.run(workdir)
    assert code == 0, printed
    return ShortRun(short_config(TINY), workdir, printed)


def assert_equal(workdir: Path, whole: ShortRun, *free: str) -> None:
    """Metrics but the `free` ones, completions, evaluations and weights are of the uninterrupted run."""
    rollouts = [(r / "rollouts.jsonl").read_text() for r in (workdir, whole.workdir)]
    assert rollouts[0] == rollouts[1]
    run = ShortRun(whole.config, workdir, "")
    for line, there in zip(run.metrics, whole.metrics, strict=True):
        assert {**line, **dict.fromkeys(free)} == {**there, **dict.fromkeys(free)}
    for name in ("before", "after"):
        assert run.completions(name) == whole.completions(name)
        assert run.result[name] == whole.result[name]
    assert run.result["exits"] == whole.result["exits"]
    ours, theirs = (load_file(r.workdir / "export" / "model.safetensors") for r in (run, whole))
    assert all(np.array_equal(ours[name].view(np.uint8), theirs[name].view(np.uint8)) for name in theirs)
    names = [sorted(p.name for p in (r.workdir / "checkpoints").iterdir()) for r in (run, whole)]
    assert names[0] == names[1] == ["000002", "000003"]


def chosen(at: str, rng: random.Random) -> dict:
    """A kill somewhere in or after a call of a point."""
    return {"at": at, "call": rng.randint(1, POINTS[at]), "delay": rng.choice([0, 0.002, 0.02, 0.2])}


def test_run_killed_in_several_stages_is_the_uninterrupted_one(worker, whole, tmp_path):
    """In the first evaluation's writing, a save, the update behind it, and the export, one by one."""
    kills = [
        {"at": "step_grpo.main.write_completions", "call": 1},
        {"at": "step_grpo.checkpoint.Saver._complete", "call": 2, "delay": 0.01},
        {"at": "step_grpo.main.update_policy", "call": 1, "delay": 0.005},
        {"at": "step_grpo.main.export_model", "call": 1, "now": True},
    ]
    for kill in kills:
        code, printed = worker.run(tmp_path / "run", kill=kill)
        assert code == -9, printed
        assert not (tmp_path / "run" / "result.json").exists()  # it would say that the run is finished
    code, printed = worker.run(tmp_path / "run")
    assert code == 0, printed
    assert "evaluation before" not in printed  # the third run had paid for it
    assert_equal(tmp_path / "run", whole)


@pytest.mark.skipif(not KILLS, reason="STEP_GRPO_TEST_KILLS says how many")
def test_run_killed_anywhere_is_the_uninterrupted_one(worker, whole, tmp_path):
    rng, points = random.Random(SEED), list(POINTS)
    for number in range(KILLS):
        kill = chosen(points[number % len(points)], rng)
        code, printed = worker.run(tmp_path / f"run{number}", kill=kill)
        if code == 0:  # the delay was longer than the rest of the run
            shutil.rmtree(tmp_path / f"run{number}")
            kill |= {"now": True, "delay": 0}
            code, printed = worker.run(tmp_path / f"run{number}", kill=kill)
        assert code == -9, (kill, printed)
        code, printed = worker.run(tmp_path / f"run{number}")
        assert code == 0, (kill, printed)
        assert_equal(tmp_path / f"run{number}", whole)


STOPS = {
    "step_grpo.main.load_model": "stopped before there was anything to save; run the same line again",
    "step_grpo.main.evaluate": "stopped; run the same line again: it begins anew",
    "step_grpo.main.update_policy": "it goes on from {}/000001",
    "step_grpo.checkpoint.Saver._complete": "it goes on from {}/000002",
    "step_grpo.main.export_model": "it goes on from {}/000003",
}


def test_asked_to_stop_at_any_other_place_the_run_ends_well_and_goes_on_exactly(worker, whole, tmp_path):
    """SIGTERM while the model loads, in the first evaluation, an update, a save, and the last export."""
    for at, told in STOPS.items():
        kill = {"at": at, "signal": 15, "now": True}
        code, printed = worker.run(tmp_path / "run", kill=kill)
        assert code == 0, printed
        assert told.format(tmp_path / "run" / "checkpoints") in printed and "Traceback" not in printed
        assert not (tmp_path / "run" / "result.json").exists()
    code, printed = worker.run(tmp_path / "run")
    assert code == 0, printed
    assert_equal(tmp_path / "run", whole, *OF_THE_LANES)


def test_asked_to_stop_in_a_rollout_the_run_keeps_what_is_finished_and_goes_on_exactly(
    worker, whole, tmp_path
):
    """SIGTERM when the first lane of the second step is done, with nothing saved so far."""
    finished = "step_grpo.rollout.engine.completion_of"
    made = TINY["eval"]["questions"] + GROUPS
    kill = {"at": finished, "call": made + 1, "signal": 15, "now": True}
    rarely = {"save_every": 3}
    code, printed = worker.run(tmp_path / "run", kill=kill, changes=rarely)
    folder = tmp_path / "run" / "checkpoints" / "000001"
    assert code == 0, printed
    assert f"stopped; run the same line again: it goes on from {folder}" in printed
    assert "SIGTERM: saving what is done" in printed and "Traceback" not in printed
    assert [path.name for path in checkpoint.saved_steps(tmp_path / "run")] == ["000001"]
    assert not (tmp_path / "run" / "result.json").exists()
    (file,) = (tmp_path / "run" / "partial_rollout").iterdir()
    assert file.name == "step_000002-0.npz"
    with np.load(file) as held:
        kept = len(json.loads(held["rows"].tobytes()))
    assert 1 <= kept < GROUPS
    code, printed = worker.run(tmp_path / "run", count=finished)
    assert code == 0, printed
    again = 2 * GROUPS + TINY["eval"]["questions"]  # steps 2 and 3, and the last evaluation
    assert f"called {again - kept} times" in printed and "warning" not in printed.replace("warning: step", "")
    assert not list((tmp_path / "run" / "partial_rollout").iterdir())
    assert_equal(tmp_path / "run", whole, *OF_THE_LANES)
