"""Page of the report on normalised slides, one section per slide."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from cytosyn_aug.io.slide import SlideError
from cytosyn_aug.report.figures import plot_colours
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
    SlideData,
    SlideTile,
    WrittenSlides,
    describe_slide,
    gather_slide,
)
from cytosyn_aug.report.tissue_colours import rgb_of_lab

_OVERVIEW_PX = 560
_LEAST_TILES = 8
_MAX_SHOWN = 24  # slides; a page of more is too large to open
# Seam ratios of raw tissue are 1 to 1.1, and at most 1.5.
_LARGE_SEAM = 1.6


def slides_page(written: WrittenSlides, *, title: str, num_tiles: int) -> str:
    """Return the page of slides.

    Args:
        written: What `normalize-slide` wrote.
        title: Of the page.
        num_tiles: Tiles that are measured, in all slides together, and at least 8 of each that is
            shown; of many slides some are, evenly spaced.
    """
    num_shown = min(_MAX_SHOWN, len(written.slides))
    shown = {k * len(written.slides) // num_shown for k in range(num_shown)}
    share = max(_LEAST_TILES, num_tiles // max(1, num_shown))
    rows, sections, findings = [], [], _findings(written)
    for number, (file, source) in enumerate(written.slides):
        is_shown = number in shown
        try:
            slide = gather_slide(file, source, share) if is_shown else describe_slide(file)
        except SlideError as error:
            findings.append(Finding(str(error), "bad"))
            continue
        rows.append(_row(slide))
        findings += [Finding(f"{file.name}: {text}") for text in slide_findings(slide)]
        if is_shown:
            sections.append((file.name, _section(slide)))
    overview = render("slides/overview.html.j2", rows=rows)
    return render_page(
        title,
        [("Slides", overview), *sections],
        "slides/page.html.j2",
        version=own_version(),
        findings=findings or [Finding("Nothing stands out.", "good")],
        num_shown=num_shown,
        num_slides=len(written.slides),
    )


def _findings(written: WrittenSlides) -> list[Finding]:
    """Return what a reader should know first of all slides together."""
    findings = [Finding(f"{name} failed: {reason}", "bad") for name, reason in written.failed]
    if not written.is_finished:
        findings.append(
            Finding(
                f"Not finished: {len(written.slides)} of {written.num_slides} slides are written "
                "so far. The same command goes on with the rest."
            )
        )
    return findings


def slide_findings(slide: SlideData) -> list[str]:
    """Return what a reader should know first of a slide."""
    provenance, findings = slide.provenance, []
    if provenance.get("status") == "no_tissue":
        findings.append("no tissue was found; its colours are the slide's own.")
    if provenance.get("num_damaged"):
        findings.append(f"{provenance['num_damaged']} blocks could not be decoded and are black.")
    if (provenance.get("seam_ratio") or 0.0) > _LARGE_SEAM:
        findings.append(f"colour steps at the borders of tiles: {provenance['seam_ratio']:.2f}.")
    if slide.structures:
        least, usual = (float(np.quantile(slide.structures, share)) for share in (0.0, 0.05))
        if is_moved(least, usual):
            findings.append(
                f"contrast inside of tiles changed more than usual: the least score of structure "
                f"is {least:.2f}. One change of colour moves no pixel, but may flatten differences."
            )
    if slide.problem:
        findings.append(f"not compared: {slide.problem}.")
    return findings


def _row(slide: SlideData) -> list[object]:
    provenance, seams = slide.provenance, []
    for name in ("seam_ratio_before", "seam_ratio"):
        value = provenance.get(name)
        unknown = "too little tissue" if name in provenance else "not recorded"
        seams.append(unknown if value is None else f"{value:.2f}")
    median = float(np.median(slide.structures)) if slide.structures else None
    return [
        slide.file.name,
        provenance.get("status"),
        f"{slide.size[0]:,} x {slide.size[1]:,}",
        f"{slide.mpp:.4g}",
        f"{provenance['tissue']:.0%}" if "tissue" in provenance else None,
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


def _section(slide: SlideData) -> Markup:
    assert slide.overviews is not None
    before, after = slide.overviews
    plots = Markup()
    if slide.after.tiles:
        plots = plot_colours([slide.before] if slide.before.tiles else [], {"": slide.after})
    return render(
        "slides/slide.html.j2",
        before=embed(before, side_px=_OVERVIEW_PX),
        after=embed(after, side_px=_OVERVIEW_PX),
        tiles=[_shown(tile) for tile in slide.tiles],
        worst=[_shown(tile) for tile in slide.worst],
        num_scores=len(slide.structures),
        num_tiles=len(slide.after.tiles),
        plots=plots,
        axes=list(slide.after.mean() or {}),
        means=_means(slide),
        settings=list(flattened(slide.provenance)),
    )


def _shown(tile: SlideTile) -> ShownTile:
    caption = []
    if tile.distance is not None:
        caption.append(f"Delta E {tile.distance:.1f}")
    if tile.structure is not None:
        caption.append(f"structure {tile.structure:.3f}")
    return ShownTile(tile.x, tile.y, embed(tile.before), embed(tile.after), ", ".join(caption))


def _means(slide: SlideData) -> list[tuple[str, tuple[int, int, int], list[str]]]:
    """Return whose it is, mean colour in grey levels, and mean colour along each axis."""
    means = {"slide": slide.before.mean(), "result": slide.after.mean()}
    return [
        (name, rgb_of_lab(mean), [f"{value:.2f}" for value in mean.values()])
        for name, mean in means.items()
        if mean is not None
    ]
