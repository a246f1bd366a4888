"""Does a run survive the night: the tiny job under faults that are injected for real, again and again.

`python -m benchmarks.soak --minutes=30` first makes one run in peace. Then it starts the same line over and
over in a workdir, does one thing to it each time at a random moment, and compares what stands there in the
end with the run in peace, bit for bit; then the next workdir. What is done to it:

- `kill`: SIGKILL; `stop`: SIGTERM, which must end with exit code 0;
- `disk`: the kernel lets no file of the running process grow beyond 64 kB (RLIMIT_FSIZE), so that its saves
  fail as on a full disk;
- `grader`: one of its grading workers is killed, which the run must survive;
- `truncate`: after a SIGKILL, the largest file of the newest checkpoint loses its last byte.

Its data has bad rows, which are dropped. Beside it a second run, which nobody kills, goes on for the whole
time and loses grading workers now and then; its memory and its open files are measured. The last line is one
JSON object:

- `faults`: injected, and `by_kind`; only those that took effect: the process was alive to be killed, ended
  before its time because it was asked to, or failed for want of room;
- `lost`: workdirs that ended otherwise than in peace, and runs that ended in a way they must not;
- `finished`: workdirs that were compared;
- `memory_growth`: resident memory of the long run (in MB at the end of each line above) at the end against
  a sixth of the time, a share;
- `files_growth`: the same for its open files, a number.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from step_grpo.data.arithmetic import problems
from step_grpo.metrics import read_metrics

ROOT = Path(__file__).parents[1]
KINDS = ("kill", "stop", "disk", "grader", "truncate")
CODES = {"kill": (-9, 0), "truncate": (-9, 0), "stop": (0,), "disk": (0, 75), "grader": (0,)}
# Ends of the names of figures that no two runs have in common: clocks, and how lanes were used.
CLOCKS = ("_seconds", "_per_second", "lane_use")
FORGED = ['{"question": null, "answer": "3"}', '{"question": 7}', '{"question": "  ", "answer": "1"}']
SMALL = {
    "save_every": 1,
    "prompts_per_step": 2,
    "rollout.samples": 2,
    "rollout.lanes": 4,
    "rollout.max_response_tokens": 48,
    "rollout.max_probe_tokens": 6,
    "grpo.prompts_per_update": 1,
    "grpo.rows": 2,
    "grpo.row_length": 96,
    "eval.questions": 4,
    "eval.data.count": 4,
    "eval.max_response_tokens": 48,
    "mesh.data": 1,
    "data.source": "jsonl",
    "data.prompt_column": "question",
    "data.answer_column": "answer",
    "data.bad_rows": "drop",
    "reward.grading_workers": 1,
}
# Steps between the checkpoints of the long run: one in twenty seconds. TensorStore (0.1.75 to 0.1.86) never
# frees what its `to_json` gives, some 0.5 kB an array and save: with one in two seconds that came to 5 %.
LONG_SAVE_EVERY = 50
PEACE = 600.0  # seconds that a run in peace may take at the most


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the soak and prints its figures; returns the JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=3, help="of each run that is compared")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        result = soak(Path(name), args.minutes * 60, args.steps, random.Random(args.seed))
    print(json.dumps(result))
    return result


def soak(folder: Path, seconds: float, steps: int, rng: random.Random) -> dict[str, Any]:
    """The whole of it, in a folder of its own."""
    data = folder / "questions.jsonl"
    write_questions(data)
    wanted = outcome(in_peace(folder / "peace", data, steps))
    steady = start(folder / "steady", data, 10**6, f"save_every={LONG_SAVE_EVERY}")
    faults: Counter[str] = Counter()
    lost, finished, number = [], 0, 0
    memory: list[tuple[float, int, int]] = []
    try:
        began = time.monotonic()
        in_peace(folder / "again", data, steps)  # with its programs compiled, as in the lives below
        typical = time.monotonic() - began
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            workdir = folder / f"run{number}"
            kind = rng.choice(KINDS)
            fresh, began_life = not workdir.exists(), time.monotonic()
            code, struck = one_life(start(workdir, data, steps), kind, rng.uniform(0, typical), workdir, rng)
            faults[kind] += struck
            if fresh and code == 0 and not struck:  # a whole life
                typical = min(typical, time.monotonic() - began_life)
            if not may_end_with(code, kind, workdir):
                lost.append(f"{kind} ended with {code}: {workdir.with_suffix('.log').read_text()[-2000:]}")
            if (workdir / "result.json").exists() and code == 0:
                finished += 1
                if outcome(workdir) != wanted:
                    lost.append(f"{workdir.name} is not the run in peace")
                shutil.rmtree(workdir)
                number += 1
            if rng.random() < 0.2:
                faults["grader of the long run"] += kill_a_grader(steady.pid, rng)
            if steady.poll() is not None:
                log = (folder / "steady.log").read_text()[-2000:]
                lost.append(f"the long run ended with {steady.returncode}: {log}")
                break
            memory.append((time.monotonic() - began, *held_by(steady.pid)))
            print(
                f"{time.monotonic() - began:.0f} s: {sum(faults.values())} faults, {finished} finished, "
                f"{memory[-1][1] / 1e6:.0f} MB",
                flush=True,
            )
    finally:
        steady.kill()
        steady.wait()
    print("\n".join(lost))
    return {
        "faults": sum(faults.values()) + len(FORGED),
        "lost": len(lost),
        "finished": finished,
        **growth(memory),
        "by_kind": dict(faults) | {"bad rows": len(FORGED)},
        "minutes": seconds / 60,
    }


def in_peace(workdir: Path, data: Path, steps: int) -> Path:
    """A run that nothing is done to; its workdir."""
    if (code := start(workdir, data, steps).wait(PEACE)) != 0:
        log = workdir.with_suffix(".log").read_text()
        raise RuntimeError(f"the run in peace ended with {code}: {log}")
    return workdir


def write_questions(path: Path) -> None:
    """Good rows, with bad ones among them; every other answer is one that a grading worker has to read."""
    answers = [(q, f"{a}+0" if i % 2 else a) for i, (q, a) in enumerate(problems("train", 40, seed=9))]
    rows = [json.dumps({"question": q, "answer": a}) for q, a in answers]
    for place, row in enumerate(FORGED):
        rows.insert(7 * place, row)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def start(workdir: Path, data: Path, steps: int, *changes: str) -> subprocess.Popen:
    """The run's own command line; it writes to a log beside the workdir."""
    fields = SMALL | {"steps": steps, "data.name": data} | dict(change.split("=") for change in changes)
    line = [sys.executable, "-m", "step_grpo.main", "--config=configs/tiny.py", f"--workdir={workdir}"]
    line += [f"--config.{field}={value}" for field, value in fields.items()]
    cached = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")}
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **cached, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
    )
    assert process.stdout
    with workdir.with_suffix(".log").open("ab") as log:  # through a pipe: its limit is not for its log
        subprocess.Popen(["cat"], stdin=process.stdout, stdout=log)
    process.stdout.close()
    return process


def one_life(
    process: subprocess.Popen, kind: str, delay: float, workdir: Path, rng: random.Random
) -> tuple[int, bool]:
    """Lets a run go on for some seconds, does something to it, and waits for its end.

    Returns:
        Its exit code, and whether the fault took effect: the run may have come to its end before.
    """
    try:
        return process.wait(delay), False
    except subprocess.TimeoutExpired:
        pass
    struck = True
    if kind == "stop":
        # Python itself ends at a SIGTERM until the run listens, which is when it works on its workdir.
        struck = (workdir / ".lock").exists() and listens(process.pid)
        if struck:
            process.terminate()
    elif kind == "disk":
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, hard))
    elif kind == "grader":
        struck = kill_a_grader(process.pid, rng)
    else:
        process.kill()
    code = process.wait(PEACE)
    if kind == "stop":
        struck = struck and not (workdir / "result.json").exists()
    elif kind == "disk":
        struck = code == 75
    elif kind != "grader":
        struck = code == -signal.SIGKILL
    if kind == "truncate" and struck:
        struck = cut_newest(workdir)
    return code, struck


def may_end_with(code: int, kind: str, workdir: Path) -> bool:
    """Whether a run that something is done to may have this exit code."""
    # Its result is the last that a run writes; on its way out from there it listens no more.
    too_late = kind == "stop" and (workdir / "result.json").exists()
    return code in CODES[kind] or (too_late and code == -signal.SIGTERM)


def listens(process: int) -> bool:
    """Whether a process has a handler of its own for SIGTERM."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def kill_a_grader(process: int, rng: random.Random) -> bool:
    """Kills one of the grading workers that a process started, if there is any."""
    workers = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended since, as its workers may below
            children = task.read_text().split()
            workers += [int(child) for child in children if is_grader(int(child))]
    with contextlib.suppress(ProcessLookupError):
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
            return True
    return False


def is_grader(process: int) -> bool:
    """Whether a process runs the grading program; one that has ended has no command line any more."""
    return b"_grading_worker.py" in Path(f"/proc/{process}/cmdline").read_bytes()


def cut_newest(workdir: Path) -> bool:
    """Takes the last byte off the largest file of the newest checkpoint, if there is one before it."""
    complete = sorted(path.parent for path in (workdir / "checkpoints").glob("[0-9]*/run.json"))
    if len(complete) < 2:
        return False
    largest = max((p for p in complete[-1].rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    return True


def outcome(workdir: Path) -> dict[str, Any]:
    """All that two equal runs have in common."""
    result = json.loads((workdir / "result.json").read_text())
    lines = read_metrics(workdir / "metrics.jsonl")
    return {
        "metrics": [{k: v for k, v in line.items() if not k.endswith(CLOCKS)} for line in lines],
        "result": {name: result[name] for name in ("before", "after", "exits")},
        "completions": [(workdir / f"completions_{n}.jsonl").read_text() for n in ("before", "after")],
        "weights": (workdir / "export" / "model.safetensors").read_bytes(),
    }


def held_by(process: int) -> tuple[int, int]:
    """Resident memory of a process in bytes, and its open files."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path(f"/proc/{process}/fd").iterdir()))


def growth(memory: Sequence[tuple[float, int, int]]) -> dict[str, float | None]:
    """How much more is held at the end than after a sixth of the time; medians of a tenth each."""
    if len(memory) < 6:
        return {"memory_growth": None, "files_growth": None}
    end = memory[-1][0]
    early = [s for s in memory if end / 6 <= s[0] <= end / 6 + end / 10] or [memory[len(memory) // 6]]
    late = [s for s in memory if s[0] >= end * 0.9]
    bytes_early, bytes_late = (median(s[1] for s in part) for part in (early, late))
    files_early, files_late = (median(s[2] for s in part) for part in (early, late))
    return {"memory_growth": bytes_late / bytes_early - 1, "files_growth": files_late - files_early}


if __name__ == "__main__":
    main()
