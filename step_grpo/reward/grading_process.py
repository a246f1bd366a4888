"""One grading process, seen from its parent: starting, idle, or busy with one pair until a due time."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

_PROGRAM = Path(__file__).with_name("_grading_worker.py")
_START_SECONDS = 60.0  # importing sympy takes half a second, or much longer on a machine that is busy

Pair = tuple[str, str]
"""The content of a box, and the reference answer."""

Verdict = tuple[bool, str | None]
"""Whether the two are equal, and why grading failed, if it did."""


class WorkerDied(Exception):
    """A grading process ended, or must be ended; the message says why."""


class GradingProcess:
    """A child process that runs `_grading_worker.py`, and the request it is working on.

    The program is run by its path, never forked: JAX has threads, which a fork does not survive, and
    `multiprocessing` would import the caller's `__main__`, and so JAX, in every child.

    Attributes:
        replies: File descriptor of what the process writes; wait on it, then call `receive`.
        ready: It has loaded math-verify.
        pair: What it is grading; None while starting or idle.
        due: When to give it up, in seconds of `time.monotonic`; infinite while idle.
        answers: How many verdicts it has given.
        spent: It has used so much memory that its next verdict could not be trusted; replace it.
    """

    def __init__(self, deadline: float, memory_mib: int) -> None:
        """Starts the process and returns at once.

        Args:
            deadline: Seconds for one answer.
            memory_mib: Bound on its address space in MiB.
        """
        command = [sys.executable, "-P", str(_PROGRAM)]
        self._process = subprocess.Popen(
            [*command, f"--deadline={deadline}", f"--memory-mib={memory_mib}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # sympy orders terms by hash: the same answer must get the same verdict on every host.
            env={**os.environ, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the parent to handle
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self.replies = self._answers.fileno()
        self._unread = b""
        self._deadline = deadline
        self.ready = False
        self.pair: Pair | None = None
        self.due = time.monotonic() + _START_SECONDS
        self.answers = 0
        self.spent = False

    @property
    def idle(self) -> bool:
        """Whether it can take a pair."""
        return self.ready and self.pair is None

    def send(self, pair: Pair) -> None:
        """Gives an idle process a pair to grade.

        Args:
            pair: The content of a box and the reference answer, short enough for a pipe's buffer.

        Raises:
            OSError: The process is dead; the pair must go to another one.
        """
        # ASCII JSON carries null bytes and lone surrogates, and has no line break of its own.
        request = json.dumps({"guess": pair[0], "answer": pair[1]}).encode("ascii") + b"\n"
        # Noted first: an interrupt while writing must not leave an idle process with a reply on its way.
        self.pair, self.due = pair, time.monotonic() + self._deadline
        self._requests.write(request)
        self._requests.flush()

    def receive(self) -> Verdict | None:
        """Reads what has arrived.

        Returns:
            The verdict on `pair`, after which the process is idle; None if the line is not complete, or says
            that the process is ready.

        Raises:
            WorkerDied: The process has ended, or could not start.
        """
        chunk = os.read(self.replies, 65536)
        if not chunk:
            raise WorkerDied(self._obituary())
        line, newline, rest = (self._unread + chunk).partition(b"\n")
        if not newline:
            self._unread = line
            return None
        self._unread = rest
        return self._interpret(json.loads(line))

    def _interpret(self, message: dict[str, Any]) -> Verdict | None:
        if "fatal" in message:
            raise WorkerDied(message["fatal"])
        self.due = math.inf
        if not self.ready:
            self.ready = True
            return None
        self.pair, self.answers, self.spent = None, self.answers + 1, message["memory"]
        return message["correct"], "memory" if self.spent and not message["correct"] else None

    def _obituary(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        return f"worker died (exit status {self._process.poll()})"

    def kill(self) -> None:
        """Ends the process at once, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):  # a request that was never taken cannot be flushed
                pipe.close()
