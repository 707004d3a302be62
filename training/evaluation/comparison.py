"""Scores of generated tiles against a set of real ones, whose statistics are computed once.

Every score is a function of features, so any network can be the judge, and any two sets can be
compared: the score of real tiles of other patients is the floor that generated ones are held to.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from training.evaluation.metrics import (
    NormalFit,
    checked,
    cosine_similarity,
    fit_normal,
    frechet_distance,
    kernel_distance,
    principal_components,
    unrelated_cosine,
)
from training.evaluation.neighbours import manifold_scores, neighbour_radii

TILES_PER_COMPONENT = 10


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceSet:
    """Features of real tiles with all that comparisons need of them.

    Attributes:
        features: float64 [N, F].
        basis: float64 [F, K], orthonormal directions of the projected Frechet distance.
        fit: Normal fit to `features`.
        radii: Distance of each tile to its fifth neighbour, float64 [N].
        unrelated_cosine: Mean cosine between two different tiles of the set.
    """

    features: Tensor
    basis: Tensor
    fit: NormalFit
    radii: Tensor
    unrelated_cosine: float

    @classmethod
    def of(cls, features: Tensor, basis: Tensor | None = None) -> ReferenceSet:
        """Compute the statistics of real tiles, features [N, F].

        Args:
            features: [N, F].
            basis: Directions for the projected Frechet distance, so that several sets can share
                them; None for the leading N / TILES_PER_COMPONENT components of `features`.
        """
        x = checked(features)
        if basis is None:
            basis = principal_components(x, max(1, len(x) // TILES_PER_COMPONENT))
        return cls(x, basis, fit_normal(x), neighbour_radii(x), unrelated_cosine(x))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What `compare` finds; lower is better for distances, higher for the rest.

    Attributes:
        num_real: Tiles in the reference.
        num_fake: Tiles compared with it.
        frechet: Frechet distance in all dimensions; None with fewer tiles than dimensions. It is
            biased upwards below about ten tiles a dimension.
        frechet_projected: The same in `num_components` leading components of real tiles.
        num_components: Components of `frechet_projected`.
        kernel: Unbiased squared MMD (KID).
        precision: See `training.evaluation.neighbours.Manifolds`, like the next three.
        recall: Share of real tiles that generated ones surround.
        density: How crowded generated tiles are around real ones.
        coverage: Share of real tiles with a generated one nearby.
        cosine: Mean cosine between a generated tile and the real tile it was made from; None if
            the sets are not paired.
        cosine_unrelated: Mean cosine between two different real tiles, which chance reaches.
    """

    num_real: int
    num_fake: int
    frechet: float | None
    frechet_projected: float
    num_components: int
    kernel: float
    precision: float
    recall: float
    density: float
    coverage: float
    cosine: float | None
    cosine_unrelated: float


def compare(real: ReferenceSet, fake: Tensor, *, paired: bool = False) -> Scores:
    """Return the scores of tiles with features [M, F] against real ones.

    Args:
        real: Statistics of the real tiles.
        fake: [M, F] features of the tiles to judge, of the same extractor.
        paired: Whether row i of `fake` was made from row i of the real tiles.

    Raises:
        ValueError: Too few tiles, features that are not finite, or pairs of unequal number.
    """
    x = checked(fake)
    fit = fit_normal(x)
    width, smaller = x.shape[1], min(len(x), len(real.features))
    projected = frechet_distance(real.fit.project(real.basis), fit.project(real.basis))
    manifolds = manifold_scores(real.features, x, real_radii=real.radii)
    return Scores(
        num_real=len(real.features),
        num_fake=len(x),
        frechet=frechet_distance(real.fit, fit) if smaller >= width else None,
        frechet_projected=projected,
        num_components=real.basis.shape[1],
        kernel=kernel_distance(real.features, x),
        **manifolds._asdict(),
        cosine=float(cosine_similarity(real.features, x).mean()) if paired else None,
        cosine_unrelated=real.unrelated_cosine,
    )


def frechet_excess(candidate: Scores, reference: Scores, floor: Scores) -> float:
    """Return (candidate - floor) / (reference - floor) of the Frechet distance.

    What few steps cost: 1 means as good as the sampler they stand for. All three must be of the
    same real set and number of tiles, because the distance depends on it; all dimensions are used
    where there are enough tiles for all three.

    Raises:
        ValueError: The sets differ in size, or the reference is no further away than the floor.
    """
    shapes = {(s.num_real, s.num_fake, s.num_components) for s in (candidate, reference, floor)}
    if len(shapes) > 1:
        raise ValueError(
            f"got (real, generated, components) {sorted(shapes)}, expected one triple; score sets "
            "of equal size against one ReferenceSet"
        )
    full = [s.frechet for s in (candidate, reference, floor) if s.frechet is not None]
    a, b, c = (
        full if len(full) == 3 else [s.frechet_projected for s in (candidate, reference, floor)]
    )
    if b <= c:
        raise ValueError(
            f"the reference's distance {b:.4g} is not above the floor {c:.4g}, so a ratio says "
            "nothing; use more tiles or another extractor"
        )
    return (a - c) / (b - c)
