"""Timings that can be compared on a machine whose speed drifts: interleaved repetitions, paired ratios."""

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of paired repetitions, and the smallest and largest of them."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g}, {self.pairs} pairs)"


@dataclass(frozen=True)
class Rates:
    """Work a second of one contestant, `[repeats]`; the same index is the same repetition."""

    wall: np.ndarray
    cpu: np.ndarray  # of this process, all threads: steadier than `wall` where other programs run

    def over(self, other: "Rates") -> Ratio:
        """The ratio to another contestant in wall time."""
        return paired(self.wall, other.wall)

    def cpu_over(self, other: "Rates") -> Ratio:
        """The ratio to another contestant in CPU time."""
        return paired(self.cpu, other.cpu)


def interleave(
    contestants: Mapping[str, Callable[[], float]], repeats: int, *, warm_up: bool = True
) -> dict[str, Rates]:
    """Runs all contestants in turn, `repeats` times, every other time in reverse order.

    Args:
        contestants: each does its work and returns how much of it there was.
        repeats: counted repetitions.
        warm_up: one repetition before them, in which programs compile, does not count.

    Returns:
        The rates of each contestant.
    """
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for repeat in range(-int(warm_up), repeats):
        order = list(contestants) if repeat % 2 == 0 else list(contestants)[::-1]
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            work = contestants[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repeat >= 0:
                rates[name].append((work / wall, work / cpu))
    return {name: Rates(*np.array(measured).T) for name, measured in rates.items()}


def paired(rates: np.ndarray, others: np.ndarray) -> Ratio:
    """The ratio of two contestants, repetition by repetition."""
    ratios = rates / others
    return Ratio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()), len(ratios))


def memory_bandwidth(megabytes: int = 128, repeats: int = 5) -> float:
    """Bytes a second that all cores together read and write in a plain copy of more than the caches hold."""
    cores = len(os.sched_getaffinity(0))
    size = megabytes * 2**20 // 8
    pairs = [(np.ones(size), np.empty(size)) for _ in range(cores)]

    def copy(pair):
        np.copyto(pair[1], pair[0])

    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats + 1):  # the first touches the pages
            started = time.perf_counter()
            list(pool.map(copy, pairs))
            best = max(best, cores * 2 * 8 * size / (time.perf_counter() - started))
    return best


def conditions() -> dict[str, Any]:
    """How many cores there are, and how busy the machine is."""
    return {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}


def plain(value: Any) -> Any:
    """The value as JSON holds it: ratios as objects, floats with four digits."""
    if isinstance(value, Ratio):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
