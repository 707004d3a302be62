"""View of a slide, or of a region of it, at one scale, which is read one block at a time.

At the slide's own scale blocks are its very pixels. At a coarser one they are reduced with a
Lanczos filter from the nearest finer level, with a margin, so that neither blocks nor regions show
in the result. This module refuses to know what is done with the pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from cytosyn_aug.io.slide import Slide, SlideError

Region = tuple[int, int, int, int]

_SAME_SCALE = 1.01
_LEVEL_TOLERANCE = 1.01
_LANCZOS_PX = 3


class SlideView(NamedTuple):
    """Region of a slide at one scale.

    Attributes:
        x_level0: Column of its corner.
        y_level0: Row of its corner.
        width: Width in its own pixels.
        height: Height in its own pixels.
        mpp: Its scale.
        ratio: Side of its pixels in level-0 pixels; 1 at the slide's own scale.
        level: Level that is read.
        downsample: Downsample of that level.
    """

    x_level0: int
    y_level0: int
    width: int
    height: int
    mpp: float
    ratio: float
    level: int
    downsample: float

    @classmethod
    def of(cls, slide: Slide, region: Region | None = None, mpp: float | None = None) -> Self:
        """Return the view of an open slide.

        Args:
            slide: The slide.
            region: x, y, width and height in level-0 pixels; None for all.
            mpp: Scale; None for the slide's own, which is also meant by what is within 1 % of it.

        Raises:
            SlideError: The region is not inside the slide, or the slide is coarser than `mpp`.
        """
        name, slide_mpp = slide.file.name, slide.scale.mpp
        x, y, width, height = region or (0, 0, slide.width_level0, slide.height_level0)
        is_inside = x + width <= slide.width_level0 and y + height <= slide.height_level0
        if min(x, y) < 0 or min(width, height) < 1 or not is_inside:
            raise SlideError(
                f"{name} is {slide.width_level0}x{slide.height_level0} px, and the region x={x} "
                f"y={y} of {width}x{height} px is not inside; give x, y, width, height in pixels "
                "of level 0"
            )
        ratio = 1.0 if mpp is None else mpp / slide_mpp
        if not ratio * _SAME_SCALE >= 1:
            raise SlideError(
                f"{name} has {slide_mpp:.4g} microns/pixel, coarser than the wanted {mpp:g}; "
                "enlarging would invent detail: leave mpp out to keep the slide's own scale"
            )
        if ratio <= _SAME_SCALE:
            return cls(x, y, width, height, slide_mpp, 1.0, 0, 1.0)
        fine = [k for k, d in enumerate(slide.downsamples) if d <= ratio * _LEVEL_TOLERANCE]
        wide, high = int(width / ratio), int(height / ratio)
        if min(wide, high) < 1:
            raise SlideError(f"{name}: {width}x{height} px leave nothing at {mpp:g} microns/pixel")
        return cls(
            x, y, wide, high, slide_mpp * ratio, ratio, fine[-1], slide.downsamples[fine[-1]]
        )

    def read(self, slide: Slide, x: int, y: int, side: int) -> np.ndarray:
        """Return the block at a position, smaller than `side` squared only at the far edges.

        Args:
            slide: The slide the view is of.
            x: Column in pixels of the view.
            y: Row in pixels of the view.
            side: Of the block, in pixels of the view.

        Returns:
            uint8 [h, w, 3], RGB; what was not scanned has the background's colour.

        Raises:
            SlideError: It cannot be decoded.
        """
        width, height = min(side, self.width - x), min(side, self.height - y)
        if self.ratio == 1:
            corner = self.x_level0 + x, self.y_level0 + y
            return np.asarray(slide.read_region(*corner, 0, (width, height)))
        left, right, box_x = self._span(self.x_level0, x, width, slide.width_level0)
        top, bottom, box_y = self._span(self.y_level0, y, height, slide.height_level0)
        corner = round(left * self.downsample), round(top * self.downsample)
        wide = slide.read_region(*corner, self.level, (right - left, bottom - top))
        box = (box_x[0], box_y[0], box_x[1], box_y[1])
        return np.asarray(wide.resize((width, height), Image.Resampling.LANCZOS, box))

    def corner(self, x: int, y: int) -> tuple[int, int]:
        """Return a position in the view as one in level-0 pixels of the slide."""
        return self.x_level0 + round(x * self.ratio), self.y_level0 + round(y * self.ratio)

    def _span(
        self, corner: int, start: int, length: int, end_level0: int
    ) -> tuple[int, int, tuple[float, float]]:
        """Return first and last pixel of the level to read, and what the block covers of them."""
        step = self.ratio / self.downsample
        margin = math.ceil(_LANCZOS_PX * step) + 1
        low = corner / self.downsample + start * step
        high = low + length * step
        first = max(0, math.floor(low) - margin)
        last = min(int(end_level0 / self.downsample), math.ceil(high) + margin)
        return first, last, (low - first, min(high, last) - first)
