"""Distances between two sets of tiles, from their features alone: float64 [N, F], one row per tile.

Frechet distance, kernel distance (KID), cosine fidelity and retrieval rank. This module refuses
to know which network made the features and which set is generated.

Sources: Heusel et al. (2017) for the Frechet distance; Binkowski et al. (2018) for the kernel
distance; Chan, Golub and LeVeque (1979) for merging moments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.batches import evenly_spaced

_BLOCK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class NormalFit:
    """A normal distribution fitted to features, in a form that can be merged.

    Attributes:
        count: Tiles seen.
        mean: float64 [F].
        scatter: float64 [F, F], sum over tiles of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 [F, F]."""
        return self.scatter / (self.count - 1)

    def merge(self, other: NormalFit) -> NormalFit:
        """Return the fit to the tiles of both, as if they had been seen together.

        Source: Chan, Golub and LeVeque (1979), eq. 2.1.
        """
        count = self.count + other.count
        apart = other.mean - self.mean
        correction = torch.outer(apart, apart) * (self.count * other.count / count)
        return NormalFit(
            count,
            self.mean + apart * (other.count / count),
            self.scatter + other.scatter + correction,
        )

    def project(self, basis: Tensor) -> NormalFit:
        """Return the fit to `features @ basis`, basis float64 [F, K]."""
        return NormalFit(self.count, self.mean @ basis, basis.T @ self.scatter @ basis)


def fit_normal(features: Tensor) -> NormalFit:
    """Return the normal fit to features [N, F]; merge those of parts for a stream.

    Raises:
        ValueError: Not [N, F] with N >= 1, or a row that is not finite.
    """
    x = checked(features)
    mean = x.mean(0)
    return NormalFit(len(x), mean, (x - mean).T @ (x - mean))


def checked(features: Tensor) -> Tensor:
    """Return features as float64 on the CPU.

    Raises:
        ValueError: Not [N, F] with N >= 1, or a row that is not finite, named.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(
            f"got features of shape {list(features.shape)}, expected [N, F] with N >= 1; "
            "give one row per tile"
        )
    bad = (~features.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"features of {len(bad)} of {len(features)} tiles are not finite, first row "
            f"{bad[0]}; look at that tile, or extract in float32"
        )
    return features.detach().double().cpu()


def spreads(features: Tensor) -> Tensor:
    """Return the standard deviation of each feature of [N, F], for dividing by, float64 [F].

    At least a hundredth of their root mean square: a channel that is all but dead in these tiles
    would otherwise outvote all others for a tile in which it is not. (Half of AlexNet's channels
    are dead in H&E, so a median would be zero.)
    """
    deviations = checked(features).std(0)
    return deviations.clamp_min(max(1e-9, 0.01 * float(deviations.square().mean().sqrt())))


def frechet_distance(first: NormalFit, second: NormalFit) -> float:
    """Return the Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two normal fits.

    With C = A A^T from an eigendecomposition, the trace of the root is the nuclear norm of
    A1^T A2. Unlike the root of a product this stays real and exact for rank-deficient covariances
    (to 1e-12 of the trace where scipy's sqrtm is off by 1e-5).

    Raises:
        ValueError: Different widths, or fewer tiles than dimensions, where the estimate is mostly
            sampling error (60 instead of 0 for 1,000 tiles in 1,536 dimensions).
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"got features of widths {len(first.mean)} and {len(second.mean)}, expected the same; "
            "use one extractor for both sets"
        )
    for fit in (first, second):
        if fit.count < max(2, len(fit.mean)):
            raise ValueError(
                f"{fit.count} tiles in {len(fit.mean)} dimensions, expected at least as many tiles "
                "as dimensions; use more tiles, or project to fewer components"
            )
    apart = (first.mean - second.mean).square().sum()
    a, b = _factor(first.covariance), _factor(second.covariance)
    overlap = torch.linalg.matrix_norm(a.T @ b, "nuc")
    return float(apart + first.covariance.trace() + second.covariance.trace() - 2 * overlap)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Return the unbiased squared MMD of two sets [N, F] and [M, F] under (x.y / F + 1)^3.

    All pairs are used, block by block, so the value has no random part; it is 0 on average for
    two samples of one distribution, and then negative half of the time.

    Source: Binkowski et al. (2018), eq. 4 with the kernel of section 4.
    """
    x, y = checked(first), checked(second)
    within = [
        (_kernel_sum(z, z) - float(_kernel(z.square().sum(1), z.shape[1]).sum()))
        / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    return within[0] + within[1] - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def kernel_distance_of_subsets(
    first: Tensor, second: Tensor, *, subset_size: int, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Return mean and standard deviation of `kernel_distance` over random subsets.

    This is the published protocol, for comparison with numbers from elsewhere.

    Args:
        first: [N, F].
        second: [M, F].
        subset_size: Tiles of each set in a subset, drawn without replacement.
        num_subsets: Subsets.
        seed: Seed of the draws; torch-fidelity draws the same subsets from the same seed.

    Raises:
        ValueError: A subset is larger than a set.
    """
    smallest = min(len(first), len(second))
    if not 2 <= subset_size <= smallest:
        raise ValueError(
            f"subset_size is {subset_size}, expected 2 to {smallest}, the size of the smaller set"
        )
    draws = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        a, b = (
            x[torch.from_numpy(draws.choice(len(x), subset_size, replace=False))]
            for x in (first, second)
        )
        values.append(kernel_distance(a, b))
    return float(np.mean(values)), float(np.std(values))


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of the angle between paired rows of [N, F] and [N, F], float64 [N]."""
    if first.shape != second.shape:
        raise ValueError(
            f"got features of shapes {list(first.shape)} and {list(second.shape)}, expected pairs; "
            "row i of both must belong to the same source tile"
        )
    return torch.nn.functional.cosine_similarity(checked(first), checked(second))


def unrelated_cosine(features: Tensor) -> float:
    """Return the mean cosine between all pairs of different tiles: what chance pairing reaches."""
    unit = torch.nn.functional.normalize(checked(features))
    count = len(unit)
    return float((unit.sum(0).square().sum() - count) / (count * (count - 1)))


def median_rank(real: Tensor, fake: Tensor, num_ranked: int) -> float:
    """Return the median rank (1 = best) of a generated tile's source among real tiles.

    Args:
        real: [N, F] features of the sources; `num_ranked` evenly spaced ones are compared.
        fake: [N, F] features of tiles generated from them.
        num_ranked: Real tiles in the comparison.
    """
    chosen = evenly_spaced(len(real), num_ranked)
    spread = real.std(0).clamp_min(1e-9)
    distance = torch.cdist(fake[chosen] / spread, real[chosen] / spread)
    rank = (distance < distance.diagonal()[:, None]).sum(1) + 1
    return float(rank.double().median())


def principal_components(features: Tensor, number: int) -> Tensor:
    """Return the leading principal directions [F, number] of features [N, F]."""
    return torch.linalg.svd(features - features.mean(0), full_matrices=False).Vh[:number].T


def _factor(covariance: Tensor) -> Tensor:
    """Return A with A A^T = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def _kernel(products: Tensor, width: int) -> Tensor:
    return (products / width + 1).pow(3)


def _kernel_sum(first: Tensor, second: Tensor) -> float:
    """Return the sum of the kernel over all pairs of rows."""
    blocks = ((a, b) for a in first.split(_BLOCK) for b in second.split(_BLOCK))
    return sum(float(_kernel(a @ b.T, a.shape[1]).sum()) for a, b in blocks)
