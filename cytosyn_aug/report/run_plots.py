"""The sections of a report on a run that are plots: colour, structure, similarity, throughput."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cytosyn_aug.report.colour_plots import READING, plot_colours, swatch
from cytosyn_aug.report.html import Html, group, heading, joined, paragraph, shortened, table
from cytosyn_aug.report.run_data import Facts
from cytosyn_aug.report.svg import COLOURS, Curve, Mark, Range, plot_bars, plot_curves
from cytosyn_aug.report.tallies import Histogram
from cytosyn_aug.report.tissue_colours import LAB

_REJECTED = "#b91c1c"
_SHARES = (0.01, 0.05, 0.5, 0.95, 0.99)


def colour(facts: Facts) -> Html:
    """Return distributions of tissue colours, and how far results came towards references."""
    measures = facts.measures
    names = [name for name in facts.shown_references or [""] if name in measures.after]
    after = {name: measures.after[name] for name in names if measures.after[name].tiles}
    if not after:
        return Html()
    sources = ", and of their sources" if measures.before else ""
    lead = f"Of {measures.num_read} results drawn evenly from all{sources}. {READING}"
    plots = plot_colours(list(measures.before.values()), after, facts.references)
    return joined([paragraph(lead, "lead"), plots, _gap_table(facts)])


def structure(facts: Facts) -> Html:
    """Return how well structure was kept."""
    if not facts.pictures.has_results:
        return Html()
    if not facts.keeps_structure:
        text = "Results are drawn anew: their structure is not that of their sources. Not scored."
        return paragraph(text, "lead") if facts.pictures.has_sources else Html()
    scores = [x.structure for x in facts.measures.scored]
    if not scores:
        return Html()
    histogram = Histogram(-1.0, 1.0, 4000)
    histogram.add(np.array(scores))
    quantiles = [facts.measures.structure_quantile(share) for share in (0.0, 0.05, 0.5)]
    lead = (
        "Correlation of the gradients of optical density of source and result, of "
        f"{len(scores)} results: 1 where every edge stayed where it was, whatever the stain; "
        "about 0 for other tissue."
    )
    plot = plot_bars(
        [histogram.counts.tolist()],
        Range(-1.0, 1.0),
        title="histogram of structure scores",
        x_label="gradient correlation",
    )
    header = ["", "least", "5 % lie below", "median"]
    numbers = table(header, [["structure", *(_number(x, 3) for x in quantiles)]])
    return joined([paragraph(lead, "lead"), group([plot], "plots"), numbers])


def similarity(facts: Facts) -> Html:
    """Return histograms of similarity, with the gate, and of colour distance."""
    tally = facts.tally
    kept, rejected, distance = tally.similarity, tally.rejected_similarity, tally.distance
    low, high = facts.gate
    marks = [Mark(low, f"min {low:g}")] if low is not None else []
    marks += [Mark(high, f"max {high:g}")] if high is not None else []
    plots, numbers = [], []
    lead = "Of all results. Delta E is the mean distance in CIE Lab over tissue, pixel by pixel"
    lead += ". " if facts.keeps_structure else ": most of it is structure that was drawn anew. "
    if kept.total + rejected.total:
        lead += "Similarity is the cosine of the encoder's features of source and result. "
        lead += "No gate was set." if not marks else "Dashed: the gate"
        if marks:
            lead += f"; red: the {rejected.total:,.0f} results that it rejected."
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
        numbers.append(["similarity", *_quantiles(kept, 3)])
    if distance.total:
        plots.append(
            plot_bars(
                [distance.counts.tolist()],
                Range(distance.low, distance.high),
                title="histogram of colour distances to the source",
                x_label="colour distance to the source, Delta E",
            )
        )
        numbers.append(["Delta E", *_quantiles(distance, 1)])
    if not plots:
        return Html()
    header = ["share of results below", *(f"{share:.0%}" for share in _SHARES)]
    return joined([paragraph(lead, "lead"), group(plots, "plots"), table(header, numbers)])


def throughput(facts: Facts) -> Html:
    """Return how fast the run was."""
    pace = facts.pace
    if pace is None:
        return Html()
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
    pauses = ""
    if pace.num_pauses:
        minutes = pace.paused_s / 60
        pauses = f"Pauses are left out: {pace.num_pauses}, of {minutes:,.1f} minutes in all. "
    lead = (
        f"{pace.results_per_s:,.2f} results a second, of all processes together, over "
        f"{pace.active_s / 60:,.1f} minutes at work. {pauses}From the times of the written files: "
        "a copy made without their times tells the speed of copying."
    )
    return joined([paragraph(lead, "lead"), group([plot], "plots")])


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


def _gap_table(facts: Facts) -> Html:
    rows = []
    for name in facts.shown_references:
        found, reference = gap(facts, name), facts.reference(name)
        if found is None or reference is None:
            continue
        measured = facts.measures.before[name].mean(), facts.measures.after[name].mean()
        swatches = (swatch(mean) for mean in (*measured, reference.mean))
        closed = f"{1 - found[1] / max(found[0], 1e-9):.0%}"
        numbers = f"{found[0]:.1f}", f"{found[1]:.1f}", closed
        rows.append((shortened(name), *swatches, *numbers))
    if not rows:
        return Html()
    header = [
        "reference",
        "sources",
        "results",
        "its own",
        "distance before",
        "after",
        "gap closed",
    ]
    lead = "Mean tissue colours, and their distance in CIE Lab to the reference's."
    return joined([heading("Towards the reference"), paragraph(lead, "lead"), table(header, rows)])


def _quantiles(histogram: Histogram, digits: int) -> list[str | None]:
    return [_number(histogram.quantile(share), digits) for share in _SHARES]


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
