"""Caches of variants: tiles edited beforehand, so that training only looks them up."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.cache.diagnosis import THUMBNAIL, thumbnails
from cytosyn_aug.cache.encodings import (
    Filled,
    check_filler,
    first_rows,
    warn_of_failed,
    write_recipe,
)
from cytosyn_aug.cache.spec import CacheSpec, Field
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.images import tile_key
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.stain.density import is_tissue
from cytosyn_aug.transforms.schedules import Ramp
from cytosyn_aug.transforms.serialization import identify_argument
from cytosyn_aug.transforms.tile_transform import TileTransform

Payload = Literal["latents", "images"]
# From uint8 images [B, 3, H, W] and one seed per tile to uint8 images of the same shape, or, for a
# store of latents, to whitened latents [B, C, h, w].
VariantFunction = Callable[[Tensor, list[int]], Tensor]
# Not the edit's: a filled variant is always edited, and drawn with a probability afterwards.
_NOT_NAMED = ("p", "training")


def variants_spec(
    generator: TileGenerator,
    payload: Payload,
    edits: Sequence[TileTransform | VariantFunction],
    *,
    seed: int = 0,
    recipe: object = None,
    keeps_structure: bool | None = None,
) -> CacheSpec:
    """Return the specification of a cache of edited variants of tiles.

    Args:
        generator: The model.
        payload: "latents" (6 KB per record for CytoSyn) are decoded after collation, "images"
            (150 KB, pixels) in no time.
        edits: What `fill_variants` will be given, one per variant. All settings of transforms are
            written down, references and models by digest; only `p` is not, see there.
        seed: Base seed; each tile and variant derives its own from it.
        recipe: What edits that are functions do and with what, as JSON can hold it: nobody else
            can tell that they changed.
        keeps_structure: Whether masks and boxes of the tile are true of its variants too; None for
            what all transforms say, and for no with functions.

    Raises:
        ValueError: Unknown payload, no edits, or one that depends on epochs or slides.
        TypeError: Functions without a recipe, or a recipe that JSON cannot hold.

    Example:
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2)
        >>> edits = [MacenkoNormalize(MacenkoReference.fit(tiles))]
        >>> variants_spec(generator, "images", edits, seed=1).names
        ('images', 'is_edited', 'thumbnail')
        >>> variants_spec(generator, "images", [lambda images, seeds: 255 - images])
        Traceback (most recent call last):
        ...
        TypeError: edit 0 is a function, whose settings nobody could compare later; ...
    """
    if keeps_structure is None:
        keeps_structure = all(isinstance(e, TileTransform) and e.keeps_structure for e in edits)
    return records_spec(
        generator,
        payload,
        num_variants=len(edits),
        content=describe_edits(edits, seed, recipe),
        keeps_structure=keeps_structure,
    )


def records_spec(
    generator: TileGenerator,
    payload: Payload,
    *,
    num_variants: int,
    content: dict[str, object],
    keeps_structure: bool,
) -> CacheSpec:
    """Return what `variants_spec` does, for those who fill the cache in ways of their own.

    Args:
        generator: The model.
        payload: "latents" or "images".
        num_variants: Variants of each tile.
        content: All that decides the variants beside the model, as JSON can hold it.
        keeps_structure: Whether masks and boxes of the tile are true of its variants too.

    Raises:
        ValueError: Unknown payload.
        TypeError: Content that JSON cannot hold.
    """
    if payload not in ("latents", "images"):
        raise ValueError(f"payload is {payload!r}, expected 'latents' or 'images'")
    size = generator.tile.size_px
    field = Field("images", (3, size, size), "uint8")
    if payload == "latents":
        field = Field("latents", generator.latent_shape, "float16")
    return CacheSpec(
        tile=generator.tile,
        fields=(field, Field("is_edited", (), "uint8"), THUMBNAIL),
        model_digest=generator.digest,
        recipe=write_recipe(generator, {"kind": "variants", **content}),
        num_variants=num_variants,
        keeps_structure=keeps_structure,
    )


@isolated()
def fill_variants(
    generator: TileGenerator,
    images: Tensor,
    cache: LatentCache,
    edits: Sequence[TileTransform | VariantFunction],
) -> Filled:
    """Put whatever is missing of tiles' variants into a cache.

    Blank tiles are not given to the edits: they are marked as left alone, as are those whose pixels
    an edit did not change, and never decoded. Tiles that a network fails on are named in a warning,
    counted, and not put, so that filling again tries them again; to train without them, look up
    with `on_miss="keep"`.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        cache: Made with `variants_spec`; flush or close it at the end.
        edits: Those of the specification. Transforms edit every tile, whatever their `p`, and draw
            from a seed of the tile and variant; functions take images and seeds, and return edited
            images, or whitened latents for a cache of latents.

    Raises:
        ValueError: Another model, other edits than the specification's (each difference named),
            or a cache of something else.
        OSError: The cache cannot be written: the disk is full, or the folder may only be read.

    Example:
        >>> import tempfile
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2)
        >>> edits = [ConditionedResample(generator, steps=2)] * 2  # two new tiles of each
        >>> spec = variants_spec(generator, "latents", edits)
        >>> with LatentCache.open(tempfile.mkdtemp(), spec) as cache:
        ...     fill_variants(generator, tiles, cache, edits)
        ...     fill_variants(generator, tiles, cache, edits)
        Filled(num_filled=4, num_failed=0)
        Filled(num_filled=0, num_failed=0)
    """
    check_filler(generator, cache)
    generator.check_images(images)
    seed = _check_edits(generator, cache, edits)
    keys = [tile_key(image) for image in images]
    num_filled, failed = 0, []
    for variant, edit in enumerate(edits):
        is_found = cache.get(keys, [variant] * len(keys)).is_found
        rows = first_rows(keys, is_found)
        if not rows:
            continue
        seeds = [derive_seed(keys[row], variant, seed) for row in rows]
        fields, is_finite = _edited_fields(generator, images[rows], edit, seeds, cache.spec)
        results = list(zip(rows, is_finite.tolist(), strict=True))
        kept = [keys[row] for row, is_kept in results if is_kept]
        cache.put(kept, {k: v[is_finite] for k, v in fields.items()}, [variant] * len(kept))
        num_filled += len(kept)
        failed += [keys[row] for row, is_kept in results if not is_kept]
    warn_of_failed(list(dict.fromkeys(failed)))
    return Filled(num_filled, len(failed))


def derive_seed(key: str, variant: int, seed: int) -> int:
    """Return a seed in [0, 2 ** 62) from a tile, the number of a variant and a base seed."""
    digest = hashlib.sha256(f"{key},{variant},{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def _check_edits(
    generator: TileGenerator, cache: LatentCache, edits: Sequence[TileTransform | VariantFunction]
) -> int:
    """Raise unless a cache was made for these edits; return its base seed."""
    if "is_edited" not in cache.spec.names:
        raise ValueError(f"{cache.folder} holds {cache.spec.names}; make it with variants_spec")
    if len(edits) != cache.spec.num_variants:
        raise ValueError(f"{len(edits)} edits for {cache.spec.num_variants} variants; give as many")
    recipe = json.loads(cache.spec.recipe)
    if "edits" not in recipe:
        raise ValueError(
            f"{cache.folder} was not made by variants_spec (but by `cytosyn-aug augment`, or an "
            "earlier release); fill a cache in another folder"
        )
    given = variants_spec(
        generator,
        "images" if "images" in cache.spec.names else "latents",
        edits,
        seed=recipe["seed"],
        recipe=recipe["recipe"],
        keeps_structure=cache.spec.keeps_structure,
    )
    if given != cache.spec:
        raise ValueError(
            f"{cache.folder} was made for other edits: {'; '.join(given.differences(cache.spec))}; "
            "give those edits, or fill a cache in another folder"
        )
    return int(recipe["seed"])


def _edited_fields(
    generator: TileGenerator,
    images: Tensor,
    edit: TileTransform | VariantFunction,
    seeds: list[int],
    spec: CacheSpec,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the fields of records, on the CPU, and which of them are to be kept, bool [n]."""
    is_latent = "latents" in spec.names
    is_edited = torch.zeros(len(images), dtype=torch.bool)
    is_finite = torch.ones(len(images), dtype=torch.bool)
    payload = images.cpu().clone()
    if is_latent:
        payload = torch.zeros(len(images), *generator.latent_shape)
    rows = is_tissue(images).nonzero()[:, 0].tolist()
    if rows:
        tissue = images[rows]
        edited, is_failed = run_edit(edit, tissue, [seeds[row] for row in rows])
        is_edited[rows] = True
        if edited.dtype == torch.uint8:
            if edited.shape != tissue.shape:
                raise ValueError(
                    f"an edit gave {list(edited.shape)} for {list(tissue.shape)}, expected the same"
                )
            is_edited[rows] = (edited.cpu() != tissue.cpu()).flatten(1).any(1)
            if is_latent:
                edited = generator.whiten(generator.encode(edited).mean)
        shape = (len(rows), *payload.shape[1:])
        if edited.shape != shape or edited.is_floating_point() != is_latent:
            raise ValueError(
                f"an edit gave {edited.dtype} {list(edited.shape)} for {len(rows)} tiles, the "
                f"cache holds {spec.names[0]} {list(payload.shape[1:])}"
            )
        payload[rows] = edited.to(payload)
        is_finite[rows] = ~is_failed
    is_finite &= payload.isfinite().flatten(1).all(1)
    fields = {"latents" if is_latent else "images": payload}
    fields |= {"is_edited": is_edited.to(torch.uint8), THUMBNAIL.name: thumbnails(images)}
    return fields, is_finite


def describe_edits(
    edits: Sequence[TileTransform | VariantFunction], seed: int, recipe: object
) -> dict[str, object]:
    """Return all that decides variants, as JSON holds it.

    Args:
        edits: One a variant.
        seed: Base seed.
        recipe: What the edits do that do not name themselves; None if all do.

    Raises:
        TypeError: An edit, or a setting of one, has no name, and there is no recipe.
        ValueError: No edits, or one that depends on epochs, slides or laboratories.
    """
    if not edits:
        raise ValueError("edits is empty, expected one per variant")
    named = [_describe(number, edit, recipe is not None) for number, edit in enumerate(edits)]
    return {"edits": named, "seed": seed, "recipe": recipe}


class EditResults(NamedTuple):
    """What an edit made of tiles: images or latents, and bool [B], which its networks failed on."""

    results: Tensor
    is_failed: Tensor


def run_edit(
    edit: TileTransform | VariantFunction, images: Tensor, seeds: list[int]
) -> EditResults:
    """Edit all of some images uint8 [B, 3, H, W], with one seed per tile."""
    if not isinstance(edit, TileTransform):
        results = _checked(edit(images, seeds), "the edit")
        if results.dtype == torch.uint8 or len(results) != len(images):
            return EditResults(results, torch.zeros(len(images), dtype=torch.bool))
        return EditResults(results, ~results.isfinite().flatten(1).all(1).cpu())
    params = _draw(edit, images, seeds)
    num_failed = edit.num_failed
    results = _checked(edit.transform(images, params), type(edit).__name__)
    is_failed = torch.zeros(len(images), dtype=torch.bool)
    if edit.num_failed > num_failed:
        # It says how many. They came back unchanged, and so did tiles that it refused.
        for row in (results == images).flatten(1).all(1).nonzero()[:, 0].tolist():
            num_failed = edit.num_failed
            edit.transform(images[row : row + 1], {k: v[row : row + 1] for k, v in params.items()})
            is_failed[row] = edit.num_failed > num_failed
    return EditResults(results, is_failed)


def check_draws(edit: TileTransform, name: str) -> None:
    """Raise ValueError for a transform that draws by what an edit is not told."""
    if getattr(edit, "mode", "tile") != "tile" or getattr(edit, "sampling", "") == "own_excluded":
        raise ValueError(
            f"{name}, a {type(edit).__name__}, draws by slide or laboratory, and an edit is told "
            "neither; use mode='tile' and another sampling"
        )


def _checked(results: object, name: str) -> Tensor:
    if not isinstance(results, Tensor):
        raise TypeError(
            f"{name} gives {type(results).__name__} for a batch, expected a tensor; give what "
            "edits one image to one"
        )
    return results


def _draw(edit: TileTransform, images: Tensor, seeds: list[int]) -> dict[str, list[object]]:
    """Draw for every tile from its own seed, and let torch's generator be as it was."""
    drawing = copy.copy(edit)
    drawing.p = 1.0
    params: dict[str, list[object]] = {}
    state = torch.get_rng_state()
    try:
        for image, seed in zip(images, seeds, strict=True):
            # That of the CPU alone: draws of transforms come from nowhere else.
            torch.default_generator.manual_seed(seed)
            for name, values in drawing.make_params([image[None]]).items():
                params.setdefault(name, []).extend(values)
    finally:
        torch.set_rng_state(state)
    return params


def _describe(
    number: int, edit: TileTransform | VariantFunction, has_recipe: bool
) -> dict[str, object]:
    if not isinstance(edit, TileTransform):
        if not has_recipe:
            raise TypeError(
                f"edit {number} is a function, whose settings nobody could compare later; give a "
                "transform of cytosyn_aug, or say with recipe= what it does and with what"
            )
        return {"kind": "function"}
    kind = type(edit)
    check_draws(edit, f"edit {number}")
    named: dict[str, object] = {"kind": f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"}
    for name, value in vars(edit).items():
        if name.startswith("_") or name in _NOT_NAMED:
            continue
        if isinstance(value, Ramp):
            raise ValueError(
                f"{name} of edit {number}, a {kind.__name__}, is a Ramp over epochs; variants are "
                "made once, so give a number"
            )
        try:
            named[name] = identify_argument(value)
        except TypeError as error:
            if not has_recipe:
                raise TypeError(
                    f"{name} of edit {number}, a {kind.__name__}, has no name to compare later "
                    f"({type(value).__name__}); say with recipe= what it is"
                ) from error
            named[name] = {"kind": "unnamed", "type": type(value).__name__}
    return named
