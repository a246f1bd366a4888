"""How far the confidence of a probe can be trusted: reliability, calibration error, and their picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BINS = 10

Figures = dict[str, Any]


def reliability_bins(confidence: np.ndarray, correct: np.ndarray, count: int = BINS) -> list[Figures]:
    """Probes sorted into bins of equal width by their confidence.

    A bin holds its lower end; the last one holds 1 too.

    Args:
        confidence: `[N]`, each in [0, 1].
        correct: `[N]`, whether the tentative answer was right.
        count: of the bins.

    Returns:
        Of each bin its ends `low` and `high`, the `count` of its probes, and their mean `confidence` and
        `accuracy`, None where there is none.
    """
    place = np.minimum(np.floor(np.asarray(confidence, float) * count).astype(int), count - 1)
    found = []
    for i in range(count):
        inside = place == i
        found.append(
            {
                "low": i / count,
                "high": (i + 1) / count,
                "count": int(inside.sum()),
                "confidence": mean(confidence[inside]),
                "accuracy": mean(correct[inside]),
            }
        )
    return found


def calibration_error(bins: Sequence[Mapping[str, Any]]) -> float | None:
    """The expected calibration error (Guo et al. 2017, arXiv 1706.04599, Eq. 3).

    The mean distance of confidence and accuracy over bins, each weighted by its probes; None without probes.

    Args:
        bins: from `reliability_bins`.
    """
    filled = [own for own in bins if own["count"]]
    if not filled:
        return None
    total = sum(own["count"] for own in filled)
    return sum(own["count"] / total * abs(own["accuracy"] - own["confidence"]) for own in filled)


def calibration(confidence: np.ndarray, correct: np.ndarray, delta: float) -> Figures:
    """The figures of a set of probes, all plain numbers; None where there is nothing to take a mean of.

    Args:
        confidence: `[N]`.
        correct: `[N]`.
        delta: the threshold of an exit.

    Returns:
        `ece`, the `count` of probes, mean `confidence`, `accuracy`, `share_above_delta`, and
        `precision_above_delta`: how many of those above, the ones that exit, are right.
    """
    above = confidence > delta
    bins = reliability_bins(confidence, correct)
    return {
        "ece": calibration_error(bins),
        "count": len(confidence),
        "confidence": mean(confidence),
        "accuracy": mean(correct),
        "delta": delta,
        "share_above_delta": mean(above),
        "precision_above_delta": mean(correct[above]),
        "bins": bins,
    }


def mean(values: np.ndarray) -> float | None:
    """The mean, None of no values."""
    return float(np.mean(values)) if len(values) else None


def draw_reliability(curves: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """A reliability diagram: accuracy against confidence, and below it where the probes lie.

    Args:
        curves: title -> what `calibration` returns, all with one delta.
        out: a file to write, `.png` or `.svg`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (slow to import)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6.5, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes, shares = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="confidence is accuracy")
    for i, (title, own) in enumerate(curves.items()):
        filled = [one for one in own["bins"] if one["count"]]
        ece = "no probes" if own["ece"] is None else f"ECE {own['ece']:.3f}, {own['count']} probes"
        axes.plot(
            [one["confidence"] for one in filled],
            [one["accuracy"] for one in filled],
            marker="osD^vP*X"[i % 8], color=f"C{i % 10}", label=f"{title}: {ece}",
        )  # fmt: skip
        shares.plot(
            [(one["low"] + one["high"]) / 2 for one in own["bins"]],
            [one["count"] / max(own["count"], 1) for one in own["bins"]],
            marker="osD^vP*X"[i % 8], color=f"C{i % 10}",
        )  # fmt: skip
    for delta in {own["delta"] for own in curves.values()}:
        for each in (axes, shares):
            each.axvline(delta, color="0.3", linestyle=":", linewidth=1)
        axes.text(delta - 0.01, 0.02, f"delta {delta:g}", rotation=90, ha="right", fontsize="small")
    axes.set(ylabel="share of tentative answers that are right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    shares.set(xlabel="confidence of the probe", ylabel="share of probes", ylim=(0, None))
    for each in (axes, shares):
        each.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")
    figure.savefig(out, dpi=150)
