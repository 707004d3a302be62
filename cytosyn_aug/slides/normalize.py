"""Normalisation of whole slides: a slide in, a pyramid with the stain of a reference out.

The slide's stain is measured once, on tiles spread over its tissue, and gives one change of colour
for all its pixels. Neighbouring tiles cannot differ then: there is no field of changes to blend,
and no noise, because changes of colour do not run the diffusion model. Glass keeps its bits, up to
the compression that is chosen.

Kept of the slide are pixels and scale. Dropped are label, macro image, file name, barcodes, all
that its scanner wrote, and its colour profile: what is written has the reference's colours,
which the profile does not describe. OpenSlide's hash of its pixels names the source to those who
have it.
"""

from __future__ import annotations

import errno
import glob
import json
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.files import atomic_file, remove_leftovers
from cytosyn_aug.io.slide import Slide, SlideError
from cytosyn_aug.io.tile_source import read_slide_tiles
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.slides.blocks import PYRAMID, BlockMaker, BlockTotals
from cytosyn_aug.slides.pyramid import (
    OME_NAMESPACE,
    SOFTWARE,
    TILE_PX,
    Codec,
    PyramidWriter,
    level_sizes,
)
from cytosyn_aug.slides.recipe import SlideRecipe, SlideReport, Status, recipe_as_json
from cytosyn_aug.slides.threads import in_order
from cytosyn_aug.slides.view import SlideView
from cytosyn_aug.stain.colour_table import ColourTable, Recolour
from cytosyn_aug.stain.methods import (
    AnyReference,
    fit_reference,
    method_of,
    recolour_to,
    reference_digest,
)

SUFFIXES = (".tif", ".tiff")
_TRIAL_BLOCKS = 48
_OME = {"ome": OME_NAMESPACE}


def normalize_slide(
    slide: Path | str,
    out: Path | str,
    reference: AnyReference,
    *,
    generator: TileGenerator | None = None,
    source: AnyReference | None = None,
    recipe: SlideRecipe | None = None,
    overwrite: bool = False,
    num_threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> SlideReport:
    """Write a slide with the stain of a reference.

    Args:
        slide: Any slide that OpenSlide reads.
        out: .tif or .tiff, by custom .ome.tif. It is complete or absent; one process at a time.
        reference: Stain of the result; its type selects the method.
        generator: The model, for a `StainReference`.
        source: The slide's own stain, if known; of the type of `reference`.
        recipe: How the slide is normalised and written; None for the defaults.
        overwrite: Replace `out`.
        num_threads: Threads that read, recolour and compress; the result does not depend on it.
        progress: Called with the number of blocks done and of all blocks.

    Raises:
        SlideError: The slide or a block of it cannot be read, states no scale, is too coarse,
            does not tell its stain, or the region is outside.
        FileExistsError: `out` exists.
        ValueError: `out` is the slide, or the arguments do not fit each other.
        OSError: The disk is full, or will be.
    """
    normalization = SlideNormalization(
        slide,
        out,
        reference,
        generator=generator,
        source=source,
        recipe=recipe if recipe is not None else SlideRecipe(),
        overwrite=overwrite,
    )
    with closing(normalization.write(num_threads)) as steps:
        for num_done, num_blocks in steps:
            if progress is not None:
                progress(num_done, num_blocks)
    return normalization.report()


class SlideNormalization:
    """Normalisation of one slide: made, it has measured the stain; then `write`, then `report`.

    Args:
        slide: Any slide that OpenSlide reads.
        out: .tif or .tiff, by custom .ome.tif.
        reference: Stain of the result; its type selects the method.
        generator: The model, for a `StainReference`.
        recipe: How the slide is normalised and written.
        source: The slide's own stain, if known; of the type of `reference`.
        overwrite: Replace `out`.

    Raises:
        SlideError: The slide cannot be opened, states no scale, is too coarse, does not tell its
            stain, or the region is outside.
        FileExistsError: `out` exists.
        ValueError: `out` is the slide, or the arguments do not fit each other.
    """

    def __init__(
        self,
        slide: Path | str,
        out: Path | str,
        reference: AnyReference,
        *,
        generator: TileGenerator | None,
        recipe: SlideRecipe,
        source: AnyReference | None = None,
        overwrite: bool = False,
    ) -> None:
        self._began = time.perf_counter()
        self._out, self._method = Path(out), method_of(reference)
        file = Path(slide)
        _check_out(file, self._out, overwrite)
        with Slide(file, recipe.slide_mpp) as opened:
            self._view = SlideView.of(opened, recipe.region, recipe.mpp)
            recolour = _recolour(opened, reference, generator, source, recipe)
            self._thumbnail = opened.scanner_thumbnail() if recipe.keeps_thumbnail else None
            self._notes = _notes(opened, recipe, recolour is None, self._thumbnail is None)
        self._status: Status = "no_tissue" if recolour is None else "normalized"
        self._blocks = _block_maker(file, self._view, ColourTable(recolour), recipe)
        self._provenance = _request(opened, reference, recipe) | {
            "software": _software(),
            "status": self._status,
            "change_digest": self._blocks.table.digest,
        }
        self._totals, self._num_bytes = BlockTotals(), 0

    def write(self, num_threads: int) -> Generator[tuple[int, int], None, None]:
        """Write the file; it is there when this has ended. Close it to stop and leave nothing.

        Args:
            num_threads: Threads that read, recolour and compress.

        Yields:
            After each block, the number of blocks done and of all blocks.

        Raises:
            SlideError: A block cannot be decoded.
            OSError: The disk is full, or will be.
        """
        blocks, view, totals = self._blocks, self._view, self._totals
        thumbnail = None
        if self._thumbnail is not None:
            thumbnail = blocks.table.look_up(np.asarray(self._thumbnail))[0]
        with blocks, closing(in_order(blocks.make, blocks.positions, num_threads)) as ready:
            _check_disk(self._out, blocks.estimate_bytes())
            with atomic_file(self._out) as stream:
                writer = PyramidWriter(
                    stream, view.width, view.height, mpp=view.mpp, codec=blocks.codec
                )
                for block in ready:
                    writer.add(block.encoded, block.half)
                    totals.add(block)
                    yield totals.num_blocks, len(blocks.positions)
                provenance = self._provenance | {
                    "pixels_digest": totals.digest,
                    "tissue": totals.tissue / (view.width * view.height),
                    "seam_ratio": totals.after.ratio,
                    "seam_ratio_before": totals.before.ratio,
                    "num_damaged": len(totals.damaged),
                }
                self._num_bytes = writer.finish(json.dumps(provenance), thumbnail)

    def report(self) -> SlideReport:
        """Return what became of the slide, once it is written."""
        view, totals = self._view, self._totals
        return SlideReport(
            out=self._out,
            status=self._status,
            method=self._method,
            width_px=view.width,
            height_px=view.height,
            mpp=view.mpp,
            num_levels=len(level_sizes(view.width, view.height)),
            num_tiles=totals.num_blocks,
            num_bytes=self._num_bytes,
            tissue=totals.tissue / (view.width * view.height),
            seam_ratio=totals.after.ratio,
            seam_ratio_before=totals.before.ratio,
            damaged=tuple(view.corner(c * TILE_PX, r * TILE_PX) for r, c in totals.damaged),
            notes=self._notes,
            source_digest=self._provenance["source_digest"],
            change_digest=self._blocks.table.digest,
            pixels_digest=totals.digest,
            seconds=time.perf_counter() - self._began,
        )


def try_slide(
    slide: Path | str,
    reference: AnyReference,
    *,
    generator: TileGenerator | None,
    recipe: SlideRecipe,
    num_threads: int = 4,
) -> tuple[int, float]:
    """Return about how many bytes and seconds a slide takes, from its stain and some blocks.

    Raises:
        SlideError: The slide or a tried block cannot be read, states no scale, is too coarse, does
            not tell its stain, or the region is outside.
    """
    began = time.perf_counter()
    file = Path(slide)
    with Slide(file, recipe.slide_mpp) as opened:
        view = SlideView.of(opened, recipe.region, recipe.mpp)
        recolour = _recolour(opened, reference, generator, None, recipe)
    maker = _block_maker(file, view, ColourTable(recolour), recipe)
    positions = maker.positions[:: max(1, len(maker.positions) // _TRIAL_BLOCKS)]
    with maker, closing(in_order(maker.make, positions, num_threads)) as blocks:
        fitted = time.perf_counter()
        num_bytes = sum(len(block.encoded) for block in blocks)
        seconds = time.perf_counter() - fitted
    share = len(maker.positions) / len(positions)
    return round(num_bytes * share * PYRAMID), fitted - began + seconds * share


def is_made(
    out: Path | str, slide: Path | str, reference: AnyReference, recipe: SlideRecipe
) -> bool:
    """Return whether a file is what `normalize_slide` makes of these, by what the file states.

    Raises:
        SlideError: The slide cannot be opened, or the file is no slide.
    """
    with Slide(out, mpp=1.0) as written, Slide(slide, recipe.slide_mpp) as opened:
        provenance = provenance_of(written)
        wanted = json.loads(json.dumps(_request(opened, reference, recipe)))
    return {k: provenance.get(k) for k in wanted} == wanted


def provenance_of(slide: Slide) -> dict[str, Any]:  # Any: JSON
    """Return what a file of `normalize_slide` states of how it was made; {} of any other file."""
    image = _ome_image(slide)
    text = "" if image is None else image.findtext("ome:Description", "", _OME)
    return dict(json.loads(text)) if text.startswith("{") else {}


def open_written(file: Path) -> Slide:
    """Open a file of `normalize_slide` at the scale it states in OME-XML.

    Of a TIFF's resolution a slide believes less, because other software writes nonsense there, and
    would not know a result that is coarser than 2 microns/pixel.

    Raises:
        SlideError: It cannot be read.
    """
    with Slide(file, mpp=1.0) as written:
        image = _ome_image(written)
    pixels = None if image is None else image.find("ome:Pixels", _OME)
    mpp = None if pixels is None else pixels.get("PhysicalSizeX")
    return Slide(file, None if mpp is None else float(mpp))


def _ome_image(slide: Slide) -> ElementTree.Element | None:
    """Return the first image of a slide's OME-XML; None if its comment is no OME-XML."""
    try:
        return ElementTree.fromstring(slide.comment).find("ome:Image", _OME)
    except ElementTree.ParseError:
        return None


def _software() -> str:
    try:
        return f"{SOFTWARE} {version('cytosyn-aug')}"
    except PackageNotFoundError:  # run from a checkout
        return SOFTWARE


def _request(slide: Slide, reference: AnyReference, recipe: SlideRecipe) -> dict[str, Any]:
    """Return what a result is a function of."""
    return {
        "source_digest": slide.identity,
        "method": method_of(reference),
        "reference_digest": reference_digest(reference),
        "recipe": recipe_as_json(recipe),
    }


def _check_disk(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        reason = f"about {needed:,} bytes are needed and {free:,} are free"
        raise OSError(errno.ENOSPC, reason, str(out))


def _recolour(
    slide: Slide,
    reference: AnyReference,
    generator: TileGenerator | None,
    source: AnyReference | None,
    recipe: SlideRecipe,
) -> Recolour | None:
    """Return the change of a slide; None if it shows no tissue to measure."""
    method = method_of(reference)
    if source is None:
        tile = generator.tile if method == "cytosyn" and generator is not None else TileSpec()
        tiles = read_slide_tiles(slide, tile, recipe.max_tiles, skips_damaged=recipe.allows_damage)
        if not len(tiles):
            return None
        # The same bits in a run, which pads.
        padded = nullcontext() if generator is None else generator.batches.fixed()
        try:
            with padded:
                source = fit_reference(method, tiles, generator)
        except ValueError as error:
            raise SlideError(f"{slide.file.name}: {error}") from error
    return recolour_to(
        reference, source, generator=generator, edit=recipe.edit, strength=recipe.strength
    )


def _check_out(slide: Path, out: Path, overwrite: bool) -> None:
    """Refuse what must not be written, and remove what a killed run left of it.

    Raises:
        ValueError: No name of a TIFF, or the slide itself.
        FileExistsError: It is there already, or another process is writing it.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{out.name} ends in {out.suffix!r}, expected .tif or .tiff")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():
        if slide.exists() and out.samefile(slide):
            raise ValueError(f"{out} is the slide itself; give another name")
        if not overwrite:
            raise FileExistsError(
                errno.EEXIST,
                "exists; give another name, or allow overwriting it (--overwrite)",
                str(out),
            )
    if remove_leftovers(out.parent, f".{glob.escape(out.name)}.*.tmp"):
        reason = "is being written by another process; let it end, and start again"
        raise FileExistsError(errno.EEXIST, reason, str(out))


def _block_maker(
    file: Path, view: SlideView, table: ColourTable, recipe: SlideRecipe
) -> BlockMaker:
    return BlockMaker(
        file,
        view,
        table,
        Codec(compression=recipe.compression, quality=recipe.quality),
        slide_mpp=recipe.slide_mpp,
        allows_damage=recipe.allows_damage,
    )


def _notes(
    slide: Slide, recipe: SlideRecipe, has_no_tissue: bool, has_no_thumbnail: bool
) -> tuple[str, ...]:
    notes = list(slide.scale.notes)
    if has_no_tissue:
        notes.append("no tissue was found, and the colours are the slide's own")
    if slide.has_colour_profile:
        notes.append("the colour profile was neither applied nor kept")
    if recipe.keeps_thumbnail and has_no_thumbnail:
        notes.append("the slide has no thumbnail to keep")
    return tuple(notes)
