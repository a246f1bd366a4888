"""The parts of the soak, and a few seconds of it around a job that does nothing but survive."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from short_run import short_config

from benchmarks import soak
from step_grpo.data.sources import load_questions
from step_grpo.errors import UserError


def test_growth_is_the_end_against_a_sixth_of_the_time():
    samples = [(float(t), 100 + (5 if t > 80 else 0), 7) for t in range(121)]
    assert soak.growth(samples) == {"memory_growth": pytest.approx(0.05), "files_growth": 0}
    assert soak.growth(samples[:3]) == {"memory_growth": None, "files_growth": None}


def test_questions_have_bad_rows_that_are_dropped_with_a_count_or_refused(tmp_path):
    path = tmp_path / "questions.jsonl"
    soak.write_questions(path)
    fields = {"source": "jsonl", "name": str(path), "prompt_column": "question", "answer_column": "answer"}
    config = short_config({"data": {**fields, "bad_rows": "drop"}})
    questions = load_questions(config.data)
    assert (len(questions), questions.dropped) == (40, len(soak.FORGED))
    with pytest.raises(UserError, match="line 1: column 'question' is null"):
        load_questions(short_config({"data": fields}).data)


CHILD = """
import signal, subprocess, sys
sleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "_grading_worker.py"])
other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print("ready", flush=True)
sleep.wait()
signal.signal(signal.SIGTERM, lambda *_: None)
print(sleep.returncode, flush=True)
sys.stdin.read()
"""


def test_grading_worker_is_killed_and_a_handler_is_seen():
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    assert process.stdout.readline() == "ready\n"
    assert not soak.listens(process.pid)
    assert soak.kill_a_grader(process.pid, random.Random(0))
    assert process.stdout.readline() == "-9\n"
    assert soak.listens(process.pid)
    assert not soak.kill_a_grader(process.pid, random.Random(0))
    memory, files = soak.held_by(process.pid)
    assert memory > 1e6 and files >= 3
    process.communicate()


def test_newest_checkpoint_is_cut_only_where_there_is_one_before(tmp_path):
    for step in ("000001", "000002"):
        folder = tmp_path / "checkpoints" / step
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x" * 100)
        (folder / "run.json").write_text("{}")
        assert soak.cut_newest(tmp_path) == (step == "000002")
    sizes = [os.path.getsize(tmp_path / "checkpoints" / s / "weights") for s in ("000001", "000002")]
    assert sizes == [100, 99]


# A run as the soak sees it: steps, checkpoints, a grading worker.
JOB = r"""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

workdir, steps, broken = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
asked = []
workdir.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
(workdir / ".lock").touch()
worker = [sys.executable, "-SEc", "import sys; sys.stdin.read()", "_grading_worker.py"]
start = lambda: subprocess.Popen(worker, stdin=subprocess.PIPE)

def whole(folder):
    run = folder / "run.json"
    return run.exists() and (folder / "weights").stat().st_size == json.loads(run.read_text())["size"]

def saved():
    return sorted(path for path in (workdir / "checkpoints").glob("[0-9]*") if whole(path))

(workdir / "result.json").unlink(missing_ok=True)
begin = int(saved()[-1].name) if saved() else 0
metrics = workdir / "metrics.jsonl"
kept = metrics.read_text().splitlines()[:begin] if metrics.exists() else []
assert len(kept) == begin
cut = workdir / "metrics.partial"
cut.write_text("".join(line + "\n" for line in kept))
cut.rename(metrics)
grading = start()
try:
    for step in range(begin + 1, steps + 1):
        time.sleep(0.04)
        if grading.poll() is not None:
            grading = start()
        with metrics.open("a") as file:
            print(json.dumps({"step": step, "loss": step / 7, "update_seconds": time.time()}), file=file)
        partial, folder = (workdir / "checkpoints" / name for name in (".partial", f"{step:06}"))
        for left in (partial, folder):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "weights").write_bytes(bytes(100_000))
        (partial / "run.json").write_text(json.dumps({"size": 100_000}))
        partial.rename(folder)
        for old in saved()[:-2]:
            shutil.rmtree(old)
        if asked and broken != "late":
            sys.exit(0)
    (workdir / "export").mkdir(exist_ok=True)
    (workdir / "export" / "model.safetensors").write_bytes(bytes(100_000))
except OSError as error:
    print(error)
    sys.exit(75)
for name in ("before", "after"):
    (workdir / f"completions_{name}.jsonl").write_text(name)
wrong = broken == "broken" and workdir.name != "peace"
(workdir / "result.json").write_text(json.dumps({"before": 0, "after": int(wrong), "exits": 2}))
if asked:  # on its way out it listens no more, and the signal comes only then
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
"""


FAULTS = len(soak.FORGED) + 3


def put_in_place(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    """Lets the soak start this job."""

    def start(workdir: Path, data: Path, steps: int, *changes: str) -> subprocess.Popen:
        assert data.exists()
        with workdir.with_suffix(".log").open("ab") as log:
            line = [sys.executable, "-SEc", JOB, str(workdir), str(steps), job]
            return subprocess.Popen(line, stdout=log, stderr=log)

    monkeypatch.setattr(soak, "start", start)


def soaked(folder: Path, monkeypatch: pytest.MonkeyPatch, job: str, seconds: float) -> dict[str, Any]:
    put_in_place(monkeypatch, job)
    for number in range(3):  # longer, where the machine is too busy for much to come to pass
        (folder / str(number)).mkdir()
        result = soak.soak(folder / str(number), seconds * 4**number, 6, random.Random(0))
        if result["finished"] and result["faults"] >= FAULTS:
            break
    return result


def test_job_that_survives_every_fault_loses_nothing(tmp_path, monkeypatch, capsys):
    result = soaked(tmp_path, monkeypatch, "whole", seconds=5)
    assert result["lost"] == 0, capsys.readouterr().out
    assert result["finished"] > 0
    assert result["faults"] == sum(result["by_kind"].values()) >= FAULTS


def test_job_that_ends_otherwise_than_in_peace_has_lost_something(tmp_path, monkeypatch):
    result = soaked(tmp_path, monkeypatch, "broken", seconds=2.5)
    assert result["lost"] == result["finished"] > 0


def test_run_that_a_stop_reaches_on_its_way_out_has_lost_nothing(tmp_path, monkeypatch):
    codes = []
    may_end_with = soak.may_end_with
    put_in_place(monkeypatch, "late")
    monkeypatch.setattr(soak, "KINDS", ("stop",))
    monkeypatch.setattr(
        soak, "may_end_with", lambda code, *how: codes.append(code) or may_end_with(code, *how)
    )
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        assert soak.soak(tmp_path / str(number), 1.0, 6, random.Random(number))["lost"] == 0
        if -signal.SIGTERM in codes:
            return
    raise AssertionError(f"no stop came too late: {codes}")


ENDS = """
import signal, sys, time
from pathlib import Path
if sys.argv[1] == "listens":
    signal.signal(signal.SIGTERM, lambda *_: None)
    Path(sys.argv[2], ".lock").touch()
time.sleep(0.6)
Path(sys.argv[2], "result.json").touch()
"""


@pytest.mark.parametrize("kind", ["stop", "disk", "grader"])
def test_fault_that_a_run_does_not_feel_is_not_counted(tmp_path, kind):
    """It comes to its end all the same: nothing more was to be written, or no worker is there."""
    process = subprocess.Popen([sys.executable, "-SEc", ENDS, "listens", str(tmp_path)])
    assert soak.one_life(process, kind, 0.4, tmp_path, random.Random(0)) == (0, False)


def test_stop_may_end_a_run_by_the_signal_only_when_its_result_is_written(tmp_path):
    assert not soak.may_end_with(-15, "stop", tmp_path)
    (tmp_path / "result.json").touch()
    assert soak.may_end_with(-15, "stop", tmp_path)
    assert not soak.may_end_with(-9, "stop", tmp_path)
    assert not soak.may_end_with(-15, "grader", tmp_path)


@pytest.mark.parametrize("kind", ["kill", "truncate"])
def test_kill_that_comes_when_the_run_has_ended_is_not_counted(tmp_path, kind):
    for step in ("000001", "000002"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "run.json").write_text("{}")

    class Ended:
        pid, ends = 0, iter([subprocess.TimeoutExpired("run", 0)])

        def wait(self, seconds: float) -> int:
            for late in self.ends:
                raise late
            return 0

        def kill(self) -> None:
            """It is too late."""

    assert soak.one_life(Ended(), kind, 0, tmp_path, random.Random(0)) == (0, False)
    assert (tmp_path / "checkpoints" / "000002" / "run.json").read_text() == "{}"
