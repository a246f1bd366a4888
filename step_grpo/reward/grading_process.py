"""One grading process, seen from its parent: starting, idle, or busy with a few pairs.

It grades one pair after another, and the due time is that of the first. The others wait in its pipe, so that
it need not wait for its parent in between.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

_PROGRAM = Path(__file__).with_name("_grading_worker.py")
_START_SECONDS = 60.0  # importing sympy takes half a second, or much longer on a machine that is busy
_WINDOW = 4  # pairs that a process has at a time
_WINDOW_BYTES = 16384  # of their requests: writing must never wait for a process that is stuck

Pair = tuple[str, str]
"""The content of a box, and the reference answer."""

Verdict = tuple[bool, str | None]
"""Whether the two are equal, and why grading failed, if it did."""


class WorkerDied(Exception):
    """A grading process ended, or must be ended; the message says why.

    Attributes:
        by_itself: Whether it ended, for whatever reason but its limits: nobody gave it up.
    """

    def __init__(self, why: str, *, by_itself: bool = False) -> None:
        super().__init__(why)
        self.by_itself = by_itself


class GradingProcess:
    """A child process that runs `_grading_worker.py`, and the request it is working on.

    The program is run by its path, never forked: JAX has threads, which a fork does not survive, and
    `multiprocessing` would import the caller's `__main__`, and so JAX, in every child.

    Attributes:
        replies: File descriptor of what the process writes; wait on it, then call `receive`.
        ready: It has loaded math-verify.
        pairs: What it has been given, in order; it is grading the first one.
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
        self.pairs: deque[Pair] = deque()
        self._sizes: deque[int] = deque()  # of the requests of `pairs`
        self._broken = False  # nobody reads its requests any more
        self.due = time.monotonic() + _START_SECONDS
        self.answers = 0
        self.spent = False

    @property
    def has_room(self) -> bool:
        """Whether it can take another pair at once."""
        return (
            self.ready and not self._broken and len(self.pairs) < _WINDOW and sum(self._sizes) < _WINDOW_BYTES
        )

    def send(self, pair: Pair) -> None:
        """Gives a process that has room a pair to grade, behind those that it has.

        Args:
            pair: The content of a box and the reference answer, short enough for a pipe's buffer.

        Raises:
            OSError: The process is dead; the pair must go to another one. Those that it already has are still
                its own: `receive` says what became of them.
        """
        # ASCII JSON carries null bytes and lone surrogates, and has no line break of its own.
        request = json.dumps({"guess": pair[0], "answer": pair[1]}).encode("ascii") + b"\n"
        # Noted first: an interrupt while writing must not leave an idle process with a reply on its way.
        self.pairs.append(pair)
        self._sizes.append(len(request))
        if len(self.pairs) == 1:
            self.due = time.monotonic() + self._deadline
        try:
            self._requests.write(request)
            self._requests.flush()
        except OSError:
            self._broken = True
            self.pairs.pop()
            self._sizes.pop()
            raise

    def receive(self) -> list[tuple[Pair, Verdict]]:
        """Reads what has arrived.

        Returns:
            The verdicts on the first of `pairs`, which are taken from there; none if no line is complete, or
            it says that the process is ready. None follow the one that makes the process `spent`.

        Raises:
            WorkerDied: The process has ended, or could not start.
        """
        chunk = os.read(self.replies, 65536)
        if not chunk:
            raise self._obituary()
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        verdicts = []
        for line in lines:
            verdict = self._interpret(json.loads(line))
            if verdict is not None:
                verdicts.append(verdict)
            if self.spent:
                break
        return verdicts

    def _interpret(self, message: dict[str, Any]) -> tuple[Pair, Verdict] | None:
        if "fatal" in message:
            raise WorkerDied(message["fatal"])
        if not self.ready:
            self.ready, self.due = True, math.inf
            return None
        pair, _ = self.pairs.popleft(), self._sizes.popleft()
        self.due = time.monotonic() + self._deadline if self.pairs else math.inf
        self.answers, self.spent = self.answers + 1, message["memory"]
        return pair, (message["correct"], "memory" if self.spent and not message["correct"] else None)

    def _obituary(self) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        status = self._process.poll()
        if status == -signal.SIGALRM:  # its own alarm, before its parent came to look
            return WorkerDied("deadline")
        return WorkerDied(f"worker died (exit status {status})", by_itself=True)

    def kill(self) -> None:
        """Ends the process at once, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):  # a request that was never taken cannot be flushed
                pipe.close()
