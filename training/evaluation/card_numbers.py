"""The numbers of the model card: does a model do what its card claims, on validation slides?

AlexNet, which no training stage has seen, judges: retrieval of the source tile from a generated
one, Frechet distance beside the distance between real slides, and how far variations lie apart.

Source: Zhang et al. (2018) for AlexNet features.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from cytosyn_aug.images import images_to_pixels
from cytosyn_aug.model.generator import TileGenerator
from training.data.batches import TileSet, evenly_spaced
from training.evaluation.extractors import Extractor
from training.evaluation.metrics import (
    fit_normal,
    frechet_distance,
    median_rank,
    principal_components,
)
from training.stages.perception import PerceptualNetwork
from training.stages.vae import reconstruction_numbers

Sample = Callable[..., Tensor]
NUM_COMPONENTS = 16
NUM_RANKED = 100
NUM_SOURCES, NUM_VARIATIONS = 8, 5


def card_numbers(
    generator: TileGenerator,
    tiles: TileSet,
    decoded: Tensor,
    generated: Tensor,
    sample: Sample,
    alexnet: Extractor,
) -> dict[str, float]:
    """Return the numbers of the model card, measured on held-out slides.

    Args:
        generator: The model.
        tiles: Validation tiles of several slides.
        decoded: Their round trips through the autoencoder, uint8, row by row.
        generated: Tiles made from their features, uint8, row by row.
        sample: `generator.sample` with the sampler that made them.
        alexnet: The extractor of that name.

    Returns:
        `psnr_db`, `pooled_psnr_db` of the autoencoder, and `round_trip_*`, what the numbers below
        are for its round trips: the floor of any transformer; `median_rank` of the source among
        NUM_RANKED real tiles; `frechet_own` (median over slides, generated against real) and
        `frechet_between` (median over pairs of real slides); `variation_apart`,
        `variation_from_source`, `nearest_real` (median LPIPS-AlexNet distances); and
        `small_decoder_psnr_db` if the model has a small decoder.
    """
    real = alexnet.features(tiles.images)
    numbers = reconstruction_numbers(tiles.images, decoded)
    floor = likeness(real, alexnet.features(decoded), tiles.slide_index)
    numbers |= {f"round_trip_{k}": v for k, v in floor.items()}
    numbers |= likeness(real, alexnet.features(generated), tiles.slide_index)
    if generator.decoder is not None:
        latents = generator.whiten(generator.encode(tiles.images).mean)
        small = generator.decode(latents, is_few_step=True).cpu()
        numbers["small_decoder_psnr_db"] = reconstruction_numbers(tiles.images, small)["psnr_db"]
    return numbers | variation_distances(generator, tiles, real, sample)


def check_tiles(tiles: TileSet) -> None:
    """Raise unless there are slides enough, and tiles enough of each, for `card_numbers`.

    Raises:
        ValueError: Fewer than two slides, or fewer than NUM_COMPONENTS tiles of one.
    """
    counts = torch.bincount(tiles.slide_index, minlength=len(tiles.slides)).tolist()
    if len(counts) < 2 or min(counts) < NUM_COMPONENTS:
        listed = ", ".join(f"{n} of {s}" for s, n in zip(tiles.slides, counts, strict=True))
        raise ValueError(
            f"got held-out tiles {listed}, expected two or more slides with at least "
            f"{NUM_COMPONENTS} tiles each; take more tiles (--num)"
        )


def likeness(real: Tensor, fake: Tensor, slide_index: Tensor) -> dict[str, float]:
    """Return median rank and Frechet distances of tiles made from real ones, row by row."""
    basis = principal_components(real, NUM_COMPONENTS)
    distances = slide_distances(real @ basis, fake @ basis, slide_index)
    return {"median_rank": median_rank(real, fake, NUM_RANKED)} | distances


def slide_distances(real: Tensor, fake: Tensor, slide_index: Tensor) -> dict[str, float]:
    """Return the median Frechet distance of fake to real per slide, and between real slides."""
    slides = slide_index.unique().tolist()
    fits, fakes = ([fit_normal(x[slide_index == s]) for s in slides] for x in (real, fake))
    distances = [frechet_distance(a, b) for a, b in zip(fakes, fits, strict=True)]
    between = [frechet_distance(a, b) for a, b in combinations(fits, 2)]
    return {
        "frechet_own": float(torch.tensor(distances).median()),
        "frechet_own_worst": max(distances),
        "frechet_between": float(torch.tensor(between).quantile(0.5)),
    }


@torch.no_grad()
def variation_distances(
    generator: TileGenerator,
    tiles: TileSet,
    real: Tensor,
    sample: Sample,
) -> dict[str, float]:
    """Return LPIPS distances of variations to each other, to their source, and real neighbours.

    NUM_VARIATIONS tiles are made from each of NUM_SOURCES evenly spaced ones.
    """
    judge = PerceptualNetwork("alex").to(generator.device)
    chosen = evenly_spaced(len(tiles), NUM_SOURCES)
    source = tiles.images[chosen].to(generator.device)
    cls = generator.features(source).cls
    made = sample(cls, per_condition=NUM_VARIATIONS, seed=1000)
    spread = real.std(0).clamp_min(1e-9)
    distance = torch.cdist(real[chosen] / spread, real / spread)
    distance[torch.arange(len(chosen)), chosen] = torch.inf
    neighbour = tiles.images[distance.argmin(1)].to(generator.device)
    # One picture of each source a row, so that every picture passes the network once.
    rows = [*made.unflatten(0, (len(chosen), NUM_VARIATIONS)).unbind(1), source, neighbour]
    *variations, at_source, at_neighbour = (judge(images_to_pixels(row)) for row in rows)
    pairs = [judge.map_distance(a, b) for a, b in combinations(variations, 2)]
    return {
        "variation_apart": float(torch.cat(pairs).median()),
        "variation_apart_least": float(torch.cat(pairs).min()),
        "variation_from_source": float(judge.map_distance(variations[0], at_source).median()),
        "nearest_real": float(judge.map_distance(at_source, at_neighbour).median()),
    }
