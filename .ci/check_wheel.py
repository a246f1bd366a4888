"""Fails unless a wheel holds all files of the package and the configs: `check_wheel.py WHEEL` in a clone."""

import subprocess
import sys
import zipfile


def main(wheel: str) -> None:
    """Compares a wheel with what git tracks."""
    tracked = subprocess.run(
        ["git", "ls-files", "step_grpo", "configs"], capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = {f"step_grpo/{name}" if name.startswith("configs/") else name for name in tracked}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("step_grpo/")}
    assert not wanted - found, f"not in the wheel: {sorted(wanted - found)}"
    assert not found - wanted, f"in the wheel, and not tracked: {sorted(found - wanted)}"
    print(f"{len(found)} files in {wheel}")


if __name__ == "__main__":
    main(*sys.argv[1:])
