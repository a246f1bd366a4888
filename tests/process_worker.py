"""One of several processes of a test: `process_worker.py ACTION ARGUMENTS`."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from short_run import short_config

from step_grpo import cli, distributed
from step_grpo.errors import UserError


def everywhere(tree):
    """Host copies of arrays that are spread over the processes."""
    return multihost_utils.process_allgather(tree, tiled=True)


def gradient(out: str) -> None:
    """The gradient sums of the update of `test_mesh`, on a mesh over all processes."""
    from test_mesh import CFG, gradient

    distributed.join()
    assert (jax.process_count(), jax.device_count()) == (2, 8)
    sums = gradient(
        CFG, (2, 2, 2), rows=8, fetch=lambda tree: multihost_utils.process_allgather(tree, tiled=True)
    )
    if distributed.is_first():
        np.savez(out, *jax.tree.leaves(sums))


def train(workdir: str, changes: str) -> None:
    """A run of the whole program; `KILL=2` kills the process when it begins the update of its second step."""
    from kill_worker import arm, run

    if "KILL" in os.environ:
        arm("step_grpo.main.update_policy", int(os.environ["KILL"]), 0.0, signal.SIGKILL, now=True)
    cli.run(lambda: run.main(short_config(json.loads(changes)), Path(workdir)), sys.argv[:1])


def disagree(workdir: str) -> None:
    """A run whose seed the environment gives."""
    train(workdir, json.dumps({"seed": int(os.environ["SEED"])}))


def disagree_on_data(changes: str) -> None:
    """The questions of the folder that the environment names, as a run loads them."""
    from step_grpo.checkpoint import open_model
    from step_grpo.main import load_prompts

    def main() -> None:
        distributed.join()
        os.chdir(os.environ["FOLDER"])
        load_prompts(open_model("builtin:tiny").described, short_config(json.loads(changes)))

    cli.run(main, sys.argv[:1])


def die(which: str) -> None:
    """Tells the others something again and again, until one of them is killed in the middle of it."""
    _end_one(which, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail(which: str, how: str) -> None:
    """The same, but one of them meets an error that the others do not."""
    errors = {
        "mistake": UserError("config.seed: of this process alone"),
        "disk": OSError(errno.ENOSPC, "No space left on device", "/disk/file"),
        "input": OSError(errno.EIO, "Input/output error", "/disk/file"),
        "interrupt": KeyboardInterrupt(),
    }

    def strike() -> None:
        raise errors[how]

    _end_one(which, strike)


def _end_one(which: str, strike: Callable[[], None]) -> None:
    def main() -> None:
        distributed.join()
        for _ in range(3):
            distributed.anywhere(False)
        if jax.process_index() == int(which):
            strike()
        while True:
            distributed.anywhere(False)

    cli.run(main, sys.argv[:1])


ACTIONS = (gradient, train, disagree, disagree_on_data, die, fail)

if __name__ == "__main__":
    {action.__name__: action for action in ACTIONS}[sys.argv[1]](*sys.argv[2:])
