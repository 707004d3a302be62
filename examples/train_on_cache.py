"""Way (b) into a training loop: variants made beforehand, or made once and used several times.

usage: python examples/train_on_cache.py CACHE [--data BRCA_M2C] [--epochs 4] [--seeds 1]
       python examples/train_on_cache.py --way replay [--data BRCA_M2C] [--epochs 4]
cached: every tile gets two restained variants, written to CACHE before training; DataLoader workers
look them up, and no network runs in the loop. Training without them is printed beside it.
replay: a bank in the training process makes a variant of a tile when it must, and uses it four
times; the variants are new tiles drawn by the diffusion model. What a step costs is printed beside
the formula of `cytosyn_aug.transforms.replay`.
All print the accuracy on tiles of other laboratories (examples/tumour_tiles.py).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tumour_tiles import Task, accuracy, build_classifier, load_task, print_accuracy

import cytosyn_aug as ca
from cytosyn_aug.demo import load_laboratories

BATCH_SIZE = 16
P = 0.5


class CachedTiles(Dataset[tuple[Tensor, int]]):
    """Tiles as a data set of yours would give them, looked up in a cache by the worker."""

    def __init__(self, images: Tensor, labels: Tensor, variants: ca.CachedVariants) -> None:
        self.images, self.labels, self.variants = images, labels, variants

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.variants(self.images[index]), int(self.labels[index])


def fill(cache_folder: Path, generator: ca.TileGenerator, images: Tensor) -> ca.LatentCache:
    """Write two restained variants of every tile; those that are there are not made again."""
    references = [ca.StainReference.fit(generator, x) for x in load_laboratories().values()]
    edits = [ca.StainNormalize(generator, reference=to) for to in references[:2]]
    spec = ca.variants_spec(generator, "images", edits)
    with ca.LatentCache.open(cache_folder, spec) as cache:
        for part in images.split(64):
            ca.fill_variants(generator, part, cache, edits)
    return ca.LatentCache.open(cache_folder)


def train_cached(
    task: Task, variants: ca.CachedVariants, epochs: int, num_workers: int, seed: int
) -> nn.Module:
    """Train on tiles that workers replace by cached variants."""
    kept = ~task.is_held_out
    dataset = CachedTiles(task.images[kept], task.labels[kept], variants)
    loader = DataLoader(
        dataset, BATCH_SIZE, shuffle=True, num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )  # fmt: skip
    classifier, step = _start(seed)
    for _ in range(epochs):
        for images, labels in loader:
            step(images, labels)
    return classifier


def train_replayed(task: Task, bank: Callable[..., Tensor], epochs: int) -> nn.Module:
    """Train on batches in which a bank replaces tiles; the loader gives each tile's position."""
    kept = ~task.is_held_out
    images, labels = task.images[kept], task.labels[kept]
    dataset = TensorDataset(images, labels, torch.arange(len(images)))
    classifier, step = _start(seed=0)
    for _ in range(epochs):
        for batch, targets, index in DataLoader(dataset, BATCH_SIZE, shuffle=True):
            step(bank(batch, index), targets)
    return classifier


def _start(seed: int):
    torch.manual_seed(seed)
    classifier = build_classifier()
    optimiser = torch.optim.AdamW(classifier.parameters(), 2e-3)

    def step(images: Tensor, labels: Tensor) -> None:
        loss = nn.functional.cross_entropy(classifier(images / 255), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return classifier, step


class Clock:
    """Seconds spent in a function, over all its calls."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.seconds, self.num_calls = function, 0.0, 0

    def __call__(self, *arguments: object) -> Tensor:
        """Call the function."""
        began = time.perf_counter()
        result = self.function(*arguments)
        self.seconds += time.perf_counter() - began
        self.num_calls += 1
        return result


def replay(task: Task, epochs: int) -> nn.Module:
    """Train with a bank of redrawn tiles, and print its cost beside the formula's."""
    generator = ca.TileGenerator.from_pretrained()
    recipe = ca.EditRecipe(noise_level=0.4)
    make = Clock(lambda images, seeds: ca.redraw_latents(generator, images, recipe, seeds))
    num_tiles = int((~task.is_held_out).sum())
    bank = ca.ReplayBank(generator, make, num_tiles=num_tiles, p=P, reuse=4)
    step = Clock(bank)
    classifier = train_replayed(task, step, epochs)

    latents = torch.zeros(8, *generator.latent_shape)
    decode = Clock(lambda: generator.decode(latents, is_few_step=True))
    for _ in range(2):
        decode()
    counts = bank.counts
    uses = (counts.num_made + counts.num_reused) / counts.num_made
    each = make.seconds / counts.num_made, decode.seconds / (2 * len(latents))
    share = P * num_tiles * epochs / step.num_calls
    expected = share * (each[0] / uses + each[1])
    print(
        f"{counts.num_made} variants made, {counts.num_reused} reused: {uses:.1f} uses of each so "
        f"far, 4 in the long run\n"
        f"a step took {step.seconds / step.num_calls * 1000:.0f} ms, by the formula "
        f"{expected * 1000:.0f} ms with so many uses and "
        f"{bank.seconds_per_step(BATCH_SIZE, *each) * 1000:.0f} ms in the long run; making "
        f"{each[0] * 1000:.0f} ms, decoding {each[1] * 1000:.0f} ms per tile"
    )
    return classifier


def main() -> None:
    """Train one way and print a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, metavar="CACHE", nargs="?", help="for --way cached")
    parser.add_argument("--data", type=Path, help="folder of BRCA-M2C; default: sample tiles")
    parser.add_argument("--way", choices=("cached", "replay"), default="cached")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trained N times")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.way == "cached" and args.cache is None:
        parser.error("--way cached needs a folder, CACHE")
    task = load_task(args.data)
    began = time.perf_counter()
    if args.way == "replay":
        found = accuracy(replay(task, args.epochs), task)
        print_accuracy("replayed", [found], time.perf_counter() - began)
        return
    cache = fill(args.cache, ca.TileGenerator.from_pretrained(), task.images[~task.is_held_out])
    print(f"{len(cache)} variants in {time.perf_counter() - began:.0f} s")
    for name, p in (("as they are", 0.0), ("from a cache", P)):
        began = time.perf_counter()
        variants = ca.CachedVariants(cache, p=p)
        found = [
            accuracy(train_cached(task, variants, args.epochs, args.workers, seed), task)
            for seed in range(args.seeds)
        ]
        print_accuracy(name, found, time.perf_counter() - began)


if __name__ == "__main__":
    main()
