"""Scores against a reference, and what few steps may cost."""

from dataclasses import replace

import pytest
import torch

from training.evaluation.metrics import (
    fit_normal,
    frechet_distance,
    kernel_distance,
    principal_components,
)
from training.evaluation.neighbours import manifold_scores
from training.evaluation.scores import ReferenceSet, frechet_excess, score_features

F64 = torch.float64


def features(num, seed, width=6):
    return torch.randn(num, width, dtype=F64, generator=torch.Generator().manual_seed(seed)) + 1


def test_scores_are_those_of_the_metrics():
    real, fake = features(100, 0), 1.1 * features(80, 1)
    scores = score_features(ReferenceSet.of(real), fake)
    assert (scores.num_real, scores.num_fake, scores.num_components) == (100, 80, 6)
    whole = frechet_distance(fit_normal(real), fit_normal(fake))
    assert scores.frechet == pytest.approx(whole)
    # All six directions are among the components.
    assert scores.frechet_projected == pytest.approx(whole)
    assert scores.kernel == kernel_distance(real, fake)
    manifolds = manifold_scores(real, fake)
    assert (scores.precision, scores.recall) == (manifolds.precision, manifolds.recall)
    assert (scores.density, scores.coverage) == (manifolds.density, manifolds.coverage)
    assert scores.cosine is None


def test_there_is_one_component_for_ten_real_tiles():
    real, fake = features(30, 0), features(30, 1)
    scores = score_features(ReferenceSet.of(real), fake)
    basis = principal_components(real, 3)
    assert scores.num_components == 3
    expected = frechet_distance(fit_normal(real @ basis), fit_normal(fake @ basis))
    assert scores.frechet_projected == pytest.approx(expected)


def test_fewer_tiles_than_dimensions_have_no_frechet_distance_but_a_projected_one():
    scores = score_features(ReferenceSet.of(features(40, 0, width=50)), features(60, 1, width=50))
    assert scores.frechet is None
    assert scores.frechet_projected > 0


def test_condition_fidelity_is_one_for_the_sources_and_chance_for_others():
    real = features(50, 0)
    reference = ReferenceSet.of(real)
    assert score_features(reference, real, paired=True).cosine == pytest.approx(1)
    shuffled = score_features(reference, real.roll(7, 0), paired=True)
    assert shuffled.cosine == pytest.approx(shuffled.cosine_unrelated, abs=0.1)


def test_pairs_must_be_as_many():
    with pytest.raises(ValueError, match="expected pairs"):
        score_features(ReferenceSet.of(features(50, 0)), features(49, 1), paired=True)


def test_the_excess_is_measured_from_the_floor():
    floor = score_features(ReferenceSet.of(features(100, 0)), features(100, 1))
    sampler = replace(floor, frechet=3.0)
    student = replace(floor, frechet=3.2)
    floor = replace(floor, frechet=1.0)
    assert frechet_excess(student, sampler, floor) == pytest.approx(1.1)
    # One of them lacks tiles for all dimensions, so all are compared in components.
    few = [
        replace(s, frechet_projected=p) for s, p in ((student, 5.0), (sampler, 4.0), (floor, 2.0))
    ]
    few[2] = replace(few[2], frechet=None)
    assert frechet_excess(*few) == pytest.approx(1.5)


def test_an_excess_over_a_reference_at_the_floor_is_refused():
    scores = score_features(ReferenceSet.of(features(100, 0)), features(100, 1))
    with pytest.raises(ValueError, match="not above the floor"):
        frechet_excess(scores, scores, scores)


def test_an_excess_between_sets_of_unequal_size_is_refused():
    reference = ReferenceSet.of(features(100, 0))
    few, many = (
        score_features(reference, features(50, 1)),
        score_features(reference, features(100, 2)),
    )
    with pytest.raises(ValueError, match="sets of equal size"):
        frechet_excess(few, many, many)
