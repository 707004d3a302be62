"""The demonstration: real sample tiles restained and resampled, as pictures and one page.

Reads the sample tiles that ship with the package (samples/LICENCES.md), needs no network.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from cytosyn_aug.io.files import write_atomically
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.report.rendering import render_page
from cytosyn_aug.stain.density import tissue_moments
from cytosyn_aug.stain.reference import StainReference
from cytosyn_aug.transforms.stain_transfer import StainNormalize

SAMPLES = Path(__file__).parent / "samples"
LABORATORIES = {
    "CMU": ("cmu",),
    "Helsinki": ("helsinki-nest", "helsinki-stroma"),
    "TIAToolbox": ("tiatoolbox",),
}
CONTENT = ("cmu_1", "helsinki-nest_3", "helsinki-stroma_7", "tiatoolbox_3")
RESAMPLED = ("cmu_6", "helsinki-nest_1", "helsinki-stroma_4", "tiatoolbox_1")
NUM_VARIATIONS = 5
_STEPS = 16


def write_demo(out: Path, *, model: Path | None = None, seed: int = 0) -> Path:
    """Write three sheets and `index.html` into a folder.

    Args:
        out: Folder, created if missing; files of an earlier demo are replaced.
        model: Model folder; None for the embedded `tiny`.
        seed: Seed of everything that is generated.

    Returns:
        Path of the page.
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    generator = TileGenerator.from_pretrained(model)
    references = {
        name: StainReference.fit(generator, tiles) for name, tiles in load_laboratories().items()
    }
    transfer = _stain_transfer(generator, references, out)
    variations = _variations(generator, seed, out)
    unconditional = generator.sample(per_condition=12, sampler="ab2", steps=_STEPS, seed=seed)
    _save_sheet(out / "unconditional.png", unconditional, columns=6)
    page = out / "index.html"
    settings = {
        "model": f"{'tiny (embedded)' if model is None else model}, digest {generator.digest}",
        "tiles": generator.tile.describe(),
        "sampler": f"Adams-Bashforth 2, {_STEPS} steps, no guidance, seed {seed}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        "seconds": f"{time.monotonic() - began:.0f}",
    }
    content = render_page(
        "cytosyn-aug demo",
        [],
        "demo.html.j2",
        settings=list(settings.items()),
        laboratories=list(LABORATORIES),
        transfer=transfer,
        variations=variations,
        numbers=[f"variation {k + 1}" for k in range(NUM_VARIATIONS)],
    )
    write_atomically(page, content.encode())
    return page


def load_laboratories() -> dict[str, Tensor]:
    """Return the sample tiles by laboratory, uint8 [N, 3, 224, 224] each."""
    names = {
        laboratory: sorted(f.stem for p in prefixes for f in SAMPLES.glob(f"{p}_*.webp"))
        for laboratory, prefixes in LABORATORIES.items()
    }
    return {k: torch.stack([_read(name) for name in v]) for k, v in names.items()}


def load_samples() -> Tensor:
    """Return sample tiles, uint8 [8, 3, 224, 224]; k and k + 4 come from two laboratories."""
    names = [name for pair in zip(CONTENT, RESAMPLED, strict=True) for name in pair]
    return torch.stack([_read(name) for name in names])


def _stain_transfer(
    generator: TileGenerator, references: dict[str, StainReference], out: Path
) -> list[tuple[str, ...]]:
    """Write the content x reference grid; return rows (content, reference, before, after)."""
    content = torch.stack([_read(name) for name in CONTENT])
    columns = [content]
    rows: list[tuple[str, ...]] = []
    for name, reference in references.items():
        restained = StainNormalize(generator, reference)(content)
        columns.append(restained)
        for k, tile in enumerate(CONTENT):
            before, after = (_colour_distance(x[k], reference) for x in (content, restained))
            rows.append((tile, name, f"{before:.3f}", f"{after:.3f}"))
    grid = torch.stack(columns, 1).flatten(0, 1)
    _save_sheet(out / "stain_transfer.png", grid, columns=1 + len(references))
    return rows


def _variations(generator: TileGenerator, seed: int, out: Path) -> list[tuple[str, ...]]:
    """Write reference + five variations; return rows (tile, similarity of each variation)."""
    source = torch.stack([_read(name) for name in RESAMPLED])
    cls = generator.features(source).cls
    sampled = generator.sample(
        cls, per_condition=NUM_VARIATIONS, sampler="ab2", steps=_STEPS, seed=seed
    )
    similarity = torch.cosine_similarity(
        generator.features(sampled).cls, cls.repeat_interleave(NUM_VARIATIONS, 0)
    )
    groups = sampled.unflatten(0, (len(source), NUM_VARIATIONS))
    sheet = torch.cat([source[:, None], groups], 1).flatten(0, 1)
    _save_sheet(out / "variations.png", sheet, columns=1 + NUM_VARIATIONS)
    rows = similarity.view(len(source), NUM_VARIATIONS)
    return [(name, *(f"{x:.2f}" for x in row)) for name, row in zip(RESAMPLED, rows, strict=True)]


def _colour_distance(image: Tensor, reference: StainReference) -> float:
    """Return the distance of mean tissue optical density to the reference's."""
    mean = tissue_moments(image[None]).mean[0]
    share = reference.moments.tissue / reference.moments.tissue.sum()
    return float((mean - (share[:, None] * reference.moments.mean).sum(0)).norm())


def _read(name: str) -> Tensor:
    with Image.open(SAMPLES / f"{name}.webp") as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _save_sheet(file: Path, images: Tensor, columns: int) -> None:
    grid = make_grid(images.cpu(), nrow=columns, padding=4, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(file)
