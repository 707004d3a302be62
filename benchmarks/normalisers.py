"""Classical normalisation beside torchstain's, on the same tiles in the same run.

Rounds of all methods are interleaved, so that other load on the machine hits them alike; what
counts is the ratio of median CPU times. torchstain takes one tile at a time; ours takes a batch.
torchstain is told to skip the images of single stains, which ours does not make either.

usage: pip install -e ".[training]" && python -m benchmarks.normalisers [--rounds 7]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer
from torchstain.torch.normalizers.reinhard import TorchReinhardNormalizer

import cytosyn_aug as ca
from cytosyn_aug.demo import load_laboratories


def main() -> None:
    """Print CPU time per tile of every method, and the ratios to torchstain's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    laboratories = load_laboratories()
    tiles = torch.cat(list(laboratories.values()))
    tiles = tiles.repeat(-(-arguments.batch // len(tiles)), 1, 1, 1)[: arguments.batch]
    methods = make_methods(laboratories["CMU"])
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(arguments.rounds + 1):
        for name, method in methods.items():
            began = time.process_time()
            method(tiles)
            seconds[name].append(time.process_time() - began)
    median = {k: statistics.median(v[1:]) / len(tiles) for k, v in seconds.items()}  # 1st: warm-up
    print(f"{len(tiles)} tiles of {tiles.shape[3]} px, 1 thread, {platform.machine()}, "
          f"torch {torch.__version__}, {arguments.rounds} interleaved rounds")  # fmt: skip
    print(f"{'method':36} {'ms per tile':>10} {'tiles per CPU-second':>20} {'over torchstain':>17}")
    for name, value in median.items():
        base = median[f"torchstain {'Reinhard' if 'Reinhard' in name else 'Macenko'}"]
        print(f"{name:36} {value * 1e3:10.2f} {1 / value:20.0f} {base / value:17.2f}")


def make_methods(target: torch.Tensor) -> dict[str, Callable[[torch.Tensor], object]]:
    """Return every method, fitted to the first of the given tiles or to all."""
    macenko, reinhard = TorchMacenkoNormalizer(), TorchReinhardNormalizer()
    macenko.fit(target[0])
    reinhard.fit(target[0])
    reference = ca.MacenkoReference.fit(target)
    colour, density = ca.ReinhardReference.fit(target), ca.DensityReference.fit(target)
    return {
        "torchstain Macenko": lambda x: [macenko.normalize(t, stains=False) for t in x],
        "torchstain Reinhard": lambda x: [reinhard.normalize(t) for t in x],
        "MacenkoNormalize": ca.MacenkoNormalize(reference),
        "MacenkoNormalize, source given": ca.MacenkoNormalize(reference, source=reference),
        "MacenkoNormalize, tile by tile": lambda x: [ca.MacenkoNormalize(reference)(t) for t in x],
        "ReinhardNormalize": ca.ReinhardNormalize(colour),
        "DensityTransport": ca.DensityTransport(density),
    }


if __name__ == "__main__":
    main()
