"""Which tiles of a slide show tissue: one rule, for training and whatever else reads slides.

No torch here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cytosyn_aug.io.slide import Reading, Slide, SlideError, grid_positions
from cytosyn_aug.io.tissue import TissueConfig, TissueMask, load_mask, tissue_pixels


def slide_mask(slide: Slide, imported: Path | None, config: TissueConfig) -> TissueMask:
    """Return the tissue of a slide, from an imported mask or from a thumbnail.

    Raises:
        ValueError: The imported mask is not one of this slide.
        SlideError: The slide has no level coarse enough, or is damaged all over.
    """
    if imported is not None:
        pixel = config.mask_mpp / slide.scale.mpp
        return load_mask(imported, slide.width_level0, slide.height_level0, pixel)
    image, pixel, is_unreadable = slide.thumbnail(config.mask_mpp)
    if is_unreadable.all():
        raise SlideError(f"{slide.file.name} opens, but no part of it can be decoded")
    # What cannot be seen may be tissue: its tiles are tried, and those that fail are named.
    is_tissue = tissue_pixels(image, config) | is_unreadable
    return TissueMask(is_tissue, (pixel, pixel), float(is_unreadable.mean()))


def candidate_positions(
    slide: Slide, reading: Reading, mask: TissueMask, config: TissueConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of tiles with enough tissue, and how much each has."""
    extent = reading.extent_level0
    positions = grid_positions(slide.width_level0, slide.height_level0, extent)
    tissue = mask.fractions(positions, extent)
    is_enough = tissue >= config.min_tissue
    return positions[is_enough], tissue[is_enough]
