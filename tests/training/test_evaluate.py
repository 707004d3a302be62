import pytest
import torch

from training.evaluate import frechet_distance, median_rank, principal_components

F64 = torch.float64


def test_frechet_distance_is_the_closed_form_for_diagonal_covariances():
    """|m1 - m2|^2 + sum (s1 - s2)^2, with sample moments made exact by whitening."""
    torch.manual_seed(0)
    x = torch.randn(500, 4, dtype=F64)
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    white = x @ vectors / values.sqrt()
    first = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64)
    second = torch.tensor([2.0, 2.0, 1.5, 0.1], dtype=F64)
    shift = torch.tensor([1.0, 0.0, -2.0, 0.0], dtype=F64)
    got = frechet_distance(white * first, white * second + shift)
    assert got == pytest.approx(float(5 + (first - second).square().sum()), rel=1e-6)


def test_frechet_distance_to_itself_is_zero_even_when_rank_deficient():
    x = torch.randn(50, 3, dtype=F64) @ torch.randn(3, 8, dtype=F64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_refuses_fewer_samples_than_dimensions():
    with pytest.raises(ValueError, match="5 samples in 8 dimensions"):
        frechet_distance(torch.randn(5, 8, dtype=F64), torch.randn(50, 8, dtype=F64))


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
