"""Stain transfer on batches inside a PyTorch training loop, in three added lines.

usage: python examples/augment_in_loop.py
"""

import torch
from torch import nn

import cytosyn_aug as ca
from cytosyn_aug.demo import load_laboratories


def main() -> None:
    """Train a toy classifier of laboratories for a few steps on restained batches."""
    torch.manual_seed(0)
    generator = ca.TileGenerator.from_pretrained()
    laboratories = load_laboratories()
    references = [ca.StainReference.fit(generator, x) for x in laboratories.values()]
    augment = ca.StainTransfer(generator, references, p=0.5)

    images = torch.cat(list(laboratories.values()))
    labels = torch.cat([torch.full((len(x),), k) for k, x in enumerate(laboratories.values())])
    classifier = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, len(laboratories)),
    )  # fmt: skip
    optimiser = torch.optim.Adam(classifier.parameters(), 1e-2)
    for step in range(3):
        batch = torch.randperm(len(images))[:8]
        restained = augment(images[batch])  # uint8 in, uint8 out; half of the tiles changed
        loss = nn.functional.cross_entropy(classifier(restained / 255), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        print(f"step {step} loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
