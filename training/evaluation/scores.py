"""Scores of generated tiles against real ones, and all that one extractor says of a model.

Every score is a function of features, so any network can be the judge, and any two sets can be
compared: the score of real tiles of other patients is the floor that generated ones are held to.
The statistics of a set of real tiles are computed once.

A judgement answers four questions, each with what real tiles would answer beside it:

* How far are generated tiles from real tiles of held-out slides, and how far is real from real?
* Do they come nearer to training tiles than held-out tiles do?
* Do they explain held-out tiles as well as training tiles do (feature likelihood divergence)?
* Are they better for slides that were trained on than for slides that were not?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.batches import TileSet
from training.evaluation.extractors import Extractor
from training.evaluation.likelihood import FeatureLikelihood, likelihood_reference
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
from training.evaluation.neighbours import (
    Nearness,
    manifold_scores,
    nearest_neighbours,
    nearness,
    neighbour_radii,
)

TILES_PER_COMPONENT = 10
GENERATED, ROUND_TRIPS = "generated", "round trips"
GAP_METRICS = ("frechet_projected", "kernel", "precision", "recall", "coverage", "cosine")


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
    """What `score_features` finds; lower is better for distances, higher for the rest.

    Attributes:
        num_real: Tiles in the reference.
        num_fake: Tiles compared with it.
        frechet: Frechet distance in all dimensions; None with fewer tiles than dimensions. It is
            biased upwards below about ten tiles per dimension.
        frechet_projected: The same in `num_components` leading components of real tiles.
        num_components: Components of `frechet_projected`.
        kernel: Unbiased squared MMD (KID).
        precision: Share of generated tiles that lie among real ones.
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


def score_features(real: ReferenceSet, fake: Tensor, *, paired: bool = False) -> Scores:
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


@dataclass(frozen=True, slots=True, eq=False)
class MadeTiles:
    """Real tiles and, row by row, what a model made of them; uint8 [N, 3, H, W] each.

    Attributes:
        real: The sources.
        generated: Sampled from noise and the sources' features.
        round_trips: Encoded and decoded: the floor of any transformer.
    """

    real: TileSet
    generated: Tensor
    round_trips: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSets:
    """All tiles of an evaluation.

    Attributes:
        held_out: Of slides that no training stage has seen.
        training_slides: Of slides that were trained on.
        bank: uint8 [M, 3, H, W], training tiles, none of which is in `training_slides`.
    """

    held_out: MadeTiles
    training_slides: MadeTiles
    bank: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judgement:
    """The answers of one extractor.

    Attributes:
        name: Name of the extractor.
        provenance: Its weights and preprocessing.
        num_features: Width of its features.
        scores: Against real tiles of held-out slides, by set.
        floors: Real against real, by how the two sets were chosen.
        gap: By set, the scores for held-out slides and those for slides that were trained on.
        nearness: To training tiles, by set.
        likelihood: Feature likelihood divergence, by set.
        cosines: Cosine of each made tile to its source, by set; float64 [N].
        distances: Distance to the nearest training tile, by set; float64 [N].
        nearest: Position in the bank of each generated tile's nearest training tile, int64 [N].
    """

    name: str
    provenance: dict[str, object]
    num_features: int
    scores: dict[str, Scores]
    floors: dict[str, Scores]
    gap: dict[str, tuple[Scores, Scores]]
    nearness: dict[str, Nearness]
    likelihood: dict[str, FeatureLikelihood]
    cosines: dict[str, Tensor]
    distances: dict[str, Tensor]
    nearest: Tensor


def judge(extractor: Extractor, sets: EvaluationSets, *, seed: int = 0) -> Judgement:
    """Return what an extractor says of the sets.

    The projected Frechet distance uses one basis throughout, the leading components of the
    training tiles, one for ten held-out tiles, so that all its values can be compared.

    Args:
        extractor: The judge.
        sets: What to judge.
        seed: Seed of the subsets of the feature likelihood divergence.
    """
    bank = extractor.features(sets.bank)
    unseen, known = (_features(extractor, s) for s in (sets.held_out, sets.training_slides))
    number = max(1, min(len(unseen["real"]), len(known["real"])) // TILES_PER_COMPONENT)
    basis = principal_components(bank, number)
    reference, seen_reference = (ReferenceSet.of(s["real"], basis) for s in (unseen, known))
    tile_sets = (GENERATED, ROUND_TRIPS)
    scores = {k: score_features(reference, unseen[k], paired=True) for k in tile_sets}
    gap = {k: (scores[k], score_features(seen_reference, known[k], paired=True)) for k in tile_sets}
    floors = {"tiles of training slides": score_features(reference, known["real"])}
    floors |= half_floors(unseen["real"], sets.held_out.real.slide_index, basis)
    others = {
        GENERATED: unseen[GENERATED],
        "generated from training tiles": known[GENERATED],
        ROUND_TRIPS: unseen[ROUND_TRIPS],
        "real, of training slides": known["real"],
    }
    nearest = {k: nearest_neighbours(x, bank) for k, x in others.items()}
    held_out_distances = nearest_neighbours(unseen["real"], bank)[0]
    likelihood = likelihood_reference(bank, unseen["real"], seed=seed)
    return Judgement(
        name=extractor.name,
        provenance=extractor.provenance(),
        num_features=bank.shape[1],
        scores=scores,
        floors=floors,
        gap=gap,
        nearness={k: nearness(d, held_out_distances) for k, (d, _) in nearest.items()},
        likelihood={k: likelihood.score(x) for k, x in others.items()},
        cosines={k: cosine_similarity(unseen["real"], unseen[k]) for k in tile_sets},
        distances={"real, held out": held_out_distances} | {k: d for k, (d, _) in nearest.items()},
        nearest=nearest[GENERATED][1],
    )


def half_floors(features: Tensor, slide_index: Tensor, basis: Tensor) -> dict[str, Scores]:
    """Return real-against-real scores of halves: of the tiles, and of the slides.

    Halves of the tiles share their slides, so they show sampling error alone; halves of the slides
    show how far patients lie apart. Both have half the tiles, which raises Frechet distances.

    Args:
        features: float64 [N, F] of real tiles.
        slide_index: int64 [N], the slide of each.
        basis: Directions of the projected Frechet distance.
    """
    order = torch.arange(len(features))
    masks = {"half of the tiles against the other": order % 2 == 0}
    if len(slide_index.unique()) > 1:
        masks["half of the slides against the other"] = slide_index % 2 == 0
    return {
        name: score_features(ReferenceSet.of(features[mask], basis), features[~mask])
        for name, mask in masks.items()
    }


def gap_rows(held_out: Scores, training: Scores) -> Mapping[str, tuple[float, float, float]]:
    """Return value for held-out slides, for training slides, and the first less the second."""
    rows = {}
    for metric in GAP_METRICS:
        a, b = getattr(held_out, metric), getattr(training, metric)
        rows[metric] = (a, b, a - b)
    return rows


def _features(extractor: Extractor, made: MadeTiles) -> dict[str, Tensor]:
    return {
        "real": extractor.features(made.real.images),
        GENERATED: extractor.features(made.generated),
        ROUND_TRIPS: extractor.features(made.round_trips),
    }
