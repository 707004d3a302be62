"""Encodings of tiles in a cache: what a model's encoders see, computed once.

What is in the cache is read, what is not is computed in one batch and written. A value is the same
either way, because what was computed is rounded to the stored dtype before it is returned.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.cache.diagnosis import THUMBNAIL, thumbnails
from cytosyn_aug.cache.spec import CacheSpec, Field
from cytosyn_aug.cache.store import LatentCache, Records
from cytosyn_aug.images import tile_key
from cytosyn_aug.model.generator import Moments, TileGenerator

Contents = Literal["moments", "features"]


class Filled(NamedTuple):
    """What filling did: records put, and records not put because a network failed on the tile."""

    num_filled: int
    num_failed: int


def encodings_spec(
    generator: TileGenerator,
    contents: Sequence[Contents],
    *,
    dtype: Literal["float16", "float32"] = "float16",
) -> CacheSpec:
    """Return the specification of a cache of what a model sees in tiles.

    Args:
        generator: The model.
        contents: "features" of the encoder, which is all that transforms ask for; "moments" of the
            autoencoder's posterior, for loops of your own that begin at latents (`encode_cached`);
            or both. All of them are computed at every miss.
        dtype: How moments are stored; features are always float32, because the stain probe reads
            small differences.

    Raises:
        ValueError: Unknown contents, or features of a model without an encoder.

    Example:
        >>> spec = encodings_spec(TileGenerator.from_pretrained(), ["moments", "features"])
        >>> {field.name: (field.shape, field.dtype) for field in spec.fields[:2]}
        {'moments': ((2, 4, 28, 28), 'float16'), 'cls': ((192,), 'float32')}
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
        recipe=write_recipe(generator, {"kind": "moments"}),
    )


@isolated()
def encode_cached(
    generator: TileGenerator, images: Tensor, cache: LatentCache, *, writes: bool = True
) -> Moments:
    """Return what `generator.encode` does, encoding only tiles that are not in the cache.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        cache: Made with `encodings_spec`.
        writes: Put what was missing into the cache; False for a cache that is only read.

    Raises:
        ValueError: The cache is of another model or holds no moments.
        OSError: The disk is full or the cache cannot be written; records that wait stay in memory.

    Example:
        >>> import tempfile
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2)
        >>> cache = LatentCache.open(tempfile.mkdtemp(), encodings_spec(generator, ["moments"]))
        >>> moments = encode_cached(generator, tiles, cache)
        >>> latents = generator.whiten(moments.mean + moments.std * torch.randn_like(moments.std))
        >>> generator.decode(latents).shape
        torch.Size([2, 3, 224, 224])
    """
    moments = _complete(generator, images, cache, "moments", writes).to(generator.device)
    mean, std = moments.float().unbind(1)
    return Moments(mean, std)


@isolated()
def features_cached(
    generator: TileGenerator, images: Tensor, cache: LatentCache, *, writes: bool = True
) -> Tensor:
    """Return CLS features of tiles, float32 [B, D], encoding only those not in the cache.

    Bound to a model and a cache it is what transforms take as `features`:
    `functools.partial(features_cached, generator, cache=cache)`.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        cache: Made with `encodings_spec`.
        writes: Put what was missing into the cache; False for a cache that is only read. What is
            not finite is returned, for transforms to count, but never put.

    Raises:
        ValueError: The cache is of another model or holds no features.
        OSError: The disk is full or the cache cannot be written; records that wait stay in memory.

    Example:
        >>> import functools, tempfile
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2)
        >>> cache = LatentCache.open(tempfile.mkdtemp(), encodings_spec(generator, ["features"]))
        >>> features = functools.partial(features_cached, generator, cache=cache)
        >>> transfer = StainTransfer(
        ...     generator, [StainReference.fit(generator, tiles)], features=features
        ... )
        >>> transfer(tiles).shape
        torch.Size([2, 3, 224, 224])
    """
    return _complete(generator, images, cache, "cls", writes).to(generator.device)


@isolated()
def fill_encodings(generator: TileGenerator, images: Tensor, cache: LatentCache) -> Filled:
    """Put whatever is missing of tiles into a cache made with `encodings_spec`.

    Tiles that a network fails on are named in a warning, counted and not put.

    Args:
        generator: The model.
        images: uint8 [B, 3, size, size].
        cache: Flush or close it at the end.

    Raises:
        ValueError: The cache is of another model, or the tiles are of another size.
        OSError: The disk is full or the cache cannot be written; records that wait stay in memory.

    Example:
        >>> import tempfile
        >>> generator = TileGenerator.from_pretrained()
        >>> tiles = generator.sample(per_condition=2, steps=2)
        >>> spec = encodings_spec(generator, ["features"])
        >>> with LatentCache.open(tempfile.mkdtemp(), spec) as cache:
        ...     fill_encodings(generator, tiles, cache)
        Filled(num_filled=2, num_failed=0)
    """
    check_filler(generator, cache)
    generator.check_images(images)
    keys = [tile_key(image) for image in images]
    computed = _fill_missing(generator, images, cache, keys, cache.get(keys), writes=True)
    failed = [key for key, fields in computed.items() if not _is_finite(fields)]
    warn_of_failed(failed)
    return Filled(len(computed) - len(failed), len(failed))


def check_model(generator: TileGenerator, cache: LatentCache) -> None:
    """Raise unless a cache was filled with this very model."""
    if cache.spec.model_digest != generator.digest:
        raise ValueError(
            f"{cache.folder} was filled with model {cache.spec.model_digest}, this generator is "
            f"{generator.digest}; fill a cache in another folder with it"
        )


def check_filler(generator: TileGenerator, cache: LatentCache) -> None:
    """Raise unless records of this model, computed in its dtype, belong into a cache."""
    check_model(generator, cache)
    recipe = json.loads(cache.spec.recipe)
    dtype = recipe.get("networks") if isinstance(recipe, dict) else None
    if dtype != str(generator.dtype):
        raise ValueError(
            f"{cache.folder} is of networks in {dtype}, this generator computes in "
            f"{generator.dtype}; load it with that dtype, or fill a cache in another folder"
        )


def warn_of_failed(keys: list[str]) -> None:
    """Name tiles that a network failed on."""
    if keys:
        named = ", ".join(key[:16] for key in keys[:3]) + ", ..." * (len(keys) > 3)
        warnings.warn(
            f"the network's output for {len(keys)} tiles is not finite, so they were not cached: "
            f"{named} (the first digits of their tile_key); load the model in float32 or bfloat16, "
            "or look at the tiles",
            RuntimeWarning,
            stacklevel=3,
        )


def first_rows(keys: list[str], is_found: Tensor) -> list[int]:
    """Return the rows that were not found, of equal tiles only the first."""
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if not is_found[row]:
            first.setdefault(key, row)
    return list(first.values())


def write_recipe(generator: TileGenerator, content: dict[str, object]) -> str:
    """Return canonical JSON; the dtype of the networks is in no model's digest."""
    return json.dumps(content | {"networks": str(generator.dtype)}, sort_keys=True)


def _complete(
    generator: TileGenerator, images: Tensor, cache: LatentCache, name: str, writes: bool
) -> Tensor:
    """Return one field of tiles [B, ...] in the stored dtype, computing what is missing."""
    check_filler(generator, cache)
    generator.check_images(images)
    if name not in cache.spec.names:
        raise ValueError(
            f"{cache.folder} holds {', '.join(cache.spec.names)}, asked for is {name}; fill one "
            "made with encodings_spec"
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
    rows = first_rows(keys, records.is_found)
    if not rows:
        return {}
    missing = images[rows]
    fields = {THUMBNAIL.name: thumbnails(missing)}
    if "moments" in cache.spec.names:
        fields["moments"] = torch.stack(generator.encode(missing), 1).cpu()
    if "cls" in cache.spec.names:
        fields["cls"] = generator.cls_features(missing).cpu()
    computed = {keys[row]: {k: v[n] for k, v in fields.items()} for n, row in enumerate(rows)}
    kept = [n for n, one in enumerate(computed.values()) if _is_finite(one)]
    if writes and kept:
        cache.put([keys[rows[n]] for n in kept], {k: v[kept] for k, v in fields.items()})
    return computed


def _is_finite(fields: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in fields.values())
