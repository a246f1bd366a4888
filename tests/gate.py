"""What `.ci/run` runs, and which of its lines is the short form of one that a page shows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from pages import ROOT, commands

# Values that a short form may replace: places of this machine, and names of models.
FREE = (
    *("--workdir", "--out", "--completions", "--batch", "--checkpoint", "--push-to-hub", "--picture"),
    *("--base", "--others"),
    *("--config.data.name", "--config.model.checkpoint", "--config.rollout.verifier.checkpoint"),
    *("STEP_GRPO_COORDINATOR", "STEP_GRPO_PROCESS"),
)


@dataclass(frozen=True)
class Line:
    """A command: program and module, its flags and variables by name, and all other words."""

    program: str
    named: tuple[tuple[str, str], ...]
    words: frozenset[str]

    def covers(self, promised: "Line") -> bool:
        """Whether this is the promised command, perhaps with more flags or a variant of its config."""
        here, there = dict(self.named), dict(promised.named)
        return (
            self.program == promised.program
            and promised.words <= self.words
            and here.keys() >= there.keys()
            and all(name in FREE or same(name, here[name], value) for name, value in there.items())
        )


def same(name: str, run: str, promised: str) -> bool:
    """Whether two values of a flag are the same; of a config file any variant may be run."""
    return run == promised or (
        name == "--config" and ":" not in promised and run.partition(":")[0] == promised
    )


def line_of(command: list[str], variables: dict[str, str] | None = None) -> Line:
    """A command's words, sorted out, without what runs it (`offline`, the stand-in for the Hub)."""
    words = list(command)
    while words[0] == "offline" or words[1:2] == ["tests/fake_hub.py"]:
        words = words[1:] if words[0] == "offline" else words[2:]
    count = 3 if words[1:2] == ["-m"] else 1
    program, rest = " ".join(words[:count]), [word for word in words[count:] if word != "--quiet"]
    named = dict(variables or {}) | {
        flag: value for word in rest if word.startswith("--") for flag, _, value in [word.partition("=")]
    }
    others = frozenset(word for word in rest if not word.startswith("--"))
    return Line(program, tuple(named.items()), others)


def lines(script: str) -> Iterator[Line]:
    """The commands of a script, each with the variables in front of it."""
    for text in script.replace("\\\n", " ").splitlines():
        variables = {m[1]: m[2] for m in re.finditer(r"(?:^|\s)(STEP_GRPO_\w+)=(\S*)(?=\s)", text)}
        try:
            found = list(commands(text))
        except ValueError:  # half of a text in quotes
            continue
        yield from (line_of(words, variables) for words in found)


@cache
def of_gate() -> tuple[Line, ...]:
    """The lines of `.ci/run`."""
    return tuple(lines((ROOT / ".ci" / "run").read_text(encoding="utf-8")))


def is_run(promised: Line) -> bool:
    """Whether one line of the gate is this one."""
    return any(line.covers(promised) for line in of_gate())
