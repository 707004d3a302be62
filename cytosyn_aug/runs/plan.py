"""Plans of runs: one function per command that returns what it will do.

Lists the input, opens references and writes down the recipe and the identity of the run. Everything
that can be wrong with a request is found here, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from cytosyn_aug.cache.encodings import Contents, encodings_spec
from cytosyn_aug.config import Method, TileSpec
from cytosyn_aug.model.conditions import Conditions, read_conditions
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.runs.checks import check_apart, check_augment, check_count, check_format
from cytosyn_aug.runs.edits import (
    augment_edit,
    normalize_edit,
    sample_edit,
    size_check,
)
from cytosyn_aug.runs.inputs import list_inputs, list_whole_slides
from cytosyn_aug.runs.listing import Item, Listing, make_listing
from cytosyn_aug.runs.outputs import (
    cache_records,
    check_cache,
    image_files,
    same_name,
    variant_name,
)
from cytosyn_aug.runs.pipeline import TileWork
from cytosyn_aug.runs.reading import LoadedTile, Reader
from cytosyn_aug.runs.recipes import (
    AugmentRecipe,
    Format,
    ImageFormat,
    NormalizeRecipe,
    SampleRecipe,
    Tiles,
)
from cytosyn_aug.runs.record_edits import moments_edit, variants_to_records
from cytosyn_aug.runs.references import (
    Given,
    References,
    describe_references,
    open_references,
    tensors_digest,
)
from cytosyn_aug.runs.slide_sources import SlideSources, note_slides
from cytosyn_aug.runs.slides import SlideWork
from cytosyn_aug.runs.unit_work import Run
from cytosyn_aug.slides.recipe import SLIDES_COMMAND, SlideRecipe, recipe_as_json
from cytosyn_aug.stain.methods import fit_reference
from cytosyn_aug.transforms.variants import records_spec

_IMAGE_FORMATS: tuple[str, ...] = get_args(ImageFormat)


def plan_augment(
    tiles: Tiles,
    out: Path | str,
    generator: TileGenerator,
    references: References,
    recipe: AugmentRecipe,
    format: Format,
) -> Run:
    """Return the run that `cytosyn_aug.offline.augment` does."""
    check_augment(recipe, format, num_references=len(references))
    check_apart(tiles.source, out)
    if recipe.mode == "resample":
        generator.check_drawing(steps=recipe.steps, guidance_scale=recipe.guidance_scale)
    laboratories, identities = open_references(references, generator)
    listing = _list(tiles, generator)
    num_masks = listing.num_masks()
    if num_masks and not (recipe.keeps_structure or recipe.allow_geometry_change):
        raise ValueError(
            f"{num_masks} tiles have masks, which would not be true of results whose structure "
            "moves; use mode stain with preserve color, or allow geometry change and lose the masks"
        )
    is_cache = format not in _IMAGE_FORMATS
    recipe = replace(recipe, mpp=_scale(tiles, listing, generator))
    edit = augment_edit(generator, laboratories, recipe)
    if format == "latents" or format == "images":
        spec = records_spec(
            generator,
            format,
            num_variants=recipe.variants,
            content={"recipe": asdict(recipe), "references": identities},
            keeps_structure=recipe.keeps_structure,
        )
        edit = variants_to_records(generator, edit, is_latent=format == "latents")
        destination = cache_records(Path(out), spec)
    else:
        destination = image_files(Path(out), format, variant_name)
    read = _read(
        tiles,
        listing,
        generator,
        is_exact=is_cache or not recipe.keeps_structure,
        takes_masks=recipe.keeps_structure and not is_cache,
    )
    return _tile_run(
        "augment",
        asdict(recipe),
        tiles,
        TileWork(
            generator=generator,
            listing=listing,
            read=read,
            edit=edit,
            destination=destination,
            num_variants=recipe.variants,
        ),
        folder=Path(out),
        settings={"references": identities, "format": format},
        references=describe_references(references, laboratories),
    )


def plan_normalize(
    tiles: Tiles,
    out: Path | str,
    generator: TileGenerator,
    references: References,
    recipe: NormalizeRecipe,
    format: Format,
) -> Run:
    """Return the run that `cytosyn_aug.offline.normalize` does."""
    check_format(format, _IMAGE_FORMATS)
    check_apart(tiles.source, out)
    laboratories, identities = open_references(references, generator, recipe.method)
    listing = _list(tiles, generator)
    if recipe.source == "slide":
        listing = note_slides(listing)
    recipe = replace(recipe, mpp=_scale(tiles, listing, generator))
    read = _read(tiles, listing, generator, is_exact=False, takes_masks=True)
    fit = partial(fit_reference, recipe.method, generator=generator)
    sources = SlideSources(fit, generator.tile, listing, read, recipe.mpp)
    return _tile_run(
        "normalize",
        asdict(recipe),
        tiles,
        TileWork(
            generator=generator,
            listing=listing,
            read=read,
            edit=normalize_edit(generator, laboratories, recipe, sources),
            destination=image_files(Path(out), format, same_name),
        ),
        folder=Path(out),
        settings={"references": identities, "format": format},
        references=describe_references(references, laboratories),
    )


def plan_cache(
    tiles: Tiles, cache: Path | str, generator: TileGenerator, contents: Sequence[Contents]
) -> Run:
    """Return the run that `cytosyn_aug.offline.cache` does."""
    check_apart(tiles.source, cache)
    listing = _list(tiles, generator)
    spec = encodings_spec(generator, contents)
    run = _tile_run(
        "cache",
        {"contents": list(contents)},
        tiles,
        TileWork(
            generator=generator,
            listing=listing,
            read=_read(tiles, listing, generator, is_exact=True, takes_masks=False),
            edit=moments_edit(generator, contents),
            destination=cache_records(Path(cache), spec),
            done="cached",
        ),
        folder=Path(cache),
    )
    # A cache holds many sets of tiles; each has a run of its own beside the records.
    run = replace(run, folder=Path(cache) / "runs" / settings_digest(run.identity))
    check_cache(Path(cache), spec, run.folder)
    return run


def plan_sample(
    out: Path | str,
    generator: TileGenerator,
    n: int,
    conditions: Conditions | None,
    recipe: SampleRecipe,
    format: Format,
    unit_tiles: int,
) -> Run:
    """Return the run that `cytosyn_aug.offline.sample` does."""
    check_count(n)
    check_format(format, _IMAGE_FORMATS)
    generator.check_drawing(steps=recipe.steps, guidance_scale=recipe.guidance_scale)
    rows, digest = None, None
    if conditions is not None:
        rows = read_conditions(conditions, len(generator.null_condition))
        digest = tensors_digest([rows])
    items = (Item(f"{k:09d}", stem=f"{k // 1000:06d}/{k:09d}") for k in range(n))
    listing = make_listing("numbers", Path(out), items)
    return _tile_run(
        "sample",
        asdict(recipe),
        Tiles(source=out, unit_tiles=unit_tiles),
        TileWork(
            generator=generator,
            listing=listing,
            read=Reader(listing, generator.tile, lambda height, width: None).read,
            edit=sample_edit(generator, rows, recipe),
            destination=image_files(Path(out), format, same_name),
            done="generated",
        ),
        folder=Path(out),
        settings={"conditions_sha256": digest, "format": format},
    )


def plan_slides(
    source: Path | str,
    out: Path | str,
    generator: TileGenerator | None,
    reference: Given,
    method: Method,
    recipe: SlideRecipe,
) -> Run:
    """Return the run that `cytosyn_aug.offline.normalize_slides` does."""
    check_apart(source, out)
    if method != "cytosyn":
        generator = None  # one that is given all the same makes no other run
    references, identities = open_references([reference], generator, method)
    listing = list_whole_slides(source, mpp=recipe.slide_mpp)
    settings: dict[str, Any] = {  # Any: JSON
        "command": SLIDES_COMMAND,
        "recipe": {"method": method} | recipe_as_json(recipe),
        "references": identities,
        "model": _model(generator),
    }
    ((name, opened),) = references.items()
    digest = None if generator is None else generator.digest
    work = SlideWork(
        listing=listing,
        generator=generator,
        reference=opened,
        reference_name=name,
        recipe=recipe,
        constants={"recipe": settings_digest(settings), "model": digest},
    )
    tile = TileSpec() if generator is None else generator.tile
    return Run(
        folder=Path(out),
        identity=settings | {"input": listing.identity(), "unit_tiles": 1},
        context=_context(source, tile, describe_references([reference], references)),
        work=work,
    )


def settings_digest(content: Mapping[str, Any]) -> str:  # Any: JSON
    """Return 16 digits of SHA-256 over what JSON says of settings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _list(tiles: Tiles, generator: TileGenerator) -> Listing:
    return list_inputs(tiles.source, generator.tile, kind=tiles.input, mpp=tiles.mpp)


def _tile_run(
    command: str,
    recipe: Mapping[str, Any],  # Any: JSON
    tiles: Tiles,
    work: TileWork,
    *,
    folder: Path,
    settings: Mapping[str, Any] = MappingProxyType({}),  # Any: JSON
    references: Sequence[Mapping[str, Any]] = (),  # Any: JSON
) -> Run:
    """Return a run, with its identity: all that decides its bytes but the pixels of its input.

    Args:
        command: Which command it is of.
        recipe: How tiles are edited.
        tiles: What it works on.
        work: What is done to a tile; the cells that all rows have in common are added.
        folder: Where receipts and the manifest go.
        settings: Further parts of the identity; all but the format make another recipe.
        references: What a report says of them.
    """
    identity = {
        "command": command,
        "recipe": recipe,
        "input": work.listing.identity() | {"mpp": tiles.mpp},
        "model": _model(work.generator),
        "unit_tiles": tiles.unit_tiles,
        **settings,
    }
    decisive = {k: v for k, v in identity.items() if k not in ("input", "unit_tiles", "format")}
    constants = {"recipe": settings_digest(decisive), "model": work.generator.digest}
    source = None if work.listing.kind == "numbers" else tiles.source
    return Run(
        folder=folder,
        identity=identity,
        context=_context(source, work.generator.tile, references),
        work=replace(work, constants=constants),
    )


def _context(
    source: Path | str | None, tile: TileSpec, references: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:  # Any: JSON
    """Return what a report needs to find the input and to show references; it decides no byte."""
    return {
        "input": None if source is None else str(Path(source).absolute()),
        "tile": asdict(tile),
        "references": list(references),
    }


def _model(generator: TileGenerator | None) -> dict[str, Any] | None:  # Any: JSON
    if generator is None:
        return None
    return {
        "digest": generator.digest,
        "dtype": str(generator.dtype),
        "batch_size": generator.batch_size,
    }


def _scale(tiles: Tiles, listing: Listing, generator: TileGenerator) -> float:
    """Return microns per pixel of tiles as read; those of slides are cut to the model's."""
    if tiles.mpp is None or listing.is_cut():
        return generator.tile.mpp
    return tiles.mpp


def _read(
    tiles: Tiles,
    listing: Listing,
    generator: TileGenerator,
    *,
    is_exact: bool,
    takes_masks: bool,
) -> Callable[[Item], LoadedTile]:
    scale = _scale(tiles, listing, generator)
    check = size_check(generator, scale, is_exact=is_exact)
    reader = Reader(listing, generator.tile, check, tiles.mpp)
    if takes_masks:
        return reader.read
    return lambda item: reader.read(item._replace(mask=""))
