"""Filling caches: moments and features of tiles, or edited variants of them.

What is in the cache is read, what is not is computed in one batch and written. A value is the same
either way, because what was computed is rounded to the stored dtype before it is returned.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cytosyn_aug.cache import LatentCache, Records
from cytosyn_aug.cache_spec import CacheSpec, Field
from cytosyn_aug.edits import Edit, describe_edits, run_edit
from cytosyn_aug.generator import Moments, TileGenerator
from cytosyn_aug.images import tile_key
from cytosyn_aug.misses import THUMBNAIL, thumbnails
from cytosyn_aug.tile_transform import TileTransform

Contents = Literal["moments", "features"]
Payload = Literal["latents", "images"]


def moments_spec(
    generator: TileGenerator,
    contents: Sequence[Contents] = ("moments", "features"),
    *,
    dtype: Literal["float16", "float32"] = "float16",
) -> CacheSpec:
    """Return the specification of a cache of what a model sees in tiles.

    Args:
        generator: The model.
        contents: "moments" of the autoencoder's posterior, "features" of the encoder, or both.
        dtype: How moments are stored; features are always float32, because the stain probe reads
            small differences.

    Raises:
        ValueError: Unknown contents, or features of a model without an encoder.
    """
    unknown = set(contents) - {"moments", "features"}
    if unknown or not contents:
        raise ValueError(f"contents are {list(contents)}, expected 'moments', 'features' or both")
    fields = []
    if "moments" in contents:
        fields.append(Field("moments", (2, *generator.latent_shape), dtype))
    if "features" in contents:
        if generator.encoder is None:
            raise ValueError("this model has no encoder to take features from; cache its moments")
        fields.append(Field("cls", (len(generator.null_condition),), "float32"))
    return CacheSpec(
        tile=generator.tile,
        fields=(*fields, THUMBNAIL),
        model_digest=generator.digest,
        recipe=_recipe(generator, {"kind": "moments"}),
    )


def variants_spec(
    generator: TileGenerator,
    payload: Payload,
    edits: Sequence[TileTransform | Edit],
    *,
    seed: int = 0,
    recipe: object = None,
    keeps_structure: bool | None = None,
) -> CacheSpec:
    """Return the specification of a cache of edited variants of tiles.

    Args:
        generator: The model.
        payload: "latents" (6 KB a record for CytoSyn) are decoded after collation, "images"
            (150 KB, pixels) in no time.
        edits: What `fill_variants` will be given, one a variant. All settings of transforms are
            written down, references and models by digest; only `p` is not, see there.
        seed: Base seed; each tile and variant derives its own from it.
        recipe: What edits that are functions do and with what, as JSON can hold it: nobody else
            can tell that they changed.
        keeps_structure: Whether masks and boxes of the tile are true of its variants too; None for
            what all transforms say, and for no with functions.

    Raises:
        ValueError: Unknown payload, no edits, or one that depends on epochs or slides.
        TypeError: Functions without a recipe, or a recipe that JSON cannot hold.
    """
    if payload not in ("latents", "images"):
        raise ValueError(f"payload is {payload!r}, expected 'latents' or 'images'")
    size = generator.tile.size_px
    field = Field("images", (3, size, size), "uint8")
    if payload == "latents":
        field = Field("latents", generator.latent_shape, "float16")
    if keeps_structure is None:
        keeps_structure = all(isinstance(e, TileTransform) and e.keeps_structure for e in edits)
    content = {"kind": "variants", **describe_edits(edits, seed, recipe)}
    return CacheSpec(
        tile=generator.tile,
        fields=(field, Field("is_edited", (), "uint8"), THUMBNAIL),
        model_digest=generator.digest,
        recipe=_recipe(generator, content),
        num_variants=len(edits),
        keeps_structure=keeps_structure,
    )


def check_model(generator: TileGenerator, cache: LatentCache) -> None:
    """Raise unless a cache was filled with this very model."""
    if cache.spec.model_digest != generator.digest:
        raise ValueError(
            f"{cache.folder} was filled with model {cache.spec.model_digest}, this generator is "
            f"{generator.digest}; fill a cache in another folder with it"
        )


def encode_cached(
    generator: TileGenerator, images: Tensor, cache: LatentCache, *, writes: bool = True
) -> Moments:
    """Return what `generator.encode` does, encoding only tiles that are not in the cache.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        cache: Made with `moments_spec`.
        writes: Put what was missing into the cache; False for a cache that is only read.

    Raises:
        ValueError: The cache is of another model or holds no moments.
        OSError: The cache cannot be written; see `LatentCache.flush`.
    """
    moments = _complete(generator, images, cache, "moments", writes).to(generator.device)
    mean, std = moments.float().unbind(1)
    return Moments(mean, std)


def features_cached(
    generator: TileGenerator, images: Tensor, cache: LatentCache, *, writes: bool = True
) -> Tensor:
    """Return CLS features of tiles, float32 [B, D], encoding only those not in the cache.

    Bound to a model and a cache it is what transforms take as `features`:
    `functools.partial(features_cached, generator, cache=cache)`.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        cache: Made with `moments_spec`.
        writes: Put what was missing into the cache; False for a cache that is only read.

    Raises:
        ValueError: The cache is of another model or holds no features.
        OSError: The cache cannot be written; see `LatentCache.flush`.
    """
    return _complete(generator, images, cache, "cls", writes).to(generator.device)


def fill_moments(generator: TileGenerator, images: Tensor, cache: LatentCache) -> int:
    """Put whatever is missing of tiles into a cache made with `moments_spec`; return how many.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        cache: Flush or close it at the end.

    Raises:
        ValueError, OSError: See `encode_cached`.
    """
    _check_filler(generator, cache)
    generator.check_images(images)
    keys = [tile_key(image) for image in images]
    return len(_fill_missing(generator, images, cache, keys, cache.get(keys), writes=True))


def fill_variants(
    generator: TileGenerator,
    images: Tensor,
    cache: LatentCache,
    edits: Sequence[TileTransform | Edit],
) -> int:
    """Put whatever is missing of tiles' variants into a cache; return how many records.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        cache: Made with `variants_spec`; flush or close it at the end.
        edits: Those of the specification. Transforms edit every tile, whatever their `p`, and draw
            from a seed of the tile and variant; functions take images and seeds, and return edited
            images, or whitened latents for a cache of latents. Tiles whose pixels an edit left
            alone, such as blank ones, are marked, and are never decoded.

    Raises:
        ValueError: Another model, other edits than the specification's (each difference named),
            or a cache of something else.
        OSError: The cache cannot be written; see `LatentCache.flush`.
    """
    _check_filler(generator, cache)
    generator.check_images(images)
    seed = _check_edits(generator, cache, edits)
    keys = [tile_key(image) for image in images]
    num_filled = 0
    for variant, edit in enumerate(edits):
        is_found = cache.get(keys, [variant] * len(keys)).is_found
        rows = _first_rows(keys, is_found)
        if not rows:
            continue
        seeds = [derive_seed(keys[row], variant, seed) for row in rows]
        fields = _edited_fields(generator, images[rows], edit, seeds, cache.spec)
        cache.put([keys[row] for row in rows], fields, [variant] * len(rows))
        num_filled += len(rows)
    return num_filled


def derive_seed(key: str, variant: int, seed: int) -> int:
    """Return a seed in [0, 2 ** 62) from a tile, the number of a variant and a base seed."""
    digest = hashlib.sha256(f"{key},{variant},{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def _complete(
    generator: TileGenerator, images: Tensor, cache: LatentCache, name: str, writes: bool
) -> Tensor:
    """Return one field of tiles [B, ...] in the stored dtype, computing what is missing."""
    _check_filler(generator, cache)
    generator.check_images(images)
    if name not in cache.spec.names:
        raise ValueError(
            f"{cache.folder} holds {', '.join(cache.spec.names)}, asked for is {name}; fill one "
            "made with moments_spec"
        )
    keys = [tile_key(image) for image in images]
    records = cache.get(keys)
    computed = _fill_missing(generator, images, cache, keys, records, writes)
    values = records.fields[name]
    for row in (~records.is_found).nonzero()[:, 0].tolist():
        values[row] = computed[keys[row]][name].to(values)
    return values


def _fill_missing(
    generator: TileGenerator,
    images: Tensor,
    cache: LatentCache,
    keys: list[str],
    records: Records,
    writes: bool,
) -> dict[str, dict[str, Tensor]]:
    """Compute, and if asked put, the records not found; return them by key."""
    rows = _first_rows(keys, records.is_found)
    if not rows:
        return {}
    missing = images[rows]
    fields = {THUMBNAIL.name: thumbnails(missing)}
    if "moments" in cache.spec.names:
        fields["moments"] = torch.stack(generator.encode(missing), 1).cpu()
    if "cls" in cache.spec.names:
        fields["cls"] = generator.features(missing).cls.cpu()
    if writes:
        cache.put([keys[row] for row in rows], fields)
    return {keys[row]: {k: v[n] for k, v in fields.items()} for n, row in enumerate(rows)}


def _check_filler(generator: TileGenerator, cache: LatentCache) -> None:
    """Raise unless records of this model, computed in its dtype, belong into a cache."""
    check_model(generator, cache)
    recipe = json.loads(cache.spec.recipe)
    found = recipe.get("networks") if isinstance(recipe, dict) else None
    if found != str(generator.dtype):
        raise ValueError(
            f"{cache.folder} is of networks in {found}, this generator computes in "
            f"{generator.dtype}; load it with that dtype, or fill a cache in another folder"
        )


def _check_edits(
    generator: TileGenerator, cache: LatentCache, edits: Sequence[TileTransform | Edit]
) -> int:
    """Raise unless a cache was made for these edits; return its base seed."""
    if "is_edited" not in cache.spec.names:
        raise ValueError(f"{cache.folder} holds {cache.spec.names}; make it with variants_spec")
    if len(edits) != cache.spec.num_variants:
        raise ValueError(f"{len(edits)} edits for {cache.spec.num_variants} variants; give as many")
    recipe = json.loads(cache.spec.recipe)
    if "edits" not in recipe:
        raise ValueError(
            f"{cache.folder} was made by an earlier release, which did not write down its edits; "
            "fill a cache in another folder"
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


def _first_rows(keys: list[str], is_found: Tensor) -> list[int]:
    """Return the rows that were not found, of equal tiles only the first."""
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if not is_found[row]:
            first.setdefault(key, row)
    return list(first.values())


def _edited_fields(
    generator: TileGenerator,
    images: Tensor,
    edit: TileTransform | Edit,
    seeds: list[int],
    spec: CacheSpec,
) -> dict[str, Tensor]:
    made = run_edit(edit, images, seeds)
    is_edited = torch.ones(len(images), dtype=torch.uint8)
    if made.dtype == torch.uint8:
        if made.shape != images.shape:
            raise ValueError(
                f"an edit gave {list(made.shape)} for {list(images.shape)}, expected the same"
            )
        is_edited = (made.cpu() != images.cpu()).flatten(1).any(1).to(torch.uint8)
    fields = {"is_edited": is_edited, THUMBNAIL.name: thumbnails(images)}
    if "images" in spec.names:
        return fields | {"images": made}
    if made.dtype == torch.uint8:
        made = generator.whiten(generator.encode(made).mean)
    return fields | {"latents": made}


def _recipe(generator: TileGenerator, content: dict[str, object]) -> str:
    """Return canonical JSON; the dtype of the networks is in no model's digest."""
    return json.dumps(content | {"networks": str(generator.dtype)}, sort_keys=True)
