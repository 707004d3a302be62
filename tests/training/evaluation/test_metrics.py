"""Distances against closed forms, brute force and torch-fidelity."""

import numpy as np
import pytest
import torch

from training.evaluation import metrics
from training.evaluation.metrics import (
    NormalFit,
    cosine_similarity,
    fit_normal,
    frechet_distance,
    kernel_distance,
    kernel_distance_of_subsets,
    median_rank,
    principal_components,
    unrelated_cosine,
)

F64 = torch.float64


def normal(mean, covariance, count=1000):
    covariance = torch.as_tensor(covariance, dtype=F64)
    return NormalFit(count, torch.as_tensor(mean, dtype=F64), covariance * (count - 1))


def sample(num, width, seed=0):
    """Draw correlated features whose mean is large beside their spread."""
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, dtype=F64, generator=torch.Generator().manual_seed(99))
    return torch.randn(num, width, dtype=F64, generator=draws) @ mix / width**0.5 + 30


def test_frechet_distance_is_the_closed_form_for_commuting_covariances():
    """|m1 - m2|^2 + sum (s1 - s2)^2 with common eigenvectors."""
    basis = torch.linalg.qr(sample(4, 4))[0]
    first = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64)
    second = torch.tensor([2.0, 2.0, 1.5, 0.1], dtype=F64)
    a, b = (basis @ torch.diag(s.square()) @ basis.T for s in (first, second))
    got = frechet_distance(normal([0, 0, 0, 0], a), normal([1, 0, -2, 0], b))
    assert got == pytest.approx(float(5 + (first - second).square().sum()), rel=1e-12)


def test_frechet_distance_is_the_closed_form_for_covariances_that_do_not_commute():
    """In two dimensions tr (AB)^(1/2) = (tr AB + 2 (det A det B)^(1/2))^(1/2)."""
    a = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=F64)
    b = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=F64)
    assert not torch.allclose(a @ b, b @ a)
    root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = float(25 + a.trace() + b.trace() - 2 * root)
    assert frechet_distance(normal([3, 0], a), normal([0, 4], b)) == pytest.approx(expected)


def test_frechet_distance_is_the_closed_form_for_a_covariance_of_rank_one():
    """For A = a a^T, tr (AB)^(1/2) = (a^T B a)^(1/2)."""
    b = torch.cov(sample(50, 6).T)
    a = torch.arange(1.0, 7.0, dtype=F64)
    expected = float(a @ a + b.trace() - 2 * (a @ b @ a).sqrt())
    got = frechet_distance(normal([0.0] * 6, torch.outer(a, a)), normal([0.0] * 6, b))
    assert got == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_rank_deficient_sets_with_equal_moments_is_zero():
    """Where scipy's sqrtm gives 1e-5 of the trace, and complex numbers."""
    x = sample(400, 40) @ sample(40, 256, seed=1)
    first, second = fit_normal(x), fit_normal(x.flip(0))
    assert abs(frechet_distance(first, second)) < 1e-9 * float(first.covariance.trace())


def test_frechet_distance_does_not_depend_on_order_of_tiles_or_arguments():
    x, y = sample(60, 5), sample(70, 5, seed=1)
    distance = frechet_distance(fit_normal(x), fit_normal(y))
    turned = frechet_distance(fit_normal(y.flip(0)), fit_normal(x.flip(0)))
    assert turned == pytest.approx(distance, rel=1e-9)


def test_frechet_distance_refuses_fewer_tiles_than_dimensions():
    with pytest.raises(ValueError, match="5 tiles in 8 dimensions"):
        frechet_distance(fit_normal(sample(5, 8)), fit_normal(sample(50, 8)))


def test_frechet_distance_refuses_features_of_different_widths():
    with pytest.raises(ValueError, match="widths 3 and 4"):
        frechet_distance(fit_normal(sample(9, 3)), fit_normal(sample(9, 4)))


@pytest.mark.parametrize("size", [1, 7, 64, 300])
def test_merged_fits_of_parts_are_the_fit_of_the_whole(size):
    """With a mean far above the spread, where a sum of squares would lose all digits."""
    x = sample(300, 6) + 1e6
    parts = [fit_normal(part) for part in x.split(size)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.count == 300
    torch.testing.assert_close(merged.mean, x.mean(0))
    torch.testing.assert_close(merged.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-8)


def test_the_fit_of_projections_is_the_projection_of_the_fit():
    x = sample(50, 6)
    basis = principal_components(x, 3)
    got, expected = fit_normal(x).project(basis), fit_normal(x @ basis)
    torch.testing.assert_close(got.mean, expected.mean)
    torch.testing.assert_close(got.scatter, expected.scatter)


def test_features_that_are_not_finite_are_named():
    x = sample(20, 3)
    x[7, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 20 tiles are not finite, first row 7"):
        fit_normal(x)


def brute_force_kernel_distance(x, y):
    def k(a, b):
        return float((a @ b / len(a) + 1) ** 3)

    within = [
        sum(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j)
        / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    return sum(within) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_kernel_distance_is_the_mean_over_pairs(monkeypatch):
    x, y = sample(9, 4) / 10, sample(11, 4, seed=1) / 12
    expected = brute_force_kernel_distance(x, y)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(metrics, "_BLOCK", 4)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_zero_on_average_for_one_distribution_and_positive_for_two():
    draws = torch.Generator().manual_seed(0)

    def value(shift):
        x, y = (torch.randn(40, 5, dtype=F64, generator=draws) for _ in range(2))
        return kernel_distance(x, y + shift)

    same = np.array([value(0.0) for _ in range(300)])
    error = same.std() / 300**0.5
    assert abs(same.mean()) < 4 * error
    assert (same < 0).mean() > 0.3  # unbiased: as often below zero as above
    assert np.mean([value(0.5) for _ in range(20)]) > 40 * error


def test_the_whole_set_as_a_subset_gives_the_kernel_distance():
    x, y = sample(20, 4), sample(20, 4, seed=1)
    mean, deviation = kernel_distance_of_subsets(x, y, subset_size=20, num_subsets=3)
    assert mean == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert deviation < 1e-6 * abs(mean)


def test_a_subset_larger_than_a_set_is_refused():
    with pytest.raises(ValueError, match="subset_size is 21, expected 2 to 20"):
        kernel_distance_of_subsets(sample(20, 4), sample(30, 4), subset_size=21)


# Of torch-fidelity 0.4.0 for the two sets below.
RECORDED_FRECHET = 1.4326632894460118
RECORDED_KERNEL = (0.05571818394978338, 0.036033160125595376)


def reference_sets():
    """Return two sets that every machine draws alike."""
    draws = np.random.RandomState(0)
    x = draws.normal(size=(300, 16))
    y = 1.2 * draws.normal(size=(260, 16)) + 0.1
    return torch.from_numpy(x), torch.from_numpy(y)


def test_distances_are_those_recorded_from_torch_fidelity():
    x, y = reference_sets()
    frechet = frechet_distance(fit_normal(x), fit_normal(y))
    assert frechet == pytest.approx(RECORDED_FRECHET, rel=1e-6)
    kernel = kernel_distance_of_subsets(x, y, subset_size=100, num_subsets=10, seed=7)
    assert kernel == pytest.approx(RECORDED_KERNEL, rel=1e-9)


def test_distances_are_torch_fidelitys():
    fid = pytest.importorskip(
        "torch_fidelity.metric_fid", reason="torch-fidelity is absent: only recorded numbers"
    )
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = reference_sets()
    theirs = fid.fid_statistics_to_metric(
        *(fid.fid_features_to_statistics(z) for z in (x, y)), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(fit_normal(x), fit_normal(y)) == pytest.approx(theirs, rel=1e-6)
    found = kid.kid_features_to_metric(
        x, y, kid_subsets=10, kid_subset_size=100, rng_seed=7, verbose=False
    )
    got = kernel_distance_of_subsets(x, y, subset_size=100, num_subsets=10, seed=7)
    assert got == pytest.approx(tuple(found.values()), rel=1e-9)


def test_unrelated_cosine_is_the_mean_over_pairs_of_different_tiles():
    x = sample(12, 3) - 30
    pairs = [
        float(cosine_similarity(x[[i]].expand(2, -1), x[[j]].expand(2, -1))[0])
        for i in range(12)
        for j in range(12)
        if i != j
    ]
    assert unrelated_cosine(x) == pytest.approx(np.mean(pairs))


def test_cosines_need_pairs():
    with pytest.raises(ValueError, match="expected pairs"):
        cosine_similarity(sample(5, 3), sample(6, 3))


def test_the_rank_of_identical_features_is_one_and_of_foreign_ones_is_chance():
    torch.manual_seed(0)
    real = torch.randn(100, 6, dtype=F64)
    assert median_rank(real, real, 100) == 1
    assert 25 < median_rank(real, torch.randn(100, 6, dtype=F64), 100) < 75


def test_principal_components_are_orthonormal_and_lead_with_the_largest():
    x = torch.randn(400, 5, dtype=F64) * torch.tensor([1.0, 9.0, 1.0, 4.0, 1.0], dtype=F64)
    basis = principal_components(x, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=F64))
    assert basis[:, 0].abs().argmax() == 1
    assert basis[:, 1].abs().argmax() == 3
