"""Compiles one program in a process of its own, for a TPU that is not here.

The environment must say so before JAX is imported, and an error of the compiler can end its process: so each
program has its own, and its result comes back as a line of JSON.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from step_grpo.errors import UserError
from step_grpo.fit.hlo import Traffic, kernels, traffic
from step_grpo.fit.programs import Run, Sizes, topology_devices

# No chip is asked for, and none must be: what libtpu would look for on a real host is answered here.
WITHOUT_TPU = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # to read a program back takes the chip that it is for
}
OF_THE_USER = (  # not in the child
    "XLA_FLAGS",
    "JAX_EXEC_TIME_OPTIMIZATION_EFFORT",
    "JAX_MEMORY_FITTING_EFFORT",
    "JAX_OPTIMIZATION_LEVEL",
    "JAX_MEMORY_FITTING_LEVEL",
)
SIZES = "sizes"  # in place of a program: nothing is compiled
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM"),
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
)


@dataclass(frozen=True)
class Task:
    """One program of a run.

    Attributes:
        config: of the run.
        topology: a slice such as `v5p:2x2x4`.
        program: one of `programs.STAGES`, or `SIZES`.
        lanes: of one group of devices.
        rows: of a micro-batch; 0: one for each part of the mesh that rows are spread over.
    """

    config: ConfigDict
    topology: str
    program: str
    lanes: int = 1
    rows: int = 0


class Result(NamedTuple):
    """What the compiler says of a program, in bytes of one device.

    Attributes:
        peak: arguments and all else at the fullest moment; of a program that is too large what it asked for.
        fits: on its own.
        arguments: what it is called with.
        temporaries: what it needs for itself over its whole length; not all of it at one time.
        seconds: that the compilation took.
        kernels: Pallas kernels in its text.
        traffic: between devices.
        problem: what the compiler said instead, where it failed for another reason.
    """

    peak: float
    fits: bool = True
    arguments: int = 0
    temporaries: int = 0
    seconds: float = 0.0
    kernels: int = 0
    traffic: tuple[Traffic, ...] = ()
    problem: str = ""


def require_libtpu() -> None:
    """Raises a `UserError` where nothing can be compiled for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu, the compiler for TPUs, is not installed; run: pip install 'jax[tpu]'")


def measure(task: Task) -> Result:
    """Compiles a program in a process of its own, with full effort.

    Raises:
        UserError: the run does not go with the slice, such as a mesh that needs more devices.
    """
    (found,) = _in_child([task])
    if "user_error" in found:
        raise UserError(found["user_error"])
    return decoded(found)


def measure_sizes(task: Task) -> Sizes:
    """What the run of a task holds; nothing is compiled.

    Raises:
        UserError: as `measure`.
    """
    (found,) = measure_many_sizes([task])
    if isinstance(found, str):
        raise UserError(found)
    return found


def measure_many_sizes(tasks: Sequence[Task]) -> list[Sizes | str]:
    """What the runs of tasks hold, all in one process; of a run that does not go with its slice, why not."""
    answers = _in_child([replace(task, program=SIZES) for task in tasks])
    for found in answers:
        if found.get("problem"):
            raise RuntimeError(found["problem"])
    return [found.get("user_error") or Sizes(**{**found, "mesh": tuple(found["mesh"])}) for found in answers]


def decoded(answer: dict[str, Any]) -> Result:
    """A result that was written as JSON."""
    return Result(**{**answer, "traffic": tuple(Traffic(*t) for t in answer.get("traffic", ()))})


def _environment(outside: Mapping[str, str]) -> dict[str, str]:
    """The environment of the child: nothing of the user's makes the compiler try less hard, or otherwise."""
    return {name: value for name, value in outside.items() if name not in OF_THE_USER} | WITHOUT_TPU


def _in_child(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """What a child process answers to each of some tasks."""
    with tempfile.TemporaryDirectory() as logs:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps([asdict(task) | {"config": task.config.to_dict()} for task in tasks]).encode(),
            env={**_environment(os.environ), "TPU_LOG_DIR": logs},
            capture_output=True,
            check=False,
        )
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        said = done.stderr.decode(errors="replace")
        problem = problem_of(said) or f"the compiler's process ended with {done.returncode}"
        return [{"peak": math.inf, "fits": False, "problem": problem} for _ in tasks]
    return json.loads(lines[-1])


def problem_of(said: str) -> str:
    """The first line of the last exception of a text, or its last line where there is none."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (raised or lines or [""])[-1]


def bytes_asked(message: str) -> float | None:
    """What a program asked for, from the compiler's message that it is too large; None for other messages."""
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return float(found[1]) * UNITS[found[2]]
    return None


# ---------------------------------------------------------------- in the child


def answer(task: Task) -> dict[str, Any]:
    """Does what a task asks for."""
    devices = topology_devices(task.topology)
    run = Run(task.config, devices, task.lanes, task.rows)
    if task.program == SIZES:
        return run.sizes()._asdict()
    began = time.monotonic()
    lowered = run.lower(task.program)
    try:
        compiled = lowered.compile()
    except Exception as error:  # of the compiler, with a text that tells them apart
        asked = bytes_asked(str(error))
        if asked is None:
            raise
        return Result(asked, fits=False, seconds=time.monotonic() - began)._asdict()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Result(
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        seconds=time.monotonic() - began,
        kernels=kernels(text),
        traffic=tuple(traffic(text)),
    )._asdict()


def answer_all(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Does what each task asks for; a mistake of the user is an answer too."""
    answers = []
    for task in tasks:
        try:
            answers.append(answer(task))
        except UserError as error:
            answers.append({"user_error": str(error)})
    return answers


def main() -> None:
    """Reads tasks from standard input and writes the answers."""
    tasks = json.load(sys.stdin)
    print(json.dumps(answer_all([Task(**{**task, "config": ConfigDict(task["config"])}) for task in tasks])))


if __name__ == "__main__":
    main()
