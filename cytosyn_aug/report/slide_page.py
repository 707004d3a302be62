"""The page of slides that `normalize-slide` wrote, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from cytosyn_aug.io.slide import SlideError
from cytosyn_aug.report.colour_plots import plot_colours
from cytosyn_aug.report.rendering import (
    EmbeddedImage,
    embed,
    flattened,
    own_version,
    render,
    render_page,
)
from cytosyn_aug.report.run_page import Finding, is_moved
from cytosyn_aug.report.slide_data import (
    FoundSlides,
    SlideFacts,
    SlideTile,
    describe_slide,
    gather_slide,
)
from cytosyn_aug.report.tissue_colours import rgb_of_lab

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
    rows, sections, findings = [], [], _findings(found)
    for number, (file, source) in enumerate(found.slides):
        is_shown = number in shown
        try:
            facts = gather_slide(file, source, share) if is_shown else describe_slide(file)
        except SlideError as error:
            findings.append(Finding(str(error), "bad"))
            continue
        rows.append(_row(facts))
        findings += [Finding(f"{file.name}: {text}") for text in slide_findings(facts)]
        if is_shown:
            sections.append((file.name, _section(facts)))
    overview = render("slides/overview.html.j2", rows=rows)
    return render_page(
        title,
        [("Slides", overview), *sections],
        "slides/page.html.j2",
        version=own_version(),
        findings=findings or [Finding("Nothing stands out.", "good")],
        num_shown=num_shown,
        num_slides=len(found.slides),
    )


def _findings(found: FoundSlides) -> list[Finding]:
    """Return what a reader should know first of all slides together."""
    findings = [Finding(f"{name} failed: {reason}", "bad") for name, reason in found.failed]
    if not found.is_finished:
        findings.append(
            Finding(
                f"Not finished: {len(found.slides)} of {found.num_slides} slides are written so "
                "far. The same command goes on with the rest."
            )
        )
    return findings


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


class ShownTile(NamedTuple):
    """A tile before and after, as a page shows it; its corner is of the result's finest level."""

    x: int
    y: int
    before: EmbeddedImage
    after: EmbeddedImage
    caption: str


def _section(facts: SlideFacts) -> Markup:
    assert facts.overviews is not None
    before, after = facts.overviews
    plots = Markup()
    if facts.after.tiles:
        plots = plot_colours([facts.before] if facts.before.tiles else [], {"": facts.after})
    return render(
        "slides/slide.html.j2",
        before=embed(before, side_px=_OVERVIEW_PX),
        after=embed(after, side_px=_OVERVIEW_PX),
        tiles=[_shown(tile) for tile in facts.tiles],
        worst=[_shown(tile) for tile in facts.worst],
        num_scores=len(facts.structures),
        num_tiles=len(facts.after.tiles),
        plots=plots,
        axes=list(facts.after.mean() or {}),
        means=_means(facts),
        settings=list(flattened(facts.said)),
    )


def _shown(tile: SlideTile) -> ShownTile:
    caption = []
    if tile.distance is not None:
        caption.append(f"Delta E {tile.distance:.1f}")
    if tile.structure is not None:
        caption.append(f"structure {tile.structure:.3f}")
    return ShownTile(tile.x, tile.y, embed(tile.before), embed(tile.after), ", ".join(caption))


def _means(facts: SlideFacts) -> list[tuple[str, tuple[int, int, int], list[str]]]:
    """Return whose it is, mean colour in grey levels, and mean colour along each axis."""
    means = {"slide": facts.before.mean(), "result": facts.after.mean()}
    return [
        (name, rgb_of_lab(mean), [f"{value:.2f}" for value in mean.values()])
        for name, mean in means.items()
        if mean is not None
    ]
