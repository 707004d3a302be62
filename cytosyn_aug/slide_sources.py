"""The stain of the slide a tile comes from, from evenly spaced tiles of it.

A slide's own statistics mix stain with composition less than a tile's, and change neighbouring
tiles alike. They depend on the input only, so every process finds the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch

from cytosyn_aug.edits import stack_tiles
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.image_files import ItemError
from cytosyn_aug.listing import Item, Listing
from cytosyn_aug.reading import Loaded
from cytosyn_aug.reference import MAX_TILES, StainReference
from cytosyn_aug.transforms import _model_tiles

_MAX_SLIDES = 256  # kept at a time; a run meets them one after the other


class SlideSources:
    """Looks up, or fits, the stain of slides of one listing.

    Args:
        generator: The model.
        listing: All tiles, with their slides.
        read: Reads one.
        mpp: Scale of the tiles in microns per pixel.
    """

    def __init__(
        self,
        generator: TileGenerator,
        listing: Listing,
        read: Callable[[Item], Loaded],
        mpp: float,
    ) -> None:
        self._generator, self._listing, self._read, self._mpp = generator, listing, read, mpp
        column = listing.table["slide"].combine_chunks()
        self._codes = column.indices.to_numpy()
        self._code = {name: code for code, name in enumerate(column.dictionary.to_pylist())}
        self._found: OrderedDict[str, StainReference | None] = OrderedDict()

    def __call__(self, slide: str) -> StainReference | None:
        """Return the stain of a slide; None if it has no name or shows no tissue."""
        if not slide:
            return None
        if slide not in self._found:
            if len(self._found) >= _MAX_SLIDES:
                self._found.popitem(last=False)
            self._found[slide] = self._fit(slide)
        return self._found[slide]

    def _fit(self, slide: str) -> StainReference | None:
        rows = np.flatnonzero(self._codes == self._code[slide])
        chosen = rows[np.linspace(0, len(rows) - 1, min(MAX_TILES, len(rows))).round().astype(int)]
        tiles = []
        for row in chosen.tolist():
            try:
                tile = self._read(self._listing.items(row, row + 1)[0])
            except ItemError:  # named where it is worked on
                continue
            if not tile.rejected:
                tiles.append(_model_tiles(stack_tiles([tile]).float(), self._mpp, self._generator))
        try:
            return StainReference.fit(self._generator, torch.cat(tiles)) if tiles else None
        except ValueError:  # no tissue in any of them
            return None
