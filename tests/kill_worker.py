"""Runs that kill themselves: `kill_worker.py`, which reads one JSON object a line and answers with one.

`{"workdir": DIR, "changes": {...}, "kill": {"at": POINT, "call": 2, "delay": 0.01, "signal": 9}}` makes a run
of the whole program in a process of its own, forked from this one so that the imports are paid once. Where
`kill` is given, the run gets the signal so many seconds after it begins the given call of the point, whatever
it then does. The answer is `{"code": EXIT CODE OR -SIGNAL, "printed": ...}`. With
`"count": POINT` a run that comes to its end prints how often it called that.
"""

import importlib
import json
import os
import sys
import threading
import time
from functools import wraps
from pathlib import Path

from short_run import short_config

import step_grpo.main as run

TINY = {
    "steps": 3,
    "prompts_per_step": 2,
    "save_every": 1,
    "keep_checkpoints": 2,
    "data": {"count": 40},
    "mesh": {"data": 1},
    "rollout": {"samples": 2, "lanes": 2, "max_response_tokens": 48, "max_probe_tokens": 6},
    "grpo": {"prompts_per_update": 1, "rows": 2, "row_length": 96},
    "eval": {"questions": 4, "data": {"count": 4}, "max_response_tokens": 48},
}

# Stage by stage; the number of calls that an uninterrupted run makes at the least.
POINTS = {
    "step_grpo.main.evaluate": 2,
    "step_grpo.main.write_completions": 2,
    "step_grpo.workdir.paths.write_text": 1,
    "step_grpo.main.take_prompts": 3,
    "step_grpo.main.decode_ready": 5,
    "step_grpo.rollout.engine._Work.advance": 4,
    "step_grpo.main.score_completions": 3,
    "step_grpo.main.update_policy": 3,
    "step_grpo.metrics.MetricsWriter.write": 3,
    "step_grpo.checkpoint.save_description": 3,
    "step_grpo.checkpoint.ocp.save_async": 6,
    "step_grpo.checkpoint.Saver._complete": 3,
    "step_grpo.checkpoint.write_json": 3,
    "step_grpo.paths.remove": 1,
    "step_grpo.metrics.paths.write_text": 1,
    "step_grpo.main.finish": 1,
}


def arm(at: str, call: int, delay: float, signal: int, now: bool = False) -> list[int]:
    """Replaces a function by one that starts the clock at its n-th call; the list grows with each."""
    names = at.split(".")
    owner = run
    for depth in range(len(names) - 1, 0, -1):  # the longest prefix that is a module
        try:
            owner = importlib.import_module(".".join(names[:depth]))
        except ModuleNotFoundError:
            continue
        break
    for name in names[depth:-1]:
        owner = getattr(owner, name)
    real, calls = getattr(owner, names[-1]), []

    def strike() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal)

    @wraps(real)
    def counted(*arguments, **named):
        calls.append(1)
        if len(calls) == call and now:
            strike()
        elif len(calls) == call:
            threading.Thread(target=strike, daemon=True).start()
        return real(*arguments, **named)

    setattr(owner, names[-1], counted)
    return calls


def attempt(task: dict, printed: Path) -> int:
    """The exit code of a run, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if "kill" in task:
            arm(**{"signal": 9, "delay": 0.0, "call": 1, **task["kill"]})
        calls = arm(task["count"], 0, 0.0, 0) if "count" in task else []
        workdir = Path(task["workdir"])
        sys.argv = ["main", f"--workdir={workdir}"]
        run.cli.run(lambda: run.main(short_config(TINY, task.get("changes", {})), workdir), sys.argv[:1])
        print(f"called {len(calls)} times")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    """Answers until its input ends."""
    for line in sys.stdin:
        task = json.loads(line)
        printed = Path(task["workdir"]).with_suffix(".log")
        code = attempt(task, printed)
        print(json.dumps({"code": code, "printed": printed.read_text(errors="replace")}), flush=True)


if __name__ == "__main__":
    main()
