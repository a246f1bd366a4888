"""Runs that are killed, and the same line once more: as if nothing had happened, bit for bit.

`STEP_GRPO_TEST_KILLS=20` kills so many runs, each at another place; else a few suffice.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kill_worker import POINTS, TINY
from safetensors.numpy import load_file
from short_run import ROOT, ShortRun, short_config

from step_grpo import checkpoint

KILLS = int(os.environ.get("STEP_GRPO_TEST_KILLS", "0"))
GROUPS = TINY["prompts_per_step"] * TINY["rollout"]["samples"]  # completions of a step
OF_THE_LANES = ("lane_use",)  # the figures that tell how the completions of a step were made
SEED = int(os.environ.get("STEP_GRPO_TEST_SEED", "0"))


class Worker:
    """`kill_worker.py` in a process of its own."""

    def __init__(self):
        found = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
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
def worker():
    made = Worker()
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
    """In the first evaluation's writing, in a save, and in the update behind it, one behind the other."""
    kills = [
        {"at": "step_grpo.main.write_completions", "call": 1},
        {"at": "step_grpo.checkpoint.Saver._complete", "call": 2, "delay": 0.01},
        {"at": "step_grpo.main.update_policy", "call": 1, "delay": 0.005},
    ]
    for kill in kills:
        code, printed = worker.run(tmp_path / "run", kill=kill)
        assert code == -9, printed
    code, printed = worker.run(tmp_path / "run")
    assert code == 0, printed
    assert "evaluation before" not in printed  # the third run had paid for it
    assert_equal(tmp_path / "run", whole)


@pytest.mark.skipif(not KILLS, reason="STEP_GRPO_TEST_KILLS says how many")
def test_run_killed_anywhere_is_the_uninterrupted_one(worker, whole, tmp_path):
    rng, points, killed = random.Random(SEED), list(POINTS), 0
    for number in range(KILLS):
        kill = chosen(points[number % len(points)], rng)
        code, printed = worker.run(tmp_path / f"run{number}", kill=kill)
        assert code in (-9, 0), (kill, printed)  # 0: the delay was longer than the rest of the run
        killed += code == -9
        code, printed = worker.run(tmp_path / f"run{number}")
        assert code == 0, (kill, printed)
        assert_equal(tmp_path / f"run{number}", whole)
    print(f"{killed} runs of {KILLS} were killed, all went on to the same end")


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
