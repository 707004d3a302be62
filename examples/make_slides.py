"""Write a few slides for trying the whole of training: sample tiles laid out as pyramids.

usage: python examples/make_slides.py OUT
Six Aperio-like slides of two patients a laboratory, 0.25 microns/pixel, named as TCGA names
diagnostic sections, and a table with their splits. What they show is real H&E, in no order.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor

from cytosyn_aug.demo import load_laboratories

SIDE = 6  # tiles in a row and in a column
MPP = 0.25


def main() -> None:
    """Write two slides of each laboratory of the sample tiles, and slides.csv."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for site, tiles in zip(("A1", "B2", "C3"), load_laboratories().values(), strict=True):
        for number in range(2):
            patient = f"TCGA-{site}-000{number}"
            name = f"{patient}-01Z-00-DX1.svs"
            write_slide(out / name, mosaic(tiles, seed=number))
            split = "val" if number == 0 and site != "C3" else "train"
            rows.append({"slide": name, "patient": patient, "split": split})
    with (out / "slides.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(out)


def mosaic(tiles: Tensor, seed: int) -> np.ndarray:
    """Lay tiles out in random order and orientation, at twice their size: uint8 [H, W, 3]."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(SIDE):
        row = []
        for k in torch.randint(0, len(tiles), (SIDE,), generator=draw).tolist():
            turns = int(torch.randint(0, 4, (), generator=draw))
            row.append(torch.rot90(tiles[k], turns, (1, 2)))
        rows.append(torch.cat(row, 2))
    picture = Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).contiguous().numpy())
    return np.asarray(picture.resize((2 * picture.width, 2 * picture.height), Image.LANCZOS))


def write_slide(file: Path, picture: np.ndarray) -> None:
    """Write levels 1 and 4 as Aperio does, compressed without loss."""
    with tifffile.TiffWriter(file) as tiff:
        for level, image in enumerate((picture, picture[::4, ::4])):
            height, width = image.shape[:2]
            size = f"{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=90"
            tiff.write(
                np.ascontiguousarray(image),
                tile=(256, 256),
                photometric="rgb",
                compression="adobe_deflate",
                description=f"Aperio Image Library v12.0\r\n{size}|AppMag = 40|MPP = {MPP}",
                metadata=None,
            )
            if level == 0:  # the second page of an SVS is its thumbnail
                tiff.write(image[::16, ::16].copy(), photometric="rgb", metadata=None)


if __name__ == "__main__":
    main()
