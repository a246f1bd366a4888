"""Folders on this machine and in buckets: all that differs between the two.

A local folder is a `pathlib.Path`; `gs://BUCKET/FOLDER` is an `etils.epath.Path`, which is used in the same
way. An object in a bucket appears at once or not at all, but cannot be appended to or renamed, and there are
no folders, only names with slashes: nothing has to be made, and a folder cannot appear at once.
"""

import atexit
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, cast

from etils import epath

REMOTE = "gs://"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(REMOTE)


def folder(name: str | os.PathLike[str]) -> Path:
    """The path that a name means; one in a bucket only behaves like a `pathlib.Path`."""
    return cast(Path, epath.Path(name)) if is_remote(name) else Path(name)


def absolute(path: Path) -> Path:
    """A path that does not depend on the current folder."""
    return path if is_remote(path) else path.absolute()


def make(path: Path) -> None:
    """Makes a folder and its parents, where there is such a thing."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path, marker: str) -> None:
    """Deletes a folder, `marker` first: without it, what an interruption leaves counts for nothing."""
    (path / marker).unlink(missing_ok=True)
    if is_remote(path):
        cast(epath.Path, path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def replaced(path: Path, marker: str) -> Iterator[Path]:
    """Where to write the new contents of a folder, `marker` last.

    A local folder appears under its name when the block has ended and a loss of power could take nothing of
    it away. In a bucket it is complete as soon as the marker is there, and counts for nothing before.
    """
    partial = written_to(path)
    if is_remote(path):
        remove(path, marker)
        yield partial
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:  # on a full disk it would be in the way of what comes next
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for file in _files(partial):
        sync(file)
    for inside in (partial, *(found for found in partial.rglob("*") if found.is_dir())):
        _sync_names(inside)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    _sync_names(path.parent)


def sync(file: Path) -> None:
    """Returns when what was written to a local file would outlast a loss of power."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Likewise for the names in a folder, where the file system can."""
    with suppress(OSError):
        sync(folder)


def written_to(path: Path) -> Path:
    """Where `replaced` lets write, for the other processes of a run: one of them alone calls it."""
    return path if is_remote(path) else path.with_name(f".{path.name}.partial")


def sizes(path: Path) -> dict[str, int]:
    """The bytes of every file below a folder, by its name from there on."""
    root = os.fspath(path)
    return {os.fspath(file).removeprefix(root).lstrip("/"): _size(file) for file in _files(path)}


def _files(path: Path) -> Iterator[Path]:
    for inside in path.iterdir():  # not `rglob`, which there is none of in a bucket
        if inside.is_dir():
            yield from _files(inside)
        else:
            yield inside


def _size(file: Path) -> int:
    return cast(epath.Path, file).stat().length if is_remote(file) else file.stat().st_size


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file or none."""
    if is_remote(path):
        path.write_bytes(data)
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    sync(partial)  # or a loss of power could leave an empty file under the name
    partial.replace(path)


def append_to(path: Path) -> TextIO:
    """A text file to write on at its end; what is flushed is there."""
    return _GrowingObject(path) if is_remote(path) else path.open("a", encoding="utf-8")


class _GrowingObject(io.StringIO):
    """Text that is written to its object anew at each flush."""

    def __init__(self, path: Path):
        super().__init__(path.read_text(encoding="utf-8"))
        self.seek(0, io.SEEK_END)
        self._path = path

    def flush(self) -> None:
        super().flush()
        self._path.write_text(self.getvalue(), encoding="utf-8")


def fetched(path: Path) -> Path:
    """A local folder with the files of a folder: itself, or a copy that lasts as long as the process."""
    if not is_remote(path):
        return path
    copy = Path(tempfile.mkdtemp(prefix="step_grpo_"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for source in path.iterdir():
        if source.is_file():
            cast(epath.Path, source).copy(copy / source.name, overwrite=True)
    return copy


@contextmanager
def written_locally(path: Path) -> Iterator[Path]:
    """A local folder to write files to: itself, or one whose files are sent to the bucket in the end."""
    if not is_remote(path):
        make(path)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="step_grpo_") as name:
        yield Path(name)
        for source in sorted(Path(name).iterdir()):
            send(source, path / source.name)


def send(source: Path, target: Path) -> None:
    """Copies a local file into a bucket."""
    cast(epath.Path, epath.Path(source)).copy(target, overwrite=True)
