"""Data sets worked on as a whole: augment, normalise, cache, sample, report, from Python.

    from cytosyn_aug import TileGenerator, offline
    generator = TileGenerator.from_pretrained()
    offline.augment("tiles", "augmented", generator, references=["lab_a"], variants=2,
                    strength=(0.5, 1.0))
    offline.report("augmented")  # augmented/report.html

The same as the commands of the same names (`normalize_slides` is `normalize-slide` of many), with
the same words. How a run is worked on is a `Work`, with a
`RayCluster` in it for `--engine ray`. Every call resumes: killed at any moment and made again, it
leaves what an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cytosyn_aug.cache.encodings import Contents
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.config import Method, Preserve
from cytosyn_aug.model.conditions import Conditions
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.report.report import report
from cytosyn_aug.runs.checks import check_not_overwritten
from cytosyn_aug.runs.execute import Summary, do_run
from cytosyn_aug.runs.plan import (
    plan_augment,
    plan_cache,
    plan_normalize,
    plan_sample,
    plan_slides,
)
from cytosyn_aug.runs.ray_actors import RayCluster
from cytosyn_aug.runs.recipes import (
    AugmentRecipe,
    Format,
    ImageFormat,
    InputKind,
    Mode,
    NormalizeRecipe,
    SampleRecipe,
    Source,
    Tiles,
    Work,
)
from cytosyn_aug.runs.references import Given, References
from cytosyn_aug.slides.recipe import SlideRecipe

__all__ = [
    "RayCluster",
    "SlideRecipe",
    "Work",
    "augment",
    "cache",
    "normalize",
    "normalize_slides",
    "report",
    "sample",
]


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
    min_similarity: float = -1.0,
    max_similarity: float = 1.0,
    format: Format = "png",
    input: InputKind | None = None,
    unit_tiles: int = 256,
    work: Work | None = None,
) -> Summary:
    """Write variants of all tiles of an input, and a manifest that says how each was made.

    Args:
        source: IN: a folder of tiles, a table (.csv, .parquet) with paths, tar shards, or slides.
        out: OUT: the folder to write, or to continue.
        generator: The model; its batch size is part of the run.
        references: Laboratories to restain to: references, saved ones, or folders of tiles.
        variants: Results per tile.
        mode: "stain" restains; "resample" draws new tiles with the same features.
        strength: Strength of restaining: one number, or the least and the largest to draw between;
            1 goes to the reference, 0 stays.
        preserve: "color" moves no structure; "none" draws the restained tile anew.
        steps: Forwards of resampling; by default 4 of a student, or 16 of the transformer.
        guidance_scale: Classifier-free guidance of resampling; 1 is no guidance.
        seed: Base seed, from which each result derives its own.
        mpp: Microns per pixel: of tiles, by default the model's; of slides, by default what they
            state.
        allow_geometry_change: Accept tiles with masks although structure will move; the masks are
            left behind.
        min_similarity: Leave out results drawn anew whose features have a smaller cosine to those
            of their source; -1 keeps all.
        max_similarity: Leave out results drawn anew whose features have a larger cosine to those of
            their source; 1 keeps all.
        format: "png", "webp", "tar" (of WebP, one per unit), or "latents" or "images" (a cache that
            `CachedVariants` reads).
        input: What IN is; by default that is looked up.
        unit_tiles: Tiles per work unit; a killed process loses at most two units.
        work: How the run is worked on: shard, threads, Ray; None for the defaults of `Work`.

    Raises:
        ValueError: What was asked for contradicts itself, the model, the input or OUT.
        OSError: OUT cannot be written; what is finished stays.
    """
    low, high = strength if isinstance(strength, tuple) else (strength, strength)
    recipe = AugmentRecipe(
        variants=variants,
        mode=mode,
        strength=(low, high),
        preserve=preserve,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        allow_geometry_change=allow_geometry_change,
        min_similarity=min_similarity,
        max_similarity=max_similarity,
    )
    tiles = Tiles(source=source, input=input, mpp=mpp, unit_tiles=unit_tiles)
    run = plan_augment(tiles, out, generator, references, recipe, format)
    return do_run(run, work or Work())


def normalize(
    source: Path | str,
    out: Path | str,
    generator: TileGenerator,
    *,
    reference: Given,
    method: Method = "cytosyn",
    stain_source: Source = "tile",
    strength: float = 1.0,
    mpp: float | None = None,
    format: ImageFormat = "png",
    input: InputKind | None = None,
    unit_tiles: int = 256,
    work: Work | None = None,
) -> Summary:
    """Restain all tiles of an input to one reference, and write a manifest.

    Args:
        source: IN: a folder of tiles, a table (.csv, .parquet) with paths, tar shards, or slides.
        out: OUT: the folder to write, or to continue.
        generator: The model.
        reference: A reference of the method's kind, a saved one, a folder of tiles or a slide, or
            several of these two for one reference.
        method: "cytosyn" reads the stain with the model; "macenko", "reinhard" and "transport" use
            no network.
        stain_source: Whose stain is changed: that of each "tile", or of its "slide", which is more
            even and needs names that say the slide.
        strength: From 0, which stays, to 1, which goes to the reference.
        mpp: Microns per pixel: of tiles, by default the model's; of slides, by default what they
            state.
        format: "png", "webp" or "tar" (of WebP, one per unit).
        input: What IN is; by default that is looked up.
        unit_tiles: Tiles per work unit; a killed process loses at most two units.
        work: How the run is worked on: shard, threads, Ray; None for the defaults of `Work`.

    Raises:
        ValueError: What was asked for contradicts itself, the model, the input or OUT.
        OSError: OUT cannot be written; what is finished stays.
    """
    recipe = NormalizeRecipe(method=method, source=stain_source, strength=strength)
    tiles = Tiles(source=source, input=input, mpp=mpp, unit_tiles=unit_tiles)
    run = plan_normalize(tiles, out, generator, [reference], recipe, format)
    return do_run(run, work or Work())


def normalize_slides(
    source: Path | str,
    out: Path | str,
    generator: TileGenerator | None = None,
    *,
    reference: Given,
    method: Method = "cytosyn",
    recipe: SlideRecipe | None = None,
    work: Work | None = None,
) -> Summary:
    """Write slides with the stain of a reference, as pyramids, and a manifest: one row per slide.

    For one slide and one file there is `cytosyn_aug.normalize_slide`.

    Args:
        source: Slide, folder of slides, or table with one path per row and any of label, mpp.
        out: OUT; each slide goes to `<its path>.ome.tif`.
        generator: The model of method "cytosyn"; the others need none.
        reference: A reference of the method's kind, a saved one, a folder of tiles or a slide, or
            several of these two for one reference.
        method: "cytosyn" reads the stain with the model; "macenko", "reinhard" and "transport" use
            no network.
        recipe: How slides are normalised and written; None for the defaults of `SlideRecipe`.
        work: How the run is worked on: shard, Ray, and `readers`, the threads that do all; None for
            the defaults of `Work`.

    Raises:
        ValueError: What was asked for contradicts itself, the model, the input or OUT.
        OSError: OUT cannot be written; what is finished stays.
    """
    run = plan_slides(source, out, generator, reference, method, recipe or SlideRecipe())
    return do_run(run, work or Work())


def cache(
    source: Path | str,
    folder: Path | str,
    generator: TileGenerator,
    *,
    contents: Sequence[Contents] = ("moments", "features"),
    compact: bool = False,
    mpp: float | None = None,
    input: InputKind | None = None,
    unit_tiles: int = 256,
    work: Work | None = None,
) -> Summary:
    """Put what the model sees in all tiles of an input into a cache, which may hold others'.

    The manifest is in `runs/` of the cache, one per set of tiles.

    Args:
        source: IN: a folder of tiles, a table (.csv, .parquet) with paths, tar shards, or slides.
        folder: CACHE, which `LatentCache.open` reads.
        generator: The model.
        contents: "moments" of the autoencoder, "features" of the encoder, or both.
        compact: Merge the shards in the end, one per work unit, into few large ones.
        mpp: Microns per pixel: of tiles, by default the model's; of slides, by default what they
            state.
        input: What IN is; by default that is looked up.
        unit_tiles: Tiles per work unit; a killed process loses at most two units.
        work: How the run is worked on: shard, threads, Ray; None for the defaults of `Work`.

    Raises:
        ValueError: What was asked for contradicts itself, the model, the input or CACHE; also with
            `Work.overwrite`.
        OSError: CACHE cannot be written; what is finished stays.
    """
    work = work or Work()
    check_not_overwritten(folder, work)
    tiles = Tiles(source=source, input=input, mpp=mpp, unit_tiles=unit_tiles)
    summary = do_run(plan_cache(tiles, folder, generator, contents), work)
    if compact and summary.is_complete:
        LatentCache.open(folder).compact()
    return summary


def sample(
    out: Path | str,
    generator: TileGenerator,
    *,
    n: int,
    conditions: Conditions | None = None,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    format: ImageFormat = "png",
    unit_tiles: int = 256,
    work: Work | None = None,
) -> Summary:
    """Generate tiles, and write a manifest.

    Args:
        out: OUT: the folder to write, or to continue.
        generator: The model.
        n: Tiles.
        conditions: CLS vectors [N, D], or a file of them; tile k is given row k modulo N. None
            for none.
        steps: Forwards per tile; by default 4 of a student, or 16 of the transformer.
        guidance_scale: Classifier-free guidance; 1 is no guidance.
        seed: Base seed, from which each tile derives its own.
        format: "png", "webp" or "tar".
        unit_tiles: Tiles per work unit; a killed process loses at most two units.
        work: How the run is worked on: shard, threads, Ray; None for the defaults of `Work`.

    Raises:
        ValueError: What was asked for contradicts itself, the model, the input or OUT.
        OSError: OUT cannot be written; what is finished stays.
    """
    recipe = SampleRecipe(steps=steps, guidance_scale=guidance_scale, seed=seed)
    run = plan_sample(out, generator, n, conditions, recipe, format, unit_tiles)
    return do_run(run, work or Work())
