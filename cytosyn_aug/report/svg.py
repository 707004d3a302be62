"""Plots as inline SVG: places of curves, bars and points, which `templates/plot.svg.j2` draws.

No library of plots and no script, so that a page holds them as they are and prints them sharp.
Colours are those of Okabe and Ito, which the colour-blind tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from cytosyn_aug.report.rendering import render

GREY = "#6b7280"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b38600", "#3aa0d8")
_WIDTH, _HEIGHT = 360, 220
_MAX_BARS = 50
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 44


class Curve(NamedTuple):
    """A line through points.

    Attributes:
        name: For its title.
        x: In ascending order.
        y: As many.
        colour: CSS colour.
        is_dashed: Whether its line is broken.
        is_filled: Whether what lies under it is tinted.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    is_dashed: bool = False
    is_filled: bool = False


class Points(NamedTuple):
    """Places in a plane.

    Attributes:
        name: For their titles.
        x: Any order.
        y: As many.
        colour: CSS colour.
        is_cross: Drawn as large crosses, for single marks.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    is_cross: bool = False


class Mark(NamedTuple):
    """A vertical line with its label."""

    x: float
    label: str


class Range(NamedTuple):
    """Ends of an axis."""

    low: float
    high: float


def plot_curves(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    x_range: Range | None = None,
    y_ticks: bool = False,
) -> Markup:
    """Return curves in one plot, from 0 upwards."""
    xs = [x for curve in curves for x in curve.x]
    highest = max((y for curve in curves for y in curve.y), default=0)
    frame = _Frame(x_range or _range(xs), Range(0, 1.05 * highest or 1))
    shapes = []
    for curve in curves:
        line = frame.line(curve.x, curve.y)
        area = ""
        if curve.is_filled and line:
            area = f"{frame.line(curve.x[:1], [0])} {line} {frame.line(curve.x[-1:], [0])}"
        shapes.append({**curve._asdict(), "line": line, "area": area})
    return _plot(frame, title, x_label, y_label, y_ticks=y_ticks, curves=shapes)


def plot_bars(
    counts: Sequence[Sequence[float]],
    x_range: Range,
    *,
    title: str,
    x_label: str,
    colours: Sequence[str] = COLOURS,
    marks: Sequence[Mark] = (),
    shown: Range | None = None,
) -> Markup:
    """Return histograms, one on top of the other.

    Args:
        counts: Of bins of one width from end to end of `x_range`; each [N]. Neighbouring bins are
            joined until at most 50 are shown.
        x_range: Ends of the bins.
        title: Read out instead of the plot.
        x_label: Below the axis.
        colours: One per histogram.
        marks: Vertical lines.
        shown: Ends of the axis; None for where there is something.
    """
    width = (x_range.high - x_range.low) / len(counts[0])
    shown = shown or _occupied([sum(c) for c in zip(*counts, strict=True)], x_range, marks)
    joined = math.ceil((shown.high - shown.low) / width / _MAX_BARS)
    width *= joined
    counts = [[sum(s[k : k + joined]) for k in range(0, len(s), joined)] for s in counts]
    num_bins = len(counts[0])
    highest = max(sum(column) for column in zip(*counts, strict=True))
    frame = _Frame(shown, Range(0, 1.1 * highest or 1))
    bars = []
    base = [0.0] * num_bins
    for series, colour in zip(counts, colours, strict=False):
        for k, count in enumerate(series):
            if not count:
                continue
            x = frame.x(x_range.low + k * width)
            wide = max(0.8, frame.x(x_range.low + (k + 1) * width) - x)
            top, bottom = frame.y(base[k] + count), frame.y(base[k])
            bars.append(_Bar(x, top, wide, bottom - top, colour))
            base[k] += count
    return _plot(
        frame,
        title,
        x_label,
        "results",
        bars=bars,
        marks=[(frame.x(mark.x), mark.label) for mark in marks],
    )


def plot_points(groups: Sequence[Points], *, title: str, x_label: str, y_label: str) -> Markup:
    """Return places in a plane, crosses on top."""
    xs = [x for group in groups for x in group.x]
    ys = [y for group in groups for y in group.y]
    frame = _Frame(_range(xs, margin=0.08), _range(ys, margin=0.08))
    shapes = [
        {
            **group._asdict(),
            "places": list(zip(map(frame.x, group.x), map(frame.y, group.y), strict=True)),
        }
        for group in sorted(groups, key=lambda group: group.is_cross)
    ]
    return _plot(frame, title, x_label, y_label, groups=shapes)


def ticks(ends: Range, most: int = 5) -> list[float]:
    """Return round numbers between two ends: steps of 1, 2 or 5 times a power of ten."""
    span = ends.high - ends.low
    if not span > 0:
        return [ends.low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first = math.ceil(ends.low / step - 1e-9)
    last = math.floor(ends.high / step + 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]


class _Bar(NamedTuple):
    """A bar in the picture."""

    x: float
    y: float
    width: float
    height: float
    colour: str


class _Frame:
    """From values to places in the picture."""

    width, height = _WIDTH, _HEIGHT
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM

    def __init__(self, x_range: Range, y_range: Range) -> None:
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        share = (value - self.x_range.low) / (self.x_range.high - self.x_range.low)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (value - self.y_range.low) / (self.y_range.high - self.y_range.low)
        return self.bottom - share * (self.bottom - self.top)

    def line(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """Return places as the points of a line."""
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def _plot(
    frame: _Frame,
    title: str,
    x_label: str,
    y_label: str,
    *,
    y_ticks: bool = True,
    curves: Sequence[object] = (),
    bars: Sequence[object] = (),
    groups: Sequence[object] = (),
    marks: Sequence[object] = (),
) -> Markup:
    return render(
        "plot.svg.j2",
        frame=frame,
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[(frame.x(value), f"{value:g}") for value in ticks(frame.x_range)],
        y_ticks=[(frame.y(v), _short(v)) for v in ticks(frame.y_range, 4)] if y_ticks else [],
        curves=curves,
        bars=bars,
        groups=groups,
        marks=marks,
    )


def _short(value: float) -> str:
    if abs(value) >= 1_000_000:
        return f"{value / 1_000_000:g}M"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _range(values: Sequence[float], margin: float = 0.0) -> Range:
    """Return the ends of values, apart from each other whatever they are."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    spare = margin * (high - low) or (0.5 if low == high else 0.0)
    return Range(low - spare, high + spare)


def _occupied(totals: Sequence[float], ends: Range, marks: Sequence[Mark]) -> Range:
    width = (ends.high - ends.low) / len(totals)
    places = [ends.low + k * width for k, total in enumerate(totals) if total]
    places += [place + width for place in places] + [mark.x for mark in marks]
    occupied = _range(places or list(ends), 0.06)
    return Range(max(ends.low, occupied.low), min(ends.high, occupied.high))
