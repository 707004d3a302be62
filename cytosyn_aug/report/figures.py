"""Sections of the report on a run that are plots, and plots of tissue colours.

Each function returns a section rendered by the template of its name in `templates/run/`, or nothing
where a run has nothing to show of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from cytosyn_aug.report.measures import ReferenceColour
from cytosyn_aug.report.rendering import render
from cytosyn_aug.report.run_data import RunData
from cytosyn_aug.report.svg import (
    COLOURS,
    GREY,
    Curve,
    Mark,
    Points,
    Range,
    plot_bars,
    plot_curves,
    plot_points,
)
from cytosyn_aug.report.tallies import Histogram
from cytosyn_aug.report.tissue_colours import (
    LAB,
    STAINS,
    ColourDistribution,
    pooled_histograms,
    rgb_of_lab,
)

_REJECTED = "#b91c1c"
_SHARES = (0.01, 0.05, 0.5, 0.95, 0.99)
_AXIS_NAMES = {
    "L*": "L*, lightness",
    "a*": "a*, green to red",
    "b*": "b*, blue to yellow",
    "H": "H, haematoxylin",
    "E": "E, eosin",
}
# Of all pixels, in a bin; where there are fewer a plot ends.
_LEAST_SHARE = 2e-4


def colour(run: RunData) -> Markup:
    """Return distributions of tissue colours, and how far results came towards references."""
    measures = run.measures
    names = [name for name in run.shown_references or [""] if name in measures.after]
    after = {name: measures.after[name] for name in names if measures.after[name].tiles}
    if not after:
        return Markup()
    return render(
        "run/colour.html.j2",
        num_read=measures.num_read,
        has_sources=bool(measures.before),
        plots=plot_colours(list(measures.before.values()), after, run.references),
        gaps=_gaps(run),
    )


def structure(run: RunData) -> Markup:
    """Return how well structure was kept."""
    has_claim, scores = run.keeps_structure, [x.structure for x in run.measures.scored]
    is_shown = bool(scores) if has_claim else run.pictures.has_sources
    if not is_shown or not run.pictures.has_results:
        return Markup()
    plot, quantiles = Markup(), []
    if has_claim:
        histogram = Histogram(-1.0, 1.0, 4000)
        histogram.add(np.array(scores))
        plot = plot_bars(
            [histogram.counts.tolist()],
            Range(-1.0, 1.0),
            title="histogram of structure scores",
            x_label="gradient correlation",
        )
        quantiles = [run.measures.structure_quantile(share) for share in (0.0, 0.05, 0.5)]
    return render(
        "run/structure.html.j2",
        is_scored=has_claim,
        num_scores=len(scores),
        plot=plot,
        row=["structure", *(_number(x, 3) for x in quantiles)],
    )


def similarity(run: RunData) -> Markup:
    """Return histograms of similarity, with the gate, and of colour distance."""
    tally = run.tally
    kept, rejected, distance = tally.similarity, tally.rejected_similarity, tally.distance
    low, high = run.gate
    marks = [Mark(low, f"min {low:g}")] if low is not None else []
    marks += [Mark(high, f"max {high:g}")] if high is not None else []
    plots, rows = [], []
    has_similarity = bool(kept.total + rejected.total)
    if has_similarity:
        plots.append(
            plot_bars(
                [kept.counts.tolist(), rejected.counts.tolist()],
                Range(kept.low, kept.high),
                title="histogram of similarities to the source",
                x_label="cosine similarity to the source",
                colours=(COLOURS[0], _REJECTED),
                marks=marks,
            )
        )
        rows.append(["similarity", *_quantiles(kept, 3)])
    if distance.total:
        plots.append(
            plot_bars(
                [distance.counts.tolist()],
                Range(distance.low, distance.high),
                title="histogram of colour distances to the source",
                x_label="colour distance to the source, Delta E",
            )
        )
        rows.append(["Delta E", *_quantiles(distance, 1)])
    if not plots:
        return Markup()
    return render(
        "run/similarity.html.j2",
        keeps_structure=run.keeps_structure,
        has_similarity=has_similarity,
        has_gate=bool(marks),
        num_rejected=rejected.total,
        plots=plots,
        shares=[f"{share:.0%}" for share in _SHARES],
        rows=rows,
    )


def throughput(run: RunData) -> Markup:
    """Return how fast the run was."""
    throughput = run.throughput
    if throughput is None:
        return Markup()
    unit, scale = ("hours", 3600.0) if throughput.active_s > 3 * 3600 else ("minutes", 60.0)
    counts = np.linspace(0, throughput.num_results, len(throughput.seconds) + 1).tolist()
    times = [0.0, *(seconds / scale for seconds in throughput.seconds)]
    plot = plot_curves(
        [Curve("results", times, counts, COLOURS[0], is_filled=True)],
        title="results over time",
        x_label=f"{unit} at work",
        y_label="results",
        y_ticks=True,
    )
    return render("run/throughput.html.j2", throughput=throughput, plot=plot)


def gap(run: RunData, name: str) -> tuple[float, float] | None:
    """Return the Lab distance of mean colour to a reference, before and after; None if unknown."""
    reference = run.reference(name)
    before, after = (
        colours[name].mean() if name in colours else None
        for colours in (run.measures.before, run.measures.after)
    )
    if reference is None or reference.mean is None or before is None or after is None:
        return None
    return _lab_distance(before, reference.mean), _lab_distance(after, reference.mean)


def _lab_distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return float(np.linalg.norm([one[axis] - other[axis] for axis in LAB]))


def _gaps(run: RunData) -> list[tuple[str, list[tuple[int, int, int] | None], str, str, str]]:
    """Return each reference's name, three mean colours, the two distances, and the gap closed."""
    rows = []
    for name in run.shown_references:
        distances, reference = gap(run, name), run.reference(name)
        if distances is None or reference is None:
            continue
        before, after = run.measures.before[name].mean(), run.measures.after[name].mean()
        colours = [None if x is None else rgb_of_lab(x) for x in (before, after, reference.mean)]
        closed = 1 - distances[1] / max(distances[0], 1e-9)
        rows.append((name, colours, f"{distances[0]:.1f}", f"{distances[1]:.1f}", f"{closed:.0%}"))
    return rows


def _quantiles(histogram: Histogram, digits: int) -> list[str | None]:
    return [_number(histogram.quantile(share), digits) for share in _SHARES]


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


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
    known = {reference.name: reference for reference in references if reference.name in palette}
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
        distribution = known[name].distribution if name in known else None
        if distribution is not None:
            curve = _curve(f"reference {name}", distribution.histograms[axis], shade)
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

    def points(name: str, colours: ColourDistribution, shade: str) -> Points:
        means = [tile.means for tile in colours.tiles]
        return Points(name, [m[x_axis] for m in means], [m[y_axis] for m in means], shade)

    groups = [points("source", colours, GREY) for colours in before]
    for name, shade in palette.items():
        groups.append(points(f"result {name}", after[name], shade))
        mean = known[name].mean if name in known else None
        if mean is not None:
            position = [mean[x_axis]], [mean[y_axis]]
            groups.append(Points(f"reference {name}", *position, shade, is_cross=True))
    title = f"mean colours of tiles, {x_axis} and {y_axis}"
    return plot_points(
        groups, title=title, x_label=_AXIS_NAMES[x_axis], y_label=_AXIS_NAMES[y_axis]
    )
