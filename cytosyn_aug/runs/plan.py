"""From what is asked to a run: inputs listed, references opened, recipe and identity written down.

Everything that can be wrong with a request is found here, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from cytosyn_aug.cache.encodings import Contents, encodings_spec
from cytosyn_aug.cache.spec import CacheSpec
from cytosyn_aug.model.conditions import Conditions, read_conditions
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.runs.edits import (
    augment_edit,
    normalize_edit,
    sample_edit,
    size_check,
)
from cytosyn_aug.runs.folder import RunFolder
from cytosyn_aug.runs.inputs import list_inputs
from cytosyn_aug.runs.listing import InputKind, Item, Listing, make_listing
from cytosyn_aug.runs.outputs import (
    BYTES_PER_PIXEL,
    ENCODERS,
    Format,
    Output,
    check_cache,
    make_cache,
    make_output,
    same_name,
    variant_name,
)
from cytosyn_aug.runs.reading import Loaded, Reader
from cytosyn_aug.runs.recipes import AugmentRecipe, NormalizeRecipe, SampleRecipe
from cytosyn_aug.runs.record_edits import moments_edit, variants_to_records
from cytosyn_aug.runs.references import (
    References,
    describe_references,
    open_references,
    tensors_digest,
)
from cytosyn_aug.runs.slide_sources import SlideSources, note_slides
from cytosyn_aug.runs.unit_work import Run, TileTask
from cytosyn_aug.stain.methods import fit_reference
from cytosyn_aug.transforms.variants import records_spec

UNIT_TILES = 256
_IMAGE_FORMATS = ("png", "webp", "tar")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """What a run works on.

    Attributes:
        source: IN; see `cytosyn_aug.runs.inputs`.
        kind: What it is; None looks.
        mpp: Scale in microns per pixel: of tiles, None for the model's; of slides, None for what
            they state.
        unit_tiles: Tiles of a work unit.
    """

    source: Path | str
    kind: InputKind | None = None
    mpp: float | None = None
    unit_tiles: int = UNIT_TILES


def plan_augment(
    tiles: Tiles,
    out: Path | str,
    generator: TileGenerator,
    references: References,
    recipe: AugmentRecipe,
    format: Format,
) -> Run:
    """Return the run that `cytosyn_aug.offline.augment` does."""
    _check_format(format, get_args(Format))
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
    if is_cache and recipe.is_bounded:
        raise ValueError(
            "bounds on similarity leave results out, and a cache needs all variants of a tile; "
            "write png, webp or tar"
        )
    recipe = replace(recipe, mpp=_scale(tiles, listing, generator))
    edit = augment_edit(generator, laboratories, recipe)
    more = {"references": identities, "format": format}
    identity = _identity("augment", recipe, listing, generator, tiles) | more
    place: Callable[[RunFolder], Output]
    if format == "latents" or format == "images":
        spec = records_spec(
            generator,
            format,
            num_variants=recipe.variants,
            content={"recipe": {k: identity[k] for k in ("recipe", "references")}},
            keeps_structure=recipe.keeps_structure,
        )
        edit = variants_to_records(generator, edit, is_latent=format == "latents")
        place = partial(make_cache, Path(out), spec)
        bytes_per_pixel = _record_bytes_per_pixel(spec)
    else:
        place = partial(make_output, Path(out), format, variant_name)
        bytes_per_pixel = BYTES_PER_PIXEL[format]
    task = TileTask(
        generator=generator,
        listing=listing,
        read=_read(
            tiles,
            listing,
            generator,
            is_exact=is_cache or not recipe.keeps_structure,
            takes_masks=recipe.keeps_structure and not is_cache,
        ),
        edit=edit,
        make_output=place,
        num_variants=recipe.variants,
        done="edited",
        constants=_constants(identity),
        bytes_per_pixel=bytes_per_pixel,
        encode=ENCODERS.get(format),
    )
    context = _context(tiles, generator, references, laboratories)
    return _run(task, Path(out), identity, context)


def plan_normalize(
    tiles: Tiles,
    out: Path | str,
    generator: TileGenerator,
    references: References,
    recipe: NormalizeRecipe,
    format: Format,
) -> Run:
    """Return the run that `cytosyn_aug.offline.normalize` does."""
    _check_format(format, _IMAGE_FORMATS)
    check_apart(tiles.source, out)
    laboratories, identities = open_references(references, generator, recipe.method)
    listing = _list(tiles, generator)
    if recipe.source == "slide":
        listing = note_slides(listing)
    recipe = replace(recipe, mpp=_scale(tiles, listing, generator))
    more = {"references": identities, "format": format}
    identity = _identity("normalize", recipe, listing, generator, tiles) | more
    read = _read(tiles, listing, generator, is_exact=False, takes_masks=True)
    fit = partial(fit_reference, recipe.method, generator=generator)
    sources = SlideSources(fit, generator.tile, listing, read, recipe.mpp)
    task = TileTask(
        generator=generator,
        listing=listing,
        read=read,
        edit=normalize_edit(generator, laboratories, recipe, sources),
        make_output=partial(make_output, Path(out), format, same_name),
        num_variants=1,
        done="edited",
        constants=_constants(identity),
        bytes_per_pixel=BYTES_PER_PIXEL[format],
        encode=ENCODERS.get(format),
    )
    context = _context(tiles, generator, references, laboratories)
    return _run(task, Path(out), identity, context)


def plan_cache(
    tiles: Tiles, cache: Path | str, generator: TileGenerator, contents: Sequence[Contents]
) -> Run:
    """Return the run that `cytosyn_aug.offline.cache` does."""
    check_apart(tiles.source, cache)
    listing = _list(tiles, generator)
    spec = encodings_spec(generator, contents)
    identity = _identity("cache", {"contents": list(contents)}, listing, generator, tiles)
    # A cache holds many sets of tiles; each has a run of its own beside the records.
    folder = Path(cache) / "runs" / settings_digest(identity)
    check_cache(Path(cache), spec, folder)
    task = TileTask(
        generator=generator,
        listing=listing,
        read=_read(tiles, listing, generator, is_exact=True, takes_masks=False),
        edit=moments_edit(generator, contents),
        make_output=partial(make_cache, Path(cache), spec),
        num_variants=1,
        done="cached",
        constants=_constants(identity),
        bytes_per_pixel=_record_bytes_per_pixel(spec),
        encode=None,
    )
    return _run(task, folder, identity, _context(tiles, generator))


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
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    _check_format(format, _IMAGE_FORMATS)
    generator.check_drawing(steps=recipe.steps, guidance_scale=recipe.guidance_scale)
    rows, digest = None, None
    if conditions is not None:
        rows = read_conditions(conditions, len(generator.null_condition))
        digest = tensors_digest([rows])
    items = (Item(f"{k:09d}", stem=f"{k // 1000:06d}/{k:09d}") for k in range(n))
    listing = make_listing("numbers", Path(out), items)
    more = {"conditions_sha256": digest, "format": format}
    tiles = Tiles(source=out, unit_tiles=unit_tiles)
    identity = _identity("sample", recipe, listing, generator, tiles) | more
    task = TileTask(
        generator=generator,
        listing=listing,
        read=Reader(listing, generator.tile, lambda height, width: None).read,
        edit=sample_edit(generator, rows, recipe),
        make_output=partial(make_output, Path(out), format, same_name),
        num_variants=1,
        done="generated",
        constants=_constants(identity),
        bytes_per_pixel=BYTES_PER_PIXEL[format],
        encode=ENCODERS.get(format),
    )
    return _run(task, Path(out), identity, _context(None, generator))


def check_apart(source: Path | str, out: Path | str) -> None:
    """Refuse results among their sources: the next run would find them.

    Called before references are fitted and slides are looked through, which takes longer.

    Raises:
        FileNotFoundError: There is no IN.
        ValueError: One lies in the other.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a folder, table, tar file or slide")
    inside, folder = out.resolve(), source.resolve()
    if source.is_file():
        if inside == folder.parent:
            raise ValueError(f"OUT {out} is the folder of IN {source}; choose another one")
    elif inside.is_relative_to(folder) or folder.is_relative_to(inside):
        raise ValueError(f"OUT {out} and IN {source} lie in each other; choose folders apart")


def settings_digest(content: dict[str, Any]) -> str:  # Any: JSON
    """Return 16 digits of SHA-256 over what JSON says of settings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _list(tiles: Tiles, generator: TileGenerator) -> Listing:
    return list_inputs(tiles.source, generator.tile, kind=tiles.kind, mpp=tiles.mpp)


def _check_format(format: str, allowed: Sequence[str]) -> None:
    if format not in allowed:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(allowed)}")


def _identity(
    command: str,
    recipe: AugmentRecipe | NormalizeRecipe | SampleRecipe | dict[str, Any],
    listing: Listing,
    generator: TileGenerator,
    tiles: Tiles,
) -> dict[str, Any]:  # Any: JSON
    """Return what makes a run this one: all that decides its bytes but the pixels of its input."""
    return {
        "command": command,
        "recipe": recipe if isinstance(recipe, dict) else asdict(recipe),
        "input": listing.identity() | {"mpp": tiles.mpp},
        "model": {
            "digest": generator.digest,
            "dtype": str(generator.dtype),
            "batch_size": generator.batch_size,
        },
        "unit_tiles": tiles.unit_tiles,
    }


def _context(
    tiles: Tiles | None,
    generator: TileGenerator,
    given: References = (),
    references: Mapping[str, Any] = MappingProxyType({}),  # Any: one of four kinds
) -> dict[str, Any]:  # Any: JSON
    """Return what a report needs to find the input and to show references; of no one's bytes."""
    return {
        "input": None if tiles is None else str(Path(tiles.source).absolute()),
        "tile": asdict(generator.tile),
        "references": describe_references(given, references),
    }


def _record_bytes_per_pixel(spec: CacheSpec) -> float:
    """Return what the pixels of a tile take in a cache, which holds tiles of one size."""
    return spec.record_bytes / spec.tile.size_px**2


def _run(
    task: TileTask,
    folder: Path,
    identity: dict[str, Any],  # Any: JSON
    context: dict[str, Any],  # Any: JSON
) -> Run:
    return Run(
        folder=folder,
        identity=identity,
        context=context,
        listing=task.listing,
        unit_items=identity["unit_tiles"],
        generator=task.generator,
        task=task,
    )


def _constants(identity: dict[str, Any]) -> dict[str, Any]:  # Any: JSON, cells
    """Return what all rows of a manifest say of the recipe and the model."""
    recipe = {k: v for k, v in identity.items() if k not in ("input", "unit_tiles", "format")}
    return {"recipe": settings_digest(recipe), "model": identity["model"]["digest"]}


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
) -> Callable[[Item], Loaded]:
    scale = _scale(tiles, listing, generator)
    check = size_check(generator, scale, is_exact=is_exact)
    reader = Reader(listing, generator.tile, check, tiles.mpp)
    if takes_masks:
        return reader.read
    return lambda item: reader.read(item._replace(mask=""))
