"""Stain of the slides that tiles come from, each measured on evenly spaced tiles.

A slide's own statistics mix stain with composition less than a tile's, and change neighbouring
tiles alike. They depend on the input only, so every process measures the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import ItemError
from cytosyn_aug.io.tile_source import MAX_TILES
from cytosyn_aug.runs.edits import stack_tiles
from cytosyn_aug.runs.listing import Item, Listing
from cytosyn_aug.runs.reading import LoadedTile
from cytosyn_aug.stain.estimate import central_tiles

_MAX_SLIDES = 256  # kept at a time; a run meets them one after the other


Fitted = TypeVar("Fitted")


def note_slides(listing: Listing) -> Listing:
    """Return a listing that notes how many of its tiles do not say their slide.

    Raises:
        ValueError: None of them does.
    """
    is_usable = pc.equal(listing.table["error"].cast(pa.string()), "")
    slides = listing.table.filter(is_usable)["slide"].cast(pa.string())
    without = pc.sum(pc.equal(slides, "")).as_py() or 0
    if not without:
        return listing
    if without == len(slides):
        raise ValueError(
            "no tile says its slide, whose stain is to be changed; name tiles SLIDE/X_Y.png or "
            "SLIDE_X_Y.png, give a table with a column slide, or use stain source tile"
        )
    note = f"{without:,} of {len(slides):,} tiles do not say their slide; their own stain is used"
    return replace(listing, notes=(*listing.notes, note))


class SlideSources(Generic[Fitted]):
    """Looks up, or fits, the stain of slides of one listing.

    Args:
        fit: From tiles uint8 [N, 3, size, size] to their stain; ValueError without tissue.
        tile: Size and scale of those.
        listing: All tiles, with their slides.
        read: Reads one.
        mpp: Scale of the tiles in microns per pixel.
    """

    def __init__(
        self,
        fit: Callable[[Tensor], Fitted],
        tile: TileSpec,
        listing: Listing,
        read: Callable[[Item], LoadedTile],
        mpp: float,
    ) -> None:
        self._fit_tiles, self._tile = fit, tile
        self._listing, self._read, self._mpp = listing, read, mpp
        column = listing.table["slide"].combine_chunks()
        self._codes = column.indices.to_numpy()
        self._code = {name: code for code, name in enumerate(column.dictionary.to_pylist())}
        self._found: OrderedDict[str, Fitted | None] = OrderedDict()

    def __call__(self, slide: str) -> Fitted | None:
        """Return the stain of a slide; None if it has no name or shows no tissue."""
        if not slide:
            return None
        if slide not in self._found:
            if len(self._found) >= _MAX_SLIDES:
                self._found.popitem(last=False)
            self._found[slide] = self._fit(slide)
        return self._found[slide]

    def _fit(self, slide: str) -> Fitted | None:
        rows = np.flatnonzero(self._codes == self._code[slide])
        chosen = rows[np.linspace(0, len(rows) - 1, min(MAX_TILES, len(rows))).round().astype(int)]
        tiles = []
        for row in chosen.tolist():
            try:
                tile = self._read(self._listing.items(row, row + 1)[0])
            except ItemError:  # named where it is worked on
                continue
            if not tile.rejected:
                tiles.append(central_tiles(stack_tiles([tile]).float(), self._mpp, self._tile))
        try:
            return self._fit_tiles(torch.cat(tiles)) if tiles else None
        except ValueError:  # no tissue in any of them
            return None
