"""Data sets worked on as a whole: augment, normalise, cache, sample, from Python.

    from cytosyn_aug import TileGenerator, offline
    generator = TileGenerator.from_pretrained()
    offline.augment("tiles", "augmented", generator, references=["lab_a"], variants=2,
                    strength=(0.5, 1.0))

The same as the commands of the same names, with the same words; see `cytosyn-aug augment --help`.
Every call resumes: killed at any moment and made again, it leaves what an undisturbed one does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

from cytosyn_aug.conditions import Conditions, read_conditions
from cytosyn_aug.config import Preserve
from cytosyn_aug.edits import (
    AugmentRecipe,
    Method,
    Mode,
    NormalizeRecipe,
    augment_edit,
    normalize_edit,
    sample_edit,
    size_check,
)
from cytosyn_aug.filling import Contents, moments_spec, variants_spec
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.inputs import list_inputs
from cytosyn_aug.laboratories import References, open_references, tensors_digest
from cytosyn_aug.listing import InputKind, Item, Listing, make_listing
from cytosyn_aug.outputs import (
    BYTES_PER_PIXEL,
    Format,
    make_cache,
    make_output,
    same_name,
    variant_name,
)
from cytosyn_aug.reading import Loaded, Reader
from cytosyn_aug.record_edits import moments_edit, variants_to_records
from cytosyn_aug.reference import StainReference
from cytosyn_aug.running import Run, Summary, Work, do_run

UNIT_TILES = 256
_IMAGE_FORMATS = ("png", "webp", "tar")


def augment(
    source: Path | str,
    out: Path | str,
    generator: TileGenerator,
    *,
    references: References = (),
    variants: int = 1,
    mode: Mode = "stain",
    strength: float | tuple[float, float] = 1.0,
    preserve: Preserve = "color",
    steps: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    mpp: float | None = None,
    allow_geometry_change: bool = False,
    format: Format = "png",
    input: InputKind | None = None,
    unit_tiles: int = UNIT_TILES,
    work: Work | None = None,
) -> Summary:
    """Write variants of all tiles of an input, and a manifest that says how each was made.

    Args:
        source: IN; see `cytosyn_aug.inputs`.
        out: OUT; see `cytosyn_aug.run_folder`.
        generator: The model; its batch size is part of the run.
        references: Laboratories to restain to: references, saved ones, or folders of tiles.
        variants: See `AugmentRecipe`, as for all down to `seed`.
        mode: "stain" or "resample".
        strength: One, or the least and the largest.
        preserve: "color" or "none".
        steps: Of resampling.
        guidance_scale: Of resampling.
        seed: Base seed.
        mpp: Scale of the tiles, None for the model's; of slides instead of what they state.
        allow_geometry_change: See `AugmentRecipe`.
        format: "png", "webp", "tar" (of WebP, one a unit), or "latents" or "images" (a cache that
            `CachedVariants` reads).
        input: What IN is; None looks.
        unit_tiles: Tiles of a work unit.
        work: Shard, threads and the like.

    Raises:
        ValueError: What was asked for contradicts itself, the model, the input or OUT.
        OSError: OUT cannot be written; what is finished stays.
    """
    _check_format(format, get_args(Format))
    low, high = strength if isinstance(strength, tuple) else (strength, strength)
    recipe = AugmentRecipe(
        variants=variants,
        mode=mode,
        strength=(low, high),
        preserve=preserve,
        mpp=generator.tile.mpp if mpp is None else mpp,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        allow_geometry_change=allow_geometry_change,
    )
    source, out = _checked_paths(source, out)
    listing = list_inputs(source, generator.tile, kind=input, mpp=mpp)
    num_masks = listing.num_masks()
    if num_masks and not (recipe.keeps_structure or allow_geometry_change):
        raise ValueError(
            f"{num_masks} tiles have masks, which would not be true of results whose structure "
            "moves; use mode stain with preserve color, or allow geometry change and lose the masks"
        )
    laboratories, identities = open_references(references, generator)
    edit = augment_edit(generator, laboratories, recipe)
    identity = _identity("augment", asdict(recipe), listing, generator, unit_tiles) | {
        "references": identities,
        "format": format,
    }
    is_cache = format in ("latents", "images")
    is_exact = is_cache or not recipe.keeps_structure
    takes_masks = recipe.keeps_structure and not is_cache
    place = partial(make_output, out, format, variant_name)
    if format == "latents" or format == "images":
        spec = variants_spec(
            generator,
            format,
            num_variants=variants,
            recipe={k: identity[k] for k in ("recipe", "references")},
            keeps_structure=recipe.keeps_structure,
        )
        edit = variants_to_records(generator, edit, is_latent=format == "latents")
        place = partial(make_cache, out, spec)
    run = Run(
        folder=out,
        identity=identity,
        generator=generator,
        listing=listing,
        unit_tiles=unit_tiles,
        read=_read(listing, generator, recipe.mpp, mpp, is_exact=is_exact, takes_masks=takes_masks),
        edit=edit,
        make_output=place,
        num_variants=variants,
        constants=_constants(identity),
        done="edited",
        result_bytes=BYTES_PER_PIXEL[format] * generator.tile.size_px**2,
    )
    return do_run(run, work or Work())


def normalize(
    source: Path | str,
    out: Path | str,
    generator: TileGenerator,
    *,
    reference: StainReference | Path | str,
    method: Method = "cytosyn",
    strength: float = 1.0,
    mpp: float | None = None,
    format: Format = "png",
    input: InputKind | None = None,
    unit_tiles: int = UNIT_TILES,
    work: Work | None = None,
) -> Summary:
    """Restain all tiles of an input to one reference, and write a manifest.

    Args:
        source: IN; see `cytosyn_aug.inputs`.
        out: OUT; see `cytosyn_aug.run_folder`.
        generator: The model.
        reference: A reference, a saved one, or a folder of tiles.
        method: How the change of stain is found.
        strength: 1 goes to the reference, 0 stays.
        mpp: See `augment`, as for all that follow.
        format: "png", "webp" or "tar".
        input: What IN is.
        unit_tiles: Tiles of a work unit.
        work: Shard, threads and the like.

    Raises:
        ValueError, OSError: See `augment`.
    """
    _check_format(format, _IMAGE_FORMATS)
    recipe = NormalizeRecipe(
        method=method, strength=strength, mpp=generator.tile.mpp if mpp is None else mpp
    )
    source, out = _checked_paths(source, out)
    listing = list_inputs(source, generator.tile, kind=input, mpp=mpp)
    laboratories, identities = open_references([reference], generator)
    identity = _identity("normalize", asdict(recipe), listing, generator, unit_tiles) | {
        "references": identities,
        "format": format,
    }
    run = Run(
        folder=out,
        identity=identity,
        generator=generator,
        listing=listing,
        unit_tiles=unit_tiles,
        read=_read(listing, generator, recipe.mpp, mpp, is_exact=False, takes_masks=True),
        edit=normalize_edit(generator, laboratories, recipe),
        make_output=partial(make_output, out, format, same_name),
        num_variants=1,
        constants=_constants(identity),
        done="edited",
        result_bytes=BYTES_PER_PIXEL[format] * generator.tile.size_px**2,
    )
    return do_run(run, work or Work())


def cache(
    source: Path | str,
    folder: Path | str,
    generator: TileGenerator,
    *,
    contents: Sequence[Contents] = ("moments", "features"),
    mpp: float | None = None,
    input: InputKind | None = None,
    unit_tiles: int = UNIT_TILES,
    work: Work | None = None,
) -> Summary:
    """Put what the model sees in all tiles of an input into a cache, which may hold others'.

    The manifest is in `runs/` of the cache, one a set of tiles.

    Args:
        source: IN; see `cytosyn_aug.inputs`.
        folder: CACHE, which `LatentCache.open` reads.
        generator: The model.
        contents: "moments" of the autoencoder, "features" of the encoder, or both.
        mpp: Scale of slides in microns per pixel, instead of what they state.
        input: See `augment`.
        unit_tiles: Tiles of a work unit.
        work: Shard, threads and the like.

    Raises:
        ValueError, OSError: See `augment`.
    """
    source, folder = _checked_paths(source, folder)
    listing = list_inputs(source, generator.tile, kind=input, mpp=mpp)
    recipe = {"contents": list(contents)}
    identity = _identity("cache", recipe, listing, generator, unit_tiles)
    spec = moments_spec(generator, contents)
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    run = Run(
        folder=folder / "runs" / name,
        identity=identity,
        generator=generator,
        listing=listing,
        unit_tiles=unit_tiles,
        read=_read(listing, generator, generator.tile.mpp, mpp, is_exact=True, takes_masks=False),
        edit=moments_edit(generator, contents),
        make_output=partial(make_cache, folder, spec),
        num_variants=1,
        constants=_constants(identity),
        done="cached",
        result_bytes=float(spec.record_bytes),
    )
    return do_run(run, work or Work())


def sample(
    out: Path | str,
    generator: TileGenerator,
    *,
    n: int,
    conditions: Conditions | None = None,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    format: Format = "png",
    unit_tiles: int = UNIT_TILES,
    work: Work | None = None,
) -> Summary:
    """Generate tiles, and write a manifest.

    Args:
        out: OUT; see `cytosyn_aug.run_folder`.
        generator: The model.
        n: Tiles.
        conditions: CLS vectors [N, D], or a file of them; tile k is given row k modulo N. None
            for none.
        steps: Forwards; None for 4 of a student, or 16 of the transformer.
        guidance_scale: Classifier-free guidance; 1 for none.
        seed: Base seed.
        format: "png", "webp" or "tar".
        unit_tiles: See `augment`, as for `work`.
        work: Shard, threads and the like.

    Raises:
        ValueError, OSError: See `augment`.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    _check_format(format, _IMAGE_FORMATS)
    out = Path(out)
    rows = None
    if conditions is not None:
        rows = read_conditions(conditions, len(generator.null_condition))
    items = (Item(f"{k:09d}", stem=f"{k // 1000:06d}/{k:09d}") for k in range(n))
    listing = make_listing("numbers", out, items)
    recipe = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "conditions_sha256": None if rows is None else tensors_digest([rows]),
    }
    identity = _identity("sample", recipe, listing, generator, unit_tiles) | {"format": format}
    run = Run(
        folder=out,
        identity=identity,
        generator=generator,
        listing=listing,
        unit_tiles=unit_tiles,
        read=Reader(listing, generator.tile, lambda height, width: None).read,
        edit=sample_edit(generator, rows, seed=seed, steps=steps, guidance_scale=guidance_scale),
        make_output=partial(make_output, out, format, same_name),
        num_variants=1,
        constants=_constants(identity),
        done="generated",
        result_bytes=BYTES_PER_PIXEL[format] * generator.tile.size_px**2,
    )
    return do_run(run, work or Work())


def _checked_paths(source: Path | str, out: Path | str) -> tuple[Path, Path]:
    """Refuse results among the tiles they are made from: the next run would find them."""
    source, out = Path(source), Path(out)
    inside, folder = out.resolve(), source.resolve()
    if source.is_file():
        folder = folder.parent
        if inside == folder:
            raise ValueError(f"OUT {out} is the folder of IN {source}; choose another one")
    elif inside.is_relative_to(folder) or folder.is_relative_to(inside):
        raise ValueError(f"OUT {out} and IN {source} lie in each other; choose folders apart")
    return source, out


def _check_format(format: str, allowed: Sequence[str]) -> None:
    if format not in allowed:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(allowed)}")


def _identity(
    command: str,
    recipe: dict[str, Any],  # Any: JSON
    listing: Listing,
    generator: TileGenerator,
    unit_tiles: int,
) -> dict[str, Any]:
    return {
        "command": command,
        "recipe": recipe,
        "input": listing.identity(),
        "model": {
            "digest": generator.digest,
            "dtype": str(generator.dtype),
            "batch_size": generator.batch_size,
        },
        "unit_tiles": unit_tiles,
    }


def _constants(identity: dict[str, Any]) -> dict[str, Any]:  # Any: JSON, cells
    """Return what all rows of a manifest say of the recipe and the model."""
    recipe = {k: v for k, v in identity.items() if k not in ("input", "unit_tiles", "format")}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return {"recipe": digest, "model": identity["model"]["digest"]}


def _read(
    listing: Listing,
    generator: TileGenerator,
    mpp: float,
    slide_mpp: float | None,
    *,
    is_exact: bool,
    takes_masks: bool,
) -> Callable[[Item], Loaded]:
    check = size_check(generator, mpp, is_exact=is_exact)
    reader = Reader(listing, generator.tile, check, slide_mpp)
    if takes_masks:
        return reader.read
    return lambda item: reader.read(item._replace(mask=""))
