"""Does a model do what its card claims? Numbers on validation slides, with a network of its own.

AlexNet, which no training stage has seen, judges: retrieval of the source tile from a generated
one, Frechet distance beside the distance between real slides, and how far variations lie apart.

Source: Heusel et al. (2017) for the Frechet distance; Zhang et al. (2018) for AlexNet features.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.images import images_to_pixels
from training.data import TileSet
from training.perception import PerceptualNetwork
from training.vae import reconstruction_numbers

NUM_COMPONENTS = 16
NUM_RANKED = 100


def evaluate(generator: TileGenerator, tiles: TileSet, steps: int = 16) -> dict[str, float]:
    """Return the numbers of the model card, measured on held-out slides.

    Args:
        generator: The model.
        tiles: Validation tiles of several slides.
        steps: Velocity evaluations of the sampler.

    Returns:
        `psnr_db`, `pooled_psnr_db` of the autoencoder, and `round_trip_*`, what the numbers below
        are for its round trips: the floor of any transformer; `median_rank` of the source among
        NUM_RANKED real tiles; `frechet_own` (median over slides, generated against real) and
        `frechet_between` (median over pairs of real slides); `variation_apart`,
        `variation_from_source`, `nearest_real` (median LPIPS-AlexNet distances).
    """
    judge = PerceptualNetwork("alex").to(generator.device)
    real = describe(judge, tiles.images, generator.device)
    decoded = round_trips(generator, tiles.images)
    numbers = reconstruction_numbers(tiles.images, decoded)
    floor = likeness(real, describe(judge, decoded, generator.device), tiles.slide_index)
    numbers |= {f"round_trip_{k}": v for k, v in floor.items()}
    generated = generator.sample(generator.features(tiles.images).cls, steps=steps, seed=0)
    numbers |= likeness(real, describe(judge, generated, generator.device), tiles.slide_index)
    return numbers | variation_distances(generator, judge, tiles, real, steps)


def round_trips(generator: TileGenerator, images: Tensor) -> Tensor:
    """Encode to the posterior mean and decode, uint8 [N, 3, size, size] to the same."""
    latents = [generator.whiten(generator.encode(part).mean) for part in images.split(16)]
    return torch.cat([generator.decode(part).cpu() for part in latents])


def likeness(real: Tensor, fake: Tensor, slide_index: Tensor) -> dict[str, float]:
    """Return median rank and Frechet distances of tiles made from real ones, row by row."""
    basis = principal_components(real, NUM_COMPONENTS)
    distances = slide_distances(real @ basis, fake @ basis, slide_index)
    return {"median_rank": median_rank(real, fake, NUM_RANKED)} | distances


@torch.no_grad()
def describe(judge: PerceptualNetwork, images: Tensor, device: torch.device) -> Tensor:
    """Return float64 [N, 1152]: AlexNet's five maps averaged over the tile, standardised later."""
    rows = []
    for part in images.split(16):
        maps = judge(images_to_pixels(part.to(device)))
        rows.append(torch.cat([m.float().mean((2, 3)) for m in maps], 1).double().cpu())
    return torch.cat(rows)


def median_rank(real: Tensor, fake: Tensor, num_ranked: int) -> float:
    """Return the median rank (1 = best) of a generated tile's source among real tiles.

    Args:
        real: [N, F] features of the sources; `num_ranked` evenly spaced ones are compared.
        fake: [N, F] features of tiles generated from them.
        num_ranked: Real tiles in the comparison.
    """
    chosen = torch.linspace(0, len(real) - 1, min(num_ranked, len(real))).round().long()
    spread = real.std(0).clamp_min(1e-9)
    distance = torch.cdist(fake[chosen] / spread, real[chosen] / spread)
    rank = (distance < distance.diagonal()[:, None]).sum(1) + 1
    return float(rank.double().median())


def principal_components(features: Tensor, number: int) -> Tensor:
    """Return the leading principal directions [F, number] of features [N, F]."""
    return torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh[:number].T


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of two normal fits to features [N, F], float64.

    tr sqrt(AB) is the nuclear norm of sqrt(A) sqrt(B), exact for rank-deficient covariances.

    Raises:
        ValueError: Fewer samples than dimensions, where the estimate would be meaningless.
    """
    for x in (first, second):
        if len(x) < x.shape[1]:
            raise ValueError(
                f"{len(x)} samples in {x.shape[1]} dimensions; use fewer components or more tiles"
            )
    apart = (first.mean(0) - second.mean(0)).square().sum()
    a, b = torch.cov(first.T), torch.cov(second.T)
    cross = torch.linalg.matrix_norm(_root(a) @ _root(b), "nuc")
    return float(apart + a.trace() + b.trace() - 2 * cross)


def slide_distances(real: Tensor, fake: Tensor, slide_index: Tensor) -> dict[str, float]:
    """Return the median Frechet distance of fake to real per slide, and between real slides."""
    slides = slide_index.unique().tolist()
    own = [frechet_distance(fake[slide_index == s], real[slide_index == s]) for s in slides]
    between = [
        frechet_distance(real[slide_index == a], real[slide_index == b])
        for a, b in combinations(slides, 2)
    ]
    return {
        "frechet_own": float(torch.tensor(own).median()),
        "frechet_own_worst": max(own),
        "frechet_between": float(torch.tensor(between).quantile(0.5)),
    }


@torch.no_grad()
def variation_distances(
    generator: TileGenerator,
    judge: PerceptualNetwork,
    tiles: TileSet,
    real: Tensor,
    steps: int,
    num_sources: int = 8,
    num_variations: int = 5,
) -> dict[str, float]:
    """Return LPIPS distances of variations to each other, to their source, and real neighbours."""
    chosen = torch.linspace(0, len(tiles) - 1, num_sources).round().long()
    source = tiles.images[chosen].to(generator.device)
    cls = generator.features(source).cls
    made = generator.sample(cls, per_condition=num_variations, steps=steps, seed=1000)
    groups = made.unflatten(0, (num_sources, num_variations))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return judge.distance(images_to_pixels(a), images_to_pixels(b)).cpu()

    pairs = [apart(groups[:, i], groups[:, j]) for i, j in combinations(range(num_variations), 2)]
    spread = real.std(0).clamp_min(1e-9)
    distance = torch.cdist(real[chosen] / spread, real / spread)
    distance[torch.arange(num_sources), chosen] = torch.inf
    neighbour = tiles.images[distance.argmin(1)].to(generator.device)
    return {
        "variation_apart": float(torch.cat(pairs).median()),
        "variation_apart_least": float(torch.cat(pairs).min()),
        "variation_from_source": float(apart(groups[:, 0], source).median()),
        "nearest_real": float(apart(source, neighbour).median()),
    }


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
