"""Normalise a slide, and measure speed and seams; compare with changing each tile alone.

usage: python -m benchmarks.slides SLIDE OUT.ome.tif [--method cytosyn] [--to CMU]
                                          [--picture seams.png] [--slide-mpp 0.5]

1. The slide is written as a pyramid. Tiles of 512 px a second are those of the finest level, glass
   included; processor time is that of the whole process, so other work on the machine does not
   count. Beside it: how fast OpenSlide alone reads the same tiles.
2. Seams (`cytosyn_aug.slides.seams`) of tiles of 224 px at 0.5 microns/pixel: as they are, with the
change
   of the slide, and changed each by its own statistics, as a transform without `source` does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import openslide
import torch
from PIL import Image

import cytosyn_aug as ca
from cytosyn_aug.config import TileSpec
from cytosyn_aug.demo import load_laboratories
from cytosyn_aug.io.slide import Slide
from cytosyn_aug.io.tile_source import read_slide_tiles
from cytosyn_aug.slides.pyramid import TILE_PX
from cytosyn_aug.slides.seams import SeamMeter, tile_lines
from cytosyn_aug.stain.colour_table import ColourTable
from cytosyn_aug.stain.methods import fit_reference, recolour_to

TILE = TileSpec()
WINDOW = (3, 4)  # tiles of the picture
WAYS = ("the slide's own", "one change of the slide", "each tile alone")


def main() -> None:
    """Write the slide, print what was measured, and draw a picture if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slide", type=Path)
    parser.add_argument("out", type=Path)
    methods = ["cytosyn", "macenko", "reinhard", "transport"]
    parser.add_argument("--method", default="cytosyn", choices=methods)
    parser.add_argument("--to", default="CMU", choices=list(load_laboratories()))
    parser.add_argument("--slide-mpp", type=float)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = ca.TileGenerator.from_pretrained()
    reference = fit_reference(args.method, load_laboratories()[args.to], generator)
    read_seconds, num_tiles = time_reading(args.slide)
    began, processor = time.perf_counter(), time.process_time()
    report = ca.normalize_slide(
        args.slide,
        args.out,
        reference,
        generator=generator,
        recipe=ca.SlideRecipe(slide_mpp=args.slide_mpp),
        overwrite=True,
        num_threads=args.threads,
    )
    wall, processor = time.perf_counter() - began, time.process_time() - processor
    print(report)
    print(f"{report.num_tiles / wall:.0f} tiles/s, {report.num_tiles / processor:.0f} a CPU-second")
    print(f"OpenSlide's read alone: {num_tiles / read_seconds:.0f} a CPU-second")
    print(f"seams of {TILE_PX} px: {report.seam_ratio_before} before, {report.seam_ratio} after")
    compare_seams(args.slide, args.slide_mpp, reference, generator, args.picture)


def time_reading(file: Path) -> tuple[float, int]:
    """Return CPU-seconds for reading all tiles of 512 px once, as RGB, and their number."""
    with openslide.OpenSlide(file) as slide:
        width, height = slide.dimensions
        corners = [(x, y) for y in range(0, height, TILE_PX) for x in range(0, width, TILE_PX)]
        began = time.process_time()
        for corner in corners:
            slide.read_region(corner, 0, (TILE_PX, TILE_PX)).convert("RGB")
        return time.process_time() - began, len(corners)


def compare_seams(
    file: Path,
    mpp: float | None,
    reference: ca.StainReference | ca.MacenkoReference | ca.ReinhardReference | ca.DensityReference,
    generator: ca.TileGenerator,
    picture: Path | None,
) -> None:
    """Print the seam ratio of three ways, on tiles of 224 px; draw where most is tissue."""
    alone = {
        ca.StainReference: lambda: ca.StainNormalize(generator, reference),
        ca.MacenkoReference: lambda: ca.MacenkoNormalize(reference),
        ca.ReinhardReference: lambda: ca.ReinhardNormalize(reference),
        ca.DensityReference: lambda: ca.DensityTransport(reference),
    }[type(reference)]()
    with Slide(file, mpp) as slide:
        own = type(reference)
        tiles = read_slide_tiles(slide, TILE)
        source = own.fit(generator, tiles) if own is ca.StainReference else own.fit(tiles)
        edit = ca.EditRecipe()
        table = ColourTable(
            recolour_to(reference, source, generator=generator, edit=edit, strength=1.0)
        )
        reading = slide.plan(TILE)
        extent = reading.extent_level0
        rows, columns = slide.height_level0 // extent, slide.width_level0 // extent
        meters, shown, tissue = [SeamMeter() for _ in WAYS], {}, np.zeros((rows, columns))
        for row, column in np.ndindex(rows, columns):
            pixels = np.array(slide.read_tile(column * extent, row * extent, reading))
            recoloured, weight = table.look_up(pixels)
            tissue[row, column] = weight.mean() / 255
            if tissue[row, column] < 0.02:
                continue
            tile = alone(torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0).numpy()
            shown[row, column] = (pixels, recoloured, tile)
            for meter, image in zip(meters, shown[row, column], strict=True):
                meter.add(row, column, tile_lines(image, weight))
    for way, meter in zip(WAYS, meters, strict=True):
        print(f"seams of 224 px, {way}: {meter.ratio:.2f}")
    if picture is not None:
        draw(picture, shown, tissue)


def draw(
    file: Path, shown: dict[tuple[int, int], tuple[np.ndarray, ...]], tissue: np.ndarray
) -> None:
    """Draw the window with the most tissue, three times beside each other."""
    rows, columns = WINDOW
    corners = np.ndindex(tissue.shape[0] - rows + 1, tissue.shape[1] - columns + 1)
    top, left = max(corners, key=lambda c: tissue[c[0] : c[0] + rows, c[1] : c[1] + columns].sum())
    size = TILE.size_px
    canvas = np.full((rows * size, (columns * size + 8) * len(WAYS), 3), 255, np.uint8)
    for (row, column), images in shown.items():
        y, x = (row - top) * size, (column - left) * size
        if not (0 <= y < rows * size and 0 <= x < columns * size):
            continue
        for k, image in enumerate(images):
            start = k * (columns * size + 8) + x
            canvas[y : y + size, start : start + size] = image
    Image.fromarray(canvas).save(file)


if __name__ == "__main__":
    main()
