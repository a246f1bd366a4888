"""Charts as inline SVG: pure functions from numbers to markup.

Colours are CSS classes (`c1` to `c7`), so that light and dark are a matter of the style sheet; all texts are
escaped. Every chart has the same frame, `WIDTH` by `HEIGHT` units, about a CSS pixel each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 348, 10, 188  # of the area between the axes

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve: `values[i]` at `xs[i]` of its chart; None where there is none."""

    name: str
    values: Sequence[float | None]
    colour: str  # a CSS class
    low: Sequence[float | None] = field(default=())  # of an interval around each value, or nothing
    high: Sequence[float | None] = field(default=())


@dataclass(frozen=True)
class Axis:
    """A linear map from values to units of the picture, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Where a value lies; one outside the range lies at its end."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def nice_ticks(low: float, high: float, count: int = 4) -> tuple[float, ...]:
    """Round numbers, about `count` steps apart, whose first and last enclose the range."""
    if high <= low:
        low, high = (low - 0.5 * abs(low), low + 0.5 * abs(low)) if low else (0.0, 1.0)
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * nice for nice in (1, 2, 2.5, 5, 10) if size * nice >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(number * step for number in range(first, last + 1))


def value_axis(values: Sequence[float], *, zero: bool = False) -> Axis:
    """The upright axis of some values, from zero on where asked."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    ticks = nice_ticks(min(low, 0.0) if zero else low, max(high, 0.0) if zero else high)
    return Axis(ticks[0], ticks[-1], BOTTOM, TOP, ticks)


def share_axis() -> Axis:
    """The upright axis from 0 to 1."""
    return Axis(0.0, 1.0, BOTTOM, TOP, (0.0, 0.25, 0.5, 0.75, 1.0))


def step_axis(steps: Sequence[float]) -> Axis:
    """The axis of steps; a single one lies in the middle."""
    low, high = min(steps), max(steps)
    if low == high:
        return Axis(low - 0.5, high + 0.5, LEFT, RIGHT, (low,))
    whole = [tick for tick in nice_ticks(low, high, 5) if low <= tick <= high and tick == round(tick)]
    return Axis(low, high, LEFT, RIGHT, tuple(whole) or (low, high))


def across(axis: Axis) -> Axis:
    """The same range, along the other direction."""
    return Axis(axis.low, axis.high, LEFT, RIGHT, axis.ticks)


def tick_text(value: float) -> str:
    """A tick's number in few characters."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


# ---------------------------------------------------------------------- parts of a picture


def join(parts: Sequence[Markup]) -> Markup:
    """Markup in a row."""
    return Markup("").join(parts)


def polyline(points: Sequence[Point]) -> str:
    """The path through some points."""
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)


def line(start: Point, end: Point, kind: str) -> Markup:
    """A straight line of a CSS class."""
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(*start, *end, kind)


def label(x: float, y: float, text: str, kind: str) -> Markup:
    """A text of a CSS class."""
    return Markup('<text x="{}" y="{}" class="{}">{}</text>').format(x, y, kind, text)


def path(points: Sequence[Point], kind: str) -> Markup:
    """A path of a CSS class through some points."""
    return Markup('<path d="{}" class="{}"/>').format(polyline(points), kind)


def frame(x: Axis, y: Axis, x_title: str) -> Markup:
    """Grid, ticks and their numbers, and what runs along the axis of x."""
    parts = [line((LEFT, y(tick)), (RIGHT, y(tick)), "rule") for tick in y.ticks]
    parts += [label(LEFT - 6, y(tick) + 4, tick_text(tick), "tick end") for tick in y.ticks]
    parts += [label(x(tick), BOTTOM + 15, tick_text(tick), "tick middle") for tick in x.ticks]
    parts.append(label((LEFT + RIGHT) / 2, HEIGHT - 3, x_title, "tick middle"))
    return join([*parts, line((LEFT, BOTTOM), (RIGHT, BOTTOM), "axis")])


def picture(title: str, inside: Sequence[Markup]) -> Markup:
    """The whole picture; `title` is what a screen reader says."""
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-left="{}" data-right="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, title, LEFT, RIGHT, join(inside))


def runs(flags: Sequence[bool]) -> list[list[int]]:
    """The indices of each unbroken run of true."""
    groups = groupby(range(len(flags)), key=lambda i: flags[i])
    return [list(group) for there, group in groups if there]


# ---------------------------------------------------------------------- charts over the steps


def line_chart(
    title: str, xs: Sequence[float], series: Sequence[Series], *, share: bool = False, zero: bool = True
) -> Markup:
    """Curves over the steps, each with its interval as a band; a value without neighbours is a dot.

    Args:
        title: for screen readers.
        xs: steps.
        series: each as long as `xs`.
        share: the values are shares, the axis goes from 0 to 1.
        zero: the axis begins at zero (or below).
    """
    seen = [v for s in series for v in (*s.values, *s.low, *s.high) if v is not None]
    x, y = step_axis(xs), share_axis() if share else value_axis(seen, zero=zero)
    bands = [band(xs, s, x, y) for s in series if s.low]
    curves = [curve(xs, s, x, y) for s in series]
    return picture(title, [frame(x, y, "step"), *bands, *curves])


def curve(xs: Sequence[float], series: Series, x: Axis, y: Axis) -> Markup:
    """One curve, broken where a value is missing."""
    parts = []
    for run in runs([v is not None for v in series.values]):
        points = [(x(xs[i]), y(v)) for i in run if (v := series.values[i]) is not None]
        if len(points) > 1:
            parts.append(path(points, f"line {series.colour}"))
        else:
            parts.append(dot(points[0], series.colour))
    return join(parts)


def dot(point: Point, colour: str, radius: float = 3) -> Markup:
    """A filled circle."""
    return Markup('<circle cx="{}" cy="{}" r="{}" class="dot {}"/>').format(*point, radius, colour)


def band(xs: Sequence[float], series: Series, x: Axis, y: Axis) -> Markup:
    """The intervals of a curve; that of a value without neighbours is an upright line."""
    ends = list(zip(series.low, series.high, strict=True))
    parts = []
    for run in runs([low is not None and high is not None for low, high in ends]):
        lower = [(x(xs[i]), y(ends[i][0] or 0.0)) for i in run]
        upper = [(x(xs[i]), y(ends[i][1] or 0.0)) for i in run]
        if len(run) > 1:
            parts.append(path([*upper, *reversed(lower)], f"band {series.colour}"))
        else:
            parts.append(line(lower[0], upper[0], f"line {series.colour}"))
    return join(parts)


def stacked_chart(title: str, xs: Sequence[float], layers: Sequence[Series], *, share: bool) -> Markup:
    """Areas upon each other over the steps, the first at the bottom; a single step is a bar."""
    heights = np.array([[v or 0.0 for v in layer.values] for layer in layers])
    tops = np.cumsum(heights, axis=0)
    bottoms = tops - heights
    x = step_axis(xs)
    y = share_axis() if share else value_axis([0.0, float(tops.max(initial=0.0))])
    columns = [(x(at), i) for i, at in enumerate(xs)]
    if len(columns) == 1:
        columns = [(x(xs[0] - 0.25), 0), (x(xs[0] + 0.25), 0)]
    areas = [
        path(
            [(at, y(tops[k, i])) for at, i in columns]
            + [(at, y(bottoms[k, i])) for at, i in reversed(columns)],
            f"area {layer.colour}",
        )
        for k, layer in enumerate(layers)
    ]
    return picture(title, [frame(x, y, "step"), *areas])


# ---------------------------------------------------------------------- distributions


def histogram_edges(values: Sequence[float], bins: int = 24) -> list[float]:
    """Edges of bins of one round width that hold all values."""
    ticks = nice_ticks(min(values), max(values), bins)
    return list(ticks)


def histogram_chart(
    title: str, x_title: str, edges: Sequence[float], groups: Sequence[Series], y_title: str = "share"
) -> Markup:
    """Histograms over the same bins, each an outline with a light fill.

    Args:
        title: for screen readers.
        x_title: what is counted.
        edges: of the bins.
        groups: `values[i]` is the share of bin i, from `edges[i]` to `edges[i + 1]`.
        y_title: what is drawn upwards.
    """
    ticks = tuple(tick for tick in nice_ticks(edges[0], edges[-1], 5) if edges[0] <= tick <= edges[-1])
    x = Axis(edges[0], edges[-1], LEFT, RIGHT, ticks)
    y = value_axis([0.0, *(v for group in groups for v in group.values if v is not None)])
    shapes = []
    for group in groups:
        outline: list[Point] = [(x(edges[0]), y(0.0))]
        for i, value in enumerate(group.values):
            outline += [(x(edges[i]), y(value or 0.0)), (x(edges[i + 1]), y(value or 0.0))]
        shapes.append(path([*outline, (x(edges[-1]), y(0.0))], f"bars {group.colour}"))
    return picture(title, [frame(x, y, f"{x_title} (upwards: {y_title})"), *shapes])


@dataclass(frozen=True)
class Bin:
    """Probes of about the same confidence."""

    count: int
    confidence: float  # mean
    accuracy: float  # share whose tentative answer was right
    low: float  # of its 95 % interval
    high: float


def reliability_chart(title: str, bins: Sequence[Bin]) -> Markup:
    """The share of right tentative answers against the confidence; on the diagonal both agree."""
    y = share_axis()
    x = across(y)
    most = max(b.count for b in bins)
    parts = [line((x(0), y(0)), (x(1), y(1)), "diagonal")]
    for b in bins:
        parts.append(line((x(b.confidence), y(b.low)), (x(b.confidence), y(b.high)), "line c1"))
        parts.append(dot((x(b.confidence), y(b.accuracy)), "c1", round(3 + 5 * math.sqrt(b.count / most), 2)))
    return picture(title, [frame(x, y, "confidence (upwards: share right)"), *parts])
