"""Contact sheets: many tiles on one picture, for looking at what a run does."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def write_sheet(file: Path, images: Tensor, columns: int) -> None:
    """Write uint8 [N, 3, H, W] images as one lossless PNG, `columns` to a row."""
    grid = make_grid(images.cpu(), nrow=columns, padding=4, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(file)
