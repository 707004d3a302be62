"""Which tiles a slide could give, in what order they are asked for, and how each is read.

Slides and folders of given tiles look alike from here on: facts about each candidate, a key to
rank it by and a function that reads it. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.slide import Reading, Slide, SlideError
from cytosyn_aug.io.tissue import TissueConfig, TissueMask, candidate_positions
from training.data.sources import GivenTile


class Candidates(NamedTuple):
    """Tiles that may be taken.

    Attributes:
        facts: Columns of the table that are known before a tile is read.
        keys: What the rank of each is the hash of.
        read: Returns the RGB image of one, by its position here; raises `SlideError`.
        tissue: What a tile must show; None takes what is given.
    """

    facts: list[dict[str, Any]]
    keys: list[str]
    read: Callable[[int], Image.Image]
    tissue: TissueConfig | None


def slide_candidates(
    slide: Slide, reading: Reading, mask: TissueMask, config: TissueConfig
) -> Candidates:
    """Return the tiles of a slide with enough tissue."""
    positions, tissue = candidate_positions(slide, reading, mask, config)
    corners: list[tuple[int, int]] = [(x, y) for x, y in positions.tolist()]
    facts = [
        {
            "x_level0": x,
            "y_level0": y,
            "extent_level0": reading.extent_level0,
            "level": reading.level,
            "mpp": reading.mpp,
            "tissue": share,
            "source": "",
        }
        for (x, y), share in zip(corners, tissue.tolist(), strict=True)
    ]

    def read(index: int) -> Image.Image:
        return slide.read_tile(*corners[index], reading)

    return Candidates(facts, [f"{x}/{y}" for x, y in corners], read, config)


def given_candidates(tiles: Sequence[GivenTile], spec: TileSpec) -> Candidates:
    """Return tiles that were cut elsewhere, all of them."""
    facts = [
        {
            "x_level0": tile.x_level0,
            "y_level0": tile.y_level0,
            "extent_level0": tile.extent_level0,
            "level": 0,
            "mpp": spec.mpp,
            "tissue": tile.tissue,
            "source": tile.name,
        }
        for tile in tiles
    ]

    def read(index: int) -> Image.Image:
        return _read_given(tiles[index].file, spec.size_px)

    return Candidates(facts, [tile.file.name for tile in tiles], read, None)


def _read_given(file: Path, size_px: int) -> Image.Image:
    try:
        with Image.open(file, formats=("PNG", "WEBP", "JPEG", "TIFF")) as image:
            width, height = image.size
            if (width, height) != (size_px, size_px):
                raise SlideError(f"{file} is {width}x{height} px, expected {size_px}")
            is_opaque = image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)
            if image.mode != "RGB" and not is_opaque:
                raise SlideError(f"{file} has mode {image.mode}, expected opaque RGB")
            return image.convert("RGB")
    except SlideError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SlideError(f"{file} cannot be read: {error}") from error


def take(order: np.ndarray, quota: int, is_taken: Callable[[int], bool]) -> None:
    """Offer candidates by rank until `quota` are taken.

    They are offered in rounds, each as large as what is lacking and in ascending order, which is
    the order of rows on the slide. So as many are read as one by one, and the same are taken, but
    neighbours are read after each other, which OpenSlide's cache rewards.

    Args:
        order: int64 [N], candidates by rank.
        quota: How many to take, if there are as many.
        is_taken: Reads one candidate and says whether it used up a place.
    """
    start, num_taken = 0, 0
    while num_taken < quota and start < len(order):
        batch = np.sort(order[start : start + quota - num_taken])
        start += len(batch)
        num_taken += sum(is_taken(index) for index in batch.tolist())
