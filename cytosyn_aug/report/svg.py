"""Plots as inline SVG: curves, bars and points, drawn from numbers as text.

No library and no script, so that a page holds them as they are and prints them sharp. Colours are
those of Okabe and Ito, which the colour-blind tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cytosyn_aug.report.html import Html, escaped

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
) -> Html:
    """Return curves in one plot, from 0 upwards."""
    xs = [x for curve in curves for x in curve.x]
    highest = max((y for curve in curves for y in curve.y), default=0)
    frame = _Frame(x_range or _range(xs), Range(0, 1.05 * highest or 1))
    parts = [frame.axes(x_label, y_label, y_ticks)]
    for curve in curves:
        pairs = zip(curve.x, curve.y, strict=True)
        places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in pairs)
        if curve.is_filled and places:
            left, right, foot = frame.x(curve.x[0]), frame.x(curve.x[-1]), frame.y(0)
            ends = f"{left:.1f},{foot:.1f} {places} {right:.1f},{foot:.1f}"
            parts.append(f'<polygon points="{ends}" fill="{curve.colour}" opacity=".22"/>')
        dash = ' stroke-dasharray="5 3"' if curve.is_dashed else ""
        parts.append(
            f'<polyline points="{places}" fill="none" stroke="{curve.colour}" stroke-width="1.8" '
            f'stroke-linejoin="round"{dash}><title>{escaped(curve.name)}</title></polyline>'
        )
    return _svg(title, parts)


def plot_bars(
    counts: Sequence[Sequence[float]],
    x_range: Range,
    *,
    title: str,
    x_label: str,
    colours: Sequence[str] = COLOURS,
    marks: Sequence[Mark] = (),
    shown: Range | None = None,
) -> Html:
    """Return histograms, one on top of the other.

    Args:
        counts: Of bins of one width from end to end of `x_range`; each [N]. Neighbouring bins are
            joined until at most 50 are shown.
        x_range: Ends of the bins.
        title: Read out instead of the plot.
        x_label: Below the axis.
        colours: One a histogram.
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
    parts = [frame.axes(x_label, "results", y_ticks=True)]
    base = [0.0] * num_bins
    for series, colour in zip(counts, colours, strict=False):
        for k, count in enumerate(series):
            if not count:
                continue
            x = frame.x(x_range.low + k * width)
            wide = max(0.8, frame.x(x_range.low + (k + 1) * width) - x)
            top, bottom = frame.y(base[k] + count), frame.y(base[k])
            parts.append(
                f'<rect x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{bottom - top:.1f}" '
                f'fill="{colour}"/>'
            )
            base[k] += count
    parts += [frame.mark(mark) for mark in marks]
    return _svg(title, parts)


def plot_points(groups: Sequence[Points], *, title: str, x_label: str, y_label: str) -> Html:
    """Return places in a plane, crosses on top."""
    xs = [x for group in groups for x in group.x]
    ys = [y for group in groups for y in group.y]
    frame = _Frame(_range(xs, margin=0.08), _range(ys, margin=0.08))
    parts = [frame.axes(x_label, y_label, y_ticks=True)]
    for group in sorted(groups, key=lambda group: group.is_cross):
        name = f"<title>{escaped(group.name)}</title>"
        for x, y in zip(group.x, group.y, strict=True):
            parts.append(_point(frame.x(x), frame.y(y), group, name))
    return _svg(title, parts)


def legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    """Return a legend as HTML.

    Args:
        entries: Name, colour and kind ("line", "dashed", "area" or "cross") of each.
    """
    samples = {
        "line": '<path d="M0 6h22" stroke="{0}" stroke-width="2.4"/>',
        "dashed": '<path d="M0 6h22" stroke="{0}" stroke-width="2.4" stroke-dasharray="5 3"/>',
        "area": '<rect width="22" height="12" fill="{0}" opacity=".35"/>',
        "cross": '<path d="M6 1l10 10M16 1l-10 10" stroke="{0}" stroke-width="2.6"/>',
    }
    items = (
        f'<span><svg width="22" height="12" aria-hidden="true">{samples[kind].format(colour)}'
        f"</svg> {escaped(name)}</span>"
        for name, colour, kind in entries
    )
    return Html(f'<p class="legend">{"".join(items)}</p>')


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


class _Frame:
    """From values to places in the picture."""

    def __init__(self, x_range: Range, y_range: Range) -> None:
        self._x, self._y = x_range, y_range

    def x(self, value: float) -> float:
        share = (value - self._x.low) / (self._x.high - self._x.low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self._y.low) / (self._y.high - self._y.low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str, y_label: str, y_ticks: bool) -> str:
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        parts = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#9ca3af"/>']
        for value in ticks(self._x):
            x = self.x(value)
            parts.append(f'<path d="M{x:.1f} {bottom}v4" stroke="#9ca3af"/>')
            parts.append(_text(x, bottom + 17, f"{value:g}"))
        for value in ticks(self._y, 4) if y_ticks else ():
            y = self.y(value)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#e5e7eb"/>')
            parts.append(_text(_LEFT - 5, y + 3.5, _short(value), "end"))
        parts.append(_text((_LEFT + right) / 2, _HEIGHT - 6, x_label))
        if y_label:
            middle = (_TOP + bottom) / 2
            turned = f' transform="rotate(-90 13 {middle:.0f})"'
            parts.append(_text(13, middle, y_label, more=turned))
        return "".join(parts)

    def mark(self, mark: Mark) -> str:
        x = self.x(mark.x)
        is_left = x > (_LEFT + _WIDTH - _RIGHT) / 2
        place, anchor = (x - 4, "end") if is_left else (x + 4, "start")
        line = f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#b91c1c" stroke-width="1.6"'
        return f'{line} stroke-dasharray="4 3"/>' + _text(place, _TOP + 8, mark.label, anchor)


def _point(x: float, y: float, group: Points, name: str) -> str:
    if not group.is_cross:
        place = f'cx="{x:.1f}" cy="{y:.1f}" r="2.6"'
        return f'<circle {place} fill="{group.colour}" opacity=".55">{name}</circle>'
    path = f"M{x - 6:.1f} {y - 6:.1f}l12 12m0 -12l-12 12"
    white = f'<path d="{path}" stroke="#fff" stroke-width="5.5"/>'
    return f'{white}<path d="{path}" stroke="{group.colour}" stroke-width="2.8">{name}</path>'


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escaped(text)}</text>'


def _short(value: float) -> str:
    if abs(value) >= 1_000_000:
        return f"{value / 1_000_000:g}M"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _svg(title: str, parts: Sequence[str]) -> Html:
    label = escaped(title)
    opening = f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
    return Html(f'{opening} aria-label="{label}">{"".join(parts)}</svg>')


def _range(values: Sequence[float], margin: float = 0.0) -> Range:
    """Return the ends of values, apart from each other whatever they are."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    spare = margin * (high - low) or (0.5 if low == high else 0.0)
    return Range(low - spare, high + spare)


def _occupied(totals: Sequence[float], ends: Range, marks: Sequence[Mark]) -> Range:
    width = (ends.high - ends.low) / len(totals)
    places = [ends.low + k * width for k, total in enumerate(totals) if total]
    places += [place + width for place in places] + [mark.x for mark in marks]
    found = _range(places or list(ends), 0.06)
    return Range(max(ends.low, found.low), min(ends.high, found.high))
