"""Edits whose results are records of a cache: variants to look up, or what a model sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from cytosyn_aug.cache.diagnosis import THUMBNAIL, thumbnails
from cytosyn_aug.cache.encodings import Contents
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.runs.edits import BatchEdit, EditedBatch, stack_tiles
from cytosyn_aug.runs.reading import LoadedTile


def variants_to_records(generator: TileGenerator, edit: BatchEdit, *, is_latent: bool) -> BatchEdit:
    """Return an edit that adds the fields of a cache of variants, but for images.

    Args:
        generator: The model.
        edit: What to add to.
        is_latent: Whether the cache holds latents.
    """

    def edit_with_fields(batch: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        images = stack_tiles(batch)
        small = thumbnails(images)
        for edited in edit(batch):
            is_edited = (edited.images.cpu() != images).flatten(1).any(1).to(torch.uint8)
            fields = {"is_edited": is_edited, THUMBNAIL.name: small}
            if is_latent:
                fields["latents"] = generator.whiten(generator.encode(edited.images).mean)
            yield replace(edited, fields=fields)

    return edit_with_fields


def moments_edit(generator: TileGenerator, contents: Sequence[Contents]) -> BatchEdit:
    """Return the edit that leaves tiles alone and computes their moments or features.

    Args:
        generator: The model.
        contents: "moments", "features" or both.
    """

    def edit(batch: Sequence[LoadedTile]) -> Iterator[EditedBatch]:
        images = stack_tiles(batch)
        fields = {THUMBNAIL.name: thumbnails(images)}
        if "moments" in contents:
            fields["moments"] = torch.stack(generator.encode(images), 1)
        if "features" in contents:
            fields["cls"] = generator.features(images).cls
        is_kept = torch.ones(len(images), dtype=torch.bool)
        yield EditedBatch(images=images, is_tissue=is_kept, is_finite=is_kept, fields=fields)

    return edit
