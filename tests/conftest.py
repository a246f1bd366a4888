"""Eight fake devices where sharding is tested; programs compiled quickly and once; one short run for all.

Whole folders are tested by a process a core, if pytest-xdist is there; `-n 0` asks for a single one.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hypothesis import settings
from quick_xla import quick_flags

# The processes of a session inherit this environment: what one compiled the others read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="step_grpo_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {quick_flags()}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would spin on the cores of other processes

import jax
import pytest
from short_run import ShortRun, short_config, train

# Property tests without a deadline: the first call of a JAX function compiles it.
settings.register_profile("compiling", deadline=None)
settings.load_profile("compiling")

MOST_PROCESSES = 4  # each may need two gigabytes
# Begun before all others, about a minute or more each: no process is left with one of them at the end.
LONGEST = (
    "test_distributed.py",
    "test_lora.py",
    "test_main.py",
    "test_engine.py",
    "test_benchmarks.py",
    "test_mesh.py",
    "test_kills.py",
    "test_engine_attention.py",
    "test_update_benchmark.py",
    "test_evaluate.py",
    "test_guards.py",
    "test_grading.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spreads the files of whole folders over a process a core, unless the command line says otherwise.

    Not `addopts`: that would need pytest-xdist also where it is missing or switched off, and would make a
    single test wait for several processes.
    """
    option = config.option
    is_process_of_a_session = hasattr(config, "workerinput")
    if is_process_of_a_session or not config.pluginmanager.hasplugin("xdist"):
        return
    says_how = option.numprocesses is not None or option.dist != "no" or option.tx
    if says_how or option.usepdb or option.collectonly or not all(os.path.isdir(a) for a in config.args):
        return
    option.numprocesses = min(MOST_PROCESSES, os.cpu_count() or 1)
    option.dist = "loadfile"
    option.loadscopereorder = False  # it would hand out the files of many short tests first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; the order within a file stays."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture
def compile_events() -> Iterator[list[str]]:
    """The names of JAX's events about tracing and compiling, from the beginning of the test on."""
    events: list[str] = []

    def hear(event: str, seconds: float, **_: str | int) -> None:
        del seconds
        if "compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield events
    jax.monitoring.unregister_event_duration_listener(hear)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    """Two uninterrupted steps of the whole method on the built-in model; read it, never write to it.

    The first process that needs it makes it, the others wait.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the session's, above that of this process
    return run_once(folder / "finished_run")


def run_once(folder: Path) -> ShortRun:
    """The short run in `folder / "workdir"`; made if it is not there or was never finished."""
    folder.mkdir(exist_ok=True)
    workdir, printed = folder / "workdir", folder / "printed.txt"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            shutil.rmtree(workdir, ignore_errors=True)
            printed.write_text(train(short_config(), workdir).printed, encoding="utf-8")
    return ShortRun(short_config(), workdir, printed.read_text(encoding="utf-8"))
