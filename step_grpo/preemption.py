"""Stopping when asked: SIGTERM (a machine that is taken away), SIGINT (Ctrl-C), or the host of a TPU.

The first signal lets the run come to a point that it can go on from, the second ends it at once. What a
rollout has not finished is dropped: it comes out the same when the run goes on.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from http.client import HTTPException
from types import TracebackType
from typing import Any, Self

import jax

from step_grpo.distributed import anywhere, host_is_taken_away
from step_grpo.rollout.engine import RolloutEngine

SIGNALS = (signal.SIGTERM, signal.SIGINT)
HOST_ASKED_EVERY = 5.0  # seconds; a notice of maintenance comes a minute ahead or more


class StoppedError(Exception):
    """The run is to end here, in every process."""


class _DroppedError(Exception):
    """The rollout of this process was given up."""


class Notice:
    """Whether the run is asked to stop; a context manager that listens while its block runs.

    Signals are read by a thread of its own, so that a second one is heard whatever the main thread waits
    for. Outside the main thread, where Python lets nobody listen, nothing is heard.

    On a TPU the host is asked as well whether it is about to be taken away, and counts as a signal if it is;
    a first real signal behind it still is a first one.

    Attributes:
        came: the name of what came first; empty until then.
    """

    def __init__(self, on_tpu: Callable[[], bool] = lambda: jax.default_backend() == "tpu"):
        """Does not listen yet."""
        self.came = ""
        self._before: dict[int, Any] = {}
        self._on_tpu, self._left = on_tpu, threading.Event()

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno())
        # Handlers that do nothing: without one, a signal would not reach the socket.
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="preemption", daemon=True)
        self._thread.start()
        if self._on_tpu():
            threading.Thread(target=self._ask_host, name="maintenance", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._left.set()
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()
        self._thread.join()
        self._read.close()

    def _listen(self) -> None:
        signals = 0
        while heard := self._read.recv(1):
            if heard[0] not in SIGNALS:
                continue
            signals += 1
            if signals > 1:
                os._exit(128 + heard[0])
            name = signal.Signals(heard[0]).name
            self._hear(name, f"{name}: saving what is done; once more to stop at once")

    def _ask_host(self) -> None:
        while not (why := _host_says()):
            if self._left.wait(HOST_ASKED_EVERY):
                return
        self._hear(why, f"the host is about to be taken away ({why}): saving what is done")

    def _hear(self, name: str, said: str) -> None:
        self.came = self.came or name
        print(f"step_grpo: {said}", file=sys.stderr, flush=True)

    def stop_if_asked(self) -> None:
        """To be called by all processes at the same point.

        Raises:
            StoppedError: in all of them, if any was asked to stop.
        """
        if anywhere(bool(self.came)):
            raise StoppedError("stopped before there was anything to save; run the same line again")

    def watched(self, engine: RolloutEngine) -> "Watched":
        """The engine, whose calls raise `StoppedError` in every process once any was asked to stop."""
        return Watched(engine, self)


def _host_says() -> str:
    """Why the host is about to be taken away; empty while it is not, or says nothing that can be read."""
    try:
        return host_is_taken_away()
    except (OSError, HTTPException, ValueError):  # an answer that breaks off, or that is no HTTP or no text
        return ""


class Watched:
    """An engine that looks for a notice after each segment, and with the other processes in the end."""

    def __init__(self, engine: RolloutEngine, notice: Notice):
        self._engine, self._notice = engine, notice

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        samples: int,
        run_key: Any,
        on_progress: Callable[[int], None] = lambda finished: None,
        on_drop: Callable[[], None] = lambda: None,
        **others: Any,
    ) -> Any:
        """The engine's call.

        Args:
            params: the engine's, as are the next three and `others`.
            prompts: likewise.
            samples: likewise.
            run_key: likewise.
            on_progress: likewise.
            on_drop: called at once where this process gives up its rollout: when the others have come as far,
                its machine may be gone.
            **others: likewise.
        """

        def look(finished: int) -> None:
            on_progress(finished)
            if self._notice.came:
                raise _DroppedError

        made = None
        try:
            made = self._engine(params, prompts, samples, run_key, look, **others)
        except _DroppedError:
            on_drop()
        self._notice.stop_if_asked()
        return made
