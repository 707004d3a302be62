"""Whole slides, normalised: a slide in, a pyramid with the stain of a reference out.

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
import re
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.sax.saxutils import unescape

import numpy as np
from PIL import Image

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.files import atomic_file, remove_leftovers
from cytosyn_aug.io.slide import Slide, SlideError
from cytosyn_aug.io.tile_source import read_slide_tiles
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.slides.blocks import PYRAMID, BlockMaker, BlockTotals
from cytosyn_aug.slides.pyramid import (
    SOFTWARE,
    TILE_PX,
    Codec,
    PyramidWriter,
    level_sizes,
)
from cytosyn_aug.slides.recipe import SlideRecipe, SlideReport
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
        reference: Where to go; its kind is the method.
        generator: The model, for a `StainReference`.
        source: The slide's own stain, if known; of the kind of `reference`.
        recipe: See `SlideRecipe`.
        overwrite: Replace `out`.
        num_threads: That read, recolour and compress; the result does not depend on it.
        progress: Called with the number of blocks done and of all blocks.

    Raises:
        SlideError: The slide or a block of it cannot be read, states no scale, is too coarse,
            does not tell its stain, or the region is outside.
        FileExistsError: `out` exists.
        ValueError: `out` is the slide, or the arguments do not fit each other.
        OSError: The disk is full, or will be.
    """
    steps = normalize_in_steps(
        slide,
        out,
        reference,
        generator=generator,
        source=source,
        recipe=recipe if recipe is not None else SlideRecipe(),
        overwrite=overwrite,
        num_threads=num_threads,
    )
    with closing(steps):
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                report: SlideReport = end.value
                return report
            if progress is not None:
                progress(done, total)


def normalize_in_steps(
    slide: Path | str,
    out: Path | str,
    reference: AnyReference,
    *,
    generator: TileGenerator | None,
    recipe: SlideRecipe,
    source: AnyReference | None = None,
    overwrite: bool = False,
    num_threads: int = 4,
) -> Generator[tuple[int, int], None, SlideReport]:
    """Do what `normalize_slide` does, and return what it returns; close it to stop.

    Yields:
        After each block, the number of blocks done and of all blocks.
    """
    began = time.perf_counter()
    file, out = Path(slide), Path(out)
    _check_out(file, out, overwrite)
    with Slide(file, recipe.slide_mpp) as opened:
        view = SlideView.of(opened, recipe.region, recipe.mpp)
        recolour = _recolour(opened, reference, generator, source, recipe)
        thumbnail = opened.scanner_thumbnail() if recipe.keeps_thumbnail else None
        notes = _notes(opened, recipe, recolour is None, thumbnail is None)
    maker = _block_maker(file, view, ColourTable(recolour), recipe)
    provenance = _request(opened, reference, recipe) | {
        "software": _software(),
        "status": "no_tissue" if recolour is None else "normalized",
        "change_digest": maker.table.digest,
    }
    totals, num_bytes = yield from _write(maker, out, provenance, thumbnail, num_threads)
    return SlideReport(
        out=out,
        status="no_tissue" if recolour is None else "normalized",
        method=method_of(reference),
        width_px=view.width,
        height_px=view.height,
        mpp=view.mpp,
        num_levels=len(level_sizes(view.width, view.height)),
        num_tiles=totals.num_blocks,
        num_bytes=num_bytes,
        tissue=totals.tissue / (view.width * view.height),
        seam_ratio=totals.after.ratio,
        seam_ratio_before=totals.before.ratio,
        damaged=tuple(view.corner(c * TILE_PX, r * TILE_PX) for r, c in totals.damaged),
        notes=notes,
        source_digest=opened.identity,
        change_digest=maker.table.digest,
        pixels_digest=totals.digest,
        seconds=time.perf_counter() - began,
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
        SlideError: See `normalize_slide`.
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
    """Return whether a file is what `normalize_slide` makes of these, by what it says of itself.

    Raises:
        SlideError: The slide cannot be opened, or the file is no slide.
    """
    with Slide(out, mpp=1.0) as written, Slide(slide, recipe.slide_mpp) as opened:
        said = provenance_of(written)
        wanted = json.loads(json.dumps(_request(opened, reference, recipe)))
    return {k: said.get(k) for k in wanted} == wanted


def provenance_of(slide: Slide) -> dict[str, Any]:  # Any: JSON
    """Return what a file of `normalize_slide` says of itself; nothing if it is another's."""
    found = re.search(r"<Description>(\{.*\})</Description>", slide.comment, re.DOTALL)
    return {} if found is None else dict(json.loads(unescape(found[1])))


def open_written(file: Path) -> Slide:
    """Open a file of `normalize_slide` at the scale it states in OME-XML.

    Of a TIFF's resolution a slide believes less, because other software writes nonsense there, and
    would not know a result that is coarser than 2 microns/pixel.

    Raises:
        SlideError: It cannot be read.
    """
    with Slide(file, mpp=1.0) as written:
        stated = re.search(r'PhysicalSizeX="([^"]+)"', written.comment)
    return Slide(file, None if stated is None else float(stated[1]))


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
        "recipe": asdict(recipe),
    }


def _write(
    maker: BlockMaker,
    out: Path,
    provenance: dict[str, Any],
    thumbnail: Image.Image | None,
    num_threads: int,
) -> Generator[tuple[int, int], None, tuple[BlockTotals, int]]:
    """Write all blocks; return what they add up to, and the size of the file."""
    view, totals = maker.view, BlockTotals()
    small = None if thumbnail is None else maker.table.look_up(np.asarray(thumbnail))[0]
    with maker, closing(in_order(maker.make, maker.positions, num_threads)) as blocks:
        _check_disk(out, maker.estimate_bytes())
        with atomic_file(out) as stream:
            writer = PyramidWriter(stream, view.width, view.height, mpp=view.mpp, codec=maker.codec)
            for block in blocks:
                writer.add(block.encoded, block.half)
                totals.add(block)
                yield totals.num_blocks, len(maker.positions)
            provenance["pixels_digest"] = totals.digest
            provenance["tissue"] = totals.tissue / (view.width * view.height)
            provenance["seam_ratio"] = totals.after.ratio
            provenance["seam_ratio_before"] = totals.before.ratio
            provenance["num_damaged"] = len(totals.damaged)
            return totals, writer.finish(json.dumps(provenance), small)


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
