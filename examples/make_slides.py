"""Write a few slides for trying the whole of training: sample tiles laid out as pyramids.

usage: python examples/make_slides.py OUT
Six Aperio-like slides of two patients per laboratory, 0.25 microns/pixel, named as TCGA names
diagnostic sections. Beside them one that states no scale and one named as a frozen section; a GDC
manifest of all; slides.csv with their splits, and slides_with_scale.csv, which adds the scale that
is missing. What they show is real H&E, in no order.
"""

import argparse
import csv
import hashlib
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor

from cytosyn_aug.demo import load_laboratories

SIDE = 6  # tiles in a row and in a column
MPP = 0.25
WITHOUT_SCALE = "TCGA-D4-0000-01Z-00-DX1.svs"
FROZEN = "TCGA-A1-0000-01A-01-TS1.svs"


def main() -> None:
    """Write two slides of each laboratory of the sample tiles, two odd ones, and the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for site, tiles in zip(("A1", "B2", "C3"), load_laboratories().values(), strict=True):
        for number in range(2):
            patient = f"TCGA-{site}-000{number}"
            name = f"{patient}-01Z-00-DX1.svs"
            write_slide(out / name, mosaic(tiles, seed=number), MPP)
            split = "val" if number == 0 and site != "C3" else "train"
            rows.append({"slide": name, "patient": patient, "split": split})
    for name, mpp in ((WITHOUT_SCALE, None), (FROZEN, MPP)):
        write_slide(out / name, mosaic(tiles, seed=2), mpp)
    rows.append({"slide": WITHOUT_SCALE, "patient": WITHOUT_SCALE[:12], "split": "train"})
    write_table(out / "slides.csv", rows)
    write_table(out / "slides_with_scale.csv", [*rows[:-1], rows[-1] | {"mpp": MPP}])
    write_manifest(out / "gdc_manifest.txt", sorted(out.glob("*.svs")))
    print(out)


def write_table(file: Path, rows: list[dict[str, object]]) -> None:
    """Write a table with a header; the last row names the columns."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


def write_manifest(file: Path, slides: list[Path]) -> None:
    """Write what the GDC gives along with a download: id, name, MD5 and size of each file."""
    lines = ["id\tfilename\tmd5\tsize\tstate"]
    for slide in slides:
        content = slide.read_bytes()
        md5 = hashlib.md5(content).hexdigest()
        lines.append(f"{slide.stem}\t{slide.name}\t{md5}\t{len(content)}\treleased")
    file.write_text("\n".join(lines) + "\n")


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


def write_slide(file: Path, picture: np.ndarray, mpp: float | None) -> None:
    """Write levels 1 and 4 as Aperio does, compressed without loss; None states no scale."""
    scale = "" if mpp is None else f"|AppMag = 40|MPP = {mpp}"
    with tifffile.TiffWriter(file) as tiff:
        for level, image in enumerate((picture, picture[::4, ::4])):
            height, width = image.shape[:2]
            size = f"{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=90{scale}"
            tiff.write(
                np.ascontiguousarray(image),
                tile=(256, 256),
                photometric="rgb",
                compression="adobe_deflate",
                description=f"Aperio Image Library v12.0\r\n{size}",
                metadata=None,
            )
            if level == 0:  # the second page of an SVS is its thumbnail
                tiff.write(image[::16, ::16].copy(), photometric="rgb", metadata=None)


if __name__ == "__main__":
    main()
