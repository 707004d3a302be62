"""Diagnosis of a look-up that failed, by the size, the variants and a thumbnail of the tile.

A cache is addressed by exact pixels, so a crop, a flip or another JPEG decoder before the look-up
makes every tile a miss. Records made by `cytosyn_aug.transforms.variants` carry a thumbnail of
their tile, which such changes leave recognisable.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cytosyn_aug.cache.index import list_shards
from cytosyn_aug.cache.records import Shard
from cytosyn_aug.cache.spec import SHARD_FOLDER, Field
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.images import tile_key

THUMBNAIL = Field("thumbnail", (3, 4, 4), "uint8")
# Mean difference of thumbnails in grey levels. Decoders differ by a few levels in single pixels,
# JPEG at quality 80 moves a block's mean by less than one; tiles of one slide differ by tens.
_SAME = 1.5
_MAX_COMPARED = 1_000_000
_MAX_VARIANTS = 64


def thumbnails(images: Tensor) -> Tensor:
    """Return block means of uint8 images [B, 3, H, W] as uint8 [B, 3, 4, 4] on the CPU."""
    means = F.adaptive_avg_pool2d(images.cpu().float(), THUMBNAIL.shape[1])
    return means.round().to(torch.uint8)


def explain_miss(cache: LatentCache, image: Tensor, variant: int = 0) -> str:
    """Return a sentence on why a tile is not in a cache and what to do about it.

    Slow: opens the cache anew and compares thumbnails with up to a million records.

    Args:
        cache: Where the tile was looked for.
        image: uint8 [3, H, W], as it was looked up.
        variant: Which of its variants.
    """
    size = cache.spec.tile.size_px
    if image.shape[1:] != (size, size):
        return (
            f"the tile is {image.shape[2]}x{image.shape[1]} px and the cache is of "
            f"{cache.spec.tile.describe()}: it was cropped or resized before; look it up first"
        )
    key = tile_key(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong is said below
        newest = LatentCache.open(cache.folder)
        numbers = range(min(cache.spec.num_variants, _MAX_VARIANTS))
        is_present = newest.get([key] * len(numbers), numbers).is_found.tolist()
        is_there = bool(newest.get([key], [variant]).is_found)
    if is_there:
        return "it was written after this handle was opened; call cache.refresh() before"
    if newest.num_damaged:
        return f"{newest.faults[-1]}; fill the cache again"
    if any(is_present):
        there = [n for n, is_there in zip(numbers, is_present, strict=True) if is_there]
        return f"of this tile variants {there} are there; filling was interrupted, run it again"
    faults = "".join(f"; besides, {fault}" for fault in newest.faults[:1])
    return _compare_thumbnails(cache, image) + faults


def _compare_thumbnails(cache: LatentCache, image: Tensor) -> str:
    unknown = (
        f"it is none of the tiles of {cache.folder}: never filled in, or cropped and resized or "
        "recoloured before; fill it in, or look it up before any other transform"
    )
    if THUMBNAIL.name not in cache.spec.names:
        return unknown
    views = [torch.rot90(image, k, (1, 2)) for k in range(4)]
    views += [view.flip(2) for view in views]
    wanted = thumbnails(torch.stack(views)).numpy().reshape(len(views), -1).astype(np.int16)
    smallest = np.full(len(views), np.inf)
    num_compared = 0
    for name in list_shards(cache.folder):
        try:
            rows = Shard(cache.folder / SHARD_FOLDER / name, cache.spec).matrix(THUMBNAIL.name)
        except (FileNotFoundError, ValueError):  # compacted away, or a fault that `verify` names
            continue
        for n, view in enumerate(wanted):
            distances = np.abs(rows.astype(np.int16) - view).mean(1)
            smallest[n] = min(smallest[n], distances.min())
        num_compared += len(rows)
        if num_compared >= _MAX_COMPARED:
            break
    if smallest[0] <= _SAME:
        return (
            "a tile that looks the same is there, so this one was decoded by another library or "
            "compressed again; read tiles with what the cache was filled with, or fill it anew"
        )
    if smallest.min() <= _SAME:
        return (
            "a tile that looks the same is there, turned or mirrored; look it up before flips and "
            "rotations"
        )
    return unknown
