"""Plots of tissue colours before and after, beside those of references.

In each axis of `cytosyn_aug.report.tissue_colours` and in two planes, a*-b* and haematoxylin-eosin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from cytosyn_aug.report.measures import ReferenceColour
from cytosyn_aug.report.rendering import render
from cytosyn_aug.report.svg import COLOURS, GREY, Curve, Points, Range, plot_curves, plot_points
from cytosyn_aug.report.tallies import Histogram
from cytosyn_aug.report.tissue_colours import (
    LAB,
    STAINS,
    ColourDistribution,
    pooled_histograms,
)

_AXIS_NAMES = {
    "L*": "L*, lightness",
    "a*": "a*, green to red",
    "b*": "b*, blue to yellow",
    "H": "H, haematoxylin",
    "E": "E, eosin",
}
# Of all pixels, in a bin; where there are fewer a plot ends.
_LEAST_SHARE = 2e-4


def plot_colours(
    before: Sequence[ColourDistribution],
    after: Mapping[str, ColourDistribution],
    references: Sequence[ReferenceColour] = (),
) -> Markup:
    """Return all plots with their legend.

    Args:
        before: Of the sources; none if they are not at hand.
        after: Of results, by the name of their reference, at most as many as there are colours.
        references: What is known of those of these names.
    """
    palette = dict(zip(after, COLOURS, strict=False))
    known = {found.name: found for found in references if found.name in palette}
    rows = []
    for axes, plane in ((LAB, ("a*", "b*")), (STAINS, ("H", "E"))):
        plots = [_axis_plot(axis, before, after, palette, known) for axis in axes]
        plots.append(_plane_plot(plane, before, after, palette, known))
        rows.append(plots)
    entries = _legend(bool(before), palette, known)
    return render("colour_plots.html.j2", entries=entries, rows=rows)


def _legend(
    has_sources: bool, palette: Mapping[str, str], known: Mapping[str, ReferenceColour]
) -> list[tuple[str, str, str]]:
    """Return name, colour and kind of line of all that plots show."""
    entries = [("sources", GREY, "area")] if has_sources else []
    for name, shade in palette.items():
        entries.append((f"results, {name}" if name else "results", shade, "line"))
        reference = known.get(name)
        if reference is not None and reference.distribution is not None:
            entries.append((f"reference {name}", shade, "dashed"))
        elif reference is not None and reference.mean is not None:
            entries.append((f"reference {name}, its mean", shade, "cross"))
    return entries


def _axis_plot(
    axis: str,
    before: Sequence[ColourDistribution],
    after: Mapping[str, ColourDistribution],
    palette: Mapping[str, str],
    known: Mapping[str, ReferenceColour],
) -> Markup:
    curves = []
    if before:
        sources = _curve("sources", pooled_histograms(before)[axis], GREY)
        curves.append(sources._replace(is_filled=True))
    for name, shade in palette.items():
        own = known[name].distribution if name in known else None
        if own is not None:
            curve = _curve(f"reference {name}", own.histograms[axis], shade)
            curves.append(curve._replace(is_dashed=True))
        curves.append(_curve(f"results {name}", after[name].histograms[axis], shade))
    pairs = [pair for curve in curves for pair in zip(curve.x, curve.y, strict=True)]
    places = [x for x, share in pairs if share > _LEAST_SHARE] or [0.0, 1.0]
    ends = Range(min(places), max(places))
    cut = [_cut(curve, ends) for curve in curves]
    title = f"distribution of {_AXIS_NAMES[axis]}"
    return plot_curves(cut, title=title, x_label=_AXIS_NAMES[axis], x_range=ends)


def _curve(name: str, histogram: Histogram, shade: str) -> Curve:
    shares = histogram.counts / max(histogram.total, 1e-9)
    return Curve(name, histogram.centres.tolist(), shares.tolist(), shade)


def _cut(curve: Curve, ends: Range) -> Curve:
    pairs = zip(curve.x, curve.y, strict=True)
    inside = [(x, y) for x, y in pairs if ends.low <= x <= ends.high]
    return curve._replace(x=[x for x, _ in inside], y=[y for _, y in inside])


def _plane_plot(
    plane: tuple[str, str],
    before: Sequence[ColourDistribution],
    after: Mapping[str, ColourDistribution],
    palette: Mapping[str, str],
    known: Mapping[str, ReferenceColour],
) -> Markup:
    x_axis, y_axis = plane

    def points(name: str, found: ColourDistribution, shade: str) -> Points:
        means = [tile.means for tile in found.tiles]
        return Points(name, [m[x_axis] for m in means], [m[y_axis] for m in means], shade)

    groups = [points("source", found, GREY) for found in before]
    for name, shade in palette.items():
        groups.append(points(f"result {name}", after[name], shade))
        mean = known[name].mean if name in known else None
        if mean is not None:
            place = [mean[x_axis]], [mean[y_axis]]
            groups.append(Points(f"reference {name}", *place, shade, is_cross=True))
    title = f"mean colours of tiles, {x_axis} and {y_axis}"
    return plot_points(
        groups, title=title, x_label=_AXIS_NAMES[x_axis], y_label=_AXIS_NAMES[y_axis]
    )
