"""One of several processes of a test: `process_worker.py ACTION ARGUMENTS`."""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from short_run import short_config

from step_grpo import distributed


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
    """A run of the whole program."""
    from step_grpo.main import main

    main(short_config(json.loads(changes)), Path(workdir))


def disagree(workdir: str) -> None:
    """A run whose seed the environment gives."""
    train(workdir, json.dumps({"seed": int(os.environ["SEED"])}))


if __name__ == "__main__":
    {"gradient": gradient, "train": train, "disagree": disagree}[sys.argv[1]](*sys.argv[2:])
