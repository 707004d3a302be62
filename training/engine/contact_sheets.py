"""Contact sheets: many tiles on one picture, for looking at what a run does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def write_sheet(file: Path, images: Tensor, columns: int) -> None:
    """Write uint8 [N, 3, H, W] images as one lossless PNG, `columns` to a row."""
    grid = make_grid(images.cpu(), nrow=columns, padding=4, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(file)


def write_comparison(file: Path, rows: Sequence[Tensor], columns: int = 8) -> None:
    """Write versions of the same tiles below each other, in blocks of `columns` tiles.

    Args:
        file: PNG.
        rows: One uint8 [N, 3, H, W] a version; of more than `columns`, whole blocks are shown.
        columns: Tiles beside each other.
    """
    columns = min(columns, len(rows[0]))
    blocks = torch.stack([row.cpu() for row in rows])[:, : len(rows[0]) // columns * columns]
    write_sheet(file, blocks.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2), columns)
