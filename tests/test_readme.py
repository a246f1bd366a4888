"""The README promises commands; the gate runs them."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands(text: str) -> list[str]:
    """The shell commands of a text, continuation lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    starts = re.compile(r"\s*(offline )?(pip|python|pytest)\b")
    return [" ".join(line.split()) for line in lines if starts.match(line)]


def parts(command: str) -> set[str]:
    """What must not differ: program, module, names of flags, and the values that choose what is done."""
    kept = set()
    for word in shlex.split(command):
        flag, _, value = word.partition("=")
        free = flag in ("--workdir", "--out", "--completions", "--config.data.name")
        kept.add(f"{flag}={value}" if value and not free else flag)
    return kept - {"offline", "--quiet"}


blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
promised = [part for block in blocks for command in commands(block) for part in command.split(" && ")]


@pytest.mark.parametrize("command", promised)
def test_command_of_the_readme_is_run_by_the_gate(command):
    gate = commands((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert any(parts(command) <= parts(run) for run in gate), command


def test_readme_has_the_two_commands():
    assert "pip install -e . && python -m step_grpo.main --config=configs/tiny.py" in blocks[0]
    assert "pip install -e '.[test]' && pytest" in blocks[1]
