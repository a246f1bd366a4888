"""The figures of the page: each a picture, its legend, and a table of the same numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from step_grpo.calibration import calibration_error, reliability_bins
from step_grpo.html_report import charts
from step_grpo.html_report.charts import Bin, Series
from step_grpo.html_report.read import Row, RunFiles
from step_grpo.rollout.phases import REASONS
from step_grpo.statistics import wilson_interval

Show = Callable[[float], str]
Z = 1.959964  # standard errors on either side of a mean in its 95 % interval
STAGES = {
    "rollout_seconds": "rollout",
    "grading_seconds": "grading",
    "update_seconds": "update",
}
REASON_TEXTS = {
    "early_exit": "early exit: a probe passed",
    "natural": "natural: the model closed the thinking itself",
    "budget": "budget: the thinking budget was spent",
    "rep": "rep: the thinking repeated itself",
    "eos": "eos: the text ended inside the thinking",
    "length": "length: the response budget was spent inside the thinking",
    "unfinished": "unfinished",
}
REASON_COLOURS = {
    **{"early_exit": "c1", "natural": "c2", "budget": "c3", "rep": "c4", "eos": "c5"},
    **{"length": "c6", "unfinished": "c7"},
}


@dataclass(frozen=True)
class Table:
    """Numbers as text: the heads of the columns, and the rows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A picture with what belongs to it.

    Attributes:
        key: its id in the page.
        title: a few words.
        note: a sentence or two on how to read it.
        picture: SVG; empty where the data are missing, and `note` says so.
        legend: names and CSS classes of what is drawn; empty for a single curve.
        table: the same numbers.
        stepwise: whether the rows of the table are the steps along the axis of the picture.
    """

    key: str
    title: str
    note: str
    picture: Markup = field(default=Markup(""))
    legend: Sequence[tuple[str, str]] = ()
    table: Table = field(default=Table((), ()))
    stepwise: bool = False


@dataclass(frozen=True)
class Curves:
    """Which figures of `metrics.jsonl` are drawn together, and how."""

    key: str
    title: str
    note: str
    names: Mapping[str, str]  # figure of the metrics -> its name in the legend
    share: bool = False


CURVES = (
    Curves("accuracy", "Accuracy", "Share of right training completions.", {"accuracy": "accuracy"}, True),
    Curves("tokens", "Tokens", "Mean length of a training completion.", {"tokens": "tokens"}),
    Curves("steps", "Reasoning steps", "Mean of k, triggers + 1.", {"steps": "steps"}),
    Curves("reward", "Reward", "Mean reward of the training completions.", {"reward": "reward"}),
    Curves("kl", "KL", "To the first policy, nats a token.", {"kl": "KL"}),
    Curves("entropy", "Entropy", "Of the policy, nats a token.", {"entropy": "entropy"}),
    Curves(
        "clipped",
        "Clipped tokens",
        "Share of the trained tokens whose ratio was clipped.",
        {"clipped_low": "low", "clipped_high": "high", "dual_clipped": "dual"},
    ),
    Curves(
        "gap",
        "Sampler-trainer gap",
        "Mean difference of the log-probs of sampler and trainer, nats a token.",
        {"sampler_gap": "mean", "sampler_gap_rms": "root mean square"},
    ),
    Curves("grad_norm", "Gradient norm", "Before clipping.", {"grad_norm": "gradient norm"}),
)
SPEED = Curves(
    "speed",
    "Speed",
    "Tokens that the rollout generated a second.",
    {"generated_per_second": "tokens a second"},
)


def number(value: float | None) -> str:
    """A number of a table."""
    return "" if value is None else f"{value:.6g}"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


def column(metrics: Sequence[Row], name: str) -> list[float | None]:
    """A figure of every step; None where a step has none."""
    return [line.get(name) for line in metrics]


def steps_of(metrics: Sequence[Row]) -> list[float]:
    """The steps that there are lines of."""
    return [line["step"] for line in metrics]


# ---------------------------------------------------------------------- over the steps


def stepwise(
    key: str, title: str, note: str, picture: Markup, xs: Sequence[float], series: Sequence[Series]
) -> Figure:
    """The figure of some series over the steps, with their numbers and intervals as a table."""
    heads, columns = ["step"], [[number(x) for x in xs]]
    for s in series:
        heads.append(s.name)
        columns.append([number(v) for v in s.values])
        if s.low:
            heads.append(f"{s.name}, 95 % interval")
            ends = zip(s.low, s.high, strict=True)
            columns.append([f"{number(a)} to {number(b)}" if a is not None else "" for a, b in ends])
    legend = [(s.name, s.colour) for s in series] if len(series) > 1 else []
    rows = list(zip(*columns, strict=True))
    return Figure(key, title, note, picture, legend, Table(heads, rows), stepwise=True)


def curves(metrics: Sequence[Row]) -> list[Figure]:
    """The figures of `CURVES` that the run has."""
    return [drawn for curves in CURVES if (drawn := curve_figure(metrics, curves))]


def curve_figure(metrics: Sequence[Row], curves: Curves) -> Figure | None:
    """One of `CURVES`; None where no step has any of its figures."""
    series = [
        with_interval(metrics, name, Series(said, column(metrics, name), f"c{i}"), curves.share)
        for i, (name, said) in enumerate(curves.names.items(), start=1)
    ]
    series = [s for s in series if any(v is not None for v in s.values)]
    if not series:
        return None
    xs = steps_of(metrics)
    note = curves.note + (" The band is the 95 % interval over prompts." if series[0].low else "")
    picture = charts.line_chart(f"{curves.title} over the steps", xs, series, share=curves.share)
    return stepwise(curves.key, curves.title, note, picture, xs, series)


def with_interval(metrics: Sequence[Row], name: str, series: Series, share: bool) -> Series:
    """The series with its 95 % interval, where the metrics have the standard error of the mean."""
    errors = column(metrics, f"{name}_error")
    if not any(e is not None for e in errors):
        return series
    ends: dict[float, list[float | None]] = {}
    for side in (-Z, Z):
        pairs = zip(series.values, errors, strict=True)
        values = [None if v is None or e is None else v + side * e for v, e in pairs]
        ends[side] = [None if v is None else min(max(v, 0.0), 1.0) for v in values] if share else values
    return Series(series.name, series.values, series.colour, ends[-Z], ends[Z])


def exits_figure(metrics: Sequence[Row]) -> Figure:
    """Why completions left the thinking, over the steps."""
    xs = steps_of(metrics)
    layers = [
        Series(reason, column(metrics, f"exit_{reason}"), REASON_COLOURS[reason])
        for reason in sorted(REASONS, key=list(REASON_COLOURS).index)
    ]
    layers = [layer for layer in layers if any(layer.values)]
    if not layers:
        return Figure("exits", "Exits by reason", "The metrics of this run hold no exits.")
    note = "; ".join(REASON_TEXTS[layer.name] for layer in layers) + "."
    picture = charts.stacked_chart("Share of completions by the reason of their exit", xs, layers, share=True)
    return stepwise("exits", "Exits by reason", note, picture, xs, layers)


# ---------------------------------------------------------------------- confidence


def percentiles_figure(metrics: Sequence[Row]) -> Figure:
    """Percentiles of the probes' confidences over the steps."""
    title = "Confidence of the probes"
    names = {"confidence_p10": "10 %", "confidence_p50": "median", "confidence_p90": "90 %"}
    names |= {"confidence_above_delta": "share that passed"}
    series = [Series(said, column(metrics, name), f"c{i}") for i, (name, said) in enumerate(names.items(), 1)]
    series = [s for s in series if any(v is not None for v in s.values)]
    if not series:
        return Figure("confidence", title, "There was no probe in this run, so there are no confidences.")
    xs = steps_of(metrics)
    note = "Percentiles over all probes of a step, and the share of them that ended the thinking."
    picture = charts.line_chart(f"{title} over the steps", xs, series, share=True)
    return stepwise("confidence", title, note, picture, xs, series)


def confidence_histogram(rollouts: Sequence[Row], probes: Sequence[Row]) -> Figure:
    """How often each confidence occurs, early and late in the training and in an offline probing."""
    title = "Confidence histogram"
    half = (rollouts[0]["step"] + rollouts[-1]["step"]) / 2 if rollouts else 0
    groups = {
        "training, first half": [c for r in rollouts if r["step"] <= half for c in r["confidences"]],
        "training, second half": [c for r in rollouts if r["step"] > half for c in r["confidences"]],
        "offline probes": [p["confidence"] for p in probes if p["confidence"] is not None],
    }
    groups = {name: values for name, values in groups.items() if values}
    if not groups:
        note = "It needs probes in rollouts.jsonl or a probes.jsonl, and this workdir has none."
        return Figure("confidences", title, note)
    edges = [i / 20 for i in range(21)]
    note = (
        "Share of the probes by confidence: "
        + ", ".join(f"{len(values)} of {name}" for name, values in groups.items())
        + ". Training probes are those of the completions in rollouts.jsonl."
    )
    return distribution("confidences", title, note, "confidence", edges, groups)


def distribution(
    key: str,
    title: str,
    note: str,
    x_title: str,
    edges: Sequence[float],
    groups: Mapping[str, Sequence[float]],
) -> Figure:
    """The histograms of some groups of values over the same bins, as shares of each group."""
    counts = {name: np.histogram(values, edges)[0] for name, values in groups.items()}
    series = [
        Series(name, [float(c) / max(len(groups[name]), 1) for c in counts[name]], f"c{i}")
        for i, name in enumerate(groups, start=1)
    ]
    rows = [
        [f"{number(edges[i])} to {number(edges[i + 1])}", *(str(int(counts[name][i])) for name in groups)]
        for i in range(len(edges) - 1)
    ]
    picture = charts.histogram_chart(title, x_title, edges, series)
    legend = [(s.name, s.colour) for s in series]
    return Figure(key, title, note, picture, legend, Table([x_title, *groups], rows))


def calibration(probes: Sequence[Row]) -> tuple[list[Bin], float]:
    """The bins of `step_grpo.calibration` that hold probes, with intervals, and the calibration error.

    Args:
        probes: with `confidence` in [0, 1] and `correct`; at least one.
    """
    confidence = np.array([p["confidence"] for p in probes], float)
    bins = reliability_bins(confidence, np.array([p["correct"] for p in probes], bool))
    drawn = []
    for own in bins:
        if count := own["count"]:
            interval = wilson_interval(round(own["accuracy"] * count), count)
            drawn.append(Bin(count, own["confidence"], own["accuracy"], *interval))
    return drawn, calibration_error(bins) or 0.0


def reliability_figure(probes: Sequence[Row]) -> Figure:
    """Whether a confidence can be trusted: right tentative answers by confidence."""
    title = "Reliability of the confidence"
    judged = [p for p in probes if p["confidence"] is not None and isinstance(p["correct"], bool)]
    if not judged:
        note = (
            "It needs the tentative answers of the probes, graded, in a probes.jsonl or probes/probes.jsonl; "
            "this workdir has none (python -m step_grpo.probing --workdir=WORKDIR/probes writes one)."
        )
        return Figure("reliability", title, note)
    bins, error = calibration(judged)
    note = (
        f"{len(judged)} probes of finished completions; expected calibration error (ECE) {error:.4f}. On the "
        "dashed line an answer is right as often as it is held to be; bars are 95 % intervals, larger dots "
        "hold more probes."
    )
    rows = [
        [
            str(b.count),
            number(b.confidence),
            number(b.accuracy),
            f"{number(b.low)} to {number(b.high)}",
        ]
        for b in bins
    ]
    table = Table(["probes", "mean confidence", "share right", "95 % interval"], rows)
    return Figure("reliability", title, note, charts.reliability_chart(title, bins), (), table)


# ---------------------------------------------------------------------- lengths, time


def lengths_figure(completions: Mapping[str, Sequence[Row]]) -> Figure:
    """Tokens of the completions before and after the training."""
    title = "Length of the completions"
    groups = {name: [row["tokens"] for row in rows] for name, rows in completions.items()}
    if not groups:
        return Figure("lengths", title, "It needs completions_before.jsonl or completions_after.jsonl.")
    medians = ", ".join(f"median {name} {np.median(values):g}" for name, values in groups.items())
    missing = [name for name in ("before", "after") if name not in groups]
    note = f"Tokens of the completions of the evaluations, as shares; {medians}."
    note += "".join(f" There is no completions_{name}.jsonl yet." for name in missing)
    edges = charts.histogram_edges([v for values in groups.values() for v in values])
    return distribution("lengths", title, note, "tokens", edges, groups)


@dataclass(frozen=True)
class Spent:
    """Seconds that a part of the run took, and their share of all."""

    name: str
    seconds: float
    share: float
    colour: str


def time_spent(run: RunFiles) -> list[Spent]:
    """Where the time of the run went, as far as it was written down; compiling is part of the others."""
    seconds = {said: sum(line.get(name) or 0.0 for line in run.metrics) for name, said in STAGES.items()}
    seconds |= {f"evaluation {name}": float(s) for name, s in run.evaluation_seconds.items()}
    if (rest := run.seconds - sum(seconds.values())) > 0:
        seconds["loading, saving and the rest"] = rest
    total = sum(seconds.values()) or 1.0
    parts = [Spent(name, s, s / total, f"c{i}") for i, (name, s) in enumerate(seconds.items(), start=1)]
    if any("compile_seconds" in line for line in run.metrics):
        compiling = sum(line.get("compile_seconds") or 0.0 for line in run.metrics)
        parts.append(Spent("compiling, in rollout and update", compiling, compiling / total, "c7"))
    return parts


def time_figures(metrics: Sequence[Row]) -> list[Figure]:
    """The seconds of each step by stage, and the speed of the rollout."""
    xs = steps_of(metrics)
    layers = [
        Series(said, column(metrics, name), f"c{i}") for i, (name, said) in enumerate(STAGES.items(), start=1)
    ]
    note = "The first step compiles the programs."
    picture = charts.stacked_chart("Seconds of each step by stage", xs, layers, share=False)
    seconds = stepwise("time", "Seconds of a step", note, picture, xs, layers)
    return [figure for figure in (seconds, curve_figure(metrics, SPEED)) if figure]


# ---------------------------------------------------------------------- before and after


def evaluation_rows(run: RunFiles, compared: Mapping[str, Any] | None) -> Table:
    """The evaluations before and after side by side.

    Args:
        run: with at least one evaluation.
        compared: of `outcomes.comparison`; None where there are no two runs to compare.
    """
    names = list(run.evaluations)
    figures = [run.evaluations[name] for name in names]
    rows = [
        ["accuracy", *(with_ends(f, "accuracy", lambda v: f"{100 * v:.1f}", " %") for f in figures)],
        ["tokens, mean", *(with_ends(f, "tokens", "{:.1f}".format) for f in figures)],
        ["tokens, median", *(f"{f['tokens_median']:g}" for f in figures)],
        ["steps, mean", *(with_ends(f, "steps", "{:.2f}".format) for f in figures)],
        ["cut off by the length limit", *(percent(f["truncated"]) for f in figures)],
        ["questions", *(str(f["questions"]) for f in figures)],
        ["samples a question", *(str(f["samples"]) for f in figures)],
    ]
    if compared is None:
        return Table(["", *names], rows)
    changes = {
        "accuracy": difference(compared["accuracy"], lambda v: f"{100 * v:+.1f}", " points"),
        "tokens, mean": difference(compared["tokens_relative"], lambda v: f"{100 * v:+.1f}", " %"),
        "steps, mean": difference(compared["steps"], lambda v: f"{v:+.2f}"),
    }
    return Table(["", *names, "change"], [[*row, changes.get(row[0], "")] for row in rows])


def with_ends(figures: Row, name: str, show: Show, unit: str = "") -> str:
    """A mean and its 95 % interval."""
    ends = f"{show(figures[f'{name}_low'])} to {show(figures[f'{name}_high'])}"
    return f"{show(figures[name])}{unit} ({ends})"


def difference(found: Mapping[str, float], show: Show, unit: str = "") -> str:
    """A difference with its 95 % interval and p-value."""
    ends = f"{show(found['low'])} to {show(found['high'])}"
    return f"{show(found['mean'])}{unit} ({ends}; p = {found['p_value']:.2g})"
