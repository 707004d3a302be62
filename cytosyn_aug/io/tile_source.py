"""Sources of tiles to fit statistics to: a tensor, a folder of images, a slide, or several.

Folders and slides are sampled evenly, so that a fit costs the same for any of them. What is read
decides every tile that is normalised to it later, so files are read as strictly as tiles are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import TILE_SUFFIXES, ItemError, masked_stem, read_image
from cytosyn_aug.io.slide import Slide, SlideError, grid_positions
from cytosyn_aug.io.tissue import (
    TissueConfig,
    TissueMask,
    reason_to_reject,
    tile_quality,
    tissue_pixels,
)

MAX_TILES = 64
# Half of a tile: what is at the rim of tissue says as much of the stain as what is inside.
_MIN_TISSUE_OF_SLIDE_TILES = 0.5
TileSource = Tensor | Path | str | Sequence[Path | str]


def read_tiles(tiles: TileSource, tile: TileSpec, max_tiles: int = MAX_TILES) -> Tensor:
    """Return tiles as one tensor.

    Args:
        tiles: uint8 [N, 3, H, W], which comes back itself; a folder of images of one size,
            searched recursively, without hidden files and masks (`tile_mask.png`); a slide that
            OpenSlide reads; or several folders and slides, which have equal parts in `max_tiles`.
        tile: Size and scale of the tiles read from a slide.
        max_tiles: Of a larger folder or slide, so many evenly spaced tiles are read.

    Returns:
        uint8 [N, 3, H, W].

    Raises:
        FileNotFoundError: The folder or slide does not exist.
        TypeError: A tensor that is not uint8.
        ValueError: A tensor of another shape, or empty; a folder without images, with images of
            different sizes or one that cannot be read, or not without guessing its colours (see
            `cytosyn_aug.io.image_files`); a slide that cannot be read, has no scale or no tissue.
    """
    if isinstance(tiles, Tensor):
        return _checked(tiles)
    if not isinstance(tiles, str | Path):
        return _read_several([Path(x) for x in tiles], tile, max_tiles)
    path = Path(tiles)
    if path.is_dir():
        return _read_folder(path, max_tiles)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a folder and not a file; give a folder of tiles, a slide or a tensor"
        )
    return _read_slide(path, tile, max_tiles)


def _checked(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        raise TypeError(f"got tiles of {images.dtype}, expected uint8 RGB in 0 to 255")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"got tiles of shape {list(images.shape)}, expected [N, 3, H, W] RGB")
    return images


def read_slide_tiles(
    slide: Slide, tile: TileSpec, max_tiles: int = MAX_TILES, *, skips_damaged: bool = False
) -> Tensor:
    """Return evenly spaced tiles of a slide that are half tissue.

    Tiles that are blank or blurred to `cytosyn_aug.io.tissue` are left out, unless all are: a tile
    of dust among 63 turned Macenko's eosin by 15 degrees.

    Args:
        slide: An open slide.
        tile: Size and scale of the tiles.
        max_tiles: Read so many at most.
        skips_damaged: Leave out tiles that cannot be decoded, instead of raising.

    Returns:
        uint8 [N, 3, size, size]; N = 0 if the slide shows no such tile.

    Raises:
        SlideError: A tile cannot be decoded, or the slide is too coarse.
    """
    config = TissueConfig()
    image, pixel, _ = slide.thumbnail(config.mask_mpp)
    mask = TissueMask(tissue_pixels(image, config), (pixel, pixel))
    reading = slide.plan(tile)
    extent = reading.extent_level0
    positions = grid_positions(slide.width_level0, slide.height_level0, extent)
    positions = positions[mask.fractions(positions, extent) >= _MIN_TISSUE_OF_SLIDE_TILES]
    read = []
    for x, y in positions[_evenly(len(positions), max_tiles)].tolist():
        try:
            read.append(np.asarray(slide.read_tile(x, y, reading)))
        except SlideError:
            if not skips_damaged:
                raise
    sound = [x for x in read if reason_to_reject(tile_quality(x), config) is None] or read
    if not sound:
        return torch.zeros((0, 3, tile.size_px, tile.size_px), dtype=torch.uint8)
    return torch.from_numpy(np.stack(sound)).permute(0, 3, 1, 2)


def _read_slide(file: Path, tile: TileSpec, max_tiles: int) -> Tensor:
    with Slide(file) as slide:
        images = read_slide_tiles(slide, tile, max_tiles)
    if not len(images):
        raise ValueError(
            f"{file.name} shows no tile of {tile.describe()} that is half tissue; fit to tiles of "
            "your own choice"
        )
    return images


def _read_several(paths: list[Path], tile: TileSpec, max_tiles: int) -> Tensor:
    if not paths:
        raise ValueError("got no folders and no slides; give at least one")
    images = [read_tiles(path, tile, max(1, max_tiles // len(paths))) for path in paths]
    sizes = {tuple(x.shape[2:]) for x in images}
    if len(sizes) > 1:
        raise ValueError(f"tiles are of the sizes {sorted(sizes)}; give tiles of one size")
    return torch.cat(images)


def sampled_files(folder: Path, max_tiles: int = MAX_TILES) -> list[Path]:
    """Return the files of a folder that are fitted to, evenly spaced.

    Raises:
        ValueError: The folder holds no tiles.
    """
    files = sorted(f for f in folder.rglob("*") if _is_tile(f))
    if not files:
        raise ValueError(
            f"{folder} holds no tiles; expected {', '.join(TILE_SUFFIXES)} files. Name slides "
            "themselves, not their folder"
        )
    return [files[k] for k in _evenly(len(files), max_tiles)]


def _read_folder(folder: Path, max_tiles: int) -> Tensor:
    return torch.stack(list(_read_images(sampled_files(folder, max_tiles))))


def _is_tile(file: Path) -> bool:
    is_mask = masked_stem(file.stem) is not None
    return file.suffix.lower() in TILE_SUFFIXES and not is_mask and not file.name.startswith(".")


def _read_images(files: list[Path]) -> Iterator[Tensor]:
    first: tuple[int, ...] | None = None
    for file in files:
        try:
            pixels = read_image(file).pixels
        except ItemError as error:
            raise ValueError(
                f"{file} {error}; take it out of the folder that is fitted to, or mend it"
            ) from error
        first = first or pixels.shape
        if pixels.shape != first:
            raise ValueError(
                f"{file} is {pixels.shape[1]}x{pixels.shape[0]} px, the tiles before it are "
                f"{first[1]}x{first[0]}; give tiles of one size"
            )
        yield torch.from_numpy(pixels).permute(2, 0, 1)


def _evenly(num: int, largest: int) -> list[int]:
    """Return at most `largest` evenly spaced positions of `num`."""
    step = max(1, num / largest)
    return [int(k * step) for k in range(min(num, largest))]
