"""A change of colour as a table of all 16.7 million colours.

What is done to a slide goes by a pixel's colour alone: the map of its stain and how far the pixel
counts as tissue. So it can be computed once for every colour there is, and looked up for every
pixel of the slide: five times as fast, equal to the bit, and the same everywhere by construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug.autocast import isolated
from cytosyn_aug.images import optical_density
from cytosyn_aug.stain.density import tissue_weight

# Grey levels float [1, 3, H, W] to grey levels of the same shape.
Recolour = Callable[[Tensor], Tensor]


class ColourTable:
    """A colour, and its tissue weight, for each colour; 64 MB.

    Args:
        recolour: The change; None for none. Where a colour is not tissue at all it is not asked.

    Attributes:
        digest: 16 hexadecimal digits of SHA-256 over the table.
    """

    @isolated()
    def __init__(self, recolour: Recolour | None) -> None:
        entries = np.empty((256, 256, 256, 4), np.uint8)
        level = torch.arange(256, dtype=torch.float32)
        density = optical_density(level)
        for red in range(256):
            grey = _plane(level, red)
            weight = tissue_weight(_plane(density, red))
            changed = grey if recolour is None else torch.where(weight > 0, recolour(grey), grey)
            # Rounded up, so that only what is not tissue at all has no weight.
            both = torch.cat([changed.round(), (255 * weight).ceil()], 1)
            entries[red] = both[0].permute(1, 2, 0).to(torch.uint8).numpy()
        self.digest = hashlib.sha256(entries.data).hexdigest()[:16]
        self._entries = entries.reshape(-1, 4).view(np.uint32)[:, 0]

    def look_up(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels with their new colour, and their tissue weight before the change.

        Args:
            pixels: uint8 [H, W, 3], RGB.

        Returns:
            uint8 [H, W, 3], RGB, and uint8 [H, W], 255 for full tissue.
        """
        wide = pixels.astype(np.int64)
        number = (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]
        entries = np.take(self._entries, number).view(np.uint8).reshape(*pixels.shape[:2], 4)
        return np.ascontiguousarray(entries[..., :3]), np.ascontiguousarray(entries[..., 3])


def _plane(values: Tensor, red: int) -> Tensor:
    """Return the values [256] of all colours with this red: [1, 3, 256, 256], green by blue."""
    shape = (256, 256)
    channels = (values[red].expand(shape), values[:, None].expand(shape), values.expand(shape))
    return torch.stack(channels)[None]
