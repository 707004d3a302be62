"""Edits of batches of tiles, as functions that are built from recipes.

Each takes tiles of one size and yields one `EditedBatch` per variant. Every draw comes from SHA-256
of the tile's pixels, the variant and the recipe's seed, so that it does not matter which process
works on a tile, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cytosyn_aug.config import Method
from cytosyn_aug.images import pixels_to_images
from cytosyn_aug.io.image_files import ItemError
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.solvers import sample_noise
from cytosyn_aug.runs.reading import LoadedTile
from cytosyn_aug.runs.recipes import AugmentRecipe, NormalizeRecipe, SampleRecipe
from cytosyn_aug.stain.density import is_tissue
from cytosyn_aug.stain.estimate import (
    central_tiles,
    check_scale,
    covers_tile,
    estimate_stain,
    reference_statistics,
)
from cytosyn_aug.stain.lab import colour_distance
from cytosyn_aug.stain.reference import StainReference
from cytosyn_aug.stain.restain import recolour
from cytosyn_aug.transforms.classical import (
    DensityTransport,
    MacenkoNormalize,
    ReinhardNormalize,
)
from cytosyn_aug.transforms.redraw import redraw_restained, resample
from cytosyn_aug.transforms.tile_transform import TileTransform
from cytosyn_aug.transforms.variants import derive_seed

Sources = Callable[[str], Any]  # from a slide's name to its Reference, or None; Any: of one kind
_SEED_RANGE = float(1 << 62)


@dataclass(frozen=True, kw_only=True, slots=True)
class EditedBatch:
    """One variant of a batch of tiles.

    Attributes:
        images: uint8 [B, 3, H, W], on any device.
        is_tissue: bool [B]; False where a blank tile was left as it is.
        is_finite: bool [B]; False where the networks failed, and the image is not to be used.
        seeds: Seed of each tile; empty if nothing was drawn.
        references: Name of the reference of each tile; empty if there is none.
        strengths: Strength of restaining of each tile; empty if there is none.
        similarity: float [B], cosine of CLS features to the source; None without an encoder.
        distance: float [B], mean distance in CIE Lab over tissue; None if there is no source.
        fields: Further fields of a cache's records, [B, ...] each.
        refusals: Why a rule leaves a result out, "" where none does; empty if there are no rules.
    """

    images: Tensor
    is_tissue: Tensor
    is_finite: Tensor
    seeds: Sequence[int] = ()
    references: Sequence[str] = ()
    strengths: Sequence[float] = ()
    similarity: Tensor | None = None
    distance: Tensor | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    refusals: Sequence[str] = ()


BatchEdit = Callable[[Sequence[LoadedTile]], Iterator[EditedBatch]]


def augment_edit(
    generator: TileGenerator, references: Mapping[str, StainReference], recipe: AugmentRecipe
) -> BatchEdit:
    """Return the function that augments a batch.

    Raises:
        ValueError: The recipe asks for what the model or the references cannot give.
    """
    edit = _augment_edit(generator, references, recipe)
    if not recipe.is_bounded:
        return edit
    if generator.encoder is None:
        raise ValueError(
            "min_similarity and max_similarity need an encoder, and this model was loaded without; "
            "load it with --encoder bioptimus/H0-mini, or leave them out"
        )

    def bounded(batch: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        for edited in edit(batch):
            yield replace(edited, refusals=_refusals(edited, recipe))

    return bounded


def _refusals(edited: EditedBatch, recipe: AugmentRecipe) -> list[str]:
    """Return why each result is left out for its similarity, "" where it is not."""
    low, high = recipe.min_similarity, recipe.max_similarity
    assert edited.similarity is not None  # bounds need an encoder
    reasons = []
    for value, has_tissue in zip(
        edited.similarity.tolist(), edited.is_tissue.tolist(), strict=True
    ):
        reason = ""
        if has_tissue and value < low:
            reason = f"similarity {value:.4f} is below min_similarity {low:g}"
        elif has_tissue and value > high:
            reason = f"similarity {value:.4f} is above max_similarity {high:g}"
        reasons.append(reason)
    return reasons


def _augment_edit(
    generator: TileGenerator, references: Mapping[str, StainReference], recipe: AugmentRecipe
) -> BatchEdit:
    if recipe.mode == "resample":
        return _resample_edit(generator, recipe)
    check_scale(recipe.mpp, generator.tile)
    if recipe.preserve == "none" and generator.encoder is None:
        raise ValueError(
            "preserve 'none' needs an encoder, and this model was loaded without; load it with "
            "--encoder bioptimus/H0-mini, or use preserve 'color'"
        )
    return _stain_edit(generator, references, recipe)


def normalize_edit(
    generator: TileGenerator,
    references: Mapping[str, Any],
    recipe: NormalizeRecipe,
    sources: Sources,
) -> BatchEdit:
    """Return the function that normalises a batch to one reference, by `recipe.method`.

    Args:
        generator: The model.
        references: The one reference, by name, of the kind of the method.
        recipe: How.
        sources: Stain of slides; asked if `recipe.source` is "slide".

    Raises:
        ValueError: Not one reference, or no such method.
    """
    if len(references) != 1:
        raise ValueError(f"got {len(references)} references; normalisation needs exactly one")
    if recipe.method not in _METHODS:
        raise ValueError(f"method is {recipe.method!r}, expected one of {sorted(_METHODS)}")
    check_scale(recipe.mpp, generator.tile)
    return _METHODS[recipe.method](generator, references, recipe, sources)


def sample_edit(
    generator: TileGenerator, conditions: Tensor | None, recipe: SampleRecipe
) -> BatchEdit:
    """Return the function that generates tiles by number, each with the next condition in turn."""
    rows = generator.null_condition[None] if conditions is None else conditions

    def edit(batch: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        numbers = [int(tile.key) for tile in batch]
        seeds = [derive_seed(tile.key, 0, recipe.seed) for tile in batch]
        cls = rows[[number % len(rows) for number in numbers]].to(generator.device)
        noise = sample_noise(seeds, generator.latent_shape)
        latents = generator.draw(
            noise, cls, steps=recipe.steps, guidance_scale=recipe.guidance_scale, seeds=seeds
        )
        pixels = generator.decode_pixels(latents, is_few_step=generator.student is not None)
        is_finite = pixels.isfinite().flatten(1).all(1)
        images = pixels_to_images(pixels.nan_to_num())
        similarity = None
        if generator.encoder is not None and conditions is not None:
            similarity = torch.cosine_similarity(cls, generator.features(images).cls)
        yield EditedBatch(
            images=images,
            is_tissue=torch.ones(len(images), dtype=torch.bool),
            is_finite=is_finite,
            seeds=seeds,
            similarity=similarity,
        )

    return edit


def size_check(
    generator: TileGenerator, mpp: float, *, is_exact: bool
) -> Callable[[int, int], None]:
    """Return a function of height and width that raises `ItemError` for tiles of a wrong size.

    Args:
        generator: The model.
        mpp: Scale of the tiles in microns per pixel.
        is_exact: Whether tiles must have the model's size, or may be larger.
    """
    size = generator.tile.size_px

    def check(height: int, width: int) -> None:
        if is_exact and (height, width) != (size, size):
            raise ItemError(
                f"is {width}x{height} px, expected {generator.tile.describe()}; re-tile it"
            )
        if not covers_tile(height, width, mpp, generator.tile):
            raise ItemError(
                f"is {width}x{height} px at {mpp:g} microns/pixel, expected at least "
                f"{generator.tile.describe()}; re-tile it larger or correct --mpp"
            )

    return check


def _stain_edit(
    generator: TileGenerator,
    references: Mapping[str, StainReference],
    recipe: AugmentRecipe,
    sources: Sources = lambda slide: None,
) -> BatchEdit:
    names = list(references)
    low, high = recipe.strength

    def edit(batch: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        images = stack_tiles(batch).to(generator.device)
        tiles = central_tiles(images.float(), recipe.mpp, generator.tile)
        cls = None if generator.encoder is None else generator.features(tiles).cls
        of_slides = [sources(tile.item.slide) for tile in batch]
        estimate = estimate_stain(generator, tiles, of_slides, recipe.edit, cls)
        targets = {
            name: reference_statistics(generator, reference, recipe.edit)
            for name, reference in references.items()
        }
        for variant in range(recipe.variants):
            seeds = [derive_seed(tile.key, variant, recipe.seed) for tile in batch]
            # Each tile begins at a reference of its own and takes them in turn.
            first = [derive_seed(tile.key, -1, recipe.seed) for tile in batch]
            drawn = [names[(number + variant) % len(names)] for number in first]
            strengths = [low + (high - low) * (seed / _SEED_RANGE) for seed in seeds]
            restained = recolour(
                images,
                estimate,
                torch.cat([targets[name] for name in drawn]).to(images.device),
                torch.tensor(strengths, device=images.device),
            )
            if recipe.preserve == "none":
                restained = redraw_restained(generator, restained, recipe.edit, seeds)
            edited = restained.images.round().to(torch.uint8)
            yield EditedBatch(
                images=edited,
                is_tissue=restained.is_tissue,
                is_finite=restained.is_finite,
                seeds=seeds,
                references=drawn,
                strengths=strengths,
                similarity=_similarity(generator, cls, edited, recipe.mpp),
                distance=colour_distance(images, edited),
            )

    return edit


def _resample_edit(generator: TileGenerator, recipe: AugmentRecipe) -> BatchEdit:
    if generator.encoder is None:
        raise ValueError(
            "mode resample needs an encoder, and this model was loaded without; load it with "
            "--encoder bioptimus/H0-mini"
        )

    def edit(batch: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        images = stack_tiles(batch).to(generator.device)
        cls = generator.cls_features(images)
        for variant in range(recipe.variants):
            seeds = [derive_seed(tile.key, variant, recipe.seed) for tile in batch]
            resampled = resample(
                generator,
                images,
                seeds,
                steps=recipe.steps,
                guidance_scale=recipe.guidance_scale,
                features=cls,
            )
            is_tissue = resampled.is_tissue
            edited = torch.where(is_tissue[:, None, None, None], resampled.images, images)
            yield EditedBatch(
                images=edited,
                is_tissue=is_tissue,
                is_finite=resampled.is_finite | ~is_tissue,
                seeds=seeds,
                similarity=torch.where(is_tissue, resampled.similarity, 1.0),
                distance=colour_distance(images, edited),
            )

    return edit


def _cytosyn_edit(
    generator: TileGenerator,
    references: Mapping[str, Any],
    recipe: NormalizeRecipe,
    sources: Sources,
) -> BatchEdit:
    strength = (recipe.strength, recipe.strength)
    same = AugmentRecipe(strength=strength, mpp=recipe.mpp, edit=recipe.edit)
    if recipe.source == "tile":
        return _stain_edit(generator, references, same)
    return _stain_edit(generator, references, same, sources)


def _classical_edit(
    kind: Callable[..., TileTransform],
    generator: TileGenerator,
    references: Mapping[str, Any],
    recipe: NormalizeRecipe,
    sources: Sources,
) -> BatchEdit:
    ((name, reference),) = references.items()

    def edit(batch: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        images = stack_tiles(batch).to(generator.device)
        normalised = images.clone()
        rows_of: dict[str, list[int]] = {}
        for row, tile in enumerate(batch):
            rows_of.setdefault(tile.item.slide if recipe.source == "slide" else "", []).append(row)
        for slide, rows in rows_of.items():
            transform = kind(reference, source=sources(slide) if slide else None)
            count = len(rows)
            params = {"chosen": [True] * count, "seeds": [0] * count}
            params["strengths"] = [recipe.strength] * count
            normalised[rows] = transform.transform(images[rows], params)
        # Tiles without stain are unchanged; at strength 0 all are, so tissue is looked for.
        is_edited = (normalised != images).flatten(1).any(1)
        if recipe.strength == 0:
            is_edited = is_tissue(images)
        yield EditedBatch(
            images=normalised,
            is_tissue=is_edited,
            is_finite=torch.ones_like(is_edited),
            references=[name] * len(batch),
            strengths=[recipe.strength] * len(batch),
            distance=colour_distance(images, normalised),
        )

    return edit


MakeEdit = Callable[[TileGenerator, Mapping[str, Any], NormalizeRecipe, Sources], BatchEdit]
_METHODS: dict[Method, MakeEdit] = {
    "cytosyn": _cytosyn_edit,
    "macenko": partial(_classical_edit, MacenkoNormalize),
    "reinhard": partial(_classical_edit, ReinhardNormalize),
    "transport": partial(_classical_edit, DensityTransport),
}


def _similarity(
    generator: TileGenerator, cls: Tensor | None, images: Tensor, mpp: float
) -> Tensor | None:
    if cls is None:
        return None
    tiles = central_tiles(images.float(), mpp, generator.tile)
    return torch.cosine_similarity(cls, generator.features(tiles).cls)


def stack_tiles(batch: Sequence[LoadedTile]) -> Tensor:
    """Return tiles of one size as uint8 [B, 3, H, W] on the CPU."""
    pixels = [torch.from_numpy(tile.pixels) for tile in batch]
    return torch.stack(pixels).permute(0, 3, 1, 2).contiguous()
