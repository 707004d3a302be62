"""Tiles for training: held in memory or read from shards, and batches that depend only on a step.

A batch is a pure function of (tile set, seed, step), so a resumed run sees exactly the batches
an undisturbed one would. This module refuses to know what is trained on them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cytosyn_aug.images import density_to_grey, optical_density
from training.data.shards import DATASET_NAME, TileStore
from training.data.tile_folders import TILE_SUFFIXES

_NUM_THREADS = 8


@dataclass(frozen=True, slots=True)
class TileSet:
    """Tiles of one split, in memory.

    Attributes:
        images: uint8 [N, 3, H, W], RGB.
        slides: Names of the slides, sorted.
        slide_index: int64 [N], position in `slides` of each tile's slide.
        names: Where each tile comes from, if that is known.
    """

    images: Tensor
    slides: tuple[str, ...]
    slide_index: Tensor
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def side_px(self) -> int:
        """Side of the tiles."""
        return self.images.shape[-1]

    def take(self, index: Tensor) -> Tensor:
        """Return tiles by index [n], uint8 [n, 3, H, W]."""
        return self.images[index]

    def name(self, row: int) -> str:
        """Return where a tile comes from, for messages."""
        return self.names[row] if self.names else f"tile {row}"


class TilesOfSplit(Protocol):
    """Tiles of one split, wherever they are kept."""

    def __len__(self) -> int: ...

    @property
    def side_px(self) -> int:
        """Side of the tiles."""
        ...

    def take(self, index: Tensor) -> Tensor:
        """Return tiles by index [n], uint8 [n, 3, H, W]."""
        ...

    def name(self, row: int) -> str:
        """Return where a tile comes from, for messages."""
        ...


def open_split(folder: Path, size_px: int = 224, max_bytes: int = 16 * 2**30) -> TilesOfSplit:
    """Return one split, read into memory, or left in its shards if it is larger than `max_bytes`.

    Args:
        folder: One split; each sub-folder, or each shard, is a slide.
        size_px: Side that every tile must have.
        max_bytes: Most memory that decoded tiles may take in each process.

    Raises:
        ValueError: No tiles, a tile that is damaged or of another size, or an unfinished stage.
    """
    if _is_stage(folder):
        store = _checked_store(folder, size_px)
        if len(store) * 3 * size_px**2 > max_bytes:
            return StoredTiles(store)
    return load_tiles(folder, size_px)


def spread_evenly(tiles: TilesOfSplit, num: int) -> Tensor:
    """Return up to `num` tiles, spread evenly over the split, uint8 [n, 3, H, W]."""
    return tiles.take(evenly_spaced(len(tiles), num))


def evenly_spaced(num_items: int, number: int) -> Tensor:
    """Return at most `number` evenly spaced positions among `num_items`, int64, the ends first."""
    # In float64: positions among 40 M would be rounded to multiples of four.
    places = torch.linspace(0, num_items - 1, min(number, num_items), dtype=torch.float64)
    return places.round().long()


def identify(data: Path) -> str:
    """Return what a data set is known by in checkpoints, 16 hexadecimal digits.

    Of the tile stage's output its description, which vouches for every tile; of a folder of tiles
    the names and sizes of its files. Moving it changes nothing.

    Args:
        data: Folder with train/ and val/.
    """
    description = data / DATASET_NAME
    if description.exists():
        return hashlib.sha256(description.read_bytes()).hexdigest()[:16]
    files = sorted(f for f in data.rglob("*") if f.suffix.lower() in TILE_SUFFIXES)
    known = [(f.relative_to(data).as_posix(), f.stat().st_size) for f in files]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def load_tiles(folder: Path, size_px: int = 224, number: int | None = None) -> TileSet:
    """Read one split into memory: `<slide>/<tile>.{png,webp,...}` or shards of the tile stage.

    Args:
        folder: One split; each sub-folder, or each shard, is a slide.
        size_px: Side that every tile must have.
        number: At most so many, evenly spaced; the others are not read. None for all.

    Returns:
        The tiles in sorted order of slides; of (slide, file name) if they are files.

    Raises:
        ValueError: No tiles, a tile that is damaged or of another size, named, or a damaged or
            unfinished stage.
    """
    if _is_stage(folder):
        store = _checked_store(folder, size_px)
        chosen = evenly_spaced(len(store), len(store) if number is None else number)
        images = StoredTiles(store).take(chosen)
        index = torch.from_numpy(store.slide_index)[chosen]
        return TileSet(images, store.slides, index, tuple(map(store.name, chosen.tolist())))
    files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in TILE_SUFFIXES)
    if not files:
        raise ValueError(f"no tiles under {folder}; expected {folder}/<slide>/<tile>.png")
    slides = tuple(sorted({f.parent.name for f in files}))
    if number is not None:
        files = [files[k] for k in evenly_spaced(len(files), number).tolist()]

    def read(file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                array = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files
            raise ValueError(f"{file} cannot be read ({error}); replace or remove it") from error
        if array.shape[:2] != (size_px, size_px):
            raise ValueError(f"{file} is {array.shape[1]}x{array.shape[0]} px, expected {size_px}")
        return torch.from_numpy(array.copy()).permute(2, 0, 1)

    with ThreadPoolExecutor(4) as pool:
        images = torch.stack(list(pool.map(read, files)))
    index = torch.tensor([slides.index(f.parent.name) for f in files])
    names = tuple(f.relative_to(folder.parent).as_posix() for f in files)
    return TileSet(images=images, slides=slides, slide_index=index, names=names)


def _is_stage(folder: Path) -> bool:
    """Return whether the tile stage wrote this split, finished or not."""
    return (folder.parent / DATASET_NAME).exists() or any(folder.glob("*.tar"))


def _checked_store(folder: Path, size_px: int) -> TileStore:
    store = TileStore(folder.parent, folder.name)
    if store.tile.size_px != size_px:
        raise ValueError(
            f"{store.folder} holds tiles of {store.tile.describe()}, expected {size_px} px; "
            "cut tiles of that size"
        )
    return store


class StoredTiles(Dataset[tuple[Tensor, int]]):
    """Tiles of one split that do not fit into memory, by index; for a `DataLoader`.

    An item is (uint8 [3, H, W], position of its slide in `store.slides`). Every record is checked
    when it is read.

    Args:
        store: Safe to hand to workers, forked or spawned: each opens its own files.
    """

    def __init__(self, store: TileStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.store.read(index)).permute(2, 0, 1)
        return image, int(self.store.slide_index[index])

    @property
    def side_px(self) -> int:
        """Side of the tiles."""
        return self.store.tile.size_px

    def take(self, index: Tensor) -> Tensor:
        """Return tiles by index [n], uint8 [n, 3, H, W], decoded by several threads."""
        images = torch.empty(len(index), 3, self.side_px, self.side_px, dtype=torch.uint8)

        def read(place: int) -> None:
            images[place] = self[int(index[place])][0]

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(read, range(len(index))))
        return images

    def name(self, row: int) -> str:
        """Return where a tile comes from, for messages."""
        return self.store.name(row)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Return a CPU generator that depends only on (seed, step, stream)."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


@dataclass(frozen=True, slots=True)
class Batches:
    """Which items every step of a run sees: epochs of a seeded permutation, in full batches.

    Attributes:
        num_items: Size of the data set, at least `size`.
        size: Items per step, over all processes.
        seed: Seed of the run.
        name: What an item is called, for messages.

    Raises:
        ValueError: There are too few items for a batch.
    """

    num_items: int
    size: int
    seed: int
    name: Callable[[int], str] = str

    def __post_init__(self) -> None:
        if self.num_items < self.size:
            raise ValueError(
                f"{self.num_items} tiles cannot fill a batch of {self.size}; add tiles"
            )

    def index(self, step: int) -> Tensor:
        """Return the items of a step, counted from 0 over the whole run, int64 [size]."""
        epoch, position = divmod(step, self.num_items // self.size)
        order = _epoch_order(self.num_items, self.seed, epoch)
        return order[position * self.size : (position + 1) * self.size]

    def names(self, step: int) -> list[str]:
        """Return what the items of a step are called."""
        return [self.name(item) for item in self.index(step).tolist()]


@lru_cache(maxsize=2)
def _epoch_order(num_items: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of an epoch, kept: 40 M items take a second to permute."""
    return torch.randperm(num_items, generator=step_generator(seed, epoch, stream=1))


def stain_maps(
    num: int, generator: torch.Generator, *, share: float = 0.75, jitter: float = 1.0
) -> Tensor:
    """Draw random changes of laboratory, as linear maps of optical density.

    Haematoxylin and eosin are turned a little and scaled by up to a factor of about 1.7 either
    way: od' = M od, where M goes to stain amounts (Ruifrok and Johnston 2001), scales them and
    comes back over the turned stains. Glass stays white.

    Args:
        num: Maps B to draw.
        generator: CPU generator that all draws come from.
        share: Fraction of the maps that are not the identity.
        jitter: Size of the changes; 0 for none.

    Returns:
        float32 [B, 3, 3].
    """
    stains = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.0, 0.0, 0.0]])
    stains[2] = torch.linalg.cross(stains[0], stains[1])
    stains = torch.nn.functional.normalize(stains, dim=1)
    turned = stains + jitter * 0.06 * torch.randn(num, 3, 3, generator=generator)
    turned = torch.nn.functional.normalize(turned.abs().copysign(stains), dim=2)
    gains = torch.exp(jitter * 0.28 * torch.randn(num, 3, generator=generator))
    gains[:, 2] = 1.0
    maps = (torch.linalg.inv(stains) @ (gains[:, :, None] * turned)).transpose(1, 2)
    kept = torch.rand(num, generator=generator) >= share
    return torch.where(kept[:, None, None], torch.eye(3), maps)


def change_stain(images: Tensor, maps: Tensor) -> Tensor:
    """Apply linear maps of optical density [B, 3, 3] to uint8 images [B, 3, H, W]."""
    density = torch.einsum("bij,bjhw->bihw", maps, optical_density(images))
    return density_to_grey(density.clamp_min(0)).round().to(torch.uint8)


def draw_views(num: int, side_px: int, crop_px: int, generator: torch.Generator) -> Tensor:
    """Draw how images are cropped, turned and mirrored: int64 [num, 4] of top, left, turns, flip.

    Args:
        num: Views to draw.
        side_px: Side of the square images.
        crop_px: Side of the crops; `side_px` for none.
        generator: CPU generator that all draws come from.
    """
    limits = (side_px - crop_px + 1, side_px - crop_px + 1, 4, 2)
    return torch.stack(
        [torch.randint(0, limit, (num,), generator=generator) for limit in limits], dim=1
    )


def crop_and_turn(images: Tensor, views: Tensor, crop_px: int) -> Tensor:
    """Crop, turn and mirror each image as drawn.

    Args:
        images: uint8 [B, 3, H, W].
        views: int64 [B, 4]: top, left, turns and flip of each.
        crop_px: Side of the crops.

    Returns:
        uint8 [B, 3, crop_px, crop_px].
    """
    out = []
    for image, (top, left, turns, flip) in zip(images, views.tolist(), strict=True):
        crop = image[:, top : top + crop_px, left : left + crop_px]
        crop = torch.rot90(crop, turns, (1, 2))
        out.append(crop.flip(2) if flip else crop)
    return torch.stack(out)
