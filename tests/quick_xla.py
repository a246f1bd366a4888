"""Flags with which XLA compiles for the CPU in a quarter of the time, to programs that are slower.

For tests and for commands in short form, which compile most of their time. Flags of XLA come and go with its
versions, and it ends a process that asks for one it does not know: then there are none.
"""

import os
import subprocess
import sys

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
DEVICES = "xla_force_host_platform_device_count"


def quick_flags() -> str:
    """`QUICK` if the installed XLA knows all of it, else nothing."""
    tried = {**os.environ, "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=tried,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(f"(XLA does not take {QUICK}: compiling as usual)\n{done.stderr[-500:]}", file=sys.stderr)
    return QUICK if done.returncode == 0 else ""


def devices_flag(count: int) -> str:
    """The XLA_FLAGS of this process, but for another number of devices."""
    others = [f for f in os.environ["XLA_FLAGS"].split() if DEVICES not in f]
    return " ".join([*others, f"--{DEVICES}={count}"])


if __name__ == "__main__":
    print(quick_flags())
