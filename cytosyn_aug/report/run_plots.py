"""The sections of a report on a run that are plots: colour, structure, similarity, throughput.

Each function returns a section rendered by the template of its name in `templates/run/`, or nothing
where a run has nothing to show of the kind.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from cytosyn_aug.report.colour_plots import plot_colours
from cytosyn_aug.report.rendering import render
from cytosyn_aug.report.run_data import Facts
from cytosyn_aug.report.svg import COLOURS, Curve, Mark, Range, plot_bars, plot_curves
from cytosyn_aug.report.tallies import Histogram
from cytosyn_aug.report.tissue_colours import LAB, rgb_of_lab

_REJECTED = "#b91c1c"
_SHARES = (0.01, 0.05, 0.5, 0.95, 0.99)


def colour(facts: Facts) -> Markup:
    """Return distributions of tissue colours, and how far results came towards references."""
    measures = facts.measures
    names = [name for name in facts.shown_references or [""] if name in measures.after]
    after = {name: measures.after[name] for name in names if measures.after[name].tiles}
    if not after:
        return Markup()
    return render(
        "run/colour.html.j2",
        num_read=measures.num_read,
        has_sources=bool(measures.before),
        plots=plot_colours(list(measures.before.values()), after, facts.references),
        gaps=_gaps(facts),
    )


def structure(facts: Facts) -> Markup:
    """Return how well structure was kept."""
    has_claim, scores = facts.keeps_structure, [x.structure for x in facts.measures.scored]
    is_shown = bool(scores) if has_claim else facts.pictures.has_sources
    if not is_shown or not facts.pictures.has_results:
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
        quantiles = [facts.measures.structure_quantile(share) for share in (0.0, 0.05, 0.5)]
    return render(
        "run/structure.html.j2",
        is_scored=has_claim,
        num_scores=len(scores),
        plot=plot,
        row=["structure", *(_number(x, 3) for x in quantiles)],
    )


def similarity(facts: Facts) -> Markup:
    """Return histograms of similarity, with the gate, and of colour distance."""
    tally = facts.tally
    kept, rejected, distance = tally.similarity, tally.rejected_similarity, tally.distance
    low, high = facts.gate
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
        keeps_structure=facts.keeps_structure,
        has_similarity=has_similarity,
        has_gate=bool(marks),
        num_rejected=rejected.total,
        plots=plots,
        shares=[f"{share:.0%}" for share in _SHARES],
        rows=rows,
    )


def throughput(facts: Facts) -> Markup:
    """Return how fast the run was."""
    pace = facts.pace
    if pace is None:
        return Markup()
    unit, scale = ("hours", 3600.0) if pace.active_s > 3 * 3600 else ("minutes", 60.0)
    counts = np.linspace(0, pace.num_results, len(pace.seconds) + 1).tolist()
    times = [0.0, *(seconds / scale for seconds in pace.seconds)]
    plot = plot_curves(
        [Curve("results", times, counts, COLOURS[0], is_filled=True)],
        title="results over time",
        x_label=f"{unit} at work",
        y_label="results",
        y_ticks=True,
    )
    return render("run/throughput.html.j2", pace=pace, plot=plot)


def gap(facts: Facts, name: str) -> tuple[float, float] | None:
    """Return the Lab distance of mean colour to a reference, before and after; None if unknown."""
    reference = facts.reference(name)
    before, after = (
        found[name].mean() if name in found else None
        for found in (facts.measures.before, facts.measures.after)
    )
    if reference is None or reference.mean is None or before is None or after is None:
        return None
    return _lab_distance(before, reference.mean), _lab_distance(after, reference.mean)


def _lab_distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return float(np.linalg.norm([one[axis] - other[axis] for axis in LAB]))


def _gaps(facts: Facts) -> list[tuple[str, list[tuple[int, int, int] | None], str, str, str]]:
    """Return each reference's name, three mean colours, the two distances, and the gap closed."""
    rows = []
    for name in facts.shown_references:
        distances, reference = gap(facts, name), facts.reference(name)
        if distances is None or reference is None:
            continue
        before, after = facts.measures.before[name].mean(), facts.measures.after[name].mean()
        colours = [None if x is None else rgb_of_lab(x) for x in (before, after, reference.mean)]
        closed = 1 - distances[1] / max(distances[0], 1e-9)
        rows.append((name, colours, f"{distances[0]:.1f}", f"{distances[1]:.1f}", f"{closed:.0%}"))
    return rows


def _quantiles(histogram: Histogram, digits: int) -> list[str | None]:
    return [_number(histogram.quantile(share), digits) for share in _SHARES]


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
