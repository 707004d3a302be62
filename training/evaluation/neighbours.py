"""What nearest neighbours in feature space say: precision, recall, density, coverage, copies.

Distances are Euclidean, in float64 and from differences rather than from products, because the
products' rounding hides near-duplicates, which are what a search for copies is about. Distance
matrices are never held whole. This module refuses to know which network made the features.

Sources: Kynkaanniemi et al. (2019) for precision and recall; Naeem et al. (2020) for density and
coverage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from training.evaluation.metrics import checked, spreads

NUM_NEIGHBOURS = 5
_CHUNK = 512


class Manifolds(NamedTuple):
    """How two sets of tiles cover each other; each about 1 for two samples of one distribution.

    Attributes:
        precision: Share of generated tiles inside a real tile's ball.
        recall: Share of real tiles inside a generated tile's ball.
        density: Mean number of real balls around a generated tile, over the number of neighbours;
            above 1 where tiles crowd around the mode.
        coverage: Share of real tiles whose ball holds a generated tile.
    """

    precision: float
    recall: float
    density: float
    coverage: float


class Nearness(NamedTuple):
    """How near generated tiles come to training tiles, beside held-out real tiles.

    Attributes:
        fake: Median distance of a generated tile to its nearest training tile, in standard
            deviations of the training tiles, root mean square over features.
        real: The same of held-out real tiles.
        ratio: `fake / real`; well below 1 for copies, and for tiles duller than real ones.
        closer_share: Share of generated tiles nearer to a training tile than 99 of 100 held-out
            tiles are; 0.01 is expected, copies raise it.
    """

    fake: float
    real: float
    ratio: float
    closer_share: float


def neighbour_radii(features: Tensor, num_neighbours: int = NUM_NEIGHBOURS) -> Tensor:
    """Return each tile's distance to its k-th nearest other tile, float64 [N].

    Raises:
        ValueError: Fewer than `num_neighbours` other tiles.
    """
    x = checked(features)
    if not 1 <= num_neighbours < len(x):
        raise ValueError(
            f"got {len(x)} tiles for {num_neighbours} neighbours, expected more tiles than that"
        )
    # The tile itself is the nearest of all, at distance 0.
    return torch.cat([rows.kthvalue(num_neighbours + 1).values for rows in _distances(x, x)])


def manifold_scores(
    real: Tensor,
    fake: Tensor,
    *,
    real_radii: Tensor | None = None,
    num_neighbours: int = NUM_NEIGHBOURS,
) -> Manifolds:
    """Return precision, recall, density and coverage of `fake` [M, F] against `real` [N, F].

    Args:
        real: [N, F].
        fake: [M, F].
        real_radii: `neighbour_radii(real, num_neighbours)`, if already known.
        num_neighbours: Neighbours k that span a ball.

    Returns:
        Strict inequalities as in Naeem et al.; Kynkaanniemi et al. count the border too.
    """
    x, y = checked(real), checked(fake)
    radii = neighbour_radii(x, num_neighbours) if real_radii is None else real_radii
    fake_radii = neighbour_radii(y, num_neighbours)
    num_around = torch.zeros(len(y), dtype=torch.float64)
    recalled, covered = [], []
    for rows, radius in zip(_distances(x, y), radii.split(_CHUNK), strict=True):
        num_around += (rows < radius[:, None]).sum(0)
        recalled.append((rows < fake_radii).any(1))
        covered.append(rows.amin(1) < radius)
    return Manifolds(
        precision=float((num_around > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(num_around.mean()) / num_neighbours,
        coverage=float(torch.cat(covered).double().mean()),
    )


def nearest_neighbours(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Return distance and position in `bank` [M, F] of each query's nearest tile.

    Args:
        queries: [N, F].
        bank: [M, F]; each feature is divided by its deviation (`spreads`) in them.

    Returns:
        float64 [N], root mean square over features, in standard deviations; int64 [N].
    """
    x, y = checked(queries), checked(bank)
    spread = spreads(y) * y.shape[1] ** 0.5
    found = [rows.min(1) for rows in _distances(x / spread, y / spread)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def nearness(fake: Tensor, held_out: Tensor) -> Nearness:
    """Return how near generated tiles come to training tiles.

    Args:
        fake: Distances of generated tiles to their nearest training tile, float64 [N].
        held_out: The same of real tiles that were not trained on, float64 [M].
    """
    near = float(held_out.quantile(0.01))
    medians = float(fake.median()), float(held_out.median())
    ratio = medians[0] / medians[1] if medians[1] else float("nan")
    return Nearness(*medians, ratio, float((fake < near).double().mean()))


def _distances(first: Tensor, second: Tensor) -> Iterator[Tensor]:
    """Yield the distances [<= _CHUNK, M] of consecutive rows of `first` to `second`."""
    for rows in first.split(_CHUNK):
        yield torch.cdist(rows, second, compute_mode="donot_use_mm_for_euclid_dist")
