"""One run at a time in a workdir, and what a run that is resumed does not have to do again."""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from step_grpo import paths
from step_grpo.distributed import from_first, is_first
from step_grpo.errors import UserError

LOCK = ".lock"


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the workdir and keeps other runs, of any kind, out of it for as long as the block runs.

    The operating system holds the lock and lets go of it when the process ends, in whatever way. In a bucket
    there are no locks: nothing keeps a second run out.

    Raises:
        UserError: in every process of the run, if another run is there or the workdir cannot be written.
    """
    file: list[int] = []
    from_first(lambda: file.append(_lock(workdir)) if not paths.is_remote(workdir) else None)
    try:
        yield
    finally:
        for descriptor in file:
            os.close(descriptor)


def _lock(workdir: Path) -> int:
    try:
        paths.make(workdir)
        descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error.strerror}); name another") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise UserError(
            f"--workdir={workdir}: a run is there already ({owner}); wait for its end, stop it, or name "
            "another workdir"
        ) from None
    except OSError:  # a file system without locks
        return descriptor
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor


def once(
    path: Path, facts: Mapping[str, Any], leaves: Path, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `measure` returns, or returned when an earlier run of the same facts came to its end.

    Args:
        path: remembers it.
        facts: all that the result depends on; JSON.
        leaves: the file that `measure` writes beside what it returns.
        measure: returns JSON.

    Returns:
        The same in every process.
    """
    known = from_first(lambda: _remembered(path, facts) if leaves.is_file() else None)
    if known is not None:
        return known
    if is_first():
        path.unlink(missing_ok=True)  # it would vouch for a file that is only half new
    found = measure()
    if is_first():
        paths.write_text(path, json.dumps({"facts": facts, "result": found}, indent=2) + "\n")
    return found


def _remembered(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return held["result"] if held["facts"] == facts else None
    except (OSError, ValueError, LookupError, TypeError):  # not there, or no work of ours
        return None
