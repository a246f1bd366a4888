"""Eight fake devices where sharding is tested; programs compiled once a session; one short run for all."""

import os
import tempfile

from hypothesis import settings

_compiled = tempfile.TemporaryDirectory(prefix="step_grpo_compiled_")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402 (after the environment that JAX reads)
from short_run import ShortRun, short_config, train  # noqa: E402

# Property tests without a deadline: the first call of a JAX function compiles it.
settings.register_profile("compiling", deadline=None)
settings.load_profile("compiling")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> ShortRun:
    """Two uninterrupted steps of the whole method on the built-in model; read it, never write to it."""
    return train(short_config(), tmp_path_factory.mktemp("finished_run"))
