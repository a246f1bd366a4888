"""What a compiled program exchanges between devices, read from its text.

A collective in the body of a loop counts as often as the loop runs, where its condition says so ("less than a
constant"). Loops that end by what they compute, such as the decode loop, count as one round.
"""

import re
from collections import defaultdict
from math import prod
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KERNEL = 'custom_call_target="tpu_custom_call"'  # how a Pallas kernel shows

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations|true_computation|"
                     r"false_computation)=(\{[^}]*\}|%?[\w.-]+)")  # fmt: skip


class Traffic(NamedTuple):
    """All collectives of one kind.

    Attributes:
        kind: one of `KINDS`.
        times: that a device takes part.
        bytes: that a device sends around: the whole array that is gathered, reduced or exchanged.
        each_round: in a loop of unknown length; figures are of one round.
    """

    kind: str
    times: int
    bytes: int
    each_round: bool


class _Computation(NamedTuple):
    collectives: list[tuple[str, int]]  # kind and bytes
    calls: list[tuple[str, int, bool]]  # of whom, how often, and whether that is known
    bound: int | None  # the constant that it compares with, of the condition of a loop


def traffic(text: str) -> list[Traffic]:
    """The collectives of a program by kind, those of unknown loops apart."""
    computations, entry = _parse(text)
    totals: dict[tuple[str, bool], list[int]] = defaultdict(lambda: [0, 0])

    def visit(name: str, times: int, each_round: bool) -> None:
        computation = computations.get(name)
        if computation is None:
            return
        for kind, size in computation.collectives:
            total = totals[kind, each_round]
            total[0] += times
            total[1] += times * size
        for callee, rounds, known in computation.calls:
            visit(callee, times * rounds, each_round or not known)

    visit(entry, 1, False)
    return [
        Traffic(kind, count, size, each_round) for (kind, each_round), (count, size) in sorted(totals.items())
    ]


def kernels(text: str) -> int:
    """Pallas kernels in the text of a program, those in a loop once."""
    return text.count(KERNEL)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """Every computation by its name, and the name of the one that is the program."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            bodies[name] = []
            entry = name if found[1] else entry
        elif name:
            bodies[name].append(line)
    bounds = {name: _bound(lines) for name, lines in bodies.items()}
    return {name: _computation(name, lines, bounds) for name, lines in bodies.items()}, entry


def _computation(name: str, lines: list[str], bounds: dict[str, int | None]) -> _Computation:
    collectives, calls = [], []
    for line in lines:
        if not (found := _INSTRUCTION.match(line)):
            continue
        _, result, opcode, rest = found.groups()
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            collectives.append(_collective(name, kind, result, rest, started=kind != opcode))
            continue
        rounds = _rounds(rest, bounds) if opcode == "while" else 1
        for callees in _CALLED.findall(rest):
            calls += [(callee, rounds or 1, rounds is not None) for callee in re.findall(r"[\w.-]+", callees)]
    return _Computation(collectives, calls, bounds[name])


def _collective(name: str, kind: str, result: str, rest: str, *, started: bool) -> tuple[str, int]:
    """The kind and bytes of one collective in the computation `name`."""
    sizes = [_bytes(dtype, shape) for dtype, shape in _ARRAY.findall(result)]
    # What starts an exchange returns its operands, its results, and counters.
    size = max(sizes) if started and kind != "all-reduce" else sum(sizes)
    if kind == "reduce-scatter":
        size *= _group_size(rest)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # as the compiler for TPUs writes it: each device keeps a slice of the sum
    return kind, size


def _group_size(rest: str) -> int:
    """Devices that take part, from one of three notations."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(counted[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 1


def _rounds(rest: str, bounds: dict[str, int | None]) -> int | None:
    """Rounds of a loop; None where its condition does not say."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)
    return bounds.get(condition[1]) if condition else None


def _bound(lines: list[str]) -> int | None:
    """The constant of a computation that is nothing but `counter < constant`."""
    constants = {}
    for line in lines:
        if not (found := _INSTRUCTION.match(line)):
            continue
        name, _, opcode, rest = found.groups()
        if opcode == "constant" and (value := re.match(r"(\d+)\)", rest)):
            constants[name] = int(value[1])
        if line.lstrip().startswith("ROOT"):
            compared = re.findall(r"%?([\w.-]+)", rest.partition(")")[0])
            known = [constants[operand] for operand in compared if operand in constants]
            return known[0] if opcode == "compare" and "direction=LT" in rest and len(known) == 1 else None
    return None


def _bytes(dtype: str, shape: str) -> int:
    """Of an array; layouts do not count."""
    bits = re.search(r"\d+", dtype)
    width = 8 if dtype == "pred" or bits is None else int(bits[0])
    return prod(int(n) for n in shape.split(",") if n) * width // 8
