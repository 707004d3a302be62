"""The page of slides that `normalize-slide` wrote, one after the other."""

from __future__ import annotations

import numpy as np

from cytosyn_aug.io.slide import SlideError
from cytosyn_aug.report.colour_plots import READING, plot_colours, swatch
from cytosyn_aug.report.html import (
    Html,
    code,
    escaped,
    figure,
    flattened,
    group,
    heading,
    joined,
    missing,
    paragraph,
    picture,
    table,
    whole_page,
)
from cytosyn_aug.report.run_page import is_moved, own_version
from cytosyn_aug.report.slide_data import (
    FoundSlides,
    SlideFacts,
    SlideTile,
    describe_slide,
    gather_slide,
)

_OVERVIEW_PX = 560
_LEAST_TILES = 8
_MAX_SHOWN = 24  # slides; a page of more is too large to open
# Raw tissue is at 1 to 1.1 and at most 1.5; see cytosyn_aug.slides.seams.
_LARGE_SEAM = 1.6


def slides_page(found: FoundSlides, *, title: str, num_tiles: int) -> str:
    """Return the page of slides.

    Args:
        found: What `normalize-slide` wrote.
        title: Of the page.
        num_tiles: Tiles that are measured, in all slides together, and at least 8 of each that is
            shown; of many slides some are, evenly spaced.
    """
    num_shown = min(_MAX_SHOWN, len(found.slides))
    shown = {k * len(found.slides) // num_shown for k in range(num_shown)}
    share = max(_LEAST_TILES, num_tiles // max(1, num_shown))
    rows, sections, findings = [], [], _findings(found, num_shown)
    for number, (file, source) in enumerate(found.slides):
        is_shown = number in shown
        try:
            facts = gather_slide(file, source, share) if is_shown else describe_slide(file)
        except SlideError as error:
            findings.append(paragraph(str(error), "note bad"))
            continue
        rows.append(_row(facts))
        findings += [paragraph(f"{file.name}: {text}", "note") for text in slide_findings(facts)]
        if is_shown:
            sections.append((file.name, _section(facts)))
    header = ["slide", "status", "pixels", "microns/pixel", "tissue", "seams before", "after"]
    header += ["structure, median"]
    lead = (
        "Seams: the mean step of tissue colour across the borders of tiles over that inside of "
        "them, of the whole slide. Tissue that was never cut has about 1, some slides up to 1.5: "
        "compare after with before."
    )
    overview = joined([paragraph(lead, "lead"), table(header, rows)])
    by = f"Written by cytosyn_aug {own_version()}. Not a medical device."
    opening = [
        paragraph(by, "lead"),
        *(findings or [paragraph("Nothing stands out.", "note good")]),
    ]
    return whole_page(title, opening, [("Slides", overview), *sections])


def _findings(found: FoundSlides, num_shown: int) -> list[Html]:
    """Return what a reader should know first of all slides together."""
    notes = [paragraph(f"{name} failed: {reason}", "note bad") for name, reason in found.failed]
    if not found.is_finished:
        text = f"Not finished: {len(found.slides)} of {found.num_slides} slides are written so far."
        notes.append(paragraph(f"{text} The same command goes on with the rest.", "note"))
    if num_shown < len(found.slides):
        text = (
            f"{num_shown} of {len(found.slides)} slides are shown, evenly spaced; all are listed."
        )
        notes.append(paragraph(text, "lead"))
    return notes


def slide_findings(facts: SlideFacts) -> list[str]:
    """Return what a reader should know first of a slide."""
    said, found = facts.said, []
    if said.get("status") == "no_tissue":
        found.append("no tissue was found; its colours are the slide's own.")
    if said.get("num_damaged"):
        found.append(f"{said['num_damaged']} blocks could not be decoded and are black.")
    if (said.get("seam_ratio") or 0.0) > _LARGE_SEAM:
        found.append(f"colour steps at the borders of tiles: {said['seam_ratio']:.2f}.")
    if facts.structures:
        least, usual = (float(np.quantile(facts.structures, share)) for share in (0.0, 0.05))
        if is_moved(least, usual):
            found.append(
                f"contrast inside of tiles changed more than usual: the least score of structure "
                f"is {least:.2f}. One change of colour moves no pixel, but may flatten differences."
            )
    if facts.problem:
        found.append(f"not compared: {facts.problem}.")
    return found


def _row(facts: SlideFacts) -> list[object]:
    said, seams = facts.said, []
    for name in ("seam_ratio_before", "seam_ratio"):
        value = said.get(name)
        unknown = "too little tissue" if name in said else "not recorded"
        seams.append(unknown if value is None else f"{value:.2f}")
    median = float(np.median(facts.structures)) if facts.structures else None
    return [
        facts.file.name,
        said.get("status"),
        f"{facts.size[0]:,} x {facts.size[1]:,}",
        f"{facts.mpp:.4g}",
        f"{said['tissue']:.0%}" if "tissue" in said else None,
        *seams,
        None if median is None else f"{median:.3f}",
    ]


def _section(facts: SlideFacts) -> Html:
    assert facts.overviews is not None
    before, after = (
        missing("not at hand") if image is None else picture(image, which, _OVERVIEW_PX)
        for image, which in zip(facts.overviews, ("before", "after"), strict=True)
    )
    parts = [figure(group([before, after], "pair"), "The whole of it, before and after.")]
    if facts.tiles:
        shown = group([_pair(tile) for tile in facts.tiles], "grid")
        parts += [heading("Tiles, evenly spaced over the tissue"), shown]
    if facts.worst:
        shown = group([_pair(tile) for tile in facts.worst], "grid")
        title = f"Structure: the least kept, of {len(facts.structures)} measured"
        parts += [heading(title), shown]
    if facts.after.tiles:
        sources = [facts.before] if facts.before.tiles else []
        parts += [
            heading("Colour"),
            paragraph(f"Of {len(facts.after.tiles)} tiles. {READING}", "lead"),
            plot_colours(sources, {"": facts.after}),
            _means(facts),
        ]
    settings = [(name, code(value)) for name, value in flattened(facts.said)]
    parts += [heading("What the file says of itself"), table(["setting", "value"], settings)]
    return joined(parts)


def _pair(tile: SlideTile) -> Html:
    before = missing("not at hand") if tile.before is None else picture(tile.before, "before")
    told = []
    if tile.distance is not None:
        told.append(f"Delta E {tile.distance:.1f}")
    if tile.structure is not None:
        told.append(f"structure {tile.structure:.3f}")
    place = Html(f"<b>x {tile.x:,}, y {tile.y:,}</b> ")
    pair = group([before, picture(tile.after, "after")], "pair")
    return figure(pair, joined([place, escaped(", ".join(told))]))


def _means(facts: SlideFacts) -> Html:
    rows = []
    for name, found in (("slide", facts.before), ("result", facts.after)):
        mean = found.mean()
        if mean is not None:
            rows.append([name, swatch(mean), *(f"{value:.2f}" for value in mean.values())])
    return table(["", "mean colour", *(facts.after.mean() or {})], rows)
