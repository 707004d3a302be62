"""A small real task for the examples that train: do most cells of a tile belong to the tumour?

Tiles of 224 px at about 0.5 microns/pixel from the corners of the fields of BRCA-M2C (Abousamra et
al. 2021, BSD-3): TCGA breast cancer with a point in every cell. Laboratories that are trained on
and judged on differ, which is what restaining should help with. Without the data set, the sample
tiles of the package stand in, with a label of no meaning.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cytosyn_aug.demo import load_laboratories

SIZE = 224
TUMOUR = 2
TRAINED_ON = ("A8", "AC")  # tissue source sites; the others judge


class Task(NamedTuple):
    """Tiles, uint8 [N, 3, 224, 224], their labels, int64 [N], and whether they judge, bool [N]."""

    images: Tensor
    labels: Tensor
    is_held_out: Tensor


def load_task(folder: Path | None) -> Task:
    """Read BRCA-M2C, or take the sample tiles for None."""
    if folder is None:
        images = torch.cat(list(load_laboratories().values()))
        darkness = images.float().mean((1, 2, 3))
        held_out = torch.arange(len(images)) % 3 == 0
        return Task(images, (darkness < darkness.median()).long(), held_out)
    rows = [row for file in sorted((folder / "images").iterdir()) for row in _corners(file)]
    if not rows:
        raise SystemExit(f"no fields in {folder / 'images'}; pass the folder of BRCA-M2C")
    images, labels, held_out = zip(*rows, strict=True)
    return Task(torch.stack(images), torch.tensor(labels), torch.tensor(held_out))


def _corners(file: Path) -> Iterator[tuple[Tensor, int, bool]]:
    """Yield the four corners of a field, where there are cells."""
    with Image.open(file) as image:
        field = np.asarray(image.convert("RGB"))
    points = np.loadtxt(file.parent.parent / "labels" / f"{file.stem}_gt_class_coords.txt", ndmin=2)
    height, width = field.shape[:2]
    for top in (0, height - SIZE):
        for left in (0, width - SIZE):
            inside = (points[:, :2] >= (top, left)) & (points[:, :2] < (top + SIZE, left + SIZE))
            kinds = points[inside.all(1), 2]
            if len(kinds):
                tile = torch.from_numpy(field[top : top + SIZE, left : left + SIZE].copy())
                is_tumour = int((kinds == TUMOUR).mean() > 0.5)
                yield tile.permute(2, 0, 1), is_tumour, file.name.split("-")[1] not in TRAINED_ON


def build_classifier() -> nn.Module:
    """Return a small convolutional network for float tiles in [0, 1]."""
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for narrow, wide in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(narrow, wide, 5, 2, 2, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))


@torch.no_grad()
def accuracy(classifier: nn.Module, task: Task) -> float:
    """Return the share of held-out tiles that are classified correctly, mean over classes."""
    classifier.eval()
    images, labels = task.images[task.is_held_out], task.labels[task.is_held_out]
    found = torch.cat([classifier(part / 255).argmax(1) for part in images.split(64)])
    classifier.train()
    shares = [(found == k)[labels == k].float().mean() for k in labels.unique().tolist()]
    return float(torch.stack(shares).mean())


def print_accuracy(name: str, found: list[float], seconds: float) -> None:
    """Print accuracies on other laboratories, one a seed: mean, standard deviation and time."""
    values = torch.tensor(found, dtype=torch.float64)
    spread = f" +- {float(values.std()):.3f} of {len(found)} seeds" if len(found) > 1 else ""
    print(
        f"{name:12s} accuracy on other laboratories {float(values.mean()):.3f}{spread}, "
        f"{seconds:.0f} s",
        flush=True,
    )
